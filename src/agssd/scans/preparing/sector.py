"""Where frames show tissue: the sector of the probe, without text and marks burnt into the picture.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agssd.scans.frames import Box

_DARK = 0.02  # of the range of intensities above the background: what a lossy codec leaves there
_SCREEN = 0.1  # share of the border that is screen, where there is one
_SAMPLED = 64  # frames that are looked at
STILL = 5  # frames from which on what never changes is told from tissue
_BRIGHT = 0.6  # of the range: drawn text and marks are bright
_WINDOW = 0.04  # of the shorter side: wider than the strokes of letters and the gaps of speckle
_LARGE = 0.05  # of the largest piece: grey scales, logos and large letters are smaller
_MARGIN = 2  # pixels around text and marks, which are smoothed into it
_FLAT = 5  # side of a window without any grain
_PANEL = 0.003  # share of the picture that is flat at one grey value, in a header or panel beside the sector


def background_value(frames: NDArray[Any]) -> float:
    """Return the commonest value along the border of frames (T, H, W): the screen around the sector."""
    values, counts = np.unique(_border(frames), return_counts=True)
    return float(values[counts.argmax()])


def _border(frames: NDArray[Any]) -> NDArray[Any]:
    return np.concatenate([frames[:, (0, -1)].reshape(-1), frames[:, :, (0, -1)].reshape(-1)])


def sector(
    frames: NDArray[Any], drawn: NDArray[np.bool_] | None = None, regions: Sequence[Box] = ()
) -> NDArray[np.uint8]:
    """Return where frames show tissue, one sector for the whole sequence, less text and marks.

    Tissue is dense and writing is not: where more than half of a window of 4 % of the side is ever brighter than the
    screen around, tissue is shown. The convex hull of the large pieces of that is the sector: a fan, a rectangle, or a
    trapezoid. Shadows stay inside. From it are taken what is coloured, and in sequences of at least 5 frames that move
    what is bright and never changes. A grey value that fills flat areas in all frames, such as that of a header on
    which a name is written, counts as screen.

    Args:
        frames: (T, H, W) grey values.
        drawn: (T, H, W) bool, coloured pixels; None where there are none.
        regions: boxes outside of which no tissue is; empty where nobody says.

    Returns:
        (T, H, W) uint8, 1 = tissue; 1 everywhere where no screen is seen around it, 0 where all is writing.
    """
    from scipy import ndimage

    rows = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), _SAMPLED)).round().astype(int))
    some = frames[rows].astype(np.float32)
    span = max(float(some.max() - some.min()), 1e-6)
    screen = background_value(frames)
    if np.mean(np.abs(_border(some) - screen) <= _DARK * span) < _SCREEN:
        lit = np.ones(some.shape[1:], dtype=bool)
    else:
        lit = np.abs(some - screen).max(0) > _DARK * span
    for value in _flat_values(some, _DARK * span):
        lit &= (np.abs(some - value) > _DARK * span).any(0)
    if drawn is not None:
        lit &= ~drawn[rows].all(0)
    if regions:
        allowed = np.zeros(lit.shape, dtype=bool)
        for top, bottom, left, right in regions:
            allowed[max(top, 0) : bottom, max(left, 0) : right] = True
        lit &= allowed
    width = 2 * max(1, round(_WINDOW / 2 * min(lit.shape))) + 1
    solid = ndimage.uniform_filter(lit.astype(np.float32), width, mode="nearest") > 0.5
    inside = _hull(_large_pieces(solid)) if solid.any() else solid
    if regions:
        inside &= allowed
    marks = np.zeros(lit.shape, dtype=bool)
    if len(some) >= STILL:
        change = some.max(0) - some.min(0)
        if inside.any() and np.median(change[inside]) > 0.01 * span:  # the sequence moves
            marks = (change <= 0.004 * span) & (some[0] - some.min() > _BRIGHT * span)
            marks = ndimage.binary_dilation(marks, iterations=_MARGIN)
    found = np.broadcast_to(inside & ~marks, frames.shape).astype(np.uint8)
    if drawn is not None:
        spread = ndimage.binary_dilation(drawn, np.ones((1, 3, 3)), iterations=_MARGIN)
        found[spread] = 0
    return found


def _flat_values(frames: NDArray[np.float32], tolerance: float) -> list[float]:
    """Return the grey values that fill areas without grain and without change in frames (T, H, W)."""
    from scipy import ndimage

    low = ndimage.minimum_filter(frames.min(0), _FLAT)
    high = ndimage.maximum_filter(frames.max(0), _FLAT)
    middle = (low + high)[high - low <= tolerance] / 2
    if not middle.size:
        return []
    bins = np.floor((middle - middle.min()) / tolerance).astype(int)
    counts = np.bincount(bins)
    return [float(np.median(middle[bins == bin_])) for bin_ in np.flatnonzero(counts >= _PANEL * low.size)]


def _large_pieces(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    from scipy import ndimage

    parts, _ = ndimage.label(mask, np.ones((3, 3)))
    sizes = np.bincount(parts.reshape(-1))
    sizes[0] = 0
    return np.asarray((sizes >= _LARGE * sizes.max())[parts] & mask)


def _hull(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the convex hull of a mask (H, W), filled."""
    from scipy.spatial import ConvexHull, QhullError

    places = np.argwhere(mask)
    try:
        equations = ConvexHull(places).equations  # (edges, 3): outward normal and offset
    except QhullError:  # all on one line
        return mask
    rows, columns = np.ogrid[: mask.shape[0], : mask.shape[1]]
    filled = np.ones(mask.shape, dtype=bool)
    for normal_row, normal_column, offset in equations:
        filled &= normal_row * rows + normal_column * columns + offset <= 1e-6
    return filled
