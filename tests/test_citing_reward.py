"""The reward `citations`: what games it must score below the right answer, and the rows that it is trained on."""

import re

import chatpdf
from medicalgpt.errors import UserError
from medicalgpt.formats.citations import UNKNOWN
from medicalgpt.formats.conversion import to_messages
from medicalgpt.formats.tasks import to_task
from medicalgpt.rag.tasks import Question, is_held_out, write_reply
from medicalgpt.rewards.citing import score_citations
from medicalgpt.rewards.coverage import check_coverage
from medicalgpt.rewards.rewards import choose_rewards
from tests.helpers import read_json, run_here, write_jsonl

import pytest

TAG = "k7q3"
PASSAGES = [
    "The warfarin dose is 5 mg daily. Do not take aspirin with warfarin.",
    "胰岛素开封后在室温下可放 28 天。未开封的胰岛素放在冰箱冷藏室。",
    "Stitches of the face come out after 3 to 5 days.",
]
TASKS = {
    "en": {"tag": TAG, "passages": PASSAGES, "supporting": [1]},
    "zh": {"tag": TAG, "passages": PASSAGES, "supporting": [2]},
    "none": {"tag": TAG, "passages": PASSAGES, "supporting": []},
}
RIGHT = {
    "en": "The warfarin dose is 5 mg daily [k7q3-1]. Do not take aspirin with warfarin [k7q3-1].",
    "zh": "胰岛素开封后在室温下可放28天[k7q3-2]。",
    "none": UNKNOWN["en"],
}
EVERYTHING = "[k7q3-1][k7q3-2][k7q3-3]"
# What a model could write for every question, or instead of the right answer.
GAMES = {
    "cite everything": {
        "en": f"The warfarin dose is 5 mg daily {EVERYTHING}. Do not take aspirin with warfarin {EVERYTHING}.",
        "zh": f"胰岛素开封后在室温下可放28天{EVERYTHING}。",
        "none": f"The warfarin dose is 5 mg daily {EVERYTHING}.",
    },
    "cite nothing": {
        "en": "The warfarin dose is 5 mg daily. Do not take aspirin with warfarin.",
        "zh": "胰岛素开封后在室温下可放28天。",
        "none": "The warfarin dose is 5 mg daily.",
    },
    "always refuse": {"en": UNKNOWN["en"], "zh": UNKNOWN["zh"]},
    "always answer": {"none": RIGHT["en"]},
    "answer and refuse": {
        "en": f"{RIGHT['en']} {UNKNOWN['en']}",
        "zh": f"{RIGHT['zh']}{UNKNOWN['zh']}",
        "none": f"{UNKNOWN['en']} {RIGHT['en']}",
    },
    "refuse with a citation": {"none": f"{UNKNOWN['en']} [k7q3-1]"},
    "marks alone": {"en": EVERYTHING, "zh": EVERYTHING, "none": EVERYTHING},
    "numbers for marks": {
        "en": "The warfarin dose is 5 mg daily [1].",
        "zh": "胰岛素开封后可放28天[2]。",
        "none": "[1]",
    },
    "another passage": {"en": f"{PASSAGES[2]} [k7q3-3]", "zh": f"{PASSAGES[2]} [k7q3-3]"},
    "a wrong dose": {"en": "The warfarin dose is 50 mg daily [k7q3-1].", "zh": "胰岛素开封后在室温下可放8天[k7q3-2]。"},
    "a lost negation": {"en": "Take aspirin with warfarin [k7q3-1]."},
    "one sentence without": {"en": "The warfarin dose is 5 mg daily [k7q3-1]. Eat more vegetables and walk a lot."},
    "every passage": {
        task: "The warfarin dose is 5 mg daily. [k7q3-1] 胰岛素开封后在室温下可放28天。[k7q3-2] "
        "Stitches of the face come out after 3 to 5 days. [k7q3-3]"
        for task in TASKS
    },
    "one mark for a passage": {"en": f"{PASSAGES[0]} [k7q3-1]", "zh": f"{PASSAGES[1]}[k7q3-2]"},
    "a name": {"en": "Warfarin [k7q3-1].", "zh": "胰岛素[k7q3-2]。"},
    "a number": {"en": "5 [k7q3-1]", "zh": "28[k7q3-2]"},
    "the same again": {"en": "The warfarin dose is 5 mg daily [k7q3-1]. " * 3, "zh": RIGHT["zh"] * 3},
    "an invented mark": {"en": "The warfarin dose is 5 mg daily [k7q3-1][k7q3-9]."},
    "empty": {"en": "", "zh": "", "none": ""},
}


@pytest.mark.parametrize("task", TASKS)
def test_the_right_answer_gets_it_all(task):
    assert score_citations(RIGHT[task], TASKS[task]) == 1
    assert score_citations(f"<think>[k7q3-3] [9]</think>{RIGHT[task]}", TASKS[task]) == 1


@pytest.mark.parametrize(("game", "task"), [(game, task) for game, replies in GAMES.items() for task in replies])
def test_games_score_below_it(game, task):
    score = score_citations(GAMES[game][task], TASKS[task])
    partly_right = ("one sentence without", "an invented mark", "every passage", "one mark for a passage")
    assert score <= (0.8 if game in partly_right else 0.5)


def test_precision_and_recall_by_hand():
    # One of two citations holds, for one of two sentences.
    text = "The warfarin dose is 5 mg daily [k7q3-1]. Stitches dissolve [k7q3-2]."
    assert score_citations(text, TASKS["en"]) == pytest.approx(0.5)
    text = "The warfarin dose is 5 mg daily [k7q3-1][k7q3-3]."
    assert score_citations(text, TASKS["en"]) == pytest.approx(2 / 3)
    assert score_citations(GAMES["another passage"]["en"], TASKS["en"]) == pytest.approx(0.2)
    # All hold, one of three is of a passage that answers the question.
    assert score_citations(GAMES["every passage"]["en"], TASKS["en"]) == pytest.approx((1 + 0.2 + 0.2) / 3)
    assert score_citations("5 mg [k7q3-1].", TASKS["en"]) == score_citations("28天[k7q3-2]。", TASKS["zh"]) == 1


def test_the_reward_is_used_by_name_and_for_rows_that_have_it():
    (reward,) = choose_rewards(["citations"]).values()
    assert reward([RIGHT["en"], "x"], prompts=["?", "?"], citations=[TASKS["en"], None]) == [1, None]
    for task in ({"tag": TAG}, {**TASKS["en"], "supporting": [4]}, "x"):
        with pytest.raises(UserError, match="citations"):
            reward(["x"], prompts=["?"], citations=[task])


def test_tasks_are_made_of_an_index_and_scored(tmp_path):
    path = tmp_path / "tasks.jsonl"
    run_here("chatpdf.py", "--make_tasks", path, "--index_dir", tmp_path / "index")
    rows = read_json(path)
    questions = read_json(chatpdf.SAMPLES / "questions.jsonl")
    asked = [row["question"] for row in questions if not is_held_out(row["question"])]
    texts = [row["messages"][0]["content"] for row in rows]
    assert 80 < len(rows) <= len(asked) and all(any(question in text for question in asked) for text in texts)
    held = [row["question"] for row in questions if is_held_out(row["question"])]
    assert not any(text.endswith(question) for question in held for text in texts)
    for row in rows:
        task = row["citations"]
        assert row["messages"][0]["content"].count(f"[{task['tag']}-1]") >= 2
        if task["supporting"]:
            number = task["supporting"][0]
            longest = max(re.split(r"。|\. |\n", task["passages"][number - 1]), key=len)
            assert score_citations(f"{longest} [{task['tag']}-{number}]", task) > 0.5
        else:
            assert score_citations(UNKNOWN[row["language"]], task) == 1
    assert 10 < sum(not row["citations"]["supporting"] for row in rows) < len(rows) / 2
    # Retrieval ranks the right passage first in most rows; citing the first one must not pay.
    places = [row["citations"]["supporting"][0] for row in rows if row["citations"]["supporting"]]
    assert places.count(1) < 0.4 * len(places)
    tasks = [{**to_task(row), "place": {"file": "t", "line": n}} for n, row in enumerate(rows, start=1)]
    check_coverage(tasks, choose_rewards(["citations"]))
    with pytest.raises(UserError, match="citations applies to no row"):
        check_coverage([{**to_task({"question": "?"}), "place": {}}], choose_rewards(["citations"]))
    with pytest.raises(UserError, match="does not exist"):
        run_here("chatpdf.py", "--make_tasks", path, "--index_dir", tmp_path / "index")


def test_tasks_need_a_question(tmp_path):
    (tmp_path / "a.md").write_text("Insulin is kept cool.")
    questions = write_jsonl(tmp_path / "q.jsonl", [{"question": "Zebra?", "language": "en", "file": None}])
    flags = ["--files", tmp_path / "a.md", "--questions", questions, "--index_dir", tmp_path / "index"]
    with pytest.raises(UserError, match="no question finds a passage"):
        run_here("chatpdf.py", "--make_tasks", tmp_path / "t.jsonl", *flags)


def test_replies_cite_the_evidence_or_refuse(tmp_path):
    path = tmp_path / "tasks.jsonl"
    run_here("chatpdf.py", "--make_tasks", path, "--with_replies", True, "--index_dir", tmp_path / "index")
    rows = read_json(path)
    for row in rows:
        asked, reply = row["messages"]
        assert (asked["role"], reply["role"]) == ("user", "assistant")
        assert score_citations(reply["content"], row["citations"]) == 1, reply["content"]
        # SFT trains on the reply; GRPO does not see it.
        assert to_messages(row)["messages"][-1] == reply
        assert [turn["content"] for turn in to_task(row)["messages"]] == [asked["content"]]
    without = tmp_path / "without.jsonl"
    run_here("chatpdf.py", "--make_tasks", without, "--index_dir", tmp_path / "index")
    assert read_json(without) == [{**row, "messages": row["messages"][:1]} for row in rows]
    with pytest.raises(UserError, match="--with_replies has no effect without --make_tasks"):
        run_here("chatpdf.py", "--evaluate", "--with_replies", True)


def test_a_reply_marks_every_sentence_of_the_evidence():
    question = Question("How is it taken?", "en", "a.md", None, "The warfarin dose is 5 mg daily. Do not take aspirin.")
    assert write_reply(question, TASKS["en"]) == (
        "The warfarin dose is 5 mg daily. [k7q3-1] Do not take aspirin. [k7q3-1]"
    )
    question = Question("能放多久？", "zh", "a.md", None, "可放 28 天。要冷藏。")
    assert write_reply(question, TASKS["zh"]) == "可放 28 天。[k7q3-2]要冷藏。[k7q3-2]"
    assert write_reply(question, TASKS["none"]) == UNKNOWN["zh"]
