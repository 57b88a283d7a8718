"""What `agssd plan` foretells of FSDP2 is what two ranks take."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from launch import launch

pytestmark = [pytest.mark.ddp, pytest.mark.slow]

CONF = Path(__file__).resolve().parents[2] / "conf"
SETTINGS = [
    *("--config", str(CONF / "experiment" / "agssd_small.yaml")),
    *("--backbone", str(CONF / "backbone" / "vit_small_p16.yaml")),
    *("--views.size_vox", "[64,64,64]", "--data.parent_vox", "[80,80,80]", "--data.global_batch_size", "4"),
    *("--data.num_workers", "0", "--trainer.max_steps", "3", "--trainer.accelerator", "cpu", "--trainer.devices", "2"),
    *("--trainer.strategy", json.dumps({"class_path": "agssd.sharding.ShardedStrategy"})),
    *("--trainer.limit_val_batches", "0"),
    *("--online_probe.at_start", "false", "--online_probe.at_end", "false", "--collapse_monitor.every_n_steps", "1"),
    *("--trainer.enable_progress_bar", "false"),
]
# as `agssd plan --measure`: glibc gives every larger block back, so what was freed does not count
GLIBC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def test_plan__memory_under_fsdp2_is_that_of_two_ranks(
    make_cache: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = make_cache(tmp_path / "cache.h5", 4, (88, 88, 88), splits=["train"] * 4)
    settings = [*SETTINGS, "--data.cache", str(cache)]
    command = [sys.executable, "-m", "agssd", "plan", *settings, "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    found = re.search(r"together +([\d.]+) MiB", done.stdout)
    assert found, done.stderr
    planned = float(found[1])
    for name, value in {**GLIBC, "WANDB_MODE": "disabled"}.items():
        monkeypatch.setenv(name, value)
    launch("sharded_memory_ranks.py", tmp_path, str(tmp_path), *settings)
    for rank in range(2):
        measured = int((tmp_path / f"peak-{rank}").read_text()) / 2**20
        assert abs(planned / measured - 1) < 0.15, f"rank {rank}: planned {planned:.1f} MiB, took {measured:.1f} MiB"
