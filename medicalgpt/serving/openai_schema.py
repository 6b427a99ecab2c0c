"""Request and error bodies of the OpenAI API, as pydantic models."""

import difflib
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from medicalgpt.serving.generation import MAX_SEED
from medicalgpt.serving.stop_strings import MAX_STOP_CHARS, MAX_STOPS

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
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
MAX_BIASES = 1024
MAX_PROMPTS = 1024
MAX_EMBEDDINGS = 2048
MAX_PROMPT_TOKENS = 1_000_000
FAIL_FAST = Field(fail_fast=True)
# Longer names of fields are not compared with those that are known.
LONGEST_TYPO = 64
NO_EFFECT = "Has no effect on the answer."


class Body(BaseModel):
    """Strict: values are not converted. Unknown fields have no effect, see `unknown_fields`."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
    # Fields of other servers, or of other models, that would change the answer: what they may be, and the way out.
    unsupported: ClassVar[Mapping[str, tuple[Any, str]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, value: Any) -> Any:
        for name in cls.unsupported.keys() & (value.keys() if isinstance(value, dict) else ()):
            neutral, reason = cls.unsupported[name]
            if value[name] not in (None, neutral):
                raise PydanticCustomError("unsupported_field", "{text}", {"text": reason, "field": name})
        return value


def unknown_fields(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """The fields of a body of which nothing is known, so that they have no effect: each with what may be meant."""
    if isinstance(value, Body):
        known = [field.alias or name for name, field in type(value).model_fields.items()]
        for name in value.model_extra or {}:
            if name not in value.unsupported:
                near = difflib.get_close_matches(name[:LONGEST_TYPO], known, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}."
                yield f"{path}.{name}" if path else name, hint
        for name in type(value).model_fields:
            yield from unknown_fields(getattr(value, name), f"{path}.{name}" if path else name)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from unknown_fields(item, f"{path}[{number}]")


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


class TextPart(Body):
    type: Literal["text"]
    text: str
    cache_control: Any = Field(None, description=NO_EFFECT)

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
    cache_control: Any = Field(None, description=NO_EFFECT)
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


class AssistantPart(Body):
    """A part of an earlier answer: text, a refusal, or reasoning in one of the forms in which clients keep it."""

    type: Literal["text", "output_text", "refusal", "thinking", "redacted_thinking", "reasoning"]
    text: str | None = None
    refusal: str | None = None
    thinking: str | None = None
    cache_control: Any = Field(None, description=NO_EFFECT)
    signature: Any = Field(None, description=NO_EFFECT)
    data: Any = Field(None, description=NO_EFFECT)
    annotations: Any = Field(None, description=NO_EFFECT)

    @property
    def said(self) -> str:
        return (self.refusal or "") if self.type == "refusal" else "" if self.thought else self.text or ""

    @property
    def thought(self) -> str:
        return (self.thinking or self.text or "") if self.type in ("thinking", "reasoning") else ""


class CalledFunction(Body):
    name: str
    arguments: str


class ToolCall(Body):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = Field(None, description=NO_EFFECT)


class Named(Body):
    """A message, which may name who says it: models here are not shown names."""

    name: str | None = Field(None, description=NO_EFFECT)
    cache_control: Any = Field(None, description=NO_EFFECT)


class SystemMessage(Named):
    role: Literal["system", "developer"]
    content: Content


class UserMessage(Named):
    role: Literal["user"]
    content: Annotated[str | Annotated[list[UserPart], FAIL_FAST], at_most(MAX_PARTS)]


class AssistantMessage(Named):
    """An earlier answer, with its reasoning in any of the fields in which clients send it back."""

    role: Literal["assistant"]
    content: Annotated[str | Annotated[list[AssistantPart], FAIL_FAST] | None, at_most(MAX_PARTS)] = None
    tool_calls: Annotated[Annotated[list[ToolCall], FAIL_FAST] | None, at_most(MAX_TOOLS)] = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    thinking_blocks: Annotated[Annotated[list[AssistantPart], FAIL_FAST] | None, at_most(MAX_PARTS)] = None
    refusal: str | None = None
    annotations: Any = Field(None, description=NO_EFFECT)
    audio: None = None
    function_call: None = None

    @property
    def thoughts(self) -> str:
        """The reasoning before the answer, empty if there is none."""
        parts = [*(self.content if isinstance(self.content, list) else ()), *(self.thinking_blocks or ())]
        return self.reasoning_content or self.reasoning or "".join(part.thought for part in parts)


class ToolMessage(Named):
    role: Literal["tool"]
    content: Content
    tool_call_id: str


class OfferedFunction(Body):
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: OfferedFunction
    cache_control: Any = Field(None, description=NO_EFFECT)
    _written: dict[str, Any] = PrivateAttr()

    @model_validator(mode="wrap")
    @classmethod
    def _keep_written(cls, value: Any, validate: Callable[[Any], "Tool"]) -> "Tool":
        tool = validate(value)
        if isinstance(value, dict):
            tool.keep(value)
        return tool

    def keep(self, written: dict[str, Any]) -> None:
        self._written = written

    @property
    def rendered(self) -> dict[str, Any]:
        """What the template gets: the tool as it was written, as in training, without what is of the API only."""
        written = {key: self._written[key] for key in self._written if key in ("type", "function")}
        shown = ("name", "description", "parameters")
        return {**written, "function": {key: written["function"][key] for key in written["function"] if key in shown}}


class FunctionName(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: FunctionName


class AnswerSchema(Body):
    """A JSON schema that the answer is held to."""

    name: str | None = Field(None, description=NO_EFFECT)
    description: str | None = Field(None, description=NO_EFFECT)
    schema_: dict[str, Any] | bool = Field(alias="schema")
    strict: bool | None = Field(None, description="Has no effect: the answer always follows the schema.")


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: AnswerSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("a format of type json_schema has the field json_schema, and others do not.")
        return self

    @property
    def wanted(self) -> Any:
        """The schema of the answer; None if it is text."""
        return {"json_object": {"type": "object"}, "json_schema": self.json_schema and self.json_schema.schema_}.get(
            self.type
        )


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(None, description=NO_EFFECT)


Penalty = Annotated[float | None, Field(ge=-2, le=2)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
_FORMAT = "use response_format with a json_schema."
# Fields of vLLM and others.
UNSUPPORTED = {
    "use_beam_search": (False, "beams are not searched; use n."),
    "length_penalty": (1, "beams are not searched."),
    "stop_token_ids": ([], "use stop, with the text of the tokens."),
    "include_stop_str_in_output": (False, "a stop string is never part of the answer; append it yourself."),
    "bad_words": ([], "use logit_bias with the ids of their tokens."),
    "allowed_token_ids": ([], "use logit_bias, or " + _FORMAT),
    "skip_special_tokens": (True, "special tokens are never part of the text."),
    "truncate_prompt_tokens": (0, "a prompt is never cut; shorten it yourself."),
    "prompt_logprobs": (0, "use /v1/completions with echo and logprobs."),
    "guided_json": (None, _FORMAT),
    "guided_regex": (None, "use response_format with a json_schema that has a pattern."),
    "guided_choice": (None, "use response_format with a json_schema that has an enum."),
    "guided_grammar": (None, _FORMAT),
    "structured_outputs": (None, _FORMAT),
    "chat_template": (None, "the model's own template is used; the flag --template_name chooses another."),
    "add_generation_prompt": (True, "an answer is always a turn of its own."),
    "continue_final_message": (False, "an answer is always a turn of its own; continue a text in /v1/completions."),
    "documents": ([], "put them into a message."),
    "functions": ([], "use tools."),
    "function_call": ("none", "use tool_choice."),
    "audio": (None, "answers are text."),
    "web_search_options": (None, "nothing is searched here; offer a tool."),
    "verbosity": ("medium", "ask for a short or a long answer in the prompt."),
}


class Generation(Body):
    """Fields that both kinds of requests share."""

    unsupported = UNSUPPORTED

    model: str = Field(max_length=256)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(
        None, ge=-1, description="An extension: sample from the k most likely tokens; 0 or -1: from all."
    )
    min_p: float | None = Field(
        None, ge=0, le=1, description="An extension: sample from tokens at least this share as likely as the best."
    )
    repetition_penalty: float | None = Field(None, gt=0, le=10, description="An extension.")
    min_tokens: int | None = Field(None, ge=0, description="An extension: the model does not end the answer before.")
    ignore_eos: bool | None = Field(None, description="An extension: the model does not end the answer at all.")
    stop: Annotated[Stop | Annotated[list[Stop], FAIL_FAST] | None, at_most(MAX_STOPS)] = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(None, ge=0, lt=MAX_SEED)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: Penalty = None
    presence_penalty: Penalty = None
    logit_bias: Annotated[
        dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] | None,
        at_most(MAX_BIASES),
    ] = None
    user: str | None = Field(None, description=NO_EFFECT)
    safety_identifier: str | None = Field(None, description=NO_EFFECT)
    prompt_cache_key: str | None = Field(None, description=NO_EFFECT)
    prompt_cache_retention: Any = Field(None, description=NO_EFFECT)
    service_tier: str | None = Field(None, description=NO_EFFECT)
    metadata: Annotated[dict[str, Any] | None, at_most(MAX_METADATA)] = Field(None, description=NO_EFFECT)
    store: bool | None = Field(None, description="Has no effect: nothing is stored.")
    prediction: Any = Field(None, description=NO_EFFECT)

    @property
    def samples(self) -> bool:
        """Whether it asks for what only a sampled answer can have, and names no temperature."""
        drawn = (self.n or 1) > 1 or (self.top_p or 1) < 1 or (self.top_k or 0) > 0 or (self.min_p or 0) > 0
        return self.temperature is None and drawn


class ChatRequest(Generation):
    messages: Annotated[
        list[Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]],
        Field(min_length=1, fail_fast=True),
        at_most(MAX_MESSAGES),
    ]
    max_completion_tokens: int | None = Field(None, ge=1)
    tools: Annotated[
        Annotated[list[Tool], Field(min_length=1, fail_fast=True)] | None,
        at_most(MAX_TOOLS),
    ] = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    modalities: Annotated[list[str] | None, require_neutral(["text"], "answers are text; leave it out.")] = None
    reasoning_effort: str | None = Field(None, description="For templates that read it; without effect in others.")
    chat_template_kwargs: Annotated[dict[str, Any] | None, at_most(MAX_METADATA)] = Field(
        None, description="An extension: variables of the chat template, enable_thinking for example."
    )


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
    max_tokens: int | None = Field(None, ge=0)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None
    suffix: Annotated[str | None, require_neutral("", "the model can only continue a text, not fill in.")] = None
    best_of: int | None = Field(None, ge=1)


class EmbeddingRequest(Body):
    model: str = Field(max_length=256)
    input: Annotated[str | Annotated[list[str], Field(min_length=1), FAIL_FAST], at_most(MAX_EMBEDDINGS)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1)
    user: str | None = Field(None, description=NO_EFFECT)

    @model_validator(mode="before")
    @classmethod
    def _texts(cls, value: Any) -> Any:
        texts = value.get("input") if isinstance(value, dict) else None
        if isinstance(texts, list) and texts and isinstance(texts[0], int | list):
            reason = (
                "token ids are those of another vocabulary; send text (check_embedding_ctx_length=False in LangChain)."
            )
            raise PydanticCustomError("unsupported_field", "{text}", {"text": reason, "field": "input"})
        return value


class TokenizeRequest(Body):
    """A text, or a conversation."""

    model: str | None = Field(None, max_length=256)
    prompt: str | None = None
    messages: Annotated[list[Any] | None, at_most(MAX_MESSAGES)] = None
    tools: Annotated[list[Any] | None, at_most(MAX_TOOLS)] = None
    chat_template_kwargs: Annotated[dict[str, Any] | None, at_most(MAX_METADATA)] = None
    add_special_tokens: bool | None = Field(None, description="Of a text; True by default.")
    add_generation_prompt: Annotated[bool | None, require_neutral(True, "an answer is always a turn of its own.")] = (
        None
    )
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("either prompt or messages is needed.")
        return self


class DetokenizeRequest(Body):
    model: str | None = Field(None, max_length=256)
    tokens: Annotated[Annotated[list[Annotated[int, Field(ge=0)]], FAIL_FAST], at_most(MAX_PROMPT_TOKENS)]


class LoadAdapterRequest(Body):
    unsupported = {"load_inplace": (False, "unload the adapter first.")}

    lora_name: str = Field(min_length=1, max_length=256)
    lora_path: str = Field(min_length=1)


class UnloadAdapterRequest(Body):
    lora_name: str = Field(min_length=1, max_length=256)
    lora_int_id: int | None = Field(None, description=NO_EFFECT)


class ErrorInfo(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorInfo
