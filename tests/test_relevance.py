"""Refusals without a model: the words of a question, what it asks for, and what a passage has of both."""

import json
from collections import Counter
from math import exp, log
from pathlib import Path

from benchmarks import relevance as fitting
from medicalgpt.formats.concepts import concepts_of
from medicalgpt.formats.terms import extract_terms, stem
from medicalgpt.rag.grounding import is_relevant
from medicalgpt.rag.question_kinds import KINDS, demand_of
from medicalgpt.rag.relevance import BIAS, LONE_CHARACTER, UNUSUAL, WEIGHTS, Relevance, Words, sentences
from medicalgpt.rag.retrieval import Collection, Passage, SearchResult

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent


def relevance_of(*texts: str) -> Relevance:
    return Relevance(texts, Counter(term for text in texts for term in set(extract_terms(text))))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("close closes closed closing", "clos"),
        ("stop stops stopped stopping", "stop"),
        ("take took taken taking", "tak"),
        ("tooth teeth", "tooth"),
        ("allergy allergies", "allergy"),
        ("fill filling filled", "fill"),
        ("bring brought bringing", "bring"),
    ],
)
def test_forms_of_a_word_have_one_stem(words, expected):
    assert {stem(word) for word in words.split()} == {expected}


def test_concepts_of_an_english_question():
    found = {concept.text: concept for concept in concepts_of("When may my daughter get the flu jabs of 2026?")}
    assert set(found) == {"daughter", "get", "flu", "jab", "may"}
    assert "vaccin" in found["jab"].words and found["jab"].weight == 1
    # Everybody's daughter asks; the passage need not say so.
    assert found["daughter"].weight == found["get"].weight == 0.25


def test_concepts_of_a_chinese_question():
    found = {concept.text: concept for concept in concepts_of("孩子发烧了，能不能吹空调？")}
    assert set(found) == {"孩子", "发烧", "吹", "空调"}
    assert "发热" in found["发烧"].words and found["发烧"].weight == 1
    # No dictionary has it, so its characters count, each in a pair.
    found = {concept.text: concept for concept in concepts_of("有充桩吗？")}
    assert found["充"].words == found["桩"].words == {"充桩"} and found["桩"].weight == 0.5


@pytest.mark.parametrize(
    ("question", "kind", "answer", "other"),
    [
        ("how much does parking cost?", "price", "parking costs 2 dollars an hour", "park in the green lot"),
        ("补办一张卡多少钱？", "price", "补办收费 2 元", "补办在一楼"),
        ("what time do you close?", "clock", "it is open until 6:45 pm", "it is closed on holidays"),
        ("几点开门？", "clock", "每天 8:00 开门", "平时开门"),
        ("on which day can i come?", "day", "come on a tuesday", "come in the morning"),
        ("眼科星期几出诊？", "day", "周二下午出诊", "下午出诊"),
        ("how often is it checked?", "frequency", "it is checked every month", "it is checked with a solution"),
        ("how long does it take?", "duration", "it takes 3 working days", "it takes patience"),
        ("多久可以洗澡？", "duration", "两天以后可以洗澡", "伤口好了可以洗澡"),
        ("几度保存？", "temperature", "保存在 2℃ 到 8℃", "避光保存"),
        ("which extension do i dial?", "telephone", "call extension 42", "call the desk"),
        ("打哪个分机？", "telephone", "院内分机 633", "打电话问"),
        ("看牙在几楼？", "floor", "口腔科在三楼", "口腔科每天出诊"),
        ("how many lines are on the card?", "number", "the card has room for 14 lines", "the card has 3 colours"),
        ("船有几层？", "floor", "船有三层", "船有三个餐厅"),
        ("一次几针？", "number", "一共打 3 针", "每 3 个月"),
        ("which brand is best?", "opinion", "we recommend the arm type", "there are two types"),
        ("how wide is it?", "size", "60 cm wide", "it is wide"),
    ],
)
def test_what_a_question_asks_for_has_to_be_in_the_sentence(question, kind, answer, other):
    demand = demand_of(question)
    assert demand.kind == kind
    assert demand.is_met(answer) and not demand.is_met(other)


def test_a_question_may_ask_for_nothing_that_is_recognised():
    demand = demand_of("may i swim with stitches?")
    assert demand.kind is None and demand.is_met("anything")
    assert set(UNUSUAL) <= set(KINDS)


def test_words_are_found_in_other_forms_and_other_words():
    text = Words("Flu vaccinations begin in Octo\nber. 发热门诊在 D 楼")
    assert text.have(concepts_of("jab")[0]) == 1
    assert text.have(concepts_of("发烧")[0]) == 1
    assert text.have(concepts_of("honey")[0]) == 0
    # 诊 is there, but not next to 桩.
    assert [text.have(concept) for concept in concepts_of("桩诊")] == [0, LONE_CHARACTER]


def test_a_sentence_is_read_with_its_heading_and_the_one_before():
    assert list(sentences("Stitches\nFace: 3 days. Arms: 7 days. Back: 10 days.")) == [
        ("Stitches\n", "Stitches\n"),
        ("Stitches\nFace: 3 days. ", "Face: 3 days. "),
        ("Stitches\nFace: 3 days. Arms: 7 days. ", "Arms: 7 days. "),
        ("Stitches\nArms: 7 days. Back: 10 days.", "Back: 10 days."),
    ]


def test_features_by_hand():
    relevance = relevance_of("Parking\nUse the green lot. It costs 4 dollars.", "Wash your hands.", "Dry your hands.")
    found = relevance.features("How much does parking for a caravan cost?", [0, 1])
    # Of three passages one has parking and cost; none has caravan.
    rare = log(1 + 3.5 / 1.5) / log(1 + 3.5 / 0.5)
    total = 1 + 2 * rare
    assert found["sentence"] == pytest.approx(rare / total)
    # With heading, in the sentence before and in the passage: both.
    assert found["match"] == pytest.approx((rare + 2 * rare + 2 * rare) / 3 / total)
    assert found["held"] == pytest.approx(2 * rare)
    assert (found["asks"], found["price"], found["unusual"]) == (1, 1, 0)
    # The price is in another passage than the rest.
    apart = relevance_of("Park in the green lot.", "A new card costs 4 dollars.")
    assert apart.features("How much is parking?", [0, 1])["match"] == 0
    assert relevance.features("How much does parking cost?", []) == relevance.features("?", [0]) == {}


def test_confidence_is_the_logistic_function_of_the_features():
    weights = json.loads(WEIGHTS.read_text())
    for question in ("How much does parking cost?", "停车多少钱？"):
        relevance = relevance_of("It costs 4 dollars to park.", "停车每小时 4 元。")
        language = "zh" if "停" in question else "en"
        found = relevance.features(question, [0, 1])
        total = weights[language][BIAS] + sum(weights[language][name] * value for name, value in found.items())
        assert relevance.confidence(question, [0, 1]) == pytest.approx(1 / (1 + exp(-total)))
        assert relevance.confidence(question, []) == 0


CLINIC = [
    Passage("a.md", "Patients park in the green lot, free for 90 minutes.", ("Clinic", "Getting here")),
    Passage(
        "a.md", "The first copy of your medical record is free; it is ready within 21 days.", ("Clinic", "Records")
    ),
    Passage("a.md", "Amlodipine may cause swollen ankles, lisinopril a dry cough.", ("Clinic", "Tablets")),
    Passage("b.md", "对乙酰氨基酚两次之间至少隔 4 小时，布洛芬至少隔 6 小时。", ("发热", "退热药")),
    Passage("b.md", "血常规报告在抽血后 45 分钟可以打印，轮椅可以免费借用。", ("医院", "检验")),
]


@pytest.mark.parametrize(
    ("question", "is_answered"),
    [
        ("For how many minutes is parking free?", True),
        ("How long until a copy of my medical records is ready?", True),
        ("Does lisinopril make me cough?", True),
        ("Does amlodipine cause hair loss?", False),
        ("Can I park a caravan with solar panels?", False),
        ("Who wrote Pride and Prejudice?", False),
        ("布洛芬隔几个小时才能再喂？", True),
        ("验血的单子多久能打印？", True),
        ("轮椅可以借几天？", False),
        ("医院里有没有充电桩？", False),
        ("唐朝有多少个皇帝？", False),
    ],
)
def test_close_questions_are_refused_and_answered_ones_are_not(question, is_answered):
    assert is_relevant(Collection(CLINIC).search(question), None, 0.5, 0.5) == is_answered


def test_other_words_find_the_passage():
    collection = Collection(CLINIC)
    # None of these words is in a passage.
    assert collection.search("car").order[0] == 0
    assert collection.search("验血").order[0] == 4
    assert set(collection.relevance.synonyms("car")) == {"park", "lot"}
    # A passage with the word itself is better than one with a synonym.
    assert Collection([Passage("a", "the vaccine"), Passage("a", "the jab")]).search("jab").order == [1, 0]


def test_the_score_of_a_reranker_decides_alone():
    found = SearchResult([0], confidence=0.1, similarity=0.9, relevance=0.7)
    assert is_relevant(found, 0.95, 0.5, 0.7) and not is_relevant(found, 0.5, 0.0, 0.71)
    assert not is_relevant(SearchResult([], 1.0, None), None, 0.0, 0.0)
    assert is_relevant(SearchResult([0], 0.1, 0.9), 0.9, 0.5, 1.0)


# --- the weights -----------------------------------------------------------------------------------------------------


def test_the_fit_is_a_penalized_logistic_regression():
    generator = np.random.default_rng(1)
    matrix = generator.normal(5, 3, (400, 2))
    answered = generator.random(400) < 1 / (1 + np.exp(-(matrix[:, 0] - 5)))
    bias, weights = fitting.fit(matrix, answered)
    mean, scale = matrix.mean(axis=0), matrix.std(axis=0) + 1e-9
    # At the optimum the gradient of the penalized loss is zero.
    likely = 1 / (1 + np.exp(-(bias + matrix @ weights)))
    inputs = (matrix - mean) / scale
    assert np.sum(likely - answered) == pytest.approx(0, abs=1e-6)
    assert inputs.T @ (likely - answered) + fitting.RIDGE * weights * scale == pytest.approx(0, abs=1e-6)
    assert weights[0] > 5 * abs(weights[1])


def test_the_threshold_refuses_few_that_are_answered(capsys):
    generator = np.random.default_rng(2)
    rows = [("en", answered, {"x": generator.normal(2 * answered)}) for answered in [True, False] * 100]
    weights = fitting.fit_language("en", [*rows, ("en", False, {}), ("zh", True, {"x": 9.0})])
    refused = [weights[BIAS] + weights["x"] * found["x"] < 0 for _, answered, found in rows if answered]
    assert 0 < np.mean(refused) <= 0.06
    assert "of 100 answerable questions" in capsys.readouterr().out


def test_questions_to_fit_are_about_documents_that_exist():
    folder = ROOT / "data" / "relevance"
    rows = fitting.read_rows(folder / "questions.jsonl")
    names = {path.name for path in (folder / "documents").iterdir()}
    assert {row["about"] for row in rows} == names and len({row["question"] for row in rows}) == len(rows)
    counts = Counter((row["language"], row["answered"]) for row in rows)
    assert len(counts) == 4 and min(counts.values()) >= 100
    assert not {row["question"] for row in rows} & {
        row["question"] for row in fitting.read_rows(ROOT / "data" / "rag" / "questions.jsonl")
    }


@pytest.mark.slow
def test_the_weights_are_those_that_the_command_makes():
    rows = [*fitting.rows_of_single_documents(), *fitting.rows_of_rag()]
    made = {language: fitting.fit_language(language, rows) for language in ("en", "zh")}
    written = json.loads(WEIGHTS.read_text())
    for language, weights in made.items():
        assert written[language] == pytest.approx(weights, abs=0.005)
