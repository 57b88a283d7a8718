"""InfoNCE: each query finds its own key among the keys of all samples of all ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from agssd.distributed import gather_rows, rank


def info_nce(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """Return the cross-entropy of each query's own key among the keys of the micro-batch of all ranks.

    Scaled by ``2 * temperature``, so that the size of the gradient does not hang on the temperature. Accumulation
    changes the result: negatives come from one micro-batch. A batch of one sample has none, and the loss is 0.

    Source: van den Oord et al., arXiv 1807.03748; MoCo v3, algorithm 1 [R: MoCo v3].

    Args:
        queries: (B, E), row i belongs to row i of ``keys``.
        keys: (B, E) of the teacher; no gradient flows to them.
        temperature: of the softmax.
    """
    with torch.autocast(queries.device.type, enabled=False):
        found = F.normalize(queries.float(), dim=-1, eps=1e-6)
        offered = F.normalize(gather_rows(keys.detach().float()), dim=-1, eps=1e-6)
        own = torch.arange(len(found), device=found.device) + rank() * len(found)
        return 2 * temperature * F.cross_entropy(found @ offered.T / temperature, own)
