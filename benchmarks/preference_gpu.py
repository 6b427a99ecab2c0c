"""Preference stages on a GPU: DPO, ORPO and reward modeling, with LoRA and QLoRA, compared with TRL.

    python -m benchmarks.preference_gpu --shape 0.5b
    python -m benchmarks.preference_gpu --shape 7b --batch 2 --ways dpo,dpo_qlora,trl_dpo

Random weights in the shape of Qwen2.5-0.5B, -1.5B or -7B, bfloat16, adapters of rank 8 on all linear layers, length
1,024. Answers of the file are joined into longer ones of varying lengths up to the limit, so that padding costs what it
costs in practice. Each way trains on the same pairs in its own process; the table shows tokens per second (without
padding; both sequences of a pair count once, although DPO reads them twice), peak GPU memory, and the mean training
loss. `--shape tiny` tries the script without a GPU.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.peers import ROOT, SEED, train_and_save
from benchmarks.preference_cpu import PROGRAMS, TURN_END, encoded, render, trl_trainer, write_rows
from benchmarks.sft_gpu import SHAPES as SMALL_SHAPES
from benchmarks.sft_gpu import run

SHAPES = {
    **SMALL_SHAPES,
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "vocab_size": 151_936}
    | {"num_attention_heads": 12, "num_key_value_heads": 2},
    "7b": {"hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28, "vocab_size": 152_064}
    | {"num_attention_heads": 28, "num_key_value_heads": 4},
}
QLORA = ("--load_in_4bit", "True", "--qlora", "True")
WAYS: dict[str, tuple[str, ...]] = {
    "dpo": (),
    "dpo_checkpointing": ("--gradient_checkpointing", "True"),
    "dpo_precomputed": ("--precompute_ref_log_probs", "True"),
    "dpo_qlora": QLORA,
    "orpo": (),
    "orpo_qlora": QLORA,
    "rm": (),
    "rm_qlora": QLORA,
    "trl_dpo": (),
    "trl_orpo": (),
    "trl_rm": (),
}


def main() -> None:
    """Measure every way and print the table."""
    args = parse_args()
    if args.child:
        import torch

        out = args.work / f"trl-{args.stage}"
        train_and_save(trl_trainer(args.stage, args.work, out, args.length, args.batch), out)
        (out / "peak.json").write_text(json.dumps(torch.cuda.max_memory_allocated() / 1e9))
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        tokens = prepare(work, args)
        print("\n| | tokens/s | peak GB | loss |\n|---|---|---|---|")
        for way in args.ways.split(","):
            first, _, second = way.partition("_")
            if first == "trl":
                out = work / f"trl-{second}"
                run(
                    *("-m", "benchmarks.preference_gpu", "--child", "--stage", second, "--work", work),
                    *("--length", args.length, "--batch", args.batch),
                )
                peak = json.loads((out / "peak.json").read_text())
            else:
                out = work / way
                run(
                    *(ROOT / PROGRAMS[first], "--model_name_or_path", work / "base"),
                    *("--train_file_dir", work / "train", "--output_dir", out, "--model_max_length", args.length),
                    *("--per_device_train_batch_size", args.batch, "--num_train_epochs", 1, "--seed", SEED),
                    *(() if first == "rm" else ("--sample_prompts", 0)),
                    *WAYS[way],
                )
                peak = json.loads((out / "run.json").read_text(encoding="utf-8"))["peak_memory_gb"]
            history = json.loads((out / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
            end = next(entry for entry in history if "train_runtime" in entry)
            print(
                f"| {way} | {tokens / end['train_runtime']:,.0f} | {peak:.2f} | {end['train_loss']:.4f} |", flush=True
            )


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--data", type=Path, default=ROOT / "data/reward/train.jsonl", help="a file of pairs")
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--pairs", type=int, default=400)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--ways", default=",".join(WAYS), help=f"separated by commas: {', '.join(WAYS)}")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--stage", choices=PROGRAMS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.ways.split(",")) - WAYS.keys():
        parser.error(f"--ways {','.join(sorted(unknown))}: no such way; known are {', '.join(WAYS)}")
    return args


def prepare(work: Path, args: argparse.Namespace) -> int:
    """Write to `work` a base model and pairs of varying lengths, in our format and TRL's; returns their token count."""
    from build_tiny_model import ROLES, train_tokenizer
    from medicalgpt.args import DataArguments
    from medicalgpt.data.loading import load_data
    from medicalgpt.formats.conversion import to_preference
    from template import apply_template

    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM, set_seed

    set_seed(SEED)
    rows = list(load_data(DataArguments(train_file_dir=str(args.data)), to_preference).train)
    texts = (message["content"] for row in rows for message in (*row["messages"], row["chosen"], row["rejected"]))
    tokenizer = train_tokenizer((text for content in texts for text in (*ROLES, content)), 8000, 4096)
    tokenizer.eos_token = TURN_END
    apply_template(tokenizer, "qwen")
    config = Qwen2Config(
        **SHAPES[args.shape],
        max_position_embeddings=4096,
        tie_word_embeddings=args.shape != "7b",
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # Created on its final device in its final type: seven billion random numbers take minutes on a CPU.
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.set_default_dtype(torch.bfloat16)
        model = Qwen2ForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(work / "base")
    tokenizer.save_pretrained(work / "base")
    parameters = model.num_parameters()
    # The training processes need the memory.
    del model
    torch.cuda.empty_cache()

    draw = random.Random(SEED)
    pairs = []
    for _ in range(args.pairs):
        messages = draw.choice(rows)["messages"]
        limit = draw.uniform(0.1, 1.0) * args.length - prompt_length(tokenizer, messages)
        answers = {
            name: join_texts(tokenizer, [row[name]["content"] for row in draw.sample(rows, min(64, len(rows)))], limit)
            for name in ("chosen", "rejected")
        }
        pairs.append({"messages": messages, **answers})
    (work / "train").mkdir()
    write_rows(work / "train" / "pairs.jsonl", pairs)
    write_rows(work / "trl.jsonl", [render(tokenizer, pair) for pair in pairs])
    tokens = sum(len(ids) for pair in encoded(tokenizer, work / "train") for ids, _ in pair)
    print(f"{parameters:,} parameters; {args.pairs} pairs of at most {args.length} tokens, {tokens:,} tokens")
    return tokens


def prompt_length(tokenizer: Any, messages: list[dict[str, Any]]) -> int:
    """Number of tokens of the rendered prompt, with some room for the end of the turn."""
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return len(tokenizer(text).input_ids) + 8


def join_texts(tokenizer: Any, texts: list[str], limit: float) -> str:
    """As many of the texts, joined by newlines, as fit into `limit` tokens, but at least one."""
    answer = texts[0]
    for text in texts[1:]:
        longer = f"{answer}\n{text}"
        if len(tokenizer(longer).input_ids) > limit:
            break
        answer = longer
    return answer


if __name__ == "__main__":
    main()
