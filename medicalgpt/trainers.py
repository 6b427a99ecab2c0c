"""The trainer that pretraining and supervised fine-tuning share: TRL's, with an evaluation that counts tokens."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from medicalgpt.cpu import add_cpu_head, lighten_dropout, return_freed_memory
from medicalgpt.encoding import IGNORED
from medicalgpt.errors import UserError
from medicalgpt.families import require_separate_packs
from medicalgpt.optimizers import check_optimizer, require_effect, speed_up_b

import torch
from datasets import Dataset
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import EvalPrediction
from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices
from trl import SFTConfig, SFTTrainer


def training_defaults(args: SFTConfig, *, adapter_rate: float, full_rate: float, use_peft: bool) -> None:
    """Fill in what depends on the machine or on other flags, in place.

    Args:
        args: parsed arguments; `learning_rate` of None takes one of the two rates.
        adapter_rate: learning rate for adapters.
        full_rate: learning rate for all weights.
    """
    check_optimizer(args, use_peft)
    if args.learning_rate is None:
        args.learning_rate = adapter_rate if use_peft else full_rate
    if "eval_on_start" not in args.given and args.eval_strategy != "no":
        args.eval_on_start = True
    # Rows are encoded and measured already; the trainer neither cuts nor drops any.
    args.max_length = None
    args.dataset_kwargs = {"skip_prepare_dataset": True}


# Several processes on CPUs have the devices cpu:0, cpu:1, …, to which torch.load cannot load an optimizer's state.
torch.serialization.register_package(
    0, lambda storage: None, lambda storage, place: storage if place.startswith("cpu:") else None
)


def sequence_lengths(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """For each token the number of tokens of its own sequence, whatever it is padded or packed with.

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
    """NEFTune (https://arxiv.org/abs/2310.05914): within it, what the embedding gives has uniform noise on it.

    The noise is at most `alpha / sqrt(length x width)`, where the length is that of the token's own sequence. The
    library's hook takes the length of the whole row, so that padding and packing would make the noise smaller.

    Args:
        model: with or without adapters.
        inputs: the batch that the model will be given.
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


class EpochSampler(LengthGroupedSampler):
    """Rows of like length together, in an order that follows from seed and epoch alone.

    The library's sampler draws from the global generator, so that a resumed run would not see the rows that the
    stopped one had left, but some of them twice and others never.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


class TokenTrainer(SFTTrainer):
    """`trl.SFTTrainer` on encoded rows, with six differences.

    - The evaluation loss is the sum over all supervised tokens divided by their number, so it does not depend on the
      batch size, as a mean of batch means does.
    - `num_tokens` counts the tokens of packed batches too, and goes on where a resumed run had stopped.
    - NEFTune's noise is scaled by each sequence's own length (see `embedding_noise`).
    - The order of rows grouped by length depends on seed and epoch only (see `EpochSampler`).
    - On a CPU only supervised positions go through the LM head, and dropout keeps less (see `cpu.py`).
    - `loraplus_lr_ratio` gives the B matrices a learning rate of their own (see `optimizers.py`).
    """

    def __init__(self, *, loraplus_lr_ratio: float | None = None, **kwargs: Any):
        if isinstance(kwargs["model"].get_output_embeddings(), BaseTunerLayer):
            raise UserError(
                "an adapter on the head would not be trained: the loss multiplies by the head's own weight. Leave the "
                "head out of --target_modules; --modules_to_save lm_head trains it in full."
            )
        if kwargs["args"].packing:
            require_separate_packs(kwargs["model"], kwargs["data_collator"])
        # Blocks come packed (see batching.py); TRL's own packing would not let a collator in.
        kwargs["args"].packing = False
        super().__init__(compute_metrics=token_means, **kwargs)
        self.neftune_noise_alpha = None
        add_cpu_head(self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model)
        if self.args.device.type == "cpu":
            lighten_dropout(self.model)
            return_freed_memory()
        self.loraplus_lr_ratio = loraplus_lr_ratio

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer that `--optim` names.

        Raises:
            UserError: it cannot be built, or it has no use for one of the flags given.
        """
        if self.optimizer is None:
            try:
                super().create_optimizer(model)
            except (ImportError, NotImplementedError, ValueError) as error:
                raise UserError(f"--optim {self.args.optim.value} cannot be used: {error}") from error
            if self.loraplus_lr_ratio is not None:
                speed_up_b(self.optimizer, self.model if model is None else model, self.loraplus_lr_ratio)
            require_effect(self.args, self.optimizer)
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> torch.utils.data.Sampler | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        dataset = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return EpochSampler(batch, [len(ids) for ids in dataset["input_ids"]], seed)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self.model.training:
            # The trainer's state is part of a checkpoint, TRL's own count is not.
            self._total_train_tokens = self.state.num_input_tokens_seen
        before = self._total_train_tokens
        alpha = self.args.neftune_noise_alpha if self.model.training else None
        with embedding_noise(self.model, inputs, alpha):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.model.training and "attention_mask" not in inputs:
            real = ((inputs["input_ids"] != self.processing_class.pad_token_id) | (inputs["labels"] != IGNORED)).sum()
            self._total_train_tokens = before + self.accelerator.gather_for_metrics(real).sum().item()
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        if self.model.training:
            self.state.num_input_tokens_seen = self._total_train_tokens
        return loss

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """Per row (batch, 3): summed loss, supervised tokens, tokens predicted right."""
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
        return {"loss": float("nan"), "mean_token_accuracy": float("nan")}
    return {
        "loss": float(loss / tokens),
        "mean_token_accuracy": float(right / tokens),
        "supervised_tokens": int(tokens),
    }
