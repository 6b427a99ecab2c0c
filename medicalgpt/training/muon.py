"""Muon (`--use_muon`): updates of weight matrices are orthogonalized; all other weights get AdamW.

Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/. The updates are scaled to the size of AdamW's, so
that both share one learning rate and weight decay: Liu et al. 2025, https://arxiv.org/abs/2502.16982.
"""

from collections.abc import Callable, Iterable
from typing import Any

from medicalgpt.errors import UserError

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

MOMENTUM = 0.95
# Quintic Newton-Schulz iteration of the first reference: five steps bring singular values to about 0.7 to 1.2.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
# Root mean square of AdamW's usual updates, from the second reference.
ADAMW_RMS = 0.2


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the matrices, AdamW for the rest, as one optimizer with one state to save.

    Args:
        groups: parameter groups of an AdamW, with its settings. Each is divided in two that keep these settings.
        matrices: the parameters, all of two dimensions, that Muon updates.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], matrices: Iterable[nn.Parameter]):
        chosen, divided = {id(parameter) for parameter in matrices}, []
        for group in groups:
            for use_muon in (True, False):
                own = [parameter for parameter in group["params"] if (id(parameter) in chosen) == use_muon]
                divided += [{**group, "params": own, "use_muon": use_muon}] if own else []
        super().__init__(divided, {"lr": divided[0]["lr"]})
        # Only its update rule is used: it works on the groups and the state of this optimizer.
        self._adamw = torch.optim.AdamW([nn.Parameter(torch.empty(0))])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update all parameters that have gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["use_muon"]:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._update(parameter, group["lr"], group["weight_decay"])
        self._adamw.param_groups = [group for group in self.param_groups if not group["use_muon"]]
        self._adamw.state = self.state
        self._adamw.step()
        return loss

    def _update(self, parameter: nn.Parameter, rate: float, decay: float) -> None:
        state, gradient = self.state[parameter], parameter.grad
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - MOMENTUM)
        direction = orthogonalize(gradient.lerp(momentum, MOMENTUM))
        parameter.mul_(1 - rate * decay)
        parameter.add_(direction.to(parameter.dtype), alpha=-rate * ADAMW_RMS * max(parameter.shape) ** 0.5)


def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """About U V^T of the singular value decomposition of (m, n) `matrix`, in the type that the device is fast with."""
    result = matrix.to(torch.bfloat16 if matrix.is_cuda or cpu_has_bfloat16() else torch.float32)
    tall = matrix.shape[0] > matrix.shape[1]
    if tall:
        result = result.T
    # Division by the Frobenius norm bounds all singular values by 1, as the iteration needs.
    result = result / result.norm().clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = result @ result.T
        result = torch.addmm(result, torch.addmm(gram, gram, gram, beta=b, alpha=c), result, beta=a)
    return result.T if tall else result


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices; others emulate it, several times slower than float32."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def muon_matrices(model: PreTrainedModel) -> list[nn.Parameter]:
    """The trained (m, n) weights of linear layers in the blocks. Embeddings, output layer and heads are not in blocks.

    Raises:
        UserError: there are none.
    """
    count = model.config.get_text_config().num_hidden_layers
    blocks = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    linear = (layer for part in blocks for layer in part.modules() if isinstance(layer, nn.Linear | Conv1D))
    found = {id(layer.weight): layer.weight for layer in linear if layer.weight.requires_grad}
    if not found:
        raise UserError(f"--use_muon True has no effect: no layer of {type(model).__name__} is trained. Omit it.")
    return list(found.values())
