"""MAE: an encoder that sees the visible patches alone, and a light decoder that predicts the others."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from agssd.losses.reconstruction import patch_mse, patch_scaling
from agssd.methods.base import PretrainModule
from agssd.models.backbone import Backbone
from agssd.models.heads import ReconstructionHead
from agssd.models.token_decoder import TokenDecoder, work_out_hidden
from agssd.transforms.crops import OverlapCrops
from agssd.transforms.edges import patches_of, unpatch
from agssd.transforms.masking import MaskSampler, MaskScore, gather_tokens, masked_indices, one_ratio
from agssd.transforms.views import Views, body_of, both_views, make_views, mask_views, panel_of
from agssd.types import Features, LossTerms, ParentBatch, ViewPanel


class MAE(PretrainModule):
    """Masked autoencoder: the encoder gets the visible patches alone, so its cost follows their share.

    Each of a sample's two global views is masked by a draw of its own; no augmentation of intensities. With
    ``mask_score="loss"`` what a momentum teacher predicts badly is hidden first, as AnatoMask does; the teacher, which
    scores ``"loss"`` and ``"attention"`` bring along, is what is exported then. Without them ``average`` makes one.

    Source: He et al., CVPR 2022, arXiv 2111.06377 [paper]: ratio 0.75, light decoder with a mask token of its own,
    MSE of standardised patches over hidden patches alone; in 3D SelfMedMAE [R: SelfMedMAE] and nnssl [R: nnssl];
    loss-guided masks: Li et al., arXiv 2407.06468 [R: AnatoMask].
    Deviates: standard deviations of target patches have a floor (ours, see
    :func:`agssd.losses.reconstruction.patch_scaling`); patches with less than 5 % body are not predicted (ours);
    our views, encoder and schedules.

    Args:
        backbone: the encoder; one that can leave tokens out (ViT).
        views: sampler of the views.
        mask_ratio: share of hidden tokens; both numbers equal, because all samples must keep equally many.
        mask_score: what is hidden; see :class:`agssd.transforms.masking.MaskSampler`.
        mask_block: tokens per side of a hidden block.
        decoder_dim: width of the decoder.
        decoder_depth: its blocks.
        decoder_heads: its attention heads.
        norm_pix: standardise target patches.
        average: export a moving average of the weights, as methods with a teacher do (ours), instead of the last ones.
        lr: peak learning rate.
        min_lr: last learning rate.
        warmup: share of the run.
        weight_decay: first and last.
        betas: of AdamW.
        seed: of views and masks.
        compile: compile the encoder block by block with ``torch.compile``.

    Raises:
        ValueError: if ``mask_ratio`` is a range, or ``decoder_heads`` does not divide ``decoder_dim``.
    """

    observations = None  # no prototypes that could collapse, and no trained [CLS]; panels alone

    def __init__(
        self,
        backbone: Backbone,
        views: OverlapCrops,
        mask_ratio: tuple[float, float] = (0.75, 0.75),
        mask_score: MaskScore = "random",
        mask_block: int = 1,
        decoder_dim: int = 384,
        decoder_depth: int = 8,
        decoder_heads: int = 12,
        norm_pix: bool = True,
        average: bool = False,
        lr: float = 3e-4,
        min_lr: float = 1e-6,
        warmup: float = 0.05,
        weight_decay: tuple[float, float] = (0.05, 0.05),
        betas: tuple[float, float] = (0.9, 0.95),
        seed: int = 0,
        compile: bool = False,
    ) -> None:
        super().__init__(lr, min_lr, warmup, weight_decay, betas, 0.0, seed, compile)
        self.save_hyperparameters(ignore=["backbone", "views"])
        backbone.refuse_without_leaving_out()
        self.views = views
        self.mask_ratio = mask_ratio
        self.norm_pix = norm_pix
        self.patch = backbone.patch_size
        self.grid = backbone.token_grid(views.size_vox)
        one_ratio(mask_ratio)
        backbone.freeze_mask_token()
        decoder = TokenDecoder(backbone.embed_dim, self.grid, decoder_dim, decoder_depth, decoder_heads)
        head = ReconstructionHead(decoder_dim, self.patch, backbone.in_channels)
        self.student = nn.ModuleDict({"backbone": backbone, "decoder": decoder, "reconstruction": head})
        self.hide_by(MaskSampler(self.grid, self.patch, mask_score, mask_block))
        if average and not self.has_teacher:
            self.build_teacher()
        self._step: tuple[Views, Tensor, Tensor, Tensor] | None = None

    def make_views(self, batch: ParentBatch) -> Views:
        """Cut two global views from every parent."""
        return make_views(batch, self.views, None, self.seed, with_locals=False)

    def pretrain_loss(self, views: Views) -> LossTerms:
        """Return the MSE of the voxels of hidden patches that hold body."""
        clean = views.clean.flatten(0, 1)  # (2B, C, [D,] H, W)
        body = body_of(views.foreground.flatten(0, 1), self.patch)  # (2B, N)
        voxels = patches_of(clean, self.patch)  # (2B, N, P)
        mean, scale = patch_scaling(voxels, clean, self.norm_pix)
        target = (voxels - mean) / scale
        hidden_count = self.masks.exact(one_ratio(self.mask_ratio))

        def error(mask: Tensor, hidden: Tensor) -> Tensor:
            prediction, _ = self._predict(self.teacher, clean, mask.flatten(1), hidden)
            return (prediction - gather_tokens(target, hidden)).square().mean(-1)

        scores = self.teacher_scores(views.sample, clean, body, error)
        which = both_views(views)
        mask, _ = mask_views(views, which, body, self.masks, self.mask_ratio, self.seed, self.progress, scores)
        mask = mask.flatten(1)
        hidden, _ = masked_indices(mask, hidden_count)  # (2B, H)
        (noise,) = self.drop_noise(views.sample, 2)
        prediction, features = self._predict(self.student, clean, mask, hidden, noise)
        loss = patch_mse(prediction, gather_tokens(target, hidden), body.gather(1, hidden))
        shown = prediction.detach() * gather_tokens(scale, hidden) + gather_tokens(mean, hidden)
        self._step = (views, mask, hidden, shown)
        return LossTerms(loss, {"rec": loss}, (features.tokens,))

    @staticmethod
    def _predict(
        network: nn.ModuleDict, clean: Tensor, mask: Tensor, hidden: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, Features]:
        """Return the voxels (2B, H, P) of patches ``hidden`` (2B, H), and features of all others; ``mask`` (2B, N)."""
        tokens, features, _ = work_out_hidden(network, clean, mask, hidden, noise)
        return network["reconstruction"](tokens), features

    # ------------------------------------------------------------ monitors

    @torch.no_grad()
    def view_panel(self, index: int) -> ViewPanel:
        """Return the views of sample ``index`` of the last micro-batch, with what was predicted in hidden patches."""
        if self._step is None:
            return panel_of(None, index)
        views, mask, hidden, prediction = self._step
        masks = mask.unflatten(1, self.grid).unflatten(0, (-1, 2))
        if not 0 <= index < len(masks):
            return panel_of(views, index, masks)
        rows = slice(2 * index, 2 * index + 2)
        patches = patches_of(views.clean[index], self.patch)
        patches = patches.scatter(1, hidden[rows, :, None].expand(-1, -1, patches.shape[-1]), prediction[rows])
        return panel_of(views, index, masks, unpatch(patches, self.grid, self.patch)[:, 0])
