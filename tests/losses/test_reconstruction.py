"""Reconstruction loss against plain NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from agssd.losses.reconstruction import STD_FLOOR, patch_l1, patch_mse, patch_scaling


def tensors(batch=4, tokens=6, voxels=27):
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, batch, tokens, voxels, generator=generator)
    weight = 1 + torch.rand(batch, tokens, voxels, generator=generator)
    used = torch.rand(batch, tokens, generator=generator) < 0.6
    return prediction, target, weight, used


def test_patch_l1__is_the_weighted_mean_per_sample_then_over_samples():
    prediction, target, weight, used = tensors()
    used[2] = False  # a sample without masked foreground counts as 0
    wanted = []
    for b in range(4):
        w = weight[b].double().numpy() * used[b].numpy()[:, None]
        error = np.abs(prediction[b].double().numpy() - target[b].double().numpy())
        wanted.append((w * error).sum() / w.sum() if w.sum() else 0.0)
    assert wanted[2] == 0
    assert patch_l1(prediction, target, weight, used).item() == pytest.approx(np.mean(wanted), rel=1e-5)


def test_patch_mse__is_the_mean_of_hidden_patches_per_sample_then_over_samples():
    prediction, target, _, used = tensors()
    used[2] = False
    wanted = []
    for b in range(4):
        error = (prediction[b].double().numpy() - target[b].double().numpy()) ** 2
        wanted.append(error[used[b].numpy()].mean() if used[b].any() else 0.0)
    assert patch_mse(prediction, target, used).item() == pytest.approx(np.mean(wanted), rel=1e-5)


def test_patch_l1__does_not_depend_on_the_cut_of_the_batch():
    parts = tensors()
    whole = patch_l1(*parts)
    cut = torch.stack([patch_l1(*(x[n : n + 1] for x in parts)) for n in range(4)]).mean()
    torch.testing.assert_close(cut, whole)


def test_patch_l1__unused_tokens_have_neither_value_nor_gradient():
    prediction, target, weight, used = tensors()
    prediction = prediction.requires_grad_()
    loss = patch_l1(prediction, target, weight, used)
    loss.backward()
    assert torch.equal(prediction.grad[~used], torch.zeros_like(prediction.grad[~used]))
    assert (prediction.grad[used] != 0).all()
    changed = torch.where(used[..., None], prediction.detach(), 1e6)
    torch.testing.assert_close(patch_l1(changed, target, weight, used), loss.detach())


def standardised(voxels, views):
    mean, scale = patch_scaling(voxels, views, standardise=True)
    return (voxels - mean) / scale


def test_patch_scaling__standardised_patches_have_mean_0_and_std_1():
    voxels = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0)) * 7 + 100
    out = standardised(voxels, voxels[:, None]).double().numpy()
    x = voxels.double().numpy()
    wanted = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    np.testing.assert_allclose(out, wanted, atol=1e-4)


def test_patch_scaling__the_floor_keeps_noise_small():
    noise = torch.randn(2, 1, 512, generator=torch.Generator().manual_seed(0)) * 0.01
    views = torch.randn(2, 1, 4096, generator=torch.Generator().manual_seed(1))
    views[1] *= 10
    out = standardised(100 + noise, views)  # floors 0.05 and 0.5
    torch.testing.assert_close(out.std((1, 2)), torch.tensor([0.2, 0.02]), rtol=0.05, atol=0)
    assert STD_FLOOR == 0.05
    flat = standardised(torch.full((1, 2, 8), 3.0), torch.full((1, 1, 8), 3.0))
    assert torch.equal(flat, torch.zeros(1, 2, 8))


def test_patch_scaling__without_standardising_changes_nothing():
    voxels = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    mean, scale = patch_scaling(voxels, voxels[:, None], standardise=False)
    assert torch.equal((voxels - mean) / scale, voxels)
