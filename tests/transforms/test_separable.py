"""Matrix products along the axes read and smooth as the plain operations do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter1d

from agssd.transforms.separable import apply_separable, gaussian_matrix, interpolation_matrix, smooth


def test_interpolation_matrix__reads_like_numpy_interp_and_repeats_the_border():
    generator = torch.Generator().manual_seed(0)
    positions = torch.rand(3, 50, generator=generator) * 24 - 4  # below 0 and above 15 too
    signal = torch.rand(16, generator=generator)
    matrix = interpolation_matrix(positions, 16)
    wanted = np.interp(positions.numpy(), np.arange(16), signal.numpy())
    np.testing.assert_allclose((matrix @ signal).numpy(), wanted, atol=1e-5)
    torch.testing.assert_close(matrix.sum(-1), torch.ones(3, 50))


def test_interpolation_matrix__is_exact_at_voxel_centres_and_for_one_voxel():
    assert torch.equal(interpolation_matrix(torch.arange(5.0), 5), torch.eye(5))
    assert torch.equal(interpolation_matrix(torch.tensor([-2.0, 0.3, 9.0]), 1), torch.ones(3, 1))


def test_gaussian_matrix__smooths_like_scipy_inside_and_is_the_identity_at_zero():
    signal = np.random.default_rng(0).random(60)
    matrix = gaussian_matrix(torch.tensor([1.5, 0.0]), 60).double().numpy()
    inside = slice(12, -12)
    wanted = gaussian_filter1d(signal, 1.5, truncate=12.0)
    np.testing.assert_allclose((matrix[0] @ signal)[inside], wanted[inside], atol=1e-5)
    np.testing.assert_array_equal(matrix[1], np.eye(60))
    np.testing.assert_allclose(matrix.sum(-1), 1, atol=1e-6)


def test_apply_separable__equals_the_product_over_all_axes():
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(2, 3, 4, 5, 6, generator=generator)
    d, h, w = (torch.rand(2, 4, n, m, generator=generator) for n, m in ((7, 4), (3, 5), (2, 6)))
    wanted = torch.einsum("bcdhw,bvid,bvjh,bvkw->bvcijk", image, d, h, w)
    torch.testing.assert_close(apply_separable(image, (d, h, w)), wanted)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_smooth__spreads_an_impulse_by_its_own_width_per_sample_and_axis(axis):
    image = torch.zeros(2, 1, 41, 41, 41)
    image[:, :, 20, 20, 20] = 1
    sigma = torch.full((2, 3), 1.0)
    sigma[1] = 2.0
    sigma[1, axis] = 3.0
    out = smooth(image, sigma)[:, 0]
    torch.testing.assert_close(out.sum((1, 2, 3)), torch.ones(2), atol=1e-4, rtol=0)
    place = torch.arange(41.0) - 20
    for other in range(3):
        profile = out.sum([d + 1 for d in range(3) if d != other])
        spread = (profile * place**2).sum(-1).sqrt()
        torch.testing.assert_close(spread, torch.tensor([1.0, 3.0 if other == axis else 2.0]), atol=0.02, rtol=0)


@pytest.mark.parametrize("sigma", [0.0, 0.3, 1.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int16])
def test_apply_separable__bands_equal_the_whole_product(sigma, dtype):
    generator = torch.Generator().manual_seed(5)
    shape, sizes = (20, 31, 45), (17, 40, 33)
    image = torch.randint(-1000, 1000, (2, 2, *shape), generator=generator, dtype=torch.int16)
    image = image.to(dtype)
    matrices = []
    for length, n in zip(shape, sizes, strict=True):
        ends = torch.rand(2, 5, 2, generator=generator) * (length + 6) - 3  # some beyond the border, half of them flips
        ends[:, 0] = torch.tensor([0.0, n - 1.0])  # at voxel centres: one voxel of weight per position
        steps = torch.linspace(0, 1, n)
        positions = ends[..., :1] + steps * (ends[..., 1:] - ends[..., :1])
        blur = gaussian_matrix(torch.full((2, 5), sigma), length)
        matrices.append(interpolation_matrix(positions, length) @ blur)
    d, h, w = matrices
    wanted = torch.einsum("bcdhw,bvid,bvjh,bvkw->bvcijk", image.double(), d.double(), h.double(), w.double())
    found = apply_separable(image, (d, h, w))
    assert found.dtype == torch.float32
    assert (found - wanted).abs().max() < 1e-3  # of values up to 1000


def test_gaussian_matrix__has_no_subnormal_weights():
    matrix = gaussian_matrix(torch.tensor([0.2, 1.0, 3.0]), 96)  # products with those take a CPU ten times as long
    assert matrix[matrix != 0].min() >= torch.finfo(torch.float32).tiny
