"""Label maps as regions: as they are, or each connected piece."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from agssd.regions.labels import LabelRegions
from agssd.regions.source import RegionCase


def case(label: NDArray | None, spatial_dims: int = 3) -> RegionCase:
    shape = (2, 2, 2) if label is None else label.shape
    return RegionCase(
        "a", np.zeros((1, *shape), np.float32), np.ones(shape, bool), label, (1.0, 1.0, 1.0), spatial_dims
    )


def test_labels__are_taken_as_they_are_or_piece_by_piece() -> None:
    label = np.zeros((3, 6, 8), dtype=np.int16)
    label[0, :2, :2], label[0, 4:, 5:], label[1:, 4:, 5:], label[2, 0, 0] = 3, 3, 7, 3
    assert np.array_equal(LabelRegions()(case(label)), label)
    pieces = LabelRegions(components=True)(case(label))
    assert np.array_equal(pieces != 0, label != 0) and pieces.max() == 4
    for number in range(1, 5):
        assert len(np.unique(label[pieces == number])) == 1
    frames = LabelRegions(components=True)(case(label, 2))
    assert np.array_equal(frames != 0, label != 0) and frames.max() == 5  # the 7 of two frames is two
    assert set(np.unique(frames[1])) & set(np.unique(frames[2])) == {0}


def test_labels__pieces_that_touch_at_a_corner_are_one() -> None:
    label = np.zeros((2, 4, 4), dtype=np.uint8)
    label[0, 1, 1] = label[1, 2, 2] = 1
    assert LabelRegions(components=True)(case(label)).max() == 1


@pytest.mark.parametrize(("label", "words"), [(None, "has no label map"), (np.full((2, 2, 2), -1), "label -1")])
def test_labels__what_is_no_label_map_is_refused(label: NDArray | None, words: str) -> None:
    with pytest.raises(ValueError, match=f"case a.*{words}"):
        LabelRegions()(case(label))
