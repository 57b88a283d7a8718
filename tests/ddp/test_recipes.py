"""Two processes over gloo equal one process on the joined batch, for every recipe and alternative."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import recipes
import torch

from agssd.methods.base import PretrainModule

CASES = [(kind, variant) for kind in recipes.find_recipes() for variant in recipes.variants(kind)]
pytestmark = pytest.mark.ddp


@pytest.fixture(scope="module")
def two_ranks(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """Return what each of two ranks got, one persistent process group for all runs."""
    out = tmp_path_factory.mktemp("two_ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).with_name("two_ranks.py")
    ranks = []
    for rank in range(2):
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0"}
        environment |= {"LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, str(script), str(tiny_cache), str(out)]
        with open(out / f"{rank}.log", "w") as log:
            ranks.append(subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=log))
    try:
        codes = [rank.wait(timeout=300) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    logs = "\n".join((out / f"{rank}.log").read_text()[-3000:] for rank in range(2))
    assert codes == [0, 0], logs
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize(
    ("position", "kind", "variant"),
    [(position, kind, variant) for position, (kind, variant) in enumerate(CASES)],
    ids=[f"{kind.__name__}-{recipes.name_of(variant)}" for kind, variant in CASES],
)
def test_recipe__two_ranks_equal_one_process_on_the_joined_batch(
    position: int, kind: type[PretrainModule], variant: dict[str, Any], two_ranks: Any, tiny_cache: Path
) -> None:
    first, second = (rank[position] for rank in two_ranks)
    alone = recipes.short_run(kind, variant, tiny_cache)
    joined = [[*a, *b] for a, b in zip(first["samples"], second["samples"], strict=True)]
    assert joined == alone["samples"], "ranks draw other samples than one process"
    assert first["losses"] == second["losses"], "logged losses are means over ranks"
    for name, tensor in first["state"].items():  # teacher and centres included
        assert torch.equal(second["state"][name], tensor), f"{name} differs between ranks"
    recipes.assert_equal_runs(alone, first)
