"""OpenAI's Responses interface on top of chat completions: requests, and answers as items, whole and streamed.

Nothing is stored, so a request has the whole conversation in `input`.
"""

import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from medicalgpt.serving.answer_parts import CallPiece, ThoughtReader
from medicalgpt.serving.generation import Answer
from medicalgpt.serving.openai_forms import call_id, called, calls_of
from medicalgpt.serving.openai_schema import (
    FAIL_FAST,
    MAX_MESSAGES,
    MAX_METADATA,
    MAX_PARTS,
    MAX_TOOLS,
    NO_EFFECT,
    Body,
    ChatRequest,
    at_most,
    require_neutral,
)
from medicalgpt.serving.served_models import ServedModel

from pydantic import Field

STORED = "nothing is stored here; send the whole conversation in input."


class ResponseFunction(Body):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseToolName(Body):
    type: Literal["function"]
    name: str


class TextFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = Field(None, description=NO_EFFECT)
    description: str | None = Field(None, description=NO_EFFECT)
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="Has no effect: the answer always follows the schema.")


class TextSettings(Body):
    unsupported = {"verbosity": ("medium", "ask for a short or a long answer in the prompt.")}

    format: TextFormat | None = None


class ReasoningSettings(Body):
    effort: str | None = Field(None, description="For templates that read it; without effect in others.")
    summary: str | None = Field(None, description="Has no effect: the reasoning is returned as it is.")
    generate_summary: str | None = Field(None, description=NO_EFFECT)


class ResponsePart(Body):
    """A part of a message, of a result, or of reasoning."""

    type: Literal["input_text", "output_text", "text", "input_image", "refusal", "reasoning_text", "summary_text"]
    text: str | None = None
    refusal: str | None = None
    image_url: str | None = None
    detail: Annotated[
        str | None, require_neutral("auto", "images are scaled as in training, whatever the request says.")
    ] = None
    annotations: Any = Field(None, description=NO_EFFECT)
    logprobs: Any = Field(None, description=NO_EFFECT)


Parts = Annotated[str | Annotated[list[ResponsePart], FAIL_FAST], at_most(MAX_PARTS)]


class Item(Body):
    """A message, a call, its result, or reasoning."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    id: str | None = Field(None, description=NO_EFFECT)
    status: str | None = Field(None, description=NO_EFFECT)
    phase: str | None = Field(None, description=NO_EFFECT)
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: Parts | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: Parts | None = None
    summary: Annotated[Annotated[list[ResponsePart], FAIL_FAST] | None, at_most(MAX_PARTS)] = None
    encrypted_content: str | None = Field(None, description=NO_EFFECT)


class ResponseRequest(Body):
    unsupported = {
        "previous_response_id": (None, STORED),
        "conversation": (None, STORED),
        "prompt": (None, "prompts are not stored here; send the text in input and instructions."),
        "background": (False, "an answer comes with the response to its request; use stream."),
        "max_tool_calls": (None, "tools are called by the client, which counts their calls."),
        "truncation": ("disabled", "a prompt is never cut; shorten it yourself."),
    }

    model: str = Field(max_length=256)
    input: Annotated[str | Annotated[list[Item], FAIL_FAST], at_most(MAX_MESSAGES)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    tools: Annotated[Annotated[list[ResponseFunction], FAIL_FAST] | None, at_most(MAX_TOOLS)] = None
    tool_choice: Literal["none", "auto", "required"] | ResponseToolName | None = None
    parallel_tool_calls: bool | None = None
    text: TextSettings | None = None
    reasoning: ReasoningSettings | None = None
    stream: bool | None = None
    stream_options: Any = Field(None, description=NO_EFFECT)
    include: Annotated[list[str] | None, at_most(MAX_METADATA)] = Field(None, description=NO_EFFECT)
    store: bool | None = Field(None, description="Has no effect: nothing is stored.")
    metadata: Annotated[dict[str, Any] | None, at_most(MAX_METADATA)] = Field(None, description=NO_EFFECT)
    user: str | None = Field(None, description=NO_EFFECT)
    safety_identifier: str | None = Field(None, description=NO_EFFECT)
    prompt_cache_key: str | None = Field(None, description=NO_EFFECT)
    prompt_cache_retention: Any = Field(None, description=NO_EFFECT)
    service_tier: str | None = Field(None, description=NO_EFFECT)
    top_logprobs: Annotated[int | None, require_neutral(0, "use /v1/chat/completions with logprobs.")] = None
    chat_template_kwargs: Annotated[dict[str, Any] | None, at_most(MAX_METADATA)] = Field(
        None, description="An extension: variables of the chat template, enable_thinking for example."
    )


def to_chat(body: ResponseRequest) -> dict[str, Any]:
    """The same request to chat completions; what is missing or wrong in it is found there.

    Raises:
        ValueError: an item lacks what its type needs.
    """
    chat: dict[str, Any] = {"model": body.model, "messages": _messages(body), "stream": body.stream}
    chat |= {"max_completion_tokens": body.max_output_tokens, "chat_template_kwargs": body.chat_template_kwargs}
    chat |= {name: getattr(body, name) for name in ("temperature", "top_p", "parallel_tool_calls")}
    if body.tools:
        chat["tools"] = [
            {
                "type": "function",
                "function": tool.model_dump(exclude={"type"}, exclude_unset=True, include=_FUNCTION_FIELDS),
            }
            for tool in body.tools
        ]
    choice = body.tool_choice
    if isinstance(choice, ResponseToolName):
        choice = {"type": "function", "function": {"name": choice.name}}
    chat["tool_choice"] = choice
    if body.text and body.text.format:
        given = body.text.format
        chat["response_format"] = {"type": given.type}
        if given.type == "json_schema":
            if given.schema_ is None:
                raise ValueError("text.format.schema: a format of type json_schema needs it.")
            chat["response_format"]["json_schema"] = {"schema": given.schema_}
    if body.reasoning:
        chat["reasoning_effort"] = body.reasoning.effort
    return {name: value for name, value in chat.items() if value is not None}


_FUNCTION_FIELDS = {"name", "description", "parameters", "strict"}


def _messages(body: ResponseRequest) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if body.instructions is not None:
        messages.append({"role": "developer", "content": body.instructions})
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    # Reasoning, text and calls of one turn are items of their own.
    turn: dict[str, Any] | None = None
    for number, item in enumerate(body.input):
        if item.type == "function_call_output" or (item.type == "message" and item.role != "assistant"):
            turn = None
        elif turn is None:
            turn = {"role": "assistant"}
            messages.append(turn)
        if item.type == "reasoning":
            turn["reasoning_content"] = turn.get("reasoning_content", "") + _text(item.content or item.summary)
        elif item.type == "function_call":
            _require(number, item, "call_id", "name", "arguments")
            function = {"name": item.name, "arguments": item.arguments}
            turn.setdefault("tool_calls", []).append({"id": item.call_id, "type": "function", "function": function})
        elif item.type == "function_call_output":
            _require(number, item, "call_id", "output")
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
        else:
            _require(number, item, "role", "content")
            if turn is not None:
                turn["content"] = turn.get("content", "") + _text(item.content)
            else:
                messages.append({"role": item.role, "content": _parts(item.content)})
    # Reasoning that nothing follows.
    return [message for message in messages if set(message) != {"role", "reasoning_content"}]


def _require(number: int, item: Item, *names: str) -> None:
    for name in names:
        if getattr(item, name) is None:
            raise ValueError(f"input[{number}].{name}: an item of type {item.type} needs it.")


def _text(content: str | Sequence[ResponsePart] | None) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.text or part.refusal or "" for part in content or ())


def _parts(content: str | Sequence[ResponsePart]) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    return [
        {"type": "image_url", "image_url": {"url": part.image_url}}
        if part.type == "input_image"
        else {"type": "text", "text": part.text or part.refusal or ""}
        for part in content
    ]


class ResponseForm:
    """The form of one answer: items of reasoning, text and calls, whole and as the events of a stream."""

    ends_with_done = False

    def __init__(self, model: ServedModel, request: ResponseRequest, body: ChatRequest, thoughts_begun: bool):
        self.model = model
        self.request = request
        self.body = body
        self.id = f"resp_{uuid.uuid4().hex}"
        self.created = int(time.time())
        self._reader = ThoughtReader(thoughts_begun)
        self._items: list[dict[str, Any]] = []
        # The last item is not complete yet.
        self._open = False
        self._calls = 0
        self._events: list[dict[str, Any]] = []
        self._number = 0

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        (answer,) = answers
        self._add_text(*self._reader.feed(answer.text))
        self._finish(answer)
        return self._response(answer)

    def opening(self, number: int) -> list[dict[str, Any]]:
        for name in ("created", "in_progress"):
            self._event(f"response.{name}", response=self._response(None))
        return self._taken()

    def piece(self, number: int, piece: str | CallPiece) -> list[dict[str, Any]]:
        if isinstance(piece, str):
            self._add_text(*self._reader.feed(piece))
        else:
            if piece.name is not None:
                self._begin_call({"id": call_id(), "function": {"name": piece.name}})
            if piece.arguments:
                self._add_arguments(piece.arguments)
        return self._taken()

    def ending(self, number: int, answer: Answer) -> list[dict[str, Any]]:
        self._finish(answer)
        return self._taken()

    def closing(self, answers: Sequence[Answer]) -> list[dict[str, Any]]:
        response = self._response(answers[0])
        self._event(f"response.{response['status']}", response=response)
        return self._taken()

    def failure(self, error: dict[str, Any]) -> dict[str, Any]:
        self._event("error", **{name: error["error"][name] for name in ("code", "message", "param")})
        return self._taken()[-1]

    def _event(self, kind: str, **fields: Any) -> None:
        self._events.append({"type": kind, "sequence_number": self._number, **fields})
        self._number += 1

    def _item_event(self, kind: str, **fields: Any) -> None:
        """An event about the last item."""
        self._event(f"response.{kind}", item_id=self._items[-1]["id"], output_index=len(self._items) - 1, **fields)

    def _taken(self) -> list[dict[str, Any]]:
        events, self._events = self._events, []
        return events

    def _begin(self, item: dict[str, Any]) -> None:
        self._close()
        self._items.append(item)
        self._open = True
        self._event("response.output_item.added", output_index=len(self._items) - 1, item=dict(item))

    def _close(self, status: str = "completed") -> None:
        """The last item is complete."""
        if not self._open:
            return
        self._open = False
        item = self._items[-1]
        item["status"] = status
        if item["type"] == "function_call":
            self._item_event("function_call_arguments.done", name=item["name"], arguments=item["arguments"])
        else:
            (part,) = item["content"]
            kind = "output_text" if item["type"] == "message" else "reasoning_text"
            logprobs = {"logprobs": []} if item["type"] == "message" else {}
            self._item_event(f"{kind}.done", content_index=0, text=part["text"], **logprobs)
            self._item_event("content_part.done", content_index=0, part=dict(part))
        self._event("response.output_item.done", output_index=len(self._items) - 1, item=dict(item))

    def _add_text(self, thought: str, said: str) -> None:
        if thought:
            self._extend("reasoning", {"summary": []}, {"type": "reasoning_text", "text": ""}, thought)
        if said:
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            self._extend("message", {"role": "assistant"}, part, said)

    def _extend(self, kind: str, fields: dict[str, Any], part: dict[str, Any], text: str) -> None:
        if not (self._open and self._items[-1]["type"] == kind):
            prefix = {"reasoning": "rs", "message": "msg"}[kind]
            item = {"id": f"{prefix}_{uuid.uuid4().hex}", "type": kind, "status": "in_progress", "content": []} | fields
            self._begin(item)
            self._item_event("content_part.added", content_index=0, part=dict(part))
            item["content"] = [part]
        self._items[-1]["content"][0]["text"] += text
        logprobs = {"logprobs": []} if kind == "message" else {}
        self._item_event(f"{part['type']}.delta", content_index=0, delta=text, **logprobs)

    def _begin_call(self, call: dict[str, Any]) -> None:
        self._calls += 1
        item = {"id": f"fc_{uuid.uuid4().hex}", "type": "function_call", "status": "in_progress"}
        self._begin({**item, "call_id": call["id"], "name": call["function"]["name"], "arguments": ""})

    def _add_arguments(self, text: str) -> None:
        self._items[-1]["arguments"] += text
        self._item_event("function_call_arguments.delta", delta=text)

    def _finish(self, answer: Answer) -> None:
        self._add_text(*self._reader.feed("", last=True))
        for call in calls_of(answer, self.body)[self._calls :]:
            call = called(call)
            self._begin_call(call)
            self._add_arguments(call["function"]["arguments"])
        self._close("incomplete" if answer.finish_reason == "length" else "completed")

    def _response(self, answer: Answer | None) -> dict[str, Any]:
        """The response as far as it is known; `answer` once it is complete."""
        request = self.request
        cut = answer is not None and answer.finish_reason == "length" and not answer.tool_calls
        status = "in_progress" if answer is None else "incomplete" if cut else "completed"
        format_ = request.text.format if request.text else None
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "model": self.model.name,
            "output": [dict(item) for item in self._items],
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": request.reasoning.effort if request.reasoning else None, "summary": None},
            "store": False,
            "temperature": request.temperature,
            "text": {"format": format_.model_dump(by_alias=True, exclude_none=True) if format_ else {"type": "text"}},
            "tool_choice": request.model_dump(include={"tool_choice"})["tool_choice"] or "auto",
            "tools": [tool.model_dump() for tool in request.tools or ()],
            "top_p": request.top_p,
            "truncation": "disabled",
            "usage": None if answer is None else self._usage(answer),
            "metadata": request.metadata or {},
        }

    def _usage(self, answer: Answer) -> dict[str, Any]:
        thoughts = "".join(item["content"][0]["text"] for item in self._items if item["type"] == "reasoning")
        tokens = len(self.model.engine.tokenizer(thoughts, add_special_tokens=False)["input_ids"]) if thoughts else 0
        return {
            "input_tokens": answer.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": answer.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": tokens},
            "total_tokens": answer.prompt_tokens + answer.completion_tokens,
        }
