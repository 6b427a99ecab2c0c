"""Check data before training, with the parser, the checks and the messages of the training stages.

    python validate_jsonl.py --file_path data/finetune/train.jsonl
    python validate_jsonl.py --file_path data/finetune --model_name_or_path outputs/tiny-base --model_max_length 512
    python validate_jsonl.py --file_path data/reward --format preference
    python validate_jsonl.py --file_path data/grpo --format task
    python validate_jsonl.py --file_path data/pretrain --format text
    python validate_jsonl.py --file_path my_data --fix
    python validate_jsonl.py --file_path data/finetune --report outputs/data.html --stats_file outputs/data.json

Without a model it checks files, fields, roles, the order of turns, images and the two answers of a preference pair;
with one it also renders each row, counts its tokens and says which length would take 95, 99 and 100% of the rows. Rows
that occur more than once, exactly or nearly, and held-out rows that are also trained on are counted. Exit code 0: every
row can be used, or the flags allow to skip the others; 1: the problems are listed, with file and line.
"""

import json
import shlex
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
    from medicalgpt.data.duplicates import NearDuplicates, NearPair
    from medicalgpt.data.lengths import LengthLimit
    from medicalgpt.data.loading import LoadedData
    from medicalgpt.data.rows import Rows
    from medicalgpt.data.statistics import RowStatistics
    from medicalgpt.training.images import ChatRows

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
    image_max_pixels: int | None = field(
        default=None, metadata={"help": "Images with more pixels are scaled down, as in supervised_finetuning.py."}
    )
    image_min_pixels: int | None = field(
        default=None, metadata={"help": "Images with fewer pixels are scaled up, as in supervised_finetuning.py."}
    )
    validation_file_dir: str | None = field(
        default=None,
        metadata={
            "help": "File or folder of held-out data, checked too, and compared with the other rows. Unset: the files "
            "with the names of held-out data in --file_path."
        },
    )
    near_duplicates: float = field(
        default=0.8,
        metadata={
            "help": "Rows are near-duplicates if they share at least this part of their runs of five characters "
            "(Jaccard similarity), above 0.5; 0: do not look for them."
        },
    )
    fix: bool = field(
        default=False,
        metadata={
            "help": "Write a cleaned copy of the files (white space, null fields, empty turns, duplicates, encoding), "
            "without the rows that cannot be used, and a list of all changes. The files stay as they are."
        },
    )
    fixed_dir: str | None = field(
        default=None,
        metadata={
            "help": "New folder for the copy; the list is next to it, as NAME.changes.jsonl. Default: the folder of "
            "the data with `_fixed` appended."
        },
    )
    report: str | None = field(
        default=None,
        metadata={"help": "Write the statistics with pictures to this .html file, which needs no network."},
    )
    stats_file: str | None = field(default=None, metadata={"help": "Write the statistics to this .json file."})
    overwrite: bool = field(default=False, metadata={"help": "Replace --report and --stats_file if they exist."})
    allow_overlap: bool = same_field(DataArguments, "allow_overlap")
    columns: str | None = same_field(DataArguments, "columns")
    preset: str | None = same_field(DataArguments, "preset")
    ignore_fields: str | None = same_field(DataArguments, "ignore_fields")
    encoding: str | None = same_field(DataArguments, "encoding")
    skip_bad_rows: bool = same_field(DataArguments, "skip_bad_rows")
    long_rows: str | None = same_field(DataArguments, "long_rows")
    skip_long_rows: bool | None = same_field(DataArguments, "skip_long_rows")
    max_long_rows: float = same_field(DataArguments, "max_long_rows")

    def __post_init__(self):
        if not (self.near_duplicates == 0 or 0.5 < self.near_duplicates <= 1):
            raise ValueError(f"--near_duplicates {self.near_duplicates} must be above 0.5 and at most 1, or 0.")
        if self.fixed_dir and not self.fix:
            raise ValueError("--fixed_dir has no effect without --fix True.")
        for name in ("image_max_pixels", "image_min_pixels"):
            if getattr(self, name) is not None and not self.model_name_or_path:
                raise ValueError(f"--{name} has no effect without --model_name_or_path, whose tokens are counted.")


@dataclass
class CheckedFile:
    """A file, what its rows are, and on which side of training they are."""

    path: Path
    kind: str
    side: str
    data: "LoadedData"
    statistics: "RowStatistics"


def main() -> None:
    (args,) = parse_args(ValidationArguments, description=__doc__, program="validate_jsonl.py")

    setup_logging()
    check_outputs(args)
    tokenizer, chat = load_tokenizer(args) if args.model_name_or_path else (None, None)
    files = [check_file(args, tokenizer, chat, path, side) for path, side in files_to_check(args)]
    notes = [note for kind in sorted({file.kind for file in files}) for note in compare_rows(args, files, kind)]
    for note in notes:
        print(note)
    write_statistics(args, files, notes)
    if args.fix:
        write_fixed(args, chat, files)
        return
    problems = [problem for file in files for problem in file.data.problems]
    refuse_shared_rows(args, files)
    if not problems:
        refuse_idle_flags(args, files)
    settle(args, problems, sum(file.statistics.usable for file in files))


def check_outputs(args: ValidationArguments) -> None:
    """Before anything is read: whether the statistics may be written."""
    for flag, suffix in (("report", ".html"), ("stats_file", ".json")):
        path = Path(getattr(args, flag) or "")
        if not getattr(args, flag):
            continue
        if path.suffix.lower() != suffix:
            raise UserError(f"--{flag} {path} must end with {suffix}.")
        if path.is_dir() or (path.exists() and not args.overwrite):
            raise UserError(f"--{flag} {path} exists. Choose another path, or replace it with --overwrite True.")
        if path.exists() and any(path.samefile(file) for file, _ in files_to_check(args)):
            raise UserError(f"--{flag} {path} is one of the files to check. Choose another path.")

    if args.fix:
        folder = fixed_folder(args)
        for path in (folder, changes_file(folder)):
            if path.exists():
                raise UserError(f"{path} exists. Choose another folder for the copy: --fixed_dir.")
        source = Path(args.file_path).resolve()
        if source.is_dir() and (folder.resolve().is_relative_to(source) or source.is_relative_to(folder.resolve())):
            raise UserError(
                f"--fixed_dir {folder} and --file_path {args.file_path} contain each other: the copy would be read as "
                "data too. Choose a folder outside of it."
            )


def fixed_folder(args: ValidationArguments) -> Path:
    """Where the cleaned copy goes: by default not into the folder of the data, which would be trained on twice."""
    if args.fixed_dir:
        return Path(args.fixed_dir)
    path = Path(args.file_path)
    if path.is_file():
        path = path.parent if path.parent.name else path.with_suffix("")
    path = path if path.name else path.resolve()
    return path.with_name(f"{path.name}_fixed")


def changes_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.changes.jsonl")


def write_fixed(args: ValidationArguments, chat: "ChatRows | None", files: list[CheckedFile]) -> None:
    """Write the cleaned copy and print what was changed."""
    from medicalgpt.data.cleaning import FileToClean, clean_files, copy_name
    from medicalgpt.data.loading import row_converter

    folder = fixed_folder(args)
    root = Path(args.file_path) if Path(args.file_path).is_dir() else Path(args.file_path).parent
    convert = {file.path: row_converter(data_arguments(args, file.path), converters(chat)[file.kind]) for file in files}
    to_clean = [
        FileToClean(
            path=file.path,
            copy=folder / file.path.parent.relative_to(root) / copy_name(file.path),
            convert=convert[file.path],
            answered=file.kind == "chat",
            encoding=args.encoding,
            images=convert[file.path].columns.get("images", ""),
        )
        # A row on both sides stays held out, so that results on the same held-out rows can be compared.
        for file in sorted(files, key=lambda file: file.side != "validation")
        # Files of --validation_file_dir are only compared with.
        if (file.path.is_relative_to(root) if root == Path(args.file_path) else file.path == Path(args.file_path))
    ]
    copied = clean_files(to_clean, folder, changes_file(folder))
    changes = ", ".join(f"{count} {kind}" for kind, count in copied.changes.most_common()) or "none"
    left_out = ", ".join(f"{count} {kind}" for kind, count in copied.left_out.most_common()) or "none"
    print(f"cleaned copy: {folder}, {copied.kept} of {copied.rows} rows; left out: {left_out}")
    print(f"  changes: {changes}; all are listed in {changes_file(folder)}")
    print(f"check it: python validate_jsonl.py --file_path {shlex.quote(str(folder))}")


def files_to_check(args: ValidationArguments) -> list[tuple[Path, str]]:
    """Each file once, with its side: `train` or `validation`."""
    from medicalgpt.readers.folders import find_files, split_of

    found = {}
    for path in find_files(args.file_path):
        found[path.resolve()] = (path, "train" if split_of(path, args.file_path) == "train" else "validation")
    if not any(side == "train" for _, side in found.values()):
        found = {key: (path, "train") for key, (path, _) in found.items()}
    for path in find_files(args.validation_file_dir) if args.validation_file_dir else ():
        found[path.resolve()] = (path, "validation")
    return list(found.values())


def check_file(
    args: ValidationArguments,
    tokenizer: "PreTrainedTokenizerBase | None",
    chat: "ChatRows | None",
    path: Path,
    side: str,
) -> CheckedFile:
    """Read, convert and count the rows of a file, and print the summary."""
    from medicalgpt.data.loading import load_data
    from medicalgpt.data.statistics import RowStatistics

    name = format_of_first_row(path, args.preset, args.encoding) if args.format == "auto" else args.format
    data = load_data(data_arguments(args, path), converters(chat)[name])
    lengths = token_lengths(args, tokenizer, chat, data, name) if tokenizer and data.train else []
    (account,) = data.account["train"]
    rows = account.rows
    usable = rows - len(data.problems)
    statistics = RowStatistics(str(path), name, rows, usable, tokens=lengths)
    print(f"{path}: {rows} rows, {usable} usable, {name}")
    if name != "text":
        turns = Counter(len(row["messages"]) for row in data.train)
        counts = ", ".join(f"{count} rows of {turn}" for turn, count in sorted(turns.items()))
        print(f"  {'turns' if name == 'chat' else 'turns of the prompt'}: {counts}")
    if account.images:
        print(f"  images: {account.images}")
    if len(lengths):
        statistics.limit = longest_allowed(args, name) if name != "text" else None
        print_lengths(args, lengths, name)
    return CheckedFile(path, name, side, data, statistics)


def rows_of(files: list[CheckedFile], kind: str, side: str) -> "Rows":
    from medicalgpt.data.rows import Rows

    return Rows(row for file in files if (file.kind, file.side) == (kind, side) for row in file.data.train)


def compare_rows(args: ValidationArguments, files: list[CheckedFile], kind: str) -> list[str]:
    """Count the duplicates among the rows of a kind, and what both sides share; returns a line for each finding."""
    from medicalgpt.data.duplicates import NearDuplicates, exact_duplicates
    from medicalgpt.logs import heartbeat
    from medicalgpt.readers.problems import place_of

    notes, searched = [], {}
    by_file = {file.statistics.file: file.statistics for file in files}
    for side in ("train", "validation"):
        rows = rows_of(files, kind, side)
        exact = exact_duplicates(rows)
        for position in exact:
            by_file[place_of(rows[position]).file].exact_duplicates += 1
        if exact:
            position, first = next(iter(exact.items()))
            notes.append(
                f"exact duplicates: {len(exact)} of {len(rows)} rows, such as {place_of(rows[position])}, which is "
                f"also {place_of(rows[first])}"
            )
        if not args.near_duplicates:
            continue
        with heartbeat(lambda: "looking for near-duplicates (--near_duplicates 0 skips this)"):
            near = searched[side] = NearDuplicates(rows, args.near_duplicates)
            groups = near.groups(exact)
        pairs = [pair for group in groups for pair in group]
        for pair in pairs:
            by_file[place_of(rows[pair.other]).file].near_duplicates += 1
        if pairs:
            notes.append(
                f"near-duplicates (--near_duplicates {args.near_duplicates}): {len(pairs)} of {len(rows)} rows, in "
                f"{len(groups)} group(s), such as {shown_pair(near, near, pairs[0])}"
            )
    if "validation" in searched:
        train, held_out = searched["train"], searched["validation"]
        shared = train.shared_with(held_out)
        if shared:
            closest = max(shared, key=lambda pair: pair.similarity)
            notes.append(
                f"held-out rows that resemble training rows (--near_duplicates {args.near_duplicates}): {len(shared)} "
                f"of {len(held_out.rows)}, such as {shown_pair(train, held_out, closest)}"
            )
    return notes


def shown_pair(one: "NearDuplicates", other: "NearDuplicates", pair: "NearPair") -> str:
    from medicalgpt.readers.problems import place_of

    return f"{place_of(other.rows[pair.other])} and {place_of(one.rows[pair.one])} ({pair.similarity:.2f})"


def write_statistics(args: ValidationArguments, files: list[CheckedFile], notes: list[str]) -> None:
    from medicalgpt.data.statistics import report_page
    from medicalgpt.files import write_atomically

    if not args.report and not args.stats_file:
        return
    statistics = [file.statistics for file in files]
    for file in files:
        file.statistics.add(file.data.train)
    problems = Counter(problem.reason for file in files for problem in file.data.problems)
    found = {"files": [each.as_dict() for each in statistics], "notes": notes, "problems": dict(problems.most_common())}
    texts = {
        args.stats_file: json.dumps(found, ensure_ascii=False, indent=1) + "\n",
        args.report: report_page(statistics, [*notes, *(f"{count} × {reason}" for reason, count in problems.items())]),
    }
    for path, text in texts.items():
        if path:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, text)
            print(f"statistics: {path}")


def refuse_shared_rows(args: ValidationArguments, files: list[CheckedFile]) -> None:
    """As training does: held-out rows may not be among the training rows."""
    from medicalgpt.data.loading import LoadedData, refuse_overlap

    for kind in sorted({file.kind for file in files}):
        data = LoadedData(rows_of(files, kind, "train"), rows_of(files, kind, "validation"), {})
        refuse_overlap(data, DataArguments(allow_overlap=args.allow_overlap))


def refuse_idle_flags(args: ValidationArguments, files: list[CheckedFile]) -> None:
    """As training does: bounds of images need some."""
    given = [name for name in ("image_min_pixels", "image_max_pixels") if getattr(args, name) is not None]
    if given and not any(file.data.account["train"][0].images for file in files):
        raise UserError(f"--{given[0]} would have no effect: no row has an image. Omit it.")


def converters(chat: "ChatRows | None") -> dict:
    """By the name of a format. Without a model, rows of a chat are those of one that takes images."""
    from medicalgpt.formats.conversion import to_messages_with_images, to_preference, to_text
    from medicalgpt.formats.tasks import to_task

    to_chat = chat.convert if chat else to_messages_with_images
    return {"chat": to_chat, "preference": to_preference, "task": to_task, "text": to_text}


def data_arguments(args: ValidationArguments, path: Path) -> DataArguments:
    """The data flags of a stage that trains on this file."""
    shared = {entry.name for entry in fields(DataArguments)} & {entry.name for entry in fields(args)}
    # Held-out files are read as any other; what both sides share is looked for at the end.
    shared.remove("validation_file_dir")
    return DataArguments(train_file_dir=str(path), **{name: getattr(args, name) for name in shared})


def settle(args: ValidationArguments, problems: list, usable: int) -> None:
    """Report whether a stage would train with these flags, as `LoadedData.settle` decides there."""
    from medicalgpt.data.lengths import describe_lost_rows
    from medicalgpt.readers.problems import SHOWN_PROBLEMS, DataError

    from loguru import logger

    flags = DataArguments(
        long_rows=args.long_rows, skip_long_rows=args.skip_long_rows, max_long_rows=args.max_long_rows
    )
    allowed = {"unusable": args.skip_bad_rows, "too long": flags.long_rows != "refuse"}
    if refused := [problem for problem in problems if not allowed.get(problem.kind)]:
        raise DataError(refused)
    lost = sum(problem.kind == "too long" for problem in problems)
    encoded = usable + sum(not problem.side for problem in problems)
    if found := describe_lost_rows(lost, encoded, flags.max_long_rows):
        reason, way_out = found
        raise UserError(f"{reason}: training would stop. What makes room for them is shown above. {way_out}".rstrip())
    if not problems:
        print("every row can be used")
        return
    for problem in problems[:SHOWN_PROBLEMS]:
        logger.warning(f"skipped: {problem}")
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(problem.kind for problem in problems).items())
    if not usable:
        raise UserError(f"every row would be skipped: {kinds}.")
    print(f"{usable} rows can be used; with these flags training skips {len(problems)}: {kinds}")


def format_of_first_row(path: Path, preset: str | None = None, encoding: str | None = None) -> str:
    from medicalgpt.formats.fields import CONVERSATION_FIELDS, PREFERENCE_FIELDS
    from medicalgpt.formats.presets import PRESETS, recognise
    from medicalgpt.readers.problems import SourceRow
    from medicalgpt.readers.sources import read_rows

    value = next((row.value for row in read_rows(path, encoding=encoding) if isinstance(row, SourceRow)), None)
    if isinstance(value, str):
        return "text"
    if shape := PRESETS.get(preset) or (recognise(value) if isinstance(value, dict) else None):
        return shape.kinds[0]
    if isinstance(value, dict) and "text" in value and not set(value) & {*CONVERSATION_FIELDS}:
        return "text"
    if isinstance(value, dict) and any(column in value for pair in PREFERENCE_FIELDS for column in pair):
        return "preference"
    return "chat"


def load_tokenizer(args: ValidationArguments) -> "tuple[PreTrainedTokenizerBase, ChatRows]":
    """The tokenizer with the chat template of the stage, and whether the model takes images.

    `--model_max_length` is reduced as the stage would.
    """
    from medicalgpt.models import attention, hub, loading
    from medicalgpt.rewards.rewards import SYSTEM_PROMPT
    from medicalgpt.training.images import choose_rows
    from template import apply_template

    checkpoint = hub.Checkpoint.resolve(args.model_name_or_path)
    tokenizer = loading.checkpoint_tokenizer(checkpoint)
    prompt = args.system_prompt
    if args.format == "task":
        prompt = {None: SYSTEM_PROMPT, "none": None}.get(prompt, prompt)
    if args.format != "text":
        apply_template(tokenizer, args.template_name, prompt, args.tool_format)
    args.config = checkpoint.config
    positions = attention.context_length(checkpoint.config)
    if "model_max_length" not in args.given and positions:
        args.model_max_length = min(args.model_max_length, positions)
    return tokenizer, choose_rows(checkpoint, tokenizer, args, data_arguments(args, args.file_path))


def token_lengths(
    args: ValidationArguments,
    tokenizer: "PreTrainedTokenizerBase",
    chat: "ChatRows",
    data: "LoadedData",
    name: str,
) -> "np.ndarray":
    """Number of tokens of each row that can be encoded, however long; of a preference pair, with the longer answer.

    Rows that a stage would refuse, those that are too long included, are added to `data.problems`.
    """
    from medicalgpt.data import encoding
    from medicalgpt.data.encoding import Pair, Prompt, Sample
    from medicalgpt.data.lengths import SHORTENED
    from medicalgpt.data.loading import with_length_remedies
    from medicalgpt.data.tokenizing import encode_rows
    from medicalgpt.readers.sources import column_values

    import numpy as np

    if name == "text":
        # A document of any length is trained on, in blocks.
        encoded = encode_rows(
            data, "train", partial(encoding.encode_document, tokenizer, block_size=2**31), sample=Sample
        )
        return np.array([len(ids) for ids in column_values(encoded, "input_ids")])
    encode, sample = {
        "chat": (partial(encoding.encode_chat, tokenizer, **chat.options), chat.sample),
        "preference": (partial(encoding.encode_preference, tokenizer), Pair),
        "task": (partial(encoding.encode_prompt, tokenizer), Prompt),
    }[name]
    encoded = encode_rows(data, "train", partial(encode, max_length=None), sample=sample)
    columns = [field.name for field in fields(sample) if field.name not in ("labels", "pictures")]
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
        rows = replace(data, train=data.train.select(mask), problems=[], lengths={})
        shorten = {"shorten_rows": data_arguments(args, args.file_path).long_rows == "turns"} if name == "chat" else {}
        encode_rows(rows, "train", partial(encode, max_length=limit, **shorten), sample=sample)
        data.problems += with_length_remedies(rows.problems, length_limit(args, name))
        if shortened := rows.lengths["train"].count(SHORTENED):
            print(f"  {shortened} of {len(lengths)} rows keep only their first exchanges that fit (--long_rows turns)")
    if not lengths and not data.problems:
        raise UserError("no row could be encoded.")
    return np.array(lengths)


def longest_allowed(args: ValidationArguments, name: str) -> int:
    """The maximum number of tokens of a row; of a task, of its prompt."""
    return args.model_max_length - (completion_length(args) if name == "task" else 0)


def length_limit(args: ValidationArguments, name: str) -> "LengthLimit":
    """The limit as the stage has it, with the positions of the model."""
    from medicalgpt.data.lengths import LengthLimit

    reserved = ("--max_completion_length", completion_length(args)) if name == "task" else None
    return LengthLimit.of(longest_allowed(args, name), reserved, args.config)


def completion_length(args: ValidationArguments) -> int:
    """Of tasks: tokens kept for the answer."""
    kept = args.max_completion_length if args.max_completion_length is not None else args.model_max_length // 2
    if not 0 < kept < args.model_max_length:
        raise UserError(
            f"--max_completion_length {kept} must be above 0 and below --model_max_length {args.model_max_length}."
        )
    return kept


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
    allowed, needed = length_limit(args, name), {share: percentile(lengths, share) for share in PROPOSED_PERCENTILES}
    fitting = {share: length for share, length in needed.items() if not allowed.is_beyond(length)}
    if fitting:
        flags = ", ".join(f"{share}% of the rows: {allowed.flags_for(length)}" for share, length in fitting.items())
        print(f"  enough for {flags}")
    if len(fitting) < len(needed):
        print(f"  {max(needed)}% of the rows {allowed.beyond(max(needed.values()))}")


if __name__ == "__main__":
    run_main(main)
