"""Quarantine: a CSV of scans that are to be left out, written by ``agssd doctor`` or by hand, read by ``prepare``.

Columns: ``path`` (absolute, or relative to the folder of the list), ``reason``, and optionally ``sha256`` of the scan's
bytes, of all its files one after another where they are several. An entry with a hash stops to hold when the bytes
change: a scan that was mended is tried again, and ``prepare`` says so.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from agssd.scans.sources.files import data_files
from agssd.scans.sources.jobs import Plan

COLUMNS = ("path", "sha256", "reason")


@dataclass(frozen=True)
class Entry:
    """One scan to leave out.

    Attributes:
        path: of the scan, of one of its channels or of its label.
        reason: in words.
        sha256: of the bytes, or None where it was not known.
        line: in the list.
    """

    path: Path
    reason: str
    sha256: str | None = None
    line: int = 0


def apply_quarantine(plan: Plan, file: Path) -> None:
    """Move the jobs that a list names from the plan's jobs to its refused ones; the notes say what did not apply.

    Raises:
        ValueError: the list cannot be read or is malformed.
    """
    entries = read_quarantine(file)
    by_path = {entry.path.resolve(): entry for entry in entries}
    met = {path.resolve() for path, _ in plan.refused} & set(by_path)
    mended: set[Path] = set()
    kept = []
    for job in plan.jobs:
        hits = []
        files = replace(job, label=None).files()
        for path in (*job.paths, *([job.label] if job.label else [])):
            entry = by_path.get(path.resolve())
            if entry is None:
                continue
            met.add(path.resolve())
            read = files if path in job.paths else data_files(path)
            if entry.sha256 is not None and entry.sha256 != source_sha256(read):
                if path.resolve() not in mended:
                    plan.notes.append(f"{path} has changed since it was put into quarantine; it is tried again")
                mended.add(path.resolve())
                continue
            hits.append("in quarantine: " + entry.reason if path in job.paths else _of_label(path, entry))
        if hits:
            plan.refused.append((job.paths[0], hits[0]))
        else:
            kept.append(job)
    plan.jobs = kept
    for path, entry in by_path.items():
        if path not in met:
            plan.notes.append(f"quarantine {file}, line {entry.line}: {entry.path} is no scan of these sources")


def _of_label(path: Path, entry: Entry) -> str:
    return f"its label {path} is in quarantine: {entry.reason}"


def read_quarantine(file: Path) -> list[Entry]:
    """Return the entries of a list.

    Raises:
        ValueError: naming every bad line: it cannot be read, a column is missing, or a path is empty or named twice
            with different reasons.
    """
    try:
        with file.open(newline="", encoding="utf-8-sig") as text:
            reader = csv.DictReader(text)
            reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or []]
            missing = [name for name in ("path", "reason") if name not in reader.fieldnames]
            if missing:
                raise ValueError(
                    f"quarantine {file} has no column {' and no column '.join(missing)}; its first line must be "
                    "path,reason or path,sha256,reason"
                )
            rows = [(reader.line_num, {key: (row.get(key) or "").strip() for key in COLUMNS}) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"quarantine {file} cannot be read: {error}") from error
    entries, errors = [], []
    for line, row in rows:
        digest = row["sha256"].lower()
        if not row["path"]:
            errors.append(f"line {line}: the path is empty")
        if digest and (len(digest) != 64 or set(digest) - set("0123456789abcdef")):
            errors.append(f"line {line}: sha256 is {digest!r}, not 64 hexadecimal digits")
        entries.append(Entry(file.parent / row["path"], row["reason"] or "no reason stated", digest or None, line))
    if errors:
        raise ValueError(f"quarantine {file}: " + "; ".join(errors[:10]) + ("; ..." if len(errors) > 10 else ""))
    return entries


def quarantine_text(entries: Iterable[Entry], file: Path) -> str:
    """Return the CSV of a list that will lie at ``file``; paths below its folder become relative."""
    folder = file.parent.resolve()
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for entry in entries:
        path = Path(os.path.abspath(entry.path))
        shown = path.relative_to(folder) if path.is_relative_to(folder) else path
        writer.writerow([shown, entry.sha256 or "", entry.reason])
    return text.getvalue()


def source_sha256(files: Iterable[Path]) -> str | None:
    """Return the hash of the bytes of files, one after another; None if one of them cannot be read."""
    digest = hashlib.sha256()
    try:
        for file in files:
            with file.open("rb") as data:
                while block := data.read(1 << 20):
                    digest.update(block)
    except OSError:
        return None
    return digest.hexdigest()
