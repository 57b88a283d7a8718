"""Two ranks started by Lightning, of which one goes wrong at step 4: ``one_goes_wrong.py WAY CACHE OUT``.

Started by ``test_watchdog.py``, ``test_non_finite.py`` and ``test_rollback.py``; ``OUT/PID<rank>`` tells the process of
each rank, ``OUT/WRONG`` when it went wrong.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

# A process of its own, which pytest has not told where recipes.py lies; hence the imports below the line.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "contracts"))

import lightning.pytorch as L  # noqa: E402
import recipes  # noqa: E402
import torch  # noqa: E402

from agssd.callbacks.collapse_monitor import CollapseMonitor  # noqa: E402
from agssd.callbacks.life_sign import LifeSign  # noqa: E402
from agssd.callbacks.non_finite import NonFinite  # noqa: E402
from agssd.callbacks.run_checkpoint import RunCheckpoint  # noqa: E402
from agssd.callbacks.watchdog import Watchdog  # noqa: E402
from agssd.methods.dino import DINO  # noqa: E402

WRONG_AT = 4


class Wrong(L.Callback):
    """Makes this rank go wrong, in the way that was asked for."""

    def __init__(self, way: str, cache: Path, out: Path) -> None:
        self.way, self.cache, self.out = way, cache, out

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        first = trainer.global_step == WRONG_AT + 2 and not (self.out / "WRONG").exists()
        if self.way == "centre" and first and trainer.global_rank == 1:  # this rank's monitor alone sees it
            (self.out / "WRONG").write_text(str(time.time()))
            pl_module.centre.centre[0] = float("inf")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        way, _, rank = self.way.partition("-")
        if way == "centre":
            return
        if trainer.global_step != WRONG_AT or trainer.global_rank != int(rank or 1) or (self.out / "WRONG").exists():
            return
        (self.out / "WRONG").write_text(str(time.time()))
        if way == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif way == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif way == "raise":
            raise OSError("the network disk went away")
        elif way == "hang":
            time.sleep(3600)
        elif way == "teacher":
            for parameter in pl_module.teacher.parameters():
                parameter.data.mul_(1.01)
        elif way == "cache":
            with self.cache.open("r+b") as file:
                file.truncate(4096)
        elif way == "disk":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that writing fails as on a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))


class Poisoned(DINO):
    """Gets a batch on rank 1 whose intensities are not numbers."""

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        if self.trainer.global_step == WRONG_AT and self.trainer.global_rank == 1:
            batch["scale"][0] = float("nan")
        return super().transfer_batch_to_device(batch, device, dataloader_idx)


def main(way: str, cache: Path, out: Path) -> None:
    """Train ten steps."""
    torch.set_num_threads(1)
    recipes.quiet()
    rank = os.environ.get("LOCAL_RANK", "0")
    (out / f"PID{rank}").write_text(str(os.getpid()))
    states, watched = recipes.States(), way in ("teacher", "centre")
    callbacks: list[L.Callback] = [
        Watchdog(stalled_s=30 if way.startswith("stop") else 8, lost_s=3, grace_s=2, beat_s=0.5),
        LifeSign(every_s=0.5), NonFinite(), Wrong(way, cache, out), states,
        RunCheckpoint(2 if watched else 6, dirpath=str(out / "checkpoints"), in_background=not watched),
    ]  # fmt: skip
    if watched:  # every alarm of figures is off: four samples show little
        never = {"min_entropy_batch": 0.0, "max_share": 2.0, "min_information": -1.0, "min_feature_std": 0.0}
        never |= {"soft_rank": 0.0, "hard_rank": 0.0, "max_cosine": 2.0, "min_distance": 0.0, "uniform_margin": 0.0}
        callbacks.append(CollapseMonitor(2, 4, "rollback", grace=0.0, **never))
    trainer = recipes.trainer(
        *callbacks, max_steps=10, devices=2, strategy="ddp", enable_checkpointing=True, default_root_dir=out
    )
    workers = 1 if way.startswith("cache") else 0
    data = recipes.data_module(cache, num_workers=workers, prefetch=1) if workers else recipes.data_module(cache)
    trainer.fit(recipes.build(Poisoned if way == "poison" else DINO), data)
    torch.save(states.found, out / f"states{rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
