"""What a run does with the folder it is to write to, for each state of the folder and each way of starting."""

import json
import os
import shutil
from pathlib import Path

from medicalgpt.errors import UserError
from medicalgpt.files import hash_file
from medicalgpt.training.checkpoints import MANIFEST, set_later_aside
from medicalgpt.training.claiming import Claim, claim_folder, resumes_in
from medicalgpt.training.output_folder import PreviousRun

import pytest
from loguru import logger

TORN = {"empty": b"", "null": b"null", "list": b"[]", "half": b'{"status": "fin', "bytes": b"\xff\xfe\x00"}


@pytest.fixture
def log():
    lines: list[str] = []
    sink = logger.add(lambda message: lines.append(message.record["message"]), level="INFO")
    yield lines
    logger.remove(sink)


def fill(folder: Path, status: str | bytes | None, *checkpoints: str, model: bool = False) -> Path:
    """A folder with a record, checkpoints (`3`: complete, `4 torn`, `5 damaged`) and perhaps a model."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(status, bytes):
        (folder / "run.json").write_bytes(status)
    elif status:
        (folder / "run.json").write_text(json.dumps({"status": status, "started": "2026-01-02T03:04:05+00:00"}))
    for checkpoint in checkpoints:
        step, _, how = checkpoint.partition(" ")
        place = folder / f"checkpoint-{step}"
        place.mkdir()
        (place / "optimizer.pt").write_bytes(b"state")
        if how != "torn":
            digest = "0" * 64 if how == "damaged" else hash_file(place / "optimizer.pt")
            (place / MANIFEST).write_text(json.dumps({"optimizer.pt": {"bytes": 5, "sha256": digest}}))
    if model:
        (folder / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / "metrics.jsonl").touch()
    return folder


def claim(folder: Path, wanted: str = "auto", overwrite: bool = False, trains: bool = True) -> Claim:
    return claim_folder(folder, wanted, overwrite=overwrite, trains=trains)


# --- one command for the first start and every other -----------------------------------------------------------------


@pytest.mark.parametrize("status", ["running", "stopped", "failed", *TORN.values(), None])
def test_a_run_with_a_checkpoint_is_resumed(tmp_path, status, log):
    folder = fill(tmp_path / "run", status, "3", "10", "12 torn")
    for overwrite in (False, True):
        assert claim(folder, overwrite=overwrite) == Claim(str(folder / "checkpoint-10"))
    assert f"resuming from {folder / 'checkpoint-10'}" in log
    assert ("was killed" in " ".join(log)) == (status == "running")
    assert ("run.json is damaged" in " ".join(log)) == isinstance(status, bytes)
    assert resumes_in(folder, "auto")


@pytest.mark.parametrize("checkpoints", [(), ("3 torn",)])
@pytest.mark.parametrize("status", ["running", "stopped", "failed", *TORN.values()])
def test_a_run_without_a_checkpoint_starts_again(tmp_path, status, checkpoints, log):
    folder = fill(tmp_path / "run", status, *checkpoints)
    assert claim(folder) == Claim(replaces=True, worthless=True)
    assert "ended before its first complete checkpoint; it starts from the beginning" in log[-1]
    assert not resumes_in(folder, "auto")


def test_an_empty_folder_and_none_are_started_in(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").touch()
    assert claim(tmp_path / "run") == claim(tmp_path / "none") == Claim()


@pytest.mark.parametrize("checkpoints", [(), ("3",)])
def test_a_finished_run_is_left_alone_unless_it_may_be_replaced(tmp_path, checkpoints):
    folder = fill(tmp_path / "run", "finished", *checkpoints, model=True)
    assert claim(folder) == Claim(finished=True)
    assert claim(folder, overwrite=True) == Claim(replaces=True)


@pytest.mark.parametrize("status", [None, *TORN.values()])
def test_a_model_whose_run_is_not_known_is_not_replaced(tmp_path, status):
    folder = fill(tmp_path / "run", status, model=True)
    with pytest.raises(UserError, match="holds another run"):
        claim(folder)
    assert claim(folder, overwrite=True) == Claim(replaces=True)


def test_checkpoints_of_another_program_are_not_replaced(tmp_path):
    folder = fill(tmp_path / "run", None, "500 torn")
    with pytest.raises(UserError, match="holds another run"):
        claim(folder)


def test_damaged_checkpoints_are_not_silently_replaced(tmp_path):
    folder = fill(tmp_path / "run", "running", "3 damaged", "4 torn")
    with pytest.raises(UserError, match="no checkpoint in .* can be resumed from.*--overwrite_output_dir True"):
        claim(folder)
    assert claim(folder, overwrite=True) == Claim(replaces=True, worthless=True)


def test_a_killed_replacement_starts_again(tmp_path):
    """Its first start set the finished run aside and was killed; the same command must not take it for its own."""
    folder = fill(tmp_path / "run", "finished", "3", model=True)
    (folder / ".previous-run").mkdir()
    for path in [path for path in folder.iterdir() if not path.name.startswith(".")]:
        path.rename(folder / ".previous-run" / path.name)
    fill(folder, "running", "1 torn")
    assert claim(folder, overwrite=True) == Claim(replaces=True)
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"
    assert not (folder / "checkpoint-1").exists()


def test_a_run_that_continues_from_an_earlier_checkpoint_is_the_one_that_is_resumed_next(tmp_path, log):
    folder = fill(tmp_path / "run", "stopped", "3", "10", "20", "25 torn")
    for later in (["checkpoint-10", "checkpoint-20"], ["checkpoint-7"]):
        set_later_aside(folder / "checkpoint-3", folder)
        assert claim(folder).resume_from == str(folder / "checkpoint-3")
        aside = folder / f"superseded-checkpoints{'-2' if later == ['checkpoint-7'] else ''}"
        assert sorted(path.name for path in aside.iterdir()) == later
        assert f"the later {', '.join(later)} will not be resumed from any more; moved to {aside}." in " ".join(log)
        # They can still be resumed from.
        path = str(aside / later[0])
        assert claim(tmp_path / "other", path) == Claim(path)
        if later != ["checkpoint-7"]:
            fill(folder, "running", "7")
    # From the newest one, or into another folder, there is nothing to do.
    lines = len(log)
    set_later_aside(folder / "checkpoint-3", folder)
    fill(folder, "running", "8")
    set_later_aside(folder / "checkpoint-3", tmp_path / "other")
    assert len(log) == lines and (folder / "checkpoint-8").is_dir()
    # A run that replaces this one replaces them, too.
    assert {"superseded-checkpoints", "superseded-checkpoints-2"} <= {path.name for path in PreviousRun(folder).files()}


# --- the other ways of starting --------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["running", "finished", *TORN.values()])
def test_without_a_flag_a_run_is_neither_resumed_nor_replaced(tmp_path, status):
    folder = fill(tmp_path / "run", status, "3")
    with pytest.raises(UserError, match="holds another run") as error:
        claim(folder, "false")
    # The remedy works.
    assert ("Resume it: --resume auto." in str(error.value)) == (status != "finished")
    if status != "finished":
        assert claim(folder, "auto").resume_from == str(folder / "checkpoint-3")
    assert claim(folder, "false", overwrite=True).replaces


def test_nothing_to_resume_from_is_an_error_whose_remedy_works(tmp_path):
    for folder in (fill(tmp_path / "run", "running", "3 torn"), tmp_path / "none"):
        with pytest.raises(UserError, match="no complete checkpoint to resume from.*--resume auto"):
            claim(folder, "True")
        assert claim(folder, "auto").resume_from is None


def test_a_finished_run_can_be_trained_further(tmp_path):
    folder = fill(tmp_path / "run", "finished", "3", model=True)
    assert claim(folder, "True") == claim(folder, str(folder / "checkpoint-3")) == Claim(str(folder / "checkpoint-3"))


def test_what_cannot_be_read_is_passed_over(tmp_path, log):
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    folder = fill(tmp_path / "run", "running", "3", "4")
    (folder / "checkpoint-4" / "optimizer.pt").chmod(0)
    assert claim(folder).resume_from == str(folder / "checkpoint-3")


def test_a_folder_that_disappears_is_started_in(tmp_path):
    folder = fill(tmp_path / "run", "running", "3")
    shutil.rmtree(folder)
    assert claim(folder) == Claim()
