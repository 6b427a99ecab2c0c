"""Tasks whose answer a program can check, for `build_samples.py`: questions about the facts, and arithmetic.

    grpo/train.jsonl, validation.jsonl    one question per line, with its answer, its type and requirements
    grpo_labelled/labelled.jsonl          some training questions, each with a good and a bad reply
    grpo_cold_start/train.jsonl           other questions of the same kind, as conversations with good replies

The numbers are exact decimals and fractions, and no result is halfway between two roundings. The medicines have no
names and the doses are in the question, so that nothing is said about any real medicine.
"""

import itertools
import math
import random
import sys
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

SEED = 42
LETTERS = "ABCD"
LETTER_PAIRS = ["".join(pair) for pair in itertools.combinations(LETTERS, 2)]
HELD_OUT_EVERY = 5

# Rows of each category: (train, validation, cold start) in Chinese, then in English.
COUNTS = {
    "department": {"zh": (130, 26, 60), "en": (70, 14, 40)},
    "department_of_two": {"zh": (50, 10, 40), "en": (30, 6, 24)},
    "what_now": {"zh": (90, 18, 24), "en": (50, 10, 16)},
    "triage": {"zh": (40, 8, 20), "en": (30, 6, 12)},
    "department_choice": {"zh": (40, 8, 40), "en": (24, 4, 24)},
    "condition_choice": {"zh": (24, 4, 12), "en": (16, 4, 8)},
    "two_conditions": {"zh": (18, 6, 6), "en": (12, 6, 6)},
    "emergency_choice": {"zh": (24, 4, 16), "en": (16, 4, 8)},
    "bmi_class": {"zh": (24, 4, 8), "en": (16, 4, 4)},
    "dose": {"zh": (24, 5, 6), "en": (20, 3, 4)},
    "dose_volume": {"zh": (30, 6, 6), "en": (26, 4, 4)},
    "bmi": {"zh": (22, 5, 4), "en": (18, 3, 2)},
    "drip_rate": {"zh": (22, 4, 4), "en": (18, 3, 2)},
    "drop_rate": {"zh": (22, 4, 4), "en": (18, 3, 2)},
    "unit_conversion": {"zh": (40, 8, 10), "en": (36, 6, 6)},
}
TYPES = dict.fromkeys(("department", "department_of_two", "what_now", "triage"), "text")
TYPES |= dict.fromkeys(
    ("department_choice", "condition_choice", "two_conditions", "emergency_choice", "bmi_class"), "choice"
)
TYPES |= dict.fromkeys(("dose", "dose_volume", "bmi", "drip_rate", "drop_rate", "unit_conversion"), "number")

# Conditions without any `symptoms` that call for an ambulance, reviewed one by one. Only these are used for questions
# that distinguish a danger sign from a sign that can wait.
MILD = frozenset(
    """
    varicose_veins common_cold chronic_gastritis functional_dyspepsia
    irritable_bowel_syndrome nonalcoholic_fatty_liver type_2_diabetes hyperthyroidism hyperlipidaemia cushing_syndrome
    parkinson_disease generalized_anxiety obsessive_compulsive insomnia_disorder post_traumatic_stress
    chronic_kidney_disease acute_cystitis prostatic_hyperplasia chronic_prostatitis rheumatoid_arthritis
    sjogren_syndrome polymyalgia_rheumatica frozen_shoulder ankle_sprain tennis_elbow
    plantar_fasciitis atopic_dermatitis urticaria acne_vulgaris psoriasis tinea_pedis contact_dermatitis
    seborrhoeic_dermatitis vitiligo alopecia_areata rosacea cataract acute_conjunctivitis myopia stye
    allergic_rhinitis chronic_sinusitis dental_caries periodontitis polycystic_ovary_syndrome
    """.split()
)

# {c} is the condition, {get} "to come down with", {d} the department, {sign} a sign, {one} and {other} departments to
# choose between, {options} four lettered lines; the other fields are the numbers of the task.
WORDINGS: dict[str, dict[str, dict[str, list[str]]]] = {
    "department": {
        "train": {
            "zh": [
                "{c}要去挂哪个科？",
                "请问{c}应该看什么科？只写科室名称。",
                "{get}{c}要挂哪个科室的号？",
                "想问一下，{c}是看哪个科的？",
                "有人{get}{c}，去医院看什么科？",
                "{c}挂号的时候选什么科室？",
                "医生说是{c}，那该挂什么科？",
                "{c}归哪个科室看？",
            ],
            "en": [
                "Which department in the hospital treats {c}?",
                "A friend of mine has {c}. Which department is that for?",
                "Which department is right for {c}? Name the department only.",
                "The doctor says it is {c}. Which department do I need?",
                "Which department should I book for {c}?",
            ],
        },
        "validation": {
            "zh": [
                "{c}是哪个科室负责看的？",
                "亲戚{get}{c}，挂号要挂什么科？",
                "怀疑是{get}{c}，应该看哪个科的医生？",
                "到医院看{c}，挂什么科才对？",
            ],
            "en": [
                "Someone in my family has {c}. Which department should we visit?",
                "I was told it is {c}. What department treats that?",
                "For {c}, what department should I book?",
            ],
        },
    },
    "department_of_two": {
        "train": {
            "zh": [
                "{c}应该挂{one}还是{other}？",
                "{get}{c}，看{one}还是看{other}？",
                "{c}归{one}管，还是归{other}管？",
                "{one}和{other}，哪个科看{c}？",
            ],
            "en": [
                "Which department treats {c}, {one} or {other}?",
                "For {c}, should I see {one} or {other}?",
                "{c}: is that a matter for {one} or for {other}?",
            ],
        },
        "validation": {
            "zh": ["看{c}，挂号选{one}还是{other}？", "{c}是{one}的病还是{other}的病？"],
            "en": ["It is {c}. Do we book {one} or {other}?", "Who looks after {c}: {one} or {other}?"],
        },
    },
    "what_now": {
        "train": {
            "zh": [
                "{get}{c}，现在出现{sign}，该怎么办？这个病归哪个科管？",
                "家人{get}{c}，刚刚出现{sign}，我要怎么做？这个病是什么科看的？",
                "{c}出现{sign}，现在怎么处理？之后由哪个科诊治？",
                "有人{get}{c}，这会儿有{sign}，马上要做什么？{c}属于哪个科？",
                "{c}患者出现{sign}，怎么办？这个病由什么科诊治？",
            ],
            "en": [
                "A person with {c} now has {sign}. What should I do, and which department treats {c}?",
                "Someone in my family has {c}, and now there is {sign}. What now? Which department treats it?",
                "There is {sign}, and the person has {c}. What do I do first, and which specialty looks after {c}?",
            ],
        },
        "validation": {
            "zh": [
                "邻居{get}{c}，刚才出现{sign}，应该怎么办才好？平时归什么科看？",
                "{c}病人现在有{sign}，该怎么应对？以后由哪个科室诊治？",
            ],
            "en": [
                "My neighbour, who has {c}, has developed {sign}. What must we do? Which department treats {c}?",
                "There is {sign} in someone with {c}. How do I help, and which department looks after {c}?",
            ],
        },
    },
    "triage": {
        "train": {
            "zh": [
                "{get}{c}，现在主要是{sign}，没有别的不适，该去门诊还是急诊？",
                "{c}，今天出现{sign}，其他都还好，看门诊还是看急诊？",
                "家人{get}{c}，这次是{sign}，别的没有，要去急诊还是门诊？",
                "{c}出现{sign}，没有其他表现，挂急诊还是约门诊？",
            ],
            "en": [
                "With {c} there is now {sign} and nothing else. Outpatient clinic or emergency department?",
                "I have {c}, and today I notice {sign}. Emergency department or outpatient clinic?",
                "Someone with {c} has {sign}, nothing more. Is it the outpatient clinic or the emergency department?",
            ],
        },
        "validation": {
            "zh": [
                "朋友{get}{c}，眼下只有{sign}，适合去门诊还是急诊？",
                "{c}，这两天有{sign}，没别的问题，急诊和门诊该去哪一个？",
            ],
            "en": [
                "A friend with {c} has {sign} and no other complaint. Emergency department or outpatient clinic?",
                "Where should a person with {c} go for {sign}: the outpatient clinic or the emergency department?",
            ],
        },
    },
    "department_choice": {
        "train": {
            "zh": [
                "{c}应该看哪个科室？\n{options}",
                "以下哪个科室诊治{c}？\n{options}",
                "单选题：{get}{c}要挂哪个科？\n{options}",
            ],
            "en": [
                "Which of these departments treats {c}?\n{options}",
                "A patient has {c}. Which department is right?\n{options}",
                "Choose the department for {c}.\n{options}",
            ],
        },
        "validation": {
            "zh": ["为{c}患者挂号，选哪一个科室？\n{options}", "下面四个科室中，负责{c}的是哪一个？\n{options}"],
            "en": [
                "One of these four departments looks after {c}. Which one?\n{options}",
                "Where would you book an appointment for {c}?\n{options}",
            ],
        },
    },
    "condition_choice": {
        "train": {
            "zh": ["以下哪种病由{d}诊治？\n{options}", "哪一位患者应该挂{d}？患者的病分别是：\n{options}"],
            "en": ["Which of these conditions does {d} treat?\n{options}", "Choose the one for {d}.\n{options}"],
        },
        "validation": {
            "zh": ["下面四种病里，属于{d}的是哪一种？\n{options}"],
            "en": ["One of these four belongs to {d}. Which one?\n{options}"],
        },
    },
    "two_conditions": {
        "train": {
            "zh": ["以下哪两种病由{d}诊治？\n{options}", "多选题（两个答案）：应该挂{d}的是哪些病？\n{options}"],
            "en": [
                "Which two of these conditions does {d} treat?\n{options}",
                "Choose the two conditions for {d}.\n{options}",
            ],
        },
        "validation": {
            "zh": ["下面四种病里，有两种属于{d}，是哪两种？\n{options}"],
            "en": ["Two of these four belong to {d}. Which two?\n{options}"],
        },
    },
    "emergency_choice": {
        "train": {
            "zh": [
                "{get}{c}，以下哪种表现需要立即拨打120或去急诊？\n{options}",
                "{c}患者的下列表现中，哪一个是危险信号？\n{options}",
            ],
            "en": [
                "A person has {c}. Which of these calls for an ambulance or the emergency department?\n{options}",
                "Which of these is a danger sign in someone with {c}?\n{options}",
            ],
        },
        "validation": {
            "zh": ["{c}出现下面哪种情况，不能等、必须马上去急诊？\n{options}"],
            "en": ["With {c}, which of these must not wait?\n{options}"],
        },
    },
    "bmi_class": {
        "train": {
            "zh": [
                "成人身高 {height} cm，体重 {weight} kg。按中国标准（BMI 低于 18.5 为偏瘦，18.5 起为正常，24 起为超重，"
                "28 起为肥胖），属于哪一类？\n{options}",
                "一位成年人体重 {weight} kg，身高 {height} cm，按中国的 BMI 分类（18.5 以下偏瘦，18.5 起正常，"
                "24 起超重，28 起肥胖）是哪一类？\n{options}",
            ],
            "en": [
                "An adult weighs {weight} kg and is {height} cm tall. In the WHO classification of BMI (below 18.5 "
                "underweight, from 18.5 normal, from 25 overweight, from 30 obese), which class is that?\n{options}",
                "Height {height} cm, weight {weight} kg, an adult. Which WHO class of BMI is it (underweight below "
                "18.5, normal from 18.5, overweight from 25, obese from 30)?\n{options}",
            ],
        },
        "validation": {
            "zh": [
                "请按中国成人 BMI 标准（偏瘦低于 18.5，正常从 18.5 起，超重从 24 起，肥胖从 28 起）给身高 {height} cm、"
                "体重 {weight} kg 的人分类。\n{options}"
            ],
            "en": [
                "By the WHO cut-offs for adults (18.5 for normal, 25 for overweight, 30 for obese), what is someone of "
                "{weight} kg and {height} cm?\n{options}"
            ],
        },
    },
    "dose": {
        "train": {
            "zh": [
                "某药的医嘱剂量是 {per_kg} mg/kg，患者体重 {weight} kg，一次应给多少 mg？",
                "患者体重 {weight} kg，医嘱某种药每次 {per_kg} mg/kg，每次是多少 mg？",
                "按 {per_kg} mg/kg 给药，体重 {weight} kg 的人一次用多少 mg？",
            ],
            "en": [
                "A medicine is ordered at {per_kg} mg/kg. The patient weighs {weight} kg. How many mg is one dose?",
                "The patient's weight is {weight} kg and the order is {per_kg} mg/kg. How many mg is that?",
                "At {per_kg} mg/kg, how many mg does a person of {weight} kg receive?",
            ],
        },
        "validation": {
            "zh": ["医生开的药要求 {per_kg} mg/kg，病人称得 {weight} kg，请算出单次用量是多少 mg。"],
            "en": ["Work out a single dose in mg: the order says {per_kg} mg/kg and the scale says {weight} kg."],
        },
    },
    "dose_volume": {
        "train": {
            "zh": [
                "某口服液浓度为 {strength} mg/mL，医嘱 {per_kg} mg/kg，患者体重 {weight} kg，一次应给多少 mL？",
                "患者体重 {weight} kg，医嘱每次 {per_kg} mg/kg，药液含药 {strength} mg/mL，一次抽多少 mL？",
                "按 {per_kg} mg/kg 给药，体重 {weight} kg，药液 {strength} mg/mL，每次是多少 mL？",
            ],
            "en": [
                "A syrup holds {strength} mg/mL. The order is {per_kg} mg/kg for a patient of {weight} kg. "
                "How many mL is one dose?",
                "The patient weighs {weight} kg and is to have {per_kg} mg/kg of a liquid with {strength} mg/mL. "
                "How many mL is that?",
                "At {per_kg} mg/kg and {weight} kg, how many mL of a solution of {strength} mg/mL are needed?",
            ],
        },
        "validation": {
            "zh": ["药液每次按 {per_kg} mg/kg 用，浓度 {strength} mg/mL；病人称得 {weight} kg，请算出该取多少 mL。"],
            "en": ["Work out the mL to draw up: {weight} kg of body weight, {per_kg} mg/kg, and {strength} mg/mL."],
        },
    },
    "bmi": {
        "train": {
            "zh": [
                "身高 {height} cm，体重 {weight} kg，BMI 是多少？保留一位小数。",
                "一个人体重 {weight} kg、身高 {height} cm，请计算体重指数（BMI），保留一位小数。",
                "体重 {weight} kg 除以身高（{height} cm）的平方，BMI 等于多少？保留一位小数。",
            ],
            "en": [
                "What is the BMI at {height} cm and {weight} kg? Give one decimal.",
                "A person weighs {weight} kg and is {height} cm tall. Calculate the BMI to one decimal.",
                "Weight {weight} kg, height {height} cm: what is the body mass index, to one decimal?",
            ],
        },
        "validation": {
            "zh": ["请算出这位体检者的 BMI（一位小数）：{height} cm，{weight} kg。"],
            "en": ["Find the body mass index (one decimal) of somebody with {weight} kg at {height} cm."],
        },
    },
    "drip_rate": {
        "train": {
            "zh": [
                "{volume} mL 液体要在 {hours} 小时内匀速输完，输液泵应设为每小时多少 mL？",
                "医嘱在 {hours} 小时内输入 {volume} mL，速度是多少 mL/h？",
                "输液 {volume} mL，用时 {hours} 小时，泵速是多少 mL/h？",
            ],
            "en": [
                "{volume} mL are to run in over {hours} hours. What is the rate in mL/h?",
                "Over {hours} hours a patient is to receive {volume} mL. How many mL/h should the pump give?",
                "The order is {volume} mL in {hours} hours. Set the pump: how many mL/h?",
            ],
        },
        "validation": {
            "zh": ["计划用 {hours} 小时滴完一袋 {volume} mL 的液体，请算出 mL/h。"],
            "en": ["A bag of {volume} mL has to last {hours} hours. Find the mL/h."],
        },
    },
    "drop_rate": {
        "train": {
            "zh": [
                "{volume} mL 液体在 {hours} 小时内输完，滴系数为 {factor} 滴/mL，每分钟多少滴？四舍五入到整数。",
                "滴系数 {factor} 滴/mL 的输液器，要在 {hours} 小时内输完 {volume} mL，每分钟滴数是多少？取整数。",
            ],
            "en": [
                "{volume} mL are to run in over {hours} hours through a set of {factor} drops/mL. How many drops per "
                "minute, to the nearest whole number?",
                "The set gives {factor} drops/mL. For {volume} mL in {hours} hours, how many drops per minute? "
                "Round to a whole number.",
            ],
        },
        "validation": {
            "zh": ["用 {factor} 滴/mL 的输液器，{hours} 小时滴完 {volume} mL，请算出每分钟的滴数（整数）。"],
            "en": ["Find the drops per minute (a whole number): {factor} drops/mL, {volume} mL, {hours} hours."],
        },
    },
    "unit_conversion": {
        "train": {
            "zh": [
                "{value} {unit} 等于多少 {to}？{note}",
                "把 {value} {unit} 换算成 {to}。{note}",
                "单位换算：{value} {unit} 是多少 {to}？{note}",
            ],
            "en": [
                "How much is {value} {unit} in {to}? {note}",
                "Convert {value} {unit} to {to}. {note}",
                "Change the unit: {value} {unit} is how many {to}? {note}",
            ],
        },
        "validation": {
            "zh": ["化验单和药瓶常用不同的单位：请把 {value} {unit} 写成 {to}。{note}"],
            "en": ["Express {value} {unit} as {to}. {note}"],
        },
    },
}

# How the question names the relation between two units.
UNNAMED = {"zh": "", "en": ""}
NAMED = {"zh": "（{rule}）", "en": "({rule}.)"}
GLUCOSE = {"zh": "（葡萄糖：{rule}）", "en": "(Glucose: {rule}.)"}
# From, to, factor, offset, (lowest, highest, step) of the values, decimals of the answer (None: exact), the relation.
CONVERSIONS = [
    ("g", "mg", "1000", "0", ("0.05", "4.95", "0.05"), None, "1 g = 1000 mg", UNNAMED),
    ("mg", "g", "1/1000", "0", ("50", "4950", "50"), None, "1 g = 1000 mg", UNNAMED),
    ("mg", "mcg", "1000", "0", ("0.025", "0.975", "0.025"), None, "1 mg = 1000 mcg", UNNAMED),
    ("mcg", "mg", "1/1000", "0", ("25", "975", "25"), None, "1 mg = 1000 mcg", UNNAMED),
    ("L", "mL", "1000", "0", ("0.15", "2.95", "0.05"), None, "1 L = 1000 mL", UNNAMED),
    ("mmol/L", "mg/dL", "18", "0", ("3.1", "19.9", "0.1"), None, "1 mmol/L = 18 mg/dL", GLUCOSE),
    ("mg/dL", "mmol/L", "1/18", "0", ("61", "359", "1"), 1, "1 mmol/L = 18 mg/dL", GLUCOSE),
    ("°C", "°F", "9/5", "32", ("35.1", "40.9", "0.1"), 1, "°F = °C × 1.8 + 32", NAMED),
    ("°F", "°C", "5/9", "-160/9", ("95.1", "105.9", "0.1"), 1, "°F = °C × 1.8 + 32", NAMED),
    ("kg", "lb", "2.2", "0", ("10.5", "98.5", "0.5"), None, "1 kg = 2.2 lb", NAMED),
]
ONE_DECIMAL = {"zh": "保留一位小数。", "en": "Give one decimal. "}
BMI_CLASSES = {
    "zh": (("18.5", "24", "28"), ("偏瘦", "正常", "超重", "肥胖")),
    "en": (("18.5", "25", "30"), ("underweight", "normal", "overweight", "obese")),
}
# The reasoning; a good reply states it before the answer.
REASONS = {
    "department": {"zh": "{c}由{d}诊治。", "en": "{C} belongs to {d}."},
    "what_now": {
        "zh": "{sign}是{c}的危险信号，不能等。{c}由{d}诊治。",
        "en": "{C}: {sign} is a danger sign that cannot wait. {C} belongs to {d}.",
    },
    "danger": {"zh": "{sign}是{c}的危险信号，不能等。", "en": "{C}: {sign} is a danger sign that cannot wait."},
    "no_danger": {
        "zh": "{sign}是{c}的常见表现，不是危险信号。",
        "en": "{C}: {sign} is a common sign and no danger sign.",
    },
    "conditions": {"zh": "由{d}诊治的是{conditions}。", "en": "What {d} treats is {conditions}."},
    "bmi": {
        "zh": "身高 {height} cm 是 {metres} 米，BMI = {weight} ÷ {metres}² ≈ {bmi}。",
        "en": "{height} cm is {metres} metres, and the BMI is {weight} / {metres}² = about {bmi}.",
    },
    "dose": {
        "zh": "每公斤 {per_kg} mg，{per_kg} × {weight} = {answer}。",
        "en": "Each kilogram needs {per_kg} mg, so it is {per_kg} × {weight} = {answer}.",
    },
    "dose_volume": {
        "zh": "一次 {per_kg} × {weight} = {milligrams} mg，再除以浓度：{milligrams} ÷ {strength} = {answer}。",
        "en": "One dose is {per_kg} × {weight} = {milligrams} mg, and {milligrams} / {strength} = {answer}.",
    },
    "drip_rate": {
        "zh": "总量除以时间：{volume} ÷ {hours} = {answer}。",
        "en": "The volume is divided by the time: {volume} / {hours} = {answer}.",
    },
    "drop_rate": {
        "zh": "总滴数是 {volume} × {factor}，时间是 {hours} × 60 分钟，相除约为 {answer}。",
        "en": "There are {volume} × {factor} drops in {hours} × 60 minutes, which is about {answer}.",
    },
    "unit_conversion": {
        "zh": "{rule}，所以 {value} {unit} 就是 {answer}。",
        "en": "{rule}, so {value} {unit} is {answer}.",
    },
}
CLINICS = {
    "zh": {"danger": "急诊", "no_danger": "门诊"},
    "en": {"danger": "emergency department", "no_danger": "outpatient clinic"},
}
CALL_FOR_HELP = {"zh": ["120", "急诊"], "en": ["ambulance", "emergency department"]}
ADVICE = {
    "zh": "请立即拨打120或去急诊。",
    "en": "Call an ambulance or go to the emergency department at once.",
}
# Flaw of a bad reply -> the categories that it is used for, in turn.
FLAWS = {
    "wrong_answer": ("department_choice", "dose", "bmi_class", "department", "unit_conversion", "two_conditions"),
    "missing_format": ("drip_rate", "department", "emergency_choice", "dose_volume", "what_now", "bmi"),
    "other_language": ("department", "dose_volume", "department_of_two", "drip_rate", "unit_conversion", "bmi"),
    "repetition": ("dose", "department_choice", "triage", "drop_rate", "what_now", "bmi_class"),
    "too_long": ("department", "dose", "what_now", "condition_choice", "bmi", "emergency_choice"),
    "missing_emergency": ("what_now",),
}
LABELLED_PER_FLAW = {"zh": 6, "en": 4}
SPACE = {"zh": "", "en": " "}
SO = {"zh": "所以答案是：", "en": "So the answer is: "}

# The same text as in medicalgpt/rewards/rewards.py; a test compares them.
SYSTEM_PROMPT = (
    "先在 <think> 和 </think> 之间一步一步地思考，再在 <answer> 和 </answer> 之间只写最终答案。用提问的语言回答。\n"
    "First think step by step between <think> and </think>, then write only the final answer between <answer> and "
    "</answer>. Reply in the language of the question."
)

DOSES_PER_KG = ("0.5", "1", "1.5", "2", "2.5", "4", "5", "7.5", "8", "10", "12", "15")
STRENGTHS = ("2", "4", "5", "8", "10", "20", "25", "40", "50")
DROP_FACTORS = (10, 15, 20, 60)

Row = dict[str, Any]


def build_tasks(cases: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """The rows of GRPO by the path of their file: training, validation, labelled replies, and a cold start.

    A condition in a validation row, in the question or the options, is in no other row. No two rows have the same
    question or the same calculation.

    Args:
        cases: by language, the conditions in the same order: `id`, whether it is `urgent`, the slots of sentences (`c`,
            `C`, `get`, `d`, `sign`, the first danger sign), `symptoms`, departments that are `wrong` for it, what a
            good reply contains (`required`), and `sentences` about it.

    Raises:
        SystemExit: a category has fewer tasks than `COUNTS` requires.
    """
    rng = random.Random(SEED)
    held_out = held_out_ids(cases["zh"], rng)
    rows: dict[str, list[Row]] = {"train": [], "validation": [], "cold_start": []}
    taken: set[Any] = set()
    for category, counts in COUNTS.items():
        for language, numbers in counts.items():
            for (split, side), count in zip(rows.items(), numbers, strict=True):
                known = [case for case in cases[language] if (case["id"] in held_out) == (split == "validation")]
                wordings = WORDINGS[category]["validation" if split == "validation" else "train"][language]
                side += task_rows(
                    TASKS[category](known, language, rng), category, language, wordings, count, taken, rng
                )
    for side in rows.values():
        rng.shuffle(side)
    return {
        "grpo/train.jsonl": [without_task(row) for row in rows["train"]],
        "grpo/validation.jsonl": [without_task(row) for row in rows["validation"]],
        "grpo_labelled/labelled.jsonl": build_labelled(rows["train"], cases, rng),
        "grpo_cold_start/train.jsonl": [lesson(row) for row in rows["cold_start"]],
    }


def without_task(row: Row) -> Row:
    """The fields of a row that are written."""
    return {key: value for key, value in row.items() if key != "task"}


def held_out_ids(cases: list[Row], rng: random.Random) -> set[str]:
    """One condition in five, of the mild ones as well as of the others."""
    held_out: set[str] = set()
    for mild in (True, False):
        ids = [case["id"] for case in cases if (case["id"] in MILD) == mild]
        held_out.update(rng.sample(ids, len(ids) // HELD_OUT_EVERY))
    return held_out


def task_rows(
    tasks: Iterator[Row],
    category: str,
    language: str,
    wordings: list[str],
    count: int,
    taken: set[Any],
    rng: random.Random,
) -> list[Row]:
    """The first `count` tasks whose question and numbers are not in `taken`, as rows; `taken` is extended."""
    rows: list[Row] = []
    for task in itertools.islice(tasks, 100 * count):
        if "right" in task:
            # In turn, so that each letter is correct equally often.
            letters = LETTERS if len(task["right"]) == 1 else LETTER_PAIRS
            answer = letters[len(rows) % len(letters)]
            right, others = iter(task["right"]), iter(task["others"])
            lines = [f"{letter}. {next(right if letter in answer else others)}" for letter in LETTERS]
            task |= {"answer": answer, "options": "\n".join(lines)}
            task["wrong_answer"] = letters[(len(rows) + 1) % len(letters)]
        question = rng.choice(wordings).format(**task).strip()
        numbers = (category, task.get("numbers", question))
        if question in taken or numbers in taken:
            continue
        taken.update((question, numbers))
        row = {"question": question, "answer": task["answer"], "type": TYPES[category]}
        row |= {"language": language, "category": category}
        if "required" in task:
            row["meta"] = {"required": task["required"]}
        rows.append(row | {"task": task})
        if len(rows) == count:
            return rows
    sys.exit(
        "error: the samples were not written\n"
        f"{category} in {language}: {len(rows)} tasks, but {count} are needed; add wordings or conditions"
    )


def in_turn(cases: list[Row], rng: random.Random) -> Iterator[Row]:
    """The cases in shuffled order, repeated endlessly."""
    return itertools.cycle(rng.sample(cases, len(cases)))


def not_urgent(cases: list[Row]) -> list[Row]:
    """Cases that go to their department first, not to the emergency department."""
    return [case for case in cases if not case["urgent"]]


def about(case: Row, reason: str, **fields: Any) -> Row:
    """A task about a condition: the slots of its sentences, the key of its reasoning, and further fields."""
    words = {key: case[key] for key in ("id", "c", "C", "get", "d", "sign")}
    return words | {"reason": reason, **fields}


def department(cases: list[Row], language: str, rng: random.Random) -> Iterator[Row]:
    """Which department treats a condition."""
    for case in in_turn(not_urgent(cases), rng):
        yield about(case, "department", answer=case["d"], wrong_answer=rng.choice(case["wrong"]))


def department_of_two(cases: list[Row], language: str, rng: random.Random) -> Iterator[Row]:
    """Which of two departments treats it."""
    for task in department(cases, language, rng):
        one, other = rng.sample((task["answer"], task["wrong_answer"]), 2)
        yield task | {"one": one, "other": other}


def what_now(cases: list[Row], language: str, rng: random.Random) -> Iterator[Row]:
    """A danger sign is present: a good reply calls for help and names the department."""
    for case in in_turn(cases, rng):
        answer = ADVICE[language] + SPACE[language] + REASONS["department"][language].format(**case)
        yield about(case, "what_now", answer=answer, required=case["required"])


def triage(cases: list[Row], language: str, rng: random.Random) -> Iterator[Row]:
    """Whether a sign of a mild condition can wait; signs that cannot and signs that can alternate."""
    clinics = CLINICS[language]
    for case in in_turn([case for case in cases if case["id"] in MILD], rng):
        yield about(case, "danger", answer=clinics["danger"], required=[CALL_FOR_HELP[language]])
        harmless = {"sign": rng.choice(case["symptoms"])}
        yield about(case, "no_danger", answer=clinics["no_danger"]) | harmless


def department_choice(cases: list[Row], language: str, rng: random.Random) -> Iterator[Row]:
    """Which of four departments treats a condition."""
    for case in in_turn(not_urgent(cases), rng):
        yield about(case, "department", right=[case["d"]], others=rng.sample(case["wrong"], 3))


def conditions_of_department(cases: list[Row], rng: random.Random, count: int) -> Iterator[Row]:
    """Which `count` of four conditions a department treats; for the others it is a wrong one."""
    pool = not_urgent(cases)
    for case in in_turn(pool, rng):
        own = [other["c"] for other in pool if other["d"] == case["d"] and other is not case]
        # One per department, so that no two of them suggest another answer.
        strangers = {other["d"]: other["c"] for other in rng.sample(pool, len(pool)) if case["d"] in other["wrong"]}
        if len(own) >= count - 1 and len(strangers) >= 4 - count:
            right = [case["c"], *rng.sample(own, count - 1)]
            others = rng.sample(list(strangers.values()), 4 - count)
            yield about(case, "conditions", right=right, others=others, conditions=" / ".join(right))


def condition_choice(cases: list[Row], language: str, rng: random.Random) -> Iterator[Row]:
    """Which of four conditions a department treats."""
    return conditions_of_department(cases, rng, 1)


def two_conditions(cases: list[Row], language: str, rng: random.Random) -> Iterator[Row]:
    """Which two of four conditions a department treats."""
    return conditions_of_department(cases, rng, 2)


def emergency_choice(cases: list[Row], language: str, rng: random.Random) -> Iterator[Row]:
    """Which of four signs of a mild condition needs an emergency call."""
    pool = [case for case in cases if case["id"] in MILD and len(case["symptoms"]) >= 3]
    for case in in_turn(pool, rng):
        yield about(case, "danger", right=[case["sign"]], others=rng.sample(case["symptoms"], 3))


def one_of(rng: random.Random, lowest: str, highest: str, step: str) -> Decimal:
    """A number from the lowest to the highest, in steps."""
    first, last, width = Decimal(lowest), Decimal(highest), Decimal(step)
    return first + width * rng.randint(0, int((last - first) / width))


def rounded(value: Fraction, places: int) -> Decimal | None:
    """Rounded to this many decimals; None halfway between two, where conventions differ."""
    scaled = value * 10**places
    below = math.floor(scaled)
    if scaled - below == Fraction(1, 2):
        return None
    return Decimal(below + (scaled - below > Fraction(1, 2))).scaleb(-places)


def exact(value: Fraction, places: int) -> Decimal | None:
    """The value itself, without trailing zeros; None if it has more decimals than this."""
    result = rounded(value, places)
    if result is None or Fraction(result) != value:
        return None
    return Decimal(f"{result.normalize():f}")


def calculation(reason: str, result: Decimal, measure: str, **numbers: Any) -> Row:
    """A task with this result; the wrong answer is ten times as large, the most dangerous error with doses."""
    answer, wrong = (f"{value} {measure}".strip() for value in (result, 10 * result))
    return numbers | {"reason": reason, "answer": answer, "wrong_answer": wrong, "numbers": tuple(numbers.values())}


def dose(cases: list[Row], language: str, rng: random.Random) -> Iterator[Row]:
    """Milligrams per kilogram times kilograms."""
    while True:
        per_kg, weight = Decimal(rng.choice(DOSES_PER_KG)), one_of(rng, "8", "90", "0.5")
        milligrams = exact(Fraction(per_kg * weight), 1)
        if milligrams and 10 <= milligrams <= 900:
            yield calculation("dose", milligrams, "mg", per_kg=per_kg, weight=plain(weight))


def dose_volume(cases: list[Row], language: str, rng: random.Random) -> Iterator[Row]:
    """The same, divided by the milligrams in a millilitre."""
    while True:
        per_kg, weight = Decimal(rng.choice(DOSES_PER_KG)), one_of(rng, "8", "90", "0.5")
        strength = Decimal(rng.choice(STRENGTHS))
        milligrams = exact(Fraction(per_kg * weight), 1)
        millilitres = exact(Fraction(per_kg * weight) / Fraction(strength), 1)
        if milligrams and millilitres and 1 <= millilitres <= 30:
            task = calculation("dose_volume", millilitres, "mL", per_kg=per_kg, weight=plain(weight), strength=strength)
            yield task | {"milligrams": milligrams}


def body(rng: random.Random) -> tuple[Decimal, int, Fraction]:
    """Weight in kg, height in cm, and their body mass index."""
    while True:
        weight, height = one_of(rng, "40", "120", "0.5"), rng.randint(148, 192)
        index = Fraction(weight) / Fraction(height, 100) ** 2
        if 15 <= index <= 42:
            return plain(weight), height, index


def bmi(cases: list[Row], language: str, rng: random.Random) -> Iterator[Row]:
    """The body mass index, kg/m²."""
    while True:
        weight, height, index = body(rng)
        if result := rounded(index, 1):
            task = calculation("bmi", result, "", weight=weight, height=height)
            yield task | {"metres": Decimal(height) / 100, "bmi": result}


def bmi_class(cases: list[Row], language: str, rng: random.Random) -> Iterator[Row]:
    """The class of a body mass index, by the cut-offs that the question names; each class in turn."""
    cut_offs, names = BMI_CLASSES[language]
    wanted = 0
    while True:
        weight, height, index = body(rng)
        number = sum(index >= Fraction(cut_off) for cut_off in cut_offs)
        near = any(abs(index - Fraction(cut_off)) < Fraction(1, 10) for cut_off in cut_offs)
        if number == wanted and not near:
            wanted = (wanted + 1) % len(names)
            others = [name for name in names if name != names[number]]
            fields = {"weight": weight, "height": height, "metres": Decimal(height) / 100, "bmi": rounded(index, 1)}
            yield fields | {
                "reason": "bmi",
                "right": [names[number]],
                "others": rng.sample(others, 3),
                "numbers": (weight, height),
            }


def drip(rng: random.Random) -> tuple[int, Decimal]:
    """Millilitres and hours of an infusion."""
    return rng.randrange(50, 1001, 10), plain(one_of(rng, "1.5", "12", "0.5"))


def drip_rate(cases: list[Row], language: str, rng: random.Random) -> Iterator[Row]:
    """Millilitres per hour."""
    while True:
        volume, hours = drip(rng)
        rate = exact(volume / Fraction(hours), 1)
        if rate and 20 <= rate <= 250:
            yield calculation("drip_rate", rate, "mL/h", volume=volume, hours=hours)


def drop_rate(cases: list[Row], language: str, rng: random.Random) -> Iterator[Row]:
    """Drops per minute."""
    unit = {"zh": "滴/分", "en": "drops/min"}[language]
    while True:
        volume, hours = drip(rng)
        factor = rng.choice(DROP_FACTORS)
        rate = rounded(volume * factor / (Fraction(hours) * 60), 0)
        if rate and 8 <= rate <= 120:
            yield calculation("drop_rate", rate, unit, volume=volume, hours=hours, factor=factor)


def unit_conversion(cases: list[Row], language: str, rng: random.Random) -> Iterator[Row]:
    """The same amount in another unit; each pair of units in turn."""
    for unit, to, factor, offset, values, places, rule, named in itertools.cycle(CONVERSIONS):
        value = plain(one_of(rng, *values))
        converted = Fraction(value) * Fraction(factor) + Fraction(offset)
        result = exact(converted, 4) if places is None else rounded(converted, places)
        if result is not None:
            task = calculation("unit_conversion", result, to, value=value, unit=unit, to=to)
            note = ("" if places is None else ONE_DECIMAL[language]) + named[language].format(rule=rule)
            yield task | {"note": note, "rule": rule}


def plain(value: Decimal) -> Decimal:
    """Without trailing zeros."""
    return Decimal(f"{value.normalize():f}")


TASKS: dict[str, Callable[[list[Row], str, random.Random], Iterator[Row]]] = {
    task.__name__: task
    for task in (
        *(department, department_of_two, what_now, triage),
        *(department_choice, condition_choice, two_conditions, emergency_choice, bmi_class),
        *(dose, dose_volume, bmi, drip_rate, drop_rate, unit_conversion),
    )
}


def build_labelled(rows: list[Row], cases: dict[str, list[Row]], rng: random.Random) -> list[Row]:
    """Some of the rows with a `good` reply, a `bad` one, and the `flaw` of the bad one."""
    labelled = []
    for language, count in LABELLED_PER_FLAW.items():
        left: dict[str, list[Row]] = {category: [] for category in COUNTS}
        for row in rows:
            if row["language"] == language:
                left[row["category"]].append(row)
        for flaw, categories in FLAWS.items():
            for category in itertools.islice(itertools.cycle(categories), count):
                row = left[category].pop()
                bad = bad_reply(row, flaw, cases, rng)
                labelled.append(without_task(row) | {"good": good_reply(row), "bad": bad, "flaw": flaw})
    return labelled


def lesson(row: Row) -> Row:
    """A conversation that shows the format of a reply, for fine-tuning before GRPO."""
    turns = [{"from": "human", "value": row["question"]}, {"from": "gpt", "value": good_reply(row)}]
    return {"system": SYSTEM_PROMPT, "conversations": turns, "category": row["category"]}


def good_reply(row: Row) -> str:
    """The reasoning and the answer."""
    return reply(reason(row), row["answer"])


def reason(row: Row) -> str:
    """The reasoning."""
    return REASONS[row["task"]["reason"]][row["language"]].format(**row["task"])


def reply(thinking: str, answer: str) -> str:
    """In the required format."""
    return f"<think>{thinking}</think>\n<answer>{answer}</answer>"


def bad_reply(row: Row, flaw: str, cases: dict[str, list[Row]], rng: random.Random) -> str:
    """A reply with this flaw, and as good as possible otherwise."""
    task, answer, language = row["task"], row["answer"], row["language"]
    space = SPACE[language]
    if flaw == "wrong_answer":
        return reply(reason(row), task["wrong_answer"])
    if flaw == "missing_format":
        return f"{reason(row)}{space}{SO[language]}{answer}"
    if flaw == "other_language":
        other = "en" if language == "zh" else "zh"
        same = next((case for case in cases[other] if case["id"] == task.get("id")), {})
        return reply(REASONS[task["reason"]][other].format(**(task | same)), same.get("d", answer))
    if flaw == "repetition":
        return reply(space.join([reason(row)] * 12), answer)
    if flaw == "too_long":
        more = [sentence for case in rng.sample(cases[language], 40) for sentence in case["sentences"]]
        return reply(space.join([reason(row), *more]), answer)
    return reply(reason(row), REASONS["department"][language].format(**task))
