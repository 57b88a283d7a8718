"""A hospital's folder becomes a cache: all that is in it is cached or named, and no identifier comes along."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agssd.commands import prepare
from agssd.data_modules.cache import VolumeCache
from agssd.scans.read import read_scan


def _run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    return prepare.run(parser.parse_args([str(argument) for argument in arguments]))


IDENTIFIERS = {
    "PatientName": "Zyxwvut^Quentin",
    "PatientID": "MRN-8840217",
    "PatientBirthDate": "19530817",
    "AccessionNumber": "ACC-5521903",
    "InstitutionName": "Hospital of Nowhere",
    "ReferringPhysicianName": "Ottokar^Wendelin",
    "StudyDescription": "follow-up of Zyxwvut",
}


@pytest.fixture
def hospital(tmp_path: Path, dicom: Any) -> Path:
    """Return a tree: a CT and an MR of one person, a CT of another, and what comes along from a PACS."""
    folder = tmp_path / "export"
    shape = (12, 20, 18)
    body = np.zeros(shape, dtype=bool)
    body[:, 4:16, 4:14] = True
    stored = np.where(body, dicom.stored(shape) // 4 + 900, 20).astype("u2")
    save = dicom.save
    save(folder / "MRN-8840217" / "Zyxwvut", dicom.series_of(stored, **IDENTIFIERS), "19530817_{}.dcm")
    save(folder / "MRN-8840217" / "mr", dicom.series_of(stored, "MR", **IDENTIFIERS))
    save(folder / "x", dicom.series_of(stored[::-1], **{**IDENTIFIERS, "PatientID": "other"}))
    save(folder / "x", dicom.series_of(dicom.stored(shape), "PT", **IDENTIFIERS), "PT{}")
    scout = dicom.series_of(dicom.stored((1, 9, 9)), ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    save(folder, scout, "scout")
    (folder / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    (folder / "AUTORUN.INF").write_text("viewer")
    return folder


def test_prepare__a_hospital_folder(hospital: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, salt = tmp_path / "c.h5", tmp_path / "salt"
    assert _run(hospital, "--out", out, "--salt", salt, "--workers", 2) == 3
    text = capsys.readouterr().out
    refused = [line for line in text.splitlines() if line.startswith("refused: ")]
    assert refused == [
        f"refused: {hospital / 'scout'}: DICOM file: a localiser (scout)",
        f"refused: {hospital / 'x' / 'PT0'}: series of 12 DICOM files: PET, which is taken only with --pet",
    ]
    assert "2 refused, 2 files ignored" in text
    cache = VolumeCache(out)
    assert sorted(case.modality for case in cache.cases) == ["ct", "ct", "mri"]
    assert len({case.subject for case in cache.cases}) == 2
    data = out.read_bytes()
    for text in (*IDENTIFIERS.values(), "Zyxwvut", "Quentin", "Wendelin", "other"):
        assert text.encode() not in data
    assert _run(hospital, "--out", out, "--salt", salt, "--overwrite", "--pet", "--modality", "mri") == 3
    assert len(VolumeCache(out)) == 2
    text = capsys.readouterr().out
    assert text.count("its header says ct, --modality says mri") == 2
    assert "PET, stored as MRI is" in text


def test_prepare__cached_voxels_are_those_of_the_series(hospital: Path, tmp_path: Path) -> None:
    source = hospital / "MRN-8840217" / "Zyxwvut"
    out = tmp_path / "c.h5"
    assert _run(source, "--out", out, "--salt", tmp_path / "salt", "--spacing-mm", 3, 1.5, 2) == 0
    cache = VolumeCache(out)
    info, scan = cache.cases[0], read_scan(source)
    image = cache.read_whole(0, "image")[0]
    for index in np.ndindex(*scan.array.shape):
        if sum(index) % 7 == 0:
            d, h, w = np.round(np.linalg.solve(info.affine, scan.affine @ [*index, 1])[:3]).astype(int)
            assert image[d, h, w] == scan.array[index]
