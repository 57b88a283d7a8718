"""Segmentation and classification of frames: trained on parts of frames, measured on whole sequences; and probes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import nibabel as nib
import numpy as np
import pytest
import torch
from fans import fan, save_dicom

from agssd.data_modules.cache import VolumeCache
from agssd.data_modules.downstream import ClassificationDataModule, SegmentationDataModule
from agssd.data_modules.probe_set import ProbeSet
from agssd.evaluation.metrics import surface_dice_per_class
from agssd.evaluation.probe_features import encode
from agssd.models.vit import ViT
from agssd.tasks.classification import ClassificationTask
from agssd.tasks.segmentation import SegmentationTask
from agssd.tasks.unet import UNetTask

CROP = (64, 96)


def encoder() -> ViT:
    torch.manual_seed(0)
    return ViT(1, 16, depth=2, embed_dim=48, num_heads=3, spatial_dims=2)


def trainer(folder: Path, steps: int = 2) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        default_root_dir=folder, val_check_interval=steps, check_val_every_n_epoch=None, num_sanity_val_steps=0,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["unetr", "linear", "unet"])
def test_segmentation__learns_from_parts_of_frames_and_segments_sequences(
    kind: str, frames_cache: Path, tmp_path: Path
) -> None:
    data = SegmentationDataModule(str(frames_cache), global_batch_size=4, flip_axes=[1], num_workers=0)
    task: Any
    if kind == "unet":
        task = UNetTask(2, CROP, channels=(4, 8))
    else:
        task = SegmentationTask(2, CROP, encoder(), decoder=kind, feature_size=4, lr=1e-2, stem=False)
    run = trainer(tmp_path)
    run.fit(task, data)
    assert 0 <= float(run.callback_metrics["val/dice"]) <= 1
    (score,) = run.test(task, data, verbose=False)
    assert {"test/dice", "test/surface_dice"} <= score.keys()
    paths = [path for batch in run.predict(task, data) for path in batch]
    shapes = sorted(nib.load(path).shape for path in paths)
    assert shapes == [(320, 240, 1), (320, 240, 7)]  # columns, rows, frames, as in the files


def test_segment__of_a_sequence_is_that_of_each_frame() -> None:
    task = SegmentationTask(3, CROP, encoder(), decoder="linear").eval()
    sequence = torch.randn(1, 1, 3, 100, 120)
    with torch.no_grad():
        found = task.segment(sequence)
        for t in range(3):
            torch.testing.assert_close(found[:, :, t], task.segment(sequence[:, :, t]))


def test_write_prediction__resampled_frames_come_back_on_the_source(tmp_path: Path) -> None:

    from agssd.evaluation.predictions import to_source_grid
    from agssd.scans.preparing.frames import prepare_frames
    from agssd.scans.preparing.volumes import Recipe

    frames, inside = fan(2)
    case = prepare_frames([save_dicom(tmp_path / "a.dcm", frames, False, (0, 239, 0, 319))], None,
                          Recipe(spacing_mm=(0.6, 0.6, 0.6)))  # fmt: skip
    rows = np.linspace(0, 1, case.image.shape[2], endpoint=False) + 0.5 / case.image.shape[2]
    half = (rows < 0.5).astype(int)[None, :, None] * np.ones(case.foreground.shape, int)

    class Place:
        key, affine, source_affine, source_shape = "k", case.affine, case.source_affine, case.source_shape

    for corner in (0, 1):  # both grids span the picture
        h, w = case.image.shape[2:]
        cached = case.affine @ [0, corner * h - 0.5, corner * w - 0.5, 1]
        np.testing.assert_allclose(
            cached, case.source_affine @ [corner * 320 - 0.5, corner * 240 - 0.5, 0, 1], atol=0.05
        )
    back = to_source_grid(half, Place())
    assert back.shape == (320, 240, 2)
    assert (back[:, :119] == 1).all() and (back[:, 121:] == 0).all()


def test_classification__looks_at_windows_of_several_frames(frames_cache: Path, tmp_path: Path) -> None:
    data = ClassificationDataModule(str(frames_cache), global_batch_size=4, num_workers=0)
    task = ClassificationTask(2, CROP, encoder())
    run = trainer(tmp_path)
    run.fit(task, data)
    assert "val/balanced_accuracy" in run.callback_metrics
    sequence, foreground = torch.randn(1, 1, 40, 64, 96), torch.ones(1, 1, 40, 64, 96, dtype=torch.bool)
    windows = task.windows(sequence, foreground)
    assert windows.shape == (1, 16, 1, *CROP)
    assert torch.equal(windows[0, 0], sequence[0, :, 0]) and torch.equal(windows[0, -1], sequence[0, :, -1])


def test_probe__takes_frames_of_sequences_each_with_its_own_label(frames_cache: Path) -> None:
    data = ProbeSet(VolumeCache(frames_cache))
    volumes = list(data.volumes())
    assert len(volumes) == 4 * 7 + 4  # of 7 frames all are taken
    features = encode(encoder().eval(), volumes, (64, 64), 0.5)
    assert features[0].tokens.shape == (15 * 20, 48)
    for volume, found in zip(volumes, features, strict=True):
        assert volume.label is not None and found.labels is not None
        assert found.labels.shape == (300, 256) and int((found.labels == 1).sum()) == int((volume.label == 1).sum())


def test_surface_dice__of_frames_is_the_mean_over_those_that_hold_the_class() -> None:
    label = torch.zeros(3, 40, 40, dtype=torch.int64)
    label[:2, 10:30, 10:30] = 1
    shifted = label.roll(3, 2)
    shifted[0] = label[0]
    found = surface_dice_per_class(shifted, label, 2, (0.5, 0.5), 1.0)
    alone = [surface_dice_per_class(shifted[t], label[t], 2, (0.5, 0.5), 1.0) for t in range(3)]
    assert alone[0] == 1 and alone[1] < 1 and alone[2].isnan()
    torch.testing.assert_close(found, (alone[0] + alone[1]) / 2)
