"""The shell scripts, as a person starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from tiny import make_tiny

SCRIPTS = sorted((ROOT / "scripts").glob("*.sh"))


def bash(*command, timeout=300, **variables):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        ["bash", *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_syntax(script):
    assert bash("-n", script).returncode == 0


def test_an_unknown_argument_is_refused_before_anything_is_done():
    done = bash("scripts/run_pipeline.sh", "--frsh")
    assert done.returncode == 2
    assert "unknown argument --frsh" in done.stderr


@pytest.mark.parametrize("script, processes", [("run_pt.sh", "1"), ("run_sft.sh", "2")])
def test_a_stage_is_launched_with_further_flags(tmp_path, script, processes):
    done = bash(
        f"scripts/{script}",
        *("--max_steps", 1, "--max_train_samples", 8, "--max_eval_samples", 2, "--sample_prompts", 0),
        PYTHON=sys.executable,
        MODEL=make_tiny(tmp_path / "model", max_position_embeddings=1024),
        OUT=str(tmp_path / "out"),
        NPROC=processes,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))
    assert record["status"] == "finished"
    assert record["processes"] == int(processes)
    assert record["plan"]["effective_batch"] == 16 * int(processes)


@pytest.mark.parametrize(
    "stages, message",
    [
        ("pt sftt", 'STAGES="pt sftt": unknown stage sftt; known, in this order: pt sft rm dpo orpo'),
        ("sft pt", "pt stands twice or too late"),
        ("pt sft sft", "sft stands twice or too late"),
        ("pt dpo rm", "rm stands twice or too late"),
        (" ", "STAGES is empty"),
    ],
)
def test_impossible_stages_are_refused_before_anything_is_done(tmp_path, stages, message):
    done = bash("scripts/run_pipeline.sh", STAGES=stages, VENV=str(tmp_path / "venv"), OUT=str(tmp_path / "out"))
    assert done.returncode == 2
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


STAND_IN = """#!/bin/bash
# Writes down its arguments, and leaves an output folder as the program would.
echo "$*" >>"$COMMANDS"
adapter=yes
while [ $# -gt 0 ]; do
  case "$1" in
    --use_peft) adapter=$2 ;;
    --output_dir) folder=$2 ;;
    merge_peft_adapter.py) adapter=no ;;
  esac
  shift
done
[ -z "${folder:-}" ] || mkdir -p "$folder"
[ "$adapter" != yes ] || [ -z "${folder:-}" ] || touch "$folder/adapter_config.json"
"""


@pytest.fixture
def pipeline(tmp_path):
    """Run the pipeline with a stand-in for Python; returns (finished process, program -> its flags, in order)."""
    venv, commands = tmp_path / "venv", tmp_path / "commands"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").write_text(STAND_IN, encoding="utf-8")
    (venv / "bin" / "python").chmod(0o755)
    requirements = b"".join((ROOT / name).read_bytes() for name in ("requirements.txt", "requirements-dev.txt"))
    stamp = subprocess.run(["cksum"], input=requirements, capture_output=True, check=True).stdout
    (venv / ".installed-requirements.txt").write_bytes(stamp)

    def run(*arguments, **variables):
        commands.write_text("", encoding="utf-8")
        variables = {"VENV": str(venv), "OUT": str(tmp_path / "out"), "COMMANDS": str(commands), **variables}
        done = bash("scripts/run_pipeline.sh", *arguments, **variables)
        lines = [line.split() for line in commands.read_text(encoding="utf-8").splitlines()]
        return done, [(words[0], words[1:]) for words in lines]

    return run


def value(flags, name):
    return flags[flags.index(name) + 1]


def is_stage(program):
    return program.endswith(("training.py", "finetuning.py", "modeling.py"))


@pytest.mark.parametrize(
    "stages, road",
    [
        (None, {"pt": "tiny-base", "sft": "pt", "dpo": "sft-merged"}),
        ("pt sft", {"pt": "tiny-base", "sft": "pt"}),
        ("pt sft orpo", {"pt": "tiny-base", "sft": "pt", "orpo": "sft-merged"}),
        ("pt orpo", {"pt": "tiny-base", "orpo": "pt"}),
        ("sft", {"sft": "tiny-base"}),
        ("pt sft rm", {"pt": "tiny-base", "sft": "pt", "rm": "sft-merged"}),
        ("sft rm dpo", {"sft": "tiny-base", "rm": "sft-merged", "dpo": "sft-merged"}),
    ],
)
def test_each_stage_starts_from_the_last_model_of_the_road(tmp_path, pipeline, stages, road):
    out = tmp_path / "out"
    done, ran = pipeline(**({} if stages is None else {"STAGES": stages}))
    assert done.returncode == 0, done.stderr
    starts = {
        value(flags, "--output_dir"): value(flags, "--model_name_or_path")
        for program, flags in ran
        if is_stage(program)
    }
    assert starts == {str(out / stage): str(out / start) for stage, start in road.items()}
    merged = [value(flags, "--lora_model") for program, flags in ran if program == "merge_peft_adapter.py"]
    assert merged == [str(out / stage) for stage in road if stage not in ("pt", "rm")]

    (evaluation,) = (flags for program, flags in ran if program == "eval_pipeline.py")
    models = evaluation[1 : evaluation.index(next(flag for flag in evaluation[1:] if flag.startswith("--")))]
    assert [model.partition("=")[0] for model in models] == ["base", *(stage for stage in road if stage != "rm")]
    assert value(evaluation, "--first_chat_model") == next(stage for stage in road if stage != "pt")
    assert ("--reward_model" in evaluation) == ("rm" in road)
    (report,) = (flags for program, flags in ran if program == "build_report.py")
    assert [flag for flag in report if "=" in flag] == [f"{stage}={out / stage}" for stage in road]
    answering = {value(flags, "--model_name_or_path") for program, flags in ran if program == "inference.py"}
    assert answering == {models[-1].partition("=")[2]}


def test_a_reward_model_on_the_road_changes_no_other_stage(pipeline):
    assert pipeline()[0].returncode == 0
    done, ran = pipeline(STAGES="pt sft rm dpo")
    assert done.returncode == 0, done.stderr
    assert [program for program, _ in ran if is_stage(program)] == ["reward_modeling.py"]
    assert "== dpo: finished before, kept" in done.stdout


def test_a_stage_from_another_model_is_not_taken_for_the_same(pipeline):
    assert pipeline(STAGES="pt sft orpo")[0].returncode == 0
    done, ran = pipeline(STAGES="pt orpo")
    assert done.returncode == 1
    assert "orpo holds the result of other settings" in done.stderr and "--fresh" in done.stderr
    assert ran == []


def test_fresh_removes_only_what_the_script_makes(tmp_path, pipeline):
    assert pipeline(STAGES="pt sft rm orpo")[0].returncode == 0
    own = tmp_path / "out" / "my-model"
    own.mkdir()
    (tmp_path / "out" / "eval.json").write_text("{}", encoding="utf-8")
    done, _ = pipeline("--fresh", STAGES="sft")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("my-model", "sft", "sft-merged", "stamps", "tiny-base"),
    ]


def test_missing_rows_of_a_stage_are_named_before_training(tmp_path, pipeline):
    (tmp_path / "data" / "finetune").mkdir(parents=True)
    done, ran = pipeline(STAGES="sft dpo", DATA=str(tmp_path / "data"))
    assert done.returncode == 2
    assert f"the stage dpo needs {tmp_path / 'data' / 'reward'}, which is not there" in done.stderr
    assert not any(is_stage(program) for program, _ in ran)


def test_a_real_model_takes_every_stage_with_settings_of_its_own(pipeline):
    done, ran = pipeline(STAGES="pt sft rm dpo orpo", MODEL="some/model")
    assert done.returncode == 0, done.stderr
    stages = {Path(value(flags, "--output_dir")).name: flags for name, flags in ran if is_stage(name)}
    assert list(stages) == ["pt", "sft", "rm", "dpo", "orpo"]
    assert value(stages["pt"], "--model_name_or_path") == "some/model"
    assert all(value(flags, "--gradient_checkpointing") == "True" for flags in stages.values())


@pytest.mark.slow
def test_the_pipeline_learns_and_a_second_call_keeps_what_is_finished(tmp_path):
    variables = {"OUT": str(tmp_path / "out"), "NAME": "小医", "AUTHOR": "我", "OMP_NUM_THREADS": "2"}
    first = bash("scripts/run_pipeline.sh", timeout=1800, **variables)
    assert first.returncode == 0, first.stderr[-2000:]
    results = json.loads((tmp_path / "out" / "eval.json").read_text(encoding="utf-8"))
    base, pretrained, tuned, preferred = results["models"]
    assert pretrained["text"]["perplexity"] < base["text"]["perplexity"] / 10
    assert share(base, "chat") < 0.02
    assert share(pretrained, "chat") < 0.02
    assert share(tuned, "chat") >= 0.9
    assert tuned["chat"]["stopped"] / tuned["chat"]["total"] >= 0.99
    assert any("小医" in answer["text"] for answer in tuned["answers"])
    assert 0.4 <= share(tuned, "preference") <= 0.6
    assert share(preferred, "preference") >= 0.85
    assert share(preferred, "chat") >= share(tuned, "chat") - 0.05
    assert share(preferred, "good") >= share(tuned, "good") + 0.5

    second = bash("scripts/run_pipeline.sh", timeout=300, **variables)
    assert second.returncode == 0, second.stderr[-2000:]
    for stage in ("data", "base", "pt", "sft", "sft-merged", "dpo", "dpo-merged"):
        assert f"== {stage}: finished before, kept" in second.stdout

    other = bash("scripts/run_pipeline.sh", timeout=1800, STAGES="pt sft rm orpo", **variables)
    assert other.returncode == 0, other.stderr[-2000:]
    results = json.loads((tmp_path / "out" / "eval.json").read_text(encoding="utf-8"))
    tuned, preferred = results["models"][2:]
    assert results["reward"]["correct"] / results["reward"]["total"] >= 0.9
    assert share(preferred, "preference") >= 0.85
    assert share(preferred, "chat") >= share(tuned, "chat") - 0.05

    renamed = bash("scripts/run_pipeline.sh", timeout=300, **{**variables, "NAME": "大医"})
    assert renamed.returncode == 1
    assert "--fresh" in renamed.stderr


def share(model, kind):
    return model[kind]["correct"] / model[kind]["total"]
