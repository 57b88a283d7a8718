"""Real trainings that are made to collapse, each in its own way, raise the alarm of that way; a sound one none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import recipes
import torch

from agssd.callbacks.collapse_monitor import CollapseMonitor
from agssd.callbacks.ema_teacher import EMATeacher
from agssd.methods.agssd import AGSSD
from agssd.methods.dino import DINO
from agssd.callbacks.run_checkpoint import RunCheckpoint

STEPS = 120


def train(
    kind: type[Any],
    cache: Path,
    out: Path,
    edit: Callable[[Any, dict[str, Any]], None] | None = None,
    monitor: dict[str, Any] | None = None,
    steps: int = STEPS,
    callbacks: tuple[L.Callback, ...] = (),
    momentum: tuple[float | None, float] = (0.8, 1.0),
    **settings: Any,
) -> tuple[Any, list[dict[str, Any]]]:
    """Return the module and what was done about it in a run whose batches are edited."""

    class Edited(kind):  # type: ignore[misc, valid-type]
        def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
            if edit is not None and self.trainer.training:
                edit(self, batch)
            return super().transfer_batch_to_device(batch, device, dataloader_idx)

    own = {"every_n_steps": 10, "min_samples": 24, "grace": 0.3} | (monitor or {})
    module = recipes.build(Edited, **settings)
    watch = CollapseMonitor(**own)
    trainer = recipes.trainer(
        EMATeacher(*momentum), watch, *callbacks, teacher=False, max_steps=steps, default_root_dir=out,
        enable_checkpointing=bool(callbacks),
    )  # fmt: skip
    trainer.fit(module, recipes.data_module(cache))
    path = out / "actions.jsonl"
    return module, [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def alarms(actions: list[dict[str, Any]]) -> set[str]:
    return {action["alarm"] for action in actions if action["action"] == "alarm"}


def constant(module: Any, batch: dict[str, Any]) -> None:
    """Air everywhere."""
    batch["image"].zero_()
    batch["foreground"].fill_(1)


def twins(module: Any, batch: dict[str, Any]) -> None:
    """Every crop twice in its batch: same voxels, same draws."""
    for value in batch.values():
        value[1::2] = value[0::2]


def three_scans(module: Any, batch: dict[str, Any]) -> None:
    """Three crops for the whole run."""
    if not hasattr(module, "kept"):
        module.kept = {name: value[:3].clone() for name, value in batch.items()}
    rows = torch.arange(len(batch["sample"])) % 3
    for name, value in batch.items():
        value.copy_(module.kept[name][rows])


WAYS: dict[str, dict[str, Any]] = {
    "cls_uniform": {"kind": DINO, "temperature_teacher": (2.0, 2.0), "monitor": {"uniform_steps": 20}},
    "cls_peaked": {"kind": DINO, "centre_momentum": 1.0, "temperature_teacher": (0.01, 0.01), "lr": 3e-3},
    "cls_features_lost": {"kind": DINO, "edit": constant},
    "cls_duplicates": {"kind": DINO, "edit": twins, "monitor": {"max_cosine": 2.0, "hard_rank": 0.0}},
    "cls_low_rank": {"kind": DINO, "edit": three_scans},
    "gradient_ratio": {"kind": AGSSD, "weight_reconstruction": 1e4, "steps": 40},
    "teacher_equal": {"kind": DINO, "momentum": (0.0, 0.0), "steps": 40},
}


@pytest.mark.parametrize("name", WAYS)
def test_collapse__a_run_made_to_collapse_raises_its_alarm(name: str, tiny_cache: Path, tmp_path: Path) -> None:
    found = alarms(train(cache=tiny_cache, out=tmp_path, **WAYS[name])[1])
    assert name in found, found


def test_collapse__weights_that_are_no_numbers_are_rolled_back(tiny_cache: Path, tmp_path: Path) -> None:
    """The guard cannot help where the teacher itself is broken: every step is withheld; the alarm can."""

    class Break(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
            if trainer.global_step == 25 and not watch:
                watch.append(25)
                module.teacher["head"].prototypes.data.fill_(float("nan"))

    watch: list[int] = []
    keep = RunCheckpoint(every_n_train_steps=5, dirpath=str(tmp_path / "checkpoints"))
    module, done = train(
        DINO, tiny_cache, tmp_path, callbacks=(Break(), keep), steps=50, monitor={"policy": "rollback", "grace": 0.9}
    )
    (rollback,) = (one for one in done if one["action"] == "rollback")
    assert rollback["alarms"] == ["non_finite"] and rollback["from_step"] == 30 and rollback["to_step"] <= 20
    assert all(value.isfinite().all() for value in module.state_dict().values())
