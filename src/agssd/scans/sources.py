"""From what the user names (files, folders, manifests) to a list of jobs, each one case."""

from __future__ import annotations

import csv
import fnmatch
import json
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from agssd.scans.case import RefusedError
from agssd.scans.files import data_files, list_folder, stem_of
from agssd.scans.read import canonical_geometry

COLUMNS = ("path", "subject", "modality", "label_path", "class", "split")
SPLITS = ("train", "val", "test")
_MODALITIES = {"ct": "ct", "mri": "mri", "mr": "mri"}
_DATASET_FOLDER = re.compile(r"^(images|labels)(tr|ts|va)?$", re.IGNORECASE)
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


def plan_sources(
    sources: Sequence[Path], labels: Sequence[str] = (), subject: str | None = None, modality: str | None = None
) -> Plan:
    """Return the jobs of all sources.

    Args:
        sources: files, folders (searched recursively) and CSV manifests.
        labels: globs; in a folder a file whose name (or, for a glob with a slash, relative path) matches is a label.
        subject: regular expression searched in the relative path; its first group, or the whole match, is the subject.
        modality: "ct" or "mri" for every case whose manifest row does not say otherwise, whatever a dataset.json says;
            None to decide per file.

    Raises:
        ValueError: a source is missing, a manifest or dataset.json is malformed, the expression is invalid, or one
            subject is in two splits.
    """
    try:
        pattern = re.compile(subject) if subject is not None else None
    except re.error as error:
        raise ValueError(f"--subject {subject!r} is no regular expression: {error}") from error
    plan = Plan()
    for source in sources:
        if source.is_dir():
            _add_folder(plan, source, labels, pattern, modality)
        elif not source.exists():
            raise ValueError(f"source {source} does not exist")
        elif source.suffix.lower() == ".csv":
            _add_manifest(plan, source, pattern)
        else:
            name = _subject_of(source.name, stem_of(source), pattern)
            if name is None:
                plan.refused.append((source, f"its name does not match --subject {subject!r}"))
            else:
                plan.jobs.append(Job((source,), name))
    if modality is not None:
        plan.jobs = [job if job.modality else replace(job, modality=modality) for job in plan.jobs]
    _check_repeats(plan)
    _check_splits(plan.jobs)
    return plan


def _subject_of(relative: str, default: str, pattern: re.Pattern[str] | None) -> str | None:
    """Return the subject by the user's expression, else by a BIDS name, else the default."""
    match = (pattern or _BIDS_SUBJECT).search(relative)
    if match is None:
        return default if pattern is None else None
    return (match.group(1) if match.re.groups else match.group(0)) or None


def _add_folder(
    plan: Plan, folder: Path, globs: Sequence[str], pattern: re.Pattern[str] | None, modality: str | None
) -> None:
    scans, refused, ignored = list_folder(folder)
    plan.refused += refused
    plan.ignored += ignored
    listed: dict[Path, Job] = {}
    spoken_for: set[Path] = set()
    for path in sorted(folder.rglob("dataset.json")):
        ours, named_there = _read_dataset(plan, path, pattern, modality)
        listed.update({job.paths[0]: job for job in ours})
        spoken_for |= named_there
        plan.ignored -= 1
    free = [path for path in scans if path not in spoken_for]
    named = [path for path in free if _matches(path, folder, globs)]
    images = [path for path in scans if path in listed or (path not in spoken_for and path not in named)]
    label_of = _pair(plan, named, images, {path: job.label for path, job in listed.items() if job.label})
    persons = _folder_subjects([path for path in images if path not in listed], folder)
    by_folder: list[str] = []
    for path in sorted({*images, *listed}):
        job = listed.get(path)
        if job is None:
            default = persons.get(path, stem_of(path))
            name = _subject_of(path.relative_to(folder).as_posix(), default, pattern)
            if name is None:
                plan.refused.append((path, f"its path does not match --subject {pattern.pattern!r}" if pattern else ""))
                continue
            if pattern is None and path in persons and name == default:
                by_folder.append(name)
            job = Job((path,), name)
        plan.jobs.append(replace(job, label=job.label or label_of.get(path)))
    if len(by_folder) > len(set(by_folder)):
        plan.notes.append(
            f"{folder}: {len(by_folder)} files taken as {len(set(by_folder))} subjects by folder; "
            "use --subject REGEX if a file is a subject"
        )


def _matches(path: Path, folder: Path, globs: Sequence[str]) -> bool:
    relative = path.relative_to(folder).as_posix()
    return any(fnmatch.fnmatch(relative if "/" in glob else path.name, glob) for glob in globs)


def _folder_subjects(images: list[Path], folder: Path) -> dict[Path, str]:
    """Return the images whose folder is taken for a person, with its name; for the others the file is the subject.

    Either one folder holds the scans of one person (``patient7/T1.nii.gz``), or of all persons (``imagesTr/7.nii.gz``).
    A subfolder is a person if it holds at most 10 images or shares a file name with another, and is not called
    imagesTr or the like. In doubt two persons count as one: that costs a little balance, the contrary leaks.
    """
    inside: dict[Path, list[Path]] = defaultdict(list)
    places: dict[str, set[Path]] = defaultdict(set)
    for path in images:
        if path.parent != folder and not _DATASET_FOLDER.match(path.parent.name):
            inside[path.parent].append(path)
            places[stem_of(path)].add(path.parent)
    persons = {place for place, found in inside.items() if len(found) <= 10}
    persons |= {place for found in places.values() if len(found) > 1 for place in found}
    return {path: path.parent.relative_to(folder).as_posix() for path in images if path.parent in persons}


def _pair(plan: Plan, labels: list[Path], images: list[Path], taken: dict[Path, Path]) -> dict[Path, Path]:
    """Return the label of each image.

    A label belongs to the image of the same name in another folder, else to the image of its folder whose name is the
    longest beginning of its own, else to all images of its folder that lie on its grid.
    """
    by_stem: dict[str, list[Path]] = defaultdict(list)
    by_folder: dict[Path, list[Path]] = defaultdict(list)
    for image in images:
        by_stem[stem_of(image)].append(image)
        by_folder[image.parent].append(image)
    chosen = dict(taken)
    for label in labels:
        owners = [image for image in by_stem[stem_of(label)] if image.parent != label.parent]
        if len(owners) > 1:
            owners = [image for image in owners if image.parent.parent == label.parent.parent]
        if not owners:
            starts = [image for image in by_folder[label.parent] if stem_of(label).startswith(stem_of(image))]
            longest = max((len(stem_of(image)) for image in starts), default=0)
            owners = [image for image in starts if len(stem_of(image)) == longest]
        if not owners:
            owners = [image for image in by_folder[label.parent] if _same_grid(image, label)]
        free = [image for image in owners if image not in chosen]
        if not owners:
            plan.refused.append((label, "matches --labels, but no image of its name or on its grid lies beside it"))
        elif not free:
            plan.refused.append((label, f"{owners[0]} has a label already ({chosen[owners[0]].name}); narrow --labels"))
        chosen.update(dict.fromkeys(free, label))
    return chosen


def _same_grid(one: Path, two: Path) -> bool:
    try:
        (shape, affine), (other_shape, other) = canonical_geometry(one), canonical_geometry(two)
    except RefusedError:
        return False
    return shape == other_shape and bool(np.allclose(affine, other, atol=1e-2))


def _read_dataset(
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
        name = str(subject) if subject is not None else _subject_of(item["image"], stem_of(image), pattern)
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


def _add_manifest(plan: Plan, path: Path, pattern: re.Pattern[str] | None) -> None:
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
        subject = row.get("subject") or _subject_of(names[0], stem_of(paths[0]), pattern)
        if subject is None:
            plan.refused.append((paths[0], "its path does not match --subject"))
            continue
        label = path.parent / row["label_path"] if row.get("label_path") else None
        plan.jobs.append(Job(paths, subject, label, _MODALITIES.get(modality), row.get("class") or None, split or None))
    if errors:
        raise ValueError(f"manifest {path}: " + "; ".join(errors[:10]) + ("; ..." if len(errors) > 10 else ""))


def _check_repeats(plan: Plan) -> None:
    """Refuse a file that is named twice."""
    counts: Counter[tuple[Path, ...]] = Counter()
    kept = []
    for job in plan.jobs:
        identity = tuple(path.resolve() for path in job.paths)
        counts[identity] += 1
        if counts[identity] > 1:
            plan.refused.append((job.paths[0], "named twice; it is cached once"))
        else:
            kept.append(job)
    plan.jobs = kept


def _check_splits(jobs: Sequence[Job]) -> None:
    given: dict[str, str] = {}
    for job in jobs:
        if job.split and given.setdefault(job.subject, job.split) != job.split:
            raise ValueError(
                f"subject {job.subject!r} is in two splits, {given[job.subject]} and {job.split}; "
                "all scans of a subject must be in one"
            )
