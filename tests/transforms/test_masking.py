"""EAAM: exact counts whatever the scores, preference for edges as calibrated, hints, background rules."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import get_args

import pytest
import torch
import yaml

from agssd.transforms.keyed_random import KeyedRandom
from agssd.transforms.masking import (
    BACKGROUND_WEIGHT,
    MaskSampler,
    MaskScore,
    draw_cuboids,
    draw_masks,
    mask_counts,
    masked_indices,
)

CONF = Path(__file__).resolve().parents[2] / "conf"
GRID = (6, 6, 6)
N = 216


def keyed(batch, seed=0):
    return KeyedRandom(seed, torch.arange(batch), "mask")


def z_scores(batch, n=N, seed=0):
    """Skewed like edge scores: gamma with shape 0.7, standardised per sample."""
    torch.manual_seed(seed)
    scores = torch.distributions.Gamma(0.7, 1.0).sample((batch, n))
    return (scores - scores.mean(1, keepdim=True)) / scores.std(1, keepdim=True)


@pytest.fixture(autouse=True)
def _keep_global_generator():
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


@pytest.mark.parametrize(
    ("grid", "block"), [((6, 6, 6), 1), ((6, 6, 6), 2), ((6, 6, 6), 3), ((4, 6, 2), 2), ((3, 5, 4), 1)]
)
@pytest.mark.parametrize("edge_share", [0.0, 0.3, 1.0])
def test_draw_masks__count_is_exact_for_every_ratio_score_and_amount_of_body(grid, block, edge_share):
    n = math.prod(grid)
    ratios = torch.tensor([0.001, 0.05, 0.3, 0.5, 1 / 3, 0.7, 0.9, 1.0])
    kinds = {
        "gamma": z_scores(len(ratios), n),
        "flat": torch.zeros(len(ratios), n),
        "extreme": z_scores(len(ratios), n) * 1e4,
    }
    for (name, scores), bodies in itertools.product(kinds.items(), (0, 1, 3, n // 2, n)):
        foreground = torch.zeros(len(ratios), n, dtype=torch.bool)
        foreground[:, torch.randperm(n, generator=torch.Generator().manual_seed(bodies))[:bodies]] = True
        for temperature in (0.5, 4.0):
            mask = draw_masks(scores, foreground, grid, ratios, edge_share, temperature, 0.1, keyed(len(ratios)), block)
            wanted = mask_counts(ratios, grid, block) * block**3
            assert mask.shape == (len(ratios), *grid) and mask.dtype == torch.bool
            assert torch.equal(mask.flatten(1).sum(1), wanted), (name, bodies)
            cells = mask.reshape(-1, grid[0] // block, block, grid[1] // block, block, grid[2] // block, block)
            assert torch.equal(cells.amax((2, 4, 6)), cells.amin((2, 4, 6)))  # whole blocks


def test_mask_counts__is_the_rounded_share_of_blocks_and_never_none():
    ratio = torch.tensor([0.0, 0.3, 0.5, 1.0])
    assert mask_counts(ratio, (6, 6, 6), 1).tolist() == [1, 65, 108, 216]
    assert mask_counts(ratio, (6, 6, 6), 2).tolist() == [1, 8, 14, 27]


def test_draw_masks__refuses_a_block_that_does_not_fit():
    with pytest.raises(ValueError, match="mask_block is 4"):
        draw_masks(
            torch.zeros(1, N), torch.ones(1, N, dtype=torch.bool), GRID, torch.tensor([0.5]), 0.5, 1.0, 0.0, keyed(1), 4
        )


@pytest.mark.parametrize(("temperature", "share"), [(1e6, 0.50), (4.0, 0.70), (2.0, 0.86), (1.0, 0.98), (0.5, 1.00)])
def test_draw_masks__hides_the_top_tenth_as_calibrated(temperature, share):
    # docs/method.md §1.3, measured there: ratio 0.5, gamma(0.7) scores, the whole quota drawn by score, no hints.
    batch = 1500
    scores = z_scores(batch)
    body = torch.ones(batch, N, dtype=torch.bool)
    mask = draw_masks(scores, body, GRID, torch.full((batch,), 0.5), 1.0, temperature, 0.0, keyed(batch)).flatten(1)
    top = torch.zeros_like(mask).scatter_(1, scores.topk(22).indices, True)
    assert (mask & top).sum() / top.sum() == pytest.approx(share, abs=0.03)


def test_draw_masks__prefers_edges_more_as_the_quota_grows():
    batch = 800
    scores = z_scores(batch)
    body = torch.ones(batch, N, dtype=torch.bool)
    top = torch.zeros(batch, N, dtype=torch.bool).scatter_(1, scores.topk(22).indices, True)
    shares = []
    for edge_share in (0.0, 0.25, 0.5, 1.0):
        ratio = torch.full((batch,), 0.4)
        mask = draw_masks(scores, body, GRID, ratio, edge_share, 1.0, 0.0, keyed(batch)).flatten(1)
        shares.append(((mask & top).sum() / top.sum()).item())
    assert shares[0] == pytest.approx(0.4, abs=0.015)
    assert all(late > early + 0.05 for early, late in zip(shares, shares[1:], strict=False))


@pytest.mark.parametrize("path", sorted((CONF / "method").glob("agssd*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("grid", [(4, 4, 4), (6, 6, 6)])
def test_shipped_settings__hide_the_strongest_edges_more_often_than_the_rest_once_under_way(path, grid):
    given = yaml.safe_load(path.read_text())["init_args"]
    names = {"mask_edge_share": "score_share", "mask_temperature": "temperature", "mask_hints": "hints"}
    masks = MaskSampler(grid, (8, 8, 8), "edge", **{names[name]: given[name] for name in names})
    batch, tokens = 600, math.prod(grid)
    scores = z_scores(batch, tokens)
    body = torch.ones(batch, tokens, dtype=torch.bool)
    top = torch.zeros_like(body).scatter_(1, scores.topk(math.ceil(0.1 * tokens)).indices, True)
    for ratio in sorted(set(given["mask_ratio"])):
        lead = []
        for progress in (0.0, 0.5, 1.0):
            now, ratios = masks.schedules(progress), torch.full((batch,), ratio)
            share, temperature = now["mask_edge_share"], now["mask_temperature"]
            mask = draw_masks(scores, body, grid, ratios, share, temperature, masks.hints, keyed(batch)).flatten(1)
            lead.append((mask[top].float().mean() - mask[~top].float().mean()).item())
        assert lead[0] == pytest.approx(0, abs=0.02), "at random at first"
        assert lead[2] > lead[1] > 0.03, (ratio, lead)


def test_draw_masks__hints_show_some_of_the_strongest_and_hide_body_instead():
    batch, ratio = 600, 0.5
    scores = z_scores(batch)
    body = torch.ones(batch, N, dtype=torch.bool)
    body[:, 150:] = False
    ratios = torch.full((batch,), ratio)
    without = draw_masks(scores, body, GRID, ratios, 1.0, 0.5, 0.0, keyed(batch)).flatten(1)
    with_hints = draw_masks(scores, body, GRID, ratios, 1.0, 0.5, 0.1, keyed(batch)).flatten(1)
    top = torch.zeros_like(body).scatter_(1, scores.masked_fill(~body, -torch.inf).topk(22).indices, True)
    shown = without & ~with_hints
    hidden_instead = with_hints & ~without
    assert (shown & ~top).sum() == 0 and (hidden_instead & ~body).sum() == 0
    assert torch.equal(shown.sum(1), hidden_instead.sum(1))
    assert torch.equal(shown.sum(1), (0.1 * (without & top).sum(1)).round().long())


def test_draw_masks__hints_without_spare_body_change_nothing():
    body = torch.zeros(4, N, dtype=torch.bool)
    body[:, :20] = True
    ratio = torch.full((4,), 0.9)
    scores = z_scores(4)
    mask = draw_masks(scores, body, GRID, ratio, 1.0, 1.0, 0.1, keyed(4)).flatten(1)
    assert (mask & body).sum() == body.sum()  # the whole body is in the quota and nothing can replace it
    assert torch.equal(mask.sum(1), mask_counts(ratio, GRID, 1))


def test_draw_masks__background_is_never_in_the_edge_quota():
    batch = 400
    body = torch.rand(batch, N, generator=torch.Generator().manual_seed(0)) < 0.6
    scores = z_scores(batch).masked_fill(~body, 50.0)  # background with the highest scores of all
    ratio = torch.full((batch,), 0.5)
    mask = draw_masks(scores, body, GRID, ratio, 1.0, 1.0, 0.1, keyed(batch)).flatten(1)
    room = body.sum(1) >= mask.sum(1)
    assert room.float().mean() > 0.9
    assert (mask & ~body)[room].sum() == 0


def test_draw_masks__background_has_a_fifth_of_the_weight_in_the_random_quota():
    batch = 6000
    body = torch.zeros(batch, 64, dtype=torch.bool)
    body[:, :32] = True
    mask = draw_masks(
        torch.zeros(batch, 64), body, (4, 4, 4), torch.full((batch,), 1 / 64), 0.0, 1.0, 0.0, keyed(batch)
    ).flatten(1)
    share = (mask & ~body).sum().item() / mask.sum().item()  # one token per sample: exactly by weight
    wanted = BACKGROUND_WEIGHT / (1 + BACKGROUND_WEIGHT)
    assert BACKGROUND_WEIGHT == 0.2
    assert abs(share - wanted) < 4 * math.sqrt(wanted * (1 - wanted) / batch)


@pytest.mark.parametrize("hints", [0.0, 0.1])
def test_draw_masks__a_flat_volume_is_masked_uniformly(hints):
    batch = 8000
    body = torch.ones(batch, 64, dtype=torch.bool)
    ratio = torch.full((batch,), 0.5)
    mask = draw_masks(torch.zeros(batch, 64), body, (4, 4, 4), ratio, 0.5, 1.0, hints, keyed(batch)).flatten(1)
    share = mask.float().mean(0)
    assert (share - 0.5).abs().max() < 4.5 * math.sqrt(0.25 / batch)


def test_draw_masks__do_not_depend_on_the_cut_of_the_batch():
    scores, body = z_scores(6), torch.rand(6, N, generator=torch.Generator().manual_seed(1)) < 0.7
    ratio = torch.linspace(0.3, 0.7, 6)

    def draw(rows):
        return draw_masks(scores[rows], body[rows], GRID, ratio[rows], 0.5, 2.0, 0.1, KeyedRandom(3, rows, "mask"))

    def cuboids(rows):
        return draw_cuboids(GRID, ratio[rows], KeyedRandom(3, rows, "mask"))

    for function in (draw, cuboids):
        whole = function(torch.arange(6))
        assert torch.equal(torch.cat([function(rows) for rows in torch.arange(6).split([1, 2, 3])]), whole)
        assert not torch.equal(whole[0], whole[1])


@pytest.mark.parametrize(("grid", "block"), [((6, 6, 6), 1), ((8, 8, 8), 2), ((3, 5, 4), 1), ((2, 2, 2), 1)])
def test_draw_cuboids__count_is_exact(grid, block):
    ratio = torch.linspace(0.01, 1.0, 64)
    mask = draw_cuboids(grid, ratio, keyed(64), block)
    assert torch.equal(mask.flatten(1).sum(1), mask_counts(ratio, grid, block) * block**3)
    cells = mask.reshape(-1, grid[0] // block, block, grid[1] // block, block, grid[2] // block, block)
    assert torch.equal(cells.amax((2, 4, 6)), cells.amin((2, 4, 6)))


def hidden_neighbours(mask):
    """Share of face neighbours of hidden tokens that are hidden too."""
    pairs = hits = 0
    for axis in (1, 2, 3):
        first, second = mask.narrow(axis, 0, mask.shape[axis] - 1), mask.narrow(axis, 1, mask.shape[axis] - 1)
        pairs += first.sum() + second.sum()
        hits += 2 * (first & second).sum()
    return (hits / pairs).item()


def test_draw_cuboids__hide_regions_not_scattered_tokens():
    batch = 500
    ratio = torch.full((batch,), 0.4)
    body = torch.ones(batch, N, dtype=torch.bool)
    scattered = draw_masks(torch.zeros(batch, N), body, GRID, ratio, 0.0, 1.0, 0.0, keyed(batch))
    assert hidden_neighbours(scattered) == pytest.approx(0.4, abs=0.02)
    assert hidden_neighbours(draw_cuboids(GRID, ratio, keyed(batch))) > 0.6


def test_masked_indices__lists_hidden_tokens_in_raster_order_and_pads_with_shown_ones():
    mask = torch.rand(20, 50, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[0], mask[1] = False, True
    index, used = masked_indices(mask, 50)
    for row in range(20):
        assert index[row][used[row]].tolist() == mask[row].nonzero()[:, 0].tolist()
        assert used[row].sum() == mask[row].sum()
        assert not mask[row][index[row][~used[row]]].any()
        assert sorted(index[row].tolist()) == list(range(50))
    short, used = masked_indices(mask[2:], int(mask[2:].sum(1).max()))
    assert torch.equal(used.sum(1), mask[2:].sum(1)) and short.shape == used.shape


@pytest.mark.parametrize("score", get_args(MaskScore))
@pytest.mark.parametrize("block", [1, 2])
def test_mask_sampler__hides_as_many_as_it_says_for_every_score(score, block):
    masks = MaskSampler((4, 4, 4), (4, 4, 4), score, block)
    generator = torch.Generator().manual_seed(0)
    image, edges = torch.rand(2, 8, 1, 16, 16, 16, generator=generator)
    body = torch.rand(8, 64, generator=generator) < 0.7
    for ratio in (0.1, 0.6, 0.75):
        ratios = torch.full((8,), ratio)
        mask = masks.draw(keyed(8), ratios, 0.5, body, image, edges, torch.randn(8, 64, generator=generator))
        assert set(mask.flatten(1).sum(1).tolist()) == {masks.exact(ratio)}
        assert masks.exact(ratio) <= masks.limit(ratio) < masks.exact(ratio) + block**3 + 1


@pytest.mark.parametrize("score", ["edge", "region", "entropy", "attention", "loss"])
def test_mask_sampler__prefers_its_score_more_as_the_run_proceeds(score):
    # Patch n of the second half of the grid holds noise (edges, entropy, high scores); of the first half nothing.
    masks = MaskSampler((4, 4, 4), (4, 4, 4), score, hints=0.0)
    rich = torch.arange(64) >= 32
    image = torch.zeros(64, 1, 16, 16, 16)
    image[:, :, 8:] = torch.rand(64, 1, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    given = torch.where(rich, 1.0, -1.0).expand(64, -1)
    shares = []
    for progress in (0.0, 0.5, 1.0):
        ratio, body = torch.full((64,), 0.4), torch.ones(64, 64, dtype=torch.bool)
        mask = masks.draw(keyed(64), ratio, progress, body, image, image, given).flatten(1)
        shares.append(float(mask[:, rich].sum() / mask.sum()))
    assert shares[0] == pytest.approx(0.5, abs=0.03)
    assert shares[1] > shares[0] + 0.03 and shares[2] > shares[1] + 0.03


def test_mask_sampler__entropy_asks_the_body_alone():
    masks = MaskSampler((4, 4, 4), (4, 4, 4), "entropy", score_share=1.0, hints=0.0)
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(64, 1, 16, 16, 16, generator=generator)
    image[:, :, :8] *= torch.rand(64, 1, 8, 1, 1, generator=generator)  # body of several entropies
    image[:, :, 0, 0, 0], image[:, :, 0, 0, 1] = 0.0, 1.0  # and of the whole range
    body = torch.arange(64).expand(64, -1) < 32
    flat, noisy = image.clone(), image.clone()
    flat[:, :, 8:], noisy[:, :, 8:] = 0.5, torch.rand(64, 1, 8, 16, 16, generator=generator)
    scores = [masks.scores(body, volume, None)[:, :32] for volume in (flat, noisy)]
    assert torch.equal(scores[0], scores[1]) and float(scores[0].std()) > 0.5
    # Air, however noisy, is not what is drawn by score.
    mask = masks.draw(keyed(64), torch.full((64,), 0.25), 1.0, body, noisy).flatten(1)
    assert not (mask & ~body).any()


@pytest.mark.parametrize(("grid", "block"), [((3, 3, 3), 1), ((4, 6, 2), 2), ((2, 2, 2), 1)])
def test_error_by_halves__asks_every_patch_once_while_it_and_its_block_are_hidden(grid, block):
    masks, count = MaskSampler(grid, (4, 4, 4), "loss", block), math.prod(grid)
    asked = []

    def error(mask, index):
        asked.append(mask.flatten(1))
        assert mask.dtype == torch.bool and mask.shape == (5, *grid)
        assert mask.flatten(1).gather(1, index).all() and index.shape[1] == int(mask[0].sum())
        return 100.0 * torch.arange(5)[:, None] + index

    found = masks.error_by_halves(keyed(5), error)
    assert torch.equal(found, 100.0 * torch.arange(5)[:, None] + torch.arange(count))
    assert len(asked) == 2 and torch.equal(asked[0], ~asked[1])
    assert abs(int(asked[0][0].sum()) - count / 2) <= block**3 / 2
    assert len({tuple(row) for row in asked[0].tolist()}) > 1  # each view has halves of its own
    coarse = asked[0].reshape(-1, grid[0] // block, block, grid[1] // block, block, grid[2] // block, block)
    assert torch.equal(coarse.amax((2, 4, 6)), coarse.amin((2, 4, 6)))
