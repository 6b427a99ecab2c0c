"""Reward modeling (RM): a scoring head on the language model learns to score the chosen answer above the rejected one.

The head that predicts tokens is replaced by one that outputs a single number, read at the end of the last answer.
Trained on preference pairs with the loss -log sigmoid(score of the chosen answer - score of the rejected one)
(Bradley and Terry; https://arxiv.org/abs/2203.02155). PPO and GRPO use the scores as rewards.

    python reward_modeling.py --model_name_or_path outputs/sft-merged --train_file_dir data/reward \\
        --output_dir outputs/rm
    python reward_modeling.py --model_name_or_path outputs/rm --score_file data/reward/validation.jsonl \\
        --output_file outputs/rm-scores.jsonl

Data (.jsonl or .json), format recognised per row; data/README.md shows all formats:

    {"conversations": [{"from": "human", "value": "..."}], "chosen": "the better answer", "rejected": "the worse one"}

In --output_dir: the adapter with the head (or all weights with --use_peft False), the tokenizer with its chat template,
run.json, metrics.jsonl, samples.jsonl, loss.png and README.md. With --score_file nothing is trained: each row is
written to --output_file with its scores. Guide: docs/reward_modeling.md
"""

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
from medicalgpt.data.encoding import Pair, encode_preference
from medicalgpt.data.prepared import load_and_encode
from medicalgpt.errors import UserError, run_main
from medicalgpt.formats.conversion import to_preference
from medicalgpt.logs import is_main_process, setup_logging, world_size
from medicalgpt.models import loading
from medicalgpt.models.hub import Checkpoint
from medicalgpt.models.templating import stop_token_ids
from medicalgpt.parser import parse_args
from medicalgpt.readers.sources import ignored_fields
from medicalgpt.rewards import scoring
from medicalgpt.training.runs import Run
from medicalgpt.training.trainers import PairTrainer, disable_lora_dropout, training_defaults
from template import apply_template

import torch
from datasets import Dataset
from loguru import logger
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase, Trainer, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
from trl import RewardConfig
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.reward_trainer import suppress_seqcls_warning

# The flags that have an effect with --score_file; all others are for training.
SCORING_FLAGS = {
    *("score_file", "output_file", "overwrite_output_file", "per_device_eval_batch_size"),
    *("model_name_or_path", "tokenizer_name_or_path", "model_revision", "cache_dir", "hub"),
    *("dtype", "device_map", "load_in_4bit", "load_in_8bit"),
    *("ignore_fields", "skip_bad_rows", "long_rows", "skip_long_rows", "max_long_rows", "encoding"),
}


@dataclass
class ScoreArguments:
    """Scoring instead of training."""

    score_file: str | None = field(
        default=None,
        metadata={"help": "Train nothing; score each row of this .jsonl or .json file: pairs or conversations."},
    )
    output_file: str = field(default="scores.jsonl", metadata={"help": "Where the scored rows are written."})
    overwrite_output_file: bool = field(default=False, metadata={"help": "Replace --output_file if it exists."})


@dataclass
class RewardArguments(PairArguments, StageDefaults, RewardConfig):
    """Changes to TRL's `RewardConfig`."""

    HELP: ClassVar[dict[str, str]] = {
        "center_rewards_coefficient": "Keeps the mean of both scores near 0 (https://arxiv.org/abs/2312.09244); 0.01 "
        "is usual.",
    }

    output_dir: str = field(default="outputs-rm", metadata={"help": "Output folder."})

    def __post_init__(self):
        coefficient = self.center_rewards_coefficient
        if coefficient is not None and not 0 <= coefficient < float("inf"):
            raise ValueError(
                f"--center_rewards_coefficient {coefficient} must be 0 or more: below, scores move away from zero."
            )
        super().__post_init__()


class RewardTrainer(PairTrainer):
    """`PairTrainer` with the loss of Bradley and Terry."""

    def pair_values(self, model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        # Only the end of a sequence is scored, so the mask of its answer is not needed.
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        scores = outputs.logits.squeeze(-1).float()
        chosen, rejected = scores.chunk(2)
        loss = -torch.nn.functional.logsigmoid(chosen - rejected)
        if self.args.center_rewards_coefficient is not None:
            # Equation 2 of https://arxiv.org/abs/2312.09244; the pairwise loss does not fix the mean score.
            loss = loss + self.args.center_rewards_coefficient * (chosen + rejected) ** 2
        values = {
            "loss": loss,
            "accuracy": (chosen > rejected).float(),
            "margin": chosen - rejected,
            "mean_reward": (chosen + rejected) / 2,
            "chosen_reward": chosen,
            "rejected_reward": rejected,
        }
        if self.model.training:
            # They depend on the batch, so an evaluation has none.
            ends = self.accelerator.gather(torch.stack([scores.min(), scores.max()]).detach())
            values |= {"min_reward": ends.min().expand_as(loss), "max_reward": ends.max().expand_as(loss)}
        return values


class ScoreSamples:
    """Scores of both answers of a few pairs, before and after training: the samples of a reward model."""

    def __init__(self, trainer: Trainer, tokenizer: PreTrainedTokenizerBase, pairs: Dataset, count: int):
        sharded = is_deepspeed_zero3_enabled() or trainer.is_fsdp_enabled
        if count and sharded:
            logger.info("no sample scores: the weights are sharded")
        self.trainer, self.tokenizer = trainer, tokenizer
        step = max(1, len(pairs) // max(count, 1))
        rows = [] if sharded else [pairs[index] for index in range(0, len(pairs), step)[:count]]
        names = {"prompt": "prompt_ids", "chosen": "chosen_ids", "rejected": "rejected_ids"}
        self.shown = [{name: tokenizer.decode(row[column]) for name, column in names.items()} for row in rows]
        self.sequences = [row["prompt_ids"] + row[name] for row in rows for name in ("chosen_ids", "rejected_ids")]

    def answers(self) -> list[str]:
        """Both scores of each pair; an empty list on all processes but the first."""
        if not self.sequences or not is_main_process():
            return []
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=bool(self.trainer.args.bf16)):
            scores = scoring.RewardScorer(model, self.tokenizer).score_ids(self.sequences)
        return [
            f"chosen {chosen:.3f}, rejected {rejected:.3f}: {'right' if chosen > rejected else 'wrong'}"
            for chosen, rejected in zip(scores[::2], scores[1::2], strict=True)
        ]


def main() -> None:
    # 1 arguments
    model_args, attention_args, data_args, lora_args, run_args, score_args, args = groups = parse_args(
        ModelArguments,
        AttentionArguments,
        DataArguments,
        LoraArguments,
        RunArguments,
        ScoreArguments,
        RewardArguments,
        description=__doc__,
        program="reward_modeling.py",
    )
    if score_args.score_file:
        given = {name for group in groups for name in group.given}
        score(model_args, data_args, score_args, args.per_device_eval_batch_size, given)
        return
    if score_args.given:
        raise UserError(f"--{', --'.join(sorted(score_args.given))} would have no effect without --score_file FILE.")
    checkpoint = loading.stage_checkpoint(model_args, lora_args)
    head = check_start(checkpoint)
    training_defaults(args, adapter_rate=1e-4, full_rate=1e-5, use_peft=lora_args.use_peft)
    disable_lora_dropout(args, lora_args)
    loading.resolve_length(args, "model_max_length", checkpoint, attention_args)
    run = Run("reward_modeling", args, checkpoint, run_args, model_args, attention_args, data_args, lora_args)

    # 2 tokenizer and template; padding must differ from the token that ends an answer, or the end would not be found
    tokenizer = loading.stage_tokenizer(checkpoint, model_args)
    stop = apply_template(tokenizer, args.template_name, args.system_prompt, args.tool_format)
    stop_ids = stop_token_ids(tokenizer, stop)
    tokenizer.pad_token = scoring.choose_padding(tokenizer, stop_ids)
    logger.info(f"{head}; scores are read at {stop[0]}, padding is {tokenizer.pad_token}")
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

    # 4 model; a new head starts at random, with the same weights on every process
    set_seed(args.seed)
    load_scorer = partial(loading.load_trainable, AutoModelForSequenceClassification, num_labels=1)
    with suppress_seqcls_warning():
        load = {"max_length": args.model_max_length, "bf16": args.bf16}
        model = load_scorer(checkpoint, tokenizer, model_args, lora_args, attention_args, **load)
    if checkpoint.adapter and lora_args.use_peft:
        scoring.restore_head(model, checkpoint.adapter)
    scoring.score_in_float32(model)
    # The model finds the end of a sequence by its padding.
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id

    # 5 trainer
    trainer = RewardTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        data_collator=DataCollatorForPreference(tokenizer.pad_token_id, pad_to_multiple_of=args.pad_to_multiple_of),
        loraplus_lr_ratio=lora_args.loraplus_lr_ratio,
    )

    # 6 train, save
    run.announce(model, trainer.train_dataset, validation)
    run.train_and_save(
        trainer,
        tokenizer,
        stop_ids=stop_ids,
        samples=ScoreSamples(trainer, tokenizer, validation or train, run_args.sample_prompts),
        note="A reward model: it scores a conversation with one number, the higher the better its last answer.",
    )


def check_start(checkpoint: Checkpoint) -> str:
    """Describe where the head comes from.

    Raises:
        UserError: no reward model can be trained from this checkpoint.
    """
    config, adapter = checkpoint.config, checkpoint.adapter
    # With encoders of images, it is the language model alone that scores.
    if config.get_text_config().model_type not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        raise UserError(
            f"{checkpoint.name} is of type {config.model_type}, for which transformers has no model with a scoring "
            "head. Use another base for the reward model, such as Qwen/Qwen3-0.6B: PPO and GRPO can use it with any "
            "policy."
        )
    if adapter and not scoring.is_reward_adapter(adapter):
        raise UserError(
            f"{adapter.path} is an adapter of a language model, which has no scoring head. Merge it, and start from "
            f"the result: python merge_peft_adapter.py --lora_model {adapter.path} --output_dir "
            f"{adapter.path}-merged"
        )
    has_head = scoring.is_reward_model(config) or adapter is not None
    return "continuing with the head of the checkpoint" if has_head else "a new head with random weights"


def score(
    model_args: ModelArguments, data_args: DataArguments, score_args: ScoreArguments, batch_size: int, given: set[str]
) -> None:
    """Score the rows of a file.

    Raises:
        UserError: flags without effect here, files that cannot be read or written, or not a reward model.
    """
    setup_logging()
    if idle := ", --".join(sorted(given - SCORING_FLAGS)):
        raise UserError(f"--{idle} would have no effect with --score_file, which trains nothing. Omit them.")
    if world_size() > 1:
        raise UserError("--score_file runs in a single process. Start it with python, not with torchrun.")
    scoring.check_output_file(score_args.score_file, score_args.output_file, score_args.overwrite_output_file)
    rows, problems = scoring.read_score_file(
        score_args.score_file, ignored_fields(data_args.ignore_fields), data_args.encoding
    )
    scorer = scoring.RewardScorer.from_checkpoint(
        Checkpoint.from_arguments(model_args),
        dtype=model_args.dtype,
        load_in_4bit=model_args.load_in_4bit,
        load_in_8bit=model_args.load_in_8bit,
        device_map=model_args.device_map,
    )
    summary = scoring.score_rows(
        scorer,
        rows,
        problems,
        score_args.output_file,
        batch_size=batch_size,
        skip_bad_rows=data_args.skip_bad_rows,
        long_rows=data_args.long_rows,
        max_long_rows=data_args.max_long_rows,
    )
    logger.info("  ".join(f"{name} {value:.4g}" for name, value in summary.items()))


if __name__ == "__main__":
    run_main(main)
