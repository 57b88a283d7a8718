"""What is to be prepared: one job per case, and a plan of all jobs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from agssd.scans.case import RefusedError
from agssd.scans.dicom.headers import read_attributes
from agssd.scans.dicom.series import Series, find_series
from agssd.scans.sources.files import data_files

SPLITS = ("train", "val", "test")
_BIDS_SUBJECT = re.compile(r"(?:^|/)sub-([A-Za-z0-9]+)(?=[_/.]|$)")


@dataclass(frozen=True)
class Job:
    """One case to prepare.

    Attributes:
        paths: the file, or one file per channel; of a DICOM series its folder, or its first file.
        subject: the person, as the source names it.
        label: file of the label map.
        modality: "ct", "mri", "us" for frames, or None to decide from the file.
        class_name: class of the case.
        split: "train", "val" or "test" where the source says so.
        series: the DICOM series, or None.
        volume: which volume, from 0, where the file or series holds several.
    """

    paths: tuple[Path, ...]
    subject: str
    label: Path | None = None
    modality: str | None = None
    class_name: str | None = None
    split: str | None = None
    series: Series | None = None
    volume: int | None = None

    def files(self) -> list[Path]:
        """Return every file whose bytes the case depends on."""
        label = [self.label] if self.label else []
        if self.series is not None:
            return [*self.series.files, *(file for path in label for file in data_files(path))]
        return [file for path in (*self.paths, *label) for file in data_files(path)]


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


def add_series(plan: Plan, files: Sequence[Path], root: Path, pattern: re.Pattern[str] | None, pet: bool) -> list[Job]:
    """Return a job for every DICOM series among files, and note in the plan what is refused.

    The subject is what the expression finds in the relative path of the first file, else the PatientID.
    """
    found, refused = find_series(files, pet)
    plan.refused += refused
    jobs = []
    for series in found:
        relative = series.files[0].relative_to(root).as_posix()
        subject = series.subject if pattern is None else subject_of(relative, "", pattern)
        if subject:
            jobs.append(Job((series.place,), subject, series=series))
        else:
            plan.refused.append((series.place, "its path does not match --subject"))
    if pattern is None and found:
        plan.notes += _about_patients(root, found)
    return jobs


def add_cines(plan: Plan, files: Sequence[Path], root: Path, pattern: re.Pattern[str] | None) -> list[Job]:
    """Return a job for every DICOM file of ultrasound, and note in the plan what is refused.

    The subject is what the expression finds in the relative path, else the PatientID, else the study, else the file.
    """
    jobs = []
    for file in sorted(files):
        try:
            data = read_attributes(file, ["PatientID", "StudyInstanceUID"])
        except RefusedError as error:
            plan.refused.append((file, str(error)))
            continue
        default = str(data.get("PatientID") or data.get("StudyInstanceUID") or file).strip()
        subject = default if pattern is None else subject_of(file.relative_to(root).as_posix(), "", pattern)
        if subject:
            jobs.append(Job((file,), subject, modality="us"))
        else:
            plan.refused.append((file, "its path does not match --subject"))
    return jobs


def _about_patients(root: Path, found: Sequence[Series]) -> list[str]:
    """Return what should be known of subjects taken from headers: none named, or one for many studies."""
    notes = []
    unnamed = sum(not series.patient for series in found)
    if unnamed:
        notes.append(
            f"{root}: {unnamed} DICOM series name no PatientID; each study, or else series, is taken for a subject; "
            "use --subject REGEX if a person has several"
        )
    patients = {series.patient for series in found if series.patient}
    studies = {series.study for series in found if series.patient}
    if len(patients) == 1 and len(studies) >= 3:
        notes.append(
            f"{root}: {len(studies)} DICOM studies have one PatientID and count as one subject; use --subject REGEX if "
            "it is a placeholder"
        )
    return notes
