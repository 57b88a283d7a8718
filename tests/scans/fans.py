"""Frames as a curved probe gives them: a fan of speckle on a black screen, with text burnt in."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pydicom
import SimpleITK as sitk
from PIL import Image, ImageDraw
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRLittleEndian, JPEGBaseline8Bit, UltrasoundMultiFrameImageStorage, generate_uid

TEXT = "DOE, JANE 1970-01-01"


def fan(count: int = 6, height: int = 240, width: int = 320, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return frames (T, H, W) uint8 that move, and where the fan is (H, W)."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width].astype(float)
    y, x = rows + 0.15 * height, columns - width / 2
    radius, angle = np.hypot(x, y), np.arctan2(x, y)
    inside = (radius > 0.2 * height) & (radius < 1.05 * height) & (np.abs(angle) < 0.6)
    speckle = rng.rayleigh(45, (count, height, width)) * np.exp(-radius / height)
    speckle[:, (rows - 0.6 * height) ** 2 + (columns - width / 2) ** 2 < (0.1 * height) ** 2] = 0  # a cyst
    return np.clip(np.where(inside, speckle + 12, 0), 0, 255).astype(np.uint8), inside


def written(frame: np.ndarray, place: tuple[int, int] = (4, 4), colour: object = 255, mode: str = "L") -> np.ndarray:
    """Return a frame with text drawn into it at (x, y)."""
    picture = Image.fromarray(frame).convert(mode)
    draw = ImageDraw.Draw(picture)
    draw.fontmode = "1"  # no smoothing, as scanners write
    draw.text(place, TEXT, fill=colour)
    return np.asarray(picture)


def where_written(shape: tuple[int, int], place: tuple[int, int] = (4, 4)) -> np.ndarray:
    """Return the pixels of the text, bool."""
    return written(np.zeros(shape, np.uint8), place) > 127


def save_sequence(path: Path, frames: np.ndarray, spacing: float = 1.0, **about: str) -> Path:
    image = sitk.GetImageFromArray(frames)
    image.SetSpacing((spacing, spacing, 1.0))
    for number in range(len(frames)):
        image.SetMetaData(f"Seq_Frame{number:04d}_Timestamp", str(number / 20))
    for key, value in about.items():
        image.SetMetaData(key, value)
    sitk.WriteImage(image, str(path))
    return path


def save_dicom(
    path: Path,
    frames: np.ndarray,
    colour: bool = False,
    region: tuple[int, ...] | None = None,
    stored: str = "",
    spatial_format: int = 1,
) -> Path:
    """Write (T, H, W) or (T, H, W, 3) uint8 as a multi-frame ultrasound image with pixels of 0.3 x 0.2 mm.

    ``stored`` is the photometric interpretation, YBR_FULL or, in JPEG, YBR_FULL_422, of frames with colours.
    """
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = UltrasoundMultiFrameImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = UltrasoundMultiFrameImageStorage, meta.MediaStorageSOPInstanceUID
    data.Modality, data.PatientID, data.PatientName = "US", "PATIENT-7", "Doe^Jane"
    data.NumberOfFrames, data.Rows, data.Columns = frames.shape[:3]
    data.SamplesPerPixel, data.PhotometricInterpretation = (3, "RGB") if colour else (1, "MONOCHROME2")
    data.PlanarConfiguration = 0
    data.BitsAllocated = data.BitsStored = 8
    data.HighBit, data.PixelRepresentation = 7, 0
    if region is not None:
        item = Dataset()
        item.RegionDataType, item.RegionSpatialFormat, item.RegionFlags = 1, spatial_format, 0
        item.RegionLocationMinY0, item.RegionLocationMaxY1, item.RegionLocationMinX0, item.RegionLocationMaxX1 = region
        item.PhysicalUnitsXDirection = item.PhysicalUnitsYDirection = 3
        item.PhysicalDeltaX, item.PhysicalDeltaY = 0.02, -0.03
        data.SequenceOfUltrasoundRegions = [item]
    data.PixelData = frames.tobytes()
    if stored:
        data.PhotometricInterpretation = stored
    if stored == "YBR_FULL":
        data.PixelData = pydicom.pixels.convert_color_space(frames, "RGB", stored, per_frame=True).tobytes()
    elif stored == "YBR_FULL_422":
        meta.TransferSyntaxUID = JPEGBaseline8Bit
        data.PixelData = encapsulate([_jpeg(frame) for frame in frames])
        data["PixelData"].is_undefined_length = True
        data.LossyImageCompression = "01"
    pydicom.dcmwrite(path, data)
    return path


def _jpeg(frame: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=95, subsampling=1)
    return buffer.getvalue()


def save_folder(folder: Path) -> Path:
    """Write sequences, pictures and a cine of five and one persons, with masks ``*_mask.*``, and one black picture."""
    for person in range(5):
        frames, inside = fan(7, seed=person)
        save_sequence(folder / f"s{person}.mha", np.stack([written(frame) for frame in frames]))
        save_sequence(folder / f"s{person}_mask.mha", np.repeat(inside[None].astype(np.uint8), 7, 0))
        Image.fromarray(fan(1, seed=10 + person)[0][0]).save(folder / f"p{person}.png")
        Image.fromarray((inside * 255).astype(np.uint8)).save(folder / f"p{person}_mask.png")
    save_dicom(folder / "cine.dcm", fan(4, seed=20)[0], False, (0, 239, 0, 319))
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(folder / "black.png")
    return folder
