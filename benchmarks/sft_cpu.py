"""Supervised fine-tuning on a CPU: supervised_finetuning.py by its default flags beside TRL's SFTTrainer as it comes.

    python -m benchmarks.sft_cpu --data data/finetune/train.jsonl --rows 1000

A Qwen3 of 5.2 million random weights (hidden 256, intermediate 768, 4 layers, 4 heads, 2 key-value heads, vocabulary
8,000), LoRA of rank 8 on all linear layers, one epoch in float32. Both sides train on the same rows, rendered by the
same template, with the same batch size, rate and seed, one after the other, each in a process of its own. The table
shows seconds of the whole process and of its training loop, its peak memory, the supervised tokens it has seen, and the
loss afterwards on the same held-out rows, measured the same way.

TRL as it comes means: its own defaults, but for what has to be equal (rows, length, batch, rate, seed, adapter, answers
only) and `use_cpu`; `trl_grouped` adds `train_sampling_strategy="group_by_length"`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SIDES = ("ours", "trl", "trl_grouped")
RATE, RANK, ALPHA, DROPOUT, SEED = 2e-4, 8, 16, 0.05, 42
HELD_OUT = 50


def main() -> None:
    """Measure the sides `--runs` times in turn and print a line for each."""
    args = parse_args()
    if args.child:
        options = {"train_sampling_strategy": "group_by_length"} if args.child == "trl_grouped" else {}
        train_with_trl(args.work, args.work / args.child, args.length, args.batch, **options)
        return
    with tempfile.TemporaryDirectory() as work:
        prepare(Path(work), args)
        results = {side: [] for side in args.sides.split(",")}
        for number in range(args.runs):
            for side, found in results.items():
                found.append(measure(side, Path(work), number, args))
                print(json.dumps({"side": side, "run": number + 1, **found[-1]}), flush=True)
    print("\n| | seconds | in training | peak GB | supervised tokens | held-out loss |\n|---|---|---|---|---|---|")
    for side, found in results.items():
        best = min(found, key=lambda result: result["seconds"])
        print(
            f"| {side} | {best['seconds']:.0f} | {best['training_seconds']:.0f} | {best['peak_gb']:.2f} | "
            f"{best['supervised_tokens']:,} | {best['held_out_loss']:.4f} |"
        )
    if "ours" in results:
        ours = min(result["seconds"] for result in results["ours"])
        for side in results.keys() - {"ours"}:
            theirs = min(result["seconds"] for result in results[side])
            print(f"{side} takes {theirs / ours:.2f} times as long as ours")


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--data", type=Path, default=ROOT / "data/finetune/train.jsonl", help="a file of chat rows")
    parser.add_argument("--rows", type=int, default=1000, help="rows to use, the held-out ones included")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--runs", type=int, default=1, help="repetitions; the table shows the fastest of each side")
    parser.add_argument("--sides", default="ours,trl", help=f"with commas: {', '.join(SIDES)}")
    parser.add_argument("--child", choices=SIDES[1:], help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def prepare(work: Path, args: argparse.Namespace) -> None:
    """Leave the base model and the rows that fit into `--length` in `work`."""
    from build_tiny_model import build_model
    from medicalgpt.args import DataArguments
    from medicalgpt.data.encoding import EncodingError, encode_chat
    from medicalgpt.data.formats import to_messages
    from medicalgpt.data.loading import load_data
    from medicalgpt.models.templating import stop_token_ids
    from template import apply_template

    data = load_data(DataArguments(train_file_dir=str(args.data), max_train_samples=args.rows), to_messages)
    rows = [{"messages": row["messages"], "tools": row["tools"]} for row in data.train]
    tokenizer = train_tokenizer(message["content"] for row in rows for message in row["messages"])
    stop = apply_template(tokenizer, "chatml")
    shape = {"hidden_size": 256, "intermediate_size": 768, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2}
    model = build_model(
        tokenizer,
        stop_token_ids(tokenizer, stop),
        argparse.Namespace(**shape, max_position_embeddings=2048, seed=SEED),
    )
    model.save_pretrained(work / "base")
    tokenizer.save_pretrained(work / "base")

    fitting, tokens = [], 0
    for row in rows:
        try:
            tokens += sum(len(sample.input_ids) for sample in encode_chat(tokenizer, row, max_length=args.length))
            fitting.append(row)
        except EncodingError:
            continue
    for name, part in (("train", fitting[:-HELD_OUT]), ("held_out", fitting[-HELD_OUT:])):
        (work / name).mkdir()
        lines = [json.dumps({"messages": row["messages"]}, ensure_ascii=False) + "\n" for row in part]
        (work / name / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    print(
        f"{model.num_parameters():,} parameters, vocabulary {len(tokenizer):,}; {len(fitting)} of {len(rows)} rows fit "
        f"into {args.length} tokens, {HELD_OUT} of them held out; {tokens:,} tokens; {os.cpu_count()} cores"
    )


def train_tokenizer(texts: Iterable[str]) -> Any:
    """A byte-level BPE of 8,000 tokens, as those of real models: it merges Chinese characters to words."""
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


def measure(side: str, work: Path, number: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train one side in a process of its own; seconds and peak memory are those that the system counted for it."""
    out = work / f"{side}-{number}"
    if side == "ours":
        command = [
            *(ROOT / "supervised_finetuning.py", "--model_name_or_path", work / "base"),
            *("--train_file_dir", work / "train", "--output_dir", out, "--model_max_length", args.length),
            *("--per_device_train_batch_size", args.batch, "--num_train_epochs", 1, "--sample_prompts", 0),
            *("--seed", SEED, "--overwrite_cache", True),
        ]
    else:
        command = [
            "-m",
            "benchmarks.sft_cpu",
            "--child",
            side,
            "--work",
            work,
            "--length",
            args.length,
            "--batch",
            args.batch,
        ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    began = time.perf_counter()
    with open(work / f"{side}-{number}.log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)], stdout=log, stderr=log, env=environment, cwd=ROOT
        )
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if status:
        sys.exit((work / f"{side}-{number}.log").read_text()[-3000:])
    out = out if side == "ours" else work / side
    state = json.loads((out / "trainer_state.json").read_text())
    return {
        "seconds": seconds,
        "training_seconds": next(entry["train_runtime"] for entry in state["log_history"] if "train_runtime" in entry),
        "peak_gb": usage.ru_maxrss * 1024 / 1e9,
        **check_result(work, out),
    }


def train_with_trl(work: Path, out: Path, length: int, batch: int, **options: Any) -> None:
    """What a user of TRL writes for the same task."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    gpu = torch.cuda.is_available()
    trainer = SFTTrainer(
        model=str(work / "base"),
        args=SFTConfig(
            output_dir=str(out),
            max_length=length,
            per_device_train_batch_size=batch,
            num_train_epochs=1,
            learning_rate=RATE,
            seed=SEED,
            assistant_only_loss=True,
            bf16=gpu,
            use_cpu=not gpu,
            report_to="none",
            **options,
        ),
        train_dataset=load_dataset("json", data_files=str(work / "train" / "rows.jsonl"), split="train"),
        peft_config=LoraConfig(
            r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    trainer.train()
    trainer.save_model()
    trainer.save_state()


def check_result(work: Path, adapter: Path) -> dict[str, float]:
    """Supervised tokens of the training rows by the tokenizer that was saved, and the loss on the held-out rows."""
    from medicalgpt.data.encoding import IGNORED, encode_chat

    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(adapter)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(work / "base"), adapter).eval()

    def samples(part: str) -> list:
        lines = (work / part / "rows.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [{"messages": json.loads(line)["messages"], "tools": None} for line in lines]
        return [sample for row in rows for sample in encode_chat(tokenizer, row)]

    supervised = sum(label != IGNORED for sample in samples("train") for label in sample.labels)
    total = count = 0
    for sample in samples("held_out"):
        ids, labels = torch.tensor([sample.input_ids]), torch.tensor([sample.labels])
        here = (labels[:, 1:] != IGNORED).sum().item()
        with torch.no_grad():
            total += model(input_ids=ids, labels=labels).loss.item() * here
        count += here
    return {"supervised_tokens": supervised, "held_out_loss": total / count}


if __name__ == "__main__":
    main()
