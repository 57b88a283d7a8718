"""Progress: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import io
import sys
import time

import pytest

from agssd.scans import progress as module
from agssd.scans.progress import progress


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _run(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, items: int = 20) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    with progress(items, "scan", "reading") as bar:
        for _ in range(items):
            time.sleep(0.02)
            bar.update()
            bar.write("a message", file=stream)
    return stream.getvalue()


def test_progress__a_log_gets_whole_lines_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOG_SECONDS", 0.1)
    text = _run(monkeypatch, io.StringIO())
    assert "\r" not in text and text.endswith("\n") and "" not in text.splitlines()
    told = [line for line in text.splitlines() if line != "a message"]
    assert text.count("a message\n") == 20 and 2 <= len(told) <= 6
    assert all(line.startswith("reading: ") and " of 20 scans, " in line for line in told)
    assert told[-1].startswith("reading: 20 of 20")


def test_progress__a_short_run_leaves_nothing_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _run(monkeypatch, io.StringIO()) == "a message\n" * 20


def test_progress__a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    text = _run(monkeypatch, _Terminal())
    assert "\rreading:" in text and "20/20" in text
