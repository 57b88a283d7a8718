"""The collapse dashboard: limits of the run's own monitor, how its figures kept them, alarms and actions."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from agssd.commands.report.charts import Chart, Limit
from agssd.commands.report.run_files import Run, shown_sentence

# title of the chart -> (setting of collapse_monitor, the side on which the figure must stay, whether it is hard)
_LIMITS = {
    "entropy_batch": (("min_entropy_batch", 1, True),),
    "max_share": (("max_share", -1, True),),
    "information": (("min_information", 1, False),),
    "feature_std": (("min_feature_std", 1, False),),
    "effective_rank": (("soft_rank", 1, False), ("hard_rank", 1, True)),
    "cosine": (("max_cosine", -1, True),),
    "min_distance": (("min_distance", 1, False),),
    "grad_norm_ratio": (("max_gradient_ratio", -1, False),),
    "cvaa_gap_share": (("max_fused_gain", -1, False),),
}


def limits_of(run: Run) -> dict[str, list[Limit]]:
    """Return the limits by title of chart: the run's settings, else the monitor's defaults."""
    from agssd.callbacks.collapse_monitor import CollapseMonitor

    defaults = {name: entry.default for name, entry in inspect.signature(CollapseMonitor).parameters.items()}
    given = run.setting("collapse_monitor") or {}
    settings = defaults | {name: value for name, value in given.items() if isinstance(value, (int, float))}
    found: dict[str, list[Limit]] = {}
    for figure, entries in _LIMITS.items():
        found[f"collapse/{figure}"] = [
            Limit(float(settings[name]), f"{'at least' if side > 0 else 'at most'} {settings[name]:g}", side, hard)
            for name, side, hard in entries
        ]
    prototypes = run.setting("model", "init_args", "num_prototypes")
    if isinstance(prototypes, int) and prototypes > 1:
        found["collapse/cross_entropy"] = [
            Limit(math.log(prototypes), f"uniform: ln K = {math.log(prototypes):.3f}", 0)
        ]
    return found


def status_table(charts: Sequence[Chart]) -> str:
    """Return the table of figures with a limit: last value, limit, and at how many reports it was kept."""
    rows = []
    for chart in charts:
        for name, curve in chart.series:
            limits = [limit for limit in chart.limits if limit.side]
            finite = [value for value in curve.values if not math.isnan(value)]
            if not limits or not finite:
                continue
            outside = [_outside(value, limits) for value in finite]
            now = _outside(finite[-1], limits)
            word, kind = (
                ("outside", "error") if now and now.hard else ("outside", "warning") if now else ("kept", "good")
            )
            count = sum(limit is not None for limit in outside)
            figure = f"{name} {chart.title.partition('/')[2].replace('_', ' ')}".strip()
            told = ", ".join(limit.label for limit in limits)
            rows.append(
                (
                    (kind != "error", kind != "warning", -count),
                    f"<tr><th scope=row>{escape(figure)}</th><td class={kind}><b>{word}</b></td>"
                    f"<td class=number>{finite[-1]:.4g}</td><td>{escape(told)}</td>"
                    f"<td class=number>{count} of {len(finite)}</td></tr>",
                )
            )
    if not rows:
        return ""
    body = "".join(row for _, row in sorted(rows, key=lambda row: row[0]))
    return (
        '<div class="scroll all" tabindex="0" role="region" aria-label="Limits"><table><thead><tr><th>figure</th>'
        "<th>now</th><th class=number>last</th><th>limit</th><th class=number>reports outside</th></tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _outside(value: float, limits: Sequence[Limit]) -> Limit | None:
    """Return the hardest limit that ``value`` breaks."""
    broken = [limit for limit in limits if limit.side * (value - limit.value) < 0]
    return max(broken, key=lambda limit: limit.hard, default=None)


def marks_of(run: Run) -> list[dict[str, Any]]:
    """Return where charts show that something happened: step and kind."""
    marks = []
    for action in run.actions:
        kind = "error" if action.get("hard") or action.get("action") == "stop" else "warning"
        if isinstance(action.get("step"), int):
            marks.append({"step": action["step"], "kind": kind})
    return [mark for number, mark in enumerate(marks) if mark not in marks[:number]]


def actions_table(run: Run) -> str:
    """Return the alarms and what was done about them, in their order."""
    if not run.actions:
        return ""
    body = "".join(
        f"<tr><td class=number>{escape(str(action.get('step', '')))}</td>"
        f"<td class={'error' if action.get('hard') or action.get('action') == 'stop' else 'warning'}>"
        f"<b>{escape(_kind(action))}</b></td><td class=words>{escape(_words(action, run))}</td></tr>"
        for action in run.actions
    )
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Alarms and actions"><table><thead><tr>'
        "<th class=number>step</th><th>what</th><th>in words</th></tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _kind(action: Mapping[str, Any]) -> str:
    kind = re.sub(r"[^a-z_ ]", "", str(action.get("action", "")))
    return f"{'hard ' if action.get('hard') else ''}{kind}".replace("_", " ")


def _words(action: Mapping[str, Any], run: Run) -> str:
    for name in ("sentence", "reason"):
        if isinstance(action.get(name), str):
            return shown_sentence(action[name], run)
    if action.get("action") == "rollback":
        alarms = ", ".join(map(str, action.get("alarms", ())))
        return shown_sentence(
            f"from step {action.get('from_step')} back to {action.get('to_step')} because of {alarms}; "
            f"{action.get('lowered')} lowered",
            run,
        )
    finding = action.get("finding")
    if isinstance(action.get("what"), str):
        where = f"; first in {finding.get('where')}: {finding.get('detail')}" if isinstance(finding, Mapping) else ""
        return shown_sentence(f"{action['what']} was not finite, the step was withheld{where}", run)
    return ""
