"""S2DC: the tokens of two views are matched by optimal transport, and samples are told apart by a queue."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from agssd.geometry import mutual_neighbours
from agssd.losses.distillation import masked_mean
from agssd.losses.info_nce import KeyQueue, first_among_all
from agssd.losses.optimal_transport import DustbinTransport
from agssd.losses.token_matching import TokenPairs, consistency, discrepancy, mean_where
from agssd.methods.base import PretrainModule
from agssd.models.backbone import Backbone
from agssd.models.heads import ProjectionHead
from agssd.transforms.crops import OverlapCrops
from agssd.transforms.intensity import Appearance
from agssd.transforms.views import Views, body_of, make_views, panel_of
from agssd.types import LossTerms, Observations, ParentBatch, ViewPanel


class _Matched(NamedTuple):
    """What matching the tokens of V pairs of views gives."""

    discrepancy: Tensor  # (V,)
    consistency: Tensor  # (V,)
    log_mass: Tensor  # (V, N) log of the plan at each row's counterpart
    log_dustbin: Tensor  # (V, N) log of each row's share in the dustbin
    margin: Tensor  # (V,) cosine of counterparts minus that of others


class _Step(NamedTuple):
    """What the last micro-batch leaves for monitors."""

    views: Views
    pairs: TokenPairs  # of the 2B pairs of views
    matched: _Matched
    found: Tensor  # (B, 2) bool, whether a view is nearest to its own key
    cls: Tensor  # (B, 2, E) teacher
    tokens: Tensor  # (B, 2, N, E) teacher


class S2DC(PretrainModule):
    """Shift-invariant matching: each token of a view finds its own place in the other, and a sample itself.

    The student sees a view as it is, the teacher the other one after changes of intensity, and the reverse. Their
    tokens' counterparts are known from the affines. Three terms:

    - ``discrepancy``: an optimal transport plan with a dustbin puts tokens on their counterparts;
    - ``consistency``: counterparts are alike, the sharpest tokens first, and other tokens are not;
    - ``global``: the [CLS] of a view finds that of the other among the keys of earlier samples.

    Source: S2DC, ICCV 2025, arXiv 2507.02581 [paper: terms, weights, encoder]; formulas [R: S2DC, released code].
    Deviates: pairs come from our overlapping views in 3D, of any scale and orientation, where the paper turns a region
    in its plane and matches z-slab by z-slab; so tokens may lie outside the other view, and the dustbin is their target
    (ours, see :func:`agssd.losses.token_matching.discrepancy`); tokens of air take part in nothing (ours); temperature
    0.1 and a learned dustbin from 0 (ours, see :class:`agssd.losses.optimal_transport.DustbinTransport`); the paper's
    three versions of an input become two views, each seen clean by the student and changed by the teacher; negatives of
    the global term are keys of earlier steps alone (paper: other tiles of the same volume too), normalised like the
    queries, which the released code forgets, one per sample, seen from their running mean in place of batch norm and
    put in once per optimiser step (ours, see :class:`agssd.losses.info_nce.KeyQueue`); the teacher moves after
    the step and not in the forward pass; heads standardise over the points of a view or over channels in place of batch
    norm (ours, see :class:`agssd.models.heads.ProjectionHead`); our encoder and schedules.

    Args:
        backbone: the student's encoder; the teacher is its copy.
        views: sampler of the views; local ones are not used.
        head_hidden: width of the hidden layers of both projectors.
        head_dim: width of the projections.
        transport_temperature: that cosines are divided by before the transport.
        dustbin: score of the dustbin, a cosine; where it starts if it is learned.
        learn_dustbin: make it a parameter.
        transport_iterations: pairs of normalisations.
        matched_at_once: pairs of views whose tokens are matched at a time; fewer need less memory and give the same.
            None takes all, 2 per sample.
        contrast_temperature: of the global term.
        queue_size: number of negatives of the global term.
        weight_discrepancy: weight of the transport.
        weight_consistency: weight of the similarities.
        weight_global: weight of the contrast.
        appearance: settings of :class:`agssd.transforms.intensity.Appearance` that differ from its defaults.
        lr: peak learning rate.
        min_lr: last learning rate.
        warmup: share of the run.
        weight_decay: first and last.
        betas: of AdamW.
        seed: of views, appearance and the queue's first keys.
        compile: compile the encoders block by block with ``torch.compile``.

    Raises:
        ValueError: if a temperature, a size or a number of iterations is out of range.
    """

    def __init__(
        self,
        backbone: Backbone,
        views: OverlapCrops,
        head_hidden: int = 2048,
        head_dim: int = 512,
        transport_temperature: float = 0.1,
        dustbin: float = 0.0,
        learn_dustbin: bool = True,
        transport_iterations: int = 100,
        matched_at_once: int | None = None,
        contrast_temperature: float = 0.9,
        queue_size: int = 1440,
        weight_discrepancy: float = 0.5,
        weight_consistency: float = 0.5,
        weight_global: float = 0.5,
        appearance: dict[str, float] | None = None,
        lr: float = 3e-4,
        min_lr: float = 1e-6,
        warmup: float = 0.005,
        weight_decay: tuple[float, float] = (0.1, 0.1),
        betas: tuple[float, float] = (0.9, 0.999),
        seed: int = 0,
        compile: bool = False,
    ) -> None:
        super().__init__(lr, min_lr, warmup, weight_decay, betas, 0.0, seed, compile)
        self.save_hyperparameters(ignore=["backbone", "views"])
        if matched_at_once is not None and matched_at_once < 1:
            raise ValueError(f"matched_at_once is {matched_at_once}; give at least 1, or null for all")
        if contrast_temperature <= 0:
            raise ValueError(f"contrast_temperature is {contrast_temperature}; give a number above 0, 0.9 say")
        self.views = views
        self.appearance = Appearance.of(appearance)
        self.matched_at_once = matched_at_once
        self.contrast_temperature = contrast_temperature
        self.weights = {
            "discrepancy": weight_discrepancy,
            "consistency": weight_consistency,
            "global": weight_global,
        }
        self.patch = backbone.patch_size
        self.grid = backbone.token_grid(views.size_vox)
        backbone.freeze_mask_token()
        width = backbone.embed_dim
        heads = {
            "token_head": ProjectionHead(width, head_hidden, head_dim, layers=3, over_points=True),
            "global_head": ProjectionHead(width, head_hidden, head_dim, layers=3),
            "transport": DustbinTransport(transport_temperature, dustbin, learn_dustbin, transport_iterations),
        }
        self.student = nn.ModuleDict({"backbone": backbone, **heads})
        self.build_teacher()
        self.queue = KeyQueue(queue_size, head_dim, seed=seed)
        self._step: _Step | None = None

    def make_views(self, batch: ParentBatch) -> Views:
        """Cut two global views from every parent."""
        return make_views(batch, self.views, self.appearance, self.seed, with_locals=False)

    def pretrain_loss(self, views: Views) -> LossTerms:
        """Return the three terms, each from the clean view of the student to the changed other view of the teacher."""
        self._step = None  # frees the last step before this one needs the memory
        pairs = self._pairs(views)
        with torch.no_grad():
            seen = cast(Backbone, self.teacher["backbone"]).forward_crops(views.inputs)
            token_keys: Tensor = self.teacher["token_head"](seen.tokens)  # (B, 2, N, head_dim)
            keys: Tensor = self.teacher["global_head"](seen.cls)  # (B, 2, head_dim)
        noise = self.drop_noise(views.sample, 2)
        own = cast(Backbone, self.student["backbone"]).forward_crops(views.clean, drop_noise=noise)

        queries: Tensor = self.student["token_head"](own.tokens)
        matched = self._match(queries.flatten(0, 1), token_keys.flip(1).flatten(0, 1), pairs)
        alike = self.queue.cosines(self.student["global_head"](own.cls), keys.flip(1))  # (B, 2, 1 + queue)
        if self.training:
            self.queue.observe(keys[:, 0], views.sample)
        terms = {
            "discrepancy": matched.discrepancy.mean(),
            "consistency": matched.consistency.mean(),
            "global": first_among_all(alike, self.contrast_temperature).mean(),
        }
        total = torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()
        matched = _Matched(*(x.detach() for x in matched))
        self._step = _Step(views, pairs, matched, alike.detach().argmax(-1) == 0, seen.cls, seen.tokens)
        return LossTerms(total, terms, own.shared)

    def after_optimizer_step(self) -> None:
        """Move the queue, once per optimiser step, by all its samples."""
        self.queue.update()

    @torch.no_grad()
    def _pairs(self, views: Views) -> TokenPairs:
        """Return the pairs of the 2B pairs of views: rows of each view, columns of the other."""
        affine = views.geometry.globals.affine
        first, second = affine.flatten(0, 1), affine.flip(1).flatten(0, 1)
        body = body_of(views.foreground.flatten(0, 1), self.patch)
        other_body = body.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
        partner, mutual, inside = mutual_neighbours(first, second, self.grid)
        other_inside = inside.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
        paired = mutual & body & other_body.gather(1, partner)
        return TokenPairs(partner, paired, body, other_body, body & ~inside, other_body & ~other_inside)

    def _match(self, queries: Tensor, keys: Tensor, pairs: TokenPairs) -> _Matched:
        """Return what the losses say of V pairs of views, all at once or a few at a time.

        Args:
            queries: (V, N, head_dim) of the student.
            keys: (V, N, head_dim) of the teacher.
            pairs: the truth.
        """
        if self.matched_at_once is None or self.matched_at_once >= len(queries):
            return self._match_few(queries, keys, *pairs)
        parts = zip(*(x.split(self.matched_at_once) for x in (queries, keys, *pairs)), strict=True)
        done = [checkpoint(self._match_few, *part, use_reentrant=False) for part in parts]
        return _Matched(*(torch.cat(values) for values in zip(*done, strict=True)))

    def _match_few(self, queries: Tensor, keys: Tensor, *pairs: Tensor) -> _Matched:
        truth = TokenPairs(*pairs)
        with torch.autocast(queries.device.type, enabled=False):
            cosines = F.normalize(queries.float(), dim=-1, eps=1e-6) @ F.normalize(keys.float(), dim=-1, eps=1e-6).mT
            log_plan: Tensor = self.student["transport"](cosines, truth.rows, truth.columns)
            margin = mean_where(truth.of_partner(cosines), truth.paired) - mean_where(cosines, truth.others)
            return _Matched(
                discrepancy=discrepancy(log_plan, truth),
                consistency=consistency(cosines, truth),
                log_mass=truth.of_partner(log_plan[:, :-1, :-1]),
                log_dustbin=log_plan[:, :-1, -1],
                margin=margin,
            )

    # ------------------------------------------------------------ monitors

    @property
    def observations(self) -> Observations | None:
        """Outputs of the last micro-batch for monitors: where the mass goes, and how alike counterparts are.

        ``matching_margin`` is that of the projections that the losses see, ``correspondence_margin`` that of the
        teacher's tokens before the head.
        """
        if self._step is None:
            return None
        views, pairs, matched, found, cls, tokens = self._step
        with torch.no_grad():
            rows, others = tokens.flatten(0, 1).float(), tokens.flip(1).flatten(0, 1).float()
            index = pairs.partner[..., None].expand_as(others)
            same = torch.cosine_similarity(rows, others.gather(1, index), dim=-1)
            random = torch.cosine_similarity(rows, others.gather(1, index.roll(1, 1)), dim=-1)
            share = matched.log_dustbin.exp()
            figures = {
                "overlap": views.geometry.overlap.mean(),
                "valid_pairs": pairs.paired.float().sum(1).mean(),
                "log_pair_mass": mean_where(matched.log_mass, pairs.paired).mean(),
                "dustbin": cast(DustbinTransport, self.student["transport"]).dustbin.detach().squeeze().clone(),
                "dustbin_share_paired": mean_where(share, pairs.paired).mean(),
                "dustbin_share_lost": masked_mean(share, pairs.lost_rows),
                "matching_margin": matched.margin.mean(),
                "correspondence_margin": masked_mean(same - random, pairs.paired),
                "own_key_found": found.float().mean(),
                "queue_fill": self.queue.fill,
            }
        return {
            "cls_features": cls.flatten(0, 1).float(),
            "patch_features": tokens.flatten(0, 1)[pairs.rows].float(),
            "scalars": figures | self.gradient_norms,
        }

    @torch.no_grad()
    def view_panel(self, index: int) -> ViewPanel:
        """Return the views of sample ``index`` of the last micro-batch."""
        return panel_of(None if self._step is None else self._step.views, index)
