"""The shell scripts, as a person starts them."""

import json
import os
import subprocess
import sys

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


@pytest.mark.slow
def test_the_pipeline_learns_and_a_second_call_keeps_what_is_finished(tmp_path):
    variables = {"OUT": str(tmp_path / "out"), "NAME": "小医", "AUTHOR": "我", "OMP_NUM_THREADS": "2"}
    first = bash("scripts/run_pipeline.sh", timeout=1800, **variables)
    assert first.returncode == 0, first.stderr[-2000:]
    results = json.loads((tmp_path / "out" / "eval.json").read_text(encoding="utf-8"))
    base, pretrained, tuned = results["models"]
    assert pretrained["text"]["perplexity"] < base["text"]["perplexity"] / 10
    assert base["chat"]["correct"] / base["chat"]["total"] < 0.02
    assert pretrained["chat"]["correct"] / pretrained["chat"]["total"] < 0.02
    assert tuned["chat"]["correct"] / tuned["chat"]["total"] >= 0.9
    assert tuned["chat"]["stopped"] / tuned["chat"]["total"] >= 0.99
    assert any("小医" in answer["text"] for answer in tuned["answers"])

    second = bash("scripts/run_pipeline.sh", timeout=300, **variables)
    assert second.returncode == 0, second.stderr[-2000:]
    for stage in ("data", "base", "pt", "sft", "sft-merged"):
        assert f"== {stage}: finished before, kept" in second.stdout

    other = bash("scripts/run_pipeline.sh", timeout=300, **{**variables, "NAME": "大医"})
    assert other.returncode == 1
    assert "--fresh" in other.stderr
