"""The samples that a stage trains on: from shards that were prepared, or read and tokenized now."""

import json
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from medicalgpt.args import DataArguments
from medicalgpt.data.encoding import EncodingError, Sample
from medicalgpt.data.loading import FileAccount, LoadedData, load_data
from medicalgpt.data.rows import Rows
from medicalgpt.data.shards import (
    INDEX,
    MANIFEST,
    Shard,
    describe_missing,
    encoding_settings,
    files_problem,
    find_shards,
    missing_shards,
    read_manifest,
    settings_problem,
)
from medicalgpt.data.streaming import check_data
from medicalgpt.data.tokenizing import encode_sides
from medicalgpt.errors import UserError
from medicalgpt.files import hash_file
from medicalgpt.logs import heartbeat, local_rank
from medicalgpt.readers.problems import place_of

from datasets import Dataset, concatenate_datasets
from loguru import logger
from transformers import PreTrainedConfig

PREPARE_AGAIN = "Pass the flags that it was prepared with, or prepare the rows again in another --prepared_dir."


def load_and_encode(
    arguments: DataArguments,
    convert: Callable[..., dict[str, Any]],
    encode: partial,
    *,
    seed: int,
    sample: type = Sample,
    config: PreTrainedConfig | None = None,
    document_unit: str = "auto",
    block_size: int | None = None,
) -> tuple[LoadedData, Dataset, Dataset | None]:
    """The rows of a stage and their samples, in training and held out.

    Args:
        arguments: the data flags: whether rows were prepared, are streamed, or are read now.
        convert, document_unit: as for `load_data`.
        encode, sample, config: as for `encode_sides`.
        seed: of the order, of a random split and of a mixture.
        block_size: of the packed blocks that the stage trains on, None for sequences. Only prepared rows are packed
            already.

    Raises:
        UserError: rows or flags that cannot be used.
    """
    if arguments.prepared_dir:
        return read_prepared(arguments, encode, block_size)
    load = check_data if arguments.streaming else load_data
    data = load(arguments, convert, document_unit=document_unit, seed=seed)
    return data, *encode_sides(data, encode, arguments, seed, sample, config)


def read_prepared(
    arguments: DataArguments, encode: partial, block_size: int | None = None
) -> tuple[LoadedData, Dataset, Dataset | None]:
    """The samples of a folder that prepare_data.py wrote, in the order of its shards; they stay on the disk.

    Every process compares the sizes of all files, the first one of each machine their hashes too.

    Args:
        arguments: `prepared_dir`; no other flag about rows may be given.
        encode, block_size: what this run would encode with. Some rows of each shard are encoded and compared.

    Returns:
        Some of the rows, with the accounts of all, and the samples in training and held out.

    Raises:
        UserError: a shard is missing, incomplete, damaged, or was prepared for another run than this one.
    """
    place = Path(arguments.prepared_dir)
    if idle := sorted(set(getattr(arguments, "given", ())) - {"prepared_dir"}):
        raise UserError(
            f"--{idle[0]} has no effect on rows that are prepared. Omit it, or pass it to prepare_data.py and prepare "
            "them again."
        )
    index = _read_index(place)
    if problem := settings_problem(index["settings"], encoding_settings(encode, block_size)):
        raise UserError(f"--prepared_dir {place} cannot be used: {problem}. {PREPARE_AGAIN}")
    folders = [place / name for name in index["shards"]]
    with heartbeat(lambda: f"checking {len(folders)} shards in {place}"):
        manifests = _checked_manifests(folders, index)
    examples = [example for folder in folders for example in _read_examples(folder)]
    _compare_examples(place, examples, partial(encode.func, *encode.args, **index["settings"]["arguments"]))
    data = LoadedData(
        Rows(example["row"] for example in examples if example["side"] == "train"),
        Rows(example["row"] for example in examples if example["side"] == "validation"),
        {side: _join_accounts(manifests, side, hash_file(place / INDEX)) for side in ("train", "validation")},
    )
    if block_size and len(folders) > 1:
        for account in data.account["train"]:
            account.packed_shards = len(folders)
    train = concatenate_datasets([Dataset.from_file(str(folder / "train.arrow")) for folder in folders])
    held_out = folders[0] / "validation.arrow"
    logger.info(f"{len(train):,} sequences in {len(folders)} shard(s) of {place}, {index['tokens']:,} tokens")
    return data, train, Dataset.from_file(str(held_out)) if held_out.exists() else None


def _read_index(place: Path) -> dict[str, Any]:
    try:
        index = json.loads((place / INDEX).read_text(encoding="utf-8"))
        index["settings"], index["shards"].items()
        return index
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{place / INDEX} cannot be read ({error}). Write it again: python prepare_data.py --prepared_dir {place} "
            "--check True"
        ) from error
    if not place.is_dir():
        raise UserError(f"no such folder: --prepared_dir {place}. Check the path, or write it with prepare_data.py.")
    shards = find_shards(place)
    if missing := missing_shards(shards):
        raise UserError(
            f"--prepared_dir {place} is not complete: {describe_missing(shards, missing)}. Prepare them: python "
            f"prepare_data.py ... --shard {missing[0]}"
        )
    raise UserError(
        f"--prepared_dir {place} was not checked: it has all shards and no {INDEX}. Write it: python prepare_data.py "
        f"--prepared_dir {place} --check True"
    )


def _checked_manifests(folders: list[Path], index: dict[str, Any]) -> list[dict[str, Any]]:
    def problem_of(folder: Path) -> str | None:
        if not folder.is_dir():
            return "it is missing"
        if not (folder / MANIFEST).is_file() or hash_file(folder / MANIFEST) != index["shards"][folder.name]["sha256"]:
            return f"its {MANIFEST} is not the one that {INDEX} names"
        return files_problem(folder, read_manifest(folder), hashes=local_rank() == 0)

    with ThreadPoolExecutor() as pool:
        for folder, problem in zip(folders, pool.map(problem_of, folders), strict=True):
            if problem:
                number, total = map(int, folder.name.removeprefix("shard-").split("-of-"))
                raise UserError(
                    f"{folder} cannot be used: {problem}. Copy it again; or remove it, prepare it again with --shard "
                    f"{Shard(number, total)}, and write the index: python prepare_data.py --prepared_dir "
                    f"{folder.parent} --check True"
                )
    return [read_manifest(folder) for folder in folders]


def _read_examples(folder: Path) -> list[dict[str, Any]]:
    with (folder / "examples.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _compare_examples(place: Path, examples: list[dict[str, Any]], encode: Callable) -> None:
    """Encode some rows as this run would: versions of the code and of libraries may differ, tokens may not."""
    for example in examples:
        try:
            found = [vars(sample) for sample in encode(example["row"])]
        except EncodingError as error:
            found = error.reason
        if found != example["samples"]:
            raise UserError(
                f"--prepared_dir {place} cannot be used: {place_of(example['row'])} has other tokens there than this "
                "version of the program and its libraries give it. Prepare the rows again in another --prepared_dir."
            )


def _join_accounts(manifests: list[dict[str, Any]], side: str, prepared: str) -> list[FileAccount]:
    """The account of each file over all shards that have a part of it."""
    joined: dict[str, FileAccount] = {}
    for found in (account for manifest in manifests for account in manifest["accounts"][side]):
        account = joined.setdefault(found["file"], FileAccount(found["file"], found["sha256"], prepared=prepared))
        for name in ("rows", "shortened", "rows_with_unused"):
            setattr(account, name, getattr(account, name) + found[name])
        for name in ("left_out", "unused", "presets"):
            getattr(account, name).update(Counter(found[name]))
    return list(joined.values())
