"""A perceptual hash of a prepared scan: equal for one scan stored in other ways, far apart for two scans.

The subject key finds a person's other scans; the hash finds copies of one scan under another name, spacing, storage
order, data type or preprocessing, also between caches whose subject keys cannot be compared.

Source: sign bits of a low-frequency DCT, after the image hash of Zauner (thesis, Upper Austria University of Applied
Sciences, 2010), in 3D. Ours: the foreground box as the frame, the frequencies, the threshold.

Measured on the shared scans as ``agssd prepare`` stores them (2-core x86-64 CPU, 2026-11-21), differing bits of 512;
near duplicates are those that differ in at most 56:

==========================================  ==============================  =================
two different scans                         pairs, smallest, 1 %, median    near duplicates
==========================================  ==============================  =================
hippocampus crops, two people               18654: 117, 146, 200            none
hippocampus crops, one person               67: 101, 101, 150               none
whole MRI, two people                       79: 186, 188, 236               none
whole MRI, one person, other contrasts      12: 65, 65, 130                 none
simulated heads from one template           378: 66, 94, 176                none
==========================================  ==============================  =================

==========================================  ==============================  ==========================
one scan twice (median, largest; found)     whole MRI and CT (16)           hippocampus (194)
==========================================  ==============================  ==========================
25 storage orders of one head               0, 0; all                       -
twice the spacing (crops: 1 to 1.4)         15, 48; all                     15, 53; all
noise of 10 % of the intensity range        6, 16; all                      17, 38; all
blurred by 1 voxel and kept in 32 steps     3, 15; all                      2, 9; all
gamma 0.8                                   16, 23; all                     9, 21; all
up to 1, 2, 3 voxels cut off each side      31, 60, 82; 100, 94, 94 %       85, 150, 142; 74, 13, 0 %
==========================================  ==============================  ==========================

The 194 crops prepared again at 1.25 mm under another salt: all 156 that an encoder had seen at 1 mm were found (at most
36 bits) and none of the others; tests/scans/test_perceptual.py repeats this and the storage orders.

So it finds copies of whole scans, and of crops of 40 voxels where they were cut alike to about a voxel. Taken as
Gaussian, the distances of two people's hippocampus crops give 1 false alarm in 10^9 pairs; whole scans far fewer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agssd.scans.foreground import bounding_box

NUM_BITS = 512
MAX_DISTANCE = 56  # bits that may differ between near duplicates
_NUM_FREQUENCIES = 10  # per axis, from 0
_LEAST_VOX = 12  # along an axis, to tell these frequencies apart
_LOWEST = 12  # smallest squared norm of a frequency (k, l, m): below it all heads look alike
_BLOCK = 2048  # hashes of each side that are compared at once


def perceptual_hash(image: NDArray[Any], foreground: NDArray[np.uint8], low: float, high: float) -> str | None:
    """Return the hash of one channel of a prepared scan as 128 hexadecimal digits.

    The channel is scaled from [low, high] to [0, 1] and clipped, set to 0 outside the foreground, and projected on
    cosines that span the foreground's box; each bit is the sign of a coefficient.

    Args:
        image: (D, H, W) in the orientation of the cache, any type and unit.
        foreground: (D, H, W) uint8, non-zero = body.
        low: intensity at the low end of the model's range, in the unit of ``image``.
        high: intensity at the high end, above ``low``.

    Returns:
        None where the foreground's box is thinner than 12 voxels along an axis, or the scan is flat in it: such a hash
        would tell nothing.
    """
    box = tuple(slice(first, last) for first, last in bounding_box(foreground))
    body = foreground[box] != 0
    if min(body.shape) < _LEAST_VOX or not body.any():
        return None
    values = np.clip((image[box].astype(np.float32) - low) / (high - low), 0, 1) * body
    for length in values.shape:  # each turn takes the first axis away and appends its frequencies
        values = np.tensordot(values, _cosines(length), axes=(0, 1))
    coefficients = values[tuple(_frequencies())]
    if np.abs(coefficients).max() < 1e-5:  # rounding alone decides the signs
        return None
    return np.packbits(coefficients > 0).tobytes().hex()


def near_duplicates(one: Sequence[str | None], two: Sequence[str | None]) -> list[tuple[int, int, int]]:
    """Return (row in ``one``, row in ``two``, differing bits) of every pair of near duplicates, ordered by rows.

    Scans without a hash are near no other. Time grows with the product of the two lengths: 1000 against 100 000 take
    1.3 s (2-core x86-64 CPU, one thread, 2026-11-21). For the duplicates within one list give it twice and keep the
    pairs whose first row is the smaller.
    """
    rows, columns = (np.flatnonzero([text is not None for text in texts]) for texts in (one, two))
    found: list[tuple[int, int, int]] = []
    for first in range(0, len(rows), _BLOCK):
        some = rows[first : first + _BLOCK]
        signs = _signs([one[row] for row in some])
        for second in range(0, len(columns), _BLOCK):
            others = columns[second : second + _BLOCK]
            # of +-1, a product is what agrees minus what differs, exact in float32
            bits = (NUM_BITS - signs @ _signs([two[column] for column in others]).T) / 2
            near = np.argwhere(bits <= MAX_DISTANCE)
            found += [(int(some[i]), int(others[j]), int(bits[i, j])) for i, j in near]
    return sorted(found)


def _signs(hashes: Sequence[str | None]) -> NDArray[np.float32]:
    """Return (n, 512) float32, +1 for a set bit and -1 for the others."""
    packed = np.frombuffer(bytes.fromhex("".join(text or "" for text in hashes)), dtype=np.uint8)
    return 2 * np.unpackbits(packed.reshape(len(hashes), -1), axis=1).astype(np.float32) - 1


@lru_cache(maxsize=64)
def _cosines(length: int) -> NDArray[np.float32]:
    """Return (10, length) float32: half-waves over the length, taken at the centres of voxels."""
    phase = np.outer(np.arange(_NUM_FREQUENCIES), (np.arange(length) + 0.5) / length)
    return (np.cos(np.pi * phase) / length).astype(np.float32)


@lru_cache(maxsize=1)
def _frequencies() -> NDArray[np.int64]:
    """Return the (3, 512) frequencies of the bits, the lowest first."""
    every = np.indices((_NUM_FREQUENCIES,) * 3).reshape(3, -1)
    norm = (every**2).sum(axis=0)
    order = np.argsort(norm, kind="stable")
    return every[:, order[norm[order] >= _LOWEST][:NUM_BITS]]
