"""Sources are mixed in the shares asked for, exactly, and every sample is a function of seed and number."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from agssd.data_modules.mixing import BLOCK, Mixture, weights_by_temperature
from agssd.data_modules.sampling import case_of_sample


def test_mixture__without_weights__every_case_alike() -> None:
    mixture = Mixture(3, [2, 0, 5])
    for first in range(0, 70, 7):
        assert sorted(mixture.row(n) for n in range(first, first + 7)) == list(range(7))
    assert [mixture.row(n) for n in range(40)] == [case_of_sample(3, n, 7) for n in range(40)]
    assert [mixture.source(row) for row in range(7)] == [0, 0, 2, 2, 2, 2, 2]


@pytest.mark.parametrize(("weights", "shares"), [([1, 1, 1], [3334, 3333, 3333]), ([0.7, 0.2999, 0.0001], None)])
def test_mixture__weights__exact_in_every_block_and_mixed_within(weights: list[float], shares: list[int]) -> None:
    sizes = [3, 50, 7]
    mixture = Mixture(1, sizes, weights)
    shares = shares or [7000, 2999, 1]
    orders = []
    for block in range(3):
        rows = [mixture.row(n) for n in range(block * BLOCK, (block + 1) * BLOCK)]
        sources = [mixture.source(row) for row in rows]
        assert [sources.count(source) for source in range(3)] == shares
        orders.append(sources)
    assert orders[0] != orders[1]
    first = orders[0][: BLOCK // 2].count(0)  # hypergeometric; its standard deviation is below 25
    assert abs(first - shares[0] / 2) < 130


def test_mixture__each_source_goes_through_its_cases_before_any_comes_again() -> None:
    mixture = Mixture(0, [5, 4], [3, 1])
    rows = [mixture.row(n) for n in range(2 * BLOCK)]
    for source, cases in ((0, range(5)), (1, range(5, 9))):
        drawn = [row for row in rows if mixture.source(row) == source]
        passes = [drawn[n : n + len(cases)] for n in range(0, len(drawn) - len(cases), len(cases))]
        assert all(sorted(one) == list(cases) for one in passes)
        assert len({tuple(one) for one in passes[:50]}) > 10
    assert Counter(rows)[0] == pytest.approx(2 * BLOCK * 0.75 / 5, abs=1)


def test_mixture__sources_of_one_size_have_orders_of_their_own() -> None:
    mixture = Mixture(0, [30, 30], [1, 1])
    rows = [mixture.row(n) for n in range(400)]
    first, second = ([row % 30 for row in rows if mixture.source(row) == source][:30] for source in (0, 1))
    assert sorted(first) == sorted(second) and first != second


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5]])
def test_samples_per_source__equals_counting(weights: list[float] | None) -> None:
    mixture = Mixture(5, [4, 9, 6], weights)
    counted = np.cumsum([np.eye(3, dtype=int)[mixture.source(mixture.row(n))] for n in range(BLOCK + 500)], axis=0)
    for samples in (1, 18, 19, 20, 777, BLOCK - 1, BLOCK, BLOCK + 1, BLOCK + 500):
        assert mixture.samples_per_source(samples) == counted[samples - 1].tolist()
    assert mixture.samples_per_source(0) == [0, 0, 0]


def test_mixture__order__depends_on_seed_and_sample_alone() -> None:
    one, same, other = Mixture(1, [9, 4], [1, 1]), Mixture(1, [9, 4], [1, 1]), Mixture(2, [9, 4], [1, 1])
    places = np.random.default_rng(0).integers(0, 10**7, 200)
    assert [one.row(int(n)) for n in places] == [same.row(int(n)) for n in places[::-1]][::-1]
    assert [one.row(int(n)) for n in places] != [other.row(int(n)) for n in places]


def test_weights_by_temperature__from_cases_to_caches_alike() -> None:
    assert weights_by_temperature([10, 1000], 1) == pytest.approx([10, 1000])
    assert weights_by_temperature([10, 1000], 2) == pytest.approx([10**0.5, 1000**0.5])
    almost = weights_by_temperature([10, 1000], 1e6)
    assert almost[0] / almost[1] == pytest.approx(1, abs=1e-4)
    for wrong in (0.5, 0, -1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"data\.temperature"):
            weights_by_temperature([1, 2], wrong)


@pytest.mark.parametrize(
    ("sizes", "weights", "reason"),
    [
        ([3, 4], [1.0], "data.weights has 1 numbers for 2 caches"),
        ([3, 4], [1.0, 0.0], "positive numbers"),
        ([3, 4], [1.0, float("nan")], "positive numbers"),
        ([3, 0], [1.0, 1.0], "cache number 1 .* has no training case"),
        ([3, 4], [1e-5, 1.0], "cache number 0 .* below 1 in 10000"),
    ],
)
def test_mixture__impossible_weights__refused(sizes: list[int], weights: list[float], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Mixture(0, sizes, weights)
