"""Several processes of a run, forked from the test: what it has imported, they need not import again."""

import gc
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any


def run_ranks(function: Callable[..., Any], processes: int, *args: Any, log: Path, timeout: float = 300) -> list[Any]:
    """Call `function(*args)` in so many processes with the environment of torchrun; returns what each returned.

    Args:
        function: of this module or another one that can be imported; what it returns is sent through a pipe.
        log: a folder for what each process prints.
        timeout: seconds for all of them together.

    Raises:
        AssertionError: one of them failed or did not end, with what it printed.
    """
    context = multiprocessing.get_context("fork")
    log.mkdir(parents=True, exist_ok=True)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    running = []
    for rank in range(processes):
        receive, send = context.Pipe(duplex=False)
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        environment = {**place, **{name: str(value) for name, value in numbers.items()}} if processes > 1 else {}
        # Not a daemon, which may have no children: workers of a loader are.
        process = context.Process(target=_call, args=(function, args, environment, send, log / f"rank{rank}.txt"))
        process.start()
        send.close()
        running.append((process, receive))
    results = []
    try:
        for rank, (_, receive) in enumerate(running):
            try:
                problem, result = receive.recv() if receive.poll(timeout) else ("did not end", None)
            except EOFError:
                problem, result = "ended without a result", None
            if problem:
                printed = (log / f"rank{rank}.txt").read_text(encoding="utf-8", errors="replace")
                raise AssertionError(f"process {rank}: {problem}\n{printed[-4000:]}")
            results.append(result)
    finally:
        for process, _ in running:
            if len(results) < processes:
                process.kill()
            process.join()
    return results


def _free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _call(function: Callable[..., Any], args: tuple, environment: dict[str, str], send: Any, log: Path) -> None:
    # What the tests have left is not removed here: whatever waits for its threads would wait for ever.
    gc.freeze()
    import torch
    from accelerate.state import AcceleratorState, GradientState, PartialState

    with open(log, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        os.environ.update(environment)
        torch.set_num_threads(1)
        # What the test itself has trained, on one process, is not part of this run.
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        try:
            send.send((None, function(*args)))
        except BaseException:
            send.send((traceback.format_exc(), None))
        file.flush()
    # Threads of the process group may still run.
    os._exit(0)
