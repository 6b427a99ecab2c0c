"""Faults of the disk for benchmarks/crash.py: a process waits where a save begins, and is forked for each fault."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import crash_runs
from benchmarks.crash_runs import JOURNAL, OUT, Case

# The step whose save is tried; None is the final one, of the result.
SAVES = {"first": 1, "rotating": 4, "final": None}
CALLS = (
    *("write", "pwrite64", "writev", "openat", "open", "creat", "ftruncate", "fallocate"),
    *("fsync", "fdatasync", "sync_file_range", "copy_file_range", "sendfile"),
    *("rename", "renameat", "renameat2", "link", "linkat", "symlink", "symlinkat"),
    *("mkdir", "mkdirat", "unlink", "unlinkat", "rmdir"),
)
KINDS = {"KILL": "signal=KILL", "ENOSPC": "error=ENOSPC", "EIO": "error=EIO"}
# Audit events of Python that come before a change of the disk; writes of C++ and Rust are seen by strace alone.
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate")
SECONDS_TO_SAVE = 60


def on_change(changed: Callable[[], object]) -> None:
    """Call `changed` just before this process opens a file for writing, renames or removes one, or makes a folder."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)
            if not writes or str(path) in (JOURNAL, "changes") or str(path).startswith(("/dev/", "rows.")):
                return
        elif event not in CHANGES:
            return
        changed()

    sys.addaudithook(hook)


@dataclass(frozen=True)
class Fault:
    """The nth call of one kind, which a process is killed at, or which fails."""

    kind: str
    call: str
    number: int
    path: str

    def __str__(self) -> str:
        return f"{self.kind} at {self.call} number {self.number} ({self.path})"


@dataclass(frozen=True)
class Outcome:
    """How a save with a fault ended."""

    injected: bool
    end: str


class Template:
    """A run that is stopped where a save begins. Each `inject` forks it and lets the fork go on, with a fault.

    The output folder is relative, so that each fork saves to its own copy.

    Args:
        step: whose save it is; None for the final one.
    """

    def __init__(self, case: Case, flags: Sequence[str], folder: Path, step: int | None):
        self.folder = folder
        self._requests, requests = os.pipe()
        replies, self._replies = os.pipe()

        def stop_at_save() -> None:
            # Of this pipe the run must not keep open the end from which it reads that there are no more requests.
            os.close(requests)
            os.close(replies)
            _stop_at_save(self._requests, self._replies, step)

        self._job = crash_runs.start(case, folder, flags, stop_at_save)
        os.close(self._requests)
        os.close(self._replies)
        self._to, self._from = os.fdopen(requests, "w", buffering=1), os.fdopen(replies)
        if not self._from.readline():
            self._job.kill()
            sys.exit(f"{case} did not come to its save:\n{crash_runs.tail_of_logs(folder)}")
        self.committed = crash_runs.journal(folder)
        self._complete: dict[str, bytes] = {}

    def __enter__(self) -> "Template":
        return self

    def __exit__(self, *error: Any) -> None:
        self._to.close()
        self._from.close()
        self._job.wait()
        shutil.rmtree(self.folder)

    def faults(self) -> list[Fault]:
        """Every fault: each call of a save without one, that concerns a file of the run, with each kind."""
        folder = self.folder.with_name(f"{self.folder.name}-traced")
        log = self._save(folder, ["-y"])[1]
        self._complete = _contents(folder)
        shutil.rmtree(folder)
        numbers: dict[str, int] = {}
        found = []
        for line in log.splitlines():
            if not (match := re.match(r"(?:\d+ +)?(\w+)\((.*)", line)):
                continue
            call, arguments = match.groups()
            numbers[call] = numbers.get(call, 0) + 1
            opens = call in ("open", "openat") and not re.search(r"O_(WRONLY|RDWR|CREAT)", arguments)
            path = next((path for path in re.findall(r'[<"]([^>"]*)[>"]', arguments) if _is_of_run(path, folder)), None)
            if path and not opens:
                found += [Fault(kind, call, numbers[call], path.removeprefix(f"{folder}/")) for kind in KINDS]
        return found

    def inject(self, fault: Fault, folder: Path) -> Outcome:
        """Save in a copy of the folder of the run, with this fault."""
        status, log = self._save(folder, ["-e", f"inject={fault.call}:{KINDS[fault.kind]}:when={fault.number}"])
        printed = crash_runs.tail_of_logs(folder)
        if status == -signal.SIGKILL:
            end = "killed"
        elif status == 0:
            end = "success"
        else:
            end = "an error with a traceback" if "Traceback (most" in printed else "an error with a message"
        return Outcome("INJECTED" in log or status == -signal.SIGKILL, end)

    def state_of(self, folder: Path) -> tuple[tuple[str, str], ...]:
        """Names of the files of a run after a fault, and whether each is as after a save without one."""
        found = _contents(folder)
        kinds = {}
        for name, content in found.items():
            if content == self._complete.get(name):
                kinds[name] = "complete"
            elif not content:
                kinds[name] = "empty"
            elif name.endswith((".json", ".jsonl")) and _is_json(content):
                kinds[name] = "other JSON"
            else:
                kinds[name] = "torn"
        return tuple(sorted(kinds.items()))

    def _save(self, folder: Path, options: list[str]) -> tuple[int, str]:
        """Fork, and save under strace; returns the exit code, and what strace has written."""
        crash_runs.copy_run(self.folder, folder)
        for path in folder.glob("log*"):
            path.unlink()
        self._to.write(f"{folder}\n")
        pid = int(self._from.readline())
        log = folder / "strace"
        calls = ",".join(f"?{call}" for call in CALLS)
        tracer = subprocess.Popen(
            ["strace", "-f", "-qq", "-o", log, "-p", str(pid), "-e", f"trace={calls}", *options],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        while "TracerPid:\t0" in Path(f"/proc/{pid}/status").read_text():
            if tracer.poll() is not None:
                sys.exit(f"strace cannot be used here: {tracer.stderr.read()}")
            time.sleep(0.001)
        # Between seizing a process and stopping it, strace sees nothing.
        time.sleep(0.01)
        self._to.write("save\n")
        status = int(self._from.readline())
        tracer.wait()
        written = log.read_text(errors="replace")
        log.unlink()
        return status, written


def _is_of_run(path: str, folder: Path) -> bool:
    inside = path.removeprefix(f"{folder}/")
    return inside == OUT or inside.startswith(f"{OUT}/")


def _contents(folder: Path) -> dict[str, bytes]:
    """Files of the output folder; parts of a name that are drawn at random are left out."""
    return {
        re.sub(r"\.[0-9a-f]{8}\.", ".*.", str(path.relative_to(folder))): path.read_bytes() if path.is_file() else b""
        for path in sorted((folder / OUT).rglob("*"))
    }


def _is_json(content: bytes) -> bool:
    try:
        for line in content.decode().splitlines() if content.count(b"\n{") else [content.decode()]:
            json.loads(line)
    except ValueError:
        return False
    return True


def _stop_at_save(requests: int, replies: int, step: int | None) -> None:
    """Have this process wait where a save begins, and fork for each folder that is requested."""
    from transformers import Trainer

    name = "_save_checkpoint" if step else "save_state"
    save, training_step = getattr(Trainer, name), Trainer.training_step
    saving = False

    def stop(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal saving
        if not saving and step in (None, self.state.global_step):
            saving = True
            _serve(requests, replies)
        return save(self, *args, **kwargs)

    def leave(self: Any, *args: Any, **kwargs: Any) -> Any:
        # The save, with all that belongs to it, is over.
        if saving:
            os._exit(0)
        return training_step(self, *args, **kwargs)

    setattr(Trainer, name, stop)
    Trainer.training_step = leave


def _serve(requests: int, replies: int) -> None:
    """Fork for each folder that is requested, and report the exit code; returns in the forks."""
    # Unbuffered: a fork must not inherit lines that are not its own.
    os.write(replies, b"ready\n")
    # Python seeds it again in a fork; the random state is part of a checkpoint.
    state = random.getstate()
    while folder := _read_line(requests):
        if not (pid := os.fork()):
            random.setstate(state)
            os.chdir(folder)
            target = os.open("log.0", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            os.dup2(target, 1)
            os.dup2(target, 2)
            # Written by the fork, so that none of its calls above is traced or fails.
            os.write(replies, f"{os.getpid()}\n".encode())
            _read_line(requests)
            return
        limit = time.monotonic() + SECONDS_TO_SAVE
        while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
            if time.monotonic() > limit:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.002)
        os.write(replies, f"{os.waitstatus_to_exitcode(ended[1])}\n".encode())
    os._exit(0)


def _read_line(descriptor: int) -> str:
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(descriptor, 1)):
        line += byte
    return line.decode().strip()
