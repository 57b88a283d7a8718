"""docs/evidence.md: its final tables are what the published runs give."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from agssd.commands.bench.kept import kept
from agssd.commands.bench.results import places, read_rows
from agssd.commands.bench.settings import Bench, read_settings
from agssd.commands.bench.tables import ALPHA, compare, markdown, of_place
from agssd.commands.bench.taken import take_over

ROOT = Path(__file__).resolve().parents[1]
HEADINGS = {"A linear layer:": "linear", "k-NN:": "knn"}
SAME = ", no difference shown"
ABLATED = {
    "random weights": "scratch",
    "AG-SSD": "agssd",
    "without CVAC: two crops of one small scale that share 1 to 5 %": "no_cvac",
    "crops of that one small scale (0.65), with the usual overlap": "small_crops",
    "crops of one usual scale (0.85)": "one_scale",
    "crops that share anything from 1 to 100 %": "any_overlap",
    "without EAAM: random masks": "no_eaam",
    "without CVAA: neither alignment nor fusion": "no_cvaa",
    "without alignment": "no_alignment",
    "without fusion": "no_fusion",
    "without the patch term": "no_patch",
    "without the [CLS] term": "no_cls",
    "without reconstruction": "no_reconstruction",
    "the student sees hidden patches as mask tokens": "mask_tokens",
}
ABLATION = "What each part is worth: the ablation on hippocampus"
FINE_TUNED = {"200 steps, 4 subjects": ("finetune, 200 steps", "4 subjects")}
ABLATION_COLUMNS = [
    (readout, labels) for readout in ("linear", "knn") for labels in ("4 subjects", "100% of the labels")
]
ANSWERS = {
    "frozen tokens, a linear layer": "linear",
    "frozen tokens, k-NN": "knn",
    "UNETR without stem, fine-tuned 200 steps": "finetune, 200 steps",
    "UNETR with stem, 600 steps": "finetune_stem, 600 steps",
}
CONFIGS = {"torsos": "ct_organs"}  # where not as the folder
COLUMNS = {
    "random weights": "scratch",
    "iBOT": "ibot",
    "MAE": "mae",
    "MAE, equal time": "mae-equal-time",
    "AG-SSD": "agssd",
    "U-Net": "unet",
}
Place = tuple[str, str, str]  # readout, column, row


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def tables(text: str, headings: dict[str, str]) -> list[tuple[str, list[list[str]]]]:
    """Return the tables of a text, each with the last line before it that is a heading."""
    found: list[tuple[str, list[list[str]]]] = []
    heading, inside = "", False
    for line in text.splitlines():
        heading = headings.get(line, heading)
        if line.startswith("|"):
            found += [] if inside else [(heading, [])]
            found[-1][1].append(cells_of(line))
        inside = line.startswith("|")
    return [(heading, [rows[0], *rows[2:]]) for heading, rows in found]


def by_place(text: str, headings: dict[str, str]) -> dict[Place, str]:
    return {
        (heading, column, row[0]): cell
        for heading, (head, *rows) in tables(text, headings)
        if head[0] in ("method", "difference")
        for row in rows
        for column, cell in zip(head[1:], row[1:], strict=True)
    }


class Published:
    """The published runs of benches, each taken over once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows = cache(self._rows)
        self.cells = cache(self._cells)

    def _rows(self, name: str) -> tuple[Bench, list[dict[str, Any]]]:
        bench = read_settings(ROOT / "conf" / "bench" / f"{CONFIGS.get(name, name)}.yaml", quick=False)
        return bench, read_rows(take_over(bench, [ROOT / "docs" / "evidence" / name], self.folder / name))

    def _cells(self, name: str) -> dict[Place, str]:
        """Return the cells of the tables that the published runs of a bench give."""
        text = markdown(*self.rows(name))
        return by_place(text, {line: line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")})


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return Published(tmp_path_factory.mktemp("published"))


def told(title: str, name: str) -> str:
    """Return a section of the document, which names the published runs of a bench."""
    text = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    (part,) = (part for part in re.split(r"^#+ ", text, flags=re.MULTILINE) if part.startswith(f"{title}\n"))
    assert f"(evidence/{name})" in part
    return part


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("Hippocampus: frozen tokens on the split test", "hippocampus"),
        ("Torsos: frozen tokens on the split test", "torsos"),
    ],
)
def test_evidence__final_tables_are_those_of_the_published_runs(title: str, name: str, published: Published) -> None:
    found, expected = by_place(told(title, name), HEADINGS), published.cells(name)
    assert len(found) >= 40
    assert found == {place: expected.get(place) for place in found}


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("Hippocampus: frozen tokens on the split test", "hippocampus"),
        ("Torsos: frozen tokens on the split test", "torsos"),
        (ABLATION, "hippocampus_ablation"),
    ],
)
def test_evidence__tables_of_other_settings_than_the_yaml_say_so(title: str, name: str, published: Published) -> None:
    _, rows = published.rows(name)
    its = dict(kept(published.folder / name).data)["their settings"]
    runs, _, words = its.removeprefix("of ").partition(" runs ")
    assert int(runs) == len(rows)
    assert ("not those that the YAML has now" in told(title, name)) == (words != f"{runs} as the YAML has them")


def test_evidence__answer_is_that_of_the_published_runs(published: Published) -> None:
    expected = published.cells("hippocampus")
    ((_, (head, *rows)),) = tables(told("The answer so far", "hippocampus"), {})
    assert head[1:] == list(COLUMNS) and [row[0] for row in rows] == list(ANSWERS)
    for name, *cells in rows:
        at = [(ANSWERS[name], "4 subjects", COLUMNS[column]) for column in head[1:]]
        assert cells == [expected.get(place, "").partition(" ")[0] for place in at], name


def test_evidence__prose_counts_the_intervals_of_the_published_runs(published: Published) -> None:
    bench, rows = published.rows("hippocampus")
    compared = compare(bench, {place: of_place(bench, rows, place) for place in places(bench)})
    frozen = {key: its for key, its in compared.items() if key[0] == "agssd" and key[2].readout in HEADINGS.values()}
    alone = sum(interval.excludes_zero for interval, _ in frozen.values())
    corrected = sum(p < ALPHA for _, p in frozen.values())
    text = " ".join(told("Hippocampus: frozen tokens on the split test", "hippocampus").split())
    assert f"{alone} of the {len(frozen)} single intervals exclude 0" in text
    assert f"After Holm over these {len(compared)}, {corrected} of these {len(frozen)} differences stand" in text
    least = min(interval.low for key, (interval, _) in frozen.items() if key[2].labels == "100%")
    assert f"the lowest bound of an interval there is {least:.3f}" in text
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"exclude 0 in {alone} of {len(frozen)} comparisons, {corrected} of them" in readme


def test_evidence__fine_tuned_is_that_of_the_published_runs(published: Published) -> None:
    expected = published.cells("hippocampus")
    means, differences = tables(told("Hippocampus: fine-tuned on the split test", "hippocampus"), {})
    for _, (head, *rows) in (means, differences):
        assert head[1:] == list(FINE_TUNED) and len(rows) >= 3
        for name, *cells in rows:
            at = [(*FINE_TUNED[column], name) for column in head[1:]]
            assert cells == [expected.get(place, "").removesuffix(SAME) for place in at], name


def test_evidence__ablation_is_that_of_the_published_runs(published: Published) -> None:
    expected = published.cells("hippocampus_ablation")
    means, differences = (rows[1:] for _, rows in tables(told(ABLATION, "hippocampus_ablation"), {}))
    assert [row[0] for row in means] == list(ABLATED) and len(differences) == len(ABLATED) - 1
    for name, *cells in means:
        assert cells == [expected[*place, ABLATED[name]].partition(" ")[0] for place in ABLATION_COLUMNS], name
    for name, *cells in differences:
        row = f"agssd - {ABLATED[name]}"
        assert cells == [expected[*place, row].removesuffix(SAME) for place in ABLATION_COLUMNS], name


def test_readme__has_the_figures_of_the_published_runs(published: Published) -> None:
    expected = published.cells("hippocampus")
    (head, *rows), *_ = (found for _, found in tables((ROOT / "README.md").read_text(), {}) if "k-NN" in str(found[2:]))
    methods = ["scratch", "ibot", "mae", "mae-equal-time", "agssd"]
    assert head[1:] == ["random weights", "iBOT", "MAE", "MAE in as much time", "AG-SSD"]
    for (_, *cells), readout in zip(rows, ("linear", "knn"), strict=True):
        assert cells == [expected[readout, "4 subjects", method].partition(" ")[0] for method in methods]
