"""Predicted label maps and cached volumes back on the grid of the file they came from, written as NIfTI.

The only place where anything leaves the cache's grid: everything goes through the two affines, so storage order, flips,
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


def resample_to_source(values: npt.NDArray[Any], geometry: Geometry, order: int, outside: float) -> npt.NDArray[Any]:
    """Return a cached array on the source's own voxels.

    Where both grids share their voxels, in whatever order, every value is returned exactly.

    Args:
        values: (D, H, W).
        geometry: affines of both grids and the shape of the source.
        order: 0 for nearest neighbour, 1 for linear interpolation.
        outside: value of source voxels that lie outside the cached volume.

    Returns:
        (i, j, k) of the same type, in the source's storage order.

    Raises:
        ValueError: if the affine of the case cannot be inverted.
    """
    from scipy.ndimage import affine_transform

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
    moved: npt.NDArray[Any] = affine_transform(
        np.pad(values, 1, mode="edge"),
        matrix,
        offset,
        output_shape=tuple(int(n) for n in geometry.source_shape[:3]),
        order=order,
        mode="constant",
        cval=outside,
    )
    return moved


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
    if scores.ndim not in (3, 4):
        raise ValueError(f"scores of case {geometry.key} have shape {scores.shape}; give (D, H, W) or (K, D, H, W)")
    if scores.ndim == 3:
        return resample_to_source(scores.astype(np.int16), geometry, 0, 0)
    best = resample_to_source(scores[0].astype(np.float32), geometry, 1, np.inf)
    labels = np.zeros(best.shape, np.int16)
    for index in range(1, scores.shape[0]):
        value = resample_to_source(scores[index].astype(np.float32), geometry, 1, -np.inf)
        ahead = value > best
        labels[ahead] = index
        best = np.maximum(best, value)
    return labels


def write_prediction(scores: npt.NDArray[np.generic], geometry: Geometry, folder: str | Path) -> Path:
    """Write ``folder/<key>.nii.gz`` on the source's grid and return its path.

    Slashes in the key become underscores. Arguments and errors are those of :func:`to_source_grid` and
    :func:`save_nifti`.
    """
    labels = to_source_grid(scores, geometry)
    top = int(labels.max(initial=0))
    path = Path(folder) / f"{geometry.key.replace('/', '_')}.nii.gz"
    save_nifti(labels.astype(np.uint8 if top < 256 else np.int16), geometry.source_affine, path)
    return path


def save_nifti(array: npt.NDArray[Any], affine: Matrix, path: Path) -> None:
    """Write an array (i, j, k) or (i, j, k, C) with its affine, in mm; the file appears whole or not at all.

    Raises:
        ValueError: if the place cannot be written, naming it.
    """
    import nibabel as nib

    image = nib.Nifti1Image(array, np.asarray(affine, np.float64))
    image.header.set_xyzt_units("mm")
    partial = path.with_name(f".{path.name.removesuffix('.nii.gz')}.{os.getpid()}.part.nii.gz")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            nib.save(image, partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error}; choose another place") from error
