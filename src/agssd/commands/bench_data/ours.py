"""Ours in both layouts, and the yardsticks that say what a layout could reach."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from agssd.commands.bench_data.rival import (
    GLOBAL_SCALE,
    HIGH_HU,
    LOCAL_SCALE,
    LOW_HU,
    NUM_LOCAL,
    BoxRival,
    CutRival,
    Sizes,
    images,
)

if TYPE_CHECKING:
    from torch import Tensor


class OurChunks(CutRival):
    """Parent crops of ``agssd``, and views from one parent by ``OverlapCrops``."""

    layout = "chunks"
    settings = "agssd prepare's default: Blosc-LZ4 chunks of 32³, int16; views from one parent crop per sample"

    libraries = ("agssd.data_modules.pretrain", "agssd.transforms.crops")

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

    def __init__(self, place: Path, sizes: Sizes) -> None:
        from agssd.data_modules.cache import VolumeCache
        from agssd.data_modules.pretrain import PretrainDataModule
        from agssd.transforms.crops import OverlapCrops

        super().__init__(place, sizes)
        self.cache = VolumeCache(place / "cache.h5")
        vox = sizes.parent_vox
        data = PretrainDataModule(str(self.cache.path), (vox, vox, vox), global_batch_size=1)
        data.setup("validate")
        assert data.train_crops is not None
        self.crops = data.train_crops
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
        data = self.cache._dataset(int(self.rng.integers(len(self.cache))), "image").array
        assert isinstance(data, BloscChunks)
        start = [int(self.rng.integers(n - size + 1)) for n in data.shape[1:]]
        met = tuple(slice(s // n, -(-(s + size) // n)) for s, n in zip(start, data.chunks[1:], strict=True))
        buffer = np.empty(data.chunks, data.dtype)
        for offset, length, _ in data._extents[(slice(0, 1), *met)].reshape(-1, 3).tolist():
            numcodecs.blosc.decompress(data._mapped[offset : offset + length], buffer)
        return buffer
