"""Rows that occur more than once, exactly or nearly, in one set or in two.

Two rows are near-duplicates if they share most of their runs of five characters (Jaccard similarity), which needs no
words and so works for Chinese too. Candidates come from MinHash (Broder 1997, https://doi.org/10.1109/SEQUEN.1997.666900)
with locality-sensitive hashing; each is then compared in full.
"""

import hashlib
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from medicalgpt.data.images import parts_of
from medicalgpt.formats.conversion import canonical_json

import numpy as np

NGRAM = 5
# 21 bands of 6 values: of pairs with a similarity of 0.8, 998 in 1,000 agree in a band, of those with 0.5, 3 in 10.
BANDS, BAND_VALUES = 21, 6
# How far the estimate may be below the true similarity: four standard deviations at 0.8.
SLACK = 0.15
PAIRS_AT_A_TIME = 50_000


def text_of(row: dict[str, Any]) -> str:
    """All texts of a converted row."""
    if "text" in row:
        return row["text"]
    parts = []
    for message in [*row["messages"], *(row[name] for name in ("chosen", "rejected") if name in row)]:
        parts += [part["text"] for part in parts_of(message["content"]) if part["type"] == "text"]
        parts.append(message.get("reasoning_content", ""))
        parts += [canonical_json(call["function"]) for call in message.get("tool_calls", ())]
    return "\n".join(part for part in parts if part)


def _compared_text(row: dict[str, Any]) -> str:
    """All texts of a converted row, and the hashes of its images: with another image it is another row."""
    return "\n".join([text_of(row), *(image["sha256"] for image in row.get("images", ()))])


def content_key(row: dict[str, Any]) -> bytes:
    """A hash of everything in a converted row, 16 bytes, that ignores white space and where images are."""
    content = {name: value for name, value in row.items() if name != "place"}
    if "images" in content:
        content["images"] = [image["sha256"] for image in content["images"]]
    return hashlib.sha256(canonical_json(content).encode()).digest()[:16]


def exact_duplicates(rows: Sequence[dict[str, Any]]) -> dict[int, int]:
    """The positions of rows that occurred before, each with the position where they did first."""
    first: dict[bytes, int] = {}
    found = {}
    for position, row in enumerate(rows):
        key = content_key(row)
        if key in first:
            found[position] = first[key]
        else:
            first[key] = position
    return found


def shingles(text: str) -> np.ndarray:
    """Hashes of all runs of `NGRAM` characters, each once, sorted; case, width and white space do not count."""
    plain = "".join(unicodedata.normalize("NFKC", text).casefold().split())
    codes = np.frombuffer(plain.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    count = max(1, len(codes) - NGRAM + 1)
    hashes = np.zeros(count, dtype=np.uint64)
    for offset in range(min(NGRAM, len(codes))):
        hashes = hashes * np.uint64(1_000_003) + codes[offset : offset + count]
    hashes *= np.uint64(0x9E3779B97F4A7C15)
    return np.unique((hashes >> np.uint64(32)).astype(np.uint32))


def similarity(one: np.ndarray, other: np.ndarray) -> float:
    """Jaccard similarity of two results of `shingles`."""
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)


@dataclass(frozen=True)
class NearPair:
    """Two near-duplicates, by their positions."""

    one: int
    other: int
    similarity: float


class NearDuplicates:
    """Searches rows for near-duplicates. Memory: 504 bytes per row.

    Args:
        rows: converted rows.
        threshold: the least similarity of near-duplicates, above 0.5.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], threshold: float):
        self.rows, self.threshold = rows, threshold
        self.signatures = _signatures(rows)
        self._shingles = lru_cache(maxsize=2048)(lambda position: shingles(_compared_text(rows[position])))

    def groups(self, leave_out: dict[int, int]) -> list[list[NearPair]]:
        """Groups of rows that are connected by near-duplicates, each as pairs of a row and one before it.

        Args:
            leave_out: positions that do not count, such as exact duplicates.
        """
        kept = np.setdiff1d(np.arange(len(self.rows)), np.fromiter(leave_out, dtype=np.int64, count=len(leave_out)))
        candidates = [np.empty((0, 2), dtype=np.int64)]
        for keys in _band_keys(self.signatures[kept]):
            order = np.argsort(keys, kind="stable")
            ordered = keys[order]
            same = np.flatnonzero(ordered[1:] == ordered[:-1]) + 1
            # Not all pairs of a bucket, which may have thousands of rows: each row with the first and the previous one.
            starts = np.searchsorted(ordered, ordered[same])
            candidates += [np.stack([kept[order[before]], kept[order[same]]], axis=1) for before in (starts, same - 1)]
        groups = _Groups()
        for pair in self._verified(np.unique(np.sort(np.concatenate(candidates), axis=1), axis=0), self, groups):
            groups.join(pair)
        return groups.pairs()

    def shared_with(self, other: "NearDuplicates") -> list[NearPair]:
        """For each row of `other` that has a near-duplicate here, the pair (position here, position there)."""
        candidates = [np.empty((0, 2), dtype=np.int64)]
        bands = zip(_band_keys(self.signatures), _band_keys(other.signatures), strict=True)
        for own, theirs in bands:
            order = np.argsort(own, kind="stable")
            ordered = own[order]
            starts, ends = np.searchsorted(ordered, theirs), np.searchsorted(ordered, theirs, side="right")
            for at in (starts, ends - 1):
                hit = np.flatnonzero(ends > starts)
                candidates.append(np.stack([order[at[hit]], hit], axis=1))
        best: dict[int, NearPair] = {}
        for pair in self._verified(np.unique(np.concatenate(candidates), axis=0), other):
            if pair.other not in best or pair.similarity > best[pair.other].similarity:
                best[pair.other] = pair
        return [best[position] for position in sorted(best)]

    def _verified(
        self, candidates: np.ndarray, other: "NearDuplicates", groups: "_Groups | None" = None
    ) -> Iterator[NearPair]:
        for start in range(0, len(candidates), PAIRS_AT_A_TIME):
            part = candidates[start : start + PAIRS_AT_A_TIME]
            estimate = (self.signatures[part[:, 0]] == other.signatures[part[:, 1]]).mean(axis=1)
            for one, two in part[estimate >= self.threshold - SLACK].tolist():
                if groups is not None and groups.joined(one, two):
                    continue
                exact = similarity(self._shingles(one), other._shingles(two))
                if exact >= self.threshold:
                    yield NearPair(one, two, exact)


class _Groups:
    """Which positions are connected (union-find)."""

    def __init__(self):
        self.parent: dict[int, int] = {}
        self.found: list[NearPair] = []

    def root(self, position: int) -> int:
        while (above := self.parent.get(position, position)) != position:
            self.parent[position] = self.parent.get(above, above)
            position = above
        return position

    def joined(self, one: int, other: int) -> bool:
        return self.root(one) == self.root(other)

    def join(self, pair: NearPair) -> None:
        one, other = sorted((self.root(pair.one), self.root(pair.other)))
        self.parent[other] = one
        self.found.append(pair)

    def pairs(self) -> list[list[NearPair]]:
        groups: dict[int, list[NearPair]] = {}
        for pair in sorted(self.found, key=lambda pair: (pair.one, pair.other)):
            groups.setdefault(self.root(pair.one), []).append(pair)
        return [groups[root] for root in sorted(groups)]


def _signatures(rows: Sequence[dict[str, Any]]) -> np.ndarray:
    """MinHash values of each row, (rows, BANDS * BAND_VALUES)."""
    from datasketch import MinHash

    values = np.empty((len(rows), BANDS * BAND_VALUES), dtype=np.uint32)
    # The shingles are hashes already.
    batches = (shingles(_compared_text(row)).tolist() for row in rows)
    found = MinHash.generator(batches, num_perm=BANDS * BAND_VALUES, hashfunc=int, scheme="affine32")
    for position, minhash in enumerate(found):
        values[position] = minhash.hashvalues
    return values


def _band_keys(signatures: np.ndarray) -> Iterator[np.ndarray]:
    """One number for the values of each band, (rows,) for each band."""
    factors = np.array([0x9E3779B97F4A7C15 + 2 * number for number in range(BAND_VALUES)], dtype=np.uint64)
    for band in range(BANDS):
        values = signatures[:, band * BAND_VALUES : (band + 1) * BAND_VALUES].astype(np.uint64)
        keys = np.zeros(len(values), dtype=np.uint64)
        for column, factor in zip(values.T, factors, strict=True):
            keys = (keys ^ column) * factor
            keys ^= keys >> np.uint64(31)
        yield keys
