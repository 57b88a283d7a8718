"""The two trainings of LP-SAM on labelled frames: adapters of SAM's image encoder, then latent prompts.

Source: ANAUS (arXiv 2605.25402, supplement): loss (1 - a) BCE + a Dice with a = 0.15 in both stages, SAM frozen in the
second. Ours: rates, schedule, and one mask per class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from agssd.models.lp_sam import LPSAM, LPSAMSettings, load_lp_sam
from agssd.models.sam import load_sam
from agssd.tasks.finetuning import warmed_up
from agssd.tasks.voxelwise import VoxelTask
from agssd.types import LabelledBatch, Size


def mask_loss(logits: Tensor, target: Tensor, dice_share: float) -> Tensor:
    """Return (1 - a) BCE + a (1 - Dice), () float32.

    Args:
        logits: (B, M, H, W).
        target: (B, M, H, W), 0 or 1.
        dice_share: a. Dice is taken per mask over the whole batch, because single frames often lack a class; its
            smoothing of one pixel makes an empty mask found empty right.
    """
    logits, target = logits.float(), target.float()
    bce = F.binary_cross_entropy_with_logits(logits, target)
    found = logits.sigmoid()
    shared = (found * target).sum((0, 2, 3))
    dice = (2 * shared + 1) / (found.sum((0, 2, 3)) + target.sum((0, 2, 3)) + 1)
    return (1 - dice_share) * bce + dice_share * (1 - dice.mean())


class _LPSAMTask(VoxelTask):
    """What both stages share: loss, whole frames instead of windows, AdamW on what learns, what is saved."""

    model: LPSAM

    def _take(
        self, model: LPSAM, crop_vox: Size, dice_share: float, lr: float, weight_decay: float, warmup: float
    ) -> None:
        if not 0 <= dice_share <= 1 or lr <= 0 or weight_decay < 0 or not 0 <= warmup < 1:
            raise ValueError(
                f"dice_share={dice_share} must be in [0, 1], lr={lr} positive, weight_decay={weight_decay} at least "
                f"0, warmup={warmup} in [0, 1)"
            )
        if len(crop_vox) != 2:
            raise ValueError(f"crop_vox is {list(crop_vox)}; LP-SAM learns from frames: give two numbers (H, W)")
        self.model = model.train()
        self.dice_share, self.lr, self.weight_decay, self.warmup = dice_share, lr, weight_decay, warmup
        self.is_ct = False
        self.set_up_voxels(model.settings.num_masks + 1, crop_vox, 0.0, 1, 1.0)

    def _learns(self, parameters: Sequence[nn.Parameter]) -> None:
        """Freeze everything else."""
        self.model.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)

    def check_data(self, contract: dict[str, Any]) -> None:
        """Take the range of intensities from the cache; the data module calls this.

        Raises:
            ValueError: modalities are mixed.
        """
        if contract["modality"] == "mixed":
            raise ValueError("LP-SAM learns from one modality at a time; choose it with data.modality")
        self.is_ct = contract["modality"] == "ct"

    def _logits(self, image: Tensor) -> Tensor:
        logits: Tensor = self.model(image if self.is_ct else (image + 1) / 2)
        return logits

    def forward(self, image: Tensor) -> Tensor:
        """Return scores (B, 1 + num_masks, H, W) float32 of frames (B, C, H, W) in the model's range, background 0."""
        return F.pad(self._logits(image), (0, 0, 0, 0, 1, 0))

    def segment(self, image: Tensor) -> Tensor:
        """Return class probabilities (B, 1 + num_masks, [T,] H, W) of whole frames, also (B, C, T, H, W)."""
        if image.ndim == 5:
            return torch.stack([self.segment(frame) for frame in image.unbind(2)], 2)
        scores: Tensor = self(image)
        return scores.softmax(1)

    def training_step(self, batch: LabelledBatch, batch_idx: int) -> Tensor:
        """Return the loss of labelled crops, in float32."""
        logits = self._logits(batch["image"])
        target = F.one_hot(batch["label"][:, 0], self.num_classes).movedim(-1, 1)[:, 1:]
        with torch.autocast(logits.device.type, enabled=False):
            loss = mask_loss(logits, target, self.dice_share)
        self.log("train/loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW on what learns, and a schedule over all optimiser steps of the run."""
        learning = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in learning if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in learning if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return warmed_up(torch.optim.AdamW(groups, lr=self.lr), self.trainer, self.warmup)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave what rebuilds LP-SAM, in plain types."""
        checkpoint["lp_sam"] = self.model.plain()


class SAMAdapterTask(_LPSAMTask):
    """Stage 1: adapters of SAM's image encoder learn from frames and their masks.

    Args:
        sam: folder of a ``SamModel`` (config.json, model.safetensors).
        num_classes: classes with background.
        crop_vox: training crop (H, W) in pixels; about as large as the frames, which are looked at whole later.
        adapter_dim: bottleneck of the adapters (ours).
        train_decoder: also tune the mask decoder (ours: of SAM ViT-B it and adapters of 256 are 13.0 M parameters that
            learn, as many as are published).
        dice_share: a in (1 - a) BCE + a Dice.
        lr: peak rate (ours).
        weight_decay: of weights (ours).
        warmup: share of the run with rising rate; then half a cosine to 0 (ours).

    Raises:
        ValueError: for a folder without a SamModel, or an impossible setting.

    Source: paper, see the module.
    """

    def __init__(
        self,
        sam: str,
        num_classes: int,
        crop_vox: Size,
        adapter_dim: int = 256,
        train_decoder: bool = True,
        dice_share: float = 0.15,
        lr: float = 1e-4,
        weight_decay: float = 1e-2,
        warmup: float = 0.05,
    ) -> None:
        """Load SAM and put adapters in."""
        super().__init__()
        self.save_hyperparameters(logger=False)
        model = LPSAM(load_sam(sam), LPSAMSettings(num_masks=num_classes - 1, adapter_dim=adapter_dim))
        self._take(model, crop_vox, dice_share, lr, weight_decay, warmup)
        decoder = list(model.sam.mask_decoder.parameters()) if train_decoder else []
        # the decoder's other outputs, of several masks and their quality, take no part
        idle = {*map(id, model.sam.mask_decoder.iou_prediction_head.parameters())}
        for head in model.sam.mask_decoder.output_hypernetworks_mlps[1:]:
            idle |= {*map(id, head.parameters())}
        self._learns([model.tokens, *model.adapters, *(p for p in decoder if id(p) not in idle)])


class LatentPromptTask(_LPSAMTask):
    """Stage 2: the latent prompt engine learns, SAM and its adapters stay as stage 1 left them.

    Args:
        adapted: checkpoint of stage 1.
        crop_vox: training crop (H, W) in pixels.
        num_blocks: two-way blocks, N.
        num_heads: of their attention.
        dice_share: a in (1 - a) BCE + a Dice.
        lr: peak rate (ours).
        weight_decay: of weights (ours).
        warmup: share of the run with rising rate; then half a cosine to 0 (ours).

    Raises:
        ValueError: for another checkpoint, or an impossible setting.

    Source: paper, see the module.
    """

    def __init__(
        self,
        adapted: str,
        crop_vox: Size,
        num_blocks: int = 4,
        num_heads: int = 8,
        dice_share: float = 0.15,
        lr: float = 1e-4,
        weight_decay: float = 1e-2,
        warmup: float = 0.05,
    ) -> None:
        """Take SAM as stage 1 left it and add the engine."""
        super().__init__()
        self.save_hyperparameters(logger=False)
        if num_blocks < 1:
            raise ValueError(f"num_blocks is {num_blocks}; the engine has at least 1")
        model = _with_engine(load_lp_sam(adapted), num_blocks, num_heads)
        self._take(model, crop_vox, dice_share, lr, weight_decay, warmup)
        assert model.engine is not None
        self._learns([model.tokens, *model.engine.parameters()])


def _with_engine(adapted: LPSAM, num_blocks: int, num_heads: int) -> LPSAM:
    """Return a model with an engine, everything else as in ``adapted``."""
    from agssd.models.sam import build_sam

    if adapted.settings.num_blocks:
        raise ValueError("model.adapted is a checkpoint of stage 2; give that of stage 1 (SAMAdapterTask)")
    settings = replace(adapted.settings, num_blocks=num_blocks, num_heads=num_heads)
    model = LPSAM(build_sam(adapted.config), settings)
    model.load_state_dict({**model.state_dict(), **adapted.state_dict()})
    return model
