"""Puts the helper of the contracts on the path, and one thread in force."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "contracts"))

import recipes  # noqa: E402


@pytest.fixture(autouse=True)
def _quiet_and_on_one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    recipes.quiet()
    yield
    torch.set_num_threads(threads)
