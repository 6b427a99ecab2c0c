"""A page to talk to a trained model: answers appear while they are written, and a conversation has many turns.

    python gradio_demo.py --model_name_or_path outputs-sft
    python gradio_demo.py --base_model Qwen/Qwen3-0.6B --lora_model outputs-sft --port 8082

Answers of several visitors are computed together. What somebody writes stays in a session of their own and is forgotten
with it; the page stores nothing and loads nothing from other hosts.

It is for this machine alone. `--host 0.0.0.0` opens it to the network, `--share True` makes a public link through the
servers of Gradio; both need `--auth user:password`, or the same in the environment as MEDICALGPT_AUTH.
"""

import asyncio
import html
import os
import re
import socket
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

# Gradio asks its makers for news while it is imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

from medicalgpt.args import UNUSED_CHAT_ARGUMENTS, PageArguments, parse_args
from medicalgpt.chat import ChatEngine, Messages, Sampling, sampling_from
from medicalgpt.errors import UserError, run_main
from medicalgpt.logs import setup_logging
from medicalgpt.serving import Batcher, BatcherClosedError, QueueFullError, batcher_from, is_loopback

import gradio as gr
from loguru import logger
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

Turns = list[dict[str, str]]

EXAMPLES = (
    "一氧化碳中毒要看什么科？",
    "怀疑是肠套叠，应该做哪些检查？",
    "What doctor treats polymyalgia rheumatica?",
    "How can I lower my blood pressure without medicine?",
)
# Code in Markdown, and what browsers take for a tag or a character; thoughts are folded by their tags.
CODE = re.compile(r"(```.*?(?:```|$)|`[^`\n]+`)", re.DOTALL)
HTML = re.compile(r"<(?=[a-zA-Z/!?])(?!/?think>)|&(?=[a-zA-Z#])")
# The browser's language chooses.
LABELS = {
    "about": ("A model in training makes mistakes and is no doctor.", "训练中的模型会出错，不能代替医生。"),
    "chat": ("Conversation", "对话"),
    "question": ("Your question", "您的问题"),
    "send": ("Send", "发送"),
    "stop": ("Stop", "停止"),
    "retry": ("Retry", "重试"),
    "undo": ("Undo", "撤回"),
    "clear": ("Clear", "清空"),
    "notice": ("Notice", "提示"),
    "settings": ("Settings", "设置"),
    "system_prompt": ("System prompt", "系统提示词"),
    "max_new_tokens": ("Most new tokens", "最大词元数"),
    "temperature": ("Temperature", "温度"),
    "top_p": ("Top-p", "Top-p"),
    "top_k": ("Top-k (0: all)", "Top-k（0：全部）"),
    "repetition_penalty": ("Repetition penalty", "重复惩罚"),
    "seed": ("Seed (empty: by chance)", "随机种子（空：随机）"),
}
LABEL = gr.I18n(
    **{language: {name: both[i] for name, both in LABELS.items()} for i, language in enumerate(("en", "zh"))}
)
# Sanitized Markdown still has images, and an image from another host would tell it what the page has been told.
CONTENT_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; object-src 'none'; "
    "base-uri 'self'; form-action 'self'"
)


@dataclass
class DemoArguments(PageArguments):
    """Where the page is shown."""

    port: int = field(
        default=8082, metadata={"help": "Port to listen on; 0 takes a free one.", "aliases": ["--server_port"]}
    )


def main() -> None:
    (arguments,) = parse_args(DemoArguments, description=__doc__, unused=UNUSED_CHAT_ARGUMENTS)
    setup_logging()
    sampling_from(arguments)
    auth = auth_of(arguments)
    batcher = batcher_from(ChatEngine.from_arguments(arguments), arguments)
    try:
        page = build_page(batcher, arguments)
        logger.info(f"Open {launch(page, arguments, auth)} in a browser. Ctrl-C ends the program.")
        page.block_thread()
    finally:
        batcher.close(finish=False)


def auth_of(arguments: PageArguments) -> tuple[str, str] | None:
    """Raises UserError if other people could reach the page without a password, or it is not user:password."""
    auth = arguments.auth or os.environ.get("MEDICALGPT_AUTH")
    if auth:
        user, _, password = auth.partition(":")
        if not (user and password):
            raise UserError("--auth (or MEDICALGPT_AUTH) must be user:password, with both parts.")
        return user, password
    if arguments.share or not is_loopback(arguments.host):
        flag = "--share True" if arguments.share else f"--host {arguments.host}"
        raise UserError(f"{flag} lets other people in: add --auth user:password, or set MEDICALGPT_AUTH to it.")
    return None


def launch(page: gr.Blocks, arguments: PageArguments, auth: tuple[str, str] | None, max_file_size: int = 1) -> str:
    """Serve the page in a thread of its own; returns its address.

    Args:
        max_file_size: most bytes of an upload; so little where the page takes none.

    Raises:
        UserError: the address cannot be listened on.
    """
    # A page of another site may give its own name the address of this machine, and ask through the browser here.
    names = ["127.0.0.1", "localhost", arguments.host]
    own_name_only = [] if auth else [Middleware(TrustedHostMiddleware, allowed_hosts=names)]
    try:
        port = arguments.port
        if port == 0:
            with socket.create_server((arguments.host, 0)) as listening:
                port = listening.getsockname()[1]
        _, url, public_url = page.launch(
            server_name=arguments.host,
            server_port=port,
            auth=auth,
            share=arguments.share,
            i18n=LABEL,
            # Gradio's own themes load fonts from Google.
            theme=gr.themes.Default(font=["sans-serif"], font_mono=["monospace"]),
            app_kwargs={"middleware": [*own_name_only, Middleware(with_content_policy)]},
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
    except OSError as error:
        raise UserError(
            f"--port {arguments.port} of --host {arguments.host} cannot be listened on; it may be taken. Give another."
        ) from error
    return public_url or url


def with_content_policy(app: ASGIApp) -> ASGIApp:
    """Wrap an ASGI application so that browsers load nothing from other hosts."""

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = CONTENT_POLICY
            await send(message)

        await app(scope, receive, send_with_policy)

    return wrapped


def build_page(batcher: Batcher, arguments: PageArguments) -> gr.Blocks:
    """The page. All that it knows of a visitor is in `turns`, of which each session has its own."""
    with gr.Blocks(title="MedicalGPT", analytics_enabled=False) as page:
        turns = gr.State([])
        gr.Markdown("## MedicalGPT")
        gr.Markdown(LABEL("about"))
        with gr.Row():
            with gr.Column(scale=3):
                chatbot = gr.Chatbot(
                    label=LABEL("chat"),
                    elem_id="chat",
                    height="62vh",
                    examples=[{"text": text} for text in EXAMPLES],
                    reasoning_tags=[("<think>", "</think>")],
                    sanitize_html=True,
                    allow_tags=False,
                    # What they copy is the text with its marks escaped.
                    buttons=[],
                    feedback_options=None,
                )
                notice = gr.Textbox(label=LABEL("notice"), visible=False, interactive=False, elem_id="notice")
                question = gr.Textbox(label=LABEL("question"), max_lines=8, autofocus=True, elem_id="question")
                with gr.Row():
                    send, stop, retry, undo, clear = (
                        gr.Button(LABEL(name), variant=variant, interactive=ready, min_width=80, elem_id=name)
                        for name, variant, ready in (
                            ("send", "primary", True),
                            ("stop", "stop", False),
                            ("retry", "secondary", False),
                            ("undo", "secondary", False),
                            ("clear", "secondary", True),
                        )
                    )
            with gr.Column(scale=1, min_width=280), gr.Accordion(LABEL("settings")):
                system = gr.Textbox(arguments.system_prompt, label=LABEL("system_prompt"), elem_id="system_prompt")
                sliders = {
                    name: gr.Slider(
                        min(low, getattr(arguments, name)),
                        max(high, getattr(arguments, name)),
                        getattr(arguments, name),
                        step=step,
                        label=LABEL(name),
                        elem_id=name,
                    )
                    for name, low, high, step in (
                        ("max_new_tokens", 1, 4096, 1),
                        ("temperature", 0, 2, 0.01),
                        ("top_p", 0.01, 1, 0.01),
                        ("top_k", 0, 200, 1),
                        ("repetition_penalty", 0.5, 2, 0.01),
                    )
                }
                # A number that nobody fills in would be 0.
                seed = gr.Textbox(
                    "" if arguments.seed is None else str(arguments.seed), label=LABEL("seed"), elem_id="seed"
                )

        def view(said: Turns, *, busy: bool = False, note: str = "") -> dict[gr.Component, Any]:
            return {
                turns: said,
                chatbot: shown(said),
                notice: gr.update(value=note, visible=bool(note)),
                send: gr.update(interactive=not busy),
                stop: gr.update(interactive=busy),
                retry: gr.update(interactive=bool(said) and not busy),
                undo: gr.update(interactive=bool(said)),
            }

        async def ask(
            event: gr.EventData, said: Turns, asked: str, system_prompt: str, seed: str, *values: float
        ) -> AsyncIterator[dict[gr.Component, Any]]:
            before, _ = without_unanswered(said)
            earlier, again = before, event.target.elem_id == "retry"
            if again and before:
                earlier, asked = before[:-2], before[-2]["content"]
            elif event.target.elem_id == "chat":
                asked = event.value["text"]
            if not asked.strip():
                yield view(before)
                return
            said, text, note = [*earlier, {"role": "user", "content": asked}], "", ""
            yield {**view(said, busy=True), question: ""}
            try:
                system_turn = [{"role": "system", "content": system_prompt}] if system_prompt.strip() else []
                sampling = Sampling(seed=seed_of(seed), **dict(zip(sliders, values, strict=True)))
                growing = stream(batcher, [*system_turn, *said], sampling, arguments.request_timeout)
                async with aclosing(growing):
                    async for text, note in growing:  # noqa: B007  (the last note is used below)
                        answered = [*said, {"role": "assistant", "content": text}]
                        yield {turns: answered, chatbot: shown(answered)}
            except Exception as error:
                note = describe(error)
            if text:
                yield view([*said, {"role": "assistant", "content": text}], note=note)
            else:
                # An empty turn would teach the model to say nothing from here on.
                note = note or "The model said nothing."
                yield {**view(before, note=note), question: "" if again else asked}

        def stop_answer(said: Turns, typed: str) -> dict[gr.Component, Any]:
            said, unanswered = without_unanswered(said)
            return {**view(said), question: unanswered or typed}

        def undo_turn(said: Turns) -> dict[gr.Component, Any]:
            said, unanswered = without_unanswered(said)
            if unanswered is None and said:
                said, unanswered = said[:-2], said[-2]["content"]
            return {**view(said), question: unanswered or ""}

        outputs = [turns, chatbot, question, notice, send, stop, retry, undo]
        private = {"outputs": outputs, "api_visibility": "private"}
        # One event for all that asks, so that a visitor has one answer at a time, and the other buttons can end it.
        asking = gr.on(
            [send.click, question.submit, retry.click, chatbot.example_select],
            ask,
            [turns, question, system, seed, *sliders.values()],
            show_progress_on=chatbot,
            show_progress="minimal",
            trigger_mode="once",
            **private,
        )
        ending = {"cancels": asking, "queue": False, "show_progress": "hidden", **private}
        stop.click(stop_answer, [turns, question], **ending)
        undo.click(undo_turn, turns, **ending)
        gr.on([clear.click, chatbot.clear], lambda: view([]), **ending)
    return page.queue(default_concurrency_limit=None, api_open=False)


def without_unanswered(said: Turns) -> tuple[Turns, str | None]:
    """Return the turns without a last question that nobody answered, and that question."""
    if said and said[-1]["role"] == "user":
        return said[:-1], said[-1]["content"]
    return said, None


def shown(said: Turns) -> Turns:
    """The turns with HTML written out, but for code and thoughts: sanitizing would take it away without a word."""
    turns = []
    for turn in said:
        parts = CODE.split(turn["content"])
        parts[::2] = (HTML.sub(lambda mark: html.escape(mark[0]), part) for part in parts[::2])
        turns.append({**turn, "content": "".join(parts)})
    return turns


def seed_of(text: str) -> int | None:
    """Raises ValueError if the text is neither a number nor empty."""
    if text.strip() and not text.strip().isdecimal():
        raise ValueError(f"The seed is {text!r}, it must be a whole number or empty.")
    return int(text) if text.strip() else None


async def stream(
    batcher: Batcher, messages: Messages, sampling: Sampling, timeout: float
) -> AsyncIterator[tuple[str, str]]:
    """Yield the answer so far each time that it has grown, and a note on it. Closing cancels the request.

    Raises:
        UserError: the conversation cannot be answered.
        QueueFullError, BatcherClosedError: see `Batcher.submit`.
        TimeoutError: it took longer than `timeout` seconds.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    pieces: asyncio.Queue[str | None] = asyncio.Queue()

    def put(piece: str | None) -> None:
        loop.call_soon_threadsafe(pieces.put_nowait, piece)

    future = batcher.submit(batcher.engine.prompt_ids(messages), sampling, on_text=put)
    future.add_done_callback(lambda _: put(None))
    text = ""
    try:
        while (piece := await asyncio.wait_for(pieces.get(), deadline - loop.time())) is not None:
            text += piece
            # A page that is slower than the model catches up here.
            if pieces.empty():
                yield text, ""
        answer = future.result()
        cut = answer.finish_reason == "length"
        yield answer.text, f"The answer was cut after {answer.completion_tokens} tokens." if cut else ""
    finally:
        future.cancel()


def describe(error: Exception) -> str:
    """What a visitor is told of an error."""
    if isinstance(error, (UserError, ValueError, QueueFullError, BatcherClosedError)):
        return str(error)
    if isinstance(error, TimeoutError):
        return "The answer took too long and was stopped."
    logger.opt(exception=error).error("no answer")
    return "The model failed; the program's log says why."


if __name__ == "__main__":
    run_main(main)
