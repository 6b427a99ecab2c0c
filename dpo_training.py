"""Direct preference optimization (DPO): the model learns from pairs which of two answers people prefer.

Changes which answers the model gives, without a reward model and without sampling: the log-probability of the chosen
answer rises against that of the rejected one, both measured from where a frozen reference model stands
(https://arxiv.org/abs/2305.18290). The reference is the model that training starts from; with an adapter it is the
same weights with the adapter switched off, so that it costs no memory.

    python dpo_training.py --model_name_or_path outputs/sft-merged --train_file_dir data/reward --output_dir outputs/dpo
    torchrun --nproc_per_node 2 dpo_training.py --model_name_or_path outputs/sft-merged \\
        --train_file_dir data/reward --output_dir outputs/dpo --load_in_4bit True --qlora True

Data (.jsonl or .json), recognised row by row; data/README.md shows all forms:

    {"conversations": [{"from": "human", "value": "..."}], "chosen": "the better answer", "rejected": "the worse one"}

In --output_dir: the adapter (or all weights with --use_peft False), the tokenizer with its chat template,
generation_config.json, run.json, metrics.jsonl, samples.jsonl, loss.png and README.md. Guide: docs/dpo_training.md
"""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
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
from medicalgpt.data.encoding import IGNORED, Pair, encode_preference, render_prompts
from medicalgpt.data.formats import to_preference
from medicalgpt.data.loading import load_data
from medicalgpt.data.tokenizing import encode_sides
from medicalgpt.errors import UserError, run_main
from medicalgpt.models import adapters, loading
from medicalgpt.models.hub import Adapter, Checkpoint
from medicalgpt.models.templating import stop_token_ids
from medicalgpt.parser import parse_args
from medicalgpt.refusals import refused_in
from medicalgpt.training.cpu import add_cpu_head
from medicalgpt.training.runs import Run
from medicalgpt.training.trainers import PairTrainer, settle_dropout, training_defaults
from template import apply_template

import datasets
import torch
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import DPOConfig, DPOTrainer
from trl.models.utils import prepare_deepspeed

# What each of them is, and where it comes from, stands in docs/dpo_training.md.
LOSSES = (
    *("sigmoid", "sigmoid_norm", "ipo", "hinge", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard"),
    *("aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft"),
)
# Losses of the difference of both rewards, which other divergences than the KL change, and those that doubt the labels.
LOSSES_OF_DIFFERENCE = {"sigmoid", "sigmoid_norm", "ipo", "hinge", "robust", "exo_pair", "discopop"}
LOSSES_WITH_SMOOTHING = {"robust", "exo_pair", "aot", "aot_unpaired"}
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


@dataclass
class PreferenceArguments(PairArguments, StageDefaults, DPOConfig):
    """What differs from TRL's `DPOConfig`."""

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

    output_dir: str = field(default="outputs-dpo", metadata={"help": "Where the result goes."})
    reference_model: str | None = field(
        default=None,
        metadata={
            "help": "Another reference model, with the same tokenizer. Unset: the model that training starts from."
        },
    )
    # TRL finds out in the first step that it does not know a name.
    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={"help": "Loss, or several that are added up with --loss_weights.", "choices": list(LOSSES)},
    )
    f_divergence_type: str = field(
        default="reverse_kl",
        metadata={"help": "Divergence that holds the model at the reference.", "choices": list(DIVERGENCES)},
    )


def check_flags(args: PreferenceArguments, use_peft: bool) -> None:
    """Refuse flags that the chosen losses and reference have no use for, and values outside their range.

    Raises:
        UserError: each with the remedy.
    """
    losses, names = set(args.loss_type), ", ".join(args.loss_type)
    smoothed, differing = ", ".join(sorted(LOSSES_WITH_SMOOTHING)), ", ".join(sorted(LOSSES_OF_DIFFERENCE))
    of_reference = losses != {"sft"}
    used = {
        "beta": (of_reference, "--loss_type sft knows no reference"),
        "ld_alpha": (of_reference, "--loss_type sft weighs all tokens alike"),
        "label_smoothing": (losses & LOSSES_WITH_SMOOTHING, f"it is for --loss_type {smoothed}, not {names}"),
        "discopop_tau": ("discopop" in losses, "it is for --loss_type discopop"),
        "f_divergence_type": (losses & LOSSES_OF_DIFFERENCE, f"it is for --loss_type {differing}, not {names}"),
        "f_alpha_divergence_coef": (
            args.f_divergence_type == "alpha_divergence",
            "it is for --f_divergence_type alpha_divergence",
        ),
        "precompute_ref_batch_size": (args.precompute_ref_log_probs, "it is for --precompute_ref_log_probs True"),
        "ref_model_mixup_alpha": (args.sync_ref_model, "it is for --sync_ref_model True"),
        "ref_model_sync_steps": (args.sync_ref_model, "it is for --sync_ref_model True"),
        "activation_offloading": (not args.use_cpu, "activations are on the CPU already"),
    }
    for name, (has_effect, reason) in used.items():
        if name in args.given and not has_effect:
            raise UserError(f"--{name} has no effect here: {reason}. Leave it out.")
    for name, low, high, sound in (
        ("beta", "above 0", "", args.beta > 0),
        ("ld_alpha", "0", "1", args.ld_alpha is None or 0 <= args.ld_alpha <= 1),
        ("label_smoothing", "0", "below 0.5", 0 <= args.label_smoothing < 0.5),
        ("discopop_tau", "above 0", "", args.discopop_tau > 0),
        ("ref_model_mixup_alpha", "above 0", "1", 0 < args.ref_model_mixup_alpha <= 1),
        ("ref_model_sync_steps", "at least 1", "", args.ref_model_sync_steps >= 1),
    ):
        if not sound:
            raise UserError(f"--{name} {getattr(args, name)} must be {' and '.join(filter(None, (low, high)))}.")
    if losses & {"robust", "exo_pair"} and not args.label_smoothing:
        raise UserError(
            f"--loss_type {names} needs --label_smoothing, the share of pairs that may be labelled the wrong way "
            "round. 0.1 is usual for robust, 0.001 for exo_pair; without one, robust is the sigmoid loss."
        )
    others = sorted(losses - LOSSES_OF_DIFFERENCE - {"sft"})
    if args.f_divergence_type != "reverse_kl" and others:
        raise UserError(f"--f_divergence_type {args.f_divergence_type} is not defined for {', '.join(others)}.")
    if args.use_weighting and losses & {"aot", "aot_unpaired"}:
        raise UserError(f"--use_weighting weighs pairs, and {names} takes them apart. Leave one of the two out.")
    sharded = args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1")
    if args.precompute_ref_log_probs and sharded and not use_peft:
        raise UserError(
            "--precompute_ref_log_probs does not go with FSDP, under which TRL would take the model from its folder "
            "anew. Leave it out, or use --deepspeed zero3.json."
        )
    if args.sync_ref_model:
        for clash, remedy in (
            (use_peft, "an adapter, whose reference has no weights of its own: add --use_peft False"),
            (args.precompute_ref_log_probs, "--precompute_ref_log_probs, for which the reference must stay"),
            (args.resume_from_checkpoint, "--resume_from_checkpoint: checkpoints do not hold the moved reference"),
        ):
            if clash:
                raise UserError(f"--sync_ref_model True moves the reference, which does not go with {remedy}.")


class PreferenceTrainer(PairTrainer, DPOTrainer):
    """`trl.DPOTrainer` on encoded pairs, with the reference that belongs to the checkpoint.

    Args:
        start_from: the adapter that is trained on, if there is one; the reference is the base with that adapter.
    """

    def __init__(self, *, start_from: Adapter | None, **kwargs: Any):
        self.start_from, self.ready = start_from, False
        super().__init__(**kwargs)
        self._make_ready()

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def _make_ready(self) -> None:
        """Settle what the reference is, and the head that both models score with on a CPU.

        TRL makes a copy of every adapter for the reference. A new adapter needs none, since the reference is the model
        without it; of an old one TRL copies what it knows by name, which leaves out the rows of new tokens.
        """
        if self.ready:
            return
        self.ready = True
        if isinstance(self.model, PeftModel) and self.ref_model is None:
            self.model.delete_adapter("ref")
            if self.start_from:
                adapters.add_reference_adapter(self.model, self.start_from)
        # What WPO weighs pairs with, and the loss of routers, come from TRL's own head alone.
        for model in (self.model, self.ref_model):
            if model is not None and not self.use_weighting and not self.aux_loss_enabled:
                model = self.accelerator.unwrap_model(model)
                base = model.get_base_model() if isinstance(model, PeftModel) else model
                add_cpu_head(base, measured=model is not self.ref_model)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        if self.args.sync_ref_model and self.args.ref_model_sync_steps > num_training_steps:
            raise UserError(
                f"--sync_ref_model has no effect: the run has {num_training_steps} steps, and the reference would move "
                f"every {self.args.ref_model_sync_steps}. Give a smaller --ref_model_sync_steps."
            )
        return super().create_scheduler(num_training_steps, optimizer)

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """Two more columns, the reference's log-probability of each answer, computed anew in each run.

        TRL keeps them in a file beside the tokens, under a name that leaves out flags they follow from, and that only
        the machine of the first process has.
        """
        # TRL calls this at the end of its own __init__.
        self._make_ready()
        model = self.ref_model or self.model
        if self.ref_model is None and self.is_deepspeed_enabled:
            self._precompute_engine = model = self._precompute_engine or prepare_deepspeed(model, self.accelerator)
        loader = self.accelerator.prepare(DataLoader(dataset, batch_size, collate_fn=self.data_collator))
        parts = []
        for batch in datasets.utils.tqdm(loader, desc=f"reference on {name}"):
            both = torch.stack(self.compute_ref_log_probs(model, batch), dim=1)
            parts.append(self.accelerator.gather_for_metrics(both).float().cpu())
        for column, values in zip(("ref_chosen_logps", "ref_rejected_logps"), torch.cat(parts).T.tolist(), strict=True):
            dataset = dataset.add_column(column, values)
        return dataset

    def pair_values(self, model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """TRL's loss and metrics of each pair by itself, from one pass of both models over the batch."""
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORED)
        model_inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        outputs = model(**model_inputs, labels=labels, use_cache=False, fused_lm_head=True)
        tokens = {name: value for name, value in outputs.items() if value.dim() == 2}
        if not self.precompute_ref_logps:
            reference = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
            inputs = inputs | dict(zip(("ref_chosen_logps", "ref_rejected_logps"), reference, strict=True))
        pairs = len(labels) // 2
        columns: dict[str, list[torch.Tensor]] = {}
        with self._alone():
            for pair in range(pairs):
                rows = [pair, pair + pairs]
                scored = SimpleNamespace(**{name: value[rows] for name, value in tokens.items()})
                own = {name: value[[pair] if name.startswith("ref_") else rows] for name, value in inputs.items()}
                loss = self.compute_loss(lambda scored=scored, **_: scored, own)
                metrics = {name: values[0] for name, values in self._metrics["eval"].items() if name != "num_tokens"}
                self._metrics["eval"].clear()
                for name, value in {"loss": loss, **metrics}.items():
                    columns.setdefault(name, []).append(torch.as_tensor(value, device=labels.device))
        return {name: torch.stack(values) for name, values in columns.items()}

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Within it TRL's loss takes the reference from its inputs, stays in its process, and knows no routers."""
        before = self.precompute_ref_logps, self.aux_loss_enabled
        self.precompute_ref_logps, self.aux_loss_enabled = True, False
        self.accelerator.gather = self.accelerator.gather_for_metrics = lambda values: values
        try:
            yield
        finally:
            self.precompute_ref_logps, self.aux_loss_enabled = before
            del self.accelerator.gather, self.accelerator.gather_for_metrics


def load_reference(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: PreferenceArguments,
    checkpoint: Checkpoint,
    model_args: ModelArguments,
    lora_args: LoraArguments,
    **load: Any,
) -> PreTrainedModel | None:
    """The reference model, frozen; None where it is the policy without its adapter, or as it is before training.

    Args:
        policy: as training starts from it.
        tokenizer: of the policy.
        checkpoint: of the policy.
        load: further arguments of `loading.load_base`.

    Raises:
        UserError: `--reference_model` has another tokenizer, or is an adapter where the base is quantized.
    """
    if args.reference_model is None:
        if lora_args.use_peft or args.precompute_ref_log_probs:
            return None
        if not is_deepspeed_zero3_enabled():
            return copy.deepcopy(policy).requires_grad_(False)
        reference = loading.load_base(AutoModelForCausalLM, checkpoint, model_args, lora_args, **load)
        reference.resize_token_embeddings(policy.get_input_embeddings().num_embeddings, mean_resizing=False)
        # New rows of an embedding are drawn at random, so each process copies its part of every weight.
        for ours, theirs in zip(reference.parameters(), policy.parameters(), strict=True):
            getattr(ours, "ds_tensor", ours).data.copy_(getattr(theirs, "ds_tensor", theirs).data)
        return reference.requires_grad_(False)
    model_args = replace(
        model_args, model_name_or_path=args.reference_model, tokenizer_name_or_path=None, model_revision=None
    )
    own = Checkpoint.from_arguments(model_args)
    if own.adapter and (model_args.load_in_4bit or model_args.load_in_8bit or model_args.qlora):
        raise UserError(
            f"--reference_model {args.reference_model} is an adapter, which cannot be merged into a quantized base. "
            f"Merge it first: python merge_peft_adapter.py --lora_model {args.reference_model}"
        )
    theirs = loading.stage_tokenizer(own, model_args)
    if differing := sorted(set(tokenizer.get_vocab().items()) - set(theirs.get_vocab().items())):
        token, row = differing[0]
        raise UserError(
            f"--reference_model {args.reference_model} reads other tokens than the model: {len(differing)} of them "
            f"differ, such as {token!r} with id {row}. Name a reference with the same tokenizer."
        )
    reference = loading.load_base(AutoModelForCausalLM, own, model_args, LoraArguments(), **load)
    if own.adapter:
        reference = adapters.attach_adapter(reference, own.adapter).merge_and_unload()
    return reference.requires_grad_(False)


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
        unused=refused_in("dpo_training.py"),
    )
    check_flags(args, lora_args.use_peft)
    training_defaults(args, adapter_rate=2e-5, full_rate=1e-6, use_peft=lora_args.use_peft)
    settle_dropout(args, lora_args)
    checkpoint = loading.stage_checkpoint(model_args, lora_args)
    loading.resolve_length(args, "model_max_length", checkpoint, attention_args)
    run = Run("dpo_training", args, checkpoint, run_args, model_args, attention_args, data_args, lora_args)

    # 2 tokenizer and template
    tokenizer = loading.stage_tokenizer(checkpoint, model_args)
    stop = apply_template(tokenizer, args.template_name, args.system_prompt, args.tool_format)

    # 3 data: both answers follow the same prompt; pairs that do not fit are refused, not cut
    data = load_data(data_args, to_preference, seed=args.order_seed)
    encode = partial(
        encode_preference,
        tokenizer,
        max_length=args.model_max_length,
        max_source_length=args.max_source_length,
        max_target_length=args.max_target_length,
    )
    train, validation = encode_sides(data, encode, data_args, args.order_seed, Pair)
    run.add_data(data)
    run.preview(tokenizer, train)

    # 4 model, and the reference where it is not the same weights without the adapter
    load = {"attending": attention_args, "max_length": args.model_max_length, "bf16": args.bf16}
    model = loading.load_trainable(AutoModelForCausalLM, checkpoint, tokenizer, model_args, lora_args, **load)
    reference = load_reference(model, tokenizer, args, checkpoint, model_args, lora_args, **load)

    # 5 trainer
    trainer = PreferenceTrainer(
        model=model,
        ref_model=reference,
        args=args,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
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
        note="Preference optimization: the model has learned to prefer the chosen answers of the pairs below.",
    )


if __name__ == "__main__":
    run_main(main)
