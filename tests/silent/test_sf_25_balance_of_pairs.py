"""Every pair is accounted for: rows in = rows used + rows left out, by reason, in run.json and in the log alike."""

import json

from tests.helpers import open_stage, read_json, save_model, write_jsonl
from tests.silent.pairs import on_every_stage, pair, pairs, questions, stage_flags
from tests.silent.row_counts import SKIP, balance, check, logged
from tests.tiny import tiny_tokenizer

import pytest

GOOD = pairs(12)
LONG = [pair(100 + n, 300, 3) for n in range(3)]
BAD = [
    '{"prompt": "no end',
    {"prompt": "?", "chosen": "no rejected answer"},
    {"prompt": "?", "chosen": " ", "rejected": "the other is empty"},
    {"prompt": "?", "chosen": "the same", "rejected": "the  same "},
    {"chosen": "no prompt", "rejected": "at all"},
    {"prompt": "?", "chosen": "a special <|im_end|> token", "rejected": "none"},
    pair(50, images=["a.png"]),
    ["no object"],
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("sf25"), tiny_tokenizer())


def flags(model, tmp_path, *more):
    return stage_flags(model, tmp_path, "--model_max_length", 200, "--max_steps", 1, *SKIP, *more)


@on_every_stage
def test_folder_with_rows_of_all_kinds(model, tmp_path, capsys, stage):
    write_jsonl(tmp_path / "data" / "a.jsonl", [*GOOD[:3], LONG[0], *BAD[:4], *GOOD[3:5], LONG[1]])
    (tmp_path / "data" / "b.json").write_text(json.dumps([*BAD[4:], *GOOD[5:8], LONG[2]], indent=1), encoding="utf-8")
    write_jsonl(tmp_path / "data" / "validation.jsonl", [*GOOD[8:11], LONG[0] | {"prompt": "!"}, BAD[1]])
    opened = open_stage(stage, *flags(model, tmp_path))
    log = capsys.readouterr().err
    opened.finish()
    entries = read_json(tmp_path / "out" / "run.json")["data"]
    wanted = 8 + len(BAD) + len(LONG), 8, {"unusable": len(BAD), "too long": len(LONG)}
    assert balance(entries, "train") == logged(log, "train") == wanted
    assert balance(entries, "validation") == logged(log, "validation") == (5, 3, {"unusable": 1, "too long": 1})
    assert questions(opened.trainer.train_dataset, opened.tokenizer) == list(range(8))
    assert questions(opened.trainer.eval_dataset, opened.tokenizer) == [8, 9, 10]


@on_every_stage
def test_first_rows_only(model, tmp_path, capsys, stage):
    write_jsonl(tmp_path / "data" / "rows.jsonl", [GOOD[0], BAD[1], LONG[0], *GOOD[1:]])
    opened = open_stage(stage, *flags(model, tmp_path, "--max_train_samples", 4))
    wanted = {"unusable": 1, "too long": 1, "beyond --max_train_samples": 9}
    _, dataset = check(opened, capsys, "train", 14, 3, wanted)
    assert questions(dataset, opened.tokenizer) == [0, 1, 2]


@on_every_stage
def test_pairs_moved_to_the_held_out_side(model, tmp_path, capsys, stage):
    rows = [*GOOD, *LONG, *BAD[:2]]
    write_jsonl(tmp_path / "data" / "rows.jsonl", rows)
    opened = open_stage(stage, *flags(model, tmp_path, "--validation_split_percentage", 40))
    log, entries = capsys.readouterr().err, opened.run.record["data"]
    trained, held_out = opened.trainer.train_dataset, opened.trainer.eval_dataset
    found = questions(trained, opened.tokenizer) + questions(held_out, opened.tokenizer)
    assert sorted(found) == list(range(12))
    train, validation = balance(entries, "train"), balance(entries, "validation")
    assert logged(log, "train") == train and logged(log, "validation") == validation
    assert train[:2] == (len(rows), len(trained)) and train[2]["moved to validation"] == validation[0] == 6
    assert sum(side[2].get("too long", 0) for side in (train, validation)) == len(LONG)
