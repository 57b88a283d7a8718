"""Which regions are drawn, and how they are spread over the cells of a map."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from agssd.transforms.keyed_random import KeyedRandom
from agssd.transforms.regions import RegionSlots, draw_regions


def maps(batch: int, size: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Return (B, 2, 1, *size) int32: pieces of both views, some of them in one view alone, and a fifth of air."""
    rng = np.random.default_rng(seed)
    ones = [1] * len(size)
    pieces = rng.integers(1, 9, (batch, 1, 1, *ones))
    both = 1000 * (1 + (rng.random((batch, 2, 1, *size)) * pieces).astype(int)) + rng.integers(
        0, 3, (batch, 1, 1, *ones)
    )
    both[:, 1] += 1000 * rng.integers(0, 2, (batch, 1, *size)) * 5
    both[rng.random(both.shape) < 0.2] = 0
    return torch.from_numpy(both.astype(np.int32))


def held(view: torch.Tensor, least: int) -> set[int]:
    numbers, counts = view.unique(return_counts=True)
    return {int(n) for n, count in zip(numbers, counts, strict=True) if n > 0 and count >= least}


@pytest.mark.parametrize("size", [(12, 10), (6, 5, 4)])
@pytest.mark.parametrize("least", [1, 9])
def test_draw_regions__are_those_that_both_views_hold__each_once_before_any_twice(
    size: tuple[int, ...], least: int
) -> None:
    regions = maps(40, size)
    drawn = draw_regions(regions, 12, least, KeyedRandom(0, torch.arange(40), "regions"))
    assert drawn.shape == (40, 12) and drawn.dtype == torch.int64
    sizes = set()
    for sample, numbers in zip(regions, drawn.tolist(), strict=True):
        common = held(sample[0], least) & held(sample[1], least)
        counts = Counter(numbers)
        sizes.add(len(common))
        assert set(counts) == (common or {0})
        assert max(counts.values()) - min(counts.values()) <= 1
    assert len(sizes) > 2
    few = draw_regions(regions, 3, least, KeyedRandom(0, torch.arange(40), "regions"))
    for row, more in zip(few.tolist(), drawn.tolist(), strict=True):
        assert len(set(row)) == min(3, len(set(more)))


def test_draw_regions__without_a_common_region_gives_none() -> None:
    regions = torch.stack([torch.full((1, 4, 4), 3), torch.full((1, 4, 4), 5)])[None].int()
    assert not draw_regions(regions, 4, 1, KeyedRandom(0, torch.arange(1), "regions")).any()
    assert not draw_regions(0 * regions, 4, 1, KeyedRandom(0, torch.arange(1), "regions")).any()


def test_draw_regions__every_region_is_as_likely_whatever_its_size_and_the_batch() -> None:
    sample = torch.arange(4000)
    row = torch.repeat_interleave(torch.tensor([7, 90, 4, 2**31 - 1, 0, 12]), torch.tensor([1, 50, 5, 20, 9, 15]))
    regions = row.int().expand(len(sample), 2, 1, 1, -1)
    drawn = draw_regions(regions, 2, 1, KeyedRandom(3, sample, "regions"))
    counts = Counter(drawn.flatten().tolist())
    assert set(counts) == {7, 90, 4, 2**31 - 1, 12}
    for count in counts.values():  # binomial: five deviations
        assert abs(count - 1600) < 5 * (4000 * 0.4 * 0.6) ** 0.5
    parts = [
        draw_regions(r, 2, 1, KeyedRandom(3, s, "regions"))
        for r, s in zip(regions.split(1500), sample.split(1500), strict=True)
    ]
    assert torch.equal(torch.cat(parts), drawn)


@pytest.mark.parametrize(
    ("size", "cells"), [((12, 8), (3, 2)), ((7, 9), (3, 4)), ((6, 4), (12, 4)), ((8, 6, 4), (2, 3, 1))]
)
def test_region_slots__count_voxels_per_cell(size: tuple[int, ...], cells: tuple[int, ...]) -> None:
    regions = maps(3, size)[:, 0, 0]
    there = [row[row > 0].unique().tolist() for row in regions]
    numbers = torch.tensor([[*row[:1], 5, 0, row[-1], row[0]] for row in there])
    found = RegionSlots(regions, numbers).weights(cells)
    for v in range(3):
        for k, number in enumerate(numbers[v].tolist()):
            wanted = np.zeros(cells)
            for place in zip(*np.nonzero((regions[v] == number).numpy()), strict=True):
                wanted[tuple(i * n // length for i, n, length in zip(place, cells, size, strict=True))] += number > 0
            wanted /= max(wanted.sum(), 1)
            assert np.allclose(found[v, k].numpy(), wanted.reshape(-1), atol=1e-6)
    assert (found.sum(-1) > 0.99).float().mean() == 0.6
