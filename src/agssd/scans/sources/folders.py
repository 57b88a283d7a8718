"""From a folder to jobs: which files are images, whose they are, and which label belongs to which image."""

from __future__ import annotations

import fnmatch
import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from agssd.scans.case import RefusedError
from agssd.scans.read import canonical_geometry
from agssd.scans.sources.bids import modality_of, owners_by_name, set_aside, why_no_image
from agssd.scans.sources.decathlon import read_dataset
from agssd.scans.sources.files import PICTURES, Listing, list_folder, stem_of, suffix_of
from agssd.scans.sources.jobs import Job, Plan, add_cines, add_series, subject_of

_KIND_OF_IMAGE = re.compile(
    r"^(image|img|scan|volume|vol|orig|raw|ct|mri?|t1\w*|t2\w*|flair|pd|dwi|adc|swi)$", re.IGNORECASE
)
_NUMBERED = re.compile(r"^[A-Za-z]+(\d+)$")
_DATASET_FOLDER = re.compile(r"^(images|labels)(tr|ts|va)?$", re.IGNORECASE)


def add_folder(
    plan: Plan,
    folder: Path,
    globs: Sequence[str],
    pattern: re.Pattern[str] | None,
    modality: str | None,
    pet: bool = False,
) -> None:
    """Add the scans of a folder, searched recursively, to the plan; files that match ``globs`` are labels."""
    scans, dicom, refused, ignored = _without_derivatives(plan, folder, list_folder(folder, modality == "us"), globs)
    plan.refused += refused
    plan.ignored += ignored
    listed: dict[Path, Job] = {}
    spoken_for: set[Path] = set()
    for path in sorted(folder.rglob("dataset.json")):
        ours, named_there = read_dataset(plan, path, pattern, modality)
        listed.update({job.paths[0]: job for job in ours})
        spoken_for |= named_there
        plan.ignored -= 1
    free = [path for path in scans if path not in spoken_for]
    named = [path for path in free if _matches(path, folder, globs)]
    images = [path for path in scans if path in listed]
    for path in sorted({*free} - {*named}):
        reason = why_no_image(path, pet)
        if reason is None:
            images.append(path)
        else:
            plan.refused.append((path, reason))
    jobs = (
        add_cines(plan, dicom, folder, pattern) if modality == "us" else add_series(plan, dicom, folder, pattern, pet)
    )
    series = {job.paths[0]: job for job in jobs}
    taken = {path: job.label for path, job in listed.items() if job.label}
    persons = _folder_subjects([path for path in images if path not in listed], folder)
    recordings = _recordings([path for path in images if path not in listed], folder) if modality == "us" else {}
    label_of = _pair(plan, named, [*images, *series], taken, persons)
    by_folder: list[str] = []
    by_number: list[str] = []
    for path in sorted({*images, *listed}):
        job = listed.get(path)
        if job is None:
            default = persons.get(path, recordings.get(path, stem_of(path)))
            name = subject_of(path.relative_to(folder).as_posix(), default, pattern)
            if name is None:
                plan.refused.append((path, f"its path does not match --subject {pattern.pattern!r}" if pattern else ""))
                continue
            if pattern is None and path in persons and name == default:
                by_folder.append(name)
            elif pattern is None and path in recordings:
                by_number.append(name)
            job = Job((path,), name, modality=modality or modality_of(path))
        plan.jobs.append(replace(job, label=job.label or label_of.get(path)))
    plan.jobs += [replace(job, label=label_of.get(path)) for path, job in series.items()]
    if len(by_folder) > len(set(by_folder)):
        plan.notes.append(
            f"{folder}: {len(by_folder)} files taken as {len(set(by_folder))} subjects by folder; "
            "use --subject REGEX if a file is a subject"
        )
    if by_number:
        plan.notes.append(
            f"{folder}: {len(by_number)} numbered pictures taken as frames of {len(set(by_number))} recordings, each a "
            "subject, so that no recording is in two splits; use --subject REGEX if a picture is a subject"
        )


def _without_derivatives(plan: Plan, folder: Path, listing: Listing, globs: Sequence[str]) -> Listing:
    """Return the listing without what BIDS sets aside, labels excepted, and say so in the plan."""
    aside = set_aside([*listing.scans, *listing.dicom, *(path for path, _ in listing.refused)], folder)
    aside -= {path for path in listing.scans if _matches(path, folder, globs)}
    if aside:
        plan.notes.append(
            f"{folder}: {len(aside)} files in derivatives/ and sourcedata/ are left out; name such a folder as a "
            "source to prepare it"
        )
    return Listing(
        [path for path in listing.scans if path not in aside],
        [path for path in listing.dicom if path not in aside],
        [(path, reason) for path, reason in listing.refused if path not in aside],
        listing.ignored,
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


def _recordings(images: list[Path], folder: Path) -> dict[Path, str]:
    """Return the pictures that are numbered like the frames of one recording, with its name.

    Pictures of one folder are, if their names differ in a last number alone that is padded with zeros or follows the
    word frame. Others, ``benign (7).png``, are pictures by themselves. In doubt they are frames of one recording: taken
    for single pictures they would be in all splits.
    """
    found: dict[tuple[Path, str], list[tuple[Path, str]]] = defaultdict(list)
    for path in images:
        number = re.search(r"\d+$", path.stem)
        if number and suffix_of(path) in PICTURES:
            found[path.parent, path.stem[: number.start()]].append((path, number[0]))
    named: dict[Path, str] = {}
    for (place, trunk), numbered in found.items():
        padded = any(number[0] == "0" and len(number) > 1 for _, number in numbered)
        if len(numbered) > 1 and (padded or re.search(r"frame[-_ ]?$", trunk, re.IGNORECASE)):
            inside = place.relative_to(folder).as_posix()
            name = "/".join(part for part in (inside if inside != "." else "", trunk.rstrip("-_ .(")) if part)
            named |= dict.fromkeys((path for path, _ in numbered), name or folder.name)
    return named


def _pair(
    plan: Plan, labels: list[Path], images: list[Path], taken: dict[Path, Path], of_one: Collection[Path]
) -> dict[Path, Path]:
    """Return the label of each image; a wrong one would be worse than none, so names go before grids.

    By its name a label belongs to the image of the same name in another folder; else to the image of its folder, or of
    a folder beside that, whose name is the longest beginning of its own, up to a mark that is no letter or digit; else
    to those that its BIDS name names, or that differ from it in the last word only and lie on its grid; else to the one
    in a folder beside its own that has the same number after other letters, and its grid. Of several
    labels that claim an image the one with the shortest name has it. What is left belongs by its grid to the images of
    its folder that have no label yet, if they are one subject's; a note says so.

    Args:
        plan: gets the labels that belong to no image, and the notes.
        labels: to be paired.
        images: in all folders.
        taken: label of the images that have one already.
        of_one: the images whose folder is one subject's.
    """
    by_stem: dict[str, list[Path]] = defaultdict(list)
    by_folder: dict[Path, list[Path]] = defaultdict(list)
    by_parent: dict[Path, list[Path]] = defaultdict(list)
    for image in images:
        by_stem[stem_of(image)].append(image)
        by_folder[image.parent].append(image)
        by_parent[image.parent.parent].append(image)
        if image.is_dir():  # a DICOM series, beside which or in which its label may lie
            by_folder[image].append(image)
    by_bids = owners_by_name(images, _same_grid)
    chosen = dict(taken)
    left: list[Path] = []
    for label in sorted(labels, key=lambda path: (len(stem_of(path)), path)):
        owners = [image for image in by_stem[stem_of(label)] if image.parent != label.parent]
        if len(owners) > 1:
            owners = [image for image in owners if image.parent.parent == label.parent.parent]
        owners = owners or _longest(label, by_folder[label.parent]) or by_bids(label)
        if not owners:  # images/case1.nii, masks/case1_mask.nii
            owners = _longest(label, by_parent[label.parent.parent])
        if not owners:  # case1_image.nii, case1_label.nii; case1_t1.nii, case1_t2.nii, case1_seg.nii
            alike = [
                image for image in by_folder[label.parent] if _trunk(image) and _trunk(image) == _trunk(label, True)
            ]
            owners = [image for image in alike if _same_grid(image, label)]
        if not owners:  # img/img0001.nii, label/label0001.nii
            owners = _numbered(label, by_parent[label.parent.parent])
        free = [image for image in owners if image not in chosen]
        if not owners:
            left.append(label)
        elif not free:
            plan.refused.append((label, f"{owners[0]} has a label already ({chosen[owners[0]].name}); narrow --labels"))
        chosen.update(dict.fromkeys(free, label))
    for label in sorted(left):
        beside = by_folder[label.parent]
        is_one = len(beside) == 1 or all(image in of_one for image in beside)
        owners = [image for image in beside if is_one and _same_grid(image, label)]
        free = [image for image in owners if image not in chosen]
        chosen.update(dict.fromkeys(free, label))
        if free:
            plan.notes.append(
                f"{label}: no image of its name lies beside it; taken as the label of {len(free)} on its grid, the "
                f"first {free[0].name}"
            )
        elif owners:
            plan.refused.append((label, f"{owners[0]} has a label already ({chosen[owners[0]].name}); narrow --labels"))
        else:
            plan.refused.append((label, "matches --labels, but no image of its name or on its grid lies beside it"))
    return chosen


def _trunk(path: Path, is_label: bool = False) -> str:
    """Return the name before its last word, where that is one for an image as such or a contrast, or of a label any."""
    trunk, _, word = stem_of(path).rpartition("_")
    return trunk if (word.isalpha() if is_label else _KIND_OF_IMAGE.match(word)) else ""


def _longest(label: Path, images: Sequence[Path]) -> list[Path]:
    """Return the images with the longest name that the label's goes on from: case10_seg from case10, not from case1."""
    stem = stem_of(label)
    length = max(
        (len(name) for name in map(stem_of, images) if stem.startswith(name) and not stem[len(name) :][:1].isalnum()),
        default=0,
    )
    return [image for image in images if length and stem_of(image) == stem[:length]]


def _numbered(label: Path, images: Sequence[Path]) -> list[Path]:
    """Return the one image of another folder whose name is letters and the label's number, and which has its grid."""
    number = _NUMBERED.match(stem_of(label))
    if number is None:
        return []
    alike = [
        image
        for image in images
        if image.parent != label.parent and (other := _NUMBERED.match(stem_of(image))) and other[1] == number[1]
    ]
    return alike if len(alike) == 1 and _same_grid(alike[0], label) else []


def _same_grid(one: Path, two: Path) -> bool:
    try:
        (shape, affine), (other_shape, other) = canonical_geometry(one), canonical_geometry(two)
    except RefusedError:
        return False
    return shape == other_shape and bool(np.allclose(affine, other, atol=1e-2))
