"""Read the conversation of a row: lists of turns, or a question and its answer under any of their names."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any

from medicalgpt.formats.choices import (
    OPTION_FIELDS,
    OPTION_GOLD_FIELDS,
    SINGLE_OPTION_FIELDS,
    answer_letters,
    answer_text,
    first_number,
    options_of,
    prompt_with_options,
)
from medicalgpt.formats.fields import (
    ANSWER_FIELDS,
    CONVERSATION_FIELDS,
    LABEL_FIELDS,
    PREFERENCE_FIELDS,
    QUESTION_FIELDS,
    SYSTEM_FIELDS,
    TOOL_FIELDS,
    TURN_LISTS,
    Fields,
    is_blank,
    is_misspelling,
)
from medicalgpt.formats.turns import (
    REASONING_FIELDS,
    are_turns,
    parse_inner_json,
    parse_transcript,
    parse_turns,
    text_message,
    to_message,
    to_messages_list,
    to_text_value,
    to_tools,
)
from medicalgpt.readers.problems import RowError

# Which program trains on rows of a kind.
PROGRAMS = {
    "text": "pretraining.py",
    "chat": "supervised_finetuning.py",
    "preference": "dpo_training.py, orpo_training.py or reward_modeling.py",
    "task": "grpo_training.py",
}

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
CHOICE_ANSWERS = (*OPTION_GOLD_FIELDS, "answer", "correct_answer", *ANSWER_FIELDS)


@dataclass(frozen=True)
class Layout:
    """What the names of a row's fields say by themselves: which of them are there at all.

    Attributes:
        turn_lists, questions, answers, reasoning: the names of each kind, in their order.
        pairs: of `PAIR_FIELDS`, those with both names.
        two_answers: the names of a pair of answers.
        has_tools, has_options, has_leading: whether a field of this kind may be there.
    """

    turn_lists: tuple[str, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    reasoning: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    two_answers: tuple[str, str] | None
    has_tools: bool
    has_options: bool
    has_leading: bool


@lru_cache(maxsize=1_000)
def _layout(names: frozenset[str]) -> Layout:
    """Rows of a file have few sets of names, and what depends on values is looked at in each row."""

    def there(known: Iterable[str]) -> tuple[str, ...]:
        return tuple(name for name in known if name in names)

    return Layout(
        turn_lists=there(TURN_LISTS),
        questions=there(QUESTION_FIELDS),
        answers=there(ANSWER_FIELDS),
        reasoning=there(REASONING_FIELDS),
        pairs=tuple(pair for pair in PAIR_FIELDS if names.issuperset(pair)),
        two_answers=next((pair for pair in PREFERENCE_FIELDS if names.issuperset(pair)), None),
        has_tools=not names.isdisjoint(TOOL_FIELDS),
        has_options=not names.isdisjoint((*OPTION_FIELDS, *chain.from_iterable(SINGLE_OPTION_FIELDS))),
        has_leading=not names.isdisjoint((*SYSTEM_FIELDS, "history")),
    )


def read_conversation(fields: Fields, answer_needed: bool = True, with_answer: bool = True) -> dict[str, Any]:
    """The messages and the tools of a row, whose order is not checked.

    Args:
        answer_needed: refuse a question without an answer.
        with_answer: False leaves the fields of an answer alone.

    Raises:
        RowError: no format is recognised, or a part of it cannot be read.
    """
    layout = _layout(fields.given)
    pair = layout.two_answers
    if pair and all(name in fields for name in pair):
        raise RowError(
            f"two answers, `{pair[0]}` and `{pair[1]}`", other_stage(fields.rest(), ("preference",)), fields.rest()
        )
    if layout.turn_lists and (column := fields.first(layout.turn_lists)):
        return _read_turns(fields, column)
    question, answer = _question_and_answer(fields)
    answer = answer if with_answer else None
    if question is None or (answer is None and answer_needed and with_answer and not _has_choices(fields)):
        raise _no_format(fields, question)
    return _read_pair(fields, question, answer)


def _read_turns(fields: Fields, column: str) -> dict[str, Any]:
    turns = fields.take(column)
    turns = parse_turns(turns)
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        turns = parse_inner_json(turns, f"`{column}`")
    tools = _take_tools(fields)
    return read_leading_turns(fields, to_messages_list(turns, column, tools), tools)


def _question_and_answer(fields: Fields) -> tuple[str | None, str | None]:
    """The names of the fields with the question and with its answer."""
    layout = _layout(fields.given)
    for question, answer in layout.pairs:
        if not is_blank(fields.get(question)) and answer in fields:
            return question, answer
    question = fields.first(layout.questions)
    # Some sets have an empty instruction, and the question in `input`.
    if (question is None or is_blank(fields.get(question))) and not is_blank(fields.get("input")):
        question = "input"
    return question, fields.first(layout.answers)


def _has_choices(fields: Fields) -> bool:
    return (
        _layout(fields.given).has_options
        and options_of(fields.rest()) is not None
        and fields.first(CHOICE_ANSWERS) is not None
    )


def _read_pair(fields: Fields, question: str, answer: str | None) -> dict[str, Any]:
    layout = _layout(fields.given)
    asked = parse_turns(fields.take(question, "question"))
    if question == "input":
        fields.take("instruction")
    tools = _take_tools(fields)
    reasoning = next(iter(layout.reasoning), None)
    thoughts = fields.take(reasoning, "reasoning") if reasoning else None
    if _is_turns(asked):
        messages = to_messages_list(asked, question, tools)
    else:
        messages = [text_message("user", asked, question)]
        if question == "instruction" or "input" in fields:
            _append_context(fields, messages[0])
    choice = options_of(fields.rest()) if layout.has_options else None
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
    return read_leading_turns(fields, messages, tools)


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
    first = first_number({name: fields.get(name) for name in names}, names)
    for name in names:
        fields.take(name, "options" if len(names) == 1 else None)
    if messages[-1]["role"] == "user":
        messages[-1]["content"] = prompt_with_options(messages[-1]["content"], options)
    given = {name: fields.get(name) for name in CHOICE_ANSWERS if not is_blank(fields.get(name))}
    given = {name: value for name, value in given.items() if name not in LABEL_FIELDS or not isinstance(value, bool)}
    if not given:
        return None
    found = {name: answer_letters(value, options, first=first) for name, value in given.items()}
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
    if not _layout(fields.given).has_tools:
        return None
    tools, functions = to_tools(fields.take("tools", "tools")), to_tools(fields.take("functions"))
    if tools and functions and tools != functions:
        raise RowError("both `tools` and `functions`", "Keep one of them.", functions)
    return tools or functions


def read_leading_turns(
    fields: Fields, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """The conversation after the turns of `system` and `history`."""
    tools = tools or _take_tools(fields)
    if not _layout(fields.given).has_leading:
        return {"messages": messages, "tools": tools}
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
    names = ", ".join(map(str, fields.given)) or "none"
    if turns := next((name for name, value in rest.items() if _are_readable_turns(value)), None):
        return RowError(
            f"no known chat format (fields: {names})", f"If `{turns}` are the turns: --columns messages={turns}.", rest
        )
    needed = ANSWER_FIELDS if question else CONVERSATION_FIELDS
    for name in (name for name, value in rest.items() if isinstance(value, str)):
        if meant := next((other for other in needed if is_misspelling(str(name), other)), None):
            return RowError(f"no field `{meant}`, but `{name}`", f"Rename it to `{meant}`.", rest)
    if any(map(_LIKE_A_SENTENCE.search, map(str, rest))):
        return RowError(
            f"the names of the fields look like a row (fields: {names})",
            "A table begins with a line of names of its columns, such as question,answer. Add it.",
            rest,
        )
    if question:
        return RowError(
            f"`{question}` without an answer (fields: {', '.join(map(str, rest)) or 'none'})",
            f"Give the row its answer as `output` or `response`, or name its field: --columns "
            f"question={question},answer=FIELD.",
            rest,
        )
    if "text" in rest:
        if isinstance(rest["text"], str) and _RENDERED.search(rest["text"]):
            return RowError(
                "`text` is a conversation that was rendered with a chat template",
                "Give the turns as `messages`: the template of the model is applied here.",
                rest["text"],
            )
        return RowError("a document, not a conversation", "Documents are for pretraining.py.", rest["text"])
    return RowError(
        f"no known chat format (fields: {', '.join(map(str, rest)) or names})",
        "Name its fields (--columns question=FIELD,answer=FIELD), or use `messages`, `conversations`, `instruction` "
        "and `output`, or `prompt` and `response`; data/README.md shows each.",
        rest,
    )


def _are_readable_turns(value: Any) -> bool:
    try:
        return are_turns(value) and bool(to_messages_list(value, ""))
    except RowError:
        return False


# Names of columns do not end like sentences, nor are they that long.
_LIKE_A_SENTENCE = re.compile(r"[。？！?!]\s*$|^.{80}", re.DOTALL)
_RENDERED = re.compile(
    r"<\|im_start\|>|\[INST\]|<\|start_header_id\|>|<start_of_turn>|### (?:Instruction|Response):|<｜User｜>"
)


def without_mask(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages without `train`, which means nothing in a prompt."""
    return [{name: item for name, item in message.items() if name != "train"} for message in messages]


def other_stage(row: Mapping[str, Any], kinds: Iterable[str]) -> str:
    """The remedy for a row of other kinds of training: where it is used, or how this one can."""
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
