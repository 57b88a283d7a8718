"""Reading frames: pictures (PNG, JPEG), sequences (MetaImage, NRRD) and ultrasound in DICOM, one or many frames a file.

Frames have no place in the world. Their axes are (T, H, W): H runs downwards in the picture, for ultrasound away from
the probe, and W to its right.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agssd.scans.case import RefusedError
from agssd.scans.dicom.headers import words
from agssd.scans.sources.files import PICTURES, READABLE, data_files, is_dicom, suffix_of

MIN_PIXELS = 32  # per side
COLOURED = 24.0  # difference of the colour channels, of 255, above which a pixel is no grey value but drawn
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_CENTIMETRES = 3  # code of the unit in DICOM's ultrasound regions
_TISSUE = 1  # code of a region that shows tissue
_2D = 1  # code of a region that is a picture; others are M-mode, waveforms, graphics
Box = tuple[int, int, int, int]  # top, bottom, left, right; [start, end)


@dataclass
class Frames:
    """Frames as their file holds them.

    Attributes:
        array: (T, H, W) grey values, integers or float32.
        drawn: (T, H, W) bool, what is coloured: marks, text, flow; None where the file has no colours.
        spacing_mm: of a pixel (H, W), or None where the file does not say.
        regions: where the file says that tissue is shown; empty where it does not say.
        sha256: of the bytes of the file.
        notes: what the user should know.
    """

    array: NDArray[Any]
    drawn: NDArray[np.bool_] | None
    spacing_mm: tuple[float, float] | None
    regions: tuple[Box, ...]
    sha256: str
    notes: tuple[str, ...]


def read_frames(path: Path) -> Frames:
    """Return the frames of a picture, a sequence or a DICOM file.

    Raises:
        RefusedError: the file is missing, empty, damaged, of another type, a volume, too small, or flat.
    """
    try:
        data = b"".join(file.read_bytes() for file in data_files(path))
    except OSError as error:
        raise RefusedError(f"cannot be opened: {error.strerror}") from error
    if not data:
        raise RefusedError("empty file")
    suffix = suffix_of(path)
    if suffix in PICTURES:
        frames = _read_picture(data)
    elif suffix in (".mha", ".mhd", ".nrrd", ".nhdr"):
        frames = _read_sequence(path)
    elif suffix not in READABLE and is_dicom(path):
        frames = _read_dicom(data)
    else:
        raise RefusedError(f"files of type {suffix or 'without extension'} are not read as frames")
    frames.sha256 = hashlib.sha256(data).hexdigest()
    array = frames.array
    if min(array.shape[1:]) < MIN_PIXELS:
        raise RefusedError(f"frames of {array.shape[2]}x{array.shape[1]} pixels; at least {MIN_PIXELS} a side")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise RefusedError(f"{int(array.size - np.count_nonzero(np.isfinite(array)))} pixels are NaN or infinite")
    if array.min() == array.max():
        raise RefusedError(f"constant: all pixels are {float(array.min()):g}")
    return frames


def _read_picture(data: bytes) -> Frames:
    image_module: Any = import_module("PIL.Image")
    try:
        with image_module.open(io.BytesIO(data)) as picture:
            if getattr(picture, "n_frames", 1) > 1:
                raise RefusedError("an animated picture; save its frames as DICOM or MetaImage")
            picture = import_module("PIL.ImageOps").exif_transpose(picture)
            if picture.mode in ("P", "RGBA", "LA", "CMYK", "YCbCr", "1"):
                picture = picture.convert("L" if picture.mode in ("LA", "1") else "RGB")
            array = np.asarray(picture)
    except RefusedError:
        raise
    except Exception as error:  # what Pillow raises on damaged bytes is of many types
        raise RefusedError(f"truncated or damaged: {_first_line(error)}") from error
    grey, drawn = _without_colour(array[None])
    return Frames(grey, drawn, None, (), "", ())


def _read_sequence(path: Path) -> Frames:
    sitk: Any = import_module("SimpleITK")
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        image = reader.Execute()
    except RuntimeError as error:
        raise RefusedError(f"truncated or damaged: {_first_line(error)}") from error
    meta = {key: image.GetMetaData(key) for key in image.GetMetaDataKeys()}
    if image.GetDimension() > 3:
        raise RefusedError(f"{image.GetDimension()}D image, which is no sequence of frames")
    if image.GetDimension() == 3 and image.GetSize()[2] > 1 and not any(key.startswith("Seq_Frame") for key in meta):
        raise RefusedError(
            "a volume: nothing in its header says that its third axis is time; prepare it without --modality us"
        )
    array = sitk.GetArrayFromImage(image)  # ([T,] H, W[, colours])
    if image.GetDimension() == 2:
        array = array[None]
    grey, drawn = _without_colour(array)
    notes: list[str] = []
    orientation = meta.get("UltrasoundImageOrientation", meta.get("ultrasound image orientation", ""))
    if orientation[:1] == "U":  # columns run to the unmarked side of the probe
        grey, drawn = grey[:, :, ::-1], None if drawn is None else drawn[:, :, ::-1]
        notes.append("mirrored, so that columns run to the marked side of the probe")
    if orientation[1:2] == "N":  # rows run towards the probe
        grey, drawn = grey[:, ::-1], None if drawn is None else drawn[:, ::-1]
        notes.append("turned upside down, so that rows run away from the probe")
    width, height = image.GetSpacing()[:2]
    known = (width, height) != (1.0, 1.0)  # 1 is what a header says that does not know
    return Frames(grey, drawn, (float(height), float(width)) if known else None, (), "", tuple(notes))


def _read_dicom(data: bytes) -> Frames:
    pydicom: Any = import_module("pydicom")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = pydicom.dcmread(io.BytesIO(data), force=True)
            if not {"US", "IVUS"} & set(words(dataset, "Modality")):
                raise RefusedError("its header names another modality than ultrasound; --modality says us")
            array = dataset.pixel_array  # YBR is turned to RGB already
            colours = int(dataset.get("SamplesPerPixel") or 1) > 1
            palette = words(dataset, "PhotometricInterpretation") == ["PALETTE COLOR"]
            if palette:
                array, colours = pydicom.pixels.apply_color_lut(array, dataset), True
                array = array >> 8 if array.dtype == np.uint16 else array
            regions, spacing, notes = _regions(dataset)
            inverted = words(dataset, "PhotometricInterpretation") == ["MONOCHROME1"]
    except RefusedError:
        raise
    except Exception as error:  # what pydicom and its decoders raise on damaged bytes is of many types
        raise RefusedError(f"damaged, or of a compression that is not decoded: {_first_line(error)}") from error
    if array.ndim == (3 if colours else 2):
        array = array[None]
    grey, drawn = _without_colour(array)
    if inverted:
        grey = (int(grey.max()) - grey.astype(np.int32)).astype(grey.dtype)
    return Frames(grey, drawn, spacing, regions, "", notes)


def _regions(dataset: Any) -> tuple[tuple[Box, ...], tuple[float, float] | None, tuple[str, ...]]:
    """Return the regions of tissue, their common spacing in mm, and notes."""
    boxes, spacings = [], set()
    for item in dataset.get("SequenceOfUltrasoundRegions") or ():
        if int(item.get("RegionDataType") or 0) != _TISSUE or int(item.get("RegionSpatialFormat") or _2D) != _2D:
            continue
        left, top = int(item.RegionLocationMinX0), int(item.RegionLocationMinY0)
        boxes.append((top, int(item.RegionLocationMaxY1) + 1, left, int(item.RegionLocationMaxX1) + 1))
        units = {int(item.get(f"PhysicalUnits{axis}Direction") or 0) for axis in "XY"}
        if units == {_CENTIMETRES}:
            spacings.add((10 * abs(float(item.PhysicalDeltaY)), 10 * abs(float(item.PhysicalDeltaX))))
    if len(spacings) > 1:
        return tuple(boxes), None, ("its regions differ in scale; lengths are in pixels",)
    return tuple(boxes), next(iter(spacings), None), ()


def _without_colour(array: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
    """Return grey values (T, H, W) and what is coloured, from (T, H, W) or (T, H, W, colours)."""
    if array.ndim == 3:
        return array, None
    if array.shape[-1] not in (3, 4):
        raise RefusedError(f"{array.shape[-1]} values per pixel")
    colours = array[..., :3]
    top = 255.0 if array.dtype == np.uint8 else float(max(colours.max(), 1))
    drawn = (colours.max(-1).astype(np.float32) - colours.min(-1)) > COLOURED / 255 * top
    grey = np.round(colours.astype(np.float32) @ np.asarray(_LUMA, np.float32))
    return grey.astype(np.float32), drawn if drawn.any() else None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
