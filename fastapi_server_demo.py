"""A small server for a trained model, to be read and changed: questions in, answers out, as JSON.

    python fastapi_server_demo.py --model_name_or_path outputs-sft --port 8008
    curl http://127.0.0.1:8008/chat -H "Content-Type: application/json" -d '{"input": "感冒了怎么办？"}'

    POST /chat   {"input": "再见", "history": [["你好", "您好"]], "system_prompt": "…", "temperature": 0.7}
              -> {"response": "…", "history": [["你好", "您好"], ["再见", "…"]], "finish_reason": "stop", …}
    POST /batch  {"inputs": ["你好", "再见"]} -> {"answers": [{"response": "…", …}, {"response": "…", …}]}
    GET  /health {"status": "ok", "running": 0, "waiting": 0}
    GET  /live, /ready: ok, without a key

Only the question is required. Errors come as {"detail": "…"}: 400 the model cannot be asked this, 401 no key, 403 no
key is set and the Host header names another machine, 408 and 413 the body is too slow or too long, 422 unknown fields
or wrong values, 429 too many requests are queued or too many keys were wrong, 500 the model failed, 503 it does not
recover, 504 it took too long. Headers that are too long (431) or too slow (408) are refused in plain text.

Anything more is in openai_api.py, with the same engine and the same answers: streams, tools, stop strings,
probabilities, metrics, and the protocol that client programs know.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from medicalgpt.errors import UserError, run_main
from medicalgpt.parser import parse_args
from medicalgpt.serving.arguments import ApiArguments
from medicalgpt.serving.batchers import Batcher, ModelFailedError, batcher_from
from medicalgpt.serving.engines import engine_from
from medicalgpt.serving.generation import Answer, GenerationRequest, Sampling, sampling_from
from medicalgpt.serving.keys import ApiKeys
from medicalgpt.serving.prompts import PromptReader
from medicalgpt.serving.schedule import QueueFullError
from medicalgpt.serving.server import STOPPING_HEADERS, DrainingServer, check_server_flags
from medicalgpt.serving.server_logs import RequestLogMiddleware, ServerStatus, setup_server_logging
from medicalgpt.serving.web import (
    AccessMiddleware,
    ProbeMiddleware,
    bound_socket,
    client_of,
    keys_from,
    settled,
    url_host,
)
from template import check_template

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from loguru import logger
from pydantic import AliasChoices, BaseModel, ConfigDict, Field

# Lists are counted, and no more than one wrong item is reported: each of a million would take a minute.
MAX_TURNS = 500
MAX_QUESTIONS = 1000

Text = Annotated[str, Field(min_length=1)]


@dataclass
class ServerArguments(ApiArguments):
    """Where the server listens."""

    port: int = field(
        default=8008, metadata={"help": "Port to listen on; 0 takes a free one.", "aliases": ["--server_port"]}
    )


class Settings(BaseModel):
    """How to answer; omitted fields are as on the command line."""

    model_config = ConfigDict(extra="forbid", strict=True)

    system_prompt: str | None = None
    max_new_tokens: int = Field(None, ge=1)
    temperature: float = Field(None, ge=0, allow_inf_nan=False)
    top_p: float = Field(None, gt=0, le=1)
    top_k: int = Field(None, ge=0)
    repetition_penalty: float = Field(None, gt=0, allow_inf_nan=False)
    seed: int = Field(None, ge=0, lt=2**61)


class ChatRequest(Settings):
    input: Text = Field(validation_alias=AliasChoices("input", "query"))
    history: list[Annotated[list[str], Field(min_length=2, max_length=2)]] = Field(
        [], max_length=MAX_TURNS, fail_fast=True
    )


class BatchRequest(Settings):
    inputs: list[Text] = Field(
        validation_alias=AliasChoices("inputs", "queries"), min_length=1, max_length=MAX_QUESTIONS, fail_fast=True
    )


class Reply(BaseModel):
    response: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


class ChatReply(Reply):
    history: list[list[str]]


class BatchReply(BaseModel):
    answers: list[Reply]


class Problem(BaseModel):
    detail: str


def main() -> None:
    (arguments,) = parse_args(
        ServerArguments, description=__doc__, program="fastapi_server_demo.py", env_prefix="MEDICALGPT_"
    )
    setup_server_logging(arguments.log_format)
    # Errors in the flags show before the model is loaded.
    sampling_from(arguments)
    keys = keys_from(arguments)
    check_server_flags(arguments)
    # So does a port that is taken.
    with bound_socket(arguments) as listener:
        engine = engine_from(arguments)
        check_template(engine.tokenizer, arguments.template_name)
        batcher = batcher_from(engine, arguments)
        status = ServerStatus()
        try:
            DrainingServer(
                build_app(batcher, arguments, keys, status),
                arguments,
                batcher=batcher,
                status=status,
                listener=listener,
                on_started=lambda: announce(arguments, *listener.getsockname()[:2]),
            ).run()
        finally:
            batcher.close(finish=False)
    if batcher.failure is not None:
        raise UserError(batcher.failure)


def announce(arguments: ServerArguments, host: str, port: int) -> None:
    """Print where the server is."""
    scheme = "https" if arguments.ssl_certfile else "http"
    url = f"{scheme}://{url_host(host)}:{port}"
    if arguments.log_format == "json":
        logger.info(f"serving on {url}")
    else:
        print(f"Serving on {url} (Ctrl-C stops)", flush=True)


def build_app(
    batcher: Batcher, arguments: ServerArguments, keys: ApiKeys | None, status: ServerStatus | None = None
) -> FastAPI:
    status = status or ServerStatus()
    # The usual documentation page would load scripts from another host.
    problems = {"4XX": {"model": Problem}, "5XX": {"model": Problem}}
    app = FastAPI(title="MedicalGPT", docs_url=None, redoc_url=None, responses=problems)

    add_middleware(app, batcher, arguments, keys, status)
    prompts = PromptReader(arguments.max_prompt_chars)

    add_error_handlers(app, arguments)

    @app.get("/")
    async def index() -> dict[str, str]:
        return {"message": "POST /chat, POST /batch, GET /health; /openapi.json describes them"}

    @app.get("/health")
    async def health() -> dict[str, Any]:
        if problem := batcher.problem:
            raise HTTPException(503, problem)
        return {"status": "ok", "running": batcher.running, "waiting": batcher.waiting}

    @app.post("/chat")
    async def chat(request: Request, asked: ChatRequest) -> ChatReply:
        (answer,) = await answers_to(request, asked, [asked.input], asked.history)
        return ChatReply(**as_reply(answer), history=[*asked.history, [asked.input, answer.text]])

    @app.post("/batch")
    async def batch(request: Request, asked: BatchRequest) -> BatchReply:
        if len(asked.inputs) > arguments.max_waiting:
            raise HTTPException(400, f"{len(asked.inputs)} questions; {arguments.max_waiting} is the most.")
        return BatchReply(answers=[as_reply(answer) for answer in await answers_to(request, asked, asked.inputs)])

    async def answers_to(
        request: Request, asked: Settings, questions: Sequence[str], history: Sequence[Sequence[str]] = ()
    ) -> list[Answer]:
        """Answer several questions, each after the same history."""
        turns, sampling = opening_of(asked, history, arguments)
        conversations = [[*turns, {"role": "user", "content": text}] for text in questions]
        client, record = client_of(request.scope), request.scope["record"]

        def tokenize(conversations: list[list[dict[str, str]]]) -> list[list[int]]:
            return [batcher.engine.prompt_ids(conversation) for conversation in conversations]

        try:
            ids = await prompts.read(client, conversations, tokenize)
            record.prompt_tokens = sum(map(len, ids))
            futures = batcher.submit_many(
                [
                    GenerationRequest(
                        prompt_ids, sampling.with_seed_offset(number), client=client, on_token=record.count_token
                    )
                    for number, prompt_ids in enumerate(ids)
                ]
            )
        except UserError as error:
            raise HTTPException(400, str(error)) from error
        for future in futures:
            status.track(future)
        answers = asyncio.ensure_future(settled(futures))
        try:
            async with asyncio.timeout(arguments.request_timeout):
                while not (await asyncio.wait([answers], timeout=0.5))[0]:
                    if await request.is_disconnected():
                        raise HTTPException(499, "The client has left.")
            return answers.result()
        except (HTTPException, TimeoutError, QueueFullError, ModelFailedError):
            raise
        except Exception as error:
            logger.opt(exception=error).error("no answer")
            raise HTTPException(500, "The model failed; the server's log says why.") from error
        finally:
            # A client that no longer waits frees its place in the batch.
            answers.cancel()

    return app


def add_middleware(
    app: FastAPI, batcher: Batcher, arguments: ServerArguments, keys: ApiKeys | None, status: ServerStatus
) -> None:
    """What every request passes, the last one first: probes, the log, keys and limits."""
    app.add_middleware(
        AccessMiddleware,
        refuse=lambda refused: refusal(refused.status_code, refused.detail, refused.headers),
        keys=keys,
        max_body_bytes=lambda scope: arguments.max_request_bytes,
        body_seconds=arguments.body_timeout,
    )
    app.add_middleware(
        RequestLogMiddleware,
        status=status,
        refusal=lambda: refusal(503, "The server is stopping.", STOPPING_HEADERS),
    )
    app.add_middleware(ProbeMiddleware, ready=lambda: not status.stopping and batcher.problem is None)


def opening_of(
    asked: Settings, history: Sequence[Sequence[str]], arguments: ServerArguments
) -> tuple[list[dict[str, str]], Sampling]:
    """The turns before a question, and how it is answered."""
    given = asked.model_dump(include=set(Settings.model_fields), exclude_unset=True)
    system = given.pop("system_prompt", arguments.system_prompt)
    turns = [{"role": "system", "content": system}] if system else []
    for question, answer in history:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    sampling = replace(sampling_from(arguments), **given)
    if idle := {"top_p", "top_k", "seed"}.intersection(given) if sampling.temperature == 0 else None:
        raise HTTPException(400, f"{', '.join(sorted(idle))}: no effect at temperature 0; set a temperature.")
    return turns, sampling


def add_error_handlers(app: FastAPI, arguments: ServerArguments) -> None:
    """Answer what can go wrong in any route as {"detail": "…"}."""

    @app.exception_handler(RequestValidationError)
    async def wrong_fields(request: Request, error: RequestValidationError) -> JSONResponse:
        # The values themselves are not repeated: JSON cannot express all of them (NaN).
        problems = [f"{'.'.join(map(str, each['loc'][1:])) or 'the body'}: {each['msg']}" for each in error.errors()]
        return refusal(422, "; ".join(problems).encode(errors="replace").decode())

    @app.exception_handler(QueueFullError)
    async def too_many(request: Request, error: QueueFullError) -> JSONResponse:
        return refusal(429, str(error), {"Retry-After": "1"})

    @app.exception_handler(ModelFailedError)
    async def broken(request: Request, error: ModelFailedError) -> JSONResponse:
        return refusal(503, str(error))

    @app.exception_handler(TimeoutError)
    async def too_late(request: Request, error: TimeoutError) -> JSONResponse:
        return refusal(504, f"There was no answer after {arguments.request_timeout} seconds.")


def as_reply(answer: Answer) -> dict[str, Any]:
    same = {name: getattr(answer, name) for name in ("finish_reason", "prompt_tokens", "completion_tokens")}
    return {"response": answer.text, **same}


def refusal(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"detail": detail}, status, headers)


if __name__ == "__main__":
    run_main(main)
