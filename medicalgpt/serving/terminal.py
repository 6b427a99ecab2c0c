"""A conversation in the terminal: typed lines in, streamed answers out."""

import sys
from collections.abc import Callable, Iterator

from medicalgpt.serving.chat import ChatEngine
from medicalgpt.serving.generation import GenerationRequest


def system_message(text: str | None) -> list[dict[str, str]]:
    return [{"role": "system", "content": text}] if text else []


def print_answer(engine: ChatEngine, request: GenerationRequest, show: Callable[[str, bool], str] | None = None) -> str:
    """Print an answer while it is generated. Ctrl-C ends it early. Returns the answer.

    Args:
        show: what is printed of an answer so far, and whether it is complete; each text begins with the previous one.
            None prints it as it is.
    """
    answer = printed = ""

    def print_more(is_complete: bool) -> None:
        nonlocal printed
        text = show(answer, is_complete) if show else answer
        print(text[len(printed) :], end="\n" if is_complete else "", flush=True)
        printed = text

    try:
        with engine.stream(request) as stream:
            for piece in stream:
                answer += piece
                print_more(False)
        print_more(True)
        if stream.answer.finish_reason == "length":
            limit = request.sampling.max_new_tokens
            print_note(f"(cut after {stream.answer.completion_tokens} tokens; --max_new_tokens {limit})")
    except KeyboardInterrupt:
        print_more(True)
        print_note("(stopped)")
    return answer


def print_note(text: str) -> None:
    """Print something that is not part of an answer, to stderr."""
    print(text, file=sys.stderr, flush=True)


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
