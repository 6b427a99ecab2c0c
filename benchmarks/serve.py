"""Load test of a chat server: many clients for a minute, each answer compared with the expected one.

    python -m benchmarks.serve --model outputs/sft-merged
    python -m benchmarks.serve --model outputs/sft-merged --vllm_venv .venv-vllm --output_file outputs/serve.json
    python -m benchmarks.serve --model outputs/sft-merged --url http://127.0.0.1:8000

openai_api.py is started, loaded and stopped, then, with `--vllm_venv`, vLLM with the same checkpoint (with
scripts/vllm_deployment.sh, which creates that environment). With `--url`, a running server is loaded instead, any with
OpenAI's API; its key is read from OPENAI_API_KEY.

Each client has its own few questions and asks them again and again, one at a time, some of them with streaming. The
expected answers come from `ChatEngine`, greedy and in float32, as in both servers. Only questions are used whose
answers differ from each other and in which no token was a near tie, so that every answer identifies its question:
`mixed up` is the answer to another question, `wrong` is the answer to none, and `lost` is a request whose connection
was closed or timed out before the end of the answer. With `--kill_share`, clients hang up in the middle of some
answers; with `--attacks`, the server is attacked all the time (benchmarks/attacks.py). A
full server may refuse requests (429, with Retry-After); the client then waits as long as it is told.

Seconds are measured by the clients: from the request to the end of its answer, and to its first text if it is streamed.
Memory (resident, of all processes of the server) is read before the load, twice a second during it, and two seconds
after it. The clients take CPU time from the server, the same for both servers. The exit code is 1 if anything was mixed
up, wrong, lost or an error.
"""

import argparse
import asyncio
import json
import os
import random
import shlex
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.attacks import Attacker

import httpx
import numpy as np
import psutil

ROOT = Path(__file__).resolve().parent.parent
# Float32 sums may be computed in another order; a token that leads by less could lose.
CLOSE = 1e-3
# Seconds after the load for the server to release memory.
SETTLING = 2.0
# Seconds that a client waits which was refused in a stream, where no header says it.
WAIT_AFTER_STREAM = "1"
BAD = ("mixed up", "wrong", "lost", "error")
KINDS = ("correct", *BAD, "refused", "killed")


@dataclass(frozen=True)
class Case:
    """A question and the expected answer, with its finish reason."""

    messages: list[dict[str, str]]
    text: str
    finish_reason: str


@dataclass
class Outcome:
    """The outcome of one request.

    Attributes:
        kind: one of KINDS.
        seconds: from the request to the end of the answer.
        first: seconds to the first text of a streamed answer.
        tokens: number of tokens of a complete answer.
        detail: what was wrong.
    """

    kind: str
    seconds: float = 0.0
    first: float | None = None
    tokens: int = 0
    detail: str = ""


def main() -> None:
    """Load one server after the other, print a line for each, and report what went wrong."""
    args = parse_args()
    cases = prepare(args)
    print(
        f"{args.clients} clients, {args.seconds:g} s, {len(cases[0])} questions each, answers of at most "
        f"{args.max_new_tokens} tokens, {args.stream_share:.0%} streamed, {args.kill_share:.0%} hung up on; "
        f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f} before",
        flush=True,
    )
    results = {}
    for name in [args.url] if args.url else ["openai_api.py", *(["vLLM"] if args.vllm_venv else [])]:
        with running(name, args) as (url, pid):
            results[name] = asyncio.run(measure(url, pid, cases, args))
        print(json.dumps({"server": name, **results[name]}, ensure_ascii=False), flush=True)
    report(results)
    if args.output_file:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        found = {"settings": settings, "cores": os.cpu_count(), "servers": results}
        args.output_file.parent.mkdir(parents=True, exist_ok=True)
        args.output_file.write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    if bad := [f"{name}: {result[kind]} {kind}" for name, result in results.items() for kind in BAD if result[kind]]:
        sys.exit(f"not all answers arrived and were correct: {', '.join(bad)}")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", type=Path, default=Path("outputs/sft-merged"), help="folder of a merged chat model")
    parser.add_argument("--questions", type=Path, default=ROOT / "data/finetune/validation.jsonl", help="conversations")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--prompts", type=int, default=2, help="questions of each client")
    parser.add_argument("--max_new_tokens", type=int, default=32)
    parser.add_argument("--stream_share", type=float, default=0.5, help="share of requests that are streamed")
    parser.add_argument("--kill_share", type=float, default=0.0, help="share of requests that clients hang up on")
    parser.add_argument("--attacks", action="store_true", help="attack the server while the clients use it")
    parser.add_argument("--timeout", type=float, default=120, help="seconds after which a request is lost")
    parser.add_argument("--url", help="a running server, without /v1")
    parser.add_argument("--pid", type=int, help="its process, so that its memory can be read")
    parser.add_argument("--ours_flags", default="", help="further flags of openai_api.py, in one string")
    parser.add_argument("--vllm_venv", type=Path, help="environment with vLLM; measures vLLM as well")
    parser.add_argument("--vllm_flags", default="", help="further flags of vLLM, in one string")
    parser.add_argument("--output_file", type=Path, help="all numbers as JSON")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if not (args.model / "config.json").is_file():
        parser.error(f"--model {args.model} is not a model. bash scripts/run_pipeline.sh creates outputs/sft-merged")
    if args.url and (args.vllm_venv or args.ours_flags or args.vllm_flags):
        parser.error("--url measures a running server; it starts neither openai_api.py nor vLLM")
    if args.attacks and args.vllm_venv:
        parser.error("--attacks is for openai_api.py and --url; measure vLLM in a run of its own")
    if args.pid and not args.url:
        parser.error("--pid is for --url; the processes of servers started here are known")
    return args


def prepare(args: argparse.Namespace) -> list[list[Case]]:
    """The questions of each client, all with different answers."""
    from medicalgpt.args import DataArguments
    from medicalgpt.data.loading import load_data
    from medicalgpt.formats.conversion import to_messages
    from medicalgpt.serving.chat import ChatEngine
    from medicalgpt.serving.generation import Sampling

    engine = ChatEngine.from_pretrained(str(args.model), dtype="float32")
    sampling = Sampling(max_new_tokens=args.max_new_tokens, top_log_probs=2)
    asked = {}
    for row in load_data(DataArguments(train_file_dir=str(args.questions)), to_messages).train:
        messages = row["messages"]
        turns = [message["role"] for message in messages].index("assistant")
        asked.setdefault(json.dumps(messages[:turns]), messages[:turns])
    questions = list(asked.values())
    random.Random(args.seed).shuffle(questions)
    wanted = args.clients * args.prompts
    found: dict[str, Case] = {}
    for start in range(0, len(questions), 64):
        part = questions[start : start + 64]
        prompts = [engine.prompt_ids(messages) for messages in part]
        for messages, answer in zip(part, engine.batch(prompts, sampling, batch_size=32), strict=True):
            lead = min(score.top[0][1] - score.top[1][1] for score in answer.scores)
            if answer.text and lead > CLOSE:
                found.setdefault(answer.text, Case(messages, answer.text, answer.finish_reason))
        if len(found) >= wanted:
            break
    else:
        sys.exit(
            f"{args.questions} has {len(found)} questions with different answers, and {wanted} are needed: "
            "use fewer --clients or --prompts, more --max_new_tokens, or other --questions"
        )
    cases = list(found.values())[:wanted]
    return [cases[number :: args.clients] for number in range(args.clients)]


@contextmanager
def running(name: str, args: argparse.Namespace) -> Iterator[tuple[str, int | None]]:
    """Start the server, and stop it at the end; yields its address and its process."""
    if args.url:
        yield args.url.rstrip("/"), args.pid
        return
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        if name == "vLLM":
            command = ["bash", ROOT / "scripts/vllm_deployment.sh", *shlex.split(args.vllm_flags)]
            environment |= {"MODEL": str(args.model.resolve()), "PORT": str(port), "DTYPE": "float32"}
            environment |= {"VLLM_VENV": str(args.vllm_venv.absolute()), "LOG": str(Path(folder, "vllm.log"))}
            environment |= {"PYTHON": sys.executable}
        else:
            command = [sys.executable, ROOT / "openai_api.py", "--model_name_or_path", args.model.resolve()]
            command += ["--port", str(port), "--dtype", "float32", *shlex.split(args.ours_flags)]
        with open(log, "w") as output:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until_ready(url, process, log)
            yield url, process.pid
        finally:
            process.terminate()
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_until_ready(url: str, process: subprocess.Popen, log: Path) -> None:
    """Return when the server is healthy; exit with the end of its log if it exits before."""
    while True:
        try:
            if httpx.get(f"{url}/health", timeout=5, trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        if process.poll() is not None:
            sys.exit(f"{log.read_text()[-3000:]}\nthe server exited with {process.returncode} before it was ready")
        time.sleep(0.5)


async def measure(url: str, pid: int | None, cases: list[list[Case]], args: argparse.Namespace) -> dict[str, Any]:
    """Load the server and return the measurements."""
    key = os.environ.get("OPENAI_API_KEY") if args.url else None
    context = ssl.create_default_context()
    clients = [
        httpx.AsyncClient(
            base_url=f"{url}/v1/",
            # Each is a client of its own for the server, as behind a proxy.
            headers={"X-Forwarded-For": f"192.0.2.{number}"} | ({"Authorization": f"Bearer {key}"} if key else {}),
            timeout=args.timeout,
            verify=context,
            # Requests to this machine must not go through a proxy.
            trust_env=bool(args.url),
        )
        for number, _ in enumerate(cases)
    ]
    models = (await clients[0].get("models")).raise_for_status().json()
    load = Load(models["data"][0]["id"], {case.text for own in cases for case in own}, args)
    # Warm-up: the first requests include one-time allocation and compilation.
    await asyncio.gather(*(load.ask(http, own[0], streamed=True) for http, own in zip(clients, cases, strict=True)))

    server, sampled = psutil.Process(pid) if pid else None, []
    before, used, own_used = memory(server), cpu_seconds(server), time.process_time()
    began = time.perf_counter()
    watching = asyncio.create_task(watch(server, sampled))
    attacker = Attacker(url, load.model)
    with attacker.going_on(args.attacks):
        outcomes = await asyncio.gather(
            *(
                load.client(http, own, began + args.seconds, random.Random(f"{args.seed} {number}"))
                for number, (http, own) in enumerate(zip(clients, cases, strict=True))
            )
        )
    elapsed = time.perf_counter() - began
    used, own_used = cpu_seconds(server) - used, time.process_time() - own_used
    await asyncio.sleep(SETTLING)
    watching.cancel()
    after = memory(server)
    for http in clients:
        await http.aclose()
    found = summary([outcome for own in outcomes for outcome in own], elapsed)
    found |= {"server_cpu_seconds": used, "client_cpu_seconds": own_used}
    found |= attacker.summary()
    return found | {"memory_mb": {"before": before, "after": after, "peak": max([*sampled, before, after])}}


class Load:
    """Clients of one server.

    Args:
        model: its name on the server.
        answers: the expected answers to all questions of all clients.
        args: the command line.
    """

    def __init__(self, model: str, answers: set[str], args: argparse.Namespace):
        self.model = model
        self.answers = answers
        self.args = args

    async def client(
        self, http: httpx.AsyncClient, cases: Sequence[Case], until: float, draw: random.Random
    ) -> list[Outcome]:
        """Ask one question after the other; returns the outcomes."""
        outcomes = []
        while time.perf_counter() < until:
            streamed, killed = draw.random() < self.args.stream_share, draw.random() < self.args.kill_share
            patience = draw.uniform(0.02, 0.5) if killed else None
            outcomes.append(await self.ask(http, draw.choice(cases), streamed, patience))
            if outcomes[-1].kind == "refused":
                await asyncio.sleep(float(outcomes[-1].detail))
        return outcomes

    async def ask(self, http: httpx.AsyncClient, case: Case, streamed: bool, patience: float | None = None) -> Outcome:
        """Ask once.

        Args:
            patience: seconds after which the client hangs up.
        """
        body = {"model": self.model, "messages": case.messages, "temperature": 0, "stream": streamed}
        body |= {"max_tokens": self.args.max_new_tokens}
        if streamed:
            body["stream_options"] = {"include_usage": True}
        began = time.perf_counter()
        try:
            async with asyncio.timeout(patience):
                outcome = await (self._streamed if streamed else self._whole)(http, case, body, began)
        except TimeoutError:
            outcome = Outcome("killed")
        except httpx.TransportError as error:
            outcome = Outcome("lost", detail=repr(error))
        outcome.seconds = time.perf_counter() - began
        return outcome

    async def _whole(self, http: httpx.AsyncClient, case: Case, body: dict[str, Any], began: float) -> Outcome:
        response = await http.post("chat/completions", json=body)
        if response.status_code != 200:
            return failed_outcome(response)
        answer = response.json()
        (choice,) = answer["choices"]
        return self._judge(case, choice["message"]["content"], choice["finish_reason"], answer["usage"])

    async def _streamed(self, http: httpx.AsyncClient, case: Case, body: dict[str, Any], began: float) -> Outcome:
        text, finish_reason, usage, first, done = "", None, None, None, False
        async with http.stream("POST", "chat/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
                return failed_outcome(response)
            async for line in response.aiter_lines():
                if not line.startswith("data:"):
                    continue
                # Keep reading to the end, so that the connection can be reused.
                if done := line[5:].strip() == "[DONE]":
                    continue
                event = json.loads(line[5:])
                if "error" in event:
                    # A stream has begun when a request is dropped from a full queue.
                    if event["error"].get("code") == "queue_full":
                        return Outcome("refused", detail=WAIT_AFTER_STREAM)
                    return Outcome("error", detail=str(event["error"]))
                usage = event.get("usage") or usage
                for choice in event["choices"]:
                    piece = choice["delta"].get("content") or ""
                    if piece and first is None:
                        first = time.perf_counter() - began
                    text += piece
                    finish_reason = choice["finish_reason"] or finish_reason
        if not done:
            return Outcome("lost", detail="the stream ended without [DONE]")
        outcome = self._judge(case, text, finish_reason, usage)
        outcome.first = first
        return outcome

    def _judge(self, case: Case, text: str, finish_reason: str | None, usage: dict[str, int] | None) -> Outcome:
        if usage is None:
            return Outcome("error", detail="no usage was reported")
        tokens = usage["completion_tokens"]
        if (text, finish_reason) == (case.text, case.finish_reason):
            return Outcome("correct", tokens=tokens)
        kind = "mixed up" if text != case.text and text in self.answers else "wrong"
        expected = f"{case.text!r} ({case.finish_reason})"
        return Outcome(kind, tokens=tokens, detail=f"{text!r} ({finish_reason}) instead of {expected}")


def failed_outcome(response: httpx.Response) -> Outcome:
    """The outcome of a response whose status is not 200."""
    if response.status_code == 429 and "retry-after" in response.headers:
        return Outcome("refused", detail=response.headers["retry-after"])
    return Outcome("error", detail=f"{response.status_code}: {response.text[:200]}")


def processes(server: psutil.Process | None) -> list[psutil.Process]:
    """The server and all its child processes."""
    return [server, *server.children(recursive=True)] if server else []


def memory(server: psutil.Process | None) -> float:
    """Resident memory in MB; NaN if the process of the server is not known."""
    return sum(process.memory_info().rss for process in processes(server)) / 1e6 if server else float("nan")


def cpu_seconds(server: psutil.Process | None) -> float:
    """CPU time of all processes so far, in seconds."""
    times = [process.cpu_times() for process in processes(server)]
    return sum(time.user + time.system for time in times) if server else float("nan")


async def watch(server: psutil.Process | None, sampled: list[float]) -> None:
    """Record the memory twice a second."""
    while server:
        sampled.append(memory(server))
        await asyncio.sleep(0.5)


def summary(outcomes: list[Outcome], elapsed: float) -> dict[str, Any]:
    """Numbers of all requests of all clients."""
    counts = Counter(outcome.kind for outcome in outcomes)
    correct = [outcome for outcome in outcomes if outcome.kind == "correct"]
    details = Counter(f"{outcome.kind}: {outcome.detail}" for outcome in outcomes if outcome.kind in BAD)
    return {
        "requests": len(outcomes),
        **{kind: counts[kind] for kind in KINDS},
        "seconds": elapsed,
        "requests_per_second": len(correct) / elapsed,
        "tokens_per_second": sum(outcome.tokens for outcome in correct) / elapsed,
        "latency": percentiles([outcome.seconds for outcome in correct]),
        "first_text": percentiles([outcome.first for outcome in correct if outcome.first is not None]),
        "details": dict(details.most_common(5)),
    }


def percentiles(seconds: list[float]) -> dict[str, float]:
    """The 50th, 95th and 99th percentile; NaN if there are no values."""
    found = np.percentile(seconds, [50, 95, 99]).tolist() if seconds else [float("nan")] * 3
    return dict(zip(("p50", "p95", "p99"), found, strict=True))


def report(results: dict[str, dict[str, Any]]) -> None:
    """Print the table."""
    print(
        "\n| server | requests | mixed up | wrong | lost | errors | refused | hung up on "
        "| latency p50, p95, p99 (s) | first text p50, p95, p99 (s) | requests/s | tokens/s "
        "| memory before, after, peak (MB) | CPU s |"
    )
    print("|---" * 14 + "|")
    for name, result in results.items():
        counts = " | ".join(str(result[kind]) for kind in (*BAD, "refused", "killed"))
        times = (", ".join(f"{value:.2f}" for value in result[key].values()) for key in ("latency", "first_text"))
        print(
            f"| {name} | {result['requests']} | {counts} | {' | '.join(times)} | {result['requests_per_second']:.1f} | "
            f"{result['tokens_per_second']:,.0f} | "
            f"{', '.join(f'{value:,.0f}' for value in result['memory_mb'].values())} | "
            f"{result['server_cpu_seconds']:.0f} |"
        )


if __name__ == "__main__":
    main()
