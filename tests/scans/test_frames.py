"""Frames of pictures, sequences and DICOM: what is read, what is found to be tissue, and what never reaches a cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from fans import fan, save_dicom, save_sequence, where_written, written
from PIL import Image
from pydicom.datadict import tag_for_keyword

from agssd.scans.case import RefusedError
from agssd.scans.frames import read_frames
from agssd.scans.preparing.frames import prepare_frames
from agssd.scans.preparing.sector import sector
from agssd.scans.preparing.volumes import Recipe


def overlap(one: np.ndarray, two: np.ndarray) -> float:
    return float((one & two).sum() / (one | two).sum())


def test_sector__is_the_fan_with_its_shadows_and_without_the_text_beside_it() -> None:
    frames, inside = fan()
    frames = np.stack([written(frame) for frame in frames])
    found = sector(frames)
    assert found.shape == frames.shape and (found == found[0]).all()
    assert overlap(found[0] != 0, inside) > 0.93  # the hull adds the sliver below the probe
    assert (found[0][inside] == 1).mean() > 0.98  # a cyst is no screen
    assert not found[:, where_written(frames.shape[1:])].any()


def test_sector__text_within_it_that_never_changes_is_taken_out_where_the_rest_moves() -> None:
    frames, inside = fan()
    place = (110, 120)
    text = where_written(frames.shape[1:], place)
    assert inside[text].all()
    moving = np.stack([written(frame, place) for frame in frames])
    assert not sector(moving)[:, text].any()
    assert sector(moving)[0][inside].mean() > 0.85
    frozen = np.repeat(moving[:1], 6, 0)  # nothing changes: nothing can be told
    assert sector(frozen)[0][inside].mean() > 0.98


@pytest.mark.parametrize("count", [1, 6])
@pytest.mark.parametrize("level", [40, 90, 160])
@pytest.mark.parametrize("place", ["header", "side"])
@pytest.mark.parametrize("ink", ["white", "faint"])
def test_sector__text_on_a_filled_header_or_panel_is_outside(count: int, level: int, place: str, ink: str) -> None:
    frames, inside = fan(count)
    panel = np.s_[:, :20, :] if place == "header" else np.s_[:, :, :130]
    covered = np.zeros_like(inside)
    covered[panel[1:]] = True
    frames[panel] = level
    at, colour = (4, 4), 255 if ink == "white" else level + 50
    frames = np.stack([written(frame, at, colour) for frame in frames])
    found = sector(frames)
    text = where_written(frames.shape[1:], at)
    assert not found[:, text].any()
    assert overlap(found[0] != 0, inside & ~covered) > 0.85


def test_sector__is_everything_where_no_screen_is_seen() -> None:
    frames = np.random.default_rng(0).integers(20, 200, (2, 64, 80)).astype(np.uint8)
    assert sector(frames).mean() > 0.97


def test_sector__stays_inside_the_regions_that_the_file_names() -> None:
    frames, _ = fan()
    found = sector(frames, regions=((0, 240, 0, 160),))
    assert not found[:, :, 160:].any() and found[:, :, :160].any()


def test_prepare_frames__keeps_no_text_outside_the_sector(tmp_path: Path) -> None:
    frames, inside = fan(1)
    path = tmp_path / "a.png"
    Image.fromarray(written(frames[0])).save(path)
    case = prepare_frames([path])
    text = where_written(frames.shape[1:])
    assert (case.image[0, 0][text] == 0).all()
    kept = inside & (case.foreground[0] != 0) & (frames[0] < case.high[0])
    assert np.array_equal(case.image[0, 0][kept], frames[0][kept])
    assert case.spatial_dims == 2 and not case.in_mm and case.spacing_mm == (1.0, 1.0, 1.0)
    assert any("pixels" in note for note in case.notes)


def test_prepare_frames__a_page_of_text_is_no_sector(tmp_path: Path) -> None:
    page = np.zeros((240, 320), np.uint8)
    for row in range(10, 230, 20):
        page = written(page, (10, row))
    Image.fromarray(page).save(tmp_path / "a.png")
    with pytest.raises(RefusedError, match="no sector found"):
        prepare_frames([tmp_path / "a.png"])


def test_prepare_frames__coloured_marks_are_no_tissue(tmp_path: Path) -> None:
    frames, _ = fan(1)
    place = (110, 120)
    Image.fromarray(written(frames[0], place, (250, 200, 20), "RGB")).save(tmp_path / "a.png")
    case = prepare_frames([tmp_path / "a.png"])
    text = where_written(frames.shape[1:], place)
    assert not case.foreground[0][text].any() and (case.image[0, 0][text] == 0).all()


def test_read_frames__jpeg_is_the_picture_but_for_its_loss(tmp_path: Path) -> None:
    frames, inside = fan(1)
    Image.fromarray(frames[0]).save(tmp_path / "a.jpg", quality=95)
    assert np.abs(read_frames(tmp_path / "a.jpg").array[0].astype(int) - frames[0]).mean() < 4
    assert overlap(prepare_frames([tmp_path / "a.jpg"]).foreground[0] != 0, inside) > 0.9


def test_read_frames__third_axis_of_a_sequence_is_time(tmp_path: Path) -> None:
    frames, _ = fan(5)
    found = read_frames(save_sequence(tmp_path / "a.mha", frames))
    assert np.array_equal(found.array, frames) and found.spacing_mm is None
    assert read_frames(save_sequence(tmp_path / "b.mha", frames, 0.25)).spacing_mm == (0.25, 0.25)


@pytest.mark.parametrize(("stated", "flips"), [("MF", ()), ("UF", (2,)), ("MN", (1,)), ("UN", (1, 2))])
def test_read_frames__turns_the_picture_as_its_header_says(tmp_path: Path, stated: str, flips: tuple[int, ...]) -> None:
    frames, _ = fan(3)
    path = save_sequence(tmp_path / "a.mha", np.flip(frames, flips).copy(), UltrasoundImageOrientation=stated)
    assert np.array_equal(read_frames(path).array, frames)


@pytest.mark.parametrize("colour", [False, True])
def test_read_frames__dicom_gives_frames_regions_and_millimetres(tmp_path: Path, colour: bool) -> None:
    frames, _ = fan(4)
    stored = np.repeat(frames[..., None], 3, -1) if colour else frames
    path = save_dicom(tmp_path / "a.dcm", stored, colour, (10, 229, 20, 299))
    found = read_frames(path)
    assert np.array_equal(found.array, frames)
    assert found.spacing_mm == pytest.approx((0.3, 0.2)) and found.regions == ((10, 230, 20, 300),)
    case = prepare_frames([path])
    assert case.in_mm and case.spacing_mm == pytest.approx((1.0, 0.3, 0.2))
    assert not case.foreground[:, :10].any() and not case.foreground[:, :, 300:].any()


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("stored", ["YBR_FULL", "YBR_FULL_422"])
def test_read_frames__dicom_in_luma_and_chroma_is_the_picture(tmp_path: Path, stored: str, count: int) -> None:
    frames, inside = fan(count)
    coloured = np.stack([written(frame, (110, 120), (250, 200, 20), "RGB") for frame in frames])
    path = save_dicom(tmp_path / "a.dcm", coloured, True, stored=stored)
    found = read_frames(path)
    text = where_written(frames.shape[1:], (110, 120))
    assert np.abs(found.array[:, ~text] - frames[:, ~text]).mean() < 3
    assert found.drawn is not None and found.drawn[:, text].mean() > 0.8 and found.drawn.mean() < 0.05
    assert overlap(prepare_frames([path]).foreground[0] != 0, inside & ~text) > 0.85


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_read_frames__dicom_palette_of_either_width(tmp_path: Path, dtype: type[np.generic]) -> None:
    frames, _ = fan(1)
    path = save_dicom(tmp_path / "a.dcm", frames)
    data = pydicom.dcmread(path)
    data.PhotometricInterpretation = "PALETTE COLOR"
    bits = 8 * np.dtype(dtype).itemsize
    table = (np.arange(256) << (bits - 8)).astype(dtype)
    for name in ("Red", "Green", "Blue"):
        data.add_new(tag_for_keyword(f"{name}PaletteColorLookupTableDescriptor"), "US", [256, 0, bits])
        data.add_new(tag_for_keyword(f"{name}PaletteColorLookupTableData"), "OW", table.tobytes())
    data.save_as(path)
    assert np.array_equal(read_frames(path).array, frames)


def test_read_frames__a_region_that_is_no_picture_is_no_sector(tmp_path: Path) -> None:
    frames, _ = fan(2)
    strip = save_dicom(tmp_path / "a.dcm", frames, False, (200, 239, 0, 319), spatial_format=2)  # M-mode
    assert read_frames(strip).regions == ()


def test_read_frames__a_turned_photograph_is_turned_back(tmp_path: Path) -> None:
    frames, _ = fan(1)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to look at it
    Image.fromarray(np.rot90(frames[0]).copy()).save(tmp_path / "a.jpg", quality=95, exif=exif)
    assert np.abs(read_frames(tmp_path / "a.jpg").array[0].astype(int) - frames[0]).mean() < 4


def test_prepare_frames__resamples_to_the_spacing_asked_for(tmp_path: Path) -> None:
    frames, _ = fan(2)
    label = (np.arange(240)[:, None] < 120) * np.ones((2, 1, 320), np.uint8) * 255
    path = save_dicom(tmp_path / "a.dcm", frames, False, (0, 239, 0, 319))
    save_sequence(tmp_path / "label.mha", label.astype(np.uint8))
    case = prepare_frames([path], tmp_path / "label.mha", Recipe(spacing_mm=(0.6, 0.6, 0.6)))
    assert case.image.shape == (1, 2, 120, 106)
    assert case.spacing_mm[1:] == pytest.approx((0.6, 0.2 * 320 / 106))
    assert case.label is not None and set(np.unique(case.label)) == {0, 1}
    assert (case.label[:, :60] == 1).all() and (case.label[:, 60:] == 0).all()
    with pytest.raises(RefusedError, match="no size in mm; leave --spacing-mm out"):
        prepare_frames([save_sequence(tmp_path / "b.mha", frames)], None, Recipe(spacing_mm=(0.6, 0.6, 0.6)))


def test_read_frames__says_why_a_file_is_none(tmp_path: Path) -> None:
    frames, _ = fan(3)
    volume = sitk.GetImageFromArray(frames)
    sitk.WriteImage(volume, str(tmp_path / "volume.mha"))
    Image.fromarray(frames[0][:20, :20]).save(tmp_path / "small.png")
    Image.fromarray(np.full((64, 64), 7, np.uint8)).save(tmp_path / "flat.png")
    Image.fromarray(frames[0]).save(tmp_path / "cut.png")
    cut = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(cut[: len(cut) // 2])
    (tmp_path / "empty.png").touch()
    for name, reason in {
        "volume.mha": "a volume: nothing in its header says that its third axis is time",
        "small.png": "frames of 20x20 pixels",
        "flat.png": "constant: all pixels are 7",
        "cut.png": "truncated or damaged",
        "empty.png": "empty file",
        "gone.png": "cannot be opened",
    }.items():
        with pytest.raises(RefusedError, match=reason):
            read_frames(tmp_path / name)
    dicom = pydicom.dcmread(save_dicom(tmp_path / "a.dcm", frames))
    dicom.PixelData = dicom.PixelData[:1000]
    dicom.save_as(tmp_path / "short.dcm")
    with pytest.raises(RefusedError, match="damaged, or of a compression that is not decoded"):
        read_frames(tmp_path / "short.dcm")
    dicom.Modality = "CT"
    dicom.save_as(tmp_path / "ct.dcm")
    with pytest.raises(RefusedError, match="its header names another modality than ultrasound"):
        read_frames(tmp_path / "ct.dcm")


@pytest.mark.parametrize(
    ("name", "shape", "share"),
    [
        ("BkCurvilinearScanConvertedData.igs.mha", (1, 400, 600), (0.70, 0.80)),
        ("BoneUltrasound_L14.igs.mha", (21, 616, 820), (0.53, 0.60)),
        ("UltrasonixCurvilinearScanConvertedDataGroundTruth.igs.mha", (5, 616, 820), (0.45, 0.65)),
    ],
)
def test_prepare_frames__of_shared_files(
    shared_data: Path, name: str, shape: tuple[int, ...], share: tuple[float, float]
) -> None:
    case = prepare_frames([shared_data / "ultrasound" / name])
    assert case.foreground.shape == shape and share[0] < case.foreground.mean() < share[1]
    assert not case.in_mm  # a spacing of 1 in these headers says nothing
