"""Collapse figures against NumPy and against distributions and matrices with known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from agssd.evaluation.collapse import (
    attention_figures,
    distribution_figures,
    distribution_sums,
    effective_rank,
    feature_std,
    kl_divergence,
    norm_outlier,
    normalised_entropy,
    off_diagonal_cosine,
    rankme,
)


def _random(num_samples: int = 40, num_prototypes: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    teacher = (2 * torch.randn(num_samples, num_prototypes, generator=generator)).softmax(-1)
    return teacher, torch.randn(num_samples, num_prototypes, generator=generator)


def _figures(teacher: torch.Tensor, student: torch.Tensor) -> dict[str, float]:
    return {name: float(value) for name, value in distribution_figures(distribution_sums(teacher, student)).items()}


def test_distribution_figures__match_numpy() -> None:
    teacher, student = _random()
    p, z = teacher.double().numpy(), student.double().numpy()
    log_q = z - np.log(np.exp(z).sum(-1, keepdims=True))
    entropy = -(p * np.log(p)).sum(-1).mean()
    mean = p.mean(0)
    winners = np.bincount(p.argmax(-1), minlength=16)
    expected = {
        "samples": 40.0,
        "entropy_sample": entropy / math.log(16),
        "entropy_batch": -(mean * np.log(mean)).sum() / math.log(16),
        "kl": (p * (np.log(p) - log_q)).sum(-1).mean(),
        "cross_entropy": -(p * log_q).sum(-1).mean(),
        "max_share": winners.max() / 40,
        "active": float((winners > 0).sum()),
    }
    expected["information"] = expected["entropy_batch"] - expected["entropy_sample"]
    assert _figures(teacher, student) == pytest.approx(expected, abs=2e-6)


def test_distribution_figures__uniform_and_peaked_and_ideal() -> None:
    uniform = _figures(torch.full((32, 8), 1 / 8), torch.zeros(32, 8))
    assert uniform["entropy_sample"] == pytest.approx(1) and uniform["entropy_batch"] == pytest.approx(1)
    assert uniform["cross_entropy"] == pytest.approx(math.log(8)) and uniform["kl"] == pytest.approx(0, abs=1e-6)
    peaked = _figures(torch.eye(8)[torch.zeros(32, dtype=torch.long)], torch.zeros(32, 8))
    assert peaked["entropy_batch"] == 0 and peaked["max_share"] == 1 and peaked["active"] == 1
    assert peaked["kl"] == pytest.approx(math.log(8))
    ideal = _figures(torch.eye(8).repeat(4, 1), torch.zeros(32, 8))
    assert ideal["entropy_sample"] == 0 and ideal["information"] == pytest.approx(1)
    assert ideal["active"] == 8 and ideal["max_share"] == pytest.approx(1 / 8)


def test_distribution_sums__add_over_parts_and_accept_none() -> None:
    teacher, student = _random()
    parts = sum(distribution_sums(teacher[part], student[part]) for part in (slice(0, 7), slice(7, 40), slice(40, 40)))
    torch.testing.assert_close(parts, distribution_sums(teacher, student))


def test_kl_divergence__is_zero_for_equal_and_handles_zero_probability() -> None:
    _, student = _random()
    assert kl_divergence(student.softmax(-1), student + 5).abs().max() < 1e-6
    one_hot = torch.eye(16)[:4]
    torch.testing.assert_close(kl_divergence(one_hot, student[:4]), -student[:4].log_softmax(-1).diagonal())


def test_figures__are_computed_in_fp32_without_gradient() -> None:
    teacher, student = _random()
    sums = distribution_sums(teacher.bfloat16().requires_grad_(), student.bfloat16().requires_grad_())
    assert sums.dtype == torch.float32 and not sums.requires_grad
    features = torch.randn(12, 6).bfloat16().requires_grad_()
    for figure in (feature_std, effective_rank, off_diagonal_cosine, norm_outlier):
        value = figure(features)
        assert value.dtype == torch.float32 and not value.requires_grad and value.shape == ()
    assert normalised_entropy(teacher.half()).dtype == torch.float32


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_effective_rank__counts_equal_directions(rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.cat([torch.ones(64, 1), torch.randn(64, rank, generator=generator)], 1))
    right, _ = torch.linalg.qr(torch.randn(20, rank, generator=generator))
    features = left[:, 1:] @ right.T + 5 * torch.randn(20, generator=generator)
    assert float(effective_rank(features)) == pytest.approx(rank, abs=1e-2)


def test_effective_rank__matches_numpy_and_known_limits() -> None:
    features = torch.randn(30, 12, generator=torch.Generator().manual_seed(1)) * torch.logspace(0, -3, 12)
    values = np.linalg.svd(features.double().numpy() - features.double().numpy().mean(0), compute_uv=False)
    share = values / values.sum()
    assert float(effective_rank(features)) == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-4)
    assert float(effective_rank(torch.full((9, 5), 3.0))) == 1.0
    assert float(effective_rank(3 + 1e-7 * torch.randn(64, 32))) == 1.0
    assert math.isnan(float(effective_rank(torch.tensor([[1.0, float("nan")], [0.0, 1.0]]))))


def test_feature_std__is_one_for_isotropic_and_zero_for_equal_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    assert float(feature_std(torch.randn(4096, 64, generator=generator))) == pytest.approx(1, abs=0.01)
    scales = torch.rand(50, 1, generator=generator) + 0.1
    assert float(feature_std(scales * torch.ones(50, 64))) == pytest.approx(0, abs=1e-6)


def test_off_diagonal_cosine__matches_every_pair() -> None:
    features = torch.randn(9, 5, generator=torch.Generator().manual_seed(2)).double().numpy() + 0.5
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    pairs = [unit[i] @ unit[j] for i in range(9) for j in range(9) if i != j]
    assert float(off_diagonal_cosine(torch.from_numpy(features))) == pytest.approx(np.mean(pairs), abs=1e-6)


def test_norm_outlier__names_the_register_like_token() -> None:
    features = torch.eye(9)
    features[4] *= 30
    assert float(norm_outlier(features)) == pytest.approx(30)


def test_attention_figures__uniform_focused_and_equal_heads() -> None:
    uniform = attention_figures(torch.ones(3, 2, 4, 2))
    assert float(uniform["attention_entropy"]) == pytest.approx(1)
    focused = torch.zeros(2, 4, 4, 4)
    focused[0, 0, 0, 0] = focused[1, 3, 3, 3] = 1
    figures = attention_figures(focused)
    assert float(figures["attention_entropy"]) == 0
    assert float(figures["attention_correlation"]) == pytest.approx(-1 / 63, abs=1e-5)
    same = attention_figures(torch.rand(1, 4, 4, 4, generator=torch.Generator().manual_seed(0)).repeat(5, 1, 1, 1))
    assert float(same["attention_correlation"]) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("shape", [(40, 12), (9, 30)])
def test_rankme__is_its_definition(shape: tuple[int, int]) -> None:
    features = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.01, 3, shape[1]) + 0.5
    values = np.linalg.svd(features.double().numpy(), compute_uv=False)
    share = values / values.sum() + 1e-7
    expected = float(np.exp(-(share * np.log(share)).sum()))
    assert float(rankme(features)) == pytest.approx(expected, rel=1e-4)
    assert 1 < expected < min(shape)


def test_rankme__one_direction_is_1_and_orthogonal_rows_are_all() -> None:
    assert float(rankme(torch.ones(20, 6))) == pytest.approx(1, abs=1e-3)
    assert float(rankme(torch.eye(8))) == pytest.approx(8, rel=1e-3)
