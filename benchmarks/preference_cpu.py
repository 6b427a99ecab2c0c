"""Preference stages on a CPU: dpo_training.py, orpo_training.py or reward_modeling.py, compared with TRL.

    python -m benchmarks.preference_cpu --stage dpo --data data/reward/train.jsonl
    python -m benchmarks.preference_cpu --stage rm --data data/reward/train.jsonl --sides ours,trl

A Qwen3 with 5.2 million random weights (hidden size 256, intermediate size 768, 4 layers, 4 heads, 2 key-value heads,
vocabulary of 8,000), LoRA of rank 8 on all linear layers, one epoch in float32. The sides run one after the other, each
in its own process. The table shows seconds of the whole process, of its training loop and of CPU time (the better
measure if other programs are running), peak memory, the losses of the first and the last step, and loss and accuracy
afterwards on the same held-out pairs, measured the same way.

The texts are truncated in advance so that every pair fits into `--length`: TRL would truncate long pairs and our stages
refuse them, so the two would train on different tokens. TRL is given the rendered texts, and the script exits unless
both sides have the same token ids with the same ones supervised. The learning rate is 2e-4, higher than the defaults of
the stages, so that the loss moves within a few steps.

`trl` is TRL with its defaults, except for what must be the same on all sides (rows, length, batch size, learning rate,
seed, adapter, float32), the log and `use_cpu`. TRL recomputes activations by default and ours do not:
`trl_no_checkpointing` turns that off. `ours` groups rows by length, the default; `ours_random` takes them in TRL's
order, so `ours_random` and `trl_no_checkpointing` are comparable in time, and their losses step by step. TRL's ORPO
also trains on the prompt, so its loss is a different one.
"""

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import peers
from benchmarks.peers import ALPHA, RANK, ROOT, TRL

if TYPE_CHECKING:
    from transformers import Trainer

SIDES = ("ours", "ours_random", "trl", "trl_no_checkpointing")
PROGRAMS = {"dpo": "dpo_training.py", "orpo": "orpo_training.py", "rm": "reward_modeling.py"}
TURN_END = "<|im_end|>"
BETA = 0.1


def main() -> None:
    """Measure the sides `--runs` times in turn, print a line for each, and compare."""
    args = parse_args()
    if args.child:
        trainer = trl_trainer(args.stage, args.work, args.out, args.length, args.batch, **TRL[args.child])
        args.out.mkdir(exist_ok=True)
        rows = [encoded_by_trl(row, args.stage) for row in trainer.train_dataset]
        (args.out / "encoded.json").write_text(json.dumps(rows))
        peers.train_and_save(trainer, args.out)
        return
    before = peers.describe_machine()
    with tempfile.TemporaryDirectory() as work:
        args.work = Path(work)
        prepare(args)
        results = peers.compare(args, measure)
    columns = {
        "held-out loss": lambda result: f"{result['held_out_loss']:.4f}",
        "accuracy": lambda result: f"{result['held_out_accuracy']:.0%}",
    }
    peers.report(results, args, before, columns)
    # These see the pairs in the same order; the loss of TRL's ORPO differs from ours.
    peers.check_losses(results, SIDES[2:] if args.stage == "orpo" else SIDES[1:])


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--stage", choices=PROGRAMS, default="dpo")
    parser.add_argument("--data", type=Path, default=ROOT / "data/reward/train.jsonl", help="a file of pairs")
    parser.add_argument("--rows", type=int, default=96, help="pairs to train on, from the start of the file")
    parser.add_argument("--held_out", type=int, default=32, help="pairs after them, on which to measure the result")
    parser.add_argument("--batch", type=int, default=4)
    peers.add_flags(parser, SIDES)
    return parser.parse_args()


def prepare(args: argparse.Namespace) -> None:
    """Write to `args.work` the base model and the pairs, truncated to `--length`, in our format and in TRL's."""
    from medicalgpt.args import DataArguments
    from medicalgpt.data.loading import load_data
    from medicalgpt.formats.conversion import to_preference

    from transformers import AutoModelForSequenceClassification

    count = args.rows + args.held_out
    rows = load_data(DataArguments(train_file_dir=str(args.data), max_train_samples=count), to_preference).train
    texts = (message["content"] for row in rows for message in (*row["messages"], row["chosen"], row["rejected"]))
    tokenizer, model = peers.build_base(texts, args.work / "base", TURN_END)
    if args.stage == "rm":
        # Saved with its head, so that both sides start from the same one.
        model = AutoModelForSequenceClassification.from_pretrained(args.work / "base", num_labels=1)
        model.save_pretrained(args.work / "base")

    fitted = [fit(tokenizer, row, args.length) for row in rows]
    for name, part in (("train", fitted[: args.rows]), ("held_out", fitted[args.rows :])):
        (args.work / name).mkdir()
        write_rows(args.work / name / "pairs.jsonl", part)
    write_rows(args.work / "trl.jsonl", [render(tokenizer, row) for row in fitted[: args.rows]])
    trained = [sequence for row in encoded(tokenizer, args.work / "train") for sequence in row]
    if longest := max(0, *(len(ids) - args.length for ids, _ in trained)):
        sys.exit(f"a pair is {longest} tokens too long after truncation: increase --length")
    print(
        f"{model.num_parameters():,} parameters, vocabulary {len(tokenizer):,}; {args.rows} pairs of at most "
        f"{args.length} tokens ({sum(map(was_truncated, rows, fitted))} of {len(rows)} truncated), {args.held_out} "
        f"more held out; {sum(len(ids) for ids, _ in trained):,} tokens, {sum(count for _, count in trained):,} of "
        "them in answers"
    )


def fit(tokenizer: Any, row: dict[str, Any], length: int) -> dict[str, Any]:
    """The row, with its turns truncated so that the prompt takes at most half of `length` and both answers fit."""
    # Leaves room for what the template adds to a turn, and for tokens that a truncated text gains when tokenized again.
    room = length - 16 * (len(row["messages"]) + 1)
    limit = room // 2 // len(row["messages"])
    messages = [turn | {"content": truncate(tokenizer, turn["content"], limit)} for turn in row["messages"]]
    prompt = sum(len(tokenizer(turn["content"]).input_ids) for turn in messages)
    answers = {name: truncate(tokenizer, row[name]["content"], room - prompt) for name in ("chosen", "rejected")}
    return {"messages": messages, **answers}


def truncate(tokenizer: Any, text: str, limit: int) -> str:
    """The first `limit` tokens of `text`, without an incomplete character at the end."""
    ids = tokenizer(text).input_ids
    return text if len(ids) <= limit else tokenizer.decode(ids[:limit]).rstrip("\ufffd").strip()


def render(tokenizer: Any, row: dict[str, Any]) -> dict[str, str]:
    """The row as the texts that TRL expects."""
    prompt = tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, tokenize=False)
    return {"prompt": prompt, "chosen": row["chosen"] + TURN_END, "rejected": row["rejected"] + TURN_END}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write one JSON object per line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def was_truncated(row: dict[str, Any], fitted: dict[str, Any]) -> bool:
    """Whether `fit` changed the row."""
    answers = {name: row[name]["content"] for name in ("chosen", "rejected")}
    return {"messages": row["messages"], **answers} != fitted


def encoded(tokenizer: Any, folder: Path) -> list[list[tuple[list[int], int]]]:
    """The pairs in `folder` as our stages encode them: for each answer, its ids after the prompt's, and its length."""
    from medicalgpt.data.encoding import encode_preference
    from medicalgpt.formats.conversion import to_preference

    pairs = []
    for line in (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines():
        (pair,) = encode_preference(tokenizer, to_preference(json.loads(line)))
        pairs.append([(pair.prompt_ids + ids, len(ids)) for ids in (pair.chosen_ids, pair.rejected_ids)])
    return pairs


def encoded_by_trl(row: dict[str, Any], stage: str) -> list[tuple[list[int], int]]:
    """The same for a row that TRL's trainer encoded; its reward trainer does not keep the length of the answer: 0."""
    names = ("chosen", "rejected")
    if stage == "dpo":
        return [(row["prompt_ids"] + row[f"{name}_ids"], len(row[f"{name}_ids"])) for name in names]
    if stage == "orpo":
        return [(row[f"{name}_input_ids"], sum(label != -100 for label in row[f"{name}_labels"])) for name in names]
    return [(row[f"{name}_ids"], 0) for name in names]


def measure(side: str, out: Path, args: argparse.Namespace) -> peers.Result:
    """Train one side, exit if it saw other tokens, and measure what it learned."""
    result = peers.train(side, out, command_for(side, out, args))
    check_tokens(side, out, peers.log_history(out), args)
    loss, accuracy = held_out(out, args)
    return result | {"held_out_loss": loss, "held_out_accuracy": accuracy}


def command_for(side: str, out: Path, args: argparse.Namespace) -> list[str]:
    """The arguments for Python that train one side."""
    ours = [PROGRAMS[args.stage], *([] if args.stage == "rm" else ["--sample_prompts", "0"])]
    return peers.command_for(side, out, args, ours, ["benchmarks.preference_cpu", "--stage", args.stage])


def check_tokens(side: str, out: Path, history: list[dict], args: argparse.Namespace) -> None:
    """Exit unless the side trained on the tokens of all pairs, with the same ones supervised."""
    from transformers import AutoTokenizer

    expected = encoded(AutoTokenizer.from_pretrained(args.work / "base"), args.work / "train")
    if side in TRL:
        if args.stage == "rm":
            expected = [[(ids, 0) for ids, _ in pair] for pair in expected]
        same = json.loads((out / "encoded.json").read_text()) == json.loads(json.dumps(expected))
    else:
        seen = max(entry["num_tokens"] for entry in history if "num_tokens" in entry)
        same = seen == sum(len(ids) for pair in expected for ids, _ in pair)
    if not same:
        sys.exit(f"{side} did not train on the tokens of the pairs")


def held_out(adapter: Path, args: argparse.Namespace) -> tuple[float, float]:
    """Mean loss of the stage, and the share of pairs in which the chosen answer wins, computed from the logits."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    Model = AutoModelForSequenceClassification if args.stage == "rm" else AutoModelForCausalLM
    options = {"num_labels": 1} if args.stage == "rm" else {}
    model = PeftModel.from_pretrained(Model.from_pretrained(args.work / "base", **options), adapter).eval()

    def log_prob(ids: list[int], length: int) -> float:
        scores = model(input_ids=torch.tensor([ids])).logits[0, -length - 1 : -1].log_softmax(dim=-1)
        return scores.gather(1, torch.tensor(ids[-length:])[:, None]).sum().item()

    losses, correct = [], 0
    with torch.no_grad():
        for pair in encoded(AutoTokenizer.from_pretrained(adapter), args.work / "held_out"):
            if args.stage == "rm":
                chosen, rejected = (model(input_ids=torch.tensor([ids])).logits.item() for ids, _ in pair)
                losses.append(softplus(rejected - chosen))
            elif args.stage == "orpo":
                chosen, rejected = (log_prob(ids, length) / length for ids, length in pair)
                odds = [mean - math.log1p(-math.exp(mean)) for mean in (chosen, rejected)]
                losses.append(-chosen + BETA * softplus(odds[1] - odds[0]))
            else:
                now = [log_prob(*answer) for answer in pair]
                with model.disable_adapter():
                    before = [log_prob(*answer) for answer in pair]
                chosen, rejected = (BETA * (a - b) for a, b in zip(now, before, strict=True))
                losses.append(softplus(rejected - chosen))
            correct += chosen > rejected
    return sum(losses) / len(losses), correct / len(losses)


def softplus(x: float) -> float:
    """-log sigmoid(-x)."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def trl_trainer(stage: str, work: Path, out: Path, length: int, batch: int, **options: Any) -> "Trainer":
    """What a user of TRL would write for the same task; `options` go into the config."""
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer

    kind: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    if stage == "dpo":
        from trl import DPOConfig as Config
        from trl import DPOTrainer as Trainer
    elif stage == "orpo":
        from trl.experimental.orpo import ORPOConfig as Config
        from trl.experimental.orpo import ORPOTrainer as Trainer
    else:
        from trl import RewardConfig as Config
        from trl import RewardTrainer as Trainer

        kind = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    return Trainer(
        model=str(work / "base"),
        args=Config(**peers.trl_arguments(out, length, batch, **options)),
        train_dataset=load_dataset("json", data_files=str(work / "trl.jsonl"), split="train"),
        processing_class=AutoTokenizer.from_pretrained(work / "base"),
        peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", **kind),
    )


if __name__ == "__main__":
    main()
