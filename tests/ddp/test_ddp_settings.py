"""Which settings of DDP leave every weight as it is, with and without accumulation; see conf/cluster/ddp8.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from launch import launch

pytestmark = pytest.mark.ddp
CLUSTERS = Path(__file__).resolve().parents[2] / "conf" / "cluster"


@pytest.fixture(scope="module")
def found(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what rank 0 of ``ddp_settings_ranks.py`` kept."""
    out = tmp_path_factory.mktemp("settings")
    launch("ddp_settings_ranks.py", out, str(tiny_cache), str(out))
    return torch.load(out / "settings-0.pt", weights_only=True)  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["AGSSD", "MAE"])
@pytest.mark.parametrize("name, accumulate", [("views", 1), ("views", 2), ("static", 1), ("both", 1)])
def test_ddp__weights_are_those_of_plain_ddp(found: dict[str, Any], kind: str, name: str, accumulate: int) -> None:
    run, plain = found[f"{name} {kind} {accumulate}"], found[f"plain {kind} {accumulate}"]
    assert run["losses"] == plain["losses"] and len(plain["losses"]) == 3
    for name, tensor in plain["state"].items():
        assert torch.equal(run["state"][name], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["AGSSD", "MAE"])
def test_ddp__a_static_graph_does_not_survive_accumulation(found: dict[str, Any], kind: str) -> None:
    """If torch learns it, this fails, and the configurations may have it."""
    for name in ("static", "both"):
        assert "expect_autograd_hooks_" in found[f"{name} {kind} 2"]


@pytest.mark.parametrize("name", ["ddp8", "multinode", "slurm"])
def test_configurations__have_what_holds_always(name: str) -> None:
    strategy = yaml.safe_load((CLUSTERS / f"{name}.yaml").read_text())["trainer"]["strategy"]
    assert strategy["class_path"].endswith("DDPStrategy")
    given = strategy["init_args"]
    assert given["gradient_as_bucket_view"] and not given["find_unused_parameters"] and "static_graph" not in given
