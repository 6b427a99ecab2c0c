"""What stands before an answer in training is, id by id, what serving puts before the model when it is to answer."""

from medicalgpt.data.encoding import EncodingError, encode_chat, render_prompts
from medicalgpt.formats.conversion import to_messages
from medicalgpt.serving.chat import ChatEngine, ChatTemplateError
from medicalgpt.serving.generation import GenerationRequest, Sampling
from template import TEMPLATES
from tests.helpers import chat, open_stage, save_model, write_jsonl
from tests.silent.chats import (
    IN_EVERY_SHAPE_AND_KIND,
    PAIRS,
    REFUSED,
    ROWS,
    conversation,
    load,
    saved_tokenizers,
    sharegpt,
    supervised_runs,
    turns_of,
)
from tests.templates import CORE, NO_SYSTEM, TOKENIZERS

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


@pytest.mark.parametrize(
    ("name", "shape", "kind", "system_prompt"),
    [
        (*case, prompt)
        for case in IN_EVERY_SHAPE_AND_KIND
        for prompt in (None, "Answer kindly. 请简短。")
        if prompt is None or case[0] in CORE or (case[0] not in NO_SYSTEM and case[1] == "many turns")
    ],
)
def test_ids_before_each_answer(folders, model, name, shape, kind, system_prompt):
    tokenizer, _ = load(folders[kind], name, system_prompt)
    engine = ChatEngine(model, tokenizer)
    messages, tools = conversation(shape)
    samples = encode_chat(tokenizer, chat(messages, tools))
    turns = turns_of(messages)
    assert sorted(prompts_in_training(samples)) == sorted(engine.prompt_ids(messages[:turn], tools) for turn in turns)
    # qwen3 takes the thoughts out of earlier turns, so that each turn has a beginning of its own.
    if name in CORE:
        assert len(samples) == (len(turns) if name == "qwen3" else 1)


@pytest.mark.parametrize(("name", "shape"), REFUSED)
def test_what_has_no_place_is_refused_by_both(folders, model, name, shape):
    tokenizer, _ = load(folders["metaspace"], name)
    messages, tools = conversation(shape)
    with pytest.raises(EncodingError, match="the chat template refuses it"):
        encode_chat(tokenizer, chat(messages, tools))
    with pytest.raises(ChatTemplateError):
        # Thoughts stand in the turns that a prompt shows.
        ChatEngine(model, tokenizer).prompt_ids(messages if shape == "thinking" else messages[:-1], tools)


def test_hardly_anything_is_refused():
    """A family that refuses everything would pass each test here."""
    for shape in ("one turn", "many turns", "history", "thinking in the text"):
        assert not [name for name, refused in REFUSED if refused == shape]
    for name in CORE:
        assert {shape for refused, shape in REFUSED if refused == name} <= {"thinking"}
    assert len(PAIRS) > 3 * len(REFUSED)


@pytest.mark.parametrize("name", TEMPLATES)
def test_samples_during_training_are_asked_as_in_serving(folders, model, name):
    tokenizer, _ = load(folders["byte_like_qwen"], name)
    rows = [to_messages(ROWS[shape][0]) for shape in ("one turn", "tools", "system") if (name, shape) in PAIRS]
    prompts = render_prompts(tokenizer, rows, 3)
    assert len(prompts) == len(rows)
    engine = ChatEngine(model, tokenizer)
    for row, prompt in zip(rows, prompts, strict=True):
        expected = engine.prompt_ids(row["messages"][: turns_of(row["messages"])[0]], row["tools"])
        assert prompt == expected


@pytest.mark.parametrize("system_prompt", [None, "Answer kindly."])
@pytest.mark.parametrize("name", CORE)
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


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name, shape, kind in IN_EVERY_SHAPE_AND_KIND if shape == "many turns"]
)
def test_answer_put_into_the_history_reads_as_it_was_trained(folders, model, name, kind):
    """The text that serving gives for the trained ids renders to these ids again when the conversation goes on."""
    tokenizer, _ = load(folders[kind], name)
    engine = ChatEngine(model, tokenizer)
    messages = to_messages(sharegpt("I have a headache.", "Drink water. ", "And then?", "Sleep."))["messages"]
    first, last = (encode_chat(tokenizer, chat(messages[:end]))[-1] for end in (2, 4))
    ((start, ids),) = supervised_runs(first.labels)
    row = engine.begin(GenerationRequest(first.input_ids[:start], Sampling()))
    for token in ids:
        row.add(token)
    history = [messages[0], {"role": "assistant", "content": row.answer.text}, messages[2]]
    assert engine.prompt_ids(history) == last.input_ids[: supervised_runs(last.labels)[-1][0]]
