"""``agssd export`` finds the newest checkpoint of a run and says what it wrote."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from agssd.commands import export
from agssd.hub import load_backbone
from agssd.models.vit import ViT


def save_checkpoint(path: Path, step: int, age_s: int = 0, contract: dict[str, Any] | None = None) -> Path:
    torch.manual_seed(step)
    model = ViT(patch_size=4, embed_dim=12, num_heads=2, depth=1)
    state = {f"teacher.backbone.{n}": v for n, v in model.state_dict().items()}
    about = {"method": "agssd.methods.agssd.AGSSD", "backbone": model.config, "state_prefix": "teacher.backbone."}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": state, "global_step": step, "agssd": about | {"contract": contract}}, path)
    os.utime(path, (1_700_000_000 - age_s,) * 2)
    return path


def call(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    export.add_arguments(parser)
    return export.run(parser.parse_args(list(argv)))


def test_find_checkpoint__last_then_highest_step_then_newest(tmp_path: Path) -> None:
    run = tmp_path / "run"
    old = save_checkpoint(run / "v0" / "epoch=0-step=9.ckpt", 9, age_s=5)
    high = save_checkpoint(run / "v0" / "epoch=1-step=20.ckpt", 20, age_s=9)
    assert export.find_checkpoint(run) == high and export.find_checkpoint(old) == old
    save_checkpoint(run / "v0" / "last.ckpt", 20, age_s=100)
    newest = save_checkpoint(run / "v1" / "checkpoints" / "last-v1.ckpt", 30, age_s=50)
    assert export.find_checkpoint(run) == newest
    plain = tmp_path / "plain"
    save_checkpoint(plain / "a.ckpt", 1, age_s=9)
    later = save_checkpoint(plain / "b.ckpt", 2, age_s=1)
    assert export.find_checkpoint(plain) == later
    ours = tmp_path / "ours"
    furthest = save_checkpoint(ours / "step00001000.ckpt", 1000, age_s=9)
    save_checkpoint(ours / "step00000500.ckpt", 500, age_s=1)
    assert export.find_checkpoint(ours) == furthest


def test_run__writes_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_checkpoint(tmp_path / "run" / "last.ckpt", 40, contract={"spacing_mm": [1.5, 1.5, 1.5], "channels": 1})
    assert call(str(tmp_path / "run"), "--out", str(tmp_path / "out")) == 0
    printed = capsys.readouterr().out
    assert "trained on  unknown: no record" in printed
    assert "step 40" in printed and "[1.5, 1.5, 1.5]" in printed and "orientation unknown" in printed
    assert str(tmp_path / "out" / "backbone.safetensors") in printed
    assert (load_backbone(tmp_path / "out").contract or {})["step"] == 40


def test_run__record_of_the_training_cases_goes_along_unless_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = {"num_cases": 3, "num_subjects": 2, "salts": ["s"], "subjects": "AAECAwQFBgc=", "hashes": ""}
    save_checkpoint(tmp_path / "run" / "last.ckpt", 40, contract={"channels": 1, "seen": seen})
    assert call(str(tmp_path / "run"), "--out", str(tmp_path / "out")) == 0
    assert "trained on  3 cases of 2 subjects" in capsys.readouterr().out
    assert (load_backbone(tmp_path / "out").contract or {})["seen"] == seen
    assert call(str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--without-record") == 0
    assert "trained on  unknown" in capsys.readouterr().out
    assert "seen" not in (load_backbone(tmp_path / "out").contract or {})
    assert seen["subjects"].encode() not in (tmp_path / "out" / "backbone.safetensors").read_bytes()


def test_run__errors_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, word in ((tmp_path / "gone", "no such run"), (tmp_path, "no checkpoint")):
        assert call(str(path), "--out", str(tmp_path / "out")) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and str(path) in error and word in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_module__light_to_import() -> None:
    code = "import sys, agssd.commands.export; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
