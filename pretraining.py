"""Continued pretraining (PT): the model reads domain text and learns its words and facts, token by token.

Changes what the model knows, not how it answers: after it the model continues texts of the domain better (perplexity
falls); that it answers questions comes with supervised_finetuning.py.

    python pretraining.py --model_name_or_path outputs/tiny-base --train_file_dir data/pretrain --output_dir outputs/pt
    torchrun --nproc_per_node 2 pretraining.py --model_name_or_path outputs/tiny-base \\
        --train_file_dir data/pretrain --output_dir outputs/pt --use_peft False

Data, in one folder in any mixture: .txt (a document a line), .md (a document a file), and .jsonl or .json with

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
    train_sampling_strategy: str = field(
        default="random",
        metadata={
            "help": "random; sequential: in the order of the data; group_by_length, for --packing False.",
            "choices": ["random", "sequential", "group_by_length"],
        },
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
        program="pretraining.py",
    )
    from medicalgpt.data.encoding import document_starts, encode_document
    from medicalgpt.data.prepared import load_and_encode
    from medicalgpt.formats.conversion import to_text
    from medicalgpt.models import loading
    from medicalgpt.training.runs import Run
    from medicalgpt.training.stream_trainer import check_flags, token_trainer
    from medicalgpt.training.trainers import training_defaults

    from transformers import AutoModelForCausalLM

    training_defaults(args, adapter_rate=2e-4, full_rate=5e-5, use_peft=lora_args.use_peft)
    check_flags(data_args, args, rows_can_be_too_long=False)
    checkpoint = loading.stage_checkpoint(model_args, lora_args)
    loading.resolve_length(args, "block_size", checkpoint, attention_args)
    run = Run("pretraining", args, checkpoint, run_args, model_args, attention_args, data_args, lora_args)

    # 2 tokenizer
    tokenizer = loading.stage_tokenizer(checkpoint, model_args)
    run.add_tokenizer(tokenizer)

    # 3 data: documents become pieces of at most one block; no token is lost
    encode = partial(encode_document, tokenizer, block_size=args.block_size)
    packed = args.block_size if args.packing else None
    data, train, validation = load_and_encode(
        data_args, to_text, encode, seed=args.order_seed, document_unit=args.document_unit, block_size=packed
    )
    run.add_data(data)
    run.preview(tokenizer, train)

    # 4 model
    model = loading.load_trainable(
        AutoModelForCausalLM,
        checkpoint,
        tokenizer,
        model_args,
        lora_args,
        attention_args,
        max_length=args.block_size,
        bf16=args.bf16,
    )

    # 5 trainer: perplexity is measured on each document alone, so it does not depend on how blocks are filled
    trainer = token_trainer(
        *(model, args, tokenizer, data, encode, train, validation),
        block_size=args.block_size,
        streaming=data_args.streaming,
        loraplus_lr_ratio=lora_args.loraplus_lr_ratio,
    )

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
