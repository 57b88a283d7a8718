"""best.ckpt holds the weights with the best probe, whatever the rhythm of the other checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch

from agssd.callbacks.best_checkpoint import BestCheckpoint
from agssd.callbacks.run_checkpoint import RunCheckpoint

Make = Callable[..., L.Trainer]
SETTINGS: dict[str, Any] = {"enable_checkpointing": True, "limit_val_batches": 0}


def step_of(path: Path) -> int:
    return int(torch.load(path, weights_only=True)["global_step"])


def fit(make_trainer: Make, folder: Path, scripted: Any, dice: dict[int, float], **given: Any) -> BestCheckpoint:
    """Train with a probe of these figures and both checkpoints in ``folder``."""
    resumed, steps = given.pop("ckpt_path", None), given.pop("max_steps", 4)
    best = BestCheckpoint(dirpath=str(folder), **given)
    probe, module, data = scripted(dice, every_n_steps=1)
    trainer = make_trainer(probe, best, RunCheckpoint(100, dirpath=str(folder)), max_steps=steps, **SETTINGS)
    trainer.fit(module, data, ckpt_path=resumed, weights_only=True)
    return best


def test_best_checkpoint__best_of_the_trained_weights__beside_the_last(
    make_trainer: Make, tmp_path: Path, scripted: Any
) -> None:
    best = fit(make_trainer, tmp_path / "c", scripted, {0: 0.99, 1: 0.5, 2: 0.9, 3: math.nan, 4: 0.7})
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["best.ckpt", "last.ckpt", "step00000004.ckpt"]
    assert step_of(tmp_path / "c/best.ckpt") == 2 and step_of(tmp_path / "c/last.ckpt") == 4
    assert float(best.best_model_score) == pytest.approx(0.9)


def test_best_checkpoint__last_step_between_two_probes__counts(
    make_trainer: Make, tmp_path: Path, scripted: Any
) -> None:
    probe, module, data = scripted({3: 0.5, 2: 0.4}, every_n_steps=2)
    best = BestCheckpoint(dirpath=str(tmp_path / "c"))
    make_trainer(probe, best, max_steps=3, **SETTINGS).fit(module, data)
    assert probe.steps == [0, 2, 3] and step_of(tmp_path / "c/best.ckpt") == 3


@pytest.mark.parametrize("first", [2, 4])  # 4: the step of last.ckpt itself
@pytest.mark.parametrize(("later", "later_wins"), [(0.8, False), (0.95, True)])
def test_best_checkpoint__resumed__competes_with_the_best_before(
    make_trainer: Make, tmp_path: Path, scripted: Any, first: int, later: float, later_wins: bool
) -> None:
    folder = tmp_path / "c"
    fit(make_trainer, folder, scripted, {first: 0.9})
    fit(make_trainer, folder, scripted, {6: later}, ckpt_path=str(folder / "last.ckpt"), max_steps=6)
    assert step_of(folder / "best.ckpt") == (6 if later_wins else first) and step_of(folder / "last.ckpt") == 6


def test_best_checkpoint__resumed_after_the_directory_moved__still_competes(
    make_trainer: Make, tmp_path: Path, scripted: Any
) -> None:
    fit(make_trainer, tmp_path / "c", scripted, {2: 0.9})
    moved = (tmp_path / "c").rename(tmp_path / "d")
    best = fit(make_trainer, moved, scripted, {6: 0.8}, ckpt_path=str(moved / "last.ckpt"), max_steps=6)
    assert step_of(moved / "best.ckpt") == 2 and best.best_model_path == str(moved / "best.ckpt")
    assert not (tmp_path / "c").exists()


def test_best_checkpoint__resumed_where_no_best_is__finds_a_new_one(
    make_trainer: Make, tmp_path: Path, scripted: Any
) -> None:
    fit(make_trainer, tmp_path / "c", scripted, {2: 0.9})
    last = str(tmp_path / "c/last.ckpt")
    fit(make_trainer, tmp_path / "d", scripted, {6: 0.8}, ckpt_path=last, max_steps=6)
    assert step_of(tmp_path / "d/best.ckpt") == 6 and step_of(tmp_path / "c/best.ckpt") == 2


def test_best_checkpoint__resumed_with_another_figure__old_scores_do_not_count(
    make_trainer: Make, tmp_path: Path, scripted: Any
) -> None:
    folder = tmp_path / "c"
    fit(make_trainer, folder, scripted, {2: 0.9})
    last = torch.load(folder / "last.ckpt", weights_only=True)
    last["callbacks"]["BestCheckpoint"]["monitor"] = "probe/knn_cls_balanced_accuracy"
    torch.save(last, folder / "last.ckpt")
    fit(make_trainer, folder, scripted, {6: 0.1}, ckpt_path=str(folder / "last.ckpt"), max_steps=6)
    assert step_of(folder / "best.ckpt") == 6


def test_best_checkpoint__switched_off_or_nothing_to_choose_by__writes_nothing(
    make_trainer: Make, tmp_path: Path, scripted: Any, plain: Any, loader: Any
) -> None:
    fit(make_trainer, tmp_path / "c", scripted, {2: 0.9}, enabled=False)
    best = BestCheckpoint(dirpath=str(tmp_path / "c"))
    make_trainer(best, max_steps=2, **SETTINGS).fit(plain(), loader)  # no probe in this run
    fit(make_trainer, tmp_path / "d", scripted, dict.fromkeys(range(5), math.nan))
    assert not list(tmp_path.glob("*/best.ckpt"))


def test_best_checkpoint__figure_that_is_not_measured__refused(
    make_trainer: Make, tmp_path: Path, scripted: Any
) -> None:
    with pytest.raises(ValueError, match=r"best_checkpoint.figure is probe/x, which is not .* probe/linear_seg_dice,"):
        fit(make_trainer, tmp_path / "c", scripted, {}, figure="probe/x")


def test_choose_by__first_of_the_list_that_is_measured() -> None:
    best = BestCheckpoint()
    for measured, figure in (
        (["probe/knn_seg_dice", "probe/linear_seg_dice", "probe/rankme_cls"], "probe/linear_seg_dice"),
        (["probe/knn_cls_auroc", "probe/knn_cls_balanced_accuracy"], "probe/knn_cls_balanced_accuracy"),
        ([], None),
    ):
        best.choose_by(measured)
        assert best.monitor == figure
    asked = BestCheckpoint("probe/rankme_cls")
    asked.choose_by(["probe/linear_seg_dice", "probe/rankme_cls"])
    assert asked.monitor == "probe/rankme_cls"
    with pytest.raises(ValueError, match="give one with --online_probe.cache"):
        asked.choose_by([])
