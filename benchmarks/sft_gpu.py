"""Supervised fine-tuning on a GPU: padded, grouped and packed batches, Liger on and off, compared with TRL.

    python -m benchmarks.sft_gpu --data data/finetune/train.jsonl

Random weights in the shape of Qwen2.5-0.5B, bfloat16, LoRA of rank 8 on all linear layers, length 1,024. Rows of the
file are joined into multi-turn conversations of varying lengths up to the limit, so that padding costs what it costs in
practice. Each side trains on the same rows in its own process; the table shows tokens per second (without padding),
peak GPU memory, and the mean training loss. `--shape tiny` tries the script without a GPU.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.peers import ROOT, SEED, train_and_save
from benchmarks.sft_cpu import trl_trainer

SHAPES = {
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "vocab_size": 151_936}
    | {"num_attention_heads": 14, "num_key_value_heads": 2},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 8_000}
    | {"num_attention_heads": 4, "num_key_value_heads": 2},
}
OURS = {
    "padded": ["--train_sampling_strategy", "random"],
    "grouped": ["--train_sampling_strategy", "group_by_length"],
    "packed": ["--train_sampling_strategy", "random", "--packing", "True"],
}


def main() -> None:
    """Measure every side and print the table."""
    args = parse_args()
    if args.child:
        import torch

        out = args.work / "trl"
        train_and_save(trl_trainer(args.work, out, args.length, args.batch, logging_steps=10), out)
        (out / "peak.json").write_text(json.dumps(torch.cuda.max_memory_allocated() / 1e9))
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        prepare(work, args)
        print("\n| | tokens/s | peak GB | loss |\n|---|---|---|---|")
        for name, flags in OURS.items():
            for liger in ("False", "True") if args.shape != "tiny" else ("False",):
                out = work / f"{name}-{liger}"
                # Packed blocks hold several rows, so a batch of them holds about as many tokens in fewer rows.
                batch = max(1, args.batch // 2) if name == "packed" else args.batch
                run(
                    *(ROOT / "supervised_finetuning.py", "--model_name_or_path", work / "base"),
                    *("--train_file_dir", work / "train", "--output_dir", out, "--model_max_length", args.length),
                    *("--per_device_train_batch_size", batch, "--num_train_epochs", 1, "--sample_prompts", 0),
                    *("--seed", SEED, "--use_liger_kernel", liger, *flags),
                )
                record = json.loads((out / "run.json").read_text(encoding="utf-8"))
                report(f"ours, {name}{', Liger' if liger == 'True' else ''}", out, record["peak_memory_gb"])
        run(
            "-m", "benchmarks.sft_gpu", "--child", "trl", "--work", work, "--length", args.length, "--batch", args.batch
        )
        report("TRL with its defaults", work / "trl", json.loads((work / "trl" / "peak.json").read_text()))


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--data", type=Path, default=ROOT / "data/finetune/train.jsonl", help="a file of chat rows")
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--conversations", type=int, default=1000)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--child", choices=["trl"], help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def prepare(work: Path, args: argparse.Namespace) -> None:
    """Write a base model and conversations of varying lengths to `work`."""
    from build_tiny_model import ROLES, train_tokenizer
    from medicalgpt.args import DataArguments
    from medicalgpt.data.encoding import encode_chat
    from medicalgpt.data.loading import load_data
    from medicalgpt.formats.conversion import to_messages
    from template import apply_template

    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM, set_seed

    set_seed(SEED)
    pairs = [row["messages"] for row in load_data(DataArguments(train_file_dir=str(args.data)), to_messages).train]
    pairs = [messages for messages in pairs if [message["role"] for message in messages] == ["user", "assistant"]]
    tokenizer = train_tokenizer(
        (text for m in pairs for text in (*ROLES, m[0]["content"], m[1]["content"])), 8000, 4096
    )
    apply_template(tokenizer, "qwen")
    config = Qwen2Config(
        **SHAPES[args.shape],
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype=torch.bfloat16,
    )
    model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(work / "base")
    tokenizer.save_pretrained(work / "base")
    draw = random.Random(SEED)
    (work / "train").mkdir()
    total = 0
    with open(work / "train" / "rows.jsonl", "w", encoding="utf-8") as file:
        for _ in range(args.conversations):
            wanted, messages, length = draw.uniform(0.1, 1.0) * args.length, [], 0
            while True:
                more = messages + draw.choice(pairs)
                (sample,) = encode_chat(tokenizer, {"messages": more, "tools": None})
                if len(sample.input_ids) > wanted and messages:
                    break
                messages, length = more, len(sample.input_ids)
            total += length
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    print(f"{model.num_parameters():,} parameters; {args.conversations} conversations, {total:,} tokens")


def run(*command: object) -> None:
    """Run a Python program; on failure, exit with the end of its output."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(done.stdout[-1000:] + done.stderr[-3000:])


def report(name: str, out: Path, peak_gb: float) -> None:
    """Print one line of the table from the files of a run."""
    history = json.loads((out / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    tokens = max(entry["num_tokens"] for entry in history if "num_tokens" in entry)
    end = next(entry for entry in history if "train_runtime" in entry)
    print(f"| {name} | {tokens / end['train_runtime']:,.0f} | {peak_gb:.2f} | {end['train_loss']:.4f} |", flush=True)


if __name__ == "__main__":
    main()
