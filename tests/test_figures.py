"""Figures of the pages come from docs/figures.yaml, so that two of them cannot contradict each other."""

import re
import sys
from pathlib import Path

from docs import build_figures
from medicalgpt.errors import UserError

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Pages on which every measured figure is bound.
BOUND = ("README.md", "README_zh.md", "docs/quickstart.md", "docs/quickstart_zh.md")
BOUND += ("docs/inference_guide.md", "docs/inference_guide_zh.md")
# What a measured figure looks like: a count of a total, or a number with a unit of time, memory or speed.
MEASURED = re.compile(
    r"\b\d[\d,.]* (?:of|/) \d[\d,]+|\b\d[\d,.]*(?:%| (?:s|seconds|minutes|GB|MB|tokens/s|秒|分钟|倍)(?!\w))"
)
GROUP = {
    "columns": ["a", "b"],
    "heads": {"en": ["A", "B"], "zh": ["甲", "乙"]},
    "rows": {"exact": {"en": "exact", "zh": "答对", "values": [[984, 994], 4287]}},
}
FIGURES = {"run": {"seconds": 1039, **GROUP}}


def unbound(text: str) -> list[str]:
    """Measured figures of a page outside the comments that bind them, its code and its tables by arithmetic."""
    text = build_figures.TABLE.sub("", build_figures.FIGURE.sub("", text))
    return MEASURED.findall(re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("name", BOUND)
def test_every_measured_figure_is_bound(name):
    assert not unbound((ROOT / name).read_text(encoding="utf-8"))


def test_the_measured_section_of_the_changelog_names_the_pipelines_figures():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "<!--figure pipeline.exact.sft of-->" in text.partition("### Measured")[2].partition("### ")[0]


def test_a_figure_that_is_not_bound_is_noticed():
    assert unbound("It took 797 s, and 984 of 994 were right.") == ["797 s", "984 of 994"]
    assert not unbound("It took <!--figure run.seconds-->797<!--/figure--> s.\n\n```\n5 s\n```\n")


def test_all_pages_are_current():
    figures = build_figures.load()
    for page in build_figures.pages():
        text = page.read_text(encoding="utf-8")
        assert build_figures.filled(text, figures, build_figures.language_of(page)) == text, page.name


@pytest.mark.parametrize("page", build_figures.pages(), ids=lambda page: page.name)
def test_no_paragraph_is_ended_by_a_comment(page):
    """A line that begins with a comment is a block of HTML for Markdown."""
    assert not re.findall(r"^\s*<!--figure ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("marker", "language", "shown"),
    [
        ("run.seconds", "en", "1,039"),
        ("run.seconds minutes", "en", "17.3"),
        ("run.exact.a of", "en", "984 of 994"),
        ("run.exact.a share", "zh", "984 / 994（99.0%）"),
        ("run.exact.a percent", "en", "99.0%"),
        ("run.exact.b", "zh", "4,287"),
    ],
)
def test_figures_are_filled_in(marker, language, shown):
    page = build_figures.filled(f"a <!--figure {marker}-->old<!--/figure--> b", FIGURES, language)
    assert page == f"a <!--figure {marker}-->{shown}<!--/figure--> b"


def test_tables_are_filled_in():
    page = build_figures.filled("<!-- figures: run exact -->\nold\n<!-- /figures -->", FIGURES, "zh")
    assert "|  | 甲 | 乙 |\n| --- | --- | --- |\n| 答对 | 984 / 994（99.0%） | 4,287 |\n" in page
    assert build_figures.filled(page, FIGURES, "zh") == page


@pytest.mark.parametrize("marker", ["run.minutes", "run.exact.c", "none.at", "run.seconds furlongs"])
def test_unknown_figures_are_refused(marker):
    with pytest.raises(UserError, match="no"):
        build_figures.filled(f"<!--figure {marker}-->1<!--/figure-->", FIGURES, "en")


def test_a_changed_figure_makes_every_page_stale(monkeypatch):
    figures = build_figures.load()
    figures["pipeline"]["seconds"] += 60
    monkeypatch.setattr(build_figures, "load", lambda: figures)
    monkeypatch.setattr(sys, "argv", ["docs/build_figures.py", "--check"])
    with pytest.raises(UserError, match="Run: python -m docs.build_figures"):
        build_figures.main()
