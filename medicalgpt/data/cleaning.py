"""A cleaned copy of data files: what can be fixed without a guess is fixed, the rest is left out, and all is listed."""

import json
import re
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medicalgpt.data.duplicates import content_key
from medicalgpt.data.images import check_images
from medicalgpt.errors import UserError
from medicalgpt.files import open_new
from medicalgpt.formats.image_rows import move_image_paths
from medicalgpt.readers.problems import NEVER_SKIPPED, Place, Problem, RowError, SourceRow
from medicalgpt.readers.sources import read_rows
from medicalgpt.readers.text_files import open_text

# Fields in which white space and nulls may mean something.
UNTOUCHED = frozenset({"id", "tools", "functions"})
# Control characters except tab and line feed, and the byte order mark.
CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff]")
INDENTED_LATER = re.compile(r"\n[ \t]+\S")
TEXT_SUFFIXES = (".txt", ".md")


@dataclass(frozen=True)
class Change:
    """What was changed in a row.

    Attributes:
        kind: what it is counted under.
        where: the field, such as `messages[1].content`; empty where the row as a whole is meant.
    """

    kind: str
    where: str
    before: Any
    after: Any = None


def clean_row(value: Any, answered: bool) -> tuple[Any, list[Change]]:
    """The row without needless white space, null fields and empty turns, and what was changed.

    Args:
        value: a row as it is in a file.
        answered: whether its conversation ends with an answer; turns after the last one are then removed.
    """
    changes: list[Change] = []
    if isinstance(value, str):
        return _clean_text(value, "", changes), changes
    if not isinstance(value, dict):
        return value, changes
    cleaned = {}
    for name, item in value.items():
        if item is None:
            changes.append(Change("null field", name, None))
        elif name in UNTOUCHED:
            cleaned[name] = item
        elif isinstance(item, str):
            cleaned[name] = _clean_text(item, name, changes)
        elif _are_turns(item):
            cleaned[name] = _clean_turns(item, name, answered, changes)
        else:
            cleaned[name] = item
    return cleaned, changes


def _clean_text(text: str, where: str, changes: list[Change]) -> str:
    cleaned = CONTROLS.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    # The first line of indented text keeps its indentation.
    cleaned = cleaned.strip("\n").rstrip() if INDENTED_LATER.search(cleaned.rstrip()) else cleaned.strip()
    if cleaned != text:
        changes.append(Change("white space", where, text, cleaned))
    return cleaned


def _are_turns(item: Any) -> bool:
    return (
        isinstance(item, list)
        and bool(item)
        and all(isinstance(turn, dict) and {"from", "role"} & set(turn) for turn in item)
    )


def _clean_turns(turns: list[dict], where: str, answered: bool, changes: list[Change]) -> list[dict]:
    cleaned = []
    for number, turn in enumerate(turns):
        place = f"{where}[{number}]"
        kept = {}
        for name, item in turn.items():
            if item is None:
                changes.append(Change("null field", f"{place}.{name}", None))
            elif name in ("value", "content", "reasoning_content") and isinstance(item, str):
                kept[name] = _clean_text(item, f"{place}.{name}", changes)
            else:
                kept[name] = item
        cleaned.append(kept)
    end = _usable_end(cleaned, answered)
    if 0 < end < len(cleaned):
        # What follows may refer to what is not there.
        empty = any(map(_is_empty, cleaned[end:]))
        changes.append(Change("empty turn" if empty else "turns without answer", where, cleaned[end:]))
        cleaned = cleaned[:end]
    return cleaned


def _usable_end(turns: Sequence[dict], answered: bool) -> int:
    """How many turns to keep: all before the exchange with the first empty turn, and none after the last answer.

    An empty system turn is not one of them: it asks for no system prompt where the template has its own.
    """
    empty = (n for n, turn in enumerate(turns) if _is_empty(turn) and _role(turn) not in ("system", "developer"))
    end = next(empty, len(turns))
    if end == len(turns) and not answered:
        return end
    while end and not _is_answer(turns[end - 1]):
        end -= 1
    return end


def _role(turn: dict) -> str:
    return str(turn.get("from", turn.get("role"))).lower()


def _is_empty(turn: dict) -> bool:
    # Text in parts, and names of the field that are not known here, are left to the converter.
    text = turn.get("value", turn.get("content", "" if {"value", "content"}.isdisjoint(turn) else None))
    calls = turn.get("tool_calls") or turn.get("function_call")
    return isinstance(text, str) and not text.strip() and not calls and not turn.get("reasoning_content")


def _is_answer(turn: dict) -> bool:
    asks = ("human", "user", "prompter", "system", "developer", "observation", "tool", "function")
    calls = ("function_call", "tool_call")
    role = _role(turn)
    return not (turn.get("tool_calls") or turn.get("function_call") or role in calls or role.startswith(asks))


@dataclass
class CleanedCopy:
    """What `clean_files` wrote.

    Attributes:
        rows, kept: numbers of rows read and written.
        changes: number of changes of each kind.
        left_out: number of rows of each reason.
    """

    rows: int = 0
    kept: int = 0
    changes: Counter = field(default_factory=Counter)
    left_out: Counter = field(default_factory=Counter)


@dataclass(frozen=True)
class FileToClean:
    """A file, where its cleaned copy goes, how its rows are checked, and whether they end with an answer.

    Attributes:
        encoding: of a file that is not UTF-8; None finds it.
        images: the field with the paths of images, if it has another name.
    """

    path: Path
    copy: Path
    convert: Callable[[Any], dict[str, Any]]
    answered: bool
    encoding: str | None = None
    images: str = ""


def copy_name(path: Path) -> str:
    """The name of the cleaned copy of a file: rows become JSON Lines, text stays text."""
    return path.name if path.suffix.lower() in TEXT_SUFFIXES else f"{path.name.removesuffix('.jsonl')}.jsonl"


def clean_files(files: Sequence[FileToClean], folder: Path, list_file: Path) -> CleanedCopy:
    """Write a cleaned copy of each file below a new folder, in UTF-8, and a list of all changes; or nothing.

    Rows that cannot be used, and rows that occurred before, are left out; the list holds them as they were.

    Args:
        files: of rows that occur in several, the one in the first of these files is kept.
        folder: where all copies are; it must not exist.
        list_file: one JSON object per change or row left out.

    Raises:
        UserError: the folder or the list exist, or a file cannot be read to its end.
    """
    if folder.exists():
        raise UserError(f"{folder} exists. Choose another folder: --fixed_dir.")
    total, seen = CleanedCopy(), {}
    partial = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with open_new(list_file) as list_path, list_path.open("w", encoding="utf-8") as entries:
            for file in files:
                copy = partial / file.copy.relative_to(folder)
                copy.parent.mkdir(parents=True, exist_ok=True)
                with copy.open("w", encoding="utf-8", newline="\n") as lines:
                    for entry, line in _clean_file(file, total, seen):
                        entries.writelines(json.dumps(each, ensure_ascii=False) + "\n" for each in entry)
                        lines.write(line)
                if not copy.stat().st_size:
                    copy.unlink()
            if not total.kept:
                raise UserError(f"no row could be used, of {total.rows}: nothing was written.")
            partial.rename(folder)
    except FileExistsError as error:
        raise UserError(f"{list_file} exists. Choose another folder: --fixed_dir.") from error
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written: {error.strerror or error}. Choose another: --fixed_dir."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return total


def _clean_file(
    file: FileToClean, total: CleanedCopy, seen: dict[bytes, Place]
) -> Iterator[tuple[list[dict[str, Any]], str]]:
    """Entries of the list and the line of the copy, row by row; the line is empty where a row is left out."""
    written = 0
    for change in _changes_of_file(file):
        total.changes[change.kind] += 1
        yield [_entry(f"{file.path}:1", f"{file.copy}:1", change)], ""
    for row in _rows(file):
        total.rows += 1
        value, changes, reason = row, [], ""
        if isinstance(row, Problem):
            reason, kept = row.reason, row.value
        else:
            kept = row.value
            value, changes = clean_row(row.value, file.answered)
            try:
                converted = file.convert(value)
                if "images" in converted:
                    paths = converted["images"]
                    converted["images"] = check_images(paths, row.place)
                    moved = move_image_paths(value, paths, file.path.parent, file.copy.parent, file.images)
                    changes += [] if moved == value else [Change("paths of images", "", value, moved)]
                    value = moved
                before = seen.setdefault(content_key(converted), row.place)
                reason = "" if before is row.place else f"duplicate of {before}"
            except RowError as error:
                if error.kind in NEVER_SKIPPED:
                    raise UserError(f"{error.at(row.place)}\nNothing was written.") from error
                reason = error.reason
        if reason:
            total.left_out["duplicate" if reason.startswith("duplicate of ") else "unusable"] += 1
            yield [_entry(str(row.place), None, Change(reason, "", kept))], ""
            continue
        written += 1
        total.kept += 1
        total.changes.update(change.kind for change in changes)
        line = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        yield [_entry(str(row.place), f"{file.copy}:{written}", change) for change in changes], f"{line}\n"


def _rows(file: FileToClean) -> Iterator[SourceRow | Problem]:
    for row in read_rows(file.path, encoding=file.encoding):
        if isinstance(row, Problem) and row.kind == "unreadable":
            raise UserError(f"{row}\nNothing was written: what follows in the file cannot be read.")
        yield row


def _changes_of_file(file: FileToClean) -> Iterator[Change]:
    encoding = open_text(file.path, file.encoding).encoding
    if encoding != "utf-8-sig":
        yield Change("encoding", "", encoding, "utf-8")
    with file.path.open("rb") as opened:
        if opened.read(3) == b"\xef\xbb\xbf":
            yield Change("encoding", "", "utf-8 with a byte order mark", "utf-8")


def _entry(place: str, copy: str | None, change: Change) -> dict[str, Any]:
    """One line of the list; `new` is null for a row that was left out, and `change` is then the reason."""
    return {
        "place": place,
        "new": copy,
        "change": change.kind,
        "field": change.where,
        "before": change.before,
        "after": change.after,
    }
