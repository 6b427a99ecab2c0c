"""Start programs from a process that has imported the libraries: their imports take longer than most programs.

A program started here is a process of its own with its own arguments, environment, output and exit code; only the
libraries were imported before. `tests/test_fork_server.py` compares it with one that was started by itself.
"""

import atexit
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn
from unittest.mock import patch

SECONDS_TO_END = 30
ROOT = Path(__file__).resolve().parent.parent
# medicalgpt comes first, as in the programs; it says why.
IMPORTS = [
    *("medicalgpt", "torch", "torch._dynamo", "transformers", "transformers.trainer", "peft", "accelerate"),
    *("datasets", "bitsandbytes", "trl.trainer.base_config", "trl.trainer.grpo_trainer"),
    *("fastapi", "uvicorn", "gradio", "sklearn.feature_extraction.text"),
]
FOR_ALL = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
# Libraries read these when they are imported: a program that is given others starts by itself.
READ_AT_IMPORT = ("HF_", "TRANSFORMERS_", "OMP_", "MKL_", "CUDA_", "TORCH_", "PYTHON", "DS_", "ACCELERATE_", "LD_")
READ_LATER = {"PYTHONUNBUFFERED", "PYTHONPATH", "TORCH_EXTENSIONS_DIR"}


class ForkedProcess:
    """What `subprocess.Popen` offers, for a program that was started here.

    Attributes:
        args: its command.
        pid: of the program.
    """

    def __init__(self, process: multiprocessing.Process, args: list[str]):
        self.args, self.pid, self._process = args, process.pid, process

    @property
    def returncode(self) -> int | None:
        """The exit code, or None while it runs; negative if a signal ended it."""
        return self._process.exitcode

    @property
    def sentinel(self) -> int:
        """A descriptor that is readable once it has ended."""
        return self._process.sentinel

    def poll(self) -> int | None:
        """`returncode`."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """`returncode`, once there is one.

        Raises:
            subprocess.TimeoutExpired: it still runs after so many seconds.
        """
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL, if it still runs."""
        self.send_signal(signal.SIGKILL)


def can_start(environment: Mapping[str, str]) -> bool:
    """Whether a program with these variables would import the libraries as they are imported here."""
    return _read_at_import(environment) == _read_at_import(_start_server())


def start(
    script: str,
    *args: str,
    environment: Mapping[str, str],
    stdout: str,
    stderr: str,
    stdin: str = os.devnull,
    folder: str | Path = ROOT,
) -> ForkedProcess:
    """Start a program.

    Args:
        script: its path.
        args: its flags.
        environment: all its variables; `can_start` has to allow them.
        stdout: a file for its output.
        stderr: a file for its errors; may be the same.
        stdin: a file for it to read.
        folder: where it is started.
    """
    _start_server()
    process = multiprocessing.get_context("forkserver").Process(
        target=_run, args=(script, args, dict(environment), str(folder), stdin, stdout, stderr)
    )
    # A process without a main module: the child would import it.
    with patch.dict(sys.modules, {"__main__": type(sys)("__main__")}):
        process.start()
    return ForkedProcess(process, [sys.executable, script, *args])


def run(
    command: Sequence[str],
    environment: Mapping[str, str],
    timeout: float,
    processes: int = 1,
    stdin: str = "",
    folder: str | Path = ROOT,
) -> subprocess.CompletedProcess:
    """Run a program to its end, as `subprocess.run`, or several that work together, as torchrun starts them.

    They read the text `stdin`.

    If one of several fails, the others are ended, and the exit code is that of the first one that failed.

    Raises:
        subprocess.TimeoutExpired: it still runs after so many seconds. It is ended then.
    """
    with ExitStack() as stack:
        files = Path(stack.enter_context(TemporaryDirectory(prefix="medicalgpt-run-")))
        (files / "stdin").write_text(stdin, encoding="utf-8")
        running = []
        for rank, variables in enumerate(_ranks(processes)):
            outputs = {name: str(files / f"{name}.{rank}") for name in ("stdout", "stderr")}
            process = start(
                *command, environment={**environment, **variables}, stdin=str(files / "stdin"), folder=folder, **outputs
            )
            stack.callback(process.kill)
            running.append(process)
        waiting, code, deadline = list(running), 0, time.monotonic() + timeout
        while waiting:
            multiprocessing.connection.wait(
                [process.sentinel for process in waiting], max(0.0, deadline - time.monotonic())
            )
            ended = [process for process in waiting if process.poll() is not None]
            if not ended and not code:
                raise subprocess.TimeoutExpired(command, timeout)
            waiting = [process for process in waiting if process not in ended]
            code = code or next((process.returncode for process in ended if process.returncode), 0)
            if code:
                # The others may end by themselves, and say more.
                for process in waiting:
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(SECONDS_TO_END)
                    process.kill()
                    process.wait()
                waiting = []
        printed = (
            "".join(
                (files / f"{name}.{rank}").read_text(encoding="utf-8", errors="replace") for rank in range(processes)
            )
            for name in ("stdout", "stderr")
        )
        return subprocess.CompletedProcess(command, code, *printed)


def _ranks(processes: int) -> list[dict[str, str]]:
    """What torchrun would add to the variables of each process."""
    if processes == 1:
        return [{}]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    size = str(processes)
    shared = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def _read_at_import(environment: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value for name, value in environment.items() if name.startswith(READ_AT_IMPORT) and name not in READ_LATER
    }


@cache
def environment_of_tests() -> dict[str, str]:
    """The variables when this was called first: before any test, which may set others for a while."""
    return dict(os.environ)


@cache
def _start_server() -> dict[str, str]:
    """Start the process that imports; returns its variables."""
    environment = {**environment_of_tests(), **FOR_ALL}
    multiprocessing.set_forkserver_preload(IMPORTS)
    with patch.dict(os.environ, {**environment, "PYTHONPATH": str(ROOT)}, clear=True):
        multiprocessing.forkserver.ensure_running()
    return environment


def _run(
    script: str, args: tuple[str, ...], environment: dict[str, str], folder: str, stdin: str, stdout: str, stderr: str
) -> NoReturn:
    """Be the program `script`, in a process that was forked for it."""
    missing = [name for name in IMPORTS if name not in sys.modules]
    assert not missing, f"not imported: {missing}"
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:] = [str(Path(script).parent), *filter(None, environment.get("PYTHONPATH", "").split(":")), *sys.path]
    sys.argv = [script, *args]
    output = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for target, name, mode in ((0, stdin, os.O_RDONLY), (1, stdout, output), (2, stderr, output)):
        descriptor = os.open(name, mode, 0o600)
        if descriptor != target:
            os.dup2(descriptor, target)
            os.close(descriptor)
    # The one there was does not read from descriptor 0.
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    if environment.get("PYTHONUNBUFFERED"):
        sys.stdout.reconfigure(write_through=True)
    code: object = 0
    interrupted = False
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except KeyboardInterrupt:
        interrupted = True
        sys.excepthook(*sys.exc_info())
    except BaseException:
        code = 1
        sys.excepthook(*sys.exc_info())
    # As the interpreter does at its end; a process of multiprocessing leaves both out.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if interrupted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code or 0)
