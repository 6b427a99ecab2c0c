"""inference.py --data_file: an interrupted run continues, bad rows are skipped if asked, columns are named."""

import json
from pathlib import Path

import inference
from medicalgpt.errors import UserError
from tests.helpers import run_here
from tests.tiny import make_tiny

import pytest
from loguru import logger

ANSWERS = {"你好": "好"}


@pytest.fixture(scope="module")
def taught(tmp_path_factory) -> str:
    return make_tiny(tmp_path_factory.mktemp("resume") / "taught", answers=ANSWERS)


@pytest.fixture(scope="module")
def endless(tmp_path_factory) -> str:
    return make_tiny(tmp_path_factory.mktemp("resume") / "endless", never_stops=True)


def main(*arguments: object) -> None:
    run_here("inference.py", *arguments)


def write_rows(path: Path, rows: list) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def killed(monkeypatch, command, after: int) -> None:
    """The command, killed as its model begins to answer one batch more than `after`."""
    generate, batches = inference.ChatEngine.generate, iter(range(1000))

    def interrupted(engine, requests):
        if next(batches) == after:
            raise KeyboardInterrupt
        return generate(engine, requests)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(inference.ChatEngine, "generate", interrupted)
        main(*command)


@pytest.fixture
def interrupted(endless, tmp_path, monkeypatch):
    """A sampled run of seven rows that was killed in its third batch, and its command."""
    monkeypatch.setattr(inference, "BATCHES_PER_SORT", 2)
    data = write_rows(tmp_path / "in.txt", ["one", "two and more", "three", "four five six", "seven", "eight", "nine"])
    command = ("--model_name_or_path", endless, "--data_file", data, "--output_file", tmp_path / "out.jsonl")
    command += ("--batch_size", 2, "--max_new_tokens", 6, "--temperature", 1, "--seed", 3)
    killed(monkeypatch, command, after=2)
    return command


def test_an_interrupted_file_is_continued_as_if_it_had_not_been(interrupted, tmp_path, monkeypatch):
    partial = tmp_path / "out.jsonl.partial"
    assert len(read_rows(partial)) == 4
    # Killed in the middle of a line, and once more before anything new is written.
    partial.write_bytes(partial.read_bytes() + b'{"prompt": "sev')
    killed(monkeypatch, interrupted, after=0)
    assert len(read_rows(partial)) == 4
    answered = []
    generate = inference.ChatEngine.generate
    monkeypatch.setattr(
        inference.ChatEngine, "generate", lambda engine, each: answered.append(len(each)) or generate(engine, each)
    )
    main(*interrupted)
    assert answered == [2, 1]
    main(*interrupted[:4], "--output_file", tmp_path / "whole.jsonl", *interrupted[6:])
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert sorted(path.name for path in tmp_path.glob("*.jsonl*")) == ["out.jsonl", "whole.jsonl"]


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (("--temperature", 0.5), r"temperature \(1.0\)"),
        (("--max_new_tokens", 7), r"max_new_tokens \(6\)"),
        (("--batch_size", 3), r"batch_size \(2\)"),
        (("--system_prompt", "x"), r"system_prompt \(None\)"),
        (("--skip_bad_rows", True), r"skip_bad_rows \(False\)"),
    ],
)
def test_a_changed_setting_does_not_continue(interrupted, tmp_path, more, named):
    before = (tmp_path / "out.jsonl.partial").read_bytes()
    with pytest.raises(UserError, match=f"differs in {named}"):
        main(*interrupted, *more)
    assert (tmp_path / "out.jsonl.partial").read_bytes() == before
    # The way out that the message gives.
    main(*interrupted, *more, "--overwrite_output_file")
    assert len(read_rows(tmp_path / "out.jsonl")) == 7


def test_changed_data_or_weights_do_not_continue(interrupted, tmp_path):
    other = make_tiny(tmp_path / "other", never_stops=True, seed=5)
    with pytest.raises(UserError, match="differs in weights"):
        main(*interrupted, "--model_name_or_path", other)
    data = tmp_path / "in.txt"
    data.write_text(data.read_text(encoding="utf-8").replace("nine", "ten"), encoding="utf-8")
    with pytest.raises(UserError, match="differs in data_sha256"):
        main(*interrupted)


def test_an_unfinished_file_that_was_changed_is_refused(interrupted, tmp_path):
    partial = tmp_path / "out.jsonl.partial"
    partial.write_text(partial.read_text(encoding="utf-8").replace("three", "tree"), encoding="utf-8")
    with pytest.raises(UserError, match="was changed: it does not answer .*in.txt:3"):
        main(*interrupted)


def test_bad_rows_are_skipped_and_counted_if_asked(taught, tmp_path, monkeypatch):
    rows = [{"question": "你好"}, {"other": "x"}, {"question": "你好" * 900}]
    data, output = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    command = ("--model_name_or_path", taught, "--data_file", data, "--output_file", output)
    with pytest.raises(UserError, match="1 row"):
        main(*command)
    monkeypatch.setattr(inference, "setup_logging", lambda: None)
    log: list[str] = []
    sink = logger.add(log.append, format="{message}")
    main(*command, "--skip_bad_rows")
    logger.remove(sink)
    assert [row["question"] for row in read_rows(output)] == ["你好"]
    printed = "".join(log)
    assert printed.count("1 row(s) cannot be answered and are skipped") == 2 and "in.jsonl:2" in printed
    assert "in.jsonl:3" in printed


def test_columns_name_the_question(taught, tmp_path):
    data, output = write_rows(tmp_path / "in.jsonl", [{"Frage": "你好", "question": "x"}]), tmp_path / "out.jsonl"
    command = ("--model_name_or_path", taught, "--data_file", data, "--output_file", output)
    main(*command, "--columns", "question=Frage")
    assert read_rows(output)[0]["response"] == ANSWERS["你好"]
