"""What a set of rows is like: how long its rows are, in which script they are written, how many turns they have."""

from collections.abc import Sequence

import numpy as np

SHOWN_PERCENTILES = (50, 90, 95, 99, 100)
# The shares of rows for which the limit that takes them is printed.
PROPOSED_PERCENTILES = (95, 99, 100)


def percentile(values: Sequence[int] | np.ndarray, share: int) -> int:
    """The smallest of `values` that at least `share` percent of them do not exceed, so that a limit there keeps them.

    Raises:
        ValueError: no values.
    """
    if not len(values):
        raise ValueError("no values")
    # Whole numbers: as a float, 95% of 20 rows could become the 20th instead of the 19th.
    rank = max(1, -(-share * len(values) // 100))
    return int(np.partition(np.asarray(values), rank - 1)[rank - 1])


def percentiles(values: Sequence[int] | np.ndarray, shares: Sequence[int] = SHOWN_PERCENTILES) -> dict[str, int]:
    """`percentile` of each share, by its name; empty without values."""
    return {str(share): percentile(values, share) for share in shares} if len(values) else {}
