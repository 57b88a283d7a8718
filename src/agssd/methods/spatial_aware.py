"""Spatial-aware pretraining: how far crops of one volume lie apart, which of their parts face, and where they are."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agssd.geometry import constant, sample_tokens, token_centres
from agssd.methods.base import PretrainModule
from agssd.models.backbone import Backbone
from agssd.models.dense_decoder import CONVOLUTIONS
from agssd.models.heads import ProjectionHead
from agssd.transforms.crops import OverlapCrops, box_share, box_views, extract
from agssd.transforms.keyed_random import KeyedRandom
from agssd.transforms.views import parent_image
from agssd.types import Features, LossTerms, Observations, ParentBatch, Size, ViewPanel

_TRIES = 10
_POINTS_PER_AXIS = 4  # at which a part of a crop is read


@dataclass(frozen=True)
class SpatialViews:
    """Crops of one micro-batch, in the parent's orientation, and where they lie."""

    sample: Tensor  # (B,) int64
    crops: Tensor  # (B, V, C, [D,] H, W) float32 in the model's range
    parent: Tensor  # (B, 1, C, [D,] H, W) the whole parent, for pictures
    centre_mm: Tensor  # (B, V, d) centre of each crop minus centre of the volume
    parent_mm: Tensor  # (B, 3) centre of the parent minus centre of the volume
    edge_mm: Tensor  # (B, 3) edge lengths of the crops
    unit_mm: Tensor  # (B, 3) edge lengths of the parent, in which positions are regressed


class GapHead(nn.Module):
    """Predict the vector between two crops: strided convolutions, mean, and a linear map of the difference, no bias.

    Exchanging the crops changes the sign and nothing else; a crop and itself lie 0 apart.

    Args:
        embed_dim: E; at least 8.
        dims: axes of space.
    """

    def __init__(self, embed_dim: int, dims: int = 3) -> None:
        super().__init__()
        widths = [embed_dim, embed_dim // 2, embed_dim // 4, embed_dim // 8]
        self.convolutions = nn.ModuleList(
            CONVOLUTIONS[dims](a, b, 3, stride=2, padding=1) for a, b in itertools.pairwise(widths)
        )
        # torch's default starts with gaps 18 times as small, and learns them last
        for convolution in self.convolutions:
            nn.init.kaiming_normal_(cast(Tensor, convolution.weight), nonlinearity="relu")
            nn.init.zeros_(cast(Tensor, convolution.bias))
        self.linear = nn.Linear(widths[-1], dims, bias=False)

    def embed(self, features: Features) -> Tensor:
        """Return (B, E / 8) float32 from tokens (B, N, E)."""
        with torch.autocast(features.tokens.device.type, enabled=False):
            x = features.tokens.float().mT.reshape(features.tokens.shape[0], -1, *features.grid)
            for convolution in self.convolutions:
                x = F.gelu(convolution(x))
            return x.mean(tuple(range(2, x.ndim)))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Return (..., d) float32: centre of the second crop minus that of the first, from their embeddings."""
        with torch.autocast(first.device.type, enabled=False):
            gap: Tensor = self.linear(second - first)
        return gap


class SpatialAware(PretrainModule):
    """Multi-granularity spatial tasks: gap vectors, adjacent against distant parts, and locations of random crops.

    The student sees the first crop, the teacher the others. Three terms:

    - ``gap``: the vector to each other crop and its length, squared errors, in units of the parent's edges;
    - ``similarity``: the parts of two crops that face each other are alike, the parts that turn away are not;
    - ``location``: differences of predicted locations against the gaps, and the first crop's own location (Smooth-L1).

    Source: arXiv 2509.05967 [paper: abstract]; heads and losses [R: the first author's earlier code].
    Deviates: whether the published method equals that code is not known to us. The gap's linear map has no bias, so
    it is antisymmetric; the sum of gaps along a route telescopes to its ends and is logged, not trained; the
    location of the first crop is regressed too, which fixes the origin; token grids stand in for dense maps, and a
    part is the mean of tokens read at its points, through linear layers where theirs has four convolutions; labels
    are in mm over the parent's edges, where theirs are voxels over a constant; the gap's convolutions start with He's
    variance; the teacher's momentum is the callback's, theirs 0.9999 (all ours, docs/method.md). Crops are neither
    flipped nor changed in intensity. [CLS] learns only through attention.

    Args:
        backbone: the student's encoder; the teacher is its copy.
        views: gives the size in voxels to which crops are resampled, and ``min_foreground``; nothing else is used.
        num_crops: crops per sample, the student's one included.
        crop_scale: edge of a crop as a share of the views' size, in parent voxels.
        head_hidden: width of the hidden layer of the similarity and the location head.
        head_dim: width of the similarity's projection.
        weight_gap: weight of the gap term.
        weight_similarity: weight of the similarity term.
        weight_location: weight of the location term.
        lr: peak learning rate.
        min_lr: last learning rate.
        warmup: share of the run.
        weight_decay: first and last.
        betas: of AdamW.
        seed: of the crops.
        compile: compile the encoders block by block with ``torch.compile``.

    Raises:
        ValueError: if ``num_crops`` is below 2, or ``crop_scale`` not above 0.
    """

    def __init__(
        self,
        backbone: Backbone,
        views: OverlapCrops,
        num_crops: int = 3,
        crop_scale: float = 0.75,
        head_hidden: int = 512,
        head_dim: int = 128,
        weight_gap: float = 1.0,
        weight_similarity: float = 1.0,
        weight_location: float = 1.0,
        lr: float = 3e-4,
        min_lr: float = 1e-6,
        warmup: float = 0.05,
        weight_decay: tuple[float, float] = (0.05, 0.05),
        betas: tuple[float, float] = (0.9, 0.999),
        seed: int = 0,
        compile: bool = False,
    ) -> None:
        super().__init__(lr, min_lr, warmup, weight_decay, betas, 0.0, seed, compile)
        self.save_hyperparameters(ignore=["backbone", "views"])
        if num_crops < 2:
            raise ValueError(f"num_crops is {num_crops}; a gap needs at least 2 crops")
        if crop_scale <= 0:
            raise ValueError(f"crop_scale is {crop_scale}; give a number above 0, 0.75 say")
        self.size_vox = views.size_vox
        self.min_foreground = views.min_foreground
        self.num_crops = num_crops
        self.crop_scale = crop_scale
        self.weights = {"gap": weight_gap, "similarity": weight_similarity, "location": weight_location}
        self.grid = backbone.token_grid(views.size_vox)
        backbone.freeze_mask_token()
        heads = {
            "gap": GapHead(backbone.embed_dim, backbone.spatial_dims),
            "similarity": ProjectionHead(backbone.embed_dim, head_hidden, head_dim, layers=2),
            "location": ProjectionHead(backbone.embed_dim, head_hidden, backbone.spatial_dims, layers=2),
        }
        self.student = nn.ModuleDict({"backbone": backbone, **heads})
        self.build_teacher()
        self._step: tuple[SpatialViews, Tensor, Tensor, Tensor, Tensor] | None = None

    def make_views(self, batch: ParentBatch) -> SpatialViews:
        """Cut crops at random places of every parent, all of one size."""
        parent, foreground = parent_image(batch), batch["foreground"]
        shape = constant(tuple(parent.shape[2:]), parent.device)
        edge = torch.minimum(self.crop_scale * constant(self.size_vox, parent.device), shape)
        place = KeyedRandom(self.seed, batch["sample"], "spatial crops").uniform(_TRIES, self.num_crops, len(edge))
        tries = place * (shape - edge)  # (B, T, V, 3)
        body = box_share(foreground, tries.flatten(1, 2), tries.flatten(1, 2) + edge).unflatten(1, tries.shape[1:3])
        least = body.amin(2)  # (B, T): the emptiest crop of a try
        order = torch.arange(_TRIES, 0, -1, device=parent.device)
        best = torch.where(least >= self.min_foreground, 2.0 + order, least).argmax(1)  # first accepted, else fullest
        low = tries[torch.arange(len(best), device=best.device), best]  # (B, V, d)
        spacing = batch["spacing_mm"]
        whole = extract(parent, box_views(torch.zeros_like(low[:, :1]), shape), self.size_vox)
        return SpatialViews(
            sample=batch["sample"],
            crops=extract(parent, box_views(low, edge), self.size_vox),
            parent=whole,
            centre_mm=batch["centre_mm"][:, None] + (low + (edge - shape) / 2) * spacing[:, None],
            parent_mm=batch["centre_mm"],
            edge_mm=edge * spacing,
            unit_mm=shape * spacing,
        )

    def pretrain_loss(self, views: SpatialViews) -> LossTerms:
        """Return the three terms between the first crop and each of the others."""
        self._step = None  # frees the last step before this one needs the memory
        place = views.centre_mm / views.unit_mm[:, None]  # (B, V, d)
        gap = place[:, 1:] - place[:, :1]  # (B, V - 1, d)
        others = self.num_crops - 1
        with torch.no_grad():
            seen = cast(Backbone, self.teacher["backbone"]).forward_views([views.crops[:, 1:].flatten(0, 1)])[0]
        (noise,) = self.drop_noise(views.sample, 1)
        own = cast(Backbone, self.student["backbone"]).forward_views([views.crops[:, 0]], None, [noise])[0]

        with torch.no_grad():
            embedded = cast(GapHead, self.teacher["gap"]).embed(seen).unflatten(0, (-1, others))
            away: Tensor = self.teacher["location"](seen.tokens.float().mean(1)).unflatten(0, (-1, others))
        head = cast(GapHead, self.student["gap"])
        found = head(head.embed(own)[:, None], embedded)  # (B, V - 1, d)
        loss_gap = F.mse_loss(found, gap) + F.mse_loss(_norm(found), _norm(gap))

        here: Tensor = self.student["location"](own.tokens.float().mean(1))[:, None]  # (B, 1, 3)
        loss_location = F.smooth_l1_loss(away - here, gap) + F.smooth_l1_loss(here, place[:, :1])

        near, far = self._similarities(own, seen, gap * (views.unit_mm / views.edge_mm)[:, None])
        loss_similarity = 2 - near.mean() + far.mean()

        located = torch.cat([here, away], 1).detach()
        self._step = (views, found.detach(), located, (near > far).detach(), seen.tokens)
        terms = {"gap": loss_gap, "similarity": loss_similarity, "location": loss_location}
        total = torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()
        return LossTerms(total, terms, (own.tokens,))

    def _similarities(self, own: Features, seen: Features, gap_edges: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cosines (B, V - 1) of parts that face each other and of parts that turn away.

        Args:
            own: of the first crop, by the student.
            seen: of the others, by the teacher.
            gap_edges: (B, V - 1, d) from the first crop to the others, in edges of a crop.
        """
        with torch.autocast(gap_edges.device.type, enabled=False):
            direction = gap_edges / gap_edges.abs().amax(-1, keepdim=True).clamp_min(1e-6)  # to the crop's surface
            others = direction.shape[1]
            tokens = own.tokens.float().repeat_interleave(others, 0)
            towards = direction.flatten(0, 1)

            def part(name: nn.ModuleDict, tokens: Tensor, side: Tensor) -> Tensor:
                projected: Tensor = name["similarity"](_part(tokens, self.grid, side))
                return F.normalize(projected, dim=-1, eps=1e-6)

            with torch.no_grad():
                other_near, other_far = (part(self.teacher, seen.tokens.float(), side) for side in (-towards, towards))
            near = (part(self.student, tokens, towards) * other_near).sum(-1)
            far = (part(self.student, tokens, -towards) * other_far).sum(-1)
        return near.unflatten(0, (-1, others)), far.unflatten(0, (-1, others))

    # ------------------------------------------------------------ monitors

    @property
    def observations(self) -> Observations | None:
        """Features of the last micro-batch; errors of gaps and routes in mm, and how often facing parts are closer."""
        if self._step is None:
            return None
        views, found, located, ranked, tokens = self._step
        true = views.centre_mm[:, 1:] - views.centre_mm[:, :1]
        # A route's gaps add up to the difference of its ends, so a route between each pair of ends says it all.
        ends = list(itertools.permutations(range(self.num_crops), 2))
        first, last = ([pair[k] for pair in ends] for k in (0, 1))
        route = (located[:, last] - located[:, first]) * views.unit_mm[:, None]
        wanted = views.centre_mm[:, last] - views.centre_mm[:, first]
        figures = {
            "gap_mm": true.norm(dim=-1).mean(),
            "gap_error_mm": (found * views.unit_mm[:, None] - true).norm(dim=-1).mean(),
            "route_error_mm": (route - wanted).norm(dim=-1).mean(),
            "ranking_accuracy": ranked.float().mean(),
        }
        return {"cls_features": tokens.mean(1).float(), "scalars": figures | self.gradient_norms}

    @torch.no_grad()
    def view_panel(self, index: int) -> ViewPanel:
        """Return the parent of sample ``index`` of the last micro-batch, with boxes of the second and third crop.

        ``true_box`` is where a crop lies, ``predicted_box`` where the gap from the first crop says it does, and
        ``origin`` the first crop's middle.

        Raises:
            IndexError: if the batch has no such sample, or no step was taken.
        """
        if self._step is None or not 0 <= index < len(self._step[0].sample):
            raise IndexError(f"sample {index} is not in the last batch")
        views, found = self._step[0], self._step[1]
        rows = min(2, self.num_crops - 1)
        start = views.centre_mm[index, 0]
        picture = views.parent[index, :, 0].expand(rows, *[-1] * len(self.grid))

        def box(centre_mm: Tensor) -> Tensor:
            """Return (rows, 3, 2) in voxels of the picture."""
            ends = [centre_mm + side * views.edge_mm[index] / 2 for side in (-1, 1)]
            share = (torch.stack(ends, -1) - views.parent_mm[index, :, None]) / views.unit_mm[index, :, None] + 0.5
            return share * constant(self.size_vox, share.device)[:, None]

        return {
            "clean": picture,
            "true_box": box(views.centre_mm[index, 1 : rows + 1]),
            "predicted_box": box(start + found[index, :rows] * views.unit_mm[index]),
            "origin": box(start[None]).mean(-1).expand(rows, -1),
        }


def _norm(vectors: Tensor) -> Tensor:
    """Return (...,): lengths of (..., 3), with a gradient at 0."""
    return (vectors.square().sum(-1) + 1e-12).sqrt()


def _part(tokens: Tensor, grid: Size, side: Tensor) -> Tensor:
    """Return (B, E): mean of the tokens (B, N, E) in the half-sized box that touches the surface at ``side`` (B, 3)."""
    points = token_centres((_POINTS_PER_AXIS,) * len(grid), side.device)
    return sample_tokens(tokens, grid, side[:, None] / 2 + points / 2).mean(1)
