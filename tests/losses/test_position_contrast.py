"""VoCo's losses against loops, and where the released form stops to teach."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from agssd.losses.position_contrast import base_orthogonality, position_loss


def test_position_loss__equals_equation_3() -> None:
    rng = np.random.default_rng(0)
    cosines = rng.uniform(-0.9, 0.9, (3, 2, 4))
    overlap = np.clip(rng.uniform(-0.6, 0.9, (3, 2, 4)), 0, None)
    overlap[overlap > 0] = np.clip(cosines[overlap > 0] + rng.uniform(-0.5, 0.5, (overlap > 0).sum()), 0.01, 1)
    counts = np.array([[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 0, 1]], bool)
    samples = []
    for b in range(3):
        terms = []
        for i in range(2):
            for j in np.flatnonzero(counts[b]):
                d = abs(overlap[b, i, j] - (cosines[b, i, j] if overlap[b, i, j] else max(cosines[b, i, j], 0)))
                terms.append(-math.log(1 - d) if d < 0.95 else -math.log(0.05) + 20 * (d - 0.95))
        samples.append(np.mean(terms))
    given = position_loss(torch.tensor(cosines).float(), torch.tensor(overlap).float(), torch.tensor(counts))
    assert given.item() == pytest.approx(np.mean(samples), rel=1e-5)


@pytest.mark.parametrize("cosine", [-1.0, -0.3, 0.0, 0.5])
def test_position_loss__pulls_a_crop_that_points_away_from_its_base(cosine: float) -> None:
    # Defect of the released code: its ReLU leaves no gradient at negative similarity, and -log(1 - 1) no finite one.
    similar = torch.full((1, 1, 1), cosine, requires_grad=True)
    loss = position_loss(similar, torch.ones(1, 1, 1), torch.ones(1, 1, dtype=torch.bool))
    loss.backward()
    assert loss.isfinite() and similar.grad is not None
    assert similar.grad.isfinite().all() and similar.grad.item() < -0.9


def test_base_orthogonality__is_the_mean_over_pairs_that_count() -> None:
    bases = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(0))
    counts = torch.tensor([[1, 1, 0, 1, 1], [0, 0, 1, 0, 0]]).bool()
    unit = bases.double().numpy() / np.linalg.norm(bases.double().numpy(), axis=-1, keepdims=True)
    used = [0, 1, 3, 4]
    pairs = [abs(unit[0, i] @ unit[0, j]) for i in used for j in used if i < j]
    # Equation 4: 2 / (n (n - 1)) times the sum over pairs; the second sample has no pair.
    assert base_orthogonality(bases, counts).item() == pytest.approx(2 / (4 * 3) * sum(pairs) / 2, rel=1e-5)
    orthogonal = torch.eye(5)[None] * 3
    assert base_orthogonality(orthogonal, torch.ones(1, 5, dtype=torch.bool)).item() == pytest.approx(0, abs=1e-6)
