"""The page and the CSV, from findings made up."""

from __future__ import annotations

import csv
import io
import re
from html import unescape

from agssd.commands.doctor.page import MAX_CARDS, Report, as_csv, as_html, summary
from agssd.scans.findings import CHECKS, SEVERITIES, Finding


def _report() -> Report:
    found = [
        (number, Finding(check, severity, f"{check} <b>&\"' {number}.", f"private {number}"))
        for number, (check, severity) in enumerate(((c, s) for c in CHECKS for s in SEVERITIES), 1)
    ]
    names = {number: f"clinic/DOE <{number}>.nii" for number, _ in found}
    return Report("scans", len(found), 3, found, names, {number: b"\xff\xd8\xff" for number in range(1, 20)})


def test_as_html__holds_every_finding_escaped_and_in_order_of_severity() -> None:
    report = _report()
    page = as_html(report)
    texts = [unescape(text) for text in re.findall(r"<p><b class=\"id\">#\d+</b> (.*?)</p>", page)]
    assert sorted(texts) == sorted(finding.message for _, finding in report.found)
    assert "<b>&" not in page and "DOE" not in page and "private" not in page
    order = [SEVERITIES.index(severity) for severity in re.findall(r"<details id=\"(\w+)-", page)]
    assert order == sorted(order) and len(order) == len(CHECKS) * len(SEVERITIES)
    assert page.count("<img ") == 19
    named = as_html(report, names=True)
    assert "clinic/DOE &lt;7&gt;.nii" in named and "private 7" in named


def test_as_html__many_findings_of_a_kind_are_cut_and_counted() -> None:
    found = [(number, Finding("clipped", "warning", f"Clipped {number}.")) for number in range(1, MAX_CARDS + 41)]
    page = as_html(Report("scans", 100, 100, found))
    assert page.count('<b class="id">') == MAX_CARDS and "40 more stand in findings.csv" in page
    assert as_csv(Report("scans", 100, 100, found)).count("\n") == MAX_CARDS + 41


def test_as_html__severities_are_told_by_words_not_by_colour_alone() -> None:
    page = as_html(Report("cases", 1, 1, [(0, Finding("split", "error", "No case is in train."))]))
    assert re.search(r"class=\"badge\">error<", page) and "The set as a whole" in page
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page
    assert "default-src 'none'" in page  # nothing is fetched, whatever the page holds


def test_as_csv__maps_numbers_to_paths() -> None:
    report = _report()
    rows = list(csv.DictReader(io.StringIO(as_csv(report))))
    assert [(int(row["case"]), row["path"], row["finding"]) for row in rows] == [
        (number, report.names[number], f"private {number}") for number, _ in report.found
    ]
    assert all(row["remedy"] == CHECKS[row["check"]].remedy for row in rows)


def test_summary__counts() -> None:
    found = [
        (1, Finding("split", "error", "x")),
        (2, Finding("split", "info", "x")),
        (2, Finding("split", "info", "x")),
    ]
    assert summary(Report("cases", 2, 1, found)) == "2 cases of 1 subject: 1 error, 0 warnings, 2 remarks"
