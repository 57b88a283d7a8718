"""A light decoder from the tokens of a view to all its voxels."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agssd.geometry import INTERPOLATION
from agssd.types import Size

CONVOLUTIONS: dict[int, type[nn.Conv2d] | type[nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}  # by axes of space


class DenseDecoder(nn.Module):
    """Convolutions that double the resolution of a token map until it is that of the image.

    Each step is a convolution of edge 3 at the lower resolution, GELU and linear upsampling; channels halve from step
    to step. It reads the last tokens alone, so that what is restored must be in them, and serves every encoder and
    patch size.

    Source: ours; the role is that of the decoder of Models Genesis' U-Net, without its skips.

    Args:
        embed_dim: E.
        patch_size: voxels of a token.
        out_channels: C.
        dim: channels of the first step.
    """

    def __init__(self, embed_dim: int, patch_size: Size, out_channels: int, dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        convolution = CONVOLUTIONS[len(patch_size)]
        convolutions = []
        width = embed_dim
        for step in range((max(patch_size) - 1).bit_length()):
            following = max(dim // 2**step, 8)
            convolutions.append(convolution(width, following, 3, padding=1))
            width = following
        self.last = convolution(width, out_channels, 3, padding=1)
        for conv in convolutions:
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(cast(Tensor, conv.bias))
        self.steps = nn.ModuleList(convolutions)

    def forward(self, tokens: Tensor, grid: Size) -> Tensor:
        """Return (B, C, [D,] H, W) float32 from tokens (B, N, E) in raster order of ``grid``."""
        x = self.norm(tokens).mT.reshape(tokens.shape[0], -1, *grid)
        full = [cells * voxels for cells, voxels in zip(grid, self.patch_size, strict=True)]
        for step in self.steps:
            size = [min(2 * now, end) for now, end in zip(x.shape[2:], full, strict=True)]
            x = F.interpolate(F.gelu(step(x)), size=size, mode=INTERPOLATION[len(grid)], align_corners=False)
        with torch.autocast(x.device.type, enabled=False):  # intensities, whose rounding would be loss
            restored: Tensor = self.last(x.float())
        return restored
