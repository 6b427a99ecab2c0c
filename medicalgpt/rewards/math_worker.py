"""Compare two mathematical answers with math-verify, in a separate process.

A model in training writes whatever is rewarded, including `9^{9^{9}}`. The process is killed at its time limit by a
signal that also stops code that never returns to Python, and the next comparison starts a new one. math-verify's own
limit is an exception raised by a signal handler: it works only in the main thread, and not while a large power is
computed.
"""

import atexit
import json
import logging
import resource
import signal
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from threading import Lock

from medicalgpt.errors import UserError

from loguru import logger

# CPU time, so that a busy machine does not turn a correct answer into a wrong one. Most comparisons take 0.01 s.
TIME_LIMIT = 2.0  # seconds
MEMORY_LIMIT = 2 << 30  # bytes of address space
LONGEST_ANSWER = 500  # characters; results are shorter, and the parser's time grows faster than the length

_worker: subprocess.Popen | None = None
_lock = Lock()


@lru_cache(maxsize=4096)
def same_value(gold: str, answer: str) -> bool:
    """Whether `answer` is mathematically equal to `gold`; both are LaTeX or plain arithmetic, without `$`.

    What cannot be parsed, is longer than `LONGEST_ANSWER`, or exceeds `TIME_LIMIT` or `MEMORY_LIMIT` counts as not
    equal; exceeding a limit is logged. Thread-safe.

    Raises:
        UserError: the process does not start.
    """
    if max(len(gold), len(answer)) > LONGEST_ANSWER:
        return False
    with _lock:
        worker = _running_worker()
        try:
            worker.stdin.write(json.dumps([gold, answer]) + "\n")
            worker.stdin.flush()
            reply = worker.stdout.readline()
        except BrokenPipeError:
            reply = ""
        if not reply:
            stop_worker()
            logger.warning(
                f"no result within {TIME_LIMIT:g} s and {MEMORY_LIMIT >> 30} GB, counted as wrong: {answer[:80]!r}"
            )
            return False
    return json.loads(reply)


def _running_worker() -> subprocess.Popen:
    global _worker
    if _worker is None or _worker.poll() is not None:
        # Not multiprocessing: its children import the training program again, or copy the state of a GPU.
        _worker = subprocess.Popen(
            [sys.executable, "-m", "medicalgpt.rewards.math_worker"],
            cwd=Path(__file__).resolve().parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        if _worker.stdout.readline() != "ready\n":
            stop_worker()
            raise UserError(
                "The process that compares mathematical answers does not start. To see why:\n"
                "    python -m medicalgpt.rewards.math_worker </dev/null\n"
                "If math-verify is missing: pip install -r requirements.txt"
            )
    return _worker


@atexit.register
def stop_worker() -> None:
    """Kill the process; the next comparison starts a new one."""
    global _worker
    if _worker is not None:
        _worker.kill()
        _worker.communicate()
        _worker = None


def serve() -> None:
    """Read lines of JSON `[gold, answer]` and answer each with a line `true` or `false`, until the input ends."""
    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable()
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    # Not ExprExtractionConfig, which goes through Python's eval; this one has a grammar.
    latex = [LatexExtractionConfig()]
    print("ready", flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, TIME_LIMIT)
        gold, answer = (
            parse(f"${text}$", latex, fallback_mode="no_fallback", parsing_timeout=None) for text in json.loads(line)
        )
        same = verify(gold, answer, timeout_seconds=None)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(bool(same)), flush=True)


if __name__ == "__main__":
    serve()
