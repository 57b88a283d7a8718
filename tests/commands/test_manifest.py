"""``agssd manifest``: channels from files, classes from labels, and that prepare takes what it writes."""

from __future__ import annotations

import csv
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from agssd.cli import main
from agssd.data_modules.cache import VolumeCache

CONTRASTS = ("flair", "t1", "t1ce", "t2")


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([2.0, 1.0, 1.0, 1.0])), path)


def head(seed: int, shape: tuple[int, int, int] = (16, 18, 20)) -> np.ndarray:
    array = np.zeros(shape, np.float32)
    array[2:-2, 2:-2, 2:-2] = np.random.default_rng(seed).normal(500, 60, tuple(n - 4 for n in shape))
    return array


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def brats(folder: Path, people: int) -> None:
    for number in range(people):
        name = f"BraTS2021_{number:05d}"
        label = np.zeros((16, 18, 20), np.uint8)
        label[4:8, 4:8, 4:8], label[8:10, 4:8, 4:8], label[10:12, 4:8, 4:8] = 1, 2, 4
        save(folder / name / f"{name}_seg.nii.gz", label)
        for place, contrast in enumerate(CONTRASTS):
            save(folder / name / f"{name}_{contrast}.nii.gz", head(10 * number + place))


def test_channels__one_case_a_person_in_the_order_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    brats(tmp_path / "brats", 3)
    (tmp_path / "brats" / "BraTS2021_00002" / "BraTS2021_00002_t2.nii.gz").unlink()
    out = tmp_path / "brats.csv"
    words = ["manifest", str(tmp_path / "brats"), "--labels", "*_seg.nii.gz", "--channels", *CONTRASTS]
    assert main([*words, "--modality", "mri", "--out", str(out)]) == 3
    assert capsys.readouterr().out.count("the channel t2 lies not beside it") == 3
    rows = rows_of(out)
    assert [[Path(p).name.split("_")[-1] for p in row["path"].split(";")] for row in rows] == [
        [f"{contrast}.nii.gz" for contrast in CONTRASTS]
    ] * 2
    assert [Path(row["label_path"]).name for row in rows] == [f"BraTS2021_{n:05d}_seg.nii.gz" for n in range(2)]
    assert len({row["subject"] for row in rows}) == 2
    cache = tmp_path / "c.h5"
    assert main(["prepare", str(out), "--spacing-mm", "1", "1", "2", "--out", str(cache)]) == 0
    assert all(case.channels == 4 and case.label_values for case in VolumeCache(cache).cases)


@pytest.mark.parametrize("measure", ["label-volume", "share-of-label-1"])
def test_class_by__thirds_of_what_is_not_in_test(
    measure: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    counts, ones = rng.permutation(np.arange(100, 210, 10)), rng.permutation(np.arange(10, 98, 8))
    lines = ["path,subject,label_path,split"]
    for number, (count, share) in enumerate(zip(counts, ones, strict=True)):
        label = np.zeros(16 * 18 * 20, np.uint8)
        label[:count], label[: round(count * share / 100)] = 2, 1
        save(tmp_path / f"{number}.nii", head(number))
        save(tmp_path / f"{number}_l.nii", rng.permutation(label).reshape(16, 18, 20))
        lines.append(f"{number}.nii,p{number},{number}_l.nii,{'test' if number < 3 else ''}")
    save(tmp_path / "x.nii", head(99))
    lines.append("x.nii,px,,")
    (tmp_path / "m.csv").write_text("\n".join(lines) + "\n")
    out = tmp_path / "size.csv"
    assert main(["manifest", str(tmp_path / "m.csv"), "--class-by", measure, "--out", str(out)]) == 3
    told = capsys.readouterr().out
    values = 2.0 * counts if measure == "label-volume" else np.round(counts * ones / 100) / counts
    low, high = np.quantile(values[3:], [1 / 3, 2 / 3])
    assert f"of 8 cases part at {low:.4g} and {high:.4g}" in told and "it has no label" in told
    expected = {f"p{n}": "large" if v > high else "small" for n, v in enumerate(values) if not low <= v <= high}
    assert {row["subject"]: row["class"] for row in rows_of(out)} == expected and 5 <= len(expected) < 11
    assert main(["prepare", str(out), "--modality", "mri", "--spacing-mm", "1", "1", "2", "--out", f"{out}.h5"]) == 0
    assert VolumeCache(Path(f"{out}.h5")).class_names == ("large", "small")
    assert main(["manifest", str(tmp_path / "m.csv"), "--out", str(out)]) == 2
    assert "exists" in capsys.readouterr().err
