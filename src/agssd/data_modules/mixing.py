"""Mixing sources: which case of which cache sample ``n`` is, and how often each source was drawn.

Like all of the stream a pure function of ``(seed, n)``; counts per source follow from the number of samples seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from agssd.data_modules.sampling import case_of_sample, keyed_generator, pass_order

BLOCK = 10_000  # samples in which every source has its exact count
_BLOCK_STREAM = 4


class Mixture:
    """The cases of several sources in an endless order.

    Without weights every pass is a permutation of all cases, so that each weighs the same whatever its source. With
    weights every block of 10 000 samples holds an exact count of each source, in a random order, and each source's
    own samples go through its cases in one permutation after another. Rows are numbered through all sources.

    Args:
        seed: of the stream, non-negative.
        sizes: number of cases of each source.
        weights: of the sources, any positive scale; their shares are rounded to 1 in 10 000.

    Raises:
        ValueError: for weights that are no positive numbers, not one per source, too unequal, or of an empty source.
    """

    def __init__(self, seed: int, sizes: Sequence[int], weights: Sequence[float] | None = None) -> None:
        """Turn weights into counts per block."""
        self.seed = seed
        self.sizes = tuple(sizes)
        self.starts = (0, *np.cumsum(self.sizes).tolist())
        self.counts = None if weights is None else _counts(self.sizes, weights)

    def row(self, sample: int) -> int:
        """Return the row of sample ``sample``."""
        if self.counts is None:
            return case_of_sample(self.seed, sample, self.starts[-1])
        block, position = divmod(sample, BLOCK)
        sources, turns = _block(self.seed, self.counts, block)
        source = int(sources[position])
        turn = block * self.counts[source] + int(turns[position])
        return int(self.starts[source]) + case_of_sample(self.seed, turn, self.sizes[source], source)

    def source(self, row: int) -> int:
        """Return the source of a row."""
        return int(self._sources(np.asarray([row]))[0])

    def samples_per_source(self, samples: int) -> list[int]:
        """Return how many of the first ``samples`` samples come from each source."""
        if len(self.sizes) == 1:
            return [samples]
        per_round = self.sizes if self.counts is None else self.counts
        rounds, rest = divmod(samples, sum(per_round))
        if self.counts is None:
            sources = self._sources(pass_order(self.seed, rounds, self.starts[-1], 0)[:rest])
        else:
            sources = _block(self.seed, self.counts, rounds)[0][:rest]
        begun = np.bincount(sources, minlength=len(self.sizes))
        return [rounds * count + int(more) for count, more in zip(per_round, begun, strict=True)]

    def _sources(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.searchsorted(self.starts, rows, side="right") - 1


def weights_by_temperature(sizes: Sequence[int], temperature: float) -> list[float]:
    """Return ``size ** (1 / temperature)`` of each source.

    1 draws every case equally often; the higher, the more alike the sources' shares. Source: temperature-based
    sampling of languages (Arivazhagan et al. 2019, arXiv:1907.05019), on numbers of cases.

    Raises:
        ValueError: if the temperature is below 1 or not finite.
    """
    if not 1 <= temperature < math.inf:
        raise ValueError(f"data.temperature is {temperature}; give a number of at least 1 (1: every case alike)")
    return [float(size ** (1 / temperature)) for size in sizes]


def _counts(sizes: Sequence[int], weights: Sequence[float]) -> tuple[int, ...]:
    """Return the samples of each source in a block, by largest remainders."""
    if len(weights) != len(sizes):
        raise ValueError(f"data.weights has {len(weights)} numbers for {len(sizes)} caches; give one for each")
    if empty := [source for source, size in enumerate(sizes) if not size]:
        raise ValueError(
            f"cache number {empty[0]} of data.cache (from 0) has no training case, so it cannot be given a share; "
            "leave it out"
        )
    if not all(0 < weight < math.inf for weight in weights):
        raise ValueError(f"data.weights is {list(weights)}; give positive numbers, and leave out what is not wanted")
    quota = BLOCK * np.asarray(weights, dtype=np.float64) / math.fsum(weights)
    counts = np.floor(quota).astype(np.int64)
    for source in np.argsort(counts - quota, kind="stable")[: BLOCK - int(counts.sum())]:
        counts[source] += 1
    if not counts.all():
        raise ValueError(
            f"the share of cache number {int(np.argmin(counts))} of data.cache (from 0) is below 1 in {BLOCK} samples; "
            "raise its weight or leave it out"
        )
    return tuple(int(count) for count in counts)


@lru_cache(maxsize=8)
def _block(seed: int, counts: tuple[int, ...], block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the source of each sample of a block, and the sample's turn among those of its source."""
    sources = keyed_generator(seed, _BLOCK_STREAM, block).permutation(np.repeat(np.arange(len(counts)), counts))
    turns = np.empty(BLOCK, dtype=np.int64)
    for source, count in enumerate(counts):
        turns[sources == source] = np.arange(count)
    return sources, turns
