"""From what the user names (files, folders, manifests) to a list of jobs, each one case."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from agssd.scans.sources.files import holds_dicom, stem_of
from agssd.scans.sources.folders import add_folder
from agssd.scans.sources.jobs import Job, Plan, add_cines, add_series, subject_of
from agssd.scans.sources.manifest import add_manifest

__all__ = ["Job", "Plan", "plan_sources"]


def plan_sources(
    sources: Sequence[Path],
    labels: Sequence[str] = (),
    subject: str | None = None,
    modality: str | None = None,
    volume: int | None = None,
    pet: bool = False,
) -> Plan:
    """Return the jobs of all sources.

    Args:
        sources: files, folders (searched recursively) and CSV manifests.
        labels: globs; in a folder a file whose name (or, for a glob with a slash, relative path) matches is a label.
        subject: regular expression searched in the relative path; its first group, or the whole match, is the subject.
        modality: "ct", "mri" or "us" for every case whose manifest row does not say otherwise, whatever a dataset.json
            says; None to decide per file. A DICOM series of another modality is refused.
        volume: of files and series that hold several volumes take this one, from 0; a manifest row may say otherwise.
        pet: take DICOM PET too, stored as MRI is.

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
            before = len(plan.jobs) + len(plan.refused), plan.ignored
            add_folder(plan, source, labels, pattern, modality, pet)
            if len(plan.jobs) + len(plan.refused) == before[0]:
                others = plan.ignored - before[1]
                plan.notes.append(f"{source} holds no scans: {f'{others} files of other types' if others else 'empty'}")
        elif not source.exists():
            raise ValueError(f"source {source} does not exist")
        elif source.suffix.lower() == ".csv":
            add_manifest(plan, source, pattern, pet)
        elif holds_dicom(source):
            if modality == "us":
                plan.jobs += add_cines(plan, [source], source.parent, pattern)
            else:
                plan.jobs += add_series(plan, [source], source.parent, pattern, pet)
        else:
            name = subject_of(source.name, stem_of(source), pattern)
            if name is None:
                plan.refused.append((source, f"its name does not match --subject {subject!r}"))
            else:
                plan.jobs.append(Job((source,), name))
    if volume is not None:
        plan.jobs = [replace(job, volume=volume) if job.volume is None else job for job in plan.jobs]
    if modality is not None:
        _refuse_other(plan, modality)
        plan.jobs = [job if job.modality else replace(job, modality=modality) for job in plan.jobs]
    _check_repeats(plan)
    _check_splits(plan.jobs)
    return plan


def _refuse_other(plan: Plan, modality: str) -> None:
    """Refuse the DICOM series whose headers say another modality than the user."""
    kept = []
    for job in plan.jobs:
        if job.series is None or job.modality is not None or job.series.modality == modality:
            kept.append(job)
        else:
            plan.refused.append((job.paths[0], f"its header says {job.series.modality}, --modality says {modality}"))
    plan.jobs = kept


def _check_repeats(plan: Plan) -> None:
    """Refuse a file that is named twice."""
    counts: Counter[tuple[str | int | None, ...]] = Counter()
    kept = []
    for job in plan.jobs:
        identity = (*(os.path.realpath(path) for path in job.paths), job.volume)
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
