"""Checkpoints as artifacts of a W&B run, without what may name a patient."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from agssd.run.checkpoints import read_checkpoint
from agssd.whole_file import whole_file

TAKEN_OUT = "<path>"
_NAMES_FILES = re.compile(r"(cache|dirpath|folder|encoder|manifest|quarantine|filename|.*_(dir|path|file|folder))")
_NO_FILES = ("class_path", "_class_path", "monitor", "figure")
_SUFFIX = re.compile(
    r"\.(h5|hdf5|ckpt|pt|pth|safetensors|ya?ml|csv|tsv|jsonl?|txt|nii|gz|dcm|mha|mhd|nrrd|npy|npz|zip|tar|tif+)$", re.I
)
_WITH_SETTINGS = ("config", "hyper_parameters", "datamodule_hyper_parameters", "callbacks")  # parts of a checkpoint


def without_paths(value: Any, name: str = "") -> Any:
    """Return ``value``, the setting ``name``, with every text that names a file replaced: paths may name patients.

    That is every text in a setting that names files (``cache``, ``dirpath``, ``encoder``, ``ckpt_path`` and so on), and
    elsewhere every text with a path separator or the suffix of a file. Names of figures (``monitor``) stay.
    """
    if isinstance(value, Mapping):
        return {TAKEN_OUT if _is_file(key) else key: without_paths(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [without_paths(item, name) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, os.PathLike):
        return TAKEN_OUT
    if not isinstance(value, str) or not value:
        return value
    if name in _NO_FILES:
        return TAKEN_OUT if _is_file(value) else value
    return TAKEN_OUT if _is_file(value) or "/" in value or os.sep in value or _NAMES_FILES.fullmatch(name) else value


def _is_file(text: Any) -> bool:
    """Return whether a text is a path beyond doubt; names of figures have separators too."""
    return isinstance(text, str) and (os.path.isabs(text) or _SUFFIX.search(text) is not None)


def send_checkpoint(run: Any, source: Path, folder: Path, aliases: list[str]) -> None:
    """Log a copy of a checkpoint as a version of the artifact ``checkpoint-ID``, offline too.

    In the copy every text that names a file is taken out of the configuration, the hyper-parameters and the states of
    the callbacks; see :func:`without_paths`. Weights, and the record of what the encoder has seen, are those of the
    checkpoint. The copy stays in ``folder``, from where W&B sends it, now or with ``wandb sync``, without copying it
    once more.

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
    with_settings = [name for name in _WITH_SETTINGS if name in checkpoint]
    with whole_file(copy) as temporary:
        torch.save(checkpoint | {name: without_paths(checkpoint[name]) for name in with_settings}, temporary)
    artifact = wandb.Artifact(f"checkpoint-{run.id}", "model", metadata={"step": step})
    artifact.add_file(str(copy), name=copy.name, policy="immutable", skip_cache=True)
    run.log_artifact(artifact, aliases=[*aliases, f"step{step}"])
