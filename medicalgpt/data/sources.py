"""Where rows come from: files, their encodings and lines, and hub data sets.

Nothing is dropped or repaired in silence: a row is read, or it is a `Problem` with file, line, value, reason and
remedy.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medicalgpt.args import DataArguments
from medicalgpt.data.mixing import parse_sources
from medicalgpt.errors import UserError

from loguru import logger

if TYPE_CHECKING:
    from datasets import Dataset


SUFFIXES = (".jsonl", ".json", ".txt", ".md")
# Shards and splits are named so on the hub too: these prefixes mark rows that are never trained on.
HELD_OUT_NAME = re.compile(r"^(validation|valid|val|dev|eval|test)([-_.]|$)", re.IGNORECASE)
SHOWN_PROBLEMS = 20


@dataclass(frozen=True)
class Row:
    """One row as it stands in a file.

    Attributes:
        value: text for .txt and .md, whatever JSON holds otherwise.
        item: its number in the list of a .json file, where a line may hold many rows; 0 elsewhere.
    """

    path: str
    line: int
    value: Any
    item: int = 0

    @property
    def place(self) -> str:
        return f"{self.path}:{self.line}" + (f" (row {self.item})" if self.item else "")


@dataclass(frozen=True)
class Problem:
    """Why one row cannot be used, and what to do about it.

    Attributes:
        kind: what it is counted under if it is left out; `unreadable` hides rows that nobody can count, and is never
            left out.
        side: `train` or `validation` where it never became a row, empty where one of `LoadedData` is meant.
    """

    place: str
    reason: str
    remedy: str
    value: str = ""
    kind: str = "unusable"
    side: str = ""

    def __str__(self) -> str:
        shown = f" [{self.value}]" if self.value else ""
        return f"{self.place}: {self.reason}{shown}. {self.remedy}"


class RowError(ValueError):
    """A row that cannot be converted.

    Args:
        reason: what is wrong, without a full stop.
        remedy: what to do, a sentence.
        value: the offending value.
    """

    def __init__(self, reason: str, remedy: str, value: Any = ""):
        super().__init__(reason)
        self.reason, self.remedy, self.value = reason, remedy, shorten(value)


def listed(problems: Sequence[Problem]) -> str:
    """The first problems, an indented line each, and how many more there are."""
    lines = list(map(str, problems[:SHOWN_PROBLEMS]))
    if len(problems) > SHOWN_PROBLEMS:
        lines.append(f"… and {len(problems) - SHOWN_PROBLEMS} more")
    return "\n".join(f"  {line}" for line in lines)


class DataError(UserError):
    """All problems of the data at once."""

    def __init__(self, problems: list[Problem]):
        self.problems = problems
        super().__init__(
            f"{len(problems)} problem(s) in the data:\n{listed(problems)}\n"
            "Nothing was trained. Mend the rows, or leave them out and have them counted: --skip_bad_rows True "
            "(rows that are too long: --skip_long_rows True)."
        )


def shorten(value: Any, limit: int = 60) -> str:
    """One line of at most `limit` characters that shows `value`."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def find_files(place: str) -> list[Path]:
    """All data files at `place` (a file, or a folder with its subfolders), sorted.

    Raises:
        UserError: nothing there, or nothing with a known suffix.
    """
    path = Path(place)
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise UserError(f"{path} is not a data file: the suffix must be one of {', '.join(SUFFIXES)}.")
        return [path]
    if not path.is_dir():
        raise UserError(f"no such file or folder: {place} (looked in {Path.cwd()}). Check the path.")
    files = sorted(
        f
        for f in path.rglob("*")
        if f.is_file()
        and f.suffix.lower() in SUFFIXES
        and not any(part.startswith(".") for part in f.relative_to(path).parts)
        and f.stem.lower() not in ("readme", "readme_zh", "license")
    )
    if not files:
        raise UserError(f"{place} holds no data files; put {', '.join(SUFFIXES)} files there.")
    return files


def find_encoding(path: Path) -> str:
    """`utf-8-sig`, or `gb18030` with a notice. The file is read by line, never held.

    Raises:
        UserError: neither encoding fits.
    """
    wrong = _undecodable_line(path, "utf-8")
    if not wrong:
        return "utf-8-sig"
    if _undecodable_line(path, "gb18030"):
        raise UserError(f"{path}:{wrong}: neither UTF-8 nor gb18030 text. Save the file as UTF-8.")
    logger.warning(f"{path} is not UTF-8; it was read as gb18030")
    return "gb18030"


def _undecodable_line(path: Path, encoding: str) -> int:
    """Number of the first line that is not in this encoding, or 0."""
    # In neither encoding is the byte of a line's end part of another character.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode(encoding)
            except UnicodeDecodeError:
                return number
    return 0


def read_file_text(path: Path) -> str:
    """The text of a file in UTF-8, or in gb18030 with a notice.

    Raises:
        UserError: neither encoding fits.
    """
    return path.read_bytes().decode(find_encoding(path))


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbers and texts of the lines that hold more than white space, without their ends; a line at a time.

    Raises:
        UserError: the file is neither UTF-8 nor gb18030.
    """
    # Only a line feed ends a line: U+2028 and the like are allowed inside a string of JSON.
    with path.open(encoding=find_encoding(path), newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line.removesuffix("\n") if not line.endswith("\r\n") else line[:-2]


def read_rows(path: str | Path, document_unit: str = "auto") -> Iterator[Row | Problem]:
    """Read a file row by row; what cannot be read comes as a `Problem` in its place.

    Files are read by line and never held whole, except .json and documents of a whole file.

    Args:
        path: .jsonl (a row a line), .json (a list of rows, or one row), .txt or .md.
        document_unit: what one document is in .txt and .md: `line`, `paragraph` (blank lines between), `file`, or
            `auto`: line for .txt, file for .md.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        for number, line in read_lines(path):
            yield _parse_json(str(path), number, line)
    elif suffix == ".json":
        yield from _read_json(str(path), read_file_text(path))
    else:
        unit = document_unit if document_unit != "auto" else ("file" if suffix == ".md" else "line")
        yield from _read_text(path, unit)


def _parse_json(path: str, number: int, line: str) -> Row | Problem:
    try:
        return _whole_characters(Row(path, number, json.loads(line)), line)
    except json.JSONDecodeError as error:
        column = error.colno
        snippet = line[max(0, column - 20) : column + 20]
        return Problem(f"{path}:{number}", f"broken JSON at column {column}: {error.msg}", "Mend the line.", snippet)


def _whole_characters(row: Row, raw: str) -> Row | Problem:
    """The row, unless it holds a lone surrogate, half a character: JSON can spell it, no tokenizer can read it."""
    if "\\ud" not in raw.lower():
        return row
    try:
        json.dumps(row.value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):x}"
        return Problem(row.place, f"half a character, {half}, without its other half", "Mend the text.")
    return row


def _read_json(path: str, text: str) -> Iterator[Row | Problem]:
    decoder = json.JSONDecoder()
    position = _skip_space(text, 0)
    line, counted = 1, 0
    try:
        if not text[position : position + 1] == "[":
            value, end = decoder.raw_decode(text, position)
            if _skip_space(text, end) != len(text):
                raise json.JSONDecodeError("more text after the value; a row a line is .jsonl", text, end)
            yield _whole_characters(Row(path, text.count("\n", 0, position) + 1, value), text)
            return
        position = _skip_space(text, position + 1)
        item = 0
        while text[position : position + 1] != "]":
            value, end = decoder.raw_decode(text, position)
            line, counted, item = line + text.count("\n", counted, position), position, item + 1
            yield _whole_characters(Row(path, line, value, item), text[position:end])
            position = _skip_space(text, end)
            if text[position : position + 1] == ",":
                position = _skip_space(text, position + 1)
                if text[position : position + 1] == "]":
                    raise json.JSONDecodeError("expected another row after ','", text, position)
            elif text[position : position + 1] != "]":
                raise json.JSONDecodeError("expected ',' or ']'", text, position)
        if _skip_space(text, position + 1) != len(text):
            raise json.JSONDecodeError("more text after the list", text, _skip_space(text, position + 1))
    except json.JSONDecodeError as error:
        yield Problem(
            f"{path}:{error.lineno}",
            f"broken JSON at column {error.colno}: {error.msg}",
            "Mend the file; rows after this place were not read.",
            shorten(text[max(0, error.pos - 20) : error.pos + 20]),
            kind="unreadable",
        )


def _skip_space(text: str, position: int) -> int:
    match = re.compile(r"\s*").match(text, position)
    return match.end()


def _read_text(path: Path, unit: str) -> Iterator[Row]:
    if unit == "file":
        text = read_file_text(path).replace("\r\n", "\n")
        if text.strip():
            yield Row(str(path), 1, text.strip("\n"))
        return
    if unit == "line":
        for number, line in read_lines(path):
            yield Row(str(path), number, line)
        return
    paragraph: list[str] = []
    first = 0
    for number, line in read_lines(path):
        if paragraph and number > first + len(paragraph):
            yield Row(str(path), first, "\n".join(paragraph))
            paragraph = []
        if not paragraph:
            first = number
        paragraph.append(line)
    if paragraph:
        yield Row(str(path), first, "\n".join(paragraph))


@dataclass
class Source:
    """One place of `--train_file_dir`; with weights, `limit` is its part of `--max_train_samples`."""

    place: str
    files: list[Path]
    weight: Fraction | None = None
    limit: int | None = None


def file_of(place: str) -> str:
    return place.rpartition(":")[0]


def column_values(dataset: "Dataset", name: str) -> Iterator[Any]:
    for batch in dataset.select_columns(name).iter(10_000):
        yield from batch[name]


def choose_files(arguments: DataArguments) -> tuple[list[Source], list[Path]]:
    """The sources of training rows, and the held-out files."""
    if bool(arguments.train_file_dir) == bool(arguments.dataset_name):
        raise UserError("name the data with exactly one of --train_file_dir and --dataset_name.")
    if not arguments.train_file_dir:
        held_out = find_files(arguments.validation_file_dir) if arguments.validation_file_dir else []
        return [], held_out
    sources: list[Source] = []
    beside: list[Path] = []
    reached: dict[Path, str] = {}
    for place, weight in parse_sources(arguments.train_file_dir):
        found = find_files(place)
        for path in found:
            if other := reached.get(path.resolve()):
                raise UserError(
                    f"--train_file_dir reaches {path} twice, by {other} and by {place}. Name places that do not hold "
                    "each other."
                )
        reached |= {path.resolve(): place for path in found}
        held_out = [] if Path(place).is_file() else [path for path in found if HELD_OUT_NAME.match(path.name)]
        train = [path for path in found if path not in held_out]
        if not train:
            raise UserError(f"{place} holds only held-out files ({', '.join(map(str, held_out))}).")
        limit = arguments.max_train_samples
        if weight is not None and limit is not None:
            limit = math.ceil(limit * weight)
        sources.append(Source(place, train, weight, limit))
        beside += held_out
    if sources[0].weight is None and "mix_strategy" in getattr(arguments, "given", ()):
        raise UserError(
            f"--mix_strategy {arguments.mix_strategy} has no effect without weights. Give them (--train_file_dir "
            "data/a:0.7,data/b:0.3), or leave the flag out."
        )
    if beside:
        logger.info(f"held out by their names, never trained on: {', '.join(map(str, beside))}")
    if not arguments.validation_file_dir:
        return sources, beside
    validation = find_files(arguments.validation_file_dir)
    trained = {path.resolve() for source in sources for path in source.files}
    by_name = [path for path in validation if HELD_OUT_NAME.match(path.name)]
    # One folder for both: the names tell the sides apart.
    shared = any(path.resolve() in trained for path in validation)
    return sources, by_name if shared and by_name else validation


# Name, hash of the content, rows.
InputFile = tuple[str, str, Iterable[Row | Problem]]


def open_files(paths: list[Path], document_unit: str) -> Iterator[InputFile]:
    return ((str(path), hash_file(path), read_rows(path, document_unit)) for path in paths)


def open_hub(arguments: DataArguments, with_validation: bool) -> Iterator[tuple[str, list[InputFile], int | None]]:
    """Side, rows and limit of the splits of a data set on the hub."""
    import datasets

    name = arguments.dataset_name
    try:
        splits = datasets.load_dataset(name, arguments.dataset_config_name)
    except Exception as error:
        raise UserError(
            f"the data set {name} could not be loaded from the hub ({type(error).__name__}: "
            f"{shorten(str(error), 160)}). Check the name and the network, set HF_ENDPOINT to a mirror, or use files "
            "with --train_file_dir."
        ) from error
    held_out = next((split for split in ("validation", "test") if split in splits), None)
    if "train" not in splits:
        raise UserError(f"the data set {name} has no split `train`; it has {', '.join(splits)}.")
    for side, split, limit in (
        ("train", "train", arguments.max_train_samples),
        ("validation", held_out if with_validation else None, arguments.max_eval_samples),
    ):
        if split:
            place = f"{name}/{split}"
            yield side, [(place, splits[split]._fingerprint, _hub_rows(place, splits[split]))], limit


def _hub_rows(name: str, split: "Dataset") -> Iterator[Row]:
    for number, value in enumerate(split, start=1):
        # Columns that a row of mixed formats lacks come as None.
        yield Row(name, number, {key: item for key, item in value.items() if item is not None})


def hash_file(path: str | Path) -> str:
    """SHA-256 of a file, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def ignored_fields(arguments: DataArguments) -> frozenset[str]:
    """Fields that rows may have and that are not used."""
    return frozenset(filter(None, (arguments.ignore_fields or "").replace(" ", "").split(",")))
