"""A disk that is full, read-only or broken ends a run with a message, and the last complete checkpoint stays."""

import errno
import os
import subprocess
from pathlib import Path

from medicalgpt.errors import UserError
from medicalgpt.training import disk, trainers
from medicalgpt.training.checkpoints import checkpoint_problem, newest_checkpoint
from medicalgpt.training.disk import as_size, require_space, saving
from tests.helpers import open_stage, read_json, write_jsonl
from tests.tiny import make_tiny

import pytest
from safetensors import SafetensorError

SFT = "supervised_finetuning.py"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("disk")
    make_tiny(folder / "model")
    write_jsonl(folder / "data" / "rows.jsonl", [{"prompt": f"Q{n}?", "response": "Rest." * n} for n in range(1, 9)])
    return folder


@pytest.fixture
def mount(tmp_path):
    """Mount a file system of so many bytes in memory; returns its folder."""
    mounted = []

    def mount(size: int) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting is not permitted")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def opened(place: Path, output: Path, *more: object):
    flags = ("--model_name_or_path", place / "model", "--train_file_dir", place / "data", "--output_dir", output)
    flags += ("--max_steps", 4, "--save_steps", 1, "--per_device_train_batch_size", 2, "--sample_prompts", 0)
    return open_stage(SFT, *flags, "--logging_steps", 1, "--resume", "auto", *more)


def require_four_lines(error: pytest.ExceptionInfo) -> str:
    assert len(str(error.value).splitlines()) <= 4
    return str(error.value)


def test_a_checkpoint_for_which_there_is_no_space_is_not_begun(place, mount):
    """It is known before a byte is written; with more space, the command of the message continues."""
    output = mount(1_900_000) / "run"
    with pytest.raises(UserError, match="checkpoint-[2-4] needs about .* MB, and the disk of .* free") as error:
        opened(place, output).finish()
    said = require_four_lines(error)
    last = newest_checkpoint(output)
    assert f"The last complete one is {last.name}; nothing more was written." in said and "--resume auto" in said
    assert all(checkpoint_problem(path) is None for path in output.glob("checkpoint-*"))
    record = read_json(output / "run.json")
    assert record["status"] == "failed" and "needs about" in record["reason"]
    subprocess.run(["mount", "-o", "remount,size=20m", str(output.parent)], check=True)
    opened(place, output).finish()
    assert read_json(output / "run.json")["status"] == "finished"


def test_a_disk_that_fills_up_during_a_save(place, mount, monkeypatch):
    monkeypatch.setattr(trainers, "require_space", lambda *_: None)
    output = mount(700_000) / "run"
    with pytest.raises((UserError, OSError)) as error:
        opened(place, output).finish()
    if isinstance(error.value, UserError):
        assert "was not written: No space left on device" in require_four_lines(error)
    last = newest_checkpoint(output)
    assert last is not None and read_json(output / "run.json")["status"] in ("failed", "running")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (OSError(errno.EACCES, "Permission denied"), "Permission denied"),
        (SafetensorError("Error while serializing: I/O error: No space left (os error 28)"), "No space left on device"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), "Input/output error"),
        (RuntimeError("PytorchStreamWriter failed writing file data/1: file write failed"), "Input/output error"),
    ],
)
def test_errors_of_the_disk_are_told_in_words(tmp_path, error, said):
    with pytest.raises(UserError) as told, saving(tmp_path, "checkpoint-3"):
        raise error
    assert f"checkpoint-3 in {tmp_path} was not written: {said}" in require_four_lines(told)


def test_other_errors_are_left_as_they_are(tmp_path):
    for error in (RuntimeError("the shapes differ"), OSError("no number"), ValueError("x")):
        with pytest.raises(type(error)) as raised, saving(tmp_path, "checkpoint-3"):
            raise error
        assert raised.value is error


def test_the_estimate_is_near_what_is_written(place, tmp_path, monkeypatch):
    """Before the first checkpoint, from weights and optimizer; afterwards it is the size of the last one."""
    estimates = []

    def note(output_dir, needed, name):
        estimates.append(needed - disk.MARGIN_BYTES)

    monkeypatch.setattr(trainers, "require_space", note)
    opened(place, tmp_path / "run", "--use_peft", "False", "--max_steps", 2).finish()
    sizes = [
        sum(path.stat().st_size for path in (tmp_path / "run" / f"checkpoint-{step}").rglob("*") if path.is_file())
        for step in (1, 2)
    ]
    assert 0.8 * sizes[0] < estimates[0] < 1.2 * sizes[0] and estimates[1] == sizes[0]


def test_enough_space_is_not_an_error(tmp_path):
    require_space(tmp_path, 1000, "checkpoint-1")
    with pytest.raises(UserError, match="checkpoint-1 needs about 1,000,000,000.0 GB"):
        require_space(tmp_path, 10**18, "checkpoint-1")
    assert [as_size(count) for count in (1, 2500, 3_400_000)] == ["1 bytes", "2.5 kB", "3.4 MB"]


def test_a_folder_that_cannot_be_written_to_is_refused_at_the_start(place, mount, tmp_path):
    (tmp_path / "file").touch()
    read_only = mount(100_000)
    subprocess.run(["mount", "-o", "remount,ro", str(read_only)], check=True)
    for output in (Path("/proc/x"), read_only, read_only / "run", tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=f"--output_dir {output} cannot be written to: .*Choose another"):
            opened(place, output)
    assert os.listdir(read_only) == []
