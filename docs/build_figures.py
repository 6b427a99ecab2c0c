"""Write the measured figures of docs/figures.yaml into the pages that show them.

    python -m docs.build_figures            write them
    python -m docs.build_figures --check    exit code 1 if a page shows something else

A page takes a single figure, or a table, by a comment around it, which no reader of the page sees:

    <!--figure pipeline.exact.sft of-->984 of 994<!--/figure-->

    <!-- figures: pipeline exact everyday -->

    (the table, or only these rows of it)

    <!-- /figures -->

A line must not begin with a figure's comment: Markdown would end the paragraph there.

The second word of a figure is its form, see `FORMS`. Pages whose names end in _zh get Chinese words.
"""

import argparse
import re
from pathlib import Path
from typing import Any

from medicalgpt.errors import UserError, run_main

import yaml

ROOT = Path(__file__).resolve().parent.parent
FIGURES = Path(__file__).parent / "figures.yaml"
# How a figure can be shown, as a function of its value and of the language.
FORMS = {
    "plain": lambda value, language: number(value),
    "of": lambda value, language: count(value, language, share=False),
    "share": lambda value, language: count(value, language, share=True),
    "percent": lambda value, language: f"{100 * value[0] / value[1]:.1f}%",
    "count": lambda value, language: number(value[0]),
    "total": lambda value, language: number(value[1]),
    "minutes": lambda value, language: f"{value / 60:.1f}",
}
FIGURE = re.compile(r"(<!--figure (\S+?)(?: (\w+))?-->).*?(<!--/figure-->)")
TABLE = re.compile(r"(<!-- figures: (\w+)((?: \w+)*) -->\n).*?(<!-- /figures -->)", re.DOTALL)


def main() -> None:
    """Write the pages, or check them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a page is not current")
    check = parser.parse_args().check
    figures = load()
    for page in pages():
        before = page.read_text(encoding="utf-8")
        after = filled(before, figures, language_of(page))
        if after == before:
            continue
        if check:
            raise UserError(f"{page.relative_to(ROOT)} is not current. Run: python -m docs.build_figures")
        page.write_text(after, encoding="utf-8")
        print(f"{page.relative_to(ROOT)}: written")


def load(path: Path = FIGURES) -> dict[str, dict[str, Any]]:
    """The groups of figures by name.

    Raises:
        UserError: a row of a table does not have one value for each column.
    """
    figures = yaml.safe_load(path.read_text(encoding="utf-8"))
    for name, group in figures.items():
        for key, row in group.get("rows", {}).items():
            if len(row["values"]) != len(group["columns"]):
                raise UserError(f"{path.name}: {name}.{key} has {len(row['values'])} values, not one for each column.")
    return figures


def pages() -> list[Path]:
    """All pages that may show figures."""
    return sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def language_of(page: Path) -> str:
    """`zh` for a page whose name ends in _zh, else `en`."""
    return "zh" if page.stem.endswith("_zh") else "en"


def filled(text: str, figures: dict[str, dict[str, Any]], language: str) -> str:
    """A page with the figures as they are now.

    Raises:
        UserError: the page asks for a figure, row or form that does not exist.
    """

    def figure(match: re.Match) -> str:
        opening, name, form, closing = match.groups()
        value = look_up(figures, name)
        if (form or "plain") not in FORMS:
            raise UserError(f"A figure does not have the form {form}. Known: {', '.join(FORMS)}")
        return opening + FORMS[form or "plain"](value, language) + closing

    def block(match: re.Match) -> str:
        opening, name, rows, closing = match.groups()
        return f"{opening}\n{table(figures, name, rows.split(), language)}\n{closing}"

    return FIGURE.sub(figure, TABLE.sub(block, text))


def look_up(figures: dict[str, dict[str, Any]], name: str) -> Any:
    """The value of `group.figure` or of `group.row.column`."""
    group, _, rest = name.partition(".")
    row, _, column = rest.partition(".")
    try:
        if not column:
            return figures[group][row]
        return figures[group]["rows"][row]["values"][figures[group]["columns"].index(column)]
    except (KeyError, ValueError) as error:
        raise UserError(f"docs/figures.yaml has no figure {name}. Add it, or correct the page.") from error


def table(figures: dict[str, dict[str, Any]], name: str, rows: list[str], language: str) -> str:
    """A table in Markdown; without `rows`, of all rows of the group."""
    try:
        group = figures[name]
        chosen = [group["rows"][row] for row in rows or group["rows"]]
    except KeyError as error:
        raise UserError(f"docs/figures.yaml has no table or row {error} for `figures: {name}`.") from error
    lines = [["", *group["heads"][language]], ["---"] * (1 + len(group["columns"]))]
    for row in chosen:
        cells = [
            count(value, language, share=value[0] > 0) if isinstance(value, list) else number(value)
            for value in row["values"]
        ]
        lines.append([row[language], *cells])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def number(value: float | str) -> str:
    """With commas between thousands; strings, which keep their zeros at the end, as they are."""
    return value if isinstance(value, str) else f"{value:,}"


def count(value: list[int], language: str, share: bool) -> str:
    """`984 of 994 (99.0%)`, in Chinese `984 / 994（99.0%）`."""
    hits, total = value
    text = f"{hits:,} of {total:,}" if language == "en" else f"{hits:,} / {total:,}"
    if not share or total == 100:
        return text
    percent = f"{100 * hits / total:.1f}%"
    return f"{text} ({percent})" if language == "en" else f"{text}（{percent}）"


if __name__ == "__main__":
    run_main(main)
