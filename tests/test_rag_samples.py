"""Documents and questions of data/rag: files hold their sources, and each answer stands where it is said to."""

import json
import os
import re
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path

import docx
import pypdf
import pytest
from bs4 import BeautifulSoup

ROOT = Path(__file__).resolve().parent.parent
RAG = ROOT / "data" / "rag"
BUILDER = ROOT / "data" / "build_rag.py"
SUFFIXES = runpy.run_path(str(BUILDER))["SUFFIXES"]
DOCUMENTS = sorted((RAG / "documents").iterdir())
QUESTIONS = [json.loads(line) for line in (RAG / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
ANSWERED = [row for row in QUESTIONS if row["file"]]
UNANSWERED = [row for row in QUESTIONS if not row["file"]]
NUMBER = re.compile(r"(?<![A-Za-z\d.:/-])\d+(?:[.:/]\d+)*")


def squeeze(text):
    """Without white space and without the bars between the cells of a table."""
    return re.sub(r"[\s|]", "", text)


def source_pages(text):
    """The squeezed text of each page of a Markdown source, without marks."""
    lines = [line for line in text.splitlines() if not re.fullmatch(r"[|-]+", line)]
    pages = "\n".join(re.sub(r"^(#+|-) ", "", line) for line in lines).split("<!-- page -->")
    return [squeeze(page) for page in pages]


def file_pages(path):
    """The squeezed text of each page of a document; all but PDFs have one."""
    if path.suffix == ".pdf":
        return [squeeze(page.extract_text()) for page in pypdf.PdfReader(path).pages]
    if path.suffix == ".docx":
        parts = docx.Document(path).iter_inner_content()
        texts = [
            part.text if hasattr(part, "text") else "".join(cell.text for row in part.rows for cell in row.cells)
            for part in parts
        ]
        return [squeeze("".join(texts))]
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".html":
        return [squeeze(BeautifulSoup(text, "html.parser").body.get_text())]
    return source_pages(text) if path.suffix == ".md" else [squeeze(text)]


@pytest.fixture(scope="module")
def pages():
    """{file name: squeezed text of each page}"""
    return {path.name: file_pages(path) for path in DOCUMENTS}


def test_types_and_languages(pages):
    assert 10 <= len(DOCUMENTS) <= 14
    chinese = [path for path in DOCUMENTS if re.search("[一-鿿]", pages[path.name][0])]
    assert len(chinese) * 2 == len(DOCUMENTS)
    for half in (chinese, [path for path in DOCUMENTS if path not in chinese]):
        types = Counter(path.suffix for path in half)
        assert set(types) == {".pdf", ".docx", ".html", ".md", ".txt"}
        assert any(len(pages[path.name]) > 1 for path in half)
    for path in DOCUMENTS:
        text = "".join(pages[path.name])
        assert 700 <= len(text) <= (1500 if path in chinese else 4500), path.name
        assert path.stat().st_size < 150_000, path.name


def test_the_committed_files_hold_their_sources(pages):
    assert {path.stem for path in (RAG / "sources").iterdir()} == set(SUFFIXES)
    assert {path.name for path in DOCUMENTS if path.suffix not in (".md", ".txt")} == {
        f"{name}.{suffix}" for name, suffix in SUFFIXES.items()
    }
    for name, suffix in SUFFIXES.items():
        expected = source_pages((RAG / "sources" / f"{name}.md").read_text(encoding="utf-8"))
        assert pages[f"{name}.{suffix}"] == expected, f"run python data/build_rag.py: {name}"


def test_structure_survives():
    for path in DOCUMENTS:
        if path.suffix == ".docx":
            document = docx.Document(path)
            styles = Counter(paragraph.style.name for paragraph in document.paragraphs)
            assert document.tables and styles["Title"] == 1 and styles["Heading 1"] >= 5, path.name
        if path.suffix == ".html":
            page = BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
            assert page.find("h1") and len(page("h2")) >= 5 and page.find("li") and page.find("table"), path.name


def test_the_builder_renders_the_sources(tmp_path):
    pytest.importorskip("markdown_it")
    builder = runpy.run_path(str(BUILDER))
    for name, suffix in SUFFIXES.items():
        if suffix != "pdf":
            source = (RAG / "sources" / f"{name}.md").read_text(encoding="utf-8")
            path = tmp_path / f"{name}.{suffix}"
            builder["WRITERS"][suffix](source, path)
            assert file_pages(path) == source_pages(source), name


def test_the_builder_says_what_is_missing(tmp_path):
    done = subprocess.run(
        [sys.executable, str(BUILDER), "--output_dir", str(tmp_path / "out")],
        env={**os.environ, "PATH": str(tmp_path)},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 1
    assert "chromium" in done.stderr and "WenQuanYi" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_places_are_marked_as_made_up_and_nothing_can_be_called_or_visited(path, pages):
    text = "".join(pages[path.name])
    assert re.search("青禾社区医院(（虚构）|是虚构的)", text) or re.search(
        r"WillowbrookCommunityClinic(\(|is)fictional", text
    )
    assert "120" in text or "911" in text, "when to call an ambulance"
    assert not re.search(r"\d{5}|\d{3}-\d{3}|@|https?:|www\.|[路街巷]\d+号|\d+\w*(Street|Road|Avenue)", text)


def test_counts():
    assert len(ANSWERED) >= 120 and len(UNANSWERED) >= 30
    for rows in (ANSWERED, UNANSWERED):
        languages = Counter(row["language"] for row in rows)
        assert set(languages) == {"zh", "en"}
        assert min(languages.values()) >= 0.45 * len(rows)
    asked = Counter(row["file"] for row in ANSWERED)
    assert set(asked) == {path.name for path in DOCUMENTS}
    assert min(asked.values()) >= 8


def test_no_question_stands_twice():
    questions = Counter(re.sub(r"\W", "", row["question"]).lower() for row in QUESTIONS)
    assert not [question for question, count in questions.items() if count > 1]


def test_rows_are_whole():
    for row in ANSWERED:
        assert set(row) == {"question", "language", "file", "page", "evidence", "answer"}, row
        assert row["evidence"] == row["evidence"].strip() != "" and row["answer"] == row["answer"].strip() != "", row
        assert (row["page"] is not None) == row["file"].endswith(".pdf"), row
    for row in UNANSWERED:
        assert set(row) == {"question", "language", "file"} and row["file"] is None, row
    for row in QUESTIONS:
        assert bool(re.search("[一-鿿]", row["question"])) == (row["language"] == "zh"), row


def test_each_evidence_stands_once_in_its_file_and_on_its_page(pages):
    for row in ANSWERED:
        evidence = squeeze(row["evidence"])
        found = [
            (name, number if name.endswith(".pdf") else None)
            for name, texts in pages.items()
            for number, text in enumerate(texts, start=1)
            for _ in re.findall(re.escape(evidence), text)
        ]
        assert found == [(row["file"], row["page"])], row


def test_numbers_of_an_answer_stand_in_its_evidence():
    for row in ANSWERED:
        assert set(NUMBER.findall(row["answer"])) <= set(NUMBER.findall(row["evidence"])), row


def test_many_questions_use_other_words_than_the_document(pages):
    """At least half share no run of four Chinese characters, or no two English words, with their evidence."""
    other = 0
    for row in ANSWERED:
        if row["language"] == "zh":
            question, size = squeeze(row["question"]), 4
            runs = {question[at : at + size] for at in range(len(question) - size + 1)}
            other += not any(run in squeeze(row["evidence"]) for run in runs)
        else:
            words = [set(re.findall(r"[a-z]{4,}", row[field].lower())) for field in ("question", "evidence")]
            other += len(words[0] & words[1]) < 2
    assert other >= len(ANSWERED) / 2, other


@pytest.mark.parametrize("readme", ["README.md", "README_zh.md"])
def test_the_readme_gives_the_true_numbers(readme):
    text = (ROOT / "data" / readme).read_text(encoding="utf-8")
    for count in (len(DOCUMENTS), len(ANSWERED), len(UNANSWERED), len(QUESTIONS)):
        assert re.search(rf"(?<!\d){count}(?!\d)", text), count
    example = next(line for line in text.splitlines() if line.startswith('{"question"') and '"evidence"' in line)
    assert json.loads(example) in QUESTIONS
