"""Rows on disk: they come out as they went in, in any selection and in any process, and leave nothing behind."""

import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from medicalgpt.data.rows import Rows, on_disk
from medicalgpt.errors import UserError

import numpy as np
import pytest

ROWS = [{"messages": [{"role": "user", "content": f"感冒 {n}"}], "tools": None, "n": [n, 1.5, True]} for n in range(9)]


def test_rows_come_out_as_they_went_in():
    kept = Rows(iter(ROWS))
    assert list(kept) == ROWS and len(kept) == 9 and bool(kept) and not Rows()
    assert (kept[0], kept[-1]) == (ROWS[0], ROWS[8])
    with pytest.raises(IndexError):
        kept[9]


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        (slice(2, 7, 2), ROWS[2:7:2]),
        (slice(None, None, -1), ROWS[::-1]),
        (np.array([3, 0, 3]), [ROWS[3], ROWS[0], ROWS[3]]),
        (np.arange(9) > 6, ROWS[7:]),
        (np.zeros(9, dtype=bool), []),
    ],
)
def test_a_selection_outlives_what_it_was_taken_from(index, expected):
    chosen = Rows(ROWS).select(index)
    assert list(chosen) == expected and len(chosen) == len(expected)
    assert list(chosen[1:]) == expected[1:]


def test_the_digest_tells_content_and_order():
    digest = Rows(ROWS).digest()
    assert digest == Rows(ROWS).digest() == Rows([{}, *ROWS])[1:].digest() and len(digest) == 64
    others = [ROWS[::-1], ROWS[1:], [*ROWS, {}], [{**ROWS[0], "n": [0, 1.5, False]}, *ROWS[1:]]]
    assert len({digest, *(Rows(rows).digest() for rows in others)}) == 5
    assert Rows([{"a": "b"}, {}]).digest() != Rows([{}, {"a": "b"}]).digest()


def test_rows_on_disk_are_not_copied():
    kept = Rows(ROWS)
    assert on_disk(kept) is kept
    assert list(on_disk(ROWS)) == ROWS


def test_forked_processes_read_at_the_same_time():
    """They share the position of the file, which must not matter."""
    rows = Rows({"n": n, "text": "x" * (n % 97)} for n in range(400))
    with ProcessPoolExecutor(4, get_context("fork"), _keep, (rows,)) as pool:
        for start, found in enumerate(pool.map(_read_every_fourth, range(4))):
            assert found == [{"n": n, "text": "x" * (n % 97)} for n in range(start, 400, 4)] * 20


_rows: Rows | None = None


def _keep(rows: Rows) -> None:
    global _rows
    _rows = rows


def _read_every_fourth(start: int) -> list[dict]:
    return [_rows[number] for _ in range(20) for number in range(start, len(_rows), 4)]


def test_nothing_is_left_in_the_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    rows = Rows(ROWS)
    assert os.listdir(tmp_path) == [] and list(rows) == ROWS


def test_a_disk_without_room_is_named(monkeypatch):
    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr(tempfile, "TemporaryFile", lambda **options: full)
        with pytest.raises(UserError, match="set TMPDIR"):
            Rows([{"text": "x"}])
