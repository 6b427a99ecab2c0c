"""Statistics of data: percentiles keep what they promise, languages are recognised, the page needs no network."""

import random
import re
import xml.etree.ElementTree as ET

from medicalgpt.data.statistics import RowStatistics, histogram, language_of, percentile, percentiles, report_page

import pytest


@pytest.mark.parametrize("seed", range(20))
def test_a_limit_at_a_percentile_keeps_that_share_and_no_smaller_one_does(seed):
    rng = random.Random(seed)
    values = [rng.randint(0, 30) for _ in range(rng.randint(1, 60))]
    for share in (1, 50, 90, 95, 99, 100):
        limit = percentile(values, share)
        assert sum(value <= limit for value in values) * 100 >= share * len(values)
        assert sum(value < limit for value in values) * 100 < share * len(values)


def test_percentiles_by_name():
    assert percentiles(range(1, 21)) == {"50": 10, "90": 18, "95": 19, "99": 20, "100": 20}
    assert percentiles([]) == {}
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("感冒了怎么办？多休息。", "Chinese"),
        ("阿司匹林（aspirin）的剂量是多少 mg？", "Chinese"),
        ("What is 感冒 in English? It is a cold.", "Latin script"),
        ("Fièvre à 39 °C depuis hier", "Latin script"),
        ("風邪の時はどうすればいいですか。", "Japanese"),
        ("감기에 걸렸을 때", "Korean"),
        ("Что делать при простуде?", "Cyrillic script"),
        ("ماذا أفعل", "Arabic script"),
        ("12 + 3 = 15", "no letters"),
        ("", "no letters"),
    ],
)
def test_languages(text, language):
    assert language_of(text) == language


def test_a_histogram_has_every_value_once():
    values = [*range(1000), 10**6]
    bars = histogram(values)
    assert sum(count for _, count in bars) == len(values) and len(bars) <= 26
    assert bars[0][0].startswith("0–") and bars[-1][0].startswith("above ")
    assert histogram([]) == [] and histogram([0, 0]) == [("0–0", 2)]


def test_the_page_is_complete_and_needs_no_network():
    statistics = RowStatistics("a <b>.jsonl", "chat", rows=3, usable=2, tokens=[5, 900], limit=10)
    turns = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "回答"}]
    statistics.add([{"messages": turns}, {"messages": [*turns, *turns]}])
    assert statistics.as_dict() == {
        "file": "a <b>.jsonl",
        "format": "chat",
        "rows": 3,
        "usable": 2,
        "exact_duplicates": 0,
        "near_duplicates": 0,
        "turns": {2: 1, 4: 1},
        "languages": {"Chinese": 2},
        "characters": {"50": 4, "90": 9, "95": 9, "99": 9, "100": 9},
        "characters_of_answers": {"50": 2, "90": 2, "95": 2, "99": 2, "100": 2},
        "tokens": {"50": 5, "90": 900, "95": 900, "99": 900, "100": 900},
        "tokens_in_total": 905,
        "limit": 10,
        "longer_than_limit": 1,
    }
    page = report_page([statistics], ["note & <more>"])
    assert "a &lt;b&gt;.jsonl" in page and "note &amp; &lt;more&gt;" in page
    assert not re.search(r"https?:|src=|<script|@import|url\(", page)
    pictures = re.findall(r"<svg.*?</svg>", page)
    assert len(pictures) == 4
    for picture in pictures:
        ET.fromstring(picture)
