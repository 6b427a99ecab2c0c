"""Check data before training, with the parser, the checks and the messages of the training stages.

    python validate_jsonl.py --file_path data/finetune/train.jsonl
    python validate_jsonl.py --file_path data/finetune --model_name_or_path outputs/tiny-base --model_max_length 512
    python validate_jsonl.py --file_path data/reward --format preference
    python validate_jsonl.py --file_path data/grpo --format task
    python validate_jsonl.py --file_path data/pretrain --format text

Without a model it checks files, fields, roles, the order of turns and the two answers of a preference pair; with one it
also renders each row, counts its tokens and says which length would take 95, 99 and 100% of the rows. Exit code 0:
every row can be used, or the flags allow to skip the others; 1: the problems are listed, with file and line.
"""

from collections import Counter
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from medicalgpt.args import DataArguments, same_field
from medicalgpt.errors import UserError, run_main
from medicalgpt.logs import setup_logging
from medicalgpt.parser import parse_args

if TYPE_CHECKING:
    from medicalgpt.data.loading import LoadedData

    import numpy as np
    from transformers import PreTrainedTokenizerBase


@dataclass
class ValidationArguments:
    """What to check."""

    file_path: str = field(metadata={"help": "File or folder.", "aliases": ["--train_file_dir"]})
    format: str = field(
        default="auto",
        metadata={
            "help": "chat (supervised fine-tuning), preference (reward model, DPO, ORPO), task (GRPO), text "
            "(pretraining), or auto: detected from the first row of each file; tasks must be named, since a question "
            "with its answer is also a conversation.",
            "choices": ["auto", "chat", "preference", "task", "text"],
        },
    )
    model_name_or_path: str | None = field(default=None, metadata={"help": "Count tokens with this model's tokenizer."})
    template_name: str | None = field(default=None, metadata={"help": "Chat template, as in training."})
    tool_format: str | None = field(default=None, metadata={"help": "Format of tools and tool calls, as in training."})
    system_prompt: str | None = field(
        default=None, metadata={"help": "System prompt, as in training. Of tasks, as in grpo_training.py."}
    )
    model_max_length: int = field(default=1024, metadata={"help": "Maximum length of a row in tokens, as in training."})
    max_completion_length: int | None = field(
        default=None,
        metadata={"help": "Of tasks: tokens kept for the answer, as in grpo_training.py. Default: half of the length."},
    )
    ignore_fields: str | None = same_field(DataArguments, "ignore_fields")
    skip_bad_rows: bool = same_field(DataArguments, "skip_bad_rows")
    skip_long_rows: bool = same_field(DataArguments, "skip_long_rows")


def main() -> None:
    (args,) = parse_args(ValidationArguments, description=__doc__)
    from medicalgpt.data.loading import load_data
    from medicalgpt.data.sources import find_files

    setup_logging()
    tokenizer = load_tokenizer(args) if args.model_name_or_path else None
    problems, usable = [], 0
    for path in find_files(args.file_path):
        name = format_of_first_row(path) if args.format == "auto" else args.format
        data = load_data(data_arguments(args, path), converters()[name])
        lengths = token_lengths(args, tokenizer, data, name) if tokenizer and data.train else []
        rows = data.account["train"][0].rows
        print(f"{path}: {rows} rows, {rows - len(data.problems)} usable, {name}")
        if name != "text":
            turns = Counter(len(row["messages"]) for row in data.train)
            counts = ", ".join(f"{count} rows of {turn}" for turn, count in sorted(turns.items()))
            print(f"  {'turns' if name == 'chat' else 'turns of the prompt'}: {counts}")
        if len(lengths):
            print_lengths(args, lengths, name)
        problems += data.problems
        usable += rows - len(data.problems)
    settle(args, problems, usable)


def converters() -> dict:
    from medicalgpt.data.formats import to_messages, to_preference, to_task, to_text

    return {"chat": to_messages, "preference": to_preference, "task": to_task, "text": to_text}


def data_arguments(args: ValidationArguments, path: Path) -> DataArguments:
    """The data flags of a stage that trains on this file."""
    shared = {entry.name for entry in fields(DataArguments)} & {entry.name for entry in fields(args)}
    return DataArguments(train_file_dir=str(path), **{name: getattr(args, name) for name in shared})


def settle(args: ValidationArguments, problems: list, usable: int) -> None:
    """Report whether a stage would train with these flags, as `LoadedData.settle` decides there."""
    from medicalgpt.data.sources import SHOWN_PROBLEMS, DataError

    from loguru import logger

    allowed = {"unusable": args.skip_bad_rows, "too long": args.skip_long_rows}
    if refused := [problem for problem in problems if not allowed.get(problem.kind)]:
        raise DataError(refused)
    if not problems:
        print("every row can be used")
        return
    for problem in problems[:SHOWN_PROBLEMS]:
        logger.warning(f"skipped: {problem}")
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(problem.kind for problem in problems).items())
    if not usable:
        raise UserError(f"every row would be skipped: {kinds}.")
    print(f"{usable} rows can be used; with these flags training skips {len(problems)}: {kinds}")


def format_of_first_row(path: Path) -> str:
    from medicalgpt.data.formats import PREFERENCE_FIELDS
    from medicalgpt.data.sources import SourceRow, read_rows

    value = next((row.value for row in read_rows(path) if isinstance(row, SourceRow)), None)
    if isinstance(value, str) or (isinstance(value, dict) and set(value) == {"text"}):
        return "text"
    if isinstance(value, dict) and any(column in value for pair in PREFERENCE_FIELDS for column in pair):
        return "preference"
    return "chat"


def load_tokenizer(args: ValidationArguments) -> "PreTrainedTokenizerBase":
    """The tokenizer with the chat template of the stage; `--model_max_length` is reduced as the stage would."""
    from medicalgpt.models import attention, hub, loading
    from medicalgpt.rewards.rewards import SYSTEM_PROMPT
    from template import apply_template

    checkpoint = hub.Checkpoint.resolve(args.model_name_or_path)
    tokenizer = loading.checkpoint_tokenizer(checkpoint)
    prompt = args.system_prompt
    if args.format == "task":
        prompt = {None: SYSTEM_PROMPT, "none": None}.get(prompt, prompt)
    if args.format != "text":
        apply_template(tokenizer, args.template_name, prompt, args.tool_format)
    args.positions = attention.context_length(checkpoint.config)
    if "model_max_length" not in args.given and args.positions:
        args.model_max_length = min(args.model_max_length, args.positions)
    return tokenizer


def token_lengths(
    args: ValidationArguments, tokenizer: "PreTrainedTokenizerBase", data: "LoadedData", name: str
) -> "np.ndarray":
    """Number of tokens of each row that can be encoded, however long; of a preference pair, with the longer answer.

    Rows that a stage would refuse, those that are too long included, are added to `data.problems`.
    """
    from medicalgpt.data import encoding
    from medicalgpt.data.encoding import Pair, Prompt, Sample
    from medicalgpt.data.sources import column_values
    from medicalgpt.data.tokenizing import encode_rows

    import numpy as np

    if name == "text":
        # A document of any length is trained on, in blocks.
        encoded = encode_rows(
            data, "train", partial(encoding.encode_document, tokenizer, block_size=2**31), sample=Sample
        )
        return np.array([len(ids) for ids in column_values(encoded, "input_ids")])
    encode, sample = {
        "chat": (encoding.encode_chat, Sample),
        "preference": (encoding.encode_preference, Pair),
        "task": (encoding.encode_prompt, Prompt),
    }[name]
    encoded = encode_rows(data, "train", partial(encode, tokenizer, max_length=None), sample=sample)
    columns = [field.name for field in fields(sample) if field.name != "labels"]
    lengths, owners, before = [], [], None
    for *parts, place in zip(*(column_values(encoded, each) for each in [*columns, "place"]), strict=True):
        counts = [len(ids) for ids in parts]
        length = counts[0] + max(counts[1:], default=0)
        if place == before:
            # The samples of one conversation.
            lengths[-1] = max(lengths[-1], length)
        else:
            lengths.append(length)
            owners.append(place)
        before = place
    limit = longest_allowed(args, name)
    long = {tuple(place.values()) for place, length in zip(owners, lengths, strict=True) if length > limit}
    if long:
        # Encoded once more with the limit, for what the stage says about them.
        mask = np.array([tuple(row["place"].values()) in long for row in data.train])
        rows = replace(data, train=data.train.select(mask), problems=[])
        encode_rows(rows, "train", partial(encode, tokenizer, max_length=limit), sample=sample)
        data.problems += rows.problems
    if not lengths and not data.problems:
        raise UserError("no row could be encoded.")
    return np.array(lengths)


def longest_allowed(args: ValidationArguments, name: str) -> int:
    """The maximum number of tokens of a row; of a task, of its prompt."""
    if name != "task":
        return args.model_max_length
    kept = args.max_completion_length if args.max_completion_length is not None else args.model_max_length // 2
    if not 0 < kept < args.model_max_length:
        raise UserError(
            f"--max_completion_length {kept} must be above 0 and below --model_max_length {args.model_max_length}."
        )
    return args.model_max_length - kept


def print_lengths(args: ValidationArguments, lengths: "np.ndarray", name: str) -> None:
    from medicalgpt.data.statistics import PROPOSED_PERCENTILES, percentile, percentiles

    what = {"chat": "tokens", "text": "tokens"}.get(name, "tokens of the prompt")
    if name == "preference":
        what = "tokens with the longer answer"
    shown = ", ".join(f"{share}%: {length:,}" for share, length in percentiles(lengths).items())
    print(f"  {what}, share of rows up to this length: {shown}")
    if name == "text":
        print(f"  {lengths.sum():,} tokens in total")
        return
    limit = longest_allowed(args, name)
    long = int((lengths > limit).sum())
    print(f"  longer than the limit of {limit:,}: {long:,} of {len(lengths):,} rows ({long / len(lengths):.1%})")
    needed = {share: percentile(lengths, share) for share in PROPOSED_PERCENTILES}
    if name == "task":
        # What the prompt leaves must be at least what is kept for the answer.
        kept = args.max_completion_length
        needed = {share: length + (max(1, length - 1) if kept is None else kept) for share, length in needed.items()}
    lines = ", ".join(f"{share}% of the rows: --model_max_length {length}" for share, length in needed.items())
    beyond = args.positions and max(needed.values()) > args.positions
    note = f" (above the model's {args.positions} positions: add --rope_scaling yarn)" if beyond else ""
    print(f"  enough for {lines}{note}")


if __name__ == "__main__":
    run_main(main)
