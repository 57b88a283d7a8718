"""What every worker of a data loader does first."""

from __future__ import annotations

import signal
from types import FrameType

GRACE_S = 60


def outlive_signals(worker: int) -> None:
    """Let a worker go on when a scheduler signals every process of a job: its rank still needs it to end a step.

    SIGUSR1 is ignored; SIGTERM ends the worker only GRACE_S seconds later. A worker ends with its rank in any case.

    Args:
        worker: number of the worker, unused.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_later)


def _end_later(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(GRACE_S)
