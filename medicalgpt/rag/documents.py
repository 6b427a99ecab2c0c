"""Text from PDF, DOCX, HTML, Markdown and plain text files, with its page or headings.

A document may come from anyone and may be malicious. So it is parsed in a child process with limits on memory, time and
output; a failure there becomes a message, and the caller survives. Nothing that a document refers to is fetched.
"""

import codecs
import io
import json
import re
import resource
import signal
import subprocess
import sys
import tempfile
import unicodedata
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from medicalgpt.errors import UserError

SUFFIXES = (".pdf", ".docx", ".html", ".htm", ".md", ".markdown", ".txt")
MEGABYTE = 1 << 20
# Pages of a few MB have about ten thousand; the parser needs about a kilobyte for each.
MAX_TAGS = 200_000
# Office documents compress to between a half and a twentieth.
MAX_ZIP_RATIO = 100
MAX_ZIP_PARTS = 10_000
BLOCKS = frozenset(
    "address article aside blockquote body caption center dd details dialog div dl dt fieldset figcaption figure "
    "footer form h1 h2 h3 h4 h5 h6 header hr html legend li main nav ol option p pre section summary table tbody td "
    "tfoot th thead tr ul".split()
)
# These begin a new line, even within a paragraph.
MARKDOWN_LINE = re.compile(r"\s*([-*+>|]|\d+[.)])(\s|\S*\|)")
NOT_TEXT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


@dataclass(frozen=True)
class Limits:
    """Limits on reading one document.

    Attributes:
        input_bytes: size of the file.
        unpacked_bytes: sum of the parts of a DOCX file, which is a zip archive.
        memory_bytes: address space of the child process.
        cpu_seconds: computing time of the child process.
        wall_seconds: time until the child process has ended.
        output_bytes: text with pages and headings, as JSON.
    """

    input_bytes: int = 50 * MEGABYTE
    unpacked_bytes: int = 200 * MEGABYTE
    memory_bytes: int = 1024 * MEGABYTE
    cpu_seconds: int = 120
    wall_seconds: float = 180.0
    output_bytes: int = 20 * MEGABYTE


@dataclass(frozen=True)
class Unit:
    """A paragraph, or a table with a line for each row and ` | ` between its cells.

    Attributes:
        headings: from the outermost to the nearest; empty for a PDF, which has no marked headings.
        page: of a PDF, from 1.
    """

    text: str
    headings: tuple[str, ...] = ()
    page: int | None = None


@dataclass(frozen=True)
class Document:
    """The text of a document.

    Attributes:
        notices: what was not read, a sentence each.
    """

    units: tuple[Unit, ...]
    notices: tuple[str, ...] = ()


class DocumentError(UserError):
    """A document that cannot be read; the message names the file, the reason and the remedy."""


class Refused(Exception):
    """In the child process: why this document cannot be read, and the remedy."""


def read_document(path: str | Path, limits: Limits | None = None, encoding: str | None = None) -> Document:
    """Read a file in a child process.

    Text files are UTF-8, or in another encoding with a notice in the log; HTML is in the encoding that it declares.

    Args:
        encoding: of text that is not UTF-8 and declares no encoding; None finds it.

    Raises:
        DocumentError: it cannot be read, or not within the limits.
    """
    path, limits = Path(path), limits or Limits()
    try:
        data = _load(path, limits, encoding)
        with tempfile.TemporaryFile() as output:
            child = subprocess.run(
                [sys.executable, "-m", "medicalgpt.rag.documents", path.suffix.lower(), json.dumps(asdict(limits))],
                cwd=Path(__file__).resolve().parents[2],
                input=data,
                stdout=output,
                stderr=subprocess.DEVNULL,
                timeout=limits.wall_seconds,
            )
            output.seek(0)
            answer = _answer(output.read(limits.output_bytes), child.returncode, limits)
    except subprocess.TimeoutExpired:
        answer = {"error": f"reading takes more than {limits.wall_seconds:g} s. Split it, or save it again."}
    except Refused as error:
        answer = {"error": str(error)}
    if "error" in answer:
        raise DocumentError(f"{path}: {answer['error']}")
    units = (Unit(unit["text"], tuple(unit["headings"]), unit["page"]) for unit in answer["units"])
    return Document(tuple(units), tuple(answer["notices"]))


def _load(path: Path, limits: Limits, encoding: str | None) -> bytes:
    """The bytes of a file; of a text file, as UTF-8."""
    # Not imported in the child process, where it would cost time and memory.
    from medicalgpt.readers.text_files import open_text

    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise Refused(f"its suffix is not one of {', '.join(SUFFIXES)}. Save it as one of these.")
    try:
        size = path.stat().st_size
        if size > limits.input_bytes:
            raise Refused(
                f"it has {size / MEGABYTE:.1f} MB, at most {limits.input_bytes / MEGABYTE:g} are read. Split it."
            )
        data = path.read_bytes()
        if suffix in (".pdf", ".docx"):
            return data
        text = _declared_text(data) if suffix in (".html", ".htm") else None
        return (open_text(path, encoding).text() if text is None else text).encode("utf-8", "surrogatepass")
    except OSError as error:
        raise Refused(f"{error.strerror or error}. Check the path.") from error
    except UserError as error:
        raise Refused(str(error).removeprefix(f"{path}:")) from error


def _declared_text(data: bytes) -> str | None:
    """The text of an HTML page in the encoding that it declares; None if it declares none."""
    from bs4.dammit import EncodingDetector

    declared = EncodingDetector.find_declared_encoding(data, is_html=True)
    if declared is None or data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return None
    if declared in ("iso-8859-1", "latin-1", "latin1", "windows-1252"):
        # Many pages declare what their editor did by default and are UTF-8; here almost all bytes are characters.
        with suppress(UnicodeDecodeError):
            return data.decode("utf-8-sig")
    try:
        # Pages that declare gb2312 often contain characters of its successors.
        return data.decode("gb18030" if declared in ("gb2312", "gbk") else declared)
    except (LookupError, ValueError) as error:
        raise Refused(f"it declares the encoding {declared}, but is not in it. Save it as UTF-8.") from error


def _answer(written: bytes, code: int, limits: Limits) -> dict[str, Any]:
    """The output of the child process, or the error that ended it."""
    try:
        return json.loads(written)
    except ValueError:
        if code == -signal.SIGXCPU:
            return {
                "error": f"reading takes more than {limits.cpu_seconds} s of computing. Split it, or save it again."
            }
        how = f"by signal {-code}" if code < 0 else f"with code {code}"
        return {"error": f"the process that reads it died ({how}): it is damaged or malicious. Save it again."}


def serve() -> None:
    """Read a document from stdin and write its units, or an error, to stdout as JSON."""
    suffix, limits = sys.argv[1], Limits(**json.loads(sys.argv[2]))
    for kind, soft, hard in (
        (resource.RLIMIT_AS, limits.memory_bytes, limits.memory_bytes),
        # The soft limit ends the process with a signal that names the reason, the hard one does not.
        (resource.RLIMIT_CPU, limits.cpu_seconds, limits.cpu_seconds + 5),
        (resource.RLIMIT_FSIZE, limits.output_bytes, limits.output_bytes),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        resource.setrlimit(kind, (soft, hard))
    try:
        answer = _parse(sys.stdin.buffer.read(), suffix, limits)
    except Refused as error:
        answer = {"error": str(error)}
    except MemoryError:
        answer = {"error": f"reading needs more than {limits.memory_bytes / MEGABYTE:g} MB of memory. Split it."}
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        answer = {"error": f"it is damaged, or not a {suffix[1:]} file ({reason}). Save it again."}
    text = json.dumps(answer)
    if len(text) > limits.output_bytes:
        text = json.dumps({"error": f"its text has more than {limits.output_bytes / MEGABYTE:g} MB. Split it."})
    print(text)


def _parse(data: bytes, suffix: str, limits: Limits) -> dict[str, Any]:
    notices: list[str] = []
    if suffix == ".pdf":
        units = _read_pdf(data, notices)
    elif suffix == ".docx":
        units = _read_docx(data, notices, limits)
    else:
        text = data.decode("utf-8", "surrogatepass").replace("\r\n", "\n").replace("\r", "\n")
        if "\0" in text:
            raise Refused("it contains zero bytes, so it is not text, or UTF-16. Save it as UTF-8.")
        read = {".txt": _read_text, ".md": _read_markdown, ".markdown": _read_markdown}.get(suffix)
        units = read(text) if read else _read_html(text, notices)
    kept, strange = [], 0
    for unit in _with_bare_headings(units):
        text, count = NOT_TEXT.subn("\N{REPLACEMENT CHARACTER}", unit.text)
        strange += count
        if text.strip():
            headings = [NOT_TEXT.sub("", heading) for heading in unit.headings]
            kept.append({"text": text.strip("\n"), "headings": headings, "page": unit.page})
    if not kept:
        raise Refused(" ".join([*notices, "There is no text in it."]))
    unread = sum(unit["text"].count("\N{REPLACEMENT CHARACTER}") for unit in kept) - strange
    if suffix == ".docx" and unread > 0:
        notices.append(f"{unread} symbols of fonts without standard characters are \N{REPLACEMENT CHARACTER}.")
    if strange:
        notices.append(f"{strange} control characters were replaced by \N{REPLACEMENT CHARACTER}.")
    return {"units": kept, "notices": notices}


def _with_bare_headings(units: Iterable[Unit]) -> Iterator[Unit]:
    """Insert a heading as a unit where there is no text below it."""
    used: set[tuple[str, ...]] = set()
    open_path: tuple[str, ...] = ()
    for unit in chain(units, [Unit("")]):
        if open_path and open_path not in used and unit.headings[: len(open_path)] != open_path:
            yield Unit(open_path[-1], open_path[:-1])
        if unit.text.strip():
            used.update(unit.headings[:depth] for depth in range(1, len(unit.headings) + 1))
        open_path = unit.headings
        yield unit


def _width(line: str) -> int:
    """Columns of a line; characters of East Asia take two."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in line)


def _join(lines: Iterable[str], continues: Callable[[str, str], bool]) -> str:
    """Join a line to the previous one where `continues(before, line)`, with a space unless both sides are Chinese."""
    text = before = ""
    for line in lines:
        glue = "\n"
        if before and continues(before, line):
            line = line.lstrip()
            chinese = _width(before.rstrip()[-1:]) == 2 and _width(line[:1]) == 2
            text, glue = text.rstrip(), "" if chinese or before.rstrip().endswith("-") else " "
        text += (glue if before else "") + line
        before = line
    return text


def _unwrap(lines: list[str]) -> str:
    """Join lines that were broken only because they were full."""
    full = 0.75 * max(map(_width, lines), default=0)
    # If all lines are short, they are a list or a table.
    return _join(
        lines, lambda before, line: full > 30 and _width(before) > full and before.rstrip()[-1:] not in "。！？"
    )


def _enter(headings: list[tuple[int, str]], level: int, text: str) -> Unit:
    """Enter a heading, which ends all headings of its level or deeper. Returns a unit without text below it."""
    headings[:] = [heading for heading in headings if heading[0] < level] + [(level, " ".join(text.split()))]
    return Unit("", _path(headings))


def _path(headings: list[tuple[int, str]]) -> tuple[str, ...]:
    return tuple(text for _, text in headings if text)


def _read_text(text: str) -> Iterator[Unit]:
    for paragraph in re.split(r"\n[^\S\n]*\n", text):
        yield Unit(_unwrap(paragraph.strip("\n").split("\n")))


def _read_markdown(text: str) -> Iterator[Unit]:
    headings: list[tuple[int, str]] = []
    lines: list[str] = []
    fence = ""

    def paragraph() -> Unit:
        unit = Unit(
            _join(lines, lambda before, line: not (MARKDOWN_LINE.match(line) or "|" in before)), _path(headings)
        )
        lines.clear()
        return unit

    for line in [*text.split("\n"), ""]:
        mark = re.match(r"\s{0,3}(```+|~~~+)", line)
        heading = re.match(r"\s{0,3}(#{1,6})\s+(.*?)\s*#*\s*$", line)
        underlined = re.match(r"\s{0,3}(=+|-+)\s*$", line)
        if fence:
            # A line of code is a line, whatever it begins with.
            fence = "" if mark and mark[1].startswith(fence) else fence
            yield Unit(line if fence else "", _path(headings))
        elif mark:
            yield paragraph()
            fence = mark[1]
        elif heading:
            yield paragraph()
            yield _enter(headings, len(heading[1]), heading[2])
        elif underlined and len(lines) == 1 and "|" not in lines[0]:
            yield _enter(headings, 1 if underlined[1][0] == "=" else 2, lines.pop())
        elif line.strip():
            lines.append(line)
        else:
            yield paragraph()
    yield paragraph()


def _read_html(text: str, notices: list[str]) -> Iterator[Unit]:
    """The visible text of a page."""
    from medicalgpt.rag.hidden_html import remove_hidden

    from bs4 import BeautifulSoup

    if text.count("<") > MAX_TAGS:
        raise Refused(f"it has {text.count('<')} tags, at most {MAX_TAGS} are read. Split it.")
    soup = BeautifulSoup(text, "html.parser")
    _count_hidden(remove_hidden(soup), notices)
    for tag in soup(["head", "script", "style", "noscript", "template"]):
        tag.decompose()
    # A row that contains another table serves the layout of the page.
    for row in [row for row in soup("tr") if not row.find("table")]:
        row.string = " | ".join(" ".join(cell.get_text(" ").split()) for cell in row(["td", "th"]))
    headings: list[tuple[int, str]] = []
    for _, group in groupby(_html_pieces(soup), key=lambda piece: id(piece[0])):
        blocks, pieces = zip(*group, strict=True)
        lines = "".join(pieces).split("\n")
        if blocks[0].name != "pre":
            lines = [" ".join(line.split()) for line in lines]
        text = "\n".join(line for line in lines if line.strip())
        if re.fullmatch("h[1-6]", blocks[0].name) and text:
            yield _enter(headings, int(blocks[0].name[1]), text)
        else:
            yield Unit(text, _path(headings))


def _count_hidden(characters: int, notices: list[str]) -> None:
    if characters:
        notices.append(
            f"{characters} characters of invisible text in it (hidden, tiny or without contrast) are not read."
        )


def _html_pieces(soup: Any) -> Iterator[tuple[Any, str]]:
    """Each string of a page with its block; all rows of a table belong to the table."""
    from bs4 import NavigableString, Tag

    block_of = {id(soup): soup}
    for node in soup.descendants:
        block = block_of[id(node.parent)]
        if isinstance(node, Tag):
            block_of[id(node)] = node if node.name in BLOCKS else block
        # Comments are strings too, of other types.
        if node.name != "br" and type(node) is not NavigableString:
            continue
        if block.name == "tr":
            yield block.find_parent("table") or block, f"{node}\n"
        elif block.name not in ("table", "thead", "tbody", "tfoot") or node.strip():
            yield block, "\n" if node.name == "br" else str(node) if block.name == "pre" else re.sub(r"\s+", " ", node)


def _read_pdf(data: bytes, notices: list[str]) -> Iterator[Unit]:
    from medicalgpt.rag.hidden_pdf import visible_text

    from pypdf import PdfReader
    from pypdf.errors import DependencyError

    reader = PdfReader(io.BytesIO(data))
    try:
        # No password is needed if only printing and the like are forbidden.
        locked = reader.is_encrypted and not reader.decrypt("")
    except DependencyError:
        locked = True
    if locked:
        raise Refused("it is encrypted. Save it without a password: qpdf --decrypt --password=... IN.pdf OUT.pdf.")
    empty = hidden = 0
    for number, page in enumerate(reader.pages, start=1):
        text, unseen = visible_text(page)
        hidden += unseen
        lines = [line.rstrip() for line in text.split("\n")]
        for paragraph in re.split(r"\n\n+", "\n".join(lines).strip("\n")):
            yield Unit(_unwrap(paragraph.split("\n")), page=number)
        empty += not any(lines)
    _count_hidden(hidden, notices)
    if empty:
        notices.append(
            f"{empty} of {len(reader.pages)} pages have no text, as scanned pages have none; to read such pages: "
            "ocrmypdf -l chi_sim+eng IN.pdf OUT.pdf."
        )


def _read_docx(data: bytes, notices: list[str], limits: Limits) -> Iterator[Unit]:
    """Body, equations, text boxes, footnotes. Page headers and footers, comments and deleted text are skipped."""
    _refuse_bomb(data, notices, limits)
    from medicalgpt.rag.word import paragraph_text, styles_of

    import docx
    from docx.oxml import parse_xml
    from docx.oxml.ns import qn
    from docx.text.paragraph import Paragraph

    document = docx.Document(io.BytesIO(data))
    headings: list[tuple[int, str]] = []
    table, rows = None, {}
    styles, hidden = styles_of(document), []
    for element in [*document.element.body.iter(qn("w:p")), None]:
        # Every cell has a paragraph, so no empty one is lost. Nested tables become part of their cell.
        row = next(reversed([*element.iterancestors(qn("w:tr"))]), None) if element is not None else None
        inside = row.getparent() if row is not None else None
        if inside is not table:
            if rows:
                yield Unit("\n".join(" | ".join(cells.values()) for cells in rows.values()), _path(headings))
            table, rows = inside, {}
        if element is None:
            break
        text = paragraph_text(element, styles, hidden)
        if row is not None:
            cell = [*element.iterancestors(qn("w:tc"))][-1]
            cells = rows.setdefault(row, {})
            cells[cell] = " ".join([cells.get(cell, ""), text]).strip()
            continue
        level = re.fullmatch(r"Heading (\d)|Title", Paragraph(element, document._body).style.name or "")
        if level and text.strip():
            yield _enter(headings, int(level[1] or 0), text)
        else:
            yield Unit(text, _path(headings))
    for relation in document.part.rels.values():
        if relation.reltype.endswith(("/footnotes", "/endnotes")):
            for element in parse_xml(relation.target_part.blob).iter(qn("w:p")):
                yield Unit(paragraph_text(element, styles, hidden))
    _count_hidden(sum(len("".join(text.split())) for text in hidden), notices)


def _refuse_bomb(data: bytes, notices: list[str], limits: Limits) -> None:
    """Raises Refused by the archive's directory, before anything is unpacked."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        parts = archive.infolist()
        unpacked = sum(part.file_size for part in parts)
        if len(parts) > MAX_ZIP_PARTS:
            raise Refused(f"it has {len(parts)} parts, at most {MAX_ZIP_PARTS} are read. Save it again.")
        if unpacked > limits.unpacked_bytes or unpacked > MEGABYTE and unpacked > MAX_ZIP_RATIO * len(data):
            raise Refused(
                f"its {len(data) / MEGABYTE:.2f} MB would unpack to {unpacked / MEGABYTE:.0f} MB, as a zip bomb does "
                f"(most: {limits.unpacked_bytes / MEGABYTE:g} MB, and {MAX_ZIP_RATIO} times its size). Save it again."
            )
        for part in parts:
            content = archive.read(part) if part.filename.endswith((".xml", ".rels")) else b""
            if b"<!DOCTYPE" in content or "<!DOCTYPE".encode("utf-16-le") in content:
                raise Refused(f"its part {part.filename} declares a document type, which DOCX forbids. Save it again.")
        embedded = sum("/embeddings/" in part.filename for part in parts)
        pictures = sum("/media/" in part.filename for part in parts)
    if embedded or pictures:
        notices.append(f"{pictures} pictures and {embedded} embedded files in it are not read.")
    if drawn := sum(bool(re.search(r"/(charts/chart|diagrams/data)\d*\.xml$", part.filename)) for part in parts):
        notices.append(f"{drawn} charts and diagrams in it are not read.")


if __name__ == "__main__":
    serve()
