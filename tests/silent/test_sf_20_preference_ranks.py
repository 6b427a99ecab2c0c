"""Processes share the pairs: none is doubled, none is missing, no answer is without the other one of its pair."""

import os

from tests.helpers import ROOT, open_stage, read_json, run_program, save_model, write_jsonl
from tests.silent.pairs import STAGES, on_every_stage, pairs, results, shake, stage_flags
from tests.tiny import tiny_tokenizer

import pytest

TRAIN, BATCH, STEPS = 12, 3, 4
# Runs all stages, one after the other, and notes what each process trains on.
DRIVER = """
import json, os, sys
from pathlib import Path
from medicalgpt.errors import run_main
from tests.helpers import open_stage
from tests.silent.pairs import STAGES, results, shake
from tests.silent.test_sf_20_preference_ranks import flags

place = Path(sys.argv[1])

def main():
    for stage in STAGES:
        opened = open_stage(stage, *flags(place, stage))
        seen, training_step = [], opened.trainer.training_step

        def noting(model, inputs, *args, **kwargs):
            mask = inputs["attention_mask"].bool()
            seen.append([opened.tokenizer.decode(row[real]) for row, real in zip(inputs["input_ids"], mask)])
            return training_step(model, inputs, *args, **kwargs)

        opened.trainer.training_step = noting
        opened.trainer.train()
        shake(opened.trainer.accelerator.unwrap_model(opened.trainer.model))
        found = {"steps": opened.trainer.state.global_step, "seen": seen, "eval": results(opened.trainer.evaluate())}
        (place / f"{stage}-{os.environ['RANK']}.json").write_text(json.dumps(found))

run_main(main)
"""


def flags(place, stage):
    # A rate of next to nothing, so that evaluations after it can be compared.
    return stage_flags(
        place / "model",
        place,
        *("--max_steps", STEPS, "--per_device_train_batch_size", BATCH, "--learning_rate", 1e-12),
        *("--per_device_eval_batch_size", 2, "--logging_steps", 1, "--output_dir", place / f"out-{stage}"),
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sf20")
    save_model(folder / "model", tiny_tokenizer())
    write_jsonl(folder / "data" / "train.jsonl", pairs(TRAIN))
    # In batches of two over two processes, the last one is filled up with pairs seen already.
    write_jsonl(folder / "data" / "validation.jsonl", pairs(7, start=50))
    (folder / "driver.py").write_text(DRIVER)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    run_program(folder / "driver.py", folder, processes=2, env={"PYTHONPATH": path})
    return folder


@on_every_stage
def test_each_epoch_is_shared_out_and_complete(place, stage):
    ranks = [read_json(place / f"{stage}-{rank}.json") for rank in range(2)]
    assert [rank["steps"] for rank in ranks] == [STEPS, STEPS]
    for epoch in range(2):
        batches = [batch for rank in ranks for batch in rank["seen"][2 * epoch : 2 * epoch + 2]]
        assert [len(batch) for batch in batches] == [2 * BATCH] * 4
        asked = [
            [text.partition("Question ")[2].partition("?")[0] for text in half]
            for batch in batches
            for half in (batch[:BATCH], batch[BATCH:])
        ]
        # The chosen answers come first, the rejected ones to the same questions after them.
        assert asked[0::2] == asked[1::2]
        assert sorted(int(number) for half in asked[0::2] for number in half) == list(range(TRAIN))
        texts = [text for batch in batches for text in batch]
        assert len(set(texts)) == 2 * TRAIN
    assert ranks[0]["seen"][:2] != ranks[0]["seen"][2:]


@on_every_stage
def test_evaluation_is_that_of_one_process(place, tmp_path, stage):
    ranks = [read_json(place / f"{stage}-{rank}.json")["eval"] for rank in range(2)]
    opened = open_stage(stage, *flags(place, stage), "--output_dir", tmp_path)
    shake(opened.trainer.model)
    expected = results(opened.trainer.evaluate())
    for found in ranks:
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_all_stages_are_here():
    assert len(STAGES) == 3
