"""The language model within a checkpoint that takes images or audio too.

It is loaded alone: the towers (encoders of images and audio, with their projectors) are left on the disk. If
transformers has a class for the language model alone, it is that one. If it has only the class for the whole, it is
that one without its towers. A trained model is written back into the whole checkpoint: its weights under the names that
they have there, everything else byte for byte as it was.
"""

import copy
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from medicalgpt.errors import UserError
from medicalgpt.files import remove_entry
from medicalgpt.models.hub import HEADS, CheckpointError, load_pretrained

import torch
from loguru import logger
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.core_model_loading import WeightTransform, revert_weight_conversion
from transformers.modeling_utils import set_zero3_state
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

CONFIG = "config.json"
# What a processor of images or audio is loaded from. The chat template is that of the tokenizer.
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
# The chat template of the base, which may have places for images that the one of the training does not have.
BASE_TEMPLATE = "base_chat_template.jinja"
EMBEDDING = "embed_tokens.weight"
MAPPINGS = {
    AutoModelForCausalLM: MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForSequenceClassification: MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
}
# By `model_type`: why the language model alone would not compute what it computes in the whole.
NOT_ALONE = {
    "paligemma": "reads its prompt in both directions, which its language model alone does not",
    "diffusion_gemma": "writes its text in blocks, not token by token",
}


def has_towers(config: PreTrainedConfig) -> bool:
    """Whether a configuration is of a model with a language model and something else."""
    return config.get_text_config() is not config


@dataclass(frozen=True)
class LanguageHalf:
    """How the language model of a configuration is built.

    Attributes:
        model_class: of transformers.
        config: what it is built from: that of the language model, or the whole one.
        is_alone: the class is that of the language model alone; if not, it is that of the whole.
    """

    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    is_alone: bool

    @cached_property
    def towers(self) -> tuple[str, ...]:
        """Names of the modules next to the language model that are left out; none where the class has none.

        Raises:
            UserError: the class is not built from a language model and towers.
        """
        if self.is_alone:
            return ()
        try:
            model = _on_meta(self.model_class, self.config)
        except Exception as error:
            raise UserError(_refusal(self.config, f"could not be built: {error}")) from error
        base, decoder, head = model.base_model, model.get_decoder(), model.get_output_embeddings()
        children = dict(base.named_children())
        language = [name for name, child in children.items() if any(part is decoder for part in child.modules())]
        towers = [name for name, child in children.items() if name not in language and child is not head]
        if len(language) != 1 or head is None or not towers:
            raise UserError(_refusal(self.config, "has no language model that could be trained alone"))
        return tuple(towers)

    @cached_property
    def prefix(self) -> str:
        """What the names of its layers begin with, such as `model.`."""
        model = _on_meta(self.model_class, self.config)
        embedding = model.get_input_embeddings()
        names = [name for name, module in model.named_modules() if module is embedding]
        return f"{names[0]}.weight".removesuffix(EMBEDDING)

    def build_class(self, ignored: Iterable[str] = (), with_towers: bool = False) -> type[PreTrainedModel]:
        """The class without towers, or with them.

        Args:
            ignored: patterns of names in the checkpoint that are not weights of this model.
        """
        parent, towers = self.model_class, self.towers
        left_out = () if with_towers else towers

        def build(model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
            parent.__init__(model, *args, **kwargs)
            for name in left_out:
                delattr(model.base_model, name)
            # FSDP looks for each of these classes in the model.
            present = {type(module).__name__ for module in model.modules()}
            model._no_split_modules = set(model._no_split_modules or ()) & present
            rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
            if towers and "mrope_section" in rope:
                model.get_decoder().register_forward_pre_hook(_pass_text_positions, with_kwargs=True)

        known = list(parent._keys_to_ignore_on_load_unexpected or ())
        known += [rf"^{re.escape(f'{parent.base_model_prefix}.{name}.')}" for name in left_out]
        members: dict[str, Any] = {"__init__": build, "_keys_to_ignore_on_load_unexpected": [*known, *ignored]}
        if self.is_alone:
            # Of Llama 4 it is the name that the language model has in the whole.
            members["base_model_prefix"] = self.prefix.removesuffix(".")
        if towers:
            # The loss is that of a language model, which the trainer may divide by all its tokens.
            members["accepts_loss_kwargs"] = True
        # By its name and module the library finds the conversions of a class, and saves it in the configuration.
        return type(parent.__name__, (parent,), {"__module__": parent.__module__, **members})

    def on_meta(self) -> PreTrainedModel:
        """The model without weights."""
        return _on_meta(self.build_class(), self.config)


def _pass_text_positions(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Repeat positions (batch, length) for text, time, height and width.

    Without those for text, some classes do not see where the next of several packed sequences begins.
    """
    positions = kwargs.get("position_ids")
    if positions is not None and positions.ndim == 2:
        kwargs = {**kwargs, "position_ids": positions[None].expand(4, -1, -1)}
    return args, kwargs


def _on_meta(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    # Under ZeRO-3 the library would shard the weights of this model too, which are not there.
    with torch.device("meta"), set_zero3_state():
        return model_class(copy.deepcopy(config))


def _refusal(config: PreTrainedConfig, problem: str) -> str:
    return (
        f"{config.name_or_path or 'the model'} is of the type {config.model_type}, which takes images or audio too "
        f"and {problem}. Use a checkpoint for text alone, such as Qwen/Qwen3-0.6B, or one of the families in "
        "docs/models.md."
    )


def language_half(config: PreTrainedConfig, auto_class: Any = AutoModelForCausalLM) -> LanguageHalf:
    """Find the class for the language model of a configuration with towers.

    Args:
        auto_class: AutoModelForCausalLM or AutoModelForSequenceClassification.

    Raises:
        UserError: the language model cannot be trained alone, or cannot score texts.
    """
    text = config.get_text_config()
    if problem := NOT_ALONE.get(config.model_type):
        raise UserError(_refusal(config, problem))
    if config.is_encoder_decoder or text.is_encoder_decoder:
        raise UserError(_refusal(config, "has an encoder and a decoder"))
    if (mapping := MAPPINGS.get(auto_class)) is None:
        raise UserError(_refusal(config, "is supported as a model that writes or scores texts only"))
    if type(text) in mapping:
        alone = copy.deepcopy(text)
        # Where the two disagree, the class of the whole follows its own configuration.
        copied = ["tie_word_embeddings", "quantization_config", "_commit_hash", "name_or_path"]
        for name in copied if auto_class is AutoModelForCausalLM else [*copied, "num_labels"]:
            if (value := getattr(config, name, None)) is not None:
                setattr(alone, name, value)
        return LanguageHalf(mapping[type(text)], alone, True)
    if auto_class is AutoModelForSequenceClassification:
        raise UserError(_refusal(config, "has no class that scores texts, so it cannot become a reward model"))
    if type(config) not in MODEL_FOR_MULTIMODAL_LM_MAPPING:
        raise UserError(_refusal(config, "has no language model in transformers"))
    half = LanguageHalf(MODEL_FOR_MULTIMODAL_LM_MAPPING[type(config)], copy.deepcopy(config), False)
    # Raises an error if the class is built in another way.
    _ = half.towers
    return half


@dataclass(frozen=True)
class Stored:
    """The weights of a checkpoint as they are on the disk.

    Attributes:
        source, revision, cache_dir: where the checkpoint is.
        files: the names of weights in each file.
        language: what the names of the language model's layers begin with, such as `model.language_model.`.
        head: what the name of its head begins with, such as `lm_head.`; empty if it has none.
    """

    source: str
    revision: str | None
    cache_dir: str | None
    files: dict[str, list[str]]
    language: str
    head: str

    @classmethod
    def read(cls, source: str, revision: str | None = None, cache_dir: str | None = None) -> "Stored":
        """Read the names. A checkpoint on the hub is downloaded if it consists of one file.

        Raises:
            CheckpointError: there are no safetensors files, or no language model in them.
        """
        find = find_in(source, revision, cache_dir)
        files: dict[str, list[str]] = {}
        if index := find(SAFE_WEIGHTS_INDEX_NAME):
            for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
                files.setdefault(file, []).append(name)
        elif weights := find(SAFE_WEIGHTS_NAME):
            with safe_open(weights, "pt") as opened:
                files[SAFE_WEIGHTS_NAME] = list(opened.keys())
        else:
            raise CheckpointError(
                f"{source} takes images or audio too and has no safetensors files ({SAFE_WEIGHTS_NAME}), which its "
                "language model is read from. Get the checkpoint in that format."
            )
        names = [name for stored in files.values() for name in stored]
        layers = {
            prefix
            for prefix in (name.removesuffix(EMBEDDING) for name in names if name.endswith(f".{EMBEDDING}"))
            if any(name.startswith(f"{prefix}layers.") for name in names)
        }
        if not layers:
            raise CheckpointError(f"{source} has no language model: no weight has a name that ends in {EMBEDDING}.")
        named = [prefix for prefix in layers if "language_model" in prefix or "text_model" in prefix]
        heads = [name.removesuffix("weight") for name in names if re.search(r"(^|\.)lm_head\.weight$", name)]
        return cls(
            source, revision, cache_dir, files, min(named or layers, key=len), min(heads, key=len) if heads else ""
        )

    @property
    def names(self) -> list[str]:
        return [name for stored in self.files.values() for name in stored]

    def is_language(self, name: str) -> bool:
        return name.startswith(self.language) or bool(self.head and name.startswith(self.head))

    def find(self, name: str) -> Path | None:
        """A file of the checkpoint; None if it has none of that name."""
        return find_in(self.source, self.revision, self.cache_dir)(name)

    @cached_property
    def others(self) -> list[str]:
        """Shortest beginnings of names, in whole parts, that no weight of the language model has."""
        ours = [self.language, self.head]
        found = set()
        for name in self.names:
            if self.is_language(name):
                continue
            parts = name.split(".")
            prefixes = (".".join(parts[:count]) + "." for count in range(1, len(parts)))
            found.add(next((prefix for prefix in prefixes if not any(own.startswith(prefix) for own in ours)), name))
        return sorted(found)


def find_in(source: str, revision: str | None, cache_dir: str | None) -> Callable[[str], Path | None]:
    """A function that finds a file of a checkpoint by its name; None if there is none of that name."""

    def find(name: str) -> Path | None:
        if Path(source).is_dir():
            return Path(source, name) if Path(source, name).is_file() else None
        # Offline, one that is not in the cache counts as missing.
        found = cached_file(
            source,
            name,
            revision=revision,
            cache_dir=cache_dir,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return Path(found) if found else None

    return find


@dataclass(frozen=True)
class Whole:
    """What a loaded language model was taken out of; kept with the model, as `model.taken_from`.

    Attributes:
        stored: its weights on the disk.
        prefix: what the names of its layers begin with in the loaded model.
        renamed: the names on the disk have another beginning than those of the class.
        conversions: of the library, between weights on the disk and those of the class.
        unused: patterns of names that are on the disk without being weights of the model.
    """

    stored: Stored
    prefix: str
    renamed: bool
    conversions: list[WeightTransform] = field(repr=False)
    unused: tuple[str, ...] = ()

    def stored_name(self, name: str) -> str:
        """The name on the disk of a weight of the model, after the conversions of the library."""
        if not self.renamed:
            return name
        if name.startswith("lm_head."):
            return (self.stored.head or "lm_head.") + name.removeprefix("lm_head.")
        return self.stored.language + name.removeprefix(self.prefix)


def load(auto_class: Any, source: str, config: PreTrainedConfig, *, with_towers: bool = False, **options: Any) -> Any:
    """Load the language model of a checkpoint with towers, and nothing else.

    Args:
        auto_class: AutoModelForCausalLM or AutoModelForSequenceClassification.
        config: of the whole.
        with_towers: load them too, for a family whose language model has no class of its own. They stay as they are;
            `towers_of` names them.
        options: of `from_pretrained`.

    Returns:
        The model; with `output_loading_info` also the library's account, as `from_pretrained` returns it.

    Raises:
        CheckpointError: the checkpoint lacks weights of the language model, or has others than its class.
        UserError: see `language_half`.
    """
    half = language_half(config, auto_class)
    stored = Stored.read(source, options.get("revision"), options.get("cache_dir"))
    with_info = options.pop("output_loading_info", False)
    generates = auto_class is AutoModelForCausalLM
    ignored = [] if with_towers else [rf"^{re.escape(prefix)}" for prefix in stored.others]
    if not generates:
        ignored.append(r"^lm_head\.")
    prefix = half.prefix
    if half.is_alone and stored.head and not config.get_text_config().tie_word_embeddings:
        # The whole of Mistral 3 is tied by default, and its checkpoints, which do not say so, are not.
        half.config.tie_word_embeddings = False
    if with_towers and (quantization := options.get("quantization_config")):
        # Others load the towers as they are; their features would differ from those of the training.
        towers = [f"{half.model_class.base_model_prefix}.{name}" for name in half.towers]
        quantization.llm_int8_skip_modules = ["lm_head", *towers]
    renames = {stored.language: prefix, stored.head: "lm_head."} if half.is_alone else {}
    renames = {old: new for old, new in renames.items() if old and old != new}
    model, info = load_pretrained(
        half.build_class(ignored, with_towers),
        source,
        config=half.config,
        key_mapping={rf"^{re.escape(old)}": new for old, new in renames.items()} or None,
        output_loading_info=True,
        **options,
    )
    missing = sorted(name for name in info["missing_keys"] if not name.startswith(HEADS))
    if missing or info["unexpected_keys"]:
        wrong = [f"it lacks {', '.join(missing[:3])}"] if missing else []
        if unexpected := sorted(info["unexpected_keys"]):
            wrong.append(f"{half.model_class.__name__} has no {', '.join(unexpected[:3])}")
        raise CheckpointError(
            f"the language model of {source} is not one of the type {half.config.model_type}: {'; '.join(wrong)}. Get "
            "the complete checkpoint; docs/models.md lists the families."
        )
    if head := model.get_output_embeddings():
        # The library unties weights that it finds to differ in the files, and leaves the setting as it is.
        model.config.tie_word_embeddings = head.weight is model.get_input_embeddings().weight
    used = {rf"^{re.escape(old)}" for old in renames}
    # Under ZeRO-3 the library keeps those that matched no weight as well.
    conversions = [
        conversion
        for conversion in model._weight_conversions or []
        if conversion.was_used() and not used & set(conversion._original_source_patterns)
    ]
    # Checkpoints of a run have the names of the model itself, by which they are loaded to resume it.
    model._weight_conversions = []
    if not stored.others:
        logger.warning(f"{source} has no weights of {'its towers'}: the result will be without them as well")
    elif generates:
        unused = tuple(half.model_class._keys_to_ignore_on_load_unexpected or ())
        model.taken_from = Whole(stored, prefix, half.is_alone, conversions, unused)
        others = ", ".join(part[:-1] for part in stored.others)
        logger.info(f"{source}: the language model is loaded, with{'' if with_towers else 'out'} {others}")
    if with_towers:
        model.tower_names = tuple(f"{model.base_model_prefix}.{name}" for name in half.towers)
        for name in model.tower_names:
            model.get_submodule(name).requires_grad_(False)
    return (model, info) if with_info else model


def towers_of(model: torch.nn.Module) -> tuple[str, ...]:
    """Names of the modules of a loaded model that are its towers, such as `model.visual`; none if it has none."""
    return getattr(model, "tower_names", ())


def without_towers(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """(name, module) of a loaded model, in the order of `named_modules`, without its towers."""
    inside = tuple(f"{name}." for name in towers_of(model))
    return ((name, module) for name, module in model.named_modules() if not f"{name}.".startswith(inside))


def complete(folder: Path, model: PreTrainedModel) -> bool:
    """Turn a saved language model into the whole checkpoint that it was taken from, with its new weights.

    Weights of the language model get the names, and the files, that they have there. All others are copied byte for
    byte, and so are the files of the processor, unless the folder has its own. config.json differs in what training has
    changed: the number of embedding rows, scaled positions, the type of the weights.

    Args:
        folder: what `save_pretrained` of the model has written.
        model: without adapters and wrappers.

    Returns:
        Whether there was anything to do: False for a model that is complete in itself.

    Raises:
        CheckpointError: the base is not readable any more, or has other weights than the model. The folder is as it
            was, with the language model alone.
    """
    whole: Whole | None = getattr(model, "taken_from", None)
    if whole is None:
        return False
    partial = folder / ".whole"
    remove_entry(partial)
    partial.mkdir()
    try:
        with ExitStack() as stack:
            trained = _trained_weights(folder, model, whole, stack)
            for file in whole.stored.files:
                _write_file(partial / file, file, trained, whole)
        _write_index(partial, whole)
        _write_config(partial, model, whole)
        for name in PROCESSOR_FILES:
            if not (folder / name).is_file() and (path := whole.stored.find(name)):
                shutil.copyfile(path, partial / name)
        if template := _template_of_base(whole.stored):
            (partial / BASE_TEMPLATE).write_text(template, encoding="utf-8")
        for path in (*folder.glob("*.safetensors"), *folder.glob(f"*{SAFE_WEIGHTS_INDEX_NAME}")):
            path.unlink()
        for path in sorted(partial.iterdir()):
            path.replace(folder / path.name)
    finally:
        remove_entry(partial)
    logger.info(
        f"{folder} is the whole checkpoint: {', '.join(part[:-1] for part in whole.stored.others)} as they were"
    )
    return True


def _trained_weights(folder: Path, model: PreTrainedModel, whole: Whole, stack: ExitStack) -> dict[str, torch.Tensor]:
    """The saved weights by their names in the whole checkpoint; read from the disk when they are used.

    Raises:
        CheckpointError: they are not those of the base.
    """
    files = [stack.enter_context(safe_open(path, "pt")) for path in sorted(folder.glob("*.safetensors"))]
    weights = {name: file.get_tensor(name) for file in files for name in file.keys()}
    if whole.conversions:
        model._weight_conversions = whole.conversions
        weights = revert_weight_conversion(model, weights)
        model._weight_conversions = []
    weights = {whole.stored_name(name): tensor for name, tensor in weights.items()}
    if model.config.tie_word_embeddings:
        # One matrix, which may be stored twice in the base, and is where FSDP has gathered it.
        weights.pop(whole.stored_name("lm_head.weight"), None)
        if whole.stored.head:
            weights[f"{whole.stored.head}weight"] = weights[f"{whole.stored.language}{EMBEDDING}"]
    # Towers that were loaded too have stayed as they are in the base.
    kept = tuple(whole.stored.others) if towers_of(model) else ()
    weights = {name: tensor for name, tensor in weights.items() if not (kept and name.startswith(kept))}
    expected = {name for name in whole.stored.names if whole.stored.is_language(name)}
    unused = {name for name in expected - weights.keys() if any(re.search(each, name) for each in whole.unused)}
    if differing := sorted(weights.keys() ^ (expected - unused)):
        raise CheckpointError(
            f"{len(differing)} weights of the trained model and of its base {whole.stored.source} have different names "
            f"({', '.join(differing[:3])}), so the whole checkpoint cannot be written."
        )
    return weights


def _write_file(path: Path, file: str, trained: dict[str, torch.Tensor], whole: Whole) -> None:
    source = whole.stored.find(file)
    if source is None:
        raise CheckpointError(
            f"{whole.stored.source} has no {file} any more, so the whole checkpoint cannot be written."
        )
    names = whole.stored.files[file]
    if not any(name in trained for name in names):
        shutil.copyfile(source, path)
        return
    with safe_open(source, "pt") as opened:
        tensors, written = {}, set()
        for name in names:
            tensor = trained.get(name)
            if tensor is None:
                tensors[name] = opened.get_tensor(name)
                continue
            shape = opened.get_slice(name).get_shape()
            tensor = _turned_back(tensor, shape, whole)
            _require_shape(name, tensor, shape, whole)
            # A file cannot hold one tensor under two names.
            tensors[name] = tensor.clone() if tensor.data_ptr() in written else tensor.contiguous()
            written.add(tensor.data_ptr())
        save_file(tensors, path, metadata=opened.metadata() or {"format": "pt"})


def _turned_back(tensor: torch.Tensor, shape: list[int], whole: Whole) -> torch.Tensor:
    """The weight as the base stores it, if the library transposed it when it loaded it.

    The experts of Qwen3-VL are stored the other way round than they are computed with; the library saves them as they
    are computed with.
    """
    operations = [each for conversion in whole.conversions for each in getattr(conversion, "operations", ())]
    dims = next(((each.dim0, each.dim1) for each in operations if getattr(each, "check_dims", False)), None)
    if dims is None or tensor.ndim <= max(dims) or list(tensor.shape) == shape:
        return tensor
    turned = tensor.transpose(*dims)
    return turned.contiguous() if list(turned.shape) == shape else tensor


def _require_shape(name: str, tensor: torch.Tensor, shape: list[int], whole: Whole) -> None:
    """Raises CheckpointError if a weight has another shape than in the base, but for rows of new tokens."""
    ends = (f"{whole.stored.language}{EMBEDDING}", f"{whole.stored.head}weight")
    first = 1 if name in ends else 0
    if list(tensor.shape)[first:] != shape[first:]:
        raise CheckpointError(
            f"{name} has the shape {list(tensor.shape)} after the training and {shape} in {whole.stored.source}, so "
            "the whole checkpoint cannot be written."
        )


def _write_index(partial: Path, whole: Whole) -> None:
    path = whole.stored.find(SAFE_WEIGHTS_INDEX_NAME)
    if path is None:
        return
    index = json.loads(path.read_text(encoding="utf-8"))
    size = 0
    for file in whole.stored.files:
        with safe_open(partial / file, "pt") as opened:
            for name in opened.keys():
                tensor = opened.get_tensor(name)
                size += tensor.numel() * tensor.element_size()
    index.setdefault("metadata", {})["total_size"] = size
    (partial / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_config(partial: Path, model: PreTrainedModel, whole: Whole) -> None:
    """The configuration of the base, with what training has changed."""
    stored = whole.stored
    text = stored.find(CONFIG).read_text(encoding="utf-8")
    base = load_pretrained(AutoConfig, stored.source, revision=stored.revision, cache_dir=stored.cache_dir)
    config, now, before = json.loads(text), model.config.get_text_config(), base.get_text_config()
    # In older checkpoints the language model's settings are at the top.
    own = config.get("text_config") or config
    if (rows := model.get_input_embeddings().num_embeddings) != before.vocab_size:
        for part in (own, config):
            if part is own or "vocab_size" in part:
                part["vocab_size"] = rows
    if (positions := getattr(now, "rope_parameters", None)) != getattr(before, "rope_parameters", None):
        own["rope_parameters"] = positions
        for name in ("rope_scaling", "rope_theta"):
            own.pop(name, None)
    dtype = str(model.dtype).removeprefix("torch.")
    for part in (config, own):
        for name in ("dtype", "torch_dtype"):
            if name in part:
                part[name] = dtype
    if not {"dtype", "torch_dtype"} & config.keys():
        config["dtype"] = dtype
    changed = config != json.loads(text)
    (partial / CONFIG).write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n" if changed else text, encoding="utf-8"
    )


def _template_of_base(stored: Stored) -> str | None:
    """The chat template of the base, of its processor or of its tokenizer."""
    if path := stored.find("chat_template.jinja"):
        return path.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if path := stored.find(name):
            template = json.loads(path.read_text(encoding="utf-8")).get("chat_template")
            if isinstance(template, str):
                return template
    return None
