"""From reasons and notes to findings: the right check, and no name in what a page shows."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from agssd.scans import findings
from agssd.scans.findings import CHECKS, SEVERITIES, Finding, merged, note, refusal

SCAN, LABEL = Path("clinic/DOE^JANE/19610704.nii.gz"), Path("clinic/DOE^JANE/19610704_seg.nii.gz")


@pytest.mark.parametrize(
    ("reason", "check", "message"),
    [
        ("empty file", "damaged", "Empty file."),
        (f"truncated or damaged: cannot read {SCAN}", "damaged", "Truncated or damaged."),
        ("408 voxels are NaN or infinite", "non-finite", "408 voxels are NaN or infinite."),
        ("1 voxels are infinite", "non-finite", "1 voxels are infinite."),
        ("9x9x1 voxels at this spacing are too thin; choose", "spacing", "9x9x1 voxels at this spacing are too thin."),
        (
            "its field of view of 8100 x 9 x 9 mm is larger than any body (3000 mm)",
            "field-of-view",
            "Its field of view of 8100 x 9 x 9 mm is larger than any body.",
        ),
        (
            "its header says ct, line 3 of the manifest mri",
            "modality",
            "Its header says ct, line 3 of the manifest mri.",
        ),
        ("constant: all voxels are -1.5e+03", "constant", "Constant: all voxels are -1.5e+03."),
        ("4D image (128x96x24x2); save one 3D volume of it", "dimensions", "4D image (128x96x24x2)."),
        ("2D image (600x400)", "dimensions", "2D image (600x400)."),
        (
            "sheared affine: two axes are 18.5 degrees off a right angle (gantry tilt?)",
            "affine",
            "Sheared affine: two axes are 18.5 degrees off a right angle.",
        ),
        (
            "its spacing of 1 x 1 x 500 mm is outside 0.01 to 100.0 mm",
            "spacing",
            "Its spacing of 1 x 1 x 500 mm is outside 0.01 to 100.0 mm.",
        ),
        ("values 0 to 4095 are not HU: a CT has negative values", "modality", "Values 0 to 4095 are not HU."),
        (
            f"its label {LABEL} has shape 4x5x6, the image has 4x5x7",
            "label-grid",
            "Its label file has shape 4x5x6, the image has 4x5x7.",
        ),
        (f"its label {LABEL}: all voxels are 0", "label-empty", "Its label: all voxels are 0."),
        (f"its label {LABEL}: truncated or damaged: {LABEL}", "label-file", "Its label: truncated or damaged."),
        (f"{SCAN} has a label already ({LABEL.name}); narrow --labels", "not-used", "Its image has another label"),
        ("DICOM file: a localiser (scout)", "no-scan", "A localiser."),
        ("series of 4 DICOM files: a secondary capture (a picture), not a scan", "no-scan", "A secondary capture."),
        (
            "series of 9 DICOM files: missing slices: a gap of 9.00 mm after slice 3 of 9, x",
            "series",
            "Missing slices:",
        ),
        (
            "truncated or damaged: CRC check failed 0x1d != 0x2e",
            "damaged",
            "Truncated or damaged: CRC check failed 0x1d != 0x2e.",
        ),
        (
            "truncated or damaged: Expected 184320 bytes, got 182320 bytes from object",
            "damaged",
            "Truncated or damaged: Expected 184320 bytes, got 182320 bytes.",
        ),
        (
            "truncated or damaged: Compressed file ended before the end-of-stream marker was reached",
            "damaged",
            "Truncated or damaged: Compressed file ended before the end-of-stream marker was reached.",
        ),
        ("damaged pixel data: of DOE^JANE", "damaged", "Damaged pixel data."),
        ("truncated pixel data: 9x8 pixels decoded", "damaged", "Truncated pixel data: 9x8 pixels decoded."),
        (
            "series of 9 DICOM files: 2 volumes in one series (convolution kernels: B30f, DOE); --volume I",
            "dimensions",
            "2 volumes in one series (convolution kernels).",
        ),
        (
            "4 volumes in one series (image types and echo times: DOE and 1, JANE and 2); --volume I",
            "dimensions",
            "4 volumes in one series (image types and echo times).",
        ),
        (
            "4D image (9x9x9x2); --volume I (from 0) takes one of its 2 volumes",
            "dimensions",
            "4D image (9x9x9x2); --volume I (from 0) takes one of its 2 volumes.",
        ),
        (
            "missing slices: a gap of 9.00 mm after slice 3 of 9 (the first of 2 such gaps), where others are 3.00 mm "
            "apart",
            "series",
            "Missing slices: a gap of 9.00 mm after slice 3 of 9 (the first of 2 such gaps), where others are 3.00 mm "
            "apart.",
        ),
        (
            "mixed matrix sizes: 3 of 512x512, 1 of 256x256",
            "series",
            "Mixed matrix sizes: 3 of 512x512, 1 of 256x256.",
        ),
        (
            "its affine is degenerate: the spacing along axis 1 is 0",
            "affine",
            "Its affine is degenerate: the spacing along axis 1 is 0.",
        ),
        ("voxels of type float128 are not read", "dimensions", "Voxels of type float128 are not read."),
        (
            "series of 9 DICOM files: 2 patients in one series, by their PatientID",
            "series",
            "2 patients in one series.",
        ),
        ("series of 9 DICOM files: 2 modalities in one series: ct, mri", "series", "2 modalities in one series."),
        ("DICOM file: CT in DOE^JANE, not in HU", "modality", "A CT whose values are not in HU."),
        ("DICOM file: unsupported transfer syntax: DOE^JANE", "type", "Unsupported transfer syntax."),
        ("DICOM file: DOE^JANE, which is not read", "refused", "Refused; the reason stands in findings.csv."),
        ("unexpected KeyError: DOE^JANE", "refused", "Refused; the reason stands in findings.csv."),
        (f"anything about {SCAN} by DOE^JANE", "refused", "Refused; the reason stands in findings.csv."),
    ],
)
def test_refusal__names_the_check_and_nobody(reason: str, check: str, message: str) -> None:
    found = refusal(reason, [SCAN, LABEL])
    assert (found.check, found.severity) == (check, "error")
    assert found.message.startswith(message)
    assert found.text == reason
    for name in ("DOE", "JANE", "19610704", "clinic"):
        assert name not in found.message


@pytest.mark.parametrize(
    ("text", "check", "severity"),
    [
        ("sform and qform disagree by up to 3.2 mm; the sform is used", "sform-qform", "warning"),
        (
            "the header gives no orientation (sform and qform codes 0); NIfTI's default is used",
            "orientation",
            "warning",
        ),
        (
            "3 files of its series or folder could not be used; the volume may be short of slices",
            "series",
            "warning",
        ),
        ("2 files repeat an image of the series byte for byte and are left out", "duplicate", "info"),
        (
            "other files of its folder hold the same image, by its UID, in other bytes; each is taken by itself",
            "duplicate",
            "warning",
        ),
        ("axes 0.17 degrees off a right angle are taken as right-angled: 0.03 voxels off", "affine", "info"),
        ("axes 14.0 degrees off a right angle are resampled", "affine", "info"),
        ("DOE^JANE was here", "note", "info"),
    ],
)
def test_note__names_the_check_and_nobody(text: str, check: str, severity: str) -> None:
    found = note(text)
    assert (found.check, found.severity, found.text) == (check, severity, text)
    assert "JANE" not in found.message


def test_merged__one_finding_of_a_check_with_all_that_was_said() -> None:
    found = [
        Finding("spacing", "warning", "Voxels of 9 mm."),
        Finding("clipped", "info", "Cut."),
        Finding("spacing", "error", "Too thin.", f"{SCAN} is too thin"),
    ]
    one, two = merged(found)
    assert (one.check, one.severity, one.message) == ("spacing", "error", "Too thin. Voxels of 9 mm.")
    assert one.text == f"{SCAN} is too thin. Voxels of 9 mm."
    assert two == found[1]
    assert merged(found[:1] * 2) == [Finding("spacing", "warning", "Voxels of 9 mm.")]


def _reasons() -> list[tuple[str, str]]:
    """Return (place, text) of every reason that the package gives as one piece of text, with 1 for what it fills in."""

    def text(node: ast.expr) -> str:
        if isinstance(node, ast.JoinedStr):
            return "".join(text(value) for value in node.values)
        return str(node.value) if isinstance(node, ast.Constant) else "1"

    found = []
    for path in sorted(Path(findings.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "RefusedError":
                found.append((f"{path.name}:{node.lineno}", text(node.args[0])))
    return found


def test_refusal__every_reason_of_the_package_has_its_check() -> None:
    reasons = _reasons()
    assert len(reasons) > 50
    filled = {  # what stands for 1 is words, and other tests have them
        "1",
        "1 1 has shape 1, the image has 1",
        "1 1 lies up to 1 voxels off the image in space",
        "1 are too many; choose a larger --spacing-mm",
        "1 are too thin; choose a smaller --spacing-mm",
        "1 voxels are 1",
        "1, 1 voxels at a corner; --unshear resamples it",
        "its field of view of 1 mm is larger than any body (1 mm)",
        "its header says 1, line 1 of the manifest 1",
        "its label 1: 1",
        "its spacing of 1 mm is outside 1 to 1 mm",
    }
    unknown = [
        (place, reason)
        for place, reason in reasons
        if reason not in filled and refusal(reason.replace("its label 1 ", "its label FILE ")).check == "refused"
    ]
    assert not unknown


def test_checks__every_one_has_a_remedy() -> None:
    assert SEVERITIES == ("error", "warning", "info")
    for check in CHECKS.values():
        assert check.title and check.remedy and not check.remedy.endswith(".")
