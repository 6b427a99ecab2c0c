"""Where rows come from: files and their lines, and datasets on the hub.

Nothing is silently dropped or repaired: a row is read, or it is a `Problem` with file, line, value, reason and remedy.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from medicalgpt.args import DataArguments
from medicalgpt.data.mixing import parse_sources
from medicalgpt.data.text_files import TextFile, open_text
from medicalgpt.errors import UserError

from loguru import logger

if TYPE_CHECKING:
    from datasets import Dataset


SUFFIXES = (".jsonl", ".json", ".txt", ".md")
# Shards and splits on the hub have these names too: the prefixes mark rows that are never trained on.
HELD_OUT_NAME = re.compile(r"^(validation|valid|val|dev|eval|test)([-_.]|$)", re.IGNORECASE)
SHOWN_PROBLEMS = 20


class Place(NamedTuple):
    """Where a row is: the identity of a row, which messages show as `file:line`.

    Attributes:
        file: the path as given, or dataset and split on the hub.
        line: counted from 1.
        item: its number in the list of a .json file, where a line may hold many rows; 0 elsewhere.
    """

    file: str
    line: int
    item: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" + (f" (row {self.item})" if self.item else "")


def place_of(row: Mapping[str, Any]) -> Place:
    """The place of a converted or encoded row, which holds the fields of its `Place` as `place`."""
    return Place(**row["place"])


@dataclass(frozen=True)
class SourceRow:
    """One row as it is in a file.

    Attributes:
        value: text for .txt and .md, whatever JSON holds otherwise.
    """

    place: Place
    value: Any


@dataclass(frozen=True)
class Problem:
    """Why one row cannot be used, and what to do about it.

    Attributes:
        kind: what it is counted under if the row is skipped; `unreadable` hides rows that nobody can count, and is
            never skipped.
        side: `train` or `validation` where it never became a row, empty where one of `LoadedData` is meant.
    """

    place: Place
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


def format_problems(problems: Sequence[Problem]) -> str:
    """The first problems, one indented line each, and the number of the others."""
    lines = list(map(str, problems[:SHOWN_PROBLEMS]))
    if len(problems) > SHOWN_PROBLEMS:
        lines.append(f"… and {len(problems) - SHOWN_PROBLEMS} more")
    return "\n".join(f"  {line}" for line in lines)


class DataError(UserError):
    """All problems of the data at once."""

    def __init__(self, problems: list[Problem]):
        self.problems = problems
        super().__init__(
            f"{len(problems)} problem(s) in the data:\n{format_problems(problems)}\n"
            "Nothing was trained. Fix the rows, or skip and count them: --skip_bad_rows True (rows that are too long: "
            "--skip_long_rows True)."
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
        raise UserError(f"{place} has no data files; put {', '.join(SUFFIXES)} files there.")
    return files


def read_rows(file: str | Path | TextFile, document_unit: str = "auto") -> Iterator[SourceRow | Problem]:
    """Read a file row by row; what cannot be read comes as a `Problem` in its place.

    Files larger than `text_files.MAX_HELD_BYTES` are read by line and never held, except .json and documents of an
    entire file.

    Args:
        file: .jsonl (one row per line), .json (a list of rows, or one row), .txt or .md.
        document_unit: what one document is in .txt and .md: `line`, `paragraph` (blank lines between), `file`, or
            `auto`: line for .txt, file for .md.
    """
    file = file if isinstance(file, TextFile) else open_text(file)
    suffix = file.path.suffix.lower()
    if suffix == ".jsonl":
        for number, line in file.lines():
            yield _parse_json(Place(str(file.path), number), line)
    elif suffix == ".json":
        yield from _read_json(str(file.path), file.text())
    else:
        unit = document_unit if document_unit != "auto" else ("file" if suffix == ".md" else "line")
        yield from _read_text(file, unit)


def _parse_json(place: Place, line: str) -> SourceRow | Problem:
    try:
        return _whole_characters(SourceRow(place, json.loads(line)), line)
    except json.JSONDecodeError as error:
        column = error.colno
        snippet = line[max(0, column - 20) : column + 20]
        return Problem(place, f"broken JSON at column {column}: {error.msg}", "Fix the line.", snippet)


def _whole_characters(row: SourceRow, raw: str) -> SourceRow | Problem:
    """The row, unless it has a lone surrogate, half a character: valid in JSON, but no tokenizer can read it."""
    if "\\ud" not in raw.lower():
        return row
    try:
        json.dumps(row.value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):x}"
        return Problem(row.place, f"half a character, {half}, without its other half", "Fix the text.")
    return row


def _read_json(path: str, text: str) -> Iterator[SourceRow | Problem]:
    decoder = json.JSONDecoder()
    position = _skip_space(text, 0)
    line, counted = 1, 0
    try:
        if not text[position : position + 1] == "[":
            value, end = decoder.raw_decode(text, position)
            if _skip_space(text, end) != len(text):
                raise json.JSONDecodeError("more text after the value; one row per line is .jsonl", text, end)
            place = Place(path, text.count("\n", 0, position) + 1)
            yield _whole_characters(SourceRow(place, value), text)
            return
        position = _skip_space(text, position + 1)
        item = 0
        while text[position : position + 1] != "]":
            value, end = decoder.raw_decode(text, position)
            line, counted, item = line + text.count("\n", counted, position), position, item + 1
            yield _whole_characters(SourceRow(Place(path, line, item), value), text[position:end])
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
            Place(path, error.lineno),
            f"broken JSON at column {error.colno}: {error.msg}",
            "Fix the file; rows after this place were not read.",
            shorten(text[max(0, error.pos - 20) : error.pos + 20]),
            kind="unreadable",
        )


def _skip_space(text: str, position: int) -> int:
    match = re.compile(r"\s*").match(text, position)
    return match.end()


def _read_text(file: TextFile, unit: str) -> Iterator[SourceRow]:
    name = str(file.path)
    if unit == "file":
        text = file.text().replace("\r\n", "\n")
        if text.strip():
            yield SourceRow(Place(name, 1), text.strip("\n"))
        return
    if unit == "line":
        for number, line in file.lines():
            yield SourceRow(Place(name, number), line)
        return
    paragraph: list[str] = []
    first = 0
    for number, line in file.lines():
        if paragraph and number > first + len(paragraph):
            yield SourceRow(Place(name, first), "\n".join(paragraph))
            paragraph = []
        if not paragraph:
            first = number
        paragraph.append(line)
    if paragraph:
        yield SourceRow(Place(name, first), "\n".join(paragraph))


@dataclass
class Source:
    """One path of `--train_file_dir`; with weights, `limit` is its part of `--max_train_samples`."""

    place: str
    files: list[Path]
    weight: Fraction | None = None
    limit: int | None = None


def column_values(dataset: "Dataset", name: str) -> Iterator[Any]:
    for batch in dataset.select_columns(name).iter(10_000):
        yield from batch[name]


def choose_files(arguments: DataArguments) -> tuple[list[Source], list[Path]]:
    """The sources of training rows, and the held-out files."""
    if bool(arguments.train_file_dir) == bool(arguments.dataset_name):
        raise UserError("give the data with exactly one of --train_file_dir and --dataset_name.")
    if not arguments.train_file_dir:
        held_out = find_files(arguments.validation_file_dir) if arguments.validation_file_dir else []
        return [], held_out
    sources: list[Source] = []
    held_out_by_name: list[Path] = []
    reached: dict[Path, str] = {}
    for place, weight in parse_sources(arguments.train_file_dir):
        found = find_files(place)
        for path in found:
            if other := reached.get(path.resolve()):
                raise UserError(
                    f"--train_file_dir contains {path} twice, in {other} and in {place}. Give paths that do not "
                    "contain each other."
                )
        reached |= {path.resolve(): place for path in found}
        held_out = [] if Path(place).is_file() else [path for path in found if HELD_OUT_NAME.match(path.name)]
        train = [path for path in found if path not in held_out]
        if not train:
            raise UserError(f"{place} has only held-out files ({', '.join(map(str, held_out))}).")
        limit = arguments.max_train_samples
        if weight is not None and limit is not None:
            limit = math.ceil(limit * weight)
        sources.append(Source(place, train, weight, limit))
        held_out_by_name += held_out
    if sources[0].weight is None and "mix_strategy" in getattr(arguments, "given", ()):
        raise UserError(
            f"--mix_strategy {arguments.mix_strategy} has no effect without weights. Give them (--train_file_dir "
            "data/a:0.7,data/b:0.3), or omit the flag."
        )
    if held_out_by_name:
        logger.info(f"held out by their names, never trained on: {', '.join(map(str, held_out_by_name))}")
    if not arguments.validation_file_dir:
        return sources, held_out_by_name
    validation = find_files(arguments.validation_file_dir)
    trained = {path.resolve() for source in sources for path in source.files}
    by_name = [path for path in validation if HELD_OUT_NAME.match(path.name)]
    # One folder for both: the names distinguish the sides.
    shared = any(path.resolve() in trained for path in validation)
    return sources, by_name if shared and by_name else validation


class InputFile(NamedTuple):
    """Rows that are counted together, and a hash of their content."""

    name: str
    sha256: str
    rows: Iterable[SourceRow | Problem]


def open_files(paths: list[Path], document_unit: str) -> Iterator[InputFile]:
    """Files one after another; each is opened after the rows of the previous one have been read."""
    for path in paths:
        file = open_text(path)
        yield InputFile(str(path), file.sha256, read_rows(file, document_unit))


def open_hub(arguments: DataArguments, with_validation: bool) -> Iterator[tuple[str, list[InputFile], int | None]]:
    """Side, rows and limit of the splits of a dataset on the hub."""
    import datasets

    name = arguments.dataset_name
    try:
        splits = datasets.load_dataset(name, arguments.dataset_config_name)
    except Exception as error:
        raise UserError(
            f"the dataset {name} could not be loaded from the hub ({type(error).__name__}: "
            f"{shorten(str(error), 160)}). Check the name and the network, set HF_ENDPOINT to a mirror, or use files "
            "with --train_file_dir."
        ) from error
    held_out = next((split for split in ("validation", "test") if split in splits), None)
    if "train" not in splits:
        raise UserError(f"the dataset {name} has no split `train`; it has {', '.join(splits)}.")
    for side, split, limit in (
        ("train", "train", arguments.max_train_samples),
        ("validation", held_out if with_validation else None, arguments.max_eval_samples),
    ):
        if split:
            place = f"{name}/{split}"
            yield side, [InputFile(place, splits[split]._fingerprint, _hub_rows(place, splits[split]))], limit


def _hub_rows(name: str, split: "Dataset") -> Iterator[SourceRow]:
    for number, value in enumerate(split, start=1):
        # Columns that a row of mixed formats does not have are None.
        yield SourceRow(Place(name, number), {key: item for key, item in value.items() if item is not None})


def ignored_fields(names: str | None) -> frozenset[str]:
    """The fields in `--ignore_fields`, separated by commas: rows may have them, and they are not used."""
    return frozenset(filter(None, (names or "").replace(" ", "").split(",")))
