"""docs/evidence.md: its final tables are what the published runs give."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from agssd.commands.bench.results import read_rows
from agssd.commands.bench.settings import read_settings
from agssd.commands.bench.tables import markdown
from agssd.commands.bench.taken import take_over

ROOT = Path(__file__).resolve().parents[1]
BENCHES = {"hippocampus": "hippocampus", "hippocampus_ablation": "hippocampus_ablation", "torsos": "ct_organs"}
FIGURE = re.compile(r"[+-]?\d\.\d{3}")


def table_rows(text: str) -> list[list[str]]:
    """Return the cells of every row of a table that holds figures, without what is said of small differences."""
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|") and FIGURE.search(line)]
    return [[cell.strip().removesuffix(", no difference shown") for cell in row] for row in rows]


@pytest.mark.parametrize("name", BENCHES)
def test_evidence__tables_are_those_of_the_published_runs(name: str, tmp_path: Path) -> None:
    bench = read_settings(ROOT / "conf" / "bench" / f"{BENCHES[name]}.yaml", quick=False)
    made = table_rows(markdown(bench, read_rows(take_over(bench, [ROOT / "docs" / "evidence" / name], tmp_path))))
    sections = re.split(r"^#+ ", (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    told = [row for part in sections if f"(evidence/{name})" in part for row in table_rows(part)]
    assert len(told) >= 20
    by_name = {row[0] for row in made}
    cells = {cell for row in made for cell in row[1:]}
    means = {cell.partition(" ")[0] for cell in cells}
    for row in told:
        if row[0] in by_name:
            assert row in made, row
        else:  # methods under other names, of some columns
            assert all(cell in cells or cell in means for cell in row[1:]), row
