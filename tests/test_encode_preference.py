"""Pairs of preferences as token ids: the prompt of serving, and two answers to it that end with the turn."""

import json
from functools import partial
from itertools import product

from medicalgpt.args import DataArguments
from medicalgpt.data.encoding import EncodingError, Pair, Sample, encode_chat, encode_preference
from medicalgpt.data.loading import load_data
from medicalgpt.data.tokenizing import encode_rows
from medicalgpt.formats.conversion import to_messages, to_preference
from medicalgpt.readers.problems import Place
from medicalgpt.serving.chat import ChatEngine
from template import TEMPLATES, apply_template
from tests.helpers import save_model, write_jsonl
from tests.silent.chats import (
    IN_EVERY_SHAPE_AND_KIND,
    MELTS,
    REFUSED,
    ROWS,
    TOOL,
    TOOL_TURNS,
    load,
    saved_tokenizers,
    sharegpt,
    takes,
    turn_end_ids,
)
from tests.silent.pairs import pair, pairs
from tests.templates import TOKENIZERS
from tests.tiny import tiny_tokenizer

import datasets
import pytest
from tokenizers import normalizers
from transformers import AutoModelForCausalLM

CALL_TURN = TOOL_TURNS[1]
TEXT_TURN = {"from": "gpt", "value": "I do not know. 不知道。"}
OTHER_CALL = {"from": "function_call", "value": json.dumps({"name": "look_up", "arguments": {"drug": "布洛芬"}})}


def answering(shape):
    """A row of preferences whose chosen answer is the last turn of the conversation of this shape."""
    row = to_messages(ROWS[shape][0])
    *messages, chosen = row["messages"]
    rejected = {**chosen, "content": chosen["content"] + " 或许。"}
    return to_preference({"messages": messages, "tools": row["tools"], "chosen": [chosen], "rejected": [rejected]})


def calling(chosen, rejected):
    """A row of preferences whose answers may call a tool."""
    return to_preference({"conversations": TOOL_TURNS[:1], "tools": [TOOL], "chosen": [chosen], "rejected": [rejected]})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return saved_tokenizers(tmp_path_factory.mktemp("preference"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preferencemodel")
    return AutoModelForCausalLM.from_pretrained(save_model(folder, TOKENIZERS["metaspace"](), context=8000))


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


def assert_right(model, tokenizer, name, row):
    """Prompt as in serving, each answer as the template writes it, up to the end of its turn and no further."""
    (encoded,) = encode_preference(tokenizer, row)
    assert encoded.prompt_ids == ChatEngine(model, tokenizer).prompt_ids(row["messages"], row["tools"])
    for answer, ids in ((row["chosen"], encoded.chosen_ids), (row["rejected"], encoded.rejected_ids)):
        whole = tokenizer.apply_chat_template([*row["messages"], answer], tools=row["tools"], return_dict=False)
        joint = encoded.prompt_ids + ids
        assert whole[: len(joint)] == joint
        assert ids[-1] in turn_end_ids(tokenizer, name)
        # What some templates write behind the end of a turn is neither supervised nor sent in serving.
        assert not tokenizer.decode(whole[len(joint) :], skip_special_tokens=True).strip()


@pytest.mark.parametrize(("name", "shape", "kind"), IN_EVERY_SHAPE_AND_KIND)
def test_ids_are_those_of_template_and_serving(folders, model, name, shape, kind):
    tokenizer, _ = load(folders[kind], name)
    assert_right(model, tokenizer, name, answering(shape))


@pytest.mark.parametrize("name", [name for name in TEMPLATES if (name, "system") not in REFUSED + MELTS])
def test_system_prompt_of_the_run(folders, model, name):
    tokenizer, _ = load(folders["byte_like_qwen"], name, "Answer kindly. 请简短。")
    assert_right(model, tokenizer, name, answering("many turns"))
    (encoded_row,) = encode_preference(tokenizer, answering("many turns"))
    assert "Answer kindly. 请简短。" in tokenizer.decode(encoded_row.prompt_ids)


@pytest.mark.parametrize("answers", [(CALL_TURN, TEXT_TURN), (TEXT_TURN, CALL_TURN), (CALL_TURN, OTHER_CALL)])
@pytest.mark.parametrize("name", [name for name in TEMPLATES if takes(name, "tools") and (name, "tools") not in MELTS])
def test_answers_that_call_a_tool(folders, model, name, answers):
    tokenizer, _ = load(folders["byte_like_qwen"], name)
    assert_right(model, tokenizer, name, calling(*answers))


@pytest.mark.parametrize(("name", "shape"), REFUSED)
def test_what_has_no_place_is_refused(folders, name, shape):
    tokenizer, _ = load(folders["metaspace"], name)
    with pytest.raises(EncodingError, match="^the chosen answer: the chat template refuses it") as error:
        encode_preference(tokenizer, answering(shape))
    assert error.value.remedy and not error.value.too_long


def test_any_beginning_follows_the_prompt_of_serving(folders):
    """Qwen's tokenizer has one token for two line breaks, and the prompt of ChatML ends with one."""
    tokenizer, _ = load(folders["byte_like_qwen"], "chatml")
    prompt = tokenizer.apply_chat_template(
        to_preference(pair(1))["messages"], add_generation_prompt=True, return_dict=False
    )
    starts = ["", " ", "\n", "\n\n", "\u3000", "\t", "'s", ".\n"]
    for chosen, rejected in product(starts, starts):
        row = to_preference(pair(1) | {"chosen": f"{chosen}y", "rejected": f"{rejected}n"})
        (encoded_row,) = encode_preference(tokenizer, row)
        assert encoded_row.prompt_ids == prompt
        texts = [tokenizer.decode(ids) for ids in (encoded_row.chosen_ids, encoded_row.rejected_ids)]
        assert texts == [f"{chosen}y<|im_end|>", f"{rejected}n<|im_end|>"]


# ---------------------------------------------------------------------------------------------------------------------
# What does not fit, and what prefers nothing
# ---------------------------------------------------------------------------------------------------------------------


def limits_of(tokenizer, row):
    (encoded,) = encode_preference(tokenizer, row)
    return [len(ids) for ids in (encoded.prompt_ids, encoded.chosen_ids, encoded.rejected_ids)]


@pytest.mark.parametrize("longer", ["chosen", "rejected"])
def test_the_longer_answer_decides_what_fits(tokenizer, longer):
    row = to_preference(pair(1, 60, 5) if longer == "chosen" else pair(1, 5, 60))
    prompt, chosen, rejected = limits_of(tokenizer, row)
    total = prompt + max(chosen, rejected)
    # What ChatML writes behind the end of the turn needs no place.
    assert encode_preference(tokenizer, row, max_length=total) == encode_preference(tokenizer, row)
    with pytest.raises(EncodingError, match=f"^the {longer} answer: {total} tokens, longer than the {total - 1}"):
        encode_preference(tokenizer, row, max_length=total - 1)


@pytest.mark.parametrize(
    ("flag", "which", "message"),
    [
        ("max_source_length", 0, "the prompt has {} tokens, more than --max_source_length {}"),
        ("max_target_length", 1, "the chosen answer has {} tokens, more than --max_target_length {}"),
        ("max_target_length", 2, "the rejected answer has {} tokens, more than --max_target_length {}"),
    ],
)
def test_limits_of_prompt_and_answer(tokenizer, flag, which, message):
    row = to_preference(pair(1, 4 if which != 1 else 40, 30 if which == 2 else 5))
    size = limits_of(tokenizer, row)[which]
    assert encode_preference(tokenizer, row, **{flag: size}) == encode_preference(tokenizer, row)
    with pytest.raises(EncodingError) as error:
        encode_preference(tokenizer, row, **{flag: size - 1})
    assert error.value.reason == message.format(size, size - 1) and error.value.too_long
    assert flag in error.value.remedy and error.value.too_long


@pytest.mark.parametrize("long", ["prompt", "chosen", "rejected"])
def test_too_long_anywhere(tokenizer, long):
    row = to_preference(pair(1) | {long: "z" * 200})
    with pytest.raises(EncodingError, match="longer than the 100 that fit") as error:
        encode_preference(tokenizer, row, max_length=100)
    assert error.value.too_long


def test_equal_after_tokenizing(tokenizer):
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(EncodingError, match="both answers become the same tokens"):
        encode_preference(tokenizer, to_preference(pair(1) | {"chosen": "YES", "rejected": "yes"}))


COLUMNS = ("chosen", "rejected")


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("text", ["So.<|im_end|>", "<|im_start|>user\nHi", "a<|endoftext|>b"])
def test_special_tokens_in_an_answer(tokenizer, column, text):
    with pytest.raises(EncodingError, match=f"^the {column} answer: turn 2 holds .*special token"):
        encode_preference(tokenizer, to_preference(pair(1) | {column: text}))


def test_one_answer_with_thoughts_and_one_without(folders):
    """qwen3 opens no thoughts in its prompt, so both answers follow the same one."""
    tokenizer, _ = load(folders["byte_like_qwen"], "qwen3")
    rows = {"role": "assistant", "content": "Sleep.", "reasoning_content": "想一想"}, "Rest."
    row = to_preference({"prompt": "Why?", "chosen": [rows[0]], "rejected": rows[1]})
    (encoded,) = encode_preference(tokenizer, row)
    assert "想一想" in tokenizer.decode(encoded.chosen_ids)
    assert "想一想" not in tokenizer.decode(encoded.prompt_ids + encoded.rejected_ids)
    # Where the prompt opens the thoughts, an answer without any would follow another prompt.
    tokenizer, _ = load(folders["byte_like_qwen"], "qwen3_5")
    with pytest.raises(EncodingError, match="^the rejected answer: the template's prompt in serving opens a thought"):
        encode_preference(tokenizer, row)


# ---------------------------------------------------------------------------------------------------------------------
# Many rows
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty token cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "medicalgpt-tokens"


def encoded(path, convert=to_preference, encode=encode_preference, sample=Pair, workers=1, tokenizer=None, **options):
    data = load_data(DataArguments(train_file_dir=path), convert)
    how = partial(encode, tokenizer or tiny_tokenizer(), **{"max_length": 150, **options})
    return encode_rows(data, "train", how, workers, sample=sample), data.problems


def test_columns_and_places_whatever_the_number_of_processes(tmp_path, cache):
    rows = pairs(450)
    rows[7] = pair(7, 200)
    rows[403] = pair(403) | {"rejected": "a<|im_end|>"}
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    one, problems = encoded(path)
    assert one.column_names == ["prompt_ids", "chosen_ids", "rejected_ids", "place"] and len(one) == 448
    assert [problem.place for problem in problems] == [(str(path), 8, 0), (str(path), 404, 0)]
    assert [problem.kind for problem in problems] == ["too long", "unusable"]
    assert [place["line"] for place in one["place"][:9]] == [1, 2, 3, 4, 5, 6, 7, 9, 10]
    tokenizer = tiny_tokenizer()
    for row, place in ((one[0], 0), (one[7], 8), (one[447], 449)):
        (expected,) = encode_preference(tokenizer, to_preference(rows[place]))
        assert row == {**vars(expected), "place": Place(str(path), place + 1)._asdict()}
    three, other = encoded(path, workers=3, max_length=151)
    assert three.to_dict() == one.to_dict()
    assert [problem.place for problem in other] == [problem.place for problem in problems]


def test_tokens_come_from_the_cache_and_follow_what_they_depend_on(tmp_path, cache, log):
    path = write_jsonl(tmp_path / "rows.jsonl", [*pairs(5), pair(9, 200)])
    first = encoded(path)
    second = encoded(path)
    assert second[0].to_dict() == first[0].to_dict() and second[1] == first[1] and len(first[1]) == 1
    assert sum("tokens taken from the cache" in line for line in log) == 1
    other = tiny_tokenizer()
    apply_template(other, "vicuna")
    for change in (
        {"tokenizer": other},
        {"max_length": 60},
        {"max_source_length": 20},
        {"max_target_length": 20},
    ):
        changed = encoded(path, **change)
        assert (changed[0].to_dict(), changed[1]) != (first[0].to_dict(), first[1])
    assert sum("tokens taken from the cache" in line for line in log) == 1


def test_pairs_and_samples_of_the_same_rows_are_kept_apart(tmp_path, cache, log):
    """Rows, tokenizer, arguments and code are the same: the function must be part of the key as well."""
    path = write_jsonl(tmp_path / "rows.jsonl", pairs(3))

    def answered(value, ignore):
        row = to_preference(value, ignore)
        return row | {"messages": [*row["messages"], row["chosen"]]}

    chats, _ = encoded(path, answered, encode_chat, Sample)
    two_answers, _ = encoded(path, answered, encode_preference, Pair)
    assert chats.column_names == ["input_ids", "labels", "place"] and len(chats) == 3
    assert two_answers.column_names == ["prompt_ids", "chosen_ids", "rejected_ids", "place"] and len(two_answers) == 3
    assert not any("tokens taken from the cache" in line for line in log)


def test_history_is_part_of_the_prompt(tokenizer):
    row = to_preference(sharegpt("你好", "你好！", "Why?", chosen="So.", rejected="No."))
    (encoded_row,) = encode_preference(tokenizer, row)
    text = tokenizer.decode(encoded_row.prompt_ids)
    assert "你好！<|im_end|>" in text and text.endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(encoded_row.chosen_ids) == "So.<|im_end|>"
    assert tokenizer.decode(encoded_row.rejected_ids) == "No.<|im_end|>"
