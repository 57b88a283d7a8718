"""The perceptual hash: one scan stays itself however it is stored, two scans never are one."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from agssd.scans.preparing.frames import prepare_frames
from agssd.scans.preparing.perceptual import (
    MAX_DISTANCE,
    NUM_BITS,
    near_duplicates,
    perceptual_hash,
    perceptual_hash_of_frames,
    single_hashes,
)
from agssd.scans.preparing.volumes import Recipe, prepare_case

SHAPE = (64, 72, 60)


def head(seed: int, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """Return a head whose outline is everyone's and whose inside is its own, (I, J, K) float32, air 0."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    tissue = ndimage.zoom(rng.normal(size=(9, 9, 9)), np.divide(shape, 9), order=3)
    values = np.where((grid**2).sum(0) < 0.8, 500 + 120 * tissue + rng.normal(0, 5, shape), 0)
    return np.maximum(values, 0).astype(np.float32)


def hash_of(path: Path, array: np.ndarray, affine: np.ndarray | None = None, spacing_mm: float = 1.0) -> str:
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    found = prepare_case([path], modality="mri", recipe=Recipe((spacing_mm,) * 3)).perceptual_hash
    assert found is not None and len(found) == NUM_BITS // 4
    return found


def bits(one: str, two: str) -> int:
    return (int(one, 16) ^ int(two, 16)).bit_count()


def test_hash__one_scan_stored_in_other_ways__is_near(tmp_path: Path) -> None:
    path, rng = tmp_path / "scan.nii", np.random.default_rng(0)
    array = head(0)
    plain = hash_of(path, array)
    assert hash_of(path, (array * 7.5).astype(np.float64)) == plain
    turned = nib.Nifti1Image(array, np.eye(4)).as_reoriented(np.array([[2, -1], [0, 1], [1, -1]]))
    assert hash_of(path, np.asarray(turned.dataobj), turned.affine) == plain
    variants = {
        "int16": hash_of(path, array.astype(np.int16)),
        "noise": hash_of(path, array + rng.normal(0, 30, SHAPE).astype(np.float32) * (array > 0)),
        "cut": hash_of(path, array[2:, :-2, 1:-1]),
        "wide": hash_of(path, np.pad(array, 9)),
        "spacing": hash_of(path, array, spacing_mm=2.0),
        "lossy": hash_of(path, np.round(ndimage.gaussian_filter(array, 0.7) / 30) * 30),
    }
    assert {name: bits(plain, other) for name, other in variants.items() if bits(plain, other) > MAX_DISTANCE} == {}
    assert max(bits(plain, other) for other in variants.values()) > 0  # not one hash for everything


def test_hash__other_scans__are_far_though_their_outline_is_one(tmp_path: Path) -> None:
    hashes = [hash_of(tmp_path / "scan.nii", head(seed)) for seed in range(12)]
    assert [pair[:2] for pair in near_duplicates(hashes, hashes)] == [(row, row) for row in range(12)]
    apart = [bits(a, b) for row, a in enumerate(hashes) for b in hashes[:row]]
    assert np.median(apart) > NUM_BITS / 3


def test_hash__mirrored_scan__is_another() -> None:
    image = head(0)
    inside = (image > 0).astype(np.uint8)
    there, back = (perceptual_hash(v, m, 0, 900) for v, m in ((image, inside), (image[::-1], inside[::-1])))
    assert there is not None and back is not None and bits(there, back) > NUM_BITS / 4


def test_hash__nothing_to_tell__is_none() -> None:
    image = head(0)
    inside = np.ones(SHAPE, np.uint8)
    assert perceptual_hash(np.full(SHAPE, 5), inside, 0, 10) is None
    assert perceptual_hash(image, np.zeros(SHAPE, np.uint8), 0, 900) is None
    assert perceptual_hash(image[:11], inside[:11], 0, 900) is None
    assert perceptual_hash(image[:12], inside[:12], 0, 900) is not None


def test_near_duplicates__equals_comparing_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agssd.scans.preparing.perceptual._BLOCK", 7)
    rng = np.random.default_rng(0)
    one: list[str | None] = [rng.bytes(NUM_BITS // 8).hex() for _ in range(20)]
    two: list[str | None] = []
    for row in range(30):
        flipped = sum(1 << int(bit) for bit in rng.choice(NUM_BITS, MAX_DISTANCE + row % 3 - 1, replace=False))
        two.append(f"{int(one[row % 20] or '', 16) ^ flipped:0{NUM_BITS // 4}x}")
    one[3] = two[5] = None
    wanted = [
        (i, j, bits(a, b))
        for i, a in enumerate(one)
        for j, b in enumerate(two)
        if a is not None and b is not None and bits(a, b) <= MAX_DISTANCE
    ]
    assert near_duplicates(one, two) == wanted and 10 < len(wanted) < 20
    assert near_duplicates([], two) == near_duplicates([None], two) == []


@pytest.mark.slow
def test_shared_hippocampus__copies_at_another_spacing_are_found_and_no_two_people(shared_data: Path) -> None:
    paths = sorted((shared_data / "hippocampus" / "imagesTr").glob("*.nii.gz"))
    one, two = (
        [prepare_case([path], modality="mri", recipe=Recipe((spacing,) * 3)).perceptual_hash for path in paths]
        for spacing in (1.0, 1.25)
    )
    itself = [(row, row) for row in range(len(paths))]
    assert len(paths) == 194 and [pair[:2] for pair in near_duplicates(one, one)] == itself
    assert [pair[:2] for pair in near_duplicates(one, two)] == itself


@pytest.mark.slow
def test_shared_orientations__one_head_in_other_storage_orders_has_one_hash(shared_data: Path) -> None:
    paths = sorted((shared_data / "odd" / "orientations").glob("*.nii.gz"))[::5]
    assert len(paths) == 5 and len({prepare_case([path], modality="mri").perceptual_hash for path in paths}) == 1


def fan(height: int, width: int) -> np.ndarray:
    y, x = np.meshgrid(np.linspace(0, 1, height), np.linspace(-1, 1, width), indexing="ij")
    return ((np.hypot(y + 0.2, x) < 1.1) & (np.abs(x) < 0.9 * (y + 0.2))).astype(np.uint8)


def frame(seed: int, speckle: int = 0, height: int = 160, width: int = 200) -> np.ndarray:
    """Return tissue of its own under speckle, depth gain and a fan that are everyone's, (H, W) float32 in [0, 255]."""
    rng = np.random.default_rng(seed)
    tissue = ndimage.zoom(rng.uniform(0.3, 1, (8, 10)), (height / 8, width / 10), order=3)
    noise = np.random.default_rng((seed, speckle)).rayleigh(0.8, (height, width))
    gain = np.linspace(1, 0.5, height)[:, None]
    return (150 * tissue * gain * ndimage.gaussian_filter(noise, 1.0)).clip(0, 255).astype(np.float32)


def hash_of_frames(*frames: np.ndarray) -> str:
    body = np.stack([fan(*frames[0].shape)] * len(frames))
    found = perceptual_hash_of_frames(np.stack(frames) * body, body, 0, 255)
    assert found is not None
    return found


def test_hash_of_frames__a_still_that_comes_again_in_another_sequence_is_near() -> None:
    rng = np.random.default_rng(0)
    still = frame(3)
    again = [
        still,
        np.round(still / 20) * 20,
        still + rng.normal(0, 15, still.shape).astype(np.float32),
        255 * (still / 255) ** 0.8,
        ndimage.zoom(still, 1.5, order=1),
    ]
    one = hash_of_frames(frame(1), frame(2), still, frame(4))
    others = [hash_of_frames(*(frame(9 + n, 0, *picture.shape) for n in (0, 1)), picture) for picture in again]
    found = near_duplicates([one], others)
    assert [pair[:2] for pair in found] == [(0, row) for row in range(len(others))]
    without = hash_of_frames(frame(9), frame(10))
    assert near_duplicates([one], [without, None]) == []


def test_hash_of_frames__two_frames_under_one_fan_are_far() -> None:
    hashes = [hash_of_frames(frame(seed)) for seed in range(20)]
    apart = [bits(a, b) for row, a in enumerate(hashes) for b in hashes[:row]]
    assert min(apart) > 3 * MAX_DISTANCE and np.median(apart) > 0.42 * NUM_BITS  # by chance half of them


def test_hash_of_frames__frames_that_are_alike_share_a_hash() -> None:
    still = frame(0)
    assert hash_of_frames(still, still + 1, still) == hash_of_frames(still)
    assert len(single_hashes(hash_of_frames(still, frame(1), still))) == 2
    small = np.ones((3, 31, 200), np.uint8)
    assert perceptual_hash_of_frames(np.zeros((3, 31, 200)), small, 0, 1) is None and single_hashes(None) == []


@pytest.mark.slow
def test_shared_ultrasound__frames_of_two_files_are_far(shared_data: Path) -> None:
    paths = sorted((shared_data / "ultrasound").glob("*.igs.*"))
    hashes = [prepare_frames([path]).perceptual_hash for path in paths]
    pairs = [(one, two) for row, one in enumerate(hashes) for two in hashes[:row]]
    apart = [bits(a.hex(), b.hex()) for one, two in pairs for a in single_hashes(one) for b in single_hashes(two)]
    assert len(hashes) == 7 and all(hashes) and min(apart) > 200
