"""The view maker: the same views for every recipe, clean and augmented, and masks in the views that they belong to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import recipes
import torch

from agssd.transforms.crops import OverlapCrops
from agssd.transforms.edges import patch_scores, patches_of, unpatch
from agssd.transforms.intensity import Appearance
from agssd.transforms.masking import MaskSampler
from agssd.transforms.views import (
    body_of,
    both_views,
    boundary_maps,
    edge_maps,
    in_their_views,
    make_views,
    mask_views,
    panel_of,
    pick,
)

CROPS = OverlapCrops((24, 24, 24), scale=(0.6, 1.0), num_local=2, local_size_vox=(16, 16, 16))


@pytest.fixture(scope="module")
def batch(tiny_cache: Path):
    return recipes.parents(tiny_cache, [0, 1, 2, 3])


def test_make_views__what_else_is_asked_for_leaves_the_global_views_as_they_are(batch) -> None:
    plain = make_views(batch, CROPS, None, 0, with_locals=False)
    full = make_views(batch, CROPS, Appearance(), 0, with_edges=True)
    assert torch.equal(plain.clean, full.clean) and torch.equal(plain.hidden_view, full.hidden_view)
    assert torch.equal(plain.inputs, plain.clean) and not torch.equal(full.inputs, full.clean)
    assert plain.locals is None and plain.edges is None
    assert full.locals is not None and full.locals.shape == (4, 2, 1, 16, 16, 16)
    assert torch.equal(full.edges, edge_maps(full, full.hidden_view))
    assert plain.size_vox == (24, 24, 24)


def test_make_views__each_view_of_many_samples_is_hidden_half_the_time(tiny_cache: Path) -> None:
    one = recipes.parents(tiny_cache, [0])
    many = {name: tensor.expand(400, *tensor.shape[1:]) for name, tensor in one.items()}
    many["sample"] = torch.arange(400)
    small = OverlapCrops((8, 8, 8), scale=(0.6, 1.0), num_local=0)
    share = make_views(many, small, None, 0).hidden_view.float().mean()
    assert 0.42 < float(share) < 0.58


def test_mask_views__masks_of_a_sample_differ_and_do_not_depend_on_the_cut(batch) -> None:
    views = make_views(batch, CROPS, None, 0, with_locals=False)
    body = body_of(views.foreground.flatten(0, 1), (8, 8, 8))
    for score in ("random", "edge"):
        masks = MaskSampler((3, 3, 3), (8, 8, 8), score)
        whole, _ = mask_views(views, both_views(views), body, masks, (0.3, 0.7), 0, 0.5)
        assert whole.shape == (8, 3, 3, 3)
        assert not any(torch.equal(whole[2 * b], whole[2 * b + 1]) for b in range(4))
        for b in range(4):
            one = make_views(recipes.take(batch, slice(b, b + 1)), CROPS, None, 0, with_locals=False)
            part, _ = mask_views(one, both_views(one), body[2 * b : 2 * b + 2], masks, (0.3, 0.7), 0, 0.5)
            assert torch.equal(part, whole[2 * b : 2 * b + 2])


def test_mask_views__edges_of_each_view_guide_its_own_mask(batch) -> None:
    views = make_views(batch, CROPS, None, 0, with_locals=False)
    views.clean[:, 0, :, :8], views.clean[:, 1, :, 16:] = 0.0, 0.0  # each view is flat at another end
    body = torch.ones(8, 27, dtype=torch.bool)
    masks = MaskSampler((3, 3, 3), (8, 8, 8), "edge", score_share=1.0, temperature=(0.1, 0.1), hints=0.0)
    mask, _ = mask_views(views, both_views(views), body, masks, (0.3, 0.3), 0, 1.0)
    mask = mask.unflatten(0, (4, 2)).flatten(2)
    for v in (0, 1):
        edges = patches_of(edge_maps(views, torch.full((4,), v)), (8, 8, 8)).mean(-1)
        hidden, as_other = (float((edges * mask[:, w]).sum() / mask[:, w].sum()) for w in (v, 1 - v))
        assert hidden > 1.2 * float(edges.mean()) and hidden > 1.2 * as_other


def test_in_their_views__puts_each_mask_into_its_view() -> None:
    mask = torch.rand(5, 2, 2, 2, generator=torch.Generator().manual_seed(0)) < 0.5
    which = torch.tensor([0, 1, 1, 0, 1])
    found = in_their_views(mask, which, 5)
    assert torch.equal(pick(found, which), mask) and not pick(found, 1 - which).any()
    mask = torch.rand(6, 2, 2, 2, generator=torch.Generator().manual_seed(0)) < 0.5
    which = torch.tensor([0, 1, 0, 1, 0, 1])
    assert torch.equal(pick(in_their_views(mask, which, 3), which), mask)


def test_edge_maps__of_both_views_are_those_of_each(batch) -> None:
    views = make_views(batch, CROPS, None, 0, with_locals=False)
    both = edge_maps(views, both_views(views)).unflatten(0, (4, 2))
    for v in (0, 1):
        assert torch.equal(both[:, v], edge_maps(views, torch.full((4,), v)))


def test_unpatch__inverts_patches_of() -> None:
    image = torch.randn(2, 3, 8, 12, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpatch(patches_of(image, (4, 3, 2)), (2, 4, 2), (4, 3, 2)), image)


def test_panel_of__refuses_what_is_not_in_the_batch(batch) -> None:
    views = make_views(batch, CROPS, None, 0)
    assert set(panel_of(views, 3)) == {"globals", "clean", "locals", "edges", "overlap_box"}
    for given, index in ((views, 4), (views, -1), (None, 0)):
        with pytest.raises(IndexError, match=f"sample {index} is not in the last batch"):
            panel_of(given, index)


# ------------------------------------------------------------------ regions


def slabs(batch, flat_end: slice):
    """The batch with regions of 4 voxels along S, none of which ends within ``flat_end``."""
    number = 1 + torch.arange(batch["foreground"].shape[2], dtype=torch.int32) // 4
    number[flat_end] = 99
    regions = number[:, None, None].expand(batch["foreground"].shape)
    return batch | {"regions": regions, "foreground": torch.ones_like(batch["foreground"])}


def test_boundary_maps__lie_where_numbers_of_the_view_change_and_not_at_the_outline(batch) -> None:
    views = make_views(slabs(batch, slice(0, 0)), CROPS, None, 0, with_locals=False)
    for which in (torch.zeros(4, dtype=torch.int64), torch.tensor([1, 0, 1, 1])):
        found, regions = boundary_maps(views, which), pick(views.regions, which)
        changes = regions.diff(dim=2) != 0
        at = torch.zeros(regions.shape, dtype=torch.bool)
        at[:, :, 1:] |= changes
        at[:, :, :-1] |= changes
        assert found[at].min() > 0.3 and found[at].mean() > 1.3 * found[~at].mean()
    cut = views.foreground.clone()
    cut[..., :12, :, :] = False  # the outline of the body is a boundary of no region
    half = boundary_maps(replace(views, foreground=cut), which)
    whole = boundary_maps(views, which)
    assert not half[:, :, :12].any()
    torch.testing.assert_close(half[:, :, 12:14], 0.25 * whole[:, :, 12:14])
    assert torch.equal(half[:, :, 14:], whole[:, :, 14:])


def test_mask_region__hides_boundaries_first_in_either_way_of_masking(batch) -> None:
    views = make_views(slabs(batch, slice(16, None)), CROPS, None, 0, with_locals=False)
    masks = MaskSampler((3, 3, 3), (8, 8, 8), "region", score_share=1.0, temperature=(0.1, 0.1), hints=0.0)
    both, _ = mask_views(views, both_views(views), torch.ones(8, 27, dtype=torch.bool), masks, (0.3, 0.3), 0, 1.0)
    one, _ = mask_views(views, views.hidden_view, torch.ones(4, 27, dtype=torch.bool), masks, (0.3, 0.3), 0, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        again, _ = mask_views(views, views.hidden_view, torch.ones(4, 27, dtype=torch.bool), masks, (0.3, 0.3), 0, 1.0)
    assert torch.equal(one, again)
    for mask, which in (
        (one, views.hidden_view),
        *((both.unflatten(0, (4, 2))[:, v], torch.full((4,), v)) for v in (0, 1)),
    ):
        scores = patch_scores(boundary_maps(views, which), (8, 8, 8))
        varied = scores.std(1) > 0.05  # some views hold boundaries everywhere
        hidden = mask.flatten(1).float()
        mean = (scores * hidden).sum(1) / hidden.sum(1)
        assert varied.any() and (mean > 1.1 * scores.mean(1))[varied].all()


def test_panel_of__shows_boundaries_where_they_are_asked_for(batch) -> None:
    views = make_views(slabs(batch, slice(0, 0)), CROPS, None, 0)
    for index in (0, 3):
        edges = panel_of(views, index, boundaries=True)["boundaries"]
        for v in (0, 1):
            assert torch.equal(edges[v], boundary_maps(views, torch.full((4,), v))[index, 0])
        assert not torch.equal(edges, panel_of(views, index)["edges"])


def test_region_settings__without_maps_are_refused_with_the_remedy(batch) -> None:
    views = make_views({name: value for name, value in batch.items() if name != "regions"}, CROPS, None, 0)
    with pytest.raises(ValueError, match=r"no region maps.*agssd regions.*--data.regions true"):
        boundary_maps(views, views.hidden_view)
    around = OverlapCrops((24, 24, 24), num_local=0, centres="regions")
    with pytest.raises(ValueError, match=r"views.centres is regions, but.*no region maps.*agssd regions"):
        make_views({name: value for name, value in batch.items() if name != "regions"}, around, None, 0)
