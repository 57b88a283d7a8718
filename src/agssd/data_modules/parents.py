"""Parent crops by their number in the stream, as stored in the caches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from agssd.data_modules.cache import CaseInfo, Kind, VolumeCache
from agssd.data_modules.mixing import Mixture
from agssd.data_modules.sampling import crop_start, keyed_generator
from agssd.types import Size, Triple

if TYPE_CHECKING:
    from torch import Tensor

OnBroken = Literal["error", "quarantine"]
MAX_BROKEN = 4  # cases that may fail one after another before the disk is to blame and not the cases
_REPLACEMENT_STREAM = 5


def stored_size(size: Size) -> Triple:
    """Return the box of the cache that a crop ([D,] H, W) is: a crop of a frame takes one frame."""
    depth, height, width = (1, *size)[-3:]
    return depth, height, width


class ParentCrops(Dataset[dict[str, "Tensor"]]):
    """Map-style dataset whose index is the number of a sample in the stream, so any index from 0 on is valid.

    Args:
        caches: open caches.
        rows: (cache, case) of every case to draw from, ordered by cache.
        parent_vox: crop in voxels (D, H, W); (H, W) for crops of one frame each.
        seed: of the stream.
        prob_foreground: share of crops centred on foreground.
        mixture: the order of the rows and their sources.
        shuffle: in the mixture's order (training) or always in that of the rows (validation).
        on_broken: what happens where a case cannot be read: "error" raises; "quarantine" draws another case of the same
            source as a function of (seed, sample, cases that failed) and names those that failed in ``broken``.
        regions: also read the region map, as ``regions``.
    """

    def __init__(
        self,
        caches: Sequence[VolumeCache],
        rows: Sequence[tuple[int, int]],
        parent_vox: Size,
        seed: int,
        prob_foreground: float,
        mixture: Mixture,
        shuffle: bool,
        on_broken: OnBroken = "error",
        regions: bool = False,
    ) -> None:
        """Keep what a sample is computed from."""
        self.caches = tuple(caches)
        self.rows = tuple(rows)
        self.parent_vox = parent_vox
        self.seed = seed
        self.prob_foreground = prob_foreground
        self.mixture = mixture
        self.shuffle = shuffle
        self.on_broken = on_broken
        self.regions = regions

    def info(self, row: int) -> CaseInfo:
        """Return what the cache says about case ``row``."""
        cache, case = self.rows[row]
        return self.caches[cache].cases[case]

    def row_of(self, sample: int) -> int:
        """Return the case drawn for sample ``sample``."""
        return self.mixture.row(sample) if self.shuffle else sample % len(self.rows)

    def __getitem__(self, sample: int) -> dict[str, Tensor]:
        """Return sample ``sample`` as a ParentBatch without its batch axis.

        Raises:
            ValueError: a case cannot be read, and under "quarantine" more than four in a row or all of its source.
        """
        row = self.row_of(sample)
        broken: list[int] = []
        while True:
            try:
                crop = self._read(sample, row)
                break
            except ValueError as error:
                if self.on_broken == "error":
                    raise
                broken.append(row)
                row = self._another(sample, broken, error)
        info = self.info(row)
        return {
            **crop,
            "scale": torch.tensor(info.scale, dtype=torch.float32),
            "offset": torch.tensor(info.offset, dtype=torch.float32),
            "low": torch.tensor(info.low, dtype=torch.float32),
            "high": torch.tensor(info.high, dtype=torch.float32),
            "edge_q99": torch.tensor(info.edge_q99, dtype=torch.float32),
            "is_ct": torch.tensor(info.modality == "ct"),
            "spacing_mm": torch.tensor(info.spacing_mm[-len(self.parent_vox) :], dtype=torch.float32),
            "sample": torch.tensor(sample, dtype=torch.int64),
            "case": torch.tensor(row, dtype=torch.int64),
            "broken": torch.tensor(broken + [-1] * (MAX_BROKEN - len(broken)), dtype=torch.int64),
        }

    def _start(self, sample: int, cache: VolumeCache, case: int) -> Triple:
        shape, chunks = cache.cases[case].shape, _foreground_chunks(cache, case)
        return crop_start(self.seed, sample, shape, stored_size(self.parent_vox), chunks, self.prob_foreground)

    def stored_bytes(self, sample: int) -> int:
        """Return the bytes of the cache's files that reading sample ``sample`` touches."""
        cache_idx, case = self.rows[self.row_of(sample)]
        cache = self.caches[cache_idx]
        start = self._start(sample, cache, case)
        size = stored_size(self.parent_vox)
        kinds: tuple[Kind, ...] = ("image", "foreground", "regions")
        return sum(cache.stored_bytes(case, start, size, what) for what in kinds[: 3 if self.regions else 2])

    def _read(self, sample: int, row: int) -> dict[str, Tensor]:
        cache_idx, case = self.rows[row]
        cache = self.caches[cache_idx]
        start = self._start(sample, cache, case)
        size = stored_size(self.parent_vox)
        image = cache.read(case, start, size, "image")  # (C, D, H, W) int16
        foreground = cache.read(case, start, size, "foreground")  # (D, H, W) uint8
        crop = {
            "image": torch.from_numpy(image).view(-1, *self.parent_vox),
            "foreground": torch.from_numpy(foreground).view(-1, *self.parent_vox),
            "centre_mm": _offset_mm(start, size, cache.cases[case])[-len(self.parent_vox) :],
        }
        if self.regions:  # cases may differ in the type of theirs
            regions = cache.read(case, start, size, "regions").astype(np.int32)
            crop["regions"] = torch.from_numpy(regions).view(-1, *self.parent_vox)
        return crop

    def _another(self, sample: int, broken: Sequence[int], error: ValueError) -> int:
        """Return a row of the same source that has not failed for this sample."""
        source = self.mixture.source(broken[0])
        first, last = self.mixture.starts[source : source + 2]
        others = [row for row in range(first, last) if row not in broken]
        if len(broken) > MAX_BROKEN or not others:
            raise ValueError(
                f"{len(broken)} cases drawn for one sample cannot be read, one after another, which data.on_broken "
                f"quarantine is not for; check the disk and the cache. The last: {error}"
            ) from error
        return others[int(keyed_generator(self.seed, _REPLACEMENT_STREAM, sample, len(broken)).integers(len(others)))]


def _offset_mm(start: Triple, size: Triple, info: CaseInfo) -> Tensor:
    """Return (3,) float32: centre of a crop minus centre of the volume."""
    axes = zip(start, size, info.shape, info.spacing_mm, strict=True)
    return torch.tensor([(first + crop / 2 - volume / 2) * mm for first, crop, volume, mm in axes], dtype=torch.float32)


@lru_cache(maxsize=4096)
def _foreground_chunks(cache: VolumeCache, case: int) -> np.ndarray:
    return cache.foreground_chunks(case)
