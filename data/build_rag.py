"""Render the PDF, DOCX and HTML documents in data/rag from their sources. Only maintainers need to run it.

    python data/build_rag.py
    python data/build_rag.py --output_dir outputs/documents

`rag/sources/NAME.md` is written by hand and becomes `rag/documents/NAME.SUFFIX`, with the suffix in `SUFFIXES`; a line
`<!-- page -->` starts a new page. The MD and TXT documents are their own sources.

Needs `markdown-it-py`, `python-docx`, the program `chromium` (prints the PDFs) and the font WenQuanYi Zen Hei; only the
glyphs in use are embedded. PDF and DOCX contain the time, so their bytes change with each run;
tests/test_rag_samples.py compares their text with the sources.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RAG = Path(__file__).resolve().parent / "rag"
SUFFIXES = {
    "qinghe_visiting_guide": "pdf",
    "child_fever_zh": "pdf",
    "home_blood_pressure_zh": "docx",
    "lab_report_zh": "html",
    "willowbrook_patient_handbook": "pdf",
    "blood_pressure_tablets": "pdf",
    "adult_fever_and_flu": "docx",
    "blood_sugar_testing": "html",
}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FONT = "WenQuanYi Zen Hei"
PAGE_BREAK = "<!-- page -->"

HTML = """\
<!DOCTYPE html>
<html lang="{language}">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
@page {{ size: A4; margin: 22mm; }}
body {{ font-family: {font}, sans-serif; font-size: 11pt; line-height: 1.5; max-width: 46em; }}
table {{ border-collapse: collapse; }}
td, th {{ border: 1px solid #999; padding: 2px 8px; text-align: left; }}
.page {{ break-before: page; }}
</style>
</head>
<body>
{body}</body>
</html>
"""


def title_of(source: str) -> str:
    return source.splitlines()[0].removeprefix("# ")


def language_of(source: str) -> str:
    """`zh` or `en`, by the title."""
    return "en" if title_of(source).isascii() else "zh"


def to_html(source: str, font: str) -> str:
    """A complete HTML page from Markdown that begins with its title."""
    from markdown_it import MarkdownIt

    markdown = MarkdownIt("commonmark", {"html": True}).enable("table")
    body = markdown.render(source).replace(PAGE_BREAK, '<div class="page"></div>')
    return HTML.format(language=language_of(source), title=title_of(source), font=font, body=body)


def write_html(source: str, path: Path) -> None:
    path.write_text(to_html(source, "system-ui"), encoding="utf-8")


def write_pdf(source: str, path: Path) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)))
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        page.write_text(to_html(source, f'"{FONT}"'), encoding="utf-8")
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile"]
        command += ["--no-pdf-header-footer", f"--print-to-pdf={path.resolve()}", page.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)


def write_docx(source: str, path: Path) -> None:
    """Headings, paragraphs, lists and tables with Word's own styles."""
    import docx
    from markdown_it import MarkdownIt

    document = docx.Document()
    document.core_properties.title = title_of(source)
    document.core_properties.language = language_of(source)
    document.core_properties.author = ""
    document.core_properties.comments = ""
    style, rows = "", []
    for token in MarkdownIt("commonmark").enable("table").parse(source):
        if token.type == "heading_open":
            style = "Title" if token.tag == "h1" else f"Heading {int(token.tag[1]) - 1}"
        elif token.type == "bullet_list_open":
            style = "List Bullet"
        elif token.type in ("heading_close", "bullet_list_close"):
            style = ""
        elif token.type == "tr_open":
            rows.append([])
        elif token.type == "inline" and rows:
            rows[-1].append(token.content)
        elif token.type == "inline":
            document.add_paragraph(token.content, style=style or None)
        elif token.type == "table_close":
            add_table(document, rows)
            rows = []
    document.save(path)


def add_table(document: Any, rows: list[list[str]]) -> None:
    table = document.add_table(rows=len(rows), cols=len(rows[0]), style="Table Grid")
    for row, cells in zip(table.rows, rows, strict=True):
        for cell, text in zip(row.cells, cells, strict=True):
            cell.text = text


WRITERS = {"pdf": write_pdf, "docx": write_docx, "html": write_html}


def missing_tools() -> list[str]:
    """What is needed to write the documents and is not installed."""
    missing = []
    for module, package in (("markdown_it", "markdown-it-py"), ("docx", "python-docx")):
        try:
            __import__(module)
        except ImportError:
            missing.append(f"the package {package} (pip install {package})")
    if not any(map(shutil.which, BROWSERS)):
        missing.append("a program that prints PDFs: chromium (apt-get install chromium)")
    command = ["fc-list", FONT]
    if not shutil.which(command[0]) or not subprocess.run(command, capture_output=True).stdout:
        missing.append(f"the font {FONT} (apt-get install fontconfig fonts-wqy-zenhei)")
    return missing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=RAG / "documents", help="where to write")
    arguments = parser.parse_args()
    if missing := missing_tools():
        sys.exit("The documents cannot be written; this computer lacks\n  " + "\n  ".join(missing))
    paths = [arguments.output_dir / f"{name}.{suffix}" for name, suffix in SUFFIXES.items()]
    # The committed ones are written again.
    present = [path for path in paths if path.exists() and path.resolve().parent != RAG / "documents"]
    if present:
        sys.exit(f"error: {present[0]} exists. Choose another --output_dir, or remove it first.")
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    for name, suffix in SUFFIXES.items():
        source = (RAG / "sources" / f"{name}.md").read_text(encoding="utf-8")
        path = arguments.output_dir / f"{name}.{suffix}"
        WRITERS[suffix](source, path)
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
