"""Maps of an encoder at several scales, for losses that look at more than its last tokens."""

from __future__ import annotations

from typing import Any, cast

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from agssd.geometry import axis_names, sizes_of
from agssd.models.backbone import Backbone
from agssd.types import Features, Size

_AVERAGE = {2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}  # by axes of space


class FeaturePyramid(nn.Module):
    """Maps at several scales, fine to coarse, with channels last.

    An encoder whose levels differ in stride gives its deepest levels as they are. One whose levels all have the stride
    of its tokens, a ViT, gives maps that are made from its last tokens: finer ones by linear layers that split each
    cell into 2 x 2 [x 2] of half the channels, and one coarser by averaging cells.

    Source: the simple feature pyramid of ViTDet, Li et al., ECCV 2022, arXiv 2203.16527 [R: ViTDet] for a ViT.

    Args:
        backbone: the encoder; it is not kept here.
        num_scales: maps to give, 1 or more. A ViT's are its tokens, one of twice their stride, then finer ones; an
            encoder with fewer levels gives all it has.

    Attributes:
        channels: of each map.
        tokens_at: which map has the grid of the encoder's tokens.

    Raises:
        ValueError: if ``num_scales`` is below 1.
    """

    def __init__(self, backbone: Backbone, num_scales: int = 4) -> None:
        super().__init__()
        if num_scales < 1:
            raise ValueError(f"num_scales is {num_scales}; give at least 1, 4 say")
        self.from_levels = len(set(backbone.level_strides)) > 1
        self.steps = nn.ModuleList()
        if self.from_levels:
            self.channels = backbone.level_channels[-num_scales:]
            self.tokens_at, self.has_coarser = len(self.channels) - 1, False
            return
        dims, width = backbone.spatial_dims, backbone.embed_dim
        self.has_coarser = num_scales > 1
        self.tokens_at = max(num_scales - 2, 0)
        for _ in range(self.tokens_at):
            self.steps.append(Doubling(dims, width, max(width // 2, 8)))
            width = max(width // 2, 8)
        finer = [step.norm.normalized_shape[0] for step in self.steps if isinstance(step, Doubling)]
        self.channels = (*reversed(finer), *[backbone.embed_dim] * (1 + self.has_coarser))

    def grids(self, backbone: Backbone, size: Size) -> list[Size]:
        """Return the cells of each map, fine to coarse, for images of ``size`` voxels."""
        if self.from_levels:
            strides = backbone.level_strides[-len(self.channels) :]
            return [tuple(-(-n // s) for n, s in zip(size, stride, strict=True)) for stride in strides]
        tokens = backbone.token_grid(size)
        found = [tuple(n * 2**finer for n in tokens) for finer in range(self.tokens_at, -1, -1)]
        return found + [_halved(tokens)] * self.has_coarser

    def reads(self, features: Features) -> tuple[Tensor, ...]:
        """Return the encoder's outputs that the maps are made from."""
        return tuple(features.levels[-len(self.channels) :]) if self.from_levels else (features.tokens,)

    def forward(self, *read: Tensor, grid: Size) -> list[Tensor]:
        """Return maps (B, *cells, channels).

        Args:
            read: what :meth:`reads` returned.
            grid: of the encoder's tokens.
        """
        if self.from_levels:
            return [level.movedim(1, -1) for level in read]
        maps = [read[0].unflatten(1, grid)]
        for step in self.steps:
            maps.insert(0, step(maps[0]))
        if self.has_coarser:
            maps.append(average_cells(maps[-1], _halved(grid)))
        return maps


def _halved(grid: Size) -> Size:
    return tuple(-(-n // 2) for n in grid)


class Doubling(nn.Module):
    """Twice the cells per axis: one linear layer, then layer norm and GELU.

    Args:
        dims: axes of space.
        width: channels in.
        out_width: channels out.
    """

    def __init__(self, dims: int, width: int, out_width: int) -> None:
        super().__init__()
        self.dims = dims
        self.linear = nn.Linear(width, 2**dims * out_width)
        self.norm = nn.LayerNorm(out_width, eps=1e-6)
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, [2 D',] 2 H', 2 W', out_width) from (B, *cells, width)."""
        cells, within, image = axis_names(self.dims)
        split = rearrange(
            self.linear(x), f"b {cells} ({within} c) -> b {image} c", **sizes_of(within, (2,) * self.dims)
        )
        return F.gelu(self.norm(split))


def average_cells(x: Tensor, cells: Size) -> Tensor:
    """Return (B, *cells, C) float32: means of maps (B, *grid, C) over cells of nearly equal size."""
    pooled: Tensor = cast(Any, _AVERAGE[len(cells)])(x.float().movedim(-1, 1), cells)  # torch: two numbers or three
    return pooled.movedim(1, -1)
