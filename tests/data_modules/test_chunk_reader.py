"""Chunks decoded outside HDF5: the same voxels as HDF5 gives, and an error instead of wrong ones."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin  # noqa: F401  (registers the filters)
import numpy as np
import pytest

from agssd.data_modules.build import FILTERS, filter_arguments
from agssd.data_modules.cache import VolumeCache
from agssd.data_modules.chunk_reader import BloscChunks, open_chunks, write_extents

SHAPE = (2, 45, 71, 83)


def volume(dtype: Any) -> np.ndarray:
    """Texture beside large regions of one value, as in images and masks."""
    rng = np.random.default_rng(3)
    values = rng.integers(0, 40, SHAPE).astype(dtype)
    values[:, :40, :, 20:] = 7
    return values


def write(path: Path, compression: str = "blosc-lz4", dtype: Any = np.int16) -> np.ndarray:
    values = volume(dtype)
    with h5py.File(path, "w") as file:
        group = file.create_group("case")
        group.create_dataset("image", data=values, chunks=(1, 32, 32, 32), **filter_arguments(compression))
        file.flush()
        write_extents(group, "image")
    return values


def reader(path: Path) -> BloscChunks | None:
    with h5py.File(path) as file:
        return open_chunks(file["case"], "image", memoryview(path.read_bytes()))


def random_box(rng: np.random.Generator) -> tuple[slice, ...]:
    ends = [sorted(rng.choice(n + 1, 2, replace=False)) for n in SHAPE]
    return tuple(slice(int(low), int(high)) for low, high in ends)


@pytest.mark.parametrize("dtype", [np.int16, np.uint8])
def test_chunks__any_box_equals_the_array(tmp_path: Path, dtype: Any) -> None:
    values = write(tmp_path / "a.h5", dtype=dtype)
    chunks = reader(tmp_path / "a.h5")
    assert chunks is not None
    rng = np.random.default_rng(0)
    for _ in range(60):
        box = random_box(rng)
        found = chunks[box]
        assert found.dtype == dtype and found.flags.owndata and np.array_equal(found, values[box])
    assert np.array_equal(chunks[(Ellipsis,)], values)


def test_stored_bytes__are_those_of_the_chunks_that_a_box_touches(tmp_path: Path) -> None:
    write(tmp_path / "a.h5")
    chunks = reader(tmp_path / "a.h5")
    assert chunks is not None
    found: list[Any] = []
    with h5py.File(tmp_path / "a.h5") as file:
        file["case/image"].id.chunk_iter(found.append)
    rng = np.random.default_rng(1)
    for _ in range(30):
        box = random_box(rng)
        touched = [
            info.size
            for info in found
            if all(
                part.start < first + length and first < part.stop
                for part, first, length in zip(box, info.chunk_offset, chunks.chunks, strict=True)
            )
        ]
        assert chunks.stored_bytes(box) == sum(touched) > 0


def test_cache__stored_bytes_of_every_layout(make_cache: Callable[..., Path], tmp_path: Path) -> None:
    shape, plain = (40, 56, 40), 2 * 40 * 56 * 40
    for number, layout in enumerate(({"layout": "contiguous"}, {"compression": "lz4"}, {})):
        cache = VolumeCache(make_cache(tmp_path / f"{number}.h5", num_cases=2, **layout))
        whole = cache.stored_bytes(0, (0, 0, 0), shape)
        assert whole == plain if "layout" in layout else 0 < whole < plain
        assert cache.stored_bytes(0, (-8, -8, -8), (64, 72, 64)) == whole, "padding is not read"
        assert cache.stored_bytes(0, (0, 0, 0), (20, 28, 20)) < whole
        assert cache.stored_bytes(0, (100, 100, 100), (8, 8, 8)) == 0


def test_chunks__threads_share_a_reader(tmp_path: Path) -> None:
    values = write(tmp_path / "a.h5")
    chunks = reader(tmp_path / "a.h5")
    assert chunks is not None
    rng = np.random.default_rng(1)
    boxes = [random_box(rng) for _ in range(200)]
    with ThreadPoolExecutor(4) as pool:
        for box, found in zip(boxes, pool.map(chunks.__getitem__, boxes), strict=True):
            assert np.array_equal(found, values[box])


@pytest.mark.parametrize("compression", FILTERS)
def test_cache__every_filter_is_read(make_cache: Callable[..., Path], tmp_path: Path, compression: str) -> None:
    expected = VolumeCache(make_cache(tmp_path / "plain.h5", compression="none")).read_whole(2)
    cache = VolumeCache(make_cache(tmp_path / "a.h5", compression=compression))
    assert np.array_equal(cache.read(2, (1, 2, 3), (30, 31, 32)), expected[:, 1:31, 2:33, 3:35])
    assert isinstance(cache._dataset(2, "image").array, BloscChunks) == (compression == "blosc-lz4")


def test_open_chunks__a_table_of_another_file_is_not_believed(tmp_path: Path) -> None:
    values = write(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5") as file, h5py.File(tmp_path / "b.h5", "w") as copy:
        copy.create_dataset("before", data=np.zeros(1000))
        file.copy("case", copy)
    assert reader(tmp_path / "b.h5") is None
    with h5py.File(tmp_path / "b.h5", "a") as copy:
        write_extents(copy["case"], "image")
    chunks = reader(tmp_path / "b.h5")
    assert chunks is not None and np.array_equal(chunks[(Ellipsis,)], values)


def test_write_extents__leaves_what_hdf5_must_read(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(-(2**15), 2**15, (64, 64), dtype=np.int16)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("noise", data=noise, chunks=(32, 32), **filter_arguments("blosc-lz4"))
        file.create_dataset("part", (64, 64), chunks=(32, 32), dtype="i2", **filter_arguments("blosc-lz4"))
        file["part"][:32] = 1
        file.create_dataset("whole", data=noise)
        file.flush()
        for name in ("noise", "part", "whole"):
            write_extents(file, name)
        assert set(file) == {"noise", "part", "whole"}


def test_chunks__a_changed_byte_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "a.h5")
    raw = (tmp_path / "a.h5").read_bytes()
    intact = reader(tmp_path / "a.h5")
    assert intact is not None
    rng = np.random.default_rng(2)
    extents = intact._extents.reshape(-1, 3)
    for turn in range(300):
        offset, length, _ = (int(v) for v in extents[rng.integers(len(extents))])
        broken = bytearray(raw)
        at = offset + int(rng.integers(16 if turn % 2 else length))  # every second time in the header
        broken[at] ^= int(rng.integers(1, 256))
        damaged = BloscChunks(memoryview(broken), intact.shape, intact.chunks, intact.dtype, intact._extents)
        with pytest.raises(OSError, match=f"the chunk at byte {offset}"):
            damaged[(Ellipsis,)]


def test_chunks__a_truncated_file_is_an_error(make_cache: Callable[..., Path], tmp_path: Path) -> None:
    write(tmp_path / "a.h5")
    chunks = reader(tmp_path / "a.h5")
    assert chunks is not None
    last = int(chunks._extents[..., 0].max())
    cut = BloscChunks(chunks._mapped[: last + 20], chunks.shape, chunks.chunks, chunks.dtype, chunks._extents)
    with pytest.raises(OSError, match=f"the chunk at byte {last} is truncated"):
        cut[(Ellipsis,)]
