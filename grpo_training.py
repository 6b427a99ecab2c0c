"""Group relative policy optimization (GRPO): reinforcement learning with rewards that are computed, not learned.

Changes what the model answers by its own attempts: it answers each prompt several times, functions judge the answers,
and those that are better than the others to the same prompt become likelier (https://arxiv.org/abs/2402.03300). The
mean of the group takes the place of PPO's critic. What counts as better is written below, under Rewards.

    python grpo_training.py --model_name_or_path outputs/sft-merged --train_file_dir data/grpo --output_dir outputs/grpo
    torchrun --nproc_per_node 2 grpo_training.py --model_name_or_path outputs/sft-merged \\
        --train_file_dir data/grpo --output_dir outputs/grpo --load_in_4bit True --qlora True

Data (.jsonl or .json): a prompt in any form that data/README.md shows, and what answers are judged by:

    {"question": "...", "answer": "2.5 mL", "type": "number"}

In --output_dir: the adapter (or all weights with --use_peft False), the tokenizer with its chat template,
generation_config.json, run.json, metrics.jsonl, samples.jsonl, loss.png and README.md. Guide: docs/grpo_training.md
"""

import copy
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
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
from medicalgpt.data.encoding import EncodingError, Prompt, encode_prompt, render_prompts
from medicalgpt.data.formats import to_task
from medicalgpt.data.loading import LoadedData, load_data
from medicalgpt.data.sources import Place, place_of
from medicalgpt.data.tokenizing import encode_sides
from medicalgpt.errors import UserError, run_main
from medicalgpt.files import hash_file
from medicalgpt.logs import heartbeat, world_size
from medicalgpt.models import adapters, loading
from medicalgpt.models.hub import Adapter
from medicalgpt.models.templating import stop_token_ids
from medicalgpt.parser import parse_args
from medicalgpt.refusals import refused_in
from medicalgpt.rewards.reward_check import check_rewards
from medicalgpt.rewards.rewards import REWARDS, SYSTEM_PROMPT, RewardFunction, checked, choose_rewards
from medicalgpt.rewards.scoring import RewardScorer
from medicalgpt.training.cpu import add_cpu_head
from medicalgpt.training.runs import Run
from medicalgpt.training.trainers import StageTrainer, disable_dropout, disable_lora_dropout, training_defaults
from template import apply_template

import torch
from datasets import Dataset
from loguru import logger
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput
from trl import GRPOConfig, GRPOTrainer
from trl.import_utils import is_vllm_available
from trl.models.utils import prepare_deepspeed
from trl.trainer.utils import add_fused_lm_head

# Names under which a reward function is given something else, so that a field of a row cannot have them.
TAKEN_COLUMNS = {
    *("prompt", "prompts", "prompt_ids", "completion", "completions", "completion_ids", "tools", "place"),
    *("image", "images", "environment", "environments", "trainer_state", "log_extra", "log_metric"),
    *("min_length", "max_length"),
}


def with_columns(encoded: Dataset, rows: Sequence[dict[str, Any]], names: Sequence[str]) -> Dataset:
    """What the trainer takes: each row a dict with `prompt_ids`, `place`, `prompt`, `tools` and the fields of its row.

    Args:
        encoded: columns `prompt_ids` and `place`.
        rows: of `to_task`, among them those of `encoded`.
        names: of the fields; a row that lacks one has None there.
    """
    number_of = {place_of(row): number for number, row in enumerate(rows)}
    texts = []
    for place in encoded["place"]:
        row = rows[number_of[Place(**place)]]
        fields = {name: row["columns"].get(name) for name in names}
        # JSON keeps what a table could not: fields that hold a number here and a text there.
        texts.append(json.dumps({"prompt": row["messages"], "tools": row["tools"], **fields}, ensure_ascii=False))
    return encoded.add_column("fields", texts).with_transform(_read_fields)


def _read_fields(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    rows = [json.loads(text) for text in batch["fields"]]
    read = {name: [row[name] for row in rows] for name in rows[0]}
    return {"prompt_ids": batch["prompt_ids"], "place": [str(Place(**place)) for place in batch["place"]], **read}


def column_names(data: LoadedData) -> list[str]:
    """The fields of all rows beside their prompts.

    Raises:
        UserError: a field with a name that reward functions know something else by.
    """
    names: dict[str, str] = {}
    for rows in (data.train, data.validation):
        for row in rows:
            for name in row["columns"]:
                names.setdefault(name, place_of(row))
    if taken := sorted(names.keys() & TAKEN_COLUMNS):
        raise UserError(
            f"{names[taken[0]]}: rewards know something else by the name of the field `{taken[0]}`. Rename it, or pass "
            f"--ignore_fields {','.join(taken)}."
        )
    return sorted(names)


class PromptSampler(torch.utils.data.Sampler):
    """Row numbers as `GRPOTrainer` needs them: each prompt once for each of its answers, a batch of them several times.

    The order follows from seed and epoch alone, so that a resumed run goes on where the stopped one was. TRL's own
    sampler leaves out the prompts that do not fill the last batch; here it is filled up from the epoch's beginning.

    Args:
        rows: prompts in all.
        answers: to each prompt.
        prompts: that are answered at a time.
        times: that such a batch is yielded, one for each pass over a part of its answers.
        shuffle: draw a new order in each epoch.
    """

    def __init__(self, rows: int, *, answers: int, prompts: int, times: int, seed: int, shuffle: bool):
        self.rows, self.answers, self.prompts, self.times = rows, answers, prompts, times
        self.seed, self.shuffle, self.epoch = seed, shuffle, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.rows, generator=generator) if self.shuffle else torch.arange(self.rows)
        filled = order[torch.arange(self.batches * self.prompts) % self.rows]
        for batch in filled.split(self.prompts):
            for _ in range(self.times):
                yield from batch.repeat_interleave(self.answers).tolist()

    @property
    def batches(self) -> int:
        return math.ceil(self.rows / self.prompts)

    def __len__(self) -> int:
        return self.batches * self.prompts * self.answers * self.times


def flat_groups(rewards: torch.Tensor, weights: torch.Tensor, answers: int) -> torch.Tensor:
    """Which groups have the same weighted reward for all their answers, and so no advantage for any: (groups,).

    Args:
        rewards: (groups x answers, functions); NaN where a function does not apply. An answer that none applies to is
            no part of its group.
        weights: (functions,)
        answers: in each group.
    """
    unscored = rewards.isnan().all(dim=1)
    total = (rewards * weights).nansum(dim=1)
    highest = total.masked_fill(unscored, -math.inf).view(-1, answers).amax(dim=1)
    lowest = total.masked_fill(unscored, math.inf).view(-1, answers).amin(dim=1)
    return ~(highest - lowest > 1e-6)


class GroupTrainer(StageTrainer, GRPOTrainer):
    """`trl.GRPOTrainer` on encoded prompts, with the differences of `StageTrainer` and these.

    - Every token in `stop_ids` ends an answer, and nothing that a checkpoint recommends for serving changes sampling.
    - The reference is the model that training starts from: without its new adapter, with the adapter that is trained
      on as it was, or `reference`, a frozen copy.
    - Each prompt of an epoch is answered (see `PromptSampler`), and a resumed run continues exactly, also between two
      samplings.
    - An evaluation answers each held-out prompt once, greedily, and averages its rewards; it draws no random number
      and does not depend on the batch size.
    - `frac_reward_zero_std` is the share of groups whose answers all have the same reward, whatever `--scale_rewards`
      is; where that is all of them, the log says so.

    Args:
        stop_ids: ids that end an answer.
        reference: see above; on no device yet.
        start_from: the adapter that is trained on, if there is one.
    """

    def __init__(
        self, *, stop_ids: Sequence[int], reference: PreTrainedModel | None, start_from: Adapter | None, **kwargs: Any
    ):
        args, model = kwargs["args"], kwargs["model"]
        model.generation_config.eos_token_id = list(stop_ids)
        if args.use_vllm:
            args.generation_kwargs = {"stop_token_ids": list(stop_ids)}
        # TRL would load the reference from the base's folder anew, and copy of an adapter what it knows by name.
        beta, args.beta = args.beta, 0.0
        super().__init__(**kwargs)
        args.beta = self.beta = beta
        if args.use_vllm:
            # TRL has none then, but evaluations are without vLLM.
            self.generation_config = self.generation_kwargs = None
        # The bonus on entropy needs its gradient, which the quicker head does not have.
        self._add_cpu_head(self.model, measured=True)
        if args.disable_dropout:
            disable_dropout(self.model)
        if beta:
            self._add_reference(reference, start_from)
        self._prompt_ids: list[list[int]] = []
        self._random_state_of: str | None = None
        self._groups = torch.zeros(2, dtype=torch.int64)  # all, and those without signal

    def _add_cpu_head(self, model: PreTrainedModel | PeftModel, measured: bool) -> None:
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

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> PromptSampler:
        args = self.args
        return PromptSampler(
            len(self.train_dataset if train_dataset is None else train_dataset),
            answers=self.num_generations,
            prompts=args.generation_batch_size // self.num_generations,
            times=self.num_iterations * args.steps_per_generation,
            seed=args.order_seed,
            shuffle=self.shuffle_dataset,
        )

    def get_batch_samples(self, *args: Any) -> tuple[list[dict[str, torch.Tensor]], Any]:
        """The batches of a step, answered and judged before its first one is trained on, so that they can be seen."""
        began = time.perf_counter()
        rows, count = super().get_batch_samples(*args)
        if self._random_state_of:
            self._load_rng_state(self._random_state_of)
        # After an evaluation the model is still in evaluation mode, in which TRL keeps no answers.
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
        return inputs if isinstance(inputs, dict) else super()._prepare_inputs(inputs)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._prompt_ids = [row["prompt_ids"] for row in inputs]
        return super()._generate_and_score_completions(inputs)

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict]:
        return self._prompt_ids, None, {}

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> tuple[list[list[int]], Any]:
        model = self.accelerator.unwrap_model(self.model)
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        recommended, training = base.generation_config, model.training
        # transformers takes from it what TRL leaves open, such as tokens that are never sampled.
        base.generation_config = GenerationConfig()
        # TRL leaves dropout on, and computes log-probabilities with autocast but samples without it.
        model.eval()
        try:
            with nullcontext() if self.use_vllm else self.accelerator.autocast():
                return super()._generate_single_turn(*args, **kwargs)
        finally:
            base.generation_config = recommended
            model.train(training)

    def _calculate_rewards(self, *args: Any) -> torch.Tensor:
        rewards = super()._calculate_rewards(*args)
        if self.model.training:
            flat = flat_groups(rewards, self.reward_weights.to(rewards.device), self.num_generations)
            self._metrics["train"]["flat_groups"].append(flat.float().mean().item())
            self._groups += torch.tensor([len(flat), flat.sum()])
        return rewards

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._log_probs = found[0].detach()
        return found

    def compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        """TRL's loss; `ratio_deviation` is the mean distance from 1 of policy over sampling policy, token by token."""
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if (before := inputs.get("old_per_token_logps")) is not None:
            away = ((self._log_probs - before)[inputs["completion_mask"].bool()].exp() - 1).abs()
            total, count = self.accelerator.reduce(torch.stack([away.sum(), away.new_tensor(len(away))])).tolist()
            self._metrics["train"]["ratio_deviation"].append(total / max(count, 1))
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training and (flat := self._metrics["train"].pop("flat_groups", None)):
            # TRL's own number is of another thing where rewards are scaled over the batch or one by one.
            self._metrics["train"]["frac_reward_zero_std"] = flat
        super().log(logs, start_time)
        groups, flat = self._groups.tolist()
        if logs.get("frac_reward_zero_std") == 1.0:
            logger.warning(
                f"no learning signal at step {self.state.global_step}: in 100% of the groups all answers to a prompt "
                "have the same reward, so that nothing is learned from them; docs/grpo_training.md says what to do"
            )
        if "train_runtime" in logs and groups:
            nothing = "no learning signal in this run: " if flat == groups else ""
            share = f"{flat:,} of {groups:,} groups ({flat / groups:.0%})"
            logger.info(f"{nothing}in {share} all answers had the same reward")

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
        """Means over the held-out prompts: `reward`, `rewards/NAME/mean`, length and share of unfinished answers."""
        dataset, world = dataloader.dataset, self.args.world_size
        self.model.eval()
        # Each process has as many rows as the others, since they generate and gather together.
        each, size, parts = math.ceil(len(dataset) / world), self.args.per_device_eval_batch_size, []
        with heartbeat(lambda: f"{len(parts) * size * world} of {len(dataset)} held-out prompts answered"):
            for start in range(0, each, size):
                positions = range(start, min(start + size, each))
                rows = [position * world + self.args.process_index for position in positions]
                found = self._judge(dataset.__getitems__([row % len(dataset) for row in rows]))
                real = [position * world + rank < len(dataset) for rank in range(world) for position in positions]
                parts.append(found[real])
        lengths, cut, *columns = torch.cat(parts).T
        rewards = torch.stack(columns, dim=1)
        totals = (rewards * self.reward_weights).nansum(dim=1)
        means = {"reward": totals[~rewards.isnan().all(dim=1)].mean()}
        means |= {f"rewards/{name}/mean": columns[n].nanmean() for n, name in enumerate(self.reward_func_names)}
        means |= {"completions/mean_length": lengths.mean(), "completions/clipped_ratio": cut.mean()}
        metrics = {f"{metric_key_prefix}_{name}": mean.item() for name, mean in means.items() if not mean.isnan()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(dataset))

    def _judge(self, rows: list[dict[str, Any]]) -> torch.Tensor:
        """Of the answers of all processes the length, 1 for an answer that was cut, and all rewards: (answers, ...)."""
        answers = self._greedy_answers([row["prompt_ids"] for row in rows])
        texts = self.processing_class.batch_decode(answers, skip_special_tokens=True)
        replies = [[{"role": "assistant", "content": text}] for text in texts]
        rewards = self._calculate_rewards(rows, [row["prompt"] for row in rows], replies, answers)
        # What reward functions log belongs to training.
        self._pending_extra_logs.clear()
        self._pending_metrics.clear()
        facts = [[len(ids), not ids or ids[-1] not in self.eos_token_ids] for ids in answers]
        facts = self.accelerator.gather(torch.tensor(facts, device=rewards.device, dtype=rewards.dtype))
        return torch.cat([facts, rewards], dim=1).cpu().double()

    def _greedy_answers(self, prompts: list[list[int]]) -> list[list[int]]:
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
        # Answers that are still to be trained on; sampled anew, they would be others.
        if self._step % (self.args.steps_per_generation * self.num_iterations):
            folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            torch.save({"step": self._step, "answers": self._buffered_inputs}, folder / self._answers_file)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._random_state_of = checkpoint
        if checkpoint and (file := Path(checkpoint) / self._answers_file).is_file():
            kept = torch.load(file, map_location=self.args.device, weights_only=True)
            self._step, self._buffered_inputs = kept["step"], kept["answers"]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        # The library sets it back after the batches of the first step are there, which here are sampled by then.
        if checkpoint is None or self._random_state_of:
            self._random_state_of = None
            super()._load_rng_state(checkpoint)

    @property
    def _answers_file(self) -> str:
        return f"answers_{self.args.process_index}.pt"


# What each of them is, and where it comes from, stands in docs/grpo_training.md.
LOSSES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo")
# Losses that clip the ratio of both policies, and those that weigh tokens, for which a ratio of sequences is not made.
CLIPPED_LOSSES = {"grpo", "dr_grpo", "dapo", "bnpo", "luspo"}
LOSSES_OF_TOKENS = {"dr_grpo", "dapo", "bnpo", "cispo", "vespo"}
# Flags that have an effect with --check_rewards; all others are for training.
CHECKING_FLAGS = {
    *("check_rewards", "reward_funcs", "reward_weights", "reward_file", "reward_min_length", "reward_max_length"),
    *("reward_model_path", "per_device_train_batch_size", "hub", "cache_dir"),
}


@dataclass
class PolicyArguments(ModelArguments):
    """The model, which `--check_rewards` does without."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Hub name, local folder, or the folder of an adapter (its base is found by itself)."},
    )


@dataclass
class GrpoArguments(TemplateArguments, StageDefaults, GRPOConfig):
    """What differs from TRL's `GRPOConfig`."""

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
        "0.28.",
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
            "help": "System prompt of rows that have none; saved with the template for serving. Default: one that asks "
            "for <think> and <answer>. none: what the template has of its own."
        },
    )
    reward_funcs: list[str] = field(
        default_factory=lambda: ["accuracy", "format"],
        metadata={
            "help": f"Rewards that are added up: {', '.join(REWARDS)}, and those of --reward_file. none: only "
            "--reward_model_path."
        },
    )
    reward_weights: list[float] | None = field(
        default=None,
        metadata={"help": "A weight for each of --reward_funcs, and one more for --reward_model_path. Default: all 1."},
    )
    reward_file: str | None = field(
        default=None,
        metadata={"help": "Python file whose functions can be named in --reward_funcs. It is run: know what it does."},
    )
    reward_model_path: str | None = field(
        default=None,
        metadata={"help": "Reward model whose score is one more reward: a folder or hub name, whatever its tokenizer."},
    )
    reward_min_length: int = field(default=20, metadata={"help": "Characters below which the reward `length` falls."})
    reward_max_length: int = field(default=1000, metadata={"help": "Characters above which the reward `length` falls."})
    check_rewards: str | None = field(
        default=None,
        metadata={"help": "Train nothing, but show how well the rewards tell the good from the bad answers of a file."},
    )
    model_max_length: int = field(
        default=1024,
        metadata={
            "help": "Most tokens of a prompt with its answer; less if the model has fewer positions.",
            "aliases": ["--max_seq_length"],
        },
    )
    max_completion_length: int | None = field(
        default=None,
        metadata={
            "help": "Most tokens of an answer, its end included. A prompt that leaves less room is refused, never cut. "
            "Default: half of --model_max_length."
        },
    )
    # With TRL's 1, a step would hear of a single prompt.
    gradient_accumulation_steps: int = field(default=4, metadata={"help": "Batches whose gradients make up a step."})
    disable_dropout: bool = field(
        default=True, metadata={"help": "No dropout anywhere, so that log-probabilities can be compared."}
    )
    learning_rate: float | None = field(
        default=None, metadata={"help": "Default: 1e-5 for adapters, 1e-6 for all weights."}
    )
    # TRL finds out in the first step that it does not know a name.
    loss_type: str = field(
        default="dapo",
        metadata={
            "help": "How the tokens of answers are weighed; docs/grpo_training.md says which is which.",
            "choices": list(LOSSES),
        },
    )
    importance_sampling_level: str = field(
        default="token",
        metadata={
            "help": "Ratio of the policies by token, or by sequence as in GSPO (https://arxiv.org/abs/2507.18071).",
            "choices": ["token", "sequence"],
        },
    )
    scale_rewards: str = field(
        default="group",
        metadata={
            "help": "By what standard deviation advantages are divided: of a prompt's answers, of the whole batch, or "
            "none, as in Dr. GRPO (https://arxiv.org/abs/2503.20783).",
            "choices": ["group", "batch", "none"],
        },
    )
    multi_objective_aggregation: str = field(
        default="sum_then_normalize",
        metadata={
            "help": "Rewards are added up and then normalized, or each by itself (https://arxiv.org/abs/2601.05242).",
            "choices": ["sum_then_normalize", "normalize_then_sum"],
        },
    )
    vllm_mode: str = field(
        default="colocate",
        metadata={
            "help": "vLLM in this process, or on a server that was started with `vllm serve`.",
            "choices": ["colocate", "server"],
        },
    )

    def __post_init__(self):
        # An evaluation answers each prompt once.
        self.num_generations_eval = 1
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "reward"
        self._refuse_idle_training()
        self._refuse_torn_groups()
        super().__post_init__()

    def _refuse_torn_groups(self) -> None:
        """Raises ValueError for batches that would not hold whole groups of answers."""
        for name in ("num_generations", "num_iterations", "steps_per_generation", "generation_batch_size"):
            lowest = 2 if name == "num_generations" else 1
            if getattr(self, name) is not None and getattr(self, name) < lowest:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least {lowest}.")
        if self.generation_batch_size is not None and self.steps_per_generation is not None:
            raise ValueError("--generation_batch_size and --steps_per_generation say the same; keep one of them.")
        at_once = self.per_device_train_batch_size * world_size()
        flag = "gradient_accumulation_steps" if self.steps_per_generation is None else "steps_per_generation"
        answers = self.generation_batch_size or at_once * getattr(self, flag)
        if answers % at_once:
            raise ValueError(
                f"--generation_batch_size {answers} must be a multiple of {at_once}, the answers that go through the "
                "model at once (--per_device_train_batch_size on each process)."
            )
        if answers % self.num_generations:
            needed = self.num_generations // math.gcd(self.num_generations, at_once)
            remedy = f"make --{flag} a multiple of {needed}"
            if self.generation_batch_size is not None:
                remedy = f"make --generation_batch_size a multiple of {math.lcm(at_once, self.num_generations)}"
            raise ValueError(
                f"{answers} answers are sampled at a time, which --num_generations {self.num_generations} answers to a "
                f"prompt do not divide; {remedy}, or choose another --num_generations."
            )


def check_flags(args: GrpoArguments) -> None:
    """Refuse flags that the other flags leave no use for, and values outside their range.

    Raises:
        UserError: each with the remedy.
    """
    if args.use_vllm and not is_vllm_available():
        raise UserError(
            "--use_vllm True needs vLLM, which is not installed here. It wants an environment of its own, see "
            "docs/grpo_training.md; without it, answers are sampled with transformers: leave --use_vllm out."
        )
    # As long as answers are of the very weights that they train, the ratio of both policies is 1.
    rounds = args.steps_per_generation * args.num_iterations
    moved = args.gradient_accumulation_steps % rounds != 0 or args.use_vllm
    corrected = args.use_vllm and args.vllm_importance_sampling_correction
    same = (
        "each answer is trained on once, by the weights that gave it, so the ratio is 1; add --num_iterations 2, or "
        f"--steps_per_generation {2 * args.gradient_accumulation_steps}"
    )
    loss, vllm, adaptive = args.loss_type, "it is for --use_vllm True", "it is for --use_adaptive_entropy True"
    used = {
        "epsilon": (moved and loss in CLIPPED_LOSSES, same if not moved else f"--loss_type {loss} has no lower bound"),
        "epsilon_high": (
            moved and loss in CLIPPED_LOSSES | {"cispo"},
            same if not moved else f"--loss_type {loss} has no upper bound",
        ),
        "delta": (moved and loss in CLIPPED_LOSSES, same if not moved else f"--loss_type {loss} is not clipped"),
        "importance_sampling_level": (
            args.importance_sampling_level == "token" or moved or args.beta and args.use_bias_correction_kl,
            same,
        ),
        "off_policy_mask_threshold": (moved, same),
        "use_bias_correction_kl": (args.beta, "it is for --beta above 0"),
        "scale_rewards": (
            args.multi_objective_aggregation == "sum_then_normalize",
            "--multi_objective_aggregation normalize_then_sum scales each reward by itself",
        ),
        "entropy_coef_min": (args.use_adaptive_entropy, adaptive),
        "entropy_coef_max": (args.use_adaptive_entropy, adaptive),
        "entropy_coef_delta": (args.use_adaptive_entropy, adaptive),
        "entropy_target": (args.use_adaptive_entropy, adaptive),
        "num_completions_to_print": (args.log_completions, "it is for --log_completions True"),
        "log_unique_prompts": (args.log_completions, "it is for --log_completions True"),
        "ds3_gather_for_generation": (args.deepspeed, "it is for --deepspeed zero3.json"),
        "cache_implementation": (not args.use_vllm, "vLLM has a cache of its own"),
    }
    for name in GrpoArguments.__dataclass_fields__:
        if name.startswith(("sapo_", "vespo_")):
            kind = name.partition("_")[0]
            used[name] = (loss == kind and moved, same if loss == kind else f"it is for --loss_type {kind}, not {loss}")
        elif name.startswith("vllm_importance_sampling_"):
            used[name] = (
                args.use_vllm if name.endswith("correction") else corrected,
                f"{vllm} --vllm_importance_sampling_correction True",
            )
        elif name.startswith(("vllm_server_", "vllm_group_port")):
            used[name] = (args.use_vllm and args.vllm_mode == "server", f"{vllm} --vllm_mode server")
        elif name in ("vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_tensor_parallel_size"):
            used[name] = (args.use_vllm and args.vllm_mode == "colocate", f"{vllm} --vllm_mode colocate")
        elif name.startswith("vllm_"):
            used[name] = (args.use_vllm, vllm)
    for name, (has_effect, reason) in used.items():
        if name in args.given and not has_effect:
            raise UserError(f"--{name} has no effect here: {reason}. Leave it out.")
    for name, low, high, sound in (
        ("beta", "0 or more", "", args.beta >= 0),
        ("epsilon", "above 0", "", args.epsilon > 0),
        ("epsilon_high", "above 0", "", args.epsilon_high is None or args.epsilon_high > 0),
        ("temperature", "above 0", "", args.temperature > 0),
        ("top_p", "above 0", "at most 1", 0 < args.top_p <= 1),
        ("top_k", "0 or more", "", args.top_k >= 0),
        ("min_p", "0 or more", "at most 1", args.min_p is None or 0 <= args.min_p <= 1),
        ("top_entropy_quantile", "0 or more", "at most 1", 0 <= args.top_entropy_quantile <= 1),
        ("entropy_coef", "0 or more", "", args.entropy_coef >= 0),
        ("repetition_penalty", "above 0", "", args.repetition_penalty > 0),
    ):
        if not sound:
            raise UserError(f"--{name} {getattr(args, name)} must be {' and '.join(filter(None, (low, high)))}.")
    if args.importance_sampling_level == "sequence" and loss in LOSSES_OF_TOKENS:
        raise UserError(
            f"--importance_sampling_level sequence does not go with --loss_type {loss}, which adds up tokens: long "
            "answers would weigh more than short ones. For GSPO add --loss_type grpo."
        )


def settle_completion_length(args: GrpoArguments) -> None:
    """Fill in `max_completion_length`, once the model's positions are known.

    Raises:
        UserError: it leaves no room for a prompt.
    """
    if args.max_completion_length is None:
        args.max_completion_length = max(1, args.model_max_length // 2)
    if not 0 < args.max_completion_length < args.model_max_length:
        raise UserError(
            f"--max_completion_length {args.max_completion_length} must be above 0 and leave room for a prompt within "
            f"--model_max_length {args.model_max_length}. Lower it, or raise --model_max_length."
        )


def settle_rewards(args: GrpoArguments) -> dict[str, RewardFunction]:
    """The functions that the flags choose, without the reward model.

    Raises:
        UserError: as `choose_rewards`; no reward at all, or weights that do not fit.
    """
    names = [] if args.reward_funcs == ["none"] else args.reward_funcs
    for flag in ("reward_min_length", "reward_max_length"):
        if flag in args.given and "length" not in names:
            raise UserError(f"--{flag} has no effect here: it is for --reward_funcs length. Leave it out.")
    lengths = {"min_length": args.reward_min_length, "max_length": args.reward_max_length}
    functions = choose_rewards(names, args.reward_file, **lengths)
    judges = [*functions, *(["reward_model"] if args.reward_model_path else [])]
    if "reward_model" in functions:
        raise UserError(f"--reward_file {args.reward_file}: the name reward_model is taken. Rename the function.")
    if not judges:
        raise UserError("there is nothing to judge answers by: name --reward_funcs, or --reward_model_path.")
    if args.reward_weights is not None and len(args.reward_weights) != len(judges):
        raise UserError(
            f"--reward_weights has {len(args.reward_weights)} numbers for {len(judges)} rewards. Give one for each of: "
            f"{', '.join(judges)}."
        )
    return functions


def load_judge(args: GrpoArguments, model_args: ModelArguments) -> RewardScorer:
    """The reward model.

    Raises:
        UserError: as `RewardScorer.from_pretrained`, or under ZeRO-3, which would tear it apart.
    """
    if is_deepspeed_zero3_enabled():
        raise UserError(
            "--reward_model_path does not go with ZeRO-3, under which every model is spread over the processes. Use "
            "--deepspeed zero2.json."
        )
    return RewardScorer.from_pretrained(args.reward_model_path, hub=model_args.hub, cache_dir=model_args.cache_dir)


def reward_by_model(scorer: RewardScorer, batch_size: int) -> RewardFunction:
    """The score of a reward model as a reward. It reads prompt and answer in its own template, with the row's tools.

    An answer that it cannot read, being too long for it or holding what it takes for control tokens, gets the lowest
    score of its batch; the share of such answers is logged as `reward_model/unreadable`.
    """

    def reward_model(
        prompts: list[Any],
        completions: list[Any],
        tools: list[Any] | None = None,
        log_metric: Any = None,
        **_: Any,
    ) -> list[float | None]:
        sequences = {}
        for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            try:
                sequences[number] = scorer.encode([*prompt, *completion], tools[number] if tools else None)
            except EncodingError:
                continue
        scores = dict(zip(sequences, scorer.score_ids(list(sequences.values()), batch_size), strict=True))
        if log_metric is not None:
            log_metric("reward_model/unreadable", 1 - len(scores) / len(prompts))
        lowest = min(scores.values(), default=None)
        return [scores.get(number, lowest) for number in range(len(prompts))]

    return reward_model


def frozen_copy(model: PreTrainedModel, args: GrpoArguments) -> PreTrainedModel:
    """The reference of a run that trains all weights.

    Raises:
        UserError: the weights are spread over the processes.
    """
    if is_deepspeed_zero3_enabled() or args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1"):
        raise UserError(
            f"--beta {args.beta} with --use_peft False needs a second copy of the weights, which ZeRO-3 and FSDP would "
            "have to spread as well. Train an adapter, use --deepspeed zero2.json, or leave --beta at 0."
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
        unused=refused_in("grpo_training.py"),
    )
    functions = settle_rewards(args)
    if args.check_rewards:
        if idle := sorted({name for group in groups for name in group.given} - CHECKING_FLAGS):
            raise UserError(f"--{', --'.join(idle)} would have no effect with --check_rewards, which trains nothing.")
        if args.reward_model_path:
            functions["reward_model"] = reward_by_model(load_judge(args, model_args), args.per_device_train_batch_size)
        check_rewards(args.check_rewards, functions, args.reward_weights)
        return
    if model_args.model_name_or_path is None:
        raise UserError("--model_name_or_path is missing: the model that is to be trained.")
    check_flags(args)
    training_defaults(args, adapter_rate=1e-5, full_rate=1e-6, use_peft=lora_args.use_peft)
    disable_lora_dropout(args, lora_args)
    checkpoint = loading.stage_checkpoint(model_args, lora_args)
    loading.resolve_length(args, "model_max_length", checkpoint, attention_args)
    settle_completion_length(args)
    run = Run("grpo_training", args, checkpoint, run_args, model_args, attention_args, data_args, lora_args)

    # 2 tokenizer and template, with the system prompt that asks for the form which the rewards read
    tokenizer = loading.stage_tokenizer(checkpoint, model_args)
    asked = {None: SYSTEM_PROMPT, "none": None}.get(args.system_prompt, args.system_prompt)
    stop = apply_template(tokenizer, args.template_name, asked, args.tool_format)
    stop_ids = stop_token_ids(tokenizer, stop)

    # 3 data: prompts that leave room for an answer; the other fields of a row are for the rewards
    seed = args.order_seed
    data = load_data(data_args, to_task, seed=seed)
    names = column_names(data)
    encode = partial(encode_prompt, tokenizer, max_length=args.model_max_length - args.max_completion_length)
    train, validation = encode_sides(data, encode, data_args, seed, Prompt)
    run.add_data(data)
    run.preview(tokenizer, train)

    # 4 models: policy, reference where it is not the policy without its adapter, judge
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
    reference = frozen_copy(model, args) if args.beta and not lora_args.use_peft else None
    if args.reward_model_path:
        scorer = load_judge(args, model_args)
        for rows in (data.train, data.validation):
            scorer.require_readable(rows)
        judge = reward_by_model(scorer, args.per_device_train_batch_size)
        functions["reward_model"] = checked("reward_model", judge)

    # 5 trainer
    trainer = GroupTrainer(
        model=model,
        reward_funcs=list(functions.values()),
        args=args,
        train_dataset=with_columns(train, data.train, names),
        eval_dataset=with_columns(validation, data.validation, names) if validation else None,
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
        note="Reinforcement learning: the model has learned to answer so that the rewards below are high.",
    )


if __name__ == "__main__":
    run_main(main)
