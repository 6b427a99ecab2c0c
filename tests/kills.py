"""Run something in a forked process, and kill it by SIGKILL at a chosen change of the disk."""

import faulthandler
import gc
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

# After so many, it prints where it is, and ends.
SECONDS_TO_END = 120
# What Python reports before it changes the disk (see `sys.addaudithook`); also opening a file for reading.
CHANGES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree", "os.link")


def run_killed(action: Callable[[], object], folder: Path, moment: int | str | None) -> int:
    """Run `action` in another process, which dies before a change below `folder`.

    Args:
        moment: number of the change, from 0, or the beginning of its text (`os.rename checkpoint-2/manifest.json`);
            None lets it run to its end.

    Returns:
        Its exit code; -9 if it was killed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    # What the tests have left is not removed here: whatever waits for its threads would wait for ever.
    gc.freeze()
    faulthandler.dump_traceback_later(SECONDS_TO_END, exit=True)
    count = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal count
        if event in CHANGES and isinstance(args[0], str | os.PathLike) and str(args[0]).startswith(str(folder)):
            text = f"{event} {str(args[0]).removeprefix(str(folder)).lstrip('/')}"
            if count == moment or (isinstance(moment, str) and text.startswith(moment)):
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

    code = 1
    try:
        if moment is not None:
            sys.addaudithook(hook)
        action()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)
