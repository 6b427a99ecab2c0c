"""A row with its place, and why a row cannot be used."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from medicalgpt.errors import UserError

SHOWN_PROBLEMS = 20
# Kinds of problems that no flag allows to skip: what is left without these rows is not what the file says.
NEVER_SKIPPED = frozenset({"unreadable", "misread"})


class Place(NamedTuple):
    """Where a row is: the identity of a row, which messages show as `file:line`.

    Attributes:
        file: the path as given, or dataset and split on the hub.
        line: counted from 1; 0 in tables that have no lines.
        item: its number in the list of a .json file, where a line may hold many rows, and in tables; 0 elsewhere.
    """

    file: str
    line: int
    item: int = 0

    def __str__(self) -> str:
        if not self.line:
            return f"{self.file}:row {self.item}"
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
        kind: what it is counted under if the row is skipped. `unreadable` hides rows that cannot be counted, `misread`
            shows that the rows of its file mean something else than what is read; neither is ever skipped.
        side: `train` or `validation` where it never became a row, empty where one of `LoadedData` is meant.
        tokens: of the entire row, where only these are too many.
    """

    place: Place
    reason: str
    remedy: str
    value: str = ""
    kind: str = "unusable"
    side: str = ""
    tokens: int = 0

    def __str__(self) -> str:
        shown = f" [{self.value}]" if self.value else ""
        return f"{self.place}: {self.reason}{shown}. {self.remedy}"


class RowError(ValueError):
    """A row that cannot be converted.

    Args:
        reason: what is wrong, without a full stop.
        remedy: what to do, a sentence.
        value: the offending value.
        kind: as in `Problem`.
    """

    def __init__(self, reason: str, remedy: str, value: Any = "", kind: str = "unusable"):
        super().__init__(reason)
        self.reason, self.remedy, self.value, self.kind = reason, remedy, shorten(value), kind

    def at(self, place: Place, side: str = "") -> Problem:
        """The problem of the row at `place`."""
        return Problem(place, self.reason, self.remedy, self.value, self.kind, side)


def format_problems(problems: Sequence[Problem]) -> str:
    """The first problems, one indented line each, and the number of the others; those of all rows come first."""
    ordered = sorted(problems, key=lambda problem: problem.kind != "misread")
    lines = list(map(str, ordered[:SHOWN_PROBLEMS]))
    if len(problems) > SHOWN_PROBLEMS:
        lines.append(f"… and {len(problems) - SHOWN_PROBLEMS} more")
    return "\n".join(f"  {line}" for line in lines)


def advise(problems: Sequence[Problem]) -> str:
    """What to do about rows with problems that no flag has allowed to skip."""
    flags = {"unusable": "--skip_bad_rows True", "too long": "--long_rows turns"}
    kinds = {problem.kind for problem in problems}
    if "misread" in kinds:
        return "Read the rows as is said above: the others are read wrongly as well."
    if not kinds.intersection(flags):
        return "Fix the rows."
    if kinds == {"too long"}:
        return "Shorten the rows, or skip and count what does not fit: --long_rows turns."
    return f"Fix the rows, or skip and count them: {' '.join(flags[kind] for kind in flags if kind in kinds)}."


class DataError(UserError):
    """All problems of the data at once."""

    def __init__(self, problems: list[Problem], lengths: str = ""):
        """`lengths`: lines that say how long rows are and what makes room for those that are too long."""
        self.problems = problems
        lines = [f"{len(problems)} problem(s) in the data:", format_problems(problems)]
        lines += [lengths] if lengths else []
        super().__init__("\n".join([*lines, f"Nothing was trained. {advise(problems)}"]))


def shorten(value: Any, limit: int = 60) -> str:
    """One line of at most `limit` characters that shows `value`."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
