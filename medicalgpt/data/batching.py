"""Batch encoded sequences: padded, or packed so that packed sequences do not attend to each other."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medicalgpt.data.encoding import IGNORED
from medicalgpt.data.images import decode_file
from medicalgpt.errors import UserError
from medicalgpt.models.vision import Vision

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import pack_dataset


def pack(dataset: Dataset, block_size: int, file: Path | None = None) -> Dataset:
    """Put whole sequences together into blocks of at most `block_size` tokens (best fit, nothing is truncated).

    Args:
        dataset: columns `input_ids` and `labels`, each sequence at most `block_size` long.
        file: where the blocks are kept; by default with the sequences.

    Returns:
        Columns `input_ids`, `labels` and `seq_lengths`, the lengths of the sequences in each block.
    """
    kept = {"cache_file_name": str(file)} if file else {}
    return pack_dataset(dataset.select_columns(["input_ids", "labels"]), block_size, strategy="bfd", map_kwargs=kept)


def collator(tokenizer: PreTrainedTokenizerBase, model: torch.nn.Module) -> "Collator":
    """The collator that suits the tokenizer and the model's attention."""
    return Collator(tokenizer.pad_token_id, flatten="flash" in model.config._attn_implementation)


@dataclass
class Collator:
    """Batch sequences of unequal length.

    Rows with `seq_lengths` are packed blocks: position ids restart at each sequence and no attention mask is given,
    since transformers then keeps the sequences apart (and only then: a mask of ones would switch that off). The first
    token of each sequence is not supervised, since what precedes it belongs to another sequence. Other rows are padded
    on the right, with an attention mask.

    Args:
        pad_token_id: for padding, which is never supervised.
        flatten: make one row of the batch, for FlashAttention, which distinguishes packed sequences only in a batch
            of one row.

    Returns (by call):
        `input_ids`, `labels` of shape (batch, length), with `position_ids` or `attention_mask` of the same shape.
    """

    pad_token_id: int
    flatten: bool = False

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        labels = [torch.tensor(row["labels"]) for row in rows]
        if "seq_lengths" not in rows[0]:
            return {
                "input_ids": _pad(ids, self.pad_token_id),
                "labels": _pad(labels, IGNORED),
                "attention_mask": _pad([torch.ones_like(row) for row in ids], 0),
            }
        positions = [torch.cat([torch.arange(length) for length in row["seq_lengths"]]) for row in rows]
        for row, position in zip(labels, positions, strict=True):
            row[position == 0] = IGNORED
        if self.flatten:
            ids, labels, positions = [torch.cat(ids)], [torch.cat(labels)], [torch.cat(positions)]
        return {
            "input_ids": _pad(ids, self.pad_token_id),
            "labels": _pad(labels, IGNORED),
            # Positions of the padding restart at 0, which makes it a separate sequence that nothing attends to.
            "position_ids": _pad_positions(positions),
        }


@dataclass
class ImageCollator:
    """Batch sequences that may have images, which are decoded now: only those of a batch are in memory.

    Decoded images of all rows would take hundreds of times the memory of their files, and as pixels on a disk a hundred
    times their space. With `--dataloader_num_workers`, other processes decode the next batches meanwhile.

    Args:
        collate: of the sequences, not packed.
        vision: how images become pixels.

    Returns (by call):
        What `collate` returns; and, if a row of the batch has an image, what `Vision.inputs` returns.
    """

    collate: Collator
    vision: Vision

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self.collate(rows)
        paths = [path for row in rows for path in row["pictures"]]
        if not paths:
            return batch
        try:
            return {**batch, **self.vision.inputs(batch["input_ids"], map(decode_file, paths))}
        except ValueError as error:
            raise UserError(
                f"the images of a batch are not those that were checked when the rows were read: {error}. They are "
                f"{', '.join(paths)}. Start again, and leave them as they are meanwhile."
            ) from error


def _pad(rows: list[torch.Tensor], value: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def _pad_positions(rows: list[torch.Tensor]) -> torch.Tensor:
    length = max(len(row) for row in rows)
    return torch.stack([torch.cat([row, torch.arange(length - len(row))]) for row in rows])
