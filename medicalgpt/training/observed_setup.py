"""What is inspected right before the first step of training, and one line of the table that comes out of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from medicalgpt.models.hub import Adapter
from medicalgpt.models.towers import towers_of, without_towers

import torch
from peft import PeftModel
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_layers import GradientCheckpointingLayer

OFF = "off"


class Line(NamedTuple):
    """One line of the table; `agrees` is None where the observed side cannot be seen, which is not an agreement."""

    name: str
    requested: str
    observed: str
    agrees: bool | None
    remedy: str = ""


class Pass(NamedTuple):
    """Input of the first decoder layer, (batch, length, hidden size), and the type that autocast computes in."""

    hidden: torch.Tensor
    autocast: str


@dataclass(frozen=True)
class TrainingSetup:
    """Everything that is ready for the first step.

    Args:
        flags: as they were parsed, by name, and `processes`, the number that was launched.
        training: the trainer's arguments as they were parsed.
        trainer: ready for its first step, optimizer and schedule included.
        batches: the batches of the first step, as they go into the model.
        resumed: the adapter that training resumes, if there is one.
    """

    flags: dict[str, Any]
    training: TrainingArguments
    trainer: Trainer
    batches: Sequence[dict[str, torch.Tensor]]
    resumed: Adapter | None = None

    @cached_property
    def model(self) -> nn.Module:
        """The model with its adapter, without the wrappers of distributed training; of policy and critic the policy."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        return getattr(model, "policy", model)

    @property
    def critic(self) -> nn.Module | None:
        """What is trained alongside the model."""
        return getattr(self.trainer.accelerator.unwrap_model(self.trainer.model), "critic", None)

    @cached_property
    def base_model(self) -> nn.Module:
        """The model without its adapter's wrapper."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @cached_property
    def towers(self) -> tuple[str, ...]:
        """Names of the encoders of images, which are never trained."""
        return towers_of(self.base_model)

    @property
    def peft(self) -> bool:
        """Whether an adapter is requested; a program without adapter flags trains all weights."""
        return self.flags.get("use_peft", False)

    @property
    def sharded(self) -> str:
        """What keeps a single weight from being seen, or an empty string."""
        if is_deepspeed_zero3_enabled():
            return "ZeRO-3"
        return "FSDP" if self.trainer.is_fsdp_enabled else ""

    @property
    def unobservable(self) -> str:
        """Why a hook cannot see a forward pass, or an empty string."""
        layers = any(isinstance(module, GradientCheckpointingLayer) for module in self.model.modules())
        return self.sharded or ("" if layers else "no decoder layer was found")

    @cached_property
    def training_pass(self) -> Pass:
        return first_layer_input(self, training=True)

    def not_observed(self, name: str, requested: str, why: str) -> Line:
        return Line(name, requested, f"not observed ({why})", None)


class _Seen(Exception):
    """Ends a forward pass whose rest nobody needs."""


def first_layer_input(setup: TrainingSetup, training: bool) -> Pass:
    """Run the first batch up to the first decoder layer, as a step or an evaluation would run it."""
    model, found = setup.trainer.model, []
    modules = (module for _, module in without_towers(setup.base_model))
    layer = next(module for module in modules if isinstance(module, GradientCheckpointingLayer))

    def look(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        kind = hidden.device.type
        number = str(torch.get_autocast_dtype(kind)).removeprefix("torch.")
        found.append(Pass(hidden.detach(), number if torch.is_autocast_enabled(kind) else OFF))
        raise _Seen

    modes = {module: module.training for module in model.modules()}
    model.train(training)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    hook = layer.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with torch.no_grad():
            setup.trainer.compute_loss(model, dict(setup.batches[0]))
    except _Seen:
        pass
    finally:
        hook.remove()
        for module, mode in modes.items():
            module.training = mode
    return found[0]
