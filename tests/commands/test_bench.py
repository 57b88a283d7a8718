"""``agssd bench``: which cells there are, what is read from them, and what settings may say."""

from __future__ import annotations

import csv
import json
from argparse import Namespace
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from made_bench import bench, made_rows, write_bench, write_small_bench

from agssd.cli import main
from agssd.commands.bench import _chosen, _only_helps, _pretrainings, _share, _time_left
from agssd.commands.bench.cells import Cell, Measured, Pool, list_cells, read_measured
from agssd.commands.bench.equal_time import seconds_per_step
from agssd.commands.bench.kept import keep, kept
from agssd.commands.bench.results import places
from agssd.commands.bench.settings import (
    Bench,
    Method,
    Readout,
    label_flags,
    read_settings,
)
from agssd.commands.bench.tables import markdown

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


def test_list_cells__a_readout_may_be_of_fewer_seeds() -> None:
    whole = bench()
    for given, expected in ((1, 1), (2, 2), (3, 3), (9, 3)):
        few = bench(readouts={**whole.readouts, "full": replace(whole.readouts["full"], seeds=given)})
        cells = list_cells(few, "c.h5", Path("o"))
        assert {c.seed for c in cells if c.readout == "full"} == set(range(expected))
        assert {c.seed for c in cells if c.readout == "linear"} == {0, 1, 2}
    with pytest.raises(ValueError, match=r"readouts\.full\.seeds is 0; give at least 1"):
        bench(readouts={**whole.readouts, "full": replace(whole.readouts["full"], seeds=0)})


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


def test_takes_part__scratch_has_fits_of_its_own_beside_the_probes_and_a_network_of_its_own_no_probe() -> None:
    methods = bench().methods | {"scratch": Method(fit={"full": ["--config", "s.yaml"]})}
    probe = Readout(probe="knn-seg", window_vox=[16, 16, 16])
    settings = bench(methods=methods, readouts=bench().readouts | {"knn": probe}, backbone="b.yaml")
    assert {name for name in methods if settings.takes_part(name, "knn")} == {"scratch", "ours", "rival"}
    cells = [cell for cell in list_cells(settings, "c.h5", Path("out")) if cell.method == "scratch"]
    assert {cell.readout for cell in cells} == {"full", "linear", "knn"}
    assert all(("s.yaml" in cell.fit) == (cell.readout == "full") for cell in cells)


def test_list_cells__a_fold_is_left_out_of_pretraining_too() -> None:
    cells = list_cells(bench(num_folds=4), "c.h5", Path("out"))
    for cell in cells:
        commands = [cell.fit, cell.measure, *([cell.pretraining.command] if cell.pretraining else [])]
        assert {command[command.index("--data.fold") + 1] for command in commands} == {str(cell.fold)}
        assert cell.measure[0] == "validate" and cell.cases == "val_cases.csv"


def test_list_cells__what_is_pretrained_on_may_be_other_volumes_and_then_serves_every_fold() -> None:
    settings = bench(num_folds=2)
    pool = Pool(("all.h5", "more.h5"), "m")
    cells = list_cells(settings, "c.h5", Path("out"), "d", pool)
    own = list_cells(settings, "c.h5", Path("out"), "d")
    assert [cell.folder for cell in cells] == [cell.folder for cell in own]
    before = {cell.pretraining for cell in cells if cell.pretraining is not None}
    assert len(before) == 2 * 3 and all(one.fold is None for one in before), "of each method and seed one"
    for one in before:
        assert one.command[one.command.index("--data.cache") + 1] == "[all.h5,more.h5]"
        assert "--data.num_folds" not in one.command
    assert all("c.h5" in cell.fit and "--data.fold" in cell.fit for cell in cells)
    changed = {cell.method for cell, other in zip(cells, own, strict=True) if cell.mark != other.mark}
    assert changed == {"ours", "rival"}, "what was pretrained on other volumes is another figure"
    marks = {cell.mark for cell in cells} & {
        cell.mark for cell in list_cells(settings, "c.h5", Path("out"), "d", Pool(pool.caches, "other"))
    }
    assert marks == {cell.mark for cell in cells if cell.pretraining is None}
    shares = [_share(cells, f"{number}/3") for number in range(3)]
    wanted = [{cell.pretraining for cell in share if cell.pretraining is not None} for share in shares]
    assert sum(map(len, wanted)) == len(before), "no pretraining is wanted by two shares"


def test_list_cells__what_was_pretrained_elsewhere_is_one_encoder_a_seed_and_no_work(tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.ckpt" for name in "abc"]
    for path in paths:
        path.write_text(path.name)
    whole = bench()
    settings = bench(methods={**whole.methods, "given": Method(encoders=list(map(str, paths)))})

    def given() -> list[Cell]:
        return [cell for cell in list_cells(settings, "c.h5", Path("out")) if cell.method == "given"]

    cells = given()
    assert len(cells) == sum(cell.method == "ours" for cell in list_cells(settings, "c.h5", Path("out")))
    for cell in cells:
        one = cell.pretraining
        assert one is not None and one.is_done and one.folder == paths[cell.seed] and one.fold is None
        assert cell.fit[cell.fit.index("--model.encoder") + 1] == str(paths[cell.seed])
    assert not _pretrainings(cells)
    before = {cell.folder: cell.mark for cell in cells}
    paths[1].write_text("other weights")
    changed = {cell.seed for cell in given() if cell.mark != before[cell.folder]}
    assert changed == {1}, "what was measured with other weights is known as such"


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


def test_share__of_more_than_the_encoders_are_parts_of_what_each_is_trained_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = bench(readouts=bench().readouts | {"knn": Readout(probe="knn-seg", window_vox=[8] * 3)}, backbone="b")
    cells = list_cells(settings, "c.h5", tmp_path)
    encoders = {(cell.method, cell.seed) for cell in cells}
    count = 2 * len(encoders) + 1
    shares = [_share(cells, f"{number}/{count}") for number in range(count)]
    assert Counter(cell.folder for share in shares for cell in share) == Counter(cell.folder for cell in cells)
    for number, share in enumerate(shares):
        assert len({(cell.method, cell.seed) for cell in share}) == 1
        assert _only_helps(cells, f"{number}/{count}") == (number >= len(encoders))
        assert number < len(encoders) or all(cell.fit for cell in share), "features are computed once"
    trained = [sum(bool(cell.fit) for cell in share) for share in shares]
    halves = zip(trained[1 : len(encoders)], trained[len(encoders) + 1 : -1], strict=True)
    assert all(0 <= first - second <= 1 for first, second in halves) and sum(trained) == sum(bool(c.fit) for c in cells)
    assert not _only_helps(cells, None) and not _only_helps(cells, "3/4")


def test_time_left__is_what_is_missing_by_the_mean_of_what_is_done(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_bench(out, {}, leave_out=30)
    cells = kept(out).cells(out)
    assert (
        _time_left(cells)
        == f"{30 * 60 / 3600:.1f} hours of one worker are left, by the mean of those done of each kind"
    )
    assert not _time_left(cells[:-30]), "nothing is left"
    for cell in cells:
        if cell.method == "unet":
            (cell.folder / "row.json").unlink(missing_ok=True)
    unets = [cell for cell in cells if cell.method == "unet"]
    assert "without 2 kinds of which none is done yet, such as full, 10 steps, of unet" in _time_left(cells)
    assert not _time_left(unets), "and nothing is guessed"


def test_share__beyond_the_encoders_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "--config", str(write_small_bench(tmp_path / "b.yaml")), "--cache", "none.h5", "--out", "o"]
    assert main([*words, "--dry-run", "--share", "5/8"]) == 0
    assert "share 5/8 has nothing to do: there are more shares than the work has parts" in capsys.readouterr().out
    assert main([*words, "--dry-run", "--share", "3/8"]) == 0
    assert "nothing to do" not in capsys.readouterr().out


def test_chosen__are_the_cells_of_what_is_asked_for() -> None:
    settings = bench()
    cells = list_cells(settings, "c.h5", Path("out"))

    def chosen(methods: list[str] | None = None, readouts: list[str] | None = None) -> list[Cell]:
        return _chosen(settings, cells, Namespace(methods=methods, readouts=readouts, config="b.yaml"))

    assert chosen() == cells
    some = chosen(["scratch", "ours"], ["linear"])
    assert some == [c for c in cells if c.method in ("scratch", "ours") and c.readout == "linear"] and some
    with pytest.raises(ValueError, match=r"--methods has 'us'; the methods of b\.yaml are scratch, unet, ours, rival"):
        chosen(["us"])
    with pytest.raises(ValueError, match=r"--readouts has 'knn'; the readouts of b\.yaml are full, linear"):
        chosen(None, ["knn"])


def test_read_measured__dice_of_present_classes_and_weighted_accuracy(tmp_path: Path) -> None:
    path = tmp_path / "cases.csv"
    path.write_text("case,subject,dice_class1,dice_class2,surface_dice_class1\na,p,0.5,0.7,0\nb,p,0.9,,0\nc,q,,,1\n")
    approx = pytest.approx
    expected = Measured({"p": approx((0.6 + 0.9) / 2), "q": None}, {"1": approx((0.5 + 0.9) / 2), "2": approx(0.7)})
    assert read_measured(path, "dice") == expected
    path.write_text("case,subject,dice_class1\na,p,\n")
    with pytest.raises(ValueError, match=r"cases\.csv has no dice"):
        read_measured(path, "dice")


def test_read_measured__shares_of_the_balanced_accuracy_over_volumes(tmp_path: Path) -> None:
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
        measured = read_measured(path, "accuracy")
        found = measured.subjects
        assert np.mean(list(measured.classes.values())) == pytest.approx(np.mean(list(found.values())))
        assert set(found) == {f"p{subject}" for subject in subjects}
        return float(np.mean(list(found.values())))

    right = scores.argmax(1) == targets
    assert figure(scores) == pytest.approx(np.mean([right[targets == kind].mean() for kind in set(targets)]))
    assert figure(np.eye(3)[targets]) == pytest.approx(1), "whoever knows all has 1, whoever has several volumes"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"equal_time": "scratch"}, "equal_time is 'scratch'"),
        ({"methods": {"scratch": {}, "g": {"encoders": ["a.ckpt"]}}}, "methods.g.encoders are 1 for"),
        ({"methods": {"scratch": {}, "g": {"encoders": ["a"] * 3, "pretrain": ["b"]}}}, "give one of both"),
        ({"methods": {"scratch": {"encoders": ["a"] * 3}}}, "no 'scratch: {}'"),
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
        "methods": {
            "scratch": {},
            "ours": {"pretrain": ["--config", "../a.yaml"]},
            "rival": {"encoders": ["../x"] * 3},
        },
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
    assert found.methods["rival"].encoders == [str(tmp_path / "x")] * 3
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


def kept_again(settings: Bench, out: Path) -> Bench:
    keep(settings, [], [], out)
    return kept(out).bench


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
    assert "rival 7; rival-equal-time 500 to 4000, the time of ours;" in markdown(settings, rows).replace(")", ";")
    for row in rows:
        row["pretraining_machine"] = "a" if row["method"] == "ours" or row["seed"] else "b"
    assert "500 to 4000, the time of ours on another kind of machine" in markdown(settings, rows)


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
