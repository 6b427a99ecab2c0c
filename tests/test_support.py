"""Whether a passage supports a sentence: numbers, units, negations, opposites, key terms, in two languages."""

import json
import re
from pathlib import Path

from medicalgpt.evaluation.support import NEGATION, NOT_NEGATIONS, count_negations, find_unsupported
from medicalgpt.rag.retrieval import DocumentStore, normalize

import pytest

RAG = Path(__file__).resolve().parent.parent / "data" / "rag"

# (sentence, passage)
SUPPORTED = [
    ("The warfarin dose is 5 mg daily.", "The warfarin dose is 5 mg daily."),
    ("Take 0.5 g twice a day.", "Take 500 mg 2 times per day."),
    ("一次 500 毫克", "每次 0.5 克。"),
    ("每次服用 500mg", "每次服用 500 毫克。"),
    ("The aspirin dose is 100 mg.", "Warfarin 5 mg. Aspirin 100 mg."),
    ("布洛芬至少隔 6 小时", "对乙酰氨基酚两次之间至少隔 4 小时，布洛芬至少隔 6 小时。"),
    ("每天吃盐不超过 5 克", "每人每天吃盐不超过 5 克，酱油也要算。"),
    ("孩子不可以吃阿司匹林退热", "孩子不能吃阿司匹林来退热，它可能引起瑞氏综合征。"),
    ("Do not crush XR tablets.", "Never crush or chew tablets marked XR."),
    ("体温 38 到 39 度", "体温 38-39℃。"),
    ("Stitches stay in for ten days.", "The stitches stay in for 10 days."),
    ("两周后复查", "2 周后复查。"),
    ("HbA1c is checked every three months.", "HbA1c is measured and checked every 3 months."),
    ("It is open until 5 pm.", "It is open until 5:00 pm."),
    ("含量为 50%", "含量为 50％。"),
    ("Ramipril: 5 mg", "Drug | Dose\nRamipril | 5 mg\nLisinopril | 10 mg"),
    ("The target of ramipril is 5 mg.", "Drug | target in mg\nRamipril | 5\nLisinopril | 10"),
]
# (sentence, passage, what is not found)
UNSUPPORTED = [
    ("The warfarin dose is 50 mg daily.", "The warfarin dose is 5 mg daily.", "50 mg"),
    ("The warfarin dose is 5 g daily.", "The warfarin dose is 5 mg daily.", "5 g"),
    ("The dose is 5 mg/kg of body weight.", "The dose is 5 mg, whatever the body weight.", "5 mg/kg"),
    ("The warfarin dose is 100 mg.", "Warfarin 5 mg. Aspirin 100 mg.", "100 mg"),
    ("The warfarin dose is 100 mg.", "The usual aspirin dose is 100 mg.", "warfarin"),
    ("布洛芬至少隔 4 小时", "对乙酰氨基酚两次之间至少隔 4 小时，布洛芬至少隔 6 小时。", "4 小时"),
    ("对乙酰氨基酚至少隔 6 小时", "对乙酰氨基酚两次之间至少隔 4 小时，布洛芬至少隔 6 小时。", "6 小时"),
    ("Ramipril: 10 mg", "Drug | Dose\nRamipril | 5 mg\nLisinopril | 10 mg", "10 mg"),
    ("Methotrexate 10 mg daily", "Methotrexate 10 mg weekly", "per day"),
    ("每天吃一次甲氨蝶呤", "每周吃一次甲氨蝶呤。", "per day"),
    ("每天吃盐至少 5 克", "每人每天吃盐不超过 5 克，酱油也要算。", "至少"),
    ("The limit is more than 180 mg/dL.", "The limit is below 180 mg/dL.", "more than"),
    ("孩子可以吃阿司匹林退热", "孩子不能吃阿司匹林来退热，它可能引起瑞氏综合征。", "不"),
    ("孩子不能吃布洛芬退热", "孩子可以吃布洛芬退热。", "不"),
    ("化开的胰岛素可以再用", "冻过的胰岛素即使化开也勿再用。", "勿"),
    ("XR tablets may be crushed.", "Never crush or chew tablets marked XR.", "never"),
    ("Hydrogen peroxide may be used on the wound.", "Do not use hydrogen peroxide on the wound.", "not"),
    ("饭后半小时服用", "饭前半小时服用。", "饭后"),
    ("头两天要热敷", "头两天要冰敷。", "热敷"),
    ("Ibuprofen lowers blood pressure.", "Ibuprofen can raise blood pressure.", "lower"),
    ("Tetanus shots hurt.", "Bus line W7 stops at the door.", "tetanu"),
    ("含量为 50%", "含量为 5%。", "50 %"),
    ("体温达到 39.5 度", "体温达到 39℃。", "39.5 度"),
    ("服用头孢克肟三天", "服用阿莫西林三天。", "头孢"),
]


@pytest.mark.parametrize(("sentence", "passage"), SUPPORTED)
def test_supported(sentence, passage):
    assert find_unsupported(sentence, passage) == ()


@pytest.mark.parametrize(("sentence", "passage", "missing"), UNSUPPORTED)
def test_not_supported(sentence, passage, missing):
    assert any(missing in found for found in find_unsupported(sentence, passage)), find_unsupported(sentence, passage)


def test_headings_count_as_the_passage():
    assert find_unsupported("Warfarin is 5 mg daily.", "The dose is 5 mg daily.") == ("warfarin",)
    assert find_unsupported("Warfarin is 5 mg daily.", "The dose is 5 mg daily.", "Warfarin") == ()


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """(evidence, its passage, all other passages) of each sample question."""
    store = DocumentStore(tmp_path_factory.mktemp("index"), 220, 40)
    passages = [each for path in sorted((RAG / "documents").iterdir()) for each in store.read(path)[0]]
    found = []
    for name in ("questions.jsonl", "questions_held_out.jsonl"):
        for row in map(json.loads, (RAG / name).read_text(encoding="utf-8").splitlines()):
            if row["file"]:
                gold = [each for each in passages if normalize(row["evidence"]) in each.normalized]
                found.append((row["evidence"], gold[0], [each for each in passages if each not in gold]))
    return found


def is_supported(sentence, passage):
    return not find_unsupported(sentence, passage.text, " ".join(passage.headings))


def test_what_documents_say_is_supported_and_its_mutations_are_not(rows):
    """A quotation by its passage; not with another number, without its negation, or by another passage."""
    assert all(is_supported(quotation, passage) for quotation, passage, _ in rows)
    numbers, flips = [], []
    for quotation, passage, _ in rows:
        if number := re.search(r"\d+", quotation):
            changed = f"{quotation[: number.start()]}{int(number[0]) * 10}{quotation[number.end() :]}"
            numbers.append(is_supported(changed, passage))
        text = quotation.lower()
        negation = NEGATION.search(NOT_NEGATIONS.sub(lambda match: "#" * len(match[0]), text))
        if negation and count_negations(text) == 1:
            flips.append(is_supported(text[: negation.start()] + text[negation.end() :], passage))
    assert len(numbers) > 150 and sum(numbers) <= 2 and len(flips) > 50 and sum(flips) <= 3
    others = [is_supported(quotation, other) for quotation, _, passages in rows[::7] for other in passages[::5]]
    assert len(others) > 500 and sum(others) == 0
