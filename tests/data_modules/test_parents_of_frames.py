"""Frames from files to batches: `agssd prepare --modality us`, its cache, and parent crops of single frames."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from fans import save_folder

from agssd.data_modules.build import chunk_fractions
from agssd.data_modules.cache import VolumeCache
from agssd.data_modules.pretrain import PretrainDataModule
from agssd.scans.preparing.perceptual import single_hashes
from agssd.scans.sources.plan import plan_sources

PARENT = (96, 128)


def test_prepare__each_file_is_a_case_of_frames(frames_cache: Path) -> None:
    found = VolumeCache(frames_cache)
    assert len(found) == 11 and {info.modality for info in found.cases} == {"us"}
    assert sorted(info.shape[0] for info in found.cases) == [1] * 5 + [4] + [7] * 5
    assert all(info.spatial_dims == 2 for info in found.cases)
    assert [info.in_mm for info in found.cases if info.shape[0] == 4] == [True]
    assert sum(info.label_values == (0, 1) for info in found.cases) == 10
    with h5py.File(frames_cache, "r", locking=False) as file:
        chunks = {file["cases"][info.key]["image"].chunks for info in found.cases}
    assert chunks == {(1, 1, 128, 128)}  # a frame is read without its neighbours
    for row, info in enumerate(found.cases):
        foreground = found.read_whole(row, "foreground")
        assert 0.3 < foreground.mean() < 0.7
        np.testing.assert_allclose(found.foreground_chunks(row), chunk_fractions(foreground))
        whole = found.read_whole(row)
        assert np.array_equal(found.read(row, (0, 30, 200), (1, 50, 90)), whole[:, :1, 30:80, 200:290])
        assert 1 <= len(single_hashes(info.perceptual_hash)) <= info.shape[0]


def test_plan__subject_of_a_cine_is_its_patient_and_masks_belong_to_their_pictures(tmp_path: Path) -> None:
    plan = plan_sources([save_folder(tmp_path)], ["*_mask.*"], modality="us")
    found = {job.paths[0].name: job for job in plan.jobs}
    assert len(found) == 12 and not plan.refused and {job.modality for job in plan.jobs} == {"us"}
    assert found["cine.dcm"].subject == "PATIENT-7" and found["s3.mha"].subject == "s3"
    labels = {name: job.label.name for name, job in found.items() if job.label}
    assert labels == {
        f"{kind}{k}.{end}": f"{kind}{k}_mask.{end}" for k in range(5) for kind, end in (("s", "mha"), ("p", "png"))
    }
    assert not plan_sources([tmp_path / "p1.png"], modality="us").refused


def test_prepare__no_name_is_in_the_cache(frames_cache: Path) -> None:
    data = frames_cache.read_bytes()
    assert not any(name in data for name in (b"PATIENT", b"Doe", b"DOE", b"cine"))


def test_train_dataloader__samples_are_parts_of_one_frame(frames_cache: Path) -> None:
    data = PretrainDataModule(str(frames_cache), PARENT, 4, num_workers=0)
    data.setup("fit")
    assert data.train_crops is not None
    spacings = set()
    for batch in islice(iter(data.train_dataloader()), 5):
        assert batch["image"].shape == (4, 1, *PARENT) and batch["foreground"].shape == (4, 1, *PARENT)
        assert batch["spacing_mm"].shape == batch["centre_mm"].shape == (4, 2)
        spacings |= {tuple(round(mm, 3) for mm in row) for row in batch["spacing_mm"].tolist()}
        for image, row in zip(batch["image"], batch["case"].tolist(), strict=True):
            whole = torch.from_numpy(data.caches[0].read_whole(data.train_crops.rows[row][1]))[0]
            windows = whole.unfold(1, PARENT[0], 1).unfold(2, PARENT[1], 1)
            corner = windows[..., 0, 0] == image[0, 0, 0]  # few places are compared whole
            assert any(torch.equal(windows[tuple(place)], image[0]) for place in corner.nonzero().tolist())
    assert spacings == {(1.0, 1.0), (0.3, 0.2)}


def test_setup__refuses_a_crop_of_other_axes(frames_cache: Path, tiny_cache: Path) -> None:
    with pytest.raises(ValueError, match=r"the cases of .* are frames; give two \(H, W\)"):
        PretrainDataModule(str(frames_cache), (32, 32, 32), 4).setup("predict")
    with pytest.raises(ValueError, match=r"the cases of .* are volumes; give three numbers"):
        PretrainDataModule(str(tiny_cache), (32, 32), 4).setup("predict")
    with pytest.raises(ValueError, match="is a volume, .* is a sequence of frames|a sequence of frames, .* a volume"):
        PretrainDataModule([str(frames_cache), str(tiny_cache)], (32, 32), 4).setup("predict")


def test_contract__says_pixels_where_no_file_knows_millimetres(frames_cache: Path) -> None:
    data = PretrainDataModule(str(frames_cache), PARENT, 4)
    data.setup("predict")
    assert data.contract["spacing_mm"] is None and data.contract["modality"] == "us"
    assert data.contract["intensity"]["us"]["range"] == [-1.0, 1.0]
