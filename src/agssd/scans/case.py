"""A scan made ready for the cache: arrays in tensor order and the constants that belong to them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agssd.types import Triple


class RefusedError(ValueError):
    """A source that cannot become a case; the message is the reason, without the path."""


@dataclass
class PreparedCase:
    """One scan in tensor order (D, H, W) = (S, A, R increasing), or frames (T, H, W).

    Attributes:
        image: (C, D, H, W) int16; ``image * scale + offset`` is HU or the source's units.
        foreground: (D, H, W) uint8, 1 = body.
        label: (D, H, W) uint8 or int16, or None.
        modality: "ct", "mri" or "us".
        spacing_mm: of the arrays.
        affine: (4, 4) float64, voxel (d, h, w, 1) to world mm, RAS+.
        source_shape: of the source array as its file orders it (i, j, k).
        source_affine: (4, 4) float64, source voxel to world.
        source_sha256: of the bytes of the source; with several channels, of their hashes one after another.
        scale: per channel.
        offset: per channel.
        low: per channel, low end of the model's range.
        high: per channel, high end.
        edge_q99: per channel.
        perceptual_hash: of the first channel, see ``agssd.scans.preparing.perceptual``, or None where it would tell
            nothing.
        modality_reason: why the modality was decided so, or None where it was given.
        notes: what the user should know of this scan.
        spatial_dims: 2 for frames: the first axis counts them, H runs downwards and W to the right.
        in_mm: whether ``spacing_mm`` is in mm, or in pixels.
    """

    image: NDArray[np.int16]
    foreground: NDArray[np.uint8]
    label: NDArray[np.uint8] | NDArray[np.int16] | None
    modality: str
    spacing_mm: tuple[float, float, float]
    affine: NDArray[np.float64]
    source_shape: Triple
    source_affine: NDArray[np.float64]
    source_sha256: str
    scale: tuple[float, ...]
    offset: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    edge_q99: tuple[float, ...]
    perceptual_hash: str | None = None
    modality_reason: str | None = None
    notes: tuple[str, ...] = ()
    spatial_dims: int = 3
    in_mm: bool = True
