"""A light transformer that works out the hidden tokens of a view from those that an encoder saw."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from agssd.models.position import sincos_position
from agssd.models.vit import Block, Group
from agssd.types import Features, Size


class TokenDecoder(nn.Module):
    """Transformer blocks over all tokens of a view: encoded where visible, a learned token elsewhere.

    Source: the decoder of MAE, He et al., CVPR 2022, arXiv 2111.06377 [paper]; fixed positions over the extent of the
    view as in our encoder.

    Args:
        encoder_dim: E of the encoder.
        grid: token grid of a view.
        dim: width of the decoder.
        depth: number of blocks.
        num_heads: attention heads; divides ``dim``.

    Raises:
        ValueError: if ``num_heads`` does not divide ``dim``.
    """

    position: Tensor

    def __init__(self, encoder_dim: int, grid: Size, dim: int, depth: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"decoder_dim {dim} is not divisible by decoder_heads {num_heads}")
        self.embed = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.randn(dim) * 0.02)
        self.blocks = nn.ModuleList(Block(dim, num_heads, 4.0, None) for _ in range(depth))
        self.register_buffer("position", sincos_position(grid, dim), persistent=False)
        for module in (self.embed, *self.blocks.modules()):
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, features: Features, visible: Tensor) -> Tensor:
        """Return the tokens (B, N, dim) of all patches of a view, not normed.

        Args:
            features: of the visible patches, tokens (B, V, E), and [CLS], which the blocks attend to as well.
            visible: (B, V) int64, their positions.
        """
        seen = self.embed(torch.cat([features.cls[:, None], features.tokens], 1)).float()
        batch, dim = seen.shape[0], seen.shape[2]
        tokens = self.mask_token.expand(batch, len(self.position), dim)
        tokens = tokens.scatter(1, visible[..., None].expand(-1, -1, dim), seen[:, 1:]) + self.position
        x = torch.cat([seen[:, :1], tokens], 1)
        group = Group(batch, x.shape[1])
        flat = x.flatten(0, 1)
        for block in self.blocks:
            flat = block(flat, (group,))
        return flat.unflatten(0, (batch, -1))[:, 1:]
