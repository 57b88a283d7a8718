"""List training runs: their state, how far they are, their last figures and where those came from."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agssd.commands._run_reader import Run

_HEAD = ("run", "method", "state", "step", "loss", "checkpoint", "samples/s", "probe", "watch", "from", "changed")
_WIDEST = 44  # characters of a reason in the table; --json has all of it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``agssd runs``."""
    parser.description = (
        "One line per run found below the folders, the one that changed last first. Loss: of a row of metrics.csv, "
        "with its step and age. Probe: the figure that best.ckpt is chosen by, with the step of its weights. Watch: "
        "standing alarms of the collapse monitor, and the last line of actions.jsonl. From: version and commit of "
        "agssd, the SLURM job, the W&B run."
    )
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="where to look (default: runs)")
    parser.add_argument("--json", action="store_true", help="print everything that is known as a list of objects")


def run(args: argparse.Namespace) -> int:
    """Print the runs; return 0, or 1 when there is none."""
    from agssd.commands._run_reader import find_runs, read_run

    runs, foreign = [], []
    for directory in find_runs(args.folders or [Path("runs")]):
        try:
            runs.append(read_run(directory))
        except ValueError as error:
            foreign.append(f"{directory} is left out: {error}")
    runs.sort(key=lambda one: (-one.changed, str(one.directory)))
    if args.json:
        print(json.dumps([as_json(one) for one in runs], indent=2))
    elif runs:
        print(as_table(runs, time.time()))
    for note in [*(note for one in runs for note in one.notes), *foreign]:
        print(f"note: {note}", file=sys.stderr)
    if not runs:
        print("no run was found", file=sys.stderr)
    return 0 if runs else 1


def as_json(one: Run) -> dict[str, Any]:
    """Return the fields of a run in plain types; a figure that is not finite becomes a string, as JSON has none."""
    fields = dataclasses.asdict(one) | {"directory": str(one.directory)}
    return {name: str(v) if isinstance(v, float) and v - v != 0.0 else v for name, v in fields.items()}


def as_table(runs: list[Run], now: float) -> str:
    """Return a line of names and one line per run; ``now`` is the time that ages are counted from."""
    rows = [_HEAD, *(_row(one, now) for one in runs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _row(one: Run, now: float) -> tuple[str, ...]:
    reason = one.reason if len(one.reason) <= _WIDEST else one.reason[: _WIDEST - 3] + "..."
    step = str(one.step)
    if one.max_steps:
        step += f"/{one.max_steps} ({100 * one.step / one.max_steps:.1f} %)"
    watch = "" if one.alarms is None else "ok" if one.alarms == 0 else f"{one.alarms} alarm(s)"
    if one.last_action is not None:
        what = one.last_action.get("alarm") or one.last_action.get("what")
        told = f"last {one.last_action.get('action')}{f' {what}' if what else ''} @{one.last_action.get('step')}"
        watch = f"{watch}, {told}" if watch else told
    code = " ".join(text for text in (one.agssd, one.commit) if text)
    job = f"job {one.slurm_job}" if one.slurm_job else ""
    came_from = ", ".join(text for text in (code, job, f"W&B {one.wandb_id}" if one.wandb_id else "") if text)
    cells = (
        str(one.directory),
        one.method,
        f"{one.state}: {reason}" if reason else one.state,
        step,
        None if one.loss is None else f"{one.loss:.4g} @{one.loss_step} {age(now - (one.loss_time or now))} ago",
        one.checkpoint,
        None if one.samples_per_s is None else f"{one.samples_per_s:.3g}",
        None if one.probe is None else f"{one.probe.removeprefix('probe/')} {one.probe_value:.3f} @{one.probe_step}",
        watch,
        came_from,
        f"{age(now - one.changed)} ago",
    )
    return tuple(cell or "-" for cell in cells)


def age(seconds: float) -> str:
    """Return a time that has passed in its largest unit, such as ``3 h``."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
