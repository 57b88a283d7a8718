"""From a CSV manifest to jobs; every error is named by row and column before any scan is read."""

from __future__ import annotations

import csv
import difflib
import io
import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

from agssd.scans.case import RefusedError
from agssd.scans.dicom.series import series_at
from agssd.scans.sources.files import holds_dicom, stem_of
from agssd.scans.sources.jobs import SPLITS, Job, Plan, subject_of

COLUMNS = ("path", "subject", "modality", "label_path", "class", "split", "volume")
_MODALITIES = {"ct": "ct", "mri": "mri", "mr": "mri", "us": "us"}
_SYNONYMS = {
    "path": ("image", "file", "filename", "scan"),
    "subject": ("patient", "participant", "person"),
    "label_path": ("mask", "seg", "segmentation"),
}
_SHOWN = 10  # errors printed of one manifest

Row = tuple[int, dict[str, str]]  # line in the file (of the end of the row), value by column


def add_manifest(plan: Plan, path: Path, pattern: re.Pattern[str] | None, pet: bool = False) -> None:
    """Add the rows of a CSV manifest to the plan.

    Paths are relative to its folder, several channels are parted by ``;``. Columns are ``COLUMNS``, of which only
    ``path`` is needed. A path may be a folder that holds one DICOM series; its PatientID is the subject unless the row
    names one.

    Raises:
        ValueError: the file is no UTF-8 table with commas, a column is repeated or misspelt, or rows are wrong; the
            message counts all errors and names the first ten by line and column.
    """
    columns, rows, errors = _read_rows(path)
    unknown = [name for name in columns if name not in COLUMNS]
    if unknown:
        plan.notes.append(f"manifest {path}: columns not used: {', '.join(unknown)}; known are {', '.join(COLUMNS)}")
    seen: dict[tuple[str, ...], int] = {}
    split_of: dict[str, tuple[int, str]] = {}
    for line, row in rows:
        names = [name.strip() for name in row["path"].split(";") if name.strip()]
        if not names:
            errors.append((line, "path", "empty"))
            continue
        paths = tuple(path.parent / name for name in names)
        errors += [(line, "path", f"{given} does not exist") for given in paths if not given.exists()]
        volume = row.get("volume", "")
        if volume and not volume.isdecimal():
            errors.append((line, "volume", f"{volume!r} is no number from 0"))
            volume = ""
        same = seen.setdefault((*(os.path.realpath(given) for given in paths), volume), line)
        if same != line:
            errors.append((line, "path", f"{row['path']} stands in line {same} already"))
        elif len(set(paths)) < len(paths):
            errors.append((line, "path", "one file is named as two channels"))
        modality, split = row.get("modality", "").lower(), row.get("split", "").lower()
        if modality not in ("", "auto", *_MODALITIES):
            errors.append((line, "modality", f"{modality!r} is neither ct nor mri, nor us"))
        if split not in ("", *SPLITS):
            errors.append((line, "split", f"{split!r} is none of {', '.join(SPLITS)}"))
        label = path.parent / row["label_path"] if row.get("label_path") else None
        if label in paths:
            errors.append((line, "label_path", f"{label} is the image itself"))
        elif label is not None and not label.exists():
            errors.append((line, "label_path", f"{label} does not exist"))
        try:
            is_series = len(paths) == 1 and modality != "us" and holds_dicom(paths[0])
            series = series_at(paths[0], pet) if is_series else None
            if series is not None and modality in _MODALITIES and _MODALITIES[modality] != series.modality:
                raise RefusedError(f"its header says {series.modality}, line {line} of the manifest {modality}")
        except RefusedError as error:
            plan.refused.append((paths[0], str(error)))
            continue
        default = stem_of(paths[0]) if series is None else series.subject
        subject = row.get("subject") or subject_of(names[0], default, pattern)
        if subject is None:
            plan.refused.append((paths[0], "its path does not match --subject"))
            continue
        first, other = split_of.setdefault(subject, (line, split)) if split else (line, split)
        if other != split:
            errors.append((line, "split", f"subject {subject!r} is in {split} here and in {other} in line {first}"))
        job = Job(paths, subject, label, _MODALITIES.get(modality), row.get("class") or None, split or None, series)
        plan.jobs.append(replace(job, volume=int(volume)) if volume else job)
    if errors:
        errors.sort(key=lambda error: error[0])
        shown = "; ".join(f"line {line}, column {column}: {reason}" for line, column, reason in errors[:_SHOWN])
        count = "1 error" if len(errors) == 1 else f"{len(errors)} errors"
        more = f"; and {len(errors) - _SHOWN} more" if len(errors) > _SHOWN else ""
        raise ValueError(f"manifest {path} has {count}: {shown}{more}")


def _read_rows(path: Path) -> tuple[list[str], list[Row], list[tuple[int, str, str]]]:
    """Return the columns, the rows that have as many fields, and an error for each that has not."""
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
    rows: list[Row] = []
    errors: list[tuple[int, str, str]] = []
    try:
        columns = [name.strip() for name in next(reader, [])]
        _check_columns(path, columns)
        for fields in reader:
            if not any(field.strip() for field in fields):
                continue
            if len(fields) != len(columns):
                place = columns[min(len(fields), len(columns) - 1)]  # the first that is missing, else the last
                count = "1 field" if len(fields) == 1 else f"{len(fields)} fields"
                errors.append((reader.line_num, place, f"{count} where the header has {len(columns)}"))
                continue
            values = (field.strip() for field in fields)
            rows.append((reader.line_num, dict(zip(columns, values, strict=True))))
    except csv.Error as error:
        raise ValueError(f"manifest {path}, line {reader.line_num}: {error}; check its quotes") from error
    if not rows and not errors:
        raise ValueError(f"manifest {path} has no rows below its header")
    return columns, rows, errors


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"manifest {path} cannot be opened: {error.strerror}") from error
    if not data.strip():
        raise ValueError(f"manifest {path} is empty; its first line must name the columns, of {', '.join(COLUMNS)}")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"manifest {path} is UTF-16; save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"manifest {path} is not UTF-8: byte 0x{data[error.start]:02x} in line {line}; save it as UTF-8"
        ) from error
    if "\0" in text:
        raise ValueError(f"manifest {path} is no text: it holds NUL bytes")
    return text


def _check_columns(path: Path, columns: list[str]) -> None:
    """Refuse a header that would lose what the user gave: wrong delimiter, repeated or misspelt columns."""
    for mark, name in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
        if len(columns) == 1 and mark in columns[0]:
            raise ValueError(f"manifest {path}: its columns are parted by {name}; part them by commas")
    repeated = [repr(name) for name, count in Counter(columns).items() if count > 1]
    if repeated:
        raise ValueError(f"manifest {path}: column {', '.join(repeated)} stands more than once in the header")
    wrong = [(name, near) for name in columns if name not in COLUMNS and (near := _meant(name))]
    if wrong:
        told = "; ".join(f"column {name!r} is unknown, did you mean {near!r}?" for name, near in wrong)
        raise ValueError(f"manifest {path}: {told} Rename it, or remove it where it is not for agssd")
    if "path" not in columns:
        raise ValueError(f"manifest {path} has no column 'path'; its columns are {', '.join(columns)}")


def _meant(name: str) -> str | None:
    """Return the known column that an unknown one was probably meant to be: nearly equal, its stem, or a synonym."""
    lower = re.sub(r"[^a-z]+", "_", name.lower()).strip("_")
    word = lower.split("_")[0]
    for known in COLUMNS:
        if {word, word.removesuffix("s")} & {known, known.split("_")[0], *_SYNONYMS.get(known, ())}:
            return known
    return next(iter(difflib.get_close_matches(lower, COLUMNS, n=1, cutoff=0.8)), None)
