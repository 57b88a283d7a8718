"""MoCo v3: each view of a sample finds the other among the views of other samples."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from agssd.losses.distillation import refuse_temperatures
from agssd.losses.info_nce import info_nce
from agssd.methods.base import PretrainModule
from agssd.models.backbone import Backbone
from agssd.models.heads import ProjectionHead
from agssd.transforms.crops import OverlapCrops
from agssd.transforms.intensity import Appearance
from agssd.transforms.views import Views, make_views, panel_of
from agssd.types import LossTerms, Observations, ParentBatch, ViewPanel


class MoCoV3(PretrainModule):
    """Momentum contrast: the student's prediction from one view finds the teacher's projection of the other.

    Source: Chen, Xie and He, ICCV 2021, arXiv 2104.02057 [paper]: symmetric InfoNCE without a queue, projector and
    predictor, frozen random patch embedding, momentum teacher.
    Deviates: layer norm and GELU in place of batch norm and ReLU in the heads, and no norm after their last layer
    (ours, see :class:`agssd.models.heads.ProjectionHead`); the teacher moves once per optimiser step, not in the
    forward pass; the teacher holds a copy of the predictor too, which is not read; views overlap by construction;
    our encoder and schedules.

    Negatives are the other samples of a micro-batch of all ranks, so accumulation changes the result.

    Args:
        backbone: the student's encoder; the teacher is its copy.
        views: sampler of the views; local ones are not used.
        head_hidden: width of the hidden layers of projector and predictor.
        head_dim: width of the projection.
        temperature: of the contrast.
        freeze_patch_embedding: leave the random projection of patches untrained.
        appearance: settings of :class:`agssd.transforms.intensity.Appearance` that differ from its defaults.
        lr: peak learning rate, for example ``1.5e-4 * global batch / 256``.
        min_lr: last learning rate.
        warmup: share of the run.
        weight_decay: first and last.
        betas: of AdamW.
        seed: of views and appearance.
        compile: compile the encoders block by block with ``torch.compile``.
    """

    def __init__(
        self,
        backbone: Backbone,
        views: OverlapCrops,
        head_hidden: int = 4096,
        head_dim: int = 256,
        temperature: float = 0.2,
        freeze_patch_embedding: bool = True,
        appearance: dict[str, float] | None = None,
        lr: float = 1.5e-4,
        min_lr: float = 1e-6,
        warmup: float = 0.13,
        weight_decay: tuple[float, float] = (0.1, 0.1),
        betas: tuple[float, float] = (0.9, 0.999),
        seed: int = 0,
        compile: bool = False,
    ) -> None:
        super().__init__(lr, min_lr, warmup, weight_decay, betas, 0.0, seed, compile)
        self.save_hyperparameters(ignore=["backbone", "views"])
        refuse_temperatures(temperature=temperature)
        self.views = views
        self.appearance = Appearance.of(appearance)
        self.temperature = temperature
        backbone.token_grid(views.size_vox)
        backbone.freeze_mask_token()
        if freeze_patch_embedding:
            backbone.freeze_patch_embedding()
        projector = ProjectionHead(backbone.embed_dim, head_hidden, head_dim, layers=3)
        predictor = ProjectionHead(head_dim, head_hidden, head_dim, layers=2)
        self.student = nn.ModuleDict({"backbone": backbone, "projector": projector, "predictor": predictor})
        self.build_teacher()
        self._step: tuple[Views, Tensor] | None = None

    @property
    def couples_samples(self) -> tuple[str, ...]:
        """The negatives."""
        return ("negatives",)

    def make_views(self, batch: ParentBatch) -> Views:
        """Cut two global views from every parent."""
        return make_views(batch, self.views, self.appearance, self.seed, with_locals=False)

    def pretrain_loss(self, views: Views) -> LossTerms:
        """Return InfoNCE from the first view to the second and back."""
        self._step = None  # frees the last step before this one needs the memory
        with torch.no_grad():
            seen = cast(Backbone, self.teacher["backbone"]).forward_crops(views.inputs)
            keys: Tensor = self.teacher["projector"](seen.cls)  # (B, 2, head_dim)
        noise = self.drop_noise(views.sample, 2)
        student = cast(Backbone, self.student["backbone"]).forward_crops(views.inputs, drop_noise=noise)
        queries: Tensor = self.student["predictor"](self.student["projector"](student.cls))
        loss = info_nce(queries[:, 0], keys[:, 1], self.temperature)
        loss = loss + info_nce(queries[:, 1], keys[:, 0], self.temperature)
        self._step = (views, seen.cls)
        return LossTerms(loss, {"contrast": loss}, student.shared)

    # ------------------------------------------------------------ monitors

    @property
    def observations(self) -> Observations | None:
        """Outputs of the last micro-batch for monitors."""
        if self._step is None:
            return None
        views, features = self._step
        figures = {"overlap": views.geometry.overlap.mean()} | self.gradient_norms
        return {"cls_features": features.flatten(0, 1).float(), "scalars": figures}

    @torch.no_grad()
    def view_panel(self, index: int) -> ViewPanel:
        """Return the views of sample ``index`` of the last micro-batch."""
        return panel_of(None if self._step is None else self._step[0], index)
