"""Folds and nested subsets of subjects, as functions of a seed and the subjects' own names.

A subject's place depends on its name and the seed alone, never on the order or the number of the others, so growing a
label budget only adds subjects, and two caches of the same people agree. Where subjects have classes, subsets take them
in proportion (:func:`by_class`), and a place depends on the classes of the others too.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence


def _ordered(subjects: Iterable[str], seed: int, purpose: str) -> list[str]:
    """Return the distinct subjects in an order that depends on (seed, purpose) and the names."""
    key = f"{seed}/{purpose}/"
    return sorted(set(subjects), key=lambda name: (hashlib.sha256((key + name).encode()).digest(), name))


def fold_subjects(subjects: Iterable[str], num_folds: int, seed: int = 0) -> list[list[str]]:
    """Return ``num_folds`` disjoint lists that hold every subject once; sizes differ by at most 1.

    Raises:
        ValueError: if there are fewer subjects than folds, or fewer than 2 folds.
    """
    ordered = _ordered(subjects, seed, "fold")
    if num_folds < 2 or len(ordered) < num_folds:
        raise ValueError(
            f"num_folds is {num_folds} for {len(ordered)} subjects; use at least 2 folds and at most one per subject"
        )
    return [sorted(ordered[fold::num_folds]) for fold in range(num_folds)]


def check_fold(num_folds: int | None, fold: int | None) -> None:
    """Refuse ``data.num_folds`` without ``data.fold`` and folds that do not exist.

    Raises:
        ValueError: naming both.
    """
    if (num_folds is None) != (fold is None):
        raise ValueError(f"data.num_folds is {num_folds} and data.fold {fold}; give both or neither")
    if num_folds is not None and fold is not None and not 0 <= fold < num_folds:
        raise ValueError(f"data.fold is {fold}; with num_folds {num_folds} it is 0 to {num_folds - 1}")


def by_class(ordered: Sequence[str], classes: Mapping[str, Iterable[int]]) -> list[str]:
    """Return the subjects in an order whose every beginning has each class as soon, and about as often, as it can.

    First those that bring a class that is not there yet, in the order given, so that the first K subjects have all K
    classes. Then the class that is furthest behind its share of all subjects gives its next one. Source: ours.

    Args:
        ordered: distinct subjects in a random order.
        classes: of each subject, those of all its cases.
    """
    own = {name: frozenset(classes[name]) for name in ordered}
    totals = Counter(label for found in own.values() for label in found)
    waiting = {label: [name for name in reversed(ordered) if label in own[name]] for label in totals}
    counts: Counter[int] = Counter()
    chosen: dict[str, None] = {}

    def choose(name: str) -> None:
        chosen[name] = None
        counts.update(own[name])

    for name in ordered:
        if any(not counts[label] for label in own[name]):
            choose(name)
    while len(chosen) < len(ordered):
        for names in waiting.values():
            while names and names[-1] in chosen:
                names.pop()
        size = len(chosen) + 1
        behind = {
            label: totals[label] * size - counts[label] * len(ordered) for label, names in waiting.items() if names
        }
        choose(waiting[max(behind, key=lambda label: (behind[label], label))].pop())
    return list(chosen)


def nested_subset(
    subjects: Iterable[str],
    num_subjects: int | None = None,
    label_fraction: float | None = None,
    seed: int = 0,
    classes: Mapping[str, Iterable[int]] | None = None,
) -> list[str]:
    """Return the first subjects of a fixed random order: a smaller subset lies inside every larger one.

    Args:
        subjects: names, repetitions allowed.
        num_subjects: how many to keep, or None.
        label_fraction: share to keep in (0, 1], rounded to the nearest count and at least 1, or None. At most one of
            both; with neither all are kept.
        seed: of the order; another seed is another draw of labels.
        classes: of each subject, for an order that takes them in proportion, see :func:`by_class`; None for any order.

    Returns:
        Sorted names.

    Raises:
        ValueError: if both are given, or one is out of range.
    """
    ordered = _ordered(subjects, seed, "subset")
    ordered = ordered if classes is None else by_class(ordered, classes)
    if num_subjects is not None and label_fraction is not None:
        raise ValueError(
            f"num_subjects={num_subjects} and label_fraction={label_fraction} are both given; set one of them to null"
        )
    if label_fraction is not None:
        if not 0 < label_fraction <= 1:
            raise ValueError(f"label_fraction is {label_fraction}; give a share above 0 and at most 1")
        num_subjects = max(1, math.floor(label_fraction * len(ordered) + 0.5))
    if num_subjects is None:
        return sorted(ordered)
    if not 1 <= num_subjects <= len(ordered):
        raise ValueError(f"num_subjects is {num_subjects}, but there are {len(ordered)} labelled training subjects")
    return sorted(ordered[:num_subjects])
