"""One thread and a quiet Lightning for every test of this folder, and a cache that serves every recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
from recipes import quiet_and_on_one_thread  # noqa: F401  (a fixture: pytest finds it by its name here)


@pytest.fixture(scope="session")
def tiny_cache(region_cache: Path) -> Path:
    """Return the tiny cache with region maps, which some recipes need."""
    return region_cache
