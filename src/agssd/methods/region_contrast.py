"""ANAUS: regions of the anatomy find themselves in another view, and the core that two views share is told clean."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from agssd.geometry import shrink_into_views
from agssd.losses.distillation import masked_mean, refuse_temperatures
from agssd.losses.info_nce import region_info_nce
from agssd.losses.similarity import cosine_distance
from agssd.methods.base import PretrainModule
from agssd.models.backbone import Backbone
from agssd.models.heads import ProjectionHead
from agssd.models.pyramid import FeaturePyramid, average_cells
from agssd.transforms.corruption import Corruption
from agssd.transforms.crops import OverlapCrops, box_views, extract_with_body
from agssd.transforms.edges import MIN_FOREGROUND
from agssd.transforms.intensity import Appearance
from agssd.transforms.keyed_random import KeyedRandom
from agssd.transforms.regions import RegionSlots, draw_regions
from agssd.transforms.views import Views, make_views, panel_of, parent_image
from agssd.types import Features, LossTerms, Observations, ParentBatch, Size, ViewPanel

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class RegionViews:
    """Two views of each sample, the regions to look at, and the core that both views show."""

    views: Views
    numbers: Tensor  # (B, K) int64: regions that both views hold; 0 where there is none
    core_box: Tensor  # (B, d, 2) float32, edges in parent voxels
    core: Tensor  # (B, 1, C, [D,] H, W) float32 in the model's range, clean
    core_inputs: Tensor  # (B, 1, C, [D,] H, W) the same, corrupted
    core_body: Tensor  # (B, 1, 1, [D,] H, W) float32, 1 = body; 0 everywhere where the core does not count

    @property
    def sample(self) -> Tensor:
        """(B,) int64."""
        return self.views.sample


class RegionContrast(PretrainModule):
    """Region contrast and context: a region finds itself in the other view; a corrupted core predicts the clean one.

    *Contrast.* K regions per sample, among those that both views hold, each described by the mean of a feature map over
    its voxels, at several scales. The student's prediction of a region in one view finds the teacher's projection of
    the same region in the other view among all other regions of both views and of all images.

    *Context.* The box that both views share is cut from the parent and corrupted (shuffled, changed in contrast,
    painted over); from it the student predicts the teacher's projection of the same box, clean, cell by cell at every
    scale.

    Source: ANAUS, arXiv 2605.25402 [paper]: anatomy masks of any source, four scales, K = 16, projector 256-1024-256,
    predictor 256-4096-256, temperature 0.1, both terms at weight 1 and summed over scales, probabilities of the
    corruption, ten boxes; the contrast is that of DetCon, arXiv 2103.10957 [R: DetCon].
    Deviates: both views look at the same regions, drawn without repetition as far as there are enough (ours; there each
    view draws by itself, and what the other did not draw has no positive); regions drawn m times count 1/m among
    negatives too (ours); what is nearly absent from a view, ``min_share``, is not drawn (ours). Scales are the
    levels of an encoder that has several, and a pyramid made of the last tokens of a ViT
    (:class:`agssd.models.pyramid.FeaturePyramid`); one projector per scale, one predictor for all (ours: not known).
    The core is the true intersection of the views: it lies in the parent as a box, unturned, and is resampled to the
    size of a view; where views are rotated beyond quarter turns, the box is shrunk about its middle until it lies in
    both, and a sample in which a tenth of its edges is still too much has no core (ours). The prediction is compared
    by its direction, 2 - 2 cos, where the paper has a squared error, in cells of the core that hold body (ours); boxes
    are one to ten, and curves invert no CT. The teacher moves once per optimiser step, where the released trainer
    moves it at every scale. The teacher holds a copy of the predictor too, which is not read. The heads standardise
    over the regions or cells of a view and not over the batch (ours, see :class:`agssd.models.heads.PointNorm`; with
    layer norm the second term makes all features alike), with GELU; AdamW in place of LARS; our views, encoder and
    schedules. [CLS] learns only through attention.

    Negatives of the batch are those of a micro-batch of all ranks, so accumulation changes the result: fewer negatives.

    Args:
        backbone: the student's encoder; the teacher is its copy.
        views: sampler of the views; local ones are not used.
        num_regions: K, regions per sample.
        min_share: a view holds a region if this share of its voxels belongs to it.
        num_scales: feature maps to read; an encoder with fewer levels gives all it has. A map of one cell, where views
            are small, tells no regions apart and counts 0 in both terms.
        core_cells: the core is predicted in so many cells per axis, or in as many as its map has.
        weight_context: weight of the core's term.
        head_hidden: width of the projectors' hidden layer.
        predictor_hidden: width of the predictor's hidden layer.
        head_dim: width of the projection.
        temperature: of the contrast.
        negatives: ``"batch"`` are the other regions of both views and of all images of all ranks [paper];
            ``"image"`` those of the same image alone (ours). Other bodies hold the same organs, which the first pushes
            apart; the second leaves them alone, and nothing depends on how the batch is cut.
        prob_shuffle: share of cores whose voxels are shuffled in windows.
        prob_curve: share of cores whose intensities go through a Bezier curve; half of them inverted, but on CT.
        prob_paint: share of cores with boxes of noise.
        appearance: settings of :class:`agssd.transforms.intensity.Appearance` that differ from its defaults.
        lr: peak learning rate.
        min_lr: last learning rate.
        warmup: share of the run.
        weight_decay: first and last.
        betas: of AdamW.
        seed: of views, regions, corruptions and appearance.
        compile: compile the encoders block by block with ``torch.compile``.

    Raises:
        ValueError: if a number is below 1, ``min_share`` is no share of a view, or every map has a single cell.
    """

    needs_regions = True

    def __init__(
        self,
        backbone: Backbone,
        views: OverlapCrops,
        num_regions: int = 16,
        min_share: float = 0.0005,
        num_scales: int = 4,
        core_cells: int = 4,
        weight_context: float = 1.0,
        head_hidden: int = 1024,
        predictor_hidden: int = 4096,
        head_dim: int = 256,
        temperature: float = 0.1,
        negatives: Literal["batch", "image"] = "batch",
        prob_shuffle: float = 0.8,
        prob_curve: float = 0.9,
        prob_paint: float = 1.0,
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
        refuse_temperatures(temperature=temperature)
        if min(num_regions, core_cells, predictor_hidden) < 1:
            raise ValueError(
                f"num_regions is {num_regions}, core_cells {core_cells} and predictor_hidden {predictor_hidden}; "
                "give at least 1 each"
            )
        if not 0 <= min_share < 1:
            raise ValueError(f"min_share is {min_share}; give a share of a view's voxels, 0.0005 say")
        self.views = views
        self.appearance = Appearance.of(appearance)
        self.corruption = Corruption(prob_shuffle, prob_curve, False, prob_paint, prob_out=0.0, max_boxes=10)
        self.num_regions = num_regions
        self.min_voxels = max(1, round(min_share * torch.Size(views.size_vox).numel()))
        self.core_cells = core_cells
        self.temperature = temperature
        if negatives not in ("batch", "image"):
            raise ValueError(f"negatives is {negatives!r}; give 'batch' or 'image'")
        self.own_image = negatives == "image"
        self.weights = {"context": weight_context}
        backbone.token_grid(views.size_vox)
        backbone.freeze_mask_token()
        pyramid = FeaturePyramid(backbone, num_scales)
        self.tells = [math.prod(cells) > 1 for cells in pyramid.grids(backbone, views.size_vox)]
        if not any(self.tells):
            raise ValueError(
                f"of views of {tuple(views.size_vox)} voxels the encoder gives maps of one cell, in which no regions "
                "can be told apart; give a larger views.size_vox or an encoder of smaller strides"
            )
        if not all(self.tells):
            _LOG.warning(
                "of views of %s voxels %d of the %d maps have one cell, in which no regions can be told apart; they "
                "are left out of the loss",
                tuple(views.size_vox),
                self.tells.count(False),
                len(self.tells),
            )
        self.student = nn.ModuleDict(
            {
                "backbone": backbone,
                "pyramid": pyramid,
                "projectors": nn.ModuleList(
                    ProjectionHead(width, head_hidden, head_dim, 2, over_points=True) for width in pyramid.channels
                ),
                "predictor": ProjectionHead(head_dim, predictor_hidden, head_dim, 2, over_points=True),
            }
        )
        self.build_teacher()
        self._step: tuple[RegionViews, Tensor, Tensor] | None = None

    @property
    def couples_samples(self) -> tuple[str, ...]:
        """The negatives, where they come from the batch."""
        return () if self.own_image else ("negatives",)

    def make_views(self, batch: ParentBatch) -> RegionViews:
        """Cut two global views from every parent, and the core that they share; draw the regions."""
        views = make_views(batch, self.views, self.appearance, self.seed, with_locals=False)
        random = KeyedRandom(self.seed, views.sample, "regions")
        numbers = draw_regions(views.known_regions(), self.num_regions, self.min_voxels, random)
        box, fits = shrink_into_views(views.geometry.overlap_box, views.geometry.globals.affine)
        place = box_views(box[:, None, :, 0], (box[..., 1] - box[..., 0])[:, None])
        core, body = extract_with_body(parent_image(batch), batch["foreground"], place, views.size_vox)
        body = body & fits.view(-1, *[1] * (body.ndim - 1))
        corrupted = self.corruption(core, views.is_ct, self.seed, views.sample)
        return RegionViews(views, numbers, box, core, corrupted, body.float())

    def pretrain_loss(self, given: RegionViews) -> LossTerms:
        """Return the contrast of regions and the distance of the predicted core, each summed over scales."""
        self._step = None  # frees the last step before this one needs the memory
        inputs = given.views.inputs.flatten(0, 1)
        with torch.no_grad():
            seen, targets = _look(self.teacher, torch.cat([inputs, given.core.flatten(0, 1)]))
        noise = [part for part in self.drop_noise(given.sample, 2, 1) if part is not None]
        images = torch.cat([inputs, given.core_inputs.flatten(0, 1)])
        own, maps = _look(self.student, images, torch.cat(noise) if noise else None)
        numbers = given.numbers[:, None].expand(-1, 2, -1)
        contrast = context = torch.zeros((), device=inputs.device)
        slots = RegionSlots(given.views.known_regions().flatten(0, 2), given.numbers.repeat_interleave(2, 0))
        spreads: dict[Size, Tensor] = {}  # by the cells of a map
        with torch.autocast(inputs.device.type, enabled=False):
            for scale, (map_, target) in enumerate(zip(maps, targets, strict=True)):  # (3B, *cells, C) each
                (told, told_core), (wanted, wanted_core) = (m.tensor_split([len(inputs)]) for m in (map_, target))
                spread = spreads[tuple(map_.shape[1:-1])] = slots.weights(tuple(map_.shape[1:-1]))
                regions = self._project(scale, _means(spread, told), _means(spread, wanted))
                counts = float(self.tells[scale])  # 0 leaves the parameters in the graph
                contrast = contrast + counts * region_info_nce(*regions, numbers, self.temperature, self.own_image)
                cells = tuple(min(n, self.core_cells) for n in map_.shape[1:-1])
                core = [average_cells(m, cells).flatten(1, -2) for m in (told_core, wanted_core)]
                body = average_cells(given.core_body[:, 0].movedim(1, -1), cells).flatten(1) >= MIN_FOREGROUND
                context = context + counts * masked_mean(cosine_distance(*self._project(scale, *core)), body)
            of_tokens = spreads[seen.grid] if seen.grid in spreads else slots.weights(seen.grid)
            tokens = seen.tokens[: len(inputs)].unflatten(1, seen.grid)
            self._step = (given, tokens.flatten(1, -2).mean(1), _means(of_tokens, tokens))
        total = contrast + self.weights["context"] * context
        shared = cast(FeaturePyramid, self.student["pyramid"]).reads(own)
        return LossTerms(total, {"contrast": contrast, "context": context}, shared)

    def _project(self, scale: int, told: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Return the student's prediction from features (..., C) of one scale, and the teacher's projection."""
        student, teacher = (cast(nn.ModuleList, net["projectors"])[scale] for net in (self.student, self.teacher))
        return self.student["predictor"](student(told)), teacher(wanted)

    # ------------------------------------------------------------ monitors

    @property
    def observations(self) -> Observations | None:
        """Mean tokens and mean features of regions of the last micro-batch, the teacher's.

        ``region_margin`` is how much more alike one region is in both views than different regions of one image are.
        """
        if self._step is None:
            return None
        given, tokens, features = self._step
        known = given.numbers > 0
        cosines = torch.cosine_similarity(features[:, 0, :, None], features[:, 1, None], dim=-1)  # (B, K, K)
        same = given.numbers[:, :, None] == given.numbers[:, None]
        both = known[:, :, None] & known[:, None]
        alike, apart = ((cosines * pairs).sum() / pairs.sum().clamp_min(1) for pairs in (same & both, ~same & both))
        figures = {
            "overlap": given.views.geometry.overlap.mean(),
            "regions": (known / same.sum(-1)).sum(1).mean(),
            "core_body": given.core_body.mean(),
            "region_margin": alike - apart,
        }
        return {
            "cls_features": tokens.float(),
            "patch_features": features[known[:, None].expand(-1, 2, -1)],
            "scalars": figures | self.gradient_norms,
        }

    @torch.no_grad()
    def view_panel(self, index: int) -> ViewPanel:
        """Return the views of sample ``index`` of the last micro-batch, and its core, corrupted and clean."""
        if self._step is None:
            return panel_of(None, index)
        given = self._step[0]
        panel = panel_of(given.views, index, boundaries=True)
        panel["core"] = torch.cat([given.core_inputs[index, :, 0], given.core[index, :, 0]])
        return panel


def _look(network: nn.ModuleDict, images: Tensor, drop_noise: Tensor | None = None) -> tuple[Features, list[Tensor]]:
    """Return the encoder's features of images, and maps (V, *cells, C) at every scale."""
    features: Features = network["backbone"](images, drop_noise)
    pyramid = cast(FeaturePyramid, network["pyramid"])
    return features, pyramid(*pyramid.reads(features), grid=features.grid)


def _means(spread: Tensor, maps: Tensor) -> Tensor:
    """Return (B, 2, K, C) float32: means of maps (2B, *cells, C) over regions."""
    means: Tensor = (spread @ maps.flatten(1, -2).float()).unflatten(0, (-1, 2))
    return means
