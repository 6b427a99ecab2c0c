"""Recognise the format of a row and convert it to one common form, or refuse it with a reason and a remedy."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import zip_longest
from typing import Any

from medicalgpt.formats.choices import answer_letters, answer_text, options_of, prompt_with_options
from medicalgpt.formats.fields import (
    ANSWER_FIELDS,
    CONVERSATION_FIELDS,
    PREFERENCE_FIELDS,
    QUESTION_FIELDS,
    SYSTEM_FIELDS,
    TURN_LISTS,
    Fields,
    is_blank,
    is_misspelling,
    parse_columns,
    refuse_meaningful,
    refuse_media,
    refuse_misspelled,
)
from medicalgpt.formats.presets import PRESETS, Preset, recognise
from medicalgpt.formats.turns import (
    ASSISTANT_ROLES,
    CALL_ROLES,
    MEDIA_FIELDS,
    REASONING_FIELDS,
    check_order,
    parse_inner_json,
    parse_transcript,
    text_message,
    to_message,
    to_messages_list,
    to_text_value,
    to_tools,
    unused_turn_fields,
)
from medicalgpt.readers.problems import RowError

# Which program trains on rows of a kind.
PROGRAMS = {
    "text": "pretraining.py",
    "chat": "supervised_finetuning.py",
    "preference": "dpo_training.py, orpo_training.py or reward_modeling.py",
    "task": "grpo_training.py",
}


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


def to_prompt(value: Any, ignore: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The prompt of a model: `{"messages": [...], "tools": ... , "reference": str | None}`.

    Takes the formats of `to_messages`, where a final assistant turn becomes the reference answer, and rows that hold
    only a question: a line of text, or `prompt`, `query`, `question`, `instruction` (with `input`).

    Raises:
        RowError: as `to_messages`.
    """
    return Converter(to_prompt, ignore).convert(value).row


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


PROMPT_FIELDS = (*TURN_LISTS, *QUESTION_FIELDS)
# Fields of any conversation besides those with its turns.
LEADING_FIELDS = ("tools", *SYSTEM_FIELDS, "history")
# A question and its answer under these names belong together; otherwise the first of each is taken.
PAIR_FIELDS = (
    ("instruction", "output"),
    ("prompt", "response"),
    ("prompt", "completion"),
    ("query", "response"),
    ("question", "answer"),
    ("problem", "solution"),
)
CHOICE_ANSWERS = ("answer_idx", "answer_letter", "answerKey", "correct_option", "answer", *ANSWER_FIELDS)


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
        self.to, self.ignore, self.columns, self.preset = to, ignore, dict(columns or {}), preset
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
        _refuse_harmful_ignores(row, self.ignore)
        row = {name: item for name, item in row.items() if name not in self.ignore}
        if self.columns:
            return self._converted(*self._mapped(row), None)
        preset = self.preset or (recognise(row) if self.kind != "text" else None)
        if preset is None:
            return self._converted(row, set(), None)
        if self.read is None and preset is not self.preset:
            # The function recognises rows by itself.
            return self._converted(row, set(), preset.name)
        # Every set has questions, which is all that a prompt needs.
        if self.kind not in preset.kinds and self.kind not in ("prompt", "task"):
            raise RowError(f"rows of {preset.name} are not for this stage", _other_stage(row, preset.kinds), row)
        return self._converted(under_common_names(row, preset, self.kind), set(), preset.name)

    def _mapped(self, row: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
        if missing := [field for field in self.columns.values() if field not in row]:
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
        for name in TURN_LISTS:
            unused |= unused_turn_fields(row.get(name))
        return Conversion(converted, tuple(sorted({*unused, *fields.rest()})), preset)


def under_common_names(row: Mapping[str, Any], preset: Preset, kind: str) -> dict[str, Any]:
    """The row with the fields that the preset reads under their common names, and its other fields.

    Raises:
        RowError: the row has not the shape of the set.
    """
    renamed = preset.rename(row, kind if kind in preset.kinds else preset.kinds[0])
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


def _other_stage(row: Mapping[str, Any], kinds: Iterable[str]) -> str:
    remedy = "They are for " + "; ".join(PROGRAMS[kind] for kind in kinds) + "."
    if any(set(pair) <= set(row) for pair in PREFERENCE_FIELDS):
        remedy += f" To train on the better answer only: --columns {_chosen_columns(row)}."
    return remedy


def _chosen_columns(row: Mapping[str, Any]) -> str:
    """`--columns` with which the better answer of a preference is a conversation."""
    for chosen, _ in PREFERENCE_FIELDS:
        if chosen in row:
            turns = row[chosen]
            if (isinstance(turns, list) and len(turns) > 1) or parse_transcript(turns):
                return f"messages={chosen}"
            asked = next((name for name in PROMPT_FIELDS if name in row), None)
            if asked:
                return f"question={asked},answer={chosen}"
    return "question=FIELD,answer=FIELD"


def _refuse_harmful_ignores(row: Mapping[str, Any], ignore: frozenset[str]) -> None:
    """Raises RowError where ignoring a field would train a bad example, or a mark in place of an image."""
    for name in ignore & {"label", "kto_tag"}:
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
                f"Preference rows have {both}; rows with one answer are for supervised_finetuning.py.",
                fields.rest(),
            )
    given = {column: fields.take(column) for column in columns}
    answers = [_to_answer(given[column], column) for column in columns]
    for pair in PREFERENCE_FIELDS:
        if other := next((name for name in pair if name in fields.rest()), None):
            raise RowError(
                f"`{other}` next to {both}", f"Remove it, or pass --ignore_fields {other}.", fields.get(other)
            )
    for name, value in fields.rest().items():
        if name in ANSWER_FIELDS and value not in given.values() and value != answers[0][-1].get("content"):
            raise RowError(
                f"`{name}` is a third answer next to {both}",
                f"Remove it, or pass --ignore_fields {name}.",
                value,
            )
    if not fields.given.intersection(PROMPT_FIELDS) and "input" not in fields:
        turns = _common_beginning(given, columns, answers)
        conversation = _with_leading_turns(fields, to_messages_list(turns, columns[0]))
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


def read_conversation(fields: Fields, answer_needed: bool = True, with_answer: bool = True) -> dict[str, Any]:
    """The messages and the tools of a row, whose order is not checked.

    Args:
        answer_needed: refuse a question without an answer.
        with_answer: False leaves the fields of an answer alone.

    Raises:
        RowError: no format is recognised, or a part of it cannot be read.
    """
    for pair in PREFERENCE_FIELDS:
        if all(name in fields for name in pair):
            raise RowError(
                f"two answers, `{pair[0]}` and `{pair[1]}`",
                _other_stage(fields.rest(), ("preference",)),
                fields.rest(),
            )
    column = fields.first(TURN_LISTS)
    if column:
        return _read_turns(fields, column)
    question, answer = _question_and_answer(fields)
    answer = answer if with_answer else None
    if question is None or (answer is None and answer_needed and with_answer and not _has_choices(fields)):
        raise _no_format(fields, question)
    return _read_pair(fields, question, answer)


def _read_turns(fields: Fields, column: str) -> dict[str, Any]:
    turns = fields.take(column)
    if isinstance(turns, str):
        turns = parse_transcript(turns) or (
            parse_inner_json(turns, f"`{column}`") if turns.lstrip().startswith("[") else turns
        )
    tools = _take_tools(fields)
    return _with_leading_turns(fields, to_messages_list(turns, column, tools), tools)


def _question_and_answer(fields: Fields) -> tuple[str | None, str | None]:
    """The names of the fields with the question and with its answer."""
    for question, answer in PAIR_FIELDS:
        if not is_blank(fields.get(question)) and answer in fields:
            return question, answer
    question = fields.first(QUESTION_FIELDS)
    # Some sets have an empty instruction, and the question in `input`.
    if (question is None or is_blank(fields.get(question))) and not is_blank(fields.get("input")):
        question = "input"
    return question, fields.first(ANSWER_FIELDS)


def _has_choices(fields: Fields) -> bool:
    return options_of(fields.rest()) is not None and fields.first(CHOICE_ANSWERS) is not None


def _read_pair(fields: Fields, question: str, answer: str | None) -> dict[str, Any]:
    asked = fields.take(question, "question")
    asked = parse_transcript(asked) or asked
    if question == "input":
        fields.take("instruction")
    tools = _take_tools(fields)
    reasoning = next((name for name in REASONING_FIELDS if name in fields), None)
    thoughts = fields.take(reasoning, "reasoning") if reasoning else None
    if _is_turns(asked):
        messages = to_messages_list(asked, question, tools)
    else:
        messages = [text_message("user", asked, question)]
        if question == "instruction" or "input" in fields:
            _append_context(fields, messages[0])
    choice = options_of(fields.rest())
    if choice:
        reply = _take_choice(fields, choice, messages)
    else:
        reply = fields.take(answer, "answer") if answer else None
    if isinstance(reply, dict) and {"role", "from"} & set(reply):
        reply = [reply]
    if _is_turns(reply):
        messages += [to_message(turn, number, tools) for number, turn in enumerate(reply, start=len(messages) + 1)]
    elif reply is not None:
        messages.append(text_message("assistant", reply, answer or "answer"))
    if thoughts and messages[-1]["role"] == "assistant":
        messages[-1]["reasoning_content"] = text_message("assistant", thoughts, reasoning)["content"]
    return _with_leading_turns(fields, messages, tools)


def _append_context(fields: Fields, message: dict[str, Any]) -> None:
    context = to_text_value(fields.take("input", "input"))
    if is_blank(context):
        return
    if not isinstance(context, str):
        raise RowError("`input` is not text", "Write it as one string.", context)
    message["content"] += f"\n{context}"


def _take_choice(
    fields: Fields, choice: tuple[dict[str, str], tuple[str, ...]], messages: list[dict[str, Any]]
) -> str | None:
    """Put the options into the question; return the correct ones as a reply, or None if the row does not name them."""
    options, names = choice
    for name in names:
        fields.take(name, "options" if len(names) == 1 else None)
    if messages[-1]["role"] == "user":
        messages[-1]["content"] = prompt_with_options(messages[-1]["content"], options)
    given = {name: fields.get(name) for name in CHOICE_ANSWERS if not is_blank(fields.get(name))}
    if not given:
        return None
    found = {name: answer_letters(value, options) for name, value in given.items()}
    letters = {value for value in found.values() if value}
    if len(letters) != 1:
        what = "different options" if letters else "none of the options"
        raise RowError(
            f"`{'` and `'.join(given)}` name {what}",
            "Write the letter of the correct option; or skip and count such rows: --skip_bad_rows True.",
            given,
        )
    for name, value in found.items():
        if value:
            fields.take(name, "answer")
    explanation = to_text_value(fields.take("explanation", "explanation"))
    reply = answer_text(letters.pop(), options)
    return f"{reply}\n{explanation}" if isinstance(explanation, str) and explanation.strip() else reply


def _is_turns(value: Any) -> bool:
    return isinstance(value, list) and not isinstance(to_text_value(value), str)


def _take_tools(fields: Fields) -> list[dict[str, Any]] | None:
    tools, functions = to_tools(fields.take("tools", "tools")), to_tools(fields.take("functions"))
    if tools and functions and tools != functions:
        raise RowError("both `tools` and `functions`", "Keep one of them.", functions)
    return tools or functions


def _with_leading_turns(
    fields: Fields, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """The conversation after the turns of `system` and `history`."""
    tools = tools or _take_tools(fields)
    columns = [column for column in SYSTEM_FIELDS if not is_blank(fields.get(column))]
    if len(columns) > 1:
        raise RowError(f"both `{columns[0]}` and `{columns[1]}`", "Keep one of them.", fields.get(columns[1]))
    leading = [text_message("system", fields.take(column, "system"), column) for column in columns]
    for column in SYSTEM_FIELDS:
        fields.take(column)
    if leading and messages and messages[0]["role"] == "system":
        if messages[0]["content"] != leading[0]["content"]:
            raise RowError(f"a system turn next to `{columns[0]}`", "Keep one of them.", messages[0]["content"])
        messages = messages[1:]
    return {"messages": [*leading, *_read_history(fields), *messages], "tools": tools}


def _read_history(fields: Fields) -> list[dict[str, Any]]:
    history = fields.take("history", "history") or []
    if isinstance(history, str) and history.lstrip().startswith("["):
        history = parse_inner_json(history, "`history`")
    if isinstance(history, str) and not history.strip():
        return []
    if not isinstance(history, list):
        raise RowError("`history` is not a list", "Write [[question, answer], ...].", history)
    messages = []
    for pair in history:
        if isinstance(pair, dict):
            messages += to_messages_list([pair], "history")
            continue
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError("`history` has something other than pairs", "Write [[question, answer], ...].", pair)
        messages += [text_message("user", pair[0], "history"), text_message("assistant", pair[1], "history")]
    return messages


def _no_format(fields: Fields, question: str | None) -> RowError:
    rest = fields.rest()
    needed = ANSWER_FIELDS if question else CONVERSATION_FIELDS
    for name in rest:
        if meant := next((other for other in needed if is_misspelling(str(name), other)), None):
            return RowError(f"no field `{meant}`, but `{name}`", f"Rename it to `{meant}`.", rest)
    names = ", ".join(map(str, fields.given)) or "none"
    if question:
        return RowError(
            f"`{question}` without an answer (fields: {', '.join(map(str, rest)) or 'none'})",
            f"Give the row its answer as `output` or `response`, or name its field: --columns "
            f"question={question},answer=FIELD.",
            rest,
        )
    if "text" in rest:
        return RowError("a document, not a conversation", "Documents are for pretraining.py.", rest["text"])
    return RowError(
        f"no known chat format (fields: {', '.join(map(str, rest)) or names})",
        "Name its fields (--columns question=FIELD,answer=FIELD), or use `messages`, `conversations`, `instruction` "
        "and `output`, or `prompt` and `response`; data/README.md shows each.",
        rest,
    )


def without_mask(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages without `train`, which means nothing in a prompt."""
    return [{name: item for name, item in message.items() if name != "train"} for message in messages]


def _texts(messages: list[dict[str, Any]]) -> list[str]:
    return [message.get("content") or "" for message in messages]


def require_object(value: Any) -> None:
    """Raises RowError if the row is not an object."""
    if not isinstance(value, dict):
        raise RowError(f"the row is a {type(value).__name__}, not an object", "Each row is a JSON object {...}.", value)


READERS: dict[Callable, tuple[str, Callable[[Fields], dict[str, Any]]]] = {
    to_text: ("text", _read_text),
    to_messages: ("chat", _read_chat),
    to_prompt: ("prompt", _read_prompt),
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
