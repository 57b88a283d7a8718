"""Regions of two views: which ones a loss looks at, and how each is spread over the cells of a map."""

from __future__ import annotations

import torch
from torch import Tensor

from agssd.transforms.keyed_random import KeyedRandom
from agssd.types import Size


def draw_regions(regions: Tensor, count: int, min_voxels: int, random: KeyedRandom) -> Tensor:
    """Draw ``count`` numbers of regions per sample among those that all its views hold, each region equally likely.

    None is drawn twice before all were drawn once, so with fewer than ``count`` of them each is there equally often,
    give or take one.

    Args:
        regions: (B, V, 1, [D,] H, W) integers, 0 = none.
        count: K, at most as many as a view has voxels.
        min_voxels: a view holds a region if so many of its voxels belong to it, 1 or more.
        random: keyed by the B samples.

    Returns:
        (B, K) int64, 0 where a sample has no such region.
    """
    batch, views = regions.shape[:2]
    flat = regions.flatten(2).long()  # (B, V, n)
    # Sorted by number and then by view: a run of one number is a region.
    tagged = (flat * views + torch.arange(views, device=flat.device)[:, None]).flatten(1).sort(1).values
    number, view = torch.div(tagged, views, rounding_mode="floor"), tagged % views
    run = (number.diff(dim=1, prepend=number[:, :1]) != 0).cumsum(1)  # (B, V n), from 0
    length = run.shape[1]
    held = torch.zeros(batch, views * length, dtype=torch.int32, device=flat.device)
    held.scatter_add_(1, view * length + run, torch.ones_like(run, dtype=torch.int32))
    names = torch.zeros_like(number).scatter_(1, run, number)  # (B, V n): the number of each run, then 0
    found = (names > 0) & (held.unflatten(1, (views, length)).amin(1) >= min_voxels)
    score = torch.where(found, random.of_numbers(names), torch.zeros((), device=flat.device))
    best = score.topk(count, dim=1)
    drawn = torch.where(best.values > 0, names.gather(1, best.indices), torch.zeros_like(best.indices))
    distinct = (drawn > 0).sum(1, keepdim=True).clamp_min(1)
    return drawn.gather(1, torch.arange(count, device=flat.device) % distinct)


class RegionSlots:
    """Which of the regions to look at each voxel belongs to; found once, and spread over the cells of any map.

    Args:
        regions: (V, *size) integers, 0 = none.
        numbers: (V, K) int64, regions to look at, any of them repeatedly; 0 for none.
    """

    def __init__(self, regions: Tensor, numbers: Tensor) -> None:
        self.size, self.count = tuple(regions.shape[1:]), numbers.shape[1]
        known = numbers.sort(1).values
        flat = regions.flatten(1).long()
        slot = torch.searchsorted(known, flat).clamp_max(self.count - 1)  # the first of equal ones
        # (V, n); the last slot, of voxels of no region or of none to look at, is thrown away
        self._slot = torch.where((known.gather(1, slot) == flat) & (flat > 0), slot, self.count)
        self._own = torch.searchsorted(known, numbers)
        self._one = torch.ones((), device=flat.device).expand_as(self._slot)

    def weights(self, cells: Size) -> Tensor:
        """Return how each region is spread over the cells of a map: the weights of its mean feature.

        Cells divide the image evenly; those of an encoder whose last cells reach beyond it (a view that is no multiple
        of the stride) are taken a little too small.

        Args:
            cells: of the map.

        Returns:
            (V, K, N) float32: share of the region's voxels that lies in each cell, in raster order; 0 for a region
            that is not there.
        """
        total, cell = 1, torch.zeros((), dtype=torch.int64, device=self._slot.device)
        for axis, (length, n) in enumerate(zip(self.size, cells, strict=True)):
            at = torch.div(torch.arange(length, device=cell.device) * n, length, rounding_mode="floor")
            cell = cell * n + at.view(-1, *[1] * (len(cells) - 1 - axis))
            total *= n
        votes = torch.zeros(len(self._slot), (self.count + 1) * total, device=cell.device)
        votes.scatter_add_(1, self._slot * total + cell.flatten(), self._one)
        own = self._own[..., None].expand(-1, -1, total)
        spread = votes.unflatten(1, (self.count + 1, total)).gather(1, own)
        weights: Tensor = spread / spread.sum(-1, keepdim=True).clamp_min(1)
        return weights
