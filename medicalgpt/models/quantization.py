"""Weights in fewer bits: quantized as they are loaded, or stored so, which of them are restored and which refused."""

from typing import Any

from medicalgpt.args import bf16_gpu
from medicalgpt.errors import UserError
from medicalgpt.models.hub import CheckpointError, weight_shapes
from medicalgpt.models.towers import has_towers

import torch
from loguru import logger
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

# Methods, as in `quant_method` of config.json, of which the library restores the weights without another package.
RESTORED = ("fp8", "mxfp4")
# Trained as it is stored: the adapters are all that is trained.
BITSANDBYTES = "bitsandbytes"
SCALE = "_scale_inv"


def quantizing_flag(load_in_4bit: bool, load_in_8bit: bool) -> str | None:
    """The flag that asks for fewer bits, for messages."""
    return "--load_in_4bit" if load_in_4bit else "--load_in_8bit" if load_in_8bit else None


def quantization_config(load_in_4bit: bool, load_in_8bit: bool, qlora: bool) -> BitsAndBytesConfig | None:
    """NF4 for 4 bits, with double quantization for QLoRA (https://arxiv.org/abs/2305.14314); int8 for 8 bits.

    Raises:
        UserError: both widths at once.
    """
    load_in_4bit = load_in_4bit or qlora
    if load_in_4bit and load_in_8bit:
        raise UserError("--load_in_8bit does not work with --load_in_4bit or --qlora; choose one.")
    if load_in_4bit:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=qlora,
            bnb_4bit_compute_dtype=torch.bfloat16 if bf16_gpu() else torch.float32,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if load_in_8bit else None


def stored_method(config: PreTrainedConfig) -> str | None:
    """How the weights of a checkpoint are quantized in its files, as in `quant_method` of config.json, or None."""
    settings = _settings(config)
    return None if settings is None else str(settings.get("quant_method") or "unknown")


def _settings(config: PreTrainedConfig) -> dict[str, Any] | None:
    for part in (config, config.get_text_config()):
        if found := getattr(part, "quantization_config", None):
            return found if isinstance(found, dict) else found.to_dict()
    return None


def check_stored(
    config: PreTrainedConfig,
    source: str,
    *,
    flag: str | None = None,
    full_training: bool = False,
    in_training: bool = False,
    revision: str | None = None,
    cache_dir: str | None = None,
) -> str | None:
    """Refuse a checkpoint that is stored in a form that cannot be loaded here, or that does not suit the flags.

    Args:
        config: of the base model.
        source, revision, cache_dir: where it is.
        flag: `--load_in_4bit` or `--load_in_8bit`, if it is set.
        full_training: all weights are trained.
        in_training: training requires the flag of what it trains on.

    Returns:
        Its method (see `stored_method`).

    Raises:
        UserError: with the method, the reason and the remedy.
        CheckpointError: see `_require_equal_blocks`.
    """
    settings, method = _settings(config), stored_method(config)
    if method is None:
        return None
    fact = f"{source} is stored quantized ({method})"
    if method == BITSANDBYTES:
        own = "--load_in_8bit" if settings.get("load_in_8bit") or settings.get("_load_in_8bit") else "--load_in_4bit"
        if flag not in (None, own):
            raise UserError(f"{fact}, as {own} does it, so {flag} would have no effect. Omit it.")
        if in_training and flag is None and not full_training:
            raise UserError(f"{fact}, as {own} does it. Pass {own} True to train an adapter on it.")
        if full_training:
            raise UserError(f"{fact}, so it cannot be trained in full: pass --use_peft True, or the unquantized one.")
        return method
    if method not in RESTORED:
        raise UserError(
            f"{fact}, a form for inference that cannot be loaded here. Use the unquantized checkpoint that it was made "
            "from, in training with --load_in_4bit True to save memory; to serve this one, use vLLM."
        )
    if has_towers(config):
        raise UserError(
            f"{fact} and takes images or audio too: the whole checkpoint could not be written with trained weights. "
            "Use the unquantized checkpoint."
        )
    if flag:
        raise UserError(
            f"{fact}, and {flag} would quantize it again. Omit the flag: the weights are restored as they "
            "are loaded. To save memory, use the unquantized checkpoint with the flag."
        )
    _require_equal_blocks(settings, source, revision, cache_dir)
    return method


def restore(config: PreTrainedConfig, method: str) -> None:
    """Set a configuration so that the library restores the weights as it loads them, on a GPU too.

    Args:
        config: of the base; changed in place.
        method: one of `RESTORED`.
    """
    for part in (config, config.get_text_config()):
        if getattr(part, "quantization_config", None):
            part.quantization_config = {**(_settings(part) or {}), "dequantize": True}
    logger.info(
        f"{config.name_or_path} is stored quantized ({method}): its weights are restored, and need the memory of an "
        "unquantized model"
    )


def settle_restored(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Make a model with restored weights like one that was stored in full.

    The library restores MXFP4 to bfloat16 whatever type is wanted. And when it saves the model it would reverse the
    conversions that it has loaded it with, and name each weight after its scale.

    Args:
        dtype: of the weights.
    """
    model._weight_conversions = None
    for parameter in model.parameters():
        if parameter.dtype == torch.bfloat16 != dtype:
            parameter.data = parameter.data.to(dtype)


def _require_equal_blocks(settings: dict[str, Any], source: str, revision: str | None, cache_dir: str | None) -> None:
    """Refuse FP8 weights that are not a whole number of blocks.

    The library divides a weight equally among its scales, which shifts them if the last block is smaller. Does
    nothing if the files are not on this machine.

    Raises:
        CheckpointError: with the first of these weights.
    """
    block = settings.get("weight_block_size")
    shapes = weight_shapes(source, revision=revision, cache_dir=cache_dir) if block else {}
    uneven = []
    for name, scales in shapes.items():
        shape = shapes.get(name.removesuffix(SCALE)) if name.endswith(SCALE) else None
        if shape and len(scales) == 2 and [count * size for count, size in zip(scales, block, strict=True)] != shape:
            uneven.append(f"{name.removesuffix(SCALE)} of the shape {shape}")
    if uneven:
        raise CheckpointError(
            f"{source} is stored quantized (fp8) in blocks of {block}, and {len(uneven)} weight(s) are not a whole "
            f"number of blocks ({uneven[0]}), so that transformers restores them wrongly. Use the unquantized "
            "checkpoint."
        )
