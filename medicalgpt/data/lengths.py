"""How long rows are in tokens, which of them fit, and what makes room for the others."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from medicalgpt.data.statistics import PROPOSED_PERCENTILES, percentile, percentiles

import numpy as np

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
    """

    tokens: int | None = None
    reserved: tuple[str, int] | None = None
    positions: int | None = None

    @classmethod
    def of(cls, encode: Callable[..., Any], reserved: tuple[str, int] | None, positions: int | None) -> "LengthLimit":
        """The limit of an encoding function with its arguments, as `functools.partial` holds them."""
        return cls(encode.keywords.get("max_length") if isinstance(encode, partial) else None, reserved, positions)

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
        taken = self.reserved[1] if self.reserved else 0
        limit = max(self.tokens or 0, 0)
        fitting = {length: share for length, share in parts.items() if not self._beyond(length + taken)}
        shown = [f"{share} fit with {self.flags_for(length)}" for length, share in fitting.items() if length > limit]
        if beyond := [length for length in parts if length not in fitting]:
            shown.append(f"{parts[beyond[-1]]} need {beyond[-1] + taken:,} positions, the model has {self.positions:,}")
        return "; ".join(shown)

    def _beyond(self, length: int) -> bool:
        return self.positions is not None and length > self.positions


def describe(lengths: RowLengths) -> str:
    """One line with the percentiles of all rows."""
    return "tokens, share of rows up to this length: " + ", ".join(
        f"{share}%: {length:,}" for share, length in percentiles(lengths.known).items()
    )
