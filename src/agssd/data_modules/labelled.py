"""Labelled crops by sample number, and whole labelled volumes: what the downstream data modules read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from agssd.data_modules.cache import CaseInfo, Kind, VolumeCache
from agssd.data_modules.parents import stored_size
from agssd.data_modules.sampling import case_of_sample, keyed_generator
from agssd.types import Size, Triple

Row = tuple[int, int]  # cache, case
Item = dict[str, Tensor]
_LABEL_CROP_STREAM, _VIEW_CROP_STREAM = 2, 3
_MAX_VOXELS_PER_CLASS = 2048


def _inside(wanted: Sequence[int], shape: Triple, crop_vox: Triple) -> Triple:
    """Return ``wanted`` moved so that the crop lies in the volume, centred on axes where it is larger."""
    start = [
        min(max(first, 0), volume - crop) if volume >= crop else -((crop - volume) // 2)
        for first, volume, crop in zip(wanted, shape, crop_vox, strict=True)
    ]
    return (start[0], start[1], start[2])


def label_voxels(label: NDArray[np.integer[Any]]) -> dict[int, NDArray[np.int32]]:
    """Return up to 2048 voxels (n, 3) of each class above 0, evenly spread over the class in raster order."""
    found: dict[int, NDArray[np.int32]] = {}
    for value in np.unique(label):
        if value > 0:
            flat = np.flatnonzero(label == value)
            if flat.size > _MAX_VOXELS_PER_CLASS:
                flat = flat[np.linspace(0, flat.size - 1, _MAX_VOXELS_PER_CLASS).astype(np.int64)]
            found[int(value)] = np.stack(np.unravel_index(flat, label.shape), 1).astype(np.int32)
    return found


def label_crop_start(
    seed: int,
    sample: int,
    shape: Triple,
    crop_vox: Triple,
    voxels: Mapping[int, NDArray[np.int32]],
    foreground_box: Sequence[Sequence[int]],
    prob_label: float,
) -> Triple:
    """Return the first voxel of a training crop for segmentation.

    With ``prob_label`` a class of the case is drawn uniformly, then one of its voxels, and the crop is laid around it
    so that the voxel falls anywhere in the crop's middle half. Otherwise the crop is laid uniformly over the
    foreground box. Crops leave the volume only where it is smaller than the crop.
    """
    rng = keyed_generator(seed, _LABEL_CROP_STREAM, sample)
    if voxels and rng.random() < prob_label:
        places = voxels[sorted(voxels)[int(rng.integers(len(voxels)))]]
        voxel = places[int(rng.integers(len(places)))]
        wanted = [
            int(v) - crop // 4 - int(rng.integers(crop // 2 + 1)) for v, crop in zip(voxel, crop_vox, strict=True)
        ]
        return _inside(wanted, shape, crop_vox)
    return view_crop_start(rng, shape, crop_vox, foreground_box)


def view_crop_start(
    rng: np.random.Generator, shape: Triple, crop_vox: Triple, foreground_box: Sequence[Sequence[int]]
) -> Triple:
    """Return the first voxel of a crop laid uniformly inside the foreground box, or around it where it is smaller."""
    wanted = []
    for (first, last), crop in zip(foreground_box, crop_vox, strict=True):
        low, high = sorted((first, last - crop))
        wanted.append(int(rng.integers(low, high + 1)))
    return _inside(wanted, shape, crop_vox)


class LabelledVolumes(Dataset[Item]):
    """Training crops by sample number, or whole volumes by position.

    Args:
        caches: open caches.
        rows: (cache, case) of every case known to the data module.
        members: rows that this dataset draws from.
        crop_vox: training crop in voxels, (H, W) for parts of single frames; or None for whole volumes and sequences,
            whose frames stand where D is otherwise.
        seed: of the order of cases and of the places of crops.
        prob_label: share of crops laid around a labelled voxel.
        kind: "segmentation" adds label maps, "classification" adds targets.
        table: class of each stored label value, or None to take values as they are.
        read_labels: off to leave label maps unread, as prediction does: their values may be no classes of the task.
    """

    def __init__(
        self,
        caches: Sequence[VolumeCache],
        rows: Sequence[Row],
        members: Sequence[int],
        crop_vox: Size | None,
        seed: int,
        prob_label: float,
        kind: Literal["segmentation", "classification"],
        table: NDArray[np.int64] | None,
        read_labels: bool = True,
    ) -> None:
        """Read nothing yet."""
        self.caches, self.rows, self.members = tuple(caches), tuple(rows), tuple(members)
        self.crop_vox = crop_vox
        self.seed = seed
        self.prob_label = prob_label
        self.kind = kind
        self.table = table
        self.read_labels = read_labels
        self._voxels: dict[int, dict[int, NDArray[np.int32]]] = {}

    def __len__(self) -> int:
        """Return the number of cases."""
        return len(self.members)

    def __getitem__(self, sample: int) -> Item:
        """Return one case without its batch axis; intensities as stored."""
        position = sample if self.crop_vox is None else case_of_sample(self.seed, sample, len(self.members))
        row = self.members[position]
        cache, case = self.caches[self.rows[row][0]], self.rows[row][1]
        info = cache.cases[case]
        start: Triple = (0, 0, 0)
        size = shape = info.shape
        if self.crop_vox is not None:
            size = stored_size(self.crop_vox)
            start = self._start(row, cache, case, info, sample, size)

        def read(what: Kind) -> Tensor:
            return torch.from_numpy(cache.read(case, start, size, what)).view(-1, *(self.crop_vox or shape))

        item = {
            "image": read("image"),
            "foreground": read("foreground"),
            "scale": torch.tensor(info.scale, dtype=torch.float32),
            "offset": torch.tensor(info.offset, dtype=torch.float32),
            "low": torch.tensor(info.low, dtype=torch.float32),
            "high": torch.tensor(info.high, dtype=torch.float32),
            "is_ct": torch.tensor(info.modality == "ct"),
            "spacing_mm": torch.tensor(info.spacing_mm[-info.spatial_dims :], dtype=torch.float32),
            "sample": torch.tensor(sample, dtype=torch.int64),
            "case": torch.tensor(row, dtype=torch.int64),
        }
        if self.kind == "segmentation" and self.read_labels and info.label_values is not None:
            item["label"] = torch.from_numpy(self._classes(read("label").numpy()))
        if self.kind == "classification" and info.class_index is not None:
            item["target"] = torch.tensor(info.class_index, dtype=torch.int64)
        return item

    def _classes(self, label: NDArray[Any]) -> NDArray[np.int16]:
        return (label if self.table is None else self.table[label]).astype(np.int16)

    def _start(self, row: int, cache: VolumeCache, case: int, info: CaseInfo, sample: int, size: Triple) -> Triple:
        if self.kind == "classification":
            rng = keyed_generator(self.seed, _VIEW_CROP_STREAM, sample)
            return view_crop_start(rng, info.shape, size, info.foreground_box)
        if row not in self._voxels:
            self._voxels[row] = label_voxels(self._classes(cache.read_whole(case, "label")))
        return label_crop_start(
            self.seed, sample, info.shape, size, self._voxels[row], info.foreground_box, self.prob_label
        )
