"""Serve a trained model to every program that speaks the OpenAI API.

    python openai_api.py --model_name_or_path outputs-sft
    MEDICALGPT_API_KEY=choose-one python openai_api.py --model_name_or_path outputs-sft --host 0.0.0.0

Then, from Python (`pip install openai`), with the name of the model's folder as the model:

    client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    client.chat.completions.create(model="outputs-sft", messages=[{"role": "user", "content": "感冒了怎么办？"}])

Routes: POST /v1/chat/completions and /v1/completions, whole or streamed; GET /v1/models, /health, /metrics (for
Prometheus) and /openapi.json. The flags set the defaults of fields that a request omits, temperature for example. A
field that this server cannot honour is refused, never ignored. Prompts and answers are not logged. With
--accept_images True, messages of the user may hold images as data:image/png;base64,...; nothing is fetched.

Several adapters on one base, each under its own name, which requests give as the model:

    python openai_api.py --model_name_or_path Qwen/Qwen3-0.6B --lora_model outputs/cardio,outputs/derma

With a key, every route requires it. Without one, the server listens on this machine only, and answers only requests
that are addressed to it by a name of this machine: no page in a browser can then reach the model under another name.
"""

import asyncio
import codecs
import dataclasses
import itertools
import json
import math
import re
import shlex
import time
import traceback
import uuid
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

from medicalgpt.data.images import ImageError, Picture
from medicalgpt.errors import UserError, run_main
from medicalgpt.models import combining
from medicalgpt.models.templating import tool_format_of
from medicalgpt.models.vision import can_have_images
from medicalgpt.parser import parse_args
from medicalgpt.serving.arguments import ApiArguments
from medicalgpt.serving.batchers import Batcher, BatcherClosedError, ModelFailedError, batcher_from
from medicalgpt.serving.chat import ChatEngine, PromptTooLongError
from medicalgpt.serving.engines import adapted, base_name, engine_from
from medicalgpt.serving.generation import REPLACEMENT, Answer, GenerationRequest, Sampling, sampling_from
from medicalgpt.serving.image_args import ImageServingArguments
from medicalgpt.serving.keys import ApiKeys
from medicalgpt.serving.metrics import AnswerTimer, Metrics
from medicalgpt.serving.openai_schema import (
    MAX_CHOICES,
    AssistantMessage,
    ChatRequest,
    CompletionRequest,
    Content,
    ErrorBody,
    Generation,
    NamedTool,
    SystemMessage,
    ToolMessage,
    UserMessage,
    UserPart,
)
from medicalgpt.serving.prompts import PromptReader, PromptTooLargeError
from medicalgpt.serving.schedule import QueueFullError
from medicalgpt.serving.server import STOPPING_HEADERS, DrainingServer, check_server_flags
from medicalgpt.serving.server_logs import RequestLogMiddleware, ServerStatus, route_of, setup_server_logging
from medicalgpt.serving.web import (
    AccessMiddleware,
    ClientDisconnected,
    ProbeMiddleware,
    RequestRefused,
    bound_socket,
    client_of,
    keys_from,
    origins_from,
    settled,
    url_host,
    wait_for_disconnect,
    with_comments,
)
from template import check_template

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from loguru import logger
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

# Maximum number of images in a request: each is decoded before the length of the prompt is known.
MAX_IMAGES = 16
# How often a sampled answer that fails its check is sampled again.
RETRIES = 2
# Characters of a field's name in an error; a client may have made it up.
LONGEST_PATH = 200
# After how many seconds in which nothing comes a stream says that it is alive.
SECONDS_BETWEEN_COMMENTS = 15.0
# Represents a log-probability of minus infinity, for which JSON has no number.
LEAST_LOG_PROB = -9999.0
# Many programs end a line at these characters, which JSON leaves unescaped.
LINE_ENDS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}


@dataclass
class OpenAIArguments(ImageServingArguments, ApiArguments):
    """Who may send requests, and their limits."""

    served_model_name: str | None = field(
        default=None, metadata={"help": "Name of the model in requests. Default: the last part of its path."}
    )
    allow_origins: str | None = field(
        default=None,
        metadata={
            "help": "Web sites whose pages may send requests from a browser, with commas (https://a.org,https://b.org)."
        },
    )
    max_tokens_limit: int = field(default=4096, metadata={"help": "Maximum tokens that a request may ask for."})


class ApiError(HTTPException):
    """A refusal or failure, in the form of the OpenAI API.

    Args:
        param: the field at fault, `messages[0].content` for example.
        code: a word by which programs recognise it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        type: str = "invalid_request_error",
        headers: dict[str, str] | None = None,
    ):
        super().__init__(status, message, headers)
        self.body = {"error": {"message": message, "type": type, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status_code, self.headers)


def to_api_error(error: Exception) -> ApiError:
    """The response to an exception."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        return invalid_body(error)
    if isinstance(error, RequestRefused):
        return ApiError(error.status_code, error.detail, code=error.code, headers=error.headers)
    if isinstance(error, HTTPException):
        message = f"{error.detail}: GET /openapi.json lists the routes."
        return ApiError(error.status_code, message, headers=error.headers)
    # Without the values of variables, which contain prompts.
    logger.error("".join(traceback.format_exception(error)))
    # Messages not written for users may disclose internals.
    message = str(error) if isinstance(error, UserError) else "The answer failed; the server's log says more."
    return ApiError(500, message, code="internal_error", type="server_error")


def invalid_body(error: RequestValidationError) -> ApiError:
    """What is wrong with a body; for a field with alternatives, judged by the nearest one."""
    problem = max(error.errors(), key=lambda problem: (len(problem["loc"]), not problem["type"].endswith("_type")))
    path, value = "", error.body
    for key in (*problem["loc"][1:], problem.get("ctx", {}).get("field")):
        # Names of alternatives appear between the keys.
        if isinstance(key, int) and isinstance(value, list):
            path += f"[{key}]"
            value = value[key] if key < len(value) else None
        elif isinstance(value, dict) and (key in value or (problem["type"] == "missing" and key == problem["loc"][-1])):
            path += f".{key}" if path else key
            value = value.get(key)
    message = problem["msg"].removeprefix("Value error, ")
    path = path[:LONGEST_PATH]
    return ApiError(400, f"{path or 'the body'}: {message}", param=path or None)


class StrictRequest(Request):
    """JSON as the standard defines it: no NaN, no lone surrogates."""

    async def json(self) -> Any:
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise ApiError(400, f"The body is not valid JSON: {error}.") from error


class StrictRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            # A page in a browser may post other content types to any address without a CORS preflight.
            if request.method == "POST" and kind != "application/json":
                raise ApiError(415, f"The content type is {kind!r}; send JSON with Content-Type: application/json.")
            return await handle(StrictRequest(request.scope, request.receive))

        return handle_strictly


class ServedModel:
    """A name in requests, and what answers to it.

    Attributes:
        takes_tools: whether the chat template can render tools.
    """

    def __init__(self, name: str, engine: ChatEngine):
        self.name = name
        self.engine = engine
        self.takes_tools = tool_format_of(engine.tokenizer) is not None
        self.bytes_of = lru_cache(maxsize=None)(partial(token_bytes, engine.tokenizer))


class Service:
    """What the routes share.

    Attributes:
        models: by their names; several if each adapter has one.
        sampling: the defaults for fields that a request omits.
        status: whether the server is stopping, and what it is answering.
        recent_seconds: how long the last answers took.
    """

    def __init__(self, arguments: OpenAIArguments, engine: ChatEngine, batcher: Batcher, keys: ApiKeys | None):
        self.arguments = arguments
        self.engine = engine
        self.batcher = batcher
        self.keys = keys
        self.sampling = sampling_from(arguments)
        engines = {served_name(arguments, name): each for name, each in engine.siblings.items()}
        engines = engines or {model_name(arguments): engine}
        self.models = {name: ServedModel(name, each) for name, each in engines.items()}
        self.created = int(time.time())
        self.status = ServerStatus()
        self.prompts = PromptReader(arguments.max_prompt_chars)
        self.metrics = Metrics(self.load)
        self.recent_seconds: deque[float] = deque(maxlen=32)

    def seconds_to_wait(self) -> int:
        """After how many seconds one of the running answers may have ended."""
        mean = sum(self.recent_seconds) / len(self.recent_seconds) if self.recent_seconds else 1.0
        return min(60, max(1, math.ceil(mean)))

    def load(self) -> dict[str, tuple[int, int]]:
        """Answers being generated, and queued requests, of each model."""
        return {name: self.batcher.load_of(each.engine.name) for name, each in self.models.items()}

    def name_of(self, adapter: str | None) -> str:
        """The name in requests of an engine."""
        return next((name for name, each in self.models.items() if each.engine.name == adapter), adapter or "")

    @property
    def is_ready(self) -> bool:
        return not self.status.stopping and self.batcher.problem is None

    def note_end(self, scope: Scope) -> None:
        """Measure a request that has ended."""
        record = scope["record"]
        self.metrics.observe_http(record, route_of(scope))
        if record.completion_tokens and record.status == 200:
            self.recent_seconds.append(record.seconds)


class AnswerScope:
    """Sets the deadline of a request, turns errors into responses, and cancels answers when the request has ended."""

    def __init__(self, app: ASGIApp, service: Service):
        self.app = app
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope["deadline"] = asyncio.get_running_loop().time() + self.service.arguments.request_timeout
        # Requested answers, cancelled if they are incomplete when the request ends.
        scope["futures"] = []
        response_started = False

        async def note_start(message: Message) -> None:
            nonlocal response_started
            response_started = response_started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, note_start)
        except ClientDisconnected:
            pass
        except Exception as error:
            refusal = to_api_error(error)
            if not response_started:
                await refusal.response()(scope, receive, note_start)
        finally:
            for future in scope["futures"]:
                future.cancel()


def requests_for(
    model: ServedModel,
    prompts: Sequence[list[int]],
    body: Generation,
    sampling: Sampling,
    client: str,
    tools: list[dict[str, Any]] | None = None,
    pictures: Sequence[Picture] = (),
) -> list[GenerationRequest]:
    """`n` answers to each prompt, the i-th of them sampled with seed + i."""
    samplings = [sampling.with_seed_offset(i) for i in range(body.n or 1)]
    adapter = model.engine.name
    return [
        GenerationRequest(prompt_ids, each, tools, adapter=adapter, client=client, pictures=pictures)
        for prompt_ids in prompts
        for each in samplings
    ]


def resampled(request: GenerationRequest, attempt: int) -> GenerationRequest:
    """The same prompt, to be sampled with another seed."""
    return dataclasses.replace(request, sampling=request.sampling.with_seed_offset(attempt * MAX_CHOICES))


def check_common(service: Service, body: Generation) -> ServedModel:
    """The model of a request.

    Raises:
        ApiError: there is none of this name, or what the schema does not check, in both kinds of requests.
    """
    if body.model not in service.models:
        raise unknown_model(service, body.model)
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options: it has no effect without stream.", param="stream_options")
    if body.temperature is None and service.sampling.temperature == 0:
        for name, idle in (("top_p", 1), ("top_k", 0), ("n", 1)):
            if getattr(body, name) not in (None, idle):
                raise ApiError(
                    400,
                    f"{name}: it has no effect at temperature 0, the default of this server; set a temperature.",
                    param=name,
                )
    return service.models[body.model]


def unknown_model(service: Service, name: str) -> ApiError:
    message = f"There is no model {name!r} here; this server has {', '.join(map(repr, service.models))}."
    return ApiError(404, message, code="model_not_found", param="model")


def sampling_for(service: Service, body: Generation, top_log_probs: int | None) -> Sampling:
    """The sampling settings of a request, with the flags as defaults."""
    limit = service.arguments.max_tokens_limit
    said = [(name, getattr(body, name, None)) for name in ("max_tokens", "max_completion_tokens")]
    wanted = {value for _, value in said if value is not None}
    if len(wanted) > 1:
        raise ApiError(400, "max_tokens and max_completion_tokens differ; set one of them.", param="max_tokens")
    for name, value in said:
        if value is not None and value > limit:
            raise ApiError(400, f"{name}: {value} is above this server's limit of {limit} tokens.", param=name)
    settings = {name: getattr(body, name) for name in ("temperature", "top_p", "top_k", "repetition_penalty", "seed")}
    return dataclasses.replace(
        service.sampling,
        max_new_tokens=wanted.pop() if wanted else service.sampling.max_new_tokens,
        stop=service.sampling.stop if body.stop is None else body.stop,
        top_log_probs=top_log_probs,
        **{name: value for name, value in settings.items() if value is not None},
    )


def image_parts(messages: Sequence[Any]) -> Iterator[tuple[str, UserPart]]:
    """The parts of a request that are images, each with its place in the body."""
    for number, message in enumerate(messages):
        for position, part in enumerate(message.content if isinstance(message.content, list) else ()):
            if part.type == "image_url":
                yield f"messages[{number}].content[{position}]", part


def read_pictures(engine: ChatEngine, messages: Sequence[Any]) -> list[Picture]:
    """The images of a request, checked, in their order.

    Raises:
        ApiError: the model takes text only, or an image cannot be used.
    """
    found = list(image_parts(messages))
    if found and engine.vision is None:
        start = " Start the server with --accept_images True." if can_have_images(engine.model.config) else ""
        message = f"a part of type 'image_url' cannot be read: the model takes text only.{start}"
        raise ApiError(400, f"{found[0][0]}: {message}", param=found[0][0])
    if len(found) > MAX_IMAGES:
        raise ApiError(400, f"messages: {len(found)} images, more than {MAX_IMAGES} in a request.", param="messages")
    pictures = []
    for where, part in found:
        try:
            pictures.append(Picture.from_data_address(part.image_url.url))
        except ImageError as error:
            raise ApiError(400, f"{where}.image_url.url: {error}", param=f"{where}.image_url.url") from error
    return pictures


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


def to_template(messages: Sequence[Any], system_prompt: str | None) -> list[dict[str, Any]]:
    """Messages in the form of the chat template, as in training.

    Templates match tool results to calls by their order, the API by ids: results are put in the order of the calls.

    Raises:
        ApiError: a call without a result, a result without a call, or arguments that are not a JSON object.
    """

    def refuse(number: int, message: str, where: str = "") -> ApiError:
        return ApiError(400, f"messages[{number}]{where}: {message}", param=f"messages[{number}]{where}")

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
        content = parts_of_text(message.content) if has_images else text_of(message.content)
        entry: dict[str, Any] = {"role": role, "content": content}
        if isinstance(message, AssistantMessage):
            if message.content is None and not message.tool_calls:
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


def tools_for(model: ServedModel, body: ChatRequest) -> list[dict[str, Any]] | None:
    """The tools that are offered to the model.

    Raises:
        ApiError: the chat template does not support tools, a field has no effect, or tool_choice names no tool.
    """
    if body.tools is None:
        for name in ("tool_choice", "parallel_tool_calls"):
            if getattr(body, name) not in (None, "none"):
                raise ApiError(400, f"{name}: it has no effect without tools.", param=name)
        return None
    if not model.takes_tools:
        raise ApiError(400, "tools: this model's chat template has no form for tools.", param="tools")
    if body.tool_choice == "none":
        return None
    # `strict` is a field of the API only; the rest is what the model was trained to read.
    tools = [
        {**tool, "function": {key: value for key, value in tool["function"].items() if key != "strict"}}
        for tool in body.tools
    ]
    if isinstance(body.tool_choice, NamedTool):
        name = body.tool_choice.function.name
        tools = [tool for tool in tools if tool["function"]["name"] == name]
        if not tools:
            raise ApiError(400, f"tool_choice: there is no tool {name!r} in tools.", param="tool_choice")
    return tools


def answer_check(body: ChatRequest) -> Callable[[Answer], str | None] | None:
    """A function that says what is wrong with an answer, or None if the request sets no conditions."""
    must_call = body.tool_choice == "required" or isinstance(body.tool_choice, NamedTool)
    one_call = body.parallel_tool_calls is False
    must_be_json = body.response_format is not None and body.response_format.type == "json_object"

    def problem(answer: Answer) -> str | None:
        if must_call and not answer.tool_calls:
            return "calls no tool, which tool_choice asks for"
        if one_call and len(answer.tool_calls) > 1:
            return f"calls {len(answer.tool_calls)} tools, and parallel_tool_calls is false"
        if must_be_json and not answer.tool_calls and read_object(answer.text) is None:
            return "is not a JSON object, which response_format asks for"
        return None

    return problem if must_call or one_call or must_be_json else None


def submit(
    service: Service,
    request: Request,
    jobs: Sequence[GenerationRequest],
    on_text: Callable[[int, str], Any] | None = None,
) -> list["Future[Answer]"]:
    """Queue requests, all of them or none. `on_text` is called from another thread, with the number of the request.

    Raises:
        ApiError: the queue is full, or the server is stopping.
    """
    record, model = request.scope["record"], service.name_of(jobs[0].adapter)
    # Of several answers to one prompt, it counts once.
    record.prompt_tokens = sum({id(job.prompt_ids): len(job.prompt_ids) for job in jobs}.values())
    timers = [AnswerTimer(service.metrics, model, record, len(job.prompt_ids)) for job in jobs]
    bound = [
        dataclasses.replace(job, on_start=timer.on_start, on_token=timer.on_token)
        for job, timer in zip(jobs, timers, strict=True)
    ]
    if on_text is not None:
        bound = [dataclasses.replace(job, on_text=partial(on_text, number)) for number, job in enumerate(bound)]
    try:
        futures = service.batcher.submit_many(bound)
    except QueueFullError as error:
        raise queue_full(service, error) from error
    except BatcherClosedError as error:
        raise stopping() from error
    except ModelFailedError as error:
        raise ApiError(503, f"{error}", code="model_failed", type="server_error") from error
    except PromptTooLongError as error:
        raise ApiError(400, f"{error}", code="context_length_exceeded") from error
    request.scope["futures"] += futures
    for future, timer in zip(futures, timers, strict=True):
        service.status.track(future)
        future.add_done_callback(timer.on_done)
    return futures


def queue_full(service: Service, error: QueueFullError) -> ApiError:
    headers = {"Retry-After": str(service.seconds_to_wait())}
    return ApiError(429, f"{error}", code="queue_full", type="rate_limit_error", headers=headers)


def require_places(service: Service, answers: int) -> None:
    """Raises ApiError if a request asks for more answers than can run and wait."""
    most = service.arguments.max_waiting + service.arguments.max_batch_size
    if answers > most:
        raise ApiError(400, f"The request asks for {answers} answers; this server takes at most {most}.", param="n")


def stopping() -> ApiError:
    message = "The server is stopping."
    return ApiError(503, message, code="stopping", type="server_error", headers=STOPPING_HEADERS)


def timed_out(service: Service) -> ApiError:
    message = f"The answer took longer than {service.arguments.request_timeout:g} s."
    return ApiError(504, message, code="timeout", type="server_error")


async def wait_for(service: Service, request: Request, futures: Sequence["Future[Answer]"]) -> list[Answer]:
    """Raises ApiError after the time limit, ClientDisconnected, or what went wrong in an answer."""
    answers = asyncio.ensure_future(settled(futures))
    leaving = asyncio.ensure_future(wait_for_disconnect(request))
    try:
        async with asyncio.timeout_at(request.scope["deadline"]):
            await asyncio.wait((answers, leaving), return_when=asyncio.FIRST_COMPLETED)
    except TimeoutError as error:
        raise timed_out(service) from error
    else:
        if not answers.done():
            raise ClientDisconnected
        try:
            return answers.result()
        except (QueueFullError, asyncio.CancelledError) as error:
            raise ended_early(service, error) from error
    finally:
        answers.cancel()
        leaving.cancel()


def ended_early(service: Service, error: BaseException) -> ApiError:
    """What a client is told whose answer was dropped from the queue, or cancelled."""
    return queue_full(service, error) if isinstance(error, QueueFullError) else stopping()


async def answers_for(
    service: Service, request: Request, jobs: Sequence[GenerationRequest], check: Callable[[Answer], str | None] | None
) -> list[Answer]:
    """All answers; those that fail the check are sampled again, unless the answers are greedy.

    Raises:
        ApiError: an answer fails the check in the end; and what `wait_for` raises.
    """
    answers: dict[int, Answer] = {}
    missing = list(range(len(jobs)))
    attempts = 1 + RETRIES if check and jobs[0].sampling.temperature > 0 else 1
    for attempt in range(attempts):
        futures = submit(service, request, [resampled(jobs[number], attempt) for number in missing])
        answers.update(zip(missing, await wait_for(service, request, futures), strict=True))
        missing = [number for number in missing if check and check(answers[number])]
        if not missing:
            return [answers[number] for number in range(len(jobs))]
    failed = answers[missing[0]]
    cut = " It was cut by max_tokens." if failed.finish_reason == "length" else ""
    tried = f" (tried {attempts} times)" if attempts > 1 else ""
    message = f"The model's answer {check(failed)}{tried}.{cut}"
    raise ApiError(422, message, code="answer_failed_check", type="invalid_answer_error")


def pieces_of(
    service: Service, request: Request, jobs: Sequence[GenerationRequest]
) -> AsyncIterator[tuple[int, str | Answer]]:
    """Pieces of text with the number of their request as they are generated; each answer after its last piece.

    Raises:
        ApiError: at once if the request is refused; while iterating, after the time limit, or what went wrong in an
            answer; or ClientDisconnected.
    """
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[tuple[int, str | Future[Answer] | None]] = asyncio.Queue()

    def tell(number: int, event: Any) -> None:
        loop.call_soon_threadsafe(events.put_nowait, (number, event))

    futures = submit(service, request, jobs, tell)
    for number, future in enumerate(futures):
        future.add_done_callback(partial(tell, number))
    return received_pieces(service, request, events, len(jobs))


async def received_pieces(
    service: Service, request: Request, events: asyncio.Queue[tuple[int, Any]], open_jobs: int
) -> AsyncIterator[tuple[int, str | Answer]]:
    """What arrives in a queue, until all jobs have ended."""
    leaving = asyncio.ensure_future(wait_for_disconnect(request))
    leaving.add_done_callback(lambda _: events.put_nowait((-1, None)))
    try:
        while open_jobs:
            try:
                async with asyncio.timeout_at(request.scope["deadline"]):
                    number, event = await events.get()
            except TimeoutError as error:
                raise timed_out(service) from error
            if event is None:
                raise ClientDisconnected
            if isinstance(event, Future):
                open_jobs -= 1
                try:
                    event = event.result()
                except (QueueFullError, CancelledError) as error:
                    raise ended_early(service, error) from error
            yield number, event
    finally:
        leaving.cancel()


async def pieces_again(answers: asyncio.Future[list[Answer]]) -> AsyncIterator[tuple[int, str | Answer]]:
    """Whole answers in the form of `pieces_of`."""
    try:
        for number, answer in enumerate(await answers):
            if answer.text:
                yield number, answer.text
            yield number, answer
    finally:
        answers.cancel()


BYTES = {char: byte for byte, char in bytes_to_unicode().items()}


def token_bytes(tokenizer: PreTrainedTokenizerBase, token_id: int) -> bytes | None:
    """The bytes of a token; a character may be split over several tokens. None if they are unknown."""
    name = tokenizer.convert_ids_to_tokens(token_id) or ""
    if byte := re.fullmatch("<0x([0-9A-F]{2})>", name):
        return bytes.fromhex(byte[1])
    text = tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if REPLACEMENT not in text:
        # The space before a first word is not decoded.
        return (" " + text if name.startswith("▁") and not text.startswith(" ") else text).encode()
    return bytes(BYTES[char] for char in name) if all(char in BYTES for char in name) else None


def token_text(known: bytes | None) -> str:
    try:
        return (known or b"").decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in known)


class Form:
    """The form of responses, whole and streamed: what chat and text completions have in common.

    Args:
        prompts: number of prompts; each has the same number of answers.
    """

    def __init__(self, model: ServedModel, body: Generation, prompts: int = 1):
        self.model = model
        self.body = body
        self.prompts = prompts
        self.id = f"{self.id_prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def framed(self, object_name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": self.id, "object": object_name, "created": self.created, "model": self.model.name}
        return {**head, "choices": choices}

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        choices = [self.choice(number, answer) for number, answer in enumerate(answers)]
        return self.framed(self.object_name, choices) | {"usage": self.usage(answers)}

    def usage(self, answers: Sequence[Answer]) -> dict[str, int]:
        prompt = sum(answer.prompt_tokens for answer in answers[:: len(answers) // self.prompts])
        completion = sum(answer.completion_tokens for answer in answers)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def scored(self, answer: Answer) -> list[tuple[bytes | None, float, list[tuple[bytes | None, float]]]]:
        """Each token of the text with its log-probability and the most likely tokens in its place."""
        scores = answer.scores
        # The token that ends a turn is not part of the text.
        if scores and answer.finish_reason == "stop" and scores[-1].token_id in self.model.engine.stop_ids:
            scores = scores[:-1]
        bytes_of = self.model.bytes_of
        return [
            (
                bytes_of(score.token_id),
                max(score.log_prob, LEAST_LOG_PROB),
                [(bytes_of(token_id), max(log_prob, LEAST_LOG_PROB)) for token_id, log_prob in score.top],
            )
            for score in scores
        ]


class ChatForm(Form):
    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def choice(self, number: int, answer: Answer) -> dict[str, Any]:
        """A whole answer."""
        calls = self._calls(answer)
        message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
        if calls:
            message |= {"content": answer.text or None, "tool_calls": calls}
        return {
            "index": number,
            "message": message,
            "logprobs": self._log_probs(answer),
            "finish_reason": "tool_calls" if calls else answer.finish_reason,
        }

    def opening(self, number: int) -> list[dict[str, Any]]:
        """Chunks before the first piece of a stream."""
        return [self._chunk(number, {"role": "assistant", "content": ""})]

    def piece(self, number: int, text: str) -> dict[str, Any]:
        return self._chunk(number, {"content": text})

    def ending(self, number: int, answer: Answer) -> list[dict[str, Any]]:
        """Chunks after the last piece: tool calls, which are known when the text is complete, and the rest."""
        calls = self._calls(answer)
        chunks = [
            self._chunk(number, {"tool_calls": [{"index": position, **call}]}) for position, call in enumerate(calls)
        ]
        last = {"finish_reason": "tool_calls" if calls else answer.finish_reason, "logprobs": self._log_probs(answer)}
        return [*chunks, self._chunk(number, {}) | last]

    def _chunk(self, number: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": number, "delta": delta, "logprobs": None, "finish_reason": None}

    def _calls(self, answer: Answer) -> list[dict[str, Any]]:
        return [
            {
                "id": call.get("id") or f"call_{uuid.uuid4().hex[:24]}",
                "type": "function",
                "function": {
                    "name": call["function"]["name"],
                    "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
                },
            }
            for call in answer.tool_calls
        ]

    def _log_probs(self, answer: Answer) -> dict[str, Any] | None:
        def entry(known: bytes | None, log_prob: float) -> dict[str, Any]:
            return {"token": token_text(known), "logprob": log_prob, "bytes": None if known is None else list(known)}

        if not self.body.logprobs:
            return None
        content = [
            {**entry(known, log_prob), "top_logprobs": [entry(*each) for each in top]}
            for known, log_prob, top in self.scored(answer)
        ]
        return {"content": content, "refusal": None}


class CompletionForm(Form):
    object_name = "text_completion"
    chunk_name = "text_completion"
    id_prefix = "cmpl"

    def choice(self, number: int, answer: Answer) -> dict[str, Any]:
        return {
            "index": number,
            "text": answer.text,
            "logprobs": self._log_probs(answer),
            "finish_reason": answer.finish_reason,
        }

    def opening(self, number: int) -> list[dict[str, Any]]:
        return []

    def piece(self, number: int, text: str) -> dict[str, Any]:
        return {"index": number, "text": text, "logprobs": None, "finish_reason": None}

    def ending(self, number: int, answer: Answer) -> list[dict[str, Any]]:
        return [{**self.choice(number, answer), "text": ""}]

    def _log_probs(self, answer: Answer) -> dict[str, Any] | None:
        if self.body.logprobs is None:
            return None
        scored, decoder, offsets, length = self.scored(answer), codecs.getincrementaldecoder("utf-8")("replace"), [], 0
        for known, _, _ in scored:
            offsets.append(length)
            length += len(decoder.decode(known or b""))
        return {
            "tokens": [token_text(known) for known, _, _ in scored],
            "token_logprobs": [log_prob for _, log_prob, _ in scored],
            "top_logprobs": [{token_text(known): log_prob for known, log_prob in top} for _, _, top in scored],
            "text_offset": offsets,
        }


async def respond(
    service: Service,
    request: Request,
    jobs: Sequence[GenerationRequest],
    form: Form,
    check: Callable[[Answer], str | None] | None = None,
) -> Response:
    """Answer whole or as a stream, as requested. Answers with conditions are sent after they are checked."""
    if not form.body.stream:
        answers = await answers_for(service, request, jobs, check)
        # Probabilities of many tokens take a while to write.
        return await asyncio.to_thread(lambda: JSONResponse(form.whole(answers)))
    if check:
        answers = asyncio.ensure_future(answers_for(service, request, jobs, check))
        # An error that comes soon gets its own status; later ones, and those of other streams, are events.
        if (await asyncio.wait([answers], timeout=SECONDS_BETWEEN_COMMENTS))[0]:
            answers.result()
        events = pieces_again(answers)
    else:
        events = pieces_of(service, request, jobs)
    return StreamingResponse(
        with_comments(stream_of(form, len(jobs), events), SECONDS_BETWEEN_COMMENTS),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )


async def stream_of(form: Form, jobs: int, events: AsyncIterator[tuple[int, str | Answer]]) -> AsyncIterator[bytes]:
    """Events of a stream (https://html.spec.whatwg.org/multipage/server-sent-events.html), each of one line."""
    with_usage = form.body.stream_options is not None and bool(form.body.stream_options.include_usage)
    answers: dict[int, Answer] = {}

    def line(choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> bytes:
        return event_line(form.framed(form.chunk_name, choices) | ({"usage": usage} if with_usage else {}))

    try:
        async with aclosing(events):
            for number in range(jobs):
                for choice in form.opening(number):
                    yield line([choice])
            async for number, event in events:
                if isinstance(event, str):
                    yield line([form.piece(number, event)])
                    continue
                answers[number] = event
                for choice in await asyncio.to_thread(form.ending, number, event):
                    yield await asyncio.to_thread(line, [choice])
        if with_usage:
            yield line([], form.usage([answers[number] for number in range(jobs)]))
        yield b"data: [DONE]\n\n"
    except ClientDisconnected:
        pass
    except Exception as error:
        yield event_line(to_api_error(error).body)


def event_line(value: dict[str, Any]) -> bytes:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return f"data: {text.translate(LINE_ENDS)}\n\n".encode()


ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}
router = APIRouter(route_class=StrictRoute, responses=ERRORS)


@router.post("/v1/chat/completions")
async def chat_completions(request: Request, body: ChatRequest) -> Any:
    """Answer a conversation."""
    service: Service = request.app.state.service
    model = check_common(service, body)
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs: it has no effect without logprobs.", param="top_logprobs")
    sampling = sampling_for(service, body, (body.top_logprobs or 0) if body.logprobs else None)
    tools = tools_for(model, body)
    require_places(service, body.n or 1)
    pictures = await asyncio.to_thread(read_pictures, model.engine, body.messages)
    messages = to_template(body.messages, service.arguments.system_prompt)
    client = client_of(request.scope)
    prompt_ids = await tokenized(service, client, "messages", (messages, tools, pictures), chat_ids, model.engine)
    jobs = requests_for(model, [prompt_ids], body, sampling, client, tools, pictures)
    return await respond(service, request, jobs, ChatForm(model, body), answer_check(body))


@router.post("/v1/completions")
async def completions(request: Request, body: CompletionRequest) -> Any:
    """Continue a raw text, without the chat template."""
    service: Service = request.app.state.service
    model = check_common(service, body)
    if body.best_of not in (None, body.n or 1):
        raise ApiError(400, "best_of: answers are not ranked here; use n.", param="best_of")
    sampling = sampling_for(service, body, body.logprobs)
    several = isinstance(body.prompt, list) and (not body.prompt or not isinstance(body.prompt[0], int))
    prompts = body.prompt if several else [body.prompt]
    if not prompts:
        raise ApiError(400, "prompt: it is empty.", param="prompt")
    require_places(service, len(prompts) * (body.n or 1))
    client = client_of(request.scope)
    ids = await tokenized(service, client, "prompt", prompts, completion_ids, model.engine)
    jobs = requests_for(model, ids, body, sampling, client)
    return await respond(service, request, jobs, CompletionForm(model, body, len(ids)))


async def tokenized(
    service: Service, client: str, param: str, value: Any, function: Callable[..., Any], engine: ChatEngine
) -> Any:
    """What `function(value, engine)` returns, off the event loop.

    Raises:
        ApiError: the prompt is too long, or cannot be rendered.
    """
    try:
        return await service.prompts.read(client, value, function, engine)
    except (PromptTooLongError, PromptTooLargeError) as error:
        raise ApiError(400, f"{error}", code="context_length_exceeded", param=param) from error
    except (UserError, ValueError) as error:
        raise ApiError(400, f"{error}", param=param) from error


def chat_ids(
    value: tuple[list[dict[str, Any]], list[dict[str, Any]] | None, list[Picture]], engine: ChatEngine
) -> list[int]:
    """Token ids of a conversation with the tools that are offered in it, and its images."""
    return engine.prompt_ids(*value)


def completion_ids(prompts: Sequence[str | list[int]], engine: ChatEngine) -> list[list[int]]:
    """Raises ValueError if a prompt is empty, too long, or not of this vocabulary."""
    known = engine.model.get_input_embeddings().weight.shape[0]
    found = []
    for prompt in prompts:
        if isinstance(prompt, str):
            prompt = engine.completion_ids(prompt)
        elif not prompt or not all(0 <= token_id < known for token_id in prompt):
            raise ValueError(f"A prompt of token ids has at least one, and each is from 0 to {known - 1}.")
        engine.require_room(prompt)
        found.append(prompt)
    return found


@router.get("/v1/models")
async def models(request: Request) -> Any:
    """The model that is served, or the base and its adapters."""
    service: Service = request.app.state.service
    return {"object": "list", "data": [described(service, each) for each in service.models.values()]}


@router.get("/v1/models/{model:path}")
async def one_model(request: Request, model: str) -> Any:
    """The model of this name."""
    service: Service = request.app.state.service
    if model not in service.models:
        raise unknown_model(service, model)
    return described(service, service.models[model])


def described(service: Service, model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": service.created,
        "owned_by": "medicalgpt",
        "max_model_len": model.engine.context_length,
    }


@router.get("/health")
async def health(request: Request) -> Any:
    """Responds as soon as the model can answer, with an error if it cannot any more."""
    if problem := request.app.state.service.batcher.problem:
        raise ApiError(503, problem, code="model_failed", type="server_error")
    return {"status": "ok"}


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Metrics for Prometheus."""
    return Response(generate_latest(request.app.state.service.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def make_app(service: Service, origins: Sequence[str] = ()) -> FastAPI:
    # The usual documentation pages would load scripts from another host.
    app = FastAPI(title="MedicalGPT", docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.service = service
    app.include_router(router)
    for kind in (HTTPException, RequestValidationError):
        app.add_exception_handler(kind, answer_error)
    app.add_middleware(
        AccessMiddleware,
        refuse=lambda refusal: to_api_error(refusal).response(),
        keys=service.keys,
        max_body_bytes=lambda scope: service.arguments.max_request_bytes,
        body_seconds=service.arguments.body_timeout,
    )
    app.add_middleware(AnswerScope, service=service)
    app.add_middleware(
        RequestLogMiddleware,
        status=service.status,
        refusal=lambda: stopping().response(),
        on_end=service.note_end,
    )
    if origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(origins), allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    app.add_middleware(ProbeMiddleware, ready=lambda: service.is_ready)
    return app


async def answer_error(request: Request, error: Exception) -> Response:
    return to_api_error(error).response()


def main() -> None:
    (arguments,) = parse_args(OpenAIArguments, description=__doc__, program="openai_api.py", env_prefix="MEDICALGPT_")
    setup_server_logging(arguments.log_format)
    # Errors in the flags show before minutes are spent on loading a model.
    keys, origins = keys_from(arguments), origins_from(arguments.allow_origins)
    check_limits(arguments)
    with bound_socket(arguments) as listener:
        engine = engine_from(arguments, by_name=True, with_images=arguments.accept_images)
        for each in adapted(engine):
            check_template(each.tokenizer, arguments.template_name)
        batcher = batcher_from(engine, arguments)
        service = Service(arguments, engine, batcher, keys)
        try:
            DrainingServer(
                make_app(service, origins),
                arguments,
                batcher=batcher,
                status=service.status,
                listener=listener,
                on_started=lambda: announce(service, listener.getsockname()[1]),
            ).run()
        finally:
            batcher.close(finish=False)
    if batcher.failure is not None:
        raise UserError(batcher.failure)
    logger.info("stopped")


def model_name(arguments: OpenAIArguments) -> str:
    return arguments.served_model_name or base_name(arguments.model_name_or_path)


def served_name(arguments: OpenAIArguments, name: str) -> str:
    """The name in requests of one of several adapters, or of the base, to which --served_model_name applies."""
    return model_name(arguments) if name == base_name(arguments.model_name_or_path) else name


def check_limits(arguments: OpenAIArguments) -> None:
    """Raises UserError for limits that make no sense."""
    sampling_from(arguments)
    check_server_flags(arguments)
    if not arguments.max_tokens_limit > 0:
        raise UserError(f"--max_tokens_limit is {arguments.max_tokens_limit}, it must be above 0.")
    if arguments.served_model_name in combining.named_adapters(arguments.lora_model):
        raise UserError(
            f"--served_model_name {arguments.served_model_name} is the name of an adapter. Give the base another name."
        )
    if arguments.max_new_tokens > arguments.max_tokens_limit:
        raise UserError(
            f"--max_new_tokens {arguments.max_new_tokens} is above --max_tokens_limit {arguments.max_tokens_limit}; "
            "lower the first or raise the second."
        )


def announce(service: Service, port: int) -> None:
    """Print the address, with a command that asks the model; in a log of JSON, the address only."""
    host = service.arguments.host
    # The wildcard address cannot be asked.
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    scheme = "https" if service.arguments.ssl_certfile else "http"
    url = f"{scheme}://{url_host(host)}:{port}"
    names = list(service.models)
    if service.arguments.log_format == "json":
        logger.info(f"serving {', '.join(names)} on {url}/v1")
        return
    question = {"model": names[0], "messages": [{"role": "user", "content": "感冒了怎么办？"}]}
    key = ' -H "Authorization: Bearer $MEDICALGPT_API_KEY"' if service.keys else ""
    print(
        f"Serving {', '.join(names)} on {url}/v1 (Ctrl-C stops). Ask it:\n\n"
        f"    curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' \\\n"
        f"        -d {shlex.quote(json.dumps(question, ensure_ascii=False))}\n",
        flush=True,
    )


if __name__ == "__main__":
    run_main(main)
