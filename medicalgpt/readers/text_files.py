"""Text files: one pass over the bytes gives hash and encoding, and the lines too if the file is small."""

import bz2
import codecs
import gzip
import hashlib
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, BinaryIO

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
from medicalgpt.files import hash_file

import zstandard
from loguru import logger

# A file up to this size is kept in memory while its rows are read, so that it is read from disk once.
MAX_HELD_BYTES = 16 * 1024 * 1024
BLOCK_BYTES = 64 * 1024
# How the bytes of each suffix are unpacked; a file may be several packed ones joined.
COMPRESSIONS: dict[str, Callable[[BinaryIO], BinaryIO]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": lambda file: _Zstandard(file),
}
# How files begin that are not text, whatever their names say: what they are, and the suffix that they need.
BEGINNINGS = (
    (b"\x1f\x8b", "packed with gzip", ".gz"),
    (b"\x28\xb5\x2f\xfd", "packed with zstd", ".zst"),
    (b"BZh", "packed with bzip2", ".bz2"),
    (b"\xfd7zXZ\x00", "packed with xz", ".xz"),
    (b"PAR1", "a Parquet file", ".parquet"),
    (b"ARROW1", "an Arrow file", ".arrow"),
    (b"PK\x03\x04", "an Excel file or an archive", ".xlsx"),
)
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
        with _open_binary(self.path, self.content) as file:
            return file.read().decode(self.encoding)

    def open(self, newline: str = "\n") -> io.TextIOWrapper:
        """The text as a file; `newline` as in `io.TextIOWrapper`."""
        return io.TextIOWrapper(_open_binary(self.path, self.content), encoding=self.encoding, newline=newline)

    def lines(self) -> Iterator[tuple[int, str]]:
        """Numbers and texts of the lines that are not blank, without line ends; one line at a time."""
        # Only a line feed ends a line: U+2028 and the like are allowed inside a string of JSON.
        with self.open() as file:
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
    compressed = path.suffix.lower() in COMPRESSIONS
    content = _content(path) if compressed or path.stat().st_size <= MAX_HELD_BYTES else None
    digest, utf8, is_utf8, before = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")(), True, b""
    for block in _blocks(path, content):
        if not compressed:
            digest.update(block)
        is_utf8 = is_utf8 and _accepts(utf8, block) and not OTHER_THAN_UTF8.search(before + block)
        before = block[-3:]
    # The hash is that of the file as it is on disk.
    sha256 = hash_file(path) if compressed else digest.hexdigest()
    if is_utf8 and _accepts(utf8, b"", final=True):
        return TextFile(path, sha256, "utf-8-sig", content)
    if not compressed:
        _refuse_other_than_text(path)
    if encoding:
        found = Found(lookup_encoding(encoding), f"is not UTF-8; it was read as {encoding}, as --encoding says")
    else:
        where, sample = f"{path}:{_first_line_not_utf8(path)}", _sample(path, content)
        if not OTHER_THAN_UTF8.search(sample):
            _refuse_mixed(path, content, where)
        found = find_encoding(sample, where)
    _check(path, content, found)
    _warn_once(f"{path} {found.notice}")
    return TextFile(path, sha256, found.encoding, content)


@cache
def _warn_once(text: str) -> None:
    """Programs that look at a file's first row, check it and copy it read it several times."""
    logger.warning(text)


def _refuse_other_than_text(path: Path) -> None:
    """Raises UserError if a file is packed, or a table, and its suffix says otherwise."""
    with path.open("rb") as file:
        beginning = file.read(8)
    for mark, what, suffix in BEGINNINGS:
        if beginning.startswith(mark):
            name = path.with_suffix(suffix).name if suffix in (".parquet", ".arrow", ".xlsx") else path.name + suffix
            raise UserError(f"{path} is {what}, and its name does not say so. If that is right, rename it: {name}")


def _sample(path: Path, content: bytes | None) -> bytes:
    if content is not None:
        return sample_of(content)
    with _open_binary(path) as file:
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
    with _open_binary(path, content) as file:
        for number, line in enumerate(file, start=1):
            # Two characters of three bytes are not valid by chance.
            if UTF8_CHARACTERS.search(line) and _accepts(codecs.getincrementaldecoder("utf-8")(), line, final=True):
                raise UserError(
                    f"{where}: this line is not UTF-8, but line {number} is. Save the parts of the file as UTF-8 "
                    "before they are joined."
                )


def _shown(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if not line.isascii()), "")[:60]


def _content(path: Path) -> bytes | None:
    """The bytes of a text that is not too large to be held."""
    with _open_binary(path) as file:
        content = file.read(MAX_HELD_BYTES + 1)
    return content if len(content) <= MAX_HELD_BYTES else None


@contextmanager
def _damage_reported(path: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError, ValueError, lzma.LZMAError, zlib.error, zstandard.ZstdError) as error:
        if isinstance(error, UnicodeError) or path.suffix.lower() not in COMPRESSIONS:
            raise
        raise UserError(
            f"{path} cannot be unpacked ({error}): it is damaged, incomplete, or not what its suffix says. Download or "
            "compress it again."
        ) from error


class _Zstandard:
    """Frames one after another; zstandard's own reader takes one that was cut off for a complete one."""

    def __init__(self, file: BinaryIO):
        self.file, self.ready, self.frame = file, io.BytesIO(), None

    def read(self, size: int) -> bytes:
        while not (data := self.ready.read(size)) and (packed := self.file.read(BLOCK_BYTES)):
            parts = []
            while packed:
                self.frame = self.frame or zstandard.ZstdDecompressor().decompressobj()
                parts.append(self.frame.decompress(packed))
                packed = self.frame.unused_data
                if self.frame.eof:
                    self.frame = None
            self.ready = io.BytesIO(b"".join(parts))
        if not data and self.frame is not None:
            raise EOFError("it ends within a frame")
        return data


class _Decompressed(io.RawIOBase):
    """What a compressed file holds, with errors that name the file."""

    def __init__(self, path: Path):
        self.path, self.packed = path, path.open("rb")
        self.stream = COMPRESSIONS[path.suffix.lower()](self.packed)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with _damage_reported(self.path):
            data = self.stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self.packed.close()
        super().close()


def _open_binary(path: Path, content: bytes | None = None) -> BinaryIO:
    if content is not None:
        return io.BytesIO(content)
    if path.suffix.lower() in COMPRESSIONS:
        return io.BufferedReader(_Decompressed(path), BLOCK_BYTES)
    return path.open("rb")


def _blocks(path: Path, content: bytes | None) -> Iterator[bytes]:
    with _open_binary(path, content) as file:
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
    with _open_binary(path) as file:
        for number, line in enumerate(file, start=1):
            if OTHER_THAN_UTF8.search(line) or not _accepts(codecs.getincrementaldecoder("utf-8")(), line, final=True):
                return number
    raise ValueError(f"{path} is UTF-8")


# Lines by which it is judged whether a text is wrapped, and the least number that says something.
JUDGED_LINES, LEAST_LINES = 2_000, 8
SENTENCE_END = tuple(".!?;:。！？；：…\"'”’」』）)")


def propose_document_unit(file: TextFile) -> str | None:
    """What one document should be, `paragraph` or `file`, if the lines of a text are broken at a width; None if not.

    Such lines are about as long as the longest ones, go on in the next line, and mostly end within a sentence.
    """
    lines = list(islice(file.lines(), JUDGED_LINES))
    followed = [line for (at, line), (after, _) in pairwise(lines) if after == at + 1]
    if len(followed) < LEAST_LINES:
        return None
    widths = sorted(map(_columns, followed))
    full = widths[len(widths) * 9 // 10]
    broken = sum(_columns(line) >= full * 0.75 and not line.rstrip().endswith(SENTENCE_END) for line in followed)
    # Rows that are longer than any editor wraps are rows.
    if broken * 2 < len(followed) or not 20 <= full <= 200:
        return None
    return "paragraph" if len(followed) < len(lines) - 1 else "file"


def _columns(line: str) -> int:
    """Columns of a line on a screen, where characters of East Asia take two."""
    return sum(2 if character >= "\u1100" else 1 for character in line.rstrip())
