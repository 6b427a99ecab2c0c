"""Encode many rows: in several processes, and through the token cache."""

import json
import os
import signal
import threading
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, fields
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

from medicalgpt.args import DataArguments
from medicalgpt.data.cache import UncacheableError, load_or_make, token_key
from medicalgpt.data.encoding import MAKE_ROOM, EncodingError, Pair, Prompt, Sample, ShortenedSamples
from medicalgpt.data.lengths import SHORTENED, TOO_LONG, UNKNOWN, USED, LengthLimit, RowLengths
from medicalgpt.data.loading import LoadedData
from medicalgpt.data.rows import Rows, on_disk
from medicalgpt.errors import UserError
from medicalgpt.logs import heartbeat
from medicalgpt.readers.problems import Place, Problem, place_of

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset
from loguru import logger
from transformers import PreTrainedConfig


def encode_rows(
    data: LoadedData,
    side: str,
    encode: Callable[[dict[str, Any]], list[Sample | Pair | Prompt]],
    num_proc: int | None = None,
    overwrite_cache: bool = False,
    sample: type = Sample,
) -> Dataset:
    """Encode all rows of one side; rows that fail join `data.problems`, the length of each row `data.lengths`.

    The result is on disk and is kept for runs with the same rows, tokenizer, arguments and code (see cache.py). Of the
    processes that torchrun starts on a machine, one encodes and the others wait.

    Args:
        data: converted rows; `LoadedData.settle` decides about those that cannot be encoded.
        side: `train` or `validation`.
        encode: takes a row, returns samples, raises `EncodingError`. The result is kept only if this is
            `functools.partial(function, tokenizer, name=value, ...)`.
        num_proc: number of processes; by default one per 1,000 rows, at most one per core.
        overwrite_cache: encode again, ignoring the cache.
        sample: what `encode` returns, `Sample`, `ImageSample`, `Pair` or `Prompt`.

    Returns:
        The fields of `sample` as columns, and `place`, the fields of the row's `Place`; a row may give several samples.

    Raises:
        UserError: less than one process, or no room on the disk.
    """
    rows, key = on_disk(getattr(data, side)), None
    workers = worker_count(num_proc, len(rows))
    if isinstance(encode, partial):
        try:
            key = token_key(rows, encode)
        except UncacheableError as reason:
            logger.info(f"tokens are not cached: {reason}")

    make = partial(write_encoded, rows, encode, workers, side, sample)
    return load_or_make(key, make, partial(read_encoded, data, side), renew=overwrite_cache)


def encode_sides(
    data: LoadedData,
    encode: Callable[[dict[str, Any]], list[Sample | Pair | Prompt]],
    arguments: DataArguments,
    seed: int,
    sample: type = Sample,
    config: PreTrainedConfig | None = None,
    reserved: tuple[str, int] | None = None,
) -> tuple[Dataset, Dataset | None]:
    """Encode the training and the held-out rows, skip rows that fail as far as the flags allow it, and mix the sources.

    Args:
        arguments: the data flags.
        seed: of the mixture.
        encode, sample: see `encode_rows`.
        config: of the model, whose number of positions limits the lengths that are proposed.
        reserved: of the maximum length, tokens that are kept for an answer, with the flag that says so.

    Returns:
        The training and the held-out samples; None where no row is held out.

    Raises:
        UserError: see `encode_rows`, `LoadedData.settle` and `LoadedData.mix`.
    """
    workers, renew = arguments.preprocessing_num_workers, arguments.overwrite_cache
    train = encode_rows(data, "train", encode, workers, renew, sample)
    validation = encode_rows(data, "validation", encode, workers, renew, sample) if data.validation else None
    longest = encode.keywords.get("max_length") if isinstance(encode, partial) else None
    data.settle(arguments, LengthLimit.of(longest, reserved, config))
    return data.mix(train, arguments, seed), validation


MIN_ROWS_PER_PROCESS = 1000


def worker_count(num_proc: int | None, rows: int) -> int:
    """How many processes encode: as many as were requested, otherwise one per 1,000 rows, at most one per core."""
    if num_proc is not None and num_proc < 1:
        raise UserError(f"--preprocessing_num_workers {num_proc} must be at least 1.")
    return num_proc or max(1, min(len(os.sched_getaffinity(0)), rows // MIN_ROWS_PER_PROCESS))


def read_encoded(data: LoadedData, side: str, folder: Path) -> Dataset:
    """The samples that `write_encoded` wrote to a folder; problems and lengths join `data`."""
    with (folder / "problems.jsonl").open(encoding="utf-8") as file:
        found = map(json.loads, file)
        data.problems += [Problem(**{**problem, "place": Place(*problem["place"])}) for problem in found]
    data.lengths[side] = RowLengths(*np.load(folder / "lengths.npy", allow_pickle=False))
    return Dataset.from_file(str(folder / "samples.arrow"))


ROWS_AT_A_TIME = 200
BYTES_AT_A_TIME = 16 * 1024 * 1024


def _schema(sample: type) -> pa.Schema:
    place = pa.struct([("file", pa.string()), ("line", pa.int64()), ("item", pa.int64())])
    kinds = {list[int]: pa.int32(), list[str]: pa.string()}
    return pa.schema([*((field.name, pa.list_(kinds[field.type])) for field in fields(sample)), ("place", place)])


def write_encoded(rows: Rows, encode: Callable, workers: int, side: str, sample: type, folder: Path) -> None:
    """Write the samples of the rows, in their order, what could not be encoded, and the length of each row.

    Args:
        workers: number of processes, on which the result does not depend.
        sample: see `encode_rows`.
        folder: gets `samples.arrow`, `problems.jsonl` and `lengths.npy`; `read_encoded` reads them.
    """
    starts = range(0, len(rows), ROWS_AT_A_TIME)
    schema = _schema(sample)
    with (
        (folder / "problems.jsonl").open("w", encoding="utf-8") as problems,
        pa.ipc.new_stream(str(folder / "samples.arrow"), schema) as samples,
        datasets.utils.tqdm(total=len(rows), desc=f"tokenizing {side}") as bar,
        ExitStack() as stack,
    ):
        done, lengths = 0, array("q")
        outcomes = array("q")
        if datasets.are_progress_bars_disabled():
            stack.enter_context(heartbeat(lambda: f"tokenizing {side}: {done:,} of {len(rows):,} rows"))
        if workers == 1:
            parts = (_encode_part(rows, encode, schema, start) for start in starts)
        else:
            # Forked processes have rows and tokenizer already, without a copy.
            pool = ProcessPoolExecutor(workers, get_context("fork"), _start_worker, (rows, encode, schema))
            stack.callback(pool.shutdown, cancel_futures=True)
            stack.enter_context(_report_killed_workers())
            parts = pool.map(_encode_part_in_worker, starts)
        waiting: list[pa.RecordBatch] = []
        for batch, found, measured in parts:
            for tokens, outcome in measured:
                lengths.append(tokens)
                outcomes.append(outcome)
            problems.write("".join(json.dumps(asdict(problem), ensure_ascii=False) + "\n" for problem in found))
            waiting.append(pa.ipc.read_record_batch(pa.py_buffer(batch), schema))
            # A few large pieces: each one costs memory when the file is opened.
            if sum(part.nbytes for part in waiting) >= BYTES_AT_A_TIME:
                samples.write(pa.concat_batches(waiting))
                waiting = []
            bar.update(min(ROWS_AT_A_TIME, len(rows) - done))
            done = min(done + ROWS_AT_A_TIME, len(rows))
        if waiting:
            samples.write(pa.concat_batches(waiting))
        np.save(folder / "lengths.npy", np.array([lengths, outcomes], dtype=np.int64))


@contextmanager
def _report_killed_workers() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool as error:
        raise UserError(
            "a tokenizing process was killed, possibly because memory ran out. Use fewer of them: "
            "--preprocessing_num_workers 1."
        ) from error


def _encode_part(
    rows: Rows, encode: Callable, schema: pa.Schema, start: int
) -> tuple[bytes, list[Problem], list[tuple[int, int]]]:
    """The samples of the next rows as a serialized batch of `schema`, what could not be encoded, and `RowLengths`."""
    columns: dict[str, list] = {name: [] for name in schema.names}
    problems, measured = [], []
    for row in rows[start : start + ROWS_AT_A_TIME]:
        try:
            samples = encode(row)
        except EncodingError as error:
            kind = "too long" if error.too_long else "unusable"
            tokens = error.tokens if error.remedy == MAKE_ROOM else 0
            problems.append(Problem(place_of(row), error.reason, error.remedy + ".", kind=kind, tokens=tokens))
            measured.append((error.tokens, TOO_LONG if error.too_long else UNKNOWN))
            continue
        if isinstance(samples, ShortenedSamples):
            measured.append((samples.tokens, SHORTENED))
        else:
            measured.append((max((sample.tokens for sample in samples), default=0), USED))
        for sample in samples:
            for name, ids in vars(sample).items():
                columns[name].append(ids)
            columns["place"].append(row["place"])
    return pa.RecordBatch.from_pydict(columns, schema).serialize().to_pybytes(), problems, measured


_work: tuple[Rows, Callable, pa.Schema] | None = None


def _start_worker(rows: Rows, encode: Callable, schema: pa.Schema) -> None:
    global _work
    _work = rows, encode, schema
    # Ctrl-C reaches all processes; the first one ends the others. Threads of a tokenizer do not survive a fork.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent_process().join()
    os._exit(1)


def _encode_part_in_worker(start: int) -> tuple[bytes, list[Problem], list[tuple[int, int]]]:
    return _encode_part(*_work, start)
