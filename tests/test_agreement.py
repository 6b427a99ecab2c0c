"""Processes that differ in flags, code, data or model stop the run before anything is trained."""

import socket

from medicalgpt.errors import UserError
from medicalgpt.training import agreement
from tests.helpers import ROOT, run_program, save_model, write_jsonl
from tests.tiny import tiny_tokenizer

import pytest

RECORD = {
    "stage": "supervised_finetuning",
    "processes": 2,
    "arguments": {"learning_rate": 2e-4, "local_rank": 0},
    "versions": {"torch": "2.13.0"},
    "resumed_from": None,
}
ENTRY = {"side": "train", "file": "data/a.jsonl", "rows": 100, "used": 99, "sha256": "0" * 64}


def compare(monkeypatch, check, first, other):
    """What process 1, on the host `other`, and process 0 say of each other."""

    def gathered(own):
        return [{**own[0], "host": "first"}, {"host": "other", "facts": facts[0]}]

    facts = []
    monkeypatch.setattr(agreement, "gather_object", lambda own: facts.append(own[0]["facts"]) or own)
    check(other)
    monkeypatch.setattr(agreement, "gather_object", gathered)
    check(first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"arguments": {"learning_rate": 1e-3}},
            "--learning_rate: 0.001 in process 1 on other; 0.0002 in process 0 on first",
        ),
        ({"versions": {"torch": "2.12.0"}}, "torch: 2.12.0 in process 1 on other; 2.13.0 in process 0"),
        ({"resumed_from": "out/checkpoint-5"}, "the checkpoint to resume from: out/checkpoint-5 in process 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_start_is_named(monkeypatch, change, message):
    compare(
        monkeypatch, agreement.compare_start, RECORD, {**RECORD, "arguments": {**RECORD["arguments"], "local_rank": 1}}
    )
    with pytest.raises(
        UserError, match=f"(?s)the processes of this run differ, so nothing was trained.*{message}"
    ) as error:
        compare(monkeypatch, agreement.compare_start, RECORD, RECORD | change)
    assert len(str(error.value).splitlines()) <= 4


def test_other_code_is_named(monkeypatch):
    versions = iter(["b" * 64, "a" * 64])
    monkeypatch.setattr(agreement, "code_version", lambda stage: next(versions))
    with pytest.raises(UserError, match="the code of supervised_finetuning: bbbbbbbbbbbb in process 1"):
        compare(monkeypatch, agreement.compare_start, RECORD, RECORD)


@pytest.mark.parametrize(
    "change", [{"rows": 99}, {"used": 98}, {"sha256": "1" * 64}, {"file": "data/b.jsonl"}], ids=str
)
def test_other_data_are_named(monkeypatch, change):
    compare(monkeypatch, agreement.compare_data, [ENTRY], [ENTRY])
    with pytest.raises(UserError, match="Copy the same files to every host.\n  train file data/a.jsonl: "):
        compare(monkeypatch, agreement.compare_data, [ENTRY], [ENTRY | change])


def test_many_differences_are_counted(monkeypatch):
    entries = [ENTRY | {"file": f"{n}.jsonl"} for n in range(7)]
    with pytest.raises(UserError, match="and 5 more$") as error:
        compare(monkeypatch, agreement.compare_data, entries, [])
    assert len(str(error.value).splitlines()) == 4


# Each process works in a separate folder, as if it were another host, with more flags of its own.
DRIVER = """
import os, sys
from medicalgpt.errors import run_main
from medicalgpt.logs import rank
import supervised_finetuning

def main():
    os.chdir(f"{sys.argv.pop(1)}/{rank()}")
    with open("flags.txt") as file:
        sys.argv += file.read().split()
    supervised_finetuning.main()

run_main(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "rows", "seed", "message"),
    [
        ("--learning_rate 0.5", 8, 0, "--learning_rate: 0.5 in process 1"),
        ("", 7, 0, "train file data/rows.jsonl: 7 rows, 7 used, sha256 "),
        ("", 8, 1, "the model: "),
    ],
    ids=["flags", "rows", "weights"],
)
def test_two_hosts_that_differ(tmp_path, flags, rows, seed, message):
    for rank, (more, count, weights) in enumerate([("", 8, 0), (flags, rows, seed)]):
        save_model(tmp_path / str(rank) / "model", tiny_tokenizer(), seed=weights)
        lines = [{"prompt": f"{n}?", "response": "y"} for n in range(count)]
        write_jsonl(tmp_path / str(rank) / "data" / "rows.jsonl", lines)
        (tmp_path / str(rank) / "flags.txt").write_text(more)
    (tmp_path / "driver.py").write_text(DRIVER)
    paths = ["--model_name_or_path", "model", "--train_file_dir", "data", "--output_dir", tmp_path / "out"]
    done = run_program(
        tmp_path / "driver.py",
        *(tmp_path, *paths, "--max_steps", 1, "--sample_prompts", 0, "--learning_rate", 0.1),
        processes=2,
        launcher="medicalgpt.launch",
        check=False,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("error: the processes of this run differ") == 1, done.stderr
    assert message in done.stderr and f"process 1 on {socket.gethostname()}" in done.stderr
    assert "Traceback" not in done.stderr
