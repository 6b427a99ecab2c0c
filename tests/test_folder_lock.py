"""The lock of an output folder: one owner at a time, and what becomes of the lock of a dead one."""

import errno
import fcntl
import json
import os
import signal
import socket
from dataclasses import asdict, replace
from pathlib import Path

from medicalgpt.errors import UserError
from medicalgpt.training import folder_lock
from medicalgpt.training.folder_lock import LOCK_FILE, FolderLock, Owner, process_start

import pytest
from loguru import logger


@pytest.fixture
def log():
    lines: list[str] = []
    sink = logger.add(lambda message: lines.append(message.record["message"]), level="INFO")
    yield lines
    logger.remove(sink)


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path/run until it is killed; its number."""
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        FolderLock(tmp_path / "run").acquire()
        os.write(writing, b"held")
        signal.pause()
    os.read(reading, 4)
    yield process
    end(process)


def end(process: int) -> None:
    try:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


@pytest.fixture
def no_kernel_locks(monkeypatch):
    """A file system without locks, as some network and user-space ones are."""

    def refuse(*_):
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    monkeypatch.setattr(folder_lock, "SECONDS_TO_SETTLE", 0)


def write_owner(folder: Path, **changes) -> Owner:
    owner = replace(Owner(), **changes)
    folder.mkdir(exist_ok=True)
    (folder / LOCK_FILE).write_text(json.dumps(asdict(owner)))
    return owner


@pytest.mark.parametrize("locks", [True, False])
def test_a_second_process_is_refused_and_told_who_is_first(tmp_path, request, holder, locks):
    if not locks:
        request.getfixturevalue("no_kernel_locks")
    with pytest.raises(UserError) as error:
        FolderLock(tmp_path / "run").acquire()
    assert f"{tmp_path / 'run'} is in use by process {holder} on {socket.gethostname()}, since 2" in str(error.value)
    assert "Wait for it, stop it, or choose another --output_dir." in str(error.value)
    assert len(str(error.value).splitlines()) <= 4
    end(holder)


@pytest.mark.parametrize("locks", [True, False])
def test_the_lock_of_a_dead_process_is_taken_over(tmp_path, request, holder, locks, log):
    if not locks:
        request.getfixturevalue("no_kernel_locks")
    end(holder)
    lock = FolderLock(tmp_path / "run")
    lock.acquire()
    assert (
        log == [line for line in log if f"process {holder} on" in line and "ended without leaving" in line]
        and len(log) == 1
    )
    assert json.loads((tmp_path / "run" / LOCK_FILE).read_text())["pid"] == os.getpid()
    lock.release()
    assert not (tmp_path / "run" / LOCK_FILE).exists()


def test_a_number_that_is_used_again_is_another_process(tmp_path, no_kernel_locks):
    write_owner(tmp_path / "run", pid=os.getppid(), process_start="1")
    FolderLock(tmp_path / "run").acquire()


def test_a_living_process_is_recognised_without_locks(tmp_path, no_kernel_locks):
    write_owner(tmp_path / "run", pid=os.getppid(), process_start=process_start(os.getppid()))
    with pytest.raises(UserError, match=f"in use by process {os.getppid()}"):
        FolderLock(tmp_path / "run").acquire()


def test_the_last_of_two_that_write_at_once_has_it(tmp_path, no_kernel_locks, monkeypatch):
    monkeypatch.setattr(folder_lock.time, "sleep", lambda _: write_owner(tmp_path / "run", pid=os.getppid()))
    with pytest.raises(UserError, match=f"in use by process {os.getppid()}"):
        FolderLock(tmp_path / "run").acquire()


def test_another_machine_is_refused_with_the_way_out(tmp_path):
    """The printed command is applied."""
    owner = write_owner(tmp_path / "run", host="node7", boot="other", pid=12, attempts={})
    with pytest.raises(UserError) as error:
        FolderLock(tmp_path / "run").acquire()
    assert f"{tmp_path / 'run'} was last written by {owner}" in str(error.value)
    assert len(str(error.value).splitlines()) <= 4
    (remedy,) = (line for line in str(error.value).splitlines() if "rm " in line)
    assert os.system(remedy[remedy.index("rm ") :]) == 0
    FolderLock(tmp_path / "run").acquire()


@pytest.mark.parametrize(
    ("before", "now", "taken"),
    [
        ({"SLURM_JOB_ID=7": 0}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, True),
        ({"SLURM_JOB_ID=7": 1}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, False),
        ({"SLURM_JOB_ID=7": 0}, {"SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "1"}, False),
        ({"TORCHELASTIC_RUN_ID=a": 0}, {"TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_RESTART_COUNT": "2"}, True),
        # The name of every job of torchrun that has not been given one.
        ({}, {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "2"}, False),
    ],
)
def test_a_job_that_is_requeued_takes_over_on_any_machine(tmp_path, monkeypatch, before, now, taken):
    """Of attempts of one job, the earlier has ended when the later is started."""
    write_owner(tmp_path / "run", host="node7", boot="other", pid=12, attempts=before)
    for name, value in now.items():
        monkeypatch.setenv(name, value)
    if taken:
        FolderLock(tmp_path / "run").acquire()
    else:
        with pytest.raises(UserError, match="was last written by"):
            FolderLock(tmp_path / "run").acquire()


@pytest.mark.parametrize("text", ["", "null", "[]", '{"pid": 1}', "\udcff", '{"host": 1'])
def test_a_torn_lock_is_taken(tmp_path, text):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK_FILE).write_text(text, errors="surrogateescape")
    with FolderLock(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / LOCK_FILE).read_text())["pid"] == os.getpid()


def test_a_folder_made_for_the_lock_alone_is_removed_with_it(tmp_path):
    with FolderLock(tmp_path / "a" / "run"):
        assert (tmp_path / "a" / "run").is_dir()
    assert list(tmp_path.iterdir()) == []
    with FolderLock(tmp_path / "a" / "run"):
        (tmp_path / "a" / "run" / "notes.txt").touch()
    assert [path.name for path in (tmp_path / "a" / "run").iterdir()] == ["notes.txt"]


def test_only_the_holder_releases(tmp_path):
    """A process forked from it ends without taking the lock away."""
    with FolderLock(tmp_path / "run") as lock:
        process = os.fork()
        if not process:
            lock.release()
            os._exit(0)
        os.waitpid(process, 0)
        assert (tmp_path / "run" / LOCK_FILE).exists()
