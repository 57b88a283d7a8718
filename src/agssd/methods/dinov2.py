"""DINOv2: [CLS] between views and patches within a view, balanced by Sinkhorn and spread by KoLeo."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from agssd.losses.distillation import (
    PatchDistillation,
    cross_entropy,
    masked_mean,
    multi_crop_cross_entropy,
    refuse_temperatures,
    sinkhorn,
)
from agssd.losses.koleo import koleo
from agssd.methods.base import PretrainModule
from agssd.models.backbone import Backbone
from agssd.models.heads import PrototypeHead, predict_hidden
from agssd.schedules import linear
from agssd.transforms.crops import OverlapCrops
from agssd.transforms.intensity import Appearance
from agssd.transforms.masking import MaskSampler, MaskScore, gather_tokens, masked_indices
from agssd.transforms.views import Views, body_of, in_their_views, make_views, mask_views, panel_of, pick
from agssd.types import LossTerms, Observations, ParentBatch, ViewPanel


class DINOv2(PretrainModule):
    """DINO's and iBOT's terms with heads of their own, Sinkhorn targets, and KoLeo, which spreads [CLS].

    One of a sample's two global views is masked, the other is whole; which one is drawn. ``mask_score="attention"``
    is AttMask; with ``"loss"`` hidden first is where the teacher's own prediction from a half-hidden view has the
    highest cross-entropy with its targets of the whole view (ours).

    Source: Oquab et al., TMLR 2024, arXiv 2304.07193 [paper]; in 3D 3DINO [R: 3DINO].
    Deviates: Sinkhorn works in the log domain, where subtracting no maximum is needed (their fix of the overflow
    subtracts each row's, which changes the result; docs/method.md (b) 3); KoLeo is the mean over the two global views
    where the released code sums; of two views exactly one is masked, where the paper masks each with probability
    0.5 (ours); patches with less than 5 % body enter neither loss nor balance (ours); the prototypes' gain is frozen
    at 1; views overlap by construction; fewer prototypes, for less data [R: iBOT]; our encoder and schedules.

    Sinkhorn and KoLeo look at all samples of a micro-batch of all ranks, so accumulation changes the result.

    Args:
        backbone: the student's encoder; the teacher is its copy.
        views: sampler of the views.
        num_prototypes: K of each head.
        head_hidden: width of the heads' hidden layers.
        head_bottleneck: width before the prototypes.
        weight_cls: weight of the [CLS] term.
        weight_patch: weight of the patch term.
        weight_koleo: weight of KoLeo; it needs a batch of 8 or more per rank to mean much.
        temperature_student: student's temperature.
        temperature_teacher: teacher's, from first to second over 30 % of the run.
        mask_ratio: range of the share of hidden tokens, one draw per sample.
        mask_score: what is hidden; see :class:`agssd.transforms.masking.MaskSampler`.
        mask_block: tokens per side of a hidden block.
        appearance: settings of :class:`agssd.transforms.intensity.Appearance` that differ from its defaults.
        lr: peak learning rate, for example ``2e-3 * sqrt(global batch / 1024)``.
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
        weight_cls: float = 1.0,
        weight_patch: float = 1.0,
        weight_koleo: float = 0.1,
        temperature_student: float = 0.1,
        temperature_teacher: tuple[float, float] = (0.04, 0.07),
        mask_ratio: tuple[float, float] = (0.1, 0.5),
        mask_score: MaskScore = "block",
        mask_block: int = 1,
        appearance: dict[str, float] | None = None,
        lr: float = 5e-4,
        min_lr: float = 1e-6,
        warmup: float = 0.1,
        weight_decay: tuple[float, float] = (0.04, 0.2),
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
        self.weights = {"cls": weight_cls, "patch": weight_patch, "koleo": weight_koleo}
        self.temperature_student = temperature_student
        self.temperature_teacher = temperature_teacher
        self.mask_ratio = mask_ratio
        self.mask_score = mask_score
        self.patch = backbone.patch_size
        self.grid = backbone.token_grid(views.size_vox)
        if views.num_local:
            backbone.token_grid(views.local_size_vox)
        cls_head, patch_head = (
            PrototypeHead(backbone.embed_dim, num_prototypes, head_hidden, head_bottleneck) for _ in range(2)
        )
        self.student = nn.ModuleDict({"backbone": backbone, "cls_head": cls_head, "patch_head": patch_head})
        self.build_teacher()
        self.hide_by(MaskSampler(self.grid, self.patch, mask_score, mask_block))
        self.last_layers = (cls_head.prototypes, patch_head.prototypes)
        self._step: tuple[Views, Tensor, PatchDistillation] | None = None

    @property
    def couples_samples(self) -> tuple[str, ...]:
        """Sinkhorn and KoLeo."""
        return ("sinkhorn", "koleo")

    def schedules(self, progress: float) -> dict[str, float]:
        """Return every scheduled number at a share of the run."""
        temperature = linear(progress, *self.temperature_teacher, finish=0.3)
        return super().schedules(progress) | {"temperature_teacher": temperature}

    def make_views(self, batch: ParentBatch) -> Views:
        """Cut two global and the local views from every parent."""
        return make_views(batch, self.views, self.appearance, self.seed, with_edges=self.mask_score == "edge")

    def pretrain_loss(self, views: Views) -> LossTerms:
        """Return [CLS] between views, patches within the masked view, and KoLeo of each global [CLS]."""
        self._step = None  # frees the last step before this one needs the memory
        temperature = self.scheduled(self.progress)["temperature_teacher"]
        hidden = views.hidden_view
        with torch.no_grad():
            seen = cast(Backbone, self.teacher["backbone"]).forward_crops(views.inputs)
            body = body_of(pick(views.foreground, hidden), self.patch)  # (B, N)
            view, whole = pick(views.inputs, hidden), pick(seen.tokens, hidden)

            def error(mask: Tensor, index: Tensor) -> Tensor:
                logits, _ = predict_hidden(self.teacher, "patch_head", view, mask, index)
                own = self.teacher["patch_head"](gather_tokens(whole, index))
                targets = sinkhorn(own, temperature, body.gather(1, index))
                return cross_entropy(targets, logits / self.temperature_student)

            attention = None if seen.attention is None else pick(seen.attention, hidden)
            scores = self.teacher_scores(views.sample, view, body, error, attention)
            mask, _ = mask_views(views, hidden, body, self.masks, self.mask_ratio, self.seed, self.progress, scores)
            index, used = masked_indices(mask.flatten(1), self.masks.limit(self.mask_ratio[1]))
            counts = used & body.gather(1, index)  # (B, M): hidden tokens that hold body
            tokens = gather_tokens(whole, index)
            cls_targets = sinkhorn(self.teacher["cls_head"](seen.cls), temperature)
            patch_targets = sinkhorn(self.teacher["patch_head"](tokens), temperature, counts)

        masks = in_their_views(mask, hidden, len(views.sample))
        num_views = (2,) if views.locals is None else (2, views.locals.shape[1])
        noise = self.drop_noise(views.sample, *num_views)
        student = cast(Backbone, self.student["backbone"]).forward_crops(views.inputs, views.locals, masks, noise)
        student_cls = self.student["cls_head"](student.cls) / self.temperature_student  # (B, 2, K)
        local_cls = None
        if student.local_cls is not None:
            local_cls = self.student["cls_head"](student.local_cls) / self.temperature_student
        loss_cls = multi_crop_cross_entropy(cls_targets, student_cls, local_cls)
        own = gather_tokens(pick(student.tokens, hidden), index)
        student_patch = self.student["patch_head"](own) / self.temperature_student  # (B, M, K)
        loss_patch = masked_mean(cross_entropy(patch_targets, student_patch), counts)
        loss_koleo = (koleo(student.cls[:, 0]) + koleo(student.cls[:, 1])) / 2  # never across views of one sample

        outputs = PatchDistillation(
            counts, cls_targets, student_cls.detach(), patch_targets, student_patch.detach(), seen.cls, tokens
        )
        self._step = (views, masks, outputs)
        terms = {"cls": loss_cls, "patch": loss_patch, "koleo": loss_koleo}
        total = torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()
        return LossTerms(total, terms, student.shared)

    # ------------------------------------------------------------ monitors

    @property
    def observations(self) -> Observations | None:
        """Outputs of the last micro-batch for monitors; selected when they are asked for, not in the step."""
        if self._step is None:
            return None
        views, mask, outputs = self._step
        figures = {"overlap": views.geometry.overlap.mean(), "mask_ratio": 2 * mask.float().mean()}
        return outputs.observations(figures | self.gradient_norms)

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
