"""The command probes encoders by name and seed, compares them in pairs and writes every figure."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agssd.cli import main
from agssd.data_modules.pretrain import PretrainDataModule
from agssd.hub import export_backbone
from agssd.models.vit import ViT

CONF = Path(__file__).resolve().parents[2] / "conf"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the exports s0 and s1 of small encoders."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("exports")
    for seed in range(2):
        torch.manual_seed(seed)
        export_backbone(ViT(patch_size=8, embed_dim=24, depth=1, num_heads=2), folder / f"s{seed}")
    return folder


QUICK = ["--linear-steps", "10"]
ALL = ["--readout", "linear-seg", "knn-seg", "knn-cls", "linear-cls"]


def test_probe__two_seeds_and_random__table_pairs_and_json(
    tiny_cache: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "probe.json"
    code = main(["probe", str(tiny_cache), "--encoder", f"a={exported / 's0'}", "--encoder", f"a={exported / 's1'}",
                 "--random", "--folds", "2", "--out", str(out), *QUICK])  # fmt: skip
    assert code == 0
    report = json.loads(out.read_text())
    assert report["num_subjects"] == 5  # of the split train only
    a, random = (report["encoders"][name] for name in ("a", "random"))
    assert a["seeds"] == random["seeds"] == 2
    found = report["readouts"]["linear-seg"]
    table = np.array(found["score_by_seed_and_subject"]["a"])
    assert table.shape == (2, 5) and (table >= 0).all() and (table <= 1).all()
    assert found["score"]["a"]["mean"] == pytest.approx(table.mean())
    assert [row["linear_seg_dice"] for row in a["figures_by_seed"]] == pytest.approx(table.mean(1).tolist())
    (pair,) = found["differences"]
    expected = table.mean() - np.mean(found["score_by_seed_and_subject"]["random"])
    assert (pair["first"], pair["second"]) == ("a", "random") and pair["mean"] == pytest.approx(expected)
    assert pair["low"] <= pair["mean"] <= pair["high"]
    printed = capsys.readouterr().out
    assert "a - random" in printed and "5 subjects, 2 folds, all labelled" in printed
    assert a["held_out_seen"] == [None, None] and random["held_out_seen"] == []
    assert "a has seen unknown how many of the 5 held-out subjects" in printed


def test_probe__encoder_pretrained_on_held_out_subjects__counted(
    tiny_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = PretrainDataModule(str(tiny_cache), (16, 16, 16), 4, num_workers=0, num_folds=5, fold=0)
    data.setup("fit")
    vit = ViT(patch_size=8, embed_dim=24, depth=1, num_heads=2)
    export_backbone(vit, tmp_path / "e", contract=data.contract | {"seen": data.seen})
    out = tmp_path / "probe.json"
    arguments = ["--encoder", f"b={tmp_path / 'e'}", "--random", "--folds", "2", "--out", str(out), *QUICK]
    assert main(["probe", str(tiny_cache), *arguments]) == 0
    assert "b has seen 4 of the 5 held-out subjects in its own training\n" in capsys.readouterr().out
    found = json.loads(out.read_text())["encoders"]
    assert found["b"]["held_out_seen"] == [{"subjects": 4, "near_duplicates": 0}]


def fit(experiment: str, cache: Path, run: Path, *more: str) -> dict[str, float]:
    """Train two steps and return the figures of the probe at the second; the interval of probes ends elsewhere."""
    arguments = ["fit", "--config", str(CONF / f"experiment/{experiment}.yaml"), "--data.cache", str(cache)]
    arguments += ["--trainer.max_steps", "2", "--trainer.limit_val_batches", "0", "--data.num_workers", "0"]
    arguments += ["--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(run), "--data.global_batch_size=4"]
    arguments += ["--trainer.enable_progress_bar", "false"]
    assert main([*arguments, *more]) == 0
    with (run / "metrics.csv").open() as file:
        untrained, row = [row for row in csv.DictReader(file) if row.get("probe/seconds")]
    assert (float(untrained["probe/step"]), float(row["probe/step"])) == (0, 2)
    own = ("step", "seconds", "time_share", "held_out_seen", "held_out_subjects")
    found = {name.removeprefix("probe/"): float(v) for name, v in row.items() if name.startswith("probe/") and v}
    assert found["held_out_subjects"] > 1
    return {name: value for name, value in found.items() if name not in own}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experiment", "online", "offline"),
    [
        ("agssd_small", [], ["--on-val", "--precision", "bf16", *ALL]),
        ("small", ["--model", str(CONF / "method/simmim.yaml")], ["--on-val", "--precision", "bf16", *ALL]),
        (
            "agssd_small",
            ["--online_probe.num_folds", "2", "--trainer.precision", "32-true", "--online_probe.num_subjects", "2"]
            + ["--online_probe.readouts", "[linear-seg,knn-cls]", "--online_probe.overlap", "0.5"],
            ["--folds", "2", "--num-subjects", "2", "--readout", "linear-seg", "knn-cls", "--overlap", "0.5"],
        ),
    ],
    ids=["teacher-bf16", "no-teacher-bf16", "teacher-folds-fp32"],
)
def test_probe__of_a_checkpoint__gives_the_figures_of_the_probe_while_training(
    experiment: str,
    online: list[str],
    offline: list[str],
    tiny_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    torch.set_num_threads(1)
    window = ["--online_probe.window_vox", "[32,32,32]", "--online_probe.linear_steps", "10"]
    found = fit(experiment, tiny_cache, tmp_path / "run", *window, *online)
    out = tmp_path / "probe.json"
    overlap = [] if "--overlap" in offline else ["--overlap", "0"]
    best = tmp_path / "run/checkpoints/best.ckpt"  # the last ones as well, after two steps
    resumed = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["callbacks"]["BestCheckpoint"]
    assert float(resumed["best_model_score"]) == pytest.approx(found["linear_seg_dice"])  # saved knowing of it
    arguments = [
        "--encoder",
        str(tmp_path / "run"),
        "--encoder",
        str(best),
        "--window-vox",
        "32",
        *overlap,
        *QUICK,
        "--out",
        str(out),
    ]
    assert main(["probe", str(tiny_cache), *arguments, *offline]) == 0
    for encoder in json.loads(out.read_text())["encoders"].values():
        (offline_figures,) = encoder["figures_by_seed"]
        assert offline_figures == pytest.approx(found, rel=0, abs=0, nan_ok=True)  # AUROC of a single class is NaN
    assert sum(value == value for value in found.values()) >= 6


def test_fit__checkpoint_chosen_by_a_figure_that_is_not_measured__refused_before_anything_is_written(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    arguments = ["fit", "--config", str(CONF / "experiment/agssd_small.yaml"), "--data.cache", str(tiny_cache)]
    arguments += ["--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(tmp_path / "run")]
    arguments += ["--checkpoint.monitor", "probe/linear_seg_dice", "--checkpoint.every_n_train_steps", "1000"]
    assert main(arguments) == 2
    assert "set checkpoint.mode to max" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_probe__slices__beside_an_encoder(
    tiny_cache: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from agssd.models import slices

    class Means(torch.nn.Module):
        num_features = 3
        pretrained_cfg = {"input_size": (3, 32, 32)}

        def forward_features(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.avg_pool2d(x, 8)

        def forward_head(self, x: torch.Tensor, pre_logits: bool) -> torch.Tensor:
            return x.mean((2, 3))

    asked: list[Any] = []
    monkeypatch.setattr(slices, "load_slice_model", lambda *given: asked.append(given) or Means())
    monkeypatch.setattr(slices.SliceEncoder, "parameters", lambda self: iter([torch.zeros(1)]))
    out = tmp_path / "probe.json"
    arguments = ["--encoder", f"a={exported / 's0'}", "--slices", "some_vit", "--weights", "file.pth", "--folds", "2"]
    readouts = ["--readout", "linear-seg", "linear-cls", "--slice-axis", "coronal", "--out", str(out)]
    assert main(["probe", str(tiny_cache), *arguments, *readouts, *QUICK]) == 0
    assert asked == [("some_vit", "file.pth")]
    report = json.loads(out.read_text())
    assert set(report["encoders"]) == {"a", "slices-some_vit"}
    assert [row["second"] for row in report["readouts"]["linear-cls"]["differences"]] == ["slices-some_vit"]
    assert "slices-some_vit has seen unknown how many" in capsys.readouterr().out


def test_probe__random_of_one_seed__depends_on_the_seed_alone(exported: Path) -> None:
    from agssd.tasks.encoders import load_encoder, random_like

    encoder = load_encoder(exported / "s0")
    state = torch.get_rng_state()
    one, same, other = random_like(encoder, 0), random_like(encoder, 0), random_like(encoder, 1)
    assert torch.equal(state, torch.get_rng_state())
    image = torch.randn(1, 1, 16, 16, 16)
    assert torch.equal(one(image).tokens, same(image).tokens)
    assert not torch.allclose(one(image).tokens, other(image).tokens, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "nothing to probe"),
        (["--random"], "--random needs a PATH"),
        (["--encoder", "missing"], "missing"),
        (["--encoder", "EXPORT", "--num-classes", "2"], "needs --num-classes 3"),
        (["--encoder", "EXPORT", "--folds", "9"], "num_folds is 9 for 5 subjects"),
        (["--encoder", "EXPORT", "--window-vox", "12"], "multiple of the encoder's patch"),
        (["--encoder", "EXPORT", "--num-subjects", "9"], "num_subjects is 9"),
        (["--slices", "vit_tiny_patch16_224"], "needs --weights PATH"),
    ],
)
def test_probe__impossible_request__one_line_and_code_1(
    arguments: list[str], reason: str, tiny_cache: Path, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(exported / "s0") if argument == "EXPORT" else argument for argument in arguments]
    assert main(["probe", str(tiny_cache), *given]) == 1
    error = capsys.readouterr().err
    assert reason in error and error.startswith("error: ") and error.count("\n") == 1


def test_probe__other_spacing_than_the_encoder__refused_with_the_remedy(
    tmp_path: Path, tiny_cache: Path, make_cache: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    contract = {"spacing_mm": [2.0, 2.0, 2.0], "orientation": "SAR", "modality": "ct", "channels": 1}
    export_backbone(ViT(patch_size=8, embed_dim=12, depth=1, num_heads=2), tmp_path / "e", contract=contract)
    assert main(["probe", str(tiny_cache), "--encoder", str(tmp_path / "e"), "--folds", "2"]) == 1
    error = capsys.readouterr().err
    assert "spacing 1x1x1 mm instead of 2x2x2 mm" in error and "--spacing-mm 2 2 2" in error
    assert "modality mri instead of ct" in error and "--ignore-contract" in error
