"""Flags that are refused where they would have no effect, and older spellings, as data: one table for every program.

Also the flags of MedicalGPT and of older libraries that ask for what happens anyway: they are accepted with a notice.
"""

from collections.abc import Mapping
from typing import Any

# Spellings of MedicalGPT and of older transformers and TRL versions, each with the name that is a flag today. It holds
# in programs that have the new flag and not the old one; where the new name depends on the program, the first that it
# has is taken.
RENAMED: dict[str, str | tuple[str, ...]] = {
    # transformers, TRL, PEFT.
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "warmup_ratio": "warmup_steps",
    "logging_first_steps": "logging_first_step",
    "lora_r": "lora_rank",
    "lora_target_modules": "target_modules",
    "lora_modules_to_save": "modules_to_save",
    "dataset_config": "dataset_config_name",
    "dataset_train_split": "dataset_split",
    "dataset_splits": "dataset_split",
    "max_prompt_length": "max_source_length",
    "log_with": "report_to",
    "ppo_epochs": "num_ppo_epochs",
    "init_kl_coef": "kl_coef",
    "mini_batch_size": "per_device_train_batch_size",
    # MedicalGPT's stages.
    "reward_model_name_or_path": "reward_model_path",
    "train_samples": "max_train_samples",
    "subset_name": "dataset_config_name",
    # Its tools, front ends, and chatpdf.
    "base_model": "model_name_or_path",
    "base_model_name_or_path": "model_name_or_path",
    "gen_model": "model_name_or_path",
    "gen_model_name": "model_name_or_path",
    "generate_model_name_or_path": "model_name_or_path",
    "peft_model_path": "lora_model",
    "lora_model_name_or_path": "lora_model",
    "sim_model": "sim_model_name",
    "prompt_template_name": "template_name",
    "save_corpus_emb_dir": "index_dir",
    "corpus_emb_dir": "index_dir",
    "predictions_file": "output_file",
    "int4": "load_in_4bit",
    "int8": "load_in_8bit",
    "api_auth": "api_key",
    "only_cpu": "use_cpu",
    "cpu_only": "use_cpu",
}
# Values that became another flag or another value: {old flag: {old value: (flag, value)}}.
RENAMED_VALUES: dict[str, dict[str, tuple[str, str]]] = {
    "group_by_length": {
        "true": ("train_sampling_strategy", "group_by_length"),
        "false": ("train_sampling_strategy", "random"),
    },
    "attn_implementation": {
        "flash_attention_2": ("flash_attn", "True"),
        "flash_attention_3": ("flash_attn", "True"),
        "sdpa": ("flash_attn", "False"),
    },
}
# Values of a flag that the library has renamed, other values being today's.
OLD_VALUES = {"optim": {"adamw_hf": "adamw_torch"}, "device_map": {"none": None}}
# Switches that set the default of another flag, which a value of that flag replaces. The numbers are those of
# MedicalGPT and of TRL's former PPO.
IMPLIES = {"early_stopping": {"true": ("target_kl", "0.1")}, "adap_kl_ctrl": {"true": ("target_reference_kl", "6")}}
# Flags of text whose value is a list with commas; such a list may also be given with spaces.
COMMA_LISTS = frozenset(
    {"target_modules", "modules_to_save", "freeze_layers", "ignore_fields", "train_file_dir", "report_to"}
    | {"lora_model", "lora_weights"}
)
# Old names of lists whose values were separated by commas, and are by spaces today.
COMMA_SEPARATED = frozenset({"corpus_files"})

EVERY = ("every program",)
PT, SFT = ("pretraining.py",), ("supervised_finetuning.py",)
PAIRS = ("reward_modeling.py", "dpo_training.py", "orpo_training.py")
PPO, GRPO = ("ppo_training.py",), ("grpo_training.py",)
CHATPDF = ("chatpdf.py",)
CHAT = ("inference.py", "openai_api.py", "fastapi_server_demo.py", "gradio_demo.py", *CHATPDF)
CONVERT = ("convert_dataset.py",)
TOOLS = ("merge_peft_adapter.py", "validate_jsonl.py", "prepare_data.py", *CONVERT)
TRAINING = PT + SFT + PAIRS + PPO + GRPO
PROGRAMS = EVERY + TRAINING + CHAT + TOOLS

# Two limits that are one today: {flag: {programs: the old flags whose sum it is}}. The second may be a flag still.
SUMS: dict[str, dict[tuple[str, ...], tuple[str, str]]] = {
    "model_max_length": {
        SFT: ("max_source_length", "max_target_length"),
        PPO: ("max_source_length", "response_length"),
        GRPO: ("max_prompt_length", "max_completion_length"),
    },
}

# Numbers that follow from an old one: {old flag: {programs: (flag, factors, all processes)}}. The flag is that number
# divided by the factors, which are other flags, with the value that each gets if it is not given (None: its default),
# and by the number of processes; if that is included, it is rounded up, otherwise it must be whole.
QUOTIENTS: dict[str, dict[tuple[str, ...], tuple[str, dict[str, int | None], bool]]] = {
    # Answers per step and process.
    "batch_size": {
        PPO: ("num_mini_batches", {"per_device_train_batch_size": 1, "gradient_accumulation_steps": None}, False)
    },
    # Answers in the whole run.
    "total_episodes": {
        PPO: (
            "max_steps",
            {"num_mini_batches": None, "per_device_train_batch_size": None, "gradient_accumulation_steps": None},
            True,
        )
    },
}

# Reasons that several flags share.
NO_UPLOAD = "Upload with `hf upload` afterwards; no program pushes by itself."
ALL_ROWS = "All rows are used."
ARCHITECTURE = "The architecture is in the model's config.json."
NO_REMOTE_CODE = "Code of a checkpoint is never run; transformers itself must know the architecture."
ANSWERS_ONLY = "Only answers are trained on; --train_on_inputs True trains on all."
NO_METRICS = "The trainer determines what it evaluates."
NO_LABELS = "There are no labels."
NEVER_TOO_LONG = "A document that is longer than --block_size is split into blocks; none is too long."
PAIRS_AT_ONCE = "Metrics are averaged over all held-out pairs at once."
SCORES_AT_ONCE = "Scores are averaged all at once."
PROMPTS_AT_ONCE = "Metrics are averaged over all held-out prompts at once."
REWARDS_ONLY = "Only the rewards of an evaluation are kept."
WEIGHTS_AS_THEY_ARE = "An evaluation uses the weights as they are."
RANDOM_PROMPTS = "Prompts are drawn at random; the lengths of the answers are not known in advance."
PROMPTS_IN_MEMORY = "Prompts are in memory; nothing is loaded."
FIXED_REFERENCE = "The reference model does not change."
WEIGHTS_TO_BFLOAT16 = "It would convert the trained weights to bfloat16. For speed use --use_vllm."

# Each flag with the programs that refuse it, and why, with what to do instead.
REFUSED: dict[str, dict[tuple[str, ...], str]] = {
    # Flags of other tools.
    "logging_dir": {
        EVERY: "TensorBoard files go below --output_dir; name a tracker with --report_to tensorboard.",
    },
    "save_safetensors": {EVERY: "Weights are never saved as pickles; omit the flag."},
    "fp16_backend": {EVERY: "Choose --bf16 or --fp16; the backend is torch's own."},
    # Fields of TrainingArguments without effect in any stage.
    "do_predict": {TRAINING: "These scripts train and evaluate; generate with inference.py."},
    "logging_nan_inf_filter": {
        TRAINING: "A loss that is not finite ends the run before its step is taken.",
    },
    "push_to_hub": {TRAINING: NO_UPLOAD},
    "hub_model_id": {TRAINING: NO_UPLOAD},
    "hub_strategy": {TRAINING: NO_UPLOAD},
    "hub_token": {TRAINING: "Log in with `hf auth login`; tokens do not belong on a command line."},
    "hub_private_repo": {TRAINING: NO_UPLOAD},
    "hub_always_push": {TRAINING: NO_UPLOAD},
    "hub_revision": {TRAINING: NO_UPLOAD},
    "include_num_input_tokens_seen": {TRAINING: "The count is num_tokens in metrics.jsonl."},
    # Rows: they are read, checked, rendered and encoded before the trainer sees them.
    "max_length": {
        PT + SFT: "Use --model_max_length (fine-tuning) or --block_size (pretraining).",
        PAIRS + PPO: "Use --model_max_length.",
    },
    "block_size": {SFT + PAIRS + PPO: "That is for pretraining.py; here it is --model_max_length."},
    "truncation_mode": {
        PT + SFT + PAIRS: "No answer is ever truncated; --long_rows says what happens to rows that are too long.",
    },
    "long_rows": {PT: NEVER_TOO_LONG},
    "skip_long_rows": {PT: NEVER_TOO_LONG},
    "max_long_rows": {PT: NEVER_TOO_LONG},
    "dataset_text_field": {PT + SFT: "Rows are recognised by their fields; data/README.md shows the formats."},
    "dataset_kwargs": {PT + SFT: "Rows are encoded before the trainer sees them."},
    "dataset_num_proc": {PT + SFT + PAIRS: "Use --preprocessing_num_workers."},
    "padding_free": {
        PT + SFT: "Use --packing True.",
        PAIRS: "Pairs are padded; rows of similar length share a batch.",
    },
    "packing_strategy": {PT + SFT: "Whole sequences are packed, best fit first."},
    "eval_packing": {PT + SFT: "Held-out rows are never packed."},
    "completion_only_loss": {PT + SFT: ANSWERS_ONLY},
    "assistant_only_loss": {PT + SFT: ANSWERS_ONLY},
    "chat_template_path": {PT + SFT + PAIRS: "Use --template_name."},
    "chat_template_kwargs": {
        GRPO: "Prompts are encoded before training as serving would send them; use --template_name.",
    },
    "eos_token": {PT + SFT + PAIRS: "The chat template sets it; use --template_name."},
    "pad_token": {PT + SFT + PAIRS: "It follows from the tokenizer."},
    "streaming": {
        PAIRS: "Pairs are tokenized before training; for corpora there is pretraining.py --streaming True.",
        PPO + GRPO: "Prompts are tokenized before training.",
    },
    "prepared_dir": {PPO + GRPO: "Prompts are tokenized before training; give their files with --train_file_dir."},
    "shuffle_buffer": {
        PAIRS: "It is for --streaming, which the stages on preference pairs do not have.",
        PPO + GRPO: "It is for --streaming, which this stage does not have.",
    },
    # The order of rows, and how they are loaded.
    "shuffle_dataset": {PT + SFT: "Rows are always shuffled in each epoch, with --data_seed."},
    "length_column_name": {
        PAIRS: "Pairs are grouped by the tokens of their longer sequence.",
        PPO: RANDOM_PROMPTS,
        GRPO: "Prompts are not grouped by length.",
    },
    "train_sampling_strategy": {
        PPO: RANDOM_PROMPTS,
        GRPO: "Each epoch has a new order of prompts; --shuffle_dataset False keeps theirs.",
    },
    "auto_find_batch_size": {
        PPO: "Use --per_device_train_batch_size.",
        GRPO: "A batch must hold whole groups of answers; lower --per_device_train_batch_size yourself.",
    },
    "dataloader_drop_last": {
        PPO: "A step is always full: it takes prompts of the next epoch where one ends.",
        GRPO: "No prompt is dropped: the last batch of an epoch is filled with prompts from its beginning.",
    },
    "dataloader_num_workers": {PPO: PROMPTS_IN_MEMORY},
    "dataloader_persistent_workers": {PPO: PROMPTS_IN_MEMORY},
    "dataloader_prefetch_factor": {PPO: PROMPTS_IN_MEMORY},
    "dataloader_multiprocessing_context": {PPO: PROMPTS_IN_MEMORY},
    "dataloader_in_order": {PPO: PROMPTS_IN_MEMORY},
    "dataloader_pin_memory": {PPO: PROMPTS_IN_MEMORY},
    "ignore_data_skip": {PPO: "Nothing is skipped: a step's prompts follow from its number."},
    # The model.
    "model_init_kwargs": {PT + SFT + PAIRS + GRPO: "Use --dtype, --load_in_4bit, --model_revision and the like."},
    "cast_lm_head_to_fp32": {
        GRPO: "Trained weights are float32 anyway, and log-probabilities are computed in float32.",
    },
    # The loss.
    "neftune_noise_alpha": {PAIRS + PPO + GRPO: "Noise on the embeddings (NEFTune) is for supervised_finetuning.py."},
    "label_smoothing_factor": {
        PAIRS: "The loss is of pairs; dpo_training.py has --label_smoothing.",
        PPO + GRPO: NO_LABELS,
    },
    "label_names": {PAIRS: NO_METRICS, PPO + GRPO: NO_LABELS},
    "average_tokens_across_devices": {
        PAIRS: "The loss is a mean over pairs, not over tokens.",
        PPO: "The loss is always a mean over the tokens of all processes.",
        GRPO: "The weight of a token follows from --loss_type.",
    },
    "accelerator_config": {
        PPO: "Prompts are divided over processes by the program, and gradients are synchronized once per update.",
    },
    "parallelism_config": {
        TRAINING: "No stage splits sequences or layers over processes; docs/distributed.md says what to use instead.",
    },
    "sync_ref_model": {GRPO: f"{FIXED_REFERENCE} To update it, start a new run from the result."},
    "ref_model_mixup_alpha": {GRPO: FIXED_REFERENCE},
    "ref_model_sync_steps": {GRPO: FIXED_REFERENCE},
    # Evaluation.
    "include_for_metrics": {PAIRS + PPO + GRPO: NO_METRICS},
    "prediction_loss_only": {
        PAIRS + PPO: "An evaluation always reports all its metrics.",
        GRPO: "An evaluation gives rewards.",
    },
    "batch_eval_metrics": {PAIRS: PAIRS_AT_ONCE, PPO: SCORES_AT_ONCE, GRPO: PROMPTS_AT_ONCE},
    "eval_do_concat_batches": {PAIRS: PAIRS_AT_ONCE, PPO: SCORES_AT_ONCE, GRPO: PROMPTS_AT_ONCE},
    "eval_use_gather_object": {PPO: SCORES_AT_ONCE, GRPO: REWARDS_ONLY},
    "eval_accumulation_steps": {PPO: "Only scores are kept.", GRPO: REWARDS_ONLY},
    "per_device_eval_batch_size": {PPO: "Use --rollout_forward_batch_size."},
    "bf16_full_eval": {PPO: "Use --dtype bfloat16.", GRPO: WEIGHTS_AS_THEY_ARE},
    "fp16_full_eval": {PPO: "Use --dtype float16.", GRPO: WEIGHTS_AS_THEY_ARE},
    "num_generations_eval": {
        GRPO: "Held-out prompts are answered once each, greedily, so that evaluations can be compared.",
    },
    # How answers are sampled.
    "generation_kwargs": {GRPO: "Use the sampling flags: --temperature, --top_p, --top_k, --min_p."},
    "use_transformers_continuous_batching": {GRPO: WEIGHTS_TO_BFLOAT16},
    "use_transformers_paged": {GRPO: WEIGHTS_TO_BFLOAT16},
    "transformers_continuous_batching_config": {GRPO: "It is for continuous batching, which is not used here."},
    "vllm_importance_sampling_cap": {GRPO: "It is now --vllm_importance_sampling_clip_max."},
    "max_tool_calling_iterations": {
        GRPO: "The tools of a row are shown to the model; its calls are scored, not executed.",
    },
    "log_multimodal": {GRPO: "There are no images."},
    "log_completions_hub_repo": {
        GRPO: "Nothing is uploaded; --log_completions True writes tables below --output_dir.",
    },
    "remove_unused_columns": {GRPO: "Rewards get every field of a row."},
    # PPO of older TRL versions.
    "early_stopping": {PPO: "Omit it, and --target_kl, which stops the updates of a step."},
    "reward_baseline": {PPO: "The critic learns the mean of the scores; omit the flag."},
    "stop_token": {PPO: "Answers stop at the tokens that end a turn of the chat template."},
    # Data.
    "keep_linebreaks": {PT: "Line breaks inside a document are kept; --document_unit says what a document is."},
    "group_by_text": {PT: "Pass --packing False, and each document is a row of its own."},
    "hf_hub_model_id": {TOOLS: NO_UPLOAD},
    "hf_hub_token": {TOOLS: NO_UPLOAD},
    # Front ends.
    "qlora": {CHAT: "QLoRA is a training method; --load_in_4bit loads the weights in 4 bits."},
    "context_len": {CHAT: "A prompt may be as long as the model's context; --max_new_tokens limits the answer."},
    "single_tune": {CHAT: "A conversation continues until /clear."},
}


ANY = None
NEGATIVE = ("-1",)
# Flags that ask for what happens anyway, and flags for which nothing is left to do: they are accepted with a notice
# that gives the reason. By program, the values for which that holds (ANY: all) and the reason. Other values are
# refused, for the reason in REFUSED if there is one.
ACCEPTED: dict[str, dict[tuple[str, ...], tuple[tuple[str, ...] | None, str]]] = {
    # What the libraries or MedicalGPT needed and these programs find out themselves.
    "model_type": {EVERY: (ANY, ARCHITECTURE)},
    "gen_model_type": {CHATPDF: (ANY, ARCHITECTURE)},
    "trust_remote_code": {EVERY: (ANY, NO_REMOTE_CODE)},
    "use_fast_tokenizer": {EVERY: (ANY, "The tokenizer is always the fast one, where a model has one.")},
    "low_cpu_mem_usage": {EVERY: (("true",), "Weights are always loaded one at a time.")},
    "resize_emb": {CHAT + TOOLS: (ANY, "An adapter with new tokens contains their embedding rows.")},
    "with_prompt": {CHAT: (ANY, "Questions are always put into the chat template that is saved with the model.")},
    "disable_gc": {CHAT: (ANY, "Memory is kept for the next answer; nothing is collected after each.")},
    "local_rank": {TRAINING: (ANY, "The launcher numbers the processes.")},
    "enable_jit_checkpoint": {TRAINING: (ANY, "SIGTERM, SIGHUP and Ctrl-C always save a checkpoint.")},
    "save_safetensors": {EVERY: (("true",), "Weights are always saved as safetensors.")},
    "push_to_hub": {TRAINING: (("false",), "Nothing is uploaded.")},
    "remove_unused_columns": {
        PT + SFT + PAIRS + PPO: (ANY, "The trainer only gets the columns that it uses."),
        GRPO: (("false",), "Every field of a row is passed to the reward functions."),
    },
    # Data.
    "max_train_samples": {TRAINING: (NEGATIVE, ALL_ROWS)},
    "max_eval_samples": {TRAINING: (NEGATIVE, "All held-out rows are used.")},
    "train_samples": {TRAINING: (NEGATIVE, ALL_ROWS)},
    "ignore_pad_token_for_loss": {TRAINING: (("true",), "Padding is never trained on.")},
    "group_by_length": {PT: (ANY, "Blocks are of equal length.")},
    "group_by_text": {PT: (("true",), "Documents are packed into blocks.")},
    "keep_linebreaks": {PT: (("true",), "Line breaks inside a document are kept.")},
    # PPO of older TRL versions.
    "reward_baseline": {PPO: (("0", "0.0"), "Nothing is subtracted from the scores.")},
    "adap_kl_ctrl": {PPO: (("false",), "The KL coefficient is fixed unless --target_reference_kl is given.")},
    "stop_token": {PPO: (("eos",), "Answers end at the end of a turn.")},
    "min_target_length": {TRAINING: (ANY, "An answer ends where the model ends it.")},
    "reward_model_device": {PPO: (ANY, "The reward model is on the GPU of its process.")},
    # Front ends.
    "device": {CHATPDF: (("auto", "cuda", "cuda:0"), "The first visible GPU is used, the CPU if there is none.")},
}
# Flags of front ends and tools that hide the GPUs, with the values that do so.
CPU_ONLY = {"only_cpu": ("true",), "cpu_only": ("true",), "device": ("cpu",), "gpus": ("", "-1")}


def for_program(table: Mapping[str, Mapping[tuple[str, ...], Any]], program: str | None) -> dict[str, Any]:
    """The entries of a table by program that hold in this one.

    Raises:
        KeyError: there is no program of this name.
    """
    if program is not None and program not in PROGRAMS:
        raise KeyError(f"refusals.py knows no program {program}")
    programs = {*EVERY, program}
    return {name: entry for name, groups in table.items() for group, entry in groups.items() if programs & set(group)}


def refused_in(program: str | None = None) -> dict[str, str]:
    """The flags that a program refuses, each with the reason; without a program those that all of them refuse.

    Raises:
        KeyError: there is no program of this name.
    """
    return for_program(REFUSED, program)
