"""The teacher moves once per optimiser step, by the momentum that the step alone decides."""

from __future__ import annotations

import csv
import math

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from agssd.callbacks.ema_teacher import EMATeacher


def _expected(step: int, total: int, start: float, end: float = 1.0) -> float:
    return end - (end - start) * (1 + math.cos(math.pi * (step - 1) / total)) / 2


@pytest.mark.parametrize("accumulate", [1, 4])
def test_ema_teacher__updates_once_per_optimiser_step(toy, loader, make_trainer, accumulate) -> None:
    module = toy()
    first = module.teacher.weight.clone()
    make_trainer(EMATeacher(momentum_start=0.9), max_steps=5, accumulate_grad_batches=accumulate).fit(module, loader)
    assert len(module.ratios_at_views) == 5 * accumulate
    assert module.momenta == pytest.approx([_expected(step, 5, 0.9) for step in range(1, 6)], abs=1e-12)
    teacher = first.double()
    for momentum, student in zip(module.momenta, module.student_after_step, strict=True):
        teacher = momentum * teacher + (1 - momentum) * student.double()
    torch.testing.assert_close(module.teacher.weight.double(), teacher, rtol=0, atol=1e-6)
    assert not torch.equal(module.teacher.weight, first)


def test_ema_teacher__default_start_has_a_half_life_of_two_percent() -> None:
    callback = EMATeacher()
    assert callback.momentum(1, 1000) ** 20 == pytest.approx(0.5)
    assert callback.momentum(1, 200_000) == 0.996
    assert callback.momentum(200, 200) > 0.9999
    rising = [callback.momentum(step, 1000) for step in range(1, 1001)]
    assert rising == sorted(rising)


def test_ema_teacher__resumed_run_equals_undisturbed_run(toy, loader, make_trainer, tmp_path) -> None:
    whole = toy()
    start = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    keep = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=3, save_top_k=-1, filename="{step}")
    settings = {"max_steps": 8, "accumulate_grad_batches": 2, "enable_checkpointing": True}
    make_trainer(EMATeacher(0.8), keep, **settings).fit(whole, loader)
    resumed = toy()
    resumed.load_state_dict(start)
    shuffled_on = torch.utils.data.DataLoader(torch.utils.data.Subset(loader.dataset, range(12, 4096)), batch_size=2)
    path = tmp_path / "kept" / "step=3.ckpt"
    make_trainer(EMATeacher(0.8), **settings).fit(resumed, shuffled_on, ckpt_path=path, weights_only=True)
    assert resumed.momenta == whole.momenta[3:]
    assert torch.equal(resumed.teacher.weight, whole.teacher.weight)
    assert torch.equal(resumed.student.weight, whole.student.weight)


def test_ema_teacher__without_it_nothing_moves_the_teacher(toy, loader, make_trainer) -> None:
    module = toy()
    first = module.teacher.weight.clone()
    make_trainer(max_steps=3).fit(module, loader)
    assert torch.equal(module.teacher.weight, first)
    assert EMATeacher.updates_teacher is True


def test_ema_teacher__logs_momentum_of_every_step(toy, loader, make_trainer, tmp_path) -> None:
    module = toy()
    make_trainer(EMATeacher(0.9), max_steps=4, accumulate_grad_batches=2).fit(module, loader)
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["train/ema_momentum"]]
    assert [int(row["step"]) for row in rows] == [0, 1, 2, 3]
    assert [float(row["train/ema_momentum"]) for row in rows] == pytest.approx(module.momenta, abs=1e-6)


def test_ema_teacher__is_inert_or_an_error_for_a_module_without_teacher(plain, loader, make_trainer) -> None:
    callback = EMATeacher()
    make_trainer(callback, max_steps=2).fit(plain(), loader)
    assert not callback.active
    callback.explicit = True
    with pytest.raises(ValueError, match="EMATeacher is configured, but Plain does not implement .*TeacherStudent"):
        make_trainer(callback, max_steps=2).fit(plain(), loader)


def test_ema_teacher__endless_run_is_refused(toy, loader, make_trainer) -> None:
    with pytest.raises(ValueError, match="set trainer.max_steps"):
        make_trainer(EMATeacher(), max_steps=-1).fit(toy(), loader)


@pytest.mark.parametrize("settings", [{"momentum_start": 1.2}, {"momentum_end": -0.1}])
def test_ema_teacher__momentum_outside_range_is_refused(settings) -> None:
    with pytest.raises(ValueError, match="a momentum lies in"):
        EMATeacher(**settings)
