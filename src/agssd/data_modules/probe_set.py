"""Labelled volumes of a cache with the folds that a frozen encoder is probed by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from agssd.data_modules.cache import CaseInfo, VolumeCache
from agssd.data_modules.leakage import Overlap, overlap
from agssd.data_modules.subsets import fold_subjects, nested_subset
from agssd.evaluation.folds import Fold
from agssd.evaluation.probe_features import ProbeVolume
from agssd.geometry import per_sample
from agssd.transforms.intensity import to_model_range
from agssd.types import Triple

MAX_FRAMES = 8  # of a sequence


class ProbeSet:
    """Cases of a cache that have a label map or a class, and who is learnt from and measured on.

    With ``num_folds`` the subjects of the split "train" take turns; without, the split "train" is learnt from and "val"
    measured on. The split "test" stays untouched unless it is asked for.

    Args:
        cache: open cache.
        num_folds: folds by subject of the split "train"; None for train against val.
        num_subjects: labelled subjects per fold to learn from; None for all.
        num_held_out: subjects per fold to measure on; None for all.
        subset_seed: which draw of them; see :meth:`subset`.
        at_most: take fewer subjects where there are not as many, instead of refusing.
        max_vox: read at most so many voxels per axis, from the middle of the volume; None for whole volumes.
        num_label_classes: with background; None for what the label maps hold.
        kinds: "label" and "class", what a case may count by.
        measured_on: the split that is measured on without folds.

    Attributes:
        rows: of every case in a fold.
        folds: who is learnt from, who is measured on.
        num_label_classes: 0 without label maps.
        num_targets: 0 without classes.

    Raises:
        ValueError: for a cache without such cases, impossible numbers, or labels outside the classes.
    """

    def __init__(
        self,
        cache: VolumeCache,
        num_folds: int | None = None,
        num_subjects: int | None = None,
        num_held_out: int | None = None,
        subset_seed: int = 0,
        at_most: bool = False,
        max_vox: int | None = None,
        num_label_classes: int | None = None,
        kinds: tuple[str, ...] = ("label", "class"),
        measured_on: Literal["val", "test"] = "val",
    ) -> None:
        self.cache, self.max_vox, self.kinds = cache, max_vox, kinds
        subjects = {split: self._subjects(split) for split in ("train", measured_on)}
        if not subjects["train"]:
            what = "labelled case" if "label" in kinds else "case with a class"
            raise ValueError(f"{cache.path} has no {what} in its split 'train'; see agssd inspect {cache.path}")
        if num_folds is None:
            if not subjects[measured_on]:
                raise ValueError(
                    f"{cache.path} has no labelled case in its split {measured_on!r} to measure on; measure by folds "
                    "of the split 'train' instead"
                )
            turns = [(subjects["train"], subjects[measured_on])]
        else:
            parts = fold_subjects(subjects["train"], num_folds)
            turns = [([s for other in parts if other is not held for s in other], held) for held in parts]

        def drawn(names: list[str], number: int | None) -> tuple[str, ...]:
            if at_most and number is not None:
                number = min(number, len(names))
            return tuple(self.subset(names, number, None, subset_seed))

        self.folds = tuple(Fold(drawn(rest, num_subjects), drawn(held, num_held_out)) for rest, held in turns)
        used = {subject for fold in self.folds for part in fold for subject in part}
        splits = ("train",) if num_folds is not None else ("train", measured_on)
        self.rows = [
            row
            for row, info in enumerate(cache.cases)
            if info.split in splits and info.subject in used and self._has(row)
        ]
        self.num_targets = len(cache.class_names) if any(self._target(row) is not None for row in self.rows) else 0
        self.num_label_classes = self._label_classes(num_label_classes)

    def subset(
        self,
        subjects: Sequence[str],
        num_subjects: int | None = None,
        label_fraction: float | None = None,
        seed: int = 0,
    ) -> list[str]:
        """Return the subjects that the data module of a task takes too: in proportion where only classes count.

        Args:
            subjects: see :func:`agssd.data_modules.subsets.nested_subset`, as all arguments.
            num_subjects: how many to keep.
            label_fraction: share to keep.
            seed: of the order.
        """
        classes: dict[str, set[int]] | None = None
        if self.kinds == ("class",):
            wanted = set(subjects)
            classes = {}
            for info in self.cache.cases:
                if info.subject in wanted and info.class_index is not None:
                    classes.setdefault(info.subject, set()).add(info.class_index)
        return nested_subset(subjects, num_subjects, label_fraction, seed, classes)

    def _has(self, row: int) -> bool:
        return self._labelled(row) or self._target(row) is not None

    def _labelled(self, row: int) -> bool:
        return "label" in self.kinds and self.cache.cases[row].label_values is not None

    def _target(self, row: int) -> int | None:
        return self.cache.cases[row].class_index if "class" in self.kinds else None

    def _subjects(self, split: str) -> list[str]:
        return sorted({self.cache.cases[row].subject for row in self.cache.select(split=split) if self._has(row)})

    def _label_classes(self, wanted: int | None) -> int:
        values = {v for row in self.rows if self._labelled(row) for v in self.cache.cases[row].label_values or ()}
        if not values:
            return 0
        number = wanted or max(values) + 1
        if min(values) < 0 or max(values) >= number or number < 2:
            raise ValueError(
                f"labels in {self.cache.path} hold {min(values)} to {max(values)}, which needs --num-classes "
                f"{max(max(values) + 1, 2)}"
            )
        return number

    @property
    def num_subjects(self) -> int:
        """The number of subjects that are measured on."""
        return len({subject for fold in self.folds for subject in fold.held_out})

    def volumes(self) -> Iterator[ProbeVolume]:
        """Yield the volumes in the order of ``rows``, read now; of a sequence at most 8 evenly spread frames, each."""
        for row in self.rows:
            info = self.cache.cases[row]
            size = info.shape if self.max_vox is None else _at_most(info.shape, self.max_vox)
            start = tuple((whole - part) // 2 for whole, part in zip(info.shape, size, strict=True))
            for box in _boxes(info, (start[0], start[1], start[2]), size):
                image = read_in_model_range(self.cache, row, *box)
                label = torch.from_numpy(self.cache.read(row, *box, "label")) if self._labelled(row) else None
                if info.spatial_dims == 2:
                    image, label = image[:, 0], None if label is None else label[0]
                yield ProbeVolume(info.subject, image, label, self._target(row))

    def held_out_overlap(self, seen: Mapping[str, Any] | None) -> Overlap | None:
        """Return what of the cases that are measured on is in a record of training cases; None where nobody knows.

        Args:
            seen: the encoder's record, see :mod:`agssd.data_modules.leakage`.
        """
        if seen is None:
            return None
        held_out = {subject for fold in self.folds for subject in fold.held_out}
        rows = [(0, row) for row in self.rows if self.cache.cases[row].subject in held_out]
        return overlap(seen, [self.cache], rows)

    def held_out_seen(self, seen: Mapping[str, Any] | None) -> int | None:
        """Return how many of the subjects that are measured on were trained on; None where nobody knows."""
        found = self.held_out_overlap(seen)
        return None if found is None else len(found.subjects)


def _boxes(info: CaseInfo, start: Triple, size: Triple) -> list[tuple[Triple, Triple]]:
    """Return what is read of a case at a time: the box itself, or of a sequence that part of some frames."""
    if info.spatial_dims == 3:
        return [(start, size)]
    count = info.shape[0]
    frames = torch.linspace(0, count - 1, min(count, MAX_FRAMES)).round().int().tolist()
    return [((frame, *start[1:]), (1, *size[1:])) for frame in frames]


def read_in_model_range(cache: VolumeCache, row: int, start: Triple, size: Triple) -> Tensor:
    """Return the box [start, start + size) of a case as encoders take it, (C, D, H, W) float32.

    Args:
        cache: open cache.
        row: of the case.
        start: first voxel.
        size: voxels.
    """
    info = cache.cases[row]
    stored = torch.from_numpy(cache.read(row, start, size, "image")).float()[None]  # (1, C, D, H, W)
    scale, offset, low, high = (torch.tensor([getattr(info, n)]) for n in ("scale", "offset", "low", "high"))
    real = stored * per_sample(scale, stored) + per_sample(offset, stored)
    return to_model_range(real, low, high, torch.tensor([info.modality == "ct"]))[0]


def _at_most(shape: Triple, limit: int) -> Triple:
    return min(shape[0], limit), min(shape[1], limit), min(shape[2], limit)
