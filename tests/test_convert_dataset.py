"""convert_dataset.py: what is written reads as the same row, or nothing is written and the row is named."""

import json
import random
import re
from pathlib import Path

from convert_dataset import ConversionArguments
from medicalgpt.data.export import TARGETS, export_row, openai_messages, write_rows
from medicalgpt.data.rows import Rows
from medicalgpt.errors import UserError
from medicalgpt.formats.conversion import to_messages, to_preference
from medicalgpt.readers.problems import RowError
from tests.helpers import read_json, run_here, write_jsonl

import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

SCRIPT = "convert_dataset.py"
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"properties": {"city": {"type": "string"}}}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": None, "days": 1.50, "名": "上海"}}}
PLAIN = [{"role": "user", "content": "问 “?”\n"}, {"role": "assistant", "content": " 答\u2028é"}]
ALPACA = {"instruction": "Translate.", "input": "发热", "output": "fever", "id": 7, "source": "book"}


def convert(tmp_path, rows, to, *flags, name="out.jsonl", source="in.jsonl"):
    """The rows of the output."""
    path = rows if isinstance(rows, Path) else write_jsonl(tmp_path / source, rows)
    run_here(SCRIPT, "--in_file", path, "--out_file", tmp_path / name, "--to", to, *flags)
    return pq.read_table(tmp_path / name).to_pylist() if name.endswith(".parquet") else read_json(tmp_path / name)


def random_conversation(rng: random.Random) -> dict:
    """A converted row with everything that a conversation may have."""
    words = ["问题", "a\nb", ' "x" ', "{}", "\\n", "<think>", "É", "1", "null", "\u2028", "😀", "[1]"]

    def text() -> str:
        # A turn of white space alone is refused.
        return "".join([*rng.choices(words, k=rng.randint(0, 4)), "x"])

    def call() -> dict:
        arguments = {
            text(): rng.choice([None, 1, 0.5, True, text(), {}, [None, text()]]) for _ in range(rng.randint(0, 3))
        }
        return {"type": "function", "function": {"name": rng.choice(["a", "名"]), "arguments": arguments}}

    messages = [{"role": "system", "content": text()}] if rng.random() < 0.5 else []
    tools = None
    for _ in range(rng.randint(1, 3)):
        messages.append({"role": "user", "content": text()})
        if rng.random() < 0.4:
            tools = [TOOL, {"type": "function", "function": {"name": "a", "strict": True}}]
            calls = [call() for _ in range(rng.randint(1, 2))]
            said = {"content": rng.choice(["", text()])} | ({"reasoning_content": text()} if rng.random() < 0.3 else {})
            messages.append({"role": "assistant", **said, "tool_calls": calls})
            messages += [{"role": "tool", "content": text()} for _ in calls]
        messages.append({"role": "assistant", "content": text()})
        if rng.random() < 0.3:
            messages[-1]["reasoning_content"] = text()
    return {"messages": messages, "tools": tools}


def same(one, other) -> bool:
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


@pytest.mark.parametrize("seed", range(60))
def test_conversations_survive_the_round_trip(seed):
    row = random_conversation(random.Random(seed))
    first = export_row(row, "messages", {})
    sharegpt = export_row(to_messages(first), "sharegpt", {})
    assert "messages" not in sharegpt
    again = export_row(to_messages(sharegpt), "messages", {})
    assert again == first and same(to_messages(sharegpt), row)


def test_alpaca_holds_what_it_can_and_refuses_the_rest():
    held = 0
    for seed in range(200):
        row = random_conversation(random.Random(seed))
        plain = all(set(message) == {"role", "content"} for message in row["messages"]) and not row["tools"]
        if plain:
            held += 1
            assert same(to_messages(export_row(row, "alpaca", {})), row)
        else:
            with pytest.raises(RowError, match="^Alpaca has no "):
                export_row(row, "alpaca", {})
    assert 20 < held < 180


def test_a_row_that_would_be_read_differently_is_refused(monkeypatch):
    write, read = TARGETS["sharegpt"]

    def forget_reasoning(row):
        return write({**row, "messages": [{**m, "reasoning_content": ""} for m in row["messages"]]})

    monkeypatch.setitem(TARGETS, "sharegpt", (forget_reasoning, read))
    row = {"messages": [PLAIN[0], {**PLAIN[1], "reasoning_content": "think"}], "tools": None}
    with pytest.raises(RowError, match="sharegpt cannot hold it without a change"):
        export_row(row, "sharegpt", {})


def test_the_formats_are_those_that_others_read():
    row = {
        "messages": [
            {"role": "system", "content": "S"},
            PLAIN[0],
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "晴"},
            {"role": "assistant", "content": "晴。"},
        ],
        "tools": [TOOL],
    }
    assert export_row(row, "sharegpt", {}) == {
        "conversations": [
            {"from": "system", "value": "S"},
            {"from": "human", "value": PLAIN[0]["content"]},
            {
                "from": "function_call",
                "value": '{"name": "weather", "arguments": {"city": null, "days": 1.5, "名": "上海"}}',
            },
            {"from": "observation", "value": "晴"},
            {"from": "gpt", "value": "晴。"},
        ],
        "tools": json.dumps([TOOL["function"]]),
    }
    arguments = '{"city": null, "days": 1.5, "名": "上海"}'
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    assert export_row(row, "messages", {}) == {
        "messages": [
            {"role": "system", "content": "S"},
            PLAIN[0],
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "晴", "tool_call_id": "call_1"},
            {"role": "assistant", "content": "晴。"},
        ],
        "tools": json.dumps([TOOL]),
    }
    history = {"messages": [{"role": "system", "content": "S"}, *PLAIN, *PLAIN], "tools": None}
    question, answer = (message["content"] for message in PLAIN)
    assert export_row(history, "alpaca", {}) == {
        "instruction": question,
        "input": "",
        "output": answer,
        "system": "S",
        "history": [[question, answer]],
    }


def test_an_answer_that_is_context_only_stays_so():
    row = {"messages": [PLAIN[0], {**PLAIN[1], "train": False}, *PLAIN], "tools": None}
    assert export_row(row, "messages", {})["messages"][1] == {**PLAIN[1], "weight": 0}
    assert export_row(row, "sharegpt", {})["conversations"][1]["weight"] == 0
    with pytest.raises(RowError, match="^Alpaca has no answers that are context only, and turn 2 does"):
        export_row(row, "alpaca", {})


@pytest.mark.parametrize(
    ("row", "to", "written"),
    [
        (
            {"Question": "Q", "Complex_CoT": "T", "Response": "A"},
            "messages",
            {
                "messages": [
                    {"role": "user", "content": "Q"},
                    {"role": "assistant", "content": "A", "reasoning_content": "T"},
                ]
            },
        ),
        ({"instruction": "", "input": "Q", "output": "A"}, "alpaca", {"instruction": "Q", "input": "", "output": "A"}),
        (
            {"conversation": [{"human": "Q", "assistant": "A"}], "dataset": "moss"},
            "sharegpt",
            {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], "dataset": "moss"},
        ),
        (
            {"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: B"},
            "preference",
            {
                "prompt": [{"role": "user", "content": "Q"}],
                "chosen": [{"role": "assistant", "content": "A"}],
                "rejected": [{"role": "assistant", "content": "B"}],
            },
        ),
        (
            {"question": "Q?", "answer": "b", "options": {"A": "a", "B": "b"}, "answer_idx": "B"},
            "task",
            {
                "question": "Q?\nA. a\nB. b",
                "answer": "B",
                "options": {"A": "a", "B": "b"},
                "answer_idx": "B",
            },
        ),
    ],
)
def test_rows_of_published_data_sets(tmp_path, row, to, written):
    assert convert(tmp_path, [row], to) == [written]


def test_columns_may_be_named(tmp_path):
    row = {"Frage": "Q", "Antwort": "A", "Nr": 7}
    (written,) = convert(tmp_path, [row], "alpaca", "--columns", "question=Frage,answer=Antwort")
    assert written == {"instruction": "Q", "input": "", "output": "A", "Nr": 7}


def test_rated_answers_become_pairs(tmp_path, capsys):
    """The remedy that reward modeling and DPO print for HelpSteer2, whose rows are rated one by one."""
    rated = [("Q", "good", 4), ("Q", "bad", 0), ("Q", "fair", 2), ("alone", "A", 3), ("same", "A", 1), ("same", "B", 1)]
    rows = [
        {"prompt": prompt, "response": answer, "helpfulness": score, "correctness": 4, "verbosity": score}
        for prompt, answer, score in rated
    ]
    with pytest.raises(RowError) as refused:
        to_preference(rows[0])
    (command,) = re.findall(r"convert_dataset.py --in_file FILE --out_file pairs.jsonl (.+)\.$", refused.value.remedy)
    _, to, *flags = command.split()
    assert convert(tmp_path, rows, to, *flags) == [
        {
            "prompt": [{"role": "user", "content": "Q"}],
            "chosen": [{"role": "assistant", "content": "good"}],
            "rejected": [{"role": "assistant", "content": "bad"}],
            "correctness": 4,
            "score_chosen": 4,
            "score_rejected": 0,
        }
    ]
    assert (
        capsys.readouterr()
        .out.splitlines()[0]
        .endswith(
            "6 rows, left out: 1 between the best and the worst answer, 1 only answer to its prompt, "
            "2 rated as the other answers"
        )
    )
    run_here("validate_jsonl.py", "--file_path", tmp_path / "out.jsonl", "--format", "preference")
    with pytest.raises(
        UserError,
        match="in.jsonl:1: `taste` is not a number .null., and --pair_by.* Name another field, of correctness",
    ):
        convert(tmp_path, rows, "preference", "--pair_by", "taste", name="b.jsonl")
    with pytest.raises(ValueError, match="needs --to preference"):
        ConversionArguments("a", "b", to="alpaca", pair_by="helpfulness")


def test_ids_join_parallel_calls_and_their_results():
    results = [{"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}]
    said = {"role": "assistant", "content": ""}
    messages = openai_messages(
        [PLAIN[0], {**said, "tool_calls": [CALL, CALL]}, *results, {**said, "tool_calls": [CALL]}, results[0]]
    )
    assert [call["id"] for call in messages[1]["tool_calls"]] == ["call_1", "call_2"]
    assert [message.get("tool_call_id") for message in messages[2:]] == ["call_1", "call_2", None, "call_3"]


def test_the_kinds_of_rows(tmp_path, capsys):
    turns = [{"from": "human", "value": "Translate.\n发热"}, {"from": "gpt", "value": "fever"}]
    assert convert(tmp_path, [ALPACA], "sharegpt") == [{"conversations": turns, "id": 7, "source": "book"}]
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path / 'in.jsonl'}: 1 rows, left out: none",
        f"{tmp_path / 'out.jsonl'}: 1 rows, sharegpt",
    ]
    pair = {"conversations": turns[:1], "chosen": "fever", "rejected": "cough"}
    assert convert(tmp_path, [pair], "preference", name="b.jsonl") == [
        {
            "prompt": [{"role": "user", "content": "Translate.\n发热"}],
            "chosen": [{"role": "assistant", "content": "fever"}],
            "rejected": [{"role": "assistant", "content": "cough"}],
        }
    ]
    task = {"question": "1+1?", "answer": "2", "type": "number", "category": "sums"}
    assert convert(tmp_path, [task], "task", name="c.jsonl") == [task]
    (tmp_path / "in.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    assert convert(tmp_path, tmp_path / "in.txt", "text", name="d.json") == [{"text": "one"}, {"text": "two"}]
    convert(tmp_path, tmp_path / "d.json", "text", name="d.jsonl")
    run_here(SCRIPT, "--in_file", tmp_path / "d.jsonl", "--out_file", tmp_path / "d.txt", "--to", "text")
    assert (tmp_path / "d.txt").read_text(encoding="utf-8") == "one\ntwo\n"


@pytest.mark.parametrize("target", ["sharegpt", "messages"])
def test_a_table_gives_back_every_row(tmp_path, target):
    rows = [random_conversation(random.Random(seed)) for seed in range(40)]
    written = [export_row(row, target, {"id": seed}) for seed, row in enumerate(rows)]
    write_rows(tmp_path / "a.parquet", Rows(written))
    found = pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert [row.pop("id") for row in found] == list(range(40))
    for row, table in zip(rows, found, strict=True):
        # Fields that a row does not have are null in a table.
        assert same(to_messages({name: item for name, item in table.items() if item is not None}), row)


@pytest.mark.parametrize("column", [[1, "1"], [1, 0.5], [1, 2**70]])
def test_a_table_that_would_change_a_row_is_refused(tmp_path, column):
    rows = Rows([{"question": "Q", "answer": value} for value in column])
    with pytest.raises(UserError, match=r"Write .jsonl instead"):
        write_rows(tmp_path / "a.parquet", rows)
    write_rows(tmp_path / "a.jsonl", rows)
    assert list(tmp_path.iterdir()) == [tmp_path / "a.jsonl"]


def test_objects_of_different_fields_do_not_get_each_others_fields(tmp_path):
    rows = [{"text": "a", "meta": {"x": 1}}, {"text": "b", "meta": {"y": None}}, {"text": "c"}]
    write_rows(tmp_path / "a.parquet", Rows(rows))
    found = pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert [row["meta"] for row in found] == ['{"x": 1}', '{"y": null}', None]


def test_what_is_refused_is_named_and_the_remedies_work(tmp_path, capsys):
    chat = [PLAIN[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "晴"}]
    rows = [{"messages": PLAIN}, {"messages": [*chat, PLAIN[1]], "tools": [TOOL]}, "{broken", {"prompt": ""}]
    with pytest.raises(UserError) as refused:
        convert(tmp_path, rows, "alpaca")
    lines = str(refused.value).splitlines()
    assert lines[0] == "3 row(s) cannot be converted to alpaca:" and not (tmp_path / "out.jsonl").exists()
    for number, reason in ((2, "Alpaca has no tools"), (3, "broken JSON"), (4, "")):
        assert sum(f"in.jsonl:{number}: {reason}" in line for line in lines) == 1
    assert lines[-1].startswith("Nothing was written.")
    assert convert(tmp_path, rows, "alpaca", *re.findall(r"--skip_bad_rows True", lines[-1])[0].split()) == [
        {"instruction": PLAIN[0]["content"], "input": "", "output": PLAIN[1]["content"]}
    ]
    assert "4 rows, left out: 2 unusable, 1 not convertible" in capsys.readouterr().out
    advised = re.findall(r"--to (\w+)", next(line for line in lines if "Alpaca" in line))
    assert advised == ["messages", "sharegpt"]
    for number, target in enumerate(advised):
        assert len(convert(tmp_path, rows[:2], target, name=f"{number}.jsonl")) == 2
    with pytest.raises(UserError, match="every row was skipped"):
        convert(tmp_path, [{"prompt": ""}], "alpaca", "--skip_bad_rows", name="none.jsonl")
    assert not (tmp_path / "none.jsonl").exists()


def test_preferences_are_not_conversations(tmp_path):
    with pytest.raises(UserError, match="in.jsonl:1: "):
        convert(tmp_path, [{"prompt": "Q", "chosen": "A", "rejected": "B"}], "sharegpt")
    with pytest.raises(UserError, match="in.jsonl:1: "):
        convert(tmp_path, [{"prompt": "Q", "response": "A"}], "preference")
    with pytest.raises(UserError, match="in.jsonl:1: "):
        convert(tmp_path, [{"prompt": "Q", "response": "A"}], "text")


def test_a_file_is_replaced_only_on_request_and_after_success(tmp_path):
    (tmp_path / "out.jsonl").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="exists") as refused:
        convert(tmp_path, [ALPACA], "sharegpt")
    # Before anything is read.
    with pytest.raises(UserError, match="exists"):
        run_here(SCRIPT, "--in_file", tmp_path / "nowhere", "--out_file", tmp_path / "out.jsonl", "--to", "sharegpt")
    with pytest.raises(UserError, match="cannot be converted"):
        convert(tmp_path, [ALPACA, {"prompt": ""}], "sharegpt", "--overwrite")
    assert (tmp_path / "out.jsonl").read_text(encoding="utf-8") == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
    advised = re.search(r"--overwrite True", str(refused.value))[0].split()
    assert len(convert(tmp_path, [ALPACA], "sharegpt", *advised)) == 1


def test_the_input_is_never_the_output(tmp_path):
    path = write_jsonl(tmp_path / "data" / "a.jsonl", [ALPACA])
    for out in (path, tmp_path / "data" / ".." / "data" / "a.jsonl"):
        with pytest.raises(UserError, match="is the input"):
            run_here(SCRIPT, "--in_file", path, "--out_file", out, "--to", "sharegpt", "--overwrite")
    with pytest.raises(UserError, match="would be in the folder"):
        run_here(
            SCRIPT, "--in_file", tmp_path / "data", "--out_file", tmp_path / "data" / "b.jsonl", "--to", "sharegpt"
        )
    assert read_json(path) == [ALPACA]


def test_held_out_rows_of_a_folder_stay_out(tmp_path):
    write_jsonl(tmp_path / "data" / "a.jsonl", [ALPACA])
    write_jsonl(tmp_path / "data" / "validation.jsonl", [{"prompt": "held", "response": "out"}, {"prompt": ""}])
    assert len(convert(tmp_path, tmp_path / "data", "messages")) == 1


def test_rows_can_be_limited_and_fields_left_out(tmp_path):
    rows = [{**ALPACA, "id": number} for number in range(5)]
    written = convert(tmp_path, rows, "alpaca", "--max_samples", 2, "--ignore_fields", "source")
    assert [row["id"] for row in written] == [0, 1] and "source" not in written[0]


def test_the_encoding_may_be_named(tmp_path):
    (tmp_path / "in.txt").write_bytes("é\n".encode("cp850"))
    assert convert(tmp_path, tmp_path / "in.txt", "text", "--encoding", "cp850") == [{"text": "é"}]


def test_the_command_lines_of_medicalgpt(tmp_path, capsys):
    path = tmp_path / "alpaca.json"
    path.write_text(json.dumps([ALPACA]), encoding="utf-8")
    run_here(SCRIPT, "--in_file", path, "--out_file", tmp_path / "out.jsonl", "--data_type", "alpaca")
    assert list(read_json(tmp_path / "out.jsonl")[0]) == ["conversations", "id", "source"]
    run_here(SCRIPT, "--in_file", path, "--out_file", tmp_path / "lines.jsonl", "--data_type", "json2jsonl")
    assert read_json(tmp_path / "lines.jsonl") == [ALPACA]
    (tmp_path / "qa.csv").write_text("input\toutput\nQ\tA\n", encoding="utf-8")
    flags = ("--data_type", "qa", "--file_type", "csv")
    run_here(SCRIPT, "--in_file", tmp_path / "qa.csv", "--out_file", tmp_path / "qa.jsonl", *flags)
    said = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    assert read_json(tmp_path / "qa.jsonl") == [{"conversations": said}]
    for flags, message in (
        ((), "--to is missing"),
        (("--data_type", "qa", "--to", "alpaca"), "--data_type qa means --to sharegpt"),
    ):
        with pytest.raises(SystemExit):
            run_here(SCRIPT, "--in_file", path, "--out_file", "x.jsonl", *flags)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(("name", "reason"), [("a.csv", "suffix"), ("a", "suffix"), ("a.txt", "documents only")])
def test_files_that_cannot_be_written(tmp_path, name, reason):
    with pytest.raises(UserError, match=reason):
        convert(tmp_path, [ALPACA], "sharegpt", name=name)
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        convert(tmp_path, [ALPACA], "sharegpt", "--overwrite", name="folder.jsonl")


def test_documents_of_several_lines_are_not_lines_of_text(tmp_path):
    with pytest.raises(UserError, match="row 2 is not one line") as refused:
        convert(tmp_path, [{"text": "a"}, {"text": "b\nc"}], "text", name="a.txt")
    assert "Write .jsonl instead" in str(refused.value)
    assert len(convert(tmp_path, tmp_path / "in.jsonl", "text", name="a.jsonl")) == 2


# --- data sets of the hub ---------------------------------------------------------------------------------------------


def test_a_data_set_of_datasets_is_converted(tmp_path, capsys):
    """Under the name that it would have on the hub; here it is a folder, since tests have no network."""
    rows = [{"Question": f"{number}?", "Response": "Rest."} for number in range(3)]
    saved = {"train": Dataset.from_list(rows), "test": Dataset.from_list(rows[:1])}
    DatasetDict(saved).save_to_disk(tmp_path / "saved")
    flags = ("--to", "alpaca", "--columns", "question=Question,answer=Response")
    run_here(SCRIPT, "--dataset_name", tmp_path / "saved", "--out_file", tmp_path / "a.jsonl", *flags)
    wanted = [{"instruction": f"{number}?", "input": "", "output": "Rest."} for number in range(3)]
    assert [{**each, "input": each.get("input", "")} for each in read_json(tmp_path / "a.jsonl")] == wanted
    assert f"{tmp_path / 'saved'}: 3 rows, left out: none" in capsys.readouterr().out
    more = ("--dataset_split", "test", "--out_file", tmp_path / "b.jsonl")
    run_here(SCRIPT, "--dataset_name", tmp_path / "saved", *more, *flags)
    assert len(read_json(tmp_path / "b.jsonl")) == 1
    (tmp_path / "repository").mkdir()
    write_jsonl(tmp_path / "repository" / "one.jsonl", rows)
    write_jsonl(tmp_path / "repository" / "two.jsonl", rows[:2])
    more = ("--data_files", "two.jsonl", "--out_file", tmp_path / "c.jsonl")
    run_here(SCRIPT, "--dataset_name", tmp_path / "repository", *more, *flags)
    assert len(read_json(tmp_path / "c.jsonl")) == 2


@pytest.mark.parametrize("sources", [(), ("--in_file", "a.jsonl", "--dataset_name", "b/c")])
def test_one_source_is_converted(tmp_path, sources, capsys):
    with pytest.raises(SystemExit):
        run_here(SCRIPT, *sources, "--out_file", tmp_path / "out.jsonl", "--to", "sharegpt")
    assert "exactly one of --in_file and --dataset_name" in capsys.readouterr().err
