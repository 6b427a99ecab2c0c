"""The trainer that pretraining and supervised fine-tuning share: TRL's, with an evaluation that counts tokens."""

from typing import Any

from medicalgpt.encoding import IGNORED

import torch
from transformers import EvalPrediction
from trl import SFTConfig, SFTTrainer


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


class TokenTrainer(SFTTrainer):
    """`trl.SFTTrainer` on encoded rows, with two differences.

    - The evaluation loss is the sum over all supervised tokens divided by their number, so it does not depend on the
      batch size, as a mean of batch means does.
    - `num_tokens` counts the tokens of packed batches too.
    """

    def __init__(self, **kwargs: Any):
        # Blocks come packed (see batching.py); TRL's own packing would not let a collator in.
        kwargs["args"].packing = False
        super().__init__(compute_metrics=token_means, **kwargs)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        before = self._total_train_tokens
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.model.training and "attention_mask" not in inputs:
            real = (inputs["input_ids"] != self.processing_class.pad_token_id).sum()
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
