"""Arguments that programs share.

A flag is declared once, as a dataclass field. What transformers or TRL already declare is not declared again.
"""

import dataclasses
from dataclasses import dataclass, field
from importlib.util import find_spec
from math import isfinite
from typing import Any, ClassVar

from medicalgpt.adapter_args import CombinationArguments
from medicalgpt.logs import is_launch_incomplete, notice, number_single_process

# Packages of trackers that have another name than their tracker.
PACKAGE_OF_TRACKER = {"azure_ml": "azureml-core", "comet_ml": "comet-ml", "flyte": "flytekit", "neptune": "neptune"}


@dataclass
class TemplateArguments:
    """How conversations are rendered; a base class of the arguments of stages that train on them."""

    template_name: str | None = field(
        default=None, metadata={"help": "Chat template, by its name in template.py. Default: the tokenizer's own."}
    )
    tool_format: str | None = field(
        default=None,
        metadata={
            "help": "Format of tools and tool calls: default, qwen, llama3, glm4, mistral. Default: the template's own."
        },
    )
    system_prompt: str | None = field(
        default=None,
        metadata={"help": "System prompt of conversations that have none; saved with the template for serving."},
    )


@dataclass
class PairArguments(TemplateArguments):
    """What the stages on preference pairs share; a base class of their arguments."""

    model_max_length: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of tokens of a prompt with either answer. Longer pairs are refused, not truncated. "
            "Unset: the sum of the two limits below, or 1024; less if the model supports fewer positions.",
            "aliases": ["--max_seq_length"],
        },
    )
    max_source_length: int | None = field(
        default=None, metadata={"help": "Maximum number of tokens of a prompt. Unset: limited by --model_max_length."}
    )
    max_target_length: int | None = field(
        default=None, metadata={"help": "Maximum number of tokens of an answer, including its end. Unset: likewise."}
    )
    # Both answers of a pair are padded to the longest of the batch, so grouping by length saves even more than in SFT.
    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={"help": "group_by_length, or random.", "choices": ["group_by_length", "random"]},
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "No dropout anywhere, so that log-probabilities can be compared."}
    )
    learning_rate: float | None = field(default=None, metadata={"help": "Default: see the stage's guide."})

    def __post_init__(self):
        for name in ("max_source_length", "max_target_length"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1.")
        both = (self.max_source_length or 0) + (self.max_target_length or 0)
        if self.model_max_length is None:
            self.model_max_length = both if self.max_source_length and self.max_target_length else 1024
        for name in ("max_source_length", "max_target_length"):
            if (getattr(self, name) or 0) >= self.model_max_length:
                raise ValueError(
                    f"--{name} {getattr(self, name)} has no effect, as prompt and answer together may have "
                    f"--model_max_length {self.model_max_length} tokens. Raise it, or omit --{name}."
                )
        super().__post_init__()


@dataclass
class ModelArguments:
    """Which model, and in which precision."""

    model_name_or_path: str = field(
        metadata={
            "help": "Hub name, local folder, or the folder of an adapter (its base model is found automatically)."
        }
    )
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Tokenizer, if not the model's own.", "aliases": ["--tokenizer_path"]}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the hub."})
    cache_dir: str | None = field(default=None, metadata={"help": "Folder for downloads."})
    hub: str = field(
        default="huggingface",
        metadata={
            "help": "Hub on which names are looked up. `HF_ENDPOINT` selects a mirror of Hugging Face.",
            "choices": ["huggingface", "modelscope"],
        },
    )
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Data type of the loaded weights. auto: bfloat16 if the GPU supports it and adapters are trained, "
            "float32 otherwise.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
            "aliases": ["--torch_dtype", "--torch-dtype"],
        },
    )
    device_map: str | None = field(
        default=None,
        metadata={
            "help": "auto distributes one model over the visible GPUs of a single process. Unset: one GPU per process."
        },
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "Load the base as NF4; only adapters are trained."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Load the base as int8; only adapters are trained."})
    qlora: bool = field(
        default=False,
        metadata={"help": "QLoRA: 4-bit NF4 with double quantization. Implies --load_in_4bit."},
    )


@dataclass
class ChatArguments(CombinationArguments, ModelArguments):
    """A model to chat with, and how its answers are sampled; a base class of the arguments of every front end."""

    model_name_or_path: str = field(
        metadata={
            "help": "Hub name, local folder, or the folder of an adapter (its base model is found automatically).",
            "aliases": ["--base_model"],
        }
    )
    lora_model: str | None = field(
        default=None,
        metadata={
            "help": "Adapter to load on top of the model; several separated by commas, each as PATH or NAME=PATH."
        },
    )
    template_name: str | None = field(
        default=None,
        metadata={
            "help": "Chat template, by its name in template.py, that the model is expected to have; another one is an "
            "error. Not needed: the template is saved with the model."
        },
    )
    system_prompt: str | None = field(default=None, metadata={"help": "System prompt for conversations without one."})
    max_new_tokens: int = field(default=512, metadata={"help": "Maximum number of tokens of an answer."})
    temperature: float = field(default=0.0, metadata={"help": "0: greedy decoding; above 0: sampling."})
    top_p: float = field(
        default=1.0, metadata={"help": "Sample from the most likely tokens with this total probability."}
    )
    top_k: int = field(default=0, metadata={"help": "Sample from the k most likely tokens; 0: from all."})
    repetition_penalty: float = field(
        default=1.0, metadata={"help": "Above 1: tokens that occurred already become less likely."}
    )
    seed: int | None = field(default=None, metadata={"help": "Sampling seed; the same seed gives the same answers."})
    stop_str: str | None = field(
        default=None, metadata={"help": "Stop before this text, in addition to the model's own stop tokens."}
    )


@dataclass
class AttentionArguments:
    """How attention is computed, and over how many positions."""

    flash_attn: bool = field(
        default=False,
        metadata={
            "help": "FlashAttention: the installed package, a prebuilt kernel, or PyTorch's own; the log says which."
        },
    )
    shift_attn: bool = field(
        default=False,
        metadata={
            "help": "Shifted sparse attention (S2-Attn of LongLoRA) in training: each token attends to a group of a "
            "quarter of the length. Evaluation and serving use full attention."
        },
    )
    rope_scaling: str | None = field(
        default=None,
        metadata={
            "help": "Scale the rotary positions to --model_max_length or --block_size, beyond the model's own limit.",
            "choices": ["linear", "dynamic", "yarn"],
        },
    )


@dataclass
class LoraArguments:
    """Which weights are trained: low-rank adapters (LoRA, https://arxiv.org/abs/2106.09685), all, or some layers."""

    use_peft: bool = field(default=True, metadata={"help": "Train an adapter; False: full fine-tuning."})
    peft_path: str | None = field(default=None, metadata={"help": "Continue training this adapter."})
    lora_rank: int = field(default=8, metadata={"help": "Rank r of the adapter."})
    lora_alpha: float = field(default=16.0, metadata={"help": "The update is scaled by alpha / r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout on the input of the adapter."})
    target_modules: str = field(
        default="all",
        metadata={
            "help": "all: every linear layer except the head; or module names, separated by commas (q_proj,v_proj)."
        },
    )
    modules_to_save: str | None = field(
        default=None,
        metadata={"help": "Modules trained in full alongside the adapter, separated by commas (embed_tokens,lm_head)."},
    )
    use_dora: bool = field(
        default=False,
        metadata={
            "help": "DoRA: magnitude and direction of each weight are trained separately (https://arxiv.org/abs/2402.09353)."
        },
    )
    use_rslora: bool = field(
        default=False,
        metadata={"help": "rsLoRA: scale by alpha / sqrt(r), for high ranks (https://arxiv.org/abs/2312.03732)."},
    )
    loraplus_lr_ratio: float | None = field(
        default=None,
        metadata={
            "help": "LoRA+: ratio of the learning rate of the B matrices to that of the A matrices (https://arxiv.org/abs/2402.12354)."
        },
    )
    freeze_layers: str | None = field(
        default=None,
        metadata={"help": "Decoder layers to freeze: numbers and ranges, separated by commas (0-21,23)."},
    )

    def __post_init__(self):
        for name, allowed, valid in (
            ("lora_rank", "at least 1", self.lora_rank >= 1),
            ("lora_alpha", "above 0", 0 < self.lora_alpha < float("inf")),
            ("lora_dropout", "0 or more and below 1", 0 <= self.lora_dropout < 1),
        ):
            if not valid:
                raise ValueError(f"--{name} {getattr(self, name)} must be {allowed}.")


@dataclass
class DataArguments:
    """Which rows are trained on and which are held out."""

    train_file_dir: str | None = field(
        default=None,
        metadata={
            "help": "File or folder of training data, searched recursively; several separated by commas, mixed by "
            "weight if each has one (data/finetune:0.7,data/general:0.3)."
        },
    )
    validation_file_dir: str | None = field(
        default=None,
        metadata={
            "help": "File or folder of held-out data. Unset: files or subfolders named validation*, valid*, val*, "
            "dev*, eval* or test* in --train_file_dir are the held-out data."
        },
    )
    prepared_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of rows that prepare_data.py has tokenized, instead of files; read as it is."},
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Dataset on the hub, or a folder that datasets can load or has saved, instead of files."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split of that dataset to train on."})
    data_files: str | None = field(
        default=None,
        metadata={"help": "Files of that dataset to train on, separated by commas (data/a.json,data/b-*.json)."},
    )
    validation_split_percentage: float = field(
        default=0.0,
        metadata={
            "help": "Percentage of the training rows to hold out, chosen with --data_seed, unless there is other "
            "held-out data."
        },
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use the first N training rows."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use the first N held-out rows."})
    mix_strategy: str = field(
        default="under",
        metadata={
            "help": "How weights become numbers of rows. under: no row twice, surplus rows are skipped and counted; "
            "over: every row at least once, rows of small sources repeated.",
            "choices": ["under", "over"],
        },
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Tokenize during training, for corpora too large to be tokenized in advance."},
    )
    shuffle_buffer: int = field(
        default=10_000, metadata={"help": "Size of the buffer, in rows, from which --streaming draws the next row."}
    )
    preprocessing_num_workers: int | None = field(
        default=None,
        metadata={"help": "Number of processes that tokenize. Default: all cores if there are enough rows."},
    )
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenize again, ignoring the token cache."})
    columns: str | None = field(
        default=None,
        metadata={
            "help": "Which field of a row is what, as NAME=FIELD separated by commas: question=Question,"
            "answer=Response. Names: question, input, options, answer, reasoning, explanation, system, history, "
            "messages, tools, chosen, rejected, text. No other field is then read."
        },
    )
    preset: str | None = field(
        default=None,
        metadata={"help": "Data set whose rows these are, by its name in docs/datasets.md. Default: recognised."},
    )
    encoding: str | None = field(
        default=None,
        metadata={
            "help": "Encoding of text files that are not UTF-8 (gb18030, big5, cp1252, utf-16-le). Default: "
            "recognised, or refused if it is not certain."
        },
    )
    ignore_fields: str | None = field(
        default=None, metadata={"help": "Fields of a row to ignore, separated by commas."}
    )
    skip_bad_rows: bool = field(
        default=False, metadata={"help": "Skip and count rows that cannot be used, instead of stopping."}
    )
    long_rows: str | None = field(
        default=None,
        metadata={
            "help": "What to do with rows that are too long; all are counted, and no answer is ever truncated. turns "
            "(the default): a conversation keeps its first exchanges that fit, anything else is skipped. skip: skip "
            "them. refuse: stop. Skipping more rows than --max_long_rows allows stops the run before it trains.",
            "choices": ["turns", "skip", "refuse"],
        },
    )
    skip_long_rows: bool | None = field(
        default=None, metadata={"help": "Another name: True is --long_rows skip, False is --long_rows refuse."}
    )
    max_long_rows: float = field(
        default=0.5,
        metadata={
            "help": "Share of the training rows, and of the held-out rows, that may be skipped because they are too "
            "long; 1: any number."
        },
    )
    allow_overlap: bool = field(
        default=False, metadata={"help": "Continue even if held-out rows occur among the training rows."}
    )

    def __post_init__(self):
        for name in ("max_train_samples", "max_eval_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1, or -1 for all.")
        named = {None: None, True: "skip", False: "refuse"}[self.skip_long_rows]
        if named and self.long_rows not in (None, named):
            raise ValueError(
                f"--skip_long_rows {self.skip_long_rows} means --long_rows {named}, and --long_rows {self.long_rows} "
                "is given as well; keep one of them."
            )
        self.long_rows = self.long_rows or named or "turns"
        if not 0 <= self.max_long_rows <= 1:
            raise ValueError(f"--max_long_rows {self.max_long_rows} is a share of the rows, from 0 to 1.")


@dataclass
class RunArguments:
    """The output folder and the samples shown."""

    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "Replace the run in --output_dir. It is removed when the new run has saved its first checkpoint or "
            "its result, and restored if the new run ends before that."
        },
    )
    sample_prompts: int = field(
        default=3,
        metadata={"help": "Number of prompts answered before and after training, to see what changed; 0: none."},
    )
    verbose: bool = field(
        default=False,
        metadata={"help": "Show the whole table of requested and observed settings, also if nothing differs."},
    )

    def __post_init__(self):
        if self.sample_prompts < 0:
            raise ValueError(f"--sample_prompts {self.sample_prompts} must be 0 or more.")


def same_field(cls: type, name: str) -> Any:
    """A field with the default and the texts of a field of another dataclass, for a program that takes only some."""
    (found,) = (entry for entry in dataclasses.fields(cls) if entry.name == name)
    return field(default=found.default, metadata=found.metadata)


# Of the trainers: numpy's generators take 32 bits, and each process adds its number.
MAX_SEED = 2**32 - 2**16


def help_texts(cls: type) -> dict[str, str]:
    """The help text of each field of a dataclass: the field's own, or that of the nearest `HELP`."""
    texts = {entry.name: entry.metadata.get("help", "") for entry in dataclasses.fields(cls)}
    for base in reversed(cls.__mro__):
        texts |= vars(base).get("HELP", {})
    return texts


def installed_trackers(report_to: str | list[str] | None) -> list[str]:
    """The trackers that `--report_to` names.

    Raises:
        ValueError: one is unknown or not installed.
    """
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    given = report_to if isinstance(report_to, list) else [report_to or "none"]
    names = [name.strip() for text in given for name in text.split(",") if name.strip()]
    installed = get_available_reporting_integrations()
    if names == ["none"]:
        return ["none"]
    if names == ["all"]:
        if not installed:
            raise ValueError("--report_to all: no tracker is installed. Install one: pip install tensorboard")
        return installed
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(INTEGRATION_TO_CALLBACK)
            raise ValueError(f"--report_to {name} is not a tracker. Use none, all, or some of {known}.")
    if missing := [name for name in names if name not in installed]:
        raise ValueError(
            f"--report_to {','.join(names)} needs {' and '.join(missing)}, which is not installed. Install it: "
            f"pip install {' '.join(PACKAGE_OF_TRACKER.get(name, name) for name in missing)}"
        )
    return names


def bf16_gpu() -> bool:
    """Whether there is a GPU that supports bfloat16."""
    import torch

    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


@dataclass
class StageDefaults:
    """What every stage sets differently from TRL. Put this before the TRL config in the bases of a stage's arguments.

    Attributes:
        HELP: what `--help` and docs/training_params.md say about flags that the library declares, if its own text does
            not say what happens here. Classes add their own; see `help_texts`.
        BEST_METRIC: the metric of an evaluation by which checkpoints are compared, unless the user names another.
    """

    BEST_METRIC: ClassVar[str] = "loss"

    HELP: ClassVar[dict[str, str]] = {
        "eval_on_start": "Evaluate before the first step. Default here: True if --eval_strategy is given.",
        "metric_for_best_model": "Metric of the evaluation by which --load_best_model_at_end, --save_strategy best and "
        "--early_stopping_patience compare. Checked before the first step. Default: loss; PPO: score; GRPO: reward.",
        "greater_is_better": "Whether a higher metric is better. Default: False if its name ends in loss or "
        "perplexity.",
        "fsdp": "Shard the weights over the processes with PyTorch's FSDP, on GPUs; no value needed. Settings: "
        "--fsdp_config FILE.",
        "deepspeed": "DeepSpeed's settings, a JSON file; zero2.json and zero3.json are included.",
        "dataloader_drop_last": "Omit the last step of an epoch if too few rows are left to fill it.",
        "use_liger_kernel": "Liger's Triton kernels for the layers, on a GPU. Requires `pip install liger-kernel`.",
        "optim": "Optimizer: adamw_torch, adamw_8bit, adafactor, galore_adamw, apollo_adamw, lion_32bit and others.",
        "optim_args": "Settings of this optimizer only, as key=value, separated by commas.",
        "optim_target_modules": "Modules whose optimizer states GaLore and APOLLO keep low-rank. Default: every linear "
        "layer.",
    }

    bf16: bool | None = field(default=None, metadata={"help": "bfloat16 autocast. Default: on if the GPU supports it."})
    use_muon: bool = field(
        default=False,
        metadata={
            "help": "In full training: Muon for the weight matrices of the layers, AdamW for the rest; fewer steps to "
            "the same loss (docs/training_options.md)."
        },
    )
    # Recomputing activations costs a fifth of the speed, so it is off unless memory runs out.
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Recompute activations to save memory."})
    do_train: bool = field(default=True, metadata={"help": "False: evaluate only."})
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "auto: resume the run in --output_dir from its newest complete checkpoint, start if there is none, "
            "do nothing if it has finished. True: resume, or stop if there is no checkpoint. Or the folder of a "
            "checkpoint.",
            "aliases": ["--resume"],
        },
    )
    neftune_noise_alpha: float | None = field(
        default=None,
        metadata={
            "help": "NEFTune: noise on the embeddings during training, at most alpha / sqrt(length x width) "
            "(https://arxiv.org/abs/2310.05914). Usually 5.",
            "aliases": ["--neft_alpha"],
        },
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "End training after this many evaluations without a better --metric_for_best_model. Needs "
            "--eval_strategy."
        },
    )
    early_stopping_threshold: float = field(
        default=0.0,
        metadata={"help": "With --early_stopping_patience: an evaluation must be better by more than this."},
    )
    # No tracker connects to the network unless it is requested.
    report_to: str = field(
        default="none",
        metadata={
            "help": "Trackers, separated by commas: tensorboard, wandb, swanlab, mlflow, trackio and others; all: the "
            "installed ones. TensorBoard's files are in --output_dir/runs."
        },
    )

    @property
    def order_seed(self) -> int:
        """Seed of splits, of mixtures and of the order of rows."""
        return self.seed if self.data_seed is None else self.data_seed

    def __post_init__(self):
        import torch

        # On a CPU bfloat16 is slower than float32, and transformers would refuse it without `use_cpu`.
        if not torch.cuda.is_available():
            self.use_cpu = True
        if self.bf16 is None:
            self.bf16 = not self.fp16 and bf16_gpu()
        if self.fp16 and not self.bf16 and self.use_cpu:
            notice("--fp16 True: float16 needs a GPU; on this CPU training computes in float32.")
            self.fp16 = False
        self._refuse_idle_training()
        self._refuse_unusable_values()
        self.report_to = installed_trackers(self.report_to)
        self._set_best_metric()
        if is_launch_incomplete():
            raise ValueError(
                "accelerate launch was to start several processes and has started only this one, as it silently does "
                "without several GPUs. Use torchrun --nproc_per_node N in its place, or pass it --num_processes 1 (and "
                "unset MASTER_ADDR, if it is set)."
            )
        if self.deepspeed:
            number_single_process()
        super().__post_init__()
        if self.fsdp and self.use_cpu:
            raise ValueError(
                "--fsdp has no effect on CPUs, where accelerate silently ignores it. Shard the weights over "
                "the processes with --deepspeed zero3.json."
            )

    def _refuse_idle_training(self) -> None:
        """Raise ValueError for numbers with which nothing, or not what was requested, would be trained."""
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1.")
        for name, allowed, valid in (
            ("learning_rate", "0 or more", self.learning_rate is None or 0 <= self.learning_rate < float("inf")),
            ("weight_decay", "0 or more", self.weight_decay >= 0),
            ("max_grad_norm", "0 or more", self.max_grad_norm is None or self.max_grad_norm >= 0),
            ("warmup_steps", "0 or more", self.warmup_steps is None or self.warmup_steps >= 0),
            ("label_smoothing_factor", "0 or more and below 1", 0 <= self.label_smoothing_factor < 1),
            ("logging_steps", "above 0", self.logging_steps > 0 or _value(self.logging_strategy) != "steps"),
            ("save_steps", "above 0", self.save_steps > 0 or _value(self.save_strategy) != "steps"),
            ("eval_steps", "above 0", self.eval_steps is None or self.eval_steps > 0),
            ("save_total_limit", "at least 1", self.save_total_limit is None or self.save_total_limit >= 1),
            ("dataloader_num_workers", "0 or more", self.dataloader_num_workers >= 0),
        ):
            if not valid:
                raise ValueError(f"--{name} {getattr(self, name)} must be {allowed}.")
        if not isinstance(self.gradient_checkpointing_kwargs, dict | None):
            raise ValueError(f"--gradient_checkpointing_kwargs {self.gradient_checkpointing_kwargs} is not JSON: {{}}.")
        for name, seed in (("seed", self.seed), ("data_seed", self.data_seed)):
            if seed is not None and not 0 <= seed <= MAX_SEED:
                raise ValueError(f"--{name} {seed} must be between 0 and {MAX_SEED}.")
        if self.max_steps == 0 or (self.num_train_epochs <= 0 and self.max_steps < 0):
            flag = "max_steps" if self.max_steps == 0 else "num_train_epochs"
            raise ValueError(f"--{flag} {getattr(self, flag)} would train nothing. To evaluate only: --do_train False.")
        self._refuse_idle_evaluation()

    def _refuse_unusable_values(self) -> None:
        """Raise ValueError for values that libraries would refuse with a traceback, once the model is loaded."""
        if not isfinite(self.num_train_epochs):
            raise ValueError(f"--num_train_epochs {self.num_train_epochs} must be a number. Or set --max_steps.")
        if getattr(self, "activation_offloading", False) and self.use_cpu:
            raise ValueError("--activation_offloading has no effect here: activations are on the CPU already. Omit it.")
        if self.eval_accumulation_steps is not None and self.eval_accumulation_steps < 1:
            raise ValueError(f"--eval_accumulation_steps {self.eval_accumulation_steps} must be at least 1.")
        if self.dataloader_prefetch_factor is not None and self.dataloader_prefetch_factor < 1:
            raise ValueError(f"--dataloader_prefetch_factor {self.dataloader_prefetch_factor} must be at least 1.")
        for name in ("dataloader_persistent_workers", "dataloader_multiprocessing_context"):
            if getattr(self, name) and not self.dataloader_num_workers:
                raise ValueError(f"--{name} is for worker processes; add --dataloader_num_workers 1, or omit it.")
        if self.torch_compile_backend is not None or self.torch_compile_mode is not None:
            self._refuse_unknown_compilers()

    def _refuse_unknown_compilers(self) -> None:
        import torch
        from accelerate.utils import DynamoBackend
        from torch._inductor import list_mode_options

        known = {backend.value.lower() for backend in DynamoBackend}
        # With None also those for debugging and experimental ones.
        backends = sorted(known.intersection(torch.compiler.list_backends(exclude_tags=None)))
        backends = [name for name in backends if name != "tvm" or find_spec("tvm")]
        for name, given, usable in (
            ("torch_compile_backend", self.torch_compile_backend, backends),
            ("torch_compile_mode", self.torch_compile_mode, sorted(list_mode_options())),
        ):
            if given is not None and given not in usable:
                raise ValueError(f"--{name} {given} cannot be used here. Use one of {', '.join(usable)}, or omit it.")

    def _refuse_idle_evaluation(self) -> None:
        """Raise ValueError for flags that compare evaluations, if there are none, or none to compare."""
        patience, threshold = self.early_stopping_patience, self.early_stopping_threshold
        if patience is not None and patience < 1:
            raise ValueError(f"--early_stopping_patience {patience} must be at least 1 evaluation.")
        if not 0 <= threshold < float("inf"):
            raise ValueError(f"--early_stopping_threshold {threshold} must be 0 or more.")
        if threshold and patience is None:
            raise ValueError("--early_stopping_threshold has no effect without --early_stopping_patience; add it.")
        if _value(self.eval_strategy) != "no":
            return
        for flag, is_set in (
            ("load_best_model_at_end", self.load_best_model_at_end),
            ("early_stopping_patience", patience is not None),
            ("save_strategy best", _value(self.save_strategy) == "best"),
            ("metric_for_best_model", self.metric_for_best_model is not None),
            ("greater_is_better", self.greater_is_better is not None),
        ):
            if is_set:
                raise ValueError(f"--{flag} needs evaluations to compare: add --eval_strategy steps.")

    def _set_best_metric(self) -> None:
        """The metric by which evaluations are compared, and its direction, where the user leaves them open."""
        compares = self.load_best_model_at_end or self.early_stopping_patience is not None
        compares |= _value(self.save_strategy) == "best"
        compares |= _value(self.lr_scheduler_type) in ("reduce_lr_on_plateau", "greedy")
        if self.metric_for_best_model is None and compares:
            self.metric_for_best_model = self.BEST_METRIC
        if self.greater_is_better is None and (self.metric_for_best_model or "").endswith("perplexity"):
            # The library goes by the name, and knows only that of a loss.
            self.greater_is_better = False


def _value(option: Any) -> str:
    """The text of an option that may be an enum already."""
    return str(getattr(option, "value", option))
