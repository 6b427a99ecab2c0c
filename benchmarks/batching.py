"""The two ways to generate together: tokens per second, and how long a short request waits behind a long one.

    python -m benchmarks.batching --model outputs/sft-merged
    python -m benchmarks.batching --model outputs/sft-merged --max_batch_size 64 --threads 2

Each way runs in a process of its own, without HTTP: one request alone, then as many at a time as fit into the batch,
then three times as many, each 20 ms after the one before, so that they join and leave a running batch; all greedy, with
answers of 16 to 47 tokens. The short request asks for two tokens while an answer of `--long` tokens is generated.
Answers do not stop early: the stop tokens are not followed. Memory is the largest resident size of the process.
"""

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from benchmarks.peers import describe_machine

WAYS = ("continuous", "static")
SECONDS_BETWEEN = 0.02
QUESTION = "第{}位：我昨天开始发烧，还有点咳嗽，该怎么办？"


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Tokens per second for each load, the seconds of the short request, and memory in MB."""
    from medicalgpt.serving.batchers import make_batcher
    from medicalgpt.serving.chat import ChatEngine
    from medicalgpt.serving.generation import GenerationRequest, Sampling

    import torch

    torch.set_num_threads(arguments.threads)
    engine = ChatEngine.from_pretrained(arguments.model)
    engine.stop_ids = frozenset()
    engine.model.generation_config.eos_token_id = None
    size = arguments.max_batch_size
    long = min(arguments.long, engine.context_length - 200)

    def request(number: int, tokens: int) -> GenerationRequest:
        prompt = [{"role": "user", "content": QUESTION.format(number)}]
        return engine.request(prompt, Sampling(max_new_tokens=tokens))

    found: dict[str, float] = {}
    batcher = make_batcher(engine, batching=arguments.measure, max_batch_size=size, max_waiting=4 * size)
    batcher.submit(request(0, 8)).result()
    for name, count, pause in (("one", 1, 0.0), ("full", size, 0.0), ("joining", 3 * size, SECONDS_BETWEEN)):
        requests = [request(number, 16 + number % 32) for number in range(count)]
        began = time.perf_counter()
        futures = []
        for each in requests:
            futures.append(batcher.submit(each))
            time.sleep(pause)
        tokens = sum(future.result().completion_tokens for future in futures)
        found[name] = tokens / (time.perf_counter() - began)
    begun = threading.Event()
    running = batcher.submit(dataclasses.replace(request(0, long), on_token=begun.set))
    begun.wait()
    began = time.perf_counter()
    batcher.submit(request(1, 2)).result()
    found["short"] = time.perf_counter() - began
    running.cancel()
    batcher.close(finish=False)
    found["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return found


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a chat model")
    parser.add_argument("--max_batch_size", type=int, default=16, help="answers generated together")
    parser.add_argument("--long", type=int, default=1900, help="tokens of the long answer, within the model's context")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    arguments = parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments)))
        return
    size = arguments.max_batch_size
    describe_machine()
    print(f"| `--batching` | one | {size} at a time | {3 * size} joining | short behind long | memory |")
    print("|---|---|---|---|---|---|")
    for way in WAYS:
        command = [sys.executable, "-m", "benchmarks.batching", *sys.argv[1:], "--measure", way]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        speeds = " | ".join(f"{found[name]:,.0f}" for name in ("one", "full", "joining"))
        print(f"| `{way}` | {speeds} | {found['short']:.2f} s | {found['memory']:,.0f} MB |", flush=True)


if __name__ == "__main__":
    main()
