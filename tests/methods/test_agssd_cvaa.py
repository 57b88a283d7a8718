"""AG-SSD's attention across views: what it fuses with what, by which places, and what it must not see."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import recipes
import torch
from recipes import build_whole, step_of
from torch import Tensor


def gradient_of(term: Tensor, parameters: Any) -> list[Tensor | None]:
    """Return the gradients, None where the term does not depend on a parameter."""
    return list(torch.autograd.grad(term, list(parameters), retain_graph=True, allow_unused=True))


@pytest.mark.parametrize("cvaa", ["student", "casa"])
def test_agssd__fuser_serves_the_patch_term_alone(cvaa: str, batch: Any, at: Any) -> None:
    at(0.6)
    module = build_whole(cvaa=cvaa)
    _, loss, _ = step_of(module, batch)
    fuser = module.student["fuser"].parameters
    assert all(gradient is None for gradient in gradient_of(loss.terms["rec"], fuser()))
    assert all(gradient is None for gradient in gradient_of(loss.terms["cls"], fuser()))
    assert all(gradient is not None and gradient.any() for gradient in gradient_of(loss.terms["patch"], fuser()))


def test_agssd__plain_branch_keeps_its_weight_beside_the_fused_one(batch: Any, at: Any) -> None:
    module = build_whole()
    views = module.make_views(batch)
    for progress, share in ((0.0, 0.0), (0.125, 0.25), (0.2, 0.5), (1.0, 0.5)):
        at(progress)
        term = module.pretrain_loss(views).terms["patch"]
        step = module._step
        means = [((x * step.counts).sum(1) / step.counts.sum(1)).mean() for x in (step.plain, step.fused)]
        assert float(term) == pytest.approx(float((1 - share) * means[0] + share * means[1]), rel=1e-5)


@pytest.mark.parametrize("given", [{"orientations": "all"}, {"rotation_deg": 20.0}, {"orientations": "flips"}], ids=str)
def test_agssd__position_bias_is_the_true_distance_in_pitches_of_the_other_view(given: Any, batch: Any) -> None:
    module = build_whole(given)
    views = module.make_views(batch)
    affine = views.geometry.globals.affine.double().numpy()
    grid = np.array(module.grid)
    centres = np.array([(2 * np.array(index) + 1) / grid - 1 for index in np.ndindex(*module.grid)])
    bias, distance = module._position_bias(views, views.hidden_view)
    valid = bias.any(-1)
    assert 0 < valid.sum() < valid.numel()
    for b, hidden in enumerate(views.hidden_view.tolist()):
        own, other = affine[b, hidden], affine[b, 1 - hidden]
        parent = centres @ own[:3, :3].T + own[:3, 3]
        # Pitches: how far apart neighbouring tokens of the other view lie in the parent, along its own axes.
        pitch = other[:3, :3] * 2 / grid
        keys = centres @ other[:3, :3].T + other[:3, 3]
        offset = np.einsum("ij,nmj->nmi", np.linalg.inv(pitch), parent[:, None] - keys[None])
        inside = (np.abs((parent - other[:3, 3]) @ np.linalg.inv(other[:3, :3]).T) <= 1 - 1 / grid + 1e-4).all(-1)
        np.testing.assert_array_equal(valid[b].numpy(), inside)
        expected = np.where(inside[:, None], -(offset**2).sum(-1) / 8, 0)
        np.testing.assert_allclose(bias[b].numpy(), expected, atol=1e-4)
        np.testing.assert_allclose(distance[b].numpy(), np.abs(offset).max(-1), atol=1e-4)


def spied(module: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Tensor]]:
    """Return a list that receives arguments and result of every later call of the module."""
    calls: list[tuple[Any, Tensor]] = []
    forward = module.forward

    def spy(*args: Any) -> Tensor:
        calls.append((args, forward(*args)))
        return calls[-1][1]

    monkeypatch.setattr(module, "forward", spy)
    return calls


@pytest.mark.parametrize("num_local", [0, 2])
@pytest.mark.parametrize("student_views", ["both", "masked"])
def test_agssd__teacher_fuses_hidden_tokens_and_cls_with_the_other_view(
    student_views: str, num_local: int, batch: Any, at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    at(0.6)
    module = build_whole({"num_local": num_local}, student_views=student_views, assignment="centring")
    for block in module.teacher["fuser"].blocks:
        block.scale_attention.fill_(1.0)
    fuser = module.teacher["fuser"]
    with monkeypatch.context() as patch:
        calls = spied(fuser, patch)
        views, _, step = step_of(module, batch)
    (_, tokens), (_, cls) = calls
    assert not tokens.requires_grad and not cls.requires_grad
    asked = [(b, v) for b, hidden in enumerate(views.hidden_view.tolist()) for v in (0, 1)]
    if student_views == "masked" and views.locals is None:
        asked = [(b, 1 - hidden) for b, hidden in enumerate(views.hidden_view.tolist())]
    assert len(cls) == len(asked)
    for b, hidden in enumerate(views.hidden_view.tolist()):
        one = module.make_views(recipes.take(batch, slice(b, b + 1)))
        for v in (0, 1):
            own, other = (module.teacher["backbone"](views.clean[b, which][None]) for which in (v, 1 - v))
            if v == hidden:
                bias, _ = module._position_bias(one, torch.tensor([v]))
                expected = fuser(own.tokens, other.tokens, bias)[0, step.index[b]]
                torch.testing.assert_close(tokens[b], expected, rtol=0, atol=1e-5)
            if (b, v) in asked:
                expected = fuser(own.cls[:, None], other.tokens)[0, 0]
                torch.testing.assert_close(cls[asked.index((b, v)), 0], expected, rtol=0, atol=1e-5)
    # Each [CLS] that the student gives is compared with the other view's target, a quarter of it after fusion.
    given = [(b, v) for b, hidden in enumerate(views.hidden_view.tolist()) for v in (0, 1)]
    if student_views == "masked":
        given = [(b, hidden) for b, hidden in enumerate(views.hidden_view.tolist())]
    assert len(step.teacher_cls) == len(given)
    for target, (b, v) in zip(step.teacher_cls, given, strict=True):
        plain = module.teacher["backbone"](views.clean[b, 1 - v][None]).cls
        both = module.teacher["cls_head"](torch.cat([plain, cls[asked.index((b, 1 - v))]]))
        expected = torch.lerp(*(both / 0.04).softmax(-1), module.fused_share_cls)
        torch.testing.assert_close(target, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("masked_views", [1, 2])
def test_agssd__student_fuses_each_hidden_token_with_its_own_bias_and_keys(
    masked_views: int, batch: Any, at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    at(0.6)
    module = build_whole(masked_views=masked_views)
    calls = spied(module.student["fuser"], monkeypatch)
    views, _, step = step_of(module, batch)
    ((_, _, bias, forbidden), _) = calls[0]
    which = module._masked(views)
    biases, distance = module._position_bias(views, which)
    keys = module._forbidden(views, step.mask, distance)
    assert len(bias) == len(which) == 4 * masked_views
    for row, index in enumerate(step.index):
        assert torch.equal(bias[row], biases[row, index]) and torch.equal(forbidden[row], keys[row, index])


def test_agssd__student_is_fused_with_the_teachers_tokens_of_the_unmasked_view(
    batch: Any, at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    at(0.6)
    memories = {}
    for cvaa in ("student", "casa"):
        module = build_whole(cvaa=cvaa)
        with torch.no_grad():
            for p in module.teacher.parameters():
                p.add_(0.01)
        calls = spied(module.student["fuser"], monkeypatch)
        views, _, step = step_of(module, batch)
        ((query, memory, *_), _) = calls[0]
        assert query.requires_grad
        other = torch.stack([step.tokens[b, 1 - v] for b, v in enumerate(views.hidden_view.tolist())])
        memories[cvaa] = (memory.requires_grad, torch.allclose(memory, other, atol=1e-6))
    # Alice's form takes keys from the student, ours from the teacher without gradient.
    assert memories == {"student": (False, True), "casa": (True, False)}


def test_agssd__hidden_tokens_lose_sight_of_their_counterpart(batch: Any) -> None:
    module = build_whole(counterpart_drop=1.0, key_dropout=0.0)
    views, _, step = step_of(module, batch)
    _, distance = module._position_bias(views, views.hidden_view)
    forbidden = module._forbidden(views, step.mask, distance)
    assert torch.equal(forbidden, step.mask[..., None] & (distance < 1.5))
    module.counterpart_drop, module.key_dropout = 0.0, 0.25
    many = dataclasses.replace(views, sample=torch.arange(2000), hidden_view=views.hidden_view)
    dropped = module._forbidden(many, step.mask[:1].expand(2000, -1), distance[:1].expand(2000, -1, -1))
    assert (dropped == dropped[:, :1]).all(), "a key is hidden from every query"
    assert abs(float(dropped[:, 0].float().mean()) - 0.25) < 0.01


def test_agssd__nothing_is_dropped_in_evaluation(batch: Any, at: Any) -> None:
    at(0.6)
    module = build_whole().eval()
    other = build_whole(drop_path=0.0, key_dropout=0.0, counterpart_drop=0.0).train()
    views = module.make_views(batch)
    with torch.no_grad():
        assert float(module.pretrain_loss(views).total) == pytest.approx(float(other.pretrain_loss(views).total), 1e-6)
        module.train()
        assert abs(float(module.pretrain_loss(views).total - other.pretrain_loss(views).total)) > 1e-4
    assert module.eval()._drop_noise(views) == [None, None]
