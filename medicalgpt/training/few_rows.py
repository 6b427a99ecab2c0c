"""Defaults that follow the number of rows: what a few dozen rows need differs from what thousands need."""

import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from medicalgpt.logs import notice
from medicalgpt.models.adapters import total_parameters
from medicalgpt.training.row_order import steps_per_epoch
from medicalgpt.training.runs import Run

import torch
from transformers import TrainingArguments

# Optimizer steps: fewer than the first change an adapter hardly at all; the second is the aim for few rows.
FEWEST_STEPS = 50
ENOUGH_STEPS = 200
USUAL_EPOCHS, MOST_EPOCHS = 3, 30
# Below so many parameters a model is far narrower than those that the usual learning rates are made for.
SMALL_MODEL = 50_000_000
SMALL_ADAPTER_RATE, SMALL_FULL_RATE = 2e-3, 1e-3
WARMUP = 0.1
EVALUATIONS = 10
# Of the flags that decide how long a run is, any one means that the user has decided.
LENGTH_FLAGS = frozenset({"num_train_epochs", "max_steps"})


@dataclass(frozen=True)
class RowCounts:
    """Sizes that the defaults follow from.

    Attributes:
        rows: sequences that are trained on; blocks, if rows are packed.
        held_out: sequences that are evaluated on.
        per_epoch: optimizer steps of an epoch.
        parameters: weights of the model, frozen ones included.
    """

    rows: int
    held_out: int
    per_epoch: int
    parameters: int


def epochs_for(per_epoch: int) -> int:
    """Epochs for so many optimizer steps per epoch: 200 steps if 30 epochs make as many, at least 50 steps.

    Few rows need more epochs than the usual three: fine-tuning on small sets is unstable and ends too early with three
    (Mosbach et al. 2021, https://arxiv.org/abs/2006.04884, train 20; Zhang et al. 2021,
    https://arxiv.org/abs/2006.05987), and 1,000 conversations were trained for 15 epochs by Zhou et al. 2023
    (https://arxiv.org/abs/2305.11206). The limit of 30 is ours.
    """
    fewest = math.ceil(FEWEST_STEPS / per_epoch)
    return max(USUAL_EPOCHS, fewest, min(MOST_EPOCHS, math.ceil(ENOUGH_STEPS / per_epoch)))


def defaults_for(counts: RowCounts, args: TrainingArguments, *, use_peft: bool) -> dict[str, Any]:
    """Values for flags that the user has not set; empty if three epochs are enough or the user chose the length.

    The learning rate stays as it is for real models (2e-4 for adapters, within the 1e-5 to 5e-4 that Biderman et al.
    2024 compare, https://arxiv.org/abs/2405.09673). A model of a few million parameters needs a higher one, as the best
    rate falls with the width (Yang et al. 2022, https://arxiv.org/abs/2203.03466). A tenth of the steps warms up, as
    Mosbach et al. recommend for small sets. Held-out rows are evaluated ten times, because the loss on them shows when
    repeating the rows begins to harm.
    """
    given = getattr(args, "given", frozenset())
    epochs = epochs_for(counts.per_epoch)
    if epochs <= USUAL_EPOCHS or given & LENGTH_FLAGS:
        return {}
    values: dict[str, Any] = {"num_train_epochs": epochs}
    if counts.parameters < SMALL_MODEL and not given & {"learning_rate", "optim", "optim_args"}:
        values["learning_rate"] = SMALL_ADAPTER_RATE if use_peft else SMALL_FULL_RATE
    if not given & {"warmup_steps", "lr_scheduler_type", "lr_scheduler_kwargs"}:
        values["warmup_steps"] = WARMUP
    # Held-out rows may be far more than those of the training.
    if 0 < counts.held_out <= counts.rows and not given & {"eval_strategy", "eval_steps", "do_eval"}:
        steps = epochs * counts.per_epoch
        values |= {"eval_strategy": "steps", "eval_steps": max(1, steps // EVALUATIONS)}
        values |= {} if "eval_on_start" in given else {"eval_on_start": True}
    return values


def follow_rows(
    run: Run, model: torch.nn.Module, train: Sequence[Any], held_out: Sequence[Any] | None, *, use_peft: bool
) -> None:
    """Set what follows from the number of rows, log the reason, and warn of a run that is too short to learn.

    A resumed run keeps the values of the run that made the checkpoint. Rows that are streamed have no number.

    Args:
        run: its arguments and record are changed.
        train: encoded rows.
    """
    args = run.training
    if not args.do_train or not hasattr(train, "__len__"):
        return
    per_epoch = math.ceil(steps_per_epoch(len(train), args))
    if not per_epoch:
        return
    counts = RowCounts(len(train), len(held_out or ()), per_epoch, total_parameters(model))
    if not run.resume_from and (values := defaults_for(counts, args, use_peft=use_peft)):
        settings = " ".join(f"--{name} {value}" for name, value in values.items())
        reason = (
            f"{counts.rows:,} rows are {per_epoch:,} steps per epoch and {USUAL_EPOCHS * per_epoch:,} in the usual "
            f"{USUAL_EPOCHS} epochs, too few to learn them"
        )
        run.set_defaults(values, reason)
        notice(f"few rows: {reason}; unset flags become {settings}")
    steps = args.max_steps if args.max_steps > 0 else math.ceil(per_epoch * args.num_train_epochs)
    if steps < FEWEST_STEPS and not run.resume_from:
        command = longer_command(sys.argv, args, epochs_for(per_epoch))
        notice(f"only {steps:,} steps: a model hardly changes in fewer than {FEWEST_STEPS}. Longer:\n  {command}")


def longer_command(argv: Sequence[str], args: TrainingArguments, epochs: int) -> str:
    """The command of this run for `epochs` epochs, into a folder of its own."""
    replaced = {"num_train_epochs", "max_steps", "output_dir", "resume", "resume_from_checkpoint"}
    kept, skipping = [], False
    for word in argv[1:]:
        if word.startswith("--"):
            skipping = word[2:].partition("=")[0].replace("-", "_") in replaced
        if not skipping:
            kept.append(word)
    output = f"{str(args.output_dir).rstrip('/')}-{epochs}-epochs"
    words = ["python", argv[0].rpartition("/")[2], *kept, "--output_dir", output, "--num_train_epochs", str(epochs)]
    # Set in a file of settings, it is still there.
    words += ["--max_steps", "-1"] if args.max_steps > 0 else []
    return shlex.join(words)
