"""SF 45: a loss takes a constant in the meaning of another paper, such as the clipping bound of CISPO."""

from grpo_training import GrpoArguments, check_flags
from medicalgpt.errors import UserError
from medicalgpt.parser import parse_args
from tests.silent.tasks import first_batches, open_tasks, tasks
from tests.tiny import make_tiny

import pytest
import torch


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return make_tiny(tmp_path_factory.mktemp("sf45") / "model", max_position_embeddings=1024)


@pytest.mark.parametrize(
    "loss, plain", [("cispo", "dapo"), ("vespo", "dapo"), ("bnpo", "dapo"), ("sapo", "grpo"), ("luspo", None)]
)
def test_at_ratio_1_the_gradient_is_the_plain_one(model, tmp_path, loss, plain):
    """Whatever a loss does with the ratio; losses that weigh tokens alike. luspo sums over the tokens of an answer."""
    found = {}
    for name in (loss, plain or "grpo"):
        opened = open_tasks(model, tmp_path / name, tasks(4), "--loss_type", name)
        trainer, batch = opened.trainer, first_batches(opened)[0]
        assert "old_per_token_logps" not in batch
        if plain is None:
            # All answers of the same length: the sum is the mean times the length.
            batch["completion_mask"] = torch.ones_like(batch["completion_mask"])
        trainer.current_gradient_accumulation_steps = 1
        trainer.compute_loss(trainer.model, batch).backward()
        found[name] = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
        length = batch["completion_mask"].shape[1]
    wanted = found[plain or "grpo"] * (length if plain is None else 1)
    if loss == "bnpo":
        # The mean over the tokens of this batch, not of both batches of the step.
        wanted *= found[loss].norm() / wanted.norm()
    assert wanted.norm() > 1e-3 and torch.allclose(found[loss], wanted, rtol=1e-3, atol=1e-6)


def test_losses_take_the_constants_of_their_papers():
    def parsed(*flags):
        (args,) = parse_args(GrpoArguments, argv=list(flags))
        check_flags(args)
        return args

    assert (
        parsed("--loss_type", "cispo").epsilon_high
        == parsed("--loss_type", "cispo", "--epsilon_high", "5").epsilon_high
    )
    assert parsed("--loss_type", "cispo").epsilon_high == 5 and parsed().epsilon_high is None
    assert parsed("--loss_type", "cispo", "--epsilon_high", "3", "--num_iterations", "2").epsilon_high == 3
    with pytest.raises(UserError, match="0.28 with --loss_type cispo is the highest ratio, not a distance from 1"):
        parsed("--loss_type", "cispo", "--epsilon_high", "0.28", "--num_iterations", "2")
    assert parsed("--loss_type", "luspo").importance_sampling_level == "sequence"
    assert parsed("--loss_type", "luspo", "--num_iterations", "2").importance_sampling_level == "sequence"
    assert parsed().importance_sampling_level == "token"
