"""Requested and observed: attention, positions, weights, quantization, adapter, and what is trained."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from medicalgpt.args import bf16_gpu
from medicalgpt.models.adapters import parameter_count
from medicalgpt.models.attention import SHIFTED, choose_flash, flash_facts
from medicalgpt.models.hub import HEADS
from medicalgpt.models.towers import without_towers
from medicalgpt.training.observed_setup import OFF, Line, TrainingSetup

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def attention(setup: TrainingSetup) -> Line:
    """The attention function that the modules look up at each call, and whether the library has it."""
    base, flags = setup.base_model, setup.flags
    modules = [m for m in base.modules() if type(m).__name__.endswith("Attention") and hasattr(m, "config")]
    configs = [module.config for module in modules] or [base.config.get_text_config()]
    used = sorted({config._attn_implementation for config in configs})
    if flags.get("shift_attn"):
        wanted = SHIFTED
    elif flags.get("flash_attn"):
        wanted, _ = choose_flash(flash_facts(half=setup.training.bf16 or _loaded_type(setup) != "float32"))
    else:
        wanted = "sdpa" if base._supports_sdpa else "eager"
    known = all(name == "eager" or name in ALL_ATTENTION_FUNCTIONS for name in used)
    return Line(
        "attention", wanted, ", ".join(used), used == [wanted] and known, "Leave --flash_attn and --shift_attn out."
    )


def attention_groups(setup: TrainingSetup) -> Line:
    """The group size of shifted sparse attention in each layer."""
    if not setup.flags.get("shift_attn"):
        return Line("attention groups", OFF, OFF, True)
    length = setup.flags.get("model_max_length") or setup.flags.get("block_size")
    found = sorted(
        {
            getattr(module, "shift_group_size", 0)
            for _, module in without_towers(setup.base_model)
            if hasattr(module, "num_key_value_groups")
        }
    )
    wanted = str(length // 4)
    seen = ", ".join(map(str, found))
    return Line("attention groups", wanted, seen, seen == wanted, "Leave --shift_attn out.")


def positions(setup: TrainingSetup) -> Line:
    """The kind of scaling in the modules that compute rotary positions."""
    wanted = setup.flags.get("rope_scaling")
    if not wanted:
        return Line("rotary scaling", OFF, OFF, True)
    found = sorted(
        {
            module.rope_type
            for module in setup.base_model.modules()
            if isinstance(getattr(module, "rope_type", None), str)
        }
    )
    return Line("rotary scaling", wanted, ", ".join(found) or OFF, found == [wanted], "Leave --rope_scaling out.")


def weights(setup: TrainingSetup) -> Line:
    """Types of the weights that are not trained. Some families keep a few modules in float32."""
    chosen = _engine_type(setup) or _loaded_type(setup)
    found = _types(setup, trained=False)
    if not found:
        return Line("frozen weights", OFF, OFF, True)
    right = found.most_common(1)[0][0] == chosen and set(found) <= {chosen, "float32"}
    return Line("frozen weights", chosen, _shares(found), right, "Set --dtype to what was observed.")


def trained_weights(setup: TrainingSetup) -> Line:
    """Trained weights are float32, since an update below 1/256 of a bfloat16 weight is lost."""
    found = _types(setup, trained=True)
    if setup.sharded == "ZeRO-3" and setup.peft:
        # ZeRO-3 gathers small parameters into buffers of one type.
        chosen = weights(setup).requested
    else:
        chosen = _engine_type(setup) or "float32"
    return Line("trained weights", chosen, _shares(found), set(found) == {chosen}, "Leave --dtype out.")


def _loaded_type(setup: TrainingSetup) -> str:
    if setup.flags["dtype"] != "auto":
        return setup.flags["dtype"]
    return "bfloat16" if bf16_gpu() and setup.peft else "float32"


def _engine_type(setup: TrainingSetup) -> str | None:
    """DeepSpeed converts all weights, and keeps float32 copies in its optimizer."""
    if setup.trainer.is_deepspeed_enabled and (setup.training.bf16 or setup.training.fp16):
        return "bfloat16" if setup.training.bf16 else "float16"
    return None


def _types(setup: TrainingSetup, trained: bool) -> Counter:
    found: Counter = Counter()
    for parameter in setup.model.parameters():
        if parameter.is_floating_point() and parameter.requires_grad == trained:
            found[str(parameter.dtype).removeprefix("torch.")] += parameter_count(parameter)
    return found


def _shares(found: Counter) -> str:
    return ", ".join(f"{name} {_percent(n / found.total())}" for name, n in found.most_common()).removesuffix(" 100%")


def _percent(share: float) -> str:
    return "100%" if share == 1 else f"{share:.1%}"


def autocast(setup: TrainingSetup) -> Line:
    """The type that the first layer computes in."""
    requested = "bfloat16" if setup.training.bf16 else "float16" if setup.training.fp16 else OFF
    if setup.trainer.is_deepspeed_enabled or setup.unobservable:
        return setup.not_observed("autocast", requested, setup.unobservable or "DeepSpeed converts the weights")
    found = setup.training_pass.autocast
    return Line(
        "autocast",
        requested,
        found,
        found == requested,
        "Pass --bf16 or --fp16, or correct the settings of accelerate launch.",
    )


def quantization(setup: TrainingSetup) -> Line:
    """Classes of the linear layers (all but the head), and how their weights are stored."""
    flags = setup.flags
    four, eight = flags["load_in_4bit"] or flags["qlora"], flags["load_in_8bit"]
    wanted = "NF4, double" if flags["qlora"] else "NF4" if four else "int8" if eight else OFF
    found = Counter(_width(module) for _, module in _linear_layers(setup))
    kinds = ", ".join(f"{kind} in {count} of {found.total()} linear layers" for kind, count in found.items() if kind)
    return Line(
        "quantization",
        wanted,
        kinds or OFF,
        set(found) <= {"" if wanted == OFF else wanted} and bool(found or wanted == OFF),
        "A checkpoint that is stored quantized needs the flag of its format; a model of other layers needs none.",
    )


def _width(module: nn.Linear) -> str:
    kind = type(module).__name__
    if kind == "Linear4bit":
        state = module.weight.quant_state
        return (state.quant_type.upper() + (", double" if state.nested else "")) if state else "4 bits, not yet stored"
    if kind == "Linear8bitLt":
        return "int8" if module.weight.dtype == torch.int8 else "8 bits, not yet stored"
    return ""


def _linear_layers(setup: TrainingSetup) -> Iterator[tuple[str, nn.Linear]]:
    """(name, layer) of the base's linear layers, without the head."""
    base = setup.base_model
    head = base.get_output_embeddings()
    # A reward model's head is known by its name; it is not an output embedding.
    heads = {id(head), id(getattr(base, "score", None))}
    heads |= {id(getattr(head, inner, None)) for inner in ("base_layer", "original_module")}
    for name, module in without_towers(base):
        inside = {"lora_A", "lora_B", "modules_to_save", "original_module"} & set(name.split("."))
        if isinstance(module, nn.Linear) and not inside and id(module) not in heads:
            yield name.removesuffix(".base_layer"), module


def _requested_shape(setup: TrainingSetup) -> dict[str, Any]:
    """The shape of the adapter: from the flags, or from the adapter that training resumes."""
    if setup.resumed:
        return setup.resumed.config
    flags = setup.flags
    names = [name for name in flags["target_modules"].replace(" ", "").split(",") if name]
    saved = [name for name in (flags["modules_to_save"] or "").replace(" ", "").split(",") if name]
    return {
        "r": flags["lora_rank"],
        "lora_alpha": flags["lora_alpha"],
        "lora_dropout": flags["lora_dropout"],
        "use_dora": flags.get("use_dora", False),
        "use_rslora": flags.get("use_rslora", False),
        "target_modules": "all-linear" if names == ["all"] else names,
        "modules_to_save": saved,
    }


def _lora_layers(setup: TrainingSetup) -> dict[str, LoraLayer]:
    return {name: module for name, module in setup.base_model.named_modules() if isinstance(module, LoraLayer)}


def adapter(setup: TrainingSetup) -> Line:
    """Rank, scale, dropout and variant, read from the matrices."""
    found = Counter(_shape(layer) for layer in _lora_layers(setup).values())
    seen = "; ".join(f"{shape} on {count} layers" for shape, count in found.items()) or OFF
    if not setup.peft:
        return Line("adapter", OFF, seen, not found, "Pass --use_peft True.")
    shape = _requested_shape(setup)
    scale = shape["lora_alpha"] / (math.sqrt(shape["r"]) if shape["use_rslora"] else shape["r"])
    # peft has no dropout in adapters of experts.
    experts = any(isinstance(layer, ParamWrapper) for layer in _lora_layers(setup).values())
    without = experts or setup.flags.get("disable_dropout", False)
    wanted = _shape_text(shape["r"], scale, 0.0 if without else shape["lora_dropout"], shape["use_dora"])
    if shape.get("rank_pattern") or shape.get("alpha_pattern"):
        return setup.not_observed("adapter", wanted, "its layers differ in rank")
    return Line("adapter", wanted, seen, set(found) == {wanted}, "Start from the base, or keep the adapter's shape.")


def _shape(layer: LoraLayer) -> str:
    name = layer.active_adapters[0]
    rank = layer.lora_A[name].out_features if name in layer.lora_A else layer.lora_embedding_A[name].shape[0]
    if isinstance(layer, ParamWrapper):
        # One matrix holds those of all experts.
        rank //= layer.num_experts
    dropout = getattr(layer.lora_dropout[name], "p", 0.0)
    return _shape_text(rank, layer.scaling[name], dropout, name in layer.lora_magnitude_vector)


def _shape_text(rank: int, scale: float, dropout: float, dora: bool) -> str:
    return f"rank {rank}, scale {scale:g}, dropout {dropout:g}" + (", DoRA" if dora else "")


def dropout(setup: TrainingSetup) -> Line:
    """Modules that would drop values in training, although `--disable_dropout` is set."""
    if not setup.flags.get("disable_dropout"):
        return Line("dropout", OFF, OFF, True)
    found = Counter()
    for module in setup.model.modules():
        if isinstance(module, nn.Dropout) and module.p:
            found[f"{type(module).__name__} {module.p:g}"] += 1
        # Attention modules have a number with that name instead of a dropout module.
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float) and value:
                found[f"{name} {value:g}"] += 1
    wanted = "none anywhere"
    seen = ", ".join(f"{kind} in {count} modules" for kind, count in found.items()) or wanted
    return Line("dropout", wanted, seen, not found, "Pass --disable_dropout False.")


def adapted_modules(setup: TrainingSetup) -> Line:
    """The layers with an adapter, and the modules that are trained in full alongside it."""
    if not setup.peft:
        return Line("adapter on", OFF, OFF, True)
    shape = _requested_shape(setup)
    # peft trains the head of a reward model in full, and lists every name that such a head may have.
    heads = {name for name in HEADS if hasattr(setup.base_model, name)}
    targets, saved = shape["target_modules"], set(shape["modules_to_save"] or ()) - set(HEADS) | heads
    found = set(_lora_layers(setup))
    copied = [name for name, m in setup.base_model.named_modules() if isinstance(m, ModulesToSaveWrapper)]
    if isinstance(targets, str) and targets != "all-linear":
        return setup.not_observed("adapter on", targets, "a pattern")
    if targets == "all-linear":
        wanted = "every linear layer but the head"
        missing = [name for name, _ in _linear_layers(setup) if name not in found and not _frozen(setup, name)]
        # add_lora has warned of linear layers next to experts that peft does not reach.
        right = not missing or any(isinstance(layer, ParamWrapper) for layer in _lora_layers(setup).values())
    else:
        wanted = ", ".join(sorted(targets))
        right = all(_among(name, targets) for name in found) and all(_among_any(target, found) for target in targets)
    if saved:
        wanted += f"; in full {', '.join(sorted(saved))}"
        # A tied model has one matrix for both ends, and it belongs to the embedding.
        tied = getattr(setup.base_model.config, "tie_word_embeddings", False)
        right &= all(_among_any("embed_tokens" if tied and name == "lm_head" else name, copied) for name in saved)
    seen = ", ".join(sorted({name.rpartition(".")[2] for name in found})) or "nothing"
    if copied:
        seen += f"; in full {', '.join(sorted({name.rpartition('.')[2] for name in copied}))}"
    return Line(
        "adapter on", wanted, seen, right, "Name modules that the model has: --target_modules, --modules_to_save."
    )


def _among(name: str, endings: Sequence[str]) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)


def _among_any(ending: str, names: Sequence[str]) -> bool:
    return any(_among(name, [ending]) for name in names)


def frozen_layers(setup: TrainingSetup) -> Line:
    """Decoder layers without a trained weight."""
    wanted = _requested_frozen_layers(setup)
    trained: dict[int, bool] = {}
    for name, parameter in setup.model.named_parameters():
        number = None if _in_tower(setup, name) else _layer(name)
        if number is not None:
            trained[number] = trained.get(number, False) or parameter.requires_grad
    found = {number for number, is_trained in trained.items() if not is_trained}
    # In a model with layers of several kinds, an adapter on chosen modules may skip some layers.
    right = found == wanted if wanted or not setup.peft else True
    return Line(
        "frozen layers", _numbers(wanted), _numbers(found), right, "Name layers that the model has: --freeze_layers."
    )


def _requested_frozen_layers(setup: TrainingSetup) -> set[int]:
    found: set[int] = set()
    for part in (setup.flags.get("freeze_layers") or "").replace(" ", "").split(","):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1)) if first else set()
    return found


def _layer(name: str) -> int | None:
    found = re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", f".{name}.")
    return int(found[1]) if found else None


def _frozen(setup: TrainingSetup, name: str) -> bool:
    return _in_tower(setup, name) or _layer(name) in _requested_frozen_layers(setup)


def _in_tower(setup: TrainingSetup, name: str) -> bool:
    """Whether a weight or a module is of an encoder of images."""
    return any(f".{tower}." in f".{name}." for tower in setup.towers)


def _numbers(layers: set[int]) -> str:
    return ", ".join(map(str, sorted(layers))) or OFF


def trainable(setup: TrainingSetup) -> Line:
    """Every weight that should be trained by the flags requires a gradient, and no other does."""
    model, adapters = setup.model, ("lora_", "modules_to_save", "trainable_tokens_delta")
    # An adapter that is not active is a frozen reference.
    others = set(model.peft_config).difference(model.active_adapters) if isinstance(model, PeftModel) else set()
    declared = {
        name
        for name, _ in model.named_parameters()
        if not _frozen(setup, name)
        and others.isdisjoint(name.split("."))
        and (not setup.peft or any(part.startswith(adapters) for part in name.split(".")))
    }
    sizes = {name: parameter_count(parameter) for name, parameter in model.named_parameters()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    wanted, seen = (
        f"{sum(sizes[name] for name in names):,} weights in {len(names)} tensors" for names in (declared, trained)
    )
    if odd := sorted(declared ^ trained):
        seen += f" (differs: {odd[0]})"
    return Line("trained", wanted, seen, not odd and bool(trained), "Something froze or unfroze weights after loading.")
