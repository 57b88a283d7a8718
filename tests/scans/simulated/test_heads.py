from __future__ import annotations

import csv
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from agssd.scans.simulated.heads import (
    LABEL_NAMES,
    Template,
    draw_parameters,
    load_template,
    simulate_subject,
    write_cohort,
)

pytest.importorskip("nilearn", reason="the template is in nilearn's wheel")


@pytest.fixture(scope="module")
def template() -> Template:
    return load_template(5.0)


def drawn(number: int, **changes: object) -> dict[str, object]:
    return draw_parameters(np.random.default_rng((0, number))) | changes


def unchanged(template: Template) -> dict[str, object]:
    """Parameters that deform and degrade nothing."""
    still = drawn(0)
    empty = np.zeros((0, 3))
    return still | {
        "scales": (1.0, 1.0, 1.0),
        "degrees": (0.0, 0.0, 0.0),
        "translation": (0.0, 0.0, 0.0),
        "control_points": np.zeros_like(still["control_points"]),
        "gamma": 1.0,
        "bias": [0.0] * 20,
        "motion_degrees": empty,
        "motion_translation": empty,
        "motion_times": np.zeros(0),
        "noise": 0.0,
        "gain": 1000.0,
    }


def test_load_template__volumes_are_those_of_an_adult_brain(template: Template) -> None:
    litres = {name: getattr(template, name).sum() * 5.0**3 / 1e6 for name in ("grey", "white")}
    assert 0.8 < litres["grey"] < 1.2
    assert 0.4 < litres["white"] < 0.7
    centre = template.affine @ [*(n / 2 for n in template.t1.shape), 1]
    assert np.abs(centre[:3] - (0, -18, 0)).max() < 15  # the brain's middle in MNI space


def test_simulate_subject__without_changes_gives_the_template(template: Template) -> None:
    image, label = simulate_subject(template, unchanged(template))
    brain = template.t1 > 0.1
    assert np.abs(image[brain] / 1000.0 - template.t1[brain]).max() <= 0.5e-3 + 1e-6
    assert (image[~brain] == 0).all()
    assert ((label == 2) == ((template.white > 0.5) & (template.white > template.grey))).all()


def test_simulate_subject__depends_on_its_parameters_alone(template: Template) -> None:
    first, second = simulate_subject(template, drawn(3)), simulate_subject(template, drawn(3))
    other = simulate_subject(template, drawn(4))
    assert all((a == b).all() for a, b in zip(first, second, strict=True))
    assert (first[1] != other[1]).mean() > 0.05


def test_simulate_subject__keeps_torch_random_state(template: Template) -> None:
    import torch

    before = torch.get_rng_state()
    simulate_subject(template, drawn(5))
    assert (torch.get_rng_state() == before).all()


@pytest.mark.parametrize("number", range(4))
def test_simulate_subject__anatomy_stays_plausible(template: Template, number: int) -> None:
    image, label = simulate_subject(template, drawn(number))
    assert set(np.unique(label)) == set(range(len(LABEL_NAMES)))
    volume = {value: (label == value).mean() for value in (1, 2)}
    still = simulate_subject(template, unchanged(template))[1]
    for value, share in volume.items():
        assert 0.6 < share / (still == value).mean() < 1.5
    assert (image[label > 0] > 0).mean() > 0.97  # tissue lies in the brain
    assert np.median(image[label == 2]) > np.median(image[label == 1])  # T1: white matter is brighter


def test_write_cohort__same_subject_whatever_the_size(tmp_path: Path) -> None:
    write_cohort(tmp_path / "a", {"train": 1, "test": 1}, 6.0)
    seen: list[tuple[int, int]] = []
    manifest = write_cohort(tmp_path / "b", {"train": 2, "val": 1}, 6.0, progress=lambda *at: seen.append(at))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    for name in ("sim000", "sim001"):
        images = [nib.load(tmp_path / folder / "images" / f"{name}.nii.gz") for folder in "ab"]
        assert (np.asanyarray(images[0].dataobj) == np.asanyarray(images[1].dataobj)).all()
        assert np.allclose(images[0].header.get_zooms(), 6.0)
    with manifest.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["split"] for row in rows] == ["train", "train", "val"]
    assert all((manifest.parent / row[column]).exists() for row in rows for column in ("path", "label_path"))
