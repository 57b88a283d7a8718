"""Groups of label values: what becomes which class, and what a file may say."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from agssd.cli import main
from agssd.data_modules.cache import VolumeCache
from agssd.scans.preparing.label_groups import grouped, read_label_groups

ROOT = Path(__file__).resolve().parents[3]


def test_grouped__every_voxel_gets_its_groups_number() -> None:
    label = np.random.default_rng(0).integers(0, 300, (9, 8, 7)).astype(np.int16)
    groups = ((5,), (2, 299, 7), (118,))
    found = grouped(label, groups)
    for number, values in enumerate(groups, start=1):
        assert (found[np.isin(label, values)] == number).all()
    assert (found[~np.isin(label, sum(groups, ()))] == 0).all() and found.dtype == np.uint8


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("liver: [5]\nspleen: [1, 5]", "5 is in liver and in spleen"),
        ("liver: 5", "liver is 5; give a list"),
        ("liver: [0]", "liver holds 0"),
        ("liver: [true]", "liver holds True"),
        ("- [1]", "holds no groups"),
        ("", "holds no groups"),
        ("liver: [", "cannot be read"),
    ],
)
def test_read_label_groups__says_what_is_wrong(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "groups.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        read_label_groups(path)


@pytest.mark.parametrize("path", sorted((ROOT / "conf" / "labels").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_groups__are_disjoint_and_of_known_values(path: Path) -> None:
    groups = read_label_groups(path)
    assert len(groups) >= 3 and max(map(max, groups)) <= 117


def test_prepare__stores_classes_in_place_of_values(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    head = np.zeros((20, 22, 18))
    head[3:-3, 3:-3, 3:-3] = rng.normal(500, 60, (14, 16, 12))
    label = np.zeros(head.shape, np.int16)
    label[5:8, 5:9, 5:9], label[9:12, 5:9, 5:9], label[13:15, 5:9, 5:9] = 7, 300, 40
    for name, array in (("a", head.astype(np.float32)), ("a_seg", label)):
        nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / f"{name}.nii.gz")
    groups = tmp_path / "groups.yaml"
    groups.write_text("first: [300]\nsecond: [7, 12]\n")
    words = ["prepare", str(tmp_path), "--labels", "*_seg.nii.gz", "--modality", "mri", "--out", str(tmp_path / "c.h5")]
    assert main([*words, "--label-groups", str(groups)]) == 0
    cache = VolumeCache(tmp_path / "c.h5")
    stored = cache.read_whole(0, "label").transpose(2, 1, 0)
    assert np.array_equal(stored, np.select([label == 300, label == 7], [1, 2]))
    assert cache.cases[0].label_values is not None and set(cache.cases[0].label_values) <= {0, 1, 2}
    assert main([*words, "--overwrite"]) == 0
    assert 300 in (VolumeCache(tmp_path / "c.h5").cases[0].label_values or ())
