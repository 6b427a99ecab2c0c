"""Fields of a row: which are read, which are only counted, and which carry a meaning that must not be lost."""

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from medicalgpt.formats.choices import OPTION_FIELDS
from medicalgpt.formats.turns import MEDIA_FIELDS, to_text_value
from medicalgpt.readers.problems import RowError

TURN_LISTS = ("conversations", "messages", "conversation")
QUESTION_FIELDS = ("instruction", "prompt", "query", "question", "problem")
CONTEXT_FIELDS = ("input", "context")
ANSWER_FIELDS = ("output", "response", "completion", "answer", "target", "solution")
PREFERENCE_FIELDS = (("chosen", "rejected"), ("response_chosen", "response_rejected"))
SYSTEM_FIELDS = ("system", "system_prompt", "system_message")
TOOL_FIELDS = ("tools", "functions")
CONVERSATION_FIELDS = (
    *(*TURN_LISTS, *QUESTION_FIELDS, *CONTEXT_FIELDS, *ANSWER_FIELDS, *SYSTEM_FIELDS, *TOOL_FIELDS),
    "history",
)
# The common names of --columns and of presets, and what each is.
COMMON_NAMES = {
    "question": "what the user asks",
    "input": "text that belongs to the question, below it",
    "options": "the options of a multiple-choice question",
    "answer": "the reply",
    "reasoning": "the thinking before the reply",
    "explanation": "text after the letter of the correct option",
    "system": "the system prompt",
    "history": "the turns before",
    "messages": "all turns",
    "tools": "the tools",
    "chosen": "the better answer",
    "rejected": "the worse answer",
    "text": "a document",
}
_EMPTY = (None, "", [], {})


class Fields:
    """The fields of one row; what has been taken is used.

    Args:
        row: fields that are null are as if they were not there.

    Attributes:
        given: the names of all fields.
        names: the field that was taken under each common name.
    """

    def __init__(self, row: Mapping[str, Any]):
        self._row = {name: value for name, value in row.items() if value is not None}
        self.given = frozenset(self._row)
        self.names: dict[str, str] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._row

    def get(self, name: str) -> Any:
        """The value, which counts as not used."""
        return self._row.get(name)

    def take(self, name: str, common: str | None = None) -> Any:
        """The value, which then counts as used, under the common name if one is given; None if there is none."""
        if common and name in self._row:
            self.names[common] = name
        return self._row.pop(name, None)

    def first(self, names: Iterable[str]) -> str | None:
        """The first of these names that has a value, then the first that is there at all."""
        names = list(names)
        filled = (name for name in names if not is_blank(self._row.get(name)))
        return next(filled, next((name for name in names if name in self._row), None))

    def rest(self) -> dict[str, Any]:
        """What was not used, apart from empty values."""
        return {name: value for name, value in self._row.items() if value not in _EMPTY}


def is_blank(value: Any) -> bool:
    """Whether a value is nothing, or white space."""
    return value in _EMPTY or (isinstance(value, str) and not value.strip())


def refuse_meaningful(fields: Fields, texts: list[str]) -> None:
    """Raises RowError if an unused field of a conversation says something that would be lost or trained wrongly.

    Args:
        texts: all texts of the conversation, the answer last: a field that repeats one of them says nothing new.
    """
    rest = fields.rest()
    refuse_media(rest)
    for name in ("label", "kto_tag"):
        _refuse_label(name, rest.get(name))
    if rest.get("weight", 1) not in (1, True):
        raise RowError(
            f"`weight` is {rest['weight']!r}, and every row counts the same",
            "Remove the field, or mix files by weight: --train_file_dir a.jsonl:0.7,b.jsonl:0.3.",
            rest["weight"],
        )
    asked = fields.names.get("question")
    for name, value in rest.items():
        text = to_text_value(value)
        if isinstance(text, str) and any(text.strip() in other for other in texts[-1:] if name in ANSWER_FIELDS):
            continue
        if isinstance(text, str) and any(text.strip() in other for other in texts if name not in ANSWER_FIELDS):
            continue
        if name in ANSWER_FIELDS:
            instead = f" To train on it instead: --columns {_columns(fields, answer=name)}." if asked else ""
            raise RowError(
                f"`{name}` is a second answer next to {_quoted(fields.names.get('answer', 'the conversation'))}",
                f"To train without it: --ignore_fields {name}.{instead}",
                value,
            )
        if name in CONTEXT_FIELDS and asked:
            raise RowError(
                f"`{name}` may belong to the question in `{asked}`",
                f"If it does: --columns {_columns(fields, input=name)}. If not: --ignore_fields {name}.",
                value,
            )
        if name in (*QUESTION_FIELDS, *CONTEXT_FIELDS, *TURN_LISTS, *OPTION_FIELDS):
            raise RowError(
                f"`{name}` may belong to the conversation in {_quoted(asked or 'the turns')}, which does not hold it",
                f"Write it into the conversation; or train without it: --ignore_fields {name}.",
                value,
            )
    refuse_misspelled(fields, CONVERSATION_FIELDS)


def refuse_media(rest: Mapping[str, Any]) -> None:
    """Raises RowError if a row has images, videos or audio."""
    if media := next((name for name in MEDIA_FIELDS if rest.get(name) not in _EMPTY), None):
        raise RowError(
            f"`{media}`, and only text is trained on",
            "Remove the row, or skip and count such rows: --skip_bad_rows True.",
            rest[media],
        )


def _refuse_label(name: str, value: Any) -> None:
    if value is None or value is True:
        return
    if value is False:
        raise RowError(
            f"`{name}` is false: the answer is a bad example, and would be trained as a good one",
            "Skip and count such rows: --skip_bad_rows True.",
            value,
        )
    if isinstance(value, str) and value.strip().lower() not in ("0", "1", "true", "false", "yes", "no", "good", "bad"):
        raise RowError(
            f"`{name}` may say that the answer is a bad example",
            f"If it only describes the row: --ignore_fields {name}.",
            value,
        )
    raise RowError(
        f"`{name}` may say that the answer is a bad example",
        "Write true for good answers and false for bad ones, which are not trained on; or remove the field.",
        value,
    )


def refuse_misspelled(fields: Fields, known: Iterable[str]) -> None:
    """Raises RowError if an unused field is one letter away from a name that would have been read."""
    rest = fields.rest()
    if found := _misspelled(tuple(rest), fields.given, tuple(known)):
        name, meant = found
        raise RowError(
            f"`{name}` is not read; `{meant}` would be",
            f"Rename it if that is what it is, or train without it: --ignore_fields {name}.",
            rest[name],
        )


@lru_cache(maxsize=1_000)
def _misspelled(rest: tuple[str, ...], given: frozenset[str], known: tuple[str, ...]) -> tuple[str, str] | None:
    """The first unused name that is a misspelling, and what it stands for. Rows of a file have few sets of fields."""
    absent = [name for name in known if name not in given]
    pairs = ((name, meant) for name in rest if name not in known for meant in absent)
    return next((pair for pair in pairs if is_misspelling(*pair)), None)


def is_misspelling(name: str, meant: str) -> bool:
    """Whether the names differ by one letter: another one, one too many, one missing, or two swapped."""
    if name == meant or min(len(name), len(meant)) < 4 or abs(len(name) - len(meant)) > 1:
        return False
    start = next((at for at, pair in enumerate(zip(name, meant, strict=False)) if pair[0] != pair[1]), None)
    if start is None:
        return True
    one, other = name[start:], meant[start:]
    swapped = one[:2] == other[1::-1] and one[2:] == other[2:] and len(one) > 1 < len(other)
    return swapped or one[1:] == other[1:] or one[1:] == other or one == other[1:]


def _quoted(name: str) -> str:
    return f"`{name}`" if " " not in name else name


def _columns(fields: Fields, **changed: str) -> str:
    return ",".join(f"{common}={name}" for common, name in {**fields.names, **changed}.items())


def parse_columns(text: str | None) -> dict[str, str]:
    """The field under each common name, from `question=Question,answer=Response`.

    Raises:
        ValueError: not of this form, a name that is not a common one, or one twice.
    """
    columns: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in (text or "").split(","))):
        common, separator, name = (piece.strip() for piece in part.partition("="))
        if not separator or not name:
            raise ValueError(
                f"--columns {text}: {part!r} is not NAME=FIELD. Example: question=Question,answer=Response."
            )
        if common not in COMMON_NAMES:
            raise ValueError(f"--columns {text}: {common!r} is not one of {', '.join(COMMON_NAMES)}.")
        if common in columns:
            raise ValueError(f"--columns {text}: {common} is given twice.")
        columns[common] = name
    if text and not columns:
        raise ValueError("--columns is empty. Example: question=Question,answer=Response.")
    return columns
