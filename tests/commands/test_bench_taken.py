"""``agssd bench --results``: what was run elsewhere comes together in one table, without data."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from made_bench import bench, write_bench

from agssd.cli import main
from agssd.commands.bench.kept import kept
from agssd.commands.bench.results import read_rows, write_rows
from agssd.commands.bench.tables import markdown

SMALL = {"labels": [2, "100%"], "seeds": 2, "draws": 2}
BENCH = yaml.safe_dump(
    {
        "methods": {"scratch": {}, "ours": {"pretrain": ["--config", "a.yaml"]}},
        "readouts": {"linear": {"probe": "linear-seg", "window_vox": [16, 16, 16]}},
        "backbone": "b.yaml",
        "pretrain_steps": 5,
        **SMALL,
    }
)
LEAD = "readout,steps,labels,draw,seed,fold,method,figure"
ROWS = (
    f"{LEAD},value,seconds,pretraining_steps,pretraining_seconds,pretraining_commit,bench,commit,time,machine,mark\n"
    "linear,0,2,1,0,,ours,dice,0.75,2.5,5,9.5,c0,b,c,2026-01-31T12:00:00Z,a processor,m\n"
)
SUBJECTS = f"{LEAD},subject,value\nlinear,0,2,1,0,,ours,dice,s00,0.5\nlinear,0,2,1,0,,ours,dice,s01,1.0\n"


@pytest.fixture
def published(tmp_path: Path) -> tuple[list[str], Path]:
    """Return the words of the command and a folder of one run."""
    for name in ("a.yaml", "b.yaml"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "bench.yaml").write_text(BENCH)
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "rows.csv").write_text(ROWS)
    (folder / "subjects.csv.gz").write_bytes(gzip.compress(SUBJECTS.encode()))
    return ["bench", "--config", str(tmp_path / "bench.yaml"), "--out", str(tmp_path / "out"), "--results"], folder


def test_results__of_two_parts_give_the_tables_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tmp_path / "whole"
    write_bench(whole, {"ours": 0.1}, **SMALL)
    settings = bench(**SMALL)
    rows = read_rows(kept(whole).cells(whole))
    for row in rows[::2]:
        row["subjects"]["s07"] = None  # whose labels are empty
        row["classes"] = {"1": 0.25, "12": 0.5}
        row["value"] = float(np.mean([value for value in row["subjects"].values() if value is not None]))
    for name, part in (("one", rows[:40]), ("other", rows[40:])):
        (tmp_path / name).mkdir()
        write_rows(part, tmp_path / name)
    packed = tmp_path / "other" / "subjects.csv"
    packed.with_suffix(".csv.gz").write_bytes(gzip.compress(packed.read_bytes()))
    packed.unlink()
    monkeypatch.setattr("agssd.commands.bench.settings.read_settings", lambda *_: settings)
    words = ["bench", "--config", "any.yaml", "--out", str(tmp_path / "out"), "--results"]
    assert main([*words, str(tmp_path / "one"), str(tmp_path / "other")]) == 0
    out = tmp_path / "out"
    assert markdown(settings, rows) in (out / "tables.md").read_text()
    assert "missing" not in capsys.readouterr().err
    again = read_rows(kept(out).cells(out))
    assert [{name: row[name] for name in before} for row, before in zip(again, rows, strict=True)] == rows
    assert main(["report", str(out), "--out", str(tmp_path / "bench.html")]) == 0
    assert main([*words, str(tmp_path / "one")]) == 2, "and not over what is there"
    assert "is there already; --results wants a new folder" in capsys.readouterr().err
    assert main(["bench", "--config", "any.yaml", "--cache", "any.h5", "--out", str(out)]) == 2
    assert "holds runs of one, other by --results; give another one" in capsys.readouterr().err


def test_results__of_a_part__say_what_is_missing(
    published: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, folder = published
    assert main([*words, str(folder)]) == 0
    said = capsys.readouterr()
    assert "11 of 12 cells are missing from the tables" in said.err
    assert "1 of 12 runs: the bench is not finished" in said.out and "None of its figures is complete yet." in said.out
    row = json.loads((tmp_path / "out/cells/linear/ours/steps0-labels2-draw1-seed0/row.json").read_text())
    assert row["subjects"] == {"s00": 0.5, "s01": 1.0} and row["value"] == 0.75 and row["mark"] == "m"
    assert row["pretraining_steps"] == 5 and row["fold"] is None and row["labels"] == 2
    assert "Their settings: of 1 runs 1 not said." in (tmp_path / "out" / "tables.md").read_text()


def test_results__say_how_many_runs_are_of_other_settings_than_the_yaml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bench(tmp_path / "whole", {}, **SMALL)
    settings = bench(**SMALL)
    rows = read_rows(kept(tmp_path / "whole").cells(tmp_path / "whole"))
    (tmp_path / "one").mkdir()
    write_rows(rows, tmp_path / "one")
    words = ["bench", "--config", "any.yaml", "--results", str(tmp_path / "one"), "--out"]
    rival = replace(settings.methods["rival"], pretrain=["--config", "c.yaml"])
    for now, told in (
        (settings, "66 as the YAML has them"),
        (bench(**SMALL, methods=settings.methods | {"rival": rival}), "48 as the YAML has them, 18 other than"),
    ):
        monkeypatch.setattr("agssd.commands.bench.settings.read_settings", lambda *_, now=now: now)
        out = tmp_path / told[:2]
        assert main([*words, str(out)]) == 0
        assert f"Their settings: of 66 runs {told}" in (out / "tables.md").read_text()
        assert main(["report", str(out), "--out", str(tmp_path / "page.html")]) == 0
        assert f"of 66 runs {told}" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("rows", "subjects", "said"),
    [
        (ROWS.replace("linear,0,2", "linear,0,3"), SUBJECTS.replace("linear,0,2", "linear,0,3"), "does not ask for"),
        (ROWS, SUBJECTS.replace("ours", "scratch"), "a run whose subjects subjects.csv beside it does not have"),
        (ROWS.splitlines()[0], SUBJECTS, "a run that rows.csv beside it does not have"),
        (ROWS, SUBJECTS.replace("s01", "s00"), "has the subject s00 twice"),
        (ROWS, SUBJECTS.replace("1.0", "much"), "has 'much' for value"),
        (ROWS.replace(",mark", ""), SUBJECTS, "has no column mark"),
        (ROWS.replace(",machine", ""), SUBJECTS, "has no column machine"),
        (ROWS.replace("mark\n", "mark,classes\n").replace(",m\n", ",m,[1]\n"), SUBJECTS, "has '[1]' for classes"),
        (ROWS.replace(",m\n", "\n"), SUBJECTS, "line 2 of"),
        (ROWS + ROWS.splitlines()[1] + "\n", SUBJECTS, "has a run twice: readout linear"),
        (ROWS.replace("0.75", "0.5"), SUBJECTS, "not the mean of its subjects"),
        (ROWS.replace("ours,dice,0.75,2.5,5,", "ours,dice,0.75,2.5,5.5,"), SUBJECTS, "'5.5' for pretraining_steps"),
        (ROWS, SUBJECTS.replace("1.0", "nan"), "has 'nan' for value"),
        (ROWS, SUBJECTS.replace("0.5", "").replace("1.0", ""), "not the mean of its subjects"),
        ("", "", "has no column readout"),
        (None, SUBJECTS, "has no rows.csv, nor rows.csv.gz"),
    ],
)
def test_results__what_is_no_result_of_this_bench_is_refused(
    rows: str | None,
    subjects: str,
    said: str,
    published: tuple[list[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words, folder = published
    (folder / "subjects.csv.gz").write_bytes(gzip.compress(subjects.encode()))
    (folder / "rows.csv").unlink()
    if rows is not None:
        (folder / "rows.csv").write_text(rows)
    assert main([*words, str(folder)]) == 2
    error = capsys.readouterr().err
    assert said in error and "published" in error
    assert not (tmp_path / "out").exists()


def test_results__two_of_one_run_are_refused(
    published: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, folder = published
    other = tmp_path / "other"
    other.mkdir()
    (other / "rows.csv").write_text(ROWS.replace("0.75", "0.625"))
    (other / "subjects.csv").write_text(SUBJECTS.replace("0.5", "0.25"))
    assert main([*words, str(folder), str(other)]) == 2
    said = capsys.readouterr().err
    assert f"{folder} and {other} have two results of one run" in said
    assert "readout linear, steps 0, labels 2, draw 1, seed 0" in said
    assert not (tmp_path / "out").exists()
    (other / "rows.csv").write_text(ROWS)
    (other / "subjects.csv").write_text(SUBJECTS)
    assert main([*words, str(folder), str(other)]) == 0, "the same twice is no harm"


def test_results__runs_that_have_measured_other_subjects_are_refused_before_anything_is_written(
    published: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, folder = published
    runs = [(draw, seed) for draw in (0, 1) for seed in (0, 1)]
    line, subject = ROWS.splitlines()[1], SUBJECTS.splitlines()[1:]

    def of(text: str, draw: int, seed: int) -> str:
        return text.replace("linear,0,2,1,0,", f"linear,0,2,{draw},{seed},")

    (folder / "rows.csv").write_text("\n".join([ROWS.splitlines()[0], *(of(line, *run) for run in runs)]) + "\n")
    lines = [of(one, *run) for run in runs for one in subject]
    for last, code in (("s01", 0), ("s02", 2)):
        lines[-1] = lines[-1].replace("s01", last)
        text = "\n".join([SUBJECTS.splitlines()[0], *lines]) + "\n"
        (folder / "subjects.csv.gz").write_bytes(gzip.compress(text.encode()))
        assert main([*words[:4], str(tmp_path / last), *words[5:], str(folder)]) == code
    assert (
        f"the runs in {folder} do not fit together: runs of ours have measured other subjects"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "s02").exists()


def test_results__broken_file_and_flags_of_runs_are_refused(
    published: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words, folder = published
    packed = folder / "subjects.csv.gz"
    whole = packed.read_bytes()
    for broken in (whole[:20], whole[:30] + b"\xff" * 20 + whole[50:], b"no gzip"):
        packed.write_bytes(broken)
        assert main([*words, str(folder)]) == 2
        assert "subjects.csv.gz cannot be read" in capsys.readouterr().err
    assert main([*words, str(folder), "--methods", "ours"]) == 2
    assert "--methods is of runs, and --results runs nothing" in capsys.readouterr().err
