"""The convolutional rival: MONAI's U-Net from scratch, trained and measured like every other segmentation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from monai.networks.nets.unet import UNet
from torch import Tensor

from agssd.tasks.finetuning import warmed_up
from agssd.tasks.voxelwise import VoxelTask
from agssd.types import Size


class UNetTask(VoxelTask):
    """Trains MONAI's residual U-Net from random weights, the baseline that a reviewer asks for.

    Loss, windows and scores are those of :class:`agssd.tasks.voxelwise.VoxelTask`.

    Args:
        num_classes: classes with background.
        crop_vox: window ([D,] H, W) in voxels; divisible by 2 to the number of levels less one.
        in_channels: image channels.
        channels: of each level, fine to coarse.
        num_res_units: of each level.
        lr: peak rate.
        weight_decay: of weights.
        warmup: share of the run with rising rate.
        sw_overlap: overlap of neighbouring windows, in [0, 1).
        sw_batch_size: windows per forward pass.
        surface_tolerance_mm: tolerance of surface Dice; in pixels for frames whose size in mm is not known.

    Raises:
        ValueError: for an impossible setting, or data of other channels.

    Source: Kerfoot et al. 2018 (residual units), as MONAI builds it; channels and rate are ours.
    """

    def __init__(
        self,
        num_classes: int,
        crop_vox: Size,
        in_channels: int = 1,
        channels: Sequence[int] = (16, 32, 64, 128, 256),
        num_res_units: int = 2,
        lr: float = 3e-3,
        weight_decay: float = 1e-2,
        warmup: float = 0.1,
        sw_overlap: float = 0.5,
        sw_batch_size: int = 4,
        surface_tolerance_mm: float = 1.0,
    ) -> None:
        """Build the network."""
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.set_up_voxels(num_classes, crop_vox, sw_overlap, sw_batch_size, surface_tolerance_mm)
        if len(channels) < 2 or min(channels) < 1:
            raise ValueError(f"channels is {list(channels)}; give at least two levels of at least one channel")
        coarsest = 2 ** (len(channels) - 1)
        if any(size % coarsest for size in self.crop_vox):
            raise ValueError(
                f"crop_vox is {self.crop_vox}, which {len(channels)} levels cannot halve; its sides must be multiples "
                f"of {coarsest}"
            )
        if lr <= 0 or weight_decay < 0 or not 0 <= warmup < 1:
            raise ValueError(
                f"lr={lr} must be positive, weight_decay={weight_decay} at least 0, warmup={warmup} in [0, 1)"
            )
        self.in_channels = in_channels
        self.lr, self.weight_decay, self.warmup = lr, weight_decay, warmup
        strides = [2] * (len(channels) - 1)
        self.network = UNet(
            len(self.crop_vox), in_channels, num_classes, channels, strides, num_res_units=num_res_units
        )

    def check_data(self, contract: dict[str, Any]) -> None:
        """Refuse data of other channels.

        Raises:
            ValueError: naming both.
        """
        if contract["channels"] != self.in_channels:
            raise ValueError(
                f"the cache has {contract['channels']} channel(s), --model.in_channels is {self.in_channels}"
            )

    def forward(self, image: Tensor) -> Tensor:
        """Return class scores (B, num_classes, [D,] H, W) float32 of crops (B, C, [D,] H, W)."""
        scores: Tensor = self.network(image)
        return scores.float()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW with warm-up and cosine; biases and norms do not decay."""
        groups = [
            {"params": [p for p in self.parameters() if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in self.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ]
        return warmed_up(torch.optim.AdamW(groups, lr=self.lr), self.trainer, self.warmup)
