"""`to_task` and `encode_prompt`: a prompt, and what answers to it may be judged by."""

import json

from medicalgpt.args import DataArguments
from medicalgpt.data.encoding import EncodingError, Prompt, encode_prompt
from medicalgpt.data.loading import load_data
from medicalgpt.data.tokenizing import encode_sides
from medicalgpt.errors import UserError
from medicalgpt.formats.tasks import to_task
from medicalgpt.readers.problems import RowError
from tests.helpers import write_jsonl
from tests.tiny import tiny_tokenizer

import pytest

ASKED = [{"role": "user", "content": "Q"}]


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ("Q", {}),
        ({"question": "Q", "answer": "A"}, {"answer": "A"}),
        ({"question": "Q", "answer": 42, "type": "number"}, {"answer": 42, "type": "number"}),
        ({"prompt": "Q", "response": "A"}, {"answer": "A"}),
        ({"prompt": ASKED, "solution": "x", "answer": "A"}, {"solution": "x", "answer": "A"}),
        ({"prompt": ASKED, "completion": [{"role": "assistant", "content": "A"}]}, {"answer": "A"}),
        ({"instruction": "Q", "input": "", "output": "A", "meta": {"n": 1}}, {"answer": "A", "meta": {"n": 1}}),
        ({"query": "Q", "answer": "A", "response": "B"}, {"answer": "A", "response": "B"}),
        ({"messages": ASKED, "question": "other"}, {"question": "other"}),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, {"answer": "A"}),
        ({"question": "Q", "answer": None}, {}),
        # The question of a row with `input` alone is there once.
        ({"input": "Q", "output": "A"}, {"answer": "A"}),
        ({"instruction": "Q", "input": "", "output": ["A", "B"]}, {"answer": ["A", "B"]}),
        ({"question": "Q", "target": "A"}, {"answer": "A"}),
        ({"Instruction": "Q", "Output": "A"}, {"answer": "A"}),
        ({"问题": "Q", "答案": "A"}, {"answer": "A", "答案": "A"}),
        ({"question": "Q", "context": "", "answer": "A"}, {"answer": "A"}),
        ({"instruction": "Q", "context": "", "response": "A"}, {"answer": "A"}),
        ({"prompt": "Q", "completion": [{"role": "assistant", "content": "A"}], "label": True}, {"answer": "A"}),
        # Lists and objects as strings of JSON, as tables have them.
        (
            {"prompt": json.dumps(ASKED), "reward_model": '{"ground_truth": "A"}'},
            {"answer": "A", "reward_model": '{"ground_truth": "A"}'},
        ),
        # An answer that was rated is not a correct one.
        ({"prompt": "Q", "response": "A", "helpfulness": 0, "correctness": 1}, {"helpfulness": 0, "correctness": 1}),
        ({"question": "Q", "chosen": "A", "rejected": "B"}, {"chosen": "A", "rejected": "B"}),
    ],
)
def test_prompt_and_columns(row, columns):
    assert to_task(row) == {"messages": ASKED, "tools": None, "columns": columns}


def test_pairs_that_hold_their_prompt():
    turns = [[*ASKED, {"role": "assistant", "content": text}] for text in "AB"]
    task = to_task({"chosen": turns[0], "rejected": turns[1], "source": "s"})
    assert task["messages"] == ASKED and task["columns"]["source"] == "s"


def test_the_history_stays_and_the_last_answer_goes():
    turns = [("human", "1"), ("gpt", "2"), ("human", "3"), ("gpt", "4")]
    row = {"system": "S", "conversations": [{"from": role, "value": text} for role, text in turns]}
    task = to_task(row)
    assert [message["content"] for message in task["messages"]] == ["S", "1", "2", "3"]
    assert task["columns"] == {"answer": "4"}


def test_ignored_fields_are_no_columns():
    assert to_task({"question": "Q", "answer": "A", "noise": 1}, frozenset({"noise"}))["columns"] == {"answer": "A"}


@pytest.mark.parametrize("row", [3, {}, {"answer": "A"}, {"question": " "}, {"messages": []}])
def test_what_has_no_prompt_is_refused(row):
    with pytest.raises(RowError):
        to_task(row)


def test_a_prompt_that_is_trained_on_is_not_held_out_whatever_its_answer(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"question": "Q", "answer": "A"}])
    write_jsonl(tmp_path / "validation.jsonl", [{"question": " Q ", "answer": "B"}])
    with pytest.raises(UserError, match="has the prompt of"):
        load_data(DataArguments(train_file_dir=str(tmp_path)), to_task)


def test_prompts_are_what_serving_sends():
    tokenizer = tiny_tokenizer()
    task = to_task({"system": "S", "question": "Q"})
    (sample,) = encode_prompt(tokenizer, task)
    served = tokenizer.apply_chat_template(task["messages"], add_generation_prompt=True, return_dict=False)
    assert sample == Prompt(served)


def test_a_prompt_is_never_cut():
    tokenizer = tiny_tokenizer()
    task = to_task("Q")
    length = len(encode_prompt(tokenizer, task)[0].prompt_ids)
    assert encode_prompt(tokenizer, task, max_length=length)
    with pytest.raises(EncodingError, match=f"{length} tokens") as caught:
        encode_prompt(tokenizer, task, max_length=length - 1)
    assert caught.value.too_long


def test_a_special_token_in_a_text_is_refused():
    tokenizer = tiny_tokenizer()
    with pytest.raises(EncodingError, match="special token"):
        encode_prompt(tokenizer, to_task(f"Q{tokenizer.eos_token}"))


def test_prompts_become_columns_and_long_ones_are_counted(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"question": "short"}, {"question": "long " * 90}])
    arguments = DataArguments(train_file_dir=str(tmp_path), skip_long_rows=True)
    data = load_data(arguments, to_task)
    train, validation = encode_sides(
        data, lambda row: encode_prompt(tiny_tokenizer(), row, max_length=60), arguments, 0, Prompt
    )
    assert train.column_names == ["prompt_ids", "place"] and len(train) == 1 and validation is None
    assert data.account["train"][0].as_dict()["left_out"] == {"too long": 1}
