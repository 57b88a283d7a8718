"""Drawing of :class:`agssd.types.ViewPanel`: one array of pixels, one integer number of pixels per voxel, and labels.

Slices go through the middle of the overlap box. Up is superior (coronal, sagittal) or anterior (axial); axes follow the
view's own frame, which its random orientation may have turned. Frames are drawn as volumes of one slice, first row
on top.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from agssd.types import ViewPanel

_Floats = NDArray[np.float32]
_TILE = 160  # pixels, at least
_GAP = 6
_MARGIN = 74  # left, for the names of rows
_HEAD = 22  # above each block of rows, for the names of columns
_DPI = 100
BOX_COLOUR = np.array([0.20, 0.85, 1.00], np.float32)
_PREDICTED_COLOUR = np.array([1.00, 0.30, 0.75], np.float32)
_MASK_COLOUR = np.array([1.00, 0.55, 0.10], np.float32)
_PLANES = ("axial", "coronal", "sagittal")


@dataclass
class _Tile:
    """One picture cell: pixels (h, w, 3) in [0, 1], row 0 at the top, and what stands above it."""

    pixels: _Floats
    heading: str


def save_panels(panels: list[ViewPanel], path: Path, title: str) -> None:
    """Write one PNG with every sample's views below each other.

    Args:
        panels: at least one; columns without data are left out.
        path: of the PNG; its folder is made.
        title: short text at the top.
    """
    blocks = [(name, rows) for index, panel in enumerate(panels) for name, rows in _blocks(panel, index)]
    tile = max(_TILE, max(max(cell.pixels.shape[:2]) for _, rows in blocks for row in rows for cell in row))
    columns = max(len(row) for _, rows in blocks for row in rows)
    width = _MARGIN + columns * (tile + _GAP) + _GAP
    heights = [sum(_HEAD + tile + _GAP for _ in rows) for _, rows in blocks]
    height = 34 + sum(heights) + _GAP
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)

    def text(x: float, y: float, words: str, **style: Any) -> None:
        figure.text(x / width, 1 - y / height, words, va="center", **style)

    text(_GAP, 17, title, fontsize=12, fontweight="bold")
    if any("predicted_box" in panel for panel in panels):
        legend = "blue: where a crop lies · pink: where it is predicted"
    else:
        legend = (
            "blue box: region both global views share · orange: hidden from the student · slices through its middle"
        )
    text(
        _MARGIN + 120,
        17,
        legend,
        fontsize=9,
        color="0.35",
    )
    top = 34
    for name, rows in blocks:
        for number, row in enumerate(rows):
            if number == 0:
                text(_GAP, top + _HEAD + tile / 2, name, fontsize=10, linespacing=1.5)
            for column, cell in enumerate(row):
                left = _MARGIN + column * (tile + _GAP)
                text(left + tile / 2, top + _HEAD / 2, cell.heading, fontsize=9, ha="center", color="0.15")
                canvas_tile = np.full((tile, tile, 3), 0.04, np.float32)
                h, w = cell.pixels.shape[:2]
                y, x = (tile - h) // 2, (tile - w) // 2
                canvas_tile[y : y + h, x : x + w] = cell.pixels
                figure.figimage(canvas_tile, left, height - (top + _HEAD) - tile, origin="upper")
            top += _HEAD + tile + _GAP
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI)


def _blocks(panel: ViewPanel, index: int) -> list[tuple[str, list[list[_Tile]]]]:
    """Return the rows of one sample: view A, view B, and the local crops."""
    arrays = {key: _array(value) for key, value in panel.items() if isinstance(value, Tensor)}
    base = arrays.get("clean", arrays.get("globals"))
    if base is None:
        raise ValueError("a ViewPanel needs 'clean' or 'globals' to be drawn")
    if base.ndim == 3:  # (views, H, W)
        arrays = {key: _as_volume(key, value, base.shape[1]) for key, value in arrays.items()}
        base = _as_volume("clean", base, base.shape[1])
    window = _window(base)
    factor = math.ceil(_TILE / max(base.shape[1:]))
    names = ("crop 2", "crop 3") if "predicted_box" in arrays else ("view A", "view B")
    blocks = [
        (f"sample {index + 1}\n{names[view]}", [_view_row(arrays, base[view], view, window, factor)])
        for view in range(len(base))
    ]
    locals_ = [(f"local {number + 1}", crop) for number, crop in enumerate(arrays.get("locals", ())[:8])]
    core = list(zip(("corrupted", "clean"), arrays.get("core", ()), strict=False))
    for name, crops in (("locals", locals_), ("core", core)):
        row = []
        for title, crop in crops:
            times = max(1, factor * max(base.shape[1:]) // max(crop.shape))
            row.append(_Tile(_upscaled(_grey(_slice(crop, 0, crop.shape[0] // 2), window), times), title))
        if row:
            blocks.append((f"sample {index + 1}\n{name}", [row]))
    return blocks


def _view_row(
    arrays: dict[str, _Floats], clean: _Floats, view: int, window: tuple[float, float], factor: int
) -> list[_Tile]:
    boxes = arrays.get("overlap_box", arrays.get("true_box"))
    box = boxes[view] if boxes is not None else None
    centre = [int(np.clip(np.floor(box[axis].mean()), 0, size - 1)) if box is not None else size // 2
              for axis, size in enumerate(clean.shape)]  # fmt: skip
    tiles = []
    flat = clean.shape[0] == 1
    for axis, plane in enumerate(("frame",) if flat else _PLANES):
        pixels = _upscaled(_grey(_slice(clean, axis, centre[axis]), window), factor)
        if box is not None:
            draw_box(pixels, np.delete(box, axis, 0), np.delete(clean.shape, axis))
        if "predicted_box" in arrays:
            predicted = np.delete(arrays["predicted_box"][view], axis, 0)
            draw_box(pixels, predicted, np.delete(clean.shape, axis), _PREDICTED_COLOUR)
            if box is not None and "origin" in arrays:
                start = np.delete(arrays["origin"][view], axis)
                for ends, colour in ((np.delete(box, axis, 0), BOX_COLOUR), (predicted, _PREDICTED_COLOUR)):
                    draw_line(pixels, start, ends.mean(1), np.delete(clean.shape, axis), colour)
        tiles.append(_Tile(pixels, plane if flat else f"{plane} {centre[axis]}"))
    depth = centre[0]

    def axial(volume: _Floats) -> _Floats:
        return _slice(volume, 0, depth)

    def spread(tokens: _Floats) -> _Floats:
        return axial(_per_voxel(tokens, clean.shape))

    inputs = arrays["globals"][view] if "globals" in arrays else clean
    if "globals" in arrays:
        tiles.append(_Tile(_upscaled(_grey(axial(inputs), window), factor), "input"))
    if "mask" in arrays:
        mask = arrays["mask"][view]
        share = float(mask.mean())
        hidden = spread(mask)[..., None]
        tinted = _grey(axial(inputs), window) * (1 - 0.55 * hidden) + 0.55 * hidden * _MASK_COLOUR
        told = f"mask, {share:.0%} hidden" if share else "mask, none hidden"
        if "unseen" in arrays and arrays["unseen"][view]:
            told = "for the teacher alone"
        tiles.append(_Tile(_upscaled(tinted, factor), told))
    for name in ("edges", "boundaries"):
        if name in arrays:
            tiles.append(_Tile(_upscaled(_coloured(axial(arrays[name][view]), "magma"), factor), name))
    if "reconstruction" in arrays:
        tiles.append(_Tile(_upscaled(_grey(axial(arrays["reconstruction"][view]), window), factor), "reconstruction"))
    if "attention" in arrays:
        heat = spread(arrays["attention"][view].mean(0))
        heat = (heat - heat.min()) / max(float(heat.max() - heat.min()), 1e-12)
        blended = 0.45 * _grey(axial(clean), window) + 0.55 * _coloured(heat, "inferno")
        tiles.append(_Tile(_upscaled(blended, factor), "[CLS] attention"))
    return tiles


def draw_box(pixels: _Floats, box: _Floats, shape: NDArray[np.int64], colour: NDArray[np.float32] = BOX_COLOUR) -> None:
    """Draw the outline of ``box`` onto ``pixels``, in place; the line is the outermost ring of pixels inside the box.

    Args:
        pixels: (h * f, w * f, 3), a slice with ``f`` pixels per voxel and its first axis pointing up.
        box: (2, 2) start and end in voxels along the slice's axes; clipped to the slice.
        shape: (h, w) of the slice in voxels.
        colour: (3,) of the line, in [0, 1].
    """
    factor = pixels.shape[0] // int(shape[0])
    edges = np.clip(np.round(box * factor), 0, np.array(shape)[:, None] * factor).astype(int)
    (low, high), (left, right) = edges
    top, bottom = pixels.shape[0] - high, pixels.shape[0] - low
    if bottom <= top or right <= left:
        return
    line = min(2, bottom - top, right - left)
    pixels[top : top + line, left:right] = colour
    pixels[bottom - line : bottom, left:right] = colour
    pixels[top:bottom, left : left + line] = colour
    pixels[top:bottom, right - line : right] = colour


def draw_line(
    pixels: _Floats, start: _Floats, end: _Floats, shape: NDArray[np.int64], colour: NDArray[np.float32]
) -> None:
    """Draw a line onto ``pixels``, in place; what lies outside is left out.

    Args:
        pixels: (h * f, w * f, 3), a slice with ``f`` pixels per voxel and its first axis pointing up.
        start: (2,) in voxels along the slice's axes.
        end: (2,) likewise.
        shape: (h, w) of the slice in voxels.
        colour: (3,) of the line, in [0, 1].
    """
    factor = pixels.shape[0] // int(shape[0])
    points = np.floor(np.linspace(start, end, 2 * max(pixels.shape[:2])) * factor).astype(int)
    rows, columns = pixels.shape[0] - 1 - points[:, 0], points[:, 1]
    inside = (rows >= 0) & (rows < pixels.shape[0]) & (columns >= 0) & (columns < pixels.shape[1])
    pixels[rows[inside], columns[inside]] = colour


def _array(tensor: Tensor) -> _Floats:
    values: _Floats = tensor.detach().float().cpu().numpy()
    return np.nan_to_num(values, posinf=0.0, neginf=0.0)


def _as_volume(key: str, values: _Floats, height: int) -> _Floats:
    """Return what belongs to frames of ``height`` rows as what belongs to volumes of one slice, whose rows point up."""
    if key == "unseen":  # (V,)
        return values
    if key == "origin":  # (V, 2)
        return np.stack([np.full(len(values), 0.5), height - values[:, 0], values[:, 1]], 1).astype(np.float32)
    if key.endswith("_box"):  # (V, 2, 2), [start, end) per axis
        slab = np.broadcast_to(np.array([0, 1], np.float32), values[:, 0].shape)
        return np.stack([slab, height - values[:, 0, ::-1], values[:, 1]], 1)
    return np.expand_dims(values[..., ::-1, :], -3)


def _window(volumes: _Floats) -> tuple[float, float]:
    """Return the intensities shown as black and white: all but the outermost half per cent."""
    low, high = np.percentile(volumes, (0.5, 99.5))
    return float(low), float(max(high, low + 1e-6))


def _slice(volume: _Floats, axis: int, index: int) -> _Floats:
    """Return a slice with row 0 at the top: both remaining first axes, H and D, point up in pictures."""
    plane: _Floats = np.take(volume, index, axis)
    return plane[::-1]


def _per_voxel(tokens: _Floats, shape: tuple[int, ...]) -> _Floats:
    """Return the value of each voxel's token (D', H', W') -> (D, H, W)."""
    for axis, size in enumerate(shape):
        tokens = np.take(tokens, np.arange(size) * tokens.shape[axis] // size, axis)
    return tokens


def _grey(image: _Floats, window: tuple[float, float]) -> _Floats:
    scaled = np.clip((image - window[0]) / (window[1] - window[0]), 0, 1)
    return np.repeat(scaled[..., None], 3, -1).astype(np.float32)


def _coloured(image: _Floats, name: str) -> _Floats:
    return np.asarray(matplotlib.colormaps[name](np.clip(image, 0, 1))[..., :3], np.float32)


def _upscaled(pixels: _Floats, factor: int) -> _Floats:
    return pixels.repeat(factor, 0).repeat(factor, 1)
