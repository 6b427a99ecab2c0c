"""Processes share the rows of a streamed corpus: none is doubled, none is missing, and all take equally many steps."""

import os
import random
import shutil

from tests.helpers import ROOT, read_json, run_program, write_jsonl
from tests.tiny import make_tiny

import pytest

ROWS, BATCH, STEPS = 40, 5, 8
# Runs a stage and notes what each process trains on.
DRIVER = """
import json, os, sys
from medicalgpt.errors import run_main
from tests.helpers import open_stage

def main():
    opened = open_stage("supervised_finetuning.py", *sys.argv[2:])
    seen, training_step = [], opened.trainer.training_step

    def noting(model, inputs, *args, **kwargs):
        mask = inputs["attention_mask"].bool()
        seen.append([opened.tokenizer.decode(row[real]) for row, real in zip(inputs["input_ids"], mask)])
        return training_step(model, inputs, *args, **kwargs)

    opened.trainer.training_step = noting
    opened.finish()
    with open(f"{sys.argv[1]}-{os.environ['RANK']}.json", "w") as file:
        json.dump({"steps": opened.trainer.state.global_step, "seen": seen}, file)

run_main(main)
"""


def run(place, output, *more):
    """What each of two processes has trained on: (processes, steps, rows)."""
    flags = [
        *("--model_name_or_path", place / "model", "--train_file_dir", place / "data", "--output_dir", place / output),
        *("--streaming", "True", "--skip_long_rows", "True", "--shuffle_buffer", 10, "--max_steps", STEPS),
        *("--per_device_train_batch_size", BATCH, "--save_steps", 4, "--logging_steps", 1, "--sample_prompts", 0),
        *("--dataloader_pin_memory", "False", "--lora_dropout", 0, *more),
    ]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    run_program(place / "driver.py", place / output, *flags, processes=2, env={"PYTHONPATH": path})
    return [read_json(f"{place / output}-{rank}.json") for rank in range(2)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder, draw = tmp_path_factory.mktemp("sf20"), random.Random(0)
    make_tiny(folder / "model")
    rows = [{"prompt": f"Question {n}?", "response": "x" * draw.randint(1, 30)} for n in range(ROWS)]
    write_jsonl(folder / "data" / "a.jsonl", rows[:25])
    write_jsonl(folder / "data" / "b.jsonl", rows[25:])
    (folder / "driver.py").write_text(DRIVER)
    return folder


@pytest.fixture(scope="module")
def whole(place):
    return run(place, "whole")


def test_each_epoch_is_shared_out_and_complete(place, whole):
    assert [rank["steps"] for rank in whole] == [STEPS, STEPS]
    for epoch in range(2):
        steps = slice(4 * epoch, 4 * epoch + 4)
        found = [text for rank in whole for batch in rank["seen"][steps] for text in batch]
        assert len(found) == len(set(found)) == ROWS
    assert whole[0]["seen"][:4] != whole[0]["seen"][4:]


def test_run_json_counts_the_rows_of_all(place, whole):
    seen = read_json(place / "whole" / "run.json")["streamed"]
    assert 1.95 < seen.pop("epochs") <= 2
    assert seen == {"epochs_begun": 2, "rows": 80, "used": 80, "left_out": {}, "samples": 80}


def test_each_process_goes_on_with_its_own_rows(place, whole):
    shutil.copytree(place / "whole", place / "again")
    shutil.rmtree(place / "again" / "checkpoint-8")
    again = run(place, "again", "--resume_from_checkpoint", "True")
    assert [rank["seen"] for rank in again] == [rank["seen"][4:] for rank in whole]
    losses = [
        [row["loss"] for row in read_json(place / name / "metrics.jsonl") if "loss" in row]
        for name in ("whole", "again")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
