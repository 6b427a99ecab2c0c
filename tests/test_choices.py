"""Options of a question are found in every shape, stand in the prompt, and the correct one is named by its letter."""

import json

from medicalgpt.formats.choices import answer_letters, answer_text, options_of, parse_options, prompt_with_options
from medicalgpt.readers.problems import RowError

import pytest

TEXTS = ["Rest", "Sleep", "An ambulance"]
OPTIONS = dict(zip("ABC", TEXTS, strict=True))
SHAPES = {
    "object": OPTIONS,
    "object, null for an option that others have": {**OPTIONS, "D": None},
    "object, small letters": {"a": "Rest", "b": "Sleep", "c": "An ambulance"},
    "texts": TEXTS,
    "texts with their letters": ["A. Rest", "B. Sleep", "C. An ambulance"],
    "texts with Chinese points": ["A、Rest", "B、Sleep", "C、An ambulance"],
    "objects of key and value": [{"key": key, "value": text} for key, text in OPTIONS.items()],
    "objects of label and text": [{"label": key, "text": text} for key, text in OPTIONS.items()],
    "two lists": {"text": TEXTS, "label": ["A", "B", "C"]},
    "lines": "A. Rest\nB. Sleep\nC. An ambulance",
    "lines without points": "A Rest\nB Sleep\nC An ambulance",
    "lines below a sentence": "A man coughs.\nA. Rest\nB. Sleep\nC. An ambulance",
    "object, empty for an option that others have": {**OPTIONS, "D": ""},
    "lines with brackets": "(A) Rest\n(B) Sleep\n(C) An ambulance",
    "lines below a heading": "Answer Choices:\nA. Rest\nB. Sleep\nC. An ambulance",
    "JSON in a string": json.dumps(OPTIONS),
}
ROWS = {
    "options": {"options": OPTIONS},
    "option": {"option": OPTIONS},
    "choices": {"choices": TEXTS},
    "opa to opd": {"opa": "Rest", "opb": "Sleep", "opc": "An ambulance", "opd": None},
    "letters": {"A": "Rest", "B": "Sleep", "C": "An ambulance", "D": ""},
}


@pytest.mark.parametrize("value", SHAPES.values(), ids=SHAPES)
def test_options_in_every_shape(value):
    assert parse_options(value) == OPTIONS


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_options_under_every_name(row):
    options, names = options_of({"question": "Q", **row})
    assert options == OPTIONS and set(names) == set(row)


def test_rows_without_options_have_none():
    assert options_of({"question": "Q", "answer": "A", "A": "a grade"}) is None
    assert options_of({"question": "Q", "options": None}) is None


@pytest.mark.parametrize(
    "value", [3, "Rest", ["Rest"], {"A": "Rest"}, {"A": "Rest", "B": ["x"]}, [{"key": "A"}], "A. x\nC. y"]
)
def test_what_is_not_options_is_refused(value):
    with pytest.raises(RowError):
        parse_options(value)


def test_lines_of_text_continue_an_option():
    assert parse_options("A. one\nmore\nB. A two")["A"] == "one\nmore"


def test_the_question_and_every_option_stand_in_the_prompt():
    prompt = prompt_with_options("What helps?\n", OPTIONS)
    assert prompt == "What helps?\nA. Rest\nB. Sleep\nC. An ambulance"
    assert prompt_with_options(prompt, OPTIONS) == prompt


@pytest.mark.parametrize(
    ("answer", "letters"),
    [
        ("B", "B"),
        (" b) ", "B"),
        ("(B)", "B"),
        ("B. Sleep", "B"),
        ("sleep", "B"),
        (1, "B"),
        (1.0, "B"),
        (0.5, None),
        ("1", "B"),
        ("AC", "AC"),
        ("C, A", "AC"),
        ("A、C", "AC"),
        (["C", "A"], "AC"),
        ("D", None),
        ("BB", None),
        ("B. Rest", None),
        (3, None),
        (True, None),
        (None, None),
        ([], None),
        (["A", "D"], None),
        ("Nothing helps", None),
    ],
)
def test_the_correct_options(answer, letters):
    assert answer_letters(answer, OPTIONS) == letters


def test_numbers_may_begin_with_one():
    assert answer_letters(1, OPTIONS, first=1) == "A" and answer_letters(0, OPTIONS, first=1) is None


def test_a_text_that_is_a_letter_or_a_number():
    assert answer_letters("2", {"A": "2", "B": "3"}) == "A"
    assert answer_letters("A", {"A": "B", "B": "A"}) == "A"


def test_the_reply_names_letter_and_text():
    assert answer_text("AC", OPTIONS) == "A. Rest\nC. An ambulance"
