"""A label map cached from any orientation returns to its own file."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import affine_transform

from agssd.evaluation.predictions import to_source_grid, write_prediction


@dataclass
class Case:
    key: str
    affine: Any
    source_affine: Any
    source_shape: tuple[int, int, int]


def blob_on(shape: tuple[int, int, int], affine: np.ndarray) -> np.ndarray:
    """Return a label map of two ellipsoids fixed in the world, on the grid of an affine."""
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), -1)
    world = grid @ affine[:3, :3].T + affine[:3, 3]
    label = np.zeros(shape, np.int16)
    label[(((world - [3, -4, 5]) / [9, 6, 12]) ** 2).sum(-1) < 1] = 1
    label[(((world - [-8, 6, -5]) / [5, 8, 4]) ** 2).sum(-1) < 1] = 2
    return label


def centred(linear: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = linear
    affine[:3, 3] = -linear @ ((np.array(shape) - 1) / 2)
    return affine


def tensor_affine(shape: tuple[int, int, int], spacing: float) -> np.ndarray:
    """Return (d, h, w) -> world with D = superior, H = anterior, W = right."""
    return centred(np.fliplr(np.eye(3)) * spacing, shape)


def dice(a: np.ndarray, b: np.ndarray, value: int) -> float:
    return float(2 * ((a == value) & (b == value)).sum() / ((a == value).sum() + (b == value).sum()))


ORIENTATIONS = [
    np.eye(3)[:, list(order)] * np.array(signs)
    for order, signs in itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3))
]


@pytest.mark.parametrize("number", range(0, 48, 5))
def test_to_source_grid__same_voxels_in_another_order__exact(number: int) -> None:
    linear = ORIENTATIONS[number]
    shape = tuple(int(n) for n in np.abs(linear.T) @ np.array([36, 40, 44]))  # (i, j, k)
    source_affine = centred(linear * 1.0, shape)
    source = blob_on(shape, source_affine)
    cached_affine = tensor_affine((44, 40, 36), 1.0)
    cached = blob_on((44, 40, 36), cached_affine)
    case = Case("a", cached_affine.tolist(), source_affine.tolist(), shape)
    assert np.array_equal(to_source_grid(cached, case), source)
    scores = np.stack([cached == value for value in range(3)]).astype(np.float32)
    assert np.array_equal(to_source_grid(scores, case), source)


def test_to_source_grid__resampled_and_oblique__overlays_the_source() -> None:
    angle = 0.3
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    shape = (64, 60, 30)
    source_affine = centred(turn @ np.diag([-0.7, 0.8, 1.6]), shape)
    source = blob_on(shape, source_affine)
    cached_affine = tensor_affine((60, 60, 60), 1.0)
    cached = blob_on((60, 60, 60), cached_affine)
    case = Case("a", cached_affine, source_affine, shape)
    nearest = to_source_grid(cached, case)
    linear = to_source_grid(np.stack([cached == v for v in range(3)]).astype(np.float32), case)
    for value in (1, 2):
        assert dice(nearest, source, value) > 0.92  # 1 mm voxels against ellipsoids of 4 to 12 mm
        assert dice(linear, source, value) > 0.92
    # an independent path: resample with the inverse written out by hand
    matrix = np.linalg.inv(cached_affine) @ source_affine
    expected = affine_transform(cached, matrix[:3, :3], matrix[:3, 3], output_shape=shape, order=0)
    assert (expected != nearest).mean() < 1e-4


def test_to_source_grid__cache_covers_a_part__background_outside() -> None:
    source_affine, cached_affine = np.eye(4), tensor_affine((6, 6, 6), 1.0)
    cached_affine[:3, 3] = [10, 10, 10]
    case = Case("a", cached_affine, source_affine, (20, 20, 20))
    for scores in (np.ones((6, 6, 6), np.int16), np.stack([np.zeros((6, 6, 6)), np.ones((6, 6, 6))])):
        found = to_source_grid(scores, case)
        assert found[10:16, 10:16, 10:16].all()
        assert found[12, 12, :9].sum() == 0 and found[12, 12, 17:].sum() == 0


def test_write_prediction__affine_shape_and_values__kept_and_no_half_file_left(tmp_path: Path) -> None:
    shape = (10, 12, 14)
    affine = centred(np.diag([-0.5, 0.5, 2.0]), shape)
    cached_affine = tensor_affine((28, 6, 5), 1.0)
    case = Case("group/one", cached_affine, affine, shape)
    path = write_prediction(np.full((28, 6, 5), 2, np.int16), case, tmp_path / "new")
    assert path == tmp_path / "new" / "group_one.nii.gz"
    image = nib.load(path)
    assert image.shape == shape and np.allclose(image.affine, affine, atol=1e-6)
    assert image.header.get_xyzt_units()[0] == "mm" and image.get_data_dtype() == np.uint8
    assert [entry.name for entry in path.parent.iterdir()] == ["group_one.nii.gz"]


def test_write_prediction__place_that_cannot_be__clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    case = Case("a", np.eye(4), np.eye(4), (4, 4, 4))
    with pytest.raises(ValueError, match="cannot write"):
        write_prediction(np.zeros((4, 4, 4), np.int16), case, tmp_path / "file" / "folder")
