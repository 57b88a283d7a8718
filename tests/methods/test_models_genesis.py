"""Models Genesis' step: what goes in, and what it is compared with."""

from __future__ import annotations

from pathlib import Path

import pytest
import recipes
import torch

from agssd.methods.dino import DINO
from agssd.methods.models_genesis import ModelsGenesis


def test_models_genesis__restores_the_clean_view_from_the_corrupted_one(tiny_cache: Path) -> None:
    module = recipes.build(ModelsGenesis).eval()
    batch = recipes.parents(tiny_cache, [0, 1, 2, 3])
    views = module.make_views(batch)
    assert torch.equal(views.clean, recipes.build(DINO).make_views(batch).clean)  # the views of every recipe
    changed = (views.inputs != views.clean).flatten(2).float().mean(2)
    assert (changed > 0.05).float().mean() > 0.7
    with torch.no_grad():
        features = module.backbone(views.inputs.flatten(0, 1))
        restored = module.student["decoder"](features.tokens, features.grid)
        error = (restored.double() - views.clean.flatten(0, 1).double()).square().mean().item()
        assert module.pretrain_loss(views).total.item() == pytest.approx(error, rel=1e-5)
    panel = module.view_panel(2)
    torch.testing.assert_close(panel["reconstruction"], restored.unflatten(0, (4, 2))[2, :, 0])
    assert torch.equal(panel["globals"], views.inputs[2, :, 0])
