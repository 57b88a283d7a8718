"""From parent crops to the views of a step, on the device: what every recipe starts from."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from einops import rearrange
from torch import Tensor

from agssd.geometry import constant, per_sample
from agssd.transforms.crops import OverlapCrops, ViewSet, box_in_view, extract, extract_numbers, extract_with_body
from agssd.transforms.edges import (
    MIN_FOREGROUND,
    edge_magnitude,
    foreground_share,
    normalise_edges,
    region_boundaries,
    suppress_border,
)
from agssd.transforms.intensity import Appearance, from_model_range, to_model_range
from agssd.transforms.keyed_random import KeyedRandom
from agssd.transforms.masking import MAP_SCORES, MaskSampler
from agssd.types import ParentBatch, Size, ViewPanel

NO_REGIONS = (
    "batches have no region maps to learn from; write a cache that has: agssd regions CACHE --source supervoxels --out "
    "CACHE2, and train with --data.cache CACHE2 --data.regions true"
)


@dataclass(frozen=True)
class Views:
    """The views of one micro-batch: two overlapping global views per sample, and its local views.

    ``hidden_view`` is drawn per sample for recipes that mask one of the two global views and show the other.
    """

    sample: Tensor  # (B,) int64
    geometry: ViewSet
    clean: Tensor  # (B, 2, C, [D,] H, W) float32 in the model's range
    inputs: Tensor  # (B, 2, C, [D,] H, W) the same after appearance augmentation, of both or of the hidden view alone
    locals: Tensor | None  # (B, L, C, [d,] h, w)
    foreground: Tensor  # (B, 2, 1, [D,] H, W) bool
    hidden_view: Tensor  # (B,) int64, 0 or 1
    # (R, 1, [D,] H, W) in [0, 1], of the R views that are masked: the hidden ones, or both of each sample side by side.
    # None where nobody asked for it.
    edges: Tensor | None
    is_ct: Tensor  # (B,) bool
    low: Tensor  # (B, C)
    high: Tensor  # (B, C)
    edge_q99: Tensor  # (B, C)
    spacing_mm: Tensor  # (B, 2, d) of the global views, along their own axes
    centre_mm: Tensor  # (B, 2, d) centre of the global views minus centre of the volume, along the volume's axes
    # (B, 2, 1, [D,] H, W) int32, of the nearest voxel; 0 = none, and a number is the same region in both views. None
    # unless the batch has regions.
    regions: Tensor | None = None

    @property
    def size_vox(self) -> Size:
        """Size of a global view."""
        return tuple(self.clean.shape[3:])

    def known_regions(self) -> Tensor:
        """Return ``regions``.

        Raises:
            ValueError: if there are none.
        """
        if self.regions is None:
            raise ValueError(NO_REGIONS)
        return self.regions


def parent_image(batch: ParentBatch) -> Tensor:
    """Return the parent crops (B, C, [D,] H, W) float32 in the model's range."""
    stored = batch["image"].float()
    raw = torch.addcmul(per_sample(batch["offset"], stored), stored, per_sample(batch["scale"], stored))
    return to_model_range(raw, batch["low"], batch["high"], batch["is_ct"])


def make_views(
    batch: ParentBatch,
    crops: OverlapCrops,
    appearance: Appearance | None,
    seed: int,
    with_locals: bool = True,
    with_edges: bool = False,
    hidden_only: bool = False,
) -> Views:
    """Cut the views from every parent crop; a function of (seed, sample) and the parent crop.

    The global views are the same for every recipe of one seed, whatever else is asked for.

    Args:
        batch: parent crops as stored; with ``regions`` the views have them too.
        crops: where the views lie.
        appearance: augmentation of intensities, drawn per view; None leaves ``inputs`` equal to ``clean``.
        seed: of the run.
        with_locals: False leaves the local views out.
        with_edges: find the edges of the hidden view.
        hidden_only: change the appearance of the hidden view alone, where nobody looks at that of the other.

    Raises:
        ValueError: if centres are balanced over regions and the batch has none.
    """
    if crops.centres == "regions" and "regions" not in batch:
        raise ValueError(f"views.centres is regions, but {NO_REGIONS}")
    sample, is_ct = batch["sample"], batch["is_ct"]
    low, high = batch["low"], batch["high"]
    parent = parent_image(batch)
    geometry = crops.sample(batch["foreground"], sample, seed, batch.get("regions"))

    clean, foreground = extract_with_body(parent, batch["foreground"], geometry.globals, crops.size_vox)
    hidden_view = (KeyedRandom(seed, sample, "hidden view").uniform(1)[:, 0] < 0.5).long()
    random = KeyedRandom(seed, sample, "appearance of global views")
    inputs = _appear(appearance, clean, is_ct, random, hidden_view if hidden_only else None)
    local_views = None
    if with_locals and geometry.locals is not None:
        local_views = extract(parent, geometry.locals, crops.local_size_vox)
        random = KeyedRandom(seed, sample, "appearance of local views")
        local_views = _appear(appearance, local_views, is_ct, random)

    from_middle = geometry.globals.centre - constant(tuple(parent.shape[2:]), parent.device) / 2  # voxels
    views = Views(
        sample=sample,
        geometry=geometry,
        clean=clean,
        inputs=inputs,
        locals=local_views,
        foreground=foreground,
        hidden_view=hidden_view,
        edges=None,
        is_ct=is_ct,
        low=low,
        high=high,
        edge_q99=batch["edge_q99"],
        spacing_mm=geometry.globals.spacing_mm(batch["spacing_mm"], crops.size_vox),
        centre_mm=batch["centre_mm"][:, None] + from_middle * batch["spacing_mm"][:, None],
        regions=extract_numbers(batch["regions"], geometry.globals, crops.size_vox) if "regions" in batch else None,
    )
    return replace(views, edges=edge_maps(views, views.hidden_view)) if with_edges else views


def _appear(
    appearance: Appearance | None, views: Tensor, is_ct: Tensor, random: KeyedRandom, only: Tensor | None = None
) -> Tensor:
    """Return views (B, V, C, [D,] H, W) with a new appearance, of each or of view ``only`` (B,) alone."""
    if appearance is None:
        return views
    samples, count = views.shape[:2]
    flat = rearrange(views, "b v ... -> (b v) ...")
    if only is None:
        flat = appearance(flat, is_ct.repeat_interleave(count), random, count)
    else:
        rows = torch.arange(samples, device=only.device) * count + only
        flat = flat.index_copy(0, rows, appearance(flat[rows], is_ct, random, count, rows))
    return rearrange(flat, "(b v) ... -> b v ...", v=count)


def pick(x: Tensor, view: Tensor) -> Tensor:
    """Return (R, ...): views ``view`` (R,) of (B, V, ...), one of each sample or several side by side."""
    return x[_samples_of(view, x), view]


def put(x: Tensor, view: Tensor, values: Tensor) -> Tensor:
    """Return (B, V, ...) with ``values`` (R, ...) in the place of views ``view`` (R,); what :func:`pick` takes out."""
    return x.index_put((_samples_of(view, x), view), values)


def both_views(views: Views) -> Tensor:
    """Return (2B,) int64: the two global views of each sample, side by side."""
    return torch.arange(2, device=views.sample.device).repeat(len(views.sample))


def _samples_of(view: Tensor, x: Tensor) -> Tensor:
    """Return (R,) int64: the sample in (B, ...) that each of the views (R,) is of."""
    return torch.arange(len(x), device=x.device).repeat_interleave(len(view) // len(x))


def edge_maps(views: Views, which: Tensor) -> Tensor:
    """Return the edge map (R, 1, [D,] H, W) in [0, 1] of global views ``which`` (R,), from their clean intensities."""
    rows = _samples_of(which, views.clean)
    clean, is_ct = pick(views.clean, which), views.is_ct[rows]
    real = from_model_range(clean, views.low[rows], views.high[rows], is_ct)
    magnitude = edge_magnitude(real, pick(views.spacing_mm, which), is_ct)
    magnitude = suppress_border(magnitude, pick(views.foreground, which))
    edges = normalise_edges(magnitude, views.edge_q99[rows])
    return edges if edges.shape[1] == 1 else edges.amax(1, keepdim=True)


def boundary_maps(views: Views, which: Tensor) -> Tensor:
    """Return the boundaries between regions (R, 1, [D,] H, W) in [0, 1] of global views ``which`` (R,).

    At the outline of the body they are as weak as edges are there: 0 outside, a quarter within 2 voxels.

    Raises:
        ValueError: if the views have no regions.
    """
    strength = region_boundaries(pick(views.known_regions(), which), pick(views.spacing_mm, which))
    return suppress_border(strength, pick(views.foreground, which))


def body_of(foreground: Tensor, patch: Size) -> Tensor:
    """Return (B, N) bool: the patches of (B, 1, [D,] H, W) that hold body; all others are left out of patch losses."""
    return foreground_share(foreground, patch) >= MIN_FOREGROUND


@torch.no_grad()
def mask_views(
    views: Views,
    which: Tensor,
    body: Tensor,
    masks: MaskSampler,
    ratio: tuple[float, float],
    seed: int,
    progress: float,
    given: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mask one global view of each sample, or each of the two by a draw of its own.

    Args:
        views: of the step.
        which: (R,) int64, ``views.hidden_view`` or :func:`both_views`.
        body: (R, N) bool.
        masks: how.
        ratio: range of the share of hidden tokens, one draw per view.
        seed: of the run.
        progress: share of the run that is done.
        given: (R, N) float32 z-scores, where the score is the teacher's.

    Returns:
        mask (R, *grid) bool, True = hidden, and the nominal ratio (R,).
    """
    random = KeyedRandom(seed, views.sample, "mask")
    if len(which) > len(views.sample):
        random = KeyedRandom.from_keys(random.split(2))
    share = random.between(*ratio, 1)[:, 0]
    edges = views.edges if masks.score == "edge" else None
    with torch.autocast(views.clean.device.type, enabled=False):
        if masks.score in MAP_SCORES and (edges is None or len(edges) < len(which)):
            edges = (edge_maps if masks.score == "edge" else boundary_maps)(views, which)
        return masks.draw(random, share, progress, body, pick(views.clean, which), edges, given), share


def in_their_views(mask: Tensor, which: Tensor, samples: int) -> Tensor:
    """Return (B, 2, *grid) bool: masks (R, *grid) in their views (R,), nothing hidden in the others."""
    if len(which) > samples:
        both: Tensor = mask.unflatten(0, (samples, 2))
        return both
    chosen = torch.arange(2, device=which.device) == which[:, None]
    return mask[:, None] & per_sample(chosen, mask[:, None])


def panel_of(
    views: Views | None,
    index: int,
    mask: Tensor | None = None,
    reconstruction: Tensor | None = None,
    boundaries: bool = False,
) -> ViewPanel:
    """Return what can be drawn of one sample's views.

    Args:
        views: of the last step, if there was one.
        index: sample.
        mask: (B, 2, *grid) bool, True = hidden, of the global views of all samples.
        reconstruction: (2, [D,] H, W) float32 of this sample.
        boundaries: draw boundaries of regions in the place of edges.

    Raises:
        IndexError: if the batch has no such sample, or no step was taken.
    """
    if views is None or not 0 <= index < len(views.sample):
        raise IndexError(f"sample {index} is not in the last batch")
    fields = ("clean", "foreground", "is_ct", "low", "high", "edge_q99", "spacing_mm")
    one = replace(views, **{name: getattr(views, name)[index : index + 1] for name in fields})
    if boundaries:
        one = replace(one, regions=views.known_regions()[index : index + 1])
    map_of = boundary_maps if boundaries else edge_maps
    maps = [map_of(one, torch.full_like(views.hidden_view[:1], v))[0, 0] for v in (0, 1)]
    geometry = views.geometry
    boxes = [box_in_view(geometry.globals, v, geometry.overlap_box, views.size_vox)[index] for v in (0, 1)]
    panel: ViewPanel = {
        "globals": views.inputs[index, :, 0],
        "clean": views.clean[index, :, 0],
        "overlap_box": torch.stack(boxes),
    }
    panel["boundaries" if boundaries else "edges"] = torch.stack(maps)
    if views.locals is not None:
        panel["locals"] = views.locals[index, :, 0]
    if mask is not None:
        panel["mask"] = mask[index]
    if reconstruction is not None:
        panel["reconstruction"] = reconstruction
    return panel
