"""Merge an adapter into its base model, so that the result loads like any other checkpoint and runs at full speed.

    python merge_peft_adapter.py --lora_model outputs/sft --output_dir outputs/sft-merged

The base must be the one that the adapter was trained on. A base whose files are quantized is refused, because adding an
update to rounded weights gives a different model. (An adapter trained on a base loaded in 4 bits is merged into the
base in full precision.) Works for causal models and for sequence and token classification. The adapter's tokenizer,
chat template and stop tokens are saved with the result, and for a reward model the padding token, by which it finds the
end of a text. The merged model is reloaded from disk, and its logits (scores for a reward model) are compared with
those of the adapter on its base. Only then it appears in --output_dir, in place of an earlier model.
"""

import gc
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medicalgpt.errors import UserError, run_main
from medicalgpt.logs import setup_logging
from medicalgpt.parser import parse_args

if TYPE_CHECKING:
    from medicalgpt.models.hub import Adapter, Checkpoint

# Relative differences of logits that are due to rounding: merging changes the order of sums.
ROUNDING = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
PROBES = (
    "The patient has had a fever for three days.",
    "高血压患者应该注意什么？",
    "def add(a, b):\n    return a + b",
)


@dataclass
class MergeArguments:
    """The adapter, its base, and the result."""

    lora_model: str = field(metadata={"help": "Folder of the adapter.", "aliases": ["--peft_model_path"]})
    output_dir: str = field(metadata={"help": "Folder for the merged model."})
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "The base model, if it has moved since training.", "aliases": ["--base_model"]},
    )
    tokenizer_path: str | None = field(default=None, metadata={"help": "Tokenizer to use instead of the adapter's."})
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Data type of the merged weights; auto: that of the base.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
            "aliases": ["--torch_dtype"],
        },
    )
    max_shard_size: str = field(default="5GB", metadata={"help": "Maximum size of a weight file."})
    cache_dir: str | None = field(default=None, metadata={"help": "Folder for downloads."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace a model in --output_dir."})


def main() -> None:
    (args,) = parse_args(MergeArguments, description=__doc__, program="merge_peft_adapter.py")
    from medicalgpt.models import adapters, hub, loading
    from medicalgpt.training.output_folder import replace_model
    from medicalgpt.training.runs import next_commands

    import torch
    import transformers
    from loguru import logger
    from trl.trainer.reward_trainer import suppress_seqcls_warning

    setup_logging()
    checkpoint = resolve(args)
    base, adapter, config = checkpoint.source, checkpoint.adapter, checkpoint.config
    refuse_quantized(base, config)
    output_dir = Path(args.output_dir)
    refuse_occupied(output_dir, args.overwrite_output_dir, sources=(base, adapter.path, checkpoint.tokenizer))
    hub.check_base(adapter, base)

    auto_class, options = model_class(adapter)
    dtype = getattr(torch, args.dtype) if args.dtype != "auto" else config.dtype or torch.float32
    # The base lacks the head, which is in the adapter; transformers would warn that it is newly initialized.
    with suppress_seqcls_warning() if "num_labels" in options else nullcontext():
        for name, value in options.items():
            setattr(config, name, value)
        model = auto_class.from_pretrained(base, config=config, dtype=dtype, cache_dir=args.cache_dir)
    tokenizer = loading.checkpoint_tokenizer(checkpoint)
    model = adapters.attach_adapter(model, adapter)
    if is_classifier := auto_class is transformers.AutoModelForSequenceClassification:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    logger.info(f"merging {adapter.path} into {base} as {model.base_model.model.__class__.__name__}, {dtype}")
    new_rows = adapters.token_rows(adapter.config.get("trainable_token_indices"))
    before = probe(model, tokenizer, new_rows, padded=is_classifier)

    model = model.merge_and_unload()
    if Path(adapter.path, "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(adapter.path)
    with replace_model(output_dir) as folder:
        model.save_pretrained(folder, max_shard_size=args.max_shard_size)
        tokenizer.save_pretrained(folder)
        del model
        gc.collect()
        merged = auto_class.from_pretrained(folder, dtype=dtype)
        difference = compare(before, probe(merged, tokenizer, new_rows, padded=is_classifier))
        log_difference(difference, merged, is_classifier)
        limit = ROUNDING[str(dtype).removeprefix("torch.")]
        if not difference["relative"] <= limit:
            raise UserError(
                "the merged model does not compute the same as the adapter on its base (relative difference "
                f"{difference['relative']:.3g}; rounding explains at most {limit:g}). Nothing was written to "
                f"{output_dir}. Update transformers and peft to the versions in requirements.txt, or report it."
            )
        write_record(folder, args.lora_model, checkpoint, difference)
    for command in next_commands(output_dir):
        logger.info(f"next: {command}")


def resolve(args: MergeArguments) -> "Checkpoint":
    """The adapter with the base that it was trained on, or with the one given as `--model_name_or_path`.

    Raises:
        UserError: the folder is not an adapter, or its base is not found.
    """
    from medicalgpt.models import hub

    if not Path(args.lora_model, hub.ADAPTER_CONFIG).is_file():
        raise UserError(f"{args.lora_model} is not an adapter: it has no {hub.ADAPTER_CONFIG}. Check --lora_model.")
    base = args.model_name_or_path
    return hub.Checkpoint.resolve(
        base or args.lora_model,
        adapter=args.lora_model if base else None,
        adapter_flag="--lora_model",
        tokenizer=args.tokenizer_path,
        cache_dir=args.cache_dir,
    )


def refuse_quantized(base: str, config: Any) -> None:
    """Raise UserError if the weights in the base's files are quantized."""
    if getattr(config, "quantization_config", None):
        method = config.quantization_config.get("quant_method", "quantized")
        raise UserError(
            f"{base} is stored quantized ({method}); merging into rounded weights gives a different model. Pass the "
            "unquantized base with --model_name_or_path."
        )


def refuse_occupied(output_dir: Path, overwrite: bool, sources: Sequence[str]) -> None:
    """Raise UserError if the output folder holds a model that may not be replaced, or something that the merge reads.

    Args:
        sources: folders, or names on the hub, of base, adapter and tokenizer.
    """
    from medicalgpt.files import overlap
    from medicalgpt.training.folder_lock import FolderLock
    from medicalgpt.training.output_folder import PreviousRun, recover

    for source in sources:
        if Path(source).exists() and (how := overlap(output_dir, source)) in ("is", "contains"):
            raise UserError(
                f"--output_dir {output_dir} {how} {source}, which this merge reads. Choose another folder, as in "
                f"--output_dir {Path(source).absolute()}-merged"
            )
    with FolderLock(output_dir):
        recover(output_dir)
    model = PreviousRun.model_in(output_dir)
    if not overwrite and (present := model.files()):
        raise UserError(
            f"{output_dir} already holds a model ({present[0].name}). Choose another --output_dir, or replace it: "
            "--overwrite_output_dir True."
        )


def model_class(adapter: "Adapter") -> tuple[Any, dict[str, Any]]:
    """The model class for the adapter's task, and the number of labels if the task needs a head.

    Raises:
        UserError: the task is not supported, or the adapter lacks the head.
    """
    from medicalgpt.models import adapters

    import transformers

    classes = {
        "CAUSAL_LM": transformers.AutoModelForCausalLM,
        "SEQ_CLS": transformers.AutoModelForSequenceClassification,
        "TOKEN_CLS": transformers.AutoModelForTokenClassification,
        "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
        "FEATURE_EXTRACTION": transformers.AutoModel,
        None: transformers.AutoModelForCausalLM,
    }
    task = adapter.config.get("task_type")
    if task not in classes:
        raise UserError(
            f"{adapter.path} is for the task {task}; this program merges {', '.join(filter(None, classes))}."
        )
    options: dict[str, Any] = {}
    if task in ("SEQ_CLS", "TOKEN_CLS"):
        options["num_labels"] = adapters.head_outputs(adapter)
        if options["num_labels"] is None:
            raise UserError(f"{adapter.path} has no head, so its outputs would be random. It cannot be merged.")
    return classes[task], options


def probe(model: Any, tokenizer: Any, new_rows: Sequence[int] = (), padded: bool = False) -> list[Any]:
    """Logits of a few short texts, one by one, and of the first 64 of `new_rows`, which do not occur in the texts.

    Args:
        padded: add padding after each text, as a model with one output per text has to find its end.
    """
    import torch

    inputs = [tokenizer(text, return_tensors="pt").input_ids for text in PROBES]
    if new_rows:
        inputs.append(torch.tensor([list(new_rows)[:64]]))
    if padded:
        inputs = [torch.nn.functional.pad(ids, (0, 3), value=tokenizer.pad_token_id) for ids in inputs]
    model.eval()
    with torch.no_grad():
        return [model(input_ids=ids).logits.float() for ids in inputs]


def compare(before: list[Any], after: list[Any]) -> dict[str, float]:
    """Largest difference of logits, absolute and relative to the largest logit, and how often the top token agrees."""
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


def log_difference(difference: dict[str, float], merged: Any, is_classifier: bool) -> None:
    """Log how much the merged files differ from the adapter on its base."""
    from loguru import logger

    what = "scores" if is_classifier else "logits"
    text = (
        f"{what} of the adapter on its base and of the merged files: largest difference {difference['absolute']:.3g} "
        f"({difference['relative']:.2g} of the largest {what[:-1]})"
    )
    if is_classifier:
        logger.info(f"{text} in {difference['positions']} texts")
        return
    tied = merged.get_input_embeddings().weight is getattr(merged.get_output_embeddings(), "weight", None)
    logger.info(
        f"{text}, same top token at {difference['same_choice']:.1%} of {difference['positions']} positions; "
        f"embedding and head {'tied' if tied else 'separate'}"
    )


def write_record(folder: Path, adapter: str, checkpoint: "Checkpoint", difference: dict[str, float]) -> None:
    """Write run.json, which records what was merged and that the merge is complete."""
    from medicalgpt.models import hub

    trained = Path(adapter, hub.RUN_FILE)
    record = {
        "stage": "merge_peft_adapter",
        "status": "finished",
        "adapter": adapter,
        "base": {"name": checkpoint.base, "fingerprint": checkpoint.fingerprint},
        "fingerprint": hub.fingerprint(str(folder)),
        "logit_difference": difference,
        "adapter_run": json.loads(trained.read_text(encoding="utf-8")) if trained.is_file() else None,
    }
    text = json.dumps(record, ensure_ascii=False, indent=2) + "\n"
    (folder / hub.RUN_FILE).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
