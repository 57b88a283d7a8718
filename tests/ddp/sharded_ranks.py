"""One rank of two: trains recipes under DDP and under FSDP2 in one process group and keeps what came out.

Started by ``test_sharded.py``: ``sharded_ranks.py CACHE OUT``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "contracts"))

import recipes  # noqa: E402  (torch's launcher starts this file as a script, which pytest's path does not reach)

from agssd.callbacks.run_checkpoint import RunCheckpoint  # noqa: E402
from agssd.methods.base import PretrainModule  # noqa: E402
from agssd.sharding import ShardedStrategy, whole  # noqa: E402

STEPS = 10


def run(kind: type[PretrainModule], cache: Path, strategy: str, **given: Any) -> dict[str, Any]:
    """Return losses, whole weights and how many parameters lay in parts."""
    module, record = recipes.build(kind, **given.pop("variant", {})), recipes.Recorder()
    resume, folder = given.pop("resume", None), given.pop("folder", None)
    callbacks = [record]
    if folder is not None:
        callbacks.append(RunCheckpoint(every_n_train_steps=2, dirpath=str(folder), keep_last=-1))
        given["enable_checkpointing"] = True
    chosen = ShardedStrategy() if strategy == "sharded" else strategy
    trainer = recipes.trainer(*callbacks, devices=2, strategy=chosen, **given)
    trainer.fit(module, recipes.data_module(cache), ckpt_path=resume, weights_only=True)
    return {
        "losses": record.losses,
        "state": whole(module.state_dict()),
        "in_parts": [name for name, value in module.named_parameters() if isinstance(value, DTensor)],
        "local": sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in module.parameters()),
    }


def main(cache: Path, out: Path) -> None:
    """Save ``OUT/sharded-RANK.pt``."""
    torch.set_num_threads(1)
    recipes.quiet()
    found: dict[str, Any] = {}
    for kind in recipes.find_recipes():
        steps = STEPS if kind.__name__ == "AGSSD" else 3
        for strategy in ("ddp", "sharded"):
            found[f"{kind.__name__} {strategy}"] = run(kind, cache, strategy, max_steps=steps)
    torch.save(found, out / f"sharded-{os.environ['LOCAL_RANK']}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
