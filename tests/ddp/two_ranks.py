"""One rank of two: runs every variant of every recipe in one process group and keeps what came out.

Started by ``test_recipes.py`` with RANK-like variables of the environment set: ``two_ranks.py CACHE OUT``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "contracts"))

import recipes  # noqa: E402  (torch's launcher starts this file as a script, which pytest's path does not reach)


def main(cache: Path, out: Path) -> None:
    """Save ``OUT/RANK.pt``: a list of runs in the order of recipes and variants."""
    torch.set_num_threads(1)
    recipes.quiet()
    results = []
    for kind in recipes.find_recipes():
        for variant in recipes.variants(kind):
            results.append(recipes.short_run(kind, variant, cache, devices=2, strategy="ddp"))
    torch.save(results, out / f"{os.environ['LOCAL_RANK']}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
