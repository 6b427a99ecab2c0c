"""Request and error bodies of the OpenAI API, as pydantic models."""

import difflib
from collections.abc import Callable
from typing import Annotated, Any, Literal

from medicalgpt.serving.generation import MAX_SEED
from medicalgpt.serving.stop_strings import MAX_STOP_CHARS, MAX_STOPS

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

# Maximum number of answers to one prompt.
MAX_CHOICES = 16
# Lists are counted before their items are looked at: an error for each of a million items would take a minute.
MAX_MESSAGES = 1000
MAX_PARTS = 32
MAX_TOOLS = 128
MAX_METADATA = 16
MAX_PROMPTS = 1024
MAX_PROMPT_TOKENS = 1_000_000
FAIL_FAST = Field(fail_fast=True)
# Longer names of fields are not compared with those that are known.
LONGEST_TYPO = 64


class Body(BaseModel):
    """Strict: values are not converted, unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        for name in value if isinstance(value, dict) else ():
            if name not in cls.model_fields:
                near = difflib.get_close_matches(name[:LONGEST_TYPO], cls.model_fields, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(cls.model_fields)}."
                raise PydanticCustomError("unknown_field", "{text}", {"text": f"unknown field: {hint}", "field": name})
        return value


def at_most(count: int) -> BeforeValidator:
    """A list or an object of a bounded size, which is checked before its items."""

    def check(value: Any) -> Any:
        if isinstance(value, list | dict) and len(value) > count:
            raise ValueError(f"it has {len(value)} items, at most {count} are accepted.")
        return value

    return BeforeValidator(check)


def require_neutral(neutral: Any, reason: str) -> AfterValidator:
    """A field of the OpenAI API that may only have the value that changes nothing."""

    def check(value: Any) -> Any:
        if value is not None and value != neutral:
            raise ValueError(reason)
        return value

    return AfterValidator(check)


def _validate_unchanged(value: Any, validate: Callable[[Any], Any]) -> Any:
    validate(value)
    return value


class TextPart(Body):
    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _text_only(cls, value: Any) -> Any:
        kind = value.get("type") if isinstance(value, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise ValueError(f"a part of type {kind!r} cannot be read: the model takes text only.")
        return value


Content = Annotated[str | Annotated[list[TextPart], FAIL_FAST], at_most(MAX_PARTS)]


class ImageAddress(Body):
    url: str
    detail: Annotated[
        str | None, require_neutral("auto", "images are scaled as in training, whatever the request says.")
    ] = None


class UserPart(Body):
    """Text or an image."""

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageAddress | None = None

    @model_validator(mode="before")
    @classmethod
    def _known_kind(cls, value: Any) -> Any:
        kind = value.get("type") if isinstance(value, dict) else None
        if isinstance(kind, str) and kind not in ("text", "image_url"):
            raise ValueError(f"a part of type {kind!r} cannot be read: models here take text, some images too.")
        return value

    @model_validator(mode="after")
    def _has_its_own(self) -> "UserPart":
        other = "image_url" if self.type == "text" else "text"
        if getattr(self, self.type) is None or getattr(self, other) is not None:
            raise ValueError(f"a part of type {self.type!r} has the field {self.type}, and not {other}.")
        return self


class CalledFunction(Body):
    name: str
    arguments: str


class ToolCall(Body):
    id: str
    type: Literal["function"]
    function: CalledFunction


class SystemMessage(Body):
    role: Literal["system", "developer"]
    content: Content


class UserMessage(Body):
    role: Literal["user"]
    content: Annotated[str | Annotated[list[UserPart], FAIL_FAST], at_most(MAX_PARTS)]


class AssistantMessage(Body):
    role: Literal["assistant"]
    content: Content | None = None
    tool_calls: Annotated[Annotated[list[ToolCall], FAIL_FAST] | None, at_most(MAX_TOOLS)] = None
    # Empty in answers of this server; clients send them back with the message.
    refusal: None = None
    annotations: Annotated[list[Any] | None, at_most(0)] = None
    audio: None = None
    function_call: None = None


class ToolMessage(Body):
    role: Literal["tool"]
    content: Content
    tool_call_id: str


class OfferedFunction(Body):
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Annotated[bool | None, require_neutral(False, "arguments cannot be held to the schema.")] = None


class Tool(Body):
    type: Literal["function"]
    function: OfferedFunction


class FunctionName(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: FunctionName


class ResponseFormat(Body):
    type: Literal["text", "json_object"]

    @model_validator(mode="before")
    @classmethod
    def _no_schema(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("type") == "json_schema":
            raise ValueError("answers cannot be held to a schema. Use json_object, and put the schema into the prompt.")
        return value


class StreamOptions(Body):
    include_usage: bool | None = None


Penalty = Annotated[float | None, require_neutral(0, "only 0 is supported; there is repetition_penalty.")]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]


class Generation(Body):
    """Fields that both kinds of requests share."""

    model: str = Field(max_length=256)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(
        None, ge=0, description="An extension: sample from the k most likely tokens; 0: from all."
    )
    repetition_penalty: float | None = Field(None, gt=0, le=10, description="An extension.")
    stop: Annotated[Stop | Annotated[list[Stop], FAIL_FAST] | None, at_most(MAX_STOPS)] = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(None, ge=0, lt=MAX_SEED)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: Penalty = None
    presence_penalty: Penalty = None
    logit_bias: Annotated[
        dict[str, float] | None, at_most(MAX_METADATA), require_neutral({}, "logits cannot be changed here.")
    ] = None
    user: str | None = Field(None, description="Has no effect, as in the OpenAI API itself.")


class ChatRequest(Generation):
    messages: Annotated[
        list[Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]],
        Field(min_length=1, fail_fast=True),
        at_most(MAX_MESSAGES),
    ]
    max_completion_tokens: int | None = Field(None, ge=1)
    # Templates render a tool as it was written, in training and here.
    tools: Annotated[
        Annotated[list[Annotated[Tool, WrapValidator(_validate_unchanged)]], Field(min_length=1, fail_fast=True)]
        | None,
        at_most(MAX_TOOLS),
    ] = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    metadata: Annotated[dict[str, str] | None, at_most(MAX_METADATA)] = Field(
        None, description="Has no effect, as in the OpenAI API itself."
    )
    store: Annotated[bool | None, require_neutral(False, "this server stores nothing.")] = None


def _count_prompts(value: Any) -> Any:
    """Many prompts are refused before any of them is looked at; one may be a long list of token ids."""
    one = isinstance(value, list) and value and isinstance(value[0], int)
    return at_most(MAX_PROMPT_TOKENS if one else MAX_PROMPTS).func(value)


class CompletionRequest(Generation):
    prompt: Annotated[
        str
        | Annotated[list[str], FAIL_FAST]
        | Annotated[list[int], FAIL_FAST]
        | Annotated[list[Annotated[list[int], FAIL_FAST, at_most(MAX_PROMPT_TOKENS)]], FAIL_FAST],
        BeforeValidator(_count_prompts),
    ]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: Annotated[bool | None, require_neutral(False, "an answer never repeats its prompt here.")] = None
    suffix: Annotated[str | None, require_neutral("", "the model can only continue a text, not fill in.")] = None
    best_of: int | None = Field(None, ge=1)


class ErrorInfo(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorInfo
