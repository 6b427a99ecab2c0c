"""Rows of preferences, and the three stages that take them, for tests of what holds for all of these stages."""

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.helpers import Opened, open_stage, write_jsonl

import pytest
import torch
from torch.nn.functional import logsigmoid
from trl import DPOTrainer

STAGES = ("reward_modeling.py", "dpo_training.py", "orpo_training.py")
on_every_stage = pytest.mark.parametrize("stage", STAGES)


def pair(number: int, chosen: int = 3, rejected: int = 5, **columns: Any) -> dict[str, Any]:
    """A row whose answers have these many letters."""
    return {"prompt": f"Question {number}?", "chosen": "y" * chosen, "rejected": "n" * rejected, **columns}


def pairs(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Rows of unlike lengths, the longer answer sometimes the chosen one."""
    return [pair(n, 1 + 17 * n % 41, 2 + 29 * n % 37) for n in range(start, start + count)]


def stage_flags(model: str | Path, folder: Path, *more: Any) -> list[Any]:
    """Flags of a run on `folder`/data that leaves `folder`/out, without samples and checkpoints."""
    return [
        *("--model_name_or_path", model, "--train_file_dir", folder / "data", "--output_dir", folder / "out"),
        *("--sample_prompts", 0, "--save_strategy", "no", "--dataloader_pin_memory", "False", *more),
    ]


def open_pairs(stage: str, model: str | Path, folder: Path, rows: list[Any], *more: Any) -> Opened:
    """Open a stage on these rows."""
    write_jsonl(folder / "data" / "rows.jsonl", rows)
    return open_stage(stage, *stage_flags(model, folder, *more))


def questions(dataset: Any, tokenizer: Any) -> list[int]:
    """The numbers of the pairs that a data set holds, in its order."""
    texts = [tokenizer.decode(ids) for ids in dataset["prompt_ids"]]
    return [int(text.partition("Question ")[2].partition("?")[0]) for text in texts]


def plain_losses(stage: str, opened: Opened, rows: Any) -> torch.Tensor:
    """The loss of each pair computed alone, from the plain outputs of the model, without padding: (pairs,)."""
    model, reference = opened.trainer.model, getattr(opened.trainer, "ref_model", None)

    def score(row: dict[str, Any], name: str) -> torch.Tensor:
        return model(input_ids=torch.tensor([row["prompt_ids"] + row[name]])).logits.squeeze()

    def log_probs(scored: torch.nn.Module, row: dict[str, Any], name: str) -> torch.Tensor:
        ids, start = torch.tensor([row["prompt_ids"] + row[name]]), len(row["prompt_ids"])
        logits = scored(input_ids=ids).logits[0, start - 1 : -1].log_softmax(dim=-1)
        return logits.gather(1, ids[0, start:, None])[:, 0]

    def of_reference(row: dict[str, Any], name: str) -> torch.Tensor:
        with torch.no_grad():
            if reference is not None:
                return log_probs(reference, row, name).sum()
            with model.disable_adapter():
                return log_probs(model, row, name).sum()

    losses = []
    for row in rows:
        if stage == "reward_modeling.py":
            losses.append(-logsigmoid(score(row, "chosen_ids") - score(row, "rejected_ids")))
        elif stage == "dpo_training.py":
            chosen, rejected = (
                log_probs(model, row, name).sum() - of_reference(row, name) for name in ("chosen_ids", "rejected_ids")
            )
            losses.append(-logsigmoid(0.1 * (chosen - rejected)))
        else:
            chosen, rejected = (log_probs(model, row, name).mean() for name in ("chosen_ids", "rejected_ids"))
            odds = [p - torch.log1p(-p.exp()) for p in (chosen, rejected)]
            losses.append(-chosen - 0.1 * logsigmoid(odds[0] - odds[1]))
    return torch.stack(losses)


def shake(model: torch.nn.Module) -> None:
    """Move all trained weights away from where they stand, so that adapters have an effect."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def results(metrics: dict[str, float]) -> dict[str, float]:
    """What an evaluation says of the model, without how long it took."""
    timed = ("epoch", "_time", "_runtime", "_per_second")
    return {name: value for name, value in metrics.items() if not name.endswith(timed)}


def trl_dpo(args: Any, model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    """Loss and metrics that TRL's trainer gives a batch which holds the reference's log-probabilities.

    Args:
        args: settings named as in `trl.DPOConfig`.
    """
    alone = SimpleNamespace(device="cpu", gather=lambda values: values, gather_for_metrics=lambda values: values)
    names = ("beta", "ld_alpha", "label_smoothing", "use_weighting", "f_divergence_type", "f_alpha_divergence_coef")
    trainer = SimpleNamespace(
        **{name: getattr(args, name) for name in names},
        **{"model": SimpleNamespace(training=True), "accelerator": alone, "args": args, "_tp_size": 1},
        **{"loss_types": args.loss_type, "loss_weights": args.loss_weights or [1.0] * len(args.loss_type)},
        **{"precompute_ref_logps": True, "_metrics": {"train": defaultdict(list)}, "_total_train_tokens": 0},
        aux_loss_enabled=False,
    )
    loss = DPOTrainer._compute_loss(trainer, model, batch, False)
    return loss, {name: values[0] for name, values in trainer._metrics["train"].items()}
