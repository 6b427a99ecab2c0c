"""Odds ratio preference optimization (ORPO): fine-tuning and preferences in one stage, without a reference model.

The model learns the chosen answers as in supervised fine-tuning, and at the same time their odds are raised relative to
those of the rejected answers (https://arxiv.org/abs/2403.07691). Training starts from a base model or a fine-tuned one
and needs the memory of a single model.

    python orpo_training.py --model_name_or_path outputs/sft-merged --train_file_dir data/reward \\
        --output_dir outputs/orpo
    torchrun --nproc_per_node 2 orpo_training.py --model_name_or_path outputs/sft-merged \\
        --train_file_dir data/reward --output_dir outputs/orpo --load_in_4bit True --qlora True

Data (.jsonl or .json), format recognised per row; data/README.md shows all formats:

    {"conversations": [{"from": "human", "value": "..."}], "chosen": "the better answer", "rejected": "the worse one"}

In --output_dir: the adapter (or all weights with --use_peft False), the tokenizer with its chat template,
generation_config.json, run.json, metrics.jsonl, samples.jsonl, loss.png and README.md. Guide: docs/orpo_training.md
"""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

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
from medicalgpt.models import loading
from medicalgpt.models.templating import stop_token_ids
from medicalgpt.parser import parse_args
from medicalgpt.training.runs import Run
from medicalgpt.training.trainers import (
    PairTrainer,
    add_log_prob_head,
    disable_lora_dropout,
    score_answers,
    training_defaults,
)
from template import apply_template

import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, TrainingArguments
from trl.trainer.dpo_trainer import DataCollatorForPreference


@dataclass
class OrpoArguments(PairArguments, StageDefaults, TrainingArguments):
    """Changes to transformers' `TrainingArguments`."""

    output_dir: str = field(default="outputs-orpo", metadata={"help": "Output folder."})
    orpo_beta: float = field(
        default=0.1,
        metadata={
            "help": "Weight of the odds ratio loss, lambda in the paper; 0 is fine-tuning on the chosen answers alone.",
            "aliases": ["--beta"],
        },
    )
    logging_steps: float = field(default=10, metadata={"help": "Log every N steps; below 1, the share of all steps."})


# ---------------------------------------------------------------------------------------------------------------------
# The loss
# ---------------------------------------------------------------------------------------------------------------------

# At a probability of 1 the odds are infinite; in float32 the next number below 1 has this logarithm.
NEAREST_TO_CERTAIN = math.log1p(-(2.0**-24))


def log_odds(mean_log_probs: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p)) of an answer, where p is the geometric mean of its tokens' probabilities.

    Args:
        mean_log_probs: (answers,) log p, at most 0.
    """
    log_p = mean_log_probs.clamp(max=NEAREST_TO_CERTAIN)
    # expm1 keeps the digits that 1 - exp(log p) would lose for p near 1.
    return log_p - torch.log(-torch.expm1(log_p))


def orpo_loss(chosen: torch.Tensor, rejected: torch.Tensor, beta: float) -> dict[str, torch.Tensor]:
    """The loss of ORPO (equations 3 to 7 of https://arxiv.org/abs/2403.07691) for each pair.

    loss = nll_loss - beta * log sigmoid(log_odds_ratio)

    Args:
        chosen, rejected: (pairs,) mean log-probability of the tokens of each answer.
        beta: weight of the odds ratio, lambda in the paper.

    Returns:
        Each of shape (pairs,): `loss`; `nll_loss`, of fine-tuning on the chosen answer; `log_odds_ratio`, the log of
        the chosen answer's odds over the rejected one's.
    """
    log_odds_ratio = log_odds(chosen) - log_odds(rejected)
    return {
        "loss": -chosen - beta * logsigmoid(log_odds_ratio),
        "nll_loss": -chosen,
        "log_odds_ratio": log_odds_ratio,
    }


class OrpoTrainer(PairTrainer):
    """`PairTrainer` with the loss of ORPO. Both answers of all pairs go through the model in one pass."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        add_log_prob_head(self.model)
        self.try_loss(self.model)

    def pair_values(self, model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        outputs = score_answers(model, inputs)
        means = outputs.log_probs.float().sum(dim=1) / outputs.label_mask.sum(dim=1)
        chosen, rejected = means.chunk(2)
        return {
            **orpo_loss(chosen, rejected, self.args.orpo_beta),
            "accuracy": (chosen > rejected).float(),
            "margin": chosen - rejected,
            "logps/chosen": chosen,
            "logps/rejected": rejected,
        }


def main() -> None:
    # 1 arguments
    model_args, attention_args, data_args, lora_args, run_args, args = parse_args(
        ModelArguments,
        AttentionArguments,
        DataArguments,
        LoraArguments,
        RunArguments,
        OrpoArguments,
        description=__doc__,
        program="orpo_training.py",
    )
    if not 0 <= args.orpo_beta < math.inf:
        raise UserError(f"--orpo_beta {args.orpo_beta} is not a valid loss weight: use 0 or more. 0.1 is usual.")
    training_defaults(args, adapter_rate=5e-5, full_rate=5e-6, use_peft=lora_args.use_peft)
    disable_lora_dropout(args, lora_args)
    checkpoint = loading.stage_checkpoint(model_args, lora_args)
    loading.resolve_length(args, "model_max_length", checkpoint, attention_args)
    run = Run("orpo_training", args, checkpoint, run_args, model_args, attention_args, data_args, lora_args)

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

    # 4 model
    model = loading.load_trainable(
        AutoModelForCausalLM,
        checkpoint,
        tokenizer,
        model_args,
        lora_args,
        attention_args,
        max_length=args.model_max_length,
        bf16=args.bf16,
    )

    # 5 trainer
    trainer = OrpoTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        data_collator=DataCollatorForPreference(tokenizer.pad_token_id),
        loraplus_lr_ratio=lora_args.loraplus_lr_ratio,
    )

    # 6 train, save
    run.announce(model, trainer.train_dataset, validation)
    run.train_and_save(
        trainer,
        tokenizer,
        stop_ids=stop_token_ids(tokenizer, stop),
        sample_prompts=render_prompts(tokenizer, data.validation or data.train, run_args.sample_prompts),
        note="Fine-tuning with preferences: the model was trained to answer like the chosen answers below.",
    )


if __name__ == "__main__":
    run_main(main)
