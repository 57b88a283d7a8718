"""What would fail after days of pretraining, refused before it: settings, data and amounts of labels."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

from agssd.commands.bench.cells import Cell
from agssd.commands.bench.processes import Task, said_to, side_by_side
from agssd.commands.bench.records import is_done
from agssd.commands.bench.settings import Bench
from agssd.data_modules.agreement import cache_contract
from agssd.data_modules.cache import VolumeCache
from agssd.data_modules.leakage import check_leakage, seen_record
from agssd.data_modules.probe_set import ProbeSet
from agssd.evaluation.contract import check_contract

_OF_A_RUN = ("--model.encoder", "--trainer.default_root_dir")  # what is not there yet


def refuse_beforehand(
    bench: Bench,
    cells: Sequence[Cell],
    cache: VolumeCache,
    pools: Sequence[VolumeCache],
    workers: int,
    preload: Sequence[str],
) -> None:
    """Refuse what no cell could work with: of every kind of training that is to be done, one is built with its data.

    Args:
        bench: the settings.
        cells: those that are asked for.
        cache: the labelled cache.
        pools: what is pretrained on in its place, if anything.
        workers: kinds that are built side by side.
        preload: modules that are imported once.

    Raises:
        ValueError: naming every amount, method and readout that cannot work, and why.
    """
    kind = "label" if bench.figure == "dice" else "class"
    data = ProbeSet(cache, bench.num_folds, kinds=(kind,), measured_on="test")
    _refuse_amounts(bench, cells, data)
    if pools:
        _refuse_pools(data, pools)
    tasks: dict[str, Task] = {}
    for cell in cells:
        before = cell.pretraining
        if before is not None and before.command and not is_done(before):
            tasks.setdefault(f"settings of the pretraining {before.method}", (build, before.command))
        if cell.fit and not is_done(cell):
            who = cell.method if bench.methods[cell.method].fit else "every method"
            tasks.setdefault(f"settings of {cell.readout} for {who}, labels {cell.labels}", (build, cell.fit))
    if failed := side_by_side(tasks, workers, preload):
        told = "; ".join(f"{name}: {reason}" for name, reason in failed)
        raise ValueError(f"nothing is trained, since some of it cannot work: {told}")


def build(words: Sequence[str]) -> dict[str, Any]:
    """Build the module and the data of a command line ``fit ...`` as ``agssd fit`` would, with random weights.

    Nothing is written, and no checkpoint of an earlier attempt is read.

    Raises:
        ValueError: for what ``agssd fit`` would refuse.
    """
    started = time.perf_counter()
    kept = [word for before, word in pairwise(words) if before not in _OF_A_RUN and word not in _OF_A_RUN]
    with tempfile.TemporaryDirectory() as folder, said_to(Path(folder) / "log.txt"):
        fit = import_module("agssd.lightning_cli").ParsedFit(kept, Path(folder))
        fit.build()
        trainer = fit.build_trainer()
        trainer.strategy.connect(fit.model)
        fit.datamodule.trainer = trainer
        fit.datamodule.setup("fit")
    return {"seconds": time.perf_counter() - started}


def _refuse_pools(data: ProbeSet, pools: Sequence[VolumeCache]) -> None:
    """Refuse to pretrain on whom the bench measures, or on what was prepared differently; every run checks it again."""
    seen = seen_record(pools, [(number, row) for number, one in enumerate(pools) for row in one.select(split="train")])
    measured = {subject for fold in data.folds for subject in fold.held_out}
    held = [(0, row) for row in data.rows if data.cache.cases[row].subject in measured]
    told = f"of --pretrain-cache {' '.join(str(one.path) for one in pools)}"
    contract = cache_contract([case for one in pools for case in one.cases])
    check_contract(contract, cache_contract([data.cache.cases[row] for row in data.rows]), told, None)
    check_leakage(
        {"seen": seen}, f"an encoder {told}", [data.cache], {"train" if len(data.folds) > 1 else "test": held}, "error"
    )


def _refuse_amounts(bench: Bench, cells: Sequence[Cell], data: ProbeSet) -> None:
    most = min(len(fold.learned) for fold in data.folds)
    for cell in cells:
        if isinstance(cell.labels, int) and cell.labels > most:
            raise ValueError(
                f"labels of {cell.readout} are {cell.labels} subjects, but {data.cache.path} has {most} labelled "
                f"ones to learn from{'' if bench.num_folds is None else ' in a fold'}; give at most {most}"
            )
