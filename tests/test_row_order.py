"""The rows of every step, for any division of a step into batches, accumulation and processes."""

import math
from types import SimpleNamespace

from medicalgpt.data.encoding import IGNORED
from medicalgpt.training.row_order import (
    FILLER,
    FillerCollator,
    LengthGroups,
    MarkedRows,
    StepBatches,
    draw_mini_batches,
    exclude_rows,
    exclude_tokens,
    is_filler,
    order_rows,
    rows_per_step,
    steps_per_epoch,
)

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices

STRATEGIES = ("group_by_length", "random", "sequential")


def divisions(rows):
    """(processes, batch size, accumulation) of a step of so many rows."""
    return [
        (processes, batch, rows // processes // batch)
        for processes in range(1, rows + 1)
        for batch in range(1, rows + 1)
        if rows % (processes * batch) == 0
    ]


def lengths_of(count):
    return 1 + 37 * np.arange(count) % 101


def batches_of(count, strategy, division, *, epoch=0, seed=3, drop_last=False):
    """The batches of each process: (processes, batches, rows)."""
    processes, batch, accumulation = division
    found = []
    for rank in range(processes):
        order = order_rows(range(count), strategy, seed, lambda: lengths_of(count), math.prod(division))
        batches = StepBatches(order, batch, accumulation, rank=rank, processes=processes, drop_last=drop_last)
        batches.set_epoch(epoch)
        own = list(batches)
        assert len(own) == len(batches)
        found.append(own)
    return found


def steps_of(ranks, accumulation):
    """The rows of each step on all processes, without fillers, sorted."""
    steps = [
        [row for own in ranks for batch in own[start : start + accumulation] for row in batch]
        for start in range(0, len(ranks[0]), accumulation)
    ]
    return [sorted(row for row in step if row >= 0) for step in steps]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("step", [1, 2, 4, 6, 12])
def test_rows_of_a_step_do_not_depend_on_its_division(strategy, step):
    for count in (1, 2, 3, 5, 11, 12, 13, 23, 50):
        for epoch in (0, 2):
            wanted = steps_of(batches_of(count, strategy, (1, step, 1), epoch=epoch), 1)
            assert sorted(row for rows in wanted for row in rows) == list(range(count))
            for division in divisions(step):
                ranks = batches_of(count, strategy, division, epoch=epoch)
                assert steps_of(ranks, division[2]) == wanted, (count, division)
                # Every process takes part in every batch, and none is larger than requested.
                assert len({len(own) for own in ranks}) == 1
                assert all(1 <= len(batch) <= division[1] for own in ranks for batch in own)


def test_no_more_fillers_than_needed():
    # Of three rows, each of two processes gets one at least; of one row, only one can have it.
    assert batches_of(3, "sequential", (2, 2, 1)) == [[[0]], [[1, 2]]]
    assert batches_of(1, "sequential", (2, 2, 1)) == [[[~0]], [[0]]]
    # Four rows need one batch of each process, not all that are accumulated.
    assert batches_of(4, "sequential", (2, 2, 3)) == [[[0, 1]], [[2, 3]]]
    assert batches_of(5, "sequential", (2, 1, 3)) == [[[~4], [1], [3]], [[0], [2], [4]]]


@pytest.mark.parametrize("strategy", STRATEGIES[:2])
def test_two_thousand_rows(strategy):
    """The case of which not one of 500 steps was the same."""
    one = steps_of(batches_of(2000, strategy, (1, 4, 1)), 1)
    assert len(one) == 500 and one[0] != list(range(4))
    for division in ((2, 2, 1), (1, 1, 4), (4, 1, 1), (2, 1, 2)):
        assert steps_of(batches_of(2000, strategy, division), division[2]) == one


@pytest.mark.parametrize("strategy", STRATEGIES[:2])
def test_each_epoch_and_seed_has_an_order(strategy):
    orders = [str(batches_of(40, strategy, (1, 4, 1), epoch=epoch, seed=seed)) for epoch in range(3) for seed in (3, 9)]
    assert len(set(orders)) == 6


def test_rows_of_a_step_are_of_similar_length():
    lengths = lengths_of(2000)

    def spread(division):
        steps = steps_of(batches_of(2000, "group_by_length", division), division[2])
        return sum(max(lengths[row] for row in step) - min(lengths[row] for row in step) for step in steps) / len(steps)

    assert spread((1, 8, 1)) == spread((2, 2, 2)) < 5


@pytest.mark.parametrize(("count", "steps"), [(3, 0), (4, 1), (7, 1), (8, 2)])
def test_an_incomplete_step_is_dropped_as_a_whole(count, steps):
    for division in divisions(4):
        found = steps_of(batches_of(count, "random", division, drop_last=True), division[2])
        assert [len(rows) for rows in found] == [4] * steps


@pytest.mark.parametrize("count", [1, 3, 4, 15, 16, 17, 100, 25_000])
def test_rows_are_grouped_as_the_library_does(count):
    """The lengths repeat, so that the order of rows of one length counts too."""
    for epoch in (0, 1):
        order = LengthGroups(lengths_of(count), 4, seed=3)
        order.set_epoch(epoch)
        generator = torch.Generator().manual_seed(3 + epoch)
        assert list(order) == get_length_grouped_indices(lengths_of(count).tolist(), 4, generator=generator)


@pytest.mark.parametrize("division", divisions(4))
def test_skipped_batches_and_epochs_of_a_loader(division):
    """As a resumed run reads them: through accelerate's loader, of which the first batches are skipped."""
    processes, batch, accumulation = division
    rows = Dataset.from_dict({"row": list(range(10))})
    for rank in range(processes):
        order = order_rows(rows, "random", 3, list, 4)
        batches = StepBatches(order, batch, accumulation, rank=rank, processes=processes)
        loader = DataLoader(
            MarkedRows(rows), batch_sampler=batches, collate_fn=lambda rows: [row["row"] for row in rows]
        )
        loader = prepare_data_loader(loader, num_processes=1, process_index=0)
        for epoch in (1, 2):
            wanted = [[max(row, ~row) for row in own] for own in batches_of(10, "random", division, epoch=epoch)[rank]]
            loader.set_epoch(epoch)
            assert list(loader) == wanted
            skipping = skip_first_batches(loader, accumulation)
            skipping.set_epoch(epoch)
            # transformers sets the epoch of the sampler below the one that skips.
            skipping.batch_sampler.batch_sampler.set_epoch(epoch)
            assert list(skipping) == wanted[accumulation:]


def test_a_filler_is_marked_and_excluded():
    rows = MarkedRows(Dataset.from_dict({"input_ids": [[1, 2], [3, 4], [5, 6]]}))

    def collate(rows):
        assert all(row.keys() == {"input_ids"} for row in rows)
        return {name: torch.tensor([row["input_ids"] for row in rows]) for name in ("input_ids", "labels")}

    real, filler = (FillerCollator(collate, exclude_tokens)(rows.__getitems__(indices)) for indices in ([0, 2], [~1]))
    assert real["labels"].tolist() == [[1, 2], [5, 6]] and not is_filler(real)
    assert filler["input_ids"].tolist() == [[3, 4]] and is_filler(filler)
    assert filler["labels"].tolist() == [[IGNORED, IGNORED]]
    without_labels = FillerCollator(lambda rows: {"input_ids": rows}, exclude_rows)
    assert without_labels(rows.__getitems__([~2])) == {"input_ids": [{"input_ids": [5, 6]}], FILLER: True}
    assert not is_filler(without_labels(rows.__getitems__([2])))


@pytest.mark.parametrize(("rows", "drop_last", "steps"), [(1, False, 1), (12, False, 2), (13, False, 3), (13, True, 2)])
def test_steps_of_an_epoch(tmp_path, rows, drop_last, steps):
    args = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        dataloader_drop_last=drop_last,
    )
    assert rows_per_step(args) == 6
    assert steps_per_epoch(rows, args) == steps


def test_mini_batches_have_the_same_rows_on_any_number_of_processes():
    def drawn(processes, seed):
        parts = []
        for index in range(processes):
            accelerator = SimpleNamespace(num_processes=processes, process_index=index)
            parts.append(draw_mini_batches(24, 3, seed, accelerator) + index * 24 // processes)
        return [sorted(row for part in parts for row in part[number].tolist()) for number in range(3)]

    one = drawn(1, 0)
    assert sorted(sum(one, [])) == list(range(24)) and {len(batch) for batch in one} == {8}
    assert one == drawn(2, 0) == drawn(4, 0) == drawn(8, 0) != drawn(1, 1)
