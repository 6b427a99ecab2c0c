"""Packing neither loses a token nor supervises one from what stands before its document."""

from collections import Counter

from medicalgpt.data.batching import Collator, pack
from medicalgpt.data.encoding import encode_document
from tests.helpers import open_stage, write_jsonl
from tests.tiny import make_tiny, tiny_tokenizer

import pytest
from datasets import Dataset

LENGTHS = (3, 200, 17, 64, 31, 30, 1, 90, 48, 63, 32, 128, 9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("sf05"))


def supervised_runs(batches):
    """How often each run of supervised targets occurs; a target has a token before it, as in the loss."""
    runs = Counter()
    for batch in batches:
        for labels in batch["labels"].tolist():
            run = []
            for label in [*labels[1:], -100]:
                if label != -100:
                    run.append(label)
                elif run:
                    runs[tuple(run)] += 1
                    run = []
    return runs


@pytest.mark.parametrize("train_on_inputs", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_conversations_packed_and_not(folder, tmp_path, batch_size, train_on_inputs):
    rows = [
        {"messages": [{"role": r, "content": f"{n} {r}"} for _ in range(turns) for r in ("user", "assistant")]}
        for n, turns in enumerate((1, 3, 1, 2, 1, 1, 4, 2))
    ]
    write_jsonl(tmp_path / "data" / "rows.jsonl", rows)
    runs = {}
    for packing in (True, False):
        trainer = open_stage(
            "supervised_finetuning.py",
            *("--model_name_or_path", folder, "--train_file_dir", tmp_path / "data", "--packing", packing),
            *("--output_dir", tmp_path / str(packing), "--per_device_train_batch_size", batch_size),
            *("--model_max_length", 400, "--train_on_inputs", train_on_inputs),
        ).trainer
        assert len(trainer.train_dataset) == 8 if not packing else len(trainer.train_dataset) < 8
        runs[packing] = supervised_runs(trainer.get_train_dataloader())
    assert runs[True] == runs[False]
    assert sum(runs[True].values()) == (8 if train_on_inputs else 15)


@pytest.mark.parametrize("flatten", [False, True])
def test_no_token_of_a_document_is_lost(flatten):
    tokenizer = tiny_tokenizer()
    texts = [chr(97 + n) * length for n, length in enumerate(LENGTHS)]
    samples = [sample for text in texts for sample in encode_document(tokenizer, {"text": text}, block_size=64)]
    wanted = Counter(tuple(sample.input_ids) for sample in samples)
    whole = Counter(token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id])
    assert Counter(token for sample in samples for token in sample.input_ids) == whole

    rows = Dataset.from_list([{"input_ids": sample.input_ids, "labels": sample.labels} for sample in samples])
    blocks = list(pack(rows, 64))
    assert len(blocks) < len(samples) and max(len(block["input_ids"]) for block in blocks) <= 64
    found, real = Counter(), 0
    batches = [Collator(tokenizer.pad_token_id, flatten)(blocks[at : at + 4]) for at in range(0, len(blocks), 4)]
    for batch, at in zip(batches, range(0, len(blocks), 4), strict=True):
        lengths = [block["seq_lengths"] for block in blocks[at : at + 4]]
        if flatten:
            lengths = [[length for row in lengths for length in row]]
        for row, of_row in enumerate(lengths):
            ids, labels, positions = (batch[name][row].tolist() for name in ("input_ids", "labels", "position_ids"))
            start = 0
            for length in of_row:
                end = start + length
                assert positions[start:end] == list(range(length))
                assert labels[start] == -100 and labels[start + 1 : end] == ids[start + 1 : end]
                found[tuple(ids[start:end])] += 1
                start = end
            assert labels[start:] == [-100] * (len(labels) - start)
            real += start
    assert found == wanted
    assert real == sum(whole.values())


def test_program_trains_on_every_piece(folder, tmp_path):
    write_jsonl(tmp_path / "data" / "rows.jsonl", [{"text": chr(97 + n) * size} for n, size in enumerate(LENGTHS)])
    runs = {}
    for packing in (True, False):
        trainer = open_stage(
            "pretraining.py",
            *("--model_name_or_path", folder, "--train_file_dir", tmp_path / "data", "--packing", packing),
            *("--output_dir", tmp_path / str(packing), "--per_device_train_batch_size", 4, "--block_size", 64),
        ).trainer
        runs[packing] = supervised_runs(trainer.get_train_dataloader())
    assert runs[True] == runs[False]
    pieces = [min(64, size + 1 - at) for size in LENGTHS for at in range(0, size + 1, 64)]
    assert sum(len(run) * count for run, count in runs[True].items()) == sum(pieces) - len(pieces)
