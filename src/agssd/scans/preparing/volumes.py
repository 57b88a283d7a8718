"""From a source file to a case: orientation, spacing, intensity, foreground, constants."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from agssd.scans.case import PreparedCase, RefusedError
from agssd.scans.dicom.series import Series
from agssd.scans.preparing.angles import MAX_SHEAR_VOXELS, nearest_square, perpendicular, shear_degrees, voxels_apart
from agssd.scans.preparing.foreground import constant_background, ct_foreground, mri_foreground, stripped_foreground
from agssd.scans.preparing.label_groups import LabelGroups, grouped
from agssd.scans.preparing.perceptual import perceptual_hash
from agssd.scans.read import Scan, looks_like_labels, read_scan
from agssd.types import Triple

DEFAULT_SPACING_MM = {"ct": 1.5, "mri": 1.0}
CT_CLIP_HU = (-1024.0, 3071.0)
CT_RANGE_HU = (-1000.0, 1000.0)
MRI_PERCENTILES = (0.05, 99.95)
MRI_STEPS = 4095  # grey values of an MRI that is not stored exactly: 12 bits, as scanners deliver
SAME_SPACING = 1e-3  # relative difference below which a grid is kept as it is
# Two grids kept at one target may lie on both sides of it; the rest is rounding.
SPACING_TOLERANCE = 2.5 * SAME_SPACING
MAX_VOXELS = 2**30
_BYTES_PER_VOXEL = 24  # while a scan is prepared: float32 copies of torchio and SimpleITK, masks and edges

Spacing = tuple[float, float, float]


@dataclass(frozen=True)
class Recipe:
    """How scans are prepared.

    Attributes:
        spacing_mm: of the stored voxels (D, H, W), or None for ``DEFAULT_SPACING_MM`` of the modality.
        unshear: resample grids without right angles (gantry tilt) instead of refusing them, where taking them for
            right-angled would move a voxel by more than half a voxel.
        label_groups: label values that make up class 1, class 2, ... of the stored maps; None keeps values as they are.
    """

    spacing_mm: Spacing | None = None
    unshear: bool = False
    label_groups: LabelGroups | None = None


@dataclass
class Volume:
    """An array (I, J, K) with its affine, in canonical orientation (R, A, S increasing)."""

    array: NDArray[Any]
    affine: NDArray[np.float64]


def prepare_case(
    paths: Sequence[Path],
    label: Path | None = None,
    modality: str | None = None,
    recipe: Recipe | None = None,
    series: Series | None = None,
    volume: int | None = None,
    seen: list[Scan] | None = None,
) -> PreparedCase:
    """Return a scan made ready for the cache.

    Args:
        paths: the file, or one file per channel, all on one grid.
        label: file of the label map on the same grid, or None.
        modality: "ct", "mri", or None to decide by header and intensity range.
        recipe: how to prepare it.
        series: the DICOM series that the one path stands for, or None.
        volume: which volume, from 0, of files and series that hold several.
        seen: gets every image once it is decoded, also of a scan that is refused then; for who wants to look at it.

    Raises:
        RefusedError: a file cannot be used; the message is the reason.
    """
    recipe = recipe or Recipe()
    scans = [_read_image(path, volume, series, recipe.unshear, seen) for path in paths]
    first = right_angled(canonical(scans[0]))
    volumes = [first] + [
        _on_same_grid(right_angled(canonical(scan)), first, path)
        for scan, path in zip(scans[1:], paths[1:], strict=True)
    ]
    reason = None
    if modality is None:
        modality, reason = guess_modality(scans[0])
    if modality == "ct":
        _check_hounsfield(first.array)
        for item in volumes:  # padding far below air must not be mixed into what lies beside it
            item.array = np.maximum(item.array, CT_CLIP_HU[0])
    labels = None if label is None else _read_label(label, first, recipe)

    target = recipe.spacing_mm or (DEFAULT_SPACING_MM[modality],) * 3
    grid = target_grid(first, (target[2], target[1], target[0]))
    moved = [resample(volume, grid) for volume in volumes]
    arrays = [_tensor_order(volume.array) for volume in moved]
    spacing = _spacing(moved[0].affine)
    if modality == "ct":
        clipped = [np.clip(array, *CT_CLIP_HU) for array in arrays]
        foreground = ct_foreground(clipped[0])
        if not foreground.any():
            raise RefusedError("no body found: no voxel is above -500 HU")
        image = np.stack([np.round(array) for array in clipped]).astype(np.int16)
        count = len(arrays)
        scale, offset = (1.0,) * count, (0.0,) * count
        low, high = (CT_RANGE_HU[0],) * count, (CT_RANGE_HU[1],) * count
    else:
        foreground = _foreground_of_mri(volumes[0], moved[0], grid, spacing)
        stored = [store_by_percentiles(array, foreground) for array in arrays]
        image = np.stack([channel for channel, *_ in stored])
        scale, offset = tuple(item[1] for item in stored), tuple(item[2] for item in stored)
        low, high = tuple(item[3] for item in stored), tuple(item[4] for item in stored)
    label_array = None if labels is None else _tensor_order(resample(labels, grid, nearest=True).array)
    return PreparedCase(
        image=image,
        foreground=foreground,
        label=label_array,
        modality=modality,
        spacing_mm=spacing,
        affine=moved[0].affine[:, [2, 1, 0, 3]],
        source_shape=cast("Triple", tuple(int(n) for n in scans[0].array.shape)),
        source_affine=scans[0].affine,
        source_sha256=_digest([scan.sha256 for scan in scans]),
        scale=scale,
        offset=offset,
        low=low,
        high=high,
        edge_q99=edge_constants(image, scale, offset, foreground, spacing, modality == "ct"),
        perceptual_hash=perceptual_hash(
            image[0], foreground, (low[0] - offset[0]) / scale[0], (high[0] - offset[0]) / scale[0]
        ),
        modality_reason=reason,
        notes=tuple(note for scan in scans for note in (*scan.notes, *_about_shear(scan))),
    )


def guess_modality(scan: Scan) -> tuple[str, str]:
    """Return "ct" or "mri" and why: the header where it says so, else air near -1000 HU.

    A CT without air (a crop of soft tissue) is taken for MRI; say ``--modality ct`` for such.
    """
    if scan.modality is not None:
        return scan.modality, "its header says so"
    array = scan.array
    air = np.count_nonzero(array <= -900) / array.size
    above = np.count_nonzero(array > 8000) / array.size
    if air >= 0.005 and above < 0.001:
        return "ct", "it has air near -1000 HU"
    return "mri", "it has no air near -1000 HU"


def canonical(scan: Scan) -> Volume:
    """Return the scan with its axes flipped and exchanged so that they run most nearly to R, A and S."""
    import torch

    torchio: Any = import_module("torchio")
    array = np.ascontiguousarray(scan.array, dtype=np.float32)
    image = torchio.ToCanonical()(torchio.ScalarImage(tensor=torch.from_numpy(array)[None], affine=scan.affine))
    return Volume(image.data[0].numpy(), np.asarray(image.affine, dtype=np.float64))


def right_angled(volume: Volume, nearest: bool = False) -> Volume:
    """Return the volume on a right-angled grid that holds all of it; itself where it lies on one within half a voxel.

    The axes are made perpendicular in the order of their spacing, the finest first (Gram-Schmidt). Slices of a tilted
    gantry thus stay what they are and are shifted within their planes; their distance becomes that along the normal.
    What lies outside the source gets its lowest value, or 0 with ``nearest``.
    """
    from scipy.ndimage import affine_transform

    if not _is_sheared(volume.affine, volume.array.shape):
        return volume
    axes = volume.affine[:3, :3]
    order = np.argsort(np.linalg.norm(axes, axis=0), kind="stable")
    affine = np.eye(4)
    affine[:3, :3] = perpendicular(axes, order)
    old_size = np.asarray(volume.array.shape)
    corners = np.array([[i, j, k, 1] for i in (0, 1) for j in (0, 1) for k in (0, 1)], dtype=np.float64)
    corners[:, :3] *= old_size - 1
    inside = corners @ (np.linalg.inv(affine) @ volume.affine).T  # in voxels of the new axes, of unknown origin
    low, high = inside[:, :3].min(axis=0), inside[:, :3].max(axis=0)
    affine[:3, 3] = (affine @ np.append(low, 1.0))[:3]
    to_old = np.linalg.inv(volume.affine) @ affine
    moved = affine_transform(
        volume.array,
        to_old[:3, :3],
        to_old[:3, 3],
        output_shape=tuple(np.ceil(high - low - 1e-6).astype(int) + 1),
        order=0 if nearest else 1,
        mode="constant",
        cval=0.0 if nearest else float(volume.array.min()),
    )
    return Volume(moved, affine)


@dataclass(frozen=True)
class Grid:
    """Shape (I, J, K) and affine of the stored voxels in canonical orientation; ``keep`` where nothing moves."""

    shape: Triple
    affine: NDArray[np.float64]
    keep: bool


def target_grid(volume: Volume, spacing_mm: Spacing) -> Grid:
    """Return the grid of a spacing that has the volume's centre and directions and does not reach beyond it.

    Args:
        volume: in canonical orientation.
        spacing_mm: wanted spacing along the volume's axes (I, J, K). An axis that has it within 0.1 % keeps its own.
    """
    old = np.sqrt((volume.affine[:3, :3] ** 2).sum(axis=0))
    new = np.where(np.abs(old / np.asarray(spacing_mm) - 1) < SAME_SPACING, old, spacing_mm)
    size = np.asarray(volume.array.shape)
    shape = np.maximum(np.floor(size * old / new + 1e-3), 1).astype(int)
    told = f"{'x'.join(map(str, shape))} voxels at this spacing"
    if shape.astype(float).prod() > MAX_VOXELS:
        raise RefusedError(f"{told} are too many; choose a larger --spacing-mm")
    _check_memory(float(shape.astype(float).prod()), told)
    if shape.min() < 2:
        raise RefusedError(f"{told} are too thin; choose a smaller --spacing-mm")
    affine = volume.affine.copy()
    affine[:3, :3] = volume.affine[:3, :3] / old * new
    centre = volume.affine @ np.append((size - 1) / 2, 1.0)
    affine[:3, 3] = centre[:3] - affine[:3, :3] @ ((shape - 1) / 2)
    return Grid((int(shape[0]), int(shape[1]), int(shape[2])), affine, keep=bool(np.array_equal(old, new)))


def _check_memory(voxels: float, told: str) -> None:
    """Raise MemoryError before the system would have to kill a process, where the system tells what is available."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return
    if voxels * _BYTES_PER_VOXEL > available:
        needed = voxels * _BYTES_PER_VOXEL / 2**30
        raise MemoryError(
            f"{told} need about {needed:.1f} GiB and {available / 2**30:.1f} GiB are available; use fewer --workers or "
            "a larger --spacing-mm"
        )


def same_spacing(one: Spacing, two: Spacing) -> bool:
    """Return whether two stored spacings belong to one target, that is, differ by at most 0.25 % along every axis."""
    return bool(np.allclose(one, two, rtol=SPACING_TOLERANCE, atol=0))


def resample(volume: Volume, grid: Grid, nearest: bool = False) -> Volume:
    """Return the volume on another grid: linear after a Gaussian where voxels grow, or nearest neighbour.

    Source: torchio's ``Resample`` with its anti-aliasing (Cardoso et al., MICCAI 2015).
    """
    import torch

    torchio: Any = import_module("torchio")
    if grid.keep:
        return volume
    kind = torchio.LabelMap if nearest else torchio.ScalarImage
    array = np.ascontiguousarray(volume.array)
    # The Gaussian is recursive and needs four voxels along an axis; shorter axes go without.
    antialias = not nearest and min(array.shape) >= 4
    image = kind(tensor=torch.from_numpy(array)[None], affine=volume.affine)
    moved = torchio.Resample((grid.shape, grid.affine), antialias=antialias)(image)
    return Volume(moved.data[0].numpy(), grid.affine)


def edge_constants(
    image: NDArray[np.int16],
    scale: tuple[float, ...],
    offset: tuple[float, ...],
    foreground: NDArray[np.uint8],
    spacing_mm: Spacing,
    is_ct: bool,
) -> tuple[float, ...]:
    """Return per channel the 99th percentile over the foreground of the edge map with the body's border suppressed."""
    import torch

    from agssd.transforms.edges import edge_magnitude, suppress_border

    inside = torch.from_numpy(foreground != 0)[None, None]
    spacing = torch.tensor([spacing_mm], dtype=torch.float32)
    constants = []
    for channel, factor, shift in zip(image, scale, offset, strict=True):
        values = torch.from_numpy(channel.astype(np.float32) * np.float32(factor) + np.float32(shift))[None, None]
        edges = suppress_border(edge_magnitude(values, spacing, torch.tensor([is_ct])), inside)
        body = edges[inside].numpy()
        constants.append(float(np.percentile(body, 99)) if body.size else 0.0)
    return tuple(constants)


def _digest(digests: list[str]) -> str:
    """Return the hash of one source, or of the hashes of several channels."""
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _read_image(path: Path, volume: int | None, series: Series | None, sheared: bool, seen: list[Scan] | None) -> Scan:
    scan = read_scan(path, volume, series, sheared, seen)
    if looks_like_labels(scan.array):
        raise RefusedError("looks like a label map; name label files with --labels or in a manifest")
    return scan


def _read_label(path: Path, image: Volume, recipe: Recipe) -> Volume:
    try:
        scan = read_scan(path, sheared=recipe.unshear)
    except RefusedError as error:
        raise RefusedError(f"its label {path}: {error}") from error
    array = scan.array
    if array.dtype.kind == "f" and not np.array_equal(array, np.round(array)):
        raise RefusedError(f"its label {path} holds values that are no integers")
    if array.min() < 0:
        raise RefusedError(f"its label {path} holds values below 0, down to {int(array.min())}")
    if array.max() > np.iinfo(np.int16).max:
        raise RefusedError(f"its label {path} holds values above 32767, up to {int(array.max())}")
    volume = right_angled(canonical(scan), nearest=True)
    volume.array = volume.array.astype(np.uint8 if array.max() < 256 else np.int16)
    if recipe.label_groups is not None:
        volume.array = grouped(volume.array, recipe.label_groups)
    return _on_same_grid(volume, image, path, "its label")


def _on_same_grid(volume: Volume, reference: Volume, path: Path, what: str = "its channel") -> Volume:
    """Return the volume if it lies on the reference's grid within half a voxel at every corner."""
    if volume.array.shape != reference.array.shape:
        ours, theirs = ("x".join(map(str, item.array.shape)) for item in (volume, reference))
        raise RefusedError(f"{what} {path} has shape {ours}, the image has {theirs}")
    gap = voxels_apart(volume.affine, reference.affine, reference.array.shape)
    if gap > 0.5:
        raise RefusedError(f"{what} {path} lies up to {gap:.1f} voxels off the image in space")
    return Volume(volume.array, reference.affine)


def _check_hounsfield(array: NDArray[Any]) -> None:
    if array.min() >= 0:
        raise RefusedError(f"values {array.min():g} to {array.max():g} are not HU: a CT has negative values")


def _foreground_of_mri(source: Volume, moved: Volume, grid: Grid, spacing_mm: Spacing) -> NDArray[np.uint8]:
    background = constant_background(source.array)
    if background is not None:
        mask = stripped_foreground(_tensor_order(source.array), background)
        foreground = _tensor_order(resample(Volume(mask.transpose(2, 1, 0), source.affine), grid, nearest=True).array)
    else:
        foreground = mri_foreground(_tensor_order(moved.array), spacing_mm)
    return foreground if foreground.any() else np.ones_like(foreground)


def store_by_percentiles(
    array: NDArray[np.float32], foreground: NDArray[np.uint8]
) -> tuple[NDArray[np.int16], float, float, float, float]:
    """Return stored values, scale, offset, low and high of one channel, clipped to percentiles of the foreground."""
    low, high = (float(value) for value in np.percentile(array[foreground != 0], MRI_PERCENTILES))
    if high <= low:
        low, high = float(array.min()), float(array.max())
    if high <= low:
        raise RefusedError("constant at this spacing")
    if abs(low) < 32000 and abs(high) < 32000 and np.array_equal(array, np.round(array)):
        low, high = float(np.floor(low)), float(np.ceil(high))
        return np.clip(array, low, high).astype(np.int16), 1.0, 0.0, low, high
    scale = (high - low) / MRI_STEPS
    stored = np.round((np.clip(array, low, high).astype(np.float64) - low) / scale)
    return stored.astype(np.int16), scale, low, low, high


def _about_shear(scan: Scan) -> list[str]:
    if not _is_sheared(scan.affine, scan.array.shape):
        return []
    return [f"axes {shear_degrees(scan.affine):.1f} degrees off a right angle are resampled"]


def _is_sheared(affine: NDArray[np.float64], shape: tuple[int, ...]) -> bool:
    return voxels_apart(nearest_square(affine, shape), affine, shape) > MAX_SHEAR_VOXELS


def _tensor_order(array: NDArray[Any]) -> NDArray[Any]:
    """Return (I, J, K) = (R, A, S) as (D, H, W) = (S, A, R)."""
    return np.ascontiguousarray(array.transpose(2, 1, 0))


def _spacing(affine: NDArray[np.float64]) -> Spacing:
    size = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    return float(size[2]), float(size[1]), float(size[0])
