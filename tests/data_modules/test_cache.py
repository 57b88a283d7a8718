"""Reading a cache by crops: exact, only what is needed, in any process."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from agssd.data_modules import cache as cache_module
from agssd.data_modules.build import LAYOUTS
from agssd.data_modules.cache import CaseInfo, VolumeCache


@pytest.fixture(scope="module", params=LAYOUTS)
def tiny_cache(request: pytest.FixtureRequest, make_cache: Callable[..., Path], tmp_path_factory: Any) -> Path:
    """Return the small cache in each layout: every test of reading holds for both."""
    return make_cache(tmp_path_factory.mktemp("cache") / "tiny.h5", layout=request.param)


def test_read__layouts_hold_the_same_and_give_arrays_of_their_own(
    make_cache: Callable[..., Path], tmp_path: Path
) -> None:
    chunked, whole = (VolumeCache(make_cache(tmp_path / f"{layout}.h5", layout=layout)) for layout in LAYOUTS)
    assert chunked.cases == whole.cases
    rng = np.random.default_rng(1)
    for what in ("image", "label", "foreground"):
        for _ in range(20):
            start = tuple(int(v) for v in rng.integers(-9, 39, 3))
            size = tuple(int(v) for v in rng.integers(1, 40, 3))
            mine = whole.read(3, start, size, what)
            assert np.array_equal(mine, chunked.read(3, start, size, what)) and mine.flags.writeable
            assert type(mine) is np.ndarray and mine.base is None
        assert np.array_equal(whole.read_whole(3, what), chunked.read_whole(3, what))
    assert np.array_equal(whole.foreground_chunks(3), chunked.foreground_chunks(3))
    before = whole.read_whole(3)
    whole.read_whole(3)[:] = 0
    assert np.array_equal(whole.read_whole(3), before)


def test_read__any_box_equals_the_padded_whole(tiny_cache: Path) -> None:
    cache = VolumeCache(tiny_cache)
    rng = np.random.default_rng(0)
    whole = cache.read_whole(2)
    info = cache.cases[2]
    padded = np.pad(whole, ((0, 0), (70, 70), (70, 70), (70, 70)), constant_values=info.fill[0])
    for _ in range(50):
        start = tuple(int(v) for v in rng.integers(-69, 60, 3))
        size = tuple(int(v) for v in rng.integers(1, 50, 3))
        box = (slice(None), *(slice(s + 70, s + 70 + n) for s, n in zip(start, size, strict=True)))
        expected = padded[box]
        if expected.shape[1:] == size:
            assert np.array_equal(cache.read(2, start, size), expected)
    assert info.fill[0] == whole.min()


def test_read__labels_and_foreground_are_zero_outside(tiny_cache: Path) -> None:
    cache = VolumeCache(tiny_cache)
    for what in ("label", "foreground"):
        box = cache.read(0, (-10, -10, -10), (60, 76, 60), what)
        whole = cache.read_whole(0, what)
        assert np.array_equal(box[10:50, 10:66, 10:50], whole)
        assert box.sum() == whole.sum()
    assert set(np.unique(cache.read_whole(0, "label"))) == {0, 1, 2}


def test_read__touches_only_the_chunks_it_meets(make_cache: Callable[..., Path], tmp_path: Path) -> None:
    path = make_cache(tmp_path / "big.h5", num_cases=1, shape=(64, 96, 64))
    key = VolumeCache(path).cases[0].key
    with h5py.File(path) as file:
        data = file[f"cases/{key}/image"]
        chunks = [data.id.get_chunk_info(row) for row in range(data.id.get_num_chunks())]
        assert data.chunks == (1, 32, 32, 32) and len(chunks) == 12
    expected = VolumeCache(path).read(0, (0, 0, 0), (32, 64, 32))
    raw = bytearray(path.read_bytes())
    for chunk in chunks:  # destroy every chunk outside d < 32, h < 64, w < 32
        if not (chunk.chunk_offset[1] < 32 and chunk.chunk_offset[2] < 64 and chunk.chunk_offset[3] < 32):
            raw[chunk.byte_offset : chunk.byte_offset + chunk.size] = b"\xff" * chunk.size
    path.write_bytes(raw)
    cache = VolumeCache(path)
    assert np.array_equal(cache.read(0, (0, 0, 0), (32, 64, 32)), expected)
    with pytest.raises(ValueError, match=f"cannot read image of case {key}"):
        cache.read(0, (0, 0, 0), (33, 64, 32))


def test_cache__opens_no_handle_before_the_first_read(tiny_cache: Path) -> None:
    cache = VolumeCache(tiny_cache)
    assert not cache._handles
    cache.read(0, (0, 0, 0), (4, 4, 4))
    assert cache._handles
    cache.close()
    assert not cache._handles
    assert cache.read(0, (0, 0, 0), (4, 4, 4)).shape == (1, 4, 4, 4)


def test_cache__survives_pickling_with_open_handles(tiny_cache: Path) -> None:
    cache = VolumeCache(tiny_cache)
    expected = cache.read(1, (3, 3, 3), (20, 20, 20))
    copy = pickle.loads(pickle.dumps(cache))
    assert copy.cases == cache.cases and copy.class_names == cache.class_names
    assert copy.salt_fingerprint == cache.salt_fingerprint
    assert np.array_equal(copy.read(1, (3, 3, 3), (20, 20, 20)), expected)


def _sums(cache: VolumeCache, queue: multiprocessing.Queue) -> None:
    queue.put([int(cache.read_whole(case).astype(np.int64).sum()) for case in range(len(cache))])


def test_cache__opens_anew_after_a_fork(tiny_cache: Path) -> None:
    cache = VolumeCache(tiny_cache)
    expected = [int(cache.read_whole(case).astype(np.int64).sum()) for case in range(len(cache))]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=_sums, args=(cache, queue)) for _ in range(3)]
    for child in children:
        child.start()
    found = [queue.get(timeout=60) for _ in children]
    for child in children:
        child.join()
    assert found == [expected] * 3
    assert [int(cache.read_whole(case).astype(np.int64).sum()) for case in range(len(cache))] == expected


def test_cache__keeps_few_datasets_of_hdf5_open_and_all_that_are_mapped(
    make_cache: Callable[..., Path], tmp_path: Path
) -> None:
    for compression, layout, kept in (
        ("lz4", "chunks", 128),
        ("blosc-lz4", "chunks", 150),
        ("none", "contiguous", 150),
    ):
        path = tmp_path / f"{compression}.h5"
        cache = VolumeCache(make_cache(path, num_cases=150, shape=(8, 8, 8), compression=compression, layout=layout))
        for case in range(len(cache)):
            cache.read(case, (0, 0, 0), (4, 4, 4))
        assert len(cache._readers) == kept
        assert cache.read(0, (0, 0, 0), (8, 8, 8)).shape == (1, 8, 8, 8)


def test_folder__of_many_files_keeps_few_open(
    make_cache: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "_MAX_OPEN_FILES", 3)
    folder = tmp_path / "folder"
    folder.mkdir()
    files = [make_cache(folder / f"{number}.h5", num_cases=1, seed=number, shape=(8, 8, 8)) for number in range(8)]
    rows = [{**VolumeCache(path).cases[0].to_json(), "file": number} for number, path in enumerate(files)]
    index = {
        "format": "agssd-cache",
        "version": 1,
        "salt_fingerprint": None,
        "class_names": [],
        "files": [{"name": path.name, "bytes": path.stat().st_size} for path in files],
        "cases": rows,
    }
    (folder / "index.json").write_text(json.dumps(index))
    cache = VolumeCache(folder)
    before = len(os.listdir("/proc/self/fd"))
    expected = [int(cache.read_whole(case).sum()) for case in range(len(cache))]
    assert len(os.listdir("/proc/self/fd")) - before <= 3 * 2
    assert len(set(expected)) == 8
    assert [int(cache.read_whole(case).sum()) for case in reversed(range(len(cache)))] == expected[::-1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_read__a_file_that_shrinks_or_rots_is_named(
    make_cache: Callable[..., Path], tmp_path: Path, layout: str
) -> None:
    path = make_cache(tmp_path / "c.h5", layout=layout)
    cache = VolumeCache(path)
    whole = path.read_bytes()
    array = cache._dataset(0, "image").array
    at = int(array._extents[0, 0, 0, 0, 0]) + 20 if layout == "chunks" else whole.find(array.tobytes()) + 20
    cache.close()
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(ValueError, match=f"cannot read image of case {cache.cases[0].key}"):
        cache.read_whole(0)
    cache.close()
    path.write_bytes(whole)
    cache.read(0, (0, 0, 0), (4, 4, 4))
    os.truncate(path, len(whole) // 2)
    with pytest.raises(ValueError, match=f"case {cache.cases[0].key}: c.h5 has become shorter"):
        cache.read(0, (0, 0, 0), (4, 4, 4))


def test_select__conditions_combine(tiny_cache: Path) -> None:
    cache = VolumeCache(tiny_cache)
    parts = [cache.select(split) for split in ("train", "val", "test")]
    assert [len(part) for part in parts] == [5, 2, 1]
    assert sorted(sum(parts, [])) == list(range(8))
    assert cache.select(modality="ct") == [] and len(cache.select("train", "mri", labelled=True, with_class=True)) == 5
    assert cache.select(labelled=False) == []
    with pytest.raises(ValueError, match="split is 'valid'"):
        cache.select("valid")


def test_foreground_chunks__equal_brute_force(make_cache: Callable[..., Path], tmp_path: Path) -> None:
    cache = VolumeCache(make_cache(tmp_path / "c.h5", num_cases=1, shape=(40, 70, 33)))
    foreground, shares = cache.read_whole(0, "foreground"), cache.foreground_chunks(0)
    assert shares.shape == (2, 3, 2)
    for d, h, w in np.ndindex(*shares.shape):
        chunk = foreground[32 * d : 32 * d + 32, 32 * h : 32 * h + 32, 32 * w : 32 * w + 32]
        assert shares[d, h, w] == pytest.approx(chunk.mean(), abs=1e-6)


def test_case_info__survives_json(tiny_cache: Path) -> None:
    case = VolumeCache(tiny_cache).cases[0]
    assert CaseInfo.from_json({**case.to_json(), "field_of_a_later_version": 1}) == case
    assert isinstance(case.affine[0], tuple) and isinstance(case.shape, tuple)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
def test_cache__truncated_is_refused_by_name(tiny_cache: Path, tmp_path: Path, share: float) -> None:
    path = tmp_path / "cut.h5"
    data = tiny_cache.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match=r"cut\.h5.*(truncated|not an HDF5 file)"):
        VolumeCache(path)


def test_cache__other_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist.*agssd prepare"):
        VolumeCache(tmp_path / "none.h5")
    (tmp_path / "text.h5").write_text("no cache")
    with pytest.raises(ValueError, match="no agssd cache"):
        VolumeCache(tmp_path / "text.h5")
    for name, attributes, match in (
        ("foreign.h5", {}, "no agssd cache"),
        ("later.h5", {"format": "agssd-cache", "version": 9}, "version 9"),
        ("open.h5", {"format": "agssd-cache", "version": 1, "complete": False}, "unfinished"),
        ("bare.h5", {"format": "agssd-cache", "version": 1, "complete": True}, "index"),
    ):
        with h5py.File(tmp_path / name, "w") as file:
            file.attrs.update(attributes)
        with pytest.raises(ValueError, match=match):
            VolumeCache(tmp_path / name)


def test_read__wrong_requests_are_refused(make_cache: Callable[..., Path], tmp_path: Path) -> None:
    cache = VolumeCache(make_cache(tmp_path / "c.h5", num_cases=2, shape=(8, 8, 8), labelled=False))
    with pytest.raises(ValueError, match="cases 0 to 1"):
        cache.read(2, (0, 0, 0), (4, 4, 4))
    with pytest.raises(ValueError, match="has no 'label'"):
        cache.read(0, (0, 0, 0), (4, 4, 4), "label")
    with pytest.raises(ValueError, match="at least one voxel"):
        cache.read(0, (0, 0, 0), (4, 0, 4))
