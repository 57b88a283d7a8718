"""What a run was, in words: method, encoder, data, machine, time and key figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from statistics import fmean, median
from typing import Any

from agssd.commands._cache_facts import cache_facts
from agssd.commands.report.context import Context
from agssd.commands.report.run_files import Run

_LAST = 10  # values behind "at the end"


def lead(context: Context) -> str:
    """Return one sentence: what was done, on what."""
    steps = f"{context.run.last_step:,} optimiser step{'s' * (context.run.last_step != 1)}"
    if context.cache is None:
        return f"{steps}."
    modality = " and ".join(sorted({info.modality.upper() for info in context.cache.cases}))
    return (
        f"{steps}; {len(context.cache)} {modality} volumes of {len({i.subject for i in context.cache.cases})} subjects."
    )


def tiles(context: Context) -> str:
    """Return the key figures at the top."""
    run = context.run
    entries = [("optimiser steps", f"{run.last_step:,}", "")]
    loss = finite(run, "train/loss")
    if loss:
        entries.append(("loss", f"{fmean(loss[-_LAST:]):.4g}", f"from {loss[0]:.4g}"))
    for name, title in (
        ("probe/linear_seg_dice", "probe: linear Dice"),
        ("probe/knn_seg_dice", "probe: k-NN Dice"),
        ("probe/linear_cls_balanced_accuracy", "probe: linear accuracy"),
        ("val/dice", "validation Dice"),
    ):
        values = finite(run, name)
        if values:
            entries.append((title, f"{values[-1]:.3f}", f"from {values[0]:.3f}" if len(values) > 1 else ""))
    if "test/dice" in run.test_metrics:
        entries.append(("test Dice", f"{run.test_metrics['test/dice']:.3f}", f"{len(run.test_cases)} cases"))
    speed = finite(run, "throughput/samples_per_s")
    if speed:
        waiting = finite(run, "throughput/data_wait")
        entries.append(
            ("samples per second", f"{median(speed):.4g}", f"{fmean(waiting):.1%} of the time waits for data")
        )
    if finite(run, "collapse/alarms"):
        alarms = [action for action in run.actions if action.get("action") == "alarm"]
        standing = int(finite(run, "collapse/alarms")[-1])
        entries.append(("alarms at the end", str(standing), f"{len(alarms)} begun in the run" if alarms else ""))
    return (
        '<dl class="tiles">'
        + "".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(more)}</small></dd></div>"
            for name, value, more in entries
        )
        + "</dl>"
    )


def method_name(run: Run) -> str:
    """Return the class of the model, such as AGSSD."""
    path = run.setting("model", "class_path")
    return path.rpartition(".")[2] if isinstance(path, str) else "Run"


def run_facts(context: Context) -> list[tuple[str, str]]:
    """Return (name, value): method, encoder, steps, settings that matter, time."""
    run, backbone = context.run, context.encoder
    entries: list[tuple[str, Any]] = [("method", method_name(run))]
    if backbone is not None:
        patch = " × ".join(map(str, backbone.patch_size))
        size = sum(parameter.numel() for parameter in backbone.parameters()) / 1e6
        kind = f"{type(backbone).__name__}, {backbone.depth} blocks, {size:.3g} M parameters, patch {patch}"
        entries.append(("encoder", f"{kind}{', pretrained' if run.setting('model', 'init_args', 'encoder') else ''}"))
    wanted = run.setting("trainer", "max_steps")
    entries.append(("steps", f"{run.last_step:,} of {wanted:,}" if isinstance(wanted, int) else f"{run.last_step:,}"))
    entries.append(("batch", run.setting("data", "init_args", "global_batch_size")))
    entries.append(("precision", run.setting("trainer", "precision")))
    entries.append(("seed", run.setting("seed_everything")))
    entries.append(("labelled subjects", run.setting("data", "init_args", "num_subjects")))
    entries.append(("state", run.state))
    entries.append(("time", _time(run)))
    return [(name, str(value)) for name, value in entries if value is not None]


def _time(run: Run) -> str | None:
    per_step = finite(run, "throughput/s_per_step")
    if not per_step:
        return None
    seconds = fmean(per_step) * run.last_step
    words = (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
    return f"{words} in optimiser steps ({fmean(per_step):.3g} s each)"


def data_facts(context: Context) -> list[tuple[str, str]]:
    """Return (name, value) of the cache, without its path and its keys."""
    return [("cache", context.no_cache)] if context.cache is None else cache_facts(context.cache)


def machine_facts(run: Run) -> list[tuple[str, str]]:
    """Return (name, value) of the machine and the software, without the name of the host."""
    entries: list[tuple[str, str]] = []
    if run.machines:
        last = run.machines[-1]
        count = last.get("devices")
        entries = [
            ("device", f"{count} × {last.get('device')}, {last.get('nodes')} node{'s' * (last.get('nodes') != 1)}"),
            ("processor", f"{last.get('processor')}, {last.get('processors')} usable, {last.get('memory_gib')} GiB"),
            ("software", f"Python {last.get('python')}, torch {last.get('torch')}, Lightning {last.get('lightning')}"),
            ("date", " to ".join(dict.fromkeys(str(one.get("date")) for one in (run.machines[0], last)))),
        ]
        if len(run.machines) > 1:
            entries.append(("starts", str(len(run.machines))))
    if run.software:
        entries.append(("agssd", run.software))
    return entries or [("machine", "not recorded: the run was made by an earlier agssd")]


def fact_lists(facts: Sequence[tuple[str, Sequence[tuple[str, str]]]]) -> str:
    """Return titled lists of (name, value) as HTML, side by side; an empty one is left out."""
    lists = "".join(
        f"<div><h3>{title}</h3><dl>"
        + "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in entries)
        + "</dl></div>"
        for title, entries in facts
        if entries
    )
    return f'<div class="card facts">{lists}</div>'


def finite(run: Run, name: str) -> list[float]:
    """Return the finite values of a curve, none if there is no such curve."""
    curve = run.curves.get(name)
    return [value for value in curve.values if not math.isnan(value)] if curve else []
