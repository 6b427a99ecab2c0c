"""Check training data before training: the same parser, the same checks and the same messages as the stages.

    python validate_jsonl.py --file_path data/finetune/train.jsonl
    python validate_jsonl.py --file_path data/finetune --model_name_or_path outputs/tiny-base --model_max_length 512
    python validate_jsonl.py --file_path data/pretrain --format text

Without a model it checks files, fields, roles and the order of turns; with one it also renders each row and counts its
tokens. Exit code 0: every row can be used. 1: the problems are listed, with file and line.
"""

from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from statistics import median

from medicalgpt.args import DataArguments, parse_args
from medicalgpt.errors import UserError, run_main
from medicalgpt.logs import setup_logging


@dataclass
class ValidationArguments:
    """What to check."""

    file_path: str = field(metadata={"help": "File or folder.", "aliases": ["--train_file_dir"]})
    format: str = field(
        default="auto",
        metadata={
            "help": "chat (supervised fine-tuning), text (pretraining), or auto: by the first row of each file.",
            "choices": ["auto", "chat", "text"],
        },
    )
    model_name_or_path: str | None = field(default=None, metadata={"help": "Count tokens with this model's tokenizer."})
    template_name: str | None = field(default=None, metadata={"help": "Chat template, as in training."})
    tool_format: str | None = field(default=None, metadata={"help": "As in supervised_finetuning.py."})
    system_prompt: str | None = field(default=None, metadata={"help": "System prompt, as in training."})
    model_max_length: int = field(default=1024, metadata={"help": "Longest row in tokens, as in training."})
    ignore_fields: str | None = field(default=None, metadata={"help": "Fields that may be there, with commas."})


def main() -> None:
    (args,) = parse_args(ValidationArguments, description=__doc__)
    from medicalgpt.data import DataError, Row, find_files, load_data, read_rows, to_messages, to_text

    setup_logging()
    problems = []
    for path in find_files(args.file_path):
        value = next((row.value for row in read_rows(path) if isinstance(row, Row)), None)
        is_text = args.format == "text" or (
            args.format == "auto" and (isinstance(value, str) or (isinstance(value, dict) and set(value) == {"text"}))
        )
        arguments = DataArguments(train_file_dir=str(path), ignore_fields=args.ignore_fields)
        data = load_data(arguments, to_text if is_text else to_messages)
        lengths = encoded_lengths(args, data) if args.model_name_or_path and not is_text and data.train else []
        rows = data.account["train"][0].rows
        print(f"{path}: {rows} rows, {rows - len(data.problems)} usable, {'text' if is_text else 'chat'}")
        if not is_text:
            turns = Counter(len(row["messages"]) for row in data.train)
            print(f"  turns: {', '.join(f'{count} rows of {turn}' for turn, count in sorted(turns.items()))}")
        if lengths:
            print(f"  tokens: median {median(lengths):.0f}, longest {max(lengths)}, limit {args.model_max_length}")
        problems += data.problems
    if problems:
        raise DataError(problems)
    print("every row can be used")


def encoded_lengths(args: ValidationArguments, data) -> list[int]:
    """Tokens of each row that can be encoded; the others join `data.problems`."""
    from medicalgpt import attention, models
    from medicalgpt.encoding import encode_chat, encode_rows
    from template import apply_template

    tokenizer = models.load_tokenizer(args.model_name_or_path)
    apply_template(tokenizer, args.template_name, args.system_prompt, args.tool_format)
    known = attention.context_length(models.config_of(args.model_name_or_path))
    if "model_max_length" not in args.given and known:
        # As training does.
        args.model_max_length = min(args.model_max_length, known)
    encoded = encode_rows(data, "train", partial(encode_chat, tokenizer, max_length=args.model_max_length))
    if not len(encoded) and not data.problems:
        raise UserError("no row could be encoded.")
    return [len(ids) for ids in encoded["input_ids"]]


if __name__ == "__main__":
    run_main(main)
