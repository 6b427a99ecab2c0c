"""The reward `citation`: what it pays for, what it must not pay for, rows from an index, and training on it."""

import json

import chatpdf
from medicalgpt.errors import UserError
from medicalgpt.rag import grounding
from medicalgpt.rag.questions import make_tasks, read_questions
from medicalgpt.rag.retrieval import Collection, Passage, normalize
from medicalgpt.rewards.citation import citation_score
from medicalgpt.rewards.rewards import choose_rewards
from tests.helpers import read_json, run_here, write_jsonl
from tests.silent.tasks import open_tasks
from tests.tiny import make_tiny

import pytest

REFUSAL = grounding.UNKNOWN["en"]
PASSAGES = [
    {"mark": "K7Q", "text": "The warfarin dose is 5 mg daily. Take it at the same hour.", "heading": "Warfarin"},
    {"mark": "B3C", "text": "The aspirin dose is 100 mg daily."},
    {"mark": "F9D", "text": "Bus line W7 stops at the door."},
]
RIGHT = "The warfarin dose is 5 mg daily [K7Q]."
# Reply -> its score; the row has the answer 5 mg, in the passage K7Q.
SCORES = {
    RIGHT: 1.0,
    "<think>[B3C] or [K7Q]?</think>The warfarin dose is 5 mg daily [K7Q].": 1.0,
    "The warfarin dose is 5 mg daily [K7Q][B3C].": 2 / 3,
    "The warfarin dose is 5 mg daily [K7Q][2].": 2 / 3,
    "The warfarin dose is 5 mg daily [K7Q]. Buses are late.": 2 / 3,
    "Take it at the same hour [K7Q].": 0.5,
    "The warfarin dose is 5 mg daily.": 0.0,
    "The warfarin dose is 50 mg daily [K7Q].": 0.0,
    "The aspirin dose is 100 mg daily [B3C].": 0.0,
    "The warfarin dose is 5 mg daily [1].": 0.0,
    "[K7Q][B3C][F9D]": 0.0,
    "[K7Q]": 0.0,
    REFUSAL: 0.0,
    f"{REFUSAL} The warfarin dose is 5 mg daily [K7Q].": 0.0,
    "": 0.0,
}


@pytest.mark.parametrize("reply", SCORES)
def test_score(reply):
    assert citation_score(reply, PASSAGES, ["K7Q"], "5 mg", REFUSAL) == pytest.approx(SCORES[reply])


def test_without_an_answer_in_the_passages_only_a_refusal_is_right():
    score = lambda reply: citation_score(reply, PASSAGES, [], None, REFUSAL)  # noqa: E731
    assert score(REFUSAL) == score(f"<think>?</think>{REFUSAL.strip('.')}") == 1
    for wrong in (RIGHT, f"{REFUSAL} [K7Q]", f"{REFUSAL} The dose is 5 mg.", "", "I do not know."):
        assert score(wrong) == 0


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Rows of the sample questions, and the quotation that answers each."""
    folder = tmp_path_factory.mktemp("tasks")
    flags = ["--make_tasks", folder / "tasks.jsonl", "--index_dir", folder / "index", "--seed", "3"]
    run_here("chatpdf.py", *flags)
    made = read_json(folder / "tasks.jsonl")
    questions = {each.question: each for each in read_questions(chatpdf.SAMPLES / "questions.jsonl")}
    return [
        (row, next(q for text, q in questions.items() if row["messages"][0]["content"].endswith(text))) for row in made
    ]


def test_rows_have_what_the_reward_needs(rows):
    answerable = [row for row, _ in rows if row["supporting"]]
    assert len(answerable) == 212 and len(rows) > 480
    for row, question in rows:
        text = row["messages"][0]["content"]
        marks = [each["mark"] for each in row["passages"]]
        assert all(text.count(f"[/{mark}]") >= 1 for mark in marks) and len(set(marks)) == len(marks)
        has_evidence = (
            [each["mark"] for each in row["passages"] if normalize(question.evidence) in normalize(each["text"])]
            if question.evidence
            else []
        )
        assert set(row["supporting"]) <= set(has_evidence) or not row["supporting"]
        assert bool(row["supporting"]) == bool(has_evidence)
    first = [row["passages"][0]["mark"] in row["supporting"] for row in answerable]
    assert 20 < sum(first) < 120, "the place of the right passage gives nothing away"


def replies_to(row, question):
    """(right, wrong ones by name) to a row."""
    marks, refusal = [each["mark"] for each in row["passages"]], row["refusal"]
    texts = {each["mark"]: each["text"] for each in row["passages"]}
    everything = "".join(f"[{mark}]" for mark in marks)
    quoted = question.evidence.rstrip("。.") if row["supporting"] else ""
    right = f"{quoted} [{row['supporting'][0]}]。" if row["supporting"] else refusal
    wrong = {
        "marks alone": everything,
        "quotes every passage": "\n".join(f"{text} [{mark}]" for mark, text in texts.items()),
        "first passage": f"{texts[marks[0]].splitlines()[0]} [{marks[0]}]" if marks[0] not in row["supporting"] else "",
        "made up": f"The dose is 777 mg [{marks[0]}].",
        "number of a source": f"{quoted or 'Yes'} [1].",
        "nothing": "",
    }
    if row["supporting"]:
        wrong |= {
            "refuses": refusal,
            "cites nothing": quoted,
            "cites everything": f"{quoted} {everything}",
            "wrong mark": f"{quoted} [{next(mark for mark in marks if mark not in row['supporting'])}]",
            "hedges": f"{refusal} {right}",
        }
    else:
        wrong |= {"refuses and cites": f"{refusal} {everything}"}
    return right, wrong


def test_no_shortcut_pays_as_much_as_the_right_reply(rows):
    (reward,) = choose_rewards(["citation"]).values()
    totals: dict[str, list[float]] = {}
    for row, question in rows:
        right, wrong = replies_to(row, question)
        names = ("passages", "supporting", "answer", "refusal")
        replies = [right, *wrong.values()]
        columns = {name: [row.get(name)] * len(replies) for name in names}
        best, *others = reward(completions=replies, prompts=[""] * len(replies), **columns)
        assert best >= 0.5, (right, row)
        for name, score in zip(wrong, others, strict=True):
            assert score < best, (name, wrong[name], score, best)
            totals.setdefault(name, []).append(score)
        totals.setdefault("right", []).append(best)
    mean = {name: sum(scores) / len(scores) for name, scores in totals.items()}
    assert mean.pop("right") > 0.97 and max(mean.values()) < 0.5, mean


def test_broken_columns_are_named():
    (reward,) = choose_rewards(["citation"]).values()
    for passages, supporting, said in (
        ("text", [], "`passages` must be a list"),
        ([PASSAGES[0], PASSAGES[0]], [], "different `mark`"),
        (PASSAGES, ["Z9Z"], "`supporting` must be a list of marks"),
        (PASSAGES, None, "`supporting` must be a list of marks"),
    ):
        with pytest.raises(UserError, match=said):
            reward(completions=["x"], passages=[passages], supporting=[supporting])
    assert reward(completions=["x"]) == [None]


def test_flags_of_make_tasks(tmp_path):
    existing = tmp_path / "a.jsonl"
    existing.write_text("mine")
    for flags, said in (
        (["--make_tasks", existing], "does not exist yet"),
        (["--make_tasks", tmp_path / "b.jsonl", "--model_name_or_path", "m"], "no effect with --make_tasks"),
        (["--make_tasks", tmp_path / "b.jsonl", "--min_terms", "1"], "min_terms has no effect"),
        (["--make_tasks", tmp_path / "b.jsonl", "--files", "x"], "both --files and --questions"),
    ):
        with pytest.raises(UserError, match=said):
            run_here("chatpdf.py", *flags)
    assert existing.read_text() == "mine" and not (tmp_path / "b.jsonl").exists()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_training_raises_the_reward_and_chatpdf_shows_it(tmp_path, monkeypatch):
    """A model that cites the wrong passage, and answers what the passages do not have, every second time."""
    files = tmp_path / "files"
    files.mkdir()
    (files / "a.md").write_text("# Warfarin\nWarfarin: 5 mg.\n")
    (files / "b.md").write_text("# Aspirin\nAspirin: 100 mg.\n")
    asked = [
        {
            "question": "Warfarin, how much?",
            "language": "en",
            "file": "a.md",
            "evidence": "Warfarin: 5 mg.",
            "answer": "5 mg",
        },
        {"question": "Aspirin at night?", "language": "en", "file": None},
    ]
    questions = write_jsonl(tmp_path / "q.jsonl", asked)
    # Marks that stay the same, for a model that learns by heart.
    monkeypatch.setattr(grounding, "draw_marks", lambda count, *_: ["K7Q", "B3C"][:count])
    monkeypatch.chdir(files)
    flags = ["--files", "a.md", "b.md", "--questions", questions, "--index_dir", tmp_path / "index"]
    flags += ["--num_passages", "2"]
    passages = [
        passage
        for path in ("a.md", "b.md")
        for passage in [
            Passage(path, (files / path).read_text().splitlines()[1], ((files / path).read_text().splitlines()[0][2:],))
        ]
    ]
    rows = make_tasks(Collection(passages), read_questions(questions), 2, 0)
    wanted = {}
    for row in rows:
        prompt = row["messages"][0]["content"]
        good = f"Warfarin: 5 mg [{row['supporting'][0]}]." if row["supporting"] else row["refusal"]
        bad = good.replace(row["supporting"][0], "Z9Z") if row["supporting"] else "Aspirin: 5 mg [K7Q]."
        wanted[prompt] = [good, bad]
    model = make_tiny(tmp_path / "model", answers=wanted, max_position_embeddings=2048)
    more = ("--reward_funcs", "citation", "--max_completion_length", 90, "--max_steps", 30)
    more += ("--num_generations", 8, "--per_device_train_batch_size", 8, "--learning_rate", 0.003)
    more += ("--use_peft", "False", "--lr_scheduler_type", "constant", "--model_max_length", 2048)
    opened = open_tasks(model, tmp_path, rows, *more)
    opened.trainer.train()
    found = [row["reward"] for row in opened.trainer.state.log_history if "reward" in row]
    print(json.dumps(found))
    assert sum(found[:4]) / 4 < 0.75 and sum(found[-4:]) / 4 > 0.9
