"""InfoNCE against plain NumPy, and against what half precision and small batches do to it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from agssd.losses.info_nce import info_nce


def rows(count: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def plain(queries: torch.Tensor, keys: torch.Tensor, temperature: float) -> float:
    """-log of each query's own share, written out in float64."""
    q, k = queries.double().numpy(), keys.double().numpy()
    total = 0.0
    for i in range(len(q)):
        similar = [q[i] @ k[j] / np.linalg.norm(q[i]) / np.linalg.norm(k[j]) / temperature for j in range(len(k))]
        total -= np.log(np.exp(similar[i]) / np.exp(similar).sum())
    return 2 * temperature * total / len(q)


@pytest.mark.parametrize("temperature", [0.05, 0.2, 1.0])
def test_info_nce__equals_numpy(temperature: float) -> None:
    queries, keys = rows(7, 12, 0), rows(7, 12, 1)
    assert info_nce(queries, keys, temperature).item() == pytest.approx(plain(queries, keys, temperature), rel=1e-5)


def test_info_nce__gradient_flows_to_queries_alone() -> None:
    queries, keys = rows(5, 8, 0).requires_grad_(), rows(5, 8, 1).requires_grad_()
    info_nce(queries, keys, 0.2).backward()
    assert queries.grad is not None and queries.grad.abs().sum(1).min() > 0
    assert keys.grad is None


def test_info_nce__is_smallest_where_each_finds_its_own() -> None:
    keys = torch.eye(6)
    own, others = info_nce(keys * 3, keys, 0.2), info_nce(keys.roll(1, 0), keys, 0.2)
    assert own.item() == pytest.approx(0.4 * np.log(1 + 5 * np.exp(-5)), rel=1e-5)
    assert others > own + 1.9  # 2 * temperature * (1 / temperature)
    assert info_nce(keys[:1], keys[:1], 0.2).item() == 0  # alone, without negatives


def test_info_nce__tiny_features_in_half_precision_keep_their_direction() -> None:
    # Defect of the family: the norm of small half-precision features underflows, and 1e-12 beside it as well.
    queries, keys = rows(6, 16, 0) * 1e-4, rows(6, 16, 1)
    given = info_nce(queries.half(), keys.half(), 0.2)
    assert given.item() == pytest.approx(plain(queries, keys, 0.2), rel=0.02)
