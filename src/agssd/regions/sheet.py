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

TILE = 256  # pixels a side of a picture; the same with its regions stands to its right


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
    across = math.ceil(math.sqrt(len(rows) / 2))
    sheet = np.zeros((math.ceil(len(rows) / across) * TILE, 2 * across * TILE, 3), dtype=np.uint8)
    for place, row in enumerate(rows):
        for side, picture in enumerate(_pair(cache, row)):
            tile = Image.fromarray(picture)
            scale = TILE / max(tile.size)
            tile = tile.resize((max(1, round(tile.width * scale)), max(1, round(tile.height * scale))))
            top, left = place // across * TILE, (2 * (place % across) + side) * TILE
            sheet[top : top + tile.height, left : left + tile.width] = np.asarray(tile)
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, format="png")
    try:
        with whole_file(path) as temporary:
            temporary.write_bytes(buffer.getvalue())
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from error


def _pair(cache: VolumeCache, row: int) -> list[NDArray[np.uint8]]:
    """Return a slice (h, w, 3) plain and with its regions: the one nearest the middle that shows about most of them."""
    info = cache.cases[row]
    regions = cache.read_whole(row, "regions")
    shown = (regions != 0).sum((1, 2))
    most = np.flatnonzero(shown >= 0.99 * shown.max())
    index = int(most[np.abs(most - len(shown) // 2).argmin()])
    box = ((index, 0, 0), (1, *info.shape[1:]))
    stored = cache.read(row, *box)[0, 0].astype(np.float32) * info.scale[0] + info.offset[0]
    grey = ((stored - info.low[0]) / max(info.high[0] - info.low[0], 1e-6)).clip(0, 1)[..., None].repeat(3, -1)
    cut = regions[index]
    coloured = np.where((cut != 0)[..., None], 0.5 * grey + 0.5 * _colours(cut), grey)
    pair = [(255 * picture).round().astype(np.uint8) for picture in (grey, coloured)]
    return pair if info.spatial_dims == 2 else [picture[::-1] for picture in pair]  # up is anterior


def _colours(numbers: NDArray[Any]) -> NDArray[np.float32]:
    """Return (h, w, 3) in [0, 1]: a colour for each number; neighbours in number differ much in hue."""
    hue = (numbers * 0.618034) % 1  # the golden ratio
    wheel = np.stack([hue, (hue + 1 / 3) % 1, (hue + 2 / 3) % 1], -1)
    return np.abs(wheel * 2 - 1).astype(np.float32)
