"""What was requested, and what is really there: compared right before the first step of training.

Each line of the table is one function of `observed_model.py` or `observed_steps.py`, which is given a `TrainingSetup`
and returns a `Line`. The observed side is read from the thing itself (a module, the optimizer, the first batch), never
from a flag.
"""

from collections.abc import Sequence
from typing import Any

from medicalgpt.models.hub import Adapter
from medicalgpt.training import observed_model as of_model
from medicalgpt.training import observed_steps as of_steps
from medicalgpt.training.observed_setup import OFF, Line, TrainingSetup

import torch
from transformers import Trainer, TrainingArguments

LINES = (
    of_model.attention,
    of_model.attention_groups,
    of_model.positions,
    of_model.weights,
    of_model.trained_weights,
    of_model.autocast,
    of_model.quantization,
    of_model.adapter,
    of_model.dropout,
    of_model.adapted_modules,
    of_model.frozen_layers,
    of_model.trainable,
    of_steps.optimizer,
    of_steps.coverage,
    of_steps.critic,
    of_steps.learning_rate,
    of_steps.schedule,
    of_steps.effective_batch,
    of_steps.sharding,
    of_steps.packing,
    of_steps.neftune,
    of_steps.gradient_checkpointing,
    of_steps.liger,
)


def observe(
    flags: dict[str, Any],
    training: TrainingArguments,
    trainer: Trainer,
    batches: Sequence[dict[str, torch.Tensor]],
    resumed: Adapter | None = None,
) -> list[Line]:
    """The whole table. Looking changes no weight, gradient or random state.

    Call it on every process. For the arguments see `TrainingSetup`.
    """
    setup = TrainingSetup(flags, training, trainer, batches, resumed)
    with torch.random.fork_rng():
        return [line(setup) for line in LINES]


def as_table(lines: Sequence[Line]) -> list[str]:
    """Aligned text of the lines in which something was requested or observed, the headings first."""
    rows = [("", "requested", "observed", "")]
    marks = {True: "", False: "  <- differs", None: ""}
    rows += [(line.name, line.requested, line.observed, marks[line.agrees]) for line in lines if not _idle(line)]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return [
        f"{name:<{widths[0]}}  {requested:<{widths[1]}}  {observed}{mark}" for name, requested, observed, mark in rows
    ]


def as_summary(lines: Sequence[Line]) -> list[str]:
    """One line if no setting differs from what was requested, else the whole table."""
    if any(line.agrees is False for line in lines):
        return as_table(lines)
    unseen = [line.name for line in lines if line.agrees is None and not _idle(line)]
    agreeing = sum(line.agrees is True and not _idle(line) for line in lines)
    text = f"settings       {agreeing} observed as requested"
    if unseen:
        text += f", {len(unseen)} not observed ({', '.join(unseen)})"
    return [f"{text}; --verbose True shows all"]


def _idle(line: Line) -> bool:
    return line.requested == line.observed == OFF
