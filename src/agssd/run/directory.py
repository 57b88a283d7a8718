"""The directory of a run: where it is, who may write to it, and its saved configuration.

A run directory holds ``config.yaml`` (what ran), ``machine.json`` (where), ``metrics.csv``, ``state.json`` (what it is
doing), ``actions.jsonl`` (what was done about it), ``checkpoints/``, ``wandb/`` and ``wandb_id``; where they were made
``panels/``, ``captures/`` (steps that were not finite), ``tensorboard/``, and ``submit.sh`` with the logs of its jobs.
Nothing in it is ever overwritten silently: a run in a used directory goes on from its newest checkpoint and appends.
"""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as L
import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback

import agssd
from agssd.run.artifacts import without_paths
from agssd.run.state import CHECKPOINTS, CONFIG
from agssd.whole_file import whole_file

RUNS = "runs"
MACHINE = "machine.json"
_STAMP = "AGSSD_RUN_STAMP"  # hands the name of the run to the processes that Lightning starts


def default_run_directory(label: str) -> Path:
    """Return ``runs/LABEL/STAMP`` for a run that names no directory; the same on every rank of a job.

    STAMP is the SLURM job, the torchrun job, or the time at which rank 0 started.
    """
    stamp = next((os.environ[k] for k in (_STAMP, "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID") if os.environ.get(k)), None)
    if stamp in (None, "none"):  # torchrun without --rdzv-id calls its job "none"
        stamp = time.strftime("%Y%m%d-%H%M%S")
    os.environ[_STAMP] = str(stamp)
    return Path(RUNS) / label / str(stamp)


def run_of_checkpoint(checkpoint: str) -> Path | None:
    """Return DIR for a checkpoint ``DIR/checkpoints/NAME``, else None."""
    folder = Path(checkpoint).parent
    return folder.parent if folder.name == CHECKPOINTS else None


def claim(directory: Path, resuming: bool) -> None:
    """Make the run directory; refuse one that another run has used, unless this run may go on in it.

    Raises:
        ValueError: if the directory holds a run.
        OSError: if it cannot be made or written.
    """
    used = [name for name in (CONFIG, CHECKPOINTS) if (directory / name).exists()]
    if used and not resuming:
        raise ValueError(
            f"{directory} already holds a run ({', '.join(used)}), and one without checkpoints cannot go on in it; "
            "name another --trainer.default_root_dir"
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"the run directory {directory} cannot be made: {error.strerror}; name another --trainer.default_root_dir"
        ) from error
    if not os.access(directory, os.W_OK):
        raise PermissionError(f"no permission to write in {directory}; name another --trainer.default_root_dir")


def unused(path: Path) -> Path:
    """Return ``path``, or the first of ``path-2``, ``path-3`` and so on that does not exist."""
    candidate, number = path, 2
    while candidate.exists():
        candidate, number = path.with_name(f"{path.stem}-{number}{path.suffix}"), number + 1
    return candidate


def plain_config(parser: LightningArgumentParser, config: Namespace) -> dict[str, Any]:
    """Return the configuration of a subcommand as nested dicts, lists, strings and numbers."""
    return cast(dict[str, Any], yaml.safe_load(parser.dump(config, skip_unset=False, format="yaml")))


def describe_machine(trainer: L.Trainer) -> dict[str, Any]:
    """Return the machine and the versions that a run trains on, without names of hosts or people."""
    device = trainer.strategy.root_device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "devices": trainer.world_size,
        "nodes": trainer.num_nodes,
        **describe_host(),
    }


def describe_host() -> dict[str, Any]:
    """Return the processor, the memory, the versions and the date, without names of hosts or people."""
    processor = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # another system, or an architecture that has no such line
        pass
    return {
        "processor": processor,
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": L.__version__,
        "agssd": agssd.__version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


class SaveRunConfig(SaveConfigCallback):
    """Writes what runs into the run directory: ``config.yaml`` for fit, ``test.yaml`` and so on for the others.

    Beside ``config.yaml`` stands ``machine.json``, where it runs. A resumed or repeated run adds ``config-2.yaml`` and
    so on; no file is replaced. The loggers of a fit get the same settings without what names a file, in place of the
    module's own arguments, which are among them.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Save once, on rank zero."""
        if self.already_saved:
            return
        self.already_saved = True
        if trainer.is_global_zero:
            name = "config" if stage == "fit" else str(getattr(stage, "value", stage))  # Lightning passes an enum
            path = unused(Path(trainer.default_root_dir) / f"{name}.yaml")
            path.parent.mkdir(parents=True, exist_ok=True)
            self.parser.save(self.config, str(path), skip_unset=False, overwrite=False, multifile=False)
            if stage == "fit":
                with whole_file(unused(path.with_name(MACHINE))) as temporary:
                    temporary.write_text(json.dumps(describe_machine(trainer), indent=1) + "\n", encoding="utf-8")
        if stage == "fit":
            self.plain_config()

    _plain: dict[str, Any] | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Send the settings to the loggers, unless ``trainer.enable_autolog_hparams`` is off."""
        if not trainer.enable_autolog_hparams:
            return
        cast(Any, pl_module)._log_hyperparams = False  # Lightning would send them as well, with its own additions
        for logger in trainer.loggers:
            logger.log_hyperparams(cast(Any, without_paths(self.plain_config())))

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the configuration in plain types, so that a resumed run can be compared with it."""
        checkpoint["config"] = self.plain_config()

    def plain_config(self) -> dict[str, Any]:
        """Return the configuration in plain types, made once: it takes longer than many a step."""
        if self._plain is None:
            self._plain = plain_config(self.parser, self.config)
        return self._plain
