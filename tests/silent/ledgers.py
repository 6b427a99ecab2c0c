"""Which rows a run trains on in each step, whatever the stage, and how it ends: for tests of the order of rows."""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from medicalgpt.data.encoding import IGNORED
from medicalgpt.training.row_order import is_filler
from tests.helpers import Opened, open_stage, save_model, write_jsonl
from tests.ranks import run_ranks
from tests.silent.callbacks import Kill
from tests.silent.pairs import pair
from tests.silent.ppo import save_reward_model
from tests.silent.tasks import task_flags
from tests.tiny import tiny_tokenizer

import torch
from safetensors.torch import load_file

STAGES = {
    "pt": "pretraining.py",
    "sft": "supervised_finetuning.py",
    "rm": "reward_modeling.py",
    "dpo": "dpo_training.py",
    "orpo": "orpo_training.py",
    "ppo": "ppo_training.py",
    "grpo": "grpo_training.py",
}
LEARN = ("--learning_rate", 0.01, "--lora_dropout", 0, "--logging_steps", 1, "--sample_prompts", 0)


def make_rows(folder: Path, count: int) -> Path:
    """A model, a reward model, and rows of unlike lengths for every stage, numbered so that they can be recognized."""
    save_model(folder / "model", tiny_tokenizer())
    save_reward_model(folder / "rm")
    for side, numbers in (("data", range(count)), ("held-out", range(count, count + 7))):
        for stage, rows in _rows_of(numbers).items():
            write_jsonl(folder / side / stage / "rows.jsonl", rows)
    return folder


def _rows_of(numbers: range) -> dict[str, list[dict[str, Any]]]:
    rows = {
        "pt": [{"text": f"Question {n}?" + "y" * (1 + 17 * n % 41)} for n in numbers],
        "sft": [{"prompt": f"Question {n}?", "response": "y" * (1 + 17 * n % 41)} for n in numbers],
        "rm": [pair(n, 1 + 17 * n % 41, 2 + 29 * n % 37) for n in numbers],
        "ppo": [{"prompt": f"Question {n}?" + "!" * (7 * n % 23)} for n in numbers],
        "grpo": [{"question": f"Question {n}?" + "!" * (7 * n % 23), "answer": str(n)} for n in numbers],
    }
    return rows | {"dpo": rows["rm"], "orpo": rows["rm"]}


def open_run(stage: str, place: Path, output: Path, *more: Any) -> Opened:
    """A stage on its rows, stopped before its first step."""
    data = () if "--prepared_dir" in more else ("--train_file_dir", place / "data" / stage)
    flags = [*data, "--output_dir", output, *LEARN]
    model = ("--sft_model_path" if stage == "ppo" else "--model_name_or_path", place / "model")
    if stage == "pt":
        flags += ["--packing", "False"]
    if stage == "ppo":
        flags += ["--reward_model_path", place / "rm", "--response_length", 4, "--num_mini_batches", 2]
    if stage == "grpo":
        rewards = Path(f"{output}-rewards")
        rewards.mkdir(parents=True, exist_ok=True)
        flags = [*task_flags(place / "model", rewards), *flags, "--num_generations", 2]
    if stage != "ppo":
        flags += ["--dataloader_pin_memory", "False"]
    return open_stage(STAGES[stage], *model, *flags, *more)


def keep_ledger(opened: Opened) -> dict[int, list[int]]:
    """The numbers of the rows that this process trains on, by step, filled as the run trains."""
    trainer, ledger = opened.trainer, defaultdict(list)

    def numbers(ids: torch.Tensor) -> list[int]:
        return [int(re.search(r"Question (\d+)", opened.tokenizer.decode(row))[1]) for row in ids]

    def note(batch: dict[str, Any]) -> None:
        if "prompt_ids" in batch:
            found = numbers(batch["prompt_ids"])
        elif "completion_mask" in batch:
            found = [] if is_filler(batch) else numbers(batch["input_ids"].chunk(2)[0])
        else:
            found = numbers(batch["input_ids"][(batch["labels"] != IGNORED).any(dim=1)])
        ledger[trainer.state.global_step].extend(found)

    if hasattr(trainer, "roll_out"):
        answer = trainer.answer

        def answer_and_note(rows: list[dict], temperature: float, **kwargs: Any) -> Any:
            if temperature:
                ledger[trainer.state.global_step].extend(
                    number for row in rows for number in numbers([row["prompt_ids"]])
                )
            return answer(rows, temperature, **kwargs)

        trainer.answer = answer_and_note
        return ledger
    training_step = trainer.training_step

    def note_and_train(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        note(inputs)
        return training_step(model, inputs, *args, **kwargs)

    trainer.training_step = note_and_train
    return ledger


def train(stage: str, place: str, output: str, stop: int | None, more: tuple) -> dict[str, Any]:
    """Train on this process, to the end or until it is killed after a step: its ledger and what it logged."""
    opened = open_run(stage, Path(place), Path(output), *more)
    ledger = keep_ledger(opened)
    if stop is not None:
        opened.trainer.add_callback(Kill(stop))
    try:
        opened.finish()
    except KeyboardInterrupt:
        assert stop is not None
    return {"rows": dict(ledger), "logs": opened.trainer.state.log_history}


class Trained:
    """A run on some processes, started anew or resumed, and what came of it.

    Attributes:
        rows: by step, of all processes, sorted.
        losses, tokens: by step.
        evaluations: all metrics of each that do not measure time.
    """

    def __init__(self, stage: str, place: Path, output: Path, *more: Any, processes: int = 1, stop: int | None = None):
        ranks = run_ranks(train, processes, stage, str(place), str(output), stop, more, log=Path(f"{output}-log"))
        steps = sorted(ranks[0]["rows"])
        self.rows = {step: sorted(row for rank in ranks for row in rank["rows"].get(step, ())) for step in steps}
        logs = ranks[0]["logs"]
        self.losses = {log["step"]: log["loss"] for log in logs if "loss" in log}
        self.tokens = {log["step"]: log["num_tokens"] for log in logs if "num_tokens" in log}
        self.evaluations = [
            {name: value for name, value in log.items() if not name.endswith(("runtime", "per_second"))}
            for log in logs
            if any(name.startswith("eval_") for name in log)
        ]
        self.output = output

    def weights(self) -> dict[str, torch.Tensor]:
        (file,) = self.output.glob("*model.safetensors")
        return load_file(file)
