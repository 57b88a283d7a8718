"""SimMIM: what is predicted, from what, and what counts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import equations
import numpy as np
import pytest
import recipes
import torch

from agssd.methods.simmim import SimMIM


def step(module: Any, views: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Return the loss, the masks (2B, D', H', W') and the predictions for all tokens (2B, N, P)."""
    seen: dict[str, Any] = {}
    encoder, encode = module.student["backbone"], module.student["backbone"].forward_views

    def spy(groups: Any, masks: Any, noise: Any) -> Any:
        features = encode(groups, masks, noise)
        seen.update(mask=masks[0], tokens=features[0].tokens)
        return features

    with monkeypatch.context() as patch:
        patch.setattr(encoder, "forward_views", spy)
        loss = module.pretrain_loss(views)
    return loss, seen["mask"], module.student["reconstruction"](seen["tokens"])


def test_simmim__loss_equals_a_reference_by_loops(tiny_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = recipes.build(SimMIM, drop_path=0.0)
    views = module.make_views(equations.half_air(recipes.parents(tiny_cache, [0, 1, 2, 3])))
    loss, masks, predicted = step(module, views, monkeypatch)
    grid = module.masks.grid
    per_view, left_out = [], 0
    for row, (b, v) in enumerate(np.ndindex(4, 2)):
        shares = equations.body_shares(views.foreground[b, v, 0], grid)
        hidden = np.flatnonzero(masks[row].flatten().numpy())
        assert len(hidden) == round(0.6 * 27)
        counted = [n for n in hidden if shares[n] >= 0.05]
        left_out += len(hidden) - len(counted)
        errors = [
            np.abs(equations.numbers(predicted[row, n]) - equations.patch_of(views.clean[b, v, 0], n, grid).ravel())
            for n in counted
        ]
        per_view.append(np.mean(errors))
    assert left_out > 4, "the batch has no air to leave out"
    assert float(loss.total) == pytest.approx(np.mean(per_view), rel=1e-5)
    assert not torch.equal(masks[0], masks[1]), "both views of a sample are hidden at the same places"


def test_simmim__what_is_hidden_never_reaches_a_prediction(tiny_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = recipes.build(SimMIM, drop_path=0.0)
    views = module.make_views(recipes.parents(tiny_cache, [0, 1]))
    first, masks, predicted = step(module, views, monkeypatch)
    covered = masks.unflatten(0, (2, 2))[:, :, None]
    for axis in (3, 4, 5):
        covered = covered.repeat_interleave(8, axis)
    noise = torch.rand(views.clean.shape, generator=torch.Generator().manual_seed(0))
    other = dataclasses.replace(views, clean=torch.where(covered, noise, views.clean))
    second, same_masks, same = step(module, other, monkeypatch)
    assert torch.equal(same_masks, masks) and torch.equal(same, predicted)
    assert float(second.total) != float(first.total), "the targets are the hidden voxels"
    shown = dataclasses.replace(views, clean=torch.where(covered, views.clean, noise))
    assert not torch.allclose(step(module, shown, monkeypatch)[2], predicted)


@pytest.mark.parametrize("score", ["random", "block"])
def test_simmim__hidden_units_are_whole_and_as_many_as_stated(
    score: str, tiny_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Defects of the family: single small patches, which their neighbours give away, and maskers that count a block that
    # overlaps another as newly hidden, so that less is hidden than stated.
    module = recipes.build(SimMIM, {"size_vox": (32, 32, 32)}, mask_block=2, mask_score=score)  # 4³ tokens, 2³ units
    views = module.make_views(recipes.parents(tiny_cache, [0, 1, 2, 3]))
    _, masks, _ = step(module, views, monkeypatch)
    units = masks.reshape(8, 2, 2, 2, 2, 2, 2).permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)
    assert torch.equal(units.all(-1), units.any(-1))
    assert units.any(-1).sum(1).tolist() == [round(0.6 * 8)] * 8
