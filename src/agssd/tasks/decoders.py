"""Decoders from the features of a backbone to class scores per voxel.

Source: UNETR and SwinUNETR (Hatamizadeh et al. 2022) built from MONAI's blocks; the linear decoder is ours (SimMIM's
reconstruction head with classes in place of intensities).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from monai.networks.blocks.dynunet_block import UnetOutBlock
from monai.networks.blocks.unetr_block import UnetrBasicBlock, UnetrPrUpBlock, UnetrUpBlock
from torch import Tensor, nn

from agssd.transforms.edges import unpatch
from agssd.types import Features, Size


def place_patches(values: Tensor, grid: Size, patch_size: Size) -> Tensor:
    """Return the volume whose patches are given token by token.

    Args:
        values: (B, N, P * K) with P voxels of a patch, tokens in raster order of ``grid``; within a token the voxels of
            its patch in raster order, the K scores of a voxel last.
        grid: ([D',] H', W'), N tokens.
        patch_size: voxels of a patch per axis.

    Returns:
        (B, K, [D,] H, W).
    """
    return unpatch(values, grid, patch_size)


def _is_power_of_two(value: int) -> bool:
    return value >= 1 and value & (value - 1) == 0


def up_strides(patch_size: Size) -> list[Size]:
    """Return the strides by which the decoder grows from tokens to voxels, coarse to fine.

    Each is 2 or 1 per axis and their product is ``patch_size``. An axis with a smaller patch (thick slices) keeps its
    resolution in the finest steps, as anisotropic U-Nets do.

    Raises:
        ValueError: if a side of the patch is no power of two, or none exceeds 1.
    """
    if not all(_is_power_of_two(p) for p in patch_size) or max(patch_size) == 1:
        raise ValueError(
            f"the UNETR decoder doubles its resolution step by step and needs a patch size of powers of two, not "
            f"{tuple(patch_size)}; use decoder: linear, or an encoder with patch 4, 8 or 16"
        )
    halvings = [p.bit_length() - 1 for p in patch_size]
    steps: list[Size] = []
    for done in range(max(halvings)):
        stride = [2 if done < count else 1 for count in halvings]
        steps.append(tuple(stride))
    return steps


class UNETRDecoder(nn.Module):
    """UNETR's decoder for any encoder whose strides are powers of two, with or without the full-resolution stem.

    The map of the last level grows by transposed convolutions of stride 2. At each resolution between tokens and voxels
    an earlier level joins as a skip: where the encoder is a pyramid the one of that resolution, behind a residual block
    (SwinUNETR); else one of coarser cells, grown to that resolution. Levels on one grid, as a ViT's, are spread evenly,
    shallow ones to the fine resolutions (UNETR).

    Args:
        in_channels: image channels.
        level_channels: channels of each level that the backbone returns, shallow to deep; at least one.
        level_strides: voxels per cell and axis of each level; the last is that of the tokens.
        num_classes: classes with background.
        feature_size: channels at full resolution; doubled at each coarser one.
        stem: join a convolution of the input image itself at full resolution, as UNETR does. Without it every voxel's
            score comes from the encoder alone, so that the result measures the encoder (with it a frozen random ViT
            comes within a point of Dice of full training).
        norm_name: MONAI's name of the normalisation.

    Raises:
        ValueError: if the tokens' stride has a side that is no power of two, or a level lies on no resolution that the
            decoder passes.

    Source: UNETR, SwinUNETR. Deviates: number of steps, strides and skips follow the encoder (UNETR: 16 only;
    SwinUNETR: 32 only); the stem can be left out; widths are UNETR's for both, and the deepest map of a pyramid grows
    at once, without SwinUNETR's residual block of 16 times its feature size.
    """

    def __init__(
        self,
        in_channels: int,
        level_channels: Sequence[int],
        level_strides: Sequence[Size],
        num_classes: int,
        feature_size: int = 16,
        stem: bool = True,
        norm_name: str = "instance",
    ) -> None:
        """Build stem, skips and upward steps for the strides."""
        super().__init__()
        self.level_strides = tuple(level_strides)
        dims = len(level_strides[-1])
        strides = up_strides(level_strides[-1])
        steps = len(strides)
        widths = [feature_size * 2**scale for scale in range(steps)]  # fine to coarse
        scales = [_scale_of(stride, strides) for stride in level_strides]
        self.skip_levels = _skip_levels(scales)
        self.skips = nn.ModuleList()
        for scale, level in enumerate(self.skip_levels, 1):
            # a skip at scale s has 2^s-fold coarser voxels than the image: from scale t it needs steps t to s
            layers: list[nn.Module] = []
            first = level_channels[level]
            for done, stride in enumerate(strides[steps - scales[level] : steps - scale]):
                channels = widths[scale] if done else first
                layers.append(UnetrPrUpBlock(dims, channels, widths[scale], 0, 3, 1, stride, norm_name))
                if done > 0:
                    layers.append(UnetrBasicBlock(dims, widths[scale], widths[scale], 3, 1, norm_name, res_block=True))
            if not layers:
                layers.append(UnetrBasicBlock(dims, first, widths[scale], 3, 1, norm_name, res_block=True))
            self.skips.append(nn.Sequential(*layers))
        self.ups = nn.ModuleList()  # coarse to fine, down to scale 1
        channels = level_channels[-1]
        for done, stride in enumerate(strides[:-1]):
            width = widths[steps - 1 - done]
            self.ups.append(UnetrUpBlock(dims, channels, width, 3, stride, norm_name, res_block=True))
            channels = width
        self.stem: nn.Module | None = None
        self.last: nn.Module
        if stem:
            self.stem = UnetrBasicBlock(dims, in_channels, feature_size, 3, 1, norm_name, res_block=True)
            self.last = UnetrUpBlock(dims, channels, feature_size, 3, strides[-1], norm_name, res_block=True)
        else:
            self.last = nn.Sequential(
                UnetrPrUpBlock(dims, channels, feature_size, 0, 3, 1, strides[-1], norm_name),
                UnetrBasicBlock(dims, feature_size, feature_size, 3, 1, norm_name, res_block=True),
            )
        self.out = UnetOutBlock(dims, feature_size, num_classes)

    def forward(self, image: Tensor, features: Features) -> Tensor:
        """Return scores (B, num_classes, [D,] H, W) for an image (B, C, [D,] H, W) and its features.

        Raises:
            ValueError: if the levels are not those of the encoder that the decoder was built for.
        """
        levels, shape = features.levels, image.shape[2:]
        expected = [tuple(n // s for n, s in zip(shape, stride, strict=True)) for stride in self.level_strides]
        if [tuple(level.shape[2:]) for level in levels] != expected:
            raise ValueError(
                f"the UNETR decoder was built for levels of strides {list(self.level_strides)}, for an image of "
                f"{tuple(shape)} {expected}, got {[tuple(level.shape[2:]) for level in levels]}"
            )
        skips = [block(levels[index]) for block, index in zip(self.skips, self.skip_levels, strict=True)]
        x = levels[-1]
        for up, skip in zip(self.ups, reversed(skips), strict=True):
            x = up(x, skip)
        x = self.last(x) if self.stem is None else self.last(x, self.stem(image))
        scores: Tensor = self.out(x)
        return scores


class LinearDecoder(nn.Module):
    """One linear layer from a token to the classes of each voxel of its patch.

    No interpolation and no neighbour takes part, so the result shows what single tokens know, at full resolution. The
    layer has as many outputs as a patch has voxels, times K: with large patches and many classes it grows big (patch
    16 and 100 classes in 3D: 410,000 outputs).

    Args:
        embed_dim: size of a token.
        patch_size: voxels of a patch per axis; any size.
        num_classes: classes with background, K.
    """

    def __init__(self, embed_dim: int, patch_size: Size, num_classes: int) -> None:
        """Build the layer with small weights, so that scores start near equal."""
        super().__init__()
        self.patch_size = patch_size
        voxels = math.prod(patch_size)
        self.norm = nn.LayerNorm(embed_dim)
        self.proj = nn.Linear(embed_dim, voxels * num_classes)
        nn.init.trunc_normal_(self.proj.weight, std=0.01)
        nn.init.zeros_(self.proj.bias)

    def forward(self, image: Tensor, features: Features) -> Tensor:
        """Return scores (B, num_classes, [D,] H, W); the image is not looked at."""
        return place_patches(self.proj(self.norm(features.tokens)), features.grid, self.patch_size)


def _scale_of(stride: Size, up: list[Size]) -> int:
    """Return how many of the last steps of ``up`` lead from a level of ``stride`` to the voxels.

    Raises:
        ValueError: if none does.
    """
    grown = start = (1,) * len(stride)
    for scale, step in enumerate([start, *reversed(up)]):
        grown = tuple(now * factor for now, factor in zip(grown, step, strict=True))
        if grown == tuple(stride):
            return scale
    raise ValueError(
        f"the encoder has a level of stride {tuple(stride)}, which the UNETR decoder does not pass on its way from "
        f"tokens to voxels by {up}; use decoder: linear"
    )


def _skip_levels(scales: list[int]) -> list[int]:
    """Return the level that joins at each scale between voxels and tokens, fine to coarse.

    It is the earlier level whose cells are nearest in size and not smaller; of several, as of a ViT, each has its turn.

    Args:
        scales: of each level, shallow to deep; see :func:`_scale_of`.
    """
    steps, chosen = scales[-1], []
    for scale in range(1, steps):
        nearest = min((own for own in scales[:-1] if own >= scale), default=None)
        levels = [level for level, own in enumerate(scales[:-1]) if own == nearest] or [len(scales) - 1]
        chosen.append(levels[_spread(len(levels), steps - 1)[scale - 1]])
    return chosen


def _spread(available: int, wanted: int) -> list[int]:
    """Return ``wanted`` indices of ``available`` levels, evenly spread and ascending."""
    if wanted == 1:
        return [(available - 1) // 2]
    return [int(step * (available - 1) / (wanted - 1) + 0.5) for step in range(wanted)]
