"""Before training: what the rewards apply to is counted and shown, and what would teach nothing is refused."""

from medicalgpt.errors import UserError
from medicalgpt.formats.tasks import to_task
from medicalgpt.readers.problems import Place
from medicalgpt.rewards.coverage import check_coverage, find_unscorable
from medicalgpt.rewards.rewards import choose_rewards

import pytest
from loguru import logger

OPTIONS = {"A": "Warfarin", "B": "Paracetamol"}
ROWS = [
    {"question": "Which?", "options": OPTIONS, "answer": "Paracetamol", "meta_info": "step1"},
    {"question": "How much?", "answer": "9 * 2 = 18\n#### 18"},
    {"question": "How much?", "answer": r"\frac{\sqrt{3}}{2}"},
    {"question": "Where to?", "answer": "neurology"},
    {"question": "Anything else?"},
]


def loaded(rows):
    return [{**to_task(row), "place": Place("rows.jsonl", n)._asdict()} for n, row in enumerate(rows, start=1)]


def shown(rows, names=("accuracy", "format"), **options):
    lines = []
    sink = logger.add(lambda message: lines.append(message.record["message"]), level="INFO")
    try:
        kinds = check_coverage(loaded(rows), choose_rewards(names, **options), options.get("tolerance"))
    finally:
        logger.remove(sink)
    return kinds, "\n".join(lines)


def test_kinds_are_counted_and_examples_are_judged():
    kinds, log = shown(ROWS)
    assert kinds == {"choice": 1, "number": 1, "formula": 1, "text": 1, "no answer": 1}
    assert "compared with: 1 choice, 1 number, 1 formula, 1 text; 1 rows have none" in log
    assert "rows.jsonl:1: Which? A. Warfarin B. Paracetamol\n    choice: correct [B] 1, wrong [A] 0" in log
    assert (
        "rows.jsonl:2: How much?\n    number: correct [18] 1, wrong [19] 0, text of the row [9 * 2 = 18 #### 18] 0"
        in log
    )
    assert "formula: correct" in log and log.count("wrong [") == 3
    assert "fields that no reward reads: meta_info (1 rows)" in log


@pytest.mark.parametrize(
    "rows, names, message",
    [
        (
            [{"question": "?", "reply": "x"}],
            ["accuracy"],
            r"(?s)applies to no row.* prompt: reply.*`answer`",
        ),
        ([{"question": "Cough?"}], ["safety"], "safety applies to no row: no row has `meta.required`"),
        ([{"question": "1+1=?", "answer": "2"}], ["language"], "language applies to no row"),
    ],
)
def test_a_reward_that_applies_to_no_row_is_refused(rows, names, message):
    with pytest.raises(UserError, match=message):
        shown(rows, names)
    fixed = {"question": "Chest pain?", "answer": "Call 120."}
    shown([*rows, fixed], names)


def test_a_tolerance_without_numbers_is_refused():
    with pytest.raises(UserError, match="--reward_tolerance has no effect here: no row has a number"):
        shown(ROWS[:1], ["accuracy"], tolerance=0.1)
    shown(ROWS, ["accuracy"], tolerance=0.1)


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_a_tolerance_below_0_is_refused(value):
    with pytest.raises(UserError, match="--reward_tolerance .* must be 0 or more"):
        choose_rewards(["accuracy"], tolerance=value)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"answer": "Paracetamol", "type": "choice"}, "`answer` is not a choice"),
        ({"answer": "a lot", "type": "number"}, "`answer` is not a number"),
        ({"answer": "B", "type": "choice"}, None),
        ({"answer": "B. Paracetamol", "type": "choice"}, None),
        ({"answer": "18 dollars", "type": "number"}, None),
        ({"answer": r"\frac{1}{2} mL", "type": "number"}, None),
        ({"answer": "a lot", "type": "Algebra"}, None),
        ({"type": "number"}, None),
    ],
)
def test_an_answer_that_is_not_of_its_type_is_a_problem(row, message):
    problems = find_unscorable(loaded([{"question": "?"}, {"question": "?", **row}]))
    assert [str(problem) for problem in problems] == [str(problem) for problem in problems if problem.place.line == 2]
    assert (message in str(problems[0])) if message else not problems
