"""Positions of tokens in a view: the fixed sin-cos code and rotary angles, as functions of the actual grid."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from agssd.types import Size

SINCOS_EXTENT = 16.0  # radians of the fastest wave across the view: 2.5 periods
SINCOS_TEMPERATURE = 100.0  # fastest over slowest wave
ROTARY_TEMPERATURE = 100.0

Rotation = tuple[Tensor, Tensor]  # cos, sin, each (L, head_dim) float32, or (B, 1, L, head_dim)


def axis_coordinates(grid: Size, device: torch.device | None = None) -> Tensor:
    """Return token centres (N, d) in raster order, float64, each axis of the view spanning [0, 1].

    Token ``i`` of ``n`` sits at ``(i + 0.5) / n``, so equal places in a view get equal coordinates on every grid.
    """
    axes = [(torch.arange(n, device=device, dtype=torch.float64) + 0.5) / n for n in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, len(grid))


def sincos_position(grid: Size, embed_dim: int, device: torch.device | None = None) -> Tensor:
    """Return the fixed position code (N, E) float32 of a token grid, entries in [-1, 1].

    Equal parts of the channels per axis, a third in 3D, half sines and half cosines; channels beyond a multiple of 6,
    or of 4 in 2D, are zero. The waves are functions of the normalised coordinate, so the code of a small crop is the
    code of the large grid resampled.

    Source: fixed sin-cos code [R: MAE], in 3D ours; extent and temperature are ours, chosen for grids of 2 to 16 tokens
    (temperature 10000 leaves most channels constant there).
    """
    dims = len(grid)
    waves = embed_dim // (2 * dims)
    if waves == 0:
        least = 2 * dims
        raise ValueError(
            f"embed_dim {embed_dim} is below {least}, too few channels for a {dims}D position; use at least {least}"
        )
    steps = torch.arange(waves, device=device, dtype=torch.float64) / max(waves - 1, 1)
    omega = SINCOS_EXTENT * SINCOS_TEMPERATURE**-steps
    angle = axis_coordinates(grid, device)[:, :, None] * omega  # (N, d, waves)
    code = torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)  # (N, d * 2 * waves)
    return F.pad(code, (0, embed_dim - code.shape[1])).float()


def rotary_angles(grid: Size, head_dim: int, device: torch.device | None = None) -> Tensor:
    """Return rotation angles (N, head_dim / 2) float32: equal parts of the pairs per axis, remaining pairs unrotated.

    Source: [R: DINOv3] rotary positions of coordinates in [-1, 1] with geometric periods; in 3D ours.
    """
    waves = head_dim // (2 * len(grid))
    steps = torch.arange(waves, device=device, dtype=torch.float64) / max(waves, 1)
    omega = 2 * math.pi * ROTARY_TEMPERATURE**-steps
    angle = ((2 * axis_coordinates(grid, device) - 1)[:, :, None] * omega).flatten(1)  # (N, d * waves)
    return F.pad(angle, (0, head_dim // 2 - angle.shape[1])).float()


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Return ``x`` (..., B, heads, L, d) with each channel pair (i, i + d/2) rotated, computed in float32."""
    cos, sin = rotation
    whole = x.float()
    first, second = whole.chunk(2, dim=-1)
    return torch.addcmul(whole * cos, torch.cat([-second, first], -1), sin).to(x.dtype)
