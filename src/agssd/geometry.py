"""Geometry of views: affine maps between a view, its parent crop and the world, and token correspondence.

A view is an affine map from normalised coordinates ``u`` in [-1, 1]³ (tensor order, the convention of ``grid_sample``
with ``align_corners=False``) to voxel coordinates of the parent, where voxel ``i`` has its centre at ``i``. Flips, axis
permutations and rotations live in the matrix, so nothing later has a special case for them (docs/method.md §1.2, ours).
"""

from __future__ import annotations

import itertools
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from agssd.types import Triple


@lru_cache(maxsize=16)
def constant(values: tuple[float, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a small constant on the device, copied there once and not at every step. Do not change it in place."""
    return torch.tensor(values, device=device, dtype=dtype)


@lru_cache(maxsize=16)
def signed_permutations(device: torch.device | None = None) -> Tensor:
    """Return (48, 3, 3) float32: all flips and quarter turns; row = parent axis, column = view axis.

    Made once per device. Do not change it in place.

    The first 8 are the pure flips, ordered so that element ``4 a + 2 b + c`` flips D if a, H if b, W if c.
    """
    matrices = []
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1.0, -1.0), repeat=3):
            matrix = torch.zeros(3, 3)
            for axis in range(3):
                matrix[axis, order[axis]] = signs[axis]
            matrices.append(matrix)
    return torch.stack(matrices).to(device)


def rotation_matrices(angles: Tensor) -> Tensor:
    """Return (..., 3, 3) rotations about the axes D, H and W in turn, from angles (..., 3) in radians."""
    cos, sin = angles.cos(), angles.sin()
    zero, one = torch.zeros_like(cos[..., 0]), torch.ones_like(cos[..., 0])

    def build(rows: list[list[Tensor]]) -> Tensor:
        return torch.stack([torch.stack(row, -1) for row in rows], -2)

    about_d = build([[one, zero, zero], [zero, cos[..., 0], -sin[..., 0]], [zero, sin[..., 0], cos[..., 0]]])
    about_h = build([[cos[..., 1], zero, sin[..., 1]], [zero, one, zero], [-sin[..., 1], zero, cos[..., 1]]])
    about_w = build([[cos[..., 2], -sin[..., 2], zero], [sin[..., 2], cos[..., 2], zero], [zero, zero, one]])
    return about_d @ about_h @ about_w


def view_affine(centre: Tensor, edge: Tensor, orientation: Tensor, rotation: Tensor | None = None) -> Tensor:
    """Return (..., 4, 4) float32, the map from ``u`` to parent voxels: ``c + R diag(e / 2) P u``.

    Args:
        centre: (..., 3) float32, voxels.
        edge: (..., 3) float32, edge lengths in voxels along the parent's axes.
        orientation: (..., 3, 3) float32 signed permutation P.
        rotation: (..., 3, 3) float32 or None.
    """
    linear = torch.diag_embed(edge / 2) @ orientation
    if rotation is not None:
        linear = rotation @ linear
    affine = torch.zeros(*centre.shape[:-1], 4, 4, device=centre.device, dtype=centre.dtype)
    affine[..., :3, :3] = linear
    affine[..., :3, 3] = centre
    affine[..., 3, 3] = 1
    return affine


def transform(affine: Tensor, points: Tensor) -> Tensor:
    """Return (..., N, 3): points (..., N, 3) mapped by affines (..., 4, 4)."""
    return points @ affine[..., :3, :3].mT + affine[..., None, :3, 3]


def invert(affine: Tensor) -> Tensor:
    """Return the inverse of affines (..., 4, 4) without host synchronisation."""
    linear = torch.linalg.inv_ex(affine[..., :3, :3]).inverse
    inverse = torch.zeros_like(affine)
    inverse[..., :3, :3] = linear
    inverse[..., :3, 3] = -(linear @ affine[..., :3, 3, None])[..., 0]
    inverse[..., 3, 3] = 1
    return inverse


def token_centres(grid: Triple, device: torch.device | None = None) -> Tensor:
    """Return (N, 3) float32: centres ``(2 i + 1) / G - 1`` of the tokens of a view, raster order."""
    axes = [(2 * torch.arange(n, device=device, dtype=torch.float32) + 1) / n - 1 for n in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)


def correspondence(affine_a: Tensor, affine_b: Tensor, grid: Triple) -> tuple[Tensor, Tensor]:
    """Return where the tokens of view A lie in view B.

    Args:
        affine_a: (B, 4, 4) float32, A's ``u`` to parent voxels.
        affine_b: (B, 4, 4) float32, the same for B.
        grid: token grid of both views.

    Returns:
        ``u_b`` (B, N, 3) float32, coordinates in B, and ``valid`` (B, N) bool: the point is at least half a token
        inside B on every axis.
    """
    with torch.autocast(affine_a.device.type, enabled=False):  # half precision misplaces tokens by 5 % of a pitch
        centres = token_centres(grid, affine_a.device)
        u_b = transform(invert(affine_b) @ affine_a, centres.expand(affine_a.shape[0], -1, -1))
        limit = 1 - 1 / constant(grid, u_b.device)
        return u_b, (u_b.abs() <= limit + 1e-5).all(-1)


def mutual_neighbours(affine_a: Tensor, affine_b: Tensor, grid: Triple) -> tuple[Tensor, Tensor, Tensor]:
    """Return which tokens of two views are each other's nearest, by their centres in the parent; one to one.

    The axes of a view stand at right angles in the parent, so the nearest token of a point inside a view is the one
    whose cell holds it. Nothing larger than the grid is made.

    Args:
        affine_a: (B, 4, 4) float32, A's ``u`` to parent voxels.
        affine_b: (B, 4, 4) float32, the same for B.
        grid: token grid of both views.

    Returns:
        ``partner`` (B, N) int64, for each token of A the token of B whose cell holds its centre (the nearest cell where
        none does); ``mutual`` (B, N) bool, where that token's centre lies in this token's cell as well; and ``inside``
        (B, N) bool, where the centre of A's token lies in B.
    """
    to_b, inside = _cells(affine_a, affine_b, grid)
    to_a, inside_a = _cells(affine_b, affine_a, grid)
    own = torch.arange(to_b.shape[1], device=to_b.device)
    mutual = (to_a.gather(1, to_b) == own) & inside & inside_a.gather(1, to_b)
    return to_b, mutual, inside


def _cells(affine_a: Tensor, affine_b: Tensor, grid: Triple) -> tuple[Tensor, Tensor]:
    """Return the cell (B, N) int64 of B, raster order, nearest to each token centre of A, and whether it holds it."""
    u_b, _ = correspondence(affine_a, affine_b, grid)
    size = constant(grid, u_b.device)
    cell = torch.minimum(((u_b + 1) / 2 * size).floor().clamp_min(0), size - 1).long()
    return (cell * constant((grid[1] * grid[2], grid[2], 1), cell.device, torch.int64)).sum(-1), (u_b.abs() <= 1).all(
        -1
    )


def sample_tokens(tokens: Tensor, grid: Triple, points: Tensor) -> Tensor:
    """Return tokens read at normalised coordinates, trilinearly: the A-anchored operator of docs/method.md §1.2.

    Args:
        tokens: (B, N, E) in raster order of ``grid``.
        grid: token grid.
        points: (B, M, 3) float32, ``u`` in tensor order.

    Returns:
        (B, M, E).
    """
    volume = tokens.mT.reshape(tokens.shape[0], -1, *grid)  # (B, E, D', H', W')
    at = points.flip(-1)[:, :, None, None].to(volume.dtype)  # grid_sample wants x, y, z
    read = F.grid_sample(volume, at, mode="bilinear", padding_mode="border", align_corners=False)
    return read[..., 0, 0].mT


def overlap_grid(affine_a: Tensor, affine_b: Tensor, box: Tensor, points_per_axis: int) -> tuple[Tensor, Tensor]:
    """Return the same points of the overlap in both views: the symmetric region operator of docs/method.md §1.2.

    Args:
        affine_a: (B, 4, 4) float32.
        affine_b: (B, 4, 4) float32.
        box: (B, 3, 2) float32, overlap box in parent voxels, [low, high) edges per axis.
        points_per_axis: r; r³ points at the centres of a regular grid over the box.

    Returns:
        Two (B, r³, 3) float32: coordinates ``u`` in A and in B.
    """
    grid = (points_per_axis, points_per_axis, points_per_axis)
    unit = (token_centres(grid, box.device) + 1) / 2  # (r³, 3) in (0, 1)
    points = box[:, None, :, 0] + unit * (box[:, None, :, 1] - box[:, None, :, 0])
    return transform(invert(affine_a), points), transform(invert(affine_b), points)


def rotation_from_6d(vectors: Tensor) -> Tensor:
    """Return (..., 3, 3) rotations whose first two columns are nearest to the two vectors (..., 6), by Gram-Schmidt.

    Source: Zhou et al., CVPR 2019, arXiv 1812.07035, eq. 15.
    """
    first = F.normalize(vectors[..., :3], dim=-1)
    second = vectors[..., 3:]
    second = F.normalize(second - (first * second).sum(-1, keepdim=True) * first, dim=-1)
    return torch.stack([first, second, torch.linalg.cross(first, second)], -1)
