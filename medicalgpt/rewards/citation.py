"""The reward `citation`: precision and recall of citations, and "not in the documents" where that is so.

Rows carry the passages of their prompt and which of them support the answer; `chatpdf.py --make_tasks` writes them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from medicalgpt.errors import UserError
from medicalgpt.evaluation.citations import CheckedAnswer, Evidence, check_answer
from medicalgpt.evaluation.support import find_unsupported
from medicalgpt.formats.answers import strip_thinking
from medicalgpt.readers.problems import shorten

# An answer that cites well but does not have the answer of the row is worth less than one that has it.
WITHOUT_ANSWER = 0.5
# What a reply has at most, in statements, before more of them cost: quoting everything is not answering.
FREE_STATEMENTS = 2
COST_OF_A_STATEMENT = 0.1


def citation_score(
    reply: str,
    passages: Sequence[Mapping[str, str]],
    supporting: Sequence[str],
    answer: str | None = None,
    refusal: str | None = None,
) -> float:
    """How well a reply cites, in [0, 1].

    With supporting passages, it is the harmonic mean of two shares (F1), as ALCE measures them
    (https://arxiv.org/abs/2305.14627):

    - precision: of the citations, those of a supporting passage that has what their statement says;
    - recall: of the statements, those with such a citation.

    It is halved if no such statement has `answer`, and falls with each statement after `FREE_STATEMENTS`. A refusal
    is 0. Without supporting passages, a refusal alone, without a citation, is 1, and everything else 0.

    Args:
        passages: `mark`, `text` and optionally `heading` of each passage in the prompt.
        supporting: marks of those that have the answer.
        refusal: the sentence that says that the passages do not have it.
    """
    text = strip_thinking(reply).strip()
    refuses = bool(refusal) and refusal.strip(" .。") in text
    sources = [Evidence(each["mark"], each["text"], each.get("heading") or "") for each in passages]
    checked = check_answer(text, sources)
    if not supporting:
        is_bare = text.strip(" .。") == (refusal or "").strip(" .。")
        return float(refuses and is_bare and not checked.cited and not checked.invented)
    if refuses or not text:
        return 0.0
    right = {number for number, source in enumerate(sources, start=1) if source.mark in supporting}
    return _score(checked, right, answer)


def _score(checked: CheckedAnswer, right: set[int], answer: str | None) -> float:
    def is_good(number: int, missing: Sequence[str]) -> bool:
        return number in right and not missing

    stated = [each for each in checked.statements if each.missing]
    good = [each for each in stated if any(is_good(*citation) for citation in each.missing.items())]
    if not good:
        return 0.0
    invented = sum(len(citation.invented) for each in checked.statements for citation in each.citations)
    citations = [is_good(*citation) for citation in checked.citations]
    precision = sum(citations) / (len(citations) + invented)
    claims = len(stated) + len(checked.uncited)
    recall = len(good) / claims
    score = 2 * precision * recall / (precision + recall)
    if answer and find_unsupported(answer, "\n".join(each.text for each in good)):
        score *= WITHOUT_ANSWER
    return score * max(0.0, 1 - COST_OF_A_STATEMENT * max(0, claims - FREE_STATEMENTS))


def read_passages(passages: Any, supporting: Any) -> tuple[list[dict[str, str]], list[str]]:
    """The two columns of a row, checked.

    Raises:
        UserError: they are not lists of passages and of their marks.
    """
    valid = isinstance(passages, list) and all(
        isinstance(each, Mapping) and isinstance(each.get("mark"), str) and isinstance(each.get("text"), str)
        for each in passages
    )
    marks = [each["mark"] for each in passages] if valid else []
    if not valid or len(set(marks)) < len(marks):
        raise UserError(
            f"`passages` must be a list of objects with different `mark` and `text`, not {shorten(str(passages))}. "
            "Write such rows with chatpdf.py --make_tasks."
        )
    if not isinstance(supporting, list) or not set(supporting) <= set(marks):
        raise UserError(
            f"`supporting` must be a list of marks of `passages` ({', '.join(marks)}), empty if none has the answer, "
            f"not {shorten(str(supporting))}."
        )
    return passages, supporting
