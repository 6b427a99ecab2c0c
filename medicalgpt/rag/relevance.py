"""Whether passages answer a question, judged by words alone: to say "not in the files" before a model is asked.

A passage that answers has the question's words, or words for the same thing, in a sentence that also has what is asked
for: a price, a time, a number of something. A logistic regression over six such features, whose weights are in
relevance.json, estimates how likely that is; `python -m benchmarks.relevance` fits them again.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from math import exp, log
from pathlib import Path

from medicalgpt.formats.concepts import Concept, concepts_of, plain
from medicalgpt.formats.terms import HAN, SENTENCE, WORD, is_han, language_of, stem
from medicalgpt.rag.question_kinds import demand_of

WEIGHTS = Path(__file__).with_suffix(".json")
BIAS = "bias"
PASSAGES_READ = 8
LONE_CHARACTER = 0.3  # what a Chinese character counts without the neighbour that it has in the question
MOST_HELD = 3.0
# Questions that documents rarely answer, even if they have all of the words.
UNUSUAL = ("opinion", "name", "difference", "address", "size", "speed")


class Relevance:
    """Estimates whether passages answer a question.

    Args:
        texts: the passages, with their headings.
        frequency: the number of passages that have a term, see `extract_terms`.
    """

    def __init__(self, texts: Sequence[str], frequency: Mapping[str, int]):
        self.texts, self.frequency = texts, frequency
        self.stems: dict[str, list[str]] = {}
        for term in frequency:
            if not is_han(term):
                self.stems.setdefault(stem(term), []).append(term)

    def synonyms(self, question: str) -> list[str]:
        """Terms of the passages that mean the same as words of the question, or are other forms of them."""
        terms: list[str] = []
        for concept in concepts_of(question):
            for word in concept.words:
                if not concept.is_chinese:
                    terms += self.stems.get(word, ())
                elif word != concept.text:
                    terms += (word[at : at + 2] for at in range(len(word) - 1))
        return [term for term in dict.fromkeys(terms) if term in self.frequency]

    def confidence(self, question: str, order: Sequence[int]) -> float:
        """From 0 to 1. At 0.5 or more, 4% of the answerable questions that it was fitted to are refused.

        Args:
            order: indexes of the passages found, best first.
        """
        features = self.features(question, order)
        if not features:
            return 0.0
        weights = load_weights()[language_of(question)]
        total = weights[BIAS] + sum(weights[name] * value for name, value in features.items())
        return 1 / (1 + exp(-total))

    def features(self, question: str, order: Sequence[int]) -> dict[str, float]:
        """What the estimate is made of; empty if nothing is found, or the question has no words to look for.

        match: the share of the question's words that the best sentence has which meets the demand: the mean of what it
            has, what it has with its headings and the sentence before it, and what its passage has.
        sentence: the same for the sentence alone.
        held: how many of the words the best passage has.
        asks, unusual, price: 1 if the question asks for something recognised, for one of UNUSUAL, or for a price.
        """
        concepts = concepts_of(question)
        if not concepts or not order:
            return {}
        weights = [concept.weight * self._rarity(concept) for concept in concepts]
        demand = demand_of(plain(question))

        def share(text: str) -> float:
            held = Words(text)
            return sum(weight * held.have(concept) for weight, concept in zip(weights, concepts, strict=True)) / total

        total, match, sentence, best = sum(weights), 0.0, 0.0, 0.0
        for index in order[:PASSAGES_READ]:
            of_passage = share(self.texts[index])
            best = max(best, of_passage)
            for context, alone in sentences(self.texts[index]):
                if demand.is_met(plain(alone)):
                    of_sentence = share(alone)
                    sentence = max(sentence, of_sentence)
                    match = max(match, (of_sentence + share(context) + of_passage) / 3)
        return {
            "match": match,
            "sentence": sentence,
            "held": min(best * total, MOST_HELD),
            "asks": float(demand.kind is not None),
            "unusual": float(demand.kind in UNUSUAL),
            "price": float(demand.kind == "price"),
        }

    def _rarity(self, concept: Concept) -> float:
        """1 for a concept that no passage has, less the more have it."""
        count = len(self.texts)
        frequency = min(count, max(map(self._frequency, concept.words)))
        return log(1 + (count + 0.5) / (frequency + 0.5)) / log(1 + (count + 0.5) / 0.5)

    def _frequency(self, word: str) -> int:
        if not is_han(word):
            return sum(self.frequency[term] for term in self.stems.get(word, ()))
        pairs = [word[at : at + 2] for at in range(len(word) - 1)] or [word]
        return min(self.frequency.get(pair, 0) for pair in pairs)


class Words:
    """A text in which concepts are looked for."""

    def __init__(self, text: str):
        self.text = re.sub(rf"(?<=[{HAN}])\s+(?=[{HAN}])", "", plain(text))
        self.stems = {stem(word) for word in WORD.findall(self.text) if not is_han(word)}

    def have(self, concept: Concept) -> float:
        """1 if they have the concept, else 0, or LONE_CHARACTER."""
        if not concept.is_chinese:
            return float(not concept.words.isdisjoint(self.stems))
        if any(word in self.text for word in concept.words):
            return 1.0
        return LONE_CHARACTER if len(concept.text) == 1 and concept.text in self.text else 0.0


def sentences(text: str) -> Iterator[tuple[str, str]]:
    """Each sentence with what its words may refer to, and alone."""
    found = [match[0] for match in SENTENCE.finditer(text)]
    for at, alone in enumerate(found):
        yield "".join([found[0], *found[max(1, at - 1) : at + 1]]) if at else alone, alone


@cache
def load_weights() -> dict[str, dict[str, float]]:
    """For each language, the weight of each feature and BIAS."""
    return json.loads(WEIGHTS.read_text(encoding="utf-8"))
