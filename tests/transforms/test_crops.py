"""CVAC: overlap by construction, views that lie where their affines say, and equal results of both ways to cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from agssd.geometry import invert, rotation_matrices, signed_permutations, transform, view_affine
from agssd.transforms import crops
from agssd.transforms.crops import (
    OverlapCrops,
    ViewGeometry,
    balanced_voxels,
    box_in_view,
    box_share,
    extract,
    extract_with_body,
)
from agssd.transforms.keyed_random import KeyedRandom

ROOT = Path(__file__).resolve().parents[2]


def experiments() -> list[Any]:
    """Parent size and arguments of the views of every pretraining experiment that is shipped."""
    found = []
    for path in sorted((ROOT / "conf" / "experiment").glob("*.yaml")):
        content = yaml.safe_load(path.read_text())
        if "views" in content:
            parts = [
                yaml.safe_load((path.parent / content[name]).read_text())["init_args"] for name in ("data", "views")
            ]
            found.append(pytest.param(parts[0]["parent_vox"], parts[1], id=path.stem))
    content = yaml.safe_load((ROOT / "src" / "agssd" / "commands" / "demo" / "pretrain.yaml").read_text())
    found.append(pytest.param(content["data"]["init_args"]["parent_vox"], content["views"]["init_args"], id="demo"))
    return found


def ones(parent, batch=1):
    return torch.ones(batch, 1, *parent, dtype=torch.uint8)


def place(centre, edge, orientation, rotation=None) -> ViewGeometry:
    """Views at given places, in voxel edges, as OverlapCrops places them."""
    affine = view_affine(centre - 0.5, edge, signed_permutations()[orientation], rotation)
    return ViewGeometry(centre, edge, orientation, affine, rotation is not None)


# ------------------------------------------------------------------ overlap


@pytest.mark.parametrize(("parent", "settings"), experiments())
def test_sample__overlap_of_every_experiment_holds_over_100_000_draws(parent, settings, monkeypatch):
    views = OverlapCrops(**settings)
    exact = views.sample(ones(parent, 2), torch.arange(2), 0)
    # In a parent that is body throughout every box holds 1; a batch of 100,000 such parents need not be counted.
    monkeypatch.setattr(crops, "box_share", lambda mask, low, high: torch.ones(low.shape[:2]))
    overlap, target = [], []
    for part in torch.arange(100_000).split(20_000):
        drawn = views.sample(ones(parent).expand(len(part), *[-1] * (len(parent) + 1)), part, 0)
        overlap.append(drawn.overlap)
        target.append(drawn.target_overlap)
        for geometry in filter(None, (drawn.globals, drawn.locals)):
            assert (geometry.centre - geometry.edge / 2).min() > -1e-3
            assert (geometry.centre + geometry.edge / 2 - torch.tensor(parent)).max() < 1e-3
    realised, wanted = torch.cat(overlap), torch.cat(target)
    assert torch.equal(realised[:2], exact.overlap) and torch.equal(wanted[:2], exact.target_overlap)
    low, high = views.overlap
    assert low <= wanted.min() and wanted.max() <= high and abs(wanted.mean() - (low + high) / 2) < 0.005
    assert (realised - wanted).min() >= -1e-5
    assert realised.mean() - wanted.mean() <= 0.15
    assert (realised > 0.95).float().mean() <= 0.05


SMALL = {"size_vox": (32, 32, 32), "local_size_vox": (16, 16, 16), "scale": (0.4, 0.9), "local_scale": (0.25, 0.45)}


@pytest.mark.parametrize("orientations", ["none", "flips", "all"])
def test_sample__overlap_equals_counting_points_through_the_affines(orientations):
    views = OverlapCrops(**SMALL, orientations=orientations, num_local=2)
    drawn = views.sample(ones((40, 56, 40), 64), torch.arange(64), 1)
    edges = drawn.globals.edge
    smaller = edges.prod(-1).argmin(1)
    rows = torch.arange(64)
    axis = (2 * torch.arange(48) + 1) / 48 - 1
    points = torch.cartesian_prod(axis, axis, axis).expand(64, -1, -1)
    voxels = transform(drawn.globals.affine[rows, smaller], points)
    inside = (transform(invert(drawn.globals.affine[rows, 1 - smaller]), voxels).abs() <= 1).all(-1)
    counted = inside.float().mean(1)
    assert (counted - drawn.overlap).abs().max() < 3 * 0.5 / 48
    box = drawn.overlap_box
    in_box = ((voxels + 0.5 >= box[:, None, :, 0]) & (voxels + 0.5 <= box[:, None, :, 1])).all(-1)
    assert (in_box != inside).float().mean() < 1e-4  # the same points, but for rounding at the faces


def test_sample__overlap_equals_counting_voxels():
    views = OverlapCrops(**SMALL, num_local=0)
    drawn = views.sample(ones((40, 56, 40), 200), torch.arange(200), 2)
    fine = 16  # sub-voxels per axis; boxes are products, so axes can be counted alone
    counted = torch.ones(200)
    for axis, length in enumerate((40, 56, 40)):
        x = (torch.arange(length * fine) + 0.5) / fine
        low = (drawn.globals.centre - drawn.globals.edge / 2)[..., axis, None]
        high = (drawn.globals.centre + drawn.globals.edge / 2)[..., axis, None]
        within = (x >= low) & (x < high)  # (B, 2, n)
        counted *= within.all(1).sum(-1) / within.sum(-1).amin(1)
    torch.testing.assert_close(counted, drawn.overlap, atol=0.02, rtol=0)


def test_sample__views_are_multi_scale_share_their_aspect_and_use_all_diagonals():
    views = OverlapCrops(size_vox=(32, 32, 32), num_local=0)
    drawn = views.sample(ones((56, 56, 56), 64), torch.arange(64), 0)
    ratio = drawn.globals.edge[:, 0] / drawn.globals.edge[:, 1]
    torch.testing.assert_close(ratio, ratio[:, :1].expand(-1, 3))
    scale = drawn.globals.edge.prod(-1) ** (1 / 3) / 32
    assert 0.75 <= scale.min() and scale.max() <= 1.33 and scale.std() > 0.05
    shift = drawn.globals.centre[:, 1] - drawn.globals.centre[:, 0]
    assert len({tuple(row.tolist()) for row in shift.sign() if row.abs().min() > 0}) == 8


def test_sample__is_a_function_of_seed_and_sample():
    views = OverlapCrops(**SMALL, num_local=3, orientations="all")
    foreground = ones((40, 56, 40), 6)
    whole = views.sample(foreground, torch.arange(6), 5)
    for cut in ([1] * 6, [2, 4]):
        parts = [views.sample(foreground[part], part, 5) for part in torch.arange(6).split(cut)]
        assert torch.equal(torch.cat([p.globals.affine for p in parts]), whole.globals.affine)
        assert torch.equal(torch.cat([p.locals.affine for p in parts]), whole.locals.affine)
    assert not torch.equal(views.sample(foreground, torch.arange(6), 6).globals.affine, whole.globals.affine)


def ball(parent, centre, radius):
    grid = torch.stack(torch.meshgrid(*(torch.arange(n) + 0.5 for n in parent), indexing="ij"))
    return ((grid - torch.tensor(centre)[:, None, None, None]) ** 2).sum(0)[None, None] < radius**2


def test_sample__prefers_overlaps_that_hold_body_and_still_keeps_the_target():
    parent = (40, 56, 40)
    body = ball(parent, (20.0, 12.0, 20.0), 12.0).expand(300, -1, -1, -1, -1)
    chosen = OverlapCrops(**SMALL, num_local=0).sample(body, torch.arange(300), 0)
    blind = OverlapCrops(**SMALL, num_local=0, min_foreground=0.0).sample(body, torch.arange(300), 0)
    shares = []
    for drawn in (chosen, blind):
        assert (drawn.overlap - drawn.target_overlap).min() >= -1e-5
        low, high = drawn.overlap_box.unbind(-1)
        shares.append((box_share(body, low[:, None], high[:, None]) >= 0.25).float().mean())
    assert shares[0] > 0.95 and shares[1] < 0.8


def test_sample__keeps_the_best_draw_where_none_is_good():
    parent = (40, 56, 40)
    body = ball(parent, (20.0, 16.0, 20.0), 4.0).expand(40, -1, -1, -1, -1)
    drawn = OverlapCrops(**SMALL, num_local=0).sample(body, torch.arange(40), 0)
    first = OverlapCrops(**SMALL, num_local=0, min_foreground=0.0).sample(body, torch.arange(40), 0)

    def share(views):
        return box_share(body, *(end[:, None] for end in views.overlap_box.unbind(-1)))[:, 0]

    none_good = share(drawn) < 0.25
    assert none_good.float().mean() > 0.5
    assert (share(drawn) >= share(first)).all() and share(drawn)[none_good].mean() > 2 * share(first).mean()
    assert torch.isfinite(drawn.globals.affine).all()
    empty = OverlapCrops(**SMALL, num_local=0).sample(torch.zeros(4, 1, *parent), torch.arange(4), 0)
    assert (empty.overlap - empty.target_overlap).min() >= -1e-5


def test_sample__local_views_lie_in_the_overlap_or_in_a_global_view():
    views = OverlapCrops(**SMALL, num_local=8, prob_local_in_overlap=1.0)
    drawn = views.sample(ones((40, 56, 40), 100), torch.arange(100), 0)
    low, high = drawn.overlap_box.unbind(-1)
    centre, edge = drawn.locals.centre, drawn.locals.edge
    # At the parent's border a centre moves inwards so that the view stays inside.
    parent = torch.tensor([40.0, 56.0, 40.0])
    inside = (centre >= torch.minimum(low[:, None], parent - edge / 2) - 1e-3) & (
        centre <= torch.maximum(high[:, None], edge / 2) + 1e-3
    )
    assert inside.all()
    mixed = OverlapCrops(**SMALL, num_local=8, prob_local_in_overlap=0.5).sample(
        ones((40, 56, 40), 400), torch.arange(400), 0
    )
    low, high = mixed.overlap_box.unbind(-1)
    within = ((mixed.locals.centre >= low[:, None]) & (mixed.locals.centre <= high[:, None])).all(-1).float().mean()
    assert 0.5 < within < 0.95
    scale = mixed.locals.edge / 32
    assert 0.25 <= scale.min() and scale.max() <= 0.45


def test_sample__orientations_follow_the_setting():
    foreground = ones((40, 56, 40)).expand(500, -1, -1, -1, -1)
    sample = torch.arange(500)
    assert (
        OverlapCrops(**SMALL, orientations="none").sample(foreground[:8], sample[:8], 0).globals.orientation == 0
    ).all()
    index = OverlapCrops(**SMALL, prob_flip=(0.3, 0.8, 0.0)).sample(foreground, sample, 0).globals.orientation
    assert index.max() < 8
    for bit, wanted in ((4, 0.3), (2, 0.8), (1, 0.0)):
        assert abs(((index & bit) > 0).float().mean() - wanted) < 5 * (wanted * (1 - wanted) / 1000) ** 0.5 + 1e-9
    index = OverlapCrops(**SMALL, orientations="all").sample(foreground, sample, 0).globals.orientation
    counts = torch.bincount(index.flatten(), minlength=48)
    assert len(counts) == 48 and counts.min() > 0 and counts.max() < 60


def test_overlap_crops__refuses_empty_ranges_and_turns_of_boxes():
    with pytest.raises(ValueError, match="views.overlap"):
        OverlapCrops(overlap=(0.5, 1.2))
    with pytest.raises(ValueError, match="views.scale"):
        OverlapCrops(scale=(0.9, 0.4))
    with pytest.raises(ValueError, match="orientations"):
        OverlapCrops(size_vox=(32, 48, 32), orientations="all")


# ---------------------------------------------------------------- box share


def test_box_share__equals_counting():
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(3, 1, 9, 12, 7, generator=generator) < 0.4
    shape = torch.tensor([9.0, 12.0, 7.0])
    ends = torch.rand(2, 3, 50, 3, generator=generator) * shape
    low, high = ends.amin(0), ends.amax(0)
    share = box_share(mask, low, high)
    for b in range(3):
        for t in range(50):
            start = torch.minimum(low[b, t].round().long(), shape.long() - 1)
            stop = torch.maximum(high[b, t].round().long(), start + 1)
            box = mask[b, 0, start[0] : stop[0], start[1] : stop[1], start[2] : stop[2]]
            assert share[b, t].item() == pytest.approx(box.float().mean().item(), abs=1e-6)
    assert torch.equal(box_share(torch.ones_like(mask), low, high), torch.ones(3, 50))


# ------------------------------------------------------------------ extract


def smooth_noise(shape, generator, dtype=torch.float32):
    return torch.nn.functional.avg_pool3d(torch.rand(shape, generator=generator, dtype=dtype), 3, 1, 1)


@pytest.mark.parametrize(
    ("size", "orientation", "edges"),
    [
        ((8, 8, 8), range(48), (4.0, 7.5)),  # magnified
        ((8, 8, 8), range(48), (12.0, 19.0)),  # shrunk: with the blur before
        ((6, 9, 5), range(8), (4.0, 19.0)),
    ],
)
def test_extract__products_equal_grid_sample_in_every_orientation(size, orientation, edges):
    generator = torch.Generator().manual_seed(7)
    parent = smooth_noise((2, 2, 20, 24, 22), generator)
    index = torch.tensor(list(orientation)).expand(2, -1)
    count = index.shape[1]
    edge = edges[0] + (edges[1] - edges[0]) * torch.rand(2, count, 3, generator=generator)
    extent = torch.tensor([20.0, 24.0, 22.0])
    centre = edge / 2 + torch.rand(2, count, 3, generator=generator) * (extent - edge)
    views = place(centre, edge, index)
    quick = extract(parent, views, size)
    slow = extract(parent, views, size, separable=False)
    assert quick.shape == (2, count, 2, *size)
    assert (quick - slow).abs().max() < 5e-5
    assert quick.std() > 10 * 5e-5
    assert torch.equal(extract(parent, views, size), extract(parent, views, size, separable=True))


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool])
def test_extract_with_body__equals_cutting_image_and_body_as_one(dtype, rotated):
    generator = torch.Generator().manual_seed(8)
    parent, body = smooth_noise((2, 2, 20, 24, 22), generator), smooth_noise((2, 1, 20, 24, 22), generator)
    body = body > body.median()
    centre = 10 + torch.rand(2, 3, 3, generator=generator)
    turn = rotation_matrices(torch.rand(2, 3, 3, generator=generator)) if rotated else None
    views = place(centre, torch.full((2, 3, 3), 14.0), torch.tensor([[0, 5, 47], [9, 30, 12]]), turn)
    image, inside = extract_with_body(parent, body.to(dtype), views, (8, 8, 8))
    both = extract(torch.cat([parent, body.float()], 1), views, (8, 8, 8))
    assert torch.equal(image, both[:, :, :2]) and torch.equal(inside, both[:, :, 2:] > 0.5)
    assert inside.any() and not inside.all()


def test_extract__is_a_plain_crop_where_edges_equal_the_size():
    parent = torch.rand(1, 1, 12, 12, 12, generator=torch.Generator().manual_seed(0))
    start = torch.tensor([2.0, 3.0, 4.0])
    block = parent[0, 0, 2:8, 3:9, 4:10]
    index = torch.arange(48)[None]
    views = place((start + 3).expand(1, 48, 3), torch.full((1, 48, 3), 6.0), index)
    cut = extract(parent, views, (6, 6, 6))[0, :, 0]
    for n, matrix in enumerate(signed_permutations()):
        axes = matrix.abs().argmax(0)  # for every view axis the parent axis it runs along
        turned = block.permute(*axes.tolist())
        flipped = [axis for axis in range(3) if matrix[axes[axis], axis] < 0]
        torch.testing.assert_close(cut[n], turned.flip(flipped), atol=1e-5, rtol=0)


def test_extract__at_the_border_of_the_parent_both_ways_repeat_it():
    generator = torch.Generator().manual_seed(2)
    parent = smooth_noise((1, 1, 10, 10, 10), generator)
    views = place(torch.full((1, 8, 3), 5.0), torch.full((1, 8, 3), 10.0), torch.arange(8)[None])
    torch.testing.assert_close(
        extract(parent, views, (16, 16, 16)), extract(parent, views, (16, 16, 16), separable=False), atol=5e-5, rtol=0
    )


def test_extract__shrinking_smooths_first_so_that_fine_texture_does_not_alias():
    checker = torch.stack(torch.meshgrid(*[torch.arange(40)] * 3, indexing="ij")).sum(0) % 2
    parent = checker[None, None].float()
    views = place(torch.full((1, 1, 3), 20.0), torch.full((1, 1, 3), 36.0), torch.zeros(1, 1, dtype=torch.int64))
    cut = extract(parent, views, (9, 9, 9))  # 4 voxels per voxel: sigma 1.5
    assert (cut[..., 1:-1, 1:-1, 1:-1] - 0.5).abs().max() < 0.01


def landmarks(parent, points, sigma=1.5):
    """Volumes (P, 1, D, H, W), each a Gaussian blob at a parent voxel coordinate."""
    grid = torch.stack(torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in parent), indexing="ij"), -1)
    return torch.exp(-((grid - points[:, None, None, None]) ** 2).sum(-1) / (2 * sigma**2))[:, None]


def centres_of_mass(cut):
    """(..., 3) voxel coordinates of the centre of mass of (..., d, h, w)."""
    mass = cut.sum((-3, -2, -1))
    places = []
    for axis in range(3):
        profile = cut.sum([d for d in (-3, -2, -1) if d != axis - 3])
        places.append((profile * torch.arange(profile.shape[-1])).sum(-1) / mass)
    return torch.stack(places, -1)


PARENT = (36, 40, 38)
SPACING_MM = torch.tensor([[1.5, 0.8, 2.5]])


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("edge", [(20.0, 22.0, 24.0), (34.0, 36.0, 33.0)])
def test_extract__a_landmark_lands_where_the_affine_says_and_distances_in_mm_hold(edge, rotated):
    points = torch.tensor([[17.3, 19.0, 16.2], [19.4, 22.5, 18.9]])
    parent = landmarks(PARENT, points)  # two landmarks, as two samples
    generator = torch.Generator().manual_seed(3)
    index = torch.arange(48).expand(2, -1)
    rotation = None
    if rotated:
        angles = 0.5 * (torch.rand(1, 48, 3, generator=generator) - 0.5)
        rotation = rotation_matrices(angles).expand(2, -1, -1, -1)
    centre = torch.tensor([18.2, 20.4, 18.8]).expand(2, 48, 3)
    views = place(centre, torch.tensor(edge).expand(2, 48, 3), index, rotation)
    size = (24, 24, 24)
    cut = extract(parent, views, size)[:, :, 0]

    u = transform(invert(views.affine), points[:, None, None].expand(2, 48, 1, 3))[:, :, 0]
    predicted = ((u + 1) * 24 - 1) / 2
    found = centres_of_mass(cut)
    assert (found - predicted).abs().max() < 0.1  # voxels of the view

    if not rotated:  # distance between the landmarks: view voxels times view spacing = parent voxels times its spacing
        spacing = views.spacing_mm(SPACING_MM.expand(2, -1), size)
        measured = ((found[0] - found[1]) * spacing[0]).norm(dim=-1)
        true = ((points[0] - points[1]) * SPACING_MM[0]).norm()
        assert (measured - true).abs().max() < 0.15 * SPACING_MM.max()


def test_spacing_mm__follows_the_axes_through_permutations():
    edge = torch.tensor([20.0, 30.0, 40.0]).expand(1, 48, 3)
    views = place(torch.full((1, 48, 3), 25.0), edge, torch.arange(48)[None])
    spacing = views.spacing_mm(SPACING_MM, (10, 10, 10))[0]
    along_parent = edge[0, 0] * SPACING_MM[0] / 10
    for matrix, row in zip(signed_permutations(), spacing, strict=True):
        torch.testing.assert_close(row, along_parent[matrix.abs().argmax(0)])
    flips = place(torch.full((1, 8, 3), 25.0), edge[:, :8], torch.arange(8)[None])
    spacing = flips.spacing_mm(SPACING_MM, (10, 20, 5))[0]
    torch.testing.assert_close(spacing, (edge[0, 0] * SPACING_MM[0] / torch.tensor([10, 20, 5])).expand(8, 3))


def test_sample__with_rotation_cuts_by_grid_sample_and_finds_landmarks():
    views = OverlapCrops(**SMALL, num_local=1, rotation_deg=10.0, orientations="all")
    parent = (40, 56, 40)
    drawn = views.sample(ones(parent, 3), torch.arange(3), 0)
    assert drawn.globals.rotated
    linear = drawn.globals.affine[..., :3, :3]
    straight = torch.diag_embed(drawn.globals.edge / 2) @ signed_permutations()[drawn.globals.orientation]
    rotation = linear @ torch.linalg.inv(straight)
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3).expand(3, 2, 3, 3), atol=1e-5, rtol=0)
    assert (rotation - torch.eye(3)).abs().amax((-2, -1)).min() > 0.01
    point = drawn.globals.centre[:, 0] - 0.5  # the middle of view 0, in voxel coordinates
    cut = extract(landmarks(parent, point), drawn.globals, (32, 32, 32))[:, 0, 0]
    assert (centres_of_mass(cut) - 15.5).abs().max() < 0.35  # part of the blob may lie outside the parent


def test_box_in_view__surrounds_the_painted_box_in_every_orientation():
    views = OverlapCrops(**SMALL, orientations="all", num_local=0)
    parent = (40, 56, 40)
    drawn = views.sample(ones(parent, 64), torch.arange(64), 3)
    assert len(drawn.globals.orientation.unique()) > 30
    grid = torch.stack(torch.meshgrid(*(torch.arange(n) + 0.5 for n in parent), indexing="ij"), -1)
    low, high = drawn.overlap_box.unbind(-1)
    inside = (grid >= low[:, None, None, None]) & (grid <= high[:, None, None, None])
    painted = inside.all(-1)[:, None].float()
    cut = extract(painted, drawn.globals, (32, 32, 32))[:, :, 0] > 0.5
    for view in (0, 1):
        box = box_in_view(drawn.globals, view, drawn.overlap_box, (32, 32, 32))
        assert (box[..., 0] > -1e-2).all() and (box[..., 1] < 32 + 1e-2).all()  # the overlap is in both views
        per_voxel = 32 / drawn.globals.edge[:, view]
        slack = 0.5 * per_voxel.amax(-1) + 1  # painted to whole parent voxels, cut to whole view voxels
        for axis in range(3):
            profile = cut[:, view].any(dim=3 if axis != 2 else 2)
            profile = profile.any(dim=2 if axis == 0 else 1)
            first = profile.float().argmax(1)
            last = 32 - profile.flip(1).float().argmax(1)
            assert ((first - box[:, axis, 0]).abs() <= slack).all()
            assert ((last - box[:, axis, 1]).abs() <= slack).all()


def test_extract__a_view_does_not_depend_on_the_rest_of_the_batch():
    generator = torch.Generator().manual_seed(11)
    parent = torch.rand(3, 1, 30, 32, 34, generator=generator)
    edge = torch.tensor([8.0, 9.0, 14.0, 26.0])[None, :, None].expand(3, -1, 3)  # magnified, as is, shrunk and blurred
    extent = torch.tensor([30.0, 32.0, 34.0])
    centre = edge / 2 + torch.rand(3, 4, 3, generator=generator) * (extent - edge)
    centre[0, 1] = torch.tensor([15.5, 14.5, 12.5])  # at whole voxels
    index = torch.randint(0, 48, (3, 4), generator=generator)
    together = extract(parent, place(centre, edge, index), (9, 9, 9))
    for b in range(3):
        for v in range(4):
            alone = place(centre[b : b + 1, v : v + 1], edge[b : b + 1, v : v + 1], index[b : b + 1, v : v + 1])
            assert torch.equal(extract(parent[b : b + 1], alone, (9, 9, 9))[0, 0], together[b, v])


# ------------------------------------------------------------ balance over regions


def three_regions(parent) -> torch.Tensor:
    """A region of nearly all, one of a slab of a tenth, and one of a single voxel."""
    regions = torch.full((1, 1, *parent), 12, dtype=torch.int32)
    regions[:, :, : parent[0] // 10] = 4000
    regions[(0, 0, *(n // 2 for n in parent))] = 7
    regions[:, :, -2:] = 0
    return regions


@pytest.mark.parametrize("parent", [(20, 12, 14), (40, 32)])
def test_balanced_voxels__every_region_equally_often_and_every_voxel_of_it(parent):
    regions = three_regions(parent)
    voxel, some = balanced_voxels(
        regions.expand(3000, *[-1] * (len(parent) + 1)), KeyedRandom(0, torch.arange(3000), "")
    )
    assert some.all() and voxel.dtype == torch.int64
    numbers = regions[0, 0][tuple(voxel.unbind(-1))]
    assert not (numbers == 0).any()
    for number in (12, 4000, 7):
        assert abs(float((numbers == number).float().mean()) - 1 / 3) < 5 * (2 / 9 / 3000) ** 0.5
    slab = voxel[numbers == 4000].float()
    for axis, length in enumerate((parent[0] // 10, *parent[1:])):
        assert slab[:, axis].min() < max(1, 0.02 * length) and slab[:, axis].max() > 0.97 * length - 1
        assert abs(float(slab[:, axis].mean()) - (length - 1) / 2) < 5 * length / (12 * 1000) ** 0.5


def test_balanced_voxels__is_a_function_of_seed_and_sample_and_knows_where_nothing_is():
    generator = torch.Generator().manual_seed(0)
    regions = torch.randint(0, 5, (6, 1, 8, 9, 7), generator=generator)
    regions[4] = 0
    sample = torch.tensor([5, 9, 2, 2**40, 1, 0])
    whole, some = balanced_voxels(regions, KeyedRandom(3, sample, "a"))
    assert some.tolist() == [True, True, True, True, False, True]
    for b in range(6):
        voxel, _ = balanced_voxels(regions[b : b + 1], KeyedRandom(3, sample[b : b + 1], "a"))
        assert torch.equal(voxel[0], whole[b])
    assert not torch.equal(balanced_voxels(regions, KeyedRandom(4, sample, "a"))[0], whole)


@pytest.mark.parametrize(("parent", "size"), [((20, 28, 24), (16, 16, 16)), ((60, 50), (32, 32))])
def test_sample__centres_balanced_over_regions_hold_small_ones_and_keep_the_target(parent, size):
    dims = len(parent)
    settings = {
        "size_vox": size,
        "local_size_vox": (16,) * dims,
        "prob_flip": (0.5,) * dims,
        "scale": (0.2, 0.4),
        "num_local": 0,
    }
    regions = three_regions(parent).expand(300, *[-1] * (dims + 1))
    body, sample = ones(parent).expand(300, *[-1] * (dims + 1)), torch.arange(300)
    held = []
    for centres in ("uniform", "regions"):
        drawn = OverlapCrops(**settings, centres=centres).sample(body, sample, 0, regions)
        low, high = drawn.globals.centre - drawn.globals.edge / 2, drawn.globals.centre + drawn.globals.edge / 2
        assert low.min() > -1e-3 and (high - torch.tensor(parent)).max() < 1e-3
        assert (drawn.overlap - drawn.target_overlap).min() >= -1e-5
        at = torch.tensor([n // 2 + 0.5 for n in parent])
        held.append(((low[:, 0] < at) & (at < high[:, 0])).all(-1).float().mean())
    assert held[1] > 1 / 3 - 0.08 and held[1] > held[0] + 0.1
    plain = OverlapCrops(**settings).sample(body, sample, 0)
    assert torch.equal(plain.globals.affine, OverlapCrops(**settings).sample(body, sample, 0, regions).globals.affine)


def test_sample__balanced_over_an_empty_map_is_as_without():
    views, body = OverlapCrops(**SMALL, num_local=0, centres="regions"), ones((40, 56, 40), 4)
    nothing = torch.zeros(4, 1, 40, 56, 40, dtype=torch.int32)
    plain = OverlapCrops(**SMALL, num_local=0).sample(body, torch.arange(4), 0)
    assert torch.equal(views.sample(body, torch.arange(4), 0, nothing).globals.affine, plain.globals.affine)
