"""How soon a server answers its probes while clients stream: seconds of /live, /ready and /health.

    python openai_api.py --model_name_or_path outputs/sft-merged
    python -m benchmarks.probes --url http://127.0.0.1:8000     # in another terminal

The clients run in a separate process, so that they do not delay the probes; for the server, each has its own address.
The key is in OPENAI_API_KEY, if the server has one.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import time

import httpx
import numpy as np

PATHS = ("/live", "/ready", "/health")
PROMPT = "感冒了怎么办？" * 10
MAX_TOKENS = 64
# From one round of probes to the next.
PAUSE = 0.02
# Until all clients have begun.
WARM_UP = 3.0


def headers() -> dict[str, str]:
    key = os.environ.get("OPENAI_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


async def _stream(url: str, model: str, number: int) -> None:
    body = {"model": model, "prompt": PROMPT, "max_tokens": MAX_TOKENS, "stream": True}
    own = headers() | {"X-Forwarded-For": f"192.0.2.{number}"}
    async with httpx.AsyncClient(base_url=url, headers=own, timeout=300, trust_env=False) as http:
        while True:
            async with http.stream("POST", "/v1/completions", json=body) as answer:
                answer.raise_for_status()
                async for _ in answer.aiter_lines():
                    pass


async def _stream_all(url: str, model: str, clients: int) -> None:
    await asyncio.gather(*(_stream(url, model, number) for number in range(clients)))


def load(url: str, model: str, clients: int) -> None:
    """Ask without end; the body of a process."""
    asyncio.run(_stream_all(url, model, clients))


def probe(url: str, seconds: float) -> dict[str, list[float]]:
    """Seconds that each request took, by path."""
    found: dict[str, list[float]] = {path: [] for path in PATHS}
    with httpx.Client(base_url=url, headers=headers(), timeout=60, trust_env=False) as http:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for path, times in found.items():
                began = time.perf_counter()
                http.get(path).raise_for_status()
                times.append(time.perf_counter() - began)
            time.sleep(PAUSE)
    return found


def measure(url: str, clients: int, seconds: float) -> dict[str, dict[str, float]]:
    """Milliseconds of the probes (p50, p99, maximum) and their number, while so many clients stream."""
    model = httpx.get(f"{url}/v1/models", headers=headers(), trust_env=False).raise_for_status().json()["data"][0]["id"]
    process = multiprocessing.get_context("spawn").Process(target=load, args=(url, model, clients), daemon=True)
    if clients:
        process.start()
        time.sleep(WARM_UP)
    try:
        found = probe(url, seconds)
        if clients and not process.is_alive():
            raise RuntimeError("the clients have ended before the probes")
    finally:
        if clients:
            process.kill()
            process.join()
    return {
        path: {
            "number": len(times),
            "p50": round(1000 * float(np.percentile(times, 50)), 1),
            "p99": round(1000 * float(np.percentile(times, 99)), 1),
            "max": round(1000 * max(times), 1),
        }
        for path, times in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="address of the server, without /v1")
    parser.add_argument("--clients", type=int, default=16, help="number of clients that stream; 0 for none")
    parser.add_argument("--seconds", type=float, default=30.0, help="how long the probes are asked for")
    args = parser.parse_args()
    print(json.dumps(measure(args.url, args.clients, args.seconds), indent=2))
    print(f"load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
