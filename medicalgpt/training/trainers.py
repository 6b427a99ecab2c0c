"""The base of the stages' trainers, and the trainers of token-level stages and of preference pairs."""

import math
import random
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from medicalgpt.args import LoraArguments
from medicalgpt.data.encoding import IGNORED
from medicalgpt.data.lengths import list_lengths
from medicalgpt.errors import UserError
from medicalgpt.logs import is_main_process, notice
from medicalgpt.models.families import require_loss, require_separate_packs
from medicalgpt.models.vision import Vision
from medicalgpt.readers.problems import Place
from medicalgpt.training.callbacks import DUE_EVALUATION, DueEvaluation
from medicalgpt.training.checkpoints import load_renamed_weights, prepare_folder
from medicalgpt.training.cpu import add_cpu_head, replace_lora_dropout, return_freed_memory
from medicalgpt.training.disk import checkpoint_bytes, on_every_process, require_space, saving
from medicalgpt.training.engines import check_accelerator_config, gather_weights
from medicalgpt.training.finite import BatchRow, FiniteSteps, find_places, require_finite_training
from medicalgpt.training.muon import MuonWithAdamW, muon_matrices
from medicalgpt.training.optimizers import apply_loraplus, check_flags_applied, check_optimizer
from medicalgpt.training.row_order import (
    FillerCollator,
    LengthGroups,
    MarkedRows,
    StepBatches,
    data_parallel_rank,
    exclude_rows,
    exclude_tokens,
    is_filler,
    order_rows,
)
from medicalgpt.training.schedules import build_schedule, check_schedule, continue_schedule, steps_planned

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.utils.data import DataLoader
from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_pt_utils import nested_gather
from transformers.trainer_utils import seed_worker
from trl import SFTTrainer
from trl.models import get_act_offloading_ctx_manager
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head, disable_dropout_in_model


def training_defaults(args: TrainingArguments, *, adapter_rate: float, full_rate: float, use_peft: bool) -> None:
    """Set in place what depends on the machine or on other flags.

    Args:
        args: parsed arguments, of `StageDefaults` and of transformers or TRL; a `learning_rate` of None becomes one of
            the two below.
        adapter_rate: learning rate for adapters.
        full_rate: learning rate for full fine-tuning.

    Raises:
        UserError: an optimizer or a schedule that cannot be used as requested.
    """
    check_optimizer(args, use_peft)
    check_accelerator_config(args)
    if args.learning_rate is None:
        args.learning_rate = adapter_rate if use_peft else full_rate
    check_schedule(args)
    if "eval_on_start" not in args.given and args.eval_strategy != "no":
        args.eval_on_start = True
    if "metric_for_best_model" in args.given and not args.eval_on_start:
        raise UserError(
            f"--metric_for_best_model {args.metric_for_best_model} is checked by an evaluation before the first step. "
            "Omit --eval_on_start False."
        )
    # Rows are encoded and measured already; the trainer must neither truncate nor drop any.
    args.max_length = None
    args.dataset_kwargs = {"skip_prepare_dataset": True}


def disable_lora_dropout(args: TrainingArguments, lora: LoraArguments) -> None:
    """Set `lora.lora_dropout` to 0 under `--disable_dropout`, the default of stages that compare log-probabilities."""
    if not args.disable_dropout:
        return
    if "lora_dropout" in getattr(lora, "given", ()) and lora.lora_dropout:
        notice(
            f"--lora_dropout {lora.lora_dropout} is not used: dropout is disabled so that two passes over an answer "
            "give the same log-probability. To train with it, add --disable_dropout False."
        )
    lora.lora_dropout = 0.0


# Several CPU processes have the devices cpu:0, cpu:1, …, to which torch.load cannot load an optimizer's state.
torch.serialization.register_package(
    0, lambda storage: None, lambda storage, place: storage if place.startswith("cpu:") else None
)


def sequence_lengths(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """For each token the length of its own sequence, without padding and without sequences packed with it.

    Args:
        inputs: a batch of `batching.Collator`.

    Returns:
        (batch, length)
    """
    if "attention_mask" in inputs:
        return inputs["attention_mask"].sum(dim=1, keepdim=True).expand_as(inputs["input_ids"])
    sequence = (inputs["position_ids"] == 0).cumsum(dim=1)
    counts = sequence.new_zeros(len(sequence), sequence.max() + 1)
    return counts.scatter_add(1, sequence, torch.ones_like(sequence)).gather(1, sequence)


@contextmanager
def embedding_noise(model: torch.nn.Module, inputs: dict[str, torch.Tensor], alpha: float | None) -> Iterator[None]:
    """NEFTune (https://arxiv.org/abs/2310.05914): within this context the embedding adds uniform noise to its output.

    The noise is at most `alpha / sqrt(length x width)`, with the length of the token's own sequence. The library's hook
    uses the length of the padded or packed row, which would make the noise smaller.

    Args:
        model: with or without adapters.
        inputs: the batch that the model will receive.
        alpha: None for no noise.
    """
    if not alpha:
        yield
        return
    embedding = model.get_input_embeddings()
    lengths = sequence_lengths(inputs)

    def add_noise(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        bound = alpha / (lengths * output.shape[-1]).sqrt()
        return output + torch.empty_like(output).uniform_(-1, 1) * bound.to(output.dtype)[..., None]

    hook = embedding.register_forward_hook(add_noise)
    try:
        yield
    finally:
        hook.remove()


class StageTrainer(Trainer):
    """How every stage's trainer differs from transformers' and TRL's. List it before TRL's trainer among the bases.

    - The rows of a step depend neither on the number of processes nor on a resume (see `row_order.py`).
    - `num_tokens`, the mean loss and the time of the run continue after a resume, and the schedule follows the number
      of steps of the resumed run.
    - `loraplus_lr_ratio` gives the B matrices a separate learning rate (see `optimizers.py`).
    - On a CPU, dropout keeps less for the backward pass (see `cpu.py`).
    - A step whose loss or gradient is not finite is not taken, and weights that are not finite are not saved (see
      `finite.py`).

    Attributes:
        encoded: the rows of `train_dataset` before they were packed, in which the rows of a batch are looked up.
        vision: of a model that is shown images; its settings are saved with the model.
    """

    def __init__(self, *, loraplus_lr_ratio: float | None = None, vision: Vision | None = None, **kwargs: Any):
        head = kwargs["model"].get_output_embeddings()
        if isinstance(head, BaseTunerLayer):
            raise UserError(
                "an adapter on the head would not be trained: the loss multiplies by the head's own weight. Remove the "
                "head from --target_modules; --modules_to_save lm_head trains it in full."
            )
        exact = {one: one.data for one in kwargs["model"].parameters() if one.requires_grad}
        super().__init__(**kwargs)
        # TRL rounds the adapters of quantized models to bfloat16, which would change one that training continues.
        for parameter, data in exact.items():
            if parameter.dtype != data.dtype:
                parameter.data = data.to(parameter.device)
        if self.args.device.type == "cpu":
            replace_lora_dropout(self.model)
            return_freed_memory()
        self.loraplus_lr_ratio, self.vision = loraplus_lr_ratio, vision
        self.encoded = self.train_dataset
        self._seconds_before, self._training_began = 0.0, time.time()
        # When the last checkpoint began to be saved; see `CheckpointCommitter`.
        self.saving_since = time.monotonic()
        self.add_callback(_RunFigures(self))
        self.add_callback(DueEvaluation())
        self.resumed_from: str | None = None
        self.finite_steps = FiniteSteps(self)
        self.add_callback(self.finite_steps)

    # How a batch is changed that must not count (see `row_order.StepBatches`).
    exclude = staticmethod(exclude_tokens)

    @staticmethod
    def row_lengths(dataset: Dataset) -> np.ndarray:
        """Tokens of each row, by which rows are grouped."""
        return list_lengths(dataset, "input_ids")

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer that `--optim` names.

        Raises:
            UserError: it cannot be built, or ignores one of the flags given.
        """
        if self.optimizer is None:
            try:
                super().create_optimizer(model)
            except (ImportError, NotImplementedError, ValueError) as error:
                raise UserError(f"--optim {self.args.optim.value} cannot be used: {error}") from error
            if self.args.use_muon:
                matrices = muon_matrices(self.model if model is None else model)
                self.optimizer = MuonWithAdamW(self.optimizer.param_groups, matrices)
            self.set_rates(self.optimizer)
            if self.loraplus_lr_ratio is not None:
                apply_loraplus(self.optimizer, self.model if model is None else model, self.loraplus_lr_ratio)
            check_flags_applied(self.args, self.optimizer)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """The schedule that `--lr_scheduler_type` names.

        Raises:
            UserError: it does not fit into this number of steps.
        """
        if self.lr_scheduler is None:
            self.lr_scheduler = build_schedule(
                self.args, self.optimizer if optimizer is None else optimizer, num_training_steps
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self.resumed_from = checkpoint
        if checkpoint is not None:
            continue_schedule(self.lr_scheduler, steps_planned(Path(checkpoint)), self.state.max_steps)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if not self.is_sharded:
            load_renamed_weights(self.model if model is None else model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if not self.is_sharded:
            load_renamed_weights(self.model, Path(self.state.best_model_checkpoint))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing. TRL writes a README.md with each checkpoint; ours is written by a run that has finished."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.saving_since = time.monotonic()
        # The loss of the steps since the last log is still on each process.
        unlogged = nested_gather(self._tr_loss, self.args.parallel_mode).mean().item()
        seconds = self._seconds_before + time.time() - self._training_began
        self.state.stateful_callbacks[RUN_FIGURES] = {
            "loss_sum": self._total_loss_scalar + unlogged,
            "seconds": round(seconds, 3),
        }
        output_dir, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        with on_every_process(together=True):
            if is_main_process():
                prepare_folder(output_dir / name)
                needed = checkpoint_bytes(output_dir, self.model, self.optimizer, sharded=self.is_sharded)
                require_space(output_dir, needed, name)
        # Each process writes into that folder.
        self.accelerator.wait_for_everyone()
        # With a best checkpoint, the library lets the processes wait for each other there.
        together = not self.is_sharded and not self.state.best_global_step
        with on_every_process(together=together), saving(output_dir, name):
            super()._save_checkpoint(model, trial)

    @property
    def is_sharded(self) -> bool:
        """Whether saving a checkpoint is work of all processes, which wait for each other in it."""
        return self.is_deepspeed_enabled or self.is_fsdp_enabled

    def save_checkpoint(self) -> None:
        """Save a checkpoint of the step that was trained last, as it is saved in training. Call it on every process."""
        self._save_checkpoint(self.model, None)
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _evaluate(self, trial: Any, ignore_keys_for_eval: list[str] | None, skip_scheduler: bool = False) -> Any:
        # Before the first step the library evaluates without consequences; one that is still due has them.
        is_due = DUE_EVALUATION in self.state.stateful_callbacks
        with _restored_random_state(self.args.device):
            metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler and not is_due)
        if skip_scheduler and is_due and self._determine_best_metric(metrics, trial):
            self.state.best_model_checkpoint = self.resumed_from
        self.state.stateful_callbacks.pop(DUE_EVALUATION, None)
        return metrics

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Early stopping may end a resumed run at its first evaluation; the library would take one step more.
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        # Seconds, and what is divided by them, are of the whole run, as if it had never been stopped.
        return super()._finalize_training(trial, num_train_samples, start_time - self._seconds_before)

    def training_step(self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.finite_steps.record(inputs, num_items_in_batch, loss)
        return loss

    # The only place that knows the norm before the step: `on_pre_optimizer_step` does not receive it, and to compute it
    # again would cost another pass over all gradients.
    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm)
        self.finite_steps.check(model, grad_norm)
        return grad_norm

    def places_of(self, number: int, rows: Sequence[BatchRow]) -> list[list[Place]]:
        """Where the rows of a batch are in the files.

        Args:
            number: of the batch in the current step, from 0.
            rows: of that batch.
        """
        return find_places(rows, self.encoded)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, in a checkpoint or as the result, complete also where FSDP shards it.

        Call it on every process.

        Raises:
            UserError: on every process, if a trained weight is not finite.
        """
        require_finite_training(self)
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            if self.vision and self.args.should_save:
                self.vision.save(Path(output_dir or self.args.output_dir))
            return
        # The library writes nothing if each process saves its own part of a checkpoint (SHARDED_STATE_DICT).
        weights = gather_weights(self.model)
        if self.args.should_save:
            self._save(output_dir, state_dict=weights)

    def try_loss(self, model: PreTrainedModel | PeftModel, routed: bool = False) -> None:
        """Refuse a model of which the loss cannot be computed (see `require_loss`)."""
        with self.compute_loss_context_manager():
            require_loss(model.get_base_model() if isinstance(model, PeftModel) else model, routed)

    def set_rates(self, optimizer: torch.optim.Optimizer) -> None:
        """Hook for stages with a second learning rate; the ratio of LoRA+ multiplies it."""

    def train_batches(self) -> StepBatches:
        """The row indices of this process's batches."""
        args = self.args
        rank, processes = data_parallel_rank(self.accelerator)
        seed = args.seed if args.data_seed is None else args.data_seed
        order = order_rows(
            self.train_dataset,
            args.train_sampling_strategy,
            seed,
            lengths=lambda: self.row_lengths(self.train_dataset),
            group=self._train_batch_size * args.gradient_accumulation_steps * processes,
        )
        return StepBatches(
            order,
            self._train_batch_size,
            args.gradient_accumulation_steps,
            rank=rank,
            processes=processes,
            drop_last=args.dataloader_drop_last,
        )

    def get_train_dataloader(self) -> DataLoader:
        """This process's batches of an epoch, on its device."""
        args = self.args
        loader = DataLoader(
            MarkedRows(self._remove_unused_columns(self.train_dataset, description="training")),
            batch_sampler=self.train_batches(),
            collate_fn=FillerCollator(self.data_collator, self.exclude),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            prefetch_factor=args.dataloader_prefetch_factor,
            in_order=args.dataloader_in_order,
            worker_init_fn=partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index),
        )
        # The batches are those of this process already; accelerate must not distribute them again.
        return prepare_data_loader(
            loader, self.accelerator.device, num_processes=1, process_index=0, put_on_device=True
        )

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """Held-out batches, of all rows: `--dataloader_drop_last` is for training."""
        drops, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drops

    def _get_eval_sampler(self, eval_dataset: Dataset) -> torch.utils.data.Sampler | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_eval_sampler(eval_dataset)
        return LengthGroups(self.row_lengths(eval_dataset), self.args.eval_batch_size, seed=0)

    def _init_training_state(self, max_steps: int, *others: Any) -> tuple[int, int]:
        done, batches = super()._init_training_state(max_steps, *others)
        # A run that has all its steps begins no further epoch; the library would take a step before it counts them.
        return (sys.maxsize, 0) if self.state.global_step >= max_steps else (done, batches)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if not self.model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        # The trainer's state is part of a checkpoint, TRL's own count is not.
        self._total_train_tokens = self.state.num_input_tokens_seen
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.state.num_input_tokens_seen = self._total_train_tokens
        return loss


@contextmanager
def _restored_random_state(device: torch.device) -> Iterator[None]:
    """Whatever draws random numbers within this context, training draws the same afterwards as without it."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [] if device.type in ("cpu", "mps") else [device]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        yield
    random.setstate(python)
    np.random.set_state(numpy)


# Where `TrainerState`, which is saved as trainer_state.json, keeps figures of the run for a resume.
RUN_FIGURES = "run_figures"


class _RunFigures(TrainerCallback):
    """Continue the sum of all losses and the time of a run that is resumed; the library would begin at 0."""

    def __init__(self, trainer: StageTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, figures = self.trainer, state.stateful_callbacks.get(RUN_FIGURES)
        trainer._training_began, trainer._seconds_before = time.time(), 0.0
        if figures:
            trainer._total_loss_scalar, trainer._seconds_before = figures["loss_sum"], figures["seconds"]
        elif state.global_step:
            # A checkpoint of an earlier version: the mean over the steps that were logged.
            trainer._total_loss_scalar = _logged_mean(state.log_history) * state.global_step


def _logged_mean(history: list[dict[str, float]]) -> float:
    """The mean loss of all logged steps; 0 if none was logged."""
    total, last = 0.0, 0
    for event in history:
        if "loss" in event:
            total, last = total + event["loss"] * (event["step"] - last), event["step"]
    return total / last if last else 0.0


class TokenTrainer(StageTrainer, SFTTrainer):
    """`trl.SFTTrainer` on encoded rows, with the changes of `StageTrainer` and these.

    - The evaluation loss is the sum over all supervised tokens divided by their number, which unlike a mean of batch
      means does not depend on the batch size.
    - `num_tokens` counts the tokens of all processes and of packed batches, without padding.
    - NEFTune's noise is scaled by each sequence's own length (see `embedding_noise`).
    - On a CPU only supervised positions go through the LM head (see `cpu.py`).
    """

    def __init__(self, **kwargs: Any):
        if kwargs["args"].packing:
            require_separate_packs(kwargs["model"], kwargs["data_collator"])
        # Blocks are packed already (see batching.py); TRL's packing does not allow a collator.
        kwargs["args"].packing = False
        super().__init__(compute_metrics=token_means, **kwargs)
        self.neftune_noise_alpha = None
        add_cpu_head(self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model)
        self.try_loss(self.model, routed=self.aux_loss_enabled)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        before = self.state.num_input_tokens_seen
        alpha = self.args.neftune_noise_alpha if self.model.training else None
        with embedding_noise(self.model, inputs, alpha):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
        if not self.model.training:
            return loss
        # TRL counts fillers, and not the padding of packed batches; and at the end of an epoch not every process.
        mask, filler = inputs.get("attention_mask"), is_filler(inputs)
        if mask is None:
            mask = (inputs["input_ids"] != self.processing_class.pad_token_id) | (inputs["labels"] != IGNORED)
        real = mask.sum() * (not filler)
        self.state.num_input_tokens_seen = before + int(self.accelerator.reduce(real))
        self._metrics["train"]["num_tokens"] = [self.state.num_input_tokens_seen]
        # Without tokens, the load balancing loss of a mixture of experts is left.
        return loss * 0 if filler else loss

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """Per row (batch, 3): summed loss, supervised tokens, correctly predicted tokens."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs, fused_lm_head=True)
        sums = torch.stack(
            [
                -outputs.log_probs.double().sum(dim=1),
                (inputs["labels"][:, 1:] != IGNORED).sum(dim=1).double(),
                outputs.is_top1.double().sum(dim=1),
            ],
            dim=1,
        )
        return None, sums, sums


def token_means(prediction: EvalPrediction) -> dict[str, float]:
    """Means over supervised tokens from the per-row sums (rows, 3) of `TokenTrainer.prediction_step`."""
    loss, tokens, right = prediction.predictions.sum(axis=0)
    if tokens == 0:
        return {"loss": float("nan"), "perplexity": float("nan"), "mean_token_accuracy": float("nan")}
    return {
        "loss": float(loss / tokens),
        "perplexity": math.exp(min(loss / tokens, 700.0)),
        "mean_token_accuracy": float(right / tokens),
        "supervised_tokens": int(tokens),
    }


class PairTrainer(StageTrainer):
    """`transformers.Trainer` on preference pairs. Training and evaluation share `pair_values`, which a stage defines.

    A batch holds the chosen answers first, then the rejected ones in the same order. Loss, gradient and logged metrics
    are means over pairs: of a step, since the last log, or of the held-out data. None of them depends on how the pairs
    are distributed over batches and processes.
    """

    sequences_per_row = 2
    exclude = staticmethod(exclude_rows)

    def __init__(self, **kwargs: Any):
        args, model = kwargs["args"], kwargs["model"]
        # The collator selects its columns; the library would go by the arguments of the model.
        args.remove_unused_columns = False
        if args.use_liger_kernel:
            # Liger's own loss would replace the forward pass that `add_log_prob_head` extends.
            args.liger_kernel_config = {**(args.liger_kernel_config or {}), "fused_linear_cross_entropy": False}
        if args.gradient_checkpointing and isinstance(model, PeftModel):
            # Reentrant checkpointing needs inputs with a gradient, and ZeRO-3 with an adapter needs it to be reentrant.
            model.enable_input_require_grads()
            if is_deepspeed_zero3_enabled():
                args.gradient_checkpointing_kwargs = {
                    **(args.gradient_checkpointing_kwargs or {}),
                    "use_reentrant": True,
                }
        super().__init__(compute_metrics=self._pair_means, **kwargs)
        if self.args.n_gpu > 1:
            raise UserError(
                f"a single process sees {self.args.n_gpu} GPUs. Start one process per GPU, as with torchrun "
                f"--nproc_per_node {self.args.n_gpu}, or make one visible, as with CUDA_VISIBLE_DEVICES=0."
            )
        # Losses are divided by the pairs of a step (see `get_batch_samples`), so not by its number of batches as well.
        self.model_accepts_loss_kwargs = True
        if self.args.disable_dropout:
            disable_dropout(self.model)
        offloads = getattr(self.args, "activation_offloading", False)
        self._offloading = get_act_offloading_ctx_manager(model=self.model) if offloads else nullcontext()
        self._pair_columns: list[str] = []
        self._sums: dict[str, float] = defaultdict(float)

    def pair_values(self, model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`loss` and the metrics to log, each of shape (pairs,).

        Args:
            inputs: `input_ids`, `attention_mask` and `completion_mask`, 1 on the tokens of answers, each of shape
                (2 x pairs, length).
        """
        raise NotImplementedError

    @staticmethod
    def row_lengths(dataset: Dataset) -> np.ndarray:
        """Tokens of the longer of both sequences of each pair."""
        prompts, chosen, rejected = (list_lengths(dataset, f"{name}_ids") for name in ("prompt", "chosen", "rejected"))
        return prompts + np.maximum(chosen, rejected)

    def get_batch_samples(self, *args: Any) -> tuple[list[dict[str, torch.Tensor]], int]:
        """The batches of a step on this process, and the number of pairs of the step on all of them."""
        batches, _ = super().get_batch_samples(*args)
        pairs = sum(len(batch["input_ids"]) // 2 for batch in batches if not is_filler(batch))
        pairs = self.accelerator.reduce(torch.tensor(pairs, device=self.args.device))
        return batches, max(int(pairs), 1)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with self._offloading:
            return super().training_step(*args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: int | None = None
    ) -> torch.Tensor:
        """The batch's share of the mean over the pairs of a step; the metrics are kept for the next log.

        Args:
            num_items_in_batch: pairs of the step, of all its batches on all processes; None for those of this batch.
        """
        values = self.pair_values(model, inputs)
        loss = values.pop("loss")
        values["pairs"] = torch.ones_like(loss)
        values["tokens"] = inputs["attention_mask"].sum(dim=1).view(2, -1).sum(dim=0)
        sums = torch.stack([column.detach().double().sum() for column in values.values()])
        if is_filler(inputs):
            sums, loss = torch.zeros_like(sums), loss * 0
        for name, total in zip(values, self.accelerator.reduce(sums).tolist(), strict=True):
            self._sums[name] += total
        # The trainer's state is part of a checkpoint, so that the count continues after a resume.
        self.state.num_input_tokens_seen += int(self._sums.pop("tokens"))
        if num_items_in_batch is None:
            return loss.mean()
        # Gradients are averaged over the processes, while this is a share of the sum over all of them.
        return loss.sum() / num_items_in_batch * self.accelerator.num_processes

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._sums:
            pairs = self._sums.pop("pairs")
            logs |= {name: total / pairs for name, total in self._sums.items()}
            logs["num_tokens"] = self.state.num_input_tokens_seen
            self._sums.clear()
        super().log(logs, start_time)

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """Per pair (pairs, values): the columns of `pair_values`."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            values = self.pair_values(model, inputs)
        self._pair_columns = list(values)
        table = torch.stack([column.double() for column in values.values()], dim=1)
        return None, table, table

    def _pair_means(self, prediction: EvalPrediction) -> dict[str, float]:
        means = prediction.predictions.mean(axis=0)
        return dict(zip(self._pair_columns, map(float, means), strict=True))


def score_answers(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> FusedCausalLMOutput:
    """One forward pass of a model with `add_log_prob_head`; the prompts are not scored.

    Args:
        inputs: as for `PairTrainer.pair_values`.
        options: further arguments of the model.

    Returns:
        Columns of shape (2 x pairs, length - 1), 0 except on tokens of answers.
    """
    return model(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        labels=inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORED),
        fused_lm_head=True,
        use_cache=False,
        **options,
    )


def add_log_prob_head(
    model: PreTrainedModel | PeftModel, *, measures: tuple[str, ...] = (), dense_on_cpu: bool = True
) -> None:
    """Let a causal model return log-probabilities of its labels, as `FusedCausalLMOutput`, without all logits at once.

    Args:
        model: with or without an adapter; call it with `labels` and `fused_lm_head=True`.
        measures: fields of `FusedCausalLMOutput` to compute besides `log_probs`.
        dense_on_cpu: on a CPU send only supervised positions through the head (see `cpu.py`), which gives no
            `log_sum_sq_probs` and no `aux_loss`.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    add_fused_lm_head(base, outputs=("log_probs", *measures))
    if dense_on_cpu:
        add_cpu_head(base, measured=bool(measures))


def disable_dropout(model: torch.nn.Module) -> None:
    """Set the dropout of every module to 0, permanently."""
    disable_dropout_in_model(model)
    # Attention modules hold theirs as a number, which TRL does not look for.
    for module in model.modules():
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
