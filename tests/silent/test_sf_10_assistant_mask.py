"""The supervised tokens of a row are the assistant's texts and turn ends: all of them, and nothing else."""

from medicalgpt.data.encoding import encode_chat
from tests.helpers import chat, open_stage, save_model, write_jsonl
from tests.silent.chats import (
    ROWS,
    conversation,
    expected_answers,
    in_every_shape_and_kind,
    load,
    saved_tokenizers,
    supervised_runs,
    takes,
    thoughts_and_answer,
    turn_end_ids,
    turns_of,
)
from tests.templates import CORE, TOKENIZERS

import pytest


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return saved_tokenizers(tmp_path_factory.mktemp("sf10"))


def supervised_texts(tokenizer, samples):
    for labels in samples:
        for _, ids in supervised_runs(labels):
            text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            # Vicuna's space after "ASSISTANT:" is part of the first token of the answer.
            yield text.removeprefix(" ") if "ASSISTANT:" in tokenizer.chat_template else text


@in_every_shape_and_kind
def test_answers_and_turn_ends(folders, name, shape, kind):
    tokenizer, end = load(folders[kind], name)
    samples = encode_chat(tokenizer, chat(*conversation(shape)))
    texts = list(supervised_texts(tokenizer, [sample.labels for sample in samples]))
    expected = expected_answers(name, shape)
    if name in CORE:
        assert texts == [text + end for text in expected]
    runs = sorted(run for sample in samples for run in supervised_runs(sample.labels))
    assert len(runs) == len(turns_of(conversation(shape)[0]))
    for (_, ids), text in zip(runs, expected, strict=True):
        assert ids[-1] in turn_end_ids(tokenizer, name)
        said = tokenizer.decode(ids[:-1], clean_up_tokenization_spaces=False)
        # Tokenizers with ▁ for the space decode DeepSeek's marks with spaces.
        assert thoughts_and_answer(said.replace("▁", " ")) == thoughts_and_answer(text.replace("▁", " "))
    for sample in samples:
        assert all(label in (-100, token) for token, label in zip(sample.input_ids, sample.labels, strict=True))
        assert supervised_runs(sample.labels)


@pytest.mark.parametrize("name", ["chatml", "qwen3", "llama3"])
def test_everything_on_request(folders, name):
    tokenizer, _ = load(folders["byte_like_qwen"], name)
    answers = encode_chat(tokenizer, chat(*conversation("many turns")))
    everything = encode_chat(tokenizer, chat(*conversation("many turns")), train_on_inputs=True)
    assert [sample.input_ids for sample in everything] == [sample.input_ids for sample in answers]
    assert everything[0].labels == everything[0].input_ids
    trained = "".join(tokenizer.decode([label for label in s.labels if label != -100]) for s in everything)
    for message in conversation("many turns")[0]:
        assert trained.count(f"\n{message['content']}<|") == 1


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("name", CORE)
def test_in_the_batches_of_the_program(tmp_path, name, packing):
    save_model(tmp_path / "model", TOKENIZERS["byte_like_qwen"]())
    shapes = [shape for shape in ROWS if takes(name, shape)]
    write_jsonl(tmp_path / "data" / "rows.jsonl", [ROWS[shape][0] for shape in shapes])
    opened = open_stage(
        "supervised_finetuning.py",
        *("--model_name_or_path", tmp_path / "model", "--train_file_dir", tmp_path / "data", "--packing", packing),
        *("--output_dir", tmp_path / "out", "--template_name", name, "--per_device_train_batch_size", 3),
        *("--model_max_length", 2000),
    )
    batches = [batch["labels"].tolist() for batch in opened.trainer.get_train_dataloader()]
    found = [text for labels in batches for text in supervised_texts(opened.tokenizer, labels)]
    end = opened.tokenizer.eos_token
    assert sorted(found) == sorted(text + end for shape in shapes for text in expected_answers(name, shape))
