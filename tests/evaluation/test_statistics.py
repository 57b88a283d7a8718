"""Intervals cover what they promise, tests err as often as they say, and pairing removes what is shared."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from agssd.evaluation.statistics import crossed_mean, holm, paired_difference

# standard deviations of seeds, draws, subjects, their three pairs, and of what is left
SOURCES = {
    "everything varies": (1, 1, 1, 0.5, 0.5, 0.5, 1),
    "seeds alone": (1, 0, 0, 0, 0, 0, 1),
    "subjects alone": (0, 0, 1, 0, 0, 0, 1),
    "noise alone": (0, 0, 0, 0, 0, 0, 1),
    "draws and subjects": (0, 1, 1, 0.3, 0.3, 0.3, 1),
    "subjects first": (0.3, 0.3, 1, 0.3, 0.3, 0.3, 1),
}
SIZE = (3, 5, 20)  # seeds, draws, subjects


def draw(rng: np.random.Generator, name: str, size: tuple[int, int, int] = SIZE) -> np.ndarray:
    """Return a table with mean 0 whose subjects are skewed, as Dice is."""
    seeds, draws, subjects = size
    shapes = [(seeds, 1, 1), (1, draws, 1), (1, 1, subjects), (seeds, draws, 1), (seeds, 1, subjects)]
    shapes += [(1, draws, subjects), size]
    parts = [rng.normal(size=shape) for shape in shapes]
    parts[2] = 1 - rng.exponential(size=shapes[2])
    return np.asarray(sum(sd * part for sd, part in zip(SOURCES[name], parts, strict=True)))


def bootstrap(values: np.ndarray, rng: np.random.Generator, times: int = 400) -> tuple[float, float]:
    """Return the percentile interval of drawing the levels of every axis anew."""
    means = values[None]
    for length in reversed(values.shape):
        often = rng.multinomial(length, np.full(length, 1 / length), size=times) / length
        means = np.einsum("t...l,tl->t...", np.broadcast_to(means, (times, *means.shape[1:])), often)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


@pytest.mark.parametrize("name", SOURCES)
def test_crossed_mean__covers_the_truth_as_often_as_promised(name: str) -> None:
    rng = np.random.default_rng(0)
    trials, ours, drawn_anew = 600, 0, 0
    for trial in range(trials):
        values = draw(rng, name)
        interval = crossed_mean(values)
        ours += interval.low <= 0 <= interval.high
        if trial < 200:
            low, high = bootstrap(values, rng)
            drawn_anew += low <= 0 <= high
    print(f"{name}: {ours / trials:.3f} covered of 0.95, by a bootstrap {drawn_anew / 200:.3f}")
    assert 0.925 <= ours / trials  # at least as promised, within the error of 600 trials
    if name in ("seeds alone", "everything varies"):
        assert drawn_anew / 200 < 0.92  # why there is no bootstrap
    elif name != "noise alone":  # there each axis is given a part in what is noise
        assert ours / trials <= 0.985  # no wider than it has to be


def test_crossed_mean__one_axis_is_students_interval() -> None:
    values = np.random.default_rng(1).normal(0.3, 1, 12)
    interval, expected = crossed_mean(values), stats.ttest_1samp(values, 0.0)
    low, high = expected.confidence_interval(0.95)
    assert interval == pytest.approx((values.mean(), low, high, expected.pvalue))
    assert crossed_mean(values[None, :, None]) == pytest.approx(interval)


def test_crossed_mean__variance_without_bias() -> None:
    rng = np.random.default_rng(2)
    expected = 1 / 3 + 1 / 5 + 1 / 20 + 0.25 / 15 + 0.25 / 60 + 0.25 / 100 + 1 / 300
    tables = [draw(rng, "everything varies") for _ in range(1500)]
    assert np.var([table.mean() for table in tables]) == pytest.approx(expected, rel=0.12)
    from agssd.evaluation.statistics import _variances_of_mean

    assert np.mean([_variances_of_mean(table)[0][0] for table in tables]) == pytest.approx(expected, rel=0.12)


def test_crossed_mean__figures_that_are_all_equal() -> None:
    assert crossed_mean(np.full((2, 5), 0.5)) == (0.5, 0.5, 0.5, 0.0)
    assert crossed_mean(np.zeros((2, 5))).p == 1.0
    with pytest.raises(ValueError, match="one figure alone"):
        crossed_mean(np.ones((1, 1)))
    with pytest.raises(ValueError, match="finite"):
        crossed_mean(np.array([[np.nan, 1.0]]))


@pytest.mark.parametrize("name", SOURCES)
def test_crossed_mean__with_all_labels_there_is_one_draw_and_nothing_that_draws_vary(name: str) -> None:
    rng = np.random.default_rng(5)
    trials, size = 600, (3, 1, 25)
    seed, _, subject, _, both, _, rest = SOURCES[name]
    covered = found = 0
    for _ in range(trials):

        def one() -> np.ndarray:
            seeds, subjects = rng.normal(size=(3, 1, 1)), 1 - rng.exponential(size=(1, 1, 25))
            values = seed * seeds + subject * subjects + both * rng.normal(size=size) + rest * rng.normal(size=size)
            return np.asarray(values)

        interval = crossed_mean(one())
        covered += interval.low <= 0 <= interval.high
        found += paired_difference(one(), one()).p < 0.05
    print(f"{name}, all labels: {covered / trials:.3f} covered of 0.95, {found / trials:.3f} false positives of 0.05")
    assert covered / trials >= 0.925 and found / trials <= 0.075


def in_folds(rng: np.random.Generator, folds: int, subjects: int, of_fold: float) -> np.ndarray:
    """Return a table of subjects in folds, each with encoders, draws and a body of training subjects of its own."""
    own = [rng.normal(size=(3, 1, folds)), rng.normal(size=(1, 5, folds)), of_fold * rng.normal(size=(1, 1, folds))]
    shared = sum(own) + 0.5 * rng.normal(size=(3, 5, folds))
    of_subject = 1 - rng.exponential(size=(1, 1, folds * subjects))
    return np.repeat(shared, subjects, 2) + of_subject + rng.normal(size=(3, 5, folds * subjects))


@pytest.mark.parametrize(("folds", "subjects"), [(3, 10), (5, 6)])
@pytest.mark.parametrize("of_fold", [0.0, 0.3])
def test_crossed_mean__of_folds_covers_too(folds: int, subjects: int, of_fold: float) -> None:
    rng = np.random.default_rng(7)
    trials, covered, found = 600, 0, 0
    for _ in range(trials):
        interval = crossed_mean(in_folds(rng, folds, subjects, of_fold))
        covered += interval.low <= 0 <= interval.high
        found += paired_difference(*(in_folds(rng, folds, subjects, of_fold) for _ in range(2))).p < 0.05
    print(f"{folds} folds, {of_fold}: {covered / trials:.3f} covered of 0.95, {found / trials:.3f} false positives")
    assert covered / trials >= 0.925 and found / trials <= 0.075


@pytest.mark.parametrize("folds", [3, 5])
def test_crossed_mean__what_the_training_subjects_of_a_fold_share_is_not_in_the_interval(folds: int) -> None:
    rng = np.random.default_rng(7)
    intervals = [crossed_mean(in_folds(rng, folds, 30 // folds, 1.0)) for _ in range(600)]
    covered = np.mean([interval.low <= 0 <= interval.high for interval in intervals])
    print(f"{folds} folds that differ as subjects do: {covered:.3f} covered of 0.95")
    assert 0.85 <= covered < 0.925  # a gap that is told: docs/bench.md and the tables of benches with folds


def guessed(rng: np.random.Generator, classes: list[int], seed: float, draw: float, subject: float) -> list[np.ndarray]:
    """Return the shares of the balanced accuracy of two equal methods, (3 seeds, 5 draws, subjects of ``classes``)."""
    targets = np.repeat(np.arange(len(classes)), classes)
    weight = len(targets) / (np.array(classes)[targets] * len(classes))
    hard = subject * rng.normal(size=(1, 1, len(targets)))
    found = []
    for _ in range(2):
        of_method = seed * rng.normal(size=(3, 1, 1)) + draw * rng.normal(size=(1, 5, 1))
        found.append(weight * (0.4 + hard + of_method + 0.3 * rng.normal(size=(3, 5, len(targets))) > 0))
    return found


@pytest.mark.parametrize("classes", [[12, 12], [20, 4], [30, 5, 5]], ids=str)
@pytest.mark.parametrize(("seed", "draw", "subject"), [(0.3, 0.3, 1.0), (0.0, 0.0, 1.0), (0.5, 0.0, 0.3)])
def test_crossed_mean__of_balanced_accuracy(classes: list[int], seed: float, draw: float, subject: float) -> None:
    rng = np.random.default_rng(8)
    truth = stats.norm.cdf(0.4 / np.sqrt(seed**2 + draw**2 + subject**2 + 0.3**2))
    trials, covered, found = 600, 0, 0
    for _ in range(trials):
        first, second = guessed(rng, classes, seed, draw, subject)
        interval = crossed_mean(first)
        covered += interval.low <= truth <= interval.high
        found += paired_difference(first, second).p < 0.05
    print(f"{classes}, {seed}, {draw}, {subject}: {covered / trials:.3f} covered, {found / trials:.3f} false positives")
    assert found / trials <= 0.075
    assert covered / trials >= (0.925 if subject == 1.0 else 0.85)  # three seeds that alone decide who is found


def test_crossed_mean__small_p_values_are_as_rare_as_they_say_where_seeds_vary() -> None:
    rng = np.random.default_rng(6)
    trials = 6000
    found = sum(crossed_mean(rng.normal(size=(3, 1, 1)) + rng.normal(size=(3, 1, 25))).p < 0.001 for _ in range(trials))
    print(f"three seeds, all labels: {found / trials:.4f} below 0.001")
    assert found / trials <= 0.0025  # two degrees of freedom; by Satterthwaite's alone 0.014


@pytest.mark.parametrize("name", SOURCES)
def test_paired_difference__no_difference_is_found_one_time_in_twenty(name: str) -> None:
    rng = np.random.default_rng(3)
    subject = 10 * rng.normal(size=(1, 1, SIZE[2]))
    found = sum(paired_difference(subject + draw(rng, name), subject + draw(rng, name)).p < 0.05 for _ in range(600))
    print(f"{name}: {found / 600:.3f} false positives of 0.05")
    assert found / 600 <= 0.075


def test_paired_difference__shared_subject_effect__removed() -> None:
    rng = np.random.default_rng(4)
    subject = rng.normal(0, 1, (1, 60))
    first, second = subject + 0.05 + rng.normal(0, 0.02, (3, 60)), subject + rng.normal(0, 0.02, (3, 60))
    interval = paired_difference(first, second)
    assert interval.low > 0.03 and interval.high < 0.07 and interval.excludes_zero
    whole = crossed_mean(first)
    assert whole.low < 0 < whole.high and not whole.excludes_zero
    assert paired_difference(second, first).mean == pytest.approx(-interval.mean)


def test_paired_difference__tables_that_do_not_pair__refused() -> None:
    with pytest.raises(ValueError, match="same subjects"):
        paired_difference(np.zeros((1, 3)), np.zeros((1, 4)))
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_difference(np.zeros((2, 3)), np.zeros((3, 3)))


def test_holm__is_right_for_known_values_and_keeps_the_error_of_a_family() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    rng = np.random.default_rng(5)
    families = [holm({str(k): p for k, p in enumerate(rng.uniform(size=6))}) for _ in range(2000)]
    assert np.mean([min(family.values()) < 0.05 for family in families]) == pytest.approx(0.05, abs=0.015)
