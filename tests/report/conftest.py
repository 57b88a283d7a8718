"""Runs to report on: a pretraining and a segmentation of two steps, with more made up, and names planted everywhere."""

from __future__ import annotations

import csv
import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from agssd.cli import main

CONF = Path(__file__).resolve().parents[2] / "conf"
NAME = "DOEJANE"  # of a patient, in every path and in the cache
STEPS = 1000


def plant(cache: Path) -> None:
    """Name one case of every split of a cache by a patient."""
    with h5py.File(cache, "r+") as file:
        index = json.loads(bytes(file["index"][()]))
        for number, row in enumerate((0, 5, 6)):
            case = index["cases"][row]
            new = f"{NAME}-{number}"
            file.move(f"cases/{case['key']}", f"cases/{new}")
            case["key"] = new
        index["class_names"] = [f"{NAME} {name}" for name in index["class_names"]]
        text = json.dumps(index).encode()
        del file["index"]
        file["index"] = np.frombuffer(text, np.uint8)


def lengthen(run: Path) -> None:
    """Make up the rest of a pretraining run: 1000 steps, views, alarms and a rollback."""
    path = run / "metrics.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = list(rows[0])
    figures = ("entropy_batch", "effective_rank", "information", "max_share", "cross_entropy", "feature_std", "cosine")
    more = [f"collapse/{term}_{figure}" for term in ("cls", "patch") for figure in figures] + ["collapse/alarms"]
    more += ["throughput/s_per_step", "throughput/data_wait", "throughput/samples_per_s", "throughput/peak_memory_gib"]
    rng = np.random.default_rng(0)
    for step in range(int(rows[-1]["step"]) + 1, STEPS):
        row = {"step": str(step), "epoch": "0"}
        for name in names:
            if name.startswith(("train/", "schedule/")):
                row[name] = f"{3 * math.exp(-step / 300) + rng.normal(0, 0.1):.10f}"
        if step % 50 == 49:
            row |= {name: f"{rng.uniform(0.1, 0.9):.8f}" for name in more}
            row["probe/linear_seg_dice"] = f"{0.4 + step / 5000:.4f}"
        rows.append(row)
    rows[500]["train/loss"] = "nan"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys([*names, *more, "probe/linear_seg_dice"])))
        writer.writeheader()
        writer.writerows(rows)
    for number in range(20):
        pixels = rng.integers(0, 255, (12, 26, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).resize((650, 310))
        picture.save(run / "panels" / f"step_{50 * (number + 1):06d}.png", compress_level=1)
    actions = [
        {"step": 350, "action": "alarm", "alarm": "cls_low_rank", "hard": False, "sentence": "rank 7.7 (limit 10)"},
        {"step": 400, "action": "alarm", "alarm": "cls_peaked", "hard": True, "sentence": "peaked <b>& lost"},
        {
            "step": 400,
            "action": "rollback",
            "from_step": 400,
            "to_step": 300,
            "alarms": ["cls_peaked"],
            "lowered": "lr",
        },
        {"step": 700, "action": "stop", "reason": f"look at `agssd replay /data/{NAME}/captures/step7.pt`; lower lr"},
    ]
    (run / "actions.jsonl").write_text("".join(json.dumps(action) + "\n" for action in actions))


def make_runs(make_cache: Callable[..., Path], folder: Path) -> None:
    """Train both, two steps each, and write their pages."""
    torch.set_num_threads(1)
    cache = make_cache(folder / f"{NAME}.h5")
    plant(cache)
    common = ["--data.cache", str(cache), "--trainer.max_steps", "2", "--trainer.accelerator", "cpu"]
    common += ["--data.num_workers", "0", "--data.global_batch_size=4", "--trainer.enable_progress_bar", "false"]
    common += ["--wandb.mode", "disabled", "--wandb.name", NAME, "--backbone", str(CONF / "backbone/vit_tiny_p8.yaml")]
    words = ["--config", str(CONF / "experiment/agssd_small.yaml"), "--online_probe.at_start", "false"]
    words += ["--online_probe.linear_steps", "5", "--trainer.limit_val_batches", "0", *common]
    assert main(["fit", *words, "--trainer.default_root_dir", str(folder / "pretrain")]) == 0
    lengthen(folder / "pretrain")
    words = ["--config", str(CONF / "experiment/segmentation.yaml"), "--model.num_classes", "3", *common]
    words += ["--model.crop_vox", "[32,32,32]", "--model.feature_size", "4", "--model.sw_overlap", "0"]
    words += ["--trainer.log_every_n_steps", "1"]
    words += ["--trainer.default_root_dir", str(folder / "segmentation")]
    assert main(["fit", *words]) == 0
    assert main(["test", *words, "--ckpt_path", str(folder / "segmentation/checkpoints/last.ckpt")]) == 0
    for name in ("pretrain", "segmentation"):
        assert main(["report", str(folder / name), "--out", str(folder / f"{name}.html"), "--cases", "2"]) == 0


@pytest.fixture(scope="session")
def runs(make_cache: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the folders "pretrain" and "segmentation" of runs, and "cache"; made once for all workers."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    folder = shared / NAME
    with (shared / "report.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "segmentation.html").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make_runs(make_cache, folder)
    return {name: folder / name for name in ("pretrain", "segmentation")} | {"cache": folder / f"{NAME}.h5"}


@pytest.fixture(scope="session")
def pages(runs: dict[str, Path]) -> dict[str, Path]:
    """Return the pages of both runs."""
    return {name: runs[name].with_suffix(".html") for name in ("pretrain", "segmentation")}
