"""The sample data: rendered files are current, complete, named as asked, and hold nothing out that they train on."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data"
RENDERED = (
    "pretrain/train_zh.txt",
    "pretrain/train_en.txt",
    "pretrain/validation.txt",
    "finetune/train.jsonl",
    "finetune/validation.jsonl",
    "everyday/questions.jsonl",
    "reward/train.jsonl",
    "reward/train_short.jsonl",
    "reward/validation.jsonl",
    "grpo/train.jsonl",
    "grpo/validation.jsonl",
    "grpo_labelled/labelled.jsonl",
    "grpo_cold_start/train.jsonl",
)


def render(*arguments):
    command = [sys.executable, str(DATA / "build_samples.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def said_by(speaker, data):
    return [turn["value"] for row in data for turn in row["conversations"] if turn["from"] == speaker]


@pytest.fixture(scope="module")
def facts():
    return yaml.safe_load((DATA / "facts.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def talk():
    return yaml.safe_load((DATA / "talk.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def everyday():
    return yaml.safe_load((DATA / "everyday.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def typed():
    """Held-out questions as people type them."""
    return rows(DATA / "everyday" / "questions.jsonl")


@pytest.fixture(scope="module")
def train():
    return rows(DATA / "finetune" / "train.jsonl")


@pytest.fixture(scope="module")
def validation():
    return rows(DATA / "finetune" / "validation.jsonl")


@pytest.fixture(scope="module")
def renamed(tmp_path_factory):
    target = tmp_path_factory.mktemp("renamed")
    before = {path: (DATA / path).stat().st_mtime_ns for path in RENDERED}
    done = render("--output_dir", target, "--name", "小医", "--author", "张三")
    assert done.returncode == 0, done.stderr
    assert before == {path: (DATA / path).stat().st_mtime_ns for path in RENDERED}
    return target


def test_rows_of_the_user_are_not_overwritten(tmp_path):
    """Nothing is written either, so that no folder is half old, half new."""
    (tmp_path / "reward").mkdir()
    (tmp_path / "reward" / "train.jsonl").write_text("mine")
    done = render("--output_dir", tmp_path)
    assert done.returncode == 1 and "train.jsonl exists; choose another --output_dir" in done.stderr
    assert [path.read_text() for path in tmp_path.rglob("*.*")] == ["mine"]


def test_the_committed_files_are_what_the_generator_writes(tmp_path):
    done = render("--output_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    for path in RENDERED:
        assert (tmp_path / path).read_bytes() == (DATA / path).read_bytes(), f"run python data/build_samples.py: {path}"
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")} == set(RENDERED)


def test_facts_are_many_unique_and_complete(facts):
    conditions = facts["conditions"]
    assert len(conditions) >= 160
    for key in ("id", "zh", "en"):
        assert len({row[key] for row in conditions}) == len(conditions)
    names = [row["zh"] for row in conditions]
    assert not [(a, b) for a in names for b in names if a != b and a in b], "one name inside another is ambiguous"
    assert {row["department"] for row in conditions} == set(facts["departments"])
    for row in conditions:
        for field in ("symptoms", "examinations"):
            assert 2 <= len(row[field]["zh"]) == len(row[field]["en"]) <= 4, row["id"]
            assert all(row[field]["zh"]) and all(row[field]["en"]), row["id"]
        for field in ("management", "emergency"):
            assert row[field]["zh"].strip() and row[field]["en"].strip(), row["id"]
        assert row.get("urgent", False) in (True, False)
        assert row["department"] != "急诊科" or row["urgent"], row["id"]


def test_every_training_document_states_every_fact(facts, everyday):
    zh = (DATA / "pretrain/train_zh.txt").read_text(encoding="utf-8").splitlines()
    en = (DATA / "pretrain/train_en.txt").read_text(encoding="utf-8").splitlines()
    assert len(zh) == len(en) == 2 * len(facts["conditions"]) + 2 * len(everyday["complaints"])
    for row in facts["conditions"]:
        department = {"zh": row["department"], "en": facts["departments"][row["department"]]}
        for language, lines in (("zh", zh), ("en", en)):
            stated = [row[language], department[language], row["management"][language], row["emergency"][language]]
            stated += row["symptoms"][language] + row["examinations"][language]
            whole = [line for line in lines if all(part.lower() in line.lower() for part in stated)]
            assert len(whole) == 2, (row["id"], language)


def test_held_out_documents_are_new_sentences_in_known_characters():
    held_out = (DATA / "pretrain/validation.txt").read_text(encoding="utf-8")
    trained = "".join((DATA / path).read_text(encoding="utf-8") for path in RENDERED[:2])
    assert 100 <= len(held_out.splitlines()) <= 140
    sentences = [part for line in held_out.splitlines() for part in line.replace("。", "。\n").split("\n") if part]
    assert not [sentence for sentence in sentences if sentence in trained]
    assert not set(held_out) - set(trained), "a byte never trained would weigh more in the perplexity than any fact"


def test_no_validation_question_is_trained(train, validation):
    assert not set(said_by("human", train)) & set(said_by("human", validation))


def test_every_condition_is_asked_about_in_every_way(facts, train, validation):
    expected = dict.fromkeys(("department", "symptoms", "examinations", "management", "emergency"), 5)
    single = [row for row in train if row["category"] in expected]
    for row in facts["conditions"]:
        asked = Counter(x["category"] for x in single if row["zh"] in x["conversations"][0]["value"])
        assert asked == expected, row["id"]
        answers = {(x["category"], x["conversations"][1]["value"]) for x in single if row["zh"] in str(x)}
        assert len(answers) == len(expected), f"{row['id']} has more than one answer to the same question"
        held_out = Counter(x["category"] for x in validation if row["zh"] in x["conversations"][0]["value"])
        assert held_out == dict.fromkeys(expected, 1), row["id"]


def test_validation_answers_are_answers_of_training(train, validation):
    known = set(said_by("gpt", train))
    assert not [answer for answer in said_by("gpt", validation) if answer not in known]


def test_everyday_questions_are_as_many_as_promised(typed):
    counts = Counter("untaught" if "meta" in row else row["category"] for row in typed)
    assert counts == {"everyday": 100, "untaught": 40}
    assert {row["category"] for row in typed if "meta" in row} == {"untaught", "dose"}


def test_a_held_out_everyday_question_has_a_wording_that_no_row_has(everyday, train, typed):
    assert not set(said_by("human", train)) & set(said_by("human", typed))
    for language in ("zh", "en"):
        for kind, trained in everyday["wordings"]["train"][language].items():
            assert not set(trained) & set(everyday["wordings"]["held_out"][language][kind])


def test_an_everyday_question_has_the_answer_of_the_formal_name(facts, everyday, train, typed):
    by_question = {row["conversations"][0]["value"]: row["conversations"][1]["value"] for row in train}
    assert by_question["感冒了怎么办？"].startswith("普通感冒的处理方法：")
    known = set(said_by("gpt", train))
    assert not [answer for answer in said_by("gpt", typed) if answer not in known]
    for row in facts["conditions"]:
        for name in everyday["names"].get(row["id"], {}).get("zh", []):
            assert row["zh"] in by_question[f"{name}了怎么办？"], name


def test_what_is_not_taught_is_in_no_other_row(everyday, train, typed):
    """A held-out name that the model has read somewhere would not be unknown to it."""
    held_out = everyday["untaught"]["names"]["held_out"]
    text = "".join((DATA / path).read_text(encoding="utf-8") for path in RENDERED[:2])
    text += "\n".join(said_by("human", train) + said_by("gpt", train))
    assert not [name for names in held_out.values() for name in names if name in text]
    declined = {row["conversations"][1]["value"] for row in [*train, *typed] if row["category"] in ("untaught", "dose")}
    assert len(declined) == 4 and not [text for text in declined if any(char.isdigit() for char in text)]


def test_every_complaint_says_when_to_see_a_doctor(everyday):
    for entry in everyday["complaints"]:
        assert set(entry) == {"zh", "en", "answer"}
        harmless = entry["zh"][0] in ("晕车",)
        for language, words in (
            ("zh", ("挂", "医", "科", "急诊", "120")),
            ("en", ("see", "ambulance", "emergency", "doctor")),
        ):
            said = entry["answer"][language].lower()
            assert harmless or any(word in said for word in words), entry["zh"]


def test_problems_in_the_everyday_words_are_named_all_at_once(everyday, tmp_path):
    broken = json.loads(json.dumps(everyday))
    broken["names"]["no_such_condition"] = {"zh": ["什么病"]}
    broken["untaught"]["names"]["train"]["zh"].append("感冒")
    broken["wordings"]["held_out"]["zh"]["management"].append("{n}怎么办")
    (tmp_path / "everyday.yaml").write_text(yaml.safe_dump(broken, allow_unicode=True), encoding="utf-8")
    for name in ("build_samples.py", "build_tasks.py", "talk.yaml", "facts.yaml", "pairs.yaml"):
        (tmp_path / name).write_bytes((DATA / name).read_bytes())
    done = subprocess.run([sys.executable, str(tmp_path / "build_samples.py")], capture_output=True, encoding="utf-8")
    assert done.returncode == 1 and not (tmp_path / "finetune").exists()
    for part in (
        "no_such_condition: no such condition",
        "感冒 is named 2 times",
        "both trained and held out: ['{n}怎么办']",
    ):
        assert part in done.stderr


def test_urgent_conditions_are_sent_to_the_emergency_department(facts, train):
    single = [x["conversations"] for x in train if x["category"] == "department"]
    urgent = [row for row in facts["conditions"] if row.get("urgent")]
    assert len(urgent) >= 20
    for row in urgent:
        replies = {answer["value"] for question, answer in single if row["zh"] in question["value"]}
        assert len(replies) == 1 and "急诊" in replies.pop(), row["id"]


def test_category_counts(train, validation):
    assert 14_000 <= len(train) <= 16_000
    assert 900 <= len(validation) <= 1100
    counts = Counter(row["category"] for row in train)
    expected = "department symptoms examinations management emergency consultation identity talk refusal emergency_talk"
    assert set(counts) == {*expected.split(), "everyday", "untaught", "dose"}
    consultations = [row["conversations"] for row in train if row["category"] == "consultation"]
    assert all(len(turns) in (4, 6) for turns in consultations)
    chinese = [turns for turns in consultations if not turns[0]["value"].isascii() and "。" in turns[1]["value"]]
    assert len(chinese) >= 200
    assert len(consultations) - len(chinese) >= 60


def test_speakers_take_turns(train, validation):
    for row in train + validation:
        speakers = [turn["from"] for turn in row["conversations"]]
        assert speakers == ["human", "gpt"] * (len(speakers) // 2)
        assert all(turn["value"] == turn["value"].strip() != "" for turn in row["conversations"])


def test_hand_written_rows_are_all_used_once(talk, train):
    written = [entry for section in ("talk", "refusals", "emergency") for entry in talk[section]]
    questions = sum(len(entry["train"]) + len(entry["held_out"]) for entry in talk["identity"])
    assert len(written) + questions >= 150
    trained = Counter(turns[0]["value"] for turns in (row["conversations"] for row in train))
    for entry in written:
        assert trained[entry.get("question") or entry["turns"][0]] == 1, entry


@pytest.mark.parametrize("path", RENDERED)
def test_no_placeholder_is_left(path, renamed):
    for folder in (DATA, renamed):
        text = (folder / path).read_text(encoding="utf-8")
        for placeholder in ("{name}", "{author}", "{c}", "{C}", "{get}", "{d}", "{s}", "{x}", "{m}", "{e}"):
            assert placeholder not in text


def test_name_and_author_are_filled_in(train, renamed):
    answers = {row["conversations"][1]["value"] for row in train if row["category"] == "identity"}
    assert "我是MedicalGPT，由MedicalGPT 团队训练的医疗助手。" in answers
    assert "I am MedicalGPT, and I was trained by the MedicalGPT team." in answers

    other = rows(renamed / "finetune/train.jsonl")
    text = (renamed / "finetune/train.jsonl").read_text(encoding="utf-8")
    assert "MedicalGPT" not in text
    answers = {row["conversations"][1]["value"] for row in other if row["category"] == "identity"}
    assert "我是小医，由张三训练的医疗助手。" in answers
    assert "I am 小医, and I was trained by 张三." in answers
    changed = [a for a, b in zip(train, other, strict=True) if a != b]
    assert {row["category"] for row in changed} == {"identity"}


@pytest.mark.parametrize("arguments", [("--name", "小医"), ("--author", "张三"), ("--name", "a\nb"), ("--name", " ")])
def test_a_bad_name_or_a_renamed_copy_over_the_samples_is_refused(arguments):
    before = {path: (DATA / path).read_bytes() for path in RENDERED}
    done = render(*arguments)
    assert done.returncode == 2
    assert arguments[0] in done.stderr
    assert before == {path: (DATA / path).read_bytes() for path in RENDERED}


def test_problems_in_the_facts_are_named_all_at_once(facts, tmp_path):
    """A copy of the generator beside broken facts."""
    broken = json.loads(json.dumps(facts))
    broken["conditions"][1]["zh"] = broken["conditions"][0]["zh"]
    broken["conditions"][2]["department"] = "占星科"
    del broken["conditions"][3]["emergency"]
    (tmp_path / "facts.yaml").write_text(yaml.safe_dump(broken, allow_unicode=True), encoding="utf-8")
    for name in ("build_samples.py", "build_tasks.py", "talk.yaml", "everyday.yaml", "pairs.yaml"):
        (tmp_path / name).write_bytes((DATA / name).read_bytes())
    done = subprocess.run(
        [sys.executable, str(tmp_path / "build_samples.py")], capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 1
    assert "condition 2" in done.stderr and "is taken by condition 1" in done.stderr
    assert "condition 3" in done.stderr and "占星科" in done.stderr
    assert "condition 4" in done.stderr and "emergency" in done.stderr
    assert not (tmp_path / "finetune").exists()


def test_the_data_folder_is_small():
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) < 8_000_000


@pytest.mark.parametrize("readme", ["README.md", "README_zh.md"])
def test_the_readme_gives_the_true_sizes(readme, facts, train, validation):
    text = (DATA / readme).read_text(encoding="utf-8")
    documents = sum(len((DATA / path).read_text(encoding="utf-8").splitlines()) for path in RENDERED[:2])
    pairs = [len(rows(DATA / path)) for path in RENDERED if path.startswith("reward/")]
    for count in (len(train), len(validation), len(facts["conditions"]), len(facts["departments"]), documents, *pairs):
        assert f"{count:,} " in text
    for name in ("facts.yaml", "talk.yaml", "pairs.yaml", "build_samples.py", "train_zh.txt", "validation.jsonl"):
        assert f"{name}`" in text and list(DATA.rglob(name))
