"""Heads of the pretraining losses; they run in fp32 whatever the precision of the encoder."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agssd.types import Triple


class PrototypeHead(nn.Module):
    """Project features to cosine similarities with K prototypes: MLP, L2 norm, normalised linear.

    The prototypes are normalised, so logits lie in [-1, 1] (the weight-norm gain is frozen at 1).

    Source: DINO and iBOT head [R: iBOT].

    Args:
        embed_dim: E.
        num_prototypes: K.
        hidden_dim: width of the two hidden layers.
        bottleneck_dim: width before the prototypes.
    """

    def __init__(
        self, embed_dim: int, num_prototypes: int = 8192, hidden_dim: int = 2048, bottleneck_dim: int = 256
    ) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(embed_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        self.prototypes = nn.Parameter(torch.randn(num_prototypes, bottleneck_dim) / math.sqrt(bottleneck_dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., K) float32 cosines from features (..., E)."""
        with torch.autocast(x.device.type, enabled=False):
            z = F.normalize(self.mlp(x.float()), dim=-1, eps=1e-6)
            return F.linear(z, F.normalize(self.prototypes.float(), dim=-1, eps=1e-6))


class ReconstructionHead(nn.Module):
    """Predict the voxels of a patch from its token: LayerNorm and one linear layer (SimMIM) [R: SimMIM].

    Args:
        embed_dim: E.
        patch_size: p.
        channels: C.
    """

    def __init__(self, embed_dim: int, patch_size: Triple, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.linear = nn.Linear(embed_dim, patch_size[0] * patch_size[1] * patch_size[2] * channels)
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return (..., p³ C) float32 from tokens (..., E)."""
        with torch.autocast(tokens.device.type, enabled=False):
            predicted: Tensor = self.linear(self.norm(tokens.float()))
        return predicted
