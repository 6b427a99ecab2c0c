"""Attention and positions: FlashAttention, shifted sparse attention, scaling of rotary positions."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from medicalgpt.args import AttentionArguments
from medicalgpt.errors import UserError
from medicalgpt.models.towers import without_towers

import torch
from loguru import logger
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_flash_attention_utils import FLASH_ATTN_KERNEL_FALLBACK
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_kernels_available


@dataclass(frozen=True)
class FlashFacts:
    """What decides which FlashAttention can run.

    Attributes:
        capability: major compute capability of the GPU (8 Ampere, 9 Hopper); None without a CUDA GPU.
        half: attention computes in bfloat16 or float16.
        package_2: the package flash-attn is installed.
        package_3: the package flash-attn-3 is installed.
        kernel: the package kernels is installed and can load a prebuilt kernel.
    """

    capability: int | None
    half: bool
    package_2: bool = False
    package_3: bool = False
    kernel: bool = False


def flash_facts(half: bool) -> FlashFacts:
    """The facts of this machine. A prebuilt kernel is looked up on the hub only if no package is installed.

    Args:
        half: attention computes in bfloat16 or float16.
    """
    if not torch.cuda.is_available() or not half:
        return FlashFacts(torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else None, half)
    package_2, package_3 = is_flash_attn_2_available(), is_flash_attn_3_available()
    return FlashFacts(
        capability=torch.cuda.get_device_capability()[0],
        half=half,
        package_2=package_2,
        package_3=package_3,
        kernel=not package_2 and is_kernels_available() and is_flash_attn_2_available(kernels_fallback_ok=True),
    )


def choose_flash(facts: FlashFacts) -> tuple[str, str]:
    """(name of the attention in transformers, what it is and why) for `--flash_attn`."""
    if facts.capability is None:
        missing = "there is no CUDA GPU"
    elif facts.capability < 8:
        missing = "the GPU is older than Ampere"
    elif not facts.half:
        missing = "it computes in 16 bits only, and this run does not (see --bf16)"
    elif facts.package_3 and facts.capability == 9:
        return "flash_attention_3", "FlashAttention 3, from the installed package flash-attn-3"
    elif facts.package_2:
        return "flash_attention_2", "FlashAttention 2, from the installed package flash-attn"
    elif facts.kernel:
        name = FLASH_ATTN_KERNEL_FALLBACK["flash_attention_2"]
        return name, f"FlashAttention 2, the prebuilt kernel {name} (no package flash-attn is installed)"
    else:
        missing = (
            "flash-attn is not installed, and no prebuilt kernel could be loaded (it needs the hub, and the package "
            "kernels: bash scripts/setup.sh --extras)"
        )
    return "sdpa", f"PyTorch's own, which takes its flash backend in batches without padding: {missing}"


SHIFTED = "shifted_sparse"
SHIFTED_MODELS = ("llama", "mistral", "qwen2", "qwen3")


def shifted_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """S2-Attn of LongLoRA (https://arxiv.org/abs/2309.12307) in training, full attention otherwise.

    A token attends to earlier tokens in its group of `module.shift_group_size` tokens. In the second half of the heads
    the groups begin half a group later, so that information flows from one group to the next in the following layer.
    The two half groups at the ends stay separate: a cyclic shift would let the beginning see the end.

    Args:
        module: the attention layer, with `shift_group_size`, `num_key_value_groups` and `training`.
        query: (batch, heads, length, head width).
        key, value: (batch, key-value heads, length, head width); of the same length as `query` in training.
        attention_mask: (batch, 1, length, length), True where a token attends; None: to all earlier tokens.

    Returns:
        (batch, length, heads, head width), and no weights.
    """
    length = query.shape[2]
    if not module.training or key.shape[2] != length:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    key = repeat_kv(key, module.num_key_value_groups)
    value = repeat_kv(value, module.num_key_value_groups)
    size, heads = module.shift_group_size, query.shape[1] // 2
    parts = []
    for chosen, first in ((slice(0, heads), size), (slice(heads, None), size // 2)):
        borders = [0, *range(first, length, size), length]
        qkv = query[:, chosen], key[:, chosen], value[:, chosen]
        parts.append(_within_groups(*qkv, attention_mask, borders, dropout, scaling))
    return torch.cat(parts, dim=1).transpose(1, 2).contiguous(), None


def _within_groups(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    borders: Sequence[int],
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    groups = []
    for start, end in pairwise(borders):
        block = None if mask is None else mask[:, :, start:end, start:end]
        groups.append(
            torch.nn.functional.scaled_dot_product_attention(
                query[:, :, start:end],
                key[:, :, start:end],
                value[:, :, start:end],
                attn_mask=block,
                dropout_p=dropout,
                is_causal=block is None,
                scale=scaling,
            )
        )
    return torch.cat(groups, dim=2)


AttentionInterface.register(SHIFTED, shifted_attention)
AttentionMaskInterface.register(SHIFTED, sdpa_mask)


def require_shiftable(config: PreTrainedConfig) -> None:
    """Raises UserError for a model that shifted sparse attention was not tested with."""
    if config.model_type not in SHIFTED_MODELS:
        raise UserError(
            f"--shift_attn supports {', '.join(SHIFTED_MODELS)} models, this one is {config.model_type}. Leave it out."
        )
    if getattr(config, "sliding_window", None):
        raise UserError(
            f"--shift_attn does not work with the sliding window of {config.sliding_window} tokens of this model. "
            "Leave it out."
        )


def set_group_size(model: torch.nn.Module, max_length: int) -> int:
    """Set the group size of every attention layer, a quarter of `max_length`, and return it.

    The size is fixed for the whole training: taken from each batch, it would depend on the other rows in the batch.

    Raises:
        UserError: `max_length` is too short to be divided.
    """
    size = max_length // 4
    if size < 2:
        raise UserError(f"--shift_attn divides the length into four groups; {max_length} tokens are too few.")
    for _, module in without_towers(model):
        if hasattr(module, "num_key_value_groups"):
            module.shift_group_size = size
    return size


def choose(attending: AttentionArguments, config: PreTrainedConfig, half: bool) -> str | None:
    """The attention that the flags request, by its name in transformers; None for the default.

    Args:
        half: attention computes in bfloat16 or float16.

    Raises:
        UserError: both flags, or a model that does not support the attention.
    """
    if attending.flash_attn and attending.shift_attn:
        raise UserError(
            "--flash_attn computes full attention, --shift_attn attention within groups; choose one. (Within groups, "
            "PyTorch uses its flash backend by itself in batches without padding.)"
        )
    if attending.shift_attn:
        require_shiftable(config)
        return SHIFTED
    if not attending.flash_attn:
        return None
    name, reason = choose_flash(flash_facts(half))
    logger.info(f"--flash_attn: {reason}")
    return name


ROPE_SCALING = ("linear", "dynamic", "yarn")


def context_length(config: PreTrainedConfig) -> int | None:
    """Maximum number of positions of a sequence, scaling included; None if the model sets no limit."""
    config = config.get_text_config()
    length = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if not length or rope.get("rope_type") not in ROPE_SCALING or not rope.get("factor"):
        return length
    if rope["rope_type"] == "yarn":
        # max_position_embeddings is the extended length in some checkpoints, the original one in others.
        return max(length, _extended(rope.get("original_max_position_embeddings", length), rope["factor"]))
    return _extended(length, rope["factor"])


def _extended(length: int, factor: float) -> int:
    # A factor is a quotient of two lengths, so that the product may be a little below the length it was made for.
    return math.floor(length * factor + 1e-6)


def scaled_rope(config: PreTrainedConfig, kind: str, length: int) -> dict[str, Any]:
    """`rope_parameters` that stretch the rotary positions of a model to `length` tokens.

    `max_position_embeddings` does not change, since `dynamic` uses it and other programs multiply it by the factor.

    Args:
        config: of the model, not scaled yet.
        kind: `linear` (https://arxiv.org/abs/2306.15595), `dynamic` (NTK-aware, by the length of the current batch),
            or `yarn` (https://arxiv.org/abs/2309.00071).

    Raises:
        UserError: the model has no rotary positions, is scaled already, or `length` fits without scaling.
    """
    text = config.get_text_config()
    own = getattr(text, "rope_parameters", None)
    if not own or not getattr(text, "max_position_embeddings", None):
        raise UserError(f"--rope_scaling {kind}: {config.model_type} models have no rotary positions. Leave it out.")
    if "rope_type" not in own:
        raise UserError(
            f"--rope_scaling {kind}: the layers of {config.model_type} models have different positions. Leave it out."
        )
    if own["rope_type"] != "default":
        raise UserError(
            f"--rope_scaling {kind}: the positions of this model are scaled already ({own['rope_type']}, up to "
            f"{context_length(config)} tokens). Leave it out."
        )
    known = text.max_position_embeddings
    if length <= known:
        raise UserError(
            f"--rope_scaling {kind} would have no effect: the model has {known} positions, and the training length is "
            f"{length}. Leave it out, or set a greater length (--model_max_length, in pretraining --block_size)."
        )
    scaled = {**own, "rope_type": kind, "factor": length / known}
    if kind == "yarn":
        scaled["original_max_position_embeddings"] = known
    trial = copy.deepcopy(text)
    trial.rope_parameters = scaled
    try:
        trial.validate_rope()
    except (ValueError, KeyError) as error:
        # The library would refuse it when the trained model is saved.
        raise UserError(
            f"--rope_scaling {kind} does not work with {config.model_type} models: {error}. Leave it out."
        ) from error
    return scaled


def rope_to_record(config: PreTrainedConfig) -> dict[str, Any] | None:
    """The rotary parameters that an adapter's base must be loaded with, if they are scaled as by `scaled_rope`."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return dict(rope) if rope.get("rope_type") in ROPE_SCALING else None


def scaling_flag(config: PreTrainedConfig) -> str:
    """The flag that stretches the model's positions; empty if they cannot be, or are already."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return "--rope_scaling yarn" if rope.get("rope_type") == "default" else ""


def position_options(config: PreTrainedConfig, rope_scaling: str | None, length: int | None) -> dict[str, Any]:
    """Options of `load_model` with which the model's positions reach `length` tokens (None: no requirement).

    Raises:
        UserError: the model has fewer positions, or see `scaled_rope`.
    """
    if rope_scaling:
        return {"rope_parameters": scaled_rope(config, rope_scaling, length)}
    known = context_length(config)
    if length and known and length > known:
        scaling = scaling_flag(config)
        raise UserError(
            f"the training length is {length} tokens, and the model has {known} positions. Set a length of at most "
            f"{known} (--model_max_length, in pretraining --block_size)"
            + (f" or stretch its positions: {scaling}." if scaling else ".")
        )
    rope = rope_to_record(config)
    return {"rope_parameters": rope} if rope else {}
