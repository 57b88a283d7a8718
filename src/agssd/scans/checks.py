"""Checks of one scan: pure functions from arrays and geometry to findings.

All ranges and thresholds here are ours: chosen so that the clinical scans at hand pass, and stated in the sentences.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from agssd.scans.findings import Finding
from agssd.scans.preparing.volumes import CT_RANGE_HU, guess_modality
from agssd.scans.read import Scan

PLAUSIBLE_SPACING_MM = (0.15, 10.0)
PLAUSIBLE_EXTENT_MM = (15.0, 2200.0)  # along any axis
PLAUSIBLE_WIDTH_MM = 800.0  # along the second longest axis: only one axis is as long as a person
THICK_SLICES = 3.0  # largest over smallest spacing
CLIPPED_MRI = (0.0005, 0.01)  # share of the body at the highest value: worth a remark, a warning
FEW_LEVELS = {"ct": 256, "mri": 48}
SMALL_BODY = 0.01
LABEL_OUTSIDE = (0.1, 0.9)  # share of the label outside the body: a warning, an error
_SAMPLE = 1_000_000  # voxels looked at where a share is enough
_SPIKE = 5.0  # times the count of its neighbours makes a value stand out


class Spike(NamedTuple):
    """An extreme value that holds in far more voxels than the values beside it."""

    value: float
    share: float  # of all voxels


def check_geometry(shape: tuple[int, ...], affine: NDArray[np.float64]) -> list[Finding]:
    """Check voxel size and field of view.

    Args:
        shape: (I, J, K) of the source.
        affine: (4, 4), its voxels to mm.
    """
    spacing = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    extent = np.sort(spacing * np.asarray(shape))
    found = []
    low, high = PLAUSIBLE_SPACING_MM
    if spacing.min() < low or spacing.max() > high:
        found.append(
            Finding("spacing", "warning", f"Voxels of {_times(spacing)} mm; clinical scans have {low} to {high:g} mm.")
        )
    shortest, longest = PLAUSIBLE_EXTENT_MM
    if extent[0] < shortest or extent[2] > longest or extent[1] > PLAUSIBLE_WIDTH_MM:
        found.append(
            Finding(
                "field-of-view",
                "warning",
                f"Its extent is {_times(spacing * np.asarray(shape))} mm; plausible is {shortest:g} to {longest:g} mm, "
                f"and at most {PLAUSIBLE_WIDTH_MM:g} mm along two axes.",
            )
        )
    ratio = spacing.max() / spacing.min()
    if ratio >= THICK_SLICES:
        found.append(
            Finding("anisotropy", "info", f"Voxels of {_times(spacing)} mm: one axis is {ratio:.1f} times as coarse.")
        )
    return found


def check_intensities(scan: Scan, modality: str, stated: bool, body_fraction: float) -> list[Finding]:
    """Check modality, clipping and grey levels of a source.

    Args:
        scan: as read.
        modality: "ct" or "mri", as it is prepared.
        stated: whether user or header said so; else it was guessed.
        body_fraction: share of foreground in the volume.
    """
    array = scan.array
    top, bottom = spike(array, highest=True), spike(array, highest=False)
    found = _check_modality(scan, modality, stated, top, bottom)
    if modality == "ct":
        low, high = CT_RANGE_HU
        if bottom is not None and bottom.value > low + 100 and bottom.share >= 0.01:
            found.append(
                Finding(
                    "clipped",
                    "warning",
                    f"The lowest value, {bottom.value:g} HU, holds in {_percent(bottom.share)} of all voxels: what is "
                    "darker was cut off.",
                )
            )
        if top is not None and top.share >= 1e-4 and top.value < 3000:
            cut = top.value < high
            found.append(
                Finding(
                    "clipped",
                    "warning" if cut else "info",
                    f"The highest value, {top.value:g} HU, holds in {_percent(top.share)} of all voxels: what is "
                    f"brighter was cut off{'' if cut else ', outside the range that models see'}.",
                )
            )
    elif top is not None and top.share / max(body_fraction, 1e-6) >= CLIPPED_MRI[0]:
        share = min(top.share / body_fraction, 1.0)
        found.append(
            Finding(
                "clipped",
                "warning" if share >= CLIPPED_MRI[1] else "info",
                f"The highest value, {top.value:g}, holds in {_percent(share)} of the body: what is brighter was cut "
                "off.",
            )
        )
    sample = _sampled(array)
    levels = len(np.unique(sample))
    if levels <= FEW_LEVELS[modality] and sample.size > 100 * levels:
        found.append(Finding("grey-levels", "warning", f"The image has only {levels} different values."))
    return found


def _check_modality(scan: Scan, modality: str, stated: bool, top: Spike | None, bottom: Spike | None) -> list[Finding]:
    array = scan.array
    looks, why = guess_modality(replace(scan, modality=None))
    if stated and modality == "mri" and looks == "ct":
        return [Finding("modality", "warning", f"Stated mri, but it looks like CT: {why}.")]
    if modality == "ct" and looks == "mri":
        sample = _sampled(array)
        low, high = (float(value) for value in np.percentile(sample, (0.5, 99.5)))
        fat = np.count_nonzero(sample < -50) / sample.size
        if high - low < 100 or high > 5000 or fat < 0.001:
            return [
                Finding(
                    "modality",
                    "warning",
                    f"Stated ct, but it looks like MRI: no air near -1000 HU, {_percent(fat)} of the voxels are as "
                    f"dark as fat, and 99 % lie between {low:.4g} and {high:.4g}.",
                )
            ]
    if modality == "ct" or stated:
        return []
    cut = bottom is not None and bottom.share > 1e-3 and -1024 <= bottom.value <= -50
    if cut and bottom is not None:
        window = f"{bottom.value:g} to {top.value:g} HU" if top is not None else f"{bottom.value:g} HU upwards"
        may_be = f"it may be a CT cut to the window from {window}"
    elif _looks_like_stored_ct(array):
        may_be = "it may be a CT whose values were not turned to HU: air near 0, and soft tissue near 1024"
    else:
        return []
    return [Finding("modality", "warning", f"Taken for mri, because {why}, but {may_be}.")]


def _looks_like_stored_ct(array: NDArray[Any]) -> bool:
    """Return whether an image looks like a CT with 1024 added: air near 0, and soft tissue in a narrow range near 1024.

    Of the voxels above 500, 80 % must lie within 150 of 1024, or half within 60 of 1064, as brain and muscle do. In the
    shared CT 92 % and 46 % do; in the shared MRI, each scaled to the brightness that brings most there, at most 70 %
    and 36 % (``tests/scans/test_checks.py``).
    """
    sample = _sampled(array).astype(np.float64)
    solid = sample[sample > 500]
    if sample.min() < 0 or np.mean(sample <= 150) < 0.005 or len(solid) < 0.02 * sample.size:
        return False
    return bool(np.mean(np.abs(solid - 1024) <= 150) >= 0.8 or np.mean(np.abs(solid - 1064) <= 60) >= 0.5)


def check_prepared(
    foreground: NDArray[np.uint8], label: NDArray[Any] | None, edge_q99: tuple[float, ...], modality: str
) -> list[Finding]:
    """Check what models will see of a case: body, label and edges.

    Args:
        foreground: (D, H, W), non-zero = body.
        label: (D, H, W) integers, 0 = background, or None.
        edge_q99: per channel.
        modality: "ct" or "mri".
    """
    found = []
    body = foreground != 0
    fraction = np.count_nonzero(body) / body.size
    if fraction == 0:
        found.append(Finding("foreground", "error", "The foreground is empty."))
    elif fraction < SMALL_BODY:
        found.append(Finding("foreground", "warning", f"The body fills only {_percent(fraction)} of the volume."))
    for channel, value in enumerate(edge_q99):
        if value == 0:
            which = f"Channel {channel}" if len(edge_q99) > 1 else "The image"
            found.append(Finding("flat", "warning", f"{which} has no edges in the body: edge-aware masks see nothing."))
    if label is None:
        return found
    labelled = label != 0
    count = int(np.count_nonzero(labelled))
    if not count:
        found.append(Finding("label-empty", "warning", "No voxel is labelled at the stored spacing."))
        return found
    outside = np.count_nonzero(labelled & ~body) / count
    if outside >= LABEL_OUTSIDE[0]:
        severity = "error" if outside >= LABEL_OUTSIDE[1] else "warning"
        what = "misses the body" if severity == "error" else "reaches beyond the body"
        found.append(Finding("label-outside", severity, f"The label {what}: {_percent(outside)} of it lie outside."))
    return found


def spike(array: NDArray[Any], highest: bool) -> Spike | None:
    """Return the highest or lowest value if it is a saturated one, else None.

    It is if it holds in at least 20 voxels and in 5 times as many as a typical value within 2 % of the range beside it.

    Args:
        array: any shape; integers or floats without NaN.
        highest: which end.
    """
    low, high = float(array.min()), float(array.max())
    margin = 0.02 * (high - low)
    near = array[array >= high - margin] if highest else array[array <= low + margin]
    values, counts = np.unique(near, return_counts=True)
    extreme, others = (counts[-1], counts[:-1]) if highest else (counts[0], counts[1:])
    if extreme < 20 or (len(others) and extreme < _SPIKE * np.median(others)):
        return None
    return Spike(float(values[-1] if highest else values[0]), float(extreme / array.size))


def _sampled(array: NDArray[Any]) -> NDArray[Any]:
    """Return about a million voxels spread over the array, flat; an odd step does not stay in one column."""
    return np.asarray(array.reshape(-1, order="A")[:: (array.size // _SAMPLE) | 1])


def _percent(share: float) -> str:
    value = 100 * share
    return f"{value:.0f} %" if value >= 10 else f"{value:.2g} %"


def _times(values: NDArray[np.float64]) -> str:
    return " x ".join(f"{value:.3g}" for value in values)
