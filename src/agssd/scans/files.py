"""Which files of a folder are scans, which are scans we refuse, and which are no scans at all."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

READABLE = (".nii", ".nii.gz", ".img", ".img.gz", ".nrrd", ".nhdr", ".mha", ".mhd")
REFUSED = {
    ".par": "Philips PAR/REC is not read; convert it to NIfTI",
    ".mgz": "FreeSurfer MGH is not read; convert it to NIfTI",
    ".mgh": "FreeSurfer MGH is not read; convert it to NIfTI",
    ".mnc": "MINC is not read; convert it to NIfTI",
    ".gipl": "GIPL is not read; convert it to NIfTI",
}
DICOM_REASON = "DICOM series come in a later version; convert to NIfTI"


def suffix_of(path: Path) -> str:
    """Return the extension in lower case, ".nii.gz" and ".img.gz" as one."""
    name = path.name.lower()
    for double in (".nii.gz", ".img.gz", ".hdr.gz"):
        if name.endswith(double):
            return double
    return path.suffix.lower()


def stem_of(path: Path) -> str:
    """Return the file name without its extension and without ``.igs`` or nnU-Net's channel number ``_0000``."""
    stem = path.name[: len(path.name) - len(suffix_of(path))]
    head, _, tail = stem.rpartition("_")
    return head if head and len(tail) == 4 and tail.isdigit() and int(tail) < 100 else stem


def is_dicom(path: Path) -> bool:
    """Return whether a file is DICOM, by its extension or by the mark after its preamble."""
    if suffix_of(path) in (".dcm", ".ima", ".dicom"):
        return True
    if path.name.upper() == "DICOMDIR":
        return True
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


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


def list_folder(folder: Path) -> tuple[list[Path], list[tuple[Path, str]], int]:
    """Search a folder for scans, in the order of their paths; hidden files and folders are passed over.

    Returns:
        The files that ``read_scan`` may take; the refused ones with their reasons, a folder of DICOM files as one;
        and the number of files that are no scans.
    """
    scans: list[Path] = []
    refused: list[tuple[Path, str]] = []
    dicom: dict[Path, list[Path]] = defaultdict(list)
    ignored = 0
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(root) / name
            suffix = suffix_of(path)
            if name.startswith("."):
                continue
            if suffix in READABLE:
                scans.append(path)
            elif suffix in REFUSED:
                refused.append((path, REFUSED[suffix]))
            elif suffix in (".hdr", ".hdr.gz"):
                if not _has_data(path):
                    refused.append((path, "a NIfTI or Analyze header without its .img"))
            elif is_dicom(path):
                dicom[Path(root)].append(path)
            else:
                ignored += 1
    for place, files in dicom.items():
        mixed = any(scan.parent == place for scan in scans) or len(files) == 1
        if mixed:
            refused.extend((file, f"DICOM file: {DICOM_REASON}") for file in files)
        else:
            refused.append((place, f"{len(files)} DICOM files: {DICOM_REASON}"))
    return sorted(scans), sorted(refused), ignored


def _has_data(header: Path) -> bool:
    base = header.name[: len(header.name) - len(suffix_of(header))]
    return any((header.with_name(base + ending)).is_file() for ending in (".img", ".img.gz", ".IMG"))
