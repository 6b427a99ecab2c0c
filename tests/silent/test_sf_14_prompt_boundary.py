"""No token spans the border between prompt and answer: the ids of both, put together, are the ids of the whole."""

import random

from medicalgpt.data.encoding import EncodingError, encode_chat
from medicalgpt.data.sources import DataError
from template import TEMPLATES
from tests.helpers import chat, open_stage, read_json, save_model, write_jsonl
from tests.silent.chats import (
    KINDS,
    conversation,
    in_every_shape,
    load,
    saved_tokenizers,
    supervised_runs,
    turn_end_ids,
    turns_of,
)
from tests.templates import TOKENIZERS

import pytest

# Beginnings that tokenizers like to join with what stands before them.
STARTS = ["", *" \t:<5你\u3000", "  ", "\n", "\n\n", "\n \n", "\r\n", ".\n", ">\n", "'s"]
# Their prompts end with a colon. Qwen's tokenizer cuts "<think" in another way after it, though not across the border.
COLON = ["ziya", "chatglm2", "intern"]
MELTED = "the first characters of an answer form one token with the end of the prompt"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return saved_tokenizers(tmp_path_factory.mktemp("sf14"))


def prompt_and_answer(tokenizer, messages, tools, turn):
    """Ids of the prompt as serving has it, and of the text that follows it, tokenized alone."""
    prompt = tokenizer.apply_chat_template(
        messages[:turn], tools=tools, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    text, whole = (
        tokenizer.apply_chat_template(part, tools=tools, add_generation_prompt=generate, tokenize=False)
        for part, generate in ((messages[:turn], True), (messages[: turn + 1], False))
    )
    assert whole.startswith(text)
    return prompt, tokenizer(whole[len(text) :], add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "metaspace"])
@in_every_shape
def test_prompt_ids_and_answer_ids_are_the_joint_ids(folders, kind, name, shape):
    tokenizer, _ = load(folders[kind], name)
    messages, tools = conversation(shape)
    samples = encode_chat(tokenizer, chat(messages, tools))
    spans = [(sample.input_ids, start, ids) for sample in samples for start, ids in supervised_runs(sample.labels)]
    for turn, (ids, start, answer) in zip(turns_of(messages), spans, strict=True):
        prompt, alone = prompt_and_answer(tokenizer, messages, tools, turn)
        assert ids[:start] == prompt
        assert ids[start : start + len(answer)] == answer
        assert answer == alone[: len(answer)] or (name in COLON and shape == "thinking in the text")
        assert answer[-1] in turn_end_ids(tokenizer, name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_any_answer_is_encoded_rightly_or_refused(folders, kind, name):
    tokenizer, _ = load(folders[kind], name)
    draw = random.Random(0)
    encoded = 0
    for _ in range(60):
        start, more = draw.choice(STARTS), draw.choice(STARTS)
        messages = [{"role": "user", "content": f"Why?{more}"}, {"role": "assistant", "content": f"{start}x{more}"}]
        if name == "qwen3_5":
            messages[1]["reasoning_content"] = "So."
        prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
        try:
            (sample,) = encode_chat(tokenizer, chat(messages))
        except EncodingError as error:
            assert error.reason.startswith(MELTED) and start[:1].isspace()
            continue
        encoded += 1
        ((at, answer),) = supervised_runs(sample.labels)
        assert sample.input_ids[:at] == prompt
        assert [label for label in sample.labels[at:] if label != -100] == answer
    assert encoded > 30


def test_answer_that_melts_into_the_prompt_is_refused(tmp_path):
    """Qwen's tokenizer has one token for two line breaks, and the prompt of ChatML ends with one."""
    tokenizer = TOKENIZERS["byte_like_qwen"]()
    assert len(tokenizer("\n\n", add_special_tokens=False)["input_ids"]) == 1
    save_model(tmp_path / "model", tokenizer)
    rows = [
        {"prompt": "Why?", "response": "So."},
        {"prompt": "Why?", "response": "\nSo."},
        {"messages": [{"role": r, "content": c} for r, c in (("user", "?"), ("assistant", "\n1")) * 2]},
    ]
    path = write_jsonl(tmp_path / "data" / "rows.jsonl", rows)
    flags = [
        *("--model_name_or_path", tmp_path / "model", "--train_file_dir", tmp_path / "data"),
        *("--output_dir", tmp_path / "out", "--template_name", "chatml", "--max_steps", 1, "--sample_prompts", 0),
    ]
    with pytest.raises(DataError) as error:
        open_stage("supervised_finetuning.py", *flags)
    assert [problem.place for problem in error.value.problems] == [(str(path), 2, 0), (str(path), 3, 0)]
    assert str(error.value).count(MELTED) == 2 and "white space at the start of the answer" in str(error.value)

    open_stage("supervised_finetuning.py", *flags, "--skip_bad_rows", "True").finish()
    (entry,) = read_json(tmp_path / "out" / "run.json")["data"]
    assert (entry["rows"], entry["used"], entry["left_out"]) == (3, 1, {"unusable": 2})
