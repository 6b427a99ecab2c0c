"""Arguments that every stage shares, and one strict parser for all programs.

A flag is declared once, as a dataclass field. What transformers or TRL declare already is not declared again.
"""

import dataclasses
import difflib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import yaml

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
# Flags that other tools know and that cannot be honoured here, each with what to do instead.
GONE = {
    "logging_dir": "TensorBoard files go below --output_dir; name a tracker with --report_to tensorboard.",
    "save_safetensors": "Weights are always saved as safetensors; leave the flag out.",
    "fp16_backend": "Choose --bf16 or --fp16; the backend is torch's own.",
}
# Fields of TrainingArguments that must not be shown as if they did something in these scripts.
UNUSED_TRAINING_ARGUMENTS = {
    "do_predict": "These scripts train and evaluate; generate with inference.py.",
    "logging_nan_inf_filter": "A loss that is no number is always shown, and nothing is saved after it.",
    "push_to_hub": "Upload with `hf upload` after training; no stage pushes by itself.",
    "hub_model_id": "Upload with `hf upload` after training; no stage pushes by itself.",
    "hub_strategy": "Upload with `hf upload` after training; no stage pushes by itself.",
    "hub_token": "Log in with `hf auth login`; tokens do not belong on a command line.",
    "hub_private_repo": "Upload with `hf upload` after training; no stage pushes by itself.",
    "hub_always_push": "Upload with `hf upload` after training; no stage pushes by itself.",
    "hub_revision": "Upload with `hf upload` after training; no stage pushes by itself.",
}
# Fields of TRL's SFTConfig that these scripts decide otherwise, since rows are encoded and checked before training.
UNUSED_SFT_ARGUMENTS = {
    **UNUSED_TRAINING_ARGUMENTS,
    "max_length": "Say --model_max_length (fine-tuning) or --block_size (pretraining).",
    "truncation_mode": "Nothing is cut: a row that is too long is refused, or left out with --skip_long_rows True.",
    "dataset_text_field": "Rows are recognised by their fields; data/README.md shows the formats.",
    "dataset_kwargs": "Rows are encoded before the trainer sees them.",
    "dataset_num_proc": "Say --preprocessing_num_workers.",
    "shuffle_dataset": "Rows are shuffled anyway in each epoch, by --data_seed.",
    "padding_free": "Say --packing True.",
    "packing_strategy": "Whole sequences are packed, best fit first.",
    "eval_packing": "Held-out rows are never packed.",
    "completion_only_loss": "Only answers are trained on; --train_on_inputs True trains on all.",
    "assistant_only_loss": "Only answers are trained on; --train_on_inputs True trains on all.",
    "chat_template_path": "Say --template_name.",
    "eos_token": "The chat template sets it; say --template_name.",
    "pad_token": "It follows from the tokenizer.",
    "model_init_kwargs": "Say --dtype, --load_in_4bit, --model_revision and the like.",
    "trust_remote_code": "Code of a checkpoint is never run; use a model that transformers itself knows.",
    "remove_unused_columns": "The trainer is given nothing but what it uses.",
    "include_num_input_tokens_seen": "The count is num_tokens in metrics.jsonl.",
}
# Flags that the stages on preference pairs have no use for.
UNUSED_PAIR_ARGUMENTS = {
    **UNUSED_TRAINING_ARGUMENTS,
    "max_length": "Say --model_max_length.",
    "truncation_mode": "Nothing is cut: a row that is too long is refused, or left out with --skip_long_rows True.",
    "dataset_num_proc": "Say --preprocessing_num_workers.",
    "padding_free": "Pairs are padded; rows of like length share a batch.",
    "chat_template_path": "Say --template_name.",
    "eos_token": "The chat template sets it; say --template_name.",
    "pad_token": "It follows from the tokenizer.",
    "model_init_kwargs": "Say --dtype, --load_in_4bit, --model_revision and the like.",
    "trust_remote_code": "Code of a checkpoint is never run; use a model that transformers itself knows.",
    "remove_unused_columns": "The trainer is given nothing but what it uses.",
    "include_num_input_tokens_seen": "The count is num_tokens in metrics.jsonl.",
    "neftune_noise_alpha": "Noise on the embeddings is for supervised_finetuning.py.",
    "streaming": "Pairs are tokenized before training; for corpora there is pretraining.py --streaming True.",
    "shuffle_buffer": "It belongs to --streaming, which the stages on preference pairs do not have.",
    "block_size": "That is for pretraining.py; here it is --model_max_length.",
    "label_smoothing_factor": "The loss is of pairs; dpo_training.py has --label_smoothing.",
    "prediction_loss_only": "An evaluation always gives all its numbers.",
    "batch_eval_metrics": "Held-out pairs are averaged all at once.",
    "eval_do_concat_batches": "Held-out pairs are averaged all at once.",
    "average_tokens_across_devices": "The loss is a mean over pairs, not over tokens.",
    "length_column_name": "Pairs are grouped by the tokens of their longer sequence.",
    "label_names": "The trainer knows what it evaluates.",
    "include_for_metrics": "The trainer knows what it evaluates.",
}

# Flags that front ends have no use for.
UNUSED_CHAT_ARGUMENTS = {
    "qlora": "It is a way to train; --load_in_4bit loads the weights in 4 bits.",
    "template_name": "The chat template is saved with the model; a stage of training installs another.",
    "resize_emb": "An adapter with new tokens brings their rows along.",
    "only_cpu": "Hide the GPUs: CUDA_VISIBLE_DEVICES= in front of the command.",
    "context_len": "A prompt may be as long as the model's context; --max_new_tokens limits the answer.",
    "single_tune": "A conversation goes on until /clear.",
}


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


def bf16_gpu() -> bool:
    """Whether there is a GPU that computes in bfloat16."""
    import torch

    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


@dataclass
class StageDefaults:
    """What every stage sets otherwise than TRL. Put it before the TRL config among the bases of a stage's arguments."""

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


class StrictParser:
    """`HfArgumentParser` with YAML files, old spellings, and no silent guess.

    Every problem of names is reported in one message with the nearest known flag; there are no abbreviations.

    Args:
        classes: dataclasses whose fields become flags.
        description: text shown above the flags by `--help`.
        unused: fields without effect in this program, with the reason; they are hidden, and refused if given.
    """

    def __init__(self, *classes: type, description: str | None = None, unused: Mapping[str, str] | None = None):
        from argparse import SUPPRESS, RawDescriptionHelpFormatter

        from transformers import HfArgumentParser
        from transformers.hf_argparser import string_to_bool

        self.parser = HfArgumentParser(
            classes, allow_abbrev=False, description=description, formatter_class=RawDescriptionHelpFormatter
        )
        self.parser.error = self._fail
        self.unused = {**GONE, **(unused or {})}
        self.parser.add_argument("--config", help="YAML file of flags; the command line wins over it.")
        for action in self.parser._actions:
            if action.dest in self.unused:
                action.help = SUPPRESS
            if action.type is string_to_bool and action.nargs is None:
                # Switches whose default is None (--bf16) are on when named alone, as the other ones are.
                action.nargs, action.const = "?", True
        self.dest_of = {
            option.lstrip("-"): action.dest
            for option, action in self.parser._option_string_actions.items()
            if option.startswith("--")
        }

    def parse(self, argv: Sequence[str]) -> tuple[Any, ...]:
        """Return one instance of each dataclass. Exits with code 2 on any problem, naming all of them.

        Each instance gets an attribute `given`, the set of field names that the user set.
        """
        argv = list(argv)
        if not {"-h", "--help"}.isdisjoint(argv):
            self.parser.print_help()
            sys.exit(0)
        config_tokens, command_line = self._split_config(argv)
        problems: list[str] = []
        tokens: list[str] = []
        given: dict[str, str] = {}
        for part, origins in (config_tokens, command_line):
            seen_here: dict[str, str] = {}
            for position, token in enumerate(part):
                if not token.startswith("--"):
                    tokens.append(token)
                    continue
                name, equals, value = token[2:].partition("=")
                following = part[position + 1] if position + 1 < len(part) else None
                new, new_value, problem = self._today(name, value if equals else following, origins[position])
                if problem:
                    problems.append(problem)
                    continue
                dest = self.dest_of[new]
                # A command line may repeat a flag, the last one wins; in a file a second one is an oversight.
                if dest in seen_here and (seen_here[dest] != name or origins[position]):
                    problems.append(
                        f"{origins[position]}--{name} and --{seen_here[dest]} set the same thing; keep one of them."
                    )
                seen_here[dest] = name
                tokens.append(f"--{new}={new_value if new_value is not None else value}" if equals else f"--{new}")
                if new_value is not None and not equals and following is not None:
                    part[position + 1] = new_value
            given.update(seen_here)
        if problems:
            self._fail("\n  ".join(dict.fromkeys(problems)))
        namespace = vars(self.parser.parse_args(tokens))
        namespace.pop("config", None)
        return tuple(self._build(cls, namespace, set(given)) for cls in self.parser.dataclass_types)

    def _build(self, cls: type, namespace: dict[str, Any], given: set[str]) -> Any:
        names = [f.name for f in dataclasses.fields(cls) if f.init]
        try:
            instance = cls(**{name: namespace[name] for name in names})
        except (ValueError, TypeError, ImportError, RuntimeError) as error:
            self._fail(str(error))
        instance.given = frozenset(given.intersection(names))
        return instance

    def _today(self, name: str, value: str | None, origin: str) -> tuple[str, str | None, str | None]:
        """Return (today's name, its value if that changes, problem)."""
        plain = name.replace("-", "_")
        target = plain if plain in self.unused else self.dest_of.get(name)
        if target in self.unused:
            return name, None, f"{origin}--{name} has no effect in this program. {self.unused[target]}"
        if plain in RENAMED_VALUES and RENAMED_VALUES[plain][0] in self.dest_of:
            new, values = RENAMED_VALUES[plain]
            key = "true" if value is None or value.startswith("--") else value.lower()
            if key not in values or value is None or value.startswith("--"):
                return name, None, f"{origin}--{name} needs True or False; today it is --{new} {values['true']}"
            return new, values[key], None
        if RENAMED.get(plain) in self.dest_of:
            return RENAMED[plain], None, None
        if name in self.dest_of:
            return name, None, None
        known = [option for option in self.dest_of if option.replace("-", "_") == option and option not in self.unused]
        near = difflib.get_close_matches(plain, known, n=1, cutoff=0.6)
        hint = f"did you mean --{near[0]}?" if near else "see --help for the flags it has."
        return name, None, f"{origin}unknown flag --{name}: {hint}"

    def _split_config(self, argv: list[str]) -> tuple[tuple[list[str], list[str]], tuple[list[str], list[str]]]:
        """Separate `--config FILE` from the command line; both as (tokens, where each token stands)."""
        rest: list[str] = []
        path: str | None = None
        index = 0
        while index < len(argv):
            if argv[index] == "--config" and index + 1 < len(argv):
                found, index = argv[index + 1], index + 2
            elif argv[index].startswith("--config="):
                found, index = argv[index].partition("=")[2], index + 1
            else:
                rest.append(argv[index])
                index += 1
                continue
            if path:
                self._fail(f"--config is given twice ({path} and {found}); put all flags into one file.")
            path = found
        return self._read_yaml(path) if path else ([], []), (rest, [""] * len(rest))

    def _read_yaml(self, path: str) -> tuple[list[str], list[str]]:
        try:
            with open(path, encoding="utf-8") as file:
                text = file.read()
            loader = yaml.SafeLoader(text)
            root = loader.get_single_node()
            # A mapping is taken key by key, since a dict would hide keys that stand there twice.
            entries = root.value if isinstance(root, yaml.MappingNode) else []
            values = [loader.construct_object(value, deep=True) for _, value in entries]
        except OSError as error:
            self._fail(f"--config {path}: {error.strerror or error}. Give the path of a YAML file.")
        except yaml.YAMLError as error:
            self._fail(f"--config {path} is not valid YAML: {error}")
        if root is not None and not isinstance(root, yaml.MappingNode):
            self._fail(f"--config {path} must hold `flag: value` lines, it holds a {root.id}.")
        tokens: list[str] = []
        origins: list[str] = []
        for (key_node, _), value in zip(entries, values, strict=True):
            key, origin = key_node.value, f"{path}:{key_node.start_mark.line + 1}: "
            if key == "config":
                self._fail(f"{origin}a --config file cannot name another one; put all flags into one file.")
            if value is None:
                continue
            action = self.parser._option_string_actions.get(f"--{key}")
            if isinstance(value, list) and action is not None and action.nargs == "+":
                parts = [f"--{key}", *map(_as_token, value)]
            else:
                # With "=", for a value may begin with a dash.
                parts = [f"--{key}={_as_token(value)}"]
            tokens += parts
            origins += [origin] * len(parts)
        return tokens, origins

    def _fail(self, message: str) -> NoReturn:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"error: {message}\n  all flags: python {self.parser.prog} --help", file=sys.stderr)
        sys.exit(2)


def parse_args(
    *classes: type,
    description: str | None = None,
    unused: Mapping[str, str] | None = None,
    argv: Sequence[str] | None = None,
) -> tuple[Any, ...]:
    """Parse the command line into one instance of each dataclass.

    Args:
        classes: dataclasses; field metadata may hold `help`, `choices`, `aliases`.
        description: shown by `--help`.
        unused: fields that have no effect in this program, with what to do instead; refused if given.
        argv: arguments without the program's name; the command line by default.

    Raises:
        SystemExit: code 2 after a message that names every unknown, unused or doubled flag.
    """
    return StrictParser(*classes, description=description, unused=unused).parse(sys.argv[1:] if argv is None else argv)


def _as_token(value: Any) -> str:
    if isinstance(value, dict):
        import json

        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value)
