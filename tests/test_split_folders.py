"""Each file of a folder is trained on, held out, left out or not read, by names that the log repeats."""

import json
from pathlib import Path

from medicalgpt.args import DataArguments
from medicalgpt.data.loading import load_data
from medicalgpt.data.streaming import check_data
from medicalgpt.errors import UserError
from medicalgpt.evaluation.held_out import read_documents
from medicalgpt.formats.conversion import to_messages, to_text
from medicalgpt.readers.folders import choose_files, find_files, split_of
from tests.helpers import write_jsonl

import pytest


def write(folder: Path, *names: str) -> Path:
    """Files of one row each, which says the name of the file."""
    for name in names:
        write_jsonl(folder / name, [{"prompt": f"question in {name}", "response": "A"}])
    return folder


def sides(place: Path, **flags) -> tuple[list[str], list[str]]:
    data = load_data(DataArguments(train_file_dir=str(place), **flags), to_messages)
    return tuple(
        sorted(row["messages"][0]["content"].removeprefix("question in ") for row in rows)
        for rows in (data.train, data.validation)
    )


def test_a_folder_name_holds_out(tmp_path, log):
    folder = write(tmp_path, "train/part-0.jsonl", "validation/part-0.jsonl", "test/part-0.jsonl")
    assert sides(folder) == (["train/part-0.jsonl"], ["validation/part-0.jsonl"])
    assert f"held out by their names, never trained on: {folder}/validation/part-0.jsonl" in log
    assert f"trained on: {folder}/train/part-0.jsonl" in log
    assert any(line.startswith("left out by their names") and f"{folder}/test/part-0.jsonl" in line for line in log)
    streamed = check_data(DataArguments(train_file_dir=str(folder)), to_messages)
    assert [file.path.parent.name for stream in streamed.streams for file in stream.files] == ["train"]


@pytest.mark.parametrize("name", ["valid", "val", "Dev", "EVAL", "validation", "test", "test-clean", "dev_set"])
def test_every_name_that_holds_out(tmp_path, name):
    folder = write(tmp_path, "a.jsonl", f"{name}/deep/down/part.jsonl")
    assert sides(folder) == (["a.jsonl"], [f"{name}/deep/down/part.jsonl"])


def test_names_that_do_not_hold_out(tmp_path):
    folder = write(tmp_path, "testimony/a.jsonl", "developers/b.jsonl", "train/c.jsonl")
    assert sides(folder)[1] == []


def test_names_above_the_given_folder_do_not_count(tmp_path):
    folder = write(tmp_path / "test" / "mine", "a.jsonl", "dev.jsonl")
    assert sides(folder) == (["a.jsonl"], ["dev.jsonl"])
    assert sides(write(tmp_path / "eval", "only.jsonl")) == (["only.jsonl"], [])
    assert sides(tmp_path / "eval" / "only.jsonl") == (["only.jsonl"], [])


def test_what_holds_out_wins_over_what_does_not():
    for path, split in (
        ("test/train.jsonl", "test"),
        ("train/validation.jsonl", "validation"),
        ("dev/test.jsonl", "test"),
        ("test/dev/a.jsonl", "validation"),
        ("train/a.jsonl", "train"),
    ):
        assert split_of(Path("/data/test") / path, "/data/test") == split


def test_only_a_test_set_is_validated_on_and_the_named_one_wins(tmp_path, log):
    folder = write(tmp_path / "d", "train/a.jsonl", "test/b.jsonl")
    assert sides(folder) == (["train/a.jsonl"], ["test/b.jsonl"])
    other = write(tmp_path / "other", "test/c.jsonl")
    assert sides(folder, validation_file_dir=str(other)) == (["train/a.jsonl"], ["test/c.jsonl"])
    assert any(line.startswith("left out") and "b.jsonl" in line for line in log)
    # The parent of the training folder as the validation folder: the names tell the sides.
    assert sides(folder / "train", validation_file_dir=str(folder)) == (["train/a.jsonl"], ["test/b.jsonl"])


def test_held_out_text_of_an_evaluation_is_found_in_a_folder(tmp_path):
    (tmp_path / "validation").mkdir()
    (tmp_path / "a.txt").write_text("trained on", encoding="utf-8")
    (tmp_path / "validation" / "a.txt").write_text("held out", encoding="utf-8")
    assert read_documents(str(tmp_path), "auto")[0] == ["held out"]


def test_a_name_that_ends_like_held_out_rows_is_warned_of(tmp_path, log):
    assert sides(write(tmp_path, "a.jsonl", "medqa_test.jsonl"))[1] == []
    assert sum("medqa_test.jsonl is trained on, though" in line for line in log) == 1


def test_files_that_are_not_read_are_named_with_the_reason(tmp_path, log):
    write(tmp_path, "a.jsonl", ".cache/b.jsonl", "README_zh.md", "run.sh", "dataset_infos.json")
    (tmp_path / "LICENSE").write_text("x", encoding="utf-8")
    (tmp_path / "paper.pdf").write_text("x", encoding="utf-8")
    assert [path.name for path in find_files(str(tmp_path))] == ["a.jsonl"]
    (line,) = log
    assert line.startswith("not read, 6 file(s): ")
    for name, reason in (
        (".cache/b.jsonl", "(hidden)"),
        ("README_zh.md", "(about the data)"),
        ("dataset_infos.json", "(about the data)"),
        ("run.sh", "(not data)"),
        ("paper.pdf", "(.pdf: not a format of rows)"),
    ):
        assert any(name in part and reason in part for part in line.split("; "))


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("b.zip", "unpack"), ("b.xls", ".xlsx or .csv"), ("b.pkl", "save it as .jsonl"), ("part-00000", "name it .jsonl")],
)
def test_data_that_cannot_be_read_stop_the_run(tmp_path, name, remedy):
    write(tmp_path, "a.jsonl")
    (tmp_path / name).write_text(json.dumps({"text": "x"}), encoding="utf-8")
    with pytest.raises(UserError) as refused:
        choose_files(DataArguments(train_file_dir=str(tmp_path)))
    assert f"{tmp_path / name}: " in str(refused.value) and remedy in str(refused.value)
    if name == "part-00000":
        (tmp_path / name).rename(tmp_path / f"{name}.jsonl")
    else:
        (tmp_path / name).unlink()
    assert choose_files(DataArguments(train_file_dir=str(tmp_path)))


def test_a_folder_behind_a_link_is_searched_once(tmp_path):
    write(tmp_path / "elsewhere", "b.jsonl")
    write(tmp_path / "d", "a.jsonl")
    (tmp_path / "d" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "round").symlink_to(tmp_path / "d")
    assert [path.name for path in find_files(str(tmp_path / "d"))] == ["a.jsonl", "b.jsonl"]


def test_copies_in_two_formats_are_warned_of(tmp_path, log):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}])
    (tmp_path / "a.json").write_text('[{"text": "two"}]', encoding="utf-8")
    assert len(load_data(DataArguments(train_file_dir=str(tmp_path)), to_text).train) == 2
    assert any("have the same name" in line and "a.json, " in line for line in log)
