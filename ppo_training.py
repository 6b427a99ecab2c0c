"""Proximal policy optimization (PPO): the model generates answers and a reward model scores them.

The model learns from its own answers. In each step it answers a batch of prompts; a critic learns to predict, at each
token, how good the answer will be; tokens after which the answer turned out better than predicted become more likely,
in small steps (https://arxiv.org/abs/1707.06347). A KL penalty keeps the model near its starting point, so that it does
not give up language for reward (https://arxiv.org/abs/2203.02155).

    python ppo_training.py --sft_model_path outputs/sft-merged --reward_model_path outputs/rm \\
        --train_file_dir data/reward --output_dir outputs/ppo --max_steps 50
    torchrun --nproc_per_node 2 ppo_training.py --sft_model_path outputs/sft-merged --reward_model_path outputs/rm \\
        --train_file_dir data/reward --output_dir outputs/ppo --load_in_4bit True --qlora True

Data (.jsonl or .json), of which only the prompts are used; data/README.md shows all formats:

    {"conversations": [{"from": "human", "value": "..."}]}

In --output_dir: the adapter (or the full model with --use_peft False), the tokenizer with its chat template,
generation_config.json, run.json, metrics.jsonl, answers.jsonl, samples.jsonl, loss.png and README.md. Guide:
docs/ppo_training.md
"""

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from medicalgpt.args import (
    AttentionArguments,
    DataArguments,
    LoraArguments,
    ModelArguments,
    RunArguments,
    StageDefaults,
    TemplateArguments,
)
from medicalgpt.data.encoding import IGNORED, EncodingError, Prompt, encode_prompt
from medicalgpt.data.loading import load_data
from medicalgpt.data.tokenizing import encode_sides
from medicalgpt.errors import UserError, run_main
from medicalgpt.formats.tasks import to_task
from medicalgpt.logs import is_main_process
from medicalgpt.models import adapters, loading
from medicalgpt.models.hub import HEADS, Checkpoint
from medicalgpt.models.templating import stop_token_ids
from medicalgpt.parser import parse_args
from medicalgpt.readers.problems import Place, place_of
from medicalgpt.rewards.scoring import RewardScorer, is_reward_adapter, restore_head, score_in_float32
from medicalgpt.serving.chat import ChatEngine
from medicalgpt.serving.generation import MAX_SEED, Answer, Sampling
from medicalgpt.training.callbacks import keep_rows
from medicalgpt.training.cpu import add_cpu_head
from medicalgpt.training.engines import are_weights_sharded, complete_weights
from medicalgpt.training.references import copy_policy
from medicalgpt.training.row_order import draw_mini_batches
from medicalgpt.training.runs import Run
from medicalgpt.training.trainers import StageTrainer, disable_dropout, disable_lora_dropout, training_defaults
from template import apply_template

import torch
from accelerate.utils import DistributedType, gather_object
from datasets import Dataset
from loguru import logger
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from trl.trainer.reward_trainer import suppress_seqcls_warning
from trl.trainer.utils import add_fused_lm_head, use_adapter


@dataclass
class PolicyArguments(ModelArguments):
    """The policy, whose flag has a second name that goes with those of the other models."""

    model_name_or_path: str = field(
        metadata={
            "help": "The model to train, the result of supervised fine-tuning: hub name or folder.",
            "aliases": ["--sft_model_path"],
        },
    )


@dataclass
class PpoArguments(TemplateArguments, StageDefaults, TrainingArguments):
    """What differs from transformers' `TrainingArguments`. The names are those of TRL's former PPO."""

    BEST_METRIC: ClassVar[str] = "score"

    output_dir: str = field(default="outputs-ppo", metadata={"help": "Where the result goes."})
    reward_model_path: str | None = field(
        default=None, metadata={"help": "Reward model, any tokenizer: hub name, folder, or folder of an adapter."}
    )
    value_model_path: str | None = field(
        default=None,
        metadata={
            "help": "Initial critic, with the policy's tokenizer: a reward model, or a language model, which gets a "
            "new head. Default: the reward model."
        },
    )
    model_max_length: int = field(
        default=1024,
        metadata={
            "help": "Maximum number of tokens of prompt and answer together; less if the model has fewer positions. A "
            "prompt that leaves less than --response_length is refused, never truncated.",
            "aliases": ["--max_seq_length"],
        },
    )
    response_length: int = field(
        default=128,
        metadata={
            "help": "Maximum number of tokens of an answer.",
            "aliases": ["--max_new_tokens", "--max_completion_length", "--max_target_length"],
        },
    )
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature, also of all log-probabilities."})
    rollout_forward_batch_size: int = field(
        default=64,
        metadata={
            "help": "Answers generated and scored at a time, per device.",
            "aliases": ["--local_rollout_forward_batch_size"],
        },
    )
    num_ppo_epochs: int = field(default=4, metadata={"help": "Passes over the answers of a step."})
    num_mini_batches: int = field(
        default=4,
        metadata={
            "help": "Updates per pass. The number of answers per step and device is --num_mini_batches x "
            "--gradient_accumulation_steps x --per_device_train_batch_size."
        },
    )
    kl_coef: float = field(default=0.05, metadata={"help": "Weight of the KL to the reference in the reward."})
    kl_estimator: str = field(
        default="k1",
        metadata={
            "help": "k1: log-ratio, unbiased; k3: lower variance, never negative (joschu.net/blog/kl-approx.html).",
            "choices": ["k1", "k3"],
        },
    )
    target_reference_kl: float | None = field(
        default=None,
        metadata={"help": "Adapt --kl_coef so that the KL to the reference approaches this, in nats per answer."},
    )
    kl_horizon: int = field(default=10_000, metadata={"help": "Number of answers over which --kl_coef adapts."})
    gamma: float = field(default=1.0, metadata={"help": "Discount factor per token."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of generalized advantage estimation."})
    cliprange: float = field(default=0.2, metadata={"help": "Clip range of the probability ratio."})
    cliprange_value: float = field(default=0.2, metadata={"help": "Clip range of the change in value."})
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the critic's loss."})
    critic_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the critic. Default: that of the policy."}
    )
    target_kl: float | None = field(
        default=None,
        metadata={"help": "Stop the updates of a step once the policy has moved this far, in nats per token."},
    )
    whiten_advantages: bool = field(default=True, metadata={"help": "Normalize advantages to mean 0 and variance 1."})
    normalize_scores: bool = field(
        default=False, metadata={"help": "Normalize scores with the mean and variance of all scores so far."}
    )
    score_clip: float | None = field(default=None, metadata={"help": "Clip scores to [-score_clip, score_clip]."})
    missing_eos_penalty: float = field(
        default=1.0, metadata={"help": "Subtracted from the score of an answer that was truncated."}
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "Disable all dropout, so that log-probabilities can be compared."}
    )
    learning_rate: float | None = field(
        default=None, metadata={"help": "Default: 1e-5 for adapters, 1e-6 for full fine-tuning."}
    )
    num_train_epochs: float = field(default=1.0, metadata={"help": "How often each prompt is answered."})
    logging_steps: float = field(
        default=1, metadata={"help": "Log every N steps; a value below 1 is a share of all steps."}
    )


def check_flags(args: PpoArguments) -> None:
    """Refuse values outside their range, and flags without effect.

    Raises:
        UserError: all problems at once.
    """
    problems = [
        f"--{name} {getattr(args, name)} must be {allowed}."
        for name, allowed, valid in (
            ("response_length", "at least 1", args.response_length >= 1),
            ("temperature", "above 0: PPO learns from sampled answers", 0 < args.temperature < math.inf),
            ("rollout_forward_batch_size", "at least 1", args.rollout_forward_batch_size >= 1),
            ("num_ppo_epochs", "at least 1", args.num_ppo_epochs >= 1),
            ("num_mini_batches", "at least 1", args.num_mini_batches >= 1),
            ("kl_coef", "0 or more", 0 <= args.kl_coef < math.inf),
            ("target_reference_kl", "above 0", args.target_reference_kl is None or args.target_reference_kl > 0),
            ("kl_horizon", "at least 1", args.kl_horizon >= 1),
            ("gamma", "between 0 and 1", 0 <= args.gamma <= 1),
            ("lam", "between 0 and 1", 0 <= args.lam <= 1),
            ("cliprange", "above 0", args.cliprange > 0),
            ("cliprange_value", "above 0", args.cliprange_value > 0),
            ("vf_coef", "above 0", args.vf_coef > 0),
            ("critic_learning_rate", "0 or more", args.critic_learning_rate is None or args.critic_learning_rate >= 0),
            ("target_kl", "above 0", args.target_kl is None or args.target_kl > 0),
            ("score_clip", "above 0", args.score_clip is None or args.score_clip > 0),
            ("missing_eos_penalty", "0 or more", args.missing_eos_penalty >= 0),
        )
        if not valid
    ]
    if args.reward_model_path is None:
        problems.append(
            "--reward_model_path is missing. Train one: python reward_modeling.py --model_name_or_path MODEL "
            "--train_file_dir data/reward --output_dir outputs/rm"
        )
    if args.use_muon:
        problems.append("--use_muon True is not for PPO, whose critic has a separate head and learning rate. Omit it.")
    if args.response_length >= args.model_max_length:
        problems.append(
            f"--response_length {args.response_length} leaves no room for a prompt in --model_max_length "
            f"{args.model_max_length}. Lower --response_length, or raise --model_max_length."
        )
    if "kl_horizon" in args.given and args.target_reference_kl is None:
        problems.append("--kl_horizon has no effect without --target_reference_kl.")
    if args.target_reference_kl is not None and args.kl_coef == 0:
        problems.append(
            "--target_reference_kl cannot adapt --kl_coef 0, which it multiplies. Start from, for example, 0.05."
        )
    if problems:
        raise UserError("\n  ".join(problems))


def name_idle_flags(args: PpoArguments) -> None:
    """Say which of the given flags cannot change anything: a step of one update never leaves its own policy."""
    idle = sorted(args.given & {"cliprange", "cliprange_value", "target_kl"})
    if args.num_ppo_epochs == args.num_mini_batches == 1 and idle and is_main_process():
        logger.warning(
            f"--{', --'.join(idle)} changes nothing: with --num_ppo_epochs 1 and --num_mini_batches 1, each step is "
            "one update, in which policy and critic are still those that answered"
        )


Reduce = Callable[[torch.Tensor], torch.Tensor]


def kl_estimate(log_probs: torch.Tensor, reference: torch.Tensor, estimator: str) -> torch.Tensor:
    """Per-token estimate of KL(policy || reference) from tokens sampled from the policy.

    k1 is the log-ratio: unbiased, and often negative. k3 adds a term of mean 0 that makes it non-negative
    (http://joschu.net/blog/kl-approx.html).

    Args:
        log_probs, reference: log-probabilities of the tokens, of the same shape.
        estimator: k1 or k3.

    Returns:
        Nats per token, of that shape.
    """
    log_ratio = log_probs - reference
    return log_ratio if estimator == "k1" else torch.expm1(-log_ratio) + log_ratio


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalized advantage estimation (https://arxiv.org/abs/1506.02438). An answer ends where its mask ends.

    Args:
        rewards: (answers, length), the reward of each token.
        values: (answers, length), the critic's estimate of the return before each token.
        mask: (answers, length), True on the tokens of answers, which are contiguous.

    Returns:
        Advantages and returns (the critic's targets), both (answers, length), 0 outside the mask.
    """
    advantages = torch.zeros_like(rewards)
    running, next_value = torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0])
    for position in reversed(range(rewards.shape[1])):
        inside = mask[:, position]
        delta = rewards[:, position] + gamma * next_value - values[:, position]
        running = torch.where(inside, delta + gamma * lam * running, 0.0)
        next_value = torch.where(inside, values[:, position], 0.0)
        advantages[:, position] = running
    return advantages, torch.where(mask, advantages + values, 0.0)


def masked_moments(values: torch.Tensor, mask: torch.Tensor, reduce: Reduce) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of the values in the mask, over all processes.

    Args:
        reduce: sums a tensor over the processes.
    """
    kept, count = values[mask].double(), reduce(mask.sum().double()).clamp(min=1)
    mean = reduce(kept.sum()) / count
    return mean, reduce(((kept - mean) ** 2).sum()) / count


def masked_whiten(values: torch.Tensor, mask: torch.Tensor, reduce: Reduce = lambda total: total) -> torch.Tensor:
    """Values normalized to mean 0 and variance 1 over the mask of all processes; 0 outside the mask."""
    mean, variance = masked_moments(values, mask, reduce)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask, whitened, 0.0).to(values.dtype)


def policy_loss(
    log_probs: torch.Tensor, old_log_probs: torch.Tensor, advantages: torch.Tensor, cliprange: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The clipped objective of PPO (equation 7 of https://arxiv.org/abs/1707.06347), per token.

    Returns:
        The loss; the probability ratio of the new policy to the old one; True where clipping removed the gradient.
    """
    ratio = torch.exp(log_probs - old_log_probs)
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    return torch.maximum(plain, clipped), ratio, clipped > plain


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, cliprange: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Half the squared error of the critic, clipped so that moving further than `cliprange` does not lower it.

    See https://arxiv.org/abs/2005.12729, section 3.

    Returns:
        The loss per token; True where clipping removed the gradient.
    """
    clipped_values = old_values + (values - old_values).clamp(-cliprange, cliprange)
    plain, clipped = (values - returns) ** 2, (clipped_values - returns) ** 2
    return 0.5 * torch.maximum(plain, clipped), clipped > plain


def explained_variance(
    values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor, reduce: Reduce = lambda total: total
) -> float:
    """1 - Var(returns - values) / Var(returns): 1 for a perfect critic, 0 for one that predicts only the mean."""
    _, residual = masked_moments(returns - values, mask, reduce)
    _, variance = masked_moments(returns, mask, reduce)
    return float(1 - residual / variance) if variance > 0 else float("nan")


def adapt_kl_coef(kl_coef: float, kl: float, target: float, answers: int, horizon: int) -> float:
    """The next KL coefficient, larger after a KL above the target (https://arxiv.org/abs/1909.08593, section 2.2)."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * answers / horizon)


class ActorCritic(torch.nn.Module):
    """Policy and critic as one module, since a distributed engine wraps a single module.

    Args:
        policy: a causal language model with a fused LM head (see `PpoTrainer`), with or without adapters.
        critic: a sequence classification model with one output, with or without adapters.
    """

    def __init__(self, policy: PreTrainedModel | PeftModel, critic: PreTrainedModel | PeftModel):
        super().__init__()
        self.policy, self.critic = policy, critic
        self.config = policy.config

    @property
    def generation_config(self) -> Any:
        return self.policy.generation_config

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.policy.get_output_embeddings()

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        for model in (self.policy, self.critic):
            model.gradient_checkpointing_enable(**options)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, answer_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probabilities, entropies and values, each of shape (sequences, length - 1), for tokens 1, 2, …

        Args:
            input_ids, attention_mask: (sequences, length), padded on the right.
            answer_mask: (sequences, length - 1), True where the token is part of an answer; outputs are 0 elsewhere.
        """
        log_probs, entropy = token_log_probs(self.policy, input_ids, attention_mask, answer_mask)
        return log_probs, entropy, token_values(self.critic, input_ids, attention_mask).masked_fill(~answer_mask, 0.0)


def token_log_probs(
    policy: torch.nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, answer_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies of the tokens of answers; see `ActorCritic.forward`."""
    labels = torch.full_like(input_ids, IGNORED)
    labels[:, 1:] = input_ids[:, 1:].masked_fill(~answer_mask, IGNORED)
    outputs = policy(
        input_ids=input_ids, attention_mask=attention_mask, labels=labels, use_cache=False, fused_lm_head=True
    )
    return outputs.log_probs.float(), outputs.entropy.detach().float()


def token_values(critic: torch.nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """The critic's estimate of the return before each token 1, 2, …: (sequences, length - 1)."""
    model = critic.get_base_model() if isinstance(critic, PeftModel) else critic
    hidden = model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    head = next(getattr(model, name) for name in HEADS if hasattr(model, name))
    return head(hidden[:, :-1]).squeeze(-1).float()


@dataclass
class Rollout:
    """The answers of one step on one process, with all that the updates need.

    All tensors have shape (answers, length - 1), except `input_ids` and `attention_mask`, (answers, length).
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    answer_mask: torch.Tensor
    log_probs: torch.Tensor
    values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor

    def rows(self, chosen: torch.Tensor) -> dict[str, torch.Tensor]:
        """A batch of some of the answers, without the columns in which all of them are padding."""
        length = int(self.attention_mask[chosen].sum(dim=1).max())
        ends = {"input_ids": length, "attention_mask": length}
        return {name: values[chosen, : ends.get(name, length - 1)] for name, values in vars(self).items()}


# Metrics of the updates, as sums over tokens in the order of `PpoTrainer.compute_loss`.
UPDATE_METRICS = ("policy_loss", "value_loss", "ratio", "clip_fraction", "value_clip_fraction", "policy_kl", "tokens")
# In nats per token, above which a warning is logged; rounding to bfloat16 alone causes a tenth of it.
MAX_SAMPLING_GAP = 0.2
CHECKPOINT_WEIGHTS, CHECKPOINT_STATE = "actor_critic.safetensors", "ppo_state.json"


class PpoTrainer(StageTrainer):
    """PPO on `transformers.Trainer`, which builds the optimizer, logs, saves and resumes.

    A step takes one batch of prompts: answers, their scores, and several updates. Steps are the unit of logging and
    saving; each depends only on the seed and its number, so that a resumed run continues as if it had never stopped.

    Args:
        model: an `ActorCritic` that is ready to train.
        reference: the frozen reference; None if it is the policy without its adapter, or with the adapter `ref`.
        scorer: the reward model.
        tasks: `messages` and `tools` of each prompt, by the `place` of its row.
        stop_ids: token ids that end an answer.
        logged_answers: number of answers of each logged step to write to answers.jsonl.
    """

    def __init__(
        self,
        *,
        reference: PreTrainedModel | None,
        scorer: RewardScorer,
        tasks: dict[str, dict[str, Any]],
        stop_ids: Sequence[int],
        logged_answers: int,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.policy, self.reference, self.scorer = self.model.policy, reference, scorer
        self.tasks, self.stop_ids, self.logged_answers = tasks, list(stop_ids), logged_answers
        self.kl_coef = self.args.kl_coef
        # Count, mean, and sum of squared deviations of all scores so far.
        self.scores_seen = torch.zeros(3, dtype=torch.float64)
        for model in filter(None, (self.model, reference)):
            if self.args.disable_dropout:
                disable_dropout(model)
        for model in filter(None, (self.policy, reference)):
            base = model.get_base_model() if isinstance(model, PeftModel) else model
            add_fused_lm_head(base, temperature=self.args.temperature, outputs=("log_probs", "entropy"))
            add_cpu_head(base, temperature=self.args.temperature)
            self.try_loss(base)
        if reference is not None and self.is_fsdp_enabled:
            reference.to(self.args.device)
        # Under ZeRO-3 the reference was sharded as it was loaded, and is gathered with the others.
        elif reference is not None and not is_deepspeed_zero3_enabled():
            self.accelerator.prepare_model(reference, evaluation_mode=True)
        # The loss is divided by the tokens of the update (see `compute_loss`); the library must not divide it again by
        # the number of accumulated batches.
        self.model_accepts_loss_kwargs = True
        self._sums: torch.Tensor | None = None
        self._step_metrics: dict[str, list[float]] = defaultdict(list)  # since the last log event
        self._last_answers: list[dict[str, Any]] = []

    def _all_models(self) -> list[torch.nn.Module]:
        return list(filter(None, (self.model, self.reference, self.scorer.model)))

    @property
    def answers_per_process(self) -> int:
        """Answers per step on one process."""
        args = self.args
        return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.num_mini_batches

    @property
    def answers_per_step(self) -> int:
        """Answers per step on all processes."""
        return self.answers_per_process * self.accelerator.num_processes

    # -- the loop -----------------------------------------------------------------------------------------------------

    def _inner_training_loop(
        self,
        batch_size: int | None = None,
        args: TrainingArguments | None = None,
        resume_from_checkpoint: str | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """The loop of PPO, in place of the library's loop over a data loader.

        The library has no hook between fetching a batch and one update from it, and PPO makes several. What surrounds
        the loop is the library's: state, optimizer, callbacks, saving and resuming.
        """
        rows, batch = len(self.train_dataset), self.answers_per_step
        per_epoch = rows / batch
        steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
        self._init_training_state(
            steps, math.ceil(per_epoch), math.ceil(steps / per_epoch), resume_from_checkpoint, trial
        )
        model, _ = self._prepare_for_training(steps, None, resume_from_checkpoint)
        if resume_from_checkpoint is not None:
            self._load_rng_state(resume_from_checkpoint)
            state = json.loads((Path(resume_from_checkpoint) / CHECKPOINT_STATE).read_text(encoding="utf-8"))
            self.kl_coef = state["kl_coef"]
            self.scores_seen = torch.tensor(state["scores_seen"], dtype=torch.float64)
            self._truncate_answers_file()
        began = time.time()
        self._initial_num_input_tokens_seen = self.state.num_input_tokens_seen
        self._tr_loss = torch.tensor(0.0, device=args.device)
        self._total_loss_scalar, self._globalstep_last_logged = 0.0, self.state.global_step
        self.control = self.callback_handler.on_train_begin(args, self.state, self.control)
        if args.eval_on_start:
            self._evaluate(trial, ignore_keys_for_eval, skip_scheduler=True)

        while self.state.global_step < steps and not self.control.should_training_stop:
            self.control = self.callback_handler.on_step_begin(args, self.state, self.control)
            with complete_weights(self, self._all_models()):
                rollout, rollout_metrics = self.roll_out(self.state.global_step)
            loss, grad_norm, update_metrics = self.learn(model, rollout)
            for name, value in {**rollout_metrics, **update_metrics, "kl_coef": self.kl_coef}.items():
                self._step_metrics[name].append(value)
            if args.target_reference_kl is not None:
                kl = rollout_metrics["kl"]
                self.kl_coef = adapt_kl_coef(
                    self.kl_coef, kl, args.target_reference_kl, self.answers_per_step, args.kl_horizon
                )
            self._tr_loss += loss
            learning_rate = self._get_learning_rate()
            self.lr_scheduler.step()
            before, self.state.global_step = self.state.global_step, self.state.global_step + 1
            self.state.epoch = self.state.global_step / per_epoch
            self.control = self.callback_handler.on_step_end(args, self.state, self.control)
            if self.state.global_step * batch // rows > before * batch // rows:
                self.control = self.callback_handler.on_epoch_end(args, self.state, self.control)
            self._maybe_log_save_evaluate(
                self._tr_loss, grad_norm, model, trial, self.state.epoch, ignore_keys_for_eval, began, learning_rate
            )
        return self._finalize_training(trial, self.state.global_step * self.answers_per_step, began)

    @torch.no_grad()
    def roll_out(self, step: int) -> tuple[Rollout, dict[str, float]]:
        """Answer the prompts of a step, score the answers, and estimate the advantage of each token.

        Returns:
            The rollout of this process, and means over the answers of all processes for the log.
        """
        args = self.args
        first = (step * self.accelerator.num_processes + self.accelerator.process_index) * self.answers_per_process
        rows = [self.train_dataset[self._prompt_index(first + number)] for number in range(self.answers_per_process)]
        tasks = [self.tasks[place_of(row)] for row in rows]
        answers = self.answer(rows, args.temperature, seed=((args.seed << 31) + (args.seed >> 31) + first) % MAX_SEED)
        ids, attention, mask = self._pad([row["prompt_ids"] for row in rows], answers)
        log_probs, entropy, reference, values = self._forward_rollout(ids, attention, mask)
        sampled = torch.zeros_like(log_probs)
        sampled[mask] = log_probs.new_tensor([each for answer in answers for each in answer.log_probs])
        raw, unreadable = self.score(tasks, answers)
        ended = torch.tensor([answer.finish_reason == "stop" for answer in answers], device=ids.device)
        scores = self._shape_scores(raw) - args.missing_eos_penalty * ~ended

        kl = torch.where(mask, kl_estimate(log_probs, reference, args.kl_estimator), 0.0)
        rewards = -self.kl_coef * kl
        # The score belongs to the last token of the answer; token t is in column t - 1.
        rewards[torch.arange(len(rewards)), attention.sum(dim=1) - 2] += scores.float()
        advantages, returns = gae(rewards, values, mask, args.gamma, args.lam)
        critic_fit = explained_variance(values, returns, mask, self._sum_over_processes)
        if args.whiten_advantages:
            advantages = masked_whiten(advantages, mask, self._sum_over_processes)

        lengths = mask.sum(dim=1)
        columns = {
            "score": raw,
            "score_squared": raw**2,
            "reward": rewards.sum(dim=1),
            "kl": kl.sum(dim=1),
            "entropy": entropy.sum(dim=1) / lengths,
            "sampling_gap": (log_probs - sampled).abs().sum(dim=1) / lengths,
            "length": lengths,
            "end_rate": ended,
            "unreadable": unreadable,
            "prompt_and_answer": attention.sum(dim=1),
        }
        sums = self._sum_over_processes(torch.stack([column.double().sum() for column in columns.values()]))
        means = dict(zip(columns, (sums / self.answers_per_step).tolist(), strict=True))
        if means["sampling_gap"] > MAX_SAMPLING_GAP and is_main_process():
            logger.warning(
                "answers are sampled from other probabilities than those trained on; they differ by "
                f"{means['sampling_gap']:.3f} nats per token: look for settings such as suppress_tokens in the model's "
                "generation_config.json"
            )
        self.state.num_input_tokens_seen += round(means.pop("prompt_and_answer") * self.answers_per_step)
        means["score_std"] = max(means.pop("score_squared") - means["score"] ** 2, 0.0) ** 0.5
        means["explained_variance"] = critic_fit
        self._last_answers = [
            {
                "prompt": self.processing_class.decode(row["prompt_ids"]),
                "answer": answer.text,
                "score": score,
                "kl": kl_of_answer,
                "ended": answer.finish_reason == "stop",
            }
            for row, answer, score, kl_of_answer in zip(
                rows, answers, raw.tolist(), columns["kl"].tolist(), strict=True
            )
        ][: self.logged_answers]
        return Rollout(ids, attention, mask, log_probs, values, advantages, returns), means

    def learn(self, model: torch.nn.Module, rollout: Rollout) -> tuple[torch.Tensor, Any, dict[str, float]]:
        """Several passes over the answers of a step, with one update per mini-batch.

        Returns:
            The mean loss of an update, the last gradient norm, and means over all tokens for the log.
        """
        args, losses, grad_norm = self.args, [], None
        self._sums = torch.zeros(len(UPDATE_METRICS), dtype=torch.float64, device=args.device)
        updates = ((epoch, part) for epoch in range(args.num_ppo_epochs) for part in range(args.num_mini_batches))
        for epoch, part in updates:
            seed = (args.seed << 31) + self.state.global_step * 1000 + epoch
            shuffled = draw_mini_batches(self.answers_per_step, args.num_mini_batches, seed, self.accelerator)
            parts = (rollout.rows(chosen) for chosen in shuffled[part].split(args.per_device_train_batch_size))
            batches, _ = self.get_batch_samples(parts, args.gradient_accumulation_steps, args.device)
            tokens = self._sum_over_processes(sum(batch["answer_mask"].sum() for batch in batches))
            before = self._sums.clone()
            loss = torch.zeros((), device=args.device)
            for number, batch in enumerate(batches):
                is_last = number == len(batches) - 1
                # As the library's own loop does: accelerate's public `accumulate` counts batches over the whole run.
                self.accelerator.gradient_state._set_sync_gradients(is_last)
                sync = is_last or self.accelerator.distributed_type == DistributedType.DEEPSPEED
                with nullcontext() if sync else self.accelerator.no_sync(model):
                    loss += self.training_step(model, batch, tokens)
            losses.append(loss)
            clipped = self._clip_grad_norm(model) if args.max_grad_norm > 0 else None
            grad_norm = self._get_grad_norm(model, clipped)
            self.optimizer.step()
            model.zero_grad()
            if args.target_kl is not None:
                update = dict(zip(UPDATE_METRICS, self._sum_over_processes(self._sums - before).tolist(), strict=True))
                if update["policy_kl"] / update["tokens"] > args.target_kl:
                    break
        sums = dict(zip(UPDATE_METRICS, self._sum_over_processes(self._sums).tolist(), strict=True))
        tokens = sums.pop("tokens")
        means = {name: total / tokens for name, total in sums.items()}
        means["updates"] = len(losses) / (args.num_ppo_epochs * args.num_mini_batches)
        return torch.stack(losses).mean(), grad_norm, means

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The batch's share of the mean loss over the tokens of an update.

        Args:
            inputs: see `Rollout`.
            num_items_in_batch: number of answer tokens in the update, on all processes.
        """
        args, mask = self.args, inputs["answer_mask"]
        log_probs, entropy, values = model(inputs["input_ids"], inputs["attention_mask"], mask)
        policy_losses, ratio, clipped = policy_loss(
            log_probs, inputs["log_probs"], inputs["advantages"], args.cliprange
        )
        value_losses, value_clipped = value_loss(values, inputs["values"], inputs["returns"], args.cliprange_value)
        if self._sums is not None:
            policy_kl = kl_estimate(inputs["log_probs"], log_probs, "k3")
            columns = (policy_losses, value_losses, ratio, clipped, value_clipped, policy_kl, mask)
            self._sums += torch.stack([column.detach()[mask].double().sum() for column in columns])
        tokens = mask.sum() if num_items_in_batch is None else num_items_in_batch
        loss = (policy_losses + args.vf_coef * value_losses)[mask].sum() / tokens
        # Gradients are averaged over the processes, while this is a share of the sum over all of them.
        return loss * self.accelerator.num_processes

    # -- the parts of a step ------------------------------------------------------------------------------------------

    def _prompt_index(self, number: int) -> int:
        """Row of the `number`-th prompt of the run; each epoch is shuffled separately."""
        epoch, position = divmod(number, len(self.train_dataset))
        generator = torch.Generator().manual_seed(self.args.order_seed + epoch)
        return int(torch.randperm(len(self.train_dataset), generator=generator)[position])

    def answer(self, rows: Sequence[dict[str, Any]], temperature: float, seed: int | None = None) -> list[Answer]:
        """One answer per row of the data set, independent of the other rows in the batch."""
        # The library replaces them by the tokenizer's own EOS token when training begins.
        self.policy.generation_config.eos_token_id = self.stop_ids
        engine = ChatEngine(self.policy, self.processing_class)
        sampling = Sampling(self.args.response_length, temperature=temperature, seed=seed, log_probs=temperature > 0)
        with self.compute_loss_context_manager():
            return engine.batch(
                [row["prompt_ids"] for row in rows],
                sampling,
                batch_size=self.args.rollout_forward_batch_size,
                tools=[self.tasks[place_of(row)]["tools"] for row in rows],
            )

    @torch.no_grad()
    def score(self, tasks: Sequence[dict[str, Any]], answers: Sequence[Answer]) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores of the answers by the reward model, with its own template and tokenizer.

        The reward model cannot read an answer that is too long for it or contains one of its special tokens. Such an
        answer gets the lowest score of the step on any process, or 0 if no answer of the step can be read.

        Returns:
            The scores in float64 and a mask of the unreadable answers, both (answers,).
        """
        encoded: list[list[int] | None] = []
        for task, answer in zip(tasks, answers, strict=True):
            reply: dict[str, Any] = {"role": "assistant", "content": answer.text}
            if answer.tool_calls:
                reply["tool_calls"] = list(answer.tool_calls)
            try:
                encoded.append(self.scorer.encode([*task["messages"], reply], task["tools"]))
            except EncodingError:
                encoded.append(None)
        readable = [ids for ids in encoded if ids is not None]
        with self.compute_loss_context_manager():
            readable_scores = iter(self.scorer.score_ids(readable, self.args.rollout_forward_batch_size))
        scores = [math.inf if ids is None else next(readable_scores) for ids in encoded]
        scores = torch.tensor(scores, dtype=torch.float64)
        scores = scores.to(self.args.device)
        unreadable = scores.isinf()
        lowest = self.accelerator.gather(scores.min().reshape(1)).min()
        return scores.masked_fill(unreadable, 0.0 if lowest.isinf() else float(lowest)), unreadable

    def _shape_scores(self, scores: torch.Tensor) -> torch.Tensor:
        """Normalize the scores with the moments of all scores so far, and clip them, as the flags say."""
        if self.args.normalize_scores:
            every = torch.ones_like(scores, dtype=torch.bool)
            mean, variance = (one.cpu() for one in masked_moments(scores, every, self._sum_over_processes))
            count, old_mean, squares = self.scores_seen
            total = count + self.answers_per_step
            # The moments of two samples combined, after Chan, Golub and LeVeque (1983).
            squares = squares + variance * self.answers_per_step
            squares = squares + (mean - old_mean) ** 2 * count * self.answers_per_step / total
            new_mean = old_mean + (mean - old_mean) * self.answers_per_step / total
            self.scores_seen = torch.stack([total, new_mean, squares])
            deviation = (squares / total).sqrt().clamp(min=1e-8)
            scores = (scores - self.scores_seen[1].to(scores.device)) / deviation.to(scores.device)
        clip = self.args.score_clip
        return scores if clip is None else scores.clamp(-clip, clip)

    def _pad(self, prompts: Sequence[list[int]], answers: Sequence[Answer]) -> tuple[torch.Tensor, ...]:
        """Ids and attention mask (answers, length), padded on the right; answer mask (answers, length - 1)."""
        length = max(len(prompt) + len(answer.token_ids) for prompt, answer in zip(prompts, answers, strict=True))
        ids = torch.full((len(prompts), length), self.processing_class.pad_token_id)
        attention, mask = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            end = len(prompt) + len(answer.token_ids)
            ids[row, :end] = torch.tensor([*prompt, *answer.token_ids])
            attention[row, :end] = 1
            mask[row, len(prompt) : end] = True
        device = self.args.device
        return ids.to(device), attention.to(device), mask[:, 1:].to(device)

    def _forward_rollout(self, *sequences: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Log-probabilities, entropies, the reference's log-probabilities, and values, before the updates of a step.

        Args:
            sequences: see `ActorCritic.forward`.
        """
        self.model.eval()
        parts = []
        for batch in zip(*(each.split(self.args.rollout_forward_batch_size) for each in sequences), strict=True):
            with self.compute_loss_context_manager():
                log_probs, entropy, values = self.model(*batch)
                with self._reference_policy() as reference:
                    reference_log_probs, _ = token_log_probs(reference, *batch)
            parts.append((log_probs, entropy, reference_log_probs, values))
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    @contextmanager
    def _reference_policy(self) -> Iterator[torch.nn.Module]:
        if self.reference is not None:
            yield self.reference
            return
        with use_adapter(self.policy, "ref" if "ref" in self.policy.peft_config else None):
            yield self.policy

    def _sum_over_processes(self, values: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(values, reduction="sum")

    # -- evaluating, logging, saving ----------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Dataset | None = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Answer the held-out prompts greedily, distributed over the processes, and score the answers."""
        dataset, began = eval_dataset or self.eval_dataset, time.time()
        indices = range(self.accelerator.process_index, len(dataset), self.accelerator.num_processes)
        rows = [dataset[number] for number in indices]
        tasks = [self.tasks[place_of(row)] for row in rows]
        with complete_weights(self, self._all_models()):
            answers = self.answer(rows, temperature=0.0) if rows else []
            # Every process takes part, even without rows, since `score` compares scores over the processes.
            scores, _ = self.score(tasks or [self.tasks[place_of(dataset[0])]], answers or [Answer("", "stop", 0, 0)])
        results = [
            (score, answer.completion_tokens, answer.finish_reason == "stop")
            for score, answer in zip(scores.tolist(), answers, strict=False)
        ]
        if self.accelerator.num_processes > 1:
            results = gather_object(results)
        means = [sum(column) / len(results) for column in zip(*results, strict=True)]
        named = zip(("score", "length", "end_rate"), means, strict=True)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in named}
        metrics[f"{metric_key_prefix}_runtime"] = time.time() - began
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._step_metrics:
            logs |= {name: sum(values) / len(values) for name, values in self._step_metrics.items()}
            logs["num_tokens"] = self.state.num_input_tokens_seen
            self._step_metrics.clear()
            if is_main_process() and self._last_answers:
                self._write_answers()
        super().log(logs, start_time)

    def _write_answers(self) -> None:
        with open(self._answers_file, "a", encoding="utf-8") as file:
            for answer in self._last_answers:
                file.write(json.dumps({"step": self.state.global_step, **answer}, ensure_ascii=False) + "\n")

    def _truncate_answers_file(self) -> None:
        """Remove what a stopped run wrote after its checkpoint, which the resumed run writes again."""
        if is_main_process() and self._answers_file.is_file():
            keep_rows(self._answers_file, self.state.global_step)

    @property
    def _answers_file(self) -> Path:
        return Path(self.args.output_dir) / "answers.jsonl"

    def set_rates(self, optimizer: torch.optim.Optimizer) -> None:
        rate = self.args.critic_learning_rate
        if rate is None:
            return
        critic = {id(parameter) for parameter in self.model.critic.parameters()}
        for group in list(optimizer.param_groups):
            in_critic = [parameter for parameter in group["params"] if id(parameter) in critic]
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in critic]
            optimizer.add_param_group({**group, "params": in_critic, "lr": rate})

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save the policy as every stage saves its model; in a checkpoint also what resuming needs."""
        folder, weights = Path(output_dir or self.args.output_dir), self._trainable_weights()
        if state_dict is not None and are_weights_sharded(self.args):
            # The model's own tensors are empty; `state_dict` has been gathered.
            of_policy = [name for name in state_dict if name.startswith("policy.")]
            own = {name.removeprefix("policy."): state_dict[name] for name in of_policy}
            self.policy.save_pretrained(folder, state_dict=own)
            weights = {name: state_dict[name].contiguous() for name in weights}
        else:
            self.policy.save_pretrained(folder)
        self.processing_class.save_pretrained(folder)
        if folder.name.startswith("checkpoint-"):
            save_file(weights, folder / CHECKPOINT_WEIGHTS)
            state = {"kl_coef": self.kl_coef, "scores_seen": self.scores_seen.tolist()}
            (folder / CHECKPOINT_STATE).write_text(json.dumps(state), encoding="utf-8")

    def _trainable_weights(self) -> dict[str, torch.Tensor]:
        """Every trainable weight of policy and critic, by name."""
        named = self.model.named_parameters()
        return {name: parameter.data.contiguous() for name, parameter in named if parameter.requires_grad}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        folder = Path(resume_from_checkpoint)
        saved, weights = load_file(folder / CHECKPOINT_WEIGHTS), self._trainable_weights()
        if saved.keys() != weights.keys():
            raise UserError(
                f"{folder} was saved by a run that trained other weights than these flags do. Pass the flags of that "
                "run, or start from scratch in another --output_dir."
            )
        for name, weight in weights.items():
            weight.copy_(saved[name])

    def _load_best_model(self) -> None:
        if is_deepspeed_zero3_enabled():
            deepspeed_load_checkpoint(self.model_wrapped, self.state.best_model_checkpoint)
            return
        self._load_from_checkpoint(self.state.best_model_checkpoint)


class ScoredAnswers:
    """Greedy answers to a few prompts with their scores, before and after training: the samples of PPO."""

    def __init__(self, trainer: PpoTrainer, prompts: Dataset, count: int):
        step = max(1, len(prompts) // max(count, 1))
        self.trainer = trainer
        if are_weights_sharded(trainer.args):
            logger.info("no sample answers: the weights are sharded over the processes")
            count = 0
        self.rows = [prompts[number] for number in range(0, len(prompts), step)[:count]]
        self.shown = [{"prompt": trainer.processing_class.decode(row["prompt_ids"])} for row in self.rows]

    def answers(self) -> list[str]:
        """The answers, each preceded by its score; an empty list on every process but the first."""
        if not self.rows or not is_main_process():
            return []
        trainer = self.trainer
        texts = []
        for row, answer in zip(self.rows, trainer.answer(self.rows, temperature=0.0), strict=True):
            task = trainer.tasks[place_of(row)]
            try:
                (score,) = trainer.scorer.score(
                    [[*task["messages"], {"role": "assistant", "content": answer.text}]], [task["tools"]]
                )
                texts.append(f"{score:.3f}: {answer.text}")
            except EncodingError as error:
                texts.append(f"no score, {error.reason}: {answer.text}")
        return texts


def load_critic(
    tokenizer: PreTrainedTokenizerBase,
    scorer: RewardScorer,
    reward_checkpoint: Checkpoint,
    args: PpoArguments,
    model_args: ModelArguments,
    lora_args: LoraArguments,
    **load: Any,
) -> PreTrainedModel | PeftModel:
    """The critic, ready to train: the reward model or the model of `--value_model_path`, with a head of one output.

    Args:
        tokenizer: that of the policy.
        scorer, reward_checkpoint: the reward model and its checkpoint.
        load: further arguments of `loading.load_trainable`.

    Raises:
        UserError: its tokenizer is not the policy's, or it is an adapter of a language model.
    """
    flag = "--reward_model_path" if args.value_model_path is None else "--value_model_path"
    path, policy = args.value_model_path or args.reward_model_path, model_args.model_name_or_path
    if args.value_model_path is None:
        start, critic_tokenizer = reward_checkpoint, scorer.tokenizer
    else:
        start = Checkpoint.resolve(path, hub=model_args.hub, cache_dir=model_args.cache_dir)
        critic_tokenizer = loading.stage_tokenizer(start, model_args)
    # --peft_path is the policy's adapter; a reward model's adapter is trained on as it is.
    lora_args = replace(lora_args, peft_path=None)
    if critic_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"the critic reads the policy's tokens, and {flag} {path} has another tokenizer. Pass a model with the "
            f"policy's tokenizer, which gets a new head: --value_model_path {policy}"
        )
    if start.adapter and not is_reward_adapter(start.adapter):
        raise UserError(
            f"{flag} {path} is an adapter of a language model. Merge it, and pass the result: python "
            f"merge_peft_adapter.py --lora_model {path} --output_dir {path}-merged"
        )
    # A new head is random, and must be the same on every process.
    set_seed(args.seed)
    try:
        with suppress_seqcls_warning():
            critic = loading.load_trainable(
                AutoModelForSequenceClassification, start, tokenizer, model_args, lora_args, num_labels=1, **load
            )
    except UserError as error:
        raise UserError(f"the critic, from {flag} {path}: {error}") from error
    if start.adapter and lora_args.use_peft:
        restore_head(critic, start.adapter)
    critic.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    score_in_float32(critic)
    return critic


def main() -> None:
    # 1 arguments
    model_args, attention_args, data_args, lora_args, run_args, args = parse_args(
        PolicyArguments,
        AttentionArguments,
        DataArguments,
        LoraArguments,
        RunArguments,
        PpoArguments,
        description=__doc__,
        program="ppo_training.py",
    )
    check_flags(args)
    training_defaults(args, adapter_rate=1e-5, full_rate=1e-6, use_peft=lora_args.use_peft)
    disable_lora_dropout(args, lora_args)
    checkpoint = loading.stage_checkpoint(model_args, lora_args)
    loading.resolve_length(args, "model_max_length", checkpoint, attention_args)
    run = Run("ppo_training", args, checkpoint, run_args, model_args, attention_args, data_args, lora_args)
    name_idle_flags(args)

    # 2 tokenizer and template
    tokenizer = loading.stage_tokenizer(checkpoint, model_args)
    stop = apply_template(tokenizer, args.template_name, args.system_prompt, args.tool_format)
    run.add_tokenizer(tokenizer)

    # 3 data: prompts; answers in the rows are not used
    data = load_data(data_args, to_task, seed=args.order_seed)
    encode = partial(encode_prompt, tokenizer, max_length=args.model_max_length - args.response_length)
    reserved = ("--response_length", args.response_length)
    train, validation = encode_sides(data, encode, data_args, args.order_seed, Prompt, checkpoint.config, reserved)
    run.add_data(data)
    run.preview(tokenizer, train)
    tasks = {place_of(row): row for rows in (data.train, data.validation) for row in rows}

    # 4 models: policy, reference (unless it is the policy without its adapter), reward model, critic
    load = {"attending": attention_args, "max_length": args.model_max_length, "bf16": args.bf16}
    policy = loading.load_trainable(AutoModelForCausalLM, checkpoint, tokenizer, model_args, lora_args, **load)
    reference = None if lora_args.use_peft else copy_policy(policy, checkpoint, model_args, lora_args, **load)
    if lora_args.use_peft and checkpoint.adapter:
        adapters.add_reference_adapter(policy, checkpoint.adapter)
    reward_checkpoint = Checkpoint.resolve(args.reward_model_path, hub=model_args.hub, cache_dir=model_args.cache_dir)
    scorer = RewardScorer.from_checkpoint(
        reward_checkpoint,
        dtype=model_args.dtype,
        load_in_4bit=model_args.load_in_4bit or model_args.qlora,
        load_in_8bit=model_args.load_in_8bit,
    )
    scorer.require_readable(
        tasks[Place(**place)] for rows in filter(None, (train, validation)) for place in rows["place"]
    )
    critic = load_critic(tokenizer, scorer, reward_checkpoint, args, model_args, lora_args, **load)

    # 5 trainer
    trainer = PpoTrainer(
        model=ActorCritic(policy, critic),
        reference=reference,
        scorer=scorer,
        tasks=tasks,
        stop_ids=stop_token_ids(tokenizer, stop),
        logged_answers=run_args.sample_prompts,
        args=args,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        loraplus_lr_ratio=lora_args.loraplus_lr_ratio,
    )

    # 6 train, save
    run.announce(
        policy, train, validation, steps_per_epoch=len(train) / trainer.answers_per_step, batch=trainer.answers_per_step
    )
    run.train_and_save(
        trainer,
        tokenizer,
        stop_ids=trainer.stop_ids,
        samples=ScoredAnswers(trainer, validation or train, run_args.sample_prompts),
        note="Reinforcement learning: the model was trained to give answers that the reward model scores highly.",
    )


if __name__ == "__main__":
    run_main(main)
