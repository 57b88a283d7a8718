"""How far a long run is: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm

LOG_SECONDS = 10.0


def progress(total: int, unit: str, what: str | None = None, delay: float = 0.0, leave: bool = True) -> tqdm[Any]:
    """Return a progress bar on stderr; where that is no terminal it writes one line every ten seconds instead.

    Args:
        total: number of items.
        unit: one item, in the singular.
        what: words that stand before.
        delay: seconds before a bar appears.
        leave: keep the bar when all is done.
    """
    from tqdm import tqdm

    if sys.stderr.isatty():
        return tqdm(total=total, desc=what, unit=unit, file=sys.stderr, dynamic_ncols=True, delay=delay, leave=leave)
    before = f"{what}: " if what else ""
    return tqdm(
        total=total,
        unit=unit,
        file=_Lines(sys.stderr),
        mininterval=LOG_SECONDS,
        miniters=1,
        delay=LOG_SECONDS,
        bar_format=f"{before}{{n_fmt}} of {{total_fmt}} {{unit}}s, {{elapsed}} so far, {{remaining}} to go",
    )


class _Lines:
    """A stream that gives whatever overwrites its line a line of its own."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        if line := text.strip("\r\n "):
            self.stream.write(f"{line}\n")

    def flush(self) -> None:
        self.stream.flush()
