"""Recognise the format of a row and convert it to one common form, or refuse it with a reason and a remedy."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from itertools import zip_longest
from typing import Any

from medicalgpt.formats.conversations import (
    PROMPT_FIELDS,
    other_stage,
    read_conversation,
    read_leading_turns,
    without_mask,
)
from medicalgpt.formats.fields import (
    ANSWER_FIELDS,
    ANY_CASE,
    CONVERSATION_FIELDS,
    LABEL_FIELDS,
    PAIR_ANSWER,
    PREFERENCE_FIELDS,
    TURN_LISTS,
    Fields,
    parse_columns,
    refuse_meaningful,
    refuse_media,
    refuse_misspelled,
)
from medicalgpt.formats.image_rows import IMAGE_FIELDS, place_images, read_image_paths, take_image_parts
from medicalgpt.formats.presets import PRESETS, recognise
from medicalgpt.formats.shapes import Preset
from medicalgpt.formats.turns import (
    ASSISTANT_ROLES,
    CALL_ROLES,
    MEDIA_FIELDS,
    check_order,
    parse_turns,
    text_message,
    to_message,
    to_messages_list,
    to_text_value,
    unused_turn_fields,
)
from medicalgpt.readers.problems import RowError


def to_text(value: Any, ignore: frozenset[str] = frozenset()) -> dict[str, Any]:
    """A document for pretraining: `{"text": str}` from a line of text or `{"text": ...}`.

    Raises:
        RowError: no text, empty text, or images.
    """
    return Converter(to_text, ignore).convert(value).row


def to_messages(value: Any, ignore: frozenset[str] = frozenset()) -> dict[str, Any]:
    """A conversation that ends with the assistant: `{"messages": [...], "tools": [...] | None}`.

    The format is recognised row by row: lists of turns (`conversations`, `messages`, `conversation`), Alpaca, pairs of
    a question and an answer, with options where there are some, and the data sets of presets.py. Messages are in OpenAI
    form: `role`, `content`, `reasoning_content`, and `tool_calls` with arguments as objects; `train` is False in a turn
    of the assistant that is context only.

    Raises:
        RowError: the row is in no such format, has roles that are unknown, empty turns, or turns out of order, or a
            field that says something which would be lost.
    """
    return Converter(to_messages, ignore).convert(value).row


def to_messages_with_images(value: Any, ignore: frozenset[str] = frozenset()) -> dict[str, Any]:
    """As `to_messages`; with `images`, the paths of its images in their order, where the row has some.

    They are listed in `images` (or `image`), with `<image>` in the user's text where each belongs, or are parts of the
    content. The content of such a turn becomes a list of parts: `{"type": "text", "text": ...}`, `{"type": "image"}`.

    Raises:
        RowError: as `to_messages`; or images and marks that do not match, in other turns, or not in files.
    """
    return Converter(to_messages_with_images, ignore).convert(value).row


def to_prompt(value: Any, ignore: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The prompt of a model: `{"messages": [...], "tools": ... , "reference": str | None}`.

    Takes the formats of `to_messages`, where a final assistant turn becomes the reference answer, and rows that hold
    only a question: a line of text, or `prompt`, `query`, `question`, `instruction` (with `input`).

    Raises:
        RowError: as `to_messages`.
    """
    return Converter(to_prompt, ignore).convert(value).row


def to_prompt_with_images(value: Any, ignore: frozenset[str] = frozenset()) -> dict[str, Any]:
    """As `to_prompt`, with images as in `to_messages_with_images`.

    Raises:
        RowError: as `to_messages_with_images`.
    """
    return Converter(to_prompt_with_images, ignore).convert(value).row


def to_preference(value: Any, ignore: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Two answers to one prompt: `{"messages": [...], "tools": [...] | None, "chosen": {...}, "rejected": {...}}`.

    `messages` is the prompt, which ends with the user or the result of a tool; `chosen` and `rejected` are one message
    of the assistant each. The prompt comes in the formats of `to_prompt`, the answers as `chosen` and `rejected` (or
    `response_chosen` and `response_rejected`): a text, a turn, or a list of one turn. Without a prompt the two are
    whole conversations, lists of turns that differ in the last one only.

    Raises:
        RowError: as `to_messages`; or an answer that is missing, empty, several turns or not the assistant's, equal
            answers (white space apart), a prompt that is missing or ends with the assistant.
    """
    return Converter(to_preference, ignore).convert(value).row


@dataclass(frozen=True)
class Conversion:
    """A converted row, the fields of the original that were not used, and the preset that it was recognised as."""

    row: dict[str, Any]
    unused: tuple[str, ...] = ()
    preset: str | None = None


class Converter:
    """Turns rows into the form of one kind of training.

    Args:
        to: `to_text`, `to_messages`, `to_prompt`, `to_preference`, or any function of a row and the fields to ignore,
            which gets each row under its common names if `columns` or `preset` say so.
        ignore: fields that are as if they were not there.
        columns: the field under each common name; no other field is then read.
        preset: the shape of all rows. Default: recognised row by row.
    """

    def __init__(
        self,
        to: Callable[..., dict[str, Any]],
        ignore: frozenset[str] = frozenset(),
        columns: Mapping[str, str] | None = None,
        preset: Preset | None = None,
    ):
        self.to, self.columns, self.preset = to, dict(columns or {}), preset
        self.ignore = ignore.union(name.lower() for name in ignore if name.lower() in ANY_CASE)
        self.kind, self.read = READERS.get(to, ("task", None))
        # Fields that --columns names and that no row has had.
        self.unseen = set(self.columns.values())

    def __call__(self, value: Any) -> dict[str, Any]:
        return self.convert(value).row

    def convert(self, value: Any) -> Conversion:
        """Raises RowError if the row cannot be used."""
        if isinstance(value, str) and self.kind in ("text", "prompt", "task"):
            value = {"text" if self.kind == "text" else "prompt": value}
        require_object(value)
        # Tables write nothing as null, or as NaN, which alone differs from itself.
        row = {name: item for name, item in value.items() if item is not None and item == item}
        if self.ignore:
            row = _without_ignored(row, self.ignore)
        if self.columns:
            return self._converted(*self._mapped(row), None)
        preset = self.preset or (recognise(row) if self.kind != "text" else None)
        if preset is None:
            return self._converted(in_lower_case(row) if self.read else row, set(), None)
        if self.read is None and preset is not self.preset:
            # The function recognises rows by itself.
            return self._converted(row, set(), preset.name)
        # Every set has questions, which is all that a prompt needs.
        if self.kind not in preset.kinds and self.kind not in ("prompt", "task"):
            remedy = preset.elsewhere.get(self.kind) or other_stage(row, preset.kinds)
            raise RowError(f"rows of {preset.name} are not for this stage", remedy, row)
        return self._converted(under_common_names(row, preset, self.kind), set(), preset.name)

    def _mapped(self, row: dict[str, Any]) -> tuple[dict[str, Any], set[str]]:
        if missing := [field for field in self.columns.values() if field not in row]:
            row = in_lower_case(row, frozenset(missing))
        if missing := [field for field in missing if field not in row]:
            needed = {"question", "answer", "messages", "text", "chosen", "rejected"}
            if needed & {common for common, field in self.columns.items() if field in missing} or len(missing) == len(
                self.columns
            ):
                raise RowError(
                    f"no field `{missing[0]}`, which --columns names (fields: {', '.join(map(str, row)) or 'none'})",
                    "Correct --columns, or give the row this field.",
                    row,
                )
        self.unseen.difference_update(row)
        mapped = {common: row[field] for common, field in self.columns.items() if field in row}
        return mapped, set(row) - set(self.columns.values())

    def _converted(self, row: dict[str, Any], unused: set[str], preset: str | None) -> Conversion:
        if self.read is None:
            return Conversion(self.to(row, frozenset()), tuple(sorted(unused)), preset)
        fields = Fields(row)
        converted = self.read(fields)
        unused.update(fields.rest())
        for name in TURN_LISTS:
            if name in row:
                unused |= unused_turn_fields(row[name])
        return Conversion(converted, tuple(sorted(unused)), preset)


def under_common_names(row: Mapping[str, Any], preset: Preset, kind: str) -> dict[str, Any]:
    """The row with the fields that the preset reads under their common names, and its other fields.

    Raises:
        RowError: the row has not the shape of the set.
    """
    renamed = preset.rename(row, kind if kind in (*preset.kinds, "task") else preset.kinds[0])
    rest = {name: item for name, item in row.items() if name not in preset.fields}
    return {**rest, **{name: item for name, item in renamed.items() if item is not None}}


def converter(
    to: Callable[..., dict[str, Any]],
    ignore: frozenset[str] = frozenset(),
    columns: str | None = None,
    preset: str | None = None,
) -> Converter:
    """The converter that flags ask for.

    Args:
        columns: of `--columns`.
        preset: of `--preset`.

    Raises:
        ValueError: they cannot be understood, or contradict each other.
    """
    if columns and preset:
        raise ValueError("--columns and --preset both say which field is what. Give one of them.")
    if preset and preset not in PRESETS:
        nearest = get_close_matches(preset, PRESETS, 1)
        hint = f"Did you mean {nearest[0]}? All: " if nearest else "It is one of "
        raise ValueError(f"--preset {preset} is unknown. {hint}{', '.join(PRESETS)}.")
    return Converter(to, ignore, parse_columns(columns), PRESETS[preset] if preset else None)


@lru_cache(maxsize=1_000)
def _lower_case(names: frozenset[str], wanted: frozenset[str]) -> dict[str, str]:
    """The wanted name of each field that differs from it in capitals only, where no field has the wanted name."""
    lower = {name: name.lower() for name in names if isinstance(name, str) and not name.islower()}
    return {name: low for name, low in lower.items() if low in wanted and low not in names}


def in_lower_case(row: dict[str, Any], wanted: frozenset[str] = ANY_CASE) -> dict[str, Any]:
    """`Question` and `QUESTION` as `question`. Rows of a file have few sets of fields."""
    low = _lower_case(frozenset(row), wanted)
    return {low.get(name, name): item for name, item in row.items()} if low else row


def _without_ignored(row: dict[str, Any], ignore: frozenset[str]) -> dict[str, Any]:
    """The row without the fields to ignore.

    Raises:
        RowError: without a field, a bad example would be trained, or a mark in place of an image.
    """
    row = in_lower_case(row, ignore & ANY_CASE)
    _refuse_harmful_ignores(row, ignore)
    return {name: item for name, item in row.items() if name not in ignore}


def _refuse_harmful_ignores(row: Mapping[str, Any], ignore: frozenset[str]) -> None:
    for name in ignore.intersection(LABEL_FIELDS):
        if row.get(name) is False:
            raise RowError(
                f"`{name}` is false: without it, a bad example is trained as a good one",
                f"Skip and count such rows: --skip_bad_rows True, without --ignore_fields {name}.",
                row,
            )
    for name in sorted(ignore & set(MEDIA_FIELDS)):
        if row.get(name) and any(mark in json.dumps(row, default=str) for mark in ("<image>", "<video>", "<audio>")):
            raise RowError(
                f"without `{name}`, its mark would be trained as text",
                f"Skip and count such rows: --skip_bad_rows True, without --ignore_fields {name}.",
                row,
            )


def _read_text(fields: Fields) -> dict[str, Any]:
    if "text" not in fields:
        others = [name for name, value in fields.rest().items() if isinstance(value, str) and value.strip()]
        remedy = 'Pretraining rows are {"text": "..."}; chat rows are for supervised_finetuning.py.'
        if len(others) == 1 and others[0] not in CONVERSATION_FIELDS:
            remedy = f"If `{others[0]}` is the document: --columns text={others[0]}."
        raise RowError("no field `text`", remedy, fields.rest())
    text = fields.take("text")
    if not isinstance(text, str) or not text.strip():
        raise RowError("`text` is empty or not a string", "Remove the row or give it a text.", text)
    refuse_media(fields.rest())
    return {"text": text}


def _read_chat(fields: Fields) -> dict[str, Any]:
    conversation = read_conversation(fields)
    check_order(conversation["messages"], must_end_with="assistant")
    refuse_meaningful(fields, _texts(conversation["messages"]))
    if conversation["messages"][0]["role"] == "assistant":
        # Nothing was asked yet: it is what the first question follows.
        conversation["messages"][0]["train"] = False
    if not any(message.get("train", True) for message in conversation["messages"] if message["role"] == "assistant"):
        raise RowError("no turn of the row is trained on", "Remove the row.", conversation["messages"])
    return conversation


def _read_prompt(fields: Fields) -> dict[str, Any]:
    conversation = read_conversation(fields, answer_needed=False)
    messages, reference = without_mask(conversation["messages"]), None
    refuse_meaningful(fields, _texts(messages))
    if messages and messages[-1]["role"] == "assistant":
        reference = messages[-1]["content"]
        messages = messages[:-1]
    check_order(messages, must_end_with="user")
    return {"messages": messages, "tools": conversation["tools"], "reference": reference}


def _read_preference(fields: Fields) -> dict[str, Any]:
    columns = next((pair for pair in PREFERENCE_FIELDS if set(pair) & fields.given), PREFERENCE_FIELDS[0])
    both = f"`{columns[0]}` and `{columns[1]}`"
    for column in columns:
        if column not in fields:
            raise RowError(
                f"no field `{column}`",
                f"Preference rows have {both}, or name them: --columns question=FIELD,chosen=FIELD,rejected=FIELD. "
                "Rows with one answer are for supervised_finetuning.py.",
                fields.rest(),
            )
    given = {column: parse_turns(fields.take(column)) for column in columns}
    answers = [_to_answer(given[column], column) for column in columns]
    for pair in PREFERENCE_FIELDS:
        if other := next((name for name in pair if name in fields.rest()), None):
            raise RowError(
                f"`{other}` next to {both}", f"Remove it, or pass --ignore_fields {other}.", fields.get(other)
            )
    for name, value in fields.rest().items():
        is_answer = name in ANSWER_FIELDS or PAIR_ANSWER.fullmatch(str(name))
        if is_answer and value not in given.values() and value != answers[0][-1].get("content"):
            raise RowError(
                f"`{name}` is a third answer next to {both}",
                f"Remove it, or pass --ignore_fields {name}.",
                value,
            )
    if not fields.given.intersection(PROMPT_FIELDS) and "input" not in fields:
        turns = _common_beginning(given, columns, answers)
        conversation = read_leading_turns(fields, to_messages_list(turns, columns[0]))
        answers = [turns[-1:] for turns in answers]
    else:
        conversation = read_conversation(fields, with_answer=False)
    conversation["messages"] = without_mask(conversation["messages"])
    if conversation["messages"] and conversation["messages"][-1]["role"] == "assistant":
        raise RowError(
            "the prompt ends with a turn of the assistant",
            f"Remove that turn: the answers are {both}.",
            conversation["messages"][-1],
        )
    check_order(conversation["messages"], must_end_with="user")
    for column, turns in zip(columns, answers, strict=True):
        _check_answer(column, turns, given[column], fields)
    chosen, rejected = (without_mask(turns)[0] for turns in answers)
    if canonical_json(chosen) == canonical_json(rejected):
        raise RowError(f"{both} are the same answer", "Remove the row: it has no preference.", given[columns[0]])
    refuse_meaningful(fields, [*_texts(conversation["messages"]), *_texts([chosen, rejected])])
    refuse_misspelled(fields, columns)
    return {**conversation, "chosen": chosen, "rejected": rejected}


def _check_answer(column: str, turns: list[dict[str, Any]], given: Any, fields: Fields) -> None:
    if len(turns) != 1:
        raise RowError(
            f"`{column}` has {len(turns)} turns next to a prompt, expected one",
            "Keep only the answer in it; or, if both are whole conversations, pass --ignore_fields "
            f"{','.join(sorted(fields.given.intersection(PROMPT_FIELDS)))}.",
            given,
        )
    if turns[0]["role"] != "assistant":
        raise RowError(
            f"`{column}` is a turn of the {turns[0]['role']}, not an answer",
            f"Answers have one of the roles {', '.join(ASSISTANT_ROLES + CALL_ROLES)}.",
            given,
        )


def _to_answer(value: Any, column: str) -> list[dict[str, Any]]:
    """The turns of one answer; more than one only where it holds its prompt as well."""
    if isinstance(value, dict) or (isinstance(value, list) and not isinstance(to_text_value(value), str)):
        turns = value if isinstance(value, list) else [value]
        try:
            return [to_message(turn, number) for number, turn in enumerate(turns, start=1)]
        except RowError as error:
            raise RowError(f"`{column}`: {error.reason}", error.remedy, error.value) from error
    return [text_message("assistant", value, column)]


def _common_beginning(value: dict, columns: tuple[str, str], answers: list[list[dict]]) -> list[Any]:
    """The prompt of two conversations that differ in their last turn, as it is in the row."""
    both = f"`{columns[0]}` and `{columns[1]}`"
    if min(len(turns) for turns in answers) < 2:
        raise RowError(
            f"{both} without a prompt",
            "Add the question as `prompt` (text or a list of turns), and keep only the answers in the two.",
            value,
        )
    for number, (one, other) in enumerate(zip_longest(*(turns[:-1] for turns in answers)), start=1):
        if one != other:
            raise RowError(
                f"{both} differ in turn {number}, which is not the last of both",
                "Whole conversations must share all turns but the last, which is the answer.",
                one or other,
            )
    return value[columns[0]][:-1]


def _texts(messages: list[dict[str, Any]]) -> list[str]:
    return [message.get("content") or "" for message in messages]


def require_object(value: Any) -> None:
    """Raises RowError if the row is not an object."""
    if not isinstance(value, dict):
        raise RowError(f"the row is a {type(value).__name__}, not an object", "Each row is a JSON object {...}.", value)


def _with_images(
    read: Callable[[Fields], dict[str, Any]],
) -> Callable[[Fields], dict[str, Any]]:
    """A reader that takes the images of a row too."""

    def read_with_images(fields: Fields) -> dict[str, Any]:
        changed, inline = take_image_parts(fields.rest())
        for name, value in changed.items():
            fields.replace(name, value)
        paths = read_image_paths({name: fields.take(name) for name in IMAGE_FIELDS}, inline)
        converted = read(fields)
        # Trained as text, a mark whose image was lost would teach the model to do without.
        converted["messages"] = place_images(converted["messages"], paths, mark_is_text=read is _read_prompt)
        return {**converted, "images": paths} if paths else converted

    return read_with_images


READERS: dict[Callable, tuple[str, Callable[[Fields], dict[str, Any]]]] = {
    to_text: ("text", _read_text),
    to_messages: ("chat", _read_chat),
    to_messages_with_images: ("chat", _with_images(_read_chat)),
    to_prompt: ("prompt", _read_prompt),
    to_prompt_with_images: ("prompt", _with_images(_read_prompt)),
    to_preference: ("preference", _read_preference),
}


def canonical_json(value: Any) -> str:
    """JSON that is the same for values that differ only in white space or in the order of fields."""
    return json.dumps(_without_layout(value), ensure_ascii=False, sort_keys=True)


def _without_layout(value: Any) -> Any:
    """The value with white space in all its strings normalized."""
    if isinstance(value, str):
        return " ".join(value.split())
    if isinstance(value, list):
        return [_without_layout(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_layout(item) for key, item in value.items()}
    return value
