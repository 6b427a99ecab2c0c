"""Training steps on a CPU: a mixture of experts, compared with a dense model of the same active size.

    python -m benchmarks.moe_cpu
    python -m benchmarks.moe_cpu --pairs 5 --length 128 --output outputs/moe-cpu.json

Both are a Qwen3 with random weights (hidden size 256, 4 layers, vocabulary of 8,000). The feed-forward layers of the
dense one are 768 wide; the other has 8 experts of width 384, of which each token takes 2, so that as many weights take
part in a token's result. What is trained:

- `all`: LoRA on all linear layers, and on the experts;
- `attention`: LoRA on attention only;
- `full`: all weights.

Models and adapters are made as the stages make them. Forward, backward and optimizer step on one batch of random ids
are timed in pairs, a step of the dense model and then one of the mixture. CPU time of the process is compared, which
does not count waiting for a machine that is not idle; the ratio is the median over the pairs.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import peers
from benchmarks.peers import ALPHA, LEARNING_RATE, RANK, SEED

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

VOCABULARY = 8000
SHAPE = {
    **{"vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "head_dim": 64},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048},
    **{"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0, "tie_word_embeddings": True},
}
EXPERTS, ACTIVE, EXPERT_WIDTH = 8, 2, 384
KINDS = {
    "dense": ("qwen3", {}),
    "moe": (
        "qwen3_moe",
        {"num_experts": EXPERTS, "num_experts_per_tok": ACTIVE, "moe_intermediate_size": EXPERT_WIDTH},
    ),
}
TRAINED = {"all": "all", "attention": "q_proj,k_proj,v_proj,o_proj", "full": None}


def main() -> None:
    """Time the pairs, print a line for each kind of training, and the table."""
    args = parse_args()
    machine = peers.describe_machine()
    results = {}
    with tempfile.TemporaryDirectory() as work:
        for kind in KINDS:
            save_base(kind, Path(work, kind))
        for trained in TRAINED:
            results[trained] = measure(trained, Path(work), args)
            print(json.dumps({"trained": trained, **results[trained]}), flush=True)
    rows = []
    for trained, found in results.items():
        dense, sparse = (found[f"{kind}_cpu_seconds"] for kind in KINDS)
        ratio = statistics.median(two / one for one, two in zip(dense, sparse, strict=True))
        rows.append([trained, f"{statistics.median(dense):.2f}", f"{statistics.median(sparse):.2f}", f"{ratio:.2f}"])
    peers.print_table(["", "dense, CPU seconds per step", "mixture", "ratio within a pair"], rows)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n", encoding="utf-8")


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--pairs", type=int, default=15, help="steps of each model, after one that is not counted")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--output", type=Path, help="all steps as JSON")
    return parser.parse_args()


def save_base(kind: str, folder: Path) -> None:
    """Write a base model, and print its size."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, more = KINDS[kind]
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SHAPE, **more}))
    model.save_pretrained(folder)
    print(f"{kind}: {model.num_parameters():,} parameters, {active_parameters(model):,} of them active")


def active_parameters(model: "PreTrainedModel") -> int:
    """Parameters that take part in the result of a token: of the experts, those that it takes."""
    return sum(each.numel() * ACTIVE // EXPERTS if each.ndim == 3 else each.numel() for each in model.parameters())


def measure(trained: str, work: Path, args: argparse.Namespace) -> dict[str, list[float]]:
    """CPU seconds and losses of each counted step, by the kind of model."""
    import torch

    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(VOCABULARY, (args.batch, args.length), generator=generator)
    steps = {kind: make_step(trained, work / kind, ids) for kind in KINDS}
    found: dict[str, list[float]] = {f"{kind}_{what}": [] for kind in KINDS for what in ("cpu_seconds", "losses")}
    for number in range(args.pairs + 1):
        for kind, step in steps.items():
            began = time.process_time()
            loss = step()
            if number:
                found[f"{kind}_cpu_seconds"].append(time.process_time() - began)
                found[f"{kind}_losses"].append(loss)
    return found


def make_step(trained: str, base: Path, ids: "Tensor") -> Callable[[], float]:
    """A function that trains one step, and returns the loss before it."""
    from medicalgpt.args import LoraArguments
    from medicalgpt.models.adapters import add_lora
    from medicalgpt.models.loading import load_model

    import torch
    from peft import TaskType
    from transformers import AutoModelForCausalLM

    targets = TRAINED[trained]
    model = load_model(AutoModelForCausalLM, str(base), full_training=targets is None)
    lora = LoraArguments(use_peft=False) if targets is None else None
    lora = lora or LoraArguments(lora_rank=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=targets)
    model = add_lora(model, lora, TaskType.CAUSAL_LM).train()
    optimizer = torch.optim.AdamW(
        (parameter for parameter in model.parameters() if parameter.requires_grad), lr=LEARNING_RATE
    )

    def step() -> float:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


if __name__ == "__main__":
    main()
