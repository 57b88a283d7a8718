"""Supervoxels: compact pieces of nearly equal intensity, of a size given in mm."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agssd.regions.source import RegionCase, numbered_by_frame, require

_SAME_SPACING = 1.02  # ratio of the largest to the smallest, up to which voxels are taken for cubes
_SIZE_MM = 16.0
_PIECES = 100  # of a body too small for pieces of 16 mm


@dataclass(frozen=True)
class Supervoxels:
    """SLIC in the foreground's box, cut to the foreground; of frames each is cut into superpixels of its own.

    Distances are in mm: where voxels are no cubes, SLIC works on a grid of as many cubic ones. Outside the foreground
    the image is put as far below its range as it is wide, so that pieces end at the body's border.

    Source: Achanta et al. 2012 (SLIC), as scikit-image computes it; the cut to the foreground is ours (masked SLIC
    takes time and memory with the square of the number of pieces).

    Attributes:
        size_mm: edge of a piece, the cubic (of frames: square) root of its mean size; pixels where a case's are of
            unknown size. None takes 16 mm, or, where the size of pixels is not known or the foreground (of the frame)
            is too small for it, what gives about 100 pieces.
        compactness: weight of distance against intensity: higher makes pieces more cubic. Intensities are in [0, 1].
    """

    size_mm: float | None = None
    compactness: float = 0.2

    def __post_init__(self) -> None:
        """Refuse impossible settings."""
        if (self.size_mm is not None and not self.size_mm > 0) or not self.compactness > 0:
            raise ValueError(f"--size-mm is {self.size_mm} and --compactness {self.compactness}; both must be positive")

    def identity(self) -> dict[str, Any]:
        """Return the settings."""
        return asdict(self)

    def __call__(self, case: RegionCase) -> NDArray[np.integer[Any]]:
        """Return the pieces of a case, (D, H, W) int64."""
        require("skimage", "scikit-image", "--source supervoxels")
        if case.spatial_dims == 2:
            frames = zip(np.moveaxis(case.image, 1, 0), case.foreground, strict=True)
            return numbered_by_frame([self._pieces(*frame, case.spacing_mm[1:], case.in_mm) for frame in frames])
        return self._pieces(case.image, case.foreground, case.spacing_mm, case.in_mm)

    def _pieces(
        self, image: NDArray[np.float32], foreground: NDArray[np.bool_], spacing: tuple[float, ...], in_mm: bool
    ) -> NDArray[np.int64]:
        """Return the pieces of one volume or frame: image (C, ...), foreground (...), numbered from 1 without gaps."""
        from scipy.ndimage import zoom
        from skimage.segmentation import slic

        out = np.zeros(foreground.shape, dtype=np.int64)
        if not foreground.any():
            return out
        box = tuple(slice(int(found.min()), int(found.max()) + 1) for found in np.nonzero(foreground))
        inside = foreground[box]
        values = np.where(inside, image[(slice(None), *box)], -1.0).astype(np.float32)
        if max(spacing) > _SAME_SPACING * min(spacing):
            cube = math.prod(spacing) ** (1 / len(spacing))
            scale = [mm / cube for mm in spacing]
            values = np.stack([zoom(channel, scale, order=1, mode="nearest", grid_mode=True) for channel in values])
        size = self.size_mm or _usual_size(int(inside.sum()) * math.prod(spacing), len(spacing), in_mm)
        extent = math.prod(n * mm for n, mm in zip(inside.shape, spacing, strict=True))
        width = float(values.max() - values.min())  # SLIC brings the image into [0, 1] by itself
        found = slic(
            values,
            n_segments=max(1, round(extent / size ** len(spacing))),
            compactness=self.compactness / max(width, 1e-6),
            convert2lab=False,
            start_label=1,
            channel_axis=0,
        )
        if found.shape != inside.shape:  # the piece at each voxel's middle
            places = [
                np.minimum(((np.arange(n) + 0.5) * m / n).astype(int), m - 1)
                for n, m in zip(inside.shape, found.shape, strict=True)
            ]
            found = found[np.ix_(*places)]
        out[box][inside] = 1 + np.unique(found[inside], return_inverse=True)[1]
        return out


def _usual_size(extent: float, dims: int, in_mm: bool) -> float:
    """Return the edge of pieces where none is given, for a foreground of so many mm (or pixels) to the ``dims``."""
    size = math.pow(extent / _PIECES, 1 / dims)
    return min(_SIZE_MM, size) if in_mm else size
