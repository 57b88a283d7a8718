"""The report of a directory: its parts found by what lies there, put on one page."""

from __future__ import annotations

import time
from collections.abc import Sequence
from html import escape
from pathlib import Path

import agssd
from agssd.commands._page import page
from agssd.commands.report.context import Context, Options, open_cache, open_encoder
from agssd.commands.report.facts import lead, method_name, tiles
from agssd.commands.report.run_files import read_run
from agssd.commands.report.sections import SECTIONS
from agssd.whole_file import whole_file

__all__ = ["Options", "check_name", "save", "write_report"]


def write_report(folder: Path, out: Path, options: Options) -> list[str]:
    """Write the page of a run and return what was written, in words.

    Raises:
        ValueError: if ``folder`` is no run, a given cache or device cannot be used, or the page cannot be written; once
            the page is written, if NIfTI files were asked for and no case could be encoded.
    """
    from agssd.devices import check_device

    check_name(out)
    if options.cases < 0:
        raise ValueError(f"--cases is {options.cases}; give a number of cases, 0 for none")
    if options.cases == 0 and options.nifti is not None:
        raise ValueError(f"--cases 0 leaves nothing to write to --nifti {options.nifti}; leave one of them out")
    check_device(options.device)
    run = read_run(folder)
    context = Context(run, options, *open_cache(run, options.cache), *open_encoder(run))
    parts = [part for section in SECTIONS if (part := section(context)) is not None]
    links = "".join(f'<li><a href="#{name}">{escape(heading)}</a></li>' for name, heading, _ in parts)
    body = "".join(
        f'<section id="{name}"><h2>{escape(heading)}</h2>{html}</section>\n' for name, heading, html in parts
    )
    title = options.title or method_name(run)
    here = Path(__file__).parent
    text = page(
        f"{title}: agssd report",
        f'<h1>{escape(title)}</h1><p>{escape(lead(context))}</p><button type="button" id="theme" hidden>Dark</button>',
        f'{tiles(context)}<nav aria-label="Parts"><ul>{links}</ul></nav>'
        f"<noscript><p class=missing>Charts and volumes are drawn by a script in this page; without it only words and "
        f"tables are shown.</p></noscript>\n{body}",
        f"<p>agssd {agssd.__version__} report, {time.strftime('%Y-%m-%d', time.gmtime())}. A, P, L, R, S, I: the "
        "patient's front, back, left, right, head, foot. The page holds slices of scans, without names.</p>",
        (here / "report.css").read_text(encoding="utf-8"),
        _script(here),
    )
    told = [*context.notes, save(out, text)]
    if options.nifti is not None and context.no_maps:
        raise ValueError(f"{out} is written, but nothing to --nifti {options.nifti}: {context.no_maps}")
    return told


def check_name(out: Path) -> None:
    """Refuse a name that is no page's.

    Raises:
        ValueError: naming it.
    """
    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--out {out}: the name must end in .html")


def save(out: Path, text: str) -> str:
    """Write a page and say so.

    Raises:
        ValueError: if that cannot be done.
    """
    try:
        with whole_file(out) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot write {out}: {error.strerror or error}; name another --out") from error
    return f"report: {out} ({len(text.encode()) / 1e6:.1f} MB)"


def _script(folder: Path) -> str:
    return joined_script(folder, ("base", "charts", "volumes"))


def joined_script(folder: Path, names: Sequence[str]) -> str:
    """Return a page's script, its parts in one scope."""
    parts = [(folder / f"{name}.js").read_text(encoding="utf-8") for name in names]
    return f'(() => {{\n"use strict";\n{"".join(parts)}}})();\n'
