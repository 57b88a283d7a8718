"""Every recipe of ``agssd.methods`` on frames (B, C, H, W): what holds for volumes, by the same code."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import recipes
import torch

from agssd.callbacks.panel_drawing import save_panels
from agssd.hub import export_backbone, load_backbone
from agssd.methods.base import PretrainModule
from agssd.models.backbone import Backbone
from agssd.models.resnet_fpn import ResNetFPN
from agssd.models.swin_unetr import SwinUNETREncoder
from agssd.models.vit import ViT

RECIPES = recipes.find_recipes()
every_recipe = pytest.mark.parametrize("kind", RECIPES, ids=lambda kind: kind.__name__)


def build(kind: type[PretrainModule], **given: Any) -> Any:
    """A small module of the recipe for frames, the same weights every time."""
    torch.manual_seed(0)
    encoder = ViT(1, 8, depth=2, embed_dim=48, num_heads=3, drop_path=0.3, spatial_dims=2)
    views = recipes.OverlapCrops((32, 24), (0.6, 1.0), num_local=2, local_size_vox=(16, 16), prob_flip=(0.0, 0.5))
    named = inspect.signature(kind).parameters
    settings = {name: value for name, value in recipes.SMALL.items() if name in named}
    if "base_grid" in named:
        settings["base_grid"] = (2, 2)
    return kind(**settings | {"backbone": encoder, "views": views} | given)


def parents(count: int = 4, shape: tuple[int, int] = (56, 48)) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows, columns = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in shape), indexing="ij")
    waves = torch.stack([(6 * rows + k).sin() * (5 * columns - k).cos() for k in range(count)])[:, None]
    noise = torch.rand(waves.shape, generator=generator)
    body = (rows**2 + columns**2 < 1.6).int()
    blocks = 1 + torch.arange(shape[0])[:, None] // 12 * 8 + torch.arange(shape[1]) // 12
    return {
        "image": (60 * waves + 60 * noise + 90).clamp(0, 255).to(torch.int16),
        "foreground": body.to(torch.uint8).expand(count, 1, -1, -1),
        "scale": torch.ones(count, 1),
        "offset": torch.zeros(count, 1),
        "low": torch.zeros(count, 1),
        "high": torch.full((count, 1), 255.0),
        "edge_q99": torch.full((count, 1), 40.0),
        "is_ct": torch.zeros(count, dtype=torch.bool),
        "spacing_mm": torch.tensor([[0.4, 0.6]]).expand(count, -1),
        "centre_mm": torch.zeros(count, 2),
        "sample": torch.arange(count),
        "case": torch.arange(count),
        "broken": torch.full((count, 4), -1),
        "regions": (blocks * body).int().expand(count, 1, -1, -1),
    }


@pytest.fixture(autouse=True)
def halfway(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put modules without a trainer in the middle of their run, where every schedule has left its start."""
    monkeypatch.setattr(PretrainModule, "progress", property(lambda self: 0.6))


@every_recipe
def test_recipe__every_trainable_parameter_gets_gradient_and_the_panel_is_drawn(
    kind: type[PretrainModule], tmp_path: Any
) -> None:
    module = build(kind)
    module.pretrain_loss(module.make_views(parents())).total.backward()
    still = [n for n, p in module.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not still
    assert all(p.grad.isfinite().all() for p in module.parameters() if p.grad is not None)
    seen = getattr(module, "observations", None)
    if seen is not None:
        figures = seen["scalars"]
        assert figures and all(figure.ndim == 0 for figure in figures.values())
    if hasattr(module, "view_panel"):
        save_panels([module.view_panel(1)], tmp_path / "panel.png", "frames")
        assert (tmp_path / "panel.png").stat().st_size > 2000


def swin() -> Backbone:
    return SwinUNETREncoder(1, 24, 4, (2,), (2,), 3, 2.0, spatial_dims=2)


def resnet() -> Backbone:
    return ResNetFPN(1, "basic", (1, 1, 1), 8, 48, 8, 4, spatial_dims=2)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "encoder"), [(recipes.SECOND, swin), (recipes.THIRD, resnet)])
@every_recipe
def test_recipe__other_families_of_encoders_learn_from_frames_where_they_do_from_volumes(
    kind: type[PretrainModule], family: str, encoder: Callable[[], Backbone]
) -> None:
    given = recipes.needs(kind, family)
    if given is None:
        reason = recipes.refusal(kind, {}, family) or ""
        with pytest.raises(ValueError, match=reason.rpartition(" ")[2]):
            build(kind, backbone=encoder())
        return
    module = build(kind, backbone=encoder(), **given)
    loss = module.pretrain_loss(module.make_views(parents())).total
    loss.backward()
    assert loss.isfinite()
    still = [n for n, p in module.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not still


@every_recipe
def test_recipe__loss_is_the_mean_over_samples_however_the_batch_is_cut(kind: type[PretrainModule]) -> None:
    module = build(kind)
    if module.couples_samples:
        pytest.skip("it says that samples meet in its loss")
    module.train()
    batch = parents()
    with torch.no_grad():
        whole = module.pretrain_loss(module.make_views(batch)).total
        parts = [module.pretrain_loss(module.make_views(recipes.take(batch, slice(k, k + 2)))).total for k in (0, 2)]
    torch.testing.assert_close(torch.stack(parts).mean(), whole, rtol=1e-5, atol=1e-6)


@every_recipe
def test_recipe__views_and_encoder_of_other_axes_are_refused_when_it_is_built(kind: type[PretrainModule]) -> None:
    with pytest.raises(ValueError, match="takes 3 axes of space; give sizes of 3 numbers|give 2 numbers"):
        build(kind, backbone=recipes.encoder("vit", 0.0))
    with pytest.raises(ValueError, match="takes 2 axes of space|give 3 numbers"):
        build(kind, views=recipes.OverlapCrops((24, 24, 24), local_size_vox=(16, 16, 16)))


def test_export__encoder_of_frames_comes_back_for_other_patches(tmp_path: Any) -> None:
    encoder = build(next(kind for kind in RECIPES if kind.__name__ == "MAE")).backbone.eval()
    path = export_backbone(encoder, tmp_path)
    x = torch.randn(2, 1, 40, 24)
    torch.testing.assert_close(load_backbone(path)(x).tokens, encoder(x).tokens)
    larger = load_backbone(path, patch_size=16, in_channels=2)
    assert larger.patch_size == (16, 16) and larger(torch.randn(1, 2, 32, 48)).grid == (2, 3)
