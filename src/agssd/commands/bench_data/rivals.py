"""The rivals: ours in both layouts, and the engines that others train from, each set up as its documentation advises.

A rival gives random crops as it keeps them, and complete training views: two global and six local ones, each of random
place and size (the ranges of ``OverlapCrops``), resampled trilinearly and flipped, float32 in [0, 1]. Rivals with
transforms of their own use them; the others share ``cut_view``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

LOW_HU, HIGH_HU = -1000.0, 1000.0
GLOBAL_SCALE, LOCAL_SCALE = (0.75, 1.33), (0.35, 0.6)  # edges as shares of a global view, as in OverlapCrops
NUM_GLOBAL, NUM_LOCAL = 2, 6
Box = tuple[slice, ...]


@dataclass(frozen=True)
class Sizes:
    """Edges in voxels."""

    view_vox: int
    parent_vox: int

    def views(self) -> list[tuple[int, int, int]]:
        """Return (edge, least, largest edge of the box it is cut from) of every view of one sample."""
        edge, half = self.view_vox, self.view_vox // 2
        whole, part = ([round(edge * share) for share in scale] for scale in (GLOBAL_SCALE, LOCAL_SCALE))
        return [(edge, whole[0], whole[1])] * NUM_GLOBAL + [(half, part[0], part[1])] * NUM_LOCAL


def unit_range(hu: NDArray[Any]) -> NDArray[np.float32]:
    """Return HU as float32 in [0, 1]."""
    return ((hu.astype(np.float32) - LOW_HU) / (HIGH_HU - LOW_HU)).clip(0, 1)


class Rival(ABC):
    """One way to keep volumes and to cut from them.

    Args:
        place: folder of its files, made by ``prepare``.
        sizes: of crops and views.
    """

    settings = ""
    whole_turn = 1  # a turn is a multiple of so many calls, where work comes in bursts

    def __init__(self, place: Path, sizes: Sizes) -> None:
        self.place, self.sizes = place, sizes
        self.rng = np.random.default_rng(0)
        self.work: dict[str, tuple[Callable[[], object], int]] = {
            "crop": (partial(self.crop, sizes.view_vox), 1),
            "parent": (partial(self.crop, sizes.parent_vox), 1),
            "views": (self.views, NUM_GLOBAL + NUM_LOCAL),
        }

    @classmethod
    @abstractmethod
    def prepare(cls, folder: Path, place: Path) -> None:
        """Write below ``place`` what it reads, from the volumes in ``folder``."""

    @classmethod
    def load_libraries(cls) -> None:
        """Import what is not to count as its memory."""
        import torch.nn.functional  # noqa: F401

    @abstractmethod
    def crop(self, size: int) -> object:
        """Return a random crop of ``size``³ of a random volume."""

    @abstractmethod
    def views(self) -> list[Tensor]:
        """Return the views of one sample, (1, n, n, n) float32 each."""


def images(folder: Path) -> list[Path]:
    """Return the volumes."""
    return sorted(folder.glob("image_*.npy"))


# ------------------------------------------------------------------------ ours


class OurChunks(Rival):
    """Parent crops of ``agssd``, and views from one parent by ``OverlapCrops``."""

    layout = "chunks"
    settings = "agssd prepare's default: Blosc-LZ4 chunks of 32³, int16; views from one parent crop per sample"

    @classmethod
    def prepare(cls, folder: Path, place: Path) -> None:
        """Write a cache."""
        from agssd.data_modules.build import CacheWriter
        from agssd.scans.case import PreparedCase

        with CacheWriter(place / "cache.h5", layout=cls.layout) as writer:
            for path in images(folder):
                image, foreground = np.load(path), np.load(path.with_name(path.name.replace("image", "foreground")))
                case = PreparedCase(
                    image=image[None],
                    foreground=foreground,
                    label=None,
                    modality="ct",
                    spacing_mm=(1.5, 1.5, 1.5),
                    affine=np.eye(4)[[2, 1, 0, 3]],
                    source_shape=(image.shape[2], image.shape[1], image.shape[0]),
                    source_affine=np.eye(4),
                    source_sha256="0" * 64,
                    scale=(1.0,),
                    offset=(0.0,),
                    low=(LOW_HU,),
                    high=(HIGH_HU,),
                    edge_q99=(50.0,),
                )
                writer.add(case, path.stem, path.stem, "train")
            writer.finish()

    @classmethod
    def load_libraries(cls) -> None:
        """Import the data module and the views."""
        import agssd.data_modules.pretrain
        import agssd.transforms.crops  # noqa: F401

    def __init__(self, place: Path, sizes: Sizes) -> None:
        from agssd.data_modules.cache import VolumeCache
        from agssd.data_modules.pretrain import ParentCrops
        from agssd.transforms.crops import OverlapCrops

        super().__init__(place, sizes)
        self.cache = VolumeCache(place / "cache.h5")
        vox, rows = sizes.parent_vox, [(0, row) for row in range(len(self.cache))]
        self.crops = ParentCrops([self.cache], rows, (vox, vox, vox), seed=0, prob_foreground=0.8, shuffle=True)
        view, half = sizes.view_vox, sizes.view_vox // 2
        self.overlap_crops = OverlapCrops(
            size_vox=(view, view, view),
            scale=GLOBAL_SCALE,
            num_local=NUM_LOCAL,
            local_size_vox=(half, half, half),
            local_scale=LOCAL_SCALE,
        )
        self._sample = 0
        self.work["parent"] = (self._parent, 1)  # as in training: with its foreground and constants

    def _parent(self) -> dict[str, Tensor]:
        self._sample += 1
        return self.crops[self._sample]

    def crop(self, size: int) -> object:
        """Return int16 of the image alone."""
        case = int(self.rng.integers(len(self.cache)))
        start = [int(self.rng.integers(n - size + 1)) for n in self.cache.cases[case].shape]
        return self.cache.read(case, (start[0], start[1], start[2]), (size, size, size))

    def views(self) -> list[Tensor]:
        """Return views of one parent; intensities are clipped before they are cut and scaled after."""
        from agssd.transforms.crops import extract

        batch = {name: value[None] for name, value in self._parent().items()}
        geometry = self.overlap_crops.sample(batch["foreground"], batch["sample"], 0)
        parent = batch["image"].clamp_(int(LOW_HU), int(HIGH_HU))
        assert geometry.locals is not None
        both = (
            extract(parent, geometry.globals, self.overlap_crops.size_vox),
            extract(parent, geometry.locals, self.overlap_crops.local_size_vox),
        )
        return [view for views in both for view in views.sub_(LOW_HU).div_(HIGH_HU - LOW_HU)[0]]


class OurContiguous(OurChunks):
    """The same from voxels as they are, mapped."""

    layout = "contiguous"
    settings = "agssd prepare --layout contiguous: int16 as it is, mapped; views from one parent crop per sample"


# ------------------------------------------------- engines that read boxes


def cut_view(box: NDArray[np.float32], edge: int, rng: np.random.Generator) -> Tensor:
    """Return a box (d, h, w) resampled trilinearly to ``edge``³ and flipped at random, (1, edge, edge, edge)."""
    import torch
    import torch.nn.functional as F

    view = F.interpolate(torch.from_numpy(box)[None, None], size=(edge,) * 3, mode="trilinear")[0]
    axes = [axis for axis in (1, 2, 3) if rng.random() < 0.5]
    return view.flip(axes) if axes else view


class BoxRival(Rival):
    """An engine that opens a volume and reads boxes of it; every view is a read of its own, no larger than needed."""

    stored_in_unit_range = False

    @abstractmethod
    def open(self, case: int) -> Any:
        """Return what is sliced, (D, H, W)."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of volumes."""

    def _box(self, shape: tuple[int, ...], edges: tuple[int, ...]) -> Box:
        kept = [min(edge, n) for edge, n in zip(edges, shape, strict=True)]
        start = [int(self.rng.integers(n - edge + 1)) for edge, n in zip(kept, shape, strict=True)]
        return tuple(slice(s, s + edge) for s, edge in zip(start, kept, strict=True))

    def crop(self, size: int) -> object:
        """Return the voxels in the type they are stored in."""
        volume = self.open(int(self.rng.integers(len(self))))
        return np.array(volume[self._box(volume.shape, (size,) * 3)])

    def views(self) -> list[Tensor]:
        """Return views of one volume."""
        volume = self.open(int(self.rng.integers(len(self))))
        found = []
        for edge, low, high in self.sizes.views():
            box = volume[self._box(volume.shape, tuple(int(n) for n in self.rng.integers(low, high + 1, 3)))]
            found.append(cut_view(box if self.stored_in_unit_range else unit_range(box), edge, self.rng))
        return found


class Blosc2Float(BoxRival):
    """Float32 in b2nd files, chunks and blocks sized to processor caches, as nnssl keeps its volumes.

    Written from the description of the scheme: a block fits the first cache of a core, a chunk the share of a core in
    the last one, each with a fifth to spare, and neither is larger than a crop.
    """

    settings = "float32, zstd level 8, blocks of 16³ in chunks of 64³ (32 KiB and 1.4 MiB caches), memory map, 1 thread"
    stored_in_unit_range = True

    @classmethod
    def prepare(cls, folder: Path, place: Path) -> None:
        """Write one b2nd file per volume."""
        import blosc2

        for path in images(folder):
            blosc2.asarray(
                unit_range(np.load(path)),
                urlpath=str(place / f"{path.stem}.b2nd"),
                chunks=(64, 64, 64),
                blocks=(16, 16, 16),
                cparams={"codec": blosc2.Codec.ZSTD, "clevel": 8, "nthreads": 1},
            )

    @classmethod
    def load_libraries(cls) -> None:
        """Import blosc2."""
        import blosc2

        super().load_libraries()
        blosc2.set_nthreads(1)

    def __init__(self, place: Path, sizes: Sizes) -> None:
        super().__init__(place, sizes)
        self.paths = [str(path) for path in sorted(place.glob("*.b2nd"))]

    def __len__(self) -> int:
        """Return the number of volumes."""
        return len(self.paths)

    def open(self, case: int) -> Any:
        """Return the mapped file."""
        import blosc2

        return blosc2.open(self.paths[case], mode="r", dparams={"nthreads": 1}, mmap_mode="r")


class Zarr(BoxRival):
    """Zarr 3 with chunks of the size that its performance guide asks for."""

    settings = (
        "zarr 3, int16, default compressor (zstd), chunks of 64x96x96 (1.1 MiB) in one shard per volume, 1 thread"
    )

    @classmethod
    def prepare(cls, folder: Path, place: Path) -> None:
        """Write one array per volume."""
        import zarr

        for path in images(folder):
            image = np.load(path)
            chunks = tuple(min(edge, n) for edge, n in zip((64, 96, 96), image.shape, strict=True))
            shards = tuple(-(-n // chunk) * chunk for n, chunk in zip(image.shape, chunks, strict=True))
            array = zarr.create_array(
                str(place / f"{path.stem}.zarr"), shape=image.shape, dtype=image.dtype, chunks=chunks, shards=shards
            )
            array[:] = image

    @classmethod
    def load_libraries(cls) -> None:
        """Import zarr and give it one thread."""
        import zarr

        super().load_libraries()
        zarr.config.set({"threading.max_workers": 1})

    def __init__(self, place: Path, sizes: Sizes) -> None:
        import zarr

        super().__init__(place, sizes)
        self.arrays = [zarr.open_array(str(path), mode="r") for path in sorted(place.glob("*.zarr"))]

    def __len__(self) -> int:
        """Return the number of volumes."""
        return len(self.arrays)

    def open(self, case: int) -> Any:
        """Return the open array."""
        return self.arrays[case]


class WholeNifti(BoxRival):
    """The gzipped NIfTI file, read whole for every sample, from which all its views are cut."""

    settings = "nii.gz of int16, read whole once per sample; its views are cut from that"

    @classmethod
    def prepare(cls, folder: Path, place: Path) -> None:
        """Write one file per volume."""
        write_nifti(folder, place)

    @classmethod
    def load_libraries(cls) -> None:
        """Import nibabel."""
        import nibabel  # noqa: F401

        super().load_libraries()

    def __init__(self, place: Path, sizes: Sizes) -> None:
        super().__init__(place, sizes)
        self.paths = sorted(place.glob("*.nii.gz"))

    def __len__(self) -> int:
        """Return the number of volumes."""
        return len(self.paths)

    def open(self, case: int) -> Any:
        """Return the voxels."""
        import nibabel as nib

        loaded: Any = nib.load(self.paths[case])
        return np.asanyarray(loaded.dataobj).T


def write_nifti(folder: Path, place: Path) -> None:
    """Write each volume as nii.gz in int16, axes reversed as NIfTI has them."""
    import nibabel as nib

    for path in images(folder):
        nib.save(nib.Nifti1Image(np.load(path).T, np.eye(4)), place / f"{path.stem}.nii.gz")


# ---------------------------------------------------------------- yardsticks


class PlainMap(BoxRival):
    """NumPy's memory map of plain .npy files: what a contiguous layout can reach."""

    settings = "np.load(mmap_mode='r') of int16, the slice copied"

    @classmethod
    def prepare(cls, folder: Path, place: Path) -> None:
        """Copy the volumes."""
        for path in images(folder):
            np.save(place / path.name, np.load(path))

    def __init__(self, place: Path, sizes: Sizes) -> None:
        super().__init__(place, sizes)
        self.maps = [np.load(path, mmap_mode="r") for path in images(place)]

    def __len__(self) -> int:
        """Return the number of volumes."""
        return len(self.maps)

    def open(self, case: int) -> Any:
        """Return the map."""
        return self.maps[case]


class DecodeAlone(OurChunks):
    """Our chunks decoded one after another into one buffer and not copied: what a chunked layout can reach."""

    settings = "the chunks that a crop of agssd meets, decoded by numcodecs from the mapped file, not copied"

    def __init__(self, place: Path, sizes: Sizes) -> None:
        super().__init__(place, sizes)
        self.work = {kind: work for kind, work in self.work.items() if kind == "crop"}

    def crop(self, size: int) -> object:
        """Decode what a crop needs."""
        import numcodecs.blosc

        from agssd.data_modules.chunk_reader import BloscChunks

        numcodecs.blosc.use_threads = False
        data = self.cache._dataset(int(self.rng.integers(len(self.cache))), "image")
        assert isinstance(data, BloscChunks)
        start = [int(self.rng.integers(n - size + 1)) for n in data.shape[1:]]
        met = tuple(slice(s // n, -(-(s + size) // n)) for s, n in zip(start, data.chunks[1:], strict=True))
        buffer = np.empty(data.chunks, data.dtype)
        for offset, length in data._extents[(slice(0, 1), *met)].reshape(-1, 2).tolist():
            numcodecs.blosc.decompress(data._mapped[offset : offset + length], buffer)
        return buffer


# ------------------------------------------------------------ MONAI, TorchIO


class MonaiCache(Rival):
    """MONAI's CacheDataset: float32 volumes in memory."""

    settings = (
        "float32 in memory; RandSpatialCropd (random_size), Resized trilinear, RandFlipd; copy_cache=False, no meta"
    )

    @classmethod
    def prepare(cls, folder: Path, place: Path) -> None:
        """Write the sources."""
        write_nifti(folder, place)

    @classmethod
    def load_libraries(cls) -> None:
        """Import MONAI's data and transforms, and nibabel."""
        import monai.data
        import monai.transforms
        import nibabel  # noqa: F401

        monai.transforms.Resize  # noqa: B018  (loads lazily)
        super().load_libraries()

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
        from monai.transforms import Compose, Randomizable, RandFlipd, RandSpatialCropd, Resized, Transform

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

        class Views(Randomizable, Transform):  # type: ignore[misc]
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

    def crop(self, size: int) -> object:
        """Unused: the work is drawn from MONAI's datasets."""
        raise NotImplementedError

    def views(self) -> list[Tensor]:
        """Unused, as ``crop``."""
        raise NotImplementedError


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


class TorchioQueue(Rival):
    """TorchIO's Queue: each volume is loaded once for ten patches; patches wait in memory."""

    samples_per_volume = 10
    settings = (
        "nii.gz; Queue of 10 UniformSampler patches per volume, as long as all volumes need, SubjectsLoader, 0 workers; "
        "one patch of parent size per sample, its views cut by slicing and torch"
    )

    @classmethod
    def prepare(cls, folder: Path, place: Path) -> None:
        """Write the sources."""
        write_nifti(folder, place)

    @classmethod
    def load_libraries(cls) -> None:
        """Import TorchIO."""
        import torchio  # noqa: F401

        super().load_libraries()

    def __init__(self, place: Path, sizes: Sizes) -> None:
        super().__init__(place, sizes)
        self._waiting: dict[int, Any] = {}
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
        """Return the next patch, float32."""
        import torchio as tio

        for other in [waiting for waiting in self._waiting if waiting != size]:
            del self._waiting[other]  # patches of another size would only take memory
        batches = self._waiting.setdefault(size, self._batches(size))
        return next(batches)["image"][tio.DATA]

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


RIVALS: dict[str, type[Rival]] = {
    "agssd, chunks": OurChunks,
    "agssd, contiguous": OurContiguous,
    "MONAI CacheDataset": MonaiCache,
    "MONAI PersistentDataset": MonaiPersistent,
    "TorchIO Queue": TorchioQueue,
    "b2nd as nnssl": Blosc2Float,
    "zarr 3": Zarr,
    "whole nii.gz": WholeNifti,
    "plain memory map": PlainMap,
    "decoding alone": DecodeAlone,
}
