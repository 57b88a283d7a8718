"""Corruptions of a view for a network to undo: shuffled voxels, changed contrast, painted boxes.

Batched on the device; every draw is keyed by sample and view, so a view is corrupted the same way however the batch is
cut.

Source: Models Genesis (Zhou et al., MedIA 2021, arXiv 2004.07882) [R: Models Genesis]; the batched forms are ours.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from agssd.geometry import constant, per_sample
from agssd.transforms.intensity import apply_where
from agssd.transforms.keyed_random import KeyedRandom

_CURVE_POINTS = 256
_NEXT_BOX = 0.95  # probability that another box follows [R: Models Genesis]


def shuffle_windows(image: Tensor, random: KeyedRandom, max_share: float = 0.1, share: float = 0.84) -> Tensor:
    """Return the images with the voxels of most windows in random order; all values of an image are kept.

    A tiling of boxes is drawn per image, with edges from 2 voxels to ``max_share`` of the image's; of its windows the
    share ``share`` is shuffled, all channels alike. Models Genesis shuffles 10,000 windows one after another, which
    leaves about 16 % of its voxels untouched; one tiling does so in two sorts.

    Args:
        image: (B, C, [D,] H, W) float32.
        random: keyed by the B images.
        max_share: largest edge of a window as a share of the image's.
        share: of the windows that are shuffled.
    """
    batch, channels = image.shape[:2]
    size = image.shape[2:]
    shape = constant(tuple(size), image.device)
    largest = (shape * max_share).floor().clamp_min(2)
    edge = (2 + random.uniform(len(size)) * (largest - 1)).floor()  # (B, d), 2 .. largest
    shift = (random.uniform(len(size)) * edge).floor()
    window = torch.zeros(batch, *[1] * len(size), dtype=torch.int64, device=image.device)
    for axis, length in enumerate(size):
        place = torch.arange(length, device=image.device) + shift[:, axis, None]
        cell = torch.div(place, edge[:, axis, None], rounding_mode="floor").long()  # (B, n)
        view = [batch, *(-1 if a == axis else 1 for a in range(len(size)))]
        window = window * (length + 1) + cell.view(view)
    window = window.expand(batch, *size).flatten(1)
    # Voxels sorted by window, once in raster order and once in random order: equal ranks exchange places.
    target = window.argsort(stable=True, dim=1)
    source = (window.double() + random.uniform(window.shape[1]).double()).argsort(1)
    chosen = (random.of_numbers(window) < share).gather(1, target)
    flat = image.flatten(2)
    moved = flat.gather(2, torch.where(chosen, source, target)[:, None].expand(-1, channels, -1))
    return torch.empty_like(flat).scatter_(2, target[:, None].expand(-1, channels, -1), moved).view_as(image)


def bezier_intensity(unit: Tensor, random: KeyedRandom, prob_invert: float | Tensor = 0.5) -> Tensor:
    """Return intensities after a random monotone curve from (0, 0) to (1, 1), or to its mirror image.

    The curve is a cubic Bezier with two control points drawn uniformly; it falls instead of rising, and inverts the
    contrast, with probability ``prob_invert``.

    Args:
        unit: (B, C, [D,] H, W) float32 in [0, 1].
        random: keyed by the B images.
        prob_invert: probability of a falling curve, of all images or (B, 1) of each.
    """
    controls = random.uniform(2, 2)  # (B, point, x or y)
    t = torch.linspace(0, 1, _CURVE_POINTS, device=unit.device)
    weights = torch.stack([3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2])  # of the control points
    x, y = (controls.mT[:, :, :, None] * weights).sum(2).unbind(1)  # (B, T) each; the end point adds t³
    x, y = (x + t**3).contiguous(), y + t**3
    y = torch.where(random.uniform(1) < prob_invert, y.flip(1), y)
    flat = unit.flatten(1)
    right = torch.searchsorted(x, flat.contiguous()).clamp(1, _CURVE_POINTS - 1)
    x0, x1, y0, y1 = (table.gather(1, place) for table in (x, y) for place in (right - 1, right))
    share = ((flat - x0) / (x1 - x0).clamp_min(1e-9)).clamp(0, 1)
    return torch.lerp(y0, y1, share).view_as(unit)


def paint(unit: Tensor, random: KeyedRandom, prob_out: float = 0.8, max_boxes: int = 5) -> Tensor:
    """Return the images with boxes of noise inside (in-painting) or noise around boxes (out-painting).

    One to ``max_boxes`` boxes per image; edges of a sixth to a third of the image's for in-painting, of 3/7 to 4/7 for
    out-painting.

    Args:
        unit: (B, C, [D,] H, W) float32 in [0, 1].
        random: keyed by the B images.
        prob_out: share of images that are painted around their boxes.
        max_boxes: another box follows the last with probability 0.95, up to so many.
    """
    outside = random.uniform(1, 1) < prob_out  # (B, 1, 1)
    size = constant(tuple(unit.shape[2:]), unit.device)
    draw = random.uniform(max_boxes, len(size))
    edge = torch.where(outside, 3 / 7 + draw / 7, 1 / 6 + draw / 6) * size  # (B, boxes, d)
    edge = edge.round().clamp_min(1)
    start = (random.uniform(max_boxes, len(size)) * (size - edge + 1)).floor()
    follows = torch.cat([torch.ones_like(outside[:, :, 0]), (random.uniform(max_boxes - 1) < _NEXT_BOX).float()], 1)
    used = follows.cumprod(1) > 0  # (B, boxes)
    covered = per_sample(used, unit)
    for axis, length in enumerate(unit.shape[2:]):
        index = torch.arange(length, device=unit.device)
        inside = (index >= start[..., axis, None]) & (index < (start + edge)[..., axis, None])  # (B, boxes, n)
        view = [*inside.shape[:2], *(-1 if a == axis else 1 for a in range(len(size)))]
        covered = covered & inside.view(view)
    boxes = covered.any(1)[:, None]  # (B, 1, [D,] H, W)
    noise = random.uniform(*unit.shape[1:])
    return torch.where(boxes != per_sample(outside, unit), noise, unit)


class Corruption:
    """Models Genesis' corruption of views: shuffling, then a curve of intensities, then painting.

    Args:
        prob_shuffle: share of views whose voxels are shuffled in windows.
        prob_curve: share of views whose intensities go through a Bezier curve; half of the curves invert the contrast.
        invert_ct: also on CT, whose Hounsfield units mean something; else every curve rises there.
        prob_paint: share of views that are painted.
        prob_out: share of these that are painted around boxes and not inside.
        max_boxes: most boxes that are painted.

    Raises:
        ValueError: if a share is no number from 0 to 1, or there is no box.
    """

    def __init__(
        self,
        prob_shuffle: float = 0.5,
        prob_curve: float = 0.9,
        invert_ct: bool = False,
        prob_paint: float = 0.9,
        prob_out: float = 0.8,
        max_boxes: int = 5,
    ) -> None:
        shares = {"shuffle": prob_shuffle, "curve": prob_curve, "paint": prob_paint, "out": prob_out}
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise ValueError(f"prob_{name} is {share}; a share lies from 0 to 1")
        if max_boxes < 1:
            raise ValueError(f"max_boxes is {max_boxes}; give at least 1")
        self.prob_shuffle = prob_shuffle
        self.prob_curve = prob_curve
        self.invert_ct = invert_ct
        self.prob_paint = prob_paint
        self.prob_out = prob_out
        self.max_boxes = max_boxes

    def __call__(self, views: Tensor, is_ct: Tensor, seed: int, sample: Tensor) -> Tensor:
        """Return the corrupted views.

        Args:
            views: (B, V, C, [D,] H, W) float32 in the model's range: CT [0, 1], MRI [-1, 1].
            is_ct: (B,) bool.
            seed: of the run.
            sample: (B,) int64.
        """
        count = views.shape[1]
        keys = {name: KeyedRandom(seed, sample, name).split(count) for name in ("corrupt", "shuffle", "curve", "paint")}
        random = KeyedRandom.from_keys(keys.pop("corrupt"))
        ct = is_ct.repeat_interleave(count)
        flat = rearrange(views, "b v ... -> (b v) ...")
        span, floor = (per_sample(torch.where(ct, a, b), flat) for a, b in ((1.0, 2.0), (0.0, -1.0)))
        unit = (flat - floor) / span
        for name, prob, change in (
            ("shuffle", self.prob_shuffle, self._shuffle),
            ("curve", self.prob_curve, self._curve),
            ("paint", self.prob_paint, self._paint),
        ):
            unit = apply_where(random.uniform(1)[:, 0] < prob, change, unit, keys[name], ct)
        return rearrange(unit * span + floor, "(b v) ... -> b v ...", v=count)

    def _shuffle(self, unit: Tensor, keys: Tensor, is_ct: Tensor) -> Tensor:
        return shuffle_windows(unit, KeyedRandom.from_keys(keys))

    def _curve(self, unit: Tensor, keys: Tensor, is_ct: Tensor) -> Tensor:
        prob_invert = torch.where(is_ct & (not self.invert_ct), 0.0, 0.5)[:, None]
        return bezier_intensity(unit, KeyedRandom.from_keys(keys), prob_invert)

    def _paint(self, unit: Tensor, keys: Tensor, is_ct: Tensor) -> Tensor:
        return paint(unit, KeyedRandom.from_keys(keys), self.prob_out, self.max_boxes)
