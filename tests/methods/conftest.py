"""One thread and a quiet Lightning for every test of this folder, a cache that serves every recipe, and its batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import recipes
from recipes import quiet_and_on_one_thread  # noqa: F401  (a fixture: pytest finds it by its name here)
from torch import Tensor

from agssd.methods.base import PretrainModule


@pytest.fixture(scope="session")
def tiny_cache(region_cache: Path) -> Path:
    """Return the tiny cache with region maps, which some recipes need."""
    return region_cache


@pytest.fixture
def batch(tiny_cache: Path) -> dict[str, Tensor]:
    """Return four parent crops."""
    return recipes.parents(tiny_cache, [0, 1, 2, 3])


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Return a function that sets the share of the run that is done."""
    return lambda progress: monkeypatch.setattr(PretrainModule, "progress", property(lambda self: progress))
