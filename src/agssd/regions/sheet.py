"""A sheet of pictures to judge regions by."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from agssd.data_modules.cache import VolumeCache

TILE = 256  # pixels a side


def draw_sheet(cache: VolumeCache, path: Path, count: int) -> None:
    """Draw cases side by side, a frame or axial slice each, with the regions in colours; nothing names a case.

    Args:
        cache: with regions.
        path: PNG to write; it appears whole or not at all.
        count: cases, spread evenly over the cache.

    Raises:
        ValueError: the place cannot be written.
    """
    from PIL import Image

    from agssd.whole_file import whole_file

    rows = np.unique(np.linspace(0, len(cache) - 1, min(count, len(cache))).round().astype(int)).tolist()
    across = math.ceil(math.sqrt(len(rows)))
    sheet = np.zeros((math.ceil(len(rows) / across) * TILE, across * TILE, 3), dtype=np.uint8)
    for place, row in enumerate(rows):
        tile = Image.fromarray(_tile(cache, row))
        scale = TILE / max(tile.size)
        tile = tile.resize((max(1, round(tile.width * scale)), max(1, round(tile.height * scale))))
        top, left = place // across * TILE, place % across * TILE
        sheet[top : top + tile.height, left : left + tile.width] = np.asarray(tile)
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, format="png")
    try:
        with whole_file(path) as temporary:
            temporary.write_bytes(buffer.getvalue())
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from error


def _tile(cache: VolumeCache, row: int) -> NDArray[np.uint8]:
    """Return (h, w, 3): the slice with most pixels in regions, plain on the left and with them on the right."""
    info = cache.cases[row]
    regions = cache.read_whole(row, "regions")
    index = int((regions != 0).sum((1, 2)).argmax())
    box = ((index, 0, 0), (1, *info.shape[1:]))
    stored = cache.read(row, *box)[0, 0].astype(np.float32) * info.scale[0] + info.offset[0]
    grey = ((stored - info.low[0]) / max(info.high[0] - info.low[0], 1e-6)).clip(0, 1)[..., None].repeat(3, -1)
    cut = regions[index]
    picture = np.concatenate([grey, np.where((cut != 0)[..., None], 0.5 * grey + 0.5 * _colours(cut), grey)], 1)
    picture = (255 * picture).round().astype(np.uint8)
    return picture if info.spatial_dims == 2 else picture[::-1]  # up is anterior


def _colours(numbers: NDArray[Any]) -> NDArray[np.float32]:
    """Return (h, w, 3) in [0, 1]: a colour for each number; neighbours in number differ much in hue."""
    hue = (numbers * 0.618034) % 1  # the golden ratio
    wheel = np.stack([hue, (hue + 1 / 3) % 1, (hue + 2 / 3) % 1], -1)
    return np.abs(wheel * 2 - 1).astype(np.float32)
