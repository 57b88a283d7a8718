"""Resampling and smoothing along one axis at a time, as batched matrix products.

An axis-aligned view is three small matrices: every row holds the weights with which one output position reads the
parent's axis. Interpolation, pre-blur, flips and border rules are all in the weights, so one code path serves them, it
runs on tensor cores, and it equals ``grid_sample`` (tests compare them).
"""

from __future__ import annotations

import torch
from torch import Tensor

from agssd.types import Triple


def interpolation_matrix(positions: Tensor, length: int) -> Tensor:
    """Return linear interpolation weights; positions outside read the border.

    Args:
        positions: (..., n) float32, where to read, in voxels (voxel j has its centre at j).
        length: number of voxels of the axis that is read.

    Returns:
        (..., n, length) float32, rows sum to 1.
    """
    voxels = torch.arange(length, device=positions.device, dtype=positions.dtype)
    inside = positions.clamp(0, length - 1)
    return (1 - (inside[..., None] - voxels).abs()).clamp_min(0)


def gaussian_matrix(sigma_vox: Tensor, length: int) -> Tensor:
    """Return Gaussian smoothing weights, renormalised at the border; the identity where sigma is 0.

    Args:
        sigma_vox: (...) float32, standard deviation in voxels.
        length: number of voxels of the axis.

    Returns:
        (..., length, length) float32, rows sum to 1.
    """
    voxels = torch.arange(length, device=sigma_vox.device, dtype=sigma_vox.dtype)
    distance = voxels[:, None] - voxels[None, :]
    sigma = sigma_vox.clamp_min(1e-3)[..., None, None]
    weights = torch.exp(-(distance**2) / (2 * sigma**2))
    return weights / weights.sum(-1, keepdim=True)


def apply_separable(image: Tensor, matrices: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Read V views from every sample.

    Args:
        image: (B, C, D, H, W) float32.
        matrices: for each axis (B, V, n_axis, length of the axis) float32.

    Returns:
        (B, V, C, n_D, n_H, n_W) float32.
    """
    along_d, along_h, along_w = matrices
    batch, channels, depth, height, width = image.shape
    views = along_d.shape[1]
    out_d, out_h, out_w = along_d.shape[2], along_h.shape[2], along_w.shape[2]
    # One product per view: a broadcast one would copy the whole parent once per view.
    rows = image.reshape(batch, channels * depth * height, width)
    x = torch.stack([rows @ along_w[:, view].mT for view in range(views)], 1)  # (B, V, C D H, w)
    x = along_h[:, :, None] @ x.reshape(batch, views, channels * depth, height, out_w)  # (B, V, C D, h, w)
    x = along_d[:, :, None] @ x.reshape(batch, views, channels, depth, out_h * out_w)  # (B, V, C, d, h w)
    return x.reshape(batch, views, channels, out_d, out_h, out_w)


def smooth(image: Tensor, sigma_vox: Tensor) -> Tensor:
    """Return the image smoothed by a Gaussian of its own width per sample and axis.

    Args:
        image: (B, C, D, H, W) float32.
        sigma_vox: (B, 3) float32, voxels.
    """
    size: Triple = (image.shape[2], image.shape[3], image.shape[4])
    first, second, third = (gaussian_matrix(sigma_vox[:, None, axis], size[axis]) for axis in range(3))
    return apply_separable(image, (first, second, third))[:, 0]
