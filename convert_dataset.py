"""Convert data into another format, without losing anything.

    python convert_dataset.py --in_file alpaca.json --out_file sharegpt.jsonl --to sharegpt
    python convert_dataset.py --in_file data/finetune/train.jsonl --out_file outputs/train.parquet --to messages
    python convert_dataset.py --in_file data/reward --out_file outputs/pairs.jsonl --to preference
    python convert_dataset.py --in_file rated.jsonl --out_file outputs/pairs.jsonl --to preference --pair_by helpfulness
    python convert_dataset.py --in_file alpaca.json --out_file sharegpt.jsonl --data_type alpaca
    python convert_dataset.py --dataset_name FreedomIntelligence/medical-o1-reasoning-SFT --dataset_config_name en \\
        --out_file outputs/o1.jsonl --to sharegpt

Reads every format that training reads, and writes JSON Lines, a JSON list, Parquet or lines of text, by the suffix of
--out_file. Each row is read again from what is written and must be the same. A row that the format cannot hold, or that
training could not use, ends the program with its file and line; nothing is written then. Fields that only describe a
row (id, source, category) are kept.
"""

from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medicalgpt.args import DataArguments, same_field
from medicalgpt.errors import UserError, run_main
from medicalgpt.logs import setup_logging
from medicalgpt.parser import parse_args

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from medicalgpt.formats.conversion import Converter
    from medicalgpt.readers.problems import Problem

FORMATS = ("sharegpt", "messages", "alpaca", "preference", "task", "text", "unchanged")


@dataclass
class ConversionArguments:
    """What to convert, and into what."""

    out_file: str = field(
        metadata={"help": "File to write: .jsonl, .json, .parquet, or .txt.", "aliases": ["--output_file"]}
    )
    in_file: str | None = field(
        default=None, metadata={"help": "File or folder.", "aliases": ["--file_path", "--train_file_dir"]}
    )
    dataset_name: str | None = same_field(DataArguments, "dataset_name")
    dataset_config_name: str | None = same_field(DataArguments, "dataset_config_name")
    dataset_split: str = field(default="train", metadata={"help": "Split of that dataset to convert."})
    data_files: str | None = field(
        default=None, metadata={"help": "Files of that dataset to convert, separated by commas."}
    )
    to: str | None = field(
        default=None,
        metadata={
            "help": "sharegpt, messages (OpenAI), alpaca: conversations. preference: prompt, chosen, rejected. task: "
            "questions with what their answers are scored with. text: documents. unchanged: only the file's type.",
            "choices": list(FORMATS),
        },
    )
    pair_by: str | None = field(
        default=None,
        metadata={
            "help": "With --to preference, for answers that were rated one by one: the field with the rating. Of the "
            "answers to one prompt, the best is chosen and the worst rejected; other rows are counted as left out."
        },
    )
    data_type: str | None = field(
        default=None,
        metadata={
            "help": "MedicalGPT's name for the input, which is recognised anyway: alpaca, qa, sharegpt mean --to "
            "sharegpt, json2jsonl means --to unchanged.",
            "choices": ["alpaca", "qa", "sharegpt", "json2jsonl"],
        },
    )
    file_type: str | None = field(
        default=None,
        metadata={
            "help": "Of MedicalGPT; not needed, since the suffix of --in_file tells it. The first line of a CSV file "
            "has the names of the columns: MedicalGPT's had none."
        },
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace --out_file, once the new one is complete."})
    max_samples: int | None = field(
        default=None, metadata={"help": "Convert the first N rows.", "aliases": ["--max_train_samples"]}
    )
    columns: str | None = same_field(DataArguments, "columns")
    preset: str | None = same_field(DataArguments, "preset")
    encoding: str | None = same_field(DataArguments, "encoding")
    ignore_fields: str | None = same_field(DataArguments, "ignore_fields")
    skip_bad_rows: bool = field(
        default=False, metadata={"help": "Skip and count rows that cannot be converted, instead of stopping."}
    )

    def __post_init__(self):
        if bool(self.in_file) == bool(self.dataset_name):
            raise ValueError("give the data with exactly one of --in_file and --dataset_name.")
        meant = {None: None, "json2jsonl": "unchanged"}.get(self.data_type, "sharegpt")
        if self.to and meant and self.to != meant:
            raise ValueError(f"--data_type {self.data_type} means --to {meant}; keep one of the two flags.")
        self.to = self.to or meant
        if not self.to:
            raise ValueError(f"--to is missing: one of {', '.join(FORMATS)}.")
        if self.pair_by and self.to != "preference":
            raise ValueError(f"--pair_by {self.pair_by} makes preference pairs: it needs --to preference.")


def main() -> None:
    (args,) = parse_args(ConversionArguments, description=__doc__, program="convert_dataset.py")
    from medicalgpt.data.export import write_rows
    from medicalgpt.data.loading import load_data
    from medicalgpt.data.pairing import RatedAnswers
    from medicalgpt.data.rows import Rows

    from loguru import logger

    setup_logging()
    check_output(args)
    if args.file_type:
        logger.info("--file_type is not needed: the suffix of --in_file tells it; a CSV file begins with column names")
    data = load_data(data_arguments(args), reader(args))
    problems = [problem for problem in data.problems if problem.side != "validation"]
    rated = RatedAnswers(data.train, args.pair_by) if args.pair_by else None
    rows = Rows(exported(args, rated.pairs() if rated else data.train, problems))
    settle(args, problems, len(rows))
    write_rows(args.out_file, rows, args.overwrite)
    account = data.account["train"]
    left_out = sum((each.left_out for each in account), Counter()) + Counter(problem.kind for problem in problems)
    left_out += rated.left_out if rated else Counter()
    reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "none"
    print(f"{args.in_file or args.dataset_name}: {sum(each.rows for each in account)} rows, left out: {reasons}")
    print(f"{args.out_file}: {len(rows)} rows, {args.to}")


def check_output(args: ConversionArguments) -> None:
    """Before anything is read: whether the output may be written at all.

    Raises:
        UserError: another suffix, a file that is there, or the input itself.
    """
    from medicalgpt.data.export import FILE_SUFFIXES

    path = Path(args.out_file)
    if path.suffix.lower() not in FILE_SUFFIXES:
        raise UserError(f"--out_file {path}: the suffix must be one of {', '.join(FILE_SUFFIXES)}.")
    if path.suffix.lower() == ".txt" and args.to not in ("text", "unchanged"):
        raise UserError(f"--out_file {path}: a .txt file holds documents only. Write .jsonl, or convert --to text.")
    # A name on the hub is not a path here.
    source = Path(args.in_file or args.dataset_name)
    if path.exists() and source.exists() and path.samefile(source):
        raise UserError(f"--out_file {path} is the input. Choose another path.")
    if path.is_dir():
        raise UserError(f"--out_file {path} is a folder. Give the path of a file.")
    if path.exists() and not args.overwrite:
        raise UserError(f"{path} exists. Choose another path, or replace it with --overwrite True.")
    if source.is_dir() and path.resolve().is_relative_to(source.resolve()):
        raise UserError(
            f"--out_file {path} would be in the folder that is converted, and be read as data from then on. Choose a "
            "path outside of it."
        )


def data_arguments(args: ConversionArguments) -> DataArguments:
    """The data flags of a stage that trains on the input."""
    shared = {entry.name for entry in fields(DataArguments)} & {entry.name for entry in fields(args)}
    # Held-out rows are not converted; whether they occur among the others is for training.
    return DataArguments(
        train_file_dir=args.in_file,
        max_train_samples=args.max_samples,
        allow_overlap=True,
        **{name: getattr(args, name) for name in shared},
    )


def reader(args: ConversionArguments) -> "Converter":
    """A converter that keeps the fields which are not part of a conversation next to it.

    Raises:
        UserError: --columns or --preset cannot be understood.
    """
    from medicalgpt.data.export import TARGETS
    from medicalgpt.data.loading import row_converter
    from medicalgpt.formats.conversion import Conversion, Converter, to_messages, to_text

    class Unchanged(Converter):
        def convert(self, value: Any) -> Conversion:
            value = {"text": value} if isinstance(value, str) else value
            return Conversion({"row": without(value, self.ignore) if isinstance(value, dict) else value})

    class Keeping(Converter):
        def convert(self, value: Any) -> Conversion:
            found = super().convert(value)
            kept = {name: value[name] for name in found.unused if name in value}
            unused = tuple(name for name in found.unused if name not in kept)
            return Conversion({"row": found.row, "kept": kept}, unused, found.preset)

    # Answers that were rated one by one are conversations until they are pairs.
    to = to_text if args.to == "unchanged" else to_messages if args.pair_by else TARGETS[args.to][1]
    made = row_converter(data_arguments(args), to)
    kind = Unchanged if args.to == "unchanged" else Keeping
    return kind(made.to, made.ignore, made.columns, made.preset)


def without(row: dict[str, Any], names: frozenset[str]) -> dict[str, Any]:
    return {name: item for name, item in row.items() if name not in names}


def exported(
    args: ConversionArguments, rows: "Iterable[dict[str, Any]]", problems: "list[Problem]"
) -> "Iterator[dict[str, Any]]":
    """The rows as they are written; what the format cannot hold joins `problems`."""
    from medicalgpt.data.export import export_row
    from medicalgpt.readers.problems import Problem, RowError, place_of

    for row in rows:
        if args.to == "unchanged":
            yield row["row"]
            continue
        try:
            yield export_row(row["row"], args.to, row["kept"])
        except RowError as error:
            problems.append(Problem(place_of(row), error.reason, error.remedy, error.value, kind="not convertible"))


def settle(args: ConversionArguments, problems: "list[Problem]", converted: int) -> None:
    """Report rows that cannot be converted.

    Raises:
        UserError: there are such rows and no flag allows to skip them, or no row is left.
    """
    from medicalgpt.readers.problems import NEVER_SKIPPED, SHOWN_PROBLEMS, advise, format_problems

    from loguru import logger

    refused = [problem for problem in problems if problem.kind in NEVER_SKIPPED or not args.skip_bad_rows]
    if refused:
        raise UserError(
            f"{len(refused)} row(s) cannot be converted to {args.to}:\n{format_problems(refused)}\n"
            f"Nothing was written. {advise(refused)}"
        )
    for problem in problems[:SHOWN_PROBLEMS]:
        logger.warning(f"skipped: {problem}")
    if not converted:
        raise UserError("every row was skipped; see the warnings above. Nothing was written.")


if __name__ == "__main__":
    run_main(main)
