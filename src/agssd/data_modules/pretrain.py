"""Parent crops for pretraining: one read per sample from HDF5 caches, in an order that nothing but the seed decides."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any, Literal, cast

import lightning.pytorch as L
import torch
from torch.utils.data import DataLoader

from agssd.data_modules.agreement import cache_contract, check_agreement, check_dims, check_regions, warn_of_subjects
from agssd.data_modules.cache import VolumeCache
from agssd.data_modules.leakage import seen_record
from agssd.data_modules.mixing import Mixture, weights_by_temperature
from agssd.data_modules.parents import ParentCrops, stored_size
from agssd.data_modules.probe_set import ProbeSet
from agssd.data_modules.quarantine import QuarantineList
from agssd.data_modules.sampling import MicroBatches, check_padding, micro_batch_size
from agssd.data_modules.subsets import check_fold, fold_subjects
from agssd.data_modules.workers import outlive_signals
from agssd.evaluation.contract import check_contract
from agssd.types import ParentBatch, Size

_LOG = logging.getLogger(__name__)


class PretrainDataModule(L.LightningDataModule):
    """Delivers one parent crop per case as stored (int16 with its foreground); views are made from it on the device.

    The training stream is endless and has no epochs: ``trainer.max_steps`` ends the run. Sample ``n`` is the same crop
    of the same case on any number of devices, workers and accumulated batches, and after any interruption. A batch is
    a :class:`agssd.types.ParentBatch` of ``global_batch_size / (devices x accumulated batches)`` samples.

    Validation draws fixed crops of the ``val`` split: as many as the smallest multiple of the global batch that visits
    every case, so that the figures depend on the global batch only; without a ``val`` split there is none.

    Args:
        cache: one path or several, written by ``agssd prepare``; they must agree in channels and spacing. Without
            ``weights`` and ``temperature`` every case of all of them is drawn equally often.
        parent_vox: parent crop in voxels (D, H, W); in pixels (H, W) for caches of frames, of which each sample is a
            part of one. What is smaller is padded on both sides.
        global_batch_size: samples per optimiser step over all devices and accumulated batches.
        num_workers: reading processes per device.
        seed: of the order of cases and the place of crops.
        prob_foreground: share of crops centred on foreground rather than placed uniformly (source: ours).
        pin_memory: page-locked batches; takes effect where there is a GPU.
        prefetch: batches that each worker reads ahead.
        weights: share of the samples that each cache gets, on any scale; exact in every 10 000 samples.
        temperature: shares in proportion to (training cases of the cache) ** (1 / temperature): 1 draws every case
            equally often, infinity every cache. Source: Arivazhagan et al. 2019, arXiv:1907.05019.
        num_folds: with ``fold``, leave a fold of the ``train`` split out, by subject, to validate on it downstream with
            the same two numbers and the same caches. Folds are cut from the subjects that have a label map or a class,
            or from all where none has.
        fold: the fold that is left out.
        on_broken: what happens where a case cannot be read: "error" stops the run with its name; "quarantine" draws
            the sample from another case of its cache, counts it (``data/replaced_samples``) and lists the case in
            ``quarantine.csv`` of the run.
        regions: batches also hold ``regions`` (B, 1, [D,] H, W) int32, the region map of ``agssd regions`` cut like the
            foreground: numbers are of the whole case, so one number is one region in every crop of it; 0 is no region,
            and padding.

    Raises:
        ValueError: in ``setup``, for a missing, broken or unsuitable cache and for impossible sizes.
    """

    def __init__(
        self,
        cache: str | list[str],
        parent_vox: Size,
        global_batch_size: int,
        num_workers: int = 2,
        seed: int = 0,
        prob_foreground: float = 0.8,
        pin_memory: bool = True,
        prefetch: int = 2,
        weights: list[float] | None = None,
        temperature: float | None = None,
        num_folds: int | None = None,
        fold: int | None = None,
        on_broken: Literal["error", "quarantine"] = "error",
        regions: bool = False,
    ) -> None:
        """Keep the settings; nothing is opened before ``setup``."""
        super().__init__()
        self.save_hyperparameters(logger=False)  # paths may name patients: they go into checkpoints, not to W&B
        self.cache = [cache] if isinstance(cache, str) else [str(path) for path in cache]
        self.parent_vox: Size = tuple(int(n) for n in parent_vox)
        self.global_batch_size = global_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.prob_foreground = prob_foreground
        self.pin_memory = pin_memory
        self.prefetch = prefetch
        self.weights, self.temperature = weights, temperature
        self.num_folds, self.fold = num_folds, fold
        self.on_broken = on_broken
        self.regions = regions
        self.quarantine: QuarantineList | None = None
        self.caches: list[VolumeCache] = []
        self.train_crops: ParentCrops | None = None
        self.val_crops: ParentCrops | None = None
        self.undone_steps = 0  # optimiser steps that rollbacks have undone; their samples are not drawn again
        self._seen: dict[str, Any] = {}
        self._check_arguments()

    def _check_arguments(self) -> None:
        if not self.cache:
            raise ValueError(
                "data.cache is empty; name a cache written by `agssd prepare`, for example --data.cache PATH"
            )
        if len(self.parent_vox) not in (2, 3) or min(self.parent_vox) < 1:
            raise ValueError(
                f"data.parent_vox is {list(self.parent_vox)}; give three positive numbers of voxels, or two for frames"
            )
        if self.seed < 0:
            raise ValueError(f"data.seed is {self.seed}; give 0 or a positive number")
        if not 0 <= self.prob_foreground <= 1:
            raise ValueError(f"data.prob_foreground is {self.prob_foreground}; give a share between 0 and 1")
        if self.num_workers < 0 or self.prefetch < 1:
            raise ValueError(
                f"data.num_workers is {self.num_workers} and data.prefetch {self.prefetch}; "
                "give at least 0 workers and 1 batch"
            )
        if self.weights is not None and self.temperature is not None:
            raise ValueError("data.weights and data.temperature are both given; set one of them to null")
        check_fold(self.num_folds, self.fold)

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
        check_dims(caches[0], "data.parent_vox", self.parent_vox)
        warn_of_subjects(caches)
        train = self._without_fold(caches)
        val = [(i, case) for i, cache in enumerate(caches) for case in cache.select(split="val")]
        if not train:
            raise ValueError(f"no case of the split 'train' in data.cache {self.cache}; see `agssd inspect CACHE`")
        if self.regions:
            check_regions(caches, [*train, *val])
        check_padding([caches[i].cases[case].shape for i, case in train], stored_size(self.parent_vox))
        self._micro_batch_size()
        self.train_crops = self._crops(caches, train, shuffle=True)
        if val:
            self.val_crops = self._crops(caches, val, shuffle=False)
        self.caches = caches
        self._seen = seen_record(caches, train)
        if self.on_broken == "quarantine":
            self.quarantine = QuarantineList(Path(self.trainer.default_root_dir if self.trainer is not None else "."))

    def _without_fold(self, caches: list[VolumeCache]) -> list[tuple[int, int]]:
        """Return the cases of the ``train`` split, less those of the fold that is left out."""
        rows = [(i, case) for i, cache in enumerate(caches) for case in cache.select(split="train")]
        if self.num_folds is None or self.fold is None:
            return rows
        infos = [caches[i].cases[case] for i, case in rows]
        known = [info.subject for info in infos if info.label_values is not None or info.class_index is not None]
        held_out = set(fold_subjects(known or [info.subject for info in infos], self.num_folds)[self.fold])
        return [row for row, info in zip(rows, infos, strict=True) if info.subject not in held_out]

    def _crops(self, caches: list[VolumeCache], rows: list[tuple[int, int]], shuffle: bool) -> ParentCrops:
        sizes = [sum(cache == source for cache, _ in rows) for source in range(len(caches))]
        weights = self.weights if shuffle else None
        if shuffle and self.temperature is not None:
            weights = weights_by_temperature(sizes, self.temperature)
        mixture = Mixture(self.seed, sizes, weights)
        return ParentCrops(
            caches,
            rows,
            self.parent_vox,
            self.seed,
            self.prob_foreground,
            mixture,
            shuffle,
            self.on_broken,
            self.regions,
        )

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

    @property
    def seen(self) -> dict[str, Any]:
        """Return the record of the training cases that tells later whether a case was among them (after ``setup``)."""
        return self._seen

    def probe_set(
        self,
        cache: str | None,
        num_folds: int | None = None,
        num_subjects: int | None = None,
        num_held_out: int | None = None,
        max_vox: int | None = None,
        kinds: tuple[str, ...] = ("label", "class"),
    ) -> ProbeSet | None:
        """Return the labelled volumes to probe the encoder with (after ``setup``); None if the own cache has none.

        Args:
            cache: another labelled cache; None takes the cache of this module, if it is one.
            num_folds: see :class:`agssd.data_modules.probe_set.ProbeSet`, as the others; fewer subjects are taken
                where there are not as many.
            num_subjects: to learn from.
            num_held_out: to measure on.
            max_vox: per axis.
            kinds: "label" and "class", what a case may count by.

        Raises:
            ValueError: for a cache that is given and has no labels or was prepared otherwise, and for ``num_folds``
                that the own one does not allow.
        """
        opened = self.caches[0] if cache is None else VolumeCache(cache)
        if cache is None:
            splits = ["train"] if num_folds is not None else ["train", "val"]
            labelled = all(
                ("label" in kinds and opened.select(split=split, labelled=True))
                or ("class" in kinds and opened.select(split=split, with_class=True))
                for split in splits
            )
            if len(self.caches) != 1 or not labelled:
                return None
        elif opened.cases:
            found = cache_contract(opened.cases)
            check_contract(self.contract, found, "of this run", None)
        return ProbeSet(opened, num_folds, num_subjects, num_held_out, at_most=True, max_vox=max_vox, kinds=kinds)

    # ---------------------------------------------------------------- loaders

    def train_dataloader(self) -> DataLoader[ParentBatch]:
        """Return the endless stream from the first sample that no optimiser step has seen, undone ones included."""
        assert self.train_crops is not None, "Lightning calls setup first"
        rank, world_size, _ = self._cut()
        return self._loader(
            self.train_crops, MicroBatches(self._micro_batch_size(), rank, world_size, self._samples_seen())
        )

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
            worker_init_fn=outlive_signals,
            generator=torch.Generator(),  # a resumed run starts workers anew, which must not move the global one
        )
        return cast("DataLoader[ParentBatch]", loader)

    # ------------------------------------------------------------------- log

    def on_before_batch_transfer(self, batch: ParentBatch, dataloader_idx: int) -> ParentBatch:
        """Note the broken cases of a batch."""
        if self.quarantine is not None:
            crops = self.train_crops if self.trainer is None or self.trainer.training else self.val_crops
            assert crops is not None
            for sample, rows in zip(batch["sample"].tolist(), batch["broken"].tolist(), strict=True):
                for row in rows:
                    if row >= 0:
                        self.quarantine.note(sample, crops.rows[row][0], crops.info(row))
                self.quarantine.num_replaced += rows[0] >= 0
        return batch

    def stream_figures(self, samples: int) -> dict[str, float]:
        """Return, per cache by its number in ``cache``, the samples drawn among the first ``samples`` and its passes.

        Keys: ``data/source0_samples`` and ``data/source0_passes``, samples over training cases, and so on.
        """
        assert self.train_crops is not None, "Lightning calls setup first"
        mixture = self.train_crops.mixture
        figures = {}
        for source, drawn in enumerate(mixture.samples_per_source(samples)):
            figures[f"data/source{source}_samples"] = float(drawn)
            figures[f"data/source{source}_passes"] = drawn / max(mixture.sizes[source], 1)
        return figures

    def on_exception(self, exception: BaseException) -> None:
        """Explain the end of a worker that touched a mapped cache whose bytes could not be fetched."""
        if "Bus error" in str(exception):
            _LOG.error(
                "a loader worker met a bus error, which a failing disk, a lost network disk or a full /dev/shm gives; "
                "`agssd doctor CACHE` names cases that cannot be read, of data.cache %s",
                self.cache,
            )

    # ----------------------------------------------------------------- resume

    def state_dict(self) -> dict[str, Any]:
        """Return what identifies the stream and how far it was consumed, in plain types."""
        return {**self._stream(), "samples_seen": self._samples_seen(), "undone_steps": self.undone_steps}

    def _samples_seen(self) -> int:
        steps_done = self.trainer.global_step if self.trainer is not None else 0
        return (steps_done + self.undone_steps) * self.global_batch_size

    def _stream(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "global_batch_size": self.global_batch_size,
            "parent_vox": list(self.parent_vox),
            "prob_foreground": self.prob_foreground,
            "num_cases": len(self.train_crops.rows) if self.train_crops is not None else 0,
            "cases_per_cache": list(self.train_crops.mixture.sizes) if self.train_crops is not None else [],
            "samples_per_cache_and_block": self._counts_per_block(),
            "fold": None if self.fold is None else [self.num_folds, self.fold],
            "cases": self._digest_of_cases("key"),
            "preparation": self._digest_of_cases(
                "source_sha256", "shape", "spacing_mm", "scale", "offset", "low", "high"
            ),
            "regions": self._digest_of_cases("num_regions", "regions_sha256") if self.regions else None,
        }

    def _digest_of_cases(self, *facts: str) -> str:
        """Return what tells a cache from one that was built anew at its place, with other cases or in another way."""
        crops = self.train_crops
        infos = [] if crops is None else [crops.info(row) for row in range(len(crops.rows))]
        rows = [" ".join(str(getattr(info, fact)) for fact in facts) for info in infos]
        return hashlib.sha256(" ".join(rows).encode()).hexdigest()[:16]

    def _counts_per_block(self) -> list[int] | None:
        """Return what ``weights`` or ``temperature`` came to; None without either, as in early checkpoints."""
        counts = None if self.train_crops is None else self.train_crops.mixture.counts
        return None if counts is None else list(counts)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that the stream of the checkpoint is this one.

        Its place follows from ``trainer.global_step`` and the steps that were undone.

        Raises:
            ValueError: naming each setting that differs, since the run would go on with other samples.
        """
        self.undone_steps = state_dict.get("undone_steps", 0)
        now = self._stream()
        before = {"samples_per_cache_and_block": None, "fold": None} | state_dict  # early checkpoints knew neither
        differing = [
            f"{name} was {before[name]}, is {now[name]}" for name in now if name in before and before[name] != now[name]
        ]
        if differing:
            raise ValueError(
                f"the checkpoint was trained on another stream of samples: {'; '.join(differing)}; "
                "resume with the settings of the run (its config.yaml), or start a new run"
            )
