"""A reference or a reward model gets the same fit as the policy: a row for each token, the padding included."""

import math

from medicalgpt.models.hub import Checkpoint
from medicalgpt.rewards.scoring import RewardScorer
from tests.helpers import open_stage, write_jsonl
from tests.tiny import make_tiny, tiny_tokenizer

import pytest
import torch
from transformers import AutoModelForSequenceClassification

PAIRS = [
    {"conversations": [{"from": "human", "value": "Hm? " * n}], "chosen": "Yes. " * n, "rejected": "No."}
    for n in (1, 3, 5, 7)
]


def without_row_for_padding(folder: str) -> str:
    """Let the tokenizer of a model pad with a token that the embedding has no row for; no text contains it."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<|padding|>"})
    assert tokenizer.pad_token_id == len(tokenizer) - 1
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("peft", [True, False])
def test_a_reference_without_a_row_for_padding(tmp_path, peft):
    policy, reference = (without_row_for_padding(make_tiny(tmp_path / name)) for name in ("policy", "reference"))
    opened = open_stage(
        "dpo_training.py",
        *("--model_name_or_path", policy, "--reference_model", reference, "--use_peft", peft),
        *("--train_file_dir", write_jsonl(tmp_path / "pairs.jsonl", PAIRS), "--output_dir", tmp_path / "out"),
        *("--max_steps", 1, "--logging_steps", 1, "--per_device_train_batch_size", 4, "--save_strategy", "no"),
        *("--sample_prompts", 0, "--dataloader_pin_memory", "False"),
    )
    opened.finish()
    # Both are the same weights, but for a row that no text reads.
    losses = [line["loss"] for line in opened.trainer.state.log_history if "loss" in line]
    assert losses == [pytest.approx(math.log(2), abs=1e-5)]


def test_the_reference_has_the_type_of_a_policy_that_is_trained_in_full(tmp_path, monkeypatch):
    """On a GPU the default is float32 for the policy then, and would be bfloat16 for the reference."""
    monkeypatch.setattr("medicalgpt.models.loading.bf16_gpu", lambda: True)
    policy = make_tiny(tmp_path / "policy")
    opened = open_stage(
        "dpo_training.py",
        *("--model_name_or_path", policy, "--reference_model", policy, "--use_peft", "False"),
        *("--train_file_dir", write_jsonl(tmp_path / "pairs.jsonl", PAIRS), "--output_dir", tmp_path / "out"),
    )
    types = {model.dtype for model in (opened.trainer.model, opened.trainer.ref_model)}
    assert types == {torch.float32}


def test_a_reward_model_without_a_row_for_padding(tmp_path):
    folder = make_tiny(tmp_path / "rm")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    without_row_for_padding(folder)
    model.config.pad_token_id = None
    model.save_pretrained(folder)
    scorer = RewardScorer.from_checkpoint(Checkpoint.resolve(folder))
    talks = [[{"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "Yes. " * n}] for n in (1, 9)]
    together, alone = scorer.score(talks), [scorer.score([talk])[0] for talk in talks]
    assert together == pytest.approx(alone, abs=1e-5)
