"""One rank of two: trains recipes under DDP and under FSDP2 in one process group and keeps what came out.

Started by ``test_sharded.py``: ``sharded_ranks.py CACHE OUT``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "contracts"))

import recipes  # noqa: E402  (torch's launcher starts this file as a script, which pytest's path does not reach)

from agssd.callbacks.non_finite import NonFinite  # noqa: E402
from agssd.callbacks.rollback import restore_training  # noqa: E402
from agssd.callbacks.run_checkpoint import RunCheckpoint  # noqa: E402
from agssd.methods.agssd import AGSSD  # noqa: E402
from agssd.sharding import ShardedStrategy, whole  # noqa: E402

STEPS, SPOILT = 10, 1


class Spoil(L.Callback):
    """Makes a gradient of one rank infinite in one step."""

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step == SPOILT and trainer.global_rank == 1:
            gradient = next(p.grad for p in pl_module.parameters() if p.grad is not None)
            (gradient.to_local() if isinstance(gradient, DTensor) else gradient).fill_(float("inf"))


class BackTo(L.Callback):
    """Puts a run back to a checkpoint once, as a rollback does."""

    def __init__(self, path: Path, after: int) -> None:
        self.path, self.after, self.done = path, after, False
        self.state: dict[str, Any] = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == self.after and not self.done:
            self.done = True
            restore_training(trainer, pl_module, self.path)
            self.state = whole(pl_module.state_dict())
            trainer.should_stop = True


def run(
    strategy: str, cache: Path, *callbacks: L.Callback, kind: Any = AGSSD, folder: Path | None = None, **given: Any
) -> dict[str, Any]:
    """Return losses, whole weights, and what of the parameters lies on this rank."""
    module, record, resume = recipes.build(kind), recipes.Recorder(), given.pop("resume", None)
    if os.environ["LOCAL_RANK"] == "1":  # ranks begin as rank 0, however they were built
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data.add_(1)
    named = list(callbacks)
    if folder is not None:
        named.append(RunCheckpoint(every_n_train_steps=2, dirpath=str(folder), keep_last=-1))
        given |= {"enable_checkpointing": True, "default_root_dir": folder}
    chosen = ShardedStrategy() if strategy == "sharded" else strategy
    trainer = recipes.trainer(record, *named, devices=2, strategy=chosen, **given)
    trainer.fit(module, recipes.data_module(cache), ckpt_path=resume, weights_only=True)
    parameters = list(module.parameters())
    return {
        "losses": record.losses,
        "state": whole(module.state_dict()),
        "in_parts": sum(isinstance(p, DTensor) for p in parameters) / len(parameters),
        "held": sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in parameters),
        "all": sum(p.numel() for p in parameters),
    }


def main(cache: Path, out: Path) -> None:
    """Save ``OUT/sharded-RANK.pt``."""
    torch.set_num_threads(1)
    recipes.quiet()
    found: dict[str, Any] = {}
    for strategy in ("ddp", "sharded"):
        for kind in recipes.find_recipes():
            if kind is not AGSSD:
                found[f"{kind.__name__} {strategy}"] = run(strategy, cache, kind=kind, max_steps=2)
        # the longest, cut and clipped, with checkpoints
        folder = out / strategy
        found[f"whole {strategy}"] = run(strategy, cache, folder=folder, max_steps=STEPS, gradient_clip_val=0.5)
        found[f"cut {strategy}"] = run(strategy, cache, max_steps=3, accumulate_grad_batches=2)
        found[f"spoilt {strategy}"] = run(strategy, cache, Spoil(), NonFinite(), max_steps=3, default_root_dir=folder)
    for strategy in ("ddp", "sharded"):
        for saved_by in ("ddp", "sharded"):
            resume = out / saved_by / "step00000004.ckpt"
            settings = {"max_steps": STEPS, "gradient_clip_val": 0.5, "resume": resume}
            found[f"{strategy} resumes {saved_by}"] = run(strategy, cache, **settings)
    back = BackTo(out / "sharded" / "step00000004.ckpt", 2)
    run("sharded", cache, back, max_steps=STEPS)
    found["rolled back"] = back.state
    torch.save(found, out / f"sharded-{os.environ['LOCAL_RANK']}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
