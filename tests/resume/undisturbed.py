"""A small run of AG-SSD through the command line, and what two of them must have in common."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

STEPS, SAVES = 7, 2  # optimiser steps of a run, and from one checkpoint to the next
# What is measured and not computed, and what Lightning counts.
_TIMES = ("throughput/", "probe/seconds", "probe/time_share")


def write_config(path: Path, cache: Path) -> Path:
    """Write the configuration of the run and return ``path``."""
    settings: dict[str, Any] = {
        "trainer": {
            "max_steps": STEPS, "accelerator": "cpu", "precision": "32-true", "gradient_clip_val": 3.0,
            "num_sanity_val_steps": 0, "check_val_every_n_epoch": None, "log_every_n_steps": 1,
            "enable_progress_bar": False, "enable_model_summary": False, "use_distributed_sampler": False,
        },
        "model": {
            "class_path": "agssd.methods.agssd.AGSSD",
            "init_args": {
                "num_prototypes": 32, "head_hidden": 32, "head_bottleneck": 16, "fuser_heads": 2, "fuser_depth": 1,
                "mask_block": 1, "lr": 1e-3,
                # whole views, where fewer gradients are 0 but for rounding, which Adam makes steps of
                "student_views": "both", "masked_views": 1, "mask_ratio": [0.3, 0.7], "distilled_share": 1.0,
                "weight_cls": 1.0, "weight_patch": 1.0, "fused_share_cls": 0.25,
                "seed": 1,  # with 0 a voxel is predicted to within rounding, and the sign of its L1 is anyone's
            },
        },
        "backbone": {
            "class_path": "agssd.models.vit.ViT",
            "init_args": {"in_channels": 1, "patch_size": 8, "depth": 1, "embed_dim": 24, "num_heads": 2},
        },
        "views": {
            "class_path": "agssd.transforms.crops.OverlapCrops",
            "init_args": {
                "size_vox": [16, 16, 16], "scale": [0.6, 1.0], "num_local": 1, "local_size_vox": [16, 16, 16],
            },
        },
        "data": {
            "class_path": "agssd.data_modules.pretrain.PretrainDataModule",
            "init_args": {"cache": str(cache), "parent_vox": [24, 24, 24], "global_batch_size": 8, "num_workers": 0},
        },
        "checkpoint": {"every_n_train_steps": SAVES},
        "collapse_monitor": {"every_n_steps": 3, "min_samples": 24},  # a window that no checkpoint finds empty
        "data_stream": {"every_n_steps": 1},
        "wandb": {"mode": "disabled"},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(settings))
    return path


class Stage:
    """The process of ``stage.py``, which runs and kills."""

    def __init__(self, config: Path) -> None:
        self.config = config
        self.seconds = 0.0  # from the first step of the last run to its end
        script = Path(__file__).with_name("stage.py")
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        self._process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def fit(
        self, run: Path, ranks: int, accumulate: int, *more: str, kill: list[Any] | None = None
    ) -> tuple[list[int], str]:
        """Return the exit codes of the ranks and what rank 0 said."""
        arguments = ["fit", "--config", str(self.config), "--trainer.default_root_dir", str(run)]
        arguments += ["--trainer.devices", str(ranks), "--trainer.strategy", "ddp" if ranks > 1 else "auto"]
        arguments += ["--trainer.accumulate_grad_batches", str(accumulate)]
        arguments += ["--trainer.val_check_interval", str(2 * SAVES * accumulate), *more]
        run.mkdir(exist_ok=True)
        log = run / "log"
        for old in run.glob("log.*"):
            old.unlink()
        job = {"arguments": arguments, "ranks": ranks, "kill": kill, "log": str(log)}
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the stage has ended"
        self.seconds = json.loads(answer)["seconds"]
        return json.loads(answer)["codes"], Path(f"{log}.0").read_text()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


def states(run: Path) -> dict[str, Tensor]:
    """Return every weight, buffer and optimiser state of the last checkpoint by name."""
    saved = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == STEPS
    found: dict[str, Tensor] = dict(saved["state_dict"])
    for number, optimiser in enumerate(saved["optimizer_states"]):
        for parameter, state in optimiser["state"].items():
            found |= {f"{number} {parameter} {name}": value for name, value in state.items()}
    return found


def digest(run: Path) -> str:
    """Return a hash of :func:`states`, bit for bit."""
    found = hashlib.sha256()
    for name, tensor in sorted(states(run).items()):
        found.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def largest_difference(run: Path, other: Path) -> float:
    """Return the largest difference between two runs' weights and buffers.

    The bias of attention's keys is left out: it moves no output, so its gradient is 0 but for rounding, which Adam
    blows up to the size of a step.
    """
    differences = []
    for (name, one), (_, two) in zip(states(run).items(), states(other).items(), strict=True):
        difference = (one.double() - two.double()).abs()
        if name.endswith("qkv.bias"):
            difference = torch.stack(difference.chunk(3))[[0, 2]]  # queries and values
        if not name[0].isdigit():
            differences.append(float(difference.max()))
    return max(differences)


def figures(run: Path) -> list[tuple[int, str, str]]:
    """Return (step, name, value) of every figure in ``metrics.csv`` that does not measure time, sorted."""
    with (run / "metrics.csv").open(newline="") as file:
        return sorted(
            (int(row["step"]), name, value)
            for row in csv.DictReader(file)
            for name, value in row.items()
            if value and name != "step" and not name.startswith(_TIMES)
        )
