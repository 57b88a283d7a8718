"""Volumes are classified by what was learnt from other subjects, with settings chosen among those."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from agssd.evaluation.classification_probe import (
    ProbeVector,
    linear_shares,
    neighbour_shares,
    probe_classification,
)
from agssd.evaluation.folds import Fold


def vectors(num: int, noise: float, seed: int = 0, per_subject: int = 1) -> list[ProbeVector]:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(3, 12))
    made = []
    for number in range(num):
        target = number // per_subject % 3
        feature = torch.from_numpy(centres[target] + noise * rng.normal(size=12)).float()
        made.append(ProbeVector(f"s{number // per_subject}", feature, target))
    return made


@pytest.mark.parametrize("kind", ["knn", "linear"])
def test_probe_classification__clear_classes_are_found_and_noise_is_not(kind) -> None:
    names = [f"s{n}" for n in range(30)]
    folds = [Fold(tuple(names[:15]), tuple(names[15:])), Fold(tuple(names[15:]), tuple(names[:15]))]
    clear, right = probe_classification(vectors(30, 0.3), folds, 3, kind)
    assert clear["balanced_accuracy"] > 0.95 and clear["auroc"] > 0.95
    assert sorted(right) == sorted(names)
    noise, _ = probe_classification(vectors(30, 50.0), folds, 3, kind)
    assert noise["balanced_accuracy"] < 0.7


def test_neighbour_shares__k_is_chosen_without_the_own_subject() -> None:
    # Two equal volumes per subject and classes that overlap: with the own subject k = 1 would look perfect.
    rng = np.random.default_rng(1)
    learned = []
    for number in range(40):
        feature = torch.from_numpy(np.array([3.0, 0.7 * (number % 2), 0]) + rng.normal(size=3)).float()
        learned += [ProbeVector(f"s{number}", feature, number % 2)] * 2
    asked = [ProbeVector(f"t{row}", torch.from_numpy(rng.normal(size=3)).float(), 0) for row in range(8)]
    unit = torch.nn.functional.normalize(torch.stack([case.feature for case in learned]), dim=-1)
    mean = unit.mean(0)
    unit = torch.nn.functional.normalize(unit - mean, dim=-1)
    targets = torch.tensor([case.target for case in learned])

    def shares_of(similar: torch.Tensor, rows: list[int], k: int) -> float:
        best = sorted(rows, key=lambda row: -float(similar[row]))[:k]
        weights = ((similar[best] - 1) / 0.07).exp()
        return float(weights[targets[best] == 1].sum() / weights.sum())

    accuracy = {}
    for k in (1, 5, 10, 20):
        right: dict[int, list[bool]] = {0: [], 1: []}
        for row, case in enumerate(learned):
            others = [other for other in range(80) if learned[other].subject != case.subject]
            right[case.target].append((shares_of(unit @ unit[row], others, k) > 0.5) == bool(case.target))
        accuracy[k] = float(np.mean(right[0]) + np.mean(right[1]))
    k = max(accuracy, key=lambda k: accuracy[k])
    assert k > 1
    found = neighbour_shares(learned, asked, 2)
    for case, share in zip(asked, found[:, 1].tolist(), strict=True):
        query = torch.nn.functional.normalize(torch.nn.functional.normalize(case.feature, dim=-1) - mean, dim=-1)
        assert share == pytest.approx(shares_of(unit @ query, list(range(80)), k), rel=1e-3)


@pytest.mark.parametrize("shares", [neighbour_shares, linear_shares])
def test_shares__classes_of_the_asked_have_no_influence(shares) -> None:
    learned, asked = vectors(20, 1.0), vectors(6, 1.0, seed=5)
    lied = [case._replace(target=(case.target + 1) % 3) for case in asked]
    found = shares(learned, asked, 3)
    assert torch.equal(found, shares(learned, lied, 3))
    assert found.sum(1).tolist() == pytest.approx([1.0] * 6, abs=1e-5)


def test_probe_classification__leak_and_empty_fold__refused() -> None:
    with pytest.raises(ValueError, match=r"has seen \['s1'\]"):
        probe_classification(vectors(4, 1.0), [Fold(("s0", "s1"), ("s1",))], 3, "knn")
    with pytest.raises(ValueError, match="no volume with a class"):
        probe_classification(vectors(4, 1.0), [Fold(("s0",), ("other",))], 3, "linear")
