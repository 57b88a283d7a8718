"""A run with what the sections of its page share: its cache, its encoder, the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from agssd.commands.report.run_files import Run, last_checkpoint, shown_error

if TYPE_CHECKING:
    from agssd.data_modules.cache import VolumeCache
    from agssd.models.backbone import Backbone


@dataclass
class Options:
    """What the command line says.

    Attributes:
        cache: to show cases of; None for the run's own.
        cases: number of cases with attention and PCA.
        nifti: folder for NIfTI files, or None.
        device: for the encoder.
        title: heading, or None.
    """

    cache: Path | None = None
    cases: int = 3
    nifti: Path | None = None
    device: str = "cpu"
    title: str | None = None


@dataclass
class Context:
    """A run with what its sections share.

    Attributes:
        run: what it left behind.
        options: of the command line.
        cache: opened, or None.
        no_cache: why it is None.
        encoder: of the last checkpoint, or None.
        no_encoder: why it is None, without paths.
        notes: lines for the terminal.
        num_viewers: volumes on the page so far.
        no_maps: why no case was encoded, without paths; empty where one was.
    """

    run: Run
    options: Options
    cache: VolumeCache | None
    no_cache: str
    encoder: Backbone | None
    no_encoder: str = ""
    notes: list[str] = field(default_factory=list)
    num_viewers: int = 0
    no_maps: str = ""


def open_cache(run: Run, given: Path | None) -> tuple[VolumeCache | None, str]:
    """Return the cache to show cases of, or None and why there is none, without its path.

    Raises:
        ValueError: if ``given`` cannot be read.
    """
    from agssd.data_modules.cache import VolumeCache

    if given is not None:
        return VolumeCache(given), ""
    stated = run.setting("data", "init_args", "cache")
    names = [stated] if isinstance(stated, str) else list(stated or ())
    for name in names:
        if Path(name).exists():
            try:
                return VolumeCache(name), ""
            except ValueError:
                return None, "the cache that the run names cannot be read; name one with --cache CACHE"
    if names:
        return None, "the cache that the run names does not lie where the report was made; name one with --cache CACHE"
    return None, "the run names no cache; name one with --cache CACHE"


def open_encoder(run: Run) -> tuple[Backbone | None, str]:
    """Return the encoder of the run's last checkpoint (the teacher's where there is one), or None and the reason."""
    from agssd.tasks.encoders import load_encoder

    try:
        return load_encoder(last_checkpoint(run)), ""
    except ValueError as error:  # none, a torn one, or one of no encoder of agssd
        return None, shown_error(error, run)
