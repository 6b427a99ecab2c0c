"""Held-out pairs are not trained on, and what is said of them depends on model and pairs, not on the batches."""

from medicalgpt.errors import UserError
from tests.helpers import open_stage, save_model, write_jsonl
from tests.silent.pairs import on_every_stage, pair, pairs, plain_losses, results, shake, stage_flags
from tests.tiny import tiny_tokenizer

import pytest
import torch


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("sf28"), tiny_tokenizer())


@pytest.mark.parametrize("use_peft", [True, False])
@on_every_stage
def test_metrics_do_not_depend_on_the_batch_size(model, tmp_path, stage, use_peft):
    write_jsonl(tmp_path / "data" / "train.jsonl", pairs(3, start=100))
    write_jsonl(tmp_path / "data" / "validation.jsonl", pairs(7))
    opened = open_stage(stage, *stage_flags(model, tmp_path, "--use_peft", use_peft))
    trainer = opened.trainer
    shake(trainer.model)
    found = []
    for size in (1, 3, 4, 16):
        trainer.args.per_device_eval_batch_size = size
        found.append(results(trainer.evaluate()))
    assert {"eval_loss", "eval_accuracy"} <= found[0].keys() or "eval_rewards/accuracies" in found[0]
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5, abs=1e-6)
    with torch.no_grad():
        expected = plain_losses(stage, opened, trainer.eval_dataset)
    assert found[0]["eval_loss"] == pytest.approx(expected.mean().item(), rel=1e-5)
    # The mean of the means of batches of four and three would be another number.
    assert abs(expected[:4].mean() - expected[4:].mean()) > 1e-3


# Rows whose prompt is the one that is trained on, whatever their answers are.
SAME_PROMPT = {
    "the same row": pair(1),
    "other answers": pair(1, 40, 41),
    "answers the other way round": pair(1, 5, 3),
    "another format": {"conversations": [{"from": "human", "value": " Question 1? "}], "chosen": "a", "rejected": "b"},
    "whole conversations": {
        side: [{"role": "user", "content": "Question 1?"}, {"role": "assistant", "content": side}]
        for side in ("chosen", "rejected")
    },
}


@pytest.mark.parametrize("same", SAME_PROMPT)
@on_every_stage
def test_prompt_on_both_sides_is_refused(model, tmp_path, stage, same):
    trained = write_jsonl(tmp_path / "data" / "train.jsonl", [pair(0), pair(1)])
    held_out = write_jsonl(tmp_path / "data" / "validation.jsonl", [pair(7), SAME_PROMPT[same]])
    with pytest.raises(UserError, match="1 of 2 held-out prompts are also trained on") as error:
        open_stage(stage, *stage_flags(model, tmp_path))
    assert f"{held_out}:2 has the prompt of {trained}:2" in str(error.value)
    assert "--allow_overlap True" in str(error.value) and not (tmp_path / "out").exists()
    opened = open_stage(stage, *stage_flags(model, tmp_path, "--allow_overlap", "True"))
    assert len(opened.trainer.eval_dataset) == 2


@on_every_stage
def test_pairs_of_one_prompt_are_not_split(model, tmp_path, stage):
    write_jsonl(tmp_path / "data" / "rows.jsonl", [pair(n // 3, 3 + n, 1 + n) for n in range(12)])
    opened = open_stage(stage, *stage_flags(model, tmp_path, "--validation_split_percentage", 30))
    sides = [
        {tuple(ids) for ids in dataset["prompt_ids"]}
        for dataset in (opened.trainer.train_dataset, opened.trainer.eval_dataset)
    ]
    assert len(sides[0]) == 3 and len(sides[1]) == 1 and not sides[0] & sides[1]
