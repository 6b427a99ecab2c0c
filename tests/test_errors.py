"""How errors end a program: under torchrun once, whichever process meets them."""

from medicalgpt import errors
from tests.helpers import run_program

import pytest


def test_torchrun_shows_a_user_error_once(tmp_path):
    done = run_program(
        "supervised_finetuning.py",
        *("--model_name_or_path", tmp_path / "nowhere", "--train_file_dir", tmp_path),
        processes=2,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.count("error: no checkpoint folder") == done.stderr.count("no checkpoint folder") == 1
    # The launcher has its own traceback, which no process of the run can prevent; there is none of ours.
    assert done.stderr.count("Traceback") == 1 and "ChildFailedError" in done.stderr


def test_the_first_process_speaks_at_once(capsys, monkeypatch):
    monkeypatch.setattr(errors.time, "sleep", lambda _: pytest.fail("it waited"))
    with pytest.raises(SystemExit) as end:
        errors.fail("nothing there", code=2)
    assert end.value.code == 2 and capsys.readouterr().err == "\nerror: nothing there\n"


def test_another_process_speaks_if_the_first_one_does_not(capsys, monkeypatch):
    waited = []
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(errors.time, "sleep", waited.append)
    with pytest.raises(SystemExit) as end:
        errors.fail("only here")
    assert end.value.code == 1 and waited == [errors.SECONDS_TO_SPEAK]
    assert capsys.readouterr().err == "\nerror in process 3: only here\n"
