"""The folder behind a key: made once, taken when it is complete, never seen half made (keys: test_sf_21)."""

from functools import partial
from pathlib import Path

from medicalgpt.data import cache
from medicalgpt.data.cache import UncacheableError, load_or_make, token_key
from medicalgpt.data.encoding import encode_document
from medicalgpt.data.rows import Rows
from tests.tiny import tiny_tokenizer

import datasets
import pytest

ROWS = Rows([{"text": "a"}])


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Get the content of `key`, made with `text` where there is none; `made.folder` is where entries are."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)

    def made(key: str | None, text: str, **options) -> str:
        def make(folder: Path) -> None:
            (folder / "text").write_text(text, encoding="utf-8")

        return load_or_make(key, make, lambda folder: (folder / "text").read_text(encoding="utf-8"), **options)

    made.folder = tmp_path / "medicalgpt-tokens"
    return made


def test_an_entry_is_made_once_for_its_key(made):
    assert [made("a", "one"), made("a", "two"), made("b", "three"), made("a", "four")] == ["one", "one", "three", "one"]
    assert sorted(path.name for path in made.folder.iterdir() if path.is_dir()) == ["a", "b"]


def test_without_a_key_nothing_is_kept(made):
    assert [made(None, "one"), made(None, "two")] == ["one", "two"]
    assert not made.folder.exists()


def test_renewing_replaces_an_entry_of_another_launch(made, monkeypatch):
    assert made("a", "one") == "one"
    assert made("a", "two", renew=True) == "one", "it was made by this launch, so that it is new"
    monkeypatch.setattr(cache, "ALONE", "another launch")
    assert [made("a", "three"), made("a", "four", renew=True), made("a", "five")] == ["one", "four", "four"]


@pytest.mark.parametrize("damage", ["other text", ""])
def test_a_damaged_entry_is_not_taken(made, damage):
    made("a", "one")
    (made.folder / "a" / "text").write_text(damage, encoding="utf-8")
    assert [made("a", "two"), made("a", "three")] == ["two", "two"]


def test_what_fails_while_it_is_made_is_no_entry(made):
    def fail(folder: Path) -> None:
        (folder / "text").write_text("half", encoding="utf-8")
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        load_or_make("a", fail, lambda folder: None)
    assert [path.name for path in made.folder.iterdir()] == ["a.lock"]
    assert made("a", "one") == "one"


def test_processes_of_one_launcher_have_one_name_for_it(monkeypatch):
    alone = cache._launch()
    for name, value in {"LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "x"}.items():
        monkeypatch.setenv(name, value)
    together = cache._launch()
    monkeypatch.setenv("RANK", "1")
    assert cache._launch() == together != alone
    monkeypatch.setenv("MASTER_PORT", "29501")
    assert cache._launch() != together


def test_a_key_follows_from_rows_function_and_arguments():
    tokenizer = tiny_tokenizer()
    key = token_key(ROWS, partial(encode_document, tokenizer, block_size=8))
    assert key == token_key(ROWS, partial(encode_document, tiny_tokenizer(), block_size=8)) and len(key) == 32
    assert key != token_key(ROWS, partial(encode_document, tokenizer, block_size=9))
    assert key != token_key(Rows([{"text": "b"}]), partial(encode_document, tokenizer, block_size=8))
    with pytest.raises(UncacheableError, match="not a function of a module"):
        token_key(ROWS, partial(lambda tokenizer, row: [], tokenizer))
