"""Twenty rows of a user, at default flags: they are learned, and what is chosen for the user is printed and kept."""

import os
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace

from medicalgpt.serving.chat import ChatEngine
from medicalgpt.serving.generation import Sampling
from medicalgpt.training.few_rows import RowCounts, defaults_for, epochs_for
from tests.helpers import ROOT, open_stage, read_json, run_here, write_jsonl
from tests.tiny import make_tiny

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

SCRIPT = "supervised_finetuning.py"
ANSWERS = {f"{word * 6}?": word.upper() * 2 for word in "abcdefghijklmnopqrst"}
CHOSEN = {"num_train_epochs": 30, "learning_rate": 1e-3, "warmup_steps": 0.1}


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("few-rows")
    make_tiny(folder / "small")
    make_tiny(folder / "base")
    # As wide and as deep as that of build_tiny_model.py, which the values were chosen with.
    config = Qwen3Config.from_pretrained(folder / "base")
    shape = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 704, "num_hidden_layers": 4}
    config.update({**shape, "layer_types": ["full_attention"] * 4, "initializer_range": 0.02})
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder / "base")
    write_jsonl(folder / "rows" / "train.jsonl", [{"prompt": q, "response": a} for q, a in ANSWERS.items()])
    return folder


def flags(work, output, *more, model="base"):
    where = ("--model_name_or_path", work / model, "--train_file_dir", work / "rows", "--output_dir", work / output)
    return (*where, "--use_peft", "False", "--sample_prompts", 0, *more)


def known(folder) -> int:
    """How many of the questions are answered as in the rows."""
    engine = ChatEngine.from_pretrained(str(folder))
    sampling = Sampling(temperature=0, max_new_tokens=8)
    answers = [engine.chat([{"role": "user", "content": question}], sampling) for question in ANSWERS]
    return sum(answer.text == right for answer, right in zip(answers, ANSWERS.values(), strict=True))


@pytest.fixture(scope="module")
def trained(work, one_thread) -> Path:
    run_here(SCRIPT, *flags(work, "out", "--save_steps", 60))
    return work / "out"


def test_twenty_rows_are_learned_at_default_flags(work, trained):
    run_here(SCRIPT, *flags(work, "three", "--num_train_epochs", 3))
    assert known(work / "three") <= 4
    assert known(trained) >= 18


def test_what_was_chosen_is_printed_and_recorded(work, trained, capsys):
    record = read_json(trained / "run.json")
    assert record["defaults_from_rows"]["values"] == CHOSEN
    assert record["arguments"].items() >= CHOSEN.items() and record["plan"]["steps"] == 90
    open_stage(SCRIPT, *flags(work, "printed"))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "few rows" in line]
    assert "20 rows are 3 steps per epoch" in line
    assert "--num_train_epochs 30 --learning_rate 0.001 --warmup_steps 0.1" in line


def test_a_resumed_run_keeps_them(work, trained):
    resumed = ("--resume_from_checkpoint", trained / "checkpoint-60")
    run = open_stage(SCRIPT, *flags(work, "resumed", *resumed)).run
    assert {name: getattr(run.training, name) for name in CHOSEN} == CHOSEN
    assert run.record["defaults_from_rows"]["values"] == CHOSEN
    (changed,) = run.record["changed_on_resume"]
    assert changed["changes"].keys() == {"output_dir", "save_steps"}
    longer = open_stage(SCRIPT, *flags(work, "longer", *resumed, "--num_train_epochs", 40)).run
    assert (longer.training.num_train_epochs, longer.training.learning_rate) == (40, 1e-3)
    with pytest.raises(SystemExit) as ended:
        run_here(SCRIPT, *flags(work, "out", "--resume", "auto"))
    assert ended.value.code == 0


def test_flags_that_are_set_stay(work):
    run = open_stage(SCRIPT, *flags(work, "set", "--learning_rate", 3e-4, "--warmup_steps", 5)).run
    assert run.record["defaults_from_rows"]["values"] == {"num_train_epochs": 30}
    assert (run.training.learning_rate, run.training.warmup_steps) == (3e-4, 5)


@pytest.mark.parametrize("length", [("--num_train_epochs", 2), ("--max_steps", 6)])
def test_a_short_run_is_warned_of_with_a_command_that_is_long_enough(work, length, capsys):
    run = open_stage(SCRIPT, *flags(work, "short", *length)).run
    assert "defaults_from_rows" not in run.record and run.training.learning_rate == 2e-5
    lines = capsys.readouterr().err.splitlines()
    (at,) = [number for number, line in enumerate(lines) if "only 6 steps" in line]
    python, script, *words = shlex.split(lines[at + 1])
    assert (python, script) == ("python", SCRIPT)
    again = open_stage(script, *words).run
    assert again.record["plan"]["steps"] == 90 and again.output_dir == work / "short-30-epochs"
    assert "only" not in capsys.readouterr().err


@pytest.mark.parametrize(("per_epoch", "epochs"), [(1, 50), (2, 30), (3, 30), (10, 20), (25, 8), (63, 4), (100, 3)])
def test_epochs_follow_the_steps_of_an_epoch(per_epoch, epochs):
    assert epochs_for(per_epoch) == epochs


def test_real_models_keep_their_rate_and_held_out_rows_are_evaluated():
    args = SimpleNamespace(given=frozenset())
    real = defaults_for(RowCounts(rows=20, held_out=5, per_epoch=3, parameters=600_000_000), args, use_peft=True)
    assert real == {
        **{"num_train_epochs": 30, "warmup_steps": 0.1},
        **{"eval_strategy": "steps", "eval_steps": 9, "eval_on_start": True},
    }
    tiny = defaults_for(RowCounts(rows=20, held_out=50, per_epoch=3, parameters=4_000_000), args, use_peft=True)
    assert tiny == {**CHOSEN, "learning_rate": 2e-3}
    many = RowCounts(rows=5_000, held_out=50, per_epoch=625, parameters=4_000_000)
    assert defaults_for(many, args, use_peft=True) == {}


def test_held_out_rows_are_evaluated_while_training(work):
    write_jsonl(work / "two" / "train.jsonl", [{"prompt": q, "response": a} for q, a in ANSWERS.items()])
    write_jsonl(work / "two" / "validation.jsonl", [{"prompt": "u?", "response": "F"}])
    run_here(SCRIPT, *flags(work, "evaluated", "--train_file_dir", work / "two", model="small"))
    lines = (work / "evaluated" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert sum("eval_loss" in line for line in lines) >= 11


# --- from a folder to a chat ----------------------------------------------------------------------------------------


def bash(*command, **variables):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        ["bash", *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )


def test_the_script_refuses_what_is_not_a_folder(tmp_path):
    for given in ((), ("--flag",), (tmp_path / "missing",), (tmp_path, "--output_dir", tmp_path / "out")):
        done = bash("scripts/train_my_data.sh", *given)
        assert done.returncode == 2 and "error: " in done.stderr


@pytest.mark.slow
def test_a_folder_becomes_a_model_to_chat_with(work, tmp_path):
    """Checked, trained, merged, shown; the same command again changes nothing."""
    command = ("scripts/train_my_data.sh", work / "rows")
    variables = {"MODEL": str(work / "small"), "OUT": str(tmp_path / "out")}
    done = bash(*command, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    merged = tmp_path / "out" / "merged"
    for text in ("20 usable", "few rows: 20 rows", "before  ", "after  ", f"--model_name_or_path {merged}"):
        assert text in done.stdout + done.stderr, text
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    again = bash(*command, **variables)
    assert again.returncode == 0 and "has already finished" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")} == times
    replaced = bash(*command, "--seed", "7", "--overwrite_output_dir", "True", **variables)
    assert replaced.returncode == 0, replaced.stdout + replaced.stderr
    newer = {path: path.stat().st_mtime_ns for path in times if path.parent.name in ("sft", "merged")}
    assert newer and all(newer[path] > times[path] for path in newer)
    write_jsonl(work / "rows" / "more.jsonl", [{"prompt": "u?", "response": "F"}])
    changed = bash(*command, **variables)
    (work / "rows" / "more.jsonl").unlink()
    assert changed.returncode == 2 and "has changed since" in changed.stderr
    write_jsonl(tmp_path / "bad" / "train.jsonl", [{"prompt": "u?", "response": ""}])
    refused = bash(command[0], tmp_path / "bad", OUT=str(tmp_path / "none"), MODEL=variables["MODEL"])
    assert refused.returncode == 1 and not (tmp_path / "none").exists()
