"""A light transformer that works out the hidden tokens of a view from those that an encoder saw."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from agssd.models.backbone import Backbone
from agssd.models.position import sincos_position
from agssd.models.vit import Block, Group
from agssd.transforms.masking import gather_tokens, masked_indices
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
        out_dim: width of what is returned, after a norm and a linear layer; None returns the blocks' own, not normed.

    Raises:
        ValueError: if ``num_heads`` does not divide ``dim``.
    """

    position: Tensor

    def __init__(
        self, encoder_dim: int, grid: Size, dim: int, depth: int, num_heads: int, out_dim: int | None = None
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"decoder_dim {dim} is not divisible by decoder_heads {num_heads}")
        self.embed = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.randn(dim) * 0.02)
        self.blocks = nn.ModuleList(Block(dim, num_heads, 4.0, None) for _ in range(depth))
        self.out = (
            nn.Identity() if out_dim is None else nn.Sequential(nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, out_dim))
        )
        self.register_buffer("position", sincos_position(grid, dim), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, features: Features, visible: Tensor) -> Tensor:
        """Return the tokens (B, N, ``out_dim`` or ``dim``) of all patches of a view.

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
        return cast(Tensor, self.out(flat.unflatten(0, (batch, -1))[:, 1:]))


def work_out_hidden(
    network: nn.ModuleDict, views: Tensor, mask: Tensor, index: Tensor, drop_noise: Tensor | None = None
) -> tuple[Tensor, Features, Tensor]:
    """Return what a decoder makes of hidden patches whose voxels never enter the encoder.

    Args:
        network: student or teacher, with ``"backbone"`` and a :class:`TokenDecoder` as ``"decoder"``.
        views: (B, C, [D,] H, W).
        mask: (B, N) bool, True = hidden, as many in each view as ``index`` has.
        index: (B, M) int64, positions of the hidden patches.
        drop_noise: (B, depth) uniforms in [0, 1) for stochastic depth, or None for no drop.

    Returns:
        The decoder's tokens (B, M, E) at ``index``, the encoder's features of the visible patches (B, N - M, E), and
        their positions (B, N - M) int64.
    """
    visible, _ = masked_indices(~mask, mask.shape[1] - index.shape[1])
    features = cast(Backbone, network["backbone"]).forward_visible(views, visible, drop_noise)
    return gather_tokens(network["decoder"](features, visible), index), features, visible
