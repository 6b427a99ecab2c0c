"""Where rows come from: files and their lines, and datasets on the hub.

Nothing is silently dropped or repaired: a row is read, or it is a `Problem` with file, line, value, reason and remedy.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from medicalgpt.args import DataArguments
from medicalgpt.data.folders import Source, choose_files, find_files, format_of, split_of
from medicalgpt.data.problems import (
    SHOWN_PROBLEMS,
    DataError,
    Place,
    Problem,
    RowError,
    SourceRow,
    format_problems,
    place_of,
    shorten,
)
from medicalgpt.data.text_files import TextFile, open_text
from medicalgpt.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "SHOWN_PROBLEMS",
    "DataError",
    "InputFile",
    "Place",
    "Problem",
    "RowError",
    "Source",
    "SourceRow",
    "choose_files",
    "column_values",
    "find_files",
    "format_problems",
    "ignored_fields",
    "open_files",
    "open_hub",
    "place_of",
    "read_rows",
    "shorten",
    "split_of",
]


def read_rows(
    file: str | Path | TextFile, document_unit: str = "auto", encoding: str | None = None
) -> Iterator[SourceRow | Problem]:
    """Read a file row by row; what cannot be read comes as a `Problem` in its place.

    Files larger than `text_files.MAX_HELD_BYTES` are read by line and never held, except .json and documents of an
    entire file.

    Args:
        file: .jsonl (one row per line), .json (a list of rows, or one row), .txt or .md.
        document_unit: what one document is in .txt and .md: `line`, `paragraph` (blank lines between), `file`, or
            `auto`: line for .txt, file for .md.
        encoding: of a file that is not UTF-8; None finds it.
    """
    file = file if isinstance(file, TextFile) else open_text(file, encoding)
    kind = format_of(file.path)
    if kind == "json lines":
        for number, line in file.lines():
            yield _parse_json(Place(str(file.path), number), line)
    elif kind == "json":
        yield from _read_json(str(file.path), file.text())
    else:
        unit = document_unit if document_unit != "auto" else ("file" if file.path.suffix.lower() == ".md" else "line")
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


def column_values(dataset: "Dataset", name: str) -> Iterator[Any]:
    for batch in dataset.select_columns(name).iter(10_000):
        yield from batch[name]


class InputFile(NamedTuple):
    """Rows that are counted together, and a hash of their content."""

    name: str
    sha256: str
    rows: Iterable[SourceRow | Problem]


def open_files(paths: list[Path], document_unit: str, encoding: str | None = None) -> Iterator[InputFile]:
    """Files one after another; each is opened after the rows of the previous one have been read."""
    for path in paths:
        file = open_text(path, encoding)
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
