"""SimMIM: the voxels of hidden patches, predicted by one linear layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from agssd.losses.reconstruction import patch_l1
from agssd.methods.base import PretrainModule
from agssd.models.backbone import Backbone
from agssd.models.heads import ReconstructionHead, predict_hidden
from agssd.transforms.crops import OverlapCrops
from agssd.transforms.edges import patches_of
from agssd.transforms.masking import MaskSampler, MaskScore, gather_tokens, masked_indices
from agssd.transforms.views import Views, body_of, both_views, make_views, mask_views
from agssd.types import LossTerms, ParentBatch


class SimMIM(PretrainModule):
    """SimMIM: a learned token replaces hidden patches, and one linear layer predicts their voxels.

    Each of a sample's two global views is masked by a draw of its own. No augmentation of intensities; no teacher, but
    where the score of masks is a teacher's.

    Source: Xie et al., CVPR 2022, arXiv 2111.09886 [paper]: L1, linear head, large hidden units; in 3D MIM-Med3D
    [R: MIM-Med3D].
    Deviates: patches with less than 5 % body are not predicted (ours); our views, encoder and schedules.

    Args:
        backbone: the encoder.
        views: sampler of the views.
        mask_ratio: range of the share of hidden tokens, one draw per view.
        mask_score: what is hidden; see :class:`agssd.transforms.masking.MaskSampler`.
        mask_block: tokens per side of a hidden block.
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
        mask_ratio: tuple[float, float] = (0.6, 0.6),
        mask_score: MaskScore = "random",
        mask_block: int = 2,
        lr: float = 1e-4,
        min_lr: float = 1e-6,
        warmup: float = 0.1,
        weight_decay: tuple[float, float] = (0.05, 0.05),
        betas: tuple[float, float] = (0.9, 0.999),
        seed: int = 0,
        compile: bool = False,
    ) -> None:
        super().__init__(lr, min_lr, warmup, weight_decay, betas, 0.0, seed, compile)
        self.save_hyperparameters(ignore=["backbone", "views"])
        self.views, self.mask_ratio, self.patch = views, mask_ratio, backbone.patch_size
        head = ReconstructionHead(backbone.embed_dim, self.patch, backbone.in_channels)
        self.student = nn.ModuleDict({"backbone": backbone, "reconstruction": head})
        self.hide_by(MaskSampler(backbone.token_grid(views.size_vox), self.patch, mask_score, mask_block))

    def make_views(self, batch: ParentBatch) -> Views:
        """Cut two global views from every parent."""
        return make_views(batch, self.views, None, self.seed, with_locals=False)

    def pretrain_loss(self, views: Views) -> LossTerms:
        """Return the L1 of the voxels of hidden patches that hold body."""
        clean = views.clean.flatten(0, 1)  # (2B, C, [D,] H, W)
        body = body_of(views.foreground.flatten(0, 1), self.patch)  # (2B, N)
        voxels = patches_of(clean, self.patch)  # (2B, N, P)

        def error(mask: Tensor, index: Tensor) -> Tensor:
            prediction, _ = predict_hidden(self.teacher, "reconstruction", clean, mask, index)
            return (prediction - gather_tokens(voxels, index)).abs().mean(-1)

        scores = self.teacher_scores(views.sample, clean, body, error)
        which = both_views(views)
        mask, _ = mask_views(views, which, body, self.masks, self.mask_ratio, self.seed, self.progress, scores)
        index, used = masked_indices(mask.flatten(1), self.masks.limit(self.mask_ratio[1]))  # (2B, M)
        (noise,) = self.drop_noise(views.sample, 2)
        prediction, features = predict_hidden(self.student, "reconstruction", clean, mask, index, noise)
        target = gather_tokens(voxels, index)
        loss = patch_l1(prediction, target, torch.ones_like(target), used & body.gather(1, index))
        return LossTerms(loss, {"rec": loss}, (features.tokens,))
