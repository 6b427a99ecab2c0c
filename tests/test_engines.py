"""DeepSpeed and FSDP around a run: locks of compiled extensions, the process group of a single process, refusals."""

import os
import subprocess
import sys
import time
from types import SimpleNamespace
from unittest.mock import patch

from medicalgpt.errors import UserError
from medicalgpt.logs import TORCHRUN_VARIABLES, is_launch_incomplete, number_single_process
from medicalgpt.models.families import check_family
from medicalgpt.training import engines
from tests.engine_arithmetic import TABLES
from tests.helpers import ROOT, open_stage, read_json, run_here, save_model, write_jsonl
from tests.tiny import tiny_tokenizer

import pytest
from accelerate import ParallelismConfig
from loguru import logger
from torch.utils.file_baton import FileBaton
from transformers import AutoConfig, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.deepspeed import HfDeepSpeedConfig


@pytest.fixture
def log():
    lines: list[str] = []
    sink = logger.add(lambda line: lines.append(str(line)), level="INFO")
    yield lines
    logger.remove(sink)


@pytest.fixture
def lock(tmp_path):
    """The lock of an extension that is being compiled, in one of the two places where torch has it."""
    file = tmp_path / "py311_cu130" / "cpu_adam" / "lock"
    file.parent.mkdir(parents=True)
    file.touch()
    return file


@pytest.fixture
def locks(tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "SECONDS_TO_BUILD", 0)
    return engines.ExtensionLocks(tmp_path)


def make_old(file):
    past = time.time() - 600
    os.utime(file, (past, past))


def test_a_lock_that_an_interrupted_run_left_is_taken_over(lock, locks, log):
    """torch would wait for it for ever, without a word."""
    make_old(lock)
    assert locks.check() and not lock.exists() and not locks.check()
    assert f"{lock} was left by a run that was interrupted 10 min ago" in log[0] and len(log) == 1


def test_a_folder_that_still_changes_may_be_another_machines(lock, locks, log):
    """Its lock is not removed, but named, once; what the message tells to do ends the wait."""
    make_old(lock)
    (lock.parent / "cpu_adam.o").touch()
    assert locks.check() and locks.check() and lock.exists() and len(log) == 1
    command = log[0].partition("remove it: ")[2].partition(". It is")[0]
    subprocess.run(command, shell=True, check=True)
    assert not locks.check()


def test_a_lock_that_a_process_holds_is_waited_for(lock, locks, log):
    """However old it is: a slow machine may compile for long."""
    lock.unlink()
    baton = FileBaton(str(lock))
    assert baton.try_acquire()
    make_old(lock)
    assert locks.check() and lock.exists()
    assert f"process {os.getpid()} compiles an extension of DeepSpeed in {lock.parent}" in log[0]
    baton.release()
    assert not locks.check()


def test_other_processes_of_a_machine_wait_for_the_first(lock, locks, log, monkeypatch):
    """If one went ahead, torch would wait in it, and would not compile once the lock is removed."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    make_old(lock)
    assert locks.check() and lock.exists() and not log


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_RANK", "WORLD_SIZE"])
def test_the_numbers_of_a_launcher_are_left_alone(name):
    """mpirun numbers its processes in its own way."""
    with patch.dict(os.environ, {name: "2"}, clear=True):
        number_single_process()
        assert dict(os.environ) == {name: "2"}


def test_a_process_without_a_launcher_is_a_group_of_one():
    with patch.dict(os.environ, clear=True):
        number_single_process()
        assert dict(os.environ) == TORCHRUN_VARIABLES


# Prints what a training program would say of how it was started.
LAUNCHED = """
from medicalgpt.parser import parse_args
from supervised_finetuning import FinetuningArguments
parse_args(FinetuningArguments, argv=[])
print("processes:", __import__("medicalgpt.logs").logs.world_size())
"""


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--cpu"], []], ids=["cpu", "default"])
@pytest.mark.parametrize("count", [1, 2])
def test_accelerate_that_starts_one_process_in_place_of_two(tmp_path, count, more):
    (tmp_path / "launched.py").write_text(LAUNCHED)
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(count), *more, "launched.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    if count == 1:
        assert done.returncode == 0 and done.stdout == "processes: 1\n", done.stderr
    else:
        assert done.returncode != 0 and not done.stdout
        assert "accelerate launch was to start several processes and has started only this one" in done.stderr


@pytest.mark.parametrize(
    ("variables", "incomplete"),
    [
        ("", False),
        ("MASTER_ADDR", False),
        ("ACCELERATE_MIXED_PRECISION", False),
        ("ACCELERATE_MIXED_PRECISION MASTER_ADDR", True),
        ("ACCELERATE_MIXED_PRECISION MASTER_ADDR WORLD_SIZE", False),
        ("ACCELERATE_MIXED_PRECISION MASTER_ADDR OMPI_COMM_WORLD_SIZE", False),
    ],
)
def test_a_launch_of_accelerate_that_is_incomplete(variables, incomplete):
    with patch.dict(os.environ, dict.fromkeys(variables.split(), "1"), clear=True):
        assert is_launch_incomplete() is incomplete


def test_the_weights_that_quantization_reaches_are_counted_under_zero_3(tmp_path):
    """On a model without weights, which ZeRO-3 would try to shard ("Cannot copy out of meta tensor")."""
    config = AutoConfig.from_pretrained(save_model(tmp_path, tiny_tokenizer()))
    settings = HfDeepSpeedConfig(str(ROOT / "zero3.json"))
    assert is_deepspeed_zero3_enabled()
    check_family(config, "--load_in_4bit")
    del settings
    assert not is_deepspeed_zero3_enabled()


def trainer_with(*, fsdp_version=None, **parallel):
    """What `check_engine` looks at in a trainer."""
    plugin = SimpleNamespace(fsdp_version=fsdp_version)
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        parallelism_config=ParallelismConfig(**parallel) if parallel else None,
    )
    return SimpleNamespace(
        is_fsdp_enabled=fsdp_version is not None, is_deepspeed_enabled=False, accelerator=accelerator, model=None
    )


def test_the_older_fsdp_is_refused():
    engines.check_engine(trainer_with())
    engines.check_engine(trainer_with(fsdp_version=2))
    with pytest.raises(UserError, match="Set fsdp_version: 2, as fsdp2.yaml does"):
        engines.check_engine(trainer_with(fsdp_version=1))


@pytest.mark.parametrize("size", ["cp_size", "tp_size", "sp_size"])
def test_parts_of_a_sequence_or_a_layer_are_refused(size):
    with pytest.raises(UserError, match="the stages' losses need whole sequences in each process. Remove it"):
        engines.check_engine(trainer_with(fsdp_version=2, **{size: 2}))
    engines.check_engine(trainer_with(fsdp_version=2, dp_shard_size=2))


@pytest.mark.parametrize(
    ("settings", "idle"),
    [
        ({"split_batches": True, "even_batches": False}, "split_batches, even_batches"),
        ({"dispatch_batches": False}, "dispatch_batches"),
        ({"non_blocking": True, "gradient_accumulation_kwargs": {"sync_each_batch": True}}, "non_blocking"),
        ({"gradient_accumulation_kwargs": {"num_steps": 2}}, "gradient_accumulation_kwargs.num_steps"),
        ({"gradient_accumulation_kwargs": {"sync_each_batch": True}}, None),
    ],
)
def test_settings_of_accelerate_without_effect_are_refused(tmp_path, settings, idle):
    training = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, accelerator_config=settings)
    engines.check_accelerator_config(training)
    training.given = {"accelerator_config"}
    if idle is None:
        engines.check_accelerator_config(training)
    else:
        with pytest.raises(UserError, match=f"^--accelerator_config: {idle} would have no effect"):
            engines.check_accelerator_config(training)


def test_gradients_are_synchronized_in_each_batch_on_request(tmp_path):
    save_model(tmp_path / "model", tiny_tokenizer())
    write_jsonl(tmp_path / "data/rows.jsonl", [{"prompt": f"Q{n}?", "response": "Rest."} for n in range(4)])
    flags = ("--model_name_or_path", tmp_path / "model", "--train_file_dir", tmp_path / "data", "--sample_prompts", 0)
    flags += ("--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 3, "--max_steps", 1)
    settings = '{"gradient_accumulation_kwargs": {"sync_each_batch": true}}'
    for more, batches_without in (((), 2), (("--accelerator_config", settings), 0)):
        opened = open_stage(
            "supervised_finetuning.py", *flags, *more, "--output_dir", tmp_path / f"without-{batches_without}"
        )
        accelerator = opened.trainer.accelerator
        with patch.object(accelerator, "no_sync", side_effect=accelerator.no_sync) as no_sync:
            opened.finish()
        assert no_sync.call_count == batches_without
    with pytest.raises(UserError, match="--accelerator_config: split_batches would have no effect"):
        open_stage(
            "supervised_finetuning.py",
            *flags,
            *("--accelerator_config", '{"split_batches": true}', "--output_dir", tmp_path / "refused"),
        )


def test_another_division_of_the_work_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        run_here("pretraining.py", "--parallelism_config", '{"cp_size": 2}')
    assert end.value.code == 2
    assert "--parallelism_config has no effect in this program. No stage splits sequences" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"])
def test_every_value_of_the_files_has_its_reason_in_the_docs(name):
    settings = read_json(ROOT / f"{name}.json")
    keys = {"bf16", "fp16", *settings["zero_optimization"], "pin_memory"}
    for page in ("distributed.md", "distributed_zh.md"):
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        assert not [key for key in keys if f"`{key}" not in text and f", {key}" not in text], page
        assert f"{name}.json" in text
    assert settings["zero_optimization"]["stage"] == int(name[4])


def test_every_value_of_fsdp2_has_its_reason_above_it():
    lines = (ROOT / "fsdp2.yaml").read_text(encoding="utf-8").splitlines()
    inside = lines[lines.index("fsdp_config:") + 2 :]
    values = [number for number, line in enumerate(inside) if not line.strip().startswith("#")]
    assert len(values) == 6 and all(inside[number - 1].strip().startswith("#") for number in values)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.__name__)
def test_the_numbers_of_the_page_are_those_of_its_formulae(table):
    for page in ("distributed.md", "distributed_zh.md"):
        assert table() in (ROOT / "docs" / page).read_text(encoding="utf-8")
