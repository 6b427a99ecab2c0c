"""Recognise the format of a row and convert it to one common form, or refuse it with a reason and a remedy."""

import json
from itertools import zip_longest
from typing import Any

from medicalgpt.data.sources import RowError

# Fields that describe a row and are not part of it.
METADATA_FIELDS = frozenset({"id", "idx", "source", "category", "lang", "language", "meta", "metadata"})

USER_ROLES = ("human", "user")
ASSISTANT_ROLES = ("gpt", "assistant")
CALL_ROLES = ("function_call", "tool_call")
RESULT_ROLES = ("observation", "tool", "function_response", "tool_response")
ALL_ROLES = ("system", *USER_ROLES, *ASSISTANT_ROLES, *CALL_ROLES, *RESULT_ROLES)


def to_text(value: Any, ignore: frozenset[str] = frozenset()) -> dict[str, Any]:
    """A document for pretraining: `{"text": str}` from a line of text or `{"text": ...}`.

    Raises:
        RowError: no text, empty text, unknown fields.
    """
    if isinstance(value, str):
        value = {"text": value}
    _require_object(value)
    if "text" not in value:
        raise RowError(
            "no field `text`",
            'Pretraining rows are {"text": "..."}; chat rows are for supervised_finetuning.py.',
            value,
        )
    _refuse_unknown(value, {"text"}, ignore)
    if not isinstance(value["text"], str) or not value["text"].strip():
        raise RowError("`text` is empty or not a string", "Remove the row or give it a text.", value["text"])
    return {"text": value["text"]}


def to_messages(value: Any, ignore: frozenset[str] = frozenset()) -> dict[str, Any]:
    """A conversation that ends with the assistant: `{"messages": [...], "tools": [...] | None}`.

    The format is recognised row by row: ShareGPT `conversations` (with `function_call` and `observation` turns and a
    `tools` column), OpenAI `messages`, Alpaca `instruction`/`input`/`output` with `history`, and prompt/response
    pairs. Messages are in OpenAI form: `role`, `content`, and `tool_calls` with arguments as objects.

    Raises:
        RowError: the row is in no such format, or has unknown fields or roles, empty turns, or turns out of order.
    """
    conversation = _to_conversation(value, ignore)
    _check_order(conversation["messages"], must_end_with="assistant")
    return conversation


def to_prompt(value: Any, ignore: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The prompt of a model: `{"messages": [...], "tools": ... , "reference": str | None}`.

    Takes the formats of `to_messages`, where a final assistant turn becomes the reference answer, and rows that hold
    only a question: a line of text, or `prompt`, `query`, `question`, `instruction` (with `input`).

    Raises:
        RowError: as `to_messages`.
    """
    if isinstance(value, str):
        value = {"prompt": value}
    conversation = _to_conversation(value, ignore, answer_needed=False)
    messages, reference = conversation["messages"], None
    if messages and messages[-1]["role"] == "assistant":
        reference = messages[-1]["content"]
        messages = messages[:-1]
    _check_order(messages, must_end_with="user")
    return {"messages": messages, "tools": conversation["tools"], "reference": reference}


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
    _require_object(value)
    # Some datasets have the prompt twice: an ignored field gives way to the other.
    prompt = {name: item for name, item in value.items() if name not in ignore}
    columns = next((pair for pair in PREFERENCE_FIELDS if set(pair) & set(prompt)), PREFERENCE_FIELDS[0])
    both = f"`{columns[0]}` and `{columns[1]}`"
    for column in columns:
        if column not in prompt:
            raise RowError(
                f"no field `{column}`",
                f"Preference rows have {both}; rows with one answer are for supervised_finetuning.py.",
                value,
            )
    answers = [_to_answer(prompt.pop(column), column) for column in columns]
    if third := sorted(set(prompt) & ANSWER_FIELDS):
        raise RowError(
            f"`{third[0]}` is a third answer next to {both}",
            f"Remove it, or pass --ignore_fields {','.join(third)}.",
            prompt[third[0]],
        )
    if not set(prompt).intersection(PROMPT_FIELDS):
        prompt["messages"] = _common_beginning(value, columns, answers)
        answers = [turns[-1:] for turns in answers]
    conversation = _to_conversation(prompt, frozenset(), answer_needed=False)
    if conversation["messages"] and conversation["messages"][-1]["role"] == "assistant":
        raise RowError(
            "the prompt ends with a turn of the assistant",
            f"Remove that turn: the answers are {both}.",
            conversation["messages"][-1],
        )
    _check_order(conversation["messages"], must_end_with="user")
    for column, turns in zip(columns, answers, strict=True):
        if len(turns) != 1:
            raise RowError(
                f"`{column}` has {len(turns)} turns next to a prompt, expected one",
                "Keep only the answer in it; or, if both are whole conversations, pass --ignore_fields "
                f"{','.join(sorted(set(prompt).intersection(PROMPT_FIELDS)))}.",
                value[column],
            )
        if turns[0]["role"] != "assistant":
            raise RowError(
                f"`{column}` is a turn of the {turns[0]['role']}, not an answer",
                f"Answers have one of the roles {', '.join(ASSISTANT_ROLES + CALL_ROLES)}.",
                value[column],
            )
    (chosen,), (rejected,) = answers
    if canonical_json(chosen) == canonical_json(rejected):
        raise RowError(f"{both} are the same answer", "Remove the row: it has no preference.", value[columns[0]])
    return {**conversation, "chosen": chosen, "rejected": rejected}


PAIR_FIELDS = (("prompt", "response"), ("prompt", "completion"), ("query", "response"), ("question", "answer"))
PREFERENCE_FIELDS = (("chosen", "rejected"), ("response_chosen", "response_rejected"))
PROMPT_FIELDS = ("conversations", "messages", "instruction", "prompt", "query", "question")
ANSWER_FIELDS = {"output", *(answer for _, answer in PAIR_FIELDS)}
# Fields of any conversation besides those with its turns.
LEADING_FIELDS = ("tools", "system", "system_prompt", "history")


def _to_answer(value: Any, column: str) -> list[dict[str, Any]]:
    """The turns of one answer; more than one only where it holds its prompt as well."""
    if not isinstance(value, list | dict):
        return [_text_message("assistant", value, column)]
    turns = value if isinstance(value, list) else [value]
    try:
        return [_to_message(turn, number) for number, turn in enumerate(turns, start=1)]
    except RowError as error:
        raise RowError(f"`{column}`: {error.reason}", error.remedy, error.value) from error


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


def _to_conversation(value: Any, ignore: frozenset[str], answer_needed: bool = True) -> dict[str, Any]:
    _require_object(value)
    if {"chosen", "rejected"} <= set(value) - ignore:
        raise RowError(
            "two answers, `chosen` and `rejected`",
            "Preference rows are for dpo_training.py, orpo_training.py or reward_modeling.py.",
            value,
        )
    if "conversations" in value:
        return _from_turns(value, "conversations", ignore)
    if "messages" in value:
        return _from_turns(value, "messages", ignore)
    if "instruction" in value:
        return _from_alpaca(value, ignore, answer_needed)
    for question, answer in PAIR_FIELDS:
        if question in value and (answer in value or (not answer_needed and answer == "response")):
            return _from_pair(value, question, answer, ignore)
    if not answer_needed and "question" in value:
        return _from_pair(value, "question", "answer", ignore)
    raise RowError(
        f"no known chat format (fields: {', '.join(map(str, value)) or 'none'})",
        "Use `conversations`, `messages`, `instruction`+`output` or `prompt`+`response`; data/README.md shows each.",
        value,
    )


def _from_turns(value: dict, column: str, ignore: frozenset[str]) -> dict[str, Any]:
    _refuse_unknown(value, {column, *LEADING_FIELDS}, ignore)
    turns = value[column]
    if not isinstance(turns, list) or not turns:
        raise RowError(
            f"`{column}` must be a list of turns, and is empty or not a list", "Give it at least two turns.", turns
        )
    messages = _leading_turns(value)
    messages += [_to_message(turn, number) for number, turn in enumerate(turns, start=1)]
    return {"messages": messages, "tools": _to_tools(value.get("tools"))}


def _to_message(turn: Any, number: int) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise RowError(f"turn {number} is not an object", 'A turn is {"from": "human", "value": "..."}.', turn)
    role_field = "from" if "from" in turn else "role"
    text_field = "value" if "value" in turn else "content"
    known = {role_field, text_field, "tool_calls", "tool_call_id", "name", "reasoning_content", "weight"}
    if unknown := sorted(set(turn) - known):
        raise RowError(f"turn {number} has unknown fields {unknown}", f"Known: {sorted(known)}.", turn)
    role, text = turn.get(role_field), turn.get(text_field)
    if role not in ALL_ROLES:
        raise RowError(f"turn {number} has the unknown role {role!r}", f"Roles are {', '.join(ALL_ROLES)}.", turn)
    if turn.get("weight") not in (None, 1):
        raise RowError(
            f"turn {number} has the weight {turn['weight']!r}; every answer is trained on",
            "Remove the turn or its weight.",
            turn,
        )
    calls = turn.get("tool_calls")
    if calls and role not in ASSISTANT_ROLES:
        raise RowError(f"turn {number} ({role}) has tool calls", "Only the assistant calls tools.", turn)
    if text is not None and not isinstance(text, str):
        raise RowError(f"turn {number} ({role}) is not text", "Write the turn as one string.", text)
    if not calls and not (text or "").strip():
        raise RowError(f"turn {number} ({role}) is empty", "Remove the row or write the turn.", turn)
    if role in CALL_ROLES:
        return {"role": "assistant", "content": "", "tool_calls": _to_tool_calls(text, number)}
    if role in RESULT_ROLES:
        return {"role": "tool", "content": text}
    if role in USER_ROLES or role == "system":
        return {"role": "user" if role in USER_ROLES else "system", "content": text}
    message: dict[str, Any] = {"role": "assistant", "content": text or ""}
    if turn.get("reasoning_content"):
        message["reasoning_content"] = turn["reasoning_content"]
    if calls:
        message["tool_calls"] = _to_tool_calls(calls, number)
    return message


def _to_tool_calls(value: Any, number: int) -> list[dict[str, Any]]:
    calls = _parse_inner_json(value, f"turn {number}: the function call")
    calls = calls if isinstance(calls, list) else [calls]
    remedy = 'Write {"name": "...", "arguments": {...}}.'
    if not calls:
        raise RowError(f"turn {number}: no function is called", remedy, value)
    result = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"turn {number}: a function call needs a name and an object of arguments", remedy, value)
        if unknown := sorted(set(function) - {"name", "arguments", "type", "id", "index"}):
            raise RowError(f"turn {number}: the function call has unknown fields {unknown}", remedy, value)
        arguments = _parse_inner_json(function.get("arguments", {}), f"turn {number}: the call's arguments")
        if not isinstance(arguments, dict):
            raise RowError(f"turn {number}: the call's arguments are not an object", remedy, value)
        result.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return result


def _to_tools(value: Any) -> list[dict[str, Any]] | None:
    if not value:
        return None
    tools = _parse_inner_json(value, "the column `tools`")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("`tools` is not a list of objects", 'Write [{"name": ..., "parameters": {...}}].', value)
    wrapped = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    for tool in wrapped:
        if not isinstance(tool["function"], dict) or not isinstance(tool["function"].get("name"), str):
            raise RowError("a tool has no name", "Give each tool a `name`.", tool)
    return wrapped or None


def _parse_inner_json(value: Any, what: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        parsed = json.loads(value)
        json.dumps(parsed, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise RowError(f"{what} is broken JSON ({error.msg})", "Fix the JSON inside the string.", value) from error
    except UnicodeEncodeError as error:
        raise RowError(f"{what} has half a character", "Fix the text.", value) from error
    return parsed


def _from_alpaca(value: dict, ignore: frozenset[str], answer_needed: bool) -> dict[str, Any]:
    _refuse_unknown(value, {"instruction", "input", "output", *LEADING_FIELDS}, ignore)
    if "output" not in value and answer_needed:
        raise RowError("`instruction` without `output`", "Give the row its answer as `output`.", value)
    messages = _leading_turns(value)
    question = _text_message("user", value["instruction"], "instruction")
    if value.get("input") is not None and not isinstance(value["input"], str):
        raise RowError("`input` is not text", "Write it as one string.", value["input"])
    if (value.get("input") or "").strip():
        question["content"] += f"\n{value['input']}"
    messages.append(question)
    if value.get("output") is not None:
        messages.append(_text_message("assistant", value["output"], "output"))
    return {"messages": messages, "tools": _to_tools(value.get("tools"))}


def _from_pair(value: dict, question: str, answer: str, ignore: frozenset[str]) -> dict[str, Any]:
    _refuse_unknown(value, {question, answer, *LEADING_FIELDS}, ignore)
    asked = value[question]
    messages = _leading_turns(value)
    if isinstance(asked, list):
        messages += [_to_message(turn, number) for number, turn in enumerate(asked, start=1)]
    else:
        messages.append(_text_message("user", asked, question))
    given = value.get(answer)
    if isinstance(given, list):
        messages += [_to_message(turn, number) for number, turn in enumerate(given, start=len(messages) + 1)]
    elif given is not None:
        messages.append(_text_message("assistant", given, answer))
    return {"messages": messages, "tools": _to_tools(value.get("tools"))}


def _leading_turns(value: dict) -> list[dict[str, Any]]:
    """The turns before those of the row itself: `system` (or `system_prompt`), then `history`."""
    columns = [column for column in ("system", "system_prompt") if value.get(column)]
    if len(columns) == 2:
        raise RowError("both `system` and `system_prompt`", "Keep one of them.", value["system_prompt"])
    messages = [_text_message("system", value[column], column) for column in columns]
    history = value.get("history") or []
    if not isinstance(history, list):
        raise RowError("`history` is not a list", "Write [[question, answer], ...].", history)
    for pair in history:
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError("`history` has something other than pairs", "Write [[question, answer], ...].", pair)
        messages += [_text_message("user", pair[0], "history"), _text_message("assistant", pair[1], "history")]
    return messages


def _text_message(role: str, text: Any, column: str) -> dict[str, Any]:
    if not isinstance(text, str) or not text.strip():
        raise RowError(f"`{column}` is empty or not text", "Remove the row or fill the field.", text)
    return {"role": role, "content": text}


def _check_order(messages: list[dict[str, Any]], must_end_with: str) -> None:
    """system? then user, assistant (or assistant with calls, tool results, assistant), repeated."""
    allowed = ("system", "user")
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if role not in allowed:
            raise RowError(
                f"wrong order: turn {number} is {role}, expected {' or '.join(allowed)}",
                "Turns are system (at most one, first), user, assistant, user, assistant, …; a tool's result follows "
                "its call.",
                [m["role"] for m in messages],
            )
        if role == "system":
            allowed = ("user",)
        elif role == "user":
            allowed = ("assistant",)
        elif role == "tool":
            allowed = ("assistant", "tool")
        else:
            allowed = ("tool",) if message.get("tool_calls") else ("user",)
    last = messages[-1]["role"] if messages else "nothing"
    ends = ("user", "tool") if must_end_with == "user" else ("assistant",)
    if last not in ends:
        raise RowError(
            f"the last turn is {last}, expected {' or '.join(ends)}",
            "Add the missing turn or remove the dangling one.",
            [m["role"] for m in messages],
        )


def _require_object(value: Any) -> None:
    if not isinstance(value, dict):
        raise RowError(f"the row is a {type(value).__name__}, not an object", "Each row is a JSON object {...}.", value)


def _refuse_unknown(value: dict, known: set[str], ignore: frozenset[str]) -> None:
    if unknown := sorted(set(value) - known - METADATA_FIELDS - ignore):
        raise RowError(
            f"unknown field(s) {', '.join(unknown)}",
            f"Known here: {', '.join(sorted(known))}. Remove them, or pass --ignore_fields {','.join(unknown)}.",
            {name: value[name] for name in unknown},
        )


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
