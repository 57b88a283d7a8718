"""Folds of a labelled cache: by subject, inside train or train against val, never test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from agssd.data_modules.cache import VolumeCache
from agssd.data_modules.pretrain import PretrainDataModule
from agssd.data_modules.probe_set import ProbeSet


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, make_cache: Callable[..., Path]) -> VolumeCache:
    """Return 12 volumes of 6 subjects: 3 train, 2 val, 1 test."""
    path = tmp_path_factory.mktemp("probe") / "c.h5"
    splits = ["train"] * 3 + ["val"] * 2 + ["test"]
    return VolumeCache(make_cache(path, 12, (20, 24, 16), splits=splits, cases_per_subject=2))


def of_split(cache: VolumeCache, split: str) -> set[str]:
    return {cache.cases[row].subject for row in cache.select(split=split)}


def test_probe_set__train_against_val(cache: VolumeCache) -> None:
    data = ProbeSet(cache)
    (fold,) = data.folds
    assert set(fold.learned) == of_split(cache, "train") and set(fold.held_out) == of_split(cache, "val")
    assert len(data.rows) == 10 and data.num_subjects == 2
    assert (data.num_label_classes, data.num_targets) == (3, 2)


def test_probe_set__folds_of_train(cache: VolumeCache) -> None:
    data = ProbeSet(cache, 3, num_subjects=1)
    assert {subject for fold in data.folds for subject in fold.held_out} == of_split(cache, "train")
    for fold in data.folds:
        assert len(fold.learned) == 1 and not set(fold.learned) & set(fold.held_out)
    assert {cache.cases[row].split for row in data.rows} == {"train"}


def test_probe_set__volumes__model_range_and_labels_of_the_same_voxels(cache: VolumeCache) -> None:
    whole, middle = ProbeSet(cache), ProbeSet(cache, max_vox=18)
    for row, volume, part in zip(whole.rows, whole.volumes(), middle.volumes(), strict=True):
        info = cache.cases[row]
        assert volume.subject == info.subject and volume.target == info.class_index
        stored = torch.from_numpy(cache.read_whole(row)).float() * info.scale[0] + info.offset[0]
        unit = ((stored - info.low[0]) / (info.high[0] - info.low[0])).clamp(0, 1)
        assert torch.allclose(volume.image, 2 * unit - 1, atol=1e-5)
        assert torch.equal(volume.label, torch.from_numpy(cache.read_whole(row, "label")))
        assert part.image.shape == (1, 18, 18, 16)
        assert torch.equal(part.image, volume.image[:, 1:19, 3:21])
        assert torch.equal(part.label, volume.label[1:19, 3:21])


def test_probe_set__too_many_subjects__refused_or_as_many_as_there_are(cache: VolumeCache) -> None:
    with pytest.raises(ValueError, match="num_subjects is 9"):
        ProbeSet(cache, num_subjects=9)
    assert len(ProbeSet(cache, num_subjects=9, num_held_out=9, at_most=True).folds[0].learned) == 3


def test_probe_set__held_out_seen__counts_subjects_of_the_record(cache: VolumeCache) -> None:
    data = PretrainDataModule(str(cache.path), (16, 16, 16), 4, num_workers=0)
    data.setup("fit")
    assert ProbeSet(cache).held_out_seen(data.seen) == 0
    assert ProbeSet(cache, 3).held_out_seen(data.seen) == 3
    assert ProbeSet(cache).held_out_seen(None) is None


def test_probe_set__kinds__only_what_is_asked_for(tmp_path: Path, make_cache: Callable[..., Path]) -> None:
    path = make_cache(tmp_path / "c.h5", 4, (16, 16, 16), labelled=False, splits=["train"] * 3 + ["val"])
    assert ProbeSet(VolumeCache(path)).num_label_classes == 0
    with pytest.raises(ValueError, match="no labelled case in its split 'train'"):
        ProbeSet(VolumeCache(path), kinds=("label",))
    plain = make_cache(tmp_path / "d.h5", 4, (16, 16, 16), num_classes=0, splits=["train"] * 4)
    with pytest.raises(ValueError, match="in its split 'val'"):
        ProbeSet(VolumeCache(plain))
    assert ProbeSet(VolumeCache(plain), 2).num_targets == 0


def test_pretrain_probe_set__own_cache_or_another(tmp_path: Path, make_cache: Callable[..., Path]) -> None:
    bare = str(make_cache(tmp_path / "bare.h5", 4, (16, 16, 16), labelled=False, num_classes=0, splits=["train"] * 4))
    labelled = str(make_cache(tmp_path / "l.h5", 4, (16, 16, 16), splits=["train"] * 3 + ["val"]))
    other = str(make_cache(tmp_path / "o.h5", 4, (16, 16, 16), spacing_mm=(2.0, 2.0, 2.0)))
    data = PretrainDataModule(bare, (16, 16, 16), 4, num_workers=0)
    data.setup("fit")
    assert data.probe_set(None) is None
    found = data.probe_set(labelled, num_subjects=10)
    assert found is not None and len(found.folds[0].learned) == 3
    with pytest.raises(ValueError, match="spacing 2x2x2 mm instead of 1x1x1 mm"):
        data.probe_set(other)
