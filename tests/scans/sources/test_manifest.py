"""CSV manifests: rows become jobs, and every mistake is named by line and column before a scan is read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from agssd.scans.sources.manifest import COLUMNS, add_manifest
from agssd.scans.sources.plan import Plan, plan_sources

NAMES = ("a.nii", "b.nii", "c.nii", "sub/b.nii", "sub/c.nii", "a_l.nii")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    for name in NAMES:
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def _plan(folder: Path, text: str | bytes) -> Plan:
    (folder / "m.csv").write_bytes(text.encode() if isinstance(text, str) else text)
    return plan_sources([folder / "m.csv"])


def test_manifest__rows(folder: Path) -> None:
    (folder / "m.csv").write_text(
        "path,subject,modality,label_path,class,split,age\n"
        "a.nii,p1,MR,a_l.nii,sick,train,7\n"
        "sub/b.nii;sub/c.nii,p2,CT,,,,8\n"
        "\n"
        f"{folder / 'c.nii'},,,,well,test,\n"
    )
    plan = plan_sources([folder / "m.csv"], modality="mri")
    one, two, three = plan.jobs
    assert one.paths == (folder / "a.nii",) and one.label == folder / "a_l.nii"
    assert (one.subject, one.modality, one.class_name, one.split) == ("p1", "mri", "sick", "train")
    assert two.paths == (folder / "sub/b.nii", folder / "sub/c.nii") and (two.modality, two.split) == ("ct", None)
    assert (three.paths, three.subject, three.modality, three.split) == ((folder / "c.nii",), "c", "mri", "test")
    assert "columns not used: age" in plan.notes[0]


def test_manifest__byte_order_mark_windows_ends_and_quotes_are_read(folder: Path) -> None:
    plan = _plan(folder, b'\xef\xbb\xbfpath , subject\r\n"a.nii"," p, 1 "\r\nb.nii,p2\r\n')
    assert [job.subject for job in plan.jobs] == ["p, 1", "p2"]


BAD = {
    "no path column": ("subject\np\n", "has no column 'path'; its columns are subject"),
    "synonym": ("file\na.nii\n", "column 'file' is unknown, did you mean 'path'?"),
    "misspelt": ("path,lable_path\na.nii,a_l.nii\n", "column 'lable_path' is unknown, did you mean 'label_path'?"),
    "longer": ("path,subject_id\na.nii,1\n", "column 'subject_id' is unknown, did you mean 'subject'?"),
    "repeated": ("path,subject,subject\na.nii,1,2\n", "column 'subject' stands more than once"),
    "empty file": ("", "m.csv is empty; its first line must name the columns, of path, subject"),
    "only a header": ("path,subject\n\n", "has no rows below its header"),
    "semicolons": ("path;subject\na.nii;1\n", "its columns are parted by semicolons"),
    "tabs": ("path\tsubject\na.nii\t1\n", "its columns are parted by tabs"),
    "latin-1": ("path,subject\na.nii,1\nb.nii,J\u00f6rg\n".encode("latin-1"), "not UTF-8: byte 0xf6 in line 3"),
    "utf-16": ("path\na.nii\n".encode("utf-16"), "is UTF-16"),
    "binary": (b"path\na\0.nii\n", "is no text: it holds NUL bytes"),
    "open quote": ('path\n"a.nii\n', "unexpected end of data; check its quotes"),
    "modality": ("path,modality\na.nii,PET\n", "1 error: line 2, column modality: 'pet' is neither ct nor mri"),
    "split": ("path,split\na.nii,train\nb.nii,dev\n", "line 3, column split: 'dev' is none of train, val, test"),
    "no path": ("path,subject\n,p1\n", "line 2, column path: empty"),
    "missing file": ("path\na.nii\nz.nii\n", r"line 3, column path: .*z.nii does not exist"),
    "missing channel": ("path\na.nii;z.nii\n", r"line 2, column path: .*z.nii does not exist"),
    "missing label": ("path,label_path\na.nii,z.nii\n", r"line 2, column label_path: .*z.nii does not exist"),
    "label is image": ("path,label_path\na.nii,a.nii\n", r"column label_path: .*a.nii is the image itself"),
    "short row": ("path,subject,split\na.nii,p\n", "line 2, column split: 2 fields where the header has 3"),
    "long row": ("path,subject\na.nii,p,q\n", "line 2, column subject: 3 fields where the header has 2"),
    "twice": ("path\na.nii\nb.nii\nsub/../a.nii\n", "line 4, column path: sub/../a.nii stands in line 2 already"),
    "same channels": ("path\na.nii;a.nii\n", "one file is named as two channels"),
    "two splits": (
        "path,subject,split\na.nii,p1,train\nb.nii,p2,val\nc.nii,p1,test\n",
        "line 4, column split: subject 'p1' is in test here and in train in line 2",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_manifest__mistake_is_named_by_line_and_column(folder: Path, kind: str) -> None:
    text, message = BAD[kind]
    with pytest.raises(ValueError, match=message) as caught:
        _plan(folder, text)
    assert str(folder / "m.csv") in str(caught.value) and "\n" not in str(caught.value)


def test_manifest__all_errors_are_counted_and_ten_shown(folder: Path) -> None:
    rows = "".join(f"none{row}.nii,{'dev' if row % 2 else 'train'}\n" for row in range(14))
    with pytest.raises(ValueError) as caught:
        _plan(folder, "path,split\n" + rows)
    message = str(caught.value)
    assert "has 21 errors: line 2, column path" in message and message.endswith("; and 11 more")
    assert message.count("; line") == 9


@pytest.mark.parametrize("seed", range(3))
def test_manifest__a_column_with_one_slip_is_never_passed_over(folder: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for column in COLUMNS[1:]:
        place = int(rng.integers(len(column)))
        swapped = column[:place] + column[place : place + 2][::-1] + column[place + 2 :]
        for slip in {column[:place] + column[place + 1 :], swapped, column.upper(), column + "s"} - {column}:
            with pytest.raises(ValueError, match="is unknown, did you mean"):
                _plan(folder, f"path,{slip}\na.nii,1\n")


@pytest.mark.parametrize("name", ["age", "sex", "site", "scanner", "centre", "pathology", "dose", "field_strength"])
def test_manifest__foreign_columns_are_said_and_kept_out(folder: Path, name: str) -> None:
    plan = Plan()
    (folder / "m.csv").write_text(f"path,{name}\na.nii,1\n")
    add_manifest(plan, folder / "m.csv", None)
    assert len(plan.jobs) == 1 and f"columns not used: {name}; known are path, subject" in plan.notes[0]
