"""CVAC: overlap-aware views of one parent crop, as affine maps, and their extraction on the device.

Source: AG-SSD's abstract names overlap-aware cropping that gives multi-scale, anatomically consistent positives
[paper]; the target range of the overlap and its split over axes follow CVA / LatentCampus [R: CVA]; shared aspect,
independent scales, all diagonal directions, retries on foreground and local crops tied to the overlap are ours
(docs/method.md §1.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from agssd.geometry import constant, num_rotations, rotation_matrices, signed_permutations, view_affine
from agssd.transforms.keyed_random import KeyedRandom
from agssd.transforms.separable import apply_separable, gaussian_matrix, interpolation_matrix
from agssd.types import Size

Orientations = Literal["none", "flips", "all"]
Centres = Literal["uniform", "regions"]
_TRIES = 10
_NO_BLUR_VOX = 0.17  # a Gaussian so narrow has weights below 2⁻²⁴ beside its centre: the identity in float32


@dataclass(frozen=True)
class ViewGeometry:
    """Where the views of a batch lie in their parents. Positions are voxel edges: the parent spans [0, S] per axis."""

    centre: Tensor  # (B, V, d) float32
    edge: Tensor  # (B, V, d) float32, voxels along the parent's axes
    orientation: Tensor  # (B, V) int64, element of geometry.signed_permutations()
    affine: Tensor  # (B, V, d + 1, d + 1) float32, u to parent voxel coordinates (voxel centres at integers)
    rotated: bool  # whether any view has a rotation beyond quarter turns

    def spacing_mm(self, parent_mm: Tensor, size_vox: Size) -> Tensor:
        """Return (B, V, d) float32: voxel spacing of the views along their own axes, from (B, d) of the parents."""
        linear = self.affine[..., :-1, :-1] * parent_mm[:, None, :, None]  # mm per unit of u, row = parent axis
        length: Tensor = linear.norm(dim=-2) * 2  # mm of a whole view per axis
        return length / constant(size_vox, linear.device)


@dataclass(frozen=True)
class ViewSet:
    """Geometry of one draw: two global views and the local ones."""

    globals: ViewGeometry  # V = 2
    locals: ViewGeometry | None  # V = num_local
    overlap_box: Tensor  # (B, d, 2) float32, edges in parent voxels
    target_overlap: Tensor  # (B,) float32, share of the smaller global view's volume
    overlap: Tensor  # (B,) float32, the same as realised


class OverlapCrops:
    """Draw two overlapping global views and local views per sample, and cut them from the parent.

    ``size_vox`` with two numbers makes views of frames, (H, W); ``local_size_vox`` and ``prob_flip`` then have two too.

    Args:
        size_vox: output size of a global view in voxels; every axis a multiple of the patch.
        scale: range of a global view's edge as a share of ``size_vox``, in parent voxels; one draw per view.
        aspect: range of the edges' ratio before normalising their product to 1; one draw per sample, shared by its
            views, so that one view is the smaller on every axis and the overlap is a share of its volume.
        overlap: range of the target overlap as a share of the smaller global view's volume; never undercut.
        num_local: local views per sample.
        local_size_vox: output size of a local view in voxels.
        local_scale: range of a local view's edge as a share of the global ``size_vox``.
        prob_local_in_overlap: share of local views whose centre is drawn from the overlap; others from the union.
        orientations: ``"flips"`` (each axis with ``prob_flip``), ``"all"`` 48 flips and quarter turns (8 in 2D), or
            ``"none"``.
        prob_flip: probability of a flip per axis ([D,] H, W); set W to 0 where laterality matters.
        rotation_deg: largest rotation about each axis beyond quarter turns; above 0 views are cut by
            ``grid_sample`` instead of separable products. Overlap is that of the boxes before the rotation, and a
            corner that turns out of the parent repeats its border.
        min_foreground: redraw, up to 10 times, while the overlap holds less body than this; the best draw is kept.
        centres: where the first global view of a sample lies, around which the others are placed: ``"uniform"`` in the
            parent, or balanced over ``"regions"``: around a voxel of one of the parent's regions, each of which is as
            likely as any other, so that small ones are met as often as large ones (ours). The view is moved into the
            parent where it would stick out; a parent without any region is cut as by ``"uniform"``.

    Raises:
        ValueError: if a range is empty or out of bounds, sizes differ in their number of axes, or
            ``orientations="all"`` meets a view that is not cubic.
    """

    def __init__(
        self,
        size_vox: Size = (96, 96, 96),
        scale: tuple[float, float] = (0.75, 1.33),
        aspect: tuple[float, float] = (0.85, 1.18),
        overlap: tuple[float, float] = (0.3, 0.8),
        num_local: int = 6,
        local_size_vox: Size = (48, 48, 48),
        local_scale: tuple[float, float] = (0.35, 0.6),
        prob_local_in_overlap: float = 0.5,
        orientations: Orientations = "flips",
        prob_flip: tuple[float, ...] = (0.5, 0.5, 0.5),
        rotation_deg: float = 0.0,
        min_foreground: float = 0.25,
        centres: Centres = "uniform",
    ) -> None:
        dims = len(size_vox)
        if dims not in (2, 3):
            raise ValueError(
                f"views.size_vox is {tuple(size_vox)}; give three numbers (D, H, W), or two (H, W) for frames"
            )
        for name, values in (("local_size_vox", local_size_vox), ("prob_flip", prob_flip)):
            if len(values) != dims:
                raise ValueError(
                    f"views.{name} is {tuple(values)}, but views.size_vox {tuple(size_vox)} has {dims} axes; "
                    f"give {dims} numbers"
                )
        for name, (low, high), top in (
            ("scale", scale, 4.0),
            ("aspect", aspect, 4.0),
            ("overlap", overlap, 1.0),
            ("local_scale", local_scale, 4.0),
        ):
            if not 0 < low <= high <= top:
                raise ValueError(f"views.{name} is ({low}, {high}); give 0 < low <= high <= {top:g}")
        for name, size in (("size_vox", size_vox), ("local_size_vox", local_size_vox)):
            if orientations == "all" and len(set(size)) > 1:
                raise ValueError(
                    f"views.{name} is {tuple(size)} with orientations='all'; quarter turns need a cube, "
                    "or set views.orientations to 'flips'"
                )
        self.size_vox: Size = tuple(size_vox)
        self.scale = scale
        self.aspect = aspect
        self.overlap = overlap
        self.num_local = num_local
        self.local_size_vox: Size = tuple(local_size_vox)
        self.local_scale = local_scale
        self.prob_local_in_overlap = prob_local_in_overlap
        self.orientations = orientations
        self.prob_flip = tuple(prob_flip)
        self.rotation_deg = rotation_deg
        self.min_foreground = min_foreground
        self.centres = centres

    def sample(self, foreground: Tensor, sample: Tensor, seed: int, regions: Tensor | None = None) -> ViewSet:
        """Draw the views of every sample; a function of (seed, sample), the foreground and the regions alone.

        Args:
            foreground: (B, 1, D, H, W) bool or uint8 of the parent crops.
            sample: (B,) int64.
            seed: seed of the run.
            regions: (B, 1, D, H, W) integers, 0 = none, for ``centres="regions"``.
        """
        device = foreground.device
        parent = constant(tuple(foreground.shape[2:]), device)
        size = constant(self.size_vox, device)
        random = KeyedRandom(seed, sample, "views")
        tries, dims = _TRIES, len(self.size_vox)

        aspect = random.between(*self.aspect, tries, 1, dims)
        aspect = aspect / aspect.prod(-1, keepdim=True) ** (1 / dims)
        edges = size * random.between(*self.scale, tries, 2, 1) * aspect  # (B, T, 2, d)
        edges = torch.minimum(edges, parent)
        target = random.between(*self.overlap, tries)  # (B, T)
        split = -random.uniform(tries, dims).log()
        split = split / split.sum(-1, keepdim=True)  # Dirichlet(1, ..., 1)
        shared = target[..., None] ** split * edges.amin(2)  # (B, T, d), overlap in voxels per axis

        edge_a, edge_b = edges[:, :, 0], edges[:, :, 1]
        centre_a = edge_a / 2 + random.uniform(tries, dims) * (parent - edge_a)
        if self.centres == "regions":
            assert regions is not None, "make_views refuses batches without"
            voxel, some = balanced_voxels(regions, KeyedRandom(seed, sample, "regions of views"))
            around = (voxel + 0.5)[:, None].clamp(edge_a / 2, parent - edge_a / 2)
            centre_a = torch.where(some[:, None, None], around, centre_a)
        step = (edge_a + edge_b) / 2 - shared
        sign = torch.where(random.uniform(tries, dims) < 0.5, -1.0, 1.0)
        wanted = torch.stack([centre_a + sign * step, centre_a - sign * step])
        clamped = wanted.clamp(edge_b / 2, parent - edge_b / 2)
        moved = (wanted - clamped).abs()
        # Clamping only moves B towards A, so the overlap can only grow; the sign that needs less of it is taken.
        centre_b = torch.where(moved[0] <= moved[1] + 1e-4, clamped[0], clamped[1])
        centres = torch.stack([centre_a, centre_b], 2)  # (B, T, 2, d)

        low = (centres - edges / 2).amax(2)
        high = (centres + edges / 2).amin(2)
        body = box_share(foreground, low, high)  # (B, T)
        accepted = body >= self.min_foreground
        # The first accepted draw, else the one with most body.
        rank = torch.where(accepted, 2.0 + torch.arange(tries, 0, -1, device=device), body)
        best = rank.argmax(1)

        def pick(x: Tensor) -> Tensor:
            return x[torch.arange(x.shape[0], device=device), best]

        centres, edges, low, high, target = (pick(x) for x in (centres, edges, low, high, target))
        realised = ((high - low) / edges.amin(1)).clamp(0, 1).prod(-1)
        views = self._place(centres, edges, random)
        return ViewSet(
            globals=views,
            locals=self._local_views(random, parent, size, centres, edges, low, high) if self.num_local else None,
            overlap_box=torch.stack([low, high], -1),
            target_overlap=target,
            overlap=realised,
        )

    def _local_views(
        self,
        random: KeyedRandom,
        parent: Tensor,
        size: Tensor,
        centres: Tensor,
        edges: Tensor,
        low: Tensor,
        high: Tensor,
    ) -> ViewGeometry:
        count = self.num_local
        edge = torch.minimum(size * random.between(*self.local_scale, count, 1), parent).expand(-1, -1, len(size))
        in_overlap = random.uniform(count, 1) < self.prob_local_in_overlap
        from_a = random.uniform(count, 1) < 0.5
        other = torch.where(from_a, centres[:, :1], centres[:, 1:])
        other_edge = torch.where(from_a, edges[:, :1], edges[:, 1:])
        box_low = torch.where(in_overlap, low[:, None], other - other_edge / 2)
        box_high = torch.where(in_overlap, high[:, None], other + other_edge / 2)
        centre = box_low + random.uniform(count, len(size)) * (box_high - box_low)
        return self._place(centre.clamp(edge / 2, parent - edge / 2), edge, random)

    def _place(self, centre: Tensor, edge: Tensor, random: KeyedRandom) -> ViewGeometry:
        views, dims = centre.shape[1:]
        table = signed_permutations(centre.device, dims)
        if self.orientations == "all":
            index = (random.uniform(views) * len(table)).long()
        elif self.orientations == "flips":
            flips = random.uniform(views, dims) < constant(self.prob_flip, centre.device)
            bits = constant(tuple(2**axis for axis in reversed(range(dims))), centre.device, torch.int64)
            index = (flips.long() * bits).sum(-1)
        else:
            index = torch.zeros(centre.shape[:2], dtype=torch.int64, device=centre.device)
        rotation = None
        if self.rotation_deg > 0:
            limit = torch.pi * self.rotation_deg / 180
            rotation = rotation_matrices(random.between(-limit, limit, views, num_rotations(dims)))
        affine = view_affine(centre - 0.5, edge, table[index], rotation)
        return ViewGeometry(centre, edge, index, affine, rotation is not None)


def balanced_voxels(regions: Tensor, random: KeyedRandom) -> tuple[Tensor, Tensor]:
    """Draw a region of each crop uniformly among those that it holds, and one of its voxels uniformly.

    Args:
        regions: (B, 1, [D,] H, W) integers, 0 = none.
        random: keyed by the B samples.

    Returns:
        The voxel (B, d) int64, and (B,) bool whether the crop holds any region; the voxel means nothing where not.
    """
    numbers = regions.flatten(1)
    lots = random.of_numbers(numbers).masked_fill(numbers == 0, -1)  # the region of the highest lot is drawn
    drawn = numbers.gather(1, lots.argmax(1, keepdim=True))
    counted = (numbers == drawn).cumsum(1)  # (B, V)
    count = counted[:, -1:]
    nth = torch.minimum((random.uniform(1) * count).long(), count - 1)  # a float32 below 1 times n may round to n
    index = torch.searchsorted(counted, nth + 1)[:, 0]
    return torch.stack(torch.unravel_index(index, regions.shape[2:]), -1), drawn[:, 0] > 0


def box_views(low: Tensor, edge: Tensor) -> ViewGeometry:
    """Return views of boxes as they lie in their parents, neither flipped nor turned.

    Args:
        low: (B, V, d) float32, lower edges in parent voxels.
        edge: (..., d) float32, edge lengths; broadcast against ``low``.
    """
    edges = edge.expand_as(low)
    none = torch.zeros(low.shape[:2], dtype=torch.int64, device=low.device)
    identity = torch.eye(low.shape[2], device=low.device).expand(*low.shape[:2], -1, -1)
    centre = low + edges / 2
    return ViewGeometry(centre, edges, none, view_affine(centre - 0.5, edges, identity), rotated=False)


def box_share(mask: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return the share of True voxels in boxes; on a GPU from one integral volume.

    Args:
        mask: (B, 1, D, H, W) bool or uint8.
        low: (B, T, d) float32, lower edges in voxels; rounded to voxel edges.
        high: (B, T, d) float32, upper edges.

    Returns:
        (B, T) float32.
    """
    shape = constant(tuple(mask.shape[2:]), mask.device, torch.int64)
    a = torch.minimum(low.round().long().clamp_min(0), shape - 1)
    b = torch.maximum(torch.minimum(high.round().long(), shape), a + 1)
    if mask.device.type == "cpu":  # counting ten boxes of 60³ takes 0.5 ms, the integral of 168³ 25 ms
        voxels = mask.numpy()
        corners = zip(a.flatten(0, 1).tolist(), b.flatten(0, 1).tolist(), strict=True)
        boxes = (voxels[row // a.shape[1], 0][tuple(map(slice, *pair))] for row, pair in enumerate(corners))
        counts = torch.tensor([np.count_nonzero(box) for box in boxes], dtype=torch.float32)
        return counts.view(a.shape[:2]) / (b - a).prod(-1)
    dims = len(shape)
    integral = F.pad(mask[:, 0].to(torch.int32), (1, 0) * dims)
    for dim in range(1, dims + 1):
        integral = integral.cumsum(dim, dtype=torch.int32)
    rows = torch.arange(mask.shape[0], device=mask.device)[:, None]
    total = torch.zeros(low.shape[:2], device=mask.device)
    for corner in range(2**dims):
        ends = [b[..., axis] if corner >> axis & 1 else a[..., axis] for axis in range(dims)]
        sign = -1.0 if (dims - corner.bit_count()) % 2 else 1.0
        total += sign * integral[(rows, *ends)]
    return total / (b - a).prod(-1)


def extract(parent: Tensor, views: ViewGeometry, size_vox: Size, separable: bool | None = None) -> Tensor:
    """Cut views from their parents with one linear resampling each, smoothed first where they shrink.

    The pre-blur's standard deviation is ``0.5 max(0, edge / size - 1)`` parent voxels per axis.

    Args:
        parent: (B, C, D, H, W) float32; on the CPU also integers and bool.
        views: geometry of V views per sample.
        size_vox: output size.
        separable: True for matrix products (axis-aligned views only), False for ``grid_sample``; None chooses.

    Returns:
        (B, V, C, *size_vox) float32.
    """
    if separable is None:
        separable = not views.rotated
    return _extract_separable(parent, views, size_vox) if separable else _extract_grid(parent, views, size_vox)


def extract_with_body(parent: Tensor, foreground: Tensor, views: ViewGeometry, size_vox: Size) -> tuple[Tensor, Tensor]:
    """Return views (B, V, C, *size_vox) float32 of images, as :func:`extract`, and which of their voxels are body.

    Args:
        parent: (B, C, [D,] H, W) float32.
        foreground: (B, 1, [D,] H, W) bool or uint8.
        views: geometry of V views per sample.
        size_vox: output size.

    Returns:
        The views, and (B, V, 1, *size_vox) bool, True where more than half of what a voxel reads is.
    """
    if parent.device.type == "cpu":  # where one tensor of both would be copied for nothing
        return extract(parent, views, size_vox), extract(foreground, views, size_vox) > 0.5
    image, body = extract(torch.cat([parent, foreground.float()], 1), views, size_vox).tensor_split([-1], 2)
    return image, body > 0.5


def extract_numbers(parent: Tensor, views: ViewGeometry, size_vox: Size) -> Tensor:
    """Cut views from maps of numbers, such as regions: each voxel takes the number of the nearest voxel.

    Every coordinate is a sum of products in one order, so that a view does not depend on the rest of the batch.

    Args:
        parent: (B, 1, [D,] H, W) integers.
        views: geometry of V views per sample.
        size_vox: output size.

    Returns:
        (B, V, 1, *size_vox) of the same type; what turns out of the parent repeats its border, as in ``extract``.
    """
    batch, count = views.centre.shape[:2]
    dims, device = len(size_vox), parent.device
    index = torch.zeros((), dtype=torch.int64, device=device)
    for axis, length in enumerate(parent.shape[2:]):
        at = views.affine[..., axis, -1].view(batch, count, *[1] * dims)
        for along, n in enumerate(size_vox):
            u = (2 * torch.arange(n, device=device, dtype=torch.float32) + 1) / n - 1
            slope = views.affine[..., axis, along].view(batch, count, *[1] * dims)
            at = at + slope * u.view(-1, *[1] * (dims - 1 - along))
        index = index * length + (at + 0.5).floor().long().clamp(0, length - 1)
    return parent.flatten(1).gather(1, index.flatten(1)).view(batch, count, 1, *size_vox)


def _blur_sigma(views: ViewGeometry, size_vox: Size) -> Tensor:
    """Return (B, V, d): standard deviation of the pre-blur along the parent's axes, in parent voxels."""
    permutation = signed_permutations(views.edge.device, len(size_vox))[views.orientation].abs()
    size = permutation @ constant(size_vox, views.edge.device)
    return 0.5 * (views.edge / size - 1).clamp_min(0)


def _extract_separable(parent: Tensor, views: ViewGeometry, size_vox: Size) -> Tensor:
    table = signed_permutations(parent.device, len(size_vox))
    signed = table[views.orientation]  # (B, V, d, d)
    sigma = _blur_sigma(views, size_vox)
    matrices = []
    for axis, n in enumerate(size_vox):
        u = (2 * torch.arange(n, device=parent.device, dtype=torch.float32) + 1) / n - 1
        sign = signed[:, :, axis].sum(-1, keepdim=True)
        positions = views.centre[..., axis, None] - 0.5 + views.edge[..., axis, None] / 2 * sign * u  # (B, V, n)
        length = parent.shape[2 + axis]
        weights = interpolation_matrix(positions, length)
        blurs = sigma[..., axis, None, None] > _NO_BLUR_VOX  # of each view by itself, whatever else is in the batch
        if parent.device.type != "cpu" or blurs.any():
            weights = torch.where(blurs, weights @ gaussian_matrix(sigma[..., axis], length), weights)
        matrices.append(weights)
    cut = apply_separable(parent, tuple(matrices))
    if len(set(size_vox)) > 1:
        return cut  # quarter turns are refused for views that are not cubic
    return _permute(cut, views.orientation // 2 ** len(size_vox))


def _permute(cut: Tensor, order: Tensor) -> Tensor:
    """Turn cubic views (B, V, C, n, ..., n) from the parent's axis order to their own, by index (B, V) of the order."""
    dims = cut.ndim - 3
    # (6, 3) or (2, 2): for every view axis the parent axis it runs along
    axes = signed_permutations(dims=dims)[:: 2**dims].abs().argmax(-2)
    if cut.device.type == "cpu":
        for b, v in order.nonzero().tolist():
            cut[b, v] = cut[b, v].permute(0, *(1 + axis for axis in axes[order[b, v]].tolist())).clone()
        return cut
    n = cut.shape[-1]
    flat = torch.arange(n**dims, device=cut.device).reshape((n,) * dims)
    table = torch.stack([flat.permute(*(int(a) for a in row)).reshape(-1) for row in axes])
    index = table[order][:, :, None].expand(-1, -1, cut.shape[2], -1)
    return cut.flatten(3).gather(3, index).reshape(cut.shape)


def _extract_grid(parent: Tensor, views: ViewGeometry, size_vox: Size) -> Tensor:
    batch, count = views.centre.shape[:2]
    sigma = _blur_sigma(views, size_vox)
    lengths = parent.shape[2:]
    blur = tuple(gaussian_matrix(sigma[..., axis], length) for axis, length in enumerate(lengths))
    smoothed = apply_separable(parent, blur).flatten(0, 1)  # (B V, C, *lengths)
    axes = [(2 * torch.arange(n, device=parent.device, dtype=torch.float32) + 1) / n - 1 for n in size_vox]
    u = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(size_vox))
    voxels = u @ views.affine[..., :-1, :-1].mT + views.affine[..., None, :-1, -1]  # (B, V, n, d)
    extent = constant(tuple(lengths), parent.device)
    at = ((2 * voxels + 1) / extent - 1).flip(-1).reshape(batch * count, *size_vox, len(size_vox))
    cut = F.grid_sample(smoothed, at, mode="bilinear", padding_mode="border", align_corners=False)
    return rearrange(cut, "(b v) ... -> b v ...", v=count)


def box_in_view(views: ViewGeometry, view: int, box: Tensor, size_vox: Size) -> Tensor:
    """Return (B, d, 2) float32: a parent box (B, d, 2) in voxel edges of view ``view``, [low, high) per view axis."""
    affine = views.affine[:, view]
    corners = box - 0.5  # voxel edges to voxel coordinates
    linear_inverse = torch.linalg.inv_ex(affine[:, :-1, :-1]).inverse
    u = linear_inverse @ (corners - affine[:, :-1, -1, None])  # (B, d, 2): exact for axis-aligned views
    size = constant(size_vox, box.device)[:, None]
    ends: Tensor = (u + 1) / 2 * size
    return ends.sort(-1).values
