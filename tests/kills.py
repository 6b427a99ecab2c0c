"""Run something in forked processes: one that is killed at a chosen change of the disk, or several that train together.

A fork has what this process has imported, and so starts at once.
"""

import faulthandler
import gc
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

# After so many, it prints where it is, and ends.
SECONDS_TO_END = 120
# What Python reports before it changes the disk (see `sys.addaudithook`); also opening a file for reading.
CHANGES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree", "os.link")


def run_killed(action: Callable[[], object], folder: Path, moment: int | str | None) -> int:
    """Run `action` in another process, which dies before a change below `folder`.

    Args:
        moment: number of the change, from 0, or the beginning of its text (`os.rename checkpoint-2/manifest.json`);
            None lets it run to its end.

    Returns:
        Its exit code; -9 if it was killed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    # What the tests have left is not removed here: whatever waits for its threads would wait for ever.
    gc.freeze()
    faulthandler.dump_traceback_later(SECONDS_TO_END, exit=True)
    count = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal count
        if event in CHANGES and isinstance(args[0], str | os.PathLike) and str(args[0]).startswith(str(folder)):
            text = f"{event} {str(args[0]).removeprefix(str(folder)).lstrip('/')}"
            if count == moment or (isinstance(moment, str) and text.startswith(moment)):
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

    def hooked() -> None:
        if moment is not None:
            sys.addaudithook(hook)
        action()

    _finish(hooked)


def run_together(action: Callable[[], object], folder: Path, processes: int = 2) -> tuple[list[int], list[str]]:
    """Run `action` in several processes of one group, as a launcher would start them.

    Args:
        folder: gets what each prints, as `log.RANK`.

    Returns:
        Their exit codes and what they printed, by rank.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    sys.stdout.flush()
    sys.stderr.flush()
    logs = [folder / f"log.{rank}" for rank in range(processes)]
    pids = []
    for rank, log in enumerate(logs):
        if pid := os.fork():
            pids.append(pid)
            continue
        gc.freeze()
        size = str(processes)
        os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size})
        os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"})
        target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(target, 1)
        os.dup2(target, 2)
        # Those of the parent may be captured by pytest.
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)
        faulthandler.dump_traceback_later(SECONDS_TO_END, exit=True, file=sys.stderr)
        _finish(action)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    return codes, [log.read_text(errors="replace") for log in logs]


def _finish(action: Callable[[], object]) -> NoReturn:
    """Do it, and end this fork with the exit code that a program would have."""
    code = 1
    try:
        action()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
