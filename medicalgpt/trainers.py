"""The trainer that pretraining and supervised fine-tuning share: TRL's, with an evaluation that counts tokens."""

import functools
import types
from collections.abc import Iterator
from typing import Any

from medicalgpt.encoding import IGNORED

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import EvalPrediction, PreTrainedModel
from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput


def training_defaults(args: SFTConfig, *, adapter_rate: float, full_rate: float, use_peft: bool) -> None:
    """Fill in what depends on the machine or on other flags, in place.

    Args:
        args: parsed arguments; `learning_rate` of None takes one of the two rates.
        adapter_rate: learning rate for adapters.
        full_rate: learning rate for all weights.
    """
    if args.learning_rate is None:
        args.learning_rate = adapter_rate if use_peft else full_rate
    if "eval_on_start" not in args.given and args.eval_strategy != "no":
        args.eval_on_start = True
    # Rows are encoded and measured already; the trainer neither cuts nor drops any.
    args.max_length = None
    args.dataset_kwargs = {"skip_prepare_dataset": True}


# Settings by which some families change their logits after the head; TRL's own code knows each of them.
LOGIT_SETTINGS = (
    "final_logit_softcapping",
    "logit_scale",
    "output_multiplier",
    "lm_head_multiplier",
    "logits_scaling",
    "output_router_logits",
)


def add_cpu_head(model: PreTrainedModel) -> None:
    """Send only supervised positions through the LM head, on a CPU too.

    TRL's fused head does so on GPUs; on a CPU it scores every position and computes the logits once more in the
    backward pass, which costs a third of a step of a small model. Models that change their logits after the head keep
    TRL's way.

    Args:
        model: the causal model itself, without wrappers, with TRL's `fused_lm_head` forward.
    """
    config = model.config.get_text_config()
    if any(getattr(config, name, None) not in (None, False, 1.0) for name in LOGIT_SETTINGS):
        return
    fused_forward = model.forward

    # The signature is kept, since `generate` checks its arguments against it.
    @functools.wraps(type(model).forward)
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        on_cpu = self.get_output_embeddings().weight.device.type == "cpu"
        if not kwargs.get("fused_lm_head") or not on_cpu or kwargs.get("shift_labels") is not None:
            return fused_forward(*args, **kwargs)
        for name in ("fused_lm_head", "shift_labels", "num_items_in_batch"):
            kwargs.pop(name, None)
        labels = kwargs.pop("labels")[:, 1:]
        kwargs["use_cache"] = False
        hidden = self.base_model(*args, **kwargs).last_hidden_state[:, :-1]
        mask = labels != IGNORED
        scores = self.get_output_embeddings()(hidden[mask]).float().log_softmax(dim=-1)
        targets = labels[mask]
        with torch.no_grad():
            entropy = -(scores.exp() * scores).sum(dim=-1)
            is_top1 = (scores.argmax(dim=-1) == targets).float()
        log_probs = scores.gather(1, targets[:, None])[:, 0]

        def spread(values: torch.Tensor) -> torch.Tensor:
            return values.new_zeros(mask.shape).masked_scatter(mask, values)

        return FusedCausalLMOutput(
            loss=-log_probs.sum() / mask.sum().clamp(min=1),
            log_probs=spread(log_probs),
            entropy=spread(entropy),
            is_top1=spread(is_top1),
            label_mask=mask,
        )

    model.forward = types.MethodType(forward, model)


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
    """`trl.SFTTrainer` on encoded rows, with four differences.

    - The evaluation loss is the sum over all supervised tokens divided by their number, so it does not depend on the
      batch size, as a mean of batch means does.
    - `num_tokens` counts the tokens of packed batches too.
    - The order of rows grouped by length depends on seed and epoch only (see `EpochSampler`).
    - On a CPU only supervised positions go through the LM head (see `add_cpu_head`).
    """

    def __init__(self, **kwargs: Any):
        # Blocks come packed (see batching.py); TRL's own packing would not let a collator in.
        kwargs["args"].packing = False
        super().__init__(compute_metrics=token_means, **kwargs)
        add_cpu_head(self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> torch.utils.data.Sampler | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        dataset = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return EpochSampler(batch, [len(ids) for ids in dataset["input_ids"]], seed)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        before = self._total_train_tokens
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.model.training and "attention_mask" not in inputs:
            real = ((inputs["input_ids"] != self.processing_class.pad_token_id) | (inputs["labels"] != IGNORED)).sum()
            self._total_train_tokens = before + self.accelerator.gather_for_metrics(real).sum().item()
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
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
