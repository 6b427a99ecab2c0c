"""How errors end a program: under torchrun once, whichever process meets them."""

from medicalgpt import errors
from tests.helpers import run_program

import pytest


@pytest.mark.parametrize(("launcher", "tracebacks"), [("torch.distributed.run", 1), ("medicalgpt.launch", 0)])
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
