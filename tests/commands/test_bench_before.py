"""``agssd bench``: what cannot work is refused before anything is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from agssd.cli import main
from agssd.commands.bench.before import shares_in_subjects
from agssd.commands.bench.settings import Bench, Method, Readout
from agssd.data_modules.agreement import cache_contract
from agssd.data_modules.cache import VolumeCache
from agssd.hub import export_backbone

CONF = Path(__file__).resolve().parents[2] / "conf"
SMALL = ["--data.num_workers", "0", "--data.global_batch_size", "2"]
FIT = {"full": {"fit": ["--config", str(CONF / "experiment" / "segmentation_small.yaml"), *SMALL], "steps": [2]}}
KNN = {
    "readouts": {"knn": {"probe": "knn-seg", "window_vox": [32, 32, 32]}},
    "backbone": str(CONF / "backbone" / "vit_tiny_p8.yaml"),
}


def write(path: Path, task: list[str], pretraining: list[str], **given: Any) -> list[str]:
    """Write a small bench and return its command without the cache."""
    model = ["--model", str(CONF / "method" / "simmim.yaml")]
    settings: dict[str, Any] = {
        "methods": {
            "scratch": {},
            "simmim": {"pretrain": ["--config", str(CONF / "experiment" / "small.yaml"), *model, *SMALL, *pretraining]},
        },
        "readouts": {
            "full": {
                "fit": ["--config", str(CONF / "experiment" / "segmentation_small.yaml"), *SMALL, *task],
                "steps": [2],
            }
        },
        "labels": [1],
        "pretrain_steps": 2,
        "num_folds": 2,
    }
    path.write_text(yaml.safe_dump(settings | given))
    return ["bench", "--config", str(path), "--out", str(path.parent / "out")]


@pytest.mark.parametrize(
    ("task", "pretraining", "given", "said"),
    [
        ([], [], {"labels": [1, 50]}, "labels of full are 50 subjects, but "),
        (["--model.decodr", "unetr"], [], {}, "settings of full for every method, labels 1: "),
        (["--model.crop_vox", "[30,30,30]"], [], {}, "settings of full for every method, labels 1: "),
        ([], ["--model.mask_ratio", "[0.9,0.1]"], {}, "settings of the pretraining simmim: mask_ratio is (0.9, 0.1)"),
        ([], [], {"num_classes": 2, "labels": [1, 2]}, "labels 1, settings of full for every method, labels 2: case "),
        (
            [],
            ["--backbone.depth", "2"],
            {},
            "simmim pretrains an encoder that is not the one of full: depth 2 instead of 4",
        ),
        (
            [],
            ["--backbone", str(CONF / "backbone" / "swin_unetr_tiny.yaml")],
            KNN,
            "simmim pretrains an encoder that is not the one of knn: agssd.models.swin_unetr.SwinUNETREncoder instead",
        ),
        ([], [], KNN | {"num_classes": 2}, "num_classes is 2, but the labels of "),
    ],
    ids=["amount", "typo", "sizes", "pretraining", "classes", "depth", "encoder of a probe", "classes of a probe"],
)
def test_bench__what_cannot_work_is_refused_before_anything_is_trained(
    task: list[str],
    pretraining: list[str],
    given: dict[str, Any],
    said: str,
    tiny_cache: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    command = write(tmp_path / "bench.yaml", task, pretraining, **given)
    assert main([*command, "--cache", str(tiny_cache)]) == 2
    assert said in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_bench__pretraining_on_whom_it_measures_or_on_other_grids_is_refused(
    make_cache: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = make_cache(tmp_path / "asked.h5", splits=["train"] * 6 + ["test"] * 2)
    everyone = make_cache(tmp_path / "everyone.h5", splits=["train"] * 8)
    command = [*write(tmp_path / "bench.yaml", [], [], num_folds=None), "--cache", str(asked)]
    assert main([*command, "--pretrain-cache", str(everyone)]) == 2
    said = capfd.readouterr().err
    assert f"an encoder of --pretrain-cache {everyone} has been trained on" in said and "2 of 2 subjects" in said
    coarse = make_cache(tmp_path / "coarse.h5", spacing_mm=(3.0, 1.0, 1.0), seed=1)
    assert main([*command, "--pretrain-cache", str(coarse)]) == 2
    assert "spacing 1x1x1 mm instead of 3x1x1 mm" in capfd.readouterr().err
    assert main([*command, "--pretrain-cache", str(tmp_path / "gone.h5")]) == 2
    assert f"no cache {tmp_path / 'gone.h5'}, which --pretrain-cache names" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*command, "--pretrain-cache", str(asked), "--dry-run"]) == 0


def test_bench__pretraining_on_cases_whose_subjects_cannot_be_compared_is_refused_but_knowingly(
    make_cache: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = make_cache(tmp_path / "asked.h5", splits=["train"] * 6 + ["test"] * 2)
    other = make_cache(tmp_path / "other.h5", seed=1, salt="other")
    words = ["--cache", str(asked), "--pretrain-cache", str(other), "--methods", "scratch"]
    assert main([*write(tmp_path / "bench.yaml", [], [], num_folds=None), *words]) == 2
    said = capfd.readouterr().err
    assert f"{asked} and --pretrain-cache {other} were prepared with different salts" in said and "leakage" in said
    known = write(tmp_path / "bench.yaml", ["--nonsense"], [], num_folds=None, fit_common=["--data.leakage", "warn"])
    assert main([*known, *words]) == 2
    said = capfd.readouterr().err
    assert "different salts, so" not in said and "nonsense" in said, "what comes next"


def test_bench__probes_beside_labels_that_fit_groups_are_refused(
    tiny_cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = write(tmp_path / "bench.yaml", [], [], **KNN, fit_common=["--data.label_groups", "[[1,2]]"])
    assert main([*command, "--cache", str(tiny_cache)]) == 2
    assert "readouts.knn is a probe, which takes labels as they are stored" in capfd.readouterr().err


@pytest.mark.parametrize("labels", [[1], ["10%", "100%"]], ids=str)
def test_bench__amount_that_cannot_hold_every_class_is_refused_for_probes_too(
    labels: list[Any], make_cache: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cache = make_cache(tmp_path / "c.h5", shape=(18, 18, 18), splits=["train"] * 6 + ["test"] * 2)
    settings = {
        "methods": {"scratch": {}},
        "readouts": {"knn": {"probe": "knn-cls", "window_vox": [16, 16, 16]}},
        "figure": "accuracy",
        "backbone": str(CONF / "backbone" / "vit_tiny_p8.yaml"),
        "labels": labels,
        "pretrain_steps": 1,
    }
    path = tmp_path / "bench.yaml"
    path.write_text(yaml.safe_dump(settings))
    assert main(["bench", "--config", str(path), "--cache", str(cache), "--out", str(tmp_path / "out")]) == 2
    said = capfd.readouterr().err
    assert f"labels of knn are {labels[0]}, 1 of 6 subjects of {cache}, too few to hold the class '" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"readouts": {"knn": {"probe": "knn-seg", "window_vox": [30, 32, 32]}}},
            "input of (30, 32, 32) voxels",
        ),
        ({"backbone": str(CONF / "backbone" / "gone.yaml")}, "settings of knn for every method, "),
        ({"channels": 2}, "has 1 channel(s), "),
        ({"spacing_mm": (3.0, 1.0, 1.0)}, "spacing 1x1x1 mm instead of 3x1x1 mm"),
        ({"readouts": FIT, "depth": 3}, "settings of full for mae, seed 0, fold 0, labels 1"),
        ({"depth": 3}, "whose random weights it is compared with: depth 3 instead of 4"),
    ],
    ids=["window", "backbone", "channels", "preparation", "architecture", "architecture of a probe"],
)
def test_bench__probes_and_encoders_from_elsewhere_that_cannot_serve_are_refused_before_anything_is_trained(
    given: dict[str, Any], said: str, tiny_cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = yaml.safe_load((CONF / "backbone" / "vit_tiny_p8.yaml").read_text())
    own = {"in_channels": given.pop("channels", 1), "depth": given.pop("depth", config["init_args"]["depth"])}
    module, _, name = config["class_path"].rpartition(".")
    made = getattr(import_module(module), name)(**config["init_args"] | own)
    spacing = given.pop("spacing_mm", (1.0, 1.0, 1.0))
    contract = cache_contract([replace(case, spacing_mm=spacing) for case in VolumeCache(tiny_cache).cases])
    made.contract = contract | {"channels": own["in_channels"]}
    export_backbone(made, tmp_path / "export")
    methods = {"scratch": {}, "mae": {"encoders": [str(tmp_path / "export")]}}
    probes = {"knn": {"probe": "knn-seg", "window_vox": [32, 32, 32]}}
    backbone = str(CONF / "backbone" / "vit_tiny_p8.yaml")
    settings = {"methods": methods, "readouts": probes, "seeds": 1, "draws": 2, "backbone": backbone} | given
    command = write(tmp_path / "bench.yaml", [], [], **settings)
    assert main([*command, "--cache", str(tiny_cache)]) == 2
    assert said in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_bench__one_figure_alone_has_no_interval_and_is_refused(
    make_cache: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cache = make_cache(tmp_path / "c.h5", splits=["train"] * 7 + ["test"])
    command = write(tmp_path / "bench.yaml", [], [], num_folds=None, seeds=1, labels=[2, "100%"])
    assert main([*command, "--cache", str(cache)]) == 2
    said = capfd.readouterr().err
    assert "full with labels 100% is one figure alone, of one seed, one draw and one measured subject" in said


def test_shares_in_subjects__are_those_that_every_draw_has(make_cache: Callable[..., Path], tmp_path: Path) -> None:
    cache = VolumeCache(make_cache(tmp_path / "c.h5", splits=["train"] * 7 + ["test"] * 2))
    readouts = {
        "linear": Readout(probe="linear-seg", window_vox=[16] * 3),
        "knn": Readout(probe="knn-seg", window_vox=[16] * 3, labels=["5%", 2]),
    }
    given: dict[str, Any] = {
        "methods": {"scratch": Method()},
        "readouts": readouts,
        "pretrain_steps": 1,
        "backbone": "a.yaml",
    }
    settings = Bench(**given, labels=[1, "30%", "100%"])
    assert shares_in_subjects(settings, cache) == [("labelled subjects", "30%: 2, 100%: 7, 5%: 1")]
    folds = Bench(**given, labels=["50%", "100%"], num_folds=2)
    assert shares_in_subjects(folds, cache) == [("labelled subjects", "50%: 2, 100%: 3 to 4, 5%: 1")]
    counts = Bench(**given | {"readouts": {"linear": readouts["linear"]}}, labels=[1, 2])
    assert shares_in_subjects(counts, cache) == []
