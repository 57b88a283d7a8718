"""KoLeo against plain NumPy, and where it must not explode."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from agssd.losses.koleo import koleo


def plain_koleo(features, eps=1e-8):
    x = features.astype(np.float64)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    distance = np.linalg.norm(x[:, None] - x[None] + eps, axis=-1)
    np.fill_diagonal(distance, np.inf)
    return -np.log(distance.min(1)).mean()


def rows(count=16, size=12, seed=0):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("count", "size"), [(2, 3), (16, 12), (64, 192)])
def test_koleo__equals_numpy(count, size):
    features = rows(count, size)
    assert koleo(features).item() == pytest.approx(plain_koleo(features.numpy()), rel=1e-5)
    assert koleo(features * 100).item() == pytest.approx(koleo(features).item(), rel=1e-5)  # of directions only


def test_koleo__gradient_equals_finite_differences():
    features = rows(8, 5)
    variable = features.clone().requires_grad_()
    koleo(variable).backward()
    step = 1e-6
    for n in range(8):
        for e in range(5):
            moved = features.double().numpy().copy()
            moved[n, e] += step
            up = plain_koleo(moved)
            moved[n, e] -= 2 * step
            assert variable.grad[n, e].item() == pytest.approx((up - plain_koleo(moved)) / (2 * step), abs=1e-4)


def test_koleo__a_step_down_its_gradient_spreads_the_features():
    features = (rows(32, 8) * 0.1 + 1).requires_grad_()
    before = koleo(features)
    before.backward()
    assert koleo(features - 0.05 * features.grad) < before - 0.01


def test_koleo__one_sample_gives_zero_with_its_graph():
    features = rows(1).requires_grad_()
    loss = koleo(features)
    assert loss.item() == 0
    loss.backward()
    assert torch.equal(features.grad, torch.zeros_like(features))


def test_koleo__leaves_duplicates_out():
    distinct = rows(6)
    features = torch.cat([distinct, distinct[:1]]).requires_grad_()  # rows 0 and 6 are the same
    loss = koleo(features)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(features.grad).all()
    x = torch.nn.functional.normalize(features.detach(), dim=-1)
    distance = torch.cdist(x, x).fill_diagonal_(torch.inf).amin(1)
    assert loss.item() == pytest.approx(-distance[1:6].log().mean().item(), rel=1e-4)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_koleo__of_equal_rows_only_is_zero_without_nan(value):
    features = torch.full((8, 4), value, requires_grad=True)
    loss = koleo(features)
    loss.backward()
    assert loss.item() == 0 and torch.isfinite(features.grad).all()


def test_koleo__runs_in_fp32_under_autocast():
    features = rows().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = koleo(features)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(plain_koleo(features.float().numpy()), rel=1e-5)
