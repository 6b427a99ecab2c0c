"""A row that does not fit is refused, or left out and counted, never cut: no label or turn end is lost or made up."""

import math

from medicalgpt.errors import UserError
from medicalgpt.readers.problems import DataError
from tests.helpers import open_stage, read_json, run_program, write_jsonl
from tests.silent.callbacks import Watch
from tests.tiny import make_tiny

import pytest
import torch

LIMIT = 80
SHORT = [{"prompt": f"Question {n}?", "response": "Rest. " * n} for n in (1, 2, 4)]
# The prompt alone fits, and so does the first answer of the second one.
LONG_ANSWER = {"prompt": "Why?", "response": "y" * 100}
LONG_LATER = {
    "messages": [
        {"role": role, "content": text}
        for role, text in (("user", "Why?"), ("assistant", "So."), ("user", "And?"), ("assistant", "y" * 40))
    ]
}
LONG_PROMPT = {"prompt": "y" * 100, "response": "So."}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("sf09"))


def flags(folder, tmp_path, *more):
    return [
        *("--model_name_or_path", folder, "--train_file_dir", tmp_path / "data", "--output_dir", tmp_path / "out"),
        *("--model_max_length", LIMIT, "--sample_prompts", 0, "--save_strategy", "no", "--logging_steps", 1),
        *("--per_device_train_batch_size", 2, "--learning_rate", 1e-3, "--use_peft", "False", *more),
    ]


@pytest.mark.parametrize("long", [LONG_ANSWER, LONG_LATER, LONG_PROMPT])
def test_refused_with_its_place(folder, tmp_path, long):
    path = write_jsonl(tmp_path / "data" / "rows.jsonl", [*SHORT, long])
    with pytest.raises(DataError, match="longer than the 80 that fit") as error:
        open_stage("supervised_finetuning.py", *flags(folder, tmp_path, "--long_rows", "refuse"))
    assert [problem.place for problem in error.value.problems] == [(str(path), 4, 0)]
    assert f"{path}:4: " in str(error.value) and "--long_rows turns" in str(error.value)
    assert not (tmp_path / "out").exists()
    # Rows that cannot be used for other reasons do not let this one through.
    more = ("--long_rows", "refuse", "--skip_bad_rows", "True")
    with pytest.raises(DataError):
        open_stage("supervised_finetuning.py", *flags(folder, tmp_path, *more))


@pytest.mark.parametrize("packing", [False, True])
def test_left_out_and_counted(folder, tmp_path, packing):
    rows = [LONG_ANSWER, SHORT[0], LONG_LATER, *SHORT[1:], LONG_PROMPT]
    write_jsonl(tmp_path / "data" / "rows.jsonl", rows)
    opened = open_stage(
        "supervised_finetuning.py",
        *flags(folder, tmp_path, "--skip_long_rows", "True", "--packing", packing, "--num_train_epochs", 4),
    )
    end = opened.tokenizer.convert_tokens_to_ids("<|im_end|>")
    texts = "".join(opened.tokenizer.decode(row["input_ids"]) for row in opened.trainer.train_dataset)
    labels = [label for row in opened.trainer.train_dataset for label in row["labels"]]
    assert "y" not in texts.replace("Why", "")
    assert labels.count(end) == 3 and texts.count("<|im_end|>") == 6

    watch = Watch()
    opened.trainer.add_callback(watch)
    opened.finish()
    assert len(watch.losses) == len(watch.gradients) == opened.trainer.state.global_step > 3
    assert all(math.isfinite(value) and value > 0 for value in watch.losses + watch.gradients)
    assert all(torch.isfinite(parameter).all() for parameter in opened.trainer.model.parameters())
    (entry,) = read_json(tmp_path / "out" / "run.json")["data"]
    assert (entry["rows"], entry["used"], entry["left_out"]) == (6, 3, {"too long": 3})


def test_longest_row_that_fits_keeps_its_end(folder, tmp_path):
    write_jsonl(tmp_path / "data" / "rows.jsonl", [{"prompt": "Why?", "response": "y" * 30}])
    opened = open_stage("supervised_finetuning.py", *flags(folder, tmp_path))
    ids, labels = (opened.trainer.train_dataset[0][name] for name in ("input_ids", "labels"))
    end = opened.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert [label for label in labels if label != -100][-1] == end
    exact = flags(folder, tmp_path, "--model_max_length", len(ids))
    assert open_stage("supervised_finetuning.py", *exact).trainer.train_dataset[0]["input_ids"] == ids
    with pytest.raises(UserError, match="1 of 1 train rows are too long"):
        open_stage("supervised_finetuning.py", *flags(folder, tmp_path, "--model_max_length", len(ids) - 1))


def test_nothing_left_is_an_error(folder, tmp_path):
    write_jsonl(tmp_path / "data" / "rows.jsonl", [LONG_ANSWER, LONG_PROMPT])
    skip = ("--skip_long_rows", "True", "--max_long_rows", 1)
    done = run_program("supervised_finetuning.py", *flags(folder, tmp_path, *skip), check=False)
    assert done.returncode == 1
    assert "every training row was skipped" in done.stderr and "2 too long" in done.stderr
    assert not (tmp_path / "out").exists()


def test_long_document_goes_on_in_the_next_block(folder, tmp_path):
    texts = ["a" * 200, "b" * 10, "c" * 79, "d" * 80, "e" * 159]
    write_jsonl(tmp_path / "data" / "rows.jsonl", [{"text": text} for text in texts])
    opened = open_stage(
        "pretraining.py",
        *("--model_name_or_path", folder, "--train_file_dir", tmp_path / "data", "--output_dir", tmp_path / "out"),
        *("--block_size", LIMIT, "--packing", "False", "--sample_prompts", 0, "--save_strategy", "no"),
        *("--per_device_train_batch_size", 1, "--logging_steps", 1, "--num_train_epochs", 1),
    )
    end = opened.tokenizer.eos_token_id
    pieces = [row["input_ids"] for row in opened.trainer.train_dataset]
    assert [len(piece) for piece in pieces] == [80, 80, 41, 11, 80, 80, 1, 80, 80]
    assert [piece.count(end) for piece in pieces] == [0, 0, 1, 1, 1, 0, 1, 0, 1]
    assert all(piece[-1] == end for piece in pieces if end in piece)

    watch = Watch()
    opened.trainer.add_callback(watch)
    opened.trainer.train()
    # A piece of one token has no target, so its step teaches nothing and must not break anything either.
    assert len(watch.losses) == len(watch.gradients) == len(pieces)
    assert all(map(math.isfinite, watch.losses + watch.gradients))
    assert sum(value == 0 for value in watch.losses) == 1
