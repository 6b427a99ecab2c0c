"""Errors that the user can fix, printed without a traceback."""

import atexit
import errno
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import Any, NoReturn

from medicalgpt.logs import is_main_process, printable, rank, world_size

# Time for the first process to report an error that all processes meet, and to exit, before another one reports it.
SECONDS_TO_SPEAK = 10


# Errors of the system that come from the user's disks and paths, whatever was done when they occurred, and what helps.
USERS_ERRORS = {
    errno.ENOSPC: "The disk is full; free some space, or choose another --output_dir.",
    errno.EDQUOT: "The quota is used up; free some space, or choose another --output_dir.",
    errno.EACCES: "You may not read or write there; choose another place, or change its permissions.",
    errno.EPERM: "You may not read or write there; choose another place, or change its permissions.",
    errno.ENOENT: "Check the path.",
    errno.ENOTDIR: "Check the path; a part of it is a file.",
    errno.EISDIR: "Give the name of a file.",
    errno.EROFS: "Nothing can be written there; choose another place.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.ELOOP: "Remove the symbolic link that leads to itself.",
    errno.EMFILE: "Too many files are open; raise the limit: ulimit -n 65536",
    errno.EIO: "The disk or the network file system failed; try again, or choose another place.",
    errno.ESTALE: "The network file system has lost the file; try again.",
}


# The exit code of a run that was asked to stop, and can be continued by the same command (EX_TEMPFAIL of sysexits.h).
STOPPED = 75


class Stopped(BaseException):
    """A run ends because a signal asked it to. Like Ctrl-C, it is not an error that code may handle and go on."""


class UserError(Exception):
    """Something the user can fix. The message says what happened, where, and what to do."""


def run_main(main: Callable[[], None]) -> None:
    """Run a program: a `UserError` ends it with its message and exit code 1; `--debug` shows the traceback as well.

    So do errors of the system that only the user can fix: a full disk, a folder without permission, and the like. Of
    several processes one reports, see `fail`; one that fails because another has ended says nothing.

    Raises:
        SystemExit: with code 1 after a `UserError`, 75 (`STOPPED`) after `Stopped`, 130 after Ctrl-C, 141 if the reader
            of the output has gone.
    """
    # transformers has its own `--debug`, which takes a value; only the flag without a value is ours.
    debug = _take_bare_debug_flag(sys.argv)
    try:
        main()
        if world_size() > 1:
            _exit_at_once(0)
    except Stopped as stop:
        if debug:
            raise
        if is_main_process():
            print(f"\nstopped: {stop}", file=sys.stderr, flush=True)
        if world_size() > 1:
            _exit_at_once(STOPPED)
        sys.exit(STOPPED)
    except UserError as error:
        if debug:
            raise
        fail(str(error))
    except UnicodeEncodeError as error:
        # A path whose bytes are not UTF-8 has such characters in Python; files of records cannot name it.
        if debug or not re.search("[\udc80-\udcff]", error.object):
            raise
        fail(f"a file or folder has a name that is not UTF-8: {error.object[:200]!a}. Rename it.")
    except BrokenPipeError:
        # The reader of our output (head, less) has gone. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        if debug:
            raise
        print("\nstopped", file=sys.stderr, flush=True)
        sys.exit(130)
    except Exception as error:
        if debug:
            raise
        if message := _explain(error):
            fail(message)
        if isinstance(error, OSError) and error.errno in USERS_ERRORS and not is_lost_connection(error):
            fail(f"{error.strerror}{f': {error.filename}' if error.filename else ''}. {USERS_ERRORS[error.errno]}")
        if world_size() == 1:
            raise
        _end_with_the_others(error)


OUT_OF_MEMORY = re.compile(r"out of memory|can(no|')t allocate memory|bad_alloc|ALLOC_FAILED", flags=re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of a GPU or of the machine, in the words of any library."""
    kinds = (RuntimeError, OSError)
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, kinds) and OUT_OF_MEMORY.search(str(error)) is not None)


def _explain_memory(error: BaseException) -> str | None:
    if not is_out_of_memory(error):
        return None
    return f"memory ran out ({_first_line(error)}). Free some, or use a machine with more."


_explain: Callable[[BaseException], str | None] = _explain_memory


def explain_with(explain: Callable[[BaseException], str | None]) -> None:
    """From now on, `run_main` asks this function what to print for an error that is not a `UserError`.

    Args:
        explain: returns the message, or None for an error that it does not know.
    """
    global _explain
    _explain = explain


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


def fail(message: str, code: int = 1) -> NoReturn:
    """Print an error, once for all processes, and exit.

    Most errors are met by all processes: the first one reports it. If it does not, the error is not its own, and the
    process that has met it reports it, with its number, after `SECONDS_TO_SPEAK`.
    """
    if is_main_process():
        if _may_report():
            print(f"\nerror: {printable(message)}", file=sys.stderr, flush=True)
    elif not _reported_within(SECONDS_TO_SPEAK) and _may_report():
        print(f"\nerror in process {rank()}: {printable(message)}", file=sys.stderr, flush=True)
    if _process_group_exists():
        _exit_at_once(code)
    sys.exit(code)


# Words of the errors that gloo, NCCL and the store of the processes raise when another process has gone.
LOST_CONNECTION = re.compile(r"gloo|nccl|connection (reset|closed) by peer|broken pipe", flags=re.IGNORECASE)
# Time for a process that fails to be seen as such by the others, whose connections break at once.
SECONDS_TO_BE_SEEN = 2


def is_lost_connection(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is of the connection to another process."""
    while error is not None:
        kind = f"{type(error).__module__}.{type(error).__name__}"
        if kind.startswith(("torch.distributed", "torch._C._distributed")) or isinstance(error, ConnectionError):
            return True
        if isinstance(error, RuntimeError) and LOST_CONNECTION.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _end_with_the_others(error: Exception) -> NoReturn:
    """Exit silently if another process has reported why; otherwise report what is known: for a bug, its traceback."""
    lost = is_lost_connection(error)
    if not _reported_within(SECONDS_TO_BE_SEEN if lost else 0) and _may_report():
        if lost:
            why = "killed because memory ran out (see the system's log, dmesg), or its machine cannot be reached"
            ended = f"another process of the run has ended without a message, perhaps {why}"
            if _shared_store() is None:
                # With the store has gone what its process has reported.
                ended = f"process 0 has ended; if it has not said why, it was perhaps {why}"
            print(
                f"\nerror: {ended}; process {rank()} was waiting for it ({_first_line(error)}).\n  The traceback of "
                "this process: --debug",
                file=sys.stderr,
            )
        else:
            traceback.print_exception(error)
    _exit_at_once(1)


def _may_report() -> bool:
    """Whether no other process has reported an error; from now on, none will."""
    if (store := _shared_store()) is None:
        return True
    try:
        return store.compare_set(_REPORT_KEY, "", str(rank())) == str(rank()).encode()
    except (RuntimeError, ValueError):
        return True


def _reported_within(seconds: float) -> bool:
    """Whether another process reports an error within that time."""
    end, store = time.monotonic() + seconds, _shared_store()
    while True:
        try:
            if store is not None and store.check([_REPORT_KEY]):
                return True
        except (RuntimeError, ValueError):
            # The process that had the store has gone, and no other one could have reported here.
            store = None
        if (left := end - time.monotonic()) <= 0:
            return False
        time.sleep(min(left, 0.1 if store is not None else left))


_REPORT_KEY = f"medicalgpt/reported/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


@cache
def _shared_store() -> Any:
    """The key-value store of all processes, which torchrun keeps, or the first process; None if there is none."""
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if world_size() == 1 or not address or not port.isdecimal():
        return None
    try:
        # torch reports a store that has gone with a traceback of its own.
        socket.create_connection((address, int(port)), timeout=5).close()
    except OSError:
        return None
    from torch.distributed import TCPStore

    try:
        return TCPStore(address, int(port), is_master=False, wait_for_workers=False, timeout=timedelta(seconds=5))
    except (RuntimeError, ValueError):
        return None


def _process_group_exists() -> bool:
    # Without an import: most errors come before torch is loaded.
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized() and world_size() > 1


def _exit_at_once(code: int) -> NoReturn:
    """End a process of several before C++ libraries shut down.

    Threads of DeepSpeed and of the process group sometimes still run then and abort the process ("terminate called
    without an active exception"), which the launcher takes for another failure.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if code == 1 and is_main_process() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        # The store is in this process: the others have to see first that it has reported.
        time.sleep(SECONDS_TO_BE_SEEN)
    os._exit(code)


def _take_bare_debug_flag(argv: list[str]) -> bool:
    for index, token in enumerate(argv):
        if token == "--debug" and (index + 1 == len(argv) or argv[index + 1].startswith("--")):
            del argv[index]
            return True
    return False
