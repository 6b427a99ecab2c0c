"""What surrounds the training in every stage: output folder, log, run.json, checkpoints, preview, samples, saving."""

import copy
import dataclasses
import hashlib
import json
import math
import os
import platform
import resource
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from medicalgpt import models
from medicalgpt.args import ModelArguments, RunArguments
from medicalgpt.attention import rope_to_record
from medicalgpt.data import LoadedData
from medicalgpt.encoding import IGNORED
from medicalgpt.errors import UserError
from medicalgpt.logs import is_main_process, setup_logging
from medicalgpt.observed import as_table, observe
from medicalgpt.plots import plot_loss
from medicalgpt.streaming import STATE_FILE, StreamedData, StreamedSamples, StreamTrainer

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from loguru import logger
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_callback import ProgressCallback
from transformers.utils import is_liger_kernel_available

MANIFEST = "manifest.json"
REPORTED_LIBRARIES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes", "deepspeed")
# Files by which a folder is known to hold a run; only these are ever removed by --overwrite_output_dir.
RUN_TRACES = (
    "run.json",
    "metrics.jsonl",
    "samples.jsonl",
    "answers.jsonl",
    "loss.png",
    "README.md",
    "trainer_state.json",
    "training_args.bin",
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "train_results.json",
    "eval_results.json",
    "all_results.json",
)
GATHERING = (
    "Weights that are spread over the processes must be gathered to be saved. For DeepSpeed ZeRO-3 set "
    '"stage3_gather_16bit_weights_on_model_save": true, as zero3.json does; for FSDP "state_dict_type": '
    '"FULL_STATE_DICT".'
)
SIGN_OF_LIFE_SECONDS = 30
# What a line of progress says of a log event, beside speed and memory.
SHOWN_METRICS = ("loss", "accuracy", "rewards/accuracies", "score", "reward", "rewards/accuracy/mean", "kl")
SHOWN_METRICS += ("learning_rate", "eval_loss", "eval_accuracy", "eval_rewards/accuracies")
SHOWN_METRICS += ("eval_score", "eval_reward", "eval_rewards/accuracy/mean")


class Run:
    """One training run and what it leaves in `output_dir`.

    Args:
        stage: name of the script, without suffix.
        training: the trainer's arguments.
        model: what the run starts from.
        run: overwriting and samples.
        others: further argument dataclasses, recorded in run.json.

    Raises:
        UserError: the folder holds another run, there is no whole checkpoint to resume from, or Liger's kernels cannot
            run here.
    """

    def __init__(self, stage: str, training: TrainingArguments, model: ModelArguments, run: RunArguments, *others: Any):
        setup_logging()
        if training.use_liger_kernel:
            _require_liger(training)
        self.stage, self.training, self.options = stage, training, run
        # The trainer changes its arguments; what was asked for is kept apart.
        self.asked = copy.copy(training)
        self.output_dir = Path(training.output_dir)
        self.started = time.time()
        self.resume_from = self._claim_output_dir()
        if training.use_cpu or not torch.cuda.is_available():
            _init_deepspeed_on_cpu(training)
        # The filter writes the mean of earlier losses where one is no number, which hides that training has failed.
        training.logging_nan_inf_filter = False
        set_seed(training.seed)
        base, _ = models.resolve_checkpoint(model.model_name_or_path)
        self.record: dict[str, Any] = {
            "stage": stage,
            "status": "running",
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "arguments": _resolved(training, model, run, *others),
            "parent": model.model_name_or_path,
            "base": {"name": base},
            "git_commit": _git_commit(),
            "versions": {"python": platform.python_version(), **_library_versions()},
            "processes": training.world_size,
            "started": _now(),
            "resumed_from": self.resume_from,
            "data": [],
        }
        if training.disable_tqdm is False and not sys.stderr.isatty():
            training.disable_tqdm = True

    # -- before training ----------------------------------------------------------------------------------------------

    def _claim_output_dir(self) -> str | None:
        _require_writable(self.output_dir)
        traces = [name for name in RUN_TRACES if name != "README.md" and (self.output_dir / name).exists()]
        traces += [path.name for path in self.output_dir.glob("checkpoint-*")]
        traces += [path.name for path in self.output_dir.glob("*.safetensors")]
        wanted = self.training.resume_from_checkpoint
        if wanted and str(wanted).lower() != "false":
            return find_checkpoint(self.output_dir if str(wanted).lower() == "true" else Path(wanted))
        if not traces or not is_main_process():
            return None
        if not self.options.overwrite_output_dir:
            resumable = " Go on with it: --resume_from_checkpoint True." if list(committed(self.output_dir)) else ""
            raise UserError(
                f"--output_dir {self.output_dir} holds another run ({', '.join(sorted(traces)[:4])}, …).{resumable} "
                "Choose another folder, or remove that run: --overwrite_output_dir True."
            )
        logger.info(f"removing the run that {self.output_dir} holds")
        for path in [self.output_dir / name for name in RUN_TRACES] + list(self.output_dir.glob("*.safetensors")):
            path.unlink(missing_ok=True)
        for path in self.output_dir.glob("checkpoint-*"):
            shutil.rmtree(path)
        return None

    def add_data(self, data: LoadedData) -> None:
        """Print the balance of the rows and put it into run.json.

        Raises:
            UserError: an evaluation without held-out rows, or the run that is resumed was trained on other files.
        """
        if not data.validation and (self.training.eval_strategy != "no" or not self.training.do_train):
            raise UserError(
                "there are no held-out rows to evaluate on. Name them with --validation_file_dir, hold some out with "
                "--validation_split_percentage 5, or leave --eval_strategy out and --do_train True."
            )
        for line in data.summary().splitlines():
            logger.info(line)
        self.record["data"] = [
            {"side": side, **account.as_dict()} for side, accounts in data.account.items() for account in accounts
        ]
        if self.resume_from and (Path(self.resume_from) / STATE_FILE).is_file() != isinstance(data, StreamedData):
            wanted = "Leave --streaming out" if isinstance(data, StreamedData) else "Add --streaming True"
            raise UserError(
                f"{self.resume_from} saw its rows in another order than this run would. {wanted}, as in the run that "
                "made it, or start anew in another --output_dir."
            )
        if self.resume_from and (self.output_dir / "run.json").is_file():
            before = json.loads((self.output_dir / "run.json").read_text(encoding="utf-8")).get("data", [])
            if before and before != self.record["data"]:
                raise UserError(
                    f"{self.resume_from} was trained on other rows than these (see data in "
                    f"{self.output_dir / 'run.json'}); resuming would repeat some and skip others. Give the same data "
                    "and the same data flags, or start anew in another --output_dir."
                )

    def preview(self, tokenizer: PreTrainedTokenizerBase, dataset: Dataset) -> None:
        """Print the first training row, trained tokens marked: a wrong mask is seen before it costs anything."""
        if not is_main_process() or not len(dataset):
            return
        row = dataset[0]
        if dataset.column_names == ["prompt_ids", "place"]:
            print(f"first prompt:\n{tokenizer.decode(row['prompt_ids'])}\n", file=sys.stderr)
            return
        sequences = [(row["input_ids"], row["labels"])] if "input_ids" in row else _sequences_of_pair(row)
        for ids, labels in sequences:
            print(render_supervision(tokenizer, ids, labels, sys.stderr.isatty()), file=sys.stderr)

    def announce(
        self,
        model: torch.nn.Module,
        train: Dataset,
        evaluation: Dataset | None,
        *,
        steps_per_epoch: float | None = None,
        batch: int | None = None,
    ) -> None:
        """Print what will happen before it happens: tokens, parameters, batches, steps.

        Args:
            steps_per_epoch, batch: steps, and sequences of a step, where they do not follow from rows and batch flags.
        """
        args = self.training
        streamed = isinstance(train, StreamedSamples)
        sequences, tokens, supervised = train.estimate() if streamed else _sizes(train)
        about = "about " if streamed else ""
        batch = batch or args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        if args.dataloader_drop_last and sequences < args.per_device_train_batch_size * args.world_size:
            raise UserError(
                f"--dataloader_drop_last True would drop everything: {sequences} row(s) are less than one batch of "
                f"{args.per_device_train_batch_size} on each of {args.world_size} process(es). Leave it out."
            )
        per_epoch = steps_per_epoch or math.ceil(
            math.ceil(sequences / (args.per_device_train_batch_size * args.world_size))
            / args.gradient_accumulation_steps
        )
        steps = args.max_steps if args.max_steps > 0 else math.ceil(per_epoch * args.num_train_epochs)
        by_module = models.trainable_by_module(model)
        trainable, total = sum(by_module.values()), models.total_parameters(model)
        modules = ", ".join(f"{name} {count:,}" for name, count in by_module.most_common(12))
        what, of_step, trained = (
            "sequences",
            "sequences",
            f", supervised {supervised:,} ({supervised / max(tokens, 1):.0%})",
        )
        if not streamed and train.column_names == ["prompt_ids", "place"]:
            what, of_step, trained = "prompts", "answers", ""
        lines = [
            (what, f"{about}{sequences:,} to train on, {len(evaluation) if evaluation else 0:,} held out"),
            ("tokens", f"{about}{tokens:,}{trained}"),
            ("trainable", f"{trainable:,} of {total:,} parameters ({trainable / total:.2%}): {modules}"),
            ("steps", f"{steps:,} ({about}{math.ceil(per_epoch):,} an epoch) of {batch} {of_step} on {args.device}"),
        ]
        self.record["model"] = {
            "parameters": total,
            "trainable": trainable,
            "trainable_by_module": dict(by_module),
        }
        if rope := rope_to_record(model.config):
            self.record["base"]["rope_parameters"] = rope
        self.record["plan"] = {"sequences": sequences, "tokens": tokens, "supervised_tokens": supervised}
        self.record["plan"] |= {"estimated": True} if streamed else {}
        self.record["plan"] |= {"effective_batch": batch, "steps": steps}
        for name, text in lines:
            logger.info(f"{name:<14} {text}")

    def compare(self, trainer: Trainer, batches: Sequence[dict[str, torch.Tensor]]) -> None:
        """Print the table "asked / observed" and put it into run.json. Call it on every process.

        Args:
            trainer: ready for its first step.
            batches: those of the first step.

        Raises:
            UserError: on every process, if a line differs on any of them.
        """
        asked = self.record["arguments"] | {"processes": self.record["processes"]}
        lines = observe(asked, self.asked, trainer, batches)
        self.record["observed"] = [
            {"name": line.name, "asked": line.asked, "observed": line.observed, "agrees": line.agrees} for line in lines
        ]
        for row in as_table(lines):
            logger.info(row)
        differing = [
            f"{line.name}: asked {line.asked}; observed {line.observed}. {line.remedy}"
            for line in lines
            if line.agrees is False
        ]
        # A process that stops alone would leave the others waiting for it.
        differing = list(dict.fromkeys(gather_object(differing)))
        self._write_record()
        if differing:
            raise UserError("\n  ".join(["asked and observed differ, so nothing was trained.", *differing]))

    # -- training and after -------------------------------------------------------------------------------------------

    def train_and_save(
        self,
        trainer: Trainer,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop_ids: Sequence[int],
        sample_prompts: Sequence[list[int]] = (),
        sampler: Any = None,
        note: str = "",
    ) -> dict[str, float]:
        """Train, evaluate, and leave everything that the next step needs in `output_dir`. Call it on every process.

        Args:
            trainer: ready to train.
            tokenizer: saved with its chat template.
            stop_ids: token ids that end an answer, for generation_config.json.
            sample_prompts: token ids of prompts that are answered before and after.
            sampler: in place of answers to `sample_prompts`: an object with `shown` and `answers()`, as `Sampler` has.
            note: a sentence for the model card.

        Returns:
            The metrics, also written to run.json.

        Raises:
            UserError: on every process, if the weights would not be saved, or were not (see `require_saved_weights`).
        """
        if self.training.do_train:
            _require_gathering(trainer)
        self._install_callbacks(trainer)
        # A model from a hub is on this machine only now.
        self.record["base"]["fingerprint"] = models.fingerprint(self.record["base"]["name"])
        self._write_record()
        if sampler is None:
            sampler = Sampler(trainer, tokenizer, list(stop_ids), list(sample_prompts)[: self.options.sample_prompts])
        before = sampler.answers()
        metrics: dict[str, float] = {}
        if self.training.do_train:
            try:
                metrics |= trainer.train(resume_from_checkpoint=self.resume_from).metrics
            except KeyError as error:
                if "metric_for_best_model" not in str(error):
                    raise
                raise UserError(str(error.args[0])) from error
            if isinstance(trainer, StreamTrainer):
                self.record["streamed"] = trainer.seen()
        # Held-out rows are measured unless that was refused in so many words.
        unwanted = "do_eval" in getattr(self.training, "given", ()) and not self.training.do_eval
        if trainer.eval_dataset is not None and not unwanted:
            metrics |= trainer.evaluate()
        if self.training.do_train:
            trainer.save_state()
            trainer.save_model()
            require_saved_weights(self.output_dir)
        if is_main_process():
            self._finish(trainer, tokenizer, stop_ids, sampler.shown, before, sampler.answers(), metrics, note)
        trainer.accelerator.wait_for_everyone()
        # Left to the end of the interpreter, threads of the process group may still run then and abort the program.
        trainer.accelerator.end_training()
        return metrics

    def _install_callbacks(self, trainer: Trainer) -> None:
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(MetricsFile(self.output_dir, append=self.resume_from is not None))
        trainer.add_callback(CheckpointCommitter())
        trainer.add_callback(FiniteLoss())
        trainer.add_callback(FirstStep(trainer, self.compare))
        if not trainer.pop_callback(ProgressCallback):
            trainer.add_callback(PlainProgress())
        else:
            trainer.add_callback(ProgressCallback())

    def _finish(
        self,
        trainer: Trainer,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: Sequence[int],
        shown: list[dict[str, str]],
        before: list[str],
        after: list[str],
        metrics: dict[str, float],
        note: str,
    ) -> None:
        # A model that scores, and does not write, has none.
        generation = getattr(trainer.accelerator.unwrap_model(trainer.model), "generation_config", None)
        if generation is not None:
            generation.eos_token_id = list(stop_ids)
            generation.pad_token_id = tokenizer.pad_token_id
        if self.training.do_train:
            if generation is not None:
                generation.save_pretrained(self.output_dir)
            tokenizer.save_pretrained(self.output_dir)
            plot_loss(self.output_dir)
        rows = [{**sample, "before": old, "after": new} for sample, old, new in zip(shown, before, after, strict=True)]
        if rows:
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (self.output_dir / "samples.jsonl").write_text(text, encoding="utf-8")
        for row in rows:
            for name, text in row.items():
                logger.info(f"{name:<8}  {_one_line(text)}")
        self.record |= {
            "status": "finished",
            "finished": _now(),
            "seconds": round(time.time() - self.started, 1),
            "peak_memory_gb": round(peak_memory_gb(), 3),
            "metrics": metrics,
            "stop_token_ids": list(stop_ids),
        }
        self._write_record()
        if self.training.do_train:
            (self.output_dir / "README.md").write_text(model_card(self.record, self.output_dir, note), encoding="utf-8")
        shown = [name for name in sorted(metrics) if name == "train_loss" or _is_result(name)]
        logger.info("  ".join(f"{name} {metrics[name]:.4g}" for name in shown))
        for command in next_commands(self.output_dir) if self.training.do_train else ():
            logger.info(f"next: {command}")

    def _write_record(self) -> None:
        if is_main_process():
            self.output_dir.mkdir(parents=True, exist_ok=True)
            text = json.dumps(self.record, ensure_ascii=False, indent=2, default=str)
            (self.output_dir / "run.json").write_text(text + "\n", encoding="utf-8")


def next_commands(output_dir: Path) -> list[str]:
    """Commands that run as printed on what the run left."""
    folder = shlex.quote(str(output_dir))
    is_adapter = (output_dir / models.ADAPTER_CONFIG).is_file()
    if _is_reward_model(output_dir):
        scores = shlex.quote(f"{output_dir}-scores.jsonl")
        use = f"python reward_modeling.py --model_name_or_path {folder} --score_file data/reward/validation.jsonl"
        use += f" --output_file {scores}"
    else:
        use = f"python inference.py --model_name_or_path {folder} --interactive"
    merged = shlex.quote(f"{output_dir}-merged")
    merge = [f"python merge_peft_adapter.py --lora_model {folder} --output_dir {merged}"] if is_adapter else []
    return [*merge, use]


def _is_reward_model(folder: Path) -> bool:
    for name in (models.ADAPTER_CONFIG, "config.json"):
        if (folder / name).is_file():
            config = json.loads((folder / name).read_text(encoding="utf-8"))
            kinds = [config.get("task_type"), *(config.get("architectures") or ())]
            return any(str(kind).endswith(("SEQ_CLS", "ForSequenceClassification")) for kind in kinds)
    return False


def model_card(record: dict[str, Any], output_dir: Path, note: str) -> str:
    """README.md of a checkpoint: what it is, from what, on which rows, with which result, and how to use it."""
    data = "\n".join(
        f"- {entry['side']}: `{entry['file']}`, {entry['rows']} rows, {entry['used']} used"
        + "".join(f", {count} {reason}" for reason, count in entry["left_out"].items())
        for entry in record["data"]
    )
    metrics = "\n".join(f"- {name}: {value:.6g}" for name, value in record["metrics"].items() if value is not None)
    commands = "\n".join(next_commands(output_dir))
    return (
        f"# {output_dir.name}\n\n{note}\n\n"
        f"Made by `{record['stage']}.py` from `{record['parent']}`, {record['finished']}.\n\n"
        f"## Data\n\n{data}\n\n## Result\n\n{metrics}\n\n## Use\n\n```bash\n{commands}\n```\n\n"
        f"## Repeat\n\n```bash\npython {shlex.join(record['command'])}\n```\n\n"
        "Answers of a language model can be wrong. They are no medical advice and replace no doctor.\n"
    )


def render_supervision(
    tokenizer: PreTrainedTokenizerBase, input_ids: Sequence[int], labels: Sequence[int], colour: bool
) -> str:
    """The text of a row with its trained tokens in green, or in ⟦ ⟧ where there is no colour, and their share.

    Whole runs of tokens are decoded together, so that no character that spans tokens is torn.
    """
    start, end = ("\033[32m", "\033[0m") if colour else ("⟦", "⟧")
    parts: list[str] = []
    at = 0
    while at < len(input_ids):
        trained = labels[at] != IGNORED
        stop = at
        while stop < len(input_ids) and (labels[stop] != IGNORED) == trained:
            stop += 1
        text = tokenizer.decode(input_ids[at:stop])
        parts.append(f"{start}{text}{end}" if trained else text)
        at = stop
    count = sum(label != IGNORED for label in labels)
    return (
        f"first training row, trained tokens marked ({count} of {len(labels)}, {count / max(len(labels), 1):.0%}):\n"
        + "".join(parts)
        + "\n"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def committed(output_dir: Path) -> list[Path]:
    """Whole checkpoints below `output_dir`, newest first: those whose manifest agrees with the files."""
    numbered = [path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    found = sorted(numbered, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    whole = []
    for path in found:
        if problem := checkpoint_problem(path):
            logger.warning(f"{path} is not whole ({problem}) and will not be resumed from")
        else:
            whole.append(path)
    return whole


def checkpoint_problem(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be trusted, or None."""
    if not (checkpoint / MANIFEST).is_file():
        return "it was never finished: no manifest"
    try:
        entries = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except ValueError:
        return f"its {MANIFEST} is damaged"
    for name, entry in entries.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"] or _digest(path) != entry["sha256"]:
            return f"{name} has changed"
    return None


def find_checkpoint(place: Path) -> str:
    """The newest whole checkpoint of an output folder, or that folder itself if it is a checkpoint.

    Raises:
        UserError: none, or the named one is not whole.
    """
    if place.name.startswith("checkpoint-"):
        if not place.is_dir():
            raise UserError(f"no checkpoint {place}. Check the path of --resume_from_checkpoint.")
        if problem := checkpoint_problem(place):
            raise UserError(f"{place} cannot be resumed from: {problem}. Choose an earlier one.")
        return str(place)
    whole = committed(place)
    if not whole:
        raise UserError(
            f"{place} holds no whole checkpoint to resume from. Start anew without --resume_from_checkpoint."
        )
    logger.info(f"resuming from {whole[0]}")
    return str(whole[0])


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_saved_weights(folder: Path) -> None:
    """Refuse a folder without weights, or with a tensor of size zero. Call it on every process, once it is saved.

    ZeRO-3 and FSDP leave an empty tensor in the place of a weight, and saving it raises no error. Only the headers of
    the files are read.

    Raises:
        UserError: on every process.
    """
    problem = _problem_of_weights(folder) if is_main_process() else None
    # A process that stops alone would leave the others waiting for it.
    if problems := [found for found in gather_object([problem]) if found]:
        raise UserError(problems[0])


def _problem_of_weights(folder: Path) -> str | None:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return f"{folder} holds no weights: there is no .safetensors file in it. {GATHERING}"
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    shape = file.get_slice(name).get_shape()
                    if 0 in shape:
                        return f"{path} holds nothing of {name}: its shape there is {shape}. {GATHERING}"
        except SafetensorError as error:
            return f"{path} was not saved whole ({error}). Make room on the disk, or save somewhere else."
    return None


class CheckpointCommitter(TrainerCallback):
    """Write the manifest of a checkpoint once all its files are there; transformers itself writes them in place.

    Raises:
        UserError: its weights are not there (see `require_saved_weights`); without a manifest it is never resumed from.
    """

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        require_saved_weights(folder)
        if not state.is_world_process_zero:
            return
        entries = {
            str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _digest(path)}
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != MANIFEST
        }
        partial = folder / f"{MANIFEST}.partial"
        partial.write_text(json.dumps(entries, indent=1), encoding="utf-8")
        partial.rename(folder / MANIFEST)


# ---------------------------------------------------------------------------------------------------------------------
# What is seen during training
# ---------------------------------------------------------------------------------------------------------------------


class MetricsFile(TrainerCallback):
    """One JSON object a line in metrics.jsonl for every log event."""

    def __init__(self, output_dir: Path, append: bool):
        self.path, self.append = output_dir / "metrics.jsonl", append

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not self.path.is_file():
            return
        # What the stopped run logged beyond the checkpoint will be logged once more.
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.append else []
        kept = [line for line in lines if json.loads(line)["step"] <= state.global_step]
        self.path.write_text("".join(kept), encoding="utf-8")

    def on_log(
        self, args: TrainingArguments, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            event = {"step": state.global_step, "epoch": state.epoch, "seconds": round(time.time(), 1), **(logs or {})}
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(event) + "\n")


class FirstStep(TrainerCallback):
    """Call `look(trainer, batches)` once the batches of the first step are there, before anything is computed."""

    def __init__(self, trainer: Trainer, look: Callable[[Trainer, Sequence[dict[str, torch.Tensor]]], None]):
        self.trainer, self.look = trainer, look

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        fetch = self.trainer.get_batch_samples

        def fetch_and_look(*fetch_args: Any) -> tuple[list, Any]:
            del self.trainer.get_batch_samples
            batches, count = fetch(*fetch_args)
            if batches:
                self.look(self.trainer, batches)
            return batches, count

        # The library shows a callback everything but the batches.
        self.trainer.get_batch_samples = fetch_and_look


class FiniteLoss(TrainerCallback):
    """End a run whose loss is no number any more: from then on every weight is lost, and nothing is worth saving."""

    def on_log(
        self, args: TrainingArguments, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        # Of a run shorter than --logging_steps there is only the mean over all steps.
        loss = (logs or {}).get("loss", (logs or {}).get("train_loss", 0.0))
        if not math.isfinite(loss):
            raise UserError(
                f"the training loss became {loss} at or before step {state.global_step}; the run was ended and nothing "
                "was saved. Lower --learning_rate, prefer --bf16 to --fp16, or add --max_grad_norm 1.0."
            )


class PlainProgress(TrainerCallback):
    """Progress as plain lines, for logs and pipes: at each log event, and at least every 30 seconds."""

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = self.last_line = time.time()
        self.first_step, self.first_tokens = state.global_step, state.num_input_tokens_seen

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.first_step + 1:
            logger.info(f"first step done, {time.time() - self.began:.1f} s after training began")
        if time.time() - self.last_line >= SIGN_OF_LIFE_SECONDS:
            self._line(state, {})

    def on_log(
        self, args: TrainingArguments, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if logs and not {"loss", "eval_loss", "eval_score", "eval_reward"}.isdisjoint(logs):
            self._line(state, logs)

    def _line(self, state: Any, logs: dict[str, Any]) -> None:
        if not state.is_world_process_zero:
            return
        self.last_line = time.time()
        elapsed = self.last_line - getattr(self, "began", self.last_line)
        done = state.global_step - getattr(self, "first_step", 0)
        parts = [f"step {state.global_step}/{state.max_steps} ({state.global_step / max(state.max_steps, 1):.0%})"]
        parts += [f"{name} {logs[name]:.4g}" for name in SHOWN_METRICS if logs.get(name) is not None]
        if "num_tokens" in logs and elapsed > 0:
            tokens = logs["num_tokens"] - getattr(self, "first_tokens", 0)
            parts.append(f"{tokens / elapsed:,.0f} tokens/s")
        parts.append(f"{peak_memory_gb():.2f} GB")
        if done and state.max_steps > state.global_step:
            parts.append(f"{_duration(elapsed / done * (state.max_steps - state.global_step))} to go")
        logger.info("  ".join(parts))


def peak_memory_gb() -> float:
    """Peak memory of this process in GB: of the GPU where there is one, of the program otherwise."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class Sampler:
    """Greedy answers to a few fixed prompts, to show what training changed.

    Off under ZeRO-3 and FSDP, where each token would gather all weights.
    """

    def __init__(
        self, trainer: Trainer, tokenizer: PreTrainedTokenizerBase, stop_ids: list[int], prompts: list[list[int]]
    ):
        sharded = is_deepspeed_zero3_enabled() or trainer.is_fsdp_enabled
        if prompts and sharded:
            logger.info("no sample answers: the weights are spread over the processes")
        self.trainer, self.tokenizer, self.stop_ids = trainer, tokenizer, stop_ids
        self.prompts = [] if sharded else prompts
        self.shown = [{"prompt": tokenizer.decode(ids)} for ids in self.prompts]

    @torch.no_grad()
    def answers(self, max_new_tokens: int = 64) -> list[str]:
        """Continuations of all prompts; an empty list on every process but the first."""
        if not self.prompts or not is_main_process():
            return []
        model: PreTrainedModel = self.trainer.accelerator.unwrap_model(self.trainer.model)
        was_training = model.training
        model.eval()
        random_state = torch.random.get_rng_state()
        texts = []
        for prompt in self.prompts:
            ids = torch.tensor([prompt], device=model.device)
            with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=bool(self.trainer.args.bf16)):
                output = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    eos_token_id=self.stop_ids,
                    pad_token_id=self.tokenizer.pad_token_id,
                )
            texts.append(self.tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True))
        torch.random.set_rng_state(random_state)
        model.train(was_training)
        return texts


# ---------------------------------------------------------------------------------------------------------------------
# Small parts
# ---------------------------------------------------------------------------------------------------------------------


def _require_writable(folder: Path) -> None:
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        what = "cannot be written to" if place.is_dir() else "is no folder"
        raise UserError(f"--output_dir {folder} cannot be made: {place} {what}. Choose another folder.")


def _require_liger(training: TrainingArguments) -> None:
    if training.use_cpu or not torch.cuda.is_available():
        raise UserError("--use_liger_kernel needs a CUDA GPU, and this run has none. Leave it out.")
    if not is_liger_kernel_available():
        raise UserError("--use_liger_kernel needs its package: pip install liger-kernel")


def _require_gathering(trainer: Trainer) -> None:
    # An adapter is gathered whatever the setting; without it, all weights would be left in pieces, one a process.
    if not trainer.is_deepspeed_enabled or isinstance(trainer.model, PeftModel):
        return
    config = trainer.accelerator.state.deepspeed_plugin.hf_ds_config
    if config.is_zero3() and not config.is_true("zero_optimization.stage3_gather_16bit_weights_on_model_save"):
        raise UserError(f"the trained weights would not be saved as a model. {GATHERING}")


def _init_deepspeed_on_cpu(training: TrainingArguments) -> None:
    # Without this, deepspeed believes at from_pretrained that the world has one process.
    if training.deepspeed:
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")


def _resolved(*groups: Any) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for group in groups:
        values = group.to_dict() if isinstance(group, TrainingArguments) else dataclasses.asdict(group)
        merged |= {name: value for name, value in values.items() if not name.endswith("_token")}
    return merged


def _sequences_of_pair(row: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of the chosen and the rejected answer, each after its prompt."""
    prompt = row["prompt_ids"]
    answers = (row["chosen_ids"], row["rejected_ids"])
    return [(prompt + answer, [IGNORED] * len(prompt) + answer) for answer in answers]


def _sizes(train: Dataset) -> tuple[int, int, int]:
    """Rows, tokens and supervised tokens."""
    if "chosen_ids" in train.column_names:
        prompts, *answers = (sum(map(len, train[f"{name}_ids"])) for name in ("prompt", "chosen", "rejected"))
        return len(train), 2 * prompts + sum(answers), sum(answers)
    if "input_ids" not in train.column_names:
        return len(train), sum(map(len, train["prompt_ids"])), 0
    tokens = sum(map(len, train["input_ids"]))
    return len(train), tokens, sum(label != IGNORED for labels in train["labels"] for label in labels)


def _is_result(name: str) -> bool:
    """Whether a metric says how good the model is, and not how long it took."""
    counts = ("runtime", "per_second", "tokens", "epoch")
    return name.startswith("eval_") and not name.endswith(counts)


def _library_versions() -> dict[str, str]:
    versions = {}
    for name in REPORTED_LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _git_commit() -> str | None:
    found = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"


def _one_line(text: str, limit: int = 100) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else "…" + text[-limit:]
