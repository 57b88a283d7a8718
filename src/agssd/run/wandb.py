"""The W&B run of a run: the same one over every start, without names of files, and never what ends the run."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

from lightning.fabric.loggers.logger import _DummyExperiment, rank_zero_experiment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from agssd.run.artifacts import send_checkpoint, without_paths
from agssd.run.checkpoints import BEST, LAST
from agssd.run.state import CHECKPOINTS, METRICS, WANDB_ID
from agssd.run.stop_signals import STOP
from agssd.whole_file import whole_file

LogCheckpoints = Literal["none", "best", "last", "all"]


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
