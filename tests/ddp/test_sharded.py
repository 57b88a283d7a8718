"""FSDP2 on two processes over gloo: weights lie in parts and come out as under DDP, in runs, files and rollbacks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import recipes
import torch
from launch import launch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from agssd.methods.agssd import AGSSD

pytestmark = [pytest.mark.ddp, pytest.mark.slow]


class Ran:
    """What two ranks kept (see ``sharded_ranks.py``), and where."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.ranks: list[dict[str, Any]] = [torch.load(out / f"sharded-{r}.pt", weights_only=True) for r in range(2)]

    def checkpoint(self, strategy: str, step: int) -> dict[str, Any]:
        return torch.load(self.out / strategy / f"step{step:08d}.ckpt", weights_only=True)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def ran(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Run ``sharded_ranks.py`` once for all tests."""
    out = tmp_path_factory.mktemp("sharded")
    launch("sharded_ranks.py", out, str(tiny_cache), str(out))
    return Ran(out)


def hold_equal(ran: Ran, first: str, second: str, compare: Callable[..., None] = recipes.assert_equal_runs) -> None:
    for rank in ran.ranks:
        compare(rank[first], rank[second])


def test_sharded__parts_lie_on_the_ranks(ran: Ran) -> None:
    for rank in ran.ranks:
        found = rank["whole sharded"]
        assert found["in_parts"] == 1.0, "student and teacher, heads included"
        assert found["held"] < 0.51 * found["all"]
        assert rank["whole ddp"]["held"] == found["all"]


def test_sharded__ten_clipped_steps_are_those_of_ddp(ran: Ran) -> None:
    hold_equal(ran, "whole ddp", "whole sharded")
    state = ran.ranks[0]["whole sharded"]["state"]
    teacher = [name for name in state if name.startswith("teacher.backbone.blocks.") and name.endswith("weight")]
    apart = [not torch.equal(state[name], state[name.replace("teacher", "student", 1)]) for name in teacher]
    assert teacher and all(apart), "the teacher is an average and no copy"
    assert ran.ranks[0]["whole sharded"]["losses"] == ran.ranks[1]["whole sharded"]["losses"]


def test_sharded__accumulated_steps_are_those_of_ddp(ran: Ran) -> None:
    hold_equal(ran, "cut ddp", "cut sharded")


def test_sharded__every_recipe_is_as_under_ddp(ran: Ran) -> None:
    kinds = [kind.__name__ for kind in recipes.find_recipes() if kind is not AGSSD]
    assert len(kinds) > 5
    for kind in kinds:
        hold_equal(ran, f"{kind} ddp", f"{kind} sharded")


def test_sharded__a_gradient_that_is_infinite_on_one_rank_moves_nothing_on_any(ran: Ran) -> None:
    hold_equal(ran, "spoilt ddp", "spoilt sharded")
    assert all(tensor.isfinite().all() for tensor in ran.ranks[0]["spoilt sharded"]["state"].values())
    for rank in range(2):
        captures = [ran.out / of / f"captures/step00000001-rank{rank}.pt" for of in ("ddp", "sharded")]
        first, second = (torch.load(path, weights_only=True)["state_dict"] for path in captures)
        assert first.keys() == second.keys()
        for name, tensor in first.items():
            torch.testing.assert_close(second[name], tensor, rtol=0, atol=1e-6)


def test_sharded__checkpoints_are_those_of_ddp(ran: Ran) -> None:
    first, second = (ran.checkpoint(strategy, 4) for strategy in ("ddp", "sharded"))
    assert first["agssd"]["method"] == second["agssd"]["method"] == "agssd.methods.agssd.AGSSD"
    assert first["state_dict"].keys() == second["state_dict"].keys()
    (ours,), (theirs,) = second["optimizer_states"], first["optimizer_states"]
    assert ours["state"].keys() == theirs["state"].keys()
    for number, state in theirs["state"].items():
        for name, value in state.items():
            torch.testing.assert_close(ours["state"][number][name], value, rtol=0, atol=1e-5)
    for ours_group, theirs_group in zip(ours["param_groups"], theirs["param_groups"], strict=True):
        assert ours_group["params"] == theirs_group["params"] and ours_group["lr"] == theirs_group["lr"]


def test_sharded__resumed_is_undisturbed_bit_for_bit(ran: Ran) -> None:
    def equal(undisturbed: dict[str, Any], resumed: dict[str, Any]) -> None:
        assert resumed["losses"] == undisturbed["losses"][4:]
        for name, tensor in undisturbed["state"].items():
            assert torch.equal(resumed["state"][name], tensor), name

    hold_equal(ran, "whole sharded", "sharded resumes sharded", equal)
    hold_equal(ran, "whole ddp", "ddp resumes ddp", equal)


def test_sharded__a_run_may_change_to_ddp_and_back(ran: Ran) -> None:
    def equal(undisturbed: dict[str, Any], resumed: dict[str, Any]) -> None:
        recipes.assert_equal_runs(undisturbed | {"losses": undisturbed["losses"][4:]}, resumed)

    hold_equal(ran, "whole ddp", "sharded resumes ddp", equal)
    hold_equal(ran, "whole ddp", "ddp resumes sharded", equal)


def test_sharded__a_rollback_brings_back_every_part(ran: Ran) -> None:
    saved = ran.checkpoint("sharded", 4)["state_dict"]
    for rank in ran.ranks:
        assert rank["rolled back"].keys() == saved.keys()
        for name, tensor in saved.items():
            assert torch.equal(rank["rolled back"][name], tensor), name


@pytest.mark.parametrize("strategy", [ModelParallelStrategy(), FSDPStrategy()], ids=lambda one: type(one).__name__)
def test_sharded__other_sharding_is_refused(strategy: Any) -> None:
    module = recipes.build(AGSSD)
    module._trainer = SimpleNamespace(strategy=strategy)
    with pytest.raises(ValueError, match=r"use agssd\.sharding\.ShardedStrategy"):
        module.configure_model()
