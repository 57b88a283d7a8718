"""VoCo: where a crop lies, as its similarity to base crops; and base crops that are told apart."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from agssd.losses.distillation import masked_mean

KNEE = 0.95  # distance from which -log(1 - d) goes on as its tangent


def position_loss(cosines: Tensor, overlap: Tensor, counts: Tensor) -> Tensor:
    """Return the mean of ``-log(1 - |overlap - similarity|)`` over crops and bases: per sample, then over samples.

    Similarities below 0 count as 0 where a base is not overlapped. Where it is, they keep pulling: from a distance of
    0.95 on the logarithm, which has no value beyond 1, goes on as its tangent (ours).

    Source: Wu, Zhuang and Chen, CVPR 2024, arXiv 2402.17300, eq. 3 [R: VoCo].

    Args:
        cosines: (B, m, n) float32, crop against base.
        overlap: (B, m, n) float32, share of the crop that lies in the base.
        counts: (B, n) bool, bases that take part.
    """
    distance = (overlap - torch.where(overlap > 0, cosines, cosines.clamp_min(0))).abs()
    near = -torch.log1p(-distance.clamp_max(KNEE))
    far = -math.log(1 - KNEE) + (distance - KNEE) / (1 - KNEE)
    loss = torch.where(distance < KNEE, near, far)
    return masked_mean(loss.flatten(1), counts[:, None].expand_as(loss).flatten(1))


def base_orthogonality(bases: Tensor, counts: Tensor) -> Tensor:
    """Return the mean absolute cosine of all pairs of a sample's bases; 0 for a sample with fewer than two that count.

    Source: VoCo, eq. 4 [R: VoCo].

    Args:
        bases: (B, n, E).
        counts: (B, n) bool, bases that take part.
    """
    unit = F.normalize(bases.float(), dim=-1, eps=1e-6)
    first, second = torch.triu_indices(bases.shape[1], bases.shape[1], 1, device=bases.device)
    cosines = (unit[:, first] * unit[:, second]).sum(-1)
    return masked_mean(cosines.abs(), counts[:, first] & counts[:, second])
