"""Held-out rows are not trained on, and the loss on them is a property of model and rows, not of the batches."""

import json
import math
import re

from medicalgpt.data.encoding import encode_chat, encode_document
from medicalgpt.errors import UserError
from tests.helpers import chat, open_stage, read_json, run_program, save_model, write_jsonl
from tests.tiny import tiny_tokenizer

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

LENGTHS = (1, 150, 12, 60, 3, 90, 7)
SFT, PT = "supervised_finetuning.py", "pretraining.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("sf28"), tiny_tokenizer())


def rows(stage, start, count):
    if stage == PT:
        return [{"text": f"Document {n} " + "x" * LENGTHS[n % 7]} for n in range(start, start + count)]
    return [{"prompt": f"Question {n}?", "response": "x" * LENGTHS[n % 7]} for n in range(start, start + count)]


def flags(folder, tmp_path, *more):
    return [
        *("--model_name_or_path", folder, "--train_file_dir", tmp_path / "data", "--output_dir", tmp_path / "out"),
        *("--sample_prompts", 0, "--use_peft", "False", "--save_strategy", "no", *more),
    ]


def oracle(folder, stage, held_out):
    """Mean loss, share predicted right and number of the supervised tokens, each row computed alone."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), tiny_tokenizer()
    loss = right = count = 0
    for row in held_out:
        if stage == PT:
            samples = encode_document(tokenizer, {"text": row["text"]}, block_size=100)
        else:
            names = (("user", "prompt"), ("assistant", "response"))
            samples = encode_chat(tokenizer, chat([{"role": role, "content": row[name]} for role, name in names]))
        for sample in samples:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([sample.input_ids])).logits[0, :-1].double()
            targets = torch.tensor(sample.labels[1:])
            loss += cross_entropy(logits, targets, ignore_index=-100, reduction="sum").item()
            right += (logits.argmax(-1) == targets).sum().item()
            count += (targets != -100).sum().item()
    return loss / count, right / count, count


def write_both(stage, tmp_path):
    write_jsonl(tmp_path / "data" / "train.jsonl", rows(stage, 100, 4))
    return write_jsonl(tmp_path / "data" / "validation.jsonl", rows(stage, 0, 7))


def assert_right(metrics, expected):
    loss, accuracy, tokens = expected
    assert metrics["eval_loss"] == pytest.approx(loss, rel=1e-6)
    assert metrics["eval_mean_token_accuracy"] == pytest.approx(accuracy, rel=1e-6)
    assert metrics["eval_supervised_tokens"] == tokens


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("stage", [SFT, PT])
def test_loss_does_not_depend_on_the_batch_size(folder, tmp_path, stage, batch_size):
    write_both(stage, tmp_path)
    more = ["--block_size", 100] if stage == PT else []
    opened = open_stage(stage, *flags(folder, tmp_path, "--per_device_eval_batch_size", batch_size, *more))
    assert_right(opened.trainer.evaluate(), oracle(folder, stage, rows(stage, 0, 7)))
    # Packing the training rows does not touch the held-out ones.
    packed = open_stage(stage, *flags(folder, tmp_path, "--packing", "True", *more))
    assert_right(packed.trainer.evaluate(), oracle(folder, stage, rows(stage, 0, 7)))


@pytest.mark.parametrize("stage", [SFT])
def test_loss_does_not_depend_on_the_number_of_processes(folder, tmp_path, stage):
    """Seven rows over two processes in batches of three: the last batch is filled up with rows seen already."""
    write_both(stage, tmp_path)
    more = ["--do_train", "False", "--per_device_eval_batch_size", 3]
    run_program(stage, *flags(folder, tmp_path, *more), processes=2)
    metrics = read_json(tmp_path / "out" / "run.json")["metrics"]
    expected = oracle(folder, stage, rows(stage, 0, 7))
    assert_right(metrics, expected)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(expected[0]), rel=1e-5)


@pytest.mark.parametrize("stage", [SFT, PT])
@pytest.mark.parametrize("name", ["validation.jsonl", "valid-01.jsonl", "dev.json", "EVAL_set.jsonl", "test.jsonl"])
def test_held_out_by_name(folder, tmp_path, stage, name):
    write_jsonl(tmp_path / "data" / "train.jsonl", rows(stage, 100, 3))
    write_jsonl(tmp_path / "data" / "testimony.jsonl", rows(stage, 200, 2))
    if name.endswith(".json"):
        (tmp_path / "data" / name).write_text(json.dumps(rows(stage, 0, 2)), encoding="utf-8")
    else:
        write_jsonl(tmp_path / "data" / name, rows(stage, 0, 2))
    opened = open_stage(stage, *flags(folder, tmp_path, "--packing", "False"))

    def numbers(dataset):
        texts = [opened.tokenizer.decode(row["input_ids"]) for row in dataset]
        return sorted(int(re.search(r"(?:Document|Question) (\d+)", text).group(1)) for text in texts)

    assert numbers(opened.trainer.train_dataset) == [100, 101, 102, 200, 201]
    assert numbers(opened.trainer.eval_dataset) == [0, 1]


@pytest.mark.parametrize("stage", [SFT, PT])
def test_only_held_out_files_train_nothing(folder, tmp_path, stage):
    write_jsonl(tmp_path / "data" / "validation.jsonl", rows(stage, 0, 2))
    with pytest.raises(UserError, match="only held-out files"):
        open_stage(stage, *flags(folder, tmp_path))


# Rows that are the same conversation as the prompt/response row, in other words or another place.
SAME = {
    "the same row": {"prompt": "Why?", "response": "So it is."},
    "another format": {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So it is."}]},
    "other white space": {"instruction": "Why? ", "output": "So  it is.\n"},
    "with an id": {
        "messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So it is."}],
        "id": 7,
    },
}


@pytest.mark.parametrize("same", SAME)
def test_rows_that_are_the_same_are_not_split(folder, tmp_path, same):
    write_jsonl(tmp_path / "data" / "train.jsonl", [SAME["the same row"], *rows(SFT, 0, 2), SAME[same]])
    opened = open_stage(SFT, *flags(folder, tmp_path, "--validation_split_percentage", 40))
    sizes = sorted((len(opened.trainer.train_dataset), len(opened.trainer.eval_dataset)))
    assert sizes in ([1, 3], [2, 2]) and sum(sizes) == 4


@pytest.mark.parametrize("where", ["beside", "folder"])
@pytest.mark.parametrize("same", SAME)
def test_overlap_is_refused(folder, tmp_path, same, where):
    place = tmp_path / ("data" if where == "beside" else "other") / "validation.jsonl"
    held_out = write_jsonl(place, [rows(SFT, 0, 1)[0], SAME[same]])
    more = ["--validation_file_dir", place.parent] if where == "folder" else []
    trained = write_jsonl(tmp_path / "data" / "train.jsonl", [*rows(SFT, 100, 2), SAME["the same row"]])
    with pytest.raises(UserError, match="held-out rows are also trained on") as error:
        open_stage(SFT, *flags(folder, tmp_path, *more))
    assert "--allow_overlap True" in str(error.value) and not (tmp_path / "out").exists()
    assert f"{held_out}:2 is also {trained}:3" in str(error.value)
    opened = open_stage(SFT, *flags(folder, tmp_path, *more, "--allow_overlap", "True"))
    assert len(opened.trainer.eval_dataset) == 2


def test_train_folder_as_validation_folder(folder, tmp_path):
    write_jsonl(tmp_path / "data" / "rows.jsonl", rows(SFT, 0, 3))
    with pytest.raises(UserError, match="all 3 held-out rows are also trained on"):
        open_stage(SFT, *flags(folder, tmp_path, "--validation_file_dir", tmp_path / "data"))


def test_overlap_of_documents_is_refused(folder, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("one line\nanother line\n", encoding="utf-8")
    write_jsonl(tmp_path / "data" / "validation.jsonl", [{"text": "another line"}])
    with pytest.raises(UserError, match="1 of 1 held-out rows are also trained on"):
        open_stage(PT, *flags(folder, tmp_path))
