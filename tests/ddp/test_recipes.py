"""Two processes over gloo equal one process on the joined batch, for every recipe and alternative."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import recipes
import torch
from launch import launch

pytestmark = pytest.mark.ddp


def compare(alone: dict[str, Any], first: dict[str, Any], second: dict[str, Any]) -> None:
    """Hold two ranks to each other, and to one process on the joined batch."""
    joined = [[*a, *b] for a, b in zip(first["samples"], second["samples"], strict=True)]
    assert joined == alone["samples"], "ranks draw other samples than one process"
    assert first["losses"] == second["losses"], "logged losses are means over ranks"
    for name, tensor in first["state"].items():  # teacher and centres included
        assert torch.equal(second["state"][name], tensor), f"{name} differs between ranks"
    recipes.assert_equal_runs(alone, first)


# One test for all, so that tests spread over processes do not start one group each. In `make test` the parts that ranks
# share (tests/test_distributed.py) and a fit over two hosts (tests/cluster/test_two_hosts.py) are held to one process.
@pytest.mark.slow
@pytest.mark.parametrize("which", ["defaults", "alternatives"])
def test_recipes__two_ranks_equal_one_process_on_the_joined_batch(which: str, tiny_cache: Path, tmp_path: Path) -> None:
    launch("two_ranks.py", tmp_path, str(tiny_cache), str(tmp_path), which)
    two_ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    cases = recipes.cases(which == "alternatives")
    assert len(cases) == len(two_ranks[0]) == len(two_ranks[1]) > 10
    failed = []
    for (kind, variant), first, second in zip(cases, *two_ranks, strict=True):
        try:
            compare(recipes.short_run(kind, variant, tiny_cache), first, second)
        except AssertionError as error:
            failed.append(f"{kind.__name__} {variant}: {error}")
    assert not failed, "\n".join(failed)
