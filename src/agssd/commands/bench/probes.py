"""Readouts of a bench that train no network: neighbours and linear readouts of frozen features.

All cells of one encoder are done at once, so that its features are computed once and not once a cell.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml

from agssd.commands.bench.architectures import refuse_another
from agssd.commands.bench.cells import Cell, Measured, measured_guesses, row_of
from agssd.commands.bench.leaks import labelled, leakage
from agssd.commands.bench.records import Job, once, state_of
from agssd.commands.bench.settings import Bench, Labels, amount
from agssd.data_modules.agreement import cache_contract
from agssd.data_modules.cache import VolumeCache
from agssd.data_modules.probe_set import ProbeSet
from agssd.evaluation.classification_probe import SHARES, ProbeVector
from agssd.evaluation.contract import check_contract
from agssd.evaluation.folds import Fold
from agssd.evaluation.probe import all_finite
from agssd.evaluation.probe_features import ProbeFeatures, encode
from agssd.evaluation.segmentation_probe import NeighbourReadout, ProbeCase, linear_segmenter, probe_segmentation
from agssd.models.backbone import build_fresh
from agssd.tasks.encoders import load_encoder
from agssd.types import Triple

if TYPE_CHECKING:
    from agssd.models.backbone import Backbone


def probe(cells: Sequence[Cell], job: Job) -> dict[str, Any]:
    """Do the probes of one encoder, or find that they are done, and return how long that took.

    Args:
        cells: of one method, seed, fold, window and depths.
        job: what every run of the bench is given.

    Raises:
        ValueError: if they were made with other settings, or an encoder or cache cannot serve.
    """
    started = time.perf_counter()
    torch.set_num_threads(job.bench.threads)
    frozen = _Frozen(cells[0], job.bench, job.cache)
    for cell in sorted(cells, key=lambda one: state_of(one) == "other"):  # what is refused comes last, and ends it
        once(cell, job, partial(_measured, cell, job, frozen))
    return {"seconds": time.perf_counter() - started}


def try_probe(cell: Cell, bench: Bench, cache: str) -> dict[str, Any]:
    """Find out whether an encoder that is there, or one of random weights, can be probed, and return how long it took.

    Raises:
        ValueError: if it cannot serve: another preparation or number of channels than the cache has, a window that its
            patch does not divide, a subject that it has seen and that is measured.
    """
    started = time.perf_counter()
    frozen = _Frozen(cell, bench, cache)
    frozen.encoder.token_grid(frozen.window_vox)
    return {"seconds": time.perf_counter() - started}


def _measured(cell: Cell, job: Job, frozen: _Frozen) -> dict[str, Any]:
    found = frozen.figures(str(job.bench.readouts[cell.readout].probe), cell.labels, cell.draw)
    return row_of(cell, job, found, frozen.leakage)


class _Frozen:
    """The features of one encoder on the volumes of a cache, computed when they are first needed."""

    def __init__(self, cell: Cell, bench: Bench, cache: str) -> None:
        self.cell, self.bench, self.cache = cell, bench, cache
        d, h, w = bench.readouts[cell.readout].window_vox
        self.window_vox: Triple = (d, h, w)
        self.depths = bench.readouts[cell.readout].depths
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def data(self) -> ProbeSet:
        return labelled(self.bench, VolumeCache(self.cache))

    @cached_property
    def fold(self) -> Fold:
        return self.data.folds[self.cell.fold or 0]

    @cached_property
    def _checked(self) -> tuple[Backbone, str]:
        cell, cache = self.cell, self.data.cache
        if cell.pretraining is None:
            path = Path(str(self.bench.backbone))  # or the settings are refused
            encoder, told = build_fresh(yaml.safe_load(path.read_text(encoding="utf-8")), cell.seed), str(path)
        else:
            encoder, told = load_encoder(cell.pretraining.folder), str(cell.pretraining.folder)
        contract = cache_contract([cache.cases[row] for row in self.data.rows])
        if contract["channels"] != encoder.in_channels:
            raise ValueError(f"{cache.path} has {contract['channels']} channel(s), {told} takes {encoder.in_channels}")
        check_contract(encoder.contract, contract, told, None)
        if cell.pretraining is not None:
            refuse_another(encoder.config, cell.pretraining.folder, Path(str(self.bench.backbone)))
        return encoder.eval().to(self.device), leakage(encoder.contract, told, self.data, cell.fold, "error")

    @property
    def encoder(self) -> Backbone:
        return self._checked[0]

    @property
    def leakage(self) -> str:
        return self._checked[1]

    @cached_property
    def features(self) -> list[ProbeFeatures]:
        found = encode(self.encoder, self.data.volumes(), self.window_vox, 0.5, depths=self.depths)
        if not all_finite(found):
            raise ValueError(f"the features of {self.cell.method} are not finite: its weights have diverged")
        return found

    def figures(self, readout: str, labels: Labels, draw: int) -> Measured:
        """Return by measured subject the Dice over its classes, or its weighted accuracy; as ``read_measured``.

        Raises:
            ValueError: if the labels of no measured subject hold a class.
        """
        fold = Fold(tuple(self.data.subset(self.fold.learned, *amount(labels), draw)), self.fold.held_out)
        if readout.endswith("seg"):
            cases = [ProbeCase(f.subject, f.tokens, f.labels) for f in self.features if f.labels is not None]
            fit = partial(NeighbourReadout if readout == "knn-seg" else linear_segmenter, device=self.device)
            found = probe_segmentation(cases, [fold], self.data.num_label_classes, fit)
            if all(np.isnan(dice).all() for dice in found.values()):
                raise ValueError(f"no class is in the labels of a measured subject of {self.data.cache.path}")
            of_class = np.stack(list(found.values())).T  # (K - 1, subjects)
            return Measured(
                {who: None if np.isnan(dice).all() else float(np.nanmean(dice)) for who, dice in sorted(found.items())},
                {str(k): float(np.nanmean(dice)) for k, dice in enumerate(of_class, 1) if not np.isnan(dice).all()},
            )
        vectors = [ProbeVector(f.subject, f.cls, f.target) for f in self.features if f.target is not None]
        learned = [case for case in vectors if case.subject in set(fold.learned)]
        asked = [case for case in vectors if case.subject in set(fold.held_out)]
        guesses = SHARES[readout.removesuffix("-cls")](learned, asked, self.data.num_targets).argmax(1).tolist()
        return measured_guesses([(one.subject, one.target, guess) for one, guess in zip(asked, guesses, strict=True)])
