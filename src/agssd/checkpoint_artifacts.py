"""Checkpoints as artifacts of a W&B run, without what may name a patient."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection

from agssd.checkpoints import read_checkpoint
from agssd.whole_file import whole_file

TAKEN_OUT = "<path>"


def is_path(value: Any) -> bool:
    """Return whether ``value`` is a path, or a text that may be one: paths may name patients."""
    return isinstance(value, os.PathLike) or (isinstance(value, str) and ("/" in value or os.sep in value))


def send_checkpoint(run: Any, source: Path, folder: Path, aliases: list[str]) -> None:
    """Log a copy of a checkpoint as a version of the artifact ``checkpoint-ID``, offline too.

    The copy is the checkpoint with every text that looks like a path taken out, also in its configuration. It stays in
    ``folder``, from where W&B sends it, now or with ``wandb sync``, without copying it once more.

    Args:
        run: of W&B.
        source: a checkpoint file.
        folder: for the copy.
        aliases: of the version; the step is one too.

    Raises:
        ValueError: for a sharded checkpoint, or a file that is none.
        OSError: if the copy cannot be written.
    """
    import wandb

    if source.is_dir():
        raise ValueError(f"{source} is a sharded checkpoint, and only single files are sent")
    checkpoint = read_checkpoint(str(source))
    step = int(checkpoint["global_step"])
    copy = folder / source.name
    with whole_file(copy) as temporary:
        torch.save(apply_to_collection(checkpoint, str, lambda text: TAKEN_OUT if is_path(text) else text), temporary)
    artifact = wandb.Artifact(f"checkpoint-{run.id}", "model", metadata={"step": step})
    artifact.add_file(str(copy), name=copy.name, policy="immutable", skip_cache=True)
    run.log_artifact(artifact, aliases=[*aliases, f"step{step}"])
