"""Voxels to look at, of scans that are readable but are no single volume: 4D and more, several or missing slices.

What is shown is the first volume, or the first channel, and of DICOM the slices in their order as if none were missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from agssd.scans.read import Scan
from agssd.scans.sources.files import holds_dicom, suffix_of

if TYPE_CHECKING:
    from agssd.scans.dicom.series import Series


def preview(path: Path, series: Series | None = None) -> Scan | None:
    """Return what can be drawn of a scan that the reader refuses before it decodes it, or None if nothing can.

    Args:
        path: of the scan.
        series: the DICOM series at ``path``, or None.
    """
    try:
        if series is not None or holds_dicom(path):
            from agssd.scans.dicom.series import series_at

            array, affine = _of_series((series or series_at(path)).files)
        elif suffix_of(path) in (".nii", ".nii.gz", ".img", ".img.gz"):
            array, affine = _of_nifti(path)
        else:
            array, affine = _of_itk(path)
    except Exception:  # whatever is wrong with it has been said by the reader already
        return None
    return Scan(array, affine, "", None, ())


def _of_nifti(path: Path) -> tuple[NDArray[Any], NDArray[np.float64]]:
    nib: Any = import_module("nibabel")
    image = nib.load(path)
    taken = (slice(None),) * min(3, len(image.shape)) + (0,) * (len(image.shape) - 3)
    array = np.asarray(image.dataobj[taken])
    if array.dtype.names is not None:  # of a colour image, red
        array = array[array.dtype.names[0]]
    return _real(array), np.asarray(image.affine, dtype=np.float64)


def _of_itk(path: Path) -> tuple[NDArray[Any], NDArray[np.float64]]:
    sitk: Any = import_module("SimpleITK")
    image = sitk.ReadImage(str(path))
    if image.GetNumberOfComponentsPerPixel() > 1:
        image = sitk.VectorIndexSelectionCast(image, 0)
    array = sitk.GetArrayFromImage(image).transpose()
    array = _real(array[(..., *(0,) * (array.ndim - 3))])
    direction = np.eye(3)
    size = min(3, image.GetDimension())
    stated = np.asarray(image.GetDirection()).reshape(image.GetDimension(), -1)
    direction[:size, :size] = stated[:size, :size]
    affine = np.eye(4)
    affine[:3, :3] = direction * np.append(image.GetSpacing(), (1.0, 1.0))[:3] * [[-1], [-1], [1]]  # LPS to RAS
    return array, affine


def _of_series(files: Sequence[Path]) -> tuple[NDArray[Any], NDArray[np.float64]]:
    from agssd.scans.dicom.planes import read_planes
    from agssd.scans.dicom.volume import SAME_DIRECTION, SAME_PLACE_MM, decode_plane

    planes = read_planes(files)
    first = planes[0]
    normal = np.cross(*first.orientation)
    places: dict[int, Any] = {}
    for plane in planes:
        if plane.shape == first.shape and np.abs(plane.orientation - first.orientation).max() <= SAME_DIRECTION:
            places.setdefault(round(float(plane.position @ normal) / SAME_PLACE_MM), plane)
    ordered = [plane for _, plane in sorted(places.items())]
    array = np.stack([decode_plane(plane) for plane in ordered], axis=-1).transpose(1, 0, 2)
    gaps = np.diff(sorted(places)) * SAME_PLACE_MM
    affine = np.eye(4)
    affine[:3, 0] = first.orientation[0] * first.spacing_mm[0]
    affine[:3, 1] = first.orientation[1] * first.spacing_mm[1]
    affine[:3, 2] = normal * (np.median(gaps) if len(gaps) else max(first.spacing_mm))
    affine[:2] *= -1  # LPS to RAS
    return array, affine


def _real(array: NDArray[Any]) -> NDArray[Any]:
    """Return magnitudes where an image is complex, and three dimensions where it is a plane."""
    array = np.abs(array) if array.dtype.kind == "c" else array
    return array.reshape(*array.shape, *(1,) * (3 - array.ndim))
