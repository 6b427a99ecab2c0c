"""The preference samples: every pair is what its category says, and nothing held out is trained on."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

from medicalgpt.formats.conversion import to_preference

import pytest
import yaml

DATA = Path(__file__).resolve().parent.parent / "data"
SOURCES = ("build_samples.py", "build_tasks.py", "facts.yaml", "talk.yaml", "everyday.yaml", "pairs.yaml")
RENDERED = ("missing_emergency", "wrong_department", "invented_certainty", "rude", "other_language")


def read(path):
    return [json.loads(line) for line in (DATA / path).read_text(encoding="utf-8").splitlines()]


def prompts(rows):
    return [tuple(turn["value"] for turn in row["conversations"]) for row in rows]


def holds(answer, required):
    return all(any(text in answer for text in group) for group in required)


def is_chinese(text):
    return any("\u4e00" <= character <= "\u9fff" for character in text)


@pytest.fixture(scope="module")
def train():
    return read("reward/train.jsonl")


@pytest.fixture(scope="module")
def short():
    """Pairs whose question is a fine-tuning question, which asks for one thing."""
    return read("reward/train_short.jsonl")


@pytest.fixture(scope="module")
def validation():
    return read("reward/validation.jsonl")


@pytest.fixture(scope="module")
def facts():
    return yaml.safe_load((DATA / "facts.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pairs():
    return yaml.safe_load((DATA / "pairs.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def asked_about(facts, pairs):
    """{split: {every prompt that its wordings can give: (condition, language)}}"""
    prompts_of = {"train": {}, "held_out": {}}
    for split, pools in pairs["questions"].items():
        for language, pool in pools.items():
            for condition in facts["conditions"]:
                name = condition[language]
                for wording in pool:
                    for verb in ("得了", "发生"):
                        prompt = wording.format(c=name, C=name[0].upper() + name[1:], get=verb)
                        prompts_of[split][prompt] = (condition, language)
    return prompts_of


def test_there_are_enough_pairs_of_every_kind_in_both_languages(train, validation):
    assert len(train) >= 1000
    assert len(validation) >= 230
    for rows in (train, validation):
        counts = Counter(row["category"] for row in rows)
        assert set(counts) == {*RENDERED, "missing_department", "unsafe_advice"}
        assert counts["missing_department"] >= 0.1 * len(rows)
        assert all(counts[category] >= 0.12 * len(rows) for category in RENDERED), counts
        for category in RENDERED:
            assert {row["language"] for row in rows if row["category"] == category} == {"zh", "en"}


def test_every_row_can_be_read_as_a_preference(train, validation):
    ignored = frozenset({"category", "language", "meta"})
    for row in train + validation:
        pair = to_preference(row, ignored)
        assert pair["messages"][-1] == {"role": "user", "content": row["conversations"][-1]["value"]}
        assert (pair["chosen"]["content"], pair["rejected"]["content"]) == (row["chosen"], row["rejected"])


def test_no_prompt_occurs_twice_or_in_the_fine_tuning_rows(train, validation):
    asked = prompts(train) + prompts(validation)
    assert not [prompt for prompt, count in Counter(asked).items() if count > 1]
    tuned = read("finetune/train.jsonl") + read("finetune/validation.jsonl")
    tuned = {turn["value"] for row in tuned for turn in row["conversations"]}
    assert not [prompt for prompt in asked if set(prompt[::2]) & tuned]


def test_the_held_out_side_asks_in_other_words_about_the_same_conditions(asked_about, pairs, facts, train, validation):
    assert not set(asked_about["train"]) & set(asked_about["held_out"])
    everywhere = {(row["id"], language) for row in facts["conditions"] for language in ("zh", "en")}
    for split, rows in (("train", train), ("held_out", validation)):
        conditions = [asked_about[split].get(prompt[0]) for prompt in prompts(rows)]
        written = sum(bool(entry.get("held_out")) == (split == "held_out") for entry in pairs["written"])
        assert conditions.count(None) == written, "every other prompt is a wording of its own side"
        covered = {(condition["id"], language) for condition, language in filter(None, conditions)}
        assert covered == everywhere if split == "train" else covered >= {x for x in everywhere if x[1] == "zh"}
    for flaw in ("invented_certainty", "rude"):
        for language in ("zh", "en"):
            assert len(pairs[flaw]["train"][language]) >= 8
            assert not set(pairs[flaw]["train"][language]) & set(pairs[flaw]["held_out"][language])


def test_good_answers_hold_what_is_required_and_bad_ones_lack_it(train, validation):
    for row in train + validation:
        required = row["meta"]["required"]
        assert required and all(group and all(group) for group in required)
        assert holds(row["chosen"], required), row
        if row["category"] in ("missing_emergency", "missing_department", "wrong_department"):
            assert not holds(row["rejected"], required), row
        # The first group is the department, the last one the call for help.
        if row["category"] == "missing_department":
            assert not holds(row["rejected"], required[:1]) and holds(row["rejected"], required[1:]), row


def test_a_rendered_pair_requires_the_department_and_the_call_for_help(asked_about, facts, train, validation):
    for split, rows in (("train", train), ("held_out", validation)):
        for row in rows:
            condition, language = asked_about[split].get(row["conversations"][0]["value"], (None, None))
            if condition is None:
                continue
            department, call = row["meta"]["required"]
            name = condition["department"] if language == "zh" else facts["departments"][condition["department"]]
            assert department == [name] or (department == ["is an emergency"] and name == "emergency medicine")
            ambulance, emergency_department = (
                ("120", "急诊") if language == "zh" else ("ambulance", "emergency department")
            )
            assert call == ([ambulance] if condition.get("urgent") else [ambulance, emergency_department])


def test_each_flaw_is_what_it_is_called(train, validation, pairs):
    for row in train + validation:
        chosen, rejected = row["chosen"], row["rejected"]
        assert chosen.strip() != rejected.strip()
        if row["category"] == "other_language":
            assert is_chinese(chosen) != is_chinese(rejected), row
        else:
            assert is_chinese(chosen) == is_chinese(rejected) == (row["language"] == "zh"), row
    written = {entry["rejected"] for entry in pairs["written"]}
    for row in train:
        if row["category"] in ("invented_certainty", "rude") and row["rejected"] not in written:
            parts = [
                text.replace("{C}", "{c}").split("{c}") for text in pairs[row["category"]]["train"][row["language"]]
            ]
            assert any(all(part in row["rejected"] for part in around) for around in parts), row


def test_length_alone_does_not_tell_good_from_bad(train, validation):
    for rows in (train, validation):
        same_script = [row for row in rows if row["category"] != "other_language"]
        longer = sum(len(row["chosen"]) > len(row["rejected"]) for row in same_script) / len(same_script)
        assert 0.3 < longer < 0.75


def test_hand_written_pairs_are_used_once_on_their_own_side(pairs, train, validation):
    written = pairs["written"]
    assert sum(not entry.get("held_out") for entry in written) >= 60
    assert sum(bool(entry.get("held_out")) for entry in written) >= 12
    for entry in written:
        prompt = tuple(entry.get("turns") or [entry["question"]])
        sides = (
            (prompts(validation), prompts(train)) if entry.get("held_out") else (prompts(train), prompts(validation))
        )
        assert (sides[0].count(prompt), sides[1].count(prompt)) == (1, 0), prompt
        assert set(entry) <= {"question", "turns", "chosen", "rejected", "category", "required", "held_out"}


def test_short_questions_have_their_fine_tuning_answer_as_the_good_one(short, train, validation):
    tuned = {
        row["conversations"][0]["value"]: row["conversations"][1]["value"]
        for row in read("finetune/train.jsonl")
        if len(row["conversations"]) == 2
    }
    assert 0.35 < len(short) / (len(short) + len(train)) < 0.5
    assert {row["language"] for row in short} == {"zh", "en"}
    for row in short:
        assert row["chosen"] == tuned[row["conversations"][0]["value"]]
        assert row["meta"] == {"required": []}
        to_preference(row, frozenset({"category", "language", "meta"}))
    assert {row["category"] for row in short} == {"not_asked"}
    more = [row for row in short if row["rejected"].startswith(row["chosen"])]
    assert 0.5 * len(short) < len(more) < 0.8 * len(short), "the others answer something else"
    asked = prompts(short)
    assert len(set(asked)) == len(asked)
    held_out = {turn["value"] for row in read("finetune/validation.jsonl") for turn in row["conversations"]}
    assert not set(asked) & set(prompts(train) + prompts(validation))
    assert not {prompt[0] for prompt in asked} & held_out


def test_another_name_changes_no_pair_but_those_that_name_it(tmp_path):
    command = [sys.executable, str(DATA / "build_samples.py"), "--output_dir", str(tmp_path), "--name", "小医"]
    subprocess.run([*command, "--author", "我"], check=True, capture_output=True)
    for name in ("reward/train.jsonl", "reward/train_short.jsonl", "reward/validation.jsonl"):
        ours, copy = ((folder / name).read_text(encoding="utf-8").splitlines() for folder in (DATA, tmp_path))
        for one, other in zip(ours, copy, strict=True):
            assert "MedicalGPT" not in other
            assert one == other or "MedicalGPT" in one


def shares_a_prompt(pairs):
    pairs["questions"]["held_out"]["zh"] = pairs["questions"]["train"]["zh"]


def asks_as_in_fine_tuning(pairs):
    pairs["written"][0]["question"] = "阿莫西林我该吃几片"


def forgets_the_ambulance(pairs):
    entry = next(entry for entry in pairs["written"] if ["120"] in entry["required"])
    entry["chosen"] = entry["chosen"].replace("120", "电话")


def gives_the_right_department_as_wrong(pairs):
    entry = next(entry for entry in pairs["written"] if entry["category"] == "wrong_department")
    entry["rejected"] = entry["chosen"]


def has_an_unknown_department(pairs):
    pairs["wrong_department"]["眼科"] = ["占星科"]


def has_too_few_questions(pairs):
    del pairs["questions"]["train"]["zh"][4:]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shares_a_prompt, "pair asked 2 times"),
        (asks_as_in_fine_tuning, "also asked in the fine-tuning rows: 阿莫西林我该吃几片"),
        (forgets_the_ambulance, "the chosen answer lacks"),
        (gives_the_right_department_as_wrong, "the rejected answer has all of"),
        (has_an_unknown_department, "wrong_department of 眼科: ['占星科']"),
        (has_too_few_questions, "4 training questions in zh; 5 are needed"),
    ],
)
def test_the_generator_stops_at_pairs_that_are_not_what_they_say(spoil, message, pairs, tmp_path):
    """A copy of the generator beside spoilt pairs."""
    for name in SOURCES:
        (tmp_path / name).write_bytes((DATA / name).read_bytes())
    spoilt = json.loads(json.dumps(pairs))
    spoil(spoilt)
    (tmp_path / "pairs.yaml").write_text(yaml.safe_dump(spoilt, allow_unicode=True), encoding="utf-8")
    done = subprocess.run([sys.executable, str(tmp_path / "build_samples.py")], capture_output=True, encoding="utf-8")
    assert done.returncode == 1
    assert message in done.stderr
    assert not (tmp_path / "reward").exists()
