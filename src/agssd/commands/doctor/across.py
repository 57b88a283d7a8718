"""What only shows when cases are compared: copies, splits, subjects, label values, spacings, classes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from statistics import median
from typing import NamedTuple

import numpy as np

from agssd.data_modules.agreement import check_agreement
from agssd.data_modules.cache import SPLITS, CaseInfo, VolumeCache
from agssd.scans.findings import SEVERITIES, Finding
from agssd.scans.preparing.perceptual import NUM_BITS, near_duplicates

MANY_SCANS = 10  # of one subject, and five times as many as of others
RARE_LABEL = 0.05  # share of the labelled cases
ODD_HANDEDNESS = 0.2
UNBALANCED = 20.0  # cases of the most frequent class over those of the rarest
_FEW_LABELS = 10
_STRAY = 3  # label values that one case has by mistake
_ENOUGH = 10  # cases, before what is rare can be told


class Member(NamedTuple):
    """A case among others.

    Attributes:
        number: under which reports show it.
        name: path or key, for private texts.
        info: what the cache says, or would say.
        class_name: or None.
    """

    number: int
    name: str
    info: CaseInfo
    class_name: str | None


Found = tuple[int, Finding]  # the case's number, 0 for the set as a whole


def check_source(members: Sequence[Member], label_values: Collection[int] | None) -> list[Found]:
    """Compare the scans of a source that can be prepared."""
    return [
        *_copies(members, refused=True),
        *_label_values(members, label_values),
        *_subjects(members),
        *_handedness(members),
        *_source_spacings(members),
        *_classes(members),
    ]


def check_cache(cache: VolumeCache, members: Sequence[Member], label_values: Collection[int] | None) -> list[Found]:
    """Compare the cases of a cache."""
    return [
        *_agreement(cache),
        *_copies(members, refused=False),
        *_splits(members),
        *_label_values(members, label_values),
        *_subjects(members),
        *_classes(members),
    ]


def _copies(members: Sequence[Member], refused: bool) -> Iterator[Found]:
    """Yield exact duplicates, then near ones; ``refused``: ``prepare`` takes the first of equal sources only."""
    first: dict[str, Member] = {}
    kept = []
    for member in members:
        other = first.setdefault(member.info.source_sha256, member)
        if other is member:
            kept.append(member)
            continue
        leak = _apart(member, other)
        severity = "error" if refused or leak else "warning"
        yield member.number, _like("duplicate", severity, "Same bytes as", other, leak)
    hashes = [member.info.perceptual_hash for member in kept]
    earlier: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for one, two, bits in near_duplicates(hashes, hashes):
        if one < two:
            earlier[two].append((bits, one))
    for row, near in earlier.items():
        member = kept[row]
        bits, one = min(near, key=lambda pair: (SEVERITIES.index(_of_pair(member, kept[pair[1]])), pair))
        other = kept[one]
        leak = _apart(member, other) + (" of the same subject" if member.info.subject == other.info.subject else "")
        what = f"{NUM_BITS - bits} of {NUM_BITS} bits of its hash are those of"
        yield member.number, _like("near-duplicate", _of_pair(member, other), what, other, leak)


def _of_pair(one: Member, two: Member) -> str:
    """Return the severity of two near duplicates."""
    return "error" if _apart(one, two) else "info" if one.info.subject == two.info.subject else "warning"


def _like(check: str, severity: str, what: str, other: Member, more: str) -> Finding:
    return Finding(check, severity, f"{what} #{other.number}{more}.", f"{what} #{other.number} {other.name}{more}.")


def _apart(one: Member, two: Member) -> str:
    """Return words on two copies in different splits, else nothing."""
    splits = (one.info.split, two.info.split)
    if not all(splits) or splits[0] == splits[1]:
        return ""
    return f": one is in {splits[0]}, the other in {splits[1]}, so what is learnt from one is tested on the other"


def _splits(members: Sequence[Member]) -> Iterator[Found]:
    given: dict[str, Member] = {}
    for member in members:
        other = given.setdefault(member.info.subject, member)
        if member.info.split not in SPLITS:
            yield member.number, Finding("split", "error", "Its split is none of train, val and test.")
        elif other.info.split != member.info.split:
            message = f"Its subject is in {member.info.split} here and in {other.info.split} with #{other.number}."
            yield member.number, Finding("split", "error", message)
    counts = Counter(member.info.split for member in members)
    if not counts["train"]:
        yield 0, Finding("split", "error", "No case is in train.")
    elif empty := [split for split in ("val", "test") if not counts[split]]:
        yield 0, Finding("split", "info", f"No case is in {' or '.join(empty)}: nothing is measured there.")


def _label_values(members: Sequence[Member], known: Collection[int] | None) -> Iterator[Found]:
    labelled = [(member, member.info.label_values) for member in members if member.info.label_values is not None]
    counts: Counter[int] = Counter(value for _, values in labelled for value in values or ())
    if known is None and counts and len(counts) <= _FEW_LABELS and max(counts) >= 8 * len(counts):
        message = f"{len(counts)} different label values reach up to {max(counts)}: a task counts all up to the highest"
        yield 0, Finding("label-values", "warning", f"{message}, so number them from 0 on without gaps.")
    if known is not None:
        allowed, severity = {0, *known}, "error"
        what = f"none of {_list(sorted(allowed))}"
    elif len(labelled) >= _ENOUGH:
        limit = max(1, int(RARE_LABEL * len(labelled)))
        allowed = {0} | {value for value, count in counts.items() if count > limit}
        severity = "warning" if len(allowed) <= _FEW_LABELS else "info"  # of many organs some are always rare
        what = f"held by at most {limit} of the {len(labelled)} labelled cases"
    else:
        return
    for member, values in labelled:
        if strange := [value for value in values or () if value not in allowed]:
            few = "value" if len(strange) == 1 else "values"
            other = known is None and len(strange) > _STRAY  # a label map of another kind, hardly a slip
            finding = Finding("label-values", "info" if other else severity, f"Label {few} {_list(strange)}: {what}.")
            yield member.number, finding


def _subjects(members: Sequence[Member]) -> Iterator[Found]:
    scans: dict[str, list[Member]] = defaultdict(list)
    for member in members:
        scans[member.info.subject].append(member)
    usual = median(len(found) for found in scans.values()) if scans else 0
    for subject, found in scans.items():
        if len(scans) == 1 and len(found) > 1:
            message = f"All {len(found)} scans are taken as one subject: there is nobody left for val and test"
        elif len(found) > MANY_SCANS and len(found) > 5 * usual:
            message = f"{len(found)} scans of one subject, where others have {usual:g}"
        else:
            continue
        yield found[0].number, Finding("subject", "warning", f"{message}.", f"{message} (subject {subject}).")


def _handedness(members: Sequence[Member]) -> Iterator[Found]:
    mirrored = [bool(np.linalg.det(np.asarray(member.info.source_affine)[:3, :3]) < 0) for member in members]
    count = sum(mirrored)
    rare = count * 2 <= len(members)
    odd = [member for member, flag in zip(members, mirrored, strict=True) if flag == rare]
    words = "left-handed axes (negative determinant), the others right-handed ones"
    if not rare:
        words = "right-handed axes (positive determinant), the others left-handed ones"
    if not odd or len(odd) == len(members):
        return
    if len(members) >= _ENOUGH and len(odd) <= ODD_HANDEDNESS * len(members):
        for member in odd:
            yield member.number, Finding("mirrored", "info", f"Stored with {words}; {len(odd)} of {len(members)}.")
    else:
        yield 0, Finding("mirrored", "info", f"{len(odd)} of {len(members)} scans are stored with {words}.")


def _source_spacings(members: Sequence[Member]) -> Iterator[Found]:
    if not members:
        return
    affines = np.array([member.info.source_affine for member in members])[:, :3, :3]
    spacings = np.sort(np.sqrt((affines**2).sum(axis=1)), axis=1)
    low, high = spacings.min(axis=0), spacings.max(axis=0)
    if (high > 1.5 * low).any():
        message = f"Voxels, finest axis first, from {_millimetres(low)} to {_millimetres(high)} mm"
        yield 0, Finding("mixed-spacing", "info", f"{message}; prepare brings all of a modality to one spacing.")


def _agreement(cache: VolumeCache) -> Iterator[Found]:
    """Yield what training refuses: other channels or spacings within a modality; between modalities it is a choice."""
    modalities = sorted({info.modality for info in cache.cases})
    failed = False
    for modality in [*modalities, None] if len(modalities) > 1 else modalities:
        try:
            check_agreement([cache], modality)
        except ValueError as error:
            check = "channels" if "channels" in str(error) else "mixed-spacing"
            if modality is not None:
                failed = True
                message = f"The {modality} cases differ in {'channels' if check == 'channels' else 'spacing'}."
                yield 0, Finding(check, "error", message, str(error))
            elif not failed:
                message = "ct and mri cases differ in spacing or channels: train on one modality at a time."
                yield 0, Finding(check, "warning", message, str(error))


def _classes(members: Sequence[Member]) -> Iterator[Found]:
    names = sorted({member.class_name for member in members if member.class_name is not None})
    if not names:
        return
    cases = Counter(member.class_name for member in members)
    for number, name in enumerate(names):
        splits = {member.info.split for member in members if member.class_name == name}
        if all(splits) and "train" not in splits:
            yield 0, _of_class("error", number, name, f"has {cases[name]} cases, none in train")
        elif (subjects := len({m.info.subject for m in members if m.class_name == name})) < 3:
            words = f"has {subjects} subject{'s' if subjects > 1 else ''}: it cannot be in train, val and test"
            yield 0, _of_class("warning", number, name, words)
    most, least = max(cases[name] for name in names), min(cases[name] for name in names)
    text = ", ".join(f"{cases[name]}" for name in names)
    severity = "warning" if most > UNBALANCED * least else "info"
    private = ", ".join(f"{name}: {cases[name]}" for name in names)
    yield 0, Finding("class-balance", severity, f"Cases per class: {text}.", f"Cases per class: {private}.")


def _of_class(severity: str, number: int, name: str, words: str) -> Finding:
    return Finding("class-balance", severity, f"Class {number} {words}.", f"Class {name} {words}.")


def _millimetres(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> str:
    return " x ".join(f"{value:.3g}" for value in values)


def _list(values: Sequence[int]) -> str:
    shown = " ".join(map(str, values[:10]))
    return f"{shown} ..." if len(values) > 10 else shown
