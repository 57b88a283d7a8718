"""Region maps: copies of caches that have them, resumed byte for byte, and their way into batches and views."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from agssd.data_modules.build_folder import build_path
from agssd.data_modules.cache import VolumeCache
from agssd.data_modules.pretrain import PretrainDataModule
from agssd.data_modules.regions import DTYPES, checked, write_regions
from agssd.regions.source import RegionCase
from agssd.transforms.crops import OverlapCrops
from agssd.transforms.views import make_views

Build = Callable[..., Path]


@dataclass
class Numbered:
    """Every voxel of the foreground is a region of its own; fails at the case ``fails``, and notes what it is asked."""

    fails: str = ""
    step: int = 1

    def __post_init__(self) -> None:
        self.asked: list[str] = []

    def identity(self) -> dict[str, Any]:
        return {"step": self.step}

    def __call__(self, case: RegionCase) -> NDArray[Any]:
        self.asked.append(case.key)
        if case.key == self.fails:
            raise ValueError(f"case {case.key}: out of order")
        numbers = 1 + np.arange(case.foreground.size, dtype=np.int64).reshape(case.foreground.shape) // self.step
        return np.where(case.foreground, numbers, 0)


def copy(cache: Path, out: Path, source: Any | None = None, **settings: Any) -> Path:
    list(write_regions(cache, out, source or Numbered(), **settings))
    return out


@pytest.fixture(scope="module")
def numbered(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy(tiny_cache, tmp_path_factory.mktemp("regions") / "numbered.h5")


@dataclass
class Mirrored(Numbered):
    """The same numbers in the opposite order of voxels."""

    def __call__(self, case: RegionCase) -> NDArray[Any]:
        found = super().__call__(case)
        return np.where(case.foreground, found[case.foreground].max() + found[case.foreground].min() - found, 0)


def test_load_state_dict__refuses_other_maps_of_as_many_regions(
    tiny_cache: Path, numbered: Path, tmp_path: Path
) -> None:
    other = copy(tiny_cache, tmp_path / "mirrored.h5", Mirrored())
    first, second = (
        PretrainDataModule(str(path), (16, 16, 16), 2, num_workers=0, regions=True) for path in (numbered, other)
    )
    for data in (first, second):
        data.setup("fit")
    maps = [case.num_regions for case in VolumeCache(numbered).cases]
    assert maps == [case.num_regions for case in VolumeCache(other).cases]
    first.load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="regions was .*, is "):
        second.load_state_dict(first.state_dict())


def test_write_regions__copies_all_else_and_adds_the_maps(tiny_cache: Path, numbered: Path) -> None:
    old, new = VolumeCache(tiny_cache), VolumeCache(numbered)
    assert new.salt_fingerprint == old.salt_fingerprint and new.class_names == old.class_names
    for row, (before, after) in enumerate(zip(old.cases, new.cases, strict=True)):
        assert replace(after, num_regions=None, regions_sha256=None) == before and before.num_regions is None
        for what in ("image", "foreground", "label"):
            assert np.array_equal(old.read_whole(row, what), new.read_whole(row, what))
        assert np.array_equal(old.foreground_chunks(row), new.foreground_chunks(row))
        regions = new.read_whole(row, "regions")
        assert regions.shape == before.shape and regions.max() == after.num_regions
        assert after.regions_sha256 == hashlib.sha256(regions.tobytes()).hexdigest()
        assert np.array_equal(regions != 0, new.read_whole(row, "foreground") != 0)
        outside = new.read(row, (-5, 2, 3), (10, 4, 5), "regions")
        assert not outside[:5].any() and np.array_equal(outside[5:], regions[:5, 2:6, 3:8])
    with h5py.File(numbered, "r", locking=False) as file:  # read as fast as the image is
        assert all("regions_extents" in group for group in file["cases"].values())


@pytest.mark.parametrize("highest", [0, 1, 255, 256, 32767, 32768, 2**31 - 1])
def test_checked__takes_the_smallest_type(highest: int) -> None:
    regions = checked(np.full((1, 2, 3), highest, dtype=np.int64), (1, 2, 3), "a")
    assert int(regions.max()) == highest
    smaller = DTYPES[: [np.dtype(dtype) for dtype in DTYPES].index(regions.dtype)]
    assert all(np.iinfo(dtype).max < highest for dtype in smaller)


@pytest.mark.parametrize(
    ("regions", "words"),
    [
        (np.zeros((2, 2, 2), np.float32), "float32"),
        (np.zeros((2, 2), np.int32), "integers"),
        (np.full((2, 2, 2), -1), "numbered -1 to -1"),
        (np.full((2, 2, 2), 2**31), "numbered"),
    ],
)
def test_checked__refuses_what_is_no_map(regions: NDArray[Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"case a.*{words}"):
        checked(regions, (2, 2, 2), "a")


@pytest.mark.parametrize("shard_bytes", [None, 120_000])
def test_write_regions__interrupted_goes_on_to_the_same_bytes(
    tiny_cache: Path, tmp_path: Path, shard_bytes: int | None
) -> None:
    keys = [info.key for info in VolumeCache(tiny_cache).cases]
    undisturbed = copy(tiny_cache, tmp_path / "undisturbed.h5", shard_bytes=shard_bytes)
    out = tmp_path / "out.h5"
    broken = Numbered(fails=keys[5])
    with pytest.raises(ValueError, match=f"case {keys[5]}: out of order"):
        copy(tiny_cache, out, broken, shard_bytes=shard_bytes)
    assert broken.asked == keys[:6] and not out.exists()
    again = Numbered()
    copy(tiny_cache, out, again, shard_bytes=shard_bytes)
    assert again.asked == keys[5:]
    assert _bytes(out) == _bytes(undisturbed) and not build_path(out).exists()
    if shard_bytes is not None:
        assert len(VolumeCache(out).files) > 1
    with pytest.raises(ValueError, match="exists; choose another name or pass --overwrite"):
        copy(tiny_cache, out, shard_bytes=shard_bytes)


def test_write_regions__other_settings_are_not_mixed_with_what_was_left(tiny_cache: Path, tmp_path: Path) -> None:
    keys = [info.key for info in VolumeCache(tiny_cache).cases]
    out = tmp_path / "out.h5"
    with pytest.raises(ValueError, match="out of order"):
        copy(tiny_cache, out, Numbered(fails=keys[5]))
    source = Numbered(step=7)
    copy(tiny_cache, out, source)
    assert source.asked == keys
    undisturbed = copy(tiny_cache, tmp_path / "undisturbed.h5", Numbered(step=7))
    assert out.read_bytes() == undisturbed.read_bytes()


def test_write_regions__replaces_the_maps_of_a_cache_that_has_some(numbered: Path, tmp_path: Path) -> None:
    again = VolumeCache(copy(numbered, tmp_path / "again.h5", Numbered(step=7)))
    for row, info in enumerate(again.cases):
        assert info.num_regions == again.read_whole(row, "regions").max() <= 1 + np.prod(info.shape) // 7


def test_write_regions__keeps_voxels_stored_as_they_are(make_cache: Build, tmp_path: Path) -> None:
    plain = VolumeCache(copy(make_cache(tmp_path / "plain.h5", 3, layout="contiguous"), tmp_path / "out.h5"))
    assert plain.read_whole(0, "regions").max() == plain.cases[0].num_regions
    with h5py.File(plain.path, "r", locking=False) as file:
        assert all(file[f"cases/{info.key}/regions"].chunks is None for info in plain.cases)


def test_write_regions__refuses_the_cache_itself_and_a_damaged_one(
    tiny_cache: Path, spoil_cache: Callable[[Path, list[str], Path], Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="is the cache itself"):
        copy(tiny_cache, tiny_cache, overwrite=True)
    key = VolumeCache(tiny_cache).cases[2].key
    spoilt = spoil_cache(tiny_cache, [key], tmp_path / "spoilt.h5")
    with pytest.raises(ValueError, match=f"cannot read image of case {key}"):
        copy(spoilt, tmp_path / "out.h5")
    assert not (tmp_path / "out.h5").exists()


@pytest.mark.slow
def test_write_regions__killed_at_any_moment_goes_on_to_the_same_bytes(tiny_cache: Path, tmp_path: Path) -> None:
    undisturbed = copy(tiny_cache, tmp_path / "undisturbed.h5")
    out = tmp_path / "out.h5"
    command = f"""
        import sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import test_regions
        for part in test_regions.write_regions({str(tiny_cache)!r}, {str(out)!r}, test_regions.Numbered()):
            print(part.info.key, flush=True)
            time.sleep(0.05)
    """
    for lines in (1, 2, 3):
        run = subprocess.Popen([sys.executable, "-c", textwrap.dedent(command)], stdout=subprocess.PIPE, text=True)
        assert run.stdout is not None
        for _ in range(lines):
            assert run.stdout.readline()
        time.sleep(0.01 * lines)
        run.kill()
        run.wait()
        assert not out.exists() and build_path(out).is_dir()
    copy(tiny_cache, out)
    assert out.read_bytes() == undisturbed.read_bytes()


# ------------------------------------------------------------------------------------------------ batches and views


def batches(cache: Path, parent_vox: tuple[int, ...], count: int, **settings: Any) -> list[dict[str, Any]]:
    data = PretrainDataModule(str(cache), parent_vox, 4, num_workers=0, regions=True, **settings)
    data.setup("validate")
    return list(islice(iter(data.train_dataloader()), count))


@pytest.mark.parametrize("parent_vox", [(32, 40, 32), (32, 70, 44)])
def test_parents__regions_are_cut_where_the_image_is(numbered: Path, parent_vox: tuple[int, int, int]) -> None:
    """Numbers tell where in the case a voxel lies: there the image and the foreground are those of the batch."""
    cache = VolumeCache(numbered)
    train = cache.select("train")
    for batch in batches(numbered, parent_vox, 4):
        regions = batch["regions"]
        assert regions.shape == (4, 1, *parent_vox) and regions.dtype == torch.int32
        for b in range(4):
            row = train[int(batch["case"][b])]
            image, found = cache.read_whole(row)[0], regions[b, 0].numpy()
            assert np.array_equal(found != 0, batch["foreground"][b, 0].numpy() != 0) and found.any()
            places = np.unravel_index(found[found != 0] - 1, image.shape)
            assert np.array_equal(image[places], batch["image"][b, 0].numpy()[found != 0])


def test_parents__frames_have_regions_of_one_frame(frames_cache: Path, tmp_path: Path) -> None:
    cache = copy(frames_cache, tmp_path / "us.h5", Numbered(step=50))
    for batch in batches(cache, (96, 128), 3):
        assert batch["regions"].shape == (4, 1, 96, 128)
        assert torch.equal(batch["regions"] != 0, batch["foreground"] != 0)


def test_setup__a_cache_without_maps_is_refused(tiny_cache: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.regions is true.*has no region map.*agssd regions"):
        PretrainDataModule(str(tiny_cache), (32, 40, 32), 4, regions=True).setup("validate")


@pytest.mark.parametrize(
    "settings", [{"orientations": "none"}, {"orientations": "all"}, {"orientations": "flips", "rotation_deg": 20.0}]
)
@pytest.mark.parametrize("dims", [2, 3])
def test_make_views__numbers_are_of_the_nearest_voxel(
    numbered: Path, frames_cache: Path, tmp_path: Path, dims: int, settings: dict[str, Any]
) -> None:
    """Each axis of space as an image, cut by interpolation, is at most half a voxel from where the number points."""
    parent = (40, 40, 40) if dims == 3 else (96, 96)
    crops = OverlapCrops(
        (24,) * dims, (0.6, 1.0), num_local=0, local_size_vox=(8,) * dims, prob_flip=(0.5,) * dims, **settings
    )
    (batch,) = batches(numbered if dims == 3 else copy(frames_cache, tmp_path / "us.h5"), parent, 1)
    places = torch.stack(torch.meshgrid(*(torch.arange(n) for n in parent), indexing="ij"))
    batch |= {
        "regions": torch.arange(places[0].numel(), dtype=torch.int32).view(1, 1, *parent).expand(4, -1, *[-1] * dims),
        "image": places.expand(4, *[-1] * (dims + 1)).to(torch.int16),
        "is_ct": torch.zeros(4, dtype=torch.bool),
    }
    for name, value in (("scale", 1.0), ("offset", 0.0), ("low", 0.0), ("high", 100.0), ("edge_q99", 1.0)):
        batch[name] = torch.full((4, dims), value)
    views = make_views(batch, crops, None, 0)
    assert views.regions is not None and views.regions.dtype == torch.int32
    assert views.regions.shape == (4, 2, 1, *[24] * dims)
    at = (views.clean + 1) * 50  # voxels
    inside = ((at > 0.5) & (at < parent[0] - 1.5)).all(2)
    pointed = torch.stack(torch.unravel_index(views.regions[:, :, 0].long(), parent), 2)
    assert inside.float().mean() > 0.7
    assert ((at - pointed).abs().amax(2)[inside] < 0.51).all()
    for b in range(4):
        one = make_views({name: value[b : b + 1] for name, value in batch.items()}, crops, None, 0)
        assert torch.equal(one.regions[0], views.regions[b])


def test_make_views__without_maps_there_are_none(numbered: Path) -> None:
    (batch,) = batches(numbered, (32, 40, 32), 1)
    del batch["regions"]
    assert make_views(batch, OverlapCrops((24, 24, 24), num_local=0), None, 0).regions is None


def _bytes(path: Path) -> list[bytes]:
    return [path.read_bytes()] if path.is_file() else [file.read_bytes() for file in sorted(path.iterdir())]
