"""The last complete checkpoint is there whenever a run is killed, also with --save_total_limit 1."""

import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from medicalgpt.training.checkpoints import MANIFEST, checkpoint_problem, numbered_checkpoints, step_of
from tests.helpers import open_stage, read_json, write_jsonl
from tests.kills import run_killed
from tests.tiny import make_tiny

import pytest
from safetensors.torch import load_file

SCRIPT, STEPS = "supervised_finetuning.py", 4


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sf40")
    make_tiny(folder / "model")
    write_jsonl(folder / "data" / "rows.jsonl", [{"prompt": f"Q{n}?", "response": "Rest." * n} for n in range(1, 9)])
    train(folder, folder / "whole")
    return folder


def train(place: Path, output: Path, *more: object) -> None:
    """The same command starts a run and resumes it."""
    flags = ("--model_name_or_path", place / "model", "--train_file_dir", place / "data", "--output_dir", output)
    flags += ("--max_steps", STEPS, "--save_steps", 1, "--save_total_limit", 1, "--per_device_train_batch_size", 2)
    flags += ("--sample_prompts", 0, "--logging_steps", 1, "--learning_rate", 0.01, "--dataloader_pin_memory", "False")
    open_stage(SCRIPT, *flags, "--resume", "auto", *more).finish()


def complete_steps(output: Path) -> list[int]:
    return sorted(step_of(path) for path in numbered_checkpoints(output) if checkpoint_problem(path) is None)


def kill_until_finished(place: Path, output: Path, moments: Sequence[int | str]) -> None:
    """Kill one start after another, then let the last one finish: nothing is lost, and the result is the same."""
    last = 0
    for moment in moments:
        code = run_killed(lambda: train(place, output), output, moment)
        assert code == -9 or (code == 0 and isinstance(moment, int))
        steps = complete_steps(output)
        assert (steps[-1] if steps else 0) >= last, f"killed before change {moment}: {steps} after {last}"
        last = steps[-1] if steps else 0
        if code == 0:
            break
    assert run_killed(lambda: train(place, output), output, None) == 0
    assert read_json(output / "run.json")["status"] == "finished"
    # A torn folder is removed with the next checkpoint.
    assert [path.name for path in output.glob("checkpoint-*")] == [f"checkpoint-{STEPS}"]
    wanted, found = (load_file(folder / "adapter_model.safetensors") for folder in (place / "whole", output))
    assert all(wanted[name].equal(found[name]) for name in wanted) and wanted.keys() == found.keys()
    steps = [row["step"] for row in read_json(output / "metrics.jsonl") if "loss" in row]
    assert steps == list(range(1, STEPS + 1))


def test_kills_during_saves_lose_nothing(place, tmp_path):
    """Before there is any, while the second is written and committed, before the first is removed, and at the end."""
    moments = ("open checkpoint-1/optimizer.pt", "open checkpoint-2/trainer_state.json")
    moments += ("os.rename checkpoint-2/manifest.json", "os.rmdir checkpoint-1", "os.remove checkpoint-3/manifest.json")
    moments += ("open adapter_config.json",)
    kill_until_finished(place, tmp_path / "run", moments)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_many_kills_anywhere_lose_nothing(place, tmp_path, seed):
    draw = random.Random(seed)
    kill_until_finished(place, tmp_path / "run", [draw.randrange(3, 90) for _ in range(15)])


def test_torn_folders_are_named_and_removed_at_the_next_commit(place, tmp_path, capfd):
    output = tmp_path / "run"
    train_three = partial(train, place, output, "--save_total_limit", 3)
    assert run_killed(train_three, output, "open checkpoint-2/optimizer.pt") == -9
    torn = [path for path in numbered_checkpoints(output) if not (path / MANIFEST).is_file()]
    stray = output / "checkpoint-77"
    stray.mkdir()
    (stray / "half.safetensors").write_bytes(b"half")
    capfd.readouterr()
    train_three()
    said = capfd.readouterr().err
    assert torn == [output / "checkpoint-2"]
    for path in (stray, *torn):
        assert f"{path} is incomplete (it was never finished: no manifest) and is not resumed from" in said
    assert f"{stray}, which was never finished, is removed" in said
    assert complete_steps(output) == [2, 3, 4] and not stray.exists()
