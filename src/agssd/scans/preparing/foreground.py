"""Where the body is: a foreground mask from intensities alone."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

BODY_HU = -500.0
CLOSING_MM = 3.0


def ct_foreground(image: NDArray[Any]) -> NDArray[np.uint8]:
    """Return the body in a CT: the largest component above -500 HU, holes filled in every axial slice.

    Filling keeps the lungs. Source: docs/method.md §1.3 (ours).

    Args:
        image: (D, H, W) in HU.

    Returns:
        (D, H, W) uint8, 1 = body; all 0 where nothing is above -500 HU.
    """
    return _fill_slices(_largest(image > BODY_HU)).astype(np.uint8)


def constant_background(image: NDArray[Any]) -> float | None:
    """Return the value of the background where exactly one constant fills it, as after skull stripping, else None.

    The value must hold in the majority of the voxels and be 90 % of those below Otsu's threshold, so that a noisy
    background that happens to peak at 0 does not count.

    Args:
        image: (D, H, W) before any interpolation.
    """
    values, counts = np.unique(image, return_counts=True)
    row = int(counts.argmax())
    if counts[row] <= 0.5 * image.size:
        return None
    low = image <= otsu(image)
    constant = image == values[row]
    same = np.count_nonzero(low & constant)
    return (
        float(values[row]) if same >= 0.9 * np.count_nonzero(constant) and same >= 0.8 * np.count_nonzero(low) else None
    )


def mri_foreground(image: NDArray[Any], spacing_mm: tuple[float, float, float]) -> NDArray[np.uint8]:
    """Return the body in an MRI whose background is noise: Otsu, closing, the largest component, holes filled.

    Otsu works on the square root of the intensity: on the intensity itself bright fluid or fat pulls the threshold
    above dim tissue (share of foreground in FLAIR, T1 and T2 of one shared head: 0.21, 0.36, 0.35 so, and 0.33, 0.38,
    0.37 with the root).

    A crop that lies within the body has no background to separate: where the darker class is not clearly air, that is
    where its median is above a quarter of the brighter one's, everything is foreground.

    Source: docs/method.md §1.3 (Otsu and closing); the root, the air test and the filling are ours.

    Args:
        image: (D, H, W).
        spacing_mm: of the voxels, for the closing of 3 mm.

    Returns:
        (D, H, W) uint8, 1 = body.
    """
    positive = np.maximum(image - min(float(np.percentile(image, 0.5)), 0.0), 0.0)
    root = np.sqrt(positive)
    bright = root > otsu(root)
    if not bright.any() or bright.all() or np.median(positive[~bright]) > 0.25 * np.median(positive[bright]):
        return np.ones(image.shape, dtype=np.uint8)
    return _fill_slices(_largest(_close(bright, spacing_mm))).astype(np.uint8)


def stripped_foreground(image: NDArray[Any], background: float) -> NDArray[np.uint8]:
    """Return what differs from the constant background, holes filled in every axial slice, (D, H, W) uint8."""
    return _fill_slices(image != background).astype(np.uint8)


def otsu(image: NDArray[Any], bins: int = 256) -> float:
    """Return Otsu's threshold of an image over the range up to its 99.5th percentile."""
    low, high = (float(value) for value in (image.min(), np.percentile(image, 99.5)))
    if high <= low:
        return low
    counts, edges = np.histogram(np.clip(image, low, high), bins=bins, range=(low, high))
    centres = (edges[1:] + edges[:-1]) / 2
    below = np.cumsum(counts)[:-1].astype(np.float64)
    above = counts.sum() - below
    sums = np.cumsum(counts * centres)
    mean_below = sums[:-1] / np.maximum(below, 1)
    mean_above = (sums[-1] - sums[:-1]) / np.maximum(above, 1)
    return float(edges[1:-1][np.argmax(below * above * (mean_below - mean_above) ** 2)])


def _largest(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    from scipy import ndimage

    labels, count = ndimage.label(mask)
    if count < 2:
        return mask
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return cast("NDArray[np.bool_]", labels == sizes.argmax())


def _close(mask: NDArray[np.bool_], spacing_mm: tuple[float, float, float]) -> NDArray[np.bool_]:
    """Close gaps of up to twice ``CLOSING_MM`` with a ball in millimetres."""
    from scipy import ndimage

    outside = ndimage.distance_transform_edt(~mask, sampling=spacing_mm)
    grown = np.pad(outside <= CLOSING_MM, 1, mode="edge")
    inside = ndimage.distance_transform_edt(grown, sampling=spacing_mm)[1:-1, 1:-1, 1:-1]
    return cast("NDArray[np.bool_]", (inside > CLOSING_MM) | mask)


def _fill_slices(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    from scipy import ndimage

    return np.stack([ndimage.binary_fill_holes(axial) for axial in mask])


def bounding_box(mask: NDArray[np.uint8]) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Return [start, end) per axis of the non-zero voxels; the whole array where there are none."""
    box = []
    for axis, length in enumerate(mask.shape):
        used = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        box.append((int(used[0]), int(used[-1]) + 1) if used.size else (0, int(length)))
    return box[0], box[1], box[2]
