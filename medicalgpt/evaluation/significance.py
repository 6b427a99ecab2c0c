"""Whether the difference between two checkpoints is statistically significant."""

import math
from dataclasses import dataclass

SAME = "no measurable change"


@dataclass
class Verdict:
    """How a model's value compares with that of the model before it."""

    text: str
    tone: str  # better, worse or same


def wilson_interval(correct: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Return the Wilson score interval of a share (https://doi.org/10.1080/01621459.1927.10502953).

    It is (0, 1) if nothing was counted. 1.96 is the normal quantile of a 95% interval.
    """
    if total == 0:
        return 0.0, 1.0
    share = correct / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def compare_shares(before: tuple[int, int], after: tuple[int, int]) -> Verdict | None:
    """Compare two (correct, total) counts; None if one of them counted nothing."""
    if before[1] == 0 or after[1] == 0:
        return None
    (before_low, before_high), (after_low, after_high) = wilson_interval(*before), wilson_interval(*after)
    if before_low <= after_high and after_low <= before_high:
        return Verdict(SAME, "same")
    return Verdict("higher", "better") if after_low > before_high else Verdict("lower", "worse")


def compare_perplexity(before: dict, after: dict) -> Verdict | None:
    """Compare the same documents scored by two models, as a ratio estimate over documents.

    None if the two cannot be compared: other documents or tokens, or fewer than two documents.
    """
    tokens = before["document_tokens"]
    if tokens != after["document_tokens"] or len(tokens) < 2:
        return None
    total = sum(tokens)
    gaps = [new - old for old, new in zip(before["document_nll"], after["document_nll"], strict=True)]
    mean = sum(gaps) / total
    residuals = [gap - mean * count for gap, count in zip(gaps, tokens, strict=True)]
    count = len(residuals)
    error = math.sqrt(count / (count - 1) * sum(residual * residual for residual in residuals)) / total
    if abs(mean) <= 1.96 * error or mean == 0:
        return Verdict(SAME, "same")
    return Verdict("lower", "better") if mean < 0 else Verdict("higher", "worse")


def compare_scores(before: dict, after: dict) -> Verdict | None:
    """Compare a reward model's scores of two models' answers, over the prompts that both have answered.

    None if there are fewer than two.
    """
    pairs = zip(before["scores"], after["scores"], strict=True)
    gaps = [new - old for old, new in pairs if old is not None and new is not None]
    if len(gaps) < 2:
        return None
    mean = math.fsum(gaps) / len(gaps)
    error = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / (len(gaps) - 1) / len(gaps))
    if abs(mean) <= 1.96 * error or mean == 0:
        return Verdict(SAME, "same")
    return Verdict("higher", "better") if mean > 0 else Verdict("lower", "worse")
