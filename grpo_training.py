"""Group relative policy optimization (GRPO): reinforcement learning with rewards that are computed, not learned.

The model learns from its own attempts: it answers each prompt several times, reward functions score the answers, and
answers that score above the average of their group become more likely (https://arxiv.org/abs/2402.03300). The group's
mean replaces PPO's critic. What counts as better is defined in medicalgpt/rewards/rewards.py.

    python grpo_training.py --model_name_or_path outputs/sft-merged --train_file_dir data/grpo --output_dir outputs/grpo
    torchrun --nproc_per_node 2 grpo_training.py --model_name_or_path outputs/sft-merged \\
        --train_file_dir data/grpo --output_dir outputs/grpo --load_in_4bit True --qlora True

Data (.jsonl or .json): a prompt in any format that data/README.md shows, and the fields that rewards compare with:

    {"question": "...", "answer": "2.5 mL", "type": "number"}

In --output_dir: the adapter (or the full model with --use_peft False), the tokenizer with its chat template,
generation_config.json, run.json, metrics.jsonl, samples.jsonl, loss.png and README.md. Guide: docs/grpo_training.md
"""

import copy
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
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
from medicalgpt.data.encoding import Prompt, encode_prompt, render_prompts
from medicalgpt.data.loading import LoadedData, load_data
from medicalgpt.data.tokenizing import encode_sides
from medicalgpt.errors import UserError, run_main
from medicalgpt.files import hash_file
from medicalgpt.formats.tasks import to_task
from medicalgpt.logs import heartbeat, world_size
from medicalgpt.models import adapters, loading
from medicalgpt.models.hub import Adapter, Checkpoint
from medicalgpt.models.templating import reply_text, stop_token_ids
from medicalgpt.models.towers import has_towers
from medicalgpt.parser import parse_args
from medicalgpt.rewards.columns import add_reward_columns, reward_columns
from medicalgpt.rewards.coverage import check_coverage, find_unscorable
from medicalgpt.rewards.reward_check import check_rewards
from medicalgpt.rewards.rewards import REWARDS, SYSTEM_PROMPT, RewardFunction, choose_rewards, wrap_reward
from medicalgpt.rewards.scoring import RewardScorer, model_reward
from medicalgpt.training.cpu import add_cpu_head
from medicalgpt.training.disk import on_every_process, saving
from medicalgpt.training.engines import are_weights_sharded
from medicalgpt.training.row_order import StepBatches, data_parallel_rank
from medicalgpt.training.runs import Run
from medicalgpt.training.trainers import StageTrainer, disable_dropout, disable_lora_dropout, training_defaults
from template import apply_template

import torch
from loguru import logger
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput
from trl import GRPOConfig, GRPOTrainer
from trl.import_utils import is_vllm_available
from trl.models.utils import prepare_deepspeed
from trl.trainer.utils import add_fused_lm_head


class PromptSampler(torch.utils.data.Sampler):
    """Row indices in the order that `GRPOTrainer` expects: each prompt once per answer, each batch several times.

    The order depends on seed and epoch only, so that a resumed run continues where the stopped one was. TRL's own
    `RepeatSampler` drops the prompts that do not fill the last batch; here it is filled from the start of the epoch.

    Args:
        num_prompts: number of prompts in the data set.
        num_generations: answers per prompt.
        batch_size: prompts that are answered at a time.
        repeat_count: how often each batch is yielded, once for each pass over a part of its answers.
        shuffle: draw a new order in each epoch.
    """

    def __init__(
        self, num_prompts: int, *, num_generations: int, batch_size: int, repeat_count: int, seed: int, shuffle: bool
    ):
        self.num_prompts, self.num_generations = num_prompts, num_generations
        self.batch_size, self.repeat_count = batch_size, repeat_count
        self.seed, self.shuffle, self.epoch = seed, shuffle, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.arange(self.num_prompts)
        if self.shuffle:
            order = torch.randperm(self.num_prompts, generator=generator)
        filled = order[torch.arange(self.num_batches * self.batch_size) % self.num_prompts]
        for batch in filled.split(self.batch_size):
            for _ in range(self.repeat_count):
                yield from batch.repeat_interleave(self.num_generations).tolist()

    @property
    def num_batches(self) -> int:
        return math.ceil(self.num_prompts / self.batch_size)

    def __len__(self) -> int:
        return self.num_batches * self.batch_size * self.num_generations * self.repeat_count


def zero_std_groups(rewards: torch.Tensor, weights: torch.Tensor, num_generations: int) -> torch.Tensor:
    """True for each group whose answers all have the same weighted reward, and therefore no advantage: (groups,).

    Args:
        rewards: (groups x num_generations, functions); NaN where a function does not apply. An answer that no function
            applies to is ignored in its group.
        weights: (functions,)
        num_generations: answers per group.
    """
    unscored = rewards.isnan().all(dim=1)
    total = (rewards * weights).nansum(dim=1)
    highest = total.masked_fill(unscored, -math.inf).view(-1, num_generations).amax(dim=1)
    lowest = total.masked_fill(unscored, math.inf).view(-1, num_generations).amin(dim=1)
    return ~(highest - lowest > 1e-6)


class GroupTrainer(StageTrainer, GRPOTrainer):
    """`trl.GRPOTrainer` on encoded prompts, with the differences of `StageTrainer` and the following ones.

    - Every token in `stop_ids` ends an answer, and the generation settings that a checkpoint recommends for serving do
      not change sampling.
    - The reference is the model that training starts from: the base without the new adapter, a frozen copy of the
      adapter that training continues, or `reference`, a frozen copy of the full model.
    - Every prompt of an epoch is answered (see `PromptSampler`), and a resumed run continues exactly, even when the
      checkpoint was written between two generations.
    - Evaluation answers each held-out prompt once, greedily, and averages the rewards; it draws no random numbers and
      does not depend on the batch size.
    - `frac_reward_zero_std` is the share of groups whose answers all have the same reward, whatever `--scale_rewards`
      is; when it is 1, the log says so.

    Where a private method of TRL is overridden, a comment says why no argument or public hook will do.

    Args:
        stop_ids: token ids that end an answer.
        reference: the frozen copy for full fine-tuning, not yet on a device; None otherwise.
        start_from: the adapter that training continues, if any.
    """

    def __init__(
        self, *, stop_ids: Sequence[int], reference: PreTrainedModel | None, start_from: Adapter | None, **kwargs: Any
    ):
        args, model = kwargs["args"], kwargs["model"]
        model.generation_config.eos_token_id = list(stop_ids)
        if args.use_vllm:
            args.generation_kwargs = {"stop_token_ids": list(stop_ids)}
        # With a beta, TRL would load the reference again from the base's folder, which is not where training starts, or
        # copy only those weights of an adapter whose names it knows.
        beta, args.beta = args.beta, 0.0
        super().__init__(**kwargs)
        args.beta = self.beta = beta
        if args.use_vllm:
            # TRL sets neither with vLLM, and evaluation generates without it.
            self.generation_config = self.generation_kwargs = None
        self._add_cpu_head(self.model, measured=True)
        self.try_loss(self.model, routed=self.aux_loss_enabled)
        if args.disable_dropout:
            disable_dropout(self.model)
        if beta:
            self._add_reference(reference, start_from)
        self._prompt_ids: list[list[int]] = []
        self._resumed_from: str | None = None
        self._zero_std_shares: list[float] = []  # since the last log event, as the next
        self._ratio_deviations: list[float] = []
        self._group_counts = torch.zeros(2, dtype=torch.int64)  # all groups, and those without a learning signal

    def _add_cpu_head(self, model: PreTrainedModel | PeftModel, measured: bool) -> None:
        # The entropy bonus needs the gradient of the entropy, which the faster head does not compute.
        if not self._entropy_bonus_enabled and not self.aux_loss_enabled:
            base = model.get_base_model() if isinstance(model, PeftModel) else model
            add_cpu_head(base, measured=measured, temperature=self.temperature)

    def _add_reference(self, reference: PreTrainedModel | None, start_from: Adapter | None) -> None:
        if isinstance(self.model, PeftModel):
            if start_from:
                adapters.add_reference_adapter(self.model, start_from)
            return
        if self.args.disable_dropout:
            disable_dropout(reference)
        add_fused_lm_head(reference, temperature=self.temperature)
        self._add_cpu_head(reference, measured=False)
        if self.is_deepspeed_enabled:
            self.ref_model = prepare_deepspeed(reference, self.accelerator)
        else:
            self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)

    # -- sampling -----------------------------------------------------------------------------------------------------

    def train_batches(self) -> StepBatches:
        """The row indices of this process's batches, each of which is sampled at a time."""
        args = self.args
        order = PromptSampler(
            len(self.train_dataset),
            num_generations=self.num_generations,
            batch_size=args.generation_batch_size // self.num_generations,
            repeat_count=self.num_iterations * args.steps_per_generation,
            seed=args.order_seed,
            shuffle=self.shuffle_dataset,
        )
        rank, processes = data_parallel_rank(self.accelerator)
        return StepBatches(order, self._train_batch_size * args.steps_per_generation, 1, rank=rank, processes=processes)

    def get_batch_samples(self, *args: Any) -> tuple[list[dict[str, torch.Tensor]], Any]:
        """The batches of a step with answers and rewards, so that they can be inspected before the step is taken."""
        began = time.perf_counter()
        rows, count = super().get_batch_samples(*args)
        if self._resumed_from:
            self._load_rng_state(self._resumed_from)
        # After an evaluation the model is still in eval mode, in which TRL does not buffer answers.
        self.model.train()
        before, batches = self._step, []
        with heartbeat(lambda: "sampling answers"):
            for batch in rows:
                batches.append(super()._prepare_inputs(batch))
                self._step += 1
        self._step = before
        self._current_train_step_time += time.perf_counter() - began
        return batches, count

    def _prepare_inputs(self, inputs: Any) -> Any:
        # `training_step` calls this on each batch; those of `get_batch_samples` are prepared already.
        return inputs if isinstance(inputs, dict) else super()._prepare_inputs(inputs)

    # TRL would render and tokenize each prompt again, with its own idea of tools, and has no argument for token ids. It
    # passes whole rows to the first of these methods and only their messages to the second.
    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._prompt_ids = [row["prompt_ids"] for row in inputs]
        return super()._generate_and_score_completions(inputs)

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict]:
        return self._prompt_ids, None, {}

    # TRL samples with dropout on and without the autocast that it computes log-probabilities with, and transformers
    # fills in what TRL leaves open, such as suppressed tokens, from the checkpoint's generation config. There is no
    # hook around generation alone.
    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> tuple[list[list[int]], Any]:
        model = self.accelerator.unwrap_model(self.model)
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        recommended, training = base.generation_config, model.training
        base.generation_config = GenerationConfig()
        model.eval()
        try:
            with nullcontext() if self.use_vllm else self.accelerator.autocast():
                return super()._generate_single_turn(*args, **kwargs)
        finally:
            base.generation_config = recommended
            model.train(training)

    # The only place where the rewards of all processes are seen by function, before they are summed; and where the text
    # that TRL decodes can be replaced: it holds the stop token unless the tokenizer flags it as special.
    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, ids: list[list[int]]) -> torch.Tensor:
        texts = [reply_text(self.processing_class, answer, self.eos_token_ids) for answer in ids]
        replies = [[{"role": "assistant", "content": text}] for text in texts]
        rewards = super()._calculate_rewards(inputs, prompts, replies, ids)
        if self.model.training:
            zero_std = zero_std_groups(rewards, self.reward_weights.to(rewards.device), self.num_generations)
            self._zero_std_shares.append(zero_std.float().mean().item())
            self._group_counts += torch.tensor([len(zero_std), zero_std.sum()])
        return rewards

    # TRL keeps the log-probabilities of its loss to itself; without them `ratio_deviation` would cost another pass.
    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        outputs = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._log_probs = outputs[0].detach()
        return outputs

    def compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        """TRL's loss; also records `ratio_deviation`, the mean over tokens of |policy / sampling policy - 1|."""
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if (old_log_probs := inputs.get("old_per_token_logps")) is not None:
            deviation = ((self._log_probs - old_log_probs)[inputs["completion_mask"].bool()].exp() - 1).abs()
            sums = torch.stack([deviation.sum(), deviation.new_tensor(len(deviation))])
            total, count = self.accelerator.reduce(sums).tolist()
            self._ratio_deviations.append(total / max(count, 1))
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training and self._zero_std_shares:
            # TRL measures something else where rewards are scaled over the batch or one by one, and overwrites `logs`
            # with its own metrics.
            self._metrics["train"]["frac_reward_zero_std"], self._zero_std_shares = self._zero_std_shares, []
        if self.model.training and self._ratio_deviations:
            logs["ratio_deviation"] = sum(self._ratio_deviations) / len(self._ratio_deviations)
            self._ratio_deviations.clear()
        super().log(logs, start_time)
        groups, zero_std = self._group_counts.tolist()
        if logs.get("frac_reward_zero_std") == 1.0:
            logger.warning(
                f"no learning signal at step {self.state.global_step}: in 100% of the groups all answers to a prompt "
                "have the same reward, so nothing is learned from them; see docs/grpo_training.md"
            )
        if "train_runtime" in logs and groups:
            prefix = "no learning signal in this run: " if zero_std == groups else ""
            share = f"{zero_std:,} of {groups:,} groups ({zero_std / groups:.0%})"
            logger.info(f"{prefix}in {share} all answers had the same reward")

    # -- evaluation ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluation_loop(
        self,
        dataloader: torch.utils.data.DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Means over the held-out prompts: `reward`, `rewards/NAME/mean`, length and share of truncated answers."""
        dataset, world = dataloader.dataset, self.args.world_size
        self.model.eval()
        # Every process gets the same number of rows, since all generate and gather together; extra rows are dropped.
        per_process, size, parts = math.ceil(len(dataset) / world), self.args.per_device_eval_batch_size, []
        with heartbeat(lambda: f"{len(parts) * size * world} of {len(dataset)} held-out prompts answered"):
            for start in range(0, per_process, size):
                positions = range(start, min(start + size, per_process))
                rows = [position * world + self.args.process_index for position in positions]
                results = self._evaluate_batch(dataset.__getitems__([row % len(dataset) for row in rows]))
                real = [position * world + rank < len(dataset) for rank in range(world) for position in positions]
                parts.append(results[real])
        lengths, truncated, *columns = torch.cat(parts).T
        rewards = torch.stack(columns, dim=1)
        totals = (rewards * self.reward_weights).nansum(dim=1)
        means = {"reward": totals[~rewards.isnan().all(dim=1)].mean()}
        means |= {f"rewards/{name}/mean": columns[n].nanmean() for n, name in enumerate(self.reward_func_names)}
        means |= {"completions/mean_length": lengths.mean(), "completions/clipped_ratio": truncated.mean()}
        metrics = {f"{metric_key_prefix}_{name}": mean.item() for name, mean in means.items() if not mean.isnan()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(dataset))

    def _evaluate_batch(self, rows: list[dict[str, Any]]) -> torch.Tensor:
        """Length, 1 if truncated, and each reward of the answers of all processes: (answers, 2 + functions)."""
        answers = self._greedy_answers([row["prompt_ids"] for row in rows])
        rewards = self._calculate_rewards(rows, [row["prompt"] for row in rows], None, answers)
        # TRL would add what the reward functions log here to the metrics of the next training step.
        self._pending_extra_logs.clear()
        self._pending_metrics.clear()
        lengths = [[len(ids), not ids or ids[-1] not in self.eos_token_ids] for ids in answers]
        lengths = self.accelerator.gather(torch.tensor(lengths, device=rewards.device, dtype=rewards.dtype))
        return torch.cat([lengths, rewards], dim=1).cpu().double()

    def _greedy_answers(self, prompts: list[list[int]]) -> list[list[int]]:
        # TRL's generation, which gathers weights under ZeRO-3 and FSDP, reads its settings from the trainer only.
        sampling = self.generation_config, self.use_vllm
        self.generation_config = GenerationConfig(
            max_new_tokens=self.max_completion_length,
            do_sample=False,
            eos_token_id=self.eos_token_ids,
            pad_token_id=self.processing_class.pad_token_id,
            disable_compile=True,
        )
        self.use_vllm = False
        try:
            return self._generate_single_turn(prompts, None, {}, 1)[0]
        finally:
            self.generation_config, self.use_vllm = sampling

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        # Answers that are still to be trained on. Sampled again on resuming, they would differ.
        if self._step % (self.args.steps_per_generation * self.num_iterations):
            folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            with on_every_process(together=True), saving(folder.parent, folder.name):
                torch.save({"step": self._step, "answers": self._buffered_inputs}, folder / self._answers_file)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._resumed_from = checkpoint
        if checkpoint and (file := Path(checkpoint) / self._answers_file).is_file():
            buffered = torch.load(file, map_location=self.args.device, weights_only=True)
            self._step, self._buffered_inputs = buffered["step"], buffered["answers"]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        # transformers restores the state after fetching the batches of the first step, which are sampled by then; the
        # state is restored before that instead (`get_batch_samples`), and the library's own call is skipped.
        if checkpoint is None or self._resumed_from:
            self._resumed_from = None
            super()._load_rng_state(checkpoint)

    @property
    def _answers_file(self) -> str:
        return f"answers_{self.args.process_index}.pt"


# docs/grpo_training.md explains each loss and names its paper.
LOSSES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo")
# Losses that clip the probability ratio, and losses that sum over tokens, which a ratio per sequence does not suit.
CLIPPED_LOSSES = {"grpo", "dr_grpo", "dapo", "bnpo", "luspo"}
TOKEN_LOSSES = {"dr_grpo", "dapo", "bnpo", "cispo", "vespo"}
# CISPO's cap is a ratio, not a distance from 1 (ScaleRL, https://arxiv.org/abs/2510.13786). TRL would take --epsilon
# for it, 0.2, and so scale down every gradient to a fifth.
CISPO_CAP = 5.0
# Flags that have an effect with --check_rewards; all others are for training.
CHECK_REWARDS_FLAGS = {
    *("check_rewards", "reward_funcs", "reward_weights", "reward_file", "reward_min_length", "reward_max_length"),
    *("reward_model_path", "per_device_train_batch_size", "hub", "cache_dir", "encoding", "reward_tolerance"),
}


@dataclass
class PolicyArguments(ModelArguments):
    """The policy; optional, since `--check_rewards` needs no model."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Hub name, local folder, or the folder of an adapter (its base is found automatically)."},
    )


@dataclass
class GrpoArguments(TemplateArguments, StageDefaults, GRPOConfig):
    """What differs from TRL's `GRPOConfig`."""

    BEST_METRIC: ClassVar[str] = "reward"
    HELP: ClassVar[dict[str, str]] = {
        "num_generations": "Answers per prompt, which are compared with each other (the group); at least 2.",
        "num_iterations": "Number of updates on each batch of answers.",
        "steps_per_generation": "Batches whose answers are sampled together. Unset: --gradient_accumulation_steps, "
        "that is one step.",
        "generation_batch_size": "The same, as the number of answers of all processes; give one of the two.",
        "shuffle_dataset": "Shuffle the prompts in each epoch; False keeps their order.",
        "temperature": "Temperature of sampling and of all log-probabilities.",
        "top_p": "Sample from the most likely tokens with this total probability.",
        "top_k": "Sample from the k most likely tokens; 0: from all.",
        "min_p": "Sample from tokens with at least this share of the highest probability.",
        "repetition_penalty": "Above 1: tokens of the prompt and of the answer so far become less likely.",
        "cache_implementation": "Type of KV cache used by transformers for generation.",
        "beta": "Coefficient of the KL penalty; the higher, the closer the model stays to the reference. 0: no "
        "reference.",
        "use_bias_correction_kl": "With --beta: weight the KL by the importance ratio "
        "(https://arxiv.org/abs/2512.02556).",
        "epsilon": "Clip range of the ratio below 1.",
        "epsilon_high": "Clip range of the ratio above 1. Unset: --epsilon. DAPO (https://arxiv.org/abs/2503.14476): "
        "0.28. For cispo the highest ratio itself, 1 or more; unset: 5.",
        "delta": "Upper bound of the ratio for answers with a negative advantage, above 1 + --epsilon_high "
        "(https://arxiv.org/abs/2505.07291).",
        "mask_truncated_completions": "Exclude answers that hit the length limit from the loss.",
        "off_policy_mask_threshold": "Mask answers with a negative advantage whose KL from the current policy exceeds "
        "this (https://arxiv.org/abs/2512.02556).",
        "top_entropy_quantile": "Train on this share of tokens only, those with the highest entropy "
        "(https://arxiv.org/abs/2506.01939).",
        "entropy_coef": "Weight of the entropy bonus.",
        "use_adaptive_entropy": "Adapt that weight (https://arxiv.org/abs/2505.22312).",
        "entropy_target": "Entropy per token, in nats, below which the bonus grows.",
        "entropy_coef_min": "Minimum weight.",
        "entropy_coef_max": "Maximum weight.",
        "entropy_coef_delta": "Change of the weight per step.",
        "sapo_temperature_pos": "SAPO (https://arxiv.org/abs/2511.20347): temperature for answers with a positive "
        "advantage.",
        "sapo_temperature_neg": "SAPO: temperature for answers with a negative advantage.",
        "vespo_k_pos": "VESPO (https://arxiv.org/abs/2602.10693): exponent of the weight of answers with a positive "
        "advantage.",
        "vespo_k_neg": "VESPO: exponent for answers with a negative advantage.",
        "vespo_lambda_pos": "VESPO: decay for answers with a positive advantage.",
        "vespo_lambda_neg": "VESPO: decay for answers with a negative advantage.",
        "log_completions": "Print answers with their rewards, and save them below --output_dir.",
        "num_completions_to_print": "Number of answers printed. Unset: all.",
        "log_unique_prompts": "Log each prompt only once.",
        "ds3_gather_for_generation": "Under ZeRO-3, gather all weights for generation; False: slower, less memory.",
        "use_vllm": "Generate with vLLM, which must be installed.",
        "vllm_gpu_memory_utilization": "Share of the GPU's memory for vLLM in this process.",
        "vllm_enable_sleep_mode": "vLLM releases its memory during the update of the weights.",
        "vllm_max_model_length": "Maximum number of tokens of a prompt and its answer in vLLM.",
        "vllm_tensor_parallel_size": "Number of GPUs over which vLLM shards the model.",
        "vllm_model_impl": "vLLM's own implementation of the model, or that of transformers.",
        "vllm_structured_outputs_regex": "Regular expression that answers generated by vLLM must match.",
        "vllm_server_base_url": "Address of the server, such as http://127.0.0.1:8000.",
        "vllm_server_host": "Host of the server, if no address is given.",
        "vllm_server_port": "Port of the server, if no address is given.",
        "vllm_server_timeout": "Seconds to wait for the server.",
        "vllm_group_port": "Port through which the server receives the updated weights.",
        "vllm_importance_sampling_correction": "Correct for the difference between vLLM's probabilities and the "
        "model's.",
        "vllm_importance_sampling_mode": "Per token or per sequence; truncate the ratio or mask what exceeds the "
        "limits.",
        "vllm_importance_sampling_clip_max": "Upper limit of the ratio.",
        "vllm_importance_sampling_clip_min": "Lower limit of the ratio.",
    }

    output_dir: str = field(default="outputs-grpo", metadata={"help": "Where the result goes."})
    system_prompt: str | None = field(
        default=None,
        metadata={
            "help": "System prompt for rows without one; saved with the template for serving. Default: one that asks "
            "for <think> and <answer>. none: the template's own."
        },
    )
    reward_funcs: list[str] = field(
        default_factory=lambda: ["accuracy", "format"],
        metadata={
            "help": f"Rewards to add up: {', '.join(REWARDS)}, and functions of --reward_file. none: only "
            "--reward_model_path."
        },
    )
    reward_weights: list[float] | None = field(
        default=None,
        metadata={"help": "One weight for each of --reward_funcs, and one for --reward_model_path. Default: all 1."},
    )
    reward_file: str | None = field(
        default=None,
        metadata={"help": "Python file with functions for --reward_funcs. It is executed: use only code you trust."},
    )
    reward_model_path: str | None = field(
        default=None,
        metadata={"help": "Reward model whose score is an additional reward: folder or hub name, any tokenizer."},
    )
    reward_min_length: int = field(default=20, metadata={"help": "Characters below which the reward `length` drops."})
    reward_max_length: int = field(default=1000, metadata={"help": "Characters above which the reward `length` drops."})
    reward_tolerance: float | None = field(
        default=None,
        metadata={
            "help": "Deviation of a number that the reward `accuracy` accepts, as a share of the answer, such as 0.02. "
            "A row's field `tolerance` takes precedence."
        },
    )
    check_rewards: str | None = field(
        default=None,
        metadata={"help": "Do not train; report how well the rewards separate good from bad answers in this file."},
    )
    model_max_length: int = field(
        default=1024,
        metadata={
            "help": "Maximum number of tokens of prompt and answer together; less if the model has fewer positions.",
            "aliases": ["--max_seq_length"],
        },
    )
    max_completion_length: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of tokens of an answer, including its end. A prompt that leaves less room is "
            "refused, never truncated. Default: half of --model_max_length."
        },
    )
    # With TRL's default of 1, a step would see a single prompt.
    gradient_accumulation_steps: int = field(default=4, metadata={"help": "Batches per optimizer step."})
    disable_dropout: bool = field(
        default=True, metadata={"help": "Disable all dropout, so that log-probabilities can be compared."}
    )
    learning_rate: float | None = field(
        default=None, metadata={"help": "Default: 1e-5 for adapters, 1e-6 for full fine-tuning."}
    )
    # Without choices, TRL would reject an unknown name only in the first step.
    loss_type: str = field(
        default="dapo",
        metadata={
            "help": "Loss, which determines how the tokens of answers are weighted; see docs/grpo_training.md.",
            "choices": list(LOSSES),
        },
    )
    importance_sampling_level: str | None = field(
        default=None,
        metadata={
            "help": "Probability ratio per token, or per sequence as in GSPO (https://arxiv.org/abs/2507.18071). "
            "Default: sequence for luspo, token for all others.",
            "choices": ["token", "sequence"],
        },
    )
    scale_rewards: str = field(
        default="group",
        metadata={
            "help": "Standard deviation that advantages are divided by: of the group, of the whole batch, or none, as "
            "in Dr. GRPO (https://arxiv.org/abs/2503.20783).",
            "choices": ["group", "batch", "none"],
        },
    )
    multi_objective_aggregation: str = field(
        default="sum_then_normalize",
        metadata={
            "help": "Sum the rewards, then normalize; or normalize each one first (https://arxiv.org/abs/2601.05242).",
            "choices": ["sum_then_normalize", "normalize_then_sum"],
        },
    )
    vllm_mode: str = field(
        default="colocate",
        metadata={
            "help": "vLLM in this process, or on a server started with `vllm serve`.",
            "choices": ["colocate", "server"],
        },
    )

    def __post_init__(self):
        # Evaluation answers each prompt once.
        self.num_generations_eval = 1
        self._refuse_idle_training()
        self._check_group_sizes()
        if self.loss_type == "cispo" and self.epsilon_high is None:
            self.epsilon_high = CISPO_CAP
        if self.importance_sampling_level is None:
            self.importance_sampling_level = "sequence" if self.loss_type == "luspo" else "token"
        super().__post_init__()

    def _check_group_sizes(self) -> None:
        """Raises ValueError if batches would split a group of answers."""
        for name in ("num_generations", "num_iterations", "steps_per_generation", "generation_batch_size"):
            lowest = 2 if name == "num_generations" else 1
            if getattr(self, name) is not None and getattr(self, name) < lowest:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least {lowest}.")
        if self.generation_batch_size is not None and self.steps_per_generation is not None:
            raise ValueError("--generation_batch_size and --steps_per_generation exclude each other; keep one of them.")
        per_pass = self.per_device_train_batch_size * world_size()
        flag = "gradient_accumulation_steps" if self.steps_per_generation is None else "steps_per_generation"
        answers = self.generation_batch_size or per_pass * getattr(self, flag)
        if answers % per_pass:
            raise ValueError(
                f"--generation_batch_size {answers} must be a multiple of {per_pass}, the answers in one forward pass "
                "(--per_device_train_batch_size on each process)."
            )
        if answers % self.num_generations:
            needed = self.num_generations // math.gcd(self.num_generations, per_pass)
            if flag == "gradient_accumulation_steps" and self.generation_batch_size is None:
                # Then a step is one batch of answers, and a larger one is what comes closest to what was requested.
                raised = math.ceil(self.gradient_accumulation_steps / needed) * needed
                self.notices = [
                    f"--gradient_accumulation_steps is {raised}, not {self.gradient_accumulation_steps}: a step of "
                    f"{answers} answers would split a group of --num_generations {self.num_generations}."
                ]
                self.gradient_accumulation_steps = raised
                return
            remedy = f"make --{flag} a multiple of {needed}"
            if self.generation_batch_size is not None:
                remedy = f"make --generation_batch_size a multiple of {math.lcm(per_pass, self.num_generations)}"
            raise ValueError(
                f"{answers} answers are sampled at a time, which is not a multiple of --num_generations "
                f"{self.num_generations}; {remedy}, or choose another --num_generations."
            )


def check_flags(args: GrpoArguments) -> None:
    """Refuse flags that have no effect because of other flags, and values outside their range.

    Raises:
        UserError: the first problem, with the remedy.
    """
    if args.use_vllm and not is_vllm_available():
        raise UserError(
            "--use_vllm True needs vLLM, which is not installed here. It needs a separate environment, see "
            "docs/grpo_training.md. To sample with transformers instead, omit --use_vllm."
        )
    for name, (has_effect, reason) in flag_effects(args).items():
        if name in args.given and not has_effect:
            raise UserError(f"--{name} has no effect here: {reason}. Omit it.")
    for name, allowed, valid in (
        ("beta", "0 or more", args.beta >= 0),
        ("epsilon", "above 0", args.epsilon > 0),
        ("epsilon_high", "above 0", args.epsilon_high is None or args.epsilon_high > 0),
        ("temperature", "above 0", args.temperature > 0),
        ("top_p", "above 0 and at most 1", 0 < args.top_p <= 1),
        ("top_k", "0 or more", args.top_k >= 0),
        ("min_p", "0 or more and at most 1", args.min_p is None or 0 <= args.min_p <= 1),
        ("top_entropy_quantile", "0 or more and at most 1", 0 <= args.top_entropy_quantile <= 1),
        ("entropy_coef", "0 or more", args.entropy_coef >= 0),
        ("repetition_penalty", "above 0", args.repetition_penalty > 0),
    ):
        if not valid:
            raise UserError(f"--{name} {getattr(args, name)} must be {allowed}.")
    if args.loss_type == "cispo" and args.epsilon_high < 1:
        raise UserError(
            f"--epsilon_high {args.epsilon_high:g} with --loss_type cispo is the highest ratio, not a distance from 1: "
            f"every gradient would be multiplied by it. Omit it for {CISPO_CAP:g}, or give 1 or more."
        )
    if args.importance_sampling_level == "sequence" and args.loss_type in TOKEN_LOSSES:
        raise UserError(
            f"--importance_sampling_level sequence cannot be combined with --loss_type {args.loss_type}, which sums "
            "over tokens: long answers would weigh more than short ones. For GSPO add --loss_type grpo."
        )


def flag_effects(args: GrpoArguments) -> dict[str, tuple[Any, str]]:
    """By flag, for flags that depend on others: whether it has an effect, and the reason if it has none."""
    # While the weights that train on an answer are those that sampled it, the probability ratio is 1.
    rounds = args.steps_per_generation * args.num_iterations
    moved = args.gradient_accumulation_steps % rounds != 0 or args.use_vllm
    corrected = args.use_vllm and args.vllm_importance_sampling_correction
    on_policy = (
        "each answer is trained on once, with the weights that sampled it, so the ratio is 1; add --num_iterations 2, "
        f"or --steps_per_generation {2 * args.gradient_accumulation_steps}"
    )
    loss, vllm, adaptive = args.loss_type, "it is for --use_vllm True", "it is for --use_adaptive_entropy True"
    clipped = moved and loss in CLIPPED_LOSSES
    effects = {
        "epsilon": (clipped, f"--loss_type {loss} has no lower bound" if moved else on_policy),
        "epsilon_high": (
            clipped or loss == "cispo" and (moved or args.epsilon_high == CISPO_CAP),
            f"--loss_type {loss} has no upper bound" if moved else on_policy,
        ),
        "delta": (clipped, f"--loss_type {loss} is not clipped" if moved else on_policy),
        "importance_sampling_level": (
            args.importance_sampling_level == "token" or moved or args.beta and args.use_bias_correction_kl,
            on_policy,
        ),
        "off_policy_mask_threshold": (moved, on_policy),
        "use_bias_correction_kl": (args.beta, "it is for --beta above 0"),
        "scale_rewards": (
            args.multi_objective_aggregation == "sum_then_normalize",
            "--multi_objective_aggregation normalize_then_sum scales each reward separately",
        ),
        "entropy_coef_min": (args.use_adaptive_entropy, adaptive),
        "entropy_coef_max": (args.use_adaptive_entropy, adaptive),
        "entropy_coef_delta": (args.use_adaptive_entropy, adaptive),
        "entropy_target": (args.use_adaptive_entropy, adaptive),
        "num_completions_to_print": (args.log_completions, "it is for --log_completions True"),
        "log_unique_prompts": (args.log_completions, "it is for --log_completions True"),
        "ds3_gather_for_generation": (args.deepspeed, "it is for --deepspeed zero3.json"),
        "cache_implementation": (not args.use_vllm, "vLLM has its own cache"),
    }
    for name in GrpoArguments.__dataclass_fields__:
        if name.startswith(("sapo_", "vespo_")):
            kind = name.partition("_")[0]
            other_loss = f"it is for --loss_type {kind}, not {loss}"
            effects[name] = (loss == kind and moved, on_policy if loss == kind else other_loss)
        elif name.startswith("vllm_importance_sampling_"):
            effects[name] = (
                args.use_vllm if name.endswith("correction") else corrected,
                f"{vllm} --vllm_importance_sampling_correction True",
            )
        elif name.startswith(("vllm_server_", "vllm_group_port")):
            effects[name] = (args.use_vllm and args.vllm_mode == "server", f"{vllm} --vllm_mode server")
        elif name in ("vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_tensor_parallel_size"):
            effects[name] = (args.use_vllm and args.vllm_mode == "colocate", f"{vllm} --vllm_mode colocate")
        elif name.startswith("vllm_"):
            effects[name] = (args.use_vllm, vllm)
    return effects


def resolve_completion_length(args: GrpoArguments) -> tuple[str, int]:
    """Set the default of `max_completion_length`, once the model's maximum length is known.

    Returns:
        The flag and its value: the tokens of the maximum length that are kept for an answer.

    Raises:
        UserError: no room is left for a prompt.
    """
    if args.max_completion_length is None:
        args.max_completion_length = max(1, args.model_max_length // 2)
    if not 0 < args.max_completion_length < args.model_max_length:
        raise UserError(
            f"--max_completion_length {args.max_completion_length} must be above 0 and leave room for a prompt within "
            f"--model_max_length {args.model_max_length}. Lower it, or raise --model_max_length."
        )
    return "--max_completion_length", args.max_completion_length


def resolve_rewards(args: GrpoArguments) -> dict[str, RewardFunction]:
    """The reward functions that the flags name, without the reward model.

    Raises:
        UserError: see `choose_rewards`; also no reward at all, or a number of weights that does not match.
    """
    names = [] if args.reward_funcs == ["none"] else args.reward_funcs
    for flag in ("reward_min_length", "reward_max_length"):
        if flag in args.given and "length" not in names:
            raise UserError(f"--{flag} has no effect here: it is for --reward_funcs length. Omit it.")
    if args.reward_tolerance is not None and "accuracy" not in names:
        raise UserError("--reward_tolerance has no effect here: it is for --reward_funcs accuracy. Omit it.")
    lengths = {"min_length": args.reward_min_length, "max_length": args.reward_max_length}
    functions = choose_rewards(names, args.reward_file, **lengths, tolerance=args.reward_tolerance)
    rewards = [*functions, *(["reward_model"] if args.reward_model_path else [])]
    if "reward_model" in functions:
        raise UserError(f"--reward_file {args.reward_file}: the name reward_model is taken. Rename the function.")
    if not rewards:
        raise UserError("there is nothing to score answers with: pass --reward_funcs or --reward_model_path.")
    if args.reward_weights is not None and len(args.reward_weights) != len(rewards):
        raise UserError(
            f"--reward_weights has {len(args.reward_weights)} numbers for {len(rewards)} rewards. Give one for each "
            f"of: {', '.join(rewards)}."
        )
    return functions


def resolve_policy(args: GrpoArguments, model_args: ModelArguments, lora_args: LoraArguments) -> Checkpoint:
    """Resolve the model to train. Raises UserError if vLLM cannot take over its weights; see `stage_checkpoint` too."""
    checkpoint = loading.stage_checkpoint(model_args, lora_args)
    if args.use_vllm and has_towers(checkpoint.config):
        raise UserError(
            f"--use_vllm True: {checkpoint.name} takes images or audio too, and vLLM has its weights under other names "
            "than the language model that is trained. Omit it, to sample with transformers."
        )
    return checkpoint


def load_tasks(data_args: DataArguments, functions: dict[str, RewardFunction], seed: int) -> LoadedData:
    """The rows; one whose answer no reply could match is among the problems, if replies are compared with it."""
    data = load_data(data_args, to_task, seed=seed)
    if "accuracy" in functions:
        data.problems += find_unscorable(chain(data.train, data.validation))
    return data


def load_model_reward(
    args: GrpoArguments, model_args: ModelArguments, rows: Iterable[dict[str, Any]] = ()
) -> RewardFunction:
    """The score of the reward model as a reward function.

    Args:
        rows: prompts that it must be able to read.

    Raises:
        UserError: see `RewardScorer.from_pretrained` and `RewardScorer.require_readable`; also under ZeRO-3, which
            would shard it.
    """
    if is_deepspeed_zero3_enabled():
        raise UserError(
            "--reward_model_path cannot be combined with ZeRO-3, which shards every model over the processes. Use "
            "--deepspeed zero2.json."
        )
    scorer = RewardScorer.from_pretrained(args.reward_model_path, hub=model_args.hub, cache_dir=model_args.cache_dir)
    scorer.require_readable(rows)
    return wrap_reward("reward_model", model_reward(scorer, args.per_device_train_batch_size))


def copy_reference(model: PreTrainedModel, args: GrpoArguments) -> PreTrainedModel:
    """The reference of full fine-tuning: a frozen copy of the policy before training.

    Raises:
        UserError: the weights are sharded over the processes.
    """
    if are_weights_sharded(args):
        raise UserError(
            f"--beta {args.beta} with --use_peft False needs a second copy of the weights, which ZeRO-3 and FSDP would "
            "have to shard as well. Train an adapter, use --deepspeed zero2.json, or leave --beta at 0."
        )
    return copy.deepcopy(model).requires_grad_(False)


def main() -> None:
    # 1 arguments
    model_args, attention_args, data_args, lora_args, run_args, args = groups = parse_args(
        PolicyArguments,
        AttentionArguments,
        DataArguments,
        LoraArguments,
        RunArguments,
        GrpoArguments,
        description=__doc__,
        program="grpo_training.py",
    )
    functions = resolve_rewards(args)
    if args.check_rewards:
        if unused := sorted({name for group in groups for name in group.given} - CHECK_REWARDS_FLAGS):
            raise UserError(f"--{', --'.join(unused)} would have no effect with --check_rewards, which trains nothing.")
        if args.reward_model_path:
            functions["reward_model"] = load_model_reward(args, model_args)
        check_rewards(args.check_rewards, functions, args.reward_weights, data_args.encoding)
        return
    if model_args.model_name_or_path is None:
        raise UserError("--model_name_or_path is missing: the model to train.")
    check_flags(args)
    training_defaults(args, adapter_rate=1e-5, full_rate=1e-6, use_peft=lora_args.use_peft)
    disable_lora_dropout(args, lora_args)
    checkpoint = resolve_policy(args, model_args, lora_args)
    loading.resolve_length(args, "model_max_length", checkpoint, attention_args)
    reserved = resolve_completion_length(args)
    run = Run("grpo_training", args, checkpoint, run_args, model_args, attention_args, data_args, lora_args)

    # 2 tokenizer and template, with a system prompt that asks for the format the rewards look for
    tokenizer = loading.stage_tokenizer(checkpoint, model_args)
    system_prompt = {None: SYSTEM_PROMPT, "none": None}.get(args.system_prompt, args.system_prompt)
    stop_ids = stop_token_ids(tokenizer, apply_template(tokenizer, args.template_name, system_prompt, args.tool_format))
    run.add_tokenizer(tokenizer)

    # 3 data: prompts that leave room for an answer; the other fields of a row go to the reward functions
    data = load_tasks(data_args, functions, args.order_seed)
    columns = reward_columns(data)
    encode = partial(encode_prompt, tokenizer, max_length=args.model_max_length - args.max_completion_length)
    train, validation = encode_sides(data, encode, data_args, args.order_seed, Prompt, checkpoint.config, reserved)
    run.add_data(data)
    run.preview(tokenizer, train)
    run.record["answers"] = check_coverage(data.train, functions, args.reward_tolerance)

    # 4 models: policy, reference (unless it is the policy without its adapter), reward model
    load = {"attending": attention_args, "max_length": args.model_max_length, "bf16": args.bf16}
    model = loading.load_trainable(AutoModelForCausalLM, checkpoint, tokenizer, model_args, lora_args, **load)
    reference = copy_reference(model, args) if args.beta and not lora_args.use_peft else None
    if args.reward_model_path:
        functions["reward_model"] = load_model_reward(args, model_args, chain(data.train, data.validation))

    # 5 trainer
    trainer = GroupTrainer(
        model=model,
        reward_funcs=list(functions.values()),
        args=args,
        train_dataset=add_reward_columns(train, data.train, columns),
        eval_dataset=add_reward_columns(validation, data.validation, columns) if validation else None,
        processing_class=tokenizer,
        loraplus_lr_ratio=lora_args.loraplus_lr_ratio,
        stop_ids=stop_ids,
        reference=reference,
        start_from=checkpoint.adapter if lora_args.use_peft else None,
    )

    # 6 train, save
    weights = args.reward_weights or [1.0] * len(functions)
    run.record["rewards"] = dict(zip(functions, weights, strict=True))
    if args.reward_file:
        run.record["reward_file"] = {"file": args.reward_file, "sha256": hash_file(args.reward_file)}
    batches = len(trainer.get_train_dataloader())
    run.announce(model, train, validation, steps_per_epoch=batches / args.gradient_accumulation_steps)
    run.train_and_save(
        trainer,
        tokenizer,
        stop_ids=stop_ids,
        sample_prompts=render_prompts(tokenizer, data.validation or data.train, run_args.sample_prompts),
        note="Reinforcement learning: the model was trained to give answers that the rewards below score highly.",
    )


if __name__ == "__main__":
    run_main(main)
