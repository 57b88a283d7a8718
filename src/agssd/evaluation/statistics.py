"""Intervals of paired comparisons over subjects and seeds."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Interval(NamedTuple):
    """A mean with its percentile interval."""

    mean: float
    low: float
    high: float


def bootstrap_mean(
    values: npt.NDArray[np.float64], level: float = 0.95, draws: int = 10_000, seed: int = 0
) -> Interval:
    """Return the mean of a table with an interval over its rows and columns.

    Args:
        values: (S, N) one figure per seed and subject; for a paired comparison the differences.
        level: coverage in (0, 1).
        draws: bootstrap samples.
        seed: of the draws.

    Returns:
        The mean and its percentile interval when seeds and subjects are both drawn anew with replacement (crossed
        bootstrap). With one seed only subjects vary; with few seeds the share of the seeds is roughly estimated and
        rather too small.

    Raises:
        ValueError: if the table is empty or holds NaN.
    """
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        raise ValueError(f"values of shape {values.shape} must be a table (seeds, subjects) of finite figures")
    rng = np.random.default_rng(seed)
    seeds, subjects = values.shape
    # how often each row and column was drawn; the mean of the drawn table is then two products
    rows = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws) / seeds
    columns = rng.multinomial(subjects, np.full(subjects, 1 / subjects), size=draws) / subjects
    means = np.einsum("ds,sn,dn->d", rows, values, columns, optimize=True)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean()), float(low), float(high))


def paired_difference(
    first: npt.NDArray[np.float64],
    second: npt.NDArray[np.float64],
    level: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Return the mean of ``first - second`` over the same subjects with its interval.

    Args:
        first: (S, N) figures per seed and subject.
        second: (S, N) or (1, N), subjects in the same order; seeds are paired by position.
        level: coverage in (0, 1).
        draws: bootstrap samples.
        seed: of the draws.

    Raises:
        ValueError: if the tables cannot be paired.
    """
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise ValueError(f"tables {first.shape} and {second.shape} must hold the same subjects in their columns")
    if first.shape[0] != second.shape[0] and 1 not in (first.shape[0], second.shape[0]):
        raise ValueError(
            f"{first.shape[0]} and {second.shape[0]} seeds cannot be paired; give as many of both, or one of either"
        )
    return bootstrap_mean(first - second, level, draws, seed)
