"""One rank of two: fits twice under FSDP2, and keeps how much memory the second time took at its peak.

Started by ``test_sharded_memory.py``: ``sharded_memory_ranks.py OUT ARGUMENTS_OF_FIT``. The first time takes what
libraries take once. Pictures of the first step and the last checkpoint, which rank 0 holds whole, are left out: a plan
is of steps.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from pathlib import Path
from typing import Any

import torch

from agssd.callbacks.run_checkpoint import RunCheckpoint
from agssd.callbacks.view_panels import ViewPanels
from agssd.cli import main


def nothing(*_: Any) -> None:
    """Stand in for what is left out."""


def resident(name: str) -> int:
    """Return VmRSS or VmHWM in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def fit(out: Path, *arguments: str) -> None:
    """Train."""
    assert main(["fit", *arguments, "--trainer.default_root_dir", str(out)]) == 0
    gc.collect()


def measure(out: Path, *arguments: str) -> None:
    """Write ``OUT/peak-RANK``, in bytes."""
    torch.set_num_threads(1)
    ViewPanels._draw = RunCheckpoint.on_train_end = nothing  # type: ignore[method-assign,assignment]
    fit(out / "first", *arguments)
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    fit(out / "second", *arguments)
    (out / f"peak-{os.environ['LOCAL_RANK']}").write_text(str(resident("VmHWM") - before))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    measure(Path(sys.argv[1]), *sys.argv[2:])
