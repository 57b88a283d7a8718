"""All readouts of a frozen encoder on labelled volumes: one code for ``agssd probe`` and for the probe while training.

Figures, by name (``READOUT`` is linear_seg or knn_seg, linear_cls or knn_cls):

- ``READOUT_dice``, the mean over held-out subjects of a subject's mean Dice over classes, and ``READOUT_dice_C``, the
  mean of class C over subjects; a class absent from a volume is left out there where it is not predicted, and counts 0
  where it is;
- ``READOUT_balanced_accuracy`` and ``READOUT_auroc`` over held-out volumes;
- ``rankme_tokens`` and ``rankme_cls``, RankMe of the tokens and of the mean [CLS] of all volumes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol, get_args

import numpy as np
import torch

from agssd.evaluation.classification_probe import ProbeVector, probe_classification
from agssd.evaluation.collapse import rankme
from agssd.evaluation.folds import Fold
from agssd.evaluation.probe_features import ProbeFeatures, ProbeVolume
from agssd.evaluation.segmentation_probe import (
    STEPS,
    NeighbourReadout,
    ProbeCase,
    linear_segmenter,
    probe_segmentation,
)

ReadoutName = Literal["linear-seg", "knn-seg", "knn-cls", "linear-cls"]
READOUTS: tuple[ReadoutName, ...] = get_args(ReadoutName)


class ProbeData(Protocol):
    """Labelled volumes with their folds."""

    folds: tuple[Fold, ...]
    num_label_classes: int  # with background, 0 without label maps
    num_targets: int  # 0 without classes

    @property
    def num_subjects(self) -> int:
        """The number of subjects that are measured on."""
        ...

    def volumes(self) -> Iterator[ProbeVolume]:
        """Yield the volumes of every subject in the folds, in a fixed order."""
        ...

    def held_out_seen(self, seen: Mapping[str, Any] | None) -> int | None:
        """Return how many of the subjects that are measured on a record of training cases holds, None if unknown."""
        ...


class ProbeResult(NamedTuple):
    """What the readouts found."""

    figures: dict[str, float]
    by_subject: dict[str, dict[str, np.ndarray]]  # readout -> held-out subject -> Dice per class, or (accuracy,)


def kinds_of(readouts: Sequence[ReadoutName]) -> tuple[str, ...]:
    """Return what cases must have for ``readouts``: "label", "class" or both."""
    kinds = {"label": "seg", "class": "cls"}
    return tuple(kind for kind, ending in kinds.items() if any(name.endswith(ending) for name in readouts))


def possible_readouts(data: ProbeData) -> list[ReadoutName]:
    """Return the readouts that the labels of ``data`` allow."""
    return [name for name in READOUTS if (data.num_label_classes if name.endswith("seg") else data.num_targets) >= 2]


def figure_names(data: ProbeData, readouts: Sequence[ReadoutName]) -> list[str]:
    """Return the names of the figures of :func:`run_readouts`."""
    names = []
    for readout in readouts:
        stem = readout.replace("-", "_")
        if readout.endswith("seg"):
            names += [f"{stem}_dice", *(f"{stem}_dice_{value}" for value in range(1, data.num_label_classes))]
        else:
            names += [f"{stem}_balanced_accuracy", f"{stem}_auroc"]
    return [*names, "rankme_tokens", "rankme_cls"]


def all_finite(features: Sequence[ProbeFeatures]) -> bool:
    """Return whether no feature is infinite or NaN, which no readout could be fitted to."""
    return all(bool(f.tokens.isfinite().all()) and bool(f.cls.isfinite().all()) for f in features)


def run_readouts(
    features: Sequence[ProbeFeatures],
    data: ProbeData,
    readouts: Sequence[ReadoutName],
    linear_steps: int = STEPS,
    device: str | torch.device = "cpu",
) -> ProbeResult:
    """Return the figures of each readout on the held-out subjects of the folds.

    Args:
        features: of the volumes of ``data``.
        data: gives folds and numbers of classes.
        readouts: which.
        linear_steps: optimiser steps of linear segmentation.
        device: where token readouts are fitted.

    Raises:
        ValueError: if a fold has nothing to learn from, or would learn from what it predicts, or features are not
            finite.
    """
    if not all_finite(features):
        raise ValueError("the encoder's features are not finite: its weights, or the volumes, hold infinity or NaN")
    figures: dict[str, float] = {}
    by_subject: dict[str, dict[str, np.ndarray]] = {}
    cases = [ProbeCase(f.subject, f.tokens, f.labels) for f in features if f.labels is not None]
    vectors = [ProbeVector(f.subject, f.cls, f.target) for f in features if f.target is not None]
    for readout in readouts:
        stem = readout.replace("-", "_")
        if readout == "linear-seg" or readout == "knn-seg":
            fit = (
                partial(linear_segmenter, steps=linear_steps, device=device)
                if readout == "linear-seg"
                else partial(NeighbourReadout, device=device)
            )
            found = probe_segmentation(cases, data.folds, data.num_label_classes, fit)
            table = np.stack(list(found.values()))
            figures[f"{stem}_dice"] = _mean([_mean(row) for row in table])
            figures |= {f"{stem}_dice_{value + 1}": _mean(column) for value, column in enumerate(table.T)}
        else:
            kind: Literal["knn", "linear"] = "knn" if readout == "knn-cls" else "linear"
            scores, found = probe_classification(vectors, data.folds, data.num_targets, kind)
            figures |= {f"{stem}_{name}": scores[name] for name in ("balanced_accuracy", "auroc")}
        by_subject[readout] = found
    figures["rankme_tokens"] = float(rankme(torch.cat([f.tokens for f in features])))
    figures["rankme_cls"] = float(rankme(torch.stack([f.cls for f in features])))
    return ProbeResult(figures, by_subject)


def _mean(values: Sequence[float] | np.ndarray) -> float:
    """Return the mean of the finite entries, NaN where there is none."""
    finite = [float(value) for value in values if np.isfinite(value)]
    return float(np.mean(finite)) if finite else float("nan")
