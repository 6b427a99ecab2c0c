"""torchrun, which ends without a traceback of its own when a process of the run has reported an error.

python -m medicalgpt.launch --standalone --nproc_per_node 2 supervised_finetuning.py ...

The flags are those of torchrun. The exit code is that of the process that failed first; 128 plus the number of a signal
that killed it. A signal to torchrun itself is passed on to the processes, which have 10 minutes to save a checkpoint,
or as many seconds as TORCH_ELASTIC_SHUTDOWN_TIMEOUT says; then the exit code is theirs as well.
"""

import os
import signal
import sys
from typing import Any

from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher import api
from torch.distributed.run import main

# The exit code of a process that was asked to stop and has saved a checkpoint (see errors.py).
STOPPED = 75


class Agent(LocalElasticAgent):
    """torchrun's agent, which remembers how its processes ended."""

    exit_codes: list[int] = []

    def _shutdown(self, *args: Any, **kwargs: Any) -> None:
        super()._shutdown(*args, **kwargs)
        handlers = self._pcontext.subprocess_handlers.values() if self._pcontext else ()
        Agent.exit_codes = [handler.proc.returncode for handler in handlers]


def _exit_code(code: int) -> int:
    return code if code >= 0 else 128 - code


def launch() -> None:
    """Run torchrun with the flags of the command line; it ends the process with the exit code described above."""
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    api.LocalElasticAgent = Agent
    try:
        main()
    except ChildFailedError as error:
        number, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            why = "; if nobody did that, memory ran out (see dmesg)" if name == "SIGKILL" else ""
            print(f"\nerror: process {number} was killed by {name}{why}", file=sys.stderr)
        sys.exit(_exit_code(failure.exitcode))
    except SignalException as stop:
        codes = {_exit_code(code) for code in Agent.exit_codes} or {128 + stop.sigval}
        # Of several, that of a process which was not stopped as planned.
        sys.exit(max(codes - {0, STOPPED}, default=max(codes)))


if __name__ == "__main__":
    launch()
