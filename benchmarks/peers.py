"""What the comparisons with TRL share: the sides, the base model, training and measuring a side, and the tables.

A side is our program with some flags or TRL's trainer with some arguments, trained in its own process. TRL's
trainers recompute activations in the backward pass by default (`gradient_checkpointing=True`, Chen et al. 2016,
https://arxiv.org/abs/1604.06174), which saves memory and costs a second forward pass; ours keep them. So TRL is
measured twice: with its defaults, and with `gradient_checkpointing=False` like ours.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast, Trainer

ROOT = Path(__file__).resolve().parent.parent
LEARNING_RATE, RANK, ALPHA, SEED = 2e-4, 8, 16, 42
# Flags of our program, beyond those that must be the same on all sides.
OURS: dict[str, dict[str, str]] = {"ours": {}, "ours_random": {"train_sampling_strategy": "random"}}
# Arguments of TRL's trainer, beyond those that must be the same on all sides.
TRL: dict[str, dict[str, Any]] = {
    "trl": {},
    "trl_no_checkpointing": {"gradient_checkpointing": False},
    "trl_grouped": {"train_sampling_strategy": "group_by_length"},
    "trl_grouped_no_checkpointing": {"train_sampling_strategy": "group_by_length", "gradient_checkpointing": False},
}
# Allows for float32 sums in another order; a computation that really differs is further apart after a few steps.
LOSSES_APART = 1e-3

Result = dict[str, Any]
Results = dict[str, list[Result]]


def add_flags(parser: argparse.ArgumentParser, sides: Sequence[str]) -> None:
    """Add the flags that every comparison has; the hidden ones are for the process that trains with TRL."""
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--runs", type=int, default=1, help="repetitions; the table shows the fastest of each side")
    sides_help = f"separated by commas; default: all of {', '.join(sides)}"
    parser.add_argument("--sides", type=partial(parse_sides, known=sides), default=list(sides), help=sides_help)
    parser.add_argument("--output", type=Path, help="all runs as JSON")
    parser.add_argument("--child", choices=TRL, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)


def parse_sides(text: str, known: Sequence[str]) -> list[str]:
    """The value of `--sides`, without repetitions."""
    sides = list(dict.fromkeys(text.split(",")))
    if unknown := [side for side in sides if side not in known]:
        raise argparse.ArgumentTypeError(f"no such side: {', '.join(unknown)}; known are {', '.join(known)}")
    return sides


def build_base(
    texts: Iterable[str], folder: Path, eos_token: str | None = None
) -> tuple["PreTrainedTokenizerFast", "PreTrainedModel"]:
    """Save a Qwen3 with 5 million random weights and a tokenizer trained on `texts`, with the chatml template."""
    from build_tiny_model import build_model
    from medicalgpt.models.templating import stop_token_ids
    from template import apply_template

    tokenizer = train_tokenizer(texts)
    if eos_token:
        tokenizer.eos_token = eos_token
    stop = apply_template(tokenizer, "chatml")
    shape = {"hidden_size": 256, "intermediate_size": 768, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2}
    model = build_model(
        tokenizer,
        stop_token_ids(tokenizer, stop),
        argparse.Namespace(**shape, max_position_embeddings=2048, seed=SEED),
    )
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return tokenizer, model


def train_tokenizer(texts: Iterable[str]) -> "PreTrainedTokenizerFast":
    """A byte-level BPE of 8,000 tokens that merges Chinese characters into words, as those of real models do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=8000, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=special[0],
        pad_token=special[1],
        additional_special_tokens=special[2:],
        model_max_length=2048,
    )


def our_flags(side: str, out: Path, args: argparse.Namespace) -> list[str]:
    """Flags of our stage: those that must be the same on all sides, and those of this side."""
    equal = {
        "model_name_or_path": args.work / "base",
        "train_file_dir": args.work / "train",
        "output_dir": out,
        "model_max_length": args.length,
        "per_device_train_batch_size": args.batch,
        "num_train_epochs": 1,
        "learning_rate": LEARNING_RATE,
        "logging_steps": 1,
        "seed": SEED,
        "overwrite_cache": True,
    }
    return [word for name, value in (equal | OURS[side]).items() for word in (f"--{name}", str(value))]


def trl_arguments(out: Path, length: int, batch: int, **options: Any) -> dict[str, Any]:
    """Arguments of TRL's config: those that must be the same on all sides, and `options`; otherwise TRL's defaults."""
    import torch

    gpu = torch.cuda.is_available()
    equal = {
        "output_dir": str(out),
        "max_length": length,
        "per_device_train_batch_size": batch,
        "num_train_epochs": 1,
        "learning_rate": LEARNING_RATE,
        "logging_steps": 1,
        "seed": SEED,
        "bf16": gpu,
        "use_cpu": not gpu,
        "report_to": "none",
    }
    return equal | options


def train_and_save(trainer: "Trainer", out: Path) -> None:
    """Train with TRL; save the adapter, the log, and whether the trained model recomputed its activations."""
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    (out / "recomputes.json").write_text(json.dumps(trainer.model.is_gradient_checkpointing))


def command_for(side: str, out: Path, args: argparse.Namespace, ours: Sequence[str], trl: Sequence[str]) -> list[str]:
    """The arguments for Python that train one side.

    Args:
        side: one of `OURS` or `TRL`.
        out: the folder for the result.
        args: the command line, with `work`.
        ours: our stage script, and the flags that only this stage has.
        trl: the module that trains with TRL when `--child` is given, and the flags that only this module has.
    """
    if side in OURS:
        command = [ROOT / ours[0], *our_flags(side, out, args), *ours[1:]]
    else:
        command = ["-m", *trl, "--child", side, "--work", args.work, "--out", out]
        command += ["--length", args.length, "--batch", args.batch]
    return list(map(str, command))


def train(side: str, out: Path, command: Sequence[str]) -> Result:
    """Train one side in its own process, with the command from `command_for`.

    Returns:
        Seconds of the process, of its training loop, and of CPU time; its peak resident memory in GB; the loss of each
        step; whether the model recomputed its activations.
    """
    log = out.with_suffix(".log")
    began = time.perf_counter()
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=file,
            stderr=file,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            cwd=ROOT,
        )
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if status:
        sys.exit(log.read_text()[-3000:])
    history = log_history(out)
    return {
        "seconds": seconds,
        "training_seconds": next(entry["train_runtime"] for entry in history if "train_runtime" in entry),
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_gb": usage.ru_maxrss * 1024 / 1e9,
        "recomputes": recomputes(side, out),
        "losses": [entry["loss"] for entry in history if "loss" in entry],
    }


def log_history(out: Path) -> list[dict[str, Any]]:
    """What the trainer logged."""
    return json.loads((out / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]


def recomputes(side: str, out: Path) -> bool:
    """Whether the model recomputed its activations, as observed in training."""
    if side in TRL:
        return json.loads((out / "recomputes.json").read_text())
    observed = json.loads((out / "run.json").read_text(encoding="utf-8"))["observed"]
    return next(line["observed"] for line in observed if line["name"] == "checkpointing") != "off"


def compare(args: argparse.Namespace, measure: Callable[[str, Path, argparse.Namespace], Result]) -> Results:
    """Call `measure(side, out, args)` for all sides in turn, `--runs` times, and print a line for each."""
    results: Results = {side: [] for side in args.sides}
    for number in range(args.runs):
        for side, found in results.items():
            found.append(measure(side, args.work / f"{side}-{number}", args))
            numbers = {name: value for name, value in found[-1].items() if name != "losses"}
            print(json.dumps({"side": side, "run": number + 1, **numbers}), flush=True)
    return results


def describe_machine() -> dict[str, Any]:
    """Print and return the number of cores, the load before the runs, and versions."""
    versions = {name: version(name) for name in ("torch", "transformers", "trl", "peft")}
    found = {"cores": os.cpu_count(), "load_average": os.getloadavg()[0]}
    names = ", ".join(f"{name} {number}" for name, number in versions.items())
    print(f"{found['cores']} cores, load average {found['load_average']:.1f} before; {names}")
    return found | versions


def report(
    results: Results,
    args: argparse.Namespace,
    before: dict[str, Any],
    columns: dict[str, Callable[[Result], str]],
) -> None:
    """Print the fastest run of each side and the time of TRL relative to ours; write all runs to `--output`.

    Args:
        results: from `compare`.
        args: the command line.
        before: from `describe_machine`.
        columns: further columns of the table, by their titles.
    """
    fastest = {side: min(found, key=lambda result: result["seconds"]) for side, found in results.items()}
    titles = ["", "recomputes", "seconds", "in training", "CPU time", "peak GB", "first and last loss", *columns]
    rows = []
    for side, best in fastest.items():
        seconds = [f"{best[name]:.1f}" for name in ("seconds", "training_seconds", "cpu_seconds")]
        losses = f"{best['losses'][0]:.4f}, {best['losses'][-1]:.4f}"
        more = [text(best) for text in columns.values()]
        rows.append([side, "yes" if best["recomputes"] else "no", *seconds, f"{best['peak_gb']:.2f}", losses, *more])
    print_table(titles, rows)

    ours = [side for side in fastest if side in OURS]
    ratios = {
        side: {our: {name: best[name] / fastest[our][name] for name in ("seconds", "training_seconds")} for our in ours}
        for side, best in fastest.items()
        if side in TRL
    }
    if ours and ratios:
        cell = "{seconds:.2f} ({training_seconds:.2f} in training)".format_map
        print_table(
            ["time relative to", *ours],
            [[side, *(cell(ratio) for ratio in row.values())] for side, row in ratios.items()],
        )
    if args.output:
        settings = {
            name: value if isinstance(value, int | list) else str(value)
            for name, value in vars(args).items()
            if name not in ("child", "work", "out", "output")
        }
        found = {"settings": settings, "machine": before, "runs": results, "time_relative_to_ours": ratios}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def print_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table in Markdown."""
    head, *lines = ("|" + "".join(f" {cell} |" if cell else " |" for cell in row) for row in (titles, *rows))
    print("", head, "|" + "---|" * len(titles), *lines, sep="\n", flush=True)


def check_losses(results: Results, sides: Sequence[str]) -> None:
    """Exit unless the first runs of these sides have the same loss in each step, up to rounding."""
    present = [side for side in sides if side in results]
    for side in present[1:]:
        first, second = (results[name][0]["losses"] for name in (present[0], side))
        apart = max(abs(a - b) for a, b in zip(first, second, strict=True))
        print(f"losses of {present[0]} and {side}: {len(first)} steps, at most {apart:.1e} apart")
        if not apart < LOSSES_APART:
            sys.exit(f"the losses differ by more than {LOSSES_APART}: the two did not train the same thing")
