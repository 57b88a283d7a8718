"""Thumbnails of a scan: three planes side by side, as the bytes of a JPEG."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agssd.scans.preparing.foreground import bounding_box

TILE = 128  # pixels a side of one plane
WIDTH, HEIGHT = 3 * TILE + 4, TILE
_QUALITY = 75
_BODY = (51, 217, 255)
# of label values 1, 2, ...; repeated where there are more
LABEL_COLOURS = ((255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189), (227, 119, 194), (188, 189, 34))

Window = tuple[float, float]


def draw(
    image: NDArray[Any],
    spacing_mm: tuple[float, float, float],
    window: Window,
    foreground: NDArray[np.uint8] | None = None,
    label: NDArray[Any] | None = None,
) -> bytes:
    """Return an axial, a coronal and a sagittal plane as a JPEG of 388 x 128 pixels.

    The planes go through the middle of the label, else of the body, else of the volume. Up is superior, or anterior in
    the axial plane; to the right lies the patient's right, or front in the sagittal plane.

    Args:
        image: (D, H, W), any type; NaN is drawn black.
        spacing_mm: of its voxels.
        window: values shown as black and white.
        foreground: (D, H, W), non-zero = body, outlined in blue; or None.
        label: (D, H, W), drawn in colours; or None.
    """
    from PIL import Image

    canvas = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    middle = _middle(image.shape, foreground, label)
    millimetres = max(size * step for size, step in zip(image.shape, spacing_mm, strict=True))
    for axis in range(3):
        up, right = (other for other in range(3) if other != axis)
        pixels = _plane(image, axis, middle[axis], window)
        if label is not None:
            _paint_label(pixels, np.take(label, middle[axis], axis))
        if foreground is not None:
            pixels[_outline(np.take(foreground, middle[axis], axis) != 0)] = _BODY
        height = max(1, round(TILE * image.shape[up] * spacing_mm[up] / millimetres))
        width = max(1, round(TILE * image.shape[right] * spacing_mm[right] / millimetres))
        tile = np.asarray(Image.fromarray(pixels[::-1]).resize((width, height), Image.Resampling.BILINEAR))
        y, x = (TILE - height) // 2, axis * (TILE + 2) + (TILE - width) // 2
        canvas[y : y + height, x : x + width] = tile
    buffer = io.BytesIO()
    Image.fromarray(canvas).save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()


def _middle(
    shape: tuple[int, ...], foreground: NDArray[np.uint8] | None, label: NDArray[Any] | None
) -> tuple[int, ...]:
    if label is not None and label.any():
        return tuple(int(np.median(found)) for found in np.nonzero(label))
    if foreground is not None and foreground.any():
        return tuple((low + high) // 2 for low, high in bounding_box(foreground))
    return tuple(size // 2 for size in shape)


def _plane(image: NDArray[Any], axis: int, index: int, window: Window) -> NDArray[np.uint8]:
    low, high = window
    cut = np.nan_to_num(np.take(image, index, axis).astype(np.float32), nan=low, posinf=high, neginf=low)
    grey = np.clip((cut - low) / max(high - low, 1e-6), 0, 1) * 255
    return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=-1)


def _paint_label(pixels: NDArray[np.uint8], label: NDArray[Any]) -> None:
    inside = label != 0
    colours = np.array(LABEL_COLOURS)[(label[inside].astype(int) - 1) % len(LABEL_COLOURS)]
    pixels[inside] = (0.45 * pixels[inside] + 0.55 * colours).astype(np.uint8)


def _outline(body: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the voxels of the body that touch what is not body; the border of the plane is no edge."""
    padded = np.pad(body, 1, mode="edge")
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return body & ~inner
