"""What would fail after days of pretraining, refused before it: settings, data and amounts of labels."""

from __future__ import annotations

import tempfile
import time
import traceback
from collections.abc import Sequence
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

from agssd.commands.bench.architectures import PLACES, same_encoder, without_places
from agssd.commands.bench.cells import Cell
from agssd.commands.bench.leaks import labelled
from agssd.commands.bench.probes import try_probe
from agssd.commands.bench.processes import Task, said_to, side_by_side
from agssd.commands.bench.records import OTHER, Recorded, is_done, state_of
from agssd.commands.bench.settings import Bench, amount
from agssd.data_modules.agreement import cache_contract
from agssd.data_modules.cache import VolumeCache
from agssd.data_modules.leakage import check_leakage, seen_record
from agssd.data_modules.probe_set import ProbeSet
from agssd.evaluation.contract import check_contract
from agssd.tasks.encoders import encoder_file


def refuse_beforehand(
    bench: Bench,
    cells: Sequence[Cell],
    cache: VolumeCache,
    pools: Sequence[VolumeCache],
    workers: int,
    preload: Sequence[str],
) -> None:
    """Refuse what no cell could work with: of every kind of training that is to be done, one is built with its data.

    Encoders that were pretrained elsewhere are loaded, each for every kind of cell that it is for; of probes random
    weights are tried too.

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
    data = labelled(bench, cache)
    _refuse_amounts(bench, cells, data)
    _refuse_classes(bench, cells, data)
    if pools:
        _refuse_pools(data, pools, ("--data.leakage", "warn") in pairwise(bench.fit_common))
    if changed := of_other_settings(cells):
        raise ValueError(
            f"{len(changed)} runs were made with other settings, and nothing is trained beside them: "
            f"{OTHER.format(changed[0].folder)}, or give --redo to have all of them moved away and made again"
        )
    tasks: dict[str, Task] = {}
    pretrained: dict[tuple[str, str], Cell] = {}
    for cell in cells:
        before = cell.pretraining
        elsewhere = before is not None and before.elsewhere
        if before is not None and elsewhere and not encoder_file(before.folder).is_file():
            raise ValueError(f"methods.{before.method}.encoders names {before.folder}, where there is no encoder")
        if before is not None and before.command and not is_done(before):
            tasks.setdefault(f"settings of the pretraining {before.method}", (build, before.command))
            pretrained.setdefault((cell.method, cell.readout), cell)
        if is_done(cell):
            continue
        who = cell.method if bench.methods[cell.method].fit else "every method"
        if elsewhere:
            who = f"{cell.method}, seed {cell.seed}{'' if cell.fold is None else f', fold {cell.fold}'}"
        if cell.fit:
            task: Task = (build, cell.fit, elsewhere)
            tasks.setdefault(f"settings of {cell.readout} for {who}, labels {cell.labels}", task)
        elif elsewhere or before is None:
            tasks.setdefault(f"settings of {cell.readout} for {who}", (try_probe, cell, bench, str(cache.path)))
    if pretrained:
        tasks["one encoder for pretraining and readouts"] = (same_encoder, list(pretrained.values()), bench.backbone)
    reasons: dict[str, list[str]] = {}
    for name, reason in side_by_side(tasks, workers, preload):
        reasons.setdefault(reason, []).append(name)
    if reasons:
        told = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())
        raise ValueError(f"nothing is trained, since some of it cannot work: {told}")


def of_other_settings(cells: Sequence[Cell]) -> list[Recorded]:
    """Return the pretrainings and cells that were made, or begun, with other settings."""
    own = [cell.pretraining for cell in cells if cell.pretraining is not None and not cell.pretraining.elsewhere]
    runs: list[Recorded] = [*dict.fromkeys(own), *cells]
    return [one for one in runs if state_of(one) == "other"]


def shares_in_subjects(bench: Bench, cache: VolumeCache) -> list[tuple[str, str]]:
    """Return how many labelled subjects each share of the labels is, as (name, value) for a page; none without shares.

    Folds may differ: the fewest and the most.
    """
    asked = dict.fromkeys(labels for readout in bench.readouts for labels in bench.labels_of(readout))
    shares = [labels for labels in asked if not isinstance(labels, int)]
    if not shares:
        return []
    data, told = labelled(bench, cache), []
    for labels in shares:
        counts = sorted({len(data.subset(fold.learned, *amount(labels), 0)) for fold in data.folds})
        told.append(f"{labels}: {' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))}")
    return [("labelled subjects", ", ".join(told))]


def build(words: Sequence[str], with_encoder: bool = False) -> dict[str, Any]:
    """Build the module and the data of a command line ``fit ...`` as ``agssd fit`` would.

    Nothing is written, and no checkpoint of an earlier attempt is read. What callbacks ask of both is not checked.

    Args:
        words: after ``agssd``.
        with_encoder: load the encoder that they name; else weights are random.

    Raises:
        ValueError: for what module and data refuse; with the traceback for anything else that goes wrong.
    """
    started = time.perf_counter()
    kept = without_places(words[1:], PLACES[:1] if with_encoder else PLACES)
    with tempfile.TemporaryDirectory() as folder, said_to(Path(folder) / "log.txt"):
        try:
            fit = import_module("agssd.lightning_cli").ParsedFit(kept, Path(folder))
            fit.build()
            trainer = fit.build_trainer()
            trainer.strategy.connect(fit.model)
            fit.datamodule.trainer = trainer
            fit.datamodule.setup("fit")
        except Exception as error:
            raise ValueError(import_module("agssd.cli").refusal(error) or traceback.format_exc()) from error
    return {"seconds": time.perf_counter() - started}


def _refuse_classes(bench: Bench, cells: Sequence[Cell], data: ProbeSet) -> None:
    """Refuse probes of more classes than what is trained beside them has."""
    probed = [cell.readout for cell in cells if not cell.fit]
    if probed and bench.figure == "dice" and bench.num_classes is not None:
        if data.num_label_classes > bench.num_classes:
            raise ValueError(
                f"num_classes is {bench.num_classes}, but the labels of {data.cache.path}, which {probed[0]} takes as "
                f"they are stored, hold {data.num_label_classes} with background; make them equal, or group labels by "
                "`agssd prepare --label-groups`"
            )


def _refuse_pools(data: ProbeSet, pools: Sequence[VolumeCache], knowingly: bool) -> None:
    """Refuse to pretrain on whom the bench measures, or on what was prepared differently; every run checks it again.

    Args:
        data: who is learnt from and measured on.
        pools: what is pretrained on.
        knowingly: accept subject keys that cannot be compared.
    """
    salts = {one.salt_fingerprint for one in (data.cache, *pools)}
    if len(salts) > 1 and not knowingly:
        raise ValueError(
            f"{data.cache.path} and --pretrain-cache {' '.join(str(one.path) for one in pools)} were prepared with "
            "different salts, so whether a subject is in both cannot be told; prepare them with one salt file "
            "(`agssd prepare --salt FILE`), or accept it knowingly with fit_common: [--data.leakage, warn]"
        )
    rows = [(number, row) for number, one in enumerate(pools) for row in one.select(split="train")]
    measured = {subject for fold in data.folds for subject in fold.held_out}
    held = [(0, row) for row in data.rows if data.cache.cases[row].subject in measured]
    told = f"of --pretrain-cache {' '.join(str(one.path) for one in pools)}"
    if not rows:
        raise ValueError(f"the split 'train' {told} is empty; there is nothing to pretrain on")
    contract = cache_contract([pools[number].cases[row] for number, row in rows])
    check_contract(contract, cache_contract([data.cache.cases[row] for row in data.rows]), told, None)
    part = "train" if len(data.folds) > 1 else "test"
    remedy = f"Take these subjects out {told}, or out of the split {part!r} of {data.cache.path}"
    seen = seen_record(pools, rows)
    check_leakage({"seen": seen}, f"an encoder {told}", [data.cache], {part: held}, "error", remedy)


def _refuse_amounts(bench: Bench, cells: Sequence[Cell], data: ProbeSet) -> None:
    """Refuse more subjects than there are, what would be one figure alone, and classes without a labelled subject."""
    measured = {who for fold in data.folds for who in fold.held_out}
    most = min(len(fold.learned) for fold in data.folds)
    for cell in cells:
        if isinstance(cell.labels, int) and cell.labels > most:
            raise ValueError(
                f"labels of {cell.readout} are {cell.labels} subjects, but {data.cache.path} has {most} labelled "
                f"ones to learn from{'' if bench.num_folds is None else ' in a fold'}; give at most {most}"
            )
        if len(measured) * bench.seeds_of(cell.readout) * bench.draws_of(cell.labels) == 1:
            raise ValueError(
                f"{cell.readout} with labels {cell.labels} is one figure alone, of one seed, one draw and one measured "
                f"subject of {data.cache.path}, and has no interval; ask for more seeds or draws"
            )
    if bench.figure != "accuracy":
        return
    cases = [data.cache.cases[row] for row in data.rows]
    for readout, labels in dict.fromkeys((cell.readout, cell.labels) for cell in cells):
        for fold in data.folds:
            there = {c.class_index for c in cases if c.subject in set(fold.learned)}
            for draw in range(bench.draws_of(labels)):
                drawn = set(data.subset(fold.learned, *amount(labels), draw))
                lacking = there - {c.class_index for c in cases if c.subject in drawn} - {None}
                if lacking:
                    name = min(data.cache.class_names[number] for number in lacking if number is not None)
                    raise ValueError(
                        f"labels of {readout} are {labels}, {len(drawn)} of {len(fold.learned)} subjects of "
                        f"{data.cache.path}, too few to hold the class {name!r} too; give more"
                    )
