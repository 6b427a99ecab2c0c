"""Rows of tables: CSV, TSV, Parquet, Arrow and Excel, row by row, whatever their size."""

import ast
import csv
import json
import math
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import date, datetime, time
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any

from medicalgpt.errors import UserError
from medicalgpt.files import hash_file
from medicalgpt.readers.problems import Place, Problem, SourceRow, shorten
from medicalgpt.readers.text_files import TextFile

DELIMITERS = (",", "\t", ";", "|")
# Rows by which the delimiter is found.
PEEKED_ROWS = 20
BATCH_ROWS = 1_000
# A cell of these columns that holds a list or an object of JSON, or as Python prints it, is that list.
NESTED_COLUMNS = frozenset(
    "messages conversations conversation history turns tools functions options option choices prompt completion chosen "
    "rejected meta metadata reward_model images reference_answers".split()
)
# A cell may hold a whole document.
csv.field_size_limit(1 << 30)


@dataclass(frozen=True)
class TableFile:
    """A Parquet, Arrow or Excel file with its hash.

    Attributes:
        kind: `parquet`, `arrow` or `excel`.
    """

    path: Path
    sha256: str
    kind: str

    def rows(self) -> Iterator[SourceRow | Problem]:
        """The rows in order; their places have the number of the row, in Excel the one that Excel shows."""
        reader = {"parquet": _read_parquet, "arrow": _read_arrow, "excel": _read_excel}[self.kind]
        try:
            yield from reader(self.path)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            # pyarrow's own errors are subclasses of these.
            raise UserError(
                f"{self.path} is damaged, or not a file of its suffix ({type(error).__name__}: "
                f"{shorten(str(error), 120)}). Write or download it again."
            ) from error


def open_table(path: str | Path, kind: str) -> TableFile:
    """Hash a table."""
    return TableFile(Path(path), hash_file(path), kind)


def read_csv(file: TextFile) -> Iterator[SourceRow | Problem]:
    """The rows of a CSV or TSV file as objects; the delimiter is found, empty cells are absent.

    Raises:
        UserError: no header, or one with a name twice.
    """
    delimiter = _delimiter(file)
    with file.open(newline="") as lines:
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        line = 1
        try:
            for cells in reader:
                first, line = line, reader.line_num + 1
                if not any(cell.strip() for cell in cells):
                    continue
                if header is None:
                    header = _header(str(file.path), cells)
                    continue
                yield _cells_to_row(Place(str(file.path), first), header, cells)
        except csv.Error as error:
            yield Problem(
                Place(str(file.path), line),
                f"broken CSV: {error}",
                'Quote the cell, and double the quotes in it ("he said ""no"""); rows after this place were not read.',
                kind="unreadable",
            )


def _delimiter(file: TextFile) -> str:
    """The delimiter that gives most columns, equally many in each row."""
    usual = "\t" if ".tsv" in file.path.name.lower() else ","
    found = []
    for delimiter in (usual, *(other for other in DELIMITERS if other != usual)):
        with file.open(newline="") as lines:
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            with suppress(csv.Error):
                rows = [row for row in islice(reader, PEEKED_ROWS) if row]
                if rows and len(rows[0]) > 1:
                    same = sum(len(row) == len(rows[0]) for row in rows) / len(rows)
                    found.append((same == 1, same * len(rows[0]), delimiter))
    # Of equal ones the usual one, which is the first.
    return max(found, key=lambda entry: entry[:2])[2] if found else usual


def _header(path: str, cells: list[str]) -> list[str]:
    # pandas writes its index under an empty name, and reads it as this one.
    names = [cell.strip().removeprefix("\ufeff") or f"Unnamed: {number}" for number, cell in enumerate(cells)]
    while names and names[-1] == f"Unnamed: {len(names) - 1}" and len(names) > 1:
        names.pop()
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{path}:1: the header has {', '.join(twice)} twice. Give each column a name of its own.")
    return names


def _cells_to_row(place: Place, header: list[str], cells: list[str]) -> SourceRow | Problem:
    while len(cells) > len(header) and not cells[-1].strip():
        cells = cells[:-1]
    if len(cells) > len(header):
        remedy = "Quote cells that contain the delimiter, or remove the last ones."
        if len(header) == 1:
            remedy = "The header is the first row that is not empty: remove what is above the names of the columns."
        reason = f"the row has {len(cells)} cells, the header {len(header)}"
        return Problem(place, reason, remedy, shorten(cells[-1]))
    row = {name: _nested(name, cell) for name, cell in zip(header, cells, strict=False) if cell.strip()}
    return SourceRow(place, row)


def _nested(name: str, cell: str) -> Any:
    """The list or object that a cell holds, in a column of lists; otherwise its text."""
    if name.lower() not in NESTED_COLUMNS or cell.lstrip()[:1] not in ("[", "{"):
        return cell
    for parse in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            value = parse(cell.strip())
            if isinstance(value, list | dict):
                return value
    return cell


def _read_parquet(path: Path) -> Iterator[SourceRow]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        yield from _rows_of_batches(str(path), file.iter_batches(batch_size=BATCH_ROWS))


def _read_arrow(path: Path) -> Iterator[SourceRow]:
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        # Feather files and those of other tools begin with this mark; datasets writes streams.
        if source.read(6) == b"ARROW1":
            source.seek(0)
            file = pa.ipc.open_file(source)
            batches = (file.get_batch(number) for number in range(file.num_record_batches))
        else:
            source.seek(0)
            batches = pa.ipc.open_stream(source)
        parts = (batch.slice(start, BATCH_ROWS) for batch in batches for start in range(0, len(batch), BATCH_ROWS))
        yield from _rows_of_batches(str(path), parts)


def _rows_of_batches(name: str, batches: Iterator[Any]) -> Iterator[SourceRow]:
    number = 0
    for batch in batches:
        for value in batch.to_pylist():
            number += 1
            yield SourceRow(Place(name, 0, number), present_values(value))


def present_values(row: dict[str, Any]) -> dict[str, Any]:
    """The fields of a row of a table that it has, as values that JSON can hold: a table fills the others with null."""
    plain = {key: _plain(value) for key, value in row.items()}
    return {key: value for key, value in plain.items() if value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, str | int | bool) or value is None:
        return value
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return f"<{len(value)} bytes>"
    return str(value)


def _read_excel(path: Path) -> Iterator[SourceRow | Problem]:
    from openpyxl import load_workbook

    # Formulas as the values that Excel computed and stored.
    book = load_workbook(path, read_only=True, data_only=True)
    try:
        filled = [sheet for sheet in book.worksheets if any(any(_cell(c) for c in row) for row in _cells(sheet))]
        if len(filled) > 1:
            names = [sheet.title + " (hidden)" * (sheet.sheet_state != "visible") for sheet in filled]
            raise UserError(
                f"{path} has {len(filled)} sheets with rows ({', '.join(names)}). Save the one to read as a separate "
                ".csv or .xlsx file."
            )
        header: list[str] | None = None
        for number, row in enumerate(_cells(filled[0]) if filled else (), start=1):
            cells = [_cell(value) for value in row]
            if not any(cells):
                continue
            if header is None:
                header = _header(str(path), cells)
            else:
                yield _cells_to_row(Place(str(path), 0, number), header, cells)
    finally:
        book.close()


def _cells(sheet: Any) -> Iterator[tuple[Any, ...]]:
    # The size that a file states may be that of one cell.
    sheet.reset_dimensions()
    return sheet.iter_rows(values_only=True)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return value.isoformat() if isinstance(value, datetime | date | time) else str(value).strip("\r\n")
