"""Weights, rows and votes are those of a loop over all pairs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from agssd.evaluation import neighbours as module
from agssd.evaluation.neighbours import candidates, neighbours, vote


@pytest.mark.parametrize("chunk", [1 << 25, 60])
@pytest.mark.parametrize("k", [1, 4])
def test_neighbours__equal_a_loop_over_pairs(k: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_SIMILARITIES", chunk)
    rng = np.random.default_rng(k)
    queries, training = rng.normal(size=(7, 5)) + 2, 3 * rng.normal(size=(20, 5)) + 2
    excluded = rng.random((7, 20)) < 0.3
    weights, rows = neighbours(torch.tensor(queries), torch.tensor(training), k, torch.tensor(excluded))
    queries, training = queries - training.mean(0), training - training.mean(0)
    for number, query in enumerate(queries):
        similar = {
            row: float(query @ other / (np.linalg.norm(query) * np.linalg.norm(other)))
            for row, other in enumerate(training)
            if not excluded[number, row]
        }
        best = sorted(similar, key=lambda row: -similar[row])[:k]
        assert rows[number].tolist() == best
        expected = [math.exp((similar[row] - 1) / 0.07) for row in best]
        assert weights[number].tolist() == pytest.approx(expected, rel=1e-3)


def test_neighbours__what_all_features_share_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    queries, training = torch.tensor(rng.normal(size=(7, 5))), torch.tensor(rng.normal(size=(20, 5)))
    weights, rows = neighbours(queries, training, 3)
    moved, same = neighbours(queries + 100, training + 100, 3)
    assert torch.equal(rows, same)
    torch.testing.assert_close(moved, weights, rtol=1e-3, atol=1e-6)


def test_neighbours__fewer_than_k_may_vote__the_rest_weigh_nothing() -> None:
    weights, _ = neighbours(torch.eye(2)[1:], torch.eye(3)[:, :2], 3, torch.tensor([[True, False, True]]))
    assert weights[0].tolist() == pytest.approx([1.0, 0.0, 0.0])


def test_vote__shares_are_summed_weights() -> None:
    shares = vote(torch.tensor([[3.0, 2.0, 2.0], [0.0, 0.0, 0.0]]), torch.tensor([[0, 1, 1], [1, 1, 1]]), 4)
    assert shares[0].tolist() == pytest.approx([3 / 7, 4 / 7, 0, 0])
    assert shares[1].tolist() == [0.25] * 4


@pytest.mark.parametrize(
    ("number", "expected"), [(1, [1]), (9, [1, 5]), (150, [1, 5, 10, 20, 100]), (500, [10, 20, 100, 200])]
)
def test_candidates__follow_the_number_of_samples(number: int, expected: list[int]) -> None:
    assert candidates(number) == expected
