"""Geometry of views: affine maps between a view, its parent crop and the world, and token correspondence.

A view is an affine map from normalised coordinates ``u`` in [-1, 1]^d (tensor order, the convention of ``grid_sample``
with ``align_corners=False``) to voxel coordinates of the parent, where voxel ``i`` has its centre at ``i``. Flips, axis
permutations and rotations live in the matrix, so nothing later has a special case for them (docs/method.md §1.2, ours).

``d`` is the number of axes of space, 3 for volumes and 2 for frames. It follows from the shapes that are given, here
and wherever images are worked on: nothing asks for it twice.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from agssd.types import Size

INTERPOLATION = {2: "bilinear", 3: "trilinear"}  # what ``interpolate`` calls linear interpolation, by axes of space
# Plane of each rotation about an axis, from its first axis towards its second.
_PLANES = {2: ((0, 1),), 3: ((1, 2), (2, 0), (0, 1))}


class AxisNames(NamedTuple):
    """Names of the axes of space in patterns of einops."""

    cells: str  # of the cells that an image is cut in: "d h w"
    within: str  # of the voxels within a cell: "p q r"
    image: str  # of the image: "(d p) (h q) (w r)"


@lru_cache
def axis_names(dims: int) -> AxisNames:
    """Return the names of ``dims`` axes of space, the last of D, H, W."""
    cells, within = "dhw"[-dims:], "pqr"[-dims:]
    return AxisNames(
        " ".join(cells), " ".join(within), " ".join(f"({a} {b})" for a, b in zip(cells, within, strict=True))
    )


def sizes_of(names: str, sizes: Size) -> dict[str, int]:
    """Return the sizes of named axes, as einops takes them."""
    return dict(zip(names.split(), sizes, strict=True))


def per_sample(values: Tensor, image: Tensor) -> Tensor:
    """Return ``values`` (B, ...) with axes of 1 at the end, so that they meet an image (B, ..., [D,] H, W)."""
    return values.reshape(*values.shape, *[1] * (image.ndim - values.ndim))


@lru_cache(maxsize=16)
def constant(values: tuple[float, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a small constant on the device, copied there once and not at every step. Do not change it in place."""
    return torch.tensor(values, device=device, dtype=dtype)


@lru_cache(maxsize=16)
def signed_permutations(device: torch.device | None = None, dims: int = 3) -> Tensor:
    """Return (48, 3, 3) float32: all flips and quarter turns; row = parent axis, column = view axis. (8, 2, 2) in 2D.

    Made once per device. Do not change it in place.

    The first 8 are the pure flips, ordered so that element ``4 a + 2 b + c`` flips D if a, H if b, W if c; in 2D the
    first 4, where element ``2 b + c`` flips H if b, W if c.
    """
    matrices = []
    for order in itertools.permutations(range(dims)):
        for signs in itertools.product((1.0, -1.0), repeat=dims):
            matrix = torch.zeros(dims, dims)
            for axis in range(dims):
                matrix[axis, order[axis]] = signs[axis]
            matrices.append(matrix)
    return torch.stack(matrices).to(device)


def num_rotations(dims: int) -> int:
    """Return how many angles turn ``dims`` axes: 3 in 3D, 1 in 2D."""
    return len(_PLANES[dims])


def rotation_matrices(angles: Tensor) -> Tensor:
    """Return (..., 3, 3) rotations about the axes D, H and W in turn, from angles (..., 3) in radians.

    From angles (..., 1) these are (..., 2, 2), from H towards W.
    """
    dims, planes = next((dims, planes) for dims, planes in _PLANES.items() if len(planes) == angles.shape[-1])
    cos, sin = angles.cos(), angles.sin()
    total = None
    for turn, (first, second) in enumerate(planes):
        matrix = torch.eye(dims, device=angles.device, dtype=angles.dtype).repeat(*angles.shape[:-1], 1, 1)
        matrix[..., first, first] = matrix[..., second, second] = cos[..., turn]
        matrix[..., first, second] = -sin[..., turn]
        matrix[..., second, first] = sin[..., turn]
        total = matrix if total is None else total @ matrix
    assert total is not None
    return total


def view_affine(centre: Tensor, edge: Tensor, orientation: Tensor, rotation: Tensor | None = None) -> Tensor:
    """Return (..., d + 1, d + 1) float32, the map from ``u`` to parent voxels: ``c + R diag(e / 2) P u``.

    Args:
        centre: (..., d) float32, voxels.
        edge: (..., d) float32, edge lengths in voxels along the parent's axes.
        orientation: (..., d, d) float32 signed permutation P.
        rotation: (..., d, d) float32 or None.
    """
    linear = torch.diag_embed(edge / 2) @ orientation
    if rotation is not None:
        linear = rotation @ linear
    return _affine(linear, centre)


def _affine(linear: Tensor, offset: Tensor) -> Tensor:
    dims = offset.shape[-1]
    affine = torch.zeros(*offset.shape[:-1], dims + 1, dims + 1, device=offset.device, dtype=offset.dtype)
    affine[..., :-1, :-1] = linear
    affine[..., :-1, -1] = offset
    affine[..., -1, -1] = 1
    return affine


def transform(affine: Tensor, points: Tensor) -> Tensor:
    """Return (..., N, d): points (..., N, d) mapped by affines (..., d + 1, d + 1)."""
    return points @ affine[..., :-1, :-1].mT + affine[..., None, :-1, -1]


def invert(affine: Tensor) -> Tensor:
    """Return the inverse of affines (..., d + 1, d + 1) without host synchronisation."""
    linear = torch.linalg.inv_ex(affine[..., :-1, :-1]).inverse
    return _affine(linear, -(linear @ affine[..., :-1, -1, None])[..., 0])


def token_centres(grid: Size, device: torch.device | None = None) -> Tensor:
    """Return (N, d) float32: centres ``(2 i + 1) / G - 1`` of the tokens of a view, raster order."""
    axes = [(2 * torch.arange(n, device=device, dtype=torch.float32) + 1) / n - 1 for n in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(grid))


def correspondence(affine_a: Tensor, affine_b: Tensor, grid: Size, margin: float = 0.5) -> tuple[Tensor, Tensor]:
    """Return where the tokens of view A lie in view B.

    Args:
        affine_a: (B, d + 1, d + 1) float32, A's ``u`` to parent voxels.
        affine_b: (B, d + 1, d + 1) float32, the same for B.
        grid: token grid of both views.
        margin: how far a point must be inside B, in tokens; with half of one it is between the centres of B's tokens.

    Returns:
        ``u_b`` (B, N, d) float32, coordinates in B, and ``valid`` (B, N) bool: the point is at least ``margin`` inside
        B on every axis.
    """
    with torch.autocast(affine_a.device.type, enabled=False):  # half precision misplaces tokens by 5 % of a pitch
        centres = token_centres(grid, affine_a.device)
        u_b = transform(invert(affine_b) @ affine_a, centres.expand(affine_a.shape[0], -1, -1))
        limit = 1 - 2 * margin / constant(grid, u_b.device)
        return u_b, (u_b.abs() <= limit + 1e-5).all(-1)


def mutual_neighbours(affine_a: Tensor, affine_b: Tensor, grid: Size) -> tuple[Tensor, Tensor, Tensor]:
    """Return which tokens of two views are each other's nearest, by their centres in the parent; one to one.

    The axes of a view stand at right angles in the parent, so the nearest token of a point inside a view is the one
    whose cell holds it. Nothing larger than the grid is made.

    Args:
        affine_a: (B, d + 1, d + 1) float32, A's ``u`` to parent voxels.
        affine_b: (B, d + 1, d + 1) float32, the same for B.
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


def _cells(affine_a: Tensor, affine_b: Tensor, grid: Size) -> tuple[Tensor, Tensor]:
    """Return the cell (B, N) int64 of B, raster order, nearest to each token centre of A, and whether it holds it."""
    u_b, inside = correspondence(affine_a, affine_b, grid, margin=0.0)
    size = constant(grid, u_b.device)
    cell = torch.minimum(((u_b + 1) / 2 * size).floor().clamp_min(0), size - 1).long()
    strides = tuple(math.prod(grid[axis + 1 :]) for axis in range(len(grid)))
    return (cell * constant(strides, cell.device, torch.int64)).sum(-1), inside


def sample_tokens(tokens: Tensor, grid: Size, points: Tensor) -> Tensor:
    """Return tokens read at normalised coordinates, linearly per axis: the A-anchored operator of docs/method.md §1.2.

    Args:
        tokens: (B, N, E) in raster order of ``grid``.
        grid: token grid.
        points: (B, M, d) float32, ``u`` in tensor order.

    Returns:
        (B, M, E).
    """
    image = tokens.mT.reshape(tokens.shape[0], -1, *grid)  # (B, E, *grid)
    at = points.flip(-1).unflatten(1, (-1, *[1] * (len(grid) - 1)))  # grid_sample wants x, y, z
    read = F.grid_sample(image, at.to(image.dtype), mode="bilinear", padding_mode="border", align_corners=False)
    return read.flatten(2).mT


def overlap_grid(affine_a: Tensor, affine_b: Tensor, box: Tensor, points_per_axis: int) -> tuple[Tensor, Tensor]:
    """Return the same points of the overlap in both views: the symmetric region operator of docs/method.md §1.2.

    Args:
        affine_a: (B, d + 1, d + 1) float32.
        affine_b: (B, d + 1, d + 1) float32.
        box: (B, d, 2) float32, overlap box in parent voxels, [low, high) edges per axis.
        points_per_axis: r; r^d points at the centres of a regular grid over the box.

    Returns:
        Two (B, r^d, d) float32: coordinates ``u`` in A and in B.
    """
    grid = (points_per_axis,) * box.shape[1]
    unit = (token_centres(grid, box.device) + 1) / 2  # (r^d, d) in (0, 1)
    points = box[:, None, :, 0] + unit * (box[:, None, :, 1] - box[:, None, :, 0])
    return transform(invert(affine_a), points), transform(invert(affine_b), points)


def shrink_into_views(box: Tensor, affine: Tensor, least: float = 0.1) -> tuple[Tensor, Tensor]:
    """Return boxes shrunk about their middles, in their proportions, until they lie in every view of their sample.

    Where views are only flipped and turned by quarters, the intersection of two is a box that stays as it is. A view
    that is rotated further has turned out of some corners, and the largest box of these proportions is left.

    Args:
        box: (B, d, 2) float32, in parent voxels, [low, high) edges per axis.
        affine: (B, V, d + 1, d + 1) float32, ``u`` of each view to parent voxels.
        least: smallest share of the edges that is looked for.

    Returns:
        The boxes (B, d, 2) float32, and (B,) bool: False where ``least`` of the edges is still too much, and the box
        sticks out.
    """
    middle, half = box.mean(-1), (box[..., 1] - box[..., 0]) / 2
    inverse = torch.linalg.inv_ex(affine[..., :-1, :-1]).inverse  # (B, V, d, d)
    u = (inverse @ (middle[:, None, :, None] - 0.5 - affine[..., :-1, -1:]))[..., 0]  # (B, V, d), of the middle
    reach = (inverse.abs() @ half[:, None, :, None])[..., 0]  # of the corner that lies farthest along each axis
    share = ((1 - u.abs()) / reach).amin((1, 2)).clamp_max(1)  # (B,)
    half = half * share.clamp_min(least)[:, None]
    return torch.stack([middle - half, middle + half], -1), share >= least


def rotation_from_6d(vectors: Tensor) -> Tensor:
    """Return (..., 3, 3) rotations whose first two columns are nearest to the two vectors (..., 6), by Gram-Schmidt.

    From one vector (..., 2) the (..., 2, 2) rotation whose first column is nearest to it.

    Source: Zhou et al., CVPR 2019, arXiv 1812.07035, eq. 15.
    """
    if vectors.shape[-1] == 2:
        first = F.normalize(vectors, dim=-1)
        return torch.stack([first, torch.stack([-first[..., 1], first[..., 0]], -1)], -1)
    first = F.normalize(vectors[..., :3], dim=-1)
    second = vectors[..., 3:]
    second = F.normalize(second - (first * second).sum(-1, keepdim=True) * first, dim=-1)
    return torch.stack([first, second, torch.linalg.cross(first, second)], -1)
