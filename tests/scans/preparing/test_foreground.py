"""The body: lungs inside, air outside, and crops within the body wholly so."""

from __future__ import annotations

import numpy as np

from agssd.scans.preparing.foreground import (
    bounding_box,
    constant_background,
    ct_foreground,
    mri_foreground,
    stripped_foreground,
)

GRID = np.stack(np.meshgrid(*(np.linspace(-1, 1, 48),) * 3, indexing="ij"))
BODY = (GRID**2).sum(0) < 0.7


def test_ct_foreground__keeps_lungs_and_drops_the_table() -> None:
    image = np.where(BODY, 40.0, -1000.0)
    lung = ((GRID - 0.2) ** 2).sum(0) < 0.05
    image[lung] = -850
    table = np.zeros_like(BODY)
    table[:, 46:, :] = True
    image[table] = 100
    foreground = ct_foreground(image)
    assert np.array_equal(foreground != 0, BODY)


def test_mri_foreground__finds_a_head_in_noise() -> None:
    rng = np.random.default_rng(0)
    image = np.where(BODY, 300 + 100 * np.sin(6 * GRID[0]), 0) + np.abs(rng.normal(0, 12, BODY.shape))
    image[((GRID + 0.1) ** 2).sum(0) < 0.02] = 2000  # bright fluid must not pull the threshold above the tissue
    image[((GRID - 0.3) ** 2).sum(0) < 0.03] = 5  # a dark ventricle is inside
    foreground = mri_foreground(image, (1.0, 1.0, 1.0)) != 0
    overlap = 2 * (foreground & BODY).sum() / (foreground.sum() + BODY.sum())
    assert overlap > 0.97


def test_mri_foreground__a_crop_within_the_body_is_all_body() -> None:
    image = np.random.default_rng(0).normal(500, 60, (30, 30, 30))
    image[:10] *= 0.5
    assert mri_foreground(image, (1.0, 1.0, 1.0)).all()


def test_constant_background__only_where_one_value_fills_it() -> None:
    rng = np.random.default_rng(0)
    brain = np.where(BODY & (GRID[0] < 0.5), rng.normal(100, 30, BODY.shape), 0.0)
    assert constant_background(brain) == 0.0
    assert np.array_equal(stripped_foreground(brain, 0.0) != 0, brain != 0)
    noisy = np.round(np.where(BODY, rng.normal(100, 30, BODY.shape), np.abs(rng.normal(0, 0.8, BODY.shape))))
    assert constant_background(noisy) is None
    assert constant_background(rng.normal(0, 1, (20, 20, 20))) is None


def test_stripped_foreground__keeps_dark_voxels_within() -> None:
    brain = np.where(BODY, 50.0, -3.0)
    brain[20:28, 20:28, 20:28] = -3.0
    assert np.array_equal(stripped_foreground(brain, -3.0) != 0, BODY)


def test_bounding_box__is_tight() -> None:
    mask = np.zeros((6, 7, 8), dtype=np.uint8)
    mask[2:4, 1:7, 5] = 1
    assert bounding_box(mask) == ((2, 4), (1, 7), (5, 6))
    assert bounding_box(np.zeros((2, 3, 4), dtype=np.uint8)) == ((0, 2), (0, 3), (0, 4))
