"""Intervals cover what they promise, and pairing removes what subjects share."""

from __future__ import annotations

import numpy as np
import pytest

from agssd.evaluation.statistics import bootstrap_mean, paired_difference


def test_bootstrap_mean__known_truth__covered_about_95_percent() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        values = 0.3 + rng.normal(0, 0.1, (1, 40))
        interval = bootstrap_mean(values, draws=1000, seed=trial)
        covered += interval.low <= 0.3 <= interval.high
    assert 0.90 <= covered / 300 <= 0.98


def test_bootstrap_mean__crossed_effects__width_near_the_formula() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(0, 1, (30, 1)) + rng.normal(0, 2, (1, 50)) + 0.0
    interval = bootstrap_mean(values)
    expected = np.sqrt(values.mean(1).var() / 30 + values.mean(0).var() / 50)
    assert (interval.high - interval.low) / (2 * 1.96) == pytest.approx(expected, rel=0.1)


def test_paired_difference__shared_subject_effect__removed() -> None:
    rng = np.random.default_rng(2)
    subject = rng.normal(0, 1, (1, 60))
    first, second = subject + 0.05 + rng.normal(0, 0.02, (3, 60)), subject + rng.normal(0, 0.02, (3, 60))
    interval = paired_difference(first, second)
    assert interval.low > 0.03 and interval.high < 0.07
    whole = bootstrap_mean(first)
    assert whole.low < 0 < whole.high
    reverse = paired_difference(second, first)
    assert reverse.mean == pytest.approx(-interval.mean)


def test_paired_difference__tables_that_do_not_pair__refused() -> None:
    with pytest.raises(ValueError, match="same subjects"):
        paired_difference(np.zeros((1, 3)), np.zeros((1, 4)))
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_difference(np.zeros((2, 3)), np.zeros((3, 3)))
    with pytest.raises(ValueError, match="finite"):
        bootstrap_mean(np.array([[np.nan]]))
