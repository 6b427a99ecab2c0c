"""The parts of chatpdf.py's page that are about files: the lists of files and of sources, and cited passages."""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

from medicalgpt.formats.citations import CitedAnswer
from medicalgpt.rag.grounding import Source, find_unsupported, highlight
from medicalgpt.serving.chat_panel import close_button
from medicalgpt.serving.language import LABEL, text_in
from medicalgpt.serving.page_turns import Turn, Turns

import gradio as gr

LISTED_FILES = 20
MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+.!|~-])")


@dataclass(frozen=True)
class FilePanels:
    """The panel of files and that of the cited passage.

    Attributes:
        upload: where files are added.
        listing: which files there are, and what was wrong with others.
        remove: the button that forgets the visitor's files.
        passages: all sources of the conversation, of which one is shown.
    """

    upload: gr.File
    listing: gr.HTML
    remove: gr.Button
    passages: gr.HTML


def lay_out_files(suffixes: Sequence[str], files: Sequence[str]) -> FilePanels:
    """Place the panels; to be called within `gr.Blocks`.

    Args:
        suffixes: of files that can be added.
        files: names of those that all visitors can ask about.
    """
    with gr.Column(elem_id="files_panel", elem_classes="side-panel"):
        with gr.Row(elem_classes="panel-head"):
            gr.Markdown(LABEL("files"))
            close_button("files")
        upload = gr.File(
            label=LABEL("add_files"), file_count="multiple", file_types=list(suffixes), height=150, elem_id="upload"
        )
        listing = gr.HTML(list_files(files, []), elem_id="files")
        remove = gr.Button(LABEL("remove_files"), size="sm", elem_id="remove_files")
    with gr.Column(elem_id="passage_panel", elem_classes="side-panel"):
        with gr.Row(elem_classes="panel-head"):
            gr.Markdown(LABEL("passage"))
            close_button("passage")
        passages = gr.HTML(elem_id="passages")
    return FilePanels(upload, listing, remove, passages)


def list_files(files: Sequence[str], messages: Sequence[str]) -> str:
    """HTML: names of files, and messages about others."""
    files = list(dict.fromkeys(files))
    rest = len(files) - LISTED_FILES
    items = [f"<li>{html.escape(name)}</li>" for name in files[:LISTED_FILES]]
    items += [f"<li>+ {rest}</li>"] if rest > 0 else []
    items += [f"<li class='problem'>{html.escape(message)}</li>" for message in messages]
    return f"<ul>{''.join(items)}</ul>" if items else ""


def cited_turn(answer: CitedAnswer, sources: Sequence[Source], number: int, language: str) -> Turn:
    """The answer as turn `number` of the page, with its sources below it."""
    return {
        "role": "assistant",
        "content": answer.text,
        "below": list_sources(answer, sources, number, language),
        "sources": [(each.place_in(language), highlight(answer, n, each)) for n, each in enumerate(sources, start=1)],
    }


def list_sources(answer: CitedAnswer, sources: Sequence[Source], number: int, language: str) -> str:
    """Markdown: the sources that an answer cites, or those given to the model, as links; and what is not in them."""

    def link(n: int) -> str:
        return f"[\\[{n}\\] {literal(sources[n - 1].place_in(language))}](#source-{number}-{n})"

    title = text_in(language, "sources" if answer.cited else "sources_given")
    lines = [f"**{title}**", *(link(n) for n in answer.cited or range(1, len(sources) + 1))]
    if answer.invented:
        lines.append("⚠ " + literal(text_in(language, "invented", marks=", ".join(answer.invented))))
    for claim, missing in find_unsupported(answer, sources):
        marks = "".join(f"[{n}]" for n in claim.cited)
        missing = ("、" if language == "zh" else ", ").join(missing)
        lines.append("⚠ " + literal(text_in(language, "unsupported", marks=marks, text=claim.text, missing=missing)))
    return "\n".join(lines)


def show_passages(said: Turns) -> str:
    """HTML: every source of the conversation, hidden until its citation is clicked. What supports it is marked."""
    return "".join(
        f"<article id='source-{number}-{n}' hidden><h3>{html.escape(place)}</h3>{show_parts(parts)}</article>"
        for number, turn in enumerate(said)
        for n, (place, parts) in enumerate(turn.get("sources", ()), start=1)
    )


def show_parts(parts: Sequence[tuple[str, bool]]) -> str:
    return "".join(f"<mark>{html.escape(text)}</mark>" if marked else html.escape(text) for text, marked in parts)


def literal(text: str) -> str:
    """Text as Markdown that shows it as it is, in one line."""
    return MARKDOWN.sub(r"\\\1", html.escape(" ".join(text.split()), quote=False))
