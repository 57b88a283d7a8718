"""``agssd fit|validate|test|predict``: LightningCLI with the house's groups, links, standing callbacks and guards.

The groups of a configuration are ``trainer``, ``model``, ``data``, ``backbone`` and ``views`` (the last two are handed
to the model, so that a method's YAML does not repeat them), the standing callbacks by name, ``checkpoint``,
``best_checkpoint``, ``wandb`` and ``progress``; ``tensorboard`` is a switch. Every group may be a reference to another
YAML, relative to the file that holds it.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as L
from jsonargparse import Namespace
from lightning.pytorch.callbacks import Callback, Checkpoint, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn

from agssd.callbacks.actions import RunStopped
from agssd.callbacks.best_checkpoint import BestCheckpoint
from agssd.callbacks.every_run import STANDING
from agssd.callbacks.preemption import Preempted, Preemption
from agssd.callbacks.progress import Progress
from agssd.callbacks.run_checkpoint import RunCheckpoint
from agssd.callbacks.standing import StandingCallback
from agssd.command_line import refuse_missing_parts, refuse_repeated_cache, refuse_two_models
from agssd.models.backbone import Backbone
from agssd.run import slurm
from agssd.run.checkpoints import BEST, call_last, check_whole, newest_checkpoint, read_checkpoint
from agssd.run.directory import (
    SaveRunConfig,
    claim,
    default_run_directory,
    plain_config,
    run_of_checkpoint,
)
from agssd.run.metrics_file import RunCSVLogger
from agssd.run.resume_rules import changed_settings, refuse_missing, refuse_other_lineages
from agssd.run.state import CHECKPOINTS, METRICS, refuse_beside_another, settle_finished
from agssd.run.stop_signals import STOP
from agssd.run.tensorboard import RunTensorBoardLogger
from agssd.run.wandb import WandbRun
from agssd.transforms.crops import OverlapCrops

_EXPECTED_WARNINGS = (
    r".*isinstance\(treespec, LeafSpec\).*",  # Lightning on newer torch
    r".*module\(s\) in eval mode at the start of training.*",  # the teacher, a frozen encoder
    r".*Checkpoint directory .* exists and is not empty.*",  # a run goes on where it was
    r".*You have overridden `(on_after_batch_transfer|transfer_batch_to_device)` in `LightningModule`.*",  # by design
)


class FinishedRun(Exception):
    """The run that was asked for has nothing left to do; its text says so."""


class AgssdCLI(LightningCLI):
    """Parses a configuration, builds trainer, model and data, checks them, and runs one of Lightning's entry points.

    Args:
        args: the command line after ``agssd``, starting with the subcommand.

    Raises:
        ValueError: for settings that contradict each other, the checkpoint or the run directory, before anything is
            written.
        argparse.ArgumentError: for settings that do not exist or have the wrong type.
        FinishedRun: if the run in the directory has taken its last step.
    """

    def __init__(self, args: Sequence[str]) -> None:
        """Parse, build, check and run."""
        self.run_directory = Path()
        self.exit_code = 0
        self._goes_on_from: str | None = None  # a checkpoint
        self._first_step = 0
        self._accumulated_before: int | None = None  # micro-batches of a step, by the checkpoint
        self._asked = args[0] if args else ""
        logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)
        for text in _EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message=text)
        quiet = {"exit_on_error": False}
        super().__init__(
            L.LightningModule,
            L.LightningDataModule,
            save_config_callback=SaveRunConfig,
            seed_everything_default=0,  # a fixed default: a run without a stated seed can still be repeated
            # The data modules cut their stream themselves; a sampler put in by Lightning would change the order.
            trainer_defaults={"use_distributed_sampler": False},
            parser_kwargs={**quiet, self._asked: dict(quiet)},
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,  # a module's own configure_optimizers is the only one
            args=list(args),
        )

    # ---------------------------------------------------------------- parsing

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # Lightning's is static
        """Return the subcommand that was asked for only: building a parser for each would cost most of ``--help``."""
        known = LightningCLI.subcommands()
        return {name: skip for name, skip in known.items() if name == self._asked} or known

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        for subparser in self._subcommand_parsers.values():
            if any(action.dest == "weights_only" for action in subparser._actions):
                subparser.set_defaults({"weights_only": True})  # a checkpoint is data, never code

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the house's groups; ``backbone`` and ``views`` reach the model only if its constructor names them."""
        for name, base in (("backbone", Backbone), ("views", OverlapCrops)):
            parser.add_subclass_arguments(base, name, required=False, instantiate=False)
            # on parse, not on instantiation: the hyper-parameters in checkpoints stay plain
            parser.link_arguments(name, f"model.init_args.{name}")
        for name, callback in STANDING.items():
            parser.add_lightning_class_args(callback, name)
        # the best first: what is saved after it knows it, so that a resumed run does too
        parser.add_lightning_class_args(BestCheckpoint, "best_checkpoint")
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(Preemption, "preemption")  # after the checkpoints, which save what it asks for
        parser.add_class_arguments(WandbRun, "wandb")
        parser.add_class_arguments(Progress, "progress")
        parser.add_argument(
            "--tensorboard",
            type=bool,
            default=False,
            help="also write every scalar for TensorBoard, to DIR/tensorboard",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, after refusing what the parser would silently resolve in favour of the last value."""
        assert isinstance(args, list)
        refuse_repeated_cache(args)
        refuse_two_models(args)
        self.config = parser.parse_args(args)
        refuse_missing_parts(self.config[self.config.subcommand])

    def _parse_ckpt_path(self) -> None:
        """Decide the run directory and, for ``fit``, what the run goes on from: the newest checkpoint in it.

        LightningCLI would silently prefer the settings of a checkpoint to those that are given; here they are refused
        where they differ and a run cannot be continued with them. The other subcommands take the configuration as it
        is given; weights that do not fit it fail on loading.
        """
        subcommand = str(self.config.subcommand)
        config = self.config[subcommand]
        given = str(config.get("ckpt_path") or "")
        of_checkpoint = run_of_checkpoint(given)
        if config.trainer.default_root_dir:
            self.run_directory = Path(config.trainer.default_root_dir)
        elif of_checkpoint is not None:
            self.run_directory = of_checkpoint
        else:
            self.run_directory = self._new_directory(config.model.class_path.rpartition(".")[2].lower())
        config.trainer.default_root_dir = str(self.run_directory)
        refuse_other_lineages(given, subcommand)
        if given == "best":
            given = os.path.join(config.best_checkpoint.dirpath or str(self.run_directory / CHECKPOINTS), BEST)
            config.ckpt_path = given
        if subcommand == "fit" and not config.trainer.fast_dev_run:
            self._go_on(config, given)
        elif given and given.partition(":")[0] not in ("last", "registry"):
            refuse_missing(given)

    def _new_directory(self, label: str) -> Path:
        """Return the directory of a run that names none."""
        return default_run_directory(label)

    def _go_on(self, config: Namespace, given: str) -> None:
        folder = config.checkpoint.dirpath or str(self.run_directory / CHECKPOINTS)
        if given in ("", "last"):
            found = newest_checkpoint(folder)
            if found is None and given:
                raise ValueError(f"--ckpt_path last: there is no checkpoint in {folder}")
            if found is None:
                return
            path, checkpoint = found
        else:
            refuse_missing(given)
            path, checkpoint = given, read_checkpoint(given)
            check_whole(given)
        self._refuse_other_settings(path, checkpoint.get("config", {}), config)
        step, length = int(checkpoint["global_step"]), int(config.trainer.max_steps)
        if 0 < length <= step:
            if given in ("", "last"):
                call_last(path, step)
            left_out = self._settle()
            raise FinishedRun(
                f"the run in {self.run_directory} is finished: {path} is of step {step} of {length}. "
                + (f"It was {left_out}. " if left_out else "")
                + "Name another --trainer.default_root_dir for a new run"
            )
        self._accumulated_before = checkpoint.get("config", {}).get("trainer", {}).get("accumulate_grad_batches")
        rank_zero_info(f"The run goes on from {path}, step {step} of {length}")
        self._goes_on_from, self._first_step = path, step

    def _settle(self) -> str:
        """Write that the run is finished where its end was cut off, and return what is missing."""
        refuse_beside_another(self.run_directory, slurm.job())
        return settle_finished(self.run_directory) if getattr(rank_zero_only, "rank", 0) == 0 else ""

    def _refuse_other_settings(self, path: str, saved: dict[str, Any], config: Namespace) -> None:
        parser = self._parser("fit")
        differing = changed_settings(saved, plain_config(parser, config), parser.get_defaults().trainer.as_dict())
        if differing:
            raise ValueError(
                f"{path} was trained with other settings, and a run is continued unchanged:\n  "
                + "\n  ".join(differing)
                + "\nGive the settings of the run (its config.yaml), or name another --trainer.default_root_dir for a "
                "new run, which may start from an exported encoder"
            )

    # ---------------------------------------------------------- instantiation

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Return the trainer with the standing callbacks and, unless ``trainer.logger`` says otherwise, the loggers."""
        parser = self._parser(self.subcommand)
        config = {**self._get(self.config_init, "trainer"), **kwargs}
        defaults, given = parser.get_defaults(), self.config[self.subcommand]
        callbacks: list[Callback] = []
        for name in parser.callback_keys:
            callback = self._get(self.config_init, name)
            if isinstance(callback, StandingCallback):
                callback.explicit = _demands(given[name]) != _demands(defaults[name])
            if config["enable_checkpointing"] is False and isinstance(callback, Checkpoint):
                continue
            if isinstance(callback, (RunCheckpoint, BestCheckpoint)):
                callback.dirpath = callback.dirpath or str(self.run_directory / CHECKPOINTS)
            callbacks.append(callback)
        if config["logger"] in (None, True):
            config["logger"] = self._loggers()
        config["enable_progress_bar"] = self._add_progress(config, callbacks)
        trainer = self._instantiate_trainer(config, callbacks)
        environment = cast(Any, trainer)._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment):  # also where Lightning finds SLURM by itself
            environment.auto_requeue = False  # it would save from inside a signal handler, into another lineage
        return trainer

    def _add_progress(self, config: dict[str, Any], callbacks: list[Callback]) -> bool:
        """Add what reports the progress, unless the user has named or forbidden one; return whether there is any."""
        if config["enable_progress_bar"] is False:
            return False
        given = config["callbacks"] or []
        if any(isinstance(one, ProgressBar) for one in (given if isinstance(given, list) else [given])):
            return True
        bar = self._get(self.config_init, "progress").callback()
        callbacks.extend([bar] if bar is not None else [])
        return bar is not None

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Tell Lightning the checkpoint; in the saved configuration it would outlive the file."""
        arguments: dict[str, Any] = super()._prepare_subcommand_kwargs(subcommand)
        return arguments | {"ckpt_path": self._goes_on_from} if subcommand == "fit" else arguments

    def _loggers(self) -> list[Logger]:
        filename = METRICS if self.subcommand == "fit" else f"{self.subcommand}_metrics.csv"
        loggers: list[Logger] = [RunCSVLogger(self.run_directory, filename)]
        wandb = self._get(self.config_init, "wandb").logger(self.run_directory) if self.subcommand == "fit" else None
        if self.subcommand == "fit" and self._get(self.config_init, "tensorboard"):
            loggers.append(RunTensorBoardLogger(self.run_directory))
        return [*loggers, wandb] if wandb is not None else loggers

    # ---------------------------------------------------------------- running

    def _run_subcommand(self, subcommand: str) -> None:
        """Run, and where the run was told to stop and has saved itself, see that it goes on."""
        preemption = next((c for c in cast(Any, self.trainer).callbacks if isinstance(c, Preemption)), None)
        if preemption is None or subcommand != "fit":
            STOP.obey()
            super()._run_subcommand(subcommand)
            return
        if slurm.restarts():
            rank_zero_info(f"SLURM job {slurm.job()}, started for the {slurm.restarts() + 1}. time")
        try:
            super()._run_subcommand(subcommand)
        except Preempted as stopped:
            self.exit_code = preemption.hand_over(self.trainer, stopped)

    # --------------------------------------------------------------- checking

    def before_fit(self) -> None:
        """Check everything that can be checked, then claim the run directory."""
        self._preflight()
        trainer = cast(Any, self.trainer)  # Lightning declares neither fast_dev_run nor callbacks
        if trainer.fast_dev_run:
            return
        self._warn_of_other_cut()
        if trainer.is_global_zero:
            refuse_beside_another(self.run_directory, slurm.job())
        claim(self.run_directory, resuming=self._goes_on_from is not None or bool(trainer.checkpoint_callbacks))
        for logger in self.trainer.loggers:
            if isinstance(logger, (RunCSVLogger, RunTensorBoardLogger)) and trainer.is_global_zero:
                logger.rewind(self._first_step)

    def _warn_of_other_cut(self) -> None:
        """Say what changes where the samples that meet in a loss are no longer the same."""
        before, now = self._accumulated_before, self.trainer.accumulate_grad_batches
        meeting = getattr(self.model, "couples_samples", ())
        if meeting and before not in (None, now):
            rank_zero_warn(
                f"trainer.accumulate_grad_batches was {before} in {self._goes_on_from} and is {now}: "
                f"{' and '.join(meeting)} of {type(self.model).__name__} meet in a micro-batch of all devices, which "
                f"was 1/{before} of the global batch and is 1/{now} now. The run goes on, but with another loss; "
                f"{before} keeps it, with as many more samples on each device as there are fewer devices"
            )

    def after_fit(self) -> None:
        """End with the report of a policy that has stopped the run.

        Raises:
            RunStopped: with the report.
        """
        for callback in cast(Any, self.trainer).callbacks:
            if report := getattr(callback, "stopped", ""):
                raise RunStopped(f"{self.run_directory}: {report}")

    def before_validate(self) -> None:
        """Check the data, then the run directory."""
        self._preflight()
        claim(self.run_directory, resuming=True)

    before_test = before_validate
    before_predict = before_validate

    def _preflight(self) -> None:
        """Let data and callbacks refuse before loggers, checkpoints or processes exist; Lightning's order is later."""
        self.trainer.strategy.connect(self.model)
        stage = str(self.subcommand)
        for callback in cast(Any, self.trainer).callbacks:
            if isinstance(callback, StandingCallback):
                StandingCallback.setup(callback, self.trainer, self.model, stage)
        self.datamodule.trainer = self.trainer
        self.datamodule.setup(stage)
        if stage == "fit":
            for callback in cast(Any, self.trainer).callbacks:
                if isinstance(callback, StandingCallback):
                    callback.check_data(self.trainer, self.model, self.datamodule)


class ParsedFit(AgssdCLI):
    """The command line of ``agssd fit``, parsed and refused as by ``fit``; see :class:`agssd.commands.Fit`.

    Args:
        args: the command line after ``agssd fit``.
        new_directory: of a run whose command line names none; by default as ``fit`` would call it.
    """

    def __init__(self, args: Sequence[str], new_directory: Path | None = None) -> None:
        """Parse."""
        self._given_directory = new_directory
        super().__init__(["fit", *args])
        self.settings = self.config[self.subcommand]

    def _new_directory(self, label: str) -> Path:
        return self._given_directory or super()._new_directory(label)

    def _settle(self) -> str:
        """Write nothing."""
        return ""

    def instantiate_classes(self) -> None:
        """Build nothing yet."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""

    def build(self) -> None:
        """Make the model and the data module; nothing is read or written."""
        super().instantiate_classes()
        self._trainer_settings = self._get(self.config_init, "trainer")
        del self.config_init  # so that nothing but ``model`` holds the model

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Build none with the rest."""
        return cast(L.Trainer, None)

    def build_trainer(self) -> L.Trainer:
        """Return the trainer without callbacks and loggers; after :meth:`build`."""
        without = {"logger": False, "enable_checkpointing": False, "callbacks": None, "enable_model_summary": False}
        return self._instantiate_trainer({**self._trainer_settings, **without}, [])


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "litlogger" not in record.getMessage()


def _demands(settings: Namespace) -> dict[str, Any]:
    """Return a callback's settings without its rhythm and size, which ask nothing of the module."""
    asks_nothing = ("every_n_steps", "min_samples", "window_vox", "max_vox", "at_start", "at_end")
    return {name: value for name, value in settings.as_dict().items() if name not in asks_nothing}


# -------------------------------------------------------------------- guards
