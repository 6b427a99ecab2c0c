"""validate_jsonl.py --fix: a cleaned copy, a list of every change, and the files as they were."""

import json
import re
import shlex

from medicalgpt.data.cleaning import clean_row
from medicalgpt.data.encoding import encode_chat
from medicalgpt.errors import UserError
from medicalgpt.formats.conversion import to_messages
from template import apply_template
from tests.helpers import read_json, run_here, write_jsonl
from tests.tiny import tiny_tokenizer

import pytest

SCRIPT = "validate_jsonl.py"
GOOD = {"prompt": "问", "response": "答"}


def turns(*texts: str, sharegpt: bool = True) -> list[dict]:
    roles = ("human", "gpt") if sharegpt else ("user", "assistant")
    names = ("from", "value") if sharegpt else ("role", "content")
    return [dict(zip(names, (roles[number % 2], text), strict=True)) for number, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (" a \r\nb\r\n", "a \nb"),
        ("\u3000\xa0问\ufeff题 ", "问题"),
        ("a\x00b\x1b\tc", "ab\tc"),
        # The first line belongs to the indented block.
        ("\n    if x:\n        y\n\n", "    if x:\n        y"),
        ("a\n\nb", "a\n\nb"),
    ],
)
def test_white_space(text, clean):
    expected = [] if text == clean else [("white space", text, clean)]
    for value, wanted in (
        (text, clean),
        ({"prompt": text, "response": "A"}, {"prompt": clean, "response": "A"}),
        ({"messages": turns(text, "A", sharegpt=False)}, {"messages": turns(clean, "A", sharegpt=False)}),
    ):
        cleaned, changes = clean_row(value, True)
        assert cleaned == wanted
        assert [(change.kind, change.before, change.after) for change in changes] == expected


def test_null_fields_go_and_what_tools_say_stays():
    tools = [{"name": " f", "parameters": None}]
    row = {"id": " 7", "system": None, "tools": tools, "messages": turns("Q", "A", sharegpt=False)}
    row["messages"][1] |= {"refusal": None, "audio": None}
    cleaned, changes = clean_row(row, True)
    assert cleaned == {"id": " 7", "tools": tools, "messages": turns("Q", "A", sharegpt=False)}
    assert [change.where for change in changes] == ["system", "messages[1].refusal", "messages[1].audio"]
    assert {change.kind for change in changes} == {"null field"}


def test_a_conversation_ends_before_its_first_empty_turn():
    for rest in (("Q2", ""), ("", "A2"), ("Q2", " ", "Q3", "A3")):
        cleaned, changes = clean_row({"conversations": turns("Q1", "A1", *rest)}, True)
        assert cleaned == {"conversations": turns("Q1", "A1")} and "empty turn" in {change.kind for change in changes}
    # Nothing is left: the row is for the checks, which refuse it.
    assert clean_row({"conversations": turns("Q", "")}, True) == ({"conversations": turns("Q", "")}, [])


def test_an_empty_system_turn_stays():
    """It is trained: without it, the template of the model would write its own system prompt."""
    apply_template(tokenizer := tiny_tokenizer(), "qwen")
    for name in ("messages", "conversations"):
        said = turns("Q", "A", sharegpt=name == "conversations")
        system = {key: "" for key in said[0]} | {next(iter(said[0])): "system"}
        row = {name: [system, *said, *said]}
        assert clean_row(row, True) == (row, [])
        kept, without = (encode_chat(tokenizer, to_messages({name: each})) for each in (row[name], row[name][1:]))
        assert kept != without


def test_turns_after_the_last_answer_go_only_where_there_is_one():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    row = {"messages": [*turns("Q", "A", "Q2", sharegpt=False), call, {"role": "tool", "content": "r"}]}
    cleaned, changes = clean_row(row, True)
    assert cleaned == {"messages": turns("Q", "A", sharegpt=False)}
    assert [change.kind for change in changes] == ["null field", "turns without answer"]
    preference = {"conversations": turns("Q", "A", "Q2"), "chosen": "A2", "rejected": "B2"}
    assert clean_row(preference, False) == (preference, [])
    complete = {"messages": [*row["messages"], *turns("", "A2", sharegpt=False)[1:]]}
    cleaned, changes = clean_row(complete, True)
    assert [message["role"] for message in to_messages(cleaned)["messages"]] == [
        message["role"] for message in complete["messages"]
    ]


@pytest.mark.parametrize(
    "row",
    [
        GOOD,
        {"messages": [{"role": "user", "content": [{"type": "text", "text": " Q "}]}, {"role": "assistant"}]},
        {"messages": turns("Q", "A", sharegpt=False), "weights": [1, None], "meta": {"a": None}},
        {"question": "Q", "options": {"A": " a", "B": None}},
        [1, 2],
        7,
    ],
)
def test_what_is_not_understood_is_left_as_it_is(row):
    assert clean_row(json.loads(json.dumps(row)), False) == (row, [])


@pytest.fixture
def folder(tmp_path):
    data = tmp_path / "data"
    rows = [
        GOOD,
        {"prompt": " 问 ", "response": "答", "id": None},
        {"conversations": turns("Q1", "A1", "Q2", "")},
        {"prompt": ""},
        "{broken",
        {"prompt": "held", "response": "out"},
    ]
    write_jsonl(data / "a.jsonl", rows)
    (data / "sub").mkdir()
    other = [{"prompt": "感冒了应该怎么办？", "response": "多休息，多喝水，必要时去医院。"}]
    (data / "sub" / "a.json").write_bytes(json.dumps(other, ensure_ascii=False).encode("gb18030"))
    (data / "notes.txt").write_bytes("\ufeffone \n\ntwo\n".encode())
    write_jsonl(data / "validation.jsonl", [{"prompt": "held", "response": "out"}])
    return data


def test_the_copy_is_clean_and_every_change_is_listed(folder, capsys):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    run_here(SCRIPT, "--file_path", folder, "--fix")
    out = capsys.readouterr().out
    fixed = folder.parent / "data_fixed"
    assert read_json(fixed / "a.jsonl") == [GOOD, {"conversations": turns("Q1", "A1")}]
    assert [row["prompt"] for row in read_json(fixed / "sub" / "a.json.jsonl")] == ["感冒了应该怎么办？"]
    assert (fixed / "notes.txt").read_bytes() == b"one\ntwo\n"
    assert read_json(fixed / "validation.jsonl") == [{"prompt": "held", "response": "out"}]
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in folder.parent.iterdir()) == ["data", "data_fixed", "data_fixed.changes.jsonl"]
    listed = read_json(folder.parent / "data_fixed.changes.jsonl")
    a, copy = folder / "a.jsonl", fixed / "a.jsonl"
    of_a = [(entry["place"], entry["new"], entry["change"]) for entry in listed if entry["place"].startswith(str(a))]
    assert of_a[:2] == [(f"{a}:2", None, f"duplicate of {a}:1"), (f"{a}:3", f"{copy}:2", "empty turn")]
    assert [place for place, new, _ in of_a if new is None] == [f"{a}:2", f"{a}:4", f"{a}:5", f"{a}:6"]
    assert of_a[3][2].startswith("broken JSON at column 2")
    by_place = {entry["place"]: entry for entry in listed}
    assert by_place[f"{a}:2"]["before"] == {"prompt": " 问 ", "response": "答", "id": None}
    assert by_place[f"{a}:6"]["change"] == f"duplicate of {folder / 'validation.jsonl'}:1"
    assert {(entry["place"], entry["before"], entry["after"]) for entry in listed if entry["change"] == "encoding"} == {
        (f"{folder / 'sub' / 'a.json'}:1", "gb18030", "utf-8"),
        (f"{folder / 'notes.txt'}:1", "utf-8 with a byte order mark", "utf-8"),
    }
    assert f"cleaned copy: {fixed}, 6 of 10 rows; left out: 2 duplicate, 2 unusable" in out
    assert "2 encoding" in out and "1 white space" in out and "1 empty turn" in out
    # What is printed can be run, and the copy has no problem.
    command = re.search(r"check it: python (.*)", out)[1]
    run_here(*shlex.split(command))
    assert capsys.readouterr().out.endswith("every row can be used\n")


def test_an_encoding_that_only_its_owner_knows(tmp_path):
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "a.txt"
    path.write_bytes("é\n".encode("cp850"))
    run_here(SCRIPT, "--file_path", path, "--fix", "--encoding", "cp850")
    assert (tmp_path / "data_fixed" / "a.txt").read_text(encoding="utf-8") == "é\n"
    (entry,) = read_json(tmp_path / "data_fixed.changes.jsonl")
    assert (entry["change"], entry["before"], entry["after"]) == ("encoding", "cp850", "utf-8")


def test_the_copy_is_checked_with_the_columns_that_are_named(tmp_path):
    rows = [{"Frage": " Q ", "Antwort": "A", "Nr": None}, {"Frage": "Q", "Antwort": "A"}, {"Frage": "Q"}]
    path = write_jsonl(tmp_path / "data" / "a.jsonl", rows)
    run_here(SCRIPT, "--file_path", path, "--fix", "--columns", "question=Frage,answer=Antwort")
    assert read_json(tmp_path / "data_fixed" / "a.jsonl") == [{"Frage": "Q", "Antwort": "A"}]


def test_nothing_is_ever_replaced(folder, capsys):
    fixed = folder.parent / "data_fixed"
    fixed.mkdir()
    (fixed / "mine").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="data_fixed exists.*--fixed_dir"):
        run_here(SCRIPT, "--file_path", folder, "--fix", "--overwrite", True)
    (folder.parent / "other.changes.jsonl").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="other.changes.jsonl exists"):
        run_here(SCRIPT, "--file_path", folder, "--fix", "--fixed_dir", folder.parent / "other")
    assert capsys.readouterr().out == ""
    for inside in (folder / "copy", folder.parent):
        with pytest.raises(UserError, match="exists|contain each other"):
            run_here(SCRIPT, "--file_path", folder, "--fix", "--fixed_dir", inside)
    run_here(SCRIPT, "--file_path", folder, "--fix", "--fixed_dir", folder.parent / "copies" / "new")
    assert (folder.parent / "copies" / "new" / "a.jsonl").is_file()
    assert (fixed / "mine").read_text(encoding="utf-8") == "mine"


def test_a_file_gets_its_copy_outside_of_its_folder(folder, monkeypatch):
    run_here(SCRIPT, "--file_path", folder / "a.jsonl", "--validation_file_dir", folder / "validation.jsonl", "--fix")
    assert [path.name for path in (folder.parent / "data_fixed").iterdir()] == ["a.jsonl"]
    monkeypatch.chdir(folder)
    run_here(SCRIPT, "--file_path", "a.jsonl", "--fix")
    assert (folder / "a_fixed" / "a.jsonl").is_file()


def test_nothing_is_written_if_a_file_cannot_be_read_to_its_end(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.json").write_text('[{"prompt": "Q", "response": "A"}, {"prompt"', encoding="utf-8")
    with pytest.raises(UserError, match=r"a.json:1.*\nNothing was written"):
        run_here(SCRIPT, "--file_path", tmp_path / "data", "--fix")
    write_jsonl(tmp_path / "none" / "a.jsonl", [{"prompt": ""}])
    with pytest.raises(UserError, match="no row could be used, of 1"):
        run_here(SCRIPT, "--file_path", tmp_path / "none", "--fix")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "none"]


def test_a_folder_without_fix_has_no_effect(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_here(SCRIPT, "--file_path", tmp_path, "--fixed_dir", tmp_path / "x")
    assert "--fixed_dir has no effect without --fix True" in capsys.readouterr().err
