"""What a run of a bench leaves when it is done: a row, beside the mark of what it was made with."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from agssd import __version__
from agssd.commands.bench.settings import Bench
from agssd.run.directory import describe_host
from agssd.whole_file import whole_file

ROW = "row.json"
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
    """Return whether there is no row, one of these settings, or one of others."""
    row = kept_row(one)
    return "missing" if row is None else "done" if row.get("mark") == one.mark else "other"


def is_done(one: Recorded) -> bool:
    """Return whether there is a row of these settings."""
    return state_of(one) == "done"


def kept_row(one: Recorded) -> dict[str, Any] | None:
    """Return the row of a run, or None; whether it is of these settings is for ``state_of``."""
    path = one.folder / ROW
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def once(one: Recorded, job: Job, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the row of a run, after doing the work if there is none.

    The row says besides what ``work`` returns how long it took, with attempts that were interrupted or failed but not
    those that were killed, when and where it was made, by which commit, and its mark.

    Raises:
        ValueError: if there is one of other settings, or the work fails.
    """
    row = kept_row(one)
    if row is not None:
        if row.get("mark") != one.mark:
            raise ValueError(_OTHER.format(one.folder))
        return row
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


_OTHER = (
    "{} was made with other settings: its command, a YAML file that the command leads to, its pretraining or the cases "
    "of the cache differ; give another --out, or remove it to have it made again"
)


def _begin(one: Recorded) -> None:
    """Note the mark of work that begins; refuse to go on with what was begun with another or none."""
    path = one.folder / BEGUN
    begun = path.read_text(encoding="utf-8") if path.is_file() else ""
    if begun != one.mark and one.folder.is_dir() and any(one.folder.iterdir()):
        raise ValueError(_OTHER.format(one.folder))
    with whole_file(path) as temporary:
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
