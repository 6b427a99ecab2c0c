"""Programs that serve: started as a user would, on a free port, and always ended."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import fork_server
from tests.helpers import ROOT

ADDRESS = re.compile(r"http://(?:127\.0\.0\.1|localhost|0\.0\.0\.0|\[::1\]):(\d+)")


@dataclass
class Server:
    """A running program.

    Attributes:
        url: where it listens, without a slash at the end.
        process: the program itself.
    """

    url: str
    process: fork_server.ForkedProcess | subprocess.Popen
    _log: Path

    def log(self) -> str:
        """All that it has printed so far, stdout and stderr together."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def stop(self, signal_number: int = signal.SIGTERM, timeout: float = 30) -> int:
        """Ask it to end as a person or a service manager would; returns its exit code."""
        self.process.send_signal(signal_number)
        return self.process.wait(timeout)


@contextmanager
def running_server(
    script: str,
    *args: Any,
    env: Mapping[str, str] | None = None,
    health: str = "/health",
    port_flag: str = "--port",
    timeout: float = 120,
) -> Iterator[Server]:
    """Start a program of the repository root offline on a free port, wait until it answers, and end it afterwards.

    Args:
        script: its file name, relative to the root.
        args: flags; anything that is not a string is turned into one.
        env: variables on top of the present ones.
        health: a path that is answered as soon as the program serves; a refusal (401, say) is an answer too.
        port_flag: the flag that is given 0. The program prints the address with the port that it has got.
        timeout: seconds until it must answer.
    """
    descriptor, name = tempfile.mkstemp(prefix="medicalgpt-server-", suffix=".log")
    os.close(descriptor)
    environment = {**os.environ, **fork_server.FOR_ALL, "PYTHONUNBUFFERED": "1", **(env or {})}
    command = [str(ROOT / script), *map(str, args), port_flag, "0"]
    if fork_server.can_start(environment):
        process = fork_server.start(*command, environment=environment, stdout=name, stderr=name)
    else:
        with open(name, "wb") as output:
            process = subprocess.Popen(
                [sys.executable, *command],
                **{"cwd": ROOT, "env": environment, "stdin": subprocess.DEVNULL, "stdout": output, "stderr": output},
            )
    server = Server("", process, Path(name))
    try:
        server.url = _wait_until_it_answers(server, health, time.monotonic() + timeout)
        yield server
    finally:
        process.kill()
        process.wait()
        os.unlink(name)


def _wait_until_it_answers(server: Server, health: str, deadline: float) -> str:
    while time.monotonic() < deadline and server.process.poll() is None:
        # Only whole lines: the last digits of a port may not be there yet.
        found = ADDRESS.search(server.log().rpartition("\n")[0])
        if found:
            url = f"http://127.0.0.1:{found[1]}"
            try:
                urllib.request.urlopen(url + health, timeout=5).close()
                return url
            except urllib.error.HTTPError as refusal:
                refusal.close()
                if refusal.code < 500:
                    return url
            except OSError:
                pass
        time.sleep(0.1)
    raise AssertionError(f"the server did not answer on {health}:\n{server.log()}")
