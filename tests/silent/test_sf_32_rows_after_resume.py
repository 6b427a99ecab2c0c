"""A run on several processes that is resumed in a later epoch trains on the rows of the run without a stop.

So does one that is resumed on another number of processes, as long as a step has as many rows.
"""

import importlib

from tests.helpers import read_json, run_program
from tests.silent.ledgers import LEARN, STAGES, Trained, make_rows

import pytest

# Thirteen rows in steps of four: the last step of an epoch has one row, which two processes cannot share.
ROWS, STEPS = 13, 11
SAVE = ("--save_strategy", "steps", "--save_steps", 3, "--max_steps", STEPS)
GROUPED, RANDOM = (("--train_sampling_strategy", order) for order in ("group_by_length", "random"))
STREAMED = ("--streaming", "True", "--shuffle_buffer", 5)
ORDERS = [("sft", GROUPED), ("sft", RANDOM), ("sft", STREAMED), ("pt", RANDOM), ("pt", STREAMED), ("rm", GROUPED)]
ORDERS += [("dpo", GROUPED), ("dpo", RANDOM), ("orpo", GROUPED), ("ppo", ()), ("grpo", ())]


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
    """In the second and in the third epoch."""
    flags = [*division(2), *SAVE, *order]
    whole = Trained(stage, place, tmp_path / "whole", *flags, processes=2)
    assert sorted(whole.losses) == list(range(1, STEPS + 1))
    for killed, checkpoint in ((7, 6), (10, 9)):
        output = tmp_path / f"killed{killed}"
        stopped = Trained(stage, place, output, *flags, processes=2, stop=killed)
        assert stopped.rows == {step: rows for step, rows in whole.rows.items() if step < killed}
        resumed = Trained(stage, place, output, *flags, "--resume_from_checkpoint", "True", processes=2)
        assert_continues(resumed, whole, checkpoint)


@pytest.mark.slow
def test_under_torchrun(place, tmp_path):
    """The same as above, by the commands that a user gives."""
    flags = [
        *("--model_name_or_path", place / "model", "--train_file_dir", place / "data" / "sft", *LEARN),
        *("--dataloader_pin_memory", "False", *division(2), *SAVE),
    ]
    start = {"processes": 2, "launcher": "medicalgpt.launch"}
    run_program(STAGES["sft"], *flags, "--output_dir", tmp_path / "whole", **start)
    checkpoint = ("--resume_from_checkpoint", tmp_path / "whole" / "checkpoint-6")
    run_program(STAGES["sft"], *flags, "--output_dir", tmp_path / "resumed", *checkpoint, **start)
    whole, resumed = (
        {row["step"]: row["loss"] for row in read_json(tmp_path / name / "metrics.jsonl") if "loss" in row}
        for name in ("whole", "resumed")
    )
    assert resumed == pytest.approx({step: loss for step, loss in whole.items() if step > 6}, rel=1e-6)
    assert len(resumed) == STEPS - 6


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "dpo", "ppo"])
def test_four_processes_two_and_four_again(place, tmp_path, stage):
    """PPO draws an answer's tokens from the answer's number, so that even its rollouts are the same."""
    whole = Trained(stage, place, tmp_path / "whole", *division(4), *SAVE, processes=4)
    Trained(stage, place, tmp_path / "out", *division(4), *SAVE, processes=4, stop=4)
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
    # The loss of PPO is a sum of both signs near 0.
    assert last.losses == pytest.approx(whole.losses, **({"abs": 1e-4} if stage == "ppo" else {"rel": 1e-5}))
    assert last.tokens == whole.tokens
