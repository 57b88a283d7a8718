"""Scores against counting by hand, and mm against the ruler."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from agssd.evaluation.metrics import (
    classification_scores,
    dice_per_class,
    mean_over_present,
    surface_dice_per_class,
)


def test_dice_per_class__random_maps__equals_counting() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, label = (torch.randint(0, 4, (9, 8, 7), generator=generator) for _ in range(2))
    found = dice_per_class(prediction, label, 4)
    for index in (1, 2, 3):
        a, b = (
            {(*v,) for v in (prediction == index).nonzero().tolist()},
            {(*v,) for v in (label == index).nonzero().tolist()},
        )
        assert float(found[index - 1]) == pytest.approx(2 * len(a & b) / (len(a) + len(b)), abs=1e-6)


def test_dice_per_class__absent_classes__nan_only_where_absent_from_both() -> None:
    prediction, label = torch.zeros(4, 4, 4, dtype=torch.long), torch.zeros(4, 4, 4, dtype=torch.long)
    prediction[0], label[0] = 1, 1
    prediction[1], label[2] = 2, 3
    found = dice_per_class(prediction, label, 5)
    assert found[:3].tolist() == [1, 0, 0] and math.isnan(found[3])
    assert float(mean_over_present(found)) == pytest.approx(1 / 3)


def test_dice_per_class__value_beyond_classes__refused() -> None:
    with pytest.raises(ValueError, match="label holds values 0 to 3, but num_classes=3"):
        dice_per_class(torch.zeros(2, 2, 2), torch.tensor([[[0, 3]]]).expand(2, 2, 2), 3)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_surface_dice__plane_shifted_by_a_voxel__decided_by_its_mm(axis: int) -> None:
    spacing = [3.0, 1.0, 0.5]
    shape = [24, 24, 24]
    label, prediction = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    box = [slice(6, 18)] * 3
    label[tuple(box)] = 1
    box[axis] = slice(7, 19)
    prediction[tuple(box)] = 1
    for tolerance in (0.25, 0.75, 2.0, 3.5):
        score = float(surface_dice_per_class(prediction, label, 2, spacing, tolerance)[0])
        assert (score == 1.0) == (tolerance >= spacing[axis]), (tolerance, score)


def test_surface_dice__missing_and_absent_classes__zero_and_nan() -> None:
    label, prediction = torch.zeros(8, 8, 8, dtype=torch.long), torch.zeros(8, 8, 8, dtype=torch.long)
    label[2:5, 2:5, 2:5] = 1
    found = surface_dice_per_class(prediction, label, 3, [1, 1, 1], 1.0)
    assert found[0] == 0 and math.isnan(found[1])


def test_classification_scores__ranked_by_hand__area_and_recall() -> None:
    scores = torch.tensor([0.1, 0.4, 0.35, 0.8])
    targets = torch.tensor([0, 0, 1, 1])
    found = classification_scores(torch.stack([1 - scores, scores], 1), targets)
    assert found["auroc"] == pytest.approx(0.75)  # 3 of 4 pairs in order
    assert found["balanced_accuracy"] == pytest.approx(0.75)


def test_classification_scores__three_classes__macro_of_pair_counts_over_classes_present() -> None:
    rng = np.random.default_rng(0)
    probabilities = torch.from_numpy(rng.dirichlet([1, 1, 1, 1], 40)).float()
    targets = torch.from_numpy(rng.integers(0, 3, 40))  # class 3 never occurs
    areas, recalls = [], []
    for index in range(3):
        inside, outside = probabilities[targets == index, index], probabilities[targets != index, index]
        areas.append((inside[:, None] > outside[None]).float().mean())
        recalls.append((probabilities[targets == index].argmax(1) == index).float().mean())
    found = classification_scores(probabilities, targets)
    assert found["auroc"] == pytest.approx(float(torch.stack(areas).mean()), abs=1e-5)
    assert found["balanced_accuracy"] == pytest.approx(float(torch.stack(recalls).mean()), abs=1e-6)


def test_classification_scores__one_class_only__auroc_nan() -> None:
    found = classification_scores(torch.tensor([[0.2, 0.8], [0.9, 0.1]]), torch.tensor([1, 1]))
    assert math.isnan(found["auroc"]) and found["balanced_accuracy"] == pytest.approx(0.5)
