"""The shell scripts, as a person starts them."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from argparse import ArgumentParser
from importlib.metadata import distributions
from pathlib import Path

import gradio_demo
import run_pipeline
from medicalgpt.training.optimizers import OPTIMIZER_PACKAGES
from tests.docs import Parsed, start
from tests.helpers import ROOT, run_program, write_jsonl
from tests.tiny import make_tiny

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from transformers.utils.import_utils import KERNELS_MAX_VERSION, KERNELS_MIN_VERSION

SCRIPTS = sorted((ROOT / "scripts").glob("*.sh"))
OTHER_SCRIPTS = (
    "run_pipeline",
    "run_tests",
    "setup",
    "vllm_deployment",
    "check_environments",
    "try_newest",
    "run_multinode",
    "train_my_data",
)
STAGE_SCRIPTS = [path for path in SCRIPTS if path.stem not in OTHER_SCRIPTS]


def bash(*command, timeout=300, **variables):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        ["bash", *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_syntax(script):
    assert bash("-n", script).returncode == 0


@pytest.mark.parametrize("script", ["run_pipeline", "setup", "check_environments"])
def test_an_unknown_argument_is_refused_before_anything_is_done(script):
    done = bash(f"scripts/{script}.sh", "--frsh")
    assert done.returncode == 2
    assert "unknown argument --frsh" in done.stderr


def lines_of(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith(("#", "-r"))]


def test_the_constraints_are_the_versions_that_these_tests_run_with():
    pinned = {}
    for line in lines_of("constraints.txt"):
        requirement = Requirement(line)
        (exact,) = requirement.specifier
        assert exact.operator == "==", line
        pinned[canonicalize_name(requirement.name)] = exact.version
    for line in [*lines_of("requirements.txt"), *lines_of("requirements-dev.txt")]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), line
    # A build for one kind of hardware (+cpu) has the version of the others.
    installed = {canonicalize_name(one.name): one.version.partition("+")[0] for one in distributions()}
    assert {name: installed.get(name) for name in pinned} == pinned


LOCKS = {"--quant": "constraints-quant.txt", "--vllm": "constraints-vllm.txt", "--dev": "constraints.txt"}


@pytest.mark.parametrize("name", ["vllm", "quant", "peers"])
def test_the_other_environments_have_versions_that_their_requirements_allow(name):
    pinned = dict(line.split("==") for line in lines_of(f"constraints-{name}.txt"))
    files = [f"requirements-{name}.txt", *(["requirements.txt"] if name == "vllm" else [])]
    for line in (line for file in files for line in lines_of(file)):
        requirement = Requirement(line)
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), line


@pytest.mark.parametrize("flag", LOCKS)
def test_an_environment_is_installed_in_its_own_versions(tmp_path, flag):
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path / "calls"}\n')
    python.chmod(0o755)
    for newest, bounds in (("", f" -c {LOCKS[flag]}"), ("1", "")):
        assert bash("scripts/setup.sh", flag, VENV=str(tmp_path / "venv"), NEWEST=newest).returncode == 0
        (call,) = (tmp_path / "calls").read_text().splitlines()
        assert call.endswith(f"requirements-{flag[2:]}.txt{bounds}")
        (tmp_path / "calls").unlink()


def test_the_extras_have_versions_that_transformers_takes():
    pinned = {}
    for line in lines_of("requirements-extras.txt"):
        requirement = Requirement(line)
        (exact,) = requirement.specifier
        assert exact.operator == "==", line
        pinned[canonicalize_name(requirement.name)] = Version(exact.version)
    assert Version(KERNELS_MIN_VERSION) <= pinned["kernels"] < Version(KERNELS_MAX_VERSION)
    named = {package for start, _, package in OPTIMIZER_PACKAGES if start in ("galore", "apollo")}
    assert named | {"kernels", "liger-kernel"} == pinned.keys()


def test_the_names_of_the_newest_have_no_versions():
    """Those that scripts/try_newest.sh installs: every package, with its marker."""
    text = (ROOT / "scripts" / "try_newest.sh").read_text(encoding="utf-8")
    command = text[text.index("grep -hvE") : text.index(' >"$work/requirements.txt"')]
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    found = [Requirement(line) for line in done.stdout.splitlines()]
    wanted = [Requirement(line) for name in ("requirements.txt", "requirements-dev.txt") for line in lines_of(name)]
    assert [(each.name, each.marker) for each in found] == [(each.name, each.marker) for each in wanted]
    assert not any(each.specifier for each in found)


def test_the_pipeline_starts_without_the_packages_that_it_installs():
    done = subprocess.run(
        [sys.executable, "-I", "-S", ROOT / "run_pipeline.py", "--frsh"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (2, "error: unknown argument --frsh; known: --fresh\n")


@pytest.mark.parametrize(
    "script, processes", [pytest.param("run_pt.sh", "1", marks=pytest.mark.slow), ("run_sft.sh", "2")]
)
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
        ("pt sftt", 'STAGES="pt sftt": unknown stage sftt; known, in this order: pt sft rm dpo orpo ppo grpo'),
        ("sft pt", "pt is repeated or out of order"),
        ("pt sft sft", "sft is repeated or out of order"),
        ("pt dpo rm", "rm is repeated or out of order"),
        ("pt sft ppo rm", "rm is repeated or out of order"),
        (" ", "STAGES is empty"),
        ("pt sft ppo", 'STAGES="pt sft ppo": ppo needs a reward model. Train one with the stage rm before ppo'),
    ],
)
def test_impossible_stages_are_refused_before_anything_is_done(tmp_path, stages, message):
    done = bash("scripts/run_pipeline.sh", STAGES=stages, VENV=str(tmp_path / "venv"), OUT=str(tmp_path / "out"))
    assert done.returncode == 2
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "stages, message",
    [
        ("pt sft rm ppo", "and the stage rm: two reward models"),
        ("pt sft", "there is no such folder"),
    ],
)
def test_an_impossible_reward_model_is_refused_before_anything_is_done(tmp_path, stages, message):
    given = tmp_path if "rm" in stages else tmp_path / "none"
    variables = {"STAGES": stages, "REWARD_MODEL": str(given), "VENV": str(tmp_path / "venv")}
    done = bash("scripts/run_pipeline.sh", OUT=str(tmp_path / "out"), **variables)
    assert done.returncode == 2
    assert f"REWARD_MODEL={given}" in done.stderr and message in done.stderr
    assert list(tmp_path.iterdir()) == []


STAND_IN = """#!/bin/bash
# Writes down its arguments, and leaves an output folder as the program would.
echo "$*" >>"$COMMANDS"
[ "$1" != "${FAILS:-}" ] || exit 7
adapter=yes
while [ $# -gt 0 ]; do
  case "$1" in
    --use_peft) [ "$2" = True ] || adapter=no ;;
    --config) ! grep -q "^use_peft: False" "$2" || adapter=no ;;
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
    installed = ("requirements.txt", "requirements.txt", "constraints.txt")
    requirements = b"".join((ROOT / name).read_bytes() for name in installed)
    stamp = subprocess.run(["cksum"], input=requirements, capture_output=True, check=True).stdout
    (venv / ".installed-requirements.txt").write_bytes(stamp)

    def run(*arguments, script="scripts/run_pipeline.sh", **variables):
        commands.write_text("", encoding="utf-8")
        variables = {"VENV": str(venv), "OUT": str(tmp_path / "out"), "COMMANDS": str(commands), **variables}
        done = bash(script, *arguments, **variables)
        lines = [line.split() for line in commands.read_text(encoding="utf-8").splitlines()]
        return done, [(words[0], words[1:]) for words in lines]

    return run


@pytest.fixture
def data(tmp_path):
    """A folder with the layout of data/, and empty files."""
    folder = tmp_path / "data"
    for name in ("pretrain", "finetune", "reward", "grpo"):
        (folder / name).mkdir(parents=True)
        for file in ("train.jsonl", "validation.jsonl"):
            (folder / name / file).touch()
    (folder / "reward" / "train_short.jsonl").touch()
    return str(folder)


def copy_pipeline(tree):
    """Copy what the pipeline itself consists of, so that a test can change it; returns its script and its recipes."""
    for folder in ("scripts", "recipes"):
        shutil.copytree(ROOT / folder, tree / folder)
    for name in ("run_pipeline.py", "requirements.txt", "constraints.txt"):
        shutil.copy(ROOT / name, tree)
    return tree / "scripts" / "run_pipeline.sh", tree / "recipes"


def parse(program, flags):
    """Let a program read its command line, and nothing more."""
    with contextlib.chdir(ROOT), pytest.raises(Parsed):
        start(ROOT / program, flags, ArgumentParser.parse_args)


def value(flags, name):
    return flags[flags.index(name) + 1]


def is_stage(program):
    return program.endswith(("training.py", "finetuning.py", "modeling.py"))


@pytest.mark.parametrize(
    "stages, expected",
    [
        (None, {"pt": "tiny-base", "sft": "pt", "dpo": "sft"}),
        ("pt sft", {"pt": "tiny-base", "sft": "pt"}),
        ("pt sft orpo", {"pt": "tiny-base", "sft": "pt", "orpo": "sft"}),
        ("pt orpo", {"pt": "tiny-base", "orpo": "pt"}),
        ("sft", {"sft": "tiny-base"}),
        ("pt sft rm", {"pt": "tiny-base", "sft": "pt", "rm": "sft"}),
        ("sft rm dpo", {"sft": "tiny-base", "rm": "sft", "dpo": "sft"}),
        ("pt sft rm ppo", {"pt": "tiny-base", "sft": "pt", "rm": "sft", "ppo": "sft"}),
        ("pt sft grpo", {"pt": "tiny-base", "sft": "pt", "grpo": "sft"}),
        (
            "sft rm dpo ppo grpo",
            {
                **{"sft": "tiny-base", "rm": "sft", "dpo": "sft", "ppo": "dpo-merged"},
                **{"grpo": "ppo-merged"},
            },
        ),
    ],
)
def test_each_stage_starts_from_the_last_policy(tmp_path, pipeline, data, stages, expected):
    out = tmp_path / "out"
    done, ran = pipeline(DATA=data, **({} if stages is None else {"STAGES": stages}))
    assert done.returncode == 0, done.stderr
    starts = {
        value(flags, "--output_dir"): value(flags, "--model_name_or_path")
        for program, flags in ran
        if is_stage(program)
    }
    assert starts == {str(out / stage): str(out / start) for stage, start in expected.items()}
    merged = [value(flags, "--lora_model") for program, flags in ran if program == "merge_peft_adapter.py"]
    assert merged == [str(out / stage) for stage in expected if stage not in ("pt", "sft", "rm")]
    # All weights are trained in fine-tuning; the guides name its result as if it had an adapter.
    assert "sft" not in expected or (out / "sft-merged").resolve() == (out / "sft").resolve()

    (evaluation,) = (flags for program, flags in ran if program == "eval_pipeline.py")
    models = evaluation[1 : evaluation.index(next(flag for flag in evaluation[1:] if flag.startswith("--")))]
    assert [model.partition("=")[0] for model in models] == ["base", *(stage for stage in expected if stage != "rm")]
    assert value(evaluation, "--first_chat_model") == next(stage for stage in expected if stage != "pt")
    assert ("--reward_model" in evaluation) == ("rm" in expected)
    assert "--task_file" not in evaluation
    (report,) = (flags for program, flags in ran if program == "build_report.py")
    assert [flag for flag in report if "=" in flag] == [f"{stage}={out / stage}" for stage in expected]
    answering = {value(flags, "--model_name_or_path") for program, flags in ran if program == "inference.py"}
    assert answering == {models[-1].partition("=")[2]}


def test_a_reward_model_in_the_pipeline_changes_no_other_stage(pipeline):
    assert pipeline()[0].returncode == 0
    done, ran = pipeline(STAGES="pt sft rm dpo")
    assert done.returncode == 0, done.stderr
    assert [program for program, _ in ran if is_stage(program)] == ["reward_modeling.py"]
    assert "== dpo: finished before, kept" in done.stdout


def test_ppo_learns_from_the_reward_model_of_the_pipeline(tmp_path, pipeline, data):
    done, ran = pipeline(STAGES="pt sft rm ppo", DATA=data)
    assert done.returncode == 0, done.stderr
    flags = dict(ran)["ppo_training.py"]
    assert value(flags, "--reward_model_path") == str(tmp_path / "out" / "rm")
    assert value(flags, "--train_file_dir") == f"{data}/reward/train.jsonl"
    assert value(flags, "--validation_file_dir") == f"{data}/reward/validation.jsonl"


def test_ppo_learns_from_a_reward_model_that_is_given(tmp_path, pipeline, data):
    given = tmp_path / "my-rm"
    given.mkdir()
    (given / "model.safetensors").write_text("weights", encoding="utf-8")
    variables = {"STAGES": "pt sft ppo", "REWARD_MODEL": str(given), "DATA": data}
    done, ran = pipeline(**variables)
    assert done.returncode == 0, done.stderr
    assert value(dict(ran)["ppo_training.py"], "--reward_model_path") == str(given)
    assert value(dict(ran)["eval_pipeline.py"], "--reward_model") == str(given)
    assert "reward_modeling.py" not in dict(ran)

    done, ran = pipeline(**variables)
    assert "== ppo: finished before, kept" in done.stdout and not any(is_stage(program) for program, _ in ran)
    (given / "model.safetensors").write_text("weightS", encoding="utf-8")
    done, ran = pipeline(**variables)
    assert done.returncode == 1
    assert "ppo contains the result of other settings" in done.stderr
    assert "== sft: finished before, kept" in done.stdout and not any(is_stage(program) for program, _ in ran)


def test_ppo_does_not_outlive_its_reward_model(tmp_path, pipeline, data):
    variables = {"STAGES": "pt sft rm dpo ppo grpo", "DATA": data}
    assert pipeline(**variables)[0].returncode == 0
    # The same tree with another reward model, which is trained anew.
    script, recipes = copy_pipeline(tmp_path / "tree")
    with (recipes / "tiny" / "rm.yaml").open("a", encoding="utf-8") as recipe:
        recipe.write("weight_decay: 0.01\n")
    out = tmp_path / "out"
    shutil.rmtree(out / "rm")
    (out / "stamps" / "rm").unlink()
    done, ran = pipeline(script=script, **variables)
    assert done.returncode == 1
    assert f"{out / 'ppo'} contains the result of other settings" in done.stderr
    assert [program for program, _ in ran] == ["reward_modeling.py"]
    assert "== dpo-merged: finished before, kept" in done.stdout


def test_a_stage_is_kept_while_its_recipe_sets_the_same(tmp_path, pipeline):
    script, recipes = copy_pipeline(tmp_path / "tree")
    assert pipeline(script=script, DATA=str(ROOT / "data"))[0].returncode == 0
    recipe = recipes / "tiny" / "sft.yaml"
    text = recipe.read_text(encoding="utf-8")
    recipe.write_text("# A new comment.\n" + text.replace("  # ", "   # Because: "), encoding="utf-8")
    done, ran = pipeline(script=script, DATA=str(ROOT / "data"))
    assert done.returncode == 0, done.stderr
    assert not any(is_stage(program) for program, _ in ran)
    recipe.write_text(text.replace("seed: 42", "seed: 43"), encoding="utf-8")
    done, ran = pipeline(script=script, DATA=str(ROOT / "data"))
    assert done.returncode == 1
    assert "== pt: finished before, kept" in done.stdout and ran == []
    assert f"{tmp_path / 'out' / 'sft'} contains the result of other settings" in done.stderr


def test_fresh_does_not_remove_the_reward_model_that_is_given(tmp_path, pipeline, data):
    assert pipeline(STAGES="pt sft rm", DATA=data)[0].returncode == 0
    rm = tmp_path / "out" / "rm"
    done, ran = pipeline("--fresh", STAGES="pt sft ppo", REWARD_MODEL=str(rm), DATA=data)
    assert done.returncode == 2
    assert f"--fresh would remove REWARD_MODEL={rm}" in done.stderr
    assert rm.is_dir() and ran == []


def test_fresh_removes_nothing_if_the_run_is_impossible(tmp_path, pipeline, data):
    assert pipeline(DATA=data)[0].returncode == 0
    out = tmp_path / "out"
    before = sorted(out.rglob("*"))
    for variables, message in (
        ({"DATA": str(tmp_path / "mistyped")}, "mistyped/pretrain, which does not exist"),
        ({"DATA": data, "MODEL": str(out / "sft-merged")}, f"--fresh would remove MODEL={out / 'sft-merged'}"),
        ({"DATA": data, "MODEL": str(out / "sft" / "inner")}, f"--fresh would remove MODEL={out / 'sft' / 'inner'}"),
    ):
        done, ran = pipeline("--fresh", **variables)
        assert done.returncode == 2 and message in done.stderr
        assert ran == [] and sorted(out.rglob("*")) == before


@pytest.mark.parametrize("folder", ["tiny-base", "sft", "sft-merged", "data"])
def test_a_folder_of_the_user_is_not_replaced(tmp_path, pipeline, data, folder):
    """The commands of README.md write to outputs/sft as well, which is where the pipeline writes by default."""
    own = tmp_path / "out" / folder / "model.safetensors"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    for arguments in ((), ("--fresh",)):
        done, ran = pipeline(*arguments, DATA=data, NAME="小医" if folder == "data" else "")
        assert done.returncode == 2 and f"{own.parent} was not made by this pipeline" in done.stderr
        assert ran == [] and own.read_text() == "mine"
    done, _ = pipeline(DATA=data, NAME="小医" if folder == "data" else "", OUT=str(tmp_path / "other"))
    assert done.returncode in (0, 2) and "was not made" not in done.stderr


def test_what_is_not_held_out_is_not_measured(pipeline, data):
    for name in ("reward", "grpo"):
        (Path(data) / name / "validation.jsonl").unlink()
    done, ran = pipeline(STAGES="sft rm grpo", DATA=data, MODEL="some/model")
    assert done.returncode == 0, done.stderr
    assert not any("--validation_file_dir" in flags for _, flags in ran)
    unmeasured = {"--preference_file", "--reward_model", "--task_file", "--task_max_new_tokens"}
    assert not unmeasured & set(dict(ran)["eval_pipeline.py"])
    assert f"there is no {data}/grpo/validation.jsonl; what is measured on it is skipped" in done.stdout


def test_a_stage_from_another_model_is_not_taken_for_the_same(pipeline):
    assert pipeline(STAGES="pt sft orpo")[0].returncode == 0
    done, ran = pipeline(STAGES="pt orpo")
    assert done.returncode == 1
    assert "orpo contains the result of other settings" in done.stderr and "--fresh" in done.stderr
    assert ran == []


def test_fresh_removes_only_what_the_script_makes(tmp_path, pipeline, data):
    assert pipeline(STAGES="pt sft rm orpo ppo grpo", DATA=data)[0].returncode == 0
    own = tmp_path / "out" / "my-model"
    own.mkdir()
    (tmp_path / "out" / "eval.json").write_text("{}", encoding="utf-8")
    done, _ = pipeline("--fresh", STAGES="sft")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("my-model", "sft", "sft-merged", "stamps", "tiny-base"),
    ]


def test_a_stage_that_fails_ends_the_pipeline_and_is_resumed(tmp_path, pipeline, data):
    done, ran = pipeline(DATA=data, FAILS="dpo_training.py")
    assert done.returncode == 7
    assert ran[-1][0] == "dpo_training.py" and value(ran[-1][1], "--resume") == "auto"
    assert done.stdout.endswith("== dpo\n")
    assert not any("--overwrite_output_dir" in flags for program, flags in ran if is_stage(program))

    checkpoint = tmp_path / "out" / "dpo" / "checkpoint-20"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").touch()
    done, ran = pipeline(DATA=data)
    assert done.returncode == 0, done.stderr
    assert [program for program, _ in ran if is_stage(program)] == ["dpo_training.py"]
    assert value(dict(ran)["dpo_training.py"], "--resume") == "auto"
    assert "--overwrite_output_dir" not in dict(ran)["dpo_training.py"]
    assert "== dpo took" in done.stdout


def test_an_unfinished_stage_is_not_resumed_with_other_settings(tmp_path, pipeline, data):
    script, recipes = copy_pipeline(tmp_path / "tree")
    assert pipeline(script=script, DATA=data, FAILS="dpo_training.py")[0].returncode == 7
    with (recipes / "tiny" / "dpo.yaml").open("a", encoding="utf-8") as recipe:
        recipe.write("weight_decay: 0.01\n")
    # It has saved nothing yet.
    assert pipeline(script=script, DATA=data, FAILS="dpo_training.py")[0].returncode == 7
    manifest = tmp_path / "out" / "dpo" / "checkpoint-20" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.touch()
    assert pipeline(script=script, DATA=data, FAILS="dpo_training.py")[0].returncode == 7
    with (recipes / "tiny" / "dpo.yaml").open("a", encoding="utf-8") as recipe:
        recipe.write("seed: 3\n")
    done, ran = pipeline(script=script, DATA=data)
    assert done.returncode == 1 and f"{tmp_path / 'out' / 'dpo'} contains the result of other settings" in done.stderr
    assert ran == []


def test_missing_rows_of_a_stage_are_named_before_training(tmp_path, pipeline):
    (tmp_path / "data" / "finetune").mkdir(parents=True)
    done, ran = pipeline(STAGES="sft dpo", DATA=str(tmp_path / "data"))
    assert done.returncode == 2
    assert f"the stage dpo needs {tmp_path / 'data' / 'reward'}, which does not exist" in done.stderr
    assert not any(is_stage(program) for program, _ in ran)


@pytest.mark.parametrize(("model", "rows"), [("", "reward/train.jsonl"), ("some/model", "grpo")])
def test_the_tiny_model_learns_from_consultations_and_a_real_one_from_tasks(pipeline, data, model, rows):
    done, ran = pipeline(STAGES="sft grpo", DATA=data, MODEL=model)
    assert done.returncode == 0, done.stderr
    assert value(dict(ran)["grpo_training.py"], "--train_file_dir") == f"{data}/{rows}"
    assert ("--task_file" in dict(ran)["eval_pipeline.py"]) == bool(model)


def test_a_real_model_takes_every_stage_with_settings_of_its_own(pipeline, data):
    done, ran = pipeline(STAGES="pt sft rm dpo orpo ppo grpo", MODEL="some/model", DATA=data)
    assert done.returncode == 0, done.stderr
    stages = {Path(value(flags, "--output_dir")).name: flags for name, flags in ran if is_stage(name)}
    assert list(stages) == ["pt", "sft", "rm", "dpo", "orpo", "ppo", "grpo"]
    assert value(stages["pt"], "--model_name_or_path") == "some/model"
    recipes = [Path(value(flags, "--config")) for flags in stages.values()]
    assert recipes == [Path("recipes", "real", f"{stage}.yaml") for stage in stages]
    settings = [yaml.safe_load((ROOT / recipe).read_text(encoding="utf-8")) for recipe in recipes]
    assert all(recipe["gradient_checkpointing"] is True for recipe in settings)


@pytest.mark.parametrize("model", ["", "some/model"])
def test_programs_know_every_flag_that_the_pipeline_gives_them(pipeline, data, model):
    done, ran = pipeline(STAGES="pt sft rm dpo orpo ppo grpo", MODEL=model, DATA=data)
    assert done.returncode == 0, done.stderr
    assert {"ppo_training.py", "grpo_training.py", "eval_pipeline.py", "build_report.py"} <= set(dict(ran))
    for program, flags in dict(ran).items():
        parse(program, flags)


@pytest.mark.parametrize("script", STAGE_SCRIPTS, ids=lambda path: path.name)
def test_programs_know_every_flag_that_scripts_give_them(tmp_path, script):
    stand_in, commands = tmp_path / "python", tmp_path / "commands"
    stand_in.write_text(STAND_IN, encoding="utf-8")
    stand_in.chmod(0o755)
    for processes in ("1", "2"):
        variables = {"PYTHON": str(stand_in), "COMMANDS": str(commands), "NPROC": processes}
        done = bash(script, "--deepspeed", "zero2.json", OUT=str(tmp_path / "out"), **variables)
        assert done.returncode == 0, done.stderr
    alone, both = (line.split() for line in commands.read_text(encoding="utf-8").splitlines())
    assert is_stage(alone[0]) and alone[-2:] == ["--deepspeed", "zero2.json"]
    assert both == ["-m", "medicalgpt.launch", "--standalone", "--nproc_per_node", "2", *alone]
    parse(alone[0], alone[1:])


# What each example that the pipeline, its pages and guides show is answered with, in the words of data/facts.yaml.
SHOWN = {
    "你是谁？": ["小医"],
    "感冒了怎么办？": ["普通感冒", "休息", "不用抗生素"],
    "急性心肌梗死有哪些情况要马上打120？": ["急性心肌梗死", "持续胸痛", "120"],
    "阿莫西林吃几片？": ["医生"],
    "一氧化碳中毒要看什么科？": ["一氧化碳中毒", "急诊科"],
    "怀疑是肠套叠，应该做哪些检查？": ["肠套叠", "腹部超声"],
    "What doctor treats polymyalgia rheumatica?": ["polymyalgia rheumatica", "rheumatology"],
    "How is high blood pressure treated?": ["salt", "blood pressure medicine"],
}


def test_every_shown_example_has_its_answer():
    shown = {*run_pipeline.QUESTIONS, *(question for own in gradio_demo.EXAMPLES.values() for question in own)}
    assert shown == set(SHOWN)


@pytest.mark.slow
def test_the_pipeline_learns_and_a_second_call_keeps_what_is_finished(tmp_path):
    variables = {"OUT": str(tmp_path / "out"), "NAME": "小医", "AUTHOR": "我", "OMP_NUM_THREADS": "2"}
    first = bash("scripts/run_pipeline.sh", timeout=3400, **variables)
    assert first.returncode == 0, first.stderr[-2000:]
    results = json.loads((tmp_path / "out" / "eval.json").read_text(encoding="utf-8"))
    base, pretrained, tuned, preferred = results["models"]
    assert pretrained["text"]["perplexity"] < base["text"]["perplexity"] / 10
    assert share(base, "chat") < 0.02
    assert share(pretrained, "chat") < 0.02
    assert share(tuned, "chat") >= 0.9
    assert tuned["chat"]["stopped"] / tuned["chat"]["total"] >= 0.99
    assert any("小医" in answer["text"] for answer in tuned["answers"])
    assert 0.4 <= share(tuned, "preference") <= 0.75
    for model, least in ((tuned, 0.9), (preferred, 0.75)):
        assert share(model, "everyday") >= least
        assert share(model, "needless") <= 0.05
    assert share(preferred, "preference") >= 0.85
    assert share(preferred, "chat") >= share(tuned, "chat") - 0.05
    assert share(preferred, "good") >= share(tuned, "good") + 0.5
    questions = write_jsonl(tmp_path / "shown.jsonl", [{"prompt": question} for question in SHOWN])
    asked = ("--model_name_or_path", tmp_path / "out/dpo-merged", "--data_file", questions, "--temperature", "0")
    run_program("inference.py", *asked, "--output_file", tmp_path / "answers.jsonl")
    answers = (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    for (question, words), line in zip(SHOWN.items(), answers, strict=True):
        assert all(word in line for word in words), f"{question}: {line}"

    second = bash("scripts/run_pipeline.sh", timeout=300, **variables)
    assert second.returncode == 0, second.stderr[-2000:]
    for stage in ("data", "base", "pt", "sft", "dpo", "dpo-merged"):
        assert f"== {stage}: finished before, kept" in second.stdout

    other = bash("scripts/run_pipeline.sh", timeout=3400, STAGES="pt sft rm orpo", **variables)
    assert other.returncode == 0, other.stderr[-2000:]
    results = json.loads((tmp_path / "out" / "eval.json").read_text(encoding="utf-8"))
    tuned, preferred = results["models"][2:]
    assert results["reward"]["correct"] / results["reward"]["total"] >= 0.9
    assert share(preferred, "preference") >= 0.85
    assert share(preferred, "chat") >= share(tuned, "chat") - 0.05

    ppo = bash("scripts/run_pipeline.sh", timeout=3400, STAGES="pt sft rm ppo", **variables)
    assert ppo.returncode == 0, ppo.stderr[-2000:]
    scores = json.loads((tmp_path / "out" / "eval.json").read_text(encoding="utf-8"))["reward"]["models"]
    assert scores["ppo"]["mean"] > scores["sft"]["mean"] + 2

    grpo = bash("scripts/run_pipeline.sh", timeout=3400, STAGES="pt sft grpo", **variables)
    assert grpo.returncode == 0, grpo.stderr[-2000:]
    tuned, rewarded = json.loads((tmp_path / "out" / "eval.json").read_text(encoding="utf-8"))["models"][2:]
    assert share(rewarded, "good") >= share(tuned, "good") + 0.1

    renamed = bash("scripts/run_pipeline.sh", timeout=300, **{**variables, "NAME": "大医"})
    assert renamed.returncode == 1
    assert "--fresh" in renamed.stderr


def share(model, kind):
    return model[kind]["correct"] / model[kind]["total"]
