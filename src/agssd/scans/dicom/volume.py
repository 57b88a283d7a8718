"""From the slices of a DICOM series to a volume: which of them, in which order, on which grid, in which units.

Headers and uncompressed and RLE pixels are read by pydicom, all other transfer syntaxes decoded by GDCM behind it.
Measured on the shared series, ms a slice (2-core x86-64 CPU, 2026-11-21): uncompressed 512x512 4.2 so and 4.1 by
SimpleITK; JPEG 2000 512x512 20 and 20 (28 by OpenJPEG); JPEG-LS 256x256 4.2 and 3.7; RLE 256x256 0.6 and 8.4. Being no
slower, pydicom serves better here: it gives stored values, by which padding is known, and single frames, where
SimpleITK gives the four volumes of the shared enhanced MR as one stack of 32 slices.

Positions, orientations and spacings are DICOM's: mm in the patient's space, LPS.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import statistics
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agssd.scans.case import RefusedError
from agssd.scans.dicom.planes import TELLS, Plane, read_planes

PADDING_HU = -1024.0  # value given to CT voxels outside the field of view: air
MAX_OFF_GRID_MM = 0.1  # how far a slice may lie off a regular grid, at most a fifth of the slice distance
SAME_PLACE_MM = 0.01
SAME_DIRECTION = 1e-3  # largest difference between cosines of one orientation
_HU = (-1000.0, 3071.0)
# What is one value in every volume; other marks may change along a stack.
_NEVER_IN_ONE = ("echo times", "b-values", "inversion times", "convolution kernels", "complex components")


def read_series(
    files: Sequence[Path], modality: str, volume: int | None = None
) -> tuple[NDArray[np.float32], NDArray[np.float64], str, list[str]]:
    """Return a volume of a series.

    Args:
        files: of the series.
        modality: "ct" gives HU, padding being air; all else the rescaled values.
        volume: which volume, from 0, where there are several.

    Returns:
        (I, J, K) float32, along rows, columns and slices; affine to world mm, RAS+; the hash over the sorted hashes of
        all files (and the number of the volume, where there are several); and notes.

    Raises:
        RefusedError: the slices are no volume, or their pixels cannot be read; the message is the reason.
    """
    planes, label = choose_volume(read_planes(files), volume)
    if len(planes) == 1:  # refused, but for its pixels first if they are damaged
        _frame(_decode(_read_bytes(planes[0].file)), planes[0])
    affine, ordered = arrange(planes)
    array = np.empty((len(ordered), *ordered[0].shape[::-1]), dtype=np.float32)  # (K, J, I)
    wanted: dict[Path, list[tuple[int, Plane]]] = defaultdict(list)
    for row, plane in enumerate(ordered):
        wanted[plane.file].append((row, plane))
    digests, notes = [], set()
    for file in files:
        data = _read_bytes(file)
        digests.append(hashlib.sha256(data).hexdigest())
        if file in wanted:
            frames = _decode(data)
            for row, plane in wanted[file]:
                array[row], note = _values(_frame(frames, plane), plane, modality)
                notes |= {note} if note else set()
    text = "".join(sorted(digests)) + (f" volume {volume}" if label else "")
    said = sorted(notes) + ([f"one of several volumes is taken: {volume}, {label}"] if label else [])
    return array.transpose(2, 1, 0), affine, hashlib.sha256(text.encode()).hexdigest(), said


def choose_volume(planes: Sequence[Plane], volume: int | None = None) -> tuple[list[Plane], str]:
    """Return the planes of one volume, and where there are several what marks it, else "".

    Raises:
        RefusedError: there are several volumes and ``volume`` names none of them, or images of one place that nothing
            tells apart.
    """
    _check_alike(planes)
    along = np.array([plane.position @ np.cross(*plane.orientation) for plane in planes])
    order = np.argsort(along, kind="stable")
    place = np.empty(len(planes), dtype=int)
    place[order] = np.cumsum(np.diff(along[order], prepend=along[order[0]]) > SAME_PLACE_MM)
    place_of = {id(plane): int(number) for plane, number in zip(planes, place, strict=True)}
    counts = np.bincount(place)
    most = int(counts.max())
    if most == 1:
        for name in _NEVER_IN_ONE:
            kinds: dict[tuple[str, ...], list[Plane]] = defaultdict(list)
            for plane in planes:
                kinds[plane.tells[name],].append(plane)
            if sum(len(found) > 1 for found in kinds.values()) > 1:  # echoes half a slice apart would make one stack
                return _one_of(kinds, (name,), volume)
        return list(planes), ""
    for names in itertools.chain(*(itertools.combinations(TELLS, count) for count in (1, 2))):
        volumes: dict[tuple[str, ...], list[Plane]] = defaultdict(list)
        for plane in planes:
            volumes[tuple(plane.tells[name] for name in names)].append(plane)
        unique = all(len({place_of[id(plane)] for plane in found}) == len(found) for found in volumes.values())
        if unique and len(volumes) == most:
            return _one_of(volumes, names, volume)
    raise RefusedError(
        f"duplicate slices: {np.count_nonzero(counts > 1)} of {len(counts)} positions hold up to {most} images, and "
        "nothing in the headers tells them apart"
    )


def arrange(planes: Sequence[Plane]) -> tuple[NDArray[np.float64], list[Plane]]:
    """Return the affine (4, 4) of a volume, voxel (row, column, slice) to world mm, RAS+, and its planes in order.

    Slices are ordered along the normal of their plane. Where they are tilted against their direction by more than
    rounding, the affine is sheared, and it is for the caller to refuse it (``tilt_degrees``).

    Raises:
        RefusedError: one slice only, missing slices, or a variable slice distance; the message names the gap.
    """
    _check_alike(planes)
    if len(planes) == 1:
        raise RefusedError("one slice only")
    normal = np.cross(*planes[0].orientation)
    ordered = sorted(planes, key=lambda plane: float(plane.position @ normal))
    positions = np.stack([plane.position for plane in ordered])
    along = positions @ normal
    step = (positions[-1] - positions[0]) / (len(ordered) - 1)
    _check_gaps(along)
    drift = positions - positions[0] - np.outer(along - along[0], normal)  # (K, 3) mm within the plane
    if np.abs(drift).max() <= MAX_OFF_GRID_MM:
        step = normal * (step @ normal)
    else:
        off = np.linalg.norm(drift - np.linspace(0, 1, len(ordered))[:, None] * drift[-1], axis=1)
        if off.max() > MAX_OFF_GRID_MM + 0.01 * np.linalg.norm(step):
            raise RefusedError(f"slices shifted sideways: one lies {off.max():.1f} mm off the line of the others")
    affine = np.eye(4)
    affine[:3, 0] = ordered[0].orientation[0] * ordered[0].spacing_mm[0]
    affine[:3, 1] = ordered[0].orientation[1] * ordered[0].spacing_mm[1]
    affine[:3, 2] = step
    affine[:3, 3] = positions[0]
    affine[:2] *= -1  # LPS to RAS
    return affine, ordered


def _check_gaps(along: NDArray[np.float64]) -> None:
    gaps = np.diff(along)
    usual = float(statistics.median_low(gaps.tolist()))
    step = float(along[-1] - along[0]) / len(gaps)
    off = np.abs(along - np.linspace(along[0], along[-1], len(along))).max()
    if usual > 0 and off <= min(MAX_OFF_GRID_MM, 0.2 * step) and np.abs(gaps - usual).max() <= 0.5 * usual:
        return
    whole = np.round(gaps / max(usual, 1e-9))
    wide = np.flatnonzero(whole > 1)
    if usual > 0 and np.abs(gaps - whole * usual).max() <= max(2 * MAX_OFF_GRID_MM, 0.02 * usual) and whole.min() >= 1:
        first = int(wide[0])
        more = f" (the first of {len(wide)} such gaps)" if len(wide) > 1 else ""
        raise RefusedError(
            f"missing slices: a gap of {gaps[first]:.2f} mm after slice {first + 1} of {len(along)}{more}, where "
            f"others are {usual:.2f} mm apart"
        )
    first = int(np.abs(gaps - usual).argmax())
    raise RefusedError(
        f"variable slice distance: {gaps.min():.2f} to {gaps.max():.2f} mm, {usual:.2f} mm in the median; "
        f"{gaps[first]:.2f} mm after slice {first + 1} of {len(along)}"
    )


def _check_alike(planes: Sequence[Plane]) -> None:
    """Raise unless all planes have one orientation, matrix and pixel spacing."""
    first = planes[0]
    turned = [plane for plane in planes if np.abs(plane.orientation - first.orientation).max() > SAME_DIRECTION]
    if turned:
        counts = Counter(tuple(np.round(plane.orientation, 2).ravel().tolist()) for plane in planes)
        raise RefusedError(f"mixed orientations: {max(len(counts), 2)} in {len(planes)} slices (a localiser?)")
    if len({plane.shape for plane in planes}) > 1:
        sizes = Counter(f"{plane.shape[0]}x{plane.shape[1]}" for plane in planes)
        raise RefusedError(
            "mixed matrix sizes: " + ", ".join(f"{count} of {size}" for size, count in sizes.most_common())
        )
    spacings = np.array([plane.spacing_mm for plane in planes])
    if np.abs(spacings / spacings[0] - 1).max() > 1e-3:
        low, high = spacings.min(axis=0), spacings.max(axis=0)
        raise RefusedError(
            f"mixed pixel spacing: {low[0]:.4g}x{low[1]:.4g} to {high[0]:.4g}x{high[1]:.4g} mm in one series"
        )


def _one_of(
    volumes: dict[tuple[str, ...], list[Plane]], names: tuple[str, ...], volume: int | None
) -> tuple[list[Plane], str]:
    """Return the planes of one volume and what marks it, or refuse."""
    values = sorted(volumes, key=lambda found: [_natural(value) for value in found])
    marks = [" and ".join(value or "none" for value in found) for found in values]
    if volume is not None and 0 <= volume < len(values):
        return volumes[values[volume]], f"{' and '.join(names)} {marks[volume]}"
    shown = ", ".join(marks[:4]) + (", ..." if len(marks) > 4 else "")
    chosen = "--volume I (from 0) takes one" if volume is None else f"--volume {volume} is none of them"
    raise RefusedError(f"{len(values)} volumes in one series ({' and '.join(names)}: {shown}); {chosen}")


def _natural(value: str) -> tuple[int, float, str]:
    """Return a key that sorts numbers by value, before all words."""
    try:
        return 0, float(value), ""
    except ValueError:
        return 1, 0.0, value


def _read_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise RefusedError(f"cannot be opened: {error.strerror}") from error


def decode_plane(plane: Plane) -> NDArray[Any]:
    """Return the stored values of one plane, (rows, columns); raises RefusedError where they cannot be decoded."""
    return _frame(_decode(_read_bytes(plane.file)), plane)


def _decode(data: bytes) -> NDArray[Any]:
    """Return the stored values of a file, (rows, columns) or (frames, rows, columns)."""
    pydicom: Any = import_module("pydicom")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = pydicom.dcmread(io.BytesIO(data), force=True)
            if "PixelData" not in dataset:
                raise RefusedError("no pixel data")
            if not getattr(dataset, "file_meta", None) or "TransferSyntaxUID" not in dataset.file_meta:
                dataset.file_meta = pydicom.dataset.FileMetaDataset()
                little = (
                    pydicom.uid.ExplicitVRLittleEndian if _explicit(dataset) else pydicom.uid.ImplicitVRLittleEndian
                )
                dataset.file_meta.TransferSyntaxUID = little
            return np.asarray(dataset.pixel_array)
    except RefusedError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        if "less than" in text or "end of" in text.lower() or isinstance(error, EOFError):
            raise RefusedError(f"truncated pixel data: {text}") from error
        raise RefusedError(f"damaged pixel data: {text or type(error).__name__}") from error


def _explicit(dataset: Any) -> bool:
    return not dataset.original_encoding[0]


def _frame(frames: NDArray[Any], plane: Plane) -> NDArray[Any]:
    image = frames[plane.frame] if frames.ndim == 3 else frames
    if image.shape != plane.shape[::-1]:
        raise RefusedError(f"truncated pixel data: {image.shape[1]}x{image.shape[0]} pixels decoded")
    return np.asarray(image)


def _values(stored: NDArray[Any], plane: Plane, modality: str) -> tuple[NDArray[np.float32], str | None]:
    """Return the values of a plane in HU or rescaled, and a note."""
    if plane.rescale is None and modality == "ct":
        raise RefusedError("CT without RescaleSlope and RescaleIntercept: its values cannot be turned to HU")
    slope, intercept = plane.rescale or (1.0, 0.0)
    values = stored.astype(np.float32) * np.float32(slope) + np.float32(intercept)
    if modality != "ct" or plane.padding is None:
        return values, None
    low, high = (_as_stored(value, stored.dtype) for value in plane.padding)
    hu_low, hu_high = sorted((low * slope + intercept, high * slope + intercept))
    if hu_high >= _HU[0] and hu_low <= _HU[1]:
        return values, f"PixelPaddingValue means {hu_low:g} HU, a value of tissue; it is not taken for padding"
    values[(stored >= min(low, high)) & (stored <= max(low, high))] = PADDING_HU
    return values, None


def _as_stored(value: int, kind: np.dtype[Any]) -> int:
    """Return a padding value as pixels hold it: some headers write it unsigned where the pixels are signed."""
    return value - (1 << 16) if kind == np.int16 and value > np.iinfo(np.int16).max else value
