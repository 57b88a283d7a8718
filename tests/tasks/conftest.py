"""A small encoder and a quiet trainer for the tests of tasks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch

from agssd.models.vit import ViT


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def make_vit() -> Callable[..., ViT]:
    """Return make_vit(seed=0, **arguments) -> a ViT of size 24 with two blocks and patch 8."""

    def build(seed: int = 0, **arguments: Any) -> ViT:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return ViT(**{"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, **arguments})

    return build


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., L.Trainer]:
    """Return make_trainer(max_steps, **arguments) -> a CPU trainer that writes below tmp_path only."""

    def build(max_steps: int = 2, **arguments: Any) -> L.Trainer:
        return L.Trainer(
            **{
                "accelerator": "cpu",
                "devices": 1,
                "max_steps": max_steps,
                "check_val_every_n_epoch": None,
                "val_check_interval": max_steps,
                "logger": False,
                "enable_checkpointing": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "use_distributed_sampler": False,
                "default_root_dir": str(tmp_path),
                **arguments,
            }
        )

    return build
