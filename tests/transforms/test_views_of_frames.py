"""Frames (B, C, H, W): what holds for volumes holds for them, by the same code."""

from __future__ import annotations

import math

import pytest
import torch

from agssd.geometry import (
    correspondence,
    mutual_neighbours,
    overlap_grid,
    rotation_matrices,
    sample_tokens,
    signed_permutations,
    token_centres,
    transform,
    view_affine,
)
from agssd.transforms.corruption import Corruption, shuffle_windows
from agssd.transforms.crops import OverlapCrops, box_share, extract
from agssd.transforms.edges import edge_magnitude, patches_of, suppress_border, unpatch
from agssd.transforms.intensity import Appearance
from agssd.transforms.keyed_random import KeyedRandom
from agssd.transforms.masking import MaskSampler, draw_masks, mask_counts
from agssd.transforms.separable import apply_separable
from agssd.transforms.views import body_of, make_views, mask_views, panel_of, pick

GRID, PATCH, SIZE = (4, 6), (8, 8), (32, 48)


def frames(count: int = 6, shape: tuple[int, int] = (70, 90), seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch of parent frames as the data module delivers it."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(count, 1, *shape, generator=generator) * 255
    return {
        "image": image.round().to(torch.int16),
        "foreground": torch.ones(count, 1, *shape, dtype=torch.uint8),
        "scale": torch.ones(count, 1),
        "offset": torch.zeros(count, 1),
        "low": torch.zeros(count, 1),
        "high": torch.full((count, 1), 255.0),
        "edge_q99": torch.full((count, 1), 60.0),
        "is_ct": torch.zeros(count, dtype=torch.bool),
        "spacing_mm": torch.tensor([[0.3, 0.2]]).expand(count, -1),
        "centre_mm": torch.zeros(count, 2),
        "sample": torch.arange(count),
        "case": torch.arange(count),
        "broken": torch.full((count, 4), -1),
        "regions": (1 + torch.arange(shape[0] * shape[1]) // 900).view(1, 1, *shape).expand(count, -1, -1, -1).int(),
    }


def crops(**changes) -> OverlapCrops:
    settings = {"scale": (0.5, 1.1), "num_local": 3, "local_size_vox": (16, 16), "prob_flip": (0.5, 0.5)}
    return OverlapCrops(SIZE, **(settings | changes))


def test_signed_permutations__are_the_eight_symmetries_of_the_square_flips_first():
    table = signed_permutations(dims=2)
    assert len({tuple(m.flatten().tolist()) for m in table}) == 8
    assert torch.equal(table.mT @ table, torch.eye(2).expand(8, 2, 2))
    for index, matrix in enumerate(table[:4]):
        assert torch.equal(matrix, torch.diag(torch.tensor([-1.0 if index & bit else 1.0 for bit in (2, 1)])))


def test_rotation_matrices__turn_h_towards_w_by_the_angle():
    angle = torch.tensor([[0.3]])
    turned = rotation_matrices(angle)[0] @ torch.tensor([1.0, 0.0])
    torch.testing.assert_close(turned, torch.tensor([math.cos(0.3), math.sin(0.3)]))


def test_correspondence__reads_exact_coordinates_for_every_pair_of_orientations():
    pairs = torch.cartesian_prod(torch.arange(8), torch.arange(8))
    generator = torch.Generator().manual_seed(1)
    table = signed_permutations(dims=2).double()
    grid = (6, 6)
    affine_a, affine_b = (
        view_affine(
            0.5 + 0.1 * torch.rand(64, 2, generator=generator).double(),
            0.4 + 0.2 * torch.rand(64, 2, generator=generator).double(),
            table[pairs[:, side]],
        )
        for side in (0, 1)
    )
    centres = token_centres(grid).double()
    places = transform(affine_b, centres.expand(64, -1, -1))  # of B's tokens in the parent
    u, valid = correspondence(affine_a.float(), affine_b.float(), grid)
    read = sample_tokens(places.float(), grid, u)
    truth = transform(affine_a, centres.expand(64, -1, -1)).float()
    assert 0.2 < valid.float().mean() < 0.9
    torch.testing.assert_close(read[valid], truth[valid], atol=1e-5, rtol=0)


def test_mutual_neighbours__are_the_nearest_tokens_in_the_parent():
    generator = torch.Generator().manual_seed(2)
    table = signed_permutations(dims=2)
    affine_a, affine_b = (
        view_affine(20 + 4 * torch.rand(8, 2, generator=generator), torch.full((8, 2), 16.0), table[torch.arange(8)])
        for _ in (0, 1)
    )
    partner, mutual, inside = mutual_neighbours(affine_a, affine_b, GRID)
    centres = token_centres(GRID)
    distance = torch.cdist(
        transform(affine_a, centres.expand(8, -1, -1)), transform(affine_b, centres.expand(8, -1, -1))
    )
    found = distance.gather(2, partner[..., None])[..., 0]
    torch.testing.assert_close(found[mutual], distance.amin(2)[mutual], atol=1e-4, rtol=0)
    assert mutual.any()
    assert not (mutual & ~inside).any()


def test_overlap_grid__shows_the_same_places_in_both_views():
    batch = frames()
    views = crops().sample(batch["foreground"], batch["sample"], 3)
    affine_a, affine_b = views.globals.affine.unbind(1)
    in_a, in_b = overlap_grid(affine_a, affine_b, views.overlap_box - 0.5, 3)
    assert in_a.shape == (6, 9, 2)
    assert (in_a.abs() <= 1 + 1e-4).all()
    torch.testing.assert_close(transform(affine_a, in_a), transform(affine_b, in_b), atol=1e-3, rtol=0)


def test_sample__overlap_is_never_below_its_target_and_boxes_are_what_affines_say():
    batch = frames(200)
    views = crops(scale=(0.4, 0.9)).sample(batch["foreground"], batch["sample"], 5)
    assert (views.overlap >= views.target_overlap - 1e-4).all()
    centre, edge = views.globals.centre, views.globals.edge
    low, high = (centre - edge / 2).amax(1), (centre + edge / 2).amin(1)
    torch.testing.assert_close(views.overlap_box, torch.stack([low, high], -1))
    assert (centre - edge / 2 >= -1e-3).all() and (centre + edge / 2 <= torch.tensor([70.0, 90.0]) + 1e-3).all()
    assert views.globals.affine.shape == (200, 2, 3, 3)


def test_box_share__equals_counting():
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(2, 1, 20, 30, generator=generator) < 0.4
    low = torch.tensor([[[0.0, 0.0], [3.0, 7.0]], [[10.0, 2.0], [0.0, 29.0]]])
    high = torch.tensor([[[20.0, 30.0], [9.0, 20.0]], [[11.0, 3.0], [20.0, 30.0]]])
    share = box_share(mask, low, high)
    for b in range(2):
        for t in range(2):
            (y0, x0), (y1, x1) = low[b, t].int().tolist(), high[b, t].int().tolist()
            assert share[b, t].item() == pytest.approx(mask[b, 0, y0:y1, x0:x1].float().mean().item())


@pytest.mark.parametrize("orientations", ["flips", "none", "all"])
def test_extract__matrix_products_equal_grid_sample(orientations):
    size = (32, 32) if orientations == "all" else SIZE
    sampler = OverlapCrops(size, (0.5, 1.6), num_local=0, local_size_vox=(16, 16), orientations=orientations,
                           prob_flip=(0.5, 0.5))  # fmt: skip
    batch = frames(16)
    views = sampler.sample(batch["foreground"], batch["sample"], 0).globals
    parent = batch["image"].float() / 255
    products, sampled = (extract(parent, views, size, separable) for separable in (True, False))
    assert products.shape == (16, 2, 1, *size)
    torch.testing.assert_close(products, sampled, atol=2e-5, rtol=0)


def test_extract__coordinates_follow_the_affine_with_rotation():
    batch = frames()
    rows, columns = torch.meshgrid(torch.arange(70.0), torch.arange(90.0), indexing="ij")
    parent = torch.stack([rows, columns]).expand(6, -1, -1, -1)
    views = crops(scale=(0.3, 0.5), rotation_deg=10.0).sample(batch["foreground"], batch["sample"], 1).globals
    cut = extract(parent, views, SIZE).flatten(3).mT  # (B, 2, N, 2)
    truth = transform(views.affine, token_centres(SIZE).expand(6, 2, -1, -1))
    inside = ((truth > 2) & (truth < torch.tensor([67.0, 87.0]))).all(-1)
    torch.testing.assert_close(cut[inside], truth[inside], atol=2e-3, rtol=0)


def test_apply_separable__equals_einsum_and_a_slab_of_one_slice():
    generator = torch.Generator().manual_seed(4)
    image = torch.rand(2, 3, 12, 20, generator=generator)
    rows, columns = (torch.rand(2, 4, out, size, generator=generator) for out, size in ((5, 12), (70, 20)))
    found = apply_separable(image, (rows, columns))
    torch.testing.assert_close(found, torch.einsum("bchw,bvih,bvjw->bvcij", image, rows, columns))
    ones = torch.ones(2, 4, 1, 1)
    torch.testing.assert_close(found, apply_separable(image[:, :, None], (ones, rows, columns))[:, :, :, 0])


def test_edges__are_those_of_a_volume_that_repeats_the_frame():
    generator = torch.Generator().manual_seed(5)
    image = torch.rand(2, 1, 24, 30, generator=generator)
    spacing = torch.tensor([[0.7, 1.2], [1.0, 0.4]])
    is_ct = torch.tensor([False, False])
    volume = image[:, :, None].expand(-1, -1, 9, -1, -1)
    in_volume = edge_magnitude(volume, torch.cat([torch.ones(2, 1), spacing], 1), is_ct)[:, :, 4]
    torch.testing.assert_close(edge_magnitude(image, spacing, is_ct), in_volume, atol=1e-5, rtol=1e-4)


def test_suppress_border__leaves_a_quarter_within_two_voxels_of_the_outline():
    body = torch.zeros(1, 1, 20, 20, dtype=torch.bool)
    body[..., 4:16, 4:16] = True
    kept = suppress_border(torch.ones(1, 1, 20, 20), body)[0, 0]
    assert (kept[6:14, 6:14] == 1).all()
    assert kept[5, 10] == kept[10, 5] == kept[4, 4] == 0.25
    assert (kept[~body[0, 0]] == 0).all()


def test_unpatch__undoes_patches_which_are_in_raster_order():
    image = torch.arange(2 * 2 * 32 * 48.0).view(2, 2, *SIZE)
    patches = patches_of(image, PATCH)
    assert patches.shape == (2, 24, 128)
    assert torch.equal(patches[0, 7].view(8, 8, 2)[..., 1], image[0, 1, 8:16, 8:16])
    assert torch.equal(unpatch(patches, GRID, PATCH), image)


@pytest.mark.parametrize("block", [1, 2])
def test_draw_masks__count_is_exact_and_blocks_are_squares(block):
    generator = torch.Generator().manual_seed(6)
    scores, body = torch.randn(50, 24, generator=generator), torch.rand(50, 24, generator=generator) < 0.8
    ratio = 0.2 + 0.6 * torch.rand(50, generator=generator)
    mask = draw_masks(scores, body, GRID, ratio, 0.5, 1.0, 0.1, KeyedRandom(0, torch.arange(50), "mask"), block)
    assert torch.equal(mask.flatten(1).sum(1), mask_counts(ratio, GRID, block) * block**2)
    if block == 2:
        squares = mask.unflatten(2, (3, 2)).unflatten(1, (2, 2))
        assert (squares.float().mean((2, 4)) % 1 == 0).all()


@pytest.mark.parametrize("score", ["edge", "region", "entropy", "block", "random"])
def test_mask_views__hides_what_the_score_prefers_with_exact_counts(score):
    batch = frames(12)
    views = make_views(batch, crops(), Appearance(), 0, with_edges=True)
    sampler = MaskSampler(GRID, PATCH, score)
    body = body_of(pick(views.foreground, views.hidden_view), PATCH)
    mask, ratio = mask_views(views, views.hidden_view, body, sampler, (0.3, 0.6), 0, 0.5)
    assert mask.shape == (12, *GRID)
    assert torch.equal(mask.flatten(1).sum(1), mask_counts(ratio, GRID, 1))


def test_make_views__do_not_depend_on_the_batch_and_say_their_spacing():
    batch = frames()
    together = make_views(batch, crops(), Appearance(1, 1.2, 1, 1, 1.0, 1, 0.05, 1), 7, with_edges=True)
    alone = make_views(
        {name: value[2:3] for name, value in batch.items()}, crops(), Appearance(1, 1.2, 1, 1, 1.0, 1, 0.05, 1), 7,
        with_edges=True,
    )  # fmt: skip
    for name in ("clean", "inputs", "locals", "edges"):
        assert torch.equal(getattr(alone, name)[0], getattr(together, name)[2]), name
    assert together.inputs.shape == (6, 2, 1, *SIZE)
    assert not torch.equal(together.inputs, together.clean)
    wanted = together.geometry.globals.edge * torch.tensor([0.3, 0.2]) / torch.tensor(SIZE)
    torch.testing.assert_close(together.spacing_mm, wanted)  # flips leave the axes where they are
    panel = panel_of(together, 1)
    assert panel["clean"].shape == (2, *SIZE) and panel["overlap_box"].shape == (2, 2, 2)


def test_corruption__shuffles_windows_and_keeps_all_values():
    generator = torch.Generator().manual_seed(8)
    image = torch.rand(3, 1, 40, 60, generator=generator)
    shuffled = shuffle_windows(image, KeyedRandom(0, torch.arange(3), "shuffle"))
    assert torch.equal(shuffled.flatten(1).sort(1).values, image.flatten(1).sort(1).values)
    assert 0.4 < (shuffled != image).float().mean() < 0.95
    views = image[:, None] * 2 - 1
    corrupted = Corruption(1, 1, False, 1, 0.5)(views, torch.zeros(3, dtype=torch.bool), 0, torch.arange(3))
    assert corrupted.shape == views.shape and corrupted.min() >= -1 and corrupted.max() <= 1


def test_overlap_crops__refuse_sizes_of_different_numbers_of_axes():
    with pytest.raises(ValueError, match="views.local_size_vox .* give 2 numbers"):
        OverlapCrops((32, 32), prob_flip=(0.5, 0.5))
    with pytest.raises(ValueError, match="views.prob_flip .* give 2 numbers"):
        OverlapCrops((32, 32), local_size_vox=(16, 16))
    with pytest.raises(ValueError, match=r"three numbers \(D, H, W\), or two \(H, W\)"):
        OverlapCrops((32,), local_size_vox=(16,), prob_flip=(0.5,))
