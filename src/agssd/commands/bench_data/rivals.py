"""The rivals by name: ours, engines that others train from, set up as their documentation advises, and yardsticks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from agssd.commands.bench_data.libraries import MonaiCache, MonaiPersistent, TorchioQueue
from agssd.commands.bench_data.ours import DecodeAlone, OurChunks, OurContiguous, PlainMap
from agssd.commands.bench_data.rival import BoxRival, Rival, Sizes, images, unit_range, write_nifti


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
    libraries = ("nibabel",)

    @classmethod
    def prepare(cls, folder: Path, place: Path) -> None:
        """Write one file per volume."""
        write_nifti(folder, place)

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
