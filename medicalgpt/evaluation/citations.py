"""Citations of an answer: marks that a document cannot contain, and whether each cited passage supports its statement.

Precision and recall of citations are those of ALCE (https://arxiv.org/abs/2305.14627), with rules (`find_unsupported`)
in place of a model of entailment.
"""

import random
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from medicalgpt.evaluation.support import find_unsupported, key_terms, measures_in, prepared

# A few tokens for any tokenizer. Without vowels a mark is not a word; 0, 1, I and O are easily mistaken.
LETTERS, FIGURES = "BCDFGHJKLMNPQRSTVWXZ", "23456789"
SHORTEST = 3
# A document must not learn from one request which marks the next one has.
UNPREDICTABLE = random.SystemRandom()
BRACKETS = re.compile(r"[\[［【〔](\s*[^\[\]［］【】〔〕\n]{1,60})[\]］】〕]")
# What a model may write in brackets as a citation although no source has it: a number, or what looks like a mark.
LIKE_A_CITATION = re.compile(r"\?|\d{1,3}(?:-\d{1,3})?|[a-z]\d[a-z](?:\d[a-z])*")
SHOWN_CITATION = re.compile(r"\s?[\[［【〔]\s*(?:\?|\d{1,3}(?:\s*[-,，、:：]\s*[^\[\]\n]{1,40})?)\s*[\]］】〕]")
HOLE = "\ue000"  # in place of a citation, of a private area of Unicode
STATEMENT = re.compile(
    rf"[^\n]+?(?:[。！？；!?]+[”’』」）)\"']*|[.;](?=\s|{HOLE}|$)|(?=\n)|$)(?:[^\S\n]*{HOLE}+)*\s*|\n\s*", re.DOTALL
)
SPACE_BEFORE_END = re.compile(r"\s+(?=[.,;:!?。，；：！？])")
LIST_NUMBER = re.compile(r"\s*[-*•]?\s*\d{1,2}\s*[.)、）]?\s*")
NOT_FOUND = {"zh": "出处中未找到", "en": "not found in the source"}


@dataclass(frozen=True)
class Evidence:
    """A passage that can be cited by its mark.

    Attributes:
        heading: the headings above it, whose words count as the passage's.
    """

    mark: str
    text: str
    heading: str


@dataclass(frozen=True)
class Citation:
    """What stands between a pair of brackets in an answer, at `start` to `end`.

    Attributes:
        numbers: of the cited sources, from 1.
        invented: what looks like a citation, but is none of the marks.
    """

    start: int
    end: int
    numbers: tuple[int, ...]
    invented: tuple[str, ...]


@dataclass(frozen=True)
class Statement:
    """A part of an answer with the citations that belong to it.

    Attributes:
        end: where its sentence ends in the answer.
        missing: for each cited source by number, what of the text is not found in it; empty if it supports the text.
    """

    text: str
    end: int
    citations: tuple[Citation, ...]
    missing: dict[int, tuple[str, ...]]

    @property
    def cited(self) -> list[int]:
        return list(self.missing)

    @property
    def is_supported(self) -> bool:
        return any(not missing for missing in self.missing.values())


@dataclass(frozen=True)
class CheckedAnswer:
    """An answer with its statements, in order."""

    text: str
    statements: tuple[Statement, ...]

    @property
    def citations(self) -> Iterator[tuple[int, tuple[str, ...]]]:
        """Each citation: the number of its source, and what of its statement is missing there."""
        return ((number, missing) for each in self.statements for number, missing in each.missing.items())

    @property
    def cited(self) -> list[int]:
        return list(dict.fromkeys(number for number, _ in self.citations))

    @property
    def invented(self) -> list[str]:
        found = (name for each in self.statements for citation in each.citations for name in citation.invented)
        return list(dict.fromkeys(found))

    @property
    def unfounded(self) -> list[tuple[Statement, int, tuple[str, ...]]]:
        """Citations whose source does not have what the statement says."""
        return [
            (each, number, missing) for each in self.statements for number, missing in each.missing.items() if missing
        ]

    @property
    def uncited(self) -> list[Statement]:
        """Statements without a source, except in the reasoning."""
        visible = self.text.rpartition("</think>")[0]
        return [
            each for each in self.statements if not each.missing and each.end > len(visible) and has_content(each.text)
        ]


def fold(text: str) -> str:
    """Letters and digits alone, without what is easily missed: width, case, accents, spaces, invisible characters."""
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKD", text).casefold()))


def draw_marks(count: int, text: str, rng: random.Random = UNPREDICTABLE) -> list[str]:
    """Random marks such as `K7Q`, which differ and of which `text` contains none, however it is written.

    Args:
        text: all that the prompt will have: passages, their places, question, history. It is known before the marks
            are drawn, so no document can contain one.
    """
    known, length, marks = fold(text), SHORTEST, []
    tries = 0
    while len(marks) < count:
        alphabets = (LETTERS, FIGURES)
        mark = "".join(rng.choice(alphabets[place % 2]) for place in range(length))
        if mark not in marks and mark.casefold() not in known:
            marks.append(mark)
        elif (tries := tries + 1) % 1000 == 0:
            length += 2
    return marks


def has_content(text: str) -> bool:
    """Whether a text states something that can be looked up: not "Yes:" or the number of a list."""
    if LIST_NUMBER.fullmatch(text):
        return False
    text = prepared(text)
    return bool(key_terms(text).all or measures_in(text))


def find_citations(answer: str, marks: Sequence[str]) -> list[Citation]:
    """The citations of an answer by position. Brackets with anything else are text."""
    number_of = {fold(mark): number for number, mark in enumerate(marks, start=1)}
    found = []
    for match in BRACKETS.finditer(answer):
        # A model may copy the end of a frame, which has a slash before the mark.
        names = [name for name in re.split(r"[,，、;；\s/]+", unicodedata.normalize("NFKC", match[1])) if name]
        numbers = tuple(dict.fromkeys(number_of[fold(name)] for name in names if fold(name) in number_of))
        others = [name for name in names if fold(name) not in number_of]
        if names and (numbers or all(LIKE_A_CITATION.fullmatch(name.casefold()) for name in others)):
            found.append(Citation(match.start(), match.end(), numbers, tuple(others)))
    return found


def check_answer(answer: str, sources: Sequence[Evidence]) -> CheckedAnswer:
    """Attach each citation to its statement, and look the statement up in each source that it cites.

    A statement is the text before its citations, back to the previous citation or the start of the sentence; the last
    one of a sentence goes on to its end.
    """
    statements = []
    for text, end, citations in _split(answer, find_citations(answer, [source.mark for source in sources])):
        numbers = dict.fromkeys(number for citation in citations for number in citation.numbers)
        statements.append(
            Statement(
                text,
                end,
                tuple(citations),
                {n: _find_missing(text, sources[n - 1]) for n in numbers},
            )
        )
    return CheckedAnswer(answer, tuple(statements))


def _find_missing(text: str, source: Evidence) -> tuple[str, ...]:
    if not has_content(text):
        # "Yes" alone cannot be looked up, nor can a citation of nothing.
        return (text.strip(" .。") or "…",)
    return find_unsupported(text, source.text, source.heading)


def _split(answer: str, citations: Sequence[Citation]) -> Iterator[tuple[str, int, list[Citation]]]:
    masked = answer.replace(HOLE, " ")
    for citation in citations:
        masked = masked[: citation.start] + HOLE * (citation.end - citation.start) + masked[citation.end :]
    waiting = list(citations)
    for match in STATEMENT.finditer(masked):
        parts: list[tuple[str, list[Citation]]] = []
        at = match.start()
        while waiting and waiting[0].start < match.end():
            citation = waiting.pop(0)
            before, at = answer[at : citation.start], citation.end
            if parts and not has_content(before):
                parts[-1] = (parts[-1][0] + before, [*parts[-1][1], citation])
            elif parts and not has_content(parts[-1][0]):
                # "According to [K7Q] the dose is ..." has its citations first.
                parts[-1] = (parts[-1][0] + before, [*parts[-1][1], citation])
            else:
                parts.append((before, [citation]))
        rest = answer[at : match.end()]
        if parts:
            parts[-1] = (parts[-1][0] + rest, parts[-1][1])
        else:
            parts.append((rest, []))
        for text, found in parts:
            if found or text.strip():
                yield SPACE_BEFORE_END.sub("", text.strip()), match.end(), found


def show_answer(checked: CheckedAnswer, language: str, only_whole: bool = False) -> str:
    """The answer as a reader sees it: marks are the numbers of sources; what a source lacks is said at its number.

    What looks like a citation but is none becomes `[?]`, since it would be taken for the number of a source.

    Args:
        language: of the remark, `zh` or `en`.
        only_whole: the answer is still growing; what may yet change is left for later, so that each text begins with
            the previous one.
    """
    text, statements = checked.text, checked.statements
    limit = len(text)
    if only_whole:
        # A statement is complete as soon as the next one has begun; brackets in the last one may still open.
        last = max((each.end for each in statements if text[each.end :].strip()), default=0)
        opening = re.search(r"[\[［【〔]", text[last:])
        limit = last + opening.start() if opening else len(text)
        statements = tuple(each for each in statements if each.end <= last)
    shown, at = [], 0
    for each in statements:
        for citation in each.citations:
            shown += [text[at : citation.start], _label(citation, each.missing, language)]
            at = citation.end
    return "".join([*shown, text[at:limit]])


def _label(citation: Citation, missing: dict[int, tuple[str, ...]], language: str) -> str:
    colon = "：" if language == "zh" else ": "
    labels = [f"[{n}{colon}{NOT_FOUND[language]}]" if missing[n] else f"[{n}]" for n in citation.numbers]
    return " ".join([*labels, *(["[?]"] if citation.invented else [])])


def without_citations(answer: str) -> str:
    """An answer as it was shown, without its citations: their numbers mean nothing in a later prompt."""
    return SHOWN_CITATION.sub("", answer)
