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
from pathlib import Path
from typing import Any

from medicalgpt.args import LoraArguments, ModelArguments, bf16_gpu
from medicalgpt.errors import UserError

import torch
from huggingface_hub import constants
from loguru import logger
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled

ADAPTER_CONFIG = "adapter_config.json"
RUN_FILE = "run.json"


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
        return loader.from_pretrained(name_or_path, **options)
    except (OSError, ValueError, SafetensorError) as error:
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
    """The tokenizer that a stage's flags name; that of an adapter knows its template and system prompt."""
    name = arguments.tokenizer_name_or_path or lora.peft_path or arguments.model_name_or_path
    name = fetch(name, arguments.hub, arguments.model_revision, arguments.cache_dir)
    return load_tokenizer(name, revision=arguments.model_revision, cache_dir=arguments.cache_dir)


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
        UserError: options that contradict each other.
    """
    quantization = quantization_config(load_in_4bit, load_in_8bit, qlora)
    distributed = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if device_map and distributed:
        raise UserError("--device_map is for a single process; under torchrun each process has a GPU of its own.")
    if quantization and full_training:
        raise UserError("a quantized base cannot be trained in full: add --use_peft True, or drop the 4/8-bit flag.")
    if quantization and device_map is None and torch.cuda.is_available():
        device_map = {"": int(os.environ.get("LOCAL_RANK", "0"))}
    if dtype == "auto":
        chosen = torch.bfloat16 if bf16_gpu() and not full_training else torch.float32
    else:
        chosen = getattr(torch, dtype)
    if attn_implementation:
        options["attn_implementation"] = attn_implementation
    return _from_pretrained(
        auto_class,
        name_or_path,
        dtype=chosen,
        quantization_config=quantization,
        device_map=device_map,
        revision=revision,
        cache_dir=cache_dir,
        **options,
    )


def load_base(auto_class: Any, arguments: ModelArguments, lora: LoraArguments, **options: Any) -> PreTrainedModel:
    """The model that a stage starts from, by its flags: base, or base with `--model_name_or_path`'s adapter merged.

    An adapter stays separate where an adapter is trained on (see `add_lora`); it is merged where all weights are.
    """
    base, adapter = resolve_checkpoint(arguments.model_name_or_path)
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
        **options,
    )
    _keep_4bit_trainable(model)
    if adapter:
        logger.info(f"{arguments.model_name_or_path} is an adapter: base {base} plus that adapter")
        if not lora.use_peft:
            model = attach_adapter(model, adapter).merge_and_unload()
            # peft froze the base when it put the adapter on.
            model.requires_grad_(True)
    return model


def _keep_4bit_trainable(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for inference on a CPU with AVX-512.

    It does so at the first evaluation or generated answer and never undoes it; the repacked product has no gradient,
    so that training would go on with wrong updates.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


# ---------------------------------------------------------------------------------------------------------------------
# Adapters
# ---------------------------------------------------------------------------------------------------------------------


def add_lora(
    model: PreTrainedModel, lora: LoraArguments, task_type: TaskType, *, start_from: str | None = None
) -> PreTrainedModel | PeftModel:
    """Put a new adapter on the model, or go on with the one at `--peft_path` or `start_from`.

    Args:
        model: the base; returned as it is if `lora.use_peft` is False.
        task_type: of peft.
        start_from: the adapter that `--model_name_or_path` pointed to.

    Raises:
        UserError: contradicting flags, or modules that the model does not have.
    """
    if not lora.use_peft:
        adapter_flags = {"peft_path", "lora_rank", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save"}
        if idle := sorted(adapter_flags & getattr(lora, "given", frozenset())):
            raise UserError(
                f"--use_peft False trains every weight, so --{', --'.join(idle)} would have no effect. Leave them out, "
                "or say --use_peft True."
            )
        return model
    if lora.peft_path and start_from:
        raise UserError("--model_name_or_path is an adapter already; give its base there, or leave --peft_path out.")
    continued = lora.peft_path or start_from
    if continued:
        shape_flags = {"lora_rank", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save"}
        if clash := sorted(shape_flags & getattr(lora, "given", frozenset())):
            raise UserError(
                f"{continued} goes on with its own shape, so --{', --'.join(clash)} would have no effect. Leave them "
                "out, or merge the adapter first: python merge_peft_adapter.py --lora_model " + str(continued)
            )
        logger.info(f"going on with the adapter {continued}, in its own shape")
        return attach_adapter(model, continued, trainable=True)
    names = [name for name in lora.target_modules.replace(" ", "").split(",") if name]
    to_save = [name for name in (lora.modules_to_save or "").replace(" ", "").split(",") if name]
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    if tied and "lm_head" in to_save:
        # One matrix serves both ends; a second copy would break the tie that the config promises.
        to_save = [name for name in to_save if name != "lm_head"] or ["embed_tokens"]
        logger.info(f"the head is tied to the embedding: {', '.join(to_save)} trains both")
    _require_modules(model, [*to_save, *(names if names != ["all"] else [])])
    config = LoraConfig(
        task_type=task_type,
        r=lora.lora_rank,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules="all-linear" if names == ["all"] else names,
        modules_to_save=to_save or None,
        ensure_weight_tying=bool(tied and to_save),
    )
    # DeepSpeed ZeRO-3 gathers small parameters into buffers of one type, so adapters must have the base's.
    return get_peft_model(model, config, autocast_adapter_dtype=not is_deepspeed_zero3_enabled())


def _require_modules(model: torch.nn.Module, names: list[str]) -> None:
    present = {part for name, _ in model.named_modules() for part in (name, name.rpartition(".")[2])}
    if missing := [name for name in names if name not in present]:
        linear = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)})
        raise UserError(f"the model has no module {', '.join(missing)}; its linear layers are {', '.join(linear)}.")


def attach_adapter(model: PreTrainedModel, adapter_path: str, *, trainable: bool = False) -> PeftModel:
    """Load an adapter onto its base.

    Raises:
        CheckpointError: it was trained on another base (shown by the fingerprint of the weights in run.json, or by
            shapes that do not fit).
    """
    check_base(adapter_path, model.config._name_or_path)
    try:
        _grow_to_adapter(model, adapter_path)
        return PeftModel.from_pretrained(model, adapter_path, is_trainable=trainable)
    except (RuntimeError, ValueError, OSError, SafetensorError) as error:
        raise CheckpointError(
            f"the adapter {adapter_path} does not fit {model.config._name_or_path}: {str(error).splitlines()[0]}"
        ) from error


def _grow_to_adapter(model: PreTrainedModel, adapter_path: str) -> None:
    """Give the embedding the rows that the adapter's own copy of it has, where tokens were added in its training."""
    weights = Path(adapter_path) / "adapter_model.safetensors"
    if not weights.is_file():
        return
    with safe_open(weights, "pt") as file:
        names = [name for name in file.keys() if name.endswith("embed_tokens.weight")]
        rows = file.get_slice(names[0]).get_shape()[0] if names else None
    if rows and rows != model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(rows)


def fit_embedding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, lora: LoraArguments) -> None:
    """Give each token of an extended tokenizer a row in the embedding, started at the mean of the others.

    Raises:
        UserError: the new rows would not be trained.
    """
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) <= rows:
        return
    if lora.use_peft and "embed_tokens" not in (lora.modules_to_save or ""):
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens and the model {rows} rows for them; the new ones would stay "
            "untrained. Add --modules_to_save embed_tokens,lm_head, or train all weights with --use_peft False."
        )
    model.resize_token_embeddings(len(tokenizer))
    logger.info(f"the embedding grew from {rows} to {len(tokenizer)} rows; the new ones start at the mean")


def check_base(adapter_path: str, base: str) -> None:
    """Compare the base that an adapter was trained on with `base`, by the fingerprints of their weights.

    Raises:
        CheckpointError: they differ. An adapter without run.json (not trained here) cannot be checked, and says so.
    """
    recorded = None
    for folder in (Path(adapter_path), Path(adapter_path).parent):
        if (folder / RUN_FILE).is_file():
            recorded = json.loads((folder / RUN_FILE).read_text(encoding="utf-8")).get("base")
            break
    if not recorded or not recorded.get("fingerprint"):
        logger.warning(f"{adapter_path} does not record its base's weights; whether {base} is the right one is unknown")
        return
    found = fingerprint(base)
    if found and found != recorded["fingerprint"]:
        raise CheckpointError(
            f"the adapter {adapter_path} was trained on {recorded['name']} (weights {recorded['fingerprint'][:12]}), "
            f"but {base} has other weights ({found[:12]}). Give the base that it was trained on."
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


def adapters_to_float32(model: torch.nn.Module) -> None:
    """Keep trained weights in float32: in bfloat16 an update below 1/256 of a weight is lost.

    TRL casts the adapters of quantized models to bfloat16 when the trainer is built, so call this after it.
    """
    if is_deepspeed_zero3_enabled():
        return
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()


def trainable_by_module(model: torch.nn.Module) -> Counter:
    """Trainable parameters, summed by the name of the module they belong to (q_proj, embed_tokens, ...)."""
    counts: Counter = Counter()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            size = getattr(parameter, "ds_numel", None) or parameter.numel()
            parts = [p for p in name.split(".") if p not in ("default", "weight", "bias", "modules_to_save")]
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
