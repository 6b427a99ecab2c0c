"""Which files are trained on, held out, left out or not read: by their formats, their names and those of their folders.

Each file of a folder is named in the log with what it was taken for, so that none is silently ignored.
"""

import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

from medicalgpt.args import DataArguments
from medicalgpt.errors import UserError
from medicalgpt.readers.mixing import parse_sources
from medicalgpt.readers.text_files import COMPRESSIONS

from loguru import logger

# The format of each suffix; the names of the formats are those that `sources.read_rows` distinguishes.
FORMATS = {
    ".jsonl": "json lines",
    ".ndjson": "json lines",
    ".jsonlines": "json lines",
    ".json": "json",
    ".txt": "text",
    ".md": "text",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".xlsx": "excel",
}
# These are packed by themselves.
NEVER_COMPRESSED = ("parquet", "arrow", "excel")
# Shards and splits on the hub have these names too: the prefixes mark rows that are never trained on.
HELD_OUT_NAME = re.compile(r"^(validation|valid|val|dev|eval|test)([-_.]|$)", re.IGNORECASE)
# A name that only ends so may be that of a blood test: it is trained on, with a warning.
HELD_OUT_ENDING = re.compile(r"[-_](validation|valid|val|dev|eval|test)(-\d+-of-\d+)?$", re.IGNORECASE)
ABOUT_THE_DATA = re.compile(
    r"(readme|license|licence|notice|citation|changelog|contributing)([-_.].*)?|dataset_infos?\.json|dataset_dict\.json",
    re.IGNORECASE,
)
NOT_DATA = frozenset(
    ".py .sh .bat .ps1 .ipynb .js .css .yaml .yml .toml .ini .cfg .lock .log .svg .mp3 .wav .mp4 .bib .tex .md5 "
    ".sha256 .sig .asc .crc .partial".split()
)
IMAGES = frozenset(".png .jpg .jpeg .gif .webp .bmp .tif .tiff".split())
# Files that certainly hold rows: training without them would be training on a part of the folder.
UNREADABLE = {
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar"), "an archive: unpack it"),
    **dict.fromkeys((".xls", ".xlsb", ".ods", ".numbers"), "an old or foreign spreadsheet: save it as .xlsx or .csv"),
    **dict.fromkeys((".pkl", ".pickle", ".joblib", ".pt"), "a pickle, which may run code: save it as .jsonl"),
    **dict.fromkeys((".db", ".sqlite", ".sqlite3", ".mdb", ".sql"), "a database: export its table as .csv"),
    **dict.fromkeys((".h5", ".hdf5", ".npy", ".npz", ".orc", ".avro", ".tfrecord"), "convert it to .parquet or .jsonl"),
    **dict.fromkeys((".sav", ".dta", ".sas7bdat", ".rdata", ".rds", ".mat"), "export it as .csv"),
    **dict.fromkeys((".gz", ".zst", ".xz", ".bz2"), "an archive, or a name without .jsonl or .csv: unpack it"),
}
SHOWN_FILES = 20


@dataclass
class FoundFiles:
    """The files at one place.

    Attributes:
        data: files with rows, sorted.
        skipped: files that are not read, each with the reason.
    """

    data: list[Path]
    skipped: dict[Path, str] = field(default_factory=dict)


@dataclass
class Source:
    """One path of `--train_file_dir`; with weights, `limit` is its part of `--max_train_samples`."""

    place: str
    files: list[Path]
    weight: Fraction | None = None
    limit: int | None = None


def format_of(path: Path) -> str | None:
    """The format of a file by its name, one of the values of `FORMATS`; None if it has no known suffix."""
    found = FORMATS.get(suffix_of(path))
    return None if found in NEVER_COMPRESSED and path.suffix.lower() in COMPRESSIONS else found


def suffix_of(path: Path) -> str:
    """The suffix that names the format, without that of a compression."""
    return (path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path).suffix.lower()


def find_files(place: str) -> list[Path]:
    """All data files at `place` (a file, or a folder with its subfolders), sorted; names the others in the log.

    Raises:
        UserError: nothing there, nothing with a known suffix, or data in a format that cannot be read.
    """
    found = search_files(place)
    _report(not_read=found.skipped)
    return found.data


def search_files(place: str) -> FoundFiles:
    """As `find_files`, with the files that are not read."""
    path = Path(place)
    if path.is_file():
        if format_of(path) is None:
            why = UNREADABLE.get(path.suffix.lower())
            raise UserError(
                f"{path} is not a data file{f' ({why})' if why else ''}: the suffix must be one of {_known_suffixes()}."
            )
        return FoundFiles([path])
    if not path.is_dir():
        raise UserError(f"no such file or folder: {place} (looked in {Path.cwd()}). Check the path.")
    found, unreadable = FoundFiles([]), {}
    for file in _walk(path):
        reason = _not_data(file.relative_to(path), file) or _not_saved(file)
        if reason is None and format_of(file) is not None:
            found.data.append(file)
        elif reason is None and (why := UNREADABLE.get(file.suffix.lower()) or _looks_like_rows(file)):
            unreadable[file] = why
        else:
            found.skipped[file] = reason or f"{file.suffix or 'no suffix'}: not a format of rows"
    if unreadable:
        shown = "\n".join(f"  {file}: {why}" for file, why in list(unreadable.items())[:SHOWN_FILES])
        raise UserError(
            f"{len(unreadable)} file(s) of {place} look like data and cannot be read:\n{shown}\n"
            "Convert them, or move them out of the folder."
        )
    if not found.data:
        raise UserError(f"{place} has no data files; put {_known_suffixes()} files there.")
    return found


def _known_suffixes() -> str:
    return ", ".join(FORMATS)


def _walk(folder: Path) -> Iterator[Path]:
    """All files below a folder, sorted; folders behind symbolic links too, each folder once."""
    files, seen = [], set()
    for root, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(root)) in seen:
            folders.clear()
            continue
        seen.add(real)
        files += [Path(root, name) for name in names]
    return iter(sorted(file for file in files if file.is_file()))


def _not_data(below: Path, file: Path) -> str | None:
    """Why a file is not expected to have rows; None if it may have some."""
    if any(part.startswith((".", "~$")) or part == "__MACOSX" for part in below.parts):
        return "hidden"
    if ABOUT_THE_DATA.fullmatch(below.name):
        return "about the data"
    if below.name == "state.json" and (file.parent / "dataset_info.json").exists():
        return "about the data"
    if below.suffix.lower() in IMAGES:
        return "images, which rows may name"
    return "not data" if below.suffix.lower() in NOT_DATA else None


def _not_saved(file: Path) -> str | None:
    """Why an .arrow file is not read in a folder of `Dataset.save_to_disk`, where its list also names what is there."""
    state = file.parent / "state.json"
    if file.suffix.lower() != ".arrow" or not state.exists():
        return None
    try:
        listed = [entry["filename"] for entry in json.loads(state.read_text(encoding="utf-8"))["_data_files"]]
    except (ValueError, KeyError, TypeError):
        return None
    if missing := [name for name in listed if not (file.parent / name).exists()]:
        raise UserError(
            f"{file.parent} lacks {', '.join(missing[:3])}, which its state.json lists. Save the data set again."
        )
    return None if file.name in listed else "a cache of datasets, not among the files of state.json"


def _looks_like_rows(file: Path) -> str | None:
    """What to do with a file of no known suffix that begins like JSON."""
    with file.open("rb") as opened:
        begin = opened.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
    return "it looks like JSON: name it .jsonl" if re.match(rb'\{\s*"|\[\s*\{', begin) else None


def split_of(file: Path, place: str | Path) -> str:
    """`train`, `validation` or `test`, by the name of a file and the names of its folders below `place`.

    A name that holds out wins over one that does not, the nearest one over the others; names above `place` and the
    name of a file that is itself the place do not count.
    """
    if Path(place).is_file():
        return "train"
    for part in reversed(file.relative_to(place).parts):
        if match := HELD_OUT_NAME.match(part):
            return "test" if match[1].lower() == "test" else "validation"
    return "train"


def choose_files(arguments: DataArguments) -> tuple[list[Source], list[Path]]:
    """The sources of training rows, and the held-out files."""
    if bool(arguments.train_file_dir) == bool(arguments.dataset_name):
        raise UserError("give the data with exactly one of --train_file_dir, --dataset_name and --prepared_dir.")
    hub_only = {
        "dataset_config_name": arguments.dataset_config_name,
        "dataset_split": arguments.dataset_split != "train",
        "data_files": arguments.data_files,
    }
    if not arguments.dataset_name and (idle := [name for name, given in hub_only.items() if given]):
        raise UserError(f"--{idle[0]} has no effect without --dataset_name. Name the dataset, or omit the flag.")
    if not arguments.train_file_dir:
        return [], find_files(arguments.validation_file_dir) if arguments.validation_file_dir else []
    sources: list[Source] = []
    held_out: list[Path] = []
    left_out: list[Path] = []
    skipped: dict[Path, str] = {}
    reached: dict[Path, str] = {}
    for place, weight in parse_sources(arguments.train_file_dir):
        found = search_files(place)
        skipped |= found.skipped
        _refuse_twice(found.data, place, reached)
        by_split = {split: [f for f in found.data if split_of(f, place) == split] for split in SPLITS}
        if not by_split["train"]:
            raise UserError(
                f"{place} has only held-out files ({_listed(found.data)}), by their names or those of their folders. "
                "Give the files to train on, or their own folder."
            )
        limit = arguments.max_train_samples
        if weight is not None and limit is not None:
            limit = math.ceil(limit * weight)
        sources.append(Source(place, by_split["train"], weight, limit))
        # A test set is looked at once, at the end: it is not used to choose a checkpoint if there is something else.
        used = by_split["validation"] or by_split["test"]
        held_out += used
        left_out += [file for file in by_split["test"] if file not in used]
    if sources[0].weight is None and "mix_strategy" in getattr(arguments, "given", ()):
        raise UserError(
            f"--mix_strategy {arguments.mix_strategy} has no effect without weights. Give them (--train_file_dir "
            "data/a:0.7,data/b:0.3), or omit the flag."
        )
    trained = [file for source in sources for file in source.files]
    validation = held_out
    if arguments.validation_file_dir:
        named = search_files(arguments.validation_file_dir)
        skipped |= named.skipped
        validation = _named_validation(named.data, arguments.validation_file_dir, trained)
        left_out = [file for file in [*held_out, *left_out] if _resolved(file) not in set(map(_resolved, validation))]
    why_held_out = "with --validation_file_dir" if arguments.validation_file_dir else "by their names"
    _report(trained, validation, left_out, skipped, why_held_out)
    return sources, validation


SPLITS = ("train", "validation", "test")


def _resolved(path: Path) -> Path:
    return path.resolve()


def _refuse_twice(files: Sequence[Path], place: str, reached: dict[Path, str]) -> None:
    for path in files:
        if other := reached.get(path.resolve()):
            raise UserError(
                f"--train_file_dir contains {path} twice, in {other} and in {place}. Give paths that do not "
                "contain each other."
            )
        reached[path.resolve()] = place


def _named_validation(files: list[Path], place: str, trained: Sequence[Path]) -> list[Path]:
    """The files of `--validation_file_dir`; those with held-out names where it is also the folder of training rows."""
    splits = {file: split_of(file, place) for file in files}
    by_name = [file for file in files if splits[file] == "validation"] or [f for f in files if splits[f] == "test"]
    shared = not set(map(_resolved, files)).isdisjoint(map(_resolved, trained))
    return by_name if shared and by_name else files


def _report(
    trained: Sequence[Path] = (),
    validation: Sequence[Path] = (),
    left_out: Sequence[Path] = (),
    not_read: dict[Path, str] | None = None,
    why_held_out: str = "",
) -> None:
    """Log what each file was taken for."""
    if validation:
        logger.info(f"held out {why_held_out}, never trained on: {_listed(validation)}")
    if validation or left_out or len(trained) > 1:
        logger.info(f"trained on: {_listed(trained)}")
    if left_out:
        logger.info(f"left out by their names, neither trained on nor evaluated: {_listed(left_out)}")
    if not_read:
        reasons = {reason: [f for f, why in not_read.items() if why == reason] for reason in not_read.values()}
        parts = "; ".join(f"{_listed(files, 5)} ({reason})" for reason, files in reasons.items())
        logger.info(f"not read, {len(not_read)} file(s): {parts}")
    for file in trained:
        if HELD_OUT_ENDING.search(file.name.partition(".")[0]):
            logger.warning(
                f"{file} is trained on, though its name ends like that of held-out rows. If it is held out, rename it "
                f"to begin so (test_…), or move it into a folder named test."
            )
    _warn_of_copies(trained)


def _warn_of_copies(files: Sequence[Path]) -> None:
    """Data sets are often published in several formats next to each other."""
    by_stem: dict[Path, list[Path]] = {}
    for file in files:
        by_stem.setdefault(file.parent / file.name.partition(".")[0], []).append(file)
    for same in by_stem.values():
        if len(same) > 1 and len({file.name for file in same}) > 1 and format_of(same[0]) != "text":
            logger.warning(
                f"{_listed(same)} have the same name: if they hold the same rows, these are trained on twice. "
                "Move the copies out of the folder."
            )


def _listed(files: Sequence[Path], limit: int = SHOWN_FILES) -> str:
    more = f" and {len(files) - limit} more" if len(files) > limit else ""
    return f"{', '.join(map(str, files[:limit]))}{more}"
