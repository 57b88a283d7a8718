"""A cohort of simulated torsos, made from one real labelled CT.

Every subject is the same person's scan, deformed and degraded: what differs between people is not in it, so figures
measured on this cohort say nothing about patients. What it has and single structures have not: many organs in one scan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agssd.scans.case import RefusedError
from agssd.scans.preparing.label_groups import LabelGroups
from agssd.scans.preparing.volumes import CT_CLIP_HU, Recipe, prepare_case
from agssd.scans.simulated.heads import write_subjects

_NUM_CONTROL_POINTS = 7
_MAX_SHIFT_MM = 12.0


@dataclass(frozen=True)
class LabelledScan:
    """A CT with its label map, arrays in NIfTI order (i, j, k) = (R, A, S).

    Attributes:
        image: HU, float32.
        label: classes, uint8.
        affine: (4, 4) voxel to world mm.
    """

    image: NDArray[np.float32]
    label: NDArray[np.uint8]
    affine: NDArray[np.float64]


def load_labelled_scan(scan: Path, label: Path, groups: LabelGroups | None, spacing_mm: float) -> LabelledScan:
    """Return a CT with its label map at one isotropic spacing, read as ``agssd prepare`` reads it.

    Raises:
        ValueError: if either file cannot be used, or the map has more than 255 classes or none.
    """
    try:
        case = prepare_case([scan], label, "ct", Recipe((spacing_mm,) * 3, label_groups=groups))
    except RefusedError as error:
        raise ValueError(f"{scan}: {error}") from error
    assert case.label is not None
    if not 0 < case.label.max() < 256:
        raise ValueError(f"{label} has {case.label.max()} classes; give 1 to 255, for example by --label-groups")
    image, classes = case.image[0].transpose(2, 1, 0).astype(np.float32), case.label.transpose(2, 1, 0)
    return LabelledScan(image, classes.astype(np.uint8), case.affine[:, [2, 1, 0, 3]])


def draw_ct_parameters(rng: np.random.Generator, num_classes: int) -> dict[str, Any]:
    """Return one subject's parameters: shape (affine, elastic), then contrast of the organs, and noise.

    Elastic displacements are at most 12 mm between control points, rotations at most 6 degrees. Each class is shifted
    by up to 25 HU, as phases of contrast agent do; noise has a standard deviation of 10 to 40 HU.

    Args:
        rng: random numbers of the subject.
        num_classes: without background.
    """
    control = rng.uniform(-_MAX_SHIFT_MM, _MAX_SHIFT_MM, (*[_NUM_CONTROL_POINTS] * 3, 3))
    for axis in range(3):
        for border in (0, 1, -2, -1):
            control[(slice(None),) * axis + (border,)] = 0.0
    return {
        "scales": tuple(rng.uniform(0.88, 1.12, 3)),
        "degrees": tuple(rng.uniform(-6.0, 6.0, 3)),
        "translation": tuple(rng.uniform(-10.0, 10.0, 3)),
        "control_points": control.astype(np.float32),
        "shift_hu": np.array([0.0, *rng.uniform(-25.0, 25.0, num_classes)], np.float32),
        "noise_hu": float(rng.uniform(10.0, 40.0)),
        "noise_seed": int(rng.integers(2**31)),
    }


def simulate_ct(scan: LabelledScan, parameters: Mapping[str, Any]) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """Return image in HU and label map of one subject, both on the scan's grid; air where the body does not reach.

    Args:
        scan: from :func:`load_labelled_scan`.
        parameters: from :func:`draw_ct_parameters`.
    """
    import torch
    import torchio as tio

    low, high = CT_CLIP_HU
    above_air = torch.from_numpy(scan.image - low)[None]  # what comes in from outside is 0, which is to be air
    subject: Any = tio.Subject(
        image=tio.ScalarImage(tensor=above_air, affine=scan.affine),
        label=tio.LabelMap(tensor=torch.from_numpy(scan.label)[None], affine=scan.affine),
    )
    steps = [
        tio.Affine(parameters["scales"], parameters["degrees"], parameters["translation"], default_pad_value=0.0),
        tio.ElasticDeformation(parameters["control_points"], (_MAX_SHIFT_MM,) * 3),
    ]
    with torch.random.fork_rng(devices=[]):  # torchio draws a number to decide whether to apply a transform
        for step in steps:
            subject = step(subject)
    label = subject["label"].numpy()[0].astype(np.uint8)
    noise = np.random.default_rng(parameters["noise_seed"]).normal(0.0, parameters["noise_hu"], label.shape)
    image = subject["image"].numpy()[0] + low + parameters["shift_hu"][label] + noise
    return np.clip(np.rint(image), low, high).astype(np.int16), label


def write_copies(
    folder: Path,
    counts: Mapping[str, int],
    scan: LabelledScan,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, count: None,
) -> Path:
    """Write deformed copies of a CT as :func:`agssd.scans.simulated.heads.write_cohort` writes heads."""
    num_classes = int(scan.label.max())

    def make(rng: np.random.Generator) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
        return simulate_ct(scan, draw_ct_parameters(rng, num_classes))

    return write_subjects(folder, counts, make, scan.affine, "ct", seed, progress)
