"""PPO learns from the probabilities that its answers were drawn with: at the first inner step every ratio is 1."""

import json

from tests.helpers import read_json
from tests.silent.ppo import make_place, open_ppo

import pytest
import torch

# One update a step, so that all of it is the first inner step.
FIRST = ("--num_ppo_epochs", 1, "--num_mini_batches", 1, "--max_steps", 3, "--per_device_train_batch_size", 4)
CASES = {
    "lora": [],
    "all weights": ["--use_peft", "False"],
    "four bits": ["--load_in_4bit", "True", "--qlora", "True"],
    "on an adapter": ["--peft_path", "adapter"],
    "temperature": ["--temperature", 0.7],
    "checkpointing": ["--gradient_checkpointing", "True"],
    "accumulated": ["--gradient_accumulation_steps", 2, "--per_device_train_batch_size", 2],
    "in small parts": ["--rollout_forward_batch_size", 3],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """With an adapter of the policy, which PPO itself has made."""
    folder = make_place(tmp_path_factory.mktemp("sf17"))
    open_ppo(folder, folder / "adapter", "--learning_rate", 0.05).finish()
    return folder


def metrics(place, output, case):
    flags = [place / flag if flag == "adapter" else flag for flag in CASES[case]]
    open_ppo(place, output, *FIRST, *flags).finish()
    return [row for row in read_json(output / "metrics.jsonl") if "loss" in row]


@pytest.mark.parametrize("case", CASES)
def test_the_first_ratio_is_1_and_the_first_kl_0(place, tmp_path, case):
    rows = metrics(place, tmp_path, case)
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert row["ratio"] == pytest.approx(1, abs=1e-5) and row["policy_kl"] < 1e-9
        assert row["clip_fraction"] == row["value_clip_fraction"] == 0
        assert row["sampling_gap"] < 1e-4
    assert abs(rows[0]["kl"]) < 1e-6 and abs(rows[2]["kl"]) > 1e-4


def test_each_ratio_is_1(place, tmp_path):
    """Not only their mean; and after the update they are not 1 any more."""
    constant = ("--lr_scheduler_type", "constant")
    trainer = open_ppo(place, tmp_path, *FIRST, *constant, "--temperature", 0.7).trainer
    trainer.train()
    rollout, _ = trainer.roll_out(5)
    for _ in range(2):
        trainer.model.train()
        log_probs, _, _ = trainer.model(rollout.input_ids, rollout.attention_mask, rollout.answer_mask)
        ratios = torch.exp(log_probs - rollout.log_probs)[rollout.answer_mask]
        if not (far := (ratios - 1).abs().max().item() > 1e-5):
            trainer.learn(trainer.model_wrapped, rollout)
    assert far


def test_answers_from_other_probabilities_show(place, tmp_path, capsys):
    """A model that may not write half of its tokens draws from the other half, of which the trainer knows nothing."""
    policy = tmp_path / "policy"
    (tmp_path / "rm").symlink_to(place / "rm")
    (tmp_path / "data").symlink_to(place / "data")
    policy.mkdir()
    for file in (place / "policy").iterdir():
        (policy / file.name).write_bytes(file.read_bytes())
    settings = read_json(policy / "generation_config.json") | {"suppress_tokens": list(range(0, 256, 2))}
    (policy / "generation_config.json").write_text(json.dumps(settings))
    open_ppo(tmp_path, tmp_path / "out", *FIRST).finish()
    rows = [row for row in read_json(tmp_path / "out" / "metrics.jsonl") if "loss" in row]
    assert all(row["sampling_gap"] > 0.3 for row in rows)
    assert "suppress_tokens in the model's generation_config.json" in capsys.readouterr().err
