"""How a step is divided over batches, accumulation and processes changes neither its rows nor its loss and weights."""

import importlib

from tests.silent.ledgers import STAGES, Trained, make_rows

import pytest
import torch

# Thirteen rows in steps of four: the last step of an epoch has one row, which two processes cannot share.
ROWS = 13
DIVISIONS = {
    "4 x 1": (1, 4, 1),
    "2 x 2": (2, 2, 1),
    "1 x 1 x 4": (1, 1, 4),
    "2 x 1 x 2": (2, 1, 2),
    "4 x 1 x 1": (4, 1, 1),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    for script in STAGES.values():
        importlib.import_module(script.removesuffix(".py"))
    return make_rows(tmp_path_factory.mktemp("sf43"), ROWS)


def trained(place, output, stage, division, *more):
    processes, batch, accumulation = division
    return Trained(
        stage,
        place,
        output,
        *("--per_device_train_batch_size", batch, "--gradient_accumulation_steps", accumulation),
        *("--num_train_epochs", 2, "--save_strategy", "no", "--optim", "sgd", "--learning_rate", 0.3, *more),
        processes=processes,
    )


def held_out(place, stage, division):
    """Flags of evaluations of seven rows, which neither batches nor processes divide evenly."""
    rows = ("--validation_file_dir", place / "held-out" / stage, "--eval_strategy", "steps", "--eval_steps", 4)
    return [*rows, *(() if stage == "ppo" else ("--per_device_eval_batch_size", division[1]))]


def assert_same(found, wanted, close):
    assert found.rows == wanted.rows
    assert found.losses == pytest.approx(wanted.losses, rel=close)
    assert found.tokens == wanted.tokens
    assert found.evaluations == [pytest.approx(each, rel=close, abs=close) for each in wanted.evaluations]
    ours, theirs = found.weights(), wanted.weights()
    assert ours.keys() == theirs.keys()
    assert max((weight.float() - theirs[name].float()).abs().max() for name, weight in ours.items()) < 2e-6
    assert all(torch.isfinite(weight).all() for weight in ours.values())


# A sum of log-probabilities has hundreds of nats, of which float32 keeps five decimals.
QUICK = [("sft", ["2 x 2", "1 x 1 x 4"], 1e-6), ("dpo", ["2 x 2"], 5e-6)]


@pytest.mark.parametrize(("stage", "divisions", "close"), QUICK)
def test_rows_losses_and_weights(place, tmp_path, stage, divisions, close):
    one = trained(place, tmp_path / "one", stage, DIVISIONS["4 x 1"], *held_out(place, stage, (1, 4, 1)))
    epochs = [[row for step in range(start, start + 4) for row in one.rows[step]] for start in (0, 4)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(ROWS))] * 2
    assert len(one.evaluations) == 4 and epochs[0] != epochs[1]
    for name in divisions:
        other = trained(place, tmp_path / name, stage, DIVISIONS[name], *held_out(place, stage, DIVISIONS[name]))
        assert_same(other, one, close)


# Rows, of which one, two, three or none are left for the last step of an epoch.
SLOW = [("pt", "random", 13), ("pt", "sequential", 13), ("pt", "packed", 13)]
SLOW += [(stage, "group_by_length", 13) for stage in ("sft", "rm", "dpo", "orpo")]
SLOW += [(stage, "random", rows) for stage in ("sft", "dpo") for rows in (14, 15, 16)]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "order", "rows"), SLOW)
def test_every_stage_and_division(place, tmp_path, stage, order, rows):
    more = ["--max_train_samples", rows]
    more += ["--packing", "True", "--block_size", 120] if order == "packed" else ["--train_sampling_strategy", order]
    one = trained(place, tmp_path / "one", stage, DIVISIONS["4 x 1"], *more, *held_out(place, stage, (1, 4, 1)))
    for name, division in list(DIVISIONS.items())[1:]:
        # Batches are collated in other processes as well.
        workers = ("--dataloader_num_workers", 1) if name == "2 x 1 x 2" else ()
        other = trained(place, tmp_path / name, stage, division, *more, *workers, *held_out(place, stage, division))
        assert_same(other, one, 5e-6)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_dropped_rows(place, tmp_path, stage):
    """Of the rows to train on, not of the held-out ones."""
    more = [*("--dataloader_drop_last", "True", "--max_train_samples", 14)]
    one = trained(place, tmp_path / "one", stage, DIVISIONS["4 x 1"], *more, *held_out(place, stage, (1, 4, 1)))
    assert [len(rows) for rows in one.rows.values()] == [4] * 6
    kept = trained(place, tmp_path / "kept", stage, DIVISIONS["4 x 1"], *held_out(place, stage, (1, 4, 1)))
    assert one.evaluations[0] == pytest.approx(kept.evaluations[0], rel=1e-6)
    for name in ("2 x 2", "2 x 1 x 2"):
        other = trained(place, tmp_path / name, stage, DIVISIONS[name], *more, *held_out(place, stage, DIVISIONS[name]))
        assert_same(other, one, 5e-6)


@pytest.mark.slow
def test_ppo(place, tmp_path):
    """With mini-batches, whose rows are also the same."""
    one = trained(place, tmp_path / "one", "ppo", DIVISIONS["4 x 1"], *held_out(place, "ppo", (1, 4, 1)))
    for name, division in list(DIVISIONS.items())[1:]:
        assert_same(trained(place, tmp_path / name, "ppo", division, *held_out(place, "ppo", division)), one, 1e-4)


@pytest.mark.slow
def test_grpo_asks_the_same_prompts(place, tmp_path):
    """Each process samples with its own random numbers, so the answers differ, and all that follows from them."""
    one = trained(place, tmp_path / "one", "grpo", DIVISIONS["4 x 1"])
    assert sorted({row for rows in one.rows.values() for row in rows}) == list(range(ROWS))
    for name, division in list(DIVISIONS.items())[1:]:
        assert trained(place, tmp_path / name, "grpo", division).rows == one.rows
