"""A real vLLM for tests, started as a user starts it: by scripts/vllm_deployment.sh."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.helpers import ROOT

import pytest

SCRIPT = ROOT / "scripts" / "vllm_deployment.sh"
VENV = Path(os.environ.get("VLLM_VENV", ROOT / ".venv-vllm"))
needs_vllm = pytest.mark.skipif(
    not (VENV / ".installed-vllm").is_file(),
    reason=f"there is no vLLM in {VENV}: scripts/vllm_deployment.sh makes that environment, VLLM_VENV names another",
)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Server:
    """The running script.

    Attributes:
        url: where it listens, without a path.
        output: a file with all that the script has printed.
        log: the log of vLLM.
    """

    def __init__(self, folder: Path, model: str | Path, *flags: str, **variables: str):
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.output, self.log = folder / "output.txt", folder / "vllm.log"
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "MODEL": str(model), "PORT": str(port)}
        environment |= {"PYTHON": sys.executable, "VLLM_VENV": str(VENV), "LOG": str(self.log), **variables}
        with open(self.output, "w") as output:
            self.process = subprocess.Popen(
                ["bash", SCRIPT, *flags], cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
            )

    def wait(self, timeout: float = 300) -> None:
        """Return when the script has said that it serves; fail with what it printed if it ends before."""
        deadline = time.monotonic() + timeout
        while "Ctrl-C stops it." not in self.printed():
            ended = self.process.poll() is not None
            assert not ended and time.monotonic() < deadline, self.printed()
            time.sleep(0.2)

    def printed(self) -> str:
        return self.output.read_text(encoding="utf-8")

    def stop(self) -> int:
        """End the script as Ctrl-C does, and return its exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(timeout=60)


@contextmanager
def serving(folder: Path, model: str | Path, *flags: str, **variables: str) -> Iterator[Server]:
    """A server that answers, stopped at the end."""
    server = Server(folder, model, *flags, **variables)
    try:
        server.wait()
        yield server
    finally:
        server.stop()
