"""Train every method for a few steps on one cache and put their losses, probes, speed and memory into one table.

Each method is ``agssd fit`` in a process of its own, one after the other, with the same experiment, encoder, data and
steps, so figures stand side by side; what a method needs beyond its YAML is said with ``--also`` and stands in the
table. Few steps show that a method trains, not what it is worth.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median

_LAST = 10  # steps that the last loss is a mean of


@dataclass(frozen=True)
class Row:
    """What one method did."""

    name: str
    settings: str  # flags beyond the YAML
    loss: tuple[float, float]  # of the first step, and the mean of the last ten
    terms: dict[str, tuple[float, float]]  # each before its weight
    probes: dict[str, tuple[float, float]]  # of the untrained and of the trained encoder
    samples_per_s: float  # median over intervals, without probes
    peak_memory_gib: float
    alarms: int  # of the collapse monitor, over the run
    seconds: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``agssd bench-methods``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "agssd bench-methods hippocampus.h5 conf/method/*.yaml --out runs/methods \\\n"
        "  --also 'dino, small conf/method/dino.yaml --model.num_prototypes 512'\n"
        "A method that is there with the same command is not trained again; one that failed or was stopped is, once\n"
        "its folder is removed."
    )
    parser.add_argument("cache", help="labelled cache written by agssd prepare")
    parser.add_argument("methods", nargs="+", metavar="YAML", help="methods, for example conf/method/*.yaml")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for runs, methods.md and methods.json")
    parser.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="'NAME YAML FLAGS'",
        help="one more row: its name up to the first word that ends in .yaml, and flags of agssd fit; repeatable",
    )
    parser.add_argument(
        "--config",
        default="conf/experiment/small.yaml",
        help="experiment without a model (default: conf/experiment/small.yaml)",
    )
    parser.add_argument("--steps", type=int, default=200, help="optimiser steps of each method (default: 200)")
    parser.add_argument("--flags", default="", metavar="'FLAGS'", help="flags of agssd fit for every row")


def run(arguments: argparse.Namespace) -> int:
    """Train every method, print the table and return the exit code: 1 if one of them failed."""
    if arguments.steps < 1:
        raise ValueError(f"--steps is {arguments.steps}; give at least 1")
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    failed: list[str] = []
    for name, flags in _wanted(arguments.methods, arguments.also).items():
        print(f"{name}: ", end="", flush=True)
        try:
            row = _train(name, flags, arguments)
        except ValueError as error:
            failed.append(name)
            print(f"failed: {error}")
            continue
        rows.append(row)
        print(f"loss {row.loss[0]:.3f} to {row.loss[1]:.3f} in {row.seconds:.0f} s", flush=True)
    report = {"machine": _machine(), "command": shlex.join(["agssd", *sys.argv[1:]]), "rows": [asdict(r) for r in rows]}
    (out / "methods.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    text = table(rows) + (f"\n\nFailed: {', '.join(failed)}." if failed else "")
    (out / "methods.md").write_text(f"{report['machine']}\n\n`{report['command']}`\n\n{text}\n", encoding="utf-8")
    print(f"\n{text}\n\nwritten: {out / 'methods.md'} and methods.json")
    if failed:
        print(f"error: {', '.join(failed)} failed", file=sys.stderr)
    return 1 if failed else 0


def _wanted(methods: Sequence[str], also: Sequence[str]) -> dict[str, list[str]]:
    """Return flags of ``agssd fit`` by the name of the row.

    Raises:
        ValueError: for a file that is not there, a row without one, or two rows of one name.
    """
    wanted: dict[str, list[str]] = {}
    rows = [(Path(path).stem, [path]) for path in methods]
    for text in also:
        words = shlex.split(text)
        at = next((i for i, word in enumerate(words) if word.endswith((".yaml", ".yml"))), 0)
        if not at:
            raise ValueError(f"--also is {text!r}; give a name, a YAML and flags: 'dino, small conf/method/dino.yaml'")
        rows.append((" ".join(words[:at]), words[at:]))
    for name, (path, *flags) in rows:
        if not Path(path).is_file():
            raise ValueError(
                f"there is no method file {path}; run from the repository, or name one as conf/method/X.yaml"
            )
        if name in wanted:
            raise ValueError(f"two rows are named {name!r}; give each its own name")
        wanted[name] = ["--model", path, *flags]
    return wanted


def _train(name: str, flags: list[str], arguments: argparse.Namespace) -> Row:
    """Run ``agssd fit``, or find that it ran, and return its figures.

    Raises:
        ValueError: if the run fails; the message is the last line of its log.
    """
    steps = arguments.steps
    folder = arguments.out / "".join(c if c.isalnum() or c in "-_" else "_" for c in name)
    command = [sys.executable, "-m", "agssd", "fit", "--config", arguments.config, *flags]
    command += ["--data.cache", arguments.cache, "--trainer.max_steps", str(steps)]
    command += ["--online_probe.at_start", "true", "--online_probe.every_n_steps", str(steps)]
    command += ["--throughput.every_n_steps", str(max(1, min(50, steps // 4))), "--wandb.mode", "disabled"]
    command += ["--trainer.default_root_dir", str(folder), *shlex.split(arguments.flags)]
    done = folder / "bench.json"
    told = shlex.join(command[1:])
    if done.is_file() and (before := json.loads(done.read_text(encoding="utf-8")))["command"] == told:
        seconds = float(before["seconds"])
    else:
        if folder.exists():
            what = "a run of another command" if done.is_file() else "a run that did not end"
            raise ValueError(f"{folder} holds {what}; remove it, or give another --out")
        log = arguments.out / f"{folder.name}.log"
        started = time.perf_counter()
        with log.open("w", encoding="utf-8") as file:
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
        seconds = time.perf_counter() - started
        if code:
            lines = log.read_text(encoding="utf-8").strip().splitlines()
            raise ValueError(f"{lines[-1] if lines else 'no word'} (exit code {code}; {log})")
        done.write_text(json.dumps({"command": told, "seconds": seconds}), encoding="utf-8")
    return read_run(name, shlex.join(flags[2:]), folder / "metrics.csv", seconds)


def read_run(name: str, settings: str, metrics: Path, seconds: float) -> Row:
    """Return the figures of a run from its ``metrics.csv``.

    Raises:
        ValueError: if there is no loss or no probe before and after, which a labelled cache and its split "val" allow.
    """
    with metrics.open(newline="", encoding="utf-8") as file:
        records = list(csv.DictReader(file))
    columns = {
        key: [float(record[key]) for record in records if record[key]] for key in (records[0] if records else {})
    }

    def first_and_last(key: str) -> tuple[float, float]:
        values = columns[key]
        return values[0], fmean(values[-_LAST:])

    probes = {
        key.removeprefix("probe/"): (values[0], values[-1])
        for key, values in columns.items()
        if key.startswith(("probe/knn_", "probe/linear_", "probe/rankme_")) and len(values) > 1
    }
    if not columns.get("train/loss") or not probes:
        raise ValueError(f"{metrics} has no loss, or no probe before and after; the cache needs labels and a split val")
    return Row(
        name=name,
        settings=settings,
        loss=first_and_last("train/loss"),
        terms={
            key.removeprefix("train/loss_"): first_and_last(key) for key in columns if key.startswith("train/loss_")
        },
        probes=probes,
        samples_per_s=median(columns.get("throughput/samples_per_s") or [float("nan")]),
        peak_memory_gib=max(columns.get("throughput/peak_memory_gib") or [float("nan")]),
        alarms=int(max(columns.get("collapse/alarms") or [0])),
        seconds=seconds,
    )


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table; settings beyond the YAML are listed below it."""
    figures = [
        name
        for name in (
            "linear_seg_dice",
            "knn_seg_dice",
            "linear_cls_auroc",
            "knn_cls_auroc",
            "rankme_tokens",
            "rankme_cls",
        )
        if any(name in row.probes for row in rows)
    ]
    head = ["method", "loss", *figures, "samples/s", "peak GiB", "alarms"]
    lines = [" | ".join(head), "|".join(["---"] + ["---:"] * (len(head) - 1))]
    for row in rows:
        cells = [row.name, _arrow(row.loss, 3)]
        cells += [
            _arrow(row.probes[name], 1 if "rankme" in name else 3) if name in row.probes else "-" for name in figures
        ]
        lines.append(" | ".join([*cells, f"{row.samples_per_s:.1f}", f"{row.peak_memory_gib:.2f}", str(row.alarms)]))
    text = "\n".join(f"| {line} |" if "---" not in line else f"|{line}|" for line in lines)
    notes = [f"- {row.name}: `{row.settings}`" for row in rows if row.settings]
    return "\n".join([text, *(["", "Beyond their YAML:", "", *notes] if notes else [])])


def _arrow(pair: tuple[float, float], digits: int) -> str:
    return f"{pair[0]:.{digits}f} → {pair[1]:.{digits}f}"


def _machine() -> str:
    import torch

    device = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()}-core {platform.machine()} CPU"
    )
    return f"{device}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
