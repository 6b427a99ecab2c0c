"""Blocks and batches: whole sequences, padding that counts for nothing, packed sequences that do not see each other."""

from types import SimpleNamespace

from medicalgpt.data.batching import Collator, collator, pack
from medicalgpt.data.encoding import IGNORED

import pytest
import torch
from datasets import Dataset
from transformers import Qwen3Config, Qwen3ForCausalLM


def sample(*labels, first=1):
    ids = list(range(first, first + len(labels)))
    return {"input_ids": ids, "labels": [i if keep else IGNORED for i, keep in zip(ids, labels, strict=True)]}


def test_packing_moves_whole_sequences_and_loses_nothing():
    encoded = Dataset.from_list([sample(*[1] * length, first=10 * length) for length in (1, 9, 4, 2, 7, 3, 5)])
    packed = pack(encoded.add_column("place", ["f"] * 7), 20)
    assert packed.column_names == ["input_ids", "labels", "seq_lengths"] and len(packed) == 2
    pieces = []
    for block in packed:
        assert len(block["input_ids"]) == len(block["labels"]) == sum(block["seq_lengths"]) <= 20
        at = 0
        for length in block["seq_lengths"]:
            pieces.append((block["input_ids"][at : at + length], block["labels"][at : at + length]))
            at += length
    assert sorted(pieces) == sorted(zip(encoded["input_ids"], encoded["labels"], strict=True))


def test_padding_is_neither_seen_nor_supervised():
    batch = Collator(pad_token_id=99)([sample(0, 1, 1), sample(1), {**sample(0, 1), "place": "f"}])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [1, 99, 99], [1, 2, 99]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [1, -100, -100], [-100, 2, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert set(batch) == {"input_ids", "labels", "attention_mask"}


def test_a_padding_token_in_the_text_stays_text():
    """Where the end token pads, a true end must still be seen and supervised."""
    batch = Collator(pad_token_id=2)([sample(1, 1), sample(1)])
    assert batch["labels"].tolist() == [[1, 2], [1, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]


PACKED = [
    {"input_ids": [1, 2, 3, 4, 5], "labels": [1, 2, 3, 4, 5], "seq_lengths": [2, 3]},
    {"input_ids": [6, 7, 8], "labels": [-100, 7, 8], "seq_lengths": [3]},
]


def test_packed_blocks_restart_positions_and_have_no_mask():
    batch = Collator(pad_token_id=99)(PACKED)
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 99, 99]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 0, 1]]
    assert batch["labels"].tolist() == [[-100, 2, -100, 4, 5], [-100, 7, 8, -100, -100]]


def test_flattened_blocks_are_one_row_without_padding():
    batch = Collator(pad_token_id=99, flatten=True)(PACKED)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0, 1, 2]]
    assert batch["labels"].tolist() == [[-100, 2, -100, 4, 5, -100, 7, 8]]


def test_the_rows_of_the_data_set_stay_as_they_are():
    before = [{name: list(value) for name, value in row.items()} for row in PACKED]
    Collator(pad_token_id=99)(PACKED)
    assert before == PACKED


@pytest.mark.parametrize(("attention", "flatten"), [("eager", False), ("sdpa", False), ("flash_attention_2", True)])
def test_flash_attention_gets_one_row(attention, flatten):
    tokenizer = SimpleNamespace(pad_token_id=7)
    model = SimpleNamespace(config=SimpleNamespace(_attn_implementation=attention))
    assert collator(tokenizer, model) == Collator(pad_token_id=7, flatten=flatten)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_packed_batch_gives_each_sequence_its_own_logits(attention):
    """The blocks of both rows, padding included, against each sequence alone."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=0.2,
    )
    model = Qwen3ForCausalLM._from_config(config, attn_implementation=attention).eval()
    batch = Collator(pad_token_id=99)(PACKED)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        for row, start, end in ((0, 0, 2), (0, 2, 5), (1, 0, 3)):
            alone = model(input_ids=batch["input_ids"][row : row + 1, start:end]).logits[0]
            torch.testing.assert_close(logits[row, start:end], alone, atol=1e-5, rtol=0)
