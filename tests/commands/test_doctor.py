"""agssd doctor: every check is triggered by a scan or cache made for it, and healthy ones give nothing."""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest

from agssd.commands import doctor, prepare
from agssd.data_modules.cache import VolumeCache

SHAPE = (48, 52, 44)
GRID = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij"))
PATIENT = "DOE_JANE"


def _run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    return doctor.run(parser.parse_args([str(argument) for argument in arguments]))


def _prepare(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    return prepare.run(parser.parse_args([str(argument) for argument in arguments]))


def _head(seed: int) -> np.ndarray:
    """Return a head of its own: an ellipsoid with a dozen blobs, on noise."""
    rng = np.random.default_rng(seed)
    tissue = np.full(SHAPE, 400.0)
    for _ in range(12):
        centre = rng.uniform(-0.7, 0.7, 3)[:, None, None, None]
        tissue += rng.uniform(-200, 300) * np.exp(-((GRID - centre) ** 2).sum(0) / rng.uniform(0.02, 0.15))
    inside = ((GRID / rng.uniform(0.8, 0.95, 3)[:, None, None, None]) ** 2).sum(0) < 1
    values = np.where(inside, np.maximum(tissue, 150) + rng.normal(0, 15, SHAPE), np.abs(rng.normal(0, 4, SHAPE)))
    return values.astype(np.float32)


def _label(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    label = np.zeros(SHAPE, dtype=np.uint8)
    for value, middle in ((1, 0.3), (2, -0.3)):
        centre = np.array([0, middle, 0]) + rng.uniform(-0.1, 0.1, 3)
        label[((GRID - centre[:, None, None, None]) ** 2).sum(0) < 0.04] = value
    return label


def _save(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, np.eye(4) if affine is None else affine)
    image.header["descrip"] = PATIENT.encode()
    nib.save(image, path)
    return path


def _healthy(folder: Path, count: int = 12) -> None:
    for row in range(count):
        _save(folder / f"images/p{row:02d}.nii.gz", _head(row))
        _save(folder / f"labels/p{row:02d}.nii.gz", _label(row))


def _findings(out: Path) -> dict[str, set[tuple[str, str]]]:
    """Return (check, severity) by the name of the file, "" for the set as a whole."""
    found: dict[str, set[tuple[str, str]]] = {}
    with (out / "findings.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            name = Path(row["path"]).name.partition(".")[0]
            found.setdefault(name, set()).add((row["check"], row["severity"]))
            assert row["finding"] and row["remedy"]
    return found


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("healthy")
    _healthy(folder)
    return folder


@pytest.fixture(scope="module")
def clinic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 12 healthy scans and one of every kind of bad one."""
    folder = tmp_path_factory.mktemp("clinic") / PATIENT
    _healthy(folder)
    images, labels = folder / "images", folder / "labels"
    seeds = iter(range(100, 200))

    def save(name: str, array: np.ndarray | None = None, affine: np.ndarray | None = None) -> Path:
        return _save(images / name, _head(next(seeds)) if array is None else array, affine)

    whole = save("whole.nii.gz").read_bytes()
    (images / "whole.nii.gz").unlink()
    (images / "truncated.nii.gz").write_bytes(whole[: len(whole) // 2])
    (images / "crc.nii.gz").write_bytes(whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:])
    (images / "empty.nii.gz").write_bytes(b"")
    (images / "old.mgz").write_bytes(b"old")
    holes = _head(next(seeds))
    holes[3, 4, 5], holes[4, 4, 5] = np.nan, np.inf
    save("holes.nii.gz", holes)
    save("constant.nii.gz", np.full(SHAPE, 7, dtype=np.int16))
    save("series.nii.gz", np.stack([_head(0)] * 2, axis=-1))
    save("thin.nii.gz", _head(0)[:, :, :1])
    save("clipped.nii.gz", np.minimum(_head(next(seeds)), 480))
    save("coarse.nii.gz", np.round(_head(next(seeds)) / 30).astype(np.int16))
    save("micro.nii.gz", affine=np.diag([0.1, 0.1, 0.1, 1]))
    save("metres.nii.gz", affine=np.diag([1000, 1000, 1000, 1.0]))
    save("thick.nii.gz", affine=np.diag([1, 1, 4, 1.0]))
    save("sheared.nii.gz", affine=np.eye(4) + np.eye(4, k=1) * [0, 0.3, 0, 0])
    save("mirror.nii.gz", affine=np.diag([-1, 1, 1, 1.0]))
    for name, moved in (("swapped", np.diag([-1, 1, 1, 1.0])), ("shifted", np.eye(4) + 9 * np.eye(4, k=3))):
        image = nib.Nifti1Image(_head(next(seeds)), np.eye(4))
        image.set_sform(np.eye(4), 1)
        image.set_qform(moved, 1)
        nib.save(image, images / f"{name}.nii.gz")
    image = nib.Nifti1Image(_head(next(seeds)), None)
    image.header["sform_code"] = image.header["qform_code"] = 0
    nib.save(image, images / "nowhere.nii.gz")
    (images / "qcopy.nii.gz").write_bytes((images / "p00.nii.gz").read_bytes())
    rng = np.random.default_rng(0)
    save("rescaled.nii.gz", 3 * _head(1) + 50 + rng.normal(0, 20, SHAPE).astype(np.float32))
    save("a_mask.nii.gz", _label(0))
    for name in ("offgrid", "outside", "stray", "blank", "torn", "shares"):
        save(f"{name}.nii.gz")
    _save(labels / "offgrid.nii.gz", _label(0)[:-2])
    corner = np.zeros(SHAPE, dtype=np.uint8)
    corner[:5, :5, :5] = 1
    _save(labels / "outside.nii.gz", corner)
    stray = _label(0)
    stray[24, 26, 22] = 7
    _save(labels / "stray.nii.gz", stray)
    _save(labels / "blank.nii.gz", np.zeros(SHAPE, dtype=np.uint8))
    (labels / "torn.nii.gz").write_bytes(whole[: len(whole) // 2])
    _save(labels / "shares.nii.gz", _label(0) * np.float32(0.37))
    return folder


@pytest.fixture(scope="module")
def report(clinic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What doctor writes of the clinic, and the quarantine beside it."""
    out = tmp_path_factory.mktemp("report") / "new"
    assert _run(clinic, "--labels", "labels/*", "--out", out, "--quarantine", out.parent / "q.csv") == 3
    assert sorted(path.name for path in out.iterdir()) == ["findings.csv", "report.html"]
    return out


EXPECTED = {
    "truncated": ("damaged", "error"),
    "crc": ("damaged", "error"),
    "empty": ("damaged", "error"),
    "old": ("type", "error"),
    "holes": ("non-finite", "error"),
    "constant": ("constant", "error"),
    "series": ("dimensions", "error"),
    "thin": ("dimensions", "error"),
    "clipped": ("clipped", "warning"),
    "coarse": ("grey-levels", "warning"),
    "micro": ("spacing", "warning"),
    "metres": ("spacing", "error"),
    "thick": ("anisotropy", "info"),
    "sheared": ("affine", "error"),
    "mirror": ("mirrored", "info"),
    "swapped": ("sform-qform", "error"),
    "shifted": ("sform-qform", "warning"),
    "nowhere": ("orientation", "warning"),
    "qcopy": ("duplicate", "error"),
    "rescaled": ("near-duplicate", "warning"),
    "a_mask": ("label-map", "error"),
    "offgrid": ("label-grid", "error"),
    "outside": ("label-outside", "error"),
    "stray": ("label-values", "warning"),
    "blank": ("label-empty", "error"),
    "torn": ("label-file", "error"),
    "shares": ("label-values", "error"),
}


def test_doctor__every_bad_scan_is_found_and_no_healthy_one(report: Path) -> None:
    found = _findings(report)
    assert {name: EXPECTED[name] for name in EXPECTED if EXPECTED[name] not in found.get(name, set())} == {}
    more = {
        "micro": {("field-of-view", "warning")},
        "metres": {("field-of-view", "warning")},
        "nowhere": {("mirrored", "info")},  # NIfTI's default is LAS
    }
    assert {
        name: sets - {EXPECTED[name]} - more.get(name, set()) for name, sets in found.items() if name in EXPECTED
    } == {name: set() for name in EXPECTED}
    assert set(found) - set(EXPECTED) == {""} and found[""] == {("mixed-spacing", "info")}


def test_doctor__healthy_folder_gives_nothing(
    healthy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(healthy, "--labels", "labels/*", "--out", tmp_path) == 0
    assert _findings(tmp_path) == {}
    assert "nothing found\n12 scans of 12 subjects: 0 errors, 0 warnings, 0 remarks" in capsys.readouterr().out
    assert "Nothing was found." in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_doctor__workers_change_nothing(clinic: Path, report: Path, tmp_path: Path) -> None:
    _run(clinic, "--labels", "labels/*", "--out", tmp_path, "--workers", 2)
    for name in ("findings.csv", "report.html"):
        assert (tmp_path / name).read_bytes() == (report / name).read_bytes()


class _Page(HTMLParser):
    """Collects what a page refers to, and checks that its tags are closed."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[tuple[str, str]] = []
        self.ids: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            assert not name.startswith("on")
            if name in ("src", "href", "srcset", "action", "data", "poster"):
                self.links.append((name, value or ""))
            if name == "id":
                self.ids.append(value or "")
        if tag == "img":
            assert dict(attrs)["alt"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_report__one_page_that_needs_nothing_and_names_nobody(clinic: Path, report: Path, tmp_path: Path) -> None:
    text = (report / "report.html").read_text()
    page = _Page(text)
    assert "script" not in page.tags and "link" not in page.tags and "iframe" not in page.tags
    assert "http:" not in text and "https:" not in text and "url(" not in text and "@import" not in text
    for name, value in page.links:
        assert value.startswith("data:image/jpeg;base64," if name == "src" else "#")
        assert name == "src" or value[1:] in page.ids
    # what could be drawn is drawn: read and refused, or read and doubtful
    assert page.tags.count("img") >= 14
    assert page.tags.count("details") == page.tags.count("summary") == text.count("What to do: ")
    text = re.sub('base64,[^"]*', "", text)
    for secret in (PATIENT, "DOE", "p00", "qcopy", "truncated.nii", str(clinic), str(tmp_path), "nii.gz"):
        assert secret not in text
    assert PATIENT in (report / "findings.csv").read_text()


def _series(folder: Path, gap: int | None = None, **attributes: str) -> None:
    """Write a CT of 24 slices with a name in every place that takes one; after slice ``gap`` one is missing."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    folder.mkdir(parents=True)
    series = generate_uid()
    head = (_head(0)[:, :, ::2] * 0.3 - 1000 * (_head(0)[:, :, ::2] < 100)).astype(np.int16)
    for row in range(22):
        if row == gap:
            continue
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = CTImageStorage, ExplicitVRLittleEndian
        meta.MediaStorageSOPInstanceUID = generate_uid()
        data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        data.SeriesInstanceUID, data.StudyInstanceUID, data.Modality = series, "1.2.19610704", "CT"
        data.PatientName = data.PatientID = data.InstitutionName = data.SeriesDescription = PATIENT
        data.ImageComments, data.PatientBirthDate, data.AccessionNumber = PATIENT, "19610704", PATIENT
        data.ImageType = ["ORIGINAL", "PRIMARY", PATIENT]
        data.ImagePositionPatient, data.ImageOrientationPatient = [0, 0, 2.0 * row], [1, 0, 0, 0, 1, 0]
        data.PixelSpacing, data.RescaleSlope, data.RescaleIntercept = [1, 1], 1, 0
        data.Rows, data.Columns, data.SamplesPerPixel, data.PhotometricInterpretation = 48, 52, 1, "MONOCHROME2"
        data.BitsAllocated = data.BitsStored = 16
        data.HighBit, data.PixelRepresentation, data.PixelData = 15, 1, head[:, :, row].tobytes()
        for name, value in attributes.items():
            setattr(data, name, value)
        data.save_as(folder / f"{PATIENT}{row:03d}")


def test_report__no_name_from_dicom_reaches_the_page(tmp_path: Path) -> None:
    _series(tmp_path / "ct/whole")
    _series(tmp_path / "ct/gap", gap=9)
    _series(tmp_path / "ct/units", RescaleType=PATIENT)
    _series(tmp_path / "ct/colour", PhotometricInterpretation="RGB")
    assert _run(tmp_path / "ct", "--out", tmp_path / "out") == 3
    found = _findings(tmp_path / "out")
    assert found["gap"] == {("series", "error")} and found["units"] == {("modality", "error")}
    assert found["colour"] == {("dimensions", "error")}
    assert _pictured(tmp_path / "out") >= {"gap", "whole"}
    text = re.sub('base64,[^"]*', "", (tmp_path / "out/report.html").read_text())
    for secret in (PATIENT, "DOE", "JANE", "19610704", "1.2."):
        assert secret not in text
    assert PATIENT in (tmp_path / "out/findings.csv").read_text()


def test_report__one_finding_of_a_check_for_each_scan(tmp_path: Path) -> None:
    _save(tmp_path / "scans/tiny.nii.gz", _head(0), np.diag([0.02, 0.02, 0.02, 1]))
    assert _run(tmp_path / "scans", "--out", tmp_path) == 3
    with (tmp_path / "findings.csv").open(newline="") as file:
        rows = [(row["check"], row["severity"], row["finding"]) for row in csv.DictReader(file)]
    assert [row[:2] for row in rows] == [("spacing", "error"), ("field-of-view", "warning")]
    assert "too thin" in rows[0][2] and "Voxels of 0.02 x 0.02 x 0.02 mm" in rows[0][2]
    text = (tmp_path / "report.html").read_text()
    assert text.count("Voxels of 0.02") == text.count("are too thin.") == 1


def _pictured(out: Path) -> set[str]:
    """Return the names of the files that have a picture in the report, by their numbers."""
    with (out / "findings.csv").open(newline="") as file:
        names = {row["case"]: Path(row["path"]).name.partition(".")[0] for row in csv.DictReader(file)}
    return {names[number] for number in re.findall(r'alt="Three planes of #(\d+)"', (out / "report.html").read_text())}


def test_report__whatever_can_be_decoded_has_a_picture(report: Path) -> None:
    expected = set(EXPECTED) - {"truncated", "crc", "empty", "old"}
    assert _pictured(report) == expected


def test_report__pictures_of_what_is_no_single_volume_or_no_grid(tmp_path: Path) -> None:
    import SimpleITK as sitk

    scans = tmp_path / "scans"
    _save(scans / "five.nii.gz", np.stack([_head(0)] * 3, axis=-1)[:, :, :, None])
    _save(scans / "colour.nii.gz", np.zeros(SHAPE, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")]))
    _save(scans / "flat.nii.gz", _head(0)[:, :, 20])
    image = nib.Nifti1Image(_head(0), np.eye(4))
    for name, entry in (("zero", 0.0), ("nan", np.nan)):
        image.header["sform_code"], image.header["qform_code"] = 1, 0
        image.header["srow_x"] = [entry, 0, 0, 0]
        (scans / f"{name}.nii").write_bytes(image.header.binaryblock + b"\0" * 4 + _head(0).tobytes(order="F"))
    sitk.WriteImage(sitk.GetImageFromArray(np.stack([_head(1)] * 2, axis=-1), isVector=True), scans / "vector.nrrd")
    sitk.WriteImage(sitk.GetImageFromArray(np.stack([_head(1)] * 2)), scans / "series.nrrd")
    assert _run(scans, "--out", tmp_path) == 3
    names = {"five", "colour", "flat", "zero", "nan", "vector", "series"}
    assert set(_findings(tmp_path)) == names and _pictured(tmp_path) == names


def test_picture__nan_is_black_and_infinity_is_bright() -> None:
    import io

    from PIL import Image

    from agssd.commands.doctor.picture import draw

    image = np.full((40, 40, 40), 0.5, dtype=np.float32)
    image[:, :, :20], image[:, :20, 20:] = np.nan, np.inf
    pixels = np.asarray(Image.open(io.BytesIO(draw(image, (1.0, 1.0, 1.0), (0.0, 1.0)))).convert("L"))
    axial = pixels[:, :128]  # up is anterior, right is the patient's right: both axes increase
    assert axial[:, :54].max() < 20 and axial[74:, 74:].min() > 235
    assert abs(axial[:54, 74:].astype(int) - 128).max() < 20


def test_report__names_only_where_asked_for(tmp_path: Path) -> None:
    _save(tmp_path / f"{PATIENT}.nii.gz", _head(0), np.diag([0.1, 0.1, 0.1, 1]))
    _run(tmp_path, "--out", tmp_path / "out")
    assert PATIENT not in (tmp_path / "out/report.html").read_text()
    _run(tmp_path, "--out", tmp_path / "out", "--names")
    assert str(tmp_path / PATIENT) in (tmp_path / "out/report.html").read_text()


def test_report__pictures_show_planes_and_label(tmp_path: Path) -> None:
    import base64
    import io

    from PIL import Image

    _healthy(tmp_path / "scans", 2)
    _run(tmp_path / "scans", "--labels", "labels/*", "--label-values", 0, 1, "--out", tmp_path)
    text = (tmp_path / "report.html").read_text()
    pictures = re.findall(r"base64,([^\"]+)", text)
    assert len(pictures) == 2
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(pictures[0])))).astype(int)
    assert pixels.shape == (128, 388, 3)
    orange = pixels[..., 0] - pixels[..., 2] > 60  # label 1; the body's outline is blue
    for left in (0, 130, 260):
        tile = slice(left, left + 128)
        assert pixels[:, tile].mean() > 20
    assert orange.mean() > 0.01


def test_doctor__label_values_that_are_named_decide(tmp_path: Path) -> None:
    _healthy(tmp_path / "scans", 2)
    assert _run(tmp_path / "scans", "--labels", "labels/*", "--label-values", 1, 2) == 0
    assert _run(tmp_path / "scans", "--labels", "labels/*", "--label-values", 1, "--out", tmp_path) == 3
    assert _findings(tmp_path) == {name: {("label-values", "error")} for name in ("p00", "p01")}


def test_doctor__modality_that_is_wrong(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ct = np.where(_head(0) > 100, rng.normal(40, 90, SHAPE), -1000).astype(np.int16)
    _save(tmp_path / "scans/ct.nii.gz", ct)
    _save(tmp_path / "scans/mri.nii.gz", _head(1))
    _save(tmp_path / "scans/z.nii.gz", (_head(2) - 200) / 100)
    (tmp_path / "m.csv").write_text("path,modality\nscans/ct.nii.gz,mri\nscans/mri.nii.gz,ct\nscans/z.nii.gz,ct\n")
    assert _run(tmp_path / "m.csv", "--out", tmp_path / "out") == 3
    found = _findings(tmp_path / "out")
    assert found["ct"] >= {("modality", "warning")} and found["z"] >= {("modality", "warning")}
    assert found["mri"] == {("modality", "error")}
    assert _run(tmp_path / "scans", "--out", tmp_path / "auto") == 0
    assert not any("modality" in str(item) for item in _findings(tmp_path / "auto").values())


def test_doctor__spacing_that_would_make_too_many_voxels_is_named_beside_the_refusal(tmp_path: Path) -> None:
    _save(tmp_path / "scans/huge.nii.gz", _head(0), np.diag([60, 60, 60, 1.0]))
    assert _run(tmp_path / "scans", "--out", tmp_path) == 3
    assert _findings(tmp_path) == {"huge": {("spacing", "error"), ("field-of-view", "warning")}}
    text = (tmp_path / "findings.csv").read_text()
    assert "2880x3120x2640" in text and "too many" in text and "Voxels of 60 x 60 x 60 mm" in text


def test_doctor__subject_with_all_scans(tmp_path: Path) -> None:
    _healthy(tmp_path / "scans", 2)
    _run(tmp_path / "scans", "--labels", "labels/*", "--subject", "p", "--out", tmp_path)
    assert _findings(tmp_path)["p00"] == {("subject", "warning")}


def test_doctor__copy_in_another_split_is_a_leak(tmp_path: Path) -> None:
    for row in range(3):
        _save(tmp_path / f"p{row}.nii.gz", _head(row))
    _save(tmp_path / "p3.nii.gz", _head(1) * 2)
    (tmp_path / "m.csv").write_text("path,split\np0.nii.gz,train\np1.nii.gz,train\np2.nii.gz,val\np3.nii.gz,test\n")
    assert _run(tmp_path / "m.csv", "--out", tmp_path / "out") == 3
    assert _findings(tmp_path / "out") == {"p3": {("near-duplicate", "error")}}


def test_quarantine__doctor_writes_what_prepare_leaves_out(
    clinic: Path, report: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = report.parent / "q.csv"
    with file.open(newline="") as text:
        rows = list(csv.DictReader(text))
    errors = {name for name, (_, severity) in EXPECTED.items() if severity == "error"} - {"a_mask", "series", "sheared"}
    assert {Path(row["path"]).name.partition(".")[0] for row in rows} == errors
    assert all(row["reason"] and len(row["sha256"]) == 64 for row in rows)
    arguments = ("--labels", "labels/*", "--no-forecast", "--salt", tmp_path / "salt", "--quarantine", file)
    assert _prepare(clinic, *arguments, "--out", tmp_path / "c.h5") == 3
    printed = capsys.readouterr().out
    refused = re.findall(r"^refused: (\S+): (.*)$", printed, re.MULTILINE)
    assert {Path(path).name.partition(".")[0] for path, _ in refused} == errors | {"a_mask", "series", "sheared"}
    assert sum(reason.startswith("in quarantine: ") for _, reason in refused) == len(errors) - 1  # .mgz never was a job
    assert "is no scan of these sources" not in printed
    left = _of_cache(tmp_path / "c.h5")  # a near duplicate is no error until it meets its twin across splits
    assert {check for found in left.values() for check, severity in found if severity == "error"} <= {"near-duplicate"}


def test_quarantine__what_an_argument_takes_is_not_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scans, file = tmp_path / "scans", tmp_path / "q.csv"
    _save(scans / "series.nii.gz", np.stack([_head(0), _head(1)], axis=-1))
    _save(scans / "sheared.nii.gz", _head(2), np.eye(4) + np.eye(4, k=1) * [0, 0.3, 0, 0])
    _save(scans / "tiny.nii.gz", _head(3), np.diag([0.02, 0.02, 0.02, 1]))
    _save(scans / "five.nii.gz", np.stack([_head(4)] * 2, axis=-1)[:, :, :, None])  # --volume does not take it
    _save(scans / "mask.nii.gz", _label(0))
    assert _run(scans, "--quarantine", file) == 3
    with file.open(newline="") as text:
        assert [row["path"] for row in csv.DictReader(text)] == ["scans/five.nii.gz"]
    printed = capsys.readouterr().out
    assert f"{file} with 1 scans" in printed
    assert "not in it, for an argument lets prepare take it: 1 --spacing-mm, 1 --unshear, 1 --volume\n" in printed
    assert "not in it, for it is no fault of the scan: 1 label-map\n" in printed
    arguments = ("--no-forecast", "--salt", tmp_path / "salt", "--quarantine", file, "--out", tmp_path / "c.h5")
    assert _prepare(scans, *arguments, "--volume", 1, "--unshear") == 3
    refused = re.findall(r"^refused: (\S+): (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert {Path(path).name for path, _ in refused} == {"five.nii.gz", "mask.nii.gz", "tiny.nii.gz"}


def test_quarantine__warnings_too_and_nothing_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scans, file = tmp_path / "scans", tmp_path / "q.csv"
    for row in range(3):
        _save(scans / f"clipped{row}.nii.gz", np.minimum(_head(row), 480))
    _save(scans / "thick.nii.gz", _head(3), np.diag([1, 1, 4, 1.0]))
    (scans / "empty.nii.gz").touch()
    assert _run(scans, "--quarantine", file, "--quarantine-warnings") == 3
    printed = capsys.readouterr().out
    assert re.search(r"^warning  clipped +3  Clipped intensities$", printed, re.MULTILINE)
    assert f"#1 {scans / 'clipped0.nii.gz'}: The highest value, 480" in printed and "and 1 more (--all)" in printed
    with file.open(newline="") as text:
        assert [row["path"] for row in csv.DictReader(text)] == [
            "scans/clipped0.nii.gz",
            "scans/clipped1.nii.gz",
            "scans/clipped2.nii.gz",
            "scans/empty.nii.gz",
        ]
    before = file.read_bytes()
    assert _run(scans, "--quarantine", file) == 1
    assert "exists; name another file or pass --overwrite" in capsys.readouterr().err
    assert file.read_bytes() == before
    (scans / "empty.nii.gz").unlink()
    assert _run(scans, "--quarantine", file, "--overwrite", "--all") == 0
    assert file.read_text() == "path,sha256,reason\n" and "more (--all)" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("none",), "does not exist"),
        (("none.h5",), "does not exist"),
        ((".", "--workers", 0), "--workers is 0"),
        ((".", "--quarantine-warnings"), "needs --quarantine"),
        ((".", "--quarantine", "none/q.csv"), "does not exist"),
        (("c.h5", "a.nii"), "a cache is examined alone"),
        (("c.h5", "--quarantine", "q.csv", "--pet"), "--pet and --quarantine can be given for sources only"),
        ((".", "--out", "file"), "is a file"),
        (("empty",), "no scan was found"),
    ],
)
def test_doctor__bad_arguments_are_one_line(
    arguments: tuple[object, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    assert _run(*arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"file", "empty"}


# ---------------------------------------------------------------------- caches


@pytest.fixture
def cache(tiny_cache: Path, tmp_path: Path) -> Path:
    return Path(shutil.copyfile(tiny_cache, tmp_path / "c.h5"))


def _edit(path: Path, change: Callable[[list[dict]], None]) -> None:
    """Change the cases of the index of a cache."""
    with h5py.File(path, "r+") as file:
        index = json.loads(bytes(file["index"][()]))
        change(index["cases"])
        del file["index"]
        file["index"] = np.frombuffer(json.dumps(index).encode(), dtype=np.uint8)


def _of_cache(path: Path, *arguments: object) -> dict[str, set[tuple[str, str]]]:
    out = path.parent / "out"
    code = _run(path, "--out", out, *arguments)
    found = _findings(out)
    assert code == (3 if any(severity == "error" for items in found.values() for _, severity in items) else 0)
    return found


def test_doctor__healthy_caches_give_no_error_or_warning(tiny_cache: Path, tmp_path: Path) -> None:
    path = Path(shutil.copyfile(tiny_cache, tmp_path / "c.h5"))
    assert _of_cache(path) == {"": {("class-balance", "info")}}


def test_doctor__cache_that_is_a_folder(tmp_path: Path) -> None:
    _healthy(tmp_path / "scans", 3)
    arguments = ("--labels", "labels/*", "--shard-gib", 0.0001, "--salt", tmp_path / "salt")
    assert _prepare(tmp_path / "scans", *arguments, "--out", tmp_path / "cache") == 0
    assert len(list((tmp_path / "cache").glob("*.h5"))) > 1
    assert _of_cache(tmp_path / "cache") == {"": {("split", "info")}}
    next((tmp_path / "cache").glob("*.h5")).unlink()
    assert _of_cache(tmp_path / "cache") == {"": {("cache", "error")}}


def test_doctor__array_that_cannot_be_decoded(cache: Path) -> None:
    key = VolumeCache(cache).cases[3].key
    with h5py.File(cache, "r") as file:
        chunk = file[f"cases/{key}/image"].id.get_chunk_info(0)
    with cache.open("r+b") as raw:
        raw.seek(chunk.byte_offset)
        raw.write(b"\xff" * chunk.size)
    assert _of_cache(cache)[key] == {("decode", "error")}


@pytest.mark.parametrize(
    ("field", "value", "check"),
    [
        ("scale", [0.0], "constants"),
        ("low", [9e9], "constants"),
        ("edge_q99", [-1.0], "constants"),
        ("spacing_mm", [1.0, 1.0, 2.0], "constants"),
        ("fill", [-5], "index"),
        ("shape", [40, 56, 41], "index"),
        ("foreground_fraction", 0.123, "index"),
        ("foreground_box", [[0, 1], [0, 1], [0, 1]], "index"),
        ("label_values", [0, 1, 2, 3], "index"),
    ],
)
def test_doctor__index_that_is_wrong(cache: Path, field: str, value: object, check: str) -> None:
    def change(cases: list[dict]) -> None:
        cases[2][field] = value

    _edit(cache, change)
    found = _of_cache(cache)
    assert (check, "error") in found["case002"]
    assert set(found) == {"", "case002"}


def test_doctor__arrays_that_changed(cache: Path) -> None:
    with h5py.File(cache, "r+") as file:
        file["cases/case001/foreground"][...] = 0
        file["cases/case002/label"][0, 0, 0] = 9
        file["cases/case004/foreground_chunks"][...] = 0.5
    found = _of_cache(cache)
    assert found["case001"] >= {("index", "error"), ("foreground", "error")}
    assert found["case002"] == {("index", "error")} and found["case004"] == {("index", "error")}


def test_doctor__copies_and_splits(cache: Path) -> None:
    def change(cases: list[dict]) -> None:
        cases[1]["source_sha256"] = cases[0]["source_sha256"]  # both in train
        cases[5]["source_sha256"] = cases[2]["source_sha256"]  # val and train
        cases[6]["subject"] = cases[3]["subject"]

    _edit(cache, change)
    with h5py.File(cache, "r+") as file:
        for name in ("image", "foreground"):
            file[f"cases/case007/{name}"][...] = file[f"cases/case004/{name}"][...]
    found = _of_cache(cache)
    assert found["case001"] == {("duplicate", "warning")}
    assert found["case005"] == {("duplicate", "error")}
    assert found["case006"] == {("split", "error")}


def test_doctor__flat_case_and_odd_classes(cache: Path) -> None:
    def change(cases: list[dict]) -> None:
        cases[0]["edge_q99"] = [0.0]
        for case in cases:
            case["class_index"] = int(case["split"] == "test")

    _edit(cache, change)
    found = _of_cache(cache)
    assert found["case000"] == {("flat", "warning")}
    assert ("class-balance", "error") in found[""]


def test_doctor__mixed_spacings_break_a_training(make_cache: Callable[..., Path], cache: Path) -> None:
    def change(cases: list[dict]) -> None:
        cases[4]["spacing_mm"] = [2.0, 2.0, 2.0]
        cases[4]["affine"] = (np.asarray(cases[4]["affine"]) * [2, 2, 2, 1]).tolist()

    _edit(cache, change)
    assert _of_cache(cache)[""] == {("class-balance", "info"), ("mixed-spacing", "error")}


def test_doctor__cache_that_does_not_open(cache: Path) -> None:
    data = cache.read_bytes()
    cache.write_bytes(data[: len(data) // 2])
    assert _of_cache(cache) == {"": {("cache", "error")}}
    cache.write_bytes(gzip.compress(data[:1000]))
    assert _of_cache(cache) == {"": {("cache", "error")}}
