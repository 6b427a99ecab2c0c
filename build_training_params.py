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

import chatpdf
import dpo_training
import fastapi_server_demo
import gradio_demo
import grpo_training
import inference
import merge_peft_adapter
import openai_api
import orpo_training
import ppo_training
import pretraining
import reward_modeling
import supervised_finetuning
import validate_jsonl
from medicalgpt.args import (
    ApiArguments,
    AttentionArguments,
    ChatArguments,
    DataArguments,
    LoraArguments,
    ModelArguments,
    PageArguments,
    PairArguments,
    RunArguments,
    ServeArguments,
    StageDefaults,
    TemplateArguments,
)
from medicalgpt.errors import UserError, run_main
from medicalgpt.refusals import (
    GONE,
    RENAMED,
    RENAMED_VALUES,
    UNUSED_GRPO_ARGUMENTS,
    UNUSED_PAIR_ARGUMENTS,
    UNUSED_PPO_ARGUMENTS,
    UNUSED_SFT_ARGUMENTS,
)

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
OF_GRPO = (
    "num_generations",
    "num_iterations",
    "steps_per_generation",
    "generation_batch_size",
    "shuffle_dataset",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "cache_implementation",
    "beta",
    "use_bias_correction_kl",
    "epsilon",
    "epsilon_high",
    "delta",
    "mask_truncated_completions",
    "off_policy_mask_threshold",
    "top_entropy_quantile",
    "entropy_coef",
    "use_adaptive_entropy",
    "entropy_target",
    "entropy_coef_min",
    "entropy_coef_max",
    "entropy_coef_delta",
    "sapo_temperature_pos",
    "sapo_temperature_neg",
    "vespo_k_pos",
    "vespo_k_neg",
    "vespo_lambda_pos",
    "vespo_lambda_neg",
    "log_completions",
    "num_completions_to_print",
    "log_unique_prompts",
    "ds3_gather_for_generation",
    "use_vllm",
    "vllm_gpu_memory_utilization",
    "vllm_enable_sleep_mode",
    "vllm_max_model_length",
    "vllm_tensor_parallel_size",
    "vllm_model_impl",
    "vllm_structured_outputs_regex",
    "vllm_server_base_url",
    "vllm_server_host",
    "vllm_server_port",
    "vllm_server_timeout",
    "vllm_group_port",
    "vllm_importance_sampling_correction",
    "vllm_importance_sampling_mode",
    "vllm_importance_sampling_clip_max",
    "vllm_importance_sampling_clip_min",
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
    "num_generations": "Answers to each prompt, which are compared with each other; at least 2.",
    "num_iterations": "Times that each answer is learned from.",
    "steps_per_generation": "Batches whose answers are sampled at once. Unset: --gradient_accumulation_steps, a step.",
    "generation_batch_size": "The same in answers of all processes; say one of the two.",
    "shuffle_dataset": "A new order of prompts in each epoch; False keeps theirs.",
    "temperature": "Of the answers, and of all log-probabilities.",
    "top_p": "Sample from the likeliest tokens that hold this share of the probability.",
    "top_k": "Sample from so many of the likeliest tokens; 0: from all.",
    "min_p": "Sample from tokens with at least this share of the probability of the likeliest one.",
    "repetition_penalty": "Above 1: tokens of the prompt and of the answer so far become less likely.",
    "cache_implementation": "The kind of cache with which transformers writes answers.",
    "use_bias_correction_kl": "With --beta: weigh the KL by the ratio of the policies "
    "(https://arxiv.org/abs/2512.02556).",
    "epsilon": "Clip range of the ratio below 1.",
    "epsilon_high": "Clip range above 1. Unset: --epsilon. DAPO (https://arxiv.org/abs/2503.14476): 0.28.",
    "delta": "Highest ratio of an answer that was worse than the others, above 1 + --epsilon_high "
    "(https://arxiv.org/abs/2505.07291).",
    "mask_truncated_completions": "Answers that do not end within their tokens count for nothing.",
    "off_policy_mask_threshold": "Leave out answers that were worse than the others and are further than this from the "
    "policy by now (https://arxiv.org/abs/2512.02556).",
    "top_entropy_quantile": "Learn from this share of the tokens, those that the model is least decided about "
    "(https://arxiv.org/abs/2506.01939).",
    "entropy_coef": "Weight of a bonus for being undecided.",
    "use_adaptive_entropy": "Adapt that weight (https://arxiv.org/abs/2505.22312).",
    "entropy_target": "Entropy in nats a token, below which the bonus grows.",
    "entropy_coef_min": "Lowest weight.",
    "entropy_coef_max": "Highest weight.",
    "entropy_coef_delta": "By how much the weight changes in a step.",
    "sapo_temperature_pos": "SAPO (https://arxiv.org/abs/2511.20347): sharpness for answers that were better.",
    "sapo_temperature_neg": "The same for those that were worse.",
    "vespo_k_pos": "VESPO (https://arxiv.org/abs/2602.10693): power of the weight of answers that were better.",
    "vespo_k_neg": "The same for those that were worse.",
    "vespo_lambda_pos": "Its decay for answers that were better.",
    "vespo_lambda_neg": "The same for those that were worse.",
    "log_completions": "Show answers with their rewards, and write them below --output_dir.",
    "num_completions_to_print": "How many of them are shown. Unset: all.",
    "log_unique_prompts": "Each prompt once only.",
    "ds3_gather_for_generation": "Under ZeRO-3 gather all weights to write answers; False: slow, less memory.",
    "use_vllm": "Let vLLM write the answers. It has to be installed.",
    "vllm_gpu_memory_utilization": "Share of the GPU's memory for vLLM in this process.",
    "vllm_enable_sleep_mode": "vLLM gives its memory back while weights are trained.",
    "vllm_max_model_length": "Most tokens of a prompt with its answer in vLLM.",
    "vllm_tensor_parallel_size": "GPUs over which vLLM spreads a model.",
    "vllm_model_impl": "vLLM's own code for the model, or that of transformers.",
    "vllm_structured_outputs_regex": "Regular expression that answers of vLLM have to match.",
    "vllm_server_base_url": "Address of the server, such as http://127.0.0.1:8000.",
    "vllm_server_host": "Its host, where no address is given.",
    "vllm_server_port": "Its port, where no address is given.",
    "vllm_server_timeout": "Seconds to wait for the server.",
    "vllm_group_port": "Port by which it gets the new weights.",
    "vllm_importance_sampling_correction": "Correct for vLLM's probabilities being a little different.",
    "vllm_importance_sampling_mode": "How: by token or by sequence, cutting the ratio or leaving out what is beyond.",
    "vllm_importance_sampling_clip_max": "Highest ratio of the correction.",
    "vllm_importance_sampling_clip_min": "Lowest ratio of the correction.",
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
        "`dpo_training.py` and `orpo_training.py`; on prompts, `ppo_training.py` and `grpo_training.py`. What a stage "
        "has no use for it refuses; see the last section.",
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
        "### ppo_training.py only",
        table(ppo_training.PolicyArguments),
        table(ppo_training.PpoArguments),
        "### grpo_training.py only",
        table(grpo_training.GrpoArguments, also=OF_GRPO),
        "### From the trainer",
        "The ones used most; `--help` lists the others.",
        table(SFTConfig, also=INHERITED, own=False),
        "## merge_peft_adapter.py",
        table(merge_peft_adapter.MergeArguments),
        "## Front ends",
        "`inference.py` and the servers below take the flags of *Model* above, except `--qlora`, and these:",
        table(ChatArguments),
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
        "## validate_jsonl.py",
        table(validate_jsonl.ValidationArguments),
        "## Spellings of MedicalGPT and of older libraries",
        "Taken as what they mean today. Further spellings of a flag stand below its name in the tables above.",
        _rows(("given", "means"), spellings({field.name for field in dataclasses.fields(SFTConfig)})),
        "## Refused here, and why",
        "A flag that would have no effect stops the program.",
        _rows(("flag", "instead"), refusals({**GONE, **UNUSED_SFT_ARGUMENTS})),
        "In the stages on pairs these as well:",
        _rows(("flag", "instead"), refusals(only_in(UNUSED_PAIR_ARGUMENTS))),
        "In `ppo_training.py`:",
        _rows(("flag", "instead"), refusals(only_in(UNUSED_PPO_ARGUMENTS))),
        "In `grpo_training.py`:",
        _rows(("flag", "instead"), refusals(only_in(UNUSED_GRPO_ARGUMENTS))),
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
        # <think> would be taken for a tag of HTML.
        meaning = meaning.replace("<", "\\<")
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


def only_in(reasons: Mapping[str, str]) -> dict[str, str]:
    """What stages with these reasons refuse otherwise than fine-tuning, or alone."""
    return {
        name: reason
        for name, reason in reasons.items()
        if UNUSED_SFT_ARGUMENTS.get(name) != reason and name != "max_length"
    }


def _rows(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in line) + " |" for line in lines
    )


if __name__ == "__main__":
    run_main(main)
