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
36 bits) and none of the others; tests/scans/preparing/test_perceptual.py repeats this and the storage orders.

So it finds copies of whole scans, and of crops of 40 voxels where they were cut alike to about a voxel. Taken as
Gaussian, the distances of two people's hippocampus crops give 1 false alarm in 10^9 pairs; whole scans far fewer.

Of frames (55 in the 7 files of shared ultrasound; 2-core x86-64 CPU, 2026-11-22) 1060 pairs of two files differ in 218
bits or more; the first frame of a file and its copy of half the size, with noise of 10 %, blurred and kept in 32 steps,
or with gamma 0.8 in at most 20. Of copies that lack 1, 3 or 10 pixels on each side 6, 5 and none of 7 are found.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agssd.scans.preparing.foreground import bounding_box

NUM_BITS = 512
MAX_DISTANCE = 56  # bits that may differ between near duplicates
_NUM_FREQUENCIES = {3: 10, 2: 27}  # per axis, from 0, by the number of axes
_LEAST_VOX = {3: 12, 2: 32}  # along an axis, to tell these frequencies apart
_LOWEST = 12  # smallest squared norm of a frequency ([k,] l, m): below it all heads look alike
_BLOCK = 2048  # hashes of each side that are compared at once


def perceptual_hash(image: NDArray[Any], foreground: NDArray[np.uint8], low: float, high: float) -> str | None:
    """Return the hash of one channel of a prepared scan, or of a frame, as 128 hexadecimal digits.

    The channel is scaled from [low, high] to [0, 1] and clipped, set to 0 outside the foreground, and projected on
    cosines that span the foreground's box; each bit is the sign of a coefficient. Of a frame the mean in the foreground
    is taken away first, because the sector's outline is the scanner's and not the picture's.

    Args:
        image: ([D,] H, W) in the orientation of the cache, any type and unit.
        foreground: ([D,] H, W) uint8, non-zero = body.
        low: intensity at the low end of the model's range, in the unit of ``image``.
        high: intensity at the high end, above ``low``.

    Returns:
        None where the foreground's box is thinner than 12 voxels (of a frame 32 pixels) along an axis, or the scan is
        flat in it: such a hash would tell nothing.
    """
    dims = image.ndim
    box = tuple(slice(*ends) for ends in bounding_box(foreground.reshape(-1, *foreground.shape[-2:]))[-dims:])
    body = foreground[box] != 0
    if min(body.shape) < _LEAST_VOX[dims] or not body.any():
        return None
    values = np.clip((image[box].astype(np.float32) - low) / (high - low), 0, 1) * body
    if dims == 2:
        values -= values.sum() / body.sum() * body
    for length in values.shape:  # each turn takes the first axis away and appends its frequencies
        values = np.tensordot(values, _cosines(length, _NUM_FREQUENCIES[dims]), axes=(0, 1))
    coefficients = values[tuple(_frequencies(dims))]
    if np.abs(coefficients).max() < 1e-5:  # rounding alone decides the signs
        return None
    return np.packbits(coefficients > 0).tobytes().hex()


def perceptual_hash_of_frames(
    frames: NDArray[Any], foreground: NDArray[np.uint8], low: float, high: float
) -> str | None:
    """Return the hashes of a sequence's frames (T, H, W) one after another, or None without any.

    A frame that is within half of what near duplicates may differ by from an earlier one adds none.
    """
    kept: list[str] = []
    for frame, body in zip(frames, foreground, strict=True):
        found = perceptual_hash(frame, body, low, high)
        if found is not None and all(bits > MAX_DISTANCE // 2 for _, _, bits in near_duplicates([found], kept)):
            kept.append(found)
    return "".join(kept) or None


def single_hashes(text: str | None) -> list[bytes]:
    """Return the hashes of which a case's consists, 64 bytes each: one of a volume, any number of frames."""
    data = bytes.fromhex(text or "")
    return [data[start : start + NUM_BITS // 8] for start in range(0, len(data), NUM_BITS // 8)]


def near_duplicates(one: Sequence[str | None], two: Sequence[str | None]) -> list[tuple[int, int, int]]:
    """Return (row in ``one``, row in ``two``, differing bits) of every pair of near duplicates, ordered by rows.

    Sequences of frames are compared by their nearest frames. Scans without a hash are near no other. Time grows with
    the product of the two lengths: 1000 against 100 000 take 1.3 s (2-core x86-64 CPU, one thread, 2026-11-21). For the
    duplicates within one list give it twice and keep the pairs whose first row is the smaller.
    """
    (rows, hashes), (columns, others) = _rows_and_bytes(one), _rows_and_bytes(two)
    found: dict[tuple[int, int], int] = {}
    for first in range(0, len(rows), _BLOCK):
        signs = _signs(hashes[first : first + _BLOCK])
        for second in range(0, len(columns), _BLOCK):
            # of +-1, a product is what agrees minus what differs, exact in float32
            bits = (NUM_BITS - signs @ _signs(others[second : second + _BLOCK]).T) / 2
            for i, j in np.argwhere(bits <= MAX_DISTANCE):
                pair = (int(rows[first + i]), int(columns[second + j]))
                found[pair] = min(int(bits[i, j]), found.get(pair, NUM_BITS))
    return sorted((*pair, bits) for pair, bits in found.items())


def _rows_and_bytes(texts: Sequence[str | None]) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Return the row of each single hash, (n,), and the hashes, (n, 64)."""
    hashes = [(row, piece) for row, text in enumerate(texts) for piece in single_hashes(text)]
    rows = np.array([row for row, _ in hashes], dtype=np.int64)
    return rows, np.frombuffer(b"".join(piece for _, piece in hashes), dtype=np.uint8).reshape(-1, NUM_BITS // 8)


def _signs(packed: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return (n, 512) float32, +1 for a set bit and -1 for the others, of (n, 64) bytes."""
    return 2 * np.unpackbits(packed, axis=1).astype(np.float32) - 1


@lru_cache(maxsize=64)
def _cosines(length: int, count: int) -> NDArray[np.float32]:
    """Return (count, length) float32: half-waves over the length, taken at the centres of voxels."""
    phase = np.outer(np.arange(count), (np.arange(length) + 0.5) / length)
    return (np.cos(np.pi * phase) / length).astype(np.float32)


@lru_cache(maxsize=2)
def _frequencies(dims: int) -> NDArray[np.int64]:
    """Return the (dims, 512) frequencies of the bits, the lowest first."""
    every = np.indices((_NUM_FREQUENCIES[dims],) * dims).reshape(dims, -1)
    norm = (every**2).sum(axis=0)
    order = np.argsort(norm, kind="stable")
    return every[:, order[norm[order] >= _LOWEST][:NUM_BITS]]
