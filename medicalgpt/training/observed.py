"""What was asked for, and what is really there: compared right before the first step of training.

Each line of the table is one function below, which is given a `Scene` and returns a `Line`. The observed side is read
from the thing itself (a module, the optimizer, the first batch), never from a flag. `LINES` at the end lists them all.
"""

import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from medicalgpt.args import bf16_gpu
from medicalgpt.data.encoding import IGNORED
from medicalgpt.models.attention import SHIFTED, choose_flash, flash_facts
from medicalgpt.models.hub import HEADS, Adapter
from medicalgpt.training.trainers import sequence_lengths

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.trainer_optimizer import is_optimizer_factory
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

OFF = "off"


class Line(NamedTuple):
    """One line of the table; `agrees` is None where the observed side cannot be seen, which is no agreement."""

    name: str
    asked: str
    observed: str
    agrees: bool | None
    remedy: str = ""


class Pass(NamedTuple):
    """What the first decoder layer is given: (batch, length, width), and the type that autocast computes in."""

    hidden: torch.Tensor
    autocast: str


@dataclass(frozen=True)
class Scene:
    """What there is to look at.

    Args:
        asked: the flags as they were parsed, by name, and `processes`, the number that was launched.
        training: the trainer's arguments as they were parsed.
        trainer: ready for its first step, optimizer and schedule included.
        batches: the batches of the first step, as they go into the model.
        resumed: the adapter that training resumes, if there is one.
    """

    asked: dict[str, Any]
    training: TrainingArguments
    trainer: Trainer
    batches: Sequence[dict[str, torch.Tensor]]
    resumed: Adapter | None = None

    @property
    def model(self) -> nn.Module:
        """The model with its adapter, without the wrappers of distributed training; of policy and critic the policy."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        return getattr(model, "policy", model)

    @property
    def critic(self) -> nn.Module | None:
        """What is trained beside the model."""
        return getattr(self.trainer.accelerator.unwrap_model(self.trainer.model), "critic", None)

    @property
    def base(self) -> nn.Module:
        """The model without its adapter's wrapper."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def peft(self) -> bool:
        """Whether an adapter was asked for; a program without adapter flags trains all weights."""
        return self.asked.get("use_peft", False)

    @property
    def sharded(self) -> str:
        """What keeps single weights from being seen, or an empty text."""
        if is_deepspeed_zero3_enabled():
            return "ZeRO-3"
        return "FSDP" if self.trainer.is_fsdp_enabled else ""

    @property
    def sightless(self) -> str:
        """Why a forward pass cannot be looked into, or an empty text."""
        layers = any(isinstance(module, GradientCheckpointingLayer) for module in self.model.modules())
        return self.sharded or ("" if layers else "no decoder layer was found")

    @cached_property
    def training_pass(self) -> Pass:
        return _first_layer_input(self, training=True)

    def unseen(self, name: str, asked: str, why: str) -> Line:
        return Line(name, asked, f"not observed ({why})", None)


def observe(
    asked: dict[str, Any],
    training: TrainingArguments,
    trainer: Trainer,
    batches: Sequence[dict[str, torch.Tensor]],
    resumed: Adapter | None = None,
) -> list[Line]:
    """The whole table. Training goes on as if nobody had looked: no weight, gradient or random state changes.

    Call it on every process. For the arguments see `Scene`.
    """
    scene = Scene(asked, training, trainer, batches, resumed)
    with torch.random.fork_rng():
        return [line(scene) for line in LINES]


def as_table(lines: Sequence[Line]) -> list[str]:
    """Aligned text of the lines in which something was asked for or observed, the headings first."""
    rows = [("", "asked", "observed", "")]
    marks = {True: "", False: "  <- differs", None: ""}
    rows += [(line.name, line.asked, line.observed, marks[line.agrees]) for line in lines if not _idle(line)]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return [f"{name:<{widths[0]}}  {asked:<{widths[1]}}  {observed}{mark}" for name, asked, observed, mark in rows]


def _idle(line: Line) -> bool:
    return line.asked == line.observed == OFF


def attention(scene: Scene) -> Line:
    """The function that the attention modules look up at each call, and that the library has it."""
    base, asked = scene.base, scene.asked
    modules = [m for m in base.modules() if type(m).__name__.endswith("Attention") and hasattr(m, "config")]
    configs = [module.config for module in modules] or [base.config.get_text_config()]
    used = sorted({config._attn_implementation for config in configs})
    if asked.get("shift_attn"):
        wanted = SHIFTED
    elif asked.get("flash_attn"):
        wanted, _ = choose_flash(flash_facts(half=scene.training.bf16 or _loaded_type(scene) != "float32"))
    else:
        wanted = "sdpa" if base._supports_sdpa else "eager"
    known = all(name == "eager" or name in ALL_ATTENTION_FUNCTIONS for name in used)
    return Line(
        "attention", wanted, ", ".join(used), used == [wanted] and known, "Leave --flash_attn and --shift_attn out."
    )


def attention_groups(scene: Scene) -> Line:
    """The group size of shifted sparse attention in each layer."""
    if not scene.asked.get("shift_attn"):
        return Line("attention groups", OFF, OFF, True)
    length = scene.asked.get("model_max_length") or scene.asked.get("block_size")
    found = sorted(
        {getattr(m, "shift_group_size", 0) for m in scene.base.modules() if hasattr(m, "num_key_value_groups")}
    )
    wanted = str(length // 4)
    seen = ", ".join(map(str, found))
    return Line("attention groups", wanted, seen, seen == wanted, "Leave --shift_attn out.")


def positions(scene: Scene) -> Line:
    """The kind of scaling in the modules that compute rotary positions."""
    wanted = scene.asked.get("rope_scaling")
    if not wanted:
        return Line("rotary scaling", OFF, OFF, True)
    found = sorted(
        {module.rope_type for module in scene.base.modules() if isinstance(getattr(module, "rope_type", None), str)}
    )
    return Line("rotary scaling", wanted, ", ".join(found) or OFF, found == [wanted], "Leave --rope_scaling out.")


def weights(scene: Scene) -> Line:
    """Types of the numbers that stay as they are. A few modules are kept in float32 by some families."""
    chosen = _engine_type(scene) or _loaded_type(scene)
    found = _types(scene, trained=False)
    if not found:
        return Line("frozen weights", OFF, OFF, True)
    right = found.most_common(1)[0][0] == chosen and set(found) <= {chosen, "float32"}
    return Line("frozen weights", chosen, _shares(found), right, "Set --dtype to what was observed.")


def trained_weights(scene: Scene) -> Line:
    """Trained numbers are float32, since an update below 1/256 of a bfloat16 weight is lost."""
    found = _types(scene, trained=True)
    if scene.sharded == "ZeRO-3" and scene.peft:
        # ZeRO-3 gathers small parameters into buffers of one type.
        chosen = weights(scene).asked
    else:
        chosen = _engine_type(scene) or "float32"
    return Line("trained weights", chosen, _shares(found), set(found) == {chosen}, "Leave --dtype out.")


def _loaded_type(scene: Scene) -> str:
    if scene.asked["dtype"] != "auto":
        return scene.asked["dtype"]
    return "bfloat16" if bf16_gpu() and scene.peft else "float32"


def _engine_type(scene: Scene) -> str | None:
    """DeepSpeed converts all weights, and keeps float32 copies in its optimizer."""
    if scene.trainer.is_deepspeed_enabled and (scene.training.bf16 or scene.training.fp16):
        return "bfloat16" if scene.training.bf16 else "float16"
    return None


def _types(scene: Scene, trained: bool) -> Counter:
    found: Counter = Counter()
    for parameter in scene.model.parameters():
        if parameter.is_floating_point() and parameter.requires_grad == trained:
            found[str(parameter.dtype).removeprefix("torch.")] += _size(parameter)
    return found


def _shares(found: Counter) -> str:
    return ", ".join(f"{name} {_percent(n / found.total())}" for name, n in found.most_common()).removesuffix(" 100%")


def _percent(share: float) -> str:
    return "100%" if share == 1 else f"{share:.1%}"


def _size(parameter: nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", None) or parameter.numel()


def autocast(scene: Scene) -> Line:
    """The type in which the first layer finds itself computing."""
    asked = "bfloat16" if scene.training.bf16 else "float16" if scene.training.fp16 else OFF
    if scene.trainer.is_deepspeed_enabled or scene.sightless:
        return scene.unseen("autocast", asked, scene.sightless or "DeepSpeed converts the weights")
    found = scene.training_pass.autocast
    return Line(
        "autocast", asked, found, found == asked, "Say --bf16 or --fp16, or mend the settings of accelerate launch."
    )


def quantization(scene: Scene) -> Line:
    """Classes of the linear layers (all but the head), and how their numbers are stored."""
    asked = scene.asked
    four, eight = asked["load_in_4bit"] or asked["qlora"], asked["load_in_8bit"]
    wanted = "NF4, double" if asked["qlora"] else "NF4" if four else "int8" if eight else OFF
    found = Counter(_width(module) for _, module in _linear_layers(scene))
    kinds = ", ".join(f"{kind} in {count} of {found.total()} linear layers" for kind, count in found.items() if kind)
    return Line(
        "quantization",
        wanted,
        kinds or OFF,
        set(found) <= {"" if wanted == OFF else wanted} and bool(found or wanted == OFF),
        "A checkpoint stored quantized needs its own flag; a model of other layers needs none.",
    )


def _width(module: nn.Linear) -> str:
    kind = type(module).__name__
    if kind == "Linear4bit":
        state = module.weight.quant_state
        return (state.quant_type.upper() + (", double" if state.nested else "")) if state else "4 bits, not yet stored"
    if kind == "Linear8bitLt":
        return "int8" if module.weight.dtype == torch.int8 else "8 bits, not yet stored"
    return ""


def _linear_layers(scene: Scene) -> Iterator[tuple[str, nn.Linear]]:
    """(name, layer) of the base's own linear layers, the head left out."""
    base = scene.base
    head = base.get_output_embeddings()
    # A reward model's head has a name, but is no output embedding.
    heads = {id(head), id(getattr(base, "score", None))}
    heads |= {id(getattr(head, inner, None)) for inner in ("base_layer", "original_module")}
    for name, module in base.named_modules():
        inside = {"lora_A", "lora_B", "modules_to_save", "original_module"} & set(name.split("."))
        if isinstance(module, nn.Linear) and not inside and id(module) not in heads:
            yield name.removesuffix(".base_layer"), module


def _shape_asked(scene: Scene) -> dict[str, Any]:
    """The adapter's shape by the flags, or by the adapter that is gone on with."""
    if scene.resumed:
        return scene.resumed.config
    asked = scene.asked
    names = [name for name in asked["target_modules"].replace(" ", "").split(",") if name]
    saved = [name for name in (asked["modules_to_save"] or "").replace(" ", "").split(",") if name]
    return {
        "r": asked["lora_rank"],
        "lora_alpha": asked["lora_alpha"],
        "lora_dropout": asked["lora_dropout"],
        "use_dora": asked.get("use_dora", False),
        "use_rslora": asked.get("use_rslora", False),
        "target_modules": "all-linear" if names == ["all"] else names,
        "modules_to_save": saved,
    }


def _lora_layers(scene: Scene) -> dict[str, LoraLayer]:
    return {name: module for name, module in scene.base.named_modules() if isinstance(module, LoraLayer)}


def adapter(scene: Scene) -> Line:
    """Rank, scale, dropout and variant of the matrices themselves."""
    found = Counter(_shape(layer) for layer in _lora_layers(scene).values())
    seen = "; ".join(f"{shape} on {count} layers" for shape, count in found.items()) or OFF
    if not scene.peft:
        return Line("adapter", OFF, seen, not found, "Say --use_peft True.")
    shape = _shape_asked(scene)
    scale = shape["lora_alpha"] / (math.sqrt(shape["r"]) if shape["use_rslora"] else shape["r"])
    # peft has no dropout in adapters of experts.
    experts = any(isinstance(layer, ParamWrapper) for layer in _lora_layers(scene).values())
    without = experts or scene.asked.get("disable_dropout", False)
    wanted = _shape_text(shape["r"], scale, 0.0 if without else shape["lora_dropout"], shape["use_dora"])
    if shape.get("rank_pattern") or shape.get("alpha_pattern"):
        return scene.unseen("adapter", wanted, "its layers have ranks of their own")
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


def dropout(scene: Scene) -> Line:
    """Modules that would drop numbers in training, where `--disable_dropout` says that none does."""
    if not scene.asked.get("disable_dropout"):
        return Line("dropout", OFF, OFF, True)
    found = Counter()
    for module in scene.model.modules():
        if isinstance(module, nn.Dropout) and module.p:
            found[f"{type(module).__name__} {module.p:g}"] += 1
        # Attention modules hold no dropout module but a number of that name.
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float) and value:
                found[f"{name} {value:g}"] += 1
    wanted = "none anywhere"
    seen = ", ".join(f"{kind} in {count} modules" for kind, count in found.items()) or wanted
    return Line("dropout", wanted, seen, not found, "Say --disable_dropout False.")


def adapted_modules(scene: Scene) -> Line:
    """The layers with an adapter, and the modules that are trained in full beside it."""
    if not scene.peft:
        return Line("adapter on", OFF, OFF, True)
    shape = _shape_asked(scene)
    # peft trains the head of a reward model in full, and writes down all names that such a head may have.
    heads = {name for name in HEADS if hasattr(scene.base, name)}
    targets, saved = shape["target_modules"], set(shape["modules_to_save"] or ()) - set(HEADS) | heads
    found = set(_lora_layers(scene))
    copied = [name for name, m in scene.base.named_modules() if isinstance(m, ModulesToSaveWrapper)]
    if isinstance(targets, str) and targets != "all-linear":
        return scene.unseen("adapter on", targets, "a pattern")
    if targets == "all-linear":
        wanted = "every linear layer but the head"
        missing = [name for name, _ in _linear_layers(scene) if name not in found and not _frozen(scene, name)]
        # models.add_lora has warned of linear layers beside experts that peft does not reach.
        right = not missing or any(isinstance(layer, ParamWrapper) for layer in _lora_layers(scene).values())
    else:
        wanted = ", ".join(sorted(targets))
        right = all(_among(name, targets) for name in found) and all(_among_any(target, found) for target in targets)
    if saved:
        wanted += f"; in full {', '.join(sorted(saved))}"
        # One matrix serves both ends of a tied model, and it hangs on the embedding.
        tied = getattr(scene.base.config, "tie_word_embeddings", False)
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


def frozen_layers(scene: Scene) -> Line:
    """Decoder layers without a trained number."""
    wanted = _layers_asked(scene)
    trained: dict[int, bool] = {}
    for name, parameter in scene.model.named_parameters():
        number = _layer(name)
        if number is not None:
            trained[number] = trained.get(number, False) or parameter.requires_grad
    found = {number for number, moves in trained.items() if not moves}
    # An adapter on chosen modules may leave layers of a mixed kind without any.
    right = found == wanted if wanted or not scene.peft else True
    return Line(
        "frozen layers", _numbers(wanted), _numbers(found), right, "Name layers that the model has: --freeze_layers."
    )


def _layers_asked(scene: Scene) -> set[int]:
    found: set[int] = set()
    for part in (scene.asked.get("freeze_layers") or "").replace(" ", "").split(","):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1)) if first else set()
    return found


def _layer(name: str) -> int | None:
    found = re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", f".{name}.")
    return int(found[1]) if found else None


def _frozen(scene: Scene, name: str) -> bool:
    return _layer(name) in _layers_asked(scene)


def _numbers(layers: set[int]) -> str:
    return ", ".join(map(str, sorted(layers))) or OFF


def trainable(scene: Scene) -> Line:
    """Every number that the flags say is trained has a gradient, and no other."""
    model, adapters = scene.model, ("lora_", "modules_to_save", "trainable_tokens_delta")
    # Another adapter than the active one is a frozen reference.
    others = set(model.peft_config).difference(model.active_adapters) if isinstance(model, PeftModel) else set()
    declared = {
        name
        for name, _ in model.named_parameters()
        if not _frozen(scene, name)
        and others.isdisjoint(name.split("."))
        and (not scene.peft or any(part.startswith(adapters) for part in name.split(".")))
    }
    sizes = {name: _size(parameter) for name, parameter in model.named_parameters()}
    moving = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    wanted, seen = (
        f"{sum(sizes[name] for name in names):,} numbers in {len(names)} tensors" for names in (declared, moving)
    )
    if odd := sorted(declared ^ moving):
        seen += f" (differs: {odd[0]})"
    return Line("trained", wanted, seen, not odd and bool(moving), "Something froze or freed weights after loading.")


def _innermost(optimizer: Any) -> Any:
    """The optimizer below the wrappers of accelerate and DeepSpeed."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _groups(scene: Scene) -> list[tuple[dict[str, Any], list[nn.Parameter]]] | None:
    """(settings, parameters of the model) of each group that has some; None where they cannot be told apart."""
    found = _all_groups(scene)
    of_critic = {id(parameter) for parameter in scene.critic.parameters()} if scene.critic is not None else set()
    if found is None or not of_critic:
        return found
    kept = [(group, [one for one in own if id(one) not in of_critic]) for group, own in found]
    return [(group, own) for group, own in kept if own]


def _all_groups(scene: Scene) -> list[tuple[dict[str, Any], list[nn.Parameter]]] | None:
    if scene.sharded:
        return None
    optimizer = scene.trainer.optimizer
    inner = _innermost(optimizer)
    if isinstance(inner, LayerWiseDummyOptimizer):
        groups = [group for one in set(inner.optimizer_dict.values()) for group in one.param_groups]
        return [(group, group["params"]) for group in groups if group["params"]]
    while not hasattr(optimizer, "bit16_groups") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    # ZeRO-2 puts flat float32 copies into the groups and keeps the model's own parameters beside them.
    parameters = getattr(optimizer, "bit16_groups", None) or [group["params"] for group in inner.param_groups]
    return [(group, list(own)) for group, own in zip(inner.param_groups, parameters, strict=True) if own]


def _asked_optimizer(scene: Scene) -> tuple[Any, dict[str, Any]]:
    """Class and settings that the library has for `--optim`."""
    if scene.training.optim.value.endswith("layerwise"):
        # Asking for these would hang their hooks on the model once more.
        return LayerWiseDummyOptimizer, {}
    found, settings = Trainer.get_optimizer_cls_and_kwargs(scene.training, scene.base)
    return found, {name: value for name, value in settings.items() if name not in ("lr", "params", "model")}


def optimizer(scene: Scene) -> Line:
    """Its class, and each setting that follows from `--optim` and `--adam_*`."""
    name = scene.training.optim.value
    wanted, settings = _asked_optimizer(scene)
    inner = _innermost(scene.trainer.optimizer)
    seen = _class_name(type(inner))
    if is_optimizer_factory(wanted):
        return scene.unseen("optimizer", name, f"{seen} is several in one")
    plugin = scene.trainer.accelerator.state.deepspeed_plugin
    if plugin and "optimizer" in plugin.deepspeed_config:
        return scene.unseen("optimizer", name, f"the DeepSpeed file names its own, {seen}")
    odd = [key for key, value in settings.items() if any(value != found for found in _setting(inner, key))]
    shown = [key for key in settings if key in odd or (key == "optim_bits" and _setting(inner, key))]
    seen += "".join(f", {key} {_setting(inner, key)[0]}" for key in shown)
    wanted_text = _class_name(wanted) + "".join(f", {key} {settings[key]}" for key in shown)
    return Line(
        "optimizer",
        wanted_text,
        seen,
        type(inner) is wanted and not odd,
        "A DeepSpeed file or the code of the trainer chose another.",
    )


def _class_name(kind: type) -> str:
    return f"{kind.__name__} of {kind.__module__.partition('.')[0]}"


def _setting(optimizer: torch.optim.Optimizer, key: str) -> list[Any]:
    """Values of a setting in all groups, or in the optimizer itself, as bitsandbytes keeps some; none if nowhere."""
    found = [group[key] for group in optimizer.param_groups if key in group]
    if found:
        return [tuple(value) if isinstance(value, list) else value for value in found]
    owner = optimizer if hasattr(optimizer, key) else getattr(optimizer, "args", None)
    return [getattr(owner, key)] if hasattr(owner, key) else []


def coverage(scene: Scene) -> Line:
    """Every trained tensor is in the optimizer once, and nothing else is."""
    moving = {id(parameter) for parameter in scene.model.parameters() if parameter.requires_grad}
    wanted = f"{len(moving)} trained tensors once"
    groups = _groups(scene)
    if groups is None:
        return scene.unseen("in the optimizer", wanted, scene.sharded)
    times = Counter(id(parameter) for _, own in groups for parameter in own)
    once = sum(times[one] == 1 for one in moving)
    others = len(times.keys() - moving)
    if scene.training.optim.value.startswith(("galore", "apollo")):
        # Their groups hold all parameters; one without a gradient stays as it is.
        others = len(times.keys() - {id(parameter) for parameter in scene.model.parameters()})
    seen = f"{once} trained tensors once" + (f", {others} others" if others else "")
    return Line(
        "in the optimizer",
        wanted,
        seen,
        seen == wanted,
        "Something changed what is trained after the optimizer was built.",
    )


def critic(scene: Scene) -> Line:
    """Every trained tensor of the critic is in the optimizer once, at the critic's rate."""
    if scene.critic is None:
        return Line("critic", OFF, OFF, True)
    rate = scene.asked.get("critic_learning_rate")
    rate = scene.training.learning_rate if rate is None else rate
    moving = {id(parameter) for parameter in scene.critic.parameters() if parameter.requires_grad}
    rates = sorted({rate, rate * (scene.asked.get("loraplus_lr_ratio") or 1)})
    wanted = f"{len(moving)} trained tensors once, learning rate {', '.join(f'{one:g}' for one in rates)}"
    groups = _all_groups(scene)
    if groups is None:
        return scene.unseen("critic", wanted, scene.sharded)
    own = [(group, id(one)) for group, members in groups for one in members if id(one) in moving]
    rates = sorted({float(f"{group.get('initial_lr', group['lr']):.6g}") for group, _ in own})
    once = sum(times == 1 for times in Counter(one for _, one in own).values())
    seen = f"{once} trained tensors once, learning rate {', '.join(f'{one:g}' for one in rates)}"
    return Line("critic", wanted, seen, seen == wanted and bool(moving), "Leave --critic_learning_rate out.")


def learning_rate(scene: Scene) -> Line:
    """The rates that the schedule scales, of the B matrices apart where LoRA+ is on."""
    rate, ratio = scene.training.learning_rate, scene.asked.get("loraplus_lr_ratio")
    wanted = f"{rate:g}" + (f", B matrices {rate * ratio:g}" if ratio else "")
    groups = _groups(scene)
    if groups is None:
        if ratio:
            return scene.unseen("learning rate", wanted, scene.sharded)
        groups = [(group, []) for group in _innermost(scene.trainer.optimizer).param_groups]
    names = {id(parameter): name for name, parameter in scene.model.named_parameters()}
    found: dict[bool, set[float]] = {}
    for group, own in groups:
        fast = bool(ratio) and any(re.search(r"\.lora_(embedding_)?B\.", names.get(id(one), "")) for one in own)
        found.setdefault(fast, set()).add(float(f"{group.get('initial_lr', group['lr']):.6g}"))
    seen = ", B matrices ".join(", ".join(f"{one:g}" for one in sorted(found[fast])) for fast in sorted(found))
    return Line(
        "learning rate",
        wanted,
        seen,
        seen == wanted,
        "A resumed run keeps the rate of its checkpoint: give that rate, or start anew.",
    )


def schedule(scene: Scene) -> Line:
    """By how much the rate is scaled at the start, after the warmup and on the way down."""
    args, last = scene.training, scene.trainer.state.max_steps
    warmup = args.get_warmup_steps(last)
    kind = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    steps = sorted({0, min(warmup, last), (min(warmup, last) + last) // 2})
    plain = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    expected = get_scheduler(kind, plain, warmup, last, args.lr_scheduler_kwargs)
    real = getattr(scene.trainer.lr_scheduler, "scheduler", scene.trainer.lr_scheduler)
    wanted = f"{kind}, warmup {warmup}"
    if not hasattr(expected, "lr_lambdas") or not hasattr(real, "lr_lambdas"):
        return scene.unseen("schedule", wanted, type(real).__name__)

    def curve(scheduler: Any) -> str:
        return ", ".join(f"{scheduler.lr_lambdas[0](step):.3g} at {step}" for step in steps)

    idle = warmup > 0 and expected.lr_lambdas[0](0) == 1
    return Line(
        "schedule",
        f"{wanted}: {curve(expected)}",
        f"no warmup: {curve(real)}" if idle else curve(real),
        curve(real) == curve(expected) and not idle,
        "--lr_scheduler_type constant_with_warmup has a warmup." if idle else "Start anew in another --output_dir.",
    )


def effective_batch(scene: Scene) -> Line:
    """Rows of the first step on all processes. Where the data ends in it, there may be fewer."""
    asked, accelerator = scene.asked, scene.trainer.accelerator
    size = (asked["per_device_train_batch_size"], asked["gradient_accumulation_steps"], asked["processes"])
    # A row of preferences is two sequences.
    sequences = getattr(scene.trainer, "sequences_per_row", 1)
    wanted = _batch_text(math.prod(size), *size)
    if asked.get("packing") and "flash" in scene.base.config._attn_implementation:
        return scene.unseen("effective batch", wanted, "rows are joined to one for FlashAttention")
    here = [len(_ids(batch)) / sequences for batch in scene.batches]
    total = sum(gather_object([sum(here)]))
    seen = _batch_text(total, here[0], len(here), accelerator.num_processes)
    state = accelerator.gradient_state
    ends = state.end_of_dataloader or not state.in_dataloader
    fewer = seen != wanted and ends and total < math.prod(size)
    if fewer:
        seen += ", the data ends here"
    same = accelerator.num_processes == asked["processes"]
    return Line(
        "effective batch",
        wanted,
        seen,
        same and (seen == wanted or fewer),
        "Give the batch flags in one place only: the command line, not the settings of accelerate launch.",
    )


def _batch_text(total: float, rows: float, times: int, processes: int) -> str:
    return f"{total:g} = {rows:g} a device x {times} accumulated x {processes} process(es)"


def _ids(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return next(value for name, value in batch.items() if name.endswith(("input_ids", "completion_ids")))


def packing(scene: Scene) -> Line:
    """What keeps packed sequences apart: position ids that restart, and no attention mask."""
    if "packing" not in scene.asked:
        return Line("packing", OFF, OFF, True)
    asked, batch = scene.asked["packing"], scene.batches[0]
    wanted = "blocks" if asked else "rows, with attention mask"
    if "position_ids" not in batch:
        seen = "rows, with attention mask" if "attention_mask" in batch else "rows, without attention mask"
        return Line("packing", wanted, seen, seen == wanted, "The collator does not do what --packing says.")
    found = batch["position_ids"]
    # Each position is 0, where a sequence starts, or one more than the one before it.
    sound = bool(((found[:, 1:] == 0) | (found[:, 1:] == found[:, :-1] + 1)).all() and (found[:, 0] == 0).all())
    apart = bool((batch["labels"][found == 0] == IGNORED).all())
    seen = "blocks" if sound and apart else "blocks whose sequences are not kept apart"
    if "attention_mask" in batch:
        seen = "blocks, with an attention mask, so that sequences see each other"
    if seen == "blocks" and asked and not _restarts(scene):
        seen = "blocks taken for one sequence each"
    return Line("packing", wanted, seen, seen == wanted, "The collator does not do what --packing says.")


def _restarts(scene: Scene) -> bool:
    """Whether the collator gives a block as many starts as it has sequences; a first batch may hold none to see it."""
    rows = scene.trainer.train_dataset
    if "seq_lengths" not in (getattr(rows, "column_names", None) or ()):
        return True
    row = max((rows[number] for number in range(min(len(rows), 100))), key=lambda one: len(one["seq_lengths"]))
    return int((scene.trainer.data_collator([row])["position_ids"] == 0).sum()) == len(row["seq_lengths"])


def neftune(scene: Scene) -> Line:
    """The largest noise on what the first layer is given for the first batch (https://arxiv.org/abs/2310.05914)."""
    alpha = scene.training.neftune_noise_alpha or 0.0
    wanted = f"at most {alpha:g} / sqrt(length x width)" if alpha else OFF
    batch = scene.batches[0]
    if not alpha and "input_ids" not in batch:
        return Line("NEFTune noise", OFF, OFF, True)
    if scene.sightless or "input_ids" not in batch or not {"position_ids", "attention_mask"} & set(batch):
        return scene.unseen("NEFTune noise", wanted, scene.sightless or "no lengths in the batch")
    quiet = _first_layer_input(scene, training=False).hidden
    noise = (scene.training_pass.hidden - quiet).abs().amax(dim=-1)
    in_evaluation = (_first_layer_input(scene, training=False).hidden - quiet).abs().max().item()
    if noise.shape != batch["input_ids"].shape:
        return scene.unseen("NEFTune noise", wanted, "the batch is rearranged on its way")
    if "attention_mask" in batch:
        padding = batch["attention_mask"] == 0
    else:
        padding = (batch["input_ids"] == scene.trainer.processing_class.pad_token_id) & (batch["labels"] == IGNORED)
    bound = (alpha / (sequence_lengths(batch) * quiet.shape[-1]).sqrt()).masked_fill(padding, 0)
    noise = noise.masked_fill(padding, 0)
    rounding = torch.finfo(quiet.dtype).eps * quiet.abs().max().item()
    # The largest of some hundred even draws from an interval is close to its end.
    near = bool(((noise + rounding).amax(dim=1) >= 0.9 * bound.amax(dim=1)).all())
    seen = f"{noise.max().item():.3g}" if noise.any() else OFF
    if alpha:
        wanted = f"{bound.max().item():.3g} at most"
        seen += "" if near else ", and too little in some rows"
    if in_evaluation:
        seen += f", {in_evaluation:.3g} in evaluation"
    return Line(
        "NEFTune noise",
        wanted,
        seen,
        near and bool((noise <= 1.01 * bound + (rounding if alpha else 0)).all()) and in_evaluation == 0,
        "Leave --neft_alpha out.",
    )


class _Seen(Exception):
    """Ends a forward pass whose end nobody needs."""


def _first_layer_input(scene: Scene, training: bool) -> Pass:
    """Run the first batch up to the first decoder layer, as a step or an evaluation would run it."""
    model, found = scene.trainer.model, []
    layer = next(module for module in model.modules() if isinstance(module, GradientCheckpointingLayer))

    def look(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        kind = hidden.device.type
        number = str(torch.get_autocast_dtype(kind)).removeprefix("torch.")
        found.append(Pass(hidden.detach(), number if torch.is_autocast_enabled(kind) else OFF))
        raise _Seen

    modes = {module: module.training for module in model.modules()}
    model.train(training)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    hook = layer.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with torch.no_grad():
            scene.trainer.compute_loss(model, dict(scene.batches[0]))
    except _Seen:
        pass
    finally:
        hook.remove()
        for module, mode in modes.items():
            module.training = mode
    return found[0]


def sharding(scene: Scene) -> Line:
    """What divides the training among the processes beyond the rows, by the flags or by `accelerate launch`."""

    def wanted(flag: Any, variable: str) -> bool:
        return bool(flag) or os.environ.get(variable, "").lower() in ("true", "1")

    asked = (
        "DeepSpeed"
        if wanted(scene.training.deepspeed, "ACCELERATE_USE_DEEPSPEED")
        else "FSDP"
        if wanted(scene.training.fsdp, "ACCELERATE_USE_FSDP")
        else OFF
    )
    found = "DeepSpeed" if scene.trainer.is_deepspeed_enabled else "FSDP" if scene.trainer.is_fsdp_enabled else OFF
    return Line("sharding", asked, found, asked == found, "accelerate has FSDP on GPUs only, and in several processes.")


def gradient_checkpointing(scene: Scene) -> Line:
    """Layers that recompute their activations."""
    layers = [module for module in scene.base.modules() if isinstance(module, GradientCheckpointingLayer)]
    on = sum(bool(layer.gradient_checkpointing) for layer in layers)
    every = (scene.training.gradient_checkpointing_kwargs or {}).get("every_n_layers", 1)
    wanted = math.ceil(len(layers) / every) if scene.training.gradient_checkpointing else 0

    def text(count: int) -> str:
        return f"{count} of {len(layers)} layers" if count else OFF

    return Line("checkpointing", text(wanted), text(on), on == wanted, "Leave --gradient_checkpointing out.")


def liger(scene: Scene) -> Line:
    """Modules that compute with Liger's kernels."""
    found = 0
    for module in scene.base.modules():
        forward = getattr(module.forward, "__func__", module.forward)
        found += forward.__module__.startswith("liger_kernel")
    asked = scene.training.use_liger_kernel
    seen = f"{found} modules" if found else OFF
    return Line(
        "Liger kernels", "on" if asked else OFF, seen, bool(found) == bool(asked), "Leave --use_liger_kernel out."
    )


LINES = (
    attention,
    attention_groups,
    positions,
    weights,
    trained_weights,
    autocast,
    quantization,
    adapter,
    dropout,
    adapted_modules,
    frozen_layers,
    trainable,
    optimizer,
    coverage,
    critic,
    learning_rate,
    schedule,
    effective_batch,
    sharding,
    packing,
    neftune,
    gradient_checkpointing,
    liger,
)
