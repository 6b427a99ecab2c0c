"""Merge an adapter into its base model, so that the result loads like any other checkpoint and runs at full speed.

    python merge_peft_adapter.py --lora_model outputs/sft-lora --output_dir outputs/sft-lora-merged
    python merge_peft_adapter.py --lora_model outputs/a,outputs/b --lora_weights 0.7,0.3 --output_dir outputs/ab
    python merge_peft_adapter.py --lora_model outputs/a,outputs/b --combination_type chain --output_dir outputs/ab

The base must be the one that the adapter was trained on. A base whose files are quantized is refused, because adding an
update to rounded weights gives a different model. (An adapter trained on a base loaded in 4 bits is merged into the
base in full precision.) Works for causal models and for sequence and token classification. The adapter's tokenizer,
chat template and stop tokens are saved with the result, and for a reward model the padding token, by which it finds the
end of a text. If the base takes images or audio too, the result is the whole checkpoint: its encoders and the files of
its processor are copied byte for byte (a reward model has no use for them). The merged model is reloaded from disk, and
its logits (scores for a reward model) are compared with those of the adapter on its base. Only then it appears in
--output_dir, in place of an earlier model.

Several adapters of one base are combined with --lora_weights. In a chain, each was trained on the result of merging
those before it.
"""

import copy
import gc
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medicalgpt.adapter_args import COMBINATION_TYPES, CombinationArguments
from medicalgpt.errors import UserError, run_main
from medicalgpt.logs import setup_logging
from medicalgpt.parser import parse_args

if TYPE_CHECKING:
    from medicalgpt.models.combining import Combination
    from medicalgpt.models.hub import Adapter, Checkpoint

# Relative differences of logits that are due to rounding: merging changes the order of sums.
ROUNDING = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
PROBES = (
    "The patient has had a fever for three days.",
    "高血压患者应该注意什么？",
    "def add(a, b):\n    return a + b",
)


# Not one of peft's ways to combine adapters: they are merged one after the other.
CHAIN = "chain"


@dataclass
class MergeArguments:
    """The adapters, their base, and the result."""

    lora_model: str = field(
        metadata={"help": "Folder of the adapter; several separated by commas.", "aliases": ["--peft_model_path"]}
    )
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


@dataclass
class CombineArguments(CombinationArguments):
    """How several adapters become one."""

    combination_type: str | None = field(
        default=None,
        metadata={
            "help": "How they are combined, as in peft: cat, the default, is the exact weighted sum of their updates. "
            "chain merges them one after the other, each into the result of the one before. docs/adapters.md explains "
            "all.",
            "choices": [CHAIN, *COMBINATION_TYPES],
        },
    )


def main() -> None:
    args, combining_args = parse_args(
        MergeArguments, CombineArguments, description=__doc__, program="merge_peft_adapter.py"
    )
    from medicalgpt.models.combining import Combination, named_adapters
    from medicalgpt.training.runs import next_commands

    from loguru import logger

    setup_logging()
    named = named_adapters(args.lora_model)
    if combining_args.combination_type == CHAIN:
        merge_chain(args, combining_args, named)
    else:
        combination = Combination.from_arguments(combining_args, list(named))
        if len(named) > 1 and combination is None:
            raise UserError(
                f"--lora_model names {len(named)} adapters. Combine them: --lora_weights "
                f"{','.join([f'{1 / len(named):.2g}'] * len(named))}. Or, if each was trained on the result of merging "
                "those before it: --combination_type chain"
            )
        merge(args, named, combination)
    for command in next_commands(Path(args.output_dir)):
        logger.info(f"next: {command}")


def merge(
    args: MergeArguments,
    named: Mapping[str, str],
    combination: "Combination | None",
    chained: Mapping[str, Any] | None = None,
) -> None:
    """Merge one adapter, or several combined, into the base, and write the result.

    Args:
        named: places of the adapters by their names.
        chained: what the record says of a chain in place of the base and the adapter of its last step.
    """
    from medicalgpt.models import adapters, loading, towers, vision
    from medicalgpt.training.output_folder import replace_model

    import torch
    import transformers
    from loguru import logger
    from trl.trainer.reward_trainer import suppress_seqcls_warning

    checkpoint, found = resolve(args, named, combination)
    base, adapter, config = checkpoint.source, checkpoint.adapter, checkpoint.config
    output_dir = Path(args.output_dir)
    auto_class, options = model_class(adapter)
    dtype = getattr(torch, args.dtype) if args.dtype != "auto" else config.dtype or torch.float32
    open_model = partial(loading.load_model, auto_class, dtype=str(dtype).removeprefix("torch."))
    if "max_shard_size" in getattr(args, "given", ()) and auto_class is transformers.AutoModelForCausalLM:
        refuse_sharding(base, config)
    # The base lacks the head, which is in the adapter; transformers would warn that it is newly initialized.
    with suppress_seqcls_warning() if "num_labels" in options else nullcontext():
        for name, value in options.items():
            setattr(config, name, value)
        model = open_model(base, config=config, cache_dir=args.cache_dir)
    tokenizer = loading.checkpoint_tokenizer(checkpoint)
    model = put_on(model, found, combination)
    if is_classifier := auto_class is transformers.AutoModelForSequenceClassification:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    shown = combination.described(list(found)) if combination else adapter.path
    logger.info(f"merging {shown} into {base} as {model.base_model.model.__class__.__name__}, {dtype}")
    new_rows = adapters.token_rows(adapter.config.get("trainable_token_indices"))
    before = probe(model, tokenizer, new_rows, padded=is_classifier)

    model = model.merge_and_unload()
    for place in (adapter.path, *([args.tokenizer_path] if combination and args.tokenizer_path else [])):
        if Path(place, "generation_config.json").is_file():
            model.generation_config = transformers.GenerationConfig.from_pretrained(place)
    with replace_model(output_dir) as folder:
        model.save_pretrained(folder, max_shard_size=args.max_shard_size)
        vision.copy_processor(adapter.path, folder)
        towers.complete(folder, model)
        tokenizer.save_pretrained(folder)
        del model
        gc.collect()
        merged = open_model(str(folder))
        difference = compare(before, probe(merged, tokenizer, new_rows, padded=is_classifier))
        log_difference(difference, merged, is_classifier)
        limit = ROUNDING[str(dtype).removeprefix("torch.")]
        if not difference["relative"] <= limit:
            raise UserError(
                "the merged model does not compute the same as the adapter on its base (relative difference "
                f"{difference['relative']:.3g}; rounding explains at most {limit:g}). Nothing was written to "
                f"{output_dir}. Update transformers and peft to the versions in requirements.txt, or report it."
            )
        write_record(folder, checkpoint, found, combination, difference, chained)


def put_on(model: Any, found: Mapping[str, "Adapter"], combination: "Combination | None") -> Any:
    """The model with the adapter, or with what several give together."""
    from medicalgpt.models import adapters, combining

    if combination:
        return combining.combine(model, found, combination)
    (adapter,) = found.values()
    return adapters.attach_adapter(model, adapter)


def merge_chain(args: MergeArguments, combining_args: CombineArguments, named: Mapping[str, str]) -> None:
    """Merge adapters in order, each into the result of the ones before, which must be what it was trained on.

    Raises:
        UserError: an adapter does not belong there, or flags have no effect.
    """
    from medicalgpt.models import combining

    from loguru import logger

    if idle := [name for name in sorted(combining_args.given) if name != "combination_type"]:
        raise UserError(f"--{', --'.join(idle)}: no effect in a chain, whose adapters are merged whole. Omit it.")
    if len(named) < 2:
        raise UserError("--combination_type chain needs several adapters in --lora_model, in the order of training.")
    found = combining.read_adapters(named, cache_dir=args.cache_dir)
    (first, *others) = found.items()
    start, _ = resolve(args, dict([(first[0], named[first[0]])]), None, sources=named.values())
    for name, adapter in others:
        recorded = adapter.recorded_base.get("fingerprint")
        if recorded and recorded == start.fingerprint:
            raise UserError(
                f"{name} ({adapter.path}) was trained on the same base as {first[0]}, not on the result of merging it. "
                f"Combine them instead: --lora_weights {','.join(['1'] * len(named))} without --combination_type chain"
            )
    chained = {
        "adapters": list(named.values()),
        "combination": {"kind": CHAIN},
        "base": {"name": start.base, "fingerprint": start.fingerprint},
    }
    output_dir, base = Path(args.output_dir), args.model_name_or_path
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    # Next to the result, where there is room for a model.
    with tempfile.TemporaryDirectory(prefix=f".{output_dir.name}-", dir=output_dir.parent) as folder:
        for number, (name, adapter) in enumerate(found.items()):
            if number:
                require_link(name, adapter, str(base), list(found)[:number])
            step = copy.copy(args)
            is_last = number == len(found) - 1
            step.output_dir = str(output_dir if is_last else Path(folder, str(number)))
            step.model_name_or_path = base
            # Steps before the last one are only read by the next.
            step.tokenizer_path = args.tokenizer_path if is_last else None
            logger.info(f"step {number + 1} of {len(found)}: {name}")
            merge(step, {name: named[name]}, None, chained if is_last else None)
            base = step.output_dir


def require_link(name: str, adapter: "Adapter", base: str, before: Sequence[str]) -> None:
    """Raise UserError if an adapter of a chain was trained on other weights than the merge of those before it."""
    from medicalgpt.models import hub

    try:
        hub.check_base(adapter, base)
    except hub.CheckpointError as error:
        raise UserError(
            f"{name} ({adapter.path}) was not trained on what merging {', '.join(before)} gives: the weights differ "
            f"from those of {adapter.recorded_base.get('name')}. Check the order in --lora_model, and --dtype, with "
            "which the merge was made; or pass the folder that it was trained on: --lora_model "
            f"{adapter.path} --model_name_or_path FOLDER, without --combination_type"
        ) from error


def resolve(
    args: MergeArguments,
    named: Mapping[str, str],
    combination: "Combination | None",
    sources: Iterable[str] = (),
) -> "tuple[Checkpoint, dict[str, Adapter]]":
    """The base, with the first adapter, and all adapters by their names, after every check that needs no weights.

    Args:
        sources: further folders that are read.

    Raises:
        UserError: a folder is not an adapter, a base is not found or quantized, adapters do not fit together, or the
            output folder is occupied.
    """
    from medicalgpt.models import combining, hub, vision

    for path in named.values():
        if not Path(path, hub.ADAPTER_CONFIG).is_file():
            raise UserError(f"{path} is not an adapter: it has no {hub.ADAPTER_CONFIG}. Check --lora_model.")
    base, first = args.model_name_or_path, next(iter(named.values()))
    checkpoint = hub.Checkpoint.resolve(
        base or first,
        adapter=first if base else None,
        adapter_flag="--lora_model",
        tokenizer=args.tokenizer_path,
        cache_dir=args.cache_dir,
    )
    refuse_quantized(checkpoint.source, checkpoint.config)
    read = (checkpoint.source, *named.values(), checkpoint.tokenizer, *sources)
    refuse_occupied(Path(args.output_dir), args.overwrite_output_dir, sources=read)
    if combination is None:
        hub.check_base(checkpoint.adapter, checkpoint.source)
        return checkpoint, {next(iter(named)): checkpoint.adapter}
    found = combining.read_adapters(named, cache_dir=args.cache_dir)
    combining.check_bases(found, checkpoint, base_given=base is not None)
    combining.check_combinable(found, combination)
    vision.check_same_bounds([adapter.path for adapter in found.values()])
    if not args.tokenizer_path:
        combining.check_same_template(checkpoint, found, tokenizer_flag="--tokenizer_path")
    return checkpoint, found


def refuse_quantized(base: str, config: Any) -> None:
    """Raise UserError if the weights in the base's files are quantized, and training has not restored them."""
    from medicalgpt.models.quantization import RESTORED, stored_method

    method = stored_method(config)
    if method not in (None, *RESTORED):
        raise UserError(
            f"{base} is stored quantized ({method}); merging into rounded weights gives a different model. Pass the "
            "unquantized base with --model_name_or_path."
        )


def refuse_sharding(base: str, config: Any) -> None:
    """Raise UserError if the files of the result are those of the base, whatever their size."""
    from medicalgpt.models import towers

    if towers.has_towers(config):
        raise UserError(
            f"{base} takes images or audio too: the merged checkpoint has the same weight files as it, so that "
            "--max_shard_size would have no effect. Leave it out."
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


def write_record(
    folder: Path,
    checkpoint: "Checkpoint",
    found: Mapping[str, "Adapter"],
    combination: "Combination | None",
    difference: dict[str, float],
    chained: Mapping[str, Any] | None,
) -> None:
    """Write run.json, which records what was merged and that the merge is complete."""
    from medicalgpt.models import hub

    paths = [adapter.path for adapter in found.values()]
    trained = [Path(path, hub.RUN_FILE) for path in (chained["adapters"] if chained else paths)]
    runs = [json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None for file in trained]
    several: Mapping[str, Any] = {}
    if chained:
        several = chained
    elif combination:
        several = {"adapters": paths, "combination": asdict(combination)}
    record = {
        "stage": "merge_peft_adapter",
        "status": "finished",
        "adapter": paths[0] if not several else None,
        "base": {"name": checkpoint.base, "fingerprint": checkpoint.fingerprint},
        "fingerprint": hub.fingerprint(str(folder)),
        "logit_difference": difference,
        "adapter_run": runs[0] if not several else None,
        **({"adapter_runs": runs} if several else {}),
        **several,
    }
    text = json.dumps(record, ensure_ascii=False, indent=2) + "\n"
    (folder / hub.RUN_FILE).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
