"""One rank of two: trains recipes under DDP with different settings and keeps what came out.

Started by ``test_ddp_settings.py``: ``ddp_settings_ranks.py CACHE OUT``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "contracts"))

import recipes  # noqa: E402  (torch's launcher starts this file as a script, which pytest's path does not reach)

from agssd.methods.agssd import AGSSD  # noqa: E402
from agssd.methods.mae import MAE  # noqa: E402

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "views": {"gradient_as_bucket_view": True},
    "static": {"static_graph": True},
    "both": {"gradient_as_bucket_view": True, "static_graph": True},
}


def main(cache: Path, out: Path) -> None:
    """Save ``OUT/settings-RANK.pt``: by name of setting, recipe and micro-batches, a run or why it failed."""
    torch.set_num_threads(1)
    recipes.quiet()
    found: dict[str, Any] = {}
    for kind in (AGSSD, MAE):
        for accumulate in (1, 2):
            for name, given in SETTINGS.items():
                try:
                    run: Any = recipes.short_run(
                        kind, {}, cache, devices=2, strategy=DDPStrategy(**given), accumulate_grad_batches=accumulate
                    )
                except RuntimeError as error:
                    run = str(error)
                found[f"{name} {kind.__name__} {accumulate}"] = run
    torch.save(found, out / f"settings-{os.environ['LOCAL_RANK']}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
