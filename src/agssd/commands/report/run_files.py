"""What a run directory holds, read for the report, and what of its texts may be shown."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agssd.commands import _run_reader
from agssd.run.state import ACTIONS, METRICS

HIDDEN = "‹not shown›"
# Settings that name files, people or places, whatever their text looks like.
_PRIVATE_KEYS = (
    "cache",
    "encoder",
    "path",
    "root",
    "dir",
    "file",
    "name",
    "entity",
    "project",
    "logger",
    "notes",
    "tags",
)
_WORD = re.compile(r"[A-Za-z_][\w+-]*(\.[A-Za-z_]\w*)*")  # a choice such as bf16-mixed, or a class path
_SUFFIX = re.compile(r"\.(h5|hdf5|ckpt|ya?ml|json|csv|nii|gz|pt|npz|npy|dcm|safetensors|txt|log)$", re.IGNORECASE)


@dataclass(frozen=True)
class Curve:
    """A column of ``metrics.csv``: optimiser steps and values, NaN where the value was not finite."""

    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class Run:
    """A run directory.

    Attributes:
        folder: where it is.
        config: of ``config.yaml``, empty if there is none.
        curves: of ``metrics.csv`` by name, without empty ones; ``val/...`` and others of the fit too.
        actions: of ``actions.jsonl`` in their order.
        state: how it ended, or "unknown".
        software: version and commit of agssd, where they are known.
        machines: each ``machine.json``, one per start.
        panels: pictures of the views by step.
        test_metrics: the last row of ``test_metrics.csv``, or empty.
        test_cases: rows of ``test_cases.csv``.
    """

    folder: Path
    config: dict[str, Any]
    curves: dict[str, Curve]
    actions: list[dict[str, Any]]
    state: str
    software: str
    machines: list[dict[str, Any]]
    panels: list[tuple[int, Path]]
    test_metrics: dict[str, float]
    test_cases: list[dict[str, str]]

    def setting(self, *keys: str) -> Any:
        """Return the setting at the end of ``keys``, None where there is none."""
        value: Any = self.config
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    @property
    def last_step(self) -> int:
        """The number of optimiser steps that the metrics tell of."""
        return 1 + max((max(curve.steps) for curve in self.curves.values()), default=-1)


def read_run(folder: Path) -> Run:
    """Return what the run in ``folder`` left behind.

    Raises:
        ValueError: if ``folder`` is no run directory, or one of its files cannot be read.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such run directory")
    known = _run_reader.read_run(folder)
    metrics = folder / METRICS
    curves = _run_reader.read_curves(metrics) if metrics.is_file() else {}
    panels = [(int(path.stem.rpartition("_")[2]), path) for path in sorted((folder / "panels").glob("step_*.png"))]
    machines = [_json(path) for path in _numbered(folder, "machine", ".json")]
    version = known.agssd or (machines[-1].get("agssd") if machines else None)
    test_rows = _rows(folder / "test_metrics.csv")
    return Run(
        folder,
        _run_reader.read_config(folder) or {},
        {name: _curve(values) for name, values in curves.items() if name != "epoch" and values},
        _actions(folder / ACTIONS),
        known.state,
        f"{version}{f', commit {known.commit}' if known.commit else ''}" if version else "",
        machines,
        panels,
        {key: float(value) for key, value in (test_rows[-1] if test_rows else {}).items() if key and value},
        _rows(folder / "test_cases.csv"),
    )


def shown_config(value: Any, key: str = "") -> Any:
    """Return settings with every text that could name a file, a place or a person replaced by ``HIDDEN``."""
    if isinstance(value, Mapping):
        return {
            (name if _is_harmless(str(name)) else HIDDEN): shown_config(item, str(name)) for name, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [shown_config(item, key) for item in value]
    if not isinstance(value, str):
        return value
    private = any(part in key.lower() for part in _PRIVATE_KEYS) and key != "class_path"
    return HIDDEN if private or not _is_harmless(value) else value


def shown_sentence(text: str, run: Run) -> str:
    """Return a sentence of a log without words that could be paths; names of metrics stay."""
    words = text.split(" ")
    return " ".join(
        HIDDEN if re.search(r"[/\\]", word) and word.strip("`;:,.()") not in run.curves else word for word in words
    )


def shown_error(error: ValueError, run: Run) -> str:
    """Return what an error says without paths and names of files; of the run's own files the names stay.

    Folders may have blanks in their names, so that all from the first word of a path to the last is hidden.
    """
    inside = re.escape(str(run.folder)) + r"[/\\](?:[^\s:]*[/\\])?([^\s:/\\]+)"
    words = re.sub(inside, r"\0\1", str(error)).split(" ")
    paths = [
        place
        for place, word in enumerate(words)
        if re.search(r"[/\\]", word) or (_SUFFIX.search(word.strip("`'\";:,.()")) and not word.startswith("\0"))
    ]
    if paths:
        words[paths[0] : paths[-1] + 1] = [HIDDEN]
    return " ".join(word.removeprefix("\0") for word in words)


def last_checkpoint(run: Run) -> Path:
    """Return the last checkpoint of a run.

    Raises:
        ValueError: if there is none.
    """
    from agssd.commands.export import find_checkpoint

    try:
        return find_checkpoint(run.folder)
    except ValueError as error:
        raise ValueError("the run has no checkpoint (*.ckpt)") from error


def short_key(key: str) -> str:
    """Return the beginning of a salted key; nothing of a key that is none."""
    return key[:8] if re.fullmatch(r"[0-9a-f]{12,64}", key) else ""


def _is_harmless(text: str) -> bool:
    return bool(_WORD.fullmatch(text)) and not _SUFFIX.search(text)


def _numbered(folder: Path, stem: str, suffix: str) -> list[Path]:
    """Return ``stem.suffix``, ``stem-2.suffix`` and so on, as far as they exist."""
    found = {}
    for path in folder.glob(f"{stem}*{suffix}"):
        match = re.fullmatch(rf"{stem}(?:-(\d+))?", path.stem)
        if match:
            found[int(match[1] or 1)] = path
    return [found[number] for number in sorted(found)]


def _rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a table, without a last line that is being written."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        del lines[-1]
    return list(csv.DictReader(lines))


def _curve(values: Mapping[int, float]) -> Curve:
    steps = sorted(values)
    return Curve(steps, [values[step] if math.isfinite(values[step]) else math.nan for step in steps])


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    return content if isinstance(content, dict) else {}


def _actions(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    found = []
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]  # without a last line that is being written
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            found.append(dict(json.loads(line)))
        except (TypeError, ValueError):
            raise ValueError(f"{path}: line {number} is no action") from None
    return found
