"""Region maps whose regions are known without looking at the image."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agssd.regions.source import RegionCase


@dataclass(frozen=True)
class Blocks:
    """Cubes of the grid, cut to the foreground; of frames, squares of each."""

    edge: int = 10

    def identity(self) -> dict[str, Any]:
        """Return the settings."""
        return asdict(self)

    def __call__(self, case: RegionCase) -> NDArray[np.integer[Any]]:
        """Return (D, H, W) numbers from 1 on, not without gaps."""
        edges = (self.edge if case.spatial_dims == 3 else 1, self.edge, self.edge)
        number = np.zeros(case.foreground.shape, dtype=np.int64)
        for places, edge in zip(np.indices(number.shape), edges, strict=True):
            number = number * (1 + places.max() // edge) + places // edge
        return np.where(case.foreground, number + 1, 0)
