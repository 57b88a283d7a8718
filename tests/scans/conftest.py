"""DICOM series for tests, written file by file: small random volumes of known place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    EnhancedMRImageStorage,
    ExplicitVRLittleEndian,
    MRImageStorage,
    PositronEmissionTomographyImageStorage,
    generate_uid,
)

STANDARD = {"CT": CTImageStorage, "MR": MRImageStorage, "PT": PositronEmissionTomographyImageStorage}


def _empty(sop_class: str, syntax: str = ExplicitVRLittleEndian) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = sop_class
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = syntax
    data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID = sop_class
    data.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    return data


def _pixels(data: Dataset, stored: np.ndarray) -> None:
    """Put (rows, columns) or (frames, rows, columns) of uint16 or int16 into a data set."""
    data.Rows, data.Columns = stored.shape[-2:]
    if stored.ndim == 3:
        data.NumberOfFrames = len(stored)
    data.SamplesPerPixel = 1
    data.PhotometricInterpretation = "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = 16
    data.HighBit = 15
    data.PixelRepresentation = int(stored.dtype.kind == "i")
    data.PixelData = stored.tobytes()


def series_of(
    array: np.ndarray,
    modality: str = "CT",
    position: tuple[float, ...] = (-30.0, -40.0, 50.0),
    orientation: tuple[float, ...] = (1, 0, 0, 0, 1, 0),
    spacing_mm: tuple[float, float, float] = (1.5, 2.0, 3.0),
    step: tuple[float, ...] | None = None,
    **attributes: Any,
) -> list[Dataset]:
    """Return the slices of a series in the order of their position along the normal.

    Args:
        array: (K, rows, columns) uint16 or int16 as stored.
        modality: "CT", "MR" or "PT".
        position: of the first slice, mm, LPS.
        orientation: ImageOrientationPatient.
        spacing_mm: between rows, columns and slices.
        step: from slice to slice, mm, LPS; by default the normal times the spacing.
        attributes: of every slice.
    """
    series, study, frame = generate_uid(), generate_uid(), generate_uid()
    normal = np.cross(orientation[:3], orientation[3:])
    move = normal * spacing_mm[2] if step is None else np.asarray(step)
    slices = []
    for row, stored in enumerate(array):
        data = _empty(STANDARD[modality])
        data.Modality = modality
        data.SeriesInstanceUID, data.StudyInstanceUID, data.FrameOfReferenceUID = series, study, frame
        data.PatientID, data.PatientName = "P-17", "Doe^Jane"
        data.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        data.InstanceNumber = row + 1
        data.ImagePositionPatient = [round(float(v), 6) for v in np.asarray(position) + row * move]
        data.ImageOrientationPatient = [float(v) for v in orientation]
        data.PixelSpacing = list(spacing_mm[:2])
        if modality in ("CT", "PT"):
            data.RescaleSlope, data.RescaleIntercept = 1, -1024 if modality == "CT" else 0
        _pixels(data, stored)
        for name, value in attributes.items():
            setattr(data, name, value)
        slices.append(data)
    return slices


def enhanced_of(
    array: np.ndarray,
    modality: str = "CT",
    position: tuple[float, float, float] = (-30.0, -40.0, 50.0),
    spacing_mm: tuple[float, float, float] = (1.5, 2.0, 3.0),
    temporal: int = 1,
) -> Dataset:
    """Return one multi-frame object of (K, rows, columns); of ``temporal`` volumes each slice comes in turn.

    The frames are stored from top to bottom, against the normal.
    """
    data = _empty(EnhancedCTImageStorage if modality == "CT" else EnhancedMRImageStorage)
    data.Modality, data.PatientID = modality, "P-17"
    data.SeriesInstanceUID, data.StudyInstanceUID = generate_uid(), generate_uid()
    data.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    shared, frames = Dataset(), []
    plane, measures, value = Dataset(), Dataset(), Dataset()
    plane.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    measures.PixelSpacing = list(spacing_mm[:2])
    value.RescaleSlope, value.RescaleIntercept = 2, -1024
    shared.PlaneOrientationSequence = Sequence([plane])
    shared.PixelMeasuresSequence = Sequence([measures])
    shared.PixelValueTransformationSequence = Sequence([value])
    places = len(array) // temporal
    for row in range(len(array)):
        place, content, frame = Dataset(), Dataset(), Dataset()
        height = position[2] + (places - 1 - row // temporal) * spacing_mm[2]
        place.ImagePositionPatient = [position[0], position[1], height]
        content.StackID = "1"
        content.TemporalPositionIndex = row % temporal + 1
        frame.PlanePositionSequence = Sequence([place])
        frame.FrameContentSequence = Sequence([content])
        frames.append(frame)
    data.SharedFunctionalGroupsSequence = Sequence([shared])
    data.PerFrameFunctionalGroupsSequence = Sequence(frames)
    _pixels(data, array)
    return data


def save_series(folder: Path, slices: list[Dataset], name: str = "IM{:04d}", seed: int | None = 0) -> list[Path]:
    """Write files whose names are in another order than the slices; return their paths in the order of the slices."""
    folder.mkdir(parents=True, exist_ok=True)
    names = np.arange(len(slices)) if seed is None else np.random.default_rng(seed).permutation(len(slices))
    paths = [folder / name.format(number) for number in names]
    for path, data in zip(paths, slices, strict=True):
        pydicom.dcmwrite(path, data)
    return paths


class Dicom:
    """What tests make DICOM with."""

    series_of = staticmethod(series_of)
    enhanced_of = staticmethod(enhanced_of)
    save = staticmethod(save_series)

    @staticmethod
    def stored(shape: tuple[int, int, int] = (5, 12, 10), seed: int = 0, kind: str = "u2") -> np.ndarray:
        """Return random stored values (K, rows, columns): air and tissue."""
        rng = np.random.default_rng(seed)
        values = rng.integers(0, 2400, shape)
        return values.astype(kind)


@pytest.fixture(scope="session")
def dicom() -> type[Dicom]:
    """Return ``Dicom``: series_of(array, ...), enhanced_of(array, ...), save(folder, slices), stored(shape, seed)."""
    return Dicom


@pytest.fixture(scope="session")
def change() -> Callable[..., list[Dataset]]:
    """Return a function that sets one attribute in some slices: change(slices, rows, name, value)."""

    def _change(slices: list[Dataset], rows: list[int], name: str, value: Any) -> list[Dataset]:
        for row in rows:
            setattr(slices[row], name, value)
        return slices

    return _change
