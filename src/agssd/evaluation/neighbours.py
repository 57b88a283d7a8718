"""Weighted votes of the most similar training features.

Source: [R: DINO] k-NN protocol (cosine similarity s, weight exp(s / 0.07)), docs/method.md (d); features are centred on
the mean of the training features first [R: SimpleShot], since what all tokens of an encoder share tells none apart, and
cosines near 1 make all votes alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

TEMPERATURE = 0.07
COUNTS = (1, 5, 10, 20, 100, 200)  # candidates of k
_FEW = 500
_MAX_SIMILARITIES = 1 << 25


def candidates(num_training: int, counts: Sequence[int] = COUNTS) -> list[int]:
    """Return the k that ``num_training`` training features allow: 1 and 5 only below 500; 1 where none else fits."""
    fit = [k for k in counts if k <= num_training and (k >= 10 or num_training < _FEW)]
    return fit or [1]


@torch.no_grad()
def neighbours(queries: Tensor, training: Tensor, k: int, excluded: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the weights and rows of the k most similar training features, most similar first.

    Args:
        queries: (M, E) float.
        training: (N, E) float, N at least k.
        k: how many.
        excluded: (M, N) bool, True where a training feature may not vote (it is of the same subject); None for none.
            An excluded feature has weight 0.

    Returns:
        (M, k) float32 weights ``exp((s - 1) / 0.07)`` of the cosine similarity s of centred features, and
        (M, k) int64 rows.
    """
    mean = training.float().mean(0)
    unit = F.normalize(training.float() - mean, dim=-1)
    chunk = max(1, _MAX_SIMILARITIES // len(unit))
    weights, rows = [], []
    for first in range(0, len(queries), chunk):
        similar = F.normalize(queries[first : first + chunk].float() - mean, dim=-1) @ unit.T
        if excluded is not None:
            similar = similar.masked_fill(excluded[first : first + chunk], -torch.inf)
        best = similar.topk(k, dim=-1)
        weights.append(((best.values - 1) / TEMPERATURE).exp())
        rows.append(best.indices)
    return torch.cat(weights), torch.cat(rows)


def vote(weights: Tensor, classes: Tensor, num_classes: int) -> Tensor:
    """Return each class's share of the votes, (M, num_classes) float32; equal shares where nobody votes.

    Args:
        weights: (M, k) float32, at least 0.
        classes: (M, k) int64, the classes of the voters.
        num_classes: how many there are.
    """
    votes = weights.new_zeros(len(weights), num_classes).scatter_add_(1, classes, weights)
    total = votes.sum(1, keepdim=True)
    return torch.where(total > 0, votes / total.clamp_min(torch.finfo(votes.dtype).tiny), 1 / num_classes)
