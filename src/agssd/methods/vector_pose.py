"""VectorPOSE: where a crop lies, how large it is and how it is turned, and restoration that minds boundaries."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agssd.geometry import constant, rotation_from_6d
from agssd.losses.reconstruction import patch_l1
from agssd.methods.base import PretrainModule
from agssd.models.backbone import Backbone
from agssd.models.heads import ProjectionHead, ReconstructionHead, predict_hidden
from agssd.transforms.crops import OverlapCrops
from agssd.transforms.edges import patches_of
from agssd.transforms.masking import MaskSampler, MaskScore, gather_tokens, masked_indices
from agssd.transforms.views import Views, body_of, both_views, edge_maps, make_views, mask_views, panel_of
from agssd.types import LossTerms, Observations, ParentBatch, ViewPanel

POSE_MM = 100.0  # lengths are regressed in units of this many mm


def pose_vectors(views: Views) -> Tensor:
    """Return (B, 2, 12) float32: the pose of both global views; of frames (B, 2, 6).

    Three numbers for the centre's offset from the volume's centre along the volume's axes, in units of 100 mm; three
    for the natural logarithm of the edge lengths in that unit, along the view's own axes; six for the first two of
    these axes as unit vectors in the volume's frame, in voxels. Of a mirrored view the third axis is not in the vector.
    In 2D two, two, and two for the first axis.
    """
    size = constant(views.size_vox, views.spacing_mm.device)
    linear = views.geometry.globals.affine[..., :-1, :-1]  # column = axis of the view, in parent voxels per unit of u
    axes = F.normalize(linear, dim=-2)
    edges = (views.spacing_mm * size / POSE_MM).log()
    return torch.cat([views.centre_mm / POSE_MM, edges, axes.mT[..., :-1, :].flatten(-2)], -1)


class VectorPOSE(PretrainModule):
    """Vector prediction of a crop's pose and boundary-focused restoration of its hidden patches.

    Both global views are masked, each by a draw of its own. From [CLS] the pose is regressed (Smooth-L1); from hidden
    tokens their voxels, where edges weigh up to ``1 + weight_boundary`` times as much.

    Source: arXiv 2211.08533 [paper: the two tasks, crop position, scale and orientation as vectors, weight towards
    boundaries].
    Deviates: only abstract and introduction of the paper were available to us. Units, the six numbers of a rotation,
    Smooth-L1, random masks and a linear head for restoration, EAAM's edge map as boundary, and the weights are ours
    (docs/method.md); patches with less than 5 % body are not predicted; our views, encoder and schedules.

    Args:
        backbone: the encoder.
        views: sampler of the views; local ones are not used.
        mask_ratio: range of the share of hidden tokens, one draw per view.
        mask_score: what is hidden; see :class:`agssd.transforms.masking.MaskSampler`.
        mask_block: tokens per side of a hidden block.
        head_hidden: width of the pose head's hidden layer.
        weight_pose: weight of the pose term.
        weight_reconstruction: weight of the restoration term.
        weight_boundary: beta of the voxel weight ``1 + beta * edge``.
        lr: peak learning rate.
        min_lr: last learning rate.
        warmup: share of the run.
        weight_decay: first and last.
        betas: of AdamW.
        seed: of views and masks.
        compile: compile the encoder block by block with ``torch.compile``.
    """

    def __init__(
        self,
        backbone: Backbone,
        views: OverlapCrops,
        mask_ratio: tuple[float, float] = (0.5, 0.5),
        mask_score: MaskScore = "random",
        mask_block: int = 1,
        head_hidden: int = 512,
        weight_pose: float = 1.0,
        weight_reconstruction: float = 1.0,
        weight_boundary: float = 4.0,
        lr: float = 1e-4,
        min_lr: float = 1e-6,
        warmup: float = 0.05,
        weight_decay: tuple[float, float] = (0.05, 0.05),
        betas: tuple[float, float] = (0.9, 0.999),
        seed: int = 0,
        compile: bool = False,
    ) -> None:
        super().__init__(lr, min_lr, warmup, weight_decay, betas, 0.0, seed, compile)
        self.save_hyperparameters(ignore=["backbone", "views"])
        self.views = views
        self.mask_ratio = mask_ratio
        self.weights = {"pose": weight_pose, "rec": weight_reconstruction}
        self.weight_boundary = weight_boundary
        self.patch = backbone.patch_size
        self.dims = dims = backbone.spatial_dims
        heads = {
            "pose": ProjectionHead(backbone.embed_dim, head_hidden, dims * (dims + 1), layers=2),
            "reconstruction": ReconstructionHead(backbone.embed_dim, self.patch, backbone.in_channels),
        }
        self.student = nn.ModuleDict({"backbone": backbone, **heads})
        self.hide_by(MaskSampler(backbone.token_grid(views.size_vox), self.patch, mask_score, mask_block))
        self._step: tuple[Views, Tensor, Tensor, Tensor, Tensor] | None = None

    def make_views(self, batch: ParentBatch) -> Views:
        """Cut two global views from every parent."""
        return make_views(batch, self.views, None, self.seed, with_locals=False)

    def pretrain_loss(self, views: Views) -> LossTerms:
        """Return the Smooth-L1 of the pose and the boundary-weighted L1 of hidden patches that hold body."""
        self._step = None  # frees the last step before this one needs the memory
        clean = views.clean.flatten(0, 1)  # (2B, C, [D,] H, W)
        body = body_of(views.foreground.flatten(0, 1), self.patch)  # (2B, N)
        with torch.no_grad(), torch.autocast(clean.device.type, enabled=False):
            edges = edge_maps(views, both_views(views)).expand_as(clean)
        voxels, weights = patches_of(clean, self.patch), 1 + self.weight_boundary * patches_of(edges, self.patch)

        def error(mask: Tensor, index: Tensor) -> Tensor:
            prediction, _ = predict_hidden(self.teacher, "reconstruction", clean, mask, index)
            return ((prediction - gather_tokens(voxels, index)).abs() * gather_tokens(weights, index)).mean(-1)

        scores = self.teacher_scores(views.sample, clean, body, error)
        which = both_views(views)
        mask, _ = mask_views(views, which, body, self.masks, self.mask_ratio, self.seed, self.progress, scores)
        index, used = masked_indices(mask.flatten(1), self.masks.limit(self.mask_ratio[1]))  # (2B, M)
        (noise,) = self.drop_noise(views.sample, 2)
        prediction, features = predict_hidden(self.student, "reconstruction", clean, mask, index, noise)

        truth = pose_vectors(views)  # (B, 2, 12)
        pose: Tensor = self.student["pose"](features.cls).unflatten(0, (-1, 2))
        loss_pose = F.smooth_l1_loss(pose, truth)

        target, weight = gather_tokens(voxels, index), gather_tokens(weights, index)
        loss_rec = patch_l1(prediction, target, weight, used & body.gather(1, index))

        self._step = (views, mask, pose.detach(), truth, features.cls.detach())
        total = self.weights["pose"] * loss_pose + self.weights["rec"] * loss_rec
        return LossTerms(total, {"pose": loss_pose, "rec": loss_rec}, (features.tokens, features.cls))

    # ------------------------------------------------------------ monitors

    @property
    def observations(self) -> Observations | None:
        """[CLS] of the last micro-batch, and errors of the pose: mm, share of the edge length, degrees."""
        if self._step is None:
            return None
        views, mask, pose, truth, features = self._step
        dims = self.dims
        turned = rotation_from_6d(pose[..., 2 * dims :]).mT @ rotation_from_6d(truth[..., 2 * dims :])
        cosine = (turned.diagonal(dim1=-2, dim2=-1).sum(-1) - (dims - 2)) / 2
        figures = {
            "overlap": views.geometry.overlap.mean(),
            "mask_ratio": mask.float().mean(),
            "centre_error_mm": POSE_MM * (pose - truth)[..., :dims].norm(dim=-1).mean(),
            "edge_error": ((pose - truth)[..., dims : 2 * dims].abs().exp() - 1).mean(),
            "rotation_error_deg": cosine.clamp(-1, 1).acos().rad2deg().mean(),
        }
        return {"cls_features": features.float(), "scalars": figures | self.gradient_norms}

    @torch.no_grad()
    def view_panel(self, index: int) -> ViewPanel:
        """Return the views of sample ``index`` of the last micro-batch."""
        if self._step is None:
            return panel_of(None, index)
        return panel_of(self._step[0], index, self._step[1].unflatten(0, (-1, 2)))
