"""From a file of frames to a case: grey values, the sector as foreground, size of pixels, constants."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agssd.scans.case import PreparedCase, RefusedError
from agssd.scans.frames import Frames, read_frames
from agssd.scans.preparing.perceptual import perceptual_hash_of_frames
from agssd.scans.preparing.sector import STILL, background_value, sector
from agssd.scans.preparing.volumes import SAME_SPACING, Recipe, store_by_percentiles

MIN_TISSUE = 0.02  # share of the frames
_SAMPLED = 32  # frames from which the edge constant is taken


def prepare_frames(paths: Sequence[Path], label: Path | None = None, recipe: Recipe | None = None) -> PreparedCase:
    """Return frames made ready for the cache.

    What lies outside the sector, text with names and numbers included, is replaced by the value of the screen around
    it. Pixels stay as they are unless ``recipe`` names a spacing.

    Args:
        paths: the file; exactly one.
        label: picture or sequence of the same size with integers, or None. Where its only value above 0 is 255 that
            becomes 1.
        recipe: how to prepare it; of its spacing the last two numbers count.

    Raises:
        RefusedError: a file cannot be used; the message is the reason.
    """
    recipe = recipe or Recipe()
    if len(paths) != 1:
        raise RefusedError("frames are read from one file, which holds all channels")
    frames = read_frames(paths[0])
    notes = list(frames.notes)
    foreground = sector(frames.array, frames.drawn, frames.regions)
    if len(frames.array) < STILL and not frames.regions:
        notes.append("too few frames to tell writing inside the sector from tissue: look at agssd inspect CACHE --draw")
    share = float(foreground.mean())
    if share < MIN_TISSUE:
        raise RefusedError(f"no sector found: {100 * share:.1f} % of the picture could be tissue")
    screen = background_value(frames.array)
    array = np.where(foreground != 0, frames.array, screen).astype(np.float32)
    labels = None if label is None else _read_label(label, frames, notes)
    spacing = frames.spacing_mm or (1.0, 1.0)
    if recipe.spacing_mm is not None:
        if frames.spacing_mm is None:
            raise RefusedError("its pixels have no size in mm; leave --spacing-mm out to take pixels as they are")
        size = _size_at(array.shape[1:], spacing, recipe.spacing_mm[1:])
        if size != array.shape[1:]:
            spacing = tuple(mm * old / new for mm, old, new in zip(spacing, array.shape[1:], size, strict=True))
            array = _resized(array, size)
            foreground = _resized(foreground, size, nearest=True)
            labels = None if labels is None else _resized(labels, size, nearest=True)
    elif frames.spacing_mm is None:
        notes.append("its pixels have no size in mm: lengths are in pixels")
    image, scale, offset, low, high = store_by_percentiles(array, foreground)
    mm = (1.0, float(spacing[0]), float(spacing[1]))
    source = frames.spacing_mm or (1.0, 1.0)
    affine = np.diag([*mm, 1.0])[[2, 1, 0, 3]]  # of pixel (t, h, w): x to the right, y downwards, the frame
    affine[:2, 3] = (mm[2] - source[1]) / 2, (mm[1] - source[0]) / 2  # both grids begin at the picture's corner
    return PreparedCase(
        image=image[None],
        foreground=foreground,
        label=labels,
        modality="us",
        spacing_mm=mm,
        affine=affine,
        source_shape=(frames.array.shape[2], frames.array.shape[1], frames.array.shape[0]),
        source_affine=np.diag([*source[::-1], 1.0, 1.0]),
        source_sha256=frames.sha256,
        scale=(scale,),
        offset=(offset,),
        low=(low,),
        high=(high,),
        edge_q99=(_edge_constant(image, scale, offset, foreground, mm[1:]),),
        perceptual_hash=perceptual_hash_of_frames(image, foreground, (low - offset) / scale, (high - offset) / scale),
        notes=tuple(notes),
        spatial_dims=2,
        in_mm=frames.spacing_mm is not None,
    )


def _read_label(path: Path, image: Frames, notes: list[str]) -> NDArray[Any]:
    try:
        label = read_frames(path).array
    except RefusedError as error:
        raise RefusedError(f"its label {path}: {error}") from error
    if label.shape != image.array.shape:
        ours, theirs = ("x".join(map(str, array.shape[::-1])) for array in (label, image.array))
        raise RefusedError(f"its label {path} has shape {ours}, the image has {theirs}")
    if not np.array_equal(label, np.round(label)) or label.min() < 0 or label.max() > np.iinfo(np.int16).max:
        raise RefusedError(f"its label {path} holds values that are no integers from 0 to 32767")
    if set(np.unique(label).tolist()) == {0, 255}:
        notes.append("the value 255 of its label is taken for class 1")
        label = label > 0
    return label.astype(np.uint8 if label.max() < 256 else np.int16)


def _size_at(size: Sequence[int], spacing: Sequence[float], wanted: Sequence[float]) -> tuple[int, int]:
    """Return the size (H, W) at another spacing; an axis that has it within 0.1 % stays."""
    height, width = (
        n if abs(mm / target - 1) < SAME_SPACING else max(int(n * mm / target + 1e-3), 1)
        for n, mm, target in zip(size, spacing, wanted, strict=True)
    )
    if height < 2 or width < 2:
        raise RefusedError(f"{width}x{height} pixels at this spacing are too few; choose a smaller --spacing-mm")
    return height, width


def _resized(array: NDArray[Any], size: tuple[int, int], nearest: bool = False) -> NDArray[Any]:
    """Return (T, *size), linear with a pre-filter where pixels grow, or nearest neighbour."""
    import torch
    from torch.nn import functional as F

    frames = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))[:, None]
    if nearest:
        moved = F.interpolate(frames, size, mode="nearest-exact")
    else:
        moved = F.interpolate(frames, size, mode="bilinear", antialias=True, align_corners=False)
    return np.asarray(moved[:, 0].numpy().astype(array.dtype))


def _edge_constant(
    image: NDArray[np.int16], scale: float, offset: float, foreground: NDArray[np.uint8], spacing: tuple[float, float]
) -> float:
    """Return the 99th percentile over the foreground of the edge maps of up to 32 frames, without the outline."""
    import torch

    from agssd.transforms.edges import edge_magnitude, suppress_border

    found = []
    for frame in np.unique(np.linspace(0, len(image) - 1, min(len(image), _SAMPLED)).round().astype(int)):
        inside = torch.from_numpy(foreground[frame] != 0)[None, None]
        values = torch.from_numpy(image[frame].astype(np.float32) * np.float32(scale) + np.float32(offset))[None, None]
        edges = edge_magnitude(values, torch.tensor([spacing], dtype=torch.float32), torch.tensor([False]))
        found.append(suppress_border(edges, inside)[inside].numpy())
    body = np.concatenate(found)
    return float(np.percentile(body, 99)) if body.size else 0.0
