"""Compare reading and view-making with other data engines, on one core and the same volumes.

Every rival runs in a process of its own, on one CPU with one thread, and has its volumes in the form that its own
documentation advises. The processes take turns, round after round, so that whatever else the machine does meets all of
them; figures are medians over rounds, per second of CPU time, and ratios are taken within a round. Files are in the
page cache, so disks are not compared.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

KINDS = ("crop", "parent", "views")
OURS = ("agssd, chunks", "agssd, contiguous")
IN_MEMORY = "MONAI CacheDataset"


@dataclass
class Row:
    """What one rival does per second of one core, in the median over rounds, and what it takes."""

    name: str
    settings: str
    disk_mib: float
    memory_mib: float  # peak resident memory beyond the imported libraries; mapped files count
    rates: dict[str, float]  # kind: crops, parents or views per second of CPU time
    rounds: dict[str, list[float]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``agssd bench-data``."""
    parser.add_argument("--out", type=Path, help="folder for bench_data.json (default: nothing is written)")
    parser.add_argument("--cache", type=Path, help="take CT volumes of this cache instead of simulated ones")
    parser.add_argument("--volumes", type=int, default=4, help="number of volumes (default: 4)")
    parser.add_argument(
        "--shape", type=int, nargs=3, default=(256, 384, 384), metavar=("D", "H", "W"), help="of a simulated volume"
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of every rival (default: 5)")
    parser.add_argument("--seconds", type=float, default=1.0, help="least length of a turn (default: 1)")
    parser.add_argument("--view-vox", type=int, default=96, help="edge of a global view; local ones have half")
    parser.add_argument("--parent-vox", type=int, default=168, help="edge of a parent crop (default: 168)")
    parser.add_argument("--rivals", nargs="+", metavar="NAME", help="only these (default: all; names are printed)")
    parser.add_argument("--folder", type=Path, help="where files are made and left (default: a temporary folder)")


def run(arguments: argparse.Namespace) -> int:
    """Run every rival, print the tables and return the exit code."""
    from agssd.commands.bench_data.rivals import RIVALS

    if min(arguments.rounds, arguments.volumes) < 1:
        raise ValueError(f"--rounds is {arguments.rounds} and --volumes {arguments.volumes}; give at least 1 of each")
    names = arguments.rivals or list(RIVALS)
    for name in names:
        if name not in RIVALS:
            raise ValueError(f"--rivals has {name!r}; choose from {', '.join(map(repr, RIVALS))}")
    with TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        report = compare(folder, names, arguments)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "bench_data.json").write_text(json.dumps(report, indent=1) + "\n")
        print(f"written: {arguments.out / 'bench_data.json'}")
    return 0


def compare(folder: Path, names: list[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Make the volumes and every rival's files below ``folder``, let the rivals take turns, and print the tables.

    Returns:
        Machine, sizes, one ``Row`` per rival, and why others were left out, in plain types.
    """
    from agssd.commands.bench_data.volumes import cached_volumes, simulated_volumes, write_volumes

    volumes = (
        cached_volumes(arguments.cache, arguments.volumes)
        if arguments.cache
        else simulated_volumes(tuple(arguments.shape), arguments.volumes)
    )
    shapes = write_volumes(folder, volumes)
    sizes = {"view_vox": arguments.view_vox, "parent_vox": arguments.parent_vox}
    if min(min(shape) for shape in shapes) < arguments.parent_vox:
        raise ValueError(
            f"a volume of {shapes} is smaller than --parent-vox {arguments.parent_vox}; give a smaller one"
        )
    (folder / "settings.json").write_text(json.dumps(sizes))
    machine = f"{platform.machine()} CPU, one core of {os.cpu_count()}, {time.strftime('%Y-%m-%d')}"
    print(f"{machine}; {len(shapes)} volumes of {shapes[0]} and {arguments.rounds} rounds, files in the page cache")
    workers, left_out = _start(folder, names)
    try:
        rows = _take_turns(workers, arguments.rounds, arguments.seconds)
    finally:
        for worker in workers.values():
            worker.close()
    _print_tables(rows, sizes)
    return {
        "machine": machine,
        "shapes": shapes,
        **sizes,
        "rows": [asdict(row) for row in rows],
        "left_out": left_out,
    }


class Worker:
    """A rival in its own process, which works when told to.

    Raises:
        ValueError: it does not start; the message is the last line that it wrote.
    """

    def __init__(self, name: str, folder: Path) -> None:
        one = ("OMP", "MKL", "OPENBLAS", "NUMEXPR")
        environment = {**os.environ, **{f"{library}_NUM_THREADS": "1" for library in one}}
        environment.update(BLOSC_NTHREADS="1", ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS="1")
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, "-m", "agssd.commands.bench_data.worker", name, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.about = self._answer()

    def ask(self, kind: str, seconds: float) -> dict[str, Any]:
        """Let it work for at least ``seconds`` and return its counts."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"kind": kind, "seconds": seconds}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None and self._process.stderr is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        said = self._process.stderr.read().strip().splitlines()
        raise ValueError(f"{self.name}: {said[-1] if said else 'ended without a word'}")

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def _start(folder: Path, names: list[str]) -> tuple[dict[str, Worker], dict[str, str]]:
    workers, left_out = {}, {}
    for name in names:
        try:
            workers[name] = Worker(name, folder)
        except ValueError as error:
            if "No module named" not in str(error):
                raise
            left_out[name] = f"{error}; pip install 'agssd[bench]'"
            print(f"left out: {left_out[name]}")
            continue
        print(f"{name}: {workers[name].about['settings']}", flush=True)
    return workers, left_out


def _take_turns(workers: dict[str, Worker], rounds: int, seconds: float) -> list[Row]:
    found: dict[str, dict[str, list[float]]] = {name: {} for name in workers}
    memory = dict.fromkeys(workers, 0.0)
    order = list(workers)
    for turn in range(-1, rounds):  # the first warms up and does not count
        order = order[1:] + order[:1]
        for kind in KINDS:
            for name in order:
                if kind not in workers[name].about["kinds"]:
                    continue
                answer = workers[name].ask(kind, seconds if turn >= 0 else 0.0)
                memory[name] = answer["memory_mib"]
                if turn >= 0:
                    found[name].setdefault(kind, []).append(answer["count"] / answer["cpu_s"])
    return [
        Row(
            name=name,
            settings=worker.about["settings"],
            disk_mib=worker.about["disk_mib"],
            memory_mib=memory[name],
            rates={kind: median(rates) for kind, rates in found[name].items()},
            rounds=found[name],
        )
        for name, worker in workers.items()
    ]


def ratio(ours: Row, other: Row, kind: str) -> tuple[float, float, float]:
    """Return how many times faster ``ours`` is: the median over rounds, the lowest and the highest."""
    each = [a / b for a, b in zip(ours.rounds[kind], other.rounds[kind], strict=True)]
    return median(each), min(each), max(each)


def _print_tables(rows: list[Row], sizes: dict[str, int]) -> None:
    view, parent = sizes["view_vox"], sizes["parent_vox"]
    print(
        f"\nPer second of one core: crops of {view}³, parent crops of {parent}³, and complete training views\n"
        f"(2 of {view}³ and 6 of {view // 2}³, random size, trilinear, flips). Memory is beyond the imported libraries."
    )
    print(f"{'':<28} {'crops':>9} {'parents':>9} {'views':>9} {'disk MiB':>10} {'memory MiB':>11}")
    for row in rows:
        figures = " ".join(f"{row.rates[kind]:>9.1f}" if kind in row.rates else f"{'-':>9}" for kind in KINDS)
        print(f"{row.name:<28} {figures} {row.disk_mib:>10.0f} {row.memory_mib:>11.0f}")
    for ours in (row for row in rows if row.name in OURS):
        print(f"\n{ours.name}, times as fast as (lowest to highest round):")
        for other in rows:
            if other.name in OURS:
                continue
            each = [
                f"{kind} {middle:.2f} ({low:.2f} to {high:.2f})"
                for kind in KINDS
                if kind in other.rates
                for middle, low, high in (ratio(ours, other, kind),)
            ]
            print(f"  {other.name:<26} {', '.join(each)}")
