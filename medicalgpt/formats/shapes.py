"""What a published data set looks like: the shape of its rows, and how they become rows of common names.

The common names are `question`, `input`, `answer`, `reasoning`, `explanation`, `options`, `system`, `history`,
`messages`, `text`, `chosen` and `rejected`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from medicalgpt.formats.choices import answer_letters, parse_options
from medicalgpt.formats.turns import parse_transcript
from medicalgpt.readers.problems import RowError

Row = Mapping[str, Any]
SKIP = "Skip and count such rows: --skip_bad_rows True."


@dataclass(frozen=True)
class Preset:
    """The shape of one data set.

    Attributes:
        name: of `--preset`.
        source: where it is published.
        license: what its authors say, for a person to check.
        kinds: what it can be trained as: `text`, `chat`, `preference`, `task`.
        needs: fields that every row has and that are read.
        marks: fields that every row has, by which the set is known, and that are not read.
        columns: the field under each common name; fields that are not in `needs` may be missing.
        convert: instead of `columns`: takes a row and the kind, returns a row of common names.
        uses: further fields that are read, or that would mean something else in other sets.
        check: a closer look, where the fields alone could be those of another set.
        by_shape: whether rows are recognised; False if many sets have the same shape.
        elsewhere: what to do instead where the rows cannot be used, by kind of training.
    """

    name: str
    source: str
    license: str
    kinds: tuple[str, ...]
    needs: tuple[str, ...]
    columns: dict[str, str] = field(default_factory=dict)
    convert: Callable[[Row, str], dict[str, Any]] | None = None
    uses: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()
    check: Callable[[Row], bool] | None = None
    by_shape: bool = True
    elsewhere: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def fields(self) -> frozenset[str]:
        """All fields of a row that the preset reads."""
        return frozenset((*self.needs, *self.columns.values(), *self.uses))

    def rename(self, row: Row, kind: str) -> dict[str, Any]:
        """The row under common names.

        Raises:
            RowError: the row has not the shape of the set, or what it says cannot be trained.
        """
        if missing := [name for name in self.needs if name not in row]:
            raise RowError(
                f"no field `{missing[0]}`, which rows of {self.name} have",
                "Choose another --preset, or omit it: shapes are recognised.",
                row,
            )
        if self.convert:
            try:
                return self.convert(row, kind)
            except (AttributeError, IndexError, KeyError, StopIteration, TypeError, ValueError) as error:
                # RowError is a ValueError as well.
                if isinstance(error, RowError):
                    raise
                raise RowError(f"rows of {self.name} do not look like this ({error!r})", SKIP, row) from error
        return {name: row[column] for name, column in self.columns.items() if column in row}


def choice_row(row: Row, options: Any, answer: Any, *, explanation: Any = None, first: int = 0) -> dict[str, Any]:
    """Question, options and the letters of the correct ones.

    Raises:
        RowError: the answer is none of the options.
    """
    found = parse_options(options)
    letters = answer_letters(answer, found, first=first)
    if letters is None:
        raise RowError(f"the answer {answer!r} is none of the options", SKIP, found)
    question = row.get("question", row.get("Question"))
    return {"question": question, "options": found, "answer": letters, "explanation": explanation}


def is_transcript(name: str) -> Callable[[Row], bool]:
    """A check of a preset: whether a field holds a transcript "Human: ... Assistant: ..."."""
    return lambda row: parse_transcript(row[name]) is not None


def are_texts(value: Any) -> bool:
    """Whether a value is a list of two or more texts."""
    return isinstance(value, list) and len(value) > 1 and all(isinstance(text, str) for text in value)
