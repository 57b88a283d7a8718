"""Salted keys: equal for equal salts, and the salt beside the source."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from agssd.scans.keys import SALT_NAME, case_key, find_salt, subject_key


def test_keys__depend_on_salt_and_content_alone() -> None:
    assert subject_key(b"a", "Doe^Jane") == subject_key(b"a", "Doe^Jane")
    assert len({subject_key(b"a", "1"), subject_key(b"b", "1"), subject_key(b"a", "2"), case_key(b"a", "1", "f")}) == 4
    assert len(subject_key(b"a", "1")) == 16 and "1" != subject_key(b"a", "1")


def test_find_salt__is_made_once_beside_the_source(tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    (tmp_path / "out").mkdir()
    salt, path, created = find_salt(tmp_path / "scans", tmp_path / "out" / "c.h5")
    assert created and path == tmp_path / "scans" / SALT_NAME and len(salt) == 64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert find_salt(tmp_path / "scans", tmp_path / "c.h5") == (salt, path, False)
    assert find_salt(tmp_path / "scans" / "a.nii", tmp_path / "c.h5") == (salt, path, False)


def test_find_salt__read_only_source_puts_it_beside_the_cache(tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    (tmp_path / "out").mkdir()
    os.chmod(tmp_path / "scans", 0o555)
    salt, path, created = find_salt(tmp_path / "scans", tmp_path / "out" / "c.h5")
    assert created and path == tmp_path / "out" / SALT_NAME
    assert find_salt(tmp_path / "scans", tmp_path / "out" / "d.h5")[0] == salt


def test_find_salt__named_file_wins_and_must_not_be_empty(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("pepper\n")
    assert find_salt(tmp_path, tmp_path / "c.h5", tmp_path / "mine") == (b"pepper", tmp_path / "mine", False)
    (tmp_path / "mine").write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        find_salt(tmp_path, tmp_path / "c.h5", tmp_path / "mine")
    with pytest.raises(ValueError, match="cannot write the salt file"):
        find_salt(tmp_path, tmp_path / "c.h5", tmp_path / "none" / "salt")
