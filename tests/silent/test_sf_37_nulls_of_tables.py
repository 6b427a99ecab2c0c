"""Nulls that a table format filled in are not trained: rows through it and back give the same ids."""

import json

from medicalgpt.data.encoding import encode_chat
from medicalgpt.formats.conversion import to_messages
from template import apply_template
from tests.tiny import tiny_tokenizer

import pyarrow.parquet as pq
import pytest
from datasets import Dataset


@pytest.fixture(scope="module")
def tokenizer():
    apply_template(tokenizer := tiny_tokenizer(), "qwen")
    return tokenizer


def tool(name: str, required: list[str], **properties) -> dict:
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "description": name, "parameters": parameters}}


def calling(name: str, arguments: dict) -> dict:
    return {
        "messages": [
            {"role": "user", "content": "?", "tool_calls": None},
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]},
            {"role": "tool", "content": "done"},
            {"role": "assistant", "content": "Rest."},
        ],
        "tools": [
            tool("weather", ["city"], city={"type": "string"}, unit={"type": "string", "enum": ["C", "F"]}),
            tool("time", [], zone={"type": "string", "nested": {"deep": {"type": "string"}}}),
            tool("ping", []),
        ],
    }


CALLS = [
    calling("weather", {"city": "Bern", "days": [1, 2]}),
    calling("time", {"zone": "CET", "nested": {"deep": {"x": 1}}}),
    calling("ping", {}),
    {"prompt": "What helps?", "response": "Rest."},
]


@pytest.mark.parametrize("how", ["json", "parquet", "rows"])
def test_rows_through_a_table_train_the_same(tmp_path, tokenizer, how):
    """Arrow fills in null where an object has not the field of another row: `"city": null` in the call of `time`."""
    # It takes the names of the columns from the first row.
    table = Dataset.from_list([{"prompt": None, "response": None, **row} for row in CALLS])
    if how == "json":
        table.to_json(tmp_path / "a.jsonl", force_ascii=False)
        rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    elif how == "parquet":
        table.to_parquet(tmp_path / "a.parquet")
        rows = pq.read_table(tmp_path / "a.parquet").to_pylist()
    else:
        rows = list(table)
    assert "null" in json.dumps(rows[1]["messages"][1])
    for row, original in zip(rows, CALLS, strict=True):
        assert to_messages(row) == to_messages(original)
        assert encode_chat(tokenizer, to_messages(row)) == encode_chat(tokenizer, to_messages(original))
    (sample,) = encode_chat(tokenizer, to_messages(rows[1]))
    assert "null" not in tokenizer.decode(sample.input_ids)


def test_a_null_that_is_meant_stays():
    """In a string of JSON no table adds any; in an object one stays if the tool requires the argument."""
    row = calling("weather", {"city": None, "unit": None})
    assert to_messages(row)["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"city": None}
    row["messages"][1]["tool_calls"][0]["function"]["arguments"] = '{"unit": null}'
    assert to_messages(row)["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"unit": None}
    row["tools"] = json.dumps([tool("weather", [], city={"type": "string", "default": None})])
    schema = to_messages(row)["tools"][0]["function"]["parameters"]
    assert schema["properties"]["city"] == {"type": "string", "default": None}
    turns = [
        {"role": "user", "content": "?"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"a": null}}'},
        {"role": "tool", "content": "x"},
    ]
    found = to_messages({"conversations": [*turns, {"role": "assistant", "content": "Rest."}]})
    assert found["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"a": None}
