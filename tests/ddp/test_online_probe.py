"""Two ranks are told the same figures of the probe, those of one process and of their best checkpoint's file."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from agssd.data_modules.cache import VolumeCache
from agssd.data_modules.probe_set import ProbeSet
from agssd.evaluation.probe import READOUTS, run_readouts
from agssd.evaluation.probe_features import encode
from agssd.tasks.encoders import load_encoder

pytestmark = pytest.mark.ddp


def on_ranks(number: int, cache: Path, out: Path) -> list[dict[str, float]]:
    """Return what each of so many ranks was told."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).with_name("probe_ranks.py")
    ranks = []
    for rank in range(number):
        environment = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(number),
            "NODE_RANK": "0",
        }
        environment |= {"LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        with open(out / f"{rank}.log", "w") as log:
            command = [sys.executable, str(script), str(cache), str(out), str(number)]
            ranks.append(subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=log))
    try:
        codes = [rank.wait(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert not any(codes), "\n".join((out / f"{rank}.log").read_text()[-3000:] for rank in range(number))
    return [torch.load(out / f"probe{number}-{rank}.pt", weights_only=True) for rank in range(number)]


def untimed(figures: dict[str, float]) -> dict[str, float]:
    own = {name: value for name, value in figures.items() if name not in ("probe/seconds", "probe/time_share")}
    assert own.pop("probe/step") == 1
    return {name: value for name, value in own.items() if not math.isnan(value)}  # AUROC of a single class


def test_online_probe__two_ranks_are_told_what_one_process_measures(tiny_cache: Path, tmp_path: Path) -> None:
    first, second = on_ranks(2, tiny_cache, tmp_path)
    assert untimed(first) == untimed(second) and first["probe/seconds"] == second["probe/seconds"]
    (alone,) = on_ranks(1, tiny_cache, tmp_path)
    assert untimed(first) == untimed(alone) and len(untimed(alone)) > 8
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks
    data, encoder = ProbeSet(VolumeCache(tiny_cache), max_vox=32), load_encoder(tmp_path / "2/best.ckpt")
    offline = run_readouts(encode(encoder, data.volumes(), (16, 16, 16), 0.0), data, READOUTS, 4).figures
    torch.set_num_threads(threads)
    told = {name: value for name, value in untimed(first).items() if "held_out" not in name}
    single = {f"probe/{name}": float(torch.tensor(value)) for name, value in offline.items()}  # as callback_metrics are
    assert told == {name: value for name, value in single.items() if not math.isnan(value)}
