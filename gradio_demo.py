"""A web page to talk to a trained model: streamed answers, conversations of many turns.

    python gradio_demo.py --model_name_or_path outputs-sft
    python gradio_demo.py --base_model Qwen/Qwen3-0.6B --lora_model outputs-sft --port 8082

Several visitors are answered in one batch. What a visitor writes stays in the visitor's session and is forgotten with
it; the page stores nothing and loads nothing from other hosts.

With `--accept_images True`, a question can have an image, for checkpoints of Qwen2.5-VL and Qwen3-VL.

By default only this machine can open it. `--host 0.0.0.0` opens it to the network, `--share True` makes a public link
through Gradio's servers; both need `--auth user:password`, or the same in the environment as MEDICALGPT_AUTH.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from medicalgpt.data.images import Picture
from medicalgpt.errors import UserError, run_main
from medicalgpt.logs import setup_logging
from medicalgpt.parser import parse_args
from medicalgpt.serving.arguments import PageArguments
from medicalgpt.serving.batchers import Batcher, batcher_from
from medicalgpt.serving.engines import engine_from
from medicalgpt.serving.generation import Sampling, sampling_from
from medicalgpt.serving.image_args import ImageServingArguments
from medicalgpt.serving.page import (
    LABEL,
    MAX_EVENTS,
    Turns,
    conversation,
    describe,
    escape_turns,
    launch,
    serve,
    stream,
    visitor_of,
)
from medicalgpt.serving.prompts import PromptReader
from medicalgpt.serving.uploads import Uploads
from medicalgpt.serving.web import auth_from
from template import check_template

import gradio as gr
from loguru import logger

MAX_IMAGE_BYTES = 8 * 1024 * 1024
# Of all images that are not read yet; a visitor may have a quarter of them.
MAX_UPLOAD_BYTES = 16 * MAX_IMAGE_BYTES
EXAMPLES = (
    "一氧化碳中毒要看什么科？",
    "怀疑是肠套叠，应该做哪些检查？",
    "What doctor treats polymyalgia rheumatica?",
    "How can I lower my blood pressure without medicine?",
)


@dataclass
class DemoArguments(ImageServingArguments, PageArguments):
    """Where the page is served."""

    port: int = field(
        default=8082, metadata={"help": "Port to listen on; 0 takes a free one.", "aliases": ["--server_port"]}
    )


def main() -> None:
    (arguments,) = parse_args(DemoArguments, description=__doc__, program="gradio_demo.py")
    setup_logging()
    sampling_from(arguments)
    auth = auth_from(arguments)
    engine = engine_from(arguments, with_images=arguments.accept_images)
    check_template(engine.tokenizer, arguments.template_name)
    batcher = batcher_from(engine, arguments)
    uploads = Uploads(MAX_UPLOAD_BYTES) if arguments.accept_images else None
    try:
        page = build_page(batcher, arguments, uploads)
        url = launch(page, arguments, auth, uploads, MAX_IMAGE_BYTES if uploads else 1)
        logger.info(f"Open {url} in a browser. Ctrl-C stops the program.")
        serve(batcher)
    finally:
        batcher.close(finish=False)
        if uploads is not None:
            uploads.close()


def take_picture(path: str, uploads: Uploads) -> Picture:
    """The image that a visitor has uploaded, which is then in memory only. Raises ImageError, see `Picture.read`."""
    try:
        return Picture.from_bytes(Path(path).read_bytes())
    except FileNotFoundError:
        raise UserError("The image was read before and is gone; attach it again.") from None
    finally:
        uploads.release(Path(path))


@dataclass(frozen=True)
class Layout:
    """The components of the page.

    Attributes:
        turns: all that is known of a visitor; each session has its own.
        sliders: by the name of the setting.
    """

    turns: gr.State
    chatbot: gr.Chatbot
    notice: gr.Textbox
    question: gr.Textbox
    image: gr.File
    buttons: dict[str, gr.Button]
    system: gr.Textbox
    sliders: dict[str, gr.Slider]
    seed: gr.Textbox

    @property
    def outputs(self) -> list[gr.Component]:
        """What an event may change."""
        buttons = [self.buttons[name] for name in ("send", "stop", "retry", "undo")]
        return [self.turns, self.chatbot, self.question, self.image, self.notice, *buttons]

    def view(self, said: Turns, *, busy: bool = False, note: str = "") -> dict[gr.Component, Any]:
        """What the page shows after these turns."""
        return {
            self.turns: said,
            self.chatbot: escape_turns(said),
            self.notice: gr.update(value=note, visible=bool(note)),
            self.buttons["send"]: gr.update(interactive=not busy),
            self.buttons["stop"]: gr.update(interactive=busy),
            self.buttons["retry"]: gr.update(interactive=bool(said) and not busy),
            self.buttons["undo"]: gr.update(interactive=bool(said)),
        }


def lay_out(arguments: PageArguments) -> Layout:
    """Place the components; to be called within `gr.Blocks`."""
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
                # They would copy the text with its markup escaped.
                buttons=[],
                feedback_options=None,
            )
            notice = gr.Textbox(label=LABEL("notice"), visible=False, interactive=False, elem_id="notice")
            question = gr.Textbox(label=LABEL("question"), max_lines=8, autofocus=True, elem_id="question")
            image = gr.File(
                label=LABEL("image"),
                type="filepath",
                file_types=[".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"],
                height=120,
                visible=arguments.accept_images,
                elem_id="image",
            )
            with gr.Row():
                buttons = {
                    name: gr.Button(LABEL(name), variant=variant, interactive=ready, min_width=80, elem_id=name)
                    for name, variant, ready in (
                        ("send", "primary", True),
                        ("stop", "stop", False),
                        ("retry", "secondary", False),
                        ("undo", "secondary", False),
                        ("clear", "secondary", True),
                    )
                }
        with gr.Column(scale=1, min_width=280), gr.Accordion(LABEL("settings")):
            system = gr.Textbox(arguments.system_prompt, label=LABEL("system_prompt"), elem_id="system_prompt")
            sliders = {
                name: gr.Slider(min(low, value), max(high, value), value, step=step, label=LABEL(name), elem_id=name)
                for name, value, low, high, step in (
                    ("max_new_tokens", arguments.max_new_tokens, 1, 4096, 1),
                    ("temperature", arguments.temperature, 0, 2, 0.01),
                    ("top_p", arguments.top_p, 0.01, 1, 0.01),
                    ("top_k", arguments.top_k, 0, 200, 1),
                    ("repetition_penalty", arguments.repetition_penalty, 0.5, 2, 0.01),
                )
            }
            # An empty number field would be 0.
            value = "" if arguments.seed is None else str(arguments.seed)
            seed = gr.Textbox(value, label=LABEL("seed"), elem_id="seed")
    return Layout(turns, chatbot, notice, question, image, buttons, system, sliders, seed)


def build_page(batcher: Batcher, arguments: PageArguments, uploads: Uploads | None = None) -> gr.Blocks:
    """The page: its components, and what happens when a button is pressed. Images of visitors arrive in `uploads`."""
    prompts = PromptReader(arguments.max_prompt_chars)
    with gr.Blocks(title="MedicalGPT", analytics_enabled=False) as page:
        layout = lay_out(arguments)
        turns, chatbot, question, view = layout.turns, layout.chatbot, layout.question, layout.view

        async def ask(
            event: gr.EventData,
            visitor: gr.Request,
            said: Turns,
            asked: str,
            attached: str | None,
            system_prompt: str,
            seed: str,
            *values: float,
        ) -> AsyncIterator[dict[gr.Component, Any]]:
            before, _ = without_unanswered(said)
            earlier, again = before, event.target.elem_id == "retry"
            turn: dict[str, Any] = {"role": "user"}
            if again and before:
                earlier, turn, asked = before[:-2], before[-2], before[-2]["content"]
            elif event.target.elem_id == "chat":
                asked = event.value["text"]
            if not asked.strip():
                yield view(before)
                return
            said, text, note = [*earlier, {**turn, "content": asked}], "", ""
            try:
                prompts.check([system_prompt, said])
                yield {**view(said, busy=True), question: ""}
                if attached and not again:
                    said[-1]["picture"] = await asyncio.to_thread(take_picture, attached, uploads)
                sampling = Sampling(seed=seed_of(seed), **dict(zip(layout.sliders, values, strict=True)))
                messages, pictures = conversation(said, system_prompt)
                client = visitor_of(visitor)
                request = await prompts.read(client, messages, batcher.engine.request, sampling, None, pictures)
                growing = stream(batcher, replace(request, client=client), arguments.request_timeout)
                async with aclosing(growing):
                    async for text, note in growing:  # noqa: B007  (the last note is used below)
                        answered = [*said, {"role": "assistant", "content": text}]
                        yield {turns: answered, chatbot: escape_turns(answered)}
            except Exception as error:
                note = describe(error)
            if text:
                answered = [*said, {"role": "assistant", "content": text}]
                yield {**view(answered, note=note), **({} if again else {layout.image: None})}
            else:
                # An empty turn would teach the model to say nothing from here on.
                note = note or "The model gave no answer."
                yield {**view(before, note=note), layout.image: None, question: "" if again else asked}

        def stop_answer(said: Turns, typed: str) -> dict[gr.Component, Any]:
            said, unanswered = without_unanswered(said)
            return {**view(said), question: unanswered or typed}

        def undo_turn(said: Turns) -> dict[gr.Component, Any]:
            said, unanswered = without_unanswered(said)
            if unanswered is None and said:
                said, unanswered = said[:-2], said[-2]["content"]
            return {**view(said), question: unanswered or ""}

        buttons = layout.buttons
        private = {"outputs": layout.outputs, "api_visibility": "private"}
        # One event for everything that asks: a visitor gets one answer at a time, and the other buttons can cancel it.
        asking = gr.on(
            [buttons["send"].click, question.submit, buttons["retry"].click, chatbot.example_select],
            ask,
            [turns, question, layout.image, layout.system, layout.seed, *layout.sliders.values()],
            show_progress_on=chatbot,
            show_progress="minimal",
            trigger_mode="once",
            **private,
        )
        ending = {"cancels": asking, "queue": False, "show_progress": "hidden", **private}
        buttons["stop"].click(stop_answer, [turns, question], **ending)
        buttons["undo"].click(undo_turn, turns, **ending)
        gr.on([buttons["clear"].click, chatbot.clear], lambda: view([]), **ending)
    return page.queue(default_concurrency_limit=None, max_size=MAX_EVENTS, api_open=False)


def without_unanswered(said: Turns) -> tuple[Turns, str | None]:
    """Return the turns without a last, unanswered question, and that question."""
    if said and said[-1]["role"] == "user":
        return said[:-1], said[-1]["content"]
    return said, None


def seed_of(text: str) -> int | None:
    """Raises ValueError if the text is neither a number nor empty."""
    if text.strip() and not text.strip().isdecimal():
        raise ValueError(f"The seed is {text!r}, it must be a whole number or empty.")
    return int(text) if text.strip() else None


if __name__ == "__main__":
    run_main(main)
