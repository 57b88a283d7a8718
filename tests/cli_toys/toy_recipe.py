"""Small modules that the CLI's tests train: one with backbone and views, one with a backbone, one with neither."""

from __future__ import annotations

import os
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn

from agssd.models.backbone import Backbone
from agssd.transforms.crops import OverlapCrops


class ToyBackbone(Backbone):
    """A single gain."""

    def __init__(self, embed_dim: int = 6, patch_size: tuple[int, int, int] = (8, 8, 8)) -> None:
        super().__init__()
        self.embed_dim, self.patch_size, self.in_channels = embed_dim, patch_size, 1
        self.gain = nn.Parameter(torch.ones(embed_dim))
        self.config = {"class_path": "toy_recipe.ToyBackbone", "init_args": {"embed_dim": embed_dim}}

    def forward(self, x: Tensor) -> Any:
        """Return the mean intensity per embedding."""
        return x.float().mean(dim=(1, 2, 3, 4))[:, None] * self.gain

    def forward_views(self, views: Any, masks: Any = None, drop_noise: Any = None) -> Any:
        """Return one result per view."""
        return [self(view) for view in views]


class _Toy(L.LightningModule):
    backbone: nn.Module
    lr: float

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Fit the gain to the sample's low percentile, so that the loss depends on which samples come."""
        out = self.backbone(batch["image"] / 300.0)
        loss = (out - batch["sample"].float()[:, None] / 10).square().mean()
        self.log("train/loss", loss)
        return loss

    def on_train_batch_end(self, *args: Any) -> None:
        """End the run early, as a time limit does, where the test says so."""
        if self.trainer.global_step >= int(os.environ.get("TOY_STOPS_AT", "1000")):
            self.trainer.should_stop = True

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the gain, which only a loaded checkpoint changes."""
        self.log("val/gain", self.backbone.gain.mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class ToyRecipe(_Toy):
    """Needs a backbone and views."""

    def __init__(self, backbone: Backbone, views: OverlapCrops, lr: float = 0.01, depth: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.backbone, self.views, self.lr = backbone, views, lr


class ToyTask(_Toy):
    """Needs a backbone."""

    def __init__(self, backbone: Backbone, lr: float = 0.02) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.backbone, self.lr = backbone, lr


class ToyPlain(_Toy):
    """Needs nothing."""

    def __init__(self, lr: float = 0.03) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.backbone, self.lr = ToyBackbone(), lr


class ToyBug(ToyPlain):
    """Fails with a ValueError from inside a library."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Fail inside torch."""
        torch.distributions.Categorical(probs=torch.tensor(-1.0))
        raise AssertionError("unreachable")
