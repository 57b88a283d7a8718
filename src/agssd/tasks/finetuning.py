"""What downstream tasks share: where the encoder comes from, whether it fits the data, and how it learns."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn

from agssd.distributed import gather_objects
from agssd.evaluation.contract import check_contract
from agssd.models.backbone import Backbone
from agssd.schedules import warmup_cosine
from agssd.tasks.encoders import load_encoder


def resolve_encoder(backbone: Backbone | None, encoder: str | None) -> Backbone:
    """Return the encoder to start from.

    Args:
        backbone: an encoder with fresh weights, or None.
        encoder: path of an export, a checkpoint or a run, whose weights are taken, or None. With both, the two must
            be the same architecture: the backbone then only states what is expected.

    Raises:
        ValueError: if neither is given, or both and they differ.
    """
    if encoder is None:
        if backbone is None:
            raise ValueError(
                "the model has no encoder: give --model.encoder PATH (pretrained) or a backbone (from scratch), for "
                "example --backbone conf/backbone/vit_small_p16.yaml"
            )
        return backbone
    loaded = load_encoder(encoder)
    if backbone is not None:
        expected, found = architecture(backbone.config), architecture(loaded.config)
        if expected != found:
            raise ValueError(
                f"the encoder in {encoder} is {found}, but the configuration says {expected}; remove the backbone "
                "from the configuration (--backbone null) or make them equal"
            )
    return loaded


NO_FUNCTION = ("drop_path", "size", "use_checkpoint")  # arguments of encoders


def architecture(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration without what does not change the function computed by trained weights.

    ``size`` is only a name: an encoder's own configuration states the numbers behind it.
    """
    kept = {name: value for name, value in config.get("init_args", {}).items() if name not in NO_FUNCTION}
    kept = {name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()}
    return {"class_path": config.get("class_path"), "init_args": kept}


class DownstreamTask(L.LightningModule):
    """Base of the tasks: an encoder, optionally frozen, a head, AdamW with layer-wise rates, warm-up and cosine.

    Args:
        backbone: an encoder with fresh weights (from scratch), or None.
        encoder: path of pretrained weights, or None; see :func:`resolve_encoder`.
        freeze_encoder: keep the encoder as it is, in evaluation mode and without gradient.
        lr: peak rate of decoder or head.
        encoder_lr: peak rate of the encoder's last layer.
        layer_decay: factor on the rate per layer downwards; 1 = one rate.
        weight_decay: of weights; biases, norms and tokens do not decay.
        warmup: share of the run with rising rate; then half a cosine to 0.
        ignore_contract: accept data prepared differently from what the encoder was trained on.
    """

    def __init__(
        self,
        backbone: Backbone | None,
        encoder: str | None,
        freeze_encoder: bool,
        lr: float,
        encoder_lr: float,
        layer_decay: float,
        weight_decay: float,
        warmup: float,
        ignore_contract: bool,
    ) -> None:
        """Take the encoder, and freeze it if asked."""
        super().__init__()
        if min(lr, encoder_lr) <= 0 or not 0 < layer_decay <= 1 or not 0 <= warmup < 1 or weight_decay < 0:
            raise ValueError(
                f"lr={lr} and encoder_lr={encoder_lr} must be positive, layer_decay={layer_decay} in (0, 1], "
                f"warmup={warmup} in [0, 1), weight_decay={weight_decay} at least 0"
            )
        self.backbone = resolve_encoder(backbone, encoder)
        self.encoder = encoder
        self.freeze_encoder = freeze_encoder
        self.backbone.train(not freeze_encoder)  # a loaded encoder comes in evaluation mode
        if freeze_encoder:
            self.backbone.requires_grad_(False)
        self.lr, self.encoder_lr, self.layer_decay = lr, encoder_lr, layer_decay
        self.weight_decay, self.warmup = weight_decay, warmup
        self.ignore_contract = ignore_contract

    def train(self, mode: bool = True) -> DownstreamTask:
        """Set the mode of everything but a frozen encoder."""
        super().train(mode)
        if self.freeze_encoder:
            self.backbone.eval()
        return self

    def check_data(self, contract: dict[str, Any]) -> None:
        """Refuse data that do not fit the encoder; the data module calls this before anything is written.

        Raises:
            ValueError: naming the differences and the remedy.
        """
        if contract["channels"] != self.backbone.in_channels:
            raise ValueError(
                f"the cache has {contract['channels']} channel(s), the encoder takes {self.backbone.in_channels}; "
                f"build the backbone with in_channels {contract['channels']} or prepare other channels"
            )
        if not self.ignore_contract:
            check_contract(self.backbone.contract, contract, self.encoder, "--model.ignore_contract true")

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return AdamW groups by (rate, decay), each with its ``name``: head first, then encoder layers upwards."""
        groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
        top = self.backbone.depth + 1
        tokens = self.backbone.no_weight_decay()
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            decays = parameter.ndim > 1
            layer = top + 1  # everything outside the encoder
            if name.startswith("backbone."):
                inner = name.removeprefix("backbone.")
                layer = self.backbone.layer_index(inner)
                decays = decays and inner not in tokens
            groups.setdefault((layer, decays), []).append(parameter)
        found = []
        for (layer, decays), parameters in sorted(groups.items(), key=lambda item: (-item[0][0], not item[0][1])):
            in_head = layer > top
            found.append(
                {
                    "params": parameters,
                    "lr": self.lr if in_head else self.encoder_lr * self.layer_decay ** (top - layer),
                    "weight_decay": self.weight_decay if decays else 0.0,
                    "name": ("head" if in_head else f"layer{layer}") + ("" if decays else "_no_decay"),
                }
            )
        return found

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW and a schedule over all optimiser steps of the run, whatever their number."""
        optimizer = torch.optim.AdamW(self.parameter_groups())
        return warmed_up(optimizer, self.trainer, self.warmup)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave what rebuilds and exports the encoder, in plain types."""
        data = getattr(self.trainer, "datamodule", None)
        contract = self.backbone.contract or getattr(data, "contract", None)
        seen_after = getattr(data, "seen_after", None)
        if contract is not None and seen_after is not None and not self.freeze_encoder:
            contract = contract | {"seen": seen_after(self.backbone.contract)}
        checkpoint["agssd"] = {
            "method": f"{type(self).__module__}.{type(self).__qualname__}",
            "backbone": self.backbone.config,
            "state_prefix": "backbone.",
            "contract": contract,
        }


def warmed_up(optimizer: torch.optim.Optimizer, trainer: L.Trainer, warmup: float) -> OptimizerLRScheduler:
    """Return an optimiser whose rates rise for a share of the run's optimiser steps and then fall to 0 by a cosine.

    Raises:
        ValueError: for a run without end.
    """
    steps = trainer.estimated_stepping_batches
    if not math.isfinite(steps) or steps < 1:
        raise ValueError("the run has no end: set --trainer.max_steps to a positive number")
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_cosine(min((step + 1) / steps, 1.0), 1.0, 0.0, warmup)
    )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def gather_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of all ranks; every rank gets the same list."""
    return [row for part in gather_objects(rows) for row in part]
