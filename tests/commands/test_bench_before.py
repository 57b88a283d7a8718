"""``agssd bench``: what cannot work is refused before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from agssd.cli import main

CONF = Path(__file__).resolve().parents[2] / "conf"
SMALL = ["--data.num_workers", "0", "--data.global_batch_size", "2"]


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
        ([], ["--model.mask_ratio", "[0.9,0.1]"], {}, "settings of the pretraining simmim: "),
        ([], [], {"num_classes": 2}, "settings of full for every method, labels 1: "),
    ],
    ids=["amount", "typo", "sizes", "pretraining", "classes"],
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
