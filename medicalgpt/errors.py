"""Errors that the user can fix, printed without a traceback."""

import atexit
import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from medicalgpt.logs import is_main_process, rank, world_size

# Time for the first process to report an error that all processes meet, and to exit, before another one reports it.
SECONDS_TO_SPEAK = 10


class UserError(Exception):
    """Something the user can fix. The message says what happened, where, and what to do."""


def run_main(main: Callable[[], None]) -> None:
    """Run a program: a `UserError` ends it with its message and exit code 1; `--debug` shows the traceback as well.

    Raises:
        SystemExit: with code 1 after a `UserError`, 130 after Ctrl-C, 141 if the reader of the output has gone.
    """
    # transformers has its own `--debug`, which takes a value; only the flag without a value is ours.
    debug = _take_bare_debug_flag(sys.argv)
    try:
        main()
        if world_size() > 1:
            _exit_at_once()
    except UserError as error:
        if debug:
            raise
        fail(str(error))
    except BrokenPipeError:
        # The reader of our output (head, less) has gone. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        if debug:
            raise
        print("\nstopped", file=sys.stderr, flush=True)
        sys.exit(130)


def fail(message: str, code: int = 1) -> NoReturn:
    """Print an error, once for all processes, and exit.

    Most errors are met by all processes: the first one reports it, and its end makes the launcher end the others
    before they have waited for `SECONDS_TO_SPEAK`. Another one reports an error that the first does not meet.
    """
    if is_main_process():
        print(f"\nerror: {message}", file=sys.stderr, flush=True)
    else:
        time.sleep(SECONDS_TO_SPEAK)
        print(f"\nerror in process {rank()}: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


def _exit_at_once() -> NoReturn:
    """End a process of several, with success, before C++ libraries shut down.

    Threads of DeepSpeed and of the process group sometimes still run then and abort a process that has finished and
    saved its work ("terminate called without an active exception"), which the launcher takes for a failed run.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _take_bare_debug_flag(argv: list[str]) -> bool:
    for index, token in enumerate(argv):
        if token == "--debug" and (index + 1 == len(argv) or argv[index + 1].startswith("--")):
            del argv[index]
            return True
    return False
