"""Text files: one pass over the bytes gives hash and encoding, and the lines too if the file is small."""

import codecs
import hashlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from medicalgpt.encodings import (
    OTHER_THAN_UTF8,
    SAMPLE_BYTES,
    Found,
    find_encoding,
    lookup_encoding,
    sample_lines,
    sample_of,
)
from medicalgpt.errors import UserError

from loguru import logger

# A file up to this size is kept in memory while its rows are read, so that it is read from disk once.
MAX_HELD_BYTES = 16 * 1024 * 1024
BLOCK_BYTES = 64 * 1024
UTF8_CHARACTERS = re.compile(rb"(?:[\xe1-\xef][\x80-\xbf]{2}.*){2}")


@dataclass(frozen=True)
class TextFile:
    """A text file with its hash and its encoding.

    Attributes:
        sha256: of its bytes, as hex.
        encoding: `utf-8-sig`, or the one that was found or named.
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


def open_text(path: str | Path, encoding: str | None = None) -> TextFile:
    """Hash a file and find its encoding; one that is not UTF-8 is named in the log with a decoded line.

    Args:
        encoding: of a file that is not UTF-8; None finds it.

    Raises:
        UserError: it is in no encoding, or it is not certain in which one.
    """
    path = Path(path)
    content = path.read_bytes() if path.stat().st_size <= MAX_HELD_BYTES else None
    digest, utf8, is_utf8, before = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")(), True, b""
    for block in _blocks(path, content):
        digest.update(block)
        is_utf8 = is_utf8 and _accepts(utf8, block) and not OTHER_THAN_UTF8.search(before + block)
        before = block[-3:]
    if is_utf8 and _accepts(utf8, b"", final=True):
        return TextFile(path, digest.hexdigest(), "utf-8-sig", content)
    if encoding:
        found = Found(lookup_encoding(encoding), f"is not UTF-8; it was read as {encoding}, as --encoding says")
    else:
        where, sample = f"{path}:{_first_line_not_utf8(path)}", _sample(path, content)
        if not OTHER_THAN_UTF8.search(sample):
            _refuse_mixed(path, content, where)
        found = find_encoding(sample, where)
    _check(path, content, found)
    logger.warning(f"{path} {found.notice}")
    return TextFile(path, digest.hexdigest(), found.encoding, content)


def _sample(path: Path, content: bytes | None) -> bytes:
    if content is not None:
        return sample_of(content)
    with path.open("rb") as file:
        head = file.read(SAMPLE_BYTES)
        if OTHER_THAN_UTF8.search(head):
            return head
        file.seek(0)
        # A line may be as long as the file.
        return sample_lines(iter(partial(file.readline, BLOCK_BYTES), b""))


def _check(path: Path, content: bytes | None, found: Found) -> None:
    """Decode the entire file: the rest of it may be in another encoding than the sample.

    Raises:
        UserError: it is not in this encoding, or some of it does not look so.
    """
    decoder, number = codecs.getincrementaldecoder(found.encoding)(), 1
    for block in _blocks(path, content):
        try:
            text = decoder.decode(block)
        except UnicodeDecodeError as error:
            number += error.object.count(b"\n", 0, error.start)
            raise UserError(
                f"{path}:{number}: not {found.encoding} text, as other lines are ({found.notice.rpartition(': ')[2]}). "
                "Save the file as UTF-8."
            ) from error
        if found.odd_text(text):
            raise UserError(
                f"{path}:{number} or below: neither UTF-8 nor {found.encoding}, as other lines are: "
                f"{_shown(text)}\nSave the file as UTF-8, or name its encoding: --encoding {found.encoding}."
            )
        number += text.count("\n")
    if not _accepts(decoder, b"", final=True):
        raise UserError(f"{path}:{number}: it ends within a character of {found.encoding}. Save the file as UTF-8.")


def _refuse_mixed(path: Path, content: bytes | None, where: str) -> None:
    """Raises UserError if some lines are UTF-8: what was joined from two files has both."""
    with path.open("rb") if content is None else io.BytesIO(content) as file:
        for number, line in enumerate(file, start=1):
            # Two characters of three bytes are not valid by chance.
            if UTF8_CHARACTERS.search(line) and _accepts(codecs.getincrementaldecoder("utf-8")(), line, final=True):
                raise UserError(
                    f"{where}: this line is not UTF-8, but line {number} is. Save the parts of the file as UTF-8 "
                    "before they are joined."
                )


def _shown(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if not line.isascii()), "")[:60]


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
    # The byte of a line feed is never part of another character, except in UTF-16.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if OTHER_THAN_UTF8.search(line) or not _accepts(codecs.getincrementaldecoder("utf-8")(), line, final=True):
                return number
    raise ValueError(f"{path} is UTF-8")
