"""Reinforcement learning on a GPU: PPO and GRPO steps with LoRA and QLoRA; generation and learning timed separately.

    python -m benchmarks.rl_gpu --shape 0.5b
    python -m benchmarks.rl_gpu --shape 0.5b --ways grpo,grpo_qlora --batch 32 --answer_length 512

Random weights in the shape of Qwen2.5-0.5B, bfloat16, adapters of rank 8 on all linear layers; PPO's reward model, from
which its critic is initialized too, is a random Qwen3 of the same shape. Each way runs its stage script in its own
process, with the script's defaults for everything that has no flag here; the first step is not counted. Random weights
hardly ever end an answer, so nearly all answers have `--answer_length` tokens.

- Generating: tokens of the answers, and the seconds it takes to generate them.
- Learning: tokens of prompts and answers without padding, counted once for each pass over them (PPO makes four, through
  the policy and the critic), and the seconds from the scored answers to the end of the step. GRPO's rewards are 0 for
  all of these answers; the amount of computation is the same as for any others.
- The rest of a step: rewards, and for PPO the log-probabilities, values and reference before the updates.

Peak memory is that of the GPU. The line below the table gives date, hardware, versions and command. `--shape tiny`
tries the script without a GPU. It has not run on a GPU yet.
"""

import argparse
import functools
import importlib
import importlib.util
import itertools
import json
import os
import shlex
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.peers import ROOT, SEED
from benchmarks.sft_gpu import SHAPES, run

PROGRAMS = {"ppo": "ppo_training.py", "grpo": "grpo_training.py"}
QLORA = ("--load_in_4bit", "True", "--qlora", "True")
WAYS: dict[str, tuple[str, ...]] = {"ppo": (), "ppo_qlora": QLORA, "grpo": (), "grpo_qlora": QLORA}
LIBRARIES = ("python", "torch", "transformers", "trl", "peft", "bitsandbytes")


def main() -> None:
    """Measure every way and print the table."""
    args = parse_args()
    if args.child:
        run_stage(args.child, args.work, args.flags)
        return
    ways = args.ways.split(",")
    if importlib.util.find_spec("bitsandbytes") is None and (without := [way for way in ways if WAYS[way] == QLORA]):
        print(f"skipped, because bitsandbytes is not installed: {', '.join(without)}")
        ways = [way for way in ways if way not in without]
    record: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        prepare(work, args)
        print(
            "\n| | tokens/s generating | tokens/s learning | seconds per step | generating | learning | the rest "
            "| peak GB |\n|---|---|---|---|---|---|---|---|"
        )
        for way in ways:
            stage, out = way.partition("_")[0], work / way
            run(
                *("-m", "benchmarks.rl_gpu", "--child", stage, "--work", out, "--"),
                *stage_flags(stage, work, args),
                *("--output_dir", out),
                *WAYS[way],
            )
            record = json.loads((out / "run.json").read_text(encoding="utf-8"))
            report(way, json.loads((out / "steps.json").read_text())[1:], record["peak_memory_gb"])
    if record:
        print(f"\n{circumstances(record)}")


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--data", type=Path, default=ROOT / "data/grpo/train.jsonl", help="a file of questions")
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--steps", type=int, default=5, help="number of measured steps, after one that is not")
    parser.add_argument("--length", type=int, default=1024, help="maximum number of tokens of a prompt with its answer")
    parser.add_argument("--answer_length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16, help="a quarter of the answers of a step; an even number")
    parser.add_argument("--ways", default=",".join(WAYS), help=f"separated by commas: {', '.join(WAYS)}")
    parser.add_argument("--child", choices=PROGRAMS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("flags", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.ways.split(",")) - WAYS.keys():
        parser.error(f"--ways {','.join(sorted(unknown))}: no such way; known are {', '.join(WAYS)}")
    if args.flags and not args.child:
        parser.error(f"unknown flag {args.flags[0]}")
    if args.steps < 1:
        parser.error(f"--steps {args.steps} must be at least 1")
    return args


def stage_flags(stage: str, work: Path, args: argparse.Namespace) -> tuple[object, ...]:
    """The flags of a stage script; both stages generate four times `--batch` answers in a step."""
    return (
        *("--model_name_or_path", work / "base", "--train_file_dir", args.data, "--max_steps", args.steps + 1),
        *("--model_max_length", args.length, "--max_completion_length", args.answer_length, "--seed", SEED),
        *("--per_device_train_batch_size", args.batch, "--logging_steps", 1, "--sample_prompts", 0),
        *("--save_strategy", "no"),
        *(("--reward_model_path", work / "rm") if stage == "ppo" else ()),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Models with random weights
# ---------------------------------------------------------------------------------------------------------------------


def prepare(work: Path, args: argparse.Namespace) -> None:
    """Write to `work` a base model and a reward model with random weights, and a tokenizer with as many tokens."""
    from build_tiny_model import ROLES, train_tokenizer
    from medicalgpt.args import DataArguments
    from medicalgpt.data.loading import load_data
    from medicalgpt.formats.tasks import to_task
    from template import apply_template

    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForSequenceClassification, set_seed

    set_seed(SEED)
    rows = load_data(DataArguments(train_file_dir=str(args.data)), to_task).train
    texts = (message["content"] for row in rows for message in row["messages"])
    shape = SHAPES[args.shape]
    tokenizer = train_tokenizer((text for content in texts for text in (*ROLES, content)), 4000, 4096)
    apply_template(tokenizer, "qwen")
    shared = {
        **shape,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    for name, kind, config in (
        ("base", Qwen2ForCausalLM, Qwen2Config(**shared)),
        (
            "rm",
            Qwen3ForSequenceClassification,
            Qwen3Config(**shared, head_dim=shape["hidden_size"] // shape["num_attention_heads"], num_labels=1),
        ),
    ):
        model = kind(config).to(torch.bfloat16)
        model.save_pretrained(work / name)
        tokenizer.save_pretrained(work / name)
        fill_up(work / name / "tokenizer.json", shape["vocab_size"])
        print(f"{name}: {model.num_parameters():,} parameters")


def fill_up(file: Path, size: int) -> None:
    """Fill up a saved tokenizer to `size` tokens with short words.

    A model with random weights samples any token. One without text would vanish from the answer, and the reward model
    would read less than the policy generated.
    """
    saved = json.loads(file.read_text(encoding="utf-8"))
    vocabulary, trained = saved["model"]["vocab"], saved["model"]["merges"]
    merges = []
    for length in itertools.count(1):
        for *letters, last in itertools.product(string.ascii_lowercase, repeat=length):
            if len(vocabulary) >= size:
                # Before the trained ones, which would split the words otherwise.
                saved["model"]["merges"] = list(dict.fromkeys([*merges, *map(tuple, trained)]))
                file.write_text(json.dumps(saved, ensure_ascii=False), encoding="utf-8")
                return
            beginning = "Ġ" + "".join(letters)
            vocabulary.setdefault(beginning + last, len(vocabulary))
            merges.append((beginning, last))


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


def run_stage(stage: str, out: Path, flags: list[str]) -> None:
    """Run a stage script in this process, and write the time of each of its steps to `out`/steps.json."""
    from medicalgpt.errors import run_main

    sys.argv = [PROGRAMS[stage], *flags]
    program = importlib.import_module(Path(PROGRAMS[stage]).stem)
    steps = time_steps(stage)
    run_main(program.main)
    (out / "steps.json").write_text(json.dumps(steps))


def time_steps(stage: str) -> list[dict[str, float]]:
    """Record the steps of a stage script from now on; returns the list to which they are added.

    A step has its `seconds`, of which `generating` and `learning` are parts, and its tokens, `written` and `learned`.
    """
    from medicalgpt.serving.chat import ChatEngine

    from transformers.trainer_callback import CallbackHandler
    from trl import GRPOTrainer

    steps: list[dict[str, float]] = []
    step: dict[str, float] = {}

    def generated(began: float, ended: float, found: Any, _: Any) -> None:
        answers = [answer.token_ids for answer in found] if stage == "ppo" else found[0]
        step["generating"] = step.get("generating", 0.0) + ended - began
        step["written"] = step.get("written", 0) + sum(map(len, answers))

    def collected(began: float, ended: float, found: Any, trainer: Any) -> None:
        if stage == "ppo":
            learned = int(found[0].attention_mask.sum()) * trainer.args.num_ppo_epochs
        else:
            learned = sum(int(batch[mask].sum()) for batch in found[0] for mask in ("prompt_mask", "completion_mask"))
        step.update(began=began, collected=ended, learned=learned)

    def finished(end: float, *_: Any) -> None:
        began, learning = step.pop("began"), end - step.pop("collected")
        steps.append({**step, "seconds": end - began, "learning": learning})
        step.clear()

    if stage == "ppo":
        from ppo_training import PpoTrainer

        watch(ChatEngine, "batch", generated)
        watch(PpoTrainer, "roll_out", collected)
    else:
        from grpo_training import GroupTrainer

        watch(GRPOTrainer, "_generate_single_turn", generated)
        watch(GroupTrainer, "get_batch_samples", collected)
    watch(CallbackHandler, "on_step_end", finished)
    return steps


def watch(owner: type, name: str, note: Callable[[float, float, Any, Any], None]) -> None:
    """Have `note` called after each call of a method, with its start, its end, its result and its object."""
    import torch

    method = getattr(owner, name)

    def now() -> float:
        if torch.cuda.is_available():
            # CUDA calls return before the GPU has done the work.
            torch.cuda.synchronize()
        return time.perf_counter()

    @functools.wraps(method)
    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        began = now()
        found = method(self, *args, **kwargs)
        note(began, now(), found, self)
        return found

    setattr(owner, name, watched)


def report(way: str, steps: list[dict[str, float]], peak_gb: float) -> None:
    """Print one line of the table: totals over the steps, and means per step."""
    total = {name: sum(step[name] for step in steps) for name in steps[0]}
    seconds, generating, learning = (total[name] / len(steps) for name in ("seconds", "generating", "learning"))
    print(
        f"| {way} | {total['written'] / total['generating']:,.0f} | {total['learned'] / total['learning']:,.0f} | "
        f"{seconds:.2f} | {generating:.2f} | {learning:.2f} | {seconds - generating - learning:.2f} | {peak_gb:.2f} |",
        flush=True,
    )


def circumstances(record: dict[str, Any]) -> str:
    """Date, hardware, versions, commit and command, in one line.

    Args:
        record: run.json of one of the runs.
    """
    import torch

    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        hardware = f"{gpu.name} ({gpu.total_memory / 1e9:.0f} GB), CUDA {torch.version.cuda}"
    else:
        hardware = f"no GPU ({os.cpu_count()} CPU cores: this only shows that the script runs)"
    versions = ", ".join(f"{name} {record['versions'][name]}" for name in LIBRARIES if record["versions"].get(name))
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude", "*"], cwd=ROOT, capture_output=True, text=True
    )
    command = shlex.join(["python", "-m", "benchmarks.rl_gpu", *sys.argv[1:]])
    commit = described.stdout.strip() or "unknown"
    return f"{record['started'][:10]}, {hardware}, {versions}, commit {commit}: `{command}`"


if __name__ == "__main__":
    main()
