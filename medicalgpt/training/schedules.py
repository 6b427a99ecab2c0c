"""The learning rate over the run: schedules checked before data is read, and continued over another number of steps."""

import difflib
import inspect
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medicalgpt.errors import UserError

import torch
from loguru import logger
from transformers import SchedulerType, TrainingArguments, get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, GreedyLR
from transformers.trainer import TRAINER_STATE_NAME

# They follow a metric of the evaluations, and take no number of steps.
OF_METRIC = {
    SchedulerType.REDUCE_ON_PLATEAU: torch.optim.lr_scheduler.ReduceLROnPlateau,
    SchedulerType.GREEDY: GreedyLR,
}
# The library ignores what these are given.
WITHOUT_SETTINGS = (SchedulerType.CONSTANT, SchedulerType.CONSTANT_WITH_WARMUP)
WITHOUT_WARMUP = (SchedulerType.CONSTANT, *OF_METRIC)
# What the library sets from other flags.
FROM_FLAGS = ("self", "optimizer", "last_epoch", "num_warmup_steps", "num_training_steps", "verbose")
# Some schedules cannot do without; in any of these ways.
NEEDED = {
    SchedulerType.COSINE_WITH_MIN_LR: ("min_lr", "min_lr_rate"),
    SchedulerType.COSINE_WARMUP_WITH_MIN_LR: ("min_lr", "min_lr_rate"),
    SchedulerType.WARMUP_STABLE_DECAY: ("num_decay_steps",),
}


def known_settings(kind: SchedulerType) -> list[str]:
    """What `--lr_scheduler_kwargs` may hold for a schedule."""
    if kind in WITHOUT_SETTINGS:
        return []
    function = OF_METRIC.get(kind, TYPE_TO_SCHEDULER_FUNCTION[kind])
    return [name for name in inspect.signature(function).parameters if name not in FROM_FLAGS]


def check_schedule(args: TrainingArguments) -> None:
    """Refuse a schedule that could not be built, or not as requested; call it before data is read.

    A schedule that follows a metric is told in which direction the metric improves, unless the user says it.

    Args:
        args: with its `learning_rate`; `lr_scheduler_kwargs` may be completed in place.

    Raises:
        UserError: with the settings that the schedule knows.
    """
    kind, settings = SchedulerType(args.lr_scheduler_type), args.lr_scheduler_kwargs or {}
    flags = f"--lr_scheduler_type {kind.value}"
    if not isinstance(settings, dict):
        raise UserError(f"--lr_scheduler_kwargs {settings} is not a JSON object. Write it as {_example(kind)}.")
    known = known_settings(kind)
    if unknown := sorted(settings.keys() - set(known)):
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(f"{flags} takes no setting {', '.join(unknown)}.{hint} {_settings_text(kind)}")
    needed = NEEDED.get(kind, ())
    if needed and not settings.keys() & set(needed):
        raise UserError(f"{flags} needs {' or '.join(needed)}: --lr_scheduler_kwargs '{_example(kind)}'.")
    if kind in WITHOUT_WARMUP and args.warmup_steps:
        other = "constant_with_warmup" if kind == SchedulerType.CONSTANT else "cosine"
        raise UserError(
            f"--warmup_steps {args.warmup_steps:g} has no effect with {flags}. Omit it, or choose "
            f"--lr_scheduler_type {other}."
        )
    if kind in OF_METRIC:
        args.lr_scheduler_kwargs = settings = {"mode": "max" if args.greater_is_better else "min", **settings}
        if args.optim.value.endswith("layerwise"):
            raise UserError(f"--optim {args.optim.value} updates during the backward pass and cannot follow {flags}.")
    if args.learning_rate == 0 and settings.get("min_lr"):
        raise UserError(f"{flags} cannot decay from --learning_rate 0 to min_lr {settings['min_lr']}; use min_lr_rate.")
    # Without --max_steps the total follows from the data; then `build_schedule` sees the rest.
    total = args.max_steps if args.max_steps > 0 else _any_total(args, settings)
    _require_curve(args, total, flags)


def _any_total(args: TrainingArguments, settings: dict[str, Any]) -> int:
    """A number of steps in which every phase of the schedule has room."""
    phases = [settings.get("num_decay_steps"), settings.get("num_stable_steps"), args.warmup_steps]
    return 1000 + sum(math.ceil(phase) for phase in phases if isinstance(phase, int | float) and phase > 0)


def build_schedule(args: TrainingArguments, optimizer: Any, total: int) -> Any:
    """The schedule of a run of `total` steps.

    Raises:
        UserError: it does not fit into that many steps.
    """
    if SchedulerType(args.lr_scheduler_type) not in OF_METRIC:
        _require_curve(args, total, f"--lr_scheduler_type {SchedulerType(args.lr_scheduler_type).value}")
    schedule = _library_schedule(args, optimizer, total)
    if SchedulerType(args.lr_scheduler_type) in OF_METRIC:
        # As other schedules do: the rate that was requested, when the present one has moved away from it.
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
    return schedule


def _library_schedule(args: TrainingArguments, optimizer: Any, total: int) -> Any:
    return get_scheduler(
        args.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=args.get_warmup_steps(total),
        num_training_steps=total,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )


def expected_schedule(args: TrainingArguments, total: int) -> Any:
    """What a run of `total` steps should have, on an optimizer of one weight at the learning rate of the flags."""
    # A schedule's lowest rate may be absolute, so that its factors depend on the rate.
    return _library_schedule(args, torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate), total)


def _require_curve(args: TrainingArguments, total: int, flags: str) -> None:
    """Refuse a schedule that cannot be built or evaluated, or that leaves the range between 0 and the learning rate."""
    kind = SchedulerType(args.lr_scheduler_type)
    try:
        schedule = expected_schedule(args, total)
        if kind in OF_METRIC:
            _require_bounds(schedule, args, flags)
            return
        points = sorted({round(total * share / 50) for share in range(51)} | {args.get_warmup_steps(total)})
        factors = [(point, float(schedule.lr_lambdas[0](point))) for point in points if point <= total]
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        # Some of the library's messages name functions, not flags.
        reason = str(error).removeprefix("float ") or type(error).__name__
        raise UserError(
            f"{flags} with --lr_scheduler_kwargs {args.lr_scheduler_kwargs} cannot be used: {reason}. "
            f"{_settings_text(kind)}"
        ) from error
    if kind == SchedulerType.WARMUP_STABLE_DECAY:
        _require_room(schedule.lr_lambdas[0].keywords, total, flags)
    if odd := [(point, factor) for point, factor in factors if not -1e-9 <= factor <= 1 + 1e-9]:
        point, factor = odd[0]
        raise UserError(
            f"{flags} with --lr_scheduler_kwargs {args.lr_scheduler_kwargs} would set the learning rate to "
            f"{factor * args.learning_rate:g} in step {point}, outside of 0 to --learning_rate "
            f"{args.learning_rate:g}. {_settings_text(kind)}"
        )


def _require_bounds(schedule: Any, args: TrainingArguments, flags: str) -> None:
    lowest, highest = max(schedule.min_lrs), min(getattr(schedule, "max_lrs", [math.inf]))
    if not lowest <= args.learning_rate <= highest:
        raise UserError(
            f"{flags} moves the learning rate between min_lr {lowest:g} and max_lr {highest:g}, and --learning_rate "
            f"{args.learning_rate:g} is outside. Set them: --lr_scheduler_kwargs "
            f"'{{\"min_lr\": {args.learning_rate / 10:g}}}'."
        )


def _require_room(phases: dict[str, Any], total: int, flags: str) -> None:
    """A decay that begins before the warmup has ended would begin in its middle; a late one would never end."""
    warmup, stable, decay = (phases[f"num_{name}_steps"] for name in ("warmup", "stable", "decay"))
    if stable < 0 or warmup + stable + decay > total:
        raise UserError(
            f"{flags}: {warmup} steps of warmup{f', {stable} stable ones' if stable >= 0 else ''} and num_decay_steps "
            f"{decay} do not fit into the {total} steps of this run. Lower num_decay_steps, or train longer."
        )


def _settings_text(kind: SchedulerType) -> str:
    known = known_settings(kind)
    if not known:
        return "It has none; omit --lr_scheduler_kwargs."
    return f"Its settings: {', '.join(known)}, as in --lr_scheduler_kwargs '{_example(kind)}'."


def _example(kind: SchedulerType) -> str:
    examples = {
        SchedulerType.COSINE_WITH_MIN_LR: '{"min_lr_rate": 0.1}',
        SchedulerType.COSINE_WARMUP_WITH_MIN_LR: '{"min_lr_rate": 0.1}',
        SchedulerType.WARMUP_STABLE_DECAY: '{"num_decay_steps": 10}',
        SchedulerType.COSINE: '{"num_cycles": 0.5}',
        SchedulerType.COSINE_WITH_RESTARTS: '{"num_cycles": 2}',
        SchedulerType.POLYNOMIAL: '{"power": 2.0}',
        SchedulerType.INVERSE_SQRT: '{"timescale": 1000}',
        SchedulerType.REDUCE_ON_PLATEAU: '{"factor": 0.5, "patience": 2}',
        SchedulerType.GREEDY: '{"factor": 0.9, "min_lr": 1e-06}',
    }
    return examples.get(kind, "{}")


def steps_planned(checkpoint: Path) -> int | None:
    """The number of steps that the run of a checkpoint would have had; None if it does not say."""
    file = checkpoint / TRAINER_STATE_NAME
    return json.loads(file.read_text(encoding="utf-8")).get("max_steps") if file.is_file() else None


def continue_schedule(schedule: Any, planned: int | None, total: int) -> None:
    """Set the rates of a resumed run to what the schedule of its `total` steps has at the present step.

    A checkpoint holds the rates of its own schedule, which is another one if that run was planned for another number
    of steps: after its last step, mostly 0.

    Args:
        schedule: just restored from a checkpoint.
        planned: steps of the run that made it, if known.
    """
    if not hasattr(schedule, "lr_lambdas"):
        return
    before = schedule.get_last_lr()
    step, factors = schedule.last_epoch, schedule.lr_lambdas
    rates = [base * factor(step) for base, factor in zip(schedule.base_lrs, factors, strict=True)]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates
    if planned not in (None, total):
        logger.info(
            f"the run was planned for {planned:,} steps and now has {total:,}: in step {step:,} the "
            f"learning rate goes from {_rates_text(before)} to {_rates_text(rates)}, as if planned so from the start"
        )


def _rates_text(rates: Sequence[float]) -> str:
    return ", ".join(f"{rate:.4g}" for rate in dict.fromkeys(rates))
