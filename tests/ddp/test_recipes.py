"""Two processes over gloo equal one process on the joined batch, for every recipe and alternative."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import recipes
import torch
from launch import launch

pytestmark = pytest.mark.ddp


@pytest.fixture(scope="module")
def two_ranks(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """Return what each of two ranks got, one persistent process group for all runs."""
    out = tmp_path_factory.mktemp("two_ranks")
    launch("two_ranks.py", out, str(tiny_cache), str(out))
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(2)]


def compare(alone: dict[str, Any], first: dict[str, Any], second: dict[str, Any]) -> None:
    """Hold two ranks to each other, and to one process on the joined batch."""
    joined = [[*a, *b] for a, b in zip(first["samples"], second["samples"], strict=True)]
    assert joined == alone["samples"], "ranks draw other samples than one process"
    assert first["losses"] == second["losses"], "logged losses are means over ranks"
    for name, tensor in first["state"].items():  # teacher and centres included
        assert torch.equal(second["state"][name], tensor), f"{name} differs between ranks"
    recipes.assert_equal_runs(alone, first)


# One test for all, so that tests spread over processes do not start one group each.
def test_recipes__two_ranks_equal_one_process_on_the_joined_batch(two_ranks: Any, tiny_cache: Path) -> None:
    cases = [(kind, variant) for kind in recipes.find_recipes() for variant in recipes.variants(kind)]
    assert len(cases) == len(two_ranks[0]) == len(two_ranks[1]) > 1
    failed = []
    for (kind, variant), first, second in zip(cases, *two_ranks, strict=True):
        try:
            compare(recipes.short_run(kind, variant, tiny_cache), first, second)
        except AssertionError as error:
            failed.append(f"{kind.__name__} {variant}: {error}")
    assert not failed, "\n".join(failed)
