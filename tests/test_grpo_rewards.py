"""The rewards of GRPO: what each of them gives for hand-made replies, and how wrong ones are reported."""

import json
import math
import time

from medicalgpt.errors import UserError
from medicalgpt.formats.answers import boxed_answer, extract_answer
from medicalgpt.rewards import grading, reward_check, rewards
from tests.helpers import ROOT, write_jsonl

import pytest


def said(answer, think="想一想"):
    return f"<think>{think}</think><answer>{answer}</answer>"


def accuracy(gold, answer, kind=None, question=""):
    prompt = [{"role": "system", "content": "A. B."}, {"role": "user", "content": question}]
    return rewards.accuracy_reward([said(answer)], prompts=[prompt], answer=[gold], type=[kind])[0]


# Text of a reply -----------------------------------------------------------------------------------------------------


def test_the_last_message_of_the_assistant_is_judged():
    turns = [{"role": "assistant", "content": "one"}, {"role": "assistant", "content": "two"}, {"role": "tool"}]
    assert rewards.completion_text(turns) == "two"
    assert rewards.completion_text("three") == "three"
    assert rewards.completion_text([{"role": "assistant", "content": None}]) == rewards.completion_text([]) == ""
    asked = [{"role": role, "content": text} for role, text in (("user", "A?"), ("assistant", "b"), ("user", "C?"))]
    assert rewards.question_text(asked) == "C?"
    assert rewards.question_text("D?") == "D?"


@pytest.mark.parametrize(
    "text, answer",
    [
        ("<answer>5</answer>", "5"),
        ("<think>\n<answer>4</answer>?\n</think>\n<answer>\n 5\n\n6 \n</answer>\n", "5\n\n6"),
        ("<answer>never closed <answer>5</answer>", "5"),
        ("<answer></answer>", ""),
        ("<answer>5", None),
        ("5", None),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    "text, content",
    [
        (r"\boxed{2}", "2"),
        (r"x \boxed{\frac{1}{2}} y \boxed{3}", r"\frac{1}{2}, 3"),
        (r"\boxed{1} and \boxed{1}", "1"),
        (r"\boxed{\boxed{3} mL}", r"\boxed{3} mL"),
        (r"\boxed{\boxed{3}", "3"),
        (r"\boxed{a\}b}", r"a\}b"),
        ("{}}}" + r"\boxed{4}", "4"),
        (r"\boxed{3", None),
        ("3", None),
    ],
)
def test_the_content_of_boxes(text, content):
    assert boxed_answer(text) == content


def test_many_open_boxes_take_no_time():
    """The time of a reward must not grow with the square of a reply's length: policies repeat themselves."""
    began = time.perf_counter()
    assert boxed_answer("\\boxed{" * 20_000) is None and boxed_answer("\\boxed{B}" * 20_000) == "B"
    assert time.perf_counter() - began < 5


# Accuracy ------------------------------------------------------------------------------------------------------------

OPTIONS = "首选哪种药？\nA. 阿司匹林 B. 青霉素 C. 胰岛素 D. 地西泮"


@pytest.mark.parametrize("form", "B b Ｂ (B) （B） [B] B. B。 选B 答案是B 正确答案：B B项".split())
@pytest.mark.parametrize("kind", ["choice", None])
def test_a_letter_may_be_written_in_many_ways(form, kind):
    assert accuracy("B", form, kind, OPTIONS) == 1.0
    assert accuracy("C", form, kind, OPTIONS) == 0.0


@pytest.mark.parametrize(
    "form",
    [
        *("B. 青霉素", "B、青霉素", "B: 青霉素", "B：青霉素", "（B）青霉素"),
        *("B 青霉素", "B青霉素", "B（青霉素）", "故选B。"),
        *("The answer is B.", "the correct answer is (B)", "Option B", "**B**"),
        *(r"\boxed{B}", r"$\text{B}$", "B) aspirin"),
        *("B. aspirin and vitamin C", "B. vitamin C (ascorbic acid)"),
    ],
)
def test_a_letter_may_stand_with_its_option(form):
    assert accuracy("B", form, "choice") == 1.0
    assert accuracy("B. 青霉素", form, "choice") == 1.0
    assert accuracy("A", form, "choice") == accuracy("BC", form, "choice") == 0.0


@pytest.mark.parametrize("form", ["A, C", "A and C", "A.甲\nC.丙", *"AC ca A、C A，C A和C 选AC A.甲；C.丙".split()])
def test_several_letters_are_a_set(form):
    assert accuracy("AC", form, "choice") == accuracy("C、A", form, "choice") == 1.0
    assert accuracy("A", form, "choice") == accuracy("ACD", form, "choice") == accuracy("C", form, "choice") == 0.0


@pytest.mark.parametrize(
    "form", ["A patient", "阿司匹林", "都对", "", "A. 甲 B. 乙\nC. 丙\nD. 丁", "ABCD", "A. x, B. y, C. z", "B or A"]
)
def test_no_choice_and_a_list_of_all_options_are_wrong(form):
    assert accuracy("A", form, "choice") == accuracy("B", form, "choice") == 0.0


@pytest.mark.parametrize(
    "answer, score",
    [
        *(("2.5 mL", 1), ("2.5mL", 1), ("2.5 ml", 1), ("2.5毫升", 1)),
        *(("2.50 毫升。", 1), ("２.５ｍＬ", 1), ("约2.5毫升", 1)),
        *(("0.0025 L", 1), (r"\boxed{2.5\text{ mL}}", 1), ("**2.5 mL**", 1), ("250 mg ÷ 100 mg/mL = 2.5 mL", 1)),
        *((r"\frac{5}{2} mL", 1), ("5/2 毫升", 1), ("The dose is 2.5 mL.", 1), ("2.5 mL (2.5毫升)", 1)),
        *(("2.5", 0.5), ("5/2", 0.5), ("2.501 mL", 1), ("2.54 mL", 0), ("25 mL", 0), ("2.5 L", 0), ("2.5 mg", 0)),
        *(("-2.5 mL", 0), ("2.5 mL or 3 mL", 0), ("2-2.5 mL", 0), ("2.5e2 mL", 0)),
        *(("mL", 0), ("不知道", 0), ("2.5 mL/h", 0)),
        *(("5/3 mL", 0), ("5/2 mg", 0), ("2.5 mL^2", 0)),
    ],
)
@pytest.mark.parametrize("kind", ["number", None])
def test_numbers_with_units(answer, score, kind):
    assert accuracy("2.5 mL", answer, kind) == score


@pytest.mark.parametrize(
    "gold, answer, score",
    [
        *(("250 mg", "0.25 g", 1), ("250 mg", "250mg", 1), ("250 mg", "250 毫克", 1), ("250 mg", "251 mg", 0)),
        *(("1000 mL", "1,000 mL", 1), ("1000", "1，000", 1), ("1000", "1001", 0), ("1e3", "1000", 1)),
        *(("50 滴/分", "50 gtt/min", 1), ("50滴/分钟", "每分钟50滴", 1)),
        *(("20 mL/h", "每小时 20 毫升", 1), ("20 mL/h", "20 mL/min", 0)),
        *(("25.0", "25", 1), ("25.0", "25 kg/m²", 1), ("24.2", "24.22 kg/m^2", 1)),
        *(("24.2", "24.5", 0), ("33.3", "33.33", 1)),
        *(("15 mg/kg/d", "15 mg/kg/天", 1), ("15 mg/kg/d", "15 mg/kg per day", 1)),
        *(("37.5 ℃", "37.5 °C", 1), ("2 h", "120 min", 1)),
        *(("5.6 mmol/L", "5.6毫摩尔/升", 1), ("50%", "0.5", 1), ("50%", "50", 0.5)),
        *(("50%", "50 percent", 1), ("3", "4", 0)),
        *(("3", "3!", 0), ("6", "3!", 1), ("4", r"\sqrt{4}", 0)),
        *(("2", r"\sqrt{4}", 1), ("4", "√16", 1), ("4", "sqrt(16)", 1), ("8", "2^3", 1), ("1024", "2**10", 1)),
        *(("3", "x = 3", 1), ("3", "1+2=3", 1), ("-3", "−3", 1)),
        *(("-3", "3", 0), (r"\frac{1}{2}", "0.5", 1), ("1/2", "0.5", 1)),
        *(("x^2+2x", "x(x+2)", 1), ("x^2+2x", "x(x+3)", 0), (r"\pi/2", "π/2", 1), ("120/80 mmHg", "120/80 mmHg", 1)),
        *(("56", "2^{3}*7", 1), ("12", "B12", 0), (3, "3", 1), ("2 次/日", "每日2次", 1), ("3片", "3 tablets", 1)),
    ],
)
def test_numbers_and_formulas(gold, answer, score):
    assert accuracy(gold, answer, "number") == score


@pytest.mark.parametrize(
    "gold, same, others",
    [
        ("1 mL/min", ("60 mL/h", "0.06 L/h", "1.44 L/d", "每小时60毫升", "60 毫升每小时"), ("1 mL/h", "3600 mL/h")),
        ("60 mL/h", ("1 mL/min", "1毫升/分"), ("60 mL/min", "1 mL/s", "60 mL")),
        ("6 mg/kg/h", ("0.1 mg/kg/min", "100 μg/kg/min", "144 mg/kg/d", "0.006 g/kg/h"), ("6 mg/kg", "6 mg/h")),
        ("0.9 g/L", ("0.9 mg/mL", "900 mg/L", "90 mg/dL"), ("0.9 g/mL", "900 mg/mL", "0.9 L/g")),
        ("5 mmol/L", ("5000 μmol/L", "5 μmol/mL"), ("5 mmol/mL", "5 mg/L")),
        ("24 次/日", ("1 次/小时", "每小时 1 次", "1 time/h"), ("24 次/小时", "1 次/日")),
    ],
)
def test_compound_units_are_converted(gold, same, others):
    """What is above the line multiplies, each part below it divides."""
    for answer in same:
        assert accuracy(gold, answer, "number") == 1.0, answer
    for answer in others:
        assert accuracy(gold, answer, "number") == 0.0, answer
    assert accuracy(gold, gold.split()[0], "number") == 0.5


@pytest.mark.parametrize(
    "gold, answer, score",
    [
        *(("食管克罗恩病", "食管克罗恩病。", 1), ("神经内科", " 神经 内科 ", 1)),
        *(("神经内科", "神经外科", 0), ("ＣＴ", "ct", 1)),
        *(("Neurology department", "neurology  Department.", 1), ("type 2 diabetes", "Type-2 diabetes", 1)),
        *(("阴性(-)", "阴性(+)", 0), ("<7%", ">7%", 0)),
        *(("pH 7.4", "pH 74", 0), ("神经内科", "神经内科或神经外科", 0)),
        *(("神经内科", "", 0), ("？", "！", 1)),
    ],
)
def test_short_texts_are_compared_exactly(gold, answer, score):
    assert accuracy(gold, answer, "text") == score


def test_long_texts_are_graded_by_their_overlap():
    gold = "白带增多泛黄应该是患阴道炎了，你可以用妇科洗剂擦洗外阴，同时口服些妇科千金片。"
    same, near, far, none = (
        accuracy(gold, answer)
        for answer in (gold, gold.replace("妇科洗剂擦洗外阴", "药"), "建议多喝水，口服些药", "今天天气晴朗，适合出游")
    )
    assert same == 1 and same > near > 0.6 > 0.3 > far > none == 0
    # Saying everything twice does not raise the score.
    assert accuracy(gold, gold + gold) < 0.7
    # By hand: 13 words have 12 pairs, the 12 words of the reply have 11, and 10 are in both.
    gold = "one two three four five six seven eight nine ten eleven twelve thirteen"
    assert accuracy(gold, gold.replace("eleven twelve thirteen", "eleven dozen")) == pytest.approx(2 * 10 / (12 + 11))


@pytest.mark.parametrize(
    "gold, question, kind",
    [
        *(("B", "", "choice"), ("AC", OPTIONS, "choice"), ("AB", "血型？", "text"), ("CT", "做什么检查？", "text")),
        *(("B. 青霉素", OPTIONS, "choice"), ("MRI", "", "text"), ("DNA", OPTIONS, "text"), ("2.5 mL", "", "number")),
        *(("46", "12+34=?", "number"), (r"\frac{1}{2}", "", "number")),
        *(("x^2+1", "", "number"), ("25.0", "", "number")),
        *(("第3肋间隙，距前正中线4寸。", "", "text"), ("每日3次，饭后服用", "", "text")),
        *(("食管克罗恩病", "", "text"),),
        *(("Rest for 3 days and drink water", "", "text"), ("1,000 mL", "", "number")),
    ],
)
def test_the_kind_of_an_answer_is_found_out(gold, question, kind):
    assert grading.infer_answer_type(gold, question) == kind


def test_accuracy_needs_an_answer_and_a_gold_answer():
    replies = [
        "<think>3",
        "<answer></answer>",
        said("3"),
        [{"role": "assistant", "content": said("3")}],
        said("3"),
        said("3"),
    ]
    golds = ["3", "3", "3", "3", None, " "]
    assert rewards.accuracy_reward(replies, answer=golds) == [0, 0, 1, 1, None, None]
    assert rewards.accuracy_reward([said("3")]) == [None]
    assert rewards.accuracy_reward([said("3")], answer=["<think>1+2</think><answer>3</answer>"]) == [1]


def test_medicalgpt_rows():
    """Rows without a type: texts and arithmetic in one file."""
    for question, gold in (("肛门病变可能是什么疾病的症状?", "食管克罗恩病"), ("12+34=?", "46"), ("7×8=?", "56")):
        assert accuracy(gold, gold, None, question) == 1.0
        assert accuracy(gold, "47", None, question) == 0.0


# Hostile answers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hostile", ["9**9**9", "9999999!", "(" * 240 + "1" + ")" * 240, "\\sqrt{" * 5000])
def test_hostile_answers_are_cut_off_and_the_next_one_is_compared(hostile):
    assert accuracy("7", hostile, "number") == 0.0
    assert accuracy("7", "14/2", "number") == 1.0


# Form ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, score",
    [
        ("一二 <answer>三</answer>", 0.5),
        ("<answer>三</answer><think>一</think>", 0.5),
        ("先说一句<think>一</think><answer>三</answer>", 0.5),
        ("<think>一</think><answer>三</answer>再说一句", 0.5),
        ("<think>一</think>顺便<answer>三</answer>", 0.5),
        ("<think> </think><answer>三</answer>", 0.5),
        ("<think>一<think>二</think><answer>三</answer>", 0.5),
        ("<think>一</think><answer>三</answer><answer>四</answer>", 0.0),
        ("<think>一</think><answer></answer>", 0.0),
        ("<think>一</think><answer>三", 0.0),
        ("<think>一</think>三", 0.0),
        ("", 0.0),
    ],
)
def test_format_of_other_replies(text, score):
    assert rewards.format_reward([text], answer=["三"]) == [score]


@pytest.mark.parametrize(
    "question, reply, score",
    [
        ("什么是高血压？", said("血压偏高"), 1.0),
        ("什么是高血压？", said("High pressure", "Let me think"), 0.0),
        ("What is hypertension?", said("High blood pressure", "Let me think"), 1.0),
        ("What is hypertension?", said("血压偏高"), 0.0),
        ("做什么检查？", said("做MRI或CT，口服 5 mg"), 1.0),
        ("什么是SARS-CoV-2 virus？", said("一种病毒"), 1.0),
        ("What does 心悸 mean?", said("palpitations", "a Chinese word"), 1.0),
        # 4 Han characters in the thinking, 4 words in the answer.
        ("什么是高血压？", said("it is high pressure", "仔细想想"), 0.5),
        ("什么是高血压？", said(r"\frac{1}{2} mL", "2 + 3"), 1.0),
        ("什么是高血压？", "", 0.0),
        ("1+2=?", said("三"), None),
    ],
)
def test_language(question, reply, score):
    assert rewards.language_reward([reply], prompts=[[{"role": "user", "content": question}]]) == [score]


def test_a_language_column_goes_before_the_question():
    assert rewards.language_reward([said("三"), said("三")], prompts=["1+2=?", "三?"], language=["zh", "en"]) == [
        1.0,
        0.0,
    ]


def test_length_is_a_band_with_slopes():
    lengths = [0, 5, 10, 20, 30, 40, 60]
    replies = [f" {'字' * length}\n" for length in lengths]
    assert rewards.length_reward(replies, min_length=10, max_length=20) == [0.0, 0.5, 1.0, 1.0, 0.5, 0.0, 0.0]
    assert rewards.length_reward([""], min_length=0, max_length=20) == [1.0]


def test_repetition():
    assert rewards.repetition_reward(["", "好", "先休息再喝水", "one two three four five"]) == [0, 0, 0, 0]
    # 8 words have 5 runs of four, one of which (a b c d) stands there twice.
    assert rewards.repetition_reward(["a b c d a b c d"]) == [pytest.approx(-1 / 5)]
    circles = rewards.repetition_reward(["多喝水，" * 50, "drink water and rest " * 50, "。" * 200, "<think>" * 50])
    assert all(-1 < value < -0.9 for value in circles)


# Safety --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        *("请立即拨打120。", "不要犹豫，马上去急诊", "不要拖延去急诊的时间"),
        *("别等了，打120！", "不是小病，去急诊", "可能不用住院，但要去急诊"),
        *("Call an ambulance now.", "Do not wait, call 911.", "Don't hesitate to call an ambulance.", "Go to the ER"),
        *("Do not drive yourself; go to the emergency department", "If it does not improve call an ambulance"),
        *("拨打１２０", "This is not a cold: call 120"),
        *("EMERGENCY departments can help", "不用叫救护车？错，快叫救护车"),
        *("症状特别严重时去急诊", "不要慌张马上去急诊", "这不是普通感冒应去急诊"),
        *("去急诊不用预约", "Call 911 without hesitation"),
        *("Never ignore this and call an ambulance", "Without delay call an ambulance", "非急诊不可，快去急诊"),
    ],
)
def test_emergency_advice_is_recognised(text):
    assert rewards.safety_reward([said(text)], prompts=["突然胸痛怎么办？"]) == [1.0]


@pytest.mark.parametrize(
    "text",
    [
        *("不用去急诊，休息就好", "没必要叫救护车", "无需拨打120", "不需要去急诊"),
        *("别去急诊", "急诊就不必了", "去急诊没有必要", "多喝水"),
        *("No need to call an ambulance.", "You don't need to go to the emergency department"),
        *("This is not an emergency",),
        *("You should not call an ambulance", "Rest at home instead of calling an ambulance"),
        *("It isn't an emergency",),
        *("An ambulance is not necessary", "An ambulance isn’t needed", "血压120/80，正常"),
        *("服用120 mg", "血糖1200", "her teacher"),
        *("It doesn't need an ambulance", "不一定要去急诊", "先别着急去急诊"),
        *("没有急诊的必要", "这不算急诊", "There is no emergency"),
        "",
    ],
)
def test_negated_and_missing_advice_is_not(text):
    assert rewards.safety_reward([said(text)], prompts=["突然胸痛怎么办？"]) == [0.0]


def test_safety_reads_what_the_person_is_told():
    replies = [said("多休息", think="应该去急诊"), "<think>想</think>去急诊", "应该去急诊", "去急诊</think>多休息"]
    assert rewards.safety_reward(replies, prompts=["突然昏迷怎么办？"] * 4) == [0.0, 1.0, 1.0, 0.0]


def test_required_groups_are_all_needed():
    meta = {"required": [["神经内科"], ["120", "急诊"]]}
    replies = [said("挂神经内科，加重就打120"), said("挂神经内科"), said("去急诊"), said("不用挂神经内科，去急诊")]
    assert rewards.safety_reward(replies, prompts=["头晕?"] * 4, meta=[meta] * 4) == [1.0, 0.0, 0.0, 0.0]


def test_safety_applies_where_an_emergency_is_named():
    def safety(question, **columns):
        return rewards.safety_reward([said("B")], prompts=[question], **{k: [v] for k, v in columns.items()})[0]

    assert safety("感冒怎么办？") is None
    assert safety("I have chest pain") == safety("父亲半边脸嘴歪，言语不清") == 0.0
    # A letter or a number is all that such a question wants.
    assert safety("胸痛首选？A. 甲 B. 乙", answer="B", type="choice") is None
    assert safety("胸痛首选？A. 甲 B. 乙", answer="B") is None
    assert safety("胸痛首选？A. 甲 B. 乙", answer="B", meta={"required": [["120"]]}) == 0.0
    assert safety("突然胸痛", answer="拨打120", meta={"required": None}) == 0.0


# The choice of rewards -----------------------------------------------------------------------------------------------


def test_rewards_are_chosen_by_name():
    chosen = rewards.choose_rewards(["length", "accuracy"], min_length=4, max_length=8)
    assert list(chosen) == [reward.__name__ for reward in chosen.values()] == ["length", "accuracy"]
    assert chosen["length"](completions=["12"], prompts=[""], completion_ids=[[1]], trainer_state=None) == [0.5]


OWN = """
import numpy as np
NUMBER = 3
def short(completions, answer=None, **columns):
    return [1.0 if len(text) < 5 else None for text in completions]
def array(completions, **columns): return np.ones(len(completions))
def fails(completions, answer, **columns): return [1 / len(text) for text in completions]
def fewer(completions, **columns): return [1.0]
def nan(completions, **columns): return [0.0, float("nan"), 1.0]
def words(completions, **columns): return ["good"] * len(completions)
def single(completions, **columns): return 1.0
def narrow(completions): return []
def other(texts, **columns): return []
async def slow(completions, **columns): return []
"""


def own(tmp_path, *names, text=OWN):
    path = tmp_path / "my_rewards.py"
    path.write_text(text, encoding="utf-8")
    return rewards.choose_rewards(names, str(path))


def test_own_rewards(tmp_path):
    chosen = own(tmp_path, "short", "format", "array")
    assert chosen["short"](completions=["12", "123456"]) == [1.0, None]
    assert chosen["array"](completions=["12", "123456"]) == [1.0, 1.0]
    assert chosen["format"](completions=[said("1")]) == [1.0]


@pytest.mark.parametrize(
    "names, message",
    [
        (["shrt"], "shrt is neither built in"),
        (["NUMBER"], "NUMBER is neither built in"),
        (["narrow"], r"narrow .* cannot be called as a reward"),
        (["other"], r"other .* cannot be called as a reward"),
        (["slow"], r"slow .* cannot be called as a reward"),
        (["format"], "has no effect"),
        (["short", "short"], "names short twice"),
    ],
)
def test_wrong_own_rewards_are_refused(names, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        own(tmp_path, *names)
    assert len(str(caught.value).splitlines()) <= 4


def test_wrong_files_and_names_are_refused(tmp_path):
    for path in (tmp_path / "missing.py", tmp_path, "https://example.org/my_rewards.py"):
        with pytest.raises(UserError, match="is not a local Python file"):
            rewards.choose_rewards(["short"], str(path))
    with pytest.raises(UserError, match="cannot be executed: SyntaxError"):
        own(tmp_path, "short", text="def short(")
    with pytest.raises(UserError, match="acuracy is unknown.*accuracy, format"):
        rewards.choose_rewards(["acuracy"])
    for band in ({"min_length": 9, "max_length": 8}, {"min_length": -1}, {"min_length": 0, "max_length": 0}):
        with pytest.raises(UserError, match="not a valid range"):
            rewards.choose_rewards(["length"], **band)


@pytest.mark.parametrize(
    "name, message",
    [
        ("fails", "fails failed with ZeroDivisionError: .*\nat reply 2 of 3, question: 二？"),
        ("fewer", "fewer returned 1 values for 3 replies"),
        ("nan", "nan returned nan, which is not a finite number,\nat reply 2 of 3, question: 二？"),
        ("words", "words returned 'good', which is not a finite number,\nat reply 1 of 3"),
        ("single", "single returned a float for 3 replies"),
    ],
)
def test_rewards_that_fail_name_the_row(name, message, tmp_path):
    reward = own(tmp_path, name)[name]
    prompts = [[{"role": "user", "content": f"{number}？"}] for number in "一二三"]
    with pytest.raises(UserError, match=message):
        reward(completions=["a", "", "c"], prompts=prompts, answer=["", "", ""])


def test_a_missing_column_is_named(tmp_path):
    with pytest.raises(UserError, match="fails failed with TypeError: .*'answer'"):
        own(tmp_path, "fails")["fails"](completions=["a"], prompts=["?"])


# --check_rewards -----------------------------------------------------------------------------------------------------

LABELLED = [
    {"question": "1+2=?", "answer": "3", "good": said(3), "bad": said(4), "flaw": "wrong"},
    {"question": "2+2=?", "answer": "4", "good": said(4), "bad": "<think>4", "flaw": "no_format"},
    {"question": "胸痛怎么办？", "good": said("打120"), "bad": said("不用打120"), "flaw": "unsafe", "meta": {"a": 1}},
]


def test_check_rewards_measures_the_separation(tmp_path, capsys):
    path = write_jsonl(tmp_path / "labelled.jsonl", LABELLED)
    found = reward_check.check_rewards(path, rewards.choose_rewards(["accuracy", "format", "safety"]), [2.0, 1.0, 1.0])
    assert found["accuracy"] == (2, 1.0, 0.0, 1.0, 0.0)
    assert found["format"] == (3, 1.0, pytest.approx(2 / 3), pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert found["format"].auc == pytest.approx(2 / 3)
    assert found["safety"] == (1, 1.0, 0.0, 1.0, 0.0)
    # Good: 2 + 1, 2 + 1, 1 + 1; bad: 1, 0, 1.
    assert found["overall"] == (3, pytest.approx(8 / 3), pytest.approx(2 / 3), 1.0, 0.0)
    shown = capsys.readouterr().out
    assert "accuracy               2       2    1.000    0.000      100.0%     0.0%   1.000" in shown
    assert "no_format" in shown and "does not separate" not in shown


def test_check_rewards_names_those_that_do_not_separate(tmp_path, capsys):
    path = write_jsonl(tmp_path / "labelled.jsonl", LABELLED[:2])
    found = reward_check.check_rewards(path, rewards.choose_rewards(["repetition", "safety", "accuracy"]))
    assert found["safety"] is None and found["repetition"].auc == 0.5
    shown = capsys.readouterr().out
    assert "safety applies to none of these rows." in shown
    assert "repetition does not separate" in shown and "accuracy does not" not in shown


def test_check_rewards_on_preferences(tmp_path):
    found = reward_check.check_rewards(
        str(ROOT / "data/reward/validation.jsonl"), rewards.choose_rewards(["accuracy", "safety"])
    )
    assert found["accuracy"] is None
    assert found["safety"].good > 0.9 > found["safety"].bad and found["safety"].auc > 0.6


@pytest.mark.parametrize(
    "row, message",
    [
        ({"question": "1+2=?", "answer": "3"}, "labelled.jsonl:1: .*"),
        ({"question": "1+2=?", "good": "3", "bad": 4}, "labelled.jsonl:1: a reply is not text"),
        ("{", "labelled.jsonl:1"),
    ],
)
def test_check_rewards_refuses_rows_without_replies(row, message, tmp_path):
    path = write_jsonl(tmp_path / "labelled.jsonl", [row])
    with pytest.raises(UserError, match=message):
        reward_check.check_rewards(path, rewards.choose_rewards(["format"]))
    with pytest.raises(UserError, match="is not a file"):
        reward_check.check_rewards(str(tmp_path / "other.jsonl"), {})


def test_all_rewards_stay_in_their_range():
    rows = json.loads(json.dumps(LABELLED))
    for name, reward in rewards.choose_rewards(list(rewards.REWARDS)).items():
        replies = [row[side] for row in rows for side in ("good", "bad")] + ["", "\x00<answer>", "<answer>" * 100]
        values = reward(completions=replies, prompts=["胸痛?"] * 9, answer=["3"] * 9, meta=[None] * 9)
        assert all(value is None or math.isfinite(value) and -1 <= value <= 1 for value in values), name
