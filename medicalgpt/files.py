"""What programs do with files whatever is in them: hash, compare and remove them, and replace them in one step."""

import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medicalgpt.errors import UserError


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


def sync(path: str | Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk, so that a power failure cannot undo them."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as error:
        # Some file systems cannot do it for a folder.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(file)


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


def overlap(output: str | Path, source: str | Path) -> str | None:
    """How writing to `output` could touch `source`: it `is` it, `contains` it, or `is inside` it; else None.

    Files and folders are compared by identity, so that links and other spellings of a path make no difference.
    `source` exists; `output` may not.
    """
    found = Path(source)
    inner = [found.absolute(), *found.absolute().parents]
    if (resolved := found.resolve()) != found.absolute():
        # A link in the output folder would be lost as well as what it points to.
        inner += [resolved, *resolved.parents]
    outer = Path(output).resolve()
    if outer.exists() and any(_is_same(outer, path) for path in (inner[0], resolved)):
        return "is"
    if outer.is_dir() and any(_is_same(outer, path) for path in inner):
        return "contains"
    if found.is_dir() and any(_is_same(found, path) for path in outer.parents if path.exists()):
        return "is inside"
    return None


def _is_same(path: Path, other: Path) -> bool:
    return path.exists() and other.exists() and os.path.samefile(path, other)


def refuse_overwriting(flag: str, output: str | Path | None, sources: dict[str, str | Path | None]) -> None:
    """Refuse an output file that is one of the files that the program reads.

    Args:
        flag: the flag that names the output.
        sources: path by the flag that names it.

    Raises:
        UserError: it names both paths.
    """
    for source_flag, source in sources.items():
        if output and source and _is_same(Path(output), Path(source)):
            raise UserError(f"{flag} {output} would overwrite {source_flag} {source}. Choose another {flag}.")


def remove_entry(path: Path) -> None:
    """Remove a file, or a folder with all that it contains; of a link, the link alone. One that is missing is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
