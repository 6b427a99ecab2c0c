"""Load tokenizers and models, quantized, with adapters, and ready to train."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

from medicalgpt.args import AttentionArguments, LoraArguments, ModelArguments, bf16_gpu
from medicalgpt.errors import UserError
from medicalgpt.logs import local_rank, notice, world_size
from medicalgpt.models import attention, towers
from medicalgpt.models.adapters import adapters_to_float32, add_lora, attach_adapter, check_flags
from medicalgpt.models.families import (
    TESTED,
    TESTED_WITH_TOWERS,
    check_family,
    settle_backbone,
    settle_prediction_layers,
)
from medicalgpt.models.hub import (
    HEADS,
    TOKENIZER_CONFIG,
    Checkpoint,
    CheckpointError,
    load_pretrained,
    tokenizer_source,
    weight_shapes,
)
from medicalgpt.models.quantization import (
    BITSANDBYTES,
    RESTORED,
    check_stored,
    quantization_config,
    quantizing_flag,
    restore,
    settle_restored,
)

import torch
from loguru import logger
from peft import PeftModel, TaskType
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)


def load_tokenizer(
    name_or_path: str, *, revision: str | None = None, cache_dir: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, of an adapter (its base's, if it has none), or of a folder with a tokenizer alone.

    A tokenizer without a padding token pads with its end token: padding is known by labels and attention masks, never
    by the token.

    Raises:
        CheckpointError: not found.
    """
    source = tokenizer_source(name_or_path)
    return _with_padding(load_pretrained(AutoTokenizer, source, revision=revision, cache_dir=cache_dir), source)


def checkpoint_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint that is resolved already. For the rest see `load_tokenizer`."""
    of_base = checkpoint.tokenizer == checkpoint.source
    tokenizer = load_pretrained(
        AutoTokenizer,
        checkpoint.tokenizer,
        # The library needs it for the tokenizer's class, and would load it again.
        config=checkpoint.config if of_base else None,
        revision=checkpoint.revision,
        cache_dir=checkpoint.cache_dir,
    )
    return _with_padding(tokenizer, checkpoint.tokenizer)


def _with_padding(tokenizer: PreTrainedTokenizerBase, source: str) -> PreTrainedTokenizerBase:
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise CheckpointError(f"the tokenizer of {source} has neither a padding nor an end token.")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def stage_checkpoint(arguments: ModelArguments, lora: LoraArguments) -> Checkpoint:
    """Resolve the model that a stage's flags name, once, before anything large is loaded.

    Raises:
        CheckpointError: not found, or not an adapter (see `Checkpoint.resolve`).
        UserError: flags without effect (see `check_flags`).
    """
    checkpoint = Checkpoint.from_arguments(arguments, lora.peft_path)
    check_flags(lora, checkpoint.adapter)
    check_stored(
        checkpoint.config,
        checkpoint.source,
        flag=quantizing_flag(arguments.load_in_4bit or arguments.qlora, arguments.load_in_8bit),
        full_training=not lora.use_peft,
        in_training=True,
        revision=checkpoint.revision,
        cache_dir=checkpoint.cache_dir,
    )
    return checkpoint


def stage_tokenizer(checkpoint: Checkpoint, arguments: ModelArguments) -> PreTrainedTokenizerBase:
    """The tokenizer that a stage trains with; that of an adapter has its chat template and system prompt.

    A model that cannot be trained is refused here, before the data is read.

    Raises:
        CheckpointError: not found, or a tokenizer that does not give the positions of its tokens in the text.
        UserError: a family that cannot be trained (see `check_family`).
    """
    config = checkpoint.config
    check_family(config, quantizing_flag(arguments.load_in_4bit or arguments.qlora, arguments.load_in_8bit))
    if config.model_type not in (*TESTED, *TESTED_WITH_TOWERS):
        logger.warning(f"{config.model_type} is not among the model families that were tested (docs/models.md)")
    tokenizer = checkpoint_tokenizer(checkpoint)
    if not tokenizer.is_fast:
        raise CheckpointError(
            f"the tokenizer of {checkpoint.tokenizer} ({type(tokenizer).__name__}) does not give the positions of "
            "its tokens in a text, so that answers cannot be distinguished from questions. Pass one that has a "
            "tokenizer.json: --tokenizer_name_or_path."
        )
    return tokenizer


def load_model(
    auto_class: Any,
    name_or_path: str,
    *,
    config: PreTrainedConfig | None = None,
    num_labels: int | None = None,
    rope_parameters: dict[str, Any] | None = None,
    dtype: str = "auto",
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    qlora: bool = False,
    device_map: str | None = None,
    revision: str | None = None,
    cache_dir: str | None = None,
    attn_implementation: str | None = None,
    full_training: bool = False,
    with_towers: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """Load the weights of a base or full checkpoint (not of an adapter, see `attach_adapter`).

    Of a checkpoint that takes images or audio too, only the language model is loaded unless `with_towers` (see
    `towers`).

    Args:
        auto_class: AutoModelForCausalLM, AutoModelForSequenceClassification, ...
        name_or_path: local folder or hub name.
        config: its configuration, if it is loaded already.
        num_labels: outputs of the head of a model for sequences.
        rope_parameters: rotary positions other than those in the configuration.
        dtype: `auto` is bfloat16 on a GPU that supports it, else float32; with `full_training` always float32, since
            updates of the usual size are lost in bfloat16 weights (autocast still computes in bfloat16).
        device_map: as in accelerate; only in a single process.
        with_towers: the model is to be shown images too (see `vision`).

    Raises:
        CheckpointError: not found or not loadable.
        UserError: options that contradict each other, or a family that does not suit (see `check_family`).
    """
    quantization = quantization_config(load_in_4bit, load_in_8bit, qlora)
    flag = quantizing_flag(load_in_4bit or qlora, load_in_8bit)
    if quantization and full_training:
        raise UserError(
            "a quantized base cannot be trained in full: pass --use_peft True, or leave the 4/8-bit flag out."
        )
    if quantization and auto_class is AutoModelForSequenceClassification:
        # By default the library takes the last module for the head, which is not true of every family.
        quantization.llm_int8_skip_modules = list(HEADS)
    if attn_implementation:
        options["attn_implementation"] = attn_implementation
    where = {"revision": revision, "cache_dir": cache_dir}
    if config is None:
        config = load_pretrained(AutoConfig, name_or_path, **where)
    stored = check_stored(config, name_or_path, flag=flag, full_training=full_training, **where)
    if auto_class is AutoModelForCausalLM:
        check_family(config, flag)
        _require_generator(config, name_or_path)
    config = copy.deepcopy(config)
    if num_labels is not None:
        config.num_labels = num_labels
    if rope_parameters is not None:
        config.get_text_config().rope_parameters = rope_parameters
    if stored in RESTORED:
        restore(config, stored)
    weights_dtype = _weights_dtype(dtype, full_training)
    load = partial(towers.load, with_towers=with_towers) if towers.has_towers(config) else load_pretrained
    model = load(
        *(auto_class, name_or_path),
        config=config,
        dtype=weights_dtype,
        quantization_config=quantization,
        device_map=_placement(device_map, quantized=bool(quantization) or stored == BITSANDBYTES),
        **where,
        **options,
    )
    if stored in RESTORED:
        settle_restored(model, weights_dtype)
    if auto_class is AutoModelForCausalLM:
        _settle_generator(model, config, name_or_path, where)
    return model


def _settle_generator(
    model: PreTrainedModel, config: PreTrainedConfig, name_or_path: str, where: dict[str, Any]
) -> None:
    """Correct what a family's class leaves out or adds.

    Args:
        config: of the checkpoint; that of the model may be of its language model alone.
        where: `revision` and `cache_dir` of the checkpoint.
    """
    settle_backbone(model)
    if not towers.has_towers(config):
        settle_prediction_layers(model, weight_shapes(name_or_path, **where))


def _require_generator(config: PreTrainedConfig, name: str) -> None:
    if any(architecture.endswith("ForSequenceClassification") for architecture in config.architectures or ()):
        # The library would initialize a head at random, and only warn.
        raise CheckpointError(
            f"{name} is a reward model: it scores texts and cannot generate any, as its LM head is gone. "
            "Pass the language model that it was trained from; scores: python reward_modeling.py --score_file FILE."
        )


def _placement(device_map: str | None, quantized: bool) -> str | dict[str, int] | None:
    """Where the weights go: nowhere else under torchrun, and quantized ones to the GPU at once.

    Raises:
        UserError: a placement for a single process, in one of several.
    """
    if device_map and world_size() > 1:
        if device_map != "auto":
            raise UserError("--device_map is for a single process; under torchrun each process has its own GPU.")
        notice("--device_map auto: each of these processes has its own GPU, so the model is not distributed over them.")
        device_map = None
    if quantized and device_map is None and torch.cuda.is_available():
        return {"": local_rank()}
    return device_map


def _weights_dtype(dtype: str, full_training: bool) -> torch.dtype:
    if dtype != "auto":
        return getattr(torch, dtype)
    return torch.bfloat16 if bf16_gpu() and not full_training else torch.float32


def resolve_length(training: Any, name: str, checkpoint: Checkpoint, attending: AttentionArguments) -> None:
    """Refuse a training length beyond the model's positions; shorten one that is a default.

    Args:
        training: parsed arguments; changed in place.
        name: the field with the length in tokens.

    Raises:
        UserError: the length does not fit, or fits without the `--rope_scaling` that was passed.
    """
    if getattr(training, name) < 1:
        raise UserError(f"--{name} {getattr(training, name)} must be at least 1.")
    config = checkpoint.config
    known = attention.context_length(config)
    if name not in training.given and not attending.rope_scaling and known:
        setattr(training, name, min(known, getattr(training, name)))
    attention.position_options(config, attending.rope_scaling, getattr(training, name))


def load_base(
    auto_class: Any,
    checkpoint: Checkpoint,
    arguments: ModelArguments,
    lora: LoraArguments,
    attending: AttentionArguments | None = None,
    *,
    max_length: int | None = None,
    bf16: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """The base of a checkpoint in the numeric form of the flags, with its adapter merged if all weights are trained.

    If an adapter is trained, that of the checkpoint stays separate (see `add_lora`).

    Args:
        auto_class, options: see `load_model`.
        arguments: numeric form and placement; the model that they name is `checkpoint`.
        max_length: tokens of the longest training sequence.
        bf16: whether training computes in bfloat16, whatever the type of the weights.

    Raises:
        UserError: positions or attention that the model does not support, or flags that contradict each other.
    """
    attending = attending or AttentionArguments()
    config, adapter = checkpoint.config, checkpoint.adapter
    options |= attention.position_options(config, attending.rope_scaling, max_length)
    half = bf16 or _weights_dtype(arguments.dtype, not lora.use_peft) in (torch.bfloat16, torch.float16)
    model = load_model(
        auto_class,
        checkpoint.source,
        config=config,
        dtype=arguments.dtype,
        load_in_4bit=arguments.load_in_4bit,
        load_in_8bit=arguments.load_in_8bit,
        qlora=arguments.qlora,
        device_map=arguments.device_map,
        revision=checkpoint.revision,
        cache_dir=checkpoint.cache_dir,
        full_training=not lora.use_peft,
        attn_implementation=attention.choose(attending, config, half),
        **options,
    )
    if attending.shift_attn:
        attention.set_group_size(model, max_length)
    never_repack_4bit(model)
    if adapter:
        logger.info(f"{adapter.path} is an adapter: base {checkpoint.base} plus that adapter")
        if not lora.use_peft:
            model = attach_adapter(model, adapter).merge_and_unload()
            # peft froze the base when it added the adapter.
            model.requires_grad_(True)
            for name in towers.towers_of(model):
                model.get_submodule(name).requires_grad_(False)
    return model


def load_trainable(
    auto_class: Any,
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    arguments: ModelArguments,
    lora: LoraArguments,
    attending: AttentionArguments | None = None,
    *,
    max_length: int | None = None,
    bf16: bool = False,
    **options: Any,
) -> PreTrainedModel | PeftModel:
    """The model to train: base, an embedding row for each token, adapter, trained weights in float32.

    For the arguments and errors see `load_base`, `fit_embedding` and `add_lora`.

    Args:
        auto_class: AutoModelForCausalLM or AutoModelForSequenceClassification.
        tokenizer: of the training rows.
    """
    model = load_base(auto_class, checkpoint, arguments, lora, attending, max_length=max_length, bf16=bf16, **options)
    new_rows = fit_embedding(model, tokenizer, lora, cache_dir=checkpoint.cache_dir)
    task_type = TaskType.SEQ_CLS if auto_class is AutoModelForSequenceClassification else TaskType.CAUSAL_LM
    model = add_lora(model, lora, task_type, adapter=checkpoint.adapter, new_rows=new_rows)
    adapters_to_float32(model)
    return model


def never_repack_4bit(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for inference on a CPU with AVX-512.

    It does so at the first evaluation or generated answer and never undoes it; the product of repacked weights has no
    gradient, so that training would continue with wrong updates. Nor can it repack layers of every width.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def fit_embedding(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, lora: LoraArguments, *, cache_dir: str | None = None
) -> list[int]:
    """Give each token of the tokenizer a row in the embedding, and return the new rows for `add_lora`.

    A row is new if the embedding had to grow for it (it then starts at the mean of the others), or if the tokenizer of
    the model's checkpoint has no token, or another one, with that id, as in spare rows or where reserved tokens get a
    meaning. If that checkpoint has no tokenizer, or one that was extended in place, tokens in spare rows cannot be
    distinguished from old ones and count as old.

    Args:
        cache_dir: where downloads are kept.

    Returns:
        Ids, ascending; empty if all weights are trained.

    Raises:
        UserError: the tokenizer is not the model's, nor an extension of it.
    """
    rows = add_missing_rows(model, tokenizer)
    tokens = {row: token for token, row in tokenizer.get_vocab().items()}
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
            "what the model knows of them would be wrong. Pass the model's own tokenizer or an extension of it; to "
            "learn all tokens from scratch: --use_peft False, or --modules_to_save embed_tokens,lm_head."
        )
    return sorted(row for row, token in tokens.items() if row >= rows or own.get(row) != token)


def add_missing_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str = "") -> int:
    """Give each token of a tokenizer a row in the embedding and the head of a model that reads its ids.

    Every model that does needs this: policy, reference, critic, reward model. A padding token without a row, which is
    common, would otherwise be an index beyond the embedding.

    Args:
        name: which model, for the log, if it is not the first one.

    Returns:
        The number of rows before.

    Raises:
        UserError: the model has embeddings for each of its layers too, which cannot grow.
    """
    rows = model.get_input_embeddings().num_embeddings
    needed = max(tokenizer.get_vocab().values()) + 1
    if needed > rows:
        config = model.config.get_text_config()
        if getattr(config, "hidden_size_per_layer_input", None):
            raise UserError(
                f"the tokenizer has tokens up to id {needed - 1}, and {name or 'the model'} has {rows} rows in its "
                f"embedding and in those of its layers, which cannot grow in {config.model_type}. Use its own "
                "tokenizer, and give reserved tokens of it a meaning in place of new ones."
            )
        model.resize_token_embeddings(needed)
        of_which = f" of {name}" if name else ""
        logger.info(f"the embedding{of_which} grew from {rows} to {needed} rows; the new ones start at the mean")
    return rows


def _own_tokens(model: PreTrainedModel, cache_dir: str | None) -> dict[int, str] | None:
    """Ids and tokens of the tokenizer in the model's own checkpoint; None if it has none."""
    name = model.config._name_or_path
    if Path(name).is_dir() and not (Path(name) / TOKENIZER_CONFIG).is_file():
        return None
    # Of a model from a hub, the commit is known.
    revision = model.config._commit_hash
    try:
        tokenizer = load_pretrained(AutoTokenizer, name, config=model.config, revision=revision, cache_dir=cache_dir)
    except CheckpointError:
        return None
    return {row: token for token, row in tokenizer.get_vocab().items()}
