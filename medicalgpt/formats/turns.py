"""Turns of a conversation: roles, texts, tool calls and tools in every spelling become messages of OpenAI's form."""

import json
import re
from contextlib import suppress
from typing import Any

from medicalgpt.readers.problems import RowError

SYSTEM_ROLES = ("system", "developer")
USER_ROLES = ("human", "user", "prompter")
ASSISTANT_ROLES = ("gpt", "assistant", "chatgpt", "bing", "bard", "bot", "model", "ai")
CALL_ROLES = ("function_call", "tool_call")
RESULT_ROLES = ("observation", "tool", "function", "function_response", "tool_response")
ALL_ROLES = (*SYSTEM_ROLES, *USER_ROLES, *ASSISTANT_ROLES, *CALL_ROLES, *RESULT_ROLES)

PLAIN_ROLES = {
    **{"system": "system", "user": "user", "human": "user"},
    **{"assistant": "assistant", "gpt": "assistant"},
}

ROLE_FIELDS = ("from", "role")
TEXT_FIELDS = ("value", "content", "parts")
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
MASK_FIELDS = ("weight", "loss", "train", "loss_mask")
MEDIA_FIELDS = ("images", "videos", "audios", "image", "video", "audio")
# Where an image is in a text, as LLaMA-Factory and ms-swift write it, and what a turn's content has there once read.
IMAGE_MARK = "<image>"
IMAGE_PART = {"type": "image"}
MEDIA_REMEDY = (
    "Images are trained on by supervised_finetuning.py with Qwen2.5-VL or Qwen3-VL as the base, from files that are "
    "neither streamed nor prepared (docs/models.md); videos and audio are not. Remove the row, or skip and count "
    "such rows: --skip_bad_rows True."
)
# Fields of a turn that are read; any other is not used.
TURN_FIELDS = frozenset(
    {*ROLE_FIELDS, *TEXT_FIELDS, *REASONING_FIELDS, *MASK_FIELDS, *MEDIA_FIELDS}
    | {"tool_calls", "function_call", "tool_call_id", "name", "refusal"}
)
# A turn without its own text field: one exchange, as Firefly and MOSS write it.
EXCHANGE_FIELDS = (("human", "assistant"), ("user", "assistant"), ("human", "gpt"), ("question", "answer"))


def to_text_value(value: Any) -> Any:
    """Text of a field: numbers as they are written, a list of texts and numbers as its lines; else the value itself."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, list) and value and all(isinstance(to_text_value(item), str) for item in value):
        return "\n".join(to_text_value(item) for item in value)
    return value


def text_message(role: str, text: Any, column: str) -> dict[str, Any]:
    """Raises RowError if the text is empty or not text, or if an answer is a list of several."""
    if role == "assistant" and isinstance(text, list) and len(text) > 1 and isinstance(to_text_value(text), str):
        raise RowError(
            f"`{column}` has {len(text)} texts, which may be parts of one answer or different ones",
            "Write one text; of two answers to one prompt, the better one as `chosen` and the other as `rejected`.",
            text,
        )
    text = to_text_value(text)
    if not isinstance(text, str) or not text or text.isspace():
        raise RowError(f"`{column}` is empty or not text", "Remove the row or fill the field.", text)
    return {"role": role, "content": text}


def to_messages_list(turns: Any, column: str, tools: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    """The messages of a list of turns, or of exchanges such as `{"human": ..., "assistant": ...}`.

    Args:
        tools: of the row; see `to_message`.

    Raises:
        RowError: not a list, or a turn that cannot be read.
    """
    if not isinstance(turns, list) or not turns:
        raise RowError(
            f"`{column}` must be a list of turns, and is empty or not a list", "Give it at least two turns.", turns
        )
    messages: list[dict[str, Any]] = []
    for number, turn in enumerate(turns, start=1):
        if message := _plain_message(turn):
            messages.append(message)
        elif pair := _exchange(turn):
            messages += [
                text_message(role, turn[name], name) for role, name in zip(("user", "assistant"), pair, strict=True)
            ]
        else:
            messages.append(to_message(turn, number, tools))
    return messages


def _plain_message(turn: Any) -> dict[str, Any] | None:
    """A turn that has only a role, spelled as usual, and a text, as most have; None for any other."""
    if not isinstance(turn, dict) or len(turn) != 2:
        return None
    role, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if not isinstance(role, str) or not isinstance(text, str) or not text or text.isspace():
        return None
    return {"role": PLAIN_ROLES[role], "content": text} if role in PLAIN_ROLES else None


def _exchange(turn: Any) -> tuple[str, str] | None:
    if not isinstance(turn, dict) or turn.get("role") is not None or turn.get("from") is not None:
        return None
    return next((pair for pair in EXCHANGE_FIELDS if all(turn.get(name) is not None for name in pair)), None)


def unused_turn_fields(turns: Any) -> set[str]:
    """Names of fields that turns have and `to_message` does not read, as `turn.NAME`."""
    if not isinstance(turns, list):
        return set()
    return {
        f"turn.{name}"
        for turn in turns
        if isinstance(turn, dict) and not turn.keys() <= TURN_FIELDS
        for name, value in turn.items()
        if value not in (None, [], {}, "") and name not in TURN_FIELDS and name not in (_exchange(turn) or ())
    }


def to_message(turn: Any, number: int, tools: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """One turn as a message: `role`, `content`, and `reasoning_content`, `tool_calls`, `train` where it has them.

    Exports of SDKs have every field of a message in each turn, null where it has none: such fields are as if they were
    not there. `train` is False for a turn of the assistant that is context only.

    Args:
        number: of the turn, from 1, for messages.
        tools: of the row, in OpenAI form: an argument that is null is kept if the tool requires it.

    Raises:
        RowError: the turn cannot be read.
    """
    if not isinstance(turn, dict):
        raise RowError(f"turn {number} is not an object", 'A turn is {"from": "human", "value": "..."}.', turn)
    turn = {name: value for name, value in turn.items() if value is not None}
    role = _role(turn, number)
    kind = f"turn {number} ({role})"
    calls = turn.get("tool_calls") or turn.get("function_call")
    if calls and role not in ASSISTANT_ROLES:
        raise RowError(f"{kind} has tool calls", "Only the assistant calls tools.", turn)
    if media := next((name for name in MEDIA_FIELDS if turn.get(name)), None):
        raise _media_error(kind, media, turn[media])
    text, thoughts = _text_of_turn(turn, kind)
    trained = _is_trained(turn, number, role)
    if role in CALL_ROLES:
        message = {"role": "assistant", "content": "", "tool_calls": to_tool_calls(text, number, tools)}
        return message if trained else {**message, "train": False}
    if role in SYSTEM_ROLES:
        return {"role": "system", "content": text}
    if not calls and not text.strip():
        reason = "is a refusal without content" if turn.get("refusal") else "is empty"
        raise RowError(f"{kind} {reason}", "Remove the row or write the turn.", turn)
    if role in RESULT_ROLES:
        return {"role": "tool", "content": text}
    if role in USER_ROLES:
        return {"role": "user", "content": text}
    message = {"role": "assistant", "content": text}
    if thoughts:
        message["reasoning_content"] = thoughts
    if calls:
        message["tool_calls"] = to_tool_calls(calls, number, tools)
    if not trained:
        message["train"] = False
    return message


def _media_error(kind: str, media: str, value: Any) -> RowError:
    return RowError(f"{kind} has {media}, and only text is trained on here", MEDIA_REMEDY, value)


def _role(turn: dict, number: int) -> str:
    given = [turn[name] for name in ROLE_FIELDS if name in turn]
    role = given[0] if given else None
    name = role.strip().lower() if isinstance(role, str) else role
    if len(given) == 2 and given[0] != given[1]:
        raise RowError(f"turn {number} has two roles, `from` and `role`", "Keep one of them.", turn)
    if name not in ALL_ROLES:
        raise RowError(f"turn {number} has the unknown role {role!r}", f"Roles are {', '.join(ALL_ROLES)}.", turn)
    return name


def _text_of_turn(turn: dict, kind: str) -> tuple[str, str]:
    """The text of a turn and its reasoning, from a string or from a list of text parts."""
    given = [turn[name] for name in TEXT_FIELDS if name in turn]
    if len(given) == 2 and given[0] != given[1]:
        raise RowError(f"{kind} has two texts, `value` and `content`", "Keep one of them.", turn)
    parts = given[0] if given else ""
    thoughts = [turn[name] for name in REASONING_FIELDS if turn.get(name)]
    texts: list[str] = []
    for part in parts if isinstance(parts, list) else [parts]:
        part = {name: value for name, value in part.items() if value is not None} if isinstance(part, dict) else part
        if isinstance(part, dict) and part.get("type") == "thinking" and isinstance(part.get("thinking"), str):
            thoughts.append(part["thinking"])
        elif isinstance(part, dict) and part.get("type", "text") in ("text", "input_text", "output_text"):
            texts.append(part.get("text"))
        elif isinstance(part, dict) and any(what in str(part.get("type")) for what in ("image", "video", "audio")):
            raise _media_error(kind, part["type"], part)
        else:
            texts.append(part)
    if not all(isinstance(text, str) for text in texts):
        raise RowError(f"{kind} is not text", "Write the turn as one string, or as a list of text parts.", parts)
    if not all(isinstance(thought, str) for thought in thoughts) or len(set(map(str, thoughts))) > 1:
        raise RowError(f"{kind} has reasoning that is not one text", "Write it as `reasoning_content`.", thoughts)
    return "".join(texts), thoughts[0] if thoughts else ""


def _is_trained(turn: dict, number: int, role: str) -> bool:
    """Whether `weight`, `loss` or `train` of a turn ask for training it, which only an answer can be refused."""
    masks = {name: turn[name] for name in MASK_FIELDS if name in turn}
    for name, value in masks.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise RowError(
                f"turn {number} has the {name} {value!r}, which is neither 0 nor 1",
                "An answer is trained on in full (1 or true) or is context only (0 or false).",
                turn,
            )
        # SDKs write a weight of 1 into every turn.
        if value == 1 and name != "weight" and role not in ASSISTANT_ROLES + CALL_ROLES:
            raise RowError(
                f"turn {number} ({role}) has `{name}` {value!r}, and only answers are trained on",
                f"Remove `{name}` from the turn. --train_on_inputs True trains on all prompts of all rows.",
                turn,
            )
    if len({bool(value) for value in masks.values()}) > 1:
        raise RowError(f"turn {number} has {masks}, which contradict each other", "Keep one of them.", turn)
    return all(masks.values())


def to_tool_calls(value: Any, number: int, tools: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    """Tool calls in OpenAI form, with arguments as objects.

    Raises:
        RowError: they cannot be read.
    """
    calls = parse_inner_json(value, f"turn {number}: the function call")
    calls = calls if isinstance(calls, list) else [calls]
    remedy = 'Write {"name": "...", "arguments": {...}}.'
    if not calls:
        raise RowError(f"turn {number}: no function is called", remedy, value)
    result = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"turn {number}: a function call needs a name and an object of arguments", remedy, value)
        known = {"name", "arguments", "type", "id", "index", "function"}
        if unknown := sorted(name for name in set(function) - known if function[name] is not None):
            raise RowError(f"turn {number}: the function call has unknown fields {unknown}", remedy, value)
        given = function.get("arguments")
        arguments = {} if given is None else parse_inner_json(given, f"turn {number}: the call's arguments")
        if not isinstance(arguments, dict):
            raise RowError(f"turn {number}: the call's arguments are not an object", remedy, value)
        # Tables cannot add fields to a string, so that a null in one was written by the author.
        if not isinstance(given, str) and not isinstance(value, str):
            arguments = without_nulls(arguments, keep=_required_arguments(function["name"], tools))
        result.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return result


def _required_arguments(name: str, tools: list[dict[str, Any]] | None) -> frozenset[str]:
    for tool in tools or []:
        function = tool.get("function", tool)
        if function.get("name") == name:
            parameters = function.get("parameters")
            required = parameters.get("required") if isinstance(parameters, dict) else None
            return frozenset(required) if isinstance(required, list) else frozenset()
    return frozenset()


def without_nulls(value: Any, keep: frozenset[str] = frozenset()) -> Any:
    """The value without the object fields that are null, at every depth.

    Arrow gives each object of a column the same fields: it fills in null where an object does not have one, and an
    empty object becomes one of nulls. This is the inverse. Elements of lists stay, as Arrow adds none.

    Args:
        keep: fields of the outermost object that stay, null or not.
    """
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None or name in keep}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def to_tools(value: Any) -> list[dict[str, Any]] | None:
    """The tools of a row in OpenAI form; None if it has none.

    Raises:
        RowError: they cannot be read.
    """
    if not value:
        return None
    tools = parse_inner_json(value, "the column `tools`")
    if isinstance(tools, list):
        tools = [parse_inner_json(tool, "a tool") for tool in tools]
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("`tools` is not a list of objects", 'Write [{"name": ..., "parameters": {...}}].', value)
    if not isinstance(value, str):
        tools = without_nulls(tools)
    wrapped = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    for tool in wrapped:
        if not isinstance(tool["function"], dict) or not isinstance(tool["function"].get("name"), str):
            raise RowError("a tool has no name", "Give each tool a `name`.", tool)
    return wrapped or None


def parse_inner_json(value: Any, what: str) -> Any:
    """What a string of JSON holds; any other value unchanged.

    Raises:
        RowError: broken JSON.
    """
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


_SPEAKER = re.compile(r"(?:^|\n+)\s*(Human|Assistant):[ \t]*")
# guanaco has no line break before a speaker, but a mark.
_MARKED_SPEAKER = re.compile(r"\s*### (Human|Assistant):[ \t]*")


def parse_transcript(text: Any) -> list[dict[str, str]] | None:
    """The turns of a transcript "Human: ... Assistant: ..." as hh-rlhf and BELLE write it; None for any other text.

    The speakers may be marked as in guanaco, "### Human:". The opening of an answer at the end, which a prompt has, is
    not a turn.
    """
    if not isinstance(text, str) or not text.lstrip()[:10].startswith(("Human:", "### Human:")):
        return None
    speakers = list((_MARKED_SPEAKER if text.lstrip().startswith("#") else _SPEAKER).finditer(text))
    ends = [match.start() for match in speakers[1:]] + [len(text)]
    turns = [
        {"role": "user" if match[1] == "Human" else "assistant", "content": text[match.end() : end].strip()}
        for match, end in zip(speakers, ends, strict=True)
    ]
    if len(turns) < 2:
        return None
    return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns


def parse_turns(value: Any) -> Any:
    """The turns that a string holds, as JSON or as a transcript; any other value unchanged."""
    if not isinstance(value, str):
        return value
    if value.lstrip()[:1] == "[" and ('"role"' in value or '"from"' in value):
        with suppress(json.JSONDecodeError):
            turns = json.loads(value)
            if are_turns(turns):
                return turns
    return parse_transcript(value) or value


def are_turns(value: Any) -> bool:
    """Whether a value is a list of objects with roles."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, dict) and (turn.get("role") or turn.get("from")) for turn in value)
    )


def check_order(messages: list[dict[str, Any]], must_end_with: str) -> None:
    """Raises RowError unless user and assistant take turns; a call is followed by its results.

    The assistant may begin, and system turns may be anywhere between: whether the template can say them is seen when
    the row is encoded.
    """
    allowed = ("user", "assistant")
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if role == "system" and allowed != ("tool",):
            continue
        if role == "tool" and allowed == ("user",):
            raise RowError(
                f"turn {number} is the result of a tool, and turn {number - 1} has no call",
                f"Write the call as `tool_calls` of turn {number - 1}, or as a turn of function_call.",
                messages[number - 2],
            )
        if role not in allowed:
            raise RowError(
                f"wrong order: turn {number} is {role}, expected {' or '.join(allowed)}",
                "Turns are system, user, assistant, user, assistant, …; a tool's result follows its call.",
                [m["role"] for m in messages],
            )
        if role == "user":
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
