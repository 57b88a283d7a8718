"""Segmentation: an encoder, a decoder, sliding windows, and label maps back in the source's own space."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any, Literal

import torch
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from torch import Tensor, nn

from agssd.evaluation.metrics import dice_per_class, mean_over_present, surface_dice_per_class
from agssd.evaluation.predictions import write_prediction
from agssd.models.backbone import Backbone
from agssd.tasks.decoders import LinearDecoder, UNETRDecoder
from agssd.tasks.finetuning import DownstreamTask
from agssd.types import Features, LabelledBatch, Triple


class SegmentationTask(DownstreamTask):
    """Fine-tunes or probes an encoder for segmentation.

    ``decoder: unetr`` is UNETR's decoder, with SwinUNETR's skips where the encoder is a pyramid; ``decoder: linear``
    one linear layer from a token to the classes of each voxel of its patch. ``freeze_encoder: true`` with ``linear`` is
    the linear probe; ``stem: false`` keeps UNETR's decoder from looking at the image itself, so that the result depends
    on the encoder.

    Training minimises Dice (without background) plus cross-entropy. Dice is taken over the crops that a device holds at
    once, because single crops often lack a class; so, unlike in pretraining, the loss changes a little with the cut of
    the batch. Validation and test segment whole volumes by sliding windows. ``val/dice`` is the mean over foreground
    classes of the mean over the cases in which the class occurs; ``test`` adds surface Dice and writes
    ``test_cases.csv``; ``predict`` writes ``predictions/<case>.nii.gz``, both under ``trainer.default_root_dir``.

    Args:
        num_classes: classes with background.
        crop_vox: window (D, H, W) in voxels, for training crops and for sliding windows; divisible by the patch.
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
        surface_tolerance_mm: tolerance of surface Dice.
        ignore_contract: accept data prepared differently from what the encoder was trained on.

    Raises:
        ValueError: for an encoder that is missing or does not fit, or an impossible setting.

    Source: UNETR (DiceCE, windows with overlap 0.5); the learning rates are ours.
    """

    def __init__(
        self,
        num_classes: int,
        crop_vox: Triple,
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
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}; background counts, so give at least 2")
        if not 0 <= sw_overlap < 1:
            raise ValueError(f"sw_overlap is {sw_overlap}; give a share from 0 to below 1")
        self.num_classes = num_classes
        self.crop_vox: Triple = (int(crop_vox[0]), int(crop_vox[1]), int(crop_vox[2]))
        self.backbone.token_grid((self.backbone.in_channels, *self.crop_vox))  # refuses a window that does not fit
        self.sw_overlap, self.sw_batch_size = sw_overlap, sw_batch_size
        self.surface_tolerance_mm = surface_tolerance_mm
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
        self.loss = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)
        self._rows: list[dict[str, Any]] = []

    def features(self, image: Tensor) -> Features:
        """Return the encoder's features, without gradient where it is frozen."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_encoder):
            features: Features = self.backbone(image)
        return features

    def forward(self, image: Tensor) -> Tensor:
        """Return class scores (B, num_classes, D, H, W) float32 of crops (B, C, D, H, W)."""
        scores: Tensor = self.decoder(image, self.features(image))
        return scores.float()

    def segment(self, image: Tensor) -> Tensor:
        """Return class probabilities (B, num_classes, D, H, W) of volumes of any size, by sliding windows.

        Volumes smaller than the window are padded with their lowest intensity, and the padding is cut off again.
        """
        scores = sliding_window_inference(
            image,
            self.crop_vox,
            self.sw_batch_size,
            self,
            overlap=self.sw_overlap,
            mode="gaussian",
            cval=float(image.min()),
        )
        assert isinstance(scores, Tensor)
        return scores.softmax(1)

    def training_step(self, batch: LabelledBatch, batch_idx: int) -> Tensor:
        """Return the Dice and cross-entropy loss of labelled crops, in float32."""
        scores = self(batch["image"])
        with torch.autocast(scores.device.type, enabled=False):
            loss: Tensor = self.loss(scores, batch["label"])
        self.log("train/loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def _evaluate(self, batch: LabelledBatch, surface: bool) -> None:
        prediction = self.segment(batch["image"]).argmax(1)
        label = batch["label"][:, 0]
        for index in range(len(prediction)):
            row: dict[str, Any] = {"case": int(batch["case"][index])}
            row["dice"] = dice_per_class(prediction[index], label[index], self.num_classes).tolist()
            if surface:
                spacing = batch["spacing_mm"][index].tolist()
                row["surface_dice"] = surface_dice_per_class(
                    prediction[index], label[index], self.num_classes, spacing, self.surface_tolerance_mm
                ).tolist()
            self._rows.append(row)

    def _summarise(self, stage: str) -> list[dict[str, Any]]:
        rows, self._rows = self.gather_rows(self._rows), []
        for metric in ("dice", "surface_dice"):
            if not rows or metric not in rows[0]:
                continue
            by_class = mean_over_present(torch.tensor([row[metric] for row in rows]), 0)
            for index, value in enumerate(by_class.tolist()):
                if not math.isnan(value):
                    self.log(f"{stage}/{metric}_class{index + 1}", value, rank_zero_only=True)
            mean = mean_over_present(by_class)
            self.log(f"{stage}/{metric}", mean, prog_bar=True, rank_zero_only=True)
        return rows

    def validation_step(self, batch: LabelledBatch, batch_idx: int) -> None:
        """Measure Dice on whole volumes."""
        self._evaluate(batch, surface=False)

    def on_validation_epoch_end(self) -> None:
        """Log ``val/dice`` and Dice per class."""
        self._summarise("val")

    def test_step(self, batch: LabelledBatch, batch_idx: int) -> None:
        """Measure Dice and surface Dice on whole volumes."""
        self._evaluate(batch, surface=True)

    def on_test_epoch_end(self) -> None:
        """Log the scores and write one row per case."""
        rows = self._summarise("test")
        if self.trainer.is_global_zero and rows:
            self._write_rows(rows, Path(self.trainer.default_root_dir) / "test_cases.csv")

    def _write_rows(self, rows: list[dict[str, Any]], path: Path) -> None:
        columns = [f"{metric}_class{c}" for metric in ("dice", "surface_dice") for c in range(1, self.num_classes)]
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.part")
        with partial.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["case", "subject", *columns])
            for row in sorted(rows, key=lambda row: row["case"]):
                info = self._case_info(row["case"])
                values = [*row["dice"], *row["surface_dice"]]
                cells = ["" if math.isnan(value) else f"{value:.6f}" for value in values]
                writer.writerow([getattr(info, "key", row["case"]), getattr(info, "subject", ""), *cells])
        partial.replace(path)

    def _case_info(self, case: int) -> Any:
        lookup = getattr(getattr(self.trainer, "datamodule", None), "case_info", None)
        return None if lookup is None else lookup(case)

    def predict_step(self, batch: LabelledBatch, batch_idx: int) -> list[str]:
        """Write each volume's label map on the grid of its source file and return the paths."""
        folder = Path(self.trainer.default_root_dir) / "predictions"
        paths = []
        for index, probabilities in enumerate(self.segment(batch["image"])):
            info = self._case_info(int(batch["case"][index]))
            if info is None:
                raise ValueError("predictions need a data module that knows the source's geometry (case_info)")
            paths.append(str(write_prediction(probabilities.float().cpu().numpy(), info, folder)))
        return paths
