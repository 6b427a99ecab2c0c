"""A program from the fork server is the program: the same arguments, variables, output, exit code and end."""

import os
import signal
import subprocess
import sys
import time

from tests import fork_server

import pytest

PROGRAM = """
import atexit, os, sys, threading, time
atexit.register(print, "at the end")
print(__name__, __file__, sys.argv[1:], os.environ["GIVEN"], os.getcwd(), sys.path[0], sys.stdin.read())
print("an error", file=sys.stderr)
threading.Thread(target=lambda: (time.sleep(0.2), print("a thread"))).start()
{end}
"""
ENDS = {
    "returns": "",
    "code": "sys.exit(7)",
    "text": "sys.exit('a reason')",
    "exception": "raise ValueError('wrong')",
    "interrupt": "raise KeyboardInterrupt",
    "at once": "os._exit(3)",
    "signal": "os.kill(os.getpid(), 15)",
}


@pytest.mark.parametrize("end", ENDS)
def test_it_is_as_a_program_started_by_itself(tmp_path, end):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM.format(end=ENDS[end]))
    environment = {**os.environ, **fork_server.FOR_ALL, "GIVEN": "here"}
    command = [str(script), "--flag", "中文 and a space"]
    alone = subprocess.run(
        [sys.executable, *command],
        **{"env": environment, "cwd": fork_server.ROOT, "capture_output": True, "text": True},
        input="two\nlines",
    )
    forked = fork_server.run(command, environment, 60, stdin="two\nlines")
    assert (forked.returncode, forked.stdout) == (alone.returncode, alone.stdout)
    # A traceback begins with the frames that run the program.
    assert forked.stderr.splitlines()[:1] == alone.stderr.splitlines()[:1]
    assert forked.stderr.splitlines()[-1:] == alone.stderr.splitlines()[-1:]


def test_a_program_with_other_settings_of_libraries_starts_by_itself():
    assert fork_server.can_start({**os.environ, **fork_server.FOR_ALL, "MEDICALGPT_API_KEY": "x", "PYTHONPATH": "/x"})
    assert not fork_server.can_start({**os.environ, **fork_server.FOR_ALL, "OMP_NUM_THREADS": "2"})
    assert not fork_server.can_start({**os.environ, **fork_server.FOR_ALL, "ACCELERATE_USE_FSDP": "true"})


def test_several_work_together_and_end_together(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(
        "import os, sys, torch\n"
        "torch.distributed.init_process_group('gloo')\n"
        "rank = torch.tensor(float(os.environ['RANK']) + 1)\n"
        "torch.distributed.all_reduce(rank)\n"
        "print('sum', rank.item())\n"
        "torch.distributed.destroy_process_group()\n"
        "sys.exit(int(os.environ['RANK']) * 4)\n"
    )
    done = fork_server.run([str(script)], {**os.environ, **fork_server.FOR_ALL}, 60, processes=2)
    assert done.returncode == 4 and done.stdout == "sum 3.0\nsum 3.0\n"


def test_one_that_does_not_end_is_ended(tmp_path):
    script = tmp_path / "program.py"
    noted = str(tmp_path / "pid")
    script.write_text(f"import os, time\nopen({noted!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)\n")
    with pytest.raises(subprocess.TimeoutExpired):
        fork_server.run([str(script)], {**os.environ, **fork_server.FOR_ALL}, 1)
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 30
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.kill(pid, signal.SIG_DFL)
            time.sleep(0.05)


@pytest.mark.parametrize("number", [1, 2])
def test_what_a_test_leaves_in_the_environment_does_not_reach_the_next(number):
    assert "ACCELERATE_LEFT" not in os.environ and "HF_HUB_OFFLINE_LEFT" not in os.environ
    os.environ |= {"ACCELERATE_LEFT": "x", "HF_HUB_OFFLINE_LEFT": "x"}


def test_what_a_test_sets_for_a_while_is_not_of_the_server(monkeypatch):
    monkeypatch.setenv("HF_SET_FOR_A_WHILE", "x")
    assert "HF_SET_FOR_A_WHILE" not in fork_server.environment_of_tests()
    assert not fork_server.can_start(os.environ | fork_server.FOR_ALL)
