"""Which flags may change when a run is resumed: one table for every flag of every stage.

docs/resuming.md shows it and resume.py applies it. A test fails for a flag that it does not have.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from medicalgpt.models.adapters import SHAPE_FLAGS


class Policy(Enum):
    """What happens with a flag whose value differs from that of the run that made the checkpoint."""

    START = "of this start only"
    MAY_CHANGE = "may change"
    SAME_CONTENT = "may name another place with the same content"
    SAME_PRODUCT = "may change together"
    FIXED = "may not change"


class WayOut(Enum):
    """How to train with another value after all."""

    FROM_WEIGHTS = "a new run from the weights of the checkpoint"
    MERGED = "a new run from the weights of the checkpoint, its adapter merged"
    NEW_RUN = "a new run"


Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Unless:
    """When flags that may change may not: `applies` to the arguments of the run before and of this one."""

    applies: Callable[[Arguments, Arguments], bool]
    reason: str


@dataclass(frozen=True)
class Group:
    """Flags, or facts about a run, that one answer holds for.

    Attributes:
        names: of flags, without their dashes; of facts, as run.json has them.
        reason: why, for messages and for the docs.
        way_out: for flags that may not change.
        unless: exceptions from MAY_CHANGE and SAME_PRODUCT.
    """

    names: tuple[str, ...]
    policy: Policy
    reason: str
    way_out: WayOut = WayOut.FROM_WEIGHTS
    unless: tuple[Unless, ...] = ()


def _streams(before: Arguments, now: Arguments) -> bool:
    return bool(before.get("streaming") and now.get("streaming"))


def _samples_groups(before: Arguments, now: Arguments) -> bool:
    return "num_generations" in now


def _is_sharded(before: Arguments, now: Arguments) -> bool:
    changed = before.get("processes") != now.get("processes")
    return changed and any((now.get("deepspeed"), now.get("fsdp"), now.get("engine") in ("DeepSpeed", "FSDP")))


def _averages_alone(before: Arguments, now: Arguments) -> bool:
    return before.get("processes") != now.get("processes") and now.get("average_tokens_across_devices") is False


def _follows_metric(before: Arguments, now: Arguments) -> bool:
    return now.get("lr_scheduler_type") in ("reduce_lr_on_plateau", "greedy")


def _compares_already(before: Arguments, now: Arguments) -> bool:
    return before.get("metric_for_best_model") is not None


STREAMING = Unless(_streams, "the checkpoint has a position for each reader of the rows, as with --streaming")
GROUPS = Unless(_samples_groups, "the checkpoint has answers that were sampled in batches of this size, as in GRPO")
SHARDED = Unless(_is_sharded, "the optimizer's state is saved in one part per process, as by DeepSpeed and FSDP")
ALONE = Unless(
    _averages_alone, "each process averages over its own tokens, as with --average_tokens_across_devices False"
)
METRIC_SCHEDULE = Unless(
    _follows_metric, "the learning rate follows the evaluations, as with reduce_lr_on_plateau and greedy"
)
BEST_SO_FAR = Unless(_compares_already, "the checkpoint has a best result, of the metric before")

# The number of rows in an optimizer step is the product of these.
GLOBAL_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps", "processes")
# Flags that name the rows.
DATA_PLACES = ("train_file_dir", "prepared_dir", "dataset_name", "dataset_config_name", "dataset_split", "data_files")
# Flags that name further models and files; run.json has a hash of each.
OTHER_MODELS = ("reference_model", "reward_model_path", "value_model_path")
OTHER_FILES = ("deepspeed", "fsdp_config", "reward_file")
# The facts about their configurations.
CONFIGS = {name: f"config of {name}" for name in OTHER_MODELS}

TABLE: tuple[Group, ...] = (
    # What changes nothing that is trained.
    Group(
        (
            *("resume_from_checkpoint", "overwrite_output_dir", "overwrite_cache", "do_train", "do_eval", "debug"),
            *("skip_long_rows", "steps_per_generation", "check_rewards", "disable_tqdm", "local_rank"),
            "verbose",
            *("restore_callback_states_from_checkpoint",),
        ),
        Policy.START,
        "belongs to a single start, or follows from other flags",
    ),
    Group(
        (
            *("logging_strategy", "logging_steps", "logging_first_step", "log_level", "log_level_replica"),
            *("log_on_each_node", "report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id"),
            *("trackio_static_space_id", "skip_memory_metrics", "log_completions", "num_completions_to_print"),
            *("log_unique_prompts", "sample_prompts"),
        ),
        Policy.MAY_CHANGE,
        "only what is shown and logged",
    ),
    Group(
        (
            *("output_dir", "save_strategy", "save_steps", "save_total_limit", "save_on_each_node", "save_only_model"),
            *("load_best_model_at_end", "enable_jit_checkpoint"),
        ),
        Policy.MAY_CHANGE,
        "only what is saved, and where",
    ),
    Group(
        ("early_stopping_patience", "early_stopping_threshold"),
        Policy.MAY_CHANGE,
        "only when training ends",
    ),
    Group(
        ("num_train_epochs", "max_steps"),
        Policy.MAY_CHANGE,
        "the learning rate continues as if the run had been planned that long from the start",
    ),
    Group(
        (
            *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "per_device_eval_batch_size"),
            *("eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object", "batch_eval_metrics"),
            *("bf16_full_eval", "fp16_full_eval", "prediction_loss_only", "include_for_metrics", "max_eval_samples"),
            "validation_file_dir",
        ),
        Policy.MAY_CHANGE,
        "only what is evaluated, and when",
        unless=(METRIC_SCHEDULE,),
    ),
    Group(
        ("metric_for_best_model", "greater_is_better"),
        Policy.MAY_CHANGE,
        "only which checkpoint is the best",
        unless=(METRIC_SCHEDULE, BEST_SO_FAR),
    ),
    Group(
        (
            *("use_cpu", "bf16", "fp16", "tf32", "flash_attn", "torch_compile", "torch_compile_backend"),
            *("torch_compile_mode", "use_liger_kernel", "liger_kernel_config", "gradient_checkpointing"),
            *("gradient_checkpointing_kwargs", "activation_offloading", "full_determinism", "device_map"),
            *("pad_to_multiple_of", "use_cache", "torch_empty_cache_steps", "ddp_backend", "ddp_bucket_cap_mb"),
            *("ddp_broadcast_buffers", "ddp_find_unused_parameters", "ddp_static_graph", "ddp_timeout"),
            *("accelerator_config", "remove_unused_columns", "preprocessing_num_workers", "precompute_ref_log_probs"),
            *("precompute_ref_batch_size", "rollout_forward_batch_size", "cache_implementation"),
            *("ds3_gather_for_generation", "vllm_mode", "vllm_enable_sleep_mode", "vllm_gpu_memory_utilization"),
            *("vllm_tensor_parallel_size", "vllm_model_impl", "vllm_server_base_url", "vllm_server_host"),
            *("vllm_server_port", "vllm_server_timeout", "vllm_group_port"),
        ),
        Policy.MAY_CHANGE,
        "only speed, memory and rounding",
    ),
    Group(
        (
            *("dataloader_num_workers", "dataloader_persistent_workers", "dataloader_prefetch_factor"),
            *("dataloader_multiprocessing_context", "dataloader_pin_memory"),
        ),
        Policy.MAY_CHANGE,
        "only how fast rows are loaded",
        unless=(STREAMING,),
    ),
    Group(
        ("skip_bad_rows", "allow_overlap", "max_long_rows"),
        Policy.MAY_CHANGE,
        "the rows that are trained on are compared themselves",
    ),
    # What may be somewhere else.
    Group(
        ("model_name_or_path", "peft_path", "model_revision", "cache_dir", "hub", "tokenizer_name_or_path"),
        Policy.SAME_CONTENT,
        "weights, tokenizer and chat template are compared by their hashes",
    ),
    Group(
        DATA_PLACES,
        Policy.SAME_CONTENT,
        "rows are compared by the hashes of their files; packed ones also by their division into shards",
    ),
    Group(
        (*OTHER_MODELS, *OTHER_FILES),
        Policy.SAME_CONTENT,
        "models and files are compared by their hashes",
        WayOut.NEW_RUN,
    ),
    # What has one value together.
    Group(
        GLOBAL_BATCH,
        Policy.SAME_PRODUCT,
        "rows per optimizer step: batch size x accumulation x processes",
        unless=(STREAMING, GROUPS, SHARDED, ALONE),
    ),
    # What may not change.
    Group(
        ("stage",),
        Policy.FIXED,
        "each stage has its own checkpoints",
    ),
    Group(
        (
            *("seed", "data_seed", "train_sampling_strategy", "length_column_name", "dataloader_drop_last"),
            *("dataloader_in_order", "auto_find_batch_size", "shuffle_dataset", "shuffle_buffer", "streaming"),
            *("ignore_data_skip",),
        ),
        Policy.FIXED,
        "determines which rows come next, so that some would be trained twice and others never",
    ),
    Group(
        (
            *("max_train_samples", "validation_split_percentage", "mix_strategy", "columns", "preset", "encoding"),
            *("ignore_fields", "long_rows", "document_unit", "data"),
        ),
        Policy.FIXED,
        "determines which rows are trained on",
    ),
    Group(
        (
            *("model_max_length", "max_source_length", "max_target_length", "block_size", "packing"),
            *("template_name", "tool_format", "system_prompt", "train_on_inputs", "mask_history"),
            *("image_min_pixels", "image_max_pixels"),
            *("max_completion_length", "response_length", "template", "tokenizer"),
        ),
        Policy.FIXED,
        "determines the tokens of a row",
    ),
    Group(
        (
            *("learning_rate", "critic_learning_rate", "loraplus_lr_ratio", "lr_scheduler_type"),
            *("lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args", "optim_target_modules", "weight_decay"),
            "use_muon",
            *("adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
        ),
        Policy.FIXED,
        "the state of optimizer and learning rate schedule is restored as it was",
    ),
    Group(
        (
            *("loss_type", "loss_weights", "label_smoothing", "label_smoothing_factor", "label_names"),
            *("average_tokens_across_devices", "neftune_noise_alpha", "router_aux_loss_coef", "disable_dropout"),
            *("shift_attn", "rope_scaling", "beta", "orpo_beta", "f_divergence_type", "f_alpha_divergence_coef"),
            *("ld_alpha", "use_weighting", "discopop_tau", "sync_ref_model", "ref_model_mixup_alpha"),
            *("ref_model_sync_steps", "center_rewards_coefficient"),
        ),
        Policy.FIXED,
        "determines the loss",
    ),
    Group(
        (
            *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "num_generations", "num_iterations"),
            *("generation_batch_size", "use_vllm", "vllm_max_model_length", "vllm_structured_outputs_regex"),
            *("vllm_importance_sampling_correction", "vllm_importance_sampling_mode"),
            *("vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min"),
            *("importance_sampling_level", "epsilon", "epsilon_high", "delta", "mask_truncated_completions"),
            *("off_policy_mask_threshold", "top_entropy_quantile", "entropy_coef", "use_adaptive_entropy"),
            *("entropy_target", "entropy_coef_min", "entropy_coef_max", "entropy_coef_delta"),
            *("sapo_temperature_pos", "sapo_temperature_neg", "vespo_k_pos", "vespo_k_neg", "vespo_lambda_pos"),
            *("vespo_lambda_neg", "use_bias_correction_kl", "num_ppo_epochs", "num_mini_batches", "kl_coef"),
            *("kl_estimator", "target_reference_kl", "kl_horizon", "gamma", "lam", "cliprange", "cliprange_value"),
            *("vf_coef", "target_kl", "whiten_advantages"),
        ),
        Policy.FIXED,
        "determines how answers are sampled and trained on",
    ),
    Group(
        (
            *("reward_funcs", "reward_weights", "reward_min_length", "reward_max_length", "reward_tolerance"),
            *("scale_rewards", "multi_objective_aggregation", "missing_eos_penalty", "normalize_scores"),
            *("score_clip",),
        ),
        Policy.FIXED,
        "determines the rewards",
    ),
    Group(
        ("use_peft",),
        Policy.FIXED,
        "the checkpoint has either an adapter or all weights",
    ),
    Group(
        (*sorted(SHAPE_FLAGS), "freeze_layers"),
        Policy.FIXED,
        "determines which weights are trained, and these are restored",
        WayOut.MERGED,
    ),
    Group(
        ("base", "adapter", "dtype", "load_in_4bit", "load_in_8bit", "qlora"),
        Policy.FIXED,
        "what the trained weights belong to",
        WayOut.NEW_RUN,
    ),
    Group(
        ("config", *CONFIGS.values()),
        Policy.FIXED,
        "determines what a model makes of its weights",
        WayOut.NEW_RUN,
    ),
    Group(
        ("engine", "fsdp"),
        Policy.FIXED,
        "each engine saves the state of the optimizer in its own form",
    ),
)
# How messages name the facts.
FACTS = {
    "processes": "the number of processes",
    "stage": "the program",
    "base": "the weights of the base model",
    "adapter": "the adapter that training started from",
    "config": "the configuration of the model",
    **{fact: f"the configuration of --{name}" for name, fact in CONFIGS.items()},
    "engine": "the engine",
    "tokenizer": "the tokenizer",
    "template": "the chat template",
    "data": "the rows",
}
# Facts of this name are versions of libraries.
VERSION = "version of "
VERSIONS = Group((), Policy.MAY_CHANGE, "only rounding, as far as their makers keep their promises")
_GROUPS = {name: group for group in TABLE for name in group.names}
# A flag that the table does not have yet, which a test reports.
UNKNOWN = Group((), Policy.FIXED, "its effect on a resumed run is unknown", WayOut.NEW_RUN)


def group_of(name: str) -> Group:
    """The group of a flag or fact."""
    return VERSIONS if name.startswith(VERSION) else _GROUPS.get(name, UNKNOWN)
