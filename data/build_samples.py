"""Render facts.yaml, talk.yaml, everyday.yaml and pairs.yaml into the sample files for every stage.

    python data/build_samples.py
    python data/build_samples.py --output_dir outputs/data --name 小医 --author 我

Without arguments the committed files are written again, byte for byte: the seed is fixed, and nothing depends on the
time. With `--name` and `--author` a copy is written in which the assistant introduces itself by that name.

    pretrain/train_zh.txt, train_en.txt          one document per line: all facts about a condition
    pretrain/validation.txt                      the same facts in sentences that no training document has
    finetune/train.jsonl, validation.jsonl       one conversation per line, with its category
    everyday/questions.jsonl                     questions as people type them, held out; some about what is not taught
    reward/train.jsonl, validation.jsonl         one preference pair per line; the category names the flaw
    reward/train_short.jsonl                     fine-tuning questions whose chosen answer is the short one
    grpo*/...                                    questions whose answer can be checked; see build_tasks.py

A fact has one answer per language and many questions. Training and validation draw their questions from separate
pools, so the validation loss shows whether a model learned the fact and not only the wording of the question.
"""

import argparse
import json
import random
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

import yaml

SOURCE_DIR = Path(__file__).resolve().parent
SEED = 42
DEFAULT_NAME = "MedicalGPT"
DEFAULT_AUTHOR = {"zh": "MedicalGPT 团队", "en": "the MedicalGPT team"}

ZH_PHRASINGS_PER_FACT = 5
EN_PHRASINGS_PER_FACT = 5
EN_HELD_OUT_EVERY = 3
EN_HELD_OUT_PAIRS_EVERY = 2
ZH_EXTRA_CONSULTATIONS = 44
EN_CONSULTATIONS = 60
HELD_OUT_DOCUMENTS = {"zh": 80, "en": 40}

# How many wordings of an everyday name are trained, by what is asked; the first one is always among them.
EVERYDAY_WORDINGS = {"management": 4, "symptoms": 3, "department": 3, "examinations": 3, "emergency": 3, "complaint": 8}
UNTAUGHT_WORDINGS, ABOUT_KNOWN, DOSE_WORDINGS = 2, 12, 3
EVERYDAY_HELD_OUT = {"zh": {"names": 45, "complaints": 27}, "en": {"names": 18, "complaints": 10}}
# By the category of a question that is to be declined: what the answer contains.
DECLINES = {
    ("untaught", "zh"): "没有学过",
    ("untaught", "en"): "not taught",
    ("dose", "zh"): "不能定",
    ("dose", "en"): "cannot set doses",
}

PAIRS_PER_CONDITION = {"zh": 5, "en": 2}
# The flaws of rejected answers, in turn. A model that has learned short answers prefers most of those without emergency
# advice and few of the others, so that held-out accuracy starts near one half. Those without the department prevent it
# from learning that danger signs alone are an answer.
FLAWS = ("missing_emergency", "wrong_department", "missing_emergency", "invented_certainty")
FLAWS += ("missing_emergency", "other_language", "missing_department", "rude")
# Fine-tuning questions that also become pairs, in addition to those about facts.
SHORT_ANSWERS = {"identity": 40, "talk": 20, "refusal": 15, "emergency_talk": 10}
LACKS_WHAT_IS_REQUIRED = ("missing_emergency", "missing_department", "wrong_department")

# {c} is the condition, {C} the same with a capital, {get} "to come down with" in the verb that fits the condition.
TRAIN_QUESTIONS = {
    "zh": {
        "department": [
            "{c}应该挂什么科？",
            "{c}挂哪个科？",
            "{get}{c}看什么科？",
            "请问{c}要挂哪个科室？",
            "怀疑是{c}，去医院挂什么科？",
            "{c}该看哪个科室的医生？",
            "{c}属于哪个科室？",
            "看{c}去什么科室好？",
            "家人{get}{c}，要挂什么科？",
            "{c}挂号选哪个科？",
        ],
        "symptoms": [
            "{c}有哪些症状？",
            "{c}的症状是什么？",
            "{c}会有什么表现？",
            "{get}{c}会出现哪些不舒服？",
            "{c}常见的症状有哪些？",
            "请介绍一下{c}的症状。",
            "{c}一般有什么症状？",
            "请问{c}有什么典型表现？",
            "{get}{c}身体会有哪些表现？",
            "想了解{c}的常见表现。",
        ],
        "examinations": [
            "{c}要做哪些检查？",
            "怀疑{c}需要做什么检查？",
            "{c}怎么检查？",
            "诊断{c}要做什么检查？",
            "请问{c}应该检查哪些项目？",
            "确诊{c}需要哪些检查？",
            "{c}的检查项目有哪些？",
            "医生怀疑是{c}，会安排什么检查？",
            "{c}去医院查什么？",
            "查{c}一般做哪些项目？",
            "{c}要查哪些项目？",
            "确诊{c}要查什么？",
        ],
        "management": [
            "{c}怎么治疗？",
            "{c}应该怎么处理？",
            "{get}{c}怎么办？",
            "{c}的治疗方法有哪些？",
            "请问{c}如何治疗？",
            "{get}{c}该怎么治？",
            "{c}一般怎么治？",
            "请介绍一下{c}的治疗。",
            "{c}的处理方法是什么？",
            "医生会怎么治疗{c}？",
        ],
        "emergency": [
            "{c}什么情况要马上去急诊？",
            "{c}出现什么情况需要急救？",
            "{c}有哪些危险信号？",
            "{c}什么时候要打120？",
            "{get}{c}，哪些情况要立即就医？",
            "{c}的紧急情况有哪些？",
            "请问{c}什么时候必须去急诊？",
            "{c}出现哪些表现很危险？",
            "{get}{c}什么情况要叫救护车？",
            "{c}到什么程度要赶紧去医院？",
        ],
    },
    "en": {
        "department": [
            "Which department treats {c}?",
            "Which doctor should I see for {c}?",
            "What department should I visit for {c}?",
            "I may have {c}. Which department do I need?",
            "Who treats {c} in a hospital?",
            "Which clinic should I book for {c}?",
            "For {c}, which department is right?",
            "Which specialty looks after {c}?",
        ],
        "symptoms": [
            "What are the symptoms of {c}?",
            "What are the signs of {c}?",
            "Which symptoms come with {c}?",
            "Tell me the common symptoms of {c}.",
            "What symptoms should I expect with {c}?",
            "How do I recognise {c}?",
            "Please list the symptoms of {c}.",
            "What are typical signs of {c}?",
        ],
    },
}

HELD_OUT_QUESTIONS = {
    "zh": {
        "department": [
            "请问{get}{c}应该挂哪个科？",
            "{c}要看什么科？",
            "怀疑{get}{c}，该挂什么科？",
            "{c}去医院看哪个科室？",
        ],
        "symptoms": [
            "请问{c}有哪些症状？",
            "{c}常见的表现是什么？",
            "{get}{c}一般有什么症状？",
            "说说{c}的症状。",
        ],
        "examinations": [
            "请问{c}要做什么检查？",
            "怀疑是{c}，应该做哪些检查？",
            "{c}一般做什么检查？",
            "确诊{c}要查哪些项目？",
        ],
        "management": [
            "请问{c}怎么治疗？",
            "{get}{c}应该怎么办？",
            "{c}该如何处理？",
            "说说{c}的治疗方法。",
        ],
        "emergency": [
            "请问{c}什么情况要打120？",
            "{c}哪些情况需要去急诊？",
            "{get}{c}有哪些危险信号？",
            "{c}什么时候要马上就医？",
        ],
    },
    "en": {
        "department": [
            "Which department should I visit for {c}?",
            "What doctor treats {c}?",
            "Which clinic treats {c}?",
            "I may have {c}. Which doctor should I see?",
        ],
        "symptoms": [
            "What are the common symptoms of {c}?",
            "Which signs come with {c}?",
            "Tell me the signs of {c}.",
            "Please list the signs of {c}.",
        ],
    },
}

# What the user asks after the first turn of a consultation, where the condition is "it".
FOLLOW_UPS = {
    "zh": {
        "department": ["那应该挂什么科？", "这种病看什么科？", "那我去哪个科室看？", "它归哪个科管？"],
        "symptoms": ["它有哪些症状？", "这个病一般有什么表现？", "那会有什么不舒服？", "它常见的症状是什么？"],
        "examinations": ["那要做什么检查？", "它需要做哪些检查？", "去医院会查什么？", "这个病怎么检查？"],
        "management": ["那怎么治疗？", "它该怎么处理？", "这个病要怎么治？", "那该怎么办？"],
        "emergency": ["什么情况要马上去急诊？", "它有哪些危险信号？", "那什么时候要打120？", "这个病什么时候很危险？"],
    },
    "en": {
        "department": ["Which department treats it?", "Which doctor should I see for it?", "Where should I go for it?"],
        "symptoms": ["What are its symptoms?", "Which signs come with it?", "How do I recognise it?"],
    },
}

# {d} department, {s} symptoms, {x} examinations, {m} management, {e} emergency.
DOCUMENT_SENTENCES = {
    "zh": {
        "department": ["{c}建议挂{d}。", "看{c}应去{d}。", "{c}由{d}诊治，建议挂{d}。"],
        "urgent": ["{c}是急症，请立即去急诊，由{d}诊治。", "{c}是急症，不能等，应立即去急诊，诊治科室是{d}。"],
        "symptoms": ["{c}的常见表现有{s}。", "{c}的症状包括{s}。", "{c}通常表现为{s}。"],
        "examinations": ["{c}常做的检查有{x}。", "诊断{c}，医生会安排{x}。", "{c}的检查项目包括{x}。"],
        "management": ["{c}的处理方法：{m}。", "{c}的治疗：{m}。", "对{c}的应对是：{m}。"],
        "emergency": [
            "{c}如出现{e}，请立即拨打120或去急诊。",
            "{c}的危险信号是{e}，遇到时要立即拨打120或去急诊。",
            "{c}若伴有{e}，必须马上去急诊。",
        ],
    },
    "en": {
        "department": ["For {c}, see the {d} department.", "{C} belongs to the {d} department."],
        "urgent": [
            "{C} is an emergency: go to the emergency department at once. It is treated by {d}.",
            "{C} cannot wait: go to the emergency department at once. The specialty is {d}.",
        ],
        "symptoms": ["Common signs of {c} are {s}.", "The symptoms of {c} include {s}."],
        "examinations": ["Usual tests for {c} are {x}.", "Doctors examine {c} with {x}."],
        "management": ["Care for {c}: {m}.", "What is done for {c}: {m}."],
        "emergency": [
            "With {c}, call an ambulance or go to the emergency department at once in case of {e}.",
            "The danger signs of {c} are {e}; then call an ambulance or go to the emergency department at once.",
        ],
    },
}

# {n} is an everyday name or a complaint, {a} what to do about it.
NAME_SENTENCES = {
    "zh": ["{n}就是{c}。", "{c}也叫{n}。"],
    "en": ["People also call {c} {n}.", "Another name for {c} is {n}."],
}
COMPLAINT_SENTENCES = {"zh": ["关于{n}：{a}", "遇到{n}，{a}"], "en": ["About {n}: {a}", "With {n}: {a}"]}

# All their characters occur in the training documents: an unseen byte would outweigh any fact.
HELD_OUT_DOCUMENT_TEMPLATES = {
    "zh": [
        "出现{s}时，可能是{c}。患者到{d}就诊，做{x}来明确诊断。诊断后的治疗方法是：{m}。有{e}的患者需要急救。",
        "{d}医生诊断{c}时，常发现患者有{s}。应做的检查：{x}。医生的处理：{m}。危险表现：{e}。",
        "{c}伴有{e}时是急症，需要急救。平时的表现是{s}，就诊科室为{d}，检查以{x}为主，治疗方法为{m}。",
    ],
    "en": [
        "People who suffer from {c} often notice {s}. The specialists of {d} take over and order {x}. "
        "As a rule, {m}. Nobody should wait after {e}.",
        "Think of {c} when a patient reports {s}. The patient is sent to {d}, where {x} may follow. "
        "The usual plan is this: {m}. Every hour counts after {e}.",
    ],
}

# A small model has to see a question several times; these turn one question into several.
OPENINGS = {
    "identity": {
        "zh": ["{q}", "你好，{q}", "您好，{q}", "嗨，{q}", "请问一下，{q}", "那么，{q}", "{q}，谢谢"],
        "en": ["{q}", "Hello. {q}", "Hi! {q}", "Excuse me. {q}", "By the way: {q}", "So: {q}", "Hey there. {q}"],
    },
    "talk": {"zh": ["{q}", "{q}。", "{q}！", "{q}～", "嗯，{q}"], "en": ["{q}", "Well. {q}", "OK. {q}"]},
    "refusal": {
        "zh": ["{q}", "您好，{q}", "医生，{q}", "你好，{q}", "麻烦你，{q}"],
        "en": ["{q}", "Hello. {q}", "Doctor: {q}"],
    },
    "emergency_talk": {
        "zh": ["{q}", "快帮帮我，{q}", "医生，{q}", "救命，{q}", "请问，{q}", "你好，{q}"],
        "en": ["{q}", "Help! {q}", "Doctor: {q}"],
    },
}

# In Chinese one does not "get" an injury or a complication; names with these endings take another verb.
HAPPENS_TO_ONE = tuple("伤 骨折 中毒 出血 惊厥 黄疸 妊娠 剧吐 前期 胎盘 发作 休克 扭转 脱离 夹层 套叠 低体温症".split())
SAYS_WHO_DECIDES = re.compile("医嘱|医生|专科|团队|立即|尽快|尽早")

# Fine-tuning states the danger signs in Chinese only, so these sentences fit every condition.
EMERGENCY_EN = "If it suddenly gets worse, call an ambulance or go to the emergency department at once."
URGENT_EN = "Call an ambulance, and do not drive there yourself."
SENDS_TO_EMERGENCY = re.compile("120|急诊|ambulance|emergency")

CONDITION_FIELDS = {"id", "zh", "en", "department", "symptoms", "examinations", "management", "emergency"}
Row = dict[str, Any]


def main() -> None:
    """Read the sources, check them, and write the sample files."""
    args = parse_args()
    # The folder of this file is on the search path if it runs as a program, not if only its flags are read.
    from build_tasks import build_tasks

    facts, talk, everyday, pairs = (
        read_yaml(SOURCE_DIR / f"{name}.yaml") for name in ("facts", "talk", "everyday", "pairs")
    )
    check_facts(facts)
    check_everyday(everyday, facts["conditions"])
    check_wordings(pairs, facts["departments"])
    departments, conditions = facts["departments"], facts["conditions"]
    author = {"zh": args.author, "en": args.author} if args.author else DEFAULT_AUTHOR

    documents = build_documents(conditions, departments, everyday)
    train, validation = build_conversations(conditions, departments, talk, args.name, author)
    # Pairs are made of the rows about facts: everyday rows repeat their answers.
    facts_only = list(train)
    everyday_rows, everyday_questions = build_everyday(conditions, departments, everyday)
    # Some wordings are those of the facts as well.
    asked = set(questions(train))
    train = mix(train, [row for row in everyday_rows if questions([row])[0] not in asked])
    check_no_overlap(train, validation + everyday_questions)
    train_pairs, validation_pairs = build_pairs(conditions, departments, pairs)
    short = build_short_pairs(facts_only, conditions, departments)
    check_pairs(train_pairs, validation_pairs, questions(train + validation))
    random.Random(SEED).shuffle(short)
    tasks = build_tasks({language: task_cases(conditions, departments, language, pairs) for language in ("zh", "en")})
    check_tasks(tasks, questions(train + validation + train_pairs + validation_pairs))

    tables = {
        "finetune/train.jsonl": train,
        "finetune/validation.jsonl": validation,
        "everyday/questions.jsonl": everyday_questions,
        "reward/train.jsonl": train_pairs,
        "reward/train_short.jsonl": short,
        "reward/validation.jsonl": validation_pairs,
        **tasks,
    }
    # Those in the folder of this file are the committed ones, which it has written.
    present = [path for path in (*documents, *tables) if (args.output_dir / path).exists()]
    if present and args.output_dir.resolve() != SOURCE_DIR:
        fail([f"{args.output_dir / present[0]} exists; choose another --output_dir, or remove it first"])
    for path, lines in documents.items():
        write_lines(args.output_dir / path, lines)
        print(f"{args.output_dir / path}: {len(lines)} documents")
    for path, rows in tables.items():
        write_lines(args.output_dir / path, [json.dumps(row, ensure_ascii=False) for row in rows])
        counts = Counter(row["category"] for row in rows)
        shares = ", ".join(f"{category} {count}" for category, count in sorted(counts.items()))
        print(f"{args.output_dir / path}: {len(rows)} rows ({shares})")


def parse_args() -> argparse.Namespace:
    """Read the command line. Raises SystemExit if a renamed copy would replace the committed samples."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, default=SOURCE_DIR, help="where to write (default: %(default)s)")
    parser.add_argument("--name", default=DEFAULT_NAME, help="what the assistant calls itself (default: %(default)s)")
    parser.add_argument("--author", help=f"who trained it (default: {DEFAULT_AUTHOR['zh']} / {DEFAULT_AUTHOR['en']})")
    args = parser.parse_args()
    for flag, value in (("--name", args.name), ("--author", args.author)):
        if value is not None and (not value.strip() or not value.isprintable()):
            parser.error(f"{flag} {value!r} must be one line of visible text")
    if args.output_dir.resolve() == SOURCE_DIR and (args.name != DEFAULT_NAME or args.author):
        parser.error(
            f"--name and --author would replace the committed samples in {args.output_dir}.\n"
            "Write the renamed copy elsewhere, for example --output_dir outputs/data"
        )
    return args


def read_yaml(path: Path) -> Any:
    """Read one YAML file in UTF-8."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def check_facts(facts: dict[str, Any]) -> None:
    """Exit with all problems of facts.yaml. Raises SystemExit."""
    problems = []
    seen: dict[tuple[str, str], int] = {}
    for number, row in enumerate(facts["conditions"], start=1):
        where = f"facts.yaml: condition {number} ({row.get('id', 'no id')})"
        if set(row) - {"urgent"} != CONDITION_FIELDS:
            odd = sorted(CONDITION_FIELDS ^ (set(row) - {"urgent"}))
            problems.append(f"{where}: fields missing or unknown: {', '.join(odd)}")
            continue
        for key in ("id", "zh", "en"):
            if first := seen.get((key, row[key])):
                problems.append(f"{where}: {key} {row[key]!r} is taken by condition {first}")
            seen[key, row[key]] = number
        if row["department"] not in facts["departments"]:
            problems.append(f"{where}: department {row['department']!r} has no entry under `departments`")
        for key in ("symptoms", "examinations"):
            if not 2 <= len(row[key]["zh"]) == len(row[key]["en"]) <= 4:
                problems.append(f"{where}: {key} needs two to four items, the same number in zh and in en")
        for key in ("management", "emergency"):
            problems += [f"{where}: {key}.{x} is empty" for x in ("zh", "en") if not row[key].get(x)]
    if problems:
        fail(problems)


def check_everyday(everyday: dict[str, Any], conditions: list[Row]) -> None:
    """Exit with all problems of everyday.yaml. Raises SystemExit."""
    problems = [f"everyday.yaml: names of {key}: no such condition" for key in set(everyday["names"]) - ids(conditions)]
    for language in ("zh", "en"):
        known = [row[language] for row in conditions]
        known += [name for names in everyday["names"].values() for name in names.get(language, [])]
        known += [name for entry in everyday["complaints"] for name in entry[language]]
        untaught = [name for split in ("train", "held_out") for name in everyday["untaught"]["names"][split][language]]
        for name, count in Counter(known + untaught).items():
            if count > 1:
                problems.append(f"everyday.yaml: {name} is named {count} times, or is both known and not taught")
        for kind in everyday["wordings"]["train"][language]:
            both = {split: set(everyday["wordings"][split][language][kind]) for split in ("train", "held_out")}
            if shared := both["train"] & both["held_out"]:
                problems.append(f"everyday.yaml: wordings of {kind} both trained and held out: {sorted(shared)}")
    if problems:
        fail(problems)


def ids(conditions: list[Row]) -> set[str]:
    """The ids of conditions."""
    return {row["id"] for row in conditions}


def check_wordings(pairs: dict[str, Any], departments: dict[str, str]) -> None:
    """Exit if pairs.yaml lacks wrong departments or wordings. Raises SystemExit."""
    problems = []
    for department in departments:
        wrong = pairs["wrong_department"].get(department)
        if not wrong or department in wrong or not set(wrong) <= set(departments):
            problems.append(f"pairs.yaml: wrong_department of {department}: {wrong}; other departments are needed")
    for language, count in PAIRS_PER_CONDITION.items():
        if (given := len(pairs["questions"]["train"][language])) < count:
            problems.append(f"pairs.yaml: {given} training questions in {language}; {count} are needed")
    if problems:
        fail(problems)


def fail(problems: list[str]) -> NoReturn:
    """Exit with the first 20 problems. Raises SystemExit."""
    more = [f"and {len(problems) - 20} more"] if len(problems) > 20 else []
    sys.exit("\n".join(["error: the samples were not written", *problems[:20], *more]))


def join_zh(items: list[str]) -> str:
    """甲、乙和丙; with 以及 if an item contains 和."""
    last = "以及" if any("和" in item for item in items) else "和"
    return "、".join(items[:-1]) + last + items[-1]


def join_en(items: list[str]) -> str:
    """a, b and c; with a comma before the last if an item contains "and"."""
    last = ", and " if any(" and " in item for item in items) else " and "
    return ", ".join(items[:-1]) + last + items[-1]


def slots(row: Row, departments: dict[str, str], language: str) -> dict[str, str]:
    """The words of a condition for the slots of sentences."""
    if language == "en":
        return {
            "c": row["en"],
            "C": row["en"][0].upper() + row["en"][1:],
            "get": "",
            "d": departments[row["department"]],
            "s": join_en(row["symptoms"]["en"]),
            "x": join_en(row["examinations"]["en"]),
            "m": row["management"]["en"],
            "e": row["emergency"]["en"],
        }
    management = row["management"]["zh"]
    return {
        "c": row["zh"],
        "C": row["zh"],
        "get": "发生" if row["zh"].endswith(HAPPENS_TO_ONE) else "得了",
        "d": row["department"],
        "s": join_zh(row["symptoms"]["zh"]),
        "x": join_zh(row["examinations"]["zh"]),
        "m": management if SAYS_WHO_DECIDES.search(management) else f"{management}，请遵医嘱",
        "e": row["emergency"]["zh"],
    }


def answers(row: Row, departments: dict[str, str], language: str) -> dict[str, str]:
    """The answer to each kind of question about a condition."""
    words = slots(row, departments, language)
    in_emergency_department = row["department"] == "急诊科"
    if language == "en":
        department = "For {c}, see the {d} department."
        if row.get("urgent"):
            department = "{C} is an emergency: go to the emergency department at once."
            department += "" if in_emergency_department else " It is treated by {d}."
        patterns = {
            "department": department,
            "symptoms": "Common signs of {c} are {s}.",
        }
    else:
        department = "{c}建议挂{d}。"
        if row.get("urgent"):
            department = "{c}是急症，请立即去急诊"
            department += "科。" if in_emergency_department else "，由{d}诊治。"
        patterns = {
            "department": department,
            "symptoms": "{c}的常见表现有{s}。",
            "examinations": "{c}常做的检查有{x}。",
            "management": "{c}的处理方法：{m}。",
            "emergency": "{c}如出现{e}，请立即拨打120或去急诊。",
        }
    return {attribute: pattern.format(**words) for attribute, pattern in patterns.items()}


def build_documents(
    conditions: list[Row], departments: dict[str, str], everyday: dict[str, Any]
) -> dict[str, list[str]]:
    """The pretraining files: {relative path: lines}, with two documents per condition and per complaint in a language.

    Everyday names are in the documents of their condition.
    """
    rng = random.Random(SEED)
    files: dict[str, list[str]] = {}
    for language, variants in (("zh", 2), ("en", 2)):
        lines = []
        for row in conditions:
            words = slots(row, departments, language)
            pools = dict(DOCUMENT_SENTENCES[language])
            urgent = pools.pop("urgent")
            if row.get("urgent"):
                pools["department"] = urgent
            # Sampled without replacement, so that the variants of a condition differ in every sentence.
            chosen = [rng.sample(pool, variants) for pool in pools.values()]
            for variant in range(variants):
                sentences = [templates[variant].format(**words) for templates in chosen]
                rng.shuffle(sentences)
                names = everyday["names"].get(row["id"], {}).get(language, [])
                sentences += [NAME_SENTENCES[language][variant].format(n=name, **words) for name in names]
                lines.append(("" if language == "zh" else " ").join(sentences))
        for entry in everyday["complaints"]:
            for variant in range(variants):
                name, answer = entry[language][variant % len(entry[language])], entry["answer"][language]
                lines.append(COMPLAINT_SENTENCES[language][variant].format(n=name, a=answer))
        rng.shuffle(lines)
        files[f"pretrain/train_{language}.txt"] = lines

    held_out = []
    for language, count in HELD_OUT_DOCUMENTS.items():
        for index, row in enumerate(rng.sample(conditions, count)):
            template = HELD_OUT_DOCUMENT_TEMPLATES[language][index % len(HELD_OUT_DOCUMENT_TEMPLATES[language])]
            held_out.append(template.format(**slots(row, departments, language)))
    rng.shuffle(held_out)
    files["pretrain/validation.txt"] = held_out
    return files


def conversation(category: str, *turns: str) -> Row:
    """One ShareGPT row; the turns alternate, the user first."""
    speakers = ("human", "gpt")
    messages = [{"from": speakers[index % 2], "value": text} for index, text in enumerate(turns)]
    return {"conversations": messages, "category": category}


def build_conversations(
    conditions: list[Row], departments: dict[str, str], talk: dict[str, Any], name: str, author: dict[str, str]
) -> tuple[list[Row], list[Row]]:
    """The fine-tuning rows, training and validation, shuffled in an order that does not depend on the names."""
    rng = random.Random(SEED)
    train, validation = build_fact_rows(conditions, departments, rng)
    train += build_consultations(conditions, departments, rng)

    for entry in talk["identity"]:
        answer = entry["answer"].format(name=name, author=author[language_of(entry["answer"])])
        for question in entry["train"]:
            train += [conversation("identity", asked, answer) for asked in openings("identity", question)]
        validation += [conversation("identity", question, answer) for question in entry["held_out"]]
    for section, category in (("talk", "talk"), ("refusals", "refusal"), ("emergency", "emergency_talk")):
        for entry in talk[section]:
            if "turns" in entry:
                train.append(conversation(category, *entry["turns"]))
            else:
                for asked in openings(category, entry["question"]):
                    train.append(conversation(category, asked, entry["answer"]))

    rng.shuffle(train)
    rng.shuffle(validation)
    return train, validation


def language_of(text: str) -> str:
    """`zh` if the text contains a Chinese character, `en` otherwise."""
    return "zh" if re.search(r"[\u4e00-\u9fff]", text) else "en"


def openings(category: str, question: str) -> list[str]:
    """The question as it is and with the openings of its category, except where two punctuation marks would meet."""
    asked = [template.format(q=question) for template in OPENINGS[category][language_of(question)]]
    return [text for text in asked if not re.search(r"[。！？，][。！？，]$|[。！？]，谢谢$", text)]


def build_fact_rows(
    conditions: list[Row], departments: dict[str, str], rng: random.Random
) -> tuple[list[Row], list[Row]]:
    """One-turn questions about every condition, and the held-out ones."""
    train, validation = [], []
    for language, phrasings in (("zh", ZH_PHRASINGS_PER_FACT), ("en", EN_PHRASINGS_PER_FACT)):
        for index, row in enumerate(conditions):
            words = slots(row, departments, language)
            for attribute, answer in answers(row, departments, language).items():
                for template in rng.sample(TRAIN_QUESTIONS[language][attribute], phrasings):
                    train.append(conversation(attribute, template.format(**words), answer))
                held_out = rng.choice(HELD_OUT_QUESTIONS[language][attribute])
                if language == "zh" or index % EN_HELD_OUT_EVERY == 0:
                    validation.append(conversation(attribute, held_out.format(**words), answer))
    return train, validation


def build_consultations(conditions: list[Row], departments: dict[str, str], rng: random.Random) -> list[Row]:
    """Conversations with two or three questions about a condition that only the first one names."""
    plan = [("zh", row) for row in conditions + rng.sample(conditions, ZH_EXTRA_CONSULTATIONS)]
    plan += [("en", row) for row in rng.sample(conditions, EN_CONSULTATIONS)]
    rows = []
    for language, row in plan:
        words = slots(row, departments, language)
        known = answers(row, departments, language)
        asked = rng.sample(list(known), min(len(known), rng.choice((2, 3))))
        turns = []
        for position, attribute in enumerate(asked):
            pool = (FOLLOW_UPS if position else TRAIN_QUESTIONS)[language][attribute]
            turns += [rng.choice(pool).format(**words), known[attribute]]
        rows.append(conversation("consultation", *turns))
    return rows


def build_everyday(
    conditions: list[Row], departments: dict[str, str], everyday: dict[str, Any]
) -> tuple[list[Row], list[Row]]:
    """Questions in everyday words, those about what is not taught, and those about doses; and the held-out ones.

    A held-out question has a wording that no training row has. Those whose answer is not taught have a category of
    their own, and the beginning of that answer as `meta.required`.
    """
    # The held-out questions stay the same when the wordings that are trained change.
    rng, rng_held_out = random.Random(SEED), random.Random(SEED)
    train: list[Row] = []
    held_out: list[Row] = []
    for language, counts in EVERYDAY_HELD_OUT.items():
        named, known = everyday_names(conditions, departments, everyday, language)
        complaints = [(name, entry["answer"][language]) for entry in everyday["complaints"] for name in entry[language]]
        asked = {split: everyday["wordings"][split][language] for split in ("train", "held_out")}
        ways = everyday["spoken"][language]
        to_answer = [(name, attribute, answer) for name, known_ in named for attribute, answer in known_.items()]
        to_answer += [(name, "complaint", answer) for name, answer in complaints]
        for name, attribute, answer in to_answer:
            first, *others = asked["train"][attribute]
            train.append(conversation("everyday", first.format(n=name), answer))
            for wording in rng.sample(others, EVERYDAY_WORDINGS[attribute] - 1):
                train.append(conversation("everyday", speak(wording.format(n=name), ways, rng), answer))
        for name, answers_to_it in rng_held_out.sample(named, counts["names"]):
            attribute = rng_held_out.choice(list(answers_to_it))
            question = rng_held_out.choice(asked["held_out"][attribute]).format(n=name)
            held_out.append(conversation("everyday", question, answers_to_it[attribute]))
        for name, answer in rng_held_out.sample(complaints, counts["complaints"]):
            question = rng_held_out.choice(asked["held_out"]["complaint"]).format(n=name)
            held_out.append(conversation("everyday", question, answer))
        train += build_untaught(everyday, known, language, "train", rng)
        rows = build_untaught(everyday, known, language, "held_out", rng_held_out)
        held_out += [row | {"meta": {"required": [[DECLINES[row["category"], language]]]}} for row in rows]
    rng.shuffle(train)
    rng_held_out.shuffle(held_out)
    return train, held_out


def everyday_names(
    conditions: list[Row], departments: dict[str, str], everyday: dict[str, Any], language: str
) -> tuple[list[tuple[str, dict[str, str]]], list[str]]:
    """Each everyday name with the answers to its condition, and all names of conditions, formal ones too."""
    named = []
    for row in conditions:
        known = answers(row, departments, language)
        if language == "en":
            known["management"] = "Care for {c}: {m}.".format(**slots(row, departments, language))
            # The rows about facts ask for department and symptoms only.
            named.append((row["en"], {"management": known["management"]}))
        named += [(name, known) for name in everyday["names"].get(row["id"], {}).get(language, [])]
    return named, list(dict.fromkeys([row[language] for row in conditions] + [name for name, _ in named]))


def build_untaught(
    everyday: dict[str, Any], known: list[str], language: str, split: str, rng: random.Random
) -> list[Row]:
    """Questions that the model is to decline; `split` is train or held_out."""
    untaught, doses, trained = everyday["untaught"], everyday["doses"], split == "train"
    wordings = flat(everyday["wordings"][split][language])
    if trained:
        # All that a known condition is asked with, so that the name alone decides.
        wordings += [text.replace("{c}", "{n}") for text in flat(TRAIN_QUESTIONS[language]) if "{get}" not in text]
        wordings = list(dict.fromkeys(wordings))
    declined = []
    for name in untaught["names"][split][language]:
        declined += [text.format(n=name) for text in rng.sample(wordings, UNTAUGHT_WORDINGS if trained else 1)]
    for text in untaught["about_known"][split][language]:
        declined += [text.format(n=name) for name in rng.sample(known, ABOUT_KNOWN if trained else 1)]
    declined += untaught["questions"][split][language]
    asked = []
    texts = doses["wordings"][split][language]
    for number, name in enumerate(doses["medicines"][split][language]):
        chosen = rng.sample(texts, DOSE_WORDINGS) if trained else [texts[number % len(texts)]]
        asked += [text.format(n=name) for text in chosen]
    rows = []
    for category, questions_, answer in (("untaught", declined, untaught["answer"]), ("dose", asked, doses["answer"])):
        for question in questions_:
            text = speak(question, everyday["spoken"][language], rng) if trained else question
            rows.append(conversation(category, text, answer[language]))
    return rows


def speak(question: str, ways: list[str], rng: random.Random) -> str:
    """The question, or what somebody makes of it who greets, thanks or leaves out the question mark."""
    return rng.choice(ways).format(q=question.rstrip("？")) if rng.random() < 0.5 else question


def flat(lists: dict[str, list[str]]) -> list[str]:
    """The items of all lists."""
    return [item for items in lists.values() for item in items]


def mix(rows: list[Row], others: list[Row]) -> list[Row]:
    """Both in an order that keeps that of each, so that more of one kind do not reorder the other."""
    rng = random.Random(SEED)
    at = set(rng.sample(range(len(rows) + len(others)), len(others)))
    sources = (iter(rows), iter(others))
    return [next(sources[index in at]) for index in range(len(rows) + len(others))]


def questions(rows: list[Row]) -> list[str]:
    """Every user turn."""
    return [turn["value"] for row in rows for turn in row["conversations"] if turn["from"] == "human"]


def check_no_overlap(train: list[Row], validation: list[Row]) -> None:
    """Exit if a question is in both splits, or is asked alone twice. Raises SystemExit."""
    shared = sorted(set(questions(train)) & set(questions(validation)))
    problems = [f"in train and in validation: {question}" for question in shared]
    # A consultation begins with a question that is also asked alone, with the same answer.
    counts = Counter(questions([row for row in train + validation if row["category"] != "consultation"]))
    problems += [f"asked {count} times: {question}" for question, count in counts.items() if count > 1]
    if problems:
        fail(problems)


def build_pairs(
    conditions: list[Row], departments: dict[str, str], pairs: dict[str, Any]
) -> tuple[list[Row], list[Row]]:
    """The preference rows, training and validation: a prompt, a chosen and a rejected answer."""
    rng = random.Random(SEED)
    train, validation = [], []
    for language, count in PAIRS_PER_CONDITION.items():
        for index, row in enumerate(conditions):
            plan = [(train, "train", FLAWS[(index * count + position) % len(FLAWS)]) for position in range(count)]
            if language == "zh" or index % EN_HELD_OUT_PAIRS_EVERY == 0:
                plan.append((validation, "held_out", FLAWS[len(validation) % len(FLAWS)]))
            asked = {
                split: rng.sample(pool[language], len(pool[language])) for split, pool in pairs["questions"].items()
            }
            for rows, split, flaw in plan:
                question = asked[split].pop().format(**slots(row, departments, language))
                good = good_answer(row, departments, language)
                bad = bad_answer(row, departments, language, flaw, pairs, split, rng)
                rows.append(preference([question], good, bad, flaw, required_words(row, departments, language)))
    for entry in pairs["written"]:
        turns = entry.get("turns") or [entry["question"]]
        written = preference(turns, entry["chosen"], entry["rejected"], entry["category"], entry["required"])
        (validation if entry.get("held_out") else train).append(written)
    rng.shuffle(train)
    rng.shuffle(validation)
    return train, validation


def build_short_pairs(train: list[Row], conditions: list[Row], departments: dict[str, str]) -> list[Row]:
    """Preference rows for training whose chosen answer is the short one of the fine-tuning rows.

    Without them the other pairs teach a model to add department and danger signs to every answer. The rejected answer
    says more than was asked, or something else.

    Args:
        train: fine-tuning rows.
    """
    rng = random.Random(SEED)
    asked_alone = [row for row in train if len(row["conversations"]) == 2]
    asked: dict[str, list[str]] = {}
    for row in asked_alone:
        asked.setdefault(row["conversations"][1]["value"], []).append(row["conversations"][0]["value"])
    pairs = []
    for index, row in enumerate(conditions):
        # Questions about the department alone, or the treatment alone, are closest to those that ask for everything.
        plan = [("zh", "department"), ("zh", "department"), ("zh", index), ("zh", "management")]
        plan += [("zh", index + 2), ("en", index // 2)] if index % 2 else []
        plan += [("en", "department")] if index % 5 < 3 else []
        taken: set[str] = set()
        for language, which in plan:
            known = answers(row, departments, language)
            attribute = list(known)[which % len(known)] if isinstance(which, int) else which
            chosen = known.pop(attribute)
            wordings = [text for text in asked[chosen] if text not in taken]
            question = rng.choice([text for text in wordings if "怎么办" in text] or wordings)
            taken.add(question)
            advice = emergency_sentence(row, departments, language)
            more = join_sentences([chosen, known["department"] if attribute == "emergency" else advice], language)
            if which == "management":
                bad = good_answer(row, departments, language) if index % 2 else known["department"]
            else:
                bad = more if which == "department" else rng.choice([more, rng.choice(list(known.values()))])
            pairs.append(preference([question], chosen, bad, "not_asked", []))
    for category, count in SHORT_ANSWERS.items():
        for row in rng.sample([row for row in asked_alone if row["category"] == category], count):
            question, chosen = (turn["value"] for turn in row["conversations"])
            language = language_of(question)
            advice = emergency_sentence(rng.choice(conditions), departments, language)
            pairs.append(preference([question], chosen, join_sentences([chosen, advice], language), "not_asked", []))
    return pairs


def preference(turns: list[str], chosen: str, rejected: str, category: str, required: list[list[str]]) -> Row:
    """One preference row; the turns alternate, the user first and last."""
    return {
        "conversations": conversation(category, *turns)["conversations"],
        "chosen": chosen,
        "rejected": rejected,
        "category": category,
        "language": language_of(chosen),
        "meta": {"required": required},
    }


def join_sentences(sentences: list[str], language: str) -> str:
    """Sentences of an answer, separated by spaces in English only."""
    return ("" if language == "zh" else " ").join(sentences)


def good_answer(row: Row, departments: dict[str, str], language: str) -> str:
    """Where to go, and when to call for help."""
    department = answers(row, departments, language)["department"]
    return join_sentences([department, emergency_sentence(row, departments, language)], language)


def emergency_sentence(row: Row, departments: dict[str, str], language: str) -> str:
    """When to call for help."""
    if language == "en":
        return URGENT_EN if row.get("urgent") else EMERGENCY_EN
    return answers(row, departments, language)["emergency"]


def required_words(row: Row, departments: dict[str, str], language: str) -> list[list[str]]:
    """Groups of strings; a good answer contains one string of each: the department, and the call for help.

    An urgent condition's department sentence names the emergency department, so only the ambulance counts there.
    """
    ambulance, emergency_department = ("120", "急诊") if language == "zh" else ("ambulance", "emergency department")
    department = row["department"] if language == "zh" else departments[row["department"]]
    if language == "en" and row["department"] == "急诊科":
        return [["is an emergency"], [ambulance]]
    return [[department], [ambulance] if row.get("urgent") else [ambulance, emergency_department]]


def bad_answer(
    row: Row,
    departments: dict[str, str],
    language: str,
    flaw: str,
    pairs: dict[str, Any],
    split: str,
    rng: random.Random,
) -> str:
    """An answer with one flaw, often next to true sentences, so that its length does not give it away."""
    if flaw == "other_language":
        return good_answer(row, departments, "en" if language == "zh" else "zh")
    if flaw == "wrong_department":
        wrong = rng.choice(pairs["wrong_department"][row["department"]])
        # Only the emergency department is right for urgent conditions, so the urgent wording would be half right.
        urgent = row.get("urgent") and row["department"] != "急诊科"
        return good_answer(row | {"department": wrong, "urgent": urgent}, departments, language)

    known = answers(row, departments, language)
    true_sentences = [known[key] for key in ("management", "symptoms", "examinations") if key in known]
    true_sentences = [text for text in true_sentences if not SENDS_TO_EMERGENCY.search(text)]
    if flaw == "missing_emergency":
        # Booking an appointment is wrong advice if every minute counts.
        department = answers(row | {"urgent": False}, departments, language)["department"]
        return join_sentences([department, *true_sentences[: rng.choice((0, 0, 1))]], language)
    if flaw == "missing_department":
        # Not the management, which may name the department.
        before = rng.choice(([], [], [known["symptoms"]]))
        return join_sentences([*before, emergency_sentence(row, departments, language)], language)
    bad = rng.choice(pairs[flaw][split][language]).format(**slots(row, departments, language))
    return join_sentences([*true_sentences[: rng.choice((0, 1, 2))], bad], language)


def contains_all(answer: str, required: list[list[str]]) -> bool:
    """Whether the answer contains at least one string of each group."""
    return all(any(text in answer for text in group) for group in required)


def check_pairs(train: list[Row], validation: list[Row], finetune_questions: list[str]) -> None:
    """Exit if a prompt occurs twice, or an answer is not what its category says. Raises SystemExit."""
    prompts = [tuple(questions([row])) for row in train + validation]
    problems = [
        f"pair asked {count} times: {' / '.join(prompt)}" for prompt, count in Counter(prompts).items() if count > 1
    ]
    shared = sorted(set(questions(train + validation)) & set(finetune_questions))
    problems += [f"pair also asked in the fine-tuning rows: {question}" for question in shared]
    for row in train + validation:
        required, prompt = row["meta"]["required"], questions([row])[-1]
        if not contains_all(row["chosen"], required):
            problems.append(f"pair {prompt!r}: the chosen answer lacks one of {required}")
        if row["category"] in LACKS_WHAT_IS_REQUIRED and contains_all(row["rejected"], required):
            problems.append(f"pair {prompt!r}: the rejected answer has all of {required}")
    if problems:
        fail(problems)


def task_cases(conditions: list[Row], departments: dict[str, str], language: str, pairs: dict[str, Any]) -> list[Row]:
    """What `build_tasks` needs to know about each condition, except those of the emergency department."""
    cases = []
    for row in conditions:
        if row["department"] == "急诊科":
            continue
        wrong = pairs["wrong_department"][row["department"]]
        cases.append(
            slots(row, departments, language)
            | {
                "id": row["id"],
                "urgent": row.get("urgent", False),
                "sign": first_sign(row["emergency"], language),
                "symptoms": row["symptoms"][language],
                "wrong": wrong if language == "zh" else [departments[name] for name in wrong],
                "required": required_words(row, departments, language),
                "sentences": list(answers(row, departments, language).values()),
            }
        )
    return cases


def first_sign(signs: dict[str, str], language: str) -> str:
    """The first danger sign of a condition; whether commas separate signs follows from the other language."""
    many = "、" in signs["zh"] and ", " in signs["en"]
    between, last = ("、", "或") if language == "zh" else (", ", " or ")
    text = signs[language]
    return text.split(between)[0] if many or (language == "zh" and between in text) else text.rpartition(last)[0]


def check_tasks(tasks: dict[str, list[Row]], asked: list[str]) -> None:
    """Exit if a task is also asked in the fine-tuning rows or the pairs. Raises SystemExit."""
    rows = [row for side in tasks.values() for row in side]
    own = {row["question"] if "question" in row else questions([row])[0] for row in rows}
    if shared := sorted(own.intersection(asked)):
        fail([f"task also asked in fine-tuning rows or pairs: {question}" for question in shared])


def write_lines(path: Path, lines: list[str]) -> None:
    """Write lines in UTF-8 with "\\n" on every system, so that the bytes are the same everywhere."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
