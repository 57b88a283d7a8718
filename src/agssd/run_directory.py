"""The directory of a run: where it is, its saved configuration, metrics, checkpoints and W&B run.

A run directory holds ``config.yaml`` (what ran), ``machine.json`` (where), ``metrics.csv``, ``checkpoints/`` and, by
callback, ``panels/``.
Nothing in it is ever overwritten silently: a run in a used directory goes on from its newest checkpoint and appends.
"""

from __future__ import annotations

import csv
import functools
import json
import os
import platform
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import lightning.pytorch as L
import torch
import yaml
from jsonargparse import Namespace
from lightning.fabric.loggers.csv_logs import _ExperimentWriter
from lightning.fabric.loggers.logger import _DummyExperiment, rank_zero_experiment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

import agssd
from agssd.checkpoint_artifacts import send_checkpoint, without_paths
from agssd.checkpoints import BEST, LAST
from agssd.run_state import CHECKPOINTS as CHECKPOINTS
from agssd.run_state import CONFIG, METRICS, WANDB_ID
from agssd.stop_signals import STOP
from agssd.whole_file import whole_file

RUNS = "runs"
MACHINE = "machine.json"
LogCheckpoints = Literal["none", "best", "last", "all"]
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
    processor = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # another system, or an architecture that has no such line
        pass
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "devices": trainer.world_size,
        "nodes": trainer.num_nodes,
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


class _AppendingWriter(_ExperimentWriter):
    """Keeps the rows of an earlier part of the run, where Lightning's writer would delete the file."""

    def __init__(self, log_dir: str, name: str) -> None:
        self.NAME_METRICS_FILE = name
        super().__init__(log_dir)
        path = Path(self.metrics_file_path)
        if path.is_file():
            with path.open(newline="") as file:
                self.metrics_keys = sorted(next(csv.reader(file), []))

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        path = Path(self.metrics_file_path)
        _write_rows(path, fieldnames, _whole_rows(path))

    def _check_log_dir_exists(self) -> None:
        """Accept a directory that holds the run."""


def _whole_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a table, without a last line that was cut off."""
    lines = path.read_text().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        del lines[-1]
    return list(csv.DictReader(lines))


def _write_rows(path: Path, fields: Sequence[str], rows: list[dict[str, str]]) -> None:
    with whole_file(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=fields)
        writer.writeheader()
        writer.writerows(rows)


class RunCSVLogger(CSVLogger):
    """Writes every logged row to ``DIR/metrics.csv`` at once and appends to it after a resume.

    Args:
        directory: the run directory.
        filename: name of the file in it.
    """

    def __init__(self, directory: Path, filename: str = METRICS) -> None:
        """Keep the names; nothing is written before the first row."""
        super().__init__(save_dir=str(directory), name="", version="", flush_logs_every_n_steps=1)
        self._filename = filename

    @property
    @rank_zero_experiment
    def experiment(self) -> _AppendingWriter:
        """Return the writer, on rank zero."""
        if self._experiment is None:
            self._experiment = cast(Any, _AppendingWriter(self.log_dir, self._filename))
        return cast(_AppendingWriter, self._experiment)

    def log_hyperparams(self, params: Any = None) -> None:
        """Do nothing: ``config.yaml`` states what ran."""

    def rewind(self, step: int) -> None:
        """Drop the rows of optimiser steps after the first ``step``: they are about to be taken, and written, again.

        Called before the first row is logged; says how many there were.
        """
        path = Path(self.log_dir) / self._filename
        if not path.is_file():
            return
        rows = _whole_rows(path)
        kept = [row for row in rows if (row.get("step") or "").isdigit() and int(row["step"]) < step]
        if not kept:
            path.unlink()
        else:
            _write_rows(path, list(kept[0]), kept)
        if len(kept) < len(rows):
            rank_zero_info(
                f"{path}: {len(rows) - len(kept)} row(s) after step {step}, where the run goes on, are taken out; they "
                "are written again"
            )


class WandbRun:
    """Settings of the W&B run, the ``wandb`` group of a configuration.

    Args:
        project: project in W&B.
        entity: user or team; null is the account's own.
        name: name of the run; null is the name of the run directory.
        mode: null goes online with an account on this machine (WANDB_API_KEY or netrc) and offline without one.
        log_checkpoints: which checkpoints become artifacts of the run, offline too: ``none``; ``best`` or ``last``, the
            best by the probe or the newest, when the run ends by itself; ``all``, every one when the next is written,
            and both at the end; the last before a preemption or a kill is not sent. Names of files are taken out; the
            copies stay in ``DIR/wandb/checkpoints``.
    """

    def __init__(
        self,
        project: str = "agssd",
        entity: str | None = None,
        name: str | None = None,
        mode: Literal["online", "offline", "disabled"] | None = None,
        log_checkpoints: LogCheckpoints = "none",
    ) -> None:
        """Keep the settings."""
        self.project = project
        self.entity = entity
        self.name = name
        self.mode = mode
        self.log_checkpoints: LogCheckpoints = log_checkpoints

    def logger(self, directory: Path) -> WandbLogger | None:
        """Return the logger of the run in ``directory``, or None where W&B is switched off."""
        mode = self.mode or os.environ.get("WANDB_MODE") or ("online" if has_wandb_account() else "offline")
        if mode == "disabled":
            return None
        online = mode in ("online", "run")
        name = self.name or directory.name
        return QuietWandbLogger(directory, self.project, self.entity, name, online, self.log_checkpoints)


def has_wandb_account() -> bool:
    """Return whether W&B could log in without asking: a key in the environment or an entry for its host in netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    import netrc

    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("://")[-1].split("/")[0]
    try:
        entries = netrc.netrc(os.environ.get("NETRC") or str(Path.home() / ".netrc"))
    except (OSError, netrc.NetrcParseError):
        return False
    return host in entries.hosts


def _never_stops_the_run(call: Callable[..., None]) -> Callable[..., None]:
    """Have a call to W&B that fails be the last of this start, said once: SIGTERM to a whole job ends its service."""

    @functools.wraps(call)
    def guarded(logger: QuietWandbLogger, *given: Any, **named: Any) -> None:
        if not logger.lost:
            try:
                call(logger, *given, **named)
            except Exception as error:
                logger.lose(error)

    return guarded


def _for_half_a_minute(call: Callable[[], object]) -> Exception | None:
    """Call and return what it raised; one that takes longer, as without network, is left behind."""
    raised: list[Exception] = []

    def calling() -> None:
        try:
            call()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=calling, daemon=True)
    thread.start()
    thread.join(timeout=30)
    return raised[0] if raised else None


class QuietWandbLogger(WandbLogger):
    """A W&B logger that never asks, never stops a run, and sends no paths, code, command line or console output.

    The id of the run is kept in ``DIR/wandb_id`` so that a resumed run goes on with the same curves. Without network it
    falls back to offline; ``wandb sync DIR/wandb/offline-run-*`` sends it later. Once W&B's service is gone, the run
    goes on without it until the next start.
    """

    def __init__(
        self,
        directory: Path,
        project: str,
        entity: str | None,
        name: str,
        online: bool,
        log_checkpoints: LogCheckpoints = "none",
    ) -> None:
        """Keep the settings; W&B starts with the first use of ``experiment``."""
        super().__init__(name=name, project=project, save_dir=str(directory), log_model=False)
        self._wandb_init.pop("anonymous", None)  # Lightning passes it on, W&B warns that it means nothing
        self._wandb_init["entity"] = entity
        self._wandb_init["mode"] = "online" if online else "offline"
        self._log_checkpoints = log_checkpoints
        self.lost = False  # until the next start
        self._newest: Path | None = None  # the checkpoint that was saved last, perhaps not yet on disk

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Return the W&B run, started on first use, on rank zero."""
        if self.lost:
            return _DummyExperiment()
        if self._experiment is None:
            try:
                self._start()
            except Exception as error:
                if STOP.received is None:
                    raise
                self.lose(error)
                return _DummyExperiment()
        return self._experiment

    def lose(self, error: Exception) -> None:
        """Say what has failed, and go on without W&B; nothing of it is left to fail at the end of the process."""
        import wandb

        self.lost, self._experiment = True, None
        rank_zero_info(
            f"W&B is lost until the next start ({type(error).__name__}: {error}); {METRICS} in the run directory has "
            "every figure"
        )
        _for_half_a_minute(functools.partial(wandb.teardown, exit_code=1))

    def _start(self) -> None:
        import secrets

        import wandb

        directory = Path(str(self._wandb_init["dir"]))
        directory.mkdir(parents=True, exist_ok=True)
        id_file = directory / WANDB_ID
        if not id_file.exists():
            with whole_file(id_file) as temporary:
                temporary.write_text(secrets.token_hex(4))
        self._wandb_init["id"] = self._id = id_file.read_text().strip()
        self._wandb_init["settings"] = wandb.Settings(
            silent=True,
            console="off",  # console output names the cache
            disable_code=True,
            disable_git=True,
            x_disable_meta=True,  # metadata holds the command line, which names the cache
            init_timeout=60,
        )
        inherited = cast(property, WandbLogger.experiment).fget
        assert inherited is not None
        try:
            inherited(self)
        except (wandb.errors.CommError, wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
            if self._wandb_init["mode"] != "online":
                raise
            rank_zero_info(f"W&B cannot be reached ({error}); logging offline")
            self._wandb_init["mode"] = "offline"
            inherited(self)

    @_never_stops_the_run
    def interrupt(self) -> None:
        """Send what there is and mark the run as one that goes on; give up after half a minute without network."""
        if self._experiment is not None:
            run = self._experiment
            run.mark_preempting()
            if (error := _for_half_a_minute(functools.partial(run.finish, exit_code=1))) is not None:
                raise error

    @rank_zero_only
    @_never_stops_the_run
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Send figures."""
        super().log_metrics(metrics, step)

    @rank_zero_only
    @_never_stops_the_run
    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        """Send images."""
        super().log_image(key, images, step, **kwargs)

    @_never_stops_the_run
    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """Send the checkpoint before this one, which is on disk by now, if all are wanted."""
        path = Path(checkpoint_callback._last_checkpoint_saved)
        if path.name in (LAST, BEST):
            return
        before, self._newest = self._newest, path
        if self._log_checkpoints == "all" and before is not None and before != path:
            self._send(before, [])

    @rank_zero_only
    @_never_stops_the_run
    def finalize(self, status: str) -> None:
        """Send what is wanted of a run that has ended by itself; everything is on disk."""
        if status != "success" or self._newest is None:
            return
        if self._log_checkpoints in ("last", "all"):
            self._send(self._newest, ["last"])
        if self._log_checkpoints in ("best", "all"):
            self._send(self._newest.with_name(BEST), ["best"])

    def _send(self, path: Path, aliases: list[str]) -> None:
        """Send a checkpoint; what cannot be sent is named and does not end the run."""
        if not path.exists():
            rank_zero_info(f"{path} does not exist and is not sent to W&B")
            return
        import wandb

        try:
            send_checkpoint(self.experiment, path, Path(str(self._wandb_init["dir"])) / "wandb" / CHECKPOINTS, aliases)
        except (OSError, ValueError, wandb.errors.Error) as error:
            rank_zero_info(f"{path} is not sent to W&B: {error}")

    @rank_zero_only
    @_never_stops_the_run
    def log_hyperparams(self, params: Any) -> None:
        """Send the settings, with whatever names a file taken out."""
        super().log_hyperparams(without_paths(params))
