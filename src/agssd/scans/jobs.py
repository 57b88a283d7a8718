"""What is to be prepared: one job per case, and a plan of all jobs."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from agssd.scans.files import data_files

SPLITS = ("train", "val", "test")
_BIDS_SUBJECT = re.compile(r"(?:^|/)sub-([A-Za-z0-9]+)(?=[_/.]|$)")


@dataclass(frozen=True)
class Job:
    """One case to prepare.

    Attributes:
        paths: the file, or one file per channel.
        subject: the person, as the source names it.
        label: file of the label map.
        modality: "ct", "mri", or None to decide from the file.
        class_name: class of the case.
        split: "train", "val" or "test" where the source says so.
    """

    paths: tuple[Path, ...]
    subject: str
    label: Path | None = None
    modality: str | None = None
    class_name: str | None = None
    split: str | None = None

    def files(self) -> list[Path]:
        """Return every file whose bytes the case depends on."""
        return [file for path in (*self.paths, *([self.label] if self.label else [])) for file in data_files(path)]


@dataclass
class Plan:
    """What the sources hold.

    Attributes:
        jobs: cases to prepare, in the order of the sources.
        refused: (path, reason) of files that are not even tried.
        ignored: number of files that are no scans.
        notes: what the user should know of how the sources were understood.
    """

    jobs: list[Job] = field(default_factory=list)
    refused: list[tuple[Path, str]] = field(default_factory=list)
    ignored: int = 0
    notes: list[str] = field(default_factory=list)


def subject_of(relative: str, default: str, pattern: re.Pattern[str] | None) -> str | None:
    """Return the subject by the user's expression, else by a BIDS name, else the default."""
    match = (pattern or _BIDS_SUBJECT).search(relative)
    if match is None:
        return default if pattern is None else None
    return (match.group(1) if match.re.groups else match.group(0)) or None
