"""Train on corpora larger than memory: rows are read, tokenized and packed during training.

Before the first step one pass over the files checks the format of every row, in memory that does not grow with them.
The order of an epoch follows from seed and epoch alone, and each batch carries its `Position` in that order, so that an
interrupted run resumes with the very next sample.
"""

import itertools
import random
import time
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from medicalgpt.args import DataArguments
from medicalgpt.data.encoding import IGNORED, EncodingError, Sample, ShortenedSamples
from medicalgpt.data.lengths import LengthLimit
from medicalgpt.data.loading import (
    LoadedData,
    convert_files,
    identity,
    refuse_overlap,
    row_converter,
    with_length_remedies,
)
from medicalgpt.data.rows import Rows
from medicalgpt.errors import UserError
from medicalgpt.formats.conversion import Converter
from medicalgpt.logs import heartbeat
from medicalgpt.readers.folders import choose_files
from medicalgpt.readers.mixing import mixture_sizes
from medicalgpt.readers.problems import SHOWN_PROBLEMS, DataError, Place, Problem, SourceRow, place_of
from medicalgpt.readers.sources import InputFile, notice_wrapped_lines, open_file, open_files, read_rows
from medicalgpt.readers.tables import TableFile
from medicalgpt.readers.text_files import TextFile

from datasets import Dataset
from loguru import logger
from torch.utils.data import IterableDataset, get_worker_info

# Rows drawn from the whole corpus to be shown and measured before training.
DRAWN_ROWS = 100
# Nobody reads more problems than this, and memory use has to stay flat.
MAX_PROBLEMS = 1_000
# Blocks that are packed together: the more, the fuller they are, and the longer the first one takes.
BLOCKS_PER_WINDOW = 64


@dataclass(frozen=True)
class StreamedFile:
    """A file and what an epoch reads of it.

    Attributes:
        text: the file with its encoding, if it is a text, without its bytes.
        rows: its first usable rows, as many as are used.
        chosen: of these, the rows that the last pass of an epoch reads.
        bad: numbers of the rows, from 0, that are skipped.
        size, modified: to detect a change of the file.
    """

    text: TextFile | TableFile
    rows: int
    chosen: int
    bad: frozenset[int]
    size: int
    modified: int

    @property
    def path(self) -> Path:
        return self.text.path

    def read(self, document_unit: str) -> Iterator[SourceRow]:
        """The usable rows.

        Raises:
            UserError: the file is no longer the one that was checked.
        """
        if (self.size, self.modified) != _size_and_time(self.path):
            raise UserError(f"{self.path} was changed during training. Start again with files that do not change.")
        usable = (row for number, row in enumerate(read_rows(self.text, document_unit)) if number not in self.bad)
        return itertools.islice(usable, self.rows)

    def read_chosen(self, document_unit: str, seed: int) -> Iterator[SourceRow]:
        """Rows drawn without replacement, each subset of that size equally likely, in the order of the file."""
        draw, wanted = random.Random(f"{seed} {self.path}"), self.chosen
        for number, row in enumerate(self.read(document_unit) if wanted else ()):
            if draw.random() * (self.rows - number) < wanted:
                wanted -= 1
                yield row


@dataclass(frozen=True)
class StreamedSource:
    """Files that are read as one: `copies` times in full, then once the chosen rows of each."""

    files: list[StreamedFile]
    copies: int = 1

    @property
    def rows(self) -> int:
        """Rows that an epoch reads."""
        return sum(file.rows * self.copies + file.chosen for file in self.files)

    def read(self, document_unit: str, seed: int, draw: random.Random) -> Iterator[SourceRow]:
        """The rows of one epoch; each pass has its own order of the files."""
        for turn in range(self.copies + 1):
            for file in draw.sample(self.files, len(self.files)):
                yield from file.read(document_unit) if turn < self.copies else file.read_chosen(document_unit, seed)


def _released(file: TextFile | TableFile) -> TextFile | TableFile:
    return replace(file, content=None) if isinstance(file, TextFile) else file


def _size_and_time(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


@dataclass
class StreamedData(LoadedData):
    """The result of the first pass: `train` has a sample of all rows, `validation` every held-out row.

    Attributes:
        arguments, convert, document_unit, seed: as given to `check_data`.
        streams: what an epoch reads.
        seconds: duration of the pass.
    """

    arguments: DataArguments | None = None
    convert: Converter | None = None
    document_unit: str = "auto"
    seed: int = 42
    streams: list[StreamedSource] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def rows(self) -> int:
        """Rows that an epoch reads."""
        return sum(stream.rows for stream in self.streams)

    def settle(self, arguments: DataArguments, limit: LengthLimit | None = None) -> None:
        """As `LoadedData.settle`; rows that training itself will skip and count are not counted here.

        Whether too many of the rows are too long is judged by the drawn rows.
        """
        limit = limit or LengthLimit()
        self.problems = with_length_remedies(self.problems, limit)
        self._refuse_if_too_many_are_lost(limit, arguments.max_long_rows)
        drawn = {place_of(row) for row in self.train} - {place_of(row) for row in self.validation}
        allowed = {"too long": arguments.long_rows != "refuse", "unusable": arguments.skip_bad_rows}
        self.problems = [
            problem
            for problem in self.problems
            if problem.side or problem.place not in drawn or not allowed.get(problem.kind)
        ]
        drawn_rows, shortened = self.train, [account.shortened for account in self.account["train"]]
        super().settle(arguments, limit)
        self.train = drawn_rows
        for account, count in zip(self.account["train"], shortened, strict=True):
            account.shortened = count

    def mix(self, encoded: Dataset, arguments: DataArguments, seed: int) -> Dataset:
        """The drawn rows unchanged: weights became numbers of rows in the first pass."""
        return encoded


def check_data(
    arguments: DataArguments,
    convert: Callable[..., dict[str, Any]],
    *,
    document_unit: str = "auto",
    seed: int = 42,
) -> StreamedData:
    """Check, count and hash the training rows in one pass that keeps none of them; load the held-out rows.

    Args:
        arguments: the data flags.
        convert: `to_text`, `to_messages` or another converter; raises `RowError`.
        document_unit: see `read_rows`.
        seed: of the order, and of the rows that are drawn to be shown.

    Raises:
        UserError: no data named, nothing found, or held-out rows that occur among the training rows.
        DataError: more than `MAX_PROBLEMS` problems.
    """
    began = time.time()
    convert = row_converter(arguments, convert)
    sources, validation_files = choose_files(arguments)
    data = StreamedData(
        [],
        [],
        {"train": [], "validation": []},
        sources=sources,
        arguments=arguments,
        convert=convert,
        document_unit=document_unit,
        seed=seed,
    )
    accounts = data.account["train"]
    held_out_files = open_files(validation_files, document_unit, arguments.encoding)
    data.validation = Rows(convert_files(data, "validation", held_out_files, convert, arguments.max_eval_samples))
    held_out_problems, data.problems = data.problems, []
    held_out = {identity(row) for row in data.validation}
    shared: dict[bytes, dict[str, Any]] = {}
    drawn: list[dict[str, Any]] = []
    draw = random.Random(seed)
    with heartbeat(lambda: f"checking the training rows: {sum(account.rows for account in accounts):,} so far"):
        for number, row in enumerate(_checked_rows(data)):
            # Each row so far is equally likely to be among the drawn ones (reservoir sampling).
            if number < DRAWN_ROWS:
                drawn.append(row)
            elif (at := draw.randrange(number + 1)) < DRAWN_ROWS:
                drawn[at] = row
            if held_out and (key := identity(row)) in held_out:
                shared.setdefault(key, row)
    data.problems += held_out_problems
    if not drawn and not data.problems:
        raise UserError("no training rows were found. Check --train_file_dir and --max_train_samples.")
    data.report_fields(convert)
    refuse_overlap(replace(data, train=list(shared.values())), arguments)
    if drawn and sources[0].weight is not None:
        _mix(data)
    data.train = Rows(drawn)
    data.seconds = time.time() - began
    logger.info(f"checked {sum(account.rows for account in accounts):,} training rows in {data.seconds:.1f} s")
    return data


def _checked_rows(data: StreamedData) -> Iterator[dict[str, Any]]:
    """Yield the usable training rows, converted; add what an epoch will read to `data.streams`."""
    limit = data.arguments.max_train_samples
    for source in data.sources:
        if source.weight is not None:
            limit = source.limit
        stream = StreamedSource([])
        for path in source.files:
            size, modified = _size_and_time(path)
            text = open_file(path, data.arguments.encoding)
            notice_wrapped_lines(text, data.document_unit)
            rows = _NumberedRows(read_rows(text, data.document_unit), data)
            usable, before, bad = 0, -1, set()
            file = InputFile(str(path), text.sha256, rows)
            for row in convert_files(data, "train", [file], data.convert, limit):
                bad.update(range(before + 1, rows.number))
                before, usable = rows.number, usable + 1
                yield row
            if limit is not None:
                limit -= usable
            if usable:
                stream.files.append(StreamedFile(_released(text), usable, 0, frozenset(bad), size, modified))
        data.streams.append(stream)


class _NumberedRows:
    """The rows of a file, with the number of the last one, from 0; problems are counted after each row."""

    def __init__(self, rows: Iterator[SourceRow | Problem], data: StreamedData):
        self.rows, self.data, self.number = rows, data, -1

    def __iter__(self) -> Iterator[SourceRow | Problem]:
        for row in self.rows:
            self.number += 1
            yield row
            _count_problems(self.data)


def _count_problems(data: StreamedData) -> None:
    """Count and show rows that may be skipped, so that memory does not grow with them."""
    if data.problems and data.arguments.skip_bad_rows:
        accounts = data.account["train"]
        left_out = [problem for problem in data.problems if problem.kind == "unusable"]
        data.problems = [problem for problem in data.problems if problem.kind != "unusable"]
        shown = sum(account.left_out["unusable"] for account in accounts)
        for problem in left_out[: max(0, SHOWN_PROBLEMS - shown)]:
            logger.warning(f"skipped: {problem}")
        accounts[-1].left_out += Counter(unusable=len(left_out))
    if len(data.problems) >= MAX_PROBLEMS:
        logger.warning(f"reading stopped after {MAX_PROBLEMS:,} problems")
        raise DataError(data.problems)


def _mix(data: StreamedData) -> None:
    """Give each file its number of rows, so that the sources have the requested shares."""
    weights = [source.weight for source in data.sources]
    counts = [stream.rows for stream in data.streams]
    sizes = mixture_sizes(counts, weights, data.arguments.mix_strategy, data.arguments.max_train_samples)
    accounts = {account.file: account for account in data.account["train"]}
    for number, (source, count, size) in enumerate(zip(data.sources, counts, sizes, strict=True)):
        if size == 0:
            raise UserError(
                f"--train_file_dir: a mixture of {sum(sizes)} rows has none of {source.place} (weight "
                f"{float(source.weight):.4g}, {count} usable rows). Give it another weight or more rows, or omit "
                "it."
            )
        copies, chosen = divmod(size, count)
        files = data.streams[number].files
        parts = mixture_sizes(
            [file.rows for file in files], [Fraction(file.rows, count) for file in files], "under", chosen
        )
        files = [replace(file, chosen=part) for file, part in zip(files, parts, strict=True)]
        data.streams[number] = StreamedSource(files, copies)
        for file in files:
            account = accounts[str(file.path)]
            account.mixture = {
                "source": source.place,
                "weight": float(source.weight),
                "share": size / sum(sizes),
                "drawn": copies * file.rows + file.chosen,
            }
            if not copies and file.chosen < file.rows:
                account.left_out["not in the mixture"] += file.rows - file.chosen


@dataclass(frozen=True)
class Position:
    """Where a reader is after a sample, and what it has read so far.

    Rows are tokenized in windows: a row alone, or as many as fill some blocks when they are packed.

    Attributes:
        epoch: from 0.
        row: rows of this epoch drawn before the current window, including those of other readers.
        done: samples of the current window that were already yielded.
        passed: epochs so far, with the fraction of the current one.
        rows: rows of this reader in all finished windows; rows = used + sum(left_out.values()).
        samples: samples of this reader so far.
        left_out: rows of this reader skipped in all finished windows, by reason.
        shortened: used rows in all finished windows that keep only their first exchanges.
    """

    epoch: int = 0
    row: int = 0
    done: int = 0
    passed: float = 0.0
    rows: int = 0
    samples: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    shortened: int = 0


class StreamedSamples(IterableDataset):
    """Infinite samples, epoch after epoch; each process and each of its loader workers reads its own rows.

    Rows of a file stay together except for what the buffer shuffles, so the order of the files changes in each epoch
    too. Packed blocks have complete sequences only, as those of `batching.pack`.

    Args:
        data: result of `check_data`.
        encode: takes a converted row, returns samples, raises `EncodingError`.
        drawn: the encoded rows of `data.train`, from which totals are estimated.
        block_size: tokens of a packed block; None gives sequences as they are.
        process, processes: which of how many this is.

    Yields:
        `input_ids`, `labels`, `places` (the `Place` of each sequence), `position`, and `seq_lengths` where sequences
        are packed. A row that must not be
        skipped ends the stream with `failure`, the message, since an exception of a worker would lose its type.
    """

    def __init__(
        self,
        data: StreamedData,
        encode: Callable[[dict[str, Any]], list[Sample]],
        drawn: Dataset,
        block_size: int | None = None,
        process: int = 0,
        processes: int = 1,
    ):
        if not len(drawn):
            raise UserError(
                f"none of {len(data.train)} rows drawn from the training rows could be encoded. Raise the length that "
                "fits, or look at the warnings above."
            )
        self.data, self.encode, self.drawn, self.drawn_rows = data, encode, drawn, len(data.train)
        self.rows, self.seed, self.block_size = data.rows, data.seed, block_size
        self.process, self.processes = process, processes
        self.buffer_size = data.arguments.shuffle_buffer
        self.shown = 0
        self.start: list[Position] = []
        self.next_worker = 0

    def estimate(self) -> tuple[int, int, int]:
        """Samples, tokens and supervised tokens of an epoch, estimated from the drawn rows."""
        scale = self.rows / self.drawn_rows
        tokens = sum(map(len, self.drawn["input_ids"])) * scale
        supervised = sum(label != IGNORED for labels in self.drawn["labels"] for label in labels) * scale
        samples = tokens / self.block_size if self.block_size else len(self.drawn) * scale
        return max(1, round(samples)), round(tokens), round(supervised)

    def fingerprint(self, workers: int) -> dict[str, Any]:
        """Everything that determines the order, apart from the files."""
        return {
            "seed": self.seed,
            "shuffle_buffer": self.buffer_size,
            "block_size": self.block_size,
            "processes": self.processes,
            "dataloader_num_workers": workers,
        }

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        workers = info.num_workers if info else 1
        # The loader asks its workers in turn, from the first: that one takes over the turn that is due.
        worker = ((info.id if info else 0) + self.next_worker) % workers
        position = self.start[worker] if self.start else Position()
        try:
            for sample, at in self._samples(position, self.process * workers + worker, self.processes * workers):
                yield {**sample, "position": at, "worker": worker}
        except UserError as error:
            yield {"failure": str(error)}

    def _samples(self, at: Position, reader: int, readers: int) -> Iterator[tuple[dict[str, Any], Position]]:
        while True:
            from_start, before = at.row == 0 and at.done == 0, at.samples
            for window in self._windows(at.epoch, at.row, reader, readers):
                after = replace(
                    at,
                    row=window.end,
                    done=0,
                    rows=at.rows + window.rows,
                    left_out=dict(Counter(at.left_out) + window.left_out),
                    shortened=at.shortened + window.shortened,
                )
                for number in range(at.done, len(window.samples)):
                    last = number + 1 == len(window.samples)
                    share = window.start + (window.end - window.start) * (number + 1) / len(window.samples)
                    at = replace(
                        after if last else at,
                        done=0 if last else number + 1,
                        samples=at.samples + 1,
                        passed=at.epoch + share / self.rows,
                    )
                    yield window.samples[number], at
                at = replace(after, samples=at.samples, passed=at.passed)
            if from_start and at.samples == before:
                raise UserError(
                    f"an entire epoch gave no sample: {dict(at.left_out)} of {at.rows} rows were skipped. "
                    "Raise the length, or fix the rows."
                )
            at = replace(at, epoch=at.epoch + 1, row=0, done=0)

    def _windows(self, epoch: int, first: int, reader: int, readers: int) -> Iterator["_Window"]:
        """Rows `first` and later of an epoch, those of this reader, tokenized together."""
        window = _Window(first)
        tokens, most = 0, BLOCKS_PER_WINDOW * (self.block_size or 0)
        for number, row in enumerate(self._order(epoch)):
            if number < first or number % readers != reader:
                continue
            samples = self._encode(row, window.left_out, warn=epoch == 0)
            tokens += sum(len(sample.input_ids) for sample in samples)
            window.samples += [PlacedSample(sample.input_ids, sample.labels, row.place) for sample in samples]
            window.rows += 1
            window.shortened += isinstance(samples, ShortenedSamples)
            if tokens >= most:
                yield self._finished(window, number + 1, epoch)
                window, tokens = _Window(number + 1), 0
        if window.rows:
            yield self._finished(window, self.rows, epoch)

    def _finished(self, window: "_Window", end: int, epoch: int) -> "_Window":
        window.end = end
        if not self.block_size:
            window.samples = [
                {"input_ids": one.input_ids, "labels": one.labels, "places": [one.place]} for one in window.samples
            ]
            return window
        window.samples = fill_blocks(window.samples, self.block_size)
        # Sequences are packed by length; blocks of short ones must not always come last.
        random.Random(f"{self.seed} {epoch} {window.start}").shuffle(window.samples)
        return window

    def _order(self, epoch: int) -> Iterator[SourceRow]:
        """All rows of an epoch, shuffled by a buffer in which the next row replaces a random one."""
        draw = random.Random(f"{self.seed} {epoch}")
        buffer: list[SourceRow] = []
        for row in self._rows(draw):
            if len(buffer) < self.buffer_size:
                buffer.append(row)
                continue
            slot = draw.randrange(self.buffer_size)
            yield buffer[slot]
            buffer[slot] = row
        draw.shuffle(buffer)
        yield from buffer

    def _rows(self, draw: random.Random) -> Iterator[SourceRow]:
        """The rows of all sources, each source with a probability proportional to its remaining rows."""
        left = [stream.rows for stream in self.data.streams]
        rows = [stream.read(self.data.document_unit, self.seed, draw) for stream in self.data.streams]
        while any(left):
            source = draw.choices(range(len(left)), left)[0] if len(left) > 1 else 0
            left[source] -= 1
            yield next(rows[source])

    def _encode(self, row: SourceRow, left_out: Counter, warn: bool) -> list[Sample]:
        try:
            return self.encode({**self.data.convert(row.value), "place": row.place._asdict()})
        except EncodingError as error:
            kind = "too long" if error.too_long else "unusable"
            problem = Problem(row.place, error.reason, error.remedy + ".", kind=kind)
        if kind == "unusable" and not self.data.arguments.skip_bad_rows:
            raise UserError(
                f"{problem}\nTraining stopped here. Resume from the last checkpoint without such rows: "
                "--skip_bad_rows True --resume_from_checkpoint True."
            )
        left_out[kind] += 1
        if warn and self.shown < SHOWN_PROBLEMS:
            self.shown += 1
            logger.warning(f"skipped: {problem}")
        return []


@dataclass
class _Window:
    """Rows that are tokenized together: row numbers from `start` to before `end`, of which `rows` are this reader's."""

    start: int
    end: int = 0
    rows: int = 0
    samples: list[Any] = field(default_factory=list)
    left_out: Counter = field(default_factory=Counter)
    shortened: int = 0


@dataclass(frozen=True)
class PlacedSample(Sample):
    """A sample with the place of its row."""

    place: Place


def fill_blocks(samples: Sequence[PlacedSample], block_size: int) -> list[dict[str, list[int]]]:
    """Pack complete sequences, the longest first, each into the fullest block with enough space (best fit).

    Args:
        samples: none longer than `block_size`.

    Returns:
        Blocks of `input_ids`, `labels`, `seq_lengths` and `places`, each of at most `block_size` tokens.
    """
    blocks: list[list[PlacedSample]] = []
    room: list[tuple[int, int]] = []
    for sample in sorted(samples, key=lambda sample: -len(sample.input_ids)):
        length = len(sample.input_ids)
        at = bisect_left(room, (length, 0))
        if at < len(room):
            left, block = room.pop(at)
        else:
            left, block = block_size, len(blocks)
            blocks.append([])
        blocks[block].append(sample)
        insort(room, (left - length, block))
    return [
        {
            "input_ids": [token for sample in block for token in sample.input_ids],
            "labels": [label for sample in block for label in sample.labels],
            "seq_lengths": [len(sample.input_ids) for sample in block],
            "places": [sample.place for sample in block],
        }
        for block in blocks
    ]
