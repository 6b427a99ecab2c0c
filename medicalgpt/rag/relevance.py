"""How much of a question a passage speaks of, by words alone: to say "not in the documents" before a model is asked.

Counted are the terms of the question that one passage has, or words for the same thing (`synonyms`), weighted by how
rare they are. Passages without the kind of thing that is asked for (a price, a dose) do not count, and no passage does
if the question names a medicine or an abbreviation that no passage has.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from math import log

from medicalgpt.formats.synonyms import EN, ZH
from medicalgpt.formats.terms import CHINESE_NAME, NAME, QUESTION_FORM, STOP_WORDS, WORD, is_han, stem

LONGEST_WORD = max(map(len, ZH))
# A Chinese character alone says less than a pair.
CHARACTER_WEIGHT = 0.5
# What is asked for, and what a passage with the answer has.
KINDS = [
    (re.compile(question), re.compile(passage))
    for question, passage in (
        (
            r"多少钱|几块钱|费用|收费|\bcost\b|how much (?:is|are|am i charged|does .* cost)\b|\bfee\b|\bprice",
            r"\d+\s*元|费|dollar|\$|free|fee",
        ),
        (
            r"毫克|几毫升|多少单位|几粒|几片|milligram|\bdose\b|\bmg\b",
            r"\d\s*(?:毫克|mg\b|毫升|ml\b|单位|粒|片|iu|units?\b|grams?)|milligram",
        ),
        (
            r"几点|什么时候(?:上班|开门)|what time|\bwhen (?:do|does|is|are) you",
            r"\d:\d\d|\d\s*[ap]m|点|midnight|周|(?:mon|tues|wednes|thurs|fri|satur|sun)day",
        ),
        (r"几楼", r"楼"),
        (
            r"几天|多少天|几个月|几岁|多久|多长时间|几小时|几分钟|how (?:long|soon|often)"
            r"|how many (?:days|weeks|hours|minutes|months)",
            r"\d|一次|每[日天周月年]|once|twice|every|until|daily|weekly|[一二两三四五六七八九十]\s*(?:天|周|个?月|小时|分钟|年)"
            r"|\b(?:one|two|three|four|five|six|seven|eight|nine|ten)\b",
        ),
        (r"电话|分机号?|phone number|extension", r"分机|extension|电话|\d{3,}"),
    )
]


@dataclass(frozen=True)
class Concept:
    """A word of a question, and the words that count as the same; stems of English ones."""

    words: frozenset[str]
    is_chinese: bool
    weight: float = 1.0


def concepts_of(question: str) -> list[Concept]:
    """The concepts of a question, each once: its words, and for Chinese words of `synonyms`, pairs and characters."""
    found: list[Concept] = []
    for word in WORD.findall(QUESTION_FORM.sub(" \N{FULL STOP} ", _plain(question))):
        if is_han(word):
            found += _chinese_concepts(word)
        elif word not in STOP_WORDS:
            found.append(Concept(STEMS.get(stem(word), frozenset()) | {stem(word)}, False))
    return list(dict.fromkeys(found))


def _chinese_concepts(text: str) -> list[Concept]:
    found, at = [], 0
    while at < len(text):
        ends = range(min(len(text), at + LONGEST_WORD), at + 1, -1)
        known = next((text[at:end] for end in ends if text[at:end] in ZH), None)
        if known:
            found.append(Concept(ZH[known], True))
            at += len(known)
            continue
        if at + 2 <= len(text):
            found.append(Concept(frozenset([text[at : at + 2]]), True))
        if text[at] not in STOP_WORDS:
            found.append(Concept(frozenset([text[at]]), True, CHARACTER_WEIGHT))
        at += 1
    return found


def _stems() -> dict[str, frozenset[str]]:
    groups: dict[str, set[str]] = {}
    for word, group in EN.items():
        groups.setdefault(stem(word), set()).update(map(stem, group))
    return {word: frozenset(group) for word, group in groups.items()}


STEMS = _stems()


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).lower()


class RelevanceIndex:
    """Passages, prepared for `measure`."""

    def __init__(self, texts: Sequence[str]):
        self.texts = [_plain(text) for text in texts]
        self.stems = [frozenset(stem(word) for word in WORD.findall(text) if not is_han(word)) for text in self.texts]

    def measure(self, question: str) -> tuple[float, float]:
        """(terms, coverage) of the best passage.

        `terms` is the weight of the question's concepts that it has, where one that a single passage has counts 1;
        `coverage` is their share of the weight of all concepts, from 0 to 1.
        """
        concepts, count = concepts_of(question), len(self.texts)
        if not concepts or not count or self._lacks_name(question):
            return 0.0, 0.0
        held = [0.0] * count
        total, rarest = 0.0, log(1 + (count + 0.5) / 1.5)
        for concept in concepts:
            places = [n for n in range(count) if self._has(n, concept)]
            weight = concept.weight * log(1 + (count + 0.5) / (len(places) + 0.5)) / rarest
            total += weight
            for n in places:
                held[n] += weight
        kinds = [passage for asked, passage in KINDS if asked.search(_plain(question))]
        best = max(
            (held[n] for n in range(count) if all(kind.search(self.texts[n]) for kind in kinds)),
            default=0.0,
        )
        return best, best / total

    def _has(self, number: int, concept: Concept) -> bool:
        if concept.is_chinese:
            return any(word in self.texts[number] for word in concept.words)
        return not concept.words.isdisjoint(self.stems[number])

    def _lacks_name(self, question: str) -> bool:
        """Whether the question names a medicine, or has an abbreviation, that is in no passage."""
        text = unicodedata.normalize("NFKC", question)
        is_chinese = any(map(is_han, text))
        for word in WORD.findall(text):
            if is_han(word) or word[0].isdigit() or len(word) == 1:
                continue
            is_abbreviation = sum(map(str.isupper, word)) >= 2
            if (is_abbreviation or is_chinese or NAME.fullmatch(word.lower())) and not self._occurs(word.lower()):
                return True
        # Where a name begins is not known: "吃布洛芬" ends with it.
        names = (match[0] for match in CHINESE_NAME.finditer(text))
        return any(not any(self._occurs(name[at:]) for at in range(len(name) - 2)) for name in names)

    def _occurs(self, word: str) -> bool:
        return any(word in text for text in self.texts)
