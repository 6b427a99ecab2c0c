"""Which rows each step trains on, and how they are distributed over accumulated batches and processes.

The rows of a step follow from the seed, the epoch, the number of rows per step and, if rows are grouped, their lengths.
They do not depend on how a step is divided: one process with batches of 4, two with batches of 2, and one that
accumulates 4 batches of 1 train on the same rows in every step. So a run can be resumed on another number of processes
as long as `rows_per_step` stays the same.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from medicalgpt.data.encoding import IGNORED

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch.utils.data import Sampler, SequentialSampler
from transformers import TrainingArguments

# The key with which a row, and a batch without labels, is marked as a filler (see `StepBatches`).
FILLER = "filler"


def rows_per_step(args: TrainingArguments) -> int:
    """The global batch: rows of a full step on all processes, with accumulation. A preference pair is one row."""
    parallel = args.parallelism_config
    processes = args.world_size // (parallel.non_data_parallel_size if parallel else 1)
    return args.train_batch_size * args.gradient_accumulation_steps * processes


def steps_per_epoch(rows: int, args: TrainingArguments) -> int:
    """Steps of an epoch over so many rows; an incomplete last one counts unless `--dataloader_drop_last` drops it."""
    full, rest = divmod(rows, rows_per_step(args))
    return full + bool(rest and not args.dataloader_drop_last)


def data_parallel_rank(accelerator: Accelerator) -> tuple[int, int]:
    """Number of this process among those that train on different rows, from 0, and how many there are."""
    parallel = accelerator.parallelism_config
    same_rows = parallel.tp_size * parallel.cp_size if parallel else 1
    return accelerator.process_index // same_rows, accelerator.num_processes // same_rows


class RandomOrder(Sampler[int]):
    """All row indices in an order that depends on seed and epoch alone; 8 bytes of memory per row.

    The library's sampler makes a Python list of them, which takes five times as much.

    Args:
        rows: how many there are.
        seed: of the order of epoch 0.
    """

    def __init__(self, rows: int, seed: int):
        self.rows, self.seed, self.epoch = rows, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self.rows, generator=torch.Generator().manual_seed(self.seed + self.epoch))
        for part in order.split(10_000):
            yield from part.tolist()


class LengthGroups(Sampler[int]):
    """Row indices such that rows of similar length share a step, in an order that depends on seed and epoch alone.

    The order is that of the library's `get_length_grouped_indices`: all rows are shuffled, cut into chunks of up to 50
    steps, and each chunk is sorted, its longest row first; the longest row of all comes first, so that a step that
    needs too much memory is the first one. The library makes Python lists, which take several times as much memory as
    the 12 bytes per row here, and its sampler draws from the global generator, so a resumed run would see some rows
    twice and others never.

    Args:
        lengths: tokens of each row.
        group_size: rows that are to be of similar length.
        seed: of the order of epoch 0.
    """

    def __init__(self, lengths: np.ndarray, group_size: int, seed: int):
        self.lengths = torch.from_numpy(np.ascontiguousarray(lengths))
        self.chunk = max(1, min(len(lengths) // (group_size * 4), 50)) * group_size
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator)
        for chunk in order.split(self.chunk):
            chunk.copy_(chunk[self.lengths[chunk].argsort(descending=True, stable=True)])
        # The longest row of a chunk is its first.
        first = self.chunk * int(self.lengths[order[:: self.chunk]].argmax())
        order[[0, first]] = order[[first, 0]]
        for part in order.split(10_000):
            yield from part.tolist()


def order_rows(dataset: Dataset, strategy: str, seed: int, lengths: Callable[[], np.ndarray], group: int) -> Sampler:
    """The order of an epoch's rows.

    Args:
        strategy: of `--train_sampling_strategy`: `random`, `sequential` or `group_by_length`.
        lengths: returns the tokens of each row; called only to group them.
        group: rows of a step, which are to be of similar length.
    """
    if strategy == "group_by_length":
        return LengthGroups(lengths(), group, seed)
    if strategy == "sequential":
        return SequentialSampler(dataset)
    return RandomOrder(len(dataset), seed)


class StepBatches(Sampler[list[int]]):
    """The batches of row indices of one process.

    The order is divided into steps, and each step into equal shares, one for each batch that a process accumulates.
    What is left for the last step of an epoch may be fewer rows: its batches are then smaller, and a process that gets
    no row takes part in the step with a filler, a row whose loss and metrics do not count. So no row is trained on
    twice in an epoch. accelerate would repeat the first rows instead, on several processes only.

    Args:
        order: of all rows; its epoch is set by `set_epoch`, if it has one.
        batch_size: rows of a full batch.
        accumulation: batches of each process in a full step.
        rank, processes: number of this process and how many there are.
        drop_last: omit an incomplete last step.

    Yields:
        The indices of a batch; of a filler `[~index]`, which is negative (see `MarkedRows`).
    """

    def __init__(
        self,
        order: Sampler[int],
        batch_size: int,
        accumulation: int,
        *,
        rank: int = 0,
        processes: int = 1,
        drop_last: bool = False,
    ):
        # No attribute `batch_size`: from it accelerate would infer that the last batch ends with repeated rows.
        self.order, self.rows_per_batch, self.accumulation = order, batch_size, accumulation
        self.rank, self.processes, self.drop_last = rank, processes, drop_last

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.order, "set_epoch"):
            self.order.set_epoch(epoch)

    @property
    def rows_per_step(self) -> int:
        return self.rows_per_batch * self.accumulation * self.processes

    def __len__(self) -> int:
        full, rest = divmod(len(self.order), self.rows_per_step)
        return full * self.accumulation + (0 if self.drop_last else self._batches_of(rest))

    def __iter__(self) -> Iterator[list[int]]:
        order = iter(self.order)
        while step := list(islice(order, self.rows_per_step)):
            if len(step) == self.rows_per_step or not self.drop_last:
                yield from self._own_batches(step)

    def _batches_of(self, rows: int) -> int:
        """Batches of each process in a step of so many rows."""
        return math.ceil(rows / (self.rows_per_batch * self.processes))

    def _own_batches(self, step: list[int]) -> Iterator[list[int]]:
        batches = self._batches_of(len(step))
        shares = batches * self.processes
        for number in range(batches):
            # Rows next to each other are of similar length; they are trained on at the same time.
            share = number * self.processes + self.rank
            own = step[len(step) * share // shares : len(step) * (share + 1) // shares]
            yield own or [~step[-1]]


@dataclass
class MarkedRows(torch.utils.data.Dataset):
    """The rows at the indices of `StepBatches`; a filler has the further column `FILLER`."""

    rows: Dataset

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        if indices[0] >= 0:
            return self.rows.__getitems__(indices)
        return [{**row, FILLER: True} for row in self.rows.__getitems__([~index for index in indices])]


@dataclass
class FillerCollator:
    """A collator of rows of `MarkedRows`.

    Args:
        collate: the collator of rows without marks.
        exclude: changes a batch, in place, such that it does not count.
    """

    collate: Callable[[list[dict[str, Any]]], Any]
    exclude: Callable[[dict[str, Any]], None]

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        marks = [row.pop(FILLER, False) for row in rows]
        batch = self.collate(rows)
        if any(marks):
            self.exclude(batch)
        return batch


def exclude_tokens(batch: dict[str, Any]) -> None:
    """No token is supervised, so that none counts."""
    batch["labels"].fill_(IGNORED)


def exclude_rows(batch: dict[str, Any]) -> None:
    """Mark a batch whose collator knows no labels."""
    batch[FILLER] = True


def is_filler(batch: dict[str, Any]) -> bool:
    """Whether a batch does not count."""
    return FILLER in batch or ("labels" in batch and bool((batch["labels"] == IGNORED).all()))


def draw_mini_batches(rows: int, count: int, seed: int, accelerator: Accelerator) -> torch.Tensor:
    """Distribute the rows of a step, of which each process has an equal, consecutive part, over mini-batches.

    Of so many consecutive rows as there are mini-batches each goes into another one, drawn at random. So a mini-batch
    has the same rows on any number of processes.

    Args:
        rows: of the step, on all processes: a multiple of mini-batches x processes.
        count: number of mini-batches.

    Returns:
        (count, rows / count / processes): for each mini-batch the numbers of this process's rows in it, from 0.
    """
    drawn = torch.rand(rows // count, count, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)
    own = drawn.chunk(accelerator.num_processes)[accelerator.process_index]
    return (own + count * torch.arange(len(own))[:, None]).T
