"""Edge maps measure slopes per mm of the object, not of the grid; scores equal plain NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_erosion
from torch._subclasses.fake_tensor import FakeTensorMode

from agssd.transforms.edges import (
    edge_magnitude,
    entropy_scores,
    foreground_share,
    normalise_edges,
    patch_scores,
    patches_of,
    region_boundaries,
    standardise,
    suppress_border,
)

MRI, CT = torch.tensor([False]), torch.tensor([True])


def world_mm(shape, spacing_mm):
    """(3, D, H, W) mm of the voxel centres, 0 in the middle of the volume."""
    axes = [(torch.arange(n) - (n - 1) / 2) * mm for n, mm in zip(shape, spacing_mm, strict=True)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


def soft_ball(shape, spacing_mm, radius_mm=12.0, width_mm=3.0, height=400.0):
    distance = world_mm(shape, spacing_mm).norm(dim=0) - radius_mm
    return (height * torch.sigmoid(-distance / width_mm))[None, None]


def test_edge_magnitude__of_a_ramp_is_its_slope_per_mm():
    spacing = (2.0, 0.7, 1.3)
    slope = torch.tensor([3.0, -4.0, 12.0])  # units per mm
    image = (world_mm((20, 30, 24), spacing) * slope[:, None, None, None]).sum(0)[None, None]
    magnitude = edge_magnitude(image, torch.tensor([spacing]), MRI)
    inside = magnitude[..., 6:-6, 10:-10, 8:-8]
    torch.testing.assert_close(inside, torch.full_like(inside, 13.0), rtol=1e-3, atol=0)


def test_edge_magnitude__of_the_same_object_does_not_depend_on_the_grid():
    fine = edge_magnitude(soft_ball((61, 61, 61), (0.8, 0.8, 0.8)), torch.tensor([[0.8] * 3]), MRI)
    spacing = (1.6, 0.8, 2.4)
    coarse = edge_magnitude(soft_ball((31, 61, 21), spacing), torch.tensor([spacing]), MRI)
    same_places = fine[:, :, ::2, :, ::3]  # 0.8 mm apart: every voxel of the coarse grid is one of the fine grid
    assert same_places.shape == coarse.shape
    inner = (slice(None), slice(None), slice(3, -3), slice(4, -4), slice(3, -3))
    assert (same_places - coarse)[inner].abs().max() < 0.12 * fine.max()
    assert coarse.max() == pytest.approx(fine.max().item(), rel=0.1)
    blind = edge_magnitude(soft_ball((31, 61, 21), spacing), torch.ones(1, 3), MRI)
    assert blind.max() > 1.5 * fine.max()  # what ignoring the spacing would give


def test_edge_magnitude__follows_flips_and_permutations_with_their_spacing():
    image = torch.rand(1, 2, 10, 12, 14, generator=torch.Generator().manual_seed(0)) * 500 - 300
    spacing = torch.tensor([[1.5, 0.8, 2.0]])
    for is_ct in (MRI, CT):
        reference = edge_magnitude(image, spacing, is_ct)
        for dims in ([2], [3], [4], [2, 3, 4]):
            torch.testing.assert_close(
                edge_magnitude(image.flip(dims), spacing, is_ct), reference.flip(dims), atol=1e-2, rtol=1e-4
            )
        turned = edge_magnitude(image.permute(0, 1, 4, 2, 3), spacing[:, [2, 0, 1]], is_ct)
        torch.testing.assert_close(turned, reference.permute(0, 1, 4, 2, 3), atol=1e-2, rtol=1e-4)


def step_image(low, high):
    image = torch.full((1, 1, 16, 16, 16), float(low))
    image[..., 8:] = high
    return image


def test_edge_magnitude__ct_hears_organs_over_bone_and_air():
    spacing = torch.ones(1, 3)
    liver = edge_magnitude(step_image(40, 110), spacing, CT).max()
    bone = edge_magnitude(step_image(40, 1000), spacing, CT).max()
    air = edge_magnitude(step_image(-1000, 40), spacing, CT).max()
    assert bone / liver < 960 / 70 / 1.9  # half of the wide window's slope at most, not 14 times the liver's
    # Soft tissue within the window: the full slope. Bone: the larger of the two windows.
    unwindowed = edge_magnitude(step_image(40, 110), spacing, MRI).max()
    torch.testing.assert_close(liver, unwindowed)
    torch.testing.assert_close(bone, 0.5 * edge_magnitude(step_image(40, 1000), spacing, MRI).max())
    torch.testing.assert_close(air, 0.5 * edge_magnitude(step_image(-1000, 40), spacing, MRI).max())
    # Beyond the wide window nothing counts: metal is not a stronger edge than dense bone.
    assert torch.equal(edge_magnitude(step_image(40, 3000), spacing, CT).max(), bone)
    # A weak step beside a window's end: the wide window alone sees it.
    lung = edge_magnitude(step_image(-900, -700), spacing, CT).max()
    torch.testing.assert_close(lung, 0.5 * edge_magnitude(step_image(-900, -700), spacing, MRI).max())


def test_edge_magnitude__mixed_batches_equal_their_parts():
    image = torch.rand(2, 1, 8, 8, 8, generator=torch.Generator().manual_seed(1)) * 2000 - 1000
    spacing = torch.tensor([[1.0, 1.0, 1.0], [2.0, 1.5, 1.0]])
    both = edge_magnitude(image, spacing, torch.tensor([True, False]))
    torch.testing.assert_close(both[:1], edge_magnitude(image[:1], spacing[:1], CT))
    torch.testing.assert_close(both[1:], edge_magnitude(image[1:], spacing[1:], MRI))


@pytest.mark.parametrize("shape", [(2, 5, 9), (7, 2, 4), (6, 5)])
def test_edge_magnitude__is_the_norm_of_differences_to_the_border_and_on_axes_of_two_voxels(shape):
    image = torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(1)) * 100
    spacing = torch.tensor([[2.0, 0.5, 3.0], [1.0, 4.0, 0.7]])[:, : len(shape)] * 100  # which smooths nothing
    slopes = torch.gradient(image, dim=tuple(range(2, image.ndim)))
    ones = [1] * len(shape)
    wanted = sum((slope / spacing[:, axis].view(2, 1, *ones)) ** 2 for axis, slope in enumerate(slopes)).sqrt()
    torch.testing.assert_close(edge_magnitude(image, spacing, MRI.expand(2)), wanted, rtol=1e-4, atol=1e-6)


def test_suppress_border__of_several_channels_and_of_bytes_is_that_of_each():
    magnitude = torch.rand(2, 3, 9, 10, 11, generator=torch.Generator().manual_seed(2))
    foreground = torch.zeros(2, 1, 9, 10, 11, dtype=torch.bool)
    foreground[..., 1:8, 2:] = True
    out = suppress_border(magnitude, foreground)
    assert torch.equal(out, suppress_border(magnitude, foreground.to(torch.uint8)))
    assert torch.equal(out, torch.cat([suppress_border(one, foreground) for one in magnitude.split(1, 1)], 1))


def test_suppress_border__keeps_inside_quarters_the_rim_and_drops_outside():
    grid = world_mm((20, 22, 24), (1.0, 1.0, 1.0))
    foreground = (grid[0] ** 2 + grid[1] ** 2 + grid[2] ** 2) < 81
    out = suppress_border(torch.ones(1, 1, 20, 22, 24), foreground[None, None])[0, 0].numpy()
    body = foreground.numpy()
    inner = binary_erosion(body, np.ones((5, 5, 5)))
    np.testing.assert_array_equal(out, np.where(inner, 1.0, np.where(body, 0.25, 0.0)).astype(np.float32))
    assert inner.any() and (body & ~inner).any()


def test_suppress_border__the_edge_of_a_view_is_not_a_border_of_the_body():
    whole = torch.ones(1, 1, 8, 8, 8)
    assert torch.equal(suppress_border(whole, whole.bool()), whole)


def test_suppress_border__silences_padding():
    spacing = torch.ones(1, 3)
    image = torch.full((1, 1, 24, 24, 24), 300.0)
    image[..., :8] = 0  # padding by us: foreground False
    foreground = torch.ones(1, 1, 24, 24, 24, dtype=torch.bool)
    foreground[..., :8] = False
    magnitude = edge_magnitude(image, spacing, MRI)
    kept = suppress_border(magnitude, foreground)
    assert kept[..., :8].abs().max() == 0
    assert kept.max() <= 0.25 * magnitude.max()


@pytest.mark.parametrize("patch", [(1, 1, 1), (3, 1, 1), (4, 2, 5)])
def test_patch_scores__on_fake_and_on_real_tensors_are_those_of_topk(patch):
    edges = torch.rand(3, 2, 12, 8, 10, generator=torch.Generator().manual_seed(3))
    voxels = patches_of(edges.amax(1, keepdim=True), patch)
    wanted = voxels.topk(max(1, voxels.shape[-1] // 4), -1).values.mean(-1)
    torch.testing.assert_close(patch_scores(edges, patch), wanted)
    with FakeTensorMode() as mode:  # by which `agssd plan` works out memory
        assert patch_scores(mode.from_tensor(edges), patch).shape == wanted.shape


def test_normalise_edges__is_the_root_of_the_share_of_q99():
    magnitude = torch.tensor([0.0, 1.0, 4.0, 16.0, 100.0]).reshape(1, 1, 1, 1, 5)
    out = normalise_edges(magnitude, torch.tensor([[16.0]])).flatten()
    torch.testing.assert_close(out, torch.tensor([0.0, 0.25, 0.5, 1.0, 1.0]))


def test_normalise_edges__a_flat_volume_has_no_edges_and_no_nan():
    magnitude = torch.rand(2, 1, 4, 4, 4)
    out = normalise_edges(magnitude, torch.tensor([[0.0], [1.0]]))
    assert torch.equal(out[0], torch.zeros(1, 4, 4, 4)) and (out[1] > 0).any()
    scores = standardise(patch_scores(out, (2, 2, 2)), torch.ones(2, 8, dtype=torch.bool))
    assert torch.equal(scores[0], torch.zeros(8))


def blocks(volume, patch):
    """Patches of a NumPy volume (D, H, W) in raster order, by slicing."""
    d, h, w = (n // p for n, p in zip(volume.shape, patch, strict=True))
    p, q, r = patch
    return [
        volume[i * p : (i + 1) * p, j * q : (j + 1) * q, k * r : (k + 1) * r]
        for i in range(d)
        for j in range(h)
        for k in range(w)
    ]


def test_patches_of__are_in_raster_order_voxels_then_channels():
    image = torch.rand(2, 3, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    got = patches_of(image, (2, 3, 4)).reshape(2, 8, 24, 3)
    for b in range(2):
        for c in range(3):
            wanted = np.stack([block.ravel() for block in blocks(image[b, c].numpy(), (2, 3, 4))])
            np.testing.assert_array_equal(got[b, :, :, c].numpy(), wanted)


def test_patch_scores__is_the_mean_of_the_strongest_quarter_over_channels():
    edges = torch.rand(2, 2, 8, 8, 12, generator=torch.Generator().manual_seed(0))
    got = patch_scores(edges, (4, 4, 4))
    for b in range(2):
        strongest = edges[b].numpy().max(0)
        wanted = [np.sort(block.ravel())[-16:].mean() for block in blocks(strongest, (4, 4, 4))]
        np.testing.assert_allclose(got[b].numpy(), wanted, rtol=1e-5)


def test_entropy_scores__equals_numpy_histograms():
    image = torch.randn(2, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0)) * 100
    image[0, 0, :4, :4, :4] = 17.0  # a homogeneous patch
    got = entropy_scores(image, (4, 4, 4))
    for b in range(2):
        view = image[b, 0].numpy()
        unit = (view - view.min()) / (view.max() - view.min())
        wanted = []
        for block in blocks(unit, (4, 4, 4)):
            share = np.bincount(np.minimum((block.ravel() * np.float32(32)).astype(int), 31), minlength=32) / 64
            wanted.append(-sum(s * np.log(s) for s in share if s > 0))
        np.testing.assert_allclose(got[b].numpy(), wanted, atol=1e-5)
    assert got[0, 0] == 0 and got[0, 1:].min() > 1
    assert torch.equal(entropy_scores(torch.full((1, 1, 8, 8, 8), 3.0), (4, 4, 4)), torch.zeros(1, 8))


def test_entropy_scores__of_equally_frequent_intensities_is_the_log_of_their_number():
    image = torch.zeros(1, 1, 4, 4, 16)
    for patch, levels in enumerate((1, 2, 8, 32)):
        values = (torch.arange(64) % levels) / 31  # one per bin: 0 and 1 are the ends of the range
        shuffled = values[torch.randperm(64, generator=torch.Generator().manual_seed(patch))]
        image[..., 4 * patch : 4 * patch + 4] = shuffled.reshape(4, 4, 4)
    wanted = torch.tensor([[1.0, 2.0, 8.0, 32.0]]).log()
    torch.testing.assert_close(entropy_scores(image, (4, 4, 4)), wanted)
    torch.testing.assert_close(entropy_scores(1000 * image - 300, (4, 4, 4)), wanted, atol=0.1, rtol=0)  # any unit


def test_foreground_share__counts_body_voxels():
    foreground = torch.rand(1, 1, 8, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.3
    wanted = [block.mean() for block in blocks(foreground[0, 0].numpy(), (4, 4, 2))]
    np.testing.assert_allclose(foreground_share(foreground, (4, 4, 2))[0].numpy(), wanted, rtol=1e-6)


def test_standardise__over_eligible_patches_only():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(3, 40, generator=generator)
    eligible = torch.rand(3, 40, generator=generator) < 0.6
    eligible[2] = False
    scores[1] = 0.7
    z = standardise(scores, eligible)
    chosen = scores[0, eligible[0]].double().numpy()
    np.testing.assert_allclose(z[0].numpy(), (scores[0].numpy() - chosen.mean()) / chosen.std(), rtol=1e-4, atol=1e-5)
    assert torch.equal(z[1:], torch.zeros(2, 40))


# ------------------------------------------------------------------ boundaries of regions


def half_spaces(shape, spacing_mm, direction):
    """Two regions on either side of a plane through the middle, and the distance of every voxel from it in mm."""
    normal = torch.tensor(direction) / torch.tensor(direction).norm()
    distance = (world_mm(shape, spacing_mm) * normal[:, None, None, None]).sum(0) + 0.013
    return torch.where(distance < 0, 7, 3).int()[None, None], distance


@pytest.mark.parametrize("spacing", [(0.5, 0.5, 0.5), (0.4, 0.7, 0.55)])
@pytest.mark.parametrize("direction", [(1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (1.0, 1.0, 0.0), (1.0, 2.0, -1.5)])
def test_region_boundaries__fall_with_the_distance_in_mm_whichever_way_they_run(spacing, direction):
    regions, distance = half_spaces((40, 36, 40), spacing, direction)
    found = region_boundaries(regions, torch.tensor([spacing]))[0, 0]
    inner = (slice(8, -8),) * 3
    wanted = 1 - torch.exp(-torch.exp(-(distance**2) / 2))
    assert (found - wanted)[inner].abs().max() < 0.1
    assert abs(float((found - wanted)[inner].mean())) < 0.01
    if len(set(spacing)) > 1:
        blind = region_boundaries(regions, torch.ones(1, 3))[0, 0]
        assert (blind - wanted)[inner].abs().max() > 0.15


def test_region_boundaries__follow_flips_permutations_and_other_numbers():
    generator = torch.Generator().manual_seed(0)
    regions = torch.randint(0, 3, (2, 1, 2, 3, 4), generator=generator).int()
    for dim in (2, 3, 4):
        regions = regions.repeat_interleave(6, dim)
    spacing = torch.tensor([[1.5, 0.8, 2.0], [0.5, 1.0, 3.0]])
    reference = region_boundaries(regions, spacing)
    assert reference.min() >= 0 and reference.max() <= 1 and reference.std() > 0.05
    for dims in ([2], [3], [4], [2, 3, 4]):
        torch.testing.assert_close(region_boundaries(regions.flip(dims), spacing), reference.flip(dims))
    turned = region_boundaries(regions.permute(0, 1, 4, 2, 3), spacing[:, [2, 0, 1]])
    torch.testing.assert_close(turned, reference.permute(0, 1, 4, 2, 3))
    renamed = torch.tensor([900, 2**31 - 1, 5], dtype=torch.int32)[regions.long()]
    assert torch.equal(region_boundaries(renamed, spacing), reference)
    for b in range(2):
        assert torch.equal(region_boundaries(regions[b : b + 1], spacing[b : b + 1]), reference[b : b + 1])
    flat = region_boundaries(torch.full((1, 1, 8, 8), 4), torch.ones(1, 2))
    assert torch.equal(flat, torch.zeros(1, 1, 8, 8))


def test_region_boundaries__are_stronger_where_more_of_them_meet():
    numbers = torch.zeros(1, 1, 24, 24, 24, dtype=torch.int32)
    for dim, value in ((2, 1), (3, 2), (4, 4)):
        numbers += value * (torch.arange(24) >= 12).view([-1 if d == dim else 1 for d in range(5)])
    found = region_boundaries(numbers, torch.full((1, 3), 0.5))[0, 0]
    plane, line, corner = found[12, 3, 3], found[12, 12, 3], found[12, 12, 12]
    assert 0.55 < plane < 0.65 and plane + 0.08 < line < corner - 0.04 and corner < 1
