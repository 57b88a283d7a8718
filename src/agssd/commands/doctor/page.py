"""The report as one HTML page that needs nothing else, and as CSV."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from agssd.commands._page import page
from agssd.commands.doctor.picture import HEIGHT, WIDTH
from agssd.scans.findings import CHECKS, SEVERITIES, Finding

MAX_CARDS = 60  # per check; the CSV has all
_WORDS = {"error": ("error", "errors"), "warning": ("warning", "warnings"), "info": ("remark", "remarks")}


@dataclass
class Report:
    """All that was found.

    Attributes:
        what: the kind of thing examined, in the plural: "scans" or "cases".
        num_cases: how many.
        num_subjects: of how many persons.
        found: (case number, 0 for the set as a whole; finding), ordered by number.
        names: path or key by case number.
        pictures: JPEG by case number.
    """

    what: str
    num_cases: int
    num_subjects: int
    found: list[tuple[int, Finding]] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)
    pictures: dict[int, bytes] = field(default_factory=dict)

    def groups(self) -> list[tuple[str, str, list[tuple[int, Finding]]]]:
        """Return (severity, check, findings), errors first, then in the order of ``CHECKS``."""
        made: dict[tuple[str, str], list[tuple[int, Finding]]] = {
            (severity, check): [] for severity in SEVERITIES for check in CHECKS
        }
        for number, finding in self.found:
            made[finding.severity, finding.check].append((number, finding))
        return [(severity, check, items) for (severity, check), items in made.items() if items]

    def count(self, severity: str) -> int:
        """Return the number of findings of a severity."""
        return sum(finding.severity == severity for _, finding in self.found)


def summary(report: Report) -> str:
    """Return one sentence: what was examined and how much was found."""
    counts = [(report.count(severity), *_WORDS[severity]) for severity in SEVERITIES]
    said = ", ".join(f"{count} {one if count == 1 else many}" for count, one, many in counts)
    people = f"{report.num_subjects} subject{'' if report.num_subjects == 1 else 's'}"
    return f"{report.num_cases} {report.what} of {people}: {said}"


def as_csv(report: Report) -> str:
    """Return one row per finding, with paths: keep it as private as the scans."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("case", "path", "check", "severity", "finding", "remedy"))
    for number, finding in report.found:
        name = report.names.get(number, "")
        writer.writerow(
            (number or "", name, finding.check, finding.severity, finding.text, CHECKS[finding.check].remedy)
        )
    return text.getvalue()


def as_html(report: Report, names: bool = False) -> str:
    """Return the page.

    Args:
        report: all that was found.
        names: also show paths and private texts.
    """
    groups = report.groups()
    links = "".join(
        f'<li class="{severity}"><a href="#{severity}-{check}">{escape(CHECKS[check].title)}</a> '
        f"<b>{len(items)}</b> <span>{_WORDS[severity][len(items) > 1]}</span></li>"
        for severity, check, items in groups
    )
    body = "".join(_section(report, names, severity, check, items) for severity, check, items in groups)
    nothing = "" if groups else '<p class="none">Nothing was found.</p>'
    where = "" if names else " Names of files stand in findings.csv only."
    return page(
        f"agssd doctor: {report.what}",
        f"<h1>agssd doctor</h1><p>{escape(summary(report))}.</p>",
        f'{nothing}<nav aria-label="Findings"><ul>{links}</ul></nav>\n{body}',
        "<p>Pictures: axial, coronal and sagittal plane; up is superior (axial: anterior), right is the "
        "patient's right (sagittal: anterior). Blue: outline of the body; colours: labels. Errors are what agssd "
        "prepare refuses or what would break or mislead a training; warnings want a look."
        f"{where}</p>",
        _STYLE,
    )


def _section(report: Report, names: bool, severity: str, check: str, items: Sequence[tuple[int, Finding]]) -> str:
    shown = items[:MAX_CARDS]
    cards = "".join(_card(report.pictures, report.names, names, number, finding) for number, finding in shown)
    rest = (
        f'<p class="rest">{len(items) - len(shown)} more stand in findings.csv.</p>' if len(items) > len(shown) else ""
    )
    is_open = " open" if severity != "info" else ""
    return (
        f'<details id="{severity}-{check}" class="{severity}"{is_open}><summary><h2>{escape(CHECKS[check].title)}</h2> '
        f'<span class="badge">{_WORDS[severity][0]}</span> <b>{len(items)}</b></summary>'
        f'<p class="remedy">What to do: {escape(CHECKS[check].remedy)}.</p>'
        f'<ul class="cards">{cards}</ul>{rest}</details>\n'
    )


def _card(
    pictures: Mapping[int, bytes], names: Mapping[int, str], show_names: bool, number: int, finding: Finding
) -> str:
    who = f"#{number}" if number else "The set as a whole"
    named = f'<span class="name">{escape(names[number])}</span>' if show_names and number in names else ""
    text = finding.text if show_names else finding.message
    picture = ""
    if number in pictures:
        data = base64.b64encode(pictures[number]).decode()
        alt = f"Three planes of {who}"
        picture = f'<img alt="{alt}" width="{WIDTH}" height="{HEIGHT}" src="data:image/jpeg;base64,{data}">'
    elif number:
        picture = '<div class="blank">no picture</div>'
    return f'<li>{picture}<p><b class="id">{who}</b> {named}{escape(text)}</p></li>'


_STYLE = """
h2 { display: inline; font-size: 1.1rem; margin: 0; }
nav li.error, details.error { border-left-color: var(--error); }
nav li.warning, details.warning { border-left-color: var(--warning); }
nav li.info, details.info { border-left-color: var(--info); }
details { background: var(--card); border: 1px solid var(--line); border-left: 4px solid; border-radius: 8px;
  margin-bottom: 16px; padding: 0 16px; }
.badge { font-size: .8rem; border: 1px solid; border-radius: 999px; padding: 0 8px; margin: 0 4px; }
.error .badge { color: var(--error); } .warning .badge { color: var(--warning); } .info .badge { color: var(--info); }
.remedy { margin: 0 0 12px; color: var(--soft); }
.cards { list-style: none; margin: 0 0 16px; padding: 0; display: grid; gap: 14px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 280px), 1fr)); }
.cards li { border: 1px solid var(--line); border-radius: 6px; overflow: hidden; }
.cards img { display: block; width: 100%; height: auto; background: #000; }
.blank { padding: 6px 12px; border-bottom: 1px dashed var(--line); color: var(--soft); font-size: .85rem; }
.cards p { margin: 0; padding: 8px 12px; font-size: .92rem; }
.id { font-variant-numeric: tabular-nums; }
.name { color: var(--soft); }
.rest, .none { color: var(--soft); }
"""
