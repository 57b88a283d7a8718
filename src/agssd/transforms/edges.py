"""Edge maps: gradient magnitude per mm on the device, and edge scores per patch (EAAM; docs/method.md §1.3, ours)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from agssd.transforms.separable import smooth
from agssd.types import Triple

SOFT_TISSUE_HU = (-160.0, 240.0)
WIDE_HU = (-1000.0, 1000.0)
MIN_FOREGROUND = 0.05  # patches with less body than this are background


def _gradient_magnitude(image: Tensor, spacing_mm: Tensor) -> Tensor:
    """Return (B, C, D, H, W): norm of the central differences per mm after a Gaussian of 1 mm."""
    smoothed = smooth(image, 1.0 / spacing_mm)
    squared = torch.zeros_like(image)
    for axis in range(3):
        dim = axis + 2
        # Central differences inside, one-sided at the border (torch.gradient takes no spacing per sample).
        (slope,) = torch.gradient(smoothed, dim=dim)
        squared += (slope / spacing_mm[:, axis, None, None, None, None]) ** 2
    return squared.sqrt()


def edge_magnitude(image: Tensor, spacing_mm: Tensor, is_ct: Tensor) -> Tensor:
    """Return the gradient magnitude per mm, not yet normalised.

    For CT it is the larger of the magnitude in a soft-tissue window and half of that in a wide window, so that bone
    and air do not swamp organs. It does not change under flips and axis permutations of the image.

    Args:
        image: (B, C, D, H, W) float32, HU for CT, source units for MRI.
        spacing_mm: (B, 3) float32, of these voxels (for a resampled view, the view's own).
        is_ct: (B,) bool.

    Returns:
        (B, C, D, H, W) float32, intensity units per mm.
    """
    ct = is_ct[:, None, None, None, None]
    wide = _gradient_magnitude(torch.where(ct, image.clamp(*WIDE_HU), image), spacing_mm)
    if is_ct.device.type == "cpu" and not bool(is_ct.any()):
        return wide
    soft = _gradient_magnitude(image.clamp(*SOFT_TISSUE_HU), spacing_mm)
    return torch.where(ct, torch.maximum(soft, 0.5 * wide), wide)


def suppress_border(magnitude: Tensor, foreground: Tensor) -> Tensor:
    """Return the magnitude without the body's artificial outline: 0 outside, a quarter within 2 voxels of the border.

    Args:
        magnitude: (B, C, D, H, W) float32.
        foreground: (B, 1, D, H, W) bool; False in padding.
    """
    inside = foreground.to(magnitude.dtype)
    outside = 1 - inside
    for kernel, padding in (((5, 1, 1), (2, 0, 0)), ((1, 5, 1), (0, 2, 0)), ((1, 1, 5), (0, 0, 2))):
        outside = F.max_pool3d(outside, kernel, stride=1, padding=padding)
    return magnitude * (0.25 * inside + 0.75 * (1 - outside))


def normalise_edges(magnitude: Tensor, q99: Tensor) -> Tensor:
    """Return edges in [0, 1]: ``min(g / q99, 1) ** 0.5``, and 0 where the volume is flat (q99 about 0).

    Args:
        magnitude: (B, C, D, H, W) float32 after :func:`suppress_border`.
        q99: (B, C) float32, the whole volume's 99th percentile inside the foreground.
    """
    q99 = q99[:, :, None, None, None]
    edges = (magnitude / q99.clamp_min(1e-12)).clamp(0, 1).sqrt()
    return torch.where(q99 > 1e-6, edges, torch.zeros_like(edges))


def patches_of(image: Tensor, patch: Triple) -> Tensor:
    """Return (B, N, patch voxels * C) from (B, C, D, H, W), patches in raster order, voxels then channels."""
    return rearrange(image, "b c (d p) (h q) (w r) -> b (d h w) (p q r c)", p=patch[0], q=patch[1], r=patch[2])


def unpatch(patches: Tensor, grid: Triple, patch: Triple) -> Tensor:
    """Return (B, C, D, H, W) from patches (B, N, patch voxels * C): the inverse of :func:`patches_of`."""
    d, h, w = grid
    p, q, r = patch
    return rearrange(patches, "b (d h w) (p q r c) -> b c (d p) (h q) (w r)", d=d, h=h, w=w, p=p, q=q, r=r)


def patch_scores(edges: Tensor, patch: Triple) -> Tensor:
    """Return (B, N): mean of the strongest quarter of the voxels of each patch of ``edges`` (B, C, D, H, W)."""
    voxels = patches_of(edges.amax(1, keepdim=True), patch)
    return voxels.topk(max(1, voxels.shape[-1] // 4), dim=-1, sorted=False).values.mean(-1)


def entropy_scores(image: Tensor, patch: Triple, bins: int = 32) -> Tensor:
    """Return (B, N): entropy in nats of each patch's histogram over the range of its view.

    Source: local entropy guides masks in arXiv 2605.21970 [R]; 32 bins ours.

    Args:
        image: (B, C, D, H, W) float32; channels are averaged.
        patch: voxels of a patch.
        bins: number of equal bins between the view's lowest and highest intensity.
    """
    grey = image.mean(1, keepdim=True)
    low, high = grey.amin((1, 2, 3, 4), keepdim=True), grey.amax((1, 2, 3, 4), keepdim=True)
    unit = (grey - low) / (high - low).clamp_min(1e-6)
    index = (patches_of(unit, patch) * bins).long().clamp_max(bins - 1)  # (B, N, p)
    counts = torch.zeros(*index.shape[:2], bins, device=image.device).scatter_add_(
        2, index, torch.ones_like(index, dtype=torch.float32)
    )
    share = counts / index.shape[-1]
    return -(share * share.clamp_min(1e-12).log()).sum(-1)


def foreground_share(foreground: Tensor, patch: Triple) -> Tensor:
    """Return (B, N) float32: share of body voxels in each patch of (B, 1, D, H, W)."""
    return patches_of(foreground.float(), patch).mean(-1)


def standardise(scores: Tensor, eligible: Tensor) -> Tensor:
    """Return (B, N): z-scores over the eligible patches of each sample; all 0 where they do not vary."""
    weight = eligible.float()
    count = weight.sum(1, keepdim=True).clamp_min(1)
    mean = (scores * weight).sum(1, keepdim=True) / count
    std = (((scores - mean) ** 2 * weight).sum(1, keepdim=True) / count).sqrt()
    return torch.where(std > 1e-6, (scores - mean) / std.clamp_min(1e-6), torch.zeros_like(scores))
