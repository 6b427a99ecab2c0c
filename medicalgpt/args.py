"""Arguments that every stage shares, and one strict parser for all programs.

A flag is declared once, as a dataclass field. What transformers or TRL declare already is not declared again.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar


@dataclass
class TemplateArguments:
    """How conversations are written; a base of the arguments of stages that train on them."""

    template_name: str | None = field(
        default=None, metadata={"help": "Chat template, by its name in template.py. Default: the tokenizer's own."}
    )
    tool_format: str | None = field(
        default=None,
        metadata={
            "help": "How tools and their calls are written: default, qwen, llama3, glm4, mistral. Default: the "
            "template's own."
        },
    )
    system_prompt: str | None = field(
        default=None,
        metadata={"help": "System prompt of conversations that have none; saved with the template for serving."},
    )


@dataclass
class PairArguments(TemplateArguments):
    """What the stages on preference pairs share; a base of their arguments."""

    model_max_length: int | None = field(
        default=None,
        metadata={
            "help": "Most tokens of a prompt with either answer. A longer pair is refused, never cut. Unset: what the "
            "two limits below allow together, or 1024; less if the model has fewer positions.",
            "aliases": ["--max_seq_length"],
        },
    )
    max_source_length: int | None = field(
        default=None, metadata={"help": "Most tokens of a prompt. Unset: what --model_max_length leaves."}
    )
    max_target_length: int | None = field(
        default=None, metadata={"help": "Most tokens of an answer, its end included. Unset: likewise."}
    )
    # Both answers of a pair are padded to the longest of the batch, so that like lengths save even more than in SFT.
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
                    f"--model_max_length {self.model_max_length} tokens. Raise that, or leave --{name} out."
                )
        super().__post_init__()


@dataclass
class ModelArguments:
    """Which model, and in which numeric form."""

    model_name_or_path: str = field(
        metadata={"help": "Hub name, local folder, or the folder of an adapter (its base is found by itself)."}
    )
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Tokenizer, if it is not the model's own.", "aliases": ["--tokenizer_path"]}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the hub."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are kept."})
    hub: str = field(
        default="huggingface",
        metadata={
            "help": "Where names are looked up. `HF_ENDPOINT` chooses a mirror of Hugging Face.",
            "choices": ["huggingface", "modelscope"],
        },
    )
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Type of the loaded weights. auto: bfloat16 where the GPU has it and adapters are trained, "
            "float32 otherwise.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
            "aliases": ["--torch_dtype", "--torch-dtype"],
        },
    )
    device_map: str | None = field(
        default=None,
        metadata={"help": "auto spreads one model over the visible GPUs of a single process. Unset: one GPU each."},
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "Load the base as NF4; only adapters are trained."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Load the base as int8; only adapters are trained."})
    qlora: bool = field(
        default=False,
        metadata={"help": "The QLoRA recipe: 4-bit NF4 with double quantization. Implies --load_in_4bit."},
    )


@dataclass
class ChatArguments(ModelArguments):
    """A model to talk to, and how its answers are chosen; a base of the arguments of every front end."""

    model_name_or_path: str = field(
        metadata={
            "help": "Hub name, local folder, or the folder of an adapter (its base is found by itself).",
            "aliases": ["--base_model"],
        }
    )
    lora_model: str | None = field(default=None, metadata={"help": "Adapter to put on top of the model."})
    system_prompt: str | None = field(
        default=None, metadata={"help": "System prompt for conversations that have none of their own."}
    )
    max_new_tokens: int = field(default=512, metadata={"help": "Most tokens of one answer."})
    temperature: float = field(default=0.0, metadata={"help": "0: the best token every time; above: sampled."})
    top_p: float = field(default=1.0, metadata={"help": "Sample from the likeliest tokens of this total probability."})
    top_k: int = field(default=0, metadata={"help": "Sample from the k likeliest tokens; 0: from all."})
    repetition_penalty: float = field(
        default=1.0, metadata={"help": "Above 1: tokens that occurred already become less likely."}
    )
    seed: int | None = field(default=None, metadata={"help": "The same seed samples the same answers."})
    stop_str: str | None = field(
        default=None, metadata={"help": "An answer also ends before this text. The model's own ends are known."}
    )


@dataclass
class ServeArguments(ChatArguments):
    """A front end for several people at a time. The settings of ChatArguments hold where a request says none."""

    host: str = field(
        default="127.0.0.1",
        metadata={"help": "Address to listen on. The default is for this machine alone.", "aliases": ["--server_name"]},
    )
    port: int = field(
        default=8000, metadata={"help": "Port to listen on; 0 takes a free one.", "aliases": ["--server_port"]}
    )
    max_batch_size: int = field(default=16, metadata={"help": "Most answers that are computed together."})
    max_waiting: int = field(default=64, metadata={"help": "Most requests that may wait; more are turned away."})
    batching: str = field(
        default="auto",
        metadata={
            "help": "static: waiting requests are admitted when the running ones are answered. continuous: at every "
            "token, for CUDA. auto: continuous on CUDA where the model can, static elsewhere.",
            "choices": ["auto", "static", "continuous"],
        },
    )
    request_timeout: float = field(default=300.0, metadata={"help": "Most seconds from a request to its answer."})


@dataclass
class ApiArguments(ServeArguments):
    """A server that programs ask."""

    api_key: str | None = field(
        default=None,
        metadata={
            "help": "Key that every request must bear. Better: the variable MEDICALGPT_API_KEY, since other users of a "
            "machine can read command lines."
        },
    )


@dataclass
class PageArguments(ServeArguments):
    """A page that people look at in a browser."""

    auth: str | None = field(
        default=None,
        metadata={"help": "user:password that the page asks for. In the environment, MEDICALGPT_AUTH, it is safer."},
    )
    share: bool = field(default=False, metadata={"help": "A public link through the servers of Gradio."})


@dataclass
class AttentionArguments:
    """How attention is computed, and how far the positions reach."""

    flash_attn: bool = field(
        default=False,
        metadata={"help": "FlashAttention: the installed package, a prebuilt kernel, or PyTorch's own; the log says."},
    )
    shift_attn: bool = field(
        default=False,
        metadata={
            "help": "Shifted sparse attention (S2-Attn of LongLoRA) in training: each token looks at a group of a "
            "quarter of the length. Evaluation and serving use full attention."
        },
    )
    rope_scaling: str | None = field(
        default=None,
        metadata={
            "help": "Stretch the rotary positions to --model_max_length or --block_size, beyond the model's own.",
            "choices": ["linear", "dynamic", "yarn"],
        },
    )


@dataclass
class LoraArguments:
    """Which weights are trained: low-rank adapters (https://arxiv.org/abs/2106.09685), or all, or some layers."""

    use_peft: bool = field(default=True, metadata={"help": "Train an adapter; False trains every weight."})
    peft_path: str | None = field(default=None, metadata={"help": "Go on training this adapter."})
    lora_rank: int = field(default=8, metadata={"help": "Rank r of the update."})
    lora_alpha: float = field(default=16.0, metadata={"help": "The update is scaled by alpha / r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout on the adapter's input."})
    target_modules: str = field(
        default="all",
        metadata={"help": "all: every linear layer but the head; or module names with commas (q_proj,v_proj)."},
    )
    modules_to_save: str | None = field(
        default=None,
        metadata={"help": "Modules trained in full beside the adapter, with commas (embed_tokens,lm_head)."},
    )
    use_dora: bool = field(
        default=False,
        metadata={"help": "DoRA: direction and length of each weight apart (https://arxiv.org/abs/2402.09353)."},
    )
    use_rslora: bool = field(
        default=False,
        metadata={"help": "rsLoRA: scale by alpha / sqrt(r), for high ranks (https://arxiv.org/abs/2312.03732)."},
    )
    loraplus_lr_ratio: float | None = field(
        default=None,
        metadata={"help": "LoRA+: the B matrices learn this many times faster (https://arxiv.org/abs/2402.12354)."},
    )
    freeze_layers: str | None = field(
        default=None,
        metadata={"help": "Decoder layers that stay as they are, by number, with commas and ranges (0-21,23)."},
    )


@dataclass
class DataArguments:
    """Which rows are trained on and which are held out."""

    train_file_dir: str | None = field(
        default=None,
        metadata={
            "help": "File or folder of training data, searched with its subfolders; several with commas, and mixed by "
            "weight if each has one (data/finetune:0.7,data/general:0.3)."
        },
    )
    validation_file_dir: str | None = field(
        default=None,
        metadata={
            "help": "File or folder of held-out data. Unset: files named validation*, valid*, dev*, eval* or test* in "
            "--train_file_dir are the held-out data."
        },
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the hub, instead of files."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that data set."})
    validation_split_percentage: float = field(
        default=0.0,
        metadata={"help": "Percent of the training rows to hold out, chosen by --data_seed, if there is no other."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use the first N training rows."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use the first N held-out rows."})
    mix_strategy: str = field(
        default="under",
        metadata={
            "help": "How weights become rows. under: no row twice, what is too many is left out and counted; over: "
            "every row at least once, rows of the small sources again.",
            "choices": ["under", "over"],
        },
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Tokenize while training, for corpora that should not be tokenized as a whole beforehand."},
    )
    shuffle_buffer: int = field(default=10_000, metadata={"help": "Rows among which --streaming draws the next one."})
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Processes that tokenize. Default: all cores where the rows are worth it."}
    )
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenize again, whatever is in the token cache."})
    ignore_fields: str | None = field(
        default=None, metadata={"help": "Fields of a row that may be there and are not used, with commas."}
    )
    skip_bad_rows: bool = field(
        default=False, metadata={"help": "Leave out and count rows that cannot be used, instead of stopping."}
    )
    skip_long_rows: bool = field(
        default=False, metadata={"help": "Leave out and count rows that are too long, instead of stopping."}
    )
    allow_overlap: bool = field(
        default=False, metadata={"help": "Go on although held-out rows occur among the training rows."}
    )


@dataclass
class RunArguments:
    """What happens around the training."""

    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Remove the run that --output_dir holds and start over."}
    )
    sample_prompts: int = field(
        default=3, metadata={"help": "Prompts answered before and after training, to see what changed; 0 for none."}
    )


def help_texts(cls: type) -> dict[str, str]:
    """What `--help` says of each field of a dataclass: the field's own help, or that of the nearest `HELP`."""
    texts = {entry.name: entry.metadata.get("help", "") for entry in dataclasses.fields(cls)}
    for base in reversed(cls.__mro__):
        texts |= vars(base).get("HELP", {})
    return texts


def bf16_gpu() -> bool:
    """Whether there is a GPU that computes in bfloat16."""
    import torch

    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


@dataclass
class StageDefaults:
    """What every stage sets differently from TRL. Put it before the TRL config in the bases of a stage's arguments.

    Attributes:
        HELP: what `--help` and docs/training_params.md say of flags that the library declares, where its own text does
            not say what happens here. Classes add their own; see `help_texts`.
    """

    HELP: ClassVar[dict[str, str]] = {
        "eval_on_start": "Evaluate before the first step. Default here: True if --eval_strategy is given.",
        "resume_from_checkpoint": "True: resume from the newest complete checkpoint in --output_dir; or the folder of "
        "a checkpoint.",
        "fsdp": "Shard the weights over the processes with PyTorch's FSDP, on GPUs; no value needed. Settings: "
        "--fsdp_config FILE.",
        "deepspeed": "DeepSpeed's settings, a JSON file; zero2.json and zero3.json are included.",
        "use_liger_kernel": "Liger's Triton kernels for the layers, on a GPU. Requires `pip install liger-kernel`.",
        "optim": "Optimizer: adamw_torch, adamw_8bit, adafactor, galore_adamw, apollo_adamw, lion_32bit and others.",
        "optim_args": "Settings of this optimizer only, as key=value, separated by commas.",
        "optim_target_modules": "Modules whose optimizer states GaLore and APOLLO keep low-rank. Default: every linear "
        "layer.",
    }

    bf16: bool | None = field(default=None, metadata={"help": "bfloat16 autocast. Default: on where a GPU has it."})
    # Recomputing activations costs a fifth of the speed; it is for those who run out of memory.
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Recompute activations to save memory."})
    do_train: bool = field(default=True, metadata={"help": "False evaluates only."})
    neftune_noise_alpha: float | None = field(
        default=None,
        metadata={
            "help": "NEFTune: noise on the embeddings in training, of at most alpha / sqrt(length x width) "
            "(https://arxiv.org/abs/2310.05914). 5 is usual.",
            "aliases": ["--neft_alpha"],
        },
    )
    # No tracker talks to a network unless it is named.
    report_to: str = field(default="none", metadata={"help": "Tracker: tensorboard, wandb, ..."})

    @property
    def order_seed(self) -> int:
        """Of splits, of mixtures, and of the order of rows."""
        return self.seed if self.data_seed is None else self.data_seed

    def __post_init__(self):
        import torch

        # On a CPU bfloat16 is slower than float32, and transformers would refuse it without `use_cpu`.
        if not torch.cuda.is_available():
            self.use_cpu = True
        if self.bf16 is None:
            self.bf16 = not self.fp16 and bf16_gpu()
        self._refuse_idle_training()
        super().__post_init__()
        if self.fsdp and self.use_cpu:
            raise ValueError(
                "--fsdp has no effect on CPUs, where accelerate leaves it out without a word. Spread the weights over "
                "the processes with --deepspeed zero3.json."
            )

    def _refuse_idle_training(self) -> None:
        """Raises ValueError for numbers with which nothing would be trained, or something else than was said."""
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1.")
        if self.max_steps == 0 or (self.num_train_epochs <= 0 and self.max_steps < 0):
            flag = "max_steps" if self.max_steps == 0 else "num_train_epochs"
            raise ValueError(f"--{flag} {getattr(self, flag)} would train nothing. To evaluate only: --do_train False.")
        if self.load_best_model_at_end and str(getattr(self.eval_strategy, "value", self.eval_strategy)) == "no":
            raise ValueError("--load_best_model_at_end needs evaluations to choose by: add --eval_strategy steps.")
