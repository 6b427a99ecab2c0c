"""PPO that was stopped and resumed is PPO that was never stopped: answers, metrics, weights, all that it adapts."""

import shutil

from medicalgpt.errors import UserError
from tests.helpers import commit, read_json, write_jsonl
from tests.silent.callbacks import Kill
from tests.silent.ppo import make_place, open_ppo, prompts

import pytest
import torch
from safetensors.torch import load_file

STEPS = 5
CASES = {
    "plain": [],
    "all weights": ["--use_peft", "False", "--learning_rate", 1e-3],
    "normalized scores, adaptive KL, another rate of the critic": [
        *("--normalize_scores", "True", "--target_reference_kl", 0.05, "--kl_horizon", 20),
        *("--critic_learning_rate", 0.02),
    ],
    "dropout": ["--disable_dropout", "False", "--lora_dropout", 0.2],
    "on an adapter, accumulated": ["--peft_path", "adapter", "--gradient_accumulation_steps", 2],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    # Steps of four prompts: the checkpoint after the third lies in the middle of the second epoch.
    folder = make_place(tmp_path_factory.mktemp("sf19"), prompts(7))
    open_ppo(folder, folder / "adapter", "--learning_rate", 0.05).finish()
    write_jsonl(folder / "held-out" / "rows.jsonl", prompts(3, start=50))
    return folder


def opened(place, output, case, *more):
    flags = [place / flag if flag == "adapter" else flag for flag in CASES[case]]
    return open_ppo(
        place,
        output,
        *("--max_steps", STEPS, "--save_strategy", "steps", "--save_steps", 3, "--sample_prompts", 2),
        *("--validation_file_dir", place / "held-out", "--eval_strategy", "steps", "--eval_steps", 5, *flags, *more),
    )


def left(folder):
    """Metrics without times, sample answers, and weights."""
    timed = ("seconds", "eval_runtime", "train_runtime")
    rows = [row for row in read_json(folder / "metrics.jsonl") if "loss" in row or "eval_score" in row]
    rows = [{name: value for name, value in row.items() if name not in timed} for row in rows]
    (weights,) = folder.glob("*model.safetensors")
    return rows, read_json(folder / "answers.jsonl"), load_file(weights)


@pytest.mark.parametrize("case", CASES)
def test_stopped_and_resumed_equals_never_stopped(place, tmp_path, case):
    opened(place, tmp_path / "whole", case).finish()
    run = opened(place, tmp_path / "stopped", case)
    run.trainer.add_callback(Kill(4))
    with pytest.raises(KeyboardInterrupt):
        run.finish()
    opened(place, tmp_path / "stopped", case, "--resume_from_checkpoint", "True").finish()
    metrics, answers, weights = left(tmp_path / "whole")
    resumed_metrics, resumed_answers, resumed_weights = left(tmp_path / "stopped")
    trained = [row for row in metrics if "loss" in row]
    assert [row["step"] for row in trained] == list(range(1, STEPS + 1))
    assert len({row["loss"] for row in trained}) == STEPS
    resumed_trained = [row for row in resumed_metrics if "loss" in row]
    assert resumed_trained == [pytest.approx(row, rel=1e-6, abs=1e-7, nan_ok=True) for row in trained]
    evaluated, again = ([row for row in rows if "eval_score" in row][-1] for rows in (metrics, resumed_metrics))
    assert again == pytest.approx(evaluated, rel=1e-6)
    assert [row["step"] for row in answers] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert resumed_answers == answers
    assert weights.keys() == resumed_weights.keys()
    assert all(torch.equal(weight, resumed_weights[name]) for name, weight in weights.items())
    if "adaptive" in case:
        assert len({row["kl_coef"] for row in trained}) == STEPS


def test_a_checkpoint_of_other_weights_is_refused(place, tmp_path):
    opened(place, tmp_path / "out", "plain").finish()
    shutil.rmtree(tmp_path / "out" / "checkpoint-5", ignore_errors=True)
    more = ("--target_modules", "q_proj", "--resume_from_checkpoint", "True")
    with pytest.raises(UserError, match="--target_modules q_proj .before: all."):
        opened(place, tmp_path / "out", "plain", *more)
    # A checkpoint that does not say with which flags it was made.
    checkpoint = tmp_path / "out" / "checkpoint-3"
    for record in (checkpoint / "run.json", tmp_path / "out" / "run.json"):
        record.write_text("{}")
    commit(checkpoint)
    run = opened(place, tmp_path / "out", "plain", *more)
    with pytest.raises(UserError, match="saved by a run that trained other weights than these flags do"):
        run.finish()
