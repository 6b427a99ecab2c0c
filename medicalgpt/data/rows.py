"""Rows on disk, so that memory does not grow with their number."""

import hashlib
import json
import os
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from medicalgpt.errors import UserError

import numpy as np


class Rows(Sequence):
    """An immutable sequence of JSON objects in a temporary file; each costs 16 bytes of memory.

    The file is in the system's temporary folder (`TMPDIR` chooses another), has no name there, and disappears with the
    last `Rows` that needs it. Processes forked from this one can read it.

    Args:
        rows: dicts that JSON can hold; they are reloaded unchanged.

    Raises:
        UserError: the temporary folder has no space for them.
    """

    def __init__(self, rows: Iterable[dict[str, Any]] = ()):
        self._file = tempfile.TemporaryFile(prefix="medicalgpt-rows-")
        bounds = array("q", [0])
        for row in rows:
            bounds.append(bounds[-1] + self._write(json.dumps(row, ensure_ascii=False).encode()))
        self._write(b"")
        ends = np.array(bounds, dtype=np.int64)
        self._starts, self._ends = ends[:-1], ends[1:]

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.select(index)
        return json.loads(self._raw(index))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (json.loads(self._raw(index)) for index in range(len(self)))

    def select(self, index: slice | np.ndarray) -> "Rows":
        """The rows at these positions, or where a mask is true, in the same file."""
        chosen = object.__new__(Rows)
        chosen._file = self._file
        chosen._starts, chosen._ends = self._starts[index], self._ends[index]
        return chosen

    def digest(self) -> str:
        """SHA-256 of all rows in their order, as hex."""
        digest = hashlib.sha256()
        for index in range(len(self)):
            digest.update(self._raw(index) + b"\n")
        return digest.hexdigest()

    def _write(self, text: bytes) -> int:
        try:
            written = self._file.write(text)
            if not text:
                self._file.flush()
        except OSError as error:
            raise UserError(
                f"the rows could not be written to {tempfile.gettempdir()} ({error}). Free some space, or set TMPDIR "
                "to a folder on a larger disk."
            ) from error
        return written

    def _raw(self, index: int) -> bytes:
        start = int(self._starts[index])
        # pread, since forked processes share the position of the file.
        return os.pread(self._file.fileno(), int(self._ends[index]) - start, start)


def on_disk(rows: Sequence[dict[str, Any]]) -> Rows:
    """The rows themselves if they are `Rows`, a copy of them on disk otherwise."""
    return rows if isinstance(rows, Rows) else Rows(rows)
