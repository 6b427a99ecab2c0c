"""What every test can rely on."""

import atexit
import gc
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator

from tests import fork_server

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


SECONDS_OF_A_SLOW_TEST = 3600


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A slow test may take longer than the limit in pyproject.toml, unless it has a limit of its own."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SECONDS_OF_A_SLOW_TEST))


def pytest_collection_finish() -> None:
    """Libraries and tests stay until the end; to look through them at each collection took a third of all the time."""
    gc.collect()
    gc.freeze()
    fork_server.environment_of_tests()


@pytest.fixture(autouse=True)
def signal_handlers() -> None:
    """A training program that a fixture or a test runs in this process handles signals until its process ends."""
    for number, handler in HANDLERS.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)


def restore(variables: dict[str, str]) -> None:
    """Undo changes of the environment: a program that runs in this process may set variables for its libraries."""
    for name in os.environ.keys() | variables.keys():
        if name != "PYTEST_CURRENT_TEST" and os.environ.get(name) != variables.get(name):
            if name in variables:
                os.environ[name] = variables[name]
            else:
                del os.environ[name]


@pytest.fixture(autouse=True, scope="module")
def environment_of_module() -> Iterator[None]:
    before = dict(os.environ)
    yield
    restore(before)


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    before = dict(os.environ)
    yield
    restore(before)


# How a program knows that it is one of several processes.
OF_SEVERAL = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def leave_group() -> list[str]:
    """Make this process one that is alone; returns what had made it one of several."""
    left = [name for name in OF_SEVERAL if os.environ.pop(name, None) is not None]
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
        left.append("a process group")
    state = sys.modules.get("accelerate.state")
    if state is not None and state.PartialState._shared_state.get("backend"):
        state.AcceleratorState._reset_state(reset_partial_state=True)
        left.append("a distributed state of accelerate")
    return left


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    """A test leaves this process as one that is alone: the next ones would wait for others, perhaps for ever."""
    yield
    if left := leave_group():
        pytest.fail(f"the test leaves {', '.join(left)} in the process of the tests")


@pytest.fixture
def grouped() -> Iterator[None]:
    """For a test that makes this process one of several, as `--deepspeed` does."""
    yield
    leave_group()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """On tensors as small as those of most tests, threads only wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def log() -> Iterator[list[str]]:
    """Lines that are logged from here on."""
    lines: list[str] = []
    sink = logger.add(lambda message: lines.append(message.record["message"]), level="INFO")
    yield lines
    logger.remove(sink)
