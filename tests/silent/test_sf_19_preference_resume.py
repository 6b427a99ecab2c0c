"""A run on pairs that was stopped and resumed has the losses, metrics and counts of a run without a stop."""

from tests.helpers import read_json, save_model
from tests.silent.callbacks import Kill
from tests.silent.pairs import on_every_stage, open_pairs, pairs
from tests.tiny import tiny_tokenizer

import pytest

STEPS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("sf19"), tiny_tokenizer())


def opened(stage, model, folder, *more):
    # Nine pairs in steps of four: the fourth step begins the second epoch, in the middle of which the checkpoint lies.
    return open_pairs(
        stage,
        model,
        folder,
        pairs(9),
        *("--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2, "--max_steps", STEPS),
        *("--save_strategy", "steps", "--save_steps", 4, "--logging_steps", 1, "--learning_rate", 1e-3),
        *("--disable_dropout", "False", "--lora_dropout", 0.2, *more),
    )


def steps(folder):
    rows = [row for row in read_json(folder / "out" / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.mark.parametrize("strategy", ["group_by_length", pytest.param("random", marks=pytest.mark.slow)])
@on_every_stage
def test_stopped_and_resumed_equals_never_stopped(model, tmp_path, stage, strategy):
    order = ("--train_sampling_strategy", strategy)
    opened(stage, model, tmp_path / "whole", *order).finish()
    run = opened(stage, model, tmp_path / "stopped", *order)
    run.trainer.add_callback(Kill(5))
    with pytest.raises(KeyboardInterrupt):
        run.finish()
    opened(stage, model, tmp_path / "stopped", *order, "--resume_from_checkpoint", "True").finish()
    whole, resumed = steps(tmp_path / "whole"), steps(tmp_path / "stopped")
    assert resumed == [pytest.approx(row, rel=1e-6, abs=1e-7) for row in whole]
    counts = [row["num_tokens"] for row in whole]
    assert counts == sorted(set(counts)) and len({row["loss"] for row in whole}) == STEPS
