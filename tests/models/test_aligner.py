"""The aligner: attention over the tokens of another view, and what it is taught."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from agssd.evaluation.view_figures import place_figures
from agssd.geometry import correspondence, token_centres, transform
from agssd.models.aligner import Aligner, place_targets
from agssd.models.fuser import position_bias

GRID = (4, 3, 5)
TOKENS = 60


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Keep many small products from waiting for other threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def affines(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the affines of two views per sample, of other scale and offset, the second mirrored in half of them."""
    random = np.random.default_rng(seed)
    found = []
    for mirrored in (False, True):
        matrices = np.zeros((samples, 4, 4), np.float32)
        for matrix in matrices:
            scale = random.uniform(12, 18) * np.ones(3)
            if mirrored and random.random() < 0.5:
                scale[2] *= -1
            matrix[:3, :3], matrix[:3, 3], matrix[3, 3] = np.diag(scale), random.uniform(24, 36, 3), 1
        found.append(torch.from_numpy(matrices))
    return found[0], found[1]


def test_place_targets__are_a_gaussian_around_the_true_place() -> None:
    own, other = affines(6, 0)
    u, valid = correspondence(own, other, GRID, margin=0.0)
    targets = place_targets(u, GRID, 0.5).double().numpy()
    np.testing.assert_allclose(targets.sum(-1), 1, atol=1e-6)
    grid = np.array(GRID)
    places = token_centres(GRID, torch.device("cpu")).double().numpy()
    asked = 0
    for b in range(6):
        for n in np.flatnonzero(valid[b].numpy()):
            there = (np.linalg.inv(other[b].double().numpy()) @ own[b].double().numpy() @ np.append(places[n], 1))[:3]
            weight = np.exp(-(((places - there) * grid / 2) ** 2).sum(1) / (2 * 0.5**2))
            np.testing.assert_allclose(targets[b, n], weight / weight.sum(), atol=1e-4)
            asked += 1
    between = correspondence(own, other, GRID)[1]
    assert 20 < asked < 6 * TOKENS and (valid & ~between).any() and not (between & ~valid).any()
    bias, _ = position_bias(own, other, GRID)
    blurred = place_targets(u, GRID, 2.0)[between]
    torch.testing.assert_close(blurred, bias.softmax(-1)[between], atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_aligner__returns_logarithms_of_shares_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    aligner, query, memory = Aligner(24, 16), torch.randn(2, 7, 24), torch.randn(2, 9, 24)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        attention = aligner(query.to(dtype), memory.to(dtype))
    assert attention.shape == (2, 7, 9) and attention.dtype == torch.float32
    torch.testing.assert_close(attention.exp().sum(-1), torch.ones(2, 7))
    with torch.no_grad():
        q, k = aligner.query(query), aligner.key(memory)
        cosine = torch.nn.functional.cosine_similarity(q[:, :, None], k[:, None], dim=-1)
    rounding = 0.1 if dtype == torch.bfloat16 else 1e-5  # 2 x 2**-8 over the temperature, and a little
    torch.testing.assert_close(attention, (cosine / 0.1).log_softmax(-1), atol=rounding, rtol=0)


def test_aligner__learns_places_from_what_tokens_hold_of_the_body() -> None:
    torch.manual_seed(0)
    body = torch.nn.Sequential(torch.nn.Linear(3, 64), torch.nn.Tanh(), torch.nn.Linear(64, 24))  # place to tissue
    aligner = Aligner(24, 32)
    optimizer = torch.optim.Adam(aligner.parameters(), 3e-3)
    shown = torch.arange(TOKENS).expand(4, -1)

    def tokens(affine: Tensor, contrast: Tensor) -> Tensor:
        with torch.no_grad():
            world = transform(affine, token_centres(GRID, affine.device).expand(len(affine), -1, -1))
            return body((world - 30) / 10) + contrast

    def step(seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        own, other = affines(4, seed)
        contrast = torch.randn(4, 1, 24, generator=torch.Generator().manual_seed(seed)) * 0.3  # of a volume
        _, distance = position_bias(own, other, GRID)
        u, valid = correspondence(own, other, GRID, margin=0.0)
        attention = aligner(tokens(own, contrast), tokens(other, contrast))
        loss = -((place_targets(u, GRID, 0.5) * attention).sum(-1) * valid).sum() / valid.sum()
        return loss, place_figures(attention, shown, distance, valid)

    _, before = step(10_000)
    for seed in range(100):
        optimizer.zero_grad()
        step(seed)[0].backward()
        optimizer.step()
    _, after = step(10_000)
    assert before["align_distance"] > after["align_distance_same_place"] == before["align_distance_same_place"]
    assert after["align_distance"] < 0.6 * after["align_distance_same_place"]


def test_place_figures__are_distances_in_pitches_by_loops() -> None:
    random = torch.Generator().manual_seed(1)
    distance = torch.rand(2, 6, 6, generator=random)
    shown = torch.tensor([[1, 4, 5], [0, 2, 3]])
    attention = torch.rand(2, 3, 6, generator=random)
    asked = torch.tensor([[True, False, True], [True, True, False]])
    pointed, same = [], []
    for b in range(2):
        for v in range(3):
            if asked[b, v]:
                pointed.append(distance[b, shown[b, v], attention[b, v].argmax()])
                same.append(distance[b, shown[b, v], shown[b, v]])
    figures = place_figures(attention, shown, distance, asked)
    torch.testing.assert_close(figures["align_distance"], torch.stack(pointed).mean())
    torch.testing.assert_close(figures["align_distance_same_place"], torch.stack(same).mean())
    assert place_figures(attention, shown, distance, torch.zeros_like(asked))["align_distance"].isnan()
