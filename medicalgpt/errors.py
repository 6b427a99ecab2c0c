"""Errors that the user can fix, printed without a traceback."""

import atexit
import errno
import os
import re
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from medicalgpt.logs import is_main_process, rank, world_size

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

    So do errors of the system that only the user can fix: a full disk, a folder without permission, and the like.

    Raises:
        SystemExit: with code 1 after a `UserError`, 75 (`STOPPED`) after `Stopped`, 130 after Ctrl-C, 141 if the reader
            of the output has gone.
    """
    # transformers has its own `--debug`, which takes a value; only the flag without a value is ours.
    debug = _take_bare_debug_flag(sys.argv)
    try:
        main()
        if world_size() > 1:
            _exit_at_once()
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
    except OSError as error:
        if debug or error.errno not in USERS_ERRORS:
            raise
        fail(f"{error.strerror}{f': {error.filename}' if error.filename else ''}. {USERS_ERRORS[error.errno]}")
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


def _exit_at_once(code: int = 0) -> NoReturn:
    """End a process of several, as planned, before C++ libraries shut down.

    Threads of DeepSpeed and of the process group sometimes still run then and abort a process that has finished and
    saved its work ("terminate called without an active exception"), which the launcher takes for a failed run.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _take_bare_debug_flag(argv: list[str]) -> bool:
    for index, token in enumerate(argv):
        if token == "--debug" and (index + 1 == len(argv) or argv[index + 1].startswith("--")):
            del argv[index]
            return True
    return False
