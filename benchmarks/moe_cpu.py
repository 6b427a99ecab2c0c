"""Supervised fine-tuning on a CPU: a mixture of experts, compared with a dense model of the same active size.

    python -m benchmarks.moe_cpu --runs 3
    python -m benchmarks.moe_cpu --sides dense,moe --steps 20 --output outputs/moe-cpu.json

Both are a Qwen3 with random weights (hidden size 256, 4 layers, vocabulary of 8,000). The feed-forward layers of the
dense one are 768 wide; the other has 8 experts of width 384, of which each token takes 2, so as many weights take part
in a token's result. Both train `--steps` steps on the same rows with supervised_finetuning.py and its defaults:

- `dense`, `moe`: LoRA on all linear layers, and on the experts;
- `dense_attention`, `moe_attention`: LoRA on attention only;
- `dense_full`, `moe_full`: all weights.

The sides of a run are trained one after the other, each in its own process. The table shows the median of each, and the
median of the ratios within a run, which a machine that is not idle distorts less. CPU time does not count waiting.
"""

import argparse
import json
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import peers
from benchmarks.peers import RANK, ROOT, SEED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = ("--target_modules", "q_proj,k_proj,v_proj,o_proj")
FULL = ("--use_peft", "False")
SIDES = {
    "dense": (),
    "moe": (),
    "dense_attention": ATTENTION,
    "moe_attention": ATTENTION,
    "dense_full": FULL,
    "moe_full": FULL,
}
EXPERTS, ACTIVE, EXPERT_WIDTH = 8, 2, 384
FIGURES = {"training_seconds": "in training", "cpu_seconds": "CPU time", "peak_gb": "peak GB"}


def main() -> None:
    """Measure the sides `--runs` times in turn, print a line for each, and compare."""
    args = parse_args()
    before = peers.describe_machine()
    with tempfile.TemporaryDirectory() as work:
        args.work = Path(work)
        prepare(args)
        results = peers.compare(args, measure)
    report(results)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({"machine": before, "runs": results}, indent=1) + "\n", encoding="utf-8")


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--data", type=Path, default=ROOT / "data/finetune/train.jsonl", help="a file of chat rows")
    parser.add_argument("--rows", type=int, default=200, help="rows to use")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--runs", type=int, default=1, help="repetitions; the table shows medians")
    sides_help = f"separated by commas; default: all of {', '.join(SIDES)}"
    parser.add_argument(
        "--sides", type=partial(peers.parse_sides, known=list(SIDES)), default=list(SIDES), help=sides_help
    )
    parser.add_argument("--output", type=Path, help="all runs as JSON")
    return parser.parse_args()


def prepare(args: argparse.Namespace) -> None:
    """Write both base models and the rows to `args.work`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    rows = args.data.read_text(encoding="utf-8").splitlines()[: args.rows]
    (args.work / "train").mkdir()
    (args.work / "train" / "rows.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    tokenizer, dense = peers.build_base(rows, args.work / "dense")
    shape = dense.config.to_dict() | {"model_type": "qwen3_moe", "architectures": None, "mlp_only_layers": []}
    shape |= {"num_experts": EXPERTS, "num_experts_per_tok": ACTIVE, "moe_intermediate_size": EXPERT_WIDTH}
    torch.manual_seed(SEED)
    sparse = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape))
    sparse.generation_config = dense.generation_config
    sparse.save_pretrained(args.work / "moe")
    tokenizer.save_pretrained(args.work / "moe")
    for name, model in (("dense", dense), ("moe", sparse)):
        print(f"{name}: {model.num_parameters():,} parameters, {active(model):,} of them active")


def active(model: "PreTrainedModel") -> int:
    """Parameters that take part in the result of a token."""
    return sum(each.numel() * ACTIVE // EXPERTS if each.ndim == 3 else each.numel() for each in model.parameters())


def measure(side: str, out: Path, args: argparse.Namespace) -> peers.Result:
    """Train one side."""
    flags = {
        "model_name_or_path": args.work / side.partition("_")[0],
        "train_file_dir": args.work / "train",
        "output_dir": out,
        "model_max_length": args.length,
        "skip_long_rows": True,
        "per_device_train_batch_size": args.batch,
        "max_steps": args.steps,
        "logging_steps": 1,
        "seed": SEED,
        "sample_prompts": 0,
        "save_strategy": "no",
        "overwrite_cache": True,
    }
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    if SIDES[side] is not FULL:
        words += ["--lora_rank", str(RANK)]
    return peers.train("ours", out, [str(ROOT / "supervised_finetuning.py"), *words, *SIDES[side]])


def report(results: peers.Results) -> None:
    """Print the medians of each side, and of the ratios of its mixture to its dense model within a run."""
    rows = [
        [side, *(f"{statistics.median(run[name] for run in runs):.2f}" for name in FIGURES)]
        for side, runs in results.items()
    ]
    peers.print_table(["", *FIGURES.values()], rows)
    ratios = []
    for side in results:
        sparse = side.replace("dense", "moe")
        if side.startswith("dense") and sparse in results:
            pairs = list(zip(results[side], results[sparse], strict=True))
            ratios.append(
                [
                    f"{sparse} / {side}",
                    *(f"{statistics.median(two[name] / one[name] for one, two in pairs):.2f}" for name in FIGURES),
                ]
            )
    if ratios:
        peers.print_table(["", *FIGURES.values()], ratios)


if __name__ == "__main__":
    main()
