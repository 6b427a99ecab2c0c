"""The files that people have, read row by row with their places, in memory and streamed alike."""

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import textwrap
from pathlib import Path

from medicalgpt.args import DataArguments
from medicalgpt.data.loading import load_data
from medicalgpt.data.streaming import check_data
from medicalgpt.errors import UserError
from medicalgpt.formats.conversion import to_messages, to_text
from medicalgpt.readers import text_files
from medicalgpt.readers.problems import Problem
from medicalgpt.readers.sources import open_file, read_rows
from tests.helpers import ROOT, write_jsonl

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import zstandard
from openpyxl import Workbook

ROWS = [
    {"instruction": "感冒了怎么办？", "output": "多休息，\n多喝水。"},
    {"instruction": '什么是"三高"？', "input": "简短", "output": "血压、血脂、血糖高。"},
]


def write_table(path: Path, rows=ROWS) -> Path:
    """Rows in the format that the suffix says, as the usual libraries write them."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if path.suffix == ".xlsx":
        book = Workbook()
        book.active.append(columns)
        for row in rows:
            book.active.append([row.get(name) for name in columns])
        book.save(path)
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, columns, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    else:
        table = pa.table({name: [row.get(name) for row in rows] for name in columns})
        if path.suffix == ".parquet":
            pq.write_table(table, path)
        elif path.suffix == ".feather":
            pyarrow.feather.write_feather(table, path)
        else:
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
                stream.write_table(table)
    return path


def packed(suffix: str, data: bytes) -> bytes:
    compress = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress}
    # Two packed parts, as tools that append write them.
    half = len(data) // 2
    return compress[suffix](data[:half]) + compress[suffix](data[half:])


def values(path: Path) -> list:
    return [row.value for row in read_rows(path)]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet", ".arrow", ".feather", ".xlsx"])
def test_tables_are_read_in_memory_and_streamed(tmp_path, suffix):
    path = write_table(tmp_path / f"rows{suffix}")
    assert values(path) == ROWS
    arguments = DataArguments(train_file_dir=str(tmp_path))
    loaded, streamed = load_data(arguments, to_messages), check_data(arguments, to_messages)
    assert [row["messages"][-1]["content"] for row in loaded.train] == [row["output"] for row in ROWS]
    (file,) = streamed.streams[0].files
    assert [row.value for row in file.read("auto")] == ROWS
    assert [row.place for row in file.read("auto")] == [row.place for row in read_rows(path)]
    (account,) = loaded.account["train"]
    assert account.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() and account.rows == 2
    first, second = [str(row.place).removeprefix(str(path)) for row in read_rows(path)]
    # Lines of a text, of which the first row has two; in Excel the numbers that it shows.
    assert (first, second) == {".csv": (":2", ":4"), ".tsv": (":2", ":4"), ".xlsx": (":row 2", ":row 3")}.get(
        suffix, (":row 1", ":row 2")
    )


@pytest.mark.parametrize("held", [0, 1_000_000])
@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_compressed_files(tmp_path, monkeypatch, name, suffix, held):
    monkeypatch.setattr(text_files, "MAX_HELD_BYTES", held)
    plain = tmp_path / name
    if name == "rows.csv":
        write_table(plain)
    else:
        write_jsonl(plain, ROWS)
    path = tmp_path / f"{name}{suffix}"
    path.write_bytes(packed(suffix, plain.read_bytes()))
    assert values(path) == ROWS
    assert open_file(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="cannot be unpacked"):
        values(path)


def test_a_compressed_text_of_another_encoding(tmp_path):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress("感冒是病毒感染。\n要多喝水。\n".encode("gb18030")))
    assert values(path) == ["感冒是病毒感染。", "要多喝水。"]
    (tmp_path / "b.md.gz").write_bytes(gzip.compress(b"one\n\ntwo\n"))
    assert values(tmp_path / "b.md.gz") == ["one\n\ntwo"]


def test_a_folder_of_all_formats_is_trained_on_entirely(tmp_path):
    """`d/a.jsonl` next to tables was all that was read."""
    suffixes = (".csv", ".tsv", ".parquet", ".arrow", ".xlsx", ".jsonl", ".jsonl.gz")
    for number, suffix in enumerate(suffixes):
        rows = [{"prompt": f"Q{number}", "response": "A"}]
        if ".jsonl" in suffix:
            data = json.dumps(rows[0]).encode()
            (tmp_path / f"f{number}{suffix}").write_bytes(gzip.compress(data) if "gz" in suffix else data)
        else:
            write_table(tmp_path / f"f{number}{suffix}", rows)
    data = load_data(DataArguments(train_file_dir=str(tmp_path)), to_messages)
    assert [row["messages"][0]["content"] for row in data.train] == [f"Q{n}" for n in range(len(suffixes))]


def test_a_column_of_text_for_pretraining(tmp_path):
    for suffix in (".csv", ".parquet"):
        write_table(tmp_path / f"{suffix[1:]}_rows{suffix}", [{"text": f"Ein Text, {suffix}"}])
    data = load_data(DataArguments(train_file_dir=str(tmp_path)), to_text)
    assert [row["text"] for row in data.train] == ["Ein Text, .csv", "Ein Text, .parquet"]


ENGLISH = (
    "A cold is an infection of the nose and throat with a virus. It is mostly harmless and ends within ten days. Drink "
    "enough and rest; antibiotics do not help. See a doctor if the fever lasts for more than three days or breathing "
    "becomes hard. Children with asthma are to be seen earlier, as are people of a high age or with a weak heart."
)
CHINESE = (
    "感冒是鼻和咽喉的病毒感染，多数没有危险，十天之内就会好转。要多喝水，多休息，抗生素没有帮助。如果发热超过三天，或者呼吸"
    "困难，应当及时去医院就诊。有哮喘的儿童、年纪较大的人和心脏功能不好的人应当更早就诊，因为他们的病情可能很快加重，需要医生"
    "密切观察。家里有人感冒时要勤洗手，常开窗通风，不要共用毛巾和餐具。"
)


@pytest.mark.parametrize("blank", [True, False])
@pytest.mark.parametrize(("text", "width"), [(ENGLISH, 60), (CHINESE, 24)])
def test_wrapped_lines_are_noticed_and_the_remedy_gives_whole_documents(tmp_path, log, text, width, blank):
    lines = textwrap.wrap(text, width)
    documents = ["\n".join(lines)] * 3 if blank else ["\n".join(lines * 2)]
    (tmp_path / "a.txt").write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    arguments = DataArguments(train_file_dir=str(tmp_path))
    load_data(arguments, to_text)
    check_data(arguments, to_text)
    unit = "paragraph" if blank else "file"
    noticed = [line for line in log if f"--document_unit {unit};" in line]
    assert len(noticed) == 2 and str(tmp_path / "a.txt") in noticed[0]
    for applied in (unit, "line"):
        data = load_data(arguments, to_text, document_unit=applied)
        expected = documents if applied == unit else [line for part in documents for line in part.split("\n")]
        assert [row["text"] for row in data.train] == expected
    assert len([line for line in log if "--document_unit" in line]) == 2


def test_lines_that_are_documents_are_not_taken_for_wrapped_ones(tmp_path, log):
    documents = [f"{number}. {sentence}." for number, sentence in enumerate(ENGLISH.split(".")[:-1] * 4)]
    titles = [f"第{number}章 {CHINESE[: number % 7 + 2]}" for number in range(20)]
    (tmp_path / "a.txt").write_text("\n".join([*documents, *titles]), encoding="utf-8")
    (tmp_path / "b.txt").write_text("\n".join([ENGLISH.rstrip(".")] * 20), encoding="utf-8")
    for place in (tmp_path, ROOT / "data" / "pretrain"):
        load_data(DataArguments(train_file_dir=str(place)), to_text)
    assert not any("--document_unit" in line for line in log)


# --- JSON under another suffix ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson"])
@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ('{"text": "a"}\n{"text": "b"}\n', [1, 2]),
        ('\n{"text": "a"}\n\n{"text": "b"}', [2, 4]),
        ('[\n {"text": "a"},\n {"text": "b"}\n]\n', [2, 3]),
        ('[{"text": "a"}, {"text": "b"}]', [1, 1]),
        ('{\n "text": "a"\n}\n{\n "text": "b"\n}\n', [1, 4]),
    ],
    ids=["lines", "blank lines", "list", "list in a line", "objects over lines"],
)
def test_lines_and_lists_whatever_the_suffix(tmp_path, name, text, lines):
    (tmp_path / name).write_text(text, encoding="utf-8")
    rows = list(read_rows(tmp_path / name))
    assert [row.value for row in rows] == [{"text": "a"}, {"text": "b"}]
    assert [row.place.line for row in rows] == lines


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_broken_line_costs_one_row(tmp_path, name):
    for lines in (['{"text": "a"}', '{"text": b}', '{"text": "c"}'], ['{"text": a}', '{"text": "b"}', '{"text": "c"}']):
        (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
        rows = list(read_rows(tmp_path / name))
        assert [isinstance(row, Problem) for row in rows].count(True) == 1 and len(rows) == 3


@pytest.mark.parametrize("key", ["data", "rows", "train", "examples", "instances"])
def test_an_object_that_holds_the_rows(tmp_path, key):
    path = tmp_path / "a.json"
    # The key also occurs in a value before the list.
    value = {"version": f'"{key}": [1]', key: [{"prompt": "Q1", "response": "A1"}, {"prompt": "Q2", "response": "A2"}]}
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
    rows = list(read_rows(path))
    assert [row.value for row in rows] == value[key]
    assert [str(row.place) for row in rows] == [f"{path}:4 (row 1)", f"{path}:8 (row 2)"]
    path.write_text(json.dumps(value), encoding="utf-8")
    assert values(path) == value[key]


def test_an_object_that_is_a_row_stays_one(tmp_path):
    path = tmp_path / "a.json"
    for value in ({"messages": [{"role": "user", "content": "x"}]}, {"prompt": "Q", "response": "A", "data": "text"}):
        path.write_text(json.dumps(value), encoding="utf-8")
        assert values(path) == [value]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"data": [{"title": "t", "paragraphs": [{"context": "c", "qas": []}]}]}, "SQuAD"),
        ({"data": [[1, 2]], "version": 1}, "is not a list of objects"),
        ({"train": [{"text": "a"}], "test": [{"text": "b"}]}, "several lists of rows .train, test."),
        ({"q": {"0": "a", "1": "b"}, "a": {"0": "c", "1": "d"}}, 'orient="records"'),
    ],
)
def test_other_objects_are_refused_with_the_reason(tmp_path, value, reason):
    (tmp_path / "a.json").write_text(json.dumps(value), encoding="utf-8")
    with pytest.raises(UserError, match=reason):
        values(tmp_path / "a.json")


def test_json_lines_in_a_text_are_named_and_the_remedy_works(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text('{"问": "感冒怎么办?", "答": "多休息"}\n', encoding="utf-8")
    with pytest.raises(UserError, match="has rows of JSON.*Rename it: rows.jsonl"):
        load_data(DataArguments(train_file_dir=str(path)), to_text)
    assert values(path.rename(tmp_path / "rows.jsonl")) == [{"问": "感冒怎么办?", "答": "多休息"}]
    (tmp_path / "b.txt").write_text("{} stands for a place\n{x} too\n", encoding="utf-8")
    assert len(values(tmp_path / "b.txt")) == 2


# --- CSV and Excel ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_the_delimiter_is_found(tmp_path, delimiter, suffix):
    path = tmp_path / f"a{suffix}"
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerows([["prompt", "response"], ["one, two; three", "A|B"], ["Q2", "line 1\nline 2"]])
    path.write_text(text.getvalue(), encoding="utf-8", newline="")
    assert values(path) == [
        {"prompt": "one, two; three", "response": "A|B"},
        {"prompt": "Q2", "response": "line 1\r\nline 2".replace("\r", "")},
    ]


def test_cells_are_text_empty_ones_absent_and_lists_are_lists(tmp_path):
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    path = tmp_path / "a.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["", "messages", "prompt", "score"])
        writer.writerow([0, json.dumps(turns), "[INST] is text", "05"])
        # As pandas prints lists.
        writer.writerow([1, str(turns), "", " "])
    assert values(path) == [
        {"Unnamed: 0": "0", "messages": turns, "prompt": "[INST] is text", "score": "05"},
        {"Unnamed: 0": "1", "messages": turns},
    ]


def test_rows_of_another_width_and_open_quotes_are_problems(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,response\nQ1,A1\nQ2,A2, and more\nQ3,A3\n", encoding="utf-8")
    good, bad, last = read_rows(path)
    assert last.value == {"prompt": "Q3", "response": "A3"}
    assert str(bad).startswith(f"{path}:3: the row has 3 cells, the header 2 [and more]")
    path.write_text('prompt,response\nQ1,A1\nQ2,"A2\nQ3,A3\n', encoding="utf-8")
    assert [type(row).__name__ for row in read_rows(path)] == ["SourceRow", "Problem"]
    path.write_text("a,a\n1,2\n", encoding="utf-8")
    with pytest.raises(UserError, match="has a twice"):
        values(path)


def test_a_csv_in_another_encoding(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("问题,回答\n感冒怎么办？,多休息\n".encode("gb18030"))
    assert values(path) == [{"问题": "感冒怎么办？", "回答": "多休息"}]


def test_numbers_and_sheets_of_excel(tmp_path):
    path = tmp_path / "a.xlsx"
    book = Workbook()
    for row in (["question", "answer"], [None, None], ["2 + 2 = ?", 4], ["0.5 + 1 = ?", 1.5]):
        book.active.append(row)
    book.create_sheet("empty")
    book.save(path)
    assert values(path) == [{"question": "2 + 2 = ?", "answer": "4"}, {"question": "0.5 + 1 = ?", "answer": "1.5"}]
    assert [str(row.place) for row in read_rows(path)] == [f"{path}:row 3", f"{path}:row 4"]
    book["empty"].append(["more"])
    book["empty"].sheet_state = "hidden"
    book.save(path)
    with pytest.raises(UserError, match=r"has 2 sheets with rows .Sheet, empty \(hidden\)."):
        values(path)


def test_a_title_above_the_names_of_the_columns(tmp_path):
    path = tmp_path / "a.xlsx"
    book = Workbook()
    for row in (["Questions of 2024"], ["question", "answer"], ["1?", "1"]):
        book.active.append(row)
    book.save(path)
    problems = list(read_rows(path))
    assert [problem.remedy for problem in problems] == [
        "The header is the first row that is not empty: remove what is above the names of the columns."
    ] * 2
    book.active.delete_rows(1)
    book.save(path)
    assert values(path) == [{"question": "1?", "answer": "1"}]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".xlsx"])
def test_damaged_tables_are_refused(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"PAR1 this is not a table")
    with pytest.raises(UserError, match="is damaged, or not a file of its suffix"):
        values(path)


# --- what columns of Arrow hold --------------------------------------------------------------------------------------


def test_nested_columns_nulls_and_other_types(tmp_path):
    from datetime import date
    from decimal import Decimal

    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    table = pa.table(
        {
            "messages": [turns, turns],
            "score": pa.array([1.5, float("nan")]),
            "day": [date(2024, 1, 2), None],
            "price": [Decimal("1.50"), Decimal("2.00")],
            "raw": [b"text", b"\xff\xfe"],
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    first, second = values(tmp_path / "a.parquet")
    assert first == {"messages": turns, "score": 1.5, "day": "2024-01-02", "price": 1.5, "raw": "text"}
    assert second == {"messages": turns, "price": 2, "raw": "<2 bytes>"}
    assert json.dumps([first, second])


def test_a_folder_of_save_to_disk(tmp_path, log):
    import datasets

    splits = {name: [{"prompt": f"{name} {n}", "response": "A"} for n in range(3)] for name in ("train", "test")}
    saved = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()})
    saved.save_to_disk(str(tmp_path / "saved"), num_shards={"train": 2, "test": 1})
    write_table(tmp_path / "saved" / "train" / "cache-1f.arrow", splits["train"])
    data = load_data(DataArguments(train_file_dir=str(tmp_path / "saved")), to_messages)
    assert [row["messages"][0]["content"] for row in data.train] == ["train 0", "train 1", "train 2"]
    assert [row["messages"][0]["content"] for row in data.validation] == ["test 0", "test 1", "test 2"]
    assert any("cache-1f.arrow (a cache of datasets" in line for line in log)
    next((tmp_path / "saved" / "train").glob("data-00001*")).unlink()
    with pytest.raises(UserError, match="lacks data-00001-of-00002.arrow"):
        load_data(DataArguments(train_file_dir=str(tmp_path / "saved")), to_messages)
