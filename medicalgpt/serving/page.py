"""What the web pages share: labels, login, content policy, streaming."""

import asyncio
import dataclasses
import html
import os
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

from medicalgpt.data.images import Picture, question_with_images
from medicalgpt.errors import UserError
from medicalgpt.serving.arguments import PageArguments
from medicalgpt.serving.batchers import Batcher, BatcherClosedError, ModelFailedError
from medicalgpt.serving.generation import GenerationRequest
from medicalgpt.serving.limits import limited_uvicorn
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
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# A turn of the user may have a `picture`.
Turns = list[dict[str, Any]]
# Sessions whose conversation is remembered, and events that may wait for Gradio itself.
MAX_SESSIONS = 500
MAX_EVENTS = 200
# Bytes of an upload's body besides those of its files.
FORM_BYTES = 65_536
# Code in Markdown, and what browsers read as a tag or an entity; reasoning is folded by its tags.
CODE = re.compile(r"(```.*?(?:```|$)|`[^`\n]+`)", re.DOTALL)
HTML = re.compile(r"<(?=[a-zA-Z/!?])(?!/?think>)|&(?=[a-zA-Z#])")
# The browser's language chooses.
LABELS = {
    "about": ("A model in training makes mistakes and is not a doctor.", "训练中的模型会出错，不能代替医生。"),
    "chat": ("Conversation", "对话"),
    "question": ("Your question", "您的问题"),
    "send": ("Send", "发送"),
    "stop": ("Stop", "停止"),
    "retry": ("Retry", "重试"),
    "undo": ("Undo", "撤回"),
    "clear": ("Clear", "清空"),
    "image": ("Image for the next question", "下一个问题的图片"),
    "notice": ("Notice", "提示"),
    "settings": ("Settings", "设置"),
    "system_prompt": ("System prompt", "系统提示词"),
    "max_new_tokens": ("Max new tokens", "最大 token 数"),
    "temperature": ("Temperature", "温度"),
    "top_p": ("Top-p", "Top-p"),
    "top_k": ("Top-k (0: all)", "Top-k（0：全部）"),
    "repetition_penalty": ("Repetition penalty", "重复惩罚"),
    "seed": ("Seed (empty: random)", "随机种子（空：随机）"),
}
LABEL = gr.I18n(
    **{language: {name: both[i] for name, both in LABELS.items()} for i, language in enumerate(("en", "zh"))}
)
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
) -> str:
    """Serve the page in its own thread; returns its address.

    Args:
        uploads: where the files of visitors are; None for a page that takes none.
        max_file_size: maximum bytes of one of them.

    Raises:
        UserError: the address cannot be listened on, or a flag has an invalid value.
    """
    # Gradio sends its own requests, which depend only on this variable, not on how the page was built.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    if uploads is not None:
        os.environ["GRADIO_TEMP_DIR"] = str(uploads.folder)
    middleware, origins = _middleware(arguments, auth, uploads), origins_from(arguments.allow_origins)
    with bound_socket(arguments) as listener:
        port = listener.getsockname()[1]

    def wrap(app: ASGIApp) -> ASGIApp:
        # Within Gradio's own rules for other origins, it would come too late.
        return OriginMiddleware(app, refuse=_refuse, allowed=origins)

    with limited_uvicorn(arguments, wrap):
        url, public_url = _launch(page, arguments, auth, port, middleware, max_file_size)
    return public_url or url


def _middleware(arguments: PageArguments, auth: tuple[str, str] | None, uploads: Uploads | None) -> list[Middleware]:
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
    return [*found, Middleware(with_content_policy)]


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
        # Gradio's own themes load fonts from Google.
        theme=gr.themes.Default(font=["sans-serif"], font_mono=["monospace"]),
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


def escape_turns(said: Turns) -> Turns:
    """The turns with HTML escaped, except in code and reasoning: sanitizing would silently remove it.

    Of an image, its size is shown.
    """
    turns = []
    for turn in said:
        parts = CODE.split(turn["content"])
        parts[::2] = (HTML.sub(lambda mark: html.escape(mark[0]), part) for part in parts[::2])
        picture = turn.get("picture")
        size = f"🖼 {picture.width} × {picture.height}\n\n" if picture else ""
        turns.append({"role": turn["role"], "content": size + "".join(parts)})
    return turns


def conversation(said: Turns, system_prompt: str) -> tuple[list[dict[str, Any]], list[Picture]]:
    """The messages for the model, and their images."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": system_prompt}] if system_prompt.strip() else []
    pictures = []
    for turn in said:
        own = [turn["picture"]] if turn.get("picture") else []
        asked = turn["role"] == "user"
        messages.append(question_with_images(turn["content"], len(own)) if asked else turn)
        pictures += own
    return messages, pictures


async def stream(batcher: Batcher, request: GenerationRequest, timeout: float) -> AsyncIterator[tuple[str, str]]:
    """Yield the answer so far whenever it has grown, and a note on it. Closing the iterator cancels the request.

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
                yield text, ""
        answer = future.result()
        cut = answer.finish_reason == "length"
        yield answer.text, f"The answer was cut after {answer.completion_tokens} tokens." if cut else ""
    finally:
        future.cancel()


def describe(error: Exception) -> str:
    """What a visitor is told about an error."""
    if isinstance(error, (UserError, ValueError, QueueFullError, BatcherClosedError, ModelFailedError)):
        return str(error)
    if isinstance(error, TimeoutError):
        return "The answer took too long and was stopped."
    logger.opt(exception=error).error("no answer")
    return "The model failed; the program's log says why."
