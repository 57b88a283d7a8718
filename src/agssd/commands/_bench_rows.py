"""The rows of ``agssd bench-speed``: a comparison of two sides, or a figure that stands alone."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Row:
    """One comparison: what is done, in which way fast, in which way otherwise, and how long both take."""

    what: str
    ours: str
    other: str
    ours_ms: float
    other_ms: float
    ratio: float  # median over rounds of other / ours: above 1 means that ours is faster
    ratio_low: float  # smallest of any round
    ratio_high: float

    def __str__(self) -> str:
        """Return the line of the table."""
        return (
            f"{self.what:<46} {self.ours:>22} {self.ours_ms:>9.2f}   {self.other:<24} {self.other_ms:>9.2f}  "
            f"{self.ratio:.3f} ({self.ratio_low:.3f} to {self.ratio_high:.3f})"
        )


@dataclass(frozen=True)
class Figure:
    """One figure, measured once; None where it could not be, and ``note`` says why."""

    what: str
    value: float | None
    unit: str  # s, or % of a step
    note: str

    def __str__(self) -> str:
        """Return the line of the table."""
        told = "not measured:" if self.value is None else f"{self.value:.{1 if self.unit == 's' else 2}f} {self.unit}"
        return f"{self.what:<46} {told:>14}   {self.note}"


def row_of(what: str, ours: str, other: str, pairs: list[tuple[float, float]]) -> Row:
    """Return the row of pairs of seconds, ours and the other side's of each round."""
    ratios = [second / first for first, second in pairs]
    return Row(
        what,
        ours,
        other,
        1000 * median(first for first, _ in pairs),
        1000 * median(second for _, second in pairs),
        median(ratios),
        min(ratios),
        max(ratios),
    )
