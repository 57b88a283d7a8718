"""Reconstruction of hidden patches."""

from __future__ import annotations

import torch
from torch import Tensor

from agssd.losses.distillation import masked_mean

STD_FLOOR = 0.05


def patch_l1(prediction: Tensor, target: Tensor, voxel_weight: Tensor, token_weight: Tensor) -> Tensor:
    """Return the weighted L1 of hidden patches: per sample over its voxels, then the mean over samples.

    Source: SimMIM's L1 over hidden patches [R: SimMIM]; edge weights, mean per sample: ours (docs/method.md §1.5).

    Args:
        prediction: (B, M, P) float32, voxels of each hidden patch.
        target: (B, M, P) float32.
        voxel_weight: (B, M, P) float32, for example ``1 + edges``.
        token_weight: (B, M) 1 for hidden foreground tokens, else 0.
    """
    counts = token_weight.to(voxel_weight.dtype)
    error = (((prediction - target).abs() * voxel_weight).sum(-1) * counts).sum(1)
    return (error / (voxel_weight.sum(-1) * counts).sum(1).clamp_min(1e-6)).mean()


def patch_mse(prediction: Tensor, target: Tensor, token_weight: Tensor) -> Tensor:
    """Return the mean squared error of hidden patches: per sample over its voxels, then the mean over samples.

    Source: MAE's loss over hidden patches [R: MAE]; mean per sample: ours (docs/method.md §1.5).

    Args:
        prediction: (B, M, P) float32, voxels of each hidden patch.
        target: (B, M, P) float32.
        token_weight: (B, M) 1 for hidden foreground tokens, else 0.
    """
    return masked_mean((prediction - target).square().mean(-1), token_weight)


def patch_scaling(voxels: Tensor, views: Tensor, standardise: bool) -> tuple[Tensor, Tensor]:
    """Return mean and scale (B, N, 1) by which patches become targets: ``(voxels - mean) / scale``.

    Those of each patch, so that its target has mean 0 and standard deviation 1 [R: MAE], or 0 and 1, which leave
    intensities as they are. The scale is at least 0.05 of the view's standard deviation, which keeps homogeneous
    patches (air, fluid) from turning into amplified noise (ours).

    Args:
        voxels: (B, N, P) float32.
        views: (B, C, [D,] H, W) float32, which the patches are of.
        standardise: the patches.
    """
    if not standardise:
        return torch.zeros_like(voxels[..., :1]), torch.ones_like(voxels[..., :1])
    # Not torch.std, which takes a CPU eight times as long. Both are over all voxels, not over one less.
    mean = voxels.mean(-1, keepdim=True)
    spread = (voxels - mean).square_().mean(-1, keepdim=True).sqrt()
    flat = views.flatten(1)
    floor = STD_FLOOR * (flat - flat.mean(1, keepdim=True)).square_().mean(1).sqrt()
    return mean, torch.maximum(spread, floor[:, None, None]).clamp_min(1e-6)
