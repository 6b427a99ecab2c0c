"""Trainer callbacks: metrics to a file, progress lines, evaluations that are compared."""

import json
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from medicalgpt.errors import UserError
from medicalgpt.files import write_atomically
from medicalgpt.logs import HEARTBEAT_SECONDS

import torch
from loguru import logger
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

# Metrics in a line of progress, next to speed and memory.
SHOWN_METRICS = ("loss", "accuracy", "rewards/accuracies", "score", "reward", "rewards/accuracy/mean", "kl")
SHOWN_METRICS += ("learning_rate", "eval_loss", "eval_accuracy", "eval_rewards/accuracies")
SHOWN_METRICS += ("eval_score", "eval_reward", "eval_rewards/accuracy/mean")


class MetricsFile(TrainerCallback):
    """One JSON object a line in metrics.jsonl for every log event."""

    def __init__(self, output_dir: Path, append: bool):
        self.path, self.append = output_dir / "metrics.jsonl", append

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not self.path.is_file():
            return
        # What the stopped run logged after the checkpoint will be logged again.
        keep_rows(self.path, state.global_step if self.append else -1)

    def on_log(
        self, args: TrainingArguments, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            event = {"step": state.global_step, "epoch": state.epoch, "seconds": round(time.time(), 1), **(logs or {})}
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(event) + "\n")


def keep_rows(path: Path, last_step: int) -> None:
    """Remove the rows of later steps from a file of JSON rows, and the row that a kill has torn, with a notice."""
    rows = path.read_text(encoding="utf-8", errors="replace").split("\n")
    steps = [_step_of_row(row) for row in rows]
    kept = [row for row, step in zip(rows, steps, strict=True) if step is not None and step <= last_step]
    if torn := sum(row != "" and step is None for row, step in zip(rows, steps, strict=True)):
        logger.warning(f"{path}: {torn} row(s) that a stopped run left unfinished are removed")
    write_atomically(path, "".join(f"{row}\n" for row in kept))


def _step_of_row(row: str) -> float | None:
    try:
        return float(json.loads(row)["step"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


class FirstStep(TrainerCallback):
    """Call `inspect(trainer, batches)` with the batches of the first step, before anything is computed."""

    def __init__(self, trainer: Trainer, inspect: Callable[[Trainer, Sequence[dict[str, torch.Tensor]]], None]):
        self.trainer, self.inspect = trainer, inspect

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        fetch = self.trainer.get_batch_samples

        def fetch_and_inspect(*fetch_args: Any) -> tuple[list, Any]:
            del self.trainer.get_batch_samples
            batches, count = fetch(*fetch_args)
            if batches:
                self.inspect(self.trainer, batches)
            return batches, count

        # The library passes a callback everything but the batches.
        self.trainer.get_batch_samples = fetch_and_inspect


class BestMetric(TrainerCallback):
    """Refuse a `--metric_for_best_model` that the evaluation does not have: at its first one, before the first step."""

    def __init__(self):
        self.trains = False

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.trains = True
        if args.metric_for_best_model is not None and state.is_world_process_zero:
            direction = "highest" if args.greater_is_better else "lowest"
            logger.info(f"evaluations are compared by {_eval_name(args)}: the {direction} is the best")

    def on_evaluate(
        self, args: TrainingArguments, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        if not self.trains or args.metric_for_best_model is None or _eval_name(args) in metrics:
            return
        found = [name.removeprefix("eval_") for name in metrics if name.startswith("eval_") and not _is_cost(name)]
        raise UserError(
            f"--metric_for_best_model {args.metric_for_best_model} is not a metric of the evaluation. Use one of "
            f"these: {', '.join(found)}."
        )


class EarlyStopping(EarlyStoppingCallback):
    """`--early_stopping_patience`: end training after so many evaluations in a row without a better metric.

    The count continues after a resume, where the evaluation before the first step repeats one that was counted.

    Attributes:
        stopped: what ended the training, for run.json; None if nothing did.
    """

    def __init__(self, patience: int, threshold: float):
        super().__init__(patience, threshold)
        self.first_step: int | None = None
        self.stopped: dict[str, Any] | None = None

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.first_step = state.global_step
        # A checkpoint of a run without early stopping has no entry, which the library would miss when it saves.
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self.early_stopping_patience_counter = saved["attributes"]["early_stopping_patience_counter"]
        if not args.load_best_model_at_end and state.is_world_process_zero:
            logger.info(
                "early stopping keeps the weights of the last step; to end with the best ones, add "
                "--load_best_model_at_end True"
            )

    def on_evaluate(
        self, args: TrainingArguments, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        if self.first_step is None or state.global_step == self.first_step or self.stopped:
            return
        super().on_evaluate(args, state, control, metrics, **kwargs)
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            self.stopped = {
                "step": state.global_step,
                "evaluations_without_a_better": {_eval_name(args): self.early_stopping_patience_counter},
                "best": state.best_metric,
            }
            if state.is_world_process_zero:
                logger.info(
                    f"stopped early in step {state.global_step} of {state.max_steps}: no {_eval_name(args)} better "
                    f"than {state.best_metric:.6g} in {self.early_stopping_patience_counter} evaluation(s)"
                )

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        # Evaluations that follow do not belong to the training.
        self.first_step = None


def _eval_name(args: TrainingArguments) -> str:
    return f"eval_{args.metric_for_best_model.removeprefix('eval_')}"


def _is_cost(name: str) -> bool:
    """Whether a metric of an evaluation is of time or size, and not of the model."""
    return name.endswith(("runtime", "per_second", "tokens", "epoch"))


class PlainProgress(TrainerCallback):
    """Progress as plain lines, for logs and pipes: at each log event, and at least every 30 seconds."""

    def __init__(self):
        # An evaluation without training has no beginning.
        self.began: float | None = None
        self.first_step = self.first_tokens = 0

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = self.last_line = time.time()
        self.first_step, self.first_tokens = state.global_step, state.num_input_tokens_seen

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.first_step + 1:
            logger.info(f"first step done, {time.time() - self.began:.1f} s after training began")
        if time.time() - self.last_line >= HEARTBEAT_SECONDS:
            self._line(state, {})

    def on_log(
        self, args: TrainingArguments, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if logs and not {"loss", "eval_loss", "eval_score", "eval_reward"}.isdisjoint(logs):
            self._line(state, logs)

    def _line(self, state: Any, logs: dict[str, Any]) -> None:
        if not state.is_world_process_zero:
            return
        self.last_line = time.time()
        elapsed = self.last_line - self.began if self.began is not None else 0.0
        done = state.global_step - self.first_step
        parts = [f"step {state.global_step}/{state.max_steps} ({state.global_step / max(state.max_steps, 1):.0%})"]
        parts += [f"{name} {logs[name]:.4g}" for name in SHOWN_METRICS if logs.get(name) is not None]
        if "num_tokens" in logs and elapsed > 0:
            tokens = logs["num_tokens"] - self.first_tokens
            parts.append(f"{tokens / elapsed:,.0f} tokens/s")
        parts.append(f"{peak_memory_gb():.2f} GB")
        if done and state.max_steps > state.global_step:
            parts.append(f"{_duration(elapsed / done * (state.max_steps - state.global_step))} to go")
        logger.info("  ".join(parts))


def peak_memory_gb() -> float:
    """Peak memory of this process in GB: of the GPU if there is one, else of the program."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"
