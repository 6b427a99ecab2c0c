"""The loss and the gradient of a step are the mean over its pairs, however they are spread over micro-batches."""

from tests.helpers import save_model
from tests.silent.pairs import on_every_stage, open_pairs, pair, plain_losses, shake
from tests.tiny import tiny_tokenizer

import pytest
import torch

LENGTHS = ((1, 150), (60, 12), (7, 8), (90, 30))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("sf01"), tiny_tokenizer())


@pytest.mark.parametrize(
    ("count", "batch_size", "accumulation"), [(4, 4, 1), (4, 1, 4), (4, 2, 2), (3, 4, 1), (3, 1, 4), (3, 2, 2)]
)
@on_every_stage
def test_any_split_into_micro_batches(model, tmp_path, stage, count, batch_size, accumulation):
    rows = [pair(n, *LENGTHS[n]) for n in range(count)]
    opened = open_pairs(
        stage,
        model,
        tmp_path,
        rows,
        *("--per_device_train_batch_size", batch_size, "--gradient_accumulation_steps", accumulation),
        *("--use_peft", "False", "--optim", "sgd", "--learning_rate", 1, "--lr_scheduler_type", "constant"),
        *("--max_grad_norm", 0, "--max_steps", 1, "--logging_steps", 1),
    )
    policy = opened.trainer.model
    # Away from the reference, where all pairs have the same loss.
    shake(policy)
    expected = plain_losses(stage, opened, opened.trainer.train_dataset).mean()
    gradients = torch.autograd.grad(expected, list(policy.parameters()), allow_unused=True)
    before = [parameter.detach().clone() for parameter in policy.parameters()]
    opened.trainer.train()
    assert opened.trainer.state.global_step == 1
    assert opened.trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)
    for (name, parameter), old, gradient in zip(policy.named_parameters(), before, gradients, strict=True):
        wanted = torch.zeros_like(old) if gradient is None else gradient
        # Weights are read back with the rounding of a float32 of their own size.
        close = 2e-5 * wanted.abs().max() + 2e-6
        assert ((old - parameter.detach()) - wanted).abs().max() <= close, name
