"""Load tokenizers and models, place and quantize them, put adapters on them, and merge adapters into them."""

import os
from pathlib import Path
from typing import Any

from medicalgpt.args import AttentionArguments, LoraArguments, ModelArguments, bf16_gpu
from medicalgpt.errors import UserError
from medicalgpt.models import attention
from medicalgpt.models.adapters import attach_adapter
from medicalgpt.models.families import TESTED, check_family
from medicalgpt.models.hub import HEADS, CheckpointError, fetch, load_pretrained, recorded_positions, resolve_checkpoint

import torch
from loguru import logger
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)


def load_tokenizer(
    name_or_path: str, *, revision: str | None = None, cache_dir: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, of an adapter folder (its base's, if it has none), or of a folder of its own.

    A tokenizer without padding token pads with its end token: labels and attention masks mark the padding, never the
    token itself.

    Raises:
        CheckpointError: not found.
    """
    has_own = (Path(name_or_path) / "tokenizer_config.json").is_file()
    source = name_or_path if has_own else resolve_checkpoint(name_or_path)[0]
    tokenizer = load_pretrained(AutoTokenizer, source, revision=None if has_own else revision, cache_dir=cache_dir)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise CheckpointError(f"the tokenizer of {name_or_path} has neither a padding nor an end token.")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def stage_tokenizer(arguments: ModelArguments, lora: LoraArguments) -> PreTrainedTokenizerBase:
    """The tokenizer that a stage's flags name; that of an adapter knows its template and system prompt.

    It is what a stage loads first, so a model that cannot be trained is refused here, before the data is read.

    Raises:
        CheckpointError: not found, or a tokenizer that does not say where in the text its tokens are.
        UserError: a family that cannot be trained (see `check_family`).
    """
    config = base_config(arguments, lora)
    check_family(config, _quantizing_flag(arguments.load_in_4bit or arguments.qlora, arguments.load_in_8bit))
    if config.model_type not in TESTED:
        logger.warning(f"{config.model_type} is not among the model families that were tested (docs/models.md)")
    name = arguments.tokenizer_name_or_path or lora.peft_path or arguments.model_name_or_path
    name = fetch(name, arguments.hub, arguments.model_revision, arguments.cache_dir)
    tokenizer = load_tokenizer(name, revision=arguments.model_revision, cache_dir=arguments.cache_dir)
    if not tokenizer.is_fast:
        raise CheckpointError(
            f"the tokenizer of {name} ({type(tokenizer).__name__}) does not say where in a text its tokens are, so "
            "that answers cannot be told from questions. Name one that has a tokenizer.json: --tokenizer_name_or_path."
        )
    return tokenizer


def _quantizing_flag(load_in_4bit: bool, load_in_8bit: bool) -> str | None:
    return "--load_in_4bit" if load_in_4bit else "--load_in_8bit" if load_in_8bit else None


def quantization_config(load_in_4bit: bool, load_in_8bit: bool, qlora: bool) -> BitsAndBytesConfig | None:
    """NF4 for 4 bits, with double quantization for QLoRA (https://arxiv.org/abs/2305.14314); int8 for 8 bits.

    Raises:
        UserError: both widths at once.
    """
    load_in_4bit = load_in_4bit or qlora
    if load_in_4bit and load_in_8bit:
        raise UserError("--load_in_8bit does not go with --load_in_4bit or --qlora; choose one.")
    if load_in_4bit:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=qlora,
            bnb_4bit_compute_dtype=torch.bfloat16 if bf16_gpu() else torch.float32,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if load_in_8bit else None


def load_model(
    auto_class: Any,
    name_or_path: str,
    *,
    dtype: str = "auto",
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    qlora: bool = False,
    device_map: str | None = None,
    revision: str | None = None,
    cache_dir: str | None = None,
    attn_implementation: str | None = None,
    full_training: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """Load the weights of a base or full checkpoint (not of an adapter, see `attach_adapter`).

    Args:
        auto_class: AutoModelForCausalLM, AutoModelForSequenceClassification, ...
        name_or_path: local folder or hub name.
        dtype: `auto` is bfloat16 on a GPU that has it, float32 otherwise; with `full_training` always float32, since
            updates of a usual size vanish in bfloat16 weights (autocast still computes in bfloat16).
        device_map: as accelerate has it; only in a single process.

    Raises:
        CheckpointError: not found or not loadable.
        UserError: options that contradict each other, or a family that does not suit (see `check_family`).
    """
    quantization = quantization_config(load_in_4bit, load_in_8bit, qlora)
    distributed = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if device_map and distributed:
        raise UserError("--device_map is for a single process; under torchrun each process has a GPU of its own.")
    if quantization and full_training:
        raise UserError("a quantized base cannot be trained in full: add --use_peft True, or drop the 4/8-bit flag.")
    if quantization and auto_class is AutoModelForSequenceClassification:
        # By default the library goes by the place of the head among the modules, which is a family's own affair.
        quantization.llm_int8_skip_modules = list(HEADS)
    if quantization and device_map is None and torch.cuda.is_available():
        device_map = {"": int(os.environ.get("LOCAL_RANK", "0"))}
    if attn_implementation:
        options["attn_implementation"] = attn_implementation
    if auto_class is AutoModelForCausalLM:
        config = options.get("config") or load_pretrained(
            AutoConfig, name_or_path, revision=revision, cache_dir=cache_dir
        )
        check_family(config, _quantizing_flag(load_in_4bit or qlora, load_in_8bit))
        if any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
            # The library would give it a head of random numbers, and say so in a line among others.
            raise CheckpointError(
                f"{name_or_path} is a model that scores texts and cannot write any: its head for words is gone. Name "
                "the language model that it was made from; scores: python reward_modeling.py --score_file FILE."
            )
    return load_pretrained(
        auto_class,
        name_or_path,
        dtype=_weights_dtype(dtype, full_training),
        quantization_config=quantization,
        device_map=device_map,
        revision=revision,
        cache_dir=cache_dir,
        **options,
    )


def _weights_dtype(dtype: str, full_training: bool) -> torch.dtype:
    if dtype != "auto":
        return getattr(torch, dtype)
    return torch.bfloat16 if bf16_gpu() and not full_training else torch.float32


def base_config(arguments: ModelArguments, lora: LoraArguments) -> PreTrainedConfig:
    """The configuration of the base that the flags name, with the positions that its adapter was trained with."""
    base, adapter = resolve_checkpoint(arguments.model_name_or_path)
    source = fetch(base, arguments.hub, arguments.model_revision, arguments.cache_dir)
    config = load_pretrained(AutoConfig, source, revision=arguments.model_revision, cache_dir=arguments.cache_dir)
    for name, value in recorded_positions(adapter or lora.peft_path).items():
        setattr(config.get_text_config(), name, value)
    return config


def settle_length(
    training: Any, name: str, arguments: ModelArguments, lora: LoraArguments, attending: AttentionArguments
) -> None:
    """Refuse a training length beyond the model's positions, before any time is spent; shorten a default that is.

    Args:
        training: parsed arguments; changed in place.
        name: the field that holds the length in tokens.

    Raises:
        UserError: the length that was given does not fit, or fits without the `--rope_scaling` that was given.
    """
    if getattr(training, name) < 1:
        raise UserError(f"--{name} {getattr(training, name)} must be at least 1.")
    config = base_config(arguments, lora)
    known = attention.context_length(config)
    if name not in training.given and not attending.rope_scaling and known:
        setattr(training, name, min(known, getattr(training, name)))
    attention.position_options(config, attending.rope_scaling, getattr(training, name))


def load_base(
    auto_class: Any,
    arguments: ModelArguments,
    lora: LoraArguments,
    attending: AttentionArguments | None = None,
    *,
    max_length: int | None = None,
    bf16: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """The model that a stage starts from, by its flags: base, or base with `--model_name_or_path`'s adapter merged.

    An adapter stays separate where an adapter is trained on (see `add_lora`); it is merged where all weights are.

    Args:
        max_length: tokens of the longest training sequence.
        bf16: whether training computes in bfloat16, whatever the weights are.

    Raises:
        UserError: positions or attention that the model cannot have, or flags that contradict each other.
    """
    attending = attending or AttentionArguments()
    base, adapter = resolve_checkpoint(arguments.model_name_or_path)
    config = base_config(arguments, lora)
    options |= attention.position_options(config, attending.rope_scaling, max_length)
    half = bf16 or _weights_dtype(arguments.dtype, not lora.use_peft) in (torch.bfloat16, torch.float16)
    model = load_model(
        auto_class,
        fetch(base, arguments.hub, arguments.model_revision, arguments.cache_dir),
        dtype=arguments.dtype,
        load_in_4bit=arguments.load_in_4bit,
        load_in_8bit=arguments.load_in_8bit,
        qlora=arguments.qlora,
        device_map=arguments.device_map,
        revision=arguments.model_revision,
        cache_dir=arguments.cache_dir,
        full_training=not lora.use_peft,
        attn_implementation=attention.choose(attending, config, half),
        **options,
    )
    if attending.shift_attn:
        attention.set_group_size(model, max_length)
    never_repack_4bit(model)
    if adapter:
        logger.info(f"{arguments.model_name_or_path} is an adapter: base {base} plus that adapter")
        if not lora.use_peft:
            model = attach_adapter(model, adapter).merge_and_unload()
            # peft froze the base when it put the adapter on.
            model.requires_grad_(True)
    return model


def never_repack_4bit(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for inference on a CPU with AVX-512.

    It does so at the first evaluation or generated answer and never undoes it; the repacked product has no gradient,
    so that training would go on with wrong updates. Nor can it repack layers of every width.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def fit_embedding(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, lora: LoraArguments, *, cache_dir: str | None = None
) -> list[int]:
    """Give each token of the tokenizer a row in the embedding, and say which rows are new, for `add_lora`.

    A row is new if it lies beyond the model's own, which then starts at the mean of the others; or if the tokenizer of
    the model's checkpoint has no token of that id, or another one, as where an embedding has spare rows or reserved
    tokens are given a meaning. Where that checkpoint has no tokenizer, or one that was extended in place, tokens in
    spare rows cannot be told from old ones and count as old.

    Args:
        cache_dir: where downloads are kept.

    Returns:
        Ids, ascending. None are looked for if all weights are trained.

    Raises:
        UserError: the tokenizer is another one than the model's, not an extended one.
    """
    rows = model.get_input_embeddings().num_embeddings
    tokens = {row: token for token, row in tokenizer.get_vocab().items()}
    needed = max(tokens) + 1
    if needed > rows:
        model.resize_token_embeddings(needed)
        logger.info(f"the embedding grew from {rows} to {needed} rows; the new ones start at the mean")
    if not lora.use_peft:
        return []
    own = _own_tokens(model, cache_dir)
    if own is None:
        return sorted(row for row in tokens if row >= rows)
    changed = [row for row, token in tokens.items() if own.get(row, token) != token]
    in_full = (lora.modules_to_save or "").replace(" ", "").split(",")
    if len(changed) > len(own) / 2 and "embed_tokens" not in in_full:
        raise UserError(
            f"the tokenizer gives {len(changed)} of {len(own)} ids of {model.config._name_or_path} to other tokens, so "
            "what the model knows of them would be wrong. Give the model's own tokenizer or one extended from it; to "
            "learn all tokens anew: --use_peft False, or --modules_to_save embed_tokens,lm_head."
        )
    return sorted(row for row, token in tokens.items() if row >= rows or own.get(row) != token)


def _own_tokens(model: PreTrainedModel, cache_dir: str | None) -> dict[int, str] | None:
    """Ids and tokens of the tokenizer in the model's own checkpoint; None if it has none."""
    name = model.config._name_or_path
    if Path(name).is_dir() and not (Path(name) / "tokenizer_config.json").is_file():
        return None
    try:
        # The commit is known where the model came from a hub.
        tokenizer = load_tokenizer(name, revision=getattr(model.config, "_commit_hash", None), cache_dir=cache_dir)
    except CheckpointError:
        return None
    return {row: token for token, row in tokenizer.get_vocab().items()}
