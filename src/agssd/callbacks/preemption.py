"""A run that is told to stop saves itself at the next step and says that it wants to go on."""

from __future__ import annotations

import signal
import time
from typing import Any, ClassVar, cast

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from agssd.callbacks.actions import record_action
from agssd.callbacks.standing import StandingCallback
from agssd.distributed import world_size
from agssd.run import slurm
from agssd.run.stop_signals import STOP
from agssd.types import Interruptible, SavesOnRequest

EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: the same command again goes on


class Preempted(SystemExit):
    """The run has been saved because it was told to stop; its code is 75, as a plain script's exit code too.

    Args:
        step: optimiser steps done and saved.
    """

    def __init__(self, step: int) -> None:
        super().__init__(EXIT_PREEMPTED)
        self.step = step


class Preemption(StandingCallback, Checkpoint):
    """On SIGUSR1 or SIGTERM saves one checkpoint, as ``last.ckpt``, at the next optimiser step's end, and stops.

    A signal to any rank counts and only sets a flag. All ranks learn of it at the end of an optimiser step, when
    teacher, schedules, figures and the other checkpoints of that step are done. For that each of several ranks sends
    its flag before the optimiser moves, over a gloo group of its own, and looks at the answer at the step's end; the
    accelerator is not involved. What comes between the two counts one step later. A validation, which may take long, is
    broken off or left out; the run that goes on does not repeat it. The run then leaves by :class:`Preempted`, without
    the validation, probes and pictures of an ending run. A run that has taken its last step saves it and ends as
    usual. Lightning's handlers of these signals are not installed: one saves, one communicates, both from inside the
    handler and into checkpoints of another lineage.

    Inert without a checkpoint callback to save by: signals then do what they do to any program.

    Source: ours.

    Args:
        requeue: put a SLURM job back into the queue after the save.
    """

    needs: ClassVar[type[Any]] = pl.LightningModule

    def __init__(self, requeue: bool = True) -> None:
        super().__init__()
        self.requeue = requeue
        self._releases = False
        self._group: dist.ProcessGroup | None = None
        self._questions: list[tuple[dist.Work, Tensor]] = []  # sent and not looked at
        self._step = 0
        self._stopping = False
        self._between_steps = False
        self._looks = 0  # left in this validation

    # ------------------------------------------------------------------ hooks

    def usable(self, module: pl.LightningModule) -> bool:
        """Return True: every module can be saved."""
        return True

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Listen from now on, in Lightning's place."""
        super().setup(trainer, pl_module, stage)
        self.active = self.active and self._checkpoint(trainer) is not None
        if self.active:
            cast(Any, trainer)._signal_connector.register_signal_handlers = _do_nothing
            self._releases = not STOP.listening  # who has listened before the run does so after it
            STOP.listen()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take up the step that the run starts at and open the ranks' own group."""
        if not self.active:
            return
        self._step, self._stopping, self._questions = trainer.global_step, False, []
        self._between_steps, self._looks = False, 0
        if world_size() > 1:
            self._group = dist.new_group(backend="gloo")
            # Lightning asks the same of all ranks before every batch, on the device, and waits for the answer there
            cast(Any, trainer).fit_loop.epoch_loop._broadcast_sigterm_tensor = _do_nothing

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Ask; the answer is there when the step is done."""
        if self.active and not self._stopping:
            self._ask()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if this batch completed an optimiser step and some rank has been told to stop."""
        if not self.active or self._stopping:
            return
        self._between_steps = trainer.global_step != self._step
        if not self._between_steps:
            return
        self._step = trainer.global_step
        if not self._some_rank_was_told():
            return
        checkpoint = cast(SavesOnRequest, self._checkpoint(trainer))
        checkpoint.save_before_next(trainer)
        if 0 < trainer.max_steps <= self._step:
            checkpoint.save(trainer)  # what is left may take longer than there is time
            rank_zero_info(f"{self._sender()}: the run has taken its last step, {self._step}, and ends as usual")
        else:
            self._stopping = True
            self._tell(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Leave before anything of the next step, when figures of the last are logged and the checkpoint has saved."""
        if self._stopping:
            raise Preempted(self._step)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save and leave before a validation, for which there may be no time."""
        if self._stopping:
            self._leave_validation(trainer)
        at_end = 0 < trainer.max_steps <= self._step
        if not self.active or trainer.sanity_checking or not self._between_steps or at_end:
            return
        number = torch.tensor(min(sum(trainer.num_val_batches), 2.0**52), dtype=torch.float64)
        if self._group is not None:  # all ranks ask as often
            dist.all_reduce(number, op=dist.ReduceOp.MIN, group=self._group)
        self._looks = int(number)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Save and leave in the middle of a validation."""
        if self._looks < 1:
            return
        self._looks -= 1
        if self._some_rank_was_told():
            self._tell(trainer)
            self._leave_validation(trainer)
        self._ask()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ask no more."""
        self._looks = 0

    def _tell(self, trainer: pl.Trainer) -> None:
        record_action(trainer, "preemption", reason=self._sender())
        rank_zero_info(f"{self._sender()}: the run stops after step {self._step}")

    @staticmethod
    def _sender() -> str:
        return "A signal to another rank" if STOP.received is None else STOP.received[0].name

    def _leave_validation(self, trainer: pl.Trainer) -> None:
        cast(SavesOnRequest, self._checkpoint(trainer)).save(trainer)
        rank_zero_info(f"The validation of step {self._step} is left out")
        raise Preempted(self._step)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the signals back."""
        if self._releases:
            STOP.release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        if self._releases:
            STOP.release()

    # --------------------------------------------------------------- handing over

    def hand_over(self, trainer: pl.Trainer, stopped: Preempted) -> int:
        """Put a SLURM job back into the queue, close the W&B run, and return the exit code; called by every rank.

        SLURM ends a job that is put back, W&B's service first, and a job that got SIGTERM has little time. So what was
        told by SIGTERM goes back first, and what was told by SIGUSR1 closes its W&B run first.

        The code is 75 on the first rank of every machine and 0 on the others: a launcher kills all ranks as soon as
        one of them fails.
        """
        if trainer.is_global_zero:
            at_once = STOP.received is not None and STOP.received[0] == signal.SIGTERM
            if not at_once:
                self._interrupt_loggers(trainer)
            after = "" if STOP.received is None else f", {time.monotonic() - STOP.received[1]:.1f} s after the signal"
            rank_zero_info(f"stopped after step {stopped.step}{after}; {self._what_next()}")
            if at_once:
                self._interrupt_loggers(trainer)
        if self._group is not None:
            try:
                dist.all_reduce(torch.zeros(1), group=self._group)
            except RuntimeError as error:
                rank_zero_info(f"the ranks do not end together: {error}")
        return EXIT_PREEMPTED if trainer.local_rank == 0 else 0

    @staticmethod
    def _interrupt_loggers(trainer: pl.Trainer) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, Interruptible):
                logger.interrupt()

    def _what_next(self) -> str:
        if not self.requeue or slurm.job() is None:
            return "the same command goes on"
        try:
            return slurm.requeue()
        except OSError as error:
            return str(error)

    # ---------------------------------------------------------------- asking

    def _ask(self) -> None:
        if self._group is not None:
            flag = torch.tensor([int(STOP.received is not None)])
            work = dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
            self._questions.append((work, flag))

    def _some_rank_was_told(self) -> bool:
        """Return, alike on every rank, whether one had been told to stop when a question was sent."""
        if self._group is None:
            return STOP.received is not None
        questions, self._questions = self._questions, []
        for work, _ in questions:
            work.wait()
        return any(bool(answer.item()) for _, answer in questions)

    @staticmethod
    def _checkpoint(trainer: pl.Trainer) -> SavesOnRequest | None:
        callbacks = cast(Any, trainer).checkpoint_callbacks
        return next((callback for callback in callbacks if isinstance(callback, SavesOnRequest)), None)


def _do_nothing() -> None:
    """Stand in for Lightning's own ways with signals."""
