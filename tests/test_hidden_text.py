"""Text that a reader of a document does not see is not read, and said to be left out; what is seen is read."""

from medicalgpt.rag import documents
from tests.test_documents import pdf, saved

import docx
import pytest
from docx.enum.style import WD_STYLE_TYPE
from docx.oxml import parse_xml
from docx.oxml.ns import nsdecls
from docx.shared import Pt, RGBColor

SECRET = "Warfarin fifty milligrams"
COUNT = "23 characters of invisible text in it"


def read(path, content):
    """What the child process returns for a file; without the process, which takes longer than the reading."""
    data = content if isinstance(content, bytes) else content.encode()
    found = documents._parse(data, path.suffix, documents.Limits())
    return "\n".join(unit["text"] for unit in found["units"]), tuple(found["notices"])


STYLES = [
    "display:none",
    "DISPLAY : None !important",
    "visibility: hidden",
    "opacity:0",
    "opacity: 0.01",
    "font-size:0",
    "font-size: 1px",
    "font: 0/0 a",
    "color:white",
    "color:#fff",
    "color: rgb(255, 255, 255)",
    "color:#fefefe",
    "background:#123456;color:#123457",
    "color:transparent",
    "color: rgba(0,0,0,0)",
    "position:absolute;left:-9999px",
    "position:fixed; top:-100em",
    "text-indent:-9999px",
    "position:absolute;clip:rect(0,0,0,0)",
    "clip-path: inset(100%)",
    "height:0;overflow:hidden",
    "transform:scale(0)",
    "filter:opacity(0)",
]
SEEN = [
    "color:black",
    "background:navy;color:white",
    "background:url(a.png);color:white",
    "background: linear-gradient(red, blue);color:white",
    "opacity:0.5",
    "opacity:1",
    "font-size:11px",
    "font-size:0.8em",
    "font: italic 12px/1.5 a",
    "left:-9999px",
    "text-indent:-2em",
    "color:rgba(0,0,0,.9)",
    "transform:scale(0.5)",
    "height:100px;overflow:hidden",
    "margin-left:-10px",
]


@pytest.mark.parametrize("style", STYLES)
def test_html_that_is_not_seen(tmp_path, style):
    """By an attribute of the element or of one around it, and by a rule."""
    pages = [
        f'<p>Before</p><p style="{style}">{SECRET}</p><p>After</p>',
        f'<p>Before</p><div style="{style}"><p><b>{SECRET}</b></p></div><p>After</p>',
        f"<style>p{{color:black}} .x {{ {style} }}</style><p>Before</p><p class='a x'>{SECRET}</p><p>After</p>",
        f"<head><style>@media screen {{ div > #y, .z {{ {style} }} }}</style></head><body><p>Before</p><div>"
        f"<p id=y>{SECRET}</p></div><p>After</p>",
    ]
    for page in pages:
        text, notices = read(tmp_path / "a.html", page)
        assert text == "Before\nAfter" and notices[0].startswith(COUNT), page


@pytest.mark.parametrize("style", SEEN)
def test_html_that_is_seen(tmp_path, style):
    text, notices = read(tmp_path / "a.html", f'<p>Before</p><p style="{style}">{SECRET}</p>')
    assert text == f"Before\n{SECRET}" and notices == ()


def test_rules_follow_order_specificity_and_media(tmp_path):
    page = f"""<style>/* .d {{}} */ .a {{display:none}} .a.open {{display:block}} @media print {{ .b {{display:none}} }}
    .c {{color:white}} .c {{color:black}} #d {{color:black}} p {{color:white}} .e:hover {{display:none}} .f{{</style>
    <p class="a open" style="color:black">A</p><p class=b style="color:red">B</p><p class=c>C</p><p id=d>D</p>
    <p class=e style="color:red">E</p><p class="f">{SECRET}</p><p hidden>x</p><font color=white>y</font>
    <table bgcolor=navy><tr><td><font color=white>T</font></td></tr></table>
    <p style="visibility:hidden">z<i style="visibility:visible;color:red">V</i></p>"""
    text, notices = read(tmp_path / "a.html", page)
    assert text.split("\n") == ["A", "B", "C", "D", "E", "T", "V"]
    assert notices[0].startswith("26 characters")


TEXT = "BT /F1 12 Tf 72 700 Td (Before) Tj ET "
HIDDEN_PDF = {
    "not painted": f"BT /F1 12 Tf 3 Tr 72 600 Td ({SECRET}) Tj ET",
    "white": f"1 1 1 rg BT /F1 12 Tf 72 600 Td ({SECRET}) Tj ET",
    "white by gray": f"1 g BT /F1 12 Tf 72 600 Td [({SECRET})] TJ ET",
    "white by ink": f"0 0 0 0 k BT /F1 12 Tf 72 600 Td ({SECRET}) Tj ET",
    "tiny": f"BT /F1 0.5 Tf 72 600 Td ({SECRET}) Tj ET",
    "tiny by its matrix": f"BT /F1 12 Tf 0.01 0 0 0.01 72 600 Tm ({SECRET}) Tj ET",
    "tiny by the page's matrix": f"q 0.01 0 0 0.01 0 0 cm BT /F1 12 Tf 72 600 Td ({SECRET}) Tj ET Q",
    "white beside a dark area": f"0 0 0 rg 300 590 100 30 re f 1 g BT /F1 12 Tf 72 600 Td ({SECRET}) Tj ET",
}
SEEN_PDF = {
    "black": f"0 g BT /F1 12 Tf 72 600 Td ({SECRET}) Tj ET",
    "white on a dark area": f"0 0 0.5 rg 60 590 300 30 re f 1 g BT /F1 12 Tf 72 600 Td ({SECRET}) Tj ET",
    "color restored": f"q 1 g Q BT /F1 12 Tf 72 600 Td ({SECRET}) Tj ET",
    "mode restored": f"q BT 3 Tr ET Q BT /F1 12 Tf 72 600 Td ({SECRET}) Tj ET",
    "the text layer of a scan": f"q 612 0 0 792 0 0 cm /Im1 Do Q BT /F1 12 Tf 3 Tr 72 600 Td ({SECRET}) Tj ET",
    "small": f"BT /F1 4 Tf 72 600 Td ({SECRET}) Tj ET",
    "scaled up": f"BT /F1 1 Tf 12 0 0 12 72 600 Tm ({SECRET}) Tj ET",
}


@pytest.mark.parametrize("how", HIDDEN_PDF)
def test_pdf_that_is_not_seen(tmp_path, how):
    text, notices = read(tmp_path / "a.pdf", pdf((TEXT + HIDDEN_PDF[how]).encode()))
    assert text.strip() == "Before" and notices[0].startswith(COUNT)


@pytest.mark.parametrize("how", SEEN_PDF)
def test_pdf_that_is_seen(tmp_path, how):
    text, notices = read(tmp_path / "a.pdf", pdf((TEXT + SEEN_PDF[how]).encode()))
    assert "Before" in text and SECRET in text and notices == ()


def shade(element, fill="1F3864"):
    element.append(parse_xml(f'<w:shd {nsdecls("w")} w:val="clear" w:fill="{fill}"/>'))


def hide_docx(document, how):
    """Add a paragraph with the secret to a document, hidden in one of several ways; or seen, for the last few."""
    run = document.add_paragraph().add_run(SECRET)
    style = document.styles.add_style("Quiet", WD_STYLE_TYPE.CHARACTER)
    if how == "hidden":
        run.font.hidden = True
    elif how == "not hidden":
        run.font.hidden = False
    elif how == "tiny":
        run.font.size = Pt(1)
    elif how == "small":
        run.font.size = Pt(6)
    elif how == "by a style":
        style.font.hidden = True
        run.style = style
    elif how == "by the style of the paragraph":
        quiet = document.styles.add_style("Quieter", WD_STYLE_TYPE.PARAGRAPH)
        quiet.font.color.rgb = RGBColor(255, 255, 255)
        document.paragraphs[-1].style = quiet
    else:
        run.font.color.rgb = RGBColor(255, 255, 255)
    if how == "white on a dark run":
        shade(run._r.get_or_add_rPr())
    elif how == "white in a dark paragraph":
        shade(document.paragraphs[-1]._p.get_or_add_pPr())


@pytest.mark.parametrize("how", ["hidden", "tiny", "white", "by a style", "by the style of the paragraph"])
def test_docx_that_is_not_seen(tmp_path, how):
    document = docx.Document()
    document.add_paragraph("Before")
    hide_docx(document, how)
    text, notices = read(tmp_path / "a.docx", saved(document))
    assert text == "Before" and notices[0].startswith(COUNT)


@pytest.mark.parametrize("how", ["not hidden", "small", "white on a dark run", "white in a dark paragraph"])
def test_docx_that_is_seen(tmp_path, how):
    document = docx.Document()
    document.add_paragraph("Before")
    hide_docx(document, how)
    text, notices = read(tmp_path / "a.docx", saved(document))
    assert text == f"Before\n{SECRET}" and notices == ()
