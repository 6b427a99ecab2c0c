"""Every way in which a run can end has its own status and exit code; one that was stopped does not look finished."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from medicalgpt import launch
from medicalgpt.errors import STOPPED, Stopped, UserError
from medicalgpt.training import checkpoints
from medicalgpt.training.checkpoints import checkpoint_problem
from tests.helpers import ROOT, open_stage, read_json, write_jsonl
from tests.kills import run_killed
from tests.ranks import run_ranks
from tests.silent.ppo import save_reward_model
from tests.tiny import make_tiny

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

SFT, STEPS = "supervised_finetuning.py", 4
ROWS = {
    "pretraining.py": {"text": "Drink a glass of water {}."},
    SFT: {"instruction": "Fever {}?", "output": "Rest, and drink {} glasses."},
    "reward_modeling.py": {"prompt": "Fever {}?", "chosen": "Rest.", "rejected": "No idea."},
    "dpo_training.py": {"prompt": "Fever {}?", "chosen": "Rest.", "rejected": "No idea."},
    "orpo_training.py": {"prompt": "Fever {}?", "chosen": "Rest.", "rejected": "No idea."},
    "ppo_training.py": {"prompt": "Fever {}?", "chosen": "Rest.", "rejected": "No idea."},
    "grpo_training.py": {"question": "Fever {}?", "answer": "Rest"},
}
MORE = {
    "ppo_training.py": ("--response_length", 4),
    "grpo_training.py": ("--num_generations", 2, "--max_completion_length", 4),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sf41")
    make_tiny(folder / "model")
    save_reward_model(folder / "reward")
    for script, row in ROWS.items():
        for side, count in (("train", 8), ("held", 4)):
            texts = [{name: text.format(f"{side} {n}") for name, text in row.items()} for n in range(count)]
            write_jsonl(folder / Path(script).stem / side / "rows.jsonl", texts)
    return folder


def command(place: Path, script: str, output: Path, *more: object) -> list[object]:
    data = place / Path(script).stem
    flags = ["--model_name_or_path", place / "model", "--train_file_dir", data / "train", "--output_dir", output]
    flags += ["--validation_file_dir", data / "held", "--per_device_train_batch_size", 2, "--logging_steps", 1]
    flags += ["--max_steps", STEPS, "--sample_prompts", 0, "--save_steps", 100]
    flags += ["--resume", "auto", *MORE.get(script, ())]
    return [*flags, *(("--reward_model_path", place / "reward") if script == "ppo_training.py" else ()), *more]


class Send(TrainerCallback):
    """Sends a signal to this process, once, at an event of a step."""

    def __init__(self, number: signal.Signals, event: str, step: int = 2):
        self.number, self.step = number, step
        setattr(self, event, self.send)

    def send(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)
            self.step = None


def require_stopped(output: Path, step: int) -> None:
    """A checkpoint of that step from which the run continues, and nothing that a finished run leaves."""
    record = read_json(output / "run.json")
    assert record["status"] == "stopped" and f"checkpoint-{step} is complete" in record["reason"]
    assert "metrics" not in record and "finished" not in record and record["ended"] >= record["started"]
    assert checkpoint_problem(output / f"checkpoint-{step}") is None
    assert {path.name for path in output.iterdir()} <= {
        *("run.json", "metrics.jsonl", "answers.jsonl", "completions", "checkpoint-2", "checkpoint-3", "checkpoint-4"),
    }
    ended = [row for row in read_json(output / "metrics.jsonl") if "train_runtime" in row]
    assert len(ended) == (step == STEPS)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_saves_a_checkpoint_after_the_step_and_a_resume_gives_the_same(place, tmp_path, number, capfd):
    output = tmp_path / "run"
    run = open_stage(SFT, *command(place, SFT, output))
    run.trainer.add_callback(Send(number, "on_step_begin", step=1))
    with pytest.raises(Stopped, match=f"{number.name}. checkpoint-2 is complete; the same command"):
        run.finish()
    assert f"{number.name}: saves a checkpoint after this step, then stops." in capfd.readouterr().err
    require_stopped(output, 2)
    open_stage(SFT, *command(place, SFT, output)).finish()
    assert read_json(output / "run.json")["status"] == "finished"
    if number == signal.SIGTERM:
        open_stage(SFT, *command(place, SFT, tmp_path / "whole")).finish()
        wanted, found = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "whole", output))
        assert all(wanted[name].equal(found[name]) for name in wanted)


@pytest.mark.parametrize(
    ("event", "flags", "step"),
    [
        # In the evaluation of step 2, in a save of it, and in the evaluation after the last step.
        ("on_prediction_step", ("--eval_strategy", "steps", "--eval_steps", 2, "--eval_on_start", "False"), 2),
        ("on_save", ("--save_steps", 2), 2),
        ("on_train_end", (), 4),
    ],
)
def test_a_signal_at_any_time_is_not_lost(place, tmp_path, event, flags, step):
    run = open_stage(SFT, *command(place, SFT, tmp_path / "run", *flags))
    run.trainer.add_callback(Send(signal.SIGTERM, event, step))
    with pytest.raises(Stopped):
        run.finish()
    require_stopped(tmp_path / "run", step)


def test_a_stop_in_the_final_evaluation_leaves_nothing_twice(place, tmp_path):
    for name in ("whole", "stopped"):
        run = open_stage(SFT, *command(place, SFT, tmp_path / name))
        if name == "stopped":
            run.trainer.add_callback(Send(signal.SIGTERM, "on_prediction_step", STEPS))
            with pytest.raises(Stopped):
                run.finish()
            run = open_stage(SFT, *command(place, SFT, tmp_path / name))
        run.finish()
    kinds = [
        [(row["step"], "loss" in row, "train_runtime" in row, "eval_loss" in row) for row in rows]
        for name in ("whole", "stopped")
        for rows in (
            read_json(tmp_path / name / "metrics.jsonl"),
            read_json(tmp_path / name / "trainer_state.json")["log_history"],
        )
    ]
    assert all(kind == kinds[0] for kind in kinds)
    assert len(kinds[0]) == STEPS + 2


def test_a_signal_in_the_middle_of_a_save_waits_for_its_end(place, tmp_path, monkeypatch):
    write = checkpoints.write_atomically

    def interrupted(path, data):
        os.kill(os.getpid(), signal.SIGTERM)
        write(path, data)

    monkeypatch.setattr(checkpoints, "write_atomically", interrupted)
    run = open_stage(SFT, *command(place, SFT, tmp_path / "run", "--save_steps", 2))
    with pytest.raises(Stopped):
        run.finish()
    require_stopped(tmp_path / "run", 2)


@pytest.mark.parametrize("script", [script for script in ROWS if script != SFT])
def test_every_stage_stops(place, tmp_path, script):
    """PPO and GRPO while they generate, the others in their step; `--enable_jit_checkpoint` means the same."""
    run = open_stage(script, *command(place, script, tmp_path / "run", "--enable_jit_checkpoint", "True"))
    generates = {"ppo_training.py": "answer", "grpo_training.py": "_generate_single_turn"}
    if script in generates:
        generate = getattr(run.trainer, generates[script])

        def interrupted(*args, **kwargs):
            if run.trainer.state.global_step == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return generate(*args, **kwargs)

        setattr(run.trainer, generates[script], interrupted)
    else:
        run.trainer.add_callback(Send(signal.SIGTERM, "on_step_begin", step=1))
    with pytest.raises(Stopped):
        run.finish()
    require_stopped(tmp_path / "run", 2)


def test_before_training_there_is_nothing_to_wait_for(place, tmp_path):
    open_stage(SFT, *command(place, SFT, tmp_path / "run"))
    with pytest.raises(Stopped, match="SIGTERM"):
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_failed_run_says_so_and_starts_again(place, tmp_path, monkeypatch):
    run = open_stage(SFT, *command(place, SFT, tmp_path / "run"))

    def fail(*args, **kwargs):
        raise RuntimeError("the third cable is loose")

    monkeypatch.setattr(run.trainer, "training_step", fail)
    with pytest.raises(RuntimeError):
        run.finish()
    record = read_json(tmp_path / "run" / "run.json")
    assert record["status"] == "failed" and record["reason"] == "RuntimeError('the third cable is loose')"
    open_stage(SFT, *command(place, SFT, tmp_path / "run")).finish()
    assert read_json(tmp_path / "run" / "run.json")["status"] == "finished"
    # A third time there is nothing to do.
    with pytest.raises(SystemExit) as end:
        open_stage(SFT, *command(place, SFT, tmp_path / "run"))
    assert end.value.code == 0


def test_the_same_command_twice_at_once_is_refused(place, tmp_path):
    """The first is a program of its own, which is then stopped, with its exit code."""
    words = [sys.executable, ROOT / SFT, *command(place, SFT, tmp_path / "run", "--max_steps", 100_000)]
    first = start(words)
    try:
        wait_for_a_step(first, tmp_path / "run")
        with pytest.raises(UserError, match=f"{tmp_path / 'run'} is in use by process {first.pid} on "):
            open_stage(SFT, *command(place, SFT, tmp_path / "run"))
        first.send_signal(signal.SIGTERM)
        said = first.communicate(timeout=120)[1]
        assert first.returncode == STOPPED and "Traceback" not in said
        assert "stopped: SIGTERM. checkpoint-" in said and "is complete" in said
    finally:
        first.kill()
    assert read_json(tmp_path / "run" / "run.json")["status"] == "stopped"
    assert not (tmp_path / "run" / ".run.lock").exists()


def test_a_second_ctrl_c_ends_at_once(place, tmp_path, capfd):
    """In the middle of a step; the next start says that the run was killed."""

    def train():
        run = open_stage(SFT, *command(place, SFT, tmp_path / "run"))

        def interrupted(*args, **kwargs):
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("it has not ended")

        run.trainer.training_step = interrupted
        run.finish()

    assert run_killed(train, tmp_path / "run", None) == -signal.SIGINT
    assert read_json(tmp_path / "run" / "run.json")["status"] == "running"
    capfd.readouterr()
    open_stage(SFT, *command(place, SFT, tmp_path / "run"))
    said = capfd.readouterr().err
    assert "was killed: it has not recorded its end" in said and "has ended without leaving" in said


def stop_one(place: str, output: str) -> dict[str, object]:
    """Train on this process of several, of which the second one is asked to stop in step 2."""
    run = open_stage(SFT, *command(Path(place), SFT, Path(output), "--ddp_timeout", 60))
    if run.trainer.args.process_index == 1:
        run.trainer.add_callback(Send(signal.SIGTERM, "on_step_begin", step=1))
    sizes, reduce = [], torch.distributed.all_reduce

    def note(tensor, *args, **kwargs):
        sizes.append((run.trainer.state.global_step, tensor.dtype, tensor.numel()))
        return reduce(tensor, *args, **kwargs)

    torch.distributed.all_reduce = note
    try:
        run.finish()
    except Stopped as stop:
        return {"said": str(stop), "sizes": sizes, "step": run.trainer.state.global_step}


def test_one_process_of_two_is_stopped_and_the_question_costs_nothing_more(place, tmp_path):
    first, second = run_ranks(stop_one, 2, str(place), str(tmp_path / "run"), log=tmp_path / "log")
    assert first["step"] == second["step"] == 2
    assert "another process was asked to stop. checkpoint-2 is complete" in first["said"]
    assert second["said"].startswith("SIGTERM. ")
    # In the first step, which saves and evaluates nothing, one number is reduced with those about loss and gradient.
    in_first_step = [size for step, *size in first["sizes"] if step == 0]
    assert [torch.float32, 3] in in_first_step and [torch.int32, 1] not in in_first_step
    assert [torch.int32, 1] not in [size for step, *size in first["sizes"] if step == 1]


@pytest.mark.slow
@pytest.mark.parametrize("to", ["torchrun", "one process"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_processes_stop_together_after_the_same_step(place, tmp_path, to, number):
    launcher = ["-m", "medicalgpt.launch", "--standalone", "--nproc_per_node", "2"]
    flags = command(place, SFT, tmp_path / "run", "--max_steps", 100_000)
    process = start([sys.executable, *launcher, SFT, *flags])
    try:
        wait_for_a_step(process, tmp_path / "run")
        second = workers(process.pid)[1]
        os.kill(process.pid if to == "torchrun" else second, number)
        said = process.communicate(timeout=120)[1]
    finally:
        process.kill()
    assert process.returncode == STOPPED, said
    assert "Traceback" not in said
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    require_stopped_at(tmp_path / "run", checkpoint)
    assert {f"rng_state_{rank}.pth" for rank in (0, 1)} <= {path.name for path in checkpoint.iterdir()}


def require_stopped_at(output: Path, checkpoint: Path) -> None:
    record = read_json(output / "run.json")
    assert record["status"] == "stopped" and f"{checkpoint.name} is complete" in record["reason"]
    assert checkpoint_problem(checkpoint) is None and not (output / "README.md").exists()


def workers(agent: int) -> list[int]:
    """The processes that torchrun has started, by rank."""
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    ranks = {}
    for child in children:
        for entry in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            if entry.startswith(b"RANK="):
                ranks[int(entry[5:])] = int(child)
    return [ranks[rank] for rank in sorted(ranks)]


def start(words: list[object]) -> subprocess.Popen:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(list(map(str, words)), cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)


def wait_for_a_step(process: subprocess.Popen, output: Path) -> None:
    deadline = time.time() + 200
    while not (output / "metrics.jsonl").is_file() and process.poll() is None and time.time() < deadline:
        time.sleep(0.1)
    assert process.poll() is None and (output / "metrics.jsonl").is_file()


def test_codes():
    assert launch.STOPPED == STOPPED == os.EX_TEMPFAIL
    assert not issubclass(Stopped, Exception) and not issubclass(Stopped, UserError)
