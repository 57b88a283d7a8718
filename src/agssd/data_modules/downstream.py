"""Labelled crops and whole volumes for downstream tasks, over the same caches as pretraining.

Training crops are a pure function of (seed, number of the sample), as in pretraining: neither workers, devices nor
accumulation change them. Validation, test and prediction deliver whole volumes one by one. The worker hands over what
is stored; intensities come into the model's range, and augmentation happens, batched on the device.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, cast

import lightning.pytorch as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from agssd.data_modules.agreement import cache_contract, check_agreement, check_dims, warn_of_subjects
from agssd.data_modules.cache import CaseInfo, VolumeCache
from agssd.data_modules.labelled import Item, LabelledVolumes, Row
from agssd.data_modules.leakage import check_leakage, record_after
from agssd.data_modules.sampling import MicroBatches, micro_batch_size
from agssd.data_modules.subsets import check_fold, fold_subjects, nested_subset
from agssd.data_modules.workers import outlive_signals
from agssd.geometry import per_sample
from agssd.transforms.intensity import Appearance, to_model_range
from agssd.transforms.keyed_random import KeyedRandom
from agssd.types import LabelledBatch, Size


class DownstreamDataModule(L.LightningDataModule):
    """What segmentation and classification share: splits by subject, subsets, folds, loaders, intensities.

    Training is an endless stream (``trainer.max_steps`` ends the run, ``trainer.val_check_interval`` counts steps);
    the other loaders give whole volumes in batches of 1.

    Args:
        cache: one path or several, written by ``agssd prepare``.
        global_batch_size: crops per optimiser step over all devices and accumulated batches.
        crop_vox: training crop (D, H, W) in voxels, (H, W) for caches of frames; None takes the task's ``crop_vox``,
            so that it is stated once.
        num_classes: classes of the task; None takes the task's ``num_classes``.
        modality: keep only "ct", "mri" or "us".
        num_subjects: labelled training subjects to use; subsets of one ``subset_seed`` are nested. For classification
            they hold every class as soon as they can, then in proportion.
        label_fraction: the same as a share of the training subjects.
        subset_seed: which draw of labelled subjects.
        num_folds: cut the ``train`` split by subject into this many folds, independent of every seed.
        fold: the fold that becomes the validation set; the stored ``val`` split is then left alone.
        flip_axes: axes (0 = D, 1 = H, 2 = W; of frames 0 = H, 1 = W) along which training crops are mirrored half of
            the time. Mirroring W exchanges left and right: leave it out where classes have a side.
        appearance: random intensities (gamma, histogram, blur, noise, Gibbs) in training.
        seed: of the order of training crops and of augmentation.
        predict_split: split that ``agssd predict`` runs on; "all" for every case. Labels are not needed.
        num_workers: reading processes per device.
        pin_memory: page-locked batches where there is a GPU.
        leakage: what happens where the encoder was pretrained on subjects, or on copies of scans, of val or test:
            "error" or "warn". A fold of ``train`` is a leak too, unless pretraining left the same fold out.

    Raises:
        ValueError: in ``setup``, for caches, subsets, folds or labels that cannot serve, and for leakage.
    """

    kind: Literal["segmentation", "classification"]
    prob_label: float = 0.0  # share of training crops laid around a labelled voxel

    def __init__(
        self,
        cache: str | list[str],
        global_batch_size: int = 8,
        crop_vox: Size | None = None,
        num_classes: int | None = None,
        modality: Literal["ct", "mri", "us"] | None = None,
        num_subjects: int | None = None,
        label_fraction: float | None = None,
        subset_seed: int = 0,
        num_folds: int | None = None,
        fold: int | None = None,
        flip_axes: list[int] | None = None,
        appearance: bool = True,
        seed: int = 0,
        predict_split: Literal["train", "val", "test", "all"] = "test",
        num_workers: int = 2,
        pin_memory: bool = True,
        leakage: Literal["error", "warn"] = "error",
    ) -> None:
        """Check what can be checked without a cache."""
        super().__init__()
        self.cache = [cache] if isinstance(cache, str) else [str(path) for path in cache]
        self.global_batch_size = global_batch_size
        self.crop_vox = crop_vox
        self.num_classes = num_classes
        self.modality = modality
        self.num_subjects, self.label_fraction, self.subset_seed = num_subjects, label_fraction, subset_seed
        self.num_folds, self.fold = num_folds, fold
        self.flip_axes = tuple(flip_axes or ())
        self.appearance = Appearance() if appearance else None
        self.seed = seed
        self.predict_split = predict_split
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.leakage = leakage
        self._leakage_checked = False
        self.caches: list[VolumeCache] = []
        self.rows: list[Row] = []
        self.members: dict[str, list[int]] = {}
        self._left_out: list[int] = []  # training rows of subjects outside the subset
        self._table: NDArray[np.int64] | None = None
        self._check_arguments()

    def _check_arguments(self) -> None:
        if not self.cache:
            raise ValueError("data.cache is empty; name a cache written by `agssd prepare`")
        check_fold(self.num_folds, self.fold)
        if any(axis not in (0, 1, 2) for axis in self.flip_axes):
            raise ValueError(f"data.flip_axes is {list(self.flip_axes)}; axes are 0 (D), 1 (H) and 2 (W)")
        if self.seed < 0:
            raise ValueError(f"data.seed is {self.seed}; give 0 or a positive number")

    # ------------------------------------------------------------------ setup

    def setup(self, stage: str) -> None:
        """Open the caches, choose the cases and refuse what cannot work before the first step."""
        if not self.caches:
            caches = [VolumeCache(path) for path in self.cache]
            check_agreement(caches, self.modality)
            warn_of_subjects(caches)
            self.caches = caches
            self.rows = [(i, case) for i, cache in enumerate(caches) for case in cache.select(modality=self.modality)]
            self._take_from_task()
            self._check_axes()
            self.members = self._choose()
            self._check_cases()
        check_data = getattr(getattr(self.trainer, "lightning_module", None), "check_data", None)
        if check_data is not None:
            check_data(self.contract)
        self._check_stage(stage)
        if stage != "predict" and not self._leakage_checked:
            self._check_leakage()

    def _check_leakage(self) -> None:
        """Hold val and test, folds included, against what the encoder of the task has seen."""
        task = getattr(self.trainer, "lightning_module", None)
        contract = getattr(getattr(task, "backbone", None), "contract", None)
        splits = {part: [self.rows[row] for row in self.members[part]] for part in ("val", "test")}
        path = getattr(task, "encoder", None)
        check_leakage(contract, f"the encoder {path}" if path else "the encoder", self.caches, splits, self.leakage)
        self._leakage_checked = True

    def seen_after(self, contract: dict[str, Any] | None) -> dict[str, Any] | None:
        """Return what the encoder of ``contract`` has seen after training here; see ``leakage.record_after``."""
        return record_after(contract, self.caches, [self.rows[row] for row in self.members["train"]])

    def _take_from_task(self) -> None:
        """Fill what was left to the task: its number of classes and its window."""
        task = getattr(self.trainer, "lightning_module", None)
        if self.crop_vox is None:
            self.crop_vox = getattr(task, "crop_vox", None)
        if self.num_classes is None:
            self.num_classes = getattr(task, "num_classes", None)
        for name in ("crop_vox", "num_classes"):
            if getattr(self, name) is None:
                raise ValueError(f"data.{name} is not given and the model has no {name}; set --data.{name}")

    def _check_axes(self) -> None:
        assert self.crop_vox is not None
        check_dims(self.caches[0], "data.crop_vox", self.crop_vox)
        if any(axis >= len(self.crop_vox) for axis in self.flip_axes):
            raise ValueError(f"data.flip_axes is {list(self.flip_axes)}; axes of frames are 0 (H) and 1 (W)")

    def case_info(self, case: int) -> CaseInfo:
        """Return what the cache knows about the case number of a batch."""
        cache, index = self.rows[case]
        return self.caches[cache].cases[index]

    def _choose(self) -> dict[str, list[int]]:
        infos = [self.case_info(row) for row in range(len(self.rows))]
        labelled = [row for row, info in enumerate(infos) if self._is_labelled(info)]
        by_split = {name: [row for row in labelled if infos[row].split == name] for name in ("train", "val", "test")}
        train, val = by_split["train"], by_split["val"]
        predict = [row for row, info in enumerate(infos) if self.predict_split in ("all", info.split)]
        if not train:
            return {"train": train, "val": val, "test": by_split["test"], "predict": predict}
        if self.num_folds is not None and self.fold is not None:
            held_out = set(fold_subjects((infos[row].subject for row in train), self.num_folds)[self.fold])
            val = [row for row in train if infos[row].subject in held_out]
            train = [row for row in train if infos[row].subject not in held_out]
        chosen = [infos[row] for row in train]
        kept = set(
            nested_subset(
                (info.subject for info in chosen),
                self.num_subjects,
                self.label_fraction,
                self.subset_seed,
                self._classes(chosen),
            )
        )
        self._left_out = [row for row in train if infos[row].subject not in kept]
        train = [row for row in train if infos[row].subject in kept]
        return {"train": train, "val": val, "test": by_split["test"], "predict": predict}

    def _check_stage(self, stage: str) -> None:
        part = {"fit": "train", "validate": "val", "test": "test", "predict": "predict"}[stage]
        if not self.members[part]:
            place = "" if self.predict_split == "all" and part == "predict" else f" of the split {part!r}"
            if part == "predict" and place:
                place = f" of the split {self.predict_split!r}"
            has = "" if part == "predict" else f" has {self._needs()}"
            raise ValueError(
                f"`agssd {stage}` has nothing to do: no case{place} in data.cache {self.cache}{has or ' is there'}; "
                "see `agssd inspect CACHE`"
            )
        if stage == "fit":
            if self.trainer is not None and self.trainer.max_steps < 1:
                raise ValueError(
                    f"trainer.max_steps is {self.trainer.max_steps}; the training stream is endless, so give a "
                    "positive number, for example --trainer.max_steps 600"
                )
            self._check_subset()
            self._micro_batch_size()

    def _classes(self, infos: Sequence[CaseInfo]) -> dict[str, set[int]] | None:
        """Return the classes of each subject, which its subsets take in proportion, or None where there are none."""
        return None

    def _check_subset(self) -> None:
        """Refuse a subset of the training subjects that cannot serve."""
        return

    @abstractmethod
    def _is_labelled(self, info: CaseInfo) -> bool:
        """Return whether the case has what the task learns from."""

    @abstractmethod
    def _needs(self) -> str:
        """Return what ``_is_labelled`` looks for, in words."""

    @abstractmethod
    def _check_cases(self) -> None:
        """Refuse labels that are no classes of the task."""

    @property
    def contract(self) -> dict[str, Any]:
        """Return the preprocessing of the cases of ``modality``, to be compared with what an encoder expects."""
        return cache_contract([self.case_info(row) for row in range(len(self.rows))])

    # ---------------------------------------------------------------- loaders

    def _cut(self) -> tuple[int, int, int]:
        if self.trainer is None:
            return 0, 1, 1
        return self.trainer.global_rank, self.trainer.world_size, self.trainer.accumulate_grad_batches

    def _micro_batch_size(self) -> int:
        _, world_size, accumulate = self._cut()
        return micro_batch_size(self.global_batch_size, world_size, accumulate)

    def train_dataloader(self) -> DataLoader[Item]:
        """Return the endless stream of crops from the first sample that no optimiser step has seen."""
        rank, world_size, _ = self._cut()
        first = (self.trainer.global_step if self.trainer is not None else 0) * self.global_batch_size
        batches = MicroBatches(self._micro_batch_size(), rank, world_size, first)
        return self._loader(self._volumes("train", crops=True), batch_sampler=cast(Any, batches))

    def val_dataloader(self) -> DataLoader[Item] | list[DataLoader[Item]]:
        """Return the validation volumes; an empty list without any."""
        return self._whole("val") if self.members["val"] else []

    def test_dataloader(self) -> DataLoader[Item]:
        """Return the labelled test volumes."""
        return self._whole("test")

    def predict_dataloader(self) -> DataLoader[Item]:
        """Return the volumes of ``predict_split``."""
        return self._whole("predict")

    def _volumes(self, part: str, crops: bool) -> LabelledVolumes:
        return LabelledVolumes(
            self.caches,
            self.rows,
            self.members[part],
            self.crop_vox if crops else None,
            self.seed,
            self.prob_label,
            self.kind,
            self._table,
            read_labels=part != "predict",
        )

    def _whole(self, part: str) -> DataLoader[Item]:
        """Return this rank's share of whole volumes, one by one; no volume is met twice, as a score needs."""
        rank, world_size, _ = self._cut()
        volumes = self._volumes(part, crops=False)
        return self._loader(Subset(volumes, range(rank, len(volumes), world_size)))

    def _loader(self, volumes: Dataset[Item], batch_sampler: Any = None) -> DataLoader[Item]:
        return DataLoader(
            volumes,
            batch_sampler=batch_sampler,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory and torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            worker_init_fn=outlive_signals,
        )

    # -------------------------------------------------------------- on device

    def on_after_batch_transfer(self, batch: Item, dataloader_idx: int) -> LabelledBatch:
        """Return intensities in the model's range, augmented while training."""
        image = batch["image"].float()
        scale, offset = (per_sample(batch[name], image) for name in ("scale", "offset"))
        image = to_model_range(image * scale + offset, batch["low"], batch["high"], batch["is_ct"])
        foreground = batch["foreground"].bool()
        label = batch["label"].long() if "label" in batch else None
        if self.trainer is not None and self.trainer.training:
            random = KeyedRandom(self.seed, batch["sample"], f"{self.kind} augmentation")
            if self.appearance is not None:
                image = self.appearance(image, batch["is_ct"], random, 1)
            flips = random.uniform(3) < 0.5
            image, foreground = self._flip(image, flips), self._flip(foreground, flips)
            label = None if label is None else self._flip(label, flips)
        ready: LabelledBatch = {
            "image": image,
            "foreground": foreground,
            "spacing_mm": batch["spacing_mm"],
            "case": batch["case"],
        }
        if label is not None:
            ready["label"] = label
        if "target" in batch:
            ready["target"] = batch["target"]
        return ready

    def _flip(self, volume: Tensor, flips: Tensor) -> Tensor:
        """Mirror samples (B, C, [D,] H, W) along the permitted axes where ``flips`` (B, 3) says so."""
        for axis in self.flip_axes:
            volume = torch.where(per_sample(flips[:, axis], volume), volume.flip(axis + 2), volume)
        return volume


class SegmentationDataModule(DownstreamDataModule):
    """Labelled crops for training, whole labelled volumes for validation and test.

    Args:
        cache: see :class:`DownstreamDataModule`, as all arguments not listed here.
        prob_label: share of training crops laid around a voxel of a uniformly drawn class of the case.
        label_groups: stored values that make up class 1, class 2, ...; values in no group become background. None
            takes stored values as classes.
        **kwargs: arguments of :class:`DownstreamDataModule`.
    """

    kind = "segmentation"

    def __init__(
        self,
        cache: str | list[str],
        prob_label: float = 0.67,
        label_groups: list[list[int]] | None = None,
        **kwargs: Any,
    ) -> None:
        """Check what can be checked without a cache."""
        super().__init__(cache, **kwargs)
        if not 0 <= prob_label <= 1:
            raise ValueError(f"data.prob_label is {prob_label}; give a share between 0 and 1")
        self.prob_label = prob_label
        self.label_groups = label_groups
        self.save_hyperparameters(logger=False)

    def _is_labelled(self, info: CaseInfo) -> bool:
        return info.label_values is not None

    def _needs(self) -> str:
        return "a label map"

    def _check_cases(self) -> None:
        assert self.num_classes is not None
        used = sorted({row for part in ("train", "val", "test") for row in self.members[part]})
        values = [(info, info.label_values or ()) for info in map(self.case_info, used)]
        if self.label_groups is not None:
            if len(self.label_groups) != self.num_classes - 1:
                raise ValueError(
                    f"data.label_groups has {len(self.label_groups)} groups and num_classes is {self.num_classes}; "
                    f"give one group per class above background"
                )
            top = max(max((v for _, found in values for v in found), default=0), *(max(g) for g in self.label_groups))
            self._table = np.zeros(top + 1, np.int64)
            for index, group in enumerate(self.label_groups):
                self._table[group] = index + 1
            return
        for info, found in values:
            wrong = [value for value in found if not 0 <= value < self.num_classes]
            if wrong:
                raise ValueError(
                    f"case {info.key} holds the label value {wrong[0]}, but num_classes is {self.num_classes} (0 to "
                    f"{self.num_classes - 1}); raise num_classes or map values with data.label_groups"
                )


class ClassificationDataModule(DownstreamDataModule):
    """Crops of the foreground with the case's class for training, whole volumes for validation and test.

    Args:
        cache: see :class:`DownstreamDataModule`, as all arguments.
        **kwargs: arguments of :class:`DownstreamDataModule`.
    """

    kind = "classification"

    def __init__(self, cache: str | list[str], **kwargs: Any) -> None:
        """Check what can be checked without a cache."""
        super().__init__(cache, **kwargs)
        self.save_hyperparameters(logger=False)

    def _is_labelled(self, info: CaseInfo) -> bool:
        return info.class_index is not None

    def _needs(self) -> str:
        return "a class"

    def _check_cases(self) -> None:
        assert self.num_classes is not None
        names = self.caches[0].class_names
        for cache in self.caches[1:]:
            if cache.class_names != names:
                raise ValueError(
                    f"caches disagree in classes: {self.caches[0].path} has {list(names)}, {cache.path} has "
                    f"{list(cache.class_names)}; prepare them together"
                )
        if names and len(names) != self.num_classes:
            raise ValueError(
                f"the cache has the classes {list(names)}, but num_classes is {self.num_classes}; "
                f"set --model.num_classes {len(names)}"
            )

    def _classes(self, infos: Sequence[CaseInfo]) -> dict[str, set[int]]:
        found: dict[str, set[int]] = {}
        for info in infos:
            found.setdefault(info.subject, set()).add(cast(int, info.class_index))
        return found

    def _check_subset(self) -> None:
        kept = {self.case_info(row).class_index for row in self.members["train"]}
        there = kept | {self.case_info(row).class_index for row in self._left_out}
        if kept != there:
            name, value = (
                ("num_subjects", self.num_subjects)
                if self.num_subjects is not None
                else ("label_fraction", self.label_fraction)
            )
            number = len({self.case_info(row).subject for row in self.members["train"]})
            raise ValueError(
                f"data.{name} {value} leaves {number} training subject{'s' * (number > 1)} of data.cache {self.cache}, "
                f"too few for its {len(there)} classes; {len(there)} subjects hold every class, so give a larger share "
                f"or --data.num_subjects {len(there)}"
            )

    @property
    def class_counts(self) -> list[int]:
        """Return the number of training cases of each class."""
        assert self.num_classes is not None
        counts = [0] * self.num_classes
        for row in self.members["train"]:
            counts[cast(int, self.case_info(row).class_index)] += 1
        return counts
