"""Corruptions keep what they must keep, change what they say, and do not hang on the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from agssd.transforms.corruption import Corruption, bezier_intensity, paint, shuffle_windows
from agssd.transforms.keyed_random import KeyedRandom


def keyed(count: int, seed: int = 0) -> KeyedRandom:
    return KeyedRandom(seed, torch.arange(count), "test")


def images(count: int, size: tuple[int, int, int] = (24, 32, 20), channels: int = 1) -> Tensor:
    return torch.rand(count, channels, *size, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------ shuffling


def test_shuffle_windows__moves_voxels_within_small_windows_and_keeps_all_of_them() -> None:
    size = (40, 60, 50)
    places = torch.stack(torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in size), indexing="ij"))
    moved = shuffle_windows(places.expand(6, -1, -1, -1, -1).clone(), keyed(6))
    flat = (moved[:, 0] * size[1] + moved[:, 1]) * size[2] + moved[:, 2]
    assert all(torch.equal(row.flatten().sort().values, torch.arange(row.numel()).float()) for row in flat)
    for axis, largest in enumerate((4, 6, 5)):
        step = (moved[:, axis] - places[axis]).abs().amax((1, 2, 3))
        assert step.max() == largest - 1 and step.min() >= 1  # windows of 2 to a tenth of the axis
    stayed = (moved == places).all(1).float().mean((1, 2, 3))
    # 16 % of the windows are left, and of n voxels in random order one stays on average.
    assert (stayed > 0.14).all() and (stayed < 0.16 + 0.84 / 8 + 0.03).all()


def test_shuffle_windows__is_uniform_within_a_window() -> None:
    # 2 x 2 x 2 windows: each voxel of a shuffled one comes from each of its 8 places equally often.
    image = torch.arange(8.0).view(1, 1, 2, 2, 2).expand(8000, -1, -1, -1, -1)
    moved = shuffle_windows(image, keyed(8000), share=1.0)
    whole = (moved.flatten(1).sort(1).values == torch.arange(8.0)).all(1)
    assert whole.all()
    cells = moved.flatten(1).long()
    counts = torch.stack([torch.bincount(cells[:, n], minlength=8) for n in range(8)]).float() / 8000
    # Shifted tilings cut the cube, so voxels stay more often than they would by chance; places are symmetric.
    off = counts[~torch.eye(8, dtype=torch.bool)]
    assert (counts.diagonal() - counts.diagonal().mean()).abs().max() < 0.03 and off.min() > 0.01


@pytest.mark.parametrize("size", [(8, 8, 8), (4, 24, 24), (1, 16, 16)])
def test_corruption__small_and_flat_views_are_corrupted_too(size: tuple[int, int, int]) -> None:
    # Defect of the released code: axes below 10 voxels ask for a window edge between 1 and 0, and it stops.
    views = images(8, size)[:, None] * 2 - 1
    given = Corruption(1.0, 1.0, False, 1.0, 0.5)(views, torch.zeros(8, dtype=torch.bool), 0, torch.arange(8))
    assert given.shape == views.shape and given.isfinite().all()
    assert ((given != views).flatten(1).float().mean(1) > 0.05).all()
    shuffled = shuffle_windows(views[:, 0], keyed(8))
    assert (shuffled != views[:, 0]).flatten(1).any(1).all()


# ------------------------------------------------------------------ intensities


def test_bezier_intensity__equals_the_curve_evaluated_point_by_point() -> None:
    unit = images(5)
    given = bezier_intensity(unit, keyed(5), prob_invert=0.0)
    inverted = bezier_intensity(unit, keyed(5), prob_invert=1.0)
    controls = keyed(5).uniform(2, 2).double().numpy()
    t = np.linspace(0, 1, 100_001)
    for b in range(5):
        points = np.array([[0, 0], *controls[b], [1, 1]])
        basis = np.stack([(1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3], 1)
        x, y = (basis @ points).T
        assert (np.diff(x) >= 0).all()
        values = unit[b].double().numpy()
        np.testing.assert_allclose(given[b].numpy(), np.interp(values, x, y), atol=3e-3)
        np.testing.assert_allclose(inverted[b].numpy(), np.interp(values, x, y[::-1]), atol=3e-3)
    ends = bezier_intensity(torch.tensor([0.0, 1.0]).view(1, 1, 1, 1, 2), keyed(1), 0.0)
    torch.testing.assert_close(ends.flatten(), torch.tensor([0.0, 1.0]))


def test_corruption__curves_span_the_range_of_each_modality_and_invert_no_ct_unless_asked() -> None:
    # Defects of the family: the curve is defined on [0, 1], and intensities in [-1, 1] lose their lower half; half of
    # the curves turn air into bone, which no Hounsfield unit allows.
    ramp = torch.linspace(0, 1, 512).view(1, 1, 1, 8, 8, 8).expand(40, -1, -1, -1, -1, -1)
    curve_alone = Corruption(0.0, 1.0, False, 0.0)
    sample = torch.arange(40)
    mri = curve_alone(ramp * 2 - 1, torch.zeros(40, dtype=torch.bool), 0, sample).flatten(1)
    steps = mri.diff(dim=1)
    assert ((steps >= -1e-6).all(1) | (steps <= 1e-6).all(1)).all()
    ends = torch.stack([mri[:, 0], mri[:, -1]], 1).sort(1).values
    torch.testing.assert_close(ends, torch.tensor([-1.0, 1.0]).expand(40, 2))
    assert mri.min() >= -1 and mri.max() <= 1 and (steps.abs() > 1e-6).float().mean() > 0.95
    falling = (steps[:, 0] < 0) | (steps[:, -1] < 0)
    assert 8 < int(falling.sum()) < 32
    ct = torch.ones(40, dtype=torch.bool)
    rising = curve_alone(ramp, ct, 0, sample).flatten(1)
    assert (rising.diff(dim=1) >= -1e-6).all()
    torch.testing.assert_close(rising[:, [0, -1]], torch.tensor([0.0, 1.0]).expand(40, 2))
    assert ((rising - ramp.flatten(1)).abs().amax(1) > 0.02).float().mean() > 0.7, "CT keeps its intensities"
    inverting = Corruption(0.0, 1.0, True, 0.0)(ramp, ct, 0, sample).flatten(1)
    torch.testing.assert_close(inverting * 2 - 1, mri, atol=1e-5, rtol=0)  # with the flag as MRI


# ------------------------------------------------------------------ painting


@pytest.mark.parametrize(("prob_out", "low", "high"), [(0.0, 1 / 6, 1 / 3), (1.0, 3 / 7, 4 / 7)])
def test_paint__covers_boxes_of_the_stated_size(prob_out: float, low: float, high: float) -> None:
    size = (42, 84, 42)
    unit = torch.full((60, 1, *size), 2.0)  # outside [0, 1], so that noise can be told from it
    given = paint(unit, keyed(60), prob_out)
    noise = given != 2
    assert given[noise].min() > 0 and given[noise].max() < 1
    boxes = (noise if prob_out == 0 else ~noise)[:, 0]
    share = boxes.float().mean((1, 2, 3))
    assert (share >= low**3 * 0.85).all() and (share <= 5 * high**3 * 1.1).all()
    for axis, length in enumerate(size):
        along = boxes.any(3 if axis != 2 else 1).any(2 if axis == 0 else 1)  # (60, length)
        assert along.sum(1).min() >= round(low * length)
    assert len(share.unique()) > 50


def test_corruption__does_not_hang_on_how_the_batch_is_cut() -> None:
    views = torch.stack([images(6, (16, 16, 16)), images(6, (16, 16, 16)).flip(0)], 1) * 2 - 1
    ct = torch.tensor([False, True] * 3)
    views = torch.where(ct.view(6, 1, 1, 1, 1, 1), views / 2 + 0.5, views)
    corrupt, sample = Corruption(), torch.arange(10, 16)
    whole = corrupt(views, ct, 0, sample)
    parts = [corrupt(views[i : i + 1], ct[i : i + 1], 0, sample[i : i + 1]) for i in range(6)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(corrupt(views, ct, 1, sample), whole)
    assert not torch.equal(whole[:, 0] != views[:, 0], whole[:, 1] != views[:, 1])
