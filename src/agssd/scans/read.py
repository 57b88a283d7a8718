"""Reading one scan: its voxels, its place in the world, and a reason where it cannot be used.

NIfTI is read by nibabel, NRRD and MetaImage by SimpleITK, DICOM by pydicom (``dicom/volume.py``).
"""

from __future__ import annotations

import gzip
import hashlib
import stat
import zlib
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agssd.scans.case import RefusedError
from agssd.scans.dicom.series import Series, series_at, series_reason
from agssd.scans.preparing.angles import MAX_SHEAR_VOXELS, nearest_square, shear_degrees, voxels_apart
from agssd.scans.sources.files import READABLE, REFUSED, data_files, holds_dicom, lacks_data, suffix_of

MIN_SPACING_MM = 0.01
MAX_SPACING_MM = 100.0
MAX_EXTENT_MM = 4000.0  # along one axis
_TAKEN = "one of several volumes is taken:"
_ROUNDING_VOXELS = 0.01  # below this the axes are left as they are


@dataclass
class Scan:
    """A 3D image as its file orders it.

    Attributes:
        array: (I, J, K), float32, or the integer type of the file where no scaling applies.
        affine: (4, 4) float64, voxel (i, j, k, 1) to world mm, RAS+.
        sha256: of the bytes of the file (header and data one after another where they are two), of a DICOM series over
            the sorted hashes of its files, whatever their names; where one of several volumes is taken, of that and
            its number.
        modality: what the header says, "ct" or "mri", or None.
        notes: what the user should know.
    """

    array: NDArray[Any]
    affine: NDArray[np.float64]
    sha256: str
    modality: str | None
    notes: tuple[str, ...]


def read_scan(
    path: Path,
    volume: int | None = None,
    series: Series | None = None,
    sheared: bool = False,
    seen: list[Scan] | None = None,
) -> Scan:
    """Return a 3D image.

    Args:
        path: a file, or a DICOM file or folder that holds one series.
        volume: which volume, from 0, where there are several; a 3D image is taken as it is.
        series: the DICOM series at ``path``, where it is known already.
        sheared: take axes that are not at right angles, too.
        seen: gets the image once it is decoded, also one that is refused then for its affine or its values.

    Axes that are not at right angles are taken as right-angled, with a note, where that moves nothing by more than half
    a voxel (``MAX_SHEAR_VOXELS``).

    Raises:
        RefusedError: the file is missing, empty, truncated, damaged, not 3D, coloured, complex, has no usable
            geometry, or holds NaN, infinite or only equal values; or the slices of a DICOM series are no volume.
    """
    try:
        if series is None and holds_dicom(path):
            series = series_at(path)
        if series is not None:
            return _read_series(series, volume, sheared, seen)
        digest = hashlib.sha256()
        files = data_files(path)
        for file in files:
            facts = file.stat()
            if not stat.S_ISREG(facts.st_mode):
                raise RefusedError("no regular file")
            if facts.st_size == 0:
                raise RefusedError("empty file")
            digest.update(file.read_bytes())
    except OSError as error:
        raise RefusedError(f"cannot be opened: {error.strerror}") from error
    suffix = suffix_of(path)
    if suffix in (".nii", ".nii.gz", ".img", ".img.gz"):
        array, affine, modality, notes = _read_nifti(path, files, volume)
    elif suffix in READABLE:
        array, affine, modality, notes = _read_itk(path, volume)
    else:
        raise RefusedError(_why_not_read(path, suffix))
    sha256 = digest.hexdigest()
    if any(note.startswith(_TAKEN) for note in notes):
        sha256 = hashlib.sha256(f"{sha256} volume {volume}".encode()).hexdigest()
    scan = Scan(array, affine, sha256, modality, tuple(notes))
    if seen is not None:
        seen.append(scan)
    scan.affine, squared = _checked_affine(affine, array.shape, sheared)
    scan.notes += squared
    _check_extent(array.shape, affine)
    _check_values(array)
    return scan


def _why_not_read(path: Path, suffix: str) -> str:
    with path.open("rb") as file:
        start = file.read(8)
    if suffix in (".hdr", ".hdr.gz"):
        return "a header; name its .img"
    if suffix not in REFUSED and start == b"\x89HDF\r\n\x1a\n":
        return "an HDF5 file, such as an agssd cache, is no scan"
    return REFUSED.get(suffix, f"files of type {suffix or 'without extension'} are not read")


def _read_series(series: Series, volume: int | None, sheared: bool, seen: list[Scan] | None) -> Scan:
    from agssd.scans.dicom.volume import read_series

    try:
        array, affine, sha256, notes = read_series(series.files, series.modality, volume)
        if series.pet:
            notes.append("PET, stored as MRI is: by percentiles of its own values, without SUV")
        scan = Scan(array, affine, sha256, series.modality, (*notes, *series.notes))
        if seen is not None:
            seen.append(scan)
        tilt = "gantry tilt: slices are stacked {:.1f} degrees off their normal"
        scan.affine, squared = _checked_affine(affine, array.shape, sheared, tilt)
        scan.notes += squared
        _check_extent(array.shape, affine)
        _check_values(array)
    except RefusedError as error:
        raise RefusedError(series_reason(series.files, str(error))) from error
    return scan


def _read_nifti(
    path: Path, files: list[Path], volume: int | None
) -> tuple[NDArray[Any], NDArray[np.float64], str | None, list[str]]:
    nib: Any = import_module("nibabel")
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError
    from nibabel.wrapstruct import WrapStructError

    try:
        image: Any
        if len(files) == 1 and suffix_of(path) in (".img", ".img.gz"):
            raise RefusedError("an .img without its .hdr")
        if len(files) == 2:
            image = nib.load(path, mmap=False)
        else:
            data = path.read_bytes()
            if data[:2] == b"\x1f\x8b":
                data = gzip.decompress(data)  # to the end, so that its checksum is verified
            _check_header(data)
            image = (nib.Nifti2Image if _is_nifti2(data) else nib.Nifti1Image).from_bytes(data)
        if not isinstance(image, nib.Nifti1Pair):
            raise RefusedError("Analyze 7.5 has no orientation, so left and right are unknown; convert it to NIfTI")
        shape, taken, note = _choose_volume(image.shape, volume)
        kind = image.get_data_dtype()
        if kind.names is not None:
            raise RefusedError("a colour image")
        if kind.kind not in "iuf":
            raise RefusedError(f"voxels of type {kind} are not read")
        stored = image.dataobj[taken]
        array = stored if _unscaled(image) else np.asarray(stored, dtype=np.float64)
        return array.reshape(shape), _nifti_affine(image), None, _nifti_notes(image) + note
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise RefusedError(f"truncated or damaged: {error}") from error
    except (ImageFileError, HeaderDataError, WrapStructError) as error:
        raise RefusedError(f"no valid NIfTI header: {_first_line(error)}") from error
    except RefusedError:
        raise
    except (OSError, ValueError, TypeError, MemoryError) as error:
        raise RefusedError(f"truncated or damaged: {_first_line(error)}") from error


def read_geometry(path: Path) -> tuple[tuple[int, ...], NDArray[np.float64]]:
    """Return shape (I, J, K) and affine of a file from its header alone; raises RefusedError as ``read_scan``."""
    try:
        if holds_dicom(path):
            from agssd.scans.dicom.planes import read_planes
            from agssd.scans.dicom.volume import arrange, choose_volume

            affine, planes = arrange(choose_volume(read_planes(series_at(path).files))[0])
            return (*planes[0].shape, len(planes)), affine
        if suffix_of(path) in (".nii", ".nii.gz", ".img", ".img.gz"):
            nib: Any = import_module("nibabel")
            image = nib.load(path)
            return _choose_volume(image.shape, 0)[0], _nifti_affine(image)
        sitk: Any = import_module("SimpleITK")
        reader = sitk.ImageFileReader()
        reader.SetFileName(str(path))
        reader.ReadImageInformation()
        return _choose_volume(reader.GetSize(), 0)[0], _itk_affine(reader)
    except RefusedError:
        raise
    except Exception as error:
        raise RefusedError(f"its header cannot be read: {_first_line(error)}") from error


def canonical_geometry(path: Path) -> tuple[tuple[int, ...], NDArray[np.float64]]:
    """Return shape and affine of a file as they will be in canonical orientation (R, A, S), from its header alone."""
    orientations: Any = import_module("nibabel.orientations")
    shape, affine = read_geometry(path)
    order = orientations.io_orientation(affine)
    back = orientations.inv_ornt_aff(order, shape)
    return tuple(shape[int(axis)] for axis in np.argsort(order[:, 0])), np.asarray(affine @ back, dtype=np.float64)


def _itk_affine(image: Any) -> NDArray[np.float64]:
    """Return the affine of a SimpleITK image or reader of 3 dimensions or more, turned from LPS to RAS."""
    direction = np.asarray(image.GetDirection()).reshape(image.GetDimension(), -1)[:3, :3]
    affine = np.eye(4)
    affine[:3, :3] = direction * np.asarray(image.GetSpacing()[:3])
    affine[:3, 3] = image.GetOrigin()[:3]
    affine[:2] *= -1
    return affine


def _check_header(data: bytes) -> None:
    """Refuse what is no NIfTI file in one piece, before nibabel tries to mend it."""
    size = 540 if _is_nifti2(data) else 348
    if len(data) < size:
        raise RefusedError(f"cut off within its header: {len(data)} bytes, of which the header alone takes {size}")
    if size == 348 and data[:4] not in (b"\x5c\x01\x00\x00", b"\x00\x00\x01\x5c"):
        raise RefusedError("no NIfTI file: its header does not begin with its size")
    mark = data[4:8] if size == 540 else data[344:348]
    if mark[:3] not in (b"n+1", b"n+2"):
        text = mark.rstrip(b"\0").decode("ascii", "replace")
        raise RefusedError(f"no NIfTI file: its mark is {text!r}, not 'n+1' or 'n+2'")


def _is_nifti2(data: bytes) -> bool:
    return data[:4] in (b"\x1c\x02\x00\x00", b"\x00\x00\x02\x1c")


def _unscaled(image: Any) -> bool:
    slope, intercept = image.dataobj.slope, image.dataobj.inter
    return bool(slope == 1.0 and intercept == 0.0)


def _nifti_affine(image: Any) -> NDArray[np.float64]:
    """Return the sform where its code is set, else the qform, in mm whatever the header's unit of length."""
    factor = {"meter": 1000.0, "micron": 0.001}.get(image.header.get_xyzt_units()[0], 1.0)
    affine = np.array(image.affine, dtype=np.float64)
    affine[:3] *= factor
    return affine


def _nifti_notes(image: Any) -> list[str]:
    header = image.header
    notes = []
    if header.get_xyzt_units()[0] in ("meter", "micron"):
        notes.append(f"lengths in the header are in {header.get_xyzt_units()[0]}; converted to mm")
    sform, qform = int(header["sform_code"]), int(header["qform_code"])
    if sform == 0 and qform == 0:
        notes.append("the header gives no orientation (sform and qform codes 0); NIfTI's default is used")
    elif sform > 0 and qform > 0:
        corners = np.array([[i, j, k, 1] for i in (0, 1) for j in (0, 1) for k in (0, 1)], dtype=np.float64)
        corners[:, :3] *= np.array(image.shape[:3]) - 1
        try:
            gap = np.abs(corners @ (header.get_sform() - header.get_qform()).T).max()
        except ValueError:
            return [*notes, "the qform is invalid; the sform is used"]
        if np.linalg.det(header.get_sform()[:3, :3]) * np.linalg.det(header.get_qform()[:3, :3]) < 0:
            notes.append("sform and qform differ in handedness: one of them swaps left and right; the sform is used")
        elif gap > 0.5 * min(header.get_zooms()[:3]):
            notes.append(f"sform and qform disagree by up to {gap:.1f} mm; the sform is used")
    return notes


def _read_itk(path: Path, volume: int | None) -> tuple[NDArray[Any], NDArray[np.float64], str | None, list[str]]:
    sitk: Any = import_module("SimpleITK")

    if lacks_data(path):
        raise RefusedError("the data file that its header names is missing")
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise RefusedError(f"truncated or damaged: {_itk_reason(error)}") from error
    meta = {key: reader.GetMetaData(key) for key in reader.GetMetaDataKeys()}
    if reader.GetNumberOfComponents() > 1:
        raise RefusedError(f"{reader.GetNumberOfComponents()} values per voxel (colour or vectors)")
    if "complex" in sitk.GetPixelIDValueAsString(reader.GetPixelID()):
        raise RefusedError("complex voxels are not read")
    if any(key.startswith("Seq_Frame") for key in meta) and reader.GetDimension() > 2:
        raise RefusedError(
            "a sequence of tracked 2D frames: its third axis is time, not space; --modality us takes its frames"
        )
    shape, taken, note = _choose_volume(reader.GetSize(), volume)
    try:
        image = reader.Execute()
    except RuntimeError as error:
        raise RefusedError(f"truncated or damaged: {_itk_reason(error)}") from error
    array = sitk.GetArrayFromImage(image).transpose()[taken].reshape(shape)
    affine = _itk_affine(image)
    stated = (meta.get("Modality", "") + meta.get("modality", "")).upper()
    modality = "ct" if stated in ("MET_MOD_CT", "CT") else "mri" if stated in ("MET_MOD_MR", "MR", "MRI") else None
    notes = note
    if suffix_of(path) in (".nrrd", ".nhdr") and "NRRD_space" not in meta:
        notes.append("the header names no space; ITK's (left, posterior, superior) is assumed")
    return array, affine, modality, notes


def _itk_reason(error: RuntimeError) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    useful = [line for line in lines if "trouble" not in line and "SimpleITK" not in line and "reading" not in line]
    text = useful[-1] if useful else lines[-1] if lines else "unknown"
    return "its data end too early" if "No such file" in text else text.split("] ")[-1][:200]


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _choose_volume(
    shape: tuple[int, ...], volume: int | None
) -> tuple[tuple[int, int, int], tuple[slice | int, ...], list[str]]:
    """Return the axes of one volume, the index that takes it, and a note where it is one of several.

    Further axes of length 1 are dropped.
    """
    size = tuple(int(n) for n in shape)
    if any(n < 1 for n in size):
        raise RefusedError(f"an empty image of shape {_times(size)}")
    while len(size) > 3 and size[-1] == 1:
        size = size[:-1]
    if len(size) > 4:
        raise RefusedError(f"{len(size)}D image ({_times(size)}); save one 3D volume of it")
    if len(size) < 3:
        raise RefusedError(f"2D image ({_times(size)})")
    if min(size[:3]) == 1:
        raise RefusedError(f"single slice ({_times(size)})")
    taken: list[slice | int] = [slice(None)] * 3 + [0] * (len(shape) - 3)
    notes = []
    if len(size) == 4:
        if volume is None:
            raise RefusedError(f"4D image ({_times(size)}); --volume I (from 0) takes one of its {size[3]} volumes")
        if not 0 <= volume < size[3]:
            raise RefusedError(f"4D image ({_times(size)}); --volume {volume} is none of its {size[3]} volumes")
        taken[3] = volume
        notes.append(f"{_TAKEN} {volume} of {size[3]}")
    return (size[0], size[1], size[2]), tuple(taken), notes


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(str(n) for n in shape)


def _checked_affine(
    affine: NDArray[np.float64],
    shape: tuple[int, ...],
    sheared: bool,
    reason: str = "sheared affine: two axes are {:.1f} degrees off a right angle (gantry tilt?)",
) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """Return the affine, at right angles where that moves no voxel far, and a note if so; refuse what is no grid."""
    axes = affine[:3, :3]
    if not np.isfinite(affine).all():
        raise RefusedError("its affine has NaN or infinite entries")
    spacing = np.sqrt((axes**2).sum(axis=0))
    if spacing.min() == 0:
        raise RefusedError(f"its affine is degenerate: the spacing along axis {int(spacing.argmin()) + 1} is 0")
    if abs(np.linalg.det(axes / np.maximum(spacing, 1e-30))) < 1e-3:
        raise RefusedError("its affine is degenerate: the axes do not span space")
    if spacing.min() < MIN_SPACING_MM or spacing.max() > MAX_SPACING_MM:
        text = " x ".join(f"{value:.3g}" for value in spacing)
        raise RefusedError(f"its spacing of {text} mm is outside {MIN_SPACING_MM} to {MAX_SPACING_MM} mm")
    square = nearest_square(affine, shape)
    moved = voxels_apart(square, affine, shape)
    if moved <= _ROUNDING_VOXELS:
        return affine, ()
    degrees = shear_degrees(affine)
    if moved <= MAX_SHEAR_VOXELS:
        note = f"axes {degrees:.2f} degrees off a right angle are taken as right-angled: {moved:.2f} voxels off"
        return square, (note,)
    if not sheared:
        raise RefusedError(f"{reason.format(degrees)}, {moved:.1f} voxels at a corner; --unshear resamples it")
    return affine, ()


def _check_extent(shape: tuple[int, ...], affine: NDArray[np.float64]) -> None:
    extent = np.asarray(shape) * np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    if extent.max() > MAX_EXTENT_MM:
        text = " x ".join(f"{value:.0f}" for value in extent)
        raise RefusedError(f"its field of view of {text} mm is larger than any body ({MAX_EXTENT_MM:.0f} mm)")


def _check_values(array: NDArray[Any]) -> None:
    if array.dtype.kind == "f":
        bad = int(array.size - np.count_nonzero(np.isfinite(array)))
        if bad:
            nan = int(np.count_nonzero(np.isnan(array)))
            kind = "NaN" if nan == bad else "NaN or infinite" if nan else "infinite"
            raise RefusedError(f"{bad} voxels are {kind}")
    low, high = array.min(), array.max()
    if low == high:
        raise RefusedError("all voxels are 0" if low == 0 else f"constant: all voxels are {float(low):g}")
    if max(abs(float(low)), abs(float(high))) > 1e30:
        raise RefusedError(f"values from {float(low):g} to {float(high):g} are no intensities")


def looks_like_labels(array: NDArray[Any]) -> bool:
    """Return whether an image is a label map by its values.

    Integer values, and either at most 8 of them, or at most 4096 in pieces: of the neighbouring voxels that are not
    both background, at least half are equal. In the shared scans label maps have 0.42 to 0.98 and images, 8-bit
    ones included, at most 0.24 (``tests/scans/test_read.py``).
    """
    if array.dtype.kind == "f" and not np.array_equal(array, np.round(array)):
        return False
    values, counts = np.unique(array, return_counts=True)
    if len(values) <= 8:
        return True
    if len(values) > 4096 or values[0] < 0:
        return False
    background = values[counts.argmax()]
    equal = pairs = 0
    for axis in range(3):
        one = array.take(np.arange(array.shape[axis] - 1), axis=axis)
        two = array.take(np.arange(1, array.shape[axis]), axis=axis)
        inside = (one != background) | (two != background)
        pairs += int(np.count_nonzero(inside))
        equal += int(np.count_nonzero(inside & (one == two)))
    return equal >= 0.5 * max(pairs, 1)
