"""Predicted label maps back on the grid of the file they came from, written as NIfTI.

The only place where a prediction changes grid: everything goes through the two affines, so storage order, flips,
oblique axes and spacing of the source need no special case.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Matrix = Sequence[Sequence[float]]


class Geometry(Protocol):
    """The part of a case that a prediction needs to return to its source."""

    @property
    def key(self) -> str:
        """Name of the case."""
        ...

    @property
    def affine(self) -> Matrix:
        """4x4: (d, h, w, 1) of the cached grid to world RAS mm."""
        ...

    @property
    def source_affine(self) -> Matrix:
        """4x4: (i, j, k, 1) of the source's array to world RAS mm."""
        ...

    @property
    def source_shape(self) -> Sequence[int]:
        """Shape of the source's array in its own order (i, j, k)."""
        ...


def to_source_grid(scores: npt.NDArray[np.generic], geometry: Geometry) -> npt.NDArray[np.int16]:
    """Return the class map on the source's own voxels.

    Args:
        scores: either (D, H, W) integers, resampled by nearest neighbour, or (K, D, H, W) float scores per class
            (probabilities), resampled linearly class by class before the arg-max, which keeps borders smooth where
            the source is finer than the cache.
        geometry: affines of both grids and the shape of the source.

    Returns:
        (i, j, k) int16 in the source's storage order; 0 outside the cached volume.

    Raises:
        ValueError: if ``scores`` has neither form or an affine cannot be inverted.
    """
    from scipy.ndimage import affine_transform

    if scores.ndim not in (3, 4):
        raise ValueError(f"scores of case {geometry.key} have shape {scores.shape}; give (D, H, W) or (K, D, H, W)")
    cached = np.asarray(geometry.affine, np.float64)
    source = np.asarray(geometry.source_affine, np.float64)
    if abs(np.linalg.det(cached[:3, :3])) < 1e-12:
        raise ValueError(f"the affine of case {geometry.key} cannot be inverted: {cached.tolist()}")
    to_cached = np.linalg.inv(cached) @ source
    # one replicated voxel all round, so that the outermost half voxel and rounding at the border stay inside
    matrix, offset = to_cached[:3, :3], to_cached[:3, 3] + 1.0
    # exact integers where grids share their voxels: linear interpolation then returns the stored value
    matrix = np.where(np.abs(matrix - np.round(matrix)) < 1e-6, np.round(matrix), matrix)
    offset = np.where(np.abs(offset - np.round(offset)) < 1e-4, np.round(offset), offset)
    shape = tuple(int(n) for n in geometry.source_shape[:3])

    def resample(values: npt.NDArray[Any], order: int, outside: float) -> npt.NDArray[Any]:
        padded = np.pad(values, 1, mode="edge")
        moved: npt.NDArray[Any] = affine_transform(
            padded, matrix, offset, output_shape=shape, order=order, mode="constant", cval=outside
        )
        return moved

    if scores.ndim == 3:
        return resample(scores.astype(np.int16), 0, 0).astype(np.int16)
    best = resample(scores[0].astype(np.float32), 1, np.inf)
    labels = np.zeros(shape, np.int16)
    for index in range(1, scores.shape[0]):
        value = resample(scores[index].astype(np.float32), 1, -np.inf)
        ahead = value > best
        labels[ahead] = index
        best = np.maximum(best, value)
    return labels


def write_prediction(scores: npt.NDArray[np.generic], geometry: Geometry, folder: str | Path) -> Path:
    """Write ``folder/<key>.nii.gz`` on the source's grid and return its path.

    The file appears whole or not at all: it is written beside its place and renamed. Slashes in the key become
    underscores. Arguments and errors are those of :func:`to_source_grid`; a folder that cannot be written raises
    ``ValueError`` naming it.
    """
    import nibabel as nib

    labels = to_source_grid(scores, geometry)
    top = int(labels.max(initial=0))
    image = nib.Nifti1Image(
        labels.astype(np.uint8 if top < 256 else np.int16), np.asarray(geometry.source_affine, np.float64)
    )
    image.header.set_xyzt_units("mm")
    name = geometry.key.replace("/", "_")
    path = Path(folder) / f"{name}.nii.gz"
    partial = path.with_name(f".{name}.{os.getpid()}.part.nii.gz")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            nib.save(image, partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error}; choose another --trainer.default_root_dir") from error
    return path
