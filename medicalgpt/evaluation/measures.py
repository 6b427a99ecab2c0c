"""Metrics on held-out data: perplexity, matches, preference accuracy."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from medicalgpt.errors import UserError
from medicalgpt.evaluation.fluency import find_fault
from medicalgpt.evaluation.held_out import PreferencePair, Question, QuestionSet

if TYPE_CHECKING:
    from medicalgpt.data.encoding import Pair

    import torch
    from transformers import PreTrainedModel

# Logits of one forward pass, rows x tokens x vocabulary, in numbers: about 256 MB in float32.
MAX_LOGITS = 2**26


class GeneratedAnswer(Protocol):
    """What is read of a generated answer: `serving.generation.Answer` has it."""

    text: str
    finish_reason: str


# Whether an answer to a question is correct; None if that cannot be decided.
Judge = Callable[[GeneratedAnswer, Question], bool | None]


@dataclass
class ChatScore:
    """Counts over answers; `by_category` holds the same counts for each category."""

    correct: int = 0
    stopped: int = 0
    total: int = 0
    by_category: dict[str, dict[str, int]] = field(default_factory=dict)


def token_losses(
    model: "PreTrainedModel",
    sequences: Sequence[Sequence[int]],
    batch_size: int = 64,
    progress: Callable[[int], Any] | None = None,
) -> "Iterator[tuple[int, torch.Tensor]]":
    """Yield (index, losses) of each sequence, the longest first: losses in nats, (tokens - 1,), as the first has none.

    Args:
        model: a causal language model in evaluation mode.
        sequences: token ids, at least two each.
        batch_size: maximum number of sequences in a forward pass. It does not change the result.
        progress: called with the number of sequences of each finished batch.

    Raises:
        UserError: the model's scores are not finite.
    """
    import torch

    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]), reverse=True)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    while order:
        width = len(sequences[order[0]])
        rows = max(1, min(batch_size, MAX_LOGITS // (width * vocabulary)))
        batch, order = order[:rows], order[rows:]
        input_ids = torch.zeros((len(batch), width), dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        for row, index in enumerate(batch):
            input_ids[row, : len(sequences[index])] = torch.tensor(sequences[index])
            attention_mask[row, : len(sequences[index])] = 1
        input_ids, attention_mask = input_ids.to(model.device), attention_mask.to(model.device)
        with torch.inference_mode():
            logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[:, :-1]
            losses = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), input_ids[:, 1:].flatten(), reduction="none"
            ).view(len(batch), -1)
        for index, row in zip(batch, losses.double().cpu(), strict=True):
            row = row[: len(sequences[index]) - 1]
            if not row.isfinite().all():
                raise UserError(
                    "the model's scores are not finite (NaN or infinite): its weights are broken. Train it again."
                )
            yield index, row
        if progress:
            progress(len(batch))


def score_documents(
    model: "PreTrainedModel",
    documents: Sequence[Sequence[int]],
    block_size: int,
    batch_size: int = 64,
    progress: Callable[[int], Any] | None = None,
) -> list[tuple[float, int]]:
    """Score each document alone.

    A document longer than `block_size` is split into pieces that overlap by one token, which serves as context only:
    every token but a document's first is scored exactly once.

    Args:
        documents: token ids of each document, its end token included.
        block_size: maximum number of tokens of a piece, at least 2.

    Returns:
        (negative log-likelihood in nats, tokens scored) of each document.

    Raises:
        UserError: the model's scores are not finite.
    """
    pieces = [
        (number, ids[start : start + block_size])
        for number, ids in enumerate(documents)
        for start in range(0, len(ids) - 1, block_size - 1)
    ]
    nll = [0.0] * len(documents)
    for index, losses in token_losses(model, [ids for _, ids in pieces], batch_size, progress):
        nll[pieces[index][0]] += losses.sum().item()
    return [(loss, len(ids) - 1) for loss, ids in zip(nll, documents, strict=True)]


def score_pairs(
    model: "PreTrainedModel",
    pairs: "Sequence[Pair]",
    batch_size: int = 64,
    progress: Callable[[int], Any] | None = None,
) -> list[tuple[float, float]]:
    """Return the mean log-probability in nats of the tokens of both answers of each pair: (chosen, rejected).

    Args:
        pairs: the end of the turn is part of an answer, the prompt is not.

    Raises:
        UserError: the model's scores are not finite.
    """
    sequences = [pair.prompt_ids + answer for pair in pairs for answer in (pair.chosen_ids, pair.rejected_ids)]
    means = [0.0] * len(sequences)
    for index, losses in token_losses(model, sequences, batch_size, progress):
        means[index] = -losses[len(pairs[index // 2].prompt_ids) - 1 :].mean().item()
    return list(zip(means[::2], means[1::2], strict=True))


def perplexity(scores: Sequence[tuple[float, int]]) -> float:
    """Return exp(total nll / total tokens) of (nll, tokens) pairs: a token counts the same in every document."""
    return math.exp(sum(nll for nll, _ in scores) / sum(tokens for _, tokens in scores))


def is_match(answer: str, reference: str) -> bool:
    """Whether the two are the same string, ignoring white space at both ends."""
    return answer.strip() == reference.strip()


def is_exact(answer: GeneratedAnswer, question: Question) -> bool:
    """Whether the answer is the question's reference."""
    return is_match(answer.text, question.reference)


def fault_of(answer: GeneratedAnswer, question: Question) -> str | None:
    """Return what `find_fault` says of the answer to a question."""
    prompt = "\n".join(turn["content"] for turn in question.messages if isinstance(turn.get("content"), str))
    return find_fault(answer.text, answer.finish_reason, prompt, question.reference)


def is_good(answer: GeneratedAnswer, question: Question) -> bool | None:
    """Whether the answer is fluent and contains at least one string of each group that the question requires.

    Case is ignored. None for a question without requirements.
    """
    if question.required is None:
        return None
    said = answer.text.casefold()
    complete = all(any(text.casefold() in said for text in group) for group in question.required)
    return complete and fault_of(answer, question) is None


def declines_like(declined: Sequence[Question]) -> Judge:
    """Return a judge of answers to other questions: whether one is good as the answer to any of `declined`."""
    kinds = {str(question.required): question for question in declined}

    def is_decline(answer: GeneratedAnswer, question: Question) -> bool:
        return any(is_good(answer, other) for other in kinds.values())

    return is_decline


def count_answers(
    questions: Sequence[Question], answers: Sequence[GeneratedAnswer], judge: Judge = is_exact
) -> ChatScore:
    """Count correct answers and answers that the model ended itself.

    Args:
        answers: one for each question.
        judge: an answer for which it returns None is not counted.
    """
    score = ChatScore()
    for question, answer in zip(questions, answers, strict=True):
        correct, stopped = judge(answer, question), answer.finish_reason == "stop"
        if correct is None:
            continue
        category = score.by_category.setdefault(question.category, {"correct": 0, "stopped": 0, "total": 0})
        category["correct"] += correct
        category["stopped"] += stopped
        category["total"] += 1
        score.correct += correct
        score.stopped += stopped
        score.total += 1
    return score


def share_of(counts: dict[str, Any]) -> str:
    """The counts as text: `correct/total (share)`."""
    share = f" ({counts['correct'] / counts['total']:.1%})" if counts["total"] else ""
    return f"{counts['correct']}/{counts['total']}{share}"


def example_answers(
    asked: QuestionSet, answers: Mapping[int, GeneratedAnswer | None], judge: Judge
) -> list[dict[str, Any]]:
    """What a report shows of the answers to the examples.

    Args:
        answers: by the index of their question; None where it did not fit.
    """
    shown = []
    for index in asked.examples:
        if (answer := answers[index]) is None:
            shown.append({"text": None, "finish_reason": "prompt too long", "correct": False, "fault": None})
            continue
        correct = bool(judge(answer, asked.questions[index]))
        # What is correct is not in doubt, even if a task is answered with a bare number.
        fault = None if correct or not answer.text.strip() else fault_of(answer, asked.questions[index])
        said = {"text": answer.text, "finish_reason": answer.finish_reason}
        shown.append({**said, "correct": correct, "fault": fault})
    return shown


def count_preferences(pairs: Sequence[PreferencePair], scores: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Count the pairs whose chosen answer scores higher than the rejected one; a tie is not correct.

    Args:
        scores: (chosen, rejected) of each pair.

    Returns:
        `correct`, `total` and `margin`, the mean of chosen - rejected; the same for each category in `by_category`.
    """
    by_category: dict[str, list[float]] = {}
    for pair, (chosen, rejected) in zip(pairs, scores, strict=True):
        by_category.setdefault(pair.category, []).append(chosen - rejected)

    def counts(gaps: list[float]) -> dict[str, Any]:
        margin = math.fsum(gaps) / len(gaps) if gaps else None
        return {"correct": sum(gap > 0 for gap in gaps), "total": len(gaps), "margin": margin}

    return {
        **counts([gap for gaps in by_category.values() for gap in gaps]),
        "by_category": {category: counts(gaps) for category, gaps in by_category.items()},
    }
