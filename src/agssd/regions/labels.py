"""Regions from the label maps that a cache has."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agssd.regions.source import RegionCase, numbered_by_frame


@dataclass(frozen=True)
class LabelRegions:
    """The label map as it is; or each connected piece of each label as a region, for example both kidneys.

    Attributes:
        components: pieces that touch at most at edges or corners are one region (full neighbourhood); of frames
            within one frame. Without it a label is one region of the case, in all its frames.
    """

    components: bool = False

    def identity(self) -> dict[str, Any]:
        """Return the settings."""
        return asdict(self)

    def __call__(self, case: RegionCase) -> NDArray[np.integer[Any]]:
        """Return the regions of a case, (D, H, W) integers.

        Raises:
            ValueError: a case without a label map, or with labels below 0.
        """
        if case.label is None:
            raise ValueError(
                f"case {case.key} has no label map, which --source labels needs in every case; use another source, or "
                "prepare a cache of the labelled cases alone"
            )
        if int(case.label.min()) < 0:
            raise ValueError(f"case {case.key} has the label {int(case.label.min())}; regions are numbered from 1 on")
        if not self.components:
            return case.label
        if case.spatial_dims == 2:
            return numbered_by_frame([components_of(frame) for frame in case.label])
        return components_of(case.label)


def components_of(label: NDArray[Any]) -> NDArray[np.int64]:
    """Return the connected pieces of each label of a volume or frame, numbered from 1 label by label, int64."""
    from scipy.ndimage import generate_binary_structure
    from scipy.ndimage import label as connected

    out = np.zeros(label.shape, dtype=np.int64)
    for value in np.unique(label[label > 0]):
        numbers = connected(label == value, structure=generate_binary_structure(label.ndim, label.ndim))[0]
        out[numbers > 0] = numbers[numbers > 0] + out.max()
    return out
