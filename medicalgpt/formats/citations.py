"""Citations: marks that no document of a request can spell, and an answer's marks as numbers for its reader.

A mark is a tag and the number of a source, as in `[k7q3-2]`. The tag is random for each request and does not occur in
any of its texts, so a document can neither forge a mark nor end the frame of its quotation.
"""

import re
import secrets
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count
from typing import Protocol

# Consonants and digits in turn: no words, no characters that look alike. Two pairs have 23,104 values.
LETTERS, DIGITS = "bcdfghjkmnpqrstvwxz", "23456789"
PAIRS = 2
DRAWS = 64
OPEN, CLOSE = "[\\[【［〔〖({（]", "[\\]】］〕〗)}）]"
LONGEST = 80  # characters in brackets
BRACKETS = re.compile(rf"(?P<open>{OPEN})(?P<inside>[^\[\]【】［］〔〕〖〗(){{}}（）\n]{{1,{LONGEST}}}){CLOSE}")
BETWEEN = re.compile(r"\s*(?:[,，、;；&+]|\band\b|[和与及])\s*|\s+(?=\S*-\d)")
NUMBER = re.compile(
    r"(?:#|№|no\.?|nr\.?|ref(?:erence)?\.?|source|passage|document|doc|资料|文献|来源|出处|文档|段落|第)?\s*"
    r"(?P<number>\d+)(?:\s*(?:[-–—~〜至到]|to)\s*\d+)?"
)
UNFINISHED = re.compile(rf"{OPEN}[^\[\]【】［］〔〕〖〗(){{}}（）\n]{{0,{LONGEST}}}\Z|[A-Za-z0-9/-]{{1,24}}\Z")
NOT_A_SOURCE = "[?]"
SHOWN = re.compile(r"\s*\[(?:\d+|\?)\]")


UNKNOWN = {
    "zh": "所给的文件里没有找到这个问题的答案。",
    "en": "I did not find an answer to this question in the given files.",
}


class Chooser(Protocol):
    """What draws tags: `secrets.SystemRandom`, or a seeded `random.Random` where runs have to be repeatable."""

    def choice(self, seq: str) -> str: ...


@dataclass(frozen=True)
class CitedAnswer:
    """An answer as its reader sees it.

    Attributes:
        text: with `[2]` for the mark of source 2, and `[?]` for anything else that looks like a citation.
        cited: the numbers of the sources cited, each once, in order.
        invented: what was replaced by `[?]`, as the model wrote it, each once.
    """

    text: str
    cited: list[int]
    invented: list[str]


def draw_tag(texts: Iterable[str], chooser: Chooser | None = None) -> str:
    """A tag that occurs in none of the texts, in whatever case, width or spacing.

    Args:
        texts: everything that will be in the prompt: documents, their names, the conversation.
        chooser: None draws from the operating system.
    """
    chooser = chooser or secrets.SystemRandom()
    taken = [_squeezed(text) for text in texts]
    for pairs in count(PAIRS):
        # A document that lists all tags of a length makes the next one longer.
        for _ in range(DRAWS):
            tag = "".join(chooser.choice(LETTERS) + chooser.choice(DIGITS) for _ in range(pairs))
            if not any(tag in text for text in taken):
                return tag


def _squeezed(text: str) -> str:
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKC", text).casefold()))


def mark(tag: str, number: int) -> str:
    return f"[{tag}-{number}]"


def frame(tag: str, number: int, place: str, text: str) -> str:
    """A quotation from a document in the prompt, between its mark and the mark of its end."""
    return f"{mark(tag, number)} {' '.join(place.split())}\n{text}\n[/{tag}-{number}]"


def read_citations(answer: str, tag: str, sources: int) -> CitedAnswer:
    """An answer with its marks as numbers.

    Args:
        tag: of the request.
        sources: how many there are; a mark with a larger number, or 0, is not one of them.
    """
    ours = re.compile(rf"/?(?P<tag>{tag}-)?(?P<number>\d+)", re.IGNORECASE)
    # Of the form of a tag, but of another request.
    foreign = re.compile(rf"/?(?:[{LETTERS}][{DIGITS}]){{{PAIRS},}}(?:-\d+)?", re.IGNORECASE)
    bare = rf"(?<![A-Za-z0-9])/?{tag}(?:-(?P<bare>\d+))?(?![A-Za-z0-9]|-\d)"
    cited: list[int] = []
    invented: list[str] = []

    def numbered(number: int, written: str) -> str:
        if 1 <= number <= sources:
            cited.append(number)
            return f"[{number}]"
        invented.append(written)
        return NOT_A_SOURCE

    def replace(match: re.Match[str]) -> str:
        if match["inside"] is None:
            return numbered(int(match["bare"] or 0), match[0])
        # Invisible characters would make `[2]` of something that is not read as a citation.
        inside = "".join(c for c in match["inside"] if unicodedata.category(c) != "Cf")
        items = [item for item in BETWEEN.split(inside.strip()) if item]
        found = [ours.fullmatch(item) for item in items]
        if found and all(found) and found[0]["tag"]:
            return "".join(numbered(int(item["number"]), match[0]) for item in found)
        if any(item and item["tag"] for item in found):
            return re.sub(bare, replace_bare, match[0], flags=re.IGNORECASE)
        # (1) counts the items of a list, {1} and the like are text; neither looks like a citation.
        if match["open"] in "({（" or not items:
            return match[0]
        if all(NUMBER.fullmatch(item.casefold()) or foreign.fullmatch(item) for item in items):
            invented.append(match[0])
            return NOT_A_SOURCE
        return match[0]

    def replace_bare(match: re.Match[str]) -> str:
        return numbered(int(match["bare"] or 0), match[0])

    text = re.sub(f"{BRACKETS.pattern}|{bare}", replace, answer, flags=re.IGNORECASE)
    return CitedAnswer(text, list(dict.fromkeys(cited)), list(dict.fromkeys(invented)))


def finished(answer: str) -> str:
    """The part of a growing answer that further text cannot change: without a bracket or a word just begun."""
    return UNFINISHED.sub("", answer)


def without_citations(text: str) -> str:
    """An answer shown before, without its numbers: in a later request they are not marks, and would be imitated."""
    return SHOWN.sub("", text)
