"""The parts of a run's page: each looks for what it shows in the run directory and returns HTML, or nothing."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from statistics import fmean, median

from agssd.commands.report.charts import Chart, chart_data, chart_html, group_charts
from agssd.commands.report.context import Context
from agssd.commands.report.dashboard import actions_table, limits_of, marks_of, status_table
from agssd.commands.report.facts import data_facts, fact_lists, finite, machine_facts, run_facts
from agssd.commands.report.run_files import HIDDEN, Run, shown_config, shown_error

MAX_PANELS = 16
_OPEN = ("Losses", "Probes of the frozen encoder", "Validation", "Speed and waiting", "Collapse dashboard")


Section = Callable[[Context], tuple[str, str, str] | None]  # id, heading, HTML


def what_ran(context: Context) -> tuple[str, str, str]:
    """Settings, data, machine and time."""
    run = context.run
    facts = [("Run", run_facts(context)), ("Data", data_facts(context)), ("Machine", machine_facts(run))]
    html = fact_lists(facts)
    if run.config:
        import yaml

        text = yaml.safe_dump(shown_config(run.config), sort_keys=False, allow_unicode=True)
        html += (
            f"<details><summary>All settings <small>texts that could name files, places or people are {HIDDEN}</small>"
            f'</summary><pre tabindex="0">{escape(text)}</pre></details>'
        )
    return "run", "What was run", html


def curves(context: Context) -> tuple[str, str, str] | None:
    """Every scalar of ``metrics.csv``, in groups; speed and the collapse dashboard are two of them."""
    run = context.run
    groups = group_charts(run, limits_of(run))
    if not groups:
        return None
    marks = marks_of(run)
    numbered: list[Chart] = []
    parts = [
        '<div class="toolbar"><label>smoothing <input type="range" id="smoothing" min="0" max="0.99" step="0.01" '
        'value="0"> <output id="smoothing-value">0</output></label><label><input type="checkbox" id="log"> logarithmic'
        '</label><button type="button" id="reset" disabled>All steps</button><span class="note">Drag to zoom. With the '
        "keyboard: ← → read values, + − zoom, Esc back.</span></div>"
    ]
    for name, charts in groups.items():
        told = f"{len(charts)} chart{'s' * (len(charts) > 1)}"
        before = ""
        if name == "Collapse dashboard":
            before = _dashboard(context, charts)
        elif name == "Speed and waiting":
            before = _speed(run)
        first = [chart for chart in charts if chart.limits] if name == "Collapse dashboard" else list(charts)
        rest = [chart for chart in charts if chart not in first]
        drawn = []
        for chart in first + rest:
            drawn.append(chart_html(chart, len(numbered)))
            numbered.append(chart)
        folded = (
            f'<details class="inner"><summary>{len(rest)} figures without a limit</summary>'
            f'<div class="charts">{"".join(drawn[len(first) :])}</div></details>'
            if rest
            else ""
        )
        is_open = " open" if name in _OPEN else ""
        parts.append(
            f'<details{is_open} id="{_id(name)}"><summary>{escape(name)} <small>{told}</small></summary>{before}'
            f'<div class="charts">{"".join(drawn[: len(first)])}</div>{folded}</details>'
        )
    without = "" if "Collapse dashboard" in groups else _dashboard(context, [])
    parts.append(f'<div class="card" id="collapse-dashboard">{without}</div>' if without else "")
    return "curves", "Curves", "".join(parts) + chart_data(numbered, marks)


def panels(context: Context) -> tuple[str, str, str] | None:
    """The pictures of the views over steps."""
    found = context.run.panels
    if not found:
        return None
    places = sorted({round(index * (len(found) - 1) / max(MAX_PANELS - 1, 1)) for index in range(MAX_PANELS)})
    chosen = [found[place] for place in (places if len(found) > MAX_PANELS else range(len(found)))]
    images = "".join(
        f'<img src="{_as_webp(path)}" data-step="{step}" alt="Views of the training samples at step {step}: planes, '
        f'hidden patches, edges, reconstruction and attention where the method has them"{" hidden" * (place > 0)}>'
        for place, (step, path) in enumerate(chosen)
    )
    last = len(chosen) - 1
    left_out = f" {len(found) - len(chosen)} more lie in the run directory." if len(chosen) < len(found) else ""
    return (
        "views",
        "Views",
        f'<div class="card frames"><div class="controls"><label for="views-step">step</label><input type="range" '
        f'class="steps" id="views-step" min="0" max="{last}" value="{last}"><output for="views-step"></output></div>'
        f'<div class="wide" tabindex="0" role="region" aria-label="Views of the training samples">{images}</div>'
        f'<p class="note">Samples of one training batch each, as the method saw them.{left_out}</p></div>',
    )


def encoder(context: Context) -> tuple[str, str, str] | None:
    """Attention of [CLS] and principal components of the tokens in whole volumes."""
    from agssd.commands.report.encoder_views import case_viewer, colour_by_components, encode_cases, write_nifti

    heading = ("encoder", "Attention and PCA of patch tokens")
    if context.cache is None:
        return *heading, _no_maps(context, context.no_cache)
    if context.options.cases < 1:
        return None
    backbone = context.encoder
    if backbone is None:
        return *heading, _no_maps(context, context.no_encoder)
    try:
        cases = encode_cases(context.run, backbone, context.cache, context.options.cases, context.options.device)
    except ValueError as error:
        return *heading, _no_maps(context, shown_error(error, context.run))
    shares = colour_by_components(cases)
    html = ""
    for case in cases:
        html += f'<div class="card">{case_viewer(context.num_viewers, case, backbone.patch_size)}</div>'
        context.num_viewers += 1
        if context.options.nifti is not None:
            context.notes += [
                f"written {path}" for path in write_nifti(case, backbone.patch_size, context.options.nifti)
            ]
    told = ", ".join(f"{share:.0%}" for share in shares)
    attention = (
        " Attention: of the last block's [CLS] in each window, times the number of its tokens."
        if cases[0].attention is not None
        else " This encoder has no [CLS] token, so there is no attention of it."
    )
    return (
        *heading,
        f'<p class="note">Frozen encoder of the last checkpoint (the teacher\'s where there is one), in overlapping '
        f"windows of the size it was trained on; {len(cases)} case{'s' * (len(cases) > 1)} of the cache. PCA over all "
        f"their tokens on the body; the three components explain {told} of the variance.{attention} Click into a plane "
        f"to move the others.</p>{html}",
    )


def segmentation(context: Context) -> tuple[str, str, str] | None:
    """Test figures, Dice over cases, and best, median and worst case."""
    from agssd.commands.report import overlays

    run = context.run
    scores = overlays.scores_of(run)
    table = overlays.metrics_table(run.test_metrics)
    if not scores:
        return ("test", "Test", f'<div class="card">{table}</div>') if table else None
    heading = ("test", "Segmentation of the test cases")
    html = f'<div class="card">{overlays.spread(scores)}<details><summary>Figures</summary>{table}</details></div>'
    if context.cache is None:
        return *heading, html + _missing(context.no_cache)
    try:
        task = overlays.load_segmentation(run)
        for name, score in overlays.chosen(scores):
            drawn = overlays.overlay_viewer(
                context.num_viewers, run, name, score, task, context.cache, context.options.device
            )
            html += f'<div class="card">{drawn}</div>'
            context.num_viewers += 1
    except ValueError as error:
        html += _missing(shown_error(error, run))
    return *heading, html


SECTIONS: tuple[Section, ...] = (what_ran, curves, panels, encoder, segmentation)


def _dashboard(context: Context, charts: Sequence[Chart]) -> str:
    table, actions = status_table(charts), actions_table(context.run)
    html = f"<h3>Limits</h3>{table}" if table else ""
    if actions:
        return f"{html}<h3>Alarms and actions</h3>{actions}"
    return f'{html}<p class="note">No alarm and no action is recorded.</p>' if charts else ""


def _speed(run: Run) -> str:
    waiting, limit = finite(run, "throughput/data_wait"), run.setting("throughput", "max_data_wait")
    if not waiting:
        return ""
    over = f" The run warns above {limit:.0%}." if isinstance(limit, float) else ""
    memory = finite(run, "throughput/peak_memory_gib")
    peak = f" Peak memory {max(memory):.2f} GiB." if memory else ""
    return (
        f"<p>{median(finite(run, 'throughput/s_per_step') or [math.nan]):.3g} s per optimiser step (median); the "
        f"slowest rank waited for data for {fmean(waiting):.1%} of the time, {max(waiting):.1%} at most.{over}"
        f"{peak}</p>"
    )


def _no_maps(context: Context, reason: str) -> str:
    context.no_maps = reason
    return _missing(reason)


def _missing(reason: str) -> str:
    end = "" if reason.endswith((".", "?")) else "."
    return f'<p class="missing">Not shown: {escape(reason)}{end}</p>'


def _id(name: str) -> str:
    return name.lower().replace(" ", "-")


def _as_webp(path: Path) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    with Image.open(path) as image:
        image.convert("RGB").save(buffer, "WEBP", quality=82, method=4)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
