"""Callbacks of a trainer: one watches its steps, one stops the run as Ctrl-C would."""

import torch
from transformers import TrainerCallback


class Watch(TrainerCallback):
    """Loss and gradient norm of every step."""

    def __init__(self):
        self.losses, self.gradients = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        norms = [parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]
        self.gradients.append(torch.stack(norms).norm().item())

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])


class Kill(TrainerCallback):
    """Stops a run after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt
