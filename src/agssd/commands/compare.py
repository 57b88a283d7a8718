"""Compare runs: settings that differ, figures at the last common step, and the step at which curves part."""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agssd.commands._run_reader import config_files, read_config, read_config_file, read_curves
from agssd.run.state import METRICS

Curves = dict[str, dict[int, float]]
# How the global batch is cut; KoLeo, Sinkhorn and InfoNCE couple the samples of a part.
_CUT = ("trainer.devices", "trainer.num_nodes", "trainer.accumulate_grad_batches")
# Where and how fast a run runs; everything else is what it computes.
_MACHINE = (
    "trainer.accelerator", "trainer.strategy", "trainer.plugins", "trainer.default_root_dir", "trainer.logger",
    "trainer.log_every_n_steps", "trainer.enable_progress_bar", "trainer.enable_model_summary",
    "trainer.enable_checkpointing", "trainer.benchmark", "trainer.profiler", "trainer.callbacks", "trainer.max_time",
    "trainer.deterministic", "trainer.limit_val_batches", "trainer.limit_test_batches", "trainer.limit_predict_batches",
    "trainer.val_check_interval", "trainer.check_val_every_n_epoch", "trainer.num_sanity_val_steps",
    "trainer.inference_mode", "trainer.enable_autolog_hparams", "trainer.model_registry", "trainer.detect_anomaly",
    "model.compile", "data.num_workers", "data.pin_memory", "data.prefetch", "data.predict_split", "data.leakage",
    "checkpoint", "preemption", "watchdog", "life_sign", "throughput", "data_stream", "view_panels", "wandb",
    "tensorboard", "progress", "ckpt_path",
)  # fmt: skip
_GROUPS = {
    "science": "settings of the science",
    "cut": "settings that cut the batch (losses that couple the samples of a micro-batch change with them)",
    "machine": "settings of the machine",
}
_TIMES = ("throughput/", "probe/seconds", "probe/time_share")  # never alike, whatever the runs compute
_MISSING = "(none)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``agssd compare``."""
    parser.description = (
        "Prints the settings in which runs differ, those that cut the batch and those of the machine apart, and for "
        "every scalar that all of them have: the last common step, the values there, the lowest and the last values, "
        "and the first common step at which the values are not the same number. Times and speeds never part."
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory or metrics.csv; at least two")
    parser.add_argument(
        "--metric", action="append", metavar="PATTERN", help="only scalars of this name, such as 'train/*'; repeatable"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="also draw the curves over each other")


def run(args: argparse.Namespace) -> int:
    """Compare; return 0, also where the runs differ."""
    if len(args.runs) < 2:
        raise ValueError(f"one run is given, {args.runs[0]}; name at least two to compare")
    if args.out is not None and args.out.suffix.lower() != ".png":
        raise ValueError(f"--out {args.out}: the name must end in .png")
    tables = [path if path.is_file() else path / METRICS for path in args.runs]
    if missing := [str(path) for path in tables if not path.is_file()]:
        raise ValueError(f"{missing[0]} does not exist; name run directories that have one, or files like it")
    curves = [read_curves(path) for path in tables]
    configs = [None if path.is_file() else read_config(path) for path in args.runs]
    notes = [note for path, config in zip(args.runs, configs, strict=True) for note in _notes(path, config is None)]
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    settings = {} if None in configs else differing([flat(config) for config in configs if config is not None])
    names = _chosen(curves, args.metric)
    scalars = [compare_scalar(name, [of_run[name] for of_run in curves]) for name in names]
    only = sorted({name for of_run in curves for name in of_run} - _in_all(curves))
    labels = _labels(args.runs)
    if args.json:
        found = {
            "runs": [str(path) for path in args.runs],
            "settings": {group: _of(settings, group) for group in _GROUPS},
            "scalars": scalars,
            "not_in_all": only,
            "notes": notes,
        }
        print(json.dumps(_plain(found), indent=2))
    else:
        print("\n".join(_text(labels, settings, scalars, only, None in configs)))
    if args.out is not None:
        draw(args.out, labels, curves, names)
        print(f"drawn {len(names)} scalar(s) in {args.out}", file=sys.stderr)
    return 0


# ----------------------------------------------------------------- settings


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Return the leaves of a configuration by dotted name, without the ``init_args`` between."""
    if not isinstance(value, dict) or not value:
        return {name: value}
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= flat(item, name if key == "init_args" else f"{name}.{key}" if name else str(key))
    return found


def differing(settings: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Return the value of each run for every setting that is not the same in all."""
    names = sorted({name for one in settings for name in one})
    values = {name: [one.get(name, _MISSING) for one in settings] for name in names}
    return {name: found for name, found in values.items() if any(value != found[0] for value in found[1:])}


def group_of(name: str) -> str:
    """Return what a setting is of.

    ``machine``: where and how fast a run runs. ``cut``: in how many parts the global batch is computed. ``science``:
    everything else, the data included.
    """
    for group, names in (("cut", _CUT), ("machine", _MACHINE)):
        if any(name == one or name.startswith(f"{one}.") for one in names):
            return group
    return "science"


def _of(settings: dict[str, list[Any]], group: str) -> dict[str, list[Any]]:
    return {name: values for name, values in settings.items() if group_of(name) == group}


def _notes(run: Path, without: bool) -> list[str]:
    """Return what there is to say about the configurations of a run."""
    if without:
        return [f"{run} has no config.yaml; settings are not compared"]
    paths = [] if run.is_file() else config_files(run)
    names = ", ".join(differing([flat(read_config_file(path)) for path in paths]))
    if not names:
        return []
    return [f"{run} ran with {len(paths)} configurations, which differ in {names}; the last, {paths[-1].name}, counts"]


# ------------------------------------------------------------------- curves


def _in_all(curves: Sequence[Curves]) -> set[str]:
    return {name for name in curves[0] if all(name in of_run for of_run in curves[1:])}


def _chosen(curves: Sequence[Curves], patterns: Sequence[str] | None) -> list[str]:
    names = sorted(_in_all(curves) - {"epoch"})
    if patterns is None:
        return names
    chosen = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    if not chosen:
        raise ValueError(f"--metric {' '.join(patterns)} is no scalar of all the runs; they have {', '.join(names)}")
    return chosen


def compare_scalar(name: str, curves: Sequence[dict[int, float]]) -> dict[str, Any]:
    """Return what there is to say about one scalar of several runs.

    Keys: ``name``; ``common_steps``, how many; ``last_common``, the step, and ``values`` there; ``lowest`` and
    ``final`` with one value per run; ``parts_at``, the first common step whose values are not the same number (two NaN
    are the same), None where there is none or the scalar is a time.
    """
    common = sorted(step for step in curves[0] if all(step in curve for curve in curves[1:]))
    timed = name.startswith(_TIMES)
    parts = (step for step in common if not all(_same(curves[0][step], curve[step]) for curve in curves[1:]))
    return {
        "name": name,
        "common_steps": len(common),
        "last_common": common[-1] if common else None,
        "values": [curve[common[-1]] for curve in curves] if common else None,
        "lowest": [min(curve.values(), key=lambda value: (value != value, value)) for curve in curves],
        "final": [curve[max(curve)] for curve in curves],
        "parts_at": None if timed else next(parts, None),
    }


def _same(a: float, b: float) -> bool:
    return a == b or (a != a and b != b)


# -------------------------------------------------------------------- report


def _labels(paths: Sequence[Path]) -> list[str]:
    """Return a short name per run: its directory's, or the whole path where two would be the same."""
    directories = [path.parent if path.is_file() else path for path in paths]
    names = [directory.resolve().name for directory in directories]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _text(
    labels: list[str], settings: dict[str, list[Any]], scalars: list[dict[str, Any]], only: list[str], unknown: bool
) -> list[str]:
    lines = []
    for group, title in _GROUPS.items():
        found = _of(settings, group)
        if found:
            rows = [[name, *(json.dumps(v) if v != _MISSING else v for v in found[name])] for name in found]
            lines += [f"{title} that differ", *_table([["", *labels], *rows]), ""]
        elif not unknown:
            lines += [f"{title}: the same", ""]
    rows = [["scalar", "step", *labels, *(f"lowest {x}" for x in labels), *(f"last {x}" for x in labels), "parts at"]]
    for one in scalars:
        values = one["values"] or [None] * len(labels)
        parts = "-" if one["parts_at"] is None else str(one["parts_at"])
        numbers = ["-" if value is None else f"{value:.6g}" for value in (*values, *one["lowest"], *one["final"])]
        rows.append([one["name"], str(one["last_common"] if one["last_common"] is not None else "-"), *numbers, parts])
    lines += _table(rows)
    parted = [one for one in scalars if one["parts_at"] is not None]
    if parted:
        first = min(one["parts_at"] for one in parted)
        where = ", ".join(one["name"] for one in parted if one["parts_at"] == first)
        lines += ["", f"the curves first part at step {first}: {where}"]
    elif scalars:
        lines += ["", "the curves are the same at every common step"]
    if only:
        lines.append(f"not in all runs: {', '.join(only)}")
    return lines


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _plain(value: Any) -> Any:
    """Return ``value`` with numbers that are not finite as strings, which JSON has."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and value - value != 0.0 else value


def draw(path: Path, labels: Sequence[str], curves: Sequence[Curves], names: Sequence[str]) -> None:
    """Draw one picture per scalar, the runs over each other; the file appears whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from agssd.whole_file import whole_file

    columns = min(3, max(len(names), 1))
    lines = -(-max(len(names), 1) // columns)
    figure = Figure(figsize=(4.5 * columns, 2.8 * lines), dpi=100, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    places = figure.subplots(lines, columns, squeeze=False).ravel()
    for place, name in zip(places, names, strict=False):
        for label, of_run in zip(labels, curves, strict=True):
            steps = sorted(of_run[name])
            marker = "o" if len(steps) == 1 else None
            place.plot(
                steps, [of_run[name][step] for step in steps], label=label, linewidth=1, alpha=0.8, marker=marker
            )
        place.set_title(name, fontsize=9)
        place.tick_params(labelsize=7)
    for place in places[len(names) :]:
        place.set_axis_off()
    if names:
        places[0].legend(fontsize=7)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png")
