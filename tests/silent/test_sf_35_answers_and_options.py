"""For each shape of a task: question and options are in the prompt, the correct answer scores 1 and no other does."""

import json
import re

from eval_pipeline import task_rewards
from medicalgpt.data.export import export_row
from medicalgpt.evaluation.held_out import read_tasks
from medicalgpt.formats.tasks import to_task
from medicalgpt.readers.problems import RowError
from medicalgpt.rewards.reward_check import check_rewards
from medicalgpt.rewards.rewards import accuracy_reward, choose_rewards
from medicalgpt.serving.generation import Answer
from tests.helpers import ROOT, write_jsonl

import pytest

QUESTION = "Which drug lowers a fever in a child?"
TEXTS = ["Warfarin", "Paracetamol", "Diazepam", "Vitamin K"]
OPTIONS = dict(zip("ABCD", TEXTS, strict=True))
LINES = "\n".join(f"{letter}. {text}" for letter, text in OPTIONS.items())
TEN = dict(zip("ABCDEFGHIJ", [*TEXTS, "Insulin", "Heparin", "Morphine", "Digoxin", "Atropine", "Lithium"], strict=True))
STEPS = "The child weighs 9 kg, 9 * 2 = <<9*2=18>>18 mL."

# Each with question, options and the letters of the correct one, in the fields of a published data set.
CHOICES = {
    "MedQA": {
        "question": QUESTION,
        "answer": "Paracetamol",
        "options": OPTIONS,
        "meta_info": "step1",
        "answer_idx": "B",
    },
    "MedQA, list": {
        "question": QUESTION,
        "answer": "Paracetamol",
        "options": [{"key": letter, "value": text} for letter, text in OPTIONS.items()],
        "answer_idx": "B",
    },
    "CMB": {
        "exam_type": "医师考试",
        "question": QUESTION,
        "answer": "B",
        "question_type": "单项选择题",
        "option": {**OPTIONS, "E": ""},
    },
    "MedMCQA": {
        **{"id": "1", "question": QUESTION, "opa": TEXTS[0], "opb": TEXTS[1], "opc": TEXTS[2], "opd": TEXTS[3]},
        **{"cop": 1, "choice_type": "single", "exp": "It acts centrally.", "subject_name": "Pharmacology"},
    },
    "CMExam": {"Question": QUESTION, "Options": LINES.replace(". ", " "), "Answer": "B", "Explanation": "解热镇痛。"},
    "MMLU": {"question": QUESTION, "choices": TEXTS, "answer": 1, "subject": "clinical_knowledge"},
    "ARC": {"question": QUESTION, "choices": {"text": TEXTS, "label": list("ABCD")}, "answerKey": "B"},
    "CMMLU": {"Question": QUESTION, **OPTIONS, "Answer": "B"},
    "m23k": {"prompt": f"{QUESTION}\n{LINES}", "answer_idx": 1, "answer_letter": "B", "answer_string": "Paracetamol"},
    "MedReason": {
        "dataset_name": "medqa",
        "question": QUESTION,
        "answer": "Paracetamol. Explanation: it acts on the centre of heat.",
        "options": f"Answer Choices:\n{LINES}",
    },
    "options in CSV": {"question": QUESTION, "options": str(TEXTS), "answer": "1"},
    "numbered options": {
        "question": QUESTION,
        **{f"option{n}": text for n, text in enumerate(TEXTS, 1)},
        "answer": "2",
    },
    "letter and text": {"question": QUESTION, "options": TEXTS, "answer": "B. Paracetamol"},
    "a sentence": {"question": QUESTION, "options": TEXTS, "answer": "The correct answer is (B)."},
    "boxed": {"question": QUESTION, "options": TEXTS, "solution": r"It acts centrally: $\boxed{B}$"},
    "ten options": {"question": QUESTION, "options": list(TEN.values()), "answer": "B"},
    "verl": {
        "data_source": "medqa",
        "prompt": [{"role": "user", "content": f"{QUESTION}\n{LINES}"}],
        "reward_model": {"style": "rule", "ground_truth": "B"},
        "extra_info": {"index": 1},
    },
    "conversation": {
        "conversations": [
            {"from": "human", "value": f"{QUESTION}\nA. Warfarin B. Paracetamol C. Diazepam D. Vitamin K"}
        ],
        "answer": "Paracetamol",
    },
}
FORMS = {
    "letter": lambda letter, text: letter,
    "small letter in brackets": lambda letter, text: f"({letter.lower()})",
    "letter and text": lambda letter, text: f"{letter}. {text}",
    "sentence": lambda letter, text: f"The answer is {letter}.",
    "sentence after reasons": lambda letter, text: f"A child has a fever, so A and C are out.\nThe answer is {letter}",
    "sentence with a reason": lambda letter, text: f"The answer is {letter} because of the fever.",
    "sentence about the option": lambda letter, text: f"Option {letter} is the correct answer.",
    "correct option": lambda letter, text: f"A has a fever, so the correct option is ({letter})",
    "choosing": lambda letter, text: f"I would choose {letter}. {text}",
    "Chinese sentence": lambda letter, text: f"答案是{letter}。",
    "Chinese option": lambda letter, text: f"所以正确答案为{letter}选项。",
    "boxed": lambda letter, text: rf"So it is $\boxed{{{letter}}}$.",
    "boxed text": lambda letter, text: rf"\boxed{{\text{{{letter}}}}}",
    "boxed bold text": lambda letter, text: rf"\boxed{{\textbf{{({letter}) {text}}}}}",
    "line before an explanation": lambda letter, text: f"**Answer:** {letter}\n\nExplanation: A and C do not help.",
    "bold sentence": lambda letter, text: f"Not A.\n\n**The final answer is {letter}.**",
    "text": lambda letter, text: text,
    "text in other capitals": lambda letter, text: f"{text.upper()}.",
    "block": lambda letter, text: f"<think>Maybe A? No.</think>\n<answer>{letter}</answer>",
    "block with a box": lambda letter, text: rf"<think>A?</think><answer>\boxed{{{letter}}}</answer>",
    "block with text": lambda letter, text: f"<think>C is wrong.</think><answer>{text}</answer>",
    "thinking": lambda letter, text: f"Not A.</think>\n\nThe answer is {letter}: {text}",
    "heading": lambda letter, text: f"## Thinking\n\nA is wrong.\n\n## Final Response\n\n{letter}",
    "heading with text": lambda letter, text: f"## Thinking\n\nA is wrong.\n\n## Final Response\n\n{letter}. {text}",
}


def score(task, reply):
    columns = {name: [value] for name, value in task["columns"].items()}
    (value,) = accuracy_reward([reply], prompts=[task["messages"]], **columns)
    return value


@pytest.mark.parametrize("row", CHOICES.values(), ids=CHOICES)
def test_question_and_options_are_in_the_prompt_and_one_option_is_correct(row):
    task = to_task(row)
    prompt = task["messages"][-1]["content"]
    options = TEN if "ten" in str(row.get("options")) or len(row.get("options", "")) == 10 else OPTIONS
    assert prompt.count(QUESTION) == 1
    for letter, text in options.items():
        assert prompt.count(f"{letter}. {text}") == 1
        for name, form in FORMS.items():
            assert score(task, form(letter, text)) == (letter == "B"), (name, form(letter, text))
    assert score(task, "A B C D") == score(task, "") == score(task, "<think>B") == score(task, LINES) == 0
    assert score(task, r"\boxed{A} or \boxed{B}") == 0


@pytest.mark.parametrize("row", CHOICES.values(), ids=CHOICES)
def test_a_task_that_is_exported_is_read_as_the_same(row):
    task = to_task(row)
    assert to_task(export_row(task, "task", {})) == task


@pytest.mark.parametrize("page", ["data/README.md", "data/README_zh.md"])
def test_the_rows_of_the_page_have_an_answer(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    block = text[re.search(r"^(?:Tasks|任务)[ （(]+`grpo", text, re.MULTILINE).start() :].split("```")[1]
    tasks = [to_task(json.loads(line)) for line in block.removeprefix("json").strip().splitlines()]
    correct = ["108 mg", "B", "B", "18", "2", "2", "yes"]
    assert [score(*pair) for pair in zip(tasks, correct, strict=True)] == [1] * len(correct)
    assert [score(task, "A") for task in tasks] == [0] * len(correct)


def test_several_correct_options():
    task = to_task({"question": QUESTION, "options": TEXTS, "answer": "A,C"})
    assert task["columns"]["answer"] == "AC"
    for reply in ("AC", "C and A", r"\boxed{A, C}", "答案：A、C", "<answer>A. Warfarin\nC. Diazepam</answer>"):
        assert score(task, reply) == 1, reply
    for reply in ("A", "C", "AB", "ABC", "Warfarin"):
        assert score(task, reply) == 0, reply


# Shape, what is correct, what is not.
ANSWERS = {
    "GSM8K": (
        {"question": "Q", "answer": f"{STEPS}\n#### 18"},
        ("18", "18.0", "#### 18", "$18"),
        ("9", "2", "180", STEPS),
    ),
    "GSM8K, thousands": ({"question": "Q", "answer": f"{STEPS}\n#### 1,250"}, ("1250", "1,250"), ("1", "250", "1.25")),
    "MATH": ({"problem": "Q", "solution": r"It is $\boxed{\frac{1}{2}}$."}, (r"\frac12", "0.5", "1/2"), ("2", "1/3")),
    "MATH, short answer": ({"problem": "Q", "solution": r"It is $\boxed{2}$.", "answer": "2"}, ("2",), ("3", "22")),
    "boxed": ({"question": "Q", "answer": r"It is $\boxed{2}$."}, ("2", r"\boxed{2}"), ("It is", "3")),
    "DAPO": (
        {"prompt": [{"role": "user", "content": "Q"}], "reward_model": {"ground_truth": "34", "style": "rule"}},
        ("34", "Answer: 34", r"Answer: $34$"),
        ("43", "3", "4"),
    ),
    "dollars": ({"question": "Q", "answer": "18 dollars"}, ("18", "18 dollars", "$18", "18 Dollars."), ("81", "18 mg")),
    "fraction of something": ({"question": "Q", "answer": "1/2 cup"}, ("1/2", "0.5 cups", "1/2 cup"), ("2", "1/3 cup")),
    "mixed number": ({"question": "Q", "answer": "3 1/2"}, ("3.5", "7/2", "3 1/2"), ("31/2", "3", "1/2")),
    "spaces between thousands": ({"question": "Q", "answer": "12 500"}, ("12500", "12,500", "12 500"), ("12", "500")),
    "several answers": (
        {"question": "Q", "reward_model": {"ground_truth": {"target": ["asthma", "bronchial asthma"]}}},
        ("asthma", "Bronchial asthma"),
        ("eczema",),
    ),
    "unit": ({"question": "Q", "answer": "2.5 mL"}, ("2.5 mL", "2.5毫升", "0.0025 L"), ("2.5 L", "25 mL", "2.5 mg")),
    "percent": ({"question": "Q", "answer": "50%"}, ("50%", "0.5", "50 percent"), ("5%", "50.5%")),
    "answer block": ({"question": "Q", "answer": "<think>1+2</think><answer>3</answer>"}, ("3",), ("1", "2", "1+1")),
    "final response": (
        {"question": "Q", "answer": "## Thinking\n\nLong.\n\n## Final Response\n\nasthma"},
        ("asthma", "Asthma."),
        ("Long.", "eczema"),
    ),
    "labelled answer": ({"question": "Q", "answer": "Answer: asthma"}, ("asthma",), ("eczema",)),
    "name like an option": ({"question": "Q", "answer": "E. coli"}, ("E. coli",), ("E", "B. cereus")),
    "PubMedQA": (
        {
            "question": "Q",
            "context": {"contexts": ["It helped in 40 of 50."], "labels": ["RESULTS"]},
            "long_answer": "It seems so.",
            "final_decision": "yes",
        },
        ("yes", "Yes.", "Yes, it does."),
        ("no", "maybe", "Yes or no", "No, it does not."),
    ),
    "medical-o1": (
        {"Question": "Q", "Complex_CoT": "Hm.", "Response": "Call an ambulance."},
        ("Call an ambulance", "<think>Hm.</think><answer>call an ambulance</answer>"),
        ("Rest.",),
    ),
}
WRAPPED = (
    "{}",
    "<think>9 or 2?</think><answer>{}</answer>",
    "Hm, 9?</think>{}",
    "## Final Response\n\n{}",
    "The answer is {}",
)


@pytest.mark.parametrize("row, correct, wrong", ANSWERS.values(), ids=ANSWERS)
def test_the_correct_answer_scores_1_and_others_0(row, correct, wrong):
    task = to_task(row)
    assert "Q" in task["messages"][-1]["content"]
    for form in WRAPPED:
        for answer in correct:
            assert score(task, form.format(answer)) == 1, form.format(answer)
        for answer in wrong:
            assert score(task, form.format(answer)) == 0, form.format(answer)


def test_the_passage_is_in_the_prompt():
    task = to_task(ANSWERS["PubMedQA"][0])
    assert task["messages"][-1]["content"] == "It helped in 40 of 50.\n\nQ"


def test_the_input_of_a_question_is_in_the_prompt():
    task = to_task({"question": "Q", "input": "It helped in 40 of 50.", "answer": "yes"})
    assert task["messages"][-1]["content"] == "Q\nIt helped in 40 of 50." and "input" not in task["columns"]


def test_options_on_lines_may_hold_what_looks_like_a_mark():
    question = "Which?\nA. Vitamin A\nB. Hepatitis B, C. perfringens\nC. Influenza A. B is none\nD. None"
    task = to_task({"question": question, "answer": "D"})
    assert score(task, "None") == score(task, "D. None") == 1 and score(task, "Influenza A. B is none") == 0
    assert score(to_task({"question": question, "answer": "B"}), "Hepatitis B, C. perfringens") == 1


def test_a_solution_that_is_copied_is_not_an_answer():
    gold = f"{STEPS}\n#### 18"
    task = to_task({"question": "Q", "answer": gold})
    assert score(task, f"<think>?</think><answer>{gold}</answer>") == 0


@pytest.mark.parametrize(
    "row, message",
    [
        ({"options": TEXTS, "answer": "Ibuprofen"}, "`answer` is none of the options A, B, C, D"),
        ({"options": TEXTS, "answer": "E"}, "none of the options"),
        ({"options": TEXTS, "answer": 4}, "counted from 0"),
        ({"opa": "a1", "opb": "b1", "opc": "c1", "opd": "d1", "cop": 4}, "`cop` is 4: no option of 4, counted from 0"),
        ({"options": TEXTS, "answer": "Paracetamol", "answer_idx": "C"}, "`answer_idx` is C, `answer` is B"),
        ({"options": TEXTS, "answer": "Ibuprofen", "answer_idx": "B"}, "none of the options .'Ibuprofen'"),
        ({"answer_idx": 2}, "there are no options"),
        ({"answer_letter": "B"}, "there are no options"),
        ({"options": ["only one"], "answer": "A"}, "expected two or more"),
        ({"images": ["x.png"], "answer": "A"}, "text only"),
        ({"weight": 0.5, "answer": "A"}, "`weight`"),
        ({"completion": "bad", "label": False}, "`label`"),
        ({"functions": [{"name": "f"}], "answer": "A"}, "`functions`"),
        ({"answer": "3", "tolerance": -0.1}, "`tolerance` is not a number of at least 0"),
        ({"answer": "3", "tolerance": "wide"}, "`tolerance`"),
        ({"answer": "3", "tolerance": True}, "`tolerance`"),
        ({"ground_truth": {"numbers": [1], "target": {"x": 3}}}, "`ground_truth` is not an answer"),
        ({"answer": "3", "input": {"a": 1}}, "`input` is not a text"),
    ],
)
def test_rows_that_cannot_be_scored_are_refused(row, message):
    with pytest.raises(RowError, match=message):
        to_task({"question": QUESTION, **row})


def test_options_under_other_letters_than_in_the_question_are_refused():
    swapped = "Which?\nA. Paracetamol\nB. Warfarin"
    with pytest.raises(RowError, match="under other letters"):
        to_task({"question": swapped, "options": ["Warfarin", "Paracetamol"], "answer": "B"})


def test_without_options_the_answer_is_their_text():
    """A letter would be the answer to a question that the prompt does not ask."""
    row = {name: value for name, value in CHOICES["MedQA"].items() if name != "options"}
    task = to_task(row)
    assert task["columns"]["answer"] == "Paracetamol" and to_task(CHOICES["MedQA"], frozenset({"options"})) == task
    assert score(task, "paracetamol") == 1 and score(task, "B") == 0


def test_a_test_set_without_answers_has_no_gold():
    row = {**CHOICES["MedMCQA"], "cop": -1}
    assert "answer" not in to_task(row)["columns"]


def test_an_empty_option_keeps_the_letters_of_the_others():
    task = to_task({"question": QUESTION, "choices": ["Warfarin", "", "Diazepam", None], "answer": 2})
    assert task["columns"]["options"] == {"A": "Warfarin", "C": "Diazepam"} and task["columns"]["answer"] == "C"


def test_options_that_begin_with_a_letter_or_name_letters():
    texts = ["A和B", "C反应蛋白", "B型", "Both A and B", "A"]
    task = to_task({"question": "哪项升高？", "options": texts, "answer": "C反应蛋白"})
    assert task["columns"]["answer"] == "B"
    for reply in ("B", "C反应蛋白", "B. C反应蛋白", "答案是C反应蛋白", "B、C反应蛋白。", r"\boxed{B. C反应蛋白}"):
        assert score(task, reply) == 1, reply
    for text in texts[:1] + texts[2:]:
        for letter in "ACDE":
            assert score(task, text) == score(task, letter) == score(task, f"{letter}. {text}") == 0, (letter, text)
    assert score(task, "B. B型") == 0


def test_short_options_that_occur_in_the_question_are_still_written():
    task = to_task({"question": "Do you know whether it is so, yes or no?", "options": ["yes", "no"], "answer": "yes"})
    assert task["messages"][-1]["content"].endswith("\nA. yes\nB. no")


def test_tolerance():
    task = to_task({"question": "Q", "answer": "200 mg", "tolerance": 0.05})
    assert [score(task, f"{n} mg") for n in (190, 210, 211, 189)] == [1, 1, 0, 0]
    assert score(task, "0.195 g") == 1 and score(task, "195") == 0.5
    half = to_task({"question": "Q", "answer": "0.33", "tolerance": 0.02})
    assert score(half, "1/3") == 1 and score(half, "1/2") == 0
    assert accuracy_reward(["103", "106"], answer=["100"] * 2, default_tolerance=0.05) == [1, 0]
    assert accuracy_reward(["103"], answer=["100"], tolerance=[0.01], default_tolerance=0.05) == [0]


def test_other_fields_go_to_the_reward_functions():
    columns = to_task({**CHOICES["MedQA"], "difficulty": 3})["columns"]
    assert columns["answer"] == "B" and columns["options"] == OPTIONS and columns["difficulty"] == 3


def test_evaluation_reads_tasks_as_training_does(tmp_path):
    path = write_jsonl(tmp_path / "tasks.jsonl", [CHOICES["MedMCQA"], ANSWERS["GSM8K"][0]])
    choice, number = read_tasks(str(path))
    assert choice.messages == to_task(CHOICES["MedMCQA"])["messages"] and choice.reference == "B"
    judge = task_rewards()[1]["correct answers"]

    def is_correct(reply, task):
        return judge(Answer(reply, "stop", 1, 1), task)

    assert is_correct("Paracetamol", choice) and is_correct("<think>?</think><answer>18</answer>", number)
    assert not is_correct("Warfarin", choice) and not is_correct(STEPS, number)


def test_rewards_are_checked_with_the_options_of_a_row(tmp_path):
    row = {**CHOICES["MedQA"], "good": "Paracetamol", "bad": "Warfarin"}
    found = check_rewards(str(write_jsonl(tmp_path / "rows.jsonl", [row])), choose_rewards(["accuracy"]))
    assert (found["accuracy"].good, found["accuracy"].bad) == (1, 0)
