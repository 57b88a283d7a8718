"""iBOT: DINO's [CLS] term, and hidden patches against the teacher's patches of the same view."""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor, nn

from agssd.losses.distillation import (
    Centre,
    PatchDistillation,
    cross_entropy,
    masked_mean,
    multi_crop_cross_entropy,
    refuse_temperatures,
)
from agssd.methods.base import PretrainModule
from agssd.models.backbone import Backbone
from agssd.models.heads import PrototypeHead, move_means, predict_hidden
from agssd.schedules import linear
from agssd.transforms.crops import OverlapCrops
from agssd.transforms.intensity import Appearance
from agssd.transforms.masking import MaskSampler, MaskScore, gather_tokens, masked_indices
from agssd.transforms.views import Views, body_of, in_their_views, make_views, mask_views, panel_of, pick
from agssd.types import LossTerms, Observations, ParentBatch, ViewPanel


class IBOT(PretrainModule):
    """Image BERT with an online tokeniser: [CLS] between views, hidden patches within a view, by one shared head.

    One of a sample's two global views is masked, the other is whole; which one is drawn. ``mask_score="attention"``
    is AttMask: what the teacher's [CLS] attends to is hidden first. With ``"loss"`` it is where the teacher's own
    prediction from a half-hidden view has the highest cross-entropy with its targets of the whole view (ours).

    Source: Zhou et al., ICLR 2022, arXiv 2111.07832 [paper]; AttMask, ECCV 2022 [R: AttMask].
    Deviates: of two views exactly one is masked, where the paper masks each with probability 0.5, so that every sample
    has hidden tokens (ours); patches with less than 5 % body enter neither loss nor centre (ours); the
    prototypes' gain is frozen at 1; views overlap by construction; centres move once per optimiser step; our encoder
    and schedules.

    Args:
        backbone: the student's encoder; the teacher is its copy.
        views: sampler of the views.
        num_prototypes: K.
        head_hidden: width of the heads' hidden layers.
        head_bottleneck: width before the prototypes.
        shared_head: one head for [CLS] and patches, or two.
        weight_cls: weight of the [CLS] term.
        weight_patch: weight of the patch term.
        centre_momentum: of both centres, per optimiser step.
        centre_rule: ``"mean"`` of the teacher's logits [paper], or ``"balance"``, which evens out the prototypes'
            shares over the steps (ours, for few samples per step; see :class:`agssd.losses.distillation.Centre`).
        head_centring: subtract the teacher's running mean before the heads' L2 norm (ours, alike; see
            :class:`agssd.models.heads.PrototypeHead`).
        temperature_student: student's temperature.
        temperature_cls: teacher's for [CLS], from first to second over 30 % of the run.
        temperature_patch: teacher's for patches, alike.
        mask_ratio: range of the share of hidden tokens, one draw per sample.
        mask_score: what is hidden; see :class:`agssd.transforms.masking.MaskSampler`.
        mask_block: tokens per side of a hidden block.
        clean_teacher: the teacher sees views before appearance augmentation (ours), instead of the student's [paper].
        appearance: settings of :class:`agssd.transforms.intensity.Appearance` that differ from its defaults.
        lr: peak learning rate, for example ``5e-4 * global batch / 256``.
        min_lr: last learning rate.
        warmup: share of the run.
        weight_decay: first and last.
        betas: of AdamW.
        freeze_last_layer: share of the run during which prototypes stay as they are.
        seed: of views, masks and appearance.
        compile: compile the encoders block by block with ``torch.compile``.
    """

    def __init__(
        self,
        backbone: Backbone,
        views: OverlapCrops,
        num_prototypes: int = 8192,
        head_hidden: int = 2048,
        head_bottleneck: int = 256,
        shared_head: bool = True,
        weight_cls: float = 1.0,
        weight_patch: float = 1.0,
        centre_momentum: float = 0.9,
        centre_rule: Literal["mean", "balance"] = "mean",
        head_centring: bool = False,
        temperature_student: float = 0.1,
        temperature_cls: tuple[float, float] = (0.04, 0.04),
        temperature_patch: tuple[float, float] = (0.04, 0.07),
        mask_ratio: tuple[float, float] = (0.1, 0.5),
        mask_score: MaskScore = "block",
        mask_block: int = 1,
        clean_teacher: bool = False,
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
        refuse_temperatures(
            temperature_student=temperature_student,
            temperature_cls=temperature_cls,
            temperature_patch=temperature_patch,
        )
        self.views = views
        self.appearance = Appearance.of(appearance)
        self.weights = {"cls": weight_cls, "patch": weight_patch}
        self.temperature_student = temperature_student
        self.temperature_cls = temperature_cls
        self.temperature_patch = temperature_patch
        self.mask_ratio = mask_ratio
        self.mask_score = mask_score
        self.clean_teacher = clean_teacher
        self.patch = backbone.patch_size
        self.grid = backbone.token_grid(views.size_vox)
        if views.num_local:
            backbone.token_grid(views.local_size_vox)
        heads = {
            name: PrototypeHead(
                backbone.embed_dim, num_prototypes, head_hidden, head_bottleneck, 0.9 if head_centring else None
            )
            for name in (("head",) if shared_head else ("cls_head", "patch_head"))
        }
        self.student = nn.ModuleDict({"backbone": backbone, **heads})
        self.build_teacher()
        self.hide_by(MaskSampler(self.grid, self.patch, mask_score, mask_block))
        self.cls_head, self.patch_head = next(iter(heads)), list(heads)[-1]  # names, in student and teacher
        self.last_layers = tuple(head.prototypes for head in heads.values())
        self.centre_cls = Centre(num_prototypes, centre_momentum, centre_rule)
        self.centre_patch = Centre(num_prototypes, centre_momentum, centre_rule)
        self._step: tuple[Views, Tensor, PatchDistillation] | None = None

    def schedules(self, progress: float) -> dict[str, float]:
        """Return every scheduled number at a share of the run."""
        return super().schedules(progress) | {
            "temperature_cls": linear(progress, *self.temperature_cls, finish=0.3),
            "temperature_patch": linear(progress, *self.temperature_patch, finish=0.3),
        }

    def make_views(self, batch: ParentBatch) -> Views:
        """Cut two global and the local views from every parent."""
        return make_views(batch, self.views, self.appearance, self.seed, with_edges=self.mask_score == "edge")

    def pretrain_loss(self, views: Views) -> LossTerms:
        """Return the [CLS] term between views and the patch term within the masked view."""
        self._step = None  # frees the last step before this one needs the memory
        now = self.scheduled(self.progress)
        hidden = views.hidden_view
        with torch.no_grad():
            shown = views.clean if self.clean_teacher else views.inputs  # to the teacher
            seen = cast(Backbone, self.teacher["backbone"]).forward_crops(shown)
            body = body_of(pick(views.foreground, hidden), self.patch)  # (B, N)
            view, whole = pick(shown, hidden), pick(seen.tokens, hidden)

            def error(mask: Tensor, index: Tensor) -> Tensor:
                logits, _ = predict_hidden(self.teacher, self.patch_head, view, mask, index)
                own = self.teacher[self.patch_head](gather_tokens(whole, index))
                targets = self.centre_patch.targets(own, now["temperature_patch"])
                return cross_entropy(targets, logits / self.temperature_student)

            attention = None if seen.attention is None else pick(seen.attention, hidden)
            scores = self.teacher_scores(views.sample, view, body, error, attention)
            mask, _ = mask_views(views, hidden, body, self.masks, self.mask_ratio, self.seed, self.progress, scores)
            index, used = masked_indices(mask.flatten(1), self.masks.limit(self.mask_ratio[1]))
            counts = used & body.gather(1, index)  # (B, M): hidden tokens that hold body
            tokens = gather_tokens(whole, index)
            observe = self.training
            all_rows = seen.cls.new_ones(seen.cls.shape[:-1]) if observe else None
            cls_logits = self.teacher[self.cls_head](seen.cls, all_rows)
            patch_logits = self.teacher[self.patch_head](tokens, counts if observe else None)
            cls_targets = self.centre_cls.targets(cls_logits, now["temperature_cls"], None, observe)
            patch_targets = self.centre_patch.targets(patch_logits, now["temperature_patch"], counts, observe)

        masks = in_their_views(mask, hidden, len(views.sample))
        num_views = (2,) if views.locals is None else (2, views.locals.shape[1])
        noise = self.drop_noise(views.sample, *num_views)
        student = cast(Backbone, self.student["backbone"]).forward_crops(views.inputs, views.locals, masks, noise)
        student_cls = self.student[self.cls_head](student.cls) / self.temperature_student  # (B, 2, K)
        local_cls = None
        if student.local_cls is not None:
            local_cls = self.student[self.cls_head](student.local_cls) / self.temperature_student
        loss_cls = multi_crop_cross_entropy(cls_targets, student_cls, local_cls)
        own = gather_tokens(pick(student.tokens, hidden), index)
        student_patch = self.student[self.patch_head](own) / self.temperature_student  # (B, M, K)
        loss_patch = masked_mean(cross_entropy(patch_targets, student_patch), counts)

        outputs = PatchDistillation(
            counts, cls_targets, student_cls.detach(), patch_targets, student_patch.detach(), seen.cls, tokens
        )
        self._step = (views, masks, outputs)
        total = self.weights["cls"] * loss_cls + self.weights["patch"] * loss_patch
        return LossTerms(total, {"cls": loss_cls, "patch": loss_patch}, student.shared)

    def after_optimizer_step(self) -> None:
        """Move the centres and the heads' means, once per optimiser step, from all its samples."""
        self.centre_cls.update()
        self.centre_patch.update()
        move_means(self.teacher, self.student)

    # ------------------------------------------------------------ monitors

    @property
    def observations(self) -> Observations | None:
        """Outputs of the last micro-batch for monitors; selected when they are asked for, not in the step."""
        if self._step is None:
            return None
        views, mask, outputs = self._step
        figures = {"overlap": views.geometry.overlap.mean(), "mask_ratio": 2 * mask.float().mean()}
        seen = outputs.observations(figures | self.gradient_norms)
        centres = (self.centre_cls.centre.norm(), self.centre_patch.centre.norm())
        return {**seen, "centre_norm_cls": centres[0], "centre_norm_patch": centres[1]}

    @torch.no_grad()
    def view_panel(self, index: int) -> ViewPanel:
        """Return the views of sample ``index`` of the last micro-batch."""
        if self._step is None:
            return panel_of(None, index)
        views, mask, _ = self._step
        panel = panel_of(views, index, mask)
        encoder = cast(Backbone, self.teacher["backbone"])
        if encoder.has_cls_attention:
            panel["attention"] = encoder.cls_attention(views.inputs[index])
        return panel
