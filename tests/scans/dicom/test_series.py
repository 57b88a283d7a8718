"""Which DICOM files are scans, whose they are, and a reason of its own for all that is not."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.uid import generate_uid

from agssd.scans.case import RefusedError
from agssd.scans.dicom.series import find_series, series_at
from agssd.scans.read import read_scan
from agssd.scans.sources.plan import plan_sources

STORAGE = "1.2.840.10008.5.1.4.1.1."


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


# SOP class -> a word of the reason
KINDS = {
    "1": "CR or DX",
    "1.1": "CR or DX",
    "1.1.1": "CR or DX",
    "1.2": "mammogram",
    "3.1": "ultrasound",
    "6.1": "ultrasound",
    "4.2": "spectroscopy",
    "7": "secondary capture",
    "7.4": "secondary capture",
    "9.1.1": "waveform",
    "11.1": "presentation state",
    "12.1": "angiography",
    "13.1.3": "tomosynthesis",
    "20": "nuclear medicine",
    "30": "parametric map",
    "66": "raw data",
    "66.1": "registration",
    "66.4": "SEG",
    "66.5": "surface segmentation",
    "77.1.4": "photograph",
    "88.11": "structured report",
    "88.59": "key object",
    "104.1": "document",
    "128": "PET, which is taken only with --pet",
    "130": "PET, which is taken only with --pet",
    "481.1": "RTIMAGE",
    "481.2": "RTDOSE",
    "481.3": "RTSTRUCT",
    "481.5": "RTPLAN",
    "999.9": "999.9, which is not read",
}


@pytest.mark.parametrize("kind", KINDS)
def test_find_series__every_kind_of_object_has_its_reason(tmp_path: Path, dicom: Any, kind: str) -> None:
    slices = dicom.series_of(dicom.stored((2, 6, 6)))
    for data in slices:
        data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = STORAGE + kind
    dicom.save(tmp_path, slices)
    found, refused = find_series(_files(tmp_path))
    assert found == []
    assert [place for place, _ in refused] == [tmp_path]
    assert refused[0][1].startswith("series of 2 DICOM files: ")
    assert KINDS[kind] in refused[0][1]


def _delete(slices: list[Any], *names: str) -> None:
    for data in slices:
        for name in names:
            delattr(data, name)


def _set(slices: list[Any], **values: Any) -> None:
    for data in slices:
        for name, value in values.items():
            setattr(data, name, value)


def _syntax(slices: list[Any]) -> None:
    for data in slices:
        data.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.100"  # MPEG2
        data.PixelData = pydicom.encaps.encapsulate([b"\0\0\0\1"])


HEADERS: dict[str, tuple[Callable[[list[Any]], None], str]] = {
    "colour": (lambda s: _set(s, PhotometricInterpretation="RGB", SamplesPerPixel=3), "a colour image"),
    "palette": (lambda s: _set(s, PhotometricInterpretation="PALETTE COLOR"), "a colour image"),
    "inverted": (lambda s: _set(s, PhotometricInterpretation="MONOCHROME1"), "MONOCHROME1"),
    "mosaic": (lambda s: _set(s, ImageType=["ORIGINAL", "PRIMARY", "M", "MOSAIC"]), "a Siemens mosaic"),
    "localiser": (lambda s: _set(s, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), "a localiser (scout)"),
    "mip": (lambda s: _set(s, ImageType=["DERIVED", "SECONDARY", "PROJECTION IMAGE"]), "a projection"),
    "screen": (lambda s: _set(s, ImageType=["DERIVED", "SECONDARY", "SCREEN SAVE"]), "a screen dump"),
    "position": (lambda s: _delete(s, "ImagePositionPatient"), "missing position"),
    "empty position": (lambda s: _set(s, ImagePositionPatient=None), "missing position"),
    "orientation": (lambda s: _delete(s, "ImageOrientationPatient"), "missing position"),
    "derived": (
        lambda s: (_delete(s, "ImagePositionPatient"), _set(s, ImageType=["DERIVED", "SECONDARY"]))[0],
        "a derived image without a place in the patient",
    ),
    "spacing": (lambda s: _delete(s, "PixelSpacing"), "missing pixel spacing"),
    "no pixels": (lambda s: _delete(s, "PixelData", "Rows", "Columns"), "no pixel data"),
    "syntax": (_syntax, "unsupported transfer syntax: MPEG2"),
    "units": (lambda s: _set(s, RescaleType="MGML"), "CT in MGML, not in HU"),
    "patients": (lambda s: _set(s[2:], PatientID="someone else"), "2 patients in one series, by their PatientID"),
    "modalities": (
        lambda s: _set(s[2:], SOPClassUID=STORAGE + "4", Modality="MR"),
        "2 modalities in one series: ct, mri",
    ),
    "repeated": (
        lambda s: _set(s, SOPInstanceUID=s[0].SOPInstanceUID),
        "duplicate slices: 3 files repeat an image of the series in other bytes (IM0",
    ),
    "table": (lambda s: _set(s, ModalityLUTSequence=[pydicom.Dataset()]), "Modality LUT"),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_find_series__headers_that_are_no_scan(tmp_path: Path, dicom: Any, kind: str) -> None:
    make, reason = HEADERS[kind]
    slices = dicom.series_of(dicom.stored((4, 6, 6)))
    make(slices)
    dicom.save(tmp_path, slices)
    found, refused = find_series(_files(tmp_path))
    assert found == [] and len(refused) == 1
    assert reason in refused[0][1]
    with pytest.raises(RefusedError) as caught:
        read_scan(tmp_path)
    assert str(caught.value) == refused[0][1]


def test_find_series__mixed_tree(tmp_path: Path, dicom: Any) -> None:
    """Two series in one folder, one over two folders, a localiser within a series, other files, no extensions."""
    one, two, three = (dicom.series_of(dicom.stored(seed=seed), modality="MR") for seed in (1, 2, 3))
    dicom.save(tmp_path / "a", one, "x{}.dcm")
    dicom.save(tmp_path / "a", two, "y{}")
    paths = dicom.save(tmp_path / "b", three)
    (tmp_path / "c").mkdir()
    shutil.move(paths[0], tmp_path / "c")
    scout = dicom.series_of(dicom.stored((1, 4, 4)), ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])[0]
    scout.SeriesInstanceUID = one[0].SeriesInstanceUID
    dicom.save(tmp_path / "a", [scout], "scout.dcm")
    (tmp_path / "a" / "notes.txt").write_text("no scan")
    plan = plan_sources([tmp_path])
    assert plan.ignored == 1
    assert [(path.name, reason) for path, reason in plan.refused] == [("scout.dcm", "DICOM file: a localiser (scout)")]
    assert [[len(job.files()), job.paths[0].name] for job in plan.jobs] == [
        [5, "x0.dcm"],
        [5, "y0"],
        [5, _files(tmp_path / "b") and sorted(_files(tmp_path / "b"))[0].name],
    ]
    for job, slices in zip(plan.jobs, (one, two, three), strict=True):
        again = pickle.loads(pickle.dumps(job))
        array = read_scan(again.paths[0], again.volume, again.series).array
        assert np.array_equal(array, np.stack([data.pixel_array for data in slices]).transpose(2, 1, 0))


def test_find_series__copies_in_other_folders_stand_apart(tmp_path: Path, dicom: Any) -> None:
    slices = dicom.series_of(dicom.stored())
    dicom.save(tmp_path / "one", slices)
    dicom.save(tmp_path / "two", slices, seed=3)
    found, refused = find_series(_files(tmp_path))
    assert [series.place.name for series in found] == ["one", "two"] and refused == []
    one, two = (read_scan(series.place) for series in found)
    assert one.sha256 == two.sha256


def test_find_series__a_series_over_two_folders_with_copied_slices_is_one(tmp_path: Path, dicom: Any) -> None:
    stored = dicom.stored((8, 12, 10))
    paths = dicom.save(tmp_path / "one", dicom.series_of(stored), "{}.dcm", seed=None)
    (tmp_path / "two").mkdir()
    for path in paths[4:]:
        shutil.move(path, tmp_path / "two")
    shutil.copy(paths[3], tmp_path / "two")
    shutil.copy(paths[2], tmp_path / "one" / "2 again.dcm")
    found, refused = find_series(_files(tmp_path))
    assert refused == [] and len(found) == 1 and len(found[0].files) == 8
    scan = read_scan(found[0].place, series=found[0])
    assert np.array_equal(scan.array, stored.transpose(2, 1, 0).astype(np.float32) - 1024)
    assert scan.notes == ("2 files repeat an image of the series byte for byte and are left out",)
    # a whole copy and a part of it
    dicom.save(tmp_path / "x", slices := dicom.series_of(stored), "{}.dcm", seed=None)
    dicom.save(tmp_path / "y", slices[:5], "{}.dcm", seed=None)
    found, refused = find_series([*_files(tmp_path / "x"), *_files(tmp_path / "y")])
    assert refused == [] and [len(series.files) for series in found] == [8]
    # the same, of other bytes
    for path in (tmp_path / "y").iterdir():
        data = pydicom.dcmread(path)
        data.PatientID = "anonymous"
        data.save_as(path)
    found, refused = find_series([*_files(tmp_path / "x"), *_files(tmp_path / "y")])
    assert found == [] and refused == [
        (
            tmp_path / "x" / "0.dcm",
            "series of 13 DICOM files: duplicate slices: 5 files repeat an image of the series in other bytes "
            "(y/0.dcm, y/1.dcm, y/2.dcm and 2 more); leave one file of each",
        )
    ]


def test_find_series__forms_of_one_image_stand_by_themselves(tmp_path: Path, dicom: Any) -> None:
    image = dicom.series_of(dicom.stored((1, 12, 10)))[0]
    dicom.save(tmp_path, [image], "a.dcm")
    image.PatientComments = "again"
    dicom.save(tmp_path, [image], "b.dcm")
    (tmp_path / "c.dcm").write_bytes((tmp_path / "b.dcm").read_bytes()[:-20])
    found, refused = find_series(_files(tmp_path))
    assert [series.place.name for series in found] == ["a.dcm", "b.dcm", "c.dcm"] and refused == []
    for series, reason in zip(found, ("one slice only", "one slice only", "truncated pixel data"), strict=True):
        with pytest.raises(RefusedError, match=f"^DICOM file: {reason}"):
            read_scan(series.place, series=series)
        assert "in other bytes; each is taken by itself" in series.notes[0]


def test_find_series__without_uids_the_folder_and_number_decide(tmp_path: Path, dicom: Any) -> None:
    for number, name in ((1, "x{}"), (2, "y{}")):
        slices = dicom.series_of(dicom.stored(seed=number), SeriesNumber=number, SeriesInstanceUID="")
        _set(slices, SOPInstanceUID="", SOPClassUID="", PatientID="", StudyInstanceUID="")
        dicom.save(tmp_path, slices, name)
    found, refused = find_series(_files(tmp_path))
    assert [len(series.files) for series in found] == [5, 5] and refused == []
    notes = plan_sources([tmp_path]).notes
    assert len(notes) == 1 and "2 DICOM series name no PatientID" in notes[0]


def test_plan__patients_are_subjects(tmp_path: Path, dicom: Any) -> None:
    for name, patient in (("t0", "A"), ("t1", "A"), ("u", "B")):
        dicom.save(tmp_path / name, dicom.series_of(dicom.stored(), PatientID=patient))
    plan = plan_sources([tmp_path])
    assert {job.paths[0].name: job.subject for job in plan.jobs} == {"t0": "A", "t1": "A", "u": "B"}
    assert plan.notes == []
    plan = plan_sources([tmp_path], subject=r"^([tu])")
    assert {job.paths[0].name: job.subject for job in plan.jobs} == {"t0": "t", "t1": "t", "u": "u"}
    plan = plan_sources([tmp_path], subject=r"^(t)")
    assert [(path.name, reason) for path, reason in plan.refused] == [("u", "its path does not match --subject")]


def test_plan__one_patient_of_many_studies_is_said(tmp_path: Path, dicom: Any) -> None:
    for row in range(3):
        dicom.save(tmp_path / f"s{row}", dicom.series_of(dicom.stored(), PatientID="ANON"))
    plan = plan_sources([tmp_path])
    assert {job.subject for job in plan.jobs} == {"ANON"}
    assert "3 DICOM studies have one PatientID" in plan.notes[0]


def test_plan__the_header_decides_on_the_modality(tmp_path: Path, dicom: Any) -> None:
    for modality in ("CT", "MR", "PT"):
        dicom.save(tmp_path / modality, dicom.series_of(dicom.stored(), modality=modality))
    plan = plan_sources([tmp_path], modality="ct")
    assert [job.paths[0].name for job in plan.jobs] == ["CT"]
    assert {path.name: reason for path, reason in plan.refused} == {
        "MR": "its header says mri, --modality says ct",
        "PT": "series of 5 DICOM files: PET, which is taken only with --pet",
    }
    plan = plan_sources([tmp_path], pet=True)
    assert [job.paths[0].name for job in plan.jobs] == ["CT", "MR", "PT"]
    pet = plan.jobs[2]
    assert pet.series is not None and pet.series.modality == "mri"
    assert read_scan(pet.paths[0], series=pet.series).notes == (
        "PET, stored as MRI is: by percentiles of its own values, without SUV",
    )


def test_plan__a_label_beside_the_folder_or_in_it(tmp_path: Path, dicom: Any) -> None:
    for name in ("one", "two"):
        dicom.save(tmp_path / name, dicom.series_of(dicom.stored()))
    scan = read_scan(tmp_path / "two")
    label = nib.Nifti1Image((scan.array > 0).astype(np.uint8), scan.affine)
    nib.save(label, tmp_path / "one_seg.nii.gz")
    nib.save(label, tmp_path / "two" / "liver_seg.nii.gz")
    plan = plan_sources([tmp_path], labels=["*_seg.nii.gz"])
    labels = {job.paths[0].name: job.label and job.label.name for job in plan.jobs}
    assert labels == {"one": "one_seg.nii.gz", "two": "liver_seg.nii.gz"} and plan.refused == []


def test_plan__a_single_file_and_a_manifest(tmp_path: Path, dicom: Any) -> None:
    whole = dicom.enhanced_of(dicom.stored())
    dicom.save(tmp_path, [whole], "whole.dcm")
    assert [job.paths for job in plan_sources([tmp_path]).jobs] == [(tmp_path / "whole.dcm",)]
    plan = plan_sources([tmp_path / "whole.dcm"])
    assert [(job.subject, job.files()) for job in plan.jobs] == [("P-17", [tmp_path / "whole.dcm"])]
    dicom.save(tmp_path / "ct", dicom.series_of(dicom.stored()))
    for seed in (1, 2):
        dicom.save(tmp_path / "pair", dicom.series_of(dicom.stored(seed=seed)), f"{seed}-{{}}")
    (tmp_path / "m.csv").write_text("path,modality,subject\nct,,\nwhole.dcm,mr,\npair,,\nct/../ct,,x\nwhole.dcm,,y\n")
    with pytest.raises(ValueError, match="stands in line 2 already"):
        plan_sources([tmp_path / "m.csv"])
    (tmp_path / "m.csv").write_text("path,modality,subject\nct,,\nwhole.dcm,mr,\npair,,\n")
    plan = plan_sources([tmp_path / "m.csv"])
    assert [(job.paths[0].name, job.subject) for job in plan.jobs] == [("ct", "P-17")]
    assert {path.name: reason for path, reason in plan.refused} == {
        "whole.dcm": "its header says ct, line 3 of the manifest mr",
        "pair": "a folder of 2 DICOM series; name one, or give the folder as SOURCE",
    }


def test_plan__the_volume_of_a_manifest_row_wins(tmp_path: Path, dicom: Any) -> None:
    image = nib.Nifti1Image(np.random.default_rng(0).normal(size=(6, 7, 8, 3)), np.eye(4))
    nib.save(image, tmp_path / "a.nii")
    (tmp_path / "m.csv").write_text("path,volume\na.nii,0\na.nii,2\na.nii,\n")
    plan = plan_sources([tmp_path / "m.csv"], volume=1)
    assert [job.volume for job in plan.jobs] == [0, 2, 1]
    (tmp_path / "m.csv").write_text("path,volume\na.nii,-1\n")
    with pytest.raises(ValueError, match="line 2, column volume: '-1' is no number from 0"):
        plan_sources([tmp_path / "m.csv"])


def test_series_at__damaged_files(tmp_path: Path) -> None:
    for name in ("x.dcm", "y.dcm"):
        (tmp_path / "bad").mkdir(exist_ok=True)
        (tmp_path / "bad" / name).write_bytes(b"\0" * 128 + b"DICM")
    refused = find_series(_files(tmp_path / "bad"))[1]
    assert [path.name for path, _ in refused] == ["x.dcm", "y.dcm"]
    (tmp_path / "a.dcm").write_bytes(b"")
    (tmp_path / "b.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\x08\0\x05\0CS\xff\xff" * 3)
    with pytest.raises(RefusedError, match="^DICOM file: empty file$"):
        series_at(tmp_path / "a.dcm")
    with pytest.raises(RefusedError, match="^DICOM file: (no|damaged)"):
        series_at(tmp_path / "b.dcm")
    uid = generate_uid()
    (tmp_path / "c.dcm").write_bytes(str(uid).encode() * 40)
    with pytest.raises(RefusedError, match="^DICOM file: (no|damaged)"):
        series_at(tmp_path / "c.dcm")


def _short(count: int) -> str:
    return f"{count} files of its series or folder could not be used; the volume may be short of slices"


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "empty file"),
    "zeroed": (lambda path: path.write_bytes(b"\0" * path.stat().st_size), "no valid DICOM header"),
    "noise": (lambda path: path.write_bytes(np.random.default_rng(0).bytes(900)), "no "),
    "cut within the preamble": (lambda path: path.write_bytes(path.read_bytes()[:90]), "no valid DICOM header"),
    "gone": (lambda path: (path.unlink(), path.symlink_to("nowhere")), "cannot be opened: No such file"),
    "pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "no regular file"),
}


@pytest.mark.parametrize("name", ["IM{:04d}", "{}.dcm", "1.2.840.{}", "IM{}.mr"])
@pytest.mark.parametrize("kind", DAMAGE)
def test_plan__a_damaged_slice_is_named_and_noted(tmp_path: Path, dicom: Any, kind: str, name: str) -> None:
    """The last slice of a stack, which leaves no gap; another folder's series and text beside it are not concerned."""
    damage, reason = DAMAGE[kind]
    last = dicom.save(tmp_path / "a", dicom.series_of(dicom.stored()), name)[-1]
    dicom.save(tmp_path / "b", dicom.series_of(dicom.stored(seed=1)))
    for folder in ("a", "b"):
        (tmp_path / folder / "VERSION").write_text("text beside the slices\n" * 9)
    damage(last)
    plan = plan_sources([tmp_path])
    assert [path for path, _ in plan.refused] == [last] and plan.ignored == 2
    assert plan.refused[0][1].startswith(f"DICOM file: {reason}")
    assert [job.paths[0].name for job in plan.jobs] == ["a", "b"]
    scans = [read_scan(job.paths[0], series=job.series) for job in plan.jobs]
    assert [scan.array.shape[2] for scan in scans] == [4, 5]
    assert [scan.notes for scan in scans] == [(_short(1),), ()]
    assert read_scan(tmp_path / "a").notes == (_short(1),)


def test_plan__a_slice_cut_anywhere_is_never_lost_in_silence(tmp_path: Path, dicom: Any) -> None:
    last = dicom.save(tmp_path, dicom.series_of(dicom.stored()))[-1]
    whole = last.read_bytes()
    outcomes = set()
    for length in range(0, len(whole), 3):
        last.write_bytes(whole[:length])
        plan = plan_sources([tmp_path])
        assert len(plan.jobs) == 1
        series = plan.jobs[0].series
        assert series is not None
        if last in series.files:
            with pytest.raises(RefusedError, match="^series of 5 DICOM files: (no|truncated|damaged) "):
                read_scan(tmp_path, series=series)
            outcomes.add("refused")
        else:
            assert [path for path, _ in plan.refused] == [last] and series.notes == (_short(1),), length
            outcomes.add("noted")
    assert outcomes == {"refused", "noted"}


def test_plan__files_beside_a_series_that_are_no_slices_need_no_note(tmp_path: Path, dicom: Any) -> None:
    slices = dicom.series_of(dicom.stored())
    scout = dicom.series_of(dicom.stored((1, 4, 4)), ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    scout[0].SeriesInstanceUID = slices[0].SeriesInstanceUID
    dicom.save(tmp_path, [*slices, *scout])
    (tmp_path / "empty.txt").write_bytes(b"")
    plan = plan_sources([tmp_path])
    assert plan.ignored == 1 and [reason for _, reason in plan.refused] == ["DICOM file: a localiser (scout)"]
    assert plan.jobs[0].series is not None and plan.jobs[0].series.notes == ()
