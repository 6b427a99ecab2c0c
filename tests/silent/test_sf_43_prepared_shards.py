"""Prepared shards give the rows of their files in the same steps, on any number of processes, and after a resume."""

import json
import shutil

from medicalgpt.errors import UserError
from tests.helpers import commit, read_json, run_here
from tests.silent.ledgers import Trained, make_rows, open_run

import pytest

ROWS, STEPS = 13, 7
SAVE = ("--save_strategy", "steps", "--save_steps", 3, "--max_steps", STEPS)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = make_rows(tmp_path_factory.mktemp("sf43"), ROWS)
    prepare(place, "prepared", 3)
    return place


def prepare(place, name, shards, *more):
    for number in range(shards, 0, -1):
        run_here(
            "prepare_data.py",
            *("--format", "chat", "--model_name_or_path", place / "model", "--train_file_dir", place / "data" / "sft"),
            *("--prepared_dir", place / name, "--shard", f"{number}/{shards}", *more),
        )


@pytest.fixture(scope="module")
def whole(place):
    """From the files, on one process, without a stop."""
    return Trained("sft", place, place / "whole", *SAVE, "--per_device_train_batch_size", 4)


def from_shards(place, output, *more, processes, **kwargs):
    flags = ("--prepared_dir", place / "prepared", *SAVE, "--per_device_train_batch_size", 4 // processes)
    return Trained("sft", place, output, *flags, *more, processes=processes, **kwargs)


def test_two_processes_killed_and_resumed_on_two_and_on_one(place, whole):
    killed = from_shards(place, place / "killed", processes=2, stop=5)
    assert killed.rows == {step: rows for step, rows in whole.rows.items() if step < 5}
    assert sorted(row for step in range(4) for row in whole.rows[step]) == list(range(ROWS))
    for processes in (2, 1):
        resume = ("--resume_from_checkpoint", place / "killed" / "checkpoint-3")
        resumed = from_shards(place, place / f"resumed-{processes}", *resume, processes=processes)
        assert resumed.rows == {step: rows for step, rows in whole.rows.items() if step >= 3}
        assert resumed.losses == pytest.approx(whole.losses, rel=1e-6)


def test_the_same_rows_in_other_shards_come_in_the_same_steps(place, whole):
    prepare(place, "halves", 2)
    flags = ("--prepared_dir", place / "halves", *SAVE, "--per_device_train_batch_size", 4)
    resumed = Trained(
        "sft", place, place / "other-shards", *flags, "--resume_from_checkpoint", place / "whole" / "checkpoint-3"
    )
    assert resumed.rows == {step: rows for step, rows in whole.rows.items() if step >= 3}
    assert resumed.losses == pytest.approx(whole.losses, rel=1e-6)


def test_packed_rows_in_other_shards_are_refused(place):
    """Each shard is packed by itself, so that another division makes other blocks."""
    length = ("--model_max_length", 160, "--packing", "True")
    for shards in (1, 2):
        prepare(place, f"packed-{shards}", shards, *length)
    ways = {"files": (), "1": ("--prepared_dir", place / "packed-1"), "2": ("--prepared_dir", place / "packed-2")}
    flags = (*length, "--save_steps", 1, "--per_device_train_batch_size", 1, "--dataloader_pin_memory", "False")

    def open_packed(output, way, *more):
        return open_run("sft", place, place / output, *flags, *ways[way], *more)

    blocks = {}
    for way in ways:
        opened = open_packed(f"packed-from-{way}", way, "--max_steps", 1)
        blocks[way] = opened.trainer.train_dataset["input_ids"]
        opened.finish()
    assert list(blocks["files"]) == list(blocks["1"]) != list(blocks["2"])
    for before, now in (("files", "1"), ("1", "files")):
        checkpoint = place / f"packed-from-{before}" / "checkpoint-1"
        open_packed(f"from-{before}-with-{now}", now, "--max_steps", 2, "--resume_from_checkpoint", checkpoint)
    remedies = {("files", "2"): "omit --prepared_dir", ("2", "1"): f"pass --prepared_dir {place / 'packed-2'}"}
    for (before, now), remedy in remedies.items():
        checkpoint = place / f"packed-from-{before}" / "checkpoint-1"
        with pytest.raises(UserError, match="makes other blocks.*\n  To resume it, ") as error:
            open_packed("refused", now, "--max_steps", 2, "--resume_from_checkpoint", checkpoint)
        assert f"\n  To resume it, {remedy}" in str(error.value)
        assert "start another run from these weights: omit --resume_from_checkpoint" in str(error.value)
        assert f"pass --model_name_or_path {checkpoint} --output_dir " in str(error.value)
    # An earlier version recorded the hash of the index alone.
    old = place / "old" / "checkpoint-1"
    shutil.copytree(place / "packed-from-2" / "checkpoint-1", old)
    record = read_json(old / "run.json")
    for entry in record["data"]:
        assert entry.pop("packed_shards") == 2
    (old / "run.json").write_text(json.dumps(record))
    commit(old)
    open_packed("from-old", "2", "--max_steps", 2, "--resume_from_checkpoint", old)
    # Prepared again in the same place.
    shutil.rmtree(place / "packed-2")
    prepare(place, "packed-2", 3, *length)
    with pytest.raises(
        UserError, match=r"To resume it, prepare the same rows in 2 shards \(prepare_data.py --shard 1/2"
    ):
        checkpoint = place / "packed-from-2" / "checkpoint-1"
        open_packed("refused", "2", "--max_steps", 2, "--resume_from_checkpoint", checkpoint)
