"""Each process answers prompts of its own, and two of them do together what one does alone."""

import os

from medicalgpt.readers.problems import place_of
from tests.helpers import ROOT, read_json, run_program, write_jsonl
from tests.silent.ppo import make_place, open_ppo, prompts

import pytest
import torch
from safetensors.torch import load_file

TRAIN, STEPS = 12, 3
# One update of a step's answers at a time, since each process mixes its own ones.
COMMON = ("--num_mini_batches", 1, "--max_steps", STEPS, "--eval_strategy", "steps", "--eval_steps", STEPS)
# Answers in a batch of two processes each, and flags.
RUNS = {
    "lora": (2, ["--normalize_scores", "True", "--target_reference_kl", 0.05, "--kl_horizon", 20]),
    "all weights": (2, ["--use_peft", "False", "--learning_rate", 1e-3]),
    # After the second of three updates, the policy has moved.
    "accumulated": (1, ["--gradient_accumulation_steps", 2, "--target_kl", 1e-9, "--num_ppo_epochs", 3]),
}
# Makes all runs, one after the other, and notes which prompts each process answers.
DRIVER = """
import json, os, sys
from pathlib import Path
from medicalgpt.errors import run_main
from tests.silent.test_sf_20_ppo_ranks import RUNS, run

place = Path(sys.argv[1])

def main():
    for name in RUNS:
        found = run(place, place / "two" / name, name)
        (place / f"{name}-{os.environ['RANK']}.json").write_text(json.dumps(found))

run_main(main)
"""


def run(place, output, name, processes=2):
    """Train; returns the prompts of each step on this process, and all that was logged."""
    batch, flags = RUNS[name]
    trainer = open_ppo(
        place,
        output,
        *("--validation_file_dir", place / "held-out", "--per_device_train_batch_size", 2 * batch // processes),
        *(*COMMON, *flags),
    ).trainer
    seen, answer = [], trainer.answer

    def noting(rows, temperature, **kwargs):
        if temperature:
            seen.append([trainer.tasks[place_of(row)]["messages"][-1]["content"] for row in rows])
        return answer(rows, temperature, **kwargs)

    trainer.answer = noting
    trainer.train()
    trainer.save_model(str(output / "result"))
    return {"seen": seen, "logs": trainer.state.log_history}


def asked_by_step(*ranks):
    return [sorted(question for step in steps for question in step) for steps in zip(*ranks, strict=True)]


def ranks_of(place, name):
    return [read_json(place / f"{name}-{rank}.json") for rank in range(2)]


TIMES = ("_runtime", "_per_second")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = make_place(tmp_path_factory.mktemp("sf20"), prompts(TRAIN))
    # Three that two processes cannot share evenly.
    write_jsonl(folder / "held-out" / "rows.jsonl", prompts(3, start=50))
    (folder / "driver.py").write_text(DRIVER)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    run_program(folder / "driver.py", folder, processes=2, env={"PYTHONPATH": path})
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_each_epoch_is_shared_out_and_complete(place, name):
    ranks = [rank["seen"] for rank in ranks_of(place, name)]
    assert [[len(step) for step in rank] for rank in ranks] == [[2] * STEPS] * 2
    everything = [question for rank in ranks for step in rank for question in step]
    assert sorted(everything) == sorted(row["prompt"] for row in prompts(TRAIN))


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_do_what_one_does(place, tmp_path, name):
    """With the same answers a step, in batches as large as both together."""
    alone = run(place, tmp_path, name, processes=1)
    assert asked_by_step(alone["seen"]) == asked_by_step(*(rank["seen"] for rank in ranks_of(place, name)))
    expected = [{key: value for key, value in log.items() if not key.endswith(TIMES)} for log in alone["logs"]]
    assert len(expected) == STEPS + 3
    for rank in ranks_of(place, name):
        for found, wanted in zip(rank["logs"], expected, strict=True):
            assert {key: found[key] for key in wanted} == pytest.approx(wanted, rel=1e-3, abs=2e-5)
    if name == "accumulated":
        assert [log["updates"] for log in expected if "updates" in log] == [pytest.approx(2 / 3)] * STEPS
    ours, theirs = (
        load_file(next((folder / "result").glob("*model.safetensors"))) for folder in (tmp_path, place / "two" / name)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(weight, theirs[key], atol=2e-4) for key, weight in ours.items())
