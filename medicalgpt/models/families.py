"""Which model families can be trained: decided by the configuration alone, before anything large is loaded."""

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from medicalgpt.errors import UserError
from medicalgpt.models.towers import has_towers, language_half

import torch
from loguru import logger
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_utils import set_zero3_state
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)
from transformers.pytorch_utils import Conv1D

# By `model_type` of config.json: those that the tests take from pretraining to inference; see docs/models.md.
TESTED = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi3",
    "glm",
    "glm4",
    "mixtral",
    "qwen3_moe",
    "qwen2_moe",
    "qwen3_next",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "glm4_moe_lite",
    "gpt_oss",
    "llama4_text",
    "minimax_m2",
    "hunyuan_v1_moe",
    "hunyuan_v1_dense",
    "minicpm3",
    "ministral3",
    "seed_oss",
    "ernie4_5",
    "exaone4",
    "smollm3",
    "olmo2",
    "olmo3",
    "granite",
    "cohere2",
    "lfm2",
)
# The same, of checkpoints that take images or audio too.
TESTED_WITH_TOWERS = (
    "qwen3_5",
    "qwen3_5_moe",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "gemma3",
    "gemma4",
    "llama4",
    "mistral3",
    "glm4v",
    "glm46v",
)
# Share of the weights between embedding and head that are in linear layers: below the first, 4 or 8 bits save next to
# nothing; below the second, less than expected.
USEFUL_SHARE, EXPECTED_SHARE = 0.5, 0.95


def check_family(config: PreTrainedConfig, quantizing_flag: str | None = None) -> None:
    """Refuse a model without a causal language model, or one that quantization would hardly make smaller.

    Args:
        config: of the base model.
        quantizing_flag: `--load_in_4bit` or `--load_in_8bit`, if its linear layers are to be quantized.

    Raises:
        UserError: with the model type, the reason and the remedy.
    """
    kind, problem = config.model_type, None
    if has_towers(config):
        # Raises an error if its language model cannot be trained alone.
        language_half(config)
    elif config.is_encoder_decoder:
        problem = "has an encoder and a decoder; use a decoder-only model"
    elif kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        problem = "has no causal language model in transformers; use a decoder-only model"
    elif kind in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES:
        problem = "takes images or audio too, within its language model; use a decoder-only model"
    elif kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        problem = "is an encoder, which sees the tokens that it should predict; use a decoder-only model"
    if problem:
        raise UserError(
            f"{config.name_or_path or 'the model'} is of the type {kind}, which {problem}, such as Qwen/Qwen3-0.6B. "
            "docs/models.md lists the families."
        )
    if quantizing_flag:
        _check_quantizable(config, quantizing_flag)


def _check_quantizable(config: PreTrainedConfig, flag: str) -> None:
    """Warn of weights that bitsandbytes would not quantize. Raises UserError if that is the larger part."""
    if has_towers(config):
        model = language_half(config).on_meta()
    else:
        # Under ZeRO-3 the library would shard the weights of this model too, which are not there.
        with torch.device("meta"), set_zero3_state():
            model = AutoModelForCausalLM.from_config(config)
    ends = [end.weight for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]
    weights = [weight for weight in model.parameters() if all(weight is not end for end in ends)]
    linear = [module.weight for module in model.modules() if type(module) in (torch.nn.Linear, Conv1D)]
    linear = [weight for weight in linear if all(weight is not end for end in ends)]
    total = sum(weight.numel() for weight in weights)
    share = sum(weight.numel() for weight in linear) / total
    fact = (
        f"{flag} reaches {share:.0%} of the {total:,} weights between embedding and head of {type(model).__name__}: "
        "bitsandbytes quantizes linear layers"
    )
    if share < USEFUL_SHARE:
        others = ", ".join(fused_experts(model)) or "others"
        raise UserError(f"{fact}, and {others} are stored in another way. It would save next to nothing; omit it.")
    if share < EXPECTED_SHARE:
        logger.warning(f"{fact}; the others are not quantized")


def fused_experts(model: torch.nn.Module) -> dict[str, int]:
    """The weights of experts that are stored together, by the end of their names, with their number of parameters.

    They are tensors of three dimensions (experts, out, in) and not linear layers, so that neither `all-linear` of peft
    nor bitsandbytes finds them.
    """
    sizes: Counter = Counter()
    for prefix, module in model.named_modules():
        if isinstance(module, (torch.nn.Conv1d, torch.nn.ConvTranspose1d)):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            # Under ZeRO-3 the weight itself is an empty tensor.
            shape = getattr(parameter, "ds_shape", parameter.shape)
            if len(shape) == 3:
                sizes[f"{prefix.rpartition('.')[2]}.{name}"] += shape.numel()
    return dict(sizes)


def require_separate_packs(model: torch.nn.Module, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
    """Try on two short sequences whether the model keeps packed sequences apart.

    Attention does where position ids restart. State-space layers, convolutions over time, and attention without
    position ids carry information over into the next sequence. Not tried under ZeRO-3, where the weights are sharded.

    Args:
        collator: makes a batch of packed rows, as `batching.Collator` does.

    Raises:
        UserError: the logits of the second sequence change with the first.
    """
    if is_deepspeed_zero3_enabled():
        return
    logits, was_training = [], model.training
    model.eval()
    with torch.no_grad():
        for first in (0, 8):
            ids = [*range(first, first + 8), *range(16, 24)]
            batch = collator([{"input_ids": ids, "labels": ids, "seq_lengths": [8, 8]}])
            batch = {name: values.to(model.device) for name, values in batch.items() if name != "labels"}
            logits.append(model(**batch, use_cache=False).logits[0, 8:].float())
    model.train(was_training)
    change = ((logits[0] - logits[1]).abs().max() / logits[0].abs().max()).item()
    # If they are apart, the logits differ by rounding at most.
    if change > 0.01:
        raise UserError(
            f"{model.config.model_type} does not keep packed sequences apart: the logits of one change by {change:.0%} "
            "with the sequence before it. Pass --packing False: each row is then a sequence of its own, and there is "
            "little padding if rows of similar length share a batch (--train_sampling_strategy group_by_length)."
        )


def require_loss(model: PreTrainedModel, routed: bool = False) -> None:
    """Try on a short sequence whether TRL's fused LM head can compute the loss of a model.

    It builds on what most families have in common: hidden states from `base_model`, and for the routers of a mixture
    of experts the names of Mixtral's settings. Not tried if the weights are not in this process (ZeRO-3, FSDP).

    Args:
        model: the causal model without wrappers, with TRL's `fused_lm_head` forward.
        routed: the loss of its routers is added.

    Raises:
        UserError: it cannot; with the error of the library.
    """
    if is_deepspeed_zero3_enabled() or any(parameter.is_meta for parameter in model.parameters()):
        return
    ids = torch.arange(8, device=model.get_input_embeddings().weight.device)[None]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            options = {"output_router_logits": True} if routed else {}
            model(input_ids=ids, labels=ids, fused_lm_head=True, use_cache=False, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        remedy = "Pass --router_aux_loss_coef 0, or use" if routed else "Use"
        raise UserError(
            f"the loss of {model.config.model_type} cannot be computed in training: {type(error).__name__}: {error}. "
            f"{remedy} a model of a family in docs/models.md."
        ) from error
    finally:
        model.train(was_training)


def settle_backbone(model: PreTrainedModel) -> None:
    """Correct what trainers would read of a causal model that is not so.

    `base_model` is the model without its head, from which TRL takes hidden states: the library has there for the
    language model of Llama 4 the name that it has next to the encoder of images. And a family without a loss for its
    routers has no weight of one: Llama 4 has the setting, and the trainer would take the loss of another family.
    """
    if model.base_model is model:
        embedding = model.get_input_embeddings()
        for name, child in model.named_children():
            if child is not embedding and any(module is embedding for module in child.modules()):
                model.base_model_prefix = name
    config = model.config.get_text_config()
    known = vars(sys.modules[type(model).__module__])
    if hasattr(config, "router_aux_loss_coef") and "load_balancing_loss_func" not in known:
        config.router_aux_loss_coef = 0.0


def settle_prediction_layers(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Say which weights the library has ignored: layers that predict several tokens at once (DeepSeek-V3, GLM-4.5).

    Args:
        model: its configuration is changed if it counts them, since it is saved without them.
        names: of the weights in the files that it was loaded from.
    """
    config = model.config.get_text_config()
    found = []
    for name in names:
        layer = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
        if re.search(r"(?:^|\.)mtp", name) or (layer and int(layer[1]) >= config.num_hidden_layers):
            found.append(name)
    if found:
        if hasattr(config, "num_mtp_layers"):
            config.num_mtp_layers = 0
        logger.warning(
            f"{len(found)} weights of layers that predict several tokens at once ({found[0]}, ...) are not loaded: "
            "they are not trained, and a merged or fully trained model is saved without them"
        )
