"""Classification: windows cover the foreground, pooling is over all of them, and probes leave the encoder alone."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch

from agssd.data_modules.downstream import ClassificationDataModule
from agssd.models.vit import ViT
from agssd.tasks.classification import ClassificationTask, window_starts

MakeViT = Callable[..., ViT]
MakeTrainer = Callable[..., L.Trainer]


def task(backbone: ViT, **arguments: Any) -> ClassificationTask:
    return ClassificationTask(**{"num_classes": 2, "crop_vox": (32, 32, 32), "backbone": backbone, **arguments})


def data(cache: Path, **arguments: Any) -> ClassificationDataModule:
    return ClassificationDataModule(str(cache), **{"global_batch_size": 2, "num_workers": 0, **arguments})


@pytest.mark.parametrize("box", [[(3, 40), (0, 33), (5, 90)], [(0, 32), (7, 71), (2, 20)]])
def test_window_starts__box__covered_by_the_fewest_windows_inside_it(box: list[tuple[int, int]]) -> None:
    starts = window_starts(box, (32, 32, 32))
    for axis, (first, last) in enumerate(box):
        places = sorted({start[axis] for start in starts})
        assert len(places) == max(1, -(-(last - first) // 32))
        assert places[0] <= first and places[-1] + 32 >= last
        assert all(b - a <= 32 for a, b in zip(places, places[1:], strict=False))  # no gap
        if last - first >= 32:
            assert places[0] == first and places[-1] + 32 == last


def test_windows__foreground_at_the_border__padded_with_the_lowest_value(make_vit: MakeViT) -> None:
    image = torch.rand(1, 1, 20, 40, 40) + 1
    foreground = torch.zeros(1, 1, 20, 40, 40, dtype=torch.bool)
    foreground[..., 0:4, 0:4, 10:30] = True
    windows = task(make_vit()).windows(image, foreground)
    assert windows.shape == (1, 1, 1, 32, 32, 32)
    # box 4 x 4 x 20 in the middle of the window: D starts at (0 + 4 - 32) // 2 = -14
    assert torch.equal(windows[0, 0, 0, 14 : 14 + 18, 14:, 6:26], image[0, 0, :18, :18, 10:30])
    assert (windows[0, 0, 0, :14] == image.min()).all()


@pytest.mark.parametrize("pooling", ["cls", "mean", "cls_mean", "attentive"])
def test_forward__order_of_windows__no_influence(pooling: Any, make_vit: MakeViT) -> None:
    torch.manual_seed(0)
    module = task(make_vit(), pooling=pooling, num_heads=2).eval()
    windows = torch.randn(2, 3, 1, 32, 32, 32)
    assert torch.allclose(module(windows), module(windows[:, [2, 0, 1]]), atol=1e-5)
    changed = windows.clone()
    changed[:, 2] += 1
    assert not torch.allclose(module(windows), module(changed), atol=1e-5)  # each of them counts


def test_fit_and_test__linear_probe__encoder_untouched_and_rows_written(
    tmp_path: Path, tiny_cache: Path, make_vit: MakeViT, make_trainer: MakeTrainer
) -> None:
    module, source = task(make_vit(), freeze_encoder=True, class_weights="balanced"), data(tiny_cache)
    before = {name: value.clone() for name, value in module.backbone.state_dict().items()}
    trainer = make_trainer(4)
    trainer.fit(module, source)
    assert all(torch.equal(value, before[name]) for name, value in module.backbone.state_dict().items())
    counts = source.class_counts  # 5 training cases of classes 0, 1, 0, 1, 0
    assert counts == [3, 2]
    assert module.loss_weights.tolist() == pytest.approx([5 / 6, 5 / 4])
    scores = trainer.test(module, source, verbose=False)[0]
    assert set(scores) == {"test/auroc", "test/balanced_accuracy"}
    rows = list(csv.DictReader((tmp_path / "test_cases.csv").open()))
    assert len(rows) == len(source.members["test"]) == 1
    assert float(rows[0]["probability0"]) + float(rows[0]["probability1"]) == pytest.approx(1, abs=1e-5)


def test_fit__same_seeds__bit_identical_weights(tiny_cache: Path, make_vit: MakeViT, make_trainer: MakeTrainer) -> None:
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        module = task(make_vit(), pooling="attentive", num_heads=2)
        make_trainer(3, limit_val_batches=0).fit(module, data(tiny_cache))
        results.append(module.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_fit__bright_blob_decides_the_class__auroc_1_on_new_subjects(
    tmp_path: Path, make_cache: Callable[..., Path], make_vit: MakeViT, make_trainer: MakeTrainer
) -> None:
    torch.manual_seed(0)
    cache = make_cache(tmp_path / "classes.h5", num_cases=32, shape=(32, 32, 32), splits=["train"] * 24 + ["test"] * 8)
    module, trainer = task(make_vit(), pooling="cls_mean", lr=3e-3, encoder_lr=1e-3), make_trainer(120)
    source = data(cache, global_batch_size=8, appearance=False)
    trainer.fit(module, source)
    assert trainer.test(module, source, verbose=False)[0]["test/auroc"] == 1.0
    assert len(trainer.predict(module, source) or []) == 8
    assert len((tmp_path / "predictions.csv").read_text().splitlines()) == 9


def test_setup__other_number_of_classes__refused_before_the_first_step(
    tiny_cache: Path, make_vit: MakeViT, make_trainer: MakeTrainer
) -> None:
    with pytest.raises(ValueError, match="--model.num_classes 2"):
        make_trainer().fit(task(make_vit(), num_classes=3), data(tiny_cache))
