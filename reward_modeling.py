"""Reward modeling (RM): a head on the language model learns to give the better of two answers the higher score.

Changes the model into one that scores: in place of the head that predicts tokens there is one that gives a single
number, read at the end of the last answer. Trained on pairs with the loss -log sigmoid(score of the chosen answer -
score of the rejected one) (Bradley and Terry; https://arxiv.org/abs/2203.02155). The scores steer PPO and GRPO.

    python reward_modeling.py --model_name_or_path outputs/sft-merged --train_file_dir data/reward \\
        --output_dir outputs/rm
    python reward_modeling.py --model_name_or_path outputs/rm --score_file data/reward/validation.jsonl \\
        --output_file outputs/rm-scores.jsonl

Data (.jsonl or .json), recognised row by row; data/README.md shows all forms:

    {"conversations": [{"from": "human", "value": "..."}], "chosen": "the better answer", "rejected": "the worse one"}

In --output_dir: the adapter with the head (or all weights with --use_peft False), the tokenizer with its chat template,
run.json, metrics.jsonl, samples.jsonl, loss.png and README.md. With --score_file nothing is trained: each row is
written to --output_file with its scores. Guide: docs/reward_modeling.md
"""

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
from medicalgpt.data.encoding import Pair, encode_preference
from medicalgpt.data.formats import to_preference
from medicalgpt.data.loading import load_data
from medicalgpt.data.sources import ignored_fields
from medicalgpt.data.tokenizing import encode_sides
from medicalgpt.errors import UserError, run_main
from medicalgpt.logs import is_main_process, setup_logging, world_size
from medicalgpt.models import loading
from medicalgpt.models.hub import Checkpoint
from medicalgpt.models.templating import stop_token_ids
from medicalgpt.parser import parse_args
from medicalgpt.refusals import refused_in
from medicalgpt.rewards.scoring import (
    RewardScorer,
    check_output_file,
    choose_padding,
    is_reward_adapter,
    is_reward_model,
    read_score_file,
    restore_head,
    score_in_float32,
    score_rows,
)
from medicalgpt.training.runs import Run
from medicalgpt.training.trainers import PairTrainer, settle_dropout, training_defaults
from template import apply_template

import torch
from datasets import Dataset
from loguru import logger
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase, Trainer, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
from trl import RewardConfig, RewardTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.reward_trainer import suppress_seqcls_warning

# Flags that have an effect with --score_file; all others are for training.
SCORING_FLAGS = {
    *("score_file", "output_file", "overwrite_output_file", "per_device_eval_batch_size"),
    *("model_name_or_path", "tokenizer_name_or_path", "model_revision", "cache_dir", "hub"),
    *("dtype", "device_map", "load_in_4bit", "load_in_8bit"),
    *("ignore_fields", "skip_bad_rows", "skip_long_rows"),
}


@dataclass
class ScoreArguments:
    """Scoring in place of training."""

    score_file: str | None = field(
        default=None,
        metadata={"help": "Train nothing, but score each row of this .jsonl or .json file: pairs or conversations."},
    )
    output_file: str = field(default="scores.jsonl", metadata={"help": "Where the rows of --score_file are written."})
    overwrite_output_file: bool = field(default=False, metadata={"help": "Replace --output_file if it exists."})


@dataclass
class RewardArguments(PairArguments, StageDefaults, RewardConfig):
    """What differs from TRL's `RewardConfig`."""

    output_dir: str = field(default="outputs-rm", metadata={"help": "Where the result goes."})

    def __post_init__(self):
        coefficient = self.center_rewards_coefficient
        if coefficient is not None and not 0 <= coefficient < float("inf"):
            raise ValueError(
                f"--center_rewards_coefficient {coefficient} must be 0 or more: below, scores would run away from zero."
            )
        super().__post_init__()


class PairRewardTrainer(PairTrainer, RewardTrainer):
    """`trl.RewardTrainer` on encoded pairs."""

    def pair_values(self, model, inputs):
        chosen, rejected = model(**inputs, use_cache=False).logits.squeeze(-1).float().chunk(2)
        loss = -torch.nn.functional.logsigmoid(chosen - rejected)
        if self.args.center_rewards_coefficient is not None:
            loss = loss + self.args.center_rewards_coefficient * (chosen + rejected) ** 2
        return {
            "loss": loss,
            "accuracy": (chosen > rejected).float(),
            "margin": chosen - rejected,
            "mean_reward": (chosen + rejected) / 2,
            "chosen_reward": chosen,
            "rejected_reward": rejected,
        }


class ScoreCollator(DataCollatorForPreference):
    """Prompt with chosen answer and prompt with rejected answer, padded on the right."""

    def torch_call(self, examples):
        batch = super().torch_call(examples)
        # Only the end of a sequence is read, so what was prompt and what answer does not matter.
        del batch["completion_mask"]
        return batch


class PairScores:
    """Scores of both answers of a few pairs, before and after training: what a reward model has for samples."""

    def __init__(self, trainer: Trainer, tokenizer: PreTrainedTokenizerBase, pairs: Dataset, count: int):
        sharded = is_deepspeed_zero3_enabled() or trainer.is_fsdp_enabled
        if count and sharded:
            logger.info("no sample scores: the weights are spread over the processes")
        self.trainer, self.tokenizer = trainer, tokenizer
        step = max(1, len(pairs) // max(count, 1))
        rows = [] if sharded else [pairs[index] for index in range(0, len(pairs), step)[:count]]
        names = {"prompt": "prompt_ids", "chosen": "chosen_ids", "rejected": "rejected_ids"}
        self.shown = [{name: tokenizer.decode(row[column]) for name, column in names.items()} for row in rows]
        self.sequences = [row["prompt_ids"] + row[name] for row in rows for name in ("chosen_ids", "rejected_ids")]

    def answers(self) -> list[str]:
        """Both scores of each pair; an empty list on every process but the first."""
        if not self.sequences or not is_main_process():
            return []
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=bool(self.trainer.args.bf16)):
            scores = RewardScorer(model, self.tokenizer).score_ids(self.sequences)
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
        unused=refused_in("reward_modeling.py"),
    )
    if score_args.score_file:
        given = {name for group in groups for name in group.given}
        score(model_args, data_args, score_args, args.per_device_eval_batch_size, given)
        return
    if score_args.given:
        raise UserError(f"--{', --'.join(sorted(score_args.given))} would have no effect without --score_file FILE.")
    checkpoint = loading.stage_checkpoint(model_args, lora_args)
    head = starting_head(checkpoint)
    training_defaults(args, adapter_rate=1e-4, full_rate=1e-5, use_peft=lora_args.use_peft)
    settle_dropout(args, lora_args)
    loading.resolve_length(args, "model_max_length", checkpoint, attention_args)
    run = Run("reward_modeling", args, checkpoint, run_args, model_args, attention_args, data_args, lora_args)

    # 2 tokenizer and template; the padding must not be what answers end with, or the end would not be found
    tokenizer = loading.stage_tokenizer(checkpoint, model_args)
    stop = apply_template(tokenizer, args.template_name, args.system_prompt, args.tool_format)
    stop_ids = stop_token_ids(tokenizer, stop)
    tokenizer.pad_token = choose_padding(tokenizer, stop_ids)
    logger.info(f"{head}; scores are read at {stop[0]}, padding is {tokenizer.pad_token}")

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

    # 4 model; a new head is drawn at random, the same in every process
    set_seed(args.seed)
    with suppress_seqcls_warning():
        model = loading.load_trainable(
            AutoModelForSequenceClassification,
            checkpoint,
            tokenizer,
            model_args,
            lora_args,
            attention_args,
            max_length=args.model_max_length,
            bf16=args.bf16,
            num_labels=1,
        )
    if checkpoint.adapter and lora_args.use_peft:
        restore_head(model, checkpoint.adapter)

    # 5 trainer; it writes the padding token into the model's configuration, where the model looks for it
    trainer = PairRewardTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        data_collator=ScoreCollator(tokenizer.pad_token_id, pad_to_multiple_of=args.pad_to_multiple_of),
        loraplus_lr_ratio=lora_args.loraplus_lr_ratio,
    )
    score_in_float32(model)

    # 6 train, save
    run.announce(model, trainer.train_dataset, validation)
    run.train_and_save(
        trainer,
        tokenizer,
        stop_ids=stop_ids,
        sampler=PairScores(trainer, tokenizer, validation or train, run_args.sample_prompts),
        note="A reward model: it gives a conversation one number, the higher the better its last answer.",
    )


def starting_head(checkpoint: Checkpoint) -> str:
    """Say where the head comes from.

    Raises:
        UserError: a checkpoint from which no reward model can be trained.
    """
    config, adapter = checkpoint.config, checkpoint.adapter
    if config.model_type not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        raise UserError(
            f"{checkpoint.name} is of the type {config.model_type}, for which transformers has no model "
            "with a head that scores. Take another base for the reward model, such as Qwen/Qwen3-0.6B: PPO and GRPO "
            "can use it with any policy."
        )
    if adapter and not is_reward_adapter(adapter):
        raise UserError(
            f"{adapter.path} is an adapter of a language model, which has no head that scores. Merge it, and start "
            f"from the result: python merge_peft_adapter.py --lora_model {adapter.path} --output_dir "
            f"{adapter.path}-merged"
        )
    has_head = is_reward_model(config) or adapter is not None
    return "going on with the head of the checkpoint" if has_head else "a new head, random numbers at first"


def score(
    model_args: ModelArguments, data_args: DataArguments, score_args: ScoreArguments, batch_size: int, given: set[str]
) -> None:
    """Score the rows of a file.

    Raises:
        UserError: flags without effect here, files that cannot be read or written, or no reward model.
    """
    setup_logging()
    if idle := sorted(given - SCORING_FLAGS):
        raise UserError(
            f"--{', --'.join(idle)} would have no effect with --score_file, which trains nothing. Leave them out."
        )
    if world_size() > 1:
        raise UserError("--score_file runs in a single process. Start it with python, not with torchrun.")
    check_output_file(score_args.score_file, score_args.output_file, score_args.overwrite_output_file)
    ignored = ignored_fields(data_args.ignore_fields)
    rows, problems = read_score_file(score_args.score_file, ignored)
    scorer = RewardScorer.from_pretrained(
        model_args.model_name_or_path,
        tokenizer_name_or_path=model_args.tokenizer_name_or_path,
        dtype=model_args.dtype,
        load_in_4bit=model_args.load_in_4bit,
        load_in_8bit=model_args.load_in_8bit,
        device_map=model_args.device_map,
        hub=model_args.hub,
        revision=model_args.model_revision,
        cache_dir=model_args.cache_dir,
    )
    summary: dict[str, Any] = score_rows(
        scorer,
        rows,
        problems,
        score_args.output_file,
        batch_size=batch_size,
        skip_bad_rows=data_args.skip_bad_rows,
        skip_long_rows=data_args.skip_long_rows,
    )
    logger.info("  ".join(f"{name} {value:.4g}" for name, value in summary.items()))


if __name__ == "__main__":
    run_main(main)
