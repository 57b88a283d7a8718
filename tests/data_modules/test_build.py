"""Writing a cache: whole or not at all, the same bytes each time, splits by subject."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from agssd.data_modules import build
from agssd.data_modules.build import FILTERS, CacheWriter, assign_splits, chunk_shape
from agssd.data_modules.cache import VolumeCache
from agssd.scans.case import PreparedCase


def _case(seed: int = 0, shape: tuple[int, int, int] = (9, 10, 11)) -> PreparedCase:
    image = np.random.default_rng(seed).integers(-50, 900, (1, *shape)).astype(np.int16)
    affine = np.array([[0, 0, 2.0, -5], [0, 3.0, 0, 7], [4.0, 0, 0, 9], [0, 0, 0, 1]])
    return PreparedCase(
        image=image,
        foreground=(image[0] > 300).astype(np.uint8),
        label=(image[0] > 600).astype(np.uint8),
        modality="mri",
        spacing_mm=(4.0, 3.0, 2.0),
        affine=affine,
        source_shape=(11, 10, 9),
        source_affine=affine[:, [2, 1, 0, 3]],
        source_sha256=f"{seed:064x}",
        scale=(0.5,),
        offset=(3.0,),
        low=(-20.0,),
        high=(400.0,),
        edge_q99=(12.5,),
        perceptual_hash="5a" * 64,
    )


@pytest.mark.parametrize("compression", FILTERS)
def test_writer__arrays_and_constants_come_back(tmp_path: Path, compression: str) -> None:
    case = _case()
    with CacheWriter(tmp_path / "c.h5", ["sick", "well"], compression) as writer:
        writer.add(case, "k", "s", "train", "well")
        writer.finish(salt_fingerprint="0123456789abcdef")
    cache = VolumeCache(tmp_path / "c.h5")
    assert cache.salt_fingerprint == "0123456789abcdef"
    info = cache.cases[0]
    assert np.array_equal(cache.read_whole(0), case.image)
    assert np.array_equal(cache.read_whole(0, "foreground"), case.foreground)
    assert np.array_equal(cache.read_whole(0, "label"), case.label)
    assert cache.read_whole(0).dtype == np.int16
    assert np.array_equal(np.array(info.affine), case.affine)
    assert np.array_equal(np.array(info.source_affine), case.source_affine)
    assert (info.scale, info.offset, info.low, info.high, info.edge_q99) == (
        (0.5,),
        (3.0,),
        (-20.0,),
        (400.0,),
        (12.5,),
    )
    assert (info.class_index, info.label_values, info.split) == (1, (0, 1), "train")
    assert info.perceptual_hash == "5a" * 64
    assert info.fill == (int(case.image.min()),)
    assert info.foreground_fraction == pytest.approx(case.foreground.mean())


def test_writer__nothing_appears_before_the_end(tmp_path: Path) -> None:
    path = tmp_path / "c.h5"
    with pytest.raises(RuntimeError, match="stop"), CacheWriter(path) as writer:
        writer.add(_case(), "k", "s")
        assert not path.exists()
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []
    with CacheWriter(path) as writer:
        writer.add(_case(), "k", "s")
        writer.finish()
        assert [p.name for p in tmp_path.iterdir()] == ["c.h5"]
    assert [p.name for p in tmp_path.iterdir()] == ["c.h5"]


def test_writer__same_cases_give_the_same_bytes(make_cache: Callable[..., Path], tmp_path: Path) -> None:
    one, two = (make_cache(tmp_path / name, num_cases=3, shape=(20, 20, 20)) for name in ("a.h5", "b.h5"))
    assert one.read_bytes() == two.read_bytes()


def test_writer__failed_overwrite_leaves_the_old_cache(tmp_path: Path, make_cache: Callable[..., Path]) -> None:
    path = make_cache(tmp_path / "c.h5", num_cases=2, shape=(8, 8, 8))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="--overwrite"):
        CacheWriter(path)
    with pytest.raises(ValueError, match="no case"), CacheWriter(path, overwrite=True) as writer:
        writer.finish()
    assert path.read_bytes() == before


def test_writer__full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"cannot write .*c\.h5.*No space left"):
        with CacheWriter(tmp_path / "c.h5") as writer:

            def full(*args: object) -> None:
                raise OSError(28, "No space left on device")

            monkeypatch.setattr(build, "write_arrays", full)
            writer.add(_case(), "k", "s")
    assert list(tmp_path.iterdir()) == []


def test_writer__wrong_places_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder"):
        CacheWriter(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        CacheWriter(tmp_path / "none" / "c.h5")


def test_writer__inconsistent_cases_are_refused(tmp_path: Path) -> None:
    with CacheWriter(tmp_path / "c.h5") as writer:
        writer.add(_case(0), "k", "s", "train")
        with pytest.raises(ValueError, match="in the cache already"):
            writer.add(_case(1), "k", "s")
        with pytest.raises(ValueError, match="split is 'dev'"):
            writer.add(_case(1), "l", "s", "dev")
        bad = _case(1)
        bad.label = np.zeros((3, 3, 3), dtype=np.uint8)
        with pytest.raises(ValueError, match="differ in shape"):
            writer.add(bad, "m", "s")
        writer.add(_case(2), "n", "s", "test")
        with pytest.raises(ValueError, match="subject s is in two splits"):
            writer.finish()


def test_finish__train_is_never_empty(tmp_path: Path) -> None:
    with CacheWriter(tmp_path / "c.h5") as writer:
        writer.add(_case(), "k", "s", "test")
        with pytest.raises(ValueError, match="at least one subject must be in train"):
            writer.finish()


def test_assign_splits__tenths_by_key_and_never_an_empty_train() -> None:
    for count, expected in (
        (1, (1, 0, 0)),
        (2, (2, 0, 0)),
        (3, (2, 1, 0)),
        (4, (3, 1, 0)),
        (5, (3, 1, 1)),
        (100, (80, 10, 10)),
    ):
        subjects = [f"{row * 7919 % 1000:03d}" for row in range(count)]
        splits = assign_splits(subjects)
        counts = Counter(splits.values())
        assert (counts["train"], counts["val"], counts["test"]) == expected
        assert assign_splits(list(reversed(subjects)) * 2) == splits


def test_assign_splits__held_splits_get_no_more() -> None:
    subjects = [f"{row:02d}" for row in range(50)]
    assert Counter(assign_splits(subjects, ["test"]).values()) == {"train": 45, "val": 5}
    assert Counter(assign_splits(subjects, ["test", "val"]).values()) == {"train": 50}


def test_chunk_shape__small_axes_are_whole() -> None:
    assert chunk_shape((35, 48, 49)) == (35, 48, 32)
    assert chunk_shape((300, 512, 512)) == (32, 32, 32)
