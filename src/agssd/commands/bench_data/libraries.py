"""MONAI's and TorchIO's data sets, with their own transforms."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from agssd.commands.bench_data.rival import (
    HIGH_HU,
    LOW_HU,
    NUM_GLOBAL,
    NUM_LOCAL,
    CutRival,
    Rival,
    Sizes,
    cut_view,
    write_nifti,
)

if TYPE_CHECKING:
    from torch import Tensor


class MonaiCache(Rival):
    """MONAI's CacheDataset: float32 volumes in memory."""

    settings = (
        "float32 in memory; RandSpatialCropd (random_size), Resized trilinear, RandFlipd; copy_cache=False, no meta"
    )

    libraries = ("monai.data", "monai.transforms:Resize", "nibabel")

    @classmethod
    def prepare(cls, folder: Path, place: Path) -> None:
        """Write the sources."""
        write_nifti(folder, place)

    def __init__(self, place: Path, sizes: Sizes) -> None:
        super().__init__(place, sizes)
        crops = {kind: self._dataset([self._crop(size)]) for kind, size in self._crop_sizes().items()}
        views = self._dataset([self._views()])
        self.work = {
            **{kind: (partial(self._draw, dataset), 1) for kind, dataset in crops.items()},
            "views": (partial(self._draw, views), NUM_GLOBAL + NUM_LOCAL),
        }

    def _crop_sizes(self) -> dict[str, int]:
        return {"crop": self.sizes.view_vox, "parent": self.sizes.parent_vox}

    @staticmethod
    def _loading() -> list[Any]:
        from monai.transforms import EnsureChannelFirstd, EnsureTyped, LoadImaged, ScaleIntensityRanged

        return [
            LoadImaged("image", image_only=True),
            EnsureChannelFirstd("image"),
            ScaleIntensityRanged("image", LOW_HU, HIGH_HU, 0.0, 1.0, clip=True),
            EnsureTyped("image", track_meta=False),
        ]

    @staticmethod
    def _crop(size: int) -> Any:
        from monai.transforms import RandSpatialCropd

        return RandSpatialCropd("image", (size,) * 3, random_size=False)

    def _views(self) -> Any:
        from monai.transforms import Compose, RandFlipd, Randomizable, RandSpatialCropd, Resized, Transform

        cuts = [
            Compose(
                [
                    RandSpatialCropd("image", (low,) * 3, (high,) * 3, random_size=True),
                    Resized("image", (edge,) * 3, mode="trilinear"),
                    *(RandFlipd("image", prob=0.5, spatial_axis=axis) for axis in range(3)),
                ]
            )
            for edge, low, high in self.sizes.views()
        ]

        class Views(Randomizable, Transform):
            def __call__(self, data: Any) -> list[Any]:
                return [cut(data)["image"] for cut in cuts]

        return Views()

    def _sources(self) -> list[dict[str, str]]:
        return [{"image": str(path)} for path in sorted(self.place.glob("*.nii.gz"))]

    def _dataset(self, random: list[Any]) -> Any:
        from monai.data import CacheDataset
        from monai.transforms import Compose

        first: Any = getattr(self, "_first", None)
        transform = Compose([*self._loading(), *random])
        if first is None:
            self._first = CacheDataset(self._sources(), transform, copy_cache=False, progress=False, num_workers=0)
            return self._first
        dataset = CacheDataset([], transform, copy_cache=False, progress=False)
        dataset.data, dataset._cache, dataset.cache_num = first.data, first._cache, first.cache_num  # one copy for all
        return dataset

    def _draw(self, dataset: Any) -> object:
        return dataset[int(self.rng.integers(len(dataset)))]


class MonaiPersistent(MonaiCache):
    """MONAI's PersistentDataset: float32 tensors on disk, one file per volume, read whole for every sample."""

    settings = "float32 .pt files, read whole once per sample; transforms as for CacheDataset"

    @classmethod
    def prepare(cls, folder: Path, place: Path) -> None:
        """Write the sources, then the tensors."""
        from monai.data import PersistentDataset
        from monai.transforms import Compose

        write_nifti(folder, place)
        sources = [{"image": str(path)} for path in sorted(place.glob("*.nii.gz"))]
        dataset = PersistentDataset(sources, Compose([*cls._loading(), cls._crop(8)]), cache_dir=place / "tensors")
        for row in range(len(dataset)):
            dataset[row]

    def _dataset(self, random: list[Any]) -> Any:
        from monai.data import PersistentDataset
        from monai.transforms import Compose

        return PersistentDataset(
            self._sources(), Compose([*self._loading(), *random]), cache_dir=self.place / "tensors"
        )


class TorchioQueue(CutRival):
    """TorchIO's Queue: each volume is loaded once for ten patches; patches wait in memory."""

    samples_per_volume = 10
    settings = (
        "nii.gz; Queue of 10 UniformSampler patches per volume, as long as all need, SubjectsLoader, 0 workers; "
        "one patch of parent size per sample, its views cut by slicing and torch"
    )
    libraries = ("torchio",)

    @classmethod
    def prepare(cls, folder: Path, place: Path) -> None:
        """Write the sources."""
        write_nifti(folder, place)

    def __init__(self, place: Path, sizes: Sizes) -> None:
        super().__init__(place, sizes)
        self._patches: Any = None
        del self.work["crop"]  # a queue holds patches of one size
        self.whole_turn = self.samples_per_volume * len(list(place.glob("*.nii.gz")))

    def _batches(self, size: int) -> Any:
        import torchio as tio

        subjects = [tio.Subject(image=tio.ScalarImage(path)) for path in sorted(self.place.glob("*.nii.gz"))]
        scale = tio.RescaleIntensity((0, 1), in_min_max=(LOW_HU, HIGH_HU))
        dataset = tio.SubjectsDataset(subjects, transform=scale, load_getitem=True)
        sampler = tio.data.UniformSampler(size)
        queue = tio.Queue(dataset, self.whole_turn, self.samples_per_volume, sampler, num_workers=0)
        while True:
            yield from tio.SubjectsLoader(queue, batch_size=1, num_workers=0)

    def crop(self, size: int) -> Any:
        """Return the next patch, float32; ``size`` is that of the first call."""
        import torchio as tio

        self._patches = self._patches or self._batches(size)
        return next(self._patches)["image"][tio.DATA]

    def views(self) -> list[Tensor]:
        """Return views of the next patch."""
        patch = self.crop(self.sizes.parent_vox)[0, 0].numpy()
        found = []
        for edge, low, high in self.sizes.views():
            edges = [
                min(int(n), whole) for n, whole in zip(self.rng.integers(low, high + 1, 3), patch.shape, strict=True)
            ]
            start = [int(self.rng.integers(whole - n + 1)) for n, whole in zip(edges, patch.shape, strict=True)]
            box = patch[tuple(slice(s, s + n) for s, n in zip(start, edges, strict=True))]
            found.append(cut_view(np.ascontiguousarray(box), edge, self.rng))
        return found
