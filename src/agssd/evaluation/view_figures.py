"""Figures of a step between two overlapping views, each () and NaN where nothing was measured (docs/method.md (c)).

Source: ours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from agssd.transforms.crops import ViewSet


def _mean_where(values: Tensor, chosen: Tensor) -> Tensor:
    """Return the mean of the chosen values, NaN if none is."""
    return (values * chosen).sum() / chosen.sum()


def overlap_figures(geometry: ViewSet, bins: int = 5) -> dict[str, Tensor]:
    """Return overlaps as realised and as wanted, and their share in each of ``bins`` equal parts of [0, 1]."""
    overlap = geometry.overlap
    figures = {
        "overlap": overlap.mean(),
        "overlap_target": geometry.target_overlap.mean(),
        "overlap_above_095": (overlap > 0.95).float().mean(),
    }
    part = (overlap.flatten() * bins).long().clamp(0, bins - 1)
    shares = (part[:, None] == torch.arange(bins, device=overlap.device)).float().mean(0)
    for i, share in enumerate(shares.unbind()):
        figures[f"overlap_{100 * i // bins}_{100 * (i + 1) // bins}"] = share
    return figures


def alignment_figures(own: Tensor, aligned: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """Return how alike tokens are to those at their place in another view, and to that view's others.

    Args:
        own: (B, N, E) tokens.
        aligned: (B, N, E) float32 tokens of the other view, read where these lie.
        valid: (B, N) bool, tokens that lie in it.
    """
    own = F.normalize(own.float(), dim=-1, eps=1e-6)
    aligned = F.normalize(aligned, dim=-1, eps=1e-6)
    weight = valid[..., None].float()  # random ones are interpolated too, which alone makes tokens more alike
    mean_aligned = (weight * aligned).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp_min(1)
    return {
        "cosine_corresponding": _mean_where((own * aligned).sum(-1), valid),
        "cosine_random": _mean_where((own * mean_aligned).sum(-1), valid),
    }


def place_figures(attention: Tensor, shown: Tensor, distance: Tensor, asked: Tensor) -> dict[str, Tensor]:
    """Return how far from the true place attention points, and how far who points at the same place in the view is.

    In token pitches of the other view, along the axis on which it is furthest.

    Args:
        attention: (B, V, N) of shown tokens over those of the other view, or its logarithm.
        shown: (B, V) int64, the positions of these tokens.
        distance: (B, N, N) from the true place of each token to each token of the other view.
        asked: (B, V) bool, tokens that are measured.
    """
    rows = distance.gather(1, shown[..., None].expand(-1, -1, distance.shape[-1]))  # (B, V, N)
    pointed = attention.argmax(-1, keepdim=True)
    return {
        "align_distance": _mean_where(rows.gather(2, pointed)[..., 0], asked),
        "align_distance_same_place": _mean_where(rows.gather(2, shown[..., None])[..., 0], asked),
    }


def fusion_figures(plain: Tensor, fused: Tensor, chosen: Tensor) -> dict[str, Tensor]:
    """Return by how much fusion lowers the cross-entropy of chosen tokens, and its share of what it is without.

    Args:
        plain: (B, M) cross-entropy without fusion.
        fused: (B, M) with it.
        chosen: (B, M) bool, tokens that hold body and lie in the other view.
    """
    without = _mean_where(plain, chosen)
    gap = without - _mean_where(fused, chosen)
    return {"cvaa_gap": gap, "cvaa_gap_share": gap / without}


def reconstruction_figures(
    prediction: Tensor, target: Tensor, counts: Tensor, edges: Tensor, is_ct: Tensor
) -> dict[str, Tensor]:
    """Return the L1 of hidden patches beside that of the view's mean, and PSNR where edges are strong and weak.

    Args:
        prediction: (B, M, P).
        target: (B, M, P) in the model's range.
        counts: (B, M) bool, patches that are measured.
        edges: (B, M), edge score of each patch.
        is_ct: (B,) bool.
    """
    weight = counts[..., None].float().expand_as(target)
    total = weight.sum((1, 2), keepdim=True).clamp_min(1)
    mean = (target * weight).sum((1, 2), keepdim=True) / total
    figures = {
        "rec_l1": _mean_where((prediction - target).abs(), weight > 0),
        "rec_l1_of_mean": _mean_where((mean - target).abs(), weight > 0),
    }
    middle = edges.median(1, keepdim=True).values
    error = (prediction - target).pow(2).mean(-1)
    span = torch.where(is_ct, 1.0, 2.0)[:, None]
    for name, chosen in (("edge", counts & (edges > middle)), ("flat", counts & (edges <= middle))):
        figures[f"rec_psnr_{name}"] = -10 * _mean_where(error / span**2, chosen).log10()
    return figures
