"""Rows for grpo_training.py, and a reward that writes down what it was given."""

from pathlib import Path
from typing import Any

from tests.helpers import Opened, open_stage, read_json, write_jsonl

STAGE = "grpo_training.py"
# Different answers mostly have different rewards, the same answer always the same.
REWARD_FILE = """
import json

def noted(prompts, completions, completion_ids, place, **columns):
    texts = [completion[-1]["content"] for completion in completions]
    rewards = [sum(map(ord, text)) % 7 / 7 for text in texts]
    kept = {name: value for name, value in columns.items() if isinstance(value, list)}
    rows = [dict(zip(kept, values)) for values in zip(*kept.values())]
    with open(FILE, "a", encoding="utf-8") as file:
        for row, *each in zip(rows, prompts, texts, completion_ids, place, rewards, strict=True):
            names = ("prompt", "text", "ids", "place", "reward")
            file.write(json.dumps({**row, **dict(zip(names, each, strict=True))}) + "\\n")
    return rewards
"""


def tasks(count: int, start: int = 0, **columns: Any) -> list[dict[str, Any]]:
    """Rows with questions of unlike lengths."""
    return [{"question": f"{n}? " + "?" * (n % 5), "answer": str(n), **columns} for n in range(start, start + count)]


def task_flags(model: str | Path, folder: Path, *more: Any) -> list[Any]:
    """Flags of a run on `folder`/data that leaves `folder`/out: four answers of up to eight tokens to each prompt."""
    (folder / "rewards.py").write_text(f"FILE = {str(folder / 'noted.jsonl')!r}\n{REWARD_FILE}", encoding="utf-8")
    return [
        *("--model_name_or_path", model, "--train_file_dir", folder / "data", "--output_dir", folder / "out"),
        *("--sample_prompts", 0, "--save_strategy", "no", "--dataloader_pin_memory", "False", "--logging_steps", 1),
        *("--num_generations", 4, "--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2),
        *("--max_completion_length", 8, "--system_prompt", "none"),
        *("--reward_funcs", "noted", "--reward_file", folder / "rewards.py", *more),
    ]


def open_tasks(model: str | Path, folder: Path, rows: list[Any], *more: Any) -> Opened:
    """Open the stage on these rows."""
    write_jsonl(folder / "data" / "rows.jsonl", rows)
    return open_stage(STAGE, *task_flags(model, folder, *more))


def first_batches(opened: Opened) -> list[dict[str, Any]]:
    """The batches of a first step, sampled and judged."""
    trainer = opened.trainer
    count = trainer.args.gradient_accumulation_steps
    return trainer.get_batch_samples(iter(trainer.get_train_dataloader()), count, trainer.args.device)[0]


def noted(folder: Path) -> list[dict[str, Any]]:
    """What the reward was given, answer by answer: prompt, text, ids, place, fields; and the reward it gave."""
    return read_json(folder / "noted.jsonl")
