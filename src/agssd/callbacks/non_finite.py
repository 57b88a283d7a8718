"""Steps that were withheld because loss or gradient was not finite: told, captured, and counted."""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import lightning.pytorch as pl
import torch
from torch import Tensor

from agssd.callbacks.actions import record_action, stop_run
from agssd.callbacks.standing import StandingCallback, log_figures, total_steps
from agssd.distributed import gather_objects
from agssd.evaluation.finite import Finding, first_non_finite, random_state_of
from agssd.sharding import is_sharded, whole
from agssd.types import ParentBatch, StepJudged

_LOG = logging.getLogger(__name__)
CAPTURES = "captures"
FORMAT = 1
DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
_MAX_RANKS = 8  # that capture a step of which no rank alone is the cause
_REMEDY = "look at the cause with `agssd replay {}`; lower the learning rate, or prefer bf16 over fp16"


@dataclass
class _Step:
    """One optimiser step whose judgement the host has not read yet."""

    number: int  # optimiser steps done before it
    figures: Tensor  # on the host, filled when ``ready`` has passed
    ready: Any  # event of the device, or None
    names: tuple[str, ...]
    batches: list[ParentBatch]
    random_state: dict[str, Tensor]
    mask_ratio: tuple[float, float] | None


class NonFinite(StandingCallback):
    """Watches over withheld steps: a step whose loss or gradient is not finite moves nothing, on every rank alike.

    The module withholds it (:class:`agssd.models.step_guard.StepGuard`); the schedules go on. Here it is told in one
    sentence with the first place that is not finite, captured for ``agssd replay``, and counted
    (``non_finite/skipped``, a row of the metrics and of ``actions.jsonl`` for each).

    On CUDA the host learns of a step before it enqueues the end of the next one, so that the device never waits; the
    weights are still those of that step, since it moved nothing. Under fp16 a gradient that overflows while the
    gradient scaler looks for its scale is no failure: it is skipped and not counted until the scale falls below 1.

    A capture is ``DIR/captures/step<N>-rank<R>.pt``: parent crops, keys of the samples, random state, weights,
    configuration; no optimiser, no path, no name of a patient. Where the step comes again after a rollback its name
    ends in ``-2``. It is written by each rank whose own loss was not finite, else by the first 8 ranks. Where the
    ranks hold parts of the weights (FSDP2), the first place is left to ``agssd replay``.

    Args:
        max_skipped: withheld steps in a row after which the run stops with a report; 0 never stops.
        max_skipped_total: withheld steps in all after which it stops; 0 never stops.
        max_captures: captures that a rank writes at most; each holds the weights.
    """

    needs: ClassVar[type[Any]] = StepJudged

    def __init__(self, max_skipped: int = 5, max_skipped_total: int = 100, max_captures: int = 3) -> None:
        super().__init__()
        for name, value in (
            ("max_skipped", max_skipped),
            ("max_skipped_total", max_skipped_total),
            ("max_captures", max_captures),
        ):
            if value < 0:
                raise ValueError(f"non_finite.{name} is {value}; it must be at least 0")
        self.max_skipped, self.max_skipped_total, self.max_captures = max_skipped, max_skipped_total, max_captures
        self.in_a_row = self.total = self.captured = 0
        self.stopped = ""  # the report, once the run was ended
        self._found: Finding | None = None  # the last
        self._waiting: _Step | None = None
        self._begun: tuple[dict[str, Tensor], tuple[float, float] | None] = ({}, None)
        self._step = 0

    def state_dict(self) -> dict[str, Any]:
        """Return how many steps were withheld."""
        return {"in_a_row": self.in_a_row, "total": self.total}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.in_a_row, self.total = state_dict["in_a_row"], state_dict["total"]

    def rank_state(self) -> dict[str, Any]:
        """Return how many captures this rank has written, for :class:`RunCheckpoint`."""
        return {"captured": self.captured}

    def load_rank_state(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on counting them."""
        self.captured = state["captured"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Have the batches of each step kept until it is known to be finite."""
        if self.active:
            self._step, self._waiting = trainer.global_step, None
            cast(StepJudged, pl_module).parents = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the random state and the mask ratio of the step's first micro-batch."""
        if self.active and len(cast(StepJudged, pl_module).parents or []) <= 1:
            self._begun = (random_state_of(pl_module.device), getattr(pl_module, "mask_ratio", None))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Read what became of the step before: by now the device has passed it, or has this whole step to do."""
        self.settle(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Send for the judgement of the step, if this batch ended one; on a CPU it is here at once."""
        if not self.active or trainer.global_step == self._step:
            return
        module = cast(StepJudged, pl_module)
        figures, self._step = module.step_figures, trainer.global_step
        assert figures is not None and module.parents is not None
        event = None
        if figures.device.type == "cuda":
            event = torch.cuda.Event()
            figures = figures.to("cpu", non_blocking=True)
            event.record()
        self._waiting = _Step(self._step - 1, figures, event, module.loss_names, module.parents, *self._begun)
        module.parents = []
        if event is None:
            self.settle(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read what became of the last step."""
        self.settle(trainer, pl_module)

    def settle(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Read what became of the last step while its weights are there; called on every rank alike."""
        step, self._waiting = self._waiting, None
        if step is None:
            return
        if step.ready is not None:
            step.ready.synchronize()
        withheld, norm, local, *losses = step.figures.tolist()
        if not withheld or self._is_scaling(trainer, losses):
            self.in_a_row = 0
            return
        self.in_a_row += 1
        self.total += 1
        terms = [name for name, value in zip(step.names, losses, strict=True) if not _finite(value)]
        what = "loss " + ", ".join(terms[1:] or terms) if terms else "gradient"
        mine = not _finite(local) if terms else trainer.global_rank < _MAX_RANKS
        capture, finding = (None, None)
        wanted = mine and self.captured < self.max_captures
        weights = whole(module.state_dict(), wanted)
        if wanted:
            content = self._content(trainer, module, step, what, weights)
            capture = self._capture(trainer, step, content)
            finding = self._found = None if is_sharded(module) else self._find(trainer, module, step)
            if finding is not None and capture is not None:
                _write(capture, content | {"finding": finding.plain()})
        log_figures(trainer, {"non_finite/skipped": float(self.total), "non_finite/in_a_row": float(self.in_a_row)})
        self._tell(trainer, step, what, norm, capture, finding)
        too_many = [
            f"{count} {kind} (limit non_finite.{name} {limit})"
            for count, kind, name, limit in (
                (self.in_a_row, "in a row", "max_skipped", self.max_skipped),
                (self.total, "in all", "max_skipped_total", self.max_skipped_total),
            )
            if limit and count >= limit
        ]
        if too_many:
            place = Path(trainer.default_root_dir) / CAPTURES
            capture = capture or max(place.glob("*.pt"), default=place / "NAME.pt")
            found = f"; {self._found}" if self._found is not None else ""
            reason = (
                f"{what} was not finite at step {step.number} and the step was withheld, {' and '.join(too_many)}"
                f"{found}; {_REMEDY.format(capture)}"
            )
            stop_run(trainer, reason, steps_withheld=self.total)
            self.stopped = reason

    @staticmethod
    def _is_scaling(trainer: pl.Trainer, losses: list[float]) -> bool:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        return scaler is not None and all(_finite(value) for value in losses) and float(scaler.get_scale()) >= 1.0

    def _tell(
        self, trainer: pl.Trainer, step: _Step, what: str, norm: float, capture: Path | None, finding: Finding | None
    ) -> None:
        """Say what was withheld: the first rank that captured it says where, rank zero counts."""
        if capture is not None or trainer.is_global_zero:
            _LOG.error(
                "step %d: %s is not finite, so nothing was moved (%d in a row, %d in all)%s%s",
                *(step.number, what, self.in_a_row, self.total),
                f"; {finding}" if finding else "",
                f"; captured on rank {trainer.global_rank}: agssd replay {capture}" if capture else "",
            )
        written, found = _of_first_rank(trainer, capture, finding)
        record_action(
            trainer,
            "skip",
            skipped_step=step.number,
            what=what,
            in_a_row=self.in_a_row,
            total=self.total,
            gradient_norm=norm if _finite(norm) else str(norm),
            capture=written,
            finding=found,
        )

    @staticmethod
    def _find(trainer: pl.Trainer, module: pl.LightningModule, step: _Step) -> Finding | None:
        """Run the step again on this rank alone, at its own share of the run and mask ratio; a failure costs no run."""
        recipe, now = cast(Any, module), getattr(module, "mask_ratio", None)
        recipe.fixed_progress = step.number / total_steps(trainer)
        if now is not None:
            recipe.mask_ratio = step.mask_ratio
        try:
            dtype = DTYPES.get(str(trainer.precision_plugin.precision))
            return first_non_finite(module, step.batches, step.random_state, dtype)
        except Exception as error:  # out of memory, say: this needs more than a step
            reason = str(error).partition("\n")[0]
            _LOG.warning(
                "step %d: looking for the first place failed (%s: %s)", step.number, type(error).__name__, reason
            )
            return None
        finally:
            recipe.fixed_progress = None
            if now is not None:
                recipe.mask_ratio = now

    @staticmethod
    def _content(
        trainer: pl.Trainer, module: pl.LightningModule, step: _Step, what: str, weights: dict[str, Any]
    ) -> dict[str, Any]:
        return {
            "agssd_capture": FORMAT,
            "step": step.number,
            "total_steps": total_steps(trainer),
            "rank": trainer.global_rank,
            "world_size": trainer.world_size,
            "precision": str(trainer.precision_plugin.precision),
            "what": what,
            "finding": None,
            "model": _model_settings(trainer, module),
            "mask_ratio": None if step.mask_ratio is None else list(step.mask_ratio),
            "eased": dict(getattr(module, "eased", {})),
            "random_state": step.random_state,
            "batches": [{key: value.cpu() for key, value in cast(Any, batch).items()} for batch in step.batches],
            "state_dict": weights,
        }

    def _capture(self, trainer: pl.Trainer, step: _Step, content: dict[str, Any]) -> Path | None:
        """Write the capture; a disk that is full costs the capture, not the run."""
        self.captured += 1
        name = f"step{step.number:08d}-rank{trainer.global_rank}"
        folder = Path(trainer.default_root_dir) / CAPTURES
        path, again = folder / f"{name}.pt", 1
        while path.exists():  # of the same step, before a rollback
            again += 1
            path = folder / f"{name}-{again}.pt"
        return path if _write(path, content) else None


def _of_first_rank(
    trainer: pl.Trainer, capture: Path | None, finding: Finding | None
) -> tuple[str | None, dict[str, str] | None]:
    """Return name and finding of the first capture of any rank; called on every rank alike."""
    own = (capture.name if capture else None, finding.plain() if finding else None)
    return next((one for one in gather_objects(own) if one[0]), own)


def _write(path: Path, content: dict[str, Any]) -> bool:
    """Write a capture whole or not at all, and return whether it could be written."""
    partial = path.with_suffix(".pt.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, partial)
        partial.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        _LOG.error("step %d: %s cannot be written: %s", content["step"], path.name, str(error).partition("\n")[0])
        partial.unlink(missing_ok=True)
        return False
    return True


def _finite(value: float) -> bool:
    return value - value == 0.0


def _model_settings(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any] | None:
    """Return the ``model`` group of the run's configuration in plain types; None outside ``agssd fit``.

    With the groups that the command line hands to the model, which the configuration states beside it.
    """
    for callback in cast(Any, trainer).callbacks:
        if hasattr(callback, "plain_config"):
            config = callback.plain_config()
            takes = inspect.signature(type(module)).parameters
            linked = {name: config[name] for name in ("backbone", "views") if name in takes and config.get(name)}
            model: dict[str, Any] = config["model"]
            return model | {"init_args": model.get("init_args", {}) | linked}
    return None
