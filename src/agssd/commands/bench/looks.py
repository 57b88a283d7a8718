"""How the methods of a bench look, the same on its page and in its picture: a colour and a mark for each."""

from __future__ import annotations

from dataclasses import dataclass

# those of report.css, by their numbers
COLOURS = ("#0b6fb8", "#c8500a", "#128a5f", "#a83a86", "#6a4fc0", "#8a6a00", "#b3261e", "#4d5966")
_SHAPES = (  # matplotlib's name and the path of SVG, about the origin
    ("o", "M-4.4 0a4.4 4.4 0 1 0 8.8 0a4.4 4.4 0 1 0-8.8 0z"),
    ("s", "M-4-4h8v8h-8z"),
    ("^", "M0-5.2L5 4H-5z"),
    ("D", "M0-5.6L5.6 0L0 5.6L-5.6 0z"),
    ("v", "M0 5.2L5-4H-5z"),
    ("P", "M-1.8-5.2h3.6v3.4h3.4v3.6h-3.4v3.4h-3.6v-3.4h-3.4v-3.6h3.4z"),
    ("*", "M0-6.4L1.6-2.2L6.1-2L2.6 .8L3.8 5.2L0 2.7L-3.8 5.2L-2.6 .8L-6.1-2L-1.6-2.2z"),
    ("X", "M-2.6-5L0-2.4L2.6-5L5-2.6L2.4 0L5 2.6L2.6 5L0 2.4L-2.6 5L-5 2.6L-2.4 0L-5-2.6z"),
)


@dataclass(frozen=True)
class Look:
    """A method's look.

    Attributes:
        colour: number in ``COLOURS``.
        marker: matplotlib's name of the shape.
        path: of the shape in SVG.
        hollow: whether the mark is an outline.
    """

    colour: int
    marker: str
    path: str
    hollow: bool


def look(number: int) -> Look:
    """Return the look of a bench's method ``number``: no two of 64 are alike, no two of 16 even without colours.

    Every eight methods the shapes come again, hollow after filled ones, and in other colours.
    """
    cycle, place = divmod(number, len(_SHAPES))
    marker, path = _SHAPES[place]
    return Look((place + 3 * cycle) % len(COLOURS), marker, path, cycle % 2 == 1)
