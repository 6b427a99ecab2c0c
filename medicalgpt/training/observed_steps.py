"""Requested and observed: optimizer, learning rates, batches, packing, noise, sharding and kernels."""

import math
import os
import re
from collections import Counter
from typing import Any

from medicalgpt.data.encoding import IGNORED
from medicalgpt.training.muon import MuonWithAdamW
from medicalgpt.training.observed_setup import OFF, Line, TrainingSetup, first_layer_input
from medicalgpt.training.row_order import is_filler
from medicalgpt.training.schedules import OF_METRIC, expected_schedule
from medicalgpt.training.trainers import sequence_lengths

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import SchedulerType, Trainer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer_optimizer import is_optimizer_factory
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer


def _innermost(optimizer: Any) -> Any:
    """The optimizer below the wrappers of accelerate and DeepSpeed."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _groups(setup: TrainingSetup) -> list[tuple[dict[str, Any], list[nn.Parameter]]] | None:
    """(settings, parameters of the model) of each group that has some; None where they cannot be distinguished."""
    found = _all_groups(setup)
    of_critic = {id(parameter) for parameter in setup.critic.parameters()} if setup.critic is not None else set()
    if found is None or not of_critic:
        return found
    kept = [(group, [one for one in own if id(one) not in of_critic]) for group, own in found]
    return [(group, own) for group, own in kept if own]


def _all_groups(setup: TrainingSetup) -> list[tuple[dict[str, Any], list[nn.Parameter]]] | None:
    if setup.sharded:
        return None
    optimizer = setup.trainer.optimizer
    inner = _innermost(optimizer)
    if isinstance(inner, LayerWiseDummyOptimizer):
        groups = [group for one in set(inner.optimizer_dict.values()) for group in one.param_groups]
        return [(group, group["params"]) for group in groups if group["params"]]
    while not hasattr(optimizer, "bit16_groups") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    # ZeRO-2 puts flat float32 copies into the groups and keeps the model's parameters next to them.
    parameters = getattr(optimizer, "bit16_groups", None) or [group["params"] for group in inner.param_groups]
    return [(group, list(own)) for group, own in zip(inner.param_groups, parameters, strict=True) if own]


def _requested_optimizer(setup: TrainingSetup) -> tuple[Any, dict[str, Any]]:
    """Class and settings that the library has for `--optim`."""
    if setup.training.optim.value.endswith("layerwise"):
        # The library's call would register their hooks on the model a second time.
        return LayerWiseDummyOptimizer, {}
    # Of weights that FSDP shards some are complete at times, for which the library would choose other settings here.
    model = None if setup.sharded else setup.base_model
    found, settings = Trainer.get_optimizer_cls_and_kwargs(setup.training, model)
    if setup.training.use_muon:
        found = MuonWithAdamW
    return found, {name: value for name, value in settings.items() if name not in ("lr", "params", "model")}


def optimizer(setup: TrainingSetup) -> Line:
    """The optimizer's class, and each setting that follows from `--optim` and `--adam_*`."""
    name = setup.training.optim.value
    wanted, settings = _requested_optimizer(setup)
    inner = _innermost(setup.trainer.optimizer)
    seen = _class_name(type(inner))
    if is_optimizer_factory(wanted):
        return setup.not_observed("optimizer", name, f"{seen} combines several")
    plugin = setup.trainer.accelerator.state.deepspeed_plugin
    if plugin and "optimizer" in plugin.deepspeed_config:
        return setup.not_observed("optimizer", name, f"the DeepSpeed file names its own, {seen}")
    odd = [key for key, value in settings.items() if any(value != found for found in _setting(inner, key))]
    shown = [key for key in settings if key in odd or (key == "optim_bits" and _setting(inner, key))]
    seen += "".join(f", {key} {_setting(inner, key)[0]}" for key in shown)
    wanted_text = _class_name(wanted) + "".join(f", {key} {settings[key]}" for key in shown)
    return Line(
        "optimizer",
        wanted_text,
        seen,
        (type(inner) is wanted or (wanted is torch.optim.AdamW and _is_cpu_adam(setup, inner))) and not odd,
        "A DeepSpeed file or the code of the trainer chose another.",
    )


def _is_cpu_adam(setup: TrainingSetup, inner: Any) -> bool:
    """Whether DeepSpeed's AdamW for CPUs is there because the file moves the optimizer's state to the CPU."""
    plugin = setup.trainer.accelerator.state.deepspeed_plugin
    zero = plugin.deepspeed_config.get("zero_optimization", {}) if plugin else {}
    offloads = zero.get("offload_optimizer", {}).get("device", "none") != "none"
    return offloads and type(inner).__name__ == "DeepSpeedCPUAdam"


def _class_name(kind: type) -> str:
    return f"{kind.__name__} of {kind.__module__.partition('.')[0]}"


def _setting(optimizer: torch.optim.Optimizer, key: str) -> list[Any]:
    """Values of a setting in all groups, or in the optimizer itself, where bitsandbytes keeps some; empty if unset."""
    found = [group[key] for group in optimizer.param_groups if key in group]
    if found:
        return [tuple(value) if isinstance(value, list) else value for value in found]
    owner = optimizer if hasattr(optimizer, key) else getattr(optimizer, "args", None)
    return [getattr(owner, key)] if hasattr(owner, key) else []


def coverage(setup: TrainingSetup) -> Line:
    """Every trained tensor is in the optimizer once, and nothing else is."""
    trained = {id(parameter) for parameter in setup.model.parameters() if parameter.requires_grad}
    wanted = f"{len(trained)} trained tensors once"
    groups = _groups(setup)
    if groups is None:
        return setup.not_observed("in the optimizer", wanted, setup.sharded)
    times = Counter(id(parameter) for _, own in groups for parameter in own)
    once = sum(times[one] == 1 for one in trained)
    others = len(times.keys() - trained)
    if setup.training.optim.value.startswith(("galore", "apollo")):
        # Their groups hold all parameters; one without a gradient stays as it is.
        others = len(times.keys() - {id(parameter) for parameter in setup.model.parameters()})
    seen = f"{once} trained tensors once" + (f", {others} others" if others else "")
    return Line(
        "in the optimizer",
        wanted,
        seen,
        seen == wanted,
        "Something changed what is trained after the optimizer was built.",
    )


def critic(setup: TrainingSetup) -> Line:
    """Every trained tensor of the critic is in the optimizer once, at the critic's rate."""
    if setup.critic is None:
        return Line("critic", OFF, OFF, True)
    rate = setup.flags.get("critic_learning_rate")
    rate = setup.training.learning_rate if rate is None else rate
    trained = {id(parameter) for parameter in setup.critic.parameters() if parameter.requires_grad}
    rates = sorted({rate, rate * (setup.flags.get("loraplus_lr_ratio") or 1)})
    wanted = f"{len(trained)} trained tensors once, learning rate {', '.join(f'{one:g}' for one in rates)}"
    groups = _all_groups(setup)
    if groups is None:
        return setup.not_observed("critic", wanted, setup.sharded)
    own = [(group, id(one)) for group, members in groups for one in members if id(one) in trained]
    rates = sorted({float(f"{group.get('initial_lr', group['lr']):.6g}") for group, _ in own})
    once = sum(times == 1 for times in Counter(one for _, one in own).values())
    seen = f"{once} trained tensors once, learning rate {', '.join(f'{one:g}' for one in rates)}"
    return Line("critic", wanted, seen, seen == wanted and bool(trained), "Leave --critic_learning_rate out.")


def learning_rate(setup: TrainingSetup) -> Line:
    """The rates that the schedule scales; with LoRA+ that of the B matrices separately."""
    rate, ratio = setup.training.learning_rate, setup.flags.get("loraplus_lr_ratio")
    wanted = f"{rate:g}" + (f", B matrices {rate * ratio:g}" if ratio else "")
    groups = _groups(setup)
    if groups is None:
        if ratio:
            return setup.not_observed("learning rate", wanted, setup.sharded)
        groups = [(group, []) for group in _innermost(setup.trainer.optimizer).param_groups]
    names = {id(parameter): name for name, parameter in setup.model.named_parameters()}
    found: dict[bool, set[float]] = {}
    for group, own in groups:
        fast = bool(ratio) and any(re.search(r"\.lora_(embedding_)?B\.", names.get(id(one), "")) for one in own)
        found.setdefault(fast, set()).add(float(f"{group.get('initial_lr', group['lr']):.6g}"))
    seen = ", B matrices ".join(", ".join(f"{one:g}" for one in sorted(found[fast])) for fast in sorted(found))
    return Line(
        "learning rate",
        wanted,
        seen,
        seen == wanted,
        "A resumed run keeps the rate of its checkpoint: pass that rate, or start again in another --output_dir.",
    )


def schedule(setup: TrainingSetup) -> Line:
    """The factor on the rate at the start, after the warmup, halfway through the decay, and in the present step."""
    args, state = setup.training, setup.trainer.state
    real = getattr(setup.trainer.lr_scheduler, "scheduler", setup.trainer.lr_scheduler)
    kind = SchedulerType(args.lr_scheduler_type)
    if kind in OF_METRIC:
        return _schedule_of_metric(setup, kind, real)
    last, now = state.max_steps, state.global_step
    warmup = min(args.get_warmup_steps(last), last)
    wanted = f"{kind.value}, warmup {args.get_warmup_steps(last)}"
    if not hasattr(real, "lr_lambdas"):
        return setup.not_observed("schedule", wanted, type(real).__name__)
    factor = expected_schedule(args, last).lr_lambdas[0]
    steps = sorted({0, warmup, (warmup + last) // 2, now})
    requested = {step: f"{factor(step):.3g}" for step in steps}
    observed = {step: f"{real.lr_lambdas[0](step):.3g}" for step in steps}
    # What the first step will use, whatever the schedule holds.
    groups = _innermost(setup.trainer.optimizer).param_groups
    applied = {f"{group['lr'] / group['initial_lr']:.3g}" for group in groups if group.get("initial_lr")}
    if applied:
        observed[now] = " or ".join(sorted(applied))

    def curve(factors: dict[int, str]) -> str:
        return ", ".join(f"{value} at {step}" for step, value in factors.items())

    return Line(
        "schedule",
        f"{wanted}: {curve(requested)}",
        curve(observed),
        observed == requested,
        "Start again in another --output_dir.",
    )


def _schedule_of_metric(setup: TrainingSetup, kind: SchedulerType, real: Any) -> Line:
    """The settings of a schedule that follows a metric of the evaluations."""
    # The bounds are held for each group of weights.
    settings = {name: value for name, value in (setup.training.lr_scheduler_kwargs or {}).items()}
    seen = {name: getattr(real, name, None) for name in settings}
    seen |= {name: getattr(real, f"{name}s")[0] for name in ("min_lr", "max_lr") if name in settings}

    def text(values: dict[str, Any]) -> str:
        return ", ".join([kind.value, *(f"{name} {value}" for name, value in values.items())])

    observed = text(seen) if isinstance(real, OF_METRIC[kind]) else type(real).__name__
    wanted = text(settings)
    return Line("schedule", wanted, observed, wanted == observed, "Start again in another --output_dir.")


def effective_batch(setup: TrainingSetup) -> Line:
    """Rows of the first step on all processes. If the data ends in this step, there may be fewer."""
    flags, accelerator = setup.flags, setup.trainer.accelerator
    size = (flags["per_device_train_batch_size"], flags["gradient_accumulation_steps"], flags["processes"])
    # A row of preferences is two sequences.
    sequences = getattr(setup.trainer, "sequences_per_row", 1)
    wanted = _batch_text(math.prod(size), *size)
    if flags.get("packing") and "flash" in setup.base_model.config._attn_implementation:
        return setup.not_observed("effective batch", wanted, "rows are joined into one for FlashAttention")
    here = [0 if is_filler(batch) else len(_ids(batch)) / sequences for batch in setup.batches]
    total = sum(gather_object([sum(here)]))
    seen = _batch_text(total, here[0], len(here), accelerator.num_processes)
    state = accelerator.gradient_state
    ends = state.end_of_dataloader or not state.in_dataloader
    fewer = seen != wanted and ends and total < math.prod(size)
    if fewer:
        seen += ", the data ends here"
    same = accelerator.num_processes == flags["processes"]
    return Line(
        "effective batch",
        wanted,
        seen,
        same and (seen == wanted or fewer),
        "Set the batch flags in one place only: the command line, not the settings of accelerate launch.",
    )


def _batch_text(total: float, rows: float, times: int, processes: int) -> str:
    return f"{total:g} = {rows:g} a device x {times} accumulated x {processes} process(es)"


def _ids(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return next(value for name, value in batch.items() if name.endswith(("input_ids", "completion_ids")))


def packing(setup: TrainingSetup) -> Line:
    """What keeps packed sequences apart: position ids that restart, and no attention mask."""
    if "packing" not in setup.flags:
        return Line("packing", OFF, OFF, True)
    requested, batch = setup.flags["packing"], setup.batches[0]
    wanted = "blocks" if requested else "rows, with attention mask"
    if "position_ids" not in batch:
        seen = "rows, with attention mask" if "attention_mask" in batch else "rows, without attention mask"
        return Line("packing", wanted, seen, seen == wanted, "The collator does not follow --packing.")
    found = batch["position_ids"]
    # Each position is 0, where a sequence starts, or one more than the one before it.
    sound = bool(((found[:, 1:] == 0) | (found[:, 1:] == found[:, :-1] + 1)).all() and (found[:, 0] == 0).all())
    apart = bool((batch["labels"][found == 0] == IGNORED).all())
    seen = "blocks" if sound and apart else "blocks whose sequences are not kept apart"
    if "attention_mask" in batch:
        seen = "blocks, with an attention mask, so that sequences see each other"
    if seen == "blocks" and requested and not _restarts(setup):
        seen = "blocks taken for one sequence each"
    return Line("packing", wanted, seen, seen == wanted, "The collator does not follow --packing.")


def _restarts(setup: TrainingSetup) -> bool:
    """Whether position ids restart with each sequence of a block; the first batch may have no such block."""
    rows = setup.trainer.train_dataset
    if "seq_lengths" not in (getattr(rows, "column_names", None) or ()):
        return True
    row = max((rows[number] for number in range(min(len(rows), 100))), key=lambda one: len(one["seq_lengths"]))
    return int((setup.trainer.data_collator([row])["position_ids"] == 0).sum()) == len(row["seq_lengths"])


def neftune(setup: TrainingSetup) -> Line:
    """The largest noise in the first layer's input for the first batch (https://arxiv.org/abs/2310.05914)."""
    alpha = setup.training.neftune_noise_alpha or 0.0
    wanted = f"at most {alpha:g} / sqrt(length x width)" if alpha else OFF
    batch = setup.batches[0]
    if not alpha and "input_ids" not in batch:
        return Line("NEFTune noise", OFF, OFF, True)
    if setup.unobservable or "input_ids" not in batch or not {"position_ids", "attention_mask"} & set(batch):
        return setup.not_observed("NEFTune noise", wanted, setup.unobservable or "no lengths in the batch")
    quiet = first_layer_input(setup, training=False).hidden
    noise = (setup.training_pass.hidden - quiet).abs().amax(dim=-1)
    in_evaluation = (first_layer_input(setup, training=False).hidden - quiet).abs().max().item()
    if noise.shape != batch["input_ids"].shape:
        return setup.not_observed("NEFTune noise", wanted, "the model rearranges the batch")
    if "attention_mask" in batch:
        padding = batch["attention_mask"] == 0
    else:
        padding = (batch["input_ids"] == setup.trainer.processing_class.pad_token_id) & (batch["labels"] == IGNORED)
    bound = (alpha / (sequence_lengths(batch) * quiet.shape[-1]).sqrt()).masked_fill(padding, 0)
    noise = noise.masked_fill(padding, 0)
    rounding = torch.finfo(quiet.dtype).eps * quiet.abs().max().item()
    # The maximum of some hundred uniform draws is close to the end of the interval.
    near = bool(((noise + rounding).amax(dim=1) >= 0.9 * bound.amax(dim=1)).all())
    seen = f"{noise.max().item():.3g}" if noise.any() else OFF
    if alpha:
        wanted = f"{bound.max().item():.3g} at most"
        seen += "" if near else ", and too little in some rows"
    if in_evaluation:
        seen += f", {in_evaluation:.3g} in evaluation"
    return Line(
        "NEFTune noise",
        wanted,
        seen,
        near and bool((noise <= 1.01 * bound + (rounding if alpha else 0)).all()) and in_evaluation == 0,
        "Leave --neft_alpha out.",
    )


def sharding(setup: TrainingSetup) -> Line:
    """What shards the training over processes, by the flags or by `accelerate launch`."""

    def wanted(flag: Any, variable: str) -> bool:
        return bool(flag) or os.environ.get(variable, "").lower() in ("true", "1")

    requested = (
        "DeepSpeed"
        if wanted(setup.training.deepspeed, "ACCELERATE_USE_DEEPSPEED")
        else "FSDP"
        if wanted(setup.training.fsdp, "ACCELERATE_USE_FSDP")
        else OFF
    )
    found = "DeepSpeed" if setup.trainer.is_deepspeed_enabled else "FSDP" if setup.trainer.is_fsdp_enabled else OFF
    return Line(
        "sharding",
        requested,
        found,
        requested == found,
        "accelerate supports FSDP on GPUs only, with several processes.",
    )


def gradient_checkpointing(setup: TrainingSetup) -> Line:
    """Layers that recompute their activations."""
    layers = [module for module in setup.base_model.modules() if isinstance(module, GradientCheckpointingLayer)]
    on = sum(bool(layer.gradient_checkpointing) for layer in layers)
    every = (setup.training.gradient_checkpointing_kwargs or {}).get("every_n_layers", 1)
    wanted = math.ceil(len(layers) / every) if setup.training.gradient_checkpointing else 0

    def text(count: int) -> str:
        return f"{count} of {len(layers)} layers" if count else OFF

    return Line("checkpointing", text(wanted), text(on), on == wanted, "Leave --gradient_checkpointing out.")


def liger(setup: TrainingSetup) -> Line:
    """Modules that compute with Liger's kernels."""
    found = 0
    for module in setup.base_model.modules():
        forward = getattr(module.forward, "__func__", module.forward)
        found += forward.__module__.startswith("liger_kernel")
    requested = setup.training.use_liger_kernel
    seen = f"{found} modules" if found else OFF
    return Line(
        "Liger kernels",
        "on" if requested else OFF,
        seen,
        bool(found) == bool(requested),
        "Leave --use_liger_kernel out.",
    )
