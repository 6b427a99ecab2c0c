"""Every row is accounted for: rows in = rows used + rows left out, by reason, in run.json and in the log alike."""

import json
import re

from tests.helpers import open_stage, read_json, run_program, save_model, write_jsonl
from tests.silent.row_counts import SKIP, balance, check, logged
from tests.tiny import tiny_tokenizer

import pytest

GOOD = [{"prompt": f"Question {n}?", "response": f"Answer {n}."} for n in range(12)]
LONG = [{"prompt": f"Long {n}?", "response": "y" * 300} for n in range(3)]
BAD = [
    '{"prompt": "no end',
    {"prompt": "no answer"},
    {"prompt": "empty answer", "response": " "},
    {"conversations": [{"from": "human", "value": "?"}, {"from": "robot", "value": "!"}]},
    {"prompt": "?", "response": "!", "images": ["a.png"]},
    ["no object"],
    {"messages": [{"role": "assistant", "content": "first"}, {"role": "user", "content": "last"}]},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("sf25"), tiny_tokenizer())


def flags(folder, tmp_path, *more):
    return [
        *("--model_name_or_path", folder, "--train_file_dir", tmp_path / "data", "--output_dir", tmp_path / "out"),
        *("--model_max_length", 200, "--max_steps", 1, "--sample_prompts", 0, *more),
    ]


def asked(dataset, tokenizer):
    """The questions that a data set trains on."""
    texts = [tokenizer.decode(row["input_ids"]) for row in dataset]
    return sorted(re.search(r"<\|im_start\|>user\n(.*)<\|im_end\|>", text).group(1) for text in texts)


def questions(rows):
    return sorted(row["prompt"] for row in rows)


def test_folder_with_rows_of_all_kinds(folder, tmp_path, capsys):
    write_jsonl(tmp_path / "data" / "a.jsonl", [*GOOD[:3], LONG[0], *BAD[:3], *GOOD[3:5], LONG[1]])
    (tmp_path / "data" / "b.json").write_text(json.dumps([*BAD[3:], *GOOD[5:8], LONG[2]], indent=1), encoding="utf-8")
    opened = open_stage("supervised_finetuning.py", *flags(folder, tmp_path, *SKIP))
    wanted = {"unusable": len(BAD), "too long": len(LONG)}
    entries, dataset = check(opened, capsys, "train", 8 + len(BAD) + len(LONG), 8, wanted)
    assert [(entry["rows"], entry["used"]) for entry in entries] == [(10, 5), (8, 3)]
    assert asked(dataset, opened.tokenizer) == questions(GOOD[:8])


@pytest.mark.parametrize("limit", [1, 4, 7, 100])
def test_first_rows_only(folder, tmp_path, capsys, limit):
    rows = [GOOD[0], BAD[0], GOOD[1], LONG[0], *GOOD[2:4], BAD[1], *GOOD[4:]]
    write_jsonl(tmp_path / "data" / "rows.jsonl", rows)
    opened = open_stage("supervised_finetuning.py", *flags(folder, tmp_path, *SKIP, "--max_train_samples", limit))
    entries = opened.run.record["data"]
    rows_in, used, left_out = balance(entries, "train")
    assert rows_in == len(rows)
    # The long row is found after counting, so it takes one of the places.
    assert used == {1: 1, 4: 3, 7: 6, 100: 12}[limit]
    check(opened, capsys, "train", rows_in, used, left_out)
    assert left_out.get("beyond --max_train_samples", 0) == {1: 14, 4: 10, 7: 6, 100: 0}[limit]
    assert asked(opened.trainer.train_dataset, opened.tokenizer) == questions(GOOD[:used])


def test_rows_on_one_line_of_a_json_file(folder, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    text = json.dumps([*GOOD[:3], BAD[1], *GOOD[3:5], LONG[0]])
    assert "\n" not in text
    (tmp_path / "data" / "rows.json").write_text(text, encoding="utf-8")
    opened = open_stage("supervised_finetuning.py", *flags(folder, tmp_path, *SKIP))
    _, dataset = check(opened, capsys, "train", 7, 5, {"unusable": 1, "too long": 1})
    assert asked(dataset, opened.tokenizer) == questions(GOOD[:5])


def test_rows_moved_to_the_held_out_side(folder, tmp_path, capsys):
    rows = [*GOOD, *LONG, *BAD[:2]]
    write_jsonl(tmp_path / "data" / "rows.jsonl", rows)
    for seed in (1, 2, 3):
        more = ["--validation_split_percentage", 40, "--data_seed", seed, "--overwrite_output_dir", "True"]
        opened = open_stage("supervised_finetuning.py", *flags(folder, tmp_path, *SKIP, *more))
        trained, held_out = opened.trainer.train_dataset, opened.trainer.eval_dataset
        found = sorted(asked(trained, opened.tokenizer) + asked(held_out, opened.tokenizer))
        assert found == questions(GOOD)
        opened.finish()
        entries, log = read_json(tmp_path / "out" / "run.json")["data"], capsys.readouterr().err
        train, validation = balance(entries, "train"), balance(entries, "validation")
        assert logged(log, "train") == train and logged(log, "validation") == validation
        assert train[:2] == (len(rows), len(trained)) and train[2]["moved to validation"] == 6
        assert validation[:2] == (6, len(held_out))
        assert sum(side[2].get("too long", 0) for side in (train, validation)) == len(LONG)
        assert sum(side[2].get("unusable", 0) for side in (train, validation)) == 2


@pytest.mark.parametrize("strategy", ["under", "over"])
def test_sources_mixed_by_weight(folder, tmp_path, capsys, strategy):
    write_jsonl(tmp_path / "a" / "one.jsonl", [*GOOD[:5], BAD[0], LONG[0]])
    write_jsonl(tmp_path / "a" / "two.jsonl", [*GOOD[5:9], *BAD[1:3]])
    write_jsonl(tmp_path / "b" / "rows.jsonl", [LONG[1], *GOOD[9:12], BAD[3]])
    write_jsonl(tmp_path / "b" / "validation.jsonl", [{"prompt": "Held out?", "response": "Yes."}])
    more = ["--train_file_dir", f"{tmp_path / 'a'}:0.25,{tmp_path / 'b'}:0.75", "--mix_strategy", strategy]
    opened = open_stage("supervised_finetuning.py", *flags(folder, tmp_path, *SKIP, *more))
    log = capsys.readouterr().err
    opened.finish()
    entries = [entry for entry in read_json(tmp_path / "out" / "run.json")["data"] if entry["side"] == "train"]
    rows, used, left_out = balance(entries, "train")
    assert (rows, used, left_out) == logged(log, "train")
    trained = asked(opened.trainer.train_dataset, opened.tokenizer)
    assert len(trained) == sum(entry["drawn"] for entry in entries) and len(set(trained)) == used
    of_b = sum(question in questions(GOOD[9:12]) for question in trained)
    assert of_b == entries[2]["drawn"] and of_b / len(trained) == entries[2]["share"] == entries[2]["weight"] == 0.75
    if strategy == "under":
        assert (rows, used, left_out) == (18, 4, {"unusable": 4, "too long": 2, "not in the mixture": 8})
        assert len(trained) == 4
    else:
        assert (rows, used, left_out) == (18, 12, {"unusable": 4, "too long": 2})
        assert len(trained) == 36 and set(trained) == set(questions(GOOD))
    assert len(opened.trainer.eval_dataset) == 1


def test_both_sides_from_one_file(folder, tmp_path, capsys):
    path = write_jsonl(tmp_path / "data" / "rows.jsonl", [*GOOD[:3], BAD[0], LONG[0], *GOOD[3:6], BAD[1]])
    more = ["--validation_file_dir", path, "--allow_overlap", "True", "--max_train_samples", 2]
    opened = open_stage("supervised_finetuning.py", *flags(folder, tmp_path, *SKIP, *more))
    log = capsys.readouterr().err
    entries = opened.run.record["data"]
    assert len(opened.trainer.train_dataset) == 2 and len(opened.trainer.eval_dataset) == 6
    assert balance(entries, "train") == logged(log, "train") == (9, 2, {"beyond --max_train_samples": 7})
    expected = (9, 6, {"unusable": 2, "too long": 1})
    assert balance(entries, "validation") == logged(log, "validation") == expected


def test_held_out_side_and_limit(folder, tmp_path, capsys):
    write_jsonl(tmp_path / "data" / "train.jsonl", GOOD[:4])
    write_jsonl(tmp_path / "data" / "validation.jsonl", [GOOD[4], BAD[0], LONG[0], *GOOD[5:9]])
    opened = open_stage("supervised_finetuning.py", *flags(folder, tmp_path, *SKIP, "--max_eval_samples", 4))
    wanted = {"unusable": 1, "too long": 1, "beyond --max_eval_samples": 2}
    _, dataset = check(opened, capsys, "validation", 7, 3, wanted)
    assert asked(dataset, opened.tokenizer) == questions(GOOD[4:7])


def test_documents_of_pretraining(folder, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("one\n\n  \ntwo\nthree\n", encoding="utf-8")
    (tmp_path / "data" / "b.md").write_text("# Title\n\na whole file\n", encoding="utf-8")
    write_jsonl(tmp_path / "data" / "c.jsonl", [{"text": "x" * 500}, {"text": " "}, {"prompt": "?"}, {"text": "four"}])
    opened = open_stage(
        "pretraining.py",
        *("--model_name_or_path", folder, "--train_file_dir", tmp_path / "data", "--output_dir", tmp_path / "out"),
        *("--block_size", 100, "--packing", "False", "--max_steps", 1, "--sample_prompts", 0),
        *("--skip_bad_rows", "True"),
    )
    log = capsys.readouterr().err
    opened.finish()
    entries = read_json(tmp_path / "out" / "run.json")["data"]
    assert balance(entries, "train") == logged(log, "train") == (8, 6, {"unusable": 2})
    texts = [opened.tokenizer.decode(row["input_ids"]) for row in opened.trainer.train_dataset]
    whole = "".join(texts).split(opened.tokenizer.eos_token)
    assert whole == ["one", "two", "three", "# Title\n\na whole file", "x" * 500, "four", ""]


def test_bad_rows_stop_the_program_with_all_their_places(folder, tmp_path):
    path = write_jsonl(tmp_path / "data" / "rows.jsonl", [GOOD[0], *BAD, LONG[0]])
    done = run_program("supervised_finetuning.py", *flags(folder, tmp_path, "--long_rows", "refuse"), check=False)
    assert done.returncode == 1
    assert re.findall(rf"{re.escape(path)}:(\d+): ", done.stderr) == [str(n + 2) for n in range(len(BAD) + 1)]
    assert f"{len(BAD) + 1} problem(s) in the data" in done.stderr
    assert not (tmp_path / "out").exists()
