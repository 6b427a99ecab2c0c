"""A pair that does not fit is refused, or left out and counted, never cut: both answers are seen up to their ends."""

import math

from medicalgpt.errors import UserError
from medicalgpt.readers.problems import DataError
from tests.helpers import read_json, save_model
from tests.silent.callbacks import Watch
from tests.silent.pairs import on_every_stage, open_pairs, pair
from tests.tiny import tiny_tokenizer

import pytest
import torch

LIMIT = 80
SHORT = [pair(n, n, 30 - 7 * n) for n in (1, 2, 4)]
LONG = {
    "prompt": {"prompt": "z" * 100, "chosen": "So.", "rejected": "No."},
    "chosen": {"prompt": "Why?", "chosen": "z" * 100, "rejected": "No."},
    "rejected": {"prompt": "Why?", "chosen": "So.", "rejected": "z" * 100},
    "both": {"prompt": "Why?", "chosen": "z" * 100, "rejected": "z" * 101},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("sf09"), tiny_tokenizer())


FLAGS = ("--model_max_length", LIMIT, "--logging_steps", 1, "--per_device_train_batch_size", 2)


@pytest.mark.parametrize("long", LONG)
@on_every_stage
def test_refused_with_its_place(model, tmp_path, stage, long):
    # Rows that cannot be used for other reasons do not let this one through.
    for more in ((), ("--skip_bad_rows", "True")):
        with pytest.raises(DataError, match="longer than the 80 that fit") as error:
            open_pairs(stage, model, tmp_path, [*SHORT, LONG[long]], *FLAGS, "--long_rows", "refuse", *more)
    (problem,) = error.value.problems
    assert problem.place == (str(tmp_path / "data" / "rows.jsonl"), 4, 0)
    assert str(error.value).endswith("skip and count what does not fit: --long_rows turns.")
    assert f"the {'rejected' if long == 'rejected' else 'chosen'} answer: " in problem.reason
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flag", "limit", "kept"),
    [("--max_source_length", 32, [1, 2]), ("--max_target_length", 17, [2, 4])],
)
@on_every_stage
def test_limits_of_one_side(model, tmp_path, stage, flag, limit, kept):
    rows = [*SHORT[:2], {**SHORT[2], "prompt": f"Question 4?{'.' * (20 if 'source' in flag else 0)}"}]
    with pytest.raises(DataError, match=f"more than {flag} {limit}"):
        open_pairs(stage, model, tmp_path, rows, flag, limit, "--skip_long_rows", "False")
    opened = open_pairs(stage, model, tmp_path, rows, flag, limit)
    texts = [opened.tokenizer.decode(ids) for ids in opened.trainer.train_dataset["prompt_ids"]]
    assert [int(text.split("Question ")[1].split("?")[0]) for text in texts] == kept


@on_every_stage
def test_left_out_and_counted_and_the_others_whole(model, tmp_path, stage):
    rows = [LONG["chosen"], SHORT[0], LONG["rejected"], *SHORT[1:], LONG["prompt"], LONG["both"]]
    opened = open_pairs(
        *(stage, model, tmp_path, rows, *FLAGS, "--skip_long_rows", "True", "--max_long_rows", 0.6),
        *("--num_train_epochs", 4, "--use_peft", "False"),
    )
    trainer, tokenizer = opened.trainer, opened.tokenizer
    watch, seen, training_step = Watch(), [], trainer.training_step

    def noting(model, inputs, *args, **kwargs):
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            seen.append(tokenizer.decode(ids[mask.bool()]))
        return training_step(model, inputs, *args, **kwargs)

    trainer.training_step = noting
    trainer.add_callback(watch)
    opened.finish()

    head = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>"
    wanted = [head.format(row["prompt"], row[name]) for row in SHORT for name in ("chosen", "rejected")]
    assert sorted(seen) == sorted(wanted * 4)
    assert len(watch.losses) == len(watch.gradients) == trainer.state.global_step == 8
    assert all(math.isfinite(value) and value > 0 for value in watch.losses + watch.gradients)
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())
    (entry,) = read_json(tmp_path / "out" / "run.json")["data"]
    assert (entry["rows"], entry["used"], entry["left_out"]) == (7, 3, {"too long": 4})


@on_every_stage
def test_nothing_left_is_an_error(model, tmp_path, stage):
    with pytest.raises(UserError, match="every training row was skipped"):
        open_pairs(
            stage, model, tmp_path, list(LONG.values()), *FLAGS, "--skip_long_rows", "True", "--max_long_rows", 1
        )
    assert not (tmp_path / "out").exists()
