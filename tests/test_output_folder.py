"""The output folder: what it may not be, and how `--overwrite_output_dir` replaces a run without risking it."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from medicalgpt.errors import UserError
from medicalgpt.files import hash_file
from medicalgpt.models.hub import resolve_checkpoint
from medicalgpt.training import checkpoints
from medicalgpt.training.checkpoints import MANIFEST
from medicalgpt.training.folder_lock import LOCK_FILE
from medicalgpt.training.output_folder import PreviousRun, paths_read, recover, refuse_overlap, replace_model
from tests.helpers import ROOT, open_stage, run_here, run_program, write_jsonl
from tests.tiny import make_tiny

import pytest

STAGES = {
    "pretraining.py": {"text": "Drink a glass of water."},
    "supervised_finetuning.py": {"instruction": "Fever?", "output": "Rest, and drink enough."},
    "reward_modeling.py": {"prompt": "Fever?", "chosen": "Rest.", "rejected": "No idea."},
    "dpo_training.py": {"prompt": "Fever?", "chosen": "Rest.", "rejected": "No idea."},
    "orpo_training.py": {"prompt": "Fever?", "chosen": "Rest.", "rejected": "No idea."},
    "ppo_training.py": {"prompt": "Fever?", "chosen": "Rest.", "rejected": "No idea."},
    "grpo_training.py": {"question": "Fever?", "answer": "Rest"},
}
OVERWRITE = ("--overwrite_output_dir", "True")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with the models, adapter and data of every stage, and a finished run."""
    place = tmp_path_factory.mktemp("output_folder")
    make_tiny(place / "models" / "base")
    for name in ("reference", "reward", "value"):
        make_tiny(place / "models" / name)
    for script, row in STAGES.items():
        write_jsonl(place / "data" / Path(script).stem / "train" / "rows.jsonl", [row] * 2)
        held = {name: value.replace("Fever", "Cough").replace("water", "tea") for name, value in row.items()}
        write_jsonl(place / "data" / Path(script).stem / "held" / "rows.jsonl", [held])
    for name, base in (("adapter", "models/base"), ("second", "other/base")):
        write_jsonl(place / name / "adapter_config.json", [{"base_model_name_or_path": str(place / base)}])
    make_tiny(place / "other" / "base")
    (place / "settings").mkdir()
    (place / "settings" / "reward.py").write_text("def reward(completions, **kwargs):\n    return [0.0]\n")
    (place / "settings" / "run.yaml").write_text("learning_rate: 1e-4\n")
    fill_run(place / "run")
    return place


def fill_run(folder: Path, text: str = "old") -> None:
    """Files as a finished run leaves them, with some that are the user's."""
    for name in ("run.json", "adapter_model.safetensors", "README.md", "vocab.json", "checkpoint-2/optimizer.pt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f'"{text}"')
    write_manifest(folder / "checkpoint-2")
    (folder / "notes.txt").write_text("mine")


def write_manifest(checkpoint: Path) -> None:
    """What makes a checkpoint complete."""
    files = [path for path in checkpoint.iterdir() if path.is_file()]
    entries = {path.name: {"bytes": path.stat().st_size, "sha256": hash_file(path)} for path in files}
    (checkpoint / MANIFEST).write_text(json.dumps(entries))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, but for the lock that the runs of this process have until it ends."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != LOCK_FILE]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def flags(place: Path, script: str, **others: object) -> list[object]:
    """A command that is complete but for what `others` replaces."""
    data = place / "data" / Path(script).stem
    given = {"model_name_or_path": place / "models" / "base", "train_file_dir": data / "train"}
    given |= {"validation_file_dir": data / "held", "output_dir": place / "new"}
    if script == "ppo_training.py":
        given["reward_model_path"] = place / "models" / "reward"
    if "reward_file" in others:
        given["reward_funcs"] = "reward"
    return [word for name, value in (given | others).items() for word in (f"--{name}", value)]


# --- refused folders -------------------------------------------------------------------------------------------------

READ = {
    "model_name_or_path": ("models/base", list(STAGES)),
    "train_file_dir": ("data/{stage}/train", list(STAGES)),
    "validation_file_dir": ("data/{stage}/held", list(STAGES)),
    "tokenizer_name_or_path": ("models/reference", list(STAGES)),
    "cache_dir": ("models/value", list(STAGES)),
    # A reward model needs an adapter with a head, which is checked before.
    "peft_path": ("adapter", [script for script in STAGES if script != "reward_modeling.py"]),
    "config": ("settings/run.yaml", list(STAGES)),
    "reference_model": ("models/reference", ["dpo_training.py"]),
    "reward_model_path": ("models/reward", ["ppo_training.py", "grpo_training.py"]),
    "value_model_path": ("models/value", ["ppo_training.py"]),
    "reward_file": ("settings/reward.py", ["grpo_training.py"]),
}
CASES = [(flag, where, script) for flag, (where, scripts) in READ.items() for script in scripts]


@pytest.mark.parametrize(("flag", "where", "script"), CASES, ids=[f"{case[2]}-{case[0]}" for case in CASES])
def test_a_folder_that_touches_what_is_read_is_refused(place, flag, where, script):
    """Equal to it, around it and inside it, in every stage; nothing is changed, and the proposed folder is accepted."""
    source = place / where.format(stage=Path(script).stem)
    before = contents(place)
    outputs = {"is": source, "contains": source.parent, "is inside": source / "new"}
    if source.is_file():
        outputs = {"contains": source.parent}
    for how, output in outputs.items():
        command = [*flags(place, script, **{flag: source, "output_dir": output}), *OVERWRITE]
        with pytest.raises(UserError) as error:
            run_here(script, *command)
        assert f"--output_dir {output} {how} " in str(error.value) and str(place) in str(error.value)
        if how != "contains":
            assert f"{how} --{flag} {source}. " in str(error.value)
        proposed = Path(str(error.value).rpartition(" ")[2])
        assert not proposed.exists() and proposed.parent.is_dir()
    assert contents(place) == before


def test_the_proposed_folder_can_be_used(place):
    script = "supervised_finetuning.py"
    with pytest.raises(UserError) as error:
        open_stage(script, *flags(place, script, output_dir=place / "models" / "base" / "sft"))
    proposed = Path(str(error.value).rpartition(" ")[2])
    assert proposed == place / "models" / "sft-supervised_finetuning"
    with pytest.raises(UserError) as error:
        open_stage(script, *flags(place, script, output_dir=place / "models"))
    second = Path(str(error.value).rpartition(" ")[2])
    assert second == place / "models" / "supervised_finetuning"
    for folder in (proposed, second):
        assert open_stage(script, *flags(place, script, output_dir=folder)).run.output_dir == folder
        shutil.rmtree(folder)


def test_a_run_with_its_data_inside_can_be_resumed(tmp_path):
    """It was made when that was allowed; moving the data would make them other data."""

    @dataclass
    class Arguments:
        train_file_dir: list[str] = field(default_factory=lambda: [str(tmp_path / "run" / "data")])

    (tmp_path / "run" / "data").mkdir(parents=True)
    refuse_overlap(tmp_path / "run", "stage", [Arguments()], resumes=True)
    with pytest.raises(UserError, match="contains --train_file_dir"):
        refuse_overlap(tmp_path / "run", "stage", [Arguments()])
    with pytest.raises(UserError, match="is --train_file_dir"):
        refuse_overlap(tmp_path / "run" / "data", "stage", [Arguments()], resumes=True)


def test_links_and_other_spellings_are_seen_through(place, tmp_path, monkeypatch):
    script = "supervised_finetuning.py"
    (tmp_path / "link").symlink_to(place / "models" / "base")
    with pytest.raises(UserError, match="link is --model_name_or_path"):
        run_here(script, *flags(place, script, output_dir=tmp_path / "link"))
    with pytest.raises(UserError, match="contains --model_name_or_path"):
        run_here(script, *flags(place, script, model_name_or_path=tmp_path / "link", output_dir=tmp_path))
    monkeypatch.chdir(place / "models")
    with pytest.raises(UserError, match=r"--output_dir \. contains --model_name_or_path base"):
        run_here(script, *flags(place, script, model_name_or_path="base", output_dir="."))


def test_the_base_of_an_adapter_and_each_of_several_sources_count(place):
    script = "supervised_finetuning.py"
    base = place / "other" / "base"
    with pytest.raises(UserError, match=f"is the base model of --model_name_or_path {base}"):
        run_here(script, *flags(place, script, model_name_or_path=place / "second", output_dir=base))
    stages = [place / "data" / name / "train" for name in ("supervised_finetuning", "dpo_training")]
    for text in (f"{stages[0]},{stages[1]}", f"{stages[0]}:0.5,{stages[1]}:0.5", f"{stages[1].parent}/tr*"):
        with pytest.raises(UserError, match=f"is --train_file_dir {stages[1]}"):
            run_here(script, *flags(place, script, train_file_dir=text, output_dir=stages[1]))


@pytest.mark.parametrize(
    ("setting", "what"),
    [("datasets.config.HF_DATASETS_CACHE", "data"), ("huggingface_hub.constants.HF_HUB_CACHE", "models")],
)
def test_the_caches_are_refused(place, tmp_path, monkeypatch, setting, what):
    monkeypatch.setattr(setting, str(tmp_path))
    script = "supervised_finetuning.py"
    with pytest.raises(UserError, match=f"is inside the cache of {what}"):
        run_here(script, *flags(place, script, output_dir=tmp_path / "run"))


def test_settings_that_are_files_count(tmp_path):
    @dataclass
    class Arguments:
        deepspeed: str = str(tmp_path / "zero.json")
        output_dir: str = str(tmp_path)
        run_name: str = str(tmp_path)

    (tmp_path / "zero.json").write_text("{}")
    assert ("--deepspeed", tmp_path / "zero.json") in list(paths_read([Arguments()]))
    assert not {"--output_dir", "--run_name"} & {flag for flag, _ in paths_read([Arguments()])}


def test_folders_next_to_each_other_are_accepted(place):
    script = "supervised_finetuning.py"
    opened = open_stage(script, *flags(place, script, output_dir=place / "data-run"))
    assert opened.run.resume_from is None


# --- replacing a run -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", STAGES)
def test_a_mistyped_path_leaves_the_finished_run(place, script):
    """The check that fails is the last of its kind: model and data, and rows that no stage can use."""
    (place / "bad").mkdir(exist_ok=True)
    (place / "bad" / "rows.jsonl").write_text('{"nothing": "known"}\n')
    before = contents(place / "run")
    wrong = {"train_file_dir": place / "data" / "mistyped"}, {"train_file_dir": place / "bad"}
    for change in (*wrong, {"model_name_or_path": place / "models" / "mistyped"}):
        with pytest.raises(UserError):
            run_here(script, *flags(place, script, output_dir=place / "run", **change), *OVERWRITE)
        assert contents(place / "run") == before


SHORT = ("--max_steps", "2", "--save_steps", "1", "--sample_prompts", "0", "--validation_split_percentage", "0")


@pytest.fixture
def overwriting(place, tmp_path):
    """A fine-tuning that is ready to replace the run in tmp_path/run."""
    fill_run(tmp_path / "run")
    script = "supervised_finetuning.py"
    return open_stage(script, *flags(place, script, output_dir=tmp_path / "run"), *OVERWRITE, *SHORT)


def test_a_failure_before_the_first_checkpoint_restores_the_run(overwriting, tmp_path, monkeypatch):
    before = contents(tmp_path / "run")
    assert ".previous-run" not in os.listdir(tmp_path / "run")

    def fail(*args: object, **kwargs: object) -> None:
        assert set(os.listdir(tmp_path / "run")) >= {".previous-run", "run.json", "notes.txt"}
        assert not (tmp_path / "run" / "checkpoint-2").exists()
        # What a run has written when its first manifest is not there yet.
        (tmp_path / "run" / "checkpoint-1").mkdir()
        (tmp_path / "run" / "checkpoint-1" / "half.safetensors").write_text("half")
        (tmp_path / "run" / "vocab.json").write_text("new")
        raise KeyboardInterrupt

    monkeypatch.setattr(overwriting.trainer, "training_step", fail)
    with pytest.raises(KeyboardInterrupt):
        overwriting.finish()
    assert contents(tmp_path / "run") == before
    assert not [name for name in os.listdir(tmp_path / "run") if name.startswith(".")]


def test_the_first_checkpoint_removes_the_earlier_run(overwriting, tmp_path, monkeypatch):
    seen: list[bool] = []
    step = overwriting.trainer.training_step

    def look(*args: object, **kwargs: object):
        seen.append((tmp_path / "run" / ".previous-run" / "checkpoint-2").is_dir())
        if len(seen) == 2:
            raise UserError("failed after the first checkpoint")
        return step(*args, **kwargs)

    monkeypatch.setattr(overwriting.trainer, "training_step", look)
    with pytest.raises(UserError, match="failed after"):
        overwriting.finish()
    assert seen == [True, False]
    names = set(os.listdir(tmp_path / "run"))
    assert {"checkpoint-1", "notes.txt", "run.json"} <= names and "checkpoint-2" not in names
    assert not [name for name in names if name.startswith(".")]


def test_an_older_checkpoint_is_removed_when_the_next_is_complete(place, tmp_path, monkeypatch):
    """All recipes keep one: a kill while the next is saved or hashed must not leave none."""
    (tmp_path / "run" / "checkpoint-best").mkdir(parents=True)
    present: list[set[str]] = []
    write = checkpoints.write_atomically

    def look(path: Path, data: str) -> None:
        present.append({folder.name for folder in (tmp_path / "run").glob("checkpoint-*")})
        write(path, data)

    monkeypatch.setattr(checkpoints, "write_atomically", look)
    script = "supervised_finetuning.py"
    more = ("--max_steps", 3, "--save_steps", 1, "--sample_prompts", 0, "--save_total_limit", 1)
    open_stage(script, *flags(place, script, output_dir=tmp_path / "run"), *more).finish()
    mine, *steps = "checkpoint-best", "checkpoint-1", "checkpoint-2", "checkpoint-3"
    assert present == [{mine, steps[0]}, {mine, *steps[:2]}, {mine, *steps[1:]}]
    assert {folder.name for folder in (tmp_path / "run").glob("checkpoint-*")} == {mine, steps[2]}


def test_which_checkpoints_are_removed(tmp_path):
    """The last by time, which after a resume from an earlier one is not the highest. Incomplete ones do not count."""
    for age, step in enumerate((30, 10, 20)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / MANIFEST).write_text("{}")
        os.utime(tmp_path / f"checkpoint-{step}" / MANIFEST, (age + 1, age + 1))
    (tmp_path / "checkpoint-40").mkdir()
    left = []
    for limit, best in ((3, None), (2, None), (1, tmp_path / "checkpoint-10"), (1, None)):
        checkpoints.remove_old_checkpoints(tmp_path, limit, best and str(best))
        left.append({int(path.name[11:]) for path in tmp_path.iterdir()})
    assert left == [{30, 10, 20, 40}, {10, 20, 40}, {10, 20, 40}, {20, 40}]
    checkpoints.remove_incomplete_checkpoints(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-20"}


def kill_at(moment: int, action: Callable[[], object]) -> bool:
    """Run `action` in a forked process, killed before its nth change of the disk; returns whether it came that far."""
    process = os.fork()
    if process == 0:
        count = itertools.count()

        def or_die(change: Callable) -> Callable:
            return lambda *args, **kwargs: os._exit(9) if next(count) == moment else change(*args, **kwargs)

        for name in ("rename", "unlink", "rmdir", "mkdir"):
            setattr(os, name, or_die(getattr(os, name)))
        action()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9


@pytest.mark.parametrize("commits", [False, True])
def test_a_kill_at_any_point_loses_nothing(tmp_path, commits):
    """Whenever the process dies, the next start finds the earlier run, or after its first checkpoint the new one."""
    folder = tmp_path / "run"

    def replace() -> None:
        previous = PreviousRun(folder)
        previous.set_aside()
        for name in ("run.json", "vocab.json", "checkpoint-1/half.bin"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text('"new"')
        if commits:
            (folder / "checkpoint-1" / MANIFEST).write_text("{}")
            previous.discard()
        else:
            previous.restore()

    ends = []
    for moment in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        fill_run(folder)
        old = contents(folder)
        died = kill_at(moment, replace)
        # The next start is killed as well, once.
        kill_at(moment % 3, lambda: PreviousRun(folder).recover())
        PreviousRun(folder).recover()
        after = contents(folder)
        assert not [name for name in os.listdir(folder) if "previous" in name]
        ends.append("old" if after == old else "new")
        if ends[-1] == "new":
            assert commits and after["run.json"] == b'"new"' and "checkpoint-2/optimizer.pt" not in after
        if not died:
            break
    assert len(ends) > 15 and ends == sorted(ends, reverse=True) and ends[-1] == ("new" if commits else "old")


def test_a_failed_move_leaves_the_run(tmp_path, monkeypatch):
    fill_run(tmp_path / "run")
    before, move = contents(tmp_path / "run"), Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.name == "run.json" and target.parent.name.startswith("."):
            raise OSError("disk error")
        return move(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="disk error"):
        PreviousRun(tmp_path / "run").set_aside()
    assert contents(tmp_path / "run") == before


def test_a_model_replaces_another_only_when_it_is_complete(tmp_path):
    """A failure in the block, and one of the moves, leave every file of the earlier model."""
    fill_run(tmp_path / "run")
    (tmp_path / "run" / "odd[1].vocab").write_text("old")
    before = contents(tmp_path / "run")
    with pytest.raises(UserError), replace_model(tmp_path / "run") as folder:
        (folder / "config.json").write_text("new")
        raise UserError("damaged")
    assert contents(tmp_path / "run") == before

    def save() -> None:
        with replace_model(tmp_path / "run") as folder:
            for name in ("config.json", "run.json", "odd[1].vocab"):
                (folder / name).write_text('{"status": "finished"}')

    for moment in range(100):
        shutil.rmtree(tmp_path / "run")
        fill_run(tmp_path / "run")
        (tmp_path / "run" / "odd[1].vocab").write_text("old")
        died = kill_at(moment, save)
        recover(tmp_path / "run")
        after = contents(tmp_path / "run")
        if after["run.json"] == before["run.json"]:
            assert {name: after[name] for name in before} == before
        else:
            assert after["odd[1].vocab"] == after["config.json"] == after["run.json"] == b'{"status": "finished"}'
        if not died:
            break
    assert moment > 8 and after["run.json"] != before["run.json"]
    assert set(after) == set(before) - {"adapter_model.safetensors", "vocab.json"} | {"config.json"}


def test_a_killed_replacement_is_not_resumed(place, tmp_path):
    """The checkpoints that are found are those of the run before, which had another purpose."""
    fill_run(tmp_path / "run")
    before = contents(tmp_path / "run")

    def set_aside_and_die() -> None:
        PreviousRun(tmp_path / "run").set_aside()
        os._exit(9)

    kill_at(1000, set_aside_and_die)
    assert not (tmp_path / "run" / "run.json").exists()
    script = "supervised_finetuning.py"
    with pytest.raises(UserError, match="run to resume saved no checkpoint"):
        run_here(script, *flags(place, script, output_dir=tmp_path / "run"), "--resume_from_checkpoint", "True")
    assert contents(tmp_path / "run") == before


@pytest.mark.slow
def test_several_processes_replace_a_run_together(place, tmp_path):
    """The first one acts; a failure of both restores the run, and the second start replaces it."""
    fill_run(tmp_path / "run")
    before = contents(tmp_path / "run")
    script = "supervised_finetuning.py"
    command = [*flags(place, script, output_dir=tmp_path / "run"), *OVERWRITE, *SHORT, "--eval_strategy", "no"]
    failed = run_program(script, *command, "--learning_rate", "nan", processes=2, check=False)
    assert failed.returncode == 1 and contents(tmp_path / "run") == before
    run_program(script, *command, processes=2)
    names = set(os.listdir(tmp_path / "run"))
    assert {"checkpoint-1", "adapter_config.json", "notes.txt"} <= names and "vocab.json" not in names
    assert not [name for name in names if name.startswith(".")]


def test_a_run_that_is_set_aside_is_named(tmp_path):
    """Whoever loads the folder of a killed run is shown where the earlier one is."""
    fill_run(tmp_path / "run")
    write_jsonl(tmp_path / "run" / "adapter_config.json", [{"base_model_name_or_path": "base"}])
    PreviousRun(tmp_path / "run").set_aside()
    with pytest.raises(UserError, match="Did you mean .*run/.previous-run?"):
        resolve_checkpoint(str(tmp_path / "run"))


def test_an_evaluation_does_not_replace_a_trained_run(place, tmp_path):
    fill_run(tmp_path / "run")
    before = contents(tmp_path / "run")
    script = "supervised_finetuning.py"
    command = [*flags(place, script, output_dir=tmp_path / "run"), *OVERWRITE, "--do_train", "False"]
    with pytest.raises(UserError, match="--do_train False trains nothing that could replace"):
        run_here(script, *command)
    assert contents(tmp_path / "run") == before


def test_a_checkpoint_of_another_folder_does_not_overwrite_the_run_there(place, tmp_path):
    """Resuming from a run elsewhere is a new run for the output folder."""
    fill_run(tmp_path / "run")
    fill_run(tmp_path / "elsewhere")
    before = contents(tmp_path / "run")
    script = "supervised_finetuning.py"
    command = flags(place, script, output_dir=tmp_path / "run")
    with pytest.raises(UserError, match="holds another run"):
        run_here(script, *command, "--resume_from_checkpoint", tmp_path / "elsewhere" / "checkpoint-2")
    assert contents(tmp_path / "run") == before


def test_a_killed_program_restores_the_run_at_its_next_start(place, tmp_path):
    """As a user sees it: `kill -9` in the first step, then a command that is refused for the run that is back."""
    fill_run(tmp_path / "run")
    before = contents(tmp_path / "run")
    script = "supervised_finetuning.py"
    command = [sys.executable, ROOT / script, *flags(place, script, output_dir=tmp_path / "run"), *OVERWRITE]
    command += ["--max_steps", "100000", "--sample_prompts", "0"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, env=env, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (tmp_path / "run" / ".previous-run").is_dir() and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "run" / ".previous-run" / "checkpoint-2").is_dir()
    with pytest.raises(UserError, match="holds another run"):
        run_here(script, *flags(place, script, output_dir=tmp_path / "run"))
    assert contents(tmp_path / "run") == before
