"""The probe changes nothing, measures the encoder that is kept, and chooses the best checkpoint."""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L
import numpy as np
import pytest
import recipes
import torch

from agssd.callbacks.ema_teacher import EMATeacher
from agssd.callbacks.online_probe import OnlineProbe
from agssd.callbacks.run_checkpoint import RunCheckpoint
from agssd.callbacks.throughput import Throughput
from agssd.data_modules.cache import VolumeCache
from agssd.data_modules.probe_set import ProbeSet
from agssd.evaluation.probe import READOUTS, figure_names, run_readouts
from agssd.evaluation.probe_features import encode
from agssd.methods.agssd import AGSSD
from agssd.methods.simmim import SimMIM
from agssd.tasks.encoders import load_encoder

Make = Callable[..., L.Trainer]
QUICK: dict[str, Any] = {"every_n_steps": 1, "window_vox": (16, 16, 16), "max_vox": 32, "linear_steps": 4}
SETTINGS: dict[str, Any] = {"limit_val_batches": 0, "use_distributed_sampler": False}


OF_TIME = ("probe/step", "probe/seconds", "probe/time_share")


def figures(folder: Path) -> dict[int, dict[str, float]]:
    """Return, for each probe in the log, its figures but those of time by the number of steps before it."""
    with (folder / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("probe/seconds")]
    found = {}
    for row in rows:
        names = [name for name, value in row.items() if name.startswith("probe/") and value]
        found[int(float(row["probe/step"]))] = {name: float(row[name]) for name in names if name not in OF_TIME}
    return found


@pytest.mark.parametrize("kind", [AGSSD, SimMIM])
def test_online_probe__training_is_the_same_bit_for_bit(make_trainer: Make, tiny_cache: Path, kind: Any) -> None:
    results = []
    for probe in ([], [OnlineProbe(**QUICK)]):
        module = recipes.build(kind)
        modes: list[bool] = []
        original = module.training_step

        def step(batch: Any, batch_idx: int, original: Any = original, module: Any = module, modes: Any = modes) -> Any:
            modes.extend(part.training for part in module.modules())
            return original(batch, batch_idx)

        module.training_step = step
        torch.manual_seed(7)
        random.seed(7)
        np.random.seed(7)
        recorder = recipes.Recorder()
        make_trainer(EMATeacher(), recorder, *probe, max_steps=3, **SETTINGS).fit(
            module, recipes.data_module(tiny_cache)
        )
        states = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
        results.append((recorder.losses, module.state_dict(), modes, states))
    (losses, state, modes, random_states), (other_losses, other_state, other_modes, other_random) = results
    assert losses == other_losses and modes == other_modes
    for name, value in state.items():
        assert torch.equal(value, other_state[name]), name
    assert torch.equal(random_states[0], other_random[0]) and random_states[1:] == other_random[1:]


def test_online_probe__figures_are_those_of_the_teacher(make_trainer: Make, tiny_cache: Path, tmp_path: Path) -> None:
    module = recipes.build(AGSSD)
    probe = OnlineProbe(at_start=False, **QUICK)
    make_trainer(EMATeacher(0.5, 0.5), probe, max_steps=2, **SETTINGS).fit(module, recipes.data_module(tiny_cache))
    data = ProbeSet(VolumeCache(tiny_cache), max_vox=32)
    expected, student = (
        run_readouts(encode(part["backbone"].eval(), data.volumes(), (16, 16, 16), 0.0), data, READOUTS, 4).figures
        for part in (module.teacher, module.student)
    )
    found = figures(tmp_path)
    assert sorted(found) == [1, 2]
    assert {name.removeprefix("probe/") for name in found[1]} >= set(figure_names(data, READOUTS)) - {"knn_cls_auroc"}
    assert found[2].pop("probe/held_out_seen") == 0 and found[2].pop("probe/held_out_subjects") == 2
    told = {name.removeprefix("probe/"): value for name, value in found[2].items()}
    assert told == pytest.approx(expected, rel=0, abs=0, nan_ok=True)  # AUROC of a single class is NaN
    assert expected != student and found[1] != found[2]


def test_online_probe__best_checkpoint_is_the_one_with_the_best_probe(
    make_trainer: Make, tiny_cache: Path, tmp_path: Path
) -> None:
    best = RunCheckpoint(1, 1, "probe/knn_seg_dice", "max", str(tmp_path / "checkpoints"))
    probe = OnlineProbe(readouts=["knn-seg"], num_folds=2, **QUICK)
    settings = SETTINGS | {"enable_checkpointing": True}
    data = recipes.data_module(tiny_cache)
    make_trainer(EMATeacher(0.0, 0.0), probe, best, max_steps=4, **settings).fit(recipes.build(AGSSD, lr=0.02), data)
    found = {step: row["probe/knn_seg_dice"] for step, row in figures(tmp_path).items() if step}
    assert set(found) >= {2, 3, 4} and len(set(found.values())) > 2
    winner = max(found, key=lambda step: found[step])
    assert winner != 4  # else the last would do too
    assert Path(best.best_model_path).name == f"step{winner:08d}.ckpt"
    frozen = load_encoder(best.best_model_path)
    own = ProbeSet(VolumeCache(tiny_cache), 2, max_vox=32, kinds=("label",))
    again = run_readouts(encode(frozen, own.volumes(), (16, 16, 16), 0.0), own, ["knn-seg"], 4).figures
    assert again["knn_seg_dice"] == found[winner]
    assert own.held_out_seen(data.seen) == 5 == figures(tmp_path)[winner]["probe/held_out_seen"]


@pytest.mark.parametrize(
    ("probe", "checkpoint", "reason"),
    [
        ({}, ("probe/linear_seg_dice", "min"), "set checkpoint.mode to max"),
        ({}, ("probe/linear_seg_dice_7", "max"), "not measured in this run; choose one of probe/linear_seg_dice,"),
        ({"every_n_steps": 2}, ("probe/linear_seg_dice", "max"), "make the first a multiple of the second"),
        ({"readouts": ["knn-cls"]}, ("probe/linear_seg_dice", "max"), "not measured"),
        ({"window_vox": (12, 16, 16)}, None, "no multiple of the encoder's patch"),
        ({"cache": "missing.h5"}, None, "missing.h5 does not exist"),
        ({"num_folds": 9}, None, "num_folds is 9 for 5 subjects"),
    ],
)
def test_online_probe__what_cannot_work__refused_before_the_first_step(
    make_trainer: Make, tiny_cache: Path, tmp_path: Path, probe: Any, checkpoint: Any, reason: str
) -> None:
    module = recipes.build(AGSSD)
    callbacks: list[Any] = [EMATeacher(), OnlineProbe(**QUICK | probe)]
    if checkpoint:
        callbacks.append(RunCheckpoint(1, 1, *checkpoint, str(tmp_path / "checkpoints")))
    trainer = make_trainer(*callbacks, max_steps=1, **SETTINGS | {"enable_checkpointing": bool(checkpoint)})
    with pytest.raises(ValueError, match=reason):
        trainer.fit(module, recipes.data_module(tiny_cache))
    assert trainer.global_step == 0


def test_online_probe__without_labels__does_nothing_unless_a_checkpoint_waits_for_it(
    make_trainer: Make, make_cache: Callable[..., Path], tmp_path: Path
) -> None:
    cache = make_cache(tmp_path / "c.h5", 4, (32, 40, 32), labelled=False, num_classes=0, splits=["train"] * 4)
    make_trainer(EMATeacher(), OnlineProbe(**QUICK), max_steps=1, **SETTINGS).fit(
        recipes.build(AGSSD), recipes.data_module(cache)
    )
    assert not figures(tmp_path)
    waiting = RunCheckpoint(1, 1, "probe/knn_cls_auroc", "max", str(tmp_path / "checkpoints"))
    trainer = make_trainer(
        EMATeacher(), OnlineProbe(**QUICK), waiting, max_steps=1, **SETTINGS | {"enable_checkpointing": True}
    )
    with pytest.raises(ValueError, match="give one with --online_probe.cache"):
        trainer.fit(recipes.build(AGSSD), recipes.data_module(cache))


def test_online_probe__another_cache_and_modules_without_encoder(
    make_trainer: Make, make_cache: Callable[..., Path], tiny_cache: Path, tmp_path: Path, plain: Any, loader: Any
) -> None:
    bare = make_cache(tmp_path / "c.h5", 4, (32, 40, 32), labelled=False, num_classes=0, splits=["train"] * 4)
    probe = OnlineProbe(str(tiny_cache), readouts=["linear-cls", "knn-cls"], **QUICK)
    make_trainer(EMATeacher(), probe, max_steps=1, **SETTINGS).fit(recipes.build(AGSSD), recipes.data_module(bare))
    found = figures(tmp_path)[1]
    assert found["probe/held_out_subjects"] == 2 and 0 <= found["probe/linear_cls_balanced_accuracy"] <= 1
    trainer = make_trainer(OnlineProbe(every_n_steps=1), max_steps=1)
    trainer.fit(plain(), loader)
    assert not any(name.startswith("probe/") for name in trainer.callback_metrics)
    with pytest.raises(ValueError, match="does not implement"):
        asked = OnlineProbe(every_n_steps=1)
        asked.explicit = True
        make_trainer(asked, max_steps=1).fit(plain(), loader)


def test_online_probe__before_the_first_step_and_after_the_last_however_few(
    make_trainer: Make, scripted: Any, tmp_path: Path
) -> None:
    for settings, steps, expected in (
        ({"every_n_steps": 1000}, 3, [0, 3]),
        ({"every_n_steps": 2}, 4, [0, 2, 4]),  # the last one is not measured twice
        ({"every_n_steps": 2, "at_start": False, "at_end": False}, 3, [2]),
    ):
        probe, module, data = scripted(**settings)
        trainer = make_trainer(probe, max_steps=steps, **SETTINGS)
        trainer.fit(module, data)
        assert probe.steps == expected and float(trainer.callback_metrics["probe/step"]) == expected[-1]
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    probe, module, data = scripted(every_n_steps=1000)
    make_trainer(probe, max_steps=5, **SETTINGS).fit(module, data, ckpt_path=tmp_path / "c.ckpt", weights_only=True)
    assert probe.steps == [5]  # a resumed run has trained weights at its start


def test_online_probe__its_time_is_its_own__throughput_is_that_of_training(
    make_trainer: Make, scripted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=0.0)
    fake = SimpleNamespace(perf_counter=lambda: clock.now)
    monkeypatch.setattr("agssd.callbacks.throughput.time", fake)
    monkeypatch.setattr("agssd.callbacks.online_probe.time", fake)

    def spend(seconds: float) -> None:
        clock.now += seconds

    probe, module, data = scripted(every_n_steps=4, after=lambda: spend(8.0))
    data.val_dataloader = data.train_dataloader
    module.on_train_batch_start = lambda *_: spend(2.0)
    module.validation_step = lambda *_: spend(100.0)
    settings = SETTINGS | {"limit_val_batches": 1, "val_check_interval": 3, "check_val_every_n_epoch": None}
    settings["num_sanity_val_steps"] = 0
    make_trainer(Throughput(every_n_steps=2), probe, max_steps=9, **settings).fit(module, data)
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    speeds = [float(row["throughput/s_per_step"]) for row in rows if row.get("throughput/s_per_step")]
    assert speeds == pytest.approx([2.0] * 4)  # steps 2, 4, 6 and 8; probes after 4 and 8, validation after 3 and 6
    probes = [row for row in rows if row.get("probe/seconds")]
    assert [float(row["probe/seconds"]) for row in probes] == pytest.approx([8.0] * 4)  # 0, 4, 8, 9
    # 8 s of a probe and 4 steps of 2 s; nothing is known of steps before the first one
    assert [row["probe/time_share"] and float(row["probe/time_share"]) for row in probes] == ["", 0.5, 0.5, 0.5]


def test_online_probe__diverged_encoder__figures_are_nan_and_the_run_goes_on(
    make_trainer: Make, tiny_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = recipes.build(SimMIM)
    with torch.no_grad():
        module.backbone.norm.weight.fill_(torch.nan)
    trainer = make_trainer(OnlineProbe(at_start=False, **QUICK), max_steps=1, **SETTINGS)
    trainer.fit(module, recipes.data_module(tiny_cache))
    found = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("probe/")}
    own = {name: found.pop(name) for name in ("probe/step", "probe/seconds", "probe/held_out_subjects")}
    assert own["probe/held_out_subjects"] == 2 and found.pop("probe/held_out_seen") == 0
    assert "probe/linear_seg_dice" in found and all(math.isnan(value) for value in found.values())
    assert any("features are not finite" in str(record.msg) for record in caplog.records)


def test_online_probe__costly__says_which_interval_would_do(
    make_trainer: Make, tiny_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_trainer(EMATeacher(), OnlineProbe(**QUICK), max_steps=2, **SETTINGS).fit(
        recipes.build(AGSSD), recipes.data_module(tiny_cache)
    )
    said = [
        record.getMessage() for record in caplog.records if "online_probe.every_n_steps to about" in str(record.msg)
    ]
    assert len(said) == 1 and "more than 2.0 %" in said[0]


def test_online_probe__nonsense__refused() -> None:
    with pytest.raises(ValueError, match="online_probe.every_n_steps is 0"):
        OnlineProbe(every_n_steps=0)
    with pytest.raises(ValueError, match="online_probe.readouts is empty"):
        OnlineProbe(readouts=[])


def test_online_probe__failure__stops_the_run_with_its_reason(
    make_trainer: Make, tiny_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise ValueError("a broken case")

    monkeypatch.setattr(OnlineProbe, "_measure", fail)
    data = recipes.data_module(tiny_cache)
    trainer = make_trainer(EMATeacher(), OnlineProbe(**QUICK), max_steps=2, **SETTINGS)
    with pytest.raises(ValueError, match="a broken case"):
        trainer.fit(recipes.build(AGSSD), data)
    # what another rank does, which only hears of it
    trainer = make_trainer(EMATeacher(), OnlineProbe(**QUICK), max_steps=2, **SETTINGS)
    monkeypatch.setattr(type(trainer), "is_global_zero", False)
    monkeypatch.setattr(type(trainer.strategy), "broadcast", lambda self, obj, src=0: (None, "a broken case"))
    with pytest.raises(RuntimeError, match="the probe failed on rank 0: a broken case"):
        trainer.fit(recipes.build(AGSSD), data)
