"""Encoders to evaluate: from an export or a checkpoint, or the same architecture with random weights."""

from __future__ import annotations

import tempfile
from importlib import import_module
from pathlib import Path

import torch

from agssd.hub import export_backbone, load_backbone
from agssd.models.backbone import Backbone


def load_encoder(path: str | Path) -> Backbone:
    """Return the encoder of an export (file or folder), of a checkpoint (``.ckpt``), or of a run's last checkpoint.

    Raises:
        ValueError: if there is none, or it cannot be read.
    """
    path = Path(path)
    last = path / "checkpoints" / "last.ckpt"
    if path.is_dir() and not (path / "backbone.safetensors").exists() and last.is_file():
        path = last
    if path.suffix != ".ckpt":
        return load_backbone(path)
    with tempfile.TemporaryDirectory() as folder:
        return load_backbone(export_backbone(path, folder))


def random_like(encoder: Backbone, seed: int) -> Backbone:
    """Return an encoder of the same configuration with fresh weights, in evaluation mode.

    The weights depend on ``seed`` alone and the global random state stays as it was. The contract is that of
    ``encoder``, both want the same data, but the new one has seen nothing.
    """
    module, _, name = encoder.config["class_path"].rpartition(".")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = getattr(import_module(module), name)(**encoder.config["init_args"])
    assert isinstance(fresh, Backbone)
    fresh.contract = None if encoder.contract is None else {**encoder.contract, "seen": None}
    return fresh.eval()
