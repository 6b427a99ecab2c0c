"""The reward for answers that cite passages, as of `chatpdf.py --make_tasks`."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from medicalgpt.formats.answers import strip_thinking
from medicalgpt.formats.citations import UNKNOWN, read_citations
from medicalgpt.formats.support import find_missing, key_terms, split_claims
from medicalgpt.formats.terms import count_words, normalize

# What a citation that holds is worth if its passage does not answer the question.
OTHER_PASSAGES = 0.2
# A claim with fewer key terms and without a quantity says nothing.
FEWEST_TERMS = 3
# More than this next to a refusal, in characters, is an answer.
BESIDE_REFUSAL = 12


def score_citations(text: str, task: Mapping[str, Any]) -> float:
    """How well an answer cites, in [0, 1].

    If passages support an answer: the harmonic mean of precision, the share of citations whose passage says the
    sentence (`support`), and recall, the share of sentences with such a citation, as in ALCE
    (https://arxiv.org/abs/2305.14627). It is multiplied by the mean worth of these citations: 1 if the passage answers
    the question, otherwise a fifth. A name or number alone and a sentence said before count as sentences without
    support; a refusal gets 0. If no passage supports an answer: 1 for the refusal that the prompt asks for and nothing
    else, otherwise 0.

    Args:
        text: the reply; thinking does not count.
        task: `tag`, `passages`, `supporting`, and `places` if the passages have headings.
    """
    passages, supporting = task["passages"], set(task["supporting"])
    places = task.get("places") or [""] * len(passages)
    answer = read_citations(strip_thinking(text).strip(), task["tag"], len(passages))
    refuses = next((sentence for sentence in UNKNOWN.values() if sentence in answer.text), None)
    if refuses or not supporting:
        rest = answer.text.replace(refuses or "", "")
        alone = refuses and not answer.cited and not answer.invented and len(re.sub(r"\W", "", rest)) <= BESIDE_REFUSAL
        return float(bool(alone) and not supporting)
    claims = split_claims(answer.text)
    cited = [(claim, number) for claim in claims for number in claim.cited]
    new = {id(claim) for claim in {normalize(claim.text): claim for claim in reversed(claims)}.values()}
    right = [
        (claim, number)
        for claim, number in cited
        if id(claim) in new
        and has_content(claim.text)
        and not find_missing(claim.text, passages[number - 1], places[number - 1])
    ]
    if not right:
        return 0.0
    precision = len(right) / (len(cited) + answer.text.count("[?]"))
    held = {id(claim) for claim, _ in right}
    recall = sum(id(claim) in held for claim in claims) / len(claims)
    worth = sum(1 if number in supporting else OTHER_PASSAGES for _, number in right) / len(right)
    return worth * 2 * precision * recall / (precision + recall)


def has_content(claim: str) -> bool:
    """Whether a claim is more than a name or a bare number, which any passage about the subject supports."""
    is_quantity = re.search(r"\d", claim) is not None and count_words(claim) > 1
    return is_quantity or len(key_terms(claim)) >= FEWEST_TERMS


def read_task(task: Any) -> Mapping[str, Any] | None:
    """The column `citations` of a row; None if the row has none.

    Raises:
        ValueError: it is not what `score_citations` needs.
    """
    if task is None:
        return None
    is_task = isinstance(task, Mapping) and isinstance(task.get("tag"), str) and task["tag"].isalnum()
    passages, supporting = (task.get("passages"), task.get("supporting")) if is_task else (None, None)
    if not all(isinstance(part, Sequence) and not isinstance(part, str) for part in (passages, supporting)):
        raise ValueError("`citations` needs a tag, passages and supporting, as chatpdf.py --make_tasks writes them")
    if not all(isinstance(number, int) and 1 <= number <= len(passages) for number in supporting):
        raise ValueError(f"`citations.supporting` is {supporting}; it must have numbers from 1 to {len(passages)}")
    return task
