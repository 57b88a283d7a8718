"""Segmentation whatever the network: its loss, windows over whole volumes, scores, and what is written."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from torch import Tensor

from agssd.evaluation.metrics import dice_per_class, mean_over_present, surface_dice_per_class
from agssd.evaluation.predictions import write_prediction
from agssd.tasks.finetuning import gather_rows
from agssd.types import LabelledBatch, Size


class VoxelTask(L.LightningModule):
    """A network that gives every voxel of a crop its class scores, trained and measured.

    Training minimises Dice (without background) plus cross-entropy. Dice is taken over the crops that a device holds at
    once, because single crops often lack a class; so, unlike in pretraining, the loss changes a little with the cut of
    the batch. Validation and test segment whole volumes by sliding windows. ``val/dice`` is the mean over foreground
    classes of the mean over cases; a class absent from a case is left out there where it is not predicted, and counts 0
    where it is. Under ``trainer.default_root_dir`` ``agssd validate`` writes ``val_cases.csv``, ``test`` writes
    ``test_cases.csv`` with surface Dice besides, and ``predict`` ``predictions/<case>.nii.gz``.
    """

    def set_up_voxels(
        self, num_classes: int, crop_vox: Size, sw_overlap: float, sw_batch_size: int, surface_tolerance_mm: float
    ) -> None:
        """Take the settings that do not concern the network; called once by the constructor.

        Raises:
            ValueError: for an impossible one.
        """
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}; background counts, so give at least 2")
        if not 0 <= sw_overlap < 1:
            raise ValueError(f"sw_overlap is {sw_overlap}; give a share from 0 to below 1")
        self.num_classes = num_classes
        self.crop_vox: Size = tuple(int(n) for n in crop_vox)
        self.sw_overlap, self.sw_batch_size = sw_overlap, sw_batch_size
        self.surface_tolerance_mm = surface_tolerance_mm
        self.loss = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)
        self._rows: list[dict[str, Any]] = []

    def segment(self, image: Tensor) -> Tensor:
        """Return class probabilities (B, num_classes, [D,] H, W) of volumes of any size, by sliding windows.

        Frames of sequences (B, C, T, H, W) are segmented one by one. Volumes smaller than the window are padded with
        their lowest intensity, and the padding is cut off again.
        """
        if image.ndim == len(self.crop_vox) + 3:
            return torch.stack([self.segment(frame) for frame in image.unbind(2)], 2)
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
        label = batch["label"][:, 0]  # of frames (B, T, H, W)
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
        rows, self._rows = gather_rows(self._rows), []
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
        """Log ``val/dice`` and Dice per class; ``agssd validate`` also writes one row per case."""
        rows = self._summarise("val")
        if self.trainer.state.fn == "validate":
            self._write_rows(rows, "val_cases.csv")

    def test_step(self, batch: LabelledBatch, batch_idx: int) -> None:
        """Measure Dice and surface Dice on whole volumes."""
        self._evaluate(batch, surface=True)

    def on_test_epoch_end(self) -> None:
        """Log the scores and write one row per case."""
        self._write_rows(self._summarise("test"), "test_cases.csv")

    def _write_rows(self, rows: list[dict[str, Any]], name: str) -> None:
        if not self.trainer.is_global_zero or not rows:
            return
        path = Path(self.trainer.default_root_dir) / name
        metrics = [metric for metric in ("dice", "surface_dice") if metric in rows[0]]
        columns = [f"{metric}_class{c}" for metric in metrics for c in range(1, self.num_classes)]
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.part")
        with partial.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["case", "subject", *columns])
            for row in sorted(rows, key=lambda row: row["case"]):
                info = self._case_info(row["case"])
                values = [value for metric in metrics for value in row[metric]]
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
