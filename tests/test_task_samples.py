"""The tasks of GRPO: every answer is right, by a calculation or by the facts, and nothing held out is trained on."""

import ast
import json
import re
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

from medicalgpt.formats.tasks import to_task
from medicalgpt.readers.folders import find_files
from medicalgpt.rewards.rewards import SYSTEM_PROMPT

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data"
FACT_CATEGORIES = ("department", "department_of_two", "what_now", "triage")
FACT_CHOICES = ("department_choice", "condition_choice", "two_conditions", "emergency_choice")
CALLS = {"zh": ["120", "急诊"], "en": ["ambulance", "emergency department"]}
FLAWS = ("wrong_answer", "missing_format", "other_language", "repetition", "too_long", "missing_emergency")


def read(path):
    return [json.loads(line) for line in (DATA / path).read_text(encoding="utf-8").splitlines()]


def of(rows, *categories):
    return [row for row in rows if row["category"] in categories]


def options(row):
    return dict(re.findall(r"^([A-D])\. (.+)$", row["question"], re.MULTILINE))


def is_chinese(text):
    return any("\u4e00" <= character <= "\u9fff" for character in text)


def block(text, tag):
    return re.fullmatch(rf".*<{tag}>(.+)</{tag}>.*", text, re.DOTALL)[1]


def number(pattern, row):
    """The one number before this unit in the question, without what stands in brackets."""
    found = re.findall(rf"(-?\d+(?:\.\d+)?)\s*{pattern}", re.sub(r"[(（].*?[)）]", "", row["question"]))
    assert len(found) == 1, (pattern, row["question"])
    return Fraction(found[0])


@pytest.fixture(scope="module")
def train():
    return read("grpo/train.jsonl")


@pytest.fixture(scope="module")
def validation():
    return read("grpo/validation.jsonl")


@pytest.fixture(scope="module")
def everything(train, validation):
    return train + validation


@pytest.fixture(scope="module")
def labelled():
    return read("grpo_labelled/labelled.jsonl")


@pytest.fixture(scope="module")
def cold_start():
    return read("grpo_cold_start/train.jsonl")


@pytest.fixture(scope="module")
def facts():
    return yaml.safe_load((DATA / "facts.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def wrong_departments():
    return yaml.safe_load((DATA / "pairs.yaml").read_text(encoding="utf-8"))["wrong_department"]


@pytest.fixture(scope="module")
def mild():
    """The conditions whose symptoms can wait, as the generator lists them."""
    tree = ast.parse((DATA / "build_tasks.py").read_text(encoding="utf-8"))
    (listed,) = (n.value for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "MILD")
    return set(listed.args[0].func.value.value.split())


def condition(name, language, facts):
    """The condition of this name."""
    (row,) = (row for row in facts["conditions"] if row[language] == name)
    return row


def asked_about(row, facts):
    """The condition that the text of a question names; the longest where one name is part of another."""
    text = row["question"].split("\n")[0].casefold()
    named = [entry for entry in facts["conditions"] if entry[row["language"]].casefold() in text]
    assert named, row["question"]
    return max(named, key=lambda entry: len(entry[row["language"]]))


def department(entry, language, facts):
    return entry["department"] if language == "zh" else facts["departments"][entry["department"]]


def test_rows_have_the_fields_of_the_format(train, validation):
    assert (len(train), len(validation)) == (1000, 200)
    for rows in (train, validation):
        assert sum(row["language"] == "zh" for row in rows) == 0.6 * len(rows)
        kinds = Counter(row["type"] for row in rows)
        assert set(kinds) == {"choice", "number", "text"}
        assert all(count >= len(rows) / 5 for count in kinds.values()), kinds
        for row in rows:
            assert set(row) - {"meta"} == {"question", "answer", "type", "language", "category"}
            assert row["question"].strip() == row["question"] and row["answer"].strip() == row["answer"] != ""
            assert not re.search(r"[{}]|None", row["question"] + row["answer"])
            assert is_chinese(row["question"]) == (row["language"] == "zh")
            task = to_task(row)
            assert task["messages"] == [{"role": "user", "content": row["question"]}]
            assert task["columns"]["answer"] == row["answer"] and task["columns"]["type"] == row["type"]


def test_the_folder_of_training_holds_train_and_validation_only():
    assert [path.name for path in find_files(str(DATA / "grpo"))] == ["train.jsonl", "validation.jsonl"]


def test_a_question_occurs_once_in_all_sample_data(everything, cold_start):
    asked = [row["question"] for row in everything] + [row["conversations"][0]["value"] for row in cold_start]
    assert len(set(asked)) == len(asked)
    other = [row for path in ("finetune", "reward") for file in sorted((DATA / path).glob("*")) for row in read(file)]
    assert not set(asked) & {turn["value"] for row in other for turn in row["conversations"]}


def test_no_condition_of_a_held_out_question_is_trained_on(train, validation, cold_start, facts):
    def named(rows):
        text = "\n".join(row["question"].casefold() for row in rows)
        ids = set()
        for entry in facts["conditions"]:
            ids |= {entry["id"] for language in ("zh", "en") if entry[language].casefold() in text}
        return ids

    trained = train + [{"question": row["conversations"][0]["value"]} for row in cold_start]
    assert len(named(validation)) >= 25
    assert not named(validation) & named(trained)


def test_no_calculation_of_validation_is_trained_on(train, validation, cold_start):
    def numbers(row):
        return row["category"], tuple(sorted(re.findall(r"\d+(?:\.\d+)?", row["question"].split("\n")[0])))

    arithmetic = ("dose", "dose_volume", "bmi", "bmi_class", "drip_rate", "drop_rate", "unit_conversion")
    cold = [{"question": row["conversations"][0]["value"], "category": row["category"]} for row in cold_start]
    units = re.compile(r"mmol|mg|mcg|°C|°F|kg|lb|mL|L|g")
    trained = {(*numbers(row), *units.findall(row["question"])[:1]) for row in of(train + cold, *arithmetic)}
    held_out = {(*numbers(row), *units.findall(row["question"])[:1]) for row in of(validation, *arithmetic)}
    assert held_out and not trained & held_out


def test_wordings_of_validation_are_not_those_of_training(train, validation, facts):
    names = sorted((e[x] for e in facts["conditions"] for x in ("zh", "en")), key=len, reverse=True)
    names += [*facts["departments"], *facts["departments"].values()]
    pattern = re.compile("|".join(map(re.escape, names)), re.IGNORECASE)

    def wordings(rows):
        return {re.sub(r"\d+(\.\d+)?", "#", pattern.sub("*", row["question"].split("\n")[0])) for row in rows}

    assert not wordings(train) & wordings(validation)


# Arithmetic ----------------------------------------------------------------------------------------------------------


def result(row, unit):
    """The number of the answer, which must stand before this unit."""
    found = re.fullmatch(rf"(\d+(?:\.\d+)?){re.escape(' ' + unit) if unit else ''}", row["answer"])
    assert found, row["answer"]
    return Fraction(found[1])


def check_rounded(value, row, unit, places):
    """The answer is the nearest with so many decimals, and no other one is as near."""
    assert abs(result(row, unit) - value) < Fraction(1, 2 * 10**places), row
    digits = row["answer"].split()[0].partition(".")[2]
    assert len(digits) == places, row


def kilograms(row):
    return number(r"kg(?!\w)(?!/)", {"question": re.sub(r"[\d.]+ mg/kg", "", row["question"])})


def test_doses(everything):
    rows = of(everything, "dose")
    assert len(rows) >= 40
    for row in rows:
        assert result(row, "mg") == number("mg/kg", row) * kilograms(row), row


def test_dose_volumes(everything):
    rows = of(everything, "dose_volume")
    assert len(rows) >= 40
    for row in rows:
        volume = number("mg/kg", row) * kilograms(row) / number("mg/mL", row)
        assert result(row, "mL") == volume, row


def index(row):
    height, weight = (number(unit, {"question": row["question"].split("\n")[0]}) for unit in ("cm", "kg"))
    return weight / (height / 100) ** 2


def test_body_mass_indices(everything):
    rows = of(everything, "bmi")
    assert len(rows) >= 40
    for row in rows:
        # The height stands in brackets in one wording.
        check_rounded(index({"question": re.sub("[（）]", " ", row["question"])}), row, "", 1)


def test_classes_of_body_mass_index(everything):
    rows = of(everything, "bmi_class")
    assert len(rows) >= 40
    classes = {
        "zh": ((18.5, "偏瘦"), (24, "正常"), (28, "超重"), (1000, "肥胖")),
        "en": ((18.5, "underweight"), (25, "normal"), (30, "overweight"), (1000, "obese")),
    }
    for row in rows:
        limits = classes[row["language"]]
        right = next(name for limit, name in limits if index(row) < limit)
        assert options(row)[row["answer"]] == right, row
        assert set(options(row).values()) == {name for _, name in limits}
        for limit, _ in limits[:-1]:
            assert str(limit) in row["question"], "the question names the cut-offs"
        assert ("中国" if row["language"] == "zh" else "WHO") in row["question"]


def test_drip_rates(everything):
    rows = of(everything, "drip_rate")
    assert len(rows) >= 40
    for row in rows:
        assert result(row, "mL/h") == number("mL(?!/)", row) / number("(?:小时|hours)", row), row


def test_drop_rates(everything):
    rows = of(everything, "drop_rate")
    assert len(rows) >= 40
    for row in rows:
        drops = number("mL(?!/)", row) * number("(?:滴|drops)/mL", row)
        minutes = number("(?:小时|hours)", row) * 60
        check_rounded(drops / minutes, row, "滴/分" if row["language"] == "zh" else "drops/min", 0)


CONVERSIONS = {
    ("g", "mg"): lambda x: x * 1000,
    ("mg", "g"): lambda x: x / 1000,
    ("mg", "mcg"): lambda x: x * 1000,
    ("mcg", "mg"): lambda x: x / 1000,
    ("L", "mL"): lambda x: x * 1000,
    ("mmol/L", "mg/dL"): lambda x: x * 18,
    ("mg/dL", "mmol/L"): lambda x: x / 18,
    ("°C", "°F"): lambda x: x * Fraction("1.8") + 32,
    ("°F", "°C"): lambda x: (x - 32) / Fraction("1.8"),
    ("kg", "lb"): lambda x: x * Fraction("2.2"),
}
UNITS = sorted({unit for pair in CONVERSIONS for unit in pair}, key=len, reverse=True)


def test_unit_conversions(everything):
    rows = of(everything, "unit_conversion")
    assert len(rows) >= 80
    seen = Counter()
    for row in rows:
        text = re.sub(r"[(（].*?[)）]", "", row["question"])
        value, unit = re.search(rf"(\d+(?:\.\d+)?) ({'|'.join(UNITS)})", text).groups()
        to = row["answer"].split()[1]
        assert re.findall(rf"(?<!\w)(?:{'|'.join(UNITS)})(?!\w)", text) == [unit, to], row
        seen[unit, to] += 1
        converted = CONVERSIONS[unit, to](Fraction(value))
        if "一位小数" in text or "one decimal" in text:
            check_rounded(converted, row, to, 1)
        else:
            assert result(row, to) == converted, row
        if {unit, to} & {"mmol/L", "°C", "lb"}:
            assert re.search(r"18 mg/dL|1\.8 \+ 32|2\.2 lb", row["question"]), "the question names the factor"
    assert set(seen) == set(CONVERSIONS)


# Facts ---------------------------------------------------------------------------------------------------------------


def test_letters_are_balanced(train, validation):
    for rows in (train, validation):
        for category in ("department_choice", "condition_choice", "emergency_choice", "bmi_class"):
            for language in ("zh", "en"):
                letters = Counter(row["answer"] for row in of(rows, category) if row["language"] == language)
                assert len(letters) == 4 and len(set(letters.values())) == 1, (category, language, letters)
        pairs = Counter(row["answer"] for row in of(rows, "two_conditions"))
        assert set(pairs) == {"AB", "AC", "AD", "BC", "BD", "CD"} and len(set(pairs.values())) == 1


def test_four_different_options(everything):
    for row in everything:
        assert len(set(options(row).values())) == (4 if row["type"] == "choice" else 0), row


def test_one_department_is_right(everything, facts, wrong_departments):
    rows = of(everything, "department", "department_of_two", "department_choice")
    assert len(rows) >= 300
    for row in rows:
        entry = asked_about(row, facts)
        assert not entry.get("urgent"), "the emergency department would be right too"
        right = department(entry, row["language"], facts)
        wrong = wrong_departments[entry["department"]]
        wrong = wrong if row["language"] == "zh" else [facts["departments"][name] for name in wrong]
        if row["category"] == "department_choice":
            offered = options(row)
            assert offered.pop(row["answer"]) == right
            assert set(offered.values()) <= set(wrong), row
        else:
            assert row["answer"] == right
        if row["category"] == "department_of_two":
            assert right in row["question"] and any(name in row["question"] for name in wrong), row


def test_the_right_number_of_conditions_belongs_to_the_department(everything, facts, wrong_departments):
    for row in of(everything, "condition_choice", "two_conditions"):
        entries = {letter: condition(name, row["language"], facts) for letter, name in options(row).items()}
        right = {entries[letter]["department"] for letter in row["answer"]}
        assert len(row["answer"]) == (2 if row["category"] == "two_conditions" else 1) and len(right) == 1
        name = right.pop()
        asked = name if row["language"] == "zh" else facts["departments"][name]
        assert asked in row["question"].split("\n")[0]
        for letter, entry in entries.items():
            assert not entry.get("urgent")
            if letter not in row["answer"]:
                assert name in wrong_departments[entry["department"]], row


def test_only_conditions_with_harmless_symptoms_ask_what_can_wait(mild, facts):
    """The list is reviewed by hand; what no harmless symptom says is looked for here."""
    alarming = re.compile("胸|呼吸|喘|气短|气促|晕|昏|意识|抽|瘫|无力|血|剧烈腹|剧痛|呕|高热|发热|发绀|幻|自杀|骤|突")
    listed = [row for row in facts["conditions"] if row["id"] in mild]
    assert len(listed) == len(mild) >= 40
    allowed = {"握物无力", "刷牙出血", "面部毛细血管扩张"}
    for row in listed:
        assert not row.get("urgent")
        assert not [x for x in row["symptoms"]["zh"] if alarming.search(x) and x not in allowed], row["id"]


def test_danger_signs_and_harmless_symptoms(everything, facts, mild):
    for row in of(everything, "emergency_choice", "triage"):
        entry, language = asked_about(row, facts), row["language"]
        assert entry["id"] in mild
        harmless, danger = entry["symptoms"][language], entry["emergency"][language]
        if row["category"] == "emergency_choice":
            offered = options(row)
            assert danger.startswith(offered.pop(row["answer"]))
            assert set(offered.values()) <= set(harmless), row
            continue
        sent = row["answer"] in ("急诊", "emergency department")
        assert sent or row["answer"] in ("门诊", "outpatient clinic")
        assert row.get("meta") == ({"required": [CALLS[language]]} if sent else None)
        signs = re.split("、|或" if language == "zh" else ", | or ", danger)
        assert any(sign in row["question"] for sign in signs) == sent, row
        assert sent or any(sign in row["question"] for sign in harmless), row
    kinds = Counter((row["language"], row["answer"]) for row in of(everything, "triage"))
    assert kinds["zh", "急诊"] == kinds["zh", "门诊"]
    assert kinds["en", "emergency department"] == kinds["en", "outpatient clinic"]


def test_emergencies_name_a_sign_and_need_department_and_call(everything, facts):
    rows = of(everything, "what_now")
    assert len(rows) >= 120 and any(asked_about(row, facts).get("urgent") for row in rows)
    for row in rows:
        entry, language = asked_about(row, facts), row["language"]
        calls = CALLS[language][:1] if entry.get("urgent") else CALLS[language]
        assert row["meta"]["required"] == [[department(entry, language, facts)], calls]
        assert all(any(term in row["answer"] for term in group) for group in row["meta"]["required"])
        signs = re.split("、|或" if language == "zh" else ", | or ", entry["emergency"][language])
        assert any(sign in row["question"] for sign in signs), row


def test_only_emergencies_require_words(everything):
    for row in everything:
        emergency = row["category"] == "what_now" or row["answer"] in ("急诊", "emergency department")
        assert ("meta" in row) == emergency, row


# Replies -------------------------------------------------------------------------------------------------------------


def test_labelled_replies_have_the_flaw_that_they_name(labelled, train):
    assert Counter(row["flaw"] for row in labelled) == dict.fromkeys(FLAWS, 10)
    assert sum(row["language"] == "zh" for row in labelled) == 36
    trained = {row["question"] for row in train}
    for row in labelled:
        good, bad, flaw = row["good"], row["bad"], row["flaw"]
        assert row["question"] in trained and good != bad
        assert re.fullmatch(r"<think>[^<]+</think>\n<answer>[^<]+</answer>", good)
        assert block(good, "answer") == row["answer"]
        assert is_chinese(block(good, "think")) == (row["language"] == "zh")
        if flaw == "missing_format":
            assert "<" not in bad and row["answer"] in bad
            continue
        assert re.fullmatch(r"<think>[^<]+</think>\n<answer>[^<]+</answer>", bad), row
        assert (is_chinese(block(bad, "think")) == (row["language"] == "zh")) == (flaw != "other_language")
        if flaw in ("repetition", "too_long"):
            assert block(bad, "answer") == row["answer"]
        sentences = re.findall(r"[^。]+。|[^.]+\. ", block(bad, "think"))
        assert (Counter(sentences).most_common(1)[0][1] >= 10 if sentences else False) == (flaw == "repetition"), row
        assert (len(bad) > 2000) == (flaw == "too_long")
        if flaw == "wrong_answer":
            assert block(bad, "answer") != row["answer"]
        if flaw == "missing_emergency":
            assert row["category"] == "what_now"
            assert not any(term in block(bad, "answer") for term in CALLS[row["language"]])


def test_the_cold_start_shows_the_format_that_grpo_asks_for(cold_start):
    assert 300 <= len(cold_start) <= 500
    for row in cold_start:
        assert row["system"] == SYSTEM_PROMPT
        (asked, said) = row["conversations"]
        assert (asked["from"], said["from"]) == ("human", "gpt")
        assert re.fullmatch(r"<think>[^<]+</think>\n<answer>[^<]+</answer>", said["value"])
        assert is_chinese(said["value"]) == is_chinese(asked["value"])


def test_the_generator_writes_the_same_bytes_again(tmp_path):
    command = [sys.executable, str(DATA / "build_samples.py"), "--output_dir", str(tmp_path), "--name", "小医"]
    subprocess.run([*command, "--author", "我"], check=True, capture_output=True)
    for path in (
        "grpo/train.jsonl",
        "grpo/validation.jsonl",
        "grpo_labelled/labelled.jsonl",
        "grpo_cold_start/train.jsonl",
    ):
        assert (tmp_path / path).read_bytes() == (DATA / path).read_bytes(), f"run python data/build_samples.py: {path}"


@pytest.mark.parametrize("readme", ["README.md", "README_zh.md"])
def test_the_readme_gives_the_true_counts(readme, train, validation, labelled, cold_start):
    text = (DATA / readme).read_text(encoding="utf-8")
    for path, rows in (
        ("grpo/train.jsonl", train),
        ("grpo/validation.jsonl", validation),
        ("grpo_labelled/labelled.jsonl", labelled),
        ("grpo_cold_start/train.jsonl", cold_start),
    ):
        (line,) = (line for line in text.splitlines() if line.startswith(f"| `{path}`"))
        assert f" {len(rows):,} " in line
    for category, count in Counter(row["category"] for row in train + validation).items():
        (line,) = (line for line in text.splitlines() if line.startswith(f"| `{category}` |"))
        held_out = len(of(validation, category))
        assert f" {count - held_out} + {held_out} " in line, category
