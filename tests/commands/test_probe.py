"""The command probes encoders by name and seed, compares them in pairs and writes every figure."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from agssd.cli import main
from agssd.data_modules.pretrain import PretrainDataModule
from agssd.hub import export_backbone
from agssd.models.vit import ViT


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the exports s0 and s1 of small encoders."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("exports")
    for seed in range(2):
        torch.manual_seed(seed)
        export_backbone(ViT(patch_size=8, embed_dim=24, depth=1, num_heads=2), folder / f"s{seed}")
    return folder


@pytest.fixture(autouse=True)
def _short_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    from agssd.evaluation import segmentation_probe

    monkeypatch.setattr(segmentation_probe.fit_readout, "__defaults__", ((0.0,), 10, 0))


def test_probe__two_seeds_and_random__table_pairs_and_json(
    tiny_cache: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "probe.json"
    code = main(["probe", str(tiny_cache), "--encoder", f"a={exported / 's0'}", "--encoder", f"a={exported / 's1'}",
                 "--random", "--folds", "2", "--out", str(out)])  # fmt: skip
    assert code == 0
    report = json.loads(out.read_text())
    assert report["num_subjects"] == 5  # of the split train only
    a, random = (report["encoders"][name] for name in ("a", "random"))
    assert a["seeds"] == random["seeds"] == 2
    table = np.array(a["dice_by_seed_and_subject"])
    assert table.shape == (2, 5) and (table >= 0).all() and (table <= 1).all()
    assert a["dice"]["mean"] == pytest.approx(table.mean())
    (pair,) = report["differences"]
    expected = table.mean() - np.mean(random["dice_by_seed_and_subject"])
    assert (pair["first"], pair["second"]) == ("a", "random") and pair["mean"] == pytest.approx(expected)
    assert pair["low"] <= pair["mean"] <= pair["high"]
    printed = capsys.readouterr().out
    assert "a - random" in printed and "5 subjects, 2 folds" in printed
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
    arguments = ["--encoder", f"b={tmp_path / 'e'}", "--random", "--folds", "2", "--out", str(out)]
    assert main(["probe", str(tiny_cache), *arguments]) == 0
    assert "b has seen 4 of the 5 held-out subjects in its own training\n" in capsys.readouterr().out
    found = json.loads(out.read_text())["encoders"]
    assert found["b"]["held_out_seen"] == [{"subjects": 4, "near_duplicates": 0}]


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
