"""Each loss sums log-probabilities where its paper sums, and averages where it averages."""

import math

from dpo_training import LOSSES
from tests.helpers import save_model
from tests.silent.pairs import open_pairs, pairs
from tests.tiny import tiny_tokenizer

import numpy as np
import pytest
import torch


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("sf13") / "model", tiny_tokenizer())


# --- DPO -------------------------------------------------------------------------------------------------------------

BETA, SMOOTHING = 0.3, 0.1
SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")


def softplus(x):
    return np.logaddexp(0, x)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def dpo_oracle(loss, chosen, rejected, ref_chosen, ref_rejected, lengths):
    """Loss of each pair from summed log-probabilities; `lengths` are those of both answers in tokens."""
    up, down = chosen - ref_chosen, rejected - ref_rejected
    delta, mean = up - down, up / lengths[0] - down / lengths[1]
    p = sigmoid(BETA * delta)
    sorted_delta = np.sort(chosen - rejected) - np.sort(ref_chosen - ref_rejected)
    unpaired = np.sort(up) - np.sort(down)
    blend = sigmoid(BETA * delta / 0.05)

    def smoothed(x):
        return (1 - SMOOTHING) * softplus(-BETA * x) + SMOOTHING * softplus(BETA * x)

    return {
        "sigmoid": softplus(-BETA * delta),
        "sigmoid_norm": softplus(-BETA * mean),
        "ipo": (mean - 1 / (2 * BETA)) ** 2,
        "hinge": np.maximum(0, 1 - BETA * delta),
        "robust": ((1 - SMOOTHING) * softplus(-BETA * delta) - SMOOTHING * softplus(BETA * delta))
        / (1 - 2 * SMOOTHING),
        "exo_pair": p * np.log(p / (1 - SMOOTHING)) + (1 - p) * np.log((1 - p) / SMOOTHING),
        "nca_pair": softplus(-BETA * up) + (softplus(BETA * up) + softplus(BETA * down)) / 2,
        "bco_pair": softplus(-BETA * up) + softplus(BETA * down),
        "sppo_hard": (up - 1 / (2 * BETA)) ** 2 + (down + 1 / (2 * BETA)) ** 2,
        "aot": smoothed(sorted_delta),
        "aot_unpaired": smoothed(unpaired),
        "apo_zero": 1 - sigmoid(BETA * up) + sigmoid(BETA * down),
        "apo_down": sigmoid(BETA * up) + 1 - p,
        "discopop": (1 - blend) * softplus(-BETA * delta) + blend * np.exp(-BETA * delta),
        # Over all tokens of the batch alike, so that a long answer counts more than a short one.
        "sft": np.full_like(chosen, -chosen.sum() / lengths[0].sum()),
    }[loss]


# Differences of the log-ratios: ln 3 / 0.3, in answers of 2 and 4 tokens.
BY_HAND = {
    "sigmoid": math.log(4 / 3),
    "ipo": (math.log(3) / 0.3 * 0.5 - 1 / 0.6) ** 2,
    "hinge": 0.0,
    "robust": (0.9 * math.log(4 / 3) - 0.1 * math.log(4)) / 0.8,
    "sigmoid_norm": math.log(1 + 3**-0.5),
}


@pytest.fixture(scope="module")
def dpo(model, tmp_path_factory):
    """A trainer whose model has moved away from its reference, and its first batch."""
    flags = ["--learning_rate", 0.01, "--max_steps", 3, "--per_device_train_batch_size", 6, "--loss_type", "sigmoid"]
    trainer = open_pairs("dpo_training.py", model, tmp_path_factory.mktemp("dpo"), pairs(6), *flags).trainer
    trainer.train()
    return trainer, trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def sums(model, batch):
    """Log-probabilities of the answers, summed, from plain logits: (pairs,) chosen and rejected."""
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
    picked = logits.log_softmax(-1)[:, :-1].gather(2, batch["input_ids"][:, 1:, None])[:, :, 0]
    return np.split((picked * batch["completion_mask"][:, 1:]).sum(1).numpy(), 2)


def padded_left(batch):
    """The same batch with its padding on the other side."""
    order = batch["attention_mask"].argsort(dim=1, stable=True)
    return {name: value.gather(1, order) for name, value in batch.items()}


def set_loss(trainer, loss):
    trainer.args.loss_type, trainer.args.beta = [loss], BETA
    trainer.args.label_smoothing = SMOOTHING if loss in SMOOTHED else 0.0


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("loss", LOSSES)
def test_dpo_losses_are_those_of_the_papers(dpo, loss, side):
    trainer, batch = dpo
    batch = batch if side == "right" else padded_left(batch)
    lengths = np.split(batch["completion_mask"].sum(1).numpy(), 2)
    assert len({*lengths[0], *lengths[1]}) > 6
    with trainer.model.disable_adapter():
        reference = sums(trainer.model, batch)
    wanted = dpo_oracle(loss, *sums(trainer.model, batch), *reference, lengths).mean()
    set_loss(trainer, loss)
    with torch.no_grad():
        assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("loss", BY_HAND)
def test_dpo_losses_by_hand(dpo, loss):
    trainer, _ = dpo
    set_loss(trainer, loss)
    # Prompts of one token; answers of 2 and 4 whose log-ratios are ln 3 / 0.3 and 0, unless lengths are averaged.
    log_ratio = math.log(3) / BETA
    log_probs = torch.tensor([[-1.0, -2.0, 0.0, 0.0], [-1.0, -1.0, -1.0, -1.0]])
    batch = {
        "input_ids": torch.ones(2, 5, dtype=torch.long),
        "attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
        "completion_mask": torch.tensor([[0, 1, 1, 0, 0], [0, 1, 1, 1, 1]]),
        "ref_chosen_logps": torch.tensor([-3.0 - log_ratio]),
        "ref_rejected_logps": torch.tensor([-4.0]),
    }
    zeros = torch.zeros_like(log_probs)
    scored = {"log_probs": log_probs, "entropy": zeros, "mean_logits": zeros, "is_top1": zeros.bool()}
    found = trainer.compute_loss(lambda **_: type("Scored", (), scored), batch)
    assert found.item() == pytest.approx(BY_HAND[loss], abs=1e-6)


# --- ORPO ------------------------------------------------------------------------------------------------------------


def orpo_oracle(chosen, rejected, beta):
    """Loss of each pair from mean log-probabilities."""
    odds_ratio = (chosen - np.log1p(-np.exp(chosen))) - (rejected - np.log1p(-np.exp(rejected)))
    return -chosen + beta * softplus(-odds_ratio)


@pytest.fixture(scope="module")
def orpo(model, tmp_path_factory):
    """A trainer whose adapter has an effect."""
    flags = ["--orpo_beta", 0.7, "--learning_rate", 0.01, "--max_steps", 3]
    trainer = open_pairs("orpo_training.py", model, tmp_path_factory.mktemp("orpo"), pairs(6), *flags).trainer
    trainer.train()
    return trainer


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("batch_size", [1, 4, 6])
@pytest.mark.parametrize("training", [False, True])
def test_orpo_averages_over_the_tokens_of_each_answer(orpo, training, batch_size, side):
    orpo.model.train(training)
    rows = list(orpo.train_dataset)
    for start in range(0, len(rows), batch_size):
        batch = orpo.data_collator(rows[start : start + batch_size])
        batch = batch if side == "right" else padded_left(batch)
        lengths = np.split(batch["completion_mask"].sum(1).numpy(), 2)
        chosen, rejected = (total / count for total, count in zip(sums(orpo.model, batch), lengths, strict=True))
        wanted = orpo_oracle(chosen, rejected, 0.7)
        with torch.set_grad_enabled(training):
            values = {name: value.detach() for name, value in orpo.pair_values(orpo.model, batch).items()}
        assert values["loss"].numpy() == pytest.approx(wanted, rel=1e-5)
        assert values["logps/chosen"].numpy() == pytest.approx(chosen, rel=1e-5)
        assert values["logps/rejected"].numpy() == pytest.approx(rejected, rel=1e-5)
