"""Schedules as pure functions of the share of the run that is done.

``progress`` is optimiser steps done divided by all optimiser steps, in [0, 1]. Nothing here knows epochs or absolute
counts, so a run of 200 steps and one of 200,000 go through the same stages (source: ours, docs/method.md §1.5).
"""

from __future__ import annotations

import math


def linear(progress: float, start: float, end: float, begin: float = 0.0, finish: float = 1.0) -> float:
    """Return ``start`` before ``begin``, ``end`` after ``finish``, and the straight line between."""
    if finish <= begin:
        return end if progress >= begin else start
    share = min(max((progress - begin) / (finish - begin), 0.0), 1.0)
    return start + (end - start) * share


def cosine(progress: float, start: float, end: float, begin: float = 0.0, finish: float = 1.0) -> float:
    """Return ``start`` before ``begin``, ``end`` after ``finish``, and half a cosine between."""
    share = linear(progress, 0.0, 1.0, begin, finish)
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def warmup_cosine(progress: float, peak: float, end: float, warmup: float) -> float:
    """Return a linear rise from 0 to ``peak`` over the share ``warmup`` of the run, then half a cosine to ``end``."""
    if progress < warmup:
        return linear(progress, 0.0, peak, 0.0, warmup)
    return cosine(progress, peak, end, warmup, 1.0)


def teacher_start_momentum(total_steps: int, half_life: float = 0.02, cap: float = 0.996) -> float:
    """Return the EMA momentum whose half-life is the share ``half_life`` of the run, at most ``cap``.

    Source: ours, docs/method.md §1.5: ``0.5 ** (1 / (half_life * total_steps))``.

    Raises:
        ValueError: if ``total_steps`` is not positive.
    """
    if total_steps <= 0:
        raise ValueError(f"total_steps is {total_steps}; set trainer.max_steps to a positive number")
    return min(cap, math.pow(0.5, 1.0 / max(half_life * total_steps, 1e-9)))
