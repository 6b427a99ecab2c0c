"""What every test can rely on."""

import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator

import pytest
from loguru import logger

# Tokens are cached below the cache of datasets, which must be named before that library is imported.
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="medicalgpt-tests-")
atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

# A shell starts background jobs with SIGINT ignored, and programs started from there would ignore it as well: then no
# test of Ctrl-C could pass. A handler set here is the default again in every program that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
# So does nohup with SIGHUP.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


HANDLERS = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}


@pytest.fixture(autouse=True)
def signal_handlers() -> None:
    """A training program that a fixture or a test runs in this process handles signals until its process ends."""
    for number, handler in HANDLERS.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)


@pytest.fixture
def log() -> Iterator[list[str]]:
    """Lines that are logged from here on."""
    lines: list[str] = []
    sink = logger.add(lambda message: lines.append(message.record["message"]), level="INFO")
    yield lines
    logger.remove(sink)
