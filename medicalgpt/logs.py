"""One log format for all programs: plain lines on stderr, from the first process only.

The variables by which torchrun and accelerate number the processes are read and set here only.
"""

import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from loguru import logger


def rank() -> int:
    """Number of this process among all of the run, from 0."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes the run has."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Number of this process among those of its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size(default: int) -> int:
    """How many processes of the run this machine has; `default` if the launcher does not set it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", default))


# By which torchrun tells a process its number, and where to meet the others.
TORCHRUN_VARIABLES = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def number_single_process() -> None:
    """Set the variables that torchrun would, for a process that no launcher has started.

    Without them DeepSpeed looks for MPI, which is rarely installed. Port 0 is any free one: nobody else connects.
    """
    if not {*TORCHRUN_VARIABLES, "OMPI_COMM_WORLD_RANK", "PMI_RANK"} & os.environ.keys():
        os.environ.update(TORCHRUN_VARIABLES)


# By which a launcher tells how many processes there are: torchrun, Open MPI, MPICH and Intel MPI, MVAPICH.
SIZE_VARIABLES = {"WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"}


def is_launch_incomplete() -> bool:
    """Whether `accelerate launch` was to start several processes, and has started this one alone.

    It does so where there are not several GPUs. What it was to start shows only in the address where the processes
    were to meet, which it does not set for a single one.
    """
    started_by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ
    return started_by_accelerate and "MASTER_ADDR" in os.environ and not SIZE_VARIABLES & os.environ.keys()


def is_main_process() -> bool:
    """Whether this is the first process of the run, which logs for all."""
    return rank() == 0


def notice(text: str) -> None:
    """Tell the user, once for all processes, about a flag: that is before the log is set up."""
    if is_main_process():
        print(f"note: {text}", file=sys.stderr)


# What a terminal may obey instead of showing: C0 and C1 control characters, except tabs and line ends.
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """A text that was not written here, a file's name or an answer, with control characters as `\\x1b`."""
    return CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def setup_logging() -> None:
    """Send the log to stderr, and show libraries' progress bars only on a terminal."""
    logger.remove()
    logger.configure(patcher=lambda record: record.update(message=printable(record["message"])))
    if is_main_process():
        on_terminal = sys.stderr.isatty()
        sink = _above_progress_bars if on_terminal else sys.stderr
        logger.add(sink, format="<level>{level: <7}</level> {message}", level="INFO", colorize=on_terminal)
    if not is_main_process() or not sys.stderr.isatty():
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        # The container of the servers does not have it.
        with suppress(ImportError):
            import datasets

            datasets.disable_progress_bars()


def _above_progress_bars(text: str) -> None:
    """Write to the terminal while bars are shown: they are taken away before, and drawn again below the text."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr, end="")


HEARTBEAT_SECONDS = 30


@contextmanager
def heartbeat(
    text: Callable[[], str], *, seconds: float | None = None, write: Callable[[str], object] = logger.info
) -> Iterator[None]:
    """Write `text()` again and again for as long as the block runs, so that a long step shows that it is alive.

    Args:
        seconds: from one line to the next; by default `HEARTBEAT_SECONDS`.
        write: where the lines go.
    """
    done = threading.Event()

    def beat() -> None:
        while not done.wait(HEARTBEAT_SECONDS if seconds is None else seconds):
            write(text())

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@dataclass
class Progress:
    """How far a long step has come; as text, with an estimate of the time that is left."""

    label: str
    total: int
    done: int = 0
    started: float = field(default_factory=time.monotonic)

    def add(self, count: int) -> None:
        self.done += count

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return time.monotonic() - self.started

    def __str__(self) -> str:
        left = f", about {self.seconds / self.done * (self.total - self.done):.0f} s left" if self.done else ""
        return f"{self.label}: {self.done}/{self.total} after {self.seconds:.0f} s{left}"


@contextmanager
def progress(label: str, total: int, **options: Any) -> Iterator[Progress]:
    """A `heartbeat` that writes how far the block has come. `options` are those of `heartbeat`."""
    step = Progress(label, total)
    with heartbeat(lambda: str(step), **options):
        yield step
