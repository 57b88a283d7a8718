"""Volumes on the page: mosaics of slices, and the viewer that shows them in three planes."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from agssd.commands.doctor.picture import LABEL_COLOURS
from agssd.commands.report.charts import data_block
from agssd.types import Triple

MAX_SIDE = 144  # voxels of a shown volume per axis; larger ones are averaged
MAX_FRAME_SIDE = 320  # pixels of a shown frame per axis
_PLANES = ("axial", "coronal", "sagittal")
_QUALITY = 88

Bytes = NDArray[np.uint8]


@dataclass
class Layer:
    """Something to lay over an image.

    Attributes:
        name: in the list of layers.
        kind: "rgb" (D, H, W, 3), "heat" (D, H, W) or "labels" (D, H, W) of the image's own shape; "none" for nothing.
        values: uint8, or None.
        step: shown voxels per cell of ``values`` and axis.
        present: (D, H, W) bool, which cells have content; None for all.
        legend: (words, CSS colour or "").
    """

    name: str
    kind: Literal["none", "rgb", "heat", "labels"] = "none"
    values: Bytes | None = None
    step: tuple[float, float, float] = (1.0, 1.0, 1.0)
    present: NDArray[np.bool_] | None = None
    legend: list[tuple[str, str]] = field(default_factory=list)


def shrink_factors(shape: Sequence[int], spatial_dims: int = 3) -> Triple:
    """Return how many voxels become one on the page, per axis; frames (T, H, W) stay as many as they are."""
    if spatial_dims == 2:
        factor = max(1, math.ceil(max(shape[1:]) / MAX_FRAME_SIDE))
        return 1, factor, factor
    factor = max(1, math.ceil(max(shape) / MAX_SIDE))
    return factor, factor, factor


def shrunk(volume: NDArray[Any], factor: int | Triple, average: bool = True) -> NDArray[Any]:
    """Return (D, H, W) in blocks of ``factor`` voxels: their mean, or their middle voxel. What is left over is cut."""
    a, b, c = (factor,) * 3 if isinstance(factor, int) else factor
    if (a, b, c) == (1, 1, 1):
        return volume
    d, h, w = (max(1, size // step) for size, step in zip(volume.shape, (a, b, c), strict=True))
    cut = volume[: d * a, : h * b, : w * c]
    if not average:
        return cut[a // 2 :: a, b // 2 :: b, c // 2 :: c]
    blocks = cut.reshape(d, a, h, b, w, c).astype(np.float32)
    mean: NDArray[Any] = blocks.mean((1, 3, 5))
    return mean


def as_grey(image: NDArray[np.float32], inside: NDArray[np.bool_]) -> Bytes:
    """Return 8 bits: black and white at the outermost per cent of the values inside the body."""
    values = image[inside] if inside.any() else image
    low, high = np.percentile(values, (1, 99))
    scaled = np.clip((image - low) / max(float(high - low), 1e-6), 0, 1) * 255
    grey: Bytes = scaled.round().astype(np.uint8)
    return grey


def mosaic(volume: Bytes, lossless: bool) -> dict[str, Any]:
    """Return a picture of all axial slices side by side, with what is needed to take it apart again.

    Args:
        volume: (D, H, W) or (D, H, W, 3).
        lossless: PNG, else JPEG.
    """
    from PIL import Image

    depth, height, width = volume.shape[:3]
    columns = min(depth, max(1, round(math.sqrt(depth * height / width))))
    rows = math.ceil(depth / columns)
    canvas = np.zeros((rows * height, columns * width, *volume.shape[3:]), np.uint8)
    for index in range(depth):
        y, x = index // columns * height, index % columns * width
        canvas[y : y + height, x : x + width] = volume[index]
    buffer = io.BytesIO()
    if lossless:
        Image.fromarray(canvas).save(buffer, "PNG", optimize=True)
    else:
        Image.fromarray(canvas).save(buffer, "JPEG", quality=_QUALITY)
    kind = "png" if lossless else "jpeg"
    source = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {"src": source, "shape": [depth, height, width], "columns": columns}


def viewer(
    number: int,
    name: str,
    image: Bytes,
    spacing_mm: tuple[float, float, float],
    start: Triple,
    layers: Sequence[Layer],
    chosen: int,
    body: NDArray[np.bool_] | None = None,
    frames: bool = False,
) -> str:
    """Return a viewer with three sliders, a choice of layers and their opacity.

    Args:
        number: of the viewer on the page.
        name: of what is shown; the heading.
        image: (D, H, W).
        spacing_mm: of its voxels.
        start: slices that are shown first.
        layers: what may be laid over it.
        chosen: the layer that is shown first.
        body: (D, H, W), where coarse layers are shown; None for everywhere.
        frames: the image is frames (T, H, W), shown one at a time with the first row on top.
    """
    described = []
    for layer in layers:
        entry: dict[str, Any] = {"name": layer.name, "kind": layer.kind, "step": layer.step, "legend": layer.legend}
        if layer.values is not None:
            entry["mosaic"] = mosaic(layer.values, lossless=True)
        if layer.kind == "labels":
            top = 0 if layer.values is None else int(layer.values.max(initial=0))
            entry["colours"] = [None, *(list(LABEL_COLOURS[n % len(LABEL_COLOURS)]) for n in range(top))]
        if layer.present is not None:
            entry["present"] = layer.present.reshape(-1).astype(int).tolist()
        described.append(entry)
    block = f"volume-{number}"
    spacing = (0.0, *spacing_mm[1:]) if frames else spacing_mm
    data = {"name": name, "image": mosaic(image, lossless=False), "spacing": spacing, "start": start, "frames": frames}
    if body is not None:
        data["body"] = mosaic(body.astype(np.uint8) * 255, lossless=True)
    options = "".join(
        f'<option value="{index}"{" selected" if index == chosen else ""}>{escape(layer.name)}</option>'
        for index, layer in enumerate(layers)
    )
    coarse = any(layer.kind in ("rgb", "heat") for layer in layers)
    smooth = '<label><input type="checkbox" class="smooth" checked> between tokens</label>' if coarse else (
        '<input type="checkbox" class="smooth" hidden>'
    )  # fmt: skip
    planes = "".join(
        f'<figure class="plane"><canvas role="img" aria-label="{escape(name)}, {plane}" width="1" height="1"></canvas>'
        f'<figcaption><label>{plane} <input type="range" min="0" max="{size - 1}" value="{at}"></label>'
        f"<output></output></figcaption></figure>"
        for plane, size, at in zip(("frame",) if frames else _PLANES, image.shape, start, strict=False)
    )
    return (
        f'<div class="viewer" data-volume="{block}"><h3>{escape(name)}</h3><div class="controls">'
        f"<label>over the image <select>{options}</select></label>"
        f'<label>opacity <input type="range" class="opacity" min="0" max="100" value="60"></label>{smooth}</div>'
        f'<div class="planes">{planes}</div><p class="legend"></p></div>\n'
        + data_block(block, data | {"layers": described})
    )


def css_colour(label: int) -> str:
    """Return the colour of a label from 1 on."""
    red, green, blue = LABEL_COLOURS[(label - 1) % len(LABEL_COLOURS)]
    return f"rgb({red}, {green}, {blue})"
