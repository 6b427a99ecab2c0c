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
from transformers import (
    DefaultFlowCallback,
    EarlyStoppingCallback,
    IntervalStrategy,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainingArguments,
)

# Metrics in a line of progress, next to speed and memory.
SHOWN_METRICS = ("loss", "accuracy", "rewards/accuracies", "score", "reward", "rewards/accuracy/mean", "kl")
SHOWN_METRICS += ("learning_rate", "eval_loss", "eval_accuracy", "eval_rewards/accuracies")
SHOWN_METRICS += ("eval_score", "eval_reward", "eval_rewards/accuracy/mean")


class MetricsFile(TrainerCallback):
    """One JSON object a line in metrics.jsonl for every log event."""

    def __init__(self, output_dir: Path, append: bool):
        self.path, self.append = output_dir / "metrics.jsonl", append

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        # What the stopped run logged after the checkpoint will be logged again.
        is_complete = state.global_step >= state.max_steps
        state.log_history = without_end(state.log_history, is_complete)
        if state.is_world_process_zero and self.path.is_file():
            keep_rows(self.path, state.global_step if self.append else -1, is_complete)

    def on_log(
        self, args: TrainingArguments, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            event = {"step": state.global_step, "epoch": state.epoch, "seconds": round(time.time(), 1), **(logs or {})}
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(event) + "\n")


def keep_rows(path: Path, last_step: int, is_complete: bool = False) -> None:
    """Remove from a file of JSON rows those that a resumed run logs again, and the row that a kill has torn.

    Args:
        last_step: of the checkpoint; rows of later steps are removed.
        is_complete: as for `without_end`.
    """
    rows = [row for row in path.read_text(encoding="utf-8", errors="replace").split("\n") if row]
    events = [event for event in map(_event_of, rows) if event]
    if torn := len(rows) - len(events):
        logger.warning(f"{path}: {torn} row(s) that a stopped run left unfinished are removed")
    kept = without_end([event for event in events if event["step"] <= last_step], is_complete)
    write_atomically(path, "".join(f"{json.dumps(event)}\n" for event in kept))


def without_end(events: Sequence[dict[str, Any]], is_complete: bool) -> list[dict[str, Any]]:
    """Log events without the summary of a training that is resumed.

    Args:
        is_complete: no step is left to train, so that what followed the summary is repeated as well.
    """
    ends = [number for number, event in enumerate(events) if "train_runtime" in event]
    kept = events[: ends[-1]] if ends and is_complete else events
    return [event for event in kept if "train_runtime" not in event]


def _event_of(row: str) -> dict[str, Any] | None:
    try:
        event = json.loads(row)
        return event if isinstance(event["step"], int | float) else None
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


# Where `TrainerState`, which is saved as trainer_state.json, names a step whose evaluation is still to come.
DUE_EVALUATION = "due_evaluation"


class DueEvaluation(TrainerCallback):
    """Note in a checkpoint that the evaluation of its step is still to come, and make it when the run is resumed.

    So it is if the run was asked to stop in that step, or if the step ends an epoch, which is evaluated after the step
    is saved. `StageTrainer` lets it count as if it had been made then.
    """

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if args.eval_strategy == IntervalStrategy.NO:
            state.stateful_callbacks.pop(DUE_EVALUATION, None)
        elif DUE_EVALUATION in state.stateful_callbacks:
            args.eval_on_start = True

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        is_due = control.should_evaluate
        if control.should_training_stop or float(state.epoch).is_integer():
            is_due |= DefaultFlowCallback().on_epoch_end(args, state, TrainerControl()).should_evaluate
        if is_due:
            self._note(state)

    def on_epoch_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_evaluate:
            self._note(state)

    @staticmethod
    def _note(state: Any) -> None:
        state.stateful_callbacks[DUE_EVALUATION] = {"step": state.global_step}


class EarlyStopping(EarlyStoppingCallback):
    """`--early_stopping_patience`: end training after so many evaluations in a row without a better metric.

    The count continues after a resume, where the evaluation before the first step repeats one that was counted, unless
    it was still to come (see `DueEvaluation`).

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
        is_first = state.global_step == self.first_step and DUE_EVALUATION not in state.stateful_callbacks
        if self.first_step is None or is_first or self.stopped:
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


class ProgressBar(ProgressCallback):
    """The bar of a terminal. What is logged is shown by `PlainProgress`, in lines above it."""

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        pass


class PlainProgress(TrainerCallback):
    """Progress as plain lines: at each log event, and at least every 30 seconds.

    The evaluation of the trained model is not among them: the last line of the run shows it.
    """

    def __init__(self):
        # Evaluations before and after training have none.
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
        # A run that is shorter than --logging_steps would end without any loss.
        is_last = state.global_step >= state.max_steps
        if is_last and args.logging_strategy == IntervalStrategy.STEPS:
            control.should_log |= not any("loss" in event for event in state.log_history)

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = None

    def on_log(
        self, args: TrainingArguments, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if not logs or self.began is None:
            return
        # It is made and shown again after training, unless that is of the best model instead of the last.
        is_repeated = state.global_step >= state.max_steps and not args.load_best_model_at_end
        is_evaluation = not {"eval_loss", "eval_score", "eval_reward"}.isdisjoint(logs)
        if "loss" in logs or (is_evaluation and not is_repeated):
            self._line(state, logs)

    def _line(self, state: Any, logs: dict[str, Any]) -> None:
        if not state.is_world_process_zero:
            return
        self.last_line = time.time()
        elapsed = self.last_line - self.began
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
