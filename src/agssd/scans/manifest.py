"""From a CSV manifest to jobs."""

from __future__ import annotations

import csv
import re
from pathlib import Path

from agssd.scans.files import stem_of
from agssd.scans.jobs import SPLITS, Job, Plan, subject_of

COLUMNS = ("path", "subject", "modality", "label_path", "class", "split")
_MODALITIES = {"ct": "ct", "mri": "mri", "mr": "mri"}


def add_manifest(plan: Plan, path: Path, pattern: re.Pattern[str] | None) -> None:
    """Add the rows of a CSV manifest; paths are relative to its folder, several channels are parted by ``;``."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = [name.strip() for name in reader.fieldnames or []]
            reader.fieldnames = columns
            rows = [
                (reader.line_num, {key: (value or "").strip() for key, value in row.items() if isinstance(value, str)})
                for row in reader
            ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"manifest {path} cannot be read: {error}") from error
    if "path" not in columns:
        raise ValueError(f"manifest {path} has no column 'path'; its columns are {', '.join(columns) or 'none'}")
    unknown = [name for name in columns if name not in COLUMNS]
    if unknown:
        plan.notes.append(f"manifest {path}: columns not used: {', '.join(unknown)}; known are {', '.join(COLUMNS)}")
    errors = []
    for line, row in rows:
        names = [name.strip() for name in row["path"].split(";") if name.strip()]
        modality = row.get("modality", "").lower()
        split = row.get("split", "").lower()
        if not names:
            errors.append(f"line {line}, column path: empty")
        if modality not in ("", "auto", *_MODALITIES):
            errors.append(f"line {line}, column modality: {modality!r} is neither ct nor mri")
        if split not in ("", *SPLITS):
            errors.append(f"line {line}, column split: {split!r} is none of {', '.join(SPLITS)}")
        if not names or errors:
            continue
        paths = tuple(path.parent / name for name in names)
        subject = row.get("subject") or subject_of(names[0], stem_of(paths[0]), pattern)
        if subject is None:
            plan.refused.append((paths[0], "its path does not match --subject"))
            continue
        label = path.parent / row["label_path"] if row.get("label_path") else None
        plan.jobs.append(Job(paths, subject, label, _MODALITIES.get(modality), row.get("class") or None, split or None))
    if errors:
        raise ValueError(f"manifest {path}: " + "; ".join(errors[:10]) + ("; ..." if len(errors) > 10 else ""))
