"""A web page to talk to a trained model: streamed answers, conversations of many turns, tools, thinking.

    python gradio_demo.py --model_name_or_path outputs-sft
    python gradio_demo.py --base_model Qwen/Qwen3-0.6B --lora_model outputs-sft --port 8082
    python gradio_demo.py --model_name_or_path outputs-sft --feedback_file outputs/feedback.jsonl

Several visitors are answered in one batch. What a visitor writes stays in the visitor's session and is forgotten with
it, unless `--feedback_file` is given and the visitor judges an answer. The page loads nothing from other hosts.

With `--accept_images True`, a question can have an image, for checkpoints of Qwen2.5-VL and Qwen3-VL.

By default only this machine can open it. `--host 0.0.0.0` opens it to the network, `--share True` makes a public link
through Gradio's servers; both need `--auth user:password`, or the same in the environment as MEDICALGPT_AUTH.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from medicalgpt.data.images import Picture
from medicalgpt.errors import UserError, run_main
from medicalgpt.formats.turns import to_tools
from medicalgpt.logs import setup_logging
from medicalgpt.parser import parse_args
from medicalgpt.readers.problems import RowError
from medicalgpt.serving.arguments import PageArguments
from medicalgpt.serving.batchers import Batcher, batcher_from
from medicalgpt.serving.chat_panel import ChatPanel, Progress, close_button, lay_out_header
from medicalgpt.serving.engines import engine_from
from medicalgpt.serving.feedback import FeedbackFile
from medicalgpt.serving.generation import Sampling, sampling_from
from medicalgpt.serving.image_args import ImageServingArguments
from medicalgpt.serving.language import LABEL, text_in
from medicalgpt.serving.page import MAX_EVENTS, describe, launch, note_on, serve, stream, visitor_of
from medicalgpt.serving.page_turns import Turns, conversation, preference_row, sharegpt_row
from medicalgpt.serving.prompts import PromptReader
from medicalgpt.serving.uploads import Uploads
from medicalgpt.serving.web import auth_from
from template import check_template

import gradio as gr
from loguru import logger
from transformers import PreTrainedTokenizerBase

MAX_IMAGE_BYTES = 8 * 1024 * 1024
# Of all images that are not read yet; a visitor may have a quarter of them.
MAX_UPLOAD_BYTES = 16 * MAX_IMAGE_BYTES
EXAMPLES = {
    "en": ("What doctor treats polymyalgia rheumatica?", "How is high blood pressure treated?"),
    "zh": ("一氧化碳中毒要看什么科？", "怀疑是肠套叠，应该做哪些检查？"),
}
TOOLS_EXAMPLE = """[{"name": "find_doctor", "description": "...",
  "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}]"""


@dataclass
class DemoArguments(ImageServingArguments, PageArguments):
    """Where the page is served, and what it keeps."""

    feedback_file: str | None = field(
        default=None,
        metadata={
            "help": "Show thumbs below the answers and append each judged one to this .jsonl file, as rows for KTO: "
            "prompt, completion, label. The page says so."
        },
    )

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


def lay_out_settings(arguments: DemoArguments, thinking: bool | None) -> dict[str, gr.components.FormComponent]:
    """The settings of an answer, by name; to be called within `gr.Blocks`.

    Args:
        thinking: whether the model thinks unless it is told not to; None if it cannot be told.
    """
    made: dict[str, gr.components.FormComponent] = {}
    with gr.Column(elem_id="settings", elem_classes="side-panel"):
        with gr.Row(elem_classes="panel-head"):
            gr.Markdown(LABEL("settings"))
            close_button("settings")
        made["system_prompt"] = gr.Textbox(
            arguments.system_prompt, label=LABEL("system_prompt"), lines=3, max_lines=8, elem_id="system_prompt"
        )
        made["thinking"] = gr.Checkbox(
            bool(thinking), label=LABEL("thinking"), visible=thinking is not None, elem_id="thinking"
        )
        for name, value, low, high, step in (
            ("max_new_tokens", arguments.max_new_tokens, 1, 4096, 1),
            ("temperature", arguments.temperature, 0, 2, 0.01),
            ("top_p", arguments.top_p, 0.01, 1, 0.01),
            ("top_k", arguments.top_k, 0, 200, 1),
            ("repetition_penalty", arguments.repetition_penalty, 0.5, 2, 0.01),
        ):
            made[name] = gr.Slider(min(low, value), max(high, value), value, step=step, label=LABEL(name), elem_id=name)
        # An empty number field would be 0.
        value = "" if arguments.seed is None else str(arguments.seed)
        made["seed"] = gr.Textbox(value, label=LABEL("seed"), elem_id="seed")
        made["tools"] = gr.Textbox(
            label=LABEL("tools"), placeholder=TOOLS_EXAMPLE, lines=4, max_lines=16, elem_id="tools", elem_classes="code"
        )
    return made


def build_page(batcher: Batcher, arguments: DemoArguments, uploads: Uploads | None = None) -> gr.Blocks:
    """The page: its components, and what happens when a button is pressed. Images of visitors arrive in `uploads`."""
    prompts = PromptReader(arguments.max_prompt_chars)
    feedback = FeedbackFile(arguments.feedback_file) if arguments.feedback_file else None
    with gr.Blocks(title="MedicalGPT", analytics_enabled=False, fill_width=True) as page:
        with gr.Column(elem_id="main"):
            lay_out_header(arguments.model_name_or_path, "settings")
            panel = ChatPanel(
                arguments.lang,
                about="about_feedback" if feedback else "about",
                empty="empty",
                examples=EXAMPLES,
                has_thumbs=feedback is not None,
                extra_buttons=("export",),
            )
        with panel.composer:
            image = gr.File(
                label=LABEL("image"),
                type="filepath",
                file_types=[".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"],
                height=96,
                visible=arguments.accept_images,
                elem_id="image",
            )
        thinks = thinking_default(batcher.engine.tokenizer)
        settings = lay_out_settings(arguments, thinks)

        async def answer(
            visitor: gr.Request, language: str, said: Turns, attached: str | None, *values: Any
        ) -> AsyncIterator[Progress]:
            given = dict(zip(settings, values, strict=True))
            tools = read_tools(given.pop("tools"))
            system_prompt, thinking = given.pop("system_prompt"), given.pop("thinking")
            variables = None if thinks is None else {"enable_thinking": thinking}
            prompts.check([system_prompt, said, tools or []])
            if attached and said[-1]["role"] == "user" and "picture" not in said[-1]:
                said[-1]["picture"] = await asyncio.to_thread(take_picture, attached, uploads)
                yield Progress(updates={image: None})
            sampling = Sampling(**{**given, "seed": seed_of(given["seed"])})
            messages, pictures = conversation(said, system_prompt)
            client = visitor_of(visitor)
            request = await prompts.read(client, messages, batcher.engine.request, sampling, tools, pictures, variables)
            opened = opened_thoughts(batcher.engine.tokenizer, request.prompt_ids)
            growing = stream(batcher, replace(request, client=client), arguments.request_timeout)
            async with aclosing(growing):
                async for text, done in growing:
                    calls = {"tool_calls": list(done.tool_calls)} if done and done.tool_calls else {}
                    turn = {"role": "assistant", "content": opened + text if text else text, **calls}
                    yield Progress(turn, note_on(done, language))

        panel.connect(page, answer, [image, *settings.values()], [image])
        connect_export(panel, settings)
        if feedback:
            connect_thumbs(panel, settings, feedback)
    return page.queue(default_concurrency_limit=None, max_size=MAX_EVENTS, api_open=False)


def connect_export(panel: ChatPanel, settings: dict[str, gr.components.FormComponent]) -> None:
    """The conversation becomes a file in the visitor's browser; nothing is written here."""
    row = gr.Textbox(visible="hidden", elem_id="row")

    def export(visitor: gr.Request, said: Turns, system_prompt: str, tools: str) -> dict[Any, Any]:
        try:
            made = json.dumps(sharegpt_row(said, system_prompt, read_tools(tools)), ensure_ascii=False)
        except UserError as error:
            return {row: "", **panel.note(str(error))}
        return {row: f"{made}\n", **panel.note("")}

    inputs = [panel.turns, settings["system_prompt"], settings["tools"]]
    quiet = {"show_progress": "hidden", "api_visibility": "private"}
    made = panel.buttons["export"].click(export, inputs, [row, panel.notice], queue=False, **quiet)
    made.then(None, row, None, js="(text) => window.medicalgpt.download(text, 'conversation.jsonl')", **quiet)


def connect_thumbs(panel: ChatPanel, settings: dict[str, gr.components.FormComponent], feedback: FeedbackFile) -> None:
    """A thumb appends the answer and what came before it to the file."""

    def judge(event: gr.LikeData, visitor: gr.Request, said: Turns, system_prompt: str, tools: str) -> dict[Any, Any]:
        language = panel.language(visitor)
        number = panel.turn_at(said, event.index, language)
        if not isinstance(event.liked, bool) or said[number]["role"] != "assistant":
            return {panel.notice: gr.skip()}
        try:
            feedback.append(preference_row(said, number, event.liked, system_prompt, read_tools(tools)))
        except (UserError, OSError) as error:
            return panel.note(describe(error, language))
        said = [*said[:number], {**said[number], "thumb": event.liked}, *said[number + 1 :]]
        return {panel.turns: said, **panel.note(text_in(language, "feedback_kept"))}

    inputs = [panel.turns, settings["system_prompt"], settings["tools"]]
    outputs = [panel.turns, panel.notice]
    panel.chatbot.like(judge, inputs, outputs, show_progress="hidden", api_visibility="private")


def read_tools(text: str) -> list[dict[str, Any]] | None:
    """The tools that a visitor has typed, in OpenAI form; None if there are none. Raises UserError if it is not one."""
    if not text.strip():
        return None
    try:
        return to_tools(text)
    except RowError as error:
        raise UserError(f"Tools: {error.reason}. {error.remedy}") from error


def thinking_default(tokenizer: PreTrainedTokenizerBase) -> bool | None:
    """Whether the chat template lets the model think unless it is told not to; None if it cannot be told."""
    asked = [{"role": "user", "content": "?"}]
    plain, on, off = (
        tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False, **each)
        for each in ({}, {"enable_thinking": True}, {"enable_thinking": False})
    )
    return None if on == off else plain == on


def opened_thoughts(tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int]) -> str:
    """The tag that opens the reasoning if the prompt ends with it, so that the answer begins after it."""
    return "<think>\n" if tokenizer.decode(prompt_ids[-16:]).rstrip().endswith("<think>") else ""


def seed_of(text: str) -> int | None:
    """Raises ValueError if the text is neither a number nor empty."""
    if text.strip() and not text.strip().isdecimal():
        raise ValueError(f"The seed is {text!r}, it must be a whole number or empty.")
    return int(text) if text.strip() else None


if __name__ == "__main__":
    run_main(main)
