"""From a dataset.json in the form of the Medical Segmentation Decathlon to jobs."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

from agssd.scans.sources.files import stem_of
from agssd.scans.sources.jobs import SPLITS, Job, Plan, subject_of


def read_dataset(
    plan: Plan, path: Path, pattern: re.Pattern[str] | None, given: str | None
) -> tuple[list[Job], set[Path]]:
    """Return the jobs of a dataset.json in the form of the Medical Segmentation Decathlon, and all files it names.

    The modality that the user has given wins over the stated one.
    """
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    entries = data.get("training") if isinstance(data, dict) else None
    if not isinstance(entries, list):
        plan.notes.append(f"{path} is not in the form of the Medical Segmentation Decathlon; it is not used")
        return [], set()
    stated = str((data.get("modality") or {}).get("0", "")).lower() if isinstance(data.get("modality"), dict) else ""
    modality = "ct" if stated == "ct" else "mri" if stated in ("mri", "mr", "t1", "t2", "flair") else None
    if given is not None and modality not in (None, given):
        plan.notes.append(f"{path} says {modality}; its scans are taken for {given}, as --modality says")
    modality = given or modality
    if isinstance(data.get("modality"), dict) and len(data["modality"]) > 1:
        contrasts = ", ".join(f"{key} {name}" for key, name in data["modality"].items())
        plan.notes.append(f"{path}: its scans hold several contrasts ({contrasts}); --volume I takes one of them")
    tests = data.get("test") or []
    jobs = []
    named: set[Path] = set()
    for row, entry in enumerate([*entries, *(tests if isinstance(tests, list) else [])]):
        item: dict[str, Any] = {"image": entry} if isinstance(entry, str) else entry
        if not isinstance(item, dict) or not isinstance(item.get("image"), str):
            raise ValueError(f"{path}: entry {row + 1} of training and test names no image")
        image = path.parent / item["image"]
        label = path.parent / item["label"] if item.get("label") else None
        named |= {image} | ({label} if label is not None else set())
        subject = item.get("subject")
        name = str(subject) if subject is not None else subject_of(item["image"], stem_of(image), pattern)
        if not image.is_file():
            plan.refused.append((image, f"listed in {path.name}, but missing"))
        elif label is not None and not label.is_file():
            plan.refused.append((image, f"its label {label} is listed in {path.name}, but missing"))
        elif name is None:
            plan.refused.append((image, "its path does not match --subject"))
        else:
            jobs.append(Job((image,), name, label, modality))
    return _apply_suggested(plan, path, data, jobs), named


def _apply_suggested(plan: Plan, path: Path, data: dict[str, Any], jobs: list[Job]) -> list[Job]:
    """Return the jobs with the subjects that a suggested split keeps apart as split "test"; the rest is split later.

    Its entries name subjects if all of them do, else images (by name, or by what follows the last underscore).
    """
    suggested = data.get("suggested_split")
    if not isinstance(suggested, dict):
        return jobs
    parts = {part: [str(entry) for entry in suggested.get(part) or []] for part in SPLITS}
    named = {entry: part for part, entries in parts.items() for entry in entries}
    subjects = {job.subject: {job.subject} for job in jobs}
    images: dict[str, set[str]] = defaultdict(set)
    for job in jobs:
        stem = stem_of(job.paths[0])
        for name in (stem, stem.rpartition("_")[2]):
            images[name].add(job.subject)
    meaning = next((found for found in (subjects, images) if set(named) <= set(found)), None)
    if meaning is None:
        plan.notes.append(f"{path}: its suggested split names neither subjects nor images of it throughout; not used")
        return jobs
    part_of: dict[str, str] = {}
    for entry, part in named.items():
        for subject in meaning[entry]:
            if part_of.setdefault(subject, part) != part:
                raise ValueError(
                    f"{path}: its suggested split has subject {subject!r} in {part_of[subject]} and {part}"
                )
    held = {"test": "test", "val": "val" if parts["test"] else "test"}
    count = sum(part != "train" for part in part_of.values())
    plan.notes.append(
        f"{path}: the {count} subjects that its suggested split keeps apart become "
        + ("val and test as suggested" if parts["test"] else "split test; the others are split into train and val")
    )
    return [replace(job, split=held.get(part_of.get(job.subject, "train"))) for job in jobs]
