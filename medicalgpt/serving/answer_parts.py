"""The parts of an answer while it is generated: reasoning, text, and calls of tools, piece by piece."""

from collections.abc import Collection
from dataclasses import dataclass

from medicalgpt.models.tool_formats import ToolFormat, end_of_thoughts, partial_match_length

# Reasoning is between these.
THINK, END_OF_THINK = "<think>", "</think>"


class ThoughtReader:
    """Separates the reasoning before an answer from the answer, neither with the white space around the marks.

    Args:
        begun: the prompt ends in `<think>`, so that the text begins within the reasoning.
    """

    def __init__(self, begun: bool):
        # None until it is known whether the text begins with `<think>`.
        self._thinking = True if begun else None
        # White space is left out where reasoning or answer begins.
        self._at_start = begun
        self._held = ""

    def feed(self, text: str, last: bool = False) -> tuple[str, str]:
        """The new piece of the reasoning, and the new piece of the answer.

        Args:
            last: no further text follows.
        """
        self._held += text
        if self._thinking is None:
            begins = self._held.lstrip()
            if begins.startswith(THINK):
                self._thinking, self._at_start, self._held = True, True, begins.removeprefix(THINK)
            elif last or not THINK.startswith(begins):
                self._thinking = False
        if self._thinking is None:
            return "", ""
        thought = self._thought(last) if self._thinking else ""
        return thought, "" if self._thinking else self._take(len(self._held))

    def _thought(self, last: bool) -> str:
        end = self._held.find(END_OF_THINK)
        if end < 0:
            # White space at the end may be what separates the mark from the reasoning.
            sure = len(self._held) - (0 if last else partial_match_length(self._held, END_OF_THINK))
            return self._take(len(self._held[:sure].rstrip()))
        thought = self._take(len(self._held[:end].rstrip()))
        self._held = self._held.lstrip().removeprefix(END_OF_THINK)
        self._thinking, self._at_start = False, True
        return thought

    def _take(self, length: int) -> str:
        piece, self._held = self._held[:length], self._held[length:]
        if self._at_start:
            piece = piece.lstrip("\n")
            self._at_start = not piece
        return piece


def split_thoughts(text: str, begun: bool) -> tuple[str, str]:
    """The reasoning and the answer of a whole text. For `begun` see `ThoughtReader`."""
    return ThoughtReader(begun).feed(text, last=True)


@dataclass(frozen=True)
class CallPiece:
    """A piece of a tool call.

    Attributes:
        index: of the call in its answer.
        name: of the tool, in the first piece of a call only.
        arguments: the next characters of the JSON object with the arguments.
    """

    index: int
    name: str | None = None
    arguments: str = ""


class CallReader:
    """Finds calls in a text that grows, and hands on their arguments as they come.

    Args:
        form: how the model writes calls; its shape has a `head`.
        names: of the tools that are offered.
        thoughts_begun: the prompt ends in `<think>`; in the reasoning there are no calls.
    """

    def __init__(self, form: ToolFormat, names: Collection[str], thoughts_begun: bool):
        self._head = form.shape.head
        self._names = names
        self._thoughts_begun = thoughts_begun
        self._index = 0
        self._at = 0
        self._depth = 0
        self._in_call = self._in_string = self._escaped = False

    def feed(self, text: str, safe: int = 0) -> list[CallPiece]:
        """The new pieces.

        Args:
            text: the whole text so far.
            safe: how many of its characters are certain not to belong to a call.
        """
        if self._thoughts_begun and END_OF_THINK not in text:
            return []
        pieces = []
        while True:
            if not self._in_call:
                head = self._head.search(text, max(self._at, safe, 0 if self._index else end_of_thoughts(text)))
                if head is None:
                    return pieces
                self._at = head.end()
                if head[1] not in self._names:
                    continue
                self._in_call = True
                pieces.append(CallPiece(self._index, head[1]))
            begin = self._at
            self._scan(text)
            if self._at > begin:
                pieces.append(CallPiece(self._index, arguments=text[begin : self._at]))
            if self._in_call:
                return pieces
            self._index += 1

    def _scan(self, text: str) -> None:
        """Read on to the end of the text or of the object."""
        while self._at < len(text) and self._in_call:
            char = text[self._at]
            self._at += 1
            if self._in_string:
                self._in_string = self._escaped or char != '"'
                self._escaped = char == "\\" and not self._escaped
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                self._in_call = self._depth > 0
