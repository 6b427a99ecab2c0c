"""Which optimizer `--optim` names: what it needs, what it has no use for, and the learning rates of LoRA+."""

import importlib.util
import re
from typing import Any

from medicalgpt.errors import UserError

import torch
from loguru import logger
from transformers import TrainingArguments

# Packages that optimizers of transformers come from: (beginning of the name, module, name for pip).
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
    """Refuse at the start what would fail, or have no effect, when the optimizer is built.

    GaLore (https://arxiv.org/abs/2403.03507) and APOLLO (https://arxiv.org/abs/2412.05270) keep their states for
    low-rank projections of the gradients of whole matrices: of all linear layers, if `--optim_target_modules` is unset.

    Raises:
        UserError: a package that is missing, or flags that do not go with `--optim`.
    """
    optim = args.optim.value
    for start, module, package in OPTIMIZER_PACKAGES:
        if optim.startswith(start) and importlib.util.find_spec(module) is None:
            raise UserError(f"--optim {optim} needs a package that is not installed: pip install {package}")
    if args.use_cpu and optim.startswith(("galore_adamw_8bit", "adalomo")):
        raise UserError(f"--optim {optim} runs on GPUs only; on a CPU: {'adamw_8bit' if '8bit' in optim else 'lomo'}.")
    low_rank, layerwise = optim.startswith(("galore", "apollo")), optim.endswith("layerwise")
    if args.optim_target_modules is not None and not low_rank:
        raise UserError(f"--optim_target_modules is for GaLore and APOLLO; --optim {optim} has no use for it.")
    if low_rank and use_peft:
        raise UserError(
            f"--optim {optim} saves memory where whole matrices are trained; adapters are of low rank already. Add "
            "--use_peft False, or choose another optimizer, such as adamw_8bit."
        )
    if layerwise and (args.gradient_accumulation_steps > 1 or args.world_size > 1):
        raise UserError(
            f"--optim {optim} updates each weight as its gradient comes, so it needs --gradient_accumulation_steps 1 "
            f"and a single process. Or say --optim {optim.removesuffix('_layerwise')}."
        )
    if layerwise and args.max_grad_norm and "max_grad_norm" in getattr(args, "given", ()):
        raise UserError(f"--optim {optim} updates each weight at once, so --max_grad_norm has no effect. Leave it out.")
    if low_rank and args.optim_target_modules is None:
        args.optim_target_modules = "all-linear"
        logger.info(f"--optim {optim}: low-rank states for every linear layer (--optim_target_modules all-linear)")
    names = args.optim_target_modules
    if isinstance(names, str) and re.fullmatch(r"[\w.]+(, *[\w.]+)*", names) and names != "all_linear":
        # transformers would take such text as a regular expression for a module's whole name.
        args.optim_target_modules = names.replace(" ", "").split(",")


def apply_loraplus(optimizer: torch.optim.Optimizer, model: torch.nn.Module, ratio: float) -> None:
    """LoRA+ (https://arxiv.org/abs/2402.12354): the B matrices of adapters get `ratio` times the learning rate.

    They become parameter groups beside those that they were in, with the same weight decay, so that any optimizer with
    a rate per group will do, and schedules go on from both rates. All else, such as new token rows, DoRA's lengths and
    modules trained in full, keeps its rate.

    Raises:
        UserError: the optimizer has one rate only, or there are no B matrices.
    """
    if ratio <= 0:
        raise UserError(f"--loraplus_lr_ratio {ratio:g}: a factor above 0 is needed; the paper uses 16.")
    fast = {id(p) for name, p in model.named_parameters() if ".lora_B." in name or ".lora_embedding_B." in name}
    groups = [group for group in optimizer.param_groups if any(id(p) in fast for p in group["params"])]
    if not groups or "lomo" in type(optimizer).__name__.lower():
        raise UserError(
            f"--loraplus_lr_ratio has no effect on {type(optimizer).__name__}, which has a single learning rate or "
            "none of an adapter's B matrices. Leave it out, or choose --optim adamw_torch."
        )
    for group in groups:
        chosen = [p for p in group["params"] if id(p) in fast]
        group["params"] = [p for p in group["params"] if id(p) not in fast]
        optimizer.add_param_group({**group, "params": chosen, "lr": group["lr"] * ratio})
    optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]


def check_flags_applied(args: TrainingArguments, optimizer: torch.optim.Optimizer) -> None:
    """Compare the flags of the optimizer that the user gave with what the optimizer holds.

    transformers hands each optimizer only some of them, and leaves the others out without a word.

    Raises:
        UserError: one that has not arrived.
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
            "take it. Leave it out, or choose an optimizer that has it."
        )


def _same(text: str, value: Any) -> bool:
    if isinstance(value, tuple):
        return any(_same(text, each) for each in value)
    try:
        return float(text) == float(value)
    except (TypeError, ValueError):
        return text.lower() == str(value).lower()
