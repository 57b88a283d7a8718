"""VoCo: a crop tells where it lies by its similarity to base crops of the same volume."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agssd.geometry import constant
from agssd.losses.position_contrast import base_orthogonality, position_loss
from agssd.methods.base import PretrainModule
from agssd.models.backbone import Backbone
from agssd.models.heads import ProjectionHead
from agssd.transforms.crops import OverlapCrops, box_share, box_views, extract
from agssd.transforms.edges import MIN_FOREGROUND
from agssd.transforms.keyed_random import KeyedRandom
from agssd.transforms.views import parent_image
from agssd.types import LossTerms, Observations, ParentBatch, Size, ViewPanel


@dataclass(frozen=True)
class PositionViews:
    """Random crops and base crops of one micro-batch, in the parent's orientation."""

    sample: Tensor  # (B,) int64
    crops: Tensor  # (B, m, C, D, H, W) float32 in the model's range
    bases: Tensor  # (B, n, C, D, H, W), the cells of a grid over the parent
    overlap: Tensor  # (B, m, n) float32: share of each crop in each base; the shares of a crop sum to 1
    counts: Tensor  # (B, n) bool: bases that hold body


class VoCo(PretrainModule):
    """Volume contrast: similarity to each base crop equals the share of the crop that lies in it.

    The parent is cut into a grid of base crops; random crops of the same size lie anywhere in it. Crops of the student
    are compared with bases of the teacher and the reverse; bases of one volume are pushed towards orthogonality.

    Source: Wu, Zhuang and Chen, CVPR 2024, arXiv 2402.17300, eq. 3 and 4 [paper]; both directions of comparison,
    sizes of the projector [R: VoCo, released code, whose loss is another one: it weighs bases that are overlapped
    and others apart, and squares similarities].
    Deviates: [CLS] stands for the pooled maps of all stages; crops move, and overlap, on all three axes, where the
    released code moves them in the plane; no flips or shifts of intensity; bases without body (less than 5 %) take
    part in nothing (ours: crops of air are alike and cannot be orthogonal); a crop that points away from a base it
    overlaps is still pulled, where the released ReLU has no gradient (ours); layer norm and GELU in place of batch
    norm and ReLU in the projector (ours); the teacher moves once per optimiser step instead of in the forward pass;
    the grid of bases fits parents of about 1.75 views per axis (ours; paper 4 x 4 cells of a whole scan); our
    encoder and schedules.

    Args:
        backbone: the student's encoder; the teacher is its copy.
        views: gives the size in voxels to which crops are resampled; nothing else of it is used.
        base_grid: base crops per axis of the parent.
        num_crops: random crops per sample.
        head_hidden: width of the projector's hidden layers.
        head_dim: width of the projection.
        weight_orthogonality: weight of the bases' term.
        lr: peak learning rate.
        min_lr: last learning rate.
        warmup: share of the run.
        weight_decay: first and last.
        betas: of AdamW.
        seed: of the crops.
        compile: compile the encoders block by block with ``torch.compile``.

    Raises:
        ValueError: if ``base_grid`` has fewer than two cells, or ``num_crops`` is below 1.
    """

    def __init__(
        self,
        backbone: Backbone,
        views: OverlapCrops,
        base_grid: Size = (2, 2, 2),
        num_crops: int = 2,
        head_hidden: int = 2048,
        head_dim: int = 2048,
        weight_orthogonality: float = 1.0,
        lr: float = 1e-4,
        min_lr: float = 1e-6,
        warmup: float = 0.02,
        weight_decay: tuple[float, float] = (0.01, 0.01),
        betas: tuple[float, float] = (0.9, 0.999),
        seed: int = 0,
        compile: bool = False,
    ) -> None:
        super().__init__(lr, min_lr, warmup, weight_decay, betas, 0.0, seed, compile)
        self.save_hyperparameters(ignore=["backbone", "views"])
        if min(base_grid) < 1 or max(base_grid) < 2:
            raise ValueError(f"base_grid is {tuple(base_grid)}; give at least two cells, (2, 2, 2), say")
        if len(base_grid) != len(views.size_vox):
            raise ValueError(
                f"base_grid is {tuple(base_grid)}, but views.size_vox {views.size_vox} has {len(views.size_vox)} axes; "
                f"give {len(views.size_vox)} numbers"
            )
        if num_crops < 1:
            raise ValueError(f"num_crops is {num_crops}; give at least 1")
        self.size_vox = views.size_vox
        self.base_grid: Size = tuple(base_grid)
        self.num_crops = num_crops
        self.weights = {"orthogonality": weight_orthogonality}
        backbone.token_grid(views.size_vox)
        backbone.freeze_mask_token()
        projector = ProjectionHead(backbone.embed_dim, head_hidden, head_dim, layers=3)
        self.student = nn.ModuleDict({"backbone": backbone, "projector": projector})
        self.build_teacher()
        self._step: tuple[PositionViews, Tensor, Tensor] | None = None

    def make_views(self, batch: ParentBatch) -> PositionViews:
        """Cut the base crops, and random crops of their size, from every parent."""
        sample = batch["sample"]
        parent = parent_image(batch)
        shape = constant(tuple(parent.shape[2:]), parent.device)
        edge = shape / constant(self.base_grid, parent.device)  # (d,)
        cells = torch.cartesian_prod(*(torch.arange(n, device=parent.device) for n in self.base_grid))
        base_low = (cells * edge).expand(len(sample), -1, -1)  # (B, n, 3)
        place = KeyedRandom(self.seed, sample, "position crops").uniform(self.num_crops, len(edge))
        low = place * (shape - edge)  # (B, m, 3)
        shared = (
            torch.minimum(low[:, :, None], base_low[:, None]) + edge - torch.maximum(low[:, :, None], base_low[:, None])
        )
        cut = extract(parent, box_views(torch.cat([low, base_low], 1), edge), self.size_vox)
        return PositionViews(
            sample=sample,
            crops=cut[:, : self.num_crops],
            bases=cut[:, self.num_crops :],
            overlap=(shared.clamp_min(0) / edge).prod(-1),
            counts=box_share(batch["foreground"], base_low, base_low + edge) >= MIN_FOREGROUND,
        )

    def pretrain_loss(self, views: PositionViews) -> LossTerms:
        """Return the loss of positions and that of the bases' similarities."""
        self._step = None  # frees the last step before this one needs the memory
        inputs = torch.cat([views.crops, views.bases], 1)
        batch, count = inputs.shape[:2]
        with torch.no_grad():
            seen = cast(Backbone, self.teacher["backbone"]).forward_views([inputs.flatten(0, 1)])[0].cls
            teacher: Tensor = self.teacher["projector"](seen).unflatten(0, (batch, count))
        noise = self.drop_noise(views.sample, count)
        features = cast(Backbone, self.student["backbone"]).forward_views([inputs.flatten(0, 1)], None, noise)[0]
        student: Tensor = self.student["projector"](features.cls).unflatten(0, (batch, count))

        with torch.autocast(student.device.type, enabled=False):
            own, bases = student[:, : self.num_crops], student[:, self.num_crops :]
            other, other_bases = teacher[:, : self.num_crops], teacher[:, self.num_crops :]
            cosines = (_cosines(own, other_bases) + _cosines(other, bases)) / 2  # (B, m, n)
            position = position_loss(cosines, views.overlap, views.counts)
            orthogonality = base_orthogonality(bases, views.counts)
        self._step = (views, seen.unflatten(0, (batch, count)), cosines.detach())
        total = position + self.weights["orthogonality"] * orthogonality
        return LossTerms(total, {"position": position, "orthogonality": orthogonality}, (features.cls,))

    # ------------------------------------------------------------ monitors

    @property
    def observations(self) -> Observations | None:
        """[CLS] of the random crops of the last micro-batch, and how often the most similar base is the right one."""
        if self._step is None:
            return None
        views, features, cosines = self._step
        hidden = ~views.counts[:, None]
        found = cosines.masked_fill(hidden, -2).argmax(-1) == views.overlap.masked_fill(hidden, -1).argmax(-1)
        figures = {"base_accuracy": found.float().mean(), "body_bases": views.counts.float().mean()}
        rows = features[:, : self.num_crops].flatten(0, 1).float()
        return {"cls_features": rows, "scalars": figures | self.gradient_norms}

    @torch.no_grad()
    def view_panel(self, index: int) -> ViewPanel:
        """Return the random crops of sample ``index`` of the last micro-batch, and its bases as small pictures.

        Raises:
            IndexError: if the batch has no such sample, or no step was taken.
        """
        if self._step is None or not 0 <= index < len(self._step[0].sample):
            raise IndexError(f"sample {index} is not in the last batch")
        views = self._step[0]
        return {
            "clean": views.crops[index, :, 0],
            "globals": views.crops[index, :, 0],
            "locals": views.bases[index, :, 0],
        }


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    """Return (B, m, n): cosines of rows (B, m, E) with rows (B, n, E)."""
    return F.normalize(a, dim=-1, eps=1e-6) @ F.normalize(b, dim=-1, eps=1e-6).mT
