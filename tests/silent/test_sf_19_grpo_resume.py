"""A GRPO run that was stopped and resumed asks the prompts and samples the answers of a run without a stop."""

from tests.helpers import read_json
from tests.silent.callbacks import Kill
from tests.silent.tasks import noted, open_tasks, tasks
from tests.tiny import make_tiny

import pytest

STEPS = 10


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("sf19"))


# Seven prompts, two at a time. The checkpoint of step 5 lies in the second epoch and between two samplings with the
# first flags, and with the others among steps that train on the same answers.
CYCLES = {
    "anew in each step": ["--gradient_accumulation_steps", 2],
    "twice over": ["--gradient_accumulation_steps", 1, "--num_iterations", 2, "--steps_per_generation", 2],
    "step by step": ["--gradient_accumulation_steps", 2, "--steps_per_generation", 4, "--use_peft", "False"],
}


def opened(model, folder, cycle, *more):
    flags = ("--max_steps", STEPS, "--learning_rate", 0.01, "--save_strategy", "steps", "--save_steps", 5)
    return open_tasks(model, folder, tasks(7), *flags, "--beta", 0.1, *CYCLES[cycle], *more)


def steps(folder):
    rows = [row for row in read_json(folder / "out" / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    timed = ("seconds", "step_time")
    return [{name: value for name, value in row.items() if name not in timed} for row in rows]


def judged(folder):
    return [{name: value for name, value in row.items() if name != "place"} for row in noted(folder)]


@pytest.mark.parametrize("cycle", CYCLES)
def test_stopped_and_resumed_equals_never_stopped(model, tmp_path, cycle):
    opened(model, tmp_path / "whole", cycle).finish()
    run = opened(model, tmp_path / "stopped", cycle)
    run.trainer.add_callback(Kill(6))
    with pytest.raises(KeyboardInterrupt):
        run.finish()
    kept = (tmp_path / "stopped" / "out" / "checkpoint-5" / "answers_0.pt").is_file()
    assert kept == (cycle != "anew in each step")
    # What the stopped run judged after the checkpoint is judged again.
    whole, answers = judged(tmp_path / "whole"), judged(tmp_path / "stopped")
    assert answers == whole[: len(answers)] and len(answers) < len(whole)
    (tmp_path / "stopped" / "noted.jsonl").unlink()
    opened(model, tmp_path / "stopped", cycle, "--resume_from_checkpoint", "True").finish()
    again = judged(tmp_path / "stopped")
    assert again == whole[-len(again) :]
    assert steps(tmp_path / "stopped") == [pytest.approx(row, rel=1e-5, abs=1e-6) for row in steps(tmp_path / "whole")]
