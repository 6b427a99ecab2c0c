"""Check data before training, with the parser, the checks and the messages of the training stages.

    python validate_jsonl.py --file_path data/finetune/train.jsonl
    python validate_jsonl.py --file_path data/finetune --model_name_or_path outputs/tiny-base --model_max_length 512
    python validate_jsonl.py --file_path data/reward --format preference
    python validate_jsonl.py --file_path data/pretrain --format text

Without a model it checks files, fields, roles, the order of turns and the two answers of a preference pair; with one it
also renders each row and counts its tokens. Exit code 0: every row can be used; 1: the problems are listed, with file
and line.
"""

from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from medicalgpt.args import DataArguments
from medicalgpt.errors import UserError, run_main
from medicalgpt.logs import setup_logging
from medicalgpt.parser import parse_args

if TYPE_CHECKING:
    from medicalgpt.data.loading import LoadedData


@dataclass
class ValidationArguments:
    """What to check."""

    file_path: str = field(metadata={"help": "File or folder.", "aliases": ["--train_file_dir"]})
    format: str = field(
        default="auto",
        metadata={
            "help": "chat (supervised fine-tuning), preference (reward model, DPO, ORPO), text (pretraining), or auto: "
            "detected from the first row of each file.",
            "choices": ["auto", "chat", "preference", "text"],
        },
    )
    model_name_or_path: str | None = field(default=None, metadata={"help": "Count tokens with this model's tokenizer."})
    template_name: str | None = field(default=None, metadata={"help": "Chat template, as in training."})
    tool_format: str | None = field(default=None, metadata={"help": "Format of tools and tool calls, as in training."})
    system_prompt: str | None = field(default=None, metadata={"help": "System prompt, as in training."})
    model_max_length: int = field(default=1024, metadata={"help": "Maximum length of a row in tokens, as in training."})
    ignore_fields: str | None = field(
        default=None, metadata={"help": "Fields of a row to ignore, separated by commas."}
    )


def main() -> None:
    (args,) = parse_args(ValidationArguments, description=__doc__)
    from medicalgpt.data.formats import to_messages, to_preference, to_text
    from medicalgpt.data.loading import load_data
    from medicalgpt.data.sources import DataError, find_files

    setup_logging()
    converters = {"chat": to_messages, "preference": to_preference, "text": to_text}
    problems = []
    for path in find_files(args.file_path):
        name = format_of_first_row(path) if args.format == "auto" else args.format
        arguments = DataArguments(train_file_dir=str(path), ignore_fields=args.ignore_fields)
        data = load_data(arguments, converters[name])
        lengths = encoded_lengths(args, data, name) if args.model_name_or_path and name != "text" and data.train else []
        rows = data.account["train"][0].rows
        print(f"{path}: {rows} rows, {rows - len(data.problems)} usable, {name}")
        if name != "text":
            turns = Counter(len(row["messages"]) for row in data.train)
            counts = ", ".join(f"{count} rows of {turn}" for turn, count in sorted(turns.items()))
            print(f"  {'turns of the prompt' if name == 'preference' else 'turns'}: {counts}")
        if lengths:
            print(f"  tokens: median {median(lengths):.0f}, longest {max(lengths)}, limit {args.model_max_length}")
        problems += data.problems
    if problems:
        raise DataError(problems)
    print("every row can be used")


def format_of_first_row(path: Path) -> str:
    from medicalgpt.data.formats import PREFERENCE_FIELDS
    from medicalgpt.data.sources import SourceRow, read_rows

    value = next((row.value for row in read_rows(path) if isinstance(row, SourceRow)), None)
    if isinstance(value, str) or (isinstance(value, dict) and set(value) == {"text"}):
        return "text"
    if isinstance(value, dict) and any(column in value for pair in PREFERENCE_FIELDS for column in pair):
        return "preference"
    return "chat"


def encoded_lengths(args: ValidationArguments, data: "LoadedData", name: str) -> list[int]:
    """Number of tokens of each sample that can be encoded; of a preference pair, with the longer answer.

    Rows that cannot be encoded are added to `data.problems`.
    """
    from medicalgpt.data.encoding import Pair, Sample, encode_chat, encode_preference
    from medicalgpt.data.tokenizing import encode_rows
    from medicalgpt.models import attention, hub, loading
    from template import apply_template

    checkpoint = hub.Checkpoint.resolve(args.model_name_or_path)
    tokenizer = loading.checkpoint_tokenizer(checkpoint)
    apply_template(tokenizer, args.template_name, args.system_prompt, args.tool_format)
    known = attention.context_length(checkpoint.config)
    if "model_max_length" not in args.given and known:
        # As in training.
        args.model_max_length = min(args.model_max_length, known)
    encode, sample = (encode_preference, Pair) if name == "preference" else (encode_chat, Sample)
    encoded = encode_rows(data, "train", partial(encode, tokenizer, max_length=args.model_max_length), sample=sample)
    if not len(encoded) and not data.problems:
        raise UserError("no row could be encoded.")
    if name == "preference":
        return [len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in encoded]
    return [len(ids) for ids in encoded["input_ids"]]


if __name__ == "__main__":
    run_main(main)
