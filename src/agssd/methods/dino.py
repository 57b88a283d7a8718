"""DINO: the [CLS] of every view against a teacher's [CLS] of the global views."""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor, nn

from agssd.losses.distillation import (
    Centre,
    multi_crop_cross_entropy,
    refuse_temperatures,
)
from agssd.methods.base import PretrainModule
from agssd.models.backbone import Backbone
from agssd.models.heads import PrototypeHead, move_means
from agssd.schedules import linear
from agssd.transforms.crops import OverlapCrops
from agssd.transforms.intensity import Appearance
from agssd.transforms.views import Views, make_views, panel_of
from agssd.types import LossTerms, Observations, ParentBatch, ViewPanel


class DINO(PretrainModule):
    """Self-distillation without labels: views of one sample agree on prototypes; nothing is masked.

    Source: Caron et al., ICCV 2021, arXiv 2104.14294 [paper]: multi-crop, centring and sharpening, momentum teacher.
    Deviates: the prototypes' gain is frozen at 1 (their option ``norm_last_layer``); the head keeps no batch norm (as
    their ViT); views overlap by construction instead of being drawn alone; the centre moves once per optimiser step;
    fewer prototypes, for less data [R: iBOT]; our encoder and schedules.

    Args:
        backbone: the student's encoder; the teacher is its copy.
        views: sampler of the views.
        num_prototypes: K.
        head_hidden: width of the head's hidden layers.
        head_bottleneck: width before the prototypes.
        centre_momentum: of the centre, per optimiser step.
        centre_rule: ``"mean"`` of the teacher's logits [paper], or ``"balance"``, which evens out the prototypes'
            shares over the steps (ours, for few samples per step; see :class:`agssd.losses.distillation.Centre`).
        head_centring: subtract the teacher's running mean before the heads' L2 norm (ours, alike; see
            :class:`agssd.models.heads.PrototypeHead`).
        temperature_student: student's temperature.
        temperature_teacher: teacher's, from first to second over 30 % of the run.
        appearance: settings of :class:`agssd.transforms.intensity.Appearance` that differ from its defaults.
        lr: peak learning rate, for example ``5e-4 * global batch / 256``.
        min_lr: last learning rate.
        warmup: share of the run.
        weight_decay: first and last.
        betas: of AdamW.
        freeze_last_layer: share of the run during which prototypes stay as they are.
        seed: of views and appearance.
        compile: compile the encoders block by block with ``torch.compile``.
    """

    def __init__(
        self,
        backbone: Backbone,
        views: OverlapCrops,
        num_prototypes: int = 8192,
        head_hidden: int = 2048,
        head_bottleneck: int = 256,
        centre_momentum: float = 0.9,
        centre_rule: Literal["mean", "balance"] = "mean",
        head_centring: bool = False,
        temperature_student: float = 0.1,
        temperature_teacher: tuple[float, float] = (0.04, 0.07),
        appearance: dict[str, float] | None = None,
        lr: float = 1.25e-4,
        min_lr: float = 1e-6,
        warmup: float = 0.1,
        weight_decay: tuple[float, float] = (0.04, 0.4),
        betas: tuple[float, float] = (0.9, 0.999),
        freeze_last_layer: float = 0.01,
        seed: int = 0,
        compile: bool = False,
    ) -> None:
        super().__init__(lr, min_lr, warmup, weight_decay, betas, freeze_last_layer, seed, compile)
        self.save_hyperparameters(ignore=["backbone", "views"])
        refuse_temperatures(temperature_student=temperature_student, temperature_teacher=temperature_teacher)
        self.views = views
        self.appearance = Appearance.of(appearance)
        self.temperature_student = temperature_student
        self.temperature_teacher = temperature_teacher
        backbone.token_grid(views.size_vox)
        if views.num_local:
            backbone.token_grid(views.local_size_vox)
        backbone.freeze_mask_token()
        momentum = 0.9 if head_centring else None
        head = PrototypeHead(backbone.embed_dim, num_prototypes, head_hidden, head_bottleneck, momentum)
        self.student = nn.ModuleDict({"backbone": backbone, "head": head})
        self.build_teacher()
        self.last_layers = (head.prototypes,)
        self.centre = Centre(num_prototypes, centre_momentum, centre_rule)
        self._step: tuple[Views, Tensor, Tensor, Tensor] | None = None

    def schedules(self, progress: float) -> dict[str, float]:
        """Return every scheduled number at a share of the run."""
        temperature = linear(progress, *self.temperature_teacher, finish=0.3)
        return super().schedules(progress) | {"temperature_teacher": temperature}

    def make_views(self, batch: ParentBatch) -> Views:
        """Cut two global and the local views from every parent."""
        return make_views(batch, self.views, self.appearance, self.seed)

    def pretrain_loss(self, views: Views) -> LossTerms:
        """Return the cross-entropy over all pairs of a teacher's global view and another view."""
        self._step = None  # frees the last step before this one needs the memory
        with torch.no_grad():
            seen = cast(Backbone, self.teacher["backbone"]).forward_crops(views.inputs)
            temperature = self.scheduled(self.progress)["temperature_teacher"]
            all_rows = seen.cls.new_ones(seen.cls.shape[:-1]) if self.training else None
            targets = self.centre.targets(self.teacher["head"](seen.cls, all_rows), temperature, observe=self.training)
        num_views = (2,) if views.locals is None else (2, views.locals.shape[1])
        noise = self.drop_noise(views.sample, *num_views)
        student = cast(Backbone, self.student["backbone"]).forward_crops(views.inputs, views.locals, None, noise)
        logits: Tensor = self.student["head"](student.cls) / self.temperature_student  # (B, 2, K)
        local_logits = None
        if student.local_cls is not None:
            local_logits = self.student["head"](student.local_cls) / self.temperature_student
        loss = multi_crop_cross_entropy(targets, logits, local_logits)
        self._step = (views, targets, logits.detach(), seen.cls)
        return LossTerms(loss, {"cls": loss}, student.shared)

    def after_optimizer_step(self) -> None:
        """Move the centre and the head's mean, once per optimiser step, from all its samples."""
        self.centre.update()
        move_means(self.teacher, self.student)

    # ------------------------------------------------------------ monitors

    @property
    def observations(self) -> Observations | None:
        """Outputs of the last micro-batch for monitors."""
        if self._step is None:
            return None
        views, targets, logits, features = self._step
        return {
            "teacher_cls": targets.flatten(0, 1),
            "student_cls": logits.flip(1).flatten(0, 1),
            "cls_features": features.flatten(0, 1).float(),
            "centre_norm_cls": self.centre.centre.norm(),
            "scalars": {"overlap": views.geometry.overlap.mean()} | self.gradient_norms,
        }

    @torch.no_grad()
    def view_panel(self, index: int) -> ViewPanel:
        """Return the views of sample ``index`` of the last micro-batch."""
        if self._step is None:
            return panel_of(None, index)
        panel = panel_of(self._step[0], index)
        encoder = cast(Backbone, self.teacher["backbone"])
        if encoder.has_cls_attention:
            panel["attention"] = encoder.cls_attention(self._step[0].inputs[index])
        return panel
