"""What tests of PPO share: a policy, a reward model, prompts of unlike lengths, and the stage opened on them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.helpers import Opened, open_stage, save_model, write_jsonl
from tests.tiny import tiny_tokenizer

import torch
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForSequenceClassification

STAGE = "ppo_training.py"


def save_reward_model(path: str | Path, tokenizer: PreTrainedTokenizerBase | None = None, seed: int = 5) -> str:
    """Save a reward model of two layers with random weights beside its tokenizer; returns the folder as a string."""
    tokenizer = tokenizer or tiny_tokenizer()
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=4096,
        initializer_range=0.1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        num_labels=1,
    )
    Qwen3ForSequenceClassification(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def prompts(count: int, start: int = 0) -> list[dict[str, str]]:
    """Rows of unlike lengths."""
    return [{"prompt": f"Question {n}?" + "!" * (7 * n % 23)} for n in range(start, start + count)]


def make_place(folder: Path, rows: Iterable[Any] | None = None) -> Path:
    """A policy, a reward model, and eight prompts (or `rows`) below `folder`; returns it."""
    save_model(folder / "policy", tiny_tokenizer())
    save_reward_model(folder / "rm")
    write_jsonl(folder / "data" / "rows.jsonl", prompts(8) if rows is None else rows)
    return folder


def ppo_flags(place: Path, output: Path, *more: Any) -> list[Any]:
    """Flags of a run of short answers, without samples and checkpoints, that leaves `output`."""
    return [
        *("--sft_model_path", place / "policy", "--reward_model_path", place / "rm", "--output_dir", output),
        *("--train_file_dir", place / "data", "--response_length", 5, "--num_mini_batches", 2, "--num_ppo_epochs", 2),
        *("--per_device_train_batch_size", 2, "--learning_rate", 0.01, "--max_steps", 2, "--logging_steps", 1),
        *("--sample_prompts", 0, "--save_strategy", "no", *more),
    ]


def open_ppo(place: Path, output: Path, *more: Any) -> Opened:
    """The stage stopped before training."""
    return open_stage(STAGE, *ppo_flags(place, output, *more))
