"""What is done about a run that goes wrong: one line per action in the run directory, and how the run is ended."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from agssd.run.state import ACTIONS as ACTIONS
from agssd.run.state import now

_LOG = logging.getLogger(__name__)


class RunStopped(ValueError):
    """A run was ended by a policy; the message is the report."""


def record_action(trainer: pl.Trainer, action: str, **details: Any) -> None:
    """Append an action to ``DIR/actions.jsonl``, on rank zero; a disk that is full costs the line, not the run.

    Args:
        trainer: of the run.
        action: what was done, such as ``rollback``.
        details: in plain types.
    """
    if not trainer.is_global_zero:
        return
    path = Path(trainer.default_root_dir) / ACTIONS
    line = json.dumps({"time": now(), "step": trainer.global_step, "action": action, **details})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        _LOG.warning("step %d: %s lacks a line (%s): %s", trainer.global_step, ACTIONS, error.strerror, line)


def stop_run(trainer: pl.Trainer, reason: str, **details: Any) -> None:
    """End the run at the end of this step; called on every rank alike. The last checkpoint is still written.

    ``agssd fit`` then refuses with ``reason``.
    """
    record_action(trainer, "stop", reason=reason.replace(f"{trainer.default_root_dir}/", ""), **details)
    if trainer.is_global_zero:
        _LOG.error("step %d: the run is stopped: %s", trainer.global_step, reason)
    trainer.should_stop = True
