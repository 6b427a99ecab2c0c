"""A conversation in the terminal: typed lines in, streamed answers out."""

import sys
from collections.abc import Callable, Iterator

from medicalgpt.logs import printable
from medicalgpt.serving.chat import ChatEngine
from medicalgpt.serving.generation import GenerationRequest


def system_message(text: str | None) -> list[dict[str, str]]:
    return [{"role": "system", "content": text}] if text else []


def print_answer(
    engine: ChatEngine, request: GenerationRequest, shown: Callable[[str, bool], str] = lambda text, ended: text
) -> str:
    """Print an answer while it is generated. Ctrl-C ends it early. Returns it as the model wrote it.

    Args:
        shown: what to print for the answer so far, and whether it has ended; it only ever gets longer.
    """
    text, printed = "", 0

    def advance(ended: bool) -> None:
        nonlocal printed
        visible = shown(text, ended)
        # A file or another program gets the answer as it is.
        new = printable(visible[printed:]) if sys.stdout.isatty() else visible[printed:]
        print(new, end="\n" if ended else "", flush=True)
        printed = len(visible)

    try:
        with engine.stream(request) as stream:
            for piece in stream:
                text += piece
                advance(ended=False)
        advance(ended=True)
        if stream.answer.finish_reason == "length":
            limit = request.sampling.max_new_tokens
            print_note(f"(cut after {stream.answer.completion_tokens} tokens; --max_new_tokens {limit})")
    except KeyboardInterrupt:
        advance(ended=True)
        print_note("(stopped)")
    return text


def print_note(text: str) -> None:
    """Print something that is not part of an answer, to stderr."""
    print(printable(text), file=sys.stderr, flush=True)


def read_lines() -> Iterator[str]:
    """The lines that the user types, until Ctrl-D, the end of the input, or Ctrl-C at the prompt."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  (gives `input` line editing that knows wide characters)

        print_note("/help lists the commands, Ctrl-C stops an answer, Ctrl-D exits.")
    while True:
        try:
            line = input("\n> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        yield line.strip()
