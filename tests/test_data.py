"""Rows of every format become the same conversation; what cannot be used is named, counted, and never trained on."""

import builtins
import io
import json
import re
import tracemalloc
from collections import Counter
from pathlib import Path

from medicalgpt.args import DataArguments
from medicalgpt.data.loading import load_data
from medicalgpt.errors import UserError
from medicalgpt.files import hash_file
from medicalgpt.formats.conversion import to_messages, to_prompt, to_text
from medicalgpt.readers import text_files
from medicalgpt.readers.folders import find_files
from medicalgpt.readers.problems import DataError, Place, Problem, RowError, SourceRow, place_of
from medicalgpt.readers.sources import read_rows
from medicalgpt.readers.text_files import open_text
from tests.helpers import write_jsonl

import pytest

QUESTION, ANSWER = {"role": "user", "content": "什么是感冒？"}, {"role": "assistant", "content": "一种病毒感染。"}
SYSTEM = {"role": "system", "content": "简短"}
TOOL = {"name": "weather", "description": "Weather.", "parameters": {"type": "object", "properties": {}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "上海"}}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": '{"sky": "rain"}'}
PAIR = {"prompt": "Q", "response": "A"}

FORMATS = {
    "sharegpt": (
        {
            "conversations": [
                {"from": "human", "value": QUESTION["content"]},
                {"from": "gpt", "value": "一种病毒感染。"},
            ]
        },
        [QUESTION, ANSWER],
    ),
    "sharegpt, role and content": ({"conversations": [QUESTION, ANSWER]}, [QUESTION, ANSWER]),
    "sharegpt, system column": (
        {"conversations": [QUESTION, ANSWER], "system": "简短", "id": "7"},
        [SYSTEM, QUESTION, ANSWER],
    ),
    "sharegpt, system_prompt column": (
        {"conversations": [QUESTION, ANSWER], "system_prompt": "简短"},
        [SYSTEM, QUESTION, ANSWER],
    ),
    "sharegpt, empty system column": ({"conversations": [QUESTION, ANSWER], "system": ""}, [QUESTION, ANSWER]),
    "sharegpt, system turn": (
        {"conversations": [{"from": "system", "value": "简短"}, QUESTION, ANSWER]},
        [SYSTEM, QUESTION, ANSWER],
    ),
    "sharegpt, many turns": (
        {"conversations": [QUESTION, ANSWER, QUESTION, ANSWER]},
        [QUESTION, ANSWER, QUESTION, ANSWER],
    ),
    "openai": ({"messages": [SYSTEM, QUESTION, ANSWER]}, [SYSTEM, QUESTION, ANSWER]),
    "openai, thoughts": (
        {"messages": [QUESTION, {**ANSWER, "reasoning_content": "hm"}]},
        [QUESTION, {**ANSWER, "reasoning_content": "hm"}],
    ),
    "openai, weight 1": ({"messages": [QUESTION, {**ANSWER, "weight": 1}]}, [QUESTION, ANSWER]),
    "alpaca": ({"instruction": QUESTION["content"], "output": "一种病毒感染。"}, [QUESTION, ANSWER]),
    "alpaca, empty input": (
        {"instruction": QUESTION["content"], "input": "", "output": "一种病毒感染。", "history": []},
        [QUESTION, ANSWER],
    ),
    "alpaca, input, history, system": (
        {"instruction": "Q2", "input": "I", "output": "A2", "history": [["Q1", "A1"]], "system": "简短"},
        [
            SYSTEM,
            {"role": "user", "content": "Q1"},
            {"role": "assistant", "content": "A1"},
            {"role": "user", "content": "Q2\nI"},
            {"role": "assistant", "content": "A2"},
        ],
    ),
    "prompt and response": (PAIR, [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]),
    "prompt and completion": (
        {"prompt": "Q", "completion": "A"},
        [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}],
    ),
    "prompt and completion of messages": (
        {"prompt": [QUESTION], "completion": [ANSWER], "system": "简短"},
        [SYSTEM, QUESTION, ANSWER],
    ),
    "query and response": (
        {"query": "Q", "response": "A", "system": "简短"},
        [SYSTEM, {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}],
    ),
    "question and answer": (
        {"question": "Q", "answer": "A", "source": "x", "category": "y"},
        [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}],
    ),
}
TOOL_ROWS = {
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": QUESTION["content"]},
            {"from": "function_call", "value": json.dumps(CALL["function"])},
            {"from": "observation", "value": RESULT["content"]},
            {"from": "gpt", "value": ANSWER["content"]},
        ],
        "tools": json.dumps([TOOL]),
    },
    "openai": {
        "messages": [
            QUESTION,
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "上海"}'}}
                ],
            },
            {"role": "tool", "tool_call_id": "1", "name": "weather", "content": RESULT["content"]},
            ANSWER,
        ],
        "tools": [{"type": "function", "function": TOOL}],
    },
}
# What is wrong, a row, words of the reason, words of the remedy.
REFUSED = [
    ("not an object", "a string", "not an object", "JSON object"),
    ("list", [1], "not an object", "JSON object"),
    ("no format", {"foo": 1}, "no known chat format (fields: foo)", "data/README.md"),
    ("text row", {"text": "t"}, "a document, not a conversation", "pretraining.py"),
    ("misspelled field", {**PAIR, "sytem": "s"}, "`sytem` is not read; `system` would be", "--ignore_fields sytem"),
    ("no turns", {"messages": []}, "is empty or not a list", "two turns"),
    ("turns as text", {"messages": "hello"}, "must be a list of turns", "two turns"),
    ("turn as text", {"messages": ["hello"]}, "turn 1 is not an object", '{"from"'),
    (
        "turn as text in a prompt",
        {"prompt": [{"role": "user", "content": "Q"}, "x"], "completion": "A"},
        "turn 2 is not",
        "",
    ),
    ("unknown role", {"messages": [{"role": "robot", "content": "x"}]}, "unknown role 'robot'", "gpt"),
    ("no role", {"messages": [{"content": "x"}]}, "unknown role None", "gpt"),
    ("two roles", {"messages": [{**QUESTION, "from": "gpt"}]}, "two roles, `from` and `role`", "Keep one"),
    ("two texts", {"messages": [{**QUESTION, "value": "other"}]}, "two texts, `value` and `content`", "Keep one"),
    (
        "empty turn",
        {"messages": [QUESTION, {"role": "assistant", "content": " \n"}]},
        "turn 2 (assistant) is empty",
        "",
    ),
    ("turn without text", {"messages": [{"role": "user"}]}, "turn 1 (user) is empty", "Remove"),
    (
        "content of an image",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}]},
        "turn 1 (user) has image_url, and only text is trained on",
        "--skip_bad_rows True",
    ),
    (
        "images of a turn",
        {"messages": [{**QUESTION, "images": ["a.png"]}, ANSWER]},
        "has images, and only text",
        "--skip",
    ),
    ("user calls", {"messages": [{**QUESTION, "tool_calls": [CALL]}]}, "turn 1 (user) has tool calls", "assistant"),
    ("weight 0", {"messages": [QUESTION, {**ANSWER, "weight": 0}]}, "no turn of the row is trained on", "Remove"),
    (
        "half a weight",
        {"messages": [QUESTION, {**ANSWER, "weight": 0.5}]},
        "the weight 0.5, which is neither",
        "in full",
    ),
    (
        "weight as text",
        {"messages": [QUESTION, {**ANSWER, "weight": "0"}]},
        "the weight '0', which is neither",
        "in full",
    ),
    ("two masks", {"messages": [QUESTION, {**ANSWER, "train": True, "loss": 0}]}, "contradict each other", "Keep one"),
    ("a question that is trained", {"messages": [{**QUESTION, "train": True}, ANSWER]}, "only answers are", "Remove"),
    ("only an assistant", {"messages": [ANSWER]}, "no turn of the row is trained on", "Remove"),
    ("two users", {"messages": [QUESTION, QUESTION, ANSWER]}, "turn 2 is user, expected assistant", "Turns are"),
    ("system before a result", {"messages": [QUESTION, CALLED, SYSTEM, RESULT, ANSWER]}, "turn 3 is system", "Turns"),
    ("two systems", {"messages": [SYSTEM, QUESTION, ANSWER], "system": "s"}, "a system turn next to `system`", "one"),
    ("no answer", {"messages": [QUESTION]}, "the last turn is user, expected assistant", "missing turn"),
    ("ends with result", {"messages": [QUESTION, CALLED, RESULT]}, "the last turn is tool", "missing turn"),
    ("result without call", {"messages": [QUESTION, RESULT, ANSWER]}, "turn 2 is tool, expected assistant", ""),
    ("call without result", {"messages": [QUESTION, CALLED, ANSWER]}, "turn 3 is assistant, expected tool", ""),
    ("broken call", {"messages": [QUESTION, {"role": "function_call", "value": "{x"}]}, "call is broken JSON", "Fix"),
    ("no call", {"messages": [QUESTION, {"role": "function_call", "value": "[]"}]}, "no function is called", "Write"),
    (
        "call without name",
        {"messages": [QUESTION, {"from": "function_call", "value": '{"arguments": {}}'}]},
        "needs a name",
        "Write",
    ),
    (
        "call of text",
        {"messages": [QUESTION, {"from": "assistant", "tool_calls": [{"function": "f"}]}]},
        "needs a name",
        "Write",
    ),
    (
        "arguments under another name",
        {"messages": [QUESTION, {"from": "function_call", "value": '{"name": "f", "parameters": {"a": 1}}'}]},
        "unknown fields ['parameters']",
        "arguments",
    ),
    (
        "arguments as list",
        {"messages": [QUESTION, {"from": "function_call", "value": '{"name": "f", "arguments": [1]}'}]},
        "arguments are not an object",
        "Write",
    ),
    (
        "half a character in arguments",
        {"messages": [QUESTION, {"from": "function_call", "value": '{"name": "f", "arguments": {"a": "\\ud83d"}}'}]},
        "half a character",
        "Fix",
    ),
    ("broken tools", {**FORMATS["openai"][0], "tools": "[{"}, "the column `tools` is broken JSON", "Fix"),
    ("tools as object", {**FORMATS["openai"][0], "tools": TOOL}, "`tools` is not a list", "Write"),
    ("tool without name", {**FORMATS["openai"][0], "tools": [{"parameters": {}}]}, "a tool has no name", "name"),
    ("alpaca without output", {"instruction": "Q"}, "`instruction` without an answer", "output"),
    ("alpaca, null output", {"instruction": "Q", "output": None}, "`instruction` without an answer", "output"),
    ("alpaca, misspelled", {"instruction": "Q", "outptu": "A"}, "no field `output`, but `outptu`", "`output`"),
    ("alpaca, input of parts", {"instruction": "Q", "input": [{}], "output": "A"}, "`input` is not text", "string"),
    (
        "alpaca, history as text",
        {"instruction": "Q", "output": "A", "history": "Q1"},
        "`history` is not a list",
        "Write",
    ),
    ("alpaca, triple", {"instruction": "Q", "output": "A", "history": [["a", "b", "c"]]}, "other than pairs", "Write"),
    ("alpaca, empty history", {"instruction": "Q", "output": "A", "history": [["a", ""]]}, "`history` is empty", ""),
    ("empty prompt", {"prompt": "", "response": "A"}, "`prompt` is empty", "Remove"),
    ("empty response", {"prompt": "Q", "response": " "}, "`response` is empty", "Remove"),
    ("response as object", {"prompt": "Q", "response": {"a": 1}}, "`response` is empty or not text", "Remove"),
    ("system as object", {**PAIR, "system": {"s": 1}}, "`system` is empty or not text", "Remove"),
]


def load(place, convert=to_messages, document_unit="auto", seed=42, **flags):
    return load_data(DataArguments(train_file_dir=str(place), **flags), convert, document_unit=document_unit, seed=seed)


def pairs(*numbers, **more):
    return [{"prompt": f"Q{number}", "response": f"A{number}", **more} for number in numbers]


def balance(data) -> dict[str, list[tuple]]:
    """Rows, used and left out for each file, after a check that the balance agrees with the rows that are there."""
    result = {}
    for side, accounts in data.account.items():
        for account in accounts:
            there = [row for row in getattr(data, side) if row["place"]["file"] == account.file]
            assert account.rows == account.used + sum(account.left_out.values())
            assert account.used == len(there)
        result[side] = [(Path(a.file).name, a.rows, a.used, dict(a.left_out)) for a in accounts]
    return result


# --- conversion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("row", "expected"), FORMATS.values(), ids=FORMATS)
def test_every_format_becomes_messages(row, expected):
    assert to_messages(row) == {"messages": expected, "tools": None}


@pytest.mark.parametrize("row", TOOL_ROWS.values(), ids=TOOL_ROWS)
def test_tool_calls_of_both_formats_become_the_same(row):
    assert to_messages(row) == {
        "messages": [QUESTION, CALLED, RESULT, ANSWER],
        "tools": [{"type": "function", "function": TOOL}],
    }


def test_several_calls_and_results():
    two = [CALL["function"], {"name": "time", "arguments": "{}"}]
    row = {
        "conversations": [
            QUESTION,
            {"from": "function_call", "value": json.dumps(two)},
            RESULT,
            RESULT,
            ANSWER,
            QUESTION,
            ANSWER,
        ]
    }
    calls = to_messages(row)["messages"][1]["tool_calls"]
    assert [call["function"] for call in calls] == [CALL["function"], {"name": "time", "arguments": {}}]


def test_formats_are_mixed_row_by_row_in_one_file(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [row for row, _ in FORMATS.values()])
    data = load(path, allow_overlap=True)
    assert [row["messages"] for row in data.train] == [messages for _, messages in FORMATS.values()]
    assert [place_of(row) for row in data.train] == [(str(path), number, 0) for number in range(1, len(FORMATS) + 1)]
    assert data.problems == []


@pytest.mark.parametrize(("row", "reason", "remedy"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_unusable_rows_are_refused(row, reason, remedy):
    with pytest.raises(RowError) as refused:
        to_messages(row)
    assert reason in refused.value.reason and remedy in refused.value.remedy
    assert refused.value.remedy.endswith(".") and not refused.value.reason.endswith(".")
    assert "\n" not in refused.value.value and len(refused.value.value) <= 60
    assert refused.value.value or "is empty" in reason


def test_ignored_fields_may_be_there():
    assert to_messages({**PAIR, "score": 3}, frozenset({"score"})) == to_messages(PAIR)
    assert to_text({"text": "t", "url": "u"}, frozenset({"url"})) == to_text({"text": "t", "lang": "zh"})


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"text": ""}, "`text` is empty"),
        ({"text": None}, "no field `text`"),
        ({"text": ["t"]}, "`text` is empty or not a string"),
        ({"text": "t", "images": ["a.png"]}, "only text is trained on"),
        ({"messages": []}, "no field `text`"),
        (" \t", "`text` is empty"),
        (["t"], "not an object"),
    ],
)
def test_unusable_documents_are_refused(value, reason):
    with pytest.raises(RowError, match=re.escape(reason)):
        to_text(value)


@pytest.mark.parametrize("row", ["Q", {"prompt": "Q"}, {"query": "Q"}, {"question": "Q"}, {"instruction": "Q"}, PAIR])
def test_a_question_alone_is_a_prompt(row):
    prompt = to_prompt(row)
    assert prompt["messages"] == [{"role": "user", "content": "Q"}]
    assert prompt["reference"] == ("A" if row is PAIR else None)


def test_a_prompt_must_end_with_a_question():
    assert to_prompt({"messages": [QUESTION, CALLED, RESULT]})["messages"][-1] == RESULT
    with pytest.raises(RowError, match="the last turn is nothing"):
        to_prompt({"messages": [ANSWER]})


# --- files -----------------------------------------------------------------------------------------------------------


def test_broken_json_names_line_and_column(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [PAIR, "", '{"prompt": "Q", "response": }', PAIR])
    rows = list(read_rows(path))
    assert [str(row.place) for row in rows] == [f"{path}:1", f"{path}:3", f"{path}:4"]
    assert isinstance(rows[1], Problem)
    assert str(rows[1]) == (
        f'{path}:3: broken JSON at column 29: Expecting value [: "Q", "response": }}]. Fix the line.'
    )


@pytest.mark.parametrize("indent", [None, 2])
def test_json_lists_have_the_lines_of_their_rows(tmp_path, indent):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "一\n二"}, {"text": "t"}, "plain"], indent=indent), encoding="utf-8")
    rows = list(read_rows(path))
    assert [row.value for row in rows] == [{"text": "一\n二"}, {"text": "t"}, "plain"]
    assert [row.place.line for row in rows] == ([2, 5, 8] if indent else [1, 1, 1])
    assert len({row.place for row in rows}) == 3
    assert str(rows[1].place) == f"{path}:{5 if indent else 1} (row 2)"


def test_one_json_object_is_one_row(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('\n\n{"text": "t"}\n', encoding="utf-8")
    assert list(read_rows(path)) == [SourceRow(Place(str(path), 3), {"text": "t"})]


@pytest.mark.parametrize(
    ("text", "line", "reason", "rows"),
    [
        ('[\n{"text": "a"},\n{"text": }\n]', 3, "column 10: Expecting value", 1),
        ('[{"text": "a"}\n{"text": "b"}]', 2, "expected ',' or ']'", 1),
        ('[{"text": "a"},\n]', 2, "expected another row after ','", 1),
        ('[{"text": "a"}]\n[{"text": "b"}]', 2, "more text after the list", 1),
        ('[{"text": "a"}', 1, "expected ',' or ']'", 1),
        ("not json", 1, "Expecting value", 0),
    ],
)
def test_broken_json_files(tmp_path, text, line, reason, rows):
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    *whole, problem = read_rows(path)
    assert len(whole) == rows and "\n" not in str(problem)
    assert problem.place == (str(path), line, 0) and reason in problem.reason and "were not read" in problem.remedy
    # What follows cannot be counted, so it cannot be left out.
    data = load(path, to_text, skip_bad_rows=True)
    with pytest.raises(DataError, match="broken JSON"):
        data.settle(DataArguments(skip_bad_rows=True))


def test_half_a_character_is_a_problem_of_its_row(tmp_path):
    path = write_jsonl(
        tmp_path / "a.jsonl", ['{"text": "\\ud83d\\ude00"}', '{"text": "cut \\uD83D"}', '{"text": "\\\\ud83d"}']
    )
    whole, torn, plain = read_rows(path)
    assert (whole.value, plain.value) == ({"text": "😀"}, {"text": "\\ud83d"})
    assert str(torn) == f"{path}:2: half a character, \\ud83d, without its other half. Fix the text."


def test_gb18030_is_read_with_a_notice(tmp_path, log):
    path = tmp_path / "a.txt"
    path.write_bytes("感冒是病毒感染。\n".encode("gb18030"))
    assert [row.value for row in read_rows(path)] == ["感冒是病毒感染。"]
    assert log == [f"{path} is not UTF-8; it was read as gb18030: 感冒是病毒感染。"]


@pytest.mark.parametrize("suffix", [".jsonl", ".txt", ".md", ".json"])
def test_one_line_that_is_no_utf8_makes_the_whole_file_gb18030(tmp_path, log, suffix):
    """The first line is text in both encodings: the bytes of 拢 in gb18030 are those of £ in UTF-8."""
    first, second = "拢\n".encode("gb18030"), "病毒\n".encode("gb18030")
    assert first.decode("utf-8") == "£\n"
    path = tmp_path / f"a{suffix}"
    quote = b'"' if "json" in suffix else b""
    lines = [quote + line.rstrip() + quote for line in (first, second)]
    path.write_bytes(b"[" + b",".join(lines) + b"]" if suffix == ".json" else b"\n".join(lines))
    text = "".join(row.value for row in read_rows(path))
    assert text.replace("\n", "") == "拢病毒"
    assert len(log) == 1 and log[0].startswith(f"{path} is not UTF-8; it was read as gb18030: ") and "拢" in log[0]


def test_other_encodings_are_refused_with_the_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ntwo \xff\xff\n")
    with pytest.raises(UserError, match=re.escape(f"{path}:2: neither UTF-8 nor certainly")):
        open_text(path)


def opened(monkeypatch) -> Counter:
    """How often each file was opened since."""
    counts, real = Counter(), io.open

    def counting(file, *args, **kwargs):
        counts[str(file)] += 1
        return real(file, *args, **kwargs)

    for module in (io, builtins):
        monkeypatch.setattr(module, "open", counting)
    return counts


@pytest.mark.parametrize(("held", "times"), [(1_000_000, 1), (10, 2)])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".txt", ".md"])
def test_a_file_is_read_once_for_hash_encoding_and_rows(tmp_path, monkeypatch, suffix, held, times):
    """A file that is too large to be held is read once more for its rows, with the same result."""
    path = tmp_path / f"rows{suffix}"
    path.write_text('{"text": "感冒"}\n' if "json" in suffix else "感冒是病毒感染。\n", encoding="utf-8")
    expected = hash_file(path)
    monkeypatch.setattr(text_files, "MAX_HELD_BYTES", held)
    counts = opened(monkeypatch)
    data = load(path, to_text)
    # The first lines say what a .json or .txt file has, and whether those of a text are wrapped.
    assert counts[str(path)] == times + {".json": 1, ".txt": 2}.get(suffix, 0) * (held < 100)
    assert len(data.train) == 1 and data.account["train"][0].sha256 == expected


def test_a_character_on_the_border_of_two_blocks_is_one(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 4)
    for held in (0, 100):
        monkeypatch.setattr(text_files, "MAX_HELD_BYTES", held)
        for encoding, found in (("utf-8", "utf-8-sig"), ("gb18030", "gb18030")):
            (tmp_path / "a.txt").write_bytes("感冒是病毒感染。".encode(encoding))
            file = open_text(tmp_path / "a.txt")
            assert file.encoding == found and list(file.lines()) == [(1, "感冒是病毒感染。")]
    (tmp_path / "a.txt").write_bytes("感冒".encode()[:-1])
    with pytest.raises(UserError, match="a.txt:1: neither"):
        open_text(tmp_path / "a.txt")


def test_large_files_are_read_by_line(tmp_path, monkeypatch):
    """What a file takes in memory does not grow with it; rows that are not used take nothing."""
    monkeypatch.setattr(text_files, "MAX_HELD_BYTES", 0)
    peaks = []
    for count in (200, 2_000):
        path = write_jsonl(tmp_path / f"{count}.jsonl", [{"text": "x" * 1000}] * count)
        text = tmp_path / f"{count}.txt"
        text.write_text(f"{'x' * 1000}\n" * count, encoding="utf-8")
        for place in (path, text):
            tracemalloc.start()
            assert sum(1 for _ in read_rows(place)) == count
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert max(peaks) < 200_000


def test_byte_order_mark_is_no_text(tmp_path):
    for name, expected in (("a.jsonl", {"text": "t"}), ("a.json", {"text": "t"})):
        (tmp_path / name).write_text('{"text": "t"}\n', encoding="utf-8-sig")
        assert [row.value for row in read_rows(tmp_path / name)] == [expected]
    (tmp_path / "a.txt").write_text("t\n", encoding="utf-8-sig")
    assert [row.value for row in read_rows(tmp_path / "a.txt")] == ["t"]


def test_line_separators_inside_a_string_end_no_row(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "one\u2028two\x85three\x0cfour"}, {"text": "t"}])
    rows = list(read_rows(path))
    assert [row.place.line for row in rows] == [1, 2] and rows[0].value["text"].startswith("one\u2028two")


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("unit", "name", "expected"),
    [
        ("auto", "a.txt", [(1, "one"), (2, "two"), (5, "three"), (7, "  four")]),
        ("auto", "a.md", [(1, "one\ntwo\n\n\nthree\n \n  four")]),
        ("line", "a.md", [(1, "one"), (2, "two"), (5, "three"), (7, "  four")]),
        ("paragraph", "a.txt", [(1, "one\ntwo"), (5, "three"), (7, "  four")]),
        ("file", "a.txt", [(1, "one\ntwo\n\n\nthree\n \n  four")]),
    ],
)
def test_document_units(tmp_path, unit, name, expected, newline):
    text = "one\ntwo\n\n\nthree\n \n  four\n"
    (tmp_path / name).write_bytes(text.replace("\n", newline).encode())
    assert [(row.place.line, row.value) for row in read_rows(tmp_path / name, unit)] == expected
    data = load(tmp_path / name, to_text, document_unit=unit)
    assert [row["text"] for row in data.train] == [text for _, text in expected]


def test_files_are_found_in_subfolders_in_order(tmp_path):
    for name in ("b.txt", "sub/a.JSONL", "a.md", "README.md", ".hidden/c.txt", "sub/.d.txt", "notes.pdf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x", encoding="utf-8")
    assert [str(path.relative_to(tmp_path)) for path in find_files(str(tmp_path))] == ["a.md", "b.txt", "sub/a.JSONL"]


def test_nothing_to_read_is_said(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n \n", encoding="utf-8")
    (tmp_path / "a.pdf").write_text("x", encoding="utf-8")
    (tmp_path / "folder").mkdir()
    for place, part in (
        (tmp_path / "nowhere", "no such file or folder"),
        (tmp_path / "empty.jsonl", "empty.jsonl is empty"),
        (tmp_path / "a.pdf", "the suffix must be one of"),
        (tmp_path / "folder", "has no data files"),
    ):
        with pytest.raises(UserError, match=part):
            load(place)


def test_data_is_named_exactly_once(tmp_path):
    for flags in ({}, {"train_file_dir": str(tmp_path), "dataset_name": "a/b"}):
        with pytest.raises(UserError, match="exactly one of --train_file_dir, --dataset_name and --prepared_dir"):
            load_data(DataArguments(**flags), to_text)


# --- train and validation --------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    write_jsonl(tmp_path / "all" / "a.jsonl", pairs(1, 2, 3))
    write_jsonl(tmp_path / "all" / "testimony.jsonl", pairs(4))
    for number, name in enumerate(("validation", "valid-0", "val_1", "dev", "eval", "TEST.part", "sub/test"), start=10):
        write_jsonl(tmp_path / "all" / f"{name}.jsonl", pairs(number))
    return tmp_path


def test_files_with_held_out_names_are_never_trained_on(folder, log):
    data = load(folder / "all")
    assert [name for name, *_ in balance(data)["train"]] == ["a.jsonl", "testimony.jsonl"]
    assert len(data.validation) == 5
    assert "held out by their names, never trained on" in log[0] and "val_1.jsonl" in log[0]
    # A test set is not validated on where there is a validation set.
    assert "neither trained on nor evaluated" in log[2] and "TEST.part.jsonl" in log[2] and "sub/test.jsonl" in log[2]
    # Naming the same folder for both sides is the same.
    assert list(load(folder / "all", validation_file_dir=str(folder / "all")).validation) == list(data.validation)


def test_the_training_folder_as_validation_folder_has_a_safe_way_out(tmp_path):
    """As in the launch scripts of MedicalGPT. The advice is followed, and then rows are held out."""
    write_jsonl(tmp_path / "all" / "rows.jsonl", pairs(*range(40)))
    place = str(tmp_path / "all")
    with pytest.raises(UserError, match="^all 10 held-out rows are also trained on") as refused:
        load(tmp_path / "all", validation_file_dir=place, max_eval_samples=10)
    remedy = str(refused.value).splitlines()[-1]
    flag, value = re.search(r"Hold out others: --(\w+) (\d+) instead of --validation_file_dir", remedy).groups()
    data = load(tmp_path / "all", **{flag: float(value)})
    assert len(data.validation) == round(0.05 * (len(data.train) + len(data.validation))) > 0


def test_an_explicit_validation_place_wins(folder):
    write_jsonl(folder / "other" / "rows.jsonl", pairs(20))
    write_jsonl(folder / "other" / "test.jsonl", pairs(21))
    data = load(folder / "all", validation_file_dir=str(folder / "other"))
    assert [name for name, *_ in balance(data)["validation"]] == ["rows.jsonl", "test.jsonl"]
    assert [name for name, *_ in balance(data)["train"]] == ["a.jsonl", "testimony.jsonl"]


def test_a_file_named_for_training_is_trained_on_whatever_its_name(folder):
    data = load(folder / "all" / "validation.jsonl")
    assert (len(data.train), len(data.validation)) == (1, 0)


def test_only_held_out_files_is_refused(folder):
    with pytest.raises(UserError, match="has only held-out files"):
        load(folder / "all" / "sub")


def test_the_split_is_seeded_disjoint_and_complete(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", pairs(*range(40)))
    first = load(path, validation_split_percentage=10, seed=1)
    again = load(path, validation_split_percentage=10, seed=1)
    other = load(path, validation_split_percentage=10, seed=2)
    assert list(first.train) == list(again.train) and list(first.validation) == list(again.validation)
    assert list(first.validation) != list(other.validation)
    places = [place_of(row) for row in [*first.train, *first.validation]]
    assert len(first.validation) == 4 and len(set(places)) == len(places) == 40
    assert balance(first) == {
        "train": [("a.jsonl", 40, 36, {"moved to validation": 4})],
        "validation": [("a.jsonl", 4, 4, {})],
    }


def test_rows_that_occur_twice_stay_on_one_side_of_the_split(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", pairs(*range(20), *range(20)))
    for seed in range(5):
        data = load(path, validation_split_percentage=10, seed=seed)
        assert len(data.validation) == 4 and len(data.train) == 36


def test_the_split_gives_way_to_held_out_rows_and_has_bounds(folder):
    assert len(load(folder / "all", validation_split_percentage=50).validation) == 5
    with pytest.raises(UserError, match="between 0 and 100"):
        load(folder / "all" / "a.jsonl", validation_split_percentage=100)
    assert len(load(folder / "all" / "a.jsonl", validation_split_percentage=0.1).validation) == 1


def test_rows_on_both_sides_are_refused(folder, log):
    # The same conversation in another format is the same row.
    leak = {"conversations": [{"from": "human", "value": "Q2"}, {"from": "gpt", "value": "A2"}], "id": 3}
    path = write_jsonl(folder / "all" / "validation.jsonl", [*pairs(10), leak])
    train = folder / "all" / "a.jsonl"
    with pytest.raises(UserError) as refused:
        load(folder / "all")
    assert "1 of 6 held-out rows are also trained on" in str(refused.value)
    assert f"{path}:2 is also {train}:2" in str(refused.value) and "--allow_overlap True" in str(refused.value)
    assert len(load(folder / "all", allow_overlap=True).validation) == 6
    assert "Evaluation will look better than it is" in log[-1]


def test_memory_does_not_grow_with_the_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "MAX_HELD_BYTES", 0)
    peaks = {}
    for count in (200, 2_000):
        rows = [{"prompt": f"Q{number}", "response": "A" * 1000} for number in range(count)]
        write_jsonl(tmp_path / str(count) / "rows.jsonl", rows)
        write_jsonl(tmp_path / str(count) / "dev.jsonl", pairs(*range(count)))
        for flags in ({}, {"validation_split_percentage": 50, "validation_file_dir": None}):
            tracemalloc.start()
            place = tmp_path / str(count) / ("rows.jsonl" if flags else "")
            data = load(place, **flags)
            data.problems.append(Problem(place_of(data.train[7]), "", "", kind="too long"))
            data.settle(DataArguments(skip_long_rows=True))
            peaks[count, bool(flags)] = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert len(data.train) + len(data.validation) == count * (1 if flags else 2) - 1
    for split in (False, True):
        assert (peaks[2_000, split] - peaks[200, split]) / 1_800 < 200


def test_samples_are_counted_over_all_files(folder):
    data = load(folder / "all", max_train_samples=2, max_eval_samples=1)
    assert [row["messages"][0]["content"] for row in data.train] == ["Q1", "Q2"]
    result = balance(data)
    assert result["train"] == [
        ("a.jsonl", 3, 2, {"beyond --max_train_samples": 1}),
        ("testimony.jsonl", 1, 0, {"beyond --max_train_samples": 1}),
    ]
    assert sum(used for _, _, used, _ in result["validation"]) == 1
    assert "train            4 rows in 2 file(s), used 2, left out: 2 beyond --max_train_samples" in data.summary()
    with pytest.raises(ValueError, match="--max_train_samples"):
        load(folder / "all", max_train_samples=0)


def test_accounts_name_the_bytes_of_the_files(folder):
    (account,) = load(folder / "all" / "a.jsonl").account["train"]
    assert account.as_dict() == {
        "file": str(folder / "all" / "a.jsonl"),
        "sha256": hash_file(folder / "all" / "a.jsonl"),
        "rows": 3,
        "used": 3,
        "left_out": {},
    }
    before = account.sha256
    write_jsonl(folder / "all" / "a.jsonl", pairs(1, 2, 4))
    assert load(folder / "all" / "a.jsonl").account["train"][0].sha256 != before


# --- what happens to problems ----------------------------------------------------------------------------------------


def test_all_problems_are_reported_at_once_and_counted_beyond_twenty(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [*pairs(1), *[{"prompt": "", "response": "A"}] * 23])
    write_jsonl(tmp_path / "validation.jsonl", ["{broken"])
    data = load(tmp_path)
    with pytest.raises(DataError) as refused:
        data.settle(DataArguments())
    lines = str(refused.value).splitlines()
    assert lines[0] == "24 problem(s) in the data:"
    assert len(lines) == 23 and "and 4 more" in lines[21] and "--skip_bad_rows True" in lines[22]
    assert lines[1].strip().startswith(f"{tmp_path / 'a.jsonl'}:2: `prompt` is empty")
    assert len(refused.value.problems) == 24


def test_bad_rows_are_left_out_and_counted_when_asked(tmp_path, log):
    bad = {"prompt": "Q", "response": ""}
    write_jsonl(tmp_path / "a.jsonl", [*pairs(1), bad, "{broken", *pairs(2)])
    (tmp_path / "b.json").write_text(json.dumps([*pairs(3), bad, *pairs(4)]), encoding="utf-8")
    write_jsonl(tmp_path / "validation.jsonl", [bad, *pairs(5)])
    data = load(tmp_path)
    data.settle(DataArguments(skip_bad_rows=True))
    assert balance(data) == {
        "train": [("a.jsonl", 4, 2, {"unusable": 2}), ("b.json", 3, 2, {"unusable": 1})],
        "validation": [("validation.jsonl", 2, 1, {"unusable": 1})],
    }
    assert sum("skipped: " in line for line in log) == 4


def test_what_a_stage_finds_is_counted_where_the_row_stands(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [*pairs(*range(10)), {"prompt": "", "response": "A"}])
    data = load(path, validation_split_percentage=20)
    for row in (data.train[0], data.validation[0]):
        data.problems.append(Problem(place_of(row), "99 tokens", "Shorten it.", kind="too long"))
    with pytest.raises(DataError, match="2 problem"):
        data.settle(DataArguments(skip_bad_rows=True, long_rows="refuse"))
    data.settle(DataArguments(skip_bad_rows=True))
    assert balance(data) == {
        "train": [("a.jsonl", 11, 7, {"moved to validation": 2, "too long": 1, "unusable": 1})],
        "validation": [("a.jsonl", 2, 1, {"too long": 1})],
    }


def test_no_row_left_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "", "response": "A"}])
    with pytest.raises(UserError, match="every training row was skipped"):
        load(path).settle(DataArguments(skip_bad_rows=True))


# --- data sets of the hub, here from a local folder ------------------------------------------------------------------


def test_a_data_set_with_splits(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_jsonl(tmp_path / "set" / "train.jsonl", [*pairs(1, 2), {"instruction": "Q3", "output": "A3"}])
    write_jsonl(tmp_path / "set" / "validation.jsonl", pairs(4))
    data = load_data(DataArguments(dataset_name=str(tmp_path / "set"), max_train_samples=2), to_messages)
    assert [row["messages"][0]["content"] for row in [*data.train, *data.validation]] == ["Q1", "Q2", "Q4"]
    assert balance(data)["train"][0][1:] == (3, 2, {"beyond --max_train_samples": 1})


def test_a_data_set_that_cannot_be_had(tmp_path):
    with pytest.raises(UserError, match="(?s)no/such.*HF_ENDPOINT"):
        load_data(DataArguments(dataset_name="no/such"), to_messages)
