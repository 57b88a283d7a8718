"""One rival in its process: makes its files in a process before, then answers each line of stdin with its counts."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from pathlib import Path


def _prepare(name: str, folder: Path) -> None:
    from agssd.commands.bench_data.rivals import RIVALS

    RIVALS[name].prepare(folder, folder / name.replace(" ", "_").replace(",", ""))


def _memory_mib(field: str) -> float:
    """Return resident memory of this process, now ("VmRSS") or at its peak ("VmHWM")."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith(field))


def main(name: str, folder: Path) -> None:
    """Serve rival ``name`` with the volumes of ``folder``; see ``agssd.commands.bench_data.Worker``."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    place = folder / name.replace(" ", "_").replace(",", "")
    if not place.exists():
        place.mkdir()
        # in a process of its own, so that its memory is not counted
        child = multiprocessing.get_context("fork").Process(target=_prepare, args=(name, folder))
        child.start()
        child.join()
        if child.exitcode:
            raise SystemExit(child.exitcode)

    import torch

    from agssd.commands.bench_data.rival import Sizes
    from agssd.commands.bench_data.rivals import RIVALS

    torch.set_num_threads(1)
    kind = RIVALS[name]
    kind.load_libraries()
    before = _memory_mib("VmRSS")
    rival = kind(place, Sizes(**json.loads((folder / "settings.json").read_text())))
    disk = sum(path.stat().st_size for path in place.rglob("*") if path.is_file()) / 2**20
    print(json.dumps({"settings": rival.settings, "kinds": list(rival.work), "disk_mib": disk}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        work, per_call = rival.work[order["kind"]]
        count, started, cpu = 0, time.perf_counter(), time.process_time()
        while count == 0 or time.perf_counter() - started < order["seconds"] or count % rival.whole_turn:
            work()
            count += 1
        answer = {
            "count": count * per_call,
            "cpu_s": time.process_time() - cpu,
            "wall_s": time.perf_counter() - started,
            "memory_mib": _memory_mib("VmHWM") - before,
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
