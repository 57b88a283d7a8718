"""Every file of the shared sets: in the cache at its right place, or refused with its own reason."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from scipy.ndimage import map_coordinates

from agssd.scans.case import PreparedCase, RefusedError
from agssd.scans.preparing.angles import shear_degrees
from agssd.scans.preparing.volumes import Recipe, prepare_case
from agssd.scans.read import read_scan
from agssd.scans.sources.plan import Job, Plan, plan_sources

# File or folder of a DICOM series -> beginning of the reason. Everything else is a scan, a label, or in IGNORED.
REFUSED = {
    "ct_full/ge_head_tilt_dicom": "series of 28 DICOM files: variable slice distance: 1.08 to 7.00 mm",
    "odd/dicom_bad_increment": "series of 4 DICOM files: missing slices: a gap of 10.00 mm after slice 3 of 4",
    "odd/dicom_gantry_tilt": "series of 4 DICOM files: gantry tilt: slices are stacked 14.0 degrees off their normal",
    "odd/dicom_philips_enhanced/IM-0001-9600-0001.dcm": "DICOM file: 4 volumes in one series (temporal positions",
    "odd/dicom_rgb": "series of 4 DICOM files: a secondary capture",
    "odd/dicom_seg_liver.dcm": "DICOM file: a segmentation (SEG), not a scan",
    "odd/dicom_siemens_mosaic_fmri": "series of 2 DICOM files: a Siemens mosaic",
    "odd/empty_file.nii.gz": "empty file",
    "odd/example4d.nii.gz": "4D image (128x96x24x2); --volume I",
    "odd/fmri_4d.nii.gz": "4D image (68x68x6x30); --volume I",
    "odd/fmri_tsnr_nan.nii.gz": "408 voxels are NaN",
    "odd/functional_slope_4d.nii": "4D image (17x21x3x20); --volume I",
    "odd/mri_2d.mha": "2D image (256x256)",
    "odd/nibabel_phantom.PAR": "Philips PAR/REC is not read",
    "odd/pydicom_CT_small.dcm": "DICOM file: one slice only",
    # three forms of one image, one of them truncated, side by side
    "odd/pydicom_MR_small_RLE.dcm": "DICOM file: one slice only",
    "odd/pydicom_MR_small_bigendian.dcm": "DICOM file: one slice only",
    "odd/pydicom_MR_truncated.dcm": "DICOM file: truncated pixel data",
    "odd/pydicom_examples_ybr_color.dcm": "DICOM file: ultrasound",
    "odd/pydicom_no_meta.dcm": "DICOM file: no valid DICOM header",
    "odd/shear_ct_tilt.nii.gz": "sheared affine: two axes are 18.5 degrees off a right angle",
    "odd/single_slice_4d.nii.gz": "single slice (256x256x1x3)",
    "odd/truncated_60pct.nii.gz": "truncated or damaged: Compressed file ended",
    "odd/truncated_header.nii": "cut off within its header: 200 bytes",
    "odd/zeros_5d.nii.gz": "5D image (256x256x170x1x3)",
    "ultrasound/BkCurvilinearScanConvertedData.igs.mha": "2D image (600x400)",
    "ultrasound/BoneUltrasound_L14.igs.mha": "a sequence of tracked 2D frames",
    "ultrasound/ColorNrrdSample.igs.nrrd": "3 values per voxel (colour or vectors)",
    "ultrasound/NrrdSample.igs.nrrd": "2D image (256x256)",
    "ultrasound/NwirePhantomFreehandCropped.igs.mha": "a sequence of tracked 2D frames",
    "ultrasound/SegmentationTest_BKMedical_RandomStepperMotionData2_Trimmed.igs.mha": "a sequence of tracked 2D frames",
    "ultrasound/UltrasonixCurvilinearScanConvertedDataGroundTruth.igs.mha": "a sequence of tracked 2D frames",
    # a label map in the space of a later scan, on the grid of none
    "mri_full/ms_raw_patient01/gt.nii.gz": "matches --labels, but no image",
    # its origin lies two voxels lower than the image's
    "mri_full/seg3d/BrainSkull.nrrd": "matches --labels, but no image",
    # one label map an image
    "mri_full/seg3d/Skull.nrrd": "SHARED/mri_full/seg3d/MR.nii.gz has a label already (Brain.nrrd)",
    "mri_full/sct_t2_seg-manual_labeled.nii.gz": "SHARED/mri_full/sct_t2.nii.gz has a label already",
    # its image is not among the files
    "mri_full/torchio_t1_seg_gif.nii.gz": "matches --labels, but no image",
}
LABELS = {
    "ct_full": ["*_seg.nii.gz"],
    "mri_full": ["*_seg*.nii.gz", "lesion*.nii.gz", "gt.nii.gz", "seg3d/*.nrrd"],
    "odd": ["*_label.nrrd"],
    "ultrasound": [],
    "hippocampus": [],
}
SPACING_MM = {"ct_full": 3.0, "mri_full": 3.0, "odd": 1.5, "ultrasound": 2.0, "hippocampus": 1.0}
NO_SCANS = (".md", ".csv", ".txt", ".json", ".REC")


def _prepared(job: Job, spacing_mm: float, unshear: bool = False) -> PreparedCase:
    recipe = Recipe(spacing_mm=(spacing_mm,) * 3, unshear=unshear)
    return prepare_case(job.paths, job.label, job.modality, recipe, job.series, job.volume)


def _plan(shared_data: Path, name: str) -> Plan:
    return plan_sources([shared_data / name], labels=LABELS[name])


def _reference(job: Job) -> sitk.Image:
    """Return the source as SimpleITK reads it, which shares no geometry code with the reader of NIfTI and DICOM."""
    if job.series is None:
        image = sitk.ReadImage(str(job.paths[0]), sitk.sitkFloat32)
        return image[..., 0] if image.GetDimension() == 4 else image
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(job.series.files[0].parent)))
    reader.SetOutputPixelType(sitk.sitkFloat32)
    return reader.Execute()


def _on_grid_of(case: PreparedCase, image: sitk.Image) -> tuple[np.ndarray, np.ndarray]:
    """Return (D, H, W) of the source on the case's grid and where the source reaches, by SimpleITK alone."""
    affine = case.affine[:, [2, 1, 0, 3]].copy()  # (i, j, k) of canonical orientation
    affine[:2] *= -1
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    resampler = sitk.ResampleImageFilter()
    resampler.SetSize([int(n) for n in case.image.shape[:0:-1]])
    resampler.SetOutputSpacing(spacing.tolist())
    resampler.SetOutputOrigin(affine[:3, 3].tolist())
    resampler.SetOutputDirection((affine[:3, :3] / spacing).ravel().tolist())
    resampler.SetDefaultPixelValue(float("nan"))
    sigma = [max(s / 2, 1e-3) for s in spacing]
    smooth = image if min(image.GetSize()) < 4 else sitk.SmoothingRecursiveGaussian(image, sigma)
    array = sitk.GetArrayFromImage(resampler.Execute(smooth))
    inside = np.isfinite(array)
    low, high = case.image.min(), case.image.max()
    stored = (array - case.offset[0]) / case.scale[0]
    return np.clip(np.where(inside, stored, 0), low, high), inside


def _likeness(one: np.ndarray, two: np.ndarray, inside: np.ndarray) -> float:
    return float(np.corrcoef(one[inside], two[inside])[0, 1])


def _check_place(case: PreparedCase, image: sitk.Image, name: str) -> None:
    """The case agrees with the source at its own place better than one voxel away, and than mirrored."""
    expected, inside = _on_grid_of(case, image)
    ours = case.image[0].astype(np.float64)
    likeness = _likeness(ours, expected, inside)
    assert likeness > 0.85, (name, likeness)
    for axis in range(3):
        if ours.shape[axis] < 5:
            continue
        for shift in (-1, 1):
            assert _likeness(np.roll(ours, shift, axis), expected, inside) < likeness, (name, axis, shift)
    assert _likeness(ours[:, :, ::-1], expected, inside) < likeness, name


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("ct_full", marks=pytest.mark.slow),
        pytest.param("mri_full", marks=pytest.mark.slow),
        pytest.param("odd", marks=pytest.mark.slow),
        "ultrasound",
        pytest.param("hippocampus", marks=pytest.mark.slow),
    ],
)
def test_shared__every_file_is_a_case_at_its_place_or_refused(shared_data: Path, name: str) -> None:
    plan = _plan(shared_data, name)
    reasons = {path.relative_to(shared_data).as_posix(): reason for path, reason in plan.refused}
    spoken: set[Path] = {path for path, _ in plan.refused}
    for job in plan.jobs:
        spoken |= {*job.paths, *job.files()}
        try:
            case = _prepared(job, SPACING_MM[name])
        except RefusedError as error:
            reasons[job.paths[0].relative_to(shared_data).as_posix()] = str(error)
            continue
        _check_place(case, _reference(job), job.paths[0].name)
    expected = {path: reason for path, reason in REFUSED.items() if path.startswith(f"{name}/")}
    assert set(reasons) == set(expected)
    for path, reason in expected.items():
        assert reasons[path].startswith(reason.replace("SHARED", str(shared_data))), path
    for path in (shared_data / name).rglob("*"):
        if path.is_file() and not path.name.endswith(NO_SCANS):
            alike = path.with_suffix(".img") in spoken if path.suffix == ".hdr" else False
            assert alike or path in spoken or path.parent in spoken, path


@pytest.mark.slow
def test_shared__chosen_volumes(shared_data: Path) -> None:
    odd = shared_data / "odd"
    for name, volume in (("example4d.nii.gz", 1), ("fmri_4d.nii.gz", 17), ("functional_slope_4d.nii", 19)):
        image = nib.load(odd / name)
        scan = read_scan(odd / name, volume)
        assert np.allclose(scan.array, np.asarray(image.dataobj)[..., volume]) and np.allclose(
            scan.affine, image.affine
        )
    file = odd / "dicom_philips_enhanced" / "IM-0001-9600-0001.dcm"
    data = pydicom.dcmread(file)
    scan = read_scan(file, volume=2)
    frames = data.pixel_array[2::4] * 1.85934065934065  # every fourth frame, in the order of its position
    assert np.allclose(scan.array, frames.transpose(2, 1, 0), rtol=1e-5)
    first = data.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence[0].ImagePositionPatient
    assert np.allclose(scan.affine[:3, 3], np.array(first) * (-1, -1, 1)) and np.isclose(scan.affine[2, 2], 3.3125)


@pytest.mark.slow
def test_shared__unsheared_voxels_keep_their_place(shared_data: Path) -> None:
    path = shared_data / "odd" / "shear_ct_tilt.nii.gz"
    scan = read_scan(path, sheared=True)
    case = _prepared(Job((path,), "x", modality="ct"), 1.5, unshear=True)
    ours, affine = case.image[0], case.affine
    assert shear_degrees(affine) < 1e-3 < shear_degrees(scan.affine)
    rng = np.random.default_rng(0)
    at = rng.uniform(0.1, 0.9, (4000, 3)) * (np.array(scan.array.shape) - 1)
    there = map_coordinates(scan.array.astype(float), at.T, order=1)
    inside = np.linalg.solve(affine, scan.affine @ np.c_[at, np.ones(len(at))].T)[:3]
    here = map_coordinates(ours.astype(float), inside, order=1)
    likeness = np.corrcoef(here, np.clip(there, -1024, 3071))[0, 1]
    assert likeness > 0.9
    for axis in range(3):
        moved = inside + 2 * np.eye(3)[axis][:, None]
        assert np.corrcoef(map_coordinates(ours.astype(float), moved, order=1, mode="nearest"), there)[0, 1] < likeness
