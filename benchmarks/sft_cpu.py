"""Supervised fine-tuning on a CPU: supervised_finetuning.py with its defaults, compared with TRL's SFTTrainer.

    python -m benchmarks.sft_cpu --data data/finetune/train.jsonl --rows 1000
    python -m benchmarks.sft_cpu --data data/finetune/train.jsonl --sides ours,trl --output outputs/sft-cpu.json

A Qwen3 with 5.2 million random weights (hidden size 256, intermediate size 768, 4 layers, 4 heads, 2 key-value heads,
vocabulary of 8,000), LoRA of rank 8 on all linear layers, one epoch in float32. All sides train on the same rows,
rendered with the same template, with the same batch size, learning rate and seed, one after the other, each in its own
process. The table shows seconds of the whole process, of its training loop and of CPU time, peak memory, the losses of
the first and the last step, the number of supervised tokens, and the loss afterwards on the same held-out rows,
measured the same way.

`ours` groups rows by length, the default; `ours_random` takes them in random order, TRL's default. `trl` is TRL with
its defaults, except for what must be the same on all sides (rows, length, batch size, learning rate, seed, adapter,
loss on answers only), the log and `use_cpu`. TRL recomputes activations by default and ours do not:
`trl_no_checkpointing` turns that off. `trl_grouped` and `trl_grouped_no_checkpointing` group by length too. The
comparable pairs are `ours_random` and `trl_no_checkpointing`, and `ours` and `trl_grouped_no_checkpointing`. The script
fails unless all sides in random order have the same loss in each step, and TRL's two grouped sides as well; ours forms
different groups.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import peers
from benchmarks.peers import ALPHA, RANK, ROOT, TRL

if TYPE_CHECKING:
    from trl import SFTTrainer

SIDES = (*peers.OURS, *TRL)
DROPOUT = 0.05


def main() -> None:
    """Measure the sides `--runs` times in turn, print a line for each, and compare."""
    args = parse_args()
    if args.child:
        trainer = trl_trainer(args.work, args.out, args.length, args.batch, **TRL[args.child])
        peers.train_and_save(trainer, args.out)
        return
    before = peers.describe_machine()
    with tempfile.TemporaryDirectory() as work:
        args.work = Path(work)
        prepare(args)
        results = peers.compare(args, measure)
    columns = {
        "supervised tokens": lambda result: f"{result['supervised_tokens']:,}",
        "held-out loss": lambda result: f"{result['held_out_loss']:.4f}",
    }
    peers.report(results, args, before, columns)
    peers.check_losses(results, ("ours_random", "trl", "trl_no_checkpointing"))
    peers.check_losses(results, ("trl_grouped", "trl_grouped_no_checkpointing"))


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--data", type=Path, default=ROOT / "data/finetune/train.jsonl", help="a file of chat rows")
    parser.add_argument("--rows", type=int, default=1000, help="rows to use, including the held-out ones")
    parser.add_argument("--held_out", type=int, default=50, help="the last of these rows, to measure the result on")
    parser.add_argument("--batch", type=int, default=8)
    peers.add_flags(parser, SIDES)
    return parser.parse_args()


def prepare(args: argparse.Namespace) -> None:
    """Write the base model and the rows that fit into `--length` to `args.work`."""
    from medicalgpt.args import DataArguments
    from medicalgpt.data.encoding import EncodingError, encode_chat
    from medicalgpt.data.loading import load_data
    from medicalgpt.formats.conversion import to_messages

    data = load_data(DataArguments(train_file_dir=str(args.data), max_train_samples=args.rows), to_messages)
    rows = [{"messages": row["messages"], "tools": row["tools"]} for row in data.train]
    texts = (message["content"] for row in rows for message in row["messages"])
    tokenizer, model = peers.build_base(texts, args.work / "base")

    fitting, tokens = [], 0
    for row in rows:
        try:
            tokens += sum(len(sample.input_ids) for sample in encode_chat(tokenizer, row, max_length=args.length))
            fitting.append(row)
        except EncodingError:
            continue
    train = len(fitting) - args.held_out
    if not 0 < train < len(fitting):
        sys.exit(
            f"{len(fitting)} of {len(rows)} rows fit into {args.length} tokens: --held_out {args.held_out} leaves none"
        )
    for name, part in (("train", fitting[:train]), ("held_out", fitting[train:])):
        (args.work / name).mkdir()
        lines = [json.dumps({"messages": row["messages"]}, ensure_ascii=False) + "\n" for row in part]
        (args.work / name / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    print(
        f"{model.num_parameters():,} parameters, vocabulary {len(tokenizer):,}; {len(fitting)} of {len(rows)} rows fit "
        f"into {args.length} tokens, {args.held_out} of them held out; {tokens:,} tokens"
    )


def measure(side: str, out: Path, args: argparse.Namespace) -> peers.Result:
    """Train one side, and measure what it learned."""
    return peers.train(side, out, command_for(side, out, args)) | check_result(args.work, out)


def command_for(side: str, out: Path, args: argparse.Namespace) -> list[str]:
    """The arguments for Python that train one side."""
    ours = ["supervised_finetuning.py", "--sample_prompts", "0"]
    return peers.command_for(side, out, args, ours, ["benchmarks.sft_cpu"])


def trl_trainer(work: Path, out: Path, length: int, batch: int, **options: Any) -> "SFTTrainer":
    """What a user of TRL would write for the same task; `options` go into the config."""
    from datasets import load_dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    return SFTTrainer(
        model=str(work / "base"),
        args=SFTConfig(assistant_only_loss=True, **peers.trl_arguments(out, length, batch, **options)),
        train_dataset=load_dataset("json", data_files=str(work / "train" / "rows.jsonl"), split="train"),
        peft_config=LoraConfig(
            r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )


def check_result(work: Path, adapter: Path) -> dict[str, float]:
    """Supervised tokens of the training rows, with the saved tokenizer, and the loss on the held-out rows."""
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
