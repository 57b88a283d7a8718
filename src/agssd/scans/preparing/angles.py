"""Grids whose axes are not at right angles: by how much, and the right-angled grid nearest to them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MAX_SHEAR_VOXELS = 0.5  # how far a voxel may lie off where a right-angled grid has it


def perpendicular(axes: NDArray[np.float64], order: NDArray[np.intp]) -> NDArray[np.float64]:
    """Return (3, 3) axes made perpendicular one after another in an order (Gram-Schmidt), the first as it is."""
    turned, length = np.linalg.qr(axes[:, order])
    square = np.empty_like(axes)
    square[:, order] = turned * np.diag(length)  # QR leaves the signs open; this turns every axis along its old one
    return square


def nearest_square(affine: NDArray[np.float64], shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Return an affine at right angles with the same centre; the longer an axis in mm, the less it is turned."""
    extent = np.asarray(shape) * np.linalg.norm(affine[:3, :3], axis=0)
    square = affine.copy()
    square[:3, :3] = perpendicular(affine[:3, :3], np.argsort(-extent, kind="stable"))
    square[:3, 3] += (affine[:3, :3] - square[:3, :3]) @ ((np.asarray(shape) - 1) / 2)
    return square


def voxels_apart(one: NDArray[np.float64], two: NDArray[np.float64], shape: tuple[int, ...]) -> float:
    """Return the largest distance along an axis of ``two``, in its voxels, of one corner by two affines (4, 4)."""
    corners = np.array([[i, j, k, 1] for i in (0, 1) for j in (0, 1) for k in (0, 1)], dtype=np.float64)
    corners[:, :3] *= np.asarray(shape) - 1
    return float(np.abs(corners @ (np.linalg.inv(two) @ one).T - corners).max())


def shear_degrees(affine: NDArray[np.float64]) -> float:
    """Return by how much the two most skewed axes of a grid miss a right angle."""
    axes = affine[:3, :3] / np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    return float(np.degrees(np.arcsin(min(np.abs(axes.T @ axes - np.eye(3)).max(), 1.0))))
