"""Documents: text with its page and headings, and documents that are made to hurt."""

import io
import socket
import zipfile
import zlib
from pathlib import Path

from medicalgpt.rag import documents
from medicalgpt.rag.documents import MAX_TAGS, DocumentError, Limits, Unit, read_document
from medicalgpt.rag.word import Runs, paragraph_text

import docx
import pytest
from docx.oxml import parse_xml
from docx.oxml.ns import nsdecls, qn
from docx.shared import Pt, RGBColor
from pypdf import PdfReader, PdfWriter

MEGABYTE = 1 << 20


def read(path: Path, content: str | bytes, **limits) -> tuple[Unit, ...]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_document(path, Limits(**limits)).units


def refusal(path: Path, **limits) -> str:
    """What is said of a file that cannot be read; the path stands in front."""
    with pytest.raises(DocumentError) as caught:
        read_document(path, Limits(**limits))
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and text.count("\n") < 4, text
    return text


def pdf(*pages: str | bytes, compress: bool = False) -> bytes:
    """A PDF file with a page for each text; lines are lines. Bytes are a content stream as it is."""
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", "", "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"]
    kids = []
    for page in pages:
        stream = page
        if isinstance(page, str):
            lines = " T* ".join(f"({line}) Tj" for line in page.split("\n")) if page else ""
            stream = f"BT /F1 12 Tf 72 720 Td 14 TL {lines} ET".encode()
        kids.append(f"{len(objects) + 1} 0 R")
        filtered = " /Filter /FlateDecode" if compress else ""
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {len(objects) + 2} 0 R "
            "/Resources << /Font << /F1 3 0 R >> >> >>"
        )
        objects.append((f"<< /Length {len(stream)}{filtered} >>\nstream\n".encode(), stream, b"\nendstream"))
    objects[1] = f"<< /Type /Pages /Kids [{' '.join(kids)}] /Count {len(kids)} >>"
    out = b"%PDF-1.4\n"
    places = []
    for number, body in enumerate(objects, start=1):
        places.append(len(out))
        out += (
            f"{number} 0 obj\n".encode()
            + (b"".join(body) if isinstance(body, tuple) else body.encode())
            + b"\nendobj\n"
        )
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    end = (
        f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}trailer << /Size {len(objects) + 1} /Root 1 0 R >>\n"
    )
    return out + f"{end}startxref\n{len(out)}\n%%EOF\n".encode()


def saved(document) -> bytes:
    file = io.BytesIO()
    document.save(file)
    return file.getvalue()


# --- what is read ----------------------------------------------------------------------------------------------------


def test_pdf_pages_and_lines_that_only_the_margin_broke(tmp_path):
    full = "The tablets are taken in the morning with a full glass of water and"
    units = read(tmp_path / "a.pdf", pdf(f"Dose\n{full}\nnever with milk.\nKeep cool.", "Side effects"))
    assert units == (
        Unit(f"Dose\n{full} never with milk.\nKeep cool.", page=1),
        Unit("Side effects", page=2),
    )


def test_pages_without_text_are_counted_and_a_scan_is_refused(tmp_path):
    (tmp_path / "a.pdf").write_bytes(pdf("text", "", ""))
    document = read_document(tmp_path / "a.pdf")
    assert [unit.page for unit in document.units] == [1]
    assert "2 of 3 pages have no text" in document.notices[0] and "ocrmypdf" in document.notices[0]
    (tmp_path / "scan.pdf").write_bytes(pdf("", ""))
    assert "2 of 2 pages have no text" in refusal(tmp_path / "scan.pdf")


@pytest.mark.parametrize(("password", "readable"), [("secret", False), ("", True)])
def test_encrypted_pdf(tmp_path, password, readable):
    """One that only forbids printing opens without a password."""
    writer = PdfWriter(PdfReader(io.BytesIO(pdf("private"))))
    writer.encrypt(password, "owner", algorithm="RC4-128")
    writer.write(tmp_path / "a.pdf")
    if readable:
        assert read_document(tmp_path / "a.pdf").units[0].text == "private"
    else:
        assert "encrypted" in refusal(tmp_path / "a.pdf")


def test_docx_headings_tables_boxes_notes_and_what_is_hidden(tmp_path):
    document = docx.Document()
    document.add_heading("出院小结", 0)
    document.add_heading("用药", 1)
    paragraph = document.add_paragraph("阿司匹林\t每日一次")
    paragraph.add_run("看不见").font.hidden = True
    table = document.add_table(2, 3)
    for cell, text in zip(table.rows[0].cells, ("药", "", "次数"), strict=True):
        cell.text = text
    table.cell(1, 0).add_table(1, 1).cell(0, 0).text = "内"
    document.add_heading("复查", 1)
    box = "".join(
        f"<{kind}><w:txbxContent><w:p><w:r><w:t>框里</w:t></w:r></w:p></w:txbxContent></{kind}>"
        for kind in ("mc:Choice", "mc:Fallback")
    )
    space = 'xmlns:mc="http://schemas.openxmlformats.org/markup-compatibility/2006"'
    alternate = parse_xml(f"<mc:AlternateContent {space} {nsdecls('w')}>{box}</mc:AlternateContent>")
    document.add_paragraph("框外").runs[0]._r.append(alternate)
    control = parse_xml(
        f"<w:sdt {nsdecls('w')}><w:sdtContent><w:p><w:r><w:t>控件</w:t></w:r></w:p></w:sdtContent></w:sdt>"
    )
    document.element.body.find(qn("w:sectPr")).addprevious(control)
    assert read(tmp_path / "a.docx", saved(document)) == (
        Unit("阿司匹林 每日一次", ("出院小结", "用药")),
        Unit("药 |  | 次数\n内 |  | ", ("出院小结", "用药")),
        Unit("框外", ("出院小结", "复查")),
        Unit("框里", ("出院小结", "复查")),
        Unit("控件", ("出院小结", "复查")),
    )


def math(inner: str) -> str:
    return f"<m:oMath {nsdecls('m', 'w')}>{inner}</m:oMath>"


def run(text: str) -> str:
    return f"<m:r><m:rPr><m:sty m:val='p'/></m:rPr><m:t>{text}</m:t></m:r>"


EQUATIONS = {
    f"<m:f><m:fPr><m:type m:val='bar'/></m:fPr><m:num>{run('140-age')}</m:num><m:den>{run('72')}</m:den></m:f>": (
        "(140-age)/72"
    ),
    f"<m:sSup><m:e>{run('x')}</m:e><m:sup>{run('2')}</m:sup></m:sSup>": "x^(2)",
    f"<m:sSub><m:e>{run('C')}</m:e><m:sub>{run('max')}</m:sub></m:sSub>{run('=5')}": "C_(max)=5",
    f"<m:rad><m:radPr><m:degHide m:val='1'/></m:radPr><m:deg/><m:e>{run('ab')}</m:e></m:rad>": "√(ab)",
    f"<m:d><m:dPr><m:begChr m:val='['/><m:endChr m:val=']'/></m:dPr><m:e>{run('a')}</m:e></m:d>": "[a]",
    f"<m:nary><m:naryPr><m:chr m:val='∑'/></m:naryPr><m:sub>{run('i')}</m:sub><m:sup/><m:e>{run('w')}</m:e></m:nary>": (
        "∑_(i) w"
    ),
    f"<m:m><m:mr><m:e>{run('1')}</m:e><m:e>{run('2')}</m:e></m:mr></m:m>": "[1, 2]",
    f"<m:func><m:fName>{run('ln')}</m:fName><m:e>{run('2')}</m:e></m:func>": "ln2",
}


@pytest.mark.parametrize(("inner", "expected"), EQUATIONS.items(), ids=EQUATIONS.values())
def test_docx_equations_are_read(inner, expected):
    paragraph = docx.Document().add_paragraph("CrCl = ")
    paragraph._p.append(parse_xml(math(inner)))
    paragraph.add_run(" ml")
    assert paragraph_text(paragraph._p, Runs(paragraph.part.document)) == f"CrCl = {expected} ml"


def test_docx_equations_symbols_and_hyphens_reach_the_document(tmp_path):
    """A hyphen that is lost makes 510 mg of 5-10 mg."""
    document = docx.Document()
    paragraph = document.add_paragraph("5")
    for xml in ("<w:noBreakHyphen {}/>", "<w:t {}>10 mg </w:t>", "<w:sym {} w:font='Symbol' w:char='F0B3'/>"):
        paragraph.add_run()._r.append(parse_xml(xml.format(nsdecls("w"))))
    paragraph.add_run()._r.append(parse_xml(f"<w:sym {nsdecls('w')} w:font='Wingdings' w:char='F04A'/>"))
    paragraph._p.append(parse_xml(f"<m:oMathPara {nsdecls('m')}>{math(run('e=1'))}</m:oMathPara>"))
    (tmp_path / "a.docx").write_bytes(saved(document))
    read = read_document(tmp_path / "a.docx")
    assert [unit.text for unit in read.units] == ["5-10 mg ≥\N{REPLACEMENT CHARACTER}e=1"]
    assert read.notices == ("1 symbols of fonts without standard characters are \N{REPLACEMENT CHARACTER}.",)


def test_docx_pictures_are_said_to_be_left_out(tmp_path):
    from PIL import Image

    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    document = docx.Document()
    document.add_paragraph("text")
    document.add_picture(str(tmp_path / "a.png"))
    (tmp_path / "a.docx").write_bytes(saved(document))
    assert read_document(tmp_path / "a.docx").notices == ("1 pictures and 0 embedded files in it are not read.",)


# Styles of text that cannot be seen; `dose` is what such text says.
UNSEEN = [
    "display:none",
    "DISPLAY : none !important",
    "visibility: hidden",
    "opacity:0",
    "opacity: 0.0",
    "filter: opacity(0%)",
    "font-size:0",
    "font-size: 0px",
    "font-size:.5px",
    "font: 0/0 a",
    "color:white",
    "color:#fff",
    "color:#FEFEFE",
    "color: rgb(255, 255, 255)",
    "color:rgba(0,0,0,0)",
    "color:transparent",
    "color:black;background:black",
    "position:absolute;left:-9999px",
    "position:absolute; top: -200em",
    "text-indent:-9999px",
    "position:absolute;clip:rect(0,0,0,0)",
    "height:0;overflow:hidden",
    "clip-path: inset(100%)",
    "clip-path:inset(50%)",
    "clip-path:inset(0 60% 0 40%)",
    "clip-path:circle(0)",
]
# Styles of text that can.
SEEN = [
    "color:red",
    "font-size:8pt",
    "opacity:.6",
    "color:white;background:#036",
    "color:white;background:url(x.png)",
    "color:white;background-image:linear-gradient(red,blue)",
    "position:absolute;left:20px",
    "visibility:visible",
    "text-indent:-20px",
    "height:0",
    "clip-path:inset(10%)",
    "clip-path:inset(0 60% 0 0)",
    "clip-path:circle(50%)",
]


@pytest.mark.parametrize("style", UNSEEN)
@pytest.mark.parametrize(
    "page",
    [
        '<p>text</p><p style="{style}">dose <b>50</b></p>',
        "<style>/* x */ h1, .a {{ {style} }}</style><p>text</p><p class='b a'>dose <b>50</b></p>",
        "<style>@media screen {{ p#a.b {{ {style} }} }}</style><p>text</p><p id=a class=b>dose <b>50</b></p>",
        "<style>@import 'a.css'; @media print, screen {{ i,\n.b {{ {style} }} }}</style>"
        "<p>text</p><p class=b>dose <b>50</b></p>",
    ],
)
def test_html_that_cannot_be_seen_is_left_out_and_counted(style, page):
    notices = []
    assert [unit.text for unit in documents._read_html(page.format(style=style), notices) if unit.text] == ["text"]
    assert notices == ["6 characters of invisible text in it are not read."]


@pytest.mark.parametrize("style", SEEN)
def test_html_that_can_be_seen_is_read(style):
    page = f'<p style="{style}">text</p><style>@media print {{ p {{ display:none }} }} div p {{ color:white }}</style>'
    notices = []
    assert [unit.text for unit in documents._read_html(page, notices) if unit.text] == ["text"] and notices == []


def test_the_look_of_html_is_inherited_and_can_be_changed_back(tmp_path):
    page = """<style>.ghost{visibility:hidden} .zero{font-size:0} .dark{background-color:#222} p.on{display:block}
    p{display:none} #x{color:#fff}</style><div class=ghost>a<span style="visibility:visible">b</span></div>
    <div class=zero>c<span style="font-size:14px">d</span><span style="font-size:2em">e</span></div>
    <div class=dark><span id=x>f</span></div><span id=x>g</span><p>h</p><p class=on>i</p><div hidden>j</div>
    <table bgcolor="#000080"><tr><td><font color=white>k</font></td></tr></table><font color=white>l</font>"""
    (tmp_path / "a.html").write_text(page)
    document = read_document(tmp_path / "a.html")
    assert "".join("".join(unit.text.split()) for unit in document.units) == "bdfik"
    assert document.notices == ("7 characters of invisible text in it are not read.",)


def test_docx_that_cannot_be_seen_is_left_out_and_counted(tmp_path):
    document = docx.Document()
    paragraph = document.add_paragraph("text")
    white, tiny, vanished = (paragraph.add_run(text) for text in ("white", "tiny", "vanished"))
    white.font.color.rgb = RGBColor(255, 255, 255)
    tiny.font.size = Pt(1)
    vanished.font.hidden = True
    ghost = document.styles.add_style("Ghost", 1)
    ghost.font.hidden = True
    heir = document.styles.add_style("Heir", 1)
    heir.base_style = ghost
    document.add_paragraph("styled", style="Heir")
    document.add_paragraph("", style="Heir").add_run(" shown").font.hidden = False
    shaded = document.add_paragraph("").add_run(" shaded")
    shaded.font.color.rgb = RGBColor(255, 255, 255)
    shaded._r.get_or_add_rPr().append(parse_xml(f'<w:shd {nsdecls("w")} w:val="clear" w:fill="003366"/>'))
    lit = document.add_paragraph("").add_run(" lit")
    lit.font.color.rgb = RGBColor(255, 255, 255)
    lit.font.highlight_color = 1
    table = document.add_table(1, 2)
    for cell, fill in zip(table.rows[0].cells, ("FFFFFF", "000000"), strict=True):
        cell.paragraphs[0].add_run(f"in{fill}").font.color.rgb = RGBColor(255, 255, 255)
        cell._tc.get_or_add_tcPr().append(parse_xml(f'<w:shd {nsdecls("w")} w:val="clear" w:fill="{fill}"/>'))
    path = tmp_path / "a.docx"
    path.write_bytes(saved(document))
    found = read_document(path)
    assert [unit.text.strip() for unit in found.units] == ["text", "shown", "shaded", "lit", "| in000000"]
    assert found.notices == (
        f"{len('whitetinyvanishedstyledinFFFFFF')} characters of invisible text in it are not read.",
    )


# Operations that show `dose` so that it cannot be seen, and so that it can.
UNSEEN_PDF = [
    "3 Tr (dose) Tj 0 Tr",
    "1 g (dose) Tj 0 g",
    "1 1 1 rg (dose) Tj 0 g",
    "0 0 0 0 k (dose) Tj 0 g",
    "/F1 0.5 Tf (dose) Tj /F1 12 Tf",
    "0.01 0 0 0.01 72 600 Tm (dose) Tj 1 0 0 1 72 580 Tm",
    "[(do) -20 (se)] TJ".join(["3 Tr ", " 0 Tr"]),
    "ET q BT /F1 12 Tf 3 Tr 72 500 Td (dose) Tj ET Q BT /F1 12 Tf 72 480 Td",
    "ET 0 g 400 0 50 50 re f BT /F1 12 Tf 72 500 Td 1 g (dose) Tj 0 g",
]
SEEN_PDF = [
    "0.9 g (dose) Tj",
    "1 Tr (dose) Tj",
    "/F1 6 Tf (dose) Tj",
    "ET 0 0 0.5 rg 60 490 200 30 re f BT /F1 12 Tf 72 500 Td 1 g (dose) Tj",
    "ET q 2 0 0 2 0 0 cm 0 g 30 245 100 15 re f Q BT /F1 12 Tf 72 500 Td 1 g (dose) Tj",
]


@pytest.mark.parametrize("operations", UNSEEN_PDF)
def test_pdf_that_cannot_be_seen_is_left_out_and_counted(operations):
    notices = []
    units = [
        *documents._read_pdf(
            pdf(f"BT /F1 12 Tf 72 720 Td (text) Tj 0 -20 Td {operations} 0 -20 Td (end) Tj ET".encode()), notices
        )
    ]
    text = " ".join(unit.text for unit in units)
    assert "text" in text and "end" in text and "do" not in text
    assert notices == ["1 pieces of invisible text in it are not read."]


@pytest.mark.parametrize("operations", SEEN_PDF)
def test_pdf_that_can_be_seen_is_read(operations):
    notices = []
    units = [*documents._read_pdf(pdf(f"BT /F1 12 Tf 72 720 Td (text) Tj 0 -20 Td {operations} ET".encode()), notices)]
    assert "dose" in " ".join(unit.text for unit in units) and notices == []


def test_the_text_of_ocr_is_read_where_nothing_else_is(tmp_path):
    """ocrmypdf puts what it recognised, invisibly, on the picture of the page."""
    picture = b"q 600 0 0 700 0 0 cm BI /W 1 /H 1 /CS /G /BPC 8 ID \x00 EI Q "
    scan = picture + b"BT /F1 12 Tf 3 Tr 72 500 Td (scanned) Tj ET"
    path = tmp_path / "a.pdf"
    path.write_bytes(pdf(scan, scan + b" BT 0 Tr 72 600 Td (Figure) Tj ET"))
    document = read_document(path)
    assert [unit.text for unit in document.units] == ["scanned", "Figure"]
    assert document.notices == (
        "1 pieces of invisible text in it are not read.",
        "1 of 2 pages are pictures; their invisible text, as of OCR, is read.",
    )


def test_html_shows_what_a_reader_sees(tmp_path):
    page = """<html><head><title>T</title><style>p{}</style></head><body><h1>Heart &amp; lungs</h1>
    <script>alert(1)</script><noscript>no script</noscript><template>later</template><!-- comment -->
    <p>One <b>two</b>
    three<br>four</p><p style="color:red; DISPLAY : none">hidden <i>deeper</i></p><p hidden>h</p>
    <div aria-hidden="true">icon</div><div>direct<p>inner</p>after</div>
    <table><thead><tr><th>a</th><th></th><th>c</th></tr></thead><tr><td>1<br>x</td><td>2</td><td><p>3</p></td></tr></table>
    <table><tr><td><table><tr><td>in</td></tr></table></td><td>side</td></tr></table>
    <h2>Sub</h2><pre>x
  y</pre><ul><li>l1</li><li>l2</li></ul></body></html>"""
    top, sub = ("Heart & lungs",), ("Heart & lungs", "Sub")
    assert read(tmp_path / "a.html", page) == (
        Unit("One two three\nfour", top),
        Unit("direct", top),
        Unit("inner", top),
        Unit("after", top),
        Unit("a | | c\n1 x | 2 | 3", top),
        Unit("in", top),
        Unit("side", top),
        Unit("x\n  y", sub),
        Unit("l1", sub),
        Unit("l2", sub),
    )


def test_nothing_is_fetched(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        tags = f'<img src="{address}/a"><iframe src="{address}/b"></iframe><script src="{address}/c"></script>'
        read(tmp_path / "a.html", f'<base href="{address}"><link rel="stylesheet" href="{address}/d">{tags}<p>text')
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


def test_markdown_structure(tmp_path):
    text = """Top
===
one
goes on
- item
  of two lines

## 剂量
第一行很
长。

| 药 | 次 |
|---|---|
| a | b |

```
# no heading
```
## Empty
## Last #
end
"""
    assert read(tmp_path / "a.md", text) == (
        Unit("one goes on\n- item of two lines", ("Top",)),
        Unit("第一行很长。", ("Top", "剂量")),
        Unit("| 药 | 次 |\n|---|---|\n| a | b |", ("Top", "剂量")),
        Unit("# no heading", ("Top", "剂量")),
        # A heading under which nothing stands is text itself.
        Unit("Empty", ("Top",)),
        Unit("end", ("Top", "Last")),
    )


def test_text_in_gb18030_is_read_with_a_notice(tmp_path, log):
    assert read(tmp_path / "a.txt", "发热三天。\r\n\r\n咳嗽。".encode("gb18030")) == (
        Unit("发热三天。"),
        Unit("咳嗽。"),
    )
    assert any("read as gb18030" in line for line in log)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "big5", "gb18030", "cp1252"])
def test_documents_in_other_encodings_are_read_or_the_encoding_is_named(tmp_path, log, encoding):
    text = "It’s one tablet, not “two”." if encoding == "cp1252" else "感冒患者要多喝水。"
    assert read(tmp_path / "a.txt", text.encode(encoding)) == (Unit(text),)
    (tmp_path / "b.txt").write_bytes("嗜铬".encode("gb18030"))
    assert "--encoding gb18030" in refusal(tmp_path / "b.txt")
    assert read_document(tmp_path / "b.txt", encoding="gb18030").units == (Unit("嗜铬"),)


def test_a_page_in_utf8_that_declares_latin1(tmp_path):
    assert read(tmp_path / "a.html", '<meta charset="iso-8859-1"><p>naïve 发热'.encode())[0].text == "naïve 发热"


def test_html_in_the_encoding_it_declares(tmp_path):
    page = '<meta charset="gb2312"><p>病人：镕'
    assert read(tmp_path / "a.html", page.encode("gb18030"))[0].text == "病人：镕"
    (tmp_path / "b.html").write_bytes('<meta charset="ascii"><p>病人'.encode())
    assert "declares the encoding ascii" in refusal(tmp_path / "b.html")


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.doc", b"x", "its suffix is not one of"),
        ("a.pdf", b"hello", "damaged, or not a pdf file"),
        ("a.docx", b"hello", "damaged, or not a docx file"),
        ("a.txt", b"\xff\xff\xff", "neither UTF-8 nor certainly"),
        ("b.txt", b"fever\0\0\0\0", "zero bytes"),
        ("a.md", b" \n\n", "no text"),
    ],
)
def test_unreadable(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    assert any(part in refusal(tmp_path / name) for part in reason.split("|"))


def test_missing_file(tmp_path):
    assert "No such file" in refusal(tmp_path / "a.pdf")


def bomb(parts: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return file.getvalue()


def test_zip_bomb_is_refused_by_its_directory(tmp_path):
    path = tmp_path / "a.docx"
    path.write_bytes(bomb({"word/document.xml": bytes(20 * MEGABYTE)}))
    # With so little memory, it could not be unpacked.
    assert "would unpack to 20 MB" in refusal(path, memory_bytes=60 * MEGABYTE)
    path.write_bytes(bomb({f"{n}.xml": b"" for n in range(10_001)}))
    assert "10001 parts" in refusal(path)
    noise = zlib.compress(bytes(MEGABYTE), 0)
    path.write_bytes(bomb({f"{n}.xml": noise for n in range(3)}))
    assert "would unpack to 3 MB" in refusal(path, unpacked_bytes=2 * MEGABYTE)


def test_a_directory_that_lies_about_sizes(tmp_path):
    data = bytearray(bomb({"word/document.xml": bytes(20 * MEGABYTE)}))
    size = (20 * MEGABYTE).to_bytes(4, "little")
    while (at := data.find(size)) >= 0:
        data[at : at + 4] = (1000).to_bytes(4, "little")
    (tmp_path / "a.docx").write_bytes(data)
    assert "damaged" in refusal(tmp_path / "a.docx", memory_bytes=200 * MEGABYTE)


def test_a_nested_bomb_stays_packed(tmp_path):
    document = docx.Document()
    document.add_paragraph("text")
    data = saved(document)
    inner = bomb({"zeros": bytes(50 * MEGABYTE)})
    with zipfile.ZipFile(file := io.BytesIO(data), "a") as archive:
        archive.writestr("word/embeddings/bomb.zip", inner)
    (tmp_path / "a.docx").write_bytes(file.getvalue())
    document = read_document(tmp_path / "a.docx", Limits(memory_bytes=300 * MEGABYTE))
    assert document.notices == ("0 pictures and 1 embedded files in it are not read.",)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_entity_bomb(tmp_path, encoding):
    entities = "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 12))
    text = f'<?xml version="1.0" encoding="{encoding}"?><!DOCTYPE d [<!ENTITY a0 "ha">{entities}]><d>&a11;</d>'
    (tmp_path / "a.docx").write_bytes(bomb({"word/document.xml": text.encode(encoding)}))
    assert "declares a document type" in refusal(tmp_path / "a.docx")


def test_pdf_bomb(tmp_path):
    packed = zlib.compressobj(9)
    stream = b"".join(packed.compress(bytes(MEGABYTE)) for _ in range(150)) + packed.flush()
    (tmp_path / "a.pdf").write_bytes(pdf(stream, compress=True))
    assert any(part in refusal(tmp_path / "a.pdf") for part in ("damaged", "MB of memory"))


def test_html_of_a_million_tags(tmp_path):
    (tmp_path / "a.html").write_text("<div>" * 10**6)
    assert f"1000000 tags, at most {MAX_TAGS}" in refusal(tmp_path / "a.html")
    deep = 20_000
    assert read(tmp_path / "b.html", "<div>" * deep + "deep")[0].text == "deep"


MANY_TAGS = "<b>x" * 190_000


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"input_bytes": 1000}, "it has 0.7 MB"),
        ({"memory_bytes": 100 * MEGABYTE}, "more than 100 MB of memory"),
        ({"cpu_seconds": 1}, "more than 1 s of computing"),
        ({"wall_seconds": 0.2}, "takes more than 0.2 s"),
        ({"memory_bytes": 10 * MEGABYTE}, "the process that reads it died|10 MB of memory"),
    ],
)
def test_each_limit(tmp_path, limits, reason):
    """A page of almost as many tags as are read: two seconds, and more than a hundred megabytes."""
    (tmp_path / "a.html").write_text(MANY_TAGS)
    assert any(part in refusal(tmp_path / "a.html", **limits) for part in reason.split("|"))


def test_limit_of_the_output(tmp_path):
    (tmp_path / "a.txt").write_text("a\n\n" * 1000)
    assert "its text has more than" in refusal(tmp_path / "a.txt", output_bytes=10_000)
