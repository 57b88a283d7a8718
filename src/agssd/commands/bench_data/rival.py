"""What every rival offers: crops and views per call, and the volumes in its own form.

A rival gives random crops as it keeps them, and complete training views: two global and six local ones, each of random
place and size (the ranges of ``OverlapCrops``), resampled trilinearly and flipped, float32 in [0, 1]. Rivals with
transforms of their own use them; the others share ``cut_view``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

LOW_HU, HIGH_HU = -1000.0, 1000.0
GLOBAL_SCALE, LOCAL_SCALE = (0.75, 1.33), (0.35, 0.6)  # edges as shares of a global view, as in OverlapCrops
NUM_GLOBAL, NUM_LOCAL = 2, 6
Box = tuple[slice, ...]


@dataclass(frozen=True)
class Sizes:
    """Edges in voxels."""

    view_vox: int
    parent_vox: int

    def views(self) -> list[tuple[int, int, int]]:
        """Return (edge, least, largest edge of the box it is cut from) of every view of one sample."""
        edge, half = self.view_vox, self.view_vox // 2
        whole, part = ([round(edge * share) for share in scale] for scale in (GLOBAL_SCALE, LOCAL_SCALE))
        return [(edge, whole[0], whole[1])] * NUM_GLOBAL + [(half, part[0], part[1])] * NUM_LOCAL


def unit_range(hu: NDArray[Any]) -> NDArray[np.float32]:
    """Return HU as float32 in [0, 1]."""
    return ((hu.astype(np.float32) - LOW_HU) / (HIGH_HU - LOW_HU)).clip(0, 1)


class Rival(ABC):
    """One way to keep volumes and to cut from them.

    Args:
        place: folder of its files, made by ``prepare``.
        sizes: of crops and views.
    """

    settings = ""
    whole_turn = 1  # a turn is a multiple of so many calls, where work comes in bursts
    libraries: tuple[str, ...] = ()  # modules, or names in them where they load lazily
    work: dict[str, tuple[Callable[[], object], int]]  # "crop", "parent", "views" -> a call, and what one call yields

    def __init__(self, place: Path, sizes: Sizes) -> None:
        self.place, self.sizes = place, sizes
        self.rng = np.random.default_rng(0)

    @classmethod
    @abstractmethod
    def prepare(cls, folder: Path, place: Path) -> None:
        """Write below ``place`` what it reads, from the volumes in ``folder``."""

    @classmethod
    def load_libraries(cls) -> None:
        """Import what is not to count as its memory."""
        for name in (*cls.libraries, "torch.nn.functional"):
            resolve_name(name)


class CutRival(Rival):
    """A rival whose crops and views are cut by a call of its own."""

    def __init__(self, place: Path, sizes: Sizes) -> None:
        super().__init__(place, sizes)
        self.work = {
            "crop": (partial(self.crop, sizes.view_vox), 1),
            "parent": (partial(self.crop, sizes.parent_vox), 1),
            "views": (self.views, NUM_GLOBAL + NUM_LOCAL),
        }

    @abstractmethod
    def crop(self, size: int) -> object:
        """Return a random crop of ``size``³ of a random volume."""

    @abstractmethod
    def views(self) -> list[Tensor]:
        """Return the views of one sample, (1, n, n, n) float32 each."""


def images(folder: Path) -> list[Path]:
    """Return the volumes."""
    return sorted(folder.glob("image_*.npy"))


def write_nifti(folder: Path, place: Path) -> None:
    """Write each volume as nii.gz in int16, axes reversed as NIfTI has them."""
    import nibabel as nib

    for path in images(folder):
        nib.save(nib.Nifti1Image(np.load(path).T, np.eye(4)), place / f"{path.stem}.nii.gz")


def cut_view(box: NDArray[np.float32], edge: int, rng: np.random.Generator) -> Tensor:
    """Return a box (d, h, w) resampled trilinearly to ``edge``³ and flipped at random, (1, edge, edge, edge)."""
    import torch
    import torch.nn.functional as F

    view = F.interpolate(torch.from_numpy(box)[None, None], size=(edge,) * 3, mode="trilinear")[0]
    axes = [axis for axis in (1, 2, 3) if rng.random() < 0.5]
    return view.flip(axes) if axes else view


class BoxRival(CutRival):
    """An engine that opens a volume and reads boxes of it; every view is a read of its own, no larger than needed."""

    stored_in_unit_range = False

    @abstractmethod
    def open(self, case: int) -> Any:
        """Return what is sliced, (D, H, W)."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of volumes."""

    def _box(self, shape: tuple[int, ...], edges: tuple[int, ...]) -> Box:
        kept = [min(edge, n) for edge, n in zip(edges, shape, strict=True)]
        start = [int(self.rng.integers(n - edge + 1)) for edge, n in zip(kept, shape, strict=True)]
        return tuple(slice(s, s + edge) for s, edge in zip(start, kept, strict=True))

    def crop(self, size: int) -> object:
        """Return the voxels in the type they are stored in."""
        volume = self.open(int(self.rng.integers(len(self))))
        return np.array(volume[self._box(volume.shape, (size,) * 3)])

    def views(self) -> list[Tensor]:
        """Return views of one volume."""
        volume = self.open(int(self.rng.integers(len(self))))
        found = []
        for edge, low, high in self.sizes.views():
            box = volume[self._box(volume.shape, tuple(int(n) for n in self.rng.integers(low, high + 1, 3)))]
            found.append(cut_view(box if self.stored_in_unit_range else unit_range(box), edge, self.rng))
        return found
