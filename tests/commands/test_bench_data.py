"""The comparison with other data engines: every rival does the same work."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agssd.commands import bench_data
from agssd.commands.bench_data.rival import HIGH_HU, LOW_HU, Sizes
from agssd.commands.bench_data.rivals import RIVALS
from agssd.commands.bench_data.volumes import cached_volumes, simulated_volumes, write_volumes

SHAPE = (60, 64, 72)
SLOPES_HU = (5.0, 7.0, 9.0)  # per voxel along D, H, W: a view of a ramp is a ramp, whatever cut it
SIZES = Sizes(view_vox=24, parent_vox=48)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """Two ramps; they differ by a constant."""
    place: Path = tmp_path_factory.mktemp("volumes")
    grid = np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij")
    ramp = sum(slope * axis for slope, axis in zip(SLOPES_HU, grid, strict=True)) - 900
    ones = np.ones(SHAPE, np.uint8)
    write_volumes(place, iter([(ramp.astype(np.int16), ones), ((ramp + 30).astype(np.int16), ones)]))
    return place


def opened(name: str, folder: Path) -> Any:
    kind = RIVALS[name]
    try:
        kind.load_libraries()
    except ModuleNotFoundError as error:
        pytest.skip(f"{error}; pip install 'agssd[bench]'")
    place = folder / name
    if not place.exists():
        place.mkdir()
        kind.prepare(folder, place)
    return kind(place, SIZES)


def slopes(ramp: np.ndarray) -> np.ndarray:
    """Return the slope along each axis inside, after checking that there is one only."""
    inner = ramp[2:-2, 2:-2, 2:-2]
    steps = [np.diff(inner, axis=axis) for axis in range(3)]
    for step in steps:
        assert np.ptp(step) < 1e-3 * np.abs(step).max() + 1e-6
    return np.array([step.mean() for step in steps])


@pytest.mark.parametrize("name", [name for name in RIVALS if name != "decoding alone"])
def test_rivals__views_are_ramps_of_the_right_sizes_both_ways(name: str, folder: Path) -> None:
    rival = opened(name, folder)
    work, per_call = rival.work["views"]
    assert per_call == 8
    per_voxel = np.array(SLOPES_HU) / (HIGH_HU - LOW_HU)
    if name.startswith(("MONAI", "TorchIO")):
        per_voxel = per_voxel[::-1]  # the axes of NIfTI
    ours = name.startswith("agssd")
    signs = []
    for _ in range(4):
        views = work()
        assert [tuple(view.shape) for view in views] == [(1, 24, 24, 24)] * 2 + [(1, 12, 12, 12)] * 6
        for view, (edge, low, high) in zip(views, SIZES.views(), strict=True):
            assert str(view.dtype) == "torch.float32" and 0 <= float(view.min()) < float(view.max()) <= 1
            found = slopes(np.asarray(view[0])) / per_voxel
            stretch = 1.25 if ours and edge == 24 else 1.06  # our global views are no cubes; others round to voxels
            assert (np.abs(found) > low / edge / stretch).all() and (np.abs(found) < high / edge * stretch).all()
            signs.append(np.sign(found))
    assert (0.2 < (np.array(signs) > 0).mean(0)).all() and ((np.array(signs) > 0).mean(0) < 0.8).all()


@pytest.mark.parametrize("name", [name for name in RIVALS if name != "decoding alone"])
def test_rivals__crops_are_boxes_of_the_volumes(name: str, folder: Path) -> None:
    rival = opened(name, folder)
    for kind, size in (("crop", 24), ("parent", 48)):
        if kind not in rival.work:
            continue
        crop = rival.work[kind][0]()
        crop = np.asarray(crop["image"] if isinstance(crop, dict) else crop).squeeze()
        assert crop.shape == (size,) * 3
        unit = 1.0 if crop.dtype == np.int16 else 1 / (HIGH_HU - LOW_HU)
        expected = np.array(SLOPES_HU)[::-1] if name.startswith(("MONAI", "TorchIO")) else np.array(SLOPES_HU)
        np.testing.assert_allclose(slopes(crop.astype(np.float64)), expected * unit, rtol=1e-3)


def test_decoding_alone__decodes_every_chunk_that_a_crop_meets(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numcodecs.blosc

    rival = opened("decoding alone", folder)
    lengths: list[int] = []
    monkeypatch.setattr(numcodecs.blosc, "decompress", lambda frame, _: lengths.append(len(frame)))
    rival.crop(60)
    assert len(lengths) == 2 * 2 * 3 and min(lengths) > 100  # of chunks of 32³
    assert list(rival.work) == ["crop"]


def test_volumes__simulated_ones_are_bodies_in_air_and_differ() -> None:
    (first, body), (second, _) = simulated_volumes((24, 40, 40), 2)
    assert first.dtype == np.int16 and first.shape == body.shape == (24, 40, 40)
    assert -40 < np.median(first[body == 1]) < 120 and np.median(first[body == 0]) == pytest.approx(-1000, abs=5)
    assert not np.array_equal(first, second)


def test_volumes__of_a_cache_are_its_ct_cases_in_hu(make_cache: Any, tmp_path: Path) -> None:
    path = make_cache(tmp_path / "ct.h5", num_cases=2, modality="ct")
    found = list(cached_volumes(path, 2))
    assert [image.shape for image, _ in found] == [(40, 56, 40)] * 2
    with pytest.raises(ValueError, match="has 2 CT cases"):
        list(cached_volumes(path, 3))


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench_data.add_arguments(parser)
    return parser.parse_args(words)


def test_run__refuses_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="--rivals has 'nothing'; choose from 'agssd, chunks'"):
        bench_data.run(arguments("--rivals", "nothing"))
    with pytest.raises(ValueError, match="--rounds is 0"):
        bench_data.run(arguments("--rounds", "0"))
    with pytest.raises(ValueError, match="smaller than --parent-vox 168"):
        bench_data.run(arguments("--shape", "40", "40", "40", "--volumes", "1"))


def test_start__leaves_out_what_is_not_installed_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str, folder: Path) -> None:
        raise ValueError(f"{name}: ModuleNotFoundError: No module named 'zarr'")

    monkeypatch.setattr(bench_data, "Worker", missing)
    workers, left_out = bench_data._start(tmp_path, ["zarr 3"])
    assert workers == {} and "pip install 'agssd[bench]'" in left_out["zarr 3"]
    assert "left out: zarr 3" in capsys.readouterr().out


def test_ratio__is_taken_within_rounds() -> None:
    ours, other = (
        bench_data.Row(name, "", 0, 0, {}, {"views": rounds})
        for name, rounds in (("a", [10.0, 40.0, 6.0]), ("b", [5.0, 10.0, 6.0]))
    )
    assert bench_data.ratio(ours, other, "views") == (2.0, 1.0, 4.0)


@pytest.mark.slow
def test_run__writes_the_table_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--shape", "60", "64", "72", "--volumes", "1", "--rounds", "2", "--seconds", "0.02", "--view-vox", "24"]
    words += ["--parent-vox", "48", "--out", str(tmp_path), "--rivals", "agssd, chunks", "decoding alone"]
    assert bench_data.run(arguments(*words)) == 0
    report = json.loads((tmp_path / "bench_data.json").read_text())
    ours, floor = report["rows"]
    assert set(ours["rates"]) == {"crop", "parent", "views"} and set(floor["rates"]) == {"crop"}
    assert all(len(rounds) == 2 and min(rounds) > 0 for rounds in ours["rounds"].values())
    assert ours["disk_mib"] > 0 and ours["memory_mib"] > 0
    printed = capsys.readouterr().out
    assert f"{ours['rates']['views']:.1f}" in printed and "decoding alone" in printed and report["machine"] in printed
