"""A conversation in the terminal: typed lines in, streamed answers out."""

import sys
from collections.abc import Iterator
from typing import Any

from medicalgpt.serving.chat import ChatEngine
from medicalgpt.serving.generation import Sampling


def system_message(text: str | None) -> list[dict[str, str]]:
    return [{"role": "system", "content": text}] if text else []


def say(engine: ChatEngine, messages: list[dict[str, Any]], sampling: Sampling) -> str:
    """Print an answer while it is generated. Ctrl-C ends it early. Returns what was printed."""
    pieces: list[str] = []
    try:
        with engine.stream(messages, sampling) as stream:
            for piece in stream:
                pieces.append(piece)
                print(piece, end="", flush=True)
        print(flush=True)
        if stream.answer.finish_reason == "length":
            note(f"(cut after {stream.answer.completion_tokens} tokens; --max_new_tokens {sampling.max_new_tokens})")
    except KeyboardInterrupt:
        print(flush=True)
        note("(stopped)")
    return "".join(pieces)


def note(text: str) -> None:
    """Tell the person something that is no part of an answer."""
    print(text, file=sys.stderr, flush=True)


def typed_lines() -> Iterator[str]:
    """What a person types, line by line, until Ctrl-D, the end of the input, or Ctrl-C at the prompt."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  (gives `input` line editing that knows wide characters)

        note("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves.")
    while True:
        try:
            line = input("\n> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        yield line.strip()
