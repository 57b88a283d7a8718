"""Two ranks are told the same figures of the probe, those of one process and of their best checkpoint's file."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from launch import launch

from agssd.data_modules.cache import VolumeCache
from agssd.data_modules.probe_set import ProbeSet
from agssd.evaluation.probe import READOUTS, run_readouts
from agssd.evaluation.probe_features import encode
from agssd.tasks.encoders import load_encoder

pytestmark = pytest.mark.ddp


def on_ranks(number: int, cache: Path, out: Path) -> list[dict[str, float]]:
    """Return what each of so many ranks was told."""
    launch("probe_ranks.py", out, str(cache), str(out), str(number), ranks=number)
    return [torch.load(out / f"probe{number}-{rank}.pt", weights_only=True) for rank in range(number)]


def untimed(figures: dict[str, float]) -> dict[str, float]:
    own = {name: value for name, value in figures.items() if name not in ("probe/seconds", "probe/time_share")}
    assert own.pop("probe/step") == 1
    return {name: value for name, value in own.items() if not math.isnan(value)}  # AUROC of a single class


@pytest.mark.slow
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
