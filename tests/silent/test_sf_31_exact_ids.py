"""Trained ids are the template's own, none added, changed or cut; an end stands only where a turn or document ends."""

from medicalgpt.data.encoding import encode_chat, encode_document
from medicalgpt.readers.problems import DataError
from tests.helpers import chat, open_stage, save_model, write_jsonl
from tests.silent.chats import (
    KINDS,
    PAIRS,
    ROWS,
    conversation,
    in_every_shape_and_kind,
    load,
    saved_tokenizers,
    takes,
    turn_end_ids,
    turns_of,
)
from tests.templates import CORE, TOKENIZERS

import pytest


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return saved_tokenizers(tmp_path_factory.mktemp("sf31"))


def template_ids(tokenizer, shape):
    """What the template renders up to each turn of the assistant."""
    messages, tools = conversation(shape)
    ids = []
    for turn in turns_of(messages):
        text = tokenizer.apply_chat_template(messages[: turn + 1], tools=tools, tokenize=False)
        ids.append(tokenizer(text, add_special_tokens=False)["input_ids"])
        assert tokenizer.apply_chat_template(messages[: turn + 1], tools=tools, return_dict=False) == ids[-1]
    return ids


@in_every_shape_and_kind
def test_ids_are_those_of_the_template(folders, name, shape, kind):
    tokenizer, _ = load(folders[kind], name)
    samples = encode_chat(tokenizer, chat(*conversation(shape)))
    rendered = template_ids(tokenizer, shape)
    # Up to earlier turns only where later ones change them.
    assert all(sample.input_ids in rendered for sample in samples)
    assert samples[-1].input_ids == rendered[-1]
    ends = 0
    for sample in samples:
        # Everything is supervised as it stands, and a turn end is supervised once for each answer.
        assert all(label in (-100, token) for token, label in zip(sample.input_ids, sample.labels, strict=True))
        ends += sum(label in turn_end_ids(tokenizer, name) for label in sample.labels)
    assert ends == len(rendered)


@pytest.mark.parametrize("kind", ["byte_like_qwen", "metaspace"])
@pytest.mark.parametrize(("name", "shape"), [pair for pair in PAIRS if pair[0] in CORE])
def test_limit_refuses_and_never_cuts(folders, name, shape, kind):
    tokenizer, _ = load(folders[kind], name)
    messages, tools = conversation(shape)
    samples = encode_chat(tokenizer, chat(messages, tools))
    longest = max(len(sample.input_ids) for sample in samples)
    assert encode_chat(tokenizer, chat(messages, tools), max_length=longest) == samples
    for limit in (longest - 1, longest // 2, 1):
        with pytest.raises(ValueError, match=f"longer than the {limit} that fit") as error:
            encode_chat(tokenizer, chat(messages, tools), max_length=limit)
        assert error.value.too_long


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("name", CORE)
def test_batches_of_the_program(tmp_path, name, packing):
    save_model(tmp_path / "model", TOKENIZERS["byte_adds_bos"]())
    shapes = [shape for shape in ROWS if takes(name, shape)]
    write_jsonl(tmp_path / "data" / "rows.jsonl", [ROWS[shape][0] for shape in shapes])
    flags = [
        *("--model_name_or_path", tmp_path / "model", "--train_file_dir", tmp_path / "data", "--packing", packing),
        *("--output_dir", tmp_path / "out", "--template_name", name, "--per_device_train_batch_size", 3),
    ]
    opened = open_stage("supervised_finetuning.py", *flags, "--model_max_length", 2000)
    found = []
    for batch in opened.trainer.get_train_dataloader():
        for row, ids in enumerate(batch["input_ids"]):
            if packing:
                starts = (batch["position_ids"][row] == 0).nonzero().flatten().tolist()
                parts = [part.tolist() for part in ids.tensor_split(starts[1:])]
                # What fills up the batch is a sequence of padding alone.
                found += [part for part in parts if set(part) != {opened.tokenizer.pad_token_id}]
            else:
                found.append(ids[batch["attention_mask"][row] == 1].tolist())
    wanted = []
    for shape in shapes:
        ids = template_ids(opened.tokenizer, shape)
        # qwen3 takes the thoughts out of earlier turns, so that each turn has a text of its own.
        wanted += ids if name == "qwen3" else ids[-1:]
    assert sorted(found) == sorted(wanted)
    with pytest.raises(DataError, match="longer than the 60 that fit"):
        open_stage("supervised_finetuning.py", *flags, "--model_max_length", 60, "--long_rows", "refuse")


@pytest.mark.parametrize("block_size", [1, 7, 10, 11, 12, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_document_is_its_tokens_and_one_end(folders, kind, block_size):
    tokenizer, _ = load(folders[kind], "vicuna")
    for text in ("Drink water.", " I have  a headache.\n", "多喝水。早点睡。", "x"):
        pieces = encode_document(tokenizer, {"text": text}, block_size=block_size)
        ids = [token for piece in pieces for token in piece.input_ids]
        assert ids == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        assert ids.count(tokenizer.eos_token_id) == 1
        assert [piece.labels for piece in pieces] == [piece.input_ids for piece in pieces]
        assert all(len(piece.input_ids) == block_size for piece in pieces[:-1])
        assert 1 <= len(pieces[-1].input_ids) <= block_size
