"""A residual network with a feature pyramid as a backbone, for volumes and frames: MONAI's modules, our norms."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from monai.networks.blocks.feature_pyramid_network import FeaturePyramidNetwork
from monai.networks.nets.resnet import ResNet
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from agssd.models.backbone import Backbone, drop_probabilities
from agssd.types import Features, Size

Block = Literal["basic", "bottleneck"]
_EXPANSION = {"basic": 1, "bottleneck": 4}  # channels of a stage over those within its blocks
_STEM = 4  # voxels per cell and axis after the first convolution and the pooling
_POOLS = {2: F.avg_pool2d, 3: F.avg_pool3d}  # by axes of space


def replace_batch_norms(network: nn.Module, groups: int) -> None:
    """Put a group norm of ``groups`` groups in the place of every batch norm below ``network``."""
    for name, module in list(network.named_modules()):
        if isinstance(module, _BatchNorm):
            network.set_submodule(name, nn.GroupNorm(groups, module.num_features))


def run_block(block: nn.Module, x: Tensor, keep: Tensor | None) -> Tensor:
    """Return (B, E_i, [D_i,] H_i, W_i) after one residual block of MONAI, whose branch may be left out.

    Args:
        block: a ``ResNetBlock`` or ``ResNetBottleneck``.
        x: what goes in.
        keep: (B, 1, ..., 1) factor of the branch: 0 = the sample skips this block, else 1 / (1 - drop_prob).
    """
    part: Any = block  # MONAI declares the types of neither kind
    pairs = [(part.conv1, part.bn1), (part.conv2, part.bn2)]
    if hasattr(part, "conv3"):
        pairs.append((part.conv3, part.bn3))
    branch = x
    for number, (convolution, norm) in enumerate(pairs):
        branch = norm(convolution(branch if number == 0 else F.relu(branch)))
    shortcut = x if part.downsample is None else part.downsample(x)
    return F.relu(shortcut + (branch if keep is None else branch * keep))


class ResNetFPN(Backbone):
    """MONAI's ResNet with MONAI's feature pyramid on top.

    ``levels`` are the maps of the pyramid, of strides 4, 8, 16 and 32 with four stages (56, 28, 14 and 7 cells for a
    view of 224), all of ``pyramid_channels``; fewer stages leave the coarse ones out. Sizes are multiples of
    ``token_stride``; where they are none of a level's stride, its last cells reach beyond the image. ``tokens`` are the
    mean of all levels on the grid of ``token_stride``, finer ones averaged over its cells and coarser ones repeated,
    normed without gain; there is no [CLS], ``cls`` is the mean token. So whatever a loss reads, every part of the
    pyramid learns.

    Masks are on the grid of tokens. A convolution reads beyond its cell, so hidden voxels are 0 (the middle of the
    range of MRI and the low end of that of CT) before the first one, and a learned cell takes the place of all hidden
    cells behind the stem: nothing of the content gets through, and cost does not follow the visible share. Stochastic
    depth follows ``drop_noise``. As in every ResNet, strided convolutions sit at the first voxel of a cell, not in its
    middle.

    Source: He et al. 2016 (ResNet), Lin et al. 2017, arXiv 1612.03144 (FPN), as MONAI implements them; in ANAUS, where
    a ResNet-18 learns from regions at these four scales of 2D ultrasound, arXiv 2605.25402.
    Deviates: group norms in place of batch norms (ours), whose statistics would tie the samples of a batch together;
    published weights, which were learned with batch norms, are therefore not taken over. Tokens (ours).

    Args:
        in_channels: C.
        block: "basic" (ResNet-18 and -34) or "bottleneck" (ResNet-50 and deeper).
        layers: blocks of each stage; as many stages as numbers, 1 to 4. [2, 2, 2, 2] is ResNet-18.
        width: channels of the first stage's convolutions; doubled by each stage.
        pyramid_channels: channels of every level, and E.
        token_stride: voxels per token and axis: 4, 8, 16 or 32, a stride of a level.
        norm_groups: groups of the norms; divides ``width``.
        drop_path: drop probability of the last block; rises linearly from 0 at the first. Acts only on views whose
            ``drop_noise`` is given, in train and eval mode alike.
        spatial_dims: 3 for volumes, 2 for frames (B, C, H, W).
    """

    input_weight = "resnet.conv1.weight"

    def __init__(
        self,
        in_channels: int = 1,
        block: Block = "basic",
        layers: tuple[int, ...] = (2, 2, 2, 2),
        width: int = 64,
        pyramid_channels: int = 256,
        token_stride: int = 16,
        norm_groups: int = 8,
        drop_path: float = 0.0,
        spatial_dims: int = 3,
    ) -> None:
        """Build the encoder; see the class for the arguments.

        Raises:
            ValueError: if sizes do not fit each other.
        """
        super().__init__()
        stages = len(layers)
        strides = [_STEM * 2**stage for stage in range(stages)]
        if not 1 <= stages <= 4 or min(layers, default=0) < 1:
            raise ValueError(f"layers is {list(layers)}; give the blocks of 1 to 4 stages, at least 1 each")
        if block not in _EXPANSION:
            raise ValueError(f"block {block!r} is unknown; use one of {', '.join(_EXPANSION)}")
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims is {spatial_dims}; use 3 for volumes or 2 for frames")
        if min(in_channels, width, pyramid_channels, norm_groups) < 1:
            raise ValueError("in_channels, width, pyramid_channels and norm_groups must be at least 1")
        if width % norm_groups:
            raise ValueError(f"norm_groups is {norm_groups}, which does not divide the width {width}")
        if token_stride not in strides:
            raise ValueError(f"token_stride is {token_stride}; the levels of {stages} stages have {strides}, use one")
        self.in_channels = in_channels
        self.embed_dim = pyramid_channels
        self.layers = tuple(layers)
        self.depth = sum(layers)
        self.patch_size = (token_stride,) * spatial_dims
        self.level_channels = (pyramid_channels,) * stages
        self.level_strides = tuple((stride,) * spatial_dims for stride in strides)
        self.drop_probs = drop_probabilities(drop_path, self.depth)
        self.drop_prob_row: Tensor
        self.register_buffer("drop_prob_row", torch.tensor(self.drop_probs), persistent=False)
        self.config = {
            "class_path": "agssd.models.resnet_fpn.ResNetFPN",
            "init_args": {
                "in_channels": in_channels,
                "block": block,
                "layers": list(layers),
                "width": width,
                "pyramid_channels": pyramid_channels,
                "token_stride": token_stride,
                "norm_groups": norm_groups,
                "drop_path": drop_path,
                "spatial_dims": spatial_dims,
            },
        }
        widths = [width * 2**stage for stage in range(4)]
        self.resnet = ResNet(
            block,
            [*layers, *[1] * (4 - stages)],
            widths,
            spatial_dims,
            in_channels,
            conv1_t_stride=2,
            feed_forward=False,
            bias_downsample=False,
        )
        for stage in range(stages, 4):
            delattr(self.resnet, f"layer{stage + 1}")
        replace_batch_norms(self.resnet, norm_groups)
        channels = [_EXPANSION[block] * width for width in widths[:stages]]
        self.pyramid = FeaturePyramidNetwork(spatial_dims, channels, pyramid_channels)
        self.mask_token = nn.Parameter(torch.empty(width))
        nn.init.normal_(self.mask_token, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """Return the name of the mask token."""
        return {"mask_token"}

    def layer_index(self, name: str) -> int:
        """Return 0 for stem and mask token, 1 .. depth for blocks, depth + 1 for the pyramid."""
        part = name.removeprefix("resnet.layer")
        if part == name:
            return self.depth + 1 if name.startswith("pyramid.") else 0
        stage, block = part.split(".")[:2]
        return sum(self.layers[: int(stage) - 1]) + int(block) + 1

    def freeze_mask_token(self) -> None:
        """Stop training the cell that replaces hidden ones."""
        self.mask_token.requires_grad_(False)

    def _embed(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return cells (B, width, [D_0,] H_0, W_0) behind the stem, hidden ones replaced."""
        grid = self.check_input(x)
        cell = self.mask_token.view(-1, *[1] * self.spatial_dims)
        hidden = None
        if mask is not None:
            self.check_mask(mask, len(x), grid)
            hidden = mask[:, None]
            x = x.masked_fill(_grown(hidden, self.patch_size[0]), 0)
        part: Any = self.resnet
        cells = part.maxpool(F.relu(part.bn1(part.conv1(x))))
        if hidden is None:
            return torch.add(cells, cell, alpha=0)  # keeps every parameter in the graph, as DDP needs
        return torch.where(_grown(hidden, self.patch_size[0] // _STEM), cell.to(cells.dtype), cells)

    def _maps(self, x: Tensor, mask: Tensor | None, noise: Tensor | None) -> list[Tensor]:
        """Return the maps of the pyramid (B, E, [D_i,] H_i, W_i), fine to coarse."""
        keep = self.keep_factors(noise, len(x))
        x, done = self._embed(x, mask), 0
        maps: dict[str, Tensor] = {}
        for stage in range(len(self.layers)):
            for block in self.resnet.get_submodule(f"layer{stage + 1}").children():
                x = run_block(block, x, None if keep is None else keep[done])
                done += 1
            maps[str(stage)] = x
        return [level.to(self.mask_token.dtype) for level in self.pyramid(maps).values()]

    def _features(self, maps: list[Tensor], grid: Size, levels: list[Tensor]) -> Features:
        stride, whole = self.patch_size[0], (slice(None), slice(None), *(slice(n) for n in grid))
        brought = []
        for level, (own, *_) in zip(maps, self.level_strides, strict=True):
            fine = level.float() if own >= stride else _POOLS[self.spatial_dims](level.float(), stride // own)
            brought.append(_grown(fine, max(1, own // stride))[whole])
        mean = torch.stack(brought).mean(0)
        tokens = F.layer_norm(mean.flatten(2).mT, mean.shape[1:2]).to(self.mask_token.dtype)
        return Features(tokens.mean(1), tokens, grid, levels)

    def forward(self, x: Tensor, drop_noise: Tensor | None = None) -> Features:
        """Return features of unmasked volumes or frames; ``levels`` are the maps of the pyramid.

        Args:
            x: (B, C, [D,] H, W) in the model's intensity range; sizes divisible by ``token_stride``.
            drop_noise: (B, depth) uniforms in [0, 1), or None, as for :meth:`forward_views`.

        Raises:
            ValueError: if channels or shape do not fit.
        """
        maps = self._maps(x, None, drop_noise)
        return self._features(maps, self.token_grid(tuple(x.shape)), maps)

    def forward_views(
        self,
        views: list[Tensor],
        masks: list[Tensor | None] | None = None,
        drop_noise: list[Tensor | None] | None = None,
    ) -> list[Features]:
        """Return features of groups of views, one pass per group; ``levels`` stay empty.

        Sample b skips block l iff ``drop_noise[i][b, l] < drop_probs[l]``; kept samples are scaled by
        ``1 / (1 - drop_probs[l])``. Nothing is drawn here, so results do not depend on how a batch is cut.

        Args:
            views: groups (B_i, C, [D_i,] H_i, W_i).
            masks: per group (B_i, *grid) bool, True = hidden from the encoder; or None.
            drop_noise: per group (B_i, depth) uniforms in [0, 1), or None.

        Raises:
            ValueError: if a shape does not fit.
        """
        self.check_groups(views, masks=masks, drop_noise=drop_noise)
        empty: list[Tensor | None] = [None] * len(views)
        groups = zip(views, masks or empty, drop_noise or empty, strict=True)
        return [self._features(self._maps(*group), self.token_grid(tuple(group[0].shape)), []) for group in groups]


def _grown(x: Tensor, factor: int) -> Tensor:
    """Return (B, C, ...) with every cell repeated ``factor`` times along each axis of space."""
    if factor == 1:
        return x
    for axis in range(2, x.ndim):
        x = x.repeat_interleave(factor, axis)
    return x
