"""What every stage does around its training: output folder, log, run.json, checkpoints, preview, samples, saving."""

import copy
import dataclasses
import json
import math
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

from medicalgpt.args import RunArguments
from medicalgpt.data.images import Picture
from medicalgpt.data.lengths import count_tokens
from medicalgpt.data.loading import LoadedData
from medicalgpt.data.streaming import StreamedData, StreamedSamples
from medicalgpt.errors import Stopped, UserError, explain_with, is_out_of_memory
from medicalgpt.files import write_atomically
from medicalgpt.logs import is_main_process, setup_logging
from medicalgpt.models import adapters, hub, towers
from medicalgpt.models.attention import rope_to_record
from medicalgpt.training import row_order
from medicalgpt.training.agreement import compare_data, compare_start, require_agreement
from medicalgpt.training.callbacks import (
    BestMetric,
    EarlyStopping,
    FirstStep,
    MetricsFile,
    PlainProgress,
    ProgressBar,
    peak_memory_gb,
)
from medicalgpt.training.checkpoints import (
    CheckpointCommitter,
    is_committed,
    newest_committed,
    require_saved_weights,
    set_later_aside,
)
from medicalgpt.training.claiming import NO, Claim, claim_folder, on_first_process, require_same_checkpoint, resumes_in
from medicalgpt.training.disk import on_every_process, saving
from medicalgpt.training.engines import check_engine, engine_of, init_deepspeed
from medicalgpt.training.finite import require_finite_start
from medicalgpt.training.folder_lock import FolderLock
from medicalgpt.training.hosts import require_shared_folder, watch_hosts
from medicalgpt.training.memory import explain_memory, plan_memory
from medicalgpt.training.observed import as_summary, as_table, observe
from medicalgpt.training.output_folder import PreviousRun, refuse_overlap
from medicalgpt.training.plots import loss_line, plot_loss
from medicalgpt.training.preview import render_supervision, sequences_of
from medicalgpt.training.resume import RecordInCheckpoint, ResumedRun, StepsOfFlags, contents, contents_of_tokenizer
from medicalgpt.training.samples import GreedyAnswers, SampleLogger
from medicalgpt.training.stopping import StopAfterStep, StopRequest
from medicalgpt.training.stream_trainer import STATE_FILE, StreamTrainer
from medicalgpt.training.trainers import StageTrainer

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from loguru import logger
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import ProgressCallback
from transformers.utils import is_liger_kernel_available

REPORTED_LIBRARIES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes", "deepspeed")


class Run:
    """One training run and what it writes to `output_dir`.

    Args:
        stage: name of the script, without suffix.
        training: the trainer's arguments.
        checkpoint: what the run starts from.
        run: overwriting and samples.
        others: further argument dataclasses, recorded in run.json.

    Raises:
        UserError: the folder holds another run, or touches something that this one reads; there is no complete
            checkpoint to resume from; Liger's kernels cannot run here.
    """

    def __init__(
        self, stage: str, training: TrainingArguments, checkpoint: hub.Checkpoint, run: RunArguments, *others: Any
    ):
        setup_logging()
        self.trainer: Trainer | None = None
        if training.use_liger_kernel:
            _require_liger(training)
        self.stage, self.training, self.checkpoint, self.options = stage, training, checkpoint, run
        self.groups = (training, run, *others)
        self.stop = StopRequest()
        self.stop.install()
        # The trainer changes its arguments; these stay as they were requested.
        self.requested = copy.copy(training)
        patience = getattr(training, "early_stopping_patience", None)
        self.early_stopping = patience and EarlyStopping(patience, training.early_stopping_threshold)
        self.output_dir = Path(training.output_dir)
        self.started = time.time()
        init_deepspeed(training)
        wanted = str(training.resume_from_checkpoint or NO)
        resumes = resumes_in(self.output_dir, wanted)
        refuse_overlap(self.output_dir, stage, self.groups, checkpoint, resumes=resumes)
        self.previous, self.lock = PreviousRun(self.output_dir), FolderLock(self.output_dir)
        # The first question for the number of processes lets them talk to each other.
        processes = training.world_size
        self.host_watch = watch_hosts(training.ddp_timeout)
        self.claim = on_first_process(lambda: self._claim_folder(wanted))
        require_shared_folder(self.output_dir)
        self.resume_from = self.claim.resume_from
        if self.resume_from:
            require_same_checkpoint(self.resume_from)
        # The filter replaces a loss that is NaN by the mean of earlier ones, which hides that training has failed.
        training.logging_nan_inf_filter = False
        set_seed(training.seed)
        self.record: dict[str, Any] = {
            "stage": stage,
            "status": "running",
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "arguments": _resolved(*self.groups),
            "parent": checkpoint.name,
            "base": {"name": checkpoint.base, "adapter": checkpoint.adapter and checkpoint.adapter.path},
            "contents": contents(self.groups, checkpoint),
            "git_commit": _git_commit(),
            "versions": {"python": platform.python_version(), **_library_versions()},
            "processes": processes,
            "engine": engine_of(training),
            "started": _now(),
            "resumed_from": self.resume_from,
            "data": [],
        }
        if self.claim.finished:
            self._end_finished()
        self.resumed = ResumedRun(self.resume_from, self.groups) if self.resume_from else None
        if self.resumed:
            self.set_defaults(**self.resumed.defaults_from_rows())
        if training.disable_tqdm is False and not sys.stderr.isatty():
            training.disable_tqdm = True
        explain_with(self._explain)
        compare_start(self.record)

    # -- before training ----------------------------------------------------------------------------------------------

    def _claim_folder(self, wanted: str) -> Claim:
        folder = self.output_dir
        try:
            self.lock.acquire()
        except OSError as error:
            raise UserError(
                f"--output_dir {folder} cannot be written to: {error.strerror}. Choose another folder."
            ) from error
        try:
            return claim_folder(
                folder, wanted, overwrite=self.options.overwrite_output_dir, trains=self.training.do_train
            )
        except BaseException:
            self.lock.release()
            raise

    def _end_finished(self) -> NoReturn:
        """End with success if nothing is left to do.

        Raises:
            UserError: the run that has finished had other settings.
        """
        self.lock.release()
        finished = ResumedRun(str(self.output_dir), self.groups)
        self.set_defaults(**finished.defaults_from_rows())
        finished.require_finished(self.record)
        logger.info(
            f"the run in {self.output_dir} has already finished, so nothing is left to do. To train it again and "
            "replace it: --overwrite_output_dir True"
        )
        sys.exit(0)

    def set_defaults(self, values: dict[str, Any], reason: str) -> None:
        """Set flags that the user has not set to what the number of rows suggests, and record it."""
        for name, value in values.items():
            setattr(self.training, name, value)
            setattr(self.requested, name, value)
        self.record["arguments"] |= values
        self.record |= {"defaults_from_rows": {"reason": reason, "values": values}} if values else {}

    def add_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Record the tokenizer with its template in run.json, and compare a resumed run with the one before.

        Call it before anything large is read.

        Raises:
            UserError: flags, base, tokenizer, ... that may not differ from those of the run that made the checkpoint.
        """
        self.record["contents"] |= contents_of_tokenizer(tokenizer)
        if self.resumed:
            self.record["changed_on_resume"] = self.resumed.require_same(self.record, self.output_dir)

    def require_same_contents(self) -> None:
        """Compare what was not on this machine before the model was loaded.

        Raises:
            UserError: as `add_tokenizer`.
        """
        if None in self.record["contents"].values():
            self.record["contents"] |= contents(self.groups, self.checkpoint)
            if self.resumed:
                self.resumed.refuse(self.resumed.compare(self.record), self.record, self.output_dir)

    def add_data(self, data: LoadedData) -> None:
        """Print how many rows are used and skipped, and record it in run.json.

        Raises:
            UserError: an evaluation without held-out rows, or the run that is resumed was trained on other files.
        """
        if not data.validation and (self.training.eval_strategy != "no" or not self.training.do_train):
            raise UserError(
                "there are no held-out rows to evaluate on. Pass them with --validation_file_dir, hold some out with "
                "--validation_split_percentage 5, or leave --eval_strategy out and --do_train True."
            )
        for line in data.summary().splitlines():
            logger.info(line)
        self.record["data"] = [
            {"side": side, **account.as_dict()} for side, accounts in data.account.items() for account in accounts
        ]
        compare_data(self.record["data"])
        if self.resume_from and (Path(self.resume_from) / STATE_FILE).is_file() != isinstance(data, StreamedData):
            wanted = "Leave --streaming out" if isinstance(data, StreamedData) else "Add --streaming True"
            raise UserError(
                f"{self.resume_from} saw its rows in another order than this run would. {wanted}, as in the run that "
                "made it, or start again in another --output_dir."
            )
        if self.resumed:
            self.resumed.require_same_rows(self.record, self.output_dir)

    def preview(self, tokenizer: PreTrainedTokenizerBase, dataset: Dataset) -> None:
        """Print the first training row with its supervised tokens marked, so that a wrong mask shows at once."""
        if not is_main_process() or not len(dataset):
            return
        row = dataset[0]
        if dataset.column_names == ["prompt_ids", "place"]:
            print(f"first prompt:\n{tokenizer.decode(row['prompt_ids'])}\n", file=sys.stderr)
            return
        for ids, labels in sequences_of(row):
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
        """Log what will be trained: tokens, parameters, batches, steps.

        Args:
            steps_per_epoch, batch: steps, and sequences of a step, where they do not follow from rows and batch flags.

        Raises:
            UserError: `--dataloader_drop_last` would drop every row.
        """
        args = self.training
        streamed = isinstance(train, StreamedSamples)
        sequences, tokens, supervised = train.estimate() if streamed else count_tokens(train)
        about = "about " if streamed else ""
        batch = batch or row_order.rows_per_step(args)
        per_epoch = steps_per_epoch or row_order.steps_per_epoch(sequences, args)
        if not per_epoch:
            raise UserError(
                f"--dataloader_drop_last True would drop everything: {sequences} row(s) are less than the {batch} of "
                "one step (--per_device_train_batch_size x --gradient_accumulation_steps x processes). Leave it out."
            )
        steps = args.max_steps if args.max_steps > 0 else math.ceil(per_epoch * args.num_train_epochs)
        by_module = adapters.trainable_by_module(model)
        trainable, total = sum(by_module.values()), adapters.total_parameters(model)
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
        """Log the table "requested / observed" and record it in run.json. Call it on every process.

        Args:
            trainer: ready for its first step.
            batches: those of the first step.

        Raises:
            UserError: on every process, if a line differs on any process.
        """
        flags = self.record["arguments"] | {"processes": self.record["processes"]}
        lines = observe(flags, self.requested, trainer, batches, self.checkpoint.adapter)
        self.record["observed"] = [
            {"name": line.name, "requested": line.requested, "observed": line.observed, "agrees": line.agrees}
            for line in lines
        ]
        for row in as_table(lines) if self.options.verbose else as_summary(lines):
            logger.info(row)
        differing = [
            f"{line.name}: requested {line.requested}; observed {line.observed}. {line.remedy}"
            for line in lines
            if line.agrees is False
        ]
        # If one process stopped alone, the others would wait for it.
        differing = list(dict.fromkeys(gather_object(differing)))
        self._write_record()
        if differing:
            raise UserError(
                "\n  ".join(["requested and observed settings differ, so nothing was trained.", *differing])
            )

    # -- training and after -------------------------------------------------------------------------------------------

    def train_and_save(
        self,
        trainer: Trainer,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop_ids: Sequence[int],
        sample_prompts: Sequence[list[int]] = (),
        sample_pictures: Sequence[list[Picture]] = (),
        samples: SampleLogger | None = None,
        note: str = "",
    ) -> dict[str, float]:
        """Train, evaluate, and write everything that the next step needs to `output_dir`. Call it on every process.

        Args:
            trainer: ready to train.
            tokenizer: saved with its chat template.
            stop_ids: token ids that end an answer, for generation_config.json.
            sample_prompts: token ids of prompts that are answered before and after.
            sample_pictures: the images of each of these prompts, if the model is shown any.
            samples: in place of generated answers to `sample_prompts`, for the log and samples.jsonl.
            note: a sentence for the model card.

        Returns:
            The metrics, also written to run.json.

        Raises:
            UserError: on every process, if the weights would not be saved, or were not (see `require_saved_weights`).
        """
        self.trainer = trainer
        if self.training.do_train:
            check_engine(trainer)
        self._set_previous_aside()
        try:
            return self._train_and_save(
                trainer,
                tokenizer,
                stop_ids=stop_ids,
                sample_prompts=sample_prompts,
                sample_pictures=sample_pictures,
                samples=samples,
                note=note,
            )
        except BaseException as error:
            if is_main_process():
                self._record_failure(error)
                self.previous.restore()
            if isinstance(error, Stopped):
                # torchrun asks all processes to stop as soon as one has ended.
                self.stop.installed.clear()
            raise
        finally:
            self.lock.release()
            self.stop.uninstall()

    def _record_failure(self, error: BaseException) -> None:
        """Write into run.json how this run ended, if that can still be written."""
        asked = isinstance(error, Stopped | KeyboardInterrupt)
        known = str(error) if isinstance(error, UserError | Stopped) else self._explain(error)
        reason = (known or repr(error))[:2000]
        self.record |= {"status": "stopped" if asked else "failed", "ended": _now(), "reason": reason}
        with suppress(OSError):
            self._write_record()

    def _end_stopped(self) -> NoReturn:
        """End a run that was asked to stop and has saved what it could. Call it on every process."""
        asked = self.stop.received.name if self.stop.received else "another process was asked to stop"
        saved = newest_committed(self.output_dir)
        reason = f"{asked}. {saved.name} is complete" if saved else f"{asked}. Nothing was saved yet"
        stop = Stopped(f"{reason}; the same command with --resume auto continues")
        if is_main_process():
            self._record_failure(stop)
        # If another one ended before the first has written that, torchrun would end the first.
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        raise stop

    def _stop_if_asked(self, trainer: StageTrainer) -> None:
        """End the run after its last step, if a process was asked to stop. Call it on every process."""
        if not self.stop.agreed(self.training.device):
            return
        # With the best weights loaded in place of the last ones, it is too late for a checkpoint.
        is_saved = is_committed(self.output_dir / f"checkpoint-{trainer.state.global_step}")
        if not is_saved and not self.training.load_best_model_at_end:
            trainer.save_checkpoint()
        self._end_stopped()

    def _set_previous_aside(self) -> None:
        """Move away an earlier run that this one replaces, or what it has saved after the checkpoint to resume from."""
        problem = None
        if is_main_process():
            try:
                if self.claim.replaces:
                    self.previous.set_aside()
                if self.claim.worthless:
                    self.previous.discard("it saved nothing to resume from")
                if self.resume_from and self.training.do_train:
                    set_later_aside(Path(self.resume_from), self.output_dir)
            except OSError as error:
                problem = f"the run in {self.output_dir} was not replaced: {error}"
        # The others wait here, so that they write nothing before; if one process stopped alone, they would wait for it.
        if problems := [found for found in gather_object([problem]) if found]:
            raise UserError(problems[0])

    def _train_and_save(
        self,
        trainer: Trainer,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop_ids: Sequence[int],
        sample_prompts: Sequence[list[int]],
        sample_pictures: Sequence[list[Picture]],
        samples: SampleLogger | None,
        note: str,
    ) -> dict[str, float]:
        self._install_callbacks(trainer)
        # A model from a hub is on this machine only since it was loaded.
        self.record["base"]["fingerprint"] = self.checkpoint.fingerprint
        self.require_same_contents()
        model = {"the model": self.checkpoint.fingerprint, "its configuration": self.record["contents"]["config"]}
        require_agreement(model, "Copy the same model to every host.")
        self._write_record()
        reference = getattr(trainer, "ref_model", None) or getattr(trainer, "reference", None)
        require_finite_start({self.checkpoint.name: trainer.model, "the reference": reference})
        if samples is None:
            count = self.options.sample_prompts
            prompts, pictures = list(sample_prompts)[:count], list(sample_pictures)[:count]
            samples = GreedyAnswers(trainer, tokenizer, list(stop_ids), prompts, pictures)
        before = samples.answers()
        with self.stop.deferred():
            metrics = self._train_and_evaluate(trainer)
            if self.training.do_train:
                with saving(self.output_dir, "the trained model"):
                    trainer.save_state()
                    trainer.save_model()
                require_saved_weights(self.output_dir)
                self._complete_checkpoint(trainer)
            if is_main_process():
                self._save_tokenizer_and_generation_config(trainer, tokenizer, stop_ids)
                self._write_samples(samples.shown, before, samples.answers())
                self._finish(metrics, stop_ids, note)
                self.previous.discard()
            trainer.accelerator.wait_for_everyone()
        self.host_watch.stop()
        # Otherwise threads of the process group could still run when the interpreter exits, and abort the program.
        trainer.accelerator.end_training()
        return metrics

    def _complete_checkpoint(self, trainer: Trainer) -> None:
        """Put a language model of which all weights were trained back into the checkpoint that it was taken from."""
        with on_every_process(together=True):
            if not is_main_process() or (self.output_dir / hub.ADAPTER_CONFIG).is_file():
                return
            model = trainer.accelerator.unwrap_model(trainer.model)
            try:
                with saving(self.output_dir, "the whole checkpoint"):
                    # PPO trains a critic too.
                    towers.complete(self.output_dir, getattr(model, "policy", model))
            except hub.CheckpointError as error:
                raise UserError(f"{error} {self.output_dir} holds the trained language model alone.") from error

    def _train_and_evaluate(self, trainer: Trainer) -> dict[str, float]:
        metrics: dict[str, float] = {}
        if self.training.do_train:
            metrics |= trainer.train(resume_from_checkpoint=self.resume_from).metrics
            self._stop_if_asked(trainer)
            if self.early_stopping and self.early_stopping.stopped:
                self.record["stopped_early"] = self.early_stopping.stopped
            if isinstance(trainer, StreamTrainer):
                self.record["streamed"] = trainer.seen()
        # Held-out rows are evaluated unless --do_eval False is passed explicitly.
        unwanted = "do_eval" in getattr(self.training, "given", ()) and not self.training.do_eval
        if trainer.eval_dataset is not None and not unwanted:
            metrics |= trainer.evaluate()
            if self.training.do_train:
                self._stop_if_asked(trainer)
        return metrics

    def _install_callbacks(self, trainer: Trainer) -> None:
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(MetricsFile(self.output_dir, append=self.resume_from is not None))
        trainer.add_callback(StepsOfFlags())
        trainer.add_callback(RecordInCheckpoint(self.record))
        trainer.add_callback(CheckpointCommitter(self.previous.discard, lambda: trainer.saving_since))
        steps = trainer.finite_steps
        steps.ask = lambda: self.stop.received is not None
        trainer.add_callback(StopAfterStep(self.stop, lambda: steps.answer, self._end_stopped))
        trainer.add_callback(BestMetric())
        if self.early_stopping:
            trainer.add_callback(self.early_stopping)
        trainer.add_callback(FirstStep(trainer, self.compare))
        trainer.add_callback(PlainProgress())
        if trainer.pop_callback(ProgressCallback):
            trainer.add_callback(ProgressBar())

    def _save_tokenizer_and_generation_config(
        self, trainer: Trainer, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]
    ) -> None:
        # A reward model does not generate and has none.
        generation = getattr(trainer.accelerator.unwrap_model(trainer.model), "generation_config", None)
        if generation is not None:
            generation.eos_token_id = list(stop_ids)
            generation.pad_token_id = tokenizer.pad_token_id
        if self.training.do_train:
            if generation is not None:
                generation.save_pretrained(self.output_dir)
            tokenizer.save_pretrained(self.output_dir)

    def _write_samples(self, shown: list[dict[str, str]], before: list[str], after: list[str]) -> None:
        rows = [{**sample, "before": old, "after": new} for sample, old, new in zip(shown, before, after, strict=True)]
        if rows:
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_atomically(self.output_dir / "samples.jsonl", text)
        for row in rows:
            for name, text in row.items():
                logger.info(f"{name:<8}  {_one_line(text)}")

    def _finish(self, metrics: dict[str, float], stop_ids: Sequence[int], note: str) -> None:
        self.record |= {
            "status": "finished",
            "finished": _now(),
            "seconds": round(time.time() - self.started, 1),
            "peak_memory_gb": round(peak_memory_gb(), 3),
            "metrics": metrics,
            "stop_token_ids": list(stop_ids),
        }
        if self.training.do_train:
            plot_loss(self.output_dir)
            if line := loss_line(self.output_dir):
                logger.info(line)
            write_atomically(self.output_dir / "README.md", model_card(self.record, self.output_dir, note))
        # The record comes last: it says that the run is complete.
        self._write_record()
        shown = [name for name in sorted(metrics) if name == "train_loss" or _is_result(name)]
        logger.info("  ".join(f"{name} {metrics[name]:.4g}" for name in shown))
        for command in next_commands(self.output_dir) if self.training.do_train else ():
            logger.info(f"next: {command}")

    def _explain(self, error: BaseException) -> str | None:
        """What to print for an error that is not a `UserError`, if it is known: memory that ran out."""
        args, trainer, plan, where = self.training, self.trainer, None, "before training began"
        limit = "block_size" if hasattr(args, "block_size") else "model_max_length"
        if trainer is not None and is_out_of_memory(error):
            where = f"in step {trainer.state.global_step + 1}"
            encoded = not {"input_ids", "chosen_ids"}.isdisjoint(getattr(trainer.train_dataset, "column_names", ()))
            # With no memory left, this may fail as well; then the message is a general one.
            with suppress(Exception):
                plan = plan_memory(
                    args,
                    trainer.model,
                    self.checkpoint.config,
                    length=int(max(trainer.row_lengths(trainer.train_dataset))) if encoded else getattr(args, limit),
                    sequences=getattr(trainer, "sequences_per_row", 1),
                    adapter=self.record["arguments"]["use_peft"],
                )
        given = getattr(args, "given", frozenset())
        return explain_memory(error, plan, where, self.record["arguments"], length_flag=limit, given=given)

    def _write_record(self) -> None:
        if is_main_process():
            self.output_dir.mkdir(parents=True, exist_ok=True)
            text = json.dumps(self.record, ensure_ascii=False, indent=2, default=str)
            write_atomically(self.output_dir / "run.json", text + "\n")


def next_commands(output_dir: Path) -> list[str]:
    """Commands for the next step, which run as printed."""
    folder = shlex.quote(str(output_dir))
    is_adapter = (output_dir / hub.ADAPTER_CONFIG).is_file()
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
    for name in (hub.ADAPTER_CONFIG, "config.json"):
        if (folder / name).is_file():
            config = json.loads((folder / name).read_text(encoding="utf-8"))
            kinds = [config.get("task_type"), *(config.get("architectures") or ())]
            return any(str(kind).endswith(("SEQ_CLS", "ForSequenceClassification")) for kind in kinds)
    return False


def model_card(record: dict[str, Any], output_dir: Path, note: str) -> str:
    """README.md of a checkpoint: what it is, what it was trained from and on, its results, and how to use it."""
    data = "\n".join(
        f"- {entry['side']}: `{entry['file']}`, {entry['rows']} rows, {entry['used']} used"
        + (f", {entry['shortened']} of them shortened" if entry.get("shortened") else "")
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
        "Answers of a language model can be wrong. They are not medical advice and do not replace a doctor.\n"
    )


def _require_liger(training: TrainingArguments) -> None:
    if training.use_cpu or not torch.cuda.is_available():
        raise UserError("--use_liger_kernel needs a CUDA GPU, and this run has none. Leave it out.")
    if not is_liger_kernel_available():
        raise UserError("--use_liger_kernel needs its package: pip install liger-kernel")


def _resolved(*groups: Any) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for group in groups:
        values = group.to_dict() if isinstance(group, TrainingArguments) else dataclasses.asdict(group)
        merged |= {name: value for name, value in values.items() if not name.endswith("_token")}
    return merged


def _is_result(name: str) -> bool:
    """Whether a metric measures the model, and not time or size."""
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


def _one_line(text: str, limit: int = 100) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else "…" + text[-limit:]
