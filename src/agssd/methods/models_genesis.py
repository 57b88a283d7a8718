"""Models Genesis: restore a view that was shuffled, changed in contrast and painted over."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agssd.methods.base import PretrainModule
from agssd.models.backbone import Backbone
from agssd.models.dense_decoder import DenseDecoder
from agssd.transforms.corruption import Corruption
from agssd.transforms.crops import OverlapCrops
from agssd.transforms.views import Views, make_views, panel_of
from agssd.types import LossTerms, Observations, ParentBatch, ViewPanel


class ModelsGenesis(PretrainModule):
    """Restoration: the encoder sees a corrupted view, a light decoder predicts every voxel of the clean one.

    Source: Zhou et al., MedIA 2021, arXiv 2004.07882 [paper]: local shuffling, nonlinear intensities, in- and
    out-painting with their probabilities, mean squared error on all voxels.
    Deviates: corruptions are batched on the device (:mod:`agssd.transforms.corruption`); curves invert no CT unless
    ``invert_ct``, because its contrast means Hounsfield units (ours); MRI is restored in [-1, 1] and CT in [0, 1],
    and nothing bounds what the decoder says, where the released code has [0, 1] and a sigmoid; our encoder gives
    tokens, and a decoder without skips restores from the last ones (ours: with skips the encoder could leave the
    work to them); views are flipped by the sampler of views; AdamW instead of SGD at rate 1; our views and
    schedules.

    Args:
        backbone: the encoder.
        views: sampler of the views; local ones are not used.
        prob_shuffle: share of views whose voxels are shuffled in windows.
        prob_curve: share of views whose intensities go through a Bezier curve.
        invert_ct: whether half of these curves invert the contrast on CT as well.
        prob_paint: share of views that are painted.
        prob_out: share of these that are painted around boxes and not inside.
        decoder_dim: channels of the decoder's first step.
        lr: peak learning rate.
        min_lr: last learning rate.
        warmup: share of the run.
        weight_decay: first and last.
        betas: of AdamW.
        seed: of views and corruptions.
        compile: compile the encoder block by block with ``torch.compile``.
    """

    def __init__(
        self,
        backbone: Backbone,
        views: OverlapCrops,
        prob_shuffle: float = 0.5,
        prob_curve: float = 0.9,
        invert_ct: bool = False,
        prob_paint: float = 0.9,
        prob_out: float = 0.8,
        decoder_dim: int = 96,
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
        self.views = views
        self.corruption = Corruption(prob_shuffle, prob_curve, invert_ct, prob_paint, prob_out)
        backbone.token_grid(views.size_vox)
        backbone.freeze_mask_token()
        decoder = DenseDecoder(backbone.embed_dim, backbone.patch_size, backbone.in_channels, decoder_dim)
        self.student = nn.ModuleDict({"backbone": backbone, "decoder": decoder})
        self._step: tuple[Views, Tensor, Tensor] | None = None

    def make_views(self, batch: ParentBatch) -> Views:
        """Cut two global views from every parent; ``inputs`` are corrupted, ``clean`` are not."""
        views = make_views(batch, self.views, None, self.seed, with_locals=False)
        return replace(views, inputs=self.corruption(views.clean, views.is_ct, self.seed, views.sample))

    def pretrain_loss(self, views: Views) -> LossTerms:
        """Return the mean squared error of all voxels of both views."""
        self._step = None  # frees the last step before this one needs the memory
        (noise,) = self.drop_noise(views.sample, 2)
        features = self.backbone.forward_views([views.inputs.flatten(0, 1)], None, [noise])[0]
        restored: Tensor = self.student["decoder"](features.tokens, features.grid)
        loss = F.mse_loss(restored, views.clean.flatten(0, 1))
        self._step = (views, restored.detach(), features.tokens.detach())
        return LossTerms(loss, {"rec": loss}, (features.tokens,))

    # ------------------------------------------------------------ monitors

    @property
    def observations(self) -> Observations | None:
        """Mean tokens of the last micro-batch, and how much of the corruption was undone; [CLS] learns by attention."""
        if self._step is None:
            return None
        views, restored, tokens = self._step
        damage = (views.inputs - views.clean).square().mean()
        error = (restored.unflatten(0, (-1, 2)) - views.clean).square().mean()
        figures = {"overlap": views.geometry.overlap.mean(), "error_to_damage": error / damage.clamp_min(1e-9)}
        return {"cls_features": tokens.mean(1).float(), "scalars": figures | self.gradient_norms}

    @torch.no_grad()
    def view_panel(self, index: int) -> ViewPanel:
        """Return the views of sample ``index`` of the last micro-batch: clean, corrupted and restored."""
        if self._step is None:
            return panel_of(None, index)
        views, restored, _ = self._step
        rows = restored.unflatten(0, (-1, 2))
        return panel_of(views, index, None, rows[index, :, 0] if 0 <= index < len(rows) else None)
