"""Where rows come from: files and their lines, and datasets on the hub.

Nothing is silently dropped or repaired: a row is read, or it is a `Problem` with file, line, value, reason and remedy.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from medicalgpt.errors import UserError
from medicalgpt.readers.folders import (
    NEVER_COMPRESSED,
    format_of,
    suffix_of,
)
from medicalgpt.readers.json_rows import json_lines, looks_like_json_lines, read_json
from medicalgpt.readers.problems import (
    Place,
    Problem,
    SourceRow,
)
from medicalgpt.readers.tables import TableFile, open_table, read_csv
from medicalgpt.readers.text_files import TextFile, open_text, propose_document_unit

from loguru import logger

if TYPE_CHECKING:
    from datasets import Dataset


def read_rows(
    file: str | Path | TextFile | TableFile,
    document_unit: str = "auto",
    encoding: str | None = None,
    start: int = 0,
    stop: int | None = None,
) -> Iterator[SourceRow | Problem]:
    """Read a file row by row; what cannot be read comes as a `Problem` in its place.

    Files larger than `text_files.MAX_HELD_BYTES` are read by line and never held, except lists in .json and documents
    of an entire file.

    Args:
        file: JSON Lines, .json (a list of rows, rows one after another, or one row), a table, .txt or .md.
        document_unit: what one document is in .txt and .md: `line`, `paragraph` (blank lines between), `file`, or
            `auto`: line for .txt, file for .md.
        encoding: of a file that is not UTF-8; None finds it.
        start, stop: numbers of the first row and of the one after the last, from 0; by default all rows.
    """
    if not isinstance(file, TextFile | TableFile):
        file = open_file(file, encoding)
    kind = format_of(file.path)
    if isinstance(file, TableFile):
        yield from islice(file.rows(), start, stop)
    elif kind in ("json lines", "json"):
        yield from read_json(file, kind == "json lines", start, stop)
    elif kind == "csv":
        yield from islice(read_csv(file), start, stop)
    else:
        if suffix_of(file.path) == ".txt" and looks_like_json_lines(file):
            raise UserError(
                f"{file.path} is named as text, and has rows of JSON, which would be trained on with their braces and "
                f"field names. Rename it: {file.path.name.partition('.')[0]}.jsonl."
            )
        yield from islice(_read_text(file, _unit_of(file, document_unit)), start, stop)


def count_rows(file: TextFile | TableFile, document_unit: str = "auto") -> int:
    """How many rows and problems `read_rows` gives; where each line is one, they are not parsed."""
    kind, lines = format_of(file.path), None
    if kind in ("json lines", "json"):
        lines = json_lines(file, kind == "json lines")
    elif kind == "text" and _unit_of(file, document_unit) == "line":
        lines = file.lines()
    return sum(1 for _ in (read_rows(file, document_unit) if lines is None else lines))


def _unit_of(file: TextFile, document_unit: str) -> str:
    if document_unit != "auto":
        return document_unit
    return "file" if suffix_of(file.path) == ".md" else "line"


def notice_wrapped_lines(file: TextFile | TableFile, document_unit: str) -> None:
    """Warn of a text whose lines would be documents, and are parts of sentences."""
    if document_unit == "auto" and isinstance(file, TextFile) and suffix_of(file.path) == ".txt":
        if unit := propose_document_unit(file):
            logger.warning(
                f"{file.path}: most lines end within a sentence, so they seem wrapped; each one is a document. "
                f"To take a {unit} as a document: --document_unit {unit}; if they are documents: --document_unit line."
            )


def open_file(path: str | Path, encoding: str | None = None) -> TextFile | TableFile:
    """Hash a file; of a text, find the encoding."""
    kind = format_of(Path(path))
    return open_table(path, kind) if kind in NEVER_COMPRESSED else open_text(path, encoding)


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
        file = open_file(path, encoding)
        notice_wrapped_lines(file, document_unit)
        yield InputFile(str(path), file.sha256, read_rows(file, document_unit))


def ignored_fields(names: str | None) -> frozenset[str]:
    """The fields in `--ignore_fields`, separated by commas: rows may have them, and they are not used."""
    return frozenset(filter(None, (name.strip() for name in (names or "").split(","))))
