"""Tokenized rows in shards: each is written apart, by any process or host, and an index says that all belong together.

Shard 3 of 16 has the third sixteenth of the rows, by the bytes of their files and in the order of the files, so that
all shards one after another are the rows in the order in which training would read them.
"""

import hashlib
import inspect
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from fractions import Fraction
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from medicalgpt.args import DataArguments
from medicalgpt.code_version import code_version
from medicalgpt.data import batching
from medicalgpt.data.cache import LIBRARIES, MODULES
from medicalgpt.data.lengths import TOO_LONG, LengthLimit, count_tokens, describe_lost_rows
from medicalgpt.data.loading import LoadedData, convert_files, refuse_overlap, row_converter
from medicalgpt.data.rows import Rows
from medicalgpt.data.tokenizing import read_encoded, worker_count, write_encoded
from medicalgpt.errors import UserError
from medicalgpt.files import hash_file, write_atomically
from medicalgpt.logs import heartbeat
from medicalgpt.readers.folders import choose_files
from medicalgpt.readers.sources import InputFile, count_rows, notice_wrapped_lines, open_file, open_files, read_rows

from filelock import FileLock, Timeout
from loguru import logger

KEYWORD_ONLY = inspect.Parameter.KEYWORD_ONLY
INDEX, MANIFEST = "index.json", "shard.json"
# Rows whose tokens a run compares with what it would encode itself.
EXAMPLES = 8
FOLDER = re.compile(r"shard-(\d{5})-of-(\d{5})")


class Shard(NamedTuple):
    """Which of how many equal parts of the rows, from 1."""

    number: int
    total: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """`3/16` as a shard.

        Raises:
            UserError: it is not a number up to another one.
        """
        match = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text.strip())
        shard = cls(*map(int, match.groups())) if match else cls(0, 0)
        if not 1 <= shard.number <= shard.total:
            raise UserError(f"--shard {text}: write the number of the part and how many there are: 1/16 to 16/16.")
        return shard

    @property
    def folder(self) -> str:
        return f"shard-{self.number:05}-of-{self.total:05}"

    def __str__(self) -> str:
        return f"{self.number}/{self.total}"


class Part(NamedTuple):
    """A piece of a file: where it begins and ends, as fractions of its rows."""

    file: Path
    start: Fraction
    end: Fraction


def parts_of(files: Sequence[Path], shard: Shard) -> list[Part]:
    """What a shard has of each file. Only the sizes of the files are read, so that every host finds the same."""
    sizes = [file.stat().st_size for file in files]
    first, last = (Fraction(sum(sizes) * number, shard.total) for number in (shard.number - 1, shard.number))
    parts, at = [], 0
    for file, size in zip(files, sizes, strict=True):
        start, end = max(first, at), min(last, at + size)
        if start < end:
            parts.append(Part(file, (start - at) / size, (end - at) / size))
        at += size
    return parts


def _open_part(part: Part, document_unit: str, encoding: str | None) -> InputFile | None:
    """The rows of a part; None if no row begins in it."""
    file, start, stop = open_file(part.file, encoding), 0, None
    notice_wrapped_lines(file, document_unit)
    if part.end - part.start < 1:
        rows = count_rows(file, document_unit)
        start, stop = math.ceil(part.start * rows), math.ceil(part.end * rows)
        if rows and start == stop:
            return None
    return InputFile(str(part.file), file.sha256, read_rows(file, document_unit, start=start, stop=stop))


def load_shard(
    arguments: DataArguments, convert: Callable[..., dict[str, Any]], shard: Shard, *, document_unit: str = "auto"
) -> LoadedData:
    """Read, convert and check the training rows of a shard; the first shard keeps the held-out rows as well.

    Args:
        arguments, convert, document_unit: as for `load_data`.

    Raises:
        UserError: nothing found, weights, an empty file, or held-out rows that occur among the training rows.
    """
    convert = row_converter(arguments, convert)
    sources, validation_files = choose_files(arguments)
    if sources[0].weight is not None:
        raise UserError(
            "--train_file_dir: the rows of a mixture follow from all of them, which no shard sees. Give the paths "
            "without weights."
        )
    files = [path for source in sources for path in source.files]
    if empty := [path for path in files if not path.stat().st_size]:
        raise UserError(f"{empty[0]} is empty. Remove it or fill it.")
    data = LoadedData([], [], {"train": [], "validation": []}, sources=sources)
    opened = (_open_part(part, document_unit, arguments.encoding) for part in parts_of(files, shard))
    with heartbeat(lambda: f"reading shard {shard}: {sum(account.rows for account in data.account['train'])} rows"):
        data.train = Rows(convert_files(data, "train", filter(None, opened), convert, None))
        held_out = open_files(validation_files, document_unit, arguments.encoding)
        data.validation = Rows(convert_files(data, "validation", held_out, convert, arguments.max_eval_samples))
        if data.train:
            data.report_fields(convert)
            refuse_overlap(data, arguments)
    if shard.number > 1:
        data.validation, data.account["validation"] = Rows(), []
        data.problems = [problem for problem in data.problems if problem.side != "validation"]
    return data


def encoding_settings(encode: partial, block_size: int | None) -> dict[str, Any]:
    """What the tokens follow from, apart from the rows: to be the same in all shards, and in the run that reads them.

    Args:
        encode: a function of encoding.py, a tokenizer, and plain values as keyword arguments.
        block_size: of packed blocks; None if sequences are as they are.
    """
    (tokenizer,) = encode.args
    options = [option for option in inspect.signature(encode.func).parameters.values() if option.kind is KEYWORD_ONLY]
    template = tokenizer.chat_template
    vocabulary = [tokenizer.backend_tokenizer.to_str(), str(tokenizer.bos_token), str(tokenizer.eos_token)]
    return {
        "function": encode.func.__name__,
        "arguments": {option.name: encode.keywords.get(option.name, option.default) for option in options},
        "block_size": block_size,
        "tokenizer": _digest(json.dumps(vocabulary)),
        "chat_template": _digest(str(template)) if encode.func.__name__ != "encode_document" else None,
        "date": str(date.today()) if "strftime_now" in str(template) else None,
    }


def _digest(text: str | bytes) -> str:
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()


def prepare_shard(
    place: Path,
    shard: Shard,
    arguments: DataArguments,
    convert: Callable[..., dict[str, Any]],
    encode: partial,
    sample: type,
    *,
    document_unit: str = "auto",
    block_size: int | None = None,
) -> dict[str, Any]:
    """Tokenize a shard into a folder in `place`, which has its name only when it is complete.

    Args:
        arguments, convert, document_unit: as for `load_data`.
        encode, sample: as for `encode_rows`.
        block_size: pack the sequences into blocks of so many tokens.

    Returns:
        Its manifest; if the shard is there already, that one.

    Raises:
        UserError: rows that cannot be used, another shard of this name, or a process that writes it now.
    """
    settings = encoding_settings(encode, block_size)
    place.mkdir(parents=True, exist_ok=True)
    folder, lock = place / shard.folder, FileLock(place / f".{shard.folder}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"{folder} is being written by another process. Wait for it, or prepare another shard."
        ) from None
    try:
        if folder.exists():
            return _present_shard(folder, settings)
        # Left by a process that was killed.
        aside = folder.with_suffix(".partial")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        try:
            data = load_shard(arguments, convert, shard, document_unit=document_unit)
            manifest = {"shard": shard, "settings": settings, "made_by": _made_by(), "inputs": _inputs(data)}
            manifest |= _write_shard(aside, data, arguments, encode, sample, block_size)
            write_atomically(aside / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False))
            aside.rename(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    finally:
        lock.release()
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def _present_shard(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    manifest = read_manifest(folder)
    if problem := settings_problem(manifest["settings"], settings):
        raise UserError(f"{folder} is there already, and {problem}. Remove it, or choose another --prepared_dir.")
    if problem := files_problem(folder, manifest):
        raise UserError(f"{folder} is damaged: {problem}. Remove it, and prepare it again.")
    logger.info(f"{folder} is there already and complete; nothing is tokenized again")
    return manifest


def _made_by() -> dict[str, Any]:
    return {"code": code_version(*MODULES), **{name: version(name) for name in LIBRARIES}}


def _inputs(data: LoadedData) -> list[list[Any]]:
    """All files that the shards are cut from, not only those of this one."""
    return [[str(path), path.stat().st_size] for source in data.sources for path in source.files]


def _write_shard(
    folder: Path, data: LoadedData, arguments: DataArguments, encode: partial, sample: type, block_size: int | None
) -> dict[str, Any]:
    """Write the samples and some rows of a shard; returns what its manifest says of them."""
    encoded = {}
    for side in filter(lambda side: side == "train" or getattr(data, side), ("train", "validation")):
        rows, work = getattr(data, side), folder / f"{side}.work"
        work.mkdir()
        write_encoded(rows, encode, worker_count(arguments.preprocessing_num_workers, len(rows)), side, sample, work)
        encoded[side] = read_encoded(data, side, work)
    too_long = {side: [lengths.count(TOO_LONG), len(lengths.outcome)] for side, lengths in data.lengths.items()}
    # Whether too many rows are too long is asked of all shards together.
    data.skip_problems(arguments, LengthLimit.of(encode.keywords.get("max_length")), max_long_rows=1.0)
    with (folder / "examples.jsonl").open("w", encoding="utf-8") as file:
        for side in encoded:
            for row in getattr(data, side)[:EXAMPLES]:
                example = {"side": side, "row": row, "samples": [vars(found) for found in encode(row)]}
                file.write(json.dumps(example, ensure_ascii=False) + "\n")
    for side, samples in encoded.items():
        if side == "train" and block_size:
            encoded[side] = batching.pack(samples, block_size, folder / "train.arrow")
        else:
            (folder / f"{side}.work" / "samples.arrow").rename(folder / f"{side}.arrow")
        shutil.rmtree(folder / f"{side}.work")
    sequences, tokens, supervised = count_tokens(encoded["train"])
    return {
        "rows": sum(account.rows for account in data.account["train"]),
        "used": sum(account.used for account in data.account["train"]),
        "sequences": sequences,
        "tokens": tokens,
        "supervised_tokens": supervised,
        "too_long": too_long,
        "accounts": {side: [vars(account) for account in accounts] for side, accounts in data.account.items()},
        "files": {
            path.name: {"bytes": path.stat().st_size, "sha256": hash_file(path)} for path in sorted(folder.iterdir())
        },
    }


# -- all shards together ----------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a shard.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        manifest["settings"], manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / MANIFEST} cannot be read ({error}). Prepare this shard again.") from error
    return manifest


def files_problem(folder: Path, manifest: dict[str, Any], *, hashes: bool = True) -> str | None:
    """Why a shard cannot be used, or None. Without `hashes` only the sizes of its files are compared."""
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size:,} of {entry['bytes']:,} bytes"
        if hashes and hash_file(path) != entry["sha256"]:
            return f"the content of {name} has changed"
    return None


FLAGS = {"max_length": "model_max_length"}
READERS = {
    "encode_document": "pretraining.py",
    "encode_chat": "supervised_finetuning.py",
    "encode_preference": "reward_modeling.py, dpo_training.py and orpo_training.py",
}


def settings_problem(made: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """How `encoding_settings` of shards differ from those that are wanted, as a clause; None if they agree."""
    if made["function"] != wanted["function"]:
        return f"it was prepared for {READERS[made['function']]}"
    if made["tokenizer"] != wanted["tokenizer"]:
        return "another tokenizer encoded its rows"
    if made["chat_template"] != wanted["chat_template"]:
        return "another chat template or system prompt rendered its rows"
    if made["date"] != wanted["date"]:
        return f"its chat template wrote the date {made['date']} into the rows"
    # Whether long rows were shortened or skipped is decided and counted.
    names = sorted({*made["arguments"], *wanted["arguments"]} - {"shorten_rows"})
    differing = [
        f"--{FLAGS.get(name, name)} {made['arguments'].get(name)}, not {wanted['arguments'].get(name)}"
        for name in names
        if made["arguments"].get(name) != wanted["arguments"].get(name)
    ]
    if bool(made["block_size"]) != bool(wanted["block_size"]):
        differing.append(f"--packing {bool(made['block_size'])}, not {bool(wanted['block_size'])}")
    return f"it was prepared with {'; '.join(differing)}" if differing else None


def find_shards(place: Path) -> dict[Shard, Path]:
    """The complete shards in a folder.

    Raises:
        UserError: none, or shards of different divisions.
    """
    found = {
        Shard(*map(int, match.groups())): path
        for path in place.glob("shard-*")
        if (match := FOLDER.fullmatch(path.name))
    }
    if not found:
        raise UserError(
            f"{place} has no shard. Write one: python prepare_data.py --prepared_dir {place} --shard 1/1 ..."
        )
    totals = Counter(shard.total for shard in found)
    if len(totals) > 1:
        parts = " and ".join(f"{count} of {total}" for total, count in sorted(totals.items()))
        raise UserError(f"{place} has shards of different divisions: {parts}. Remove those of one division.")
    return dict(sorted(found.items()))


def missing_shards(shards: dict[Shard, Path]) -> list[Shard]:
    """Those that are not there yet, in order."""
    total = next(iter(shards)).total
    return [shard for number in range(1, total + 1) if (shard := Shard(number, total)) not in shards]


def write_index(place: Path, max_long_rows: float = 0.5) -> dict[str, Any]:
    """Check all shards, by their hashes and against each other, and write the index, without which none is read.

    Args:
        max_long_rows: share of the rows of all shards that may be skipped because they are too long.

    Raises:
        UserError: a shard is missing, damaged, or does not belong to the others.
    """
    shards = find_shards(place)
    if missing := missing_shards(shards):
        raise UserError(f"{describe_missing(shards, missing)}. Prepare them: --shard {missing[0]}")
    manifests = {shard: read_manifest(path) for shard, path in shards.items()}
    first = next(iter(manifests.values()))
    digests: dict[str, tuple[str, Shard]] = {}
    with heartbeat(lambda: f"checking {len(shards)} shards in {place}"), ThreadPoolExecutor() as pool:
        problems = pool.map(lambda shard: files_problem(shards[shard], manifests[shard]), shards)
        for (shard, manifest), problem in zip(manifests.items(), problems, strict=True):
            if problem := problem or _foreign(manifest, first, shard, digests):
                raise UserError(
                    f"{shards[shard]} cannot be used: {problem}. Remove this folder, and prepare it again "
                    f"as the others: --shard {shard}"
                )
    _refuse_if_too_many_are_lost(manifests, max_long_rows)
    entries = {
        shards[shard].name: {
            "sha256": hash_file(shards[shard] / MANIFEST),
            **{name: manifest[name] for name in ("rows", "used", "sequences", "tokens", "supervised_tokens")},
        }
        for shard, manifest in manifests.items()
    }
    totals = {name: sum(entry[name] for entry in entries.values()) for name in ("rows", "used", "sequences", "tokens")}
    if not totals["sequences"]:
        raise UserError(f"{place}: every training row was skipped, in all {len(shards)} shards.")
    index = {**totals, "settings": first["settings"], "made_by": first["made_by"], "shards": entries}
    write_atomically(place / INDEX, json.dumps(index, indent=1, ensure_ascii=False))
    return index


def describe_missing(shards: dict[Shard, Path], missing: Sequence[Shard]) -> str:
    """How many shards are there and which are not."""
    shown = ", ".join(str(shard) for shard in missing[:8]) + (", …" if missing[8:] else "")
    return f"{len(shards)} of {missing[0].total} shards are complete; missing: {shown}"


def _foreign(
    manifest: dict[str, Any], first: dict[str, Any], shard: Shard, digests: dict[str, tuple[str, Shard]]
) -> str | None:
    """Why a shard does not belong to the first one, and to those that read the same files."""
    if manifest["shard"] != list(shard):
        return f"it is shard {'/'.join(map(str, manifest['shard']))} under another name"
    if problem := settings_problem(manifest["settings"], first["settings"]):
        return problem.replace(", not ", ", the first shard with ")
    if manifest["settings"]["arguments"] != first["settings"]["arguments"]:
        return "it was prepared with another --long_rows than the first shard"
    if changed := [name for name, value in manifest["made_by"].items() if first["made_by"].get(name) != value]:
        return f"another version of {', '.join(changed)} made it than the first shard"
    if manifest["inputs"] != first["inputs"]:
        differing = [each for each in manifest["inputs"] if each not in first["inputs"]] or first["inputs"][-1:]
        return f"it was cut from other files than the first shard (for example {differing[0][0]})"
    for account in manifest["accounts"]["train"]:
        digest, other = digests.setdefault(account["file"], (account["sha256"], shard))
        if digest != account["sha256"]:
            return f"{account['file']} was changed after shard {other} was cut from it"
    return None


def _refuse_if_too_many_are_lost(manifests: dict[Shard, dict[str, Any]], max_long_rows: float) -> None:
    for side in ("train", "validation"):
        counts = [manifest["too_long"][side] for manifest in manifests.values() if side in manifest["too_long"]]
        lost, rows = (sum(numbers) for numbers in zip(*counts, strict=True)) if counts else (0, 0)
        if found := describe_lost_rows(lost, rows, max_long_rows, f"{side} rows"):
            reason, way_out = found
            raise UserError(f"{reason}.\nThere is no index yet. Prepare again with another length. {way_out}".strip())
