"""Segmentation: an encoder, a decoder, sliding windows, and label maps back in the source's own space."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from agssd.models.backbone import Backbone
from agssd.tasks.decoders import LinearDecoder, UNETRDecoder
from agssd.tasks.finetuning import DownstreamTask
from agssd.tasks.voxelwise import VoxelTask
from agssd.types import Features, Size


class SegmentationTask(VoxelTask, DownstreamTask):
    """Fine-tunes or probes an encoder for segmentation.

    ``decoder: unetr`` is UNETR's decoder, with SwinUNETR's skips where the encoder is a pyramid; ``decoder: linear``
    one linear layer from a token to the classes of each voxel of its patch. ``freeze_encoder: true`` with ``linear`` is
    the linear probe; ``stem: false`` keeps UNETR's decoder from looking at the image itself, so that the result depends
    on the encoder.

    Loss, windows and scores are those of :class:`agssd.tasks.voxelwise.VoxelTask`.

    Args:
        num_classes: classes with background.
        crop_vox: window ([D,] H, W) in voxels, for training crops and for sliding windows; divisible by the patch.
        backbone: an encoder with fresh weights (from scratch), or None.
        encoder: an export, a checkpoint or a run to take weights from, or None.
        decoder: "unetr" or "linear".
        stem: UNETR's convolution of the image at full resolution.
        feature_size: channels of the UNETR decoder at full resolution.
        freeze_encoder: learn the decoder alone.
        lr: peak rate of the decoder. The default is meant for short runs (hundreds to thousands of steps): a decoder
            that is not trained out makes pretraining look useless. Measured on hippocampus after 200 steps, UNETR
            without stem from scratch: Dice 0.754 at 1e-3, 0.790 at 3e-3, 0.796 at 1e-2; the linear decoder on a frozen
            random encoder wants more: 0.335 at 1e-2, 0.494 at 1e-1.
        encoder_lr: peak rate of the encoder's last layer.
        layer_decay: factor on the rate per layer downwards.
        weight_decay: of weights.
        warmup: share of the run with rising rate.
        sw_overlap: overlap of neighbouring windows, in [0, 1).
        sw_batch_size: windows per forward pass.
        surface_tolerance_mm: tolerance of surface Dice; in pixels for frames whose size in mm is not known.
        ignore_contract: accept data prepared differently from what the encoder was trained on.

    Raises:
        ValueError: for an encoder that is missing or does not fit, or an impossible setting.

    Source: UNETR (DiceCE, windows with overlap 0.5); the learning rates are ours.
    """

    def __init__(
        self,
        num_classes: int,
        crop_vox: Size,
        backbone: Backbone | None = None,
        encoder: str | None = None,
        decoder: Literal["unetr", "linear"] = "unetr",
        stem: bool = True,
        feature_size: int = 16,
        freeze_encoder: bool = False,
        lr: float = 1e-2,
        encoder_lr: float = 5e-4,
        layer_decay: float = 1.0,
        weight_decay: float = 1e-2,
        warmup: float = 0.1,
        sw_overlap: float = 0.5,
        sw_batch_size: int = 4,
        surface_tolerance_mm: float = 1.0,
        ignore_contract: bool = False,
    ) -> None:
        """Take the encoder and build the decoder."""
        super().__init__(
            backbone, encoder, freeze_encoder, lr, encoder_lr, layer_decay, weight_decay, warmup, ignore_contract
        )
        self.save_hyperparameters(ignore=["backbone"], logger=False)
        self.set_up_voxels(num_classes, crop_vox, sw_overlap, sw_batch_size, surface_tolerance_mm)
        self.backbone.token_grid(self.crop_vox)  # refuses a window that does not fit
        self.decoder: nn.Module
        if decoder == "linear":
            self.decoder = LinearDecoder(self.backbone.embed_dim, self.backbone.patch_size, num_classes)
        else:
            self.decoder = UNETRDecoder(
                self.backbone.in_channels,
                self.backbone.level_channels,
                self.backbone.level_strides,
                num_classes,
                feature_size,
                stem,
            )

    def features(self, image: Tensor) -> Features:
        """Return the encoder's features, without gradient where it is frozen."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_encoder):
            features: Features = self.backbone(image)
        return features

    def forward(self, image: Tensor) -> Tensor:
        """Return class scores (B, num_classes, [D,] H, W) float32 of crops (B, C, [D,] H, W)."""
        scores: Tensor = self.decoder(image, self.features(image))
        return scores.float()
