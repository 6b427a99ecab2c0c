"""Turns of a conversation on a page: as messages for the model, as bubbles, and as rows to train on.

A turn is `{"role": ..., "content": ...}` with the role user, assistant or tool. A turn of the user may have a `picture`
(`Picture`), one of the assistant `tool_calls` in OpenAI form, `thumb` (True for up, False for down), and `below`:
Markdown that is shown under the answer but does not belong to it.
"""

import html
import json
import re
from typing import Any

from medicalgpt.data.images import Picture, question_with_images
from medicalgpt.errors import UserError
from medicalgpt.serving.language import text_in

Turn = dict[str, Any]
Turns = list[Turn]

# Code in Markdown, and what browsers read as a tag or an entity.
CODE = re.compile(r"(```.*?(?:```|$)|`[^`\n]+`)", re.DOTALL)
HTML = re.compile(r"<(?=[a-zA-Z/!?])|&(?=[a-zA-Z#])")
THOUGHTS = re.compile(r"\s*<think>(.*?)(?:</think>|$)", re.DOTALL)
# A mark of a citation, as answers over documents show it.
CITATION = re.compile(r"\[(\d+)\]")


def pending_call(said: Turns) -> Turn | None:
    """The first tool call of the last answer whose result is missing; None if there is none."""
    results = 0
    for turn in reversed(said):
        if turn["role"] != "tool":
            calls = turn.get("tool_calls", ())
            return calls[results] if results < len(calls) else None
        results += 1
    return None


def input_turn(said: Turns, text: str) -> Turn:
    """What a visitor has typed: the result of a tool if one was called, otherwise a question."""
    return {"role": "tool" if pending_call(said) else "user", "content": text}


def without_unanswered(said: Turns) -> tuple[Turns, str | None]:
    """Return the turns without a last input that the model has not answered, and the text of that input."""
    if said and said[-1]["role"] != "assistant" and not pending_call(said):
        return said[:-1], said[-1]["content"]
    return said, None


def without_last(said: Turns) -> tuple[Turns, str | None]:
    """Return the turns without the last input and its answer, and the text of that input."""
    said = said[:-1] if said and said[-1]["role"] == "assistant" else said
    return (said[:-1], said[-1]["content"]) if said else (said, None)


def conversation(said: Turns, system_prompt: str | None) -> tuple[list[dict[str, Any]], list[Picture]]:
    """The messages for the model, and their images."""
    messages: list[dict[str, Any]] = []
    if system_prompt and system_prompt.strip():
        messages.append({"role": "system", "content": system_prompt})
    pictures = []
    for turn in said:
        if turn["role"] == "user":
            own = [turn["picture"]] if turn.get("picture") else []
            messages.append(question_with_images(turn["content"], len(own)))
            pictures += own
        else:
            messages.append({name: turn[name] for name in ("role", "content", "tool_calls") if name in turn})
    return messages, pictures


def bubbles(said: Turns, language: str, *, growing: bool = False) -> tuple[list[dict[str, Any]], list[int]]:
    """What the conversation shows, and for each bubble the number of its turn.

    Reasoning, calls and results are bubbles of their own, folded once they are complete. Of an image, its size is
    shown.

    Args:
        growing: the last turn is not complete yet.
    """
    shown: list[dict[str, Any]] = []
    numbers: list[int] = []

    def add(role: str, content: str, title: str | None = None, status: str = "done") -> None:
        metadata = {"metadata": {"title": title, "status": status}} if title else {}
        shown.append({"role": role, "content": content, **metadata})
        numbers.append(number)

    for number, turn in enumerate(said):
        text = turn["content"]
        if turn["role"] == "user":
            picture = turn.get("picture")
            size = f"🖼 {picture.width} × {picture.height}\n\n" if picture else ""
            add("user", size + escape(text))
        elif turn["role"] == "tool":
            add("assistant", fenced(text), text_in(language, "tool_result"))
        else:
            thoughts = THOUGHTS.match(text)
            if thoughts:
                closed = thoughts[0].endswith("</think>")
                text = text[thoughts.end() :].lstrip()
                if thoughts[1].strip() or not closed:
                    status = "pending" if growing and not closed and number == len(said) - 1 else "done"
                    add("assistant", escape(thoughts[1].strip()), text_in(language, "thoughts"), status)
            if text or not (thoughts or turn.get("tool_calls")):
                below = turn.get("below", "")
                content = link_citations(escape(text), number) if "below" in turn else escape(text)
                add("assistant", content + (f"\n\n{below}" if below else ""))
            for call in turn.get("tool_calls", ()):
                function = call["function"]
                arguments = json.dumps(function["arguments"], ensure_ascii=False, indent=1)
                add("assistant", fenced(arguments, "json"), text_in(language, "tool_call", name=function["name"]))
    return shown, numbers


def thumbs(said: Turns, numbers: list[int], shown: list[dict[str, Any]]) -> list[str | None]:
    """What was pressed below each bubble of the assistant, in the form of `gr.Chatbot(feedback_value=...)`."""
    names = {True: "Like", False: "Dislike", None: None}
    return [
        names[said[number].get("thumb")]
        for number, bubble in zip(numbers, shown, strict=True)
        if bubble["role"] == "assistant"
    ]


def escape(text: str) -> str:
    """Text with HTML escaped, except in code: sanitizing would silently remove it."""
    parts = CODE.split(text)
    parts[::2] = (HTML.sub(lambda mark: html.escape(mark[0]), part) for part in parts[::2])
    return "".join(parts)


def fenced(text: str, language: str = "") -> str:
    """Text as a code block, whatever backticks it has."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def link_citations(text: str, number: int) -> str:
    """Markdown in which `[2]` opens the second source of turn `number`."""
    return CITATION.sub(lambda mark: f"[\\[{mark[1]}\\]](#source-{number}-{mark[1]})", text)


def sharegpt_row(said: Turns, system_prompt: str | None, tools: list[dict[str, Any]] | None) -> dict[str, Any]:
    """The conversation as a row to train on, up to its last complete answer.

    Raises:
        UserError: nothing of it can be trained on, or it has images, which a row has as files.
    """
    said = list(said)
    while said and (said[-1]["role"] != "assistant" or said[-1].get("tool_calls")):
        said.pop()
    if not said:
        raise UserError("There is no complete answer yet that could be trained on.")
    if any(turn.get("picture") for turn in said):
        raise UserError("A conversation with images cannot be exported: a row names them as files.")
    turns: list[dict[str, Any]] = []
    if system_prompt and system_prompt.strip():
        turns.append({"from": "system", "value": system_prompt})
    for turn in said:
        calls = turn.get("tool_calls")
        if calls and not turn["content"].strip():
            functions = [call["function"] for call in calls]
            value = functions[0] if len(functions) == 1 else functions
            turns.append({"from": "function_call", "value": json.dumps(value, ensure_ascii=False)})
        else:
            names = {"user": "human", "assistant": "gpt", "tool": "observation"}
            made = {"from": names[turn["role"]], "value": turn["content"]}
            turns.append({**made, "tool_calls": list(calls)} if calls else made)
    row: dict[str, Any] = {"conversations": turns}
    if tools:
        row["tools"] = json.dumps(tools, ensure_ascii=False)
    return row


def preference_row(
    said: Turns, number: int, is_good: bool, system_prompt: str | None, tools: list[dict[str, Any]] | None
) -> dict[str, Any]:
    """A judged answer as TRL's KTO takes it: `prompt` and `completion` are messages, `label` is True for a good one.

    Raises:
        UserError: the conversation has images, which a row of KTO has no place for.
    """
    if any(turn.get("picture") for turn in said[:number]):
        raise UserError("Answers about images are not recorded: the row has no place for them.")
    prompt, _ = conversation(said[:number], system_prompt)
    completion, _ = conversation(said[number : number + 1], None)
    row: dict[str, Any] = {"prompt": prompt, "completion": completion, "label": is_good}
    if tools:
        row["tools"] = tools
    return row
