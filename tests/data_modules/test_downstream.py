"""Downstream data: subsets nest, folds are disjoint by subject, crops hold labels, wrong labels are refused."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin  # noqa: F401  (registers the filters)
import numpy as np
import pytest
import torch

from agssd.data_modules.downstream import ClassificationDataModule, SegmentationDataModule
from agssd.data_modules.labelled import label_crop_start, label_voxels
from agssd.data_modules.subsets import fold_subjects, nested_subset

SUBJECTS = [f"subject{n}" for n in range(37)]


def module(cache: Path | list[str], **arguments: Any) -> SegmentationDataModule:
    settings = {"num_workers": 0, "crop_vox": (16, 16, 16), "num_classes": 3, "global_batch_size": 2, **arguments}
    return SegmentationDataModule(cache if isinstance(cache, list) else str(cache), **settings)


def ready(*args: Any, **arguments: Any) -> SegmentationDataModule:
    made = module(*args, **arguments)
    made.setup("fit")
    return made


def subjects(made: SegmentationDataModule, part: str) -> set[str]:
    return {made.case_info(row).subject for row in made.members[part]}


@pytest.fixture(scope="module")
def family_cache(tmp_path_factory: pytest.TempPathFactory, make_cache: Callable[..., Path]) -> Path:
    """Return a cache of 12 subjects with two volumes each, 8 train."""
    splits = ["train"] * 8 + ["val"] * 2 + ["test"] * 2
    folder = tmp_path_factory.mktemp("family")
    return make_cache(folder / "family.h5", num_cases=24, shape=(20, 24, 20), cases_per_subject=2, splits=splits)


def test_nested_subset__growing_budget__smaller_inside_larger() -> None:
    for seed in range(5):
        chosen = [set(nested_subset(SUBJECTS, n, seed=seed)) for n in (1, 2, 5, 20, 37)]
        assert all(small < large for small, large in zip(chosen, chosen[1:], strict=False))
        assert [len(names) for names in chosen] == [1, 2, 5, 20, 37]
    assert nested_subset(SUBJECTS, 5, seed=0) != nested_subset(SUBJECTS, 5, seed=1)
    assert nested_subset(SUBJECTS[::-1] * 2, 5) == nested_subset(SUBJECTS, 5)  # order and repetition do not count
    assert len(nested_subset(SUBJECTS, label_fraction=0.1)) == 4
    assert len(nested_subset(SUBJECTS, label_fraction=0.001)) == 1


def test_nested_subset__every_subject_is_drawn_equally_often() -> None:
    counts = Counter(name for seed in range(2000) for name in nested_subset(SUBJECTS, 5, seed=seed))
    expected = 2000 * 5 / 37
    assert max(abs(counts[name] - expected) for name in SUBJECTS) < 5 * expected**0.5


@pytest.mark.parametrize("wrong", [{"num_subjects": 38}, {"num_subjects": 0}, {"label_fraction": 1.5}])
def test_nested_subset__impossible_budget__refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        nested_subset(SUBJECTS, **wrong)


def test_fold_subjects__folds__disjoint_whole_and_balanced() -> None:
    folds = fold_subjects(SUBJECTS, 5)
    assert sorted(name for fold in folds for name in fold) == sorted(SUBJECTS)
    assert {len(fold) for fold in folds} == {7, 8}


def test_setup__folds__validation_is_a_fold_of_train_by_subject(family_cache: Path) -> None:
    held_out = []
    whole = ready(family_cache)
    for fold in range(4):
        made = ready(family_cache, num_folds=4, fold=fold)
        assert not subjects(made, "train") & subjects(made, "val")
        assert subjects(made, "train") | subjects(made, "val") == subjects(whole, "train")
        assert made.members["test"] == whole.members["test"]
        assert len(made.members["val"]) == 4  # both volumes of 2 subjects
        held_out += sorted(subjects(made, "val"))
    assert sorted(held_out) == sorted(subjects(whole, "train"))
    few = [subjects(ready(family_cache, num_folds=4, fold=1, num_subjects=n), "train") for n in (1, 3, 6)]
    assert few[0] < few[1] < few[2]


def test_setup__two_caches__both_are_used(family_cache: Path, tmp_path: Path, make_cache: Callable[..., Path]) -> None:
    other = make_cache(tmp_path / "other.h5", num_cases=3, shape=(20, 20, 20), splits=["train", "val", "test"])
    made = ready([str(family_cache), str(other)])
    assert {made.rows[row][0] for row in made.members["train"]} == {0, 1}


def test_setup__two_modalities__the_chosen_one_is_what_must_agree(
    tmp_path: Path, make_cache: Callable[..., Path]
) -> None:
    path = make_cache(tmp_path / "both.h5", num_cases=6, shape=(20, 20, 20), splits=["train"] * 4 + ["val", "test"])
    with h5py.File(path, "r+") as file:
        index = json.loads(file["index"][()].tobytes())
        for case in index["cases"][::2]:
            case |= {"modality": "ct", "spacing_mm": [1.5] * 3}
        del file["index"]
        file["index"] = np.frombuffer(json.dumps(index).encode(), dtype=np.uint8)
    with pytest.raises(ValueError, match=r"disagree in spacing.*data\.modality"):
        ready(path)
    for modality, spacing in (("mri", [1.0] * 3), ("ct", [1.5] * 3)):
        made = ready(path, modality=modality, predict_split="all")
        assert {made.case_info(row).modality for row in made.members["train"]} == {modality}
        assert len(made.members["predict"]) == 3
        assert made.contract["spacing_mm"] == spacing and made.contract["modality"] == modality
    only = make_cache(tmp_path / "mri.h5", num_cases=3, shape=(16, 16, 16))
    with pytest.raises(ValueError, match=r"no cases of data\.modality ct"):
        ready(only, modality="ct")


def test_setup__two_caches_of_unknown_salt__warned_of(
    family_cache: Path, tmp_path: Path, make_cache: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    other = make_cache(tmp_path / "other.h5", num_cases=3, shape=(20, 20, 20), splits=["train", "val", "test"])
    with caplog.at_level(logging.WARNING):
        ready(family_cache)
        assert "cannot be matched" not in caplog.text
        ready([str(family_cache), str(other)])
    assert caplog.text.count("cannot be matched") == 1


def test_train_stream__batches__function_of_seed_and_sample_only(family_cache: Path) -> None:
    one, two = ready(family_cache, global_batch_size=4), ready(family_cache, global_batch_size=2)
    first = next(iter(one.train_dataloader()))
    stream = iter(two.train_dataloader())
    parts = [next(stream), next(stream)]
    for name in first:
        assert torch.equal(first[name], torch.cat([part[name] for part in parts])), name
    other = next(iter(ready(family_cache, global_batch_size=4, seed=1).train_dataloader()))
    assert not torch.equal(first["image"], other["image"])


def test_train_stream__label_balanced__rare_class_in_many_crops(family_cache: Path) -> None:
    made = ready(family_cache, prob_label=1.0, crop_vox=(6, 6, 6), global_batch_size=64)
    label = next(iter(made.train_dataloader()))["label"]
    holding = [(label == value).flatten(1).any(1).float().mean() for value in (1, 2)]
    assert (label > 0).flatten(1).any(1).all()
    assert min(holding) > 0.3  # about half of the crops are laid around each class


def test_label_crop_start__any_voxel__inside_the_crop_and_the_crop_inside_the_volume() -> None:
    shape, crop = (30, 40, 20), (16, 8, 24)
    label = np.zeros(shape, np.uint8)
    label[29, 0, 7] = 1
    voxels = label_voxels(label)
    places = set()
    for sample in range(200):
        start = label_crop_start(0, sample, shape, crop, voxels, ((0, 30), (0, 40), (0, 20)), 1.0)
        assert all(s <= v < s + c for s, v, c in zip(start, (29, 0, 7), crop, strict=True))
        assert start[0] + crop[0] <= 30 and start[1] >= 0
        assert start[2] == -2  # the volume is smaller than the crop there: centred
        places.add(start)
    assert len(places) == 1  # a corner voxel leaves one crop inside the volume
    label[29, 0, 7], label[15, 20, 7] = 0, 1
    places = {label_crop_start(0, n, shape, crop, label_voxels(label), ((0, 30),) * 3, 1.0) for n in range(300)}
    assert {start[0] for start in places} == set(range(3, 12))  # the voxel lies anywhere in the middle half
    assert {start[1] for start in places} == set(range(14, 19))


def test_batch__after_transfer__range_dtypes_and_flips_move_image_and_label_together(family_cache: Path) -> None:
    made = ready(family_cache, appearance=False, flip_axes=[0, 1, 2], global_batch_size=32)
    raw = next(iter(made.train_dataloader()))

    class Training:
        training = True

    plain = made.on_after_batch_transfer(raw, 0)
    made.trainer = Training()
    flipped = made.on_after_batch_transfer(raw, 0)
    made.trainer = None
    assert plain["image"].dtype == torch.float32 and plain["label"].dtype == torch.int64
    assert plain["image"].min() >= -1 and plain["image"].max() <= 1 and plain["image"].std() > 0.1
    seen = set()
    for index in range(32):
        for axes in ((), (1,), (2,), (3,), (1, 2), (1, 3), (2, 3), (1, 2, 3)):
            if torch.equal(flipped["image"][index], plain["image"][index].flip(axes)):
                assert torch.equal(flipped["label"][index], plain["label"][index].flip(axes))
                assert torch.equal(flipped["foreground"][index], plain["foreground"][index].flip(axes))
                seen.add(axes)
                break
        else:
            pytest.fail("the image is no flip of itself")
    assert len(seen) >= 6


def test_val_loader__whole_volumes__every_case_once(family_cache: Path) -> None:
    made = ready(family_cache)
    batches = list(made.val_dataloader())
    assert [int(batch["case"]) for batch in batches] == made.members["val"]
    assert all(batch["image"].shape == (1, 1, 20, 24, 20) for batch in batches)


def test_setup__label_value_above_num_classes__names_case_and_value(family_cache: Path) -> None:
    with pytest.raises(ValueError, match=r"case case\d+ holds the label value 2, but num_classes is 2"):
        ready(family_cache, num_classes=2)


def test_label_groups__values_joined__become_one_class(family_cache: Path) -> None:
    made, plain = ready(family_cache, num_classes=2, label_groups=[[1, 2]]), ready(family_cache)
    assert torch.equal(
        next(iter(made.val_dataloader()))["label"], (next(iter(plain.val_dataloader()))["label"] > 0).to(torch.int16)
    )


def test_predict__labels_that_are_no_classes__are_not_read(tmp_path: Path, make_cache: Callable[..., Path]) -> None:
    splits = ["train"] * 4 + ["val", "test"]
    cache = make_cache(tmp_path / "higher.h5", num_cases=6, shape=(20, 20, 20), splits=splits)
    arguments = {"num_classes": 2, "label_groups": [[1]], "num_subjects": 1, "predict_split": "all"}
    used = subjects(ready(cache, **arguments), "train")
    with h5py.File(cache, "r+") as file:
        index = json.loads(file["index"][()].tobytes())
        for case in index["cases"]:
            label = file["cases"][case["key"]]["label"]
            if case["split"] == "train" and case["subject"] not in used:
                label[...] = np.where(label[...] == 2, 200, label[...])
                case["label_values"] = [0, 1, 200]
        del file["index"]
        file["index"] = np.frombuffer(json.dumps(index).encode(), dtype=np.uint8)
    made = module(cache, **arguments)
    made.setup("predict")
    batches = list(made.predict_dataloader())
    assert len(batches) == 6 and all("label" not in batch and "foreground" in batch for batch in batches)
    assert all("label" in batch for batch in made.test_dataloader())


def test_setup__nothing_labelled__refused_but_predicted(tmp_path: Path, make_cache: Callable[..., Path]) -> None:
    cache = make_cache(tmp_path / "plain.h5", num_cases=3, shape=(16, 16, 16), labelled=False, num_classes=0)
    with pytest.raises(ValueError, match="has a label map"):
        ready(cache)
    with pytest.raises(ValueError, match="has a class"):
        ClassificationDataModule(str(cache), crop_vox=(16, 16, 16), num_classes=2).setup("fit")
    made = module(cache, predict_split="all")
    made.setup("predict")
    batches = list(made.predict_dataloader())
    assert len(batches) == 3 and "label" not in batches[0]


def test_setup__no_window_anywhere__refused(family_cache: Path) -> None:
    with pytest.raises(ValueError, match="--data.crop_vox"):
        ready(family_cache, crop_vox=None)
