"""CVAA: attention that aligns two views, taught by where their tokens truly lie."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agssd.geometry import constant, correspondence, token_centres
from agssd.types import Size


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


def lies_in_other(own: Tensor, other: Tensor, grid: Size) -> tuple[Tensor, Tensor]:
    """Return where tokens of views lie in others, (B, N, d), and which of them lie in those by their centres, (B, N).

    A token beyond the outermost centres of the other view has a nearest one all the same.

    Args:
        own: (B, 4, 4) affines of views, (B, 3, 3) of frames, from each view's [-1, 1] to parent voxels.
        other: those of the other views, alike.
        grid: token grid of both.
    """
    return correspondence(own, other, grid, margin=0.0)


def place_targets(u: Tensor, grid: Size, pitches: float) -> Tensor:
    """Return the attention (B, V, N) that points at true places: a Gaussian around each, over the tokens of B.

    Args:
        u: (B, V, d) float32, coordinates in B, each axis of which spans [-1, 1].
        grid: token grid of B.
        pitches: standard deviation in token pitches of B; above 0.
    """
    offset = (u[:, :, None] - token_centres(grid, u.device)) * (constant(grid, u.device) / 2)  # (B, V, N, d)
    return (-offset.square().sum(-1) / (2 * pitches**2)).softmax(-1)
