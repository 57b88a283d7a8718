"""Region maps beside the volumes: a cache is copied case by case, each with the map that a source finds for it.

``regions`` of a case is (D, H, W), 0 = no region, else the number of a region of that case, 1 to
``CaseInfo.num_regions``; uint8, int16 or int32, whichever is the smallest that holds them. It is stored in chunks like
the foreground, or as its voxels are where the image is. A number means the same region wherever in the case it stands
(of frames, in one frame: each frame has numbers of its own) and nothing in another case.

The copy comes into being as a cache does (``agssd.data_modules.build_folder``): it may be killed at any moment, and
the same call goes on to the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agssd import __version__
from agssd.data_modules.build import FILTERS, check_place, chunk_shape, filter_arguments, write_array
from agssd.data_modules.build_folder import BuildFolder, build_path
from agssd.data_modules.cache import VERSION, VolumeCache
from agssd.data_modules.chunk_reader import EXTENTS
from agssd.data_modules.parts import Part, read_part, stored_bytes, write_whole
from agssd.regions.source import RegionCase, RegionSource
from agssd.scans.parallel import WorkerDiedError, in_order

DTYPES = (np.uint8, np.int16, np.int32)  # torch knows all of them; of the unsigned ones it knows little beyond uint8


def write_regions(
    cache: str | Path,
    out: str | Path,
    source: RegionSource,
    workers: int = 1,
    shard_bytes: int | None = None,
    overwrite: bool = False,
) -> Iterator[Part]:
    """Copy a cache to ``out`` with the regions of every case, and yield what became of each case, in their order.

    Run it to its end: the cache appears when the last case was taken. Region maps that the cache has are replaced in
    the copy.

    Args:
        cache: written by ``agssd prepare``.
        out: the copy; not the cache itself.
        source: of the regions.
        workers: processes of one thread each; the result does not depend on it, but for rounding where a source
            computes otherwise on several threads, as SAM may.
        shard_bytes: stored bytes per file of a copy that is a folder of several, or None for one file.
        overwrite: replace an existing cache.

    Raises:
        ValueError: a cache that cannot be read or copied, a place that cannot be written, a case that the source
            cannot work on, or a map that is none; what is done is kept for the next call.
    """
    path, place = Path(cache), Path(out)
    if workers < 1:
        raise ValueError(f"--workers is {workers}; it must be at least 1")
    if place.exists() and place.resolve() == path.resolve():
        raise ValueError(f"--out {place} is the cache itself; name another, the copy with regions")
    check_place(place, overwrite or build_path(place).is_dir())
    whole = VolumeCache(path)
    _check_sources(whole)
    with BuildFolder(place) as folder:
        bench = RegionBench(folder.parts, path, source)
        digests = [bench.digest(row) for row in range(len(whole))]
        folder.write_plan(digests, whole.class_names, whole.salt_fingerprint)
        if not folder.published(shard_bytes):
            check_place(place, overwrite)
            if not folder.decided(shard_bytes):
                try:
                    rows = list(zip(range(len(whole)), digests, strict=True))
                    for _, part in in_order(partial(_make, bench), rows, workers, partial(_found, bench)):
                        yield part
                except OSError as error:
                    keep = folder.how_to_go_on(error)
                    raise ValueError(f"cannot write {folder.parts}: {error.strerror}{keep}") from error
                except WorkerDiedError as error:
                    raise ValueError(f"{error}{folder.how_to_go_on()}") from error
        folder.merge(shard_bytes)


def num_ready(out: str | Path) -> int:
    """Return how many cases an interrupted call left for this place."""
    return len(list((build_path(Path(out)) / "parts").glob("*.h5")))


@dataclass(frozen=True)
class RegionBench:
    """What a process needs to make the parts of a copy with regions.

    Attributes:
        folder: where parts lie.
        cache: the cache that is copied.
        source: of the regions.
    """

    folder: Path
    cache: Path
    source: RegionSource

    def digest(self, row: int) -> str:
        """Return the name of the part of a case: a hash of the case, its file as it is now, and the settings."""
        whole = _opened(self.cache, self.cache.stat().st_mtime_ns)
        stat = whole.file_of(row).stat()
        identity = {
            "case": whole.cases[row].to_json(),
            "file": [str(whole.file_of(row).absolute()), stat.st_size, stat.st_mtime_ns],
            "source": [type(self.source).__name__, self.source.identity()],
            "version": [VERSION, __version__],
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]

    def path(self, digest: str) -> Path:
        """Return where the part of a digest lies."""
        return self.folder / f"{digest}.h5"

    def make(self, row: int, digest: str) -> Part:
        """Find the regions of a case and leave its part.

        Raises:
            ValueError: from the source, or a map that is none.
            OSError: the part cannot be written.
        """
        import h5py

        whole = _opened(self.cache, self.cache.stat().st_mtime_ns)
        info = whole.cases[row]
        regions = checked(self.source(region_case(whole, row)), info.shape, info.key)
        highest = int(regions.max())
        buffer = io.BytesIO()  # see agssd.data_modules.parts: a full disk is met by one plain write
        with (
            h5py.File(buffer, "w", libver=("v110", "v110")) as file,
            h5py.File(whole.file_of(row), "r", locking=False) as old,
        ):
            group, there = file.create_group("case"), old[f"cases/{info.key}"]
            for name in there:  # where chunks lie is written anew by the merge
                if name != "regions" and not name.endswith(EXTENTS):
                    old.copy(there[name], group, name=name)
            chunks = None if there["image"].chunks is None else chunk_shape(info.shape, info.spatial_dims)
            write_array(group, "regions", regions, chunks, filter_arguments(FILTERS[0]))
            class_name = None if info.class_index is None else whole.class_names[info.class_index]
            digest_of_map = hashlib.sha256(regions.tobytes()).hexdigest()
            told = replace(info, num_regions=highest, regions_sha256=digest_of_map)
            part = Part(told, class_name, None, (), stored_bytes(group))
            file.attrs["part"] = part.to_json()
        write_whole(self.path(digest), buffer.getvalue())
        return part


def region_case(cache: VolumeCache, row: int) -> RegionCase:
    """Return a case as a source of regions sees it; every array of it is read, and so known to be whole.

    Raises:
        ValueError: an array cannot be read.
    """
    info = cache.cases[row]
    stored = cache.read_whole(row)
    columns = [np.asarray(values, np.float32)[:, None, None, None] for values in (info.scale, info.offset)]
    low, high = (np.asarray(values, np.float32)[:, None, None, None] for values in (info.low, info.high))
    image = (stored.astype(np.float32) * columns[0] + columns[1] - low) / np.maximum(high - low, 1e-6)
    return RegionCase(
        key=info.key,
        image=image.clip(0, 1),
        foreground=cache.read_whole(row, "foreground") != 0,
        label=None if info.label_values is None else cache.read_whole(row, "label"),
        spacing_mm=info.spacing_mm,
        spatial_dims=info.spatial_dims,
        in_mm=info.in_mm,
    )


def checked(regions: NDArray[Any], shape: tuple[int, ...], key: str) -> NDArray[np.integer[Any]]:
    """Return a region map in the smallest type that holds it.

    Raises:
        ValueError: another shape, no integers, numbers below 0 or beyond int32.
    """
    if regions.shape != tuple(shape) or not np.issubdtype(regions.dtype, np.integer):
        raise ValueError(
            f"case {key}: a region map is {tuple(shape)} integers, this one {regions.shape} {regions.dtype}"
        )
    lowest, highest = int(regions.min()), int(regions.max())
    if lowest < 0 or highest > np.iinfo(np.int32).max:
        raise ValueError(f"case {key}: regions are numbered {lowest} to {highest}; give 0 to {np.iinfo(np.int32).max}")
    return regions.astype(next(dtype for dtype in DTYPES if highest <= np.iinfo(dtype).max))


def _check_sources(cache: VolumeCache) -> None:
    """Refuse a cache with two cases of the same bytes, which a merge would make one."""
    repeated = [sha for sha, count in Counter(info.source_sha256 for info in cache.cases).items() if count > 1]
    if repeated:
        keys = [info.key for info in cache.cases if info.source_sha256 == repeated[0]]
        raise ValueError(
            f"{cache.path}: cases {keys[0]} and {keys[1]} were made from the same bytes; prepare the cache anew, which "
            "leaves repeated scans out"
        )


def _make(bench: RegionBench, item: tuple[int, str]) -> Part:
    return bench.make(*item)


def _found(bench: RegionBench, item: tuple[int, str]) -> Part | None:
    path = bench.path(item[1])
    return read_part(path) if path.is_file() else None


@lru_cache(maxsize=1)
def _opened(path: Path, changed: int) -> VolumeCache:
    return VolumeCache(path)
