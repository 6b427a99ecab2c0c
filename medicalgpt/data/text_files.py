"""Text files: one pass over the bytes gives hash and encoding, and the lines too if the file is small."""

import codecs
import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from medicalgpt.errors import UserError

from loguru import logger

# A file up to this size is kept in memory while its rows are read, so that it is read from disk once.
MAX_HELD_BYTES = 16 * 1024 * 1024
BLOCK_BYTES = 64 * 1024


@dataclass(frozen=True)
class TextFile:
    """A text file with its hash and its encoding.

    Attributes:
        sha256: of its bytes, as hex.
        encoding: `utf-8-sig` or `gb18030`.
        content: the bytes of a file of at most `MAX_HELD_BYTES`; a larger file is read again for its lines.
    """

    path: Path
    sha256: str
    encoding: str
    content: bytes | None = None

    def text(self) -> str:
        """The entire text."""
        content = self.path.read_bytes() if self.content is None else self.content
        return content.decode(self.encoding)

    def lines(self) -> Iterator[tuple[int, str]]:
        """Numbers and texts of the lines that are not blank, without line ends; one line at a time."""
        binary = self.path.open("rb") if self.content is None else io.BytesIO(self.content)
        # Only a line feed ends a line: U+2028 and the like are allowed inside a string of JSON.
        with io.TextIOWrapper(binary, encoding=self.encoding, newline="\n") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line.removesuffix("\n") if not line.endswith("\r\n") else line[:-2]


def open_text(path: str | Path) -> TextFile:
    """Hash a file and find its encoding, gb18030 with a notice.

    Raises:
        UserError: it is neither UTF-8 nor gb18030.
    """
    path = Path(path)
    content = path.read_bytes() if path.stat().st_size <= MAX_HELD_BYTES else None
    digest, utf8, is_utf8 = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")(), True
    for block in _blocks(path, content):
        digest.update(block)
        is_utf8 = is_utf8 and _accepts(utf8, block)
    if is_utf8 and _accepts(utf8, b"", final=True):
        return TextFile(path, digest.hexdigest(), "utf-8-sig", content)
    gb18030 = codecs.getincrementaldecoder("gb18030")()
    if not (all(_accepts(gb18030, block) for block in _blocks(path, content)) and _accepts(gb18030, b"", final=True)):
        line = _first_line_not_utf8(path)
        raise UserError(f"{path}:{line}: neither UTF-8 nor gb18030 text. Save the file as UTF-8.")
    logger.warning(f"{path} is not UTF-8; it was read as gb18030")
    return TextFile(path, digest.hexdigest(), "gb18030", content)


def _blocks(path: Path, content: bytes | None) -> Iterator[bytes]:
    with path.open("rb") if content is None else io.BytesIO(content) as file:
        while block := file.read(BLOCK_BYTES):
            yield block


def _accepts(decoder: codecs.IncrementalDecoder, block: bytes, final: bool = False) -> bool:
    try:
        decoder.decode(block, final)
    except UnicodeDecodeError:
        return False
    return True


def _first_line_not_utf8(path: Path) -> int:
    # The byte of a line feed is never part of another character.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not _accepts(codecs.getincrementaldecoder("utf-8")(), line, final=True):
                return number
    raise ValueError(f"{path} is UTF-8")
