"""A remedy that an error message prints does not harm: with its flags, what is trained is right."""

import re
from dataclasses import fields

from medicalgpt.args import DataArguments
from medicalgpt.data.loading import load_data
from medicalgpt.formats.conversion import to_messages, to_preference
from medicalgpt.readers.problems import DataError
from tests.helpers import write_jsonl

import pytest

ASKED, SAID = "What helps?", "Rest."
TURNS = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": SAID}]
PAIR = {"prompt": ASKED, "chosen": SAID, "rejected": "Nothing."}
# Rows of which today's or an earlier message offered a flag that trains something else, and the conversations that
# each flag may lead to: none, where the row is skipped.
ROWS = {
    "KTO": (to_messages, {"prompt": ASKED, "completion": "Go away.", "label": False}, []),
    "images": (to_messages, {"messages": TURNS, "images": ["a.png"]}, []),
    "label of a subject": (to_messages, {"messages": TURNS, "label": "cardiology"}, [TURNS]),
    "two answers": (
        to_messages,
        {"prompt": ASKED, "response": SAID, "answer": "Tea."},
        [TURNS, [TURNS[0], {"role": "assistant", "content": "Tea."}]],
    ),
    "UltraFeedback": (
        to_messages,
        {**PAIR, "chosen": TURNS, "rejected": [TURNS[0], TURNS[1]], "messages": TURNS},
        [TURNS],
    ),
    "pair": (to_messages, PAIR, [TURNS]),
    "no option": (to_messages, {"question": ASKED, "options": ["Tea", "Rest"], "answer_idx": "D"}, []),
    "third answer": (to_preference, {**PAIR, "output": "Other."}, [TURNS[:1]]),
    "misspelled": (to_messages, {"prompt": ASKED, "response": SAID, "sytem": "S"}, [TURNS]),
}
# Rows that were refused, or lost what matters with the flag that was offered, and are read as they are.
READ = {
    "MedQA": (
        {
            "question": ASKED,
            "answer": "Rest",
            "options": {"A": "Tea", "B": "Rest"},
            "meta_info": "x",
            "answer_idx": "B",
        },
        [{"role": "user", "content": f"{ASKED}\nA. Tea\nB. Rest"}, {"role": "assistant", "content": "B. Rest"}],
    ),
    "dolly": ({"instruction": ASKED, "context": "", "response": SAID, "category": "qa"}, TURNS),
    "Firefly": ({"kind": "QA", "input": ASKED, "target": SAID}, TURNS),
    "a row number": ({"Unnamed: 0": 0, "instruction": ASKED, "input": "", "output": SAID}, TURNS),
}


def trained(path, to, **flags) -> list:
    """The conversations of a file under these flags.

    Raises:
        DataError: rows that no flag allows to skip.
    """
    arguments = DataArguments(train_file_dir=str(path), **flags)
    data = load_data(arguments, to)
    data.settle(arguments)
    return [row["messages"] for row in data.train]


@pytest.mark.parametrize(("to", "row", "right"), ROWS.values(), ids=ROWS)
def test_flags_of_a_message_lead_to_the_right_rows(tmp_path, to, row, right):
    good = (
        {**PAIR, "prompt": "Good?"}
        if to is to_preference
        else {"messages": [{**TURNS[0], "content": "Good?"}, TURNS[1]]}
    )
    path = write_jsonl(tmp_path / "a.jsonl", [row, good])
    with pytest.raises(DataError) as refused:
        trained(path, to)
    offered = re.findall(r"--(\w+) ([^\s;]+)", str(refused.value).splitlines()[1])
    assert offered
    found = []
    for name, value in offered:
        assert name in {entry.name for entry in fields(DataArguments)}
        value = {"True": True}.get(value.rstrip("."), value.rstrip("."))
        # --columns says what every row has, so that the other one is of no use.
        flags = {name: value} | ({"skip_bad_rows": True} if name == "columns" else {})
        found += [messages for messages in trained(path, to, **flags) if messages[0]["content"] != "Good?"]
    assert found == right


@pytest.mark.parametrize(("row", "messages"), READ.values(), ids=READ)
def test_rows_that_need_no_remedy(tmp_path, row, messages):
    assert trained(write_jsonl(tmp_path / "a.jsonl", [row]), to_messages) == [messages]
