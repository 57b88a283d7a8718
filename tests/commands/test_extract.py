"""A case leaves the cache as it came: same voxels, same place, same values within the stated error."""

from __future__ import annotations

import argparse
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import map_coordinates

from agssd.commands import extract, prepare
from agssd.data_modules.cache import VolumeCache


def run(command: object, *arguments: object) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    code: int = command.run(parser.parse_args([str(a) for a in arguments]))
    return code


def scan(shape: tuple[int, int, int]) -> np.ndarray:
    """Return a head-like ball with structure that no flip leaves alone."""
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    inside = (grid**2).sum(0) < 0.8
    tissue = 400 + 300 * grid[0] + 150 * grid[1] + 70 * grid[2] + 100 * np.sin(9 * grid.sum(0))
    noise = np.random.default_rng(0).normal(0, 10, shape)
    return np.where(inside, tissue + noise, 0).astype(np.int16)


CODES = ["RAS", "LPS", "SAR", "AIL"]


@pytest.fixture(params=CODES)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return a folder with an image and its label, stored in one of several orientations at 2 mm."""
    image = nib.Nifti1Image(scan((30, 36, 28)), np.diag([2.0, 2, 2, 1]))
    label = nib.Nifti1Image((image.get_fdata() > 600).astype(np.uint8), image.affine)
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(request.param)
    )
    folder = tmp_path / "scans"
    folder.mkdir()
    nib.save(image.as_reoriented(turn), folder / "case.nii.gz")
    nib.save(label.as_reoriented(turn), folder / "case_seg.nii.gz")
    return folder


def cache_of(source: Path, *more: object) -> tuple[Path, str]:
    out = source.parent / "c.h5"
    assert run(prepare, source, "--out", out, "--labels", "*_seg.nii.gz", "--modality", "mri", *more) == 0
    return out, VolumeCache(out).cases[0].key


def test_extract__same_voxels_return_within_half_a_step(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache, key = cache_of(source, "--spacing-mm", 2)
    out = source.parent / "out" / "x.nii.gz"
    assert run(extract, cache, key[:6], "--out", out) == 0
    given, back = nib.load(source / "case.nii.gz"), nib.load(out)
    np.testing.assert_allclose(back.affine, given.affine, atol=1e-4)
    info = VolumeCache(cache).cases[0]
    values = given.get_fdata()
    kept = (values >= info.low[0]) & (values <= info.high[0])  # the percentiles to which MRI is clipped
    assert kept.sum() > 5000
    step = info.scale[0] / 2
    assert np.abs(back.get_fdata() - values)[kept].max() <= step + 1e-3
    said = capsys.readouterr().out
    assert f"within {step:.3g} of the source" in said and "interpolated" not in said


def test_extract__label_is_exact_and_foreground_is_binary(source: Path) -> None:
    cache, key = cache_of(source, "--spacing-mm", 2)
    for what in ("label", "foreground"):
        assert run(extract, cache, key, "--what", what, "--out", source.parent / f"{what}.nii.gz") == 0
    given, back = nib.load(source / "case_seg.nii.gz"), nib.load(source.parent / "label.nii.gz")
    np.testing.assert_allclose(back.affine, given.affine, atol=1e-4)
    assert np.array_equal(back.get_fdata(), given.get_fdata())
    assert set(np.unique(nib.load(source.parent / "foreground.nii.gz").get_fdata())) <= {0.0, 1.0}


def test_extract__other_spacing_returns_to_the_sources_grid_or_stays(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, key = cache_of(source, "--spacing-mm", 3)
    out, own = source.parent / "x.nii.gz", source.parent / "own.nii.gz"
    assert run(extract, cache, key, "--out", out) == 0
    assert "interpolated from the cache" in capsys.readouterr().out
    given, back = nib.load(source / "case.nii.gz"), nib.load(out)
    assert back.shape == given.shape
    np.testing.assert_allclose(back.affine, given.affine, atol=1e-4)
    assert run(extract, cache, key, "--out", own, "--cached-grid") == 0
    stored = nib.load(own)
    points = np.random.default_rng(1).integers(4, np.array(given.shape) - 4, (500, 3))
    world = nib.affines.apply_affine(given.affine, points)
    at = nib.affines.apply_affine(np.linalg.inv(stored.affine), world)
    wanted = map_coordinates(stored.get_fdata(), at.T, order=1)
    np.testing.assert_allclose(back.get_fdata()[tuple(points.T)], wanted, atol=0.05)
    assert nib.load(own).shape == VolumeCache(cache).cases[0].shape
    assert np.allclose(nib.affines.voxel_sizes(nib.load(own).affine), 3, atol=1e-3)


def test_extract__refuses_in_one_line_and_writes_nothing(
    tiny_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = VolumeCache(tiny_cache).cases[0].key
    taken = tmp_path / "taken.nii.gz"
    taken.write_text("x")
    for arguments, message in (
        ((tiny_cache, "nothing", "--out", tmp_path / "x.nii.gz"), "no case whose key begins with 'nothing'"),
        ((tiny_cache, "", "--out", tmp_path / "x.nii.gz"), "agssd inspect"),
        ((tiny_cache, key, "--out", tmp_path / "x.mha"), "must end in .nii.gz"),
        ((tiny_cache, key, "--out", taken), "--overwrite"),
        ((tmp_path / "none.h5", key, "--out", tmp_path / "x.nii.gz"), "does not exist"),
    ):
        assert run(extract, *arguments) == 1
        assert message in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["taken.nii.gz"] and taken.read_text() == "x"
