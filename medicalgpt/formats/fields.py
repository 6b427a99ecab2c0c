"""Fields of a row: which are read, which are only counted, and which carry a meaning that must not be lost."""

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from medicalgpt.formats.choices import OPTION_FIELDS
from medicalgpt.formats.turns import MEDIA_FIELDS, MEDIA_REMEDY, to_text_value
from medicalgpt.readers.problems import RowError

TURN_LISTS = ("conversations", "messages", "conversation")
QUESTION_FIELDS = ("instruction", "prompt", "query", "question", "problem", "问题", "提问")
CONTEXT_FIELDS = ("input", "context", "contexts", "passage")
ANSWER_FIELDS = ("output", "response", "completion", "answer", "target", "solution", "回答", "答案")
PREFERENCE_FIELDS = (("chosen", "rejected"), ("response_chosen", "response_rejected"))
# Further names of the two answers of a pair.
PAIR_ANSWER = re.compile(r"(chosen|rejected)[-_]?(answer|response|output|completion|text|\d+)")
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
    "images": "paths of images",
    "chosen": "the better answer",
    "rejected": "the worse answer",
    "text": "a document",
}
LABEL_FIELDS = ("label", "kto_tag")
WEIGHT_FIELDS = ("weight", "sample_weight", "loss_weight")
# Fields whose values are judged by themselves.
SETTLED = frozenset({*MEDIA_FIELDS, *LABEL_FIELDS, *WEIGHT_FIELDS})
# Names that count whatever their capitals.
ANY_CASE = SETTLED.union(CONVERSATION_FIELDS, *PREFERENCE_FIELDS)
# Fields that hold lists, whatever else one letter more or less would mean.
LISTS = frozenset({*TURN_LISTS, *TOOL_FIELDS, "history"})
_EMPTY = (None, "", [], {})


class Fields:
    """The fields of one row; what has been taken is used.

    Args:
        row: without fields that are null.

    Attributes:
        given: the names of all fields.
        names: the field that was taken under each common name.
    """

    def __init__(self, row: Mapping[str, Any]):
        self._row = dict(row)
        self.given = frozenset(row)
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

    def replace(self, name: str, value: Any) -> None:
        """Put another value in the place of one that was not taken."""
        self._row[name] = value

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
    return not value or value.isspace() if isinstance(value, str) else value in _EMPTY


def refuse_meaningful(fields: Fields, texts: list[str]) -> None:
    """Raises RowError if an unused field of a conversation says something that would be lost or trained wrongly.

    Args:
        texts: all texts of the conversation, the answer last: a field that repeats one of them says nothing new.
    """
    rest = fields.rest()
    if not rest:
        return
    if meaningful := _meaningful(tuple(rest)):
        refuse_media(rest)
        for name in LABEL_FIELDS:
            _refuse_label(name, rest.get(name))
        for name in WEIGHT_FIELDS:
            _refuse_weight(name, rest.get(name))
        _refuse_parts(fields, rest, texts, [name for name in meaningful if name not in SETTLED])
    refuse_misspelled(fields, CONVERSATION_FIELDS)


def _refuse_weight(name: str, value: Any) -> None:
    if value not in (None, 1):
        raise RowError(
            f"`{name}` is {value!r}, and every row counts the same",
            "Remove the field, or mix files by weight: --train_file_dir a.jsonl:0.7,b.jsonl:0.3.",
            value,
        )


def _refuse_parts(fields: Fields, rest: Mapping[str, Any], texts: list[str], names: Iterable[str]) -> None:
    """Raises RowError if one of the fields would be part of the conversation, and does not repeat a part of it."""
    asked = fields.names.get("question")
    for name in names:
        value, text = rest[name], to_text_value(rest[name])
        is_answer = name in ANSWER_FIELDS or PAIR_ANSWER.fullmatch(name)
        if isinstance(text, str) and any(text.strip() in other for other in (texts[-1:] if is_answer else texts)):
            continue
        if is_answer:
            replaces = asked and not name.startswith("rejected")
            instead = f" To train on it instead: --columns {_columns(fields, answer=name)}." if replaces else ""
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
        raise RowError(
            f"`{name}` may belong to the conversation in {_quoted(asked or 'the turns')}, which does not hold it",
            f"Write it into the conversation; or train without it: --ignore_fields {name}.",
            value,
        )


@lru_cache(maxsize=1_000)
def _meaningful(names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the names that say something about a conversation. Rows of a file have few sets of fields."""
    known = {
        *(*ANSWER_FIELDS, *QUESTION_FIELDS, *CONTEXT_FIELDS, *TURN_LISTS, *OPTION_FIELDS),
        *SETTLED,
    }
    return tuple(name for name in names if name in known or PAIR_ANSWER.fullmatch(str(name)))


def refuse_media(rest: Mapping[str, Any]) -> None:
    """Raises RowError if a row has images, videos or audio."""
    if media := next((name for name in MEDIA_FIELDS if rest.get(name) not in _EMPTY), None):
        raise RowError(f"`{media}`, and only text is trained on here", MEDIA_REMEDY, rest[media])


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
    for name, meant in _misspelled(tuple(rest), fields.given, tuple(known)):
        value = rest[name]
        if not isinstance(value, list if meant in LISTS else str) and not isinstance(to_text_value(value), str):
            # It cannot be what is meant.
            continue
        raise RowError(
            f"`{name}` is not read; `{meant}` would be",
            f"Rename it if that is what it is, or train without it: --ignore_fields {name}.",
            rest[name],
        )


@lru_cache(maxsize=1_000)
def _misspelled(rest: tuple[str, ...], given: frozenset[str], known: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """The unused names that may be misspellings, each with the name that is probably meant."""
    absent = [name for name in known if name not in given]
    pairs = ((name, meant) for name in rest if name not in known for meant in absent)
    return tuple(pair for pair in pairs if is_misspelling(*pair))


def is_misspelling(name: str, meant: str) -> bool:
    """Whether the names differ by one letter: another one, one too many, one missing, or two swapped."""
    if (
        name == meant
        or {name, meant} == {"content", "context"}
        or min(len(name), len(meant)) < 4
        or abs(len(name) - len(meant)) > 1
    ):
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
