"""``agssd bench``: what the tables claim."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_bench import bench, made_rows

from agssd.commands.bench.cells import list_cells
from agssd.commands.bench.results import Place, figures, places
from agssd.commands.bench.settings import Readout
from agssd.commands.bench.tables import by_class, compare, head, markdown, of_place, probability


def test_tables__find_a_gain_and_claim_none_where_there_is_none() -> None:
    settings = bench()
    cells = list_cells(settings, "c.h5", Path("out"))
    rows = made_rows(cells, {"ours": 0.1})
    text = markdown(settings, rows)
    place = Place("full", 30, 2)
    found = {place: {m: t for m in settings.methods if (t := figures(settings, rows, m, place)) is not None}}
    assert found[place]["ours"].shape == (3, 5, 20)
    compared = compare(settings, found)
    assert compared["ours", "scratch", place][1] < 0.05 and compared["ours", "rival", place][1] < 0.05
    assert compared["ours", "scratch", place][0].mean == pytest.approx(0.1, abs=0.005)
    assert compared["rival", "scratch", place][1] >= 0.05
    same = [line for line in text.splitlines() if line.startswith("| rival - scratch")]
    ahead = [line for line in text.splitlines() if line.startswith("| ours - rival")]
    assert len(same) == len(ahead) == 3, "full with two budgets, and linear"
    assert all(line.count(", no difference shown") == line.count(", p = ") == 3 for line in same)
    assert all(line.count(", p") == 3 and "no difference" not in line for line in ahead)
    assert {line.count("|") for line in text.splitlines() if line.startswith("|")} == {5}
    reads_of_unet = [line for line in text.split("## linear")[1].splitlines() if line.startswith("| unet")]
    assert not reads_of_unet


@pytest.mark.parametrize(
    ("p", "told"),
    [(0.00099, "< 0.001"), (0.0171, "= 0.017"), (0.0496, "< 0.050"), (0.05, "= 0.050"), (1.0, "= 1.000")],
)
def test_probability__shows_on_which_side_of_a_bound_it_is(p: float, told: str) -> None:
    assert probability(p) == told


def test_tables__say_over_what_an_interval_is() -> None:
    for given, told in (
        ({}, "95 % interval over seeds, draws and subjects, not over draws where all labels are used. 363 runs"),
        ({"labels": [2, "25%"]}, "95 % interval over seeds, draws and subjects. "),
        ({"draws": 1}, "95 % interval over seeds and subjects, not over draws, of which there is one."),
        ({"draws": 1, "seeds": 1}, "95 % interval over subjects, not over seeds and draws, of which there is one."),
    ):
        settings = bench(**given)
        assert told in head(settings, made_rows(list_cells(settings, "", Path("o")), {}))
    settings = bench(readouts={"full": Readout(["--config", "f.yaml"], [10], seeds=1)}, labels=[2], num_folds=2)
    said = head(settings, made_rows(list_cells(settings, "", Path("o")), {}))
    assert "not over seeds where there is one (full). What the training subjects of a fold have in common is in" in said


def test_tables__the_leader_is_held_against_every_other_method() -> None:
    rows = made_rows(list_cells(bench(), "c.h5", Path("out")), {})
    for given, ahead in ((None, {"rival", "unet", "scratch"}), ("rival", {"ours", "unet", "scratch"})):
        settings = bench(lead=given)
        found = compare(settings, {place: of_place(settings, rows, place) for place in places(settings)})
        assert {second for first, second, _ in found if first == (given or "ours")} == ahead
        assert {first for first, second, _ in found if second == "scratch"} == {"ours", "rival", "unet"}
    with pytest.raises(ValueError, match="lead is 'unet'; name a method that is pretrained: ours, rival"):
        bench(lead="unet")


def test_tables__without_a_subject_whose_labels_hold_a_class() -> None:
    settings = bench()
    rows = made_rows(list_cells(settings, "c.h5", Path("out")), {})
    for row in rows:
        row["subjects"] = dict.fromkeys(row["subjects"])
    text = markdown(settings, rows)
    assert "20 of 20 subjects are left out" in text and "None of its figures is complete yet." in text


def test_tables__of_an_unfinished_bench_say_so() -> None:
    settings = bench()
    rows = made_rows(list_cells(settings, "c.h5", Path("out")), {})
    text = markdown(settings, rows)
    assert f"{len(rows)} runs; settings" in text and "not finished" not in text
    whole = text.count("p = ") + text.count("p < ")
    assert f"over all {whole} of this bench" in text and whole == 3 * 5 * 2 + 3 * 3
    begun = [row for row in rows if row["readout"] == "full"][:-1]  # one run of one place is missing too
    text = markdown(settings, begun)
    assert f"{len(begun)} of {len(rows)} runs: the bench is not finished" in text
    found = text.count("p = ") + text.count("p < ")
    assert f"over the {found} of {whole} differences of this bench whose runs are all there" in text
    assert found == whole - 3 * 3 - 2, "rival against scratch and ours have lost a column"


def test_tables__of_a_readout_with_fewer_seeds() -> None:
    whole = bench()
    settings = bench(readouts={**whole.readouts, "full": replace(whole.readouts["full"], seeds=2)})
    cells = list_cells(settings, "", Path("o"))
    rows = made_rows(cells, {})
    assert "; 3 seeds (full 2), 5 draws" in head(settings, rows)
    for place, seeds in ((Place("full", 30, 2), 2), (Place("linear", 10, 2), 3)):
        table = figures(settings, rows, "ours", place)
        assert table is not None and table.shape == (seeds, 5, 20)


def test_by_class__means_over_runs_of_whole_figures() -> None:
    settings = bench()
    rows = made_rows(list_cells(settings, "c.h5", Path("out")), {})
    assert not by_class(settings, rows), "rows of before"
    for number, row in enumerate(rows):
        row["classes"] = {"10": number % 2, "2": {"ours": 0.75}.get(row["method"], 0.25)}
    lost = next(row for row in rows if (row["method"], row["readout"], row["labels"]) == ("rival", "linear", "25%"))
    text = by_class(settings, [row for row in rows if row is not lost])
    assert text.count("\n## ") == 3 * 3 and "| method | 2 | 10 |" in text
    assert text.count("| ours | 0.750 |") == 9 and text.count("| rival | 0.250 |") == 8
    place = Place("full", 10, 2)
    of_ours = [row["classes"]["10"] for row in rows if (row["method"], *place) == _where(row, "ours")]
    line = next(one for one in text.splitlines() if one.startswith("| ours |"))
    assert line == f"| ours | 0.750 | {sum(of_ours) / len(of_ours):.3f} |"


def _where(row: dict[str, Any], method: str) -> tuple[Any, ...]:
    return (method, row["readout"], row["steps"], row["labels"])


def test_head__tells_what_the_checks_for_leakage_have_found() -> None:
    settings = bench()
    rows = [row | {"leakage": "none"} for row in made_rows(list_cells(settings, "c.h5", Path("out")), {})]
    assert "; pretraining with measured subjects: none, as checked for each run. Mean" in head(settings, rows)
    pretrained = [row for row in rows if row["method"] in ("ours", "rival")]
    pretrained[0]["leakage"] = pretrained[-1]["leakage"] = "seen 2 of 20 subjects"
    rows[0]["leakage"] = None  # random weights
    assert "measured subjects: 2 runs: seen 2 of 20 subjects. Mean" in head(settings, rows)
    del pretrained[1]["leakage"]
    told = f"measured subjects: not said by 1 of {len(pretrained)} runs; 2 runs: seen 2 of 20 subjects. Mean"
    assert told in head(settings, rows)


def test_tables__who_has_no_figure_in_one_run_is_in_no_table_and_that_is_told(tmp_path: Path) -> None:
    settings = bench()
    cells = list_cells(settings, "c.h5", tmp_path)
    rows = made_rows(cells, {"ours": 0.1})
    assert "are left out" not in head(settings, rows)
    empty = sorted(rows[0]["subjects"])[0]
    fewer = [row | {"subjects": {name: v for name, v in row["subjects"].items() if name != empty}} for row in rows]
    for number, row in enumerate(rows):  # nothing is predicted in it, or something, which counts 0
        row["subjects"][empty] = 0.0 if number % 2 else None
    assert "1 of 20 subjects are left out, since their labels hold no class" in head(settings, rows)
    place = Place("full", 30, 2)
    table = figures(settings, rows, "ours", place)
    assert table is not None and table.shape == (3, 5, 19)
    without = markdown(settings, fewer).split("\n## ", 1)[1]
    assert markdown(settings, rows).split("\n## ", 1)[1] == without


def test_tables__a_figure_with_a_missing_run_is_left_out_and_other_subjects_are_refused() -> None:
    settings = bench()
    cells = list_cells(settings, "c.h5", Path("out"))
    rows = made_rows(cells, {})
    place = Place("linear", 10, "25%")
    lost = next(row for row in rows if (row["method"], row["readout"], row["labels"]) == ("ours", "linear", "25%"))
    assert figures(settings, [row for row in rows if row is not lost], "ours", place) is None
    text = markdown(settings, [row for row in rows if row is not lost])
    line = next(one for one in text.split("## linear")[1].splitlines() if one.startswith("| ours |"))
    assert [cell.strip() for cell in line.split("|")].count("") == 3, "one figure missing beside the two borders"
    known = lost["subjects"]
    lost["subjects"] = {**lost["subjects"], "stranger": 1.0}
    with pytest.raises(ValueError, match="other subjects"):
        figures(settings, rows, "ours", place)
    lost["subjects"] = known
    for row in rows:
        if row["method"] == "rival" and row["readout"] == "linear":
            row["subjects"] = {f"other {subject}": value for subject, value in row["subjects"].items()}
    with pytest.raises(ValueError, match="rival and ours have measured other subjects by linear"):
        markdown(settings, rows)
