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

import inference
import merge_peft_adapter
import pretraining
import supervised_finetuning
import validate_jsonl
from medicalgpt.args import (
    GONE,
    RENAMED,
    RENAMED_VALUES,
    UNUSED_SFT_ARGUMENTS,
    DataArguments,
    LoraArguments,
    ModelArguments,
    RunArguments,
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
    "lr_scheduler_type",
    "warmup_steps",
    "neftune_noise_alpha",
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
# Where the words of the library do not say what happens in these scripts.
MEANINGS = {
    "eval_on_start": "Evaluate before the first step. Here the default is True wherever --eval_strategy is given.",
    "resume_from_checkpoint": "True: go on from the newest whole checkpoint in --output_dir; or the folder of one.",
    "fsdp": "Alone: spread the weights over the processes by torch's FSDP. Settings: --fsdp_config FILE.",
    "deepspeed": "DeepSpeed's settings, as a JSON file: zero2.json and zero3.json are in this folder.",
    "use_liger_kernel": "Liger's Triton kernels for the layers, on a GPU. Needs `pip install liger-kernel`.",
    "packing": "Fill sequences of --model_max_length with several conversations that do not see each other.",
}
# Enumerations with more members than this are not listed.
SHOWN_CHOICES = 12


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
    finetuning = {field.name: field for field in dataclasses.fields(supervised_finetuning.FinetuningArguments)}
    trainer = {field.name: field for field in dataclasses.fields(SFTConfig)}
    parts = [
        "# Flags of the programs",
        "Written by `python build_training_params.py` from the argument classes; edit those, not this page.",
        "Each of these programs takes `--help`, which lists all its flags; `--config run.yaml` with lines of "
        "`flag: value`, over which the command line wins; and `--debug`, which adds the traceback to an error. Hyphens "
        "may stand for underscores, and a switch alone means True. Names are never abbreviated: an unknown one stops "
        "the program, which names the nearest known flag.",
        "## pretraining.py and supervised_finetuning.py",
        "### Model",
        table(own_fields(ModelArguments)),
        "### Data",
        table(own_fields(DataArguments)),
        "### Adapter",
        table(own_fields(LoraArguments)),
        "### Run",
        table(own_fields(RunArguments)),
        "### pretraining.py only",
        table(own_fields(pretraining.PretrainingArguments)),
        "### supervised_finetuning.py only",
        table([*own_fields(supervised_finetuning.FinetuningArguments), finetuning["packing"]], MEANINGS),
        "### From the trainer",
        "The ones used most; `--help` lists the others.",
        table([trainer[name] for name in INHERITED], MEANINGS),
        "## merge_peft_adapter.py",
        table(own_fields(merge_peft_adapter.MergeArguments)),
        "## inference.py",
        "Also the flags of *Model* above, except `--qlora`.",
        table(own_fields(inference.InferenceArguments)),
        "## validate_jsonl.py",
        table(own_fields(validate_jsonl.ValidationArguments)),
        "## Spellings of MedicalGPT and of older libraries",
        "Taken as what they mean today. Further spellings of a flag stand below its name in the tables above.",
        _rows(("given", "means"), spellings(set(trainer))),
        "## Refused here, and why",
        "A flag that would have no effect stops the program.",
        _rows(("flag", "instead"), refusals({**GONE, **UNUSED_SFT_ARGUMENTS})),
    ]
    return "\n\n".join(parts) + "\n"


def own_fields(cls: type) -> list[dataclasses.Field]:
    """The fields that a dataclass declares itself, without those of its parents."""
    return [field for field in dataclasses.fields(cls) if field.name in cls.__annotations__]


def table(fields: Iterable[dataclasses.Field], meanings: Mapping[str, str] | None = None) -> str:
    """A Markdown table of flags, explained by `meanings` where it knows them and by the field's help otherwise."""
    rows = []
    for field in fields:
        older = [f"--{old}" for old, new in RENAMED.items() if new == field.name]
        aliases = [alias for alias in field.metadata.get("aliases", []) if "-" not in alias.lstrip("-")]
        names = "<br>".join(f"`{name}`" for name in (f"--{field.name}", *aliases, *older))
        meaning = (meanings or {}).get(field.name) or field.metadata["help"].replace("%%", "%")
        rows.append((names, type_name(field), default(field), meaning))
    return _rows(("flag", "value", "default", "meaning"), rows)


def type_name(field: dataclasses.Field) -> str:
    """What may be given: the choices if they are few, the type otherwise."""
    is_union = typing.get_origin(field.type) in (typing.Union, UnionType)
    members = [member for member in (typing.get_args(field.type) if is_union else [field.type]) if member != NoneType]
    enums = [member for member in members if isinstance(member, type) and issubclass(member, Enum)]
    choices = field.metadata.get("choices") or [value.value for enum in enums for value in enum]
    if 0 < len(choices) <= SHOWN_CHOICES:
        return ", ".join(f"`{choice}`" for choice in choices)
    if enums:
        return "text"
    names = {bool: "True, False", int: "whole number", float: "number", str: "text", dict: "JSON"}
    return " or ".join(names[member] for member in members if member in names)


def default(field: dataclasses.Field) -> str:
    """The default as one would type it."""
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


def _rows(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in line) + " |" for line in lines
    )


if __name__ == "__main__":
    run_main(main)
