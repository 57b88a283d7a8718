"""Agreement of predictions with a teacher's features, up to their length."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cosine_distance(prediction: Tensor, target: Tensor) -> Tensor:
    """Return (...,) float32: ``2 - 2 cos``, the squared distance of the normalised vectors, in [0, 4].

    Source: Grill et al., NeurIPS 2020, arXiv 2006.07733, eq. 2 [R: BYOL].

    Args:
        prediction: (..., E).
        target: (..., E); no gradient flows to it.
    """
    with torch.autocast(prediction.device.type, enabled=False):
        predicted = F.normalize(prediction.float(), dim=-1, eps=1e-6)
        wanted = F.normalize(target.detach().float(), dim=-1, eps=1e-6)
        return 2 - 2 * (predicted * wanted).sum(-1)
