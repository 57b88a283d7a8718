"""Salted keys: equal for equal salts, and the salt beside the source."""

from __future__ import annotations

import multiprocessing
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from agssd.scans.keys import SALT_NAME, case_key, open_salt, salt_fingerprint, salt_place, subject_key


def test_keys__depend_on_salt_and_content_alone() -> None:
    assert subject_key(b"a", "Doe^Jane") == subject_key(b"a", "Doe^Jane")
    assert len({subject_key(b"a", "1"), subject_key(b"b", "1"), subject_key(b"a", "2"), case_key(b"a", "1", "f")}) == 4
    assert len(subject_key(b"a", "1")) == 16 and "1" != subject_key(b"a", "1")


def test_salt__is_made_once_beside_the_source(tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    (tmp_path / "out").mkdir()
    path = salt_place(tmp_path / "scans", tmp_path / "out" / "c.h5")
    assert path == tmp_path / "scans" / SALT_NAME and not path.exists()
    salt, created = open_salt(path)
    assert created and len(salt) == 64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert open_salt(path) == (salt, False)
    assert salt_place(tmp_path / "scans" / "a.nii", tmp_path / "c.h5") == path


def test_salt__read_only_source_puts_it_beside_the_cache(tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    (tmp_path / "out").mkdir()
    os.chmod(tmp_path / "scans", 0o555)
    path = salt_place(tmp_path / "scans", tmp_path / "out" / "c.h5")
    assert path == tmp_path / "out" / SALT_NAME and open_salt(path)[1]
    os.chmod(tmp_path / "scans", 0o755)
    assert salt_place(tmp_path / "scans", tmp_path / "out" / "d.h5") == path  # what is there already wins


def test_salt__named_file_wins_and_must_not_be_empty(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("pepper\n")
    assert salt_place(tmp_path, tmp_path / "c.h5", mine) == mine and open_salt(mine) == (b"pepper", False)
    mine.write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        open_salt(mine)
    with pytest.raises(ValueError, match="cannot write the salt file"):
        salt_place(tmp_path, tmp_path / "c.h5", tmp_path / "none" / "salt")


def test_salt_fingerprint__tells_salts_apart_and_is_no_key() -> None:
    salts = [bytes([row]) * 64 for row in range(50)]
    prints = [salt_fingerprint(salt) for salt in salts]
    assert prints == [salt_fingerprint(salt) for salt in salts] and len(set(prints)) == 50
    assert all(len(text) == 16 and int(text, 16) >= 0 for text in prints)
    keys = {subject_key(salt, name) for salt in salts for name in ("", "fingerprint of the salt", "1")}
    assert not keys & set(prints)


def _open(path: Path, queue: Any) -> None:
    queue.put(open_salt(path)[0])


def test_open_salt__builds_that_start_together_have_one_salt(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for turn in range(10):
        queue = context.Queue()
        children = [context.Process(target=_open, args=(tmp_path / f"salt{turn}", queue)) for _ in range(4)]
        for child in children:
            child.start()
        assert len({queue.get(timeout=30) for _ in children}) == 1
        for child in children:
            child.join()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"salt{turn}" for turn in range(10))


def test_open_salt__that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="No space left on device; name another with --salt"):
        open_salt(tmp_path / "salt")
    assert list(tmp_path.iterdir()) == []
