"""Load tokenizers and models, place and quantize them, put adapters on them, and merge adapters into them."""

import functools
import hashlib
import json
import os
import re
import socket
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medicalgpt import attention
from medicalgpt.args import AttentionArguments, LoraArguments, ModelArguments, bf16_gpu
from medicalgpt.errors import UserError
from medicalgpt.families import TESTED, check_family, fused_experts

import torch
from huggingface_hub import constants
from loguru import logger
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors import SafetensorError, safe_open
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
from transformers import __version__ as transformers_version
from transformers.integrations import is_deepspeed_zero3_enabled

ADAPTER_CONFIG = "adapter_config.json"
RUN_FILE = "run.json"
# Names of the head of a model for sequences; peft trains and saves it in full beside an adapter.
HEADS = ("score", "classifier")


class CheckpointError(UserError):
    """A checkpoint that is missing, incomplete, or does not fit the one it is used with."""


# ---------------------------------------------------------------------------------------------------------------------
# Where a checkpoint is
# ---------------------------------------------------------------------------------------------------------------------


def resolve_checkpoint(name_or_path: str) -> tuple[str, str | None]:
    """(base model, adapter or None): the folder of an adapter stands for its base with the adapter on it.

    Raises:
        CheckpointError: a local path that is no checkpoint, or an adapter whose base is not there.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        if _looks_local(name_or_path):
            raise CheckpointError(
                f"no checkpoint folder {name_or_path} (looked in {Path.cwd()}). Give the path of a folder with "
                "config.json or adapter_config.json, or a name on the hub such as Qwen/Qwen3-0.6B."
            )
        return name_or_path, None
    if (folder / ADAPTER_CONFIG).is_file():
        base = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
        if not base:
            raise CheckpointError(f"{folder / ADAPTER_CONFIG} does not name its base model.")
        if not Path(base).is_dir():
            # A path below the folder where it was trained, from which the adapter may be looked at from elsewhere.
            found = next((parent / base for parent in folder.resolve().parents if (parent / base).is_dir()), None)
            if found:
                logger.info(f"base of the adapter: {found}")
                return str(found), name_or_path
        if _looks_local(base) and not Path(base).is_dir():
            raise CheckpointError(
                f"the adapter {folder} was trained on {base}, which is not there (looked in {Path.cwd()}). "
                "Run from the folder where it was trained, or mend base_model_name_or_path in "
                f"{folder / ADAPTER_CONFIG}."
            )
        return base, name_or_path
    if not (folder / "config.json").is_file():
        inner = sorted(child.parent for child in folder.glob("*/config.json"))
        hint = f" Did you mean {inner[0]}?" if inner else ""
        raise CheckpointError(f"{folder} holds neither config.json nor {ADAPTER_CONFIG}, so it is no checkpoint.{hint}")
    return name_or_path, None


def _looks_local(name_or_path: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name_or_path) is None


def fetch(name_or_path: str, hub: str, revision: str | None = None, cache_dir: str | None = None) -> str:
    """A local folder stays; a name on ModelScope is downloaded; a name on Hugging Face is left to transformers.

    Raises:
        CheckpointError: ModelScope was asked for and its package or the download is missing.
    """
    if Path(name_or_path).is_dir() or hub == "huggingface":
        return name_or_path
    try:
        from modelscope import snapshot_download
    except ImportError as error:
        raise CheckpointError("--hub modelscope needs its package: pip install modelscope") from error
    logger.info(f"looking up {name_or_path} on ModelScope")
    try:
        return snapshot_download(name_or_path, revision=revision, cache_dir=cache_dir)
    except Exception as error:
        raise CheckpointError(f"ModelScope could not give {name_or_path}: {error}") from error


@functools.cache
def _hub_is_reachable() -> bool:
    """Whether a connection to the hub can be opened at all; the hub's own client tries for a minute to find out."""
    if constants.HF_HUB_OFFLINE:
        return False
    address = urllib.parse.urlsplit(constants.ENDPOINT)
    if urllib.request.getproxies().get(address.scheme):
        return True
    try:
        socket.create_connection((address.hostname, address.port or 443), timeout=10).close()
    except OSError as error:
        logger.warning(f"{constants.ENDPOINT} cannot be reached ({error}); looking among earlier downloads only")
        return False
    return True


def _from_pretrained(loader: Any, name_or_path: str, **options: Any) -> Any:
    if not Path(name_or_path).is_dir() and not _hub_is_reachable():
        options["local_files_only"] = True
    try:
        # Unset, it would ask on a terminal whether to run the code of a checkpoint.
        return loader.from_pretrained(name_or_path, trust_remote_code=False, **options)
    except (OSError, ValueError, SafetensorError) as error:
        if "trust_remote_code" in str(error):
            raise CheckpointError(
                f"{name_or_path} brings code of its own, and code of a checkpoint is never run here. Use one that "
                "transformers itself knows (often with -hf in its name); docs/models.md lists the families."
            ) from error
        if unknown := re.search(r"model type `(\S+)` but Transformers does not recognize", str(error)):
            raise CheckpointError(
                f"{name_or_path} is of the type {unknown[1]}, which transformers {transformers_version} does not know. "
                "docs/models.md lists the families; a newer one may need a newer transformers."
            ) from error
        if Path(name_or_path).is_dir():
            raise CheckpointError(f"{name_or_path} could not be loaded: {error}") from error
        raise CheckpointError(
            f"{name_or_path} is neither a folder here ({Path.cwd()}) nor could it be had from {constants.ENDPOINT}: "
            f"{str(error).splitlines()[0]}\n"
            "Check the name; offline, give the path of a downloaded folder; behind a wall, set "
            "HF_ENDPOINT=https://hf-mirror.com or use --hub modelscope."
        ) from error


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer and model
# ---------------------------------------------------------------------------------------------------------------------


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
    tokenizer = _from_pretrained(AutoTokenizer, source, revision=None if has_own else revision, cache_dir=cache_dir)
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


def special_tokens_in(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """The special tokens that a text spells: a tokenizer reads them as the end of a turn, say, wherever they stand."""
    special = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return [token for token in special if token in text]


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
        config = options.get("config") or _from_pretrained(
            AutoConfig, name_or_path, revision=revision, cache_dir=cache_dir
        )
        check_family(config, _quantizing_flag(load_in_4bit or qlora, load_in_8bit))
        if any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
            # The library would give it a head of random numbers, and say so in a line among others.
            raise CheckpointError(
                f"{name_or_path} is a model that scores texts and cannot write any: its head for words is gone. Name "
                "the language model that it was made from; scores: python reward_modeling.py --score_file FILE."
            )
    return _from_pretrained(
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
    config = _from_pretrained(AutoConfig, source, revision=arguments.model_revision, cache_dir=arguments.cache_dir)
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


# ---------------------------------------------------------------------------------------------------------------------
# Adapters
# ---------------------------------------------------------------------------------------------------------------------


# Flags that shape a new adapter.
SHAPE_FLAGS = frozenset(
    ("lora_rank", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "use_dora", "use_rslora")
)


def add_lora(
    model: PreTrainedModel,
    lora: LoraArguments,
    task_type: TaskType,
    *,
    start_from: str | None = None,
    new_rows: Sequence[int] = (),
) -> PreTrainedModel | PeftModel:
    """Put a new adapter on the model, or go on with the one at `--peft_path` or `start_from`.

    Args:
        model: the base; returned without an adapter if `lora.use_peft` is False.
        task_type: of peft.
        start_from: the adapter that `--model_name_or_path` pointed to.
        new_rows: ids from `fit_embedding`, whose rows of embedding and head are trained beside the adapter.

    Raises:
        UserError: contradicting flags, modules or layers that the model does not have, new rows that would stay
            untrained.
    """
    frozen = _frozen_layers(model, lora.freeze_layers) if lora.freeze_layers is not None else []
    if not lora.use_peft:
        if idle := sorted((SHAPE_FLAGS | {"peft_path", "loraplus_lr_ratio"}) & getattr(lora, "given", frozenset())):
            raise UserError(
                f"--use_peft False trains every weight, so --{', --'.join(idle)} would have no effect. Leave them out, "
                "or say --use_peft True."
            )
        for name in frozen:
            model.get_submodule(name).requires_grad_(False)
        return model
    if lora.peft_path and start_from:
        raise UserError("--model_name_or_path is an adapter already; give its base there, or leave --peft_path out.")
    continued = lora.peft_path or start_from
    if continued:
        if clash := sorted((SHAPE_FLAGS | {"freeze_layers"}) & getattr(lora, "given", frozenset())):
            raise UserError(
                f"{continued} goes on with its own shape, so --{', --'.join(clash)} would have no effect. Leave them "
                "out, or merge the adapter first: python merge_peft_adapter.py --lora_model " + str(continued)
            )
        logger.info(f"going on with the adapter {continued}, in its own shape")
        model = attach_adapter(model, continued, trainable=True)
        _require_trained_rows(model, continued, new_rows)
        return model
    names = [name for name in lora.target_modules.replace(" ", "").split(",") if name]
    to_save = [name for name in (lora.modules_to_save or "").replace(" ", "").split(",") if name]
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    if tied and "lm_head" in to_save:
        # One matrix serves both ends; a second copy would break the tie that the config promises.
        to_save = [name for name in to_save if name != "lm_head"] or ["embed_tokens"]
        logger.info(f"the head is tied to the embedding: {', '.join(to_save)} trains both")
    _require_modules(model, [*to_save, *(names if names != ["all"] else [])])
    layers = [model.get_submodule(name) for name in frozen]
    if inside := [name for name in to_save if any(_has_module(layer, name) for layer in layers)]:
        raise UserError(
            f"--modules_to_save {', '.join(inside)} would train modules of the layers that --freeze_layers "
            f"{lora.freeze_layers} keeps as they are. Leave one of the two out."
        )
    rows = _rows_to_train(model, new_rows, to_save, names, tied)
    targets: str | list[str] = "all-linear" if names == ["all"] else names
    experts = sorted(fused_experts(model)) if names == ["all"] else []
    if experts:
        targets = _targets_beside_experts(model, lora, experts)
    config = LoraConfig(
        task_type=task_type,
        r=lora.lora_rank,
        lora_alpha=lora.lora_alpha,
        lora_dropout=0.0 if experts else lora.lora_dropout,
        target_modules=targets,
        target_parameters=experts or None,
        modules_to_save=to_save or None,
        exclude_modules=rf"(?:{'|'.join(map(re.escape, frozen))})\..*" if frozen else None,
        trainable_token_indices=rows or None,
        use_dora=lora.use_dora,
        use_rslora=lora.use_rslora,
        ensure_weight_tying=bool(tied and to_save),
    )
    # DeepSpeed ZeRO-3 gathers small parameters into buffers of one type, so adapters must have the base's.
    try:
        model = get_peft_model(model, config, autocast_adapter_dtype=not is_deepspeed_zero3_enabled())
    except ValueError as error:
        raise UserError(f"peft refuses --target_modules {lora.target_modules} for this model: {error}") from error
    _require_adapters(model, names, frozen)
    if rows:
        logger.info(f"{len(new_rows)} new tokens: their rows in {' and '.join(rows)} are trained, no other rows")
        _save_rows_alone(model)
    return model


def _targets_beside_experts(model: PreTrainedModel, lora: LoraArguments, experts: list[str]) -> list[str]:
    """Names of the linear layers but the head that can have adapters beside those of the experts.

    `all-linear` of peft would do something else in each family: leave experts out, or adapt them with twice the rank
    and the router too.

    Raises:
        UserError: flags that peft cannot follow in adapters of experts.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    of_attention = sorted({name.rpartition(".")[2] for name in linear if "attn" in name})
    without = f"leave the experts as they are: --target_modules {','.join(of_attention)}"
    for clash, flag in (
        ("lora_dropout" in getattr(lora, "given", ()) and lora.lora_dropout > 0, f"--lora_dropout {lora.lora_dropout}"),
        (lora.use_dora, "--use_dora True"),
        (lora.freeze_layers is not None, f"--freeze_layers {lora.freeze_layers}"),
    ):
        if clash:
            raise UserError(
                f"{type(model).__name__} is a mixture of experts, and peft cannot follow {flag} in their adapters. "
                f"Leave the flag out, or {without}"
            )
    share = sum(fused_experts(model).values()) / total_parameters(model)
    logger.info(
        f"the experts ({', '.join(experts)}: {share:.0%} of the weights) get adapters too, without dropout, which peft "
        f"does not have there; the routers stay as they are. To {without}"
    )
    head = model.get_output_embeddings()
    names = {name.rpartition(".")[2] for name in linear if model.get_submodule(name) is not head}
    understood = LoraConfig(target_modules=sorted(names))
    convert_peft_config_for_transformers(understood, model, None)
    # The others are names that experts had before they were fused: peft would not look for linear layers by them.
    return sorted(names & set(understood.target_modules))


def _require_adapters(model: PeftModel, names: list[str], frozen: list[str]) -> None:
    """Say which linear layers `all` did not reach.

    Raises:
        UserError: a module that was named has no adapter, since peft takes its name for that of the experts.
    """
    wrapped = {name: module for name, module in model.get_base_model().named_modules()}
    adapted = {name for name, module in wrapped.items() if isinstance(module, BaseTunerLayer)}
    if names != ["all"]:
        ends = {name.rpartition(".")[2] for name in adapted}
        if missed := [name for name in names if name.rpartition(".")[2] not in ends]:
            raise UserError(
                f"peft takes {', '.join(missed)} for a name of the experts in this family and puts no adapter on the "
                "modules of that name. Leave it out of --target_modules, or say --target_modules all."
            )
        return
    head = model.get_output_embeddings()
    of_head = set() if head is None else set(head.modules())
    left = {
        name: module.weight.numel()
        for name, module in wrapped.items()
        if type(module) is torch.nn.Linear
        and module not in of_head
        and not {"lora_A", "lora_B", "modules_to_save", "original_module"} & set(name.split("."))
        and name.removesuffix(".base_layer") not in adapted
        and not name.startswith(tuple(f"{layer}." for layer in frozen))
    }
    if left:
        kinds = sorted({name.rpartition(".")[2] for name in left})
        logger.warning(
            f"peft puts no adapter on {len(left)} linear layers ({', '.join(kinds)}; "
            f"{sum(left.values()) / total_parameters(model):.1%} of the weights) of this family: they stay as they are"
        )


def _frozen_layers(model: PreTrainedModel, numbers: str) -> list[str]:
    """Names of the decoder layers that `numbers` (`0-21,23`) stands for, such as model.layers.0.

    Raises:
        UserError: no numbers, layers that the model does not have, or all that it has.
    """
    count = model.config.get_text_config().num_hidden_layers
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == count
    ]
    if not lists:
        raise UserError(f"--freeze_layers: {type(model).__name__} has no list of its {count} layers. Leave it out.")
    chosen: set[int] = set()
    for part in numbers.replace(" ", "").split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise UserError(f"--freeze_layers {numbers}: {part!r} is no number and no range. Write them as in 0-21,23.")
        if last >= count:
            raise UserError(
                f"--freeze_layers {numbers}: there is no layer {last}; the model has {count} layers, 0 to {count - 1}."
            )
        chosen.update(range(first, last + 1))
    if len(chosen) == count:
        raise UserError(
            f"--freeze_layers {numbers} freezes all {count} layers of the model, so nothing would be learned in them. "
            "Leave some out of it."
        )
    # Experts are lists as well, and lie deeper.
    outermost = min(lists, key=lambda name: name.count("."))
    return [f"{outermost}.{number}" for number in sorted(chosen)]


def _rows_to_train(
    model: PreTrainedModel, new_rows: Sequence[int], to_save: list[str], targets: list[str], tied: bool
) -> dict[str, list[int]]:
    """For peft: the modules, embedding and untied head, of which only `new_rows` are trained; those in `to_save` not.

    Raises:
        UserError: the rows cannot be trained alone in this model or with these flags.
    """
    if not new_rows:
        return {}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    ends = [embedding] if tied or head is None else [embedding, head]
    names = [name.rpartition(".")[2] for name, module in model.named_modules() if any(module is end for end in ends)]
    in_full, adapted = ({name.rpartition(".")[2] for name in flag} for flag in (to_save, targets))
    rows = {name: list(new_rows) for name in names if name not in in_full}
    if not rows:
        return {}
    remedy = f"Train these modules in full: --modules_to_save {','.join(names)}."
    if clash := sorted(adapted.intersection(rows)):
        raise UserError(f"--target_modules {', '.join(clash)} cannot hold an adapter and new rows at once. {remedy}")
    if getattr(head, "bias", None) is not None:
        raise UserError(f"the head of {type(model).__name__} has a bias, which peft's new rows leave out. {remedy}")
    if is_deepspeed_zero3_enabled():
        raise UserError(f"new token rows cannot be trained alone under ZeRO-3. Use ZeRO-2. Or: {remedy}")
    return rows


def _require_trained_rows(model: PeftModel, adapter: str, new_rows: Sequence[int]) -> None:
    """Raises UserError if an adapter that is gone on with leaves new rows untrained."""
    config = model.peft_config[model.active_adapter]
    untrained = set(new_rows).difference(token_rows(getattr(config, "trainable_token_indices", None)))
    embedding = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    if untrained and embedding.rpartition(".")[2] not in (config.modules_to_save or ()):
        raise UserError(
            f"the tokenizer has {len(untrained)} tokens (the first has id {min(untrained)}) that the adapter {adapter} "
            "does not train. Merge it first, and train a new adapter on the result: "
            f"python merge_peft_adapter.py --lora_model {adapter}"
        )


def token_rows(indices: dict[str, list[int]] | list[int] | None) -> list[int]:
    """The rows that `trainable_token_indices` of an adapter's configuration names, in either form that peft has."""
    lists = indices.values() if isinstance(indices, dict) else [indices or []]
    return sorted({row for ids in lists for row in ids})


def _save_rows_alone(model: PeftModel) -> None:
    """Keep peft from saving the whole embedding because it has grown: the new rows are all that is needed."""
    model.save_pretrained = functools.partial(model.save_pretrained, save_embedding_layers=False)


def _has_module(model: torch.nn.Module, wanted: str) -> bool:
    return any(wanted in (name, name.rpartition(".")[2]) for name, _ in model.named_modules())


def _require_modules(model: torch.nn.Module, names: list[str]) -> None:
    if missing := [name for name in names if not _has_module(model, name)]:
        linear = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)})
        raise UserError(f"the model has no module {', '.join(missing)}; its linear layers are {', '.join(linear)}.")


def attach_adapter(model: PreTrainedModel, adapter_path: str, *, trainable: bool = False) -> PeftModel:
    """Load an adapter onto its base.

    Raises:
        CheckpointError: it was trained on another base (shown by the fingerprint of the weights in run.json, or by
            shapes that do not fit).
    """
    check_base(adapter_path, model.config._name_or_path)
    _check_positions(adapter_path, model)
    try:
        heads = head_outputs(adapter_path)
        if heads and model.get_output_embeddings() is not None:
            raise CheckpointError(
                f"the adapter {adapter_path} is a reward model: it scores texts and cannot write any. Scores: python "
                f"reward_modeling.py --model_name_or_path {adapter_path} --score_file FILE"
            )
        _grow_to_adapter(model, adapter_path)
        attached = PeftModel.from_pretrained(model, adapter_path, is_trainable=trainable)
    except (RuntimeError, ValueError, OSError, SafetensorError) as error:
        raise CheckpointError(
            f"the adapter {adapter_path} does not fit {model.config._name_or_path}: {str(error).splitlines()[0]}"
        ) from error
    if getattr(attached.peft_config[attached.active_adapter], "trainable_token_indices", None):
        _save_rows_alone(attached)
    return attached


def head_outputs(adapter_path: str) -> int | None:
    """Number of outputs of the head that an adapter folder holds, as a reward model's does; None without a head."""
    weights = Path(adapter_path) / "adapter_model.safetensors"
    if not weights.is_file():
        return None
    with safe_open(weights, "pt") as file:
        heads = [name for name in file.keys() if name.endswith(tuple(f"{head}.weight" for head in HEADS))]
        return file.get_slice(heads[0]).get_shape()[0] if heads else None


def _grow_to_adapter(model: PreTrainedModel, adapter_path: str) -> None:
    """Give the embedding the rows that the adapter needs, where tokens were added in its training.

    The adapter holds either a copy of the whole embedding or the new rows alone.
    """
    weights = Path(adapter_path) / "adapter_model.safetensors"
    if not weights.is_file():
        return
    own = model.get_input_embeddings().num_embeddings
    with safe_open(weights, "pt") as file:
        ends = ("embed_tokens.weight", "embed_tokens.token_adapter.base_layer.weight")
        names = [name for name in file.keys() if name.endswith(ends)]
        rows = file.get_slice(names[0]).get_shape()[0] if names else None
    if rows is None:
        config = json.loads((Path(adapter_path) / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        rows = max([own, *(row + 1 for row in token_rows(config.get("trainable_token_indices")))])
    if rows != own:
        model.resize_token_embeddings(rows, mean_resizing=False)


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


def check_base(adapter_path: str, base: str) -> None:
    """Compare the base that an adapter was trained on with `base`, by the fingerprints of their weights.

    Raises:
        CheckpointError: they differ. An adapter without run.json (not trained here) cannot be checked, and says so.
    """
    recorded = _recorded_base(adapter_path)
    if not recorded.get("fingerprint"):
        logger.warning(f"{adapter_path} does not record its base's weights; whether {base} is the right one is unknown")
        return
    found = fingerprint(base)
    if found and found != recorded["fingerprint"]:
        raise CheckpointError(
            f"the adapter {adapter_path} was trained on {recorded['name']} (weights {recorded['fingerprint'][:12]}), "
            f"but {base} has other weights ({found[:12]}). Give the base that it was trained on."
        )


def _recorded_base(adapter_path: str) -> dict[str, Any]:
    for folder in (Path(adapter_path), Path(adapter_path).parent):
        if (folder / RUN_FILE).is_file():
            return json.loads((folder / RUN_FILE).read_text(encoding="utf-8")).get("base") or {}
    return {}


def recorded_positions(adapter_path: str | None) -> dict[str, Any]:
    """What `from_pretrained` needs so that a base has the positions which the adapter was trained with."""
    rope = _recorded_base(adapter_path).get("rope_parameters") if adapter_path else None
    return {"rope_parameters": rope} if rope else {}


def _check_positions(adapter_path: str, model: PreTrainedModel) -> None:
    for name, wanted in recorded_positions(adapter_path).items():
        found = getattr(model.config.get_text_config(), name, None)
        if found != wanted:
            raise CheckpointError(
                f"the adapter {adapter_path} was trained with other positions ({wanted}) than its base was loaded "
                f"with ({found}). Load the base with those, or merge: python merge_peft_adapter.py --lora_model "
                f"{adapter_path}"
            )


def fingerprint(name_or_path: str) -> str | None:
    """A hash that tells one set of weights from another, in well under a second even for large models.

    It covers each tensor's name, type, shape and 3 x 64 bytes of it, whatever the sharding. None if the weights are
    not in safetensors files on this machine.

    Raises:
        CheckpointError: a file that is no safetensors file, or is cut before the end of its header.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        from transformers.utils import cached_file

        try:
            folder = Path(cached_file(name_or_path, "config.json", local_files_only=True)).parent
        except (OSError, TypeError):
            return None
    tensors: dict[str, bytes] = {}
    for path in sorted(folder.glob("*.safetensors")):
        if path.name.startswith("adapter_"):
            continue
        with open(path, "rb") as file:
            header_length = int.from_bytes(file.read(8), "little")
            try:
                header = json.loads(file.read(header_length) if header_length <= path.stat().st_size else b"")
            except ValueError as error:
                raise CheckpointError(f"{path} is damaged or incomplete; get the file again.") from error
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                start, end = entry["data_offsets"]
                digest = hashlib.sha256(f"{name} {entry['dtype']} {entry['shape']}".encode())
                for at in (start, (start + end) // 2, max(start, end - 64)):
                    file.seek(8 + header_length + at)
                    digest.update(file.read(min(64, end - at)))
                tensors[name] = digest.digest()
    if not tensors:
        return None
    return hashlib.sha256(b"".join(tensors[name] for name in sorted(tensors))).hexdigest()


def add_reference_adapter(model: PeftModel, start_from: str) -> None:
    """Put the adapter that training starts from beside the one that is trained, frozen, under the name `ref`.

    It belongs to the run and not to its result: it is not saved.
    """
    model.load_adapter(start_from, "ref", is_trainable=False)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.lora_dropout["ref"] = torch.nn.Identity()
    model.save_pretrained = functools.partial(model.save_pretrained, selected_adapters=["default"])


def adapters_to_float32(model: torch.nn.Module) -> None:
    """Keep trained weights in float32: in bfloat16 an update below 1/256 of a weight is lost.

    TRL casts the adapters of quantized models to bfloat16 when the trainer is built, so call this after it. Modules
    trained in full take and give the numbers of the model around them, which stays as it is.
    """
    if is_deepspeed_zero3_enabled():
        return
    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            around = next(wrapper.original_module.parameters()).dtype
            for copy in wrapper.modules_to_save.values() if around != torch.float32 else ():
                copy.register_forward_pre_hook(_inputs_to_float32)
                copy.register_forward_hook(lambda module, inputs, output, around=around: output.to(around))
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()


def _inputs_to_float32(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(each.float() if each.is_floating_point() else each for each in inputs)


def trainable_by_module(model: torch.nn.Module) -> Counter:
    """Trainable parameters, summed by the name of the module they belong to (q_proj, embed_tokens, ...)."""
    counts: Counter = Counter()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            size = getattr(parameter, "ds_numel", None) or parameter.numel()
            inner = ("default", "weight", "bias", "modules_to_save", "base_layer")
            inner += ("token_adapter", "trainable_tokens_delta")
            parts = [part for part in name.split(".") if part not in inner]
            if parts[-1].startswith("lora_"):
                parts.pop()
            counts[parts[-1]] += size
    return counts


def total_parameters(model: torch.nn.Module) -> int:
    """All parameters; a packed 4-bit weight counts as the numbers that it stands for."""
    total = 0
    for parameter in model.parameters():
        size = getattr(parameter, "ds_numel", None) or parameter.numel()
        state = getattr(parameter, "quant_state", None)
        total += state.shape.numel() if state is not None else size
    return total


def config_of(name_or_path: str, **options: Any) -> Any:
    """The configuration of a checkpoint, or of an adapter's base."""
    base, _ = resolve_checkpoint(name_or_path)
    return _from_pretrained(AutoConfig, base, **options)
