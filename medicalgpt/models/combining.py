"""Several adapters on one base: which of them fit together, one made of all with weights, or each under its name."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medicalgpt.adapter_args import CombinationArguments
from medicalgpt.errors import UserError
from medicalgpt.models.adapters import attach_adapter, config_beside_towers, embedding_rows
from medicalgpt.models.hub import (
    Adapter,
    Checkpoint,
    CheckpointError,
    check_base,
    fetch,
    load_pretrained,
)
from medicalgpt.models.towers import towers_of

import torch
from loguru import logger
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from safetensors import SafetensorError
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

# These work on the factors A and B, so that all adapters need one rank; in their place, those that do not.
EQUAL_RANKS = {
    "linear": "cat",
    "ties": "ties_svd",
    "dare_linear": "dare_linear_svd",
    "dare_ties": "dare_ties_svd",
    "magnitude_prune": "magnitude_prune_svd",
}
PRUNING = ("ties", "dare", "magnitude_prune")
SIGNED = ("ties", "dare_ties")
DEFAULT_SEED = 42
COMBINED = "combined"


@dataclass(frozen=True)
class Combination:
    """How adapters become one.

    Linear and concatenated sums, SVD: peft's `add_weighted_adapter`. TIES: https://arxiv.org/abs/2306.01708. DARE:
    https://arxiv.org/abs/2311.03099.

    Attributes:
        weights: of each adapter; negative ones subtract.
        kind: of peft's combination types.
        density: share of the values that are kept; for the kinds that drop some.
        majority_sign_method: how the kinds with TIES choose the sign of a value.
        svd_rank: rank of the result, for svd and *_svd; None: the largest of the adapters.
        seed: of the values that DARE drops.
    """

    weights: tuple[float, ...]
    kind: str = "cat"
    density: float | None = None
    majority_sign_method: str = "total"
    svd_rank: int | None = None
    seed: int = DEFAULT_SEED

    @classmethod
    def from_arguments(cls, arguments: CombinationArguments, names: Sequence[str]) -> "Combination | None":
        """What the flags say of the adapters with these names; None if they are not to be combined.

        Raises:
            UserError: flags without effect, or values that make no sense; all of them are named.
        """
        flags = {name: getattr(arguments, name) for name in CombinationArguments.__dataclass_fields__}
        given = [name for name, value in flags.items() if value is not None]
        if not given:
            return None
        if not names:
            raise UserError(f"--{', --'.join(given)}: they combine the adapters of --lora_model; name these there.")
        kind = arguments.combination_type or "cat"
        problems = [*_weight_problems(arguments.lora_weights, names), *_flag_problems(arguments, kind, len(names))]
        if problems:
            raise UserError("\n  ".join(problems))
        weights = tuple(float(part) for part in arguments.lora_weights.split(","))
        return cls(
            weights,
            kind,
            arguments.density,
            arguments.majority_sign_method or "total",
            arguments.svd_rank,
            DEFAULT_SEED if arguments.combination_seed is None else arguments.combination_seed,
        )

    def described(self, names: Sequence[str]) -> str:
        """Weights, names and kind in a line."""
        parts = " + ".join(f"{weight:g} x {name}" for weight, name in zip(self.weights, names, strict=True))
        details = [f"density {self.density:g}"] if self.density is not None else []
        details += [f"seed {self.seed}"] if self.kind.startswith("dare") else []
        return f"{parts} ({', '.join([self.kind, *details])})"


def _weight_problems(text: str | None, names: Sequence[str]) -> list[str]:
    if text is None:
        example = ",".join([f"{1 / len(names):.2g}"] * len(names))
        return [f"adapters are combined with weights, one for each: add --lora_weights {example}, for example."]
    parts = [part.strip() for part in text.split(",")]
    try:
        weights = [float(part) for part in parts]
    except ValueError:
        weights = [math.nan]
    if not all(map(math.isfinite, weights)):
        return [f"--lora_weights {text} must be numbers, separated by commas, as in 0.7,0.3."]
    if len(weights) != len(names):
        return [
            f"--lora_weights {text}: {len(weights)} weight(s) for {len(names)} adapter(s) in --lora_model "
            f"({', '.join(names)}). Give one for each, in that order."
        ]
    if not any(weights):
        return [f"--lora_weights {text} is the model without adapters. Leave --lora_model out for that."]
    return []


def _flag_problems(arguments: CombinationArguments, kind: str, count: int) -> list[str]:
    problems = []
    if count == 1 and kind != "cat":
        problems.append(f"--combination_type {kind} is for several adapters; omit it, and the weight scales the one.")
    prunes = kind.startswith(PRUNING)
    if prunes and arguments.density is None:
        problems.append(f"--combination_type {kind} needs --density, the share of values to keep: --density 0.5")
    for name, has_effect, kinds in (
        ("density", prunes, "ties, dare_linear, dare_ties, magnitude_prune, or one of these with _svd"),
        ("majority_sign_method", kind.startswith(SIGNED), "ties, ties_svd, dare_ties or dare_ties_svd"),
        ("svd_rank", kind.endswith("svd"), "svd or one of those that end with _svd"),
        ("combination_seed", kind.startswith("dare"), "dare_linear, dare_ties, or one of these with _svd"),
    ):
        if getattr(arguments, name) is not None and not has_effect:
            problems.append(f"--{name} has no effect with --combination_type {kind}; omit it, or use {kinds}.")
    if arguments.density is not None and not 0 < arguments.density <= 1:
        problems.append(f"--density {arguments.density:g} must be above 0 and at most 1.")
    if arguments.svd_rank is not None and arguments.svd_rank < 1:
        problems.append(f"--svd_rank {arguments.svd_rank} must be at least 1.")
    if arguments.combination_seed is not None and not 0 <= arguments.combination_seed < 2**63:
        problems.append(f"--combination_seed {arguments.combination_seed} must be at least 0 and below 2**63.")
    return problems


def named_adapters(text: str | None) -> dict[str, str]:
    """Names and places (folder or hub name) in a value of `--lora_model`: `PATH` or `NAME=PATH`, with commas.

    The name of an adapter is that of its folder unless it is given.

    Raises:
        UserError: an empty part, or two adapters of one name.
    """
    if not text:
        return {}
    # A folder may have a comma or an equals sign in its name.
    parts = [text] if Path(text).is_dir() else [part.strip() for part in text.split(",")]
    found: dict[str, str] = {}
    for part in parts:
        name, equals, path = part.partition("=")
        if not equals or Path(part).is_dir():
            path = part
            name = Path(part).resolve().name if Path(part).is_dir() else Path(part).name
        if not name or not path:
            raise UserError(f"--lora_model {text}: {part!r} is not an adapter. Write PATH,PATH or NAME=PATH,NAME=PATH.")
        if name in found:
            raise UserError(
                f"--lora_model: {found[name]} and {path} are both called {name}. Give them names: "
                f"--lora_model first={found[name]},second={path}"
            )
        found[name] = path
    return found


def read_adapters(
    named: Mapping[str, str], *, hub: str = "huggingface", cache_dir: str | None = None
) -> dict[str, Adapter]:
    """The adapters by their names, without their weights.

    Raises:
        CheckpointError: some are missing or damaged; all of them are named.
    """
    found: dict[str, Adapter] = {}
    problems = []
    for name, path in named.items():
        try:
            found[name] = Adapter.read(fetch(path, hub, cache_dir=cache_dir), cache_dir)
        except CheckpointError as error:
            problems.append(f"{error} Check --lora_model.")
    if problems:
        raise CheckpointError("\n  ".join(problems))
    return found


def check_bases(adapters: Mapping[str, Adapter], checkpoint: Checkpoint, *, base_given: bool) -> None:
    """Refuse adapters of different bases.

    Args:
        checkpoint: the base, with the first of the adapters.
        base_given: the user has named the base, which holds for adapters that do not record its weights.

    Raises:
        CheckpointError: all that do not fit are named.
    """
    first = next(iter(adapters.values()))
    found = checkpoint.fingerprint
    problems = []
    for name, adapter in adapters.items():
        recorded = adapter.recorded_base.get("fingerprint")
        if recorded and found and recorded != found:
            problems.append(
                f"{name} ({adapter.path}) was trained on {adapter.recorded_base.get('name')} (weights "
                f"{recorded[:12]}), and the base here is {checkpoint.base} (weights {found[:12]})"
            )
        elif not (recorded and found) and not base_given and adapter is not first:
            of_first, of_this = (each.config.get("base_model_name_or_path") for each in (first, adapter))
            if of_this != of_first:
                problems.append(
                    f"{name} ({adapter.path}) names the base {of_this} and {first.path} names {of_first}; if these are "
                    "the same, pass it with --model_name_or_path"
                )
        if adapter.positions != first.positions:
            problems.append(
                f"{name} ({adapter.path}) was trained with other positions than {first.path} (--rope_scaling)"
            )
    if problems:
        listed = ",".join(adapter.path for adapter in adapters.values())
        raise CheckpointError(
            "these adapters cannot share a base:\n  - "
            + "\n  - ".join(problems)
            + "\n  One that was trained on the result of merging another: python merge_peft_adapter.py --lora_model "
            f"{listed} --combination_type chain --output_dir FOLDER, in the order of training. Otherwise merge each "
            "into its own base."
        )


def check_combinable(adapters: Mapping[str, Adapter], combination: Combination) -> None:
    """Refuse adapters of which peft would leave something out, or whose factors do not match.

    Raises:
        UserError: all reasons are named.
    """
    problems = [
        f"{name} ({adapter.path}) {reason}" for name, adapter in adapters.items() for reason in _obstacles(adapter)
    ]
    if problems:
        listed = ",".join(adapter.path for adapter in adapters.values())
        raise UserError(
            "these adapters cannot be combined with weights:\n  - "
            + "\n  - ".join(problems)
            + "\n  Use them one at a time: each merged alone, or switched by name, with --lora_model "
            f"{listed} and no --lora_weights, in inference.py --interactive or openai_api.py."
        )
    ranks = {name: _largest_rank(adapter) for name, adapter in adapters.items()}
    if combination.kind in EQUAL_RANKS and len(set(ranks.values())) > 1:
        raise UserError(_rank_message(combination.kind, ", ".join(f"{name} has {r}" for name, r in ranks.items())))


def _rank_message(kind: str, ranks: str) -> str:
    instead = EQUAL_RANKS[kind]
    exact = "" if instead == "cat" else ", or cat, the exact weighted sum"
    return (
        f"--combination_type {kind} works on the factors A and B, so it needs adapters of one rank: {ranks}. Use "
        f"--combination_type {instead}, which takes any ranks{exact}."
    )


def _obstacles(adapter: Adapter) -> list[str]:
    config = adapter.config
    initialized = config.get("init_lora_weights")
    return [
        reason
        for reason, holds in (
            (f"is of the type {config.get('peft_type')}, not LORA", config.get("peft_type") != "LORA"),
            ("is a DoRA adapter, whose magnitudes do not add up", config.get("use_dora")),
            (
                f"trains {', '.join(config.get('modules_to_save') or ())} in full, which has no sum",
                config.get("modules_to_save"),
            ),
            ("trains rows of new tokens, which have no sum", config.get("trainable_token_indices")),
            ("trains biases, which peft leaves out", config.get("bias", "none") != "none" or config.get("lora_bias")),
            ("adapts fused experts, which peft cannot combine", config.get("target_parameters")),
            (
                f"changes the weights of its base at the start ({initialized})",
                str(initialized).startswith(("pissa", "olora", "corda", "loftq")),
            ),
        )
        if holds
    ]


def _largest_rank(adapter: Adapter) -> int:
    return max(adapter.config.get("r") or 0, *(adapter.config.get("rank_pattern") or {}).values(), 0)


def check_same_template(
    checkpoint: Checkpoint, adapters: Mapping[str, Adapter], tokenizer_flag: str = "--tokenizer_name_or_path"
) -> None:
    """Refuse to combine adapters that were trained with different tokens, chat templates or stop tokens.

    Args:
        tokenizer_flag: the flag that chooses one of them, for the message.

    Raises:
        UserError: they differ from the first one.
    """
    first, *others = adapters
    facts = {name: _voice(checkpoint, adapter) for name, adapter in adapters.items()}
    different = {name: [what for what, value in facts[name].items() if value != facts[first][what]] for name in others}
    if problems := [f"{name}: another {', '.join(whats)}" for name, whats in different.items() if whats]:
        raise UserError(
            f"the adapters were trained with different prompts than {first}: {'; '.join(problems)}. Combined, there is "
            f"one for all: choose it with {tokenizer_flag} {adapters[first].path}, or another of them."
        )


def _voice(checkpoint: Checkpoint, adapter: Adapter) -> dict[str, Any]:
    tokenizer = load_pretrained(
        AutoTokenizer,
        adapter.path if adapter.has_tokenizer else checkpoint.source,
        revision=None if adapter.has_tokenizer else checkpoint.revision,
        cache_dir=checkpoint.cache_dir,
    )
    generation = generation_config_in(adapter.path)
    ends = generation.eos_token_id if generation else None
    return {
        "vocabulary": tokenizer.get_vocab(),
        "chat template": tokenizer.chat_template,
        "set of stop tokens": sorted(ends) if isinstance(ends, list) else ends,
    }


def generation_config_in(folder: str) -> GenerationConfig | None:
    """The generation settings, with the stop tokens, that are saved in a folder."""
    return GenerationConfig.from_pretrained(folder) if Path(folder, "generation_config.json").is_file() else None


def peft_names(adapters: Mapping[str, Adapter]) -> dict[str, str]:
    """The names that adapters have in peft, which allows no dots in them, in the order in which they are to be loaded.

    Those with rows of tokens come last: peft cannot load others after them.
    """
    ordered = sorted(adapters, key=lambda name: bool(adapters[name].config.get("trainable_token_indices")))
    return {name: f"adapter_{number}" if number else "default" for number, name in enumerate(ordered)}


def attach_adapters(model: PreTrainedModel, adapters: Mapping[str, Adapter]) -> PeftModel:
    """Load several adapters onto their base, under `peft_names`.

    Raises:
        CheckpointError: one does not fit the base, or they have different numbers of tokens.
    """
    own = model.get_input_embeddings().num_embeddings
    rows = {name: embedding_rows(adapter, own) for name, adapter in adapters.items()}
    if len(set(rows.values())) > 1:
        listed = ", ".join(f"{name} has {count}" for name, count in rows.items())
        raise CheckpointError(
            f"the adapters need embeddings with different numbers of tokens ({listed}), so that they cannot share a "
            "model. Merge each alone, and serve the results separately."
        )
    (first, _), *others = peft_names(adapters).items()
    attached = attach_adapter(model, adapters[first])
    for name, label in others:
        attach_further(attached, adapters[name], label)
    return attached


def attach_further(attached: PeftModel, adapter: Adapter, label: str) -> None:
    """Load one more adapter under a name of peft's.

    Raises:
        CheckpointError: it does not fit the base; the model is as before.
    """
    model = attached.get_base_model()
    base = model.config.name_or_path
    check_base(adapter, base)
    try:
        if towers_of(model):
            attached.add_adapter(label, config_beside_towers(model, adapter))
        attached.load_adapter(adapter.path, label)
    except (RuntimeError, ValueError, OSError, TypeError, LookupError, SafetensorError) as error:
        if label in attached.peft_config:
            attached.delete_adapter(label)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"the adapter {adapter.path} does not fit {base}: {reason}") from error


def combine(model: PreTrainedModel, adapters: Mapping[str, Adapter], combination: Combination) -> PeftModel:
    """Put one adapter on the model that is made of several.

    Raises:
        CheckpointError: see `attach_adapters`.
        UserError: their ranks differ in a module, or peft refuses them.
    """
    attached = attach_adapters(model, adapters)
    names = peft_names(adapters)
    labels = [names[name] for name in adapters]
    layers = {name: layer for name, layer in attached.get_base_model().named_modules() if isinstance(layer, LoraLayer)}
    if combination.kind in EQUAL_RANKS:
        for name, layer in layers.items():
            if len(ranks := {layer.r[label] for label in labels if label in layer.r}) > 1:
                raise UserError(_rank_message(combination.kind, f"in {name} there are {sorted(ranks)}"))
    for label in labels:
        config = attached.peft_config[label]
        # The result takes the places of the first adapter and the kinds of modules of all: layers that the first one
        # excludes would be lost. By their full names, each module is adapted if one of the adapters does it.
        config.target_modules = {name for name, layer in layers.items() if label in layer.r}
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
        # The factors contain their scale already; with rsLoRA peft would scale them again.
        config.use_rslora = False
    pruning = {} if combination.density is None else {"density": combination.density}
    with torch.random.fork_rng():
        torch.manual_seed(combination.seed)
        try:
            attached.add_weighted_adapter(
                labels,
                list(combination.weights),
                COMBINED,
                combination_type=combination.kind,
                svd_rank=combination.svd_rank,
                # The columns beyond the rank are not used.
                svd_full_matrices=False,
                majority_sign_method=combination.majority_sign_method,
                **pruning,
            )
        except ValueError as error:
            raise UserError(
                f"peft cannot combine these adapters with --combination_type {combination.kind}: {error}. Try "
                "--combination_type cat, the exact weighted sum."
            ) from error
    attached.set_adapter(COMBINED, inference_mode=True)
    for label in labels:
        attached.delete_adapter(label)
    logger.info(f"one adapter of {combination.described(list(adapters))}")
    return attached
