"""Flags that are refused where they would have no effect, and older spellings, as data: one table for every program."""

# Spellings of MedicalGPT and of older transformers and TRL versions, each with the name that today's library uses.
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "warmup_ratio": "warmup_steps",
    "logging_first_steps": "logging_first_step",
}
# Old switches that became a value of another flag: {old: (new flag, {value given: value passed on})}.
RENAMED_VALUES = {
    "group_by_length": ("train_sampling_strategy", {"true": "group_by_length", "false": "random"}),
}

EVERY = ("every program",)
PT, SFT = ("pretraining.py",), ("supervised_finetuning.py",)
PAIRS = ("reward_modeling.py", "dpo_training.py", "orpo_training.py")
PPO, GRPO = ("ppo_training.py",), ("grpo_training.py",)
CHAT = ("inference.py", "openai_api.py", "fastapi_server_demo.py", "gradio_demo.py", "chatpdf.py")
TRAINING = PT + SFT + PAIRS + PPO + GRPO

# Reasons that several flags share.
NO_UPLOAD = "Upload with `hf upload` after training; no stage pushes by itself."
ANSWERS_ONLY = "Only answers are trained on; --train_on_inputs True trains on all."
NO_METRICS = "The trainer determines what it evaluates."
NO_LABELS = "There are no labels."
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
    "save_safetensors": {EVERY: "Weights are always saved as safetensors; leave the flag out."},
    "fp16_backend": {EVERY: "Choose --bf16 or --fp16; the backend is torch's own."},
    # Fields of TrainingArguments without effect in any stage.
    "do_predict": {TRAINING: "These scripts train and evaluate; generate with inference.py."},
    "logging_nan_inf_filter": {
        TRAINING: "A loss that is not finite is always shown, and nothing is saved after it.",
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
        PT + SFT + PAIRS: "Nothing is cut: a row that is too long is refused, or skipped with --skip_long_rows True.",
    },
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
    "remove_unused_columns": {
        PT + SFT + PAIRS + PPO: "The trainer only gets the columns that it uses.",
        GRPO: "Every field of a row is passed to the reward functions.",
    },
    "streaming": {
        PAIRS: "Pairs are tokenized before training; for corpora there is pretraining.py --streaming True.",
        PPO + GRPO: "Prompts are tokenized before training.",
    },
    "shuffle_buffer": {
        PAIRS: "It is for --streaming, which the stages on preference pairs do not have.",
        PPO + GRPO: "It is for --streaming, which this stage does not have.",
    },
    # The order of rows, and how they are loaded.
    "group_by_length": {PT: "Blocks are of equal length."},
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
    "trust_remote_code": {
        PT + SFT + PAIRS + GRPO: "Code of a checkpoint is never run; use a model that transformers itself knows.",
    },
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
    # Front ends.
    "qlora": {CHAT: "QLoRA is a training method; --load_in_4bit loads the weights in 4 bits."},
    "template_name": {CHAT: "The chat template is saved with the model; a training stage installs another."},
    "resize_emb": {CHAT: "An adapter with new tokens contains their embedding rows."},
    "only_cpu": {CHAT: "Hide the GPUs: CUDA_VISIBLE_DEVICES= in front of the command."},
    "context_len": {CHAT: "A prompt may be as long as the model's context; --max_new_tokens limits the answer."},
    "single_tune": {CHAT: "A conversation continues until /clear."},
}


def refused_in(program: str | None = None) -> dict[str, str]:
    """The flags that a program refuses, each with the reason; without a program those that all of them refuse.

    Raises:
        KeyError: no flag is refused by a program of this name in particular.
    """
    programs = {*EVERY, program}
    if program and not any(program in group for groups in REFUSED.values() for group in groups):
        raise KeyError(f"refusals.py knows no program {program}")
    return {
        flag: reason for flag, groups in REFUSED.items() for group, reason in groups.items() if programs & set(group)
    }
