"""KoLeo: spreads features by the distance to the nearest neighbour in the batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from agssd.distributed import gather_rows


def koleo(features: Tensor, eps: float = 1e-8, min_distance: float = 1e-4) -> Tensor:
    """Return ``-mean log(distance to the nearest neighbour)`` of L2-normalised features, gathered over ranks.

    Pairs closer than ``min_distance`` (duplicates, constant air) are left out; with fewer than two distinct rows the
    loss is 0 and keeps its graph. Accumulation changes the result: neighbours are sought in one micro-batch.

    Source: Sablayrolles et al., ICLR 2019; DINOv2 [R: DINOv2]. Gathering and the duplicate rule are ours
    (docs/method.md (b) 8).

    Args:
        features: (B, E), one global view per sample, before the head; cast to fp32 here.
        eps: added to distances.
        min_distance: smallest distance that counts.
    """
    with torch.autocast(features.device.type, enabled=False):
        rows = F.normalize(gather_rows(features.float()), dim=-1, eps=1e-6)
        if rows.shape[0] < 2:
            return rows.sum() * 0.0
        with torch.no_grad():
            similarity = rows @ rows.T
            similarity.fill_diagonal_(-1)
            nearest = similarity.argmax(1)
        distance = (rows - rows[nearest] + eps).norm(dim=-1)
        counts = distance.detach() > min_distance
        loss = -torch.where(counts, distance.clamp_min(min_distance).log(), torch.zeros_like(distance))
        # Every rank computes the loss of all rows; the gather's backward sums the ranks' equal gradients.
        mean: Tensor = loss.sum() / counts.sum().clamp_min(1)
        return mean
