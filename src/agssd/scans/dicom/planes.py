"""The image planes of DICOM files, from their headers: place, pixels, units, and what tells volumes apart.

A classic file is one plane, an enhanced multi-frame file many, whose geometry stands in functional groups. Positions,
orientations and spacings are DICOM's: mm in the patient's space, LPS.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agssd.scans.case import RefusedError
from agssd.scans.dicom.headers import read_attributes

# What tells the volumes of one series apart: name, and the attributes that may say so, the first that is there counts.
# Tried alone and in pairs, in this order.
TELLS: dict[str, tuple[Any, ...]] = {
    "temporal positions": ("TemporalPositionIndex", "TemporalPositionIdentifier"),
    "echo times": ("EffectiveEchoTime", "EchoTime"),
    "b-values": ("DiffusionBValue", 0x0019100C, 0x00431039, 0x20011003),
    "image types": ("FrameType", "ImageType"),
    "complex components": ("ComplexImageComponent",),
    "acquisitions": ("FrameAcquisitionNumber", "AcquisitionNumber"),
    "trigger times": ("NominalCardiacTriggerDelayTime", "TriggerTime"),
    "inversion times": ("InversionTimes", "InversionTime"),
    "flip angles": ("FlipAngle",),
    "diffusion directions": ("DiffusionGradientOrientation",),
    "stacks": ("StackID",),
    "acquisition times": ("AcquisitionTime",),
    "convolution kernels": ("ConvolutionKernel",),
}
_GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
_PLANE = [
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "Rows",
    "Columns",
    "RescaleSlope",
    "RescaleIntercept",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
]
_WANTED = [*_PLANE, *(name for names in TELLS.values() for name in names)]


@dataclass(frozen=True)
class Plane:
    """One image plane of a series.

    Attributes:
        file: where it is.
        frame: number of the frame in the file.
        position: (3,) mm, centre of the first pixel.
        orientation: (2, 3) unit vectors along a row and along a column.
        spacing_mm: between the pixels of a row, and of a column.
        shape: pixels in a row, and in a column.
        rescale: slope and intercept, or None where the header gives none.
        padding: lowest and highest stored value of padding, or None.
        tells: name in ``TELLS`` -> value, for what may tell volumes apart.
    """

    file: Path
    frame: int
    position: NDArray[np.float64]
    orientation: NDArray[np.float64]
    spacing_mm: tuple[float, float]
    shape: tuple[int, int]
    rescale: tuple[float, float] | None
    padding: tuple[int, int] | None
    tells: dict[str, str]


def read_planes(files: Sequence[Path]) -> list[Plane]:
    """Return all image planes of files, from their headers.

    Raises:
        RefusedError: a file cannot be read or says too little.
    """
    return [plane for file in files for plane in _planes_of(file)]


def _planes_of(file: Path) -> Iterator[Plane]:
    data = read_attributes(file, [*_WANTED, *_GROUPS, "NumberOfFrames"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        common = {name: data[name].value for name in _WANTED if name in data}
        frames = data.get(_GROUPS[1])
        if frames is None:
            if (data.get("NumberOfFrames") or 1) > 1:
                raise RefusedError(f"{data.NumberOfFrames} frames without a place for each")
            yield _plane(file, 0, common)
            return
        shared = dict(_flatten(data.get(_GROUPS[0]) or []))
        for number, frame in enumerate(frames):
            yield _plane(file, number, {**common, **shared, **dict(_flatten([frame]))})


def _flatten(items: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Yield name and value of the wanted attributes in functional groups; private ones repeat them in other words."""
    for item in items:
        for element in item:
            if element.tag.is_private:
                continue
            if element.VR == "SQ":
                yield from _flatten(element.value)
            elif element.keyword in _WANTED:
                yield element.keyword, element.value


def _plane(file: Path, frame: int, values: dict[Any, Any]) -> Plane:
    try:
        position = np.array([float(v) for v in values["ImagePositionPatient"]])
        axes = np.array([float(v) for v in values["ImageOrientationPatient"]]).reshape(2, 3)
        between_rows, between_columns = (float(v) for v in values["PixelSpacing"])
        shape = int(values["Columns"]), int(values["Rows"])
        rescale = _rescale(values.get("RescaleSlope"), values.get("RescaleIntercept"))
        padding = _padding(values.get("PixelPaddingValue"), values.get("PixelPaddingRangeLimit"))
    except RefusedError:
        raise
    except KeyError as error:
        raise RefusedError(f"missing position or spacing: frame {frame + 1} has no {error.args[0]}") from error
    except (TypeError, ValueError) as error:
        raise RefusedError("damaged DICOM header: its position, orientation or spacing are no numbers") from error
    lengths = np.linalg.norm(axes, axis=1)
    if position.shape != (3,) or not np.isfinite(position).all():
        raise RefusedError("its ImagePositionPatient is not three numbers")
    if not (np.abs(lengths - 1).max() < 0.01 and abs(axes[0] @ axes[1]) < 1e-3):
        raise RefusedError("its ImageOrientationPatient is not two unit vectors at a right angle")
    if min(between_rows, between_columns) <= 0:
        raise RefusedError(f"its pixel spacing is {between_rows:g} x {between_columns:g} mm")
    tells = {name: _tell(values, attributes) for name, attributes in TELLS.items()}
    return Plane(
        file,
        frame,
        position,
        axes / lengths[:, None],
        (between_columns, between_rows),
        shape,
        rescale,
        padding,
        tells,
    )


def _tell(values: dict[Any, Any], attributes: Sequence[Any]) -> str:
    for name in attributes:
        value = values.get(name)
        if value is not None and not isinstance(value, bytes):
            if name == 0x00431039 and not isinstance(value, str):  # of GE: the b-value is the first of four numbers
                value = value[0]
            return (
                "\\".join(map(str, value)) if hasattr(value, "__iter__") and not isinstance(value, str) else str(value)
            )
    return ""


def _rescale(slope: Any, intercept: Any) -> tuple[float, float] | None:
    if slope in (None, "") and intercept in (None, ""):
        return None
    factor = 1.0 if slope in (None, "") else float(slope)
    if factor == 0:
        raise RefusedError("its RescaleSlope is 0")
    return factor, 0.0 if intercept in (None, "") else float(intercept)


def _padding(value: Any, limit: Any) -> tuple[int, int] | None:
    if value is None or value == "":
        return None
    one, other = int(value), int(value if limit is None or limit == "" else limit)
    return min(one, other), max(one, other)
