"""No token spans the border between prompt and answer: the ids of both, put together, are the ids of the whole."""

import random

from medicalgpt.data.encoding import encode_chat
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


def spelled(name, start, more):
    """Two turns with answers that begin and end with white space; one family always thinks."""
    thoughts = {"reasoning_content": "So."} if name == "qwen3_5" else {}
    turns = [
        {"role": "user", "content": f"Why?{more}"},
        {"role": "assistant", "content": f"{start}x{more}", **thoughts},
        {"role": "user", "content": f"{start}And?"},
        {"role": "assistant", "content": f"{more}y{start}", **thoughts},
    ]
    return turns


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_any_answer_follows_the_prompt_of_serving(folders, kind, name):
    """No beginning of an answer is refused, and each turn is trained once, after the ids that serving has for it."""
    tokenizer, _ = load(folders[kind], name)
    draw = random.Random(0)
    for _ in range(12):
        messages = spelled(name, draw.choice(STARTS), draw.choice(STARTS))
        samples = encode_chat(tokenizer, chat(messages))
        runs = [(sample, start, ids) for sample in samples for start, ids in supervised_runs(sample.labels)]
        for turn, (sample, start, answer) in zip((1, 3), runs, strict=True):
            prompt, whole = (
                tokenizer.apply_chat_template(part, add_generation_prompt=generate, return_dict=False)
                for part, generate in ((messages[:turn], True), (messages[: turn + 1], False))
            )
            assert sample.input_ids[:start] == prompt
            assert sample.input_ids[start : start + len(answer)] == answer
            text = tokenizer.decode(prompt + answer)
            assert tokenizer.decode(whole).startswith(text) and len(text) > len(tokenizer.decode(prompt))


def test_answer_that_joins_the_prompt_is_trained_as_it_is_generated(tmp_path):
    """Qwen's tokenizer has one token for two line breaks, and the prompt of ChatML ends with one."""
    tokenizer = TOKENIZERS["byte_like_qwen"]()
    one, two = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("\n", "\n\n"))
    assert len(one) == len(two) == 1
    save_model(tmp_path / "model", tokenizer)
    rows = [
        {"prompt": "Why?", "response": "So."},
        {"prompt": "Why?", "response": "\nSo."},
        {"messages": [{"role": r, "content": c} for r, c in (("user", "?"), ("assistant", "\n1")) * 2]},
    ]
    write_jsonl(tmp_path / "data" / "rows.jsonl", rows)
    opened = open_stage(
        "supervised_finetuning.py",
        *("--model_name_or_path", tmp_path / "model", "--train_file_dir", tmp_path / "data", "--output_dir"),
        *(tmp_path / "out", "--template_name", "chatml", "--max_steps", 1, "--sample_prompts", 0),
    )
    samples = list(opened.trainer.train_dataset)
    runs = [
        (sample["input_ids"][:start], ids) for sample in samples for start, ids in supervised_runs(sample["labels"])
    ]
    assert [opened.tokenizer.decode(ids) for _, ids in runs] == [
        f"{text}<|im_end|>" for text in ("So.", "\nSo.", "\n1", "\n1")
    ]
    assert [prompt[-1:] for prompt, _ in runs] == [one] * 4
    # In the history of the second turn, serving reads the same characters as one token: a sample of its own.
    assert [prompt.count(two[0]) for prompt, _ in runs] == [0, 0, 0, 1] and len(samples) == 4
    opened.finish()
    (entry,) = read_json(tmp_path / "out" / "run.json")["data"]
    assert (entry["rows"], entry["used"], entry["left_out"]) == (3, 3, {})
