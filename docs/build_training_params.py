"""Write docs/training_params.md: the flags of every program, read from the dataclasses that declare them.

    python -m docs.build_training_params            write the page, and the tables of docs/resuming.md
    python -m docs.build_training_params --check    exit code 1 if one of them is not current

The page is the same on every machine: it shows the defaults of classes, not of instances, which depend on the hardware.
"""

import argparse
import dataclasses
import typing
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any

import chatpdf
import convert_dataset
import dpo_training
import fastapi_server_demo
import gradio_demo
import grpo_training
import inference
import merge_peft_adapter
import openai_api
import orpo_training
import ppo_training
import prepare_data
import pretraining
import reward_modeling
import supervised_finetuning
import validate_jsonl
from docs import resume_tables
from medicalgpt.adapter_args import CombinationArguments
from medicalgpt.args import (
    AttentionArguments,
    ChatArguments,
    DataArguments,
    LoraArguments,
    ModelArguments,
    PairArguments,
    RunArguments,
    StageDefaults,
    TemplateArguments,
    help_texts,
)
from medicalgpt.errors import UserError, run_main
from medicalgpt.refusals import (
    ACCEPTED,
    ANY,
    CHAT,
    EVERY,
    IMPLIES,
    OLD_VALUES,
    REFUSED,
    RENAMED,
    RENAMED_VALUES,
    SUMS,
    TRAINING,
)
from medicalgpt.serving.arguments import ApiArguments, PageArguments, ServeArguments

PAGE = Path(__file__).parent / "training_params.md"

# The trainer declares more than a hundred flags; these are the most common ones.
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
# Enumerations with more members than this are not listed.
SHOWN_CHOICES = 16


def main() -> None:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the page is not current")
    pages = {PAGE: render()}
    for language, path in resume_tables.PAGES.items():
        pages[path] = resume_tables.with_tables(path.read_text(encoding="utf-8"), language)
    check = parser.parse_args().check
    for path, text in pages.items():
        if not check:
            path.write_text(text, encoding="utf-8")
            print(f"{path.name}: written")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            raise UserError(f"docs/{path.name} is not current. Run: python -m docs.build_training_params")


def render() -> str:
    """The complete page, the same on every machine."""
    parts = [
        "# Flags of the programs",
        "Written by `python -m docs.build_training_params` from the argument classes; edit those, not this page.",
        "Each of these programs takes `--help`, which lists all its flags; `--config run.yaml` with lines of "
        "`flag: value`, over which the command line takes precedence; and `--debug`, which adds the traceback to an "
        "error. Hyphens may replace underscores, and a switch without a value means True. Names cannot be abbreviated: "
        "an unknown one stops the program, which suggests the nearest known flag.",
        "## Training stages",
        "`pretraining.py`, `supervised_finetuning.py`, and, on preference pairs, `reward_modeling.py`, "
        "`dpo_training.py` and `orpo_training.py`; on prompts, `ppo_training.py` and `grpo_training.py`. Flags without "
        "effect in a stage are refused; see the last section.",
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
        table(supervised_finetuning.FinetuningArguments),
        "### reward_modeling.py, dpo_training.py, orpo_training.py",
        table(PairArguments),
        "### reward_modeling.py only",
        table(reward_modeling.RewardArguments),
        "With `--score_file` it scores instead of training:",
        table(reward_modeling.ScoreArguments),
        "### dpo_training.py only",
        table(dpo_training.PreferenceArguments),
        "### orpo_training.py only",
        table(orpo_training.OrpoArguments),
        "### ppo_training.py only",
        table(ppo_training.PolicyArguments),
        table(ppo_training.PpoArguments),
        "### grpo_training.py only",
        table(grpo_training.GrpoArguments),
        "### From the trainer",
        "The most common ones; `--help` lists the others.",
        table(pretraining.PretrainingArguments, only=INHERITED),
        "## prepare_data.py",
        table(prepare_data.PreparationArguments),
        "## merge_peft_adapter.py",
        table(merge_peft_adapter.MergeArguments),
        "Of several adapters:",
        table(merge_peft_adapter.CombineArguments, only=CombinationArguments.__dataclass_fields__),
        "## Front ends",
        "`inference.py` and the servers below take the flags of *Model* above, except `--qlora`, and these:",
        table(ChatArguments),
        "Of several adapters:",
        table(CombinationArguments),
        "Servers and pages also take these:",
        table(ServeArguments),
        "### inference.py only",
        table(inference.InferenceArguments),
        "### openai_api.py, fastapi_server_demo.py",
        table(ApiArguments),
        "### openai_api.py only",
        table(openai_api.OpenAIArguments),
        "### fastapi_server_demo.py only",
        table(fastapi_server_demo.ServerArguments),
        "### gradio_demo.py, chatpdf.py",
        table(PageArguments),
        "### gradio_demo.py only",
        table(gradio_demo.DemoArguments),
        "### chatpdf.py only",
        table(chatpdf.FileArguments),
        *_data_tools(),
        *_other_flags(),
    ]
    return "\n\n".join(parts) + "\n"


def _other_flags() -> list[str]:
    return [
        "## Spellings of MedicalGPT and of older libraries",
        "Accepted with their current meaning. Other spellings of a flag are below its name in the tables above.",
        _rows(("given", "means"), spellings()),
        "## Accepted flags that are not needed",
        "They ask for what happens anyway, or for something that the programs find out themselves. The program says so "
        "and continues. With another value they are refused.",
        _rows(("flag", "program", "why"), accepted()),
        "## Refused flags, and why",
        "A flag that would have no effect stops the program with an error.",
        _rows(("flag", "refused in", "instead"), refusals()),
    ]


def _data_tools() -> list[str]:
    return [
        "## validate_jsonl.py",
        table(validate_jsonl.ValidationArguments),
        "## convert_dataset.py",
        table(convert_dataset.ConversionArguments),
    ]


def table(cls: type, *, only: Iterable[str] = ()) -> str:
    """A Markdown table of the fields that a dataclass declares or explains itself, or of those named in `only`."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    helps = help_texts(cls)
    # The parser overwrites `Field.type`, but not the annotations.
    types = typing.get_type_hints(cls)
    rows = []
    own = [*(name for name in fields if name in cls.__annotations__), *vars(cls).get("HELP", ())]
    for name in only or (name for name in own if name in fields):
        metadata = fields[name].metadata
        older = [f"--{old}" for old, new in RENAMED.items() if new == name]
        aliases = [alias for alias in metadata.get("aliases", []) if "-" not in alias.lstrip("-")]
        names = "<br>".join(f"`{spelling}`" for spelling in (f"--{name}", *aliases, *older))
        # Markdown would treat <think> as an HTML tag.
        meaning = helps[name].replace("%%", "%").replace("<", "\\<")
        rows.append((names, type_name(types[name], metadata.get("choices")), default(fields[name]), meaning))
    return _rows(("flag", "value", "default", "meaning"), rows)


def type_name(annotation: Any, choices: Iterable[str] | None = None) -> str:
    """The values of a flag: its choices if they are few, its type otherwise."""
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
    """The default as a user would type it."""
    if field.default_factory is not dataclasses.MISSING:
        return f"`{' '.join(map(str, field.default_factory()))}`"
    if field.default is dataclasses.MISSING:
        return "required"
    if field.default is None:
        return "unset"
    return f"`{field.default:g}`" if isinstance(field.default, float) else f"`{field.default}`"


def spellings() -> list[tuple[str, str]]:
    """Old and current spellings."""
    rows = []
    for old, new in RENAMED.items():
        rows.append((f"`--{old}`", " or ".join(f"`--{name}`" for name in ([new] if isinstance(new, str) else new))))
    for old, values in {**RENAMED_VALUES, **IMPLIES}.items():
        rows += [(f"`--{old} {given.capitalize()}`", f"`--{new} {value}`") for given, (new, value) in values.items()]
    for flag, values in OLD_VALUES.items():
        rows += [(f"`--{flag} {old}`", f"`--{flag} {new}`" if new else "unset") for old, new in values.items()]
    for total, groups in SUMS.items():
        rows += [(" + ".join(f"`--{part}`" for part in parts), f"`--{total}`") for parts in groups.values()]
    return rows


def accepted() -> list[tuple[str, str, str]]:
    """Flags with the values that are accepted, programs and reason; flags with the same reason share a row."""
    flags: dict[tuple[tuple[str, ...], str], list[str]] = {}
    for flag, groups in ACCEPTED.items():
        for programs, (values, reason) in groups.items():
            shown = [f"`--{flag}`"] if values is ANY else [f"`--{flag} {value.capitalize()}`" for value in values]
            flags.setdefault((programs, reason), []).extend(shown)
    return _by_program(flags)


def refusals() -> list[tuple[str, str, str]]:
    """Flags, programs and reason; flags that the same programs refuse for the same reason share a row."""
    flags: dict[tuple[tuple[str, ...], str], list[str]] = {}
    for flag, reasons in REFUSED.items():
        for programs, reason in reasons.items():
            flags.setdefault((programs, reason), []).append(f"`--{flag}`")
    return _by_program(flags)


def _by_program(flags: dict[tuple[tuple[str, ...], str], list[str]]) -> list[tuple[str, str, str]]:
    names = {EVERY: "every program", TRAINING: "every stage", CHAT: "every front end"}
    return [
        ("<br>".join(names_of_flags), names.get(programs) or ", ".join(programs), reason)
        for (programs, reason), names_of_flags in flags.items()
    ]


def _rows(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in line) + " |" for line in lines
    )


if __name__ == "__main__":
    run_main(main)
