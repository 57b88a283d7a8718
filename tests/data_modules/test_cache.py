"""Reading a cache by crops."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from agssd.data_modules.cache import VolumeCache


def test_read__crop_equals_slice_of_the_whole(tiny_cache: Path) -> None:
    cache = VolumeCache(tiny_cache)
    whole = cache.read_whole(3)
    assert np.array_equal(cache.read(3, (5, 20, 7), (30, 33, 11)), whole[:, 5:35, 20:53, 7:18])
    label = cache.read_whole(3, "label")
    assert np.array_equal(cache.read(3, (0, 0, 0), (40, 56, 40), "label"), label)
    assert set(np.unique(label)) == {0, 1, 2}
