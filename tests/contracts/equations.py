"""What papers state, in NumPy and float64: references that share no code with the package."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def softmax(x: np.ndarray) -> np.ndarray:
    """Return the softmax over the last axis."""
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def cross_entropy(target: np.ndarray, logits: np.ndarray) -> float:
    """Return -sum p log softmax(logits) of one row."""
    return float(-(target * np.log(softmax(logits))).sum())


def sinkhorn(logits: np.ndarray, temperature: float, iterations: int = 3) -> np.ndarray:
    """SwAV's listing on the matrix itself, scaled by its one maximum; rows are samples."""
    q = np.exp((logits - logits.max()) / temperature).T
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(1, keepdims=True) * q.shape[0]
        q /= q.sum(0, keepdims=True) * q.shape[1]
    return (q * q.shape[1]).T


def koleo(features: np.ndarray) -> float:
    """Return -mean log of the distance to the nearest other row, after L2 normalisation."""
    rows = features / np.linalg.norm(features, axis=1, keepdims=True)
    logs = []
    for i, row in enumerate(rows):
        logs.append(np.log(min(np.linalg.norm(row - other) for j, other in enumerate(rows) if j != i)))
    return -float(np.mean(logs))


def patch_of(volume: Any, number: int, grid: tuple[int, int, int], size: int = 8) -> np.ndarray:
    """Return the voxels of a patch of (D, H, W) by its raster number."""
    i, j, k = (size * int(x) for x in np.unravel_index(number, grid))
    return np.asarray(volume[i : i + size, j : j + size, k : k + size], dtype=np.float64)


def body_shares(foreground: Any, grid: tuple[int, int, int]) -> np.ndarray:
    """Return (N,): share of body of each patch of (D, H, W)."""
    return np.array([patch_of(foreground, n, grid).mean() for n in range(int(np.prod(grid)))])


def half_air(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return parent crops with their lower half made air."""
    batch = {name: tensor.clone() for name, tensor in batch.items()}
    half = batch["image"].shape[2] // 2
    batch["image"][:, :, :half] = 0
    batch["foreground"][:, :, :half] = 0
    return batch


def numbers(tensor: torch.Tensor) -> np.ndarray:
    """Return float64 numbers without gradient."""
    return tensor.detach().double().numpy()


def sinkhorn_with_dustbin(scores: np.ndarray, temperature: float, dustbin: float, iterations: int = 100) -> np.ndarray:
    """SuperGlue's transport of (M, N) scores on the matrix itself: rows (1, .., 1, N), columns (1, .., 1, M)."""
    m, n = scores.shape
    plan = np.full((m + 1, n + 1), dustbin)
    plan[:m, :n] = scores
    plan = np.exp((plan - plan.max()) / temperature)
    rows, columns = np.append(np.ones(m), n), np.append(np.ones(n), m)
    for _ in range(iterations):
        plan *= (rows / plan.sum(1))[:, None]
        plan *= columns / plan.sum(0)
    return plan
