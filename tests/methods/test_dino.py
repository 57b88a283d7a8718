"""DINO: which pairs are compared, with what temperature and centre, and what a frozen last layer is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import equations
import numpy as np
import pytest
import recipes
import torch

from agssd.methods.base import PretrainModule
from agssd.methods.dino import DINO


@pytest.mark.parametrize("num_local", [0, 2])
def test_dino__loss_equals_a_reference_by_loops(
    num_local: int, tiny_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PretrainModule, "progress", property(lambda self: 0.15))
    module = recipes.build(DINO, {"num_local": num_local}, drop_path=0.0)
    generator = torch.Generator().manual_seed(1)
    module.centre.centre.copy_(torch.randn(64, generator=generator) * 0.05)
    for parameter in module.teacher.parameters():  # a teacher that has left the student
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    views = module.make_views(recipes.parents(tiny_cache, [0, 1, 2]))
    loss = module.pretrain_loss(views)
    centre, temperature = equations.numbers(module.centre.centre), 0.04 + (0.07 - 0.04) * 0.5
    pairs = []
    for b in range(3):
        images = [views.inputs[b, v] for v in (0, 1)] + ([] if views.locals is None else list(views.locals[b]))
        seen = [
            equations.numbers(module.student["head"](module.student["backbone"](image[None]).cls))[0]
            for image in images
        ]
        for q in (0, 1):
            logits = equations.numbers(module.teacher["head"](module.teacher["backbone"](images[q][None]).cls))[0]
            target = equations.softmax((logits - centre) / temperature)
            pairs += [equations.cross_entropy(target, row / 0.1) for v, row in enumerate(seen) if v != q]
    assert len(pairs) == 3 * 2 * (1 + num_local)
    assert float(loss.total) == pytest.approx(np.mean(pairs), rel=1e-5)


def test_dino__centre_is_the_mean_of_the_teachers_logits_moved_once_per_optimiser_step(tiny_cache: Path) -> None:
    module = recipes.build(DINO)
    views = [module.make_views(recipes.parents(tiny_cache, [b])) for b in (0, 1, 2)]
    for part in views:
        module.pretrain_loss(part)
    assert not module.centre.centre.any(), "the centre moves with micro-batches"
    module.after_optimizer_step()
    with torch.no_grad():
        rows = [module.teacher["head"](module.teacher["backbone"](part.inputs[0]).cls) for part in views]
    torch.testing.assert_close(module.centre.centre, 0.1 * torch.cat(rows).mean(0), rtol=0, atol=1e-6)


def test_dino__frozen_last_layer_is_the_students_and_thaws(tiny_cache: Path) -> None:
    seen: list[Any] = []

    class Watch(recipes.Recorder):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            seen.append([heads["head"].prototypes.detach().clone() for heads in (pl_module.student, pl_module.teacher)])

    module = recipes.build(DINO, freeze_last_layer=0.5)
    first = module.student["head"].prototypes.detach().clone()
    other = module.student["head"].mlp[0].weight.detach().clone()
    recipes.trainer(Watch(), max_steps=6).fit(module, recipes.data_module(tiny_cache))
    assert all(torch.equal(student, first) for student, _ in seen[:3])
    assert not torch.equal(seen[3][0], first), "the student's prototypes never thaw"
    assert not torch.equal(seen[-1][1], first), "the teacher's prototypes are frozen instead of the student's"
    assert not torch.equal(module.student["head"].mlp[0].weight, other)
