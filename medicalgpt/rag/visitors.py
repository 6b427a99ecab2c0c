"""Files that visitors of a page upload: read within limits, shown by safe names."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from medicalgpt.errors import UserError
from medicalgpt.rag.documents import read_document
from medicalgpt.rag.retrieval import Passage, split

FILES_OF_A_VISITOR = 20
CHARS_OF_A_VISITOR = 5_000_000


def take_uploads(
    paths: Sequence[str],
    had: Sequence[Passage],
    release: Callable[[Path], None],
    *,
    size: int,
    overlap: int,
    encoding: str | None = None,
) -> tuple[list[Passage], list[str]]:
    """Read a visitor's files and release them.

    Args:
        had: the visitor's passages so far.
        release: called with each path once it was read.
        size, overlap: of passages, see `split`.

    Returns:
        All of the visitor's passages, and messages about them.
    """
    passages, messages = list(had), []
    for path in map(Path, paths):
        name = safe_name(path.name)
        # A file of the same name replaces the earlier one.
        others = [passage for passage in passages if passage.file != name]
        try:
            if len({passage.file for passage in others}) >= FILES_OF_A_VISITOR:
                raise UserError(f"{name}: at most {FILES_OF_A_VISITOR} files are accepted.")
            document = read_document(path, encoding=encoding)
            found = split(name, document.units, size, overlap)
            if sum(len(passage.text) for passage in (*others, *found)) > CHARS_OF_A_VISITOR:
                raise UserError(f"{name}: your files have more than {CHARS_OF_A_VISITOR} characters together.")
            passages = others + found
            messages += [f"{name}: {notice}" for notice in document.notices]
        except UserError as error:
            messages.append(str(error).replace(str(path), name))
        finally:
            release(path)
    return passages, [*dict.fromkeys(passage.file for passage in passages), *messages]


def safe_name(name: str) -> str:
    """A visitor's file name for display: no path, one line, not long. It is never used to open a file."""
    name = re.sub(r"[^\w.() -]", "_", re.split(r"[/\\]", name)[-1])
    return name[-80:].lstrip(". ") or "file"
