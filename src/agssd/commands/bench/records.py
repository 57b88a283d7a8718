"""What a run of a bench leaves when it is done: a row, beside the mark of what it was made with."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from agssd import __version__
from agssd.commands.bench.settings import Bench
from agssd.run.directory import describe_host
from agssd.whole_file import TEMPORARY, whole_file

ROW = "row.json"
LOCK = "lock"  # held while a process works on the run
BEGUN = "mark.txt"  # the mark of work that has begun, so that other settings do not go on with it
SPENT = "seconds.txt"  # that attempts before took; one that was killed could not say


@dataclass(frozen=True)
class Job:
    """What every run of a bench is given.

    Args:
        bench: the settings.
        cache: labelled cache.
        commit: of the source when the bench began; see ``commit``.
    """

    bench: Bench
    cache: str
    commit: str


class Recorded(Protocol):
    """What has a folder for its row, and a mark."""

    @property
    def folder(self) -> Path:
        """Where the row lies."""

    @property
    def mark(self) -> str:
        """Of its settings and data."""


def state_of(one: Recorded) -> Literal["missing", "done", "other"]:
    """Return whether there is no row, one of these settings, or one of others, or work on one that has begun."""
    row = kept_row(one)
    if row is None:
        return "missing" if _may_begin(one) else "other"
    return "done" if row.get("mark") == one.mark else "other"


def is_done(one: Recorded) -> bool:
    """Return whether there is a row of these settings."""
    return state_of(one) == "done"


def kept_row(one: Recorded) -> dict[str, Any] | None:
    """Return the row of a run, or None; whether it is of these settings is for ``state_of``.

    Raises:
        ValueError: if it cannot be read.
    """
    path = one.folder / ROW
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} holds no row ({error}); remove {one.folder} to have it made again") from error


def once(one: Recorded, job: Job, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the row of a run, after doing the work if there is none.

    The row says besides what ``work`` returns how long it took, with attempts that were interrupted or failed but not
    those that were killed, when and where it was made, by which commit, and its mark.

    Raises:
        ValueError: if there is one of other settings, another process is at it, or the work fails.
    """
    row = _known(one)
    if row is not None:
        return row
    with _alone(one.folder):
        row = _known(one)  # another process may have made it meanwhile
        return row if row is not None else _made(one, job, work)


def _known(one: Recorded) -> dict[str, Any] | None:
    row = kept_row(one)
    if row is not None and row.get("mark") != one.mark:
        raise ValueError(OTHER.format(one.folder))
    return row


def _made(one: Recorded, job: Job, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    _begin(one)
    path = one.folder / SPENT
    before = float(path.read_text(encoding="utf-8")) if path.is_file() else 0.0
    started = time.perf_counter()
    try:
        found = work()
    except BaseException:
        with whole_file(path) as temporary:
            temporary.write_text(str(before + time.perf_counter() - started), encoding="utf-8")
        raise
    row = {
        **found,
        "seconds": before + time.perf_counter() - started,
        "commit": job.commit,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": _machine(),
        "mark": one.mark,
    }
    with whole_file(one.folder / ROW) as temporary:
        temporary.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    path.unlink(missing_ok=True)
    return row


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes from a run while this one, or a worker that it has forked, lives.

    Raises:
        ValueError: if one is at it. Where the file system keeps no locks nobody is kept out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ValueError(f"another process works on {folder}; give the same command again when it has ended") from None
    except OSError:
        pass
    try:
        yield
        (folder / LOCK).unlink(missing_ok=True)  # whoever has it open already finds the row
    finally:
        os.close(handle)


OTHER = (
    "{} was made with other settings: its command, a YAML file that the command leads to, its pretraining or the cases "
    "of the cache differ; give another --out, or remove it to have it made again"
)


def _may_begin(one: Recorded) -> bool:
    """Return whether work may begin or go on: nothing is there, or what was begun with the same mark."""
    path = one.folder / BEGUN
    if path.is_file():
        return path.read_text(encoding="utf-8") == one.mark
    if not one.folder.is_dir():
        return True
    return all(name == LOCK or name.endswith(TEMPORARY) for name in os.listdir(one.folder))


def _begin(one: Recorded) -> None:
    """Note the mark of work that begins; refuse to go on with what was begun with another or none."""
    if not _may_begin(one):
        raise ValueError(OTHER.format(one.folder))
    with whole_file(one.folder / BEGUN) as temporary:
        temporary.write_text(one.mark, encoding="utf-8")


def commit() -> str:
    """Return the commit of the source, with a plus if files differ from it; outside a repository the version."""
    git = ["git", "-C", str(Path(__file__).parent)]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
        return head.strip() + ("+" if changed.stdout.strip() else "")
    return f"agssd {__version__}"


def _machine() -> str:
    import torch

    host = describe_host()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"{host['processor']}, {host['processors']} usable, {host['memory_gib']} GiB; {device}; torch {host['torch']}"
    )
