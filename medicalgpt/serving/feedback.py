"""Judged answers of a page's visitors, one JSON row per line, appended to a file."""

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from medicalgpt.errors import UserError

MAX_ROW_BYTES = 1_000_000
MAX_FILE_BYTES = 2_000_000_000


class FeedbackFile:
    """A .jsonl file that only grows: several threads and programs may append to it at the same time.

    A new file is readable by its owner only, since it holds what visitors wrote.

    Args:
        path: of the file; its folder exists.

    Raises:
        UserError: it cannot be written.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if self.path.suffix != ".jsonl":
            raise UserError(f"--feedback_file {path} must end with .jsonl: it gets one JSON object per line.")
        try:
            os.close(self._open())
        except OSError as error:
            raise UserError(
                f"--feedback_file {path} cannot be written ({error.strerror}); choose a file in an existing folder."
            ) from error

    def append(self, row: dict[str, Any]) -> None:
        """Add a row as one complete line, or nothing.

        Raises:
            UserError: the row or the file is too large.
            OSError: it cannot be written, because the disk is full for example.
        """
        data = f"{json.dumps(row, ensure_ascii=False)}\n".encode()
        if len(data) > MAX_ROW_BYTES:
            raise UserError(f"The conversation has {len(data)} bytes, and at most {MAX_ROW_BYTES} are recorded.")
        file = self._open()
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            end = os.fstat(file).st_size
            # A program that was killed may have left half a line.
            if end and os.pread(file, 1, end - 1) != b"\n":
                data = b"\n" + data
            if end + len(data) > MAX_FILE_BYTES:
                raise UserError("No more feedback is recorded: the file is full.")
            try:
                written = os.write(file, data)
                if written < len(data):
                    raise OSError("the disk is full")
            except OSError:
                os.ftruncate(file, end)
                raise
        finally:
            os.close(file)

    def _open(self) -> int:
        return os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
