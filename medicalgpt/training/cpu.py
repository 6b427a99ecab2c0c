"""How training on a CPU is made faster and leaner: LM head on supervised positions only, dropout, memory allocator."""

import ctypes
import functools
import platform
import types
from typing import Any

from medicalgpt.data.encoding import IGNORED

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.utils.other import TrainableTokensWrapper
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

# Settings with which some families transform their logits after the head; TRL's head implements each of them.
LOGIT_SETTINGS = (
    "final_logit_softcapping",
    "logit_scale",
    "output_multiplier",
    "lm_head_multiplier",
    "logits_scaling",
)


M_MMAP_THRESHOLD = -3  # of malloc.h
# Below it the kernel zeroes so many fresh pages that a step takes 50% longer.
MMAP_THRESHOLD = 12 * 2**20

# Positions scored at a time. Their logits, this many times the vocabulary, are the largest tensors of a step.
CHUNK = 1024


def score_targets(
    head: torch.nn.Module, hidden: torch.Tensor, targets: torch.Tensor, measured: bool = True
) -> dict[str, torch.Tensor]:
    """Log-probabilities of targets, holding the logits of only `CHUNK` positions at a time.

    A trained head keeps all logits for the backward pass; a frozen one keeps the gradient with respect to `hidden`
    instead, which is as small as `hidden`.

    Args:
        head: from hidden states to logits.
        hidden: (positions, width).
        targets: (positions,) token ids.
        measured: return more than the log-probabilities.

    Returns:
        Of shape (positions,), named as in `FusedCausalLMOutput`: `log_probs` of the targets; if `measured`, also
        `entropy` in nats, `is_top1`, whether the target is the likeliest token, and `mean_logits`, the mean over the
        vocabulary. Only the first has a gradient.
    """
    frozen = type(head) is torch.nn.Linear and type(head.weight) is torch.nn.Parameter and not head.weight.requires_grad
    # ZeRO-3 gathers the weight only while the module itself runs.
    plain = not hasattr(head.weight, "ds_id") and head.weight.dtype == hidden.dtype == torch.float32
    if frozen and plain and torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu"):
        columns = _FrozenHead.apply(hidden, head.weight, head.bias, targets, measured)
    else:
        parts = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
        scored = [_score(head(part).float(), target, measured) for part, target in parts]
        columns = [torch.cat(column) for column in zip(*scored, strict=True)]
    return dict(zip(("log_probs", "entropy", "is_top1", "mean_logits"), columns, strict=False))


def _score(scores: torch.Tensor, targets: torch.Tensor, measured: bool) -> tuple[torch.Tensor, ...]:
    """The columns of `score_targets`, from logits of shape (positions, vocabulary)."""
    raw = scores.detach()
    measures = (raw.argmax(dim=-1) == targets, raw.mean(dim=-1)) if measured else ()
    del raw
    scores = scores.log_softmax(dim=-1)
    log_probs = scores.gather(1, targets[:, None])[:, 0]
    if not measured:
        return (log_probs,)
    with torch.no_grad():
        return log_probs, -scores.exp().mul_(scores).sum(dim=-1), *measures


class _FrozenHead(torch.autograd.Function):
    """d log p(target) / d hidden = W[target] - p W, known as soon as the logits are."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        measured: bool,
    ) -> tuple[torch.Tensor, ...]:
        log_probs, entropies, means = (hidden.new_empty(len(hidden)) for _ in range(3))
        hits = hidden.new_empty(len(hidden), dtype=torch.bool)
        gradient = torch.empty_like(hidden)
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            target = targets[part]
            scores = torch.nn.functional.linear(hidden[part], weight, bias)
            if measured:
                hits[part] = scores.argmax(dim=-1) == target
                means[part] = scores.mean(dim=-1)
            scores = scores.log_softmax(dim=-1)
            log_probs[part] = scores.gather(1, target[:, None])[:, 0]
            if measured:
                probabilities = scores.exp()
                entropies[part] = -scores.mul_(probabilities).sum(dim=-1)
            else:
                probabilities = scores.exp_()
            gradient[part] = weight[target] - probabilities @ weight
        ctx.save_for_backward(gradient)
        if not measured:
            return (log_probs,)
        ctx.mark_non_differentiable(entropies, hits, means)
        return log_probs, entropies, hits, means

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor, *_: Any) -> tuple[torch.Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[:, None], None, None, None, None


def add_cpu_head(model: PreTrainedModel, measured: bool = True, temperature: float = 1.0) -> None:
    """Send only supervised positions through the LM head on a CPU.

    TRL's fused head does so on GPUs; on a CPU it scores every position and recomputes the logits in the backward pass,
    which takes a third of a step of a small model. Models that transform their logits after the head, or add the loss
    of their routers, keep TRL's head.

    Args:
        model: the causal model without wrappers, with TRL's `fused_lm_head` forward.
        measured: compute more than the log-probabilities (see `score_targets`).
        temperature: logits are divided by it.
    """
    if isinstance(head := model.get_output_embeddings(), TrainableTokensWrapper):
        # TRL multiplies by the weight, which in peft's wrapper includes the new rows, and reads a bias, which it hides.
        head.register_parameter("bias", None)
    config = model.config.get_text_config()
    changes_logits = any(getattr(config, name, None) not in (None, 1.0) for name in LOGIT_SETTINGS)
    if changes_logits or getattr(config, "output_router_logits", False):
        return
    if temperature != 1.0 and getattr(head, "bias", None) is not None:
        return
    fused_forward = model.forward

    # Keeps the signature, against which `generate` checks its arguments.
    @functools.wraps(type(model).forward)
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        on_cpu = self.device.type == "cpu"
        if not kwargs.get("fused_lm_head") or not on_cpu or kwargs.get("shift_labels") is not None:
            return fused_forward(*args, **kwargs)
        for name in ("fused_lm_head", "shift_labels", "num_items_in_batch"):
            kwargs.pop(name, None)
        labels = kwargs.pop("labels")[:, 1:]
        kwargs["use_cache"] = False
        hidden = self.base_model(*args, **kwargs).last_hidden_state[:, :-1]
        mask = labels != IGNORED
        # Without a bias, scaling the hidden state scales the logits.
        columns = score_targets(self.get_output_embeddings(), hidden[mask] / temperature, labels[mask], measured)
        return FusedCausalLMOutput(
            loss=-columns["log_probs"].sum() / mask.sum().clamp(min=1),
            label_mask=mask,
            **{name: values.new_zeros(mask.shape).masked_scatter(mask, values) for name, values in columns.items()},
        )

    model.forward = types.MethodType(forward, model)


class LeanDropout(torch.nn.Dropout):
    """`torch.nn.Dropout` that keeps one byte per number for the backward pass; on a CPU the original keeps four."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Any shape to the same shape; in training a share `p` becomes 0 and the rest is scaled up."""
        return torch.native_dropout(input, self.p, train=True)[0] if self.training and self.p else input


def replace_lora_dropout(model: torch.nn.Module) -> None:
    """Replace the dropout of adapters with `LeanDropout`: its mask is most of what they keep for the backward pass."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name, dropout in module.lora_dropout.items():
                if type(dropout) is torch.nn.Dropout:
                    module.lora_dropout[name] = LeanDropout(dropout.p)


def return_freed_memory() -> None:
    """Make glibc return large blocks to the system at once.

    By default it adapts to the first large tensors and keeps freed blocks of up to 32 MiB. Tensors of batches of other
    lengths do not fit between them, so the process grows 50% beyond what is in use.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)
