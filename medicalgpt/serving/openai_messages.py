"""Messages of the OpenAI API in the form of chat templates."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from medicalgpt.serving.openai_schema import (
    AssistantMessage,
    Content,
    SystemMessage,
    ToolMessage,
    UserMessage,
    UserPart,
)

from pydantic_core import from_json


class MessageError(ValueError):
    """Messages that do not belong together.

    Attributes:
        param: the field at fault.
    """

    def __init__(self, param: str, message: str):
        super().__init__(f"{param}: {message}")
        self.param = param


def image_parts(messages: Sequence[Any]) -> Iterator[tuple[str, UserPart]]:
    """The parts of a request that are images, each with its place in the body."""
    for number, message in enumerate(messages):
        for position, part in enumerate(message.content if isinstance(message.content, list) else ()):
            if part.type == "image_url":
                yield f"messages[{number}].content[{position}]", part


def parts_of_text(parts: Sequence[UserPart]) -> list[dict[str, str]]:
    """Parts as the engine takes them: images, and between them one text each."""
    merged: list[dict[str, str]] = []
    for is_text, group in itertools.groupby(parts, lambda part: part.type == "text"):
        if is_text:
            merged.append({"type": "text", "text": "".join(part.text for part in group)})
        else:
            merged += [{"type": "image"} for _ in group]
    return merged


def text_of(content: Content | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text for part in content)


def said_in(message: AssistantMessage) -> str:
    """The text of an earlier answer, without its reasoning."""
    if isinstance(message.content, list):
        return "".join(part.said for part in message.content)
    return message.content or message.refusal or ""


def to_template(messages: Sequence[Any], system_prompt: str | None, with_thoughts: bool) -> list[dict[str, Any]]:
    """Messages in the form of the chat template, as in training.

    Args:
        with_thoughts: hand on the reasoning of earlier answers, of which the template decides what the model sees.

    Templates match tool results to calls by their order, the API by ids: results are put in the order of the calls.

    Raises:
        MessageError: a call without a result, a result without a call, or arguments that are not a JSON object.
    """

    def refuse(number: int, message: str, where: str = "") -> MessageError:
        return MessageError(f"messages[{number}]{where}", message)

    rendered: list[dict[str, Any]] = []
    if system_prompt and not isinstance(messages[0], SystemMessage):
        rendered.append({"role": "system", "content": system_prompt})
    results: dict[str, dict[str, Any] | None] = {}
    for number, message in enumerate(messages):
        if isinstance(message, ToolMessage):
            if results.get(message.tool_call_id, ...) is not None:
                raise refuse(number, "it answers no call of the assistant before it.", ".tool_call_id")
            results[message.tool_call_id] = {"role": "tool", "content": text_of(message.content)}
            if None not in results.values():
                rendered += results.values()
                results = {}
            continue
        if results:
            raise refuse(number, f"the results of {_missing(results)} must come first, each with role tool.")
        role = "system" if isinstance(message, SystemMessage) else message.role
        has_images = isinstance(message, UserMessage) and any(True for _ in image_parts([message]))
        if isinstance(message, AssistantMessage):
            content = said_in(message)
        else:
            content = parts_of_text(message.content) if has_images else text_of(message.content)
        entry: dict[str, Any] = {"role": role, "content": content}
        if isinstance(message, AssistantMessage):
            if with_thoughts and message.thoughts:
                entry["reasoning_content"] = message.thoughts
            if message.content is None and message.refusal is None and not message.tool_calls:
                raise refuse(number, "it has neither content nor tool_calls.")
            calls = message.tool_calls or []
            results = dict.fromkeys(call.id for call in calls)
            if len(results) < len(calls):
                raise refuse(number, "two calls have one id.", ".tool_calls")
            for position, call in enumerate(calls):
                where = f".tool_calls[{position}].function.arguments"
                arguments = read_object(call.function.arguments)
                if arguments is None:
                    raise refuse(number, "it must be a string that holds a JSON object.", where)
                entry.setdefault("tool_calls", []).append(
                    {"type": "function", "function": {"name": call.function.name, "arguments": arguments}}
                )
        rendered.append(entry)
    if results:
        raise refuse(len(messages) - 1, f"the results of {_missing(results)} must follow, each with role tool.")
    return rendered


def _missing(results: dict[str, Any]) -> str:
    return ", ".join(repr(name) for name, result in results.items() if result is None)


def read_object(text: str) -> dict[str, Any] | None:
    """The JSON object that makes up the entire text, or None."""
    try:
        value = from_json(text.strip(), allow_inf_nan=False)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
