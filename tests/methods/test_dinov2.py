"""DINOv2: Sinkhorn targets of rows that count, untied heads, KoLeo within each global view."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import equations
import numpy as np
import pytest
import recipes
import torch

import agssd.methods.dinov2
from agssd.methods.base import PretrainModule
from agssd.methods.dinov2 import DINOv2


@pytest.fixture(autouse=True)
def _halfway(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PretrainModule, "progress", property(lambda self: 0.15))


def moved() -> Any:
    """Return a module whose teacher has left its student."""
    module = recipes.build(DINOv2, drop_path=0.0)
    generator = torch.Generator().manual_seed(1)
    for parameter in module.teacher.parameters():
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return module


def test_dinov2__loss_equals_a_reference_by_loops(tiny_cache: Path) -> None:
    module, batch = moved(), 3
    views = module.make_views(equations.half_air(recipes.parents(tiny_cache, [0, 1, 2])))
    loss = module.pretrain_loss(views)
    temperature = 0.04 + (0.07 - 0.04) * 0.5
    teacher_cls, teacher_patch, student_patch, owner = [], [], [], []
    student_cls: list[list[np.ndarray]] = []
    features = np.zeros((2, batch, 48))
    for b, hidden in enumerate(views.hidden_view.tolist()):
        mask = module.view_panel(b)["mask"][hidden]
        rows = []
        for v in (0, 1):
            image = views.inputs[b, v][None]
            given = [mask[None] if v == hidden else None]
            student = module.student["backbone"].forward_views([image], given)[0]
            teacher = module.teacher["backbone"](image)
            features[v, b] = equations.numbers(student.cls[0])
            rows.append(equations.numbers(module.student["cls_head"](student.cls))[0])
            teacher_cls.append(equations.numbers(module.teacher["cls_head"](teacher.cls))[0])
            if v == hidden:
                shares = equations.body_shares(views.foreground[b, v, 0], module.grid)
                for n in np.flatnonzero(mask.flatten().numpy() & (shares >= 0.05)):
                    teacher_patch.append(equations.numbers(module.teacher["patch_head"](teacher.tokens[0, n])))
                    student_patch.append(equations.numbers(module.student["patch_head"](student.tokens[0, n])))
                    owner.append(b)
        for image in views.locals[b]:
            encoded = module.student["backbone"](image[None])
            rows.append(equations.numbers(module.student["cls_head"](encoded.cls))[0])
        student_cls.append(rows)
    targets = equations.sinkhorn(np.array(teacher_cls), temperature).reshape(batch, 2, -1)
    pairs = [
        equations.cross_entropy(targets[b, q], row / 0.1)
        for b in range(batch)
        for q in (0, 1)
        for v, row in enumerate(student_cls[b])
        if v != q
    ]
    patch_targets = equations.sinkhorn(np.array(teacher_patch), temperature)
    losses = [equations.cross_entropy(p, x / 0.1) for p, x in zip(patch_targets, student_patch, strict=True)]
    patch = np.mean([np.mean([x for x, o in zip(losses, owner, strict=True) if o == b]) for b in range(batch)])
    spread = np.mean([equations.koleo(features[v]) for v in (0, 1)])
    assert float(loss.terms["cls"]) == pytest.approx(np.mean(pairs), rel=1e-4)
    assert float(loss.terms["patch"]) == pytest.approx(patch, rel=1e-4)
    assert float(loss.terms["koleo"]) == pytest.approx(spread, rel=1e-4)
    assert float(loss.total) == pytest.approx(np.mean(pairs) + patch + 0.1 * spread, rel=1e-4)


def test_dinov2__koleo_across_views_of_a_sample__is_never_asked(
    tiny_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Views of one sample should agree; pushing them apart would fight the [CLS] term.
    asked: list[torch.Tensor] = []
    exact = agssd.methods.dinov2.koleo
    monkeypatch.setattr(agssd.methods.dinov2, "koleo", lambda rows: asked.append(rows.detach()) or exact(rows))
    module = moved()
    views = module.make_views(recipes.parents(tiny_cache, [0, 1, 2]))
    module.pretrain_loss(views)
    assert [len(rows) for rows in asked] == [3, 3]
    for b, hidden in enumerate(views.hidden_view.tolist()):
        clean = module.student["backbone"](views.inputs[b, 1 - hidden][None]).cls
        torch.testing.assert_close(asked[1 - hidden][b], clean[0].detach(), rtol=1e-4, atol=1e-4)


def test_dinov2__sinkhorn_with_each_rows_maximum__differs_from_what_is_used() -> None:
    # dinov2's pull request 583 subtracts each row's maximum against overflow; at three iterations that is another map.
    rows = np.random.default_rng(0).normal(0, 0.3, (24, 64))
    by_row = equations.sinkhorn(rows - rows.max(1, keepdims=True), 0.07)
    exact = equations.sinkhorn(rows, 0.07)
    used = equations.numbers(agssd.methods.dinov2.sinkhorn(torch.from_numpy(rows).float(), 0.07))
    assert np.abs(used - exact).max() < 1e-6 and np.abs(by_row - exact).max() > 0.01


def test_dinov2__heads_of_cls_and_patches_share_nothing() -> None:
    module = recipes.build(DINOv2)
    cls, patch = ({id(p) for p in module.student[name].parameters()} for name in ("cls_head", "patch_head"))
    assert cls and not cls & patch
