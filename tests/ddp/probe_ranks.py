"""One rank of one or two: trains a recipe with the probe and keeps the figures that it was told.

Started by ``test_online_probe.py``: ``probe_ranks.py CACHE OUT DEVICES``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import lightning.pytorch as L
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "contracts"))

import recipes  # noqa: E402  (torch's launcher starts this file as a script, which pytest's path does not reach)

from agssd.callbacks.best_checkpoint import BestCheckpoint  # noqa: E402
from agssd.callbacks.ema_teacher import EMATeacher  # noqa: E402
from agssd.callbacks.online_probe import OnlineProbe  # noqa: E402
from agssd.methods.agssd import AGSSD  # noqa: E402


def figures(cache: Path, out: Path, devices: int) -> dict[str, float]:
    """Return the figures in ``callback_metrics`` after one step; keep ``OUT/DEVICES/best.ckpt``."""
    probe = OnlineProbe(every_n_steps=1, window_vox=(16, 16, 16), max_vox=32, linear_steps=4)
    trainer = L.Trainer(
        default_root_dir=out, max_steps=1, accelerator="cpu", devices=devices, limit_val_batches=0,
        strategy="ddp" if devices > 1 else "auto", use_distributed_sampler=False, logger=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[EMATeacher(), probe, BestCheckpoint(dirpath=str(out / str(devices)))],
    )  # fmt: skip
    data = recipes.data_module(cache)
    trainer.fit(recipes.build(AGSSD, lr=0.0, min_lr=0.0), data)  # the same weights on any number of ranks, bit for bit
    own = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("probe/")}
    return own


def main(cache: Path, out: Path, devices: int) -> None:
    """Save ``OUT/probeDEVICES-RANK.pt``."""
    torch.set_num_threads(1)
    recipes.quiet()
    found = figures(cache, out, devices)
    torch.save(found, out / f"probe{devices}-{os.environ.get('LOCAL_RANK', '0')}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
