"""From DICOM slices to a volume: values, place, order, and a reason where the slices are no volume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk

from agssd.scans.case import RefusedError
from agssd.scans.preparing.angles import shear_degrees
from agssd.scans.preparing.volumes import Recipe, prepare_case
from agssd.scans.read import Scan, canonical_geometry, read_scan

ORIENTATIONS = {
    "axial": (1, 0, 0, 0, 1, 0),
    "axial, feet first prone": (-1, 0, 0, 0, -1, 0),
    "axial, mirrored order": (-1, 0, 0, 0, 1, 0),
    "coronal": (1, 0, 0, 0, 0, -1),
    "sagittal": (0, 1, 0, 0, 0, -1),
    "oblique": (0.8, 0.6, 0, -0.48, 0.64, -0.6),
}


def _reason(folder: Path, volume: int | None = None) -> str:
    with pytest.raises(RefusedError) as caught:
        read_scan(folder, volume)
    return str(caught.value)


def _lps(affine: np.ndarray, index: tuple[float, ...]) -> np.ndarray:
    return (affine @ [*index, 1.0])[:3] * (-1, -1, 1)


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_read_scan__every_voxel_at_its_place_and_in_hu(tmp_path: Path, dicom: Any, name: str) -> None:
    stored = dicom.stored((5, 12, 10))
    slices = dicom.series_of(stored, orientation=ORIENTATIONS[name])
    dicom.save(tmp_path, slices)
    scan = read_scan(tmp_path)
    assert scan.modality == "ct" and scan.array.shape == (10, 12, 5)
    assert np.array_equal(scan.array, stored.transpose(2, 1, 0).astype(np.float32) - 1024)
    rng = np.random.default_rng(0)
    for _ in range(10):  # the equation of the standard, C.7.6.2.1.1
        i, j, k = (int(rng.integers(n)) for n in scan.array.shape)
        data = slices[k]
        row, column = np.reshape(ORIENTATIONS[name], (2, 3))
        place = np.array(data.ImagePositionPatient) + row * i * data.PixelSpacing[1] + column * j * data.PixelSpacing[0]
        assert np.allclose(_lps(scan.affine, (i, j, k)), place, atol=1e-4)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path)))
    image = reader.Execute()
    for index in np.ndindex(2, 2, 2):
        at = [int(v) for v in np.array(index) * (np.array(scan.array.shape) - 1)]
        back = np.linalg.solve(scan.affine, [*(np.array(image.TransformIndexToPhysicalPoint(at)) * (-1, -1, 1)), 1])
        i, j, k = np.round(back[:3]).astype(int)
        assert np.abs(back[:3] - (i, j, k)).max() < 1e-3
        assert scan.array[i, j, k] == image[at]
    shape, affine = canonical_geometry(tmp_path)
    assert sorted(shape) == [5, 10, 12] and np.linalg.det(affine[:3, :3]) != 0


def test_prepare_case__left_stays_left(tmp_path: Path, dicom: Any) -> None:
    """A bright block in the patient's left, anterior, lower corner comes out there, whatever the slices' direction."""
    for name, orientation in ORIENTATIONS.items():
        normal = np.cross(orientation[:3], orientation[3:])
        axes = np.stack([orientation[:3], orientation[3:], normal], axis=1)
        index = np.stack(np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in (14, 14, 14)), indexing="ij"), -1)
        place = index @ axes.T  # (i, j, k, xyz) mm, LPS
        bright = (place[..., 0] > 1) & (place[..., 1] < -1) & (place[..., 2] < -1)
        noise = np.random.default_rng(0).integers(0, 50, bright.shape)
        stored = (noise + 1000 * bright).transpose(2, 1, 0).astype("u2")
        corner = axes @ np.full(3, -6.5)
        slices = dicom.series_of(
            stored, "CT", position=tuple(corner), orientation=orientation, spacing_mm=(1.0, 1.0, 1.0)
        )
        folder = tmp_path / name
        dicom.save(folder, slices)
        case = prepare_case([folder])
        at = np.argwhere(case.image[0] > -500).mean(axis=0)  # d, h, w
        world = (case.affine @ [*at, 1.0])[:3]
        expected = place[bright].mean(axis=0) * (-1, -1, 1)
        assert np.abs(world - expected).max() < 0.5
        assert world[0] < 0 < world[1] and world[2] < 0  # left, anterior, lower in RAS
        half = [n // 2 for n in case.image.shape[1:]]
        assert at[0] < half[0] and at[1] > half[1] and at[2] < half[2]


def test_read_scan__enhanced_multi_frame(tmp_path: Path, dicom: Any) -> None:
    stored = dicom.stored((6, 9, 8))
    dicom.save(tmp_path / "ct", [dicom.enhanced_of(stored)])
    scan = read_scan(tmp_path / "ct")
    assert np.array_equal(scan.array, stored[::-1].transpose(2, 1, 0) * 2.0 - 1024)
    assert np.allclose(scan.affine, [[-2, 0, 0, 30], [0, -1.5, 0, 40], [0, 0, 3, 50], [0, 0, 0, 1]])
    dicom.save(tmp_path / "mr", [dicom.enhanced_of(stored, "MR", temporal=2)])
    assert "2 volumes in one series (temporal positions: 1, 2); --volume I" in _reason(tmp_path / "mr")
    scan = read_scan(tmp_path / "mr", volume=1)
    assert np.array_equal(scan.array, stored[1::2][::-1].transpose(2, 1, 0) * 2.0 - 1024)
    assert scan.affine[2, 3] == 50 and scan.affine[2, 2] == 3


def test_read_scan__names_and_order_do_not_matter_to_the_hash(tmp_path: Path, dicom: Any) -> None:
    slices = dicom.series_of(dicom.stored())
    dicom.save(tmp_path / "a", slices)
    dicom.save(tmp_path / "b", slices, "other{}.dcm", seed=5)
    one, two = (read_scan(tmp_path / name) for name in "ab")
    assert one.sha256 == two.sha256 and np.array_equal(one.array, two.array)
    slices[2].PixelData = bytes([slices[2].PixelData[0] ^ 1]) + slices[2].PixelData[1:]
    dicom.save(tmp_path / "c", slices)
    assert read_scan(tmp_path / "c").sha256 != one.sha256


def _transcode(path: Path, syntax: str) -> None:
    import gdcm

    reader = gdcm.ImageReader()
    reader.SetFileName(str(path))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, syntax)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFileName(str(path))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()


@pytest.mark.parametrize(
    ("syntax", "uid"),
    [
        ("JPEGLosslessProcess14_1", "1.2.840.10008.1.2.4.70"),
        ("JPEGLosslessProcess14", "1.2.840.10008.1.2.4.57"),
        ("JPEGLSLossless", "1.2.840.10008.1.2.4.80"),
        ("JPEG2000Lossless", "1.2.840.10008.1.2.4.90"),
        ("RLELossless", "1.2.840.10008.1.2.5"),
        ("DeflatedExplicitVRLittleEndian", "1.2.840.10008.1.2.1.99"),
        ("ImplicitVRLittleEndian", "1.2.840.10008.1.2"),
        ("ExplicitVRBigEndian", "1.2.840.10008.1.2.2"),
    ],
)
@pytest.mark.parametrize("kind", ["u2", "i2"])
def test_read_scan__every_lossless_transfer_syntax_gives_the_same_values(
    tmp_path: Path, dicom: Any, syntax: str, uid: str, kind: str
) -> None:
    stored = dicom.stored((3, 16, 12), kind=kind)
    if kind == "i2":
        stored -= 900
    slices = dicom.series_of(stored, RescaleIntercept=-1024 if kind == "u2" else 0)
    dicom.save(tmp_path / "plain", slices)
    expected = read_scan(tmp_path / "plain").array
    for path in dicom.save(tmp_path / "other", slices):
        if syntax.startswith("JPEG"):
            _transcode(path, syntax)
        else:
            data = pydicom.dcmread(path)
            if syntax == "RLELossless":
                data.compress(uid)
            elif syntax == "ExplicitVRBigEndian":
                data.PixelData = data.pixel_array.byteswap().tobytes()
            data.file_meta.TransferSyntaxUID = uid
            pydicom.dcmwrite(path, data, **({} if syntax != "ExplicitVRBigEndian" else {"little_endian": False}))
        assert pydicom.dcmread(path, stop_before_pixels=True).file_meta.TransferSyntaxUID == uid
    assert np.array_equal(read_scan(tmp_path / "other").array, expected)
    assert (expected.min() < -800) and expected.max() > 1000


def test_read_scan__a_file_without_preamble_and_meta(tmp_path: Path, dicom: Any) -> None:
    stored = dicom.stored((3, 8, 8))
    for row, data in enumerate(dicom.series_of(stored)):
        for implicit, name in ((True, "implicit"), (False, "explicit")):
            (tmp_path / name).mkdir(exist_ok=True)
            bare = pydicom.Dataset()
            bare.update(data)
            bare.save_as(tmp_path / name / f"IM{row}", implicit_vr=implicit, little_endian=True)
            assert (tmp_path / name / f"IM{row}").read_bytes()[:2] == b"\x08\0"
    for name in ("implicit", "explicit"):
        assert np.array_equal(read_scan(tmp_path / name).array, stored.transpose(2, 1, 0) - 1024.0)


def test_read_scan__padding_is_air(tmp_path: Path, dicom: Any) -> None:
    stored = dicom.stored((3, 8, 8), kind="i2")
    stored[:, :2] = -2000
    slices = dicom.series_of(stored, PixelPaddingValue=63536)  # -2000, written unsigned, as some scanners do
    for data in slices:
        data["PixelPaddingValue"].VR = "US"
    dicom.save(tmp_path / "a", slices)
    array = read_scan(tmp_path / "a").array
    assert (array[:, :2] == -1024).all() and np.array_equal(array[:, 2:], stored.transpose(2, 1, 0)[:, 2:] - 1024.0)
    limits = dicom.series_of(stored + 5000, PixelPaddingValue=0, PixelPaddingRangeLimit=3500, RescaleIntercept=-6024)
    dicom.save(tmp_path / "b", limits)
    assert np.array_equal(read_scan(tmp_path / "b").array, array)
    tissue = dicom.series_of(dicom.stored((3, 8, 8)), PixelPaddingValue=1024)
    dicom.save(tmp_path / "c", tissue)
    scan = read_scan(tmp_path / "c")
    assert "PixelPaddingValue means 0 HU" in scan.notes[0]
    assert np.array_equal(scan.array, dicom.stored((3, 8, 8)).transpose(2, 1, 0) - 1024.0)


def test_prepare_case__padding_does_not_darken_its_neighbours(tmp_path: Path, dicom: Any) -> None:
    stored = np.full((8, 16, 16), 1064, "i2") + np.random.default_rng(0).integers(0, 9, (8, 16, 16)).astype("i2")
    stored[:, :, :8] = -2000  # -3024 HU, and no PixelPaddingValue that says so
    dicom.save(tmp_path, dicom.series_of(stored, spacing_mm=(1.0, 1.0, 1.0)))
    seen: list[Scan] = []
    image = prepare_case([tmp_path], recipe=Recipe(spacing_mm=(0.75, 0.75, 0.75)), seen=seen).image
    assert seen[0].array.min() == -3024
    between = image[(image > -1000) & (image < 30)]
    assert between.size and between.min() > -1024
    half = image[image < -400].size / image.size
    assert abs(half - 0.5) < 0.04  # -3024 mixed in would move the border by a third of a voxel


def test_read_scan__slopes_by_slice_and_none(tmp_path: Path, dicom: Any, change: Callable[..., Any]) -> None:
    stored = dicom.stored((3, 8, 8))
    dicom.save(tmp_path / "a", change(dicom.series_of(stored, "MR"), [1], "RescaleSlope", 2.5))
    expected = stored.transpose(2, 1, 0) * np.array([1, 2.5, 1])
    assert np.allclose(read_scan(tmp_path / "a").array, expected)
    slices = dicom.series_of(stored)
    for data in slices:
        del data.RescaleSlope, data.RescaleIntercept
    dicom.save(tmp_path / "b", slices)
    assert "CT without RescaleSlope" in _reason(tmp_path / "b")


def test_read_scan__positions_rounded_to_a_tenth_are_one_grid(tmp_path: Path, dicom: Any) -> None:
    slices = dicom.series_of(dicom.stored((33, 4, 4)), spacing_mm=(1.0, 1.0, 0.625))
    for row, data in enumerate(slices):
        data.ImagePositionPatient = [-30, -40, round(50 + 0.625 * row, 1)]
    dicom.save(tmp_path, slices)
    assert np.allclose(read_scan(tmp_path).affine[:3, 2], [0, 0, 0.625])


def _move(row: int, *mm: float) -> Callable[[list[Any]], None]:
    def move(slices: list[Any]) -> None:
        data = slices[row]
        data.ImagePositionPatient = [float(a) + b for a, b in zip(data.ImagePositionPatient, mm, strict=True)]

    return move


def _cut_pixels(slices: list[Any]) -> None:
    slices[1].PixelData = slices[1].PixelData[:-40]


def _spoil(slices: list[Any]) -> None:
    for data in slices:
        data.compress("1.2.840.10008.1.2.5")
    slices[1].PixelData = pydicom.encaps.encapsulate([b"\xff" * 40])


def _late(slices: list[Any]) -> None:
    for row, data in enumerate(slices[3:]):
        data.ImagePositionPatient = [-30, -40, 59 + 4.5 * row]


GEOMETRY: dict[str, tuple[Callable[[list[Any]], Any], str]] = {
    "missing": (
        lambda s: s.pop(2),
        "missing slices: a gap of 6.00 mm after slice 2 of 7, where others are 3.00 mm apart",
    ),
    "missing twice": (
        lambda s: (s.pop(2), s.pop(4), s.pop(4)),
        "missing slices: a gap of 6.00 mm after slice 2 of 5 (the first of 2 such gaps)",
    ),
    "variable": (_late, "variable slice distance: 3.00 to 4.50 mm"),
    "one off": (_move(3, 0, 0, 1.0), "variable slice distance: 2.00 to 4.00 mm"),
    "duplicate": (_move(3, 0, 0, 3.0), "duplicate slices: 1 of 7 positions hold up to 2 images"),
    "sideways": (_move(3, 2.0, 0, 0), "slices shifted sideways: one lies 2.0 mm off"),
    "one slice": (lambda s: [s.pop() for _ in range(7)], "DICOM file: one slice only"),
    "orientations": (
        lambda s: [setattr(d, "ImageOrientationPatient", [0, 1, 0, 0, 0, -1]) for d in s[:3]],
        "mixed orientations: 2 in 8 slices",
    ),
    "matrix": (
        lambda s: [setattr(d, n, v) for d in s[:3] for n, v in (("Rows", 6), ("PixelData", b"\0" * 120))],
        "mixed matrix sizes: 5 of 10x12, 3 of 10x6",
    ),
    "spacing": (
        lambda s: setattr(s[2], "PixelSpacing", [1.5, 2.2]),
        "mixed pixel spacing: 2x1.5 to 2.2x1.5 mm",
    ),
    "skew": (
        lambda s: [setattr(d, "ImageOrientationPatient", [1, 0, 0, 0.6, 0.8, 0]) for d in s],
        "not two unit vectors at a right angle",
    ),
    "two numbers": (lambda s: setattr(s[1], "ImagePositionPatient", [1, 2]), "its ImagePositionPatient is not three"),
    "zero slope": (lambda s: setattr(s[1], "RescaleSlope", 0), "its RescaleSlope is 0"),
    "zero spacing": (lambda s: [setattr(d, "PixelSpacing", [0, 2]) for d in s], "its pixel spacing is 0 x 2 mm"),
    "frames": (lambda s: [setattr(d, "NumberOfFrames", 3) for d in s], "3 frames without a place for each"),
    "truncated": (_cut_pixels, "truncated pixel data"),
    "damaged": (_spoil, "damaged pixel data"),
    "no pixels": (lambda s: delattr(s[1], "PixelData"), "no pixel data"),
    "constant": (
        lambda s: [setattr(d, "PixelData", b"\0" * 240) for d in s],
        "constant: all voxels are -1024",
    ),
}


@pytest.mark.parametrize("kind", GEOMETRY)
def test_read_scan__slices_that_are_no_volume(tmp_path: Path, dicom: Any, kind: str) -> None:
    make, reason = GEOMETRY[kind]
    slices = dicom.series_of(dicom.stored((8, 12, 10)))
    make(slices)
    dicom.save(tmp_path, slices)
    told = _reason(tmp_path)
    assert reason in told
    assert told.startswith("DICOM file: " if len(slices) == 1 else f"series of {len(slices)} DICOM files: ")


def _tilted(dicom: Any, degrees: float, count: int = 12) -> list[Any]:
    """Return a tilted CT of a slab of bright tissue whose border is the world's plane y = 0."""
    angle = np.radians(degrees)
    column = np.array([0.0, np.cos(angle), -np.sin(angle)])
    rows, columns = 24, 20
    first, step = np.array([-10.0, -12.0, 5.0]), np.array([0.0, 0.0, 3.0])
    place = first[1] + column[1] * np.arange(rows)[None, :] + 0.0 * np.arange(count)[:, None]  # y of (k, row)
    rng = np.random.default_rng(0)
    stored = np.where(place > 0, 1100, 24)[:, :, None] + rng.integers(0, 5, (count, rows, columns))
    return dicom.series_of(
        stored.astype("u2"), position=tuple(first), orientation=(1, 0, 0, *column), spacing_mm=(1, 1, 3), step=step
    )


def test_read_scan__gantry_tilt_is_named_in_degrees(tmp_path: Path, dicom: Any) -> None:
    dicom.save(tmp_path, _tilted(dicom, 14.0))
    assert (
        "gantry tilt: slices are stacked 14.0 degrees off their normal, 0.9 voxels at a corner; --unshear"
        in _reason(tmp_path)
    )


@pytest.mark.parametrize("degrees", [0.3, -0.5, 1.0])
def test_read_scan__a_tilt_below_half_a_voxel_is_taken_as_right_angled(
    tmp_path: Path, dicom: Any, degrees: float
) -> None:
    slices = _tilted(dicom, degrees)
    dicom.save(tmp_path, slices)
    scan = read_scan(tmp_path)
    assert shear_degrees(scan.affine) < 1e-5
    for k, data in enumerate(slices):
        place = np.array(data.ImagePositionPatient)
        down = np.array(data.ImageOrientationPatient[3:]) * data.PixelSpacing[0]
        for corner, index in ((place, (0, 0, k)), (place + down * (data.Rows - 1), (0, data.Rows - 1, k))):
            off = np.linalg.solve(scan.affine, [*(corner * (-1, -1, 1)), 1])[:3] - index
            assert np.abs(off).max() < 0.5
    assert len(scan.notes) == 1
    assert scan.notes[0].startswith(f"axes {abs(degrees):.2f} degrees off a right angle are taken as right-angled: 0.")
    assert prepare_case([tmp_path]).notes == scan.notes


@pytest.mark.parametrize("degrees", [14.0, -20.0])
def test_prepare_case__unshear_keeps_every_voxel_at_its_place(tmp_path: Path, dicom: Any, degrees: float) -> None:
    slices = _tilted(dicom, degrees)
    dicom.save(tmp_path, slices)
    scan = read_scan(tmp_path, sheared=True)
    assert abs(shear_degrees(scan.affine) - abs(degrees)) < 1e-3
    case = prepare_case([tmp_path], recipe=Recipe(spacing_mm=(1.0, 1.0, 1.0), unshear=True))
    assert np.allclose(case.source_affine, scan.affine) and case.source_shape == scan.array.shape
    assert case.notes == (f"axes {abs(degrees):.1f} degrees off a right angle are resampled",)
    assert (np.diag(case.affine[[2, 1, 0]]) > 0).all()  # S, A and R increase
    at = np.argwhere(case.image[0] > 60)
    world_y = (case.affine @ np.c_[at, np.ones(len(at))].T)[1]
    assert world_y.max() < 0.5  # RAS: tissue lies where LPS y > 0
    corners = np.array([[i, j, k, 1] for i in (0, 19) for j in (0, 23) for k in (0, 11)])
    inside = np.linalg.solve(case.affine, scan.affine @ corners.T)[:3]
    size = np.array(case.image.shape[1:])[:, None]
    assert (inside > -1.01).all() and (inside < size + 0.01).all()
    # every source voxel deep in tissue or air is found there again
    for k, j in ((2, 4), (6, 20), (10, 21), (9, 3)):
        d, h, w = np.round(np.linalg.solve(case.affine, scan.affine @ [10, j, k, 1])[:3]).astype(int)
        assert abs(case.image[0, d, h, w] - scan.array[10, j, k]) < 12


def _repeat(dicom: Any, change: Callable[..., Any], name: str, values: list[Any], modality: str = "MR") -> list[Any]:
    """Return one series of as many volumes as there are values, told apart by one attribute."""
    parts = [dicom.series_of(dicom.stored(seed=seed), modality) for seed in range(len(values))]
    for part, value in zip(parts, values, strict=True):
        for data in part:
            data.SeriesInstanceUID = parts[0][0].SeriesInstanceUID
            if isinstance(name, str):
                setattr(data, name, value)
            else:
                data.add_new(name, "IS", value)
    return [data for part in parts for data in part]


TELLS: dict[str, tuple[Any, list[Any], str]] = {
    "echoes": ("EchoTime", [10, 2.5, 20], "3 volumes in one series (echo times: 2.5, 10.0, 20.0)"),
    "b-values": ("DiffusionBValue", [0.0, 1000.0], "(b-values: 0.0, 1000.0)"),
    "Siemens b-values": (0x0019100C, [0, 1000], "(b-values: 0, 1000)"),
    "GE b-values": (0x00431039, [[0, 8, 0, 0], [700, 8, 0, 0]], "(b-values: 0, 700)"),
    "directions": ("DiffusionGradientOrientation", [[1.0, 0, 0], [0, 1.0, 0]], "(diffusion directions: "),
    "phases": ("TriggerTime", [0, 50, 100, 150, 200], "(trigger times: 0.0, 50.0, 100.0, 150.0, ...)"),
    "dynamics": ("TemporalPositionIdentifier", [2, 1], "(temporal positions: 1, 2)"),
    "acquisitions": ("AcquisitionNumber", [3, 4], "(acquisitions: 3, 4)"),
    "magnitude and phase": (
        "ImageType",
        [["ORIGINAL", "PRIMARY", "M"], ["ORIGINAL", "PRIMARY", "P"]],
        "(image types: ",
    ),
    "kernels": ("ConvolutionKernel", ["B30f", "B70f"], "(convolution kernels: B30f, B70f)"),
}


@pytest.mark.parametrize("kind", TELLS)
def test_read_scan__volumes_of_one_series(tmp_path: Path, dicom: Any, change: Callable[..., Any], kind: str) -> None:
    name, values, told = TELLS[kind]
    dicom.save(tmp_path, _repeat(dicom, change, name, values))
    assert told in _reason(tmp_path) and "--volume I (from 0) takes one" in _reason(tmp_path)
    assert f"--volume {len(values)} is none of them" in _reason(tmp_path, len(values))
    order = np.argsort([v if isinstance(v, int | float) else i for i, v in enumerate(values)])
    if kind == "directions":
        order = order[::-1]
    scans = [read_scan(tmp_path, volume) for volume in range(len(values))]
    for scan, seed in zip(scans, order, strict=True):
        assert np.array_equal(scan.array, dicom.stored(seed=int(seed)).transpose(2, 1, 0))
        assert scan.notes[0].startswith("one of several volumes is taken: ")
    assert len({scan.sha256 for scan in scans}) == len(values)


def test_read_scan__two_echoes_half_a_slice_apart_are_no_stack(
    tmp_path: Path, dicom: Any, change: Callable[..., Any]
) -> None:
    slices = _repeat(dicom, change, "EchoTime", [1, 2])
    for data in slices[len(slices) // 2 :]:
        data.ImagePositionPatient[2] = float(data.ImagePositionPatient[2]) + 1.5
    dicom.save(tmp_path, slices)
    assert "2 volumes in one series (echo times: 1.0, 2.0); --volume I" in _reason(tmp_path)
    for volume in range(2):
        assert np.array_equal(read_scan(tmp_path, volume).array, dicom.stored(seed=volume).transpose(2, 1, 0))


def test_read_scan__volumes_told_apart_by_two_attributes(
    tmp_path: Path, dicom: Any, change: Callable[..., Any]
) -> None:
    slices = _repeat(dicom, change, "EchoTime", [1, 1, 2, 2])
    for row, data in enumerate(slices):
        data.TemporalPositionIdentifier = (row // 5) % 2 + 1
    dicom.save(tmp_path, slices)
    assert "4 volumes in one series (temporal positions and echo times: 1 and 1.0, 1 and 2.0" in _reason(tmp_path)
    assert np.array_equal(read_scan(tmp_path, 1).array, dicom.stored(seed=2).transpose(2, 1, 0))


def test_read_scan__what_differs_in_every_file_tells_no_volumes_apart(
    tmp_path: Path, dicom: Any, change: Callable[..., Any]
) -> None:
    slices = _repeat(dicom, change, "TriggerTime", [0, 50])
    for row, data in enumerate(slices):
        data.AcquisitionNumber = row
    dicom.save(tmp_path, slices)
    assert "2 volumes in one series (trigger times: 0.0, 50.0)" in _reason(tmp_path)


def test_read_scan__an_acquisition_number_per_slice_is_one_volume(tmp_path: Path, dicom: Any) -> None:
    slices = dicom.series_of(dicom.stored())
    for row, data in enumerate(slices):
        data.AcquisitionNumber = row // 2
    dicom.save(tmp_path, slices)
    assert read_scan(tmp_path).array.shape == (10, 12, 5)
