"""The conversation of a web page: bubbles, the question box under them, the buttons, and what happens on each."""

import html
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medicalgpt.serving.language import LABEL, language_of, text_in
from medicalgpt.serving.page import describe
from medicalgpt.serving.page_turns import (
    Turn,
    Turns,
    bubbles,
    input_turn,
    pending_call,
    thumbs,
    without_last,
    without_unanswered,
)

import gradio as gr

Update = dict[gr.blocks.Block, Any]


@dataclass
class Progress:
    """An answer so far.

    Attributes:
        turn: of the assistant; None before there is any.
        note: to be shown at the end.
        updates: of the page's own components.
    """

    turn: Turn | None = None
    note: str = ""
    updates: Update = field(default_factory=dict)


# Answers the turns, whose last one is the input. Called with the visitor's language, too, and the values of the inputs.
Answerer = Callable[..., AsyncIterator[Progress]]


class ChatPanel:
    """The components, to be placed by `with gr.Blocks()`, and their events, see `connect`.

    Args:
        lang: --lang.
        about: name of the label with the warning that is shown between answers and box.
        examples: questions to choose from, by language.
        empty: name of the message in an empty conversation.
        has_thumbs: whether answers can be judged.
        extra_buttons: below the box, by elem_id, which is also the name of the label.

    Attributes:
        turns: all that is known of a visitor; each session has its own.
        composer: the frame of the question box, for components of the page's own.
    """

    def __init__(
        self,
        lang: str,
        *,
        about: str,
        empty: str,
        examples: dict[str, Sequence[str]] | None = None,
        has_thumbs: bool = False,
        extra_buttons: Sequence[str] = (),
    ):
        self.lang, self.empty, self.examples = lang, empty, examples
        self.turns, self.returned = gr.State([]), gr.State("")
        self.chatbot = gr.Chatbot(
            label=LABEL("chat"),
            show_label=False,
            elem_id="chat",
            height=None,
            sanitize_html=True,
            allow_tags=False,
            buttons=["copy"],
            feedback_options=("Like", "Dislike") if has_thumbs else None,
        )
        self.notice = gr.HTML(visible=False, elem_id="notice")
        with gr.Column(elem_id="composer") as self.composer, gr.Row(elem_id="box"):
            self.question = gr.Textbox(
                placeholder=LABEL("question"),
                label=LABEL("question"),
                show_label=False,
                container=False,
                max_lines=8,
                autofocus=True,
                scale=1,
                elem_id="question",
            )
            send = gr.Button(LABEL("send"), variant="primary", size="md", scale=0, min_width=72, elem_id="send")
            stop = gr.Button(
                LABEL("stop"), variant="stop", size="md", scale=0, min_width=72, interactive=False, elem_id="stop"
            )
        with gr.Row(elem_id="actions"):
            small = {"size": "sm", "scale": 0, "min_width": 0}
            names = ("retry", "undo", "clear", *extra_buttons)
            quiet = {name: gr.Button(LABEL(name), elem_id=name, **small) for name in names}
        gr.Markdown(LABEL(about), elem_id="about")
        self.buttons = {"send": send, "stop": stop, **quiet}

    @property
    def outputs(self) -> list[gr.blocks.Block]:
        """What an event may change."""
        buttons = [self.buttons[name] for name in ("send", "stop", "retry", "undo")]
        return [self.turns, self.chatbot, self.returned, self.notice, *buttons]

    def language(self, visitor: gr.Request) -> str:
        return language_of(visitor, self.lang)

    def conversation(self, said: Turns, language: str, *, growing: bool = False) -> Update:
        """The turns and their bubbles."""
        shown, numbers = bubbles(said, language, growing=growing)
        value = {"feedback_value": thumbs(said, numbers, shown)} if self.chatbot.feedback_options else {}
        return {self.turns: said, self.chatbot: gr.update(value=shown, **value)}

    def note(self, text: str) -> Update:
        return {self.notice: gr.update(value=html.escape(text), visible=bool(text))}

    def turn_at(self, said: Turns, bubble: int, language: str) -> int:
        """The number of the turn that a bubble shows."""
        return bubbles(said, language)[1][bubble]

    def view(self, said: Turns, language: str, *, busy: bool = False, note: str = "") -> Update:
        """What the page shows after these turns."""
        call = pending_call(said)
        if call and not note and not busy:
            note = text_in(language, "call_pending", name=call["function"]["name"])
        return {
            **self.conversation(said, language),
            **self.note(note),
            self.buttons["send"]: gr.update(interactive=not busy),
            self.buttons["stop"]: gr.update(interactive=busy),
            self.buttons["retry"]: gr.update(interactive=bool(said) and said[-1]["role"] == "assistant" and not busy),
            self.buttons["undo"]: gr.update(interactive=bool(said)),
        }

    def connect(
        self,
        page: gr.Blocks,
        answer: Answerer,
        inputs: Sequence[gr.blocks.Block] = (),
        outputs: Sequence[gr.blocks.Block] = (),
    ) -> None:
        """Let the buttons do their work.

        Args:
            answer: writes answers.
            inputs: components whose values it gets.
            outputs: components that its `Progress.updates` may change.
        """
        self._answer, self._outputs = answer, [*self.outputs, *outputs]
        private = {"api_visibility": "private"}
        asking = {
            "inputs": [self.turns, self.question, *inputs],
            "outputs": self._outputs,
            "show_progress": "hidden",
            "trigger_mode": "once",
            "concurrency_limit": None,
            **private,
        }
        sent = gr.on(
            [self.buttons["send"].click, self.question.submit],
            self._ask,
            js="(...values) => window.medicalgpt.take(...values)",
            **asking,
        )
        again = gr.on([self.buttons["retry"].click, self.chatbot.example_select], self._ask_again, **asking)
        # What was not answered goes back to the box, before what has been typed since.
        boxes = [self.returned, self.question]
        for event in (sent, again):
            event.then(give_back, boxes, boxes, queue=False, show_progress="hidden", **private)
        ending = {"cancels": [sent, again], "queue": False, "show_progress": "hidden", **private}
        changed = [*self._outputs, self.question]
        self.buttons["stop"].click(self._stop, [self.turns, self.question], changed, **ending)
        self.buttons["undo"].click(self._undo, [self.turns, self.question], changed, **ending)
        self.buttons["clear"].click(self._clear, None, self.outputs, **ending)
        page.load(self._open, None, self._outputs[:8], queue=False, show_progress="hidden", **private)

    async def _ask(self, visitor: gr.Request, said: Turns, typed: str, *values: Any) -> AsyncIterator[Update]:
        before, _ = without_unanswered(said)
        if not typed.strip():
            yield {self.returned: gr.skip()}
            return
        said = [*before, input_turn(before, typed)]
        if pending_call(said):
            # The model continues when it has the results of all its calls.
            yield self.view(said, self.language(visitor), busy=True)
            yield self.view(said, self.language(visitor))
            return
        async with aclosing(self._write(visitor, before, said, typed, values)) as updates:
            async for update in updates:
                yield update

    async def _ask_again(
        self, event: gr.EventData, visitor: gr.Request, said: Turns, _: str, *values: Any
    ) -> AsyncIterator[Update]:
        before, typed = said, ""
        if event.target.elem_id == "chat":
            typed = event.value["text"]
            said = [*said, input_turn(said, typed)]
        elif said and said[-1]["role"] == "assistant":
            said = said[:-1]
        else:
            yield {self.returned: gr.skip()}
            return
        async with aclosing(self._write(visitor, before, said, typed, values)) as updates:
            async for update in updates:
                yield update

    async def _write(
        self, visitor: gr.Request, before: Turns, said: Turns, typed: str, values: Sequence[Any]
    ) -> AsyncIterator[Update]:
        """The page while the last turn of `said` is answered. If that fails it shows `before`, and returns `typed`."""
        language = self.language(visitor)
        yield self.view(said, language, busy=True)
        progress = Progress()
        try:
            async with aclosing(self._answer(visitor, language, said, *values)) as growing:
                async for progress in growing:
                    answered = [*said, progress.turn] if progress.turn else said
                    yield {**self.conversation(answered, language, growing=True), **progress.updates}
        except Exception as error:
            progress.note = describe(error, language)
        turn = progress.turn
        if turn and (turn["content"] or turn.get("tool_calls")):
            yield self.view([*said, turn], language, note=progress.note)
        else:
            # An empty turn would teach the model to say nothing from here on.
            note = progress.note or text_in(language, "no_answer")
            yield {**self.view(before, language, note=note), self.returned: typed}

    def _stop(self, visitor: gr.Request, said: Turns, typed: str) -> Update:
        said, unanswered = without_unanswered(said)
        return {**self.view(said, self.language(visitor)), self.question: joined(unanswered, typed)}

    def _undo(self, visitor: gr.Request, said: Turns, typed: str) -> Update:
        said, last = without_last(said)
        return {**self.view(said, self.language(visitor)), self.question: joined(last, typed)}

    def _clear(self, visitor: gr.Request) -> Update:
        return self.view([], self.language(visitor))

    def _open(self, visitor: gr.Request) -> Update:
        language = self.language(visitor)
        shown = self.view([], language)
        placeholder = f"<div class='empty'>{html.escape(text_in(language, self.empty))}</div>"
        examples = {"examples": [{"text": text} for text in self.examples[language]]} if self.examples else {}
        return {**shown, self.chatbot: gr.update(value=[], placeholder=placeholder, **examples)}


def lay_out_header(model: str, *panels: str) -> None:
    """The line at the top: what answers, and buttons that open panels."""
    with gr.Row(elem_id="header"):
        # Where the model is on this machine is nobody's business.
        gr.HTML(f"<b>MedicalGPT</b> <span>{html.escape(Path(model).name)}</span>", elem_id="title")
        for name in panels:
            button = gr.Button(LABEL(name), size="sm", scale=0, min_width=0, elem_id=f"open_{name}")
            button.click(None, js=f"() => window.medicalgpt.toggle('{name}')", api_visibility="private")


def close_button(name: str) -> None:
    """A button that closes a panel."""
    button = gr.Button(LABEL("close"), size="sm", scale=0, min_width=0, elem_id=f"close_{name}")
    button.click(None, js=f"() => window.medicalgpt.toggle('{name}')", api_visibility="private")


def give_back(returned: str, typed: str) -> tuple[str, str]:
    """Empty the first, and put it before what is in the box."""
    return "", joined(returned, typed)


def joined(first: str | None, second: str | None) -> str:
    return "\n".join(filter(None, (first, second)))
