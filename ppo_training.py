"""Proximal policy optimization (PPO): the model writes answers, a reward model scores them, better ones get likelier.

Changes what the model says when it is left to itself. In each step it answers a batch of prompts; a critic learns how
good an answer is going to be, token by token; tokens after which things went better than the critic thought become
likelier, a little at a time (https://arxiv.org/abs/1707.06347). A reward for staying near the model before it keeps the
answers language (https://arxiv.org/abs/2203.02155).

    python ppo_training.py --sft_model_path outputs/sft-merged --reward_model_path outputs/rm \\
        --train_file_dir data/reward --output_dir outputs/ppo --max_steps 50
    torchrun --nproc_per_node 2 ppo_training.py --sft_model_path outputs/sft-merged --reward_model_path outputs/rm \\
        --train_file_dir data/reward --output_dir outputs/ppo --load_in_4bit True --qlora True

Data (.jsonl or .json), the prompts alone are used; data/README.md shows all forms:

    {"conversations": [{"from": "human", "value": "..."}]}

In --output_dir: the adapter (or all weights with --use_peft False), the tokenizer with its chat template,
generation_config.json, run.json, metrics.jsonl, answers.jsonl, samples.jsonl, loss.png and README.md. Guide:
docs/ppo_training.md
"""

import copy
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

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
from medicalgpt.data.formats import to_task
from medicalgpt.data.loading import load_data
from medicalgpt.data.sources import Place, place_of
from medicalgpt.data.tokenizing import encode_sides
from medicalgpt.errors import UserError, run_main
from medicalgpt.logs import is_main_process
from medicalgpt.models import adapters, loading
from medicalgpt.models.hub import HEADS, Checkpoint
from medicalgpt.models.templating import stop_token_ids
from medicalgpt.parser import parse_args
from medicalgpt.refusals import refused_in
from medicalgpt.rewards.scoring import RewardScorer, is_reward_adapter, restore_head, score_in_float32
from medicalgpt.serving.chat import ChatEngine
from medicalgpt.serving.generation import Answer, Sampling
from medicalgpt.training.cpu import add_cpu_head
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
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.trainer.reward_trainer import suppress_seqcls_warning
from trl.trainer.utils import add_fused_lm_head, use_adapter


@dataclass
class PolicyArguments(ModelArguments):
    """The policy; its flag has a second name, beside those of the other models."""

    model_name_or_path: str = field(
        metadata={
            "help": "The model that is trained, as supervised fine-tuning has left it: hub name or folder.",
            "aliases": ["--sft_model_path"],
        },
    )


@dataclass
class PpoArguments(TemplateArguments, StageDefaults, TrainingArguments):
    """What differs from transformers' `TrainingArguments`. The names are those of TRL's former PPO."""

    output_dir: str = field(default="outputs-ppo", metadata={"help": "Where the result goes."})
    reward_model_path: str | None = field(
        default=None, metadata={"help": "Reward model, with any tokenizer: hub name, folder, or folder of an adapter."}
    )
    value_model_path: str | None = field(
        default=None,
        metadata={
            "help": "What the critic starts from, with the policy's tokenizer: a reward model, or a language model, "
            "which gets a new head. Unset: the reward model."
        },
    )
    model_max_length: int = field(
        default=1024,
        metadata={
            "help": "Most tokens of a prompt with its answer. A prompt that leaves less than --response_length is "
            "refused, never cut. Unset: less if the model has fewer positions.",
            "aliases": ["--max_seq_length"],
        },
    )
    response_length: int = field(
        default=128,
        metadata={
            "help": "Most tokens of an answer.",
            "aliases": ["--max_new_tokens", "--max_completion_length", "--max_target_length"],
        },
    )
    temperature: float = field(default=1.0, metadata={"help": "Of the answers, and of all log-probabilities."})
    rollout_forward_batch_size: int = field(
        default=64,
        metadata={
            "help": "Answers written and scored at once, on a device.",
            "aliases": ["--local_rollout_forward_batch_size"],
        },
    )
    num_ppo_epochs: int = field(default=4, metadata={"help": "Times that the answers of a step are learned from."})
    num_mini_batches: int = field(
        default=4,
        metadata={
            "help": "Updates in each of these times. A step has as many answers a device as --num_mini_batches x "
            "--gradient_accumulation_steps x --per_device_train_batch_size."
        },
    )
    kl_coef: float = field(default=0.05, metadata={"help": "Weight of the KL to the reference in the reward."})
    kl_estimator: str = field(
        default="k1",
        metadata={
            "help": "k1: log-ratio, without bias; k3: less noise, never negative (joschu.net/blog/kl-approx.html).",
            "choices": ["k1", "k3"],
        },
    )
    target_reference_kl: float | None = field(
        default=None,
        metadata={"help": "Adapt --kl_coef so that the KL of an answer to the reference comes to this, in nats."},
    )
    kl_horizon: int = field(default=10_000, metadata={"help": "Answers in which --kl_coef adapts."})
    gamma: float = field(default=1.0, metadata={"help": "Discount of later rewards, a token."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of generalized advantage estimation."})
    cliprange: float = field(default=0.2, metadata={"help": "Clip range of the probability ratio."})
    cliprange_value: float = field(default=0.2, metadata={"help": "Clip range of the critic's change."})
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the critic's loss."})
    critic_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the critic. Unset: that of the policy."}
    )
    target_kl: float | None = field(
        default=None,
        metadata={
            "help": "Stop learning from the answers of a step when the policy has moved so far, in nats a token."
        },
    )
    whiten_advantages: bool = field(default=True, metadata={"help": "Bring advantages to mean 0 and variance 1."})
    normalize_scores: bool = field(
        default=False, metadata={"help": "Bring scores to mean 0 and variance 1 of all scores so far."}
    )
    score_clip: float | None = field(default=None, metadata={"help": "Clip scores to plus and minus this."})
    missing_eos_penalty: float = field(
        default=1.0, metadata={"help": "Taken from the score of an answer that does not end within its tokens."}
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "No dropout anywhere, so that log-probabilities can be compared."}
    )
    learning_rate: float | None = field(default=None, metadata={"help": "Default: 1e-5 for adapters, 1e-6 without."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Times that each prompt is answered."})
    logging_steps: float = field(default=1, metadata={"help": "Log every so many steps; below 1, that share of them."})


def check_flags(args: PpoArguments) -> None:
    """Refuse values outside their range, and flags without effect.

    Raises:
        UserError: all of them at once.
    """
    problems = [
        f"--{name} {getattr(args, name)} must be {wanted}."
        for name, wanted, sound in (
            ("response_length", "at least 1", args.response_length >= 1),
            ("temperature", "above 0: PPO learns from what chance brings", 0 < args.temperature < math.inf),
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
        if not sound
    ]
    if args.reward_model_path is None:
        problems.append(
            "--reward_model_path is missing. Train one: python reward_modeling.py --model_name_or_path MODEL "
            "--train_file_dir data/reward --output_dir outputs/rm"
        )
    if args.response_length >= args.model_max_length:
        problems.append(
            f"--response_length {args.response_length} leaves no room for a prompt in --model_max_length "
            f"{args.model_max_length}. Lower the one or raise the other."
        )
    if "kl_horizon" in args.given and args.target_reference_kl is None:
        problems.append("--kl_horizon has no effect without --target_reference_kl.")
    if args.target_reference_kl is not None and args.kl_coef == 0:
        problems.append("--target_reference_kl cannot adapt --kl_coef 0, which is multiplied. Start from 0.05, say.")
    sharded = args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1")
    if sharded or is_deepspeed_zero3_enabled():
        problems.append(
            "PPO writes answers between its updates, for which each process needs all weights: FSDP and ZeRO-3 do not "
            "go with it. Use --deepspeed zero2.json, or an adapter on a quantized base: --qlora True."
        )
    if problems:
        raise UserError("\n  ".join(problems))


Reduce = Callable[[torch.Tensor], torch.Tensor]


def kl_estimate(log_probs: torch.Tensor, reference: torch.Tensor, estimator: str) -> torch.Tensor:
    """Estimate of KL(policy || reference) from tokens that the policy has drawn, token by token.

    k1 is the log-ratio: right in the mean, and often negative. k3 adds a term of mean 0 that makes it positive
    (http://joschu.net/blog/kl-approx.html).

    Args:
        log_probs, reference: log-probabilities of the tokens, of the same shape.
        estimator: k1 or k3.
    """
    log_ratio = log_probs - reference
    return log_ratio if estimator == "k1" else torch.expm1(-log_ratio) + log_ratio


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalized advantage estimation (https://arxiv.org/abs/1506.02438). An answer ends where its mask ends.

    Args:
        rewards: of each token.
        values: the critic's estimate before each token of what is to come.
        mask: True on the tokens of answers, which have no gap.

    Returns:
        Advantages and returns (what the critic should have said), 0 outside of the mask.
    """
    advantages = torch.zeros_like(rewards)
    running, next_value = torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0])
    for position in reversed(range(rewards.shape[1])):
        inside = mask[:, position]
        surprise = rewards[:, position] + gamma * next_value - values[:, position]
        running = torch.where(inside, surprise + gamma * lam * running, 0.0)
        next_value = torch.where(inside, values[:, position], 0.0)
        advantages[:, position] = running
    return advantages, torch.where(mask, advantages + values, 0.0)


def masked_moments(values: torch.Tensor, mask: torch.Tensor, reduce: Reduce) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance over the mask, of all processes.

    Args:
        reduce: sums a tensor over the processes.
    """
    kept, count = values[mask].double(), reduce(mask.sum().double()).clamp(min=1)
    mean = reduce(kept.sum()) / count
    return mean, reduce(((kept - mean) ** 2).sum()) / count


def masked_whiten(values: torch.Tensor, mask: torch.Tensor, reduce: Reduce = lambda total: total) -> torch.Tensor:
    """Values brought to mean 0 and variance 1 over the mask of all processes; 0 outside of it."""
    mean, variance = masked_moments(values, mask, reduce)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask, whitened, 0.0).to(values.dtype)


def policy_loss(
    log_probs: torch.Tensor, old_log_probs: torch.Tensor, advantages: torch.Tensor, cliprange: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The clipped objective of PPO (equation 7 of https://arxiv.org/abs/1707.06347), token by token.

    Returns:
        The loss; the ratio of the new to the old probability; whether clipping took the gradient away.
    """
    ratio = torch.exp(log_probs - old_log_probs)
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    return torch.maximum(plain, clipped), ratio, clipped > plain


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, cliprange: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Half the squared error of the critic, which may not gain by moving further than `cliprange`; and where that is.

    See https://arxiv.org/abs/2005.12729, section 3.
    """
    near = old_values + (values - old_values).clamp(-cliprange, cliprange)
    plain, clipped = (values - returns) ** 2, (near - returns) ** 2
    return 0.5 * torch.maximum(plain, clipped), clipped > plain


def explained_variance(
    values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor, reduce: Reduce = lambda total: total
) -> float:
    """1 - Var(returns - values) / Var(returns): 1 for a critic that knows all, 0 for one that knows the mean only."""
    _, missed = masked_moments(returns - values, mask, reduce)
    _, variance = masked_moments(returns, mask, reduce)
    return float(1 - missed / variance) if variance > 0 else float("nan")


def adapted_kl_coef(kl_coef: float, kl: float, target: float, answers: int, horizon: int) -> float:
    """The next KL coefficient: larger after a KL above the target (https://arxiv.org/abs/1909.08593, section 2.2)."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * answers / horizon)


class ActorCritic(torch.nn.Module):
    """Policy and critic as one module, since a distributed engine wraps one.

    Args:
        policy: a causal model with a fused LM head (see `PpoTrainer`), with or without adapters.
        critic: a model for sequence classification with one output, with or without adapters.
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
        """Log-probabilities, entropies and values, each of shape (sequences, length - 1), of tokens 1, 2, …

        Args:
            input_ids, attention_mask: (sequences, length), padded on the right.
            answer_mask: (sequences, length - 1), True where that token belongs to an answer; the others give 0.
        """
        log_probs, entropy = token_log_probs(self.policy, input_ids, attention_mask, answer_mask)
        return log_probs, entropy, token_values(self.critic, input_ids, attention_mask).masked_fill(~answer_mask, 0.0)


def token_log_probs(
    policy: torch.nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, answer_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability and entropy of the tokens of answers; see `ActorCritic.forward`."""
    labels = torch.full_like(input_ids, IGNORED)
    labels[:, 1:] = input_ids[:, 1:].masked_fill(~answer_mask, IGNORED)
    outputs = policy(
        input_ids=input_ids, attention_mask=attention_mask, labels=labels, use_cache=False, fused_lm_head=True
    )
    return outputs.log_probs.float(), outputs.entropy.detach().float()


def token_values(critic: torch.nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """(sequences, length - 1): before each token 1, 2, … what the critic thinks is to come."""
    model = critic.get_base_model() if isinstance(critic, PeftModel) else critic
    hidden = model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    head = next(getattr(model, name) for name in HEADS if hasattr(model, name))
    return head(hidden[:, :-1]).squeeze(-1).float()


@dataclass
class Rollout:
    """The answers of one step on one process: what was written, and what is learned from it.

    Tensors are of shape (answers, length - 1), but for `input_ids` and `attention_mask`, (answers, length); `scores`
    and `kl` have one number for each answer.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    answer_mask: torch.Tensor
    log_probs: torch.Tensor
    values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor

    def rows(self, chosen: torch.Tensor) -> dict[str, torch.Tensor]:
        """The batch of some answers, without columns in which all of them are padding."""
        length = int(self.attention_mask[chosen].sum(dim=1).max())
        ends = {"input_ids": length, "attention_mask": length}
        return {name: values[chosen, : ends.get(name, length - 1)] for name, values in vars(self).items()}


# Sums over tokens, in the order of `PpoTrainer.compute_loss`.
LEARNED = ("policy_loss", "value_loss", "ratio", "clip_fraction", "value_clip_fraction", "policy_kl", "tokens")
# Rounding to bfloat16 makes a tenth of it.
LARGEST_SAMPLING_GAP = 0.2
CHECKPOINT_WEIGHTS, CHECKPOINT_STATE = "actor_critic.safetensors", "ppo_state.json"


class PpoTrainer(StageTrainer):
    """PPO on `transformers.Trainer`, which is left to build the optimizer, to log, to save and to resume.

    A step is what one batch of prompts gives: answers, their scores, and several updates from them. Steps are counted,
    logged and saved, and follow from the seed and their number alone, so that a resumed run goes on as it would have.

    Args:
        model: with a policy that is ready to train.
        reference: the frozen reference; None where it is the policy without its adapter, or with the adapter `ref`.
        scorer: the reward model.
        tasks: `messages` and `tools` of each prompt, by the `place` of its row.
        stop_ids: with which an answer ends.
        answers_shown: answers of each logged step that are written to answers.jsonl.
    """

    def __init__(
        self,
        *,
        reference: PreTrainedModel | None,
        scorer: RewardScorer,
        tasks: dict[str, dict[str, Any]],
        stop_ids: Sequence[int],
        answers_shown: int,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.policy, self.reference, self.scorer = self.model.policy, reference, scorer
        self.tasks, self.stop_ids, self.answers_shown = tasks, list(stop_ids), answers_shown
        self.kl_coef = self.args.kl_coef
        # Count, mean and sum of squared deviations of all scores so far.
        self.scores_seen = torch.zeros(3, dtype=torch.float64)
        for model in filter(None, (self.model, reference)):
            if self.args.disable_dropout:
                disable_dropout(model)
        for model in filter(None, (self.policy, reference)):
            base = model.get_base_model() if isinstance(model, PeftModel) else model
            add_fused_lm_head(base, temperature=self.args.temperature, outputs=("log_probs", "entropy"))
            add_cpu_head(base, temperature=self.args.temperature)
        if reference is not None:
            self.accelerator.prepare_model(reference, evaluation_mode=True)
        # The loss is divided by the tokens of a whole update (see `compute_loss`), not once more by its batches.
        self.model_accepts_loss_kwargs = True
        self._sums: torch.Tensor | None = None
        self._noted: dict[str, list[float]] = defaultdict(list)
        self._shown: list[dict[str, Any]] = []

    @property
    def answers_per_process(self) -> int:
        """Answers of one step."""
        args = self.args
        return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.num_mini_batches

    @property
    def answers_per_step(self) -> int:
        """The same of all processes."""
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
        """The loop of PPO, in place of the library's over a data loader."""
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
            self._forget_later_answers()
        began = time.time()
        self._initial_num_input_tokens_seen = self.state.num_input_tokens_seen
        self._tr_loss = torch.tensor(0.0, device=args.device)
        self._total_loss_scalar, self._globalstep_last_logged = 0.0, self.state.global_step
        self.control = self.callback_handler.on_train_begin(args, self.state, self.control)
        if args.eval_on_start:
            self._evaluate(trial, ignore_keys_for_eval, skip_scheduler=True)

        while self.state.global_step < steps and not self.control.should_training_stop:
            self.control = self.callback_handler.on_step_begin(args, self.state, self.control)
            rollout, seen = self.roll_out(self.state.global_step)
            loss, grad_norm, learned = self.learn(model, rollout)
            for name, value in {**seen, **learned, "kl_coef": self.kl_coef}.items():
                self._noted[name].append(value)
            if args.target_reference_kl is not None:
                self.kl_coef = adapted_kl_coef(
                    self.kl_coef, seen["kl"], args.target_reference_kl, self.answers_per_step, args.kl_horizon
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
        """Answer the prompts of a step, score the answers, and find out how good each token was.

        Returns:
            What is learned from, on this process; and means over the answers of all processes, for the log.
        """
        args = self.args
        first = (step * self.accelerator.num_processes + self.accelerator.process_index) * self.answers_per_process
        rows = [self.train_dataset[self._prompt_at(first + number)] for number in range(self.answers_per_process)]
        tasks = [self.tasks[place_of(row)] for row in rows]
        answers = self.answer(rows, args.temperature, seed=(args.seed << 31) + first)
        ids, attention, mask = self._padded([row["prompt_ids"] for row in rows], answers)
        log_probs, entropy, reference, values = self._look_at(ids, attention, mask)
        sampled = torch.zeros_like(log_probs)
        sampled[mask] = log_probs.new_tensor([each for answer in answers for each in answer.log_probs])
        raw, unreadable = self.score(tasks, answers)
        ended = torch.tensor([answer.finish_reason == "stop" for answer in answers], device=ids.device)
        scores = self._shaped(raw) - args.missing_eos_penalty * ~ended

        kl = torch.where(mask, kl_estimate(log_probs, reference, args.kl_estimator), 0.0)
        rewards = -self.kl_coef * kl
        # The score belongs to the last token of the answer; token t is in column t - 1.
        rewards[torch.arange(len(rewards)), attention.sum(dim=1) - 2] += scores.float()
        advantages, returns = gae(rewards, values, mask, args.gamma, args.lam)
        fit = explained_variance(values, returns, mask, self._total)
        if args.whiten_advantages:
            advantages = masked_whiten(advantages, mask, self._total)

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
        sums = self._total(torch.stack([column.double().sum() for column in columns.values()]))
        means = dict(zip(columns, (sums / self.answers_per_step).tolist(), strict=True))
        if means["sampling_gap"] > LARGEST_SAMPLING_GAP and is_main_process():
            logger.warning(
                f"answers are drawn from other probabilities than those learned from, by {means['sampling_gap']:.3f} "
                "nats a token: look for settings such as suppress_tokens in the model's generation_config.json"
            )
        self.state.num_input_tokens_seen += round(means.pop("prompt_and_answer") * self.answers_per_step)
        means["score_std"] = max(means.pop("score_squared") - means["score"] ** 2, 0.0) ** 0.5
        means["explained_variance"] = fit
        self._shown = [
            {
                "prompt": self.processing_class.decode(row["prompt_ids"]),
                "answer": answer.text,
                "score": score,
                "kl": own_kl,
                "ended": answer.finish_reason == "stop",
            }
            for row, answer, score, own_kl in zip(rows, answers, raw.tolist(), columns["kl"].tolist(), strict=True)
        ][: self.answers_shown]
        return Rollout(ids, attention, mask, log_probs, values, advantages, returns), means

    def learn(self, model: torch.nn.Module, rollout: Rollout) -> tuple[torch.Tensor, Any, dict[str, float]]:
        """Several passes over the answers of a step, an update for each part of them.

        Returns:
            The mean loss of an update, the last norm of the gradient, and means over all tokens seen, for the log.
        """
        args, losses, grad_norm = self.args, [], None
        self._sums = torch.zeros(len(LEARNED), dtype=torch.float64, device=args.device)
        updates = ((epoch, part) for epoch in range(args.num_ppo_epochs) for part in range(args.num_mini_batches))
        for epoch, part in updates:
            order = torch.Generator().manual_seed((args.seed << 31) + self.state.global_step * 1000 + epoch)
            mixed = torch.randperm(self.answers_per_process, generator=order).chunk(args.num_mini_batches)
            parts = (rollout.rows(chosen) for chosen in mixed[part].split(args.per_device_train_batch_size))
            batches, _ = self.get_batch_samples(parts, args.gradient_accumulation_steps, args.device)
            tokens = self._total(sum(batch["answer_mask"].sum() for batch in batches))
            before = self._sums.clone()
            loss = torch.zeros((), device=args.device)
            for number, batch in enumerate(batches):
                is_last = number == len(batches) - 1
                self.accelerator.gradient_state._set_sync_gradients(is_last)
                together = is_last or self.accelerator.distributed_type == DistributedType.DEEPSPEED
                with nullcontext() if together else self.accelerator.no_sync(model):
                    loss += self.training_step(model, batch, tokens)
            losses.append(loss)
            if args.max_grad_norm > 0:
                grad_norm = self._get_grad_norm(model, self._clip_grad_norm(model))
            self.optimizer.step()
            model.zero_grad()
            if args.target_kl is not None:
                moved = dict(zip(LEARNED, self._total(self._sums - before).tolist(), strict=True))
                if moved["policy_kl"] / moved["tokens"] > args.target_kl:
                    break
        sums = dict(zip(LEARNED, self._total(self._sums).tolist(), strict=True))
        seen = sums.pop("tokens")
        share = len(losses) / (args.num_ppo_epochs * args.num_mini_batches)
        return (
            torch.stack(losses).mean(),
            grad_norm,
            {
                **{name: total / seen for name, total in sums.items()},
                "updates": share,
            },
        )

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """A batch's share of the mean over the tokens of an update.

        Args:
            inputs: see `Rollout`.
            num_items_in_batch: tokens of answers in the update, of all processes.
        """
        args, mask = self.args, inputs["answer_mask"]
        log_probs, entropy, values = model(inputs["input_ids"], inputs["attention_mask"], mask)
        of_policy, ratio, clipped = policy_loss(log_probs, inputs["log_probs"], inputs["advantages"], args.cliprange)
        of_critic, value_clipped = value_loss(values, inputs["values"], inputs["returns"], args.cliprange_value)
        if self._sums is not None:
            moved = kl_estimate(inputs["log_probs"], log_probs, "k3")
            columns = (of_policy, of_critic, ratio, clipped, value_clipped, moved, mask)
            self._sums += torch.stack([column.detach()[mask].double().sum() for column in columns])
        tokens = mask.sum() if num_items_in_batch is None else num_items_in_batch
        loss = (of_policy + args.vf_coef * of_critic)[mask].sum() / tokens
        # Gradients are averaged over the processes, and this is a share of a sum over all of them.
        return loss * self.accelerator.num_processes

    # -- the parts of a step ------------------------------------------------------------------------------------------

    def _prompt_at(self, number: int) -> int:
        """The row that comes at this place of an endless row of epochs, each in an order of its own."""
        epoch, place = divmod(number, len(self.train_dataset))
        generator = torch.Generator().manual_seed(self.args.order_seed + epoch)
        return int(torch.randperm(len(self.train_dataset), generator=generator)[place])

    def answer(self, rows: Sequence[dict[str, Any]], temperature: float, seed: int | None = None) -> list[Answer]:
        """An answer to the prompt of each row of the data set; the same whatever else is in the batch."""
        # The library puts the tokenizer's own end in their place when training begins.
        self.policy.generation_config.eos_token_id = self.stop_ids
        engine = ChatEngine(self.policy, self.processing_class)
        sampling = Sampling(self.args.response_length, temperature, seed=seed, log_probs=temperature > 0)
        with self.compute_loss_context_manager():
            return engine.batch(
                [row["prompt_ids"] for row in rows],
                sampling,
                batch_size=self.args.rollout_forward_batch_size,
                tools=[self.tasks[place_of(row)]["tools"] for row in rows],
            )

    @torch.no_grad()
    def score(self, tasks: Sequence[dict[str, Any]], answers: Sequence[Answer]) -> tuple[torch.Tensor, torch.Tensor]:
        """What the reward model says of each answer, in its own words and tokens: (answers,), and which it cannot read.

        It cannot read what is too long for it, or spells one of its special tokens; that gets the lowest score that any
        answer of the step has, or 0 where none has one.
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
            found = iter(self.scorer.score_ids(readable, self.args.rollout_forward_batch_size))
        scores = torch.tensor([math.inf if ids is None else next(found) for ids in encoded], dtype=torch.float64)
        scores = scores.to(self.args.device)
        unreadable = scores.isinf()
        lowest = self.accelerator.gather(scores.min().reshape(1)).min()
        return scores.masked_fill(unreadable, 0.0 if lowest.isinf() else float(lowest)), unreadable

    def _shaped(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores as they are learned from: brought to mean 0 and variance 1 of all so far, and clipped, if asked to."""
        if self.args.normalize_scores:
            every = torch.ones_like(scores, dtype=torch.bool)
            mean, variance = (one.cpu() for one in masked_moments(scores, every, self._total))
            count, old_mean, squares = self.scores_seen
            both = count + self.answers_per_step
            # Chan, Golub and LeVeque's way of joining the moments of two samples.
            squares = squares + variance * self.answers_per_step
            squares = squares + (mean - old_mean) ** 2 * count * self.answers_per_step / both
            self.scores_seen = torch.stack([both, old_mean + (mean - old_mean) * self.answers_per_step / both, squares])
            deviation = (squares / both).sqrt().clamp(min=1e-8)
            scores = (scores - self.scores_seen[1].to(scores.device)) / deviation.to(scores.device)
        clip = self.args.score_clip
        return scores if clip is None else scores.clamp(-clip, clip)

    def _padded(self, prompts: Sequence[list[int]], answers: Sequence[Answer]) -> tuple[torch.Tensor, ...]:
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

    def _look_at(self, *sequences: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Log-probabilities, entropies, the reference's log-probabilities, and values, before anything is learned."""
        self.model.eval()
        parts = []
        for batch in zip(*(whole.split(self.args.rollout_forward_batch_size) for whole in sequences), strict=True):
            with self.compute_loss_context_manager():
                log_probs, entropy, values = self.model(*batch)
                with self._as_reference() as reference:
                    of_reference, _ = token_log_probs(reference, *batch)
            parts.append((log_probs, entropy, of_reference, values))
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    @contextmanager
    def _as_reference(self) -> Iterator[torch.nn.Module]:
        if self.reference is not None:
            yield self.reference
            return
        with use_adapter(self.policy, "ref" if "ref" in self.policy.peft_config else None):
            yield self.policy

    def _total(self, values: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(values, reduction="sum")

    # -- evaluating, logging, saving ----------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Dataset | None = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Greedy answers to the held-out prompts, shared out over the processes, and their scores."""
        dataset, began = eval_dataset or self.eval_dataset, time.time()
        own = range(self.accelerator.process_index, len(dataset), self.accelerator.num_processes)
        rows = [dataset[number] for number in own]
        tasks = [self.tasks[place_of(row)] for row in rows]
        answers = self.answer(rows, temperature=0.0) if rows else []
        # Every process takes part, with or without answers of its own, since scores are compared.
        scores, _ = self.score(tasks or [self.tasks[place_of(dataset[0])]], answers or [Answer("", "stop", 0, 0)])
        seen = [
            (score, answer.completion_tokens, answer.finish_reason == "stop")
            for score, answer in zip(scores.tolist(), answers, strict=False)
        ]
        if self.accelerator.num_processes > 1:
            seen = gather_object(seen)
        means = [sum(column) / len(seen) for column in zip(*seen, strict=True)]
        found = dict(zip(("score", "length", "end_rate"), means, strict=True))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        metrics[f"{metric_key_prefix}_runtime"] = time.time() - began
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._noted:
            logs |= {name: sum(values) / len(values) for name, values in self._noted.items()}
            logs["num_tokens"] = self.state.num_input_tokens_seen
            self._noted.clear()
            if is_main_process() and self._shown:
                self._write_answers()
        super().log(logs, start_time)

    def _write_answers(self) -> None:
        with open(self._answers_file, "a", encoding="utf-8") as file:
            for answer in self._shown:
                file.write(json.dumps({"step": self.state.global_step, **answer}, ensure_ascii=False) + "\n")

    def _forget_later_answers(self) -> None:
        """What a stopped run wrote beyond its checkpoint will be written once more."""
        if is_main_process() and self._answers_file.is_file():
            lines = self._answers_file.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if json.loads(line)["step"] <= self.state.global_step]
            self._answers_file.write_text("".join(kept), encoding="utf-8")

    @property
    def _answers_file(self) -> Path:
        return Path(self.args.output_dir) / "answers.jsonl"

    def set_rates(self, optimizer: torch.optim.Optimizer) -> None:
        rate = self.args.critic_learning_rate
        if rate is None:
            return
        critic = {id(parameter) for parameter in self.model.critic.parameters()}
        for group in list(optimizer.param_groups):
            own = [parameter for parameter in group["params"] if id(parameter) in critic]
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in critic]
            optimizer.add_param_group({**group, "params": own, "lr": rate})

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The policy, as any stage saves its model; in a checkpoint also everything that training goes on with."""
        folder = Path(output_dir or self.args.output_dir)
        self.policy.save_pretrained(folder)
        self.processing_class.save_pretrained(folder)
        if folder.name.startswith("checkpoint-"):
            save_file(self._trained(), folder / CHECKPOINT_WEIGHTS)
            state = {"kl_coef": self.kl_coef, "scores_seen": self.scores_seen.tolist()}
            (folder / CHECKPOINT_STATE).write_text(json.dumps(state), encoding="utf-8")

    def _trained(self) -> dict[str, torch.Tensor]:
        """Every weight that training changes, by its name."""
        named = self.model.named_parameters()
        return {name: parameter.data.contiguous() for name, parameter in named if parameter.requires_grad}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        saved, own = load_file(folder / CHECKPOINT_WEIGHTS), self._trained()
        if saved.keys() != own.keys():
            raise UserError(
                f"{folder} was made with other weights trained than these flags train. Give the flags of the run that "
                "made it, or start anew in another --output_dir."
            )
        for name, weight in own.items():
            weight.copy_(saved[name])

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


class ScoredAnswers:
    """Greedy answers to a few prompts with their scores, before and after training: what PPO has for samples."""

    def __init__(self, trainer: PpoTrainer, prompts: Dataset, count: int):
        step = max(1, len(prompts) // max(count, 1))
        self.trainer = trainer
        self.rows = [prompts[number] for number in range(0, len(prompts), step)[:count]]
        self.shown = [{"prompt": trainer.processing_class.decode(row["prompt_ids"])} for row in self.rows]

    def answers(self) -> list[str]:
        """The answers, their scores before them; an empty list on every process but the first."""
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
    judge: Checkpoint,
    args: PpoArguments,
    model_args: ModelArguments,
    lora_args: LoraArguments,
    **load: Any,
) -> PreTrainedModel | PeftModel:
    """The critic, ready to train: the reward model, or what `--value_model_path` names, with a head of one output.

    Args:
        tokenizer: of the policy.
        scorer, judge: the reward model and its checkpoint.
        load: further arguments of `loading.load_trainable`.

    Raises:
        UserError: it reads other tokens than the policy, or is an adapter of a language model.
    """
    flag = "--reward_model_path" if args.value_model_path is None else "--value_model_path"
    path, policy = args.value_model_path or args.reward_model_path, model_args.model_name_or_path
    if args.value_model_path is None:
        start, theirs = judge, scorer.tokenizer
    else:
        start = Checkpoint.resolve(path, hub=model_args.hub, cache_dir=model_args.cache_dir)
        theirs = loading.stage_tokenizer(start, model_args)
    # What the adapter of the policy is shaped by, that of a reward model is not: it goes on in its own shape.
    lora_args = replace(lora_args, peft_path=None)
    if theirs.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"the critic judges the policy's tokens, and {flag} {path} reads other ones. Name a model with the "
            f"policy's tokenizer, whose head will be new: --value_model_path {policy}"
        )
    if start.adapter and not is_reward_adapter(start.adapter):
        raise UserError(
            f"{flag} {path} is an adapter of a language model. Merge it, and name the result: python "
            f"merge_peft_adapter.py --lora_model {path} --output_dir {path}-merged"
        )
    # A new head is drawn at random, the same in every process.
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
        unused=refused_in("ppo_training.py"),
    )
    check_flags(args)
    if args.load_best_model_at_end and not args.given & {"metric_for_best_model", "greater_is_better"}:
        args.metric_for_best_model, args.greater_is_better = "score", True
    training_defaults(args, adapter_rate=1e-5, full_rate=1e-6, use_peft=lora_args.use_peft)
    disable_lora_dropout(args, lora_args)
    checkpoint = loading.stage_checkpoint(model_args, lora_args)
    loading.resolve_length(args, "model_max_length", checkpoint, attention_args)
    run = Run("ppo_training", args, checkpoint, run_args, model_args, attention_args, data_args, lora_args)

    # 2 tokenizer and template
    tokenizer = loading.stage_tokenizer(checkpoint, model_args)
    stop = apply_template(tokenizer, args.template_name, args.system_prompt, args.tool_format)

    # 3 data: prompts; answers in the rows are not used
    data = load_data(data_args, to_task, seed=args.order_seed)
    encode = partial(encode_prompt, tokenizer, max_length=args.model_max_length - args.response_length)
    train, validation = encode_sides(data, encode, data_args, args.order_seed, Prompt)
    run.add_data(data)
    run.preview(tokenizer, train)
    tasks = {place_of(row): row for rows in (data.train, data.validation) for row in rows}

    # 4 models: policy, reference where it is not the policy without its adapter, reward model, critic
    load = {"attending": attention_args, "max_length": args.model_max_length, "bf16": args.bf16}
    policy = loading.load_trainable(AutoModelForCausalLM, checkpoint, tokenizer, model_args, lora_args, **load)
    reference = None if lora_args.use_peft else copy.deepcopy(policy).requires_grad_(False)
    if lora_args.use_peft and checkpoint.adapter:
        adapters.add_reference_adapter(policy, checkpoint.adapter)
    judge = Checkpoint.resolve(args.reward_model_path, hub=model_args.hub, cache_dir=model_args.cache_dir)
    scorer = RewardScorer.from_checkpoint(
        judge,
        dtype=model_args.dtype,
        load_in_4bit=model_args.load_in_4bit or model_args.qlora,
        load_in_8bit=model_args.load_in_8bit,
    )
    scorer.require_readable(
        tasks[Place(**place)] for rows in filter(None, (train, validation)) for place in rows["place"]
    )
    critic = load_critic(tokenizer, scorer, judge, args, model_args, lora_args, **load)

    # 5 trainer
    trainer = PpoTrainer(
        model=ActorCritic(policy, critic),
        reference=reference,
        scorer=scorer,
        tasks=tasks,
        stop_ids=stop_token_ids(tokenizer, stop),
        answers_shown=run_args.sample_prompts,
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
        note="Reinforcement learning: the model has learned to write what the reward model scores high.",
    )


if __name__ == "__main__":
    run_main(main)
