"""The table of what may change on a resume: it has every flag of every stage once, and each stage applies it."""

import dataclasses
import importlib
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from unittest.mock import patch

from docs import resume_tables
from medicalgpt.args import AttentionArguments, DataArguments, LoraArguments, ModelArguments, RunArguments
from medicalgpt.errors import UserError
from medicalgpt.refusals import TRAINING, refused_in
from medicalgpt.training.resume_flags import FACTS, TABLE, Policy, group_of
from medicalgpt.training.runs import Run
from tests.helpers import commit, run_here, write_jsonl
from tests.tiny import make_tiny

import pytest

STAGE_ARGUMENTS = {
    "pretraining.py": "PretrainingArguments",
    "supervised_finetuning.py": "FinetuningArguments",
    "reward_modeling.py": "RewardArguments",
    "dpo_training.py": "PreferenceArguments",
    "orpo_training.py": "OrpoArguments",
    "ppo_training.py": "PpoArguments",
    "grpo_training.py": "GrpoArguments",
}
SHARED = (ModelArguments, AttentionArguments, DataArguments, LoraArguments, RunArguments)
NAMES = [name for group in TABLE for name in group.names]


def flags_of(program: str) -> set[str]:
    """Fields of the arguments of a stage that it does not refuse, and that set something."""
    stage = getattr(importlib.import_module(program.removesuffix(".py")), STAGE_ARGUMENTS[program])
    names = {field.name for cls in (*SHARED, stage) for field in dataclasses.fields(cls)}
    return names - set(refused_in(program)) - {"trust_remote_code"}


def test_every_stage_is_looked_at():
    assert set(STAGE_ARGUMENTS) == set(TRAINING)


@pytest.mark.parametrize("program", STAGE_ARGUMENTS)
def test_every_flag_of_every_stage_is_in_the_table(program):
    """A new flag must be added to a group of resume_flags.py, with care: may a run be resumed with another value?"""
    assert flags_of(program) - set(NAMES) == set()


def test_the_table_has_each_flag_once_and_no_other():
    assert [name for name, count in Counter(NAMES).items() if count > 1] == []
    known = set().union(*map(flags_of, STAGE_ARGUMENTS)) | set(FACTS)
    assert set(NAMES) - known == set()


def test_a_flag_without_a_group_may_not_change():
    assert group_of("a_flag_of_a_later_version").policy is Policy.FIXED


# --- each stage ------------------------------------------------------------------------------------------------------

PAIR = {"prompt": "Fever?", "chosen": "Rest.", "rejected": "No idea."}
ROWS = {
    "pretraining.py": {"text": "Drink a glass of water."},
    "supervised_finetuning.py": {"instruction": "Fever?", "output": "Rest, and drink enough."},
    **dict.fromkeys(("reward_modeling.py", "dpo_training.py", "orpo_training.py", "ppo_training.py"), PAIR),
    "grpo_training.py": {"question": "Fever?", "answer": "Rest"},
}
# What a stage needs besides model and data.
NEEDED = {
    "ppo_training.py": {"reward_model_path": "second"},
    "grpo_training.py": {"reward_funcs": "reward", "reward_file": "reward.py", "system_prompt": "none"},
}
REWARD = "def reward(completions, **kwargs):\n    return [0.0]\n"
# All of a stage are changed at once, and each is named.
CHANGES = {
    "pretraining.py": {"block_size": 256, "packing": "False", "document_unit": "line"},
    "supervised_finetuning.py": {"mask_history": "True", "columns": "question=instruction,answer=output"},
    "reward_modeling.py": {"center_rewards_coefficient": 0.01, "max_source_length": 300},
    "dpo_training.py": {"beta": 0.2, "loss_type": "hinge", "reference_model": "second"},
    "orpo_training.py": {"orpo_beta": 0.2},
    "ppo_training.py": {
        "kl_coef": 0.1,
        "num_mini_batches": 2,
        "response_length": 100,
        "reward_model_path": "model",
        "value_model_path": "model",
    },
    "grpo_training.py": {
        "num_generations": 4,
        "temperature": 0.7,
        "gradient_accumulation_steps": 8,
        "max_completion_length": 100,
        "reward_file": "other.py",
        "reward_weights": 2,
    },
}
PATHS = ("reference_model", "reward_model_path", "value_model_path", "reward_file")


class Reached(Exception):
    """The settings were compared, and the run would now read its data."""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with two models, data of each stage, and a checkpoint of each with the record of its run."""
    folder = tmp_path_factory.mktemp("resume_flags")
    make_tiny(folder / "model")
    make_tiny(folder / "second", seed=1)
    (folder / "reward.py").write_text(REWARD)
    (folder / "other.py").write_text(REWARD.replace("0.0", "1.0"))
    for program, row in ROWS.items():
        write_jsonl(folder / "data" / program / "rows.jsonl", [row] * 4)
        run = start(folder, program)
        checkpoint = folder / f"out-{program}" / "checkpoint-1"
        checkpoint.mkdir(parents=True)
        (checkpoint / "run.json").write_text(json.dumps(run.record, default=str))
        commit(checkpoint)
    return folder


def start(folder: Path, program: str, **changed) -> Run:
    """A run of a stage before it reads its data; a value that is None leaves the flag out."""
    given = {
        "model_name_or_path": folder / "model",
        "train_file_dir": folder / "data" / program,
        "output_dir": folder / f"out-{program}",
        **NEEDED.get(program, {}),
        **changed,
    }
    given |= {name: folder / value for name, value in given.items() if name in PATHS}
    found = []

    def stop(run, data):
        found.append(run)
        raise Reached

    with patch.object(Run, "add_data", stop), pytest.raises(Reached):
        run_here(program, *(word for name, value in given.items() for word in (f"--{name}", value)))
    return found[0]


@pytest.mark.parametrize("program", ROWS)
def test_a_stage_with_the_same_settings_is_resumed(place, program):
    run = start(place, program, resume_from_checkpoint="True", logging_steps=3)
    (entry,) = run.record["changed_on_resume"]
    assert {name: change["now"] for name, change in entry["changes"].items()} == {"logging_steps": 3}


@pytest.mark.parametrize("program", CHANGES)
def test_a_stage_with_other_settings_is_refused(place, program):
    with pytest.raises(UserError, match="cannot be resumed with these settings:") as error:
        start(place, program, resume_from_checkpoint="True", **CHANGES[program])
    for flag in CHANGES[program]:
        assert re.search(rf"--{flag} \S.* \(before: ", str(error.value)), flag


@pytest.mark.parametrize(
    ("flag", "program"), [("reward_model_path", "ppo_training.py"), ("reward_file", "grpo_training.py")]
)
def test_models_and_files_may_be_moved_but_not_changed(place, tmp_path, flag, program):
    source, moved = place / NEEDED[program][flag], tmp_path / f"moved{Path(NEEDED[program][flag]).suffix}"
    shutil.copytree(source, moved) if source.is_dir() else shutil.copy(source, moved)
    run = start(place, program, resume_from_checkpoint="True", **{flag: moved})
    assert run.record["changed_on_resume"][0]["changes"] == {flag: {"before": str(source), "now": str(moved)}}


def test_a_file_that_was_changed_in_its_place_is_noticed(place, tmp_path):
    folder = tmp_path / "place"
    shutil.copytree(place, folder)
    record = folder / "out-grpo_training.py" / "checkpoint-1" / "run.json"
    record.write_text(record.read_text().replace(str(place), str(folder)))
    commit(record.parent)
    (folder / "reward.py").write_text(REWARD.replace("0.0", "1.0"))
    with pytest.raises(UserError, match="--reward_file"):
        start(folder, "grpo_training.py", resume_from_checkpoint="True")


def test_a_configuration_that_was_changed_in_its_place_is_noticed(place, tmp_path):
    """Of a further model, too. The same one at another place is right."""
    moved = tmp_path / "moved"
    shutil.copytree(place / "second", moved)
    config = json.loads((moved / "config.json").read_text())
    start(place, "ppo_training.py", resume_from_checkpoint="True", reward_model_path=moved)
    (moved / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    with pytest.raises(UserError, match="the configuration of --reward_model_path .*: determines what") as error:
        start(place, "ppo_training.py", resume_from_checkpoint="True", reward_model_path=moved)
    assert f"To resume it, pass --reward_model_path {place / 'second'}.\n" in str(error.value)


def test_a_checkpoint_of_another_stage_is_refused(place):
    checkpoint = place / "out-dpo_training.py" / "checkpoint-1"
    with pytest.raises(UserError, match="the program orpo_training .before: dpo_training.*\n.*run dpo_training.py.\n"):
        start(place, "orpo_training.py", resume_from_checkpoint=checkpoint, output_dir=place / "new")


def edited(place: Path, tmp_path: Path, change) -> Path:
    """A checkpoint of fine-tuning, alone in a folder, whose record is changed."""
    checkpoint = tmp_path / "checkpoint-1"
    shutil.copytree(place / "out-supervised_finetuning.py" / "checkpoint-1", checkpoint)
    record = json.loads((checkpoint / "run.json").read_text())
    change(record)
    (checkpoint / "run.json").write_text(json.dumps(record))
    commit(checkpoint)
    return checkpoint


def resume(place: Path, checkpoint: Path, **changed) -> Run:
    new = checkpoint.parent / "new"
    return start(place, "supervised_finetuning.py", resume_from_checkpoint=checkpoint, output_dir=new, **changed)


def test_fewer_processes_accumulate_more(place, tmp_path):
    """The rows of a step are what counts; the remedy is right on the machine that there is."""

    checkpoint = edited(place, tmp_path, lambda record: record.update(processes=4))
    with pytest.raises(UserError) as error:
        resume(place, checkpoint)
    message = str(error.value)
    assert "the number of processes 1 (before: 4): rows per optimizer step" in message and "32 before, 8 now" in message
    assert "To resume it, pass --gradient_accumulation_steps 4.\n" in message
    run = resume(place, checkpoint, gradient_accumulation_steps=4)
    changes = run.record["changed_on_resume"][0]["changes"]
    assert changes["processes"] == {"before": 4, "now": 1}
    with pytest.raises(UserError, match="To resume it, start 4 process.es."):
        resume(place, checkpoint, per_device_train_batch_size=5)


def test_processes_that_average_alone_are_counted(place, tmp_path):
    """Each over its own tokens, so that the same rows per step have another loss."""
    checkpoint = edited(place, tmp_path, lambda record: record.update(processes=4))
    alone = {"average_tokens_across_devices": "False", "gradient_accumulation_steps": 4}
    with pytest.raises(UserError) as error:
        resume(place, checkpoint, **alone)
    assert "the number of processes 1 (before: 4): each process averages over its own tokens" in str(error.value)


def test_the_engine_is_compared_also_if_no_flag_names_it(place, tmp_path):
    """`accelerate launch` names it in variables of the environment."""
    checkpoint = edited(place, tmp_path, lambda record: record.update(engine="FSDP"))
    with pytest.raises(
        UserError, match="the engine DDP .before: FSDP.: each engine saves.*\n  To resume it, start it with F"
    ):
        resume(place, checkpoint)


def test_a_checkpoint_without_optimizer_is_refused(place, tmp_path):
    checkpoint = edited(place, tmp_path, lambda record: record["arguments"].update(save_only_model=True))
    with pytest.raises(UserError, match="--save_only_model True: it has no state of the optimizer.*omit --resume_from"):
        resume(place, checkpoint)


def test_versions_are_recorded(place, tmp_path):
    checkpoint = edited(place, tmp_path, lambda record: record["versions"].update(torch="2.0"))
    assert resume(place, checkpoint).record["changed_on_resume"][0]["changes"]["version of torch"]["before"] == "2.0"


def test_a_checkpoint_of_an_earlier_version_is_compared_as_far_as_it_says(place, tmp_path):
    def earlier(record):
        for part in ("contents", "versions", "engine"):
            del record[part]
        del record["base"]["adapter"], record["arguments"]["long_rows"]

    checkpoint = edited(place, tmp_path, earlier)
    resume(place, checkpoint)
    with pytest.raises(UserError, match="the weights of the base model"):
        resume(place, checkpoint, model_name_or_path=place / "second")


def test_a_checkpoint_without_a_record_is_resumed_with_a_warning(place, tmp_path, capfd):
    checkpoint = edited(place, tmp_path, lambda record: record.clear())
    resume(place, checkpoint, seed=7)
    assert "they cannot be compared" in capfd.readouterr().err


def test_a_base_that_is_downloaded_later_is_compared_then(place, tmp_path):
    """From a hub, its weights are on this machine only when the model has been loaded."""
    checkpoint = edited(place, tmp_path, lambda record: None)
    with patch("medicalgpt.models.hub.fingerprint", return_value=None):
        run = resume(place, checkpoint)
    run.record["contents"] |= {"base": None}
    with patch("medicalgpt.models.hub.fingerprint", return_value="f" * 64):
        with pytest.raises(UserError, match="the weights of the base model ffffffffffff"):
            run.require_same_contents()


def test_the_tables_of_the_page_are_current_and_in_both_languages():
    for language, page in resume_tables.PAGES.items():
        text = page.read_text(encoding="utf-8")
        assert resume_tables.with_tables(text, language) == text, "run: python -m docs.build_training_params"
        assert all(f"`--{name}`" in text for name in NAMES if name not in FACTS)
