"""Rows of JSON: one per line, in a list, or in an object, as a list or under their ids, whatever the suffix says."""

import json
import re
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

from medicalgpt.errors import UserError
from medicalgpt.readers.problems import Place, Problem, SourceRow, shorten
from medicalgpt.readers.text_files import TextFile

# Keys of an object that holds only a list of rows.
ROW_LISTS = ("data", "rows", "train", "examples", "instances")
# A value over several lines is recognised by the first of them, at most.
HEAD_LINES = 2_000


def read_json(
    file: TextFile, lines_expected: bool, start: int = 0, stop: int | None = None
) -> Iterator[SourceRow | Problem]:
    """The rows of a .jsonl or .json file.

    Args:
        lines_expected: the suffix is that of JSON Lines: a single line is a row, not a file of one value.
        start, stop: numbers of the first row and of the one after the last, from 0; other lines are not parsed.
    """
    lines = json_lines(file, lines_expected)
    if lines is None:
        yield from islice(_read_values(str(file.path), file.text()), start, stop)
        return
    for number, line in islice(lines, start, stop):
        yield parse_line(Place(str(file.path), number), line)


def json_lines(file: TextFile, lines_expected: bool) -> Iterator[tuple[int, str]] | None:
    """Numbers and texts of the lines, if each is a row; None if the file has its rows in another way."""
    lines = file.lines()
    head = list(islice(lines, 2))
    if not head:
        return iter(())
    first = _parsed(head[0][1])
    several, is_list = len(head) > 1, first is not None and isinstance(first[0], list)
    in_lines = first is not None and (lines_expected and (several or not is_list) or several and not is_list)
    if first is None and not head[0][1].lstrip().startswith("["):
        # A broken line among others, or a value over several lines.
        head += list(islice(lines, HEAD_LINES))
        in_lines = lines_expected or any(_parsed(line) is not None for _, line in head[1:] if line.lstrip()[:1] == "{")
        in_lines = in_lines and not _begins_with_value([line for _, line in head])
    return chain(head, lines) if in_lines else None


def looks_like_json_lines(file: TextFile) -> bool:
    """Whether each of the first lines of a text is an object of JSON."""
    head = [_parsed(line) for _, line in islice(file.lines(), 3)]
    return bool(head) and all(value is not None and isinstance(value[0], dict) and value[0] for value in head)


def parse_line(place: Place, line: str) -> SourceRow | Problem:
    """The row in one line."""
    try:
        return _whole_characters(SourceRow(place, _decode(line)[0]), line)
    except json.JSONDecodeError as error:
        column = error.colno
        snippet = line[max(0, column - 20) : column + 20]
        return Problem(place, f"broken JSON at column {column}: {error.msg}", "Fix the line.", snippet)


def _decode(text: str, position: int = 0, whole: bool = True) -> tuple[Any, int]:
    """The value at `position` and the position after it; with `whole`, the value that is the text.

    Raises:
        json.JSONDecodeError: also for what Python's decoder gives up on with other errors.
    """
    try:
        return (json.loads(text), len(text)) if whole else json.JSONDecoder().raw_decode(text, position)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        reason = "lists or objects nested too deeply"
    except ValueError:
        reason = "a number with too many digits"
    raise json.JSONDecodeError(reason, text, position)


def _parsed(line: str) -> tuple[Any] | None:
    try:
        return (_decode(line)[0],)
    except json.JSONDecodeError:
        return None


def _begins_with_value(lines: list[str]) -> bool:
    """Whether the lines begin with a value of several lines."""
    text = "\n".join(lines).lstrip()
    try:
        _, end = _decode(text, whole=False)
    except json.JSONDecodeError:
        return False
    return "\n" in text[:end]


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


def _read_values(path: str, text: str) -> Iterator[SourceRow | Problem]:
    position = _skip_space(text, 0)
    try:
        if text[position : position + 1] == "[":
            end = yield from _read_list(path, text, position)
            if _skip_space(text, end) != len(text):
                raise json.JSONDecodeError("more text after the list", text, _skip_space(text, end))
            return
        value, end = _decode(text, position, whole=False)
        if _skip_space(text, end) == len(text):
            yield from _read_object(path, text, position, value)
            return
        # Values over several lines, one after another.
        line, counted, item = 1, 0, 0
        while position < len(text):
            value, end = _decode(text, position, whole=False)
            if not isinstance(value, dict):
                raise json.JSONDecodeError("a row must be an object", text, position)
            line, counted, item = line + text.count("\n", counted, position), position, item + 1
            yield _whole_characters(SourceRow(Place(path, line, item), value), text[position:end])
            position = _skip_space(text, end)
    except json.JSONDecodeError as error:
        yield Problem(
            Place(path, error.lineno),
            f"broken JSON at column {error.colno}: {error.msg}",
            "Fix the file; rows after this place were not read.",
            shorten(text[max(0, error.pos - 20) : error.pos + 20]),
            kind="unreadable",
        )


def _read_list(path: str, text: str, position: int) -> Iterator[SourceRow | Problem]:
    """The rows of the list at `position`; returns the position after it."""
    line, counted, item = 1, 0, 0
    position = _skip_space(text, position + 1)
    while text[position : position + 1] != "]":
        value, end = _decode(text, position, whole=False)
        line, counted, item = line + text.count("\n", counted, position), position, item + 1
        yield _whole_characters(SourceRow(Place(path, line, item), value), text[position:end])
        position = _skip_space(text, end)
        if text[position : position + 1] == ",":
            position = _skip_space(text, position + 1)
            if text[position : position + 1] == "]":
                raise json.JSONDecodeError("expected another row after ','", text, position)
        elif text[position : position + 1] != "]":
            raise json.JSONDecodeError("expected ',' or ']'", text, position)
    return position + 1


def _read_object(path: str, text: str, position: int, value: Any) -> Iterator[SourceRow | Problem]:
    """The only value of a file: a row, or an object that holds the rows."""
    name = _list_of_rows(path, value)
    if name is None and _are_rows_by_id(value):
        yield from _read_members(path, text, position)
        return
    if name is None:
        place = Place(path, text.count("\n", 0, position) + 1)
        yield _whole_characters(SourceRow(place, value), text)
        return
    for match in re.finditer(rf'"{name}"\s*:\s*(?=\[)', text):
        # The same name may occur within another value.
        if json.JSONDecoder().raw_decode(text, match.end())[0] == value[name]:
            yield from _read_list(path, text, match.end())
            return


def _are_rows_by_id(value: Any) -> bool:
    """Whether an object has a row under each key: the keys are ids, and the rows share a field that no turn has."""
    if not isinstance(value, dict) or len(value) < 2 or not all(any(map(str.isdigit, key)) for key in value):
        return False
    rows = list(value.values())
    return all(isinstance(row, dict) for row in rows) and bool(set.intersection(*map(set, rows)) - {"role", "from"})


def _read_members(path: str, text: str, position: int) -> Iterator[SourceRow | Problem]:
    """The values of the object at `position`, each a row."""
    line, counted, item = 1, 0, 0
    position = _skip_space(text, position + 1)
    while text[position] != "}":
        _, end = _decode(text, position, whole=False)
        position = _skip_space(text, _skip_space(text, end) + 1)
        value, end = _decode(text, position, whole=False)
        line, counted, item = line + text.count("\n", counted, position), position, item + 1
        yield _whole_characters(SourceRow(Place(path, line, item), value), text[position:end])
        position = _skip_space(text, end)
        if text[position] == ",":
            position = _skip_space(text, position + 1)


def _list_of_rows(path: str, value: Any) -> str | None:
    """The key under which an object has its rows; None if it is itself a row.

    Raises:
        UserError: the object has rows in a shape without one row per example.
    """
    if not isinstance(value, dict):
        return None
    lists = {key: item for key, item in value.items() if isinstance(item, list | dict) and item}
    names = [key for key in lists if key in (*ROW_LISTS, "validation", "valid", "dev", "test")]
    if len(names) > 1:
        raise UserError(
            f"{path} has several lists of rows ({', '.join(names)}). Write each into a file of its own, named "
            f"{names[0]}.jsonl, {names[1]}.jsonl and so on."
        )
    if not names and len(value) > 1 and all(isinstance(item, dict) and "0" in item for item in value.values()):
        raise UserError(
            f"{path} has a column under each key ({', '.join(list(value)[:4])}), as pandas writes by default. Write "
            'rows: frame.to_json("rows.jsonl", orient="records", lines=True, force_ascii=False).'
        )
    if not names and len(value) > 1 and _are_columns(list(value.values())):
        raise UserError(
            f"{path} has a list under each key ({', '.join(list(value)[:4])}), the values of all rows. Write rows: "
            'pandas.DataFrame(lists).to_json("rows.jsonl", orient="records", lines=True, force_ascii=False).'
        )
    if not names or names[0] not in ROW_LISTS or len(lists) > 1:
        return None
    rows = lists[names[0]]
    if isinstance(rows, list) and all(isinstance(row, dict) and "paragraphs" in row for row in rows):
        raise UserError(
            f"{path} has articles with paragraphs and questions (SQuAD), not rows. Write one row per question: "
            '{"question": ..., "answer": ...}, with the paragraph in the question.'
        )
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(
            f"{path}: `{names[0]}` is not a list of objects. Write the rows as objects, one per line, into a "
            ".jsonl file."
        )
    return names[0]


def _are_columns(values: list[Any]) -> bool:
    """Whether values are lists of the same number of texts or numbers, two or more."""
    return all(isinstance(each, list) and len(each) == len(values[0]) > 1 for each in values) and not any(
        isinstance(item, dict | list) for each in values for item in each
    )


def _skip_space(text: str, position: int) -> int:
    return re.compile(r"\s*").match(text, position).end()
