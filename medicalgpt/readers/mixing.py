"""Which rows of several sources make a mixture with the requested shares."""

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from medicalgpt.errors import UserError

import numpy as np


def parse_sources(text: str) -> list[tuple[str, Fraction | None]]:
    """`data/a:0.7,data/b:0.3` as paths and weights that add up to 1; `a,b` as paths without weights.

    A text that is an existing path, with its commas or colons, is that path.

    Raises:
        UserError: an empty part, a weight that is not a positive number, or weights on some parts only.
    """
    if Path(text).exists():
        return [(text, None)]
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise UserError(f"--train_file_dir {text} has an empty part between its commas. Write data/a,data/b.")
    sources = [_parse_source(part) for part in parts]
    weights = [weight for _, weight in sources if weight is not None]
    if weights and len(weights) < len(sources):
        unweighted = ", ".join(place for place, weight in sources if weight is None)
        raise UserError(
            f"--train_file_dir {text} gives weights to some paths, but not to {unweighted}. Give each one a weight "
            "(data/a:0.7,data/b:0.3), or none."
        )
    total = sum(weights)
    return [(place, weight / total if weight is not None else None) for place, weight in sources]


def _parse_source(part: str) -> tuple[str, Fraction | None]:
    place, colon, number = part.rpartition(":")
    if Path(part).exists() or not colon:
        return part, None
    try:
        # A fraction is exactly 0.7; with floats a share of 700 rows could become 699.
        weight = Fraction(number) if math.isfinite(float(number)) else Fraction(0)
    except ValueError:
        weight = Fraction(0)
    if weight <= 0 or not place:
        raise UserError(
            f"--train_file_dir: {part!r} is not a file or folder, and as a path with a weight it has the path "
            f"{place!r} and the weight {number!r}, which must be a positive number. Write data/a:0.7."
        )
    return place, weight


def mixture_sizes(
    rows: Sequence[int], weights: Sequence[Fraction], strategy: str, limit: int | None = None
) -> list[int]:
    """How many rows of each source the mixture has.

    `under` gives the largest mixture without a repeated row, `over` the smallest that has every row. The
    sum is exact, and each size is less than one row away from its share.

    Args:
        rows: number of rows of each source.
        weights: positive, adding up to 1.
        limit: maximum number of rows.
    """
    wholes = [count / weight for count, weight in zip(rows, weights, strict=True)]
    total = math.floor(min(wholes)) if strategy == "under" else math.ceil(max(wholes))
    if limit is not None:
        total = min(total, limit)
    shares = [total * weight for weight in weights]
    sizes = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda source: sizes[source] - shares[source])
    for source in by_remainder[: total - sum(sizes)]:
        sizes[source] += 1
    return sizes


def draw(rows: int, size: int, seed: Sequence[int]) -> np.ndarray:
    """How often each row occurs in the mixture, (rows,): all equally often, `size % rows` of them one more time."""
    times = np.full(rows, size // rows, dtype=np.int64)
    times[np.random.default_rng(seed).permutation(rows)[: size % rows]] += 1
    return times
