"""One kind of log for all programs: plain lines on stderr, from the first process only."""

import os
import sys

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
