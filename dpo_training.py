"""Direct preference optimization (DPO): the model learns from preference pairs, two answers of which one is better.

The log-probability of the chosen answer rises relative to that of the rejected one, both measured against a frozen
reference model (https://arxiv.org/abs/2305.18290). Neither a reward model nor sampling is needed. The reference is the
model that training starts from; with an adapter it is the same weights with the adapter off, so it needs no memory.

    python dpo_training.py --model_name_or_path outputs/sft-merged --train_file_dir data/reward --output_dir outputs/dpo
    torchrun --nproc_per_node 2 dpo_training.py --model_name_or_path outputs/sft-merged \\
        --train_file_dir data/reward --output_dir outputs/dpo --load_in_4bit True --qlora True

Data (.jsonl or .json), format recognised per row; data/README.md shows all formats:

    {"conversations": [{"from": "human", "value": "..."}], "chosen": "the better answer", "rejected": "the worse one"}

In --output_dir: the adapter (or all weights with --use_peft False), the tokenizer with its chat template,
generation_config.json, run.json, metrics.jsonl, samples.jsonl, loss.png and README.md. Guide: docs/dpo_training.md
"""

from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

from medicalgpt.args import (
    AttentionArguments,
    DataArguments,
    LoraArguments,
    ModelArguments,
    PairArguments,
    RunArguments,
    StageDefaults,
)
from medicalgpt.data.encoding import Pair, encode_preference, render_prompts
from medicalgpt.data.prepared import load_and_encode
from medicalgpt.errors import UserError, run_main
from medicalgpt.formats.conversion import to_preference
from medicalgpt.models import adapters, loading
from medicalgpt.models.hub import Adapter
from medicalgpt.models.templating import stop_token_ids
from medicalgpt.parser import parse_args
from medicalgpt.training.engines import is_fsdp_requested
from medicalgpt.training.preference_losses import (
    DIVERGENCES,
    LOSSES,
    MARGIN_LOSSES,
    SMOOTHED_LOSSES,
    PairLogProbs,
    answer_log_probs,
    dpo_loss,
)
from medicalgpt.training.references import SyncReference, copy_policy, load_reference, place_reference
from medicalgpt.training.runs import Run
from medicalgpt.training.trainers import (
    PairTrainer,
    add_log_prob_head,
    disable_dropout,
    disable_lora_dropout,
    score_answers,
    training_defaults,
)
from template import apply_template

import torch
from datasets import Dataset
from datasets.utils import tqdm
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl import DPOConfig
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import use_adapter


@dataclass
class PreferenceArguments(PairArguments, StageDefaults, DPOConfig):
    """Changes to TRL's `DPOConfig`."""

    HELP: ClassVar[dict[str, str]] = {
        "beta": "Strength of the constraint to the reference model; the higher, the closer the model stays to it.",
        "loss_weights": "A weight for each loss of --loss_type. Unset: 1 each.",
        "label_smoothing": "Assumed share of pairs whose labels are swapped, from 0 to below 0.5.",
        "f_alpha_divergence_coef": "Alpha of --f_divergence_type alpha_divergence.",
        "ld_alpha": "LD-DPO (https://arxiv.org/abs/2409.06411): weight, from 0 to 1, of the tokens by which the longer "
        "answer exceeds the shorter one.",
        "use_weighting": "WPO (https://arxiv.org/abs/2406.11827): weight each pair by its probability under the model.",
        "discopop_tau": "Temperature of --loss_type discopop.",
        "precompute_ref_log_probs": "Compute the reference's log-probabilities of all pairs before training, then drop "
        "the reference.",
        "precompute_ref_batch_size": "Batch size of that computation, in pairs. Default: that of training or "
        "evaluation.",
        "sync_ref_model": "TR-DPO (https://arxiv.org/abs/2404.09656): update the reference towards the model. Full "
        "fine-tuning only.",
        "ref_model_mixup_alpha": "Weight of the model in each update of the reference.",
        "ref_model_sync_steps": "Steps between two updates of the reference.",
    }

    output_dir: str = field(default="outputs-dpo", metadata={"help": "Output folder."})
    reference_model: str | None = field(
        default=None,
        metadata={
            "help": "A separate reference model, with the same tokenizer. Unset: the model that training starts from."
        },
    )
    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={"help": "Loss, or several that are summed with --loss_weights.", "choices": list(LOSSES)},
    )
    f_divergence_type: str = field(
        default="reverse_kl",
        metadata={"help": "Divergence that keeps the model close to the reference.", "choices": list(DIVERGENCES)},
    )


def check_flags(args: PreferenceArguments, use_peft: bool) -> None:
    """Refuse flags that have no effect with the chosen losses and reference, and values outside their range.

    Raises:
        UserError: each with the remedy.
    """
    losses, names = set(args.loss_type), ", ".join(args.loss_type)
    smoothed, differing = ", ".join(sorted(SMOOTHED_LOSSES)), ", ".join(sorted(MARGIN_LOSSES))
    of_reference = losses != {"sft"}
    used = {
        "beta": (of_reference, "--loss_type sft has no reference"),
        "ld_alpha": (of_reference, "--loss_type sft weights all tokens equally"),
        "label_smoothing": (losses & SMOOTHED_LOSSES, f"it is for --loss_type {smoothed}, not {names}"),
        "discopop_tau": ("discopop" in losses, "it is for --loss_type discopop"),
        "f_divergence_type": (losses & MARGIN_LOSSES, f"it is for --loss_type {differing}, not {names}"),
        "f_alpha_divergence_coef": (
            args.f_divergence_type == "alpha_divergence",
            "it is for --f_divergence_type alpha_divergence",
        ),
        "precompute_ref_batch_size": (args.precompute_ref_log_probs, "it is for --precompute_ref_log_probs True"),
        "ref_model_mixup_alpha": (args.sync_ref_model, "it is for --sync_ref_model True"),
        "ref_model_sync_steps": (args.sync_ref_model, "it is for --sync_ref_model True"),
    }
    for name, (has_effect, reason) in used.items():
        if name in args.given and not has_effect:
            raise UserError(f"--{name} has no effect here: {reason}. Omit it.")
    for name, allowed, valid in (
        ("beta", "above 0", args.beta > 0),
        ("ld_alpha", "between 0 and 1", args.ld_alpha is None or 0 <= args.ld_alpha <= 1),
        ("label_smoothing", "at least 0 and below 0.5", 0 <= args.label_smoothing < 0.5),
        ("discopop_tau", "above 0", args.discopop_tau > 0),
        ("ref_model_mixup_alpha", "above 0 and at most 1", 0 < args.ref_model_mixup_alpha <= 1),
        ("ref_model_sync_steps", "at least 1", args.ref_model_sync_steps >= 1),
    ):
        if not valid:
            raise UserError(f"--{name} {getattr(args, name)} must be {allowed}.")
    if losses & {"robust", "exo_pair"} and not args.label_smoothing:
        raise UserError(
            f"--loss_type {names} needs --label_smoothing, the share of pairs whose labels may be swapped. "
            "0.1 is usual for robust, 0.001 for exo_pair; at 0, robust is the sigmoid loss."
        )
    others = sorted(losses - MARGIN_LOSSES - {"sft"})
    if args.f_divergence_type != "reverse_kl" and others:
        raise UserError(f"--f_divergence_type {args.f_divergence_type} is not defined for {', '.join(others)}.")
    if args.use_weighting and losses & {"aot", "aot_unpaired"}:
        raise UserError(f"--use_weighting weights pairs, which {names} takes apart. Omit one of the two.")
    if args.precompute_ref_log_probs and is_fsdp_requested(args) and not use_peft:
        raise UserError(
            "--precompute_ref_log_probs cannot be combined with FSDP, which shards the model when training starts. "
            "Omit it, or use --deepspeed zero3.json."
        )
    if args.sync_ref_model:
        for clash, remedy in (
            (use_peft, "an adapter, whose reference has no separate weights: add --use_peft False"),
            (args.precompute_ref_log_probs, "--precompute_ref_log_probs, which needs a fixed reference"),
            (args.resume_from_checkpoint, "--resume_from_checkpoint: checkpoints do not hold the moved reference"),
        ):
            if clash:
                raise UserError(f"--sync_ref_model True moves the reference, which cannot be combined with {remedy}.")


class PreferenceTrainer(PairTrainer):
    """`PairTrainer` with the losses of DPO.

    Args:
        ref_model: the frozen reference; None if it is the policy: with its adapter off, or with `start_from`, or as it
            is before training.
        start_from: the adapter that training continues, if any; the reference is the base with that adapter.
    """

    def __init__(self, *, ref_model: PreTrainedModel | None, start_from: Adapter | None, **kwargs: Any):
        super().__init__(**kwargs)
        args, config = self.args, self.model.config.get_text_config()
        # The load balancing loss of a mixture of experts, by default with the coefficient of its configuration.
        coefficient, routed = args.router_aux_loss_coef, hasattr(config, "output_router_logits")
        if coefficient and not routed:
            raise UserError("--router_aux_loss_coef has no effect: the model is not a mixture of experts. Omit it.")
        coefficient = getattr(config, "router_aux_loss_coef", 0.0) if coefficient is None else coefficient
        self.router_coefficient = coefficient if routed else 0.0

        measures = ("entropy", "mean_logits", "is_top1") + (("log_sum_sq_probs",) if args.use_weighting else ())
        dense = not args.use_weighting and not self.router_coefficient
        add_log_prob_head(self.model, measures=measures, dense_on_cpu=dense)
        self.try_loss(self.model, routed=bool(self.router_coefficient))
        if start_from and ref_model is None:
            adapters.add_reference_adapter(self.model, start_from)
        if ref_model is not None:
            if args.disable_dropout:
                disable_dropout(ref_model)
            add_log_prob_head(ref_model, dense_on_cpu=dense)
            ref_model = place_reference(ref_model, self.accelerator)
        self.ref_model = ref_model
        if args.sync_ref_model:
            self.add_callback(SyncReference(ref_model, self.accelerator))
        if args.precompute_ref_log_probs:
            self._precompute_reference()

    def _precompute_reference(self) -> None:
        """Store the reference's log-probabilities in two more columns of the data, from scratch in each run."""
        args, model = self.args, self.ref_model or self.model
        if self.ref_model is None and self.is_deepspeed_enabled:
            model = place_reference(self.model, self.accelerator)

        def with_reference(dataset: Dataset, batch_size: int) -> Dataset:
            size = args.precompute_ref_batch_size or batch_size
            loader = self.accelerator.prepare(DataLoader(dataset, size, collate_fn=self.data_collator))
            parts = []
            for batch in tqdm(loader, desc="reference log-probabilities"):
                both = torch.stack(self.reference_log_probs(batch, model).chunk(2), dim=1)
                parts.append(self.accelerator.gather_for_metrics(both).cpu())
            chosen, rejected = torch.cat(parts).T.tolist()
            return dataset.add_column("ref_chosen_logps", chosen).add_column("ref_rejected_logps", rejected)

        self.train_dataset = with_reference(self.train_dataset, args.per_device_train_batch_size)
        if self.eval_dataset is not None:
            self.eval_dataset = with_reference(self.eval_dataset, args.per_device_eval_batch_size)

    def reference_log_probs(
        self, inputs: dict[str, torch.Tensor], model: torch.nn.Module | None = None
    ) -> torch.Tensor:
        """(2 x pairs,) of the answers, by the reference, or by `model` in its place."""
        if "ref_chosen_logps" in inputs:
            return torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        policy = self.accelerator.unwrap_model(self.model)
        as_reference = nullcontext()
        if self.ref_model is None and isinstance(policy, PeftModel):
            as_reference = use_adapter(policy, "ref" if "ref" in policy.peft_config else None)
        with torch.no_grad(), self.accelerator.autocast(), as_reference:
            outputs = score_answers(model or self.ref_model or self.model, inputs)
        return answer_log_probs(outputs.log_probs.float(), inputs["completion_mask"][:, 1:], self.args.ld_alpha)

    def pair_values(self, model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        # Held-out pairs are evaluated without the load balancing loss, which depends on the batch.
        routed = self.model.training and self.router_coefficient
        outputs = score_answers(model, inputs, **({"output_router_logits": True} if routed else {}))
        mask = inputs["completion_mask"][:, 1:]
        tokens, log_probs = mask.sum(dim=1), outputs.log_probs.float()
        policy, reference = answer_log_probs(log_probs, mask, self.args.ld_alpha), self.reference_log_probs(inputs)
        (chosen, rejected), (ref_chosen, ref_rejected) = policy.chunk(2), reference.chunk(2)
        unweighted = log_probs.sum(dim=1).chunk(2)[0]
        pairs = PairLogProbs(chosen, rejected, ref_chosen, ref_rejected, unweighted, *tokens.chunk(2))
        loss = self._loss(pairs if self.model.training else pairs.one_by_one()).reshape(-1)
        if self.args.use_weighting:
            # WPO (https://arxiv.org/abs/2406.11827, equation 2): how likely the model itself is to write the pair.
            likelihood = ((log_probs - outputs.log_sum_sq_probs).detach().sum(dim=1) / tokens).exp()
            loss = loss * likelihood.view(2, -1).prod(dim=0)
        values = {"loss": loss}
        if routed:
            values["loss"] = loss + self.router_coefficient * outputs.aux_loss
            values["aux_loss"] = outputs.aux_loss.expand_as(loss)

        entropy, mean_logits = outputs.entropy.float().sum(dim=1), outputs.mean_logits.float().sum(dim=1) / tokens
        rewards = self.args.beta * (policy - reference)
        for name, column in (("logits", mean_logits), ("rewards", rewards), ("logps", policy)):
            values[f"{name}/chosen"], values[f"{name}/rejected"] = column.chunk(2)
        margins = values["rewards/chosen"] - values["rewards/rejected"]
        return values | {
            "rewards/accuracies": (margins > 0).float(),
            "rewards/margins": margins,
            "entropy": entropy.view(2, -1).sum(dim=0) / tokens.view(2, -1).sum(dim=0),
            "mean_token_accuracy": (outputs.is_top1.sum(dim=1) / tokens).chunk(2)[0],
        }

    def _loss(self, pairs: PairLogProbs) -> torch.Tensor:
        """The weighted sum of all --loss_type."""
        weights = self.args.loss_weights or [1.0] * len(self.args.loss_type)
        return sum(
            weight * dpo_loss(name, pairs, self.args) for name, weight in zip(self.args.loss_type, weights, strict=True)
        )


def main() -> None:
    # 1 arguments
    model_args, attention_args, data_args, lora_args, run_args, args = parse_args(
        ModelArguments,
        AttentionArguments,
        DataArguments,
        LoraArguments,
        RunArguments,
        PreferenceArguments,
        description=__doc__,
        program="dpo_training.py",
    )
    check_flags(args, lora_args.use_peft)
    training_defaults(args, adapter_rate=2e-5, full_rate=1e-6, use_peft=lora_args.use_peft)
    disable_lora_dropout(args, lora_args)
    checkpoint = loading.stage_checkpoint(model_args, lora_args)
    loading.resolve_length(args, "model_max_length", checkpoint, attention_args)
    run = Run("dpo_training", args, checkpoint, run_args, model_args, attention_args, data_args, lora_args)

    # 2 tokenizer and template
    tokenizer = loading.stage_tokenizer(checkpoint, model_args)
    stop = apply_template(tokenizer, args.template_name, args.system_prompt, args.tool_format)
    run.add_tokenizer(tokenizer)

    # 3 data: both answers follow the same prompt; pairs that are too long are skipped, never truncated
    encode = partial(
        encode_preference,
        tokenizer,
        max_length=args.model_max_length,
        max_source_length=args.max_source_length,
        max_target_length=args.max_target_length,
    )
    data, train, validation = load_and_encode(
        data_args, to_preference, encode, seed=args.order_seed, sample=Pair, config=checkpoint.config
    )
    run.add_data(data)
    run.preview(tokenizer, train)

    # 4 model, and the reference unless it is the same weights without the adapter
    load = {"attending": attention_args, "max_length": args.model_max_length, "bf16": args.bf16}
    model = loading.load_trainable(AutoModelForCausalLM, checkpoint, tokenizer, model_args, lora_args, **load)
    reference = None
    if args.reference_model:
        reference = load_reference(args.reference_model, tokenizer, model_args, lora_args, **load)
    elif not lora_args.use_peft and not args.precompute_ref_log_probs:
        reference = copy_policy(model, checkpoint, model_args, lora_args, **load)

    # 5 trainer
    trainer = PreferenceTrainer(
        model=model,
        ref_model=reference,
        args=args,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        data_collator=DataCollatorForPreference(tokenizer.pad_token_id, pad_to_multiple_of=args.pad_to_multiple_of),
        loraplus_lr_ratio=lora_args.loraplus_lr_ratio,
        start_from=checkpoint.adapter if lora_args.use_peft else None,
    )

    # 6 train, save
    run.announce(model, trainer.train_dataset, validation)
    run.train_and_save(
        trainer,
        tokenizer,
        stop_ids=stop_token_ids(tokenizer, stop),
        sample_prompts=render_prompts(tokenizer, data.validation or data.train, run_args.sample_prompts),
        note="Preference optimization: the model was trained to prefer the chosen answers of the pairs below.",
    )


if __name__ == "__main__":
    run_main(main)
