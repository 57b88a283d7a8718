"""Parent crops for pretraining: one read per sample from HDF5 caches, in an order that nothing but the seed decides."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as L
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from agssd.data_modules.cache import CaseInfo, VolumeCache
from agssd.data_modules.sampling import (
    MicroBatches,
    case_of_sample,
    check_padding,
    crop_start,
    micro_batch_size,
)
from agssd.scans.prepare import CT_RANGE_HU, MRI_PERCENTILES, same_spacing
from agssd.types import ParentBatch, Triple

if TYPE_CHECKING:
    from torch import Tensor

_LOG = logging.getLogger(__name__)


class ParentCrops(Dataset[dict[str, "Tensor"]]):
    """Map-style dataset whose index is the number of a sample in the stream, so any index from 0 on is valid.

    Args:
        caches: open caches.
        rows: (cache, case) of every case to draw from, all of one weight.
        parent_vox: crop in voxels.
        seed: of the stream.
        prob_foreground: share of crops centred on foreground.
        shuffle: each pass over the rows in a new order (training) or always in theirs (validation).
    """

    def __init__(
        self,
        caches: Sequence[VolumeCache],
        rows: Sequence[tuple[int, int]],
        parent_vox: Triple,
        seed: int,
        prob_foreground: float,
        shuffle: bool,
    ) -> None:
        """Keep what a sample is computed from."""
        self.caches = tuple(caches)
        self.rows = tuple(rows)
        self.parent_vox = parent_vox
        self.seed = seed
        self.prob_foreground = prob_foreground
        self.shuffle = shuffle

    def info(self, row: int) -> CaseInfo:
        """Return what the cache says about case ``row``."""
        cache, case = self.rows[row]
        return self.caches[cache].cases[case]

    def row_of(self, sample: int) -> int:
        """Return the case of sample ``sample``."""
        if self.shuffle:
            return case_of_sample(self.seed, sample, len(self.rows))
        return sample % len(self.rows)

    def __getitem__(self, sample: int) -> dict[str, Tensor]:
        """Return sample ``sample`` as a ParentBatch without its batch axis."""
        row = self.row_of(sample)
        cache_idx, case = self.rows[row]
        cache, info = self.caches[cache_idx], self.info(row)
        start = crop_start(
            self.seed,
            sample,
            info.shape,
            self.parent_vox,
            _foreground_chunks(cache, case),
            self.prob_foreground,
        )
        image = cache.read(case, start, self.parent_vox, "image")  # (C, D, H, W) int16
        foreground = cache.read(case, start, self.parent_vox, "foreground")  # (D, H, W) uint8
        return {
            "image": torch.from_numpy(image),
            "foreground": torch.from_numpy(foreground)[None],
            "scale": torch.tensor(info.scale, dtype=torch.float32),
            "offset": torch.tensor(info.offset, dtype=torch.float32),
            "low": torch.tensor(info.low, dtype=torch.float32),
            "high": torch.tensor(info.high, dtype=torch.float32),
            "edge_q99": torch.tensor(info.edge_q99, dtype=torch.float32),
            "is_ct": torch.tensor(info.modality == "ct"),
            "spacing_mm": torch.tensor(info.spacing_mm, dtype=torch.float32),
            "sample": torch.tensor(sample, dtype=torch.int64),
            "case": torch.tensor(row, dtype=torch.int64),
        }


@lru_cache(maxsize=4096)
def _foreground_chunks(cache: VolumeCache, case: int) -> np.ndarray:
    return cache.foreground_chunks(case)


class PretrainDataModule(L.LightningDataModule):
    """Delivers one parent crop per case as stored (int16 with its foreground); views are made from it on the device.

    The training stream is endless and has no epochs: ``trainer.max_steps`` ends the run. Sample ``n`` is the same crop
    of the same case on any number of devices, workers and accumulated batches, and after any interruption. A batch is
    a :class:`agssd.types.ParentBatch` of ``global_batch_size / (devices x accumulated batches)`` samples.

    Validation draws fixed crops of the ``val`` split: as many as the smallest multiple of the global batch that visits
    every case, so that the figures depend on the global batch only; without a ``val`` split there is none.

    Args:
        cache: one path or several, written by ``agssd prepare``. Several are concatenated, each case with the same
            weight; they must agree in channels and spacing.
        parent_vox: parent crop in voxels (D, H, W). Volumes that are smaller are padded on both sides.
        global_batch_size: samples per optimiser step over all devices and accumulated batches.
        num_workers: reading processes per device.
        seed: of the order of cases and the place of crops.
        prob_foreground: share of crops centred on foreground rather than placed uniformly (source: ours).
        pin_memory: page-locked batches; takes effect where there is a GPU.
        prefetch: batches that each worker reads ahead.

    Raises:
        ValueError: in ``setup``, for a missing, broken or unsuitable cache and for impossible sizes.
    """

    def __init__(
        self,
        cache: str | list[str],
        parent_vox: Triple,
        global_batch_size: int,
        num_workers: int = 2,
        seed: int = 0,
        prob_foreground: float = 0.8,
        pin_memory: bool = True,
        prefetch: int = 2,
    ) -> None:
        """Keep the settings; nothing is opened before ``setup``."""
        super().__init__()
        self.save_hyperparameters(logger=False)  # paths may name patients: they go into checkpoints, not to W&B
        self.cache = [cache] if isinstance(cache, str) else [str(path) for path in cache]
        self.parent_vox: Triple = (int(parent_vox[0]), int(parent_vox[1]), int(parent_vox[2]))
        self.global_batch_size = global_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.prob_foreground = prob_foreground
        self.pin_memory = pin_memory
        self.prefetch = prefetch
        self.caches: list[VolumeCache] = []
        self.train_crops: ParentCrops | None = None
        self.val_crops: ParentCrops | None = None
        self._check_arguments()

    def _check_arguments(self) -> None:
        if not self.cache:
            raise ValueError(
                "data.cache is empty; name a cache written by `agssd prepare`, for example --data.cache PATH"
            )
        if min(self.parent_vox) < 1:
            raise ValueError(f"data.parent_vox is {list(self.parent_vox)}; give three positive numbers of voxels")
        if self.seed < 0:
            raise ValueError(f"data.seed is {self.seed}; give 0 or a positive number")
        if not 0 <= self.prob_foreground <= 1:
            raise ValueError(f"data.prob_foreground is {self.prob_foreground}; give a share between 0 and 1")
        if self.num_workers < 0 or self.prefetch < 1:
            raise ValueError(
                f"data.num_workers is {self.num_workers} and data.prefetch {self.prefetch}; "
                "give at least 0 workers and 1 batch"
            )

    # ------------------------------------------------------------------ setup

    def setup(self, stage: str) -> None:
        """Open the indices of the caches and refuse what cannot work, before the first batch is read.

        Raises:
            ValueError: for missing or disagreeing caches, no training case, too large a parent crop, a global batch
                that cannot be divided, or a trainer without ``max_steps``.
        """
        if stage == "fit":
            self._require_max_steps()
        if self.caches:
            return
        caches = [VolumeCache(path) for path in self.cache]
        check_agreement(caches)
        warn_of_subjects(caches)
        train = [(i, case) for i, cache in enumerate(caches) for case in cache.select(split="train")]
        val = [(i, case) for i, cache in enumerate(caches) for case in cache.select(split="val")]
        if not train:
            raise ValueError(f"no case of the split 'train' in data.cache {self.cache}; see `agssd inspect CACHE`")
        check_padding([caches[i].cases[case].shape for i, case in train], self.parent_vox)
        self._micro_batch_size()
        self.caches = caches
        self.train_crops = ParentCrops(caches, train, self.parent_vox, self.seed, self.prob_foreground, shuffle=True)
        if val:
            self.val_crops = ParentCrops(caches, val, self.parent_vox, self.seed, self.prob_foreground, shuffle=False)

    def _require_max_steps(self) -> None:
        if self.trainer is not None and self.trainer.max_steps < 1:
            raise ValueError(
                f"trainer.max_steps is {self.trainer.max_steps}; the training stream is endless and every schedule is "
                "a fraction of the optimiser steps, so give a positive number, for example --trainer.max_steps 1000"
            )

    def _cut(self) -> tuple[int, int, int]:
        """Return (rank, world size, accumulated batches); a module without trainer is one rank."""
        if self.trainer is None:
            return 0, 1, 1
        return self.trainer.global_rank, self.trainer.world_size, self.trainer.accumulate_grad_batches

    def _micro_batch_size(self) -> int:
        _, world_size, accumulate = self._cut()
        return micro_batch_size(self.global_batch_size, world_size, accumulate)

    @property
    def contract(self) -> dict[str, Any]:
        """Return the preprocessing that a user of the encoder must repeat, in plain types (after ``setup``).

        Keys: ``spacing_mm`` (D, H, W), ``orientation`` ("SAR": each axis increases towards superior, anterior, right),
        ``modality`` ("ct", "mri" or "mixed"), ``intensity`` per modality, ``channels``.
        """
        if self.train_crops is None:
            raise ValueError("the data module has not been set up; call setup('fit') before asking for its contract")
        return cache_contract([self.train_crops.info(row) for row in range(len(self.train_crops.rows))])

    # ---------------------------------------------------------------- loaders

    def train_dataloader(self) -> DataLoader[ParentBatch]:
        """Return the endless stream from the first sample that no optimiser step has seen."""
        assert self.train_crops is not None, "Lightning calls setup first"
        rank, world_size, _ = self._cut()
        steps_done = self.trainer.global_step if self.trainer is not None else 0
        first = steps_done * self.global_batch_size
        return self._loader(self.train_crops, MicroBatches(self._micro_batch_size(), rank, world_size, first))

    def val_dataloader(self) -> DataLoader[ParentBatch] | list[DataLoader[ParentBatch]]:
        """Return one finite pass of fixed crops of the ``val`` split; an empty list without one."""
        if self.val_crops is None:
            return []
        rank, world_size, _ = self._cut()
        batches = -(-len(self.val_crops.rows) // self.global_batch_size)
        total = batches * self.global_batch_size
        return self._loader(self.val_crops, MicroBatches(self._micro_batch_size(), rank, world_size, num_samples=total))

    def _loader(self, crops: ParentCrops, batches: MicroBatches) -> DataLoader[ParentBatch]:
        workers = self.num_workers
        loader = DataLoader(
            crops,
            batch_sampler=cast(Any, batches),  # any iterable of lists of indices; torch's annotation is narrower
            num_workers=workers,
            pin_memory=self.pin_memory and torch.cuda.is_available(),
            prefetch_factor=self.prefetch if workers else None,
            persistent_workers=workers > 0,
        )
        return cast("DataLoader[ParentBatch]", loader)

    # ----------------------------------------------------------------- resume

    def state_dict(self) -> dict[str, Any]:
        """Return what identifies the stream and how far it was consumed, in plain types."""
        return {**self._stream(), "samples_seen": self._samples_seen()}

    def _samples_seen(self) -> int:
        return (self.trainer.global_step if self.trainer is not None else 0) * self.global_batch_size

    def _stream(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "global_batch_size": self.global_batch_size,
            "parent_vox": list(self.parent_vox),
            "prob_foreground": self.prob_foreground,
            "num_cases": len(self.train_crops.rows) if self.train_crops is not None else 0,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that the stream of the checkpoint is this one; its place follows from ``trainer.global_step``.

        Raises:
            ValueError: naming each setting that differs, since the run would go on with other samples.
        """
        now = self._stream()
        differing = [
            f"{name} was {state_dict[name]}, is {now[name]}"
            for name in now
            if name in state_dict and state_dict[name] != now[name]
        ]
        if differing:
            raise ValueError(
                f"the checkpoint was trained on another stream of samples: {'; '.join(differing)}; "
                "resume with the settings of the run (its config.yaml), or start a new run"
            )


def check_agreement(caches: Sequence[VolumeCache], modality: str | None = None) -> None:
    """Refuse caches whose cases differ in channels or spacing.

    Args:
        caches: open caches.
        modality: look at the cases of this one only.

    Raises:
        ValueError: naming a case of each kind, its cache and the remedy, or if there is no case at all.
    """
    cases = [(cache, cache.cases[row]) for cache in caches for row in cache.select(modality=modality)]
    if not cases:
        kind = "" if modality is None else f" of data.modality {modality}"
        raise ValueError(
            f"no cases{kind} in data.cache {[str(cache.path) for cache in caches]}; run `agssd prepare` again"
        )
    first_cache, first = cases[0]
    for cache, info in cases:
        inside = cache is first_cache
        who = f"the cases of {cache.path}" if inside else "caches"
        here, there = (
            f"case {case.key} ({case.modality})" if inside else f"{place.path} (case {case.key}, {case.modality})"
            for place, case in ((first_cache, first), (cache, info))
        )
        if info.channels != first.channels:
            raise ValueError(
                f"{who} disagree in channels: {here} has {first.channels}, {there} has {info.channels}; "
                + ("prepare one cache for each number" if inside else "train on them separately")
            )
        if not same_spacing(info.spacing_mm, first.spacing_mm):
            if info.modality != first.modality:
                remedy = (
                    "run `agssd prepare` once per --modality and train on one (a downstream task may choose with "
                    "data.modality), or give all one --spacing-mm"
                )
            elif inside:
                remedy = "prepare it again with one --spacing-mm"
            else:
                remedy = "prepare both with the same --spacing-mm"
            raise ValueError(
                f"{who} disagree in spacing: {here} has {list(first.spacing_mm)} mm, {there} has "
                f"{list(info.spacing_mm)} mm; {remedy}"
            )


def warn_of_subjects(caches: Sequence[VolumeCache]) -> None:
    """Warn where one person may be, or is, in different splits of joined caches.

    Keys made with different salts, or with an unknown one, cannot be compared.
    """
    if len(caches) < 2:
        return
    names = ", ".join(str(cache.path) for cache in caches)
    fingerprints = {cache.salt_fingerprint for cache in caches}
    if None in fingerprints or len(fingerprints) > 1:
        _LOG.warning(
            "subjects cannot be matched across data.cache %s: their keys were made with different or unknown salts, so "
            "one person may be in train of one and in val or test of another; prepare them with one salt file, "
            "`agssd prepare --salt FILE`",
            names,
        )
        return
    splits: dict[str, set[str]] = defaultdict(set)
    for cache in caches:
        for info in cache.cases:
            splits[info.subject].add(info.split)
    torn = sorted(subject for subject, found in splits.items() if len(found) > 1)
    if torn:
        _LOG.warning(
            "%d subjects are in different splits of data.cache %s, for example %s (%s); prepare all sources into one "
            "cache, `agssd prepare SOURCE SOURCE --out CACHE`",
            len(torn),
            names,
            torn[0],
            ", ".join(sorted(splits[torn[0]])),
        )


def cache_contract(cases: Sequence[CaseInfo]) -> dict[str, Any]:
    """Return the preprocessing contract of ``cases``, see :attr:`PretrainDataModule.contract`."""
    modalities = sorted({info.modality for info in cases})
    rules: dict[str, dict[str, Any]] = {
        # Source: docs/method.md §1.5, intensity
        "ct": {"rule": "window", "low": CT_RANGE_HU[0], "high": CT_RANGE_HU[1], "range": [0.0, 1.0]},
        "mri": {"rule": "foreground_percentiles", "percentiles": list(MRI_PERCENTILES), "range": [-1.0, 1.0]},
    }
    return {
        "spacing_mm": [float(s) for s in cases[0].spacing_mm],
        "orientation": "SAR",
        "modality": modalities[0] if len(modalities) == 1 else "mixed",
        "intensity": {modality: rules[modality] for modality in modalities},
        "channels": int(cases[0].channels),
    }
