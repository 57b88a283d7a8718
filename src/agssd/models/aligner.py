"""CVAA: attention that aligns two views, taught by where their tokens truly lie."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agssd.models.fuser import POSITION_PITCHES


class Aligner(nn.Module):
    """For tokens of view A, where in view B each of them lies, as attention over B's tokens.

    Both views are of one volume, so what tells volumes, scanners and contrasts apart finds no place; what tells one
    place of the body from the next does. Source: that attention aligns the views is AG-SSD's [paper]; that its weights
    are taught by the geometry of the crops is ours; the nearest published form is the contrast of voxels by their place
    of SAM, Yan et al., IEEE TMI 2022, arXiv 2012.02383, which takes other places as negatives too.

    Args:
        dim: E.
        width: channels of queries and keys.
        temperature: of the cosine similarity of the two.
    """

    def __init__(self, dim: int, width: int = 128, temperature: float = 0.1) -> None:
        super().__init__()
        self.temperature = temperature
        self.query = nn.Sequential(nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, width))
        self.key = nn.Sequential(nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, width))

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        """Return the logarithm (B, Q, N) float32 of the attention of each query over the tokens of the other view.

        Args:
            query: (B, Q, E), tokens of A.
            memory: (B, N, E), tokens of B without [CLS].
        """
        q, k = self.query(query).float(), self.key(memory).float()
        with torch.autocast(q.device.type, enabled=False):
            return (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT / self.temperature).log_softmax(-1)


def place_targets(bias: Tensor, pitches: float) -> Tensor:
    """Return the attention (B, V, N) that points at the true place: a Gaussian around it, over the tokens of B.

    Args:
        bias: (B, V, N), rows of :func:`agssd.models.fuser.position_bias`; where it is 0, outside the overlap, targets
            are uniform.
        pitches: standard deviation in token pitches of B; above 0.
    """
    return (bias * (POSITION_PITCHES / pitches) ** 2).softmax(-1)
