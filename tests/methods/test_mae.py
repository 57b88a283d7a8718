"""MAE: the encoder gets visible patches alone, the loss hidden ones alone, and cost follows the visible share."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import equations
import numpy as np
import pytest
import recipes
import torch
from torch.utils.flop_counter import FlopCounterMode

from agssd.methods import mae
from agssd.methods.mae import MAE
from agssd.models.vit import ViT
from agssd.transforms.edges import patches_of
from agssd.transforms.keyed_random import KeyedRandom
from agssd.transforms.views import body_of, mask_views


def step(module: Any, views: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any, Any, Any]:
    """Return the loss, what is visible (2B, V), what is hidden (2B, H), and its prediction (2B, H, P)."""
    seen: list[Any] = []
    decode, predict = module.student["decoder"].forward, module.student["reconstruction"].forward

    def spy(features: Any, visible: Any) -> Any:
        seen.append(visible)
        return decode(features, visible)

    def spy_voxels(tokens: Any) -> Any:
        seen.append(predict(tokens))
        return seen[-1]

    with monkeypatch.context() as patch:
        patch.setattr(module.student["decoder"], "forward", spy)
        patch.setattr(module.student["reconstruction"], "forward", spy_voxels)
        loss = module.pretrain_loss(views)
    visible, predicted = seen
    return loss, visible, module._step[2], predicted


@pytest.mark.parametrize("norm_pix", [True, False])
def test_mae__loss_equals_a_reference_by_loops(
    norm_pix: bool, tiny_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = recipes.build(MAE, drop_path=0.0, norm_pix=norm_pix)
    views = module.make_views(equations.half_air(recipes.parents(tiny_cache, [0, 1, 2, 3])))
    loss, visible, hidden, predicted = step(module, views, monkeypatch)
    per_view = []
    for row, (b, v) in enumerate(np.ndindex(4, 2)):
        assert sorted([*visible[row].tolist(), *hidden[row].tolist()]) == list(range(27))
        assert len(hidden[row]) == round(0.75 * 27)
        shares = equations.body_shares(views.foreground[b, v, 0], module.grid)
        spread = equations.numbers(views.clean[b, v]).std(ddof=1)
        errors = []
        for m, n in enumerate(hidden[row].tolist()):
            target = equations.patch_of(views.clean[b, v, 0], n, module.grid).ravel()
            if norm_pix:
                target = (target - target.mean()) / max(target.std(), 0.05 * spread)
            if shares[n] >= 0.05:
                errors.append(np.mean((equations.numbers(predicted[row, m]) - target) ** 2))
        per_view.append(np.mean(errors))
    assert float(loss.total) == pytest.approx(np.mean(per_view), rel=1e-5)


def test_mae__loss_on_visible_patches__there_is_none(tiny_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = recipes.build(MAE, drop_path=0.0, norm_pix=False)
    views = module.make_views(recipes.parents(tiny_cache, [0, 1]))
    first, visible, hidden, predicted = step(module, views, monkeypatch)
    mask = torch.zeros(4, 27, dtype=torch.bool).scatter_(1, hidden, True)
    covered = mask.reshape(2, 2, 1, *module.grid)
    for axis in (3, 4, 5):
        covered = covered.repeat_interleave(8, axis)
    noise = torch.rand(views.clean.shape, generator=torch.Generator().manual_seed(0))
    # What is hidden enters no prediction, and is the target.
    other, _, same_hidden, same = step(
        module, dataclasses.replace(views, clean=torch.where(covered, noise, views.clean)), monkeypatch
    )
    assert torch.equal(same_hidden, hidden) and torch.equal(same, predicted) and other.total != first.total
    # Targets alone: with predictions held, what is visible plays no part in the loss.
    with monkeypatch.context() as patch:
        patch.setattr(module.student["reconstruction"], "forward", lambda tokens: predicted)
        shown = dataclasses.replace(views, clean=torch.where(covered, views.clean, noise))
        assert torch.equal(module.pretrain_loss(shown).total, first.total)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_mae__cost_of_the_encoder_follows_the_visible_share(ratio: float) -> None:
    encoder = ViT(1, 8, depth=2, embed_dim=96, num_heads=3)
    volume = torch.zeros(2, 1, 48, 48, 48)  # 216 tokens

    def flops(count: int) -> int:
        with FlopCounterMode(display=False) as counter:
            encoder.forward_visible(volume, torch.arange(count).expand(2, -1))
        return counter.get_total_flops()

    with FlopCounterMode(display=False) as counter:
        encoder.forward_views([volume])
    whole = counter.get_total_flops()
    assert flops(216) == whole
    share = flops(round((1 - ratio) * 216)) / whole
    assert (1 - ratio) ** 2 < share <= (1 - ratio) + 2 / 217  # linear layers, less in attention; [CLS] is always there


def test_mae__ratio_that_varies_within_a_batch_is_refused(tiny_cache: Path) -> None:
    with pytest.raises(ValueError, match="give the same number twice"):
        recipes.build(MAE, mask_ratio=(0.3, 0.7))
    module = recipes.build(MAE)
    module.mask_ratio = (0.3, 0.7)  # as a schedule may set it
    with pytest.raises(ValueError, match="mask_ratio is \\(0.3, 0.7\\)"):
        module.pretrain_loss(module.make_views(recipes.parents(tiny_cache, [0])))


def test_mae__mask_token_of_the_encoder_stays_as_it_is() -> None:
    module = recipes.build(MAE)
    trained = {id(p) for group in module.configure_optimizers().param_groups for p in group["params"]}
    assert id(module.backbone.mask_token) not in trained
    assert id(module.student["decoder"].mask_token) in trained


def test_mae__average_of_its_weights_is_exported_if_asked_for(tiny_cache: Path) -> None:
    assert not recipes.build(MAE).has_teacher
    module, plain = recipes.build(MAE, average=True), recipes.build(MAE)
    views = module.make_views(recipes.parents(tiny_cache, [0, 1]))
    assert torch.equal(module.pretrain_loss(views).total, plain.pretrain_loss(views).total), "training is the same"
    before = [parameter.clone() for parameter in module.backbone.parameters()]
    with torch.no_grad():
        for parameter in module.student["backbone"].parameters():
            parameter.add_(1.0)
    module.update_teacher(0.75)
    for parameter, old in zip(module.backbone.parameters(), before, strict=True):
        torch.testing.assert_close(parameter, old + 0.25)


@pytest.mark.parametrize("norm_pix", [True, False])
def test_mae__panel_shows_predictions_where_hidden(norm_pix: bool, tiny_cache: Path) -> None:
    module = recipes.build(MAE, norm_pix=norm_pix)
    with pytest.raises(IndexError, match="not in the last batch"):
        module.view_panel(0)
    views = module.make_views(recipes.parents(tiny_cache, [0, 1]))
    module.pretrain_loss(views)
    panel = module.view_panel(1)
    covered = panel["mask"].repeat_interleave(8, 1).repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert torch.equal(panel["clean"], views.clean[1, :, 0])
    changed = panel["reconstruction"] != panel["clean"]
    assert not (changed & ~covered).any() and (changed & covered).sum() > 0.99 * covered.sum()
    with pytest.raises(IndexError, match="sample 2"):
        module.view_panel(2)


def test_mae__loss_is_the_teachers_error_per_patch_from_half_of_the_others(
    tiny_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = recipes.build(MAE, mask_score="loss", mask_ratio=(0.3, 0.3), norm_pix=False)
    for parameter in module.student.parameters():
        parameter.data.mul_(1.5)  # the score is the teacher's
    views = module.make_views(recipes.parents(tiny_cache, [0, 1, 2]))
    given: list[Any] = []
    monkeypatch.setattr(mae, "mask_views", lambda *all: given.append(all[-1]) or mask_views(*all))
    module.pretrain_loss(views)
    clean = views.clean.flatten(0, 1)
    target = patches_of(clean, module.patch)
    body = body_of(views.foreground.flatten(0, 1), module.patch)
    # By loops, for one view: each patch from the half that it is not in.
    keys = KeyedRandom(0, views.sample, "halves").split(2)
    order = KeyedRandom.from_keys(keys).uniform(27).argsort(1)[5]
    error = np.zeros(27)
    for visible, hidden in ((order[13:], order[:13]), (order[:13], order[13:])):
        features = module.teacher["backbone"].forward_visible(clean[5:6], visible[None])
        tokens = module.teacher["decoder"](features, visible[None])[:, hidden]
        predicted = equations.numbers(module.teacher["reconstruction"](tokens))[0]
        for m, n in enumerate(hidden.tolist()):
            error[n] = np.mean((predicted[m] - equations.numbers(target[5, n])) ** 2)
    chosen = body[5].numpy()
    expected = (error - error[chosen].mean()) / error[chosen].std()
    np.testing.assert_allclose(given[0][5].numpy()[chosen], expected[chosen], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_mae__step_runs_its_encoder_at_the_cost_of_the_visible_share(
    ratio: float, tiny_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Defect of the family: hidden patches replaced by a token, or dropped after the blocks, cost as much as all.
    module = recipes.build(MAE, {"size_vox": (32, 32, 32)}, mask_ratio=(ratio, ratio))  # 64 tokens
    encoder, encode, costs = module.student["backbone"], module.student["backbone"].forward_visible, []

    def counted(*given: Any) -> Any:
        with FlopCounterMode(display=False) as counter:
            features = encode(*given)
        costs.append(counter.get_total_flops())
        return features

    monkeypatch.setattr(encoder, "forward_visible", counted)
    views = module.make_views(recipes.parents(tiny_cache, [0, 1]))
    with FlopCounterMode(display=False) as counter:
        encoder.forward_views([views.clean.flatten(0, 1)])
    module.pretrain_loss(views)
    assert len(costs) == 1 and costs[0] / counter.get_total_flops() == pytest.approx(1 - ratio, abs=0.03)


def test_mae__noise_of_flat_patches_is_no_target(tiny_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Defect of the family: patches over their own deviation plus 1e-6 turn fluid and air into noise of variance 1.
    module = recipes.build(MAE, drop_path=0.0)
    views = module.make_views(recipes.parents(tiny_cache, [0, 1]))
    noise = torch.randn(views.clean.shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    noise[..., :8, :8, :8] += views.clean[..., :8, :8, :8]  # one patch with contrast
    body = torch.ones_like(views.foreground)
    head = module.student["reconstruction"]
    monkeypatch.setattr(head, "forward", lambda tokens: torch.zeros(*tokens.shape[:2], 512))
    loss = module.pretrain_loss(dataclasses.replace(views, clean=noise, foreground=body)).total
    assert float(loss) < 0.1  # one patch of 27 at most has a target of variance 1
