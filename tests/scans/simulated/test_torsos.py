"""Deformed copies of a labelled CT: labels stay with their organs, and copies differ."""

from __future__ import annotations

import csv
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from agssd.cli import main
from agssd.data_modules.cache import VolumeCache
from agssd.scans.simulated.torsos import LabelledScan, draw_ct_parameters, load_labelled_scan, simulate_ct


def made_scan(folder: Path) -> tuple[Path, Path, np.ndarray]:
    """Write a body in air with two organs of their own HU at 4 mm, and return image, label and label array."""
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in (40, 36, 44)), indexing="ij"))
    body = ((grid / np.array([0.85, 0.8, 1.2])[:, None, None, None]) ** 2).sum(0) < 1
    label = np.zeros(body.shape, np.uint8)
    for value, middle in ((5, (0.35, 0, 0.2)), (9, (-0.4, 0.1, -0.2))):
        label[((grid - np.array(middle)[:, None, None, None]) ** 2).sum(0) < 0.3**2] = value
    image = np.where(body, 40, -1000) + 200 * (label == 5) + 500 * (label == 9)
    image = image + np.random.default_rng(0).normal(0, 3, image.shape)
    affine = np.diag([4.0, 4.0, 4.0, 1.0])
    paths = folder / "ct.nii.gz", folder / "seg.nii.gz"
    nib.save(nib.Nifti1Image(image.astype(np.int16), affine), paths[0])
    nib.save(nib.Nifti1Image(label, affine), paths[1])
    return *paths, label


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> LabelledScan:
    image, label, _ = made_scan(tmp_path_factory.mktemp("scan"))
    return load_labelled_scan(image, label, ((5,), (9,)), 4.0)


def drawn(number: int, **changes: object) -> dict[str, object]:
    return draw_ct_parameters(np.random.default_rng((0, number)), 2) | changes


def test_simulate_ct__without_changes_gives_the_scan(scan: LabelledScan) -> None:
    still = {"scales": (1.0,) * 3, "degrees": (0.0,) * 3, "translation": (0.0,) * 3, "noise_hu": 0.0}
    still |= {"control_points": np.zeros((7, 7, 7, 3), np.float32), "shift_hu": np.array([0.0, 10.0, -20.0])}
    image, label = simulate_ct(scan, drawn(0, **still))
    assert np.array_equal(label, scan.label)
    assert np.abs(image - scan.image - np.array([0, 10, -20])[label]).max() < 1


def test_simulate_ct__labels_stay_with_their_organs(scan: LabelledScan) -> None:
    for number in range(3):
        image, label = simulate_ct(scan, drawn(number, shift_hu=np.zeros(3), noise_hu=0.0))
        assert (label != scan.label).mean() > 0.005, "something has moved"
        bright = image > 290  # half-way between body and the brighter organ
        assert 2 * (bright & (label == 2)).sum() / (bright.sum() + (label == 2).sum()) > 0.9
        air = (image < -500) == (scan.image < -500)
        assert 0.8 < air.mean() < 1, "the body moves, and nothing but air comes in from outside"
        assert image.min() >= -1024 and image[0, 0, 0] < -900


def test_simulate_ct__depends_on_its_parameters_alone(scan: LabelledScan) -> None:
    first, second, other = simulate_ct(scan, drawn(3)), simulate_ct(scan, drawn(3)), simulate_ct(scan, drawn(4))
    assert np.array_equal(first[0], second[0]) and np.array_equal(first[1], second[1])
    assert not np.array_equal(first[1], other[1])


def test_simulate__copies_of_a_scan_become_a_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, label, _ = made_scan(tmp_path)
    groups = tmp_path / "groups.yaml"
    groups.write_text("a: [5]\nb: [9]\n")
    out = tmp_path / "torsos"
    words = ["simulate", "--out", str(out), "--scan", str(image), "--label", str(label), "--label-groups", str(groups)]
    words += ["--subjects", "2", "0", "1", "--spacing-mm", "4"]
    assert main(words) == 0
    assert "nothing about patients" in capsys.readouterr().out
    with (out / "manifest.csv").open() as file:
        assert [row["split"] for row in csv.DictReader(file)] == ["train", "train", "test"]
    cache_path = tmp_path / "c.h5"
    assert main(["prepare", str(out / "manifest.csv"), "--spacing-mm", "4", "--out", str(cache_path)]) == 0
    cases = VolumeCache(cache_path).cases
    assert len(cases) == 3 and all(case.modality == "ct" and case.label_values == (0, 1, 2) for case in cases)
    assert main(words) == 2
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--subjects", "0", "1", "1"], "give at least 1 of train"),
        (["--spacing-mm", "0"], "give a positive number"),
        (["--label-groups", "x.yaml"], "belong together"),
        (["--scan", "x.nii"], "belong together"),
    ],
)
def test_simulate__says_what_is_wrong(
    change: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["simulate", "--out", str(tmp_path / "o"), "--subjects", "1", "0", "0", "--spacing-mm", "4", *change]
    assert main(words) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "o").exists()
