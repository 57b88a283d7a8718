"""Subsets of subjects with classes: nested, every class as soon as it can be there, shares near those of the set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from agssd.data_modules.cache import VolumeCache
from agssd.data_modules.downstream import ClassificationDataModule, SegmentationDataModule
from agssd.data_modules.probe_set import ProbeSet
from agssd.data_modules.subsets import nested_subset

CLASSES = {f"subject{n}": {0 if n < 70 else 1 if n < 90 else 2 if n < 97 else 3} for n in range(100)}


@pytest.mark.parametrize("seed", range(10))
def test_nested_subset__with_classes__nested_with_every_class_and_their_shares(seed: int) -> None:
    totals = Counter(label for own in CLASSES.values() for label in own)
    before: set[str] = set()
    for size in range(1, len(CLASSES) + 1):
        names = nested_subset(CLASSES, size, seed=seed, classes=CLASSES)
        assert before < set(names) and len(names) == size
        before = set(names)
        counts = Counter(label for name in names for label in CLASSES[name])
        assert len(counts) == min(size, 4), "a class that is missing comes before a second of any"
        if size >= 40:
            assert all(abs(counts[label] - totals[label] * size / 100) <= 1 for label in totals)
    again = nested_subset(list(CLASSES)[::-1] * 2, 9, seed=seed, classes=CLASSES)
    assert again == nested_subset(CLASSES, 9, seed=seed, classes=CLASSES)  # order and repetition do not count


def test_nested_subset__without_classes__draws_do_not_change_over_time() -> None:
    assert nested_subset([f"subject{n}" for n in range(37)], 3, seed=0) == ["subject17", "subject24", "subject34"]


def test_nested_subset__with_classes__another_seed_is_another_draw() -> None:
    drawn = [nested_subset(CLASSES, 4, seed=seed, classes=CLASSES) for seed in range(300)]
    first = Counter(nested_subset(CLASSES, 1, seed=seed, classes=CLASSES)[0] for seed in range(300))
    assert len({tuple(names) for names in drawn}) > 290
    assert 0.55 < sum(number for name, number in first.items() if CLASSES[name] == {0}) / 300 < 0.85  # 70 of 100


def test_nested_subset__subjects_of_several_classes__all_of_them_count() -> None:
    classes = {"a": {0, 1}, "b": {0}, "c": {2}, "d": {1, 2}, "e": {0}}
    for seed in range(20):
        found = [nested_subset(classes, size, seed=seed, classes=classes) for size in range(1, 6)]
        assert set().union(*(classes[name] for name in found[2])) == {0, 1, 2}
        assert all(set(small) < set(large) for small, large in zip(found, found[1:], strict=False))


@pytest.fixture(scope="module")
def family_cache(tmp_path_factory: pytest.TempPathFactory, make_cache: Callable[..., Path]) -> Path:
    """Return a cache of 12 subjects with three volumes each, 9 train, of four classes in turn."""
    folder = tmp_path_factory.mktemp("family")
    splits = ["train"] * 9 + ["val", "test", "test"]
    return make_cache(folder / "c.h5", 36, (18, 18, 18), splits=splits, cases_per_subject=3, num_classes=4)


def test_data_module_and_probe_set__draw_the_same_subjects(family_cache: Path) -> None:
    settings = {"num_workers": 0, "crop_vox": (16, 16, 16), "global_batch_size": 2}
    frozen = {kind: ProbeSet(VolumeCache(family_cache), kinds=(kind,)) for kind in ("class", "label")}
    names = frozen["class"].folds[0].learned
    for draw in range(3):
        for number in (2, 5, 9):
            of_task = {}
            for kind, module in (("class", ClassificationDataModule), ("label", SegmentationDataModule)):
                made = module(str(family_cache), num_classes=4, num_subjects=number, subset_seed=draw, **settings)
                made.setup("fit")
                of_task[kind] = sorted({made.case_info(row).subject for row in made.members["train"]})
                assert of_task[kind] == frozen[kind].subset(names, number, None, draw)
            assert of_task["label"] == nested_subset(names, number, seed=draw), "segmentation draws as before"


def test_setup__fewer_subjects_than_hold_the_classes__refused_before_training(family_cache: Path) -> None:
    settings = {"num_workers": 0, "crop_vox": (16, 16, 16), "num_classes": 4}
    for wrong, told in (({"num_subjects": 1}, "num_subjects 1"), ({"label_fraction": 0.1}, r"label_fraction 0\.1")):
        made = ClassificationDataModule(str(family_cache), **settings, **wrong)
        with pytest.raises(ValueError, match=rf"data\.{told} leaves 1 training subject .* 4 classes; 4 subjects hold"):
            made.setup("fit")
    made = ClassificationDataModule(str(family_cache), **settings, num_subjects=1)
    made.setup("test")  # what is measured does not hang on the training subjects
