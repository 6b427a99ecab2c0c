"""Processes share the prompts: the answers of a group may be on two of them, and their rewards are compared as one."""

import os

from tests.helpers import ROOT, open_stage, read_json, run_program, write_jsonl
from tests.silent.tasks import STAGE, noted, task_flags, tasks
from tests.tiny import make_tiny

import pytest
import torch

PROMPTS, STEPS = 6, 4
DRIVER = """
import json, os, sys
from pathlib import Path
from unittest.mock import patch
from medicalgpt.errors import run_main
from tests.helpers import open_stage
from tests.silent.tasks import STAGE
from tests.silent.test_sf_20_grpo_ranks import flags, trained

place = Path(sys.argv[1])

def main():
    # Each process notes what its rewards see in a folder of its own, so the processes are not told the same.
    with patch("medicalgpt.training.runs.compare_start"):
        found = trained(open_stage(STAGE, *flags(place, f"rank{os.environ['RANK']}")))
    (place / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))

run_main(main)
"""


def flags(place, name):
    (place / name).mkdir(exist_ok=True)
    # Three answers of six on each process: three prompts in a step, the second one shared by both.
    batch = ("--num_generations", 4, "--per_device_train_batch_size", 3, "--gradient_accumulation_steps", 2)
    more = ("--max_steps", STEPS, "--per_device_eval_batch_size", 2, "--beta", 0.1)
    shared = ("--train_file_dir", place / "data", "--output_dir", place / f"out-{name[:4]}")
    return [*task_flags(place / "model", place / name), *shared, *batch, *more]


def trained(opened):
    """What a process trains on, step by step, and what it finds in the evaluation before and after."""
    trainer, steps = opened.trainer, []
    before = results(trainer.evaluate())
    fetch = trainer.get_batch_samples

    def noting(*args):
        batches, count = fetch(*args)
        steps.append([])
        for batch in batches:
            for ids, mask, advantage in zip(
                batch["completion_ids"], batch["completion_mask"], batch["advantages"], strict=True
            ):
                steps[-1].append([ids[mask.bool()].tolist(), advantage.item()])
        return batches, count

    trainer.get_batch_samples = noting
    trainer.train()
    return {"steps": steps, "before": before, "after": results(trainer.evaluate())}


def results(metrics):
    names = ("reward", "rewards/noted/mean", "completions/mean_length", "completions/clipped_ratio")
    return {name: metrics[f"eval_{name}"] for name in names}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sf20")
    make_tiny(folder / "model")
    write_jsonl(folder / "data" / "train.jsonl", tasks(PROMPTS))
    # In batches of two over two processes, the last one is filled up with a prompt answered already.
    write_jsonl(folder / "data" / "validation.jsonl", tasks(7, start=50))
    (folder / "driver.py").write_text(DRIVER)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    run_program(folder / "driver.py", folder, processes=2, env={"PYTHONPATH": path})
    return folder


def judged(place, rank):
    """What the reward was given in training: the evaluations before and after it have 4 rows each."""
    rows = noted(place / f"rank{rank}")
    return rows[4:-4]


def test_each_epoch_is_shared_out_and_complete(place):
    ranks = [judged(place, rank) for rank in range(2)]
    assert [len(rows) for rows in ranks] == [6 * STEPS] * 2
    for step in range(STEPS):
        # What is sampled at a time is the first process's part before the second one's.
        rows = [row for rank in ranks for row in rank[6 * step : 6 * step + 6]]
        groups = [rows[start : start + 4] for start in range(0, 12, 4)]
        assert [len({row["place"] for row in group}) for group in groups] == [1, 1, 1]
        # Each process draws answers of its own.
        assert all(len({tuple(row["ids"]) for row in group}) == 4 for group in groups)
        rewards = torch.tensor([[row["reward"] for row in group] for group in groups])
        advantages = (rewards - rewards.mean(dim=1, keepdim=True)) / (rewards.std(dim=1, keepdim=True) + 1e-4)
        wanted = sorted(zip([row["ids"] for row in rows], advantages.flatten().tolist(), strict=True))
        found = [read_json(place / f"rank{rank}.json")["steps"][step] for rank in range(2)]
        assert [len(each) for each in found] == [6, 6]
        assert sorted(map(tuple, found[0] + found[1])) == [(ids, pytest.approx(one, abs=1e-5)) for ids, one in wanted]
    for epoch in range(2):
        rows = [row for rank in ranks for row in rank[12 * epoch : 12 * epoch + 12]]
        assert {row["answer"] for row in rows} == set(map(str, range(PROMPTS)))


def test_evaluation_is_that_of_one_process(place, tmp_path):
    ranks = [read_json(place / f"rank{rank}.json") for rank in range(2)]
    opened = open_stage(STAGE, *flags(place, "alone"), "--output_dir", tmp_path, "--gradient_accumulation_steps", 4)
    expected = results(opened.trainer.evaluate())
    assert [rank["before"] for rank in ranks] == [pytest.approx(expected)] * 2
    assert ranks[0]["after"] == ranks[1]["after"]
    assert len(noted(place / "alone")) == 7
