"""Encoders to evaluate: from an export or a checkpoint, or the same architecture with random weights."""

from __future__ import annotations

import tempfile
from pathlib import Path

from agssd.hub import FILE_NAME, export_backbone, load_backbone
from agssd.models.backbone import Backbone, build_fresh


def load_encoder(path: str | Path) -> Backbone:
    """Return the encoder of an export (file or folder), of a checkpoint (``.ckpt``), or of a run's last checkpoint.

    Raises:
        ValueError: if there is none, or it cannot be read.
    """
    file = encoder_file(path)
    if file.suffix != ".ckpt":
        return load_backbone(path)
    with tempfile.TemporaryDirectory() as folder:
        return load_backbone(export_backbone(file, folder))


def encoder_file(path: str | Path) -> Path:
    """Return the file that ``load_encoder`` reads, which need not be there."""
    path = Path(path)
    export, last = path / FILE_NAME, path / "checkpoints" / "last.ckpt"
    if not path.is_dir():
        return path
    return last if last.is_file() and not export.exists() else export


def random_like(encoder: Backbone, seed: int) -> Backbone:
    """Return an encoder of the same configuration with fresh weights, in evaluation mode.

    The weights depend on ``seed`` alone and the global random state stays as it was. The contract is that of
    ``encoder``, both want the same data, but the new one has seen nothing.
    """
    fresh = build_fresh(encoder.config, seed)
    fresh.contract = None if encoder.contract is None else {**encoder.contract, "seen": None}
    return fresh
