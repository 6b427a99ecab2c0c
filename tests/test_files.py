"""Files are hashed as they are, and replaced in one step or not at all."""

import hashlib
import os
import stat
from pathlib import Path

from medicalgpt.files import hash_file, write_atomically

import pytest


def test_a_hash_is_that_of_the_bytes(tmp_path):
    content = os.urandom(300_000)
    (tmp_path / "a").write_bytes(content)
    assert hash_file(tmp_path / "a") == hash_file(str(tmp_path / "a")) == hashlib.sha256(content).hexdigest()


def test_a_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_atomically(path, "感冒")
    assert path.read_text(encoding="utf-8") == "感冒"
    seen, replace = [], Path.replace

    def watched(self, target):
        seen.append((target.read_bytes(), self.read_bytes(), self.suffix))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    write_atomically(path, b"new")
    assert seen == [("感冒".encode(), b"new", ".partial")]
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["a.json"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("old", encoding="utf-8")
    monkeypatch.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(OSError("no room")))
    with pytest.raises(OSError, match="no room"):
        write_atomically(path, "new")
    assert path.read_text(encoding="utf-8") == "old" and os.listdir(tmp_path) == ["a.json"]


def test_permissions_are_those_of_any_file_or_fewer(tmp_path):
    (tmp_path / "plain").write_text("", encoding="utf-8")
    write_atomically(tmp_path / "a", "")
    write_atomically(tmp_path / "b", "", mode=0o600)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "a", "b")]
    assert modes[0] == modes[1] and modes[2] == 0o600
