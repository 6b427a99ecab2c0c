"""A conversation in the terminal: typed lines in, streamed answers out."""

import sys
from collections.abc import Iterator

from medicalgpt.logs import printable
from medicalgpt.serving.chat import ChatEngine
from medicalgpt.serving.generation import GenerationRequest


def system_message(text: str | None) -> list[dict[str, str]]:
    return [{"role": "system", "content": text}] if text else []


def print_answer(engine: ChatEngine, request: GenerationRequest) -> str:
    """Print an answer while it is generated. Ctrl-C ends it early. Returns what was printed."""
    pieces: list[str] = []
    try:
        with engine.stream(request) as stream:
            for piece in stream:
                pieces.append(piece)
                # A file or another program gets the answer as it is.
                print(printable(piece) if sys.stdout.isatty() else piece, end="", flush=True)
        print(flush=True)
        if stream.answer.finish_reason == "length":
            limit = request.sampling.max_new_tokens
            print_note(f"(cut after {stream.answer.completion_tokens} tokens; --max_new_tokens {limit})")
    except KeyboardInterrupt:
        print(flush=True)
        print_note("(stopped)")
    return "".join(pieces)


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
