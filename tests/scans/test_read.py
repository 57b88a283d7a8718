"""Reading one file: what is taken, and a reason of its own for all that is not."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from agssd.scans.case import RefusedError
from agssd.scans.preparing.angles import shear_degrees
from agssd.scans.read import canonical_geometry, looks_like_labels, read_scan

AFFINE = np.diag([2.0, 1.5, 3.0, 1.0])


def _values(shape: tuple[int, ...] = (8, 9, 10), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(100, 30, shape).astype(np.float32)


def _save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE, **header: Any) -> Path:
    image = nib.Nifti1Image(array, affine)
    for name, value in header.items():
        image.header[name] = value
    nib.save(image, path)
    return path


def _reason(path: Path) -> str:
    with pytest.raises(RefusedError) as caught:
        read_scan(path)
    return str(caught.value)


def test_read_scan__nifti_nrrd_and_metaimage_agree_in_the_world(tmp_path: Path) -> None:
    array = _values()
    affine = AFFINE.copy()
    affine[:3, 3] = (-11, 5, 70)
    image = sitk.GetImageFromArray(array.transpose())
    image.SetSpacing((2.0, 1.5, 3.0))
    image.SetOrigin((11, -5, 70))  # LPS
    image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
    paths = [_save(tmp_path / "a.nii.gz", array, affine), _save(tmp_path / "a.nii", array, affine)]
    for name in ("a.nrrd", "a.nhdr", "a.mha", "a.mhd"):
        sitk.WriteImage(image, str(tmp_path / name))
        paths.append(tmp_path / name)
    nib.save(nib.Nifti1Pair(array, affine), tmp_path / "p.img")
    paths.append(tmp_path / "p.img")
    nib.save(nib.Nifti2Image(array, affine), tmp_path / "two.nii")
    paths.append(tmp_path / "two.nii")
    for path in paths:
        scan = read_scan(path)
        assert np.array_equal(scan.array, array), path
        assert np.allclose(scan.affine, affine, atol=1e-5), path
        assert len(scan.sha256) == 64


def test_read_scan__slope_and_big_endian_are_applied(tmp_path: Path) -> None:
    stored = np.random.default_rng(0).integers(0, 200, (6, 7, 8)).astype(">i2")
    image = nib.Nifti1Image(stored, AFFINE, nib.Nifti1Header(endianness=">"))
    image.header.set_slope_inter(2.0, -1024.0)
    nib.save(image, tmp_path / "a.nii.gz")
    raw = nib.load(tmp_path / "a.nii.gz")
    assert np.allclose(read_scan(tmp_path / "a.nii.gz").array, np.asarray(raw.dataobj))
    assert read_scan(tmp_path / "a.nii.gz").array.min() < 0


def test_read_scan__further_axes_of_length_one_are_dropped(tmp_path: Path) -> None:
    assert read_scan(_save(tmp_path / "a.nii", _values((8, 9, 10, 1)))).array.shape == (8, 9, 10)


def test_read_scan__sform_wins_and_the_conflict_is_said(tmp_path: Path) -> None:
    image = nib.Nifti1Image(_values(), AFFINE)
    other = AFFINE.copy()
    other[:3, 3] = 40
    image.set_sform(AFFINE, 2)
    image.set_qform(other, 1)
    nib.save(image, tmp_path / "a.nii")
    scan = read_scan(tmp_path / "a.nii")
    assert np.allclose(scan.affine, AFFINE)
    assert scan.notes == ("sform and qform disagree by up to 40.0 mm; the sform is used",)
    image.set_sform(None, 0)
    nib.save(image, tmp_path / "b.nii")
    assert np.allclose(read_scan(tmp_path / "b.nii").affine, other)


def test_read_scan__units_of_length_become_millimetres(tmp_path: Path) -> None:
    image = nib.Nifti1Image(_values(), np.diag([0.002, 0.0015, 0.003, 1.0]))
    image.header.set_xyzt_units("meter")
    nib.save(image, tmp_path / "a.nii")
    scan = read_scan(tmp_path / "a.nii")
    assert np.allclose(scan.affine, AFFINE, atol=1e-6)
    assert "converted to mm" in scan.notes[0]


def test_read_scan__no_orientation_is_said(tmp_path: Path) -> None:
    image = nib.Nifti1Image(_values(), None)
    image.set_sform(None, 0)
    image.set_qform(None, 0)
    nib.save(image, tmp_path / "a.nii")
    assert "no orientation" in read_scan(tmp_path / "a.nii").notes[0]


def test_read_scan__one_volume_of_several(tmp_path: Path) -> None:
    array = _values((8, 9, 10, 3))
    image = sitk.JoinSeries([sitk.GetImageFromArray(array[..., row].transpose()) for row in range(3)])
    sitk.WriteImage(image, str(tmp_path / "a.mha"))
    paths = [
        _save(tmp_path / "a.nii.gz", array),
        _save(tmp_path / "b.nii", array[..., None, :, None]),
        tmp_path / "a.mha",
    ]
    for path in paths[::2]:
        scans = [read_scan(path, volume) for volume in range(3)]
        for row, scan in enumerate(scans):
            assert np.array_equal(scan.array, array[..., row])
            assert scan.notes[0] == f"one of several volumes is taken: {row} of 3"
        assert len({scan.sha256 for scan in scans}) == 3
        with pytest.raises(RefusedError, match="--volume 3 is none of its 3 volumes"):
            read_scan(path, 3)
    assert "5D image (8x9x10x1x3)" in _reason(paths[1])
    whole = _save(tmp_path / "whole.nii", array[..., 0])
    assert read_scan(whole, 2).sha256 == read_scan(whole).sha256
    scaled = nib.Nifti1Image(np.arange(2 * 3 * 4 * 2, dtype=np.int16).reshape(2, 3, 4, 2), AFFINE)
    scaled.header.set_slope_inter(2.0, 5.0)
    nib.save(scaled, tmp_path / "scaled.nii")
    stored = np.asarray(nib.load(tmp_path / "scaled.nii").dataobj)
    assert np.allclose(read_scan(tmp_path / "scaled.nii", 1).array, stored[..., 1])


def _nan(path: Path) -> Path:
    array = _values()
    array[1, 2, 3] = np.nan
    array[4, 4, 4] = np.inf
    return _save(path, array)


def _cut(path: Path, share: float) -> Path:
    _save(path, _values((30, 30, 30)))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


def _flip_byte(path: Path) -> Path:
    """Damage the last bytes of the data, which only the checksum shows."""
    _save(path.with_suffix(""), _values())
    data = bytearray(gzip.compress(path.with_suffix("").read_bytes(), compresslevel=0))
    data[-20] ^= 0xFF
    path.write_bytes(data)
    return path


def _itk(path: Path, array: np.ndarray, vector: bool = False) -> Path:
    sitk.WriteImage(sitk.GetImageFromArray(array, isVector=vector), str(path))
    return path


def _affine(path: Path, change: tuple[int, int, float]) -> Path:
    affine = AFFINE.copy()
    affine[change[0], change[1]] = change[2]
    image = nib.Nifti1Image(_values(), AFFINE)
    for row, name in enumerate(("srow_x", "srow_y", "srow_z")):
        image.header[name] = affine[row]
    image.header["sform_code"] = 2
    path.write_bytes(image.header.binaryblock + b"\0" * 4 + _values().tobytes(order="F"))
    return path


def _write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


BAD = {
    "missing": (lambda d: d / "none.nii.gz", "cannot be opened: No such file"),
    "empty": (lambda d: _write(d / "a.nii.gz", b""), "empty file"),
    "text": (lambda d: _write(d / "a.nii", b"no image at all" * 100), "no NIfTI file"),
    "short header": (lambda d: _cut(d / "a.nii", 0.001), "cut off within its header"),
    "cut nii": (lambda d: _cut(d / "a.nii", 0.6), "truncated or damaged"),
    "cut gz": (lambda d: _cut(d / "a.nii.gz", 0.6), "truncated or damaged: Compressed file ended"),
    "bad checksum": (lambda d: _flip_byte(d / "a.nii.gz"), "truncated or damaged: CRC check failed"),
    "zeros": (lambda d: _save(d / "a.nii", np.zeros((8, 8, 8), np.float32)), "all voxels are 0"),
    "constant": (lambda d: _save(d / "a.nii", np.full((8, 8, 8), 7, np.int16)), "constant: all voxels are 7"),
    "nan": (lambda d: _nan(d / "a.nii"), "2 voxels are NaN or infinite"),
    "huge": (lambda d: _save(d / "a.nii", _values().astype(np.float64) * 1e40), "are no intensities"),
    "2D": (lambda d: _save(d / "a.nii", _values((8, 9))), "2D image (8x9)"),
    "slice": (lambda d: _save(d / "a.nii", _values((8, 9, 1))), "single slice (8x9x1)"),
    "4D": (lambda d: _save(d / "a.nii", _values((8, 9, 10, 3))), "4D image (8x9x10x3); --volume I"),
    "5D": (lambda d: _save(d / "a.nii", _values((8, 9, 10, 1, 3))), "5D image (8x9x10x1x3)"),
    "complex": (lambda d: _save(d / "a.nii", _values().astype(np.complex64)), "voxels of type complex64"),
    "colour": (
        lambda d: _save(d / "a.nii", np.zeros((8, 9, 10), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])),
        "a colour image",
    ),
    "sheared": (lambda d: _affine(d / "a.nii", (0, 1, 0.5)), "sheared affine: two axes are 18.4 degrees"),
    "degenerate": (lambda d: _affine(d / "a.nii", (2, 2, 0.0)), "its affine is degenerate"),
    "infinite affine": (lambda d: _affine(d / "a.nii", (0, 0, np.inf)), "NaN or infinite entries"),
    "tiny spacing": (lambda d: _affine(d / "a.nii", (0, 0, 1e-4)), "spacing of 0.0001 x 1.5 x 3 mm"),
    "vast spacing": (lambda d: _affine(d / "a.nii", (0, 0, 500.0)), "spacing of 500 x 1.5 x 3 mm"),
    "mha 2D": (lambda d: _itk(d / "a.mha", _values((8, 9))), "2D image (9x8)"),
    "nrrd colour": (lambda d: _itk(d / "a.nrrd", _values((4, 8, 9, 3)), True), "3 values per voxel"),
    "mha 4D": (lambda d: _itk(d / "a.mha", _values((3, 4, 8, 9))), "4D image (9x8x4x3); --volume I"),
    "nrrd text": (lambda d: _write(d / "a.nrrd", b"hello"), "truncated or damaged"),
    "mhd without data": (
        lambda d: (_itk(d / "a.mhd", _values()), (d / "a.raw").unlink())[0],
        "header names is missing",
    ),
    "img alone": (lambda d: _write(d / "a.img", b"0" * 5000), "an .img without its .hdr"),
    "dicom": (lambda d: _write(d / "a.dcm", b"\0" * 128 + b"DICM"), "DICOM file: no valid DICOM header"),
    "dicom without suffix": (
        lambda d: _write(d / "IM0001", b"\0" * 128 + b"DICM"),
        "DICOM file: no valid DICOM header",
    ),
    "folder": (lambda d: d, "a folder without DICOM files"),
    "mgz": (lambda d: _write(d / "a.mgz", b"1"), "FreeSurfer MGH is not read"),
    "png": (lambda d: _write(d / "a.png", b"1"), "files of type .png are not read"),
}


@pytest.mark.parametrize("kind", BAD)
def test_read_scan__refuses_with_its_own_reason(tmp_path: Path, kind: str) -> None:
    make, reason = BAD[kind]
    assert reason in _reason(make(tmp_path))


def test_read_scan__analyze_has_no_orientation(tmp_path: Path) -> None:
    nib.save(nib.AnalyzeImage(_values(), AFFINE), tmp_path / "a.img")
    assert "left and right are unknown" in _reason(tmp_path / "a.img")


def test_read_scan__frames_over_time_are_no_volume(tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(_values((5, 20, 20)))
    image.SetMetaData("Seq_Frame0000_ProbeToTrackerTransform", "1 0 0 0 0 1 0 0 0 0 1 0 0 0 0 1")
    sitk.WriteImage(image, str(tmp_path / "a.mha"))
    assert "third axis is time" in _reason(tmp_path / "a.mha")


def test_read_scan__truncated_metaimage_is_refused(tmp_path: Path) -> None:
    for compressed in (True, False):
        sitk.WriteImage(sitk.GetImageFromArray(_values((20, 20, 20))), str(tmp_path / "a.mha"), compressed)
        data = (tmp_path / "a.mha").read_bytes()
        (tmp_path / "a.mha").write_bytes(data[: len(data) // 2])
        assert "truncated or damaged" in _reason(tmp_path / "a.mha")


def test_canonical_geometry__flips_and_exchanges_agree(tmp_path: Path) -> None:
    image = nib.Nifti1Image(_values(), AFFINE)
    nib.save(image, tmp_path / "ras.nii")
    flipped = image.as_reoriented(np.array([[2, -1], [0, 1], [1, -1]]))
    nib.save(flipped, tmp_path / "other.nii")
    (shape, affine), (other_shape, other) = (canonical_geometry(tmp_path / name) for name in ("ras.nii", "other.nii"))
    assert shape == other_shape == (8, 9, 10)
    assert np.allclose(affine, other)


def test_looks_like_labels__pieces_not_grey_values() -> None:
    rng = np.random.default_rng(0)
    blocks = np.kron(rng.integers(0, 120, (5, 5, 5)), np.ones((6, 6, 6), dtype=np.int64))
    assert looks_like_labels(blocks.astype(np.uint8))
    assert looks_like_labels((blocks > 60).astype(np.float64))
    noisy = np.clip(rng.normal(100, 20, (30, 30, 30)), 0, 255).astype(np.uint8)
    assert not looks_like_labels(noisy)
    assert not looks_like_labels(blocks + 0.5)


def test_looks_like_labels__right_for_every_shared_scan(shared_data: Path) -> None:
    wrong = []
    for folder in ("mri_full", "ct_full", "odd", "ultrasound"):
        for line in (shared_data / folder / "MANIFEST.csv").read_text().splitlines()[1:]:
            name, kind = line.split(",")[:2]
            try:
                scan = read_scan(shared_data / folder / name)
            except RefusedError:
                continue
            if looks_like_labels(scan.array) != (kind == "label"):
                wrong.append(name)
    assert wrong == []


@pytest.mark.parametrize("seed", range(8))
def test_read_scan__shear_counts_by_what_it_moves(tmp_path: Path, seed: int) -> None:
    """Up to half a voxel the grid is taken as right-angled, every corner within that half; above it is refused."""
    rng = np.random.default_rng(seed)
    shape = rng.integers(12, 40, 3)
    spacing = rng.uniform(0.5, 3.0, 3)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    short, *others = np.argsort(shape * spacing)
    along = int(rng.choice(others))
    values = rng.normal(size=shape).astype("f4")
    corners = np.array([[i, j, k, 1] for i in (0, 1) for j in (0, 1) for k in (0, 1)]) * [*(shape - 1), 1]
    for moved in (0.005, 0.1, 0.4, 0.6):
        affine = np.eye(4)
        affine[:3, :3] = turn * spacing
        affine[:3, 3] = rng.normal(size=3) * 100
        drift_mm = (
            2 * moved * spacing[along] / (shape[short] - 1)
        )  # from voxel to voxel, of which half lies on each side
        affine[:3, short] += turn[:, along] * drift_mm
        image = nib.Nifti1Image(values, affine)
        image.set_qform(None, 0)
        nib.save(image, tmp_path / "a.nii")
        if moved > 0.5:
            with pytest.raises(RefusedError, match=r"sheared affine: .*, 0\.6 voxels at a corner; --unshear"):
                read_scan(tmp_path / "a.nii")
            assert np.allclose(read_scan(tmp_path / "a.nii", sheared=True).affine, affine, atol=1e-4)
            continue
        scan = read_scan(tmp_path / "a.nii")
        off = np.abs(corners @ (np.linalg.inv(affine) @ scan.affine).T - corners).max()
        if moved < 0.01:
            assert off < 1e-4 and scan.notes == ()
        else:
            assert abs(off - moved) < 0.05 and off <= 0.5 and shear_degrees(scan.affine) < 1e-5
            assert "taken as right-angled" in scan.notes[0]
