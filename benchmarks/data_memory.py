"""Memory and time of reading and tokenizing ten thousand to a million rows, each number of rows in a new process.

    python -m benchmarks.data_memory --model_name_or_path outputs/tiny-base
    python -m benchmarks.data_memory --model_name_or_path outputs/tiny-base --rows 10000 100000 --workers 1
    python -m benchmarks.data_memory --model_name_or_path outputs/tiny-base --rows 100000 --read 1000000 10000000

Prints a table: the size of the file; the seconds to read it, to tokenize it, and to do both again with the tokens from
the cache; and the peak resident memory of the program and of its largest tokenizing process.

With --read it prepares a shard of the first number of rows, and reads as many copies of it as make each number of rows:
every row once, in batches of 32, in the order that --train_sampling_strategy names. Memory is that of the process
itself ("own"), and with the pages of the files that it has mapped, which the system takes back when another program
needs room.
"""

import argparse
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

SIGNS = ["发热", "咳嗽", "头痛", "胸闷", "乏力", "皮疹", "恶心", "腹泻", "关节疼痛", "失眠", "cough", "fever", "a rash"]
ADVICE = ["多休息，多喝水。", "请尽快去医院就诊。", "按时复查血压。", "See a doctor soon.", "Rest and drink water."]


def write_rows(path: Path, count: int) -> None:
    """Single-turn conversations of about 150 bytes each, all different."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            signs = "、".join(draw.sample(SIGNS, draw.randint(1, 4)))
            turns = [
                {"from": "human", "value": f"病例{number}：我有{signs}，该怎么办？"},
                {"from": "gpt", "value": "".join(draw.sample(ADVICE, draw.randint(1, 3)))},
            ]
            file.write(json.dumps({"conversations": turns}, ensure_ascii=False) + "\n")


def peak_rss(who: int) -> float:
    """Largest resident memory so far, in MB; of the largest child for RUSAGE_CHILDREN."""
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(who).ru_maxrss / (1024**2 if sys.platform == "darwin" else 1024)


def load_tokenizer(model: str) -> Any:
    """The tokenizer of `model` with its chat template; logging is set up as in training."""
    from medicalgpt.logs import setup_logging
    from medicalgpt.models import loading
    from template import apply_template

    setup_logging()
    tokenizer = loading.load_tokenizer(model)
    apply_template(tokenizer)
    return tokenizer


def encode_file(path: str, model: str, workers: int | None) -> dict[str, Any]:
    """Read and tokenize a file as supervised fine-tuning does; returns time and memory."""
    from medicalgpt.args import DataArguments
    from medicalgpt.data.encoding import encode_chat
    from medicalgpt.data.loading import load_data
    from medicalgpt.data.tokenizing import encode_rows
    from medicalgpt.formats.conversion import to_messages

    tokenizer = load_tokenizer(model)
    before = peak_rss(resource.RUSAGE_SELF)
    started = time.perf_counter()
    arguments = DataArguments(train_file_dir=path)
    data = load_data(arguments, to_messages)
    read = time.perf_counter()
    train = encode_rows(data, "train", partial(encode_chat, tokenizer, max_length=512), workers)
    data.settle(arguments)
    train = data.mix(train, arguments, 42)
    return {
        "samples": len(train),
        "read_s": read - started,
        "encode_s": time.perf_counter() - read,
        "imports_mb": before,
        "peak_mb": peak_rss(resource.RUSAGE_SELF),
        "worker_mb": peak_rss(resource.RUSAGE_CHILDREN),
    }


def stream_file(path: str, model: str, workers: int | None) -> dict[str, Any]:
    """Check a file and tokenize one epoch of it as --streaming does, in this process only; returns time and memory."""
    from medicalgpt.args import DataArguments
    from medicalgpt.data.encoding import encode_chat
    from medicalgpt.data.streaming import StreamedSamples, check_data
    from medicalgpt.data.tokenizing import encode_rows
    from medicalgpt.formats.conversion import to_messages

    tokenizer = load_tokenizer(model)
    before = peak_rss(resource.RUSAGE_SELF)
    started = time.perf_counter()
    arguments = DataArguments(train_file_dir=path, streaming=True, skip_long_rows=True)
    arguments.given = frozenset()
    encode = partial(encode_chat, tokenizer, max_length=512)
    data = check_data(arguments, to_messages, seed=42)
    read = time.perf_counter()
    samples = StreamedSamples(data, encode, encode_rows(data, "train", encode))
    count = next(number for number, sample in enumerate(samples) if sample["position"].epoch)
    return {
        "samples": count,
        "read_s": read - started,
        "encode_s": time.perf_counter() - read,
        "imports_mb": before,
        "peak_mb": peak_rss(resource.RUSAGE_SELF),
        "worker_mb": 0.0,
    }


def read_shards(place: str, model: str, workers: int | None, strategy: str) -> dict[str, Any]:
    """Read all samples of prepared shards once, in the order of a stage's epoch; returns time and memory."""
    from medicalgpt.args import DataArguments
    from medicalgpt.data.encoding import encode_chat
    from medicalgpt.data.lengths import list_lengths
    from medicalgpt.data.prepared import read_prepared
    from medicalgpt.training.row_order import StepBatches, order_rows

    tokenizer = load_tokenizer(model)
    before = own_memory()
    started = time.perf_counter()
    encode = partial(encode_chat, tokenizer, max_length=512, shorten_rows=True)
    _, train, _ = read_prepared(DataArguments(prepared_dir=place), encode)
    opened = time.perf_counter()
    order = order_rows(train, strategy, 0, lambda: list_lengths(train, "input_ids"), 32)
    rows, tokens, most = 0, 0, 0.0
    for indices in StepBatches(order, 32, 1):
        batch = train[indices]["input_ids"]
        rows += len(batch)
        tokens += sum(map(len, batch))
        if rows % 100_000 < 32:
            most = max(most, own_memory())
    return {
        "samples": rows,
        "tokens": tokens,
        "open_s": opened - started,
        "read_s": time.perf_counter() - opened,
        "before_mb": before,
        "own_mb": max(most, own_memory()),
        "peak_mb": peak_rss(resource.RUSAGE_SELF),
    }


def own_memory() -> float:
    """Resident memory of this process without mapped files, in MB (Linux only)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) / 1024


def repeat_shard(prepared: Path, place: Path, copies: int) -> None:
    """A folder of `copies` shards that all have the content of the only one in `prepared`, by links."""
    from medicalgpt.data.shards import MANIFEST, Shard, write_index

    source = prepared / Shard(1, 1).folder
    for number in range(1, copies + 1):
        shard = Shard(number, copies)
        folder = place / shard.folder
        folder.mkdir(parents=True)
        for path in source.iterdir():
            if path.name != MANIFEST:
                os.link(path, folder / path.name)
        manifest = json.loads((source / MANIFEST).read_text(encoding="utf-8")) | {"shard": shard}
        (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    write_index(place)


def measure_reading(arguments: argparse.Namespace) -> None:
    """Prepare one shard, and print a row of the table for each number of rows that is read."""
    print(
        "| rows | prepared s | opened s | read s | rows/s | own memory before, MB | own memory, MB | with files, MB |"
    )
    print("|---:|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    with tempfile.TemporaryDirectory(dir=arguments.work_dir) as folder:
        place, rows = Path(folder), arguments.rows[0]
        write_rows(place / "rows.jsonl", rows)
        flags = {
            "--format": "chat",
            "--model_name_or_path": arguments.model_name_or_path,
            "--train_file_dir": place / "rows.jsonl",
            "--prepared_dir": place / "one",
            "--model_max_length": 512,
            **({"--preprocessing_num_workers": arguments.workers} if arguments.workers else {}),
        }
        words = [str(word) for flag in flags.items() for word in flag]
        started = time.perf_counter()
        subprocess.run([sys.executable, "prepare_data.py", *words], check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
        for count in arguments.read:
            repeat_shard(place / "one", place / str(count), count // rows)
            found = measure("prepared", place / str(count), arguments, folder, arguments.train_sampling_strategy)
            print(
                f"| {found['samples']:,} | {seconds:.1f} | {found['open_s']:.1f} | {found['read_s']:.1f} | "
                f"{found['samples'] / found['read_s']:,.0f} | {found['before_mb']:.0f} | {found['own_mb']:.0f} | "
                f"{found['peak_mb']:.0f} |",
                flush=True,
            )


# The ways to turn a file into samples, by the name of their row in the table.
WAYS = {"tokenized in advance": encode_file, "streamed": stream_file}


def measure(way: str, path: Path, arguments: argparse.Namespace, cache: str, *more: str) -> dict[str, Any]:
    """Run one way in a new process."""
    call = json.dumps([way, str(path), arguments.model_name_or_path, arguments.workers, *more])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.data_memory", "--measure", call],
        env={**os.environ, "HF_DATASETS_CACHE": cache},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="model whose tokenizer and chat template are used")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="numbers of rows")
    parser.add_argument("--workers", type=int, help="number of tokenizing processes; default: as in training")
    parser.add_argument("--read", type=int, nargs="+", help="read so many rows from shards; needs a number in --rows")
    parser.add_argument("--train_sampling_strategy", default="random", choices=["random", "group_by_length"])
    parser.add_argument("--work_dir", help="folder for the files; default: that of the system")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        way, *call = json.loads(arguments.measure)
        print(json.dumps({**WAYS, "prepared": read_shards}[way](*call)))
        return
    if not arguments.model_name_or_path:
        parser.error("--model_name_or_path is required; python build_tiny_model.py creates a tiny model")
    if arguments.read:
        measure_reading(arguments)
        return
    print("| way | rows | file MB | read s | tokenize s | both from cache s | peak MB | imports alone MB | worker MB |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    for count in arguments.rows:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.jsonl"
            write_rows(path, count)
            for way in WAYS:
                first = measure(way, path, arguments, folder)
                again = measure(way, path, arguments, folder) if way == "tokenized in advance" else None
                assert first["samples"] == count and (again is None or again["samples"] == count)
                cached = f"{again['read_s'] + again['encode_s']:.1f}" if again else ""
                print(
                    f"| {way} | {count:,} | {path.stat().st_size / 1e6:.0f} | {first['read_s']:.1f} | "
                    f"{first['encode_s']:.1f} | {cached} | {first['peak_mb']:.0f} | "
                    f"{first['imports_mb']:.0f} | {first['worker_mb']:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
