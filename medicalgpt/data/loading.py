"""Find files, read rows with their line numbers, recognise each row's format, convert it, and refuse what is broken.

Nothing is silently dropped or repaired: a row is used, or it is a `Problem` with file, line, value, reason and remedy.
`LoadedData.account` has the balance of each file, rows = used + left out, by reason.
"""

import hashlib
import random
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from medicalgpt.args import DataArguments
from medicalgpt.data.images import check_images
from medicalgpt.data.lengths import SHORTENED, TOO_LONG, LengthLimit, RowLengths, describe, describe_lost_rows
from medicalgpt.data.rows import Rows, on_disk
from medicalgpt.errors import UserError
from medicalgpt.formats.conversion import Converter, canonical_json, converter
from medicalgpt.formats.presets import PRESETS
from medicalgpt.logs import heartbeat
from medicalgpt.readers.folders import Source, choose_files
from medicalgpt.readers.hub_rows import open_hub
from medicalgpt.readers.mixing import draw, mixture_sizes
from medicalgpt.readers.problems import SHOWN_PROBLEMS, DataError, Problem, RowError, place_of
from medicalgpt.readers.sources import InputFile, column_values, ignored_fields, open_files

import numpy as np
from loguru import logger

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class FileAccount:
    """The balance of one file: rows = used + sum(left_out.values()).

    Attributes:
        shortened: used rows that keep only their first exchanges.
        mixture: of a file in a weighted mixture: its source, the source's weight and its share, and `drawn`, the number
            of rows of this file in an epoch, repeated ones counted each time.
        unused: number of rows that have each of the fields that are not used.
        rows_with_unused: number of rows that have any of them.
        presets: number of rows that were recognised as each preset.
        prepared: hash of the index of the shards that have its tokens, if they were prepared.
        packed_shards: the number of these shards if there are several, each of which was packed by itself, so that the
            blocks follow from the division.
        images, images_sha256: number of images in its rows, and a hash of all of them.
    """

    file: str
    sha256: str
    rows: int = 0
    left_out: Counter = field(default_factory=Counter)
    shortened: int = 0
    mixture: dict[str, Any] = field(default_factory=dict)
    unused: Counter = field(default_factory=Counter)
    rows_with_unused: int = 0
    presets: Counter = field(default_factory=Counter)
    prepared: str = ""
    packed_shards: int = 0
    images: int = 0
    images_sha256: str = ""

    def add_images(self, images: Sequence[dict[str, Any]]) -> None:
        for image in images:
            self.images += 1
            self.images_sha256 = hashlib.sha256((self.images_sha256 + image["sha256"]).encode()).hexdigest()

    @property
    def used(self) -> int:
        return self.rows - sum(self.left_out.values())

    def as_dict(self) -> dict[str, Any]:
        return {
            "file": self.file,
            "sha256": self.sha256,
            "rows": self.rows,
            "used": self.used,
            "left_out": dict(self.left_out),
            **({"unused_fields": dict(self.unused)} if self.unused else {}),
            **({"presets": dict(self.presets)} if self.presets else {}),
            **({"shortened": self.shortened} if self.shortened else {}),
            **({"prepared": self.prepared} if self.prepared else {}),
            **({"packed_shards": self.packed_shards} if self.packed_shards else {}),
            **({"images": self.images, "images_sha256": self.images_sha256} if self.images else {}),
            **self.mixture,
        }


@dataclass
class LoadedData:
    """Converted rows of both sides. Each row is the converter's dict plus `place`, the fields of its `Place`."""

    train: Sequence[dict[str, Any]]
    validation: Sequence[dict[str, Any]]
    account: dict[str, list[FileAccount]]
    problems: list[Problem] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)
    # By side, once its rows are encoded; of the rows that were there then.
    lengths: dict[str, RowLengths] = field(default_factory=dict)

    def settle(self, arguments: DataArguments, limit: LengthLimit | None = None) -> None:
        """Skip and count the rows with problems, and count those that were shortened, as far as the flags allow it.

        Args:
            limit: on the tokens of a row.

        Raises:
            DataError: rows with problems that no flag allows to skip, all at once.
            UserError: no training row is left, or more than half of the rows of a side are too long and no flag allows
                that.
        """
        limit = limit or LengthLimit()
        self.problems = with_length_remedies(self.problems, limit)
        self.skip_problems(arguments, limit, max_long_rows=arguments.max_long_rows)
        if not self.train:
            raise UserError("every training row was skipped; see the warnings above.\n" + self.summary())

    def skip_problems(self, arguments: DataArguments, limit: LengthLimit, *, max_long_rows: float) -> None:
        """As `settle`, for rows that are a part of the data: none of them need be left.

        Args:
            max_long_rows: share of the rows that may be skipped because they are too long.
        """
        allowed = {"unusable": arguments.skip_bad_rows, "too long": arguments.long_rows != "refuse"}
        if refused := [problem for problem in self.problems if not allowed.get(problem.kind)]:
            too_long = any(problem.kind == "too long" for problem in refused)
            raise DataError(refused, self._describe_lengths(limit) if too_long else "")
        self._refuse_if_too_many_are_lost(limit, max_long_rows)
        for problem in self.problems[:SHOWN_PROBLEMS]:
            logger.warning(f"skipped: {problem}")
        if limit.tokens is not None and (described := self._describe_lengths(limit)):
            logger.info(described)
        by_file = {(side, account.file): account for side, accounts in self.account.items() for account in accounts}
        for problem in self.problems:
            if problem.side:
                by_file[problem.side, problem.place.file].left_out[problem.kind] += 1
        gone = {problem.place: problem.kind for problem in self.problems if not problem.side}
        for side in self.account if gone else ():
            rows = getattr(self, side)
            keep = np.ones(len(rows), dtype=bool)
            for index, row in enumerate(rows):
                place = place_of(row)
                if kind := gone.get(place):
                    keep[index] = False
                    by_file[side, place.file].left_out[kind] += 1
            setattr(self, side, on_disk(rows).select(keep))
            if side in self.lengths:
                self.lengths[side] = self.lengths[side].select(keep)
        self.problems = []
        for side, lengths in self.lengths.items():
            for index in np.flatnonzero(lengths.outcome == SHORTENED).tolist():
                by_file[side, place_of(getattr(self, side)[index]).file].shortened += 1

    def report_fields(self, convert: Converter) -> None:
        """Log what rows were recognised as, and which of their fields are not used, in one line each.

        Raises:
            UserError: `--columns` names a field that no row has.
        """
        accounts = [account for side in self.account.values() for account in side]
        for name, count in sum((account.presets for account in accounts), Counter()).items():
            source = PRESETS[name].source
            logger.info(f"{count:,} row(s) have the shape of {source} and are read as such (--preset {name})")
        if unused := sum((account.unused for account in accounts), Counter()):
            rows = sum(account.rows_with_unused for account in accounts)
            fields = ", ".join(name if count == rows else f"{name} ({count:,})" for name, count in unused.most_common())
            logger.info(f"{rows:,} row(s) hold fields that are not used: {fields}")
        if convert.unseen and not self.problems:
            absent = ", ".join(sorted(convert.unseen))
            raise UserError(f"--columns: no row has the field {absent}. Correct its name, or omit it.")

    def _describe_lengths(self, limit: LengthLimit) -> str:
        """How long the rows of each side are, and with which flags the longer ones fit."""
        lines = []
        for side, lengths in self.lengths.items():
            if len(lengths.known):
                lines.append(f"{side}: {describe(lengths)}")
                if needed := limit.needed(lengths):
                    lines.append(f"  {needed}")
        return "\n".join(lines)

    def _refuse_if_too_many_are_lost(self, limit: LengthLimit, allowed: float) -> None:
        for side, lengths in self.lengths.items():
            lost, rows = lengths.count(TOO_LONG), len(lengths.outcome)
            if found := describe_lost_rows(lost, rows, allowed, f"{side} rows"):
                reason, way_out = found
                place = place_of(getattr(self, side)[int(np.argmax(lengths.outcome == TOO_LONG))])
                first = next(problem for problem in self.problems if problem.place == place)
                lines = [f"{reason}. The first: {first}", describe(lengths), limit.needed(lengths)]
                raise UserError("\n".join([*filter(None, lines), f"Nothing was trained. {way_out}".strip()]))

    def mix(self, encoded: "Dataset", arguments: DataArguments, seed: int) -> "Dataset":
        """Take as many encoded training rows of each source as its weight requires; all of them without weights.

        Call it after `settle`, so that the shares are those of the rows that are trained on. A row counts once,
        whatever the number of its samples. Rows that are not taken are counted as "not in the mixture".

        Args:
            encoded: column `place`; the samples of a row are adjacent, rows in the order of `train`.
            arguments: `mix_strategy`, and `max_train_samples` as the maximum number of rows of the mixture.
            seed: chooses the rows.

        Raises:
            UserError: a source of which no row could be taken.
        """
        if not self.sources or self.sources[0].weight is None:
            return encoded
        source_of = {str(path): number for number, source in enumerate(self.sources) for path in source.files}
        starts, row_sources, before = array("q"), array("q"), None
        for index, place in enumerate(column_values(encoded, "place")):
            if place != before:
                starts.append(index)
                row_sources.append(source_of[place["file"]])
                before = place
        owners = np.array(row_sources)
        counts = np.bincount(owners, minlength=len(self.sources)).tolist()
        weights = [source.weight for source in self.sources]
        sizes = mixture_sizes(counts, weights, arguments.mix_strategy, arguments.max_train_samples)
        for source, count, size in zip(self.sources, counts, sizes, strict=True):
            if size == 0:
                raise UserError(
                    f"--train_file_dir: a mixture of {sum(sizes)} rows has none of {source.place} (weight "
                    f"{float(source.weight):.4g}, {count} usable rows). Give it another weight or more rows, or omit "
                    "it."
                )
        times = np.zeros(len(owners), dtype=np.int64)
        for number, size in enumerate(sizes):
            times[owners == number] = draw(counts[number], size, [seed, number])
        self._count_mixture(times, sizes)
        self.train = on_disk(self.train).select(times > 0)
        lengths = np.diff([*starts, len(encoded)])
        # Each pass has the rows that occur at least once more.
        passes = [np.flatnonzero(times > number) for number in range(times.max())]
        rows = np.concatenate(passes)
        first_of_row = np.repeat(np.array(starts)[rows], lengths[rows])
        within_row = np.arange(len(first_of_row)) - np.repeat(np.cumsum(lengths[rows]) - lengths[rows], lengths[rows])
        return encoded.select(first_of_row + within_row)

    def _count_mixture(self, times: np.ndarray, sizes: list[int]) -> None:
        accounts = {account.file: account for account in self.account["train"]}
        at = 0
        # Rows are in the order of their files.
        for source, size in zip(self.sources, sizes, strict=True):
            for path in source.files:
                account = accounts[str(path)]
                drawn = times[at : at + account.used]
                at += account.used
                account.mixture = {
                    "source": source.place,
                    "weight": float(source.weight),
                    "share": size / sum(sizes),
                    "drawn": int(drawn.sum()),
                }
                if unused := int((drawn == 0).sum()):
                    account.left_out["not in the mixture"] += unused
                if account.shortened:
                    shortened = self.lengths["train"].outcome[at - len(drawn) : at] == SHORTENED
                    account.shortened = int((shortened & (drawn > 0)).sum())

    def summary(self) -> str:
        """A line for each side: rows in, used, left out and why; and one for each source of a mixture."""
        lines = []
        for side, accounts in self.account.items():
            if not accounts:
                continue
            left_out = sum((account.left_out for account in accounts), Counter())
            reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "none"
            rows, shortened = (sum(getattr(account, name) for account in accounts) for name in ("rows", "shortened"))
            kept = f" ({shortened} of them shortened to their first exchanges)" if shortened else ""
            lines.append(
                f"{side:<10} {rows:>7} rows in {len(accounts)} file(s), used {rows - sum(left_out.values())}{kept}, "
                f"left out: {reasons}"
            )
        for source in self.sources:
            parts = [account for account in self.account["train"] if account.mixture.get("source") == source.place]
            if parts:
                drawn, used = sum(part.mixture["drawn"] for part in parts), sum(part.used for part in parts)
                lines.append(
                    f"{'mixture':<10} {drawn:>7} rows of {source.place}, {parts[0].mixture['share']:.2%} for a weight "
                    f"of {float(source.weight):.2%}" + (f"; {used} distinct ones" if used < drawn else "")
                )
        return "\n".join(lines)


def with_length_remedies(problems: Sequence[Problem], limit: LengthLimit) -> list[Problem]:
    """The problems; of rows with too many tokens, with what makes room for that many."""
    return [replace(each, remedy=limit.remedy(each.tokens)) if each.tokens else each for each in problems]


def row_converter(arguments: DataArguments, to: Callable[..., dict[str, Any]]) -> Converter:
    """The converter to one kind of training that the data flags ask for; `to` itself if it is one already.

    Raises:
        UserError: --columns or --preset cannot be understood.
    """
    if isinstance(to, Converter):
        return to
    try:
        return converter(to, ignored_fields(arguments.ignore_fields), arguments.columns, arguments.preset)
    except ValueError as error:
        raise UserError(str(error)) from error


def load_data(
    arguments: DataArguments,
    convert: Callable[..., dict[str, Any]],
    *,
    document_unit: str = "auto",
    seed: int = 42,
) -> LoadedData:
    """Read, convert and check the training and held-out rows.

    Rows that cannot be used are in `problems` of the result, to which a stage can add its own (rows that are too long);
    `LoadedData.settle` then reports all of them at once, or skips and counts them.

    Args:
        arguments: the data flags.
        convert: `to_text`, `to_messages` or another converter; raises `RowError`.
        document_unit: see `read_rows`.
        seed: of the random split that `--validation_split_percentage` asks for.

    Raises:
        UserError: no data named, nothing found, or held-out rows that occur among the training rows.
    """
    convert = row_converter(arguments, convert)
    sources, validation_files = choose_files(arguments)
    encoding = arguments.encoding
    data = LoadedData([], [], {"train": [], "validation": []}, sources=sources)
    accounts = data.account

    def read(side: str, files: Iterable[InputFile], limit: int | None) -> Iterator[dict[str, Any]]:
        return convert_files(data, side, files, convert, limit)

    with heartbeat(lambda: f"reading rows: {sum(a.rows for a in accounts['train'] + accounts['validation'])}"):
        if sources and sources[0].weight is not None:
            groups = [(open_files(source.files, document_unit, encoding), source.limit) for source in sources]
        else:
            files = [path for source in sources for path in source.files]
            groups = [(open_files(files, document_unit, encoding), arguments.max_train_samples)]
        data.train = Rows(chain.from_iterable(read("train", files, limit) for files, limit in groups))
        data.validation = Rows(
            read("validation", open_files(validation_files, document_unit, encoding), arguments.max_eval_samples)
        )
        if arguments.dataset_name:
            for side, files, limit in open_hub(arguments, with_validation=not validation_files):
                setattr(data, side, Rows(read(side, files, limit)))
        if arguments.validation_split_percentage and not data.validation:
            _split(data, arguments.validation_split_percentage, seed)
        if not data.train and not data.problems:
            raise UserError("no training rows were found. Check --train_file_dir and --max_train_samples.")
        data.report_fields(convert)
        refuse_overlap(data, arguments)
    return data


def convert_files(
    data: LoadedData,
    side: str,
    files: Iterable[InputFile],
    convert: Converter,
    limit: int | None,
) -> Iterator[dict[str, Any]]:
    """Yield the first `limit` rows that can be converted; the account of each file and all problems join `data`."""
    converted = 0
    for name, digest, rows in files:
        account = FileAccount(name, digest)
        data.account[side].append(account)
        for row in rows:
            account.rows += 1
            if limit is not None and converted >= limit:
                account.left_out[f"beyond --max_{'train' if side == 'train' else 'eval'}_samples"] += 1
                continue
            if isinstance(row, Problem):
                data.problems.append(replace(row, side=side))
                continue
            try:
                conversion = convert.convert(row.value)
                images = conversion.row.get("images")
                checked = {"images": check_images(images, row.place)} if images else {}
            except RowError as error:
                data.problems.append(error.at(row.place, side))
                continue
            converted += 1
            account.add_images(checked.get("images", ()))
            account.unused.update(conversion.unused)
            account.rows_with_unused += bool(conversion.unused)
            account.presets.update([conversion.preset] if conversion.preset else [])
            yield {**conversion.row, **checked, "place": row.place._asdict()}
        if account.rows == 0:
            raise UserError(f"{name} is empty. Remove it or fill it.")


def _split(data: LoadedData, percentage: float, seed: int) -> None:
    if not 0 < percentage < 100:
        raise UserError(f"--validation_split_percentage {percentage} must be between 0 and 100.")
    if len(data.train) < 2:
        if data.problems:
            logger.warning("nothing could be held out: --validation_split_percentage needs two usable rows")
            return
        raise UserError("--validation_split_percentage: nothing can be held out of a single row. Omit the flag.")
    # Duplicate rows stay on one side; groups of equal rows are numbered by first occurrence.
    _, first, group = np.unique(_identities(data.train), return_index=True, return_inverse=True)
    numbers = np.empty(len(first), dtype=np.int64)
    numbers[np.argsort(first)] = np.arange(len(first))
    order = array("q", range(len(first)))
    random.Random(seed).shuffle(order)
    count = min(len(order) - 1, max(1, round(len(order) * percentage / 100)))
    held_out = np.isin(numbers[group], order[:count])
    rows = on_disk(data.train)
    data.train, data.validation = rows.select(~held_out), rows.select(held_out)
    by_file = {account.file: account for account in data.account["train"]}
    moved = Counter(place_of(row).file for row in data.validation)
    for name, number in moved.items():
        by_file[name].left_out["moved to validation"] += number
        data.account["validation"].append(FileAccount(name, by_file[name].sha256, rows=number))
    logger.info(f"held out {held_out.sum()} of {len(rows)} training rows at random (seed {seed})")


def refuse_overlap(data: LoadedData, arguments: DataArguments) -> None:
    """Raises UserError if held-out rows are trained on, unless `--allow_overlap` says so."""
    if not data.validation:
        return
    trained, held_out = _identities(data.train), _identities(data.validation)
    shared = np.flatnonzero(np.isin(held_out, trained))
    if not len(shared):
        return
    places = [
        (place_of(data.validation[index]), place_of(data.train[np.flatnonzero(trained == held_out[index])[-1]]))
        for index in shared[:5].tolist()
    ]
    by_prompt = {"chosen", "columns"} & set(data.validation[0])
    what, relation = ("prompts", "has the prompt of") if by_prompt else ("rows", "is also")
    shown = "\n  ".join(f"{validation} {relation} {train}" for validation, train in places)
    message = f"{len(shared)} of {len(data.validation)} held-out {what} are also trained on:\n  {shown}"
    if arguments.allow_overlap:
        logger.warning(f"{message}\n  Evaluation will look better than it is (--allow_overlap True)")
        return
    remedy = "Remove them from one side, or pass --allow_overlap True."
    if len(shared) == len(data.validation) and arguments.validation_file_dir and not arguments.streaming:
        # Most likely the same folder for both.
        message = f"all {len(shared)} held-out {what} are also trained on, the first of them: {shown.splitlines()[0]}"
        remedy = f"Hold out others: --validation_split_percentage 5 instead of --validation_file_dir. {remedy}"
    raise UserError(f"{message}\n{remedy}")


def _identities(rows: Sequence[dict[str, Any]]) -> np.ndarray:
    """The identities of rows, (rows,) of 16 bytes."""
    return np.fromiter((identity(row) for row in rows), dtype="S16", count=len(rows))


def identity(row: dict[str, Any]) -> bytes:
    """A hash of a converted row, 16 bytes, that ignores white space.

    Of preferences and tasks it covers only the prompt: a prompt that is trained on is not held out with other answers.
    """
    content = {key: value for key, value in row.items() if key not in ("place", "chosen", "rejected", "columns")}
    if "images" in content:
        # The same image may be in several files.
        content["images"] = [image["sha256"] for image in content["images"]]
    return hashlib.sha256(canonical_json(content).encode()).digest()[:16]
