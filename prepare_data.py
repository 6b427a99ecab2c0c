"""Tokenize rows before training, in parts: each process or host one, read afterwards by any number of processes.

    python prepare_data.py --format text --model_name_or_path outputs/tiny-base --train_file_dir data/pretrain \\
        --prepared_dir outputs/prepared --shard 1/2
    python prepare_data.py --format text --model_name_or_path outputs/tiny-base --train_file_dir data/pretrain \\
        --prepared_dir outputs/prepared --shard 2/2
    python pretraining.py --model_name_or_path outputs/tiny-base --prepared_dir outputs/prepared \\
        --output_dir outputs/pt-prepared

In --prepared_dir: a folder for each shard, with tokens (Arrow), counts and hashes. The shard that is complete last
checks all of them against each other and writes index.json, without which no stage reads them. Where the parts were
written on several disks, bring the folders together and write it with --check True. Guide: docs/data.md
"""

from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from medicalgpt.args import (
    AttentionArguments,
    DataArguments,
    LoraArguments,
    ModelArguments,
    TemplateArguments,
    same_field,
)
from medicalgpt.errors import UserError, run_main
from medicalgpt.logs import setup_logging
from medicalgpt.parser import parse_args

FORMATS = ("text", "chat", "preference")
# Flags that only some formats have; the values are those of the stages.
ONLY_FOR = {
    "block_size": ("text",),
    "document_unit": ("text",),
    "model_max_length": ("chat", "preference"),
    "template_name": ("chat", "preference"),
    "tool_format": ("chat", "preference"),
    "system_prompt": ("chat", "preference"),
    "train_on_inputs": ("chat",),
    "mask_history": ("chat",),
    "packing": ("text", "chat"),
    "max_source_length": ("preference",),
    "max_target_length": ("preference",),
}


@dataclass
class PreparationArguments(TemplateArguments):
    """What is prepared, and where it goes."""

    prepared_dir: str = field(default="outputs/prepared", metadata={"help": "Folder of all shards."})
    shard: str = field(default="1/1", metadata={"help": "Which part to tokenize, and how many there are: 3/16."})
    check: bool = field(
        default=False, metadata={"help": "Tokenize nothing: check the shards in --prepared_dir and write the index."}
    )
    format: str | None = field(
        default=None,
        metadata={
            "help": "text: documents for pretraining.py. chat: conversations for supervised_finetuning.py. preference: "
            "pairs for reward_modeling.py, dpo_training.py and orpo_training.py.",
            "choices": list(FORMATS),
        },
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "The model that will be trained, for its tokenizer and chat template."}
    )
    tokenizer_name_or_path: str | None = same_field(ModelArguments, "tokenizer_name_or_path")
    model_revision: str | None = same_field(ModelArguments, "model_revision")
    cache_dir: str | None = same_field(ModelArguments, "cache_dir")
    hub: str = same_field(ModelArguments, "hub")
    train_file_dir: str | None = same_field(DataArguments, "train_file_dir")
    validation_file_dir: str | None = same_field(DataArguments, "validation_file_dir")
    max_eval_samples: int | None = same_field(DataArguments, "max_eval_samples")
    preprocessing_num_workers: int | None = same_field(DataArguments, "preprocessing_num_workers")
    columns: str | None = same_field(DataArguments, "columns")
    preset: str | None = same_field(DataArguments, "preset")
    encoding: str | None = same_field(DataArguments, "encoding")
    ignore_fields: str | None = same_field(DataArguments, "ignore_fields")
    skip_bad_rows: bool = same_field(DataArguments, "skip_bad_rows")
    long_rows: str | None = same_field(DataArguments, "long_rows")
    max_long_rows: float = same_field(DataArguments, "max_long_rows")
    allow_overlap: bool = same_field(DataArguments, "allow_overlap")
    block_size: int = field(default=1024, metadata={"help": "text: as in pretraining.py."})
    document_unit: str = field(
        default="auto",
        metadata={"help": "text: as in pretraining.py.", "choices": ["auto", "line", "paragraph", "file"]},
    )
    model_max_length: int = field(
        default=1024, metadata={"help": "chat, preference: as in the stages.", "aliases": ["--max_seq_length"]}
    )
    train_on_inputs: bool = field(default=False, metadata={"help": "chat: as in supervised_finetuning.py."})
    mask_history: bool = field(default=False, metadata={"help": "chat: as in supervised_finetuning.py."})
    packing: bool | None = field(
        default=None, metadata={"help": "Write packed blocks. Default: as in the stages, True for text only."}
    )
    max_source_length: int | None = field(default=None, metadata={"help": "preference: as in the stages."})
    max_target_length: int | None = field(default=None, metadata={"help": "preference: as in the stages."})


def main() -> None:
    (args,) = parse_args(PreparationArguments, description=__doc__, program="prepare_data.py")
    from medicalgpt.data.shards import Shard, describe_missing, find_shards, missing_shards, write_index

    setup_logging()
    place = Path(args.prepared_dir)
    if args.check:
        if idle := sorted(args.given - {"check", "prepared_dir", "max_long_rows"}):
            raise UserError(f"--{idle[0]} has no effect with --check True, which tokenizes nothing. Omit it.")
    else:
        manifest = prepare(args, place, Shard.parse(args.shard))
        print(
            f"{place}, shard {args.shard}: {manifest['rows']:,} rows, {manifest['used']:,} used, "
            f"{manifest['sequences']:,} sequences, {manifest['tokens']:,} tokens"
        )
        shards = find_shards(place)
        if missing := missing_shards(shards):
            print(describe_missing(shards, missing))
            return
    index = write_index(place, args.max_long_rows)
    print(
        f"{place}: all {len(index['shards'])} shard(s) are complete and belong together, {index['used']:,} of "
        f"{index['rows']:,} rows, {index['sequences']:,} sequences, {index['tokens']:,} tokens"
    )


def prepare(args: PreparationArguments, place: Path, shard: Any) -> dict[str, Any]:
    """Tokenize one shard as the stage that reads it would; returns its manifest.

    Raises:
        UserError: a flag is missing or has no effect, or rows cannot be used.
    """
    for name in ("format", "model_name_or_path", "train_file_dir"):
        if not getattr(args, name):
            raise UserError(f"--{name} is missing. See python prepare_data.py --help.")
    for name, formats in ONLY_FOR.items():
        if name in args.given and args.format not in formats:
            raise UserError(f"--{name} has no effect with --format {args.format}. Omit it.")
    from medicalgpt.data import encoding
    from medicalgpt.data.shards import prepare_shard
    from medicalgpt.formats.conversion import to_messages, to_preference, to_text
    from medicalgpt.models import loading
    from template import apply_template

    data_args = DataArguments(**{entry.name: getattr(args, entry.name) for entry in shared_fields(DataArguments)})
    model_args = ModelArguments(**{entry.name: getattr(args, entry.name) for entry in shared_fields(ModelArguments)})
    if args.max_source_length and args.max_target_length and "model_max_length" not in args.given:
        args.model_max_length = args.max_source_length + args.max_target_length
    checkpoint = loading.stage_checkpoint(model_args, LoraArguments())
    length = "block_size" if args.format == "text" else "model_max_length"
    loading.resolve_length(args, length, checkpoint, AttentionArguments())
    tokenizer = loading.stage_tokenizer(checkpoint, model_args)
    if args.format != "text":
        apply_template(tokenizer, args.template_name, args.system_prompt, args.tool_format)
    convert, function, sample, options = {
        "text": (to_text, encoding.encode_document, encoding.Sample, {"block_size": args.block_size}),
        "chat": (
            to_messages,
            encoding.encode_chat,
            encoding.Sample,
            {
                "max_length": args.model_max_length,
                "train_on_inputs": args.train_on_inputs,
                "mask_history": args.mask_history,
                "shorten_rows": data_args.long_rows == "turns",
            },
        ),
        "preference": (
            to_preference,
            encoding.encode_preference,
            encoding.Pair,
            {
                "max_length": args.model_max_length,
                "max_source_length": args.max_source_length,
                "max_target_length": args.max_target_length,
            },
        ),
    }[args.format]
    packing = args.format == "text" if args.packing is None else args.packing
    return prepare_shard(
        place,
        shard,
        data_args,
        convert,
        partial(function, tokenizer, **options),
        sample,
        document_unit=args.document_unit,
        block_size=getattr(args, length) if packing else None,
    )


def shared_fields(cls: type) -> list[Any]:
    """The fields of an argument class that this program has too."""
    own = {entry.name for entry in fields(PreparationArguments)}
    return [entry for entry in fields(cls) if entry.name in own]


if __name__ == "__main__":
    run_main(main)
