"""Checks of one scan: each is triggered by what it is for, and silent on clinical scans."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from agssd.scans.checks import check_geometry, check_intensities, check_prepared, spike
from agssd.scans.findings import CHECKS, SEVERITIES, Finding
from agssd.scans.read import Scan, read_scan

SHAPE = (40, 44, 36)


def _scan(array: np.ndarray, modality: str | None = None) -> Scan:
    return Scan(array, np.eye(4), "0" * 64, modality, ())


def _mri(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    radius = np.sqrt((np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij")) ** 2).sum(0))
    return np.where(radius < 0.9, rng.gamma(20, 15, SHAPE), np.abs(rng.normal(0, 4, SHAPE))).astype(np.float32)


def _ct(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    radius = np.sqrt((np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij")) ** 2).sum(0))
    tissue = np.select([radius < 0.5, radius < 0.8, radius < 0.9], [60, -100, 400 + 0 * radius], -1000)
    noisy = tissue + rng.normal(0, 15, SHAPE) + 1200 * (radius < 0.1)
    return np.maximum(np.round(noisy), -1024).astype(np.int16)


def _kinds(found: list[Finding]) -> list[tuple[str, str]]:
    assert all(item.check in CHECKS and item.severity in SEVERITIES for item in found)
    return [(item.check, item.severity) for item in found]


@pytest.mark.parametrize("stated", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_check_intensities__healthy_scans_give_nothing(seed: int, stated: bool) -> None:
    assert check_intensities(_scan(_mri(seed)), "mri", stated, 0.4) == []
    assert check_intensities(_scan(_ct(seed)), "ct", stated, 0.4) == []
    assert check_intensities(_scan(np.round(_mri(seed)).astype(np.uint16)), "mri", stated, 0.4) == []


@pytest.mark.parametrize(
    ("high", "severity"), [(240, "warning"), (900, "warning"), (1023, "info"), (3071, None)], ids=str
)
def test_check_intensities__ct_cut_at_the_top(high: int, severity: str | None) -> None:
    array = _ct()
    array[10:20, 10:20, 10:14] = 4000  # metal
    found = check_intensities(_scan(np.minimum(array, high)), "ct", True, 0.4)
    assert _kinds(found) == ([("clipped", severity)] if severity else [])
    assert all(f"{high} HU" in item.message for item in found)


def test_check_intensities__ct_cut_at_the_bottom() -> None:
    found = check_intensities(_scan(np.maximum(_ct(), -160)), "ct", True, 0.4)
    assert ("clipped", "warning") in _kinds(found)
    assert any("lowest value, -160 HU" in item.message for item in found)


@pytest.mark.parametrize(("share", "severity"), [(0.0, None), (0.002, "info"), (0.03, "warning")])
def test_check_intensities__mri_cut_at_the_top(share: float, severity: str | None) -> None:
    array = _mri()
    body = array > 50
    top = np.quantile(array[body], 1 - share)
    found = check_intensities(_scan(np.minimum(array, top)), "mri", False, float(body.mean()))
    assert _kinds(found) == ([("clipped", severity)] if severity else [])


def test_check_intensities__few_grey_levels() -> None:
    rough = np.round(_mri() / 40).astype(np.int16)
    assert ("grey-levels", "warning") in _kinds(check_intensities(_scan(rough), "mri", False, 0.4))
    rough = (np.round(_ct() / 40.0) * 40).astype(np.int16)
    assert ("grey-levels", "warning") in _kinds(check_intensities(_scan(rough), "ct", True, 0.4))


def test_check_intensities__wrong_modality() -> None:
    normalised = (_mri() - 100) / 100
    assert ("modality", "warning") in _kinds(check_intensities(_scan(normalised), "ct", True, 0.4))
    assert ("modality", "warning") in _kinds(check_intensities(_scan(_mri() * 40 - 600), "ct", True, 0.4))
    assert ("modality", "warning") in _kinds(check_intensities(_scan(_mri() - 30), "ct", True, 0.4))  # nothing like fat
    assert ("modality", "warning") in _kinds(check_intensities(_scan(_ct()), "mri", True, 0.4))


@pytest.mark.parametrize(
    ("low", "high", "told"),
    [(-160, 240, "from -160 to 240 HU"), (-150, 3000, "from -150 HU upwards"), (-200, 1e9, "from -200 HU upwards")],
)
def test_check_intensities__ct_cut_to_a_window_and_taken_for_mri(low: float, high: float, told: str) -> None:
    windowed = np.clip(_ct(), low, high)
    found = [item for item in check_intensities(_scan(windowed), "mri", False, 0.4) if item.check == "modality"]
    assert len(found) == 1 and found[0].severity == "warning" and told in found[0].message


@pytest.mark.parametrize("kind", [np.uint16, np.float32])
@pytest.mark.parametrize("tissue", [(60, -100, 40), (35, 30, 900)], ids=["trunk", "head"])
def test_check_intensities__ct_that_is_not_in_hu_and_taken_for_mri(tissue: tuple[int, ...], kind: type) -> None:
    rng = np.random.default_rng(0)
    radius = np.sqrt((np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij")) ** 2).sum(0))
    values = np.select([radius < 0.5, radius < 0.8, radius < 0.9], tissue, -1000) + rng.normal(0, 15, SHAPE)
    stored = np.maximum(np.round(values) + 1024, 0)
    found = check_intensities(_scan(stored.astype(kind)), "mri", False, 0.4)
    assert _kinds(found) == [("modality", "warning")] and "not turned to HU" in found[0].message
    without_air = np.where(radius < 0.9, stored, 1024)
    for other in (stored * 0.6, without_air):
        assert check_intensities(_scan(other.astype(np.float32)), "mri", False, 0.4) == []


def _brightnesses(array: np.ndarray) -> list[np.ndarray]:
    """Return an image in the brightnesses that bring one after another of its grey values to 1024."""
    small = array[::2, ::2, ::2].astype(np.float32)
    levels = {float(level) for level in np.percentile(small, np.linspace(20, 99.5, 16)) if level > 0}
    return [array, *(small * (1024 / level) for level in sorted(levels))]


def _assert_never_in_doubt(name: str, array: np.ndarray) -> None:
    for image in _brightnesses(array):
        found = check_intensities(_scan(image), "mri", False, 0.4)
        assert not [item.message for item in found if item.check == "modality"], name


def test_check_intensities__no_brightness_of_a_simulated_head_looks_like_a_ct() -> None:
    pytest.importorskip("nilearn", reason="the template is in nilearn's wheel")
    from agssd.scans.simulated.heads import draw_parameters, load_template, simulate_subject

    template = load_template(5.0)
    for number in range(2):
        head, _ = simulate_subject(template, draw_parameters(np.random.default_rng((0, number))))
        _assert_never_in_doubt(f"simulated {number}", head)


def test_check_intensities__no_brightness_of_a_shared_mri_looks_like_a_ct(shared_data: Path) -> None:
    files = sorted(shared_data.glob("hippocampus/imagesTr/*.nii.gz"))[::8]
    files += [path for path in sorted(shared_data.glob("mri_full/**/*.nii.gz")) if "seg" not in path.name]
    assert files
    for path in files:
        _assert_never_in_doubt(path.name, read_scan(path).array)


@pytest.mark.parametrize("name", ["totalseg_ct.nii.gz", "totalseg_ct_sm.nii.gz"])
def test_check_intensities__shared_ct_that_is_not_in_hu(shared_data: Path, name: str) -> None:
    stored = np.maximum(read_scan(shared_data / "ct_full" / name).array, -1024) + 1024
    found = check_intensities(_scan(stored.astype(np.uint16)), "mri", False, 0.4)
    assert ("modality", "warning") in _kinds(found)


def test_check_intensities__ct_of_soft_tissue_without_air_is_no_mri() -> None:
    rng = np.random.default_rng(0)
    crop = np.round(np.where(rng.random(SHAPE) < 0.3, rng.normal(-100, 20, SHAPE), rng.normal(50, 20, SHAPE)))
    assert check_intensities(_scan(crop.astype(np.int16)), "ct", True, 1.0) == []


@pytest.mark.parametrize(
    ("shape", "spacing", "expected"),
    [
        ((512, 512, 100), (0.8, 0.8, 2.0), []),
        ((35, 50, 35), (1, 1, 1), []),
        ((500, 500, 2000), (1, 1, 1), []),
        ((256, 256, 180), (0.1, 0.1, 0.1), [("spacing", "warning")]),
        ((256, 256, 180), (0.01, 0.01, 0.01), [("spacing", "warning"), ("field-of-view", "warning")]),
        ((60, 60, 20), (25, 25, 25), [("spacing", "warning"), ("field-of-view", "warning")]),
        ((512, 512, 300), (3, 3, 3), [("field-of-view", "warning")]),
        ((512, 512, 30), (0.45, 0.45, 5), [("anisotropy", "info")]),
    ],
)
def test_check_geometry__ranges(
    shape: tuple[int, int, int], spacing: tuple[float, ...], expected: list[tuple[str, str]]
) -> None:
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    affine = np.eye(4)
    affine[:3, :3] = turn * np.asarray(spacing)
    assert _kinds(check_geometry(shape, affine)) == expected


def _body() -> np.ndarray:
    body = np.zeros(SHAPE, dtype=np.uint8)
    body[5:35, 5:40, 5:30] = 1
    return body


def test_check_prepared__healthy_case_gives_nothing() -> None:
    label = np.zeros(SHAPE, dtype=np.uint8)
    label[10:20, 10:20, 5:12] = 2
    assert check_prepared(_body(), label, (3.0,), "mri") == []
    assert check_prepared(_body(), None, (3.0, 1.0), "mri") == []


@pytest.mark.parametrize(("shift", "expected"), [(1, None), (3, "warning"), (12, "error")])
def test_check_prepared__label_off_the_body(shift: int, expected: str | None) -> None:
    label = np.zeros(SHAPE, dtype=np.uint8)
    label[35 + shift - 12 : 35 + shift, 10:20, 10:20] = 1
    if shift == 12:
        label[:35] = 0
    found = check_prepared(_body(), label, (3.0,), "mri")
    assert _kinds(found) == ([("label-outside", expected)] if expected else [])


def test_check_prepared__empty_things() -> None:
    empty = np.zeros(SHAPE, dtype=np.uint8)
    assert _kinds(check_prepared(empty, None, (3.0,), "ct")) == [("foreground", "error")]
    small = empty.copy()
    small[0, 0, :9] = 1
    assert _kinds(check_prepared(small, None, (3.0,), "ct")) == [("foreground", "warning")]
    assert _kinds(check_prepared(_body(), empty, (3.0,), "ct")) == [("label-empty", "warning")]
    assert _kinds(check_prepared(_body(), None, (3.0, 0.0), "ct")) == [("flat", "warning")]


def test_spike__share_of_a_saturated_value() -> None:
    values = np.random.default_rng(0).normal(size=100_000)
    assert spike(values, True) is None and spike(values, False) is None
    even = np.arange(100_000) % 100  # extremes as frequent as all others
    assert spike(even, True) is None and spike(even, False) is None
    cut = np.clip(values, -1.0, 2.0)
    top, bottom = spike(cut, True), spike(cut, False)
    assert top is not None and top.value == 2.0 and top.share == (values >= 2.0).mean()
    assert bottom is not None and bottom.value == -1.0 and bottom.share == (values <= -1.0).mean()
