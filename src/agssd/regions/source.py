"""What a source of regions is given and gives."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class RegionCase:
    """One case as a source of regions sees it. Axes and triples in tensor order.

    Attributes:
        key: of the case, for messages.
        image: (C, D, H, W) float32 in [0, 1]: the stored range of the modality, clipped (CT: [-1000, 1000] HU).
        foreground: (D, H, W) bool.
        label: (D, H, W) integers, or None without a label map.
        spacing_mm: voxel size; in pixels where the source does not say how large they are.
        spatial_dims: 3 for a volume; 2 for frames, which D counts, and of which each is segmented by itself.
        in_mm: whether ``spacing_mm`` is in mm.
    """

    key: str
    image: NDArray[np.float32]
    foreground: NDArray[np.bool_]
    label: NDArray[np.integer[Any]] | None
    spacing_mm: tuple[float, float, float]
    spatial_dims: int
    in_mm: bool = True


class RegionSource(Protocol):
    """Finds the regions of a case; picklable, and a function of the case and its settings alone."""

    def identity(self) -> dict[str, Any]:
        """Return all settings that a map depends on, in plain types: a map made with others is made again."""
        ...

    def __call__(self, case: RegionCase) -> NDArray[np.integer[Any]]:
        """Return (D, H, W) integers, 0 = no region, else numbers from 1 on, each of one region of the whole case.

        Raises:
            ValueError: a case that it cannot work on, naming its key.
        """
        ...


def numbered_by_frame(frames: Sequence[NDArray[np.integer[Any]]]) -> NDArray[np.int64]:
    """Return (D, H, W) int64: maps (H, W) of frames, numbered on from frame to frame."""
    out = np.stack(frames).astype(np.int64)
    highest = 0
    for frame in out:
        frame[frame > 0] += highest
        highest = max(highest, int(frame.max()))
    return out


def require(module: str, package: str, what: str) -> None:
    """Refuse where a library of the extra ``regions`` is not installed.

    Raises:
        ValueError: naming the package, what needs it and how to get it.
    """
    if importlib.util.find_spec(module) is None:
        raise ValueError(f'{what} needs {package}, which is not installed: pip install "agssd[regions]"')


def stamp(path: Path) -> tuple[int, ...]:
    """Return what changes when a file is written anew, () where it is not there."""
    if not path.exists():
        return ()
    stat = path.stat()
    return (stat.st_mtime_ns, stat.st_size, stat.st_ino)


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, which is read once while it stays as it is."""
    return _digest_once(path, stamp(path))


@lru_cache(maxsize=4)
def _digest_once(path: Path, _: tuple[int, ...]) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
