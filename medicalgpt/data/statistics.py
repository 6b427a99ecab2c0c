"""What a set of rows is like: how long its rows are, in which script they are written, how many turns they have."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from medicalgpt.data.duplicates import text_of

import numpy as np

SHOWN_PERCENTILES = (50, 90, 95, 99, 100)
# The shares of rows for which the limit that takes them is printed.
PROPOSED_PERCENTILES = (95, 99, 100)
# Words of a language per character or word found; a Chinese word has about 1.5 characters.
SCRIPTS = {
    "Japanese": (re.compile(r"[\u3040-\u30ff]"), 1.0),
    "Korean": (re.compile(r"[\uac00-\ud7af]"), 0.4),
    "Chinese": (re.compile(r"[\u3400-\u9fff\U00020000-\U0003134f]"), 0.65),
    "Latin script": (re.compile(r"[A-Za-z\u00c0-\u024f]+"), 1.0),
}
# Kana among Han characters is Japanese.
KANA_SHARE = 0.1
BAR_COLOUR = "#3b82f6"


def percentile(values: Sequence[int] | np.ndarray, share: int) -> int:
    """The smallest of `values` that at least `share` percent of them do not exceed, so that a limit there keeps them.

    Raises:
        ValueError: no values.
    """
    if not len(values):
        raise ValueError("no values")
    # Whole numbers: as a float, 95% of 20 rows could become the 20th instead of the 19th.
    rank = max(1, -(-share * len(values) // 100))
    return int(np.partition(np.asarray(values), rank - 1)[rank - 1])


def percentiles(values: Sequence[int] | np.ndarray, shares: Sequence[int] = SHOWN_PERCENTILES) -> dict[str, int]:
    """`percentile` of each share, by its name; empty without values."""
    return {str(share): percentile(values, share) for share in shares} if len(values) else {}


def language_of(text: str) -> str:
    """Chinese, Japanese, Korean, or the script of most words of a text, such as `Latin script`."""
    words = {name: len(pattern.findall(text)) * weight for name, (pattern, weight) in SCRIPTS.items()}
    if words["Japanese"] >= KANA_SHARE * words["Chinese"] and words["Japanese"]:
        words["Japanese"] += words.pop("Chinese")
    name = max(words, key=words.__getitem__)
    if words[name]:
        return name
    letter = next((character for character in text if character.isalpha()), None)
    return f"{unicodedata.name(letter, 'unknown').split()[0].capitalize()} script" if letter else "no letters"


@dataclass
class RowStatistics:
    """Statistics of the converted rows of a file.

    Attributes:
        characters: length of each row, in characters of its texts.
        answers: length of each answer that is trained on; of preferences, of both answers.
        tokens: length of each row in tokens, if they were counted.
    """

    file: str
    kind: str
    rows: int
    usable: int
    characters: list[int] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    turns: Counter = field(default_factory=Counter)
    languages: Counter = field(default_factory=Counter)
    tokens: Sequence[int] | np.ndarray = ()
    limit: int | None = None
    exact_duplicates: int = 0
    near_duplicates: int = 0

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Count converted rows."""
        for row in rows:
            text = text_of(row)
            self.characters.append(len(text))
            self.languages[language_of(text)] += 1
            if "messages" in row:
                self.turns[len(row["messages"])] += 1
                answers = [row[name] for name in ("chosen", "rejected") if name in row]
                answers = answers or [message for message in row["messages"] if message["role"] == "assistant"]
                self.answers += [len(message["content"]) for message in answers]

    def as_dict(self) -> dict[str, Any]:
        """What a JSON file holds: counts, and percentiles of the lengths."""
        found = {
            "file": self.file,
            "format": self.kind,
            "rows": self.rows,
            "usable": self.usable,
            "exact_duplicates": self.exact_duplicates,
            "near_duplicates": self.near_duplicates,
            "turns": dict(sorted(self.turns.items())),
            "languages": dict(self.languages.most_common()),
            "characters": percentiles(self.characters),
            "characters_of_answers": percentiles(self.answers),
        }
        if len(self.tokens):
            lengths = np.asarray(self.tokens)
            found |= {"tokens": percentiles(lengths), "tokens_in_total": int(lengths.sum())}
            if self.limit is not None:
                found |= {"limit": self.limit, "longer_than_limit": int((lengths > self.limit).sum())}
        return found


def histogram(values: Sequence[int] | np.ndarray, bars: int = 24) -> list[tuple[str, int]]:
    """Numbers of values in ranges of equal width, from 0 to the 99th percentile, and of those above it."""
    if not len(values):
        return []
    end = percentile(values, 99)
    width = max(1, -(-(end + 1) // bars))
    counts = Counter(min(value // width, end // width + 1) if value > end else value // width for value in values)
    found = [(f"{index * width:,}–{(index + 1) * width - 1:,}", counts[index]) for index in range(end // width + 1)]
    above = counts[end // width + 1]
    return [*found, (f"above {end:,}", above)] if above else found


def svg_bars(bars: Sequence[tuple[str, int]], title: str, width: int = 560) -> str:
    """An inline SVG of horizontal bars, each with its name and number, in the text colour of the page."""
    left, step, top = 150, 18, 34
    height = top + step * len(bars) + 8
    highest = max((count for _, count in bars), default=0) or 1
    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}" fill="currentColor" '
        'font-family="system-ui, sans-serif" font-size="12">',
        f'<text x="0" y="16" font-size="14" font-weight="600">{escape(title)}</text>',
    ]
    for index, (name, count) in enumerate(bars):
        y, length = top + index * step, count / highest * (width - left - 80)
        parts.append(
            f'<text x="{left - 8}" y="{y + 11}" text-anchor="end">{escape(name)}</text>'
            f'<rect x="{left}" y="{y}" width="{max(length, 1 if count else 0):.1f}" height="13" fill="{BAR_COLOUR}"/>'
            f'<text x="{left + length + 6:.1f}" y="{y + 11}">{count:,}</text>'
        )
    return "".join(parts) + "</svg>"


STYLE = (
    "body{font-family:system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem;line-height:1.5}"
    "table{border-collapse:collapse;margin:1rem 0}td,th{border:1px solid #8888;padding:.2rem .7rem;text-align:right}"
    "td:first-child,th:first-child{text-align:left}.charts{display:flex;flex-wrap:wrap;gap:1.5rem}"
    ".charts svg{width:min(100%,34rem);height:auto}pre{white-space:pre-wrap;overflow-wrap:anywhere}"
    ":root{color-scheme:light dark}"
)


def report_page(files: Sequence[RowStatistics], notes: Sequence[str]) -> str:
    """One HTML file without network requests: what `as_dict` has, as tables and pictures.

    Args:
        notes: paragraphs about all files, such as problems and what both sides of a split share.
    """
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f"<title>Data</title><style>{STYLE}</style></head><body><h1>Data</h1>",
        *(f"<pre>{escape(note)}</pre>" for note in notes),
    ]
    for statistics in files:
        found = statistics.as_dict()
        lengths = [
            (name, values) for name, values in (("tokens", statistics.tokens), ("characters", statistics.characters))
        ]
        charts = [svg_bars(histogram(values), f"Rows by {name}") for name, values in lengths if len(values)]
        if statistics.turns:
            charts.append(svg_bars([(f"{turns}", count) for turns, count in found["turns"].items()], "Rows by turns"))
        charts.append(svg_bars(list(found["languages"].items()), "Rows by language"))
        parts += [
            f"<h2>{escape(statistics.file)}</h2>",
            f"<p>{statistics.rows:,} rows, {statistics.usable:,} usable, {escape(statistics.kind)}; "
            f"{statistics.exact_duplicates:,} exact and {statistics.near_duplicates:,} near-duplicates</p>",
            _table(found),
            f'<div class="charts">{"".join(charts)}</div>',
        ]
    return "\n".join([*parts, "</body></html>\n"])


def _table(found: Mapping[str, Any]) -> str:
    names = {"tokens": "tokens", "characters": "characters", "characters_of_answers": "characters of an answer"}
    rows = [(title, found[name]) for name, title in names.items() if found.get(name)]
    head = "".join(f"<th>{share}%</th>" for share in SHOWN_PERCENTILES)
    body = "".join(
        f"<tr><td>{title}</td>{''.join(f'<td>{value:,}</td>' for value in values.values())}</tr>"
        for title, values in rows
    )
    return f"<table><tr><th>share of rows up to this length</th>{head}</tr>{body}</table>"
