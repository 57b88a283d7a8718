"""Whether the encoder of a run has seen whom the run measures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agssd.commands.bench.results import NO_LEAK
from agssd.commands.bench.settings import Bench
from agssd.data_modules.cache import VolumeCache
from agssd.data_modules.leakage import Policy, check_leakage
from agssd.data_modules.probe_set import ProbeSet


def labelled(bench: Bench, cache: VolumeCache) -> ProbeSet:
    """Return whom a bench learns from and measures on."""
    kind = "label" if bench.figure == "dice" else "class"
    return ProbeSet(cache, bench.num_folds, kinds=(kind,), measured_on="test")


def leakage(contract: Mapping[str, Any] | None, encoder: str, data: ProbeSet, fold: int | None, policy: Policy) -> str:
    """Return what an encoder has seen of whom is measured, and what could not be compared; else ``NO_LEAK``.

    Args:
        contract: of the encoder; None for fresh weights.
        encoder: where it comes from, for messages.
        data: of ``labelled``.
        fold: None for the split test.
        policy: "error" or "warn".

    Raises:
        ValueError: under "error", where it has seen one of them.
    """
    held = set(data.folds[fold or 0].held_out)
    rows = [(0, row) for row in data.rows if data.cache.cases[row].subject in held]
    return check_leakage(contract, encoder, [data.cache], {"test" if fold is None else "val": rows}, policy) or NO_LEAK
