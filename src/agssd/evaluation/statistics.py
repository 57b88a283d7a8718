"""Intervals and tests for figures that vary with seeds, label draws and subjects at once.

A table of figures has one axis per source of variation (pretraining seeds, draws of the labels, subjects), every level
of one combined with every level of the others. Each source is random: another run would draw other seeds and subjects.
The variance of the mean is estimated from the mean squares of the crossed analysis of variance, with Satterthwaite's
degrees of freedom, and the interval is Student's; it is never narrower than that of one axis alone, seeds above all. In
simulations with 3 seeds, 5 draws and 20 subjects, or 3 seeds, all labels and 25 subjects, it covers 94 to 100 % of
truths where 95 % are promised. Drawing seeds, draws and subjects anew (a bootstrap) covers 80 to 88 % where
seeds matter, because three seeds cannot show how seeds vary; tests/evaluation/test_statistics.py prints both. A source
with one level cannot be judged: its variation is not in the interval. Subjects of folds stand side by side; that each
fold has encoders and draws of its own costs no coverage, but what the training subjects of a fold have in common is not
in the interval: were it as strong as what subjects differ by, three folds would cover 88 %. Of a balanced accuracy,
whose subjects count by how rare their class is, intervals cover 95 to 99 %, but 87 % where seeds alone decide who is
found; differences between methods that are equal are found in less than 5 % of trials throughout.

Source: variance components of crossed random effects (Cornfield and Tukey 1956), Satterthwaite 1946, Holm 1979; the
choice is ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

Table = npt.NDArray[np.float64]


class Interval(NamedTuple):
    """A mean with its interval."""

    mean: float
    low: float
    high: float
    p: float  # two-sided, that the true mean is 0; without corrections

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of 0."""
        return self.low > 0 or self.high < 0


def crossed_mean(values: Table, level: float = 0.95) -> Interval:
    """Return the mean of a table with the interval in which the mean over all levels of every axis is expected.

    Args:
        values: one axis per source of variation, for example (seeds, draws, subjects); for a paired comparison the
            differences.
        level: coverage in (0, 1).

    Raises:
        ValueError: if the table is empty, holds a figure that is not finite, or one figure alone.
    """
    if not values.ndim or not values.size or not np.isfinite(values).all():
        raise ValueError(f"values of shape {values.shape} must be a table of finite figures")
    if values.size == 1:
        raise ValueError("one figure alone has no interval; give several subjects, draws or seeds")
    mean = float(values.mean())
    errors = [(math.sqrt(one), freedom) for one, freedom in _variances_of_mean(values.astype(np.float64)) if one > 0]
    if not errors:
        return Interval(mean, mean, mean, 1.0 if mean == 0 else 0.0)
    reach = max(float(stats.t.ppf((1 + level) / 2, freedom)) * error for error, freedom in errors)
    p = max(float(2 * stats.t.sf(abs(mean) / error, freedom)) for error, freedom in errors)
    return Interval(mean, mean - reach, mean + reach, p)


def paired_difference(first: Table, second: Table, level: float = 0.95) -> Interval:
    """Return the mean of ``first - second`` over the same subjects with its interval.

    Args:
        first: a table whose last axis are subjects.
        second: of the same shape, subjects in the same order; an axis of 1 stands against every level of the other.
        level: coverage in (0, 1).

    Raises:
        ValueError: if the tables cannot be paired.
    """
    if first.ndim != second.ndim or first.shape[-1] != second.shape[-1]:
        raise ValueError(f"tables {first.shape} and {second.shape} must hold the same subjects in their columns")
    for one, other in zip(first.shape, second.shape, strict=True):
        if one != other and 1 not in (one, other):
            raise ValueError(
                f"{one} and {other} seeds or draws cannot be paired; give as many of both, or one of either"
            )
    return crossed_mean(first - second, level)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return p-values corrected for having made all these comparisons, by Holm's step-down method.

    Under any dependence, the chance of even one corrected value below a where nothing differs is at most a.
    """
    order = sorted(p_values, key=lambda name: p_values[name])
    corrected, highest = {}, 0.0
    for place, name in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - place) * p_values[name]))
        corrected[name] = highest
    return {name: corrected[name] for name in p_values}


def _variances_of_mean(values: Table) -> list[tuple[float, float]]:
    """Return estimates of the variance of the mean with their degrees of freedom.

    The first is of all sources together, unbiased where it is not below what the strongest source alone says, which it
    is raised to. The others are of each axis alone: an interval that is as wide as any of theirs still covers where
    few levels, of seeds above all, make the first one's degrees of freedom look higher than they are.
    """
    squares = {sources: _mean_square(values, sources) for sources in _subsets(values)}
    alone = [one for sources, one in squares.items() if len(sources) == 1]
    signed = [(1 if len(sources) % 2 else -1, *one) for sources, one in squares.items()]
    total = sum(sign * square for sign, square, _ in signed)
    together = max(alone)
    if total > together[0]:
        together = total, total**2 / sum(square**2 / freedom for _, square, freedom in signed)
    return [(square / values.size, freedom) for square, freedom in (together, *alone)]


def _subsets(values: Table) -> Iterator[tuple[int, ...]]:
    axes = [axis for axis, length in enumerate(values.shape) if length > 1]
    for count in range(1, len(axes) + 1):
        yield from combinations(axes, count)


def _mean_square(values: Table, sources: Sequence[int]) -> tuple[float, float]:
    """Return the mean square of the (joint) effect of axes, and its degrees of freedom."""
    effect = np.zeros((1,) * values.ndim)
    for count in range(len(sources) + 1):
        for kept in combinations(sources, count):
            others = tuple(axis for axis in range(values.ndim) if axis not in kept)
            effect = effect + (-1) ** (len(sources) - count) * values.mean(axis=others, keepdims=True)
    freedom = math.prod(values.shape[axis] - 1 for axis in sources)
    cells = math.prod(values.shape[axis] for axis in sources)
    return float((effect**2).sum()) * values.size / cells / freedom, float(freedom)
