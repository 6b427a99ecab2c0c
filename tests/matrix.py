"""Stages, engines and what is trained: the table that docs/distributed.md shows, and what trains each of its cells.

torchrun --nproc_per_node 2 -m tests.matrix FOLDER ENGINE trains the cells of one engine in turn, so that the libraries
are imported once, and writes what it found to FOLDER/ENGINE.
"""

import gc
import json
import sys
import traceback
from collections.abc import Container, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.helpers import open_stage, save_model, write_jsonl
from tests.silent.ppo import save_reward_model
from tests.tiny import tiny_tokenizer

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

ROOT = Path(__file__).resolve().parent.parent
ENGINES = ("DDP", "ZeRO-2", "ZeRO-3", "FSDP2")
# Not in the table: the same partitioning with other places for the states. They are tried with a stage of each kind.
OTHER_ENGINES = ("ZeRO-1", "ZeRO-2 offload", "ZeRO-3 offload")
OTHER_CELLS = ("supervised_finetuning:full", "supervised_finetuning:LoRA", "dpo_training:LoRA", "grpo_training:LoRA")
WEIGHTS = {
    "full": ["--use_peft", "False", "--learning_rate", 1e-2],
    "LoRA": ["--lora_dropout", 0, "--learning_rate", 5e-2],
    "QLoRA": ["--qlora", "True", "--lora_dropout", 0, "--learning_rate", 5e-2],
}
# Each stage with the folder of its rows and the flags that it needs.
STAGES = {
    "pretraining": ("texts", ["--block_size", 32]),
    "supervised_finetuning": ("rows", []),
    "reward_modeling": ("pairs", []),
    "dpo_training": ("pairs", []),
    "orpo_training": ("pairs", []),
    "ppo_training": ("prompts", ["--response_length", 4, "--num_mini_batches", 1]),
    "grpo_training": (
        "tasks",
        [
            "--num_generations",
            4,
            "--max_completion_length",
            4,
            "--reward_file",
            "{place}/rewards.py",
            "--reward_funcs",
            "sizes",
        ],
    ),
}
ROWS = {
    "texts": [{"text": f"Why {n}? A cold is an infection of the nose."} for n in range(16)],
    "rows": [{"prompt": f"Why {n}?", "response": "A cold."} for n in range(16)],
    "pairs": [{"prompt": f"Why {n}?", "chosen": "A cold.", "rejected": "No idea."} for n in range(16)],
    "prompts": [{"prompt": f"Why {n}?"} for n in range(16)],
    "tasks": [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(16)],
}
# Differs between the answers of a model with random weights; without a difference GRPO would learn nothing.
REWARDS = """
def sizes(completions, completion_ids, **columns):
    return [sum(ids) % 7 / 7 for ids in completion_ids]
"""
# Ids whose logits are compared.
PROBE = [[5, 80, 33, 200, 7, 150, 42, 9, 61, 120]]


class Cell(NamedTuple):
    """One combination of the table."""

    stage: str
    engine: str
    weights: str


def cells(engines: Iterable[str] = ENGINES, names: Container[str] = ()) -> Iterator[Cell]:
    """Every cell of these engines, or those named STAGE:WEIGHTS."""
    found = (Cell(stage, engine, weights) for engine in engines for stage in STAGES for weights in WEIGHTS)
    return (cell for cell in found if not names or f"{cell.stage}:{cell.weights}" in names)


def as_table(chinese: bool = False) -> str:
    """The table in Markdown, as docs/distributed.md and its Chinese twin show it."""
    trained = "、".join(("全参数", *list(WEIGHTS)[1:])) if chinese else ", ".join(WEIGHTS)
    lines = [f"| | {' | '.join(ENGINES)} |", "|---" * (1 + len(ENGINES)) + "|"]
    lines += [f"| `{stage}.py` |{f' {trained} |' * len(ENGINES)}" for stage in STAGES]
    return "\n".join(lines)


def make_place(folder: Path) -> Path:
    """A base, a reward model and rows for every stage below `folder`; returns it."""
    save_model(folder / "base", tiny_tokenizer())
    save_reward_model(folder / "rm")
    for name, rows in ROWS.items():
        write_jsonl(folder / name / "rows.jsonl", rows)
    (folder / "rewards.py").write_text(REWARDS)
    return folder


def flags(place: Path, cell: Cell) -> list[Any]:
    """The command line of a cell, without the program."""
    folder, needed = STAGES[cell.stage]
    model = ["--model_name_or_path", place / "base"]
    if cell.stage == "ppo_training":
        model = ["--sft_model_path", place / "base", "--reward_model_path", place / "rm"]
    file = f"{cell.engine.lower().replace('-', '').replace(' ', '_')}.json"
    engine = ["--deepspeed", ROOT / file] if cell.engine.startswith("ZeRO") else []
    return [
        *(*model, "--train_file_dir", place / folder, "--output_dir", output_of(place, cell), "--max_steps", 2),
        *("--per_device_train_batch_size", 2, "--sample_prompts", 0, "--logging_steps", 1, "--ddp_timeout", 300),
        *("--save_strategy", "steps", "--save_steps", 2, "--lr_scheduler_type", "constant", "--max_grad_norm", 1.0),
        *(*(str(flag).format(place=place) for flag in needed), *WEIGHTS[cell.weights], *engine),
    ]


def output_of(place: Path, cell: Cell) -> Path:
    return place / cell.engine / cell.stage / cell.weights


def reload(place: Path, cell: Cell) -> "PreTrainedModel":
    """The model that a user would load from the output folder."""
    from medicalgpt.models import adapters, loading
    from medicalgpt.models.hub import Checkpoint

    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    checkpoint = Checkpoint.resolve(str(output_of(place, cell)))
    scores = cell.stage == "reward_modeling"
    model = loading.load_model(
        AutoModelForSequenceClassification if scores else AutoModelForCausalLM,
        checkpoint.source,
        config=checkpoint.config,
        qlora=cell.weights == "QLoRA",
        **({"num_labels": 1} if scores else {}),
    )
    loading.never_repack_4bit(model)
    if checkpoint.adapter:
        model = adapters.attach_adapter(model, checkpoint.adapter)
    return model.eval()


def logits(model: "PreTrainedModel") -> "Tensor":
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor(PROBE)).logits


def train(place: Path, cell: Cell) -> dict[str, Any]:
    """Run the program of a cell; returns the live model's logits, or what was said in place of training."""
    from medicalgpt.training.engines import complete_weights

    import torch

    opened = open_stage(f"{cell.stage}.py", *flags(place, cell))
    opened.finish()
    trainer = opened.trainer
    # Where weights are sharded, the wrappers gather them.
    sharded = cell.engine in ("ZeRO-3", "FSDP2")
    model = trainer.model_wrapped if sharded else trainer.accelerator.unwrap_model(trainer.model)
    # The policy is a part of what is wrapped, and FSDP2 gathers nothing for a part.
    policy = getattr(model, "policy", model)
    gathered = nullcontext() if policy is model else complete_weights(trainer, [model])
    model = policy.eval()
    with torch.no_grad(), gathered:
        scores = model(input_ids=torch.tensor(PROBE, device=trainer.args.device)).logits
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {"logits": scores.tolist(), "losses": losses}


def main() -> None:
    from medicalgpt.errors import UserError
    from medicalgpt.logs import is_main_process

    from accelerate import Accelerator

    place, engine, *names = Path(sys.argv[1]), *sys.argv[2:]
    # Ends the process group, which the next cell needs.
    end_training, Accelerator.end_training = Accelerator.end_training, lambda self: None
    if engine == "FSDP2":
        from tests.fsdp_on_cpu import use_fsdp2

        use_fsdp2()
    for cell in cells([engine], names):
        try:
            found = train(place, cell)
        except UserError as error:
            found = {"refusal": str(error)}
        except Exception:
            found = {"failure": traceback.format_exc()}
        if is_main_process():
            output_of(place, cell).mkdir(parents=True, exist_ok=True)
            (output_of(place, cell) / "found.json").write_text(json.dumps(found))
            print(cell, {name: value for name, value in found.items() if name != "logits"}, file=sys.stderr, flush=True)
        gc.collect()
    Accelerator.end_training = end_training
    Accelerator(cpu=True).end_training()


if __name__ == "__main__":
    from medicalgpt.errors import run_main

    run_main(main)
