"""Whether a passage supports a sentence: what must be in it, and what a change to it does."""

from medicalgpt.formats.support import Claim, find_missing, split_claims, unsupported_claims

import pytest

WARFARIN = "The warfarin dose is 5 mg daily. Do not take aspirin with warfarin. The INR should be between 2 and 3."
FEVER = "体温38.5℃以上时可服用布洛芬混悬液，每次5毫升，间隔6小时，24小时内不超过4次。布洛芬不能与阿司匹林同时服用。"
INSULIN = "Insulin in use keeps for 28 days at room temperature. Never freeze insulin. Keep it without direct sunlight."
STITCHES = "面部的缝线3至5天拆除，关节处10~14天。伤口无红肿时可以淋浴，禁止泡澡。拆线前勿自行剪线。"
TABLE = "Medicine | Dose (mg) | Times a day\nMetformin | 500 | 2\nRamipril | 2.5 | 1"
SALT = (
    "Adults should eat less than 6 g of salt a day. 每天吃盐应少于6克。About 25% of patients, or 0.5 L, are affected."
)
CLINIC = "门诊时间为周一至周六 8:00 至 11:40。血压 140/90 mmHg 以上为高血压。复诊日期 2026-03-01。"

DRUGS = "Warfarin 5 mg. Aspirin 100 mg."
TWO_DRUGS = "Give warfarin 5 mg and aspirin 100 mg. 华法林5毫克，阿司匹林100毫克。"
MEALS = (
    "阿卡波糖饭前服用，每天一次。Ibuprofen can raise blood pressure. Take 500 mg 2 times per day. Open until 5:00 pm."
)
AGES = "Age | Dose (mL)\nAdults | 10\nChildren | 5"

SUPPORTED = [
    # the same in another form
    ("The aspirin dose is 100 mg.", DRUGS),
    ("Take 0.5 g twice a day.", MEALS),
    ("Take 500 mg twice daily.", MEALS),
    ("Open until 5 pm.", MEALS),
    ("Open until 17:00.", MEALS),
    ("Give aspirin 100 mg and warfarin 5 mg.", TWO_DRUGS),
    ("Give 100 mg of aspirin and 5 mg of warfarin.", TWO_DRUGS),
    ("阿司匹林100毫克，华法林5毫克。", TWO_DRUGS),
    ("阿卡波糖饭前服用，每日一次。", MEALS),
    ("Ibuprofen can increase blood pressure.", MEALS),
    ("Adults: 10 mL.", AGES),
    # numbers and their units
    ("The dose of warfarin is 5 mg daily.", WARFARIN),
    ("The warfarin dose is 0.005 g daily.", WARFARIN),
    ("The warfarin dose is 5毫克 daily.", WARFARIN),
    ("The INR should be between 2 and 3.", WARFARIN),
    ("布洛芬混悬液每次5毫升。", FEVER),
    ("布洛芬混悬液每次5 mL，间隔6小时。", FEVER),
    ("布洛芬混悬液每次五毫升，间隔六小时。", FEVER),
    ("24小时内不超过四次。", FEVER),
    ("体温38.5摄氏度以上时可服用布洛芬。", FEVER),
    ("Insulin in use keeps for 28 days.", INSULIN),
    ("面部缝线3-5天拆除。", STITCHES),
    ("面部的缝线三到五天拆除。", STITCHES),
    ("面部的缝线至少3天拆除。", STITCHES),
    ("关节处的缝线10至14天拆除。", STITCHES),
    ("Metformin dose: 500 mg.", TABLE),
    ("Metformin is given twice a day.", TABLE),
    ("Adults eat less than 6 grams of salt.", SALT),
    ("每天吃盐少于6克。", SALT),
    ("25 percent of patients are affected.", SALT),
    ("25%的 patients are affected.", SALT),
    ("500 ml are affected.", SALT),
    ("门诊时间是 8:00 至 11:40。", CLINIC),
    ("11:40", CLINIC),
    ("The target is 80 to 130 mg/dL.", "Target | 80 to 130 | mg/dL"),
    ("血压140/90 mmHg 以上为高血压。", CLINIC),
    # negations
    ("Do not take aspirin with warfarin.", WARFARIN),
    ("Aspirin should never be taken with warfarin.", WARFARIN),
    ("布洛芬不能与阿司匹林同时服用。", FEVER),
    ("布洛芬禁止与阿司匹林同时服用。", FEVER),
    ("Insulin should not be left in direct sunlight.", INSULIN),
    ("伤口没有红肿时可以淋浴。", STITCHES),
    ("拆线前不要自行剪线。", STITCHES),
    ("禁止泡澡。", STITCHES),
]
# With what is reported, in part.
NOT_SUPPORTED = [
    # another medicine's, another row's
    ("Give warfarin 100 mg and aspirin 5 mg.", TWO_DRUGS, "100 mg"),
    ("Give 5 mg of aspirin.", TWO_DRUGS, "5 mg"),
    ("华法林100毫克，阿司匹林5毫克。", TWO_DRUGS, "100毫克"),
    ("Adults: 5 mL.", AGES, "5 ml"),
    ("Metformin dose: 2.5 mg.", TABLE, "2.5 mg"),
    # the opposite
    ("阿卡波糖饭后服用，每天一次。", MEALS, "饭后"),
    ("阿卡波糖饭前服用，每周一次。", MEALS, "每周"),
    ("Ibuprofen lowers blood pressure.", MEALS, "lowers"),
    ("Open until 5 am.", MEALS, "5:00"),
    # numbers and their units
    ("The warfarin dose is 50 mg daily.", WARFARIN, "50 mg"),
    ("The warfarin dose is 5 g daily.", WARFARIN, "5 g"),
    ("The warfarin dose is 5 ml daily.", WARFARIN, "5 ml"),
    ("The INR should be between 2 and 4.", WARFARIN, "4"),
    ("布洛芬混悬液每次10毫升。", FEVER, "10毫升"),
    ("布洛芬混悬液每次5毫克。", FEVER, "5毫克"),
    ("布洛芬混悬液每次五十毫升。", FEVER, "50毫升"),
    ("间隔6天服用布洛芬。", FEVER, "6天"),
    ("体温38.5℃以下时可服用布洛芬。", FEVER, "38.5"),
    ("布洛芬24小时内至少4次。", FEVER, "4次"),
    ("Insulin in use keeps for 28 hours.", INSULIN, "28 hours"),
    ("Insulin in use keeps for 8 days.", INSULIN, "8 days"),
    ("面部的缝线3至7天拆除。", STITCHES, "7天"),
    ("面部的缝线3天拆除。", STITCHES, "3天"),
    ("Metformin dose: 850 mg.", TABLE, "850 mg"),
    ("Adults eat more than 6 g of salt.", SALT, "6 g"),
    ("每天吃盐应多于6克。", SALT, "6克"),
    ("75% of patients are affected.", SALT, "75%"),
    ("门诊时间为 8:00 至 17:40。", CLINIC, "17:40"),
    ("血压 90/140 mmHg 以上为高血压。", CLINIC, "90/140"),
    ("复诊日期 2026-01-03。", CLINIC, "2026-01-03"),
    # negations, in both directions
    ("Take aspirin with warfarin.", WARFARIN, "take aspirin with warfarin"),
    ("The warfarin dose is never 5 mg daily.", WARFARIN, "never"),
    ("布洛芬能与阿司匹林同时服用。", FEVER, "同时服用"),
    ("体温38.5℃以上时不可服用布洛芬混悬液。", FEVER, "不可服用"),
    ("Freeze insulin.", INSULIN, "freeze insulin"),
    ("Keep it with direct sunlight.", INSULIN, "direct sunlight"),
    ("伤口红肿时可以淋浴。", STITCHES, "红肿"),
    ("可以泡澡。", STITCHES, "泡澡"),
    ("拆线前可自行剪线。", STITCHES, "剪线"),
    # names and key terms
    ("The heparin dose is 5 mg daily.", WARFARIN, "heparin"),
    ("The warfarin dose is 5 mg daily and the HbA1c is checked.", WARFARIN, "HbA1c"),
    ("对乙酰氨基酚混悬液每次5毫升。", FEVER, "氨基"),
    ("阿莫西林混悬液每次5毫升。", FEVER, "莫西林"),
    ("Surgery is the best treatment for hernia.", WARFARIN, "hernia"),
    ("高血压患者应当坚持运动。", FEVER, "运动"),
    ("Yes.", WARFARIN, "yes"),
    ("是的。", FEVER, "是的"),
]


@pytest.mark.parametrize(("sentence", "passage"), SUPPORTED)
def test_what_the_passage_says_is_supported(sentence, passage):
    assert find_missing(sentence, passage) == []


@pytest.mark.parametrize(("sentence", "passage", "missing"), NOT_SUPPORTED)
def test_what_it_does_not_say_is_named(sentence, passage, missing):
    assert any(missing in found for found in find_missing(sentence, passage))


@pytest.mark.parametrize("passage", [WARFARIN, FEVER, INSULIN, STITCHES, SALT, CLINIC])
def test_a_quotation_is_supported(passage):
    for claim in split_claims(passage):
        assert find_missing(claim.text, passage) == [], claim.text


def test_a_heading_holds_the_subject_but_no_numbers():
    assert "warfarin" in find_missing("Warfarin: take it daily.", "Take it daily.")
    assert find_missing("Warfarin: take it once a day.", "Take it once a day with food.", "guide.md > Warfarin") == []
    assert find_missing("Take 7 mg with food.", "Take it with food.", "7 mg.md") == ["7 mg"]


def test_claims_are_what_stands_before_their_marks():
    answer = "Dose 5 mg [1]. With food.[2][1] Not cited. A is so [1], and B is so [3].\n喝水。[2]休息[?]。"
    assert split_claims(answer) == [
        Claim("Dose 5 mg.", (1,)),
        Claim("With food.", (2, 1)),
        Claim("Not cited.", ()),
        Claim("A is so", (1,)),
        Claim(", and B is so.", (3,)),
        Claim("喝水。", (2,)),
        Claim("休息。", ()),
    ]
    assert split_claims("[1]") == []


def test_sources_may_support_a_claim_together():
    answer = (
        "The warfarin dose is 5 mg daily and insulin keeps for 28 days [1][2]. The warfarin dose is 50 mg daily [1]."
    )
    ((claim, missing),) = unsupported_claims(answer, [WARFARIN, INSULIN])
    assert claim.text == "The warfarin dose is 50 mg daily." and missing == ["50 mg"]
    assert unsupported_claims("The warfarin dose is 5 mg daily [2].", [WARFARIN, INSULIN])
