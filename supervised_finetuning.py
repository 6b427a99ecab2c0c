"""Supervised fine-tuning (SFT): the model learns to answer, from conversations, by imitating the assistant's turns.

Changes how the model behaves: it takes up the chat template, answers instead of continuing, and stops by itself. Only
the assistant's text and the end of its turn are trained on, whatever the number of turns.

    python supervised_finetuning.py --model_name_or_path outputs/tiny-base --train_file_dir data/finetune \\
        --output_dir outputs/sft
    torchrun --nproc_per_node 2 supervised_finetuning.py --model_name_or_path outputs/tiny-base \\
        --train_file_dir data/finetune --output_dir outputs/sft --load_in_4bit True --qlora True

Data (.jsonl or .json), recognised row by row: ShareGPT `conversations`, OpenAI `messages`, Alpaca, prompt and response:

    {"conversations": [{"from": "human", "value": "How is a cold treated?"}, {"from": "gpt", "value": "With rest ..."}]}

With Qwen2.5-VL or Qwen3-VL as the base, rows may have images, as paths relative to the data file:

    {"messages": [{"role": "user", "content": "<image>What is this?"}, ...], "images": ["xray/1.png"]}

In --output_dir: the adapter (or all weights with --use_peft False), the tokenizer with the chat template that was
trained, generation_config.json with its stop tokens, run.json, metrics.jsonl, samples.jsonl, loss.png and README.md.
Guide: docs/supervised_finetuning.md
"""

from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

from medicalgpt.args import (
    AttentionArguments,
    DataArguments,
    LoraArguments,
    ModelArguments,
    RunArguments,
    StageDefaults,
    TemplateArguments,
)
from medicalgpt.errors import run_main
from medicalgpt.parser import parse_args

from trl import SFTConfig


@dataclass
class FinetuningArguments(TemplateArguments, StageDefaults, SFTConfig):
    """What differs from TRL's `SFTConfig`."""

    HELP: ClassVar[dict[str, str]] = {
        "packing": "Pack several conversations into each sequence of --model_max_length; they do not attend to each "
        "other.",
        "num_train_epochs": "Epochs. Default: 3; more if the rows are so few that 3 are less than 200 steps "
        "(docs/few_rows.md).",
    }

    output_dir: str = field(default="outputs-sft", metadata={"help": "Where the result goes."})
    model_max_length: int = field(
        default=1024,
        metadata={
            "help": "Longest row in tokens. A longer one is refused, never cut. Unset: less if the model has fewer "
            "positions.",
            "aliases": ["--max_seq_length"],
        },
    )
    train_on_inputs: bool = field(
        default=False, metadata={"help": "Train on the user's text too, not on the answers alone."}
    )
    mask_history: bool = field(
        default=False, metadata={"help": "Train on the last answer of each conversation only, not on earlier ones."}
    )
    image_max_pixels: int | None = field(
        default=None,
        metadata={
            "help": "Images with more pixels are scaled down to so many; saved with the result. Unset: 589,824 (768 x "
            "768), or what the base has if that is less."
        },
    )
    image_min_pixels: int | None = field(
        default=None, metadata={"help": "Images with fewer pixels are scaled up. Unset: what the base has."}
    )
    # Rows of similar length share a batch; answers differ so much in length that this halves the time.
    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={"help": "group_by_length, or random.", "choices": ["group_by_length", "random"]},
    )
    # None: 2e-4 for adapters, 2e-5 for all weights, which would forget at the rate that suits an adapter.
    learning_rate: float | None = field(
        default=None,
        metadata={"help": "Default: 2e-4 for adapters, 2e-5 without; higher for tiny models with few rows."},
    )

    def __post_init__(self):
        if self.train_on_inputs and self.mask_history:
            raise ValueError("--mask_history trains on the last answer alone, --train_on_inputs on all; choose one.")
        super().__post_init__()


def main() -> None:
    # 1 arguments
    model_args, attention_args, data_args, lora_args, run_args, args = parse_args(
        ModelArguments,
        AttentionArguments,
        DataArguments,
        LoraArguments,
        RunArguments,
        FinetuningArguments,
        description=__doc__,
        program="supervised_finetuning.py",
    )
    from medicalgpt.data.encoding import encode_chat
    from medicalgpt.models import loading
    from medicalgpt.models.templating import stop_token_ids
    from medicalgpt.training.few_rows import follow_rows
    from medicalgpt.training.images import choose_rows, render_samples, use_vision
    from medicalgpt.training.runs import Run
    from medicalgpt.training.stream_trainer import check_flags, token_trainer
    from medicalgpt.training.trainers import training_defaults
    from template import apply_template

    from transformers import AutoModelForCausalLM

    training_defaults(args, adapter_rate=2e-4, full_rate=2e-5, use_peft=lora_args.use_peft)
    check_flags(data_args, args, rows_can_be_too_long=True)
    checkpoint = loading.stage_checkpoint(model_args, lora_args)
    loading.resolve_length(args, "model_max_length", checkpoint, attention_args)
    run = Run("supervised_finetuning", args, checkpoint, run_args, model_args, attention_args, data_args, lora_args)

    # 2 tokenizer and template
    tokenizer = loading.stage_tokenizer(checkpoint, model_args)
    stop = apply_template(tokenizer, args.template_name, args.system_prompt, args.tool_format)
    run.add_tokenizer(tokenizer)
    rows = choose_rows(checkpoint, tokenizer, args, data_args)

    # 3 data: each conversation is rendered by the template and masked; no answer is ever truncated
    encode = partial(
        *(encode_chat, tokenizer),
        max_length=args.model_max_length,
        train_on_inputs=args.train_on_inputs,
        mask_history=args.mask_history,
        shorten_rows=data_args.long_rows == "turns",
        **rows.options,
    )
    packed = args.model_max_length if args.packing else None
    data, train, validation = rows.load(
        data_args, encode, seed=args.order_seed, config=checkpoint.config, block_size=packed
    )
    run.add_data(data)
    vision, train, validation = use_vision(rows.vision, args, tokenizer, train, validation)
    run.preview(tokenizer, train)

    # 4 model
    model = loading.load_trainable(
        *(AutoModelForCausalLM, checkpoint, tokenizer, model_args, lora_args, attention_args),
        max_length=args.model_max_length,
        bf16=args.bf16,
        with_towers=vision is not None,
    )
    follow_rows(run, model, train, validation, use_peft=lora_args.use_peft)

    # 5 trainer
    trainer = token_trainer(
        *(model, args, tokenizer, data, encode, train, validation),
        block_size=args.model_max_length,
        streaming=data_args.streaming,
        loraplus_lr_ratio=lora_args.loraplus_lr_ratio,
        vision=vision,
    )

    # 6 train, save
    run.announce(model, trainer.train_dataset, validation)
    run.train_and_save(
        trainer,
        tokenizer,
        stop_ids=stop_token_ids(tokenizer, stop),
        **render_samples(tokenizer, data.validation or data.train, run_args.sample_prompts, vision),
        note="Supervised fine-tuning: the model has learned to answer as the conversations below do.",
    )


if __name__ == "__main__":
    run_main(main)
