"""What the report says, without a browser: sections by what lies there, privacy, size, curves, maps in their place."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from agssd.cli import main
from agssd.commands.report.charts import MAX_POINTS, group_charts, thinned
from agssd.commands.report.dashboard import limits_of, status_table
from agssd.commands.report.encoder_views import Encoded, components
from agssd.commands.report.overlays import Score, chosen, grouped
from agssd.commands.report.run_files import HIDDEN, Curve, Run, read_run, shown_config, shown_error, shown_sentence
from agssd.commands.report.volumes import mosaic, shrunk

NAME = "DOEJANE"  # what conftest.py plants in every path and in the cache


def made_run(curves: dict[str, Curve], config: dict[str, Any] | None = None) -> Run:
    return Run(Path("x"), config or {}, curves, [], "finished", "", [], [], {}, [])


def test_report__of_both_kinds__has_its_sections_and_no_name_and_is_small(
    pages: dict[str, Path], runs: dict[str, Path]
) -> None:
    expected = {"pretrain": ["run", "curves", "views", "encoder"], "segmentation": ["run", "curves", "encoder", "test"]}
    for name, page in pages.items():
        text = re.sub(r"base64,[A-Za-z0-9+/=]+", "", page.read_text())
        assert re.findall(r'<section id="(\w+)"', text) == expected[name]
        assert "Not shown" not in text
        for private in (NAME, NAME.lower(), str(runs["cache"].parent), "case00", "subject00", "/tmp", "/home"):
            assert private not in text, private
        assert not re.search(r"(?:src|href)=\"(?!data:|#)", text) and text.count("http") == 2  # http-equiv, SVG's name
        assert page.stat().st_size < 10e6
    text = pages["pretrain"].read_text()
    assert "peaked &lt;b&gt;&amp; lost" in text and "from step 400 back to 300" in text
    assert "1 not finite" in text  # the loss of step 500
    assert "1,000 of 2" in text and "torch" in text and re.search(r"8 of 8 subjects \(5 train, 2 val, 1 test\)", text)


def test_report__without_cache_and_checkpoint__says_what_is_missing(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "moved"
    shutil.copytree(runs["pretrain"], run, ignore=shutil.ignore_patterns("checkpoints", "panels"))
    config = (run / "config.yaml").read_text().replace(str(runs["cache"]), str(tmp_path / "gone.h5"))
    (run / "config.yaml").write_text(config)
    assert main(["report", str(run), "--out", str(tmp_path / "a.html")]) == 0
    text = (tmp_path / "a.html").read_text()
    assert "name one with --cache CACHE" in text and "gone" not in text and 'id="views"' not in text
    assert main(["report", str(run), "--out", str(tmp_path / "b.html"), "--cache", str(runs["cache"])]) == 0
    assert "no checkpoint" in (tmp_path / "b.html").read_text()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["{empty}", "--out", "{empty}/a.html"], "holds no configuration and no state"),
        (["{empty}/none", "--out", "{empty}/a.html"], "no such run directory"),
        (["{run}", "--out", "{empty}/a.pdf"], "must end in .html"),
        (["{run}", "--out", "{empty}/a.html", "--cases", "-1"], "--cases is -1"),
        (["{run}", "--out", "{empty}/a.html", "--cache", "{empty}/no.h5"], "does not exist"),
        (["{run}", "--out", "{empty}/a.html", "--cases", "0", "--nifti", "{empty}/maps"], "--cases 0 leaves nothing"),
        (["{run}", "--out", "{empty}/a.html", "--device", "gpu"], "--device is gpu, where torch cannot compute"),
    ],
)
def test_report__bad_arguments__refused_and_nothing_written(
    words: list[str], reason: str, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [word.format(empty=tmp_path, run=runs["pretrain"]) for word in words]
    assert main(["report", *filled]) == 1
    assert reason in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_report__nifti__maps_lie_on_the_scan(runs: dict[str, Path], tmp_path: Path) -> None:
    from agssd.data_modules.cache import VolumeCache

    out, maps = tmp_path / "a.html", tmp_path / "maps"
    assert main(["report", str(runs["pretrain"]), "--out", str(out), "--cases", "1", "--nifti", str(maps)]) == 0
    files = sorted(path.name for path in maps.iterdir())
    assert len(files) == 2 and files[0].endswith("_attention.nii.gz") and files[1].endswith("_pca.nii.gz")
    info = next(info for info in VolumeCache(runs["cache"]).cases if info.split == "val")
    for name, channels in zip(files, ((), (3,)), strict=True):
        image: Any = nib.load(maps / name)
        assert image.shape == (*info.source_shape, *channels)
        assert np.allclose(image.affine, info.source_affine, atol=1e-4)
    colours = np.asanyarray(image.dataobj)
    assert colours.min() >= 0 and colours.max() <= 1 and colours.std() > 0.05


def without(run: Path, copy: Path, cache: Path, gone: Path) -> Path:
    """Return a copy of a run whose configuration and test name a cache and checkpoints that are gone."""
    shutil.copytree(run, copy)
    for path in copy.glob("*.yaml"):
        path.write_text(path.read_text().replace(str(cache), str(gone)).replace(str(run), str(gone.parent)))
    return copy


@pytest.mark.parametrize("lacks", ["cache", "checkpoint", "whole checkpoint", "fitting cache"])
def test_report__nifti_that_cannot_be_made__page_and_an_error_that_says_why(
    lacks: str, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import h5py

    gone = tmp_path / "elsewhere" / f"{NAME}.h5"
    run = without(runs["pretrain"], tmp_path / NAME, runs["cache"], gone)
    page, maps, cache = tmp_path / "a.html", tmp_path / "maps", tmp_path / "c.h5"
    words = ["report", str(run), "--out", str(page), "--cases", "1", "--nifti", str(maps)]
    reason = "the cache that the run names does not lie where the report was made"
    if lacks != "cache":
        shutil.copy(runs["cache"], cache)
        words += ["--cache", str(cache)]
    if lacks == "checkpoint":
        shutil.rmtree(run / "checkpoints")
        reason = "the run has no checkpoint"
    if lacks == "whole checkpoint":
        (run / "checkpoints/last.ckpt").write_bytes(b"torn")
        reason = "last.ckpt: cannot be read as a checkpoint"
    if lacks == "fitting cache":
        with h5py.File(cache, "r+") as file:
            index = json.loads(bytes(file["index"][()]))
            for case in index["cases"]:
                case["spacing_mm"] = [9.0, 9.0, 9.0]
            del file["index"]
            file["index"] = np.frombuffer(json.dumps(index).encode(), np.uint8)
        reason = "the cache does not fit the encoder"
    assert main(words) == 1
    told = capsys.readouterr().err
    assert f"{page} is written, but nothing to --nifti {maps}: {reason}" in told
    assert f"Not shown: {reason}" in page.read_text() and NAME not in page.read_text() and not maps.exists()


def test_report__segmentation_that_cannot_be_loaded__says_why(runs: dict[str, Path], tmp_path: Path) -> None:
    run = without(runs["segmentation"], tmp_path / NAME, runs["cache"], tmp_path / "elsewhere" / "x.h5")
    page = tmp_path / "a.html"
    words = ["report", str(run), "--out", str(page), "--cases", "0", "--cache", str(runs["cache"])]
    content = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    torch.save(content | {"state_dict": content["state_dict"] | {"more": torch.ones(1)}}, run / "checkpoints/last.ckpt")
    assert main(words) == 0
    text = page.read_text()
    assert "Not shown: the checkpoint does not fit the segmentation" in text and "&quot;more&quot;" in text
    (run / "checkpoints/last.ckpt").write_bytes(b"torn")
    assert main(words) == 0
    text = page.read_text()
    assert "Not shown: last.ckpt cannot be read as a checkpoint" in text and NAME not in text


def test_report__failure_while_segmenting__is_no_fault_of_the_checkpoint(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from agssd.tasks.segmentation import SegmentationTask

    def exhausted(*_: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(SegmentationTask, "segment", exhausted)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        main(["report", str(runs["segmentation"]), "--out", str(tmp_path / "a.html"), "--cases", "0"])


def test_shown_error__no_part_of_a_path_with_blanks_in_it_stays() -> None:
    run = made_run({})
    said = shown_error(ValueError("cannot read /data/John Smith Miller/of May/ct.h5: it is torn"), run)
    assert said == f"cannot read {HIDDEN} it is torn"


def test_shown_error__paths_and_files_go_the_runs_own_names_stay() -> None:
    run = made_run({})
    said = shown_error(ValueError(f"x{os.sep}a{os.sep}last.ckpt: torn, see '/data/jane/b.h5' and jane.h5; 9 mm"), run)
    assert said == f"last.ckpt: torn, see {HIDDEN} 9 mm"


def test_write_nifti__a_token__peaks_at_the_middle_of_its_own_patch(tmp_path: Path) -> None:
    from agssd.commands.report.encoder_views import write_nifti
    from agssd.data_modules.cache import CaseInfo

    rng = np.random.default_rng(3)
    affine = np.array([[0, 0, 2.0, -30], [0, 1.5, 0, 12], [1.0, 0, 0, 7], [0, 0, 0, 1]])  # (d, h, w) to x, y, z
    flip = np.array([[0, 0, -1.0, 39], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]])  # (i, j, k) to (d, h, w)
    info = CaseInfo(
        **{field: None for field in CaseInfo.__dataclass_fields__}  # type: ignore[arg-type]
        | {"key": "k", "affine": affine.tolist(), "source_affine": (affine @ flip).tolist()}
        | {"shape": (40, 48, 40), "source_shape": (40, 48, 40)}
    )
    grid, start, size = (3, 4, 3), (4, 8, 0), (24, 32, 24)
    token = (1, 2, 1)
    attention = np.zeros((1, *grid), np.float32)
    attention[(0, *token)] = 1
    case = Encoded(
        info, start, np.zeros(size, np.float32), np.ones(size, bool), grid, np.ones(grid, bool),
        rng.normal(size=(36, 4)).astype(np.float32), attention, *(np.zeros((*grid, 3), np.float32),) * 2,
    )  # fmt: skip
    _, path = write_nifti(case, (8, 8, 8), tmp_path)
    image: Any = nib.load(path)
    values = np.asanyarray(image.dataobj)
    places = np.argwhere(values > 0.6 * values.max())
    world = np.c_[places, np.ones(len(places))] @ image.affine.T
    middle = affine @ [*(s + 8 * t + 3.5 for s, t in zip(start, token, strict=True)), 1]
    assert np.allclose(world.mean(0), middle, atol=0.6)


def test_shown_config__paths_and_names_go_choices_stay() -> None:
    config = {
        "trainer": {"precision": "bf16-mixed", "default_root_dir": "runs", "max_steps": 5},
        "model": {"class_path": "agssd.methods.dino.DINO", "init_args": {"encoder": "jane", "mask_score": "edge"}},
        "data": {"init_args": {"cache": ["jane.h5", "doe"], "weights": {"jane/x.h5": 1.0}, "modality": None}},
        "wandb": {"name": "jane", "entity": "doe", "notes": "a b", "mode": "offline"},
        "profiler": "a sentence about jane",
    }
    shown = shown_config(config)
    assert "jane" not in str(shown) and "doe" not in str(shown)
    assert shown["trainer"] == {"precision": "bf16-mixed", "default_root_dir": HIDDEN, "max_steps": 5}
    assert shown["model"]["class_path"] == "agssd.methods.dino.DINO"
    assert shown["model"]["init_args"]["mask_score"] == "edge" and shown["wandb"]["mode"] == "offline"


def test_shown_sentence__paths_go_metrics_stay() -> None:
    run = made_run({"train/loss": Curve([0], [1.0])})
    text = "look at `agssd replay /data/jane/x.pt`; train/loss rose, see C:\\jane."
    assert shown_sentence(text, run) == f"look at `agssd replay {HIDDEN} train/loss rose, see {HIDDEN}"


def test_group_charts__every_curve_in_one_chart() -> None:
    names = """train/loss train/loss_cls train/mask_ratio_high train/mask_ratio_low
        collapse/cls_cosine collapse/patch_cosine
        collapse/grad_norm_cls collapse/grad_norm_rec collapse/grad_norm_ratio collapse/overlap collapse/overlap_0_20
        collapse/overlap_above_095 probe/knn_seg_dice probe/knn_seg_dice_2 probe/knn_seg_dice_1 probe/knn_seg_dice_10
        val/dice val/dice_class1 val/dice_class2 val/loss data/source0_samples data/source1_samples schedule/lr lr-AdamW
        throughput/data_wait probe/seconds mine""".split()
    curves = {name: Curve([0, 1], [1.0, float(number)]) for number, name in enumerate(names)}
    groups = group_charts(made_run(curves), {})
    found = [curve for charts in groups.values() for chart in charts for _, curve in chart.series]
    assert sorted(map(id, found)) == sorted(map(id, curves.values()))
    by_title = {chart.title: [name for name, _ in chart.series] for charts in groups.values() for chart in charts}
    assert by_title["probe/knn_seg_dice"] == ["mean", "class 1", "class 2", "class 10"]
    assert by_title["collapse/cosine"] == ["cls", "patch"] and by_title["collapse/grad_norm"] == ["cls", "rec"]
    assert by_title["collapse/overlap"] == [""] and len(by_title["collapse/overlap_share"]) == 2
    assert [chart.title for chart in groups["Losses"]] == ["train/loss", "train/loss_cls"]
    assert by_title["train/loss"] == ["train", "val"] and by_title["val/dice"] == ["mean", "class 1", "class 2"]
    assert [chart.title for chart in groups["Speed and waiting"]] == ["throughput/data_wait", "probe/seconds"]
    assert [chart.title for chart in groups["Other"]] == ["mine"]


def test_thinned__long_curve__keeps_ends_peaks_and_order() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=50_000).tolist()
    values[31_234], values[777], values[40_000] = 50.0, -50.0, math.nan
    steps, kept = thinned(Curve(list(range(50_000)), values))
    assert len(steps) <= MAX_POINTS and steps == sorted(steps)
    assert (steps[0], steps[-1]) == (0, 49_999)
    finite = [value for value in kept if value is not None]
    assert max(finite) == 50 and min(finite) == -50
    assert thinned(Curve([3, 4], [1.0, math.nan])) == ([3, 4], [1.0, None])


def test_dashboard__limits_are_the_runs_own_and_both_sides_count() -> None:
    curves = {
        "collapse/cls_effective_rank": Curve([0, 1, 2], [1.5, 30.0, 8.0]),
        "collapse/cls_max_share": Curve([0, 1, 2], [0.6, 0.6, 0.7]),
        "collapse/patch_max_share": Curve([0, 1], [0.1, 0.65]),
    }
    config = {
        "collapse_monitor": {"max_share": 0.65, "soft_rank": 9.0},
        "model": {"init_args": {"num_prototypes": 512}},
    }
    run = made_run(curves, config)
    limits = limits_of(run)
    assert [limit.value for limit in limits["collapse/effective_rank"]] == [9.0, 2.0]  # one stated, one default
    assert limits["collapse/cross_entropy"][0].value == pytest.approx(math.log(512))
    rows = re.findall(r"<tr>.*?</tr>", status_table(group_charts(run, limits)["Collapse dashboard"]))[1:]
    cells = [re.findall(r">([^<]+)<", row) for row in rows]
    words = {name: (now, outside) for name, now, _, _, outside in cells}
    assert words == {
        "cls effective rank": ("outside", "2 of 3"),
        "cls max share": ("outside", "1 of 3"),
        "patch max share": ("kept", "0 of 2"),
    }


def test_components__of_known_directions__in_the_order_of_their_variance() -> None:
    rng = np.random.default_rng(1)
    grid = (6, 6, 6)
    directions = np.linalg.qr(rng.normal(size=(10, 10)))[0][:, :3]
    weights = rng.normal(size=(216, 3)) * (5, 3, 2)
    tokens = (weights @ directions.T + rng.normal(0, 0.01, (216, 10)) + 40).astype(np.float32)
    inside = rng.uniform(size=grid) < 0.8
    tokens[~inside.reshape(-1)] = 1e4  # outside the body: must not decide
    blank = np.zeros((*grid, 3), np.float32)
    case = Encoded(None, (0, 0, 0), np.zeros(1), np.zeros(1), grid, inside, tokens, None, blank, blank)  # type: ignore[arg-type]
    (colours,), shares = components([case])
    assert shares == sorted(shares, reverse=True) and sum(shares) > 0.99
    for axis in range(3):
        found = np.corrcoef(colours.reshape(-1, 3)[inside.reshape(-1), axis], weights[inside.reshape(-1), axis])[0, 1]
        assert abs(found) > 0.97
    assert colours.min() >= 0 and colours.max() <= 1


def test_chosen__few_cases__each_once() -> None:
    scores = [Score(str(number), [number / 10], number / 10) for number in range(5)]
    assert [(name, score.key) for name, score in chosen(scores)] == [("best", "4"), ("median", "2"), ("worst", "0")]
    assert [(name, score.key) for name, score in chosen(scores[:2])] == [("best", "1"), ("worst", "0")]
    assert [(name, score.key) for name, score in chosen(scores[:1])] == [("best", "0")]


def test_grouped__as_the_data_module_groups() -> None:
    label = np.arange(6).reshape(1, 2, 3)
    assert grouped(label, [[4], [1, 2]]).tolist() == [[[0, 2, 2], [0, 1, 0]]]
    assert grouped(label, None).tolist() == label.tolist()


def test_mosaic__taken_apart_again() -> None:
    import base64
    import io

    from PIL import Image

    volume = np.random.default_rng(0).integers(0, 255, (7, 5, 9), dtype=np.uint8)
    made = json.loads(json.dumps(mosaic(volume, lossless=True)))
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(made["src"].partition(",")[2]))))
    for index in range(7):
        y, x = index // made["columns"] * 5, index % made["columns"] * 9
        assert np.array_equal(pixels[y : y + 5, x : x + 9], volume[index])


def test_shrunk__means_and_middles() -> None:
    volume = np.arange(4 * 4 * 5, dtype=np.float32).reshape(4, 4, 5)
    assert shrunk(volume, 2).shape == (2, 2, 2)
    assert shrunk(volume, 2)[0, 0, 0] == volume[:2, :2, :2].mean()
    assert shrunk(volume, 2, average=False)[1, 1, 1] == volume[3, 3, 3]


def test_read_run__torn_last_lines__left_out(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {class_path: agssd.methods.dino.DINO}\n")
    (tmp_path / "metrics.csv").write_text("step,train/loss\n0,1.0\n1,inf\n2,0.")
    (tmp_path / "actions.jsonl").write_text('{"step": 1, "action": "alarm"}\n{"step": 2, "act')
    run = read_run(tmp_path)
    assert run.curves["train/loss"].steps == [0, 1] and math.isnan(run.curves["train/loss"].values[1])
    assert run.actions == [{"step": 1, "action": "alarm"}] and run.last_step == 2
