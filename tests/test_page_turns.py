"""What a page does with the turns of a conversation: bubbles, messages, rows to train on; feedback; languages."""

import json
import threading

from medicalgpt.data.images import Picture
from medicalgpt.errors import UserError
from medicalgpt.serving import feedback
from medicalgpt.serving.feedback import FeedbackFile
from medicalgpt.serving.language import LABELS, LANGUAGES, MESSAGES, language_from
from medicalgpt.serving.page_turns import (
    bubbles,
    conversation,
    input_turn,
    pending_call,
    preference_row,
    sharegpt_row,
    without_last,
    without_unanswered,
)
from tests.helpers import run_here, write_jsonl
from tests.tiny import tiny_tokenizer

import pytest
from trl.data_utils import apply_chat_template, is_conversational

TOOLS = [
    {
        "type": "function",
        "function": {"name": "find", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
    }
]


def said(role: str, content: str, **more) -> dict:
    return {"role": role, "content": content, **more}


def call(city: str) -> dict:
    return {"type": "function", "function": {"name": "find", "arguments": {"city": city}}}


ASKED, ANSWERED = said("user", "Where?"), said("assistant", "There.")
CALLED = said("assistant", "", tool_calls=[call("Bern"), call("Rom")])
RESULTS = [said("tool", "[1]"), said("tool", "[2]")]
WITH_TOOLS = [ASKED, CALLED, *RESULTS, ANSWERED]


def test_results_are_asked_for_until_every_call_has_one():
    for count, city in ((0, "Bern"), (1, "Rom")):
        turns = [ASKED, CALLED, *RESULTS[:count]]
        assert pending_call(turns)["function"]["arguments"] == {"city": city}
        assert input_turn(turns, "x")["role"] == "tool"
        # The model has not been asked yet.
        assert without_unanswered(turns) == (turns, None)
    assert pending_call([ASKED, CALLED, *RESULTS]) is None
    assert without_unanswered([ASKED, CALLED, *RESULTS]) == ([ASKED, CALLED, RESULTS[0]], "[2]")
    assert input_turn(WITH_TOOLS, "x") == said("user", "x")


@pytest.mark.parametrize(
    ("turns", "left", "text"),
    [
        ([], [], None),
        ([ASKED], [], "Where?"),
        ([ASKED, ANSWERED], [], "Where?"),
        (WITH_TOOLS, WITH_TOOLS[:3], "[2]"),
        (WITH_TOOLS[:3], WITH_TOOLS[:2], "[1]"),
        (WITH_TOOLS[:2], [], "Where?"),
    ],
)
def test_undo_takes_one_input_back(turns, left, text):
    assert without_last(turns) == (left, text)


def test_messages_have_nothing_of_the_page():
    judged = [ASKED, said("assistant", "There.", thumb=True, below="**Sources**", sources=[])]
    messages, pictures = conversation([*judged, *WITH_TOOLS], "Be brief.")
    assert messages == [said("system", "Be brief."), ASKED, ANSWERED, *WITH_TOOLS] and pictures == []
    assert conversation([ASKED], " ")[0] == [ASKED]


def test_bubbles_fold_thoughts_calls_and_results():
    thinking = said("assistant", "<think>\nIt is <b>far</b>.\n</think>\n\nThere.")
    shown, numbers = bubbles([ASKED, thinking, *WITH_TOOLS], "en")
    titles = [bubble.get("metadata", {}).get("title") for bubble in shown]
    assert titles == [None, "Thinking", None, None, *["Tool call: find"] * 2, *["Tool result"] * 2, None]
    assert numbers == [0, 1, 1, 2, 3, 3, 4, 5, 6]
    assert shown[1]["content"] == "It is &lt;b>far&lt;/b>." and shown[2]["content"] == "There."
    assert shown[1]["metadata"]["status"] == "done"
    open_thoughts = [ASKED, said("assistant", "<think>\nIt is")]
    assert [bubbles(open_thoughts, "zh", growing=growing)[0][1]["metadata"] for growing in (True, False)] == [
        {"title": "思考过程", "status": "pending"},
        {"title": "思考过程", "status": "done"},
    ]
    # A result cannot end its code block.
    assert bubbles([ASKED, CALLED, said("tool", "```\n<b>")], "en")[0][-1]["content"] == "````\n```\n<b>\n````"


def test_citations_are_links_only_where_there_are_sources():
    plain, cited = said("assistant", "So [1]."), said("assistant", "So [1] [?].", below="")
    assert bubbles([ASKED, plain], "en")[0][1]["content"] == "So [1]."
    assert bubbles([ASKED, cited], "en")[0][1]["content"] == "So [\\[1\\]](#source-1-1) [?]."


# --- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("turns", "system", "tools"),
    [
        ([ASKED, ANSWERED], None, None),
        ([ASKED, ANSWERED, ASKED, said("assistant", "<think>\nHm.\n</think>\n\nThere.")], "Be brief.", None),
        (WITH_TOOLS, "Be brief.", TOOLS),
        ([ASKED, said("assistant", "I look.", tool_calls=[call("Bern")]), RESULTS[0], ANSWERED], None, TOOLS),
    ],
    ids=["plain", "thinking", "tools", "call-with-text"],
)
def test_an_exported_conversation_passes_validation(tmp_path, capsys, turns, system, tools):
    row = sharegpt_row(turns, system, tools)
    file = write_jsonl(tmp_path / "conversation.jsonl", [row])
    run_here("validate_jsonl.py", "--file_path", file)
    assert "1 row" in capsys.readouterr().out
    values = [turn["value"] for turn in row["conversations"]]
    assert values[-1] == turns[-1]["content"] and (system in values) == bool(system)


def test_what_is_not_answered_is_not_exported():
    assert sharegpt_row([ASKED, ANSWERED, ASKED], None, None) == sharegpt_row([ASKED, ANSWERED], None, None)
    assert sharegpt_row([ASKED, ANSWERED, *WITH_TOOLS[:3]], None, None) == sharegpt_row([ASKED, ANSWERED], None, None)
    for turns in ([], [ASKED], WITH_TOOLS[:3]):
        with pytest.raises(UserError, match="no complete answer"):
            sharegpt_row(turns, None, None)
    with pytest.raises(UserError, match="images cannot be exported"):
        sharegpt_row([said("user", "?", picture=Picture(1, 1)), ANSWERED], None, None)


def test_a_judged_answer_is_a_row_of_kto():
    row = preference_row([*WITH_TOOLS, ASKED], 4, False, "Be brief.", TOOLS)
    assert row == {
        "prompt": [said("system", "Be brief."), *WITH_TOOLS[:4]],
        "completion": [ANSWERED],
        "label": False,
        "tools": TOOLS,
    }
    row = preference_row([ASKED, ANSWERED], 1, True, None, None)
    assert is_conversational(row)
    rendered = apply_chat_template(row, tiny_tokenizer())
    assert "Where?" in rendered["prompt"] and rendered["completion"].startswith("There.") and rendered["label"]


# --- the file of judged answers --------------------------------------------------------------------------------------


def test_rows_are_appended_whole(tmp_path):
    file = FeedbackFile(tmp_path / "f.jsonl")
    assert file.path.stat().st_mode & 0o77 == 0
    # Left by a program that was killed.
    file.path.write_text('{"half": ')
    threads = [
        threading.Thread(target=lambda at=at: [file.append({"at": at, "text": "长" * 5000}) for _ in range(20)])
        for at in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first, *lines = file.path.read_text(encoding="utf-8").splitlines()
    assert first == '{"half": ' and sorted(json.loads(line)["at"] for line in lines) == sorted([*range(4)] * 20)


def test_feedback_is_bounded(tmp_path, monkeypatch):
    file = FeedbackFile(tmp_path / "f.jsonl")
    monkeypatch.setattr(feedback, "MAX_ROW_BYTES", 20)
    with pytest.raises(UserError, match="at most 20 are recorded"):
        file.append({"text": "x" * 20})
    monkeypatch.setattr(feedback, "MAX_FILE_BYTES", 15)
    file.append({"a": 1})
    with pytest.raises(UserError, match="full"):
        file.append({"a": 2})
    assert file.path.read_text() == '{"a": 1}\n'


def test_a_disk_that_is_full_leaves_no_half_row(tmp_path, monkeypatch):
    file = FeedbackFile(tmp_path / "f.jsonl")
    file.append({"a": 1})
    write = feedback.os.write
    monkeypatch.setattr(feedback.os, "write", lambda to, data: write(to, data[:3]))
    with pytest.raises(OSError, match="full"):
        file.append({"a": 2})
    assert file.path.read_text() == '{"a": 1}\n'


@pytest.mark.parametrize("name", ["missing/f.jsonl", "f.txt", "folder.jsonl"])
def test_a_file_that_cannot_be_written_is_refused_at_once(tmp_path, name):
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(UserError, match="--feedback_file .*f.jsonl|--feedback_file"):
        FeedbackFile(tmp_path / name)


# --- languages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "forced", "language"),
    [
        ("zh-CN,zh;q=0.9,en;q=0.8", "auto", "zh"),
        ("fr-FR,fr;q=0.9,zh-TW;q=0.5,en;q=0.3", "auto", "zh"),
        ("en;q=0.2,zh;q=0.7", "auto", "zh"),
        ("en-US,en", "auto", "en"),
        ("fr", "auto", "en"),
        ("", "auto", "en"),
        ("en;q=much,zh", "auto", "zh"),
        ("zh-CN", "en", "en"),
    ],
)
def test_the_browser_chooses_unless_the_flag_does(header, forced, language):
    assert language_from(header, forced) == language


def test_every_text_is_in_one_language():
    for name, texts in {**LABELS, **MESSAGES}.items():
        assert len(texts) == len(LANGUAGES), name
        assert not any("\u4e00" <= char <= "\u9fff" for char in texts[0]), name
        assert " · " not in "".join(texts), name
