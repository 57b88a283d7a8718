"""PGL: the same regions of two views agree, point by point."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from agssd.geometry import overlap_grid, sample_tokens
from agssd.losses.distillation import masked_mean
from agssd.losses.similarity import cosine_distance
from agssd.methods.base import PretrainModule
from agssd.models.backbone import Backbone
from agssd.models.heads import ProjectionHead
from agssd.transforms.crops import OverlapCrops
from agssd.transforms.edges import MIN_FOREGROUND, foreground_share
from agssd.transforms.intensity import Appearance
from agssd.transforms.views import Views, make_views, panel_of
from agssd.types import LossTerms, Observations, ParentBatch, ViewPanel


class PGL(PretrainModule):
    """Regional consistency: where two views overlap, the student's local features predict the teacher's.

    The overlap is known from the views' affines. A regular grid of its points is read from the token maps of both
    views, so flips, scales and crops are undone before features are compared.

    Source: Xie et al., arXiv 2011.12640 [paper]: BYOL with a prior-guided local consistency in place of the global one;
    the grid of points [R: CVA] (docs/method.md §1.2, region grid).
    Deviates: tokens are read before projector and predictor, which act on points (ours: reading is linear in
    tokens); points in air, or outside a rotated view, are left out (ours); the heads standardise over the points of
    a view and not over the batch (ours, see :class:`agssd.models.heads.PointNorm`; with layer norm features fall to
    a constant); the paper's scaling of the loss is not known, ours is BYOL's per point; the teacher holds a copy of
    the predictor too, which is not read; our views, encoder and schedules. [CLS] learns only through attention.

    Args:
        backbone: the student's encoder; the teacher is its copy.
        views: sampler of the views; local ones are not used.
        points_per_axis: r; the overlap is read at r x r x r points.
        head_hidden: width of the hidden layer of projector and predictor.
        head_dim: width of the projection.
        appearance: settings of :class:`agssd.transforms.intensity.Appearance` that differ from its defaults.
        lr: peak learning rate.
        min_lr: last learning rate.
        warmup: share of the run.
        weight_decay: first and last.
        betas: of AdamW.
        seed: of views and appearance.
        compile: compile the encoders block by block with ``torch.compile``.

    Raises:
        ValueError: if ``points_per_axis`` is below 1.
    """

    def __init__(
        self,
        backbone: Backbone,
        views: OverlapCrops,
        points_per_axis: int = 4,
        head_hidden: int = 4096,
        head_dim: int = 256,
        appearance: dict[str, float] | None = None,
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
        if points_per_axis < 1:
            raise ValueError(f"points_per_axis is {points_per_axis}; give at least 1, 4 say")
        self.views = views
        self.appearance = Appearance.of(appearance)
        self.points_per_axis = points_per_axis
        self.patch = backbone.patch_size
        self.grid = backbone.token_grid(views.size_vox)
        backbone.freeze_mask_token()
        projector = ProjectionHead(backbone.embed_dim, head_hidden, head_dim, layers=2, over_points=True)
        predictor = ProjectionHead(head_dim, head_hidden, head_dim, layers=2, over_points=True)
        self.student = nn.ModuleDict({"backbone": backbone, "projector": projector, "predictor": predictor})
        self.build_teacher()
        self._step: tuple[Views, Tensor, Tensor, Tensor] | None = None

    def make_views(self, batch: ParentBatch) -> Views:
        """Cut two global views from every parent."""
        return make_views(batch, self.views, self.appearance, self.seed, with_locals=False)

    def pretrain_loss(self, views: Views) -> LossTerms:
        """Return the cosine distance at the points of the overlap that hold body, from each view to the other."""
        self._step = None  # frees the last step before this one needs the memory
        points = self._points(views)
        with torch.no_grad():
            seen = cast(Backbone, self.teacher["backbone"]).forward_crops(views.inputs)
            local = self._at(points, seen.tokens)  # (B, 2, r³, E)
            targets: Tensor = self.teacher["projector"](local)
            share = foreground_share(views.foreground.flatten(0, 1), self.patch).unflatten(0, (-1, 2))
            counts = (self._at(points, share[..., None])[..., 0] >= MIN_FOREGROUND).all(1)  # (B, r³): body in both
            counts &= (points.abs().amax(-1) <= 1).all(1)  # a view that is rotated has lost corners of the overlap
        noise = self.drop_noise(views.sample, 2)
        student = cast(Backbone, self.student["backbone"]).forward_crops(views.inputs, drop_noise=noise)
        projected: Tensor = self.student["projector"](self._at(points, student.tokens))
        distance = cosine_distance(self.student["predictor"](projected), targets.flip(1))  # (B, 2, r³)
        loss = masked_mean(distance.mean(1), counts)
        self._step = (views, seen.tokens.mean(2), local, counts)
        return LossTerms(loss, {"local": loss}, (student.tokens,))

    def _points(self, views: Views) -> Tensor:
        """Return (B, 2, r^d, d) float32: coordinates ``u`` of the same points in both views."""
        affine = views.geometry.globals.affine
        box = views.geometry.overlap_box - 0.5  # edges to coordinates in which voxel i has its centre at i
        with torch.autocast(box.device.type, enabled=False):
            return torch.stack(overlap_grid(affine[:, 0], affine[:, 1], box, self.points_per_axis), 1)

    def _at(self, points: Tensor, tokens: Tensor) -> Tensor:
        """Return (B, 2, r³, E): token maps (B, 2, N, E) of both views, read at ``points``."""
        with torch.autocast(points.device.type, enabled=False):
            read: Tensor = sample_tokens(tokens.flatten(0, 1).float(), self.grid, points.flatten(0, 1))
            both: Tensor = read.unflatten(0, (-1, 2))
        return both

    # ------------------------------------------------------------ monitors

    @property
    def observations(self) -> Observations | None:
        """Mean and local tokens of the last micro-batch, and how much closer corresponding points are than others."""
        if self._step is None:
            return None
        views, tokens, local, counts = self._step
        same = torch.cosine_similarity(local[:, 0], local[:, 1], dim=-1)
        other = torch.cosine_similarity(local[:, 0], local[:, 1].roll(1, 1), dim=-1)
        figures = {"overlap": views.geometry.overlap.mean(), "body_points": counts.float().mean()}
        figures |= {"correspondence_margin": masked_mean(same - other, counts)}
        return {
            "cls_features": tokens.flatten(0, 1).float(),
            "patch_features": local[:, 0][counts].float(),
            "scalars": figures | self.gradient_norms,
        }

    @torch.no_grad()
    def view_panel(self, index: int) -> ViewPanel:
        """Return the views of sample ``index`` of the last micro-batch."""
        return panel_of(None if self._step is None else self._step[0], index)
