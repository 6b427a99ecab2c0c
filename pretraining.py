"""Continued pretraining (PT): the model reads domain text and learns its words and facts, token by token.

Changes what the model knows, not how it answers: after it the model continues texts of the domain better (perplexity
falls); that it answers questions comes with supervised_finetuning.py.

    python pretraining.py --model_name_or_path outputs/tiny-base --train_file_dir data/pretrain --output_dir outputs/pt
    torchrun --nproc_per_node 2 pretraining.py --model_name_or_path outputs/tiny-base \\
        --train_file_dir data/pretrain --output_dir outputs/pt --use_peft False

Data, in one folder and mixed as you like: .txt (a document a line), .md (a document a file), and .jsonl or .json with

    {"text": "Acute bronchitis is an inflammation of the airways ..."}

In --output_dir: the adapter (or all weights with --use_peft False), the tokenizer, run.json, metrics.jsonl,
samples.jsonl, loss.png and README.md. Guide: docs/pretraining.md
"""

from dataclasses import dataclass, field
from functools import partial

from medicalgpt.args import (
    AttentionArguments,
    DataArguments,
    LoraArguments,
    ModelArguments,
    RunArguments,
    StageDefaults,
)
from medicalgpt.errors import run_main
from medicalgpt.parser import parse_args
from medicalgpt.refusals import UNUSED_SFT_ARGUMENTS

from trl import SFTConfig


@dataclass
class PretrainingArguments(StageDefaults, SFTConfig):
    """What differs from TRL's `SFTConfig`."""

    output_dir: str = field(default="outputs-pt", metadata={"help": "Where the result goes."})
    block_size: int = field(
        default=1024,
        metadata={
            "help": "Tokens of a training block, filled with whole documents. Unset: less if the model has fewer "
            "positions."
        },
    )
    document_unit: str = field(
        default="auto",
        metadata={
            "help": "What one document is in .txt and .md files; auto: a line of .txt, a whole .md file.",
            "choices": ["auto", "line", "paragraph", "file"],
        },
    )
    # Documents are much shorter than blocks; unpacked, most of a batch would be padding.
    packing: bool = field(
        default=True, metadata={"help": "Fill blocks with several documents that do not see each other."}
    )
    # None: 2e-4 for adapters, 5e-5 for all weights, which would forget at the rate that suits an adapter.
    learning_rate: float | None = field(default=None, metadata={"help": "Default: 2e-4 for adapters, 5e-5 without."})


def main() -> None:
    # 1 arguments
    model_args, attention_args, data_args, lora_args, run_args, args = parse_args(
        ModelArguments,
        AttentionArguments,
        DataArguments,
        LoraArguments,
        RunArguments,
        PretrainingArguments,
        description=__doc__,
        unused=UNUSED_SFT_ARGUMENTS | {"group_by_length": "Blocks are of equal length."},
    )
    from medicalgpt.data import batching
    from medicalgpt.data.encoding import document_starts, encode_document
    from medicalgpt.data.formats import to_text
    from medicalgpt.data.loading import load_data
    from medicalgpt.data.streaming import StreamedSamples, check_data
    from medicalgpt.data.tokenizing import encode_sides
    from medicalgpt.models import adapters, hub, loading
    from medicalgpt.training.runs import Run
    from medicalgpt.training.stream_trainer import StreamTrainer, check_flags
    from medicalgpt.training.trainers import TokenTrainer, training_defaults

    from peft import TaskType
    from transformers import AutoModelForCausalLM

    training_defaults(args, adapter_rate=2e-4, full_rate=5e-5, use_peft=lora_args.use_peft)
    check_flags(data_args, args, rows_can_be_too_long=False)
    loading.settle_length(args, "block_size", model_args, lora_args, attention_args)
    run = Run("pretraining", args, model_args, run_args, attention_args, data_args, lora_args)

    # 2 tokenizer
    tokenizer = loading.stage_tokenizer(model_args, lora_args)

    # 3 data: documents become pieces of at most one block; no token is lost
    load = check_data if data_args.streaming else load_data
    data = load(data_args, to_text, document_unit=args.document_unit, seed=args.order_seed)
    encode = partial(encode_document, tokenizer, block_size=args.block_size)
    train, validation = encode_sides(data, encode, data_args, args.order_seed)
    run.add_data(data)
    run.preview(tokenizer, train)

    # 4 model
    model = loading.load_base(
        AutoModelForCausalLM, model_args, lora_args, attention_args, max_length=args.block_size, bf16=args.bf16
    )
    new_rows = loading.fit_embedding(model, tokenizer, lora_args, cache_dir=model_args.cache_dir)
    _, adapter = hub.resolve_checkpoint(model_args.model_name_or_path)
    model = adapters.add_lora(model, lora_args, TaskType.CAUSAL_LM, start_from=adapter, new_rows=new_rows)

    # 5 trainer: perplexity is measured on each document alone, so it does not depend on how blocks are filled
    block_size = args.block_size if args.packing else None
    if data_args.streaming:
        train = StreamedSamples(data, encode, train, block_size, args.process_index, args.world_size)
    elif args.packing:
        train = batching.pack(train, block_size)
    trainer = (StreamTrainer if data_args.streaming else TokenTrainer)(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        data_collator=batching.collator(tokenizer, model),
        loraplus_lr_ratio=lora_args.loraplus_lr_ratio,
    )
    adapters.adapters_to_float32(model)

    # 6 train, save
    run.announce(model, trainer.train_dataset, validation)
    run.train_and_save(
        trainer,
        tokenizer,
        stop_ids=[tokenizer.eos_token_id],
        sample_prompts=document_starts(tokenizer, data.validation or data.train, run_args.sample_prompts),
        note="Continued pretraining: the model has read the texts below.",
    )


if __name__ == "__main__":
    run_main(main)
