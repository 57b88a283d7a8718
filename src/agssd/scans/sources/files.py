"""Which files of a folder are scans, which are scans we refuse, and which are no scans at all."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

READABLE = (".nii", ".nii.gz", ".img", ".img.gz", ".nrrd", ".nhdr", ".mha", ".mhd")
PICTURES = (".png", ".jpg", ".jpeg", ".bmp")  # scans only where frames are asked for
REFUSED = {
    ".par": "Philips PAR/REC is not read; convert it to NIfTI",
    ".mgz": "FreeSurfer MGH is not read; convert it to NIfTI",
    ".mgh": "FreeSurfer MGH is not read; convert it to NIfTI",
    ".mnc": "MINC is not read; convert it to NIfTI",
    ".gipl": "GIPL is not read; convert it to NIfTI",
}


def suffix_of(path: Path) -> str:
    """Return the extension in lower case, ".nii.gz" and ".img.gz" as one."""
    name = path.name.lower()
    for double in (".nii.gz", ".img.gz", ".hdr.gz"):
        if name.endswith(double):
            return double
    return path.suffix.lower()


def stem_of(path: Path) -> str:
    """Return the file name without its extension and without ``.igs`` or nnU-Net's channel number.

    ``_0000`` is one; ``_0001`` to ``_0099`` are where the file of ``_0000`` lies beside, else they number cases.
    """
    suffix = suffix_of(path)
    stem = path.name[: len(path.name) - len(suffix)]
    head, _, tail = stem.rpartition("_")
    if not head or len(tail) != 4 or not tail.isdigit() or int(tail) >= 100:
        return stem
    first = path.with_name(f"{head}_0000{path.name[len(stem) :]}")
    return head if tail == "0000" or first.exists() else stem


def is_dicom(path: Path) -> bool:
    """Return whether a file is DICOM: by its extension, by the mark after its preamble, or by its first element.

    Without a preamble a file without extension counts where its first element is of group 2 or 8, as DICOM demands.
    """
    suffix = suffix_of(path)
    if suffix in (".dcm", ".ima", ".dicom"):
        return True
    start = _start(path)
    if start is None:
        return False
    bare = len(start) == 132 and start[:2] in (b"\x02\x00", b"\x08\x00") and start[3:4] == b"\x00"
    return start[128:] == b"DICM" or (bare and _is_bare(suffix))


def holds_dicom(path: Path) -> bool:
    """Return whether a path is to be read as DICOM: a folder, or a file of no other type."""
    return path.is_dir() or (suffix_of(path) not in READABLE and is_dicom(path))


def data_files(path: Path) -> list[Path]:
    """Return every file whose bytes make up a scan: itself, and its header or its detached data where it has one."""
    suffix = suffix_of(path)
    if suffix in (".img", ".img.gz"):
        base = path.name[: len(path.name) - len(suffix)]
        headers = [path.with_name(base + ending) for ending in (".hdr", ".hdr.gz", ".HDR")]
        return [header for header in headers if header.is_file()][:1] + [path]
    if suffix in (".mhd", ".nhdr"):
        detached = _detached(path)
        return [path] + ([detached] if detached is not None and detached.is_file() else [])
    return [path]


def lacks_data(path: Path) -> bool:
    """Return whether a text header (MetaImage, NRRD) names one data file beside it that is not there."""
    detached = _detached(path) if suffix_of(path) in (".mhd", ".nhdr") else None
    if detached is None or detached.name.startswith(("LOCAL", "LIST")) or "%" in detached.name:
        return False
    return not detached.is_file()


def _detached(path: Path) -> Path | None:
    """Return the data file that a text header names, or None."""
    try:
        lines = path.read_text(errors="replace")[:100_000].splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition("=" if suffix_of(path) == ".mhd" else ":")
        if name.strip().lower() in ("elementdatafile", "data file", "datafile"):
            return path.parent / value.strip()
    return None


class Listing(NamedTuple):
    """What a folder holds.

    Attributes:
        scans: files that ``read_scan`` may take, DICOM apart.
        dicom: DICOM files, and damaged files that may have been slices: empty, unreadable or without the marks of
            DICOM, but among DICOM files and named like them.
        refused: (path, reason) of files that are scans, but not read.
        ignored: number of files that are no scans.
    """

    scans: list[Path]
    dicom: list[Path]
    refused: list[tuple[Path, str]]
    ignored: int


def list_folder(folder: Path, frames: bool = False) -> Listing:
    """Search a folder for scans, in the order of their paths; hidden files and folders are passed over.

    Args:
        folder: searched recursively.
        frames: pictures are scans too.
    """
    readable = (*READABLE, *PICTURES) if frames else READABLE
    scans: list[Path] = []
    dicom: list[Path] = []
    others: list[Path] = []
    refused: list[tuple[Path, str]] = []
    ignored = 0

    def note(error: OSError) -> None:
        refused.append((Path(error.filename), f"this folder cannot be listed: {error.strerror}"))

    for root, folders, names in os.walk(folder, onerror=note, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not _leads_back(root, name))
        for name in sorted(names):
            path = Path(root) / name
            suffix = suffix_of(path)
            if name.startswith("."):
                continue
            if suffix in readable:
                scans.append(path)
            elif suffix in REFUSED:
                refused.append((path, REFUSED[suffix]))
            elif suffix in (".hdr", ".hdr.gz"):
                if not _has_data(path):
                    refused.append((path, "a NIfTI or Analyze header without its .img"))
            elif name.upper() == "DICOMDIR":  # an index of other files
                ignored += 1
            elif is_dicom(path):
                dicom.append(path)
            else:
                others.append(path)
    damaged = _damaged_slices(others, dicom)
    ignored += len(others) - len(damaged)
    return Listing(sorted(scans), sorted([*dicom, *damaged]), sorted(refused), ignored)


def _damaged_slices(others: list[Path], dicom: list[Path]) -> list[Path]:
    """Return the files that may have been slices of a series: named like DICOM files beside them, and no text."""
    suffixes: dict[Path, set[str]] = defaultdict(set)
    for path in dicom:
        suffixes[path.parent].add(suffix_of(path))
    beside = [path for path in others if path.parent in suffixes]
    return [
        path
        for path in beside
        if (_is_bare(suffix_of(path)) or suffix_of(path) in suffixes[path.parent]) and not _is_text(path)
    ]


def _is_bare(suffix: str) -> bool:
    """Return whether a suffix is none, or a number as at the end of a UID."""
    return not suffix.strip(".0123456789")


def _start(path: Path) -> bytes | None:
    """Return the first 132 bytes of a file, None where it cannot be read or is no regular file."""
    try:
        if not path.is_file():  # a pipe would wait for its writer
            return None
        with path.open("rb") as file:
            return file.read(132)
    except OSError:
        return None


def _is_text(path: Path) -> bool:
    """Return whether a file begins with text; an empty one, or one that cannot be read, does not."""
    start = _start(path)
    return bool(start) and all(byte >= 32 or byte in b"\t\n\f\r" for byte in start or b"")


def _leads_back(root: str, name: str) -> bool:
    """Return whether a subfolder is a link to a folder that it lies in."""
    place = os.path.join(root, name)
    return os.path.islink(place) and Path(os.path.realpath(root)).is_relative_to(os.path.realpath(place))


def _has_data(header: Path) -> bool:
    base = header.name[: len(header.name) - len(suffix_of(header))]
    return any((header.with_name(base + ending)).is_file() for ending in (".img", ".img.gz", ".IMG"))
