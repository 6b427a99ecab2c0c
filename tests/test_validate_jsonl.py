"""validate_jsonl.py finds what the stages would refuse, in the same words."""

import json
import re
from pathlib import Path

from medicalgpt.errors import UserError
from medicalgpt.readers.problems import DataError
from tests.helpers import ROOT, open_stage, run_here, run_program, write_jsonl
from tests.tiny import make_tiny

import pytest

SCRIPT = "validate_jsonl.py"
GOOD = [
    {"prompt": "Q", "response": "A"},
    {"instruction": "Q2", "output": "A2", "history": [["Q1", "A1"]]},
    {"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]},
]
PREFERENCES = [
    {"prompt": "Q", "chosen": "A", "rejected": "B"},
    {"conversations": [{"from": "human", "value": "问"}], "chosen": "答", "rejected": "错", "system": "S"},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return make_tiny(tmp_path_factory.mktemp("validate") / "base")


@pytest.fixture
def broken(tmp_path) -> Path:
    """A folder with every kind of problem, in the order in which a stage reads it."""
    write_jsonl(
        tmp_path / "a.jsonl",
        [
            *GOOD,
            "{broken",
            {"prompt": "", "response": "A"},
            {"prompt": "Q", "response": "A", "images": ["a.png"]},
            {"messages": [{"role": "robot", "content": "x"}]},
            {"messages": [{"role": "user", "content": "Q"}]},
            {"prompt": "Q", "response": "A" * 3000},
        ],
    )
    rows = [GOOD[0], {"conversations": [{"from": "gpt", "value": "A"}]}]
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    write_jsonl(tmp_path / "validation.jsonl", [{"prompt": "Held out", "response": "A"}, "[]"])
    return tmp_path


def report(stderr: str) -> str:
    """The message that ends a program, without what differs by program."""
    return stderr[stderr.index("error: ") :]


def test_the_report_is_that_of_the_stage(base, broken, tmp_path_factory):
    never = tmp_path_factory.mktemp("never") / "run"
    checked = run_program(SCRIPT, "--file_path", broken, "--model_name_or_path", base, check=False)
    flags = ("--model_name_or_path", base, "--train_file_dir", broken, "--output_dir", never)
    trained = run_program("supervised_finetuning.py", *flags, check=False)
    assert checked.returncode == trained.returncode == 1
    lines = report(checked.stderr).splitlines()
    assert sorted(lines) == sorted(report(trained.stderr).splitlines())
    assert lines[0] == "error: 7 problem(s) in the data:"
    assert sum(re.match(rf"  {broken}\S+:\d+", line) is not None for line in lines) == 7
    assert "Traceback" not in checked.stderr


def test_good_data_is_summed_up(base, tmp_path, capsys):
    write_jsonl(tmp_path / "chat.jsonl", GOOD)
    write_jsonl(tmp_path / "text.jsonl", [{"text": "t"}, {"text": "u"}])
    (tmp_path / "lines.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    run_here(SCRIPT, "--file_path", tmp_path, "--model_name_or_path", base, "--model_max_length", 500)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path / 'chat.jsonl'}: 3 rows, 3 usable, chat"
    assert lines[1] == "  turns: 2 rows of 2, 1 rows of 4"
    assert lines[2].startswith("  tokens, share of rows up to this length: 50%: ")
    assert lines[3] == "  longer than the limit of 500: 0 of 3 rows (0.0%)"
    assert lines[5] == f"{tmp_path / 'lines.txt'}: 2 rows, 2 usable, text"
    # Three letters and the end of the document each.
    assert lines[6:8] == [
        "  tokens, share of rows up to this length: 50%: 4, 90%: 4, 95%: 4, 99%: 4, 100%: 4",
        "  8 tokens in total",
    ]
    assert lines[8] == f"{tmp_path / 'text.jsonl'}: 2 rows, 2 usable, text"
    assert lines[-1] == "every row can be used"


def test_preferences_are_summed_up(base, tmp_path, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", [*PREFERENCES, {"prompt": "Q2", "chosen": "A" * 50, "rejected": "B" * 90}])
    for flags in ((), ("--format", "preference")):
        run_here(SCRIPT, "--file_path", path, *flags)
        assert capsys.readouterr().out.splitlines() == [
            f"{path}: 3 rows, 3 usable, preference",
            "  turns of the prompt: 2 rows of 1, 1 rows of 2",
            "every row can be used",
        ]


def test_a_preference_is_as_long_as_its_longer_answer(base, tmp_path, capsys):
    def longest(chosen: str, rejected: str) -> int:
        path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "Q", "chosen": chosen, "rejected": rejected}])
        run_here(SCRIPT, "--file_path", path, "--model_name_or_path", base, "--model_max_length", 500)
        return int(re.search(r" 100%: (\d+)$", capsys.readouterr().out, re.MULTILINE)[1])

    short, long = "A" * 50, "B" * 90
    # A token for each letter.
    assert longest(short, long) == longest(long, short) == longest(short, "C") + 40


def test_problems_of_preferences_are_those_of_a_stage(base, tmp_path, capsys):
    rows = [
        *PREFERENCES,
        {"prompt": "Q", "chosen": "A", "rejected": "A"},
        {"prompt": "Q", "chosen": "A", "rejected": "B" * 3000},
        {"prompt": "Q", "response": "A"},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    flags = ("--model_name_or_path", base, "--model_max_length", 500)
    with pytest.raises(DataError, match="^2 problem") as refused:
        run_here(SCRIPT, "--file_path", path, *flags)
    assert f"{path}: 5 rows, 2 usable, preference" in capsys.readouterr().out.splitlines()
    lines = report(f"error: {refused.value}").splitlines()
    for number, words in ((3, "are the same answer"), (5, "no field `chosen`")):
        assert sum(f"{path}:{number}: " in line and words in line for line in lines) == 1
    with pytest.raises(DataError, match=rf"{path}:4: the rejected answer: 30\d\d tokens"):
        run_here(SCRIPT, "--file_path", path, *flags, "--long_rows", "refuse")
    with pytest.raises(DataError) as trained:
        run_here("dpo_training.py", *flags, "--train_file_dir", path, "--output_dir", tmp_path / "never")
    assert sorted(str(trained.value).splitlines()) == sorted(str(refused.value).splitlines())


@pytest.mark.parametrize("folder", ["pretrain", "finetune", "reward"])
def test_the_sample_data_is_good(folder, capsys):
    run_here(SCRIPT, "--file_path", ROOT / "data" / folder)
    assert capsys.readouterr().out.endswith("every row can be used\n")


def test_usable_rows_are_counted_beside_the_problems(broken, capsys):
    with pytest.raises(DataError, match="7 problem"):
        run_here(SCRIPT, "--file_path", broken)
    lines = capsys.readouterr().out.splitlines()
    assert f"{broken / 'a.jsonl'}: 9 rows, 4 usable, chat" in lines
    assert f"{broken / 'b.json'}: 2 rows, 1 usable, chat" in lines


def test_long_rows_need_a_model_to_be_found(base, tmp_path, capsys):
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A" * 20}]
    path = write_jsonl(tmp_path / "a.jsonl", [GOOD[0], {"prompt": "Q", "response": "A" * 3000}])
    run_here(SCRIPT, "--file_path", path)
    refuse = ("--long_rows", "refuse")
    with pytest.raises(DataError, match=r"a.jsonl:2: 30\d\d tokens, longer than the 64 that fit"):
        run_here(SCRIPT, "--file_path", path, "--model_name_or_path", base, "--model_max_length", 64, *refuse)
    # A system prompt is part of every row.
    flags = ("--model_name_or_path", base, "--model_max_length", 100, "--system_prompt", "S" * 100)
    with pytest.raises(DataError, match="2 problem"):
        run_here(SCRIPT, "--file_path", path, *flags, *refuse)
    with pytest.raises(UserError, match="2 of 2 rows are too long, more than half"):
        run_here(SCRIPT, "--file_path", path, *flags)
    more = [{"prompt": "Q", "response": "A"}, {"messages": [*turns, *turns]}]
    write_jsonl(tmp_path / "a.jsonl", [GOOD[0], {"prompt": "Q", "response": "A" * 3000}, *more])
    run_here(SCRIPT, "--file_path", path, "--model_name_or_path", base, "--model_max_length", 64)
    out = capsys.readouterr().out
    assert "1 of 4 rows keep only their first exchanges that fit" in out
    assert out.splitlines()[-1] == "3 rows can be used; with these flags training skips 1: 1 too long"


def test_lengths_are_those_of_all_rows_and_the_proposed_limits_take_what_they_say(base, tmp_path, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "Q", "response": "A" * count} for count in range(1, 101)])
    flags = ("--file_path", path, "--model_name_or_path", base)
    with pytest.raises(DataError, match="^50 problem"):
        run_here(SCRIPT, *flags, "--model_max_length", 72, "--long_rows", "refuse")
    out = capsys.readouterr().out
    assert "512 positions" not in out
    shown = {int(share): int(length) for share, length in re.findall(r"(\d+)%: (\d+)", out)}
    # A token for each letter: the rows differ by one.
    extra = shown[100] - 100
    assert shown == {share: share + extra for share in (50, 90, 95, 99, 100)} and extra == 22
    assert "longer than the limit of 72: 50 of 100 rows (50.0%)" in out
    proposed = re.findall(r"(\d+)% of the rows: --model_max_length (\d+)", out)
    assert [int(share) for share, _ in proposed] == [95, 99, 100]
    for share, length in proposed:
        run_here(SCRIPT, *flags, "--model_max_length", length, "--skip_long_rows", True)
        out = capsys.readouterr().out
        assert f"{100 - int(share)} of 100 rows" in out
        run_here(SCRIPT, *flags, "--model_max_length", int(length) - 1, "--skip_long_rows", True)
        assert f"{101 - int(share)} of 100 rows" in capsys.readouterr().out


def test_a_length_beyond_the_positions_of_the_model_is_proposed_with_what_it_needs(base, tmp_path, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "Q", "response": "A" * 600}])
    run_here(SCRIPT, "--file_path", path, "--model_name_or_path", base, "--model_max_length", 700)
    shown = capsys.readouterr().out
    note = r"^  100% of the rows (need \d+ positions, the model has 512 \(more with (--model_max_length .*)\))$"
    said, advised = re.search(note, shown, re.MULTILINE).groups()
    flags = ("--model_name_or_path", base, "--train_file_dir", path, "--output_dir", tmp_path / "run")
    open_stage("supervised_finetuning.py", *flags, *advised.split())
    # The stage says the same, of all rows and of this one.
    with pytest.raises(UserError) as refused:
        open_stage("supervised_finetuning.py", *flags)
    assert f"all rows {said}" in str(refused.value) and f"Shorten the row: it would {said}." in str(refused.value)
    assert "Raise --model_max_length" not in str(refused.value)


def test_what_the_report_advises_is_a_flag_of_the_program(base, broken, capsys):
    flags = ("--file_path", broken, "--model_name_or_path", base, "--system_prompt", "S")
    with pytest.raises(DataError) as refused:
        run_here(SCRIPT, *flags, "--long_rows", "refuse")
    advised = re.findall(r"(--\w+) (\w+)", str(refused.value).splitlines()[-1])
    assert advised == [("--skip_bad_rows", "True"), ("--long_rows", "turns")]
    # What was given is not advised again, nor what would change nothing.
    with pytest.raises(DataError, match="^1 problem") as refused:
        run_here(SCRIPT, *flags, "--long_rows", "refuse", *advised[0])
    assert re.findall(r"--\w+ \w+", str(refused.value).splitlines()[-1]) == ["--long_rows turns"]
    with pytest.raises(DataError, match="^7 problem") as refused:
        run_here(SCRIPT, *flags)
    assert re.findall(r"--\w+ \w+", str(refused.value).splitlines()[-1]) == ["--skip_bad_rows True"]
    run_here(SCRIPT, *flags, *advised[0], *advised[1])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "5 rows can be used; with these flags training skips 8: 7 unusable, 1 too long"


def test_the_encoding_of_a_file_is_told_once(tmp_path, capfd):
    """Its first row is looked at, all are checked, and a copy is written."""
    (tmp_path / "in").mkdir()
    row = json.dumps({"prompt": "感冒了怎么办？", "response": "多休息，多喝水。"}, ensure_ascii=False)
    (tmp_path / "in" / "a.jsonl").write_bytes(f"{row}\n".encode("gb18030"))
    run_here(SCRIPT, "--file_path", tmp_path / "in", "--fix")
    assert capfd.readouterr().err.count("a.jsonl is not UTF-8") == 1


def test_skipping_every_row_is_an_error(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": ""}])
    with pytest.raises(UserError, match="every row would be skipped: 1 unusable"):
        run_here(SCRIPT, "--file_path", path, "--skip_bad_rows")


def test_tasks_are_as_long_as_grpo_has_them(base, tmp_path, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "Q" * count, "answer": "A"} for count in (10, 200)])
    flags = ("--file_path", path, "--format", "task", "--model_name_or_path", base, "--system_prompt", "none")
    run_here(SCRIPT, *flags, "--model_max_length", 500)
    longest = int(re.search(r" 100%: ([\d,]+)$", capsys.readouterr().out, re.MULTILINE)[1].replace(",", ""))
    for kept, enough in ((None, 2 * longest - 1), (30, longest + 30)):
        kept = () if kept is None else ("--max_completion_length", kept)
        run_here(SCRIPT, *flags, *kept, "--model_max_length", enough)
        needed = f"--model_max_length {enough} --max_completion_length {enough - longest}"
        assert f"100% of the rows: {needed}\n" in capsys.readouterr().out
        with pytest.raises(DataError, match=r"(?s)^1 problem.*a.jsonl:2: a prompt of") as refused:
            run_here(SCRIPT, *flags, *kept, "--model_max_length", enough - 1, "--long_rows", "refuse")
        with pytest.raises(DataError) as trained:
            run_here(
                "grpo_training.py",
                *flags[4:],
                "--train_file_dir",
                path,
                *kept,
                *("--model_max_length", enough - 1, "--output_dir", tmp_path / "never", "--long_rows", "refuse"),
            )
        assert trained.value.problems == refused.value.problems
        # What the stage advises is enough: 30 tokens are kept for the answer, or as many as it says.
        advised = re.search(
            r"all rows fit with (--model_max_length \d+ --max_completion_length \d+)", str(trained.value)
        )
        run_here(SCRIPT, *flags, *advised[1].split(), "--long_rows", "refuse")
        assert capsys.readouterr().out.splitlines()[-1] == "every row can be used"


def test_the_format_may_be_said(tmp_path, capsys):
    chat = write_jsonl(tmp_path / "a.jsonl", GOOD)
    with pytest.raises(DataError, match="no field `text`"):
        run_here(SCRIPT, "--file_path", chat, "--format", "text")
    text = write_jsonl(tmp_path / "b.jsonl", [{"text": "t"}])
    with pytest.raises(DataError, match="a document, not a conversation"):
        run_here(SCRIPT, "--file_path", text, "--format", "chat")
    more = write_jsonl(tmp_path / "d.jsonl", [{"text": "t", "url": "u"}])
    run_here(SCRIPT, "--file_path", more)
    assert "1 usable, text" in capsys.readouterr().out
    with pytest.raises(DataError, match="no field `chosen`"):
        run_here(SCRIPT, "--file_path", chat, "--format", "preference")
    preferences = write_jsonl(tmp_path / "c.jsonl", PREFERENCES)
    with pytest.raises(DataError, match=r"c.jsonl:1: two answers.*are for dpo_training.py.*\n.*c.jsonl:2: two answers"):
        run_here(SCRIPT, "--file_path", preferences, "--format", "chat")


def test_fields_may_be_ignored(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{**GOOD[0], "answer": "other"}])
    with pytest.raises(DataError, match="`answer` is a second answer next to `response`"):
        run_here(SCRIPT, "--file_path", path)
    run_here(SCRIPT, "--file_path", path, "--ignore_fields", "answer")


def test_a_document_with_metadata_is_a_document(tmp_path, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "t", "url": "u", "meta": {"a": 1}}])
    run_here(SCRIPT, "--file_path", path)
    assert f"{path}: 1 rows, 1 usable, text" in capsys.readouterr().out.splitlines()


def test_a_broken_first_line_does_not_hide_what_the_file_is(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["{broken", *GOOD])
    with pytest.raises(DataError, match="^1 problem"):
        run_here(SCRIPT, "--file_path", path)


@pytest.mark.parametrize("first", ["{broken", {"prompt": ""}])
def test_nothing_but_problems_is_a_report(base, tmp_path, first):
    path = write_jsonl(tmp_path / "a.jsonl", [first])
    with pytest.raises(DataError, match="1 problem"):
        run_here(SCRIPT, "--file_path", path, "--model_name_or_path", base)


def test_missing_places_and_flags(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        run_here(SCRIPT, "--file_path", tmp_path / "nowhere")
    done = run_program(SCRIPT, "--file_pth", "x", check=False)
    assert done.returncode == 2 and "did you mean --file_path?" in done.stderr
