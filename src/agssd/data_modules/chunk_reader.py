"""Compressed chunks of an HDF5 dataset, read and decoded outside HDF5.

HDF5 reads, decodes and copies a chunk through its filter pipeline, under its own global lock and Python's. Here the
place of every chunk in the file is a table beside the array, so numcodecs decodes each chunk of a box out
of the mapped file into a buffer that stays in the processor's cache, from which it is copied to its place.

Medians of 55 random boxes of a simulated CT of 320x384x384 voxels, in turn, in ms (2-core x86-64 CPU, one thread, warm
file, 2026-11-21; ``make bench-data`` repeats the first, second and fourth column):

======================  =====  =====  ============
box                     h5py   here   decode alone
======================  =====  =====  ============
image, 96 a side         1.59   1.41          1.13
image, 168 a side        7.94   6.50          4.75
foreground, 96 a side    0.53   0.35          0.25
foreground, 168 a side   2.70   1.40          1.05
======================  =====  =====  ============

Tried and not kept: ``pread`` instead of the map (8 % slower), python-blosc2 as decoder (13 % faster on the image, six
times slower on the foreground, and twelve dependencies), a cache of decoded chunks (random boxes of random cases never
meet one again), threads (a loader worker has one core).
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

EXTENTS = "_extents"  # suffix of the table's name
_SIGNED = 2**63  # taken off a hash, which then fits an int64
_BLOSC_FILTER = 32001  # as registered with The HDF Group


def write_extents(group: Any, name: str) -> None:
    """Write where the chunks of ``group[name]`` lie in their file, as ``group[name + "_extents"]``.

    The table is (chunks per axis..., 3) int64: first byte in the file, length, and the XXH3 of these bytes, by which a
    damaged chunk is known even if it can be decoded. It is written only for arrays whose every chunk is one Blosc
    frame; others are read through HDF5. Flush the array before, and call this again after chunks have moved: copying a
    group to another file moves them.

    Args:
        group: h5py group of a file open for writing.
        name: of a dataset in it.
    """
    data = group[name]
    if name + EXTENTS in group:
        del group[name + EXTENTS]
    filters = data.id.get_create_plist()
    if data.chunks is None or [filters.get_filter(k)[0] for k in range(filters.get_nfilters())] != [_BLOSC_FILTER]:
        return
    found: list[Any] = []
    data.id.chunk_iter(found.append)
    grid = tuple(-(-n // chunk) for n, chunk in zip(data.shape, data.chunks, strict=True))
    if len(found) != np.prod(grid) or any(info.filter_mask for info in found):
        return  # a chunk that was never written, or that the filter could not make smaller
    table = np.zeros((*grid, 3), dtype=np.int64)
    for info in found:
        at = tuple(start // chunk for start, chunk in zip(info.chunk_offset, data.chunks, strict=True))
        frame = data.id.read_direct_chunk(info.chunk_offset)[1]
        table[at] = info.byte_offset, info.size, checksum(frame)
    group.create_dataset(name + EXTENTS, data=table)


def checksum(data: Any) -> int:
    """Return the XXH3 of 64 bits of some bytes, as a signed number; beside decoding them its time does not count."""
    return int(_xxh3()(data)) - _SIGNED


def open_chunks(group: Any, name: str, mapped: memoryview) -> BloscChunks | None:
    """Return the reader of ``group[name]``, or None where HDF5 must read it.

    That is an array without a table, or with one that another file was written with (its first chunk lies elsewhere).

    Args:
        group: h5py group.
        name: of a dataset in it, stored in chunks.
        mapped: bytes of the file, mapped into memory.
    """
    if name + EXTENTS not in group:
        return None
    data, extents = group[name], group[name + EXTENTS][()]
    first = data.id.get_chunk_info_by_coord((0,) * data.ndim)
    if extents.shape[-1] != 3 or (first.byte_offset, first.size) != tuple(extents[(0,) * data.ndim])[:2]:
        return None
    return BloscChunks(mapped, data.shape, data.chunks, data.dtype, extents)


class BloscChunks:
    """One array of Blosc frames in a mapped file; indexed with slices of step 1, as the HDF5 dataset would be.

    Several threads may read one object at once: decoding holds no lock. One core decodes one box, because a loader
    worker has one.

    Args:
        mapped: bytes of the file.
        shape: of the array.
        chunks: of one chunk, the same number of axes.
        dtype: of the array.
        extents: (chunks per axis..., 3) int64, see ``write_extents``.
    """

    def __init__(
        self,
        mapped: memoryview,
        shape: tuple[int, ...],
        chunks: tuple[int, ...],
        dtype: np.dtype[Any],
        extents: NDArray[np.int64],
    ) -> None:
        """Keep the table."""
        self.shape, self.chunks, self.dtype = shape, chunks, dtype
        self._mapped = mapped
        self._extents = extents

    def stored_bytes(self, box: tuple[slice, ...]) -> int:
        """Return the bytes of the compressed chunks that ``box``, a slice per axis, touches; nothing is read."""
        if any(part.start >= part.stop for part in box):
            return 0
        used = zip(box, self.chunks, strict=True)
        return int(self._extents[tuple(slice(part.start // n, -(-part.stop // n)) for part, n in used)][..., 1].sum())

    def __getitem__(self, box: tuple[Any, ...]) -> NDArray[Any]:
        """Return a new array with the voxels of ``box``: a slice per axis, or an Ellipsis for the whole.

        Raises:
            OSError: a chunk is truncated or damaged.
        """
        slices = tuple(slice(None) for _ in self.shape) if box == (Ellipsis,) else box
        bounds = [part.indices(n)[:2] for part, n in zip(slices, self.shape, strict=True)]
        out = np.empty([stop - start for start, stop in bounds], dtype=self.dtype)
        chunk = np.empty(self.chunks, dtype=self.dtype)
        used = [range(start // n, -(-stop // n)) for (start, stop), n in zip(bounds, self.chunks, strict=True)]
        extents = self._extents[tuple(slice(rows.start, rows.stop) for rows in used)].reshape(-1, 3).tolist()
        *outer, last = (
            [_overlap(start, stop, row * n, n) for row in rows]
            for (start, stop), n, rows in zip(bounds, self.chunks, used, strict=True)
        )
        # a run of voxels along the last axis is one item: numpy copies those in half the time
        columns = [(_runs(out[..., there]), _runs(chunk[..., here])) for there, here in last]
        decompress, digest = _blosc().decompress, _xxh3()
        places = product(product(*outer), columns)
        frame: Any = b""
        for (offset, length, wanted), (along, (target, source)) in zip(extents, places, strict=True):
            before, frame = frame, self._mapped[offset : offset + length]
            if frame != before:  # else it is decoded already: of a mask, most chunks are alike
                if len(frame) != length or digest(frame) - _SIGNED != wanted:
                    raise OSError(f"the chunk at byte {offset} is truncated or damaged")
                try:
                    decompress(frame, chunk)
                except (RuntimeError, ValueError) as error:
                    raise OSError(f"the chunk at byte {offset} is damaged: {error}") from error
            target[tuple([there for there, _ in along])] = source[tuple([here for _, here in along])]
        return out


def _runs(array: NDArray[Any]) -> NDArray[Any]:
    """Return a view with the last axis as one item."""
    return array.view(np.dtype((np.void, array.shape[-1] * array.dtype.itemsize)))


def _overlap(start: int, stop: int, first: int, chunk: int) -> tuple[slice, slice]:
    """Return the part of [start, stop) that a chunk at ``first`` covers, in the box and in the chunk."""
    low, high = max(start, first), min(stop, first + chunk)
    return slice(low - start, high - start), slice(low - first, high - first)


@lru_cache(maxsize=1)
def _xxh3() -> Any:
    import xxhash

    return xxhash.xxh3_64_intdigest


@lru_cache(maxsize=1)
def _blosc() -> Any:
    import numcodecs.blosc

    numcodecs.blosc.use_threads = False  # each worker has one core; what numcodecs advises for several processes
    return numcodecs.blosc
