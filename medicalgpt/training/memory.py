"""When memory runs out: which changes of this run's flags cost least, and about how much each of them saves.

The savings are arithmetic on the run's own numbers, not measurements: bytes of weights, gradients and optimizer states,
and of the activations that the backward pass needs (after https://arxiv.org/abs/2205.05198, for a gated MLP and an
attention that does not keep its scores).
"""

import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from medicalgpt.errors import is_out_of_memory

import torch
from transformers import PreTrainedConfig

SHOWN_REMEDIES = 3
# A change that saves less than this share of the whole is not worth its name in the message.
WORTHWHILE = 0.02
NF4_BYTES = 0.52  # half a byte for a weight, and its part of the scale of its block


@dataclass(frozen=True)
class Remedy:
    """A change of flags.

    Attributes:
        flags: to add to the command, or to put in the place of those that are there.
        saves: bytes on each process, by estimate.
        price: what it costs.
    """

    flags: str
    saves: float
    price: str

    def __str__(self) -> str:
        return f"{self.flags}  (about {size(self.saves)} less; {self.price})"


@dataclass(frozen=True)
class MemoryPlan:
    """What a run needs on each process, in bytes where nothing else is said.

    Attributes:
        frozen, frozen_count: weights that are not trained, and their number.
        trained, trained_count: weights that are trained, and their number.
        batch: rows of a batch on one process; each has `sequences` sequences of up to `length` tokens.
        layers, hidden: of the model.
        layer_numbers: numbers that a layer keeps for the backward pass, per token.
        number: bytes of each of them.
    """

    frozen: int
    frozen_count: int
    trained: int
    trained_count: int
    batch: int
    accumulation: int
    sequences: int
    length: int
    layers: int
    hidden: int
    layer_numbers: int
    number: int
    processes: int
    optimizer: str
    checkpointing: bool
    adapter: bool
    quantized: bool
    sharded: bool

    def activations(self, *, batch: int | None = None, length: int | None = None, checkpointing: bool | None = None):
        """Bytes of the activations, with these values in place of the run's own."""
        batch, length = batch or self.batch, length or self.length
        layer = batch * self.sequences * length * self.layer_numbers * self.number
        if not (self.checkpointing if checkpointing is None else checkpointing):
            return layer * self.layers
        return layer + batch * self.sequences * length * self.hidden * self.number * self.layers

    @property
    def states(self) -> int:
        """Bytes of the optimizer's states."""
        if "8bit" in self.optimizer:
            return 2 * self.trained_count
        return 2 * self.trained if "adam" in self.optimizer else 0

    @property
    def total(self) -> float:
        return self.frozen + 2 * self.trained + self.states + self.activations()


def activation_numbers(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Layers, width, and the numbers that a layer keeps per token."""
    config = config.get_text_config()
    hidden, heads = config.hidden_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or hidden // heads
    key_value = getattr(config, "num_key_value_heads", None) or heads
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    # Two norms and two residuals; queries and the attention's output; keys and values; gate, up, activation, product.
    return config.num_hidden_layers, hidden, 4 * hidden + 2 * heads * head + 2 * key_value * head + 4 * inner


def plan_memory(
    args: Any, model: torch.nn.Module, config: PreTrainedConfig, *, length: int, sequences: int, adapter: bool
) -> MemoryPlan:
    """The plan of a run from its arguments and its model.

    Args:
        args: the trainer's.
        length: of the longest sequence, in tokens.
        sequences: per row: 2 for preference pairs.
        adapter: whether an adapter is trained.
    """
    weights = {True: [0, 0], False: [0, 0]}
    for weight in model.parameters():
        part = getattr(weight, "ds_tensor", weight)
        weights[weight.requires_grad][0] += part.numel() * part.element_size()
        weights[weight.requires_grad][1] += part.numel()
    layers, hidden, numbers = activation_numbers(config)
    return MemoryPlan(
        *(*weights[False], *weights[True]),
        batch=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        sequences=sequences,
        length=length,
        layers=layers,
        hidden=hidden,
        layer_numbers=numbers,
        number=2 if args.bf16 or args.fp16 else 4,
        processes=args.world_size,
        optimizer=args.optim.value,
        checkpointing=args.gradient_checkpointing,
        adapter=adapter,
        quantized=any(weight.dtype == torch.uint8 for weight in model.parameters()),
        sharded=bool(args.deepspeed or args.fsdp),
    )


def find_remedies(plan: MemoryPlan, *, length_flag: str, given: frozenset[str] = frozenset()) -> list[Remedy]:
    """Changes that save something and are not made already, the cheapest first.

    Args:
        length_flag: which flag sets the length, without its dashes.
        given: names of the flags that the user gave.
    """
    found = []
    # With either of these, the answers sampled at a time do not follow from the batch.
    fixed = given & {"generation_batch_size", "steps_per_generation"}
    if plan.batch > 1 and not fixed:
        smaller = max(batch for batch in range(1, plan.batch // 2 + 1) if plan.batch % batch == 0)
        flags = f"--per_device_train_batch_size {smaller} --gradient_accumulation_steps "
        flags += str(plan.accumulation * plan.batch // smaller)
        saved = plan.activations() - plan.activations(batch=smaller)
        found.append(Remedy(flags, saved, "the same global batch"))
    if not plan.checkpointing:
        saved = plan.activations() - plan.activations(checkpointing=True)
        found.append(Remedy("--gradient_checkpointing True", saved, "slower by about a fifth"))
    if plan.optimizer.startswith("adamw_torch") and not plan.sharded:
        saved = plan.states - 2 * plan.trained_count
        found.append(Remedy("--optim adamw_8bit", saved, "optimizer states in 8 bits"))
    if plan.processes > 1 and not plan.sharded:
        saved = (plan.trained + plan.states) * (1 - 1 / plan.processes)
        found.append(Remedy("--deepspeed zero2.json", saved, "gradients and optimizer states are sharded"))
    if not plan.adapter:
        saved = plan.trained + plan.states
        found.append(Remedy("--use_peft True", saved, "an adapter is trained, not all weights"))
    if not plan.quantized and not plan.sharded:
        count, weights = (plan.frozen_count, plan.frozen)
        if not plan.adapter:
            count, weights = plan.frozen_count + plan.trained_count, plan.frozen + plan.trained
        saved = weights - NF4_BYTES * count + (0 if plan.adapter else plan.trained + plan.states)
        flags = "--qlora True" if plan.adapter else "--use_peft True --qlora True"
        found.append(Remedy(flags, saved, "the frozen weights in 4 bits, slightly less exact"))
    if plan.length >= 64:
        saved = plan.activations() - plan.activations(length=plan.length // 2)
        found.append(Remedy(f"--{length_flag} {plan.length // 2}", saved, "longer rows are shortened or skipped"))
    return [remedy for remedy in found if remedy.saves > WORTHWHILE * plan.total]


def loading_remedies(arguments: Mapping[str, Any]) -> list[str]:
    """Flags with which the weights need less memory, and that are not given already.

    Args:
        arguments: of the run, by name.
    """
    quantized = any(arguments.get(name) for name in ("qlora", "load_in_4bit", "load_in_8bit"))
    ways = {
        "--qlora True (4 bits)": quantized,
        "--dtype bfloat16": quantized or arguments.get("dtype") in ("bfloat16", "float16"),
        "--deepspeed zero3.json (sharded over several processes)": arguments.get("deepspeed") or arguments.get("fsdp"),
    }
    return [flags for flags, is_on in ways.items() if not is_on]


def explain_memory(
    error: BaseException, plan: MemoryPlan | None, where: str, arguments: Mapping[str, Any], **options: Any
) -> str | None:
    """The message for an error, if it says that memory ran out.

    Args:
        plan: None before the model is there.
        where: a clause that says when it happened.
        arguments: of the run, by name.
        options: those of `find_remedies`.
    """
    if not is_out_of_memory(error):
        return None
    if torch.cuda.is_available():
        device = torch.cuda.current_device()
        _, capacity = torch.cuda.mem_get_info(device)
        memory = f"GPU {device} of {socket.gethostname()} has {size(capacity)}"
    else:
        memory = f"the CPU's memory on {socket.gethostname()} is used up"
    if plan is None:
        ways = "".join(f"{flags}, " for flags in loading_remedies(arguments))
        return f"out of memory {where}: {memory}. If the weights do not fit: {ways}or a smaller model."
    remedies = find_remedies(plan, **options)[:SHOWN_REMEDIES]
    if not remedies:
        return f"out of memory {where}: {memory}. No flag is left that saves much: use a smaller model or more memory."
    lines = [f"  {number}. {remedy}" for number, remedy in enumerate(remedies, start=1)]
    needs = f"this run needs about {size(plan.total)}, by estimate"
    return "\n".join([f"out of memory {where}: {memory}; {needs}. Any of these helps, the cheapest first:", *lines])


def size(count: float) -> str:
    """Bytes as text, with the unit that suits them."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"
