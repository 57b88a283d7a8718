"""Classification of frozen features: votes by hand, and a problem whose answer is known."""

from __future__ import annotations

import pytest
import torch

from agssd.evaluation.classification_probe import knn_probabilities, logistic_probabilities


def test_knn_probabilities__three_neighbours__votes_by_hand() -> None:
    angles = torch.tensor([0.0, 0.1, 0.2, 3.0])
    train = torch.stack([angles.cos(), angles.sin()], 1) * torch.tensor([[1.0], [5.0], [2.0], [9.0]])
    found = knn_probabilities(train, torch.tensor([0, 1, 1, 0]), torch.tensor([[3.0, 0.0]]), 2, k=3, temperature=0.1)
    votes = (angles[:3].cos() / 0.1).exp()
    assert found[0, 0] == pytest.approx(float(votes[0] / votes.sum()), abs=1e-5)
    assert float(found.sum()) == pytest.approx(1)


def test_knn_probabilities__k_1__training_set_finds_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    train, targets = torch.randn(50, 8, generator=generator), torch.randint(0, 3, (50,), generator=generator)
    assert torch.equal(knn_probabilities(train, targets, train * 3, 3, k=1).argmax(1), targets)


def test_logistic_probabilities__gaussians__near_the_true_posterior() -> None:
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(2).repeat(2000)
    train = torch.randn(4000, 2, generator=generator) + torch.stack([targets * 2.0, targets * 0.0], 1)
    query = torch.tensor([[0.0, 0.0], [1.0, 3.0], [2.0, -1.0]])
    found = logistic_probabilities(train, targets, query, 2, penalty=1e-6)
    truth = torch.sigmoid(2 * (query[:, 0] - 1))  # ratio of the two densities
    assert torch.allclose(found[:, 1], truth, atol=0.04)


def test_probabilities__target_beyond_classes__refused() -> None:
    for function in (knn_probabilities, logistic_probabilities):
        with pytest.raises(ValueError, match="num_classes is 2"):
            function(torch.zeros(2, 3), torch.tensor([0, 2]), torch.zeros(1, 3), 2)
