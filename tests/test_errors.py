"""How errors end a program: under torchrun once, whichever process meets them."""

import os
import socket
import subprocess
import sys
import time

from medicalgpt import errors
from tests.helpers import ROOT, run_program

import pytest
import torch


@pytest.mark.parametrize(
    ("launcher", "tracebacks"),
    [pytest.param("torch.distributed.run", 1, marks=pytest.mark.slow), ("medicalgpt.launch", 0)],
)
def test_torchrun_shows_a_user_error_once(tmp_path, launcher, tracebacks):
    done = run_program(
        "supervised_finetuning.py",
        *("--model_name_or_path", tmp_path / "nowhere", "--train_file_dir", tmp_path),
        processes=2,
        check=False,
        launcher=launcher,
    )
    assert done.returncode == 1
    assert done.stderr.count("error: no checkpoint folder") == done.stderr.count("no checkpoint folder") == 1
    # torchrun has its own traceback, which no process of the run can prevent; there is none of ours.
    assert done.stderr.count("Traceback") == tracebacks
    assert ("ChildFailedError:" in done.stderr) == bool(tracebacks)


# What one process of two does while the other waits for it in a collective operation.
DRIVER = """
import os, signal, sys, time
from medicalgpt import errors
from medicalgpt.logs import rank
import torch.distributed

def main():
    torch.distributed.init_process_group("gloo")
    torch.distributed.barrier()
    if rank() == (sys.argv[1] != "first"):
        match sys.argv[1]:
            case "first":
                raise errors.UserError("process 0 alone sees this. Fix it.")
            case "row":
                raise errors.UserError("rows.jsonl:7 cannot be used. Fix it.")
            case "disk":
                open("/nowhere/at/all", "w")
            case "bug":
                raise LookupError("a bug")
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "all":
                pass
    torch.distributed.barrier()
    time.sleep(rank() / 10)
    raise errors.UserError("this is met by all. Fix it.")

errors.SECONDS_TO_SPEAK = 3
errors.run_main(main)
"""
REPORTS = {
    "row": (1, "error in process 1: rows.jsonl:7 cannot be used. Fix it."),
    "disk": (1, "error in process 1: No such file or directory: /nowhere/at/all. Check the path."),
    "bug": (1, "LookupError: a bug"),
    "killed": (137, "error: process 1 was killed by SIGKILL; if nobody did that, memory ran out (see dmesg)"),
    "first": (1, "error: process 0 alone sees this. Fix it."),
    "all": (1, "error: this is met by all. Fix it."),
}


@pytest.fixture
def driver(tmp_path):
    (tmp_path / "driver.py").write_text(DRIVER)
    return tmp_path / "driver.py"


def check_report(stderr, code, report):
    """That one process has reported, and no process anything else."""
    lines = [line for line in stderr.splitlines() if line.startswith(("error", "LookupError", "RuntimeError"))]
    assert lines == [report], stderr
    assert stderr.count("Traceback") == (report == "LookupError: a bug"), stderr
    assert "gloo" not in stderr


@pytest.mark.parametrize(
    "case", ["row", "killed", *(pytest.param(x, marks=pytest.mark.slow) for x in ("disk", "bug", "first", "all"))]
)
def test_the_process_that_knows_reports(driver, case):
    code, report = REPORTS[case]
    done = run_program(
        driver, case, processes=2, check=False, launcher="medicalgpt.launch", env={"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == code, done.stderr
    check_report(done.stderr, code, report)


@pytest.mark.slow
@pytest.mark.parametrize("case", REPORTS)
def test_without_a_launcher_the_first_process_has_the_store(driver, case):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, driver, case], env={**shared, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    stderr = "".join(process.communicate(timeout=120)[1] for process in started)
    code, report = REPORTS[case]
    if case == "killed":
        assert [process.returncode for process in started] == [1, -9]
        assert stderr.count("error: another process of the run has ended without a message") == 1
        assert "process 0 was waiting for it" in stderr and "Traceback" not in stderr
        return
    assert [process.returncode for process in started] == [1, 1]
    if case == "first":
        # The store that would tell that process 0 has reported has gone with it.
        stderr, _, second = stderr.partition(
            "\nerror: process 0 has ended; if it has not said why, it was perhaps killed"
        )
        assert "; process 1 was waiting for it" in second and "error" not in second
    check_report(stderr, code, report)


def test_the_first_process_speaks_at_once(capsys, monkeypatch):
    monkeypatch.setattr(errors.time, "sleep", lambda _: pytest.fail("it waited"))
    with pytest.raises(SystemExit) as end:
        errors.fail("nothing there", code=2)
    assert end.value.code == 2 and capsys.readouterr().err == "\nerror: nothing there\n"


def test_another_process_speaks_if_the_first_one_does_not(capsys, monkeypatch):
    """Here without a store, in which the first process could say that it has spoken."""
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(errors, "SECONDS_TO_SPEAK", 0.2)
    began = time.monotonic()
    with pytest.raises(SystemExit) as end:
        errors.fail("only here")
    assert end.value.code == 1 and time.monotonic() - began >= 0.2
    assert capsys.readouterr().err == "\nerror in process 3: only here\n"


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:5"), True),
        (torch.distributed.DistNetworkError("The client socket has timed out"), True),
        (ConnectionResetError(104, "Connection reset by peer"), True),
        (RuntimeError("shape '[2, 3]' is invalid for input of size 5"), False),
        (OSError(28, "No space left on device"), False),
        (ValueError("gloo"), False),
    ],
    ids=str,
)
def test_errors_of_the_connection_are_known(error, lost):
    assert errors.is_lost_connection(error) == lost
    wrapped = ValueError("while saving")
    wrapped.__cause__ = error
    assert errors.is_lost_connection(wrapped) == lost
