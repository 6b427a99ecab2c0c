"""A run on several processes that is resumed in a later epoch trains on the rows of the run without a stop.

So does one that is resumed on another number of processes, as long as a step has as many rows.
"""

import importlib

from tests.helpers import read_json
from tests.silent.ledgers import STAGES, Trained, make_rows

import pytest

# Thirteen rows in steps of four: the last step of an epoch has one row, which two processes cannot share.
ROWS, STEPS = 13, 11
SAVE = ("--save_strategy", "steps", "--save_steps", 3, "--max_steps", STEPS)
ORDERS = [*(("sft", order) for order in ("group_by_length", "random")), ("pt", "random"), ("rm", "group_by_length")]
ORDERS += [("dpo", "group_by_length"), ("dpo", "random"), ("orpo", "group_by_length"), ("ppo", None), ("grpo", None)]


def division(processes, accumulation=1):
    return (
        *("--per_device_train_batch_size", 4 // processes // accumulation),
        *("--gradient_accumulation_steps", accumulation),
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    for script in STAGES.values():
        importlib.import_module(script.removesuffix(".py"))
    return make_rows(tmp_path_factory.mktemp("sf32"), ROWS)


def assert_continues(run, whole, after):
    wanted = {step: rows for step, rows in whole.rows.items() if step >= after}
    assert run.rows == wanted
    assert run.losses == pytest.approx(whole.losses, rel=1e-6)


@pytest.fixture(scope="module")
def whole(place):
    return Trained("sft", place, place / "whole", *division(2), *SAVE, processes=2)


def test_an_epoch_has_each_row_once(whole):
    epochs = [[row for step in range(start, min(start + 4, STEPS)) for row in whole.rows[step]] for start in (0, 4, 8)]
    assert [sorted(epoch) for epoch in epochs[:2]] == [list(range(ROWS))] * 2
    assert len(set(epochs[2])) == len(epochs[2]) == 12
    assert [len(rows) for rows in whole.rows.values()] == [4, 4, 4, 1, 4, 4, 4, 1, 4, 4, 4]


@pytest.mark.parametrize(("checkpoint", "processes"), [(6, 1), (9, 2)])
def test_resumed_in_a_later_epoch(place, whole, checkpoint, processes):
    """The checkpoints are within the second and the third epoch; the first one is resumed on one process."""
    resumed = Trained(
        "sft",
        place,
        place / f"from{checkpoint}",
        *(*division(processes), *SAVE, "--resume_from_checkpoint", place / f"whole/checkpoint-{checkpoint}"),
        processes=processes,
    )
    assert_continues(resumed, whole, checkpoint)


def test_a_run_that_has_all_its_steps_takes_no_more(place, whole):
    """The last step is not the last one of its epoch."""
    before = read_json(whole.output / "run.json")["metrics"]
    again = Trained("sft", place, whole.output, *division(2), *SAVE, "--resume_from_checkpoint", "True", processes=2)
    assert again.rows == {}
    after = read_json(whole.output / "run.json")["metrics"]
    assert after["train_loss"] == pytest.approx(before["train_loss"], rel=1e-6)
    # As many seconds, and so as many steps in a second, as the run itself took; it only saved once more.
    assert after["train_runtime"] == pytest.approx(before["train_runtime"], rel=0.2, abs=1)
    steps = [row["step"] for row in read_json(whole.output / "metrics.jsonl") if "loss" in row]
    assert steps == list(range(1, STEPS + 1))


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "order"), ORDERS)
def test_killed_and_resumed_on_two_processes(place, tmp_path, stage, order):
    """In the second and in the third epoch; the file of the next test runs under torchrun."""
    flags = [*division(2), *SAVE, *(("--train_sampling_strategy", order) if order else ())]
    whole = Trained(stage, place, tmp_path / "whole", *flags, processes=2)
    assert sorted(whole.losses) == list(range(1, STEPS + 1))
    for killed, checkpoint in ((7, 6), (10, 9)):
        output = tmp_path / f"killed{killed}"
        stopped = Trained(stage, place, output, *flags, processes=2, stop=killed)
        assert stopped.rows == {step: rows for step, rows in whole.rows.items() if step < killed}
        resumed = Trained(stage, place, output, *flags, "--resume_from_checkpoint", "True", processes=2)
        assert_continues(resumed, whole, checkpoint)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "dpo", "ppo"])
def test_four_processes_two_and_four_again(place, tmp_path, stage):
    """PPO draws an answer's tokens from the answer's number, so that even its rollouts are the same."""
    whole = Trained(stage, place, tmp_path / "whole", *division(4), *SAVE, processes=4)
    Trained(stage, place, tmp_path / "out", *division(4), *SAVE, processes=4, stop=3)
    Trained(
        stage,
        place,
        tmp_path / "out",
        *(*division(2), *SAVE, "--resume_from_checkpoint", "True"),
        processes=2,
        stop=7,
    )
    last = Trained(stage, place, tmp_path / "out", *division(4), *SAVE, "--resume_from_checkpoint", "True", processes=4)
    assert last.rows == {step: rows for step, rows in whole.rows.items() if step >= 6}
    assert last.losses == pytest.approx(whole.losses, rel=1e-5)
    assert last.tokens == whole.tokens
