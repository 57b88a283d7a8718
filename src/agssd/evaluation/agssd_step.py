"""What a step of AG-SSD leaves for monitors: outputs to judge collapse by, figures of its three parts, pictures."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from agssd.evaluation.view_figures import (
    alignment_figures,
    fusion_figures,
    overlap_figures,
    place_figures,
    reconstruction_figures,
)
from agssd.geometry import correspondence, sample_tokens
from agssd.models.aligner import lies_in_other
from agssd.models.fuser import position_bias
from agssd.transforms.edges import patch_scores, patches_of, unpatch
from agssd.transforms.masking import gather_tokens
from agssd.transforms.views import Views, body_of, in_their_views, panel_of, pick
from agssd.types import Observations, Size, ViewPanel


@dataclass
class AGSSDStep:
    """The last step; all detached, and nothing worked out before it is asked for.

    R masked views and S views that the student sees: of each of B samples one or both.
    """

    views: Views
    patch: Size
    grid: Size
    hidden: Tensor  # (R,) which of the two views are masked
    mask: Tensor  # (R, N)
    counts: Tensor  # (R, M) bool
    index: Tensor  # (R, M)
    distilled: Tensor  # (R, A) positions of the hidden tokens of the patch term
    distilled_counts: Tensor  # (R, A) bool
    teacher_cls: Tensor  # (S, K) probabilities
    student_cls: Tensor  # (S, K) logits over the temperature
    teacher_patch: Tensor  # (R, A, K) probabilities
    student_patch: Tensor  # (R, A, K) logits over the temperature
    cls_features: Tensor  # (2B, E)
    tokens: Tensor  # (B, 2, N, E) teacher
    prediction: Tensor  # (R, M, P) of hidden patches, in units of their targets
    voxels: Tensor  # (R, N, P) intensities
    scaling: tuple[Tensor, Tensor]  # mean and scale (R, N, 1) that voxels become targets by
    plain: Tensor  # (R, A) cross-entropy without fusion
    fused: Tensor | None  # (R, A) with
    attention: Tensor | None  # (R, V, N) log-attention of shown tokens over the other view, by the aligner
    shown: Tensor  # (R, V) their positions
    ratio: Tensor  # (R,) nominal

    @property
    def target(self) -> Tensor:
        """(R, M, P) intensities of the hidden patches."""
        return gather_tokens(self.voxels, self.index)

    @property
    def predicted(self) -> Tensor:
        """(R, M, P) intensities; with ``norm_pix`` each patch's own mean and spread are given to what is predicted."""
        mean, scale = (gather_tokens(x, self.index) for x in self.scaling)
        return self.prediction * scale + mean

    @torch.no_grad()
    def observations(self) -> Observations:
        """Return outputs for monitors of collapse; ``scalars`` are :meth:`figures`."""
        tokens = gather_tokens(pick(self.tokens, self.hidden), self.distilled)
        return {
            "teacher_cls": self.teacher_cls,
            "student_cls": self.student_cls,
            "teacher_patch": self.teacher_patch[self.distilled_counts],
            "student_patch": self.student_patch[self.distilled_counts],
            "cls_features": self.cls_features,
            "patch_features": tokens[self.distilled_counts].float(),
            "scalars": self.figures(),
        }

    @torch.no_grad()
    def figures(self) -> dict[str, Tensor]:
        """Return AG-SSD's own figures of docs/method.md (c), each (); NaN where nothing could be measured."""
        views, counts, hidden = self.views, self.counts, self.hidden
        assert views.edges is not None
        scores = patch_scores(views.edges, self.patch)
        affine = views.geometry.globals.affine
        own, other = pick(affine, hidden), pick(affine, 1 - hidden)
        u, valid = correspondence(own, other, self.grid)
        aligned = sample_tokens(pick(self.tokens, 1 - hidden).float(), self.grid, u)
        figures = {
            **overlap_figures(views.geometry),
            "mask_ratio_nominal": self.ratio.mean(),
            "mask_ratio": self.mask.float().mean(),
            "mask_foreground": counts.sum() / self.mask.sum().clamp_min(1),
            "mask_edge_mass": (scores * self.mask).sum() / scores.sum().clamp_min(1e-6),
            "overlap_tokens": valid.float().mean(),
            **alignment_figures(pick(self.tokens, hidden), aligned, valid),
        }
        if self.attention is not None:
            body = body_of(pick(views.foreground, hidden), self.patch)
            _, inside = lies_in_other(own, other, self.grid)
            asked = (inside & body & ~self.mask).gather(1, self.shown)
            figures |= place_figures(self.attention, self.shown, position_bias(own, other, self.grid)[1], asked)
        if self.fused is not None:
            figures |= fusion_figures(self.plain, self.fused, self.distilled_counts & valid.gather(1, self.distilled))
        edges = scores.gather(1, self.index)
        is_ct = views.is_ct.repeat_interleave(len(hidden) // len(views.sample))
        return figures | reconstruction_figures(self.predicted, self.target, counts, edges, is_ct)

    @torch.no_grad()
    def panel(self, index: int, boundaries: bool) -> ViewPanel:
        """Return the views of a sample, masked and reconstructed.

        Args:
            index: of the sample in the micro-batch.
            boundaries: draw boundaries of regions in the place of edges.
        """
        views, hidden = self.views, self.hidden
        per_sample = len(hidden) // len(views.sample)
        reconstruction, predicted = views.clean[index, :, 0].clone(), self.predicted
        for row in range(index * per_sample, (index + 1) * per_sample):
            patches = patches_of(views.clean[index, hidden[row]][None], self.patch).clone()
            shown = self.mask[row].gather(0, self.index[row])
            patches[0, self.index[row][shown]] = predicted[row][shown].to(patches.dtype)
            reconstruction[hidden[row]] = unpatch(patches, self.grid, self.patch)[0, 0]
        masks = in_their_views(self.mask.unflatten(1, self.grid), hidden, len(views.sample))
        return panel_of(views, index, masks, reconstruction, boundaries)
