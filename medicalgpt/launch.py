"""torchrun, which ends without a traceback of its own when a process of the run has reported an error.

python -m medicalgpt.launch --standalone --nproc_per_node 2 supervised_finetuning.py ...

The flags are those of torchrun. The exit code is that of the process that failed first; 128 plus the number of a signal
that killed it; 75 if another host could not be reached, so that the same command may succeed later. A signal to
torchrun itself is passed on to the processes, which have 10 minutes to save a checkpoint, or as many seconds as
TORCH_ELASTIC_SHUTDOWN_TIMEOUT says; then the exit code is theirs as well. As soon as one of them has failed, or the
other hosts are lost, the rest have 30 seconds: they may wait for it in a collective operation, and can save nothing.

With several hosts, torchrun starts the processes again (`--max_restarts`) only while it is connected to the host of
`--rdzv_endpoint`; without that connection it waits for ever, even for processes that have ended. Then this module
starts it again, as often as `--max_restarts` says.
"""

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from subprocess import Popen
from typing import Any, NoReturn

import psutil
from torch.distributed import DistError
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError, RendezvousTimeoutError
from torch.distributed.launcher import api
from torch.distributed.run import main, parse_args

# The exit code of a process that was asked to stop and has saved a checkpoint (see errors.py), or that has lost the
# other hosts: the same command continues.
STOPPED = 75
ATTEMPT = "MEDICALGPT_LAUNCH_ATTEMPT"
SECONDS_TO_RETRY = 5
# torchrun notices within a tenth of a second that a process has ended, unless it waits for a lost connection.
SECONDS_TO_NOTICE = 15
# Time to end for the processes that are left when one has failed; it is torchrun's own.
SECONDS_AFTER_FAILURE = 30


class Agent(LocalElasticAgent):
    """torchrun's agent, which waits only for processes that can still end as planned.

    Attributes:
        exit_codes: of its processes, once it has ended them.
        attends: whether it is looking at its processes, or ending them.
    """

    exit_codes: list[int] = []
    attends = False

    def _invoke_run(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._invoke_run(*args, **kwargs)
        except SignalException:
            raise
        except Exception:
            # The other hosts are lost.
            self._shutdown_timeout = min(self._shutdown_timeout, SECONDS_AFTER_FAILURE)
            raise

    def _monitor_workers(self, *args: Any, **kwargs: Any) -> Any:
        Agent.attends = True
        try:
            return super()._monitor_workers(*args, **kwargs)
        finally:
            Agent.attends = False

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = SECONDS_AFTER_FAILURE) -> None:
        Agent.attends = True
        processes = [handler.proc for handler in self._pcontext.subprocess_handlers.values()] if self._pcontext else []
        _end(processes, death_sig, timeout)
        # What is left is killed.
        super()._shutdown(death_sig, timeout=1)
        Agent.attends = False
        Agent.exit_codes = [process.returncode for process in processes]


def _end(processes: Sequence[Popen], death_sig: signal.Signals, timeout: float) -> None:
    """Ask processes to end, and wait until they have: so many seconds, or `SECONDS_AFTER_FAILURE` once one failed."""
    for process in processes:
        if process.poll() is None:
            # With its children, as torchrun does.
            os.killpg(process.pid, death_sig)
    limit = time.monotonic() + timeout
    while None in (codes := [process.poll() for process in processes]) and time.monotonic() < limit:
        if set(codes) - {None, 0, STOPPED}:
            limit = min(limit, time.monotonic() + SECONDS_AFTER_FAILURE)
        time.sleep(0.1)


def _exit_code(code: int) -> int:
    return code if code >= 0 else 128 - code


def launch() -> None:
    """Run torchrun with the flags of the command line; it ends the process with the exit code described above."""
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    api.LocalElasticAgent = Agent
    args = parse_args(sys.argv[1:])
    if not args.standalone:
        threading.Thread(target=_watch, args=(args,), daemon=True).start()
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
    except (RendezvousError, DistError) as error:
        _try_again(describe(error, args), args)


def _watch(args: argparse.Namespace) -> None:
    """Try again when processes of the run have ended and torchrun does not notice."""
    since: dict[int, float] = {}
    while True:
        time.sleep(1)
        children = psutil.Process().children()
        ended = [child.pid for child in children if child.status() == psutil.STATUS_ZOMBIE]
        # While torchrun ends the processes, it may wait for one and not yet look at the next.
        since = {} if Agent.attends else {pid: since.get(pid, time.monotonic()) for pid in ended}
        if since and time.monotonic() - min(since.values()) > SECONDS_TO_NOTICE:
            for child in children:
                child.send_signal(signal.SIGKILL)
                # The program that replaces this one must not find it again.
                os.waitpid(child.pid, 0)
            reason = f"processes of this host have ended, and it has no connection to {args.rdzv_endpoint}"
            _try_again(f"{reason} (--rdzv_endpoint).", args)


def describe(error: Exception, args: argparse.Namespace) -> str:
    """What a failure to meet the other hosts means."""
    if isinstance(error, RendezvousTimeoutError):
        return (
            f"fewer than {args.nnodes} hosts have come to {args.rdzv_endpoint} (--rdzv_endpoint) in time. Give the "
            "same command on each of them."
        )
    return (
        f"{args.rdzv_endpoint} (--rdzv_endpoint) cannot be reached from this host "
        f"({' '.join(str(error).split())[:160]}). Start the command on that host as well, and check its name, its port "
        "and the network."
    )


def _try_again(reason: str, args: argparse.Namespace) -> NoReturn:
    """Run the command again in place of this process, or exit if that was done `--max_restarts` times."""
    attempt = int(os.environ.get(ATTEMPT, "0"))
    print(f"\nerror: {reason}", file=sys.stderr, flush=True)
    if args.standalone or attempt >= args.max_restarts:
        os._exit(STOPPED)
    print(f"trying again ({attempt + 1} of {args.max_restarts})", file=sys.stderr, flush=True)
    time.sleep(SECONDS_TO_RETRY)
    os.environ[ATTEMPT] = str(attempt + 1)
    # The port of the store must be free.
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os.execv(sys.executable, [sys.executable, "-m", "medicalgpt.launch", *sys.argv[1:]])


if __name__ == "__main__":
    launch()
