"""Whom a probe learns from and whom it is measured on."""

from __future__ import annotations

from typing import NamedTuple


class Fold(NamedTuple):
    """One turn of a probe, by subject."""

    learned: tuple[str, ...]
    held_out: tuple[str, ...]


def refuse_leak(fold: Fold, number: int) -> None:
    """Refuse a fold in which a subject is both learned from and measured on.

    Raises:
        ValueError: naming the subjects.
    """
    if both := set(fold.learned) & set(fold.held_out):
        raise ValueError(f"fold {number} would be predicted by a readout that has seen {sorted(both)}")
