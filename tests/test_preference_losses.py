"""The losses of DPO and their gradients are those of TRL; what a batch has to do with them. Formulas: test_sf_13."""

from types import SimpleNamespace

from medicalgpt.training.preference_losses import (
    DIVERGENCES,
    LOSSES,
    MARGIN_LOSSES,
    SMOOTHED_LOSSES,
    PairLogProbs,
    answer_log_probs,
    dpo_loss,
    f_divergence,
)
from tests.silent.pairs import trl_dpo

import pytest
import torch
from trl.trainer.utils import FusedCausalLMOutput

PAIRS, LENGTH = 5, 9
# Two losses of a batch that is not split up depend on its other pairs.
OF_THE_BATCH = {"aot", "aot_unpaired", "sft"}


def settings(loss="sigmoid", **changes):
    smoothing = 0.1 if loss in SMOOTHED_LOSSES else 0.0
    common = {"beta": 0.3, "label_smoothing": smoothing, "discopop_tau": 0.05, "ld_alpha": None}
    divergence = {"f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5}
    return SimpleNamespace(**{**common, **divergence, **changes})


@pytest.fixture
def batch():
    """Answers of unequal length behind prompts of unequal length, padded, and what the reference says of them."""
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(1, 4, (2 * PAIRS, 1), generator=generator)
    ends = torch.randint(4, LENGTH, (2 * PAIRS, 1), generator=generator)
    position = torch.arange(LENGTH)
    mask = ((position >= starts) & (position < ends)).long()
    log_probs = -3 * torch.rand(2 * PAIRS, LENGTH - 1, generator=generator) * mask[:, 1:]
    reference = log_probs.sum(dim=1) + 2 * torch.randn(2 * PAIRS, generator=generator)
    return log_probs.requires_grad_(), mask, reference


def ours(loss, given, batch):
    log_probs, mask, reference = batch
    policy, tokens = answer_log_probs(log_probs, mask[:, 1:], given.ld_alpha), mask.sum(dim=1)
    unweighted = log_probs.sum(dim=1).chunk(2)[0]
    pairs = PairLogProbs(*policy.chunk(2), *reference.chunk(2), unweighted, *tokens.chunk(2))
    return dpo_loss(loss, pairs, given), dpo_loss(loss, pairs.one_by_one(), given)[0]


def trls(loss, given, batch):
    log_probs, mask, reference = batch
    columns = dict.fromkeys(("entropy", "mean_logits", "is_top1"), torch.zeros_like(log_probs).bool())
    inputs = {"input_ids": torch.ones_like(mask), "attention_mask": mask, "completion_mask": mask}
    inputs |= dict(zip(("ref_chosen_logps", "ref_rejected_logps"), reference.chunk(2), strict=True))
    given.loss_type, given.loss_weights, given.use_weighting = [loss], None, False
    return trl_dpo(given, lambda **_: FusedCausalLMOutput(log_probs=log_probs, **columns), inputs)[0]


CASES = [
    *((loss, {}) for loss in LOSSES),
    *((loss, {"ld_alpha": 0.4}) for loss in LOSSES),
    *((loss, {"f_divergence_type": name}) for loss in sorted(MARGIN_LOSSES) for name in DIVERGENCES[1:]),
    ("sigmoid", {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0}),
    ("sigmoid", {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 60.0}),
]


@pytest.mark.parametrize(("loss", "changes"), CASES, ids=[f"{loss} {changes}" for loss, changes in CASES])
def test_loss_and_gradient_are_those_of_trl(batch, loss, changes):
    given = settings(loss, **changes)
    expected = trls(loss, given, batch)
    (wanted,) = torch.autograd.grad(expected, batch[0])
    values, _ = ours(loss, given, batch)
    (found,) = torch.autograd.grad(values.mean(), batch[0])
    answers = batch[1][:, 1:]
    assert values.shape == (PAIRS,) and wanted.abs().max() > 0
    assert values.mean().item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(found * answers, wanted * answers, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_pair_of_its_own_has_the_loss_of_a_batch_of_one(batch, loss):
    """So an evaluation does not depend on batches; in training, some losses compare a pair with its batch."""
    given = settings(loss)
    together, alone = ours(loss, given, batch)
    log_probs, mask, reference = batch
    for pair in range(PAIRS):
        rows = [pair, pair + PAIRS]
        single, _ = ours(loss, given, (log_probs[rows], mask[rows], reference[rows]))
        assert alone[pair].item() == pytest.approx(single.item(), rel=1e-6)
    assert torch.allclose(together, alone, rtol=1e-5) is (loss not in OF_THE_BATCH)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_where_policy_and_reference_agree_no_divergence_prefers_anything(name):
    """f'(1) with the slope of log t there, so that beta means the same: f''(1) = 1, or 1/2 for Jensen-Shannon."""
    log_ratio = torch.zeros(1, requires_grad=True)
    value = f_divergence(log_ratio, name, 0.5)
    value.sum().backward()
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert log_ratio.grad.item() == pytest.approx(0.5 if name == "js_divergence" else 1.0)


def test_an_unknown_loss_is_an_error(batch):
    with pytest.raises(ValueError, match="unknown loss 'kto'; one of sigmoid"):
        ours("kto", settings(), batch)


def test_the_list_of_losses_is_that_of_trl(batch):
    """TRL names its own in the message about one that it does not know."""
    with pytest.raises(ValueError, match="Unknown loss type") as caught:
        trls("none", settings(), batch)
    assert set(LOSSES) == set(str(caught.value).partition("one of ")[2].strip("[]").replace("'", "").split(", "))
