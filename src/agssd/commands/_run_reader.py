"""Run directories as they lie on disk: configuration, state, curves, checkpoints and actions, read without torch."""

from __future__ import annotations

import csv
import json
import os
import re
import time
from calendar import timegm
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agssd.run.state import ACTIONS, CHECKPOINTS, CONFIG, METRICS, STATE, WANDB_ID, lives, read_state
from agssd.types import PROBE_FIGURES

_PARTS_OF_A_RUN = {CHECKPOINTS, "wandb", "panels", "captures", "tensorboard"}  # no runs lie in them
_STEP = re.compile(r"step(\d+)\.ckpt$")
_LATER = re.compile(r"config-(\d+)\.yaml$")
_TAIL = 512 * 1024  # bytes at the end of a table in which the newest figures are looked for first
_STUCK_S = 600  # a live run without a step for so long says so
_RECENT_S = 900  # a run without a state whose metrics are younger may be running


@dataclass
class Run:
    """What is known of a run; ``None`` where nothing is. Times are seconds since the epoch, steps optimiser steps."""

    directory: Path
    method: str | None = None
    state: str = "unknown"
    reason: str = ""
    step: int = 0
    max_steps: int | None = None
    loss: float | None = None
    loss_step: int | None = None
    loss_time: float | None = None
    checkpoint: str | None = None
    checkpoint_step: int | None = None
    samples_per_s: float | None = None
    probe: str | None = None
    probe_value: float | None = None
    probe_step: int | None = None
    alarms: int | None = None
    last_action: dict[str, Any] | None = None
    agssd: str | None = None
    commit: str | None = None
    wandb_id: str | None = None
    slurm_job: str | None = None
    host: str | None = None
    changed: float = 0.0
    notes: list[str] = field(default_factory=list)


def find_runs(folders: Iterable[Path]) -> Iterator[Path]:
    """Yield every directory at or below ``folders`` that holds files of a run, each once; links are not followed.

    Raises:
        ValueError: for a folder that does not exist.
    """
    seen = set()
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder; name one that holds runs, or a run directory")
        for place, names, files in os.walk(folder):
            marks = {STATE, METRICS, CONFIG} & set(files)
            of_run = bool(marks) or CHECKPOINTS in names
            names[:] = sorted(n for n in names if n[0] != "." and not (of_run and n in _PARTS_OF_A_RUN))
            path = Path(place)
            if of_run and (path.resolve() not in seen):
                seen.add(path.resolve())
                yield path


def read_run(directory: Path) -> Run:
    """Return what the files of a run say.

    Raises:
        ValueError: if the directory is no run of agssd.
    """
    run = Run(directory)
    config, state = _tried(run, read_config, directory), _tried(run, read_state, directory)
    model = (config or {}).get("model")
    if not (isinstance(model, dict) and "class_path" in model) and state is None:
        raise ValueError("; ".join(run.notes) or f"{directory} holds no configuration and no state of a run of agssd")
    config, state = config or {}, state or {}
    run.method = str((model or {}).get("class_path", "")).rpartition(".")[2] or None
    of_trainer = config.get("trainer")
    limit = of_trainer.get("max_steps") if isinstance(of_trainer, dict) else None
    run.max_steps = state.get("max_steps") or (limit if isinstance(limit, int) and limit > 0 else None)
    for name in ("agssd", "commit", "slurm_job", "host"):
        setattr(run, name, state.get(name))
    id_file = directory / WANDB_ID
    run.wandb_id = id_file.read_text().strip() if id_file.is_file() else None
    _read_checkpoints(run, config)
    last_row = _read_metrics(run, config)
    _read_actions(run)
    times = [path.stat().st_mtime for name in (STATE, METRICS, CONFIG, ACTIONS) if (path := directory / name).exists()]
    run.changed = max([run.changed, *times])
    _judge(run, state, last_row)
    return run


def config_files(directory: Path) -> list[Path]:
    """Return the saved configurations of a run, oldest first: each start of it adds one (``config-2.yaml``)."""
    first = directory / CONFIG
    later = {int(found[1]): path for path in directory.glob("config-*.yaml") if (found := _LATER.search(path.name))}
    return [*([first] if first.is_file() else []), *(later[number] for number in sorted(later))]


def read_config(directory: Path) -> dict[str, Any] | None:
    """Return the configuration of a run, of its last start, None where there is none.

    Raises:
        ValueError: if it is torn or no configuration.
    """
    paths = config_files(directory)
    return read_config_file(paths[-1]) if paths else None


def read_config_file(path: Path) -> dict[str, Any]:
    """Return a saved configuration.

    Raises:
        ValueError: if it is torn or no configuration.
    """
    import yaml

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {str(error).partition(chr(10))[0]}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is no configuration of agssd")
    return config


def read_curves(path: Path) -> dict[str, dict[int, float]]:
    """Return every scalar of a ``metrics.csv`` by step; of a step that is there twice the later row counts.

    A last line that was cut off is left out.

    Raises:
        ValueError: if the file cannot be read or has no column ``step``.
    """
    curves: dict[str, dict[int, float]] = {}
    for step, values in _rows(path, 0):
        for name, value in values.items():
            curves.setdefault(name, {})[step] = value
    return curves


def _rows(path: Path, start: int) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield (step, figures) of the whole rows after byte ``start``."""
    try:
        with path.open("rb") as file:
            head = file.readline()
            if start > len(head):
                file.seek(start)
                file.readline()  # the rest of a row
            lines = file.read().decode().splitlines(keepends=True)
        names = next(csv.reader([head.decode()]), [])
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if "step" not in names:
        raise ValueError(f"{path} is no table of metrics: it has no column step")
    at = names.index("step")
    for row in csv.reader(line for line in lines if line.endswith("\n")):
        if len(row) == len(names) and row[at].isdigit():
            figures = {name: _number(cell) for name, cell in zip(names, row, strict=True) if cell and name != "step"}
            yield int(row[at]), {name: value for name, value in figures.items() if value is not None}


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def newest_figures(path: Path, wanted: Iterable[str]) -> dict[str, tuple[float, int]]:
    """Return (value, step) of the last row with each of the ``wanted`` columns; looks at the end of the file first.

    Names ending in ``/`` stand for all columns that begin so. The last row itself is given under the name ``step``.
    """
    exact = {name for name in wanted if not name.endswith("/")}
    starts = tuple(name for name in wanted if name.endswith("/"))
    with path.open("rb") as file:
        names = next(csv.reader([file.readline().decode(errors="replace")]), [])
    looked_for = {name for name in names if name in exact or (starts and name.startswith(starts))}
    size = path.stat().st_size
    found: dict[str, tuple[float, int]] = {}
    for start in sorted({max(0, size - _TAIL), 0}, reverse=True):
        found = {}
        for step, values in _rows(path, start):
            found["step"] = (float(step), step)
            found |= {name: (value, step) for name, value in values.items() if name in looked_for}
        if looked_for <= set(found):
            break
    return found


def _tried(run: Run, read: Any, directory: Path) -> Any:
    try:
        return read(directory)
    except ValueError as error:
        run.notes.append(str(error))
        return None


def _read_checkpoints(run: Run, config: dict[str, Any]) -> None:
    settings = config.get("checkpoint")
    elsewhere = settings.get("dirpath") if isinstance(settings, dict) else None
    if elsewhere and "://" in str(elsewhere):
        run.notes.append(f"the checkpoints of {run.directory} lie at {elsewhere}, where they are not looked for")
        return
    folder = Path(elsewhere) if elsewhere else run.directory / CHECKPOINTS
    try:
        files = [file for file in folder.iterdir() if file.suffix == ".ckpt"]
        times = [file.stat().st_mtime for file in files]
    except OSError:  # none yet, or one is being renamed
        return
    steps = {int(found[1]): file.name for file in files if (found := _STEP.search(file.name))}
    if steps:
        run.checkpoint_step = max(steps)
        run.checkpoint = steps[run.checkpoint_step]
    elif files:
        run.checkpoint = max(zip(times, files, strict=True))[1].name
    run.changed = max([run.changed, *times])


def _read_metrics(run: Run, config: dict[str, Any]) -> int | None:
    """Fill in the newest figures and return the step of the last row."""
    path = run.directory / METRICS
    if not path.is_file():
        return None
    try:
        found = newest_figures(path, ("train/loss", "throughput/samples_per_s", "collapse/alarms", "probe/"))
    except ValueError as error:
        run.notes.append(str(error))
        return None
    if "train/loss" in found:
        (run.loss, run.loss_step), run.loss_time = found["train/loss"], path.stat().st_mtime
    if "throughput/samples_per_s" in found:
        run.samples_per_s = found["throughput/samples_per_s"][0]
    if "collapse/alarms" in found:
        run.alarms = int(found["collapse/alarms"][0])
    best = config.get("best_checkpoint")
    chosen = best.get("figure") if isinstance(best, dict) else None
    run.probe = next((n for n in (chosen, *(f"probe/{name}" for name in PROBE_FIGURES)) if n in found), None)
    if run.probe is not None:
        run.probe_value, row = found[run.probe]
        run.probe_step = int(found["probe/step"][0]) if "probe/step" in found else row + 1
    return found["step"][1] if "step" in found else None


def _read_actions(run: Run) -> None:
    path = run.directory / ACTIONS
    if not path.is_file():
        return
    torn = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            action = json.loads(line)
            run.last_action = action if isinstance(action, dict) else run.last_action
        except ValueError:
            torn += 1
    if torn:
        run.notes.append(f"{path}: {torn} line(s) cannot be read")


def _judge(run: Run, state: dict[str, Any], last_row: int | None) -> None:
    """Decide which state the run is in, and how far it has come."""
    done = max(0 if last_row is None else last_row + 1, run.checkpoint_step or 0)
    path = run.directory / STATE
    run.state, run.reason = state.get("state", "unknown"), state.get("reason", "")
    if not state:
        run.step = done
        if run.max_steps and (run.checkpoint_step or 0) >= run.max_steps:
            run.state = "finished"
        elif run.last_action and run.last_action.get("action") == "stop":
            run.state, run.reason = "stopped", str(run.last_action.get("reason", ""))
        elif not done:
            run.state = "never started"
        elif time.time() - run.changed > _RECENT_S:
            run.state = "interrupted"
        else:
            run.reason = f"no {STATE}, and its files are young: it may be running"
        return
    if run.state != "running":
        run.step = int(state["step"])
    elif lives(state, time.time() - path.stat().st_mtime):
        run.step = max(int(state["step"]), done)
        still = time.time() - timegm(time.strptime(state.get("stepped") or state["started"], "%Y-%m-%dT%H:%M:%SZ"))
        if still > _STUCK_S:
            run.reason = f"no step for {still / 60:.0f} min"
    else:
        run.step = max(int(state["step"]), done)
        run.state = "interrupted"
        run.reason = f"its process on {state.get('host')} is gone, last sign of life {state.get('written')}"
    if run.state in ("failed", "interrupted", "preempted") and not run.step:
        run.reason = f"{run.state}: {run.reason}" if run.reason else run.state
        run.state = "never started"
