"""One rank of two: runs every recipe, or every alternative of one, in one process group and keeps what came out.

Started by ``test_recipes.py`` with RANK-like variables of the environment set:
``two_ranks.py CACHE OUT alternatives|defaults``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "contracts"))

import recipes  # noqa: E402  (torch's launcher starts this file as a script, which pytest's path does not reach)


def main(cache: Path, out: Path, alternatives: bool) -> None:
    """Save ``OUT/RANK.pt``: a list of runs in the order of :func:`recipes.cases`."""
    torch.set_num_threads(1)
    recipes.quiet()
    results = [
        recipes.short_run(kind, variant, cache, devices=2, strategy="ddp")
        for kind, variant in recipes.cases(alternatives)
    ]
    torch.save(results, out / f"{os.environ['LOCAL_RANK']}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "alternatives")
