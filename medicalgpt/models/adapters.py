"""LoRA adapters: add them, attach trained ones, and check that they fit the base."""

import functools
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from medicalgpt.args import LoraArguments
from medicalgpt.errors import UserError
from medicalgpt.logs import notice
from medicalgpt.models.families import fused_experts
from medicalgpt.models.hub import HEADS, Adapter, CheckpointError, check_base, merge_command
from medicalgpt.models.towers import towers_of

import torch
from loguru import logger
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

# Of an adapter whose training has excluded towers, where it is put on the language model alone.
warnings.filterwarnings("ignore", message="You have passed exclude_modules=.* but no modules were excluded")
# Flags that shape a new adapter.
SHAPE_FLAGS = frozenset(
    ("lora_rank", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "use_dora", "use_rslora")
)
# Of families whose router is a linear layer.
ROUTER = "gate"


def check_flags(lora: LoraArguments, adapter: Adapter | None) -> None:
    """Refuse flags without effect.

    Args:
        adapter: the one that training would resume.

    Raises:
        UserError: flags of adapters where all weights are trained, or of a new adapter where one is resumed.
    """
    given = getattr(lora, "given", frozenset())
    if not lora.use_peft:
        # Launch scripts carry the usual adapter along; nobody expects one that is switched off.
        usual = {name for name in SHAPE_FLAGS & given if getattr(lora, name) == getattr(LoraArguments(), name)}
        if usual:
            notice(f"--{', --'.join(sorted(usual))}: not used, as --use_peft False trains every weight.")
            given -= usual
        if idle := sorted((SHAPE_FLAGS | {"peft_path", "loraplus_lr_ratio"}) & given):
            raise UserError(
                f"--use_peft False trains every weight, so --{', --'.join(idle)} would have no effect. Leave them out, "
                "or pass --use_peft True."
            )
    elif adapter and (clash := sorted((SHAPE_FLAGS | {"freeze_layers"}) & given)):
        raise UserError(
            f"the adapter {adapter.path} keeps its own shape, so --{', --'.join(clash)} would have no effect. Leave "
            f"them out, or merge the adapter first: {merge_command(adapter.path)}"
        )


def add_lora(
    model: PreTrainedModel,
    lora: LoraArguments,
    task_type: TaskType,
    *,
    adapter: Adapter | None = None,
    new_rows: Sequence[int] = (),
) -> PreTrainedModel | PeftModel:
    """Put a new adapter on the model, or the one that training resumes.

    Args:
        model: the base; returned without an adapter if `lora.use_peft` is False.
        task_type: of peft.
        adapter: of the checkpoint that training starts from; where all weights are trained it is merged already.
        new_rows: ids from `fit_embedding`, whose rows of embedding and head are trained alongside the adapter.

    Raises:
        UserError: modules or layers that the model does not have, new rows that would stay untrained.
    """
    frozen = _frozen_layers(model, lora.freeze_layers) if lora.freeze_layers is not None else []
    if not lora.use_peft:
        for name in frozen:
            model.get_submodule(name).requires_grad_(False)
        return model
    if adapter:
        logger.info(f"resuming the adapter {adapter.path}, in its own shape")
        model = attach_adapter(model, adapter, trainable=True)
        _require_trained_rows(model, adapter.path, new_rows)
        return model
    names = [name for name in lora.target_modules.replace(" ", "").split(",") if name]
    to_save = [name for name in (lora.modules_to_save or "").replace(" ", "").split(",") if name]
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    if tied and "lm_head" in to_save:
        # One matrix serves both ends; a second copy would break the tie that the configuration requires.
        to_save = [name for name in to_save if name != "lm_head"] or ["embed_tokens"]
        logger.info(f"the head is tied to the embedding: {', '.join(to_save)} trains both")
    _require_modules(model, [*to_save, *(names if names != ["all"] else [])])
    towers = towers_of(model)
    of_towers = [name for name, _ in model.named_modules() if name.startswith(towers)]
    if inside := [name for name in to_save if any(f".{each}".endswith(f".{name}") for each in of_towers)]:
        raise UserError(
            f"--modules_to_save {', '.join(inside)}: there are modules of that name in {', '.join(towers)}, which "
            "stays as it is. Omit them."
        )
    layers = [model.get_submodule(name) for name in frozen]
    if inside := [name for name in to_save if any(_has_module(layer, name) for layer in layers)]:
        raise UserError(
            f"--modules_to_save {', '.join(inside)} would train modules of the layers that --freeze_layers "
            f"{lora.freeze_layers} keeps as they are. Leave one of the two out."
        )
    rows = _rows_to_train(model, new_rows, to_save, names, tied)
    targets: str | list[str] = "all-linear" if names == ["all"] else names
    parameters: list[str] = []
    if experts := sorted(fused_experts(model)) if names == ["all"] else []:
        targets, parameters = _targets_next_to_experts(model, lora, experts)
    config = LoraConfig(
        task_type=task_type,
        r=lora.lora_rank,
        lora_alpha=lora.lora_alpha,
        lora_dropout=0.0 if experts else lora.lora_dropout,
        target_modules=targets,
        target_parameters=parameters or None,
        modules_to_save=to_save or None,
        exclude_modules=_inside(*frozen, *towers),
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
    _require_adapters(model, names, [*frozen, *towers])
    if rows:
        logger.info(f"{len(new_rows)} new tokens: their rows in {' and '.join(rows)} are trained, no other rows")
        _save_rows_alone(model)
    return model


def _inside(*names: str) -> str | None:
    """A pattern of the modules within those of the names; None without any."""
    return rf"(?:{'|'.join(map(re.escape, names))})\..*" if names else None


def _targets_next_to_experts(
    model: PreTrainedModel, lora: LoraArguments, experts: list[str]
) -> tuple[list[str], list[str]]:
    """What gets adapters in a mixture of experts: all of it but the head and the routers.

    `all-linear` of peft differs from family to family: it skips experts, or adapts them with twice the rank and the
    router too.

    Returns:
        Names of linear layers, and names of parameters: the experts, and linear layers with a name that experts had
        before they were fused, by which peft would not look for linear layers.

    Raises:
        UserError: flags that peft cannot follow in adapters of experts.
    """
    # A router can be a class of its own that is derived from a linear layer and gives more than one output.
    linear = [name for name, module in model.named_modules() if _is_plain_linear(module)]
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
    taken = sorted(names - {ROUTER} - set(understood.target_modules))
    return sorted(names & set(understood.target_modules)), [*experts, *(f"{name}.weight" for name in taken)]


def _is_plain_linear(module: torch.nn.Module) -> bool:
    is_quantized = type(module).__module__.startswith("bitsandbytes.")
    return type(module) is torch.nn.Linear or (is_quantized and isinstance(module, torch.nn.Linear))


def _require_adapters(model: PeftModel, names: list[str], frozen: list[str]) -> None:
    """Warn of linear layers that `all` did not reach.

    Raises:
        UserError: a named module has no adapter, since peft takes its name for that of the experts.
    """
    wrapped = {name: module for name, module in model.get_base_model().named_modules()}
    adapted = {name for name, module in wrapped.items() if isinstance(module, BaseTunerLayer)}
    if names != ["all"]:
        ends = {name.rpartition(".")[2] for name in adapted}
        if missed := [name for name in names if name.rpartition(".")[2] not in ends]:
            raise UserError(
                f"peft takes {', '.join(missed)} for a name of the experts in this family and puts no adapter on the "
                "modules of that name. Leave it out of --target_modules, or pass --target_modules all."
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
    """Names, such as model.layers.0, of the decoder layers in `numbers` (`0-21,23`).

    Raises:
        UserError: no numbers, layers that the model does not have, or all that it has.
    """
    count = model.config.get_text_config().num_hidden_layers
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == count and not name.startswith(towers_of(model))
    ]
    if not lists:
        raise UserError(f"--freeze_layers: {type(model).__name__} has no list of its {count} layers. Leave it out.")
    chosen: set[int] = set()
    for part in numbers.replace(" ", "").split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise UserError(f"--freeze_layers {numbers}: {part!r} is not a number or a range. Write 0-21,23.")
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
    # Experts are module lists as well, at a deeper level.
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
    """Raises UserError if a resumed adapter leaves new rows untrained."""
    config = model.peft_config[model.active_adapter]
    untrained = set(new_rows).difference(token_rows(getattr(config, "trainable_token_indices", None)))
    embedding = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    if untrained and embedding.rpartition(".")[2] not in (config.modules_to_save or ()):
        raise UserError(
            f"the tokenizer has {len(untrained)} tokens (the first has id {min(untrained)}) that the adapter {adapter} "
            f"does not train. Merge it first, and train a new adapter on the result: {merge_command(adapter)}"
        )


def token_rows(indices: dict[str, list[int]] | list[int] | None) -> list[int]:
    """The rows in `trainable_token_indices` of an adapter's configuration, in either of peft's two forms."""
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


def attach_adapter(model: PreTrainedModel, adapter: Adapter, *, trainable: bool = False) -> PeftModel:
    """Load an adapter onto its base.

    Args:
        model: the base.
        trainable: its weights require gradients.

    Raises:
        CheckpointError: it was trained on another base (shown by the fingerprint of the weights in run.json, or by
            shapes that do not fit).
    """
    base = model.config._name_or_path
    check_base(adapter, base)
    _check_positions(adapter, model)
    try:
        if head_outputs(adapter) and model.get_output_embeddings() is not None:
            raise CheckpointError(
                f"the adapter {adapter.path} is a reward model: it scores texts and cannot generate any. Scores: "
                f"python reward_modeling.py --model_name_or_path {adapter.path} --score_file FILE"
            )
        _grow_to_adapter(model, adapter)
        config = config_beside_towers(model, adapter)
        attached = PeftModel.from_pretrained(model, adapter.path, is_trainable=trainable, config=config)
        if trainable:
            _restore_weights(attached, adapter, "default")
    except (RuntimeError, ValueError, OSError, TypeError, LookupError, SafetensorError) as error:
        raise CheckpointError(
            f"the adapter {adapter.path} does not fit {base}: {(str(error).splitlines() or [type(error).__name__])[0]}"
        ) from error
    if adapter.config.get("trainable_token_indices"):
        _save_rows_alone(attached)
    return attached


def config_beside_towers(model: PreTrainedModel, adapter: Adapter) -> PeftConfig:
    """The configuration of an adapter, such that modules of towers that have the same names get none.

    One that was trained on text does not know of them, and one that was trained with them may be put on the language
    model alone.
    """
    config = PeftConfig.from_pretrained(adapter.path)
    known, towers = config.exclude_modules, _inside(*towers_of(model))
    if towers and not (isinstance(known, str) and towers_of(model)[0].replace(".", r"\.") in known):
        if known and not isinstance(known, str):
            known = rf"(?:.*\.)?(?:{'|'.join(map(re.escape, known))})"
        config.exclude_modules = f"{known}|{towers}" if known else towers
    return config


def _restore_weights(model: PeftModel, adapter: Adapter, name: str) -> None:
    """Set the weights of an adapter to those in its file, which peft rounds to the type of the base as it loads them.

    That concerns what is trained in full and rows of new tokens. Does nothing under ZeRO-3, where weights have the
    type of the base.
    """
    weights = Path(adapter.path) / "adapter_model.safetensors"
    if is_deepspeed_zero3_enabled() or not weights.is_file():
        return
    with safe_open(weights, "pt") as file:
        saved = set(file.keys())
        for parameter_name, parameter in model.named_parameters():
            # A file names neither the adapter nor what peft wraps a module in.
            key = parameter_name.replace(f".modules_to_save.{name}.", ".").replace(f".{name}", "")
            if key == parameter_name or key not in saved:
                continue
            exact = file.get_tensor(key)
            if exact.dtype != parameter.dtype and exact.shape == parameter.shape:
                parameter.data = exact.to(parameter.device)


def head_outputs(adapter: Adapter) -> int | None:
    """Outputs of the head that is saved with an adapter, as with a reward model's; None without a head."""
    weights = Path(adapter.path) / "adapter_model.safetensors"
    if not weights.is_file():
        return None
    with safe_open(weights, "pt") as file:
        heads = [name for name in file.keys() if name.endswith(tuple(f"{head}.weight" for head in HEADS))]
        return file.get_slice(heads[0]).get_shape()[0] if heads else None


def _grow_to_adapter(model: PreTrainedModel, adapter: Adapter) -> None:
    """Give the embedding the rows that the adapter needs, where tokens were added in its training."""
    own = model.get_input_embeddings().num_embeddings
    if (rows := embedding_rows(adapter, own)) != own:
        model.resize_token_embeddings(rows, mean_resizing=False)


def embedding_rows(adapter: Adapter, own: int) -> int:
    """Rows of the embedding that an adapter needs.

    The adapter holds either a copy of the whole embedding or the new rows alone.

    Args:
        own: rows of the base.
    """
    weights = Path(adapter.path) / "adapter_model.safetensors"
    if not weights.is_file():
        return own
    with safe_open(weights, "pt") as file:
        ends = ("embed_tokens.weight", "embed_tokens.token_adapter.base_layer.weight")
        names = [name for name in file.keys() if name.endswith(ends)]
        rows = file.get_slice(names[0]).get_shape()[0] if names else None
    if rows is None:
        rows = max([own, *(row + 1 for row in token_rows(adapter.config.get("trainable_token_indices")))])
    return rows


def _check_positions(adapter: Adapter, model: PreTrainedModel) -> None:
    for name, wanted in adapter.positions.items():
        found = getattr(model.config.get_text_config(), name, None)
        if found != wanted:
            raise CheckpointError(
                f"the adapter {adapter.path} was trained with other positions ({wanted}) than its base was loaded "
                f"with ({found}). Load the base with those, or merge: {merge_command(adapter.path)}"
            )


def add_reference_adapter(model: PeftModel, adapter: Adapter) -> None:
    """Load the adapter that training starts from a second time, frozen, under the name `ref`: the reference of DPO.

    It is not saved with the result.
    """
    model.load_adapter(adapter.path, "ref", is_trainable=False)
    # As exact as the adapter that is trained: at the first step both must be the same model.
    _restore_weights(model, adapter, "ref")
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and not is_deepspeed_zero3_enabled():
            _compute_in_float32(module, "ref")
        if isinstance(module, LoraLayer):
            module.lora_dropout["ref"] = torch.nn.Identity()
    model.save_pretrained = functools.partial(model.save_pretrained, selected_adapters=["default"])


def adapters_to_float32(model: torch.nn.Module) -> None:
    """Keep trained weights in float32: in bfloat16 an update below 1/256 of a weight is lost.

    A module trained in full takes inputs and gives outputs in the type of the model around it, which does not change.
    `StageTrainer` restores the type where TRL casts the adapters of quantized models to bfloat16.
    """
    if is_deepspeed_zero3_enabled():
        return
    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            for name in wrapper.modules_to_save:
                _compute_in_float32(wrapper, name)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()


def _compute_in_float32(wrapper: ModulesToSaveWrapper, name: str) -> None:
    """Let a float32 copy of a module work within a model of another type."""
    around = next(wrapper.original_module.parameters()).dtype
    if around == torch.float32:
        return
    copy = wrapper.modules_to_save[name]
    copy.float()
    copy.register_forward_pre_hook(_inputs_to_float32)
    copy.register_forward_hook(lambda module, inputs, output: output.to(around))


def _inputs_to_float32(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(each.float() if each.is_floating_point() else each for each in inputs)


def trainable_by_module(model: torch.nn.Module) -> Counter:
    """Trainable parameters, summed by the name of the module they belong to (q_proj, embed_tokens, ...)."""
    counts: Counter = Counter()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            inner = ("default", "weight", "bias", "modules_to_save", "base_layer")
            inner += ("token_adapter", "trainable_tokens_delta")
            parts = [part for part in name.split(".") if part not in inner]
            if parts[-1].startswith("lora_"):
                parts.pop()
            counts[parts[-1]] += parameter_count(parameter)
    return counts


def total_parameters(model: torch.nn.Module) -> int:
    """All parameters; a packed 4-bit weight counts as the weights that it stores."""
    states = ((parameter, getattr(parameter, "quant_state", None)) for parameter in model.parameters())
    return sum(parameter_count(parameter) if state is None else state.shape.numel() for parameter, state in states)


def parameter_count(parameter: torch.nn.Parameter) -> int:
    """Elements of a parameter; ZeRO-3 leaves an empty tensor in its place."""
    return getattr(parameter, "ds_numel", None) or parameter.numel()
