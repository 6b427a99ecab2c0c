"""The optimizer of `--optim`: the packages it needs, the flags it ignores, and the learning rates of LoRA+."""

import importlib.util
import re
from typing import Any

from medicalgpt.errors import UserError

import torch
from loguru import logger
from transformers import TrainingArguments

# Packages that transformers takes optimizers from: (prefix of the optimizer's name, module, name for pip).
OPTIMIZER_PACKAGES = (
    ("galore", "galore_torch", "galore-torch"),
    ("apollo", "apollo_torch", "apollo-torch"),
    ("adamw_torch_4bit", "torchao", "torchao"),
    ("adamw_torch_8bit", "torchao", "torchao"),
    ("schedule_free", "schedulefree", "schedulefree"),
    ("stable_adamw", "optimi", "torch-optimi"),
    ("grokadamw", "grokadamw", "grokadamw"),
    ("lomo", "lomo_optim", "lomo-optim"),
    ("adalomo", "lomo_optim", "lomo-optim"),
    *(
        (name, "bitsandbytes", "bitsandbytes")
        for name in ("adamw_8bit", "adamw_bnb", "paged", "lion", "ademamix", "rmsprop_bnb")
    ),
)


def check_optimizer(args: TrainingArguments, use_peft: bool) -> None:
    """Refuse at startup what would fail, or have no effect, once the optimizer is built.

    GaLore (https://arxiv.org/abs/2403.03507) and APOLLO (https://arxiv.org/abs/2412.05270) keep their states for
    low-rank projections of the gradients of full weight matrices. If `--optim_target_modules` is unset, these are all
    linear layers; `args.optim_target_modules` is set to that, and comma-separated names become a list.

    Raises:
        UserError: a package is missing, or flags cannot be combined with `--optim`.
    """
    optim = args.optim.value
    for start, module, package in OPTIMIZER_PACKAGES:
        if optim.startswith(start) and importlib.util.find_spec(module) is None:
            raise UserError(f"--optim {optim} needs a package that is not installed: pip install {package}")
    if args.use_cpu and optim.startswith(("galore_adamw_8bit", "adalomo")):
        raise UserError(f"--optim {optim} runs on GPUs only; on a CPU: {'adamw_8bit' if '8bit' in optim else 'lomo'}.")
    if args.use_muon:
        _check_muon(args, use_peft)
    low_rank, layerwise = optim.startswith(("galore", "apollo")), optim.endswith("layerwise")
    if args.optim_target_modules is not None and not low_rank:
        raise UserError(f"--optim_target_modules is for GaLore and APOLLO; --optim {optim} does not use it.")
    if low_rank and use_peft:
        raise UserError(
            f"--optim {optim} saves memory in full fine-tuning; adapters are low-rank already. Add --use_peft "
            "False, or choose another optimizer, such as adamw_8bit."
        )
    if layerwise and (args.gradient_accumulation_steps > 1 or args.world_size > 1):
        raise UserError(
            f"--optim {optim} updates each weight as soon as its gradient is computed, so it needs "
            f"--gradient_accumulation_steps 1 and a single process. Or use --optim {optim.removesuffix('_layerwise')}."
        )
    if layerwise and args.max_grad_norm and "max_grad_norm" in getattr(args, "given", ()):
        raise UserError(f"--optim {optim} updates each weight at once, so --max_grad_norm has no effect. Omit it.")
    if low_rank and args.optim_target_modules is None:
        args.optim_target_modules = "all-linear"
        logger.info(f"--optim {optim}: low-rank states for every linear layer (--optim_target_modules all-linear)")
    names = args.optim_target_modules
    if isinstance(names, str) and re.fullmatch(r"[\w.]+(, *[\w.]+)*", names) and names != "all_linear":
        # transformers would match this text as a regular expression against full module names.
        args.optim_target_modules = names.replace(" ", "").split(",")


def _check_muon(args: TrainingArguments, use_peft: bool) -> None:
    """Raise UserError if `--use_muon` cannot be combined with other flags."""
    for clash, reason, remedy in (
        (use_peft, "updates complete weight matrices, and an adapter has none", "Add --use_peft False, or omit it."),
        (
            args.deepspeed or args.fsdp,
            "needs each matrix complete on every process, and DeepSpeed and FSDP shard them",
            "Use torchrun without them, or omit it.",
        ),
        (
            not args.optim.value.startswith("adamw_torch") or "bit" in args.optim.value,
            f"gives all other weights AdamW, not --optim {args.optim.value}",
            "Omit one of the two.",
        ),
    ):
        if clash:
            raise UserError(f"--use_muon True {reason}. {remedy}")


def apply_loraplus(optimizer: torch.optim.Optimizer, model: torch.nn.Module, ratio: float) -> None:
    """LoRA+ (https://arxiv.org/abs/2402.12354): the B matrices of adapters get `ratio` times the learning rate.

    They move into separate parameter groups with the same weight decay, so this works with any optimizer that has a
    learning rate per group, and schedules scale both. All other parameters keep their learning rate: rows of new
    tokens, DoRA's magnitudes, modules trained in full.

    Raises:
        UserError: the optimizer has a single learning rate, or there are no B matrices.
    """
    if ratio <= 0:
        raise UserError(f"--loraplus_lr_ratio {ratio:g} must be above 0; the paper uses 16.")
    fast = {id(p) for name, p in model.named_parameters() if ".lora_B." in name or ".lora_embedding_B." in name}
    groups = [group for group in optimizer.param_groups if any(id(p) in fast for p in group["params"])]
    if not groups or "lomo" in type(optimizer).__name__.lower():
        raise UserError(
            f"--loraplus_lr_ratio has no effect on {type(optimizer).__name__}, which has a single learning rate or "
            "no B matrices of an adapter. Omit it, or choose --optim adamw_torch."
        )
    for group in groups:
        chosen = [p for p in group["params"] if id(p) in fast]
        group["params"] = [p for p in group["params"] if id(p) not in fast]
        optimizer.add_param_group({**group, "params": chosen, "lr": group["lr"] * ratio})
    optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]


def check_flags_applied(args: TrainingArguments, optimizer: torch.optim.Optimizer) -> None:
    """Compare the optimizer's flags that the user set with the settings it holds.

    transformers passes only some of them to each optimizer and silently drops the others.

    Raises:
        UserError: a flag was dropped.
    """
    given = getattr(args, "given", frozenset())
    inner = (getattr(optimizer, "optimizer_dict", None) or {}).values()
    groups = [group for each in (inner or [optimizer]) for group in each.param_groups]
    betas = {tuple(group.get("betas") or (group.get("beta1"), group.get("beta2")))[:2] for group in groups}
    decays = {group.get("weight_decay", 0.0) for group in groups}
    arrived = {
        "weight_decay": args.weight_decay in {*decays, 0.0},
        "adam_beta1": any(args.adam_beta1 in pair[:1] for pair in betas),
        "adam_beta2": any(args.adam_beta2 in pair[1:] for pair in betas),
        "adam_epsilon": any(group.get("eps") == args.adam_epsilon for group in groups),
    }
    lost = sorted(f"--{name}" for name in given & arrived.keys() if not arrived[name])
    for setting in filter(None, (args.optim_args or "").replace(" ", "").split(",")):
        key, _, value = setting.partition("=")
        held = [group[key] for group in groups if key in group] + [getattr(optimizer, key, None), *betas]
        if not any(_same(value, each) for each in held):
            lost.append(f"--optim_args {setting}")
    if lost:
        raise UserError(
            f"{', '.join(lost)} would have no effect: {type(optimizer).__name__} (--optim {args.optim.value}) does not "
            "use it. Omit it, or choose an optimizer that does."
        )


def _same(text: str, value: Any) -> bool:
    if isinstance(value, tuple):
        return any(_same(text, each) for each in value)
    try:
        return float(text) == float(value)
    except (TypeError, ValueError):
        return text.lower() == str(value).lower()
