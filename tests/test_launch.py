"""How the launcher ends its processes: those that can save have the time, those that are stuck are not waited for."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from medicalgpt import launch
from medicalgpt.errors import STOPPED
from tests.helpers import ROOT

import pytest
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError

# The launcher with two seconds in place of thirty.
LAUNCHER = "from medicalgpt import launch; launch.SECONDS_AFTER_FAILURE = 2; launch.launch()"
# What each of two processes does when it is asked to end: takes its time, fails, or never notices.
DRIVER = """
import os, signal, sys, time
from pathlib import Path

rank = int(os.environ["RANK"])

def end(number, frame):
    match sys.argv[1 + rank]:
        case "saves":
            time.sleep(4)
            os._exit(75)
        case "fails":
            os._exit(3)

signal.signal(signal.SIGTERM, end)
Path(sys.argv[3], f"ready-{rank}").touch()
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("first", "second", "code", "seconds"),
    [
        ("saves", "saves", STOPPED, (4, 20)),
        # Others that wait for it are given the two seconds only, of the ten minutes.
        ("never ends", "fails", 137, (2, 20)),
        ("saves", "fails", 137, (2, 20)),
    ],
)
def test_processes_are_waited_for_until_one_has_failed(tmp_path, first, second, code, seconds):
    (tmp_path / "driver.py").write_text(DRIVER)
    words = ["--standalone", "--nproc_per_node", "2", str(tmp_path / "driver.py"), first, second, str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", LAUNCHER, *words], env=env, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == code, said
    assert seconds[0] <= time.monotonic() - began < seconds[1]


def test_lost_hosts_are_not_waited_for_either(monkeypatch):
    agent = launch.Agent.__new__(launch.Agent)
    for error, seconds in ((RendezvousConnectionError("gone"), 30), (SignalException("", signal.SIGTERM), 600)):

        def fail(*args, error=error):
            raise error

        agent._shutdown_timeout = 600
        monkeypatch.setattr(launch.LocalElasticAgent, "_invoke_run", fail)
        with pytest.raises(type(error)):
            agent._invoke_run()
        assert agent._shutdown_timeout == seconds


def wait_for(*files: Path) -> None:
    limit = time.monotonic() + 120
    while not all(file.exists() for file in files):
        assert time.monotonic() < limit
        time.sleep(0.05)
