"""Edge maps: gradient magnitude per mm on the device, and edge scores per patch (EAAM; docs/method.md §1.3, ours)."""

from __future__ import annotations

import math

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from agssd.geometry import axis_names, per_sample, sizes_of
from agssd.transforms.separable import smooth
from agssd.types import Size

SOFT_TISSUE_HU = (-160.0, 240.0)
WIDE_HU = (-1000.0, 1000.0)
MIN_FOREGROUND = 0.05  # patches with less body than this are background


def _gradient_magnitude(image: Tensor, spacing_mm: Tensor) -> Tensor:
    """Return (B, C, [D,] H, W): norm of the central differences per mm after a Gaussian of 1 mm.

    One-sided differences at the border of the view. Not torch.gradient, which takes no spacing per sample and passes
    over the image twice as often.
    """
    smoothed = smooth(image, 1.0 / spacing_mm)
    squared = torch.zeros_like(smoothed)
    for axis in range(image.ndim - 2):
        dim, length = axis + 2, image.shape[axis + 2]
        # Where the difference goes, and how many voxels lie between its ends.
        for start, count, ends in ((1, length - 2, 2), (0, 1, 1), (length - 1, 1, 1)):
            low = start - 1 if start else 0
            rise = smoothed.narrow(dim, low + ends, count) - smoothed.narrow(dim, low, count)
            rise /= per_sample(ends * spacing_mm[:, axis], rise)
            squared.narrow(dim, start, count).addcmul_(rise, rise)
    return squared.sqrt_()


def edge_magnitude(image: Tensor, spacing_mm: Tensor, is_ct: Tensor) -> Tensor:
    """Return the gradient magnitude per mm, not yet normalised.

    For CT it is the larger of the magnitude in a soft-tissue window and half of that in a wide window, so that bone
    and air do not swamp organs. It does not change under flips and axis permutations of the image.

    Args:
        image: (B, C, [D,] H, W) float32, HU for CT, source units for MRI.
        spacing_mm: (B, d) float32, of these voxels (for a resampled view, the view's own).
        is_ct: (B,) bool.

    Returns:
        (B, C, [D,] H, W) float32, intensity units per mm.
    """
    if is_ct.device.type == "cpu" and not bool(is_ct.any()):
        return _gradient_magnitude(image, spacing_mm)
    ct = per_sample(is_ct, image)
    wide = _gradient_magnitude(torch.where(ct, image.clamp(*WIDE_HU), image), spacing_mm)
    soft = _gradient_magnitude(image.clamp(*SOFT_TISSUE_HU), spacing_mm)
    return torch.where(ct, torch.maximum(soft, 0.5 * wide), wide)


def region_boundaries(regions: Tensor, spacing_mm: Tensor) -> Tensor:
    """Return how strong the boundaries between regions are at each voxel, in [0, 1].

    Along each axis, every change of number from one voxel to the next is a crossing; a voxel takes the mean of the two
    beside it, per mm. Smoothed by a Gaussian of 1 mm per axis, their norm is the area of boundary per volume, which way
    ever it runs: ``exp(-t² / 2)`` at t mm from a flat boundary alone, where voxels are small beside 1 mm, and more
    where several meet. That is x of ``1 - exp(-x)``, which keeps it below 1 and never levels off.

    Args:
        regions: (B, 1, [D,] H, W) integers; 0, no region, is told from others like any number.
        spacing_mm: (B, d) float32, of these voxels (for a resampled view, the view's own).

    Returns:
        (B, 1, [D,] H, W) float32, before :func:`suppress_border`.
    """
    crossings = []
    for axis in range(regions.ndim - 2):
        dim, length = axis + 2, regions.shape[axis + 2]
        changed = (regions.diff(dim=dim) != 0).float()
        # At the border of the view the one that is seen counts whole, as in the slope of an image.
        beside = torch.cat([changed.narrow(dim, 0, 1), changed, changed.narrow(dim, length - 2, 1)], dim)
        mean = (beside.narrow(dim, 0, length) + beside.narrow(dim, 1, length)) / 2
        crossings.append(mean / per_sample(spacing_mm[:, axis], mean))
    density: Tensor = smooth(torch.cat(crossings, 1), 1.0 / spacing_mm).norm(dim=1, keepdim=True)  # mm² per mm³
    return 1 - (-math.sqrt(2 * math.pi) * density).exp()


def suppress_border(magnitude: Tensor, foreground: Tensor) -> Tensor:
    """Return the magnitude without the body's artificial outline: 0 outside, a quarter within 2 voxels of the border.

    Args:
        magnitude: (B, C, [D,] H, W) float32.
        foreground: (B, 1, [D,] H, W) bool or uint8; False in padding.
    """
    deep = foreground
    for dim in range(2, foreground.ndim):
        deep = _all_nearby(deep, dim, 2)
    quarters = foreground.to(torch.uint8) + 3 * deep.to(torch.uint8)
    return (magnitude * quarters).mul_(0.25)


def _all_nearby(image: Tensor, dim: int, reach: int) -> Tensor:
    """Return whether all within ``reach`` voxels along one axis are True (bool); nobody asks beyond the border.

    Not max_pool3d, which is 25 times slower on a CPU (51 ms against 2 for 32 views of 32³ along three axes; one
    thread of a 2-core x86-64 CPU, torch 2.13, 2026-11-22).
    """
    found, length = image.clone(), image.shape[dim]
    for shift in range(1, min(reach, length - 1) + 1):
        for here, there in ((0, shift), (shift, 0)):
            found.narrow(dim, here, length - shift).logical_and_(image.narrow(dim, there, length - shift))
    return found


def normalise_edges(magnitude: Tensor, q99: Tensor) -> Tensor:
    """Return edges in [0, 1]: ``min(g / q99, 1) ** 0.5``, and 0 where the volume is flat (q99 about 0).

    Args:
        magnitude: (B, C, [D,] H, W) float32 after :func:`suppress_border`.
        q99: (B, C) float32, the whole volume's 99th percentile inside the foreground.
    """
    of_q99 = torch.where(q99 > 1e-6, 1 / q99, torch.zeros_like(q99))
    return (magnitude * per_sample(of_q99, magnitude)).clamp_(0, 1).sqrt_()


def patches_of(image: Tensor, patch: Size) -> Tensor:
    """Return (B, N, patch voxels * C) from (B, C, [D,] H, W), patches in raster order, voxels then channels."""
    cells, within, whole = axis_names(len(patch))
    return rearrange(image, f"b c {whole} -> b ({cells}) ({within} c)", **sizes_of(within, patch))


def unpatch(patches: Tensor, grid: Size, patch: Size) -> Tensor:
    """Return (B, C, [D,] H, W) from patches (B, N, patch voxels * C): the inverse of :func:`patches_of`."""
    cells, within, whole = axis_names(len(patch))
    sizes = sizes_of(cells, grid) | sizes_of(within, patch)
    return rearrange(patches, f"b ({cells}) ({within} c) -> b c {whole}", **sizes)


def patch_scores(edges: Tensor, patch: Size) -> Tensor:
    """Return (B, N): mean of the strongest quarter of the voxels of each patch of ``edges`` (B, C, [D,] H, W)."""
    voxels = patches_of(edges if edges.shape[1] == 1 else edges.amax(1, keepdim=True), patch)
    strongest = max(1, voxels.shape[-1] // 4)
    if type(voxels) is Tensor and voxels.device.type == "cpu":  # not the fake ones of `agssd plan`
        # topk takes five times as long there: 10 ms against 2 for 32 views of 32³ (one thread of a 2-core x86-64 CPU,
        # torch 2.13, 2026-11-22).
        found = np.partition(voxels.detach().numpy(), -strongest, axis=-1)[..., -strongest:]
        return torch.from_numpy(found).mean(-1)
    return voxels.topk(strongest, dim=-1, sorted=False).values.mean(-1)


def entropy_scores(image: Tensor, patch: Size, bins: int = 32) -> Tensor:
    """Return (B, N): entropy in nats of each patch's histogram over the range of its view.

    Source: local entropy guides masks in arXiv 2605.21970 [R]; 32 bins ours.

    Args:
        image: (B, C, [D,] H, W) float32; channels are averaged.
        patch: voxels of a patch.
        bins: number of equal bins between the view's lowest and highest intensity.
    """
    grey = image.mean(1, keepdim=True)
    low, high = (per_sample(x, grey) for x in grey.flatten(1).aminmax(dim=1))
    unit = (grey - low) / (high - low).clamp_min(1e-6)
    index = (patches_of(unit, patch) * bins).long().clamp_max(bins - 1)  # (B, N, p)
    counts = torch.zeros(*index.shape[:2], bins, device=image.device).scatter_add_(
        2, index, torch.ones_like(index, dtype=torch.float32)
    )
    share = counts / index.shape[-1]
    return -(share * share.clamp_min(1e-12).log()).sum(-1)


def foreground_share(foreground: Tensor, patch: Size) -> Tensor:
    """Return (B, N) float32: share of body voxels in each patch of (B, 1, [D,] H, W)."""
    return patches_of(foreground.float(), patch).mean(-1)


def standardise(scores: Tensor, eligible: Tensor) -> Tensor:
    """Return (B, N): z-scores over the eligible patches of each sample; all 0 where they do not vary."""
    weight = eligible.float()
    count = weight.sum(1, keepdim=True).clamp_min(1)
    mean = (scores * weight).sum(1, keepdim=True) / count
    std = (((scores - mean) ** 2 * weight).sum(1, keepdim=True) / count).sqrt()
    return torch.where(std > 1e-6, (scores - mean) / std.clamp_min(1e-6), torch.zeros_like(scores))
