"""What the web pages share: how they are served, login, content policy, streaming."""

import asyncio
import dataclasses
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

from medicalgpt.errors import UserError
from medicalgpt.serving.arguments import PageArguments
from medicalgpt.serving.batchers import Batcher, BatcherClosedError, ModelFailedError
from medicalgpt.serving.generation import Answer, GenerationRequest
from medicalgpt.serving.language import LABEL, text_in
from medicalgpt.serving.limits import limited_uvicorn
from medicalgpt.serving.look import STYLE_SHEET, script, theme
from medicalgpt.serving.schedule import QueueFullError
from medicalgpt.serving.uploads import UploadMiddleware, Uploads, is_upload
from medicalgpt.serving.web import (
    WRONG_PASSWORDS,
    AccessMiddleware,
    Failures,
    OriginMiddleware,
    RequestRefused,
    bound_socket,
    client_of,
    origins_from,
    url_host,
)

import gradio as gr
from loguru import logger
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Sessions whose conversation is remembered, and events that may wait for Gradio itself.
MAX_SESSIONS = 500
MAX_EVENTS = 200
# Bytes of an upload's body besides those of its files.
FORM_BYTES = 65_536
# Sanitized Markdown still has images, and an image from another host could send it what the page was told.
CONTENT_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; object-src 'none'; "
    "base-uri 'self'; form-action 'self'"
)


def launch(
    page: gr.Blocks,
    arguments: PageArguments,
    auth: tuple[str, str] | None,
    uploads: Uploads | None = None,
    max_file_size: int = 1,
    panel: str = "",
) -> str:
    """Serve the page in its own thread; returns its address.

    Args:
        uploads: where the files of visitors are; None for a page that takes none.
        max_file_size: maximum bytes of one of them.
        panel: the one that is open at first on a wide screen.

    Raises:
        UserError: the address cannot be listened on, or a flag has an invalid value.
    """
    # Gradio sends its own requests, which depend only on this variable, not on how the page was built.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    middleware = _middleware(arguments, auth, uploads, script(arguments.lang, panel))
    origins = origins_from(arguments.allow_origins)
    with bound_socket(arguments) as listener:
        port = listener.getsockname()[1]

    def wrap(app: ASGIApp) -> ASGIApp:
        # Within Gradio's own rules for other origins, it would come too late.
        return OriginMiddleware(app, refuse=_refuse, allowed=origins)

    with limited_uvicorn(arguments, wrap):
        url, public_url = _launch(page, arguments, auth, port, middleware, max_file_size)
    return public_url or url


def _middleware(
    arguments: PageArguments, auth: tuple[str, str] | None, uploads: Uploads | None, script: str
) -> list[Middleware]:
    """What a request passes before Gradio's routes see it, the outermost first."""
    most = FORM_BYTES if uploads is None else uploads.max_bytes
    found = [
        Middleware(
            AccessMiddleware,
            refuse=_refuse,
            # With a password, Gradio itself checks who asks.
            any_host=auth is not None,
            protection="--auth",
            max_body_bytes=lambda scope: most if is_upload(scope) else arguments.max_request_bytes,
            body_seconds=arguments.body_timeout,
        )
    ]
    if auth:
        found.append(Middleware(LoginMiddleware, refuse=_refuse))
    if uploads is not None:
        found.append(Middleware(UploadMiddleware, uploads=uploads, refuse=_refuse))
    return [*found, Middleware(with_content_policy), Middleware(ScriptMiddleware, script=script)]


def _launch(
    page: gr.Blocks,
    arguments: PageArguments,
    auth: tuple[str, str] | None,
    port: int,
    middleware: list[Middleware],
    max_file_size: int,
) -> tuple[str, str | None]:
    """Start Gradio's server; returns its address, and a public one if there is one."""
    _, url, public_url = page.launch(
        server_name=url_host(arguments.host),
        server_port=port,
        auth=auth,
        share=arguments.share,
        i18n=LABEL,
        theme=theme(),
        css_paths=STYLE_SHEET,
        app_kwargs={"middleware": middleware},
        state_session_capacity=MAX_SESSIONS,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        max_file_size=max_file_size,
        quiet=True,
        prevent_thread_lock=True,
    )
    return url, public_url


def serve(batcher: Batcher, seconds: float | None = None) -> None:
    """Return when the program is interrupted.

    Args:
        seconds: at most; for tests.

    Raises:
        UserError: the model cannot answer any more.
    """
    began = time.monotonic()
    with suppress(KeyboardInterrupt):
        while seconds is None or time.monotonic() - began < seconds:
            if batcher.failure is not None:
                raise UserError(batcher.failure)
            time.sleep(0.2)


def visitor_of(request: gr.Request) -> str:
    """Who asks: the client to whom shares of the batch and of the queue are given."""
    return client_of(request.request.scope)


class LoginMiddleware:
    """Counts wrong passwords, and refuses clients that send too many, the right one included."""

    def __init__(self, app: ASGIApp, *, refuse: Callable[[RequestRefused], Response]):
        self.app = app
        self.refuse = refuse
        self.failures = Failures(WRONG_PASSWORDS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"].rstrip("/") != "/login":
            await self.app(scope, receive, send)
            return
        client = client_of(scope)
        try:
            self.failures.check(client)
        except RequestRefused as refusal:
            await self.refuse(refusal)(scope, receive, send)
            return
        # Counted before the answer is known, since several may be tried at the same time.
        self.failures.add(client)

        async def note(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] < 400:
                self.failures.forget(client)
            await send(message)

        await self.app(scope, receive, note)


def _refuse(refusal: RequestRefused) -> PlainTextResponse:
    return PlainTextResponse(refusal.detail, refusal.status_code, refusal.headers)


def with_content_policy(app: ASGIApp) -> ASGIApp:
    """Wrap an ASGI application so that browsers load nothing from other hosts."""

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = CONTENT_POLICY
            await send(message)

        await app(scope, receive, send_with_policy)

    return wrapped


class ScriptMiddleware:
    """Puts a script at the beginning of HTML pages: Gradio adds its own `head` after it has chosen the language."""

    def __init__(self, app: ASGIApp, *, script: str):
        self.app = app
        self.start = b"<head>" + script.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "GET":
            await self.app(scope, receive, send)
            return
        started: Message = {}
        body = b""

        async def insert(message: Message) -> None:
            nonlocal started, body
            if message["type"] == "http.response.start":
                if not Headers(raw=message["headers"]).get("content-type", "").startswith("text/html"):
                    await send(message)
                else:
                    started = message
                return
            if not started:
                await send(message)
                return
            body += message.get("body", b"")
            if not message.get("more_body"):
                page = body.replace(b"<head>", self.start, 1)
                MutableHeaders(scope=started)["content-length"] = str(len(page))
                await send(started)
                await send({"type": "http.response.body", "body": page})

        await self.app(scope, receive, insert)


async def stream(
    batcher: Batcher, request: GenerationRequest, timeout: float
) -> AsyncIterator[tuple[str, Answer | None]]:
    """Yield the text so far whenever it has grown, and the answer once it is complete. Closing it cancels the request.

    Raises:
        QueueFullError, BatcherClosedError: see `Batcher.submit`.
        TimeoutError: the answer took longer than `timeout` seconds.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    pieces: asyncio.Queue[str | None] = asyncio.Queue()

    def put(piece: str | None) -> None:
        loop.call_soon_threadsafe(pieces.put_nowait, piece)

    future = batcher.submit(dataclasses.replace(request, on_text=put))
    future.add_done_callback(lambda _: put(None))
    text = ""
    try:
        while (piece := await asyncio.wait_for(pieces.get(), deadline - loop.time())) is not None:
            text += piece
            # A page that is slower than the model skips to the newest text.
            if pieces.empty():
                yield text, None
        answer = future.result()
        yield answer.text, answer
    finally:
        future.cancel()


def note_on(answer: Answer | None, language: str) -> str:
    """What a visitor is told about a complete answer; empty if it ended by itself."""
    if answer is None or answer.finish_reason != "length":
        return ""
    return text_in(language, "cut", count=answer.completion_tokens)


def describe(error: Exception, language: str) -> str:
    """What a visitor is told about an error."""
    if isinstance(error, QueueFullError):
        return text_in(language, "crowding" if error.crowding else "queue_full", waiting=error.waiting)
    if isinstance(error, BatcherClosedError):
        return text_in(language, "closing")
    if isinstance(error, ModelFailedError):
        return text_in(language, "model_failed")
    if isinstance(error, (UserError, ValueError)):
        return str(error)
    if isinstance(error, TimeoutError):
        return text_in(language, "timeout")
    logger.opt(exception=error).error("no answer")
    return text_in(language, "failed")
