"""What a check is, and how the findings of all ranks become one table."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist


class RanksLost(Exception):
    """Some ranks do not answer any more; the text names them where this rank can tell."""


class Finding(NamedTuple):
    """What a check came to; ``problem`` is empty where all is well, ``remedy`` says what to do about it."""

    value: str
    problem: str = ""
    remedy: str = ""


@dataclass
class Place:
    """Where a rank stands, and what it may look at.

    Attributes:
        settings: configuration of ``fit``.
        run_directory: of the run.
        model: of the run, on ``device``.
        data: its data module, set up if its cache could be opened.
        device: torch device of this rank.
        rank: of this process.
        world_size: number of processes.
        timeout: seconds after which a rank that does not answer counts as lost.
    """

    settings: Any
    run_directory: Path
    model: Any
    data: Any
    device: Any
    rank: int = 0
    world_size: int = 1
    timeout: float = 60.0
    host: str = field(default_factory=socket.gethostname)
    talk: Any = None  # gloo group beside the training's own, by which ranks tell what they found
    hosts: list[str] = field(default_factory=list)  # of all ranks, once connected

    def connect(self) -> None:
        """Open the group by which findings travel."""
        if self.world_size > 1:
            self.talk = dist.new_group(backend="gloo", timeout=timedelta(seconds=self.timeout))
            self.hosts = self.gather(self.host)

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, on every rank.

        Raises:
            RanksLost: if some do not come in time; rank 0 knows which.
        """
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        try:
            dist.monitored_barrier(self.talk, timedelta(seconds=self.timeout), wait_all_ranks=True)
            dist.all_gather_object(values, value, group=self.talk)
        except RuntimeError as error:
            raise RanksLost(self._who_is_lost(error)) from error
        return values

    def _who_is_lost(self, error: RuntimeError) -> str:
        named = re.search(r"[Rr]anks? ((?:\d+(?:, *)?)+) failed to pass", str(error))
        if named is None or not self.hosts:
            return f"ranks lost each other: {first_line(error)}"
        lost = [int(rank) for rank in named[1].replace(",", " ").split()]
        who = ", ".join(f"rank {rank} on {self.hosts[rank]}" for rank in lost)
        return f"{who} did not answer within {self.timeout:g} s"


class Told(NamedTuple):
    """What one rank tells of a check: its measured value, or why it has none."""

    rank: int
    host: str
    value: Any
    error: str = ""


class Check(NamedTuple):
    """One row: ``measure`` runs on every rank, ``judge`` sees what all of them told.

    Attributes:
        name: in the table.
        measure: returns a value that can be pickled, or raises.
        judge: returns the finding from what all ranks measured.
        remedy: where ``measure`` raised.
        needs: names of checks without which this one makes no sense.
    """

    name: str
    measure: Callable[[Place], Any]
    judge: Callable[[Sequence[Told]], Finding]
    remedy: str
    needs: tuple[str, ...] = ()


def run_checks(checks: Sequence[Check], place: Place) -> dict[str, Finding | None]:
    """Return the findings by name, the same on every rank; None for a check that another's failure has forestalled."""
    found: dict[str, Finding | None] = {}
    lost = False
    for check in checks:
        failed = [name for name in check.needs if (finding := found.get(name)) is None or finding.problem]
        try:
            found[check.name] = None if lost or failed else run_check(check, place)
        except RanksLost as error:
            found[check.name], lost = Finding("", str(error), _LOST_REMEDY), True
    return found


def run_check(check: Check, place: Place) -> Finding:
    """Measure on every rank, tell each other, and judge.

    Raises:
        RanksLost: if some do not tell.
    """
    try:
        told = Told(place.rank, place.host, check.measure(place))
    except RanksLost:
        raise
    except Exception as error:  # whatever goes wrong here is what the check is for
        told = Told(place.rank, place.host, None, first_line(error))
    everyone = place.gather(told)
    wrong = [other for other in everyone if other.error]
    if wrong:
        return Finding("", _who_failed(wrong, len(everyone)), check.remedy)
    return check.judge(everyone)


def _who_failed(wrong: Sequence[Told], ranks: int) -> str:
    """Return every failure with the ranks that have it, each text once; ``wrong`` are those of ``ranks`` that fail."""
    if ranks == 1:
        return wrong[0].error
    who: dict[str, list[str]] = {}
    for told in wrong:
        who.setdefault(told.error, []).append(f"rank {told.rank} on {told.host}")
    return "; ".join(f"{', '.join(names)}: {error}" for error, names in who.items())


_LOST_REMEDY = (
    "see on that host whether the process was killed or waits for a disk (dmesg, ps), and leave the host out if so; "
    "where it is only slower than the others, give a longer --timeout"
)


def of_rank(told: Told, ranks: int) -> str:
    """Return ``rank R on HOST: ``, or nothing in a single process."""
    return f"rank {told.rank} on {told.host}: " if ranks > 1 else ""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its kind where it has none."""
    return str(error).strip().partition(os.linesep)[0] or type(error).__name__


def show(found: dict[str, Finding | None]) -> str:
    """Return the table: a line per check, and one remedy below each failure."""
    width = max(len(name) for name in found)
    lines = []
    for name, finding in found.items():
        if finding is None:
            lines.append(f"-     {name:<{width}}  not run, because a check above failed")
        elif finding.problem:
            lines += [f"FAIL  {name:<{width}}  {finding.problem}", f"      {'':<{width}}  remedy: {finding.remedy}"]
        else:
            lines.append(f"ok    {name:<{width}}  {finding.value}")
    return "\n".join(lines)
