"""Schedules are pure functions of the share of the run, hit their ends, and do not know absolute counts."""

from __future__ import annotations

import math

import pytest

from agssd.schedules import cosine, linear, teacher_start_momentum, warmup_cosine


@pytest.mark.parametrize("schedule", [linear, cosine])
@pytest.mark.parametrize(("begin", "finish"), [(0.0, 1.0), (0.1, 0.3), (0.5, 1.0)])
def test_ramp__starts_and_ends_where_it_says(schedule, begin, finish):
    assert schedule(0.0, 4.0, 1.0, begin, finish) == 4.0
    assert schedule(begin, 4.0, 1.0, begin, finish) == 4.0
    assert schedule(finish, 4.0, 1.0, begin, finish) == pytest.approx(1.0, abs=1e-12)
    assert schedule(1.0, 4.0, 1.0, begin, finish) == pytest.approx(1.0, abs=1e-12)
    assert schedule((begin + finish) / 2, 4.0, 1.0, begin, finish) == pytest.approx(2.5)
    values = [schedule(step / 200, 4.0, 1.0, begin, finish) for step in range(201)]
    assert all(late <= early + 1e-12 for early, late in zip(values, values[1:], strict=False))


def test_cosine__differs_from_the_line_and_is_flat_at_both_ends():
    assert cosine(0.25, 0.0, 1.0) == pytest.approx((1 - math.cos(math.pi / 4)) / 2)
    assert cosine(0.01, 0.0, 1.0) < 0.01 * 0.05
    assert 1 - cosine(0.99, 0.0, 1.0) < 0.01 * 0.05


@pytest.mark.parametrize("schedule", [linear, cosine])
def test_ramp__without_length_is_a_step(schedule):
    assert schedule(0.49, 0.0, 1.0, 0.5, 0.5) == pytest.approx(0.0)
    assert schedule(0.5, 0.0, 1.0, 0.5, 0.5) == pytest.approx(1.0)


def test_warmup_cosine__rises_from_zero_peaks_and_ends():
    assert warmup_cosine(0.0, 1e-3, 1e-6, 0.1) == 0.0
    assert warmup_cosine(0.05, 1e-3, 1e-6, 0.1) == pytest.approx(5e-4)
    assert warmup_cosine(0.1, 1e-3, 1e-6, 0.1) == pytest.approx(1e-3)
    assert warmup_cosine(1.0, 1e-3, 1e-6, 0.1) == pytest.approx(1e-6)
    assert max(warmup_cosine(step / 1000, 1e-3, 1e-6, 0.1) for step in range(1001)) == pytest.approx(1e-3)
    assert warmup_cosine(0.0, 1e-3, 1e-6, 0.0) == pytest.approx(1e-3)  # no warm-up: the peak at once


@pytest.mark.parametrize("steps", [200, 1000, 5000])
def test_teacher_start_momentum__halves_over_two_percent_of_the_run(steps):
    momentum = teacher_start_momentum(steps)
    assert momentum == pytest.approx(min(0.996, 0.5 ** (1 / (0.02 * steps))))
    if momentum < 0.996:
        assert momentum ** (0.02 * steps) == pytest.approx(0.5)


def test_teacher_start_momentum__is_capped_for_long_runs_and_refuses_none():
    assert teacher_start_momentum(1_000_000) == 0.996
    assert 0 <= teacher_start_momentum(1) < 1e-12
    with pytest.raises(ValueError, match="trainer.max_steps"):
        teacher_start_momentum(0)


def test_schedules__are_pure():
    for schedule in (linear, cosine):
        order = [0.9, 0.1, 0.5, 0.1, 0.9]
        values = [schedule(progress, 0.0, 1.0, 0.2, 0.8) for progress in order]
        assert values[0] == values[4] and values[1] == values[3]
