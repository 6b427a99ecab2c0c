"""Merge an adapter into its base model, so that the result loads like any other checkpoint and runs at full speed.

    python merge_peft_adapter.py --lora_model outputs/sft --output_dir outputs/sft-merged

The base is the one that the adapter was trained on; another one is refused, and so is a base that is stored quantized:
adding an update to rounded weights gives another model. (An adapter trained on a base that was loaded in 4 bits merges
into the base in full precision.) Works for causal models and for sequence and token classification. The adapter's
tokenizer, chat template and stop tokens go into the result. What was merged is read back from disk and its logits are
compared with those of the adapter on its base.
"""

import gc
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medicalgpt.args import parse_args
from medicalgpt.errors import UserError, run_main
from medicalgpt.logs import setup_logging

# Difference of logits, relative to the largest, that rounding explains: sums are done in another order after merging.
ROUNDING = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
# What is left of a model that was there before; a run.json would call an unfinished merge finished.
MODEL_FILES = ("*.safetensors", "*.index.json", "config.json", "adapter_config.json", "run.json")
PROBES = (
    "The patient has had a fever for three days.",
    "高血压患者应该注意什么？",
    "def add(a, b):\n    return a + b",
)


@dataclass
class MergeArguments:
    """Which adapter, and where to."""

    lora_model: str = field(metadata={"help": "Folder of the adapter.", "aliases": ["--peft_model_path"]})
    output_dir: str = field(metadata={"help": "Where the merged model goes."})
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "The base, if it is not where the adapter was trained.", "aliases": ["--base_model"]},
    )
    tokenizer_path: str | None = field(default=None, metadata={"help": "Tokenizer, instead of the adapter's."})
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Type of the merged weights; auto: that of the base.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
            "aliases": ["--torch_dtype"],
        },
    )
    max_shard_size: str = field(default="5GB", metadata={"help": "Largest file of weights."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are kept."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace a model that is already there."})


def main() -> None:
    (args,) = parse_args(MergeArguments, description=__doc__)
    from medicalgpt import models, runs

    import torch
    from loguru import logger

    setup_logging()
    adapter = Path(args.lora_model)
    if not (adapter / models.ADAPTER_CONFIG).is_file():
        raise UserError(f"{adapter} is no adapter: it has no {models.ADAPTER_CONFIG}. Check --lora_model.")
    base = args.model_name_or_path or models.resolve_checkpoint(str(adapter))[0]
    config = models.config_of(base, cache_dir=args.cache_dir)
    refuse_quantized(base, config)
    replaced = refuse_occupied(Path(args.output_dir), args.overwrite_output_dir, sources=(base, adapter))
    models.check_base(str(adapter), base)

    auto_class, options = model_class(adapter)
    options |= models.recorded_positions(str(adapter))
    dtype = getattr(torch, args.dtype) if args.dtype != "auto" else config.dtype or torch.float32
    model = auto_class.from_pretrained(base, dtype=dtype, cache_dir=args.cache_dir, **options)
    tokenizer = models.load_tokenizer(args.tokenizer_path or str(adapter), cache_dir=args.cache_dir)
    model = models.attach_adapter(model, str(adapter))
    logger.info(f"merging {adapter} into {base} as {model.base_model.model.__class__.__name__}, {dtype}")
    new_rows = models.token_rows(getattr(model.peft_config["default"], "trainable_token_indices", None))
    before = probe(model, tokenizer, new_rows)

    model = model.merge_and_unload()
    if (adapter / "generation_config.json").is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(adapter)
    for path in replaced:
        path.unlink()
    model.save_pretrained(args.output_dir, max_shard_size=args.max_shard_size)
    tokenizer.save_pretrained(args.output_dir)
    del model
    gc.collect()

    merged = auto_class.from_pretrained(args.output_dir, dtype=dtype)
    difference = compare(before, probe(merged, tokenizer, new_rows))
    tied = merged.get_input_embeddings().weight is getattr(merged.get_output_embeddings(), "weight", None)
    logger.info(
        f"logits of adapter on base and of the merged files: largest difference {difference['absolute']:.3g} "
        f"({difference['relative']:.2g} of the largest logit), same first choice at {difference['same_choice']:.1%} of "
        f"{difference['positions']} positions; embedding and head {'tied' if tied else 'separate'}"
    )
    limit = ROUNDING[str(dtype).removeprefix("torch.")]
    if not difference["relative"] <= limit:
        raise UserError(
            "the merged model does not compute what adapter and base did (relative difference "
            f"{difference['relative']:.3g}, rounding explains {limit:g}). Do not use {args.output_dir}."
        )
    write_record(args, adapter, base, difference)
    for command in runs.next_commands(Path(args.output_dir)):
        logger.info(f"next: {command}")


def refuse_quantized(base: str, config: Any) -> None:
    """Raises UserError if the base's files hold quantized weights."""
    if getattr(config, "quantization_config", None):
        method = config.quantization_config.get("quant_method", "quantized")
        raise UserError(
            f"{base} is stored quantized ({method}); merging into rounded weights gives another model. Give the "
            "unquantized base with --model_name_or_path."
        )


def refuse_occupied(output_dir: Path, overwrite: bool, sources: Sequence[str | Path]) -> list[Path]:
    """Files of a model that stands where the merged one is to go, to be removed once there is one.

    Raises:
        UserError: they may not be replaced, or are those of base or adapter, which the merge has to read.
    """
    present = [path for pattern in MODEL_FILES for path in output_dir.glob(pattern)]
    if any(output_dir.resolve() == Path(source).resolve() for source in sources):
        raise UserError(f"{output_dir} is what is to be merged. Choose another --output_dir.")
    if present and not overwrite:
        raise UserError(
            f"{output_dir} already holds a model ({present[0].name}). Choose another --output_dir, or replace it: "
            "--overwrite_output_dir True."
        )
    return present


def model_class(adapter: Path) -> tuple[Any, dict[str, Any]]:
    """The class that the adapter's task needs, and the number of labels where there is a head.

    Raises:
        UserError: a task that has no model here.
    """
    import transformers
    from safetensors import safe_open

    classes = {
        "CAUSAL_LM": transformers.AutoModelForCausalLM,
        "SEQ_CLS": transformers.AutoModelForSequenceClassification,
        "TOKEN_CLS": transformers.AutoModelForTokenClassification,
        "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
        "FEATURE_EXTRACTION": transformers.AutoModel,
        None: transformers.AutoModelForCausalLM,
    }
    task = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")).get("task_type")
    if task not in classes:
        raise UserError(f"{adapter} is for the task {task}; this tool merges {', '.join(filter(None, classes))}.")
    options: dict[str, Any] = {}
    if task in ("SEQ_CLS", "TOKEN_CLS"):
        with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
            heads = [name for name in file.keys() if name.endswith(("score.weight", "classifier.weight"))]
            if heads:
                options["num_labels"] = file.get_slice(heads[0]).get_shape()[0]
    return classes[task], options


def probe(model: Any, tokenizer: Any, new_rows: Sequence[int] = ()) -> list[Any]:
    """Logits of a few short texts, each alone, and of the first 64 of `new_rows`, which those texts do not hold."""
    import torch

    inputs = [tokenizer(text, return_tensors="pt").input_ids for text in PROBES]
    if new_rows:
        inputs.append(torch.tensor([list(new_rows)[:64]]))
    model.eval()
    with torch.no_grad():
        return [model(input_ids=ids).logits.float() for ids in inputs]


def compare(before: list[Any], after: list[Any]) -> dict[str, float]:
    """Largest difference of logits, also relative to the largest logit, and how often the first choice agrees."""
    absolute = max((old - new).abs().max().item() for old, new in zip(before, after, strict=True))
    largest = max(old.abs().max().item() for old in before)
    agree = [(old.argmax(-1) == new.argmax(-1)).flatten() for old, new in zip(before, after, strict=True)]
    positions = sum(len(row) for row in agree)
    return {
        "absolute": absolute,
        "relative": absolute / max(largest, 1e-12),
        "same_choice": sum(row.sum().item() for row in agree) / positions,
        "positions": positions,
    }


def write_record(args: MergeArguments, adapter: Path, base: str, difference: dict[str, float]) -> None:
    """run.json: where the merged model comes from, and that the merge went to its end."""
    from medicalgpt import models

    trained = adapter / models.RUN_FILE
    record = {
        "stage": "merge_peft_adapter",
        "status": "finished",
        "adapter": str(adapter),
        "base": {"name": base, "fingerprint": models.fingerprint(base)},
        "fingerprint": models.fingerprint(args.output_dir),
        "logit_difference": difference,
        "adapter_run": json.loads(trained.read_text(encoding="utf-8")) if trained.is_file() else None,
    }
    text = json.dumps(record, ensure_ascii=False, indent=2) + "\n"
    (Path(args.output_dir) / models.RUN_FILE).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
