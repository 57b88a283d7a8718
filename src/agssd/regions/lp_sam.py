"""Regions that a trained LP-SAM finds, frame by frame, of a volume slice by slice."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from agssd.models.lp_sam import LPSAM, load_lp_sam
from agssd.regions.labels import components_of
from agssd.regions.source import RegionCase, file_digest, numbered_by_frame, stamp


def trained(checkpoint: Path, device: str) -> LPSAM:
    """Return the LP-SAM of a checkpoint on a device; the last one is kept until its file changes."""
    return _trained_once(checkpoint, device, stamp(checkpoint))


@lru_cache(maxsize=1)
def _trained_once(checkpoint: Path, device: str, _: tuple[int, ...]) -> LPSAM:
    return load_lp_sam(checkpoint).to(device)


@dataclass(frozen=True)
class LatentPrompts:
    """The masks of a trained LP-SAM: a pixel of the foreground goes to its likeliest mask, if it is likelier than not.

    Attributes:
        checkpoint: of either stage of LP-SAM.
        components: connected pieces are regions of their own, within a frame or slice. Without it each mask is one
            region of the case, in all its frames.
        device: where it runs.
    """

    checkpoint: Path
    components: bool = False
    device: str = "cpu"

    def identity(self) -> dict[str, Any]:
        """Return the settings, and what tells the checkpoint from others."""
        return asdict(self) | {"checkpoint": file_digest(Path(self.checkpoint))}

    @torch.no_grad()
    def __call__(self, case: RegionCase) -> NDArray[np.int64]:
        """Return the regions of a case, (D, H, W) int64."""
        model = trained(self.checkpoint, self.device)
        frames = []
        for image, body in zip(np.moveaxis(case.image, 1, 0), case.foreground, strict=True):
            if not body.any():  # SAM's encoder is what takes the time
                frames.append(np.zeros(body.shape, dtype=np.int64))
                continue
            best, mask = model(torch.from_numpy(image.copy())[None].to(self.device))[0].max(0)
            frames.append(np.where(body, torch.where(best > 0, mask + 1, 0).cpu().numpy(), 0))
        if self.components:
            return numbered_by_frame([components_of(frame) for frame in frames])
        return np.stack(frames).astype(np.int64)
