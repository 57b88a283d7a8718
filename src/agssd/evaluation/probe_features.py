"""Frozen features of labelled volumes: tokens over the labels of their patches, and one vector per volume."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from itertools import product
from operator import add
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from agssd.geometry import axis_names, sizes_of
from agssd.models.backbone import Backbone
from agssd.types import Features, Size

OUTSIDE = 255
Depths = Literal["last", "all"]


class ProbeVolume(NamedTuple):
    """A volume to probe with."""

    subject: str
    image: Tensor  # (C, [D,] H, W) float32 in the model's range
    label: Tensor | None  # ([D,] H, W) integers below 255
    target: int | None  # class of the volume


class ProbeFeatures(NamedTuple):
    """What a frozen encoder says of a volume, and the truth."""

    subject: str
    tokens: Tensor  # (N, E) float32
    cls: Tensor  # (E,) float32, the mean over the windows
    labels: Tensor | None  # (N, P) uint8 under the tokens, 255 outside the volume
    target: int | None


def _padded_shape(shape: Sequence[int], patch_size: Size, window_vox: Size | None) -> Size:
    windows = window_vox or (0,) * len(patch_size)
    return tuple(max(-(-n // p) * p, w) for n, p, w in zip(shape, patch_size, windows, strict=True))


def _pad_to(values: Tensor, size: Size, fill: float) -> Tensor:
    """Return ``values`` (..., [D,] H, W) padded at the end of each axis to ``size``."""
    missing = [n - own for n, own in zip(size, values.shape[-len(size) :], strict=True)]
    return F.pad(values, [n for end in reversed(missing) for n in (0, end)], value=fill)


def _starts(length: int, window: int, stride: int) -> list[int]:
    last = length - window
    return [*range(0, last, stride), last]


@torch.no_grad()
def window_features(
    backbone: Backbone,
    image: Tensor,
    window_vox: Size | None,
    overlap: float = 0.5,
    dtype: torch.dtype | None = None,
    batch_size: int = 16,
    depths: Depths = "last",
) -> tuple[Tensor, Tensor]:
    """Return the tokens of a whole volume, each the mean over the windows that contain it, and the mean [CLS].

    Args:
        backbone: frozen encoder in evaluation mode.
        image: (C, [D,] H, W) float32 in the model's range; padded at the end with its lowest value to whole patches.
        window_vox: window in voxels, a multiple of the patch: the size of view the encoder was trained on; None
            takes the whole volume in one.
        overlap: of neighbouring windows, in [0, 1); rounded so that windows start on patch borders.
        dtype: of autocast; None computes in float32.
        batch_size: windows per forward pass.
        depths: "last" takes the encoder's tokens; "all" the four levels of :class:`agssd.types.Features` side by side,
            E four times as large, as DINOv2 segments with a linear layer.

    Returns:
        (N, E) float32 in raster order of the padded volume's patches, and (E,) float32, both on the CPU.

    Raises:
        ValueError: if the window is no multiple of the patch or the overlap is out of range, or if all depths are
            wanted of an encoder whose levels are not on the grid of its tokens.
    """
    cls: list[Tensor] = []

    def tokens(views: Tensor) -> Tensor:
        features: Features = backbone(views)
        cls.append(features.cls.float().cpu())
        return features.tokens if depths == "last" else _all_depths(features)

    mean = _over_windows(backbone, image, window_vox, overlap, dtype, batch_size, tokens)
    return mean, torch.cat(cls).mean(0)


def _all_depths(features: Features) -> Tensor:
    """Return (B, N, E), the levels of each token side by side.

    Raises:
        ValueError: if there are none, or they are not on the grid of the tokens.
    """
    if not features.levels or any(tuple(level.shape[2:]) != tuple(features.grid) for level in features.levels):
        shapes = [tuple(level.shape[2:]) for level in features.levels]
        raise ValueError(
            f"the encoder has levels on the grids {shapes}, its tokens are on {tuple(features.grid)}; take depths: last"
        )
    return torch.cat([level.flatten(2).mT for level in features.levels], 2)


@torch.no_grad()
def window_attention(
    backbone: Backbone,
    image: Tensor,
    window_vox: Size | None,
    overlap: float = 0.5,
    dtype: torch.dtype | None = None,
    batch_size: int = 16,
) -> Tensor:
    """Return the attention of [CLS] to the tokens of a whole volume, each the mean over the windows that contain it.

    Each window has a [CLS] of its own. A value is the attention times the number of tokens in the window, so that 1 is
    what a [CLS] without preference gives. Arguments and errors as in :func:`window_features`.

    Returns:
        (N, heads) float32 in raster order of the padded volume's patches, on the CPU.

    Raises:
        ValueError: if the encoder has no [CLS] token.
    """

    def attention(views: Tensor) -> Tensor:
        rows = backbone.cls_attention(views).flatten(2)  # (B, heads, N)
        return rows.transpose(1, 2) * rows.shape[2]

    return _over_windows(backbone, image, window_vox, overlap, dtype, batch_size, attention)


def _over_windows(
    backbone: Backbone,
    image: Tensor,
    window_vox: Size | None,
    overlap: float,
    dtype: torch.dtype | None,
    batch_size: int,
    per_token: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return (N, F), the mean over windows of what ``per_token`` gives, (B, n, F) for (B, C, *window)."""
    patch = backbone.patch_size
    if window_vox is not None and any(w < p or w % p for w, p in zip(window_vox, patch, strict=True)):
        raise ValueError(f"window {tuple(window_vox)} is no multiple of the encoder's patch {tuple(patch)}")
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap is {overlap}; give a share from 0 to below 1")
    size = _padded_shape(image.shape[1:], patch, window_vox)
    padded = _pad_to(image, size, float(image.min()))
    window_vox = window_vox or size
    strides = [max(1, round((1 - overlap) * w / p)) * p for w, p in zip(window_vox, patch, strict=True)]
    axes = [_starts(n, w, s) for n, w, s in zip(size, window_vox, strides, strict=True)]
    places = list(product(*axes))
    grid = token_grid(image.shape[1:], patch, window_vox)
    total: Tensor | None = None
    count = torch.zeros(*grid, 1)
    per_window = tuple(n // p for n, p in zip(window_vox, patch, strict=True))
    device = next(backbone.parameters()).device
    autocast = nullcontext() if dtype is None else torch.autocast(device.type, dtype)
    for first in range(0, len(places), batch_size):
        chosen = places[first : first + batch_size]
        views = [padded[:, *map(slice, start, map(add, start, window_vox))] for start in chosen]
        with autocast:
            values = per_token(torch.stack(views).to(device)).float().cpu()
        if total is None:
            total = torch.zeros(*grid, values.shape[-1])
        for start, view in zip(chosen, values, strict=True):
            first_token = [n // p for n, p in zip(start, patch, strict=True)]
            part = tuple(map(slice, first_token, map(add, first_token, per_window)))
            total[part] += view.reshape(*per_window, -1)
            count[part] += 1
    assert total is not None
    return (total / count).flatten(0, -2)


def token_grid(shape: Sequence[int], patch_size: Size, window_vox: Size | None) -> Size:
    """Return the grid of the tokens of :func:`window_features` for a volume of ``shape`` ([D,] H, W)."""
    return tuple(n // p for n, p in zip(_padded_shape(shape, patch_size, window_vox), patch_size, strict=True))


def patch_labels(label: Tensor, patch_size: Size, window_vox: Size | None) -> Tensor:
    """Return the labels under the tokens of :func:`window_features`.

    Args:
        label: ([D,] H, W) integers below 255.
        patch_size: voxels per token.
        window_vox: window of the features, which decides the padding.

    Returns:
        (N, P) uint8, P voxels of a patch, in raster order, 255 outside the volume.
    """
    size = _padded_shape(label.shape, patch_size, window_vox)
    padded = _pad_to(label.to(torch.uint8), size, OUTSIDE)
    cells, within, whole = axis_names(len(size))
    blocks: Tensor = rearrange(padded, f"{whole} -> ({cells}) ({within})", **sizes_of(within, patch_size))
    return blocks


def encode(
    backbone: Backbone,
    volumes: Iterable[ProbeVolume],
    window_vox: Size | None,
    overlap: float,
    dtype: torch.dtype | None = None,
    depths: Depths = "last",
) -> list[ProbeFeatures]:
    """Return the features of each volume; arguments as in :func:`window_features`."""
    found = []
    for volume in volumes:
        tokens, cls = window_features(backbone, volume.image, window_vox, overlap, dtype, depths=depths)
        labels = None if volume.label is None else patch_labels(volume.label, backbone.patch_size, window_vox)
        found.append(ProbeFeatures(volume.subject, tokens, cls, labels, volume.target))
    return found
