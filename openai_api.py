"""Serve a trained model to every program that speaks the OpenAI API.

    python openai_api.py --model_name_or_path outputs-sft
    MEDICALGPT_API_KEY=choose-one python openai_api.py --model_name_or_path outputs-sft --host 0.0.0.0

Then, from Python (`pip install openai`), with the name of the model's folder as the model:

    client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    client.chat.completions.create(model="outputs-sft", messages=[{"role": "user", "content": "感冒了怎么办？"}])

Routes: POST /v1/chat/completions, /v1/responses and /v1/completions, whole or streamed, /v1/embeddings, /tokenize and
/detokenize; GET /v1/models, /health, /metrics (for Prometheus) and /openapi.json. The flags set the defaults of fields
that a request omits, temperature for example. A field that would change the answer and cannot be honoured is refused;
an unknown one is named in the header x-ignored-fields. Prompts and answers are not logged. With
--accept_images True, messages of the user may hold images as data:image/png;base64,...; nothing is fetched.

Several adapters on one base, each under its own name, which requests give as the model:

    python openai_api.py --model_name_or_path Qwen/Qwen3-0.6B --lora_model outputs/cardio,outputs/derma

With a key, every route requires it. Without one, the server listens on this machine only, and answers only requests
that are addressed to it by a name of this machine: no page in a browser can then reach the model under another name.
"""

import asyncio
import dataclasses
import itertools
import json
import math
import shlex
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import quote
from weakref import WeakValueDictionary

from medicalgpt.data.images import ImageError, Picture
from medicalgpt.errors import UserError, run_main
from medicalgpt.models import combining
from medicalgpt.models.vision import can_have_images
from medicalgpt.parser import parse_args
from medicalgpt.serving.answer_parts import CallPiece
from medicalgpt.serving.arguments import ApiArguments
from medicalgpt.serving.batchers import Batcher, BatcherClosedError, ModelFailedError, batcher_from
from medicalgpt.serving.chat import ChatEngine, PromptTooLongError
from medicalgpt.serving.embeddings import Encoder, embedding_list
from medicalgpt.serving.engines import NamedEngines, adapted, base_name, engine_from
from medicalgpt.serving.generation import Answer, GenerationRequest, Sampling, TokenScore, sampling_from
from medicalgpt.serving.guides import (
    ANY_OBJECT,
    Guide,
    Thoughts,
    call_grammar,
    json_grammar,
    text_or_call_grammar,
)
from medicalgpt.serving.image_args import ImageServingArguments
from medicalgpt.serving.keys import ApiKeys
from medicalgpt.serving.metrics import AnswerTimer, Metrics
from medicalgpt.serving.openai_forms import ChatForm, CompletionForm, Form
from medicalgpt.serving.openai_messages import MessageError, image_parts, to_template
from medicalgpt.serving.openai_responses import ResponseForm, ResponseRequest, to_chat
from medicalgpt.serving.openai_schema import (
    Body,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    ErrorBody,
    Generation,
    LoadAdapterRequest,
    NamedTool,
    OfferedFunction,
    TokenizeRequest,
    UnloadAdapterRequest,
    unknown_fields,
)
from medicalgpt.serving.prompts import PromptReader, PromptTooLargeError
from medicalgpt.serving.schedule import QueueFullError
from medicalgpt.serving.served_models import ServedModel
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
)
from template import check_template

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from loguru import logger
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import ValidationError
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Maximum number of images in a request: each is decoded before the length of the prompt is known.
MAX_IMAGES = 16
# Names fields of a request that had no effect, at most so many.
IGNORED_FIELDS = "x-ignored-fields"
MAX_NAMED_FIELDS = 32
# Characters of a field's name in an error; a client may have made it up.
LONGEST_PATH = 200
# After how many seconds in which nothing comes a stream says that it is alive.
SECONDS_BETWEEN_COMMENTS = 15.0
KEEP_ALIVE = b": keep-alive\n\n"
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
    embedding_model: str | None = field(
        default=None,
        metadata={
            "help": "Encoder for /v1/embeddings: folder or hub name of a model of sentence-transformers. Its name in "
            "requests is the last part of its path."
        },
    )
    allow_lora_updates: bool = field(
        default=False,
        metadata={
            "help": "Let requests load adapters, from folders of this machine or from the hub, and unload them: "
            "/v1/load_lora_adapter, /v1/unload_lora_adapter. Whoever may send requests may do so."
        },
    )
    strict_fields: bool = field(
        default=False,
        metadata={
            "help": "Refuse requests with fields that are not known. Default: they are answered, and the fields are "
            "named in the header x-ignored-fields and in the log."
        },
    )
    max_tokens_limit: int = field(default=4096, metadata={"help": "Maximum tokens that a request may ask for."})
    max_request_bytes: int | None = field(
        default=None,
        metadata={
            "help": "Maximum bytes of a request's body. Default: 2,000,000; with --accept_images True 50,000,000, "
            "enough for the largest image."
        },
    )

    def __post_init__(self):
        if self.max_request_bytes is None:
            self.max_request_bytes = 50_000_000 if self.accept_images else ApiArguments.max_request_bytes


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


# What is sent of an answer: a piece of its text, or of a call, and in the end the answer.
Piece = str | CallPiece | Answer


def invalid_chat(error: ValidationError, chat: dict[str, Any]) -> ApiError:
    """What is wrong with a chat request that was made of another one."""
    problems = [{**problem, "loc": ("body", *problem["loc"])} for problem in error.errors()]
    return invalid_body(RequestValidationError(problems, body=chat))


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


class Service:
    """What the routes share.

    Attributes:
        models: by their names; several if each adapter has one.
        sampling: the defaults for fields that a request omits.
        status: whether the server is stopping, and what it is answering.
        recent_seconds: how long the last answers took.
        encoder: gives embeddings; None if the server has none.
        in_turns: requests for scores of prompts, or for embeddings.
        turns: of clients, each of which has one of these in the queue at a time.
        adapters_change: held while an adapter is loaded or unloaded.
    """

    def __init__(
        self,
        arguments: OpenAIArguments,
        engine: ChatEngine,
        batcher: Batcher,
        keys: ApiKeys | None,
        encoder: Encoder | None = None,
    ):
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
        self.encoder = encoder
        self.in_turns = 0
        self.adapters_change = asyncio.Lock()
        self.turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def seconds_to_wait(self) -> int:
        """After how many seconds one of the running answers may have ended."""
        mean = sum(self.recent_seconds) / len(self.recent_seconds) if self.recent_seconds else 1.0
        return min(60, max(1, math.ceil(mean)))

    def load(self) -> dict[str, tuple[int, int]]:
        """Answers being generated, and queued requests, of each model."""
        return {name: self.batcher.load_of(each.engine.name) for name, each in list(self.models.items())}

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
    model: ServedModel, prompts: Sequence[list[int]], body: Generation, sampling: Sampling, client: str, **rest: Any
) -> list[GenerationRequest]:
    """`n` answers to each prompt, the i-th of them sampled with seed + i. `rest`: further fields of the requests."""
    samplings = [sampling.with_seed_offset(i) for i in range(body.n or 1)]
    return [
        GenerationRequest(prompt_ids, each, adapter=model.engine.name, client=client, **rest)
        for prompt_ids in prompts
        for each in samplings
    ]


def check_common(service: Service, body: Generation) -> ServedModel:
    """The model of a request.

    Raises:
        ApiError: there is none of this name, or what the schema does not check, in both kinds of requests.
    """
    if body.model not in service.models:
        raise unknown_model(service, body.model)
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options: it has no effect without stream.", param="stream_options")
    return service.models[body.model]


def unknown_model(service: Service, name: str) -> ApiError:
    message = f"There is no model {name!r} here; this server has {', '.join(map(repr, service.models))}."
    return ApiError(404, message, code="model_not_found", param="model")


def sampling_for(service: Service, model: ServedModel, body: Generation, top_log_probs: int | None) -> Sampling:
    """The sampling settings of a request, with the flags as defaults."""
    limit = service.arguments.max_tokens_limit
    said = [(name, getattr(body, name, None)) for name in ("max_tokens", "max_completion_tokens")]
    wanted = {value for _, value in said if value is not None}
    if len(wanted) > 1:
        raise ApiError(400, "max_tokens and max_completion_tokens differ; set one of them.", param="max_tokens")
    for name, value in said:
        if value is not None and value > limit:
            raise ApiError(400, f"{name}: {value} is above this server's limit of {limit} tokens.", param=name)
    biases = tuple((int(token_id), bias) for token_id, bias in (body.logit_bias or {}).items())
    if wrong := [token_id for token_id, _ in biases if token_id >= model.vocabulary]:
        message = f"logit_bias: there is no token {wrong[0]}; ids are from 0 to {model.vocabulary - 1}."
        raise ApiError(400, message, param="logit_bias")
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    settings = {name: getattr(body, name) for name in (*names, "seed")}
    if settings["top_k"] == -1:
        settings["top_k"] = 0
    if body.samples and service.sampling.temperature == 0:
        settings["temperature"] = 1.0
    # An echo without an answer generates nothing, so that 1 has no effect.
    most = max(1, *wanted) if wanted else service.sampling.max_new_tokens
    least = most if body.ignore_eos else body.min_tokens or 0
    if least > most:
        raise ApiError(
            400, f"min_tokens: {least} is above the {most} tokens that the answer may have.", param="min_tokens"
        )
    return dataclasses.replace(
        service.sampling,
        max_new_tokens=most,
        min_new_tokens=least,
        stop=service.sampling.stop if body.stop is None else body.stop,
        top_log_probs=top_log_probs,
        logit_bias=biases,
        **{name: value for name, value in settings.items() if value is not None},
    )


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


def tools_for(model: ServedModel, body: ChatRequest) -> list[dict[str, Any]] | None:
    """The tools that are offered to the model.

    Raises:
        ApiError: the chat template does not support tools, a field has no effect, or tool_choice names no tool.
    """
    if body.tools is None:
        if body.tool_choice not in (None, "none", "auto"):
            raise ApiError(400, "tool_choice: it has no effect without tools.", param="tool_choice")
        return None
    if model.form is None:
        raise ApiError(400, "tools: this model's chat template has no form for tools.", param="tools")
    if body.tool_choice == "none":
        return None
    tools = body.tools
    if isinstance(body.tool_choice, NamedTool):
        name = body.tool_choice.function.name
        tools = [tool for tool in tools if tool.function.name == name]
        if not tools:
            raise ApiError(400, f"tool_choice: there is no tool {name!r} in tools.", param="tool_choice")
    return [tool.rendered for tool in tools]


async def guide_for(
    service: Service,
    client: str,
    model: ServedModel,
    body: ChatRequest,
    tools: Sequence[Any] | None,
    thoughts: Thoughts,
) -> Guide | None:
    """The grammar that the answers follow: a schema, calls of tools, or either.

    Raises:
        ApiError: no answer can be held to it.
    """
    schema = body.response_format.wanted if body.response_format else None
    if not tools:
        if schema is None:
            return None
        grammar = json_grammar(schema, model.engine.special_ids, thoughts)
        return await compiled(service, client, model, grammar, "response_format")
    must_call = body.tool_choice == "required" or isinstance(body.tool_choice, NamedTool)
    offered = {tool["function"]["name"] for tool in tools}
    functions = [tool.function for tool in body.tools if tool.function.name in offered]
    strict = [function for function in functions if function.strict]
    parallel = body.parallel_tool_calls is not False
    settings = {"parallel": parallel}
    if must_call or schema is not None:
        write = call_grammar
        settings["otherwise"] = None if must_call else schema
    elif model.form.shape.trigger and (strict or not parallel):
        write = text_or_call_grammar
    elif strict:
        message = "this model's calls have no mark, so it is only known at their end that they are calls."
        raise ApiError(400, f"tools: {message} Set tool_choice to required, or strict to false.", param="tools")
    else:
        return None

    def grammar(held: Sequence[OfferedFunction]) -> str:
        """The arguments of some tools are held to their schema, those of others are any object."""
        schemas = {each.name: (each.parameters if each in held else None) or ANY_OBJECT for each in functions}
        return write(model.form.shape, schemas, model.engine.special_ids, thoughts, **settings)

    param = "tools" if schema is None else "response_format"
    if len(strict) < len(functions):
        # What is not strict is held to its schema where that is possible.
        with suppress(ApiError):
            return await compiled(service, client, model, grammar(functions), param)
    return await compiled(service, client, model, grammar(strict), param)


async def compiled(service: Service, client: str, model: ServedModel, grammar: str, param: str) -> Guide:
    return await tokenized(service, client, param, grammar, lambda text, _: model.guides.guide(text), model.engine)


def submit(
    service: Service,
    request: Request,
    jobs: Sequence[GenerationRequest],
    on_piece: Callable[[int, str | CallPiece], Any] | None = None,
) -> list["Future[Answer]"]:
    """Queue requests, all of them or none.

    Args:
        on_piece: called from another thread, with the number of the request and the next piece of its answer.

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
    if on_piece is not None:
        bound = [
            dataclasses.replace(job, on_text=partial(on_piece, number), on_call=partial(on_piece, number))
            for number, job in enumerate(bound)
        ]
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


def pieces_of(
    service: Service, request: Request, jobs: Sequence[GenerationRequest]
) -> AsyncIterator[list[tuple[int, Piece]]]:
    """Pieces of answers with the number of their request as they are generated; each answer after its last piece.

    Pieces that have come in the meantime come together, so that a busy server writes less often. The list is empty if
    nothing has come for some seconds.

    Raises:
        ApiError: at once if the request is refused; while iterating, after the time limit, or what went wrong in an
            answer; or ClientDisconnected.
    """
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()

    def tell(number: int, event: Any) -> None:
        loop.call_soon_threadsafe(events.put_nowait, (number, event))

    futures = submit(service, request, jobs, tell)
    for number, future in enumerate(futures):
        future.add_done_callback(partial(tell, number))
    return received_pieces(service, request, events, len(jobs))


async def received_pieces(
    service: Service, request: Request, events: asyncio.Queue[tuple[int, Any]], open_jobs: int
) -> AsyncIterator[list[tuple[int, Piece]]]:
    """What arrives in a queue, until all jobs have ended."""
    loop = asyncio.get_running_loop()
    leaving = asyncio.ensure_future(wait_for_disconnect(request))
    leaving.add_done_callback(lambda _: events.put_nowait((-1, ClientDisconnected())))
    late = loop.call_at(request.scope["deadline"], events.put_nowait, (-1, timed_out(service)))
    try:
        while open_jobs:
            idle = loop.call_later(SECONDS_BETWEEN_COMMENTS, events.put_nowait, (-1, None))
            arrived = [await events.get()]
            idle.cancel()
            arrived += [events.get_nowait() for _ in range(events.qsize())]
            pieces: list[tuple[int, Piece]] = []
            problem: BaseException | None = None
            for number, event in arrived:
                if isinstance(event, Future):
                    open_jobs -= 1
                    event = CancelledError() if event.cancelled() else event.exception() or event.result()
                if isinstance(event, BaseException):
                    problem = event
                    break
                if isinstance(event, str) and pieces and pieces[-1][0] == number and isinstance(pieces[-1][1], str):
                    event = pieces.pop()[1] + event
                if event is not None:
                    pieces.append((number, event))
            if pieces or problem is None:
                yield pieces
            if isinstance(problem, (QueueFullError, CancelledError)):
                raise ended_early(service, problem) from problem
            if problem is not None:
                raise problem
    finally:
        late.cancel()
        leaving.cancel()


async def respond(
    service: Service, request: Request, jobs: Sequence[GenerationRequest], form: Form | ResponseForm
) -> Response:
    """Answer whole or as a stream, as requested."""
    if not form.body.stream:
        answers = await wait_for(service, request, submit(service, request, jobs))
        return await written(answers, lambda: JSONResponse(form.whole(answers)))
    events = pieces_of(service, request, jobs)
    return StreamingResponse(
        stream_of(form, len(jobs), events),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )


async def written(answers: Sequence[Answer], write: Callable[[], Any]) -> Any:
    """The result of `write`, off the event loop where it takes long: with probabilities of each token."""
    return await asyncio.to_thread(write) if any(answer.scores for answer in answers) else write()


async def stream_of(
    form: Form | ResponseForm, jobs: int, events: AsyncIterator[list[tuple[int, Piece]]]
) -> AsyncIterator[bytes]:
    """Events of a stream (https://html.spec.whatwg.org/multipage/server-sent-events.html), each of one line.

    While nothing comes there are comments, which clients skip: proxies and clients take a connection for dead on which
    nothing comes.
    """
    answers: dict[int, Answer] = {}

    def ending(number: int, answer: Answer) -> list[bytes]:
        return [event_line(value) for value in form.ending(number, answer)]

    try:
        async with aclosing(events):
            for number in range(jobs):
                for value in form.opening(number):
                    yield event_line(value)
            async for arrived in events:
                lines = [] if arrived else [KEEP_ALIVE]
                for number, event in arrived:
                    if isinstance(event, Answer):
                        answers[number] = event
                        lines += await written([event], partial(ending, number, event))
                    else:
                        lines += map(event_line, form.piece(number, event))
                if lines:
                    yield b"".join(lines)
        for value in form.closing([answers[number] for number in range(jobs)]):
            yield event_line(value)
        if form.ends_with_done:
            yield b"data: [DONE]\n\n"
    except ClientDisconnected:
        pass
    except Exception as error:
        yield event_line(form.failure(to_api_error(error).body))


def event_line(value: dict[str, Any]) -> bytes:
    """One event. The newer of OpenAI's interfaces names its events by their type."""
    name = f"event: {value['type']}\n" if "type" in value else ""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return f"{name}data: {text.translate(LINE_ENDS)}\n\n".encode()


ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}
router = APIRouter(route_class=StrictRoute, responses=ERRORS)


def named_in_header(service: Service, request: Request, body: Body) -> list[str]:
    """The fields of a request that have no effect since nothing is known of them; they are logged.

    Raises:
        ApiError: there are any, and the server is strict.
    """
    found = list(itertools.islice(unknown_fields(body), MAX_NAMED_FIELDS))
    if found and service.arguments.strict_fields:
        path, hint = found[0]
        raise ApiError(400, f"{path[:LONGEST_PATH]}: unknown field: {hint}", param=path[:LONGEST_PATH])
    names = [path[:LONGEST_PATH] for path, _ in found]
    if found:
        told = "; ".join(f"{name!r} ({hint[:LONGEST_PATH]})" for name, (_, hint) in zip(names, found, strict=True))
        logger.warning(f"{request.url.path}: unknown fields, without effect: {told}")
    return names


def with_ignored(response: Response, names: Sequence[str]) -> Response:
    """The response, with the fields that had no effect in a header."""
    if names:
        # Headers hold few characters.
        response.headers[IGNORED_FIELDS] = ", ".join(quote(name, safe="[].-_ ") for name in names)
    return response


@dataclass
class ChatTurn:
    """A conversation that is ready to be answered.

    Attributes:
        ignored: the fields without effect.
    """

    model: ServedModel
    jobs: list[GenerationRequest]
    thoughts_begun: bool
    ignored: list[str]


async def chat_turn(service: Service, request: Request, body: ChatRequest) -> ChatTurn:
    """Check and render a request for a chat answer."""
    model = check_common(service, body)
    ignored = named_in_header(service, request, body)
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs: it has no effect without logprobs.", param="top_logprobs")
    sampling = sampling_for(service, model, body, (body.top_logprobs or 0) if body.logprobs else None)
    tools = tools_for(model, body)
    require_places(service, body.n or 1)
    try:
        variables = model.known_variables(body.chat_template_kwargs or {})
    except ValueError as error:
        raise ApiError(400, f"chat_template_kwargs: {error}", param="chat_template_kwargs") from error
    ignored += [f"chat_template_kwargs.{name}" for name in body.chat_template_kwargs or {} if name not in variables]
    if body.reasoning_effort is not None:
        variables = model.known_variables({"reasoning_effort": body.reasoning_effort}) | variables
    pictures = await asyncio.to_thread(read_pictures, model.engine, body.messages)
    try:
        messages = to_template(body.messages, service.arguments.system_prompt, model.takes_thoughts)
    except MessageError as error:
        raise ApiError(400, f"{error}", param=error.param) from error
    client = client_of(request.scope)
    rendered = (messages, tools, pictures, variables)
    prompt_ids, thoughts = await tokenized(service, client, "messages", rendered, chat_ids, model.engine)
    guide = await guide_for(service, client, model, body, tools, thoughts)
    if guide is not None and sampling.min_new_tokens:
        name = "ignore_eos" if body.ignore_eos else "min_tokens"
        raise ApiError(400, f"{name}: an answer of a schema ends where the schema ends it; leave it out.", param=name)
    begun = thoughts == "begun"
    rest = {"tools": tools, "pictures": pictures, "guide": guide, "thoughts_begun": begun}
    return ChatTurn(model, requests_for(model, [prompt_ids], body, sampling, client, **rest), begun, ignored)


@router.post("/v1/chat/completions")
async def chat_completions(request: Request, body: ChatRequest) -> Any:
    """Answer a conversation."""
    service: Service = request.app.state.service
    turn = await chat_turn(service, request, body)
    form = ChatForm(turn.model, body, turn.thoughts_begun)
    return with_ignored(await respond(service, request, turn.jobs, form), turn.ignored)


@router.post("/v1/completions")
async def completions(request: Request, body: CompletionRequest) -> Any:
    """Continue a raw text, without the chat template."""
    service: Service = request.app.state.service
    model = check_common(service, body)
    ignored = named_in_header(service, request, body)
    if body.best_of not in (None, body.n or 1):
        raise ApiError(400, "best_of: answers are not ranked here; use n.", param="best_of")
    if body.max_tokens == 0 and (not body.echo or body.stream):
        raise ApiError(400, "max_tokens: 0 is for echo, without stream; the answer has at least 1.", param="max_tokens")
    sampling = sampling_for(service, model, body, body.logprobs)
    several = isinstance(body.prompt, list) and (not body.prompt or not isinstance(body.prompt[0], int))
    prompts = body.prompt if several else [body.prompt]
    if not prompts:
        raise ApiError(400, "prompt: it is empty.", param="prompt")
    require_places(service, len(prompts) * (body.n or 1))
    client = client_of(request.scope)
    ids = await tokenized(service, client, "prompt", prompts, completion_ids, model.engine)
    scores = None
    if body.echo and body.logprobs is not None:
        scores = await prompt_scores(service, request, client, model, ids, body.logprobs)
    form = CompletionForm(model, body, ids, scores)
    if body.max_tokens == 0:
        nothing = [Answer("", "length", len(prompt), 0) for prompt in ids for _ in range(body.n or 1)]
        return with_ignored(JSONResponse(form.whole(nothing)), ignored)
    jobs = requests_for(model, ids, body, sampling, client)
    return with_ignored(await respond(service, request, jobs, form), ignored)


@router.post("/v1/responses")
async def responses(request: Request, body: ResponseRequest) -> Any:
    """Answer a conversation in the form of OpenAI's newer interface; nothing is stored."""
    service: Service = request.app.state.service
    ignored = named_in_header(service, request, body)
    try:
        chat = ChatRequest.model_validate(to_chat(body))
    except ValidationError as error:
        raise invalid_chat(error, to_chat(body)) from error
    except ValueError as error:
        raise ApiError(400, f"{error}", param=f"{error}".partition(":")[0]) from error
    turn = await chat_turn(service, request, chat)
    form = ResponseForm(turn.model, body, chat, turn.thoughts_begun)
    return with_ignored(await respond(service, request, turn.jobs, form), [*ignored, *turn.ignored])


@router.post("/v1/embeddings")
async def embeddings(request: Request, body: EmbeddingRequest) -> Any:
    """Embeddings of texts."""
    service: Service = request.app.state.service
    encoder = service.encoder
    if encoder is None:
        raise ApiError(
            501, "This server has no encoder. Start it with --embedding_model PATH, which names one.", param="model"
        )
    if body.model != encoder.name:
        message = f"There is no encoder {body.model!r} here; this server has {encoder.name!r}."
        raise ApiError(404, message, code="model_not_found", param="model")
    if body.dimensions not in (None, encoder.dimensions):
        message = f"dimensions: the embeddings of {encoder.name} have {encoder.dimensions}; leave it out."
        raise ApiError(400, message, param="dimensions")
    ignored = named_in_header(service, request, body)
    texts = [body.input] if isinstance(body.input, str) else body.input
    if "" in texts:
        raise ApiError(400, "input: a text is empty.", param="input")
    try:
        service.prompts.check(texts)
    except PromptTooLargeError as error:
        raise ApiError(400, f"{error}", code="context_length_exceeded", param="input") from error
    vectors, tokens = await in_turn(service, request, client_of(request.scope), lambda: encoder.submit(texts))
    as_base64 = body.encoding_format == "base64"
    content = await asyncio.to_thread(embedding_list, encoder.name, vectors, tokens, as_base64)
    return with_ignored(JSONResponse(content), ignored)


async def in_turn(service: Service, request: Request, client: str, submit_work: Callable[[], "Future[Any]"]) -> Any:
    """The result of work that is done for one request at a time. A client has one piece of it in the queue at a time.

    Raises:
        ApiError: too many requests wait for their turn already, or it takes too long.
    """
    if service.in_turns >= service.arguments.max_waiting:
        raise queue_full(service, QueueFullError(service.in_turns))
    service.in_turns += 1
    try:
        async with asyncio.timeout_at(request.scope["deadline"]):
            turn = service.turns.setdefault(client, asyncio.Lock())
            await turn.acquire()
    except TimeoutError as error:
        service.in_turns -= 1
        raise timed_out(service) from error
    try:
        future = submit_work()
        request.scope["futures"].append(future)
        (result,) = await wait_for(service, request, [future])
        return result
    finally:
        turn.release()
        service.in_turns -= 1


async def prompt_scores(
    service: Service, request: Request, client: str, model: ServedModel, prompts: Sequence[list[int]], top: int
) -> list[list[TokenScore]]:
    """The scores of each prompt."""
    return [
        await in_turn(service, request, client, partial(service.batcher.scorer.submit, model.engine, prompt, top))
        for prompt in prompts
    ]


@router.post("/tokenize")
@router.post("/v1/tokenize", include_in_schema=False)
async def tokenize(request: Request, body: TokenizeRequest) -> Any:
    """The token ids of a text, or of a rendered conversation."""
    service: Service = request.app.state.service
    model = model_of(service, body.model)
    ignored = named_in_header(service, request, body)
    client = client_of(request.scope)
    if body.messages is not None:
        fields = {"model": model.name, "messages": body.messages, "tools": body.tools}
        try:
            chat = ChatRequest.model_validate({**fields, "chat_template_kwargs": body.chat_template_kwargs})
        except ValidationError as error:
            raise invalid_chat(error, fields) from error
        turn = await chat_turn(service, request, chat)
        ids = list(turn.jobs[0].prompt_ids)
        ignored += turn.ignored
    else:
        special = body.add_special_tokens is not False
        ids = await tokenized(service, client, "prompt", body.prompt, partial(text_ids, special=special), model.engine)
    names = model.engine.tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None
    length = model.engine.context_length
    content = {"count": len(ids), "max_model_len": length, "tokens": ids, "token_strs": names}
    return with_ignored(JSONResponse(content), ignored)


def text_ids(text: str, engine: ChatEngine, *, special: bool) -> list[int]:
    return engine.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]


@router.post("/detokenize")
@router.post("/v1/detokenize", include_in_schema=False)
async def detokenize(request: Request, body: DetokenizeRequest) -> Any:
    """The text of token ids."""
    service: Service = request.app.state.service
    model = model_of(service, body.model)
    ignored = named_in_header(service, request, body)
    if wrong := [token_id for token_id in body.tokens if token_id >= model.vocabulary]:
        raise ApiError(400, f"tokens: there is no token {wrong[0]}; ids are from 0 to {model.vocabulary - 1}.")
    text = await tokenized(service, client_of(request.scope), "tokens", body.tokens, text_of_ids, model.engine)
    return with_ignored(JSONResponse({"prompt": text}), ignored)


def text_of_ids(token_ids: Sequence[int], engine: ChatEngine) -> str:
    return engine.tokenizer.decode(token_ids, skip_special_tokens=False)


def model_of(service: Service, name: str | None) -> ServedModel:
    """The model of this name; the first one without a name."""
    if name is None:
        return next(iter(service.models.values()))
    if name not in service.models:
        raise unknown_model(service, name)
    return service.models[name]


@router.post("/v1/load_lora_adapter")
async def load_lora_adapter(request: Request, body: LoadAdapterRequest) -> Any:
    """Load an adapter, which answers under its name from then on."""
    service: Service = request.app.state.service
    engines = changeable_engines(service)
    ignored = named_in_header(service, request, body)
    if body.lora_name in service.models:
        raise ApiError(400, f"lora_name: there is a model {body.lora_name!r} already.", param="lora_name")

    def load() -> ServedModel:
        engine = engines.load(body.lora_name, body.lora_path)
        renew_scorer(service, engines)
        return ServedModel(body.lora_name, engine)

    try:
        # One change at a time.
        async with service.adapters_change:
            service.models[body.lora_name] = await asyncio.to_thread(load)
    except UserError as error:
        raise ApiError(400, f"{error}", param="lora_path") from error
    logger.info(f"adapter {body.lora_name!r} loaded from {body.lora_path!r}")
    return with_ignored(PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully."), ignored)


@router.post("/v1/unload_lora_adapter")
async def unload_lora_adapter(request: Request, body: UnloadAdapterRequest) -> Any:
    """Drop an adapter; its answers that are being generated are finished."""
    service: Service = request.app.state.service
    engines = changeable_engines(service)
    ignored = named_in_header(service, request, body)
    if body.lora_name not in service.models:
        raise unknown_model(service, body.lora_name)

    def unload() -> None:
        engines.unload(body.lora_name)
        renew_scorer(service, engines)

    try:
        async with service.adapters_change:
            await asyncio.to_thread(unload)
            service.models.pop(body.lora_name, None)
    except UserError as error:
        raise ApiError(400, f"{error}", param="lora_name") from error
    logger.info(f"adapter {body.lora_name!r} unloaded")
    return with_ignored(PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully."), ignored)


def renew_scorer(service: Service, engines: NamedEngines) -> None:
    with engines.lock:
        service.batcher.scorer.renew(next(iter(engines.by_name.values())))


def changeable_engines(service: Service) -> NamedEngines:
    """Raises ApiError if adapters cannot be changed here."""
    if not service.arguments.allow_lora_updates:
        message = "Adapters cannot be changed while this server runs. Start it with --allow_lora_updates True."
        raise ApiError(403, message, code="not_allowed")
    return service.engine.group


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


def chat_ids(value: tuple[Any, ...], engine: ChatEngine) -> tuple[list[int], Thoughts]:
    """Token ids of a conversation, and whether its answer begins with reasoning.

    Args:
        value: messages, tools, images and variables of the template, see `ChatEngine.prompt_ids`.
    """
    prompt_ids = engine.prompt_ids(*value)
    return prompt_ids, engine.thoughts(prompt_ids)


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
    found = [described(service, each.name, each.engine.context_length) for each in service.models.values()]
    if service.encoder is not None:
        found.append(described(service, service.encoder.name, service.encoder.max_tokens))
    return {"object": "list", "data": found}


@router.get("/v1/models/{model:path}")
async def one_model(request: Request, model: str) -> Any:
    """The model of this name."""
    service: Service = request.app.state.service
    if model not in service.models:
        raise unknown_model(service, model)
    return described(service, model, service.models[model].engine.context_length)


def described(service: Service, name: str, context_length: int | None) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "medicalgpt",
        "max_model_len": context_length,
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
        engine = engine_from(
            arguments,
            by_name=True,
            with_images=arguments.accept_images,
            changeable=arguments.allow_lora_updates,
        )
        for each in adapted(engine):
            check_template(each.tokenizer, arguments.template_name)
        encoder = encoder_from(arguments)
        batcher = batcher_from(engine, arguments)
        service = Service(arguments, engine, batcher, keys, encoder)
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


def encoder_from(arguments: OpenAIArguments) -> Encoder | None:
    path = arguments.embedding_model
    return Encoder(path, base_name(path), arguments.cache_dir) if path else None


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
