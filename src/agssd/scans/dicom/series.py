"""Which DICOM files make up a scan: series by their UID, and a reason for every series that is no scan.

What one file is stands in ``headers.py``, how slices become a volume in ``volume.py``.
"""

from __future__ import annotations

import filecmp
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from agssd.scans.case import RefusedError
from agssd.scans.dicom.headers import Header, read_header
from agssd.scans.progress import progress
from agssd.scans.sources.files import is_dicom, list_folder

_SHOWN = 3  # file names in a reason
_REPEATED = "files repeat an image of the series byte for byte and are left out"
_FORMS = "other files of its folder hold the same image, by its UID, in other bytes; each is taken by itself"
_SHORT = "of its series or folder could not be used; the volume may be short of slices"


@dataclass(frozen=True)
class Series:
    """Files that are one scan, or several volumes of one.

    Attributes:
        files: in the order of their paths.
        place: the folder where it holds no other DICOM file, else the first file.
        modality: "ct" or "mri", as the header says; PET asked for is "mri".
        patient: PatientID, "" where there is none.
        study: StudyInstanceUID, "" where there is none.
        pet: whether it is PET.
        notes: what the user should know of its files.
    """

    files: tuple[Path, ...]
    place: Path
    modality: str
    patient: str
    study: str
    pet: bool = False
    notes: tuple[str, ...] = ()

    @property
    def subject(self) -> str:
        """Return the person: the PatientID, else the study, else the first file."""
        return self.patient or self.study or str(self.files[0])


def find_series(files: Iterable[Path], pet: bool = False) -> tuple[list[Series], list[tuple[Path, str]]]:
    """Return the series of CT and MR among DICOM files, and (place, reason) of everything else.

    The files of a SeriesInstanceUID belong together wherever they lie. Only where several folders hold the same images
    each folder counts as a copy of its own; of other repeated images one file is taken if all are equal byte for byte,
    else the series is refused. Without the UID the files of one folder and SeriesNumber belong together.
    Files of a series that can be no part of a scan, as its localiser, are refused apart from the others. Where files
    of the series, or files of its folder that name no series, may be slices that cannot be used, it gets a note.

    Args:
        files: DICOM files, in any order.
        pet: take PET too.
    """
    groups: dict[str, list[Header]] = defaultdict(list)
    refused: list[tuple[Path, str]] = []
    ordered = sorted(files)
    # the bar appears only where headers take more than a few seconds
    with progress(len(ordered), "file", "DICOM headers", delay=5, leave=False) as bar:
        for file in ordered:
            header = read_header(file, pet)
            if header is not None:
                groups[header.series].append(header)
            bar.update()
    parts = [part for headers in groups.values() for part in _copies(headers)]
    count: dict[Path, int] = defaultdict(int)
    lost: dict[Path, list[Header]] = defaultdict(list)
    for header in (header for headers in groups.values() for header in headers):
        if header.lost:
            lost[header.file.parent].append(header)
        if header.uid or not header.lost:
            count[header.file.parent] += 1
    found = []
    for headers in parts:
        by_reason: dict[str | None, list[Header]] = defaultdict(list)
        for header in headers:
            by_reason[header.reason].append(header)
        for given, alike in by_reason.items():
            for members, reason, notes in _apart(alike) if given is None else [(alike, given, ())]:
                names = tuple(header.file for header in members)
                folders = {header.file.parent for header in alike}
                whole = len(names) > 1 and len(folders) == 1 and count[names[0].parent] == len(alike)
                place = names[0].parent if whole else names[0]
                if reason is not None:
                    refused.append((place, series_reason(names, reason)))
                    continue
                first = members[0]
                kind = "mri" if first.modality == "pet" else first.modality
                short = {header.file for header in headers if header.lost}
                for header in (header for folder in folders for header in lost[folder]):
                    if first.uid.startswith(header.uid):  # also where it is cut off, or not there
                        short.add(header.file)
                if short:
                    notes = (*notes, f"{len(short)} files {_SHORT}")
                found.append(Series(names, place, kind, first.patient, first.study, first.modality == "pet", notes))
    return sorted(found, key=lambda series: series.files), sorted(refused)


def series_at(path: Path, pet: bool = False) -> Series:
    """Return the one series of a folder, searched recursively, or of a file.

    Raises:
        RefusedError: there is none or more than one; the message is the reason.
    """
    files = list_folder(path).dicom if path.is_dir() else [path] if is_dicom(path) else []
    found, refused = find_series(files, pet)
    if len(found) == 1:
        return found[0]
    if len(found) > 1:
        raise RefusedError(f"a folder of {len(found)} DICOM series; name one, or give the folder as SOURCE")
    if refused:
        raise RefusedError(refused[0][1])
    raise RefusedError("a folder without DICOM files" if path.is_dir() else "no DICOM image")


def series_reason(files: Sequence[Path], reason: str) -> str:
    """Return a reason that says how many files it is about."""
    return f"DICOM file: {reason}" if len(files) == 1 else f"series of {len(files)} DICOM files: {reason}"


def _copies(headers: list[Header]) -> list[list[Header]]:
    """Return the files of one series, by folder where every folder holds the same images."""
    by_folder: dict[Path, list[Header]] = defaultdict(list)
    for header in headers:
        by_folder[header.file.parent].append(header)
    held = [{header.instance for header in alike} for alike in by_folder.values()]
    return list(by_folder.values()) if all(images == held[0] for images in held) else [headers]


def _apart(headers: list[Header]) -> list[tuple[list[Header], str | None, tuple[str, ...]]]:
    """Return (files, reason, notes) of what the usable files of a series are, once repeated images are dealt with.

    Repeats that are equal byte for byte are left out. Others are refused, except where all files are one image at one
    place in several forms: then each stands by itself.
    """
    kept: dict[str, Header] = {}
    others: list[Header] = []
    equal = 0
    for header in headers:
        first = kept.setdefault(header.instance, header)
        if first is not header:
            if _same_bytes(first.file, header.file):
                equal += 1
            else:
                others.append(header)
    notes = (f"{equal} {_REPEATED}",) if equal else ()
    members = list(kept.values())
    patients = {header.patient for header in headers if header.patient}
    if len(patients) > 1 and not others:
        return [(headers, f"{len(patients)} patients in one series, by their PatientID", ())]
    modalities = sorted({header.modality for header in headers})
    if len(modalities) > 1 and not others:
        return [(headers, f"{len(modalities)} modalities in one series: {', '.join(modalities)}", ())]
    if not others:
        return [(members, None, notes)]
    if len(members) == 1 and len({header.position for header in headers}) == 1:
        return [([header], None, (*notes, _FORMS)) for header in (*members, *others)]
    over = len({header.file.parent for header in headers}) > 1
    shown = [
        f"{header.file.parent.name}/{header.file.name}" if over else header.file.name for header in others[:_SHOWN]
    ]
    more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
    reason = f"duplicate slices: {len(others)} files repeat an image of the series in other bytes"
    reason += f" ({', '.join(shown)}{more}); leave one file of each"
    return [(headers, reason, ())]


def _same_bytes(one: Path, two: Path) -> bool:
    try:
        return filecmp.cmp(one, two, shallow=False)
    except OSError:
        return False
