"""Salted keys: names of subjects and cases that cannot be read back without the salt."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from pathlib import Path

SALT_NAME = ".agssd-salt"


def salt_place(source: Path, out: Path, given: Path | None = None) -> Path:
    """Return where the salt lies, or where it is to be made; nothing is written.

    The salt lies beside the source, never in the cache: in the folder itself, or in the folder of a file. Where that
    folder is read-only it lies in the folder of the cache; keep it out of what you share. The same salt and the same
    names give the same keys, so give one ``--salt`` to caches whose subjects must be comparable.

    Args:
        source: the first source, a file or a folder.
        out: the cache.
        given: a salt file chosen by the user, or None.

    Raises:
        ValueError: the folder of ``given`` does not exist.
    """
    if given is not None:
        if not given.parent.is_dir():
            raise ValueError(f"cannot write the salt file {given}: its folder does not exist; name another with --salt")
        return given
    beside = source if source.is_dir() else source.parent
    for path in (beside / SALT_NAME, out.parent / SALT_NAME):
        if path.is_file():
            return path
    return (beside if _writable(beside) else out.parent) / SALT_NAME


def open_salt(path: Path) -> tuple[bytes, bool]:
    """Return the salt of a file and whether the file was made now.

    Raises:
        ValueError: the file is empty or cannot be read or written.
    """
    if path.is_file():
        return _read(path), False
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(6)}")
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(secrets.token_hex(32) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)  # whole or not at all, and of two builds that start together the first one's
    except FileExistsError:
        return _read(path), False
    except OSError as error:
        raise ValueError(f"cannot write the salt file {path}: {error.strerror}; name another with --salt") from error
    finally:
        temporary.unlink(missing_ok=True)
    return _read(path), True


def salt_fingerprint(salt: bytes) -> str:
    """Return 16 hexadecimal digits that tell salts apart.

    Neither the salt nor a key can be computed from them; a short salt of one's own choosing could be guessed, though.
    """
    return _digest(salt, "fingerprint of the salt")


def subject_key(salt: bytes, subject: str) -> str:
    """Return the key of a subject, 16 hexadecimal digits."""
    return _digest(salt, "subject", subject)


def case_key(salt: bytes, subject: str, source_sha256: str) -> str:
    """Return the key of a case, 16 hexadecimal digits; it follows the content, not the name, of the file."""
    return _digest(salt, "case", subject, source_sha256)


def _digest(salt: bytes, *parts: str) -> str:
    return hmac.new(salt, "\0".join(parts).encode(), hashlib.sha256).hexdigest()[:16]


def _read(path: Path) -> bytes:
    try:
        salt = path.read_bytes().strip()
    except OSError as error:
        raise ValueError(f"cannot read the salt file {path}: {error.strerror}") from error
    if not salt:
        raise ValueError(f"the salt file {path} is empty; delete it or name another with --salt")
    return salt


def _writable(folder: Path) -> bool:
    """A folder without any write bit was made read-only on purpose; the superuser respects that too."""
    return os.access(folder, os.W_OK | os.X_OK) and bool(
        folder.stat().st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH)
    )
