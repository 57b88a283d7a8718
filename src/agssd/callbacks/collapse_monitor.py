"""The collapse dashboard: what the teacher's outputs look like, and a sentence when they are going wrong."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, cast, get_args

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from agssd.callbacks.actions import record_action, stop_run
from agssd.callbacks.collapse_alarms import TERMS, Alarm, CollapseAlarms
from agssd.callbacks.collapse_window import Window, rows_of
from agssd.callbacks.rollback import Rollback
from agssd.callbacks.standing import StandingCallback, log_figures, total_steps
from agssd.distributed import all_max, gather_objects
from agssd.evaluation.collapse import attention_figures
from agssd.sharding import gathered
from agssd.types import Easeable, GradientMeasured, Observable, StepJudged, TeacherStudent

Policy = Literal["warn", "stop", "rollback"]
_LOG = logging.getLogger(__name__)


class CollapseMonitor(StandingCallback):
    """Logs the collapse dashboard every ``every_n_steps`` optimiser steps and raises alarms.

    Samples are collected from ``module.observations`` over the last micro-batches before a report, as many as it takes
    to have ``min_samples`` over all ranks; while there are fewer, the report waits for the next turn, but for one turn
    only. The module is asked for its observations at those micro-batches and at the first one, which tells how many
    rows to expect; at all others nothing is computed. Asking may make the host wait for the device, and so does each
    report. A step that was withheld, being not finite, is :class:`~agssd.callbacks.non_finite.NonFinite`'s matter: its
    rows are left out, and a report due at it waits for the next turn; unless ``every_n_steps`` in a row were withheld,
    since then it is not the batch that is broken.

    Keys are ``collapse/<term>_<figure>`` for the terms cls and patch (figures of
    :func:`agssd.evaluation.collapse.distribution_figures`, and ``centre_norm``, ``feature_std``, ``effective_rank``,
    ``cosine``, ``norm_outlier``; for cls also ``min_distance``), ``collapse/attention_*`` of one sample,
    ``collapse/alarms`` (how many stand), with a teacher ``collapse/teacher_distance`` (to the student, over the norm of
    the student) and ``collapse/teacher_rank_gap`` (0 where all ranks have the same), and ``collapse/<name>`` for each
    of the module's own scalars, averaged over the window and the ranks; among them, where the module can measure it,
    ``grad_norm_<term>`` of the step that ends with the report.

    What follows a hard alarm when it begins is its policy. ``warn``: the sentence. ``stop``: the run ends at this step
    with a report. ``rollback``: before the next step weights, teacher, centres, optimiser and step go back to the last
    healthy checkpoint, on every rank alike, with a lower teacher temperature or learning rate; the stream of samples
    goes on, so that others come. Healthy is a checkpoint that was saved with no alarm standing, before the first sample
    of the next report was collected, and that report had none either; it is kept as ``checkpoints/healthy.ckpt``. Which
    of the two is lowered is the alarm's matter: for uniform outputs the temperature first, else the learning rate, and
    the other one when the same alarm comes again. Each action is a sentence, a line of ``actions.jsonl`` and a row of
    metrics (``collapse/rollbacks``, ``collapse/eased_lr``, ``collapse/eased_temperature``). Without a healthy
    checkpoint, or after ``max_rollbacks``, the run is stopped instead.

    An alarm speaks when it begins, not while it lasts, and counts for all ranks, whichever has it. During the first
    ``grace`` of the run only figures that are not finite alarm, because a fresh network looks collapsed.

    Source: docs/method.md (b) 1, (b) 2, (c); thresholds from CVA's ``cw_std`` and DINOv2-3D-Med where named, else
    ours. Deviates: ``uniform_steps`` is at most a tenth of the run, so that short runs can alarm at all; and a term
    whose batch entropy equals its sample entropy warns, which neither the uniform nor the peaked alarm sees.

    Args:
        every_n_steps: optimiser steps between reports.
        min_samples: rows over all ranks that each figure is computed from.
        policy: what follows hard alarms: ``warn``, ``stop`` or ``rollback``.
        policies: another policy for single alarms, by their name with or without the term, such as ``peaked: stop``.
        max_rollbacks: after which the next one stops the run.
        temperature_factor: of the teacher's temperatures at a rollback.
        lr_factor: of the learning rate at a rollback.
        grace: share of the run without alarms.
        uniform_margin: nats; a cross-entropy this close to ln K counts as uniform.
        uniform_steps: optimiser steps it must stay so.
        min_entropy_batch: lowest entropy of the mean teacher output, as a share of ln K.
        max_share: highest share of samples on one prototype; not judged while samples are nearly uniform.
        min_information: lowest difference of batch and sample entropy, as a share of ln K.
        min_feature_std: lowest spread of L2-normalised features (1 is isotropic).
        soft_rank: effective rank below which to warn.
        hard_rank: effective rank below which the features are lost.
        max_cosine: mean cosine of different samples above which the features are lost.
        min_distance: between the L2-normalised [CLS] of two views, below which they count as duplicates.
        max_gradient_ratio: largest over smallest gradient norm of the loss terms behind the encoder.
        max_fused_gain: share of the patch loss that fusion may take off (AG-SSD) before the fuser counts as copying.
    """

    needs: ClassVar[type[Any]] = Observable

    def __init__(
        self,
        every_n_steps: int = 100,
        min_samples: int = 512,
        policy: Policy = "warn",
        policies: dict[str, Policy] | None = None,
        max_rollbacks: int = 3,
        temperature_factor: float = 0.7,
        lr_factor: float = 0.5,
        grace: float = 0.1,
        uniform_margin: float = 0.01,
        uniform_steps: int = 500,
        min_entropy_batch: float = 0.3,
        max_share: float = 0.5,
        min_information: float = 0.01,
        min_feature_std: float = 0.3,
        soft_rank: float = 10.0,
        hard_rank: float = 2.0,
        max_cosine: float = 0.995,
        min_distance: float = 1e-4,
        max_gradient_ratio: float = 10.0,
        max_fused_gain: float = 0.5,
    ) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise ValueError(f"collapse_monitor.every_n_steps is {every_n_steps}; it must be at least 1")
        if min_samples < 2:
            raise ValueError(f"collapse_monitor.min_samples is {min_samples}; figures need at least 2 samples")
        for name, chosen in (("policy", policy), *((f"policies.{k}", v) for k, v in (policies or {}).items())):
            if chosen not in get_args(Policy):
                raise ValueError(f"collapse_monitor.{name} is {chosen!r}; choose {', '.join(get_args(Policy))}")
        self.every_n_steps = every_n_steps
        self.min_samples = min_samples
        self.policy: Policy = policy
        self.policies = dict(policies or {})
        self.rollback = Rollback(max_rollbacks, {"temperature": temperature_factor, "lr": lr_factor})
        self.alarms = CollapseAlarms(
            grace=grace,
            uniform_margin=uniform_margin,
            uniform_steps=uniform_steps,
            min_entropy_batch=min_entropy_batch,
            max_share=max_share,
            min_information=min_information,
            min_feature_std=min_feature_std,
            soft_rank=soft_rank,
            hard_rank=hard_rank,
            max_cosine=max_cosine,
            min_distance=min_distance,
            max_gradient_ratio=max_gradient_ratio,
            max_fused_gain=max_fused_gain,
        )
        self._standing: set[str] = set()
        self._step = 0
        self._total = 0
        self._waited = False
        self._window = Window(min_samples)
        self._before: Window | None = None  # the window before the step under way, if that adds to it
        self._rows: int | None = None

    @property
    def stopped(self) -> str:
        """The report of a run that was ended by an alarm, else empty."""
        return self.rollback.stopped

    def state_dict(self) -> dict[str, Any]:
        """Return since when each term has been uniform, which alarms stand, and what was done about them."""
        own = {"uniform_since": dict(self.alarms.uniform_since), "standing": sorted(self._standing)}
        return own | self.rollback.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the alarms of an interrupted run."""
        self.alarms.uniform_since = dict(state_dict["uniform_since"])
        self._standing = set(state_dict["standing"])
        self.rollback.load_state_dict(state_dict)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Decide whether to act in this run.

        Raises:
            ValueError: for a policy of rollback with a module that has nothing to lower.
        """
        super().setup(trainer, pl_module, stage)
        if self.active and "rollback" in (self.policy, *self.policies.values()) and not isinstance(pl_module, Easeable):
            raise ValueError(
                f"collapse_monitor.policy is rollback, but {type(pl_module).__name__} does not implement "
                "agssd.types.Easeable; choose warn or stop"
            )

    def rank_state(self) -> dict[str, Any]:
        """Return what this rank has collected for the next report, for :class:`RunCheckpoint`."""
        return {"waited": self._waited, "rows": self._rows, "window": self._window.state()}

    def load_rank_state(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on collecting; called after ``on_train_start`` on as many ranks as there were."""
        self._waited, self._rows = state["waited"], state["rows"]
        self._window.load_state(state["window"], device)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start with an empty window; every rank collects its part of ``min_samples``."""
        if self.active:
            self._step = trainer.global_step
            self._total = total_steps(trainer)
            self._window = Window(math.ceil(self.min_samples / trainer.world_size))
            self._before = None
            self._rows = None
            self.rollback.let_go(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Roll back where that is due; have each term's gradient measured in the step whose end brings a report."""
        if self.active and self.rollback.pending:
            left = self.rollback.carry_out(trainer, pl_module)
            self._standing, self.alarms.uniform_since = set(), {}
            self._step, self._waited, self._window = trainer.global_step, False, Window(self._window.quota)
            for callback in trainer.checkpoint_callbacks:
                if hasattr(callback, "rolled_back"):  # it saves what stands from here on
                    callback.rolled_back(trainer, left)
        if isinstance(pl_module, GradientMeasured):
            pl_module.measure_gradients = self.active and (trainer.global_step + 1) % self.every_n_steps == 0

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Collect from this micro-batch if a report is near; report if it is due."""
        if not self.active:
            return
        stepped = trainer.global_step != self._step
        self._step = trainer.global_step
        steps_to_go = -(self._step if stepped else self._step + 1) % self.every_n_steps
        to_go = steps_to_go * trainer.accumulate_grad_batches
        if self._rows is None or self._window.needs_more(self._rows, to_go):
            observations = cast(Observable, pl_module).observations  # may be computed by being asked for
            if observations is not None:
                self._rows = rows_of(observations)
                if self._window.needs_more(self._rows, to_go):
                    if not self._window.counts:
                        self.rollback.note_newest(trainer)
                    self._before = self._window.copy() if self._before is None else self._before
                    self._window.collect(observations)
        if not stepped:
            return
        before, self._before = self._before, None
        due = self._step % self.every_n_steps == 0
        if (due or before is not None) and self._is_withheld(pl_module):
            self._window = before or self._window
            if due and self._window.full:
                self._window = Window(self._window.quota)
            return
        if not due:
            return
        ready = bool(self._window.counts) and (self._window.full or self._waited)
        self._waited = True
        if trainer.strategy.reduce_boolean_decision(ready, all=True):
            self._report(trainer, pl_module)
            self._waited = False
            self._window = Window(self._window.quota)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report a rollback that no step is left for."""
        if self.active:
            self.rollback.let_go(trainer)
            self.rollback.end(trainer, self._total)

    def _is_withheld(self, module: pl.LightningModule) -> bool:
        """Return whether the step just done was withheld for its batch, alike on every rank; waits for the device."""
        if not isinstance(module, StepJudged) or module.step_figures is None:
            return False
        return 0 < float(module.step_figures[0]) < self.every_n_steps

    def _report(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        on_device = self._window.figures(trainer, module)
        with gathered(module):
            attention = cast(Observable, module).view_panel(0).get("attention")
        if attention is not None:
            on_device |= attention_figures(attention[0])
        if isinstance(module, TeacherStudent):
            on_device |= _teacher_figures(module)
        stacked = torch.stack([value.to(module.device, torch.float32) for value in on_device.values()])
        figures = _without_empty(dict(zip(on_device, stacked.tolist(), strict=True)), self._window.scalars)
        own = self.alarms.diagnose(figures, self._window.num_prototypes, self._step, self._total)
        alarms = list({alarm.name: alarm for found in reversed(gather_objects(own)) for alarm in found}.values())
        figures["alarms"] = float(len(alarms))
        log_figures(trainer, {f"collapse/{name}": value for name, value in figures.items()})
        new = [alarm for alarm in alarms if alarm.name not in self._standing]
        was_quiet, self._standing = not self._standing, {alarm.name for alarm in alarms}
        for alarm in new if trainer.is_global_zero else ():
            _LOG.log(logging.ERROR if alarm.hard else logging.WARNING, "step %d: %s", self._step, alarm.sentence)
            record_action(trainer, "alarm", alarm=alarm.name, hard=alarm.hard, sentence=alarm.sentence)
        self.rollback.judge_newest(trainer, self.state_key, was_quiet and not alarms)
        self._act(trainer, module, [alarm for alarm in new if alarm.hard])

    def _act(self, trainer: pl.Trainer, module: pl.LightningModule, alarms: list[Alarm]) -> None:
        """Do what the policies say about new hard alarms; called on every rank alike."""
        wanted = [alarm for alarm in alarms if self._policy_of(alarm) != "warn"]
        if not wanted:
            return
        if any(self._policy_of(alarm) == "stop" for alarm in wanted):
            self.rollback.stopped = "; ".join(alarm.sentence for alarm in wanted)
            stop_run(trainer, self.rollback.stopped, alarms=[alarm.name for alarm in wanted])
        else:
            self.rollback.demand(trainer, cast(Easeable, module), wanted)

    def _policy_of(self, alarm: Alarm) -> Policy:
        kind = alarm.name.partition("_")[2] if alarm.name.startswith(TERMS) else alarm.name
        return self.policies.get(alarm.name, self.policies.get(kind, self.policy))


def _without_empty(figures: dict[str, float], scalars: set[str]) -> dict[str, float]:
    """Return ``figures`` without terms that had no sample (all tokens background) and scalars that had no value."""
    empty = tuple(f"{term}_" for term in TERMS if figures.get(f"{term}_samples") == 0.0)
    return {
        name: value
        for name, value in figures.items()
        if not (empty and name.startswith(empty)) and not (name in scalars and math.isnan(value))
    }


@torch.no_grad()
def _teacher_figures(module: TeacherStudent) -> dict[str, Tensor]:
    """Return how far the teacher is from the student, and how far the teachers of the ranks are apart; () each.

    Where each rank holds another part of them, ranks cannot differ, and only the first is returned.
    """
    student = [parameter.detach() for parameter in module.student.parameters()]
    teacher = [parameter.detach() for parameter in module.teacher.parameters()]
    own, size, apart = map(_norm, (teacher, student, torch._foreach_sub(teacher, student)))
    figures = {"teacher_distance": apart / size.clamp_min(1e-12)}
    if any(isinstance(parameter, DTensor) for parameter in student):
        return figures
    return figures | {"teacher_rank_gap": all_max(own) + all_max(-own)}


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    norms = torch.stack(torch._foreach_norm(list(tensors)))
    norm: Tensor = torch.linalg.vector_norm((norms.full_tensor() if isinstance(norms, DTensor) else norms).double())
    return norm
