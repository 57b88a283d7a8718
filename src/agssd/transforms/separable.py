"""Resampling and smoothing along one axis at a time, as batched matrix products.

An axis-aligned view is three small matrices: every row holds the weights with which one output position reads the
parent's axis. Interpolation, pre-blur, flips and border rules are all in the weights, so one code path serves them, it
runs on tensor cores, and it equals ``grid_sample`` (tests compare them).
"""

from __future__ import annotations

import math
from itertools import product

import torch
from torch import Tensor

_NEGLIGIBLE = 2.0**-24  # weights below round off beside the largest, which is above 1/2 or has neighbours like it
_FEW_TAPS = 4  # up to this many voxels per output position, sums of whole slices beat a matrix product
_BLOCK_VOX = 2**18  # voxels worked on at once on the CPU: they stay in its cache, and their memory is used again
_COLUMNS = 16  # output positions along the last axis that share a product


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

    Weights that round off are 0. Left as they are, many are subnormal, and products with those take a CPU ten times as
    long: smoothing 16 views of 32³ 19 ms against 1.9, of 96³ 682 against 66 (one thread of a 2-core x86-64 CPU, torch
    2.13, 2026-11-22).

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
    weights = torch.where(weights > _NEGLIGIBLE, weights, torch.zeros_like(weights))
    return weights / weights.sum(-1, keepdim=True)


def apply_separable(image: Tensor, matrices: tuple[Tensor, ...]) -> Tensor:
    """Read V views from every sample.

    On the CPU only the voxels are touched that have weight. Two views of 96³ from 168³ take 8 ms instead of 93, six of
    48³ 4 instead of 79 (2-core x86-64 CPU, one thread, 2026-11-21).

    Args:
        image: (B, C, [D,] H, W) float32; on the CPU also integers and bool, of which no float32 copy is made.
        matrices: for each axis (B, V, n_axis, length of the axis) float32, no weight negative.

    Returns:
        (B, V, C, [n_D,] n_H, n_W) float32.
    """
    if image.device.type == "cpu":
        return _apply_banded(image, matrices)
    batch, channels, *lengths = image.shape
    views, sizes = matrices[0].shape[1], [matrix.shape[2] for matrix in matrices]
    # One product per view: a broadcast one would copy the whole parent once per view.
    rows = image.reshape(batch, -1, lengths[-1])
    x = torch.stack([rows @ matrices[-1][:, view].mT for view in range(views)], 1)  # (B, V, C D H, w)
    for axis in reversed(range(len(lengths) - 1)):
        before, after = channels * math.prod(lengths[:axis]), math.prod(sizes[axis + 1 :])
        x = matrices[axis][:, :, None] @ x.reshape(batch, views, before, lengths[axis], after)
    return x.reshape(batch, views, channels, *sizes)


def _apply_banded(image: Tensor, matrices: tuple[Tensor, ...]) -> Tensor:
    bands = [_Bands(matrix) for matrix in matrices]
    first, *others = bands
    width, last = bands[-1], len(bands) - 1
    batch, views = matrices[0].shape[:2]
    sizes = [matrix.shape[2] for matrix in matrices]
    out = torch.empty((batch, views, image.shape[1], *sizes), dtype=matrices[0].dtype)
    for b, v, c in product(range(batch), range(views), range(image.shape[1])):
        read = [band.columns(b, v) for band in others]
        step = max(1, _BLOCK_VOX // math.prod(columns.stop - columns.start for columns in read))
        for start in range(0, sizes[0], step):
            block = slice(start, min(start + step, sizes[0]))
            x = image[b, c][first.columns(b, v, block), *read].to(out.dtype)
            for axis in range(last):
                x = bands[axis].apply(x, axis, b, v, block if axis == 0 else slice(None))
            rows, target = x.reshape(-1, x.shape[-1]), out[b, v, c, block].view(-1, sizes[-1])
            for left in range(0, sizes[-1], _COLUMNS):
                positions = slice(left, min(left + _COLUMNS, sizes[-1]))
                columns = width.columns(b, v, positions)
                part = rows[:, columns.start - read[-1].start : columns.stop - read[-1].start]
                torch.mm(part, width.matrix[b, v, positions, columns].mT, out=target[:, positions])
    return out


class _Bands:
    """The weights (B, V, n, length) of one axis, of which a row has few, next to each other."""

    def __init__(self, matrix: Tensor) -> None:
        used = (matrix > _NEGLIGIBLE).to(torch.uint8)
        first, last = used.argmax(-1), matrix.shape[-1] - 1 - used.flip(-1).argmax(-1)  # (B, V, n)
        self.matrix = matrix
        taps = (last - first).amax(-1) + 1  # (B, V): a view's arithmetic depends on no other view of the batch
        self._taps = taps.tolist()
        self._start = torch.minimum(first, matrix.shape[-1] - taps[..., None])
        self._starts = self._start.tolist()

    def columns(self, b: int, v: int, rows: slice = slice(None)) -> slice:
        """Return the columns that ``rows`` read."""
        starts = self._starts[b][v][rows]
        return slice(min(starts), max(starts) + self._taps[b][v])

    def apply(self, x: Tensor, dim: int, b: int, v: int, rows: slice = slice(None)) -> Tensor:
        """Return x ([D,] H, W) weighted along its axis ``dim`` (0 or 1), which holds ``columns(b, v, rows)``."""
        columns, taps = self.columns(b, v, rows), self._taps[b][v]
        matrix = self.matrix[b, v, rows, columns]
        if taps > _FEW_TAPS:
            return matrix @ x if dim else (matrix @ x.flatten(1)).unflatten(1, x.shape[1:])
        start = self._start[b, v, rows] - columns.start
        weights = matrix.gather(1, start[:, None] + torch.arange(taps)).view(-1, *([1] * (x.ndim - 1 - dim)), taps)
        total = x.index_select(dim, start).mul_(weights[..., 0])
        for tap in range(1, taps):
            total.addcmul_(x.index_select(dim, start + tap), weights[..., tap])
        return total


def smooth(image: Tensor, sigma_vox: Tensor) -> Tensor:
    """Return the image smoothed by a Gaussian of its own width per sample and axis.

    Args:
        image: (B, C, [D,] H, W) float32.
        sigma_vox: (B, d) float32, voxels.
    """
    lengths = image.shape[2:]
    matrices = tuple(gaussian_matrix(sigma_vox[:, None, axis], length) for axis, length in enumerate(lengths))
    return apply_separable(image, matrices)[:, 0]
