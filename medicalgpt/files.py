"""What programs do with files whatever is in them: hash them, and replace them in one step."""

import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def hash_file(path: str | Path) -> str:
    """SHA-256 of a file, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: str | Path, data: str | bytes, mode: int = 0o666) -> None:
    """Write a file under another name next to `path`, then rename it, so that a reader never sees half of it.

    Args:
        data: the entire content; text is written as UTF-8.
        mode: permissions of the file, less those that the umask takes away.

    Raises:
        OSError: it cannot be written; what was at `path` before is still there, and nothing else is left.
    """
    path = Path(path)
    # Each writer has its own name: several processes may write the same file.
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def open_new(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A path to write a new file to, which becomes `path` when the block ends, and is removed if it fails.

    Args:
        overwrite: replace a file that is there, once the new one is complete.

    Raises:
        FileExistsError: something is there already.
        OSError: it cannot be written.
    """
    path = Path(path)
    if path.is_dir() or (path.exists() and not overwrite):
        raise FileExistsError(f"{path} exists")
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        if overwrite:
            partial.replace(path)
        else:
            _rename_if_free(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _rename_if_free(partial: Path, path: Path) -> None:
    try:
        # Unlike a rename, a link fails if another program has made the file in the meantime.
        os.link(partial, path)
    except FileExistsError:
        raise
    except OSError:
        # A file system without links.
        if path.exists():
            raise FileExistsError(f"{path} exists") from None
        partial.rename(path)
