"""A bench whose rows are made up: methods that differ by known gains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from agssd.commands.bench.cells import Cell, list_cells
from agssd.commands.bench.kept import keep
from agssd.commands.bench.settings import Bench, Method, Readout

SUBJECTS = [f"s{number:02d}" for number in range(20)]


def bench(**given: Any) -> Bench:
    """Return a small bench of scratch, a convolutional network and two pretrained methods."""
    settings: dict[str, Any] = {
        "methods": {
            "scratch": Method(),
            "unet": Method(fit={"full": ["--config", "/data/somebody/unet.yaml"]}),
            "ours": Method(["--config", "/data/somebody/a.yaml"]),
            "rival": Method(["--config", "b.yaml"], steps=7),
        },
        "readouts": {
            "full": Readout(["--config", "/data/somebody/f.yaml"], [10, 30]),
            "linear": Readout(["--config", "l.yaml"], [10]),
        },
        "labels": [2, "25%", "100%"],
        "pretrain_steps": 5,
        "seeds": 3,
        "draws": 5,
    }
    return Bench(**settings | given)


def many_methods(count: int) -> dict[str, Method]:
    """Return so many methods, the first of them without pretraining."""
    return {"scratch": Method()} | {f"m{number}": Method(["--config", "a.yaml"]) for number in range(1, count)}


def made_rows(cells: list[Cell], gain: dict[str, float], seed: int = 0) -> list[dict[str, Any]]:
    """Return rows in which methods differ by ``gain`` beside effects of subjects, draws and seeds that they share."""
    rng = np.random.default_rng(seed)
    of_subject, of_draw = rng.normal(0.7, 0.1, len(SUBJECTS)), rng.normal(0, 0.03, 5)
    rows = []
    for cell in cells:
        values = of_subject + of_draw[cell.draw] + gain.get(cell.method, 0.0) + rng.normal(0, 0.01, len(SUBJECTS))
        found = dict(zip(SUBJECTS, values.tolist(), strict=True))
        row = {"subjects": found, "value": float(values.mean()), "bench": "b", "commit": "c", "figure": "dice"}
        row |= {"pretraining_steps": 0 if cell.pretraining is None else cell.pretraining.steps}
        row |= {"pretraining_fold": None if cell.pretraining is None else cell.pretraining.fold}
        row |= {"pretraining_seconds": 0.0 if cell.pretraining is None else 400.0}
        row |= {
            "pretraining_commit": None if cell.pretraining is None else "c0",
            "time": "2026-01-31T12:00:00Z",
            "machine": "a processor",
            "mark": cell.mark,
        }
        names = ("method", "readout", "steps", "labels", "draw", "seed", "fold")
        rows.append(row | {name: getattr(cell, name) for name in names})
    return rows


def write_bench(
    out: Path, gain: dict[str, float], leave_out: int = 0, classes: dict[str, float] | None = None, **given: Any
) -> None:
    """Write the directory of a bench, with settings ``given``, in which the last ``leave_out`` cells are not done.

    Args:
        out: is made.
        gain: by method.
        leave_out: how many cells.
        classes: figures by class of every run; None as rows had it before there were any.
        given: settings.
    """
    settings = bench(**given)
    cells = list_cells(settings, "", out)
    out.mkdir()
    keep(settings, [("cases", "20 of 20 subjects"), ("modality", "MRI")], cells, out)
    for cell, row in list(zip(cells, made_rows(cells, gain), strict=True))[: len(cells) - leave_out]:
        cell.folder.mkdir(parents=True)
        (cell.folder / "row.json").write_text(json.dumps(row | {"seconds": 60.0, "classes": classes}))
        if cell.pretraining is not None:
            cell.pretraining.folder.mkdir(parents=True, exist_ok=True)
            (cell.pretraining.folder / "row.json").write_text(
                json.dumps(
                    {"seconds": 400.0, "steps": cell.pretraining.steps, "commit": "c0", "mark": cell.pretraining.mark}
                )
            )


def write_small_bench(path: Path) -> Path:
    """Write the YAML of a real bench of seconds to ``path`` and return it: two methods, one at equal time, by k-NN."""
    conf = Path(__file__).resolve().parents[2] / "conf"
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
    path.write_text(yaml.safe_dump(settings))
    return path
