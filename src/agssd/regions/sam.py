"""Regions that Segment Anything finds from a grid of points.

Every frame is looked at by itself, of a volume every axial slice.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agssd.devices import check_device
from agssd.models.sam import WEIGHTS, fitted_size, from_sam, load_sam, sam_size, to_sam
from agssd.regions.source import RegionCase, RegionSource, file_digest, numbered_by_frame, stamp

_POINTS_AT_ONCE = 64
_MASKS_AT_ONCE = 32


def sam_source(
    sam: Path | None = None,
    checkpoint: Path | None = None,
    points: int | None = None,
    min_iou: float | None = None,
    min_stability: float | None = None,
    components: bool | None = None,
    device: str = "cpu",
) -> RegionSource:
    """Return the source that the options of ``agssd regions --source sam`` ask for; the model is loaded once here.

    Raises:
        ValueError: options that exclude each other, impossible settings, a device that is not there, or a model that
            cannot be loaded.
    """
    if (sam is None) == (checkpoint is None):
        raise ValueError(
            "--source sam needs one of --sam DIR (prompted by a grid of points) and --checkpoint FILE.ckpt (LP-SAM)"
        )
    check_device(device)
    of_grid = {
        name: value
        for name, value in (("points", points), ("min_iou", min_iou), ("min_stability", min_stability))
        if value is not None
    }
    if checkpoint is not None:
        if of_grid:
            names = " and ".join(f"--{name.replace('_', '-')}" for name in of_grid)
            raise ValueError(f"{names} cannot be given with --checkpoint: LP-SAM prompts itself")
        from agssd.regions.lp_sam import LatentPrompts, trained

        trained(checkpoint, device)
        return LatentPrompts(checkpoint, bool(components), device)
    assert sam is not None
    if components:
        raise ValueError("--components cannot be given with --sam: its masks are regions already")
    _loaded(sam, device)
    return PointPrompts(sam, device=device, **of_grid)  # type: ignore[arg-type]  # by name


@dataclass(frozen=True)
class PointPrompts:
    """SAM's masks of a grid of points in the foreground, as one map.

    Each point gives three masks. Those that SAM itself finds good are kept, of several that are nearly one the best,
    and the smaller lies upon the larger. A region is of one frame; a slice of a volume has numbers of its own.

    Source: Kirillov et al. 2023, appendix B (grid of 32 points, thresholds 0.88, 0.95 and 0.7, without crops and
    without the filling of small holes); painting by area is ours.

    Attributes:
        sam: folder of a ``SamModel``.
        points: along the longer side of a frame.
        min_iou: least quality that SAM foretells.
        min_stability: least IoU of the mask cut one logit above and one below its border.
        max_overlap: IoU above which two masks are one.
        min_pixels: smaller regions are left out.
        device: where SAM runs.
    """

    sam: Path
    points: int = 32
    min_iou: float = 0.88
    min_stability: float = 0.95
    max_overlap: float = 0.7
    min_pixels: int = 16
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Refuse impossible settings."""
        if self.points < 1 or not 0 <= self.min_stability <= 1:
            raise ValueError(
                f"--points is {self.points} and --min-stability {self.min_stability}; give at least 1 point and a "
                "share between 0 and 1"
            )

    def identity(self) -> dict[str, Any]:
        """Return the settings, and what tells SAM's weights from others."""
        folder = Path(self.sam)
        return asdict(self) | {"sam": [file_digest(folder / "config.json"), file_digest(folder / WEIGHTS)]}

    @torch.no_grad()
    def __call__(self, case: RegionCase) -> NDArray[np.int64]:
        """Return the regions of a case, (D, H, W) int64."""
        frames = zip(np.moveaxis(case.image, 1, 0), case.foreground, strict=True)
        return numbered_by_frame([self._regions(image, body) for image, body in frames])

    def _regions(self, image: NDArray[np.float32], body: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Return (H, W) int64 of a frame (C, H, W) in [0, 1]."""
        out = np.zeros(body.shape, dtype=np.int64)
        sam = _loaded(self.sam, self.device)
        edge, size = sam_size(sam), (int(body.shape[0]), int(body.shape[1]))
        points = _grid(body, self.points, edge).to(self.device)
        if not len(points):
            return out
        seen = sam.vision_encoder(to_sam(torch.from_numpy(image.copy())[None].to(self.device), edge))[0]
        masks, quality = [], []
        for some in points.split(_POINTS_AT_ONCE):
            found = sam(image_embeddings=seen, input_points=some[None, :, None], multimask_output=True)
            logits, foretold = found.pred_masks.flatten(1, 2)[0].float(), found.iou_scores.flatten().float()
            good = (foretold >= self.min_iou) & (_stability(logits) >= self.min_stability)
            masks.append(logits[good])
            quality.append(foretold[good])
        kept = _distinct(torch.cat(masks), torch.cat(quality), self.max_overlap)
        whole = [from_sam(some[None], edge, *size)[0] > 0 for some in kept.split(_MASKS_AT_ONCE)]
        if not whole:
            return out
        inside = torch.cat(whole).cpu().numpy() & body
        for index in np.argsort(-inside.sum((1, 2)), kind="stable"):
            out[inside[index]] = 1 + index
        numbers, counts = np.unique(out[out > 0], return_counts=True)
        table = np.zeros(len(inside) + 1, dtype=np.int64)
        table[numbers[counts >= self.min_pixels]] = 1 + np.arange((counts >= self.min_pixels).sum())
        return table[out]


def _grid(body: NDArray[np.bool_], count: int, edge: int) -> Tensor:
    """Return (P, 2) float32: x and y in SAM's input of the points of a regular grid that lie in the body."""
    step = max(body.shape) / count
    y, x = (np.arange(step / 2, n, step) for n in body.shape)
    at = np.stack(np.meshgrid(y, x, indexing="ij"), -1).reshape(-1, 2)
    at = at[body[tuple(at.astype(int).T)]]
    inner = fitted_size(body.shape[0], body.shape[1], edge)
    scaled = at * (np.asarray(inner) / np.asarray(body.shape)) - 0.5  # SAM adds half a pixel
    return torch.from_numpy(scaled[:, ::-1].astype(np.float32).copy())


def _stability(logits: Tensor) -> Tensor:
    """Return (M,): IoU of masks (M, h, w) cut at +1 and at -1, of which one contains the other."""
    inner, outer = ((logits > cut).sum((1, 2)).float() for cut in (1.0, -1.0))
    return inner / outer.clamp_min(1)


def _distinct(logits: Tensor, quality: Tensor, max_overlap: float) -> Tensor:
    """Return the masks (M', h, w) of which no two overlap by more IoU, the better of each pair kept, best first."""
    order = torch.argsort(quality, descending=True, stable=True)
    flat = (logits[order] > 0).flatten(1).float()
    area = flat.sum(1)
    shared = flat @ flat.T
    near = (shared > max_overlap * (area[:, None] + area - shared)).cpu().numpy()
    kept: list[int] = []
    for index in area.nonzero()[:, 0].tolist():
        if not near[index, kept].any():
            kept.append(index)
    return logits[order[kept]]


def _loaded(folder: Path, device: str) -> Any:
    return _loaded_once(folder, device, stamp(Path(folder) / WEIGHTS))


@lru_cache(maxsize=1)
def _loaded_once(folder: Path, device: str, _: tuple[int, ...]) -> Any:
    return load_sam(folder).to(device)
