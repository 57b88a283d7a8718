"""From a file to a case: a place in the world stays its place, and intensities stay true."""

from __future__ import annotations

from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from agssd.scans.case import RefusedError
from agssd.scans.preparing.volumes import SAME_SPACING, Recipe, Volume, prepare_case, same_spacing, target_grid

SHAPE = (40, 44, 36)
ORDERS = [(axes, signs) for axes in permutations(range(3)) for signs in product((1, -1), repeat=3)]


def _head(shape: tuple[int, int, int] = SHAPE, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    inside = (grid**2).sum(0) < 0.8
    return np.where(inside, rng.normal(300, 20, shape), np.abs(rng.normal(0, 4, shape))).astype(np.float32)


def _save(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


def _world(case_affine: np.ndarray, index: np.ndarray) -> np.ndarray:
    return (case_affine @ np.append(index, 1.0))[:3]


@pytest.mark.parametrize("spacing", [None, (2.0, 1.5, 1.0)])
def test_prepare_case__a_voxel_keeps_its_world_position_in_all_48_orders(
    tmp_path: Path, spacing: tuple[float, float, float] | None
) -> None:
    bright = np.array([26, 15, 20])
    affine = np.diag([1.0, 1.2, 1.4, 1.0])
    affine[:3, 3] = (-20, 30, 5)
    away = (np.indices(SHAPE) - bright[:, None, None, None]) * np.array([1.0, 1.2, 1.4])[:, None, None, None]
    array = np.abs(np.random.default_rng(0).normal(0, 4, SHAPE)) + 900 * np.exp(-(away**2).sum(0) / 50)
    place = (affine @ np.append(bright, 1))[:3]
    image = nib.Nifti1Image(array, affine)
    first = None
    for axes, signs in ORDERS[:: 1 if spacing else 5]:
        turned = image.as_reoriented(np.stack([axes, signs], axis=1))
        nib.save(turned, tmp_path / "a.nii")
        case = prepare_case([tmp_path / "a.nii"], modality="mri", recipe=Recipe(spacing or (1.4, 1.2, 1.0)))
        weight = np.maximum(case.image[0].astype(float) * case.scale[0] + case.offset[0] - 450, 0)
        centre = np.array([(weight * index).sum() / weight.sum() for index in np.indices(weight.shape)])
        assert np.abs(_world(case.affine, centre) - place).max() < 0.1
        assert case.affine[0, 2] > 0 and case.affine[1, 1] > 0 and case.affine[2, 0] > 0  # R, A, S increase
        assert np.allclose(_world(case.source_affine, np.linalg.inv(turned.affine)[:3] @ np.append(place, 1)), place)
        if first is None:
            first = case
        assert np.abs(case.image.astype(int) - first.image).max() <= 1
        assert np.array_equal(case.foreground, first.foreground)
        assert np.allclose(case.affine, first.affine)


def test_prepare_case__shared_storage_orders_give_one_volume(shared_data: Path) -> None:
    paths = sorted((shared_data / "odd" / "orientations").glob("*.nii.gz"))
    assert len(paths) == 25
    first = prepare_case([paths[0]], recipe=Recipe((4.0, 4.0, 4.0)))
    for path in paths[1:]:
        case = prepare_case([path], recipe=Recipe((4.0, 4.0, 4.0)))
        assert case.image.shape == first.image.shape
        assert np.abs(_world(case.affine, np.zeros(3)) - _world(first.affine, np.zeros(3))).max() < 0.01
        ours, theirs = (c.image * c.scale[0] + c.offset[0] for c in (case, first))
        assert np.abs(ours - theirs).max() < 0.01 * (first.high[0] - first.low[0])


def test_prepare_case__label_follows_its_image(tmp_path: Path) -> None:
    array = _head()
    label = np.zeros(SHAPE, dtype=np.uint8)
    label[25:33, 8:20, 10:18] = 3
    array[label == 3] = 800
    image = _save(tmp_path / "i.nii", array)
    turned = nib.Nifti1Image(label.astype(np.float64), np.eye(4)).as_reoriented(np.array([[0, -1], [2, 1], [1, -1]]))
    nib.save(turned, tmp_path / "l.nii")
    case = prepare_case([image], tmp_path / "l.nii", "mri", Recipe((2.0, 2.0, 2.0)))
    assert case.label is not None and case.label.dtype == np.uint8
    assert set(np.unique(case.label)) == {0, 3}
    values = case.image[0] * case.scale[0] + case.offset[0]
    assert np.median(values[case.label == 3]) > 700 and np.percentile(values[case.label == 0], 99) < 700


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: (np.zeros((40, 44, 35), np.uint8), np.eye(4)), "has shape 40x44x35, the image has 40x44x36"),
        (lambda: (np.zeros(SHAPE, np.uint8), np.diag([1.0, 1, 1.1, 1])), "voxels off the image in space"),
        (lambda: (np.full(SHAPE, -1, np.int16), np.eye(4)), "values below 0"),
        (lambda: (np.full(SHAPE, 0.5, np.float32), np.eye(4)), "no integers"),
        (lambda: (np.zeros((*SHAPE, 2), np.uint8), np.eye(4)), "4D image"),
    ],
)
def test_prepare_case__label_that_does_not_fit_is_refused(tmp_path: Path, make, reason: str) -> None:
    label, affine = make()
    label.flat[0] = label.flat[0] + 1 if label.dtype.kind != "f" else 1.0
    label[0, 0, 0] = label.flat[0]
    image = _save(tmp_path / "i.nii", _head())
    with pytest.raises(RefusedError, match=reason) as caught:
        prepare_case([image], _save(tmp_path / "l.nii", label, affine), "mri")
    assert str(tmp_path / "l.nii") in str(caught.value)


def test_prepare_case__ct_is_exact_hounsfield_within_the_clip(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    array = np.full((40, 40, 30), -1000, dtype=np.int16)
    array[8:32, 8:32, 4:26] = rng.integers(-100, 200, (24, 24, 22))
    array[0, 0, 0], array[20, 20, 20] = -3024, 9000
    case = prepare_case([_save(tmp_path / "a.nii", array)], recipe=Recipe((1.0, 1.0, 1.0)))
    assert case.modality == "ct" and case.modality_reason == "it has air near -1000 HU"
    assert np.array_equal(case.image[0], np.clip(array, -1024, 3071).transpose(2, 1, 0))
    assert (case.scale, case.offset, case.low, case.high) == ((1.0,), (0.0,), (-1000.0,), (1000.0,))


def test_prepare_case__defaults_of_spacing(tmp_path: Path) -> None:
    array = np.full((40, 40, 30), -1000, dtype=np.int16)
    array[8:32, 8:32, 4:26] = np.random.default_rng(0).integers(-100, 200, (24, 24, 22))
    assert prepare_case([_save(tmp_path / "c.nii", array)]).spacing_mm == pytest.approx((1.5, 1.5, 1.5))
    path = _save(tmp_path / "m.nii", _head(), np.diag([2.0, 2.0, 2.0, 1.0]))
    assert prepare_case([path]).spacing_mm == pytest.approx((1.0, 1.0, 1.0))
    assert prepare_case([path]).image.shape == (1, 72, 88, 80)
    assert prepare_case([path], recipe=Recipe((4.0, 3.0, 2.0))).image.shape == (1, 18, 29, 40)


def test_prepare_case__mri_is_clipped_at_percentiles_and_quantised_in_12_bits(tmp_path: Path) -> None:
    array = _head() * 0.37
    array[20, 20, 18] = 1e5
    case = prepare_case([_save(tmp_path / "a.nii", array)], modality="mri")
    source = array.transpose(2, 1, 0)
    inside = source[case.foreground != 0]
    low, high = np.percentile(inside, [0.05, 99.95])
    assert case.low == pytest.approx((low,)) and case.high == pytest.approx((high,))
    restored = case.image[0] * case.scale[0] + case.offset[0]
    assert np.abs(restored - np.clip(source, low, high)).max() <= (high - low) / 4095 / 2 * 1.001
    assert case.image.min() == 0 and case.image.max() == 4095


def test_prepare_case__integer_mri_is_stored_exactly(tmp_path: Path) -> None:
    array = _head().astype(np.uint8)
    case = prepare_case([_save(tmp_path / "a.nii", array)], modality="mri")
    low, high = case.low[0], case.high[0]
    assert (case.scale, case.offset) == ((1.0,), (0.0,))
    assert np.array_equal(case.image[0], np.clip(array, low, high).transpose(2, 1, 0))


def test_prepare_case__channels_share_a_grid(tmp_path: Path) -> None:
    paths = [_save(tmp_path / f"{row}.nii", _head(seed=row)) for row in range(2)]
    case = prepare_case(paths, modality="mri")
    assert case.image.shape == (2, 36, 44, 40) and len(case.scale) == len(case.edge_q99) == 2
    paths[1] = _save(tmp_path / "b.nii", _head((40, 44, 37)))
    with pytest.raises(RefusedError, match="its channel .*b.nii has shape 40x44x37"):
        prepare_case(paths, modality="mri")


def test_prepare_case__edge_constant_measures_slopes_in_mm(tmp_path: Path) -> None:
    ramp = np.broadcast_to(np.arange(60, dtype=np.float32)[:, None, None] * 10, (60, 40, 40))
    noise = np.random.default_rng(0).normal(0, 1e-3, ramp.shape).astype(np.float32)
    for size, slope in ((1.0, 10.0), (2.0, 5.0)):
        path = _save(tmp_path / "a.nii", ramp + noise, np.diag([size, size, size, 1.0]))
        case = prepare_case([path], modality="mri", recipe=Recipe((size,) * 3))
        assert case.edge_q99[0] == pytest.approx(slope, rel=0.02)


def test_prepare_case__label_maps_and_unscaled_ct_are_refused(tmp_path: Path) -> None:
    label = np.kron(np.arange(27).reshape(3, 3, 3), np.ones((8, 8, 8))).astype(np.uint8)
    with pytest.raises(RefusedError, match="looks like a label map"):
        prepare_case([_save(tmp_path / "a.nii", label)])
    with pytest.raises(RefusedError, match="are not HU"):
        prepare_case([_save(tmp_path / "b.nii", _head())], modality="ct")
    air = np.random.default_rng(0).normal(-990, 5, SHAPE).astype(np.float32)
    with pytest.raises(RefusedError, match="no body found"):
        prepare_case([_save(tmp_path / "c.nii", air)])


def test_target_grid__keeps_centre_and_never_reaches_beyond() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        shape = tuple(int(n) for n in rng.integers(5, 60, 3))
        spacing = rng.uniform(0.4, 5, 3)
        affine = np.diag([*spacing, 1.0])
        affine[:3, 3] = rng.normal(0, 50, 3)
        grid = target_grid(Volume(np.empty(shape), affine), tuple(rng.uniform(0.5, 4, 3)))
        new = np.diag(grid.affine)[:3]
        centre = affine @ np.append((np.array(shape) - 1) / 2, 1)
        assert np.allclose(grid.affine @ np.append((np.array(grid.shape) - 1) / 2, 1), centre)
        assert (
            (np.array(grid.shape) * new <= np.array(shape) * spacing * 1.001 + 1e-6) | (np.array(grid.shape) == 1)
        ).all()


def test_target_grid__almost_equal_spacing_moves_nothing() -> None:
    volume = Volume(np.empty((182, 218, 182)), np.diag([0.99999994, 1.0000001, 1.0, 1.0]))
    grid = target_grid(volume, (1.0, 1.0, 1.0))
    assert grid.keep and grid.shape == (182, 218, 182) and np.array_equal(grid.affine, volume.affine)


@pytest.mark.parametrize("target", [0.3, 1.5, 12.0])
def test_same_spacing__any_two_grids_kept_at_one_target_agree(target: float) -> None:
    kept = []
    for factor in (1 - 0.999 * SAME_SPACING, 1.0, 1 + 0.999 * SAME_SPACING):
        volume = Volume(np.zeros((8, 8, 8), np.float32), np.diag([target * factor] * 3 + [1.0]))
        grid = target_grid(volume, (target,) * 3)
        assert grid.keep
        kept.append(tuple(float(size) for size in np.diag(grid.affine)[:3]))
    assert all(same_spacing(one, two) for one in kept for two in kept)
    assert not same_spacing((target,) * 3, (target, target, target * 1.003))
