"""A made set with known anatomy: organs of fixed arrangement under speckle, deformation and any pose, in 2D and 3D."""

from __future__ import annotations

import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, zoom

from agssd.data_modules.build import CacheWriter
from agssd.regions.source import RegionCase
from agssd.scans.case import PreparedCase

NUM_REGIONS = 7  # six organs and the tissue between them
# place and radii in a body of radius 0.9, and mean and grain of the speckle; two organs each are equally bright
ORGANS = (
    ((0.35, 0.35, 0.0), (0.28, 0.28, 0.4), 0.9, 0.6),
    ((-0.4, 0.3, 0.1), (0.3, 0.22, 0.4), 0.9, 1.6),
    ((0.0, -0.45, 0.0), (0.2, 0.3, 0.4), 0.35, 0.6),
    ((-0.45, -0.3, -0.1), (0.2, 0.2, 0.4), 0.35, 1.6),
    ((0.5, -0.35, 0.0), (0.18, 0.25, 0.4), 0.15, 0.6),
    ((0.0, 0.02, 0.0), (0.16, 0.16, 0.4), 1.6, 1.0),
)
TISSUE = (0.55, 1.0)


def make_case(dims: int, size: int, seed: int) -> PreparedCase:
    """Return one body, turned, scaled and deformed by its seed; organ n has label n, the tissue label 7, air 0."""
    rng = np.random.default_rng(seed)
    shape = (size,) * dims
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, size)] * dims, indexing="ij"))
    turn, _ = np.linalg.qr(rng.normal(size=(dims, dims)))  # any rotation or reflection
    bend = np.stack([zoom(rng.normal(0, 0.05, (4,) * dims), size / 4, order=3) for _ in range(dims)])
    place = np.tensordot(turn, grid / rng.uniform(0.9, 1.05), 1) + bend
    label = np.where((place**2).sum(0) < 0.9**2, NUM_REGIONS, 0)
    echo = np.zeros(shape)
    for number, (middle, radii, mean, grain) in enumerate((*ORGANS, ((), (), *TISSUE)), 1):
        if middle:
            inside = sum(((place[a] - middle[a]) / radii[a]) ** 2 for a in range(dims)) < 1
            label = np.where(inside & (label > 0), number, label)
        waves = [gaussian_filter(rng.normal(size=shape), grain) for _ in range(2)]
        speckle = np.hypot(*waves) / np.hypot(*waves).mean()
        echo = np.where(label == number, mean * rng.uniform(0.6, 1.6) * speckle, echo)
    values = np.log1p(6 * rng.uniform(0.3, 3.0) * echo)  # gain, then a curve of its own
    values = (values / values.max()) ** rng.uniform(0.5, 2.0)
    values = np.where(label > 0, 10 + 230 * values, 0).round().astype(np.int16)
    stored = (1, *shape) if dims == 2 else shape
    return PreparedCase(
        image=values.reshape(1, *stored),
        foreground=(label > 0).astype(np.uint8).reshape(stored),
        label=label.astype(np.uint8).reshape(stored),
        modality="us" if dims == 2 else "mri",
        spacing_mm=(1.0, 1.0, 1.0),
        affine=np.eye(4),
        source_shape=(size, size, stored[0]),
        source_affine=np.eye(4),
        source_sha256=f"{seed:064x}",
        scale=(1.0,),
        offset=(0.0,),
        low=(0.0,),
        high=(255.0,),
        edge_q99=(50.0,),
        spatial_dims=dims,
    )


def build_set(path: Path, dims: int, size: int, train: int, test: int, seed: int = 0) -> Path:
    """Write a cache of ``train`` bodies to learn from and ``test`` bodies of the split "test"."""
    with CacheWriter(path) as writer:
        for row in range(train + test):
            case = make_case(dims, size, 10_000 * seed + row)
            writer.add(case, f"body{row:03d}", f"body{row:03d}", "train" if row < train else "test", None)
        writer.finish()
    return path


@dataclass(frozen=True)
class RandomCells:
    """Partitions that know nothing of the anatomy: the cells nearest to points drawn in the body."""

    count: int = NUM_REGIONS
    seed: int = 0

    def identity(self) -> dict[str, Any]:
        """Return the settings."""
        return asdict(self)

    def __call__(self, case: RegionCase) -> NDArray[np.integer[Any]]:
        """Return (D, H, W) numbers from 1 on within the body."""
        rng = np.random.default_rng([self.seed, zlib.crc32(case.key.encode())])
        places = np.argwhere(case.foreground)
        points = places[rng.choice(len(places), self.count, replace=False)]
        nearest = ((places[:, None] - points) ** 2).sum(-1).argmin(1) + 1
        out = np.zeros(case.foreground.shape, dtype=np.int64)
        out[case.foreground] = nearest
        return out
