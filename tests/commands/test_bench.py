"""``agssd bench``: which cells there are, what is read from them, what the tables claim, and that it goes on."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import yaml
from made_bench import bench, made_rows, write_bench

from agssd.cli import main
from agssd.commands.bench import _measure_all, _pretrain_all, _share
from agssd.commands.bench.cells import Cell, Pretraining, list_cells, pretrain, read_subjects, train_and_measure
from agssd.commands.bench.equal_time import seconds_per_step
from agssd.commands.bench.kept import keep, kept
from agssd.commands.bench.marks import command_mark
from agssd.commands.bench.probes import probe
from agssd.commands.bench.processes import side_by_side
from agssd.commands.bench.records import Job, once, state_of
from agssd.commands.bench.results import Place, figures, places, read_rows
from agssd.commands.bench.settings import (
    Bench,
    Method,
    Probe,
    Readout,
    label_flags,
    read_settings,
)
from agssd.commands.bench.tables import compare, head, markdown
from agssd.data_modules.cache import VolumeCache
from agssd.data_modules.probe_set import ProbeSet
from agssd.evaluation.probe import READOUTS, run_readouts
from agssd.evaluation.probe_features import Depths, encode
from agssd.models.backbone import build_fresh

ROOT = Path(__file__).resolve().parents[2]


def test_list_cells__every_combination_once_and_all_labels_drawn_once() -> None:
    cells = list_cells(bench(), "c.h5", Path("out"))
    assert len({cell.folder for cell in cells}) == len(cells)
    amounts = 5 + 5 + 1  # draws of 2 subjects, of a quarter, of all
    assert Counter(cell.readout for cell in cells) == {"full": 2 * amounts * 3 * 4, "linear": amounts * 3 * 3}
    assert {cell.readout for cell in cells if cell.method == "unet"} == {"full"}
    assert all((cell.pretraining is None) == (cell.method in ("scratch", "unet")) for cell in cells)
    assert len({cell.pretraining for cell in cells} - {None}) == 2 * 3, "one pretraining per method and seed"


def test_list_cells__a_readout_may_have_amounts_of_labels_of_its_own() -> None:
    whole = bench()
    few = bench(readouts={**whole.readouts, "full": replace(whole.readouts["full"], labels=["2"])})
    by_readout = {
        name: {c.labels for c in list_cells(few, "c.h5", Path("o")) if c.readout == name} for name in few.readouts
    }
    assert by_readout == {"full": {2}, "linear": {2, "25%", "100%"}}
    assert {place.labels for place in places(few) if place.readout == "full"} == {2}
    same = {c.folder for c in list_cells(whole, "c.h5", Path("o")) if c.readout != "full" or c.labels == 2}
    assert {c.folder for c in list_cells(few, "c.h5", Path("o"))} == same, "what is left out can be added later"


def test_list_cells__a_readout_may_leave_second_pretrainings_out() -> None:
    whole = bench(equal_time="ours")
    readouts = {**whole.readouts, "full": replace(whole.readouts["full"], equal_time=False)}
    methods = {
        name: {
            c.method
            for c in list_cells(bench(equal_time="ours", readouts=readouts), "c.h5", Path("o"))
            if c.readout == name
        }
        for name in readouts
    }
    assert methods["linear"] - methods["full"] == {"rival-equal-time"}
    assert methods["full"] == {"scratch", "ours", "rival", "unet"}


def test_seconds_per_step__is_that_of_the_fastest_interval(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,throughput/s_per_step\n49,0.9\n50,\n99,0.25\n149,0.4\n")
    assert seconds_per_step(tmp_path) == 0.25
    (tmp_path / "metrics.csv").write_text("step,train/loss\n49,0.9\n")
    with pytest.raises(ValueError, match="throughput.every_n_steps"):
        seconds_per_step(tmp_path)


def test_list_cells__commands_differ_by_nothing_but_what_is_compared() -> None:
    cells = list_cells(bench(), "c.h5", Path("out"))

    def words(method: str) -> list[str]:
        cell = next(
            c
            for c in cells
            if c.method == method and (c.readout, c.steps, c.labels, c.draw, c.seed) == ("full", 30, 2, 4, 1)
        )
        return [word.replace(f"/{method}/", "/METHOD/") for word in cell.fit]

    ours, scratch = words("ours"), words("scratch")
    at = ours.index("--model.encoder")
    assert ours[at + 1] == "out/pretraining/METHOD/seed1"
    assert ours[:at] + ours[at + 2 :] == scratch
    flags = dict(zip(scratch[1::2], scratch[2::2], strict=True))
    assert flags["--data.num_subjects"] == "2" and flags["--data.subset_seed"] == "4"
    assert flags["--seed_everything"] == "1" and flags["--trainer.max_steps"] == "30"
    rival = next(c.pretraining for c in cells if c.method == "rival" and c.pretraining is not None)
    assert rival.command[rival.command.index("--trainer.max_steps") + 1] == "7"
    assert label_flags("25%") == ["--data.label_fraction", "0.25"] and label_flags("100%") == []


def test_list_cells__a_fold_is_left_out_of_pretraining_too() -> None:
    cells = list_cells(bench(num_folds=4), "c.h5", Path("out"))
    for cell in cells:
        commands = [cell.fit, cell.measure, *([cell.pretraining.command] if cell.pretraining else [])]
        assert {command[command.index("--data.fold") + 1] for command in commands} == {str(cell.fold)}
        assert cell.measure[0] == "validate" and cell.cases == "val_cases.csv"


def test_share__is_a_partition_that_keeps_pretrainings_together() -> None:
    cells = list_cells(bench(), "c.h5", Path("out"))
    shares = [_share(cells, f"{number}/4") for number in range(4)]
    assert Counter(cell.folder for share in shares for cell in share) == Counter(cell.folder for cell in cells)
    owners: dict[Any, set[int]] = {}
    for number, share in enumerate(shares):
        for cell in share:
            owners.setdefault(cell.pretraining, set()).add(number)
    assert all(len(found) == 1 for one, found in owners.items() if one is not None)
    with pytest.raises(ValueError, match="--share is '4/4'"):
        _share(cells, "4/4")


def test_read_subjects__dice_of_present_classes_and_weighted_accuracy(tmp_path: Path) -> None:
    path = tmp_path / "cases.csv"
    path.write_text("case,subject,dice_class1,dice_class2,surface_dice_class1\na,p,0.5,0.7,0\nb,p,0.9,,0\nc,q,,,1\n")
    assert read_subjects(path, "dice") == pytest.approx({"p": (0.6 + 0.9) / 2})


def test_read_subjects__shares_of_the_balanced_accuracy_over_volumes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    targets, scores = rng.choice(3, 40, p=[0.6, 0.3, 0.1]), rng.dirichlet(np.ones(3), 40)
    subjects = rng.integers(0, 25, 40)  # some with several volumes, of one class or of two
    path = tmp_path / "cases.csv"

    def figure(scores: np.ndarray) -> float:
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["case", "subject", "target", "probability0", "probability1", "probability2"])
            rows = zip(subjects, targets, scores, strict=True)
            writer.writerows([n, f"p{subject}", t, *s] for n, (subject, t, s) in enumerate(rows))
        found = read_subjects(path, "accuracy")
        assert set(found) == {f"p{subject}" for subject in subjects}
        return float(np.mean(list(found.values())))

    right = scores.argmax(1) == targets
    assert figure(scores) == pytest.approx(np.mean([right[targets == kind].mean() for kind in set(targets)]))
    assert figure(np.eye(3)[targets]) == pytest.approx(1), "whoever knows all has 1, whoever has several volumes"


def test_list_cells__marks_change_with_what_is_compared_and_with_nothing_else() -> None:
    def marks(data: str = "d", cache: str = "c.h5", out: str = "out", **given: Any) -> dict[str, str]:
        cells = list_cells(bench(**given), cache, Path(out), data)
        found = {str(cell.folder.relative_to(out)): cell.mark for cell in cells}
        return found | {
            str(one.folder.relative_to(out)): one.mark for cell in cells if (one := cell.pretraining) is not None
        }

    as_it_was = marks()
    assert len(set(as_it_was.values())) == len(as_it_was)
    assert marks(cache="/elsewhere/c.h5", out="../runs/./out", seeds=3) == as_it_was, "places are no settings"
    assert not set(marks(data="other cases").values()) & set(as_it_was.values())
    methods = bench().methods
    other = marks(methods={**methods, "rival": replace(methods["rival"], pretrain=["--config", "c.yaml"])})
    changed = {name for name, mark in other.items() if mark != as_it_was[name]}
    assert changed == {name for name in as_it_was if "/rival/" in name}, "its pretraining and all that hangs on it"
    readouts = bench().readouts
    other = marks(readouts={**readouts, "full": replace(readouts["full"], fit=["--config", "g.yaml"])})
    changed = {name for name, mark in other.items() if mark != as_it_was[name]}
    assert changed == {name for name in as_it_was if "cells/full/" in name and "/unet/" not in name}


def test_run__nothing_is_measured_with_an_encoder_of_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, asked = bench(), []
    cells = list_cells(settings, "c.h5", tmp_path)
    for cell in cells:
        if cell.pretraining is not None:
            cell.pretraining.folder.mkdir(parents=True, exist_ok=True)
            row = {"mark": "before" if cell.method == "ours" else cell.pretraining.mark}
            (cell.pretraining.folder / "row.json").write_text(json.dumps(row))

    def work(tasks: dict[str, Any], workers: int, preload: Any) -> list[tuple[str, str]]:
        asked.extend(task[1] for task in tasks.values())
        return []

    monkeypatch.setattr("agssd.commands.bench.side_by_side", work)
    arguments = Namespace(workers=1, cache="c.h5", out=tmp_path)
    job = Job(settings, "c.h5", None)
    _measure_all(job, _pretrain_all(job, cells, arguments, "")[1], 1)
    assert {one.method for one in asked if isinstance(one, Pretraining)} == {"ours", "rival"}, "one is refused there"
    assert {one.method for one in asked if isinstance(one, Cell)} == {"scratch", "unet", "rival"}


def test_read_rows__a_row_of_other_settings_is_in_no_table(tmp_path: Path) -> None:
    out = tmp_path / "bench"
    write_bench(out, {"ours": 0.1})
    cells = kept(out).cells(out)
    assert len(read_rows(cells)) == len(cells)
    path = cells[7].folder / "row.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mark": "before"}))
    assert state_of(cells[7]) == "other" and state_of(cells[8]) == "done"
    assert len(read_rows(cells)) == len(cells) - 1
    assert main(["report", str(out), "--out", str(tmp_path / "page.html")]) == 0
    assert "1 of 363 runs are not done" in (tmp_path / "page.html").read_text()


def test_once__work_begun_with_other_settings_is_not_gone_on_with(tmp_path: Path) -> None:
    job = Job(bench(), "c.h5", None)
    cell = list_cells(job.bench, "c.h5", tmp_path, "these cases")[0]

    def stopped() -> dict[str, Any]:
        (cell.folder / "checkpoint").touch()
        raise RuntimeError("preempted")

    with pytest.raises(RuntimeError, match="preempted"):
        once(cell, job, stopped)
    for mark in ("other", ""):
        with pytest.raises(ValueError, match="made with other settings"):
            once(replace(cell, mark=mark), job, dict)
    assert once(cell, job, dict)["mark"] == cell.mark and state_of(cell) == "done"


def test_side_by_side__one_that_fails_or_dies_leaves_the_others_be(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"seconds": 3.0, "subjects": "s" * 200_000}  # more than a pipe holds
    tasks: dict[str, Any] = {"dies": (os._exit, 3), "fails": (int, "x")}
    tasks |= {f"works {number}": (dict, row) for number in range(3)}
    failed = dict(side_by_side(tasks, 2))
    assert set(failed) == {"dies", "fails"}
    assert "exit code 3" in failed["dies"] and "invalid literal" in failed["fails"]
    said = capsys.readouterr().out
    assert all(f"works {number}: 3 s" in said for number in range(3)) and "[5/5," in said


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
    for line in text.splitlines():
        if line.startswith("| rival - scratch"):
            assert line.count("no difference shown") == 3 and ", p" not in line
        if line.startswith("| ours - rival"):
            assert line.count(", p") == 3
    assert {line.count("|") for line in text.splitlines() if line.startswith("|")} == {5}
    reads_of_unet = [line for line in text.split("## linear")[1].splitlines() if line.startswith("| unet")]
    assert not reads_of_unet


def test_tables__say_over_what_an_interval_is() -> None:
    for given, told in (
        ({}, "95 % interval over seeds, draws and subjects."),
        ({"draws": 1}, "95 % interval over seeds and subjects, not over draws, of which there is one."),
        ({"draws": 1, "seeds": 1}, "95 % interval over subjects, not over seeds and draws, of which there is one."),
    ):
        settings = bench(**given)
        assert told in head(settings, made_rows(list_cells(settings, "", Path("o")), {}))


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
    lost["subjects"] = {**lost["subjects"], "stranger": 1.0}
    with pytest.raises(ValueError, match="other subjects"):
        figures(settings, rows, "ours", place)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"equal_time": "scratch"}, "equal_time is 'scratch'"),
        ({"readouts": {"knn": {"probe": "knn-cls", "window_vox": [8, 8, 8]}}, "backbone": "b.yaml"}, "ending in seg"),
        ({"readouts": {"knn": {"probe": "knn-seg", "window_vox": [8, 8, 8]}}}, "name the encoder of scratch"),
        ({"readouts": {"knn": {"probe": "knn-seg"}}, "backbone": "b.yaml"}, r"window_vox is \[\]"),
        ({"readouts": {"knn": {"probe": "knn-seg", "steps": [3]}}, "backbone": "b.yaml"}, "give one of both"),
        ({"readouts": {"knn": {"probe": "votes"}}}, "votes"),
        ({"methods": {"ours": {"pretrain": ["x"]}}}, "scratch"),
        ({"labels": ["0%"]}, "labels has '0%'"),
        ({"labels": [2, 2]}, "give each amount once"),
        ({"readouts": {"full": {"fit": [], "steps": [1], "labels": [4, "4"]}}}, "readouts.full.labels is"),
        ({"readouts": {"full": {"fit": [], "steps": [1], "labels": ["0%"]}}}, "readouts.full.labels has '0%'"),
        ({"seeds": 0}, "seeds is 0"),
        ({"readouts": {"a b": {"fit": [], "steps": [1]}}}, "folder's name"),
        ({"colour": 1}, "colour"),
        ({"num_folds": 1}, "num_folds is 1"),
    ],
)
def test_read_settings__says_what_is_wrong(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    good = {
        "methods": {"scratch": {}},
        "readouts": {"full": {"fit": ["--config", "f.yaml"], "steps": [3]}},
        "labels": [2],
        "pretrain_steps": 1,
    }
    path = tmp_path / "bench.yaml"
    path.write_text(yaml.safe_dump(good))
    assert read_settings(path, quick=False).readouts["full"].fit[1] == str(tmp_path / "f.yaml")
    with pytest.raises(ValueError, match="nothing under 'quick'"):
        read_settings(path, quick=True)
    path.write_text(yaml.safe_dump(good | change))
    with pytest.raises(ValueError, match=said):
        read_settings(path, quick=False)


def test_read_settings__lays_itself_over_its_bases(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    methods = {
        "methods": {"scratch": {}, "ours": {"pretrain": ["--config", "../a.yaml"]}, "rival": {"pretrain": ["x"]}},
        "pretrain_steps": 1,
        "quick": {"seeds": 2, "methods": {"ours": None}},
    }
    readouts = {
        "methods": {"unet": {"fit": {"full": ["y"]}}},
        "readouts": {"full": {"fit": ["--config", "f.yaml"], "steps": [3]}, "half": {"fit": ["z"], "steps": [3]}},
        "labels": [2],
        "quick": {"methods": {"unet": None}},
    }
    for name, content in {"m": methods, "r": readouts}.items():
        (tmp_path / "base" / f"{name}.yaml").write_text(yaml.safe_dump(content))
    path = tmp_path / "bench.yaml"
    own = {"base": ["base/m.yaml", "base/r.yaml"], "labels": [8], "readouts": {"half": None}, "quick": {"seeds": 1}}
    path.write_text(yaml.safe_dump(own))
    found = read_settings(path, quick=False)
    assert found.labels == [8] and found.seeds == 3 and set(found.readouts) == {"full"}
    assert set(found.methods) == {"scratch", "ours", "rival", "unet"}
    assert found.methods["ours"].pretrain[1] == str(tmp_path / "a.yaml")
    assert found.readouts["full"].fit[1] == str(tmp_path / "base" / "f.yaml"), "relative to the file that says it"
    quick = read_settings(path, quick=True)
    assert quick.seeds == 1 and set(quick.methods) == {"scratch", "rival"}, "what each base takes out of the small form"


def _timed(settings: Bench, out: Path, method: str, seed: int, seconds: list[float], mark: str = "") -> None:
    folder = out / "pretraining" / method / f"seed{seed}"
    folder.mkdir(parents=True)
    cells = list_cells(settings, "c.h5", out)
    one = next(c.pretraining for c in cells if (c.method, c.seed) == (method, seed) and c.pretraining is not None)
    row = {"seconds": 1.0, "steps": one.steps, "commit": "c", "mark": mark or one.mark}
    (folder / "row.json").write_text(json.dumps(row))
    rows = [f"{step},{'' if value is None else value}" for step, value in enumerate([None, *seconds])]
    (folder / "metrics.csv").write_text("step,throughput/s_per_step\n" + "\n".join(rows) + "\n")


def test_equal_time__as_many_steps_as_fit_into_the_time_of_the_same_seed(tmp_path: Path) -> None:
    settings = bench(equal_time="ours", pretrain_steps=1000)
    assert list(settings.methods) == ["scratch", "unet", "ours", "rival", "rival-equal-time"]
    assert settings.methods["rival-equal-time"].steps is None, "the 7 steps of the first are not those of equal time"

    def twins() -> dict[int, tuple[int | None, tuple[str, ...]]]:
        cells = list_cells(settings, "c.h5", tmp_path)
        found = [c.pretraining for c in cells if c.method == "rival-equal-time"]
        return {one.seed: (one.steps, one.command) for one in found if one is not None}

    assert twins() == dict.fromkeys(range(3), (None, ()))
    for seed in range(2):
        _timed(settings, tmp_path, "ours", seed, [0.4, 0.4, 9.0])  # a pause of the machine does not count
    _timed(settings, tmp_path, "rival", 0, [0.1])
    _timed(settings, tmp_path, "rival", 1, [0.8, 0.8])
    steps = {seed: found[0] for seed, found in twins().items()}
    assert steps == {0: 4000, 1: 500, 2: None}
    command = twins()[0][1]
    assert command[command.index("--trainer.max_steps") + 1] == "4000"
    assert command[command.index("--trainer.default_root_dir") + 1].endswith("rival-equal-time/seed0")
    assert kept_again(settings, tmp_path) == settings
    _timed(settings, tmp_path, "ours", 2, [0.4])
    _timed(settings, tmp_path, "rival", 2, [0.2])
    rows = made_rows(list_cells(settings, "c.h5", tmp_path), {})
    assert "rival 7; rival-equal-time 500 to 4000, the time of ours" in markdown(settings, rows)


def kept_again(settings: Bench, out: Path) -> Bench:
    keep(settings, [], [], out)
    return kept(out).bench


def test_probe__names_are_those_of_agssd_probe() -> None:
    assert set(get_args(Probe)) == set(READOUTS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("figure", "kinds", "num_folds", "depths"),
    [
        ("dice", ("knn-seg", "linear-seg"), None, "last"),
        ("dice", ("linear-seg",), None, "all"),
        ("accuracy", ("knn-cls", "linear-cls"), 2, "last"),
    ],
)
def test_probe__same_figures_as_the_readouts_alone_and_once_only(
    figure: str, kinds: tuple[str, ...], num_folds: int | None, depths: Depths, tiny_cache: Path, tmp_path: Path
) -> None:
    backbone = tmp_path / "encoder.yaml"
    vit = {"in_channels": 1, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}
    backbone.write_text(yaml.safe_dump({"class_path": "agssd.models.vit.ViT", "init_args": vit}))
    readouts = {name: Readout(probe=name, window_vox=[16, 16, 16], depths=depths) for name in kinds}  # type: ignore[arg-type]
    given = {"readouts": readouts, "figure": figure, "backbone": str(backbone), "num_folds": num_folds}
    settings = bench(methods={"scratch": Method()}, labels=[2, "100%"], draws=2, **given)
    cells = [c for c in list_cells(settings, str(tiny_cache), tmp_path) if c.seed == 1 and c.fold in (None, 1)]
    assert len(cells) == len(kinds) * (2 + 1) and not any(cell.fit for cell in cells)
    job = Job(settings, str(tiny_cache), "c0ffee")
    probe(cells, job)
    rows = [json.loads((cell.folder / "row.json").read_text()) for cell in cells]
    kind = "label" if figure == "dice" else "class"
    data = ProbeSet(VolumeCache(tiny_cache), num_folds, kinds=(kind,), measured_on="test")
    encoder = build_fresh(yaml.safe_load(backbone.read_text()), 1)
    features = encode(encoder, data.volumes(), (16, 16, 16), 0.5, depths=depths)
    for row in rows:
        few = None if row["labels"] == "100%" else row["labels"]
        drawn = ProbeSet(data.cache, num_folds, few, subset_seed=row["draw"], kinds=(kind,), measured_on="test")
        fold = drawn.folds[0 if num_folds is None else 1]
        data.folds = (fold,)
        assert set(row["subjects"]) == set(fold.held_out)
        assert row["value"] == pytest.approx(np.mean(list(row["subjects"].values())))
        name = row["readout"].replace("-", "_") + ("_dice" if figure == "dice" else "_balanced_accuracy")
        expected = run_readouts(features, data, [row["readout"]]).figures[name]
        assert row["value"] == pytest.approx(expected, abs=1e-6)
    stamps = {cell: (cell.folder / "row.json").stat().st_mtime_ns for cell in cells}
    probe(cells, job)
    assert all((cell.folder / "row.json").stat().st_mtime_ns == stamp for cell, stamp in stamps.items())
    backbone.write_text(yaml.safe_dump({"class_path": "agssd.models.vit.ViT", "init_args": vit | {"depth": 2}}))
    cells = [c for c in list_cells(settings, str(tiny_cache), tmp_path) if c.folder in {cell.folder for cell in cells}]
    with pytest.raises(ValueError, match="made with other settings"):
        probe(cells, job)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_side_by_side__ended__its_tasks_end_too_and_none_begins(how: signal.Signals, tmp_path: Path) -> None:
    cell = (
        "import os, pathlib, signal, time; path = pathlib.Path({!r}); "
        "signal.signal(signal.SIGTERM, lambda *_, path=path:"
        " (path.with_suffix('.told').touch(), os._exit(0))); path.write_text(str(os.getpid())); time.sleep(300)"
    )
    told = [tmp_path / "first", tmp_path / "second"]
    tasks = {path.name: f"(exec, {cell.format(str(path))!r})" for path in told}
    given = "{" + ", ".join(f"{name!r}: {task}" for name, task in tasks.items()) + "}"
    source = f"from agssd.commands.bench.processes import side_by_side; side_by_side({given}, 1)"
    command = [sys.executable, "-c", f"if __name__ == '__main__':\n    {source}"]
    bench = subprocess.Popen(command, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not (told[0].exists() and told[0].read_text()):
            assert bench.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        if how == signal.SIGINT:
            os.killpg(bench.pid, how)  # as a terminal does: the tasks get it too
        else:
            bench.send_signal(how)
        bench.wait(timeout=60)
    finally:
        bench.kill()
        bench.wait()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{told[0].read_text()}").exists():
        assert time.monotonic() < deadline, "the task goes on without its bench"
        time.sleep(0.1)
    assert not told[1].exists()
    assert told[0].with_suffix(".told").exists(), "told by the signal upon which a training saves itself"


def test_command_mark__changes_with_what_the_files_say_that_a_command_leads_to(tmp_path: Path) -> None:
    views, experiment = tmp_path / "views.yaml", tmp_path / "experiments" / "one.yaml"
    experiment.parent.mkdir()
    views.write_text("scale: [0.4, 0.9]\n")
    experiment.write_text("views: ../views.yaml\nrest: [1, later.yaml]\n")
    command = ["fit", "--config", str(experiment), "--seed", "0", "--backbone", "missing.yaml"]
    mark = command_mark(command)
    views.write_text("scale: [0.4, 0.9] # a comment changes nothing\n")
    assert command_mark(command) == mark
    assert command_mark([*command[:-2], "--backbone", "other.yaml"]) != mark
    views.write_text("scale: [0.4, 1.0]\n")
    assert command_mark(command) != mark


@pytest.mark.parametrize("path", sorted((ROOT / "conf" / "bench").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_benches__name_files_that_exist_and_have_a_quick_form(path: Path) -> None:
    for quick in (False, True):
        settings = read_settings(path, quick)
        named = [
            word for method in settings.methods.values() for word in [*method.pretrain, *sum(method.fit.values(), [])]
        ]
        named += [word for one in settings.readouts.values() for word in one.fit]
        assert all(Path(word).is_file() for word in named if word.endswith(".yaml"))
    assert settings.pretrain_steps <= 100 and settings.seeds >= 2


@pytest.mark.slow
def test_bench__runs_goes_on_and_refuses_another_setting(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    small = ["--data.num_workers", "0", "--data.global_batch_size", "2", "--trainer.precision", "32-true"]
    experiment = ROOT / "conf" / "experiment"
    settings = {
        "methods": {
            "scratch": {},
            "simmim": {
                "pretrain": ["--config", str(experiment / "small.yaml"), "--model"]
                + [str(ROOT / "conf" / "method" / "simmim.yaml"), *small]
            },
        },
        "readouts": {"full": {"fit": ["--config", str(experiment / "segmentation_small.yaml"), *small], "steps": [2]}},
        "labels": [1],
        "pretrain_steps": 2,
        "seeds": 1,
        "draws": 1,
        "num_folds": 2,
    }
    path, out = tmp_path / "bench.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(settings))
    command = ["bench", "--config", str(path), "--cache", str(tiny_cache), "--out", str(out)]
    assert main([*command, "--workers", "2"]) == 0, capfd.readouterr().err
    made = {row: row.stat().st_mtime_ns for row in out.rglob("row.json")}
    assert len(made) == 2 + 4 and not list(out.rglob("cells/**/*.ckpt"))
    kept = json.loads(next(row for row in made if "cells" in str(row)).read_text())
    assert kept["value"] == pytest.approx(np.mean(list(kept["subjects"].values())))
    with (out / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 and all(float(row["seconds"]) > 0 and row["bench"] for row in rows)
    assert all((float(row["pretraining_seconds"]) > 0) == (row["method"] == "simmim") for row in rows)
    again = next(row for row in made if "scratch" in str(row) and "cells" in str(row))
    before = json.loads(again.read_text())["subjects"]
    again.unlink()
    assert main(command) == 0, "the rest goes on"
    assert json.loads(again.read_text())["subjects"] == before, "the same run gives the same figures"
    assert all(row.stat().st_mtime_ns == stamp for row, stamp in made.items() if row != again), "nothing twice"
    settings["readouts"]["full"]["fit"][-1] = "bf16-mixed"  # type: ignore[index]
    path.write_text(yaml.safe_dump(settings))
    assert main(command) == 1
    assert "was made with other settings" in capfd.readouterr().err


@pytest.mark.slow
def test_bench__equal_time_and_probes_from_beginning_to_end(
    make_cache: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    conf = ROOT / "conf"
    cache = make_cache(tmp_path / "c.h5", splits=["train"] * 5 + ["val", "test", "test"])
    small = ["--config", str(conf / "experiment" / "small.yaml"), "--model"]
    settings = {
        "methods": {
            "scratch": {},
            "simmim": {"pretrain": [*small, str(conf / "method" / "simmim.yaml")]},
            "mae": {"pretrain": [*small, str(conf / "method" / "mae.yaml"), "--model.decoder_dim", "96"]},
        },
        "readouts": {"knn": {"probe": "knn-seg", "window_vox": [32, 32, 32]}},
        "backbone": str(conf / "backbone" / "vit_tiny_p8.yaml"),
        "pretrain_common": ["--data.num_workers", "0", "--data.global_batch_size", "2"],
        "equal_time": "mae",
        "labels": [2, "100%"],
        "pretrain_steps": 6,
        "seeds": 1,
        "draws": 1,
    }
    path, out = tmp_path / "bench.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(settings))
    command = ["bench", "--config", str(path), "--cache", str(cache), "--out", str(out)]
    assert main([*command, "--share", "0/3"]) == main([*command, "--share", "1/3"]) == 0, capfd.readouterr().err
    assert main([*command, "--share", "1/4"]) == 0, "simmim's part"
    assert main(command) == 0, capfd.readouterr().err
    with (out / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 2
    steps = {row["method"]: int(row["pretraining_steps"]) for row in rows}
    assert steps["scratch"] == 0 and steps["simmim"] == steps["mae"] == 6
    speed = {name: seconds_per_step(out / "pretraining" / name / "seed0") for name in ("simmim", "mae")}
    assert steps["simmim-equal-time"] == round(6 * speed["mae"] / speed["simmim"])
    log = (out / "pretraining" / "simmim-equal-time" / "seed0" / "metrics.csv").read_text()
    assert (
        len(log.splitlines()) > 1
        and f"simmim-equal-time {steps['simmim-equal-time']}" in (out / "tables.md").read_text()
    )
    made = {row: row.stat().st_mtime_ns for row in out.rglob("row.json")}
    assert main(command) == 0 and all(row.stat().st_mtime_ns == stamp for row, stamp in made.items()), "nothing twice"


@pytest.mark.slow
def test_bench__an_encoder_that_has_seen_test_subjects_is_refused(
    make_cache: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    conf = ROOT / "conf"
    seen = make_cache(tmp_path / "seen.h5", splits=["train"] * 8)
    cache = make_cache(tmp_path / "asked.h5", splits=["train"] * 6 + ["test"] * 2)
    small = ["--data.num_workers", "0", "--data.global_batch_size", "2"]
    words = ["--config", str(conf / "experiment" / "small.yaml"), "--model", str(conf / "method" / "simmim.yaml")]
    task = ["--config", str(conf / "experiment" / "segmentation_small.yaml"), *small]
    settings = Bench(
        methods={"scratch": Method(), "simmim": Method([*words, *small])},
        readouts={"fit": Readout(task, [1]), "knn": Readout(probe="knn-seg", window_vox=[32, 32, 32])},
        labels=[2],
        pretrain_steps=2,
        seeds=1,
        draws=1,
        backbone=str(conf / "backbone" / "vit_tiny_p8.yaml"),
    )
    before = next(one for c in list_cells(settings, str(seen), tmp_path) if (one := c.pretraining) is not None)
    pretrain(before, Job(settings, str(seen), None))
    cells = [c for c in list_cells(settings, str(cache), tmp_path) if c.method == "simmim"]
    job = Job(settings, str(cache), None)
    tasks = {c.readout: (train_and_measure, c, job) if c.fit else (probe, [c], job) for c in cells}
    failed = dict(side_by_side(tasks, 1))
    assert set(failed) == {"fit", "knn"}
    assert all(
        "trained on cases that figures would be measured on: of the split 'test' 2 of 2" in r for r in failed.values()
    )
    assert all(state_of(cell) == "missing" for cell in cells)
    honest = tmp_path / "honest"
    cells = [c for c in list_cells(settings, str(cache), honest) if c.method == "simmim"]
    assert cells[0].pretraining is not None
    pretrain(cells[0].pretraining, job)
    train_and_measure(cells[0], job)
    probe(cells[1:], job)
    assert all(state_of(cell) == "done" for cell in cells)
