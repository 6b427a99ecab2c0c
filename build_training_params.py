"""Write docs/training_params.md: the flags of every program, read from the dataclasses that declare them.

    python build_training_params.py            write the page
    python build_training_params.py --check    exit code 1 if the page does not say what the code says

The page is the same on every machine: it shows defaults of classes, never of instances, which look at the hardware.
"""

import argparse
import dataclasses
import typing
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any

import dpo_training
import inference
import merge_peft_adapter
import orpo_training
import pretraining
import reward_modeling
import supervised_finetuning
import validate_jsonl
from medicalgpt.args import (
    GONE,
    RENAMED,
    RENAMED_VALUES,
    UNUSED_PAIR_ARGUMENTS,
    UNUSED_SFT_ARGUMENTS,
    AttentionArguments,
    DataArguments,
    LoraArguments,
    ModelArguments,
    PairArguments,
    RunArguments,
    StageDefaults,
    TemplateArguments,
)
from medicalgpt.errors import UserError, run_main

from trl import SFTConfig

PAGE = Path(__file__).parent / "docs" / "training_params.md"

# The trainer declares more than a hundred flags; these are the ones that are used most.
INHERITED = (
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "optim_args",
    "optim_target_modules",
    "lr_scheduler_type",
    "warmup_steps",
    "logging_steps",
    "logging_first_step",
    "eval_strategy",
    "eval_steps",
    "eval_on_start",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "load_best_model_at_end",
    "resume_from_checkpoint",
    "seed",
    "data_seed",
    "fp16",
    "use_cpu",
    "use_liger_kernel",
    "deepspeed",
    "fsdp",
    "ddp_find_unused_parameters",
    "dataloader_num_workers",
)
# What TRL declares for one loss, and these scripts take as it is.
OF_DPO = (
    "beta",
    "loss_weights",
    "label_smoothing",
    "f_alpha_divergence_coef",
    "ld_alpha",
    "use_weighting",
    "discopop_tau",
    "precompute_ref_log_probs",
    "precompute_ref_batch_size",
    "sync_ref_model",
    "ref_model_mixup_alpha",
    "ref_model_sync_steps",
)
# Where the words of the library do not say what happens in these scripts.
MEANINGS = {
    "eval_on_start": "Evaluate before the first step. Here the default is True wherever --eval_strategy is given.",
    "resume_from_checkpoint": "True: go on from the newest whole checkpoint in --output_dir; or the folder of one.",
    "fsdp": "Alone: spread the weights over the processes by torch's FSDP, on GPUs. Settings: --fsdp_config FILE.",
    "deepspeed": "DeepSpeed's settings, as a JSON file: zero2.json and zero3.json are in this folder.",
    "use_liger_kernel": "Liger's Triton kernels for the layers, on a GPU. Needs `pip install liger-kernel`.",
    "optim": "The optimizer: adamw_torch, adamw_8bit, adafactor, galore_adamw, apollo_adamw, lion_32bit and others.",
    "optim_args": "Settings of that optimizer alone, as key=value with commas.",
    "optim_target_modules": "Modules whose states GaLore and APOLLO keep small. Default there: every linear layer.",
    "packing": "Fill sequences of --model_max_length with several conversations that do not see each other.",
    "beta": "How strongly the model is held at the reference; the higher, the closer it stays.",
    "loss_weights": "A weight for each loss of --loss_type. Unset: 1 each.",
    "label_smoothing": "Share of pairs that may be labelled the wrong way round, from 0 to below 0.5.",
    "f_alpha_divergence_coef": "Alpha of --f_divergence_type alpha_divergence.",
    "ld_alpha": "LD-DPO (https://arxiv.org/abs/2409.06411): weight, 0 to 1, of what the longer answer has more.",
    "use_weighting": "WPO (https://arxiv.org/abs/2406.11827): pairs weigh more the likelier the model finds them.",
    "discopop_tau": "Temperature of --loss_type discopop.",
    "precompute_ref_log_probs": "Score all pairs with the reference before training, and then do without it.",
    "precompute_ref_batch_size": "Pairs that are scored at a time. Default: the batch size of training or evaluation.",
    "sync_ref_model": "TR-DPO (https://arxiv.org/abs/2404.09656): the reference follows the model. Full training only.",
    "ref_model_mixup_alpha": "By what share the reference moves towards the model each time.",
    "ref_model_sync_steps": "Steps from one such move to the next.",
    "center_rewards_coefficient": "Holds the mean of both scores near 0 (https://arxiv.org/abs/2312.09244); 0.01 is "
    "usual.",
}
# Enumerations with more members than this are not listed.
SHOWN_CHOICES = 16


def main() -> None:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the page is not current")
    page = render()
    if not parser.parse_args().check:
        PAGE.write_text(page, encoding="utf-8")
        print(f"{PAGE.name}: written")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page:
        raise UserError(f"docs/{PAGE.name} does not say what the code says. Run: python build_training_params.py")


def render() -> str:
    """The whole page, the same on every machine."""
    parts = [
        "# Flags of the programs",
        "Written by `python build_training_params.py` from the argument classes; edit those, not this page.",
        "Each of these programs takes `--help`, which lists all its flags; `--config run.yaml` with lines of "
        "`flag: value`, over which the command line wins; and `--debug`, which adds the traceback to an error. Hyphens "
        "may stand for underscores, and a switch alone means True. Names are never abbreviated: an unknown one stops "
        "the program, which names the nearest known flag.",
        "## The stages of training",
        "`pretraining.py`, `supervised_finetuning.py`, and, on pairs of preferences, `reward_modeling.py`, "
        "`dpo_training.py` and `orpo_training.py`. What a stage has no use for it refuses; see the last section.",
        "### Model",
        table(ModelArguments),
        "### Data",
        table(DataArguments),
        "### Attention and positions",
        table(AttentionArguments),
        "### Adapters, frozen layers",
        table(LoraArguments),
        "### Run",
        table(RunArguments),
        "### Precision, memory, tracking",
        table(StageDefaults),
        "### Chat template: every stage but pretraining.py",
        table(TemplateArguments),
        "### pretraining.py only",
        table(pretraining.PretrainingArguments),
        "### supervised_finetuning.py only",
        table(supervised_finetuning.FinetuningArguments, also=("packing",)),
        "### reward_modeling.py, dpo_training.py, orpo_training.py",
        table(PairArguments),
        "### reward_modeling.py only",
        table(reward_modeling.RewardArguments, also=("center_rewards_coefficient",)),
        "With `--score_file` it scores and does not train:",
        table(reward_modeling.ScoreArguments),
        "### dpo_training.py only",
        table(dpo_training.PreferenceArguments, also=OF_DPO),
        "### orpo_training.py only",
        table(orpo_training.OrpoArguments),
        "### From the trainer",
        "The ones used most; `--help` lists the others.",
        table(SFTConfig, also=INHERITED, own=False),
        "## merge_peft_adapter.py",
        table(merge_peft_adapter.MergeArguments),
        "## inference.py",
        "Also the flags of *Model* above, except `--qlora`.",
        table(inference.InferenceArguments),
        "## validate_jsonl.py",
        table(validate_jsonl.ValidationArguments),
        "## Spellings of MedicalGPT and of older libraries",
        "Taken as what they mean today. Further spellings of a flag stand below its name in the tables above.",
        _rows(("given", "means"), spellings({field.name for field in dataclasses.fields(SFTConfig)})),
        "## Refused here, and why",
        "A flag that would have no effect stops the program.",
        _rows(("flag", "instead"), refusals({**GONE, **UNUSED_SFT_ARGUMENTS})),
        "In the stages on pairs these as well:",
        _rows(("flag", "instead"), refusals(only_with_pairs())),
    ]
    return "\n\n".join(parts) + "\n"


def table(cls: type, *, own: bool = True, also: Iterable[str] = ()) -> str:
    """A Markdown table of flags.

    Args:
        cls: a dataclass.
        own: show the fields that it declares itself, without those of its parents.
        also: further fields, explained by `MEANINGS` where it knows them and by their help otherwise.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    # Parsers overwrite `Field.type`; the annotations stay.
    types = typing.get_type_hints(cls)
    rows = []
    for name in [*(name for name in fields if own and name in cls.__annotations__), *also]:
        metadata = fields[name].metadata
        older = [f"--{old}" for old, new in RENAMED.items() if new == name]
        aliases = [alias for alias in metadata.get("aliases", []) if "-" not in alias.lstrip("-")]
        names = "<br>".join(f"`{spelling}`" for spelling in (f"--{name}", *aliases, *older))
        meaning = (name in also and MEANINGS.get(name)) or metadata["help"].replace("%%", "%")
        rows.append((names, type_name(types[name], metadata.get("choices")), default(fields[name]), meaning))
    return _rows(("flag", "value", "default", "meaning"), rows)


def type_name(annotation: Any, choices: Iterable[str] | None = None) -> str:
    """What may be given: the choices if they are few, the type otherwise."""
    is_union = typing.get_origin(annotation) in (typing.Union, UnionType)
    members = [member for member in (typing.get_args(annotation) if is_union else [annotation]) if member != NoneType]
    if typing.get_origin(members[0]) is list:
        return f"{type_name(*typing.get_args(members[0]), choices)}; several with spaces"
    enums = [member for member in members if isinstance(member, type) and issubclass(member, Enum)]
    choices = list(choices or [value.value for enum in enums for value in enum])
    if 0 < len(choices) <= SHOWN_CHOICES:
        return ", ".join(f"`{choice}`" for choice in choices)
    names = {bool: "True, False", int: "whole number", float: "number", str: "text", dict: "JSON"}
    return " or ".join(names[member] for member in members if member in names)


def default(field: dataclasses.Field) -> str:
    """The default as one would type it."""
    if field.default_factory is not dataclasses.MISSING:
        return f"`{' '.join(map(str, field.default_factory()))}`"
    if field.default is dataclasses.MISSING:
        return "required"
    if field.default is None:
        return "unset"
    return f"`{field.default:g}`" if isinstance(field.default, float) else f"`{field.default}`"


def spellings(known: set[str]) -> list[tuple[str, str]]:
    """Old spellings and today's, as far as today's is a flag of these programs."""
    rows = [(f"`--{old}`", f"`--{new}`") for old, new in RENAMED.items() if new in known]
    for old, (new, values) in RENAMED_VALUES.items():
        rows += [(f"`--{old} {given.capitalize()}`", f"`--{new} {value}`") for given, value in values.items()]
    return rows


def refusals(reasons: Mapping[str, str]) -> list[tuple[str, str]]:
    """Flags that share a reason share a row."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(f"`--{name}`")
    return [("<br>".join(flags), reason) for reason, flags in names.items()]


def only_with_pairs() -> dict[str, str]:
    """What the stages on pairs refuse otherwise than the other stages, or alone."""
    return {
        name: reason
        for name, reason in UNUSED_PAIR_ARGUMENTS.items()
        if UNUSED_SFT_ARGUMENTS.get(name) != reason and name != "max_length"
    }


def _rows(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in line) + " |" for line in lines
    )


if __name__ == "__main__":
    run_main(main)
