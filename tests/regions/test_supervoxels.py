"""Supervoxels on sets whose regions are known."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from agssd.regions.source import RegionCase
from agssd.regions.supervoxels import Supervoxels


def made(shape: tuple[int, ...], spacing: tuple[float, ...], size_mm: float, seed: int) -> tuple[NDArray, NDArray]:
    """Return known regions, cells of about ``size_mm`` around jittered points, and a noisy image of their levels."""
    rng = np.random.default_rng(seed)
    extent = [n * mm for n, mm in zip(shape, spacing, strict=True)]
    axes = [(np.arange(n) + 0.5) * mm for n, mm in zip(shape, spacing, strict=True)]
    voxels = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
    middles = np.meshgrid(*(np.arange(size_mm / 2, length, size_mm) for length in extent), indexing="ij")
    points = np.stack(middles, -1).reshape(-1, len(shape))
    points = points + rng.uniform(-0.15, 0.15, points.shape) * size_mm
    truth = ((voxels[..., None, :] - points) ** 2).sum(-1).argmin(-1) + 1
    parity = (np.indices(middles[0].shape).sum(0) % 2).reshape(-1)  # neighbours differ by at least 0.3
    levels = 0.1 + 0.55 * parity + rng.uniform(0, 0.25, len(points))
    image = levels[truth - 1] + rng.normal(0, 0.02, shape)
    return truth, image.clip(0, 1).astype(np.float32)


def rand_index(one: NDArray, two: NDArray) -> float:
    """Return the adjusted Rand index of two numberings of the same voxels (Hubert and Arabie 1985)."""

    def pairs(counts: NDArray) -> float:
        return float((counts * (counts - 1.0) / 2).sum())

    rows, columns = (np.unique(numbers, return_inverse=True)[1] for numbers in (one, two))
    table = np.zeros((rows.max() + 1, columns.max() + 1))
    np.add.at(table, (rows, columns), 1)
    together, of_one, of_two = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    chance = of_one * of_two / pairs(np.asarray([one.size]))
    return (together - chance) / ((of_one + of_two) / 2 - chance)


def case(
    image: NDArray,
    foreground: NDArray,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    spatial_dims: int = 3,
) -> RegionCase:
    return RegionCase("a", image[None], foreground, None, spacing, spatial_dims)


def ball(shape: tuple[int, ...]) -> NDArray:
    return sum(axis**2 for axis in np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")) < 1.6


@pytest.mark.parametrize(
    ("shape", "spacing"), [((36, 36, 36), (1.0, 1.0, 1.0)), ((12, 48, 48), (4.0, 1.0, 1.0)), ((40, 40, 20), (1, 1, 2))]
)
def test_supervoxels__recover_regions_of_their_size_in_mm(shape: tuple, spacing: tuple) -> None:
    truth, image = made(shape, spacing, 12.0, seed=0)
    foreground = ball(shape)
    found = Supervoxels(12.0, 0.5)(case(image, foreground, spacing))
    assert found.shape == shape and np.array_equal(found != 0, foreground)
    assert np.array_equal(np.unique(found[foreground]), np.arange(1, found.max() + 1))
    assert rand_index(truth[foreground], found[foreground]) > 0.6
    shuffled = np.random.default_rng(0).permutation(truth[foreground])
    assert abs(rand_index(shuffled, found[foreground])) < 0.05
    assert np.array_equal(found, Supervoxels(12.0, 0.5)(case(image, foreground, spacing)))


@pytest.mark.parametrize(("shape", "spacing"), [((48, 48, 48), (1.0, 1.0, 1.0)), ((12, 48, 48), (4.0, 1.0, 1.0))])
def test_supervoxels__small_ones_lie_each_in_one_region(shape: tuple, spacing: tuple) -> None:
    """Joined as the truth says, they are the truth; pieces that only distance makes are not."""
    truth, image = made(shape, spacing, 24.0, seed=1)
    foreground = ball(shape)
    scores = []
    for compactness in (0.1, 1000.0):
        found = Supervoxels(8.0, compactness)(case(image, foreground, spacing))[foreground]
        table = np.zeros((found.max() + 1, truth.max() + 1))
        np.add.at(table, (found, truth[foreground]), 1)
        scores.append(rand_index(truth[foreground], table.argmax(1)[found]))
    assert scores[0] > 0.9 and scores[0] > scores[1] + 0.05, scores


def test_supervoxels__of_frames_are_found_frame_by_frame() -> None:
    frames = [made((64, 80), (1.0, 1.0), 16.0, seed) for seed in (0, 1)]
    image = np.stack([image for _, image in frames])
    foreground = np.stack([ball((64, 80)), np.zeros((64, 80), dtype=bool)])
    foreground = np.concatenate([foreground, foreground[:1]])
    image = np.concatenate([image, image[:1]])
    found = Supervoxels(16.0)(case(image, foreground, spatial_dims=2))
    for index in (0, 2):
        inside = foreground[index]
        assert rand_index(frames[0][0][inside], found[index][inside]) > 0.7
    assert not found[1].any()
    assert found[2].max() == 2 * found[0].max() and found[2][foreground[2]].min() == found[0].max() + 1
    assert np.array_equal(found[2] != 0, found[0] != 0)


def test_supervoxels__spacing_is_seen() -> None:
    """In voxels twice as long, supervoxels of a size in mm are twice as many; their number is that of the volume."""
    rng = np.random.default_rng(0)
    image = rng.uniform(0, 1, (24, 48, 48)).astype(np.float32)
    foreground = np.ones(image.shape, dtype=bool)
    counts = [int(Supervoxels(8.0, 10.0)(case(image, foreground, (mm, 1.0, 1.0))).max()) for mm in (1.0, 2.0)]
    assert 1.5 < counts[1] / counts[0] < 2.5
    assert 0.5 < counts[1] / (48 * 48 * 48 / 8**3) < 2


def test_supervoxels__without_a_size_suit_the_case() -> None:
    """16 mm in large bodies; some 100 pieces in small ones, and in frames whatever their number of pixels."""
    rng = np.random.default_rng(0)

    def count(shape: tuple[int, int, int], mm: float, dims: int = 3, in_mm: bool = True) -> int:
        image = rng.uniform(0, 1, shape).astype(np.float32)
        one = replace(case(image, np.ones(shape, bool), (mm,) * 3, dims), in_mm=in_mm)
        return int(Supervoxels(compactness=10.0)(one).max())

    assert 0.5 < count((40, 40, 40), 4.0) / 10**3 < 2
    assert 50 < count((36, 50, 35), 1.0) < 200
    assert 50 < count((1, 90, 120), 0.5, 2) < 200
    for pixels in (100, 400):
        assert 50 < count((1, pixels, pixels), 1.0, 2, in_mm=False) < 200


@pytest.mark.parametrize("settings", [{"size_mm": 0.0}, {"compactness": -1.0}])
def test_supervoxels__impossible_settings_are_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match="both must be positive"):
        Supervoxels(**settings)


def test_supervoxels__a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage", None)
    empty = np.zeros((4, 4, 4), dtype=np.float32)
    with pytest.raises(ValueError, match=r'scikit-image.*pip install "agssd\[regions\]"'):
        Supervoxels()(case(empty, empty > 0))
