"""When memory runs out: the message names what helps this run, cheapest first, and each of it can be given."""

import errno
import re

from medicalgpt import errors
from medicalgpt.training.memory import find_remedies, plan_memory
from tests.helpers import ROOT, open_stage, run_here, run_program, save_model, write_jsonl
from tests.silent.pairs import pairs
from tests.silent.ppo import make_place, ppo_flags
from tests.silent.tasks import task_flags, tasks
from tests.tiny import tiny_tokenizer

import pytest
import torch

SFT = "supervised_finetuning.py"
STAGES = (SFT,)
OTHERS = ("grpo_training.py", "pretraining.py", "dpo_training.py", "ppo_training.py")
ERRORS = {
    "GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    "CPU": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: can't allocate memory: you ..."
    ),
    "Python": MemoryError(),
    "system": OSError(errno.ENOMEM, "Cannot allocate memory"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    save_model(folder / "model", tiny_tokenizer())
    write_jsonl(folder / SFT / "data" / "rows.jsonl", [{"prompt": f"{n}?", "response": "y" * 90} for n in range(8)])
    write_jsonl(folder / "pretraining.py" / "data" / "rows.jsonl", [{"text": f"{n}." + "!" * 90} for n in range(8)])
    write_jsonl(folder / "dpo_training.py" / "data" / "rows.jsonl", pairs(8))
    write_jsonl(folder / "grpo_training.py" / "data" / "rows.jsonl", tasks(8))
    (folder / "ppo_training.py").mkdir()
    make_place(folder / "ppo_training.py")
    return folder


def flags(place, stage, output, *more):
    common = ["--max_steps", 2, "--save_strategy", "no", "--overwrite_output_dir", "True", *more]
    if stage == "ppo_training.py":
        return ppo_flags(place / stage, output, *common)
    if stage == "grpo_training.py":
        return [*task_flags(place / "model", place / stage), "--output_dir", output, *common]
    paths = ("--model_name_or_path", place / "model", "--train_file_dir", place / stage / "data")
    rest = ("--per_device_train_batch_size", 4, "--sample_prompts", 0, "--dataloader_pin_memory", "False")
    return [*paths, "--output_dir", output, *rest, *common]


def run_out(opened, error=None):
    """Let the memory run out in the second step, and return what the program says."""
    training_step = opened.trainer.training_step

    def failing(*args, **kwargs):
        if opened.trainer.state.global_step == 1:
            raise error or ERRORS["CPU"]
        return training_step(*args, **kwargs)

    opened.trainer.training_step = failing
    with pytest.raises(SystemExit) as end:
        errors.run_main(opened.finish)
    assert end.value.code == 1


def proposed(message):
    """The flags of each change, as arguments."""
    return [
        line.split()
        for line in re.findall(r"^  \d\. (--.+?)  \(about [\d.]+ [kMG]B less; .+\)$", message, re.MULTILINE)
    ]


@pytest.mark.parametrize("kind", ERRORS)
def test_every_library_says_it_in_its_own_words(place, tmp_path, capsys, kind):
    run_out(open_stage(SFT, *flags(place, SFT, tmp_path / "out")), ERRORS[kind])
    message = capsys.readouterr().err.rpartition("error: ")[2]
    assert message.startswith("out of memory in step 2: ") and len(message.splitlines()) == 4
    assert len(proposed(message)) == 3 and "Traceback" not in message


@pytest.mark.parametrize("more", [[], ["--qlora", "True"]], ids=["plain", "qlora"])
def test_while_the_model_is_loaded(place, tmp_path, capsys, monkeypatch, more):
    """What would make the weights smaller is named, unless it is on."""

    def load(*args, **kwargs):
        raise ERRORS["GPU"]

    monkeypatch.setattr("medicalgpt.models.loading.load_trainable", load)
    with pytest.raises(SystemExit):
        errors.run_main(lambda: run_here(SFT, *flags(place, SFT, tmp_path / "out", *more)))
    message = capsys.readouterr().err.rpartition("error: ")[2]
    assert message.startswith("out of memory before training began: ") and "--deepspeed zero3.json" in message
    assert all((flag in message) is (not more) for flag in ("--qlora True", "--dtype bfloat16"))


@pytest.mark.parametrize("stage", [*STAGES, *(pytest.param(one, marks=pytest.mark.slow) for one in OTHERS)])
def test_each_change_can_be_made_and_is_not_proposed_again(place, tmp_path, capsys, stage):
    opened = open_stage(stage, *flags(place, stage, tmp_path / "out"))
    run_out(opened)
    message = capsys.readouterr().err.rpartition("error: ")[2]
    changes = proposed(message)
    assert len(changes) == 3, message
    before = opened.trainer.args
    for change in changes:
        again = open_stage(stage, *flags(place, stage, tmp_path / "again", *change))
        args = again.trainer.args
        for batch in (before, args):
            batch.rows = batch.per_device_train_batch_size * batch.gradient_accumulation_steps
        assert args.rows == before.rows
        run_out(again)
        assert change not in proposed(capsys.readouterr().err.rpartition("error: ")[2])
    # The first one trains.
    open_stage(stage, *flags(place, stage, tmp_path / "last", *changes[0])).finish()


ON = {
    "--per_device_train_batch_size": ("--per_device_train_batch_size", 1),
    "--gradient_checkpointing": ("--gradient_checkpointing", "True"),
    "--optim": ("--optim", "adafactor"),
    "--qlora": ("--qlora", "True"),
}


def remedies(opened, adapter, processes=1):
    trainer, config = opened.trainer, opened.run.checkpoint.config
    plan = plan_memory(trainer.args, trainer.model, config, length=200, sequences=1, adapter=adapter)
    object.__setattr__(plan, "processes", processes)
    return {remedy.flags: remedy for remedy in find_remedies(plan, length_flag="model_max_length")}


def test_what_is_on_is_not_proposed(place, tmp_path):
    full = remedies(open_stage(SFT, *flags(place, SFT, tmp_path / "full", "--use_peft", "False")), False, processes=4)
    names = [flags.split()[0] for flags in full]
    expected = ["--per_device_train_batch_size", "--gradient_checkpointing", "--optim", "--deepspeed"]
    assert names == [*expected, "--use_peft", "--use_peft", "--model_max_length"]
    for name, more in ON.items():
        found = remedies(open_stage(SFT, *flags(place, SFT, tmp_path / name, *more)), True)
        assert not any(name in flags for flags in found), found
    assert not any("--use_peft" in flags or "zero" in flags for flags in found)


def test_the_savings_are_those_of_the_numbers(place, tmp_path):
    """Full fine-tuning: gradients and two states of AdamW, four bytes each, are what an adapter saves."""
    opened = open_stage(SFT, *flags(place, SFT, tmp_path / "out", "--use_peft", "False"))
    count = sum(weight.numel() for weight in opened.trainer.model.parameters())
    found = remedies(opened, False)
    assert found["--use_peft True"].saves == 12 * count
    assert found["--optim adamw_8bit"].saves == 6 * count
    half = found["--per_device_train_batch_size 2 --gradient_accumulation_steps 2"]
    layers, hidden, inner, head = 2, 32, 64, 8
    per_token = 4 * (4 * hidden + 2 * 4 * head + 2 * 2 * head + 4 * inner)
    assert half.saves == 2 * 200 * layers * per_token
    kept = 4 * 200 * (per_token + layers * 4 * hidden)
    assert found["--gradient_checkpointing True"].saves == 4 * 200 * layers * per_token - kept


# Runs a stage with little more memory than it has when training begins.
DRIVER = """
import resource, sys
from medicalgpt.errors import run_main
from tests.helpers import open_stage

def main():
    opened = open_stage("supervised_finetuning.py", *sys.argv[2:])
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    limit = used + int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    opened.finish()

run_main(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_limit_of_the_system(place, tmp_path, processes):
    """A batch that does not fit; with the first change that the message names, it does."""
    (tmp_path / "driver.py").write_text(DRIVER)
    rows = [{"prompt": f"{n}?", "response": "y" * 900} for n in range(128)]
    write_jsonl(tmp_path / SFT / "data" / "rows.jsonl", rows)
    paths = ["--train_file_dir", tmp_path / SFT / "data", "--per_device_train_batch_size", 64, "--max_steps", 1]

    def run(output, *more):
        arguments = (500_000_000, *flags(place, SFT, output), *paths, *more)
        where = {"env": {"PYTHONPATH": str(ROOT)}, "launcher": "medicalgpt.launch"}
        return run_program(tmp_path / "driver.py", *arguments, processes=processes, check=False, **where)

    done = run(tmp_path / "out")
    assert done.returncode == 1, done.stderr
    assert "out of memory in step 1" in done.stderr and "Traceback" not in done.stderr
    changes = proposed(done.stderr)
    assert changes[0] == "--per_device_train_batch_size 32 --gradient_accumulation_steps 2".split()
    for divided in (32, 16, 8, 4):
        flags_of = ["--per_device_train_batch_size", divided, "--gradient_accumulation_steps", 64 // divided]
        if (done := run(tmp_path / str(divided), *flags_of)).returncode == 0:
            break
    assert done.returncode == 0, done.stderr
