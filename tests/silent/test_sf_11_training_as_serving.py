"""What stands before an answer in training is, id by id, what serving puts before the model when it is to answer."""

from medicalgpt.chat import ChatEngine, Sampling
from medicalgpt.data import to_messages
from medicalgpt.encoding import encode_chat, render_prompts
from template import TEMPLATES
from tests.helpers import chat, open_stage, save_model, write_jsonl
from tests.silent.chats import (
    KINDS,
    ROWS,
    conversation,
    in_every_shape,
    load,
    saved_tokenizers,
    sharegpt,
    supervised_runs,
    turns_of,
)
from tests.test_template import TOKENIZERS

import pytest
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return saved_tokenizers(tmp_path_factory.mktemp("sf11"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sf11model")
    return AutoModelForCausalLM.from_pretrained(save_model(folder, TOKENIZERS["metaspace"](), context=8000))


def prompts_in_training(samples):
    return [sample.input_ids[:start] for sample in samples for start, _ in supervised_runs(sample.labels)]


@pytest.mark.parametrize("system_prompt", [None, "Answer kindly. 请简短。"])
@pytest.mark.parametrize("kind", KINDS)
@in_every_shape
def test_ids_before_each_answer(folders, model, kind, name, shape, system_prompt):
    tokenizer, _ = load(folders[kind], name, system_prompt)
    engine = ChatEngine(model, tokenizer)
    messages, tools = conversation(shape)
    samples = encode_chat(tokenizer, chat(messages, tools))
    turns = turns_of(messages)
    assert prompts_in_training(samples) == [engine.prompt_ids(messages[:turn], tools) for turn in turns]
    # qwen3 takes the thoughts out of earlier turns, so that each turn has a beginning of its own.
    assert len(samples) == (len(turns) if name == "qwen3" else 1)


@pytest.mark.parametrize("name", TEMPLATES)
def test_samples_during_training_are_asked_as_in_serving(folders, model, name):
    tokenizer, _ = load(folders["byte_like_qwen"], name)
    rows = [to_messages(ROWS[shape][0]) for shape in ("one turn", "tools", "system")]
    prompts = render_prompts(tokenizer, rows, 3)
    engine = ChatEngine(model, tokenizer)
    for row, prompt in zip(rows, prompts, strict=True):
        expected = engine.prompt_ids(row["messages"][: turns_of(row["messages"])[0]], row["tools"])
        assert prompt == expected


@pytest.mark.parametrize("system_prompt", [None, "Answer kindly."])
@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_served_from_the_folder_that_training_leaves(tmp_path, name, system_prompt):
    save_model(tmp_path / "model", TOKENIZERS["byte_adds_bos"]())
    shapes = ["one turn", "many turns", "system", "tools"]
    write_jsonl(tmp_path / "data" / "rows.jsonl", [ROWS[shape][0] for shape in shapes])
    opened = open_stage(
        "supervised_finetuning.py",
        *("--model_name_or_path", tmp_path / "model", "--train_file_dir", tmp_path / "data", "--template_name", name),
        *("--output_dir", tmp_path / "out", "--model_max_length", 2000, "--max_steps", 1, "--sample_prompts", 0),
        *(("--system_prompt", system_prompt) if system_prompt else ()),
    )
    rows = list(opened.trainer.train_dataset)
    opened.finish()
    engine = ChatEngine.from_pretrained(str(tmp_path / "out"))
    served = []
    for shape in shapes:
        messages, tools = conversation(shape)
        served += [engine.prompt_ids(messages[:turn], tools) for turn in turns_of(messages)]
    trained = [row["input_ids"][:start] for row in rows for start, _ in supervised_runs(row["labels"])]
    assert trained == served
    system = "Answer kindly." in engine.tokenizer.decode(served[0])
    assert system is bool(system_prompt)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "qwen3"])
def test_answer_put_into_the_history_reads_as_it_was_trained(folders, model, kind, name):
    """The text that serving gives for the trained ids renders to these ids again when the conversation goes on."""
    tokenizer, _ = load(folders[kind], name)
    engine = ChatEngine(model, tokenizer)
    messages = to_messages(sharegpt("I have a headache.", "Drink water. ", "And then?", "Sleep."))["messages"]
    (sample,) = encode_chat(tokenizer, chat(messages))
    (start, ids), (second, _) = supervised_runs(sample.labels)
    reply = engine._reply_to(sample.input_ids[:start], Sampling())
    for token in ids:
        reply.add(token)
    history = [messages[0], {"role": "assistant", "content": reply.answer().text}, messages[2]]
    assert engine.prompt_ids(history) == sample.input_ids[:second]
