"""One kind of log for all programs: plain lines on stderr, from the first process only."""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from loguru import logger


def is_main_process() -> bool:
    """Whether this process speaks for all that torchrun started."""
    return int(os.environ.get("RANK", "0")) == 0


def setup_logging() -> None:
    """Send the log to stderr, and show libraries' progress bars only where a person watches a terminal."""
    logger.remove()
    if is_main_process():
        logger.add(sys.stderr, format="<level>{level: <7}</level> {message}", level="INFO")
    if not is_main_process() or not sys.stderr.isatty():
        import datasets
        from transformers.utils.logging import disable_progress_bar

        datasets.disable_progress_bars()
        disable_progress_bar()


SIGN_OF_LIFE_SECONDS = 30


@contextmanager
def signs_of_life(text: Callable[[], str]) -> Iterator[None]:
    """Log `text()` every 30 s for as long as the block runs."""
    done = threading.Event()

    def speak() -> None:
        while not done.wait(SIGN_OF_LIFE_SECONDS):
            logger.info(text())

    speaker = threading.Thread(target=speak, daemon=True)
    speaker.start()
    try:
        yield
    finally:
        done.set()
        speaker.join()
