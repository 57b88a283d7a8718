"""AG-SSD: anatomy-guided self-supervised distillation for 3D medical images."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import Tensor, nn

from agssd.evaluation.agssd_step import AGSSDStep
from agssd.geometry import correspondence, sample_tokens
from agssd.losses.distillation import (
    Centre,
    cross_entropy,
    masked_mean,
    multi_crop_cross_entropy,
    refuse_temperatures,
    sinkhorn,
)
from agssd.losses.koleo import koleo
from agssd.losses.reconstruction import patch_l1, patch_scaling
from agssd.methods.base import PretrainModule
from agssd.models.aligner import Aligner, lies_in_other, place_targets
from agssd.models.backbone import Backbone
from agssd.models.fuser import CrossViewFuser, forbidden_keys, position_bias
from agssd.models.heads import PrototypeHead, ReconstructionHead, move_means, predict_hidden
from agssd.models.token_decoder import TokenDecoder, work_out_hidden
from agssd.schedules import linear
from agssd.transforms.crops import OverlapCrops
from agssd.transforms.edges import patch_scores, patches_of, standardise
from agssd.transforms.intensity import Appearance
from agssd.transforms.keyed_random import KeyedRandom
from agssd.transforms.masking import MaskSampler, MaskScore, gather_tokens, masked_indices, one_ratio
from agssd.transforms.views import (
    Views,
    body_of,
    both_views,
    edge_maps,
    in_their_views,
    make_views,
    mask_views,
    pick,
    put,
)
from agssd.types import LossTerms, Observations, ParentBatch, ViewPanel

_Places = tuple[Tensor, Tensor]  # bias (R, N, N), distance (R, N, N)


@dataclass
class _Seen:
    """What the student makes of the views that it sees: R masked ones, V patches shown of each."""

    cls: Tensor  # (B, 1 or 2, E) of the views that it sees
    local_cls: Tensor | None  # (B, L, E)
    hidden: Tensor  # (R, M, E) tokens of hidden patches
    shown: Tensor  # (R, V, E) tokens of shown patches
    shown_index: Tensor  # (R, V) int64, where they are
    is_shown: Tensor  # (R, V) bool; V may be more than are shown
    tokens: Tensor | None  # (B, 1 or 2, N, E), all of the views that it sees, where there are all
    shared: tuple[Tensor, ...]  # where the terms' gradients are compared


class AGSSD(PretrainModule):
    """Anatomy-guided self-supervised distillation.

    Per sample two overlapping global views, and local views if there are to be any, of one parent crop (CVAC); one or
    both of the global views are masked where edges are strong (EAAM); attention aligns and fuses the views (CVAA).
    Three terms, and one for that attention:

    - ``patch``: hidden foreground tokens of the masked view against the teacher's tokens of the same view unmasked,
      plain and after fusion with the other view;
    - ``cls``: [CLS] of each view that the student sees against the teacher's [CLS] of the other global view;
    - ``rec``: voxels of hidden foreground patches, from the clean view;
    - ``align``: where each shown foreground token of the masked view lies in the other view, as attention over the
      teacher's tokens of that view (ours; see :class:`agssd.models.aligner.Aligner`).

    Source: modules and the three terms [paper: Yu and Dai, IEEE TMI 2026, doi 10.1109/TMI.2026.3680920, abstract];
    visible patches alone [R: MAE]; weight of reconstruction [R: SMIT, Alice]; heads and centring [R: DINO, iBOT];
    everything else is ours, the light weights of both distillations among it (docs/method.md §1, docs/evidence.md).
    Deviates: the paper's text beyond its abstract is not public, so no detail here is claimed to be the paper's.

    Nothing depends on how the batch is cut into micro-batches and ranks, except ``assignment="sinkhorn"`` and
    ``weight_koleo > 0``, which accumulation (not ranks) changes.

    Args:
        backbone: the student's encoder; the teacher is its copy.
        views: CVAC's sampler.
        num_prototypes: K of the [CLS] and the patch head.
        head_hidden: width of the heads' hidden layers.
        head_bottleneck: width before the prototypes.
        head_centring: subtract a running mean of the teacher's bottleneck before its L2 norm (ours; see
            :class:`agssd.models.heads.PrototypeHead`).
        weight_cls: weight of the [CLS] term.
        weight_patch: weight of the patch term.
        weight_reconstruction: weight of the reconstruction term.
        weight_align: weight of CVAA's alignment; 0 leaves its attention out.
        align_pitches: standard deviation of its targets around the true place, in token pitches of the other view.
        align_temperature: of the cosine similarity that its attention is the softmax of.
        weight_koleo: weight of KoLeo on the student's [CLS] (0.1 in DINOv2); it needs a batch of 8 or more per rank.
        assignment: how teacher logits become targets: ``"centring"`` [R: DINO], ``"sinkhorn"`` [R: DINOv2], or
            ``"balance"``, whose centres even out the prototypes' shares over many steps (ours; see
            :class:`agssd.losses.distillation.Centre`). For [CLS], balancing fades with ``(1 - progress)**2``: pressed
            to the end it makes every prototype equally likely, and the student never catches up with its targets.
        centre_momentum: of the centres of [CLS] and of patches, per optimiser step.
        temperature_student: student's temperature [R: DINO 0.1].
        temperature_cls: teacher's temperature for [CLS].
        temperature_patch: teacher's temperature for patches, from first to second over 30 % of the run.
        mask_ratio: range of the share of hidden tokens, one draw per masked view; the same number twice where
            ``student_views`` is ``"visible"``.
        mask_score: what EAAM prefers, or ``"random"`` and ``"block"`` masks; see
            :class:`agssd.transforms.masking.MaskSampler`. ``"loss"`` is that of reconstruction; ``"region"`` needs
            region maps (``data.regions``).
        teacher_score_edges: share of the edge score mixed into the teacher's, ``"attention"`` or ``"loss"``.
        mask_edge_share: share of hidden tokens drawn by score at the end of the run; it rises linearly from 0.
        mask_temperature: of that draw, from first to second over the run (linear in its logarithm).
        mask_hints: share of the strongest tenth of patches, as far as drawn by score, that is shown after all.
        mask_block: tokens per side of a hidden block.
        masked_views: 2 masks both global views, each by a draw of its own: twice the patches to learn from (ours); 1
            masks one of them, so that the student's [CLS] sees whole views too where it is shown both [R: DINOv2].
        student_views: ``"visible"`` shows the student only the visible patches of masked views: hidden ones are left
            out, and a light decoder works out their tokens [R: MAE, data2vec 2.0 for the place of it in distillation];
            it needs an encoder that can leave patches out, a ViT. ``"masked"`` shows it the masked views, which is all
            that the patch terms ask for, and the [CLS] term takes their [CLS] alone (ours; docs/evidence.md).
            ``"both"`` shows it both global views [R: DINOv2]; the same where both are masked. The teacher always sees
            both views whole.
        decoder_dim: width of that decoder.
        decoder_depth: its blocks.
        decoder_heads: its attention heads.
        cvaa: how the views are fused. ``"student"`` fuses the student's tokens (default), ``"teacher"`` mixes aligned
            tokens of the other view into the targets, ``"casa"`` is Alice's form, ``"none"`` fuses nothing.
        fuser_depth: blocks of the fuser.
        fuser_heads: its attention heads.
        distilled_share: how many of a view's hidden tokens the patch term asks for, as a share of the most that a view
            hides (the upper ``mask_ratio``), those with body first, else at random in each step: where hidden patches
            are left out, heads and fuser took a sixth of a step where three quarters were hidden (ours).
        fused_share: weight of the fused patch loss at 20 % of the run, from 0 at 5 %.
        fused_share_cls: weight of the fused teacher [CLS] in the targets, reached at 20 % from 0 at 10 %.
        counterpart_drop: probability that a hidden token may not look at its own place in the other view.
        key_dropout: share of the other view's tokens hidden from the fuser.
        reconstruction_edges: weight of edges in the reconstruction, ``1 + weight * edge``.
        norm_pix: standardise target patches (std floor 0.05 of the view's). Figures and pictures are of intensities
            all the same: each patch's own mean and spread are given back to what is predicted of it.
        clean_teacher: the teacher sees the views before appearance augmentation (ours). Seeing the student's own
            appearance, its targets come to stand for brightness and contrast, which each shown token gives away
            (docs/evidence.md).
        appearance: settings of :class:`agssd.transforms.intensity.Appearance` that differ from its defaults.
        lr: peak learning rate, for example ``5e-4 * global batch / 256``.
        min_lr: last learning rate.
        warmup: share of the run.
        weight_decay: first and last.
        betas: of AdamW.
        freeze_last_layer: share of the run during which prototypes stay as they are.
        seed: of views, masks and appearance.
        compile: compile the encoder block by block with ``torch.compile``; worth it on GPUs.

    Raises:
        ValueError: if settings exclude each other; the message names both and the remedy.
    """

    def __init__(
        self,
        backbone: Backbone,
        views: OverlapCrops,
        num_prototypes: int = 8192,
        head_hidden: int = 2048,
        head_bottleneck: int = 256,
        head_centring: bool = False,
        weight_cls: float = 0.02,
        weight_patch: float = 0.2,
        weight_reconstruction: float = 10.0,
        weight_align: float = 1.0,
        align_pitches: float = 0.5,
        align_temperature: float = 0.1,
        weight_koleo: float = 0.0,
        assignment: Literal["centring", "sinkhorn", "balance"] = "centring",
        centre_momentum: tuple[float, float] = (0.9, 0.9),
        temperature_student: float = 0.1,
        temperature_cls: float = 0.04,
        temperature_patch: tuple[float, float] = (0.04, 0.07),
        mask_ratio: tuple[float, float] = (0.75, 0.75),
        mask_score: MaskScore = "edge",
        teacher_score_edges: float = 0.7,
        mask_edge_share: float = 0.5,
        mask_temperature: tuple[float, float] = (4.0, 1.0),
        mask_hints: float = 0.0,
        mask_block: int = 1,
        masked_views: Literal[1, 2] = 2,
        student_views: Literal["both", "masked", "visible"] = "visible",
        decoder_dim: int = 384,
        decoder_depth: int = 2,
        decoder_heads: int = 6,
        cvaa: Literal["student", "teacher", "casa", "none"] = "student",
        fuser_depth: int = 2,
        fuser_heads: int = 6,
        distilled_share: float = 0.25,
        fused_share: float = 0.5,
        fused_share_cls: float = 0.1,
        counterpart_drop: float = 0.5,
        key_dropout: float = 0.25,
        reconstruction_edges: float = 1.0,
        norm_pix: bool = True,
        clean_teacher: bool = True,
        appearance: dict[str, float] | None = None,
        lr: float = 5e-4,
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
            align_temperature=align_temperature,
        )
        self.views = views
        self.weights = {"cls": weight_cls, "patch": weight_patch, "rec": weight_reconstruction}
        self.weights |= {"align": weight_align, "koleo": weight_koleo}
        if align_pitches <= 0:
            raise ValueError(f"align_pitches is {align_pitches}; give a spread above 0, in token pitches")
        self.align_pitches = align_pitches
        self.assignment = assignment
        self.temperature_student = temperature_student
        self.temperature_cls = temperature_cls
        self.temperature_patch = temperature_patch
        if masked_views not in (1, 2):
            raise ValueError(f"masked_views is {masked_views}; give 1 or 2")
        whole = student_views == "both" or (student_views == "masked" and masked_views == 2)
        if cvaa == "casa" and not whole:
            raise ValueError(
                f"cvaa: casa fuses with the student's own tokens of the other view, but student_views is "
                f"{student_views} and masked_views {masked_views}, so the student does not see that view whole; set "
                "student_views to both"
            )
        self.mask_ratio = mask_ratio
        self.masked_views = masked_views
        self.student_views = student_views
        if self.leaves_out:
            backbone.refuse_without_leaving_out()
            backbone.freeze_mask_token()
            one_ratio(mask_ratio)
        self.teacher_score_edges = teacher_score_edges
        self.cvaa = cvaa
        if not 0.0 < distilled_share <= 1.0:
            raise ValueError(f"distilled_share is {distilled_share}; give a share of the hidden tokens in (0, 1]")
        self.distilled_share = distilled_share
        self.fused_share = fused_share
        self.fused_share_cls = fused_share_cls
        self.counterpart_drop = counterpart_drop
        self.key_dropout = key_dropout
        self.reconstruction_edges = reconstruction_edges
        self.norm_pix = norm_pix
        self.clean_teacher = clean_teacher
        self.appearance = Appearance.of(appearance)
        self.patch = backbone.patch_size
        self.grid = backbone.token_grid(views.size_vox)
        if views.num_local:
            backbone.token_grid(views.local_size_vox)

        def head() -> PrototypeHead:
            return PrototypeHead(
                backbone.embed_dim, num_prototypes, head_hidden, head_bottleneck, 0.9 if head_centring else None
            )

        self.student = nn.ModuleDict(
            {
                "backbone": backbone,
                "cls_head": head(),
                "patch_head": head(),
                "reconstruction": ReconstructionHead(backbone.embed_dim, self.patch, backbone.in_channels),
            }
        )
        if self.leaves_out:
            self.student["decoder"] = TokenDecoder(
                backbone.embed_dim, self.grid, decoder_dim, decoder_depth, decoder_heads, backbone.embed_dim
            )
        if cvaa == "student":
            self.student["fuser"] = CrossViewFuser(backbone.embed_dim, fuser_heads, fuser_depth)
        elif cvaa == "casa":
            self.student["fuser"] = CrossViewFuser(backbone.embed_dim, fuser_heads, 1, 4.0, None, "post")
        if weight_align:
            self.student["aligner"] = Aligner(backbone.embed_dim, temperature=align_temperature)
        self.build_teacher()
        self.hide_by(
            MaskSampler(self.grid, self.patch, mask_score, mask_block, mask_edge_share, mask_temperature, mask_hints)
        )
        self.last_layers = tuple(
            cast(PrototypeHead, self.student[name]).prototypes for name in ("cls_head", "patch_head")
        )
        rule: Literal["mean", "balance"] = "balance" if assignment == "balance" else "mean"
        self.centre_cls = Centre(num_prototypes, centre_momentum[0], rule)
        self.centre_patch = Centre(num_prototypes, centre_momentum[1], rule)
        self.centre_fused = Centre(num_prototypes, centre_momentum[1], rule)
        self._step: AGSSDStep | None = None

    @property
    def couples_samples(self) -> tuple[str, ...]:
        """Sinkhorn and KoLeo, where they are chosen."""
        sinkhorn_chosen = ("sinkhorn",) if self.assignment == "sinkhorn" else ()
        return (*sinkhorn_chosen, "koleo") if self.weights["koleo"] else sinkhorn_chosen

    def schedules(self, progress: float) -> dict[str, float]:
        """Return every scheduled number at a share of the run."""
        found = super().schedules(progress) | {
            "temperature_cls": self.temperature_cls,
            "temperature_patch": linear(progress, *self.temperature_patch, finish=0.3),
            "fused_share": linear(progress, 0.0, self.fused_share, 0.05, 0.2),
            "fused_share_cls": linear(progress, 0.0, self.fused_share_cls, 0.1, 0.2),
            **self.masks.schedules(progress),
        }
        if self.assignment == "balance":
            found["balance_cls"] = (1 - progress) ** 2
        return found

    # ---------------------------------------------------------------- CVAC

    def make_views(self, batch: ParentBatch) -> Views:
        """Cut two global and the local views from every parent, and find the edges of those to be masked."""
        hidden_only = self.clean_teacher and self._num_seen == 1
        views = make_views(batch, self.views, self.appearance, self.seed, hidden_only=hidden_only)
        return replace(views, edges=edge_maps(views, self._masked(views)))

    def _masked(self, views: Views) -> Tensor:
        """Return (R,): which views are masked, R = B or 2B."""
        return views.hidden_view if self.masked_views == 1 else both_views(views)

    @property
    def _num_seen(self) -> int:
        """How many global views of a sample the student sees."""
        return 1 if self.student_views != "both" and self.masked_views == 1 else 2

    @property
    def leaves_out(self) -> bool:
        """Whether hidden patches never enter the student's encoder."""
        return self.student_views == "visible"

    def _limit(self) -> int:
        """Return M, for how many tokens of a masked view there is room among those worked out."""
        if self.leaves_out:
            return self.masks.exact(one_ratio(self.mask_ratio))
        return self.masks.limit(self.mask_ratio[1])

    def _seen(self, views: Views) -> Tensor:
        """Return (S,): which views the student sees, the masked ones among them."""
        return views.hidden_view if self._num_seen == 1 else both_views(views)

    def _teacher_inputs(self, views: Views) -> Tensor:
        """Return (B, 2, C, [D,] H, W) in the model's range: the global views as the teacher sees them (ours)."""
        return views.clean if self.clean_teacher else views.inputs

    # ---------------------------------------------------------------- EAAM

    def _scores(
        self, views: Views, body: Tensor, attention: Tensor | None, target_of: Callable[[Tensor], Tensor]
    ) -> Tensor | None:
        """Return (R, N) z-scores of the teacher mixed with edges, where the teacher is asked."""
        view = pick(self._teacher_inputs(views), self._masked(views))

        def error(mask: Tensor, index: Tensor) -> Tensor:
            if self.leaves_out:
                tokens, _, _ = work_out_hidden(self.teacher, view, mask.flatten(1), index)
                prediction: Tensor = self.teacher["reconstruction"](tokens)
            else:
                prediction, _ = predict_hidden(self.teacher, "reconstruction", view, mask, index)
            return (prediction - target_of(index)).abs().mean(-1)

        scores = self.teacher_scores(views.sample, view, body, error, attention)
        if scores is None:
            return None
        assert views.edges is not None
        edges = standardise(patch_scores(views.edges, self.patch), body)
        return self.teacher_score_edges * edges + (1 - self.teacher_score_edges) * scores

    # ---------------------------------------------------------------- CVAA

    def _position_bias(self, views: Views, query_view: Tensor) -> _Places:
        """Return how the tokens of ``query_view`` lie in the other view.

        See :func:`agssd.models.fuser.position_bias`.
        """
        affine = views.geometry.globals.affine
        return position_bias(pick(affine, query_view), pick(affine, 1 - query_view), self.grid)

    def _forbidden(self, views: Views, mask: Tensor, distance: Tensor) -> Tensor:
        """Return (R, N, N) bool: key dropout, and the counterparts of some hidden tokens."""
        random = KeyedRandom(self.seed, views.sample, "fuser")
        if len(mask) > len(views.sample):
            random = KeyedRandom.from_keys(random.split(2))
        return forbidden_keys(random, mask, distance, self.key_dropout, self.counterpart_drop)

    def _misplaced(self, attention: Tensor, by_student: _Seen, body: Tensor, views: Views) -> Tensor:
        """Return the cross-entropy () of the aligner's attention (R, V, N) with the true places in the other view."""
        affine, hidden = views.geometry.globals.affine, self._masked(views)
        u, inside = lies_in_other(pick(affine, hidden), pick(affine, 1 - hidden), self.grid)
        targets = place_targets(gather_tokens(u, by_student.shown_index), self.grid, self.align_pitches)
        asked = by_student.is_shown & (inside & body).gather(1, by_student.shown_index)
        return masked_mean(-(targets * attention).sum(-1), asked)

    # ---------------------------------------------------------------- loss

    def _targets(
        self, logits: Tensor, centre: Centre, temperature: float, counts: Tensor | None = None, observe: bool = True
    ) -> Tensor:
        """Return teacher probabilities; while training the centre takes them into account."""
        targets = centre.targets(logits, temperature, counts, observe=observe and self.training)
        return sinkhorn(logits, temperature, counts) if self.assignment == "sinkhorn" else targets

    def pretrain_loss(self, views: Views) -> LossTerms:
        """Return the objective of one micro-batch: ``0.02 cls + 0.2 patch + 10 rec + align`` by default."""
        self._step = None  # frees the last step before this one needs the memory
        now = self.scheduled(self.progress)
        hidden, seen, samples = self._masked(views), self._seen(views), len(views.sample)

        with torch.no_grad():
            by_teacher = cast(Backbone, self.teacher["backbone"]).forward_crops(self._teacher_inputs(views))
            teacher_cls, teacher_tokens = by_teacher.cls, by_teacher.tokens
            attention = None if by_teacher.attention is None else pick(by_teacher.attention, hidden)
            body = body_of(pick(views.foreground, hidden), self.patch)
            clean = pick(views.clean, hidden)
            voxels = patches_of(clean, self.patch)  # (R, N, P)
            mean, scale = patch_scaling(voxels, clean, self.norm_pix)

            def target_of(index: Tensor) -> Tensor:
                return (gather_tokens(voxels, index) - gather_tokens(mean, index)) / gather_tokens(scale, index)

            given = self._scores(views, body, attention, target_of)
            mask, ratio = mask_views(views, hidden, body, self.masks, self.mask_ratio, self.seed, self.progress, given)
            flat_mask = mask.flatten(1)
            index, used = masked_indices(flat_mask, self._limit())
            counts = used & body.gather(1, index)  # (R, M): hidden tokens that hold body

        by_student = self._student_pass(views, mask, index)
        places = self._position_bias(views, hidden) if self.cvaa in ("student", "casa") else None

        # Patches within the masked view.
        asked = self._distilled(views, counts)
        distilled, asked_counts = index.gather(1, asked), counts.gather(1, asked)
        query = gather_tokens(by_student.hidden, asked)
        with torch.no_grad():
            own = pick(teacher_tokens, hidden)
            observed = asked_counts if self.training else None
            teacher_logits = self.teacher["patch_head"](gather_tokens(own, distilled), observed)
            targets = self._targets(teacher_logits, self.centre_patch, now["temperature_patch"], asked_counts)
            if self.cvaa == "teacher":
                targets = self._compensated(views, targets, own, teacher_tokens, distilled, asked_counts, now)
        student_logits = self.student["patch_head"](query) / self.temperature_student
        plain = cross_entropy(targets, student_logits)
        loss_patch = masked_mean(plain, asked_counts)
        fused = None
        if places is not None:
            memory = pick(cast(Tensor, by_student.tokens), 1 - hidden) if self.cvaa == "casa" else None
            temperature = now["temperature_patch"]
            fused = self._fused(
                views, flat_mask, distilled, asked_counts, query, memory, teacher_tokens, places, temperature
            )
            share = now["fused_share"]
            loss_patch = (1 - share) * loss_patch + share * masked_mean(fused, asked_counts)

        # [CLS] between views.
        with torch.no_grad():
            ones = torch.ones_like(teacher_cls[..., 0]) if self.training else None
            cls_logits = self.teacher["cls_head"](teacher_cls, ones)
            cls_targets = self._targets(cls_logits, self.centre_cls, now["temperature_cls"])
            if self.cvaa == "student":
                which = both_views(views) if len(seen) > samples or views.locals is not None else 1 - seen
                fused_cls = self._fused_cls(which, teacher_cls, teacher_tokens)
                fused_targets = self._targets(
                    self.teacher["cls_head"](fused_cls), self.centre_cls, now["temperature_cls"], observe=False
                )
                mixed = torch.lerp(pick(cls_targets, which), fused_targets, now["fused_share_cls"])
                cls_targets = put(cls_targets, which, mixed)
        cls_student = self.student["cls_head"](by_student.cls) / self.temperature_student
        local_student = None
        if by_student.local_cls is not None:
            local_student = self.student["cls_head"](by_student.local_cls) / self.temperature_student
        loss_cls = multi_crop_cross_entropy(
            cls_targets, cls_student, local_student, None if len(seen) > samples else seen
        )

        # Voxels of hidden patches.
        prediction = self.student["reconstruction"](by_student.hidden)
        assert views.edges is not None
        edges = gather_tokens(patches_of(views.edges.expand_as(clean), self.patch), index)
        loss_rec = patch_l1(prediction, target_of(index), 1 + self.reconstruction_edges * edges, counts)

        terms = {"cls": loss_cls, "patch": loss_patch, "rec": loss_rec}
        aligned = None
        if self.weights["align"]:
            aligned = self.student["aligner"](by_student.shown, pick(teacher_tokens, 1 - hidden))
            terms["align"] = self._misplaced(aligned, by_student, body, views)
        if self.weights["koleo"]:
            terms["koleo"] = torch.stack([koleo(one) for one in by_student.cls.unbind(1)]).mean()
        total = torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()
        self._step = AGSSDStep(
            views=views,
            patch=self.patch,
            grid=self.grid,
            hidden=hidden,
            mask=flat_mask,
            counts=counts,
            index=index,
            distilled=distilled,
            distilled_counts=asked_counts,
            teacher_cls=pick(cls_targets, 1 - seen),
            student_cls=cls_student.detach().flatten(0, 1),
            teacher_patch=targets,
            student_patch=student_logits.detach(),
            cls_features=teacher_cls.flatten(0, 1).float(),
            tokens=teacher_tokens,
            prediction=prediction.detach(),
            voxels=voxels,
            scaling=(mean, scale),
            plain=plain.detach(),
            fused=None if fused is None else fused.detach(),
            attention=None if aligned is None else aligned.detach(),
            shown=by_student.shown_index,
            ratio=ratio,
        )
        return LossTerms(total, terms, by_student.shared)

    def _student_pass(self, views: Views, mask: Tensor, index: Tensor) -> _Seen:
        """Return what the student makes of its views.

        Args:
            views: of B samples.
            mask: (R, *grid) bool, True = hidden.
            index: (R, M) int64, positions of hidden tokens.
        """
        hidden, seen, samples = self._masked(views), self._seen(views), len(views.sample)
        network, noise = cast(Backbone, self.student["backbone"]), self._drop_noise(views)
        if self.leaves_out:
            flat = mask.flatten(1)
            worked_out, shown, visible = work_out_hidden(
                self.student, pick(views.inputs, hidden), flat, index, noise[0]
            )
            local_cls = None
            if views.locals is not None:
                local_cls = network.forward_views([views.locals.flatten(0, 1)], None, noise[1:])[0].cls
            shared = (shown.tokens, shown.cls) if local_cls is None else (shown.tokens, shown.cls, local_cls)
            return _Seen(
                cls=shown.cls.unflatten(0, (samples, -1)),
                local_cls=None if local_cls is None else local_cls.unflatten(0, (samples, -1)),
                hidden=worked_out,
                shown=shown.tokens,
                shown_index=visible,
                is_shown=torch.ones_like(visible, dtype=torch.bool),
                tokens=None,
                shared=shared,
            )
        inputs, masks = views.inputs, in_their_views(mask, hidden, samples)
        if len(seen) == samples:
            inputs, masks = pick(inputs, seen)[:, None], pick(masks, seen)[:, None]
        found = network.forward_crops(inputs, views.locals, masks, noise)
        tokens = found.tokens.flatten(0, 1) if len(seen) == len(hidden) else pick(found.tokens, hidden)
        everywhere = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
        return _Seen(
            cls=found.cls,
            local_cls=found.local_cls,
            hidden=gather_tokens(tokens, index),
            shown=tokens,
            shown_index=everywhere,
            is_shown=~mask.flatten(1),
            tokens=found.tokens,
            shared=found.shared,
        )

    def _drop_noise(self, views: Views) -> list[Tensor | None]:
        """Return uniforms per view and block for stochastic depth, keyed by sample; none outside training."""
        groups = (self._num_seen,) if views.locals is None else (self._num_seen, views.locals.shape[1])
        return self.drop_noise(views.sample, *groups)

    def _distilled(self, views: Views, counts: Tensor) -> Tensor:
        """Return (R, A): which of the M hidden tokens the patch term asks for, in order, those that count first."""
        room = counts.shape[1]
        if self.distilled_share == 1.0:
            return torch.arange(room, device=counts.device).expand(len(counts), -1)
        random = KeyedRandom(self.seed, views.sample, "distilled")
        if len(counts) > len(views.sample):
            random = KeyedRandom.from_keys(random.split(2))
        drawn = random.uniform(room) + counts
        return drawn.topk(math.ceil(self.distilled_share * room), 1).indices.sort(1).values

    def _fused(
        self,
        views: Views,
        mask: Tensor,
        distilled: Tensor,
        counts: Tensor,
        query: Tensor,
        student_memory: Tensor | None,
        teacher_tokens: Tensor,
        places: _Places,
        temperature: float,
    ) -> Tensor:
        """Return the cross-entropy (R, A) after fusion of hidden tokens ``query`` (R, A, E) with the other view."""
        hidden = self._masked(views)
        bias, distance = places
        bias = gather_tokens(bias, distilled)
        forbidden = gather_tokens(self._forbidden(views, mask, distance), distilled) if self.training else None
        memory = pick(teacher_tokens, 1 - hidden)
        if student_memory is not None:
            # Alice's one block: the student's with the student's keys, its average with the teacher's as target.
            fused = self.student["fuser"](query, student_memory, bias, forbidden)
            queries = query.detach()
        else:
            fused = self.student["fuser"](query, memory, bias, forbidden)
            queries = gather_tokens(pick(teacher_tokens, hidden), distilled)
        with torch.no_grad():
            logits = self.teacher["patch_head"](self.teacher["fuser"](queries, memory, bias))
            targets = self._targets(logits, self.centre_fused, temperature, counts)
        return cross_entropy(targets, self.student["patch_head"](fused) / self.temperature_student)

    def _fused_cls(self, which: Tensor, teacher_cls: Tensor, teacher_tokens: Tensor) -> Tensor:
        """Return (A, E): the teacher's [CLS] of views ``which`` (A,), fused with the tokens of the other view."""
        query = pick(teacher_cls, which)[:, None]
        fused: Tensor = self.teacher["fuser"](query, pick(teacher_tokens, 1 - which))
        return fused[:, 0]

    def _compensated(
        self,
        views: Views,
        targets: Tensor,
        own: Tensor,
        teacher_tokens: Tensor,
        index: Tensor,
        counts: Tensor,
        now: dict[str, float],
    ) -> Tensor:
        """Return targets mixed with those of the aligned tokens of the other view (``cvaa="teacher"``)."""
        affine = views.geometry.globals.affine
        hidden = self._masked(views)
        u, valid = correspondence(pick(affine, hidden), pick(affine, 1 - hidden), self.grid)
        other = sample_tokens(pick(teacher_tokens, 1 - hidden).float(), self.grid, u)
        agreement = nn.functional.cosine_similarity(own.float(), other, dim=-1).clamp_min(0)
        ramp = now["fused_share"] / self.fused_share if self.fused_share else 0.0
        share = (0.3 * ramp * valid * agreement).gather(1, index)[..., None]
        logits = self.teacher["patch_head"](gather_tokens(other, index))
        aligned = self._targets(logits, self.centre_patch, now["temperature_patch"], counts, observe=False)
        mixed: Tensor = (1 - share) * targets + share * aligned
        return mixed

    def after_optimizer_step(self) -> None:
        """Move the centres, once per optimiser step, from all its samples."""
        self.centre_cls.update(self.scheduled(self.progress).get("balance_cls", 1.0))
        self.centre_patch.update()
        if self.cvaa in ("student", "casa"):
            self.centre_fused.update()
        move_means(self.teacher, self.student)

    # ------------------------------------------------------------ monitors

    @property
    def observations(self) -> Observations | None:
        """Outputs of the last micro-batch for monitors; selected when they are asked for, not in the step."""
        if self._step is None:
            return None
        found = self._step.observations()
        found["centre_norm_cls"] = self.centre_cls.centre.norm()
        found["centre_norm_patch"] = self.centre_patch.centre.norm()
        found["scalars"] |= self.gradient_norms
        return found

    @torch.no_grad()
    def view_panel(self, index: int) -> ViewPanel:
        """Return the views of sample ``index`` of the last micro-batch.

        Raises:
            IndexError: if the batch has no such sample, or no step was taken.
        """
        step = self._step
        if step is None or not 0 <= index < len(step.views.sample):
            raise IndexError(f"sample {index} is not in the last batch")
        panel = step.panel(index, self.masks.score == "region")
        if self._num_seen == 1:
            panel["unseen"] = torch.arange(2, device=step.hidden.device) != step.hidden[index]
        encoder = cast(Backbone, self.teacher["backbone"])
        if encoder.has_cls_attention:
            panel["attention"] = encoder.cls_attention(self._teacher_inputs(step.views)[index])
        return panel
