"""How long rows are in tokens, which of them fit, and what makes room for the others."""

import math
from collections import Counter
from dataclasses import dataclass

from medicalgpt.data.encoding import IGNORED
from medicalgpt.data.statistics import PROPOSED_PERCENTILES, percentile, percentiles
from medicalgpt.models.attention import context_length, scaling_flag

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from transformers import PreTrainedConfig

UNKNOWN, USED, SHORTENED, TOO_LONG = range(4)


@dataclass
class RowLengths:
    """One side's rows, in their order.

    Attributes:
        tokens: of each entire row, whether it fits or not: of its longest sample, of a preference pair with the longer
            answer; 0 where a row could not be encoded.
        outcome: of each row USED, SHORTENED (to its first exchanges), TOO_LONG, or UNKNOWN.
    """

    tokens: np.ndarray
    outcome: np.ndarray

    def select(self, keep: np.ndarray) -> "RowLengths":
        return RowLengths(self.tokens[keep], self.outcome[keep])

    def count(self, outcome: int) -> int:
        return int((self.outcome == outcome).sum())

    @property
    def known(self) -> np.ndarray:
        return self.tokens[self.tokens > 0]


@dataclass(frozen=True)
class LengthLimit:
    """The maximum number of tokens of a row, as flags set it.

    Attributes:
        tokens: None where rows of any length can be used.
        reserved: of `--model_max_length`, tokens that are kept for the answer, with the flag that says so.
        positions: of the model; None if it sets no limit.
        scaling: the flag that stretches them; empty if they cannot be.
    """

    tokens: int | None = None
    reserved: tuple[str, int] | None = None
    positions: int | None = None
    scaling: str = ""

    @classmethod
    def of(
        cls, tokens: int | None, reserved: tuple[str, int] | None = None, config: PreTrainedConfig | None = None
    ) -> "LengthLimit":
        """The limit with the positions of a model of this configuration; None: of no model."""
        if config is None:
            return cls(tokens, reserved)
        return cls(tokens, reserved, context_length(config), scaling_flag(config))

    def flags_for(self, length: int) -> str:
        """The flags with which rows of this many tokens fit."""
        if not self.reserved:
            return f"--model_max_length {length}"
        return f"--model_max_length {length + self.reserved[1]} {self.reserved[0]} {self.reserved[1]}"

    def needed(self, lengths: RowLengths) -> str:
        """What to pass so that 95, 99 and 100% of the rows fit, each different length once."""
        parts: dict[int, str] = {}
        for share in PROPOSED_PERCENTILES:
            parts[percentile(lengths.known, share)] = "all rows" if share == 100 else f"{share}% of the rows"
        limit = max(self.tokens or 0, 0)
        fitting = {length: share for length, share in parts.items() if not self.is_beyond(length)}
        shown = [f"{share} fit with {self.flags_for(length)}" for length, share in fitting.items() if length > limit]
        if beyond := [length for length in parts if length not in fitting]:
            shown.append(f"{parts[beyond[-1]]} {self.beyond(beyond[-1])}")
        return "; ".join(shown)

    def remedy(self, length: int) -> str:
        """What to do about one row of this many tokens."""
        if self.is_beyond(length):
            return f"Shorten the row: it would {self.beyond(length)}."
        return f"Shorten the row, or make room for it: {self.flags_for(length)}."

    def beyond(self, length: int) -> str:
        """The positions that rows of this many tokens need, and the flags that give the model as many, if any do."""
        needed = f"need {length + self._taken:,} positions, the model has {self.positions:,}"
        return f"{needed} (more with {self.flags_for(length)} {self.scaling})" if self.scaling else needed

    def is_beyond(self, length: int) -> bool:
        """Whether rows of this many tokens need more positions than the model has."""
        return self.positions is not None and length + self._taken > self.positions

    @property
    def _taken(self) -> int:
        return self.reserved[1] if self.reserved else 0


def describe_lost_rows(lost: int, rows: int, allowed: float, what: str = "rows") -> tuple[str, str] | None:
    """What to say of rows that would be skipped, and the way out; None if no more than the allowed share would be."""
    if lost <= allowed * rows:
        return None
    share = "half" if allowed == 0.5 else f"{allowed:.0%}"
    way_out = (
        f"To do without these rows: --max_long_rows {math.ceil(100 * lost / rows) / 100:g}." if lost < rows else ""
    )
    return f"{lost} of {rows} {what} are too long, more than {share}", way_out


def describe(lengths: RowLengths) -> str:
    """One line with the percentiles of all rows."""
    return "tokens, share of rows up to this length: " + ", ".join(
        f"{share}%: {length:,}" for share, length in percentiles(lengths.known).items()
    )


def count_tokens(dataset: Dataset) -> tuple[int, int, int]:
    """Sequences of a data set, their tokens and the supervised ones; of pairs, a prompt counts with each answer."""
    counts = Counter()
    for batch in dataset.with_format("arrow").iter(10_000):
        for name in set(batch.column_names) & {"input_ids", "prompt_ids", "chosen_ids", "rejected_ids"}:
            counts[name] += _values(batch[name])
        if "labels" in batch.column_names:
            labels = pc.list_flatten(batch["labels"])
            counts["labels"] += pc.sum(pc.not_equal(labels, IGNORED)).as_py() or 0
    answers = counts["chosen_ids"] + counts["rejected_ids"]
    if answers:
        return len(dataset), 2 * counts["prompt_ids"] + answers, answers
    return len(dataset), counts["input_ids"] + counts["prompt_ids"], counts["labels"]


def _values(column: pa.ChunkedArray) -> int:
    return pc.sum(pc.list_value_length(column)).as_py() or 0


def list_lengths(dataset: Dataset, name: str) -> np.ndarray:
    """(rows,) the lengths of the lists in a column."""
    batches = dataset.select_columns(name).with_format("arrow").iter(10_000)
    parts = [pc.list_value_length(batch[name]).to_numpy() for batch in batches]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)
