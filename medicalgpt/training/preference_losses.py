"""The losses of direct preference optimization, as functions of log-probabilities. Formulas: docs/dpo_training.md."""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn.functional import logsigmoid

LOSSES = (
    *("sigmoid", "sigmoid_norm", "ipo", "hinge", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard"),
    *("aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft"),
)
# Losses of the difference between both log-ratios, for which other divergences than the KL are defined.
MARGIN_LOSSES = {"sigmoid", "sigmoid_norm", "ipo", "hinge", "robust", "exo_pair", "discopop"}
# Losses that assume that a share of the labels is wrong.
SMOOTHED_LOSSES = {"robust", "exo_pair", "aot", "aot_unpaired"}
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


class LossSettings(Protocol):
    """The settings of the losses, named as in `trl.DPOConfig`."""

    beta: float
    label_smoothing: float
    discopop_tau: float
    f_divergence_type: str
    f_alpha_divergence_coef: float


@dataclass
class PairLogProbs:
    """Log-probabilities of the answers of a batch: tensors of one shape, whose first dimension is the batch."""

    chosen: torch.Tensor
    rejected: torch.Tensor
    ref_chosen: torch.Tensor
    ref_rejected: torch.Tensor
    # As `chosen`, but with no token of it weighted by `ld_alpha`.
    chosen_unweighted: torch.Tensor
    chosen_tokens: torch.Tensor
    rejected_tokens: torch.Tensor

    def one_by_one(self) -> "PairLogProbs":
        """From (pairs,) to (1, pairs): each pair is a separate batch, for losses that depend on the whole batch."""
        return PairLogProbs(*(column[None] for column in vars(self).values()))


def answer_log_probs(log_probs: torch.Tensor, mask: torch.Tensor, ld_alpha: float | None) -> torch.Tensor:
    """Sum the log-probabilities of the tokens of each answer.

    Args:
        log_probs: (2 x pairs, length), chosen answers first; 0 if `mask` is 0.
        mask: of the same shape, 1 on the tokens of answers.
        ld_alpha: weight of the tokens beyond the length of the pair's shorter answer, or None for 1
            (https://arxiv.org/abs/2409.06411).

    Returns:
        (2 x pairs,)
    """
    if ld_alpha is None:
        return log_probs.sum(dim=1)
    shared = torch.minimum(*mask.sum(dim=1).chunk(2)).repeat(2)
    return torch.where(mask.cumsum(dim=1) <= shared[:, None], log_probs, ld_alpha * log_probs).sum(dim=1)


def f_divergence(log_ratio: torch.Tensor, name: str, alpha: float) -> torch.Tensor:
    """f'(t) of a divergence for the ratio t of policy to reference, elementwise (https://arxiv.org/abs/2309.16240).

    Args:
        log_ratio: log t.
        name: one of `DIVERGENCES`; reverse_kl, the divergence of DPO, gives log t.
        alpha: parameter of alpha_divergence, which is the reverse KL at 1.
    """
    if name == "forward_kl":
        return 1 - torch.exp(-log_ratio)
    if name == "js_divergence":
        return math.log(2) + logsigmoid(log_ratio)
    if name == "alpha_divergence" and abs(alpha - 1) >= 1e-6:
        # exp overflows float32 above 88.
        return (torch.exp(((alpha - 1) * log_ratio).clamp(max=80)) - 1) / (alpha - 1)
    return log_ratio


def dpo_loss(name: str, pairs: PairLogProbs, settings: LossSettings) -> torch.Tensor:
    """One of `LOSSES` for each pair, in the shape of the columns of `pairs`."""
    beta, eps, half = settings.beta, settings.label_smoothing, 1 / (2 * settings.beta)
    # Log-ratios of policy to reference: u of the chosen answer, d of the rejected one.
    u, d = pairs.chosen - pairs.ref_chosen, pairs.rejected - pairs.ref_rejected
    f_u, f_d = (f_divergence(x, settings.f_divergence_type, settings.f_alpha_divergence_coef) for x in (u, d))
    margin = f_u - f_d
    mean_margin = f_u / pairs.chosen_tokens - f_d / pairs.rejected_tokens

    def smoothed(x: torch.Tensor) -> torch.Tensor:
        return -(1 - eps) * logsigmoid(beta * x) - eps * logsigmoid(-beta * x)

    match name:
        case "sigmoid":  # DPO, https://arxiv.org/abs/2305.18290
            return -logsigmoid(beta * margin)
        case "sigmoid_norm":  # Tülu 3, https://arxiv.org/abs/2411.15124
            return -logsigmoid(beta * mean_margin)
        case "ipo":  # https://arxiv.org/abs/2310.12036, equation 17; means over tokens, as its authors use them
            return (mean_margin - half) ** 2
        case "hinge":  # SLiC, https://arxiv.org/abs/2305.10425
            return torch.relu(1 - beta * margin)
        case "robust":  # https://arxiv.org/abs/2403.00409
            return (eps * logsigmoid(-beta * margin) - (1 - eps) * logsigmoid(beta * margin)) / (1 - 2 * eps)
        case "exo_pair":  # EXO, https://arxiv.org/abs/2402.00856, equation 16
            log_p, log_q = logsigmoid(beta * margin), logsigmoid(-beta * margin)
            return log_p.exp() * (log_p - math.log1p(-eps)) + log_q.exp() * (log_q - math.log(eps))
        case "nca_pair":  # https://arxiv.org/abs/2402.05369
            return -logsigmoid(beta * u) - (logsigmoid(-beta * u) + logsigmoid(-beta * d)) / 2
        case "bco_pair":  # https://arxiv.org/abs/2404.04656, without its shift of rewards
            return -logsigmoid(beta * u) - logsigmoid(-beta * d)
        case "sppo_hard":  # https://arxiv.org/abs/2405.00675, equation 4.7, with the label as the probability
            return (u - half) ** 2 + (d + half) ** 2
        case "aot":  # https://arxiv.org/abs/2406.05882
            policy, reference = pairs.chosen - pairs.rejected, pairs.ref_chosen - pairs.ref_rejected
            return smoothed(policy.sort(dim=0).values - reference.sort(dim=0).values)
        case "aot_unpaired":
            return smoothed(u.sort(dim=0).values - d.sort(dim=0).values)
        case "apo_zero":  # https://arxiv.org/abs/2408.06266, equations 7 and 8
            return 1 - torch.sigmoid(beta * u) + torch.sigmoid(beta * d)
        case "apo_down":
            return torch.sigmoid(beta * u) + 1 - torch.sigmoid(beta * (u - d))
        case "discopop":  # https://arxiv.org/abs/2406.08414, equation 5
            share = torch.sigmoid(beta * margin / settings.discopop_tau)
            return share * torch.exp(-beta * margin) - (1 - share) * logsigmoid(beta * margin)
        case "sft":  # a term of MPO, https://arxiv.org/abs/2411.10442: mean over all tokens of the batch
            return (-pairs.chosen_unweighted.sum(dim=0) / pairs.chosen_tokens.sum(dim=0)).expand_as(pairs.chosen)
    raise ValueError(f"unknown loss {name!r}; one of {', '.join(LOSSES)}")
