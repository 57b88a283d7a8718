"""SIGUSR1 and SIGTERM of this process, noted and not obeyed while somebody listens.

Imports no torch, so that a command can listen before it imports anything that takes seconds.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class StopSignals:
    """The first of the signals that came since ``listen``: ``received`` is its name and the time, by ``monotonic``."""

    def __init__(self) -> None:
        self.received: tuple[signal.Signals, float] | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._process = os.getpid()

    @property
    def listening(self) -> bool:
        """Whether the signals are noted."""
        return bool(self._previous)

    def listen(self) -> None:
        """Take the signals over, again where another has taken them since; does nothing outside the main thread."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._process = os.getpid()
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if handler != self._note:
                self._previous.setdefault(number, handler)
                signal.signal(number, self._note)

    def release(self) -> None:
        """Give the signals back to who had them, and forget what came."""
        for number, handler in self._previous.items():
            if signal.getsignal(number) == self._note:
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous, self.received = {}, None

    def obey(self) -> None:
        """Give the signals back, and let the one that came do what it would have done."""
        received = self.received
        self.release()
        if received is not None:
            os.kill(os.getpid(), received[0])

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._process and self.received is None:  # a forked worker inherits the handler
            self.received = signal.Signals(number), time.monotonic()


STOP = StopSignals()
