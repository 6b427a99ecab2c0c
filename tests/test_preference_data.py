"""Rows of preferences: every format gives the same prompt and answers, and what prefers nothing is refused."""

import json

from medicalgpt.args import DataArguments
from medicalgpt.data.loading import load_data
from medicalgpt.errors import UserError
from medicalgpt.formats.conversion import to_messages, to_preference
from medicalgpt.readers.problems import DataError, RowError, place_of
from tests.helpers import ROOT, write_jsonl

import pytest

QUESTION, GOOD, BAD = "胸痛怎么办？", "立即拨打120。", "睡一觉就好。"
SYSTEM = {"role": "system", "content": "简短"}
USER = {"role": "user", "content": QUESTION}
CHOSEN, REJECTED = {"role": "assistant", "content": GOOD}, {"role": "assistant", "content": BAD}
BEFORE = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}]
TEXTS = {"chosen": GOOD, "rejected": BAD}
ROW = {"prompt": QUESTION, **TEXTS}
TOOL = {"name": "weather", "description": "Weather.", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": TOOL}]
RESULT = {"role": "tool", "content": '{"sky": "rain"}'}


def calling(city: str) -> dict:
    """A message that calls the tool."""
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def called(city: str) -> dict:
    """The same as a turn of ShareGPT."""
    return {"from": "function_call", "value": json.dumps({"name": "weather", "arguments": {"city": city}})}


# A row and the prompt that it must give; the answers are those of TEXTS.
FORMATS = {
    "conversations": ({"conversations": [{"from": "human", "value": QUESTION}], **TEXTS}, [USER]),
    "conversations, system turn": (
        {"conversations": [{"from": "system", "value": "简短"}, {"from": "human", "value": QUESTION}], **TEXTS},
        [SYSTEM, USER],
    ),
    "conversations, many turns": ({"conversations": [*BEFORE, USER], **TEXTS}, [*BEFORE, USER]),
    "conversations, answers as gpt turns": (
        {
            "conversations": [{"from": "human", "value": QUESTION}],
            "chosen": {"from": "gpt", "value": GOOD},
            "rejected": {"from": "gpt", "value": BAD},
        },
        [USER],
    ),
    "conversations, answers as messages": (
        {"conversations": [USER], "chosen": CHOSEN, "rejected": REJECTED},
        [USER],
    ),
    "conversations, a text and a list": ({"conversations": [USER], "chosen": [CHOSEN], "rejected": BAD}, [USER]),
    "messages": ({"messages": [SYSTEM, USER], **TEXTS}, [SYSTEM, USER]),
    "messages, lists": ({"messages": [USER], "chosen": [CHOSEN], "rejected": [REJECTED]}, [USER]),
    "prompt": (ROW, [USER]),
    "prompt, lists": ({"prompt": QUESTION, "chosen": [CHOSEN], "rejected": [REJECTED]}, [USER]),
    "prompt of messages": ({"prompt": [*BEFORE, USER], **TEXTS}, [*BEFORE, USER]),
    "prompt of messages, lists": (
        {"prompt": [SYSTEM, USER], "chosen": [CHOSEN], "rejected": [REJECTED]},
        [SYSTEM, USER],
    ),
    "whole conversations": ({"chosen": [USER, CHOSEN], "rejected": [USER, REJECTED]}, [USER]),
    "whole conversations of many turns": (
        {"chosen": [SYSTEM, *BEFORE, USER, CHOSEN], "rejected": [SYSTEM, *BEFORE, USER, REJECTED]},
        [SYSTEM, *BEFORE, USER],
    ),
    "whole conversations in two spellings, system column": (
        {"chosen": [{"from": "human", "value": QUESTION}, CHOSEN], "rejected": [USER, REJECTED], "system": "简短"},
        [SYSTEM, USER],
    ),
    "alpaca": ({"instruction": QUESTION, **TEXTS}, [USER]),
    "alpaca, input, history, system": (
        {"instruction": "胸痛", "input": "怎么办？", "history": [["你好", "你好！"]], "system": "简短", **TEXTS},
        [SYSTEM, *BEFORE, {"role": "user", "content": "胸痛\n怎么办？"}],
    ),
    "question": ({"question": QUESTION, "response_chosen": GOOD, "response_rejected": BAD}, [USER]),
    "question, empty system and history": (
        {"system": "", "history": [], "question": QUESTION, "response_chosen": GOOD, "response_rejected": BAD},
        [USER],
    ),
    "question, history": (
        {"system": "简短", "history": [["你好", "你好！"]], "question": QUESTION, "chosen": GOOD, "rejected": BAD},
        [SYSTEM, *BEFORE, USER],
    ),
    "query": ({"query": QUESTION, "system_prompt": "简短", **TEXTS}, [SYSTEM, USER]),
    "conversations, system and history": (
        {"conversations": [USER], "system_prompt": "简短", "history": [["你好", "你好！"]], **TEXTS},
        [SYSTEM, *BEFORE, USER],
    ),
    "metadata": ({**ROW, "id": 3, "category": "急症", "language": "zh", "meta": {"required": [["120"]]}}, [USER]),
}

# What is wrong, a row, words of the reason, words of the remedy.
REFUSED = [
    ("not an object", "text", "not an object", "JSON object"),
    ("no answers", {"prompt": QUESTION}, "no field `chosen`", "`chosen` and `rejected`"),
    ("rows of fine-tuning", {"messages": [USER, CHOSEN]}, "no field `chosen`", "`chosen` and `rejected`"),
    ("no chosen", {"prompt": QUESTION, "rejected": BAD}, "no field `chosen`", "`chosen` and `rejected`"),
    ("no rejected", {"prompt": QUESTION, "chosen": GOOD}, "no field `rejected`", "`chosen` and `rejected`"),
    ("no response_rejected", {"question": QUESTION, "response_chosen": GOOD}, "no field `response_rejected`", "`resp"),
    ("answers of two kinds", {"prompt": QUESTION, "chosen": GOOD, "response_rejected": BAD}, "no field `rejected`", ""),
    ("both kinds", {**ROW, "response_chosen": GOOD}, "`response_chosen` next to `chosen`", "--ignore_fields resp"),
    ("equal", {"prompt": QUESTION, "chosen": GOOD, "rejected": GOOD}, "are the same answer", "no preference"),
    ("equal but for space", {"prompt": "Q", "chosen": "a b", "rejected": " a\n\nb "}, "are the same answer", "Remove"),
    (
        "equal, as text and as turn",
        {"prompt": "Q", "chosen": "a", "rejected": {"from": "gpt", "value": "a"}},
        "same answer",
        "",
    ),
    (
        "equal, whole conversations",
        {"chosen": [USER, CHOSEN], "rejected": [USER, CHOSEN]},
        "are the same answer",
        "Remove the row",
    ),
    (
        "equal calls in two spellings",
        {
            "prompt": "Q",
            "chosen": {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1, "b": 2}}'},
            "rejected": {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": '{"b":2, "a":1}'}}],
            },
        },
        "are the same answer",
        "Remove the row",
    ),
    ("empty", {"prompt": QUESTION, "chosen": GOOD, "rejected": " \n"}, "`rejected` is empty", "Remove the row"),
    ("null", {"prompt": QUESTION, "chosen": None, "rejected": BAD}, "no field `chosen`", "`chosen` and `rejected`"),
    (
        "true",
        {"prompt": QUESTION, "chosen": GOOD, "rejected": True},
        "`rejected` is empty or not text",
        "fill the field",
    ),
    ("empty response", {"question": "Q", "response_chosen": "", "response_rejected": BAD}, "`response_chosen` is", ""),
    (
        "empty turn",
        {"prompt": QUESTION, "chosen": {"from": "gpt", "value": ""}, "rejected": BAD},
        "`chosen`: turn 1 (gpt) is empty",
        "write the turn",
    ),
    (
        "unknown role",
        {"prompt": QUESTION, "chosen": GOOD, "rejected": [{"role": "robot", "content": BAD}]},
        "`rejected`: turn 1 has the unknown role 'robot'",
        "Roles are",
    ),
    ("no turn", {"prompt": QUESTION, "chosen": [], "rejected": BAD}, "`chosen` has 0 turns", "only the answer"),
    (
        "several turns",
        {"prompt": QUESTION, "chosen": [calling("上海"), RESULT, CHOSEN], "rejected": [REJECTED]},
        "`chosen` has 3 turns next to a prompt, expected one",
        "only the answer",
    ),
    (
        "another prompt next to whole conversations",
        {"prompt": "other", "chosen": [USER, CHOSEN], "rejected": [USER, REJECTED]},
        "`chosen` has 2 turns next to a prompt",
        "--ignore_fields prompt.",
    ),
    (
        "answer of the user",
        {"prompt": QUESTION, "chosen": CHOSEN, "rejected": USER},
        "`rejected` is a turn of the user, not an answer",
        "gpt, assistant, chatgpt",
    ),
    (
        "answer of a tool",
        {"prompt": QUESTION, "chosen": RESULT, "rejected": REJECTED},
        "`chosen` is a turn of the tool, not an answer",
        "gpt, assistant, chatgpt",
    ),
    (
        "prompt ends with the assistant",
        {"conversations": [*BEFORE, USER, CHOSEN], **TEXTS},
        "the prompt ends with a turn of the assistant",
        "Remove that turn: the answers are `chosen` and `rejected`",
    ),
    (
        "whole conversations of two answers in a row",
        {"chosen": [USER, CHOSEN, CHOSEN], "rejected": [USER, CHOSEN, REJECTED]},
        "the prompt ends with a turn of the assistant",
        "Remove that turn",
    ),
    (
        "third answer",
        {"instruction": QUESTION, "output": "other", **TEXTS},
        "`output` is a third",
        "--ignore_fields output.",
    ),
    ("third response", {**ROW, "response": "other"}, "`response` is a third answer", "--ignore_fields response."),
    ("two users", {"messages": [USER, USER], **TEXTS}, "turn 2 is user, expected assistant", "Turns are"),
    ("system alone", {"messages": [SYSTEM], **TEXTS}, "the last turn is system, expected user or tool", "missing turn"),
    (
        "empty list as prompt",
        {"prompt": [], **TEXTS},
        "`prompt` must be a list of turns, and is empty",
        "two turns",
    ),
    ("empty prompt", {"prompt": "", **TEXTS}, "`prompt` is empty", "Remove"),
    ("late system", {"prompt": [USER, CHOSEN, SYSTEM], **TEXTS}, "the last turn is system", "missing turn"),
    ("two systems", {**ROW, "system": "s", "system_prompt": "t"}, "both `system` and `system_prompt`", "Keep one"),
    ("history as text", {**ROW, "history": "你好"}, "`history` is not a list", "[[question, answer], ...]"),
    ("broken tools", {**ROW, "tools": "[{"}, "the column `tools` is broken JSON", "Fix"),
    ("texts alone", {"chosen": "a", "rejected": "b"}, "`chosen` and `rejected` without a prompt", "Add the question"),
    ("answers alone", {"chosen": [CHOSEN], "rejected": [REJECTED]}, "without a prompt", "Add the question as `prompt`"),
    ("one conversation", {"chosen": [USER, CHOSEN], "rejected": BAD}, "without a prompt", "Add the question"),
    (
        "conversations of other questions",
        {"chosen": [USER, CHOSEN], "rejected": [BEFORE[0], REJECTED]},
        "differ in turn 1, which is not the last of both",
        "share all turns but the last",
    ),
    (
        "conversations of other lengths",
        {"chosen": [USER, CHOSEN], "rejected": [USER, REJECTED, USER, CHOSEN]},
        "differ in turn 2, which is not the last of both",
        "share all turns but the last",
    ),
]


def load(place, **flags):
    return load_data(DataArguments(train_file_dir=str(place), **flags), to_preference)


def pair(number: int, **more) -> dict:
    return {"prompt": f"Q{number}", "chosen": f"good {number}", "rejected": f"bad {number}", **more}


def questions(rows) -> list[str]:
    return [row["messages"][-1]["content"] for row in rows]


@pytest.mark.parametrize(("row", "prompt"), FORMATS.values(), ids=FORMATS)
def test_every_format_becomes_prompt_and_answers(row, prompt):
    before = json.dumps(row)
    assert to_preference(row) == {"messages": prompt, "tools": None, "chosen": CHOSEN, "rejected": REJECTED}
    assert json.dumps(row) == before


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [USER], "chosen": called("上海"), "rejected": [called("北京")], "tools": json.dumps([TOOL])},
        {"messages": [USER], "chosen": [calling("上海")], "rejected": calling("北京"), "tools": TOOLS},
        {"chosen": [USER, calling("上海")], "rejected": [USER, called("北京")], "tools": TOOLS},
    ],
)
def test_an_answer_may_be_a_tool_call(row):
    expected = {"messages": [USER], "tools": TOOLS, "chosen": calling("上海"), "rejected": calling("北京")}
    assert to_preference(row) == expected


def test_the_prompt_may_end_with_the_result_of_a_tool():
    turns = [USER, calling("上海"), RESULT]
    expected = {"messages": turns, "tools": TOOLS, "chosen": CHOSEN, "rejected": REJECTED}
    assert to_preference({"messages": turns, "tools": TOOLS, **TEXTS}) == expected
    whole = {"chosen": [*turns, CHOSEN], "rejected": [*turns, REJECTED], "tools": TOOLS}
    assert to_preference(whole) == expected


def test_answers_differ_by_thoughts_values_and_types_of_arguments():
    thinking = {**CHOSEN, "reasoning_content": "危险"}
    assert to_preference({"messages": [USER], "chosen": thinking, "rejected": CHOSEN})["chosen"] == thinking
    turns = [{"from": "function_call", "value": f'{{"name": "f", "arguments": {{"a": {a}}}}}'} for a in ("1", "true")]
    row = to_preference({"messages": [USER], "chosen": turns[0], "rejected": turns[1]})
    assert [row[name]["tool_calls"][0]["function"]["arguments"]["a"] for name in ("chosen", "rejected")] == [1, True]


@pytest.mark.parametrize(("row", "reason", "remedy"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_unusable_rows_are_refused(row, reason, remedy):
    with pytest.raises(RowError) as refused:
        to_preference(row)
    assert reason in refused.value.reason and remedy in refused.value.remedy
    assert refused.value.remedy.endswith(".") and not refused.value.reason.endswith(".")
    assert "\n" not in refused.value.value and len(refused.value.value) <= 60
    assert refused.value.value or any(word in refused.value.reason for word in ("empty", "third"))


def test_an_ignored_field_is_as_if_it_were_not_there():
    assert to_preference({**ROW, "margin": 1}, frozenset({"margin"})) == to_preference(ROW)
    assert to_preference({**ROW, "output": ""}, frozenset({"output"})) == to_preference(ROW)
    twice = {"prompt": QUESTION, "messages": [USER, CHOSEN], "chosen": [USER, CHOSEN], "rejected": [USER, REJECTED]}
    assert to_preference(twice, frozenset({"prompt", "messages"})) == to_preference(ROW)


def test_fine_tuning_takes_system_and_history_in_every_format():
    opening = {"system_prompt": "简短", "history": [["你好", "你好！"]]}
    expected = {"messages": [SYSTEM, *BEFORE, USER, CHOSEN], "tools": None}
    assert to_messages({"conversations": [USER, CHOSEN], **opening}) == expected
    assert to_messages({"prompt": QUESTION, "response": GOOD, **opening}) == expected
    assert to_messages({"instruction": QUESTION, "output": GOOD, **opening}) == expected


@pytest.mark.parametrize("page", ["data/README.md", "data/README_zh.md"])
def test_the_pages_show_rows_that_can_be_used(page):
    lines = [line for line in (ROOT / page).read_text(encoding="utf-8").splitlines() if "rejected" in line]
    rows = [to_preference(json.loads(line)) for line in lines if line.startswith("{")]
    assert len(rows) == 7
    assert [row["messages"] for row in rows[:3]] == [rows[4]["messages"]] * 3 == [rows[5]["messages"]] * 3
    assert rows[6]["tools"] and rows[6]["chosen"]["tool_calls"]


# --- files -----------------------------------------------------------------------------------------------------------


def test_formats_are_mixed_row_by_row_in_one_file(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [row for row, _ in FORMATS.values()])
    data = load(path)
    assert [row["messages"] for row in data.train] == [prompt for _, prompt in FORMATS.values()]
    assert [place_of(row) for row in data.train] == [(str(path), number, 0) for number in range(1, len(FORMATS) + 1)]
    assert data.problems == []


def test_all_problems_come_with_place_and_remedy(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [ROW, *(row for _, row, _, _ in REFUSED)])
    data = load(path)
    assert len(data.train) == 1
    assert [problem.place for problem in data.problems] == [(str(path), n, 0) for n in range(2, len(REFUSED) + 2)]
    with pytest.raises(DataError, match=rf"{len(REFUSED)} problem\(s\)") as refused:
        data.settle(DataArguments())
    assert f"{path}:3: no field `chosen`" in str(refused.value) and "--skip_bad_rows True" in str(refused.value)
    data.settle(DataArguments(skip_bad_rows=True))
    account = data.account["train"][0]
    assert (account.rows, account.used, account.left_out) == (len(REFUSED) + 1, 1, {"unusable": len(REFUSED)})


def test_gb18030_is_read_with_a_notice(tmp_path, log):
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(ROW, ensure_ascii=False).encode("gb18030"))
    (row,) = load(path).train
    assert {name: row[name] for name in row if name != "place"} == to_preference(ROW)
    assert any(line.startswith(f"{path} is not UTF-8; it was read as gb18030") for line in log)


# --- held-out prompts ------------------------------------------------------------------------------------------------


def test_a_held_out_prompt_that_is_trained_on_is_refused(tmp_path, log):
    train = write_jsonl(tmp_path / "train.jsonl", [pair(1), pair(2)])
    # Another spelling, white space and other answers do not make another prompt.
    leak = {"conversations": [{"from": "human", "value": " Q2\n"}], "chosen": "x", "rejected": "y"}
    held_out = write_jsonl(tmp_path / "validation.jsonl", [pair(3), leak])
    with pytest.raises(UserError) as refused:
        load(tmp_path)
    assert "1 of 2 held-out prompts are also trained on" in str(refused.value)
    assert f"{held_out}:2 has the prompt of {train}:2" in str(refused.value)
    assert len(load(tmp_path, allow_overlap=True).validation) == 2
    assert "Evaluation will look better than it is" in log[-1]


@pytest.mark.parametrize(
    "other",
    [
        pair(2, system="简短"),
        pair(2, history=[["你好", "你好！"]]),
        pair(2, tools=[TOOL]),
    ],
    ids=["system", "history", "tools"],
)
def test_another_opening_is_another_prompt(tmp_path, other):
    write_jsonl(tmp_path / "train.jsonl", [pair(2)])
    write_jsonl(tmp_path / "validation.jsonl", [other])
    assert len(load(tmp_path).validation) == 1


def test_pairs_of_one_prompt_stay_on_one_side_of_the_split(tmp_path):
    rows = [{**pair(number % 20), "chosen": f"answer {number}"} for number in range(60)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    for seed in range(5):
        arguments = DataArguments(train_file_dir=path, validation_split_percentage=10)
        data = load_data(arguments, to_preference, seed=seed)
        assert len(data.validation) == 6 and len(data.train) == 54
        assert len(set(questions(data.validation))) == 2
        assert not set(questions(data.validation)) & set(questions(data.train))


def test_conversations_with_one_question_and_other_answers_are_still_told_apart(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"prompt": "Q", "response": "A"}])
    write_jsonl(tmp_path / "validation.jsonl", [{"prompt": "Q", "response": "B"}])
    data = load_data(DataArguments(train_file_dir=str(tmp_path)), to_messages)
    assert len(data.train) == len(data.validation) == 1
